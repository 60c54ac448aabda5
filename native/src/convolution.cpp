// Convolutions as implicit matrix products: the inputs of a pixel are read where they lie, a run of
// `kernel * channels` for each kernel row; nothing is gathered. What is copied is one image of int8
// codes, for its border of zero points; there pixels are repeated where it is upsampled.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernel_sets.h"
#include "mpqdm/layers.h"

namespace mpqdm {
namespace {

constexpr size_t kAlignment = 64;
// Pixels that one task multiplies by an unpacked pair of blocks, where there are enough of them: many,
// so that unpacking is spread, but not so many that their inputs leave the cache of a core.
constexpr size_t kChunkBytes = size_t{1024} * 1024;
constexpr size_t kLeastChunk = 64;
static_assert(kMostFew <= kMaxPixels);
// Tasks for each thread, so that a slow one does not keep the others waiting.
constexpr size_t kTasksPerThread = 4;
constexpr size_t kMostPairs = 2;  // of blocks that a task unpacks

// A sample's codes as the kernels read them, with a border.
struct Image {
  const uint8_t* data;
  size_t pitch;  // bytes of a row with its border
};

struct Job {
  const KernelSet& kernels;
  const Blob& blob;
  const Codes& codes;
  const ConvolutionShape& shape;
  Image image;
  size_t sample;
  size_t pixels;         // of the output
  size_t chunk;          // of a task: pixels, or pairs of blocks where pixels are few
  float* floats;         // results, or
  int32_t* integers;     // their integers
};

size_t divide_up(size_t value, size_t by) { return (value + by - 1) / by; }

// Working memory of one thread.
class Buffers {
 public:
  int8_t* weights(size_t bytes) { return aligned<int8_t>(weights_, bytes); }
  uint8_t* inputs(size_t bytes) { return aligned<uint8_t>(weights_, bytes); }
  int32_t* sums(size_t count) { return aligned<int32_t>(sums_, count * sizeof(int32_t)); }

 private:
  template <class T>
  static T* aligned(std::vector<uint8_t>& bytes, size_t size) {
    if (bytes.size() < size + kAlignment) bytes.assign(size + kAlignment, 0);
    const auto at = reinterpret_cast<uintptr_t>(bytes.data());
    return reinterpret_cast<T*>((at + kAlignment - 1) / kAlignment * kAlignment);
  }

  std::vector<uint8_t> weights_, sums_;
};

PairRows pair_rows(const Job& job, uint32_t first_block, const int32_t* sums) {
  PairRows rows = {};
  rows.adjacent = true;
  const uint32_t end = std::min(first_block + 2, job.blob.blocks());
  for (uint32_t block = first_block; block < end; ++block) {
    for (int row = 0; row < kBlockRows; ++row) {
      const uint32_t channel = job.blob.channel(block, row);
      if (channel == kNoRow) continue;
      const int at = rows.count++;
      rows.channel[at] = channel;
      rows.scale[at] = job.blob.scale(channel);
      rows.bias[at] = job.blob.bias(channel);
      rows.weight_sum[at] = sums[kBlockRows * static_cast<int>(block - first_block) + row];
      rows.adjacent = rows.adjacent && channel == rows.channel[0] + static_cast<uint32_t>(at);
    }
  }
  return rows;
}

// The pixels of a chunk in order: where their inputs lie, and whose scale and zero point they have.
// Counts along instead of dividing: a division takes as long as a good part of a small pixel.
class PixelWalk {
 public:
  PixelWalk(const Job& job, size_t first)
      : width_(job.shape.out_width(job.blob)),
        step_(job.shape.stride * job.blob.channels()),
        row_step_(job.shape.stride * job.image.pitch),
        column_(first % width_),
        row_(job.image.data + first / width_ * row_step_),
        inputs_(row_ + column_ * step_) {}

  const uint8_t* next() {
    const uint8_t* const inputs = inputs_;
    inputs_ += step_;
    if (++column_ == width_) {
      column_ = 0;
      row_ += row_step_;
      inputs_ = row_;
    }
    return inputs;
  }

 private:
  size_t width_, step_, row_step_, column_;
  const uint8_t *row_, *inputs_;
};

// Scales and zero points of the pixels that are multiplied together.
class PartWalk {
 public:
  PartWalk(const Job& job, size_t first)
      : codes_(job.codes),
        offset_(job.kernels.offset_inputs ? 128 : 0),
        pixels_(job.shape.batch * job.pixels / job.codes.parts),
        part_((job.sample * job.pixels + first) / pixels_),
        at_((job.sample * job.pixels + first) % pixels_) {}

