"""Raise an exported ATen graph to module level: one ``call_module`` for each leaf ``nn.Module``.

torch.export inlines every module and lifts its parameters to graph inputs, but each node still
says in ``nn_module_stack`` which module call it came from. The nodes whose innermost entry is one
call of a leaf module *are* that module's forward, so they are replaced by one ``call_module`` at
its own fully qualified name. Everything else stays ATen, with parameters as ``get_attr`` nodes.
"""

import collections
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from mpqdm_fx.capture.functional import refuse_autocast
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.calling import TracedGraph
from mpqdm_fx.graph.leaves import (
    evaluation_copy,
    is_stock,
    leaf_class,
    out_of_place,
    proven_layer,
    same_settings,
    whole_layer,
)

__all__ = ["raise_leaf_modules"]

# Nodes without a value: they restate at run time what the export assumed, and torch.ao's
# retrace cannot execute them on proxies. Signature.normalize checks the same facts up front.
_CHECKS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten._assert_async.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)


def raise_leaf_modules(
    exported: ExportedProgram,
    model: nn.Module,
    inputs: Mapping[str, Any],
) -> fx.GraphModule:
    """Rebuild ``exported`` as a module-level graph that shares ``model``'s modules and parameters.

    Rules, in this order:
      1. assertion and range-constraint nodes are dropped: they have no value;
      2. the nodes of one call of a stock leaf module become one ``call_module`` at the module's own
         name when they read exactly one tensor and yield exactly one;
      3. any other node that is provably a stock layer's operator on the weight of a leaf module
         (one with a forward, helper method or hook of its own; attention that reads the weights of
         its projections) becomes a call of a layer with that node's settings; all else stays ATen;
      4. a parameter, buffer or lifted constant that is used outside leaf modules becomes
         ``get_attr``;
      5. casts stay, also those that change nothing at the traced dtype: they are graph content;
      6. dropouts and norms that training mode changes are copies in evaluation mode (parameters
         shared), whatever mode their owner puts the model's own into later.

    Args:
        exported: A program exported from ``model`` with exactly the keyword arguments ``inputs``.
        model: The module the program was exported from.
        inputs: The keyword arguments of the export, in call order; values are tensors, nested
            dicts, lists and tuples of tensors, or constants.

    Returns:
        The module-level graph; placeholders are the names in ``inputs`` that hold tensors.

    Raises:
        TraceError: If the model returns something that is not a tensor, tuple, list or dict, or
            switches autocast on.
    """
    return _Raiser(exported, model, inputs).run()


