"""Measure what each channel's rounding error does to the model's output: `measure_sensitivity`.

With y_i the output of channel i at all its positions p and J the Jacobian of the model's output f,
independent errors e_ip change the output by

    E |df|^2 = sum_i s_i E e_i^2,    s_i = sum_p |J_ip|^2 = E_v sum_p (d<v, f> / d y_ip)^2

for random v with E v v^T = I (Hutchinson 1989). One backward pass gives all layers' terms for one
v. Measured on the bundled model against alternatives (squared weight gradients, which also see that
one error repeats at all positions; errors scaled by what GPTQ's feedback should leave): this, the
simplest, was as good or better at every budget.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from mpqdm_fx.calibration.rounding_errors import MAX_NUMBERS, ChannelInputs, channel_errors
from mpqdm_fx.calibration.sensitivity_table import (
    LayerSensitivity,
    SensitivityTable,
    model_fingerprint,
)
from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.calling import split_batch
from mpqdm_fx.graph.cost import bind_sizes, value_bytes
from mpqdm_fx.graph.editing import copy_graph_module, replace_module, shallow_clone
from mpqdm_fx.graph.layers import EMBEDDINGS, WeightLayer, sample_rows, weight_layers, weight_rows
from mpqdm_fx.graph.signature import Signature, tensor_leaves

__all__ = ["measure_sensitivity"]

logger = logging.getLogger(__name__)

_MEMORY = 2**30  # bytes of activations kept for one backward pass; one sample may need more
_MAX_ROWS = 512  # input rows of a layer
_MIN_ROWS = 64
_ROW_NUMBERS = 2**18  # numbers in them: 1 MB a layer, except where 64 rows are more


def measure_sensitivity(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    *,
    probes: int = 2,
    samples: int = 128,
    seed: int = 0,
    weights: Sequence[Tensor] | None = None,
    codebooks: bool = True,
    max_numbers: int = MAX_NUMBERS,
) -> SensitivityTable:
    """Measure a float graph; nothing in it is changed.

    Args:
        graph_module: Normalized float graph.
        calls: Calibration calls: tensors by placeholder name. Samples are taken evenly from all of
            them, so they should be spread over the timesteps as the model will meet them.
        probes: Random directions of the output, each one backward pass per sample.
        samples: How many samples to probe; all, if there are fewer.
        seed: Of the directions and of the sampled rows.
        weights: Importance of each sample, one tensor [B] per call, for instance what the sampler
            multiplies the model's output with at that timestep, squared. Default: all alike.
        codebooks: Measure fitted levels too.
        max_numbers: Largest layer, in weights, whose rounding errors are measured by fitting all
            of its channels; larger ones take a cheaper estimate.

    Returns:
        The table. Its costs are mean squared errors per sample of the model's output, summed over
        the output's elements.

    Raises:
        CalibrationError: There are no calls, a layer's input or gradient is not finite, a weight is
            not finite, or the output does not depend on any weight layer.
    """
    if len(calls) == 0:
        raise CalibrationError("no calibration data: sensitivities need at least one call")
    if probes < 1 or samples < 1:
        raise CalibrationError(f"probes={probes}, samples={samples}: give at least 1 of each")
    if weights is not None and len(weights) != len(calls):
        raise CalibrationError(f"{len(weights)} tensors of weights for {len(calls)} calls")
    parts = _parts(graph_module, calls, weights, samples)
    probe = _Probe(_without_gradients(graph_module), len(parts), seed)
    for inputs, importance in tqdm(parts, desc="sensitivities", unit="part", disable=None):
        probe.measure(inputs, probes, importance)
    layers = weight_layers(graph_module, embeddings=True)
    return SensitivityTable(
        layers=tuple(
            _finish(layer, probe.seen[name], probe.weight, codebooks, max_numbers, seed)
            for name, layer in tqdm(
                layers.items(), desc="rounding errors", unit="layer", disable=None
            )
        ),
        fingerprint=model_fingerprint(graph_module),
        seed=seed,
        probes=probes,
        samples=probe.samples,
    )


def _finish(
    layer: WeightLayer,
    seen: "_Seen",
    weight: float,
    codebooks: bool,
    max_numbers: int,
    seed: int,
) -> LayerSensitivity:
    rows = weight_rows(layer.module).float()
    if not bool(torch.isfinite(rows).all()):
        raise CalibrationError(f"{layer.name}: its weight holds NaN or infinity")
    energy = seen.energy / weight
    if not bool(torch.isfinite(energy).all()):
        raise CalibrationError(
            f"{layer.name}: the model's output has no finite gradient here; check the calibration "
            "data"
        )
    if isinstance(layer.module, EMBEDDINGS):
        sensitivity, inputs = _of_table(energy)
    else:
        center = getattr(layer.module, "bias", None) is not None
        inputs = ChannelInputs.of(torch.cat(seen.rows), len(energy), center=center)
        sensitivity = energy
        if not bool(torch.isfinite(inputs.energy).all()):
            raise CalibrationError(f"{layer.name}: it reads NaN or infinity")
    uniform, codebook = channel_errors(
        rows, inputs, codebooks=codebooks, max_numbers=max_numbers, seed=seed
    )
    return LayerSensitivity(
        name=layer.name,
        shape=tuple(layer.weight.shape),
        sensitivity=sensitivity,
        uniform=uniform,
        codebook=codebook,
    )


def _of_table(energy: Tensor) -> tuple[Tensor, ChannelInputs]:
    """Sensitivity [O] and inputs of an embedding table, from squared gradients [O, K].

    An entry is written where it is looked up, so each number of the table is a position of its own,
    with an energy of its own. An entry that no sample looked up may be needed later: it counts as
    the average of those that were.
    """
    used = energy.sum(dim=1) > 0
    typical = energy[used].mean(dim=0) if bool(used.any()) else torch.zeros_like(energy[0])
    energy = torch.where(used[:, None], energy, typical)
    sensitivity = energy.mean(dim=1)
    relative = energy / sensitivity.clamp_min(1e-300)[:, None]
    return sensitivity, ChannelInputs(rows=None, energy=relative)


@dataclasses.dataclass(eq=False)
class _Seen:
    """What was seen of one layer over all probed samples.

    Attributes:
        energy: Sum of squared gradients, float64 [O], of an embedding [O, K].
        rows: Sampled input rows, each [P, K] or [P, G, K].
    """

    energy: Tensor
    rows: list[Tensor] = dataclasses.field(default_factory=list)


class _Probe(fx.Interpreter):
    """Runs the graph with gradients of activations alone, and sums what it sees."""

    def __init__(self, graph_module: fx.GraphModule, parts: int, seed: int) -> None:
        super().__init__(graph_module)
        layers = weight_layers(graph_module, embeddings=True)
        self.layer_of = {node: layer for layer in layers.values() for node in layer.nodes}
        self.seen: dict[str, _Seen] = {}
        for name, layer in layers.items():
            shape = weight_rows(layer.module).shape
            sums = shape if isinstance(layer.module, EMBEDDINGS) else shape[:1]
            self.seen[name] = _Seen(energy=torch.zeros(sums, dtype=torch.float64))
        self.parts = parts
        self.generator = torch.Generator().manual_seed(seed)
        self.watched: list[tuple[WeightLayer, Tensor, Tensor | None]] = []
        self.samples = 0
        self.weight = 0.0

    def measure(self, inputs: Mapping[str, Any], probes: int, importance: Tensor) -> None:
        """Add one part of a call: tensors by placeholder name, importance [B]."""
        names = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        self.watched = []
        with torch.enable_grad():
            output = self.run(*[inputs[name] for name in names])
            leaves = [
                leaf
                for leaf in pytree.tree_leaves(output)
                if isinstance(leaf, Tensor) and leaf.requires_grad
            ]
            if not leaves:
                raise CalibrationError("the graph's output does not depend on any weight layer")
            for index in range(probes):
                self._backward(leaves, importance, probes, retain=index < probes - 1)
        self.watched = []
        self.samples += len(importance)
        self.weight += float(importance.sum())

    def _backward(
        self, leaves: list[Tensor], importance: Tensor, probes: int, *, retain: bool
    ) -> None:
        signs = []
        for leaf in leaves:
            draw = torch.randint(2, leaf.shape, generator=self.generator) * 2 - 1
            # The root of a sample's importance: squared, it weighs that sample's energies.
            root = importance.sqrt().repeat_interleave(max(1, len(leaf) // len(importance)))
            signs.append((draw * root.view(-1, *[1] * (leaf.dim() - 1))).to(leaf))
        gradients = torch.autograd.grad(
            leaves,
            [written for _, written, _ in self.watched],
            signs,
            retain_graph=retain,
            allow_unused=True,
        )
        for (layer, _, index), gradient in zip(self.watched, gradients, strict=True):
            if gradient is None:  # written, but not on the way to the output
                continue
            energy = self.seen[layer.name].energy
            squared = gradient.detach().double().square().cpu()
            if index is not None:
                rows = squared.reshape(-1, squared.shape[-1])
                energy.index_add_(0, index.flatten().cpu(), rows / probes)
                continue
            axis = -1 if isinstance(layer.module, nn.Linear) else squared.dim() - _spatial(layer)
            energy += squared.movedim(axis, -1).flatten(0, -2).sum(dim=0) / probes

    def run_node(self, n: fx.Node) -> Any:
        """Execute a node; watch what weight layers read and write."""
        result = super().run_node(n)
        layer = self.layer_of.get(n)
        if layer is None:
            return result
        source = n.args[0] if n.args else next(iter(n.kwargs.values()))
        value = self.env[source]  # type: ignore[index]
        if not result.requires_grad:
            result = result.detach().requires_grad_()
        if isinstance(layer.module, EMBEDDINGS):
            self.watched.append((layer, result, value))
            return result
        width = layer.weight[0].numel()
        wanted = min(_MAX_ROWS, max(_MIN_ROWS, _ROW_NUMBERS // width))
        rows = sample_rows(
            layer.module,
            value.detach(),
            count=-(-wanted // (self.parts * len(layer.nodes))),
            generator=self.generator,
        )
        self.seen[layer.name].rows.append(rows.float().cpu())
        self.watched.append((layer, result, None))
        return result


def _spatial(layer: WeightLayer) -> int:
    """Places from the channel axis of a convolution's output to its end."""
    return layer.weight.dim() - 1


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


