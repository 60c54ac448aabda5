// Exceptions end here: callers of C functions, such as Python, would be stopped by one.
#include <new>

#include "mpqdm/coded_program.h"
#include "mpqdm/codes.h"
#include "mpqdm/operators.h"

using mpqdm::CodesError;

int mpqdm_decode_codes(const uint8_t* stream, size_t size, size_t rows, size_t channels,
                       size_t places, int8_t* codes) {
  try {
    return static_cast<int>(mpqdm::decode_codes(mpqdm::best_kernels(), stream, size,
                                                {rows, channels, places}, codes));
  } catch (const std::bad_alloc&) {
    return static_cast<int>(CodesError::no_memory);
  }
}

const char* mpqdm_codes_error(int error) {
  return mpqdm::describe(static_cast<CodesError>(error));
}

size_t mpqdm_encode_codes(const int8_t* codes, const uint8_t* classes, size_t count,
                          uint8_t* stream) {
  try {
    return mpqdm::encode_codes(codes, classes, count, stream);
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

size_t mpqdm_encoded_limit(size_t count) { return mpqdm::encoded_limit(count); }

const char* mpqdm_place_codes(uint8_t* content, size_t size, size_t* program_bytes) {
  try {
    return mpqdm::place_codes(mpqdm::best_kernels(), content, size, program_bytes);
  } catch (const std::bad_alloc&) {
    return mpqdm::describe(CodesError::no_memory);
  }
}
