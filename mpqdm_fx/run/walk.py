"""Run a graph node by node, all calls at each node, so that it can be changed on the way."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpqdm_fx.errors import CalibrationError, DialectError
from mpqdm_fx.graph.editing import writes_in_place
from mpqdm_fx.graph.lanes import float_of, is_lane, twin_of
from mpqdm_fx.graph.nested import to_device
from mpqdm_fx.graph.qdq import quick_form
from mpqdm_fx.io.progress import Stage, stage
from mpqdm_fx.run.cost import Sizes, bind_calls, node_cost, per_call, value_bytes, walk_memory
from mpqdm_fx.run.liveness import readers
from mpqdm_fx.run.value_store import Key, ValueStore

__all__ = ["Walk"]

logger = logging.getLogger(__name__)


class Walk:
    """One run of a graph over many calls, breadth first: a node is executed for all of them.

    It is an iterator over the nodes. It yields each one, placeholders and the output included,
    *before* it is executed; asking for the next one executes it. In between, the caller may read
    `values`, replace modules of the graph, and edit the arguments of nodes still to come: both are
    looked up at execution. Leaving a loop keeps the state; another loop goes on from there.

        walk = Walk(graph_module, calls)
        for node in walk:
            if is_mine(node):
                inputs = list(walk.values(node.args[0]))
        walk.outputs

    A value is freed when the last of its `liveness.readers` was executed, call by call.

    Args:
        graph_module: the graph; no node of it may write into its input.
        calls: tensors, or containers of tensors, by placeholder name; one mapping per call.
        max_memory: bytes of values held in memory. What does not fit moves to disk, that with the
            farthest next use first, and comes back with the same bits. A view counts as much as
            a copy of it; parameters do not count, nor does the scratch memory of kernels.
        half: hold float32 values as float16, except those that overflow.
        directory: where to make the temporary folder for values on disk.
        device: where to compute; modules whose tensors lie elsewhere are called with copies.
            Default: everything stays where it is.
        progress: name of the stage that is told, weighted by `cost.node_cost`; None for none.
        before: multiply-adds that the caller spends on a node before it is executed; for the bar.

    Attributes:
        executions: nodes executed so far, counted once per call; placeholders, attributes and the
            output are not counted.
        outputs: what the graph returns for each call, once the walk is over.

    Raises:
        CalibrationError: there are no calls, one lacks an argument, or `max_memory` cannot hold
            what one node needs at one call (the smallest possible limit is named).
        DialectError: a node writes into its input.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        calls: Sequence[Mapping[str, Any]],
        *,
        max_memory: int | None = None,
        half: bool = False,
        directory: Path | None = None,
        device: torch.device | str | None = None,
        progress: str | None = None,
        before: Mapping[fx.Node, int] | None = None,
    ) -> None:
        _check(graph_module, calls)
        if max_memory is not None:
            _, smallest = walk_memory(graph_module, calls, half=half)
            if max_memory < smallest:
                raise CalibrationError(
                    f"activation_memory={max_memory} cannot hold what one node needs at one call; "
                    f"the smallest limit that can is {smallest} bytes; raise it, or give fewer "
                    "samples per call"
                )
        self._graph_module = graph_module
        self._calls = calls
        self._half = half
        self._device = None if device is None else torch.device(device)
        self._store = ValueStore(
            limit=max_memory, half=half, directory=directory, victim=self._farthest
        )
        self._sizes = bind_calls(graph_module, calls)
        self._positions: dict[fx.Node, int] = {}
        self._later: dict[fx.Node, tuple[bool, int]] = {}
        self._executed: set[fx.Node] = set()
        self._attributes: dict[fx.Node, Any] = {}
        self._next: fx.Node | None = next(iter(graph_module.graph.nodes))
        self._pending: fx.Node | None = None
        self._failed: fx.Node | None = None
        self._call = 0
        self.executions = 0
        self.outputs: list[Any] = []
        self._before = before or {}
        self._stage = self._stage_of(progress)

    def __iter__(self) -> Self:
        """Return the walk itself: a second loop goes on where the first one stopped."""
        return self

    def __next__(self) -> fx.Node:
        """Execute the node that was yielded last, for all calls, and yield the next one."""
        if self._failed is not None:
            raise CalibrationError(f"the walk failed at node {self._failed.name}; start a new one")
        if self._pending is not None:
            self._failed = self._pending  # until it is through
            try:
                with torch.no_grad():
                    self._execute(self._pending)
            except Exception as error:
                error.add_note(f"in node {self._pending.name} ({self._pending.target})")
                raise
            self._next = None if self._pending.op == "output" else self._pending.next
            self._failed = self._pending = None
        if self._next is None:
            self.close()
            raise StopIteration
        self._pending = self._next
        return self._pending

    def close(self) -> None:
        """Drop all values and temporary files; `outputs` stay. The end of the walk does it too."""
        self._next = None
        self._store.close()
        self._attributes.clear()
        self._stage.close()

    @property
    def peak_bytes(self) -> int:
        """The most bytes of values that were in memory at once."""
        return self._store.peak

    @property
    def alive(self) -> tuple[fx.Node, ...]:
        """Nodes whose values can be read now."""
        return (*self._attributes, *self._store.nodes)

    @property
    def spilled(self) -> int:
        """How many values were written to disk so far."""
        return self._store.spilled

    def values(self, node: fx.Node) -> Iterator[Any]:
        """Return the values of a node, lazily and in call order.

        They may share memory with what the walk goes on with: read them, do not write.

        Args:
            node: a node that was executed and still has readers to come.

        Raises:
            CalibrationError: it was not executed yet, or its value is freed already.
        """
        if node in self._attributes:
            return iter([self._attributes[node]] * len(self._calls))
        if node not in self._store:
            why = (
                "was freed after its last reader"
                if node in self._executed
                else "does not exist yet"
            )
            raise CalibrationError(
                f"the value of node {node.name} {why}; read values before the walk executes "
                "their last reader"
            )
        return (self._store.peek((node, call)) for call in range(len(self._calls)))

    def delta(self, node: fx.Node) -> float:
        """Measure the relative error of a value in the quantized lane, over all calls.

        Args:
            node: a node of either lane. Of a float node, its twin is measured; of a node of the
                quantized lane (a quantizer, say), that node against its float value.

        Returns:
            ||x - x_hat||^2 / ||x||^2, summed over all floating-point tensors; exactly 0 if both
            lanes share the node.

        Raises:
            CalibrationError: one of the two values is not alive.
        """
        graph_module = self._graph_module
        exact = float_of(graph_module, node)
        noisy = node if is_lane(node) else twin_of(graph_module, node)
        if noisy is None:
            return 0.0
        if exact is None:
            raise CalibrationError(f"nobody reads the float value of node {node.name}")
        error = energy = 0.0
        for value, value_hat in zip(self.values(exact), self.values(noisy), strict=True):
            pairs = zip(pytree.tree_leaves(value), pytree.tree_leaves(value_hat), strict=True)
            for x, x_hat in pairs:
                if isinstance(x, Tensor) and x.is_floating_point():
                    reference = x.double()
                    error += float((reference - x_hat).square().sum())
                    energy += float(reference.square().sum())
        if error == 0:
            return 0.0
        return error / energy if energy else math.inf

    def _execute(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = _attribute(self._graph_module, str(node.target))
            self._attributes[node] = self._moved(value)
        self._executed.add(node)
        self._later.clear()
        self._stage(self._before.get(node, 0))
        ending = self._ending(node)
        sizes = per_call(self._sizes, lambda binding: value_bytes(node, binding, half=self._half))
        costs = per_call(self._sizes, self._cost_of(node)) if self._stage.is_told else None
        for call, arguments in enumerate(self._calls):
            self._call = call
            if node.op == "placeholder":
                name = str(node.target)
                value = arguments[name] if name in arguments else node.args[0]
                self._store.put((node, call), self._moved(value))
            elif node.op != "get_attr":
                self._execute_call(node, call, sizes[call])
            for finished in ending:
                if finished in self._store:
                    self._store.free((finished, call))
            if costs is not None:
                self._stage(costs[call])
        for finished in ending:
            self._attributes.pop(finished, None)

    def _execute_call(self, node: fx.Node, call: int, size: int) -> None:
        keys = frozenset((n, call) for n in node.all_input_nodes if n in self._store)
        self._store.load(keys)

        def value_of(source: fx.Node) -> Any:
            if source in self._attributes:
                return self._attributes[source]
            if source not in self._store:
                raise CalibrationError(
                    f"node {node.name} reads {source.name}, which has no value: it was freed "
                    "before the arguments were edited, or inserted behind the walk"
                )
            return self._store.peek((source, call))

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
        if node.op == "output":
            self.outputs.append(args[0])
            return
        self._store.reserve(size, keys)
        self._store.put((node, call), self._compute(node, args, kwargs), pinned=keys)
        self.executions += 1

    def _compute(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            module = self._graph_module.get_submodule(str(node.target))
            return self._call_module(module, args, kwargs)
        if self._device is not None and "device" in kwargs:
            kwargs = {**kwargs, "device": self._device}
        assert callable(node.target)
        return (quick_form(node.target) or node.target)(*args, **kwargs)

    def _call_module(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._device is None:
            return module(*args, **kwargs)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if all(t.device == self._device for t in tensors.values()):
            return module(*args, **kwargs)
        moved = {name: t.to(self._device) for name, t in tensors.items()}
        return torch.func.functional_call(module, moved, args, kwargs)

    def _moved(self, value: Any) -> Any:
        if self._device is None:
            return value
        return to_device(value, self._device)

    def _ending(self, node: fx.Node) -> list[fx.Node]:
        """Values that nobody needs once `node` is executed, that of the node itself included."""
        graph_module, executed, candidates = self._graph_module, self._executed, {*self.alive, node}
        return [n for n in candidates if all(r in executed for r in readers(graph_module, n))]

    def _farthest(
        self, in_memory: dict[fx.Node, dict[int, None]], pinned: frozenset[Key]
    ) -> Key | None:
        """Choose the value whose next use is farthest: by node, then by call."""
        later = sorted(in_memory, key=self._next_use, reverse=True)
        for node in later:
            reads_now, _ = self._later[node]
            # the node being executed reads these soon: at the calls that are still to come
            past = (c for c in in_memory[node] if not reads_now or c <= self._call)
            call = max((c for c in past if (node, c) not in pinned), default=None)
            if call is not None:
                return node, call
        soon = [(max(in_memory[node]), index) for index, node in enumerate(later)]
        call, index = max(soon, default=(-1, -1))
        return (later[index], call) if call > self._call else None

    def _next_use(self, node: fx.Node) -> int:
        """Return the position of the first reader behind the node being executed.

        It is noted together with whether the node being executed is a reader too.
        """
        if node not in self._later:
            now = self._position(self._pending)
            ahead = [self._position(r) for r in readers(self._graph_module, node)]
            after = min((p for p in ahead if p > now), default=now)
            self._later[node] = (now in ahead, after)
        return self._later[node][1]

    def _position(self, node: fx.Node | None) -> int:
        assert node is not None
        if node not in self._positions:  # also after nodes were inserted
            nodes = self._graph_module.graph.nodes
            self._positions = {n: index for index, n in enumerate(nodes)}
        return self._positions[node]

    def _cost_of(self, node: fx.Node) -> Callable[[Sizes], int]:
        return lambda sizes: node_cost(self._graph_module, node, sizes)

    def _stage_of(self, name: str | None) -> Stage:
        if name is None:
            return stage(None)
        nodes = self._graph_module.graph.nodes
        total = sum(sum(per_call(self._sizes, self._cost_of(node))) for node in nodes)
        total += sum(self._before.values())
        return stage(name, total=total, unit="MAC")


def _check(graph_module: fx.GraphModule, calls: Sequence[Mapping[str, Any]]) -> None:
    if not len(calls):
        raise CalibrationError("there are no calls to walk over; record at least one")
    for node in graph_module.graph.nodes:
        if writes_in_place(graph_module, node):
            raise DialectError(
                f"node {node.name} ({node.op} {node.target}) writes into its input, which would "
                "change values that are still to be read; use the form that returns a new tensor"
            )
        if node.op == "placeholder" and not node.args:
            for index, call in enumerate(calls):
                if node.target not in call:
                    raise CalibrationError(
                        f"call {index} lacks the argument {node.target!r}; it has {sorted(call)}"
                    )


def _attribute(graph_module: fx.GraphModule, target: str) -> Any:
    value: Any = graph_module
    for name in target.split("."):
        value = getattr(value, name)
    return value.detach() if isinstance(value, Tensor) else value
