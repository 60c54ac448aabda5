"""The time branch as a table: a deployed sampler only ever asks for a schedule's few timesteps.

The sines of `time_proj`, the time embedding and every projection of it depend on the timestep
alone. `tabulate_timesteps` computes them once for each timestep of the schedule; the graph then
takes the number of the step and selects a row.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from mpqdm_fx.errors import ConfigError, DialectError
from mpqdm_fx.graph.editing import add_module, free_name, insert_call
from mpqdm_fx.graph.noise_argument import find_noise_argument
from mpqdm_fx.graph.signature import Signature
from mpqdm_fx.io.progress import tracked
from mpqdm_fx.run.cost import shape_at
from mpqdm_fx.split.cuts import find_cuts
from mpqdm_fx.split.methods import build_methods, check_splittable, traced_sizes

__all__ = ["TimestepTable", "tabulate_timesteps"]

_FOLDER = "timestep_tables"


class TimestepTable(nn.Module):
    """A value of the time branch at each timestep of a schedule: `forward(step)` selects rows.

    The step is checked wherever this module is called from Python. An exported program contains
    the selection (`aten.index_select`) alone; ExecuTorch's kernel fails there on a step that is
    out of range.

    Args:
        rows: [T, ...], any dtype.
        timesteps: The schedule's T timesteps; for error messages.
    """

    rows: Tensor

    def __init__(self, rows: Tensor, timesteps: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.timesteps = tuple(timesteps)

    def forward(self, step: Tensor) -> Tensor:
        """Select rows.

        Args:
            step: int64 [B], each in 0..T-1: position in the schedule, not a timestep.

        Returns:
            [B, ...].

        Raises:
            ConfigError: A step is out of range.
        """
        if not isinstance(step, FakeTensor) and not torch.compiler.is_compiling():
            self._check(step)
        return self.rows.index_select(0, step)

    def _check(self, step: Tensor) -> None:
        count = len(self.rows)
        outside = step[(step < 0) | (step >= count)]
        if outside.numel():
            raise ConfigError(
                f"step {int(outside[0])} is outside the table, which has the steps 0..{count - 1} "
                f"(timesteps {self.timesteps[0]:g} to {self.timesteps[-1]:g}); the graph takes the "
                "position in the schedule, not the timestep. For other timesteps tabulate again, "
                "or use the live branch"
            )

    def extra_repr(self) -> str:
        """Size of the table, for print."""
        return f"steps={len(self.rows)}, shape={tuple(self.rows.shape[1:])}"


def tabulate_timesteps(
    graph_module: fx.GraphModule,
    timesteps: Sequence[float] | Tensor,
    noise_argument: str | None = None,
) -> fx.GraphModule:
    """Replace what depends on the timestep alone by tables over a schedule.

    The result takes the position in the schedule where the graph takes the timestep: int64 [B]
    under the same name. What mixes the timestep with another input (a class or text embedding that
    is added to it) stays as it is, behind tables of what goes into it.

    Rows are computed by the graph's own nodes in calls of the signature's batch size. The result is
    as close to the live branch as that is to itself (about 1e-6 of the largest value): a kernel may
    sum in another order for a row elsewhere in a batch, or in a batch of another size.

    Args:
        graph_module: A traced graph, float or quantized; it is not changed.
        timesteps: The schedule's timesteps, or sigmas, or whatever the model is told of the noise
            level, in the order of the steps, finite, whole numbers if the graph takes integers.
            They may repeat (a scheduler of second order).
        noise_argument: The argument that they are given as; None finds it.

    Returns:
        A new graph; `meta["timesteps"]` holds the timesteps as a tuple. Modules and parameters that
        are left are shared.

    Raises:
        ConfigError: There are no timesteps, or one does not fit the dtype that the graph takes; or
            the graph takes no such argument.
        DialectError: The graph takes no noise level of shape [B], has no signature, two lanes or
            tables already, a node writes into its input, or a value mixes the timesteps of samples.
    """
    check_splittable(graph_module)
    if "timesteps" in graph_module.meta:
        raise DialectError("the graph has tables already; tabulate the graph that they came from")
    placeholder = find_noise_argument(graph_module, noise_argument)
    value = None if placeholder is None else placeholder.meta.get("val")
    if placeholder is None or not isinstance(value, Tensor) or value.dim() != 1:
        raise DialectError(
            "the graph is told no noise level of shape [B], so there is no time branch"
        )
    schedule = _schedule(timesteps, value.dtype)
    batch = value.shape[0]

    def follows(node: fx.Node) -> bool:
        tensor = node.meta.get("val")
        if not isinstance(tensor, Tensor) or not tensor.dim():
            return False
        first, *axes = tensor.shape
        return bool(first == batch) and all(isinstance(n, int) for n in axes)

    name = str(placeholder.target)
    sizes = traced_sizes(graph_module)
    cuts = find_cuts(
        graph_module, {name: "time"}, passable=follows, pays=lambda node: True, sizes=sizes
    )
    if not cuts.cuts:
        raise DialectError(f"nothing reads {name!r}, so there is nothing to tabulate")
    methods = build_methods(graph_module, cuts, rest="step", sizes=sizes)
    (size,) = shape_at(value, sizes)
    tables = _tables(methods["time"], name, schedule, size)
    result = methods["step"]
    signature = graph_module.meta["signature"]
    _install(result, tables, tuple(schedule.tolist()), placeholder, signature)
    return result


def _schedule(timesteps: Sequence[float] | Tensor, dtype: torch.dtype) -> Tensor:
    exact = torch.as_tensor(timesteps, dtype=torch.float64).flatten()
    if not exact.numel():
        raise ConfigError("there are no timesteps to tabulate; give those of the schedule")
    cast = exact.to(dtype)
    # float32 schedules are exact in float64 and back; whole numbers have to be whole
    wrong = exact[~exact.isfinite() | (cast.double() != exact.to(torch.float32).double())]
    if wrong.numel():
        raise ConfigError(
            f"timestep {float(wrong[0])} cannot be given to a graph that takes {dtype}; trace it "
            "with a timestep of the schedule's dtype"
        )
    return cast


def _tables(time: fx.GraphModule, name: str, schedule: Tensor, batch: int) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for timestep in tracked(schedule, "tabulating timesteps"):
            for key, value in time(**{name: timestep.repeat(batch)}).items():
                rows.setdefault(key, []).append(value[0].clone())
        tables = {key: torch.stack(values) for key, values in rows.items()}
        _check_rows(time, name, schedule, batch, tables)
    return tables


def _check_rows(
    time: fx.GraphModule, name: str, schedule: Tensor, batch: int, tables: dict[str, Tensor]
) -> None:
    """Refuse values whose rows depend on other samples' timesteps."""
    steps = torch.arange(batch) % len(schedule)
    for key, value in time(**{name: schedule[steps]}).items():
        expected = tables[key][steps]
        bound = 1e-4 * float(expected.abs().max()) if expected.is_floating_point() else 0
        if not torch.allclose(value, expected, rtol=0, atol=bound):
            raise DialectError(f"{key} mixes the timesteps of different samples; tabulate nothing")


