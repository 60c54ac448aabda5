"""Capture a model as a module-level FX graph, bit-equal to eager execution.

``torch.fx.symbolic_trace`` traces no diffusers UNet; torch.export (non-strict) traces all of them.
So: run the model once, export it, and raise every leaf module back to one ``call_module``.
"""

import contextlib
import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mpqdm_fx.capture.batching import (
    BatchPlan,
    batch_plans,
    initial_range,
    is_specialized,
    refine_range,
)
from mpqdm_fx.capture.constant_reads import fold_constant_reads
from mpqdm_fx.capture.dense_experts import (
    checked_routing,
    dense_routing,
    routed_blocks,
    routing_note,
)
from mpqdm_fx.capture.diagnose import (
    CaptureError,
    Refusal,
    depends_on_data,
    describe_inputs,
    refuse,
)
from mpqdm_fx.capture.entry import enter
from mpqdm_fx.capture.fixed_reads import fixed_reads
from mpqdm_fx.capture.functional import functionalized, refuse_counters, refuse_writes
from mpqdm_fx.capture.raise_modules import raise_leaf_modules
from mpqdm_fx.capture.single_times import run_example
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.difference import attention_kernels, first_difference, same_bits
from mpqdm_fx.graph.fold_parametrizations import fold_parametrizations
from mpqdm_fx.graph.layouts import reshape_views
from mpqdm_fx.graph.leaves import check_modules
from mpqdm_fx.graph.noise_names import TIMESTEP_NAMES
from mpqdm_fx.graph.parameters import note_parameters
from mpqdm_fx.graph.samples import samples_listed
from mpqdm_fx.graph.signature import Signature, bind_inputs
from mpqdm_fx.graph.stand_ins import stand_ins
from mpqdm_fx.graph.unread import unread_inputs
from mpqdm_fx.io.ambient import plain_torch

__all__ = ["same_bits", "trace"]

_LOGGER = logging.getLogger(__name__)


@plain_torch()
def trace(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    dynamic_batch: bool = True,
    fractional_timesteps: bool = False,
    verify: bool = True,
) -> fx.GraphModule:
    """Trace ``model`` in evaluation mode to a module-level graph that shares its parameters.

    Placeholders are the model's own argument names. Every leaf module (convolution, linear,
    embedding, norm, activation, dropout) is one ``call_module`` node at its own name, holding the
    model's own module object; of a dropout or batch norm it is a copy in evaluation mode, and
    weights that are computed from parameters (weight norm, spectral norm, pruning) are plain ones
    of the same bits. Everything else is ATen. ``node.meta["val"]`` and ``nn_module_stack`` are
    those of torch.export. Assertions are stripped; casts stay, also those without effect at the
    traced dtype. The graph writes into no value: in-place code is rewritten, and inputs that the
    model overwrites stay as they are. Nor does it depend on strides: views are reshapes. A block
    that hands each token to some of its experts is traced as the sum over all of them, with gates
    of zero, within 1e-4 of its own answers; a warning says the cost.

    The graph computes in float32. A model in half precision is traced as a float32 copy, and the
    signature remembers its dtype. Wrappers of torch.compile and of data parallelism are left out.

    Args:
        model: Any module that torch.export takes. It is not changed: training flags, lazily filled
            caches and the global random state are as before, whatever happens.
        example_inputs: Keyword arguments, or a tuple of positional ones. Integer, float and 0-d
            timesteps become tensors of shape [B] where the model answers to both alike, else 0-d
            ones; None, booleans, strings and other numbers become constants of the graph.
        dynamic_batch: Let the leading axis of batched inputs vary. Where the model does not allow
            it, the batch is fixed, a warning is logged, and the signature's ``note`` says why.
        fractional_timesteps: Take timesteps in float32, so that schedulers with whole and with
            fractional ones run, if the model answers to both dtypes with the same bits; one that
            looks timesteps up in a table stays with integers.
        verify: Compare the graph with the model on the example, bit by bit.

    Returns:
        The graph; ``gm.meta["signature"]`` is its ``Signature``, and
        ``gm(**signature.normalize(args, kwargs))`` equals ``model(*args, **kwargs)``, in float32.

    Raises:
        TraceError: If the inputs do not fit the model or the model cannot be captured; names the
            module path, the model's source line and a suggestion. Also if it is offloaded, cast
            layer by layer, quantized already, or writes into its own state.
    """
    check_modules(model)
    entry = enter(model)
    model = fold_parametrizations(entry.model)
    given = entry.take(example_inputs)
    signature, call = bind_inputs(model, given)
    signature = dataclasses.replace(signature, dtype=entry.dtype)
    routed = routed_blocks(model)
    with _unchanged(model), _evaluation(model), torch.no_grad(), contextlib.ExitStack() as stack:
        with checked_routing(model, routed) as chosen:
            signature, call, expected = run_example(
                partial(_run_eagerly, model), signature, call, given
            )
        if chosen:
            stack.enter_context(dense_routing(routed))
            expected = _run_eagerly(model, signature, call)
        if fractional_timesteps:
            signature, call = _in_fractions(model, signature, call, expected)
        exported, signature, inputs = _export(model, call, signature, dynamic_batch)
        signature = _with_note(signature, routing_note(routed, chosen))
        graph_module = raise_leaf_modules(exported, model, inputs)
        if not signature.dynamic_batch:
            graph_module = fold_constant_reads(graph_module, inputs)
        graph_module.meta["signature"] = signature
        reshape_views(graph_module)
        note_parameters(graph_module, entry.model)
        for name in unread_inputs(graph_module):
            _LOGGER.warning(
                "%s does not read the input %s: leave it out, or check that the model has what "
                "it is for",
                signature.model_class,
                name,
            )
        if verify:
            _verify(model, graph_module, call, expected)
    return graph_module


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore every attribute of every module afterwards, whatever happens in between.

    A forward may fill caches (rotary tables); under an export these would be fake tensors, which a
    later eager call would trip over.
    """
    saved = [(module, dict(module.__dict__)) for module in model.modules()]
    containers = [
        (value, value.copy())
        for _, attributes in saved
        for value in attributes.values()
        if type(value) in (dict, list, set, OrderedDict)
    ]
    try:
        yield
    finally:
        for value, content in containers:
            if value != content if isinstance(value, set) else _differs(value, content):
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)
        for module, attributes in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _differs(value: Any, content: Any) -> bool:
    """Tell whether two containers hold other objects; tensors have no truth value to compare."""
    if len(value) != len(content):
        return True
    if isinstance(value, list):
        return any(a is not b for a, b in zip(value, content, strict=True))
    return any(
        ka != kb or a is not b
        for (ka, a), (kb, b) in zip(value.items(), content.items(), strict=True)
    )


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and keep the global random state to be restored."""
    for module in model.modules():
        module.training = False
    with torch.random.fork_rng(devices=[]):
        yield


