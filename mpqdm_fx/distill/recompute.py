"""Training in less memory: hold the values at a few cuts of a graph, compute the rest again."""

from typing import Any

from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from mpqdm_fx.graph.parts import GraphPart

__all__ = ["Recomputed"]


class Recomputed(nn.Module):
    """A graph that keeps for its backward pass only what crosses from part to part.

    The values inside a part are computed again when its gradient is due (Chen et al., arXiv
    1604.06174): the same numbers, one more forward pass of time. With as many parts as the root of
    the number of layers, memory grows with that root.

    Args:
        graph_module: What is computed; its modules are shared, not copied.
        parts: How many parts of about equally many nodes.
    """

    def __init__(self, graph_module: fx.GraphModule, parts: int) -> None:
        super().__init__()
        self.graph_module = graph_module
        self._inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._output = graph_module.graph.output_node()
        inner = [n for n in graph_module.graph.nodes if n.op not in ("placeholder", "output")]
        length = -(-len(inner) // parts)
        self._parts = [
            GraphPart.of(inner[start : start + length]) for start in range(0, len(inner), length)
        ]

    def forward(self, **inputs: Any) -> Any:
        """The graph's output for its placeholders' values by name."""
        values: dict[fx.Node, Any] = {
            node: inputs[str(node.target)] if str(node.target) in inputs else node.args[0]
            for node in self._inputs
        }
        for part in self._parts:
            reads = [values[node] for node in part.reads]
            # nothing in a graph draws random numbers
            gives = checkpoint(
                self._run, part, *reads, use_reentrant=False, preserve_rng_state=False
            )
            values.update(zip(part.gives, gives, strict=True))
        return fx.map_arg(self._output.args[0], values.__getitem__)

    def _run(self, part: GraphPart, *values: Any) -> tuple[Any, ...]:
        interpreter = fx.Interpreter(self.graph_module, garbage_collect_values=False)
        interpreter.env = dict(zip(part.reads, values, strict=True))
        for node in part.nodes:
            interpreter.env[node] = interpreter.run_node(node)
        return tuple(interpreter.env[node] for node in part.gives)
