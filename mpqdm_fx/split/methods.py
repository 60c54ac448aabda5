"""Split a graph into methods: what a loop computes once, and what it computes in every step.

In a denoising loop the prompt stays the same, and with it the keys and values of all
cross-attentions. `split_methods` makes a method `encode_prompt` of what depends on the prompt
alone, and a method `denoise` of the rest, which takes those values as further inputs:

    methods = split_methods(graph_module, {"encode_prompt": ["encoder_hidden_states"]})
    values = methods["encode_prompt"](encoder_hidden_states=prompt)
    for timestep in scheduler.timesteps:
        (noise,) = methods["denoise"](sample=sample, timestep=timestep, **values)
"""

import dataclasses
import difflib
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from mpqdm_fx.errors import ConfigError, DialectError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.editing import copy_graph_module, prune, writes_in_place
from mpqdm_fx.graph.lanes import has_lanes, is_quantizer
from mpqdm_fx.graph.signature import InputSpec, Signature
from mpqdm_fx.run.cost import Sizes, bind_sizes, shape_at
from mpqdm_fx.split.cuts import Cuts, Leaf, find_cuts, input_leaves, is_view, known_size

__all__ = ["build_methods", "check_splittable", "run_methods", "split_methods", "traced_sizes"]

_SYM_SIZE = torch.ops.aten.sym_size.int


def split_methods(
    graph_module: fx.GraphModule,
    invariant: Mapping[str, Collection[str]],
    *,
    rest: str = "denoise",
) -> dict[str, fx.GraphModule]:
    """Cut a graph into one method per group of inputs, and the rest.

    A group's method computes every value that depends on the group's inputs (and constants) alone
    and that the rest needs, if something was computed for it: a bare view of an input is left to
    the rest, which then takes that input too. `split.cuts.find_cuts` has the rules. It returns a
    dictionary of tensors, named after the layers they come from. The rest takes those as keyword
    arguments behind its own, and returns what the graph returns. Run one after the other
    (`run_methods`) the methods give the bits of the whole graph.

    Parameters and leaf modules are shared with `graph_module`, names and meta of nodes are kept.
    Each method's `meta["signature"]` tells what it takes, at which batch sizes.

    Args:
        graph_module: A traced graph, float or quantized; it is not changed.
        invariant: Names of arguments by name of the method that is to take them. An argument is in
            one group at most.
        rest: Name of the method of the rest.

    Returns:
        Methods by name in running order, the rest last. A group for which no value pays has no
        method.

    Raises:
        ConfigError: A name is no argument of the graph, is in two groups, or a method is called
            like the rest.
        DialectError: The graph has no signature or two lanes, or a node writes into its input.
    """
    check_splittable(graph_module)
    group_of = _group_of(graph_module, invariant, rest)
    sizes = traced_sizes(graph_module)
    cuts = find_cuts(graph_module, group_of, passable=_is_passable, sizes=sizes)
    return build_methods(graph_module, cuts, rest=rest, sizes=sizes)


def run_methods(methods: Mapping[str, fx.GraphModule], inputs: Mapping[str, Any]) -> Any:
    """Run methods one after the other: the whole graph's call.

    Args:
        methods: From `split_methods`.
        inputs: Keyword arguments of the whole graph.

    Returns:
        What the last method returns.
    """
    values = dict(inputs)
    result: Any = None
    for method in methods.values():
        names = (str(node.target) for node in method.graph.find_nodes(op="placeholder"))
        result = method(**{name: values[name] for name in names})
        if isinstance(result, dict):
            values.update(result)
    return result


