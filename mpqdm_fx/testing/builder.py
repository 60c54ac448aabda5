"""Emit module-level graphs node by node; used by `testing.graphs`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from mpqdm_fx.graph.signature import InputSpec, Signature

__all__ = ["GraphBuilder"]


class GraphBuilder:
    """A graph under construction: the current image, its channels, and earlier images.

    Attributes:
        image: node of the current image [N, C, H, W].
        shape: (C, H, W) of it.
        kept: earlier images, the graph's input first: what skips reach back to.
        timestep: node of the timesteps, int64 [N].
    """

    def __init__(self, inputs: Mapping[str, Tensor], generator: torch.Generator) -> None:
        self._graph = fx.Graph()
        self._inputs = inputs
        self._generator = generator
        self._modules: dict[str, nn.Module] = {}
        self._calls: dict[str, int] = {}
        self._scope = ""
        self.image = self._graph.placeholder("sample")
        self.timestep = self._graph.placeholder("timestep")
        self.batch, *shape = inputs["sample"].shape
        self.shape: tuple[int, int, int] = (shape[0], shape[1], shape[2])
        self.kept = [self.image]
        self._shapes = [self.shape]

    def open_scope(self, name: str) -> None:
        """Put what follows under the module path `name`."""
        self._scope = name

    def keep(self) -> None:
        """Remember the current image for later skips."""
        self.kept.append(self.image)
        self._shapes.append(self.shape)

    def skip(self) -> tuple[fx.Node, int]:
        """Return the oldest kept image of the current height and width, and its channels."""
        for node, shape in zip(self.kept, self._shapes, strict=True):
            if shape[1:] == self.shape[1:]:
                return node, shape[0]
        return self.image, self.shape[0]

    def set_image(self, node: fx.Node, channels: int, size: tuple[int, int] | None = None) -> None:
        """Make `node` the current image."""
        height, width = size or self.shape[1:]
        self.image, self.shape = node, (channels, height, width)

    def module(self, name: str, module: nn.Module) -> str:
        """Install a module built on the meta device in this scope, filled at random.

        Weights keep the variance of their input, so values stay around 1 however deep the graph.
        """
        fqn = f"{self._scope}.{name}"
        module = module.to_empty(device="cpu").eval().requires_grad_(False)
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            self._fill(key.rpartition(".")[2], tensor)
        self._modules[fqn] = module
        return fqn

    def _fill(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point():
            tensor.zero_()  # num_batches_tracked
            return
        noise = torch.randn(tensor.shape, generator=self._generator)
        if name == "running_var":
            tensor.copy_(0.5 + noise.abs())
        elif tensor.dim() < 2:  # biases, and norms' weights around 1
            tensor.copy_(noise * 0.1 + (1.0 if name == "weight" else 0.0))
        else:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)

    def install(self, fqn: str, module: nn.Module) -> str:
        """Install a module without parameters at a name outside the scope, once."""
        self._modules.setdefault(fqn, module.eval())
        return fqn

    def call(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Emit a call of an installed module (by name) or of a function."""
        stack = {"": ("", "RandomUNet"), self._scope: (self._scope, "Block")}
        if isinstance(target, str):
            node = self._graph.call_module(target, args, kwargs)
            # the export tells repeated calls apart by a number behind the key
            calls = self._calls[target] = self._calls.get(target, -1) + 1
            key = f"{target}@{calls}" if calls else target
            stack[key] = (target, type(self._modules[target]).__name__)
        else:
            node = self._graph.call_function(target, args, kwargs)
        node.meta["nn_module_stack"] = stack
        return node

    def finish(self, outputs: Sequence[fx.Node]) -> fx.GraphModule:
        """Return the graph that gives these outputs as a tuple, with values propagated."""
        self._graph.output(tuple(outputs))
        graph_module = fx.GraphModule(self._modules, self._graph, class_name="RandomUNet")
        graph_module.eval()
        specs = tuple(
            InputSpec(name=name, shape=tuple(t.shape), dtype=t.dtype)
            for name, t in self._inputs.items()
        )
        graph_module.meta["signature"] = Signature(
            model_class="RandomUNet",
            parameters=tuple(self._inputs),
            arguments=tuple(self._inputs),
            inputs=specs,
            batch=self.batch,
        )
        with torch.no_grad():
            _RecordValues(graph_module).run(*self._inputs.values())
        return graph_module


class _RecordValues(fx.Interpreter):
    """Run the graph on real tensors and note fake ones: ten times faster than FakeTensorProp."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self._mode = FakeTensorMode()

    def run_node(self, node: fx.Node) -> Any:
        """Run one node and set its `val`."""
        result = super().run_node(node)
        node.meta["val"] = pytree.tree_map_only(Tensor, self._fake, result)
        return result

    def _fake(self, value: Tensor) -> Tensor:
        with self._mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
