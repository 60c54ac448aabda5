#pragma once

#include "mpqdm/layers.h"

namespace mpqdm {

// Runs `function(index)` for all indices below `count` on the executor's threads.
template <class Function>
void parallel(const Executor& executor, size_t count, const Function& function) {
  const auto task = [](void* context, size_t index) {
    (*static_cast<const Function*>(context))(index);
  };
  executor.run(executor.self, count, task, const_cast<Function*>(&function));
}

}  // namespace mpqdm
