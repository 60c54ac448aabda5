"""Weight layers of a module-level graph: find them, view them as matrices, replace them.

Every algorithm of this package sees a weight layer as `Y = X @ W.T` with `W` [out_channels, K]
(`weight_rows`) and `X` [P, K] (`sample_rows`): for a convolution a row of `X` is one receptive
field (im2col), K = in_channels / groups * prod(kernel_size).
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.errors import DialectError
from mpqdm_fx.graph.editing import add_module, free_name, replace_module, shallow_clone

__all__ = [
    "EMBEDDINGS",
    "WEIGHT_LAYERS",
    "WeightLayer",
    "add_module",
    "called_module",
    "free_name",
    "is_pointwise",
    "output_positions",
    "padding_sides",
    "rebuild_layer",
    "replace_module",
    "sample_rows",
    "weight_layers",
    "weight_rows",
]

#: Module classes whose weight multiplies an activation: what gets quantized.
WEIGHT_LAYERS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

#: Tables of parameters: counted, kept at 8 bits, never multiplied.
EMBEDDINGS: tuple[type[nn.Module], ...] = (nn.Embedding,)


def called_module(
    graph_module: fx.GraphModule, node: object, *classes: type[nn.Module]
) -> nn.Module | None:
    """Return the module that a node calls, if it calls one of these classes.

    Args:
        graph_module: the graph's owner.
        node: a node, or anything that stands as an argument of one.
        classes: accepted classes; none given means any.
    """
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = graph_module.get_submodule(str(node.target))
    return module if isinstance(module, classes or nn.Module) else None


@dataclass(frozen=True, kw_only=True)
class WeightLayer:
    """One weight layer of a graph.

    Attributes:
        name: fully qualified name, the target of its first call in graph order.
        module: the layer; a convolution, linear or embedding module.
        nodes: its calls in graph order. More than one for a shared module, and then possibly
            under other names than `name` (tied layers).
    """

    name: str
    module: nn.Module
    nodes: tuple[fx.Node, ...]

    @property
    def weight(self) -> Tensor:
        """The layer's weight, axis 0 over output channels (rows, for an embedding)."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight


def weight_layers(
    graph_module: fx.GraphModule, *, embeddings: bool = False
) -> dict[str, WeightLayer]:
    """Find the weight layers that a graph calls.

    Args:
        graph_module: a module-level graph.
        embeddings: find `EMBEDDINGS` too.

    Returns:
        Fully qualified name to layer, in graph order. A module that sits at several names is one
        layer under the first of them.
    """
    kinds = WEIGHT_LAYERS + (EMBEDDINGS if embeddings else ())
    calls: dict[int, list[fx.Node]] = {}
    modules: dict[int, nn.Module] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, kinds):
            calls.setdefault(id(module), []).append(node)
            modules[id(module)] = module
    layers = (
        WeightLayer(name=str(nodes[0].target), module=modules[key], nodes=tuple(nodes))
        for key, nodes in calls.items()
    )
    return {layer.name: layer for layer in layers}


def is_pointwise(module: nn.Module) -> bool:
    """Whether a layer applies one matrix to each row or pixel.

    Args:
        module: any module.

    Returns:
        True for a linear layer and for an ungrouped 1x1 Conv2d of stride 1 without padding.
    """
    if not isinstance(module, nn.Conv2d):
        return isinstance(module, nn.Linear)
    ones = (module.kernel_size, module.stride) == ((1, 1), (1, 1))
    return ones and module.groups == 1 and module.padding in ((0, 0), "valid", "same")


