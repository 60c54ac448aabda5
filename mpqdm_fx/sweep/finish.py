"""Run a sweep to its end, compare what it made with plain rounding, and write down the result."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from mpqdm_fx.bits.allocate import even_levels, fixed_plan
from mpqdm_fx.bits.pinning import pinned_layers
from mpqdm_fx.calibration.count import bit_plan, tell_remarks
from mpqdm_fx.graph.editing import copy_graph_module
from mpqdm_fx.graph.lanes import error_lane_name
from mpqdm_fx.graph.layers import replace_module, weight_layers
from mpqdm_fx.io.progress import stage
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import Activation, NoiseLevels
from mpqdm_fx.records.plan import BitPlan, LayerPlan
from mpqdm_fx.records.report import ActivationChoice, Judgement, LayerReport
from mpqdm_fx.sweep.plain_rounding import plain_activations, plain_weights
from mpqdm_fx.sweep.solve import LayerSolution
from mpqdm_fx.sweep.sweep import Sweep

__all__ = ["RECIPE", "GraphQuantization", "finish"]

RECIPE = "the recipe"
"""Name of what the settings ask for, among the ways to round that are compared."""

_NOTHING = torch.empty(0)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GraphQuantization:
    """What quantizing a graph gave.

    Attributes:
        rounded: Graph with rounded weights and refitted biases; activations are float.
        plan: Bits of every channel, and what stayed in float.
        activations: How each layer's activations are quantized.
        noise_levels: Groups of noise levels, for ranges by noise level.
        layers: One report per layer, in running order.
        choices: How each input is quantized and what that costs, where it was measured.
        judged: The recipe and plain rounding at the model's output; empty if they were not
            compared.
        taken: Layers with the codes of the run that this one started from.
    """

    rounded: fx.GraphModule
    plan: BitPlan
    activations: Mapping[str, Activation]
    noise_levels: NoiseLevels | None
    layers: tuple[LayerReport, ...]
    choices: tuple[ActivationChoice, ...]
    judged: tuple[Judgement, ...] = ()
    taken: frozenset[str] = frozenset()


def finish(sweep: Sweep) -> GraphQuantization:
    """Run a sweep to its end and write down the result.

    Args:
        sweep: From `start_sweep`, at any node.
    """
    sweep.run()
    _tell_short(sweep)
    result = _swept(sweep)
    if not sweep.settings.judge:
        return result
    with stage("judging" if sweep.shards.rank == 0 else None):
        return _judged(sweep, result)


def _swept(sweep: Sweep) -> GraphQuantization:
    """What the sweep made."""
    graph_module, limits = sweep.source, sweep.limits
    rounded = copy_graph_module(graph_module)
    for name in sweep.solutions:
        # The very modules of the quantized lane: a large model is not held three times.
        module = sweep.graph_module.get_submodule(error_lane_name(name))
        replace_module(rounded, name, module)
    order = list(weight_layers(graph_module, embeddings=True))
    plan = bit_plan(
        graph_module,
        rounded,
        (sweep.solutions[name].plan for name in order if name in sweep.solutions),
        limits.skipped,
        activation_bits=sweep.settings.activation_bits,
    )
    tell_remarks(plan)
    return GraphQuantization(
        rounded=rounded,
        plan=plan,
        activations=sweep.activations,
        noise_levels=sweep.noise_levels,
        layers=tuple(_report(layer, sweep.solutions[layer.name]) for layer in plan.layers),
        choices=sweep.prepared.choices,
        taken=sweep.taken,
    )


def _judged(sweep: Sweep, result: GraphQuantization) -> GraphQuantization:
    """The sweep's result, or plain rounding where that errs less on the held-out calls."""
    settings, graph_module = sweep.settings, sweep.prepared.original
    plans = [_uniform(plan) for plan in result.plan.layers]
    candidates = {"plain rounding with the same bits": plans}
    if sweep.prepared.budget is not None:  # no width is the same
        candidates = {}
    even = _even_plans(sweep, graph_module)
    if even is not None:
        candidates[f"plain rounding with {settings.weight_bits} bits"] = even
    activations, levels = result.activations, result.noise_levels
    if levels is None:
        activations = plain_activations(
            graph_module,
            sweep.calls,
            settings,
            sweep.shards,
            sweep.limits.skipped,
            sweep.extremes,
        )
    quantize = QuantizeActivations(ranges=activations, noise_levels=levels)
    quantized = quantize(graph_module).graph_module
    judged = [Judgement.of(RECIPE, sweep.output_powers(None))]
    for name, layers in candidates.items():
        rounded = plain_weights(quantized, layers, lazy=True)
        judged.append(Judgement.of(name, sweep.output_powers(rounded)))
    best = min(range(len(judged)), key=lambda index: judged[index].error)
    judgements = tuple(replace(j, chosen=index == best) for index, j in enumerate(judged))
    if not best:
        return replace(result, judged=judgements)
    logger.warning(
        "on held-out calls %s errs less at the model's output than the recipe (%.2f against %.2f "
        "dB): all of its corrections are turned off; more calibration calls would help",
        judged[best].recipe, judged[best].decibels, judged[0].decibels,
    )  # fmt: skip
    plans = candidates[judged[best].recipe]
    rounded = plain_weights(graph_module, plans)
    plan = bit_plan(
        graph_module, rounded, plans, sweep.limits.skipped, activation_bits=settings.activation_bits
    )
    return GraphQuantization(
        rounded=rounded,
        plan=plan,
        activations=activations,
        noise_levels=levels,
        layers=tuple(_report(layer, None) for layer in plan.layers),
        choices=(),
        judged=judgements,
    )