  void next(size_t count) {
    for (size_t i = 0; i < count; ++i) {
      scales[i] = codes_.scale[part_];
      zero_points[i] = codes_.zero_point[part_] + offset_;
      if (++at_ == pixels_) {
        at_ = 0;
        ++part_;
      }
    }
  }

  float scales[kMaxPixels];
  int32_t zero_points[kMaxPixels];

 private:
  const Codes& codes_;
  int32_t offset_;
  size_t pixels_, part_, at_;
};

void store_integers(const int32_t* sums, size_t count, const PairRows& rows,
                    const int32_t* zero_points, size_t stride, int32_t* out) {
  for (size_t pixel = 0; pixel < count; ++pixel, sums += kPairRows, out += stride) {
    for (int row = 0; row < rows.count; ++row) {
      out[rows.channel[row]] = sums[row] - zero_points[pixel] * rows.weight_sum[row];
    }
  }
}

// Results of `count` pixels from `first` on.
void store(const Job& job, const PairRows& rows, size_t first, size_t count, const PartWalk& parts,
           const int32_t* sums) {
  const size_t stride = job.blob.rows();
  const size_t at = (job.sample * job.pixels + first) * stride;
  if (job.integers != nullptr) {
    store_integers(sums, count, rows, parts.zero_points, stride, job.integers + at);
  } else {
    job.kernels.store(sums, count, rows, parts.scales, parts.zero_points, stride, job.floats + at);
  }
}

// Pairs of blocks that a task multiplies a pixel's inputs by.
size_t pairs_together(const KernelSet& kernels) { return kernels.multiply_two == nullptr ? 1 : 2; }

size_t tasks_of_blocks(const KernelSet& kernels, const Blob& blob) {
  return divide_up(blob.blocks(), 2 * pairs_together(kernels));
}

// The pairs of blocks of one task, unpacked.
struct UnpackedPairs {
  const int8_t* blocks[2 * kMostPairs];  // the last one again where a pair has one alone
  PairRows rows[kMostPairs];
  size_t count;      // of pairs
  bool single_last;  // whether the last pair has one block
  int largest;       // bounds the absolute codes
};

UnpackedPairs unpack_pairs(const Job& job, uint32_t first_block, int8_t* weights) {
  const KernelSet& kernels = job.kernels;
  const auto tiles = static_cast<size_t>(job.blob.tiles());
  const size_t blocks = std::min<size_t>(2 * pairs_together(kernels), job.blob.blocks() - first_block);
  UnpackedPairs result = {{}, {}, divide_up(blocks, 2), blocks % 2 != 0, 0};
  int32_t sums[kMostPairs * kPairRows] = {};
  for (uint32_t i = 0; i < blocks; ++i) {
    const Block block = job.blob.block(first_block + i);
    int8_t* const unpacked = weights + i * tiles * kTileBytes;
    kernels.unpack(block, static_cast<int>(tiles), unpacked);
    kernels.sum_weights(unpacked, static_cast<int>(job.blob.depth() / kGroupDepth),
                        sums + kBlockRows * i);
    result.largest = std::max(result.largest, block.largest);
    result.blocks[i] = unpacked;
  }
  if (result.single_last) result.blocks[blocks] = result.blocks[blocks - 1];
  for (size_t pair = 0; pair < result.count; ++pair) {
    result.rows[pair] = pair_rows(job, first_block + static_cast<uint32_t>(2 * pair),
                                  sums + kPairRows * pair);
  }
  return result;
}

// Some pairs of blocks times one chunk of pixels.
void multiply_chunk(const Job& job, uint32_t first_block, size_t first, size_t end) {
  thread_local Buffers buffers;
  const KernelSet& kernels = job.kernels;
  const auto together = static_cast<size_t>(kernels.pixels);
  const size_t pair_sums = kPairRows * together;
  const size_t bytes = static_cast<size_t>(job.blob.tiles()) * kTileBytes;
  int8_t* const weights = buffers.weights(2 * pairs_together(kernels) * bytes);
  const UnpackedPairs pairs = unpack_pairs(job, first_block, weights);
  int32_t* const sums = buffers.sums(kMostPairs * pair_sums);
  const uint8_t* pixels[kMaxPixels];
  const uint32_t kernel = job.blob.kernel();
  const Inputs inputs = {pixels, job.image.pitch, static_cast<int>(kernel),
                         static_cast<int>(kernel * job.blob.channels() / kGroupDepth)};
  PixelWalk walk(job, first);
  PartWalk parts(job, first);
  for (size_t pixel = first; pixel < end; pixel += together) {
    const size_t count = std::min(together, end - pixel);
    for (size_t i = 0; i < together; ++i) pixels[i] = i < count ? walk.next() : pixels[0];
    if (pairs.count == 2) {
      kernels.multiply_two(inputs, pairs.blocks, sums);
    } else {
      kernels.multiply(inputs, pairs.blocks[0], pairs.single_last ? nullptr : pairs.blocks[1],
                       pairs.largest, sums);
    }
    parts.next(count);
    for (size_t pair = 0; pair < pairs.count; ++pair) {
      store(job, pairs.rows[pair], pixel, count, parts, sums + pair * pair_sums);
    }
  }
}

void multiply_task(void* context, size_t index) {
  const Job& job = *static_cast<const Job*>(context);
  const size_t tasks = tasks_of_blocks(job.kernels, job.blob);
  const size_t first = index / tasks * job.chunk;
  const auto block = static_cast<uint32_t>(index % tasks * 2 * pairs_together(job.kernels));
  multiply_chunk(job, block, first, std::min(first + job.chunk, job.pixels));
}

// All pixels of a sample, if they are few, times the pairs of blocks from `first` to `end`.
void multiply_few(const Job& job, size_t first, size_t end) {
  thread_local Buffers buffers;
  const FewKernels& few = job.kernels.few;
  const uint32_t kernel = job.blob.kernel();
  const size_t padded = static_cast<size_t>(job.blob.tiles()) * kTileDepth;
  const size_t pitch = padded * static_cast<size_t>(few.input_bytes);
  const size_t segment = kernel * job.blob.channels();
  int32_t* sums = buffers.sums(size_t{kMostFew} * kPairRows);
  uint8_t* prepared = buffers.inputs(job.pixels * pitch + padded);
  uint8_t* gathered = prepared + job.pixels * pitch;
  std::memset(gathered + kernel * segment, 0, padded - kernel * segment);
  PixelWalk walk(job, 0);
  PartWalk parts(job, 0);
  parts.next(job.pixels);
  int32_t input_sums[kMostFew];
  for (size_t pixel = 0; pixel < job.pixels; ++pixel) {
    const uint8_t* const inputs = walk.next();
    for (size_t row = 0; row < kernel; ++row) {
      std::memcpy(gathered + row * segment, inputs + row * job.image.pitch, segment);
    }
    const int32_t zero_point = parts.zero_points[pixel];
    input_sums[pixel] = few.prepare(gathered, padded, zero_point, prepared + pixel * pitch) -
                        zero_point * static_cast<int32_t>(job.blob.depth());
  }
  const FewInputs inputs = {prepared, pitch, static_cast<int>(job.pixels),
                            static_cast<int>(job.blob.depth() / kGroupDepth), parts.zero_points,
                            input_sums};
  const int32_t no_sums[kPairRows] = {};  // zero points are subtracted from the inputs already
  for (size_t pair = first; pair < end; ++pair) {
    const auto block = static_cast<uint32_t>(2 * pair);
    const bool paired = block + 1 < job.blob.blocks();
    const Block one = job.blob.block(block), other = job.blob.block(paired ? block + 1 : block);
    few.multiply(inputs, one, paired ? &other : nullptr, sums);
    store(job, pair_rows(job, block, no_sums), 0, job.pixels, parts, sums);
  }
}

void multiply_few_task(void* context, size_t index) {
  const Job& job = *static_cast<const Job*>(context);
  const size_t first = index * job.chunk;
  multiply_few(job, first, std::min(first + job.chunk, divide_up(job.blob.blocks(), 2)));
}

// Copies a row of an image between its borders, moved to the kernels' range.
struct Copy {
  const int8_t* codes;
  uint8_t* image;
  size_t height, width, channels, padding, upsampling, pitch;
  uint8_t border, flip;
};

void copy_row(void* context, size_t row) {
  const Copy& copy = *static_cast<const Copy*>(context);
  uint8_t* out = copy.image + row * copy.pitch;
  if (row < copy.padding || row >= copy.padding + copy.height * copy.upsampling) {
    std::memset(out, copy.border, copy.pitch);
    return;
  }
  const size_t side = copy.padding * copy.channels, inner = copy.width * copy.channels;
  const auto* in = reinterpret_cast<const uint8_t*>(copy.codes) +
                   (row - copy.padding) / copy.upsampling * inner;
  std::memset(out, copy.border, side);
  std::memset(out + copy.pitch - side, copy.border, side);
  out += side;
  if (copy.upsampling == 1) {
    for (size_t i = 0; i < inner; ++i) out[i] = in[i] ^ copy.flip;
    return;
  }
  for (size_t at = 0; at < inner; at += copy.channels, in += copy.channels) {
    for (size_t i = 0; i < copy.channels; ++i) out[i] = in[i] ^ copy.flip;
    const uint8_t* const pixel = out;
    out += copy.channels;
    for (size_t more = 1; more < copy.upsampling; ++more, out += copy.channels) {
      std::memcpy(out, pixel, copy.channels);
    }
  }
}

// Whether the kernels read the codes where they are.
bool is_direct(const KernelSet& kernels, const ConvolutionShape& shape) {
  return shape.padding == 0 && shape.upsampling == 1 && !kernels.offset_inputs;
}

Image make_image(const KernelSet& kernels, const Blob& blob, const Codes& codes,
                 const ConvolutionShape& shape, size_t sample, uint8_t* scratch,
                 const Executor& executor) {
  const size_t channels = blob.channels();
  const int8_t* from = codes.codes + sample * shape.height * shape.width * channels;
  if (is_direct(kernels, shape)) {
    return {reinterpret_cast<const uint8_t*>(from), shape.width * channels};
  }
  // With padding there is one part a sample, or one for all.
  const size_t part = sample * codes.parts / shape.batch;
  const uint8_t flip = kernels.offset_inputs ? 0x80 : 0;
  const size_t pitch = (shape.width * shape.upsampling + 2 * shape.padding) * channels;
  Copy copy = {from,   scratch,
               shape.height,  shape.width,
               channels, shape.padding, shape.upsampling,
               pitch,  static_cast<uint8_t>(static_cast<uint8_t>(codes.zero_point[part]) ^ flip),
               flip};
  executor.run(executor.self, shape.height * shape.upsampling + 2 * shape.padding, copy_row, &copy);
  return {scratch, pitch};
}

size_t chunk_pixels(const KernelSet& kernels, const Blob& blob, size_t pixels, size_t threads) {
  const auto step = static_cast<size_t>(kernels.pixels);
  const size_t cached = std::max(kLeastChunk, kChunkBytes / (blob.channels() * blob.kernel()));
  const size_t tasks = tasks_of_blocks(kernels, blob);
  const size_t chunks = divide_up(threads > 1 ? kTasksPerThread * threads : 1, tasks);
  const size_t wanted = std::min(cached, std::max(kLeastChunk, divide_up(pixels, chunks)));
  return divide_up(std::min(wanted, pixels), step) * step;
}

void run(const KernelSet& kernels, const Blob& blob, const Codes& codes,
         const ConvolutionShape& shape, uint8_t* scratch, const Executor& executor, float* floats,
         int32_t* integers) {
  const size_t pixels = shape.out_height(blob) * shape.out_width(blob);
  for (size_t sample = 0; sample < shape.batch; ++sample) {
    const Image image = make_image(kernels, blob, codes, shape, sample, scratch, executor);
    if (pixels <= static_cast<size_t>(kernels.few.pixels)) {
      const size_t pairs = divide_up(blob.blocks(), 2);
      const size_t chunk = divide_up(pairs, executor.threads > 1 ? kTasksPerThread * executor.threads : 1);
      Job job = {kernels, blob, codes, shape, image, sample, pixels, chunk, floats, integers};
      executor.run(executor.self, divide_up(pairs, chunk), multiply_few_task, &job);
      continue;
    }
    const size_t chunk = chunk_pixels(kernels, blob, pixels, executor.threads);
    Job job = {kernels, blob, codes, shape, image, sample, pixels, chunk, floats, integers};
    const size_t tasks = tasks_of_blocks(kernels, blob) * divide_up(pixels, chunk);
    executor.run(executor.self, tasks, multiply_task, &job);
  }
}

}  // namespace

Executor serial_executor() {
  const auto run = [](void*, size_t count, void (*task)(void*, size_t), void* context) {
    for (size_t index = 0; index < count; ++index) task(context, index);
  };
  return {run, nullptr, 1};
}

size_t convolution_scratch(const Blob& blob, const ConvolutionShape& shape) {
  const size_t height = shape.height * shape.upsampling + 2 * shape.padding;
  const size_t width = shape.width * shape.upsampling + 2 * shape.padding;
  return height * width * blob.channels();
}

void convolve(const KernelSet& kernels, const Blob& blob, const Codes& codes,
              const ConvolutionShape& shape, uint8_t* scratch, const Executor& executor, float* out) {
  run(kernels, blob, codes, shape, scratch, executor, out, nullptr);
}

void convolve_integers(const KernelSet& kernels, const Blob& blob, const Codes& codes,
                       const ConvolutionShape& shape, uint8_t* scratch, const Executor& executor,
                       int32_t* out) {
  run(kernels, blob, codes, shape, scratch, executor, nullptr, out);
}

}  // namespace mpqdm
