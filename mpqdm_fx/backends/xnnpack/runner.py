"""Run a `.pte` through ExecuTorch's runtime, from Python."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpqdm_fx.backends.compressed import SUFFIX, expand_program
from mpqdm_fx.backends.kernel_library import calls_own_operators, require_kernels
from mpqdm_fx.errors import ArtifactError, ConfigError, LoweringError

__all__ = [
    "TensorSpec",
    "XnnpackRunner",
    "flat_inputs",
    "program_dtype",
    "require_executorch",
    "sorted_entries",
    "stored_files",
    "weights_path",
]

# c10::ScalarType, as the runtime reports it.
_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    9: torch.complex64,
    10: torch.complex128,
    11: torch.bool,
    15: torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape and dtype of one input or output of a program.

    Attributes:
        name: Argument's name (entries of containers are dotted), or a number.
        shape: Static shape.
        dtype: Name of the dtype, for example `float32`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


def require_executorch() -> None:
    """Check that the optional dependency is there.

    Raises:
        LoweringError: It is not; says how to install it.
    """
    try:
        import executorch.runtime  # noqa: F401 - tried, not used
    except ImportError as error:
        raise LoweringError(
            'the XNNPACK backend needs ExecuTorch: pip install "mpqdm-fx[executorch]"'
        ) from error


def flat_inputs(values: Sequence[Any], names: Sequence[str] | None = None) -> list[tuple[str, Any]]:
    """Tensors of positional inputs in the order in which a program takes them, with their names.

    Entries of dictionaries are sorted by key, so that the order does not depend on how a
    dictionary was made.

    Args:
        values: Tensors or numpy arrays, or (nested) dictionaries, tuples and lists of them.
        names: Name of each value; default: its number.

    Returns:
        Pairs of a name, with dots before the keys of containers, and a tensor or array.
    """
    result = []
    for name, value in zip(names or map(str, range(len(values))), values, strict=True):
        leaves, _ = pytree.tree_flatten_with_path(sorted_entries(value))
        for path, leaf in leaves:
            keys = [str(getattr(k, "key", getattr(k, "idx", k))) for k in path]
            result.append((".".join([name, *keys]), leaf))
    return result


def program_dtype(meta: Any) -> torch.dtype:
    """The dtype of a program's tensor, from what ExecuTorch says of it."""
    return _DTYPES[meta.dtype()]


def sorted_entries(value: Any) -> Any:
    """The same nested containers with dictionaries in order of their keys."""
    if isinstance(value, dict):
        return {key: sorted_entries(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(sorted_entries(entry) for entry in value)
    return value


def weights_path(path: Path) -> Path:
    """Where the weights of a program are if they have a file of their own: `<stem>.ptd`."""
    return path.with_suffix(".ptd")


def stored_files(path: Path) -> tuple[Path, ...]:
    """The files of a program, plain or compressed: itself, then its weights if they are apart.

    Args:
        path: The program's name when it is plain.

    Returns:
        Nothing if there is no such program.
    """
    program = _first(path, path.with_name(path.name + SUFFIX))
    weights = None if program is None else _weights_of(program)
    return tuple(file for file in (program, weights) if file is not None)


class XnnpackRunner:
    """A loaded `.pte`, callable.

    Args:
        path: File written by `lower_xnnpack`, `lower_xnnpack_float` or `lower_methods`, or by
            `compress_program`: then it is expanded to a file beside it.
        method: Which method of it to run.
        weights: File of its weights, plain or compressed; default `<stem>.ptd` or `<stem>.ptd.xz`
            beside `path` if there is one.
        name: What messages call it, if `path` is no name of its own.

    Raises:
        LoweringError: ExecuTorch is not installed, or the program calls own operators and the
            native library, which has their kernels, is not.
        ArtifactError: The file is missing, damaged, or cannot be loaded by this runtime.
    """

    def __init__(
        self,
        path: str | Path,
        method: str = "forward",
        *,
        weights: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        require_executorch()
        self.path = Path(path)
        self.name = name or self.path.name
        if not self.path.is_file():
            raise ArtifactError(f"{self.path} does not exist")
        data = _weights_of(self.path) if weights is None else Path(weights)
        plain = _plain(self.path)
        operator = calls_own_operators(plain)
        if operator is not None:
            require_kernels(operator)
        try:
            names, execute, meta = _load(plain, method, data and _plain(data))
        except RuntimeError as error:
            raise ArtifactError(
                f"{name or self.path} cannot be loaded by ExecuTorch: {error}; it is damaged, or "
                f"made by another version"
            ) from error
        if execute is None:
            listed = ", ".join(sorted(names))
            raise ArtifactError(f"{name or self.path} holds no method `{method}`; it has {listed}")
        self._execute = execute
        self._inputs = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
        self._dtypes = [program_dtype(tensor) for tensor in self._inputs]

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Static shape of each input, in order."""
        return tuple(tuple(meta.sizes()) for meta in self._inputs)

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Run the program once.

        Args:
            *inputs: Tensors or numpy arrays in the order of the model's arguments, cast to the
                program's dtypes; containers of them are taken apart.

        Returns:
            The outputs, in order.

        Raises:
            ConfigError: The number of inputs or a shape is not what the program takes.
            LoweringError: The runtime failed.
        """
        leaves = flat_inputs(inputs)
        if len(leaves) != len(self._inputs):
            raise ConfigError(
                f"{self.name} takes {len(self._inputs)} tensors of shapes "
                f"{list(self.input_shapes)}, got {len(leaves)}"
            )
        tensors = []
        for position, ((_, value), shape) in enumerate(zip(leaves, self.input_shapes, strict=True)):
            tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            if tuple(tensor.shape) != shape:
                raise ConfigError(
                    f"input {position} of {self.name} has shape {tuple(tensor.shape)}, the "
                    f"program was made for {shape}; lower it again with that batch size"
                )
            tensors.append(tensor.detach().to(self._dtypes[position]).contiguous())
        try:
            return tuple(self._execute(tensors))
        except RuntimeError as error:
            raise LoweringError(f"{self.name} failed at run time: {error}") from error


def _weights_of(path: Path) -> Path | None:
    """The file of weights beside a program, if there is one."""
    plain = weights_path(path.with_suffix("") if path.suffix == SUFFIX else path)
    return _first(plain, plain.with_name(plain.name + SUFFIX))


def _first(*candidates: Path) -> Path | None:
    return next((file for file in candidates if file.is_file()), None)


def _plain(path: Path) -> Path:
    return expand_program(path) if path.suffix == SUFFIX else path


def _load(
    path: Path, method: str, weights: Path | None
) -> tuple[set[str], Callable[[list[Tensor]], Any] | None, Any]:
    """Names of a program's methods, and how to execute one of them with what it takes."""
    from executorch.runtime import Runtime, Verification

    program = Runtime.get().load_program(
        path, verification=Verification.InternalConsistency, data_path=weights
    )
    if method not in program.method_names:
        return program.method_names, None, None
    loaded = program.load_method(method)

    def execute(tensors: list[Tensor], program: Any = program) -> Any:
        return loaded.execute(tensors)  # the program owns the memory of the method

    return program.method_names, execute, loaded.metadata
