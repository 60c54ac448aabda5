"""Flatbuffers as JSON and back, without a bit lost.

`flatc` writes floating-point numbers with six digits (twelve if they are double). So it is given a
schema in which such a number is the whole number of its bits.
"""

import contextlib
import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import LoweringError
from mpqdm_fx.io.system_errors import writing

__all__ = ["DELEGATE", "PROGRAM", "Schema", "double_of", "flatc_files", "float_of"]

_WHOLE = {"float": "uint", "double": "ulong"}


@dataclass(frozen=True, kw_only=True)
class Schema:
    """A schema that ExecuTorch ships.

    Attributes:
        package: Where it lies.
        names: Its files; the first one is its root.
    """

    package: str
    names: tuple[str, ...]

    def to_json(self, flatbuffer: bytes) -> dict[str, Any]:
        """Read a flatbuffer; floating-point numbers are the integers of their bits."""
        from executorch.exir._serialize._flatbuffer import _flatc_decompile

        with flatc_files(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.bin"
            path.write_bytes(flatbuffer)
            _flatc_decompile(folder, self._written(folder), str(path), ["--raw-binary"])
            content: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
            return content

    def to_flatbuffer(self, content: Mapping[str, Any]) -> bytes:
        """Inverse of `to_json`."""
        from executorch.exir._serialize._flatbuffer import _flatc_compile

        with flatc_files(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.json"
            path.write_text(json.dumps(content), encoding="ascii")
            _flatc_compile(folder, self._written(folder), str(path))
            return path.with_suffix(".bin").read_bytes()

    def _written(self, folder: str) -> str:
        for name in self.names:
            text = files(self.package).joinpath(name).read_text(encoding="utf-8")
            whole = re.sub(r"(:\s*\[?)(float|double)\b", lambda m: m[1] + _WHOLE[m[2]], text)
            (Path(folder) / name).write_text(whole, encoding="utf-8")
        return str(Path(folder) / self.names[0])


DELEGATE = Schema(package="executorch.backends.xnnpack.serialization", names=("schema.fbs",))
PROGRAM = Schema(package="executorch.exir._serialize", names=("program.fbs", "scalar_type.fbs"))


@contextlib.contextmanager
def flatc_files() -> Iterator[None]:
    """Tell what keeps `flatc`, a program apart, from its temporary files.

    Raises:
        LoweringError: It failed, and says the reason to the terminal alone.
        ArtifactError: The system refuses, as of `system_errors.writing`.
    """
    place = Path(tempfile.gettempdir())
    try:
        with writing(place):
            yield
    except subprocess.CalledProcessError as error:
        raise LoweringError(
            f"flatc, which makes the files of ExecuTorch in {place}, ended with status "
            f"{error.returncode}; see that this disk has room, or give another one (TMPDIR)"
        ) from error


def float_of(bits: int) -> float:
    """The float32 of some bits."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def double_of(bits: int) -> float:
    """The float64 of some bits."""
    value: float = struct.unpack("<d", struct.pack("<Q", bits))[0]
    return value
