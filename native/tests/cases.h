// Random cases of the test program, and what each of them checks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mpqdm/kernels.h"

namespace mpqdm::test {

// Each runs `count` random cases from `seed` and returns how many went wrong; it prints the first few.

// Convolutions and linear layers: integers equal those of an int64 loop, results are rounded as
// FORMAT.md says, with one thread and with several, whatever the working memory held before.
size_t check_convolutions(const KernelSet& kernels, uint64_t seed, size_t count);

// The same with one pixel up to one more than `KernelSet::few` takes, rows that end anywhere within a
// tile, and any codes behind their end.
size_t check_few_pixels(const KernelSet& kernels, uint64_t seed, size_t count);

// Unpacked weights are those of the scalar kernels, up to the order within 8 inputs.
size_t check_unpacking(const KernelSet& kernels, uint64_t seed, size_t count);

// Codes and ranges equal those of a plain loop; group norm is near that in double.
size_t check_elementwise(const KernelSet& kernels, uint64_t seed, size_t count);

// Entropy-coded layers: what is decoded is what was encoded.
size_t check_codes(const KernelSet& kernels, uint64_t seed, size_t count);

// Damaged ones: all kernel sets refuse each for the same reason, or decode the same codes.
size_t check_damaged_codes(uint64_t seed, size_t count);

// Coded programs: placing the codes gives the program's bytes back.
size_t check_coded_programs(const KernelSet& kernels, uint64_t seed, size_t count);

// Damaged ones: each is refused, or its blobs are whole.
size_t check_damaged_programs(uint64_t seed, size_t count);

// Changed blobs: each is refused, or was not changed, or (where its checksum was made anew) all kernel
// sets give the same numbers for it.
size_t check_mutations(uint64_t seed, size_t count);

// Counts a wrong case and prints the first few.
class Failures {
 public:
  Failures(const char* subject, const char* kernels) : subject_(subject), kernels_(kernels) {}
  void add(uint64_t seed, const char* what);
  size_t count() const { return count_; }

 private:
  const char* subject_;
  const char* kernels_;
  size_t count_ = 0;
};

}  // namespace mpqdm::test
