"""Tiny, randomly initialised instances of diffusers' models, with inputs that fit them.

Every parameter is random and none is zero, so that equal outputs mean equal computations.
"""

from zoo_base import Case
from zoo_more_transformers import MORE_TRANSFORMERS
from zoo_more_unets import OTHER_UNETS
from zoo_rare_transformers import RARE_TRANSFORMERS
from zoo_transformers import TRANSFORMERS
from zoo_unets import UNETS_1D, UNETS_2D, UNETS_2D_CONDITION

__all__ = ["ALL", "REFUSED", "UNETS", "by_name"]

UNETS = (*UNETS_1D, *UNETS_2D, *UNETS_2D_CONDITION, *OTHER_UNETS)
ALL = (*UNETS, *TRANSFORMERS, *MORE_TRANSFORMERS, *RARE_TRANSFORMERS)

#: Models that cannot be traced, and what the refusal says.
REFUSED = {"Lumina2Transformer2DModel": r"transformer_lumina2.py:\d+: `use_mask = "}


def by_name(name: str) -> Case:
    """Return the case called ``name``."""
    return next(case for case in ALL if case.name == name)
