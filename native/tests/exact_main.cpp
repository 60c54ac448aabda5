// Random cases against plain loops, on every kernel set that this CPU has. No Python, no ExecuTorch:
// it runs on a phone, under an emulator and under sanitizers.
//
//   mpqdm_exact sets                    names of the kernel sets
//   mpqdm_exact exact SEED COUNT        COUNT cases of each kind on each kernel set
//   mpqdm_exact mutations SEED COUNT    COUNT changed blobs, damaged streams of codes, damaged coded programs
//
// The last line says how many cases went wrong; the exit status is 1 if any did.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cases.h"

namespace {

using mpqdm::KernelSet;

size_t check_exact(uint64_t seed, size_t count) {
  const KernelSet* const* sets = nullptr;
  const size_t set_count = mpqdm::kernel_sets(&sets);
  size_t wrong = 0;
  for (size_t i = 0; i < set_count; ++i) {
    const size_t of_set = mpqdm::test::check_convolutions(*sets[i], seed, count) +
                          mpqdm::test::check_few_pixels(*sets[i], seed, count) +
                          mpqdm::test::check_unpacking(*sets[i], seed, count) +
                          mpqdm::test::check_elementwise(*sets[i], seed, count) +
                          mpqdm::test::check_codes(*sets[i], seed, count) +
                          mpqdm::test::check_coded_programs(*sets[i], seed, count);
    std::printf("%s: %zu cases, %zu wrong\n", sets[i]->name, 6 * count, of_set);
    wrong += of_set;
  }
  return wrong;
}

size_t check_changed(uint64_t seed, size_t count) {
  return mpqdm::test::check_mutations(seed, count) + mpqdm::test::check_damaged_codes(seed, count) +
         mpqdm::test::check_damaged_programs(seed, count);
}

void print_sets() {
  const KernelSet* const* sets = nullptr;
  const size_t count = mpqdm::kernel_sets(&sets);
  for (size_t i = 0; i < count; ++i) std::puts(sets[i]->name);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "sets") == 0) {
    print_sets();
    return 0;
  }
  if (argc != 4) {
    std::fputs("usage: mpqdm_exact sets | exact SEED COUNT | mutations SEED COUNT\n", stderr);
    return 2;
  }
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  const size_t count = std::strtoull(argv[3], nullptr, 10);
  const bool exact = std::strcmp(argv[1], "exact") == 0;
  const size_t wrong = exact ? check_exact(seed, count) : check_changed(seed, count);
  std::printf("wrong: %zu\n", wrong);
  return wrong == 0 ? 0 : 1;
}
