"""Rows of weights made ready for a scale search: checked, brought to one exponent, sorted."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqdm_fx.errors import CalibrationError, ConfigError

__all__ = [
    "SortedRows",
    "check_importance",
    "check_weight",
    "exponents",
    "importance_of",
    "powers_of_two",
    "row_chunks",
    "running_sum",
    "unit_importance",
]

MAX_CHUNK = 1 << 21  # elements held at once by a search: about 150 MB with all its float64 copies


def check_weight(W: Tensor) -> Tensor:
    """Return ``W`` as a detached float32 matrix, or say what is wrong with it.

    Args:
        W: Weight rows [O, K], any floating dtype.

    Returns:
        The same values as float32 [O, K], detached.

    Raises:
        ConfigError: ``W`` is not a non-empty floating point matrix.
        CalibrationError: ``W`` holds NaN or infinity (also after rounding to float32).
    """
    if W.ndim != 2 or W.numel() == 0 or not W.is_floating_point():
        raise ConfigError(
            f"weights must be a non-empty float matrix [channels, K], got {W.dtype} "
            f"{tuple(W.shape)}; flatten a convolution's weight with weight_rows first"
        )
    rows = W.detach().to(torch.float32).contiguous()
    finite = torch.isfinite(rows).all(dim=1)
    if not bool(finite.all()):
        channel = int((~finite).nonzero()[0, 0])
        raise CalibrationError(
            f"weights hold NaN or infinity, first in output channel {channel}; "
            "repair the checkpoint before quantizing it"
        )
    return rows


def check_importance(importance: Tensor, shape: torch.Size) -> Tensor:
    """Return ``importance`` as a detached tensor [K] or [O, K], or say what is wrong with it.

    Args:
        importance: Non-negative error weights [K] or [O, K].
        shape: The weight's shape [O, K].

    Returns:
        The importance, detached, in its own float dtype.

    Raises:
        ConfigError: The shape fits neither [K] nor [O, K].
        CalibrationError: A value is negative, NaN or infinite.
    """
    if importance.shape not in (shape, shape[1:]):
        raise ConfigError(
            f"importance has shape {tuple(importance.shape)}, but weights {tuple(shape)} "
            f"need {tuple(shape[1:])} or {tuple(shape)}"
        )
    values = importance.detach()
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise CalibrationError(
            "importance holds negative, NaN or infinite values; it must be a mean of squares"
        )
    return values


def importance_of(importance: Tensor | None, rows: Tensor) -> Tensor | None:
    """Return the importance of some rows only; one of shape [K] is that of every row.

    Args:
        importance: [K], [O, K] or None.
        rows: int64, their indices.
    """
    return importance if importance is None or importance.ndim == 1 else importance[rows]


def exponents(values: Tensor) -> Tensor:
    """Return the exponents ``e`` (int64) with ``2^(e-1) <= |value| < 2^e``; 0 for zeros."""
    _, exponent = torch.frexp(values.to(torch.float64))
    return exponent.to(torch.int64)


def powers_of_two(exponent: Tensor) -> Tensor:
    """Return ``2^exponent`` as exact float64; ``exponent`` int64 in -1022..1023.

    ``torch.ldexp`` goes through a float32 power and overflows; the bit pattern does not.
    """
    return ((exponent + 1023) << 52).view(torch.float64)


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of rows with at most ``MAX_CHUNK`` elements of ``width`` each (never none)."""
    step = max(1, MAX_CHUNK // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def unit_importance(importance: Tensor | None, magnitude: Tensor) -> Tensor | None:
    """Scale each row's importance to a maximum in [1/2, 1), exactly, as float32 [n, K].

    A row whose important weights are all zero would fit nothing: it gets equal importance.

    Args:
        importance: Non-negative [K] or [n, K], or None for equal importance.
        magnitude: ``|W|`` [n, K].

    Returns:
        None for equal importance, else float32 [n, K] with at least one positive entry a row.
    """
    if importance is None:
        return None
    rows = importance.to(torch.float64).expand_as(magnitude)
    exponent = exponents(rows.amax(dim=1)).clamp(-1000, 1000)
    unit = (rows * powers_of_two(-exponent)[:, None]).to(torch.float32)
    idle = ~((magnitude > 0) & (unit > 0)).any(dim=1)
    return torch.where(idle[:, None], torch.ones_like(unit), unit)


@dataclass(frozen=True, kw_only=True)
class SortedRows:
    """Sorted rows with running sums: a level set's exact error in a few look-ups per row.

    With ``values`` ascending in each row and error weights ``h``:
    ``count[:, i] = sum of h over the i smallest`` and ``total[:, i] = sum of h * value``.

    Attributes:
        values: float32 [n, K], ascending.
        count: float64 [n, K + 1], or None when every weight is 1 (then ``count[:, i] = i``).
        total: float64 [n, K + 1].
        energy: float64 [n], ``sum of h * value^2``.
    """

    values: Tensor
    count: Tensor | None
    total: Tensor
    energy: Tensor

    @classmethod
    def of(cls, values: Tensor, importance: Tensor | None) -> "SortedRows":
        """Sort ``values`` [n, K] (float32) with their ``importance`` (float32 [n, K] or None)."""
        if importance is None:
            ordered = _sorted(values.clone(memory_format=torch.contiguous_format))
            exact = ordered.to(torch.float64)
            energy = exact.square().sum(dim=1)
            return cls(values=ordered, count=None, total=running_sum(exact), energy=energy)
        ordered, order = _sorted_with_order(values)
        exact = ordered.to(torch.float64)
        h = importance.gather(1, order).to(torch.float64)
        mass = h * exact
        return cls(
            values=ordered,
            count=running_sum(h),
            total=running_sum(mass),
            energy=(mass * exact).sum(dim=1),
        )

    def take(self, rows: Tensor) -> "SortedRows":
        """Some of the rows.

        Args:
            rows: int64, their indices.
        """
        return SortedRows(
            values=self.values[rows],
            count=None if self.count is None else self.count[rows],
            total=self.total[rows],
            energy=self.energy[rows],
        )

    def below(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Return (``sum of h``, ``sum of h * value``) over the values below each threshold.

        Args:
            threshold: float64 [n, ...].

        Returns:
            Two float64 tensors of the threshold's shape.
        """
        flat = threshold.reshape(len(threshold), -1).to(torch.float32)
        index = torch.searchsorted(self.values, flat)
        total = self.total.gather(1, index).view(threshold.shape)
        if self.count is None:
            return index.to(torch.float64).view(threshold.shape), total
        return self.count.gather(1, index).view(threshold.shape), total

    def all(self) -> tuple[Tensor, Tensor]:
        """Return (``sum of h``, ``sum of h * value``) of whole rows, float64 [n]."""
        if self.count is None:
            return torch.full_like(self.energy, self.values.shape[1]), self.total[:, -1]
        return self.count[:, -1], self.total[:, -1]

    def cells(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (``sum of h``, ``sum of h * value``) of the values nearest to each level.

        Args:
            levels: Candidate level sets, float64 [n, C, L], each ascending.

        Returns:
            Two float64 tensors [n, C, L].
        """
        mass, total = self.below((levels[:, :, 1:] + levels[:, :, :-1]) / 2)
        all_mass, all_total = self.all()
        shape = (*levels.shape[:2], 1)
        first, last = mass.new_zeros(shape), all_mass[:, None, None].expand(shape)
        last_total = all_total[:, None, None].expand(shape)
        return (
            torch.cat([first, mass, last], dim=2).diff(dim=2),
            torch.cat([first, total, last_total], dim=2).diff(dim=2),
        )

    def error(self, levels: Tensor) -> Tensor:
        """Return the weighted squared error [n, C] of rounding to the nearest of levels [n, C, L].

        To about 1e-13 of the row's energy, since it is a difference of sums.
        """
        mass, total = self.cells(levels)
        return self.energy[:, None] + (levels * (levels * mass - 2 * total)).sum(dim=2)


def running_sum(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., K values of each row, float64 [n, K + 1]."""
    sums = values.new_zeros(len(values), values.shape[1] + 1)
    torch.cumsum(values, dim=1, out=sums[:, 1:])
    return sums


def _sorted(values: Tensor) -> Tensor:
    """Rows in ascending order; a contiguous tensor on the CPU is sorted in place.

    There NumPy sorts ten times as fast as ``torch.sort``, which carries indices along.
    """
    if values.device.type != "cpu":
        return torch.sort(values, dim=1).values
    values.numpy().sort(axis=1)
    return values


def _sorted_with_order(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of float32 [n, K] in ascending order, and where they were; ties keep their order.

    Sorted as one integer of 64 bits a value: the float's bits, made to ascend as it does, above its
    place.
    """
    # adding 0 turns -0 into 0, which it equals
    pattern = (values + 0.0).view(torch.int32)
    ascending = (pattern ^ ((pattern >> 31) & 0x7FFFFFFF)).to(torch.int64)
    keys = (ascending << 32) + torch.arange(values.shape[1], device=values.device)
    order = _sorted(keys) & 0xFFFFFFFF
    return values.gather(1, order), order
