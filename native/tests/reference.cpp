#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace mpqdm::test {

std::vector<int64_t> convolve_reference(const std::vector<int8_t>& weights, uint32_t rows,
                                        uint32_t channels, uint32_t kernel, const Codes& codes,
                                        const ConvolutionShape& shape, size_t out_height,
                                        size_t out_width) {
  std::vector<int64_t> sums;
  const size_t pixels_of_part = shape.batch * out_height * out_width / codes.parts;
  const size_t times = shape.upsampling;
  for (size_t pixel = 0; pixel < shape.batch * out_height * out_width; ++pixel) {
    const size_t sample = pixel / (out_height * out_width);
    const size_t top = pixel / out_width % out_height * shape.stride;
    const size_t left = pixel % out_width * shape.stride;
    const int64_t zero_point = codes.zero_point[pixel / pixels_of_part];
    for (uint32_t row = 0; row < rows; ++row) {
      const int8_t* weight = weights.data() + size_t{row} * kernel * kernel * channels;
      int64_t sum = 0;
      for (uint32_t tap = 0; tap < kernel * kernel; ++tap, weight += channels) {
        // Unsigned: what lies above or left of the image is far behind its end.
        const size_t y = top + tap / kernel - shape.padding, x = left + tap % kernel - shape.padding;
        if (y >= shape.height * times || x >= shape.width * times) continue;
        const size_t place = (sample * shape.height + y / times) * shape.width + x / times;
        const int8_t* in = codes.codes + place * channels;
        for (uint32_t c = 0; c < channels; ++c) sum += (in[c] - zero_point) * weight[c];
      }
      sums.push_back(sum);
    }
  }
  return sums;
}

void quantize_reference(const float* x, size_t size, int8_t* codes, float* scale,
                        int32_t* zero_point) {
  float low = 0.0f, high = 0.0f;
  for (size_t i = 0; i < size; ++i) {
    if (!std::isfinite(x[i])) {
      std::memset(codes, 0, size);
      *scale = std::numeric_limits<float>::quiet_NaN();
      *zero_point = 0;
      return;
    }
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  float inverse = 255.0f / (high - low);
  if (!std::isfinite(inverse)) inverse = 1.0f;
  const float low_error = -128.0f + low * inverse, high_error = 127.0f + high * inverse;
  const float zero = low_error + high_error > 0.0f ? -128.0f - low * inverse : 127.0f - high * inverse;
  const float whole = std::nearbyint(std::min(std::max(zero, -128.0f), 127.0f));
  for (size_t i = 0; i < size; ++i) {
    const float bounded = std::min(std::max(x[i] * inverse, -128.0f - whole), 127.0f - whole);
    codes[i] = static_cast<int8_t>(std::nearbyint(bounded) + whole);
  }
  *scale = 1.0f / inverse;
  *zero_point = static_cast<int32_t>(whole);
}

void quantize_static_reference(const float* x, size_t size, FixedRange range, int8_t* codes) {
  const auto inverse = static_cast<float>(1.0 / double{range.scale});
  for (size_t i = 0; i < size; ++i) {
    const double code = std::nearbyint(double{x[i] * inverse}) + range.zero_point;
    codes[i] = std::isnan(code) || code < -128.0 ? int8_t{-128}
                                                 : static_cast<int8_t>(std::min(code, 127.0));
  }
}

NormReference group_norm_reference(const std::vector<float>& x, const std::vector<float>& weight,
                                   const std::vector<float>& bias, const std::vector<float>& factor,
                                   const GroupNormShape& shape) {
  NormReference out{std::vector<double>(x.size()), std::vector<double>(x.size())};
  const size_t width = shape.channels / shape.groups, sample = shape.pixels * shape.channels;
  const auto count = static_cast<double>(shape.pixels * width);
  for (size_t group = 0; group < shape.batch * shape.groups; ++group) {
    const size_t first = group / shape.groups * sample + group % shape.groups * width;
    const auto place = [&](size_t i) { return first + i / width * shape.channels + i % width; };
    double mean = 0, variance = 0;
    for (size_t i = 0; i < shape.pixels * width; ++i) mean += double{x[place(i)]} / count;
    for (size_t i = 0; i < shape.pixels * width; ++i) {
      variance += (double{x[place(i)]} - mean) * (double{x[place(i)]} - mean) / count;
    }
    for (size_t i = 0; i < shape.pixels * width; ++i) {
      const size_t at = place(i), channel = at % shape.channels;
      const double scale = double{weight[channel]} / std::sqrt(variance + double{shape.epsilon});
      const double y = (double{x[at]} - mean) * scale + double{bias[channel]};
      out.values[at] = (shape.silu ? y / (1 + std::exp(-y)) : y) * double{factor[channel]};
      out.products[at] = std::fabs(double{x[at]} * scale * double{factor[channel]});
    }
  }
  return out;
}

}  // namespace mpqdm::test
