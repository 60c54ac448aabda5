#include "mpqdm/coded_program.h"
#include "mpqdm/codes.h"
#include "mpqdm/operators.h"

int mpqdm_decode_codes(const uint8_t* stream, size_t size, size_t rows, size_t channels,
                       size_t places, int8_t* codes) {
  return static_cast<int>(mpqdm::decode_codes(mpqdm::best_kernels(), stream, size,
                                              {rows, channels, places}, codes));
}

const char* mpqdm_codes_error(int error) {
  return mpqdm::describe(static_cast<mpqdm::CodesError>(error));
}

size_t mpqdm_encode_codes(const int8_t* codes, const uint8_t* classes, size_t count,
                          uint8_t* stream) {
  return mpqdm::encode_codes(codes, classes, count, stream);
}

size_t mpqdm_encoded_limit(size_t count) { return mpqdm::encoded_limit(count); }

const char* mpqdm_place_codes(uint8_t* content, size_t size, size_t* program_bytes) {
  return mpqdm::place_codes(mpqdm::best_kernels(), content, size, program_bytes);
}
