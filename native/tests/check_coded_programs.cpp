#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cases.h"
#include "mpqdm/coded_program.h"
#include "mpqdm/codes.h"
#include "random_layer.h"

namespace mpqdm::test {
namespace {

constexpr int kClass = 20;  // of all rows; channels and places are not shifted
constexpr size_t kFewRows = 4;

struct CodedProgram {
  std::vector<uint8_t> plain, coded;
  std::vector<size_t> blobs_at;  // of the coded ones
};

void append(std::vector<uint8_t>& bytes, const std::vector<uint8_t>& more) {
  bytes.insert(bytes.end(), more.begin(), more.end());
}

template <class T>
void append_number(std::vector<uint8_t>& bytes, T value) {
  const auto* octets = reinterpret_cast<const uint8_t*>(&value);
  bytes.insert(bytes.end(), octets, octets + sizeof value);
}

std::vector<uint8_t> random_bytes(Random& random, int64_t most) {
  std::vector<uint8_t> bytes(static_cast<size_t>(random.integer(0, most)));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.integer(0, 255));
  return bytes;
}

// Codes of a layer as numbers [row of a block][channel][place]; empty if one is -128, which cannot be coded.
std::vector<int8_t> numbers_of(const TestLayer& layer) {
  const size_t places = size_t{layer.kernel} * layer.kernel;
  std::vector<int8_t> numbers;
  for (const TestBlock& block : layer.blocks) {
    const int half = block.bits == 8 ? 0 : 1 << (block.bits - 1);
    for (size_t row = 0; row < kBlockRows; ++row) {
      for (size_t channel = 0; channel < layer.channels; ++channel) {
        for (size_t place = 0; place < places; ++place) {
          const uint8_t code = block.codes[row * layer.depth() + place * layer.channels + channel];
          numbers.push_back(static_cast<int8_t>(code - half));
        }
      }
    }
  }
  const bool has_escape = std::find(numbers.begin(), numbers.end(), -128) != numbers.end();
  return has_escape ? std::vector<int8_t>{} : numbers;
}

std::vector<uint8_t> encode(const TestLayer& layer, const std::vector<int8_t>& numbers) {
  const size_t rows = layer.blocks.size() * kBlockRows, places = size_t{layer.kernel} * layer.kernel;
  const size_t shifts = (rows >= kFewRows ? layer.channels : 0) + (places > 1 ? places : 0);
  std::vector<uint8_t> stream((rows * 6 + 7) / 8);
  for (size_t bit = 0; bit < rows * 6; ++bit) {
    if (kClass >> (bit % 6) & 1) stream[bit / 8] = static_cast<uint8_t>(stream[bit / 8] | 1 << (bit % 8));
  }
  for (size_t i = 0; i < shifts; i += 2) {
    stream.push_back(static_cast<uint8_t>(i + 1 < shifts ? 0x88 : 0x08));  // 8 is no shift
  }
  const size_t head = stream.size();
  const std::vector<uint8_t> classes(numbers.size(), kClass);
  stream.resize(head + encoded_limit(numbers.size()));
  stream.resize(head + encode_codes(numbers.data(), classes.data(), numbers.size(), stream.data() + head));
  return stream;
}

void clear_codes(const TestLayer& layer, uint8_t* bytes, size_t size) {
  Blob blob;
  Blob::read(bytes, size, &blob);
  for (uint32_t index = 0; index < blob.blocks(); ++index) {
    const Block block = blob.block(index);
    const auto of_block = static_cast<size_t>(blob.tiles() * kTileDepth * layer.blocks[index].bits);
    std::memset(bytes + (block.codes - blob.data()), 0, of_block);
  }
}

CodedProgram make_program(Random& random) {
  CodedProgram program;
  std::vector<uint8_t> streams, entries;
  uint64_t layers = 0;
  program.plain = random_bytes(random, 100);
  program.coded = program.plain;
  for (int64_t left = random.integer(0, 3); left > 0; --left) {
    const uint32_t kernels[] = {1, 3};
    const TestLayer layer =
        make_layer(random, static_cast<uint32_t>(random.integer(1, 20)),
                   4 * static_cast<uint32_t>(random.integer(1, 20)), random.choice(kernels), false);
    const std::vector<uint8_t> blob = pack(layer);
    const std::vector<int8_t> numbers = numbers_of(layer);
    const size_t at = program.plain.size();
    append(program.plain, blob);
    append(program.coded, blob);
    if (!numbers.empty()) {
      program.blobs_at.push_back(at);
      const std::vector<uint8_t> stream = encode(layer, numbers);
      clear_codes(layer, program.coded.data() + at, blob.size());
      append_number(entries, uint64_t{at});
      append_number(entries, uint64_t{stream.size()});
      append(streams, stream);
      ++layers;
    }
    const std::vector<uint8_t> between = random_bytes(random, 100);
    append(program.plain, between);
    append(program.coded, between);
  }
  append(program.coded, streams);
  append(program.coded, entries);
  append_number(program.coded, uint64_t{program.plain.size()});
  append_number(program.coded, layers);
  append_number(program.coded, uint32_t{0});
  append_number(program.coded, uint16_t{32});
  append_number(program.coded, uint16_t{1});
  append_number(program.coded, uint32_t{0});
  append_number(program.coded, uint32_t{0x4351504d});
  return program;
}

// Places the codes in a copy of exactly this size, so that a sanitizer sees what is touched behind it.
const char* place(const KernelSet& kernels, const std::vector<uint8_t>& coded,
                  std::vector<uint8_t>& placed) {
  const auto copy = std::make_unique<uint8_t[]>(coded.size());
  std::copy(coded.begin(), coded.end(), copy.get());
  size_t program_bytes = 0;
  const char* wrong = place_codes(kernels, copy.get(), coded.size(), &program_bytes);
  if (wrong == nullptr) placed.assign(copy.get(), copy.get() + program_bytes);
  return wrong;
}

void damage(Random& random, const CodedProgram& program, std::vector<uint8_t>& bytes) {
  const auto size = static_cast<int64_t>(bytes.size());
  if (random.chance(8)) {
    bytes.erase(bytes.begin() + random.integer(0, size - 1));
    return;
  }
  const auto streams_at = static_cast<int64_t>(program.plain.size());
  // The heads of blobs, the streams, the list of layers and the end of the file.
  int64_t least = random.chance(2) ? streams_at : std::max<int64_t>(0, size - 80), until = size;
  if (!program.blobs_at.empty() && random.chance(2)) {
    least = static_cast<int64_t>(program.blobs_at[0]);
    until = std::min<int64_t>(size, least + 1500);
  }
  for (int64_t left = random.integer(1, 3); left > 0; --left) {
    bytes[static_cast<size_t>(random.integer(least, until - 1))] =
        static_cast<uint8_t>(random.integer(0, 255));
  }
}

bool is_whole(const std::vector<uint8_t>& bytes, size_t at) {
  Blob blob;
  return Blob::read(bytes.data() + at, bytes.size() - at, &blob) == BlobError::none &&
         blob.verify_checksum() == BlobError::none;
}

const char* check_damaged(uint64_t seed) {
  Random random(seed);
  const CodedProgram program = make_program(random);
  std::vector<uint8_t> bytes = program.coded;
  damage(random, program, bytes);
  std::vector<uint8_t> placed;
  if (place(best_kernels(), bytes, placed) != nullptr) return nullptr;
  if (placed.size() == bytes.size()) return nullptr;  // taken for a program without codes
  if (placed.size() != program.plain.size()) return "another length was taken for right";
  const bool whole = std::all_of(program.blobs_at.begin(), program.blobs_at.end(),
                                 [&](size_t at) { return is_whole(placed, at); });
  return whole ? nullptr : "a damaged blob was taken for right";
}

}  // namespace

size_t check_coded_programs(const KernelSet& kernels, uint64_t seed, size_t count) {
  Failures failures("coded program", kernels.name);
  for (uint64_t at = seed; at < seed + count; ++at) {
    Random random(at);
    const CodedProgram program = make_program(random);
    std::vector<uint8_t> placed;
    const char* wrong = place(kernels, program.coded, placed);
    if (wrong == nullptr && placed != program.plain) wrong = "other bytes";
    if (wrong == nullptr && place(kernels, program.plain, placed) == nullptr &&
        placed != program.plain) {
      wrong = "a plain program was changed";
    }
    if (wrong != nullptr) failures.add(at, wrong);
  }
  return failures.count();
}

size_t check_damaged_programs(uint64_t seed, size_t count) {
  Failures failures("damaged program", "best");
  for (uint64_t at = seed; at < seed + count; ++at) {
    const char* wrong = check_damaged(at);
    if (wrong != nullptr) failures.add(at, wrong);
  }
  return failures.count();
}

}  // namespace mpqdm::test
