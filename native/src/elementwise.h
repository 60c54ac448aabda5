// Loops over floats, compiled for each instruction set, written so that compilers vectorize them.
// Internal linkage for the reason that store.h gives.
#pragma once

#include <cstdint>
#include <cstring>

#include "mpqdm/kernels.h"

namespace mpqdm {
namespace {

constexpr size_t kLanes = 32;  // independent lanes of a reduction

// Adding it to a small float leaves that float's nearest whole number (ties to even) in the low bits.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23

bool extend_range(const float* x, size_t count, float* low, float* high) {
  float lows[kLanes], highs[kLanes], zeros[kLanes];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    lows[lane] = *low;
    highs[lane] = *high;
    zeros[lane] = 0.0f;
  }
  size_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const float value = x[at + lane];
      lows[lane] = value < lows[lane] ? value : lows[lane];
      highs[lane] = value > highs[lane] ? value : highs[lane];
      zeros[lane] += value * 0.0f;  // NaN from NaN and infinity on
    }
  }
  for (; at < count; ++at) {
    lows[0] = x[at] < lows[0] ? x[at] : lows[0];
    highs[0] = x[at] > highs[0] ? x[at] : highs[0];
    zeros[0] += x[at] * 0.0f;
  }
  bool finite = true;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    *low = lows[lane] < *low ? lows[lane] : *low;
    *high = highs[lane] > *high ? highs[lane] : *high;
    finite = finite && zeros[lane] == 0.0f;
  }
  return finite;
}

void quantize_run(const float* x, size_t count, float inverse_scale, float zero_point,
                  int8_t* codes) {
  const float least = -128.0f - zero_point, most = 127.0f - zero_point;
  for (size_t at = 0; at < count; ++at) {
    float steps = x[at] * inverse_scale;
    steps = steps < least ? least : steps;
    steps = steps > most ? most : steps;
    // The zero point is whole: rounding first and adding then is adding first and rounding then, but
    // only as long as the sum is exact, so the order is kept.
    const float rounded = (steps + kRounder) - kRounder;
    codes[at] = static_cast<int8_t>(static_cast<int32_t>(rounded + zero_point));
  }
}

void add_moments(const float* x, size_t pixels, size_t channels, const float* shift, float* sums,
                 float* squares) {
  for (size_t pixel = 0; pixel < pixels; ++pixel, x += channels) {
    for (size_t channel = 0; channel < channels; ++channel) {
      const float moved = x[channel] - shift[channel];
      sums[channel] += moved;
      squares[channel] += moved * moved;
    }
  }
}

// e^x to two units in the last place (Cephes' polynomial); 0 and infinity come out as 2^-126, 2^127.
inline float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  const float shifted = x * kLog2E + kRounder;
  const float whole = shifted - kRounder;
  const float rest = (x - whole * kLn2High) - whole * kLn2Low;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  const float power = sum * (rest * rest) + rest + 1.0f;
  const auto exponent = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return power * scale;
}

void normalize(const float* x, size_t pixels, size_t channels, const float* scale,
               const float* offset, bool silu, float* out) {
  for (size_t pixel = 0; pixel < pixels; ++pixel, x += channels, out += channels) {
    if (silu) {
      for (size_t channel = 0; channel < channels; ++channel) {
        const float value = x[channel] * scale[channel] + offset[channel];
        out[channel] = value / (1.0f + exponential(-value));
      }
    } else {
      for (size_t channel = 0; channel < channels; ++channel) {
        out[channel] = x[channel] * scale[channel] + offset[channel];
      }
    }
  }
}

}  // namespace
}  // namespace mpqdm
