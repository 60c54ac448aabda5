#include "random_layer.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

namespace mpqdm::test {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHeaderBytes = 128;

size_t align(size_t at) { return (at + kAlignment - 1) / kAlignment * kAlignment; }

template <class T>
void put(std::vector<uint8_t>& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

template <class T>
size_t append(std::vector<uint8_t>& bytes, const std::vector<T>& values) {
  const size_t at = align(bytes.size());
  bytes.resize(align(at + values.size() * sizeof(T)));
  std::memcpy(bytes.data() + at, values.data(), values.size() * sizeof(T));
  return at;
}

int bits_of(Random& random, Encoding encoding) {
  if (encoding == Encoding::byte) return 8;
  return static_cast<int>(random.integer(1, encoding == Encoding::table ? 4 : 7));
}

TestBlock make_block(Random& random, uint32_t depth, bool extreme) {
  TestBlock block;
  block.encoding = static_cast<Encoding>(random.integer(0, 3));
  block.bits = bits_of(random, block.encoding);
  const int last = (1 << block.bits) - 1;
  // The bytes' extremes are -128 and 127.
  const uint8_t ends[2] = {static_cast<uint8_t>(block.bits == 8 ? 128 : 0),
                           static_cast<uint8_t>(block.bits == 8 ? 127 : last)};
  block.codes.resize(size_t{kBlockRows} * depth);
  for (int row = 0; row < kBlockRows; ++row) {
    const uint8_t end = random.choice(ends);
    for (uint32_t k = 0; k < depth; ++k) {
      block.codes[static_cast<size_t>(row) * depth + k] =
          extreme ? end : static_cast<uint8_t>(random.integer(0, last));
    }
  }
  if (block.encoding == Encoding::table) {
    // Kernels may tell tables with -128 from others.
    const int64_t greatest = random.integer(extreme ? 127 : 0, 128);
    block.tables.resize(size_t{kBlockRows} << block.bits);
    for (int8_t& level : block.tables) {
      const int64_t inner = random.integer(-greatest, greatest);
      const int64_t drawn = !extreme ? inner : (inner < 0 ? -greatest : greatest);
      level = static_cast<int8_t>(std::min<int64_t>(drawn, 127));
    }
  }
  return block;
}

uint8_t largest(const TestBlock& block) {
  int greatest = 0;
  if (block.encoding == Encoding::odd) return static_cast<uint8_t>((1 << block.bits) - 1);
  if (block.encoding == Encoding::integer) return static_cast<uint8_t>(1 << (block.bits - 1));
  if (block.encoding == Encoding::byte) return 128;
  for (const int8_t level : block.tables) greatest = std::max(greatest, std::abs(int{level}));
  return static_cast<uint8_t>(greatest);
}

// Code of one place of a tile; those behind the depth are code 0.
uint8_t code_at(const TestBlock& block, uint32_t depth, int row, uint32_t input) {
  return input < depth ? block.codes[static_cast<size_t>(row) * depth + input] : uint8_t{0};
}

// One tile in bit planes: of 4 bits, of 2, of 1, from the low end of a code.
void append_tile(std::vector<uint8_t>& bytes, const TestBlock& block, uint32_t depth,
                 uint32_t first) {
  int from = 0;
  for (const int width : {4, 2, 1}) {
    if (block.bits != 8 && (block.bits & width) == 0) continue;
    const int vectors = block.bits == 8 ? 8 : width;
    std::vector<uint8_t> plane(size_t{kGroupBytes} * static_cast<size_t>(vectors));
    for (int group = 0; group < 8; ++group) {
      for (int lane = 0; lane < kGroupBytes; ++lane) {
        const auto input = first + static_cast<uint32_t>(kGroupDepth * group + lane % kGroupDepth);
        const uint8_t code = code_at(block, depth, lane / kGroupDepth, input);
        const auto at = static_cast<size_t>(kGroupBytes * (group % vectors) + lane);
        const int piece = block.bits == 8 ? code : (code >> from) & ((1 << width) - 1);
        plane[at] = static_cast<uint8_t>(plane[at] | piece << (width * (group / vectors)));
      }
    }
    bytes.insert(bytes.end(), plane.begin(), plane.end());
    from += width;
    if (block.bits == 8) break;
  }
}

}  // namespace

int8_t TestBlock::level(int row, uint8_t code) const {
  switch (encoding) {
    case Encoding::odd:
      return static_cast<int8_t>(2 * code - ((1 << bits) - 1));
    case Encoding::integer:
      return static_cast<int8_t>(code - (1 << (bits - 1)));
    case Encoding::table:
      return tables[(static_cast<size_t>(row) << bits) + code];
    case Encoding::byte:
      break;
  }
  return static_cast<int8_t>(code);
}

std::vector<int8_t> TestLayer::weights() const {
  std::vector<int8_t> result(size_t{rows} * depth());
  for (size_t slot = 0; slot < order.size(); ++slot) {
    if (order[slot] == kNoRow) continue;
    const TestBlock& block = blocks[slot / kBlockRows];
    const size_t row = slot % kBlockRows;
    for (size_t k = 0; k < depth(); ++k) {
      result[order[slot] * size_t{depth()} + k] =
          block.level(static_cast<int>(row), block.codes[row * depth() + k]);
    }
  }
  return result;
}

TestLayer make_layer(Random& random, uint32_t rows, uint32_t channels, uint32_t kernel,
                     bool extreme) {
  TestLayer layer{rows, channels, kernel, {}, {}, {}, {}};
  const uint32_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (uint32_t i = 0; i < blocks; ++i) {
    layer.blocks.push_back(make_block(random, layer.depth(), extreme));
  }
  layer.order.assign(size_t{blocks} * kBlockRows, kNoRow);
  std::iota(layer.order.begin(), layer.order.begin() + rows, 0u);
  if (!random.chance(3)) {  // else in the order of the channels
    for (uint32_t i = rows - 1; i > 0; --i) {
      std::swap(layer.order[i], layer.order[static_cast<size_t>(random.integer(0, i))]);
    }
  }
  for (uint32_t i = 0; i < rows; ++i) layer.scale.push_back(random.number(1e-4f, 0.1f));
  if (random.chance(2)) {
    for (uint32_t i = 0; i < rows; ++i) layer.bias.push_back(random.number(-3.0f, 3.0f));
  }
  return layer;
}

std::vector<uint8_t> pack(const TestLayer& layer) {
  std::vector<uint8_t> bytes(kHeaderBytes);
  const auto blocks = static_cast<uint32_t>(layer.blocks.size());
  const size_t order_at = append(bytes, layer.order);
  std::vector<BlockEntry> entries(blocks);
  const size_t block_at = append(bytes, entries);
  const size_t scale_at = append(bytes, layer.scale);
  const size_t bias_at = layer.bias.empty() ? 0 : append(bytes, layer.bias);
  for (uint32_t i = 0; i < blocks; ++i) {
    const TestBlock& block = layer.blocks[i];
    const size_t tables_at = block.tables.empty() ? 0 : append(bytes, block.tables);
    std::vector<uint8_t> codes;
    for (uint32_t k = 0; k < layer.depth(); k += kTileDepth) {
      append_tile(codes, block, layer.depth(), k);
    }
    const size_t codes_at = append(bytes, codes);
    put(bytes, block_at + i * sizeof(BlockEntry),
        BlockEntry{codes_at, static_cast<uint32_t>(tables_at / kAlignment),
                   static_cast<uint8_t>(block.encoding), static_cast<uint8_t>(block.bits),
                   largest(block), 0});
  }
  put(bytes, 0, uint32_t{0x4c51504d});
  put(bytes, 4, uint16_t{1});
  put(bytes, 6, static_cast<uint16_t>(kHeaderBytes));
  put(bytes, 8, uint64_t{bytes.size()});
  const uint32_t sizes[] = {layer.rows, layer.depth(), layer.channels,
                            layer.kernel, blocks,       layer.bias.empty() ? 0u : 1u};
  std::memcpy(bytes.data() + 24, sizes, sizeof sizes);
  const uint64_t sections[] = {order_at, block_at, scale_at, bias_at};
  std::memcpy(bytes.data() + 48, sections, sizeof sections);
  sign(bytes);
  return bytes;
}

void sign(std::vector<uint8_t>& blob) {
  uint64_t sum = 0;
  for (size_t i = 0; kHeaderBytes + 8 * i + 8 <= blob.size(); ++i) {
    uint64_t word;
    std::memcpy(&word, blob.data() + kHeaderBytes + 8 * i, sizeof word);
    const uint64_t factor = (i * 0x9e3779b97f4a7c15u + 0xd1b54a32d192ed03u) | 1;
    sum += (word ^ (word >> 32)) * factor;
  }
  put(blob, 16, sum);
}

}  // namespace mpqdm::test