class _Raiser:
    """The state of one rebuild: maps nodes of the exported graph to nodes of the new one."""

    def __init__(
        self,
        exported: ExportedProgram,
        model: nn.Module,
        inputs: Mapping[str, Any],
    ) -> None:
        self.exported = exported
        self.model = model
        self.inputs = inputs
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.lifted: dict[fx.Node, tuple[str, torch.Tensor]] = {}
        self.attributes: dict[str, Any] = {}
        self.copies: dict[int, nn.Module] = {}

    def run(self) -> fx.GraphModule:
        _inline_regions(self.exported.graph_module)
        refuse_autocast(self.exported.graph, type(self.model).__name__)
        self.bind_placeholders()
        calls = self.module_calls()
        for node in self.exported.graph.nodes:
            if node.op == "placeholder" or node.target in _CHECKS:
                continue
            if node.op == "output":
                self.emit_output(node)
            elif node in calls:
                call = calls[node]
                if call is not None:
                    self.emit_call(node, *call)
            else:
                if node.op == "get_attr":
                    self.attributes[node.target] = _attribute(
                        self.exported.graph_module, node.target
                    )
                self.env[node] = self.graph.node_copy(node, self.value)
        return self.finish()

    # -- inputs ---------------------------------------------------------------------------------

    def bind_placeholders(self) -> None:
        """Make one placeholder per tensor argument; remember what the lifted inputs stand for."""
        placeholders = [n for n in self.exported.graph.nodes if n.op == "placeholder"]
        user: list[fx.Node] = []
        for node, spec in zip(placeholders, self.exported.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                user.append(node)
            else:
                assert spec.target is not None
                self.lifted[node] = (spec.target, self.lifted_tensor(spec.kind, spec.target))
        leaves, _ = pytree.tree_flatten_with_path(dict(self.inputs))
        tensors = [
            ([_key(entry) for entry in path], node)
            for (path, value), node in zip(leaves, user, strict=True)
            if isinstance(value, torch.Tensor)
        ]
        # a graph wants all placeholders before the getitem nodes that open containers
        names = dict.fromkeys(path[0] for path, _ in tensors)
        roots = {name: self.graph.placeholder(name) for name in names}
        for (name, *inner), node in tensors:
            value = roots[name]
            for key in inner:
                value = self.graph.call_function(operator.getitem, (value, key))
            value.meta = dict(node.meta)
            self.env[node] = value

    def lifted_tensor(self, kind: InputKind, target: str) -> torch.Tensor:
        if kind is InputKind.PARAMETER:
            return self.model.get_parameter(target)
        if kind is InputKind.BUFFER:
            return self.model.get_buffer(target)
        constant = self.exported.constants[target]
        if not isinstance(constant, torch.Tensor):
            raise TraceError(
                f"{type(self.model).__name__} holds an object {target!r} that is not a tensor; "
                "keep it out of forward"
            )
        return constant

    def value(self, node: fx.Node) -> fx.Node:
        """Return the new node for ``node``; a lifted tensor becomes ``get_attr`` at first use."""
        if node not in self.env:
            target, tensor = self.lifted[node]
            self.attributes[target] = tensor
            self.env[node] = self.graph.get_attr(target)
            self.env[node].meta = dict(node.meta)
        return self.env[node]

    # -- leaf modules -----------------------------------------------------------------------------

    def module_calls(self) -> dict[fx.Node, tuple[str, nn.Module, fx.Node] | None]:
        """Map the nodes of raisable calls to None, their outputs to (name, module, input)."""
        calls: dict[fx.Node, tuple[str, nn.Module, fx.Node] | None] = {}
        runs = list(self.runs())
        parts = collections.Counter(key for key, _, _ in runs)
        for key, name, nodes in runs:
            module = self.modules.get(name)
            if module is not None and parts[key] == 1 and is_stock(module):
                calls.update(self.whole_call(name, module, nodes))
        calls.update(self.proven_calls(calls))
        return calls

    def runs(self) -> Iterator[tuple[str, str, list[fx.Node]]]:
        """Yield (call key, module name, nodes) for the neighbours that one module call made.

        A call that enters another module in between is several runs of the same key.
        """
        key, name, run = "", "", list[fx.Node]()
        for node in self.exported.graph.nodes:
            if node.op != "call_function" or node.target in _CHECKS or not _is_tensor(node):
                continue
            innermost, path = _innermost(node)
            if innermost != key and run:
                yield key, name, run
                run = []
            key, name = innermost, path
            run.append(node)
        if run:
            yield key, name, run

    def whole_call(
        self, name: str, module: nn.Module, nodes: list[fx.Node]
    ) -> dict[fx.Node, tuple[str, nn.Module, fx.Node] | None]:
        """Return what ``nodes``, all of one call of a stock layer, become."""
        inside = set(nodes)
        state = {id(t) for t in (*module.parameters(), *module.buffers())}
        outputs = [n for n in nodes if any(user not in inside for user in n.users)]
        sources: list[fx.Node] = []
        for source in dict.fromkeys(a for n in nodes for a in n.all_input_nodes):
            if source in inside or not _is_tensor(source):
                continue  # a symbolic size is a function of the input the module sees
            if source in self.lifted and id(self.lifted[source][1]) in state:
                continue
            sources.append(source)
        layer = whole_layer(module, nodes)
        if len(outputs) != 1 or len(sources) != 1 or layer is None:
            return {}
        proven = proven_layer(module, nodes[0], self.lifted_of) if len(nodes) == 1 else None
        if proven is not None and not same_settings(proven, module):
            return {}  # its attributes were others during this call
        layer = out_of_place(evaluation_copy(layer))
        # a shared module has one stand-in, so that it stays shared
        layer = self.copies.setdefault(id(module), layer)
        return {**dict.fromkeys(nodes), outputs[0]: (name, layer, sources[0])}

    def proven_calls(
        self, raised: Collection[fx.Node]
    ) -> dict[fx.Node, tuple[str, nn.Module, fx.Node]]:
        """Return the other nodes that are calls of a stock layer on the weight of some module.

        Such a node may stand in the module's own forward, or in whatever else reads its weight.
        """
        owners: dict[int, list[str]] = collections.defaultdict(list)
        for name, module in self.modules.items():
            if leaf_class(module) is not None:
                owners[id(module._parameters.get("weight"))].append(name)
        calls: dict[fx.Node, tuple[str, nn.Module, fx.Node]] = {}
        for node in self.exported.graph.nodes:
            if node in raised or node.op != "call_function" or len(node.args) < 2:
                continue
            names = owners.get(id(self.lifted_of(node.args[1])), [])
            for name in sorted(names, key=lambda name: name != _innermost(node)[1]):
                layer = proven_layer(self.modules[name], node, self.lifted_of)
                if layer is None:
                    continue
                shared = self.copies.setdefault(id(self.modules[name]), layer)
                if same_settings(layer, shared):  # one name holds one layer
                    calls[node] = (name, shared, node.args[0])
                    break
        return calls

    def lifted_of(self, node: object) -> torch.Tensor | None:
        """Return the parameter, buffer or constant that a node stands for, or None."""
        return self.lifted[node][1] if isinstance(node, fx.Node) and node in self.lifted else None

    def emit_call(self, node: fx.Node, name: str, module: nn.Module, source: fx.Node) -> None:
        self.attributes[name] = module
        self.env[node] = self.graph.call_module(name, (self.value(source),))
        self.env[node].meta = dict(node.meta)
        if _innermost(node)[1] != name:
            stack = {**node.meta.get("nn_module_stack", {}), name: (name, type(module).__name__)}
            self.env[node].meta["nn_module_stack"] = stack

    # -- output ---------------------------------------------------------------------------------

    def emit_output(self, node: fx.Node) -> None:
        spec = self.exported.call_spec.out_spec
        assert spec is not None
        # what the model overwrites in its inputs is returned too, in front
        kinds = [entry.kind for entry in self.exported.graph_signature.output_specs]
        returned = [
            n
            for n, kind in zip(node.args[0], kinds, strict=True)  # type: ignore[arg-type]
            if kind is OutputKind.USER_OUTPUT
        ]
        flat = [self.value(n) if isinstance(n, fx.Node) else n for n in returned]
        result = pytree.tree_unflatten(flat, spec)
        if isinstance(result, dict) and type(result) is not dict:
            result = dict(result)
        try:
            output = self.graph.output(result)
        except (NotImplementedError, RuntimeError) as error:
            raise TraceError(
                f"{type(self.model).__name__} returns a {type(result).__name__}, "
                "which a graph cannot build; "
                "let forward return a tensor, tuple, list or dict"
            ) from error
        output.meta = dict(node.meta)

    def finish(self) -> fx.GraphModule:
        root = nn.Module()
        # modules before the tensors that are already in their place; parents before children
        order = sorted(
            self.attributes, key=lambda n: (torch.is_tensor(self.attributes[n]), n.count("."))
        )
        for name in order:
            _install(root, name, self.attributes[name])
        graph_module = TracedGraph(root, self.graph, type(self.model).__name__)
        # not .eval(): that would reach through to the caller's own modules
        graph_module.training = False
        graph_module.graph.eliminate_dead_code()
        graph_module.graph.lint()
        graph_module.recompile()
        return graph_module


def _inline_regions(graph_module: fx.GraphModule) -> None:
    """Inline the regions that switch gradients, or autocast off: neither changes a value.

    torch.export wraps them into submodules that torch.ao's tracers cannot enter.
    """
    graph = graph_module.graph
    while True:
        region = next((n for n in graph.nodes if _is_plain_region(n)), None)
        if region is None:
            break
        bodies = [_body(graph_module, argument) for argument in region.args]
        position, body = next((i, b) for i, b in enumerate(bodies) if b is not None)
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        mapping: dict[fx.Node, Any] = dict(zip(inner, region.args[position + 1 :], strict=True))
        with graph.inserting_before(region):
            output: Any = graph.graph_copy(body.graph, mapping)
        if isinstance(output, fx.Node):
            region.replace_all_uses_with(output)
        else:
            for user in list(region.users):  # getitem nodes that open the region's tuple
                user.replace_all_uses_with(output[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(region)
    graph.eliminate_dead_code()


def _is_plain_region(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        return True
    # args: device type, dtype, enabled, cache_enabled, body, *operands
    return node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is False


def _body(graph_module: fx.GraphModule, argument: Any) -> fx.GraphModule | None:
    """Return the submodule that a ``get_attr`` argument holds, if it is one."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    value = _attribute(graph_module, str(argument.target))
    return value if isinstance(value, fx.GraphModule) else None


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int))


def _innermost(node: fx.Node) -> tuple[str, str]:
    """Return the key and the name of the module call that made ``node``."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    key, (path, _) = list(stack.items())[-1]
    return key, path.split("@")[0]


def _key(entry: Any) -> Any:
    """Return the dict key or the index that a pytree path entry stands for."""
    return entry.key if hasattr(entry, "key") else entry.idx


def _attribute(root: nn.Module, name: str) -> Any:
    return operator.attrgetter(name)(root)


def _install(root: nn.Module, name: str, value: Any) -> None:
    """Put ``value`` at the dotted ``name`` below ``root`` without writing into shared modules."""
    *path, last = name.split(".")
    for atom in path:
        if not hasattr(root, atom):
            root.add_module(atom, nn.Module())
        root = getattr(root, atom)
    if getattr(root, last, None) is value:
        return
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(last, value)
    else:
        setattr(root, last, value)
