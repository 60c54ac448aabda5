"""Programs that are not lowered: the parts themselves, run by the runner through its manifest."""

from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.backends.xnnpack.runner import TensorSpec, flat_inputs
from mpqdm_fx.pipelines.export import export_pipeline
from mpqdm_fx.pipelines.runner import PipelineRunner


def _specs(pairs):
    return tuple(
        TensorSpec(name=name, shape=tuple(value.shape), dtype=str(value.dtype).split(".")[-1])
        for name, value in pairs
    )


def eager_writer(models: dict[str, Any]):
    """A stand-in for `write_program` that keeps the part in `models` under its file's name."""

    def write(part, quantized, inputs, path: Path) -> XnnpackProgram:
        with torch.no_grad():
            outputs = pytree.tree_leaves(part.module(**inputs))
        models[path.name] = part.module
        path.write_bytes(path.name.encode())
        return XnnpackProgram(
            path=path,
            bytes=path.stat().st_size,
            subgraphs=1,
            delegated=1,
            undelegated=0,
            refusals={},
            inputs=_specs(flat_inputs(tuple(inputs.values()), list(inputs))),
            outputs=_specs((str(i), value) for i, value in enumerate(outputs)),
            output_scale=None,
            sqnr_db=100.0,
            max_lsb=None,
            reference_sqnr_db=None,
            float_layers={},
            seconds=0.0,
        )

    return write


class _EagerMethod:
    def __init__(self, module, names):
        self.module, self.names = module, names

    def execute(self, values):
        call: dict[str, Any] = {}
        for name, value in zip(self.names, values, strict=True):
            *path, last = name.split(".")
            place = call
            for key in path:
                place = place.setdefault(key, {})
            place[last] = value
        with torch.no_grad():
            return pytree.tree_leaves(self.module(**call))


class EagerRunner(PipelineRunner):
    """The runner over parts instead of programs."""

    models: dict[str, Any]

    def _load(self, entry):
        names = [spec["name"] for spec in entry["inputs"]]
        return _EagerMethod(self.models[entry["file"]], names)


def eager_export(pipeline, output, monkeypatch, config=None, **options):
    """Export with the stand-in; return the result and its runner."""
    models: dict[str, Any] = {}
    monkeypatch.setattr("mpqdm_fx.pipelines.export.write_program", eager_writer(models))
    result = export_pipeline(pipeline, config, output, **options)
    runner = EagerRunner(output)
    runner.models = models
    return result, runner
