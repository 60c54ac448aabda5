"""Second moments of a layer's input rows, as a matrix or as the rows themselves.

Everything that layer-wise quantization needs of its calibration data is H = X^T X / N, and H only
ever stands in `H v`, `(H + ridge I)^-1 v` and conditional means. With N rows of K numbers all of
them cost O(K^3) from the matrix (primal form), or O(N^2 K) from the rows (dual form: the
push-through identity `(X^T X + c I)^-1 X^T = X^T (X X^T + c I)^-1`). Both are exact; the wide
layers of a large UNet (K = 23,040) have few rows and are cheap only in the dual form.
"""

import logging
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from mpqdm_fx.errors import CalibrationError, ConfigError

__all__ = [
    "DOUBLE_WIDTH",
    "DUAL_ROWS",
    "Gram",
    "GramForm",
    "Regression",
    "cholesky",
    "kept_rows",
    "second_moments",
]

logger = logging.getLogger(__name__)

GramForm = Literal["primal", "dual"]

DUAL_ROWS = 2048
"""Most rows that the dual form takes: a factor of 2048 x 2048 for every block of columns."""

DOUBLE_WIDTH = 4096
"""Widest factors in float64; wider ones are float32, as in GPTQ, and their ridge at least 1e-3."""

_CHUNK = 1024  # rows per float32 product; the sum over chunks is float64
_BLOCK = 192  # columns of a product
_TRIES = 6  # ridges, each ten times the one before


def kept_rows(width: int, available: int, max_rows: int) -> int:
    """How many rows a layer's statistics should use.

    Args:
        width: Numbers in a row, K.
        available: Rows that the calibration data has.
        max_rows: The most rows wanted.

    Returns:
        As many as are wanted and available if they are at least K (primal form), else at most
        `DUAL_ROWS` of them (dual form).
    """
    rows = min(available, max_rows)
    return rows if width <= rows else min(rows, DUAL_ROWS)


