"""The values that a `.pte` computes inside, by node of the edge program that it was made of.

ExecuTorch's event tracer (ETDump) stores the arguments of every call of a delegate and the result
of every kernel; XNNPACK hands out nothing from inside a delegate. So a copy of the program is run
whose delegates have the wanted values among their outputs. Code, weights and the order of
operators are those of the program; whether its outputs stay the same is for the caller to compare.
"""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mpqdm_fx.backends.xnnpack.delegate_graph import DelegateGraph, DelegateNode, DelegateValue
from mpqdm_fx.backends.xnnpack.event_dump import recorded, recording_bytes
from mpqdm_fx.backends.xnnpack.flat_json import PROGRAM, double_of
from mpqdm_fx.backends.xnnpack.kernel_calls import KernelCall, kernel_call, nodes_of_calls
from mpqdm_fx.backends.xnnpack.runner import flat_inputs, program_dtype
from mpqdm_fx.errors import LoweringError
from mpqdm_fx.graph.operators import operator_name

__all__ = ["HeldValue", "InnerValues"]

_METHOD = "forward"
_BACKEND = "XnnpackBackend"
_FIRST_CHANNELS = (0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class HeldValue:
    """In what form a program holds the value of a node.

    Attributes:
        clamped: It lies behind the activation that follows the node.
        codes: Scale and zero point of the int8 codes that it consists of, so that it lies behind
            the quantizer that follows; None for float32.
    """

    clamped: bool
    codes: tuple[float, int] | None


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a value is: the instruction, and the delegate's number of it or None for a kernel."""

    instruction: int
    number: int | None


class InnerValues:
    """Runs a program and shows values inside it.

    Args:
        program: A plain `.pte` with the method `forward`; the file is read once.
        weights: File of its weights if they are apart; it has to be there whenever this runs.
        edge: The edge program that it was made of, as a graph (`ProgramGraphs.edge`).

    Attributes:
        edge: The graph.
        held: The nodes of it whose values can be shown, in running order, and their form.

    Raises:
        LoweringError: ExecuTorch's event tracer is not part of this installation.
    """

    def __init__(self, program: Path, weights: Path | None, edge: fx.GraphModule) -> None:
        self.edge, self._weights = edge, weights
        self._data = program.read_bytes()
        self._handles: dict[tuple[int, str], list[fx.Node]] = defaultdict(list)
        for node in edge.graph.nodes:
            op = operator_name(node)
            if op is not None and isinstance(node.meta.get("val"), Tensor):
                self._handles[node.meta.get("debug_handle", -1), op].append(node)
        self._permutes = _permutes(self._handles)
        contents = _Contents(self._data, self._permutes)
        places = {**self._outside(contents), **self._delegated(contents)}
        self._places = {node: places[node] for node in edge.graph.nodes if node in places}
        self.held = {node: held for node, (_, held) in self._places.items()}
        self._copy: tuple[frozenset[fx.Node], _Contents, bytes] | None = None

    def run(
        self, inputs: Sequence[Any], nodes: Collection[fx.Node]
    ) -> tuple[tuple[Tensor, ...], dict[fx.Node, Tensor]]:
        """Run the copy once.

        Args:
            inputs: As the program takes them.
            nodes: Which of `held` to show.

        Returns:
            The outputs; and by node its value, float32 and in the node's shape. A node is left out
            if the program holds another shape.
        """
        wanted = frozenset(nodes)
        if self._copy is None or self._copy[0] != wanted:
            self._copy = wanted, *self._shown(wanted)
        _, contents, data = self._copy
        size = recording_bytes(contents.plan)
        outputs, arguments = _run(data, self._weights, inputs, size)
        values = {}
        for node in wanted:
            place, _ = self._places[node]
            value = contents.logical(place, arguments, tuple(node.meta["val"].shape))
            if value is not None:
                values[node] = value
        return outputs, values

    def _delegated(self, contents: "_Contents") -> dict[fx.Node, tuple[_Place, HeldValue]]:
        """Nodes inside delegates: the k-th operator of a handle is the k-th node of that kind."""
        result = {}
        for instruction, graph in contents.delegates.items():
            by_origin: dict[tuple[int, str], list[DelegateNode]] = defaultdict(list)
            for entry in graph.nodes:
                if entry.handle is not None and entry.op is not None:
                    by_origin[entry.handle, entry.op].append(entry)
            for origin, entries in by_origin.items():
                nodes = self._handles.get(origin, [])
                if len(nodes) != len(entries):
                    continue
                for node, entry in zip(nodes, entries, strict=True):
                    value = graph.value(entry.value)
                    # XNNPACK gives a number without axes to no tensor that it is to be shown in
                    if value is not None and node.meta["val"].ndim:
                        held = HeldValue(clamped=entry.clamped, codes=value.codes)
                        result[node] = _Place(instruction=instruction, number=entry.value), held
        return result

    def _outside(self, contents: "_Contents") -> dict[fx.Node, tuple[_Place, HeldValue]]:
        """Nodes that kernels compute."""
        inside = {n.handle for graph in contents.delegates.values() for n in graph.nodes}
        left = [
            node
            for (handle, _), nodes in self._handles.items()
            if handle not in inside
            for node in nodes
        ]
        held = HeldValue(clamped=False, codes=None)
        return {
            node: (_Place(instruction=number, number=None), held)
            for node, number in nodes_of_calls(self.edge, left, contents.kernels).items()
        }

    def _shown(self, nodes: Collection[fx.Node]) -> tuple["_Contents", bytes]:
        """A copy of the program that shows nodes, taken apart and as a file."""
        contents = _Contents(self._data, self._permutes)
        for place in {self._places[node][0] for node in nodes}:
            contents.show(place)
        return contents, contents.to_bytes()


class _Contents:
    """A program taken apart.

    Attributes:
        plan: Its method's plan.
        delegates: XNNPACK's delegates by the instruction that calls them.
        kernels: Calls of kernels by instruction.
    """

    def __init__(self, data: bytes, permutes: Collection[tuple[int, tuple[int, ...]]]) -> None:
        from executorch.exir._serialize._program import deserialize_pte_binary

        self._file = deserialize_pte_binary(data)
        program = self._file.program
        _restore_doubles(program, data)
        self.plan = next(p for p in program.execution_plan if p.name == _METHOD)
        self.delegates: dict[int, DelegateGraph] = {}
        self.kernels: dict[int, KernelCall] = {}
        self._shown: list[int] = []
        calls = Counter(
            getattr(i.instr_args, "delegate_index", None) for i in self.plan.chains[0].instructions
        )
        for number, instruction in enumerate(self.plan.chains[0].instructions):
            call = instruction.instr_args
            if hasattr(call, "op_index"):
                self.kernels[number] = kernel_call(program, self.plan, call)
            elif hasattr(call, "delegate_index") and calls[call.delegate_index] == 1:
                delegate = self.plan.delegates[call.delegate_index]
                if delegate.id == _BACKEND:
                    inline = program.backend_delegate_data[delegate.processed.index]
                    self.delegates[number] = DelegateGraph(bytes(inline.data), permutes)

    def show(self, place: _Place) -> None:
        """Make a value an argument of its delegate's call, in memory of its own."""
        if place.number is None:
            return
        graph = self.delegates[place.instruction]
        if graph.position(place.number) is not None:
            return
        from executorch.exir import schema
        from executorch.exir.scalar_type import ScalarType

        value = graph.value(place.number)
        assert value is not None
        call = self.plan.chains[0].instructions[place.instruction].instr_args
        assert graph.show(place.number) == len(call.args)
        sizes = self.plan.non_const_buffer_sizes
        if not self._shown:
            sizes.append(0)
        offset = -(-sizes[-1] // 64) * 64
        sizes[-1] = offset + value.bytes
        self._shown.append(len(self.plan.values))
        call.args.append(len(self.plan.values))
        self.plan.values.append(
            schema.EValue(
                schema.Tensor(
                    scalar_type=ScalarType.FLOAT if value.codes is None else ScalarType.CHAR,
                    storage_offset=0,
                    sizes=list(value.shape),
                    dim_order=list(range(len(value.shape))),
                    requires_grad=False,
                    layout=0,
                    data_buffer_idx=0,
                    allocation_info=schema.AllocationDetails(
                        memory_id=len(sizes) - 1,
                        memory_offset_low=offset & 0xFFFFFFFF,
                        memory_offset_high=offset >> 32,
                    ),
                    shape_dynamism=schema.TensorShapeDynamism.STATIC,
                )
            )
        )

    def to_bytes(self) -> bytes:
        """The program."""
        from executorch.exir._serialize._program import serialize_pte_binary

        for number, graph in self.delegates.items():
            call = self.plan.chains[0].instructions[number].instr_args
            delegate = self.plan.delegates[call.delegate_index]
            data = self._file.program.backend_delegate_data
            data[delegate.processed.index].data = graph.to_bytes()
        return bytes(serialize_pte_binary(self._file, extract_delegate_segments=True))

    def logical(
        self,
        place: _Place,
        arguments: Mapping[int, Sequence[Tensor | None]],
        shape: tuple[int, ...],
    ) -> Tensor | None:
        """A recorded value, float32 in a node's shape; None if it has another one."""
        values = arguments.get(place.instruction, ())
        if place.number is None:
            result = values[0] if values else None
            return None if result is None else _shaped(result.float(), shape)
        graph = self.delegates[place.instruction]
        position, value = graph.position(place.number), graph.value(place.number)
        assert position is not None
        assert value is not None
        tensor = values[position]
        if tensor is None:
            return None
        tensor = tensor.float()
        if value.codes is not None:
            scale, zero_point = value.codes
            tensor = (tensor - zero_point) * scale
        return _as_in_graph(tensor, value, shape)


def _restore_doubles(program: Any, data: bytes) -> None:
    """Give a program's numbers the bits that they have in its file; ExecuTorch rounds them."""
    from executorch.exir._serialize._program import _get_extended_header

    header = _get_extended_header(data)
    exact = PROGRAM.to_json(data if header is None else data[: header.program_size])
    for plan, exact_plan in zip(program.execution_plan, exact["execution_plan"], strict=True):
        for value, exact_value in zip(plan.values, exact_plan["values"], strict=True):
            if exact_value["val_type"] == "Double":
                value.val.double_val = double_of(exact_value["val"]["double_val"])
            elif exact_value["val_type"] == "DoubleList":
                value.val.items = [double_of(bits) for bits in exact_value["val"]["items"]]


def _as_in_graph(tensor: Tensor, value: DelegateValue, shape: tuple[int, ...]) -> Tensor | None:
    """A value in the axes of a graph, which always has the channels behind the batch."""
    moved = tensor.permute(_FIRST_CHANNELS) if tensor.dim() == 4 else None
    candidates = (moved, tensor) if value.channels_last else (tensor, moved)
    for candidate in candidates:
        result = None if candidate is None else _shaped(candidate, shape)
        if result is not None:
            return result
    return None


def _shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A tensor in a shape that differs in axes of size one alone; None if it is another one."""
    sizes = ([size for size in side if size != 1] for side in (tensor.shape, shape))
    return tensor.reshape(shape) if next(sizes) == next(sizes) else None


def _permutes(
    handles: Mapping[tuple[int, str], Sequence[fx.Node]],
) -> set[tuple[int, tuple[int, ...]]]:
    """Handle and order of axes of every permutation."""
    result = set()
    for (handle, op), nodes in handles.items():
        for node in nodes if op == "permute" else ():
            order: Any = node.args[1]
            result.add((handle, tuple(axis % len(order) for axis in order)))
    return result


def _run(
    data: bytes, weights: Path | None, inputs: Sequence[Any], size: int
) -> tuple[tuple[Tensor, ...], dict[int, list[Tensor | None]]]:
    """Outputs of a program, and what it recorded, by instruction."""
    from executorch.runtime import Runtime, Verification

    # The record of one run cannot be emptied for the next one, and its overflow ends the process.
    program = Runtime.get().load_program(
        data,
        verification=Verification.InternalConsistency,
        enable_etdump=True,
        debug_buffer_size=size,
        data_path=weights,
    )
    method = program.load_method(_METHOD)
    tensors = []
    for position, (_, value) in enumerate(flat_inputs(inputs)):
        dtype = program_dtype(method.metadata.input_tensor_meta(position))
        tensors.append(torch.as_tensor(value).detach().to(dtype).contiguous())
    outputs = tuple(method.execute(tensors))
    with tempfile.TemporaryDirectory() as folder:
        events, values = Path(folder) / "events", Path(folder) / "values"
        program.write_etdump_result_to_file(str(events), str(values))
        if not events.is_file():
            raise LoweringError(
                "this installation of ExecuTorch records no values: install it from PyPI, 1.5.1 or "
                "later"
            )
        return outputs, recorded(events, values)
