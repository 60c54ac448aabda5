"""Write a pass: a frozen dataclass with one `rewrite`, run alone or in a pipeline.

python examples/write_a_pass.py
"""

from dataclasses import dataclass

import torch
from torch import fx

import mpqdm_fx
from mpqdm_fx.digits.bundled import load_digits_unet
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes import DropDropout


@dataclass(frozen=True, kw_only=True)
class TagWideLayers(mpqdm_fx.GraphPass):
    """Write `meta["wide"] = True` on the calls of layers with many input numbers per channel.

    Attributes:
        at_least: Smallest number of weights of one output channel.
    """

    at_least: int = 512

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Tag the nodes; True if one was not tagged before."""
        modified = False
        for layer in weight_layers(graph_module).values():
            for node in layer.nodes:
                if layer.weight[0].numel() >= self.at_least and "wide" not in node.meta:
                    node.meta["wide"] = True
                    modified = True
        return modified


example = {
    "sample": torch.randn(2, 1, 16, 16),
    "timestep": torch.tensor([10, 500]),
    "class_labels": torch.tensor([1, 2]),
}
graph_module = mpqdm_fx.trace(load_digits_unet(), example)
pipeline = mpqdm_fx.Pipeline(passes=(DropDropout(), TagWideLayers(at_least=600)))
result = pipeline(graph_module)
wide = [node.target for node in result.graph_module.graph.nodes if "wide" in node.meta]
print(f"modified: {result.modified}; {len(wide)} wide layers, for example {wide[0]}")
print(f"run again: modified {pipeline(result.graph_module).modified}")
print(
    f"the input graph is untouched: {not any('wide' in n.meta for n in graph_module.graph.nodes)}"
)
