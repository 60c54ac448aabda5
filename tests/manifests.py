"""Manifests that were changed and sealed again: what a digest alone would not tell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpqdm_fx.folders import MANIFEST
from mpqdm_fx.io.sealed import seal


def edit_manifest(
    folder: Path, change: Callable[[dict[str, Any]], object], *, name: str = MANIFEST
) -> None:
    """Change a manifest and give it the digest of its new content."""
    manifest = json.loads((folder / name).read_text())
    change(manifest)
    (folder / name).write_text(json.dumps(seal(manifest)))
