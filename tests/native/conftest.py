"""The C++ kernels, built once and used by all tests of this folder."""

import ctypes
import importlib.util
from pathlib import Path

import pytest
from native_builds import build, require_compiler
from native_kernels import NativeKernels


@pytest.fixture(scope="session")
def native():
    require_compiler()
    folder = build("linux", "mpqdm_test_api", "mpqdm_exact")
    return NativeKernels(next((folder / "tests").glob("libmpqdm_test_api.*")))


@pytest.fixture(scope="session")
def runtime():
    """ExecuTorch's Python runtime with the operators that are built from this checkout."""
    require_compiler()
    library = next((build("linux", "mpqdm_kernels") / "src").glob("libmpqdm_kernels.*"))
    package = Path(importlib.util.find_spec("executorch").submodule_search_locations[0])
    for name in ("executorch", "executorch_threadpool"):
        ctypes.CDLL(str(package / "lib" / f"lib{name}{library.suffix}"))
    ctypes.CDLL(str(library))
    from executorch.runtime import Runtime

    return Runtime.get()
