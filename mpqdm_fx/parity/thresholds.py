"""What a ladder is held to: measured once, stored beside the weights, and read again."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from mpqdm_fx.backends.xnnpack.reference import CLOSE_DB, MARGIN_DB
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.schema import Format, Name, Ratio, Strict, plain, validated
from mpqdm_fx.io.sealed import SealedFolder, seal
from mpqdm_fx.io.versions import versions
from mpqdm_fx.parity.compare_forms import FormValues
from mpqdm_fx.parity.ladder import Ladder, Rung
from mpqdm_fx.parity.rung_inputs import INPUTS
from mpqdm_fx.parity.sites import WEIGHT_OPS, Site

__all__ = ["MEASURED_MARGIN_DB", "THRESHOLDS", "Thresholds"]

THRESHOLDS = "parity.json"

#: How much less than what was measured is still right.
MEASURED_MARGIN_DB = 1.0

_FORMAT = "mpqdm_fx.parity"
_OLDEST = 2  # earlier ones hold no measurements
_VERSION = 3  # since then with values inside programs
_FIX = "`mpqdm-fx verify DIRECTORY --store` measures anew and replaces it"


class Seen(NamedTuple):
    """What was measured of a value, in decibels.

    Attributes:
        found_db: How close it was; NaN is refused.
        steady_db: How close rounding errors of sums leave it; infinite where that is not known.
    """

    found_db: float
    steady_db: float = math.inf

    @property
    def wanted_db(self) -> float:
        """Least decibels from now on."""
        value = min(CLOSE_DB, self.found_db - MEASURED_MARGIN_DB, self.steady_db - MARGIN_DB)
        return round(value, 2)


_Pair = tuple[Ratio, Ratio]


class _Rung(Strict):
    against: Name
    float_db: _Pair
    previous_db: _Pair
    nodes: dict[str, _Pair]
    own: dict[str, _Pair]


class _File(Strict):
    """What `parity.json` holds beside its digest."""

    stored_as: ClassVar[Format] = Format(
        name=_FORMAT,
        noun="file of thresholds",
        oldest=_OLDEST,
        newest=_VERSION,
        sealed_from=_OLDEST,
    )

    format: Name
    version: int
    versions: dict[str, str]
    margins_db: dict[str, float]
    files: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    rungs: Annotated[dict[str, _Rung], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class RungThresholds:
    """What was measured of one rung.

    Attributes:
        against: Rung that it is compared with.
        output: Of its outputs against the float model's.
        previous: Of its outputs against those of `against`.
        nodes: Of its values against those of `against`.
        own: The same where all values before are those of `against`; those that are wanted to be
            as close as any value has to be are left out.
    """

    against: str
    output: Seen
    previous: Seen
    nodes: Mapping[Site, Seen]
    own: Mapping[Site, Seen]

    def wanted_own_db(self, site: Site) -> float | None:
        """Least decibels of a value alone; None if it has no threshold."""
        if site not in self.nodes:
            return None
        return self.own[site].wanted_db if site in self.own else CLOSE_DB


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What is stored with an artefact: measurements, of which what is wanted follows.

    A value has to be as close as it was measured to be, less `MEASURED_MARGIN_DB`; but no closer
    than rounding errors of sums leave it, less `MARGIN_DB`, and `CLOSE_DB` are always enough.

    Attributes:
        rungs: By name, from the second rung on.
        files: Size and SHA-256 of the files they hold for, by name.
        versions: Versions of the packages that they were measured with.
        inside_programs: Whether they could be of values inside a program; earlier versions of this
            package saw its outputs alone.
    """

    rungs: Mapping[str, RungThresholds]
    files: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    inside_programs: bool = True

    @classmethod
    def of(cls, measured: FormValues, files: Mapping[str, Mapping[str, Any]]) -> "Thresholds":
        """Derive thresholds from a measurement with stability.

        Args:
            measured: The ladder and its stability.
            files: See `Thresholds`.

        Raises:
            ArtifactError: A value is NaN: it is no measure of anything.
        """
        rungs = {}
        for rung in measured.ladder.rungs[1:]:
            steady, own_steady = measured.stability[rung.name], measured.own_stability[rung.name]
            assert rung.against is not None
            assert rung.previous_db is not None
            name = f"rung `{rung.name}`"
            alone = {
                node.site: _seen(f"{name}: {node} alone", node.own_db, own_steady.get(node.site))
                for node in rung.nodes
            }
            rungs[rung.name] = RungThresholds(
                against=rung.against,
                output=_seen(f"{name}: its output", rung.float_db),
                previous=_seen(f"{name}: its output", rung.previous_db, steady.get(None)),
                nodes={
                    node.site: _seen(f"{name}: {node}", node.sqnr_db, steady.get(node.site))
                    for node in rung.nodes
                },
                own={
                    site: threshold
                    for site, threshold in alone.items()
                    if threshold.wanted_db != CLOSE_DB
                },
            )
        return cls(rungs=rungs, files=dict(files), versions=versions())

    def judge(self, ladder: Ladder) -> Ladder:
        """The ladder with what is wanted of each value.

        Rungs and weight layers that have a threshold and were not measured, or were measured and
        have none, are faults. Other values are noted: another version of torch may have others.
        """
        unpaired = list(self._unpaired(ladder))
        return dataclasses.replace(
            ladder,
            rungs=tuple(self._judged(rung) for rung in ladder.rungs),
            notes=(*ladder.notes, *(sentence for is_fault, sentence in unpaired if not is_fault)),
            faults=(*ladder.faults, *(sentence for is_fault, sentence in unpaired if is_fault)),
            stored_versions=dict(self.versions),
        )

    def _unpaired(self, ladder: Ladder) -> Iterator[tuple[bool, str]]:
        """What has a threshold or a measurement alone: whether that is a fault, and a sentence."""
        measured = {rung.name: rung for rung in ladder.rungs[1:]}
        for name in self.rungs:
            if name not in measured:
                yield True, f"rung `{name}` has thresholds, but was not measured"
        for name, rung in measured.items():
            thresholds = self.rungs.get(name)
            if thresholds is None:
                yield True, f"rung `{name}` has no thresholds"
            elif thresholds.against != rung.against:
                start = f"rung `{name}` was compared with `{rung.against}`, and has thresholds of"
                yield True, f"{start} a comparison with `{thresholds.against}`"
            elif rung.inside and not thresholds.nodes and not self.inside_programs:
                start = f"rung `{name}`: an earlier version stored the thresholds, and saw no"
                yield False, f"{start} values there; `verify --store` stores theirs too"
            elif rung.inside:
                yield from _unpaired_values(rung, thresholds)

    def _judged(self, rung: Rung) -> Rung:
        thresholds = self.rungs.get(rung.name)
        if thresholds is None or thresholds.against != rung.against:
            return rung
        nodes = tuple(
            dataclasses.replace(
                node,
                wanted_db=thresholds.nodes[node.site].wanted_db
                if node.site in thresholds.nodes
                else None,
                wanted_own_db=thresholds.wanted_own_db(node.site),
            )
            for node in rung.nodes
        )
        return dataclasses.replace(
            rung,
            nodes=nodes,
            wanted_float_db=thresholds.output.wanted_db,
            wanted_db=thresholds.previous.wanted_db,
        )

    def write(self, path: Path) -> None:
        """Write them as JSON, with a digest of the content."""
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "versions": dict(self.versions),
            "margins_db": _MARGINS,
            "files": self.files,
            "rungs": {
                name: {
                    "against": rung.against,
                    "float_db": rung.output,
                    "previous_db": rung.previous,
                    "nodes": {site.key: threshold for site, threshold in rung.nodes.items()},
                    "own": {site.key: threshold for site, threshold in rung.own.items()},
                }
                for name, rung in self.rungs.items()
            },
        }
        write_text(path, json.dumps(seal(plain(data)), indent=1))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: Path) -> "Thresholds":
        """What `write` wrote.

        Args:
            data: Content of the file.
            path: The file, for messages.

        Raises:
            ArtifactError: It is damaged, or of another version.
        """
        content = validated(_File, data, path, fix=_FIX)
        if content.margins_db != _MARGINS:
            raise ArtifactError(f"{path} was stored with other margins; {_FIX}")
        try:
            rungs = {
                name: RungThresholds(
                    against=rung.against,
                    output=_read(rung.float_db),
                    previous=_read(rung.previous_db),
                    nodes=_sites(rung.nodes),
                    own=_sites(rung.own),
                )
                for name, rung in content.rungs.items()
            }
        except ValueError as error:
            raise ArtifactError(f"{path} is damaged: {error}; {_FIX}") from None
        return cls(
            rungs=rungs,
            files=content.files,
            versions=content.versions,
            inside_programs=content.version >= _VERSION,
        )

    def check(self, files: SealedFolder, programs: Sequence[str]) -> None:
        """Refuse a folder with other files than those that they hold for.

        Args:
            files: The folder's files as its manifest has them.
            programs: Those of its program.

        Raises:
            ArtifactError: One is missing or another one, or one that is judged is not listed.
        """
        for name in (INPUTS, *programs, *self.files):
            entry = files.entries.get(name)
            if entry is None or entry.to_dict() != self.files.get(name):
                raise ArtifactError(
                    f"{files.root / name} is not the file that the thresholds in {THRESHOLDS} were "
                    f"stored for; store them anew (--store) if it was meant to change"
                )


