// An executor on threads of its own, for tests of what tasks share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "mpqdm/layers.h"

namespace mpqdm::test {

// Threads that stay: emulators keep memory for each that ever began.
class ThreadPool {
 public:
  explicit ThreadPool(size_t threads) {
    for (size_t i = 0; i < threads; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~ThreadPool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    begin_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  void run(size_t count, void (*task)(void*, size_t), void* context) {
    std::unique_lock<std::mutex> lock(mutex_);
    next_ = 0;
    count_ = count;
    task_ = task;
    context_ = context;
    busy_ = threads_.size();
    ++round_;
    begin_.notify_all();
    end_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve() {
    uint64_t served = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      begin_.wait(lock, [&] { return stopped_ || round_ != served; });
      if (stopped_) return;
      served = round_;
      lock.unlock();
      for (size_t index = next_++; index < count_; index = next_++) task_(context_, index);
      lock.lock();
      if (--busy_ == 0) end_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable begin_, end_;
  std::vector<std::thread> threads_;
  std::atomic<size_t> next_{0};
  size_t count_ = 0, busy_ = 0;
  uint64_t round_ = 0;
  void (*task_)(void*, size_t) = nullptr;
  void* context_ = nullptr;
  bool stopped_ = false;
};

// `threads` is at most 8. One caller at a time.
inline Executor thread_executor(size_t threads) {
  if (threads <= 1) return serial_executor();
  static std::unique_ptr<ThreadPool> pools[9];
  std::unique_ptr<ThreadPool>& pool = pools[threads];
  if (pool == nullptr) pool = std::make_unique<ThreadPool>(threads);
  const auto run = [](void* self, size_t count, void (*task)(void*, size_t), void* context) {
    static_cast<ThreadPool*>(self)->run(count, task, context);
  };
  return {run, pool.get(), threads};
}

}  // namespace mpqdm::test
