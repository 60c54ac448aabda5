"""What a ladder is held to: measured once, stored beside the weights, and read again."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mpqdm_fx.backends.xnnpack.reference import CLOSE_DB, MARGIN_DB
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.files import check_version, write_text
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.parity.ladder import Ladder, Rung
from mpqdm_fx.parity.measure import Measured
from mpqdm_fx.parity.sites import Site
from mpqdm_fx.validation import Between, check_fields, check_value
from mpqdm_fx.versions import versions

__all__ = ["MEASURED_MARGIN_DB", "THRESHOLDS", "Thresholds"]

THRESHOLDS = "parity.json"

#: How much less than what was measured is still right.
MEASURED_MARGIN_DB = 1.0

_FORMAT, _VERSION = "mpqdm_fx.parity", 1

#: What is wanted where a value is nothing but noise.
_LEAST_DB = -999.0


_Decibels = Annotated[float, Between(_LEAST_DB, 1000)]


@dataclass(frozen=True, kw_only=True)
class RungThresholds:
    """Least decibels of one rung.

    Attributes:
        against: Rung that it is compared with.
        float_db: Of its outputs against the float model's.
        previous_db: Of its outputs against those of `against`.
        nodes: Of its values against those of `against`.
        own: The same where all values before are those of `against`.
    """

    against: str
    float_db: _Decibels
    previous_db: _Decibels
    nodes: Mapping[Site, _Decibels]
    own: Mapping[Site, _Decibels]

    def __post_init__(self) -> None:
        check_value(self.against, str, "against")
        check_fields(self, f"rung against {self.against}: ")


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What is stored with an artefact.

    A value has to be as close as it was measured to be, less `MEASURED_MARGIN_DB`; but no closer
    than rounding errors of sums leave it, less `MARGIN_DB`, and `CLOSE_DB` are always enough.

    Attributes:
        rungs: By name, from the second rung on.
        files: Size and SHA-256 of the files they hold for, by name.
        versions: Versions of the packages that they were measured with.
    """

    rungs: Mapping[str, RungThresholds]
    files: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, measured: Measured, files: Mapping[str, Mapping[str, Any]]) -> "Thresholds":
        """Derive thresholds from a measurement with stability.

        Args:
            measured: The ladder and its stability.
            files: See `Thresholds`.
        """
        rungs = {}
        for rung in measured.ladder.rungs[1:]:
            steady, own = measured.stability[rung.name], measured.own_stability[rung.name]
            assert rung.against is not None
            assert rung.previous_db is not None
            rungs[rung.name] = RungThresholds(
                against=rung.against,
                float_db=_wanted(rung.float_db, math.inf),
                previous_db=_wanted(rung.previous_db, steady.get(None, math.inf)),
                nodes={
                    node.site: _wanted(node.sqnr_db, steady.get(node.site, math.inf))
                    for node in rung.nodes
                },
                own={
                    node.site: _wanted(node.own_db, own.get(node.site, math.inf))
                    for node in rung.nodes
                },
            )
        return cls(rungs=rungs, files=dict(files), versions=versions())

    def judge(self, ladder: Ladder) -> Ladder:
        """The ladder with what is wanted of each value.

        Rungs and weight layers that have a threshold but were not measured are noted.
        """
        rungs = tuple(self._judged(rung) for rung in ladder.rungs)
        notes = list(ladder.notes)
        measured = {rung.name: rung for rung in ladder.rungs}
        for name, wanted in self.rungs.items():
            if name not in measured:
                notes.append(f"rung `{name}` has thresholds, but was not measured")
            elif measured[name].nodes:
                found = {node.site for node in measured[name].nodes}
                lost = [site for site in wanted.nodes if site not in found]
                if lost:
                    notes.append(
                        f"rung `{name}`: {len(lost)} values with thresholds are no longer in the "
                        f"graph, the first is {lost[0].op} of {lost[0]}"
                    )
        return dataclasses.replace(
            ladder, rungs=rungs, notes=tuple(notes), stored_versions=dict(self.versions)
        )

    def _judged(self, rung: Rung) -> Rung:
        wanted = self.rungs.get(rung.name)
        if wanted is None or wanted.against != rung.against:
            return rung
        nodes = tuple(
            dataclasses.replace(
                node,
                wanted_db=wanted.nodes.get(node.site),
                wanted_own_db=wanted.own.get(node.site),
            )
            for node in rung.nodes
        )
        return dataclasses.replace(
            rung, nodes=nodes, wanted_float_db=wanted.float_db, wanted_db=wanted.previous_db
        )

    def write(self, path: Path) -> None:
        """Write them as JSON."""
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "versions": dict(self.versions),
            "margins_db": {
                "measured": MEASURED_MARGIN_DB,
                "rounding": MARGIN_DB,
                "enough": CLOSE_DB,
            },
            "files": self.files,
            "rungs": {
                name: {
                    "against": rung.against,
                    "float_db": rung.float_db,
                    "previous_db": rung.previous_db,
                    "nodes": {site.key: wanted for site, wanted in rung.nodes.items()},
                    # of the many others the value is known
                    "own": {s.key: wanted for s, wanted in rung.own.items() if wanted != CLOSE_DB},
                }
                for name, rung in self.rungs.items()
            },
        }
        write_text(path, json.dumps(data, indent=1))

    @classmethod
    def read(cls, path: Path) -> "Thresholds":
        """Read what `write` wrote.

        Raises:
            ArtifactError: The file is missing, damaged, or of a newer version.
        """
        data = read_json(path)
        if data.get("format") != _FORMAT:
            raise ArtifactError(f"{path} holds no thresholds of this package")
        check_version(path, data.get("version"), _VERSION)
        try:
            rungs = {
                name: RungThresholds(
                    against=str(rung["against"]),
                    float_db=float(rung["float_db"]),
                    previous_db=float(rung["previous_db"]),
                    nodes=_sites(rung["nodes"]),
                    own=dict.fromkeys(_sites(rung["nodes"]), CLOSE_DB) | _sites(rung["own"]),
                )
                for name, rung in data["rungs"].items()
            }
            return cls(rungs=rungs, files=dict(data["files"]), versions=dict(data["versions"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged: {error!r}") from None


def _sites(wanted: Mapping[str, Any]) -> dict[Site, float]:
    return {Site.from_key(key): float(value) for key, value in wanted.items()}


def _wanted(found: float, steady: float) -> float:
    value = min(CLOSE_DB, found - MEASURED_MARGIN_DB, steady - MARGIN_DB)
    return math.floor(100 * max(value, _LEAST_DB)) / 100
