// One call of an operator: its arguments, checked, and the memory and threads it may use.
//
// A program file is not trusted. A wrong argument fails the call with a line in ExecuTorch's log;
// it never stops the process, as ExecuTorch's own accessors do.
#pragma once

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/core/span.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "mpqdm/layers.h"

namespace mpqdm {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

// Arguments of one call. An accessor that finds something wrong fails the call and returns null or
// 0; ask ok() before any result is used. Only the first thing wrong is logged.
class Call {
 public:
  Call(KernelRuntimeContext& context, const char* name, Span<EValue*> arguments)
      : context_(context), name_(name), arguments_(arguments) {}

  bool ok() const { return ok_; }

  // A tensor of this type, contiguous in the default order of dimensions, with at least one element.
  const Tensor* input(size_t index, const char* argument, ScalarType type);
  // The same for a tensor that is written. Its sizes are set by resize().
  Tensor* output(size_t index, const char* argument, ScalarType type);
  int64_t integer(size_t index, const char* argument, int64_t least, int64_t greatest);
  double number(size_t index, const char* argument);
  bool boolean(size_t index, const char* argument);

  // Fails the call unless `right`; `wrong` says what is wrong, with the argument's name.
  bool require(bool right, const char* argument, const char* wrong);
  // Fails the call for want of memory.
  void require_memory(bool enough);

  // Gives an output its sizes, and fails the call if it has no memory for them.
  bool resize(Tensor& tensor, const char* argument,
              executorch::aten::ArrayRef<SizesType> sizes);

  KernelRuntimeContext& context() { return context_; }

 private:
  EValue* value(size_t index, const char* argument);
  bool check(const Tensor& tensor, const char* argument, ScalarType type);

  KernelRuntimeContext& context_;
  const char* name_;
  Span<EValue*> arguments_;
  bool ok_ = true;
};

// Memory for the time of one call: the runtime's temporary memory, else the heap. 64-byte aligned.
class Scratch {
 public:
  // Fails the call if there is no memory.
  Scratch(Call& call, size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  void* owned_ = nullptr;
};

// ExecuTorch's thread pool. Tasks go to whichever thread is free, so slow cores do not hold up fast
// ones.
Executor thread_pool_executor();

}  // namespace mpqdm
