#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cases.h"
#include "mpqdm/codes.h"
#include "random_layer.h"

namespace mpqdm::test {
namespace {

constexpr int kClasses = 40, kFewRows = 4;

struct CodedLayer {
  CodesShape shape;
  std::vector<int8_t> codes;
  std::vector<uint8_t> stream;
};

// Numbers of `bits` bits one after the other, the first the lowest.
void append_bits(std::vector<uint8_t>& bytes, const std::vector<int>& numbers, size_t bits) {
  const size_t first = bytes.size();
  bytes.resize(first + (numbers.size() * bits + 7) / 8);
  for (size_t i = 0; i < numbers.size() * bits; ++i) {
    if (numbers[i / bits] >> (i % bits) & 1) {
      bytes[first + i / 8] = static_cast<uint8_t>(bytes[first + i / 8] | 1 << (i % 8));
    }
  }
}

std::vector<int> random_shifts(Random& random, size_t count, bool some) {
  std::vector<int> shifts(count);
  for (int& shift : shifts) shift = some ? static_cast<int>(random.integer(-8, 7)) : 0;
  return shifts;
}

// A number of about the size that its class has, and now and then any other.
int8_t random_code(Random& random, int code_class) {
  if (random.chance(50)) return static_cast<int8_t>(random.integer(-127, 127));
  const double deviation = std::exp2(-4.0 + code_class / 3.0);
  double sum = 0;
  for (int i = 0; i < 4; ++i) sum += static_cast<double>(random.integer(-1000, 1000)) / 1000;
  return static_cast<int8_t>(std::clamp(std::round(sum * deviation), -127.0, 127.0));
}

CodesShape random_shape(Random& random, int64_t most_rows, int64_t most_channels) {
  const size_t kernels[] = {1, 9};
  return {static_cast<size_t>(random.integer(1, most_rows)),
          static_cast<size_t>(random.integer(1, most_channels)), random.choice(kernels)};
}

CodedLayer make_coded(Random& random, const CodesShape& shape) {
  CodedLayer layer;
  layer.shape = shape;
  const auto& [rows, channels, places] = layer.shape;
  std::vector<int> row_classes(rows);
  for (int& row : row_classes) row = static_cast<int>(random.integer(0, kClasses - 1));
  std::vector<int> by_channel = random_shifts(random, channels, rows >= kFewRows);
  std::vector<int> by_place = random_shifts(random, places, places > 1);
  std::vector<uint8_t> classes;
  for (const int row : row_classes) {
    for (const int channel : by_channel) {
      for (const int place : by_place) {
        const int of_code = std::clamp(row + channel + place, 0, kClasses - 1);
        classes.push_back(static_cast<uint8_t>(of_code));
        layer.codes.push_back(random_code(random, of_code));
      }
    }
  }
  append_bits(layer.stream, row_classes, 6);
  std::vector<int> stored;
  if (rows >= kFewRows) stored = by_channel;
  if (places > 1) stored.insert(stored.end(), by_place.begin(), by_place.end());
  for (int& shift : stored) shift += 8;
  append_bits(layer.stream, stored, 4);
  const size_t head = layer.stream.size();
  layer.stream.resize(head + encoded_limit(layer.codes.size()));
  layer.stream.resize(head + encode_codes(layer.codes.data(), classes.data(), layer.codes.size(),
                                          layer.stream.data() + head));
  return layer;
}

// Decodes a copy of exactly this size, so that a sanitizer sees what is read behind it.
CodesError decode(const KernelSet& kernels, const std::vector<uint8_t>& stream,
                  const CodesShape& shape, std::vector<int8_t>& codes) {
  const auto copy = std::make_unique<uint8_t[]>(stream.size());
  std::copy(stream.begin(), stream.end(), copy.get());
  codes.assign(shape.rows * shape.channels * shape.places, 0);
  return decode_codes(kernels, copy.get(), stream.size(), shape, codes.data());
}

void damage(Random& random, std::vector<uint8_t>& stream) {
  const auto size = static_cast<int64_t>(stream.size());
  if (random.chance(2)) {
    stream.resize(static_cast<size_t>(random.integer(0, size + 9)));
    return;
  }
  for (int64_t left = random.integer(1, 3); left > 0; --left) {
    const int64_t until = random.chance(2) ? size : std::min<int64_t>(size, 40);
    stream[static_cast<size_t>(random.integer(0, until - 1))] =
        static_cast<uint8_t>(random.integer(0, 255));
  }
}

// Null if all went well.
const char* check_damaged(uint64_t seed) {
  Random random(seed);
  CodedLayer layer = make_coded(random, random_shape(random, 12, 40));
  const std::vector<uint8_t> whole = layer.stream;
  damage(random, layer.stream);
  const KernelSet* const* sets = nullptr;
  const size_t count = kernel_sets(&sets);
  CodesError first = CodesError::none;
  std::vector<int8_t> codes;
  for (size_t i = 0; i < count; ++i) {
    std::vector<int8_t> of_set;
    const CodesError error = decode(*sets[i], layer.stream, layer.shape, of_set);
    if (i == 0) {
      first = error;
      codes = of_set;
    }
    if (error != first) return "the kernel sets find other faults";
    if (error == CodesError::none && codes != of_set) return "the kernel sets differ";
  }
  if (first != CodesError::none) return nullptr;
  if (layer.stream.size() != whole.size()) return "other lengths were taken for right";
  if (std::find(codes.begin(), codes.end(), -128) != codes.end()) return "a code is -128";
  return layer.stream != whole || codes == layer.codes ? nullptr : "other codes";
}

}  // namespace

size_t check_codes(const KernelSet& kernels, uint64_t seed, size_t count) {
  Failures failures("coded layer", kernels.name);
  for (uint64_t at = seed; at < seed + count; ++at) {
    Random random(at);
    // The first is so large that its states fill several vectors; now and then they fill one or two.
    const CodesShape shape = at == seed           ? CodesShape{256, 128, 9}
                             : random.chance(30) ? random_shape(random, 300, 64)
                                                 : random_shape(random, 12, 30);
    const CodedLayer layer = make_coded(random, shape);
    std::vector<int8_t> codes;
    if (decode(kernels, layer.stream, layer.shape, codes) != CodesError::none) {
      failures.add(at, "refused unchanged");
    } else if (codes != layer.codes) {
      failures.add(at, "other codes");
    }
  }
  return failures.count();
}

size_t check_damaged_codes(uint64_t seed, size_t count) {
  Failures failures("damaged codes", "all");
  for (uint64_t at = seed; at < seed + count; ++at) {
    const char* wrong = check_damaged(at);
    if (wrong != nullptr) failures.add(at, wrong);
  }
  return failures.count();
}

}  // namespace mpqdm::test
