"""Gradients of random directions of the output, as backward passes over a graph show them."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpqdm_fx.bits.detach_gate import DetachGate
from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.editing import copy_graph_module, replace_module, shallow_clone
from mpqdm_fx.graph.layers import EMBEDDINGS, WeightLayer, weight_layers, weight_rows
from mpqdm_fx.numerics.finite import all_finite

__all__ = ["NO_LAYER", "GradientWatch", "Probe"]

NO_LAYER = "the graph's output does not depend on any weight layer"


class GradientWatch(Protocol):
    """What else wants to see the gradients of a backward pass."""

    def start(self, inputs: Mapping[str, Any]) -> None:
        """The next gradients are those of a call, or of a part of one: by placeholder name."""

    def kind(self, call: fx.Node) -> Hashable:
        """Calls of one kind that read one value are seen as one reader of it."""

    def inputs(self, call: fx.Node, x: Tensor, gradient: Tensor, samples: int) -> None:
        """Look at what weight layers read, for each random direction.

        Gradients of one value may come in several terms, from several readers.

        Args:
            call: The first of the calls that read this value.
            x: The value, float [n * B, ...], or without a batch axis.
            gradient: That of <v, f> with respect to what they all read, shape of x; v has the root
                of each sample's importance in it.
            samples: B.
        """

    def outputs(self, call: fx.Node, y: Tensor, gradient: Tensor, samples: int) -> None:
        """Look at what a weight layer's call writes; see `inputs`."""

    def finish(self, samples: int) -> None:
        """All of one random direction was shown, for B samples."""


