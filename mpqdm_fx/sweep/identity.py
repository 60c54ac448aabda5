"""What makes two runs the same run: settings, model, calibration data, versions."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpqdm_fx.config import MPQConfig
from mpqdm_fx.versions import versions

__all__ = ["calls_digest", "model_digest", "run_identity"]


def run_identity(
    graph_module: fx.GraphModule,
    calls: Sequence[Mapping[str, Any]],
    held_out: Sequence[int],
    settings: MPQConfig,
) -> dict[str, Any]:
    """Plain JSON types that differ wherever two runs would give other numbers."""
    return {
        "settings": settings.to_dict(),
        "model": model_digest(graph_module),
        "calibration": calls_digest(calls),
        "held_out": list(held_out),
        "versions": versions(),
    }


def model_digest(graph_module: fx.GraphModule) -> str:
    """Hash of a graph's nodes and tensors, 16 hexadecimal digits."""
    digest = hashlib.sha256(graph_module.code.encode())
    for name, tensor in sorted(graph_module.state_dict().items()):
        digest.update(name.encode())
        _update(digest, tensor)
    return digest.hexdigest()[:16]


def calls_digest(calls: Sequence[Mapping[str, Any]]) -> str:
    """Hash of recorded calls, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for call in calls:
        for leaf in pytree.tree_leaves(dict(call)):
            if isinstance(leaf, Tensor):
                _update(digest, leaf)
    return digest.hexdigest()[:16]


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy())
