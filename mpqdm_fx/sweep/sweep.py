"""The sweep: one walk over a graph with two lanes that quantizes each layer where it meets it.

At a quantizer it finds the range of what the quantized lane holds there. At a weight layer it has
the layer's input in both lanes: it decides the bits (or takes them from a plan), corrects the
weights for the error that reaches the layer, rounds them, refits the bias and installs the rounded
layer in the quantized lane, so that everything behind sees it. Each node runs once per lane and
call, however deep the model is.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.bits.allocate import (
    Limits,
    check_weight,
    decide_layer,
    even_levels,
    fixed_plan,
)
from mpqdm_fx.bits.output_powers import output_powers
from mpqdm_fx.calibration.ranges import search_by_noise_level, search_static
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.lanes import error_lane_name, install_in_lane
from mpqdm_fx.graph.layers import WeightLayer, weight_layers
from mpqdm_fx.graph.noise_argument import noise_levels_of
from mpqdm_fx.graph.quantizer_sites import (
    QuantizerSite,
    quantizer_sites,
    read_activations,
    set_site_ranges,
    site_ranges,
)
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.records.activations import Activation, ActivationRange
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.run.cost import bind_sizes, node_cost
from mpqdm_fx.run.walk import Walk
from mpqdm_fx.sweep.build_lanes import two_lanes
from mpqdm_fx.sweep.checkpoint import Checkpoint
from mpqdm_fx.sweep.coded import solve_coded_layer, solve_coded_table
from mpqdm_fx.sweep.collect import (
    CallRows,
    collect_rows,
    join_rows,
    readers_of_inputs,
    residual_of,
    rows_key,
)
from mpqdm_fx.sweep.layer_work import layer_work
from mpqdm_fx.sweep.plain_rounding import Extremes, reads_extremes
from mpqdm_fx.sweep.preparation import Preparation
from mpqdm_fx.sweep.problem import LayerData
from mpqdm_fx.sweep.shards import Shards
from mpqdm_fx.sweep.solve import LayerSolution, solve_layer, solve_table

__all__ = ["Sweep", "install_solution"]

logger = logging.getLogger(__name__)

_CACHED = 64 * 2**20  # bytes of rows kept for layers that read the same value later
_DECISION_ROWS = 2048


def install_solution(module: nn.Module, solution: LayerSolution) -> nn.Module:
    """A copy of a layer with the codes and the bias of a solution."""
    rounded = install_codes(module, solution.codes, solution.scale)
    if solution.bias is not None:
        old = module.bias
        assert isinstance(old, Tensor)
        rounded.bias = nn.Parameter(solution.bias.to(old), requires_grad=False)
    return rounded


@dataclass
class _Pending:
    """A layer that waits for its first call in the quantized lane."""

    layer: WeightLayer
    call: fx.Node


class Sweep:
    """Quantizes the layers of a graph in running order; an iterator over the nodes of two lanes.

    Looping runs it: each node is yielded before it is executed, with everything before it done.
    Stop anywhere, print `graph_module`, read `delta(node)`, and go on with another loop.

    Args:
        graph_module: Normalized float graph; it is not changed.
        calls: Calibration calls of this process, in order (see `Shards`).
        settings: The run's settings.
        limits: Layers off the budget.
        prepared: What was decided beforehand; None for nothing: each layer decides its own bits,
            its rows count alike, and its activation is of the settings' mode.
        validation: Global indices of the calls that are held out to choose strengths.
        shards: Calls of this process among all; by default all are here.
        checkpoint: Where solved layers are kept, or None.
        max_memory: Bytes of activations held in memory.
        half: Hold activations as float16.
        progress: Label of a progress bar; None for none.
        device: Where activations and solutions are computed; by default where the model is.

    Attributes:
        source: The float graph.
        calls: Calibration calls of this process.
        shards: Which of all calls they are.
        limits: Layers off the budget.
        prepared: What was decided beforehand.
        graph_module: The graph of two lanes; the quantized lane's layers sit under `error_lane.`.
        solutions: Solved layers by name, in running order.
        noise_levels: Groups of noise levels, or None.
        extremes: Of the float lane, for plain rounding; None where it has no ranges of its own.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        calls: Sequence[Mapping[str, Any]],
        settings: MPQConfig,
        *,
        limits: Limits,
        prepared: Preparation | None = None,
        validation: Sequence[int] = (),
        shards: Shards | None = None,
        checkpoint: Checkpoint | None = None,
        max_memory: int | None = None,
        half: bool = False,
        progress: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.source = graph_module
        self.calls = calls
        self.settings = settings
        self.solutions: dict[str, LayerSolution] = {}
        self.limits = limits
        self.prepared = prepared or Preparation.nothing(graph_module)
        self.shards = shards or Shards(rank=0, world=1, total=len(calls))
        self._validation = frozenset(validation)
        self._checkpoint = checkpoint
        levels = self.shards.gather(noise_levels_of(graph_module, calls, settings))
        self._groups = self.shards.gather(
            [self.prepared.row_weights.groups.of_samples(call) for call in calls]
        )
        self.graph_module, self.noise_levels = two_lanes(
            graph_module, levels, settings, limits.skipped, self.prepared.choices
        )
        self._sites = quantizer_sites(self.graph_module)
        self._ranges: dict[object, tuple[ActivationRange, ...]] = {}
        self._rows: dict[object, list[CallRows]] = {}
        self._waiting = self._pending_layers()
        self._readers = readers_of_inputs(graph_module)
        fixed = settings.judge and self.noise_levels is None and reads_extremes(settings)
        self.extremes = Extremes(self.prepared.original) if fixed else None
        self.walk = Walk(
            self.graph_module,
            calls,
            max_memory=max_memory,
            half=half,
            progress=progress,
            before=self._work(calls[0]) if progress else None,
            device=device,
        )

    def __iter__(self) -> Iterator[fx.Node]:
        """Return the sweep itself: a second loop goes on where the first one stopped."""
        return self

    @plain_torch()
    def __next__(self) -> fx.Node:
        """Execute the node that was yielded last, prepare the next one and yield it."""
        node = next(self.walk)
        if self.extremes is not None:
            self.extremes.see(self.walk, node)
        if node in self._sites:
            self._set_range(self._sites[node])
        if node in self._waiting:
            self._solve(node, self._waiting.pop(node))
        return node

    def run(self) -> None:
        """Go on to the end."""
        for _ in self:
            pass

    def output_powers(self, graph_module: fx.GraphModule | None) -> Tensor:
        """Energy of the output and of its error on the held-out calls, by noise level.

        Args:
            graph_module: A quantized graph; None for the quantized lane, once the sweep is over.

        Returns:
            float64 [G, 2] as of `judgement.output_powers`, sums over the calls of all processes;
            over all calls if none is held out.
        """
        groups = self.prepared.row_weights.groups
        judges = self._validation or frozenset(range(self.shards.total))
        powers = []
        for index, call, pair in zip(
            self.shards.indices, self.calls, self.walk.outputs, strict=True
        ):
            if index not in judges:
                powers.append(torch.zeros(groups.count, 2, dtype=torch.float64))
                continue
            reference, output = pair
            if graph_module is not None:
                with torch.no_grad():
                    output = graph_module(**call)
            powers.append(output_powers(groups, call, reference, output))
        return torch.stack(self.shards.gather(powers)).sum(dim=0)

    def delta(self, node: fx.Node) -> float:
        """Relative error of a value in the quantized lane; see `Walk.delta`."""
        return self.walk.delta(node)

    @property
    def taken(self) -> frozenset[str]:
        """Layers that have the codes of the run that this one starts from."""
        return frozenset() if self.prepared.start is None else self.prepared.start.same

    @property
    def activations(self) -> dict[str, Activation]:
        """Activation by layer, once the sweep is over."""
        prefix = error_lane_name("")
        activations = read_activations(self.graph_module)
        return {name.removeprefix(prefix): activation for name, activation in activations.items()}

    def _pending_layers(self) -> dict[fx.Node, _Pending]:
        """What is to be solved, by the node of the quantized lane before which it is."""
        pending, nodes = {}, {node.name: node for node in self.graph_module.graph.nodes}
        for name, layer in weight_layers(self.source, embeddings=True).items():
            if name not in self.limits.skipped:
                check_weight(layer)
                call = nodes[layer.nodes[0].name]
                pending[nodes[call.meta["twin_node"]]] = _Pending(layer, call)
        return pending

    def _work(self, call: Mapping[str, Any]) -> dict[fx.Node, int]:
        """Multiply-adds of solving each layer, for the progress bar."""
        sizes = bind_sizes(self.source, call)
        work = {}
        for twin, pending in self._waiting.items():
            layer = pending.layer
            macs = node_cost(self.source, layer.nodes[0], sizes) * self.shards.total
            positions = macs // max(1, layer.weight.numel())
            work[twin] = layer_work(layer, positions, self.settings).weight
        return work

    def _set_range(self, site: QuantizerSite) -> None:
        """Find the range of what the quantized lane holds at a quantizer."""
        if site.kind == "dynamic":
            return
        key = (site.key, site.bits)
        if key not in self._ranges:
            try:
                self._ranges[key] = self._search_range(site)
            except CalibrationError as error:
                layer, side = site.key
                name = layer.removeprefix(error_lane_name(""))
                raise CalibrationError(f"{name}, {side}: {error}") from error
        set_site_ranges(self.graph_module, site.node, self._ranges[key])

    def _search_range(self, site: QuantizerSite) -> tuple[ActivationRange, ...]:
        values = self.shards.stream(self.walk.values(site.value))
        seed, old = self.settings.seed, site_ranges(self.graph_module, site.node)
        assert old is not None
        fitted = bool(old[0].levels)
        if site.kind == "static":
            return (search_static(values, site.bits, seed, fitted=fitted),)
        assert self.noise_levels is not None
        group = site.node.args[1]
        assert isinstance(group, fx.Node)
        groups = self.shards.stream(self.walk.values(group))
        count = self.noise_levels.count
        return search_by_noise_level(values, groups, site.bits, count, seed, fitted=fitted)

    def _solve(self, twin: fx.Node, pending: _Pending) -> None:
        """Quantize one layer and install it in the quantized lane."""
        layer, checkpoint, budget = pending.layer, self._checkpoint, self.prepared.budget
        solution = self.shards.once(lambda: self._known(layer))
        if solution is None:
            solution = self._solution(twin, pending)
            if checkpoint and self.shards.rank == 0:
                checkpoint.save(solution)
        else:
            self._check_bits(solution)
            # taken layers have been taken from the budget before the first one was solved
            if budget is not None and solution.plan.coded and layer.name not in self.taken:
                budget.take(layer.name, solution.plan.storage.total)
        self.solutions[layer.name] = solution
        module = self.graph_module.get_submodule(str(twin.target))
        install_in_lane(self.graph_module, layer.name, install_solution(module, solution))

    def _known(self, layer: WeightLayer) -> LayerSolution | None:
        """What this run solved before it was killed, or the run that it starts from; else None."""
        checkpoint, start = self._checkpoint, self.prepared.start
        solution = checkpoint.load(layer) if checkpoint else None
        if solution is None and start is not None and layer.name in start.same:
            solution = start.load(layer)
            if checkpoint:
                checkpoint.save(solution)
        return solution

    def _check_bits(self, solution: LayerSolution) -> None:
        """Refuse a kept layer of another allocation: together they would miss the budget."""
        planned = (self.prepared.plans or {}).get(solution.plan.name)
        if planned is not None and planned.bits != solution.plan.bits:
            raise ConfigError(
                f"{planned.name}: was solved with {solution.plan.mean_bits:.3f} bits before, and "
                f"these sensitivities give it others ({planned.mean_bits:.3f}); give the "
                f"sensitivity file of the run that was killed, or start anew"
            )

    def _solution(self, twin: fx.Node, pending: _Pending) -> LayerSolution:
        layer = pending.layer
        if isinstance(layer.module, nn.Embedding):
            plan = self._fixed(layer) or fixed_plan(layer, 8, "embedding table")
            budget = self.prepared.budget
            if plan.coded is not None and budget is not None:
                return self.shards.once(lambda: solve_coded_table(layer, plan, budget))
            return solve_table(layer.weight, plan)
        data = self._data(twin, pending)
        return self.shards.once(lambda: self._solve_with(layer, data))

    def _solve_with(self, layer: WeightLayer, data: LayerData) -> LayerSolution:
        try:
            plan = self._fixed(layer)
            if plan is None:
                # from all calls alike: they may come in the order of the runs
                stride = slice(None, None, -(-len(data.train.inputs) // _DECISION_ROWS) or 1)
                rows = data.train.inputs[stride]
                exact = rows
                if data.train.shift is not None:
                    exact = rows + data.train.shift[stride]
                plan = decide_layer(layer, exact, rows, self.settings)
            budget = self.prepared.budget
            if plan.coded is not None and budget is not None:
                return solve_coded_layer(layer.module, plan, data, self.settings, budget)
            return solve_layer(layer.module, plan, data, self.settings)
        except CalibrationError as error:
            kind, shape = type(layer.module).__name__, tuple(layer.weight.shape)
            raise CalibrationError(f"{layer.name} ({kind}, weight {shape}): {error}") from error

    def _fixed(self, layer: WeightLayer) -> LayerPlan | None:
        if self.prepared.plans is not None and layer.name in self.prepared.plans:
            return self.prepared.plans[layer.name]
        if layer.name in self.limits.fixed:
            levels = even_levels(layer, self.settings)
            return fixed_plan(layer, *self.limits.fixed[layer.name], levels)
        return None

    def _data(self, twin: fx.Node, pending: _Pending) -> LayerData:
        """Rows of the layer, shared by the layers that read the same value."""
        key = rows_key(self.graph_module, twin.args[0], pending.layer.module)  # type: ignore[arg-type]
        name, row_weights = pending.layer.name, self.prepared.row_weights
        calls = self._rows.get(key)
        if calls is None:
            calls = collect_rows(
                self.graph_module,
                self.walk,
                pending.layer.module,
                twin,
                max_rows=self.settings.max_rows,
                seed=self.settings.seed,
                shards=self.shards,
                weights=[
                    row_weights.of_input(self._readers[name], groups) for groups in self._groups
                ],
            )
            self._remember(key, calls)
        residuals = None
        if self.settings.propagation == "auto" and self.settings.residuals:
            residuals = residual_of(self.graph_module, self.walk, pending.call, calls, self.shards)
        train = [i for i in range(self.shards.total) if i not in self._validation]
        weights = [
            row_weights.of_rows(name, groups, rows.positions, rows.total) * rows.stands_for
            for groups, rows in zip(self._groups, calls, strict=True)
        ]
        return LayerData(
            train=join_rows(calls, residuals, weights, train),
            validation=join_rows(calls, residuals, weights, sorted(self._validation)),
        )

    def _remember(self, key: object, calls: list[CallRows]) -> None:
        self._rows[key] = calls
        sizes = {k: sum(c.inputs.nbytes * 2 for c in rows) for k, rows in self._rows.items()}
        for old in list(self._rows)[:-1]:  # the newest always stays: to_k follows to_q
            if sum(sizes.values()) <= _CACHED:
                break
            sizes.pop(old)
            self._rows.pop(old)
