#include "mpqdm/coded_program.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "mpqdm/blob.h"
#include "mpqdm/codes.h"

namespace mpqdm {
namespace {

constexpr uint32_t kMagic = 0x4351504du;  // "MPQC"
constexpr uint16_t kVersion = 1;
constexpr uint64_t kMostCodes = 1 << 15;  // that a byte of a stream can tell

// The last bytes of a coded program.
struct Footer {
  uint64_t program_bytes;
  uint64_t layers;
  uint32_t zero;
  uint16_t footer_bytes, version;
  uint32_t footer_zero, magic;
};
static_assert(sizeof(Footer) == 32);

struct Layer {
  uint64_t blob_at, stream_bytes;
};
static_assert(sizeof(Layer) == 16);

// Codes of a blob's rows as the entropy coder has them, [row][channel][place of the kernel].
struct CodedRows {
  const int8_t* codes;
  size_t channels, places;
};

// One row of a block in the order of its depth, (place, channel), with the zeros behind it. False if a
// number is none of `bits` bits.
bool write_row(const CodedRows& rows, size_t row, int bits, uint8_t* out) {
  const int8_t* codes = rows.codes + row * rows.channels * rows.places;
  const int half = bits == 8 ? 0 : 1 << (bits - 1);
  int outside = 0;
  for (size_t place = 0; place < rows.places; ++place) {
    for (size_t channel = 0; channel < rows.channels; ++channel) {
      const int code = codes[channel * rows.places + place] + half;
      outside |= code >> bits;  // also of negative ones, but for bytes, which are any
      out[place * rows.channels + channel] = static_cast<uint8_t>(code);
    }
  }
  return bits == 8 || outside == 0;
}

// One tile, [group][row][input of it], in bit planes (FORMAT.md, "Encodings").
void pack_tile(const uint8_t (&tile)[kTileBytes], int bits, uint8_t* out) {
  if (bits == 8) {
    std::memcpy(out, tile, kTileBytes);
    return;
  }
  int from = 0;
  for (const int width : {4, 2, 1}) {
    if ((bits & width) == 0) continue;
    const int mask = (1 << width) - 1;
    for (int vector = 0; vector < width; ++vector, out += kGroupBytes) {
      std::memset(out, 0, kGroupBytes);
      for (int group = vector; group < kTileBytes / kGroupBytes; group += width) {
        const uint8_t* codes = tile + group * kGroupBytes;
        const int to = group / width * width;
        for (int i = 0; i < kGroupBytes; ++i) {
          out[i] = static_cast<uint8_t>(out[i] | ((codes[i] >> from) & mask) << to);
        }
      }
    }
    from += width;
  }
}

// `rows` is [8][stride], `stride` a multiple of a tile's depth.
void pack_block(const uint8_t* rows, size_t stride, int bits, uint8_t* out) {
  uint8_t tile[kTileBytes];
  for (size_t at = 0; at < stride; at += kTileDepth, out += kTileDepth * bits) {
    for (size_t row = 0; row < kBlockRows; ++row) {
      for (size_t group = 0; group < kTileDepth / kGroupDepth; ++group) {
        std::memcpy(tile + group * kGroupBytes + row * kGroupDepth,
                    rows + row * stride + at + group * kGroupDepth, kGroupDepth);
      }
    }
    pack_tile(tile, bits, out);
  }
}

// Decodes a layer's stream and writes its codes into its blob, which begins at `bytes`.
const char* place_layer(const KernelSet& kernels, const uint8_t* stream, size_t size, uint8_t* bytes,
                        const Blob& blob) {
  const size_t places = size_t{blob.kernel()} * blob.kernel(), slots = size_t{blob.blocks()} * kBlockRows;
  // Nothing is made of a size that is not there; decode_codes says the same of fewer bytes.
  const uint64_t count = uint64_t{slots} * blob.depth();
  if ((count - 1) / kMostCodes >= size) return describe(CodesError::bad_sizes);
  // A code takes a bit or more in its blob, where each block has bytes of its own.
  if (count > std::min(8 * blob.bytes(), uint64_t{SIZE_MAX})) return "blocks lie on each other";
  std::vector<int8_t> codes(static_cast<size_t>(count));
  const CodesError error =
      decode_codes(kernels, stream, size, {slots, blob.channels(), places}, codes.data());
  if (error != CodesError::none) return describe(error);
  const CodedRows rows{codes.data(), blob.channels(), places};
  const size_t stride = static_cast<size_t>(blob.tiles()) * kTileDepth;
  std::vector<uint8_t> of_block(stride * kBlockRows);
  // All are read before anything is written: in a damaged blob codes may lie on the block table.
  std::vector<Block> blocks;
  for (uint32_t index = 0; index < blob.blocks(); ++index) blocks.push_back(blob.block(index));
  size_t slot = 0;
  for (const Block& block : blocks) {
    for (size_t row = 0; row < kBlockRows; ++row, ++slot) {
      if (!write_row(rows, slot, block.bits, of_block.data() + row * stride)) {
        return "a code has more bits than its row";
      }
    }
    pack_block(of_block.data(), stride, block.bits, bytes + (block.codes - blob.data()));
  }
  const BlobError changed = blob.verify_checksum();
  return changed == BlobError::none ? nullptr : describe(changed);
}

}  // namespace

const char* place_codes(const KernelSet& kernels, uint8_t* content, size_t size,
                        size_t* program_bytes) {
  *program_bytes = size;
  Footer footer;
  if (size < sizeof footer) return nullptr;
  std::memcpy(&footer, content + size - sizeof footer, sizeof footer);
  if (footer.magic != kMagic) return nullptr;
  if (footer.footer_bytes != sizeof footer || footer.zero != 0 || footer.footer_zero != 0) {
    return "the end is none of a coded program";
  }
  if (footer.version != kVersion) return "the codes have a format version that this library does not read";
  const size_t left = size - sizeof footer;
  if (footer.program_bytes > left || footer.layers > (left - footer.program_bytes) / sizeof(Layer)) {
    return "the codes are cut";
  }
  const size_t layers_at = left - footer.layers * sizeof(Layer);
  size_t stream_at = footer.program_bytes, free_from = 0;
  for (size_t at = layers_at; at < left; at += sizeof(Layer)) {
    Layer layer;
    std::memcpy(&layer, content + at, sizeof layer);
    if (layer.stream_bytes > layers_at - stream_at) return "the codes are cut";
    if (layer.blob_at < free_from || layer.blob_at > footer.program_bytes) {
      return "a layer lies outside the program, or in another";
    }
    Blob blob;
    uint8_t* bytes = content + layer.blob_at;
    const BlobError error = Blob::read(bytes, footer.program_bytes - layer.blob_at, &blob);
    if (error != BlobError::none) return describe(error);
    const char* wrong = place_layer(kernels, content + stream_at, layer.stream_bytes, bytes, blob);
    if (wrong != nullptr) return wrong;
    stream_at += layer.stream_bytes;
    free_from = layer.blob_at + blob.bytes();
  }
  if (stream_at != layers_at) return "bytes follow the last layer's codes";
  *program_bytes = footer.program_bytes;
  return nullptr;
}

}  // namespace mpqdm
