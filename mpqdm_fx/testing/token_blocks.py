"""Blocks as transformers have them: repeats, in-place code, rotary embeddings, patches."""

import operator
from collections.abc import Callable, Mapping

import torch
from torch import nn

from mpqdm_fx.testing.builder import GraphBuilder

__all__ = ["TOKEN_EMITTERS"]

_aten = torch.ops.aten


def repeats(b: GraphBuilder, variant: int) -> None:
    """Emit means that are repeated: expanded and added, expanded and viewed, tiled, interleaved."""
    channels, height, width = b.shape
    size = [b.batch, channels, height, width]
    x = b.call(_aten.clone.default, b.image)
    if variant == 1:
        row = b.call(_aten.sum.dim_IntList, x, [2], True)
        y = b.call(_aten.neg.default, b.call(_aten.expand.default, row, size))
        b.set_image(b.call(_aten.add.Tensor, x, y), channels)
        return
    mean = b.call(_aten.mean.dim, x, [2, 3], True)
    if variant == 0:
        y = b.call(_aten.expand.default, mean, size)
    elif variant == 2:
        y = b.call(_aten.repeat.default, mean, [1, 1, height, width])
    else:
        halves = b.call(_aten.slice.Tensor, mean, 1, 0, channels // 2)
        y = b.call(_aten.repeat_interleave.self_int, halves, 2, 1)
    b.set_image(b.call(_aten.add.Tensor, x, y), channels)


def fill(b: GraphBuilder, variant: int) -> None:
    """Emit channels that are overwritten: some, one, or the even and then the odd ones."""
    channels = b.shape[0]
    x = b.image
    if variant == 0:
        part = b.call(_aten.neg.default, b.call(_aten.slice.Tensor, x, 1, 1, 3))
        y = b.call(_aten.slice_scatter.default, x, part, 1, 1, 3)
    elif variant == 1:
        part = b.call(_aten.neg.default, b.call(_aten.select.int, x, 1, 0))
        y = b.call(_aten.select_scatter.default, x, part, 1, channels - 1)
        joined = b.call(_aten.cat.default, [y, x], 1)
        y = b.call(_aten.slice.Tensor, joined, 1, 0, channels)
        flat = b.call(_aten.flatten.using_ints, y, 2)
        y = b.call(_aten.reshape.default, flat, [b.batch, channels, *b.shape[1:]])
    else:
        empty = b.call(_aten.empty_like.default, x)
        even, odd = (b.call(_aten.slice.Tensor, x, 1, i, channels, 2) for i in (0, 1))
        if variant == 3:
            even, odd = b.call(_aten.neg.default, odd), even
        y = b.call(_aten.slice_scatter.default, empty, even, 1, 0, channels, 2)
        y = b.call(_aten.slice_scatter.default, y, odd, 1, 1, channels, 2)
    b.set_image(y, channels)


def rotary(b: GraphBuilder, variant: int) -> None:
    """Emit pairs of channels that are turned: complex numbers, or parts of pairs.

    By angles that the channels give themselves (0), by a constant angle (1), by conjugates (2); as
    sines and cosines of two halves (3).
    """
    channels, height, width = b.shape
    rows = b.call(_aten.permute.default, b.image, [0, 2, 3, 1])
    rows = b.call(_aten.contiguous.default, rows)  # complex views take dense pairs alone
    pairs = b.call(_aten.reshape.default, rows, [b.batch, height * width, channels // 2, 2])
    if variant == 3:
        halves = b.call(_aten.unbind.int, pairs, -1)
        first, second = (b.call(operator.getitem, halves, i) for i in (0, 1))
        turned = b.call(_aten.stack.default, [b.call(_aten.neg.default, second), first], -1)
    else:
        z = b.call(_aten.view_as_complex.default, pairs)
        if variant == 1:
            steps = b.call(_aten.arange.default, channels // 2, dtype=torch.float32)
            ones = b.call(_aten.ones_like.default, steps)
            other = b.call(_aten.unsqueeze.default, b.call(_aten.polar.default, ones, steps), 0)
        elif variant == 2:
            other = b.call(_aten._conj.default, b.call(_aten.slice.Tensor, z, 1, 0, 1))
        else:
            angle = b.call(_aten.select.int, pairs, -1, 0)
            other = b.call(_aten.exp.default, b.call(_aten.mul.Tensor, angle, 1j))
        z = b.call(_aten.mul.Tensor, z, other)
        turned = b.call(_aten.view_as_real.default, b.call(_aten.sub.Tensor, z, 0.5))
    grid = b.call(_aten.reshape.default, turned, [b.batch, height, width, channels])
    b.set_image(b.call(_aten.permute.default, grid, [0, 3, 1, 2]), channels)


def products(b: GraphBuilder, variant: int) -> None:
    """Emit rows mixed with one another: by themselves, by one matrix for all, by a vector."""
    channels = b.shape[0]
    x = b.call(_aten.softmax.int, b.image, -1)
    turned = b.call(_aten.transpose.int, x, 2, 3)
    if variant == 0:
        y = b.call(_aten.matmul.default, b.call(_aten.matmul.default, x, turned), x)
    elif variant == 1:
        shared = b.call(_aten.matmul.default, x, turned)
        one = b.call(_aten.slice.Tensor, b.call(_aten.slice.Tensor, shared, 0, 0, 1), 1, 0, 1)
        y = b.call(_aten.matmul.default, one, x)
    elif variant == 2:
        first = b.call(_aten.select.int, b.call(_aten.select.int, turned, 0, 0), 0, 0)
        scores = b.call(_aten.matmul.default, x, first)
        y = b.call(_aten.matmul.default, scores, b.call(_aten.mean.dim, x, [1], True))
    else:
        first = b.call(_aten.select.int, b.call(_aten.select.int, x, 0, 0), 0, 0)
        vector = b.call(_aten.select.int, first, 0, 0)
        y = b.call(_aten.unsqueeze.default, b.call(_aten.matmul.default, x, vector), -1)
        y = b.call(_aten.pow.Tensor_Scalar, y, 3.0)
    b.set_image(b.call(_aten.add.Tensor, b.image, y), channels)


def patches(b: GraphBuilder, variant: int) -> None:
    """Emit a convolution over pairs of channels as volumes, and patches put back by seven axes."""
    channels, height, width = b.shape
    volume = b.call(_aten.unsqueeze.default, b.image, 1)
    kernel = (2, height, 1) if variant == 1 else (2, 1, 1)
    stride = (1, 1, 1) if variant == 2 else kernel
    conv = nn.Conv3d(1, channels, kernel, stride=stride, bias=variant != 3, device="meta")
    tokens = b.call(b.module("patches", conv), volume)
    image = b.call(_aten.mean.dim, tokens, [2, 3] if variant == 1 else [2])
    if variant == 1:
        image = b.call(_aten.unsqueeze.default, image, 2)
        height = 1
    axes = b.call(_aten.reshape.default, image, [b.batch, channels // 2, 2, 1, height, 1, width])
    order = [0, 2, 3, 1, 5, 4, 6]
    parts = b.call(_aten.permute.default, axes, order)
    flat = b.call(_aten.flatten.using_ints, parts, 1, 3)
    b.set_image(b.call(_aten.squeeze.dim, flat, 2), channels, (height, width))


def choices(b: GraphBuilder, variant: int) -> None:
    """Emit values that a condition chooses between, or sequences that are padded to one length."""
    channels = b.shape[0]
    if variant < 2:
        other = b.call(_aten.neg.default, b.image)
        if variant == 1:
            other = b.call(_aten.full.default, [1, 1, 1, 1], 0.5)
        choice = b.call(_aten.gt.Scalar, b.timestep, 4)
        choice = b.call(_aten.reshape.default, choice, [b.batch, 1, 1, 1])
        b.set_image(b.call(_aten.where.self, choice, b.image, other), channels)
        return
    first = b.call(_aten.select.int, b.image, 0, 0)
    second = b.call(_aten.slice.Tensor, first, 0, 0, channels - 1)
    sequences = [first, second] if variant == 2 else [first]
    stacked = b.call(_aten.pad_sequence.default, sequences, True)
    mean = b.call(_aten.mean.dim, stacked, [0], True)
    b.set_image(b.call(_aten.add.Tensor, b.image, mean), channels)


def sequences(b: GraphBuilder, variant: int) -> None:
    """Emit pixels in one line, convolved and then upsampled: by a stride that divides the kernel.

    With output padding (1), by a kernel with a rest (2), or as an image (3).
    """
    channels, height, width = b.shape
    line = b.call(_aten.flatten.using_ints, b.image, 2)
    conv = nn.Conv1d(channels, channels, 3, padding=1, device="meta")
    line = b.call(b.module("line", conv), line)
    if variant == 3:
        image = b.call(_aten.reshape.default, line, [b.batch, channels, height, width])
        up = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, device="meta")
        taller = b.call(b.module("up", up), image)
        b.set_image(taller, channels, (2 * height, 2 * width))
        return
    kernel, padding, extra = ((4, 1, 0), (4, 2, 1), (3, 0, 0))[variant]
    up_line = nn.ConvTranspose1d(
        channels, channels, kernel, 2, padding, output_padding=extra, device="meta"
    )
    longer = b.call(b.module("up", up_line), line)
    kept = b.call(_aten.slice.Tensor, longer, 2, 0, height * width)
    image = b.call(_aten.reshape.default, kept, [b.batch, channels, height, width])
    b.set_image(image, channels)


def edges(b: GraphBuilder, variant: int) -> None:
    """Emit what programs take in another form alone: pads that crop, PReLU of tokens and vectors.

    Variant 2 adds attention without keys.
    """
    channels, height, width = b.shape
    if min(height, width) > 1:
        sides = [-1, 1, 1, -1] if variant % 2 else [0, 0, 1, -1]
        if variant < 2:
            image = b.call(_aten.pad.default, b.image, sides, "constant", 0.5)
        else:
            image = b.call(_aten.constant_pad_nd.default, b.image, sides)
        b.set_image(image, channels)
    if variant == 3:
        vector = b.call(_aten.mean.dim, b.image, [2, 3])
        slope = b.call(b.module("act", nn.PReLU(device="meta")), vector)
        slope = b.call(_aten.reshape.default, slope, [b.batch, channels, 1, 1])
        b.set_image(b.call(_aten.add.Tensor, b.image, slope), channels)
        return
    line = b.call(_aten.flatten.using_ints, b.image, 2)
    line = b.call(b.module("act", nn.PReLU(channels, device="meta")), line)
    if variant == 2:
        none = b.call(_aten.slice.Tensor, line, 1, 0, 0)
        seen = b.call(_aten.scaled_dot_product_attention.default, line, none, none)
        line = b.call(_aten.add.Tensor, line, seen)
    b.set_image(b.call(_aten.reshape.default, line, [b.batch, channels, height, width]), channels)


#: Kind to emitter, each with four variants.
TOKEN_EMITTERS: Mapping[str, Callable[[GraphBuilder, int], None]] = {
    f.__name__: f for f in (repeats, fill, rotary, products, patches, choices, sequences, edges)
}
