"""The one reader of JSON files of ours: version, digest, keys, types and ranges, in one wording.

What a file holds is a `Strict` record. Its fields may be frozen dataclasses of this package, which
are held to the same rules, and to the checks of their own `__post_init__`. What does not fit is
told in a line: the file, the field, the remedy.

JSON has no infinity and no NaN, which the signal-to-noise ratio of equal tensors, or of silence,
is. They are written as text, by `plain`, and read back where a field is a `Ratio`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
)
from pydantic_core import CoreSchema

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.files import check_version
from mpqdm_fx.io.sealed import SealedFolder, read_json, verified

__all__ = [
    "Count",
    "Format",
    "Name",
    "Ratio",
    "Shape",
    "Strict",
    "Whole",
    "plain",
    "read_as",
    "read_listed",
    "validated",
]

_TEXTS = ("inf", "-inf", "nan")
_Record = TypeVar("_Record", bound="Strict")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How files of one kind say what they are.

    Attributes:
        name: Their `format`; None for files that say neither format nor version.
        noun: What such a file is, for messages.
        oldest: First version that is read.
        newest: Last version that is read.
        sealed_from: First version that carries a digest of its content; None if none does.
    """

    name: str | None = None
    noun: str = ""
    oldest: int = 1
    newest: int = 1
    sealed_from: int | None = None

    def content(self, data: Mapping[str, Any], where: object, *, fix: str) -> Mapping[str, Any]:
        """A parsed file without its digest.

        Raises:
            ArtifactError: It is of another format or version, or its digest is not that of its
                content.
        """
        version: Any = self.oldest
        if self.name is not None:
            version = data.get("version")
            if data.get("format") != self.name:
                raise ArtifactError(f"{where} is no {self.noun}{_end(fix)}")
            check_version(str(where), version, self.newest)
            if version < self.oldest:
                raise ArtifactError(
                    f"{where} is of format version {version}, this package reads from "
                    f"{self.oldest} on{_end(fix)}"
                )
        sealed = self.sealed_from is not None and version >= self.sealed_from
        return verified(data, where, fix=fix) if sealed else data


class Strict(BaseModel):
    """A JSON object with exactly these keys; no value is converted, and numbers are finite."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    stored_as: ClassVar[Format] = Format()
    """How a file that holds the object says what it is."""


@dataclass(frozen=True)
class Whole:
    """Metadata of a field that holds a dataclass: its keys are all there, defaults or not.

    Attributes:
        lacking: Fields that files of older versions lack.
    """

    lacking: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Take the defaults out of the dataclass's schema."""
        schema = handler(source)
        fields: Any = handler.resolve_ref_schema(schema)
        for field in fields["schema"]["fields"]:
            if field["schema"]["type"] == "default" and field["name"] not in self.lacking:
                field["schema"] = field["schema"]["schema"]
        return schema


def _ratio(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in _TEXTS else value


Ratio = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(_ratio)]
"""A float that may be infinite or NaN, which are text in the file."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Shape = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**40)], ...], Field(max_length=8)]


def plain(value: Any) -> Any:
    """The value in JSON types that every parser takes: infinities and NaN become text."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def validated(
    kind: type[_Record], data: Mapping[str, Any], where: object, *, fix: str = ""
) -> _Record:
    """A parsed JSON object as a record.

    Args:
        kind: What it must be.
        data: Result of `parse_json` or `read_json`.
        where: What it was read from, for messages.
        fix: What to do if it does not fit; ends the message.

    Raises:
        ArtifactError: It is of another format or version; a key is missing or unknown, or a value
            has another type or range; the first is named.
    """
    content = kind.stored_as.content(data, where, fix=fix)
    try:
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:200] or "it"
        reason = first["msg"].removeprefix("Value error, ")
        raise ArtifactError(f"{where} is damaged: {place}: {reason}{_end(fix)}") from None


def read_as(kind: type[_Record], path: Path, *, fix: str = "") -> _Record:
    """A JSON file of ours as a record; arguments and errors as of `read_json` and `validated`."""
    return validated(kind, read_json(path, fix=fix), path, fix=fix)


def read_listed(kind: type[_Record], folder: SealedFolder, name: str) -> _Record:
    """The same of a file that a folder lists, whose hash is compared too."""
    return validated(kind, folder.read_json(name), folder.root / name)


def _end(fix: str) -> str:
    return f"; {fix}" if fix else ""
