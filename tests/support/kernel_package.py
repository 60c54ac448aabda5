"""The package `mpqdm_kernels` of this checkout, as if it were installed, and as if it were not."""

import contextlib
import os
import re
import sys

import pytest
from native_builds import NATIVE, build, require_compiler

_NAME = "mpqdm_kernels"


@contextlib.contextmanager
def kernels_installed(folder):
    """Put the package into a folder that this process and those it starts import from.

    Its library is a link to the one build of it: loaded from two places it would register its
    operators twice.
    """
    require_compiler()
    library = next((build("linux", _NAME) / "src").glob(f"lib{_NAME}.*"))
    package = folder / _NAME
    package.mkdir()
    source = NATIVE / "python" / _NAME / "__init__.py"
    (package / "__init__.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (package / library.name).symlink_to(library)
    version = re.search(rf"{_NAME} VERSION (\S+)", (NATIVE / "CMakeLists.txt").read_text())[1]
    about = folder / f"{_NAME}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: mpqdm-kernels\nVersion: {version}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, _NAME, raising=False)
        patch.syspath_prepend(folder)
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield
        sys.modules.pop(_NAME, None)


@contextlib.contextmanager
def kernels_missing():
    """Let imports of the package fail in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, _NAME, None)
        yield
