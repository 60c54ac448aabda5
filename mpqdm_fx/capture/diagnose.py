"""Say where in the user's model a capture failed, why, and what to do about it."""

import dataclasses
import linecache
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.signature import tensor_leaves

__all__ = ["CaptureError", "Refusal", "depends_on_data", "describe_inputs", "refuse"]

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parents[1])

_DATA_DEPENDENT = (
    r"GuardOnDataDependent|data-dependent|unhashable type: non-nested SymInt|_local_scalar_"
)

# (pattern in the error's type and text, what the user can do about it); first match wins
_SUGGESTIONS = (
    (
        _DATA_DEPENDENT,
        "the model branches on a tensor's value; pass a constant or use torch.where",
    ),
    (
        r"assigned during export",
        "the model stores a tensor on itself during forward; register a buffer in __init__",
    ),
    (
        r"numpy",
        "the model leaves torch for numpy during forward; use torch operations there",
    ),
    (
        r"DynamicOutputShape|nonzero|unbacked|\bu\d+",
        "an output shape depends on data; replace boolean indexing or nonzero by torch.where",
    ),
    (
        r"No module named|is not defined|requires the .* library|ImportError",
        "install the optional library that the model asks for",
    ),
    (
        r"fake|Fake|meta",
        "an operation has no shape rule; register one with torch.library.register_fake",
    ),
)
_DEFAULT_SUGGESTION = (
    "check that the module works with torch.export.export(model, (), inputs, strict=False)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a model was not captured.

    Attributes:
        reason: The error's type and first line.
        path: Name of the innermost submodule that was executing; empty for the model itself.
        line: ``file.py:123`` of the model's code; empty if the error names none.
        code: The source text of that line.
        suggestion: What to change.
    """

    reason: str
    path: str = ""
    line: str = ""
    code: str = ""
    suggestion: str = ""

    def __str__(self) -> str:
        place = f" in {self.path}" if self.path else ""
        place += f" at {self.line}" if self.line else ""
        place += f": `{self.code}`" if self.code else ""
        advice = f"; {self.suggestion}" if self.suggestion else ""
        return f"{self.reason}{place}{advice}"


class CaptureError(TraceError):
    """A ``TraceError`` that carries its ``Refusal`` in parts, for reports."""

    def __init__(self, model_class: str, what: str, refusal: Refusal) -> None:
        super().__init__(f"{model_class} {what}: {refusal}")
        self.refusal = refusal


def refuse(model: nn.Module, error: BaseException, suggestion: str = "") -> Refusal:
    """Describe ``error``, which was raised while ``model`` ran or was exported.

    Args:
        model: The model; its submodules give the path.
        error: The exception, with its traceback.
        suggestion: What to do about it; chosen from the error's text if empty.
    """
    first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
    path, line, code = _locate(model, error)
    text = f"{type(error).__name__} {error}"
    if not suggestion:
        suggestion = next((s for p, s in _SUGGESTIONS if re.search(p, text)), _DEFAULT_SUGGESTION)
    return Refusal(reason=reason[:500], path=path, line=line, code=code, suggestion=suggestion)


def depends_on_data(error: BaseException) -> bool:
    """Tell whether an export failed on a tensor's value, which no choice of batch can help."""
    return re.search(_DATA_DEPENDENT, f"{type(error).__name__} {error}") is not None


def describe_inputs(call: Mapping[str, Any]) -> str:
    """Return ``name [shape] dtype`` of every tensor in ``call``, comma-separated."""
    return ", ".join(
        f"{name} {list(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        for name, t in tensor_leaves(call)
    )


def _locate(model: nn.Module, error: BaseException) -> tuple[str, str, str]:
    """Return (module path, file:line, source line) of the innermost frame of the model's code."""
    names = {id(m): name for name, m in model.named_modules()}
    path = line = code = ""
    for frames in _tracebacks(error):
        for traceback in frames:
            frame = traceback.tb_frame
            owner = frame.f_locals.get("self")
            if id(owner) in names:
                path = names[id(owner)]
            filename = frame.f_code.co_filename
            if not filename.startswith((_TORCH, _OWN, "<")):
                line, code = _source(filename, traceback.tb_lineno)
        if line:
            return path, line, code
    # torch.export quotes the model's frame for errors that it finds after the forward
    for filename, number in re.findall(r'File "([^"<]+)", line (\d+)', str(error)):
        if not filename.startswith(_TORCH):
            line, code = _source(filename, int(number))
    return path, line, code


def _tracebacks(error: BaseException) -> Iterator[list[TracebackType]]:
    """Yield the frames of the innermost cause first, each outermost frame first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in reversed(chain):
        frames: list[TracebackType] = []
        traceback = link.__traceback__
        while traceback is not None:
            frames.append(traceback)
            traceback = traceback.tb_next
        yield frames


def _source(filename: str, number: int) -> tuple[str, str]:
    short = filename.rpartition("site-packages/")[2]
    return f"{short}:{number}", linecache.getline(filename, number).strip()
