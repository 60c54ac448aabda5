"""Print the folder of ExecuTorch's CMake package, or nothing. Imports neither it nor torch."""

import importlib.util
import sys
import sysconfig
from pathlib import Path


def folders() -> list[Path]:
    """Where the package may be, in the order of preference."""
    package = importlib.util.find_spec("executorch")
    importable = [] if package is None else list(package.submodule_search_locations or ())
    return [Path(place) for place in importable] + [
        Path(sysconfig.get_path("platlib")) / "executorch"
    ]


if __name__ == "__main__":
    found = [folder / "lib" / "cmake" / "executorch" for folder in folders()]
    sys.stdout.write(next((str(folder) for folder in found if folder.is_dir()), ""))
