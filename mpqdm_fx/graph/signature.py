"""What a traced graph takes: the model's own arguments, which are tensors, and their shapes."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import nn

from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.nested import constant_leaves, same_constant, tensor_leaves
from mpqdm_fx.graph.noise_names import NOISE_NAMES, TIMESTEP_NAMES
from mpqdm_fx.graph.samples import batch_size_of
from mpqdm_fx.graph.stored_types import BatchSize, ComputeDType, InputDType
from mpqdm_fx.io.schema import Name, Shape, Whole

__all__ = [
    "NOISE_NAMES",
    "TIMESTEP_NAMES",
    "InputSpec",
    "Signature",
    "bind_inputs",
    "tensor_leaves",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One tensor input of a traced graph.

    Attributes:
        name: The argument's name; entries of containers are dotted
            (``added_cond_kwargs.time_ids``).
        shape: The shape of the example.
        dtype: The dtype of the example.
        batch_axis: 0 if the leading axis varies with the batch, None if the shape is fixed.
        batch_multiple: Rows of the leading axis per sample (video models: one prompt per frame).
    """

    name: Name
    shape: Shape
    dtype: InputDType
    batch_axis: Literal[0] | None = None
    batch_multiple: BatchSize = 1

    def shape_at(self, batch: int) -> tuple[int, ...]:
        """Return the shape for a batch of ``batch`` samples."""
        if self.batch_axis is None:
            return self.shape
        return (self.batch_multiple * batch, *self.shape[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """The calling convention of a traced graph.

    The following conditions hold: ``arguments`` are the names of the graph's placeholders in order;
    every ``inputs[i].name`` starts with one of them; ``arguments`` and the names in ``baked`` are
    disjoint; both begin with one of ``parameters``.

    Attributes:
        model_class: Class name of the traced model.
        output_class: Dotted path of the output dataclass that the model's forward declares, or
            None. The graph itself returns what the model returns for ``return_dict=False``.
        parameters: All argument names of the model's forward, in order.
        arguments: Those that are inputs of the graph, in order.
        baked: (name, value) of what is constant in the graph: arguments (those that the example
            left out with forward's own default, but for None), and entries of containers that hold
            tensors too (dotted names).
        inputs: One spec per tensor, in placeholder order.
        batch: The example's batch size.
        batch_range: (smallest, largest or None) batch size the graph takes; None if it is fixed.
        defaults: (name, value) of what the model takes for a constant that is left out of a call,
            where that is another value than the traced one.
        note: Why the batch is fixed although a dynamic one was asked for; empty otherwise.
        dtype: What the caller's model computes in. The graph computes in float32; inputs of this
            dtype are taken too, and models return it.
    """

    model_class: Name
    output_class: Name | None = None
    parameters: tuple[Name, ...]
    arguments: tuple[Name, ...]
    baked: tuple[tuple[Name, Any], ...] = ()
    inputs: tuple[Annotated[InputSpec, Whole()], ...]
    batch: BatchSize
    batch_range: tuple[BatchSize, BatchSize | None] | None = None
    defaults: tuple[tuple[Name, Any], ...] = ()
    note: str = ""
    dtype: ComputeDType = torch.float32

    @property
    def dynamic_batch(self) -> bool:
        """Whether the graph takes other batch sizes than the example's."""
        return self.batch_range is not None

    def spec(self, name: str) -> InputSpec:
        """Return the spec of the tensor input ``name``; raises KeyError if there is none."""
        return {spec.name: spec for spec in self.inputs}[name]

    def bind(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Give every argument of a call of the model its name.

        Args:
            args: Positional arguments as the model's forward takes them.
            kwargs: Keyword arguments as the model's forward takes them.

        Returns:
            Argument name to the value that was given.

        Raises:
            TraceError: If there are too many arguments, or one is unknown or given twice.
        """
        return _bind(self.model_class, self.parameters, args, kwargs or {})

    def normalize(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Turn a call of the model into the inputs of the graph.

        Python numbers and 0-d tensors become tensors of shape [B]; arguments that are constants of
        the graph are checked and dropped; ``return_dict`` is ignored (the caller wraps the output).

        Args: as of ``bind``.

        Returns:
            Argument name to tensor or container, in placeholder order: ``gm(**normalized)``.

        Raises:
            TraceError: If an argument is unknown, missing, of another shape or dtype than traced,
                or differs from the constant that was traced; names the argument and the fix.
        """
        values = self.bind(args, kwargs)
        for name, value in values.items():
            if name not in self.arguments and name != "return_dict":
                self._check_constant(name, value)
        for name, default in self.defaults:
            if name not in values:
                raise TraceError(
                    f"{self.model_class}: {name!r} was traced as the constant "
                    f"{dict(self.baked)[name]!r}, but the model takes {default!r} where a call "
                    f"leaves it out; give {name}={dict(self.baked)[name]!r}"
                )
        return self.fit(values)

    def fit(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Turn values for the graph's placeholders into its inputs; see ``normalize``.

        Args:
            values: A value for each of ``arguments``; other names are ignored.

        Returns:
            Argument name to tensor or container, in placeholder order.

        Raises:
            TraceError: As for ``normalize``.
        """
        missing = [n for n in self.arguments if values.get(n) is None]
        if missing:
            raise TraceError(
                f"{self.model_class}: missing argument(s) {', '.join(missing)}; "
                f"the graph takes ({', '.join(self.arguments)})"
            )
        specs = {spec.name: spec for spec in self.inputs}
        batch = self._batch_of({n: values[n] for n in self.arguments}, specs)
        return {n: self._fit(n, values[n], specs, batch) for n in self.arguments}

    def _batch_of(self, values: Mapping[str, Any], specs: Mapping[str, InputSpec]) -> int:
        batch = self.batch
        for name, value in tensor_leaves(values):
            spec = specs.get(name)
            if spec and spec.batch_axis == 0 and value.ndim == len(spec.shape) and value.ndim > 1:
                batch = value.shape[0] // spec.batch_multiple
                break
        low, high = self.batch_range or (self.batch, self.batch)
        if batch < low or (high is not None and batch > high):
            allowed = f"{low}" if low == high else f"{low}..{high or 'any'}"
            raise TraceError(
                f"{self.model_class}: batch size {batch} is outside the traced range {allowed}; "
                + (f"{self.note}; " if self.note else "")
                + "trace again with an example of that batch size"
            )
        return batch

    def _fit(self, name: str, value: Any, specs: Mapping[str, InputSpec], batch: int) -> Any:
        """Return ``value`` as the graph wants it; recurses into containers."""
        if name in specs:
            return _fit_tensor(self, value, specs[name], batch)
        names = [s for s in specs if s.startswith(f"{name}.")]
        if not names:
            self._check_constant(name, value)
            return value
        if isinstance(value, Mapping):
            fitted: Any = {k: self._fit(f"{name}.{k}", v, specs, batch) for k, v in value.items()}
            keys = list(value)
        elif isinstance(value, (list, tuple)):
            entries = [self._fit(f"{name}.{i}", v, specs, batch) for i, v in enumerate(value)]
            fitted = entries if isinstance(value, list) else tuple(entries)
            keys = list(range(len(value)))
        else:
            raise TraceError(f"{self.model_class}: {name} must be a container of tensors")
        for entry in names:
            if not any(_below(entry, f"{name}.{key}") for key in keys):
                raise TraceError(f"{self.model_class}: {name} lacks the entry {entry}")
        return fitted

    def _check_constant(self, name: str, value: Any) -> None:
        """Refuse a value that differs from the constant that the graph was traced with."""
        traced = dict(self.baked).get(name)
        if not same_constant(value, traced):
            raise TraceError(
                f"{self.model_class}: {name!r} was traced as the constant {traced!r} and cannot be "
                f"{_describe(value)} now; trace again with an example input that has it"
            )


def bind_inputs(
    model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any]
) -> tuple[Signature, dict[str, Any]]:
    """Bind example inputs to the arguments of ``model.forward``.

    Python numbers and 0-d tensors for arguments that stand for tensors (timesteps, and whatever
    forward annotates as a tensor) become tensors of shape [B], int64 for integers. A number under
    another name of the noise level (`NOISE_NAMES`) becomes a 0-d tensor, which broadcasts as the
    number does. Tensors are left as they are. ``return_dict=False`` is added where forward accepts
    it.

    Args:
        model: The module to be traced.
        example_inputs: Keyword arguments, or a tuple or list of positional arguments.

    Returns:
        The signature with every shape fixed, and the full keyword arguments in forward's order.

    Raises:
        TraceError: If an argument is unknown or missing, or nothing is a tensor.
    """
    model_class = type(model).__name__
    parameters = _forward_parameters(model)
    if isinstance(example_inputs, Mapping):
        values = _bind(model_class, tuple(parameters), (), example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        values = _bind(model_class, tuple(parameters), example_inputs, {})
    else:
        raise TraceError(
            f"{model_class}: example_inputs must be a dict of keyword arguments or a tuple of "
            f"positional ones, not {_describe(example_inputs)}"
        )
    missing = [
        name
        for name, parameter in parameters.items()
        if name not in values and parameter.default is inspect.Parameter.empty
    ]
    if missing:
        raise TraceError(
            f"{model_class}: example inputs lack the argument(s) {', '.join(missing)}; "
            f"forward takes ({', '.join(parameters)})"
        )
    if "return_dict" in parameters:
        values["return_dict"] = False
    values = {name: values[name] for name in parameters if name in values}  # in forward's order
    batch = batch_size_of(values)
    call = {
        name: _number_to_tensor(name, parameters[name], value, batch)
        for name, value in values.items()
    }
    leaves = list(tensor_leaves(call))
    baked, defaults = _constants(parameters, values, call)
    if not leaves:
        raise TraceError(f"{model_class}: no example input is a tensor")
    arguments = tuple(dict.fromkeys(name.split(".")[0] for name, _ in leaves))
    signature = Signature(
        model_class=model_class,
        output_class=_output_class(model),
        parameters=tuple(parameters),
        arguments=arguments,
        baked=baked,
        defaults=defaults,
        inputs=tuple(InputSpec(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in leaves),
        batch=batch,
    )
    return signature, call


def _constants(
    parameters: Mapping[str, inspect.Parameter], values: Mapping[str, Any], call: Mapping[str, Any]
) -> tuple[tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]:
    """Return ``baked`` and ``defaults`` of a signature."""
    baked = dict(constant_leaves(call))
    defaults = {}
    for name, parameter in parameters.items():
        default = parameter.default
        if name == "return_dict" or default is inspect.Parameter.empty:
            continue
        if name not in values and isinstance(default, bool | int | float | str):
            baked[name] = default
        elif name in baked and not same_constant(default, baked[name]):
            defaults[name] = default
    return tuple(baked.items()), tuple(defaults.items())


def _forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind in kinds
    }


def _bind(
    model_class: str, parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    if len(args) > len(parameters):
        raise TraceError(
            f"{model_class}: {len(args)} positional arguments, "
            f"but forward takes {len(parameters)}: ({', '.join(parameters)})"
        )
    values = dict(zip(parameters, args, strict=False))
    for name, value in kwargs.items():
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"({', '.join(parameters)})"
            raise TraceError(f"{model_class}: forward has no argument {name!r}; {hint}")
        if name in values:
            raise TraceError(f"{model_class}: argument {name!r} is given twice")
        values[name] = value
    return values


def _number_to_tensor(name: str, parameter: inspect.Parameter, value: Any, batch: int) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)):
        return value
    is_timestep = name in TIMESTEP_NAMES
    if isinstance(value, torch.Tensor):
        single = value.ndim == 0 or (value.ndim == 1 and value.shape[0] == 1)
        return value.reshape(1).repeat(batch) if is_timestep and single else value
    is_tensor = is_timestep or "Tensor" in str(parameter.annotation)
    if not is_tensor and name not in NOISE_NAMES:
        return value
    dtype = torch.int64 if isinstance(value, int) else torch.get_default_dtype()
    return torch.full((batch,) if is_tensor else (), value, dtype=dtype)


def _fit_tensor(signature: Signature, value: Any, spec: InputSpec, batch: int) -> torch.Tensor:
    """Return ``value`` with the shape and dtype of ``spec`` at batch size ``batch``."""
    model_class, shape = signature.model_class, spec.shape_at(batch)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = torch.tensor(value)
    if not isinstance(value, torch.Tensor):
        raise TraceError(f"{model_class}: {spec.name} must be a tensor, not {_describe(value)}")
    if len(shape) == 1 and value.numel() == 1:
        value = value.reshape(1).expand(shape).contiguous()
    if tuple(value.shape) != shape:
        raise TraceError(
            f"{model_class}: {spec.name} has shape {list(value.shape)}, "
            f"but the graph was traced for {list(shape)}"
            + (f" ({signature.note})" if signature.note else "")
            + "; trace again with this shape"
        )
    if value.dtype == signature.dtype and spec.dtype is torch.float32:
        widened: torch.Tensor = value.float()
        return widened
    if value.dtype != spec.dtype:
        # timesteps: schedulers mix int64 and float32; a conversion must not lose anything
        cast: torch.Tensor = value.to(spec.dtype)
        if len(shape) > 1 or not torch.equal(cast.to(value.dtype), value):
            raise TraceError(
                f"{model_class}: {spec.name} is {value.dtype}, but was traced as {spec.dtype}; "
                f"convert it, or trace again with a {value.dtype} example"
            )
        return cast
    return torch.as_tensor(value)


def _output_class(model: nn.Module) -> str | None:
    """Return the dotted path of the output dataclass in forward's return annotation, if any."""
    annotation = inspect.signature(model.forward).return_annotation
    for candidate in getattr(annotation, "__args__", (annotation,)):
        if not isinstance(candidate, type) or not dataclasses.is_dataclass(candidate):
            continue
        # one that is defined inside something else is found by no dotted path
        top = type(model).__module__.split(".")[0]
        if candidate.__module__.startswith(top) and "." not in candidate.__qualname__:
            return f"{candidate.__module__}.{candidate.__qualname__}"
    return None


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r:.60}"
