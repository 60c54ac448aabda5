"""Random module-level graphs that look like traced UNets, in milliseconds.

A graph is a chain of blocks over an image [N, C, H, W] (see `KINDS`), built node by node as
`capture.trace` would leave it: leaf modules as `call_module`, all else ATen, `val` and
`nn_module_stack` in every node's meta.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from mpqdm_fx.testing import blocks
from mpqdm_fx.testing.blocks import Block
from mpqdm_fx.testing.builder import GraphBuilder

__all__ = ["KINDS", "Block", "GraphSpec", "RandomGraph", "build_graph", "graphs"]

#: Kinds of blocks, from plain to intricate; strategies shrink toward the first.
KINDS: Mapping[str, Callable[[GraphBuilder, Block], None]] = blocks.EMITTERS

_TAILS = ("block", "conv", "several")


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """All that a random graph depends on.

    Attributes:
        blocks: in running order.
        channels: of the input image.
        size: height and width of the input image.
        batch: batch size.
        tail: what the graph returns: the last block's result as it is (`block`, which may be a
            weight layer), a norm, SiLU and convolution after it (`conv`), or both it and an
            earlier image (`several`).
        seed: of weights and inputs.
    """

    blocks: tuple[Block, ...]
    channels: int = 4
    size: tuple[int, int] = (4, 6)
    batch: int = 2
    tail: str = "block"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RandomGraph:
    """A drawn graph with inputs for it.

    Attributes:
        graph_module: in eval mode, parameters require no gradients.
        inputs: keyword arguments: `sample` float32 [N, C, H, W], `timestep` int64 [N] in 0..9.
        spec: what it was built from; `build_graph(spec)` builds it again.
    """

    graph_module: fx.GraphModule = field(repr=False)
    inputs: Mapping[str, Any] = field(repr=False)
    spec: GraphSpec


def build_graph(spec: GraphSpec) -> RandomGraph:
    """Build the graph that a spec describes; the same bits every time."""
    generator = torch.Generator().manual_seed(spec.seed)
    inputs: dict[str, Tensor] = {
        "sample": torch.randn(spec.batch, spec.channels, *spec.size, generator=generator),
        "timestep": torch.randint(10, (spec.batch,), generator=generator),
    }
    builder = GraphBuilder(inputs, generator)
    for index, block in enumerate(spec.blocks):
        builder.open_scope(f"blocks.{index}")
        KINDS[block.kind](builder, block)
        builder.keep()
    builder.open_scope("tail")
    if spec.tail == "conv":
        blocks.EMITTERS["norm_act"](builder, Block(kind="norm_act"))
        blocks.EMITTERS["conv"](builder, Block(kind="conv", channels=spec.channels))
    outputs = [builder.image]
    if spec.tail == "several":
        outputs.append(builder.kept[0])
    return RandomGraph(graph_module=builder.finish(outputs), inputs=inputs, spec=spec)


# Building is pure, and hypothesis comes back to the same spec while it shrinks.
_cached_graph = functools.lru_cache(maxsize=64)(build_graph)


@st.composite
def graphs(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    min_blocks: int = 1,
    max_blocks: int = 5,
) -> RandomGraph:
    """Draw a random graph with its inputs.

    Args:
        draw: given by hypothesis.
        kinds: kinds of blocks to draw from; see `KINDS`.
        min_blocks: smallest number of blocks.
        max_blocks: largest number of blocks.
    """
    block = st.builds(
        Block,
        kind=st.sampled_from(list(kinds)),
        channels=st.sampled_from([4, 8, 12]),
        kernel=st.sampled_from([1, 3]),
        stride=st.sampled_from([1, 2]),
        groups=st.sampled_from([1, 2, 4]),
        bias=st.booleans(),
        variant=st.integers(0, 3),
    )
    spec = GraphSpec(
        blocks=tuple(draw(st.lists(block, min_size=min_blocks, max_size=max_blocks))),
        channels=draw(st.sampled_from([4, 8])),
        size=draw(st.sampled_from([(4, 6), (4, 4), (5, 3)])),
        batch=draw(st.integers(1, 3)),
        tail=draw(st.sampled_from(_TAILS)),
        seed=draw(st.integers(0, 2**16)),
    )
    return _cached_graph(spec)