def _uniform(plan: LayerPlan) -> LayerPlan:
    levels = plan.levels if plan.levels == "int4" else "uniform"
    return replace(plan, levels=levels, fraction=0.0)


def _even_plans(sweep: Sweep, graph_module: fx.GraphModule) -> list[LayerPlan] | None:
    """Equal bits in all layers that share the budget; None where it is none of `weight_bits`."""
    settings, limits = sweep.settings, sweep.limits
    has_budget = settings.effective_bits is not None or settings.weight_bytes is not None
    if settings.allocation != "measured" or has_budget:
        return None
    pinned = pinned_layers(graph_module)
    bits = {name: (8 if name in pinned else settings.weight_bits, None) for name in sweep.solutions}
    return [
        fixed_plan(layer, *{**bits, **limits.fixed}[name], even_levels(layer, settings))
        for name, layer in weight_layers(graph_module, embeddings=True).items()
        if name in sweep.solutions
    ]


def _tell_short(sweep: Sweep) -> None:
    """Say which layers had fewer rows than numbers in a row, and what was done."""
    rows = {name: solution.rows for name, solution in sweep.solutions.items()}
    numbers = {
        name: solution.plan.num_weights // solution.plan.shape[0]
        for name, solution in sweep.solutions.items()
    }
    short = [name for name in rows if 0 < rows[name] < numbers[name]]
    if short:
        worst = min(short, key=lambda name: rows[name] / numbers[name])
        logger.info(
            "%d layers had fewer calibration rows than inputs (%s: %d rows of %d numbers); their "
            "second moments are damped and corrections are chosen on held-out calls; more calls "
            "would help",
            len(short),
            worst,
            rows[worst],
            numbers[worst],
        )


def _report(plan: LayerPlan, solution: LayerSolution | None) -> LayerReport:
    """What became of a layer; without a solution it was rounded plainly."""
    if solution is None:
        solution = LayerSolution(plan=plan, codes=_NOTHING, scale=_NOTHING, bias=None)
    measured = solution.rows > 0
    return LayerReport(
        name=plan.name,
        kind=plan.kind,
        shape=plan.shape,
        mean_bits=plan.mean_bits,
        bytes=sum(-(-part // 8) for part in plan.storage),
        sqnr_db=_decibels(solution.error) if measured else None,
        base_sqnr_db=_decibels(solution.base_error) if measured else None,
        alpha=solution.alpha,
        beta=solution.beta,
        damping=solution.damping,
        rows=solution.rows,
        refitted=solution.bias is not None,
        fraction=plan.fraction,
        reason=plan.reason,
    )


def _decibels(error: float) -> float:
    return -10 * math.log10(error) if error > 0 else math.inf
