// The reference: plain loops over any encoding.
#include <cstring>

#include "code_slots.h"
#include "kernel_sets.h"
#include "elementwise.h"
#include "store.h"
#include "unpack.h"

namespace mpqdm {
namespace {

constexpr int kPixels = 4;
static_assert(kPixels <= kMaxPixels);

int code_at(const uint8_t* tile, int bits, int group, int lane) {
  int code = 0, from = 0;
  if (bits & 4) {
    code = (tile[kVectorBytes * (group % 4) + lane] >> (4 * (group / 4))) & 15;
    from = 4;
    tile += 4 * kVectorBytes;
  }
  if (bits & 2) {
    code |= ((tile[kVectorBytes * (group % 2) + lane] >> (2 * (group / 2))) & 3) << from;
    from += 2;
    tile += 2 * kVectorBytes;
  }
  if (bits & 1) code |= ((tile[lane] >> group) & 1) << from;
  return code;
}

void multiply_scalar(const Inputs& inputs, const int8_t* first, const int8_t* second, int,
                     int32_t* sums) {
  const int8_t* const blocks[2] = {first, second};
  std::memset(sums, 0, sizeof(int32_t) * 2 * kBlockRows * kPixels);
  for (int pixel = 0; pixel < kPixels; ++pixel) {
    for (int part = 0; part < (second == nullptr ? 1 : 2); ++part) {
      const int8_t* weights = blocks[part];
      int32_t* row_sums = sums + 2 * kBlockRows * pixel + kBlockRows * part;
      for (int segment = 0; segment < inputs.segments; ++segment) {
        const uint8_t* x =
            inputs.pixels[pixel] + static_cast<size_t>(segment) * inputs.segment_stride;
        for (int group = 0; group < inputs.groups; ++group) {
          for (int lane = 0; lane < kGroupBytes; ++lane) {
            row_sums[lane / kGroupDepth] +=
                int32_t{x[kGroupDepth * group + lane % kGroupDepth]} * weights[lane];
          }
          weights += kGroupBytes;
        }
      }
    }
  }
}

void sum_scalar(const int8_t* weights, int groups, int32_t* sums) {
  int32_t lanes[kGroupBytes] = {};
  for (int group = 0; group < groups; ++group, weights += kGroupBytes) {
    for (int lane = 0; lane < kGroupBytes; ++lane) lanes[lane] += weights[lane];
  }
  for (int row = 0; row < kBlockRows; ++row) {
    sums[row] = 0;
    for (int i = 0; i < kGroupDepth; ++i) sums[row] += lanes[kGroupDepth * row + i];
  }
}

}  // namespace

void unpack_scalar(const Block& block, int tiles, int8_t* weights) {
  const size_t tile_bytes = static_cast<size_t>(kTileDepth) * static_cast<size_t>(block.bits);
  if (block.encoding == Encoding::byte) {
    std::memcpy(weights, block.codes, tile_bytes * static_cast<size_t>(tiles));
    return;
  }
  const Ladder steps = ladder(block.encoding, block.bits);
  const uint8_t* tile = block.codes;
  for (int t = 0; t < tiles; ++t, tile += tile_bytes) {
    for (int group = 0; group < kTileGroups; ++group) {
      for (int lane = 0; lane < kGroupBytes; ++lane) {
        const int code = code_at(tile, block.bits, group, lane);
        const int row = lane / kGroupDepth;
        *weights++ = block.encoding == Encoding::table
                         ? block.tables[(row << block.bits) + code]
                         : static_cast<int8_t>(steps.first + steps.step * code);
      }
    }
  }
}

const KernelSet kScalarKernels = {
    "scalar", true, kPixels, unpack_scalar, sum_scalar, multiply_scalar, store_rows,
    extend_range, quantize_run, dequantize_run, add_moments, normalize, decode_run_scalar, {}};

}  // namespace mpqdm
