"""Build hooks of the package: scikit-build-core's, and where ExecuTorch's headers come from.

An installed ExecuTorch is built against where it is. Only where there is none, pip is asked for
one in the build environment.
"""

import sysconfig
from pathlib import Path

from scikit_build_core import build

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_Settings = dict[str, list[str] | str] | None

build_editable = build.build_editable
build_sdist = build.build_sdist
build_wheel = build.build_wheel
get_requires_for_build_sdist = build.get_requires_for_build_sdist
prepare_metadata_for_build_editable = build.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = build.prepare_metadata_for_build_wheel


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    """What pip installs before it builds a wheel."""
    return [*build.get_requires_for_build_wheel(config_settings), *_executorch()]


def get_requires_for_build_editable(config_settings: _Settings = None) -> list[str]:
    """What pip installs before an editable install."""
    return [*build.get_requires_for_build_editable(config_settings), *_executorch()]


def _executorch() -> list[str]:
    # pip hides installed packages from imports while it builds, but not their folder.
    package = Path(sysconfig.get_path("platlib")) / "executorch"
    is_installed = (package / "lib" / "cmake" / "executorch").is_dir()
    return [] if is_installed else ["executorch>=1.5.1,<1.6"]
