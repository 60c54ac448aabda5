"""The Python package of the kernels: what it says, what it needs, and how it is built."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from native_builds import NATIVE, build, require_compiler
from source_tree import ROOT

PROJECT = tomllib.loads((NATIVE / "pyproject.toml").read_text())
VERSION = re.search(r"mpqdm_kernels VERSION (\S+)", (NATIVE / "CMakeLists.txt").read_text())[1]


def run(source, path, *options, cwd=None):
    return subprocess.run(
        [sys.executable, *options, "-W", "ignore", "-c", source],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def put_package(folder, library):
    """The package as a wheel lays it out, with the library that is built from this checkout."""
    shutil.copytree(NATIVE / "python" / "mpqdm_kernels", folder / "mpqdm_kernels")
    shutil.copy(library, folder / "mpqdm_kernels")
    metadata = folder / f"mpqdm_kernels-{VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: mpqdm-kernels\nVersion: {VERSION}\n")
    return folder


@pytest.fixture
def package(tmp_path):
    require_compiler()
    library = next((build("linux", "mpqdm_kernels") / "src").glob("libmpqdm_kernels.*"))
    return put_package(tmp_path, library)


def test_the_package_and_the_compiler_need_the_same_executorch():
    root = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    (need,) = PROJECT["project"]["dependencies"]
    assert need in root["project"]["optional-dependencies"]["executorch"]
    assert f'"{need}"' in (NATIVE / "python" / "build_backend" / "mpqdm_build.py").read_text()


@pytest.mark.xnnpack
def test_it_registers_its_operators_without_torch_and_once(package):
    source = """
import shutil, sys, mpqdm_kernels as kernels
from pathlib import Path
kernels.load(); kernels.load()
assert "torch" not in sys.modules
print(kernels.__version__)
print(*kernels.operators())
print(*kernels.kernel_sets())
import ctypes
library = next(Path(kernels.__file__).parent.glob("libmpqdm_kernels.*"))
ctypes.CDLL(str(shutil.copy(library, library.with_stem("another"))))  # a second copy does no harm
from executorch.runtime import Runtime
names = Runtime.get().operator_registry.operator_names
print(*sorted(name for name in names if name.startswith("mpqdm::")))
"""
    done = run(source, [package])
    assert done.returncode == 0, done.stderr
    version, operators, kernel_sets, registered = done.stdout.splitlines()
    assert version == VERSION
    assert registered.split() == sorted(f"{name}.out" for name in operators.split())
    assert "mpqdm::conv2d_mixed" in operators.split()
    assert kernel_sets.split()[-1] == "scalar"


@pytest.mark.xnnpack
def test_an_editable_install_has_its_library_elsewhere(package, tmp_path):
    """As scikit-build-core lays it out: sources in the checkout, what is built in site-packages."""
    (library,) = (package / "mpqdm_kernels").glob("libmpqdm_kernels.*")
    built = tmp_path / "built"
    built.mkdir()
    library.rename(built / library.name)
    source = f"import mpqdm_kernels; mpqdm_kernels.__path__.insert(0, {str(built)!r})"
    done = run(f"{source}; print(*mpqdm_kernels.operators())", [package])
    assert done.returncode == 0, done.stderr
    assert "mpqdm::conv2d_mixed" in done.stdout.split()


@pytest.mark.xnnpack
def test_its_operators_are_those_of_the_programs(package):
    source = """
import mpqdm_kernels
from mpqdm_fx.backends.lowbit.ops import OPERATORS
assert sorted(mpqdm_kernels.operators()) == sorted(f"mpqdm::{name}" for name in OPERATORS)
"""
    done = run(source, [package, ROOT.parent])
    assert done.returncode == 0, done.stderr


def test_without_executorch_it_says_what_to_install(package):
    done = run("import mpqdm_kernels; mpqdm_kernels.load()", [package], "-S", cwd=package)
    assert 'ImportError: mpqdm_kernels needs ExecuTorch, which is not installed: pip install "' in (
        done.stderr
    )


def pip(*arguments, **environment):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.matrix
def test_a_wheel_is_built_from_the_source_distribution_alone(tmp_path):
    require_compiler()
    backend = ["scikit-build-core", "build", "pyproject-hooks"]
    assert pip("install", "--target", tmp_path / "tools", *backend).returncode == 0
    source = f"from build.__main__ import main; main(['-s', '-o', '{tmp_path}', '{NATIVE}'])"
    assert run(source, [tmp_path / "tools"]).returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    own = {str(path.relative_to(NATIVE)) for path in (NATIVE / "src").iterdir()}
    assert own < names
    done = pip("wheel", "--no-deps", "--wheel-dir", tmp_path, archive)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"mpqdm_kernels-{VERSION}-py3-none-")
    with zipfile.ZipFile(wheel) as file:
        modules = {name for name in file.namelist() if name.startswith("mpqdm_kernels/")}
    assert {"mpqdm_kernels/__init__.py", "mpqdm_kernels/py.typed"} < modules
    assert len(modules) == 3


@pytest.mark.matrix
def test_pip_says_that_there_is_no_compiler(tmp_path):
    done = pip("wheel", "--no-deps", "--wheel-dir", tmp_path, NATIVE, CXX="/missing/c++")
    assert done.returncode != 0
    assert "/missing/c++" in done.stdout + done.stderr
