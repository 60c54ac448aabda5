"""Check a quantized folder rung by rung against what it was measured to be."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from mpqdm_fx.backends.xnnpack.inner_values import InnerValues
from mpqdm_fx.backends.xnnpack.runner import sorted_entries
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.calling import example_call, example_inputs
from mpqdm_fx.io import progress
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.io.folders import check_target
from mpqdm_fx.io.sealed import Entry
from mpqdm_fx.model.folder import ModelFolder, open_folder, rewritten_folder
from mpqdm_fx.model.manifest import Program
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.stages import in_form_of, positional_inputs
from mpqdm_fx.model.storage import load
from mpqdm_fx.parity.compare_forms import FormValues, ModelForm, measure
from mpqdm_fx.parity.ladder import Ladder
from mpqdm_fx.parity.rung_inputs import (
    INPUTS,
    Call,
    random_calls,
    read_calls,
    source_calls,
    write_calls,
)
from mpqdm_fx.parity.thresholds import THRESHOLDS, Thresholds
from mpqdm_fx.records.activations import DynamicActivation
from mpqdm_fx.run.cost import bind_sizes, value_bytes
from mpqdm_fx.sources.denoisers import (
    PROGRAM,
    SOURCE,
    open_program,
    program_files,
    program_names,
    source_of,
)
from mpqdm_fx.sources.source import Source

__all__ = ["store_parity", "verify"]

logger = logging.getLogger(__name__)

_LARGEST = 2**30  # bytes of one call's values that are measured without being asked for


@dataclass(frozen=True, kw_only=True)
class _Lowered:
    """A folder's program: loaded, and the graphs it was made of."""

    folder: ModelFolder
    runner: Any
    graphs: Any


@plain_torch()
def verify(
    directory: str | Path, *, model: nn.Module | str | None = None, store: bool = False
) -> Ladder:
    """Run all forms of a quantized model on the same inputs and compare them value by value.

    The rungs are the float model, the fake-quantized graph, and, if the folder has a `.pte`: that
    graph in XNNPACK's operators with biases in whole steps (`decomposed`), the int8 graph
    (`converted`), ExecuTorch's edge program (`edge`), and the program itself (`pte`), whose inner
    values a copy of it shows. Each is compared with the one before; the program of a model with
    dynamic ranges with `decomposed`, because the two between name one range per tensor where the
    kernels have one per row. Between `decomposed` and a program of the backend `lowbit` there is
    one rung: own operators by their references in Python (`mixed`). Its images lie channels last,
    so of it outputs alone are compared; the program's values are compared with its.

    The inputs, the float model's outputs and the thresholds lie in the folder
    (`parity.safetensors`, `parity.json`).

    Args:
        directory: Folder written by `quantize_to_folder` (`mpqdm-fx quantize`) or `save`.
        model: The float model, or its name or folder if it is no longer where it was. A model that
            is no diffusers model has to be given.
        store: Measure anew and store the result as thresholds, in place of older ones.

    Returns:
        What was measured; `passed` tells whether it is what is wanted.

    Raises:
        ArtifactError: The folder, or a file in it, is missing, damaged, of a newer version, or not
            the one that thresholds were stored for, or there are none; with `store`, there is no
            float model, what is measured is NaN, or the folder holds files that are not its own.
        LoweringError: There is a program and ExecuTorch is missing or fails.
    """
    folder = Path(directory)
    opened = open_folder(folder)
    if store:
        check_target(folder, overwrite=True)  # `rewritten_folder` would refuse it after the work
    progress.expect(lambda: _stages(program=bool(program_names(opened)), store=store))
    module = model if isinstance(model, nn.Module) else None
    source = None
    with progress.stage("loading"):
        opened.files.check()
        thresholds = None if store else _stored(opened)
        runner = open_program(opened) if program_names(opened) else None
        quantized = load(folder, module)
        if module is None:
            try:
                source = _source(folder, model if isinstance(model, str) else None)
            except ArtifactError as error:
                if store:
                    raise
                logger.warning("%s", error)
    floats = source.model if source is not None else module
    if thresholds is not None:
        with opened.files.opened(INPUTS) as file:
            calls, outputs = read_calls(file, quantized.signature, where=folder / INPUTS)
    else:
        outputs = []
        calls = (
            source_calls(source, quantized.signature)
            if source is not None
            else random_calls(quantized.signature)
        )
    lowered = None
    if runner is not None:
        with progress.stage("exporting"):
            graphs = _program_graphs(quantized, opened.manifest.program)
        lowered = _Lowered(folder=opened, runner=runner, graphs=graphs)
    measured = _measure(quantized, calls, floats, outputs, lowered, stability=store)
    if thresholds is None:
        with rewritten_folder(folder) as stage:
            thresholds = _store(measured, calls, stage)
    return thresholds.judge(measured.ladder)


@plain_torch()
def store_parity(
    quantized: QuantizedModel,
    source: Source,
    folder: Path,
    graphs: Any = None,
    *,
    floats: fx.GraphModule | None = None,
) -> Ladder | None:
    """Measure a model that was just quantized, and store inputs and thresholds.

    All values of a call are held several times over; a model whose values take more than a gibibyte
    is left to `verify --store`, which the user starts when there is memory for it.

    Args:
        quantized: The model.
        source: Its float model.
        folder: Folder that holds its files.
        graphs: `ProgramGraphs` or `LowbitGraphs` of the program in the folder; None if there is
            none.
        floats: The float graph in the form that was quantized, if it was traced already.

    Returns:
        The ladder; None if the model is too large.
    """
    calls = source_calls(source, quantized.signature)
    sizes = bind_sizes(_graph(quantized), calls[0])
    size = sum(value_bytes(node, sizes) for node in _graph(quantized).graph.nodes)
    if size > _LARGEST:
        logger.warning(
            "no thresholds are stored: the values of one call take %.1f GiB, and verifying holds "
            "several times as much; `mpqdm-fx verify --store` does it", size / 2**30,
        )  # fmt: skip
        return None
    lowered = None
    if graphs is not None:
        opened = open_folder(folder)
        lowered = _Lowered(folder=opened, runner=open_program(opened), graphs=graphs)
    measured = _measure(quantized, calls, source.model, [], lowered, stability=True, floats=floats)
    return _store(measured, calls, folder).judge(measured.ladder)


