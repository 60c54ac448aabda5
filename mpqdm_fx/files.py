"""Read the small files beside the weights, and tell whether a file is still the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ArtifactError

__all__ = ["checksum", "read_json"]


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ArtifactError: The file is missing, not JSON, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} is no JSON, corrupted or truncated: {error}") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds no JSON object")
    return data


def checksum(path: Path) -> dict[str, Any]:
    """A file's size (`bytes`) and SHA-256 (`sha256`, hexadecimal)."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