def check_splittable(graph_module: fx.GraphModule) -> None:
    """Refuse a graph that cannot be split.

    Raises:
        DialectError: The graph has no signature; it has two lanes, which are paired by the names of
            their nodes; or a node writes into its input, which another method might read.
    """
    if not isinstance(graph_module.meta.get("signature"), Signature):
        raise DialectError("the graph has no signature in its meta; make it with `trace`")
    if has_lanes(graph_module):
        raise DialectError(
            "the graph has two lanes, float and quantized, for a sweep to compare; split the "
            "rounded graph (`QuantizedModel.rounded`) or the float one"
        )
    for node in graph_module.graph.nodes:
        if writes_in_place(graph_module, node):
            raise DialectError(
                f"node {node.name} ({node.op} {node.target}) writes into its input, which may be "
                "in another method; use the form that returns a new tensor"
            )


def traced_sizes(graph_module: fx.GraphModule) -> Sizes:
    """Numbers of the symbolic sizes for the signature's example batch."""
    return bind_sizes(graph_module, example_inputs(graph_module.meta["signature"]))


def _group_of(
    graph_module: fx.GraphModule, invariant: Mapping[str, Collection[str]], rest: str
) -> dict[str, str]:
    arguments = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    group_of: dict[str, str] = {}
    for method, names in invariant.items():
        if method == rest:
            raise ConfigError(f"{method!r} is the method of the rest; name the group differently")
        if isinstance(names, str):
            raise ConfigError(f"{method!r} takes a collection of argument names, not {names!r}")
        for name in names:
            if name not in arguments:
                near = difflib.get_close_matches(name, arguments, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(arguments)}"
                raise ConfigError(f"{method!r}: the graph has no argument {name!r}; {hint}")
            if name in group_of:
                raise ConfigError(f"{name!r} is in two groups: {group_of[name]!r} and {method!r}")
            group_of[name] = method
    return group_of


