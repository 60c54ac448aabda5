"""The files of the package that become files of an exported folder, so that it draws alone."""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

from mpqdm_fx import errors
from mpqdm_fx.backends import kernel_library
from mpqdm_fx.calibration import conventions, schedules
from mpqdm_fx.io import classes, expansion, sealed
from mpqdm_fx.pipelines import medium, picture_files, program_files, runner
from mpqdm_fx.pipelines.loops.loop import Loop

__all__ = ["write_runner"]

# They import no other ones of the package, but for the loop's own.
_FILES = {
    "run.py": runner,
    "program_files.py": program_files,
    "medium.py": medium,
    "picture_files.py": picture_files,
    "conventions.py": conventions,
    "schedules.py": schedules,
    "sealed.py": sealed,
    "expansion.py": expansion,
    "classes.py": classes,
    "kernel_library.py": kernel_library,
    "errors.py": errors,
}


def write_runner(folder: Path, loop: type[Loop]) -> None:
    """Write everything that draws with a folder's programs.

    Args:
        folder: The folder.
        loop: How its pipeline draws.
    """
    bases = [base for base in loop.__mro__ if issubclass(base, Loop)]
    modules = [sys.modules[base.__module__] for base in (*bases, loop.makes)]
    loops = {f"{module.__name__.rpartition('.')[2]}.py": module for module in modules}
    for file, module in {**_FILES, **loops}.items():
        (folder / file).write_text(_apart(module), encoding="utf-8")


def _apart(module: ModuleType) -> str:
    """A module's text where its package is the folder that it lies in."""
    return re.sub(r"from mpqdm_fx\.(?:\w+\.)*(?=\w+ import)", "from ", inspect.getsource(module))
