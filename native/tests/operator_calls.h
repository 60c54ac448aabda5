// Calls of the operators with right arguments, for tests that then make one of them wrong.
#pragma once

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "mpqdm/layers.h"
#include "random_layer.h"

namespace mpqdm::test {

using executorch::aten::ScalarType;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

// A tensor whose sizes cannot change, as those of a program of fixed shapes.
inline TensorPtr fixed_tensor(void* data, std::vector<int32_t> sizes, ScalarType type) {
  return executorch::extension::for_blob(data, std::move(sizes), type)
      .dynamism(executorch::aten::TensorShapeDynamism::STATIC)
      .make_tensor_ptr();
}

// Arguments of one call, with the memory behind their tensors.
class Arguments {
 public:
  template <class T>
  T* add(ScalarType type, std::vector<int32_t> sizes, std::vector<T> data) {
    memory_.push_back(std::make_shared<std::vector<uint8_t>>(data.size() * sizeof(T)));
    uint8_t* bytes = memory_.back()->data();
    if (!data.empty()) std::memcpy(bytes, data.data(), data.size() * sizeof(T));
    add(keep(fixed_tensor(bytes, std::move(sizes), type)));
    return reinterpret_cast<T*>(bytes);
  }
  void add(EValue value) { values_.push_back(value); }
  // Keeps a tensor alive without making it an argument.
  EValue keep(TensorPtr tensor) {
    tensors_.push_back(tensor);
    return EValue(*tensor);
  }

  std::vector<EValue>& values() { return values_; }

  // Runs the operator; `around` is told when its kernel begins (true) and when it has ended.
  Error run_with(const char* name, const std::function<void(bool begins)>& around);
  // Runs the operator on the first `count` arguments.
  Error run(const char* name, size_t count, bool temporary_memory = true);
  Error run(const char* name) { return run(name, values_.size()); }

 private:
  Error run(const char* name, size_t count, bool temporary_memory,
            const std::function<void(bool begins)>& around);

  std::vector<EValue> values_;
  std::vector<TensorPtr> tensors_;
  std::vector<std::shared_ptr<std::vector<uint8_t>>> memory_;
};

// A call with everything right, and what a test needs to judge its results.
struct OperatorCall {
  explicit OperatorCall(const char* operator_name) : name(operator_name) {}

  const char* name;
  Arguments arguments;
  size_t inputs = 0;  // arguments before the outputs
  TestLayer layer = {};
  std::vector<uint8_t> blob;
  std::vector<int8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  std::vector<float> x, weight, bias, factor;

  // The range of a call on a known one.
  FixedRange range() const { return {scale[0], zero_point[0]}; }
};

OperatorCall quantize_call(Random& random);
OperatorCall quantize_static_call(Random& random);
OperatorCall dequantize_call(Random& random);
OperatorCall group_norm_quantize_static_call(Random& random);
OperatorCall group_norm_call(Random& random);
OperatorCall group_norm_quantize_call(Random& random);
OperatorCall convolution_call(Random& random);
OperatorCall linear_call(Random& random);

}  // namespace mpqdm::test
