"""The C++ kernels, built once and used by all tests of this folder."""

import pytest
from native_builds import build, require_compiler
from native_kernels import NativeKernels


@pytest.fixture(scope="session")
def native():
    require_compiler()
    folder = build("linux", "mpqdm_test_api", "mpqdm_exact")
    return NativeKernels(next((folder / "tests").glob("libmpqdm_test_api.*")))
