"""The door: from the caller's model to the module that is traced.

Everything behind it computes in float32. A model in half precision goes through as a float32 copy,
and the signature remembers the dtype that the caller knows: inputs of that dtype are taken and
outputs returned in it. A model in float32 is not copied.
"""

import copy
import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpqdm_fx.capture.foreign_models import LOW_PRECISION, check_model, own_tensors
from mpqdm_fx.errors import TraceError

__all__ = ["ModelEntry", "enter", "in_float32", "unwrap"]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """What is traced instead of the caller's model.

    Attributes:
        model: The caller's model without its wrappers, or a float32 copy of it.
        dtype: What most of the caller's weights are stored in: float32, float16 or bfloat16.
    """

    model: nn.Module
    dtype: torch.dtype

    def take(self, inputs: Any) -> Any:
        """Inputs as the module takes them: in float32 if the caller's model is in half precision.

        Args:
            inputs: Tensors in nested dicts, lists and tuples. Those made in inference mode are
                copied.
        """

        def convert(tensor: Tensor) -> Tensor:
            if self.dtype in LOW_PRECISION and tensor.dtype in LOW_PRECISION:
                return tensor.float()
            return tensor.clone() if tensor.is_inference() else tensor

        return pytree.tree_map_only(Tensor, convert, inputs)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile and data parallelism put around it.

    These compute what the module computes, so leaving them out is exact.

    Args:
        model: Any module.

    Raises:
        TraceError: The model is no module, or a hook sits on the wrapper, which would be lost.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
    inner = _inside(model)
    while inner is not None:
        if any(model.__dict__.get(key) for key in ("_forward_hooks", "_forward_pre_hooks")):
            raise TraceError(
                f"a hook sits on the {type(model).__name__} around {type(inner).__name__}; put it "
                "on the module inside, or give that module"
            )
        model, inner = inner, _inside(inner)
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    """The module that a wrapper calls, or None if ``model`` is no such wrapper."""
    if isinstance(model, _WRAPPERS):
        module: nn.Module = model.module
        return module
    # by name: importing torch._dynamo takes seconds
    if type(model).__name__ == "OptimizedModule":
        inner = model.__dict__["_modules"]["_orig_mod"]
        assert isinstance(inner, nn.Module)
        return inner
    return None


def _is_wrapped(module: nn.Module) -> bool:
    """Tell whether a module, or what it does when it is called, was compiled or parallelised."""
    compiled = module.__dict__.get("_compiled_call_impl") is not None
    return compiled or _compiled_forward(module) is not None or _inside(module) is not None


def _compiled_forward(module: nn.Module) -> Any:
    """What ``module.forward = torch.compile(...)`` was given, or None."""
    original = getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
    return None if original is None else inspect.unwrap(original)


def enter(model: nn.Module) -> ModelEntry:
    """Turn the caller's model into the module that is traced.

    Args:
        model: The caller's model; it is not changed.

    Raises:
        TraceError: The model is refused (`check_model`), its forward does not name its arguments,
            or it is to be copied and cannot be.
    """
    model = unwrap(model)
    check_model(model, rounded=True)
    _check_arguments(model)
    dtype = _dtype_of(model)
    wrapped = any(_is_wrapped(module) for module in model.modules())
    if wrapped or any(_needs_copy(tensor) for _, tensor, _ in own_tensors(model)):
        model = _copied(model)
    return ModelEntry(model=model, dtype=dtype)


def in_float32(denoiser: Any) -> Any:
    """What is called to compute in float32, as in evaluation.

    A model in half precision is copied for it. One in training mode is copied too, tensors shared:
    its dropout would answer otherwise at every call, and its batch norms would learn from them.

    Args:
        denoiser: A module, or anything else that is called like one, which stays as it is.

    Raises:
        TraceError: The model is in a dtype that does not fit, or cannot be copied.
    """
    if not isinstance(denoiser, nn.Module):
        return denoiser
    floating = {p.dtype for p in denoiser.parameters() if p.is_floating_point()}
    if not floating <= {torch.float32}:
        return enter(denoiser).model.eval()
    return _copied(unwrap(denoiser)).eval() if _trains(denoiser) else denoiser


def _trains(model: nn.Module) -> bool:
    """Whether some module is in training mode; those of a traced graph are in none."""
    graphs = [m for m in model.modules() if isinstance(m, fx.GraphModule) and "signature" in m.meta]
    traced = {id(module) for graph in graphs for module in graph.modules()}
    return any(m.training for m in model.modules() if id(m) not in traced)


def _check_arguments(model: nn.Module) -> None:
    kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if kinds and kinds <= variable:
        children = [f"its {name!r}" for name, _ in model.named_children()]
        raise TraceError(
            f"{type(model).__name__}: forward takes (*args, **kwargs) and does not name its "
            f"arguments; give the module inside ({', '.join(children[:3]) or 'what it calls'}), or "
            "write the arguments' names into forward"
        )


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of most floating-point numbers among the parameters."""
    counts = dict.fromkeys((torch.float32, *LOW_PRECISION), 0)
    for parameter in model.parameters():
        if parameter.dtype in counts:
            counts[parameter.dtype] += parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _needs_copy(tensor: Tensor) -> bool:
    return tensor.dtype in LOW_PRECISION or tensor.is_inference()


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every tensor which may stay as it is.

    What refers to a module of the model (bound methods, lists of blocks) refers to the copy's, and
    nothing in it is compiled (modules leave that behind when they are copied).
    """
    memo: dict[int, Any] = {}
    for _, tensor, is_parameter in own_tensors(model):
        memo.setdefault(id(tensor), _converted(tensor, is_parameter=is_parameter))
    try:
        # inner ones first, so that the copy of an outer one finds them
        for module in reversed(list(model.modules())):
            inner = _inside(module)
            if inner is not None:
                memo[id(module)] = copy.deepcopy(inner, memo)
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), which its "
            "dtype, wrappers or training mode make necessary; give a float32 model without "
            "wrappers, after model.eval()"
        ) from error
    for module in copied.modules():
        original = _compiled_forward(module)
        function = getattr(original, "__func__", original)
        if function is type(module).forward:
            del module.forward  # what is below is the copy's own
        elif original is not None:
            module.forward = original
    return copied


def _converted(tensor: Tensor, *, is_parameter: bool) -> Tensor:
    if not _needs_copy(tensor):
        return tensor
    values = tensor.detach()
    values = values.float() if tensor.dtype in LOW_PRECISION else values.clone()
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if is_parameter else values
