// Calls whose memory runs out, on the calling thread and on those of the pool.
#pragma once

#include <cstddef>

#include "random_layer.h"

namespace mpqdm::test {

// Makes calls of operators and of the C functions, once for each allocation that they make, each time
// without memory from that one on. Returns how many did not say so.
size_t check_failing_memory(Random& random);

}  // namespace mpqdm::test