_MARGINS = {"measured": MEASURED_MARGIN_DB, "rounding": MARGIN_DB, "enough": CLOSE_DB}


def _unpaired_values(rung: Rung, thresholds: RungThresholds) -> Iterator[tuple[bool, str]]:
    measured = {node.site: None for node in rung.nodes}
    for sites, fault in (
        ([site for site in measured if site not in thresholds.nodes], "have no threshold"),
        (
            [site for site in thresholds.nodes if site not in measured],
            "have thresholds and are no longer in the graph",
        ),
    ):
        for is_fault, kind in ((True, "weight layers"), (False, "other values")):
            group = [site for site in sites if (site.op in WEIGHT_OPS) is is_fault]
            if group:
                first = f"the first is {group[0].op} of {group[0]}"
                yield is_fault, f"rung `{rung.name}`: {len(group)} {kind} {fault}, {first}"


def _seen(subject: str, sqnr_db: float, steady: float | None = None) -> Seen:
    pair = sqnr_db, math.inf if steady is None else steady
    if any(map(math.isnan, pair)):
        raise ArtifactError(
            f"{subject} holds NaN: nothing can be stored as right of a model that computes it"
        )
    return Seen(*(math.floor(100 * v) / 100 if math.isfinite(v) else v for v in pair))


def _read(pair: tuple[float, float]) -> Seen:
    if any(map(math.isnan, pair)):
        raise ValueError("a measurement is NaN")
    return Seen(*pair)


def _sites(pairs: Mapping[str, tuple[float, float]]) -> dict[Site, Seen]:
    return {Site.from_key(key): _read(pair) for key, pair in pairs.items()}