def padding_sides(conv: nn.modules.conv._ConvNd) -> list[int]:
    """What a convolution's forward adds on each side, last axis first, front and back.

    With zeros it is `padding` at the time of the call. Any other mode pads by what the constructor
    wrote down beside it.

    Args:
        conv: Conv1d, Conv2d or Conv3d of any padding and padding mode.

    Returns:
        Two numbers an axis, as `torch.nn.functional.pad` takes them.
    """
    if conv.padding_mode != "zeros":
        return list(conv._reversed_padding_repeated_twice)
    if conv.padding == "valid":
        return [0, 0] * len(conv.kernel_size)
    if conv.padding == "same":
        sizes = zip(conv.kernel_size, conv.dilation, strict=True)
        amounts = [dilation * (kernel - 1) for kernel, dilation in sizes]
        return [side for n in reversed(amounts) for side in (n // 2, n - n // 2)]
    return [n for n in reversed(conv.padding) for _ in range(2)]  # type: ignore[misc]


def weight_rows(module: nn.Module) -> Tensor:
    """View a layer's weight as a matrix.

    Args:
        module: a convolution (not transposed), linear or embedding layer.

    Returns:
        [out_channels, K], detached, sharing storage where it can. K is in_features, or
        in_channels / groups * prod(kernel_size); an embedding gives [num_embeddings, dim].

    Raises:
        DialectError: the module is no weight layer.
    """
    if not isinstance(module, WEIGHT_LAYERS + EMBEDDINGS):
        raise DialectError(f"{type(module).__name__} is no weight layer; see WEIGHT_LAYERS")
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)


def rebuild_layer(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Make a layer like `module` with another weight, of any number of channels.

    Args:
        module: an ungrouped convolution or a linear layer; it is not changed.
        weight: [out_channels, in_channels, *kernel_size] or [out_features, in_features]; copied,
            so that the new layer shares no storage with the old one.
        bias: [out_channels], copied, or None for a layer without bias.

    Returns:
        A new module with the same stride, padding, training flag and `requires_grad`.
    """
    old = module.weight
    assert isinstance(old, Tensor)
    layer = shallow_clone(module)
    copied = None if bias is None else bias.detach().clone(memory_format=torch.contiguous_format)
    layer._parameters = {
        "weight": nn.Parameter(
            weight.detach().clone(memory_format=torch.contiguous_format), old.requires_grad
        ),
        "bias": None if copied is None else nn.Parameter(copied, old.requires_grad),
    }
    names = ("out_features", "in_features")
    if not isinstance(module, nn.Linear):
        names = ("out_channels", "in_channels")
    for name, size in zip(names, weight.shape[:2], strict=True):
        setattr(layer, name, size)
    return layer


def output_positions(module: nn.Module, x: Tensor) -> int:
    """Count the rows that `sample_rows` can take from one input.

    Args:
        module: a convolution or linear layer.
        x: its input.

    Returns:
        Batch times output pixels for a convolution, the product of all leading dimensions for a
        linear layer.
    """
    if isinstance(module, nn.Linear):
        return x.numel() // module.in_features
    conv = _convolution(module)
    padded = _padded(conv, x)
    return padded.shape[0] * prod(_output_size(conv, padded))


def sample_rows(
    module: nn.Module,
    x: Tensor,
    *,
    positions: Tensor | None = None,
    count: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Take rows of the matrix X that a layer multiplies with its weight: sampled im2col.

    `F.linear(sample_rows(m, x), weight_rows(m), m.bias)` are the layer's outputs at all its
    positions, channels last.

    Args:
        module: Conv1d/2d/3d (any groups, stride, dilation, padding, padding_mode) or Linear.
        x: the layer's input, [N, C, *spatial] or [C, *spatial], or [..., in_features].
        positions: int64 [P], flat indices into the output positions (batch, then pixels in
            row-major order), as counted by `output_positions`. Default: all of them.
        count: instead of `positions`, draw this many different ones (all, if there are fewer).
        generator: source of the draw, for `count`.

    Returns:
        [P, K] in the dtype of x. For a convolution with groups > 1: [P, groups, K], where output
        channel o of W [O, K] multiplies group o // (O // groups).

    Raises:
        DialectError: the module is no convolution or linear layer.
        ValueError: both `positions` and `count` are given.
    """
    if positions is not None and count is not None:
        raise ValueError("give either positions or count, not both")
    if count is not None:
        total = output_positions(module, x)
        positions = torch.randperm(total, generator=generator)[:count]
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, module.in_features)
        return rows if positions is None else rows[positions.to(x.device)]
    return _convolution_rows(_convolution(module), x, positions)


def _convolution(module: nn.Module) -> nn.modules.conv._ConvNd:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module
    raise DialectError(
        f"{type(module).__name__} has no rows to sample; only Conv1d/2d/3d and Linear do"
    )


def _padded(conv: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """Add the batch axis if it is missing, and the padding."""
    spatial = len(conv.kernel_size)
    x = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    pads = padding_sides(conv)
    if not any(pads):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return nn.functional.pad(x, pads, mode=mode)


def _output_size(conv: nn.modules.conv._ConvNd, padded: Tensor) -> list[int]:
    axes = zip(padded.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    return [(size - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, dilation in axes]


def _convolution_rows(conv: nn.modules.conv._ConvNd, x: Tensor, positions: Tensor | None) -> Tensor:
    padded = _padded(conv, x)
    size = _output_size(conv, padded)
    if positions is None:
        positions = torch.arange(padded.shape[0] * prod(size))
    # A number's place in memory is that of its field's corner and, within the field, one offset.
    padded = padded.contiguous()
    coordinates = torch.unravel_index(positions.to(x.device), (padded.shape[0], *size))
    corner = coordinates[0] * padded.stride(0)
    offset = torch.arange(padded.shape[1], device=x.device) * padded.stride(1)
    axes = zip(
        coordinates[1:],
        padded.stride()[2:],
        conv.kernel_size,
        conv.stride,
        conv.dilation,
        strict=True,
    )
    for coordinate, step, k, stride, dilation in axes:
        corner = corner + coordinate * (step * stride)
        offset = offset[..., None] + torch.arange(k, device=x.device) * (step * dilation)
    few = torch.int32 if padded.numel() < 2**31 else torch.int64
    places = corner[:, None].to(few) + offset.flatten().to(few)
    rows = padded.flatten().index_select(0, places.flatten()).view(places.shape)
    return rows if conv.groups == 1 else rows.reshape(len(rows), conv.groups, -1)
