"""Helpers of the passes' own tests: one block after a convolution, run, and look."""

from torch import fx

from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.passes.base import GraphPass, PassResult
from mpqdm_fx.testing import Block, GraphSpec, RandomGraph, assert_same_function, build_graph


def one_block(kind: str, **fields) -> RandomGraph:
    """Build a convolution to 8 channels and one block (`blocks.1`) after it."""
    blocks = (Block(kind="conv", channels=8), Block(kind=kind, channels=8, **fields))
    return build_graph(GraphSpec(blocks=blocks))


def run(graph_pass: GraphPass, case: RandomGraph) -> PassResult:
    """Run a pass and assert that it kept the function within its tolerance."""
    result = graph_pass(case.graph_module)
    assert_same_function(
        case.graph_module, result.graph_module, case.inputs, rtol=graph_pass.tolerance
    )
    return result


def weight_shapes(graph_module: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """Name every weight layer with the shape of its weight."""
    return {name: tuple(la.weight.shape) for name, la in weight_layers(graph_module).items()}
