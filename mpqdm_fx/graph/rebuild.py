"""Make a graph from its description: inverse of `graph.describe`, without any code of the model's.

Descriptions come from files, so everything in them is checked: torch.fx turns a graph into Python
source, and a name with a quote or a bracket in it would be code.
"""

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils import _pytree as pytree

from mpqdm_fx.errors import ArtifactError, first_line
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.describe import Description, code_in, setting_names
from mpqdm_fx.graph.leaves import LEAF_CLASSES
from mpqdm_fx.graph.literals import target_of, value_of
from mpqdm_fx.graph.signature import Signature, tensor_leaves
from mpqdm_fx.graph.stand_ins import shell

__all__ = ["infer_static_values", "infer_values", "rebuild"]

_CLASSES = {stock.__name__: stock for stock in LEAF_CLASSES}
# Submodules may be called anything; torch.fx puts the name between quotes.
_PATH = re.compile(r"""[^."'\\{}\r\n]+(\.[^."'\\{}\r\n]+)*""")


def rebuild(description: Description, signature: Signature) -> fx.GraphModule:
    """Make the graph that was described; its tensors have shapes and no values yet.

    Args:
        description: What `describe` returned.
        signature: The graph's signature.

    Returns:
        The graph, its tensors on the meta device. Give them values (`load_state_dict` with
        `assign=True`) and call `infer_values`.

    Raises:
        ArtifactError: The description is damaged, or holds code.
    """
    try:
        if (code := code_in(description)) is not None:
            raise ArtifactError(code)
        root = nn.Module()
        for name, entry in description["modules"].items():
            module = root.get_submodule(entry["same"]) if "same" in entry else _layer(entry)
            setattr(*_place(root, name), module)
        for name, entry in description["tensors"].items():
            _register(*_place(root, name), entry)
        graph = _graph(description["nodes"])
        graph_module = fx.GraphModule(root, graph, _identifier(description["model"]))
        graph_module.graph.lint()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise ArtifactError(f"the stored graph is damaged: {error!r}") from None
    graph_module.training = False
    graph_module.meta["signature"] = signature
    _check_signature(graph_module, signature)
    return graph_module


def _check_signature(graph_module: fx.GraphModule, signature: Signature) -> None:
    names = tuple(str(node.target) for node in graph_module.graph.find_nodes(op="placeholder"))
    inputs = tuple(dict.fromkeys(spec.name.partition(".")[0] for spec in signature.inputs))
    if names != signature.arguments or set(inputs) != set(names):
        raise ArtifactError(
            f"the stored graph takes {', '.join(names)}, its signature names "
            f"{', '.join(signature.arguments)} with tensors of {', '.join(inputs)}"
        )


def _identifier(name: Any) -> str:
    if not (isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)):
        raise ValueError(f"{name!r} is no name")
    return name


