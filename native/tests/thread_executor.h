// An executor on threads of its own, for tests of what tasks share.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "mpqdm/layers.h"

namespace mpqdm::test {

inline Executor thread_executor(size_t threads) {
  if (threads <= 1) return serial_executor();
  const auto run = [](void* self, size_t count, void (*task)(void*, size_t), void* context) {
    std::atomic<size_t> next{0};
    std::vector<std::thread> workers;
    for (size_t i = 0; i < reinterpret_cast<size_t>(self); ++i) {
      workers.emplace_back([&] {
        for (size_t index = next++; index < count; index = next++) task(context, index);
      });
    }
    for (std::thread& worker : workers) worker.join();
  };
  return {run, reinterpret_cast<void*>(threads), threads};
}

}  // namespace mpqdm::test
