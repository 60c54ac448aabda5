// Draw one image with a `.pte` of mpqdm-fx from C++: DDIM, a class label, no Python.
//
//   denoise PROGRAM.pte SCHEDULE.txt NOISE.f32 LABEL OUTPUT.f32
//
// PROGRAM takes sample float32 [1, C, H, W], timestep float32 [1] and class_labels int64 [1], and
// returns the predicted noise. SCHEDULE has a first line with the bound that predicted images are
// clipped to (0: none), then one line per step: timestep, cumulative alpha now, cumulative alpha
// after the step. NOISE and OUTPUT are bare float32 numbers. `run.py` beside this file builds it,
// writes the schedule, runs it and compares with diffusers.
//
// The file is mapped, not read: pages of weights that the system needs elsewhere can be dropped and
// come back from disk. On Android and iOS, ExecuTorch's `Module` does what `load` does here.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/core/memory_allocator.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

namespace er = executorch::runtime;
namespace ea = executorch::aten;

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "error: %s\n", what.c_str());
  std::exit(2);
}

template <typename T>
T checked(er::Result<T>&& result, const char* what) {
  if (!result.ok()) {
    fail(std::string(what) + " failed with ExecuTorch's error " +
         std::to_string(static_cast<int>(result.error())));
  }
  return std::move(result.get());
}

// A read-only mapping of a file.
class MappedFile final : public er::DataLoader {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY);
    struct stat info {};
    if (file < 0 || ::fstat(file, &info) != 0) {
      fail(path + " cannot be opened");
    }
    size_ = static_cast<size_t>(info.st_size);
    data_ = static_cast<uint8_t*>(::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0));
    ::close(file);
    if (data_ == MAP_FAILED) {
      fail(path + " cannot be mapped");
    }
  }
  ~MappedFile() override {
    ::munmap(data_, size_);
  }
  er::Result<er::FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&)
      const override {
    if (offset + size > size_) {
      return er::Error::InvalidArgument;
    }
    return er::FreeableBuffer(data_ + offset, size, nullptr);
  }
  er::Error load_into(size_t offset, size_t size, const SegmentInfo&, void* buffer)
      const override {
    if (offset + size > size_) {
      return er::Error::InvalidArgument;
    }
    std::memcpy(buffer, data_ + offset, size);
    return er::Error::Ok;
  }
  er::Result<size_t> size() const override {
    return size_;
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Takes memory from the system as it is asked for, and gives it back at the end or at `reset`.
class GrowingAllocator final : public er::MemoryAllocator {
 public:
  GrowingAllocator() : er::MemoryAllocator(0, nullptr) {}
  ~GrowingAllocator() override {
    reset();
  }
  void* allocate(size_t size, size_t alignment = kDefaultAlignment) override {
    void* block = nullptr;
    if (::posix_memalign(&block, alignment < sizeof(void*) ? sizeof(void*) : alignment, size)) {
      return nullptr;
    }
    blocks_.push_back(block);
    return block;
  }
  void reset() override {
    for (void* block : blocks_) {
      std::free(block);
    }
    blocks_.clear();
  }

 private:
  std::vector<void*> blocks_;
};

std::vector<float> floats(const std::string& path, size_t count) {
  std::vector<float> values(count);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(values.data()), count * sizeof(float))) {
    fail(path + " holds fewer than " + std::to_string(count) + " numbers");
  }
  return values;
}

// A tensor over somebody else's memory, with the shape that the program declares.
struct Input {
  Input(const er::TensorInfo& info, void* data)
      : sizes(info.sizes().begin(), info.sizes().end()),
        order(info.dim_order().begin(), info.dim_order().end()),
        strides(sizes.size()),
        impl(nullptr) {
    int32_t step = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = step;
      step *= sizes[i];
    }
    impl = std::make_unique<ea::TensorImpl>(
        info.scalar_type(), sizes.size(), sizes.data(), data, order.data(), strides.data());
  }
  std::vector<ea::SizesType> sizes;
  std::vector<ea::DimOrderType> order;
  std::vector<ea::StridesType> strides;
  std::unique_ptr<ea::TensorImpl> impl;
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 6) {
    fail("denoise PROGRAM.pte SCHEDULE.txt NOISE.f32 LABEL OUTPUT.f32");
  }
  er::runtime_init();
  MappedFile file(arguments[1]);
  er::Program program = checked(
      er::Program::load(&file, er::Program::Verification::InternalConsistency), "loading");
  er::MethodMeta meta = checked(program.method_meta("forward"), "reading the method");

  std::vector<std::unique_ptr<uint8_t[]>> planned;
  std::vector<er::Span<uint8_t>> spans;
  for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
    const auto size = static_cast<size_t>(checked(meta.memory_planned_buffer_size(i), "planning"));
    planned.push_back(std::make_unique<uint8_t[]>(size));
    spans.emplace_back(planned.back().get(), size);
  }
  er::HierarchicalAllocator arena({spans.data(), spans.size()});
  GrowingAllocator kept, temporary;
  er::MemoryManager memory(&kept, &arena, &temporary);
  er::Method method = checked(program.load_method("forward", &memory), "preparing the method");

  const er::TensorInfo shape = checked(meta.input_tensor_meta(0), "reading the first input");
  std::vector<float> sample = floats(arguments[3], shape.nbytes() / sizeof(float));
  float timestep = 0;
  int64_t label = std::atoll(arguments[4]);
  Input first(shape, sample.data());
  Input second(checked(meta.input_tensor_meta(1), "reading the second input"), &timestep);
  Input third(checked(meta.input_tensor_meta(2), "reading the third input"), &label);
  Input* inputs[] = {&first, &second, &third};
  if (second.impl->dtype() != ea::ScalarType::Float || third.impl->dtype() != ea::ScalarType::Long) {
    fail("the program takes other inputs than sample, timestep float32 and class_labels int64");
  }

  std::ifstream schedule(arguments[2]);
  float bound = 0;
  if (!(schedule >> bound)) {
    fail(std::string(arguments[2]) + " is no schedule");
  }
  double now = 0, next = 0;
  while (schedule >> timestep >> now >> next) {
    for (size_t i = 0; i < 3; ++i) {
      if (method.set_input(er::EValue(ea::Tensor(inputs[i]->impl.get())), i) != er::Error::Ok) {
        fail("the program refuses input " + std::to_string(i));
      }
    }
    if (method.execute() != er::Error::Ok) {
      fail("the program failed at timestep " + std::to_string(timestep));
    }
    temporary.reset();
    const float* noise = method.get_output(0).toTensor().const_data_ptr<float>();
    for (size_t i = 0; i < sample.size(); ++i) {
      // DDIM (arXiv 2010.02502), equation 12 with sigma = 0
      double image = (sample[i] - std::sqrt(1 - now) * noise[i]) / std::sqrt(now);
      if (bound > 0) {
        image = std::fmax(-bound, std::fmin(bound, image));
      }
      sample[i] = static_cast<float>(std::sqrt(next) * image + std::sqrt(1 - next) * noise[i]);
    }
  }
  std::ofstream output(arguments[5], std::ios::binary);
  output.write(reinterpret_cast<const char*>(sample.data()), sample.size() * sizeof(float));
  return output ? 0 : 2;
}