def _is_passable(node: fx.Node) -> bool:
    """Whether an `InputSpec` can describe a value: a tensor, no axis but the first symbolic."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and all(isinstance(n, int) for n in value.shape[1:])


def build_methods(
    graph_module: fx.GraphModule, cuts: Cuts, *, rest: str, sizes: Sizes
) -> dict[str, fx.GraphModule]:
    """Make the graphs of the methods.

    Args:
        graph_module: The whole graph; it is not changed.
        cuts: Where to cut it.
        rest: Name of the method of the rest.
        sizes: Numbers of its symbolic sizes for the signature's example batch.

    Returns:
        As `split_methods`.
    """
    names = _readable_names(graph_module, [n for nodes in cuts.cuts.values() for n in nodes])
    signature: Signature = graph_module.meta["signature"]
    specs = {node: _spec(names[node], node, sizes, signature) for node in names}
    methods = {}
    for group, nodes in cuts.cuts.items():
        method, copies = _copied(graph_module)
        output = method.graph.output_node()
        output.args = ({names[node]: copies[node] for node in nodes},)
        output.meta = {}
        body = {copies[node] for node in cuts.groups[group]} | {output}
        _keep(method, body)
        method.meta["signature"] = _alone(signature, method)
        methods[group] = method
    methods[rest] = _rest(graph_module, cuts, specs)
    return methods


def _rest(
    graph_module: fx.GraphModule, cuts: Cuts, specs: Mapping[fx.Node, InputSpec]
) -> fx.GraphModule:
    method, copies = _copied(graph_module)
    graph = method.graph
    body = {copies[node] for node in cuts.rest}
    moved = {n.target for nodes in cuts.groups.values() for n in nodes if n.op == "placeholder"}
    # an argument that nobody reads stays, so that calls stay the same
    body |= {n for n in graph.find_nodes(op="placeholder") if n.target not in moved}
    last = graph.find_nodes(op="placeholder")[-1]
    for node, spec in specs.items():
        with graph.inserting_after(last):
            last = graph.placeholder(spec.name)
        last.meta["val"] = node.meta["val"]
        copies[node].replace_all_uses_with(last)
        body.add(last)
    _keep(method, body)
    signature = _restricted(graph_module.meta["signature"], method)
    added = tuple(spec.name for spec in specs.values())
    method.meta["signature"] = dataclasses.replace(
        signature,
        parameters=(*signature.parameters, *added),
        arguments=(*signature.arguments, *added),
        inputs=(*signature.inputs, *specs.values()),
    )
    return method


def _copied(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    result = copy_graph_module(graph_module)
    pairs = zip(graph_module.graph.nodes, result.graph.nodes, strict=True)
    return result, dict(pairs)


def _keep(method: fx.GraphModule, nodes: Collection[fx.Node]) -> None:
    """Erase all other nodes; sizes of what is erased are read off the placeholders that stay."""
    graph, staying = method.graph, set(nodes)
    leaves = list(input_leaves(n for n in graph.find_nodes(op="placeholder") if n in staying))
    for node in graph.find_nodes(op="call_function", target=_SYM_SIZE):
        if node in staying and node.all_input_nodes[0] not in staying:
            staying.remove(node)
            staying |= _read_size(method, node, leaves)
    for node in reversed(list(graph.nodes)):
        if node not in staying:
            graph.erase_node(node)
    prune(method)
    graph.lint()
    method.recompile()


def _read_size(method: fx.GraphModule, node: fx.Node, leaves: Iterable[Leaf]) -> set[fx.Node]:
    """Let the users of a `sym_size` node read that size off a placeholder; return new nodes."""
    graph, size = method.graph, node.meta["val"]
    if isinstance(size, int):
        for user in list(node.users):
            user.args = fx.node.map_arg(user.args, lambda n: size if n is node else n)
            user.kwargs = fx.node.map_arg(user.kwargs, lambda n: size if n is node else n)
        return set()
    place = known_size(node, leaves)
    assert place is not None, node  # find_cuts kept the placeholder that has it
    source, axis = place
    steps: list[tuple[Callable[..., Any], Any]] = [(operator.getitem, k) for k in source.keys]
    steps.append((_SYM_SIZE, axis))
    value, new = source.placeholder, set()
    after = graph.find_nodes(op="placeholder")[-1]
    for target, key in steps:
        with graph.inserting_after(after):
            after = value = graph.call_function(target, (value, key))
        new.add(value)
    value.meta["val"] = size
    node.replace_all_uses_with(value)
    return new


def _restricted(signature: Signature, method: fx.GraphModule) -> Signature:
    """The signature without the arguments that are no placeholders of a method."""
    there = {node.target for node in method.graph.find_nodes(op="placeholder")}
    gone = set(signature.arguments) - there

    def stays(name: str) -> bool:
        return name.partition(".")[0] not in gone

    return dataclasses.replace(
        signature,
        parameters=tuple(filter(stays, signature.parameters)),
        arguments=tuple(filter(stays, signature.arguments)),
        baked=tuple(entry for entry in signature.baked if stays(entry[0])),
        inputs=tuple(spec for spec in signature.inputs if stays(spec.name)),
    )


def _alone(signature: Signature, method: fx.GraphModule) -> Signature:
    """The signature of a group's method: its arguments, and what is constant within them."""
    part = _restricted(signature, method)
    return dataclasses.replace(
        part,
        output_class=None,
        parameters=part.arguments,
        baked=tuple(e for e in part.baked if e[0].partition(".")[0] in part.arguments),
    )


def _spec(name: str, node: fx.Node, sizes: Sizes, signature: Signature) -> InputSpec:
    value: torch.Tensor = node.meta["val"]
    shape = shape_at(value, sizes)
    follows = bool(shape) and isinstance(value.shape[0], torch.SymInt)
    return InputSpec(
        name=name,
        shape=shape,
        dtype=value.dtype,
        batch_axis=0 if follows else None,
        batch_multiple=shape[0] // signature.batch if follows else 1,
    )


def _readable_names(graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Name values after the layer they come from, else after the input and their node."""
    taken = set(graph_module.meta["signature"].parameters)
    names = {}
    for node in nodes:
        source = node
        while source.all_input_nodes and (
            is_view(graph_module, source) or is_quantizer(graph_module, source)
        ):
            source = source.all_input_nodes[0]
        base = name = source.name if source.op == "call_module" else node.name
        number = 0
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        names[node] = name
    return names
