// Layers on packed weights: convolutions and linear layers, quantization, group norm.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mpqdm/blob.h"
#include "mpqdm/kernels.h"

namespace mpqdm {

// Runs `task(context, index)` for all indices below `count`, on as many threads as the caller has.
struct Executor {
  void (*run)(void* self, size_t count, void (*task)(void* context, size_t index), void* context);
  void* self;
  size_t threads;
};

// Runs tasks one after another on the calling thread.
Executor serial_executor();

// int8 codes and the ranges of their `parts` equal parts: value = scale * (code - zero_point).
struct Codes {
  const int8_t* codes;
  const float* scale;         // [parts]
  const int32_t* zero_point;  // [parts], -128..127
  size_t parts;
};

struct ConvolutionShape {
  size_t batch, height, width;  // of the input; channels are the blob's
  size_t stride, padding;       // 1 or 2; 0 or kernel / 2
  size_t upsampling;            // 1 or 2: times that each pixel is read in both directions

  size_t out_height(const Blob& blob) const {
    return (height * upsampling + 2 * padding - blob.kernel()) / stride + 1;
  }
  size_t out_width(const Blob& blob) const {
    return (width * upsampling + 2 * padding - blob.kernel()) / stride + 1;
  }
};

// Bytes of working memory that `convolve` needs besides its small per-thread buffers.
size_t convolution_scratch(const Blob& blob, const ConvolutionShape& shape);

// Convolution of [batch, height, width, channels] codes; out is [batch, out_height, out_width, rows].
// `codes.parts` divides batch * height * width; more than one part a sample needs a 1x1 kernel of
// stride 1 without upsampling (a linear layer is one of batch 1, height 1, and its rows for the width).
// `scratch` has convolution_scratch() bytes, 64-byte aligned.
void convolve(const KernelSet& kernels, const Blob& blob, const Codes& codes,
              const ConvolutionShape& shape, uint8_t* scratch, const Executor& executor, float* out);

// The integers behind it: out[...] = sum_k (code - zero_point) * weight, int32. For tests.
void convolve_integers(const KernelSet& kernels, const Blob& blob, const Codes& codes,
                       const ConvolutionShape& shape, uint8_t* scratch, const Executor& executor,
                       int32_t* out);

// Quantizes `parts` equal parts of [size] numbers, each on its own range by XNNPACK's qd8 rule.
// A part with NaN or infinity gets the scale NaN and all codes 0.
void quantize(const KernelSet& kernels, const float* x, size_t size, size_t parts,
              const Executor& executor, int8_t* codes, float* scale, int32_t* zero_point);

// One range that is known beforehand: value = scale * (code - zero_point).
struct FixedRange {
  float scale;         // finite, normal, positive
  int32_t zero_point;  // -128..127
};

// Quantizes all of x on a known range: round(x * float(1 / scale)) + zero_point, within -128..127.
// Ties go to the even number; NaN gets the code -128.
void quantize_static(const KernelSet& kernels, const float* x, size_t size, FixedRange range,
                     const Executor& executor, int8_t* codes);

// The numbers that codes stand for.
void dequantize(const KernelSet& kernels, const int8_t* codes, size_t size, FixedRange range,
                const Executor& executor, float* x);

struct GroupNormShape {
  size_t batch, pixels, channels, groups;  // x is [batch, pixels, channels]
  float epsilon;
  bool silu;
};

struct GroupNormParameters {
  const float *weight, *bias;  // [channels], of the norm
  const float* factor;         // [channels], that the result is multiplied by
};

// Group norm, SiLU behind it where asked for, and a factor for each channel behind that.
// Moments are summed about the mean of some pixels, in double, so a mean far from 0 costs no precision.
void group_norm(const KernelSet& kernels, const float* x, const GroupNormParameters& parameters,
                const GroupNormShape& shape, const Executor& executor, float* out);

// The same, quantized with one range a sample. The numbers are computed twice, for the range and for
// the codes, and never stored: at large images they would take more memory than all else.
void group_norm_quantize(const KernelSet& kernels, const float* x,
                         const GroupNormParameters& parameters, const GroupNormShape& shape,
                         const Executor& executor, int8_t* codes, float* scale,
                         int32_t* zero_point);

// The same on a known range.
void group_norm_quantize_static(const KernelSet& kernels, const float* x,
                                const GroupNormParameters& parameters, const GroupNormShape& shape,
                                FixedRange range, const Executor& executor, int8_t* codes);

}  // namespace mpqdm