def _stages(*, program: bool, store: bool) -> dict[str, float]:
    """Seconds by stage of `verify`, in running order, of the bundled model."""
    comes = {
        "loading": 6.0,
        "float model's runs": 1.0 if store else 0.0,
        "exporting": 50.0 if program else 0.0,
        "tracing": 6.0,
        "comparing forms": (6.0 if program else 1.5) * (4 if store else 1),
    }
    return {name: seconds for name, seconds in comes.items() if seconds}


def _measure(
    quantized: QuantizedModel,
    calls: Sequence[Call],
    model: nn.Module | None,
    outputs: Sequence[Any],
    lowered: _Lowered | None,
    *,
    stability: bool,
    floats: fx.GraphModule | None = None,
) -> FormValues:
    signature, notes = quantized.signature, []
    forms = []
    if model is None:
        notes.append(
            "the float model is not there: its stored outputs stand for it, and the layers of the "
            "fake-quantized graph are compared with nothing"
        )
        forms.append(ModelForm(name="float", run=lambda number, _: outputs[number]))
    else:
        graph = floats
        if graph is None:
            with progress.stage("tracing"):
                graph = in_form_of(quantized, model, example_call(signature))
        forms.append(ModelForm(name="float", graph=graph))
    forms.append(ModelForm(name="quantized", graph=_graph(quantized)))
    inputs = [
        [sorted_entries(value) for value in positional_inputs(quantized.rounded, call)]
        for call in calls
    ]
    with contextlib.ExitStack() as stack:
        if lowered is None:
            notes.append(f"there is no {PROGRAM}: the ladder ends with the fake-quantized graph")
        else:
            forms += _program_forms(lowered, quantized, stack)
        return measure(forms, inputs, notes=notes, stability=stability)


def _program_forms(
    lowered: _Lowered, quantized: QuantizedModel, stack: contextlib.ExitStack
) -> list[ModelForm]:
    """The forms on the way to a program, and the program; its files are open as long as `stack`."""
    graphs = lowered.graphs
    mixed = getattr(graphs, "mixed", None)
    forms = [ModelForm(name="decomposed", graph=graphs.decomposed)]
    if mixed is None:
        forms.append(ModelForm(name="converted", graph=graphs.converted))
        forms.append(ModelForm(name="edge", graph=graphs.edge))
    else:
        forms.append(ModelForm(name="mixed", graph=mixed, channels_last=True))
    dynamic = any(isinstance(a, DynamicActivation) for a in quantized.ranges.values())
    path, weights = stack.enter_context(program_files(lowered.folder))
    program = ModelForm(
        name="pte",
        run=lambda _, inputs: lowered.runner(*inputs),
        inner=InnerValues(path, weights, graphs.edge),
        against="decomposed" if dynamic and mixed is None else None,
        channels_last=mixed is not None,
    )
    return [*forms, program]


def _program_graphs(quantized: QuantizedModel, program: Program | None) -> Any:
    from mpqdm_fx.backends.lowbit.road import LowbitGraphs
    from mpqdm_fx.backends.xnnpack.road import ProgramGraphs

    example = example_inputs(quantized.signature, batch_size=1)
    inputs = positional_inputs(quantized.rounded, example)
    form = {} if program is None else program.model_dump(include={"four_bit", "kernels", "cpu"})
    form = {name: value for name, value in form.items() if value is not None}
    kind = LowbitGraphs if "kernels" in form else ProgramGraphs
    return kind.of(quantized.rounded, quantized.ranges, inputs, **form)


def _graph(quantized: QuantizedModel) -> fx.GraphModule:
    graph = quantized.graph_module
    assert isinstance(graph, fx.GraphModule)
    return graph


def _source(folder: Path, model: str | None) -> Source:
    if model is None and not (folder / SOURCE).exists():
        raise ArtifactError(f"{folder} does not say what float model it came from; give `model`")
    return source_of(folder, model)


def _store(measured: FormValues, calls: Sequence[Call], folder: Path) -> Thresholds:
    names = (INPUTS, *program_names(open_folder(folder)))
    write_calls(folder / INPUTS, calls, measured.outputs["float"])
    thresholds = Thresholds.of(
        measured, {name: Entry.of(folder / name).to_dict() for name in names}
    )
    thresholds.write(folder / THRESHOLDS)
    return thresholds


def _stored(folder: ModelFolder) -> Thresholds:
    """The folder's thresholds, which hold for the very files that lie there."""
    if THRESHOLDS not in folder.files:
        raise ArtifactError(
            f"{folder.root} holds no thresholds ({THRESHOLDS}), so nothing can be judged; measure "
            f"them where the folder is known to be right: mpqdm-fx verify {folder.root} --store"
        )
    path = folder.root / THRESHOLDS
    thresholds = Thresholds.from_dict(folder.files.read_json(THRESHOLDS), path)
    thresholds.check(folder.files, program_names(folder))
    return thresholds
