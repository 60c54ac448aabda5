"""The entropy coder of the native library, where it is installed.

It writes and reads the same bytes as `numerics.levels.rans`, a hundred times as fast.
"""

import importlib
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from mpqdm_fx.errors import ArtifactError

__all__ = ["FastCoder", "installed_coder"]

logger = logging.getLogger(__name__)

_MODULE = "mpqdm_kernels"


class FastCoder:
    """What `entropy_code.Coder` says, by functions of the library.

    Args:
        library: The package `mpqdm_kernels`.
    """

    def __init__(self, library: ModuleType) -> None:
        self._library = library

    def encode(self, codes: Tensor, classes: Tensor) -> Tensor:
        """Code numbers of known classes.

        Args:
            codes: int8 [n], -127..127, on the CPU.
            classes: uint8 [n].

        Returns:
            Bytes, uint8.
        """
        return _tensor(bytearray(self._library.encode_codes(_bytes(codes), _bytes(classes))))

    def decode(self, stream: Tensor, shape: tuple[int, int], places: int) -> Tensor:
        """Codes of a layer.

        Args:
            stream: uint8 [n], all bytes of the layer, on the CPU.
            shape: (O, I * T).
            places: T.

        Returns:
            int8 [O, I * T].

        Raises:
            ArtifactError: The bytes are not those of such a layer.
        """
        try:
            codes = self._library.decode_codes(_bytes(stream), shape[0], shape[1] // places, places)
        except ValueError as error:
            raise ArtifactError(f"codes: entropy-coded layer: {error}; corrupted") from None
        return _tensor(codes).view(torch.int8).reshape(shape)


@cache
def installed_coder() -> FastCoder | None:
    """The library's; None where it is not installed, does not load, or is too old to have one."""
    try:
        library = importlib.import_module(_MODULE)
        library.load()
    except (ImportError, OSError) as error:
        logger.debug("no fast entropy coder: %s", error)
        return None
    return FastCoder(library) if hasattr(library, "decode_codes") else None


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().numpy().tobytes())


def _tensor(octets: bytearray) -> Tensor:
    return torch.frombuffer(octets, dtype=torch.uint8)
