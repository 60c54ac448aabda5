"""What is measured and decided before the sweep: bits, rows' weights, kinds of activations."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, fx

from mpqdm_fx.bits.activation_choice import choose_activations, options_of
from mpqdm_fx.bits.activation_costs import ActivationCosts
from mpqdm_fx.bits.activation_widths import choose_widths
from mpqdm_fx.bits.allocate import Limits, layer_limits
from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.probe import GradientWatch
from mpqdm_fx.bits.probed_parts import probed_parts
from mpqdm_fx.bits.probes import SAMPLES, OutputEnergies, output_energies
from mpqdm_fx.bits.row_weights import RowWeights
from mpqdm_fx.bits.weight_costs import weight_costs
from mpqdm_fx.graph.fingerprint import graph_fingerprint
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.graph.noise_argument import noise_levels_of
from mpqdm_fx.passes.quantize.scale_inputs import ScaleInputs
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.records.report import ActivationChoice
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.run.cost import bind_sizes
from mpqdm_fx.run.speed import InputOption
from mpqdm_fx.sweep.build_lanes import range_groups
from mpqdm_fx.sweep.checkpoint import Checkpoint
from mpqdm_fx.sweep.coded_budget import CodedBudget
from mpqdm_fx.sweep.measured_bits import (
    TABLE,
    coded_budget,
    mean_bits,
    measured_table,
    solve_budget,
)
from mpqdm_fx.sweep.shards import Shards
from mpqdm_fx.sweep.stored_run import StoredRun

__all__ = ["Preparation", "prepared_sweep", "started_sweep"]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a sweep is told.

    Attributes:
        plans: Bits by layer, where they are decided beforehand; else None.
        budget: What entropy-coded layers may take; None where widths are fixed.
        row_weights: How much the rows of each noise level count.
        choices: How each input is quantized, where that is measured; else empty.
        original: The float graph.
        graph_module: The graph that is quantized: the channels of inputs are scaled where that was
            chosen.
        start: An earlier run, whose layers are taken where the weights are that run's; or None.
    """

    plans: Mapping[str, LayerPlan] | None
    budget: CodedBudget | None
    row_weights: RowWeights
    choices: tuple[ActivationChoice, ...]
    original: fx.GraphModule
    graph_module: fx.GraphModule
    start: StoredRun | None = None

    @classmethod
    def nothing(cls, graph_module: fx.GraphModule) -> Self:
        """Nothing is decided: each layer decides its own bits, and its rows count alike."""
        return cls(
            plans=None,
            budget=None,
            row_weights=RowWeights(groups=NoiseGroups.one(), energies={}),
            choices=(),
            original=graph_module,
            graph_module=graph_module,
        )


@dataclass(kw_only=True)
class _Probes:
    """One run of the probes for whatever is measured with them, made when it is first needed."""

    graph_module: fx.GraphModule
    calls: Sequence[Mapping[str, Any]]
    settings: MPQConfig
    groups: NoiseGroups
    measured: dict[Hashable, Any]
    _energies: OutputEnergies | None = None

    def energies(self, watch: GradientWatch | None = None) -> OutputEnergies:
        """What `output_energies` finds; a watch is shown the gradients of the first run."""
        if self._energies is None:
            self._energies = output_energies(
                self.graph_module,
                self.calls,
                seed=self.settings.seed,
                groups=self.groups,
                watch=watch,
                skipped=layer_limits(self.graph_module, self.settings).skipped,
            )
        return self._energies

    def choose(
        self, options: Sequence[InputOption], limits: Limits, run: RunOptions
    ) -> tuple[tuple[ActivationChoice, ...], dict[str, Tensor]]:
        """How each input is quantized, and the factors of those whose channels are scaled."""
        costs, energies = self._measured(options, run)
        if self.settings.measures_widths:
            sizes = bind_sizes(self.graph_module, self.calls[0])
            choices = choose_widths(
                self.graph_module,
                costs.units,
                costs.costs(),
                energies.output,
                self.settings,
                sizes,
                limits.skipped,
            )
            return choices, {}
        choices = choose_activations(
            self.graph_module,
            costs.units,
            costs.costs(),
            self._weight_costs(costs, energies, {option.exponent for option in options}, limits),
            energies.output,
            self.settings,
            bind_sizes(self.graph_module, self.calls[0]),
            limits.skipped,
        )
        unit_of = {name: unit for unit, names in costs.units.items() for name in names}
        factors = {
            name: costs.sizes.factor(unit_of[name], choice.exponent)
            for choice in choices
            if choice.exponent
            for name in choice.layers
        }
        return choices, factors

    def _measured(
        self, options: Sequence[InputOption], run: RunOptions
    ) -> tuple[ActivationCosts, OutputEnergies]:
        """Costs of the inputs and energies of the channels: the same for every budget."""
        without = replace(self.settings, weight_bits=8, effective_bits=None, weight_bytes=None)
        key = (graph_fingerprint(self.graph_module), without, self.groups, tuple(options), run.half)
        if key not in self.measured:
            levels = noise_levels_of(self.graph_module, self.calls, self.settings)
            probed = probed_parts(self.graph_module, self.calls, None, SAMPLES, self.groups)
            costs = ActivationCosts(
                self.graph_module,
                [part for part, _ in probed],
                self.settings,
                options,
                levels=range_groups(self.graph_module, levels, self.settings),
                max_memory=run.activation_memory,
                half=run.half,
            )
            self.measured[key] = costs, self.energies(costs)
        costs, self._energies = self.measured[key]
        return costs, self._energies

    def _weight_costs(
        self,
        costs: ActivationCosts,
        energies: OutputEnergies,
        exponents: Collection[float],
        limits: Limits,
    ) -> dict[str, dict[float, float]]:
        """What rounding the weights costs, by unit of inputs and exponent."""
        layers = weight_layers(self.graph_module)
        quantized = {name: layer for name, layer in layers.items() if name not in limits.skipped}
        return weight_costs(
            quantized,
            costs.units,
            costs.sizes,
            energies.channels,
            sorted(exponents),
            fixed={name: bits for name, (bits, _) in limits.fixed.items()},
            mean_bits=mean_bits(self.graph_module, self.settings, limits),
            feedback=self.settings.rounding != "nearest",
            seed=self.settings.seed,
        )


