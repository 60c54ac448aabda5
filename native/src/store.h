// Results of pixels: the same in all instruction sets, and compiled for each of them.
// Everything here has internal linkage: a definition that two files share would be compiled for one
// instruction set, and run on CPUs that lack it.
#pragma once

#include <cstring>

#include "kernel_sets.h"

namespace mpqdm {
namespace {

void store_rows(const int32_t* sums, size_t count, const PairRows& rows,
                const float* activation_scales, const int32_t* zero_points, size_t stride,
                float* out) {
  for (size_t pixel = 0; pixel < count; ++pixel, sums += kPairRows, out += stride) {
    float results[kPairRows];
    for (int row = 0; row < kPairRows; ++row) {
      const auto sum = static_cast<float>(sums[row] - zero_points[pixel] * rows.weight_sum[row]);
      results[row] = sum * (activation_scales[pixel] * rows.scale[row]) + rows.bias[row];
    }
    if (rows.count < kPairRows) {
      for (int row = 0; row < rows.count; ++row) out[rows.channel[row]] = results[row];
    } else if (rows.adjacent) {
      std::memcpy(out + rows.channel[0], results, sizeof results);
    } else {
      for (int row = 0; row < kPairRows; ++row) out[rows.channel[row]] = results[row];
    }
  }
}

}  // namespace
}  // namespace mpqdm
