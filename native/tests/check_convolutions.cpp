#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "cases.h"
#include "mpqdm/layers.h"
#include "random_layer.h"
#include "reference.h"
#include "thread_executor.h"

namespace mpqdm::test {
namespace {

// One call of a convolution with all that it reads.
struct ConvolutionCase {
  TestLayer layer;
  std::vector<int8_t> weights;  // [rows][depth]
  std::vector<uint8_t> bytes;
  Blob blob;
  ConvolutionShape shape;
  std::vector<int8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;

  Codes view() const { return {codes.data(), scale.data(), zero_point.data(), scale.size()}; }
};

uint32_t channel_count(Random& random) {
  if (random.chance(10)) return static_cast<uint32_t>(4 * random.integer(64, 160));
  return static_cast<uint32_t>(4 * random.integer(1, 24));
}

// A divisor of the pixels where every pixel may have a range, else of the batch.
size_t part_count(Random& random, const ConvolutionShape& shape, uint32_t kernel) {
  const bool is_pixelwise = kernel == 1 && shape.stride == 1 && shape.upsampling == 1;
  const size_t parts = shape.batch * (is_pixelwise ? shape.height * shape.width : 1);
  for (;;) {
    const auto divisor = static_cast<size_t>(random.integer(1, static_cast<int64_t>(parts)));
    if (parts % divisor == 0) return divisor;
  }
}

// Codes and ranges for a case that has its layer and shape.
void fill(ConvolutionCase& made, Random& random, bool extreme) {
  const size_t parts = part_count(random, made.shape, made.layer.kernel);
  made.codes.resize(made.shape.batch * made.shape.height * made.shape.width * made.layer.channels);
  const int8_t ends[] = {-128, 127};
  const int8_t end = random.choice(ends);
  for (int8_t& code : made.codes) {
    code = extreme ? end : static_cast<int8_t>(random.integer(-128, 127));
  }
  for (size_t part = 0; part < parts; ++part) {
    made.scale.push_back(random.chance(20) ? std::numeric_limits<float>::quiet_NaN()
                                           : random.number(1e-3f, 1.0f));
    made.zero_point.push_back(
        static_cast<int32_t>(extreme ? random.choice(ends) : random.integer(-128, 127)));
  }
}

ConvolutionCase make_case(uint64_t seed) {
  Random random(seed);
  ConvolutionCase made;
  const bool extreme = random.chance(4);
  const uint32_t kernels[] = {1, 3};
  const uint32_t kernel = random.choice(kernels);
  made.layer = make_layer(random, static_cast<uint32_t>(random.integer(1, 40)),
                          channel_count(random), kernel, extreme);
  made.bytes = pack(made.layer);
  made.weights = made.layer.weights();
  const auto padding = static_cast<size_t>(random.integer(0, kernel / 2));
  const auto least = static_cast<int64_t>(kernel - 2 * padding);
  const auto side = [&] { return static_cast<size_t>(random.integer(least, 9)); };
  made.shape = {static_cast<size_t>(random.integer(1, 3)), side(), side(),
                static_cast<size_t>(random.integer(1, 2)), padding,
                static_cast<size_t>(random.integer(1, 2))};
  fill(made, random, extreme);
  return made;
}

// Ends the rows of a 1x1 layer within their last tile, with any codes behind their end.
void cut_depth(ConvolutionCase& made, Random& random) {
  const uint32_t whole = made.layer.depth();
  const auto cut = static_cast<uint32_t>(kGroupDepth * random.integer(1, kTileDepth / kGroupDepth));
  const uint32_t depth = whole - kTileDepth + cut;
  const uint32_t sizes[] = {depth, depth};  // and channels
  std::memcpy(made.bytes.data() + 28, sizes, sizeof sizes);
  sign(made.bytes);
  std::vector<int8_t> weights;
  for (size_t row = 0; row < made.layer.rows; ++row) {
    const auto from = made.weights.begin() + static_cast<std::ptrdiff_t>(row * whole);
    weights.insert(weights.end(), from, from + std::ptrdiff_t{depth});
  }
  made.weights = weights;
  made.layer.channels = depth;
}

// Up to one pixel more than `KernelSet::few` takes: rows of a linear layer, or a small image.
ConvolutionCase make_few_case(uint64_t seed) {
  Random random(seed);
  ConvolutionCase made;
  const bool extreme = random.chance(4);
  const bool is_image = random.chance(4);
  const auto rows = static_cast<uint32_t>(random.integer(1, 72));
  if (is_image) {
    made.layer = make_layer(random, rows, channel_count(random), 3, extreme);
  } else {
    const auto tiles = static_cast<uint32_t>(random.integer(1, random.chance(4) ? 40 : 5));
    made.layer = make_layer(random, rows, kTileDepth * tiles, 1, extreme);
  }
  made.bytes = pack(made.layer);
  made.weights = made.layer.weights();
  if (is_image) {
    const auto side = [&] { return static_cast<size_t>(random.integer(1, 3)); };
    made.shape = {side(), side(), side(), 1, 1, 1};
  } else {
    cut_depth(made, random);
    made.shape = {static_cast<size_t>(random.integer(1, 2)), 1,
                  static_cast<size_t>(random.integer(1, kMostFew + 1)), 1, 0, 1};
  }
  fill(made, random, extreme);
  return made;
}

// Heap memory of exactly this size, so that a sanitizer sees what is read or written behind it.
std::vector<uint8_t> dirty_memory(size_t size) { return std::vector<uint8_t>(size, 0xa5); }

bool are_integers(const ConvolutionCase& given, const KernelSet& kernels, size_t threads,
                  const std::vector<int64_t>& expected) {
  std::vector<uint8_t> scratch = dirty_memory(convolution_scratch(given.blob, given.shape));
  std::vector<int32_t> sums(expected.size(), -1);
  convolve_integers(kernels, given.blob, given.view(), given.shape, scratch.data(),
                    thread_executor(threads), sums.data());
  return std::equal(sums.begin(), sums.end(), expected.begin());
}

bool are_results(const ConvolutionCase& given, const KernelSet& kernels, size_t threads,
                 const std::vector<int64_t>& sums) {
  std::vector<uint8_t> scratch = dirty_memory(convolution_scratch(given.blob, given.shape));
  std::vector<float> results(sums.size(), -1.0f);
  convolve(kernels, given.blob, given.view(), given.shape, scratch.data(), thread_executor(threads),
           results.data());
  const size_t pixels_of_part = sums.size() / given.layer.rows / given.scale.size();
  for (size_t i = 0; i < sums.size(); ++i) {
    const size_t row = i % given.layer.rows;
    const float activation_scale = given.scale[i / given.layer.rows / pixels_of_part];
    const float scale = activation_scale * given.layer.scale[row];
    const float product = static_cast<float>(sums[i]) * scale;
    const float expected = product + (given.layer.bias.empty() ? 0.0f : given.layer.bias[row]);
    if (results[i] != expected && !(std::isnan(results[i]) && std::isnan(expected))) return false;
  }
  return true;
}

}  // namespace

void Failures::add(uint64_t seed, const char* what) {
  if (++count_ <= 5) {
    std::printf("%s, %s, seed %llu: %s\n", subject_, kernels_,
                static_cast<unsigned long long>(seed), what);
  }
}

namespace {

size_t check_cases(const char* subject, ConvolutionCase (*make)(uint64_t seed),
                   const KernelSet& kernels, uint64_t seed, size_t count) {
  Failures failures(subject, kernels.name);
  for (uint64_t at = seed; at < seed + count; ++at) {
    ConvolutionCase given = make(at);
    const BlobError error = Blob::read(given.bytes.data(), given.bytes.size(), &given.blob);
    if (error != BlobError::none || given.blob.verify_checksum() != BlobError::none) {
      failures.add(at, error == BlobError::none ? "another checksum" : describe(error));
      continue;
    }
    const std::vector<int64_t> expected = convolve_reference(
        given.weights, given.layer.rows, given.layer.channels, given.layer.kernel, given.view(),
        given.shape, given.shape.out_height(given.blob), given.shape.out_width(given.blob));
    const size_t threads = 1 + at % 3;
    if (!are_integers(given, kernels, threads, expected)) failures.add(at, "other integers");
    if (!are_results(given, kernels, threads, expected)) failures.add(at, "other results");
  }
  return failures.count();
}

}  // namespace

size_t check_convolutions(const KernelSet& kernels, uint64_t seed, size_t count) {
  return check_cases("convolution", make_case, kernels, seed, count);
}

size_t check_few_pixels(const KernelSet& kernels, uint64_t seed, size_t count) {
  return check_cases("few pixels", make_few_case, kernels, seed, count);
}

size_t check_unpacking(const KernelSet& kernels, uint64_t seed, size_t count) {
  constexpr size_t kRunBytes = size_t{2} * kGroupBytes;  // 8 inputs of 8 rows
  Failures failures("unpacking", kernels.name);
  for (uint64_t at = seed; at < seed + count; ++at) {
    Random random(at);
    const TestLayer layer = make_layer(random, 8, channel_count(random), 1, random.chance(4));
    const std::vector<uint8_t> bytes = pack(layer);
    Blob blob;
    if (Blob::read(bytes.data(), bytes.size(), &blob) != BlobError::none) {
      failures.add(at, "refused");
      continue;
    }
    const auto size = static_cast<size_t>(blob.tiles() * kTileBytes);
    std::vector<int8_t> plain(size), own(size);
    unpack_scalar(blob.block(0), blob.tiles(), plain.data());
    kernels.unpack(blob.block(0), blob.tiles(), own.data());
    const std::vector<int8_t> weights = layer.weights();
    bool right = true;
    for (size_t i = 0; i < size_t{kBlockRows} * layer.depth(); ++i) {
      const size_t slot = i / layer.depth(), k = i % layer.depth();
      const size_t place = k / kGroupDepth * kGroupBytes + slot * kGroupDepth + k % kGroupDepth;
      right = right && plain[place] == weights[layer.order[slot] * layer.depth() + k];
    }
    for (size_t run = 0; run < size; run += kRunBytes) {
      const auto from = static_cast<std::ptrdiff_t>(run), to = from + std::ptrdiff_t{kRunBytes};
      right = right && std::is_permutation(plain.begin() + from, plain.begin() + to,
                                           own.begin() + from);
    }
    if (!right) failures.add(at, "other weights");
  }
  return failures.count();
}

}  // namespace mpqdm::test
