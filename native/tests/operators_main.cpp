// The operators as ExecuTorch's runtime calls them: right results for right arguments, and an error,
// never a stop of the process, for wrong ones.
//
//   mpqdm_operators_test SEED COUNT    COUNT calls with random wrong arguments, after the fixed ones
//
// The last line says how many checks failed; the exit status is 1 if any did.
#include <executorch/runtime/platform/runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "failing_memory.h"
#include "mpqdm/layers.h"
#include "mpqdm/operators.h"
#include "operator_calls.h"
#include "reference.h"

namespace mpqdm::test {
namespace {

size_t failed = 0;

void expect(bool right, const char* operator_name, const std::string& what) {
  if (right) return;
  ++failed;
  std::printf("%s: %s\n", operator_name, what.c_str());
}

template <class T>
const T* output(OperatorCall& call, size_t index) {
  return call.arguments.values()[call.inputs + index].toTensor().const_data_ptr<T>();
}

void expect_convolution(OperatorCall& call, const ConvolutionShape& shape, size_t height,
                        size_t width) {
  const Codes codes{call.codes.data(), call.scale.data(), call.zero_point.data(),
                    call.scale.size()};
  const std::vector<int64_t> sums =
      convolve_reference(call.layer.weights(), call.layer.rows, call.layer.channels,
                         call.layer.kernel, codes, shape, height, width);
  const size_t rows_of_part = sums.size() / call.layer.rows / call.scale.size();
  bool right = true;
  for (size_t i = 0; i < sums.size(); ++i) {
    const size_t channel = i % call.layer.rows;
    const float scale =
        call.scale[i / call.layer.rows / rows_of_part] * call.layer.scale[channel];
    const float product = static_cast<float>(sums[i]) * scale;
    const float sum = product + (call.layer.bias.empty() ? 0.0f : call.layer.bias[channel]);
    right = right && output<float>(call, 0)[i] == sum;
  }
  expect(right, call.name, "other results than plain loops");
}

void expect_codes(OperatorCall& call, const float* x, size_t parts) {
  const size_t size = call.x.size() / parts;
  bool right = true;
  for (size_t part = 0; part < parts; ++part) {
    std::vector<int8_t> codes(size);
    float scale = 0;
    int32_t zero_point = 0;
    quantize_reference(x + part * size, size, codes.data(), &scale, &zero_point);
    right = right && std::equal(codes.begin(), codes.end(), output<int8_t>(call, 0) + part * size);
    right = right && output<float>(call, 1)[part] == scale;
    right = right && output<int32_t>(call, 2)[part] == zero_point;
  }
  expect(right, call.name, "other codes or ranges than plain loops");
}

void expect_static_codes(OperatorCall& call, const float* x) {
  std::vector<int8_t> codes(call.x.size());
  quantize_static_reference(x, codes.size(), call.range(), codes.data());
  expect(std::equal(codes.begin(), codes.end(), output<int8_t>(call, 0)), call.name,
         "other codes than plain loops");
}

// Operators on a range that the program knows.
void check_static_results(Random& random) {
  OperatorCall quantization = quantize_static_call(random);
  expect(quantization.arguments.run(quantization.name) == Error::Ok, quantization.name, "an error");
  expect_static_codes(quantization, quantization.x.data());
  OperatorCall back = dequantize_call(random);
  expect(back.arguments.run(back.name) == Error::Ok, back.name, "an error for a right call");
  for (size_t i = 0; i < back.codes.size(); ++i) {
    const float number = static_cast<float>(back.codes[i] - back.zero_point[0]) * back.scale[0];
    expect(output<float>(back, 0)[i] == number, back.name, "other numbers than plain loops");
  }
  OperatorCall norm = group_norm_call(random);
  expect(norm.arguments.run(norm.name) == Error::Ok, norm.name, "an error for a right call");
  OperatorCall fused = group_norm_quantize_static_call(random);
  for (size_t i = 0; i < 4; ++i) fused.arguments.values()[i] = norm.arguments.values()[i];
  expect(fused.arguments.run(fused.name) == Error::Ok, fused.name, "an error for a right call");
  expect_static_codes(fused, output<float>(norm, 0));
}

void check_results(Random& random, bool temporary_memory) {
  const auto run = [&](OperatorCall& call) {
    const Error error =
        call.arguments.run(call.name, call.arguments.values().size(), temporary_memory);
    expect(error == Error::Ok, call.name, "an error for a right call");
  };
  OperatorCall convolution = convolution_call(random);
  run(convolution);
  expect_convolution(convolution, {2, 6, 5, 2, 1, 1}, 3, 3);
  OperatorCall linear = linear_call(random);
  run(linear);
  expect_convolution(linear, {1, 1, 6, 1, 0, 1}, 1, 6);
  OperatorCall quantization = quantize_call(random);
  run(quantization);
  expect_codes(quantization, quantization.x.data(), 3);
  OperatorCall norm = group_norm_call(random);
  run(norm);
  const std::vector<double> values =
      group_norm_reference(norm.x, norm.weight, norm.bias, norm.factor,
                           {2, 20, 12, 3, 1e-5f, true})
          .values;
  for (size_t i = 0; i < values.size(); ++i) {
    expect(std::fabs(double{output<float>(norm, 0)[i]} - values[i]) < 1e-5, norm.name,
           "another result than in double");
  }
  OperatorCall fused = group_norm_quantize_call(random);
  for (size_t i = 0; i < 4; ++i) fused.arguments.values()[i] = norm.arguments.values()[i];
  run(fused);
  expect_codes(fused, output<float>(norm, 0), 2);
}

// A NaN among the ranges comes out, and only where it belongs.
void check_nan(Random& random) {
  OperatorCall call = linear_call(random);
  call.arguments.values()[1].toTensor().mutable_data_ptr<float>()[4] =
      std::numeric_limits<float>::quiet_NaN();
  expect(call.arguments.run(call.name) == Error::Ok, call.name, "an error for a NaN");
  for (size_t i = 0; i < 6 * 9; ++i) {
    expect(std::isnan(output<float>(call, 0)[i]) == (i / 9 == 4), call.name, "NaN elsewhere");
  }
}

// Outputs of a program that was exported with room for larger ones get their sizes here.
void check_resizing(Random& random) {
  OperatorCall call = linear_call(random);
  std::vector<float> room(1000);
  call.arguments.values()[call.inputs] = call.arguments.keep(executorch::extension::from_blob(
      room.data(), {10, 10, 9}, ScalarType::Float));
  expect(call.arguments.run(call.name) == Error::Ok, call.name, "an output was not resized");
  const auto sizes = call.arguments.values()[call.inputs].toTensor().sizes();
  expect(sizes[0] == 2 && sizes[1] == 3 && sizes[2] == 9, call.name, "other sizes");
  expect_convolution(call, {1, 1, 6, 1, 0, 1}, 1, 6);
}

using MakeCall = OperatorCall (*)(Random&);
constexpr MakeCall kCalls[] = {
    quantize_call,   group_norm_call,         group_norm_quantize_call,
    quantize_static_call, dequantize_call, group_norm_quantize_static_call,
    convolution_call, linear_call};

// Values that no argument of that kind may have.
std::vector<EValue> wrong_tensors(Arguments& keeper, const EValue& right) {
  static float room[1 << 16];
  const executorch::aten::Tensor& tensor = right.toTensor();
  const std::vector<int32_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  const auto like = [&](std::vector<int32_t> other, ScalarType type) {
    return keeper.keep(fixed_tensor(room, std::move(other), type));
  };
  std::vector<int32_t> longer = sizes, empty = sizes, deeper = sizes;
  longer.back() += 1;
  empty.back() = 0;
  deeper.insert(deeper.begin(), 7);
  std::vector<EValue> wrong = {
      EValue(), EValue(int64_t{1}), EValue(0.5), EValue(true),
      like(sizes, tensor.scalar_type() == ScalarType::Long ? ScalarType::Byte : ScalarType::Long),
      like(sizes, ScalarType::Bool),
      like(longer, tensor.scalar_type()),
      like(empty, tensor.scalar_type()),
      like(deeper, tensor.scalar_type()),
      keeper.keep(fixed_tensor(nullptr, sizes, tensor.scalar_type()))};
  if (sizes.size() == 4) {  // NCHW in channels-last memory
    wrong.push_back(keeper.keep(executorch::extension::make_tensor_ptr(
        sizes, room, {0, 2, 3, 1}, {}, tensor.scalar_type())));
  }
  return wrong;
}

std::vector<EValue> wrong_scalars(const EValue& right) {
  std::vector<EValue> wrong = {EValue()};
  if (!right.isDouble()) wrong.emplace_back(0.5);
  if (!right.isBool()) wrong.emplace_back(false);
  if (!right.isInt()) return wrong;
  for (const int64_t value : {int64_t{0}, int64_t{-1}, int64_t{1000}, INT64_MIN, INT64_MAX}) {
    wrong.emplace_back(value);
  }
  return wrong;
}

void check_wrong_arguments(MakeCall make, Random& random) {
  OperatorCall call = make(random);
  Arguments& arguments = call.arguments;
  const size_t count = arguments.values().size();
  for (size_t short_of = 0; short_of < count; ++short_of) {
    expect(arguments.run(call.name, short_of) == Error::InvalidArgument, call.name,
           "missing arguments were accepted");
  }
  for (size_t at = 0; at < count; ++at) {
    const EValue right = arguments.values()[at];
    // padding 0 is right, so it is not among the wrong ones
    const bool may_be_zero = at == 7 && make == convolution_call;
    for (const EValue& wrong :
         right.isTensor() ? wrong_tensors(arguments, right) : wrong_scalars(right)) {
      if (may_be_zero && wrong.isInt() && wrong.toInt() == 0) continue;
      arguments.values()[at] = wrong;
      expect(arguments.run(call.name) == Error::InvalidArgument, call.name,
             "argument " + std::to_string(at) + " was wrong and accepted");
    }
    arguments.values()[at] = right;
  }
  expect(arguments.run(call.name) == Error::Ok, call.name, "an error after all was put right");
}

// Numbers that are wrong only beside the others.
void check_wrong_numbers(Random& random) {
  const auto refused = [&](MakeCall make, size_t at, EValue value, const char* what) {
    OperatorCall call = make(random);
    call.arguments.values()[at] = value;
    expect(call.arguments.run(call.name) == Error::InvalidArgument, call.name, what);
  };
  refused(quantize_call, 1, EValue(int64_t{5}), "parts that do not divide");
  refused(group_norm_call, 4, EValue(int64_t{5}), "groups that do not divide");
  refused(group_norm_call, 5, EValue(std::nan("")), "eps NaN");
  refused(group_norm_call, 5, EValue(-1.0), "eps below 0");
  refused(convolution_call, 4, EValue(int64_t{12}), "more rows than the blob's");
  refused(convolution_call, 5, EValue(int64_t{1}), "another kernel than the blob's");
  refused(convolution_call, 7, EValue(int64_t{2}), "padding 2");
  refused(linear_call, 4, EValue(int64_t{8}), "fewer rows than the blob's");
  OperatorCall call = convolution_call(random);
  call.arguments.values()[2].toTensor().mutable_data_ptr<int32_t>()[1] = 128;
  expect(call.arguments.run(call.name) == Error::InvalidArgument, call.name, "zero point 128");
  for (const float scale : {0.0f, -1.0f, 1e-42f, std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN()}) {
    OperatorCall fixed = quantize_static_call(random);
    fixed.arguments.values()[1].toTensor().mutable_data_ptr<float>()[0] = scale;
    expect(fixed.arguments.run(fixed.name) == Error::InvalidArgument, fixed.name, "a wrong scale");
  }
  OperatorCall fixed = dequantize_call(random);
  fixed.arguments.values()[2].toTensor().mutable_data_ptr<int32_t>()[0] = -129;
  expect(fixed.arguments.run(fixed.name) == Error::InvalidArgument, fixed.name, "zero point -129");
}

// Blobs that were changed: before they were ever read, and in their structure after that.
void check_changed_blobs(Random& random) {
  for (size_t i = 0; i < 200; ++i) {
    OperatorCall call = convolution_call(random);
    auto* bytes = call.arguments.values()[3].toTensor().mutable_data_ptr<uint8_t>();
    const auto at = static_cast<size_t>(
        random.integer(0, static_cast<int64_t>(call.blob.size()) - 1));
    bytes[at] = static_cast<uint8_t>(bytes[at] ^ random.integer(1, 255));
    expect(call.arguments.run(call.name) == Error::InvalidArgument, call.name,
           "a changed blob was accepted");
  }
  OperatorCall call = convolution_call(random);
  expect(call.arguments.run(call.name) == Error::Ok, call.name, "an error for a right call");
  call.arguments.values()[3].toTensor().mutable_data_ptr<uint8_t>()[128] ^= 1;  // in the order
  expect(call.arguments.run(call.name) == Error::InvalidArgument, call.name,
         "a structure that changed after the first call was accepted");
}

// Whatever the arguments are, the call returns.
void check_random_arguments(uint64_t seed, size_t count) {
  for (uint64_t at = seed; at < seed + count; ++at) {
    Random random(at);
    OperatorCall call = random.choice(kCalls)(random);
    OperatorCall other = random.choice(kCalls)(random);
    for (int64_t left = random.integer(1, 3); left > 0; --left) {
      std::vector<EValue>& values = call.arguments.values();
      EValue& value = values[static_cast<size_t>(
          random.integer(0, static_cast<int64_t>(values.size()) - 1))];
      std::vector<EValue>& others = other.arguments.values();
      value = random.chance(4) ? EValue(random.integer(-5, 50))
                               : others[static_cast<size_t>(random.integer(
                                     0, static_cast<int64_t>(others.size()) - 1))];
    }
    call.arguments.run(call.name);
  }
}

}  // namespace
}  // namespace mpqdm::test

int main(int argc, char** argv) {
  using namespace mpqdm::test;
  executorch::runtime::runtime_init();
  if (argc != 3) {
    std::fputs("usage: mpqdm_operators_test SEED COUNT\n", stderr);
    return 2;
  }
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
  Random random(seed);
  expect(mpqdm_register_operators() == 0, "registration", "operators were not there at load");
  failed += check_failing_memory(random);
  check_results(random, true);
  check_results(random, false);
  check_static_results(random);
  check_nan(random);
  check_resizing(random);
  for (const MakeCall make : kCalls) check_wrong_arguments(make, random);
  check_wrong_numbers(random);
  check_changed_blobs(random);
  check_random_arguments(seed, std::strtoull(argv[2], nullptr, 10));
  std::printf("failed: %zu\n", failed);
  return failed == 0 ? 0 : 1;
}
