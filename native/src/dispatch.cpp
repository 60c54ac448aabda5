#include <cstdlib>
#include <cstring>

#include "kernel_sets.h"

#if defined(MPQDM_ARM64) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(MPQDM_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(MPQDM_X86)
#include <cpuid.h>
#endif

namespace mpqdm {
namespace {

#if defined(MPQDM_X86)

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
}

// __builtin_cpu_supports("avxvnni") is unknown to older compilers.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx2() || __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (eax & (1u << 4)) != 0;
}

#elif defined(MPQDM_ARM64) && defined(__linux__)

// The bits of the kernel's interface; old headers lack the second.
bool has_dot() { return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; }
bool has_i8mm() { return has_dot() && (getauxval(AT_HWCAP2) & (1ul << 13)) != 0; }

#elif defined(MPQDM_ARM64) && defined(__APPLE__)

bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value == 1;
}
bool has_dot() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dot() && has_feature("hw.optional.arm.FEAT_I8MM"); }

#elif defined(MPQDM_ARM64)

bool has_dot() { return false; }
bool has_i8mm() { return false; }

#endif

struct Choice {
  const KernelSet* sets[4] = {};
  size_t count = 0;

  void add(const KernelSet& kernels) { sets[count++] = &kernels; }

  Choice() {
#if defined(MPQDM_X86)
    if (has_avx512_vnni()) add(kAvx512VnniKernels);
    if (has_avx_vnni()) add(kAvxVnniKernels);
    if (has_avx2()) add(kAvx2Kernels);
#elif defined(MPQDM_ARM64)
    if (has_i8mm()) add(kI8mmKernels);
    if (has_dot()) add(kDotKernels);
    add(kNeonKernels);
#endif
    add(kScalarKernels);
  }
};

const Choice& choice() {
  static const Choice chosen;
  return chosen;
}

}  // namespace

size_t kernel_sets(const KernelSet* const** sets) {
  *sets = choice().sets;
  return choice().count;
}

const KernelSet* find_kernels(const char* name) {
  for (size_t i = 0; i < choice().count; ++i) {
    if (std::strcmp(choice().sets[i]->name, name) == 0) return choice().sets[i];
  }
  return nullptr;
}

const KernelSet& best_kernels() {
  static const KernelSet* const best = [] {
    const char* wanted = std::getenv("MPQDM_KERNELS");
    const KernelSet* named = wanted == nullptr ? nullptr : find_kernels(wanted);
    return named == nullptr ? choice().sets[0] : named;
  }();
  return *best;
}

}  // namespace mpqdm
