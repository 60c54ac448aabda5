"""Write what was decided into the graph: each layer's widths, and how its activations are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from torch import fx

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.base import GraphPass
from mpqdm_fx.records.activations import Activation, ActivationRange, StaticActivation
from mpqdm_fx.records.plan import BitPlan, LayerPlan
from mpqdm_fx.records.qconfig import LayerQConfig

__all__ = ["QCONFIG", "AssignQConfigs", "assigned_qconfigs"]

QCONFIG = "qconfig"
"""Where a call of a weight layer keeps its `LayerQConfig`, in `node.meta`."""


@dataclass(frozen=True, kw_only=True)
class AssignQConfigs(GraphPass):
    """Write a `LayerQConfig` into the meta of every call of a weight layer. Bit-equal.

    1. A layer of the plan has its widths, one of `activations` its activation; what neither names
       stays in float, and its calls say that too.
    2. All calls of one layer carry one object.
    3. A call that says so already is left alone.

    So a rounded graph describes itself, to readers and to backends: the QConfigMapping of stock
    torch.ao and the Quantizer of PT2E are read off it.

    Attributes:
        plan: Widths of the channels of rounded layers.
        activations: How the activations of layers are quantized, by layer.
    """

    plan: BitPlan = field(default_factory=lambda: BitPlan(layers=()))
    activations: Mapping[str, Activation] = field(default_factory=dict)

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """Return the pass with mixed widths on every second layer, and one that says nothing."""
        layers = list(weight_layers(graph_module, embeddings=True).values())
        planned = [
            LayerPlan(
                name=layer.name,
                kind=type(layer.module).__name__,
                shape=tuple(layer.weight.shape),
                bits=tuple(1 + row % 8 for row in range(layer.weight.shape[0])),
            )
            for layer in layers[::2]
        ]
        step = ActivationRange(scale=0.5, zero_point=0)
        static = StaticActivation(input=step, output=step)
        names = list(weight_layers(graph_module))[::2]
        return (
            cls(plan=BitPlan(layers=tuple(planned)), activations=dict.fromkeys(names, static)),
            cls(),
        )

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Every layer that is named is there.

        Raises:
            DialectError: One is not.
        """
        layers = weight_layers(graph_module, embeddings=True)
        for name in (*(planned.name for planned in self.plan.layers), *self.activations):
            if name not in layers:
                raise DialectError(
                    f"a qconfig is for {name!r}, which is no weight layer of this graph; run the "
                    f"passes on it that the planned graph went through"
                )

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Write what is not written yet."""
        planned = {layer.name: layer for layer in self.plan.layers}
        modified = False
        for name, layer in weight_layers(graph_module, embeddings=True).items():
            qconfig = LayerQConfig(weight=planned.get(name), activation=self.activations.get(name))
            if all(node.meta.get(QCONFIG) == qconfig for node in layer.nodes):
                continue
            for node in layer.nodes:
                node.meta[QCONFIG] = qconfig
            modified = True
        return modified


def assigned_qconfigs(graph_module: fx.GraphModule) -> dict[str, LayerQConfig]:
    """What the calls of a graph say, by layer.

    Args:
        graph_module: A graph after `AssignQConfigs`; one that it never saw says nothing.

    Raises:
        DialectError: Calls of one layer say different things.
    """
    assigned = {}
    for name, layer in weight_layers(graph_module, embeddings=True).items():
        qconfigs = [node.meta[QCONFIG] for node in layer.nodes if QCONFIG in node.meta]
        if any(qconfig != qconfigs[0] for qconfig in qconfigs):
            raise DialectError(f"{name}: its calls have different qconfigs; run AssignQConfigs")
        if qconfigs:
            assigned[name] = qconfigs[0]
    return assigned
