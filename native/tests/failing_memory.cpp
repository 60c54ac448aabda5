// Replaces the allocation of the whole program, libraries included.
#include "failing_memory.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "mpqdm/operators.h"
#include "operator_calls.h"

namespace {

// Allocations that still succeed.
std::atomic<int64_t> left{std::numeric_limits<int64_t>::max()};

void* allocate(size_t size, size_t alignment) {
  const bool fails = left.fetch_sub(1) <= 0;
  const size_t whole = (size + alignment - 1) / alignment * alignment;
  void* memory = fails ? nullptr : std::aligned_alloc(alignment, whole);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new(size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace mpqdm::test {
namespace {

// An image of so many pixels that its chunks are shared among threads.
OperatorCall large_norm_call(Random& random) {
  constexpr int32_t kSide = 80, kChannels = 32;
  OperatorCall call("mpqdm::group_norm_quantize_mixed.out");
  call.x.resize(kSide * kSide * kChannels);
  for (float& number : call.x) number = random.number(-1.0f, 1.0f);
  call.arguments.add(ScalarType::Float, {1, kSide, kSide, kChannels}, call.x);
  for (int i = 0; i < 3; ++i) {
    call.arguments.add(ScalarType::Float, {kChannels}, std::vector<float>(kChannels, 1.0f));
  }
  call.arguments.add(EValue(int64_t{4}));
  call.arguments.add(EValue(1e-5));
  call.arguments.add(EValue(true));
  call.arguments.add(ScalarType::Char, {1, kSide, kSide, kChannels},
                     std::vector<int8_t>(call.x.size()));
  call.arguments.add(ScalarType::Float, {1}, std::vector<float>(1));
  call.arguments.add(ScalarType::Int, {1}, std::vector<int32_t>(1));
  return call;
}

// A linear layer of more rows than one task takes, and of more inputs than any layer before it: threads
// keep the memory that they unpack weights into.
OperatorCall large_linear_call(Random& random) {
  constexpr int32_t kRows = 300, kDepth = 512, kChannels = 40;
  OperatorCall call("mpqdm::linear_mixed.out");
  call.layer = make_layer(random, kChannels, kDepth, 1, false);
  call.blob = pack(call.layer);
  call.arguments.add(ScalarType::Char, {kRows, kDepth}, std::vector<int8_t>(kRows * kDepth, 3));
  call.arguments.add(ScalarType::Float, {1}, std::vector<float>(1, 0.5f));
  call.arguments.add(ScalarType::Int, {1}, std::vector<int32_t>(1, 1));
  call.arguments.add(ScalarType::Byte, {static_cast<int32_t>(call.blob.size())}, call.blob);
  call.arguments.add(EValue(int64_t{kChannels}));
  call.arguments.add(ScalarType::Float, {kRows, kChannels},
                     std::vector<float>(kRows * kChannels));
  return call;
}

constexpr int64_t kEnough = std::numeric_limits<int64_t>::max();

// Whether a call fails for want of memory, and says so, until it has enough. `lacks(allocations)` makes
// the call with so many, and tells whether it failed so.
template <class Lacks>
bool ends_well(const char* name, const Lacks& lacks) {
  constexpr int64_t kMost = 10000;  // allocations of any of these calls
  int64_t allocations = 0;
  while (allocations < kMost && lacks(allocations)) ++allocations;
  if (allocations > 0 && allocations < kMost && !lacks(kEnough)) return true;
  std::printf("%s: %lld allocations were too few\n", name, static_cast<long long>(allocations));
  return false;
}

bool operator_ends_well(OperatorCall call) {
  return ends_well(call.name, [&](int64_t allocations) {
    const Error error = call.arguments.run_with(
        call.name, [&](bool begins) { left = begins ? allocations : kEnough; });
    return error == Error::MemoryAllocationFailed;
  });
}

// The C functions, on bytes that say nothing: they ask for memory before they know.
size_t check_codes_functions(Random& random) {
  const auto lacks_memory = [](const char* wrong) {
    return wrong != nullptr && std::strcmp(wrong, mpqdm_codes_error(8)) == 0;
  };
  const std::vector<int8_t> codes(100, 100);
  const std::vector<uint8_t> classes(codes.size());  // of codes near 0: all are escaped
  std::vector<uint8_t> stream(mpqdm_encoded_limit(codes.size()));
  const bool encodes = ends_well("mpqdm_encode_codes", [&](int64_t allocations) {
    left = allocations;
    const size_t size = mpqdm_encode_codes(codes.data(), classes.data(), codes.size(), stream.data());
    left = kEnough;
    return size == 0;
  });
  const std::vector<uint8_t> zeros(64);
  std::vector<int8_t> room(24);
  const bool decodes = ends_well("mpqdm_decode_codes", [&](int64_t allocations) {
    left = allocations;
    const int error = mpqdm_decode_codes(zeros.data(), zeros.size(), 2, 12, 1, room.data());
    left = kEnough;
    return lacks_memory(mpqdm_codes_error(error));
  });
  std::vector<uint8_t> content = pack(make_layer(random, 16, 12, 1, false));
  const uint64_t tail[] = {0, zeros.size(), content.size(), 1, uint64_t{1} << 48 | uint64_t{32} << 32,
                           uint64_t{0x4351504d} << 32};  // a layer, and the end
  content.insert(content.end(), zeros.begin(), zeros.end());
  const auto* octets = reinterpret_cast<const uint8_t*>(tail);
  content.insert(content.end(), octets, octets + sizeof tail);
  const bool places = ends_well("mpqdm_place_codes", [&](int64_t allocations) {
    size_t program_bytes = 0;
    left = allocations;
    const char* wrong = mpqdm_place_codes(content.data(), content.size(), &program_bytes);
    left = kEnough;
    return lacks_memory(wrong);
  });
  return (encodes ? 0u : 1u) + (decodes ? 0u : 1u) + (places ? 0u : 1u);
}

}  // namespace

size_t check_failing_memory(Random& random) {
  size_t failed = check_codes_functions(random);
  for (const auto make : {large_linear_call, large_norm_call, group_norm_call, convolution_call}) {
    failed += operator_ends_well(make(random)) ? 0 : 1;
  }
  return failed;
}

}  // namespace mpqdm::test
