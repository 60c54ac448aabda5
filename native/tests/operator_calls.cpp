#include "operator_calls.h"

namespace mpqdm::test {
namespace {

std::vector<float> numbers(Random& random, size_t count) {
  std::vector<float> result(count);
  for (float& number : result) number = random.number(-2.0f, 3.0f);
  return result;
}

void add_codes(OperatorCall& call, Random& random, std::vector<int32_t> sizes, size_t parts) {
  size_t count = 1;
  for (const int32_t size : sizes) count *= static_cast<size_t>(size);
  call.codes.resize(count);
  for (int8_t& code : call.codes) code = static_cast<int8_t>(random.integer(-128, 127));
  for (size_t part = 0; part < parts; ++part) {
    call.scale.push_back(random.number(0.01f, 0.1f));
    call.zero_point.push_back(static_cast<int32_t>(random.integer(-128, 127)));
  }
  const auto ranges = static_cast<int32_t>(parts);
  call.arguments.add(ScalarType::Char, std::move(sizes), call.codes);
  call.arguments.add(ScalarType::Float, {ranges}, call.scale);
  call.arguments.add(ScalarType::Int, {ranges}, call.zero_point);
}

void add_blob(OperatorCall& call) {
  call.blob = pack(call.layer);
  call.arguments.add(ScalarType::Byte, {static_cast<int32_t>(call.blob.size())}, call.blob);
}

void add_codes_outputs(OperatorCall& call, std::vector<int32_t> sizes, size_t parts) {
  call.inputs = call.arguments.values().size();
  const auto ranges = static_cast<int32_t>(parts);
  call.arguments.add(ScalarType::Char, std::move(sizes), std::vector<int8_t>(call.x.size()));
  call.arguments.add(ScalarType::Float, {ranges}, std::vector<float>(parts));
  call.arguments.add(ScalarType::Int, {ranges}, std::vector<int32_t>(parts));
}

void add_output(OperatorCall& call, std::vector<int32_t> sizes, size_t count) {
  call.inputs = call.arguments.values().size();
  call.arguments.add(ScalarType::Float, std::move(sizes), std::vector<float>(count));
}

void add_codes_output(OperatorCall& call, std::vector<int32_t> sizes) {
  call.inputs = call.arguments.values().size();
  call.arguments.add(ScalarType::Char, std::move(sizes), std::vector<int8_t>(call.x.size()));
}

void add_range(OperatorCall& call, Random& random) {
  call.scale = {random.number(0.005f, 0.05f)};
  call.zero_point = {static_cast<int32_t>(random.integer(-128, 127))};
  call.arguments.add(ScalarType::Float, {1}, call.scale);
  call.arguments.add(ScalarType::Int, {1}, call.zero_point);
}

void add_group_norm(OperatorCall& call, Random& random) {
  call.x = numbers(random, 2 * 5 * 4 * 12);
  call.weight = numbers(random, 12);
  call.bias = numbers(random, 12);
  call.factor = numbers(random, 12);
  call.arguments.add(ScalarType::Float, {2, 5, 4, 12}, call.x);
  call.arguments.add(ScalarType::Float, {12}, call.weight);
  call.arguments.add(ScalarType::Float, {12}, call.bias);
  call.arguments.add(ScalarType::Float, {12}, call.factor);
  call.arguments.add(EValue(int64_t{3}));
  call.arguments.add(EValue(1e-5));
  call.arguments.add(EValue(true));
}

}  // namespace

Error Arguments::run(const char* name, size_t count, bool temporary_memory) {
  return run(name, count, temporary_memory, [](bool) {});
}

Error Arguments::run_with(const char* name, const std::function<void(bool begins)>& around) {
  return run(name, values_.size(), true, around);
}

Error Arguments::run(const char* name, size_t count, bool temporary_memory,
                     const std::function<void(bool begins)>& around) {
  const auto function = executorch::runtime::get_op_function_from_registry(name);
  if (!function.ok()) return function.error();
  std::vector<EValue*> stack;
  for (size_t i = 0; i < count; ++i) stack.push_back(&values_[i]);
  executorch::extension::MallocMemoryAllocator allocator;
  executorch::runtime::KernelRuntimeContext context(nullptr,
                                                    temporary_memory ? &allocator : nullptr);
  around(true);
  (*function)(context, {stack.data(), stack.size()});
  around(false);
  return context.failure_state();
}

OperatorCall quantize_call(Random& random) {
  OperatorCall call("mpqdm::quantize_mixed.out");
  call.x = numbers(random, 3 * 4 * 7);
  call.arguments.add(ScalarType::Float, {3, 4, 7}, call.x);
  call.arguments.add(EValue(int64_t{3}));
  add_codes_outputs(call, {3, 4, 7}, 3);
  return call;
}

OperatorCall quantize_static_call(Random& random) {
  OperatorCall call("mpqdm::quantize_static_mixed.out");
  call.x = numbers(random, 3 * 4 * 7);
  call.arguments.add(ScalarType::Float, {3, 4, 7}, call.x);
  add_range(call, random);
  add_codes_output(call, {3, 4, 7});
  return call;
}

OperatorCall dequantize_call(Random& random) {
  OperatorCall call("mpqdm::dequantize_mixed.out");
  call.codes.resize(3 * 4 * 7);
  for (int8_t& code : call.codes) code = static_cast<int8_t>(random.integer(-128, 127));
  call.arguments.add(ScalarType::Char, {3, 4, 7}, call.codes);
  add_range(call, random);
  add_output(call, {3, 4, 7}, call.codes.size());
  return call;
}

OperatorCall group_norm_quantize_static_call(Random& random) {
  OperatorCall call("mpqdm::group_norm_quantize_static_mixed.out");
  add_group_norm(call, random);
  add_range(call, random);
  add_codes_output(call, {2, 5, 4, 12});
  return call;
}

OperatorCall group_norm_call(Random& random) {
  OperatorCall call("mpqdm::group_norm_mixed.out");
  add_group_norm(call, random);
  add_output(call, {2, 5, 4, 12}, call.x.size());
  return call;
}

OperatorCall group_norm_quantize_call(Random& random) {
  OperatorCall call("mpqdm::group_norm_quantize_mixed.out");
  add_group_norm(call, random);
  add_codes_outputs(call, {2, 5, 4, 12}, 2);
  return call;
}

OperatorCall convolution_call(Random& random) {
  OperatorCall call("mpqdm::conv2d_mixed.out");
  call.layer = make_layer(random, 11, 8, 3, false);
  add_codes(call, random, {2, 6, 5, 8}, 2);
  add_blob(call);
  for (const int64_t value : {11, 3, 2, 1, 1}) call.arguments.add(EValue(value));
  add_output(call, {2, 3, 3, 11}, 2 * 3 * 3 * 11);
  return call;
}

OperatorCall linear_call(Random& random) {
  OperatorCall call("mpqdm::linear_mixed.out");
  call.layer = make_layer(random, 9, 36, 1, false);
  add_codes(call, random, {2, 3, 36}, 6);
  add_blob(call);
  call.arguments.add(EValue(int64_t{9}));
  add_output(call, {2, 3, 9}, 2 * 3 * 9);
  return call;
}

}  // namespace mpqdm::test
