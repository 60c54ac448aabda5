"""Types of a signature's fields, as a file holds them."""

from typing import Annotated

import torch
from pydantic import Field, PlainValidator

__all__ = ["BatchSize", "ComputeDType", "InputDType"]

_COMPUTED = ("float32", "float16", "bfloat16")
_INPUTS = (*_COMPUTED, "float64", "bool", "uint8", "int8", "int16", "int32", "int64")


def _named(*names: str) -> PlainValidator:
    """A dtype by its name, one of some."""

    def read(name: object) -> torch.dtype:
        if name not in names:
            raise ValueError(f"{name!r:.40} is none of {', '.join(names)}")
        dtype: torch.dtype = getattr(torch, str(name))
        return dtype

    return PlainValidator(read)


BatchSize = Annotated[int, Field(ge=1, le=2**20)]
ComputeDType = Annotated[torch.dtype, _named(*_COMPUTED)]
InputDType = Annotated[torch.dtype, _named(*_INPUTS)]
