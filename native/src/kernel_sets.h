// The kernel sets of the instruction sets that this binary may have, and whether the CPU runs them.
#pragma once

#include "mpqdm/kernels.h"

namespace mpqdm {

constexpr int kPairRows = 2 * kBlockRows;  // rows of a pair of blocks, columns of `sums`
constexpr int kMaxPixels = 16;             // at least every set's `pixels`

extern const KernelSet kScalarKernels;
#if defined(MPQDM_X86)
extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvxVnniKernels;
extern const KernelSet kAvx512VnniKernels;
#elif defined(MPQDM_ARM64)
extern const KernelSet kNeonKernels;
extern const KernelSet kDotKernels;
extern const KernelSet kI8mmKernels;
#endif

}  // namespace mpqdm
