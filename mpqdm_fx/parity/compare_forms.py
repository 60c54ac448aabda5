"""Run several forms of one model on the same inputs and compare them value by value."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.backends.xnnpack.inner_values import InnerValues
from mpqdm_fx.backends.xnnpack.reference import NUDGE, Nudged
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.progress import tracked
from mpqdm_fx.numerics.metrics import power_sums, ratio_db
from mpqdm_fx.parity.fused_values import fused_value, siblings
from mpqdm_fx.parity.ladder import Ladder, NodeParity, Rung
from mpqdm_fx.parity.sites import WEIGHT_OPS, Site, matching_sites, sites

__all__ = ["FormValues", "ModelForm", "measure"]

# Nudges of several times the rounding error of a sum, and two of them: a value next to a tie falls
# to the other side on another processor, and what that does to every layer behind is wanted here.
_NUDGES = (0, 1)
_NUDGE = 8 * NUDGE


@dataclass(frozen=True, kw_only=True)
class ModelForm:
    """One form of the model.

    Attributes:
        name: Rung's name.
        graph: Graph that takes the inputs in order; None if only outputs are known.
        run: Called with a call's number and its inputs in order, gives the outputs; None with a
            graph.
        inner: Beside `run`, what shows values inside; None if it is a graph or shows none.
        against: Earlier form that it is compared with; None for the one before.
        channels_last: Whether its images lie channels last. Of such a form and another one outputs
            alone are compared.
    """

    name: str
    graph: fx.GraphModule | None = None
    run: Callable[[int, Sequence[Any]], Sequence[Tensor]] | None = None
    inner: InnerValues | None = None
    against: str | None = None
    channels_last: bool = False

    def comparable_inside(self, before: "ModelForm") -> bool:
        """Whether values inside can be compared with those of an earlier form."""
        shown = self.graph is not None or self.inner is not None
        return shown and before.graph is not None and self.channels_last == before.channels_last


@dataclass(frozen=True, kw_only=True)
class FormValues:
    """A ladder without thresholds, and what thresholds are made of.

    Attributes:
        ladder: The ladder.
        stability: By rung and site, SQNR that nudging every value by the rounding error of sums
            leaves; under the site None for the outputs. Empty unless asked for.
        own_stability: The same where all values before are as they were.
        outputs: By rung, the outputs of every call.
    """

    ladder: Ladder
    stability: Mapping[str, Mapping[Site | None, float]]
    own_stability: Mapping[str, Mapping[Site, float]]
    outputs: Mapping[str, Sequence[Sequence[Tensor]]]


@dataclass
class _Powers:
    """Sums of squares of a reference and of the difference from it."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Tensor, test: Tensor) -> None:
        signal, noise = power_sums(reference, test)
        if math.isnan(noise):  # infinities of a mask are equal where they are the same
            same = reference.isinf() & (reference == test)
            signal, noise = power_sums(reference.masked_fill(same, 0), test.masked_fill(same, 0))
        self.signal += signal
        self.noise += noise

    @property
    def db(self) -> float:
        """Decibels; NaN if a value was."""
        return ratio_db(self.signal, self.noise)


class _Match(NamedTuple):
    """Nodes of the same value.

    Attributes:
        before: In the graph of the earlier form.
        after: In that of the later one, or in the graph that its inner values are shown by.
        source: The site's node in the earlier graph, which `before` lies behind where the later
            form holds the value with something fused into it.
    """

    before: fx.Node
    after: fx.Node
    source: fx.Node


@dataclass
class _Pair:
    """A form, what it is compared with, and the sums so far."""

    form: ModelForm
    before: ModelForm
    matches: dict[Site, _Match]
    nodes: dict[Site, _Powers] = field(default_factory=lambda: defaultdict(_Powers))
    own: dict[Site, _Powers] = field(default_factory=lambda: defaultdict(_Powers))
    shapes: dict[Site, tuple[int, ...]] = field(default_factory=dict)
    nudged: dict[Site | None, _Powers] = field(default_factory=lambda: defaultdict(_Powers))
    own_nudged: dict[Site, _Powers] = field(default_factory=lambda: defaultdict(_Powers))
    copied: _Powers = field(default_factory=_Powers)
    output: _Powers = field(default_factory=_Powers)
    quality: _Powers = field(default_factory=_Powers)


