"""Fold batch norms into the convolution or linear layer before them.

In eval mode a batch norm is a fixed scale and shift per channel, which the layer's own weight and
bias can carry. It is what torch.ao fuses before it quantizes; done here, the bits are chosen for
the weight that really runs. Convolution + ReLU needs no pass: it changes no weight, and each
backend matches the pair itself.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import shallow_clone
from mpqdm_fx.graph.layers import called_module, replace_module
from mpqdm_fx.graph.nodes import rank
from mpqdm_fx.graph.parameters import note_folded
from mpqdm_fx.passes.base import GraphPass

__all__ = ["FoldBatchNorm"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(GraphPass):
    """Fold Conv + BatchNorm and Linear + BatchNorm1d in eval mode.

    1. Conv1d/2d/3d whose only user is a batch norm in eval mode with running statistics, if its
       output is known to have a batch axis.
    2. Linear likewise, if its output is known to be [N, C]. A batch norm normalises axis 1, which
       is no layer's output on [N, C, L], nor a convolution's without a batch axis.
    3. A layer that is called more than once, or trained, is left alone: its other call has no
       batch norm after it.

    The folded layer is a new module at the layer's own name; the batch norm goes. Equal up to
    rounding of the products `weight * scale`.
    """

    tolerance: ClassVar[float] = 1e-5

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Apply the rules to every batch norm."""
        pairs = _pairs(graph_module)
        for layer, norm in pairs:
            folded = _fold(
                graph_module.get_submodule(str(layer.target)),
                graph_module.get_submodule(str(norm.target)),
            )
            replace_module(graph_module, str(layer.target), folded)
            note_folded(graph_module, str(norm.target), str(layer.target))
            norm.replace_all_uses_with(layer)
            graph_module.graph.erase_node(norm)
        return bool(pairs)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """No batch norm is left that could be folded.

        Raises:
            DialectError: one is; names the node.
        """
        for _, norm in _pairs(graph_module):
            raise DialectError(f"batch norm {norm.name!r} ({norm.target}) could be folded")


def _pairs(graph_module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Find (layer call, batch norm call) that fold into one."""
    uses: dict[int, int] = {}
    for node in graph_module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            # a weight that is also read as a tensor belongs to its owner's uses
            name = str(node.target)
            owner = name if node.op == "call_module" else name.rpartition(".")[0]
            module = graph_module.get_submodule(owner)
            uses[id(module)] = uses.get(id(module), 0) + 1
    pairs = []
    for norm in graph_module.graph.nodes:
        batch_norm = called_module(graph_module, norm, *_BATCH_NORMS)
        layer = norm.args[0] if norm.args else None
        conv_or_linear = called_module(graph_module, layer, *_CONVOLUTIONS, nn.Linear)
        if batch_norm is None or conv_or_linear is None or not isinstance(layer, fx.Node):
            continue
        frozen = not batch_norm.training and batch_norm.running_mean is not None
        alone = uses[id(conv_or_linear)] == 1 and list(layer.users) == [norm]
        axes = len(getattr(conv_or_linear, "kernel_size", ()))
        if frozen and alone and rank(layer) == 2 + axes:
            pairs.append((layer, norm))
    return pairs


def _fold(layer: nn.Module, norm: nn.Module) -> nn.Module:
    assert isinstance(layer, (*_CONVOLUTIONS, nn.Linear))
    assert isinstance(norm, _BATCH_NORMS)
    # Written for convolutions, it serves [out, in] matrices as well, and unlike its linear
    # sibling also a batch norm without affine parameters.
    weight, bias = fuse_conv_bn_weights(
        layer.weight,
        layer.bias,
        norm.running_mean,  # type: ignore[arg-type]  # there are statistics, see _pairs
        norm.running_var,  # type: ignore[arg-type]
        norm.eps,
        norm.weight,
        norm.bias,
    )
    folded = shallow_clone(layer)
    folded.weight, folded.bias = weight, bias
    return folded
