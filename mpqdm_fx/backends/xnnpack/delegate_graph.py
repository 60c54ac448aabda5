"""The graph of one XNNPACK delegate as it lies in a `.pte`: read, and made to show its values.

ExecuTorch stores of each operator from which node of the edge program it comes (`debug_handle`).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mpqdm_fx.backends.xnnpack.flat_json import DELEGATE, float_of

__all__ = ["DelegateGraph", "DelegateNode", "DelegateValue"]

_NO_NODE = 0xFFFF  # `debug_handle` of what stands for no node of the edge program
_OUTSIDE = 1 | 2  # XNN_VALUE_FLAG_EXTERNAL_INPUT, XNN_VALUE_FLAG_EXTERNAL_OUTPUT
_OUTPUT = 2
_ALIGNMENT = 16  # of the parts of a delegate's data
_TO_CHANNELS_LAST = (0, 2, 3, 1)

#: Operators of one node of the edge program, with that node's operator.
_OPERATORS: Mapping[str, str] = {
    "Abs": "abs",
    "Add": "add",
    "AvgPooling2d": "avg_pool2d",
    "BatchMatrixMultiply": "bmm",
    "Ceiling": "ceil",
    **dict.fromkeys((f"Concatenate{parts}" for parts in (2, 3, 4, 5)), "cat"),
    "Conv2d": "convolution",
    "ConvTranspose2d": "convolution",
    "Cos": "cos",
    "DepthwiseConv2d": "convolution",
    "Div": "div",
    "Exp": "exp",
    "Floor": "floor",
    "FullyConnected": "linear",
    "Gelu": "gelu",
    "GlobalAvgPooling2d": "mean",
    "Hardswish": "hardswish",
    "LeakyReLU": "leaky_relu",
    "Log": "log",
    "MaxPooling2d": "max_pool2d",
    "Maximum": "maximum",
    "Minimum": "minimum",
    "Multiply": "mul",
    "Negate": "neg",
    "ReciprocalSquareRoot": "rsqrt",
    "Sigmoid": "sigmoid",
    "Sin": "sin",
    "Softmax": "_softmax",
    "Square": "pow",
    "SquareRoot": "sqrt",
    "StaticConstantPad": "constant_pad_nd",
    "StaticResizeBilinear2D": "upsample_bilinear2d",
    "Subtract": "sub",
    "Tanh": "tanh",
}

#: Operators whose results lie channels last, and those whose results never do.
_IMAGES = frozenset(
    {
        "AvgPooling2d",
        "Conv2d",
        "ConvTranspose2d",
        "DepthwiseConv2d",
        "GlobalAvgPooling2d",
        "MaxPooling2d",
        "PReLU",
        "StaticResizeBilinear2D",
    }
)
_PLAIN = frozenset({"BatchMatrixMultiply", "FullyConnected", "Softmax", "StaticReshape"})


@dataclass(frozen=True, kw_only=True)
class DelegateNode:
    """An operator of a delegate.

    Attributes:
        handle: `debug_handle` of the node of the edge program that it computes; None if there is
            none.
        op: That node's operator (`convolution`, `add`); None if it is not known.
        value: Number of its result.
        clamped: Whether an activation is part of it, so that the result lies behind that.
    """

    handle: int | None
    op: str | None
    value: int
    clamped: bool


@dataclass(frozen=True, kw_only=True)
class DelegateValue:
    """A value of a delegate.

    Attributes:
        shape: As XNNPACK has it, channels last or not.
        codes: Scale and zero point of int8 codes; None for float32.
        channels_last: Whether the last of four axes is that of the channels.
    """

    shape: tuple[int, ...]
    codes: tuple[float, int] | None
    channels_last: bool

    @property
    def bytes(self) -> int:
        """Size."""
        return math.prod(self.shape) * (4 if self.codes is None else 1)


class DelegateGraph:
    """What XNNPACK is given of one delegate.

    Args:
        data: The delegate's data in a program.
        permutes: `debug_handle` and order of axes of the edge program's permutations; other
            transpositions are copies to another memory layout.

    Attributes:
        nodes: Its operators in running order.
    """

    def __init__(self, data: bytes, permutes: Collection[tuple[int, tuple[int, ...]]] = ()) -> None:
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

        header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
        start = header.flatbuffer_offset
        self._graph = DELEGATE.to_json(data[start : start + header.flatbuffer_size])
        self._constants = data[header.constant_data_offset :]
        self._constant_bytes = header.constant_data_size
        self._values = {}
        for entry in self._graph["xvalues"]:
            tensor = _tensor(entry)
            self._values[tensor["id_out"]] = entry
        self.nodes = tuple(map(_node, self._graph["xnodes"]))
        self._channels_last = _channels_last(self._graph["xnodes"], self._values, permutes)

    def value(self, number: int) -> DelegateValue | None:
        """A value; None if it is neither float32 nor int8 with one scale."""
        entry = self._values[number]
        tensor, codes = _tensor(entry), None
        if tensor["datatype"] == "xnn_datatype_qint8":
            quantization = entry["xvalue_union"]["quant_params"]
            codes = float_of(quantization["scale"]), int(quantization["zero_point"])
        elif tensor["datatype"] != "xnn_datatype_fp32":
            return None
        return DelegateValue(
            shape=tuple(tensor["dims"]), codes=codes, channels_last=number in self._channels_last
        )

    def position(self, number: int) -> int | None:
        """Which argument of the delegate's call a value is; None if it stays inside."""
        tensor = _tensor(self._values[number])
        return int(tensor["external_id"]) if tensor["flags"] & _OUTSIDE else None

    def show(self, number: int) -> int:
        """Make a value that stays inside an output, in place: the call has one argument more.

        Args:
            number: The value's.

        Returns:
            Its position among the arguments: the last one.
        """
        tensor = _tensor(self._values[number])
        tensor["external_id"] = position = int(self._graph["num_externs"])
        tensor["flags"] |= _OUTPUT
        self._graph["num_externs"] += 1
        self._graph["output_ids"].append(number)
        return position

    def to_bytes(self) -> bytes:
        """The delegate's data."""
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

        graph = DELEGATE.to_flatbuffer(self._graph)
        start = _aligned(XNNHeader.EXPECTED_LENGTH)
        header = XNNHeader(
            flatbuffer_offset=start,
            flatbuffer_size=len(graph),
            constant_data_offset=start + _aligned(len(graph)),
            constant_data_size=self._constant_bytes,
        ).to_bytes()
        parts = header.ljust(start, b"\0"), graph.ljust(_aligned(len(graph)), b"\0")
        return b"".join((*parts, self._constants))


