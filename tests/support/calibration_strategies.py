"""Inputs of layers for the numerics tests, in float32 numbers whose moments are exact.

Rows are small integers, so that sums of float32 products are exact whatever their order: what
amplifies rounding (an inverse, a nearest level) can then be compared to a reference in float64.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.numerics.solve.gram import Gram, GramForm
from mpqdm_fx.numerics.solve.layer_rows import LayerRows

INPUT_FAMILIES = ("white", "coupled", "low_rank", "shared", "outlier_column", "dead_column")
FORMS: tuple[GramForm, ...] = ("primal", "dual")


def integers(seed: int, *shape: int, reach: int = 3) -> Tensor:
    """Return whole float32 numbers in -reach..reach."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-reach, reach + 1, shape, generator=generator).float()


def make_inputs(pairs: int, width: int, family: str, seed: int, offset: int = 0) -> Tensor:
    """Return rows [2 * pairs, width] of whole numbers whose mean row is `offset` everywhere."""
    rows = integers(seed, pairs, width)
    if family == "coupled":
        rows[:, 1:] += 2 * rows[:, :-1]
    elif family == "low_rank":
        rank = max(1, width // 3)
        rows = rows[:, :rank] @ integers(seed + 1, rank, width, reach=1)
    elif family == "shared":
        rows += 5 * rows[:, :1]
    elif family == "outlier_column":
        rows[:, seed % width] *= 16
    elif family == "dead_column":
        rows[:, seed % width] = 0
    order = torch.randperm(2 * pairs, generator=torch.Generator().manual_seed(seed))
    return torch.cat([rows, -rows])[order] + offset


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Rows as statistics take them, their moments, and the same in float64 by definition."""

    rows: Tensor
    gram: Gram
    H: Tensor

    def damped(self, damping: float) -> Tensor:
        """H plus its ridge."""
        mean = float(self.H.diagonal().mean())
        return self.H + (damping * mean or damping) * torch.eye(len(self.H), dtype=torch.float64)


def fitted_rows(rows: LayerRows, *, center: bool) -> LayerRows:
    """Return rows as statistics take them: for a layer with a bias that is refitted, or without."""
    return rows.fitted(rows.means() if center else None)


def fitted_inputs(rows: Tensor, *, center: bool) -> Tensor:
    """Return the same of inputs alone."""
    return fitted_rows(LayerRows(inputs=rows, shift=None), center=center).inputs


def make_moments(rows: Tensor, *, center: bool = False, form: GramForm | None = None) -> Moments:
    """Accumulate rows, and do it once more by the definition."""
    x = rows.double() - rows.double().mean(dim=0) * center
    fitted = fitted_inputs(rows, center=center)
    return Moments(rows=fitted, gram=Gram.of(fitted, form=form), H=x.T @ x / len(x))


@st.composite
def input_rows(draw, max_width: int = 24, max_pairs: int = 24):
    """Draw rows of any family, fewer or more than their width."""
    width, pairs = draw(st.integers(1, max_width)), draw(st.integers(1, max_pairs))
    family = draw(st.sampled_from(INPUT_FAMILIES))
    seed, offset = draw(st.integers(0, 2**16)), draw(st.sampled_from([0, 0, 3]))
    return make_inputs(pairs, width, family, seed, offset)


@st.composite
def moments(draw, max_width: int = 24, max_pairs: int = 24):
    """Draw moments in either form."""
    return make_moments(
        draw(input_rows(max_width, max_pairs)),
        center=draw(st.booleans()),
        form=draw(st.sampled_from(FORMS)),
    )


@st.composite
def weights_for(draw, width: int, max_rows: int = 5):
    """Draw normal weight rows [O, K]; continuous, so that no weight lies between two levels."""
    count, seed = draw(st.integers(1, max_rows)), draw(st.integers(0, 2**16))
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@st.composite
def levels_for(draw, W: Tensor):
    """Draw level sets of mixed widths, uniform or fitted."""
    bits = torch.tensor(draw(st.lists(st.integers(1, 8), min_size=len(W), max_size=len(W))))
    return RowLevels.fit(W, bits, draw(st.sampled_from(["uniform", "codebook"])))


def damped_error(W: Tensor, codes: Tensor, levels: RowLevels, damped: Tensor) -> Tensor:
    """Error of each row, float64 [O], by the definition `E (H + ridge I) E^T`."""
    E = W.double() - codes.double() * levels.scale.double()[:, None]
    return ((E @ damped) * E).sum(dim=1)


def select(levels: RowLevels, rows: Tensor | list[int]) -> RowLevels:
    """Return the level sets of some of the rows."""
    tables = None if levels.tables is None else levels.tables[rows]
    return RowLevels(bits=levels.bits[rows], scale=levels.scale[rows], tables=tables)


def energy(tensor: Tensor) -> float:
    """Return the sum of squares."""
    return float(tensor.square().sum())


def lanes(seed, pairs, width, *, family="coupled", channels=0, offset=0, error=2):
    """Rows of both lanes, whole numbers; the shift partly follows from the inputs."""
    inputs = make_inputs(pairs, width, family, seed, offset)
    # what a layer's rounding does to its output is, in part, a linear function of it
    shift = integers(seed + 1, *inputs.shape, reach=error) + (inputs.roll(1, dims=1) / 4).round()
    residual = integers(seed + 2, len(inputs), channels, reach=4) + shift.sum(dim=1, keepdim=True)
    return LayerRows(inputs=inputs, shift=shift, residual=residual if channels else None)
