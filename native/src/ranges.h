#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace mpqdm {

// How a range of floats is quantized, by XNNPACK's rule for qd8 (float32 throughout).
struct QuantizationParameters {
  float inverse_scale, scale;
  float zero_point;  // whole
};

// `low` <= 0 <= `high`.
inline QuantizationParameters choose_parameters(float low, float high) {
  float inverse = 255.0f / (high - low);
  // An empty range would divide by zero, and one of a few denormal numbers overflows.
  if (std::isinf(inverse)) inverse = 1.0f;
  low *= inverse;
  high *= inverse;
  const bool from_low = (-128.0f + low) + (127.0f + high) > 0.0f;
  float zero_point = from_low ? -128.0f - low : 127.0f - high;
  zero_point = zero_point < -128.0f ? -128.0f : (zero_point > 127.0f ? 127.0f : zero_point);
  return {inverse, 1.0f / inverse, std::nearbyint(zero_point)};
}

// What numbers are multiplied by to be quantized on a known range: divided in double, as torch does.
inline float inverse_of(float scale) { return static_cast<float>(1.0 / static_cast<double>(scale)); }

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

}  // namespace mpqdm