def _install(
    graph_module: fx.GraphModule,
    tables: dict[str, Tensor],
    schedule: tuple[float, ...],
    timestep: fx.Node,
    signature: Signature,
) -> None:
    """Put the step in the timestep's place, and tables in that of the inputs made for the cuts."""
    graph, name = graph_module.graph, str(timestep.target)
    later = signature.arguments[signature.arguments.index(name) + 1 :]
    placeholders = {str(n.target): n for n in graph.find_nodes(op="placeholder")}
    with graph.inserting_before(placeholders[next(iter((*later, *tables)))]):
        step = graph.placeholder(name)
    step.meta = {k: v for k, v in timestep.meta.items() if k != "tensor_meta"}
    step.meta["val"] = torch.empty_like(timestep.meta["val"], dtype=torch.int64)
    position = {node: index for index, node in enumerate(graph.nodes)}
    for key, rows in tables.items():
        target = free_name(graph_module, f"{_FOLDER}.{key}")
        add_module(graph_module, target, TimestepTable(rows, schedule))
        first = min(placeholders[key].users, key=position.__getitem__)
        selected = insert_call(graph_module, target, (step,), anchor=first)
        placeholders[key].replace_all_uses_with(selected)
        graph.erase_node(placeholders[key])
    graph.lint()
    graph_module.recompile()
    graph_module.meta["signature"] = dataclasses.replace(
        signature,
        inputs=tuple(
            dataclasses.replace(spec, dtype=torch.int64) if spec.name == name else spec
            for spec in signature.inputs
        ),
    )
    graph_module.meta["timesteps"] = schedule
