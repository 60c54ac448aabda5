"""What a program has to compute, and how closely.

The reference is the graph in float with fake-quantized activations. Its integers and the program's
are the same, but for values next to a tie between two codes: float parts (norms, softmax, sums of
convolutions) are summed in another order there, by about one unit in the last place, and now and
then a value falls to the other side. In a shallow graph such steps are rare and small. In a deep
one every later rounding spreads them, until the program's rounding errors are another draw of the
same noise; two draws differ by 3 dB more than each from the truth. How far a given graph is on that
way is found by running it some more times with every float value nudged by that unit.

A float program has no codes: it is as near to its graph as a nudged run of it is, or an operator
computes something else (XNNPACK's GELU for the tanh form, say: 80 to 104 dB).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx

from mpqdm_fx.errors import LoweringError
from mpqdm_fx.graph.nested import tensors_of
from mpqdm_fx.numerics.metrics import sqnr_db

__all__ = ["CLOSE_DB", "MARGIN_DB", "NUDGE", "Nudged", "Reference"]

# What is always good enough for a program of integers, and the least for any float program.
CLOSE_DB = 60.0
# What is always good enough for a float program: only the order of sums differs.
FLOAT_DB = 110.0
# A draw of the same rounding noise is 3 dB from the reference's own quality; as much again is
# left. A wrong layout or scale costs tens of dB.
MARGIN_DB = 6.0
# Where the graph does not spread nudges, the program has to be nearer to it than another rounding
# of the same kind would be (a range per tensor instead of per sample, say): those differ by the
# quality less 3 dB at best.
STEADY_DB = 3.0
# Relative size of a nudge: what sums of float32 in another order differ by.
NUDGE = 2e-7
_DRAWS = 4


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Expected outputs, and how far a program may be from them.

    Attributes:
        outputs: Tensors that the graph returns, in order.
        bound_db: Least SQNR of a program against them.
        quality_db: The outputs against those with float activations; None for a float graph.
        nudged: Outputs of the graph's nudged run of a seed: as right as `outputs`. A graph of few
            ties steps over one in some of them only, and so may the program. None for a float
            graph.
    """

    outputs: tuple[Tensor, ...]
    bound_db: float
    quality_db: float | None
    nudged: Callable[[int], tuple[Tensor, ...]] | None = None

    @classmethod
    def of_float(
        cls, graph: fx.GraphModule, lowered: fx.GraphModule, inputs: Sequence[Any]
    ) -> Self:
        """The reference of a float program: `FLOAT_DB`, or less where nudges spread.

        Args:
            graph: Float graph.
            lowered: The same as it is lowered: nudged, for its constants are folded.
            inputs: Inputs of both, in order.
        """
        outputs = _finite(tensors_of(graph(*inputs)))
        stability = _sqnr(outputs, tensors_of(Nudged(lowered).run(*inputs)))
        bound = min(FLOAT_DB, max(CLOSE_DB, stability - MARGIN_DB))
        return cls(outputs=outputs, bound_db=bound, quality_db=None)

    @classmethod
    def of_quantized(
        cls, rounded: fx.GraphModule, quantized: fx.GraphModule, inputs: Sequence[Any]
    ) -> Self:
        """The reference of an int8 program.

        Args:
            rounded: The graph with float activations.
            quantized: The same with quantized ones.
            inputs: Inputs of both, in order.
        """
        outputs = _finite(tensors_of(quantized(*inputs)))
        quality = _sqnr(tensors_of(rounded(*inputs)), outputs)

        @functools.cache
        def nudged(seed: int) -> tuple[Tensor, ...]:
            return tensors_of(Nudged(quantized, seed=seed).run(*inputs))

        stability = _sqnr(outputs, nudged(0))
        steady = min(stability - MARGIN_DB, quality + STEADY_DB)
        bound = min(CLOSE_DB, max(quality - MARGIN_DB, steady))
        return cls(outputs=outputs, bound_db=bound, quality_db=quality, nudged=nudged)

    def check(
        self, path: Path, actual: Sequence[Tensor], scale: float | None
    ) -> tuple[float, float | None]:
        """Compare a program's outputs.

        Args:
            path: Where the program is to be written, for the message.
            actual: What it returned.
            scale: Step of the first output's integers; None where it is float.

        Returns:
            SQNR in dB, and the largest difference of the first output in steps (None without).

        Raises:
            LoweringError: The outputs are further away than `bound_db`, and integers by more than
                one step, from `outputs` and from those of all nudged runs.
        """
        sqnr, steps = _sqnr(self.outputs, actual), None
        if scale is not None:
            steps = float((actual[0] - self.outputs[0]).abs().max()) / scale
            if len(actual) == 1 and steps <= 1.0 + 1e-3:
                return sqnr, steps
        if sqnr >= self.bound_db or self._is_near_a_draw(actual):
            return sqnr, steps
        note = "" if steps is None else f" (up to {steps:.0f} steps of its integers)"
        raise LoweringError(
            f"{path.name}: the program ran, but its output differs from the graph it was made of: "
            f"{sqnr:.1f} dB{note}, expected at least {self.bound_db:.1f} dB; nothing was written. "
            f"This is a bug of the backend or of its remedies: please report the model"
        )

    def _is_near_a_draw(self, actual: Sequence[Tensor]) -> bool:
        """One after the other: each is a run of the whole graph, and most programs need none."""
        nudged = self.nudged
        if nudged is None:
            return False
        return any(_sqnr(nudged(seed), actual) >= self.bound_db for seed in range(_DRAWS))


class Nudged(fx.Interpreter):
    """Runs a graph with every float value off by the rounding error of one sum.

    Args:
        graph_module: The graph.
        seed: Seed of the errors.
        size: Their relative size (standard deviation).
    """

    def __init__(self, graph_module: fx.GraphModule, *, seed: int = 0, size: float = NUDGE) -> None:
        super().__init__(graph_module)
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and nudge what it gives."""
        result = super().run_node(n)
        if n.op == "get_attr" or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        noise = torch.randn(result.shape, generator=self._generator)
        return result * (1 + self._size * noise.to(result.dtype))


def _finite(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Refuse outputs that nothing can be compared with."""
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise LoweringError(
            "the graph returns NaN or infinity for the inputs that its program is tried on, so the "
            "program could not be compared with it; lower it with inputs that it takes "
            "(backends.xnnpack.lower.lower_xnnpack)"
        )
    return outputs


def _sqnr(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Of all outputs, each in units of its own size: a large one hides nothing in a small one."""
    sizes = [_size(output) for output in expected] if len(expected) > 1 else [1.0]
    result = sqnr_db(_joined(expected, sizes), _joined(actual, sizes))
    return -math.inf if math.isnan(result) else result


def _size(output: Tensor) -> float:
    """Root mean square; one if there is nothing but zeros."""
    return float(output.double().square().mean().sqrt()) if bool(output.any()) else 1.0


def _joined(tensors: Sequence[Tensor], sizes: Sequence[float]) -> Tensor:
    parts = zip(tensors, sizes, strict=True)
    return torch.cat([t.detach().flatten().float() / size for t, size in parts])
