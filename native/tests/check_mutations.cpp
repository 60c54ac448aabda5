#include <cstring>
#include <memory>

#include "cases.h"
#include "mpqdm/layers.h"
#include "random_layer.h"

namespace mpqdm::test {
namespace {

constexpr size_t kChecksumAt = 16;

// Changes some bytes, more often those that say where things are.
void mutate(Random& random, std::vector<uint8_t>& bytes) {
  const auto size = static_cast<int64_t>(bytes.size());
  const int64_t ends[] = {std::min<int64_t>(size, 128), std::min<int64_t>(size, 512), size};
  for (int64_t left = random.integer(1, 3); left > 0; --left) {
    const auto at = static_cast<size_t>(random.integer(0, random.choice(ends) - 1));
    if (random.chance(2)) {
      bytes[at] = static_cast<uint8_t>(random.integer(0, 255));
      continue;
    }
    const uint32_t words[] = {0u, 1u, 0xffffffffu, 0x7fffffffu, 0x80000000u,
                              static_cast<uint32_t>(random.integer(0, size)) / 64 * 64,
                              static_cast<uint32_t>(random.integer(0, 0xffffffff))};
    const uint32_t word = random.choice(words);
    const size_t first = at / 4 * 4;
    std::memcpy(bytes.data() + first, &word, std::min<size_t>(4, bytes.size() - first));
  }
  if (random.chance(8)) bytes.resize(static_cast<size_t>(random.integer(0, size)));
}

// Integers of one pixel, on every kernel set; empty if two of them differ.
std::vector<int32_t> multiply(const Blob& blob, uint64_t seed) {
  Random random(seed);
  const ConvolutionShape shape{1, blob.kernel(), blob.kernel(), 1, 0, 1};
  std::vector<int8_t> values(blob.depth());
  for (int8_t& value : values) value = static_cast<int8_t>(random.integer(-128, 127));
  const float scale = 1.0f;
  const auto zero_point = static_cast<int32_t>(random.integer(-128, 127));
  const Codes codes{values.data(), &scale, &zero_point, 1};
  std::vector<uint8_t> scratch(convolution_scratch(blob, shape));
  std::vector<int32_t> first;
  const KernelSet* const* sets = nullptr;
  const size_t count = kernel_sets(&sets);
  for (size_t i = 0; i < count; ++i) {
    std::vector<int32_t> sums(blob.rows());
    convolve_integers(*sets[i], blob, codes, shape, scratch.data(), serial_executor(), sums.data());
    if (i == 0) first = sums;
    if (sums != first) return {};
  }
  return first;
}

// Null if all went well.
const char* check(uint64_t seed) {
  Random random(seed);
  const uint32_t kernels[] = {1, 3};
  const TestLayer layer =
      make_layer(random, static_cast<uint32_t>(random.integer(1, 20)),
                 static_cast<uint32_t>(4 * random.integer(1, 12)), random.choice(kernels), false);
  const std::vector<uint8_t> whole = pack(layer);
  std::vector<uint8_t> bytes = whole;
  mutate(random, bytes);
  const bool resigned = bytes.size() >= kChecksumAt + 8 && random.chance(2);
  if (resigned) sign(bytes);
  // A copy of exactly this size, so that a sanitizer sees what is read behind it.
  const auto copy = std::make_unique<uint8_t[]>(bytes.size());
  std::copy(bytes.begin(), bytes.end(), copy.get());
  Blob changed;
  if (Blob::read(copy.get(), bytes.size(), &changed) != BlobError::none) return nullptr;
  if (changed.verify_checksum() != BlobError::none) return nullptr;
  const std::vector<int32_t> sums = multiply(changed, seed);
  if (sums.empty()) return "the kernel sets differ";
  if (resigned) return nullptr;
  Blob blob;
  if (Blob::read(whole.data(), whole.size(), &blob) != BlobError::none) return "refused unchanged";
  if (changed.rows() != blob.rows() || changed.depth() != blob.depth() ||
      changed.kernel() != blob.kernel()) {
    return "other sizes were taken for right";
  }
  for (uint32_t row = 0; row < blob.rows(); ++row) {
    if (changed.scale(row) != blob.scale(row) || changed.bias(row) != blob.bias(row)) {
      return "other scales or biases were taken for right";
    }
  }
  return sums == multiply(blob, seed) ? nullptr : "other weights were taken for right";
}

}  // namespace

size_t check_mutations(uint64_t seed, size_t count) {
  Failures failures("mutated blob", "all");
  for (uint64_t at = seed; at < seed + count; ++at) {
    const char* wrong = check(at);
    if (wrong != nullptr) failures.add(at, wrong);
  }
  return failures.count();
}

}  // namespace mpqdm::test
