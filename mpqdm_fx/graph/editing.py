"""Copy and edit a GraphModule without ever touching the one it came from.

A copy has its own graph and its own *container* modules, but shares every leaf module (whatever a
`call_module` node calls) and every tensor. So nothing may be written into a leaf or a tensor; an
edit installs a new module object with `replace_module` or `add_module`.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from mpqdm_fx.graph.calling import TracedGraph
from mpqdm_fx.graph.stand_ins import shell

__all__ = [
    "add_module",
    "add_tensor",
    "copy_graph_module",
    "eliminate_dead_code",
    "free_name",
    "infer_val",
    "inherit_meta",
    "insert_call",
    "keep_fetched",
    "prune",
    "replace_module",
    "shallow_clone",
    "writes_in_place",
]

_Module = TypeVar("_Module", bound=nn.Module)

# What is true of the anchor's own value or was decided for it alone, and not of a new node near it.
_NOT_INHERITED = frozenset({"val", "tensor_meta", "example_value", "quantization_annotation"})


def shallow_clone(module: _Module) -> _Module:
    """Return a new module object with the same tensors and the same children objects.

    Setting a parameter, buffer, child or attribute of the clone leaves the original alone.
    """
    clone = object.__new__(type(module))
    clone.__dict__ = {
        # parameters, buffers, children and hooks live in dicts and sets that would else be shared
        key: copy.copy(value) if isinstance(value, dict | set) else value
        for key, value in module.__dict__.items()
    }
    return clone


def _module_targets(graph_module: fx.GraphModule) -> set[str]:
    """Names of the modules that nodes refer to as a whole (called, or fetched as a subgraph)."""
    names = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            *path, field = str(node.target).split(".")
            if field in graph_module.get_submodule(".".join(path))._modules:
                names.add(str(node.target))
    return names


def copy_graph_module(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph and the containers; share leaf modules, parameters and buffers.

    Node meta and `graph_module.meta` are copied one level deep: replace values in them, do not
    write into the values.

    Args:
        graph_module: any GraphModule; it is not changed.

    Returns:
        A new GraphModule of the same class name, with the same state_dict keys and code.
    """
    leaves = _module_targets(graph_module)

    def clone_children(module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            fqn = prefix + name
            if child is not None and fqn not in leaves:
                module._modules[name] = shallow_clone(child)
                clone_children(module._modules[name], fqn + ".")  # type: ignore[arg-type]

    graph = copy.deepcopy(graph_module.graph)
    name = type(graph_module).__name__
    kind = TracedGraph if isinstance(graph_module, TracedGraph) else fx.GraphModule
    result = kind(graph_module, graph, class_name=name)
    # The constructor keeps only what the graph refers to and makes every buffer persistent; a
    # copy keeps everything as it was.
    for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(result, registry, copy.copy(getattr(graph_module, registry)))
    clone_children(result, "")
    result.meta = dict(graph_module.meta)
    return result


def eliminate_dead_code(graph_module: fx.GraphModule) -> bool:
    """Erase nodes without users and without side effects; return whether any was erased.

    Unlike `Graph.eliminate_dead_code` it does not descend into subgraphs, which copies share, and
    it keeps calls of modules that work in place (`nn.ReLU(inplace=True)`).
    """
    erased = False
    for node in reversed(list(graph_module.graph.nodes)):
        if node.users or node.is_impure() or writes_in_place(graph_module, node):
            continue
        graph_module.graph.erase_node(node)
        erased = True
    return erased


def writes_in_place(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node writes into one of its inputs (`add_`, `nn.ReLU(inplace=True)`)."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return any(getattr(part, "inplace", False) is True for part in module.modules())
    if node.op == "call_method":
        return str(node.target).endswith("_")
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def prune(graph_module: fx.GraphModule) -> None:
    """Drop modules, parameters and buffers that no node refers to, in place.

    Args:
        graph_module: the copy to edit. Modules that it may share are cloned before they lose
            something, so no other GraphModule and no model sees it.
    """
    leaves = _module_targets(graph_module)
    attributes = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
    referenced = leaves | attributes
    paths = {name[:end] for name in referenced for end, c in enumerate(name) if c == "."}

    def visit(module: nn.Module, prefix: str) -> None:
        for registry in (module._parameters, module._buffers):
            for name in [name for name in registry if prefix + name not in attributes]:
                del registry[name]
        for name, child in list(module._modules.items()):
            fqn = prefix + name
            if fqn in leaves:
                continue
            if child is None or fqn not in paths:
                del module._modules[name]
            else:
                module._modules[name] = clone = _holder(child)
                visit(clone, fqn + ".")

    visit(graph_module, "")


def _holder(module: nn.Module) -> nn.Module:
    """A module to take tensors and children from; of a layer that is not called, a plain one."""
    clone = shallow_clone(module)
    if module._modules or type(module) is nn.Module:
        return clone
    holder = nn.Module().train(module.training)
    for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(holder, registry, getattr(clone, registry))
    return holder


def _containers(graph_module: fx.GraphModule, fqn: str) -> Iterator[tuple[nn.Module, str]]:
    """Yield (parent, name) from the root down to `fqn`, so that the parent may be written to."""
    parent: nn.Module = graph_module
    *path, field = fqn.split(".")
    for name in path:
        yield parent, name
        child = parent._modules[name]
        assert child is not None
        parent = child
    yield parent, field


def replace_module(graph_module: fx.GraphModule, fqn: str, module: nn.Module) -> None:
    """Install `module` at `fqn`, and wherever else the module that was there also sits.

    The containers on the way are replaced by clones first: containers may be shared with another
    GraphModule (a `copy.copy`, the caller's model), which must not see the new module. Aliases
    are followed so that a layer tied to another one stays tied.

    Args:
        graph_module: the copy to edit, in place. Its nodes keep their targets.
        fqn: fully qualified name of an existing module.
        module: the new object.

    Raises:
        AttributeError: there is no module at `fqn`.
    """
    for name in _names(graph_module, graph_module.get_submodule(fqn)):
        _install(graph_module, name, module)


def _names(graph_module: fx.GraphModule, wanted: nn.Module) -> list[str]:
    """All names of a module; what `named_modules` makes of every other one would take most time."""
    names: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            if child is wanted:
                names.append(prefix + name)
            if child is not None and child._modules:
                visit(child, f"{prefix}{name}.")

    visit(graph_module, "")
    return names


def keep_fetched(graph_module: fx.GraphModule, fqn: str) -> None:
    """Let nodes that fetch a tensor of a module go on fetching it when another takes its place.

    A model may read the weight of a layer beside calling it. Where a new layer computes the same
    with other numbers, or with numbers in another shape, such readers still want the old ones.

    Args:
        graph_module: The copy to edit, in place. Tensors that are fetched get a name beside the
            module, under which they are fetched from now on.
        fqn: Fully qualified name of an existing module.

    Raises:
        AttributeError: There is no module at `fqn`.
    """
    module = graph_module.get_submodule(fqn)
    owners = set(_names(graph_module, module))
    kept: dict[str, str] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        owner, _, field = str(node.target).rpartition(".")
        if owner not in owners:
            continue
        if field not in kept:
            kept[field] = free_name(graph_module, f"{owner}_{field}")
            tensor = getattr(module, field)
            is_parameter = isinstance(tensor, nn.Parameter)
            _install(graph_module, kept[field], tensor if is_parameter else nn.Buffer(tensor))
        node.target = kept[field]


def add_module(graph_module: fx.GraphModule, fqn: str, module: nn.Module) -> None:
    """Install `module` at the new name `fqn`, creating containers where there are none.

    Args:
        graph_module: the copy to edit, in place.
        fqn: a name that is not taken (see `free_name`).
        module: the new object.

    Raises:
        AttributeError: something already sits at `fqn`.
    """
    if free_name(graph_module, fqn) != fqn:
        raise AttributeError(f"{fqn!r} is taken already; choose the name with free_name")
    _install(graph_module, fqn, module)


def add_tensor(
    graph_module: fx.GraphModule, fqn: str, tensor: torch.Tensor, *, anchor: fx.Node
) -> fx.Node:
    """Register `tensor` as a buffer and fetch it just before `anchor`.

    Args:
        graph_module: the copy to edit, in place.
        fqn: name of the buffer; it gets a number if it is taken, as do later ones at this name.
        tensor: kept as it is, not copied.
        anchor: the node whose provenance the new one takes over.

    Returns:
        The `get_attr` node, with a value if `anchor`'s inputs have fake ones.
    """
    name = free_name(graph_module, fqn)
    _install(graph_module, name, nn.Buffer(tensor))
    with graph_module.graph.inserting_before(anchor):
        node = graph_module.graph.get_attr(name)
    inherit_meta(node, anchor)
    values = [v for n in anchor.all_input_nodes for v in pytree.tree_leaves(n.meta.get("val"))]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is not None:
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    return node


def _install(graph_module: fx.GraphModule, fqn: str, value: nn.Module | torch.Tensor) -> None:
    depth = fqn.count(".")
    for index, (parent, name) in enumerate(_containers(graph_module, fqn)):
        if index == depth:
            setattr(parent, name, value)
        else:
            child = parent._modules.get(name)
            parent._modules[name] = nn.Module() if child is None else shallow_clone(child)


def free_name(graph_module: fx.GraphModule, fqn: str) -> str:
    """Return `fqn`, or `fqn_1`, `fqn_2`, ... if that name is taken in `graph_module`."""
    *path, field = fqn.split(".")
    try:
        parent = graph_module.get_submodule(".".join(path))
    except AttributeError:
        return fqn
    candidate, number = field, 0
    while hasattr(parent, candidate):
        number += 1
        candidate = f"{field}_{number}"
    return ".".join([*path, candidate])


def inherit_meta(node: fx.Node, anchor: fx.Node, *, fqn: str | None = None) -> None:
    """Give a new node the provenance of the node it stands in for.

    Args:
        node: the new node.
        anchor: the node it is derived from; everything in its meta is taken over, except its
            value (`val`) and annotations, which are the anchor's own.
        fqn: for a `call_module` node, its target, which becomes the innermost entry's name in
            `nn_module_stack`.
    """
    inherited = {k: v for k, v in anchor.meta.items() if k not in _NOT_INHERITED}
    stack = inherited.get("nn_module_stack")
    if fqn is not None and stack:
        *outer, (key, (_, kind)) = stack.items()
        inherited["nn_module_stack"] = {**dict(outer), f"{key}@{fqn}": (fqn, kind)}
    node.meta.update({k: v for k, v in inherited.items() if k not in node.meta})


def infer_val(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Set `node.meta["val"]` by running the node on its inputs' fake values.

    Nothing is set when an input has no value (a graph that was never propagated).
    """
    inputs = node.all_input_nodes
    if any("val" not in n.meta for n in inputs):
        return
    values = [value for n in inputs for value in pytree.tree_leaves(n.meta["val"])]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is None:
        return
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with torch.no_grad():
        node.meta["val"] = _evaluator(graph_module, node, mode)(*args, **kwargs)


def _evaluator(
    graph_module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode
) -> Callable[..., Any]:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        fake: dict[str, torch.Tensor] = {
            name: mode.from_tensor(shell(t), static_shapes=True) for name, t in tensors.items()
        }

        def run(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return torch.func.functional_call(module, fake, args, kwargs)

        return run
    target = node.target
    assert callable(target)

    def call(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return target(*args, **kwargs)

    return call


def insert_call(
    graph_module: fx.GraphModule,
    target: str | Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    anchor: fx.Node,
) -> fx.Node:
    """Insert a call just before `anchor`, with the anchor's provenance and an inferred value.

    Args:
        graph_module: the copy to edit, in place.
        target: a module's fully qualified name, or a function.
        args: positional arguments; nodes among them must precede `anchor`.
        kwargs: keyword arguments.
        anchor: the node that the new one stands in for.

    Returns:
        The new node.
    """
    graph = graph_module.graph
    with graph.inserting_before(anchor):
        if isinstance(target, str):
            node = graph.call_module(target, args, kwargs)
        else:
            node = graph.call_function(target, args, kwargs)
    inherit_meta(node, anchor, fqn=target if isinstance(target, str) else None)
    infer_val(graph_module, node)
    return node
