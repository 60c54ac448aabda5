"""Mixtures of experts in their dense form: every expert on every token, weighed by the router.

At inference models sort tokens by the expert that the router chose (`moe_infer`: `bincount`,
`argsort`, one slice for each expert), so that sizes depend on values, which no graph has. The same
sum, written out: each expert's output times its gate, which is zero where it was not chosen.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpqdm_fx.errors import TraceError

__all__ = ["RoutedBlock", "checked_routing", "dense_routing", "routed_blocks", "routing_note"]

#: What rounding may do, in parts of the largest value: products sum in another order for other
#: numbers of rows.
_TOLERANCE = 1e-4

_METHOD = "moe_infer"


@dataclass(frozen=True, kw_only=True)
class RoutedBlock:
    """A module that hands each token to some of its experts.

    Attributes:
        name: Its fully qualified name; empty for the model itself.
        module: It has a method `moe_infer(tokens, indices, gates)` and its experts in `experts`.
    """

    name: str
    module: nn.Module

    @property
    def experts(self) -> nn.ModuleList:
        """Its experts, in the order that the router's indices mean."""
        experts = self.module.experts
        assert isinstance(experts, nn.ModuleList)
        return experts

    def dense(self, tokens: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        """The sum over all experts, each weighed by its gate.

        Args:
            tokens: [P, channels].
            indices: Whole numbers, P times as many as experts chosen for a token: which experts.
            gates: As many weights, in the same order.

        Returns:
            [P, channels].
        """
        count, rows = len(self.experts), tokens.shape[0]
        experts = torch.arange(count, device=tokens.device)
        chosen = (indices.reshape(rows, -1, 1) == experts).to(gates.dtype)
        weights = (gates.reshape(rows, -1, 1) * chosen).sum(1)
        parts: list[Tensor] = [
            expert(tokens) * weights[:, place : place + 1]
            for place, expert in enumerate(self.experts)
        ]
        return functools.reduce(torch.add, parts)


def routed_blocks(model: nn.Module) -> tuple[RoutedBlock, ...]:
    """Modules of a model that route tokens by `moe_infer` to a list of experts."""
    return tuple(
        RoutedBlock(name=name, module=module)
        for name, module in model.named_modules()
        if callable(getattr(module, _METHOD, None)) and _has_experts(module)
    )


def _has_experts(module: nn.Module) -> bool:
    experts = module._modules.get("experts")
    return isinstance(experts, nn.ModuleList) and len(experts) > 1


@contextlib.contextmanager
def checked_routing(model: nn.Module, blocks: tuple[RoutedBlock, ...]) -> Iterator[dict[str, int]]:
    """While the model runs as it is, hold each block's answers to those of its dense form.

    Each block is asked for what it is given, so the router's choice is the same on both sides.

    Yields:
        Filled on the way: how many experts each block chooses for a token, by name.

    Raises:
        TraceError: A block computes something else; names it.
    """
    chosen: dict[str, int] = {}

    def check(block: RoutedBlock, own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        result = own(*args, **kwargs)
        if not _agree(block, result, args, kwargs):
            raise TraceError(
                f"{type(model).__name__}: {block.name or 'the model'} "
                f"({type(block.module).__name__}) routes tokens to experts in {_METHOD}, but does "
                f"not return the sum of its experts' outputs weighed by the gates that it is "
                f"given; write {_METHOD} as that sum over all experts, with a gate of zero where "
                f"one was not chosen"
            )
        chosen[block.name] = args[1].numel() // max(1, args[0].shape[0])
        return result

    with _replaced(blocks, check):
        yield chosen


def routing_note(blocks: tuple[RoutedBlock, ...], chosen: Mapping[str, int]) -> str:
    """What the dense form costs; empty if no block was called.

    Args:
        blocks: The blocks of a model.
        chosen: From `checked_routing`.
    """
    called = [block for block in blocks if chosen.get(block.name)]
    if not called:
        return ""
    computed = sum(len(block.experts) for block in called)
    times = computed / sum(chosen[block.name] for block in called)
    first = called[0]
    return (
        f"every token goes through all experts ({len(called)} blocks like {first.name}: "
        f"{len(first.experts)} experts, of which the router chooses {chosen[first.name]}), "
        f"which is {times:.3g} times the multiply-adds of those chosen"
    )


@contextlib.contextmanager
def dense_routing(blocks: tuple[RoutedBlock, ...]) -> Iterator[None]:
    """Let each block compute its dense form."""

    def dense(block: RoutedBlock, own: Callable[..., Tensor], *args: Tensor) -> Tensor:
        return block.dense(*args)

    with _replaced(blocks, dense):
        yield


@contextlib.contextmanager
def _replaced(blocks: tuple[RoutedBlock, ...], method: Callable[..., Tensor]) -> Iterator[None]:
    """Put a method in the place of each block's own, which it is given."""
    before = [(block.module, dict(block.module.__dict__)) for block in blocks]
    try:
        for block in blocks:
            own = getattr(block.module, _METHOD)
            block.module.__dict__[_METHOD] = functools.partial(method, block, own)
        yield
    finally:
        for module, attributes in before:
            if _METHOD in attributes:
                module.__dict__[_METHOD] = attributes[_METHOD]
            else:
                module.__dict__.pop(_METHOD, None)


def _agree(block: RoutedBlock, result: Any, args: Any, kwargs: Any) -> bool:
    if kwargs or len(args) != 3 or not all(isinstance(a, Tensor) for a in (*args, result)):
        return False
    try:
        dense = block.dense(*args)
    except (RuntimeError, TypeError):  # other sizes, or experts of other arguments
        return False
    if dense.shape != result.shape or dense.dtype != result.dtype:
        return False
    largest = float(result.abs().max()) if result.numel() else 0.0
    return bool((dense - result).abs().le(_TOLERANCE * largest).all())
