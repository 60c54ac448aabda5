"""What a lowering with own operators wrote and measured."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from mpqdm_fx.backends.lowbit.counting import Borders, OwnWork, own_work
from mpqdm_fx.backends.xnnpack.program import XnnpackProgram

if TYPE_CHECKING:
    from mpqdm_fx.backends.lowbit.method import LowbitMethod

__all__ = ["LowbitProgram"]


@dataclass(frozen=True, kw_only=True)
class LowbitProgram(OwnWork, XnnpackProgram):
    """A written `.pte` that calls own operators, which need the native library.

    `undelegated` and `refusals` are what portable kernels run: own operators are not among them.

    Attributes:
        executed: Whether the written file was run. Without the native library it was not, and
            `sqnr_db` is that of its graph, with the operators' references in Python.
    """

    executed: bool

    @classmethod
    def of(
        cls, program: XnnpackProgram, method: "LowbitMethod", borders: Borders, *, executed: bool
    ) -> Self:
        """A program with what is known of its own operators.

        Args:
            program: What was written.
            method: What it was made of.
            borders: Counted in its partitioned graph.
            executed: Whether the file was run.
        """
        known = {field.name: getattr(program, field.name) for field in fields(XnnpackProgram)}
        own = borders.own_operators
        known["refusals"] = {n: c for n, c in program.refusals.items() if not _is_own(n, own)}
        known["undelegated"] = sum(known["refusals"].values())
        work = own_work(method.choice, borders, method.prepared)
        return cls(**known, **work, executed=executed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types without the graphs; the path is left to its file name."""
        names = ("left_layers", "own_operators")
        return {**super().to_dict(), **{name: dict(getattr(self, name)) for name in names}}


def _is_own(name: str, operators: Mapping[str, int]) -> bool:
    """Whether an operator, as ExecuTorch's delegation report writes it, is an own one."""
    return any(operator.split(".")[1] in name for operator in operators)
