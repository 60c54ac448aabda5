"""A hash of a graph: equal for graphs that compute the same numbers with the same names."""

import hashlib
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["graph_fingerprint", "hash_tensor"]


def graph_fingerprint(graph_module: fx.GraphModule) -> str:
    """Hash of a graph's nodes, parameters and buffers.

    Args:
        graph_module: Any graph.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256(graph_module.code.encode())
    for name, tensor in sorted(graph_module.state_dict().items()):
        digest.update(name.encode())
        hash_tensor(digest, tensor)
    return digest.hexdigest()


def hash_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed a tensor's dtype, shape and bits to a hash object of `hashlib`."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
