# What every target of this project is compiled with.

function(mpqdm_compile target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  set_target_properties(${target} PROPERTIES
    CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON)
  target_compile_options(${target} PRIVATE
    -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wnon-virtual-dtor
    # What an app compiles everything with comes in front of these: rounding, NaN and infinities are not
    # to be taken for something else, and a call without memory ends by an exception.
    -fno-finite-math-only -fno-associative-math -fno-reciprocal-math -fsigned-zeros -fexceptions
    # Clang takes this to ask for floating-point exceptions too, and has no more behind it than the above.
    $<$<CXX_COMPILER_ID:GNU>:-fno-unsafe-math-optimizations>
    # The format says which results are rounded: products and sums are not to be fused.
    -ffp-contract=off
    # No floating-point exceptions and no errno are read: loops may be vectorized as if there were none.
    -fno-trapping-math -fno-math-errno)
  if(MPQDM_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(MPQDM_SANITIZE)
    target_compile_options(${target} PRIVATE
      -fsanitize=${MPQDM_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(${target} PUBLIC -fsanitize=${MPQDM_SANITIZE})
  endif()
endfunction()

# Sets `result` to x86_64, arm64 or other: the one architecture that is built for.
function(mpqdm_architecture result)
  set(names "${CMAKE_SYSTEM_PROCESSOR}")
  if(APPLE AND CMAKE_OSX_ARCHITECTURES)
    set(names "${CMAKE_OSX_ARCHITECTURES}")
  endif()
  list(LENGTH names count)
  if(count GREATER 1)
    message(FATAL_ERROR "mpqdm_kernels builds for one architecture at a time, not for ${names}: "
                        "build each one and join the libraries with lipo")
  endif()
  if(names MATCHES "^(x86_64|AMD64|amd64)$")
    set(${result} x86_64 PARENT_SCOPE)
  elseif(names MATCHES "^(aarch64|arm64|ARM64|arm64-v8a)$")
    set(${result} arm64 PARENT_SCOPE)
  else()
    set(${result} other PARENT_SCOPE)
  endif()
endfunction()
