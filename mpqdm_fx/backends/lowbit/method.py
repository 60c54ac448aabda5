"""One graph made ready for lowering with own operators in the place of layers."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from mpqdm_fx.backends.lowbit.blob import pack_blob
from mpqdm_fx.backends.lowbit.costs import Cpu
from mpqdm_fx.backends.lowbit.layers import Kernels, LayerChoice, choose_layers
from mpqdm_fx.backends.lowbit.pipelines import own_operators
from mpqdm_fx.backends.xnnpack.four_bit import FourBit
from mpqdm_fx.backends.xnnpack.method import Method
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.records.activations import Activation, DynamicActivation

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
        self, activations: Mapping[str, Activation]
    ) -> tuple[fx.GraphModule, Collection[str]]:
        """Put own operators in the place of the chosen layers and of the norms in front of them."""
        self.choice = choose_layers(self.graph, activations, kernels=self._kernels, cpu=self._cpu)
        if not self.choice.own:
            return self.graph, ()
        blobs = _blobs(self.graph, self.choice.own)
        dynamic = {n for n, a in activations.items() if isinstance(a, DynamicActivation)}
        left = dynamic.difference(self.choice.own)
        return own_operators(blobs, left)(self.graph).graph_module, self.choice.own


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