def measure(
    forms: Sequence[ModelForm],
    calls: Sequence[Sequence[Any]],
    *,
    notes: Sequence[str] = (),
    stability: bool = False,
) -> FormValues:
    """Compare each form with the one before, on all calls.

    Args:
        forms: The float model first.
        calls: Inputs in order, of each call.
        notes: Sentences for the ladder.
        stability: Also find how far rounding errors alone carry each value.
    """
    by_name = {form.name: form for form in forms}
    pairs = [
        _Pair(form=form, before=before, matches=_matches(before, form))
        for index, form in enumerate(forms[1:])
        for before in (by_name[form.against] if form.against else forms[index],)
    ]
    outputs: dict[str, list[Sequence[Tensor]]] = {form.name: [] for form in forms}
    with torch.no_grad():
        for number, inputs in enumerate(tracked(calls, "comparing forms")):
            values: dict[str, dict[fx.Node, Tensor]] = {}
            for form in forms:
                nodes = {
                    pair.matches[site][pair.form is form]
                    for pair in pairs
                    if form in (pair.form, pair.before)
                    for site in pair.matches
                }
                values[form.name], results, copied = _run(form, number, inputs, nodes)
                outputs[form.name].append(results)
                for pair in pairs:
                    if pair.form is form:
                        _compare(pair, inputs, values, outputs)
                        _add_all(pair.copied, results, copied)
                    if pair.before is form and stability:
                        _nudge(pair, inputs, values[form.name], results)
                ahead = forms[forms.index(form) + 1 :]
                needed = {pair.before.name for pair in pairs if pair.form in ahead}
                values = {name: tensors for name, tensors in values.items() if name in needed}
    rungs = [Rung(name=forms[0].name, against=None, float_db=math.inf, previous_db=None)]
    rungs += [_rung(pair) for pair in pairs]
    return FormValues(
        ladder=Ladder(
            rungs=tuple(rungs), calls=len(calls), notes=(*notes, *_lost(rungs), *_strayed(pairs))
        ),
        stability={p.form.name: {s: powers.db for s, powers in p.nudged.items()} for p in pairs},
        own_stability={
            p.form.name: {s: powers.db for s, powers in p.own_nudged.items()} for p in pairs
        },
        outputs=outputs,
    )


def _lost(rungs: Sequence[Rung]) -> list[str]:
    return [
        f"rung `{rung.name}` has no value to compare of {len(rung.unmatched)} layers: "
        f"{', '.join(rung.unmatched)}"
        for rung in rungs
        if rung.unmatched
    ]


def _strayed(pairs: Sequence[_Pair]) -> list[str]:
    return [
        f"rung `{pair.form.name}`: its values are those of a copy that shows them, whose outputs "
        f"have {pair.copied.db:.1f} dB against its own"
        for pair in pairs
        if pair.copied.db != math.inf
    ]


def _matches(before: ModelForm, after: ModelForm) -> dict[Site, _Match]:
    if not after.comparable_inside(before):
        return {}
    graph = after.inner.edge if after.inner is not None else after.graph
    assert before.graph is not None
    assert graph is not None
    result = {}
    for site, (left, right) in matching_sites(before.graph, graph).items():
        same: fx.Node | None = left
        if after.inner is not None:
            held = after.inner.held.get(right)
            same = None if held is None else fused_value(left, held)
        if same is not None:
            result[site] = _Match(same, right, left)
    return result


class _Keep(fx.Interpreter):
    """Keeps the values of some nodes, and goes on with other values where there are such."""

    nodes: set[fx.Node]
    instead: Mapping[fx.Node, Tensor]
    values: dict[fx.Node, Tensor]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.nodes and isinstance(result, Tensor):
            self.values[n] = result
        replacement = _as_shaped(self.instead[n], result) if n in self.instead else None
        # in the memory layout that the nodes behind expect
        return result if replacement is None else torch.empty_like(result).copy_(replacement)


class _KeepNudged(_Keep, Nudged):
    """The same in a graph whose values are nudged."""


