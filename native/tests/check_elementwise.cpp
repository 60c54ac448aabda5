#include <algorithm>
#include <cmath>
#include <limits>

#include "cases.h"
#include "mpqdm/layers.h"
#include "random_layer.h"
#include "reference.h"
#include "thread_executor.h"

namespace mpqdm::test {
namespace {

// Greatest distance of a result of group norm from its value in double: for results up to 1, above
// that relative to them, and relative to the product that a mean far from 0 is subtracted from. The
// product is off by what up to 64 squares lose in a float sum.
constexpr double kNormError = 4e-6, kProductError = 1e-6;

std::vector<float> make_numbers(Random& random, size_t count) {
  const float widths[] = {0.0f, 1e-42f, 1e-3f, 1.0f, 100.0f, 3e38f};
  const float width = random.choice(widths), shift = random.chance(3) ? 10.0f * width : 0.0f;
  std::vector<float> numbers(count);
  for (float& number : numbers) number = random.number(-width, width);
  if (shift < 1e30f) {
    for (float& number : numbers) number += shift;
  }
  return numbers;
}

bool check_quantization(const KernelSet& kernels, Random& random) {
  const auto parts = static_cast<size_t>(random.integer(1, 5));
  const auto size = static_cast<size_t>(random.chance(8) ? random.integer(33000, 70000)
                                                         : random.integer(1, 300));
  std::vector<float> x = make_numbers(random, parts * size);
  const float special[] = {std::numeric_limits<float>::quiet_NaN(),
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity()};
  if (random.chance(3)) {
    x[static_cast<size_t>(random.integer(0, static_cast<int64_t>(x.size()) - 1))] =
        random.choice(special);
  }
  std::vector<int8_t> codes(x.size(), 99), expected_codes(x.size());
  std::vector<float> scale(parts), expected_scale(parts);
  std::vector<int32_t> zero_point(parts), expected_zero_point(parts);
  quantize(kernels, x.data(), x.size(), parts, thread_executor(1 + x.size() % 3), codes.data(),
           scale.data(), zero_point.data());
  bool right = true;
  for (size_t part = 0; part < parts; ++part) {
    quantize_reference(x.data() + part * size, size, expected_codes.data() + part * size,
                       &expected_scale[part], &expected_zero_point[part]);
    right = right && (scale[part] == expected_scale[part] ||
                      (std::isnan(scale[part]) && std::isnan(expected_scale[part])));
  }
  return right && codes == expected_codes && zero_point == expected_zero_point;
}

bool check_static_quantization(const KernelSet& kernels, Random& random) {
  std::vector<float> x = make_numbers(random, static_cast<size_t>(random.integer(1, 300)));
  const float special[] = {std::numeric_limits<float>::quiet_NaN(),
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity(), -0.0f, 3e38f};
  if (random.chance(2)) {
    x[static_cast<size_t>(random.integer(0, static_cast<int64_t>(x.size()) - 1))] =
        random.choice(special);
  }
  const float scales[] = {1.2e-38f, 1e-5f, 0.5f, random.number(1e-3f, 2.0f), 3e38f};
  const FixedRange range{random.choice(scales), static_cast<int32_t>(random.integer(-128, 127))};
  const Executor executor = thread_executor(1 + x.size() % 3);
  std::vector<int8_t> codes(x.size(), 99), expected(x.size());
  quantize_static(kernels, x.data(), x.size(), range, executor, codes.data());
  quantize_static_reference(x.data(), x.size(), range, expected.data());
  std::vector<float> numbers(x.size(), -9.0f);
  dequantize(kernels, codes.data(), codes.size(), range, executor, numbers.data());
  bool right = codes == expected;
  for (size_t i = 0; i < x.size(); ++i) {
    right = right && numbers[i] == static_cast<float>(codes[i] - range.zero_point) * range.scale;
  }
  // Codes are those of their own numbers, as far as these are finite.
  quantize_static(kernels, numbers.data(), numbers.size(), range, executor, expected.data());
  return right && (range.scale > 1e30f || codes == expected);
}

bool check_group_norm(const KernelSet& kernels, Random& random) {
  const auto groups = static_cast<size_t>(random.integer(1, 8));
  const GroupNormShape shape{static_cast<size_t>(random.integer(1, 3)),
                             static_cast<size_t>(random.integer(1, 300)),
                             groups * static_cast<size_t>(random.integer(1, 9)), groups,
                             random.chance(2) ? 1e-5f : 1e-2f, random.chance(2)};
  const float means[] = {0.0f, 3.0f, -1000.0f};
  const float mean = random.choice(means), width = random.number(0.5f, 20.0f);
  std::vector<float> x(shape.batch * shape.pixels * shape.channels), weight, bias, factor;
  const bool scaled = random.chance(2);
  for (float& number : x) number = mean + random.number(-width, width);
  for (size_t i = 0; i < shape.channels; ++i) {
    weight.push_back(random.number(-2.0f, 2.0f));
    bias.push_back(random.number(-2.0f, 2.0f));
    factor.push_back(scaled ? random.number(0.1f, 2.0f) : 1.0f);
  }
  std::vector<float> out(x.size(), -9.0f);
  const Executor executor = thread_executor(1 + shape.pixels % 3);
  const GroupNormParameters parameters{weight.data(), bias.data(), factor.data()};
  group_norm(kernels, x.data(), parameters, shape, executor, out.data());
  const NormReference expected = group_norm_reference(x, weight, bias, factor, shape);
  for (size_t i = 0; i < out.size(); ++i) {
    const double bound = kNormError * std::max(1.0, std::fabs(expected.values[i])) +
                         kProductError * expected.products[i];
    if (!(std::fabs(double{out[i]} - expected.values[i]) <= bound)) return false;
  }
  std::vector<float> scale(shape.batch), expected_scale(shape.batch);
  std::vector<int8_t> codes(x.size()), expected_codes(x.size());
  std::vector<int32_t> zero_point(shape.batch), expected_zero_point(shape.batch);
  group_norm_quantize(kernels, x.data(), parameters, shape, executor, codes.data(), scale.data(),
                      zero_point.data());
  quantize(kernels, out.data(), out.size(), shape.batch, executor,
           expected_codes.data(), expected_scale.data(), expected_zero_point.data());
  if (codes != expected_codes || scale != expected_scale || zero_point != expected_zero_point) {
    return false;
  }
  const FixedRange range{random.number(0.01f, 0.1f), static_cast<int32_t>(random.integer(-128, 127))};
  group_norm_quantize_static(kernels, x.data(), parameters, shape, range, executor, codes.data());
  quantize_static(kernels, out.data(), out.size(), range, executor, expected_codes.data());
  return codes == expected_codes;
}

}  // namespace

size_t check_elementwise(const KernelSet& kernels, uint64_t seed, size_t count) {
  Failures failures("elementwise", kernels.name);
  for (uint64_t at = seed; at < seed + count; ++at) {
    Random random(at);
    if (!check_quantization(kernels, random)) failures.add(at, "other codes or ranges");
    if (!check_static_quantization(kernels, random)) failures.add(at, "other codes on a known range");
    if (!check_group_norm(kernels, random)) failures.add(at, "another group norm");
  }
  return failures.count();
}

}  // namespace mpqdm::test