def _parts(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    weights: Sequence[Tensor] | None,
    samples: int,
) -> list[tuple[dict[str, Any], Tensor]]:
    """Split calls into parts of few samples and take evenly as many as are wanted."""
    signature: Signature = graph_module.meta["signature"]
    parts: list[tuple[dict[str, Any], Tensor]] = []
    for index, call in enumerate(calls):
        size = max(1, min(samples, _MEMORY // max(1, _sample_bytes(graph_module, call))))
        pieces = [dict(call)]
        if signature.batch_range is not None:
            low, high = signature.batch_range
            size = max(low, size if high is None else min(size, high))
            narrow = dataclasses.replace(signature, batch_range=(low, size))
            pieces = split_batch(narrow, call)
        counts = [_samples(signature, piece) for piece in pieces]
        importance = torch.ones(sum(counts)) if weights is None else weights[index].float().cpu()
        if importance.shape != (sum(counts),) or not bool((importance >= 0).all()):
            raise CalibrationError(
                f"weights of call {index} have shape {tuple(importance.shape)}; give one number "
                f"that is not negative for each of its {sum(counts)} samples"
            )
        parts += zip(pieces, torch.split(importance, counts), strict=True)
    mean = sum(len(importance) for _, importance in parts) / len(parts)
    wanted = min(len(parts), max(1, math.ceil(samples / mean)))
    return [parts[(2 * place + 1) * len(parts) // (2 * wanted)] for place in range(wanted)]


def _samples(signature: Signature, call: Mapping[str, Any]) -> int:
    """Batch size of a call."""
    specs = {spec.name: spec for spec in signature.inputs if spec.batch_axis == 0}
    for name, tensor in tensor_leaves(call):
        if name in specs and tensor.ndim > 1:
            return len(tensor) // specs[name].batch_multiple
    return signature.batch


def _sample_bytes(graph_module: fx.GraphModule, call: Mapping[str, Any]) -> int:
    """Bytes of all activations of one sample."""
    sizes = bind_sizes(graph_module, call)
    total = sum(value_bytes(node, sizes) for node in graph_module.graph.nodes)
    return total // _samples(graph_module.meta["signature"], call)
