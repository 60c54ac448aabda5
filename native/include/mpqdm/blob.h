// Weight blobs (FORMAT.md): a checked view of a layer's packed weights, read in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mpqdm {

constexpr int kBlockRows = 8;     // rows that share one encoding
constexpr int kTileDepth = 32;    // inputs of a tile
constexpr int kGroupDepth = 4;    // inputs that one instruction multiplies
constexpr int kTileBytes = kBlockRows * kTileDepth;       // unpacked
constexpr int kGroupBytes = kBlockRows * kGroupDepth;     // unpacked
constexpr uint32_t kNoRow = 0xffffffffu;

enum class Encoding : uint8_t { odd = 0, integer = 1, table = 2, byte = 3 };

// One entry of the block table, as it lies in the blob.
struct BlockEntry {
  uint64_t codes_at;
  uint32_t tables_at;  // in steps of 64 bytes; 0 without
  uint8_t encoding;
  uint8_t bits;
  uint8_t largest;  // greatest absolute value of a code in the block
  uint8_t zero;
};
static_assert(sizeof(BlockEntry) == 16);

// What the kernels read of one block.
struct Block {
  const uint8_t* codes;
  const int8_t* tables;  // [8][2^bits], or null
  Encoding encoding;
  int bits;
  int largest;
};

enum class BlobError {
  none = 0,
  too_short,       // shorter than its header, or than it says
  not_a_blob,      // another magic
  other_version,   // a format that this library does not read
  bad_sizes,       // rows, depth, channels, kernel or blocks that do not fit together
  bad_offset,      // a section outside the blob, or not aligned
  bad_block,       // an encoding, width or bound that is none
  bad_order,       // not a permutation of the rows
  bad_checksum,    // bytes were changed
};

// One sentence without a full stop.
const char* describe(BlobError error);

// A view of a blob. Valid as long as the bytes are.
class Blob {
 public:
  // Reads the header and checks every size, offset and entry that a kernel relies on. Does not read
  // the codes. Takes time linear in the rows.
  static BlobError read(const uint8_t* data, size_t size, Blob* blob);

  // Whether the bytes behind the header are those that the header was written for.
  BlobError verify_checksum() const;

  uint32_t rows() const { return rows_; }
  uint32_t depth() const { return depth_; }
  uint32_t channels() const { return channels_; }
  uint32_t kernel() const { return kernel_; }
  uint32_t blocks() const { return blocks_; }
  int tiles() const { return static_cast<int>((depth_ + kTileDepth - 1) / kTileDepth); }
  uint64_t bytes() const { return bytes_; }
  uint64_t checksum() const { return checksum_; }
  const uint8_t* data() const { return data_; }

  Block block(uint32_t index) const;
  // Output channel of a row of a block, or kNoRow.
  uint32_t channel(uint32_t block, int row) const {
    return number<uint32_t>(order_, size_t{block} * kBlockRows + static_cast<size_t>(row));
  }
  float scale(uint32_t channel) const { return number<float>(scales_, channel); }
  // 0 without.
  float bias(uint32_t channel) const {
    return biases_ == nullptr ? 0.0f : number<float>(biases_, channel);
  }

 private:
  // Number `index` of a section, which no more than the program file aligns.
  template <class T>
  static T number(const uint8_t* section, size_t index) {
    T value;
    std::memcpy(&value, section + index * sizeof(T), sizeof(T));
    return value;
  }

  const uint8_t* data_ = nullptr;
  uint64_t bytes_ = 0, checksum_ = 0;
  uint32_t rows_ = 0, depth_ = 0, channels_ = 0, kernel_ = 0, blocks_ = 0;
  const uint8_t* order_ = nullptr;
  const uint8_t* entries_ = nullptr;
  const uint8_t* scales_ = nullptr;
  const uint8_t* biases_ = nullptr;
};

// Checksum of FORMAT.md over `size` bytes, a multiple of 8.
uint64_t blob_checksum(const uint8_t* data, size_t size);

}  // namespace mpqdm