def cholesky(matrix: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of `matrix + ridge * I`, with a larger ridge where that fails.

    Args:
        matrix: Symmetric, positive semidefinite up to rounding, [n, n]; it is not changed.
        ridge: First ridge, positive.

    Returns:
        The factor and the ridge it was found with.

    Raises:
        CalibrationError: No factor after five tenfold ridges (NaN, or not semidefinite).
    """
    for attempt in range(_TRIES):
        used = ridge * 10**attempt
        damped = matrix.clone()
        damped.diagonal().add_(used)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            if used != ridge:
                logger.warning("singular second moments: ridge raised %.3g -> %.3g", ridge, used)
            return factor, used
    raise CalibrationError(
        f"second moments of shape {tuple(matrix.shape)} have no Cholesky factor up to a ridge of "
        f"{used:.3g}; the calibration data is degenerate or holds NaN"
    )


@dataclass(frozen=True, kw_only=True)
class Gram:
    """Second moments of rows.

    Attributes:
        count: Rows N.
        diagonal: Mean square of each entry, float64 [K].
        matrix: H, float64 [K, K] (float32 if K is large), in the primal form; else None.
        rows: The rows, float32 [N, K], in the dual form; else None.
    """

    count: int
    diagonal: Tensor
    matrix: Tensor | None
    rows: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, *, form: GramForm | None = None) -> Self:
        """Accumulate the moments.

        Args:
            rows: [N, K], any float dtype; less what a bias takes up (`LayerRows.fitted`).
            form: `"primal"` or `"dual"`; by default dual where there are fewer rows than K.

        Raises:
            ConfigError: No rows, or no matrix.
            CalibrationError: The rows hold NaN or infinity.
        """
        if rows.ndim != 2 or not rows.numel():
            raise ConfigError(f"statistics need rows [N, K], got shape {tuple(rows.shape)}")
        count, width = rows.shape
        exact = rows.float()
        diagonal = _mean_square(exact)
        # sums of squares are finite where all numbers are, unless they overflow
        if not bool(torch.isfinite(diagonal).all() or torch.isfinite(exact).all()):
            raise CalibrationError("calibration rows hold NaN or infinity")
        dual = (form or ("primal" if width <= count else "dual")) == "dual"
        return cls(
            count=count,
            diagonal=diagonal,
            matrix=None if dual else second_moments(exact),
            rows=exact if dual else None,
        )

    @property
    def width(self) -> int:
        """Numbers in a row, K."""
        return len(self.diagonal)

    @property
    def mean_diagonal(self) -> float:
        """Average of the diagonal: the unit of damping."""
        return float(self.diagonal.mean())

    @property
    def dtype(self) -> torch.dtype:
        """Precision of factors: float64, or float32 where the factor is large."""
        return _factor_dtype(self.width if self.rows is None else self.count)

    def ridge(self, damping: float) -> float:
        """`damping` times the average diagonal, positive even for rows of zeros."""
        return damping * self.mean_diagonal or damping

    def multiply(self, left: Tensor) -> Tensor:
        """`left @ H` without ridge, float64 [O, K], for `left` [O, K]."""
        if self.matrix is not None:
            return (left.to(self.matrix.dtype) @ self.matrix).to(torch.float64)
        assert self.rows is not None
        return ((left.float() @ self.rows.T) @ self.rows).to(torch.float64) / self.count

    def quadratic(self, left: Tensor) -> Tensor:
        """`diag(left H left^T)`: mean squared output of each row, float64 [O], for [O, K]."""
        if self.rows is not None:
            return _mean_square(self.rows @ left.float().T)
        return (self.multiply(left) * left.to(torch.float64)).sum(dim=1).clamp_min(0)

    def regress(self, rows: Tensor, targets: Tensor, damping: float) -> Tensor:
        """Ridge regression of targets on the rows.

        `argmin_B mean |targets - rows B^T|^2 + ridge |B|^2`, which for targets `(X - X_hat) W^T`
        is QEP's correction `W C (H + ridge I)^-1` (arXiv 2504.09629, proposition 5.1).

        Args:
            rows: The rows that these moments were accumulated from, [N, K]. (The dual form holds
                them already.)
            targets: [N, O].
            damping: Ridge in units of the average diagonal, positive.

        Returns:
            B, float32 [O, K].

        Raises:
            CalibrationError: The moments are degenerate.
        """
        return self.regression(rows, targets).solve(damping)

    def regression(self, rows: Tensor, targets: Tensor) -> "Regression":
        """`regress` for several ridges: what does not depend on them, once.

        Args:
            rows: As of `regress`.
            targets: As of `regress`.
        """
        wide = targets.to(torch.float64)
        if self.rows is not None:
            # X X^T / N: its chunks are columns of X
            kernel = second_moments(self.rows.T.contiguous()) * (self.width / self.count)
            return Regression(gram=self, matrix=kernel.to(self.dtype), rhs=wide.to(self.dtype))
        assert self.matrix is not None
        cross = _cross(rows, wide).to(self.dtype)
        return Regression(gram=self, matrix=self.matrix.to(self.dtype), rhs=cross)


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A ridge regression up to the ridge; from `Gram.regression`.

    Attributes:
        gram: Moments of the rows.
        matrix: H [K, K], or the kernel X X^T / N [N, N] in the dual form.
        rhs: X^T Y / N [K, O], or the targets Y [N, O] in the dual form.
    """

    gram: Gram
    matrix: Tensor
    rhs: Tensor

    def solve(self, damping: float) -> Tensor:
        """B, float32 [O, K], for one ridge in units of the average diagonal; see `Gram.regress`.

        Raises:
            CalibrationError: The moments are degenerate.
        """
        factor, _ = cholesky(self.matrix, self.gram.ridge(damping))
        solved = torch.cholesky_solve(self.rhs, factor).T
        if self.gram.rows is None:
            return solved.float()
        weights = solved / self.gram.count
        # Not in float32: what no row explains is 1 / ridge times larger here, and cancels.
        parts = torch.split(self.gram.rows, _CHUNK, dim=1)
        return torch.cat([(weights @ part.to(weights)).float() for part in parts], dim=1)


def _factor_dtype(size: int) -> torch.dtype:
    return torch.float64 if size <= DOUBLE_WIDTH else torch.float32


def _mean_square(rows: Tensor) -> Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, _CHUNK):
        total += part.square().sum(dim=0)
    return total / len(rows)


def second_moments(rows: Tensor) -> Tensor:
    """X^T X / N [K, K]: float32 products of chunks of rows, summed in the factor's precision.

    Blocks below the diagonal are those above it, transposed.

    Args:
        rows: X, float32 [N, K].
    """
    width = rows.shape[1]
    total = torch.zeros(width, width, dtype=_factor_dtype(width), device=rows.device)
    blocks = [slice(start, start + _BLOCK) for start in range(0, width, _BLOCK)]
    for part in torch.split(rows, _CHUNK):
        for block in blocks:
            total[block, block.start :] += part[:, block].T @ part[:, block.start :]
    for block in blocks:
        total[block.stop :, block] = total[block, block.stop :].T
    return total.div_(len(rows))


def _cross(rows: Tensor, targets: Tensor) -> Tensor:
    """rows^T targets / N, float64 [K, O]."""
    total = torch.zeros(rows.shape[1], targets.shape[1], dtype=torch.float64, device=rows.device)
    parts = zip(torch.split(rows, _CHUNK), torch.split(targets, _CHUNK), strict=True)
    for part, target in parts:
        total += part.float().T @ target.float()
    return total / len(rows)
