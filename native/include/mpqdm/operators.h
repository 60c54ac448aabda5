// What the library of operators offers beside the operators themselves, for a loader or an app.
//
// Linking the library whole (README.md) or loading it registers the operators of FORMAT.md with
// ExecuTorch. An app that links the archive without that calls mpqdm_register_operators() once.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define MPQDM_API
#else
#define MPQDM_API __attribute__((visibility("default")))
#endif

extern "C" {

// Registers those operators that ExecuTorch's registry does not have yet, and returns how many it
// registered. Call it before programs are loaded, not beside other registrations.
MPQDM_API size_t mpqdm_register_operators(void);

// Name of an operator, such as "mpqdm::conv2d_mixed.out"; null behind the last.
MPQDM_API const char* mpqdm_operator_name(size_t index);

// Name of a kernel set that this CPU runs, best first; null behind the last.
MPQDM_API const char* mpqdm_kernel_set_name(size_t index);

// Decodes the `size` bytes of an entropy-coded layer (FORMAT.md, "Codes") into the
// rows * channels * places numbers of `codes`; places is that of a kernel, 1 for linear layers.
// Returns 0, or what is wrong with the bytes, or that there is no memory, which mpqdm_codes_error
// describes.
MPQDM_API int mpqdm_decode_codes(const uint8_t* stream, size_t size, size_t rows, size_t channels,
                                 size_t places, int8_t* codes);
MPQDM_API const char* mpqdm_codes_error(int error);

// Encodes `count` codes -127..127 of known classes 0..39 into at most mpqdm_encoded_limit(count)
// bytes, without those that tell the classes. Returns their number, or 0 if a code or a class is
// none, or there is no memory.
MPQDM_API size_t mpqdm_encode_codes(const int8_t* codes, const uint8_t* classes, size_t count,
                                    uint8_t* stream);
MPQDM_API size_t mpqdm_encoded_limit(size_t count);

// Puts the codes that follow a program (FORMAT.md, "Coded programs") into its layers, in place, and
// says how many of the bytes are then the program. Without such codes it does nothing, and that is all
// of them. Returns null, or what is wrong, if only that there is no memory.
MPQDM_API const char* mpqdm_place_codes(uint8_t* content, size_t size, size_t* program_bytes);

// Version of the library, "major.minor.patch".
MPQDM_API const char* mpqdm_version(void);
}
