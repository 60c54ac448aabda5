// The operators of FORMAT.md for ExecuTorch: from arguments to layers.
#include "mpqdm/operators.h"

#include <executorch/runtime/core/event_tracer_hooks.h>
#include <executorch/runtime/core/exec_aten/util/tensor_dimension_limit.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "call.h"
#include "mpqdm/kernels.h"
#include "mpqdm/layers.h"
#include "verified_blobs.h"

namespace mpqdm {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxRows = int64_t{1} << 20;
constexpr size_t kMaxDimensions = executorch::runtime::kTensorDimensionLimit;

size_t size_of(const Tensor& tensor, ssize_t dimension) {
  return static_cast<size_t>(tensor.size(dimension));
}

size_t count_of(const Tensor& tensor) { return static_cast<size_t>(tensor.numel()); }

// Activations as they come in: codes, and a range for each of their parts.
struct CodesArguments {
  const Tensor* codes;
  const Tensor* scale;
  const Tensor* zero_point;

  Codes view() const {
    return Codes{codes->const_data_ptr<int8_t>(), scale->const_data_ptr<float>(),
                 zero_point->const_data_ptr<int32_t>(), count_of(*scale)};
  }
};

CodesArguments read_codes(Call& call) {
  const CodesArguments read{call.input(0, "codes", ScalarType::Char),
                            call.input(1, "scale", ScalarType::Float),
                            call.input(2, "zero_point", ScalarType::Int)};
  if (!call.ok()) return read;
  const size_t parts = count_of(*read.scale);
  call.require(read.scale->dim() == 1, "scale", "has more than one dimension");
  call.require(read.zero_point->dim() == 1 && count_of(*read.zero_point) == parts, "zero_point",
               "has other sizes than scale");
  if (!call.ok()) return read;
  const auto* zero_points = read.zero_point->const_data_ptr<int32_t>();
  for (size_t part = 0; part < parts; ++part) {
    call.require(zero_points[part] >= -128 && zero_points[part] <= 127, "zero_point",
                 "is outside -128..127");
  }
  return read;
}

// A range that the program knows beforehand: one number each.
FixedRange read_range(Call& call, size_t index) {
  const Tensor* scale = call.input(index, "scale", ScalarType::Float);
  const Tensor* zero_point = call.input(index + 1, "zero_point", ScalarType::Int);
  if (!call.ok()) return {};
  call.require(scale->dim() == 1 && count_of(*scale) == 1, "scale", "is not one number");
  call.require(zero_point->dim() == 1 && count_of(*zero_point) == 1, "zero_point",
               "is not one number");
  if (!call.ok()) return {};
  const FixedRange range{*scale->const_data_ptr<float>(), *zero_point->const_data_ptr<int32_t>()};
  call.require(std::isnormal(range.scale) && range.scale > 0, "scale",
               "is not a positive normal number");
  call.require(range.zero_point >= -128 && range.zero_point <= 127, "zero_point",
               "is outside -128..127");
  return range;
}

// Reads the blob of a layer with `rows` outputs and kernels of `kernel` x `kernel`.
Blob read_weight(Call& call, size_t index, int64_t rows, int64_t kernel) {
  Blob blob;
  const Tensor* weight = call.input(index, "weight", ScalarType::Byte);
  if (!call.ok()) return blob;
  const BlobError error =
      read_verified(weight->const_data_ptr<uint8_t>(), count_of(*weight), &blob);
  if (!call.require(error == BlobError::none, "weight:", describe(error))) return blob;
  call.require(blob.rows() == rows, "weight", "has another number of rows than the call says");
  call.require(blob.kernel() == kernel, "weight", "has another kernel size than the call says");
  return blob;
}

// Outputs of the operators that quantize.
struct CodesOutputs {
  Tensor* codes;
  Tensor* scale;
  Tensor* zero_point;
};

CodesOutputs write_codes(Call& call, size_t index, const Tensor& like, size_t parts) {
  const CodesOutputs out{call.output(index, "codes", ScalarType::Char),
                         call.output(index + 1, "scale", ScalarType::Float),
                         call.output(index + 2, "zero_point", ScalarType::Int)};
  if (!call.ok()) return out;
  const std::array<SizesType, 1> ranges{static_cast<SizesType>(parts)};
  call.resize(*out.codes, "codes", like.sizes());
  call.resize(*out.scale, "scale", {ranges.data(), ranges.size()});
  call.resize(*out.zero_point, "zero_point", {ranges.data(), ranges.size()});
  return out;
}

// quantize_mixed.out(Tensor x, int parts, *, codes!, scale!, zero_point!)
void quantize_mixed(Call& call) {
  const Tensor* x = call.input(0, "x", ScalarType::Float);
  const auto parts = static_cast<size_t>(call.integer(1, "parts", 1, kMaxInt));
  if (!call.ok()) return;
  if (!call.require(count_of(*x) % parts == 0, "parts", "does not divide x into equal parts")) return;
  const CodesOutputs out = write_codes(call, 2, *x, parts);
  if (!call.ok()) return;
  quantize(best_kernels(), x->const_data_ptr<float>(), count_of(*x), parts, thread_pool_executor(),
           out.codes->mutable_data_ptr<int8_t>(), out.scale->mutable_data_ptr<float>(),
           out.zero_point->mutable_data_ptr<int32_t>());
}

// quantize_static_mixed.out(Tensor x, Tensor scale, Tensor zero_point, *, out!)
void quantize_static_mixed(Call& call) {
  const Tensor* x = call.input(0, "x", ScalarType::Float);
  const FixedRange range = read_range(call, 1);
  Tensor* out = call.output(3, "out", ScalarType::Char);
  if (!call.ok() || !call.resize(*out, "out", x->sizes())) return;
  quantize_static(best_kernels(), x->const_data_ptr<float>(), count_of(*x), range,
                  thread_pool_executor(), out->mutable_data_ptr<int8_t>());
}

// dequantize_mixed.out(Tensor codes, Tensor scale, Tensor zero_point, *, out!)
void dequantize_mixed(Call& call) {
  const Tensor* codes = call.input(0, "codes", ScalarType::Char);
  const FixedRange range = read_range(call, 1);
  Tensor* out = call.output(3, "out", ScalarType::Float);
  if (!call.ok() || !call.resize(*out, "out", codes->sizes())) return;
  dequantize(best_kernels(), codes->const_data_ptr<int8_t>(), count_of(*codes), range,
             thread_pool_executor(), out->mutable_data_ptr<float>());
}

struct GroupNormArguments {
  const Tensor* x;
  const Tensor* weight;
  const Tensor* bias;
  const Tensor* factor;
  GroupNormShape shape;

