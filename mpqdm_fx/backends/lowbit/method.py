"""One graph made ready for lowering with own operators in the place of layers."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from mpqdm_fx.backends.fit_channels import read_ranges, split_layers
from mpqdm_fx.backends.lowbit.blob import pack_blob
from mpqdm_fx.backends.lowbit.costs import Cpu
from mpqdm_fx.backends.lowbit.layers import Kernels, LayerChoice, choose_layers
from mpqdm_fx.backends.lowbit.pipelines import own_operators
from mpqdm_fx.backends.xnnpack.four_bit import FourBit
from mpqdm_fx.backends.xnnpack.method import Method
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.records.activations import (
    Activation,
    ActivationRange,
    DynamicActivation,
    StaticActivation,
)

__all__ = ["LowbitMethod"]


class LowbitMethod(Method):
    """A graph on its way to a program whose layers own kernels run where that is wanted.

    Args:
        graph: Module-level graph; it is not changed.
        example_inputs: Its inputs, by name or in order.
        activations: By layer name; None for a float program, which has no own layers.
        kernels: What is wanted of own kernels.
        cpu: Class of CPUs that the program is for.
        four_bit: Which of XNNPACK's weights are stored at four bits.

    Attributes:
        choice: Layers by what runs them.

    Raises:
        ConfigError: `activations` names a layer that is not rounded; a setting is unknown.
        LoweringError: An activation cannot run, or the graph has a Conv3d.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        example_inputs: Mapping[str, Any] | Sequence[Any],
        activations: Mapping[str, Activation] | None = None,
        *,
        kernels: Kernels = "auto",
        cpu: Cpu = "avx2",
        four_bit: FourBit = "whole",
    ) -> None:
        self._kernels: Kernels = kernels
        self._cpu: Cpu = cpu
        self.choice = LayerChoice(own=(), left={})
        super().__init__(graph, example_inputs, activations, four_bit=four_bit)

    def prepare(
        self, written: fx.GraphModule, activations: Mapping[str, Activation]
    ) -> tuple[fx.GraphModule, Collection[str], Mapping[str, Activation]]:
        """Put own operators in the place of the chosen layers and of the norms in front of them."""
        self.choice = choose_layers(self.graph, activations, kernels=self._kernels, cpu=self._cpu)
        own = self.choice.own
        if not own:
            return self.graph, (), activations
        left = {name: a for name, a in activations.items() if name not in own}
        static = {name: a for name, a in activations.items() if isinstance(a, StaticActivation)}
        reads = read_ranges(written, static)
        of_calls = {
            name: tuple(StaticActivation(input=r, output=static[name].output) for r in reads[name])
            for name in own
            if name in static
        }
        dynamic = {name for name, a in left.items() if isinstance(a, DynamicActivation)}
        # a convolution of XNNPACK takes its image channels first, and copies it to channels last
        floats = {name for name in weight_layers(self.graph) if name not in activations}
        pipeline = own_operators(_blobs(self.graph, own), of_calls, dynamic | floats)
        graph = pipeline(self.graph).graph_module
        if of_calls:
            graph, left = _with_reads(graph, left, reads)
        return graph, own, left


def _with_reads(
    graph: fx.GraphModule,
    left: Mapping[str, Activation],
    reads: Mapping[str, Sequence[ActivationRange]],
) -> tuple[fx.GraphModule, dict[str, Activation]]:
    """Give the static layers that are left the ranges of their inputs that are in use.

    These may be another layer's: its output, or an input that several layers share. Own layers are
    none to whoever looks for such ranges in the graph, so they are written down. A layer that
    reads several ranges is split.

    Args:
        graph: With own operators.
        left: Activations of the layers that it still calls.
        reads: Ranges of the calls of all static layers.

    Returns:
        The graph, and the activations of its layers.
    """
    fixed = {name: a for name, a in left.items() if isinstance(a, StaticActivation)}
    result, origins = split_layers(graph, {name: reads[name] for name in fixed})
    origins |= {name: (name, reads[name][0]) for name in fixed}
    activations = dict(left)
    for name, (old, read) in origins.items():
        activations[name] = StaticActivation(input=read, output=fixed[old].output)
    return result, activations


def _blobs(graph: fx.GraphModule, names: Collection[str]) -> dict[str, Tensor]:
    layers = weight_layers(graph)
    blobs = {}
    for name in names:
        module = layers[name].module
        codes, scale, bias = module.weight_codes, module.weight_scale, module.bias
        assert isinstance(codes, Tensor)
        assert isinstance(scale, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        blobs[name] = pack_blob(codes, scale, bias)
    return blobs
