"""The operators of low-bit programs for ExecuTorch's Python runtime.

`load()` registers them; then the runtime executes programs that call them:

    import mpqdm_kernels
    from executorch.runtime import Runtime

    mpqdm_kernels.load()
    Runtime.get().load_program("unet.pte")
"""

import ctypes
import functools
import importlib.util
import mmap
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

__all__ = [
    "__version__",
    "decode_codes",
    "encode_codes",
    "kernel_sets",
    "load",
    "operators",
    "place_codes",
]

__version__ = version("mpqdm-kernels")

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_OVERLOAD = ".out"
_NO_MEMORY = 8  # CodesError of codes.h


def load() -> None:
    """Register the operators with ExecuTorch's runtime in this process; again does nothing.

    Raises:
        ImportError: ExecuTorch is not installed, or has another version than 1.5.
        OSError: A library cannot be loaded; says which.
    """
    _library()


def operators() -> tuple[str, ...]:
    """Names of the operators, such as ``"mpqdm::conv2d_mixed"``.

    Raises:
        ImportError: As `load`.
        OSError: As `load`.
    """
    names = _names(_library().mpqdm_operator_name)
    return tuple(name.removesuffix(_OVERLOAD) for name in names)


def kernel_sets() -> tuple[str, ...]:
    """Instruction sets that this CPU has kernels for, best first; the last is ``"scalar"``.

    The environment variable ``MPQDM_KERNELS`` names one to use in place of the best.

    Raises:
        ImportError: As `load`.
        OSError: As `load`.
    """
    return _names(_library().mpqdm_kernel_set_name)


def decode_codes(stream: bytes, rows: int, channels: int, places: int) -> bytearray:
    """Decode the weights of an entropy-coded layer (FORMAT.md, "Codes").

    Args:
        stream: All bytes of the layer.
        rows: Output channels.
        channels: Input channels.
        places: Places of the kernel, 9 for 3x3; 1 for linear layers.

    Returns:
        The codes as int8, [rows, channels, places].

    Raises:
        ValueError: The bytes are not those of such a layer; says why.
        MemoryError: No memory is left.
        ImportError: As `load`.
        OSError: As `load`.
    """
    library = _library()
    codes = bytearray(rows * channels * places)
    room = (ctypes.c_char * len(codes)).from_buffer(codes)
    error = library.mpqdm_decode_codes(stream, len(stream), rows, channels, places, room)
    if error:
        raise _refusal(library, library.mpqdm_codes_error(error))
    return codes


def encode_codes(codes: bytes, classes: bytes) -> bytes:
    """Encode weights, each of a known class; what tells the classes is not in the result.

    Args:
        codes: int8, -127..127.
        classes: As many, 0..39.

    Raises:
        ValueError: There are not as many, or one is out of its range; or no memory is left.
        ImportError: As `load`.
        OSError: As `load`.
    """
    library = _library()
    if len(codes) != len(classes):
        raise ValueError(f"{len(codes)} codes have {len(classes)} classes")
    stream = ctypes.create_string_buffer(library.mpqdm_encoded_limit(len(codes)))
    size = library.mpqdm_encode_codes(codes, classes, len(codes), stream)
    if not size:
        raise ValueError("a code is -128, or a class is above 39, or no memory is left")
    return bytes(memoryview(stream)[:size])


def place_codes(content: bytearray | mmap.mmap) -> int:
    """Put the codes that follow a program into its layers, in place (FORMAT.md, "Coded programs").

    Args:
        content: The program and what follows it, writable. Without codes behind it nothing changes.

    Returns:
        How many of the bytes are then the program.

    Raises:
        ValueError: The bytes are damaged; says why. Some layers may have their codes.
        MemoryError: No memory is left. Some layers may have their codes.
        ImportError: As `load`.
        OSError: As `load`.
    """
    library = _library()
    program_bytes = ctypes.c_size_t()
    room = (ctypes.c_char * len(content)).from_buffer(content)
    wrong = library.mpqdm_place_codes(room, len(content), ctypes.byref(program_bytes))
    del room  # which holds the buffer: a map could not be closed
    if wrong:
        raise _refusal(library, wrong)
    return program_bytes.value


def _refusal(library: ctypes.CDLL, wrong: bytes) -> Exception:
    kind = MemoryError if wrong == library.mpqdm_codes_error(_NO_MEMORY) else ValueError
    return kind(wrong.decode())


@functools.cache
def _library() -> ctypes.CDLL:
    # The runtime's libraries first, from their own folder: the operators name them without a path,
    # and so get those that ExecuTorch's Python module has loaded or will load, with one registry.
    for name in ("libexecutorch", "libexecutorch_threadpool"):
        ctypes.CDLL(str(_runtime_folder() / f"{name}{_SUFFIX}"))
    library = ctypes.CDLL(str(_built_library()))
    for function in (library.mpqdm_operator_name, library.mpqdm_kernel_set_name):
        function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_char_p
    _declare_codes(library)
    return library


def _built_library() -> Path:
    # An editable install has it in another folder than this file; both are the package's.
    name = f"libmpqdm_kernels{_SUFFIX}"
    places = (Path(place, name) for place in __path__)
    return next((place for place in places if place.is_file()), Path(__file__).with_name(name))


def _declare_codes(library: ctypes.CDLL) -> None:
    size, data = ctypes.c_size_t, ctypes.c_char_p
    room = ctypes.POINTER(ctypes.c_char)
    library.mpqdm_decode_codes.argtypes = [data, size, size, size, size, room]
    library.mpqdm_codes_error.argtypes, library.mpqdm_codes_error.restype = [ctypes.c_int], data
    library.mpqdm_encode_codes.argtypes = [data, data, size, room]
    library.mpqdm_encode_codes.restype = size
    library.mpqdm_place_codes.argtypes = [room, size, ctypes.POINTER(size)]
    library.mpqdm_place_codes.restype = data
    library.mpqdm_encoded_limit.argtypes, library.mpqdm_encoded_limit.restype = [size], size


def _runtime_folder() -> Path:
    remedy = 'pip install "executorch>=1.5.1,<1.6"'
    package = importlib.util.find_spec("executorch")
    if package is None or not package.submodule_search_locations:
        raise ImportError(f"mpqdm_kernels needs ExecuTorch, which is not installed: {remedy}")
    folders = [Path(place) / "lib" for place in package.submodule_search_locations]
    for folder in folders:
        if (folder / f"libexecutorch{_SUFFIX}").is_file():
            return folder
    raise ImportError(
        f"mpqdm_kernels needs libexecutorch{_SUFFIX}, which is not in {folders[0]}: {remedy}"
    )


def _names(name_at: Callable[[int], bytes | None]) -> tuple[str, ...]:
    names: list[str] = []
    while name := name_at(len(names)):
        names.append(name.decode())
    return tuple(names)
