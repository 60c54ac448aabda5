"""Which layers stay at 8 bits whatever the budget is, and why.

MPQ-DM and EfficientDM keep the first and the last convolution and the time embedding at 8 bits
(`mpq-dm`: time_embed.0, time_embed.2, the input and the output convolution); class embeddings are
as small and feed every block, so they stay with them.
"""

from collections.abc import Iterable

import torch
from torch import fx

from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.records.config import ActivationMode

__all__ = ["EMBEDDING", "FIRST_LAYER", "LAST_LAYER", "ends_in_float", "pinned_layers"]

FIRST_LAYER = "first layer"
"""Reason of layers that read the noisy sample before any other weight layer did."""

LAST_LAYER = "last layer"
"""Reason of layers behind which the output comes without another weight layer."""

EMBEDDING = "time or class embedding"
"""Reason of layers that read the time or the class, and nothing of the sample."""

_EMBEDDING_PARTS = frozenset(
    {
        "add_embedding",
        "adaln_single",
        "class_embedding",
        "label_emb",
        "time_cond_proj",
        "time_embed",
        "time_embedding",
        "time_text_embed",
        "timestep_embedder",
        "timestep_embedding",
    }
)


def pinned_layers(graph_module: fx.GraphModule) -> dict[str, str]:
    """Layers that are pinned to 8 bits.

    Args:
        graph_module: Module-level graph; its first placeholder is the noisy sample.

    Returns:
        Reason by layer name, for: layers that read the sample before any other weight layer did,
        layers behind which the output comes without another weight layer, layers of the time and
        class embeddings, and embedding tables.
    """
    layers = weight_layers(graph_module, embeddings=True)
    calls = {node: name for name, layer in layers.items() for node in layer.nodes}
    graph = graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    output = next(iter(graph.find_nodes(op="output")))
    reasons: dict[str, str] = {}
    for node in _reach(placeholders[:1], calls, forward=True):
        reasons[calls[node]] = FIRST_LAYER
    for node in _reach([output], calls, forward=False):
        reasons[calls[node]] = LAST_LAYER
    for name, layer in layers.items():
        if _EMBEDDING_PARTS & set(name.split(".")):
            reasons.setdefault(name, EMBEDDING)
        elif type(layer.module).__name__ == "Embedding":
            reasons.setdefault(name, "embedding table")
    return reasons


def ends_in_float(graph_module: fx.GraphModule, mode: ActivationMode) -> set[str]:
    """Layers whose activations are float unasked: they read the sample or write the noise.

    Late in a run the noise that is left in the sample is smaller than one step of a range over all
    timesteps: rounding the sample erases what the model is asked to predict. And the output has to
    be as exact as all of the model is; a dynamic quantizer leaves it alone.

    Args:
        graph_module: Normalized graph.
        mode: How activations are quantized.
    """
    ends = {FIRST_LAYER} if mode == "dynamic" else {FIRST_LAYER, LAST_LAYER}
    return {name for name, why in pinned_layers(graph_module).items() if why in ends}


def _reach(start: Iterable[fx.Node], stops: dict[fx.Node, str], *, forward: bool) -> list[fx.Node]:
    """The first of `stops` on every path from `start`, along or against the edges."""
    ends, seen = [], set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        for neighbour in node.users if forward else node.all_input_nodes:
            # Sizes (SymInt nodes) reach every reshape; only tensors make a layer first or last.
            if neighbour in seen or not (neighbour.op == "output" or _is_tensor(neighbour)):
                continue
            seen.add(neighbour)
            if neighbour in stops:
                ends.append(neighbour)
            else:
                waiting.append(neighbour)
    return ends


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), torch.SymInt | int | float | bool)
