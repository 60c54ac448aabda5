"""What a JSON file of ours may hold: types, ranges and keys; what does not fit is told in a line.

JSON has no infinity and no NaN, which the signal-to-noise ratio of equal tensors, or of silence,
is. They are written as text, by `plain`, and read back where a field is a `Ratio`.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mpqdm_fx.errors import ArtifactError

__all__ = ["Count", "Name", "Ratio", "Shape", "Strict", "plain", "validated"]

_TEXTS = ("inf", "-inf", "nan")
_Model = TypeVar("_Model", bound="Strict")


class Strict(BaseModel):
    """A JSON object with exactly these keys; no value is converted, and numbers are finite."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


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
    model: type[_Model], data: Mapping[str, Any], where: object, *, fix: str = ""
) -> _Model:
    """A parsed JSON object as a record.

    Args:
        model: What it must be.
        data: Result of `parse_json` or `read_json`.
        where: What it was read from, for messages.
        fix: What to do if it does not fit; ends the message.

    Raises:
        ArtifactError: A key is missing or unknown, or a value has another type or range; the first
            is named.
    """
    try:
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:200] or "it"
        end = f"; {fix}" if fix else ""
        raise ArtifactError(f"{where} is damaged: {place}: {first['msg']}{end}") from None