  GroupNormParameters parameters() const {
    return {weight->const_data_ptr<float>(), bias->const_data_ptr<float>(),
            factor->const_data_ptr<float>()};
  }
};

GroupNormArguments read_group_norm(Call& call) {
  GroupNormArguments read{call.input(0, "x", ScalarType::Float),
                          call.input(1, "weight", ScalarType::Float),
                          call.input(2, "bias", ScalarType::Float),
                          call.input(3, "factor", ScalarType::Float),
                          {}};
  const int64_t groups = call.integer(4, "groups", 1, kMaxInt);
  const double epsilon = call.number(5, "eps");
  const bool silu = call.boolean(6, "silu");
  call.require(std::isfinite(epsilon) && epsilon >= 0, "eps", "is negative or not finite");
  if (!call.ok() || !call.require(read.x->dim() == 4, "x", "is not [B, H, W, C]")) return read;
  const int64_t channels = read.x->size(3);
  const auto require_channels = [&](const Tensor& tensor, const char* argument) {
    call.require(tensor.dim() == 1 && tensor.size(0) == channels, argument,
                 "does not have one number a channel");
  };
  require_channels(*read.weight, "weight");
  require_channels(*read.bias, "bias");
  require_channels(*read.factor, "factor");
  call.require(channels % groups == 0, "groups", "does not divide the channels");
  read.shape = GroupNormShape{size_of(*read.x, 0),
                              size_of(*read.x, 1) * size_of(*read.x, 2),
                              static_cast<size_t>(channels),
                              static_cast<size_t>(groups),
                              static_cast<float>(epsilon),
                              silu};
  return read;
}

// group_norm_mixed.out(Tensor x, Tensor weight, Tensor bias, Tensor factor, int groups, float eps,
// bool silu, *, out!)
void group_norm_mixed(Call& call) {
  const GroupNormArguments in = read_group_norm(call);
  Tensor* out = call.output(7, "out", ScalarType::Float);
  if (!call.ok() || !call.resize(*out, "out", in.x->sizes())) return;
  group_norm(best_kernels(), in.x->const_data_ptr<float>(), in.parameters(), in.shape,
             thread_pool_executor(), out->mutable_data_ptr<float>());
}

// group_norm_quantize_mixed.out(..., *, codes!, scale!, zero_point!)
void group_norm_quantize_mixed(Call& call) {
  const GroupNormArguments in = read_group_norm(call);
  if (!call.ok()) return;
  const CodesOutputs out = write_codes(call, 7, *in.x, in.shape.batch);
  if (!call.ok()) return;
  group_norm_quantize(best_kernels(), in.x->const_data_ptr<float>(), in.parameters(), in.shape,
                      thread_pool_executor(), out.codes->mutable_data_ptr<int8_t>(),
                      out.scale->mutable_data_ptr<float>(),
                      out.zero_point->mutable_data_ptr<int32_t>());
}

// group_norm_quantize_static_mixed.out(..., Tensor scale, Tensor zero_point, *, out!)
void group_norm_quantize_static_mixed(Call& call) {
  const GroupNormArguments in = read_group_norm(call);
  const FixedRange range = read_range(call, 7);
  Tensor* out = call.output(9, "out", ScalarType::Char);
  if (!call.ok() || !call.resize(*out, "out", in.x->sizes())) return;
  group_norm_quantize_static(best_kernels(), in.x->const_data_ptr<float>(), in.parameters(),
                             in.shape, range, thread_pool_executor(),
                             out->mutable_data_ptr<int8_t>());
}

void convolve_into(Call& call, const Blob& blob, const Codes& codes, const ConvolutionShape& shape,
                   Tensor& out) {
  const Scratch scratch(call, convolution_scratch(blob, shape));
  if (!call.ok()) return;
  convolve(best_kernels(), blob, codes, shape, scratch.data(), thread_pool_executor(),
           out.mutable_data_ptr<float>());
}

// Ranges of whole samples suit every convolution; of single pixels those alone that read one pixel
// for each that they write.
bool suit(const Codes& codes, const ConvolutionShape& shape, const Blob& blob) {
  const bool is_pixelwise = blob.kernel() == 1 && shape.stride == 1 && shape.upsampling == 1;
  const size_t pixels = shape.batch * shape.height * shape.width;
  return shape.batch % codes.parts == 0 || (is_pixelwise && pixels % codes.parts == 0);
}

// conv2d_mixed.out(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, int out_channels,
//                  int kernel, int stride, int padding, int upsampling, *, out!)
void conv2d_mixed(Call& call) {
  const CodesArguments in = read_codes(call);
  const int64_t out_channels = call.integer(4, "out_channels", 1, kMaxRows);
  const int64_t kernel = call.integer(5, "kernel", 1, 3);
  const int64_t stride = call.integer(6, "stride", 1, 2);
  const int64_t padding = call.integer(7, "padding", 0, kernel / 2);
  const int64_t upsampling = call.integer(8, "upsampling", 1, 2);
  const Blob blob = read_weight(call, 3, out_channels, kernel);
  Tensor* out = call.output(9, "out", ScalarType::Float);
  if (!call.ok() || !call.require(in.codes->dim() == 4, "codes", "is not [B, H, W, C]")) return;
  const ConvolutionShape shape{size_of(*in.codes, 0), size_of(*in.codes, 1), size_of(*in.codes, 2),
                               static_cast<size_t>(stride), static_cast<size_t>(padding),
                               static_cast<size_t>(upsampling)};
  const size_t least = blob.kernel() - 2 * shape.padding;
  call.require(size_of(*in.codes, 3) == blob.channels(), "codes",
               "has another number of channels than weight");
  call.require(shape.height * shape.upsampling >= least && shape.width * shape.upsampling >= least,
               "codes", "is smaller than the kernel");
  call.require(suit(in.view(), shape, blob), "scale",
               "does not cut the codes into samples, nor into pixels of a 1 x 1 kernel of stride 1");
  if (!call.ok()) return;
  const std::array<SizesType, 4> sizes{static_cast<SizesType>(shape.batch),
                                       static_cast<SizesType>(shape.out_height(blob)),
                                       static_cast<SizesType>(shape.out_width(blob)),
                                       static_cast<SizesType>(out_channels)};
  if (!call.resize(*out, "out", {sizes.data(), sizes.size()})) return;
  convolve_into(call, blob, in.view(), shape, *out);
}

// linear_mixed.out(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, int out_features, *,
//                  out!)
void linear_mixed(Call& call) {
  const CodesArguments in = read_codes(call);
  const int64_t out_features = call.integer(4, "out_features", 1, kMaxRows);
  const Blob blob = read_weight(call, 3, out_features, 1);
  Tensor* out = call.output(5, "out", ScalarType::Float);
  if (!call.ok()) return;
  const auto dimensions = static_cast<size_t>(in.codes->dim());
  call.require(dimensions >= 1 && dimensions <= kMaxDimensions, "codes", "is not [..., depth]");
  call.require(call.ok() && in.codes->sizes().back() == static_cast<SizesType>(blob.depth()),
               "codes", "has another last size than weight has inputs");
  if (!call.ok()) return;
  const size_t rows = count_of(*in.codes) / blob.depth();
  if (!call.require(rows % count_of(*in.scale) == 0, "scale", "does not cut the codes into rows")) {
    return;
  }
  std::array<SizesType, kMaxDimensions> sizes{};
  std::copy_n(in.codes->sizes().begin(), dimensions, sizes.begin());
  sizes[dimensions - 1] = static_cast<SizesType>(out_features);
  if (!call.resize(*out, "out", {sizes.data(), dimensions})) return;
  convolve_into(call, blob, in.view(), ConvolutionShape{1, 1, rows, 1, 0, 1}, *out);
}

// One operator as ExecuTorch calls it. `arguments` are those of its schema, outputs last; what
// ExecuTorch adds behind them is not needed.
template <const char* const& name, void (*function)(Call& call), size_t arguments, size_t outputs>
void run(KernelRuntimeContext& context, Span<EValue*> stack) {
  const executorch::runtime::internal::EventTracerProfileOpScope scope(
      context.internal_event_tracer(), name);
  Call call(context, name, stack);
  try {
    function(call);
  } catch (const std::bad_alloc&) {
    call.require_memory(false);
  }
  for (size_t i = arguments - outputs; call.ok() && i < arguments; ++i) {
    executorch::runtime::internal::event_tracer_log_evalue(context.internal_event_tracer(),
                                                           *stack[i]);
  }
}

constexpr const char* kQuantize = "mpqdm::quantize_mixed.out";
constexpr const char* kGroupNorm = "mpqdm::group_norm_mixed.out";
constexpr const char* kGroupNormQuantize = "mpqdm::group_norm_quantize_mixed.out";
constexpr const char* kQuantizeStatic = "mpqdm::quantize_static_mixed.out";
constexpr const char* kDequantize = "mpqdm::dequantize_mixed.out";
constexpr const char* kGroupNormQuantizeStatic = "mpqdm::group_norm_quantize_static_mixed.out";
constexpr const char* kConvolution = "mpqdm::conv2d_mixed.out";
constexpr const char* kLinear = "mpqdm::linear_mixed.out";

using executorch::runtime::Kernel;

constexpr std::array<Kernel, 8> kOperators{
    Kernel(kQuantize, run<kQuantize, quantize_mixed, 5, 3>),
    Kernel(kGroupNorm, run<kGroupNorm, group_norm_mixed, 8, 1>),
    Kernel(kGroupNormQuantize, run<kGroupNormQuantize, group_norm_quantize_mixed, 10, 3>),
    Kernel(kQuantizeStatic, run<kQuantizeStatic, quantize_static_mixed, 4, 1>),
    Kernel(kDequantize, run<kDequantize, dequantize_mixed, 4, 1>),
    Kernel(kGroupNormQuantizeStatic,
           run<kGroupNormQuantizeStatic, group_norm_quantize_static_mixed, 10, 1>),
    Kernel(kConvolution, run<kConvolution, conv2d_mixed, 10, 1>),
    Kernel(kLinear, run<kLinear, linear_mixed, 6, 1>),
};

[[maybe_unused]] const size_t kRegisteredAtLoad = mpqdm_register_operators();

}  // namespace
}  // namespace mpqdm

// A second copy of the library in a process must not register again: ExecuTorch stops the process
// for an operator that it has already.
size_t mpqdm_register_operators(void) {
  size_t registered = 0;
  for (const mpqdm::Kernel& kernel : mpqdm::kOperators) {
    const auto known = executorch::runtime::get_registered_kernels();
    const bool is_known = std::any_of(known.begin(), known.end(), [&](const mpqdm::Kernel& other) {
      return std::strcmp(other.name_, kernel.name_) == 0;
    });
    if (is_known) continue;
    if (executorch::runtime::register_kernel(kernel) == executorch::runtime::Error::Ok) ++registered;
  }
  return registered;
}

const char* mpqdm_operator_name(size_t index) {
  return index < mpqdm::kOperators.size() ? mpqdm::kOperators[index].name_ : nullptr;
}

const char* mpqdm_kernel_set_name(size_t index) {
  const mpqdm::KernelSet* const* sets = nullptr;
  return index < mpqdm::kernel_sets(&sets) ? sets[index]->name : nullptr;
}

const char* mpqdm_version(void) { return MPQDM_VERSION; }