def _place(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a dotted name lies in, and its last part; makes containers on the way."""
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is no path of a module")
    *owners, field = path.split(".")
    owner = root
    for atom in owners:
        if atom not in owner._modules:
            owner.add_module(atom, nn.Module())
        owner = owner.get_submodule(atom)
    if hasattr(owner, field):
        raise ValueError(f"{path!r} is there already")
    return owner, field


def _layer(entry: Mapping[str, Any]) -> nn.Module:
    """A stock layer with the settings that its forward reads."""
    stock = _CLASSES[entry["class"]]
    layer = object.__new__(stock)
    nn.Module.__init__(layer)
    known = setting_names(stock)  # read off the class's code, which takes its time
    for name, value in entry["settings"].items():
        if name not in known or hasattr(stock, name):
            raise ValueError(f"{name!r} is no setting of {stock.__name__}")
        setattr(layer, name, value_of(value, {}))
    for name, tensor in entry["tensors"].items():
        if hasattr(layer, name):
            raise ValueError(f"{name!r} is no tensor of {stock.__name__}")
        _register(layer, name, tensor)
    return layer.eval()


def _register(owner: nn.Module, name: str, entry: Any) -> None:
    if entry is None:  # a layer without a bias
        owner.register_parameter(name, None)
        return
    kind, dtype, shape = entry
    tensor = torch.empty(shape, dtype=value_of({"dtype": dtype}, {}), device="meta")
    if kind == "parameter":
        owner.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(name, tensor)


def _graph(entries: list[list[Any]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, op, target, args, kwargs, scope in entries:
        called: Any = target
        if op == "call_function":
            called = target_of(target)
        elif op == "placeholder":
            called = _identifier(target)
        elif op in ("call_module", "get_attr") and not _PATH.fullmatch(target):
            raise ValueError(f"{target!r} is no path of a module")
        elif op not in ("call_module", "get_attr", "output"):
            raise ValueError(f"{op!r} is no kind of node")
        node = graph.create_node(
            op,
            called,
            tuple(value_of(args, nodes)),
            {_identifier(key): value_of(value, nodes) for key, value in kwargs.items()},
            name=_identifier(name),
        )
        if node.name != name:
            raise ValueError(f"there are two nodes {name!r}")
        if op not in ("placeholder", "output"):
            node.meta["nn_module_stack"] = _stack(*scope) if scope else _stack(target, 0)
        nodes[name] = node
    return graph


def _stack(path: str, call: int) -> dict[str, tuple[str, str]]:
    """The innermost module and the call of it, as torch.export notes them."""
    if not isinstance(path, str) or type(call) is not int:
        raise ValueError(f"{path!r}, {call!r} is no call of a module")
    stack = {"": ("", "")}
    return {**stack, (f"{path}@{call}" if call else path): (path, "")} if path else stack


def infer_values(graph_module: fx.GraphModule) -> None:
    """Set `node.meta["val"]` of every node, in place, as torch.export does: shapes, no numbers.

    The batch is one symbol, as far as the signature lets it vary.

    Args:
        graph_module: A graph with a signature, whose tensors have values.

    Raises:
        ArtifactError: The graph does not run on inputs of its signature.
    """
    signature: Signature = graph_module.meta["signature"]
    low, high = signature.batch_range or (signature.batch, signature.batch)
    # An axis of size 1 broadcasts, so that its symbol would be taken for the number 1.
    batch = max(2, low, signature.batch) if high is None else min(max(2, low), high)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = example_inputs(signature, batch_size=batch)
    dynamic = {s.name for s in signature.inputs if s.batch_axis == 0 and high != low}
    fakes = {
        id(tensor): _fake(tensor, mode, dynamic=name in dynamic)
        for name, tensor in tensor_leaves(inputs)
    }
    call = pytree.tree_map_only(Tensor, lambda tensor: fakes[id(tensor)], inputs)
    values = [call[str(node.target)] for node in graph_module.graph.find_nodes(op="placeholder")]
    try:
        # The dispatcher in Python: kernels in C++ would turn the symbol into the example's number.
        with torch.no_grad(), mode, enable_python_dispatcher():
            _Values(graph_module, mode).run(*values)
    except Exception as error:  # whatever an operator says to what it does not take
        raise ArtifactError(
            f"the stored graph does not run on inputs of its signature: {first_line(error)}"
        ) from None


def infer_static_values(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Set `node.meta["val"]` of every node, in place, for inputs of these very sizes.

    Args:
        graph_module: A graph whose tensors have values.
        inputs: Its inputs in order; only their sizes and dtypes count.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor, static_shapes=True)

    with torch.no_grad(), mode:
        _Values(graph_module, mode).run(*pytree.tree_map_only(Tensor, fake, tuple(inputs)))


def _fake(tensor: Tensor, mode: FakeTensorMode, *, dynamic: bool) -> Tensor:
    # Duck sizes: axes of one size have one symbol.
    axes = [DimDynamic.STATIC] * tensor.dim()
    if dynamic:
        axes[0] = DimDynamic.DUCK
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=axes))


class _Values(fx.Interpreter):
    """Runs a graph on fake tensors and notes every value."""

    def __init__(self, graph_module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.mode = mode

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node.op != "output":
            node.meta["val"] = value
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if type(module) is nn.GroupNorm and len(args) == 1 and _fits(module, args[0]):
            # torch takes a group norm apart, by symbol: half of the seconds of all nodes
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        return super().call_module(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.mode.from_tensor(shell(self.fetch_attr(target)), static_shapes=True)


def _fits(norm: nn.GroupNorm, x: Any) -> bool:
    """Whether a group norm takes a value, without a word of torch's."""
    channels = norm.num_channels
    return (
        isinstance(x, Tensor)
        and x.dim() > 2
        and x.shape[1] == channels
        and channels % norm.num_groups == 0
        and all(t is None or (t.shape == (channels,) and t.dtype == x.dtype) for t in _affine(norm))
    )


def _affine(norm: nn.GroupNorm) -> tuple[Tensor | None, Tensor | None]:
    return norm.weight, norm.bias
