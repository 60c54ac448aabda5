#include "mpqdm/blob.h"

#include <cstring>
#include <vector>

namespace mpqdm {
namespace {

constexpr uint32_t kMagic = 0x4c51504du;  // "MPQL"
constexpr uint16_t kVersion = 1;
constexpr size_t kHeaderBytes = 128;
constexpr size_t kAlignment = 64;
constexpr uint32_t kMaxRows = 1u << 20;
// depth * 255 * 128 stays below 2^31, so int32 sums are exact.
constexpr uint32_t kMaxDepth = 1u << 16;
constexpr uint32_t kHasBias = 1;

struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes, checksum;
  uint32_t rows, depth, channels, kernel, blocks, flags;
  uint64_t order_at, block_at, scale_at, bias_at;
  uint8_t zeros[48];
};
static_assert(sizeof(Header) == kHeaderBytes);

template <class T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Whether [at, at + size) is an aligned part of what lies behind the header.
bool is_section(uint64_t at, uint64_t size, uint64_t bytes) {
  return at % kAlignment == 0 && at >= kHeaderBytes && at <= bytes && size <= bytes - at;
}

bool are_sizes(const Header& header) {
  if (header.rows == 0 || header.rows > kMaxRows) return false;
  if (header.depth == 0 || header.depth > kMaxDepth || header.channels == 0) return false;
  if (header.channels % kGroupDepth != 0) return false;
  if (header.kernel != 1 && header.kernel != 3) return false;
  if (uint64_t{header.channels} * header.kernel * header.kernel != header.depth) return false;
  if (header.blocks != (header.rows + kBlockRows - 1) / kBlockRows) return false;
  return (header.flags & ~kHasBias) == 0;
}

// Whether the sections that the header names lie where their sizes put them. The checksum does not
// cover the header, so a changed offset must not lead to other numbers.
bool are_offsets(const Header& header) {
  uint64_t at = kHeaderBytes;
  const auto is_next = [&](uint64_t offset, uint64_t size) {
    const bool right = offset == at && is_section(at, size, header.bytes);
    at += (size + kAlignment - 1) / kAlignment * kAlignment;
    return right;
  };
  const uint64_t rows = header.rows, blocks = header.blocks;
  return is_next(header.order_at, blocks * kBlockRows * 4) &&
         is_next(header.block_at, blocks * sizeof(BlockEntry)) &&
         is_next(header.scale_at, rows * 4) &&
         ((header.flags & kHasBias) != 0 ? is_next(header.bias_at, rows * 4) : header.bias_at == 0);
}

// Greatest absolute value that an encoding can express without a table.
int largest_level(Encoding encoding, int bits) {
  switch (encoding) {
    case Encoding::odd:
      return (1 << bits) - 1;
    case Encoding::integer:
      return 1 << (bits - 1);
    default:
      return 128;
  }
}

bool is_width(const BlockEntry& entry) {
  switch (static_cast<Encoding>(entry.encoding)) {
    case Encoding::odd:
    case Encoding::integer:
      return entry.bits >= 1 && entry.bits <= 7;
    case Encoding::table:
      return entry.bits >= 1 && entry.bits <= 4;
    case Encoding::byte:
      return entry.bits == 8;
  }
  return false;
}

// Kernels sum as many products in 16 bits as `largest` lets them, so it must be true: for levels
// that follow from the width it is compared with them, for tables with the table. For bytes the
// kernels use no bound below 128.
BlobError check_block(const uint8_t* data, const BlockEntry& entry, uint64_t bytes, uint64_t tiles) {
  if (!is_width(entry) || entry.zero != 0) return BlobError::bad_block;
  const auto encoding = static_cast<Encoding>(entry.encoding);
  const uint64_t tile = uint64_t{kTileDepth} * entry.bits;
  if (!is_section(entry.codes_at, tiles * tile, bytes)) return BlobError::bad_offset;
  if (encoding != Encoding::table) {
    if (entry.tables_at != 0) return BlobError::bad_block;
    const bool exact = entry.largest == largest_level(encoding, entry.bits);
    return exact || encoding == Encoding::byte ? BlobError::none : BlobError::bad_block;
  }
  const uint64_t at = uint64_t{entry.tables_at} * kAlignment;
  const size_t size = size_t{kBlockRows} << entry.bits;
  if (!is_section(at, size, bytes)) return BlobError::bad_offset;
  // As unsigned bytes, of which all CPUs find the least and the greatest many at once.
  uint8_t least = 128, greatest = 128;
  for (size_t i = 0; i < size; ++i) {
    const auto level = static_cast<uint8_t>(data[at + i] ^ 0x80);
    least = level < least ? level : least;
    greatest = level > greatest ? level : greatest;
  }
  const int largest = greatest - 128 > 128 - least ? greatest - 128 : 128 - least;
  return entry.largest == largest ? BlobError::none : BlobError::bad_block;
}

bool is_order(const uint8_t* order, uint32_t rows, uint32_t blocks) {
  std::vector<uint8_t> seen(rows, 0);  // not bits: each would wait for the one stored before it
  const uint64_t slots = uint64_t{blocks} * kBlockRows;
  for (uint64_t slot = 0; slot < slots; ++slot) {
    const uint32_t row = load<uint32_t>(order + 4 * slot);
    if (slot >= rows) {
      if (row != kNoRow) return false;
      continue;
    }
    if (row >= rows || seen[row] != 0) return false;
    seen[row] = 1;
  }
  return true;
}

}  // namespace

