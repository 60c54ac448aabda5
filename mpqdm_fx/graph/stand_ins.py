"""Plain tensors in the place of lazy ones, for what looks at shapes and never at numbers."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mpqdm_fx.numerics.lazy_tensor import LazyTensor

__all__ = ["shell", "stand_ins"]


def shell(tensor: Tensor) -> Tensor:
    """The tensor itself; of a lazy one a plain tensor of its shape without numbers.

    Memory that nobody writes to is none: the system gives it page by page.
    """
    if not isinstance(tensor, LazyTensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype)


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Give modules plain parameters in the place of lazy ones, and put those back afterwards.

    torch.export takes a model's parameters apart, which only a tensor with a storage lets it do.
    """
    shells: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _is_lazy(parameter):
                replaced.append((module, name, parameter))
    try:
        for module, name, parameter in replaced:
            if id(parameter) not in shells:  # tied weights stay tied
                shells[id(parameter)] = nn.Parameter(shell(parameter), requires_grad=False)
            module._parameters[name] = shells[id(parameter)]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, LazyTensor)
