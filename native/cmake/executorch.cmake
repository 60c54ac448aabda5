# Finds ExecuTorch and makes the target mpqdm_executorch of what the operators need of it: from the
# project that includes this one, from an install of ExecuTorch (CMAKE_PREFIX_PATH), or from the
# Python package, of the build environment or the installed one.

# Asks Python for its packages: those that it can import, as in a build environment, then those that
# are installed, which pip hides from imports while it builds.
function(mpqdm_find_python_executorch result)
  if(NOT Python_EXECUTABLE)
    find_program(Python_EXECUTABLE NAMES python3 python)
  endif()
  set(found "")
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/cmake/find_executorch.py"
      OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

if(NOT TARGET executorch AND NOT TARGET executorch::runtime AND NOT CMAKE_CROSSCOMPILING)
  mpqdm_find_python_executorch(MPQDM_PYTHON_EXECUTORCH)
endif()
if(NOT TARGET executorch)
  find_package(executorch CONFIG QUIET HINTS ${MPQDM_PYTHON_EXECUTORCH})
  if(NOT executorch_FOUND)
    message(FATAL_ERROR
      "The operators need ExecuTorch, which was not found. For this machine: "
      "pip install \"executorch>=1.5.1,<1.6\". For another one: build and install ExecuTorch 1.5 "
      "for it and add its folder to CMAKE_PREFIX_PATH. Without operators: -DMPQDM_OPERATORS=OFF.")
  endif()
endif()

add_library(mpqdm_executorch INTERFACE)
if(TARGET executorch)
  # ExecuTorch's own build: linked into the same app, or installed from source.
  target_link_libraries(mpqdm_executorch INTERFACE executorch)
  if(TARGET extension_threadpool)
    target_link_libraries(mpqdm_executorch INTERFACE extension_threadpool)
    target_compile_definitions(mpqdm_executorch INTERFACE ET_USE_THREADPOOL)
  endif()
else()
  # The Python package. Its targets put the folder that it was found in, which may be a temporary
  # one, into the run path of what links them; the files do not.
  target_include_directories(mpqdm_executorch SYSTEM INTERFACE ${EXECUTORCH_INCLUDE_DIRS})
  target_compile_definitions(mpqdm_executorch INTERFACE ${EXECUTORCH_COMPILE_DEFINITIONS})
  foreach(name executorch executorch_threadpool)
    find_library(MPQDM_LIB_${name} ${name} REQUIRED NO_DEFAULT_PATH
                 PATHS "${EXECUTORCH_RUNTIME_LIBRARY_DIR}")
    target_link_libraries(mpqdm_executorch INTERFACE "${MPQDM_LIB_${name}}")
  endforeach()
endif()
