"""The one pass interface: a frozen dataclass of settings with `rewrite(graph_module) -> bool`.

The base class does what is easy to get wrong: it copies, checks `requires` on the graph that goes
in and `ensures` on the graph that comes out (torch's own `PassBase` checks both on the input),
cleans up, and holds `modified` and the input's purity to what really happened.
"""

import abc
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from mpqdm_fx.errors import ConfigError, DialectError
from mpqdm_fx.graph.editing import copy_graph_module, eliminate_dead_code, prune
from mpqdm_fx.records.validation import Count, check_fields, check_value

__all__ = ["GraphPass", "PassResult", "Pipeline", "fingerprint"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GraphPass(PassBase):
    """Base of all passes: settings in fields, one act in `rewrite`.

    A pass is called with a GraphModule and returns a `PassResult(graph_module, modified)`. The
    input graph, its modules, parameters and meta stay as they are; the result shares the
    parameters and leaf modules that the pass did not replace. It is a `torch.fx` pass, so
    `torch.fx.passes.infra.pass_manager.PassManager` takes it too.

    Class attributes:
        preserves_function: False for a pass that means to change the numbers (rounding).
        tolerance: how far the outputs may move, as a share of each output's largest magnitude,
            in float32. 0 means bit-equal.

    Raises:
        ConfigError: a field does not fit its annotation.
    """

    preserves_function: ClassVar[bool] = True
    tolerance: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Check the settings; a pass with a check of its own calls this one too."""
        check_fields(self)

    @abc.abstractmethod
    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Change `graph_module` in place; return whether anything was changed.

        It is a private copy: nodes and containers may be edited at will. Leaf modules and tensors
        are shared with the input graph: install new ones (`graph.layers.replace_module`), never
        write into the old.
        """

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check the graph that goes in.

        Raises:
            DialectError: the pass cannot work on this graph; names the node and the fix.
        """

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check the graph that comes out.

        Raises:
            DialectError: the pass did not keep its promise; names the node.
        """

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """Return the settings under which the generic laws of `tests/` try this pass on a graph.

        A pass without required fields needs no override.
        """
        fields = dataclasses.fields(cls)
        missing = dataclasses.MISSING
        if any(f.default is missing and f.default_factory is missing for f in fields):
            raise NotImplementedError(f"{cls.__name__} has required fields: override examples()")
        return (cls(),)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass on a copy of `graph_module`.

        Returns:
            The new GraphModule, and whether it differs from the input.

        Raises:
            DialectError: `requires` or `ensures` failed, `rewrite` said something else than it
                did, or it wrote into the input.
        """
        return self.call(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Do what `__call__` does; torch's `PassBase` wants it under this name."""
        before = fingerprint(graph_module)
        result = copy_graph_module(graph_module)
        modified = self.apply(result)
        if fingerprint(graph_module) != before:
            raise DialectError(
                f"{type(self).__name__} wrote into its input graph; install new modules with "
                "replace_module instead of writing into shared ones"
            )
        return PassResult(result, modified)

    def apply(self, graph_module: fx.GraphModule) -> bool:
        """Check, rewrite, clean up and check again, in place; return whether anything changed.

        For the inside of a `Pipeline`, which copies once for all its passes. Others call the pass.
        """
        name = type(self).__name__
        nodes = len(graph_module.graph.nodes)
        self.requires(graph_module)
        before = fingerprint(graph_module)
        modified = self.rewrite(graph_module)
        if modified != (fingerprint(graph_module) != before):
            raise DialectError(
                f"{name}.rewrite returned {modified}, but the graph was "
                f"{'left as it was' if modified else 'changed'}"
            )
        if modified:
            eliminate_dead_code(graph_module)
            prune(graph_module)
            graph_module.graph.lint()
            graph_module.recompile()
        self.ensures(graph_module)
        logger.debug("%s: %d -> %d nodes", name, nodes, len(graph_module.graph.nodes))
        return modified


@dataclass(frozen=True, kw_only=True)
class Pipeline(GraphPass):
    """Passes in running order; itself a pass.

    Attributes:
        passes: run one after the other, each on what the one before left.
        max_steps: how often the whole tuple may run; it stops as soon as nothing changes.
    """

    passes: tuple[GraphPass, ...]
    max_steps: Count = 1

    def __post_init__(self) -> None:
        """Refuse what is not a pass.

        Raises:
            ConfigError: an entry is no GraphPass, or `max_steps` is out of range.
        """
        check_value(self.passes, Sequence, "passes")
        for entry in self.passes:
            if not isinstance(entry, GraphPass):
                raise ConfigError(
                    f"Pipeline(passes=...) takes GraphPass objects, got {entry!r}; a pass class "
                    "must be instantiated, a function decorated with `passes.graph_pass`"
                )
        super().__post_init__()

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """Return the empty pipeline; others are tried with their own passes."""
        return (cls(passes=()),)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Run the passes in place."""
        modified = False
        for _ in range(self.max_steps):
            changed = False
            for entry in self.passes:
                try:
                    changed |= entry.apply(graph_module)
                except Exception as error:
                    error.add_note(f"in the pass {entry!r}")
                    raise
            modified |= changed
            if not changed:
                break
        return modified


class fingerprint:  # noqa: N801 - used like a function: fingerprint(a) == fingerprint(b)
    """Everything a pass can change in a GraphModule, cheap to take and to compare.

    Nodes with their arguments and meta, modules and tensors by identity, tensors with their
    version counter (which every in-place write advances, except through `.data`). It keeps what it
    saw alive, so identities cannot be reused.
    """

    __slots__ = ("_alive", "_key")

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._alive: list[Any] = []
        nodes = [
            (n.name, n.op, n.target, repr(n.args), repr(dict(n.kwargs)), self._ids(n.meta))
            for n in graph_module.graph.nodes
        ]
        modules = [
            (name, self._id(module), module.training)
            for name, module in graph_module.named_modules(remove_duplicate=False)
            if not _is_container(module)
        ]
        self._key = (nodes, modules, self._tensors(graph_module), self._ids(graph_module.meta))

    def _id(self, value: object) -> int:
        self._alive.append(value)
        return id(value)

    def _ids(self, meta: dict[str, Any]) -> dict[str, int]:
        return {key: self._id(value) for key, value in meta.items()}

    def _tensors(self, graph_module: fx.GraphModule) -> list[tuple[str, int, int]]:
        named: list[tuple[str, torch.Tensor]] = [
            *graph_module.named_parameters(remove_duplicate=False),
            *graph_module.named_buffers(remove_duplicate=False),
        ]
        # tensors made under inference_mode count no versions
        return [(n, self._id(t), 0 if t.is_inference() else t._version) for n, t in named]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, fingerprint) and self._key == other._key

    __hash__ = None  # type: ignore[assignment]


def _is_container(module: nn.Module) -> bool:
    # Containers are cloned along the way of every edit; only what they hold counts.
    return bool(module._modules) or type(module) is nn.Module
