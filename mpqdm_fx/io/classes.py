"""From a class name in a file to the class: models and schedulers of diffusers, nothing else.

A name in a config.json decides which code runs. So it is looked up among the models or among the
schedulers of diffusers, and what is found must be one.

This file is also copied into exported folders, for the scheduler of `run.py`.
"""

import importlib
import importlib.util
from typing import Any, Literal

from mpqdm_fx.errors import ArtifactError

__all__ = ["Kind", "diffusers_class", "is_model_class"]

Kind = Literal["model", "scheduler"]

_BASES: dict[Kind, str] = {"model": "ModelMixin", "scheduler": "SchedulerMixin"}
#: Models that diffusers keeps with the one pipeline that has them.
_BESIDE = {"StableAudioProjectionModel": "diffusers.pipelines.stable_audio"}


def diffusers_class(kind: Kind, name: Any, place: str = "") -> Any:
    """The class of diffusers called `name`.

    Args:
        kind: What it must be.
        name: As a file has it.
        place: The file, for the message.

    Raises:
        ArtifactError: diffusers has no such class; it may have something else of that name. Or the
            class needs a package that is not installed.
    """
    member = _named(kind, name)
    if _proper(kind, member):
        return member
    where = f"{place}: " if place else ""
    missing = _missing(member)
    if missing:
        raise ArtifactError(
            f"{where}{name} of diffusers needs {' and '.join(missing)}, which is not installed: "
            f"pip install {' '.join(missing)}"
        )
    raise ArtifactError(
        f"{where}the installed diffusers has no {kind} class {repr(name)[:80]} (_class_name); "
        f"correct the name, or update diffusers"
    )


def is_model_class(name: Any) -> bool:
    """Tell whether diffusers has a model class of that name."""
    return _proper("model", _named("model", name))


def _named(kind: Kind, name: Any) -> Any:
    """What the package of the kind calls so, whatever it is; None if nothing."""
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        return None
    place = _BESIDE.get(name, "diffusers.models") if kind == "model" else "diffusers.schedulers"
    return getattr(importlib.import_module(place), name, None)


def _proper(kind: Kind, member: Any) -> bool:
    """Whether it is a proper subclass of the kind's base that is defined in its package."""
    base = getattr(importlib.import_module("diffusers"), _BASES[kind])
    proper = isinstance(member, type) and issubclass(member, base) and member is not base
    if not proper:
        return False
    place = _BESIDE.get(member.__name__) if kind == "model" else None
    return bool(member.__module__.startswith(f"{place or f'diffusers.{kind}s'}."))


def _missing(member: Any) -> list[str]:
    """Packages that diffusers lacks for a class, in whose place it has a dummy then."""
    if not isinstance(member, importlib.import_module("diffusers.utils").DummyObject):
        return []
    backends: list[str] = member._backends
    absent = [name for name in backends if importlib.util.find_spec(name) is None]
    return absent or backends
