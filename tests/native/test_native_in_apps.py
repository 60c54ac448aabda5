"""An app that has the kernels among its own sources, and one that links what they install."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from native_builds import NATIVE, require_compiler

pytestmark = [pytest.mark.xnnpack, pytest.mark.matrix]

FLAGS = "-ffast-math -ffinite-math-only -fno-exceptions -fno-rtti"  # of all that the app compiles
PROJECT = f"""
cmake_minimum_required(VERSION 3.24)
project(app LANGUAGES CXX)
add_subdirectory("{NATIVE}" kernels)
add_executable(app main.cpp)
target_link_libraries(app PRIVATE mpqdm_kernels)
"""
MAIN = """
#include <cstdio>
#include "mpqdm/operators.h"
int main() {
  mpqdm_register_operators();
  std::printf("%s %s\\n", mpqdm_version(), mpqdm_operator_name(0));
}
"""


def run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    require_compiler()
    folder = tmp_path_factory.mktemp("app")
    (folder / "CMakeLists.txt").write_text(PROJECT)
    (folder / "main.cpp").write_text(MAIN)
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_FLAGS": FLAGS,
        "MPQDM_TESTS": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    run("cmake", "-S", folder, "-B", folder / "build", *defined)
    run("cmake", "--build", folder / "build", "--parallel", "2")
    return folder


def test_it_finds_the_operators(app):
    assert run(app / "build" / "app").endswith(" mpqdm::quantize_mixed.out\n")


def test_its_flags_change_no_number(app):
    assert run(app / "build" / "kernels" / "tests" / "mpqdm_exact", "exact", "1", "200").endswith(
        "wrong: 0\n"
    )


def test_what_is_installed_is_enough_to_link(app, tmp_path):
    run("cmake", "--install", app / "build", "--component", "development", "--prefix", tmp_path)
    package = Path(importlib.util.find_spec("executorch").submodule_search_locations[0])
    runtime = package / "lib"
    run(
        *(
            "c++",
            "-std=c++20",
            app / "main.cpp",
            f"-I{tmp_path / 'include'}",
            "-o",
            tmp_path / "app",
        ),
        *(f"-L{tmp_path / 'lib'}", "-lmpqdm_kernels", "-lmpqdm_kernels_core"),
        *(f"-L{runtime}", f"-Wl,-rpath,{runtime}", "-lexecutorch", "-lexecutorch_threadpool"),
    )
    assert run(tmp_path / "app").endswith(" mpqdm::quantize_mixed.out\n")
