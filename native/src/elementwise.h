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
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) {
      lows[lane] = lows[lane + half] < lows[lane] ? lows[lane + half] : lows[lane];
      highs[lane] = highs[lane + half] > highs[lane] ? highs[lane + half] : highs[lane];
      zeros[lane] += zeros[lane + half];
    }
  }
  *low = lows[0];
  *high = highs[0];
  return zeros[0] == 0.0f;
}

void quantize_run(const float* x, size_t count, float inverse_scale, float zero_point,
                  int8_t* codes) {
  const float least = -128.0f - zero_point, most = 127.0f - zero_point;
  for (size_t at = 0; at < count; ++at) {
    float steps = x[at] * inverse_scale;
    steps = steps > least ? steps : least;  // in this order NaN, too, becomes the least
    steps = steps > most ? most : steps;
    const float rounded = (steps + kRounder) - kRounder;
    codes[at] = static_cast<int8_t>(static_cast<int32_t>(rounded + zero_point));
  }
}

void dequantize_run(const int8_t* codes, size_t count, float scale, int32_t zero_point, float* x) {
  for (size_t at = 0; at < count; ++at) {
    x[at] = static_cast<float>(static_cast<int32_t>(codes[at]) - zero_point) * scale;
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

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// e^x to two units in the last place, for |x| <= kExponentLimit; NaN gives NaN. The polynomial is the
// minimax one of degree 5 about 0 that Cephes' expf uses.
constexpr float kExponentLimit = 87.0f;

float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
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
  const uint32_t exponent = (bits_of(shifted) - bits_of(kRounder) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return power * scale;
}

// Limits and exponentials are loops of their own: in one loop compilers branch on the limits.
void apply_silu(float* x, size_t count) {
  constexpr size_t kPiece = 64;
  float limited[kPiece];
  for (size_t first = 0; first < count; first += kPiece) {
    const size_t piece = count - first < kPiece ? count - first : kPiece;
    float* values = x + first;
    for (size_t i = 0; i < piece; ++i) {
      float negative = -values[i];
      negative = negative < -kExponentLimit ? -kExponentLimit : negative;
      limited[i] = negative > kExponentLimit ? kExponentLimit : negative;
    }
    for (size_t i = 0; i < piece; ++i) values[i] /= 1.0f + exponential(limited[i]);
  }
}

void normalize(const float* x, size_t pixels, size_t channels, const float* scale,
               const float* offset, const float* factor, bool silu, float* out) {
  for (size_t pixel = 0; pixel < pixels; ++pixel, x += channels, out += channels) {
    for (size_t channel = 0; channel < channels; ++channel) {
      out[channel] = x[channel] * scale[channel] + offset[channel];
    }
    if (silu) apply_silu(out, channels);
    for (size_t channel = 0; channel < channels; ++channel) out[channel] *= factor[channel];
  }
}

}  // namespace
}  // namespace mpqdm
