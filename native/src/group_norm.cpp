#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "ranges.h"

namespace mpqdm {
namespace {

constexpr size_t kFloatPixels = 64;        // summed in float before the sums go to double
constexpr size_t kChunk = size_t{1} << 15;  // numbers of a task
constexpr size_t kPiece = size_t{1} << 12;  // numbers that stay in the cache until they are codes

// What x is multiplied by and what is added, by channel.
struct Affine {
  std::vector<float> scale, offset;
};

size_t chunk_pixels(const GroupNormShape& shape) {
  return std::max<size_t>(1, kChunk / shape.channels);
}

// Sums of (x - first pixel) and of its square by channel over a run of pixels, [2][channels].
void add_chunk(const KernelSet& kernels, const float* x, size_t pixels, size_t channels,
               const float* shift, double* moments) {
  std::vector<float> sums(2 * channels);
  for (size_t first = 0; first < pixels; first += kFloatPixels) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    kernels.add_moments(x + first * channels, std::min(kFloatPixels, pixels - first), channels,
                        shift, sums.data(), sums.data() + channels);
    for (size_t i = 0; i < 2 * channels; ++i) moments[i] += static_cast<double>(sums[i]);
  }
}

std::vector<double> find_moments(const KernelSet& kernels, const float* x,
                                 const GroupNormShape& shape, const Executor& executor) {
  const size_t channels = shape.channels, step = chunk_pixels(shape);
  const size_t chunks = (shape.pixels + step - 1) / step;
  std::vector<double> parts(chunks * 2 * channels, 0.0);
  parallel(executor, chunks, [&](size_t chunk) {
    const size_t first = chunk * step;
    add_chunk(kernels, x + first * channels, std::min(step, shape.pixels - first), channels, x,
              parts.data() + chunk * 2 * channels);
  });
  std::vector<double> moments(parts.begin(), parts.begin() + static_cast<long>(2 * channels));
  for (size_t at = 2 * channels; at < parts.size(); ++at) moments[at % (2 * channels)] += parts[at];
  return moments;
}

// One sample. `first_pixel`: what its moments are about.
Affine make_affine(const std::vector<double>& moments, const float* first_pixel,
                   const float* weight, const float* bias, const GroupNormShape& shape) {
  const size_t channels = shape.channels, width = channels / shape.groups;
  const auto pixels = static_cast<double>(shape.pixels);
  const double count = pixels * static_cast<double>(width);
  Affine affine = {std::vector<float>(channels), std::vector<float>(channels)};
  for (size_t begin = 0; begin < channels; begin += width) {
    double mean = 0.0, variance = 0.0;
    for (size_t c = begin; c < begin + width; ++c) {
      mean += moments[c] + pixels * static_cast<double>(first_pixel[c]);
    }
    mean /= count;
    for (size_t c = begin; c < begin + width; ++c) {
      const double distance = static_cast<double>(first_pixel[c]) - mean;
      variance += moments[channels + c] + distance * (2.0 * moments[c] + pixels * distance);
    }
    variance = std::max(0.0, variance / count);
    const double inverse = 1.0 / std::sqrt(variance + static_cast<double>(shape.epsilon));
    for (size_t c = begin; c < begin + width; ++c) {
      const double scale = static_cast<double>(weight[c]) * inverse;
      affine.scale[c] = static_cast<float>(scale);
      affine.offset[c] = static_cast<float>(static_cast<double>(bias[c]) - mean * scale);
    }
  }
  return affine;
}

// Calls `write(affine, first, pixels)` for runs of pixels of all samples; `first` counts numbers.
template <class Write>
void for_chunks(const KernelSet& kernels, const float* x, const float* weight, const float* bias,
                const GroupNormShape& shape, const Executor& executor, const Write& write) {
  const size_t step = chunk_pixels(shape), size = shape.pixels * shape.channels;
  for (size_t sample = 0; sample < shape.batch; ++sample) {
    const float* start = x + sample * size;
    const std::vector<double> moments = find_moments(kernels, start, shape, executor);
    const Affine affine = make_affine(moments, start, weight, bias, shape);
    parallel(executor, (shape.pixels + step - 1) / step, [&](size_t chunk) {
      const size_t first = chunk * step;
      write(affine, sample * size + first * shape.channels, std::min(step, shape.pixels - first));
    });
  }
}

}  // namespace

void group_norm(const KernelSet& kernels, const float* x, const float* weight, const float* bias,
                const GroupNormShape& shape, const Executor& executor, float* out) {
  for_chunks(kernels, x, weight, bias, shape, executor,
             [&](const Affine& affine, size_t first, size_t pixels) {
               kernels.normalize(x + first, pixels, shape.channels, affine.scale.data(),
                                 affine.offset.data(), shape.silu, out + first);
             });
}

void group_norm_quantize_static(const KernelSet& kernels, const float* x, const float* weight,
                                const float* bias, const GroupNormShape& shape, FixedRange range,
                                const Executor& executor, int8_t* codes) {
  const float inverse = inverse_of(range.scale), zero_point = static_cast<float>(range.zero_point);
  const size_t step = std::max<size_t>(1, kPiece / shape.channels);
  for_chunks(kernels, x, weight, bias, shape, executor,
             [&](const Affine& affine, size_t first, size_t pixels) {
               std::vector<float> piece(std::min(step, pixels) * shape.channels);
               for (size_t done = 0; done < pixels; done += step) {
                 const size_t count = std::min(step, pixels - done);
                 const size_t at = first + done * shape.channels;
                 kernels.normalize(x + at, count, shape.channels, affine.scale.data(),
                                   affine.offset.data(), shape.silu, piece.data());
                 kernels.quantize(piece.data(), count * shape.channels, inverse, zero_point,
                                  codes + at);
               }
             });
}

void group_norm_quantize(const KernelSet& kernels, const float* x, const float* weight,
                         const float* bias, const GroupNormShape& shape, const Executor& executor,
                         float* scratch, int8_t* codes, float* scale, int32_t* zero_point) {
  group_norm(kernels, x, weight, bias, shape, executor, scratch);
  quantize(kernels, scratch, shape.batch * shape.pixels * shape.channels, shape.batch, executor,
           codes, scale, zero_point);
}

}  // namespace mpqdm
