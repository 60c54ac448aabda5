"""Call a graph like the model that it was traced from, with a batch of any size."""

from typing import Any

from torch import nn

from mpqdm_fx.graph.calling import join_outputs, split_batch
from mpqdm_fx.graph.signature import Signature

__all__ = ["Called"]


class Called:
    """A graph behind the arguments of its model.

    A batch that is larger than the traced range goes through in parts, since samples do not see
    each other: guidance doubles the rows, and UNets that upsample are traced for less than 64.

    Args:
        graph: The graph, or what is called like it.
        signature: Of the traced graph.
    """

    def __init__(self, graph: nn.Module, signature: Signature) -> None:
        self.graph, self.signature = graph, signature

    def __call__(self, **inputs: Any) -> Any:
        """What the graph returns: what the model does for `return_dict=False`.

        Raises:
            TraceError: The inputs are not those of the model.
        """
        parts = split_batch(self.signature, inputs)
        return join_outputs([self.graph(**self.signature.normalize((), part)) for part in parts])
