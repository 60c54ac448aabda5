// Layers with random weights for tests, and their blobs, written to FORMAT.md independently of the
// packer in Python.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "mpqdm/blob.h"

namespace mpqdm::test {

// The same numbers from the same seed on every platform.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  // In [low, high].
  int64_t integer(int64_t low, int64_t high) {
    const auto range = static_cast<uint64_t>(high - low) + 1;
    return low + static_cast<int64_t>(engine_() % range);
  }
  bool chance(int one_in) { return integer(1, one_in) == 1; }
  float number(float low, float high) {
    return low + (high - low) * static_cast<float>(engine_() >> 40) / static_cast<float>(1 << 24);
  }
  template <class T, size_t kCount>
  T choice(const T (&values)[kCount]) {
    return values[integer(0, kCount - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

struct TestBlock {
  Encoding encoding;
  int bits;
  std::vector<uint8_t> codes;  // [8][depth], each below 2^bits
  std::vector<int8_t> tables;  // [8][2^bits], or empty

  int8_t level(int row, uint8_t code) const;
};

struct TestLayer {
  uint32_t rows, channels, kernel;
  std::vector<TestBlock> blocks;
  std::vector<uint32_t> order;  // [blocks * 8]
  std::vector<float> scale, bias;  // [rows]; bias may be empty

  uint32_t depth() const { return channels * kernel * kernel; }
  // int8 [rows][depth] by output channel.
  std::vector<int8_t> weights() const;
};

// `extreme`: all weights are the least or the greatest of their encoding.
TestLayer make_layer(Random& random, uint32_t rows, uint32_t channels, uint32_t kernel, bool extreme);

std::vector<uint8_t> pack(const TestLayer& layer);

// Writes the checksum of the bytes behind the header, so that changed bytes pass for whole ones.
void sign(std::vector<uint8_t>& blob);

}  // namespace mpqdm::test
