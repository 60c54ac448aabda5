"""What an exported folder is compared with: its pipeline in float, by time and memory.

Both are run by the same runner, so that they differ by nothing but the programs.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpqdm_fx.backends.compressed import drop_expansions
from mpqdm_fx.graph.nested import tensor_leaves
from mpqdm_fx.io.memory import available_memory
from mpqdm_fx.pipelines.memory import part_peak
from mpqdm_fx.pipelines.part_inputs import PipelineInputs
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.pipelines.program_files import ProgramFiles
from mpqdm_fx.pipelines.recorded import ModuleParts
from mpqdm_fx.report.timing import time_per_step

__all__ = ["drop_expanded", "measure_parts"]

logger = logging.getLogger(__name__)

_ROUNDS = 5  # timed calls: a step of a large pipeline takes seconds


def measure_parts(
    folder: Path, inputs: PipelineInputs, *, root: Path | None
) -> dict[str, dict[str, Any]]:
    """Time and peak memory of every part, as a program and in float.

    Args:
        folder: An exported folder whose manifest is written.
        inputs: The pipeline, and how its parts are called.
        root: The pipeline's folder; None for one in memory, of which no peaks are measured. Nor are
            those of a float part that does not fit in memory.

    Returns:
        By part: `milliseconds` of one call and `peak_memory_bytes` of loading it and of one call,
        both of `"program"` and `"float"`, and `"once"` the milliseconds of what the denoiser
        computes once per image.
    """
    programs = ProgramFiles(folder)
    costs = {}
    for part in inputs.layout.parts.values():
        logger.info("measuring %s", part.name)
        example = inputs.example(part.name, inputs.size)
        if part.stepped and programs.manifest["timesteps"] is not None:
            row = inputs.layout.convention.timestep
            example = {**example, row: torch.zeros(1, dtype=torch.int64)}
        costs[part.name] = {
            "milliseconds": _milliseconds(programs, part, inputs, example),
            "peak_memory_bytes": {
                "program": part_peak("program", folder, part.name, example),
                "float": _float_peak(part, root, example),
            },
        }
    return costs


def _float_peak(part: Part, root: Path | None, example: Mapping[str, Any]) -> int | None:
    """Peak of the part as torch runs it, loaded whole; None where that does not fit in memory."""
    left = available_memory()
    if root is None or (left is not None and 6 * part.parameters > left):
        # float32, and half as much again: pages of files in half precision while they are read
        return None
    return part_peak("float", root, part.name, example)


def _milliseconds(
    programs: ProgramFiles, part: Part, inputs: PipelineInputs, example: Mapping[str, Any]
) -> dict[str, float]:
    tensors = dict(tensor_leaves(dict(example)))
    size = inputs.size if part.sized else None
    original = ModuleParts(inputs.layout, programs.manifest["timesteps"])
    times = {}
    if part.sized and programs.has(part.name, None):
        once = tensors
        tensors = {**tensors, **programs.run(part.name, None, once)}
        times = time_per_step(
            {"once": lambda: programs.run(part.name, None, once)}, {}, rounds=_ROUNDS
        )
    called = {
        "float": lambda: original.run(part.name, size, tensors),
        "program": lambda: programs.run(part.name, size, tensors),
    }
    return {**time_per_step(called, {}, rounds=_ROUNDS), **times}


def drop_expanded(folder: Path) -> None:
    """Remove what compressed programs were expanded to while they were run."""
    for path in sorted(folder.glob("*.xz")):
        drop_expansions(path)
