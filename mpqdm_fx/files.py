"""Read the small files beside the weights."""

import json
from pathlib import Path
from typing import Any

from mpqdm_fx.errors import ArtifactError

__all__ = ["read_json"]


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
