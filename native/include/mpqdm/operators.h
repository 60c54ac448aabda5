// What the library of operators offers beside the operators themselves, for a loader or an app.
//
// Linking the library whole (README.md) or loading it registers the operators of FORMAT.md with
// ExecuTorch. An app that links the archive without that calls mpqdm_register_operators() once.
#pragma once

#include <cstddef>

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

// Version of the library, "major.minor.patch".
MPQDM_API const char* mpqdm_version(void);
}
