#include "call.h"

#include <executorch/runtime/core/exec_aten/util/dim_order_util.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>
#include <executorch/runtime/platform/log.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>

namespace mpqdm {
namespace {

constexpr size_t kScratchAlignment = 64;

// Tasks that threads take one by one. What a task throws stays here until all threads are done: the
// pool's threads would stop the process, and the caller would leave while they read its memory.
struct Queue {
  size_t count;
  void (*task)(void* context, size_t index);
  void* context;
  std::atomic<size_t> next{0};
  std::atomic<bool> has_thrown{false};
  std::exception_ptr thrown = nullptr;  // by the first task that did

  void drain() noexcept {
    for (size_t index = next.fetch_add(1, std::memory_order_relaxed); index < count && !has_thrown;
         index = next.fetch_add(1, std::memory_order_relaxed)) {
      try {
        task(context, index);
      } catch (...) {
        if (!has_thrown.exchange(true)) thrown = std::current_exception();
      }
    }
  }
};

void run_on_thread_pool(void*, size_t count, void (*task)(void* context, size_t index),
                        void* context) {
  const int64_t pool = executorch::extension::get_thread_count();
  const size_t threads = std::min(count, static_cast<size_t>(std::max<int64_t>(pool, 1)));
  Queue queue{count, task, context};
  if (threads > 1) {
    executorch::extension::parallel_for(0, static_cast<int64_t>(threads), 1,
                                        [&](int64_t, int64_t) { queue.drain(); });
  }
  queue.drain();  // with one thread, and should the pool have refused
  if (queue.thrown != nullptr) std::rethrow_exception(queue.thrown);
}

}  // namespace

bool Call::require(bool right, const char* argument, const char* wrong) {
  if (right || !ok_) return ok_;
  ok_ = false;
  ET_LOG(Error, "%s: %s %s", name_, argument, wrong);
  context_.fail(Error::InvalidArgument);
  return false;
}

void Call::require_memory(bool enough) {
  if (enough || !ok_) return;
  ok_ = false;
  ET_LOG(Error, "%s: no memory is left for the operator's working memory", name_);
  context_.fail(Error::MemoryAllocationFailed);
}

EValue* Call::value(size_t index, const char* argument) {
  EValue* value = index < arguments_.size() ? arguments_[index] : nullptr;
  require(value != nullptr, argument, "is missing: the program calls another version of the operator");
  return value;
}

bool Call::check(const Tensor& tensor, const char* argument, ScalarType type) {
  require(tensor.scalar_type() == type, argument, "has another dtype than FORMAT.md says");
  const auto order = tensor.dim_order();
  require(executorch::runtime::is_contiguous_dim_order(order.data(), order.size()), argument,
          "is not contiguous in the default order of its dimensions");
  return ok_;
}

const Tensor* Call::input(size_t index, const char* argument, ScalarType type) {
  const EValue* given = value(index, argument);
  if (given == nullptr || !require(given->isTensor(), argument, "is no tensor")) return nullptr;
  const Tensor& tensor = given->toTensor();
  if (!check(tensor, argument, type)) return nullptr;
  require(tensor.numel() > 0, argument, "has no elements");
  require(tensor.const_data_ptr() != nullptr, argument, "has no memory");
  return ok_ ? &tensor : nullptr;
}

Tensor* Call::output(size_t index, const char* argument, ScalarType type) {
  EValue* given = value(index, argument);
  if (given == nullptr || !require(given->isTensor(), argument, "is no tensor")) return nullptr;
  Tensor& tensor = given->toTensor();
  return check(tensor, argument, type) ? &tensor : nullptr;
}

int64_t Call::integer(size_t index, const char* argument, int64_t least, int64_t greatest) {
  const EValue* given = value(index, argument);
  if (given == nullptr || !require(given->isInt(), argument, "is no integer")) return 0;
  const int64_t number = given->toInt();
  require(number >= least && number <= greatest, argument, "is outside its range");
  return number;
}

double Call::number(size_t index, const char* argument) {
  const EValue* given = value(index, argument);
  if (given == nullptr || !require(given->isDouble(), argument, "is no float")) return 0;
  return given->toDouble();
}

bool Call::boolean(size_t index, const char* argument) {
  const EValue* given = value(index, argument);
  if (given == nullptr || !require(given->isBool(), argument, "is no bool")) return false;
  return given->toBool();
}

bool Call::resize(Tensor& tensor, const char* argument,
                  executorch::aten::ArrayRef<SizesType> sizes) {
  if (!ok_) return false;
  require(tensor.dim() == static_cast<ssize_t>(sizes.size()), argument,
          "has another number of dimensions than the result");
  if (ok_) {
    require(executorch::runtime::resize_tensor(tensor, sizes) == Error::Ok, argument,
            "has other sizes than the result, or no memory for it");
  }
  require(tensor.const_data_ptr() != nullptr, argument, "has no memory");
  return ok_;
}

Scratch::Scratch(Call& call, size_t bytes) {
  if (!call.ok() || bytes == 0) return;
  const auto temporary = call.context().allocate_temp(bytes, kScratchAlignment);
  if (temporary.ok()) {
    data_ = static_cast<uint8_t*>(temporary.get());
    return;
  }
  owned_ = ::operator new(bytes, std::align_val_t{kScratchAlignment}, std::nothrow);
  data_ = static_cast<uint8_t*>(owned_);
  call.require_memory(data_ != nullptr);
}

Scratch::~Scratch() {
  ::operator delete(owned_, std::align_val_t{kScratchAlignment}, std::nothrow);
}

Executor thread_pool_executor() {
  const int64_t pool = executorch::extension::get_thread_count();
  return Executor{run_on_thread_pool, nullptr, static_cast<size_t>(std::max<int64_t>(pool, 1))};
}

}  // namespace mpqdm
