"""A graph as plain JSON types: every node, every setting that a layer's forward reads.

The description is at once the graph's fingerprint, since two graphs of equal descriptions and equal
tensors compute the same numbers, and its file, since `graph.rebuild` makes the graph from it.
Which names a stock layer's forward reads is read off its code, so that no list of
hyperparameters has to be kept: `padding_mode` and the padding worked out from it, `eps`,
`num_groups`, `approximate`, `negative_slope`. What is code of the model's own is told by name.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from mpqdm_fx.graph.leaves import HOOKS, leaf_class
from mpqdm_fx.graph.literals import CODE, code_name, codes_in, literal, target_name

__all__ = [
    "Description",
    "code_in",
    "describe",
    "first_difference",
    "module_settings",
    "read_names",
    "setting_names",
]

Description = dict[str, Any]
"""What `describe` returns: plain JSON types."""

# What a call goes through before and beside `forward`.
_CALLING = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")
_ROUNDED = frozenset({"weight_codes", "weight_scale"})
_MODULE = frozenset(vars(nn.Module()))
# What a node's entry holds, but for its scope, of which no number depends.
_NODE = ("name", "kind", "target", "arguments", "options")


def describe(graph_module: fx.GraphModule) -> Description:
    """Describe a graph without the values of its tensors.

    Codes and scales of rounded layers are left out: a graph and its rounded form are described
    alike.

    Args:
        graph_module: Any graph; it is not changed.

    Returns:
        `model`: the graph's class name; `nodes`: [name, op, target, args, kwargs, scope] of each,
        where the scope is the module that the model computed it in and the number of its call
        (nothing for a call of that module); `modules`: class, settings and tensors of each called
        module; `tensors`: of the rest. Tensors are [kind, dtype, shape].
    """
    nodes = list(graph_module.graph.nodes)
    modules: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name in dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module"):
        module = graph_module.get_submodule(name)
        if id(module) in first:
            modules[name] = {"same": first[id(module)]}
        else:
            modules[name] = _module(module)
            first[id(module)] = name
    tensors: dict[str, Any] = {}
    for name in dict.fromkeys(str(node.target) for node in nodes if node.op == "get_attr"):
        if not any(name.startswith(f"{owner}.") for owner in modules):
            *path, field = name.split(".")
            owner = graph_module.get_submodule(".".join(path))
            tensors[name] = _tensor(getattr(owner, field), owner, field)
    return {
        "model": type(graph_module).__name__,
        "nodes": [_node(node) for node in nodes],
        "modules": modules,
        "tensors": tensors,
    }


def _node(node: fx.Node) -> list[Any]:
    target: Any = str(node.target)
    if node.op == "call_function":
        target = target_name(node.target)
    elif node.op == "call_method":
        target = {CODE: f"method {target}"}
    stack = node.meta.get("nn_module_stack") or {}
    key, entry = next(reversed(stack.items()), ("", ("", None)))
    call = str(key).rpartition("@")[2]
    # Which call of a module a node is from decides what it is compared with (`parity.sites`).
    scope = [str(entry[0]), int(call) if call.isdigit() else 0]
    return [
        node.name,
        node.op,
        target,
        literal(list(node.args)),
        {key: literal(value) for key, value in node.kwargs.items()},
        [] if scope == [node.target, 0] else scope,
    ]


def _tensor(value: Any, owner: nn.Module, field: str) -> Any:
    if not isinstance(value, Tensor):
        return {CODE: code_name(value)}
    kind = "parameter" if field in owner._parameters else "buffer"
    if kind == "buffer" and (
        field not in owner._buffers or field in owner._non_persistent_buffers_set
    ):
        return {CODE: "tensor that no state_dict holds"}
    return [kind, str(value.dtype).removeprefix("torch."), list(value.shape)]


def _module(module: nn.Module) -> dict[str, Any]:
    stock = leaf_class(module)
    if stock is None or not _behaves_like(module, stock):
        return {"class": {CODE: code_name(type(module))}, "settings": module_settings(module)}
    names = setting_names(stock)
    settings = {n: literal(v) for n, v in sorted(vars(module).items()) if n in names - _MODULE}
    settings |= {n: {CODE: "hook"} for n in HOOKS if getattr(module, n)}
    tensors: dict[str, Any] = {}
    for name, value in {**module._parameters, **module._buffers}.items():
        if name not in _ROUNDED:
            tensors[name] = None if value is None else _tensor(value, module, name)
    return {"class": stock.__name__, "settings": settings, "tensors": tensors}


def _behaves_like(module: nn.Module, stock: type[nn.Module]) -> bool:
    """Whether everything that a call of the module runs is the stock class's own."""
    names = read_names(stock).union(_CALLING)
    of_class = all(getattr(type(module), n, None) is getattr(stock, n, None) for n in names)
    return of_class and not module._modules


