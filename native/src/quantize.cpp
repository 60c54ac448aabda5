#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "ranges.h"

namespace mpqdm {
namespace {

constexpr size_t kChunk = size_t{1} << 14;  // numbers of a task

size_t divide_up(size_t value, size_t by) { return (value + by - 1) / by; }

void quantize_part(const KernelSet& kernels, const float* x, size_t size, int8_t* codes,
                   float* scale, int32_t* zero_point) {
  float low = 0.0f, high = 0.0f;
  if (!kernels.extend_range(x, size, &low, &high)) {
    std::memset(codes, 0, size);
    *scale = kNan;
    *zero_point = 0;
    return;
  }
  const QuantizationParameters chosen = choose_parameters(low, high);
  kernels.quantize(x, size, chosen.inverse_scale, chosen.zero_point, codes);
  *scale = chosen.scale;
  *zero_point = static_cast<int32_t>(chosen.zero_point);
}

// A part that several threads share: its range from those of its chunks, then its codes.
void quantize_chunks(const KernelSet& kernels, const float* x, size_t size,
                     const Executor& executor, int8_t* codes, float* scale, int32_t* zero_point) {
  const size_t chunks = divide_up(size, kChunk);
  std::vector<float> lows(chunks, 0.0f), highs(chunks, 0.0f);
  std::atomic<bool> finite = true;
  parallel(executor, chunks, [&](size_t chunk) {
    const size_t first = chunk * kChunk, count = std::min(kChunk, size - first);
    if (!kernels.extend_range(x + first, count, &lows[chunk], &highs[chunk])) finite = false;
  });
  if (!finite) {
    std::memset(codes, 0, size);
    *scale = kNan;
    *zero_point = 0;
    return;
  }
  const QuantizationParameters chosen = choose_parameters(
      *std::min_element(lows.begin(), lows.end()), *std::max_element(highs.begin(), highs.end()));
  parallel(executor, chunks, [&](size_t chunk) {
    const size_t first = chunk * kChunk, count = std::min(kChunk, size - first);
    kernels.quantize(x + first, count, chosen.inverse_scale, chosen.zero_point, codes + first);
  });
  *scale = chosen.scale;
  *zero_point = static_cast<int32_t>(chosen.zero_point);
}

}  // namespace

void quantize(const KernelSet& kernels, const float* x, size_t size, size_t parts,
              const Executor& executor, int8_t* codes, float* scale, int32_t* zero_point) {
  const size_t part = size / parts;
  if (executor.threads > 1 && part >= 2 * kChunk) {
    for (size_t i = 0; i < parts; ++i) {
      quantize_chunks(kernels, x + i * part, part, executor, codes + i * part, scale + i,
                      zero_point + i);
    }
    return;
  }
  const size_t together = std::max<size_t>(1, kChunk / std::max<size_t>(1, part));
  parallel(executor, divide_up(parts, together), [&](size_t task) {
    const size_t end = std::min(parts, (task + 1) * together);
    for (size_t i = task * together; i < end; ++i) {
      quantize_part(kernels, x + i * part, part, codes + i * part, scale + i, zero_point + i);
    }
  });
}

void quantize_static(const KernelSet& kernels, const float* x, size_t size, FixedRange range,
                     const Executor& executor, int8_t* codes) {
  const float inverse = inverse_of(range.scale), zero_point = static_cast<float>(range.zero_point);
  parallel(executor, divide_up(size, kChunk), [&](size_t chunk) {
    const size_t first = chunk * kChunk, count = std::min(kChunk, size - first);
    kernels.quantize(x + first, count, inverse, zero_point, codes + first);
  });
}

void dequantize(const KernelSet& kernels, const int8_t* codes, size_t size, FixedRange range,
                const Executor& executor, float* x) {
  parallel(executor, divide_up(size, kChunk), [&](size_t chunk) {
    const size_t first = chunk * kChunk, count = std::min(kChunk, size - first);
    kernels.dequantize(codes + first, count, range.scale, range.zero_point, x + first);
  });
}

}  // namespace mpqdm
