"""What `verify` finds: rungs, their nodes, and the first one that falls short."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpqdm_fx.parity.sites import WEIGHT_OPS, Site

__all__ = ["Divergence", "Ladder", "NodeParity", "Rung"]


@dataclass(frozen=True, kw_only=True)
class NodeParity:
    """One value of a rung, against the same value of the rung that it is compared with.

    Attributes:
        site: Which value.
        shape: Its shape.
        sqnr_db: How close the two are, over all calls; inf if they are equal bit for bit.
        own_db: How close they would be if all values before were those of the other rung: what is
            lost here, and not before.
        wanted_db: Least `sqnr_db`; None if nothing was stored.
        wanted_own_db: Least `own_db`; the same.
    """

    site: Site
    shape: tuple[int, ...]
    sqnr_db: float
    own_db: float
    wanted_db: float | None = None
    wanted_own_db: float | None = None

    @property
    def is_layer(self) -> bool:
        """Whether it is what a weight layer computes."""
        return self.site.op in WEIGHT_OPS

    @property
    def short(self) -> bool:
        """Whether it is further away than is wanted."""
        return _short(self.sqnr_db, self.wanted_db) or self.short_alone

    @property
    def short_alone(self) -> bool:
        """Whether it is further away than is wanted even on the other rung's values."""
        return _short(self.own_db, self.wanted_own_db)

    def __str__(self) -> str:
        return f"{self.site}: {self.site.op} {list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One form of the model, run on the check inputs.

    Attributes:
        name: `float`, `quantized`, `decomposed`, `converted`, `edge`, `mixed` or `pte`.
        against: Rung that it is compared with; None for the first.
        float_db: Its outputs against the float model's.
        previous_db: Its outputs against those of `against`; None for the first.
        wanted_float_db: Least `float_db`; None if nothing was stored.
        wanted_db: Least `previous_db`; the same.
        nodes: Values that both rungs have, in running order; none where only outputs are known.
        unmatched: Weight layers of the model that the rung has no comparable value of.
        inside: Whether values inside can be seen, or outputs alone.
    """

    name: str
    against: str | None
    float_db: float
    previous_db: float | None
    wanted_float_db: float | None = None
    wanted_db: float | None = None
    nodes: tuple[NodeParity, ...] = ()
    unmatched: tuple[str, ...] = ()
    inside: bool = True

    @property
    def layers(self) -> tuple[NodeParity, ...]:
        """The nodes that are weight layers."""
        return tuple(node for node in self.nodes if node.is_layer)

    @property
    def divergence(self) -> NodeParity | None:
        """The first node that falls short by itself; if none does, the first that does at all."""
        short = [node for node in self.nodes if node.short]
        return next((node for node in short if node.short_alone), next(iter(short), None))

    @property
    def short(self) -> bool:
        """Whether an output or a node is further away than is wanted."""
        return self.divergence is not None or any(_short(*pair) for pair in self._outputs())

    def _outputs(self) -> Iterator[tuple[float, float | None]]:
        if self.previous_db is not None:
            yield self.previous_db, self.wanted_db
        yield self.float_db, self.wanted_float_db


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where a ladder falls short first.

    Attributes:
        rung: Name of the rung.
        against: What it was compared with.
        node: The first node in running order; None if only the outputs fall short.
        sqnr_db: What was found there.
        wanted_db: What was wanted.
    """

    rung: str
    against: str
    node: NodeParity | None
    sqnr_db: float
    wanted_db: float

    def __str__(self) -> str:
        where = "its output" if self.node is None else str(self.node)
        return (
            f"rung `{self.rung}` falls short: {where} has {self.sqnr_db:.1f} dB against "
            f"`{self.against}`, wanted are {self.wanted_db:.1f} dB"
        )


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """All forms of a quantized model on the same inputs, one after the other.

    Attributes:
        rungs: From the float model to the program.
        calls: Number of inputs, each of batch 1.
        notes: What could not be compared, and why; sentences.
        faults: Why nothing can be right, whatever was measured: what has no threshold, or a
            threshold and no value; sentences.
        stored_versions: Versions under which the thresholds were stored; None if there are none.
    """

    rungs: tuple[Rung, ...]
    calls: int
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    stored_versions: Mapping[str, str] | None = None

    @property
    def passed(self) -> bool | None:
        """Whether nothing falls short or is at fault; None if there are no thresholds to tell."""
        if self.stored_versions is None:
            return None
        return not self.faults and not any(rung.short for rung in self.rungs)

    @property
    def failure(self) -> str | None:
        """Why it did not pass: the first divergence, or the first fault; None if it passed."""
        first = self.first_divergence
        return str(first) if first is not None else next(iter(self.faults), None)

    @property
    def first_divergence(self) -> Divergence | None:
        """The first node of the first rung that falls short, or that rung's output."""
        for rung in self.rungs:
            node = rung.divergence
            if node is not None and rung.against is not None:
                ratio, bound = node.sqnr_db, node.wanted_db
                if node.short_alone:
                    ratio, bound = node.own_db, node.wanted_own_db
                assert bound is not None
                return Divergence(
                    rung=rung.name, against=rung.against, node=node, sqnr_db=ratio, wanted_db=bound
                )
            for against, output_db, least in (
                (rung.against, rung.previous_db, rung.wanted_db),
                ("float", rung.float_db, rung.wanted_float_db),
            ):
                if against is not None and output_db is not None and _short(output_db, least):
                    assert least is not None
                    return Divergence(
                        rung=rung.name, against=against, node=None, sqnr_db=output_db,
                        wanted_db=least,
                    )  # fmt: skip
        return None

    def rung(self, name: str) -> Rung:
        """The rung of a name; raises KeyError if the ladder has none."""
        for rung in self.rungs:
            if rung.name == name:
                return rung
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; decibels of what is equal bit for bit are null, NaN is text."""
        first = self.first_divergence
        return {
            "passed": self.passed,
            "first_divergence": None if first is None else str(first),
            "calls": self.calls,
            "notes": list(self.notes),
            "faults": list(self.faults),
            "stored_versions": None if self.stored_versions is None else dict(self.stored_versions),
            "rungs": [
                {
                    "name": rung.name,
                    "against": rung.against,
                    "float_db": _plain(rung.float_db),
                    "wanted_float_db": _plain(rung.wanted_float_db),
                    "previous_db": _plain(rung.previous_db),
                    "wanted_db": _plain(rung.wanted_db),
                    "short": rung.short,
                    "unmatched": list(rung.unmatched),
                    "nodes": [
                        {
                            **node.site._asdict(),
                            "shape": list(node.shape),
                            "sqnr_db": _plain(node.sqnr_db),
                            "wanted_db": _plain(node.wanted_db),
                            "own_db": _plain(node.own_db),
                            "wanted_own_db": _plain(node.wanted_own_db),
                            "short": node.short,
                        }
                        for node in rung.nodes
                    ],
                }
                for rung in self.rungs
            ],
        }


def _short(sqnr_db: float, least: float | None) -> bool:
    return least is not None and not sqnr_db >= least


def _plain(value: float | None) -> float | str | None:
    if value is None or value == math.inf:
        return None
    return "nan" if math.isnan(value) else round(max(value, -999.0), 3)