def module_settings(module: nn.Module) -> dict[str, Any]:
    """All attributes of a module and of those inside that are no tensors, as JSON values.

    Args:
        module: Any module.

    Returns:
        Value by dotted name; the class of each module inside stands at its own name.
    """
    settings: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        settings[prefix] = code_name(type(part))
        for name, value in sorted(vars(part).items()):
            if name not in _MODULE and not isinstance(value, Tensor | nn.Module):
                settings[f"{prefix}.{name}".lstrip(".")] = literal(value)
    return settings


def read_names(stock: type[nn.Module]) -> frozenset[str]:
    """Every name that a class's `forward`, and what it calls of the class, can read of `self`.

    Args:
        stock: A layer of torch.nn.
    """
    names, waiting = {"forward"}, ["forward"]
    while waiting:
        value = inspect.getattr_static(stock, waiting.pop(), None)
        function = value.fget if isinstance(value, property) else inspect.unwrap(value)
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        new = set() if code is None else set(_names_of(code)) - names
        names |= new
        waiting += sorted(new)
    return frozenset(names)


def setting_names(stock: type[nn.Module]) -> frozenset[str]:
    """What describes a layer: names that `forward` reads or that its constructor sets.

    Args:
        stock: A layer of torch.nn.
    """
    names = set(read_names(stock))
    for parent in stock.__mro__[: stock.__mro__.index(nn.Module)]:
        if "__init__" in vars(parent):
            names |= set(_names_of(vars(parent)["__init__"].__code__))
    return frozenset(names)


def _names_of(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names_of(constant)


def code_in(description: Description) -> str | None:
    """Where a graph runs code that no description holds, in words; None if it runs none."""
    for name, module in description["modules"].items():
        if code := next(codes_in(module.get("class")), None):
            return f"{name} is a {code}"
        for setting, value in module.get("settings", {}).items():
            if code := next(codes_in(value), None):
                return f"{name}.{setting} is {code}"
        for tensor, value in module.get("tensors", {}).items():
            if code := next(codes_in(value), None):
                return f"{name}.{tensor} is a {code}"
    for name, value in description["tensors"].items():
        if code := next(codes_in(value), None):
            return f"{name} is a {code}"
    for name, _, *parts, scope in description["nodes"]:
        if code := next(codes_in(parts), None):
            return f"node {name}{_in(scope)} calls {code}"
    return None


def first_difference(actual: Description, stored: Description) -> str | None:
    """Say where two graphs differ first: a layer's setting, a tensor's shape, or a node.

    Args:
        actual: The graph at hand.
        stored: The one that it should be.

    Returns:
        One clause that names the place and both values, or None.
    """
    for part in ("modules", "tensors"):
        for name, expected in stored[part].items():
            entry = actual[part].get(name)
            if entry is None:
                return f"there is no {name}"
            if _differs(entry, expected):
                return _entry_difference(name, entry, expected)
        if more := [name for name in actual[part] if name not in stored[part]]:
            return f"there is a {more[0]} more"
    for node, counterpart in zip(actual["nodes"], stored["nodes"], strict=False):
        for what, value, expected in zip(_NODE, node, counterpart, strict=False):
            if _differs(value, expected):
                place = f"{what} of node {counterpart[0]}{_in(counterpart[-1])}"
                return f"{place} is {_shown(value)} and not {_shown(expected)}"
    if len(actual["nodes"]) != len(stored["nodes"]):
        return f"the graph has {len(actual['nodes'])} nodes and not {len(stored['nodes'])}"
    return None


def _differs(value: Any, expected: Any) -> bool:
    """As texts: in Python 1, 1.0 and True are equal."""
    return json.dumps(value) != json.dumps(expected)


def _entry_difference(name: str, entry: Any, expected: Any) -> str:
    """Where the entries of one module or tensor differ first."""
    if isinstance(entry, Mapping) and isinstance(expected, Mapping):
        kinds = entry.get("class"), expected.get("class")
        if _differs(*kinds):
            return f"{name} is a {_shown(kinds[0])} and not a {_shown(kinds[1])}"
        for part in ("settings", "tensors"):
            actual, stored = entry.get(part, {}), expected.get(part, {})
            for key in dict.fromkeys([*stored, *actual]):
                values = actual.get(key), stored.get(key)
                if _differs(*values):
                    return f"{name}.{key} is {_shown(values[0])} and not {_shown(values[1])}"
    return f"{name} is {_shown(entry)} and not {_shown(expected)}"


def _in(scope: list[Any]) -> str:
    return f" in {scope[0]}" if scope and scope[0] else ""


def _shown(value: Any) -> str:
    """A JSON form as it was before, for messages."""
    if isinstance(value, Mapping) and len(value) == 1:
        (content,) = value.values()
        if isinstance(content, list):
            return f"({', '.join(map(_shown, content))})"
        return str(content)
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value)
