#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "ranges.h"

namespace mpqdm {
namespace {

constexpr size_t kFloatPixels = 64;        // summed in float before the sums go to double
constexpr size_t kShiftPixels = 64;        // whose mean the moments are about
constexpr size_t kChunk = size_t{1} << 15;  // numbers of a task
constexpr size_t kPiece = size_t{1} << 12;  // numbers that stay in the cache until they are codes

// What x is multiplied by and what is added, by channel.
struct Affine {
  std::vector<float> scale, offset;
};

size_t chunk_pixels(const GroupNormShape& shape) {
  return std::max<size_t>(1, kChunk / shape.channels);
}

// A number by channel that is near its mean: that of some pixels from all over the image. A single pixel
// may be far from all others, and squares about it lose what the others differ by.
std::vector<float> find_shift(const float* x, const GroupNormShape& shape) {
  const size_t channels = shape.channels, count = std::min(kShiftPixels, shape.pixels);
  std::vector<double> sums(channels, 0.0);
  for (size_t i = 0; i < count; ++i) {
    const float* pixel = x + i * shape.pixels / count * channels;
    for (size_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(pixel[c]);
  }
  std::vector<float> shift(channels);
  for (size_t c = 0; c < channels; ++c) {
    shift[c] = static_cast<float>(sums[c] / static_cast<double>(count));
  }
  return shift;
}

// Sums of (x - shift) and of its square by channel over a run of pixels, [2][channels].
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

std::vector<double> find_moments(const KernelSet& kernels, const float* x, const float* shift,
                                 const GroupNormShape& shape, const Executor& executor) {
  const size_t channels = shape.channels, step = chunk_pixels(shape);
  const size_t chunks = (shape.pixels + step - 1) / step;
  std::vector<double> parts(chunks * 2 * channels, 0.0);
  parallel(executor, chunks, [&](size_t chunk) {
    const size_t first = chunk * step;
    add_chunk(kernels, x + first * channels, std::min(step, shape.pixels - first), channels, shift,
              parts.data() + chunk * 2 * channels);
  });
  std::vector<double> moments(parts.begin(), parts.begin() + static_cast<long>(2 * channels));
  for (size_t at = 2 * channels; at < parts.size(); ++at) moments[at % (2 * channels)] += parts[at];
  return moments;
}

// One sample.
Affine make_affine(const KernelSet& kernels, const float* x, const float* weight, const float* bias,
                   const GroupNormShape& shape, const Executor& executor) {
  const std::vector<float> shift = find_shift(x, shape);
  const std::vector<double> moments = find_moments(kernels, x, shift.data(), shape, executor);
  const size_t channels = shape.channels, width = channels / shape.groups;
  const auto pixels = static_cast<double>(shape.pixels);
  const double count = pixels * static_cast<double>(width);
  Affine affine = {std::vector<float>(channels), std::vector<float>(channels)};
  for (size_t begin = 0; begin < channels; begin += width) {
    double mean = 0.0, variance = 0.0;
    for (size_t c = begin; c < begin + width; ++c) {
      mean += moments[c] + pixels * static_cast<double>(shift[c]);
    }
    mean /= count;
    for (size_t c = begin; c < begin + width; ++c) {
      const double distance = static_cast<double>(shift[c]) - mean;
      variance += moments[channels + c] + distance * (2.0 * moments[c] + pixels * distance);
    }
    variance = std::max(variance / count, 0.0);  // in this order NaN, of an infinite number, stays
    const double inverse = 1.0 / std::sqrt(variance + static_cast<double>(shape.epsilon));
    for (size_t c = begin; c < begin + width; ++c) {
      const double scale = static_cast<double>(weight[c]) * inverse;
      affine.scale[c] = static_cast<float>(scale);
      affine.offset[c] = static_cast<float>(static_cast<double>(bias[c]) - mean * scale);
    }
  }
  return affine;
}

// The norm of one sample, whose numbers are made as often as they are asked for.
class Normalized {
 public:
  Normalized(const KernelSet& kernels, const float* x, const GroupNormParameters& parameters,
             const GroupNormShape& shape, const Executor& executor)
      : kernels_(kernels), x_(x), factor_(parameters.factor), shape_(shape), executor_(executor),
        affine_(make_affine(kernels, x, parameters.weight, parameters.bias, shape, executor)) {}

  void write(float* out) const {
    for_chunks([&](size_t, size_t first, size_t pixels) {
      normalize(first, pixels, out + first * shape_.channels);
    });
  }

  // Calls `take(chunk, numbers, first, count)` for all numbers, piece by piece.
  template <class Take>
  void read(const Take& take) const {
    const size_t step = std::max<size_t>(1, kPiece / shape_.channels);
    for_chunks([&](size_t chunk, size_t first, size_t pixels) {
      std::vector<float> piece(std::min(step, pixels) * shape_.channels);
      for (size_t done = 0; done < pixels; done += step) {
        const size_t count = std::min(step, pixels - done);
        normalize(first + done, count, piece.data());
        take(chunk, piece.data(), (first + done) * shape_.channels, count * shape_.channels);
      }
    });
  }

  size_t chunks() const {
    return (shape_.pixels + chunk_pixels(shape_) - 1) / chunk_pixels(shape_);
  }

 private:
  template <class Work>
  void for_chunks(const Work& work) const {
    const size_t step = chunk_pixels(shape_);
    parallel(executor_, chunks(), [&](size_t chunk) {
      const size_t first = chunk * step;
      work(chunk, first, std::min(step, shape_.pixels - first));
    });
  }

  void normalize(size_t first, size_t pixels, float* out) const {
    kernels_.normalize(x_ + first * shape_.channels, pixels, shape_.channels, affine_.scale.data(),
                       affine_.offset.data(), factor_, shape_.silu, out);
  }

  const KernelSet& kernels_;
  const float* x_;
  const float* factor_;
  const GroupNormShape& shape_;
  const Executor& executor_;
  const Affine affine_;
};

// The range of a sample's numbers; false if one is NaN or infinite.
bool find_range(const KernelSet& kernels, const Normalized& numbers, float* low, float* high) {
  std::vector<float> lows(numbers.chunks(), 0.0f), highs(numbers.chunks(), 0.0f);
  std::atomic<bool> finite = true;
  numbers.read([&](size_t chunk, const float* piece, size_t, size_t count) {
    if (!kernels.extend_range(piece, count, &lows[chunk], &highs[chunk])) finite = false;
  });
  *low = *std::min_element(lows.begin(), lows.end());
  *high = *std::max_element(highs.begin(), highs.end());
  return finite;
}

}  // namespace

void group_norm(const KernelSet& kernels, const float* x, const GroupNormParameters& parameters,
                const GroupNormShape& shape, const Executor& executor, float* out) {
  const size_t size = shape.pixels * shape.channels;
  for (size_t at = 0; at < shape.batch * size; at += size) {
    Normalized(kernels, x + at, parameters, shape, executor).write(out + at);
  }
}

void group_norm_quantize_static(const KernelSet& kernels, const float* x,
                                const GroupNormParameters& parameters, const GroupNormShape& shape,
                                FixedRange range, const Executor& executor, int8_t* codes) {
  const float inverse = inverse_of(range.scale), zero_point = static_cast<float>(range.zero_point);
  const size_t size = shape.pixels * shape.channels;
  for (size_t at = 0; at < shape.batch * size; at += size) {
    const Normalized numbers(kernels, x + at, parameters, shape, executor);
    numbers.read([&](size_t, const float* piece, size_t first, size_t count) {
      kernels.quantize(piece, count, inverse, zero_point, codes + at + first);
    });
  }
}

void group_norm_quantize(const KernelSet& kernels, const float* x,
                         const GroupNormParameters& parameters, const GroupNormShape& shape,
                         const Executor& executor, int8_t* codes, float* scale,
                         int32_t* zero_point) {
  const size_t size = shape.pixels * shape.channels;
  for (size_t sample = 0; sample < shape.batch; ++sample) {
    const Normalized numbers(kernels, x + sample * size, parameters, shape, executor);
    int8_t* written = codes + sample * size;
    float low, high;
    if (!find_range(kernels, numbers, &low, &high)) {
      std::memset(written, 0, size);
      scale[sample] = kNan;
      zero_point[sample] = 0;
      continue;
    }
    const QuantizationParameters chosen = choose_parameters(low, high);
    numbers.read([&](size_t, const float* piece, size_t first, size_t count) {
      kernels.quantize(piece, count, chosen.inverse_scale, chosen.zero_point, written + first);
    });
    scale[sample] = chosen.scale;
    zero_point[sample] = static_cast<int32_t>(chosen.zero_point);
  }
}

}  // namespace mpqdm
