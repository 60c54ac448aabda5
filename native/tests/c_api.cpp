// The kernels for Python's tests (ctypes). Functions that take a kernel set return 0, or -1 if there
// is none of that name, or the number of what is wrong with the blob.
#include <cstring>
#include <vector>

#include "mpqdm/codes.h"
#include "mpqdm/layers.h"
#include "mpqdm/operators.h"
#include "thread_executor.h"

namespace {

using namespace mpqdm;

int read(const uint8_t* data, size_t size, Blob* blob) {
  const BlobError error = Blob::read(data, size, blob);
  return static_cast<int>(error == BlobError::none ? blob->verify_checksum() : error);
}

}  // namespace

extern "C" {

MPQDM_API const char* mpqdm_test_kernel_set(size_t index) {
  const KernelSet* const* sets = nullptr;
  return index < kernel_sets(&sets) ? sets[index]->name : nullptr;
}

MPQDM_API const char* mpqdm_test_best_kernels() { return best_kernels().name; }

MPQDM_API int mpqdm_test_blob_error(const uint8_t* data, size_t size) {
  Blob blob;
  return read(data, size, &blob);
}

MPQDM_API const char* mpqdm_test_describe(int error) {
  return describe(static_cast<BlobError>(error));
}

// int8 [rows, depth] by output channel, unpacked by the scalar kernels.
MPQDM_API int mpqdm_test_unpack(const uint8_t* data, size_t size, int8_t* weights) {
  Blob blob;
  const int error = read(data, size, &blob);
  if (error != 0) return error;
  std::vector<int8_t> unpacked(static_cast<size_t>(blob.tiles() * kTileBytes));
  for (uint32_t index = 0; index < blob.blocks(); ++index) {
    unpack_scalar(blob.block(index), blob.tiles(), unpacked.data());
    for (int row = 0; row < kBlockRows; ++row) {
      if (blob.channel(index, row) == kNoRow) continue;
      int8_t* out = weights + size_t{blob.channel(index, row)} * blob.depth();
      for (size_t k = 0; k < blob.depth(); ++k) {
        const size_t group = k / kGroupDepth * kGroupBytes;
        out[k] = unpacked[group + static_cast<size_t>(row) * kGroupDepth + k % kGroupDepth];
      }
    }
  }
  return 0;
}

// shape: batch, height, width, stride, padding. Writes both results, [batch, height, width, rows] of
// the output.
MPQDM_API int mpqdm_test_convolve(const char* name, const uint8_t* data, size_t size,
                                  const int8_t* values, const float* scale,
                                  const int32_t* zero_point, size_t parts, const size_t* shape,
                                  size_t threads, float* results, int32_t* integers) {
  const KernelSet* kernels = find_kernels(name);
  if (kernels == nullptr) return -1;
  Blob blob;
  const int error = read(data, size, &blob);
  if (error != 0) return error;
  const Codes codes{values, scale, zero_point, parts};
  const ConvolutionShape sizes{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  std::vector<uint8_t> scratch(convolution_scratch(blob, sizes) + 64, 0xa5);
  const auto start = reinterpret_cast<uintptr_t>(scratch.data());
  uint8_t* aligned = scratch.data() + (64 - start % 64) % 64;
  const Executor executor = test::thread_executor(threads);
  convolve(*kernels, blob, codes, sizes, aligned, executor, results);
  convolve_integers(*kernels, blob, codes, sizes, aligned, executor, integers);
  return 0;
}

MPQDM_API int mpqdm_test_quantize(const char* name, const float* x, size_t size, size_t parts,
                                  size_t threads, int8_t* codes, float* scale,
                                  int32_t* zero_point) {
  const KernelSet* kernels = find_kernels(name);
  if (kernels == nullptr) return -1;
  quantize(*kernels, x, size, parts, test::thread_executor(threads), codes, scale, zero_point);
  return 0;
}

MPQDM_API int mpqdm_test_quantize_static(const char* name, const float* x, size_t size, float scale,
                                         int32_t zero_point, size_t threads, int8_t* codes) {
  const KernelSet* kernels = find_kernels(name);
  if (kernels == nullptr) return -1;
  quantize_static(*kernels, x, size, {scale, zero_point}, test::thread_executor(threads), codes);
  return 0;
}

// shape: batch, pixels, channels, groups.
MPQDM_API int mpqdm_test_group_norm(const char* name, const float* x, const float* weight,
                                    const float* bias, const float* factor, const size_t* shape,
                                    float epsilon, int silu, size_t threads, float* out) {
  const KernelSet* kernels = find_kernels(name);
  if (kernels == nullptr) return -1;
  const GroupNormShape sizes{shape[0], shape[1], shape[2], shape[3], epsilon, silu != 0};
  group_norm(*kernels, x, {weight, bias, factor}, sizes, test::thread_executor(threads), out);
  return 0;
}

// shape: rows, channels, places. Returns what is wrong with the stream.
MPQDM_API int mpqdm_test_decode_codes(const char* name, const uint8_t* stream, size_t size,
                                      const size_t* shape, int8_t* codes) {
  const KernelSet* kernels = find_kernels(name);
  if (kernels == nullptr) return -1;
  const CodesShape sizes{shape[0], shape[1], shape[2]};
  return static_cast<int>(decode_codes(*kernels, stream, size, sizes, codes));
}

// Returns the number of bytes; `stream` has mpqdm_test_encoded_limit.
MPQDM_API size_t mpqdm_test_encode_codes(const int8_t* codes, const uint8_t* classes, size_t count,
                                         uint8_t* stream) {
  return encode_codes(codes, classes, count, stream);
}

MPQDM_API size_t mpqdm_test_encoded_limit(size_t count) { return encoded_limit(count); }
}