const char* describe(BlobError error) {
  switch (error) {
    case BlobError::none:
      return "the blob is whole";
    case BlobError::too_short:
      return "the blob is shorter than its header says";
    case BlobError::not_a_blob:
      return "the tensor holds no weight blob";
    case BlobError::other_version:
      return "the blob has a format version that this library does not read";
    case BlobError::bad_sizes:
      return "the blob's rows, depth, channels, kernel and blocks do not fit together";
    case BlobError::bad_offset:
      return "a section lies outside the blob";
    case BlobError::bad_block:
      return "a block has an encoding, width or bound that there is not";
    case BlobError::bad_order:
      return "the order of the rows is no permutation";
    case BlobError::bad_checksum:
      return "the blob's bytes were changed: the checksum differs";
  }
  return "unknown error";
}

BlobError Blob::read(const uint8_t* data, size_t size, Blob* blob) {
  if (size < kHeaderBytes) return BlobError::too_short;
  const auto header = load<Header>(data);
  if (header.magic != kMagic) return BlobError::not_a_blob;
  if (header.version != kVersion || header.header_bytes != kHeaderBytes) {
    return BlobError::other_version;
  }
  if (header.bytes > size || header.bytes < kHeaderBytes) return BlobError::too_short;
  if (header.bytes % kAlignment != 0 || !are_sizes(header)) return BlobError::bad_sizes;
  for (const uint8_t zero : header.zeros) {
    if (zero != 0) return BlobError::bad_sizes;
  }
  const bool has_bias = (header.flags & kHasBias) != 0;
  if (!are_offsets(header)) return BlobError::bad_offset;
  Blob view;
  view.data_ = data;
  view.bytes_ = header.bytes;
  view.checksum_ = header.checksum;
  view.rows_ = header.rows;
  view.depth_ = header.depth;
  view.channels_ = header.channels;
  view.kernel_ = header.kernel;
  view.blocks_ = header.blocks;
  view.order_ = data + header.order_at;
  view.entries_ = data + header.block_at;
  view.scales_ = data + header.scale_at;
  view.biases_ = has_bias ? data + header.bias_at : nullptr;
  for (uint64_t index = 0; index < header.blocks; ++index) {
    const auto entry = load<BlockEntry>(view.entries_ + index * sizeof(BlockEntry));
    const BlobError error =
        check_block(data, entry, header.bytes, static_cast<uint64_t>(view.tiles()));
    if (error != BlobError::none) return error;
  }
  if (!is_order(view.order_, header.rows, header.blocks)) return BlobError::bad_order;
  *blob = view;
  return BlobError::none;
}

BlobError Blob::verify_checksum() const {
  const uint64_t found = blob_checksum(data_ + kHeaderBytes, bytes_ - kHeaderBytes);
  return found == checksum_ ? BlobError::none : BlobError::bad_checksum;
}

Block Blob::block(uint32_t index) const {
  const auto entry = load<BlockEntry>(entries_ + size_t{index} * sizeof(BlockEntry));
  const auto encoding = static_cast<Encoding>(entry.encoding);
  const uint8_t* tables = data_ + size_t{entry.tables_at} * kAlignment;
  return Block{
      data_ + entry.codes_at,
      encoding == Encoding::table ? reinterpret_cast<const int8_t*>(tables) : nullptr,
      encoding,
      entry.bits,
      encoding == Encoding::byte ? 128 : entry.largest,
  };
}

uint64_t blob_checksum(const uint8_t* data, size_t size) {
  uint64_t sum = 0, step = 0xd1b54a32d192ed03u;
  for (size_t at = 0; at + 8 <= size; at += 8, step += 0x9e3779b97f4a7c15u) {
    const auto word = load<uint64_t>(data + at);
    sum += (word ^ (word >> 32)) * (step | 1);
  }
  return sum;
}

}  // namespace mpqdm