def _node(entry: Mapping[str, Any]) -> DelegateNode:
    handle = entry["debug_handle"]
    return DelegateNode(
        handle=None if handle == _NO_NODE else handle,
        op=_OPERATORS.get(_kind(entry)),
        value=entry["xnode_union"]["output_id"],
        clamped=entry.get("output_min_max") is not None,
    )


def _kind(entry: Mapping[str, Any]) -> str:
    return str(entry["xnode_union_type"]).removeprefix("XNN")


def _tensor(entry: Mapping[str, Any]) -> dict[str, Any]:
    union = entry["xvalue_union"]
    tensor: dict[str, Any] = union.get("tensor_value", union)
    return tensor


def _channels_last(
    nodes: list[Mapping[str, Any]],
    values: Mapping[int, Mapping[str, Any]],
    permutes: Collection[tuple[int, tuple[int, ...]]],
) -> set[int]:
    """Numbers of the values that lie channels last."""
    result: set[int] = set()
    for entry in nodes:
        kind, fields = _kind(entry), entry["xnode_union"]
        reads = [v for k, v in fields.items() if k.startswith("input") and k.endswith("id")]
        if kind == "StaticTranspose":
            order = tuple(fields["perm"])
            copy = (entry["debug_handle"], order) not in permutes
            last = order == _TO_CHANNELS_LAST and copy
        else:
            last = kind in _IMAGES or (kind not in _PLAIN and any(v in result for v in reads))
        output = fields["output_id"]
        if last and _tensor(values[output])["num_dims"] == 4:
            result.add(output)
    return result


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