class Probe(fx.Interpreter):
    """Runs the graph with gradients of activations alone, and sums what it sees."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        seed: int,
        groups: NoiseGroups,
        watch: GradientWatch | None,
        skipped: Collection[str],
    ) -> None:
        copied = _without_gradients(graph_module)
        super().__init__(copied)
        self.graph_module = copied
        self.skipped = skipped
        self.groups = groups
        self.watch = watch
        self.gate = DetachGate(copied)
        layers = weight_layers(copied, embeddings=True)
        self.layer_of = {node: layer for layer in layers.values() for node in layer.nodes}
        self.reaching = _reaching_output(copied)
        self.energy: dict[str, Tensor] = {}
        self.by_group: dict[str, Tensor] = {}
        for name, layer in layers.items():
            shape = weight_rows(layer.module).shape
            sums = shape if isinstance(layer.module, EMBEDDINGS) else shape[:1]
            self.energy[name] = torch.zeros(sums, dtype=torch.float64)
            self.by_group[name] = torch.zeros(groups.count, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self.watched: list[_Written] = []
        self.read: dict[tuple[fx.Node, Hashable], _Read] = {}
        self.first_readers: dict[tuple[fx.Node, Hashable], fx.Node] = {}
        self.samples = 0
        self.output_energy = 0.0
        self.weight = torch.zeros(groups.count, dtype=torch.float64)

    def measure(self, inputs: Mapping[str, Any], probes: int, importance: Tensor) -> None:
        """Add one part of a call: tensors by placeholder name, importance [B]."""
        names = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        self.begin(inputs)
        with torch.enable_grad():
            output = self.run(*[inputs[name] for name in names])
            leaves = [
                leaf
                for leaf in pytree.tree_leaves(output)
                if isinstance(leaf, Tensor) and leaf.requires_grad
            ]
            if not leaves:
                raise CalibrationError(NO_LAYER)
            for index in range(probes):
                signs = self.signs(leaves, importance)
                values = self.seen()
                gradients = self._gradients(leaves, values, signs, retain=index < probes - 1)
                self.show(gradients, inputs, importance, probes)
                if self.watch is not None:
                    self.watch.finish(len(importance))
        self.end(leaves, inputs, importance)

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """A part of a call comes."""
        self.watched, self.read = [], {}
        if self.watch is not None:
            self.watch.start(inputs)

    def end(self, leaves: list[Tensor], inputs: Mapping[str, Any], importance: Tensor) -> None:
        """A part of a call is over, and had these outputs."""
        for leaf in leaves:
            root = _by_row(importance, leaf)
            energy = leaf.detach().double().square().reshape(len(root), -1).sum(dim=1).cpu()
            self.output_energy += float(energy @ root.double())
        self.watched, self.read = [], {}
        self.samples += len(importance)
        self.weight.index_add_(0, self.groups.of_samples(inputs), importance.double())

    def signs(self, leaves: list[Tensor], importance: Tensor) -> list[Tensor]:
        """One random direction of the outputs."""
        signs = []
        for leaf in leaves:
            draw = torch.randint(2, leaf.shape, generator=self.generator) * 2 - 1
            # The root of a sample's importance: squared, it weighs that sample's energies.
            root = _by_row(importance, leaf).sqrt()
            signs.append((draw.reshape(len(root), -1) * root[:, None]).to(leaf).view(leaf.shape))
        return signs

    def seen(self) -> list[Tensor]:
        """What was written and read, whose gradients `show` takes in this order."""
        written = (entry.value for entry in self.watched)
        return [*written, *(entry.value for entry in self.read.values())]

    def show(
        self,
        gradients: Sequence[Tensor | None],
        inputs: Mapping[str, Any],
        importance: Tensor,
        probes: int,
    ) -> None:
        """Add up gradients of one random direction, and show them to the watch."""
        groups, samples = self.groups.of_samples(inputs), len(importance)
        for written, gradient in zip(self.watched, gradients[: len(self.watched)], strict=True):
            if gradient is None:
                self._check_unused(written.layer)
                continue
            self._add(written, gradient.detach(), groups, probes)
            if self.watch is not None and written.index is None:
                self.watch.outputs(written.call, written.value.detach(), gradient, samples)
        reads = self.read.values()
        for read, gradient in zip(reads, gradients[len(self.watched) :], strict=True):
            if gradient is not None:
                assert self.watch is not None
                self.watch.inputs(read.call, read.value.detach(), gradient, samples)

    def _gradients(
        self, leaves: list[Tensor], values: list[Tensor], signs: list[Tensor], *, retain: bool
    ) -> list[Tensor | None]:
        """Gradients of values; through `detach` for those that no other way leads to."""
        find = partial(torch.autograd.grad, leaves, grad_outputs=signs, allow_unused=True)
        gradients: list[Tensor | None] = [*find(values, retain_graph=retain or bool(self.gate))]
        missing = [i for i, gradient in enumerate(gradients) if gradient is None]
        if self.gate and missing:
            self.gate.is_open = True
            detached = find([values[i] for i in missing], retain_graph=retain)
            self.gate.is_open = False
            for index, gradient in zip(missing, detached, strict=True):
                gradients[index] = gradient
        return gradients

    def _add(self, written: "_Written", gradient: Tensor, groups: Tensor, probes: int) -> None:
        """Add the squares of one gradient to the layer's energies."""
        layer, energy = written.layer, self.energy[written.layer.name]
        squared = gradient.double().square_().cpu()
        if written.index is not None:
            rows = squared.reshape(-1, squared.shape[-1]) / probes
            energy.index_add_(0, written.index.flatten().cpu(), rows)
        else:
            spatial = 0 if isinstance(layer.module, nn.Linear) else layer.weight.dim() - 2
            if spatial:  # sums of each channel of each sample: fewer numbers for what follows
                squared = squared.flatten(-spatial).sum(dim=-1)
            energy += squared.reshape(-1, squared.shape[-1]).sum(dim=0) / probes
        group, sums = _by_sample(squared, groups)
        self.by_group[layer.name].index_add_(0, group, sums / probes)

    def _check_unused(self, layer: WeightLayer) -> None:
        """Refuse a layer without gradient, unless it is skipped or written and never read."""
        if layer.name in self.skipped or self.reaching.isdisjoint(layer.nodes):
            return
        raise CalibrationError(
            f"{layer.name}: it reaches the output, but no gradient of the output reaches it: the "
            "model rounds or compares values behind it, so its sensitivity cannot be measured; "
            f'keep it in float: overrides=[{{"pattern": "{layer.name}", "skip": True}}]'
        )

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """Arguments of a node; weight layers read through a door at which the gradient is seen."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        layer = self.layer_of.get(n)
        if self.watch is None or layer is None or isinstance(layer.module, EMBEDDINGS):
            return args, kwargs
        source = n.args[0]
        assert isinstance(source, fx.Node)
        key = (source, self.watch.kind(n))
        if key not in self.read:
            x = args[0]
            door = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            self.read[key] = _Read(call=self.first_readers.setdefault(key, n), value=door)
        return (self.read[key].value, *args[1:]), kwargs

    def run_node(self, n: fx.Node) -> Any:
        """Execute a node; watch what weight layers write."""
        if n in self.gate:
            return self.gate.detached(self.env[n.all_input_nodes[0]])
        result = super().run_node(n)
        layer = self.layer_of.get(n)
        if layer is None:
            return result
        if not all_finite(result):
            raise CalibrationError(
                f"{layer.name}: it writes NaN or infinity; check the calibration data and weights"
            )
        if not result.requires_grad:
            result = result.detach().requires_grad_()
        index = None
        if isinstance(layer.module, EMBEDDINGS):
            indices = n.args[0] if n.args else n.kwargs["input"]
            index = self.env[indices]  # type: ignore[index]
        self.watched.append(_Written(call=n, layer=layer, value=result, index=index))
        return result


@dataclass(frozen=True, kw_only=True, eq=False)
class _Written:
    """What a call of a weight layer wrote; of an embedding table also the rows it looked up."""

    call: fx.Node
    layer: WeightLayer
    value: Tensor
    index: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Read:
    """What weight layers read, as they alone see it, and the first call that reads it."""

    call: fx.Node
    value: Tensor


def _by_row(weights: Tensor, output: Tensor) -> Tensor:
    """Weights [B] of the samples for the rows of an output; one for all where they share it.

    A loss beside the image has no axis, or one that is no multiple of the samples.
    """
    rows = len(output) if output.dim() else 1
    if not output.dim() or rows % len(weights):
        return weights.mean().expand(rows)
    return weights.repeat_interleave(rows // len(weights))


def _by_sample(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of values along the leading axis, and the group [n] that each belongs to.

    Where the leading axis is no multiple of the samples, the value is shared by all of them: it
    counts for every sample's group alike.
    """
    if len(values) % len(groups):
        return groups, (values.sum() / len(groups)).expand(len(groups))
    sums = values.reshape(len(values), -1).sum(dim=1)
    return groups.repeat_interleave(len(values) // len(groups)), sums


def _reaching_output(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose values, and not only whose sizes, the output is computed from."""
    (output,) = graph_module.graph.find_nodes(op="output")
    nodes, waiting = {output}, [output]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            is_size = isinstance(source.meta.get("val"), torch.SymInt | torch.SymFloat | int)
            if source not in nodes and not is_size:
                nodes.add(source)
                waiting.append(source)
    return nodes


def _without_gradients(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose parameters take no gradient: only activations do, which saves their inputs."""
    copied = copy_graph_module(graph_module)
    clones: dict[nn.Module, nn.Module] = {}
    for target in {str(node.target) for node in copied.graph.nodes if node.op == "call_module"}:
        module = copied.get_submodule(target)
        if module not in clones:  # a module may sit at several names
            clones[module] = clone = shallow_clone(module)
            clone._parameters = {
                name: None if p is None else nn.Parameter(p.detach(), requires_grad=False)
                for name, p in module._parameters.items()
            }
        replace_module(copied, target, clones[module])
    return copied