def _run_eagerly(model: nn.Module, signature: Signature, call: dict[str, Any]) -> Any:
    """Run the model on the example: it must accept it, and its caches fill with real tensors."""
    try:
        with refuse_writes(model):
            return model(**_copied(call))
    except TraceError:
        raise
    except Exception as error:
        refusal = refuse(model, error, "check the example inputs against the model's configuration")
        refusal = dataclasses.replace(
            refusal, reason=f"{refusal.reason} (given {describe_inputs(call)})"
        )
        raise CaptureError(signature.model_class, "rejects the example inputs", refusal) from error


def _in_fractions(
    model: nn.Module, signature: Signature, call: dict[str, Any], expected: Any
) -> tuple[Signature, dict[str, Any]]:
    """The same call with timesteps in float32, if that makes no difference to the model."""
    whole = {
        spec.name: call[spec.name].float()
        for spec in signature.inputs
        if spec.name in TIMESTEP_NAMES and not spec.dtype.is_floating_point
    }
    if not whole:
        return signature, call
    try:
        with refuse_writes(model):
            answer = model(**_copied({**call, **whole}))
    except Exception:  # whatever a model says to what it does not take
        return signature, call
    if not same_bits(answer, expected):
        return signature, call
    inputs = tuple(
        dataclasses.replace(spec, dtype=torch.float32) if spec.name in whole else spec
        for spec in signature.inputs
    )
    return dataclasses.replace(signature, inputs=inputs), {**call, **whole}


def _with_note(signature: Signature, note: str) -> Signature:
    """The signature with one note more, of which a warning is logged."""
    if not note:
        return signature
    _LOGGER.warning("%s: %s", signature.model_class, note)
    both = "; ".join(part for part in (signature.note, note) if part)
    return dataclasses.replace(signature, note=both)


def _copied(call: dict[str, Any]) -> dict[str, Any]:
    """The call with containers and tensors of its own, which the model may empty and overwrite."""
    copied: dict[str, Any] = pytree.tree_map_only(torch.Tensor, torch.clone, call)
    return copied


