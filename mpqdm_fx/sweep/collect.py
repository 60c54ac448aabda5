"""What a layer reads in both lanes: rows at the same positions of the same calls."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.graph.lanes import float_of, twin_of
from mpqdm_fx.graph.layers import output_positions, sample_rows, weight_layers
from mpqdm_fx.graph.same_values import value_key
from mpqdm_fx.numerics.solve.gram import kept_rows
from mpqdm_fx.numerics.solve.layer_rows import LayerRows
from mpqdm_fx.run.walk import Walk
from mpqdm_fx.sweep.draws import RowDraw
from mpqdm_fx.sweep.shards import Shards

__all__ = [
    "CallRows",
    "collect_rows",
    "join_rows",
    "readers_of_inputs",
    "residual_of",
    "rows_key",
    "rows_of_all_calls",
    "seeded",
]

_VIEWS = frozenset(
    {
        torch.ops.aten.view.default,
        torch.ops.aten.reshape.default,
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.transpose.int,
        torch.ops.aten.permute.default,
        torch.ops.aten.unsqueeze.default,
        torch.ops.aten.squeeze.dim,
        torch.ops.aten.flatten.using_ints,
        torch.ops.aten.contiguous.default,
    }
)
_ADDS = frozenset({torch.ops.aten.add.Tensor})


@dataclass(frozen=True, kw_only=True)
class CallRows:
    """Rows of one call: quantized-lane inputs, the shift to the float lane, the residual's error.

    Attributes:
        inputs: float32 [P, K] or [P, G, K].
        shift: X - X_hat, same shape, or None.
        positions: int64 [P], flat output positions the rows belong to.
        stands_for: How many rows of its sample each stands for, float32 [P].
        total: Output positions of the whole call.
    """

    inputs: Tensor
    shift: Tensor | None
    positions: Tensor
    stands_for: Tensor
    total: int


def rows_key(graph_module: fx.GraphModule, node: fx.Node, module: nn.Module) -> object:
    """Equal for calls whose rows are equal: one input (`value_key`), one receptive field."""
    geometry = "linear"
    if not isinstance(module, nn.Linear):
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        geometry = str([getattr(module, name) for name in names])
    return (value_key(graph_module, node), geometry)


def readers_of_inputs(graph_module: fx.GraphModule) -> dict[str, list[str]]:
    """All layers that read the rows that a layer reads, itself among them, by its name.

    Args:
        graph_module: Normalized float graph.
    """
    together: dict[object, list[str]] = {}
    readers = {}
    for name, layer in weight_layers(graph_module).items():
        source = layer.nodes[0].args[0]
        assert isinstance(source, fx.Node)
        group = together.setdefault(rows_key(graph_module, source, layer.module), [])
        group.append(name)
        readers[name] = group
    return readers


def collect_rows(
    graph_module: fx.GraphModule,
    walk: Walk,
    module: nn.Module,
    twin: fx.Node,
    *,
    max_rows: int,
    seed: int,
    shards: Shards,
    weights: Sequence[Tensor],
) -> list[CallRows]:
    """Sample the rows that a weight layer reads, in both lanes, from every call.

    Args:
        graph_module: Graph with two lanes.
        walk: Its walk, about to execute `twin`.
        module: The layer.
        twin: The layer's call in the quantized lane.
        max_rows: Rows over all calls of all processes.
        seed: Of the positions; beside the weights they depend on the call's index and the layer's
            input alone.
        shards: Which calls are here; rows of the others are fetched.
        weights: How much each sample counts [B], for every call of all processes: more rows are
            taken of those that count more.

    Returns:
        One entry per call, in global order.
    """
    lane_input = twin.args[0]
    assert isinstance(lane_input, fx.Node)
    float_input = float_of(graph_module, lane_input) or lane_input
    batches = [len(weight) for weight in weights]
    draw: RowDraw | None = None
    rows = []
    lanes = zip(walk.values(lane_input), _float_values(walk, float_input, lane_input), strict=True)
    for index, (x_hat, x) in zip(shards.indices, lanes, strict=True):
        total = output_positions(module, x_hat)
        if draw is None:
            count = rows_of_all_calls(module, x_hat, batches, index, max_rows)
            shared = total % batches[index] != 0
            # a call whose samples share a value is one sample
            counted = [weight.mean(dim=0, keepdim=True) for weight in weights]
            each = total if shared else total // batches[index]
            draw = RowDraw.of(counted if shared else weights, each, count)
        generator = seeded(seed, float_input.name, index)
        positions = draw.positions(index, total, generator)
        inputs = sample_rows(module, x_hat, positions=positions).float()
        shift = None
        if x is not None:
            # The difference first, in the lanes' precision: X and X_hat are close.
            shift = sample_rows(module, x, positions=positions).float() - inputs
        rows.append(
            CallRows(
                inputs=inputs,
                shift=shift,
                positions=positions,
                stands_for=draw.stands_for(index, positions, total),
                total=total,
            )
        )
    return shards.gather(rows)


def rows_of_all_calls(
    module: nn.Module, x: Tensor, batches: Sequence[int], index: int, max_rows: int
) -> int:
    """How many rows a layer takes from all calls at most.

    Args:
        module: The layer.
        x: What it reads at one call.
        batches: Batch size of every call.
        index: Which call `x` is of.
        max_rows: The most rows over all calls.
    """
    total = output_positions(module, x)
    shared = total % batches[index] != 0  # by all samples of a call
    available = total * len(batches) if shared else total // batches[index] * sum(batches)
    return kept_rows(_row_width(module), available, max_rows)


def seeded(seed: int, name: str, index: int) -> torch.Generator:
    """A generator for the rows of one call.

    Args:
        seed: The run's seed.
        name: Of the float node that is read.
        index: Of the call; nothing else matters.
    """
    hashed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    mixed = ((seed << 40) ^ hashed ^ (index << 20)) % 2**63  # large seeds keep their lower bits
    return torch.Generator().manual_seed(mixed)


def _float_values(walk: Walk, node: fx.Node, lane: fx.Node) -> Iterable[Any]:
    return (None for _ in walk.values(lane)) if node is lane else walk.values(node)


def _row_width(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return math.prod(weight.shape[1:])


def join_rows(
    calls: Sequence[CallRows],
    residuals: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    wanted: Iterable[int],
) -> LayerRows:
    """Rows of some of the calls as one matrix.

    Args:
        calls: From `collect_rows`.
        residuals: The residual's error at the rows of each call [P, O], or None.
        weights: How much the rows of each call count [P].
        wanted: Indices of the calls; of none, there are no rows.
    """
    parts = [
        LayerRows(
            inputs=call.inputs,
            shift=call.shift,
            residual=None if residuals is None else residuals[index],
            weights=weights[index],
        )
        for index, call in enumerate(calls)
    ]
    indices = list(wanted)
    if not indices:
        return parts[0].take(slice(0, 0))
    return LayerRows.join([parts[index] for index in indices])


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """A layer whose output, seen through views, is added to a value that is known already."""

    views: tuple[fx.Node, ...]
    other: fx.Node


def residual_of(
    graph_module: fx.GraphModule,
    walk: Walk,
    call: fx.Node,
    calls: Sequence[CallRows],
    shards: Shards,
) -> list[Tensor] | None:
    """Error of the value that a layer's output is added to, at the sampled rows.

    Args:
        graph_module: Graph with two lanes.
        walk: Its walk, about to execute the twin of `call`.
        call: The layer's call in the float lane; it has been executed.
        calls: The sampled rows of all calls.
        shards: Which calls are here.

    Returns:
        Float minus quantized lane, float32 [P, O] per call; None if the output is no summand, or
        the other summand is not known yet, is no tensor of its shape, or has no error.
    """
    writer = _writer(graph_module, call)
    if writer is None:
        return None
    twin = twin_of(graph_module, writer.other)
    sizes = {source for view in writer.views for source in view.all_input_nodes[1:]}
    if twin is None or not {writer.other, twin, *sizes} <= set(walk.alive):
        return None
    linear = isinstance(graph_module.get_submodule(str(call.target)), nn.Linear)
    errors = []
    values = zip(walk.values(call), walk.values(writer.other), walk.values(twin), strict=True)
    arguments = _arguments(walk, sorted(sizes, key=str), len(shards.indices))
    for index, (y, r, r_hat), environment in zip(shards.indices, values, arguments, strict=True):
        at = torch.arange(y.numel()).reshape(y.shape)
        for view in writer.views:
            args: Any = fx.node.map_arg(view.args[1:], environment.__getitem__)
            at = view.target(at, *args, **view.kwargs)  # type: ignore[operator]
        if at.shape != r.shape:
            return None
        error = torch.empty(y.numel(), dtype=torch.float32)
        error[at.flatten()] = (r.float() - r_hat.float()).flatten()
        error = error.reshape(y.shape)
        error = error if linear else error.movedim(1, -1)
        errors.append(error.reshape(-1, error.shape[-1])[calls[index].positions])
    return shards.gather(errors)


def _arguments(walk: Walk, sizes: Sequence[fx.Node], count: int) -> list[dict[fx.Node, Any]]:
    """The values of sizes at each of `count` calls."""
    columns = [list(walk.values(size)) for size in sizes]
    return [
        {size: column[call] for size, column in zip(sizes, columns, strict=True)}
        for call in range(count)
    ]


def _writer(graph_module: fx.GraphModule, call: fx.Node) -> _Writer | None:
    """Follow a float-lane call through views to an addition."""
    views: list[fx.Node] = []
    node = call
    while True:
        users = [user for user in node.users if not _reads_shape(user)]
        users = [user for user in users if float_of(graph_module, user) is user]
        if len(users) != 1:
            return None
        (user,) = users
        if user.target in _ADDS and user.kwargs.get("alpha", 1) == 1:
            others = [arg for arg in user.args[:2] if arg is not node]
            if len(others) == 1 and isinstance(others[0], fx.Node):
                return _Writer(views=tuple(views), other=others[0])
            return None
        if user.target not in _VIEWS or user.args[0] is not node:
            return None
        views.append(user)
        node = user


def _reads_shape(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)