def _run(
    form: ModelForm, number: int, inputs: Sequence[Any], nodes: set[fx.Node]
) -> tuple[dict[fx.Node, Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Values of nodes, outputs, and the outputs of what showed the values."""
    if form.graph is not None:
        values, outputs = _interpret(_Keep(form.graph), inputs, nodes)
        return values, outputs, outputs
    assert form.run is not None
    outputs = tuple(form.run(number, inputs))
    if form.inner is None:
        return {}, outputs, outputs
    copied, values = form.inner.run(inputs, nodes)
    return values, outputs, copied


def _interpret(
    interpreter: _Keep,
    inputs: Sequence[Any],
    nodes: set[fx.Node],
    instead: Mapping[fx.Node, Tensor] | None = None,
) -> tuple[dict[fx.Node, Tensor], tuple[Tensor, ...]]:
    interpreter.nodes, interpreter.instead, interpreter.values = nodes, instead or {}, {}
    outputs = pytree.tree_leaves(interpreter.run(*inputs))
    return interpreter.values, tuple(leaf for leaf in outputs if isinstance(leaf, Tensor))


def _compare(
    pair: _Pair,
    inputs: Sequence[Any],
    values: Mapping[str, Mapping[fx.Node, Tensor]],
    outputs: Mapping[str, Sequence[Sequence[Tensor]]],
) -> None:
    """Add one call to the sums of a pair."""
    before, after = values[pair.before.name], values[pair.form.name]
    alone = _alone(pair, inputs, before, after) if pair.matches else {}
    for site, (left, right, _) in pair.matches.items():
        value = after.get(right)
        reference = None if value is None else _as_shaped(before[left], value)
        if value is None or reference is None:
            continue
        pair.nodes[site].add(reference, value)
        pair.shapes[site] = tuple(value.shape)
        if pair.form.graph is not None:
            pair.own[site].add(reference, alone[right])
        else:
            pair.own[site].add(alone[left].reshape(value.shape), value)
    first = next(iter(outputs.values()))[-1]
    results = outputs[pair.form.name][-1]
    for sums, targets in ((pair.output, outputs[pair.before.name][-1]), (pair.quality, first)):
        _check_outputs(pair, targets, results)
        _add_all(sums, targets, results)


def _alone(
    pair: _Pair,
    inputs: Sequence[Any],
    before: Mapping[fx.Node, Tensor],
    after: Mapping[fx.Node, Tensor],
) -> dict[fx.Node, Tensor]:
    """What one form makes of the values of the other.

    That is the later form on values of the earlier one where it is a graph. A program takes no
    values, so there the earlier form reads the program's.
    """
    if pair.form.graph is not None:
        values = {right: before[left] for left, right, _ in pair.matches.values()}
        return _interpret(_Keep(pair.form.graph), inputs, set(values), values)[0]
    assert pair.before.graph is not None
    nodes = {left for left, _, _ in pair.matches.values()}
    values = {
        node: after[right]
        for left, right, _ in pair.matches.values()
        if right in after
        for node in siblings(left)
    }
    return _interpret(_Keep(pair.before.graph), inputs, nodes, values)[0]


def _add_all(sums: _Powers, targets: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    for expected, tensor in zip(targets, results, strict=True):
        sums.add(expected, tensor)


def _check_outputs(pair: _Pair, targets: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Refuse outputs that cannot be compared: stored ones may be of another model."""
    shapes = [[list(tensor.shape) for tensor in outputs] for outputs in (results, targets)]
    if shapes[0] != shapes[1]:
        raise ArtifactError(
            f"rung `{pair.form.name}` gives outputs of shapes {shapes[0]}, and what it is compared "
            f"with {shapes[1]}: they are not of one model; store them anew (--store)"
        )


def _as_shaped(value: Tensor, like: Tensor) -> Tensor | None:
    """A value in the shape of another; None if that is more than leading axes made one."""
    if value.shape == like.shape:
        return value
    rows = like.dim() and value.dim() and value.shape[-1] == like.shape[-1]
    return value.reshape(like.shape) if rows and value.numel() == like.numel() else None


def _nudge(
    pair: _Pair,
    inputs: Sequence[Any],
    values: Mapping[fx.Node, Tensor],
    outputs: Sequence[Tensor],
) -> None:
    """Add what nudges do to the earlier form of a pair."""
    if pair.before.graph is None:
        return
    same = {left: values[left] for left, _, _ in pair.matches.values()}
    for seed in _NUDGES:
        nudged, results = _interpret(
            _KeepNudged(pair.before.graph, seed=seed, size=_NUDGE), inputs, set(same)
        )
        alone, _ = _interpret(
            _KeepNudged(pair.before.graph, seed=seed, size=_NUDGE), inputs, set(same), same
        )
        for site, (left, _, _) in pair.matches.items():
            pair.nudged[site].add(values[left], nudged[left])
            pair.own_nudged[site].add(values[left], alone[left])
        _add_all(pair.nudged[None], outputs, results)


def _rung(pair: _Pair) -> Rung:
    nodes = tuple(
        NodeParity(site=site, shape=pair.shapes[site], sqnr_db=powers.db, own_db=pair.own[site].db)
        for site, powers in pair.nodes.items()
    )
    graph = pair.before.graph if pair.form.comparable_inside(pair.before) else None
    layers = {} if graph is None else sites(graph)
    known = {match.source for site, match in pair.matches.items() if site in pair.nodes}
    return Rung(
        name=pair.form.name,
        against=pair.before.name,
        float_db=pair.quality.db,
        previous_db=pair.output.db,
        nodes=nodes,
        unmatched=tuple(
            str(site) for site, n in layers.items() if site.op in WEIGHT_OPS and n not in known
        ),
        inside=graph is not None,
    )
