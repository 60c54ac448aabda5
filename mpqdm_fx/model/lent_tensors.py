"""A quantized model of its own: what it has in float is no longer the caller's model's memory."""

import torch
from torch import Tensor, UntypedStorage, fx, nn

from mpqdm_fx.graph.editing import copy_graph_module, replace_module, shallow_clone
from mpqdm_fx.numerics.lazy_tensor import LazyTensor

__all__ = ["without_lent"]


def without_lent(graph_module: fx.GraphModule, lender: nn.Module) -> fx.GraphModule:
    """A graph with copies of the tensors that it shares with another module.

    Rounded weights are its own already, and what is left are norms, biases and tables, a fraction
    of a model. Weights that are mapped from a file cannot be written into, and stay. Tensors that
    are views of one memory are views of one copy of it: they are stored and counted once.

    Args:
        graph_module: The graph; it is not changed.
        lender: Whose memory is not to be used.
    """
    lent = {_place(tensor) for tensor in _tensors(lender)}
    result = copy_graph_module(graph_module)
    memories: dict[int, UntypedStorage] = {}
    copies: dict[Tensor, Tensor] = {}

    def owned(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or isinstance(tensor, LazyTensor) or _place(tensor) not in lent:
            return tensor
        if tensor not in copies:
            place = _place(tensor)
            if place not in memories:
                whole = tensor.detach().new_empty(0, dtype=torch.uint8)
                whole.set_(tensor.untyped_storage())
                memories[place] = whole.clone().untyped_storage()
            memory = memories[place]
            value = tensor.detach().new_empty(0)
            value.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            copies[tensor] = value
        return copies[tensor]

    for name, module in list(result.named_modules()):
        kinds = (module._parameters, module._buffers)
        changed = [{key: owned(value) for key, value in kind.items()} for kind in kinds]
        if all(
            value is kind[key]
            for kind, values in zip(kinds, changed, strict=True)
            for key, value in values.items()
        ):
            continue
        if name:
            module = shallow_clone(module)
            replace_module(result, name, module)
        module._parameters, module._buffers = changed
    return result


def _tensors(module: nn.Module) -> list[Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor for tensor in tensors if not isinstance(tensor, LazyTensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
