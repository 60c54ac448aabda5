"""What of a model is written as JSON, and refused where it would be read back as something else."""

import importlib
import json
from collections.abc import Mapping
from typing import Any

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.calling import signature_to_dict
from mpqdm_fx.graph.signature import Signature
from mpqdm_fx.io.schema import plain

__all__ = ["given_config", "plain_config", "plain_signature"]


def plain_signature(signature: Signature) -> dict[str, Any]:
    """A signature as JSON that reads back as the same signature.

    Args:
        signature: Signature of a traced graph.

    Returns:
        What `signature_to_dict` returns.

    Raises:
        ArtifactError: An argument that is constant in the graph has no such form.
    """
    data = signature_to_dict(signature)
    for name, value in (*data["baked"], *data.get("defaults", ())):
        if not _survives(value, strict=True):
            raise ArtifactError(
                f"{signature.model_class}: the argument {name!r} was traced as {value!r}, which "
                f"JSON does not hold; trace the model with a plain number, string or list there"
            )
    return data


def plain_config(config: Any, model_class: str) -> dict[str, Any] | None:
    """A model's configuration as JSON, without diffusers' private keys.

    Args:
        config: The configuration.
        model_class: The model's class, which is written too.

    Returns:
        Plain JSON types; None for what is no mapping.

    Raises:
        ArtifactError: A value has no form in JSON.
    """
    if not isinstance(config, Mapping):
        return None
    entries = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in entries.items():
        if not _survives(value, strict=False):
            raise ArtifactError(
                f"{model_class}: its configuration has {key}={value!r}, which JSON does not hold; "
                f"register a plain value with register_to_config({key}=...)"
            )
    return {**entries, "_class_name": model_class}


def _survives(value: Any, *, strict: bool) -> bool:
    """Whether a value is the same after JSON; tuples become lists, which is no change if lax."""
    try:
        read = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return False
    return bool(read == (value if strict else plain(value)))


def given_config(config: Mapping[str, Any]) -> Any:
    """What `plain_config` returned, as diffusers hands it out.

    Args:
        config: Plain JSON types.
    """
    entries = {key: value for key, value in config.items() if not key.startswith("_")}
    return importlib.import_module("diffusers.configuration_utils").FrozenDict(entries)