def _export(
    model: nn.Module, call: dict[str, Any], signature: Signature, dynamic_batch: bool
) -> tuple[ExportedProgram, Signature, dict[str, Any]]:
    """Export with a free batch if possible, else as the example is."""
    if dynamic_batch and samples_listed(call):
        dynamic_batch = False
        signature = dataclasses.replace(
            signature, note="the batch is fixed: it is the length of a list"
        )
    if dynamic_batch:
        note = ""
        for plan in batch_plans(signature):
            try:
                exported, batch_range = _export_batched(model, call, plan)
                if not _contains(batch_range, signature.batch):
                    # the model branches on a size: be on the example's side of the branch
                    plan = dataclasses.replace(plan, export_batch=max(2, signature.batch))
                    exported, batch_range = _export_batched(model, call, plan)
            except TraceError:
                raise
            except Exception as error:
                if is_specialized(str(error)):
                    note = "the model's code ties the batch to the example's size"
                    break
                note = note or str(refuse(model, error, suggestion="none")).removesuffix("; none")
                if depends_on_data(error):
                    break
                continue
            if _contains(batch_range, signature.batch):
                return exported, _batched(signature, plan, batch_range), plan.tile(call)
            note = note or f"only sizes {batch_range[0]} to {batch_range[1]} can be traced"
        signature = dataclasses.replace(
            signature, note=f"the batch is fixed: {note or 'no input has a batch axis'}"
        )
    try:
        exported, lengths = _export_fixed(model, call)
    except TraceError:
        raise
    except Exception as error:
        raise CaptureError(
            signature.model_class, "cannot be captured", refuse(model, error)
        ) from error
    if lengths:
        note = "; ".join(part for part in (signature.note, lengths) if part)
        signature = dataclasses.replace(signature, note=note)
    if signature.note:
        _LOGGER.warning("%s: %s", signature.model_class, signature.note)
    return exported, signature, call


def _export_fixed(model: nn.Module, call: dict[str, Any]) -> tuple[ExportedProgram, str]:
    """Export as the example is; also what of its values is fixed, which is nothing if it can be."""
    try:
        return _export_once(model, call, None), ""
    except Exception as error:
        reads = fixed_reads(model, _copied(call)) if depends_on_data(error) else None
        if reads is None:
            raise
    with reads.given():
        return _export_once(model, call, None), str(reads)


def _contains(batch_range: tuple[int, int | None], batch: int) -> bool:
    return batch_range[0] <= batch <= (batch_range[1] or batch)


def _export_batched(
    model: nn.Module, call: dict[str, Any], plan: BatchPlan
) -> tuple[ExportedProgram, tuple[int, int | None]]:
    """Export with ``plan``, narrowing the range as torch.export demands."""
    inputs = plan.tile(call)
    batch_range = initial_range(model)
    while True:
        shapes = plan.dynamic_shapes(inputs, batch_range)
        try:
            return _export_once(model, inputs, shapes), batch_range
        except Exception as error:
            refined = refine_range(str(error), batch_range)
            if refined is None:
                raise
            batch_range = refined


def _export_once(
    model: nn.Module, inputs: dict[str, Any], shapes: dict[str, Any] | None
) -> ExportedProgram:
    """Export as a program without in-place operators; the model is left as it was."""
    with _unchanged(model), stand_ins(model), _quiet():
        with refuse_counters(model):
            exported = torch.export.export(
                model, (), _copied(inputs), dynamic_shapes=shapes, strict=False
            )
        return functionalized(exported)


def _batched(
    signature: Signature, plan: BatchPlan, batch_range: tuple[int, int | None]
) -> Signature:
    inputs = tuple(
        dataclasses.replace(spec, batch_axis=0, batch_multiple=plan.multiples[spec.name])
        if spec.name in plan.multiples
        else spec
        for spec in signature.inputs
    )
    return dataclasses.replace(signature, inputs=inputs, batch_range=batch_range)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging the traceback of an attempt that is reported as one line anyway."""
    loggers = [logging.getLogger(n) for n in ("torch._subclasses.fake_tensor", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _verify(
    model: nn.Module, graph_module: fx.GraphModule, call: dict[str, Any], expected: Any
) -> None:
    """Refuse a graph that does not return the very bits of the model.

    Attention has several kernels, whose last bits differ, and PyTorch chooses one by what it knows
    outside the graph. So a difference counts only where both sides run the same kernels.
    """
    signature = graph_module.meta["signature"]
    arguments = {name: call[name] for name in signature.arguments}
    if same_bits(graph_module(**arguments), expected):
        return
    deterministic = same_bits(model(**_copied(call)), expected)
    for kernels in attention_kernels() if deterministic else ():
        with kernels:
            if same_bits(graph_module(**arguments), model(**_copied(call))):
                return
    refusal = Refusal(
        reason=first_difference(model, graph_module, _copied(call), arguments),
        suggestion="please report this model"
        if deterministic
        else "the model draws random numbers or keeps state between calls; make them inputs",
    )
    raise CaptureError(signature.model_class, "cannot be captured", refusal)
