"""The blocks that random graphs are made of; used by `testing.graphs`."""

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from mpqdm_fx.testing.builder import GraphBuilder
from mpqdm_fx.testing.token_blocks import TOKEN_EMITTERS

__all__ = ["EMITTERS", "Block"]

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block; a kind reads the fields it has a use for.

    Attributes:
        kind: one of `KINDS`.
        channels: output channels.
        kernel: kernel size of its convolutions.
        stride: stride of its convolution, where the kind allows one.
        groups: groups of its convolution, where the channels allow them.
        bias: whether its weight layers have one.
        variant: tells apart the forms of one kind.
    """

    kind: str
    channels: int = 4
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    bias: bool = True
    variant: int = 0


def _conv2d(b: GraphBuilder, name: str, inputs: int, block: Block, **settings: int) -> str:
    options = dict(settings)
    channels = options.pop("channels", block.channels)
    # one variant says the same number in words
    same = block.variant == 2 and options.get("stride", 1) == 1
    conv = nn.Conv2d(
        inputs,
        channels,
        block.kernel,
        padding="same" if same else block.kernel // 2,
        bias=block.bias,
        padding_mode="circular" if block.variant == 3 and block.kernel == 3 else "zeros",
        device="meta",
        **options,
    )
    return b.module(name, conv)


def _linear(b: GraphBuilder, name: str, inputs: int, outputs: int, bias: bool) -> str:
    return b.module(name, nn.Linear(inputs, outputs, bias, device="meta"))


def _silu(b: GraphBuilder, x: fx.Node) -> fx.Node:
    # one activation object for the whole network, as diffusers has it
    return b.call(b.install("act", nn.SiLU()), x)


def _tokens(b: GraphBuilder, image: fx.Node, channels: int) -> fx.Node:
    rows = b.call(_aten.permute.default, image, [0, 2, 3, 1])
    _, height, width = b.shape
    return b.call(_aten.reshape.default, rows, [b.batch, height * width, channels])


def _image(b: GraphBuilder, tokens: fx.Node, channels: int) -> fx.Node:
    _, height, width = b.shape
    grid = b.call(_aten.reshape.default, tokens, [b.batch, height, width, channels])
    return b.call(_aten.permute.default, grid, [0, 3, 1, 2])


def conv(b: GraphBuilder, block: Block) -> None:
    """Emit a convolution with stride and groups."""
    channels, height, width = b.shape
    name = _conv2d(b, "conv", channels, block, stride=block.stride, groups=block.groups)
    size = tuple((n - 1) // block.stride + 1 for n in (height, width))
    b.set_image(b.call(name, b.image), block.channels, (size[0], size[1]))


def norm_act(b: GraphBuilder, block: Block) -> None:
    """Emit a group norm and SiLU: a module, or aten in variant 1; no parameters in variant 2."""
    channels = b.shape[0]
    affine = block.variant != 2
    norm = b.module("norm", nn.GroupNorm(2, channels, affine=affine, device="meta"))
    x = b.call(norm, b.image)
    b.set_image(b.call(_aten.silu.default, x) if block.variant == 1 else _silu(b, x), channels)


def residual(b: GraphBuilder, block: Block) -> None:
    """Emit `x + conv(silu(norm(x)))`."""
    channels, x = b.shape[0], b.image
    norm_act(b, block)
    y = b.call(_conv2d(b, "conv", channels, block, channels=channels), b.image)
    b.set_image(b.call(_aten.add.Tensor, x, y), channels)


def skip_concat(b: GraphBuilder, block: Block) -> None:
    """Emit a concatenation with an earlier image, and what a UNet's up block reads it with.

    Variant 0 reads it with a convolution, 1 with a norm and a shortcut convolution, 2 concatenates
    three parts, 3 reads a nested concatenation.
    """
    channels = b.shape[0]
    skip, skip_channels = b.skip()
    parts, total = [b.image, skip], channels + skip_channels
    if block.variant == 2:
        parts, total = [*parts, b.image], total + channels
    joined = b.call(_aten.cat.default, parts, 1)
    if block.variant == 3:
        joined, total = b.call(_aten.cat.default, [joined, skip], 1), total + skip_channels
    out = b.call(_conv2d(b, "conv", total, block), joined)
    if block.variant == 1:
        norm = b.module("norm", nn.GroupNorm(2, total, device="meta"))
        hidden = _silu(b, b.call(norm, joined))
        deep = b.call(_conv2d(b, "deep", total, block), hidden)
        out = b.call(_aten.add.Tensor, out, deep)
    b.set_image(out, block.channels)


def upsample(b: GraphBuilder, block: Block) -> None:
    """Emit a nearest upsampling; a large image is sampled down instead.

    By 2, or by 1 and 3 in variant 1; given as a size in variants 2 and 3.
    """
    channels, height, width = b.shape
    if height * width > 100:
        conv(b, Block(kind="conv", channels=channels, kernel=3, stride=2))
        return
    factors = (1, 3) if block.variant == 1 else (2, 2)
    size = [height * factors[0], width * factors[1]]
    if block.variant < 2:
        scales = [float(f) for f in factors]
        out = b.call(_aten.upsample_nearest2d.vec, b.image, None, scales)
    else:
        out = b.call(_aten.upsample_nearest2d.vec, b.image, size, None)
    b.set_image(out, channels, (size[0], size[1]))


def linear(b: GraphBuilder, block: Block) -> None:
    """Emit a layer norm and a linear layer over channels; variant 1 has no norm."""
    channels = b.shape[0]
    x = _tokens(b, b.image, channels)
    if block.variant != 1:
        x = b.call(b.module("norm", nn.LayerNorm(channels, device="meta")), x)
    x = b.call(_linear(b, "proj", channels, block.channels, block.bias), x)
    b.set_image(_image(b, x, block.channels), block.channels)


def token_concat(b: GraphBuilder, block: Block) -> None:
    """Emit a linear layer over tokens concatenated along their last axis."""
    channels = b.shape[0]
    skip, skip_channels = b.skip()
    pair = [_tokens(b, b.image, channels), _tokens(b, skip, skip_channels)]
    joined = b.call(_aten.cat.default, pair, -1 if block.variant % 2 else 2)
    proj = _linear(b, "proj", channels + skip_channels, block.channels, block.bias)
    b.set_image(_image(b, b.call(proj, joined), block.channels), block.channels)


def attention(b: GraphBuilder, block: Block) -> None:
    """Emit self-attention with two heads and a residual."""
    channels, height, width = b.shape
    x = _tokens(b, b.image, channels)
    heads = []
    for name in ("to_q", "to_k", "to_v"):
        y = b.call(_linear(b, name, channels, channels, block.bias), x)
        y = b.call(_aten.reshape.default, y, [b.batch, height * width, 2, channels // 2])
        heads.append(b.call(_aten.transpose.int, y, 1, 2))
    y = b.call(_aten.scaled_dot_product_attention.default, *heads)
    y = b.call(_aten.transpose.int, y, 1, 2)
    y = b.call(_aten.reshape.default, y, [b.batch, height * width, channels])
    y = b.call(_linear(b, "to_out", channels, channels, True), y)
    out = b.call(_aten.add.Tensor, _image(b, y, channels), b.image)
    b.set_image(out, channels)


def geglu(b: GraphBuilder, block: Block) -> None:
    """Emit a gated feed-forward; the variants cut by chunk or split, gate by GELU or SiLU.

    Variant 3 gates with the first half.
    """
    channels = b.shape[0]
    inner = 2 * channels
    x = _tokens(b, b.image, channels)
    y = b.call(_linear(b, "proj", channels, 2 * inner, block.bias), x)
    if block.variant == 1:
        halves = b.call(_aten.split.Tensor, y, inner, -1)
    elif block.variant == 2:
        halves = b.call(_aten.split_with_sizes.default, y, [inner, inner], 2)
    else:
        halves = b.call(_aten.chunk.default, y, 2, -1)
    value, gate = b.call(operator.getitem, halves, 0), b.call(operator.getitem, halves, 1)
    if block.variant == 3:
        value, gate = gate, value
    if block.variant == 2:
        active = _silu(b, gate)
    else:
        form = "tanh" if block.variant == 1 else "none"
        active = b.call(_aten.gelu.default, gate, approximate=form)
    y = b.call(_aten.mul.Tensor, value, active)
    y = b.call(_linear(b, "out", inner, channels, block.bias), y)
    b.set_image(_image(b, y, channels), channels)


def dropout(b: GraphBuilder, block: Block) -> None:
    """Emit an inactive dropout: a module, aten with train=False, or aten with p = 0."""
    if block.variant == 0:
        out = b.call(b.install(f"drop{block.channels}", nn.Dropout(0.1)), b.image)
    else:
        probability, train = (0.1, False) if block.variant == 1 else (0.0, True)
        out = b.call(_aten.dropout.default, b.image, probability, train)
    b.set_image(out, b.shape[0])


def cast(b: GraphBuilder, block: Block) -> None:
    """Emit a cast to float32, which is a no-op; variants 2 and 3 go through bfloat16."""
    x = b.image
    if block.variant >= 2:
        x = b.call(_aten.to.dtype, x, torch.bfloat16)
    if block.variant % 2:
        out = b.call(_aten._to_copy.default, x, dtype=torch.float32)
    else:
        out = b.call(_aten.to.dtype, x, torch.float32)
    b.set_image(out, b.shape[0])


def assertion(b: GraphBuilder, block: Block) -> None:
    """Emit checks as the export leaves them: of metadata, or of a size."""
    if block.variant % 2:
        size = b.call(_aten.sym_size.int, b.image, 0)
        holds = b.call(operator.ge, size, 1)
        b.call(_aten._assert_scalar.default, holds, "batch is empty")
    else:
        b.call(_aten._assert_tensor_metadata.default, b.image, dtype=torch.float32)


def crop(b: GraphBuilder, block: Block) -> None:
    """Emit `x[:, :, 1:]` as the export does: one slice per axis, most of which take everything."""
    channels, height, width = b.shape
    cut = 1 if block.variant % 2 == 0 and height > 2 else 0
    x = b.image
    for axis, start in enumerate((0, 0, cut)):
        x = b.call(_aten.slice.Tensor, x, axis, start, sys.maxsize)
    b.set_image(x, channels, (height - cut, width))


def pool(b: GraphBuilder, block: Block) -> None:
    """Emit an average pooling by 2; 3x3 with padding in variant 1, rounded up in variant 2."""
    channels, height, width = b.shape
    if block.variant == 1:
        args: tuple[object, ...] = ([3, 3], [1, 1], [1, 1])
        size = (height, width)
    elif block.variant == 2:
        args = ([2, 2], [2, 2], [0, 0], True)
        size = (-(-height // 2), -(-width // 2))
    else:
        window = [min(2, height), min(2, width)]
        args = (window, []) if block.variant else (window, window, 0)
        size = (height // window[0], width // window[1])
    b.set_image(b.call(_aten.avg_pool2d.default, b.image, *args), channels, size)


def preconditioned(b: GraphBuilder, block: Block) -> None:
    """Emit an image times the reciprocal of its mean square plus one."""
    squares = b.call(_aten.mul.Tensor, b.image, b.image)
    total = b.call(_aten.add.Tensor, b.call(_aten.mean.dim, squares, [1], True), 1)
    scaled = b.call(_aten.mul.Tensor, b.image, b.call(_aten.reciprocal.default, total))
    b.set_image(scaled, b.shape[0])


def batch_norm(b: GraphBuilder, block: Block) -> None:
    """Emit a convolution and a batch norm; variant 1 without affine parameters."""
    conv(b, block)
    norm = nn.BatchNorm2d(block.channels, affine=block.variant != 1, device="meta")
    b.set_image(b.call(b.module("norm", norm), b.image), block.channels)


def shared(b: GraphBuilder, block: Block) -> None:
    """Emit one convolution that is called twice; in variant 1 over concatenations."""
    channels = b.shape[0]
    twice = block.variant == 1
    name = _conv2d(b, "conv", channels * (1 + twice), block, channels=channels)
    for _ in range(2):
        x = b.call(_aten.cat.default, [b.image, b.image], 1) if twice else b.image
        b.set_image(_silu(b, b.call(name, x)), channels)


def dead(b: GraphBuilder, block: Block) -> None:
    """Emit a convolution that nothing reads."""
    b.call(_conv2d(b, "conv", b.shape[0], block), b.image)


def time_embedding(b: GraphBuilder, block: Block) -> None:
    """Emit a timestep embedding added to the image: sinusoids, or a table in variant 1.

    Variant 2 moves the timestep before it is cast, variant 3 multiplies it with ones.
    """
    channels = b.shape[0]
    if block.variant == 1:
        table = nn.Embedding(10, channels, device="meta")
        embedding = b.call(b.module("embedding", table), b.timestep)
    else:
        t = b.timestep
        if block.variant == 3:
            t = b.call(
                _aten.mul.Tensor, t, b.call(_aten.ones.default, [b.batch], dtype=torch.int64)
            )
        moves = [(_aten.to.dtype, torch.float32), (_aten.unsqueeze.default, 1)]
        for op, argument in reversed(moves) if block.variant == 2 else moves:
            t = b.call(op, t, argument)
        halves = [b.call(_aten.sin.default, t), b.call(_aten.cos.default, t)]
        waves = b.call(_aten.cat.default, halves, -1)
        embedding = b.call(_linear(b, "linear_1", 2, channels, block.bias), waves)
    embedding = b.call(_linear(b, "linear_2", channels, channels, block.bias), _silu(b, embedding))
    shift = b.call(_aten.unsqueeze.default, b.call(_aten.unsqueeze.default, embedding, 2), 3)
    b.set_image(b.call(_aten.add.Tensor, b.image, shift), channels)


def _token_block(kind: str) -> Callable[[GraphBuilder, Block], None]:
    return lambda b, block: TOKEN_EMITTERS[kind](b, block.variant)


#: Kind to emitter, from plain to intricate.
EMITTERS: Mapping[str, Callable[[GraphBuilder, Block], None]] = {
    f.__name__: f
    for f in (
        conv,
        norm_act,
        residual,
        linear,
        skip_concat,
        upsample,
        geglu,
        attention,
        token_concat,
        time_embedding,
        batch_norm,
        shared,
        dropout,
        cast,
        assertion,
        crop,
        pool,
        preconditioned,
        dead,
    )
} | {kind: _token_block(kind) for kind in TOKEN_EMITTERS}
