// Programs whose weights are entropy-coded behind them (FORMAT.md, "Coded programs").
#pragma once

#include <cstddef>
#include <cstdint>

#include "mpqdm/kernels.h"

namespace mpqdm {

// Puts the codes that follow a program into its blobs, in place. `program_bytes` is how much of
// `content` is then the program; all of it, and nothing is done, where no codes follow it. Returns null,
// or what is wrong, one sentence without a full stop; then some blobs may have codes and others none.
const char* place_codes(const KernelSet& kernels, uint8_t* content, size_t size,
                        size_t* program_bytes);

}  // namespace mpqdm
