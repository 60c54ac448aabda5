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
    *,
    half: bool = False,
) -> dict[str, Any]:
    """Plain JSON types that differ wherever two runs would give other numbers.

    Args:
        graph_module: Normalized float graph.
        calls: All calibration calls.
        held_out: Indices of the calls that judge.
        settings: The run's settings.
        half: Whether activations are held as float16.
    """
    identity = {
        "settings": settings.to_dict(),
        "model": graph_fingerprint(graph_module)[:16],
        "calibration": calls_digest(calls),
        "held_out": list(held_out),
        "versions": versions(),
    }
    # told where it is so alone: runs of before, which do not tell, were of full precision mostly
    return {**identity, "half": True} if half else identity


def calls_digest(calls: Sequence[Mapping[str, Any]]) -> str:
    """Hash of recorded calls, 16 hexadecimal digits: tensors, constants, and their places."""
    digest = hashlib.sha256()
    for call in calls:
        for place, leaf in pytree.tree_leaves_with_path(dict(call)):
            digest.update(f"{pytree.keystr(place)}\0".encode())
            if isinstance(leaf, Tensor):
                hash_tensor(digest, leaf)
            else:
                digest.update(f"{leaf!r}\0".encode())
    return digest.hexdigest()[:16]
