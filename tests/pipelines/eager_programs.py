"""Programs that are not lowered: parts and methods themselves, run by the runner's manifest."""

from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mpqdm_fx.backends.xnnpack.program import XnnpackProgram
from mpqdm_fx.backends.xnnpack.runner import TensorSpec, flat_inputs
from mpqdm_fx.pipelines.export import export_pipeline
from mpqdm_fx.pipelines.manifest import method_entry
from mpqdm_fx.pipelines.memory import nested
from mpqdm_fx.pipelines.program_files import ProgramFiles
from mpqdm_fx.pipelines.programs import PartMethod, WrittenMethod, method_name, part_methods
from mpqdm_fx.pipelines.runner import PipelineRunner

#: What these files cannot be drawn and measured with.
UNMEASURED = {"samples": 0, "measure": False}


def _specs(pairs):
    return tuple(
        TensorSpec(name=name, shape=tuple(value.shape), dtype=str(value.dtype).split(".")[-1])
        for name, value in pairs
    )


def _whole(part, examples):
    """A part that is not traced: quick, and the denoiser computes all of it in every step."""
    first = next(iter(examples))
    return {
        method_name("forward", size, first=size == first): PartMethod(
            graph=part.module, size=size, example=example, outputs=part.outputs
        )
        for size, example in examples.items()
    }


def eager_writer(models: dict[str, Any], *, split: bool = False):
    """A stand-in for `write_programs` that keeps the methods in `models` under their file's name.

    With `split` the denoiser is cut into the methods that are lowered elsewhere.
    """

    def write(part, quantized, examples, path: Path, *, timesteps=None, **_):
        if split and part.stepped:
            methods = part_methods(part, quantized, examples, timesteps=timesteps)
        else:
            methods = _whole(part, examples)
        models[path.name] = {name: method.graph for name, method in methods.items()}
        path.write_bytes(path.name.encode())
        entries, values = [], {}
        for name, method in methods.items():
            graph = method.graph
            call = {**method.example, **values}
            if isinstance(graph, torch.fx.GraphModule):
                nodes = graph.graph.find_nodes(op="placeholder")
                call = {node.target: call[node.target] for node in nodes}
            with torch.no_grad():
                output = graph(**call)
            named = type(output) is dict  # of a method, and no output of diffusers
            if named:
                values.update(output)
            results = output if named else enumerate(pytree.tree_leaves(output))
            program = XnnpackProgram(
                path=path,
                bytes=path.stat().st_size,
                subgraphs=1,
                delegated=1,
                undelegated=0,
                refusals={},
                inputs=_specs(flat_inputs(tuple(call.values()), list(call))),
                outputs=_specs((str(key), value) for key, value in dict(results).items()),
                output_scale=None,
                sqnr_db=100.0,
                max_lsb=None,
                reference_sqnr_db=None,
                float_layers={},
                seconds=0.0,
            )
            entry = method_entry(part.name, method.size, name, method.outputs, program.to_dict())
            entries.append(WrittenMethod(entry=entry, program=program))
        return entries

    return write


class _EagerMethod:
    def __init__(self, module, names):
        self.module, self.names = module, names

    def execute(self, values):
        call = nested(dict(zip(self.names, values, strict=True)))
        with torch.no_grad():
            return pytree.tree_leaves(self.module(**call))


class EagerPrograms(ProgramFiles):
    """The folder with graphs and parts in the place of programs, but of those that are lowered."""

    models: dict[str, Any]

    def _load(self, entry):
        if entry["file"] not in self.models:
            return super()._load(entry)
        names = [spec["name"] for spec in entry["inputs"]]
        return _EagerMethod(self.models[entry["file"]][entry["method"]], names)


class EagerRunner(PipelineRunner):
    """The runner over such a folder."""

    def __init__(self, folder, models):
        super().__init__(folder)
        self.programs = EagerPrograms(folder)
        self.models = self.programs.models = models


def eager_export(pipeline, output, monkeypatch, config=None, *, split=False, **options):
    """Export with the stand-in; return the result and its runner."""
    models: dict[str, Any] = {}
    monkeypatch.setattr(
        "mpqdm_fx.pipelines.export.write_programs", eager_writer(models, split=split)
    )
    options = {**UNMEASURED, **options}
    result = export_pipeline(pipeline, config, output, **options)
    return result, EagerRunner(output, models)
