"""What makes two runs the same run: settings, model, calibration data, versions."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.graph.fingerprint import graph_fingerprint
from mpqdm_fx.io.tensors import hash_tensor
from mpqdm_fx.io.versions import versions
from mpqdm_fx.records.config import MPQConfig

__all__ = ["calls_digest", "run_identity"]


def run_identity(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    held_out: Sequence[int],
    settings: MPQConfig,
) -> dict[str, Any]:
    """Plain JSON types that differ wherever two runs would give other numbers."""
    return {
        "settings": settings.to_dict(),
        "model": graph_fingerprint(graph_module)[:16],
        "calibration": calls_digest(calls),
        "held_out": list(held_out),
        "versions": versions(),
    }


def calls_digest(calls: Sequence[Mapping[str, Any]]) -> str:
    """Hash of recorded calls, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for call in calls:
        for leaf in pytree.tree_leaves(dict(call)):
            if isinstance(leaf, Tensor):
                hash_tensor(digest, leaf)
    return digest.hexdigest()[:16]
