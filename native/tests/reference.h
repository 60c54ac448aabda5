// What the kernels must give: plain loops in int64, and double for group norm.
#pragma once

#include <cstdint>
#include <vector>

#include "mpqdm/layers.h"

namespace mpqdm::test {

// Sums of a convolution of codes [batch, height, width, channels] with weights
// [rows, kernel, kernel, channels]; [batch, out_height, out_width, rows].
std::vector<int64_t> convolve_reference(const std::vector<int8_t>& weights, uint32_t rows,
                                        uint32_t channels, uint32_t kernel, const Codes& codes,
                                        const ConvolutionShape& shape, size_t out_height,
                                        size_t out_width);

// Codes and range of one part, by XNNPACK's rule for qd8, one number at a time.
void quantize_reference(const float* x, size_t size, int8_t* codes, float* scale,
                        int32_t* zero_point);

// Codes on a known range, one number at a time.
void quantize_static_reference(const float* x, size_t size, FixedRange range, int8_t* codes);

struct NormReference {
  std::vector<double> values;
  // What each value was multiplied out of, |x| * |weight * factor| / deviation: roundings are relative to it.
  std::vector<double> products;
};

NormReference group_norm_reference(const std::vector<float>& x, const std::vector<float>& weight,
                                   const std::vector<float>& bias, const std::vector<float>& factor,
                                   const GroupNormShape& shape);

}  // namespace mpqdm::test
