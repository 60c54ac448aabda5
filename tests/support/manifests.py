"""Manifests that were changed and sealed again: what a digest alone would not tell."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import edit_json

from mpqdm_fx.io.folders import MANIFEST


def edit_manifest(
    folder: Path, change: Callable[[dict[str, Any]], object], *, name: str = MANIFEST
) -> None:
    """Change a manifest and give it the digest of its new content."""
    edit_json(folder / name, change, sealed=True)
