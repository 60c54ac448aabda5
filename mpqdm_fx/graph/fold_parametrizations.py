"""Fold parametrized weights into plain ones, on a copy, where that loses no bit.

A weight that is computed from other parameters at every call (weight norm, spectral norm, pruning
masks) is the same tensor at every call in evaluation mode. Folded, its layer is a stock layer that
can be quantized; left as it is, its parameters would be tensors that no layer owns.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mpqdm_fx.graph.editing import shallow_clone

__all__ = ["fold_parametrizations", "plain_names"]


@dataclass(frozen=True, kw_only=True)
class _Parametrized:
    """One computed tensor of a module.

    Attributes:
        name: The tensor's attribute.
        originals: Names of the parameters and buffers that it is computed from, in the module.
        compute: Its value in evaluation mode; writes into nothing.
        hook: Key of the forward pre-hook that sets it; None for `torch.nn.utils.parametrize`.
    """

    name: str
    originals: tuple[str, ...]
    compute: Callable[[], Tensor]
    hook: int | None = None


def fold_parametrizations(model: nn.Module) -> nn.Module:
    """Replace computed weights by plain parameters of the same bits.

    1. Folded are `torch.nn.utils.parametrize` (weight norm, spectral norm, orthogonal and own
       ones) and the forward pre-hooks of `torch.nn.utils`: `weight_norm`, `spectral_norm`, pruning.
    2. A module is folded only if each of its computed tensors has the same bits when it is computed
       twice; one that draws random numbers stays as it is.

    Args:
        model: Any module; it is not changed.

    Returns:
        `model` itself if nothing was folded; else a copy of the modules from the root down to the
        folded ones, which shares everything else with `model`. In evaluation mode it returns the
        very bits that `model` returns.
    """
    plain = {id(module): _plain(module) for module in model.modules()}
    folded = {key: module for key, module in plain.items() if module is not None}
    return _with_folded(model, folded, {}) if folded else model


def plain_names(model: nn.Module) -> dict[str, str]:
    """Name of the tensor that each parameter of a parametrization is there for.

    Args:
        model: The model before `fold_parametrizations`.

    Returns:
        For example `{"conv.parametrizations.weight.original0": "conv.weight"}`.
    """
    return {
        f"{prefix}{original}": f"{prefix}{tensor.name}"
        for path, module in model.named_modules(remove_duplicate=False)
        for prefix in (f"{path}." if path else "",)
        for tensor in _parametrized(module)
        for original in tensor.originals
    }


def _parametrized(module: nn.Module) -> list[_Parametrized]:
    """Find the computed tensors of one module, not of its children."""
    computed = []
    for name, steps in module.parametrizations.items() if is_parametrized(module) else ():  # type: ignore[union-attr,operator]
        tensors = [*steps.named_parameters(), *steps.named_buffers()]
        originals = tuple(f"parametrizations.{name}.{inner}" for inner, _ in tensors)
        compute = partial(_evaluated, steps)
        computed.append(_Parametrized(name=name, originals=originals, compute=compute))
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, WeightNorm):
            name, ends, compute = hook.name, "g v", partial(hook.compute_weight, module)
        elif isinstance(hook, SpectralNorm):
            name, ends = hook.name, "orig u v"
            compute = partial(hook.compute_weight, module, do_power_iteration=False)
        elif isinstance(hook, BasePruningMethod):
            name, ends, compute = hook._tensor_name, "orig mask", partial(hook.apply_mask, module)
        else:
            continue
        originals = tuple(f"{name}_{end}" for end in ends.split())
        computed.append(_Parametrized(name=name, originals=originals, compute=compute, hook=key))
    return computed


def _evaluated(steps: nn.Module) -> Tensor:
    """Value of a `ParametrizationList`; of a copy, as spectral norm in training writes buffers."""
    value: Tensor = copy.deepcopy(steps).eval()()
    return value


def _plain(module: nn.Module) -> nn.Module | None:
    """Return a copy of a module with plain tensors; None if it computes none, or not always alike.

    The copy has the module's own children.
    """
    parametrized = _parametrized(module)
    values = [_value(tensor) for tensor in parametrized]
    if not parametrized or any(value is None for value in values):
        return None
    clone: nn.Module = shallow_clone(module)
    if is_parametrized(module):
        # `parametrize` makes a subclass with one property for each of the tensors
        clone.__class__ = type(module).__bases__[0]
        del clone._modules["parametrizations"]
    trained = any(parameter.requires_grad for parameter in module.parameters())
    for tensor, value in zip(parametrized, values, strict=True):
        if tensor.hook is not None:
            _drop_hook(clone, tensor.hook)
            for original in tensor.originals:
                clone._parameters.pop(original, None)
                clone._buffers.pop(original, None)
            clone.__dict__.pop(tensor.name, None)
        assert value is not None
        clone.register_parameter(tensor.name, nn.Parameter(value, requires_grad=trained))
    return clone


def _value(tensor: _Parametrized) -> Tensor | None:
    """Return what a parametrization computes in evaluation mode, or None if that is not certain."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            first, second = tensor.compute().detach(), tensor.compute().detach()
        except Exception:
            return None  # the model's own call will say what is wrong, with its place
    exact = type(first) is Tensor and first.is_floating_point() and torch.equal(first, second)
    return first if exact else None


def _drop_hook(clone: nn.Module, key: int) -> None:
    """Take away a pre-hook, and those for the state dict that the same object has installed."""
    hook = clone._forward_pre_hooks.pop(key)
    for registry in (clone._state_dict_hooks, clone._load_state_dict_pre_hooks):
        for entry, value in list(registry.items()):
            if getattr(getattr(value, "hook", value), "fn", None) is hook:
                del registry[entry]


def _with_folded(
    module: nn.Module, folded: dict[int, nn.Module], memo: dict[int, nn.Module]
) -> nn.Module:
    """Return a module over its folded children; itself if none is folded. Shared stays shared."""
    if id(module) not in memo:
        plain = folded.get(id(module), module)
        children = {
            name: child if child is None else _with_folded(child, folded, memo)
            for name, child in plain._modules.items()
        }
        if any(plain._modules[name] is not child for name, child in children.items()):
            plain = shallow_clone(plain)
            plain._modules.update(children)
        memo[id(module)] = plain
    return memo[id(module)]
