"""Rounding that can be trained through: exact forward, straight-through backward.

Forward, every function gives the very numbers of the functions that it trains for (`grids.snap`,
`grids.round_scale`, the q/dq ops, `dynamic.fake_quantize_dynamic`): what is trained is what is
stored (but for stochastic rounding, an option). Backward, a rounding counts as the identity inside
its range and as a constant outside (Bengio et al., arXiv 1308.3432), and step sizes get the
gradient of LSQ (Esser et al., arXiv 1902.08153, equation 3).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpqdm_fx.numerics.activations.dynamic import fake_quantize_dynamic
from mpqdm_fx.numerics.levels.grids import round_scale
from mpqdm_fx.numerics.solve.stochastic import stochastic_places

__all__ = [
    "fake_quantize_affine",
    "fake_quantize_dynamic_ste",
    "round_half_ste",
    "round_scale_ste",
    "round_ste",
    "table_values",
    "values_of_codes",
]


def round_ste(x: Tensor) -> Tensor:
    """Round to whole numbers; the gradient passes unchanged."""
    result: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return result


def round_scale_ste(scale: Tensor) -> Tensor:
    """`grids.round_scale`; the gradient passes unchanged."""
    result: Tensor = _RoundScale.apply(scale)  # type: ignore[no-untyped-call]
    return result


def round_half_ste(x: Tensor) -> Tensor:
    """Round to half precision, kept as float32, finite; the gradient passes unchanged."""
    result: Tensor = _RoundHalf.apply(x)  # type: ignore[no-untyped-call]
    return result


def values_of_codes(weight: Tensor, scale: Tensor, codes: Tensor, reach: Tensor) -> Tensor:
    """`codes * scale`, with a gradient to the weights that the codes were chosen for.

    Args:
        weight: Trained weight rows [O, K], float32.
        scale: Step of each row [O], float32, as stored.
        codes: What the weights were rounded to, int8 [O, K].
        reach: Half a spacing beyond the outermost level of each row [O], in units of the scale:
            weights beyond it get no gradient.

    Returns:
        float32 [O, K]. The gradient to `weight` is that of the identity inside the range; that to
        `scale` is `code - weight / scale` inside and `code` outside.
    """
    result: Tensor = _ValuesOfCodes.apply(weight, scale, codes, reach)  # type: ignore[no-untyped-call]
    return result


def table_values(
    weight: Tensor, scale: Tensor, table: Tensor, draws: Tensor | None = None
) -> Tensor:
    """`level * scale` of each row's own levels: the nearest one, or one of the two around.

    Args:
        weight: Trained weight rows [O, K], float32.
        scale: Step of each row [O], float32.
        table: Levels of each row [O, L], ascending, whole numbers in a float dtype; levels may
            repeat.
        draws: Uniform on [0, 1), [O, K]: round stochastically by them. None takes the nearest.

    Returns:
        float32 [O, K]. Gradients to `weight` and `scale` are those of `values_of_codes`, half the
        last gap beyond a row's own outermost levels; a level gets the sum of what flows to its
        weights, times the step.
    """
    ratio = weight.detach() / scale.detach()[:, None]
    levels = table.detach()
    if draws is None:
        index = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, ratio, right=True)
    else:
        index = stochastic_places(ratio, levels, draws)
    # bytes: what is kept for the backward pass is a number for every weight of the model
    result: Tensor = _TableValues.apply(  # type: ignore[no-untyped-call]
        weight, scale, table, index.to(torch.uint8)
    )
    return result


def fake_quantize_affine(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """What a q/dq pair computes, `scale * (clamp(round(x / scale) + zero_point) - zero_point)`.

    Args:
        x: Any float dtype; computed in float32.
        scale: Positive step, float32, of a shape that x's broadcasts with.
        zero_point: Whole number in float32, likewise.
        quant_min: Smallest code.
        quant_max: Largest code.

    Returns:
        Shape and dtype of x. Gradients: to x the identity inside the range; to the step the
        rounding error in steps inside and the outermost code outside; to the zero point minus the
        step outside the range (LSQ+, Bhalgat et al., arXiv 2004.09576, equation 5).
    """
    result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, zero_point, quant_min, quant_max
    )
    return result


def fake_quantize_dynamic_ste(x: Tensor, bits: int, axes: int | tuple[int, ...]) -> Tensor:
    """`dynamic.fake_quantize_dynamic`; the gradient passes unchanged, nothing is ever clipped."""
    result: Tensor = _Dynamic.apply(x, bits, axes)  # type: ignore[no-untyped-call]
    return result


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class _RoundScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        return round_scale(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class _RoundHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        top = torch.finfo(torch.float16).max
        return x.clamp(-top, top).half().float()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class _Dynamic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, axes: int | tuple[int, ...]) -> Tensor:
        return fake_quantize_dynamic(x, bits, axes)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


class _ValuesOfCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, codes: Tensor, reach: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale, codes, reach)
        return codes * scale[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, scale, codes, reach = ctx.saved_tensors
        (gradient,) = gradients
        ratio = weight / scale[:, None]
        inside = ratio.abs() <= reach[:, None]
        return gradient * inside, _to_scale(gradient, codes.float(), ratio, inside), None, None


class _TableValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale, table, index)
        return table.gather(1, index.long()) * scale[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, scale, table, index = ctx.saved_tensors
        (gradient,) = gradients
        places = index.long()
        ratio = weight / scale[:, None]
        low, high = _reach(table)
        inside = (ratio >= low[:, None]) & (ratio <= high[:, None])
        to_scale = _to_scale(gradient, table.gather(1, places), ratio, inside)
        to_levels = torch.zeros_like(table).scatter_add_(1, places, gradient * scale[:, None])
        return gradient * inside, to_scale, to_levels, None


def _to_scale(gradient: Tensor, codes: Tensor, ratio: Tensor, inside: Tensor) -> Tensor:
    return (gradient * torch.where(inside, codes - ratio, codes)).sum(1)


def _reach(table: Tensor) -> tuple[Tensor, Tensor]:
    """Half a gap beyond the outermost levels of each row, which may be repeated."""
    low, high = table[:, 0], table[:, -1]
    second = table.where(table > low[:, None], math.inf).amin(1)
    last = table.where(table < high[:, None], -math.inf).amax(1)
    # a row of one level has no gap: as far as to the next whole number but one
    below = torch.where(second.isfinite(), second - low, 2.0)
    above = torch.where(last.isfinite(), high - last, 2.0)
    return low - below / 2, high + above / 2


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
    ) -> Tensor:
        # the q/dq ops divide in double precision, then multiply in single
        inverse = (1.0 / scale.double()).float()
        steps = x.to(torch.float32) * inverse
        shifted = steps.round().add_(zero_point)
        codes = shifted.clamp(quant_min, quant_max)
        inside = codes == shifted
        codes -= zero_point
        ctx.save_for_backward(steps, codes, inside, scale, zero_point)
        return (codes * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        steps, codes, inside, scale, zero_point = ctx.saved_tensors
        (gradient,) = gradients
        passed = gradient * inside
        # the step's is (code - steps) inside and the code outside; the zero point's -scale outside
        to_scale = (gradient * codes).sub_(passed * steps).sum_to_size(scale.shape)
        to_zero = (passed - gradient).mul(scale).sum_to_size(zero_point.shape)
        return passed, to_scale, to_zero, None, None