def prepared_sweep(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    settings: MPQConfig,
    *,
    limits: Limits,
    groups: NoiseGroups,
    checkpoint: Checkpoint | None,
    shards: Shards,
    measured: dict[Hashable, Any],
    run: RunOptions,
) -> Preparation:
    """Measure and decide; the first process does, for all.

    Args: as of `start_sweep`; `groups` are the noise levels of the calls, `measured` is what was
        measured of them already (`RecordedInputs.measured`).

    Raises:
        ConfigError: The budget is below what the smallest widths take.
        CalibrationError: Gradients or rows are not finite, or no gradient reaches a layer.
        ArtifactError: A file of sensitivities is damaged, or of another model.
    """
    weighed = groups if settings.row_weights == "output" else NoiseGroups.one()
    probes = _Probes(
        graph_module=graph_module, calls=calls, settings=settings, groups=weighed, measured=measured
    )
    options = options_of(settings)
    choices: tuple[ActivationChoice, ...] = ()
    factors: Mapping[str, Tensor] = {}
    if options:
        choices, factors = shards.once(lambda: probes.choose(options, limits, run))
    scaled = ScaleInputs(factors=factors)(graph_module).graph_module
    plans: Mapping[str, LayerPlan] | None = None
    budget: CodedBudget | None = None
    energies: Mapping[str, Tensor] = {}
    if settings.allocation == "measured":
        table = measured_table(
            graph_module,
            scaled,
            calls,
            settings,
            checkpoint,
            shards,
            groups=weighed,
            energies=probes.energies,
            path=None if run.sensitivity is None else Path(run.sensitivity),
            max_memory=run.activation_memory,
            half=run.half,
        )
        if settings.weight_storage == "entropy":
            plans, budget = coded_budget(scaled, table, settings, limits)
        else:
            plans = solve_budget(scaled, table, settings, limits)
        if checkpoint is not None and run.sensitivity is not None:
            # whoever goes on from this folder may not have that file
            replace(table, run=checkpoint.run).save(checkpoint.directory / TABLE)
        if settings.row_weights == "output":
            groups = table.groups
            energies = {layer.name: layer.by_group for layer in table.layers}
    elif weighed.count > 1:
        energies = shards.once(lambda: probes.energies().groups)
    return Preparation(
        original=graph_module,
        graph_module=scaled,
        plans=plans,
        budget=budget,
        row_weights=RowWeights(groups=groups, energies=energies),
        choices=choices,
    )


def started_sweep(
    graph_module: fx.GraphModule,
    start: StoredRun,
    settings: MPQConfig,
    *,
    limits: Limits,
    checkpoint: Checkpoint | None,
) -> Preparation:
    """What an earlier run decided: nothing is measured.

    Layers without fixed widths share what that run's layers of other weights took, and what it left
    over.

    Args:
        graph_module: Normalized float graph; inputs are not scaled yet.
        start: The earlier run.
        settings: The run's settings.
        limits: Layers off the budget.
        checkpoint: The run's own folder, or None.

    Raises:
        ConfigError: Bits were measured there, on weights that were next to nothing beside these.
    """
    scaled = ScaleInputs(factors=start.factors)(graph_module).graph_module
    if settings.allocation == "measured":
        start.check_sizes(weight_layers(scaled, embeddings=True))
    budget: CodedBudget | None = None
    if settings.allocation == "measured" and settings.weight_storage == "entropy":
        table = start.table()
        # its errors are those of that run's weights, and tell nothing with others'
        _, budget = coded_budget(scaled, table, settings, limits, energies=start.input_energies)
        for name, plan in start.plans.items():
            if name in start.same and plan.coded is not None:
                budget.take(name, plan.storage.total)
        if checkpoint is not None:
            replace(table, run=checkpoint.run).save(checkpoint.directory / TABLE)
    return Preparation(
        original=graph_module,
        graph_module=scaled,
        plans=start.plans,
        budget=budget,
        row_weights=start.row_weights,
        choices=start.choices,
        start=start,
    )
