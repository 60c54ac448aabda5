// Entropy-coded weights (FORMAT.md, "Codes"): the bytes of a layer to int8 and back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mpqdm/kernels.h"

namespace mpqdm {

// A layer is [rows][channels][places] codes.
struct CodesShape {
  size_t rows;
  size_t channels;
  size_t places;  // of a kernel, 9 for 3x3; 1 for linear layers
};

enum class CodesError {
  none = 0,
  bad_sizes,    // none, or more codes than such a stream can tell
  cut_classes,  // ends within the classes
  bad_class,    // a class that there is not
  cut_words,    // half a word, or ends within the states
  early_end,    // ends before the last code
  bad_end,      // bytes left over, or states that are not those of the start
  bad_code,     // -128
  no_memory,    // of the functions in operators.h; those here throw std::bad_alloc
};

// One sentence without a full stop.
const char* describe(CodesError error);

// Decodes the `size` bytes of a layer into rows * channels * places codes. What they hold is
// undefined where it fails.
CodesError decode_codes(const KernelSet& kernels, const uint8_t* stream, size_t size,
                        const CodesShape& shape, int8_t* codes);

// Bytes that `encode_codes` writes at most.
size_t encoded_limit(size_t count);

// Encodes codes -127..127 of known classes, and returns the number of bytes; 0 if a code or a class
// is none. What tells the classes is not among them.
size_t encode_codes(const int8_t* codes, const uint8_t* classes, size_t count, uint8_t* stream);

}  // namespace mpqdm
