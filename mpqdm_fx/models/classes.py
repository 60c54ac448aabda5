"""From a class name in a file to the class: models and schedulers of diffusers, nothing else.

A name in a config.json decides which code runs. So it is looked up among the models or among the
schedulers of diffusers, and what is found must be one.
"""

import importlib
from typing import Any

from mpqdm_fx.errors import ArtifactError

__all__ = ["is_model_class", "model_class", "scheduler_class"]

_MODELS = ("diffusers.models", "ModelMixin")
_SCHEDULERS = ("diffusers.schedulers", "SchedulerMixin")


def model_class(name: Any, place: str = "") -> Any:
    """The model class of diffusers called `name`.

    Args:
        name: As a file has it.
        place: The file, for the message.

    Raises:
        ArtifactError: diffusers has no such model; it may have something else of that name.
    """
    return _class(name, "model", *_MODELS, place)


def scheduler_class(name: Any, place: str = "") -> Any:
    """The scheduler class of diffusers called `name`.

    Args:
        name: As a file has it.
        place: The file, for the message.

    Raises:
        ArtifactError: diffusers has no such scheduler; it may have something else of that name.
    """
    return _class(name, "scheduler", *_SCHEDULERS, place)


def is_model_class(name: Any) -> bool:
    """Tell whether diffusers has a model class of that name."""
    return _found(name, *_MODELS) is not None


def _class(name: Any, kind: str, package: str, base: str, place: str) -> Any:
    found = _found(name, package, base)
    if found is None:
        where = f"{place}: " if place else ""
        shown = repr(name)[:80]
        raise ArtifactError(
            f"{where}the installed diffusers has no {kind} class {shown} (_class_name); correct "
            f"the name, or update diffusers"
        )
    return found


def _found(name: Any, package: str, base: str) -> Any:
    """The class if it is a proper subclass of the base that is defined in the package."""
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        return None
    found = getattr(importlib.import_module(package), name, None)
    root = getattr(importlib.import_module("diffusers"), base)
    proper = isinstance(found, type) and issubclass(found, root) and found is not root
    return found if proper and found.__module__.startswith(f"{package}.") else None
