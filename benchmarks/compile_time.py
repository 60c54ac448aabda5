"""CPU seconds of quantizing a model, stage by stage; two checkouts side by side.

    python benchmarks/compile_time.py digits captions unet unet4 terrain
    python benchmarks/compile_time.py digits --against ../before        # another checkout
    python benchmarks/compile_time.py --own terrain.py:terrain          # a model of one's own

Each model is quantized in a process of its own on one thread, first by the other checkout, then by
this one, in the same run. Seconds are CPU seconds of the process, so a busy machine changes little.
Stages are measured from outside, by wrapping functions of the package; what a stage calls that is
a stage of its own does not count twice. `same integers` compares codes, scales, biases and ranges.

The function of `--own` takes nothing and returns the model, its calls (keyword arguments; the last
quarter is held out) and a dict of settings.
"""

import argparse
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import large_model
import terrain_model
import torch
from diffusers import UNet2DConditionModel
from torch import nn

STAGES: Mapping[str, Sequence[str]] = {
    "trace": ["prepare"],
    "sensitivities: gradients": ["output_energies"],
    "sensitivities: feedback": ["feedback_gains"],
    "sensitivities: rounding errors": ["channel_errors"],
    "sensitivities: other": ["measure_sensitivity"],
    "bits": ["solve_budget"],
    "ranges": ["search_static", "search_by_noise_level"],
    "execution": ["Walk.__next__"],
    "solving: rows": ["collect_rows"],
    "solving: statistics": ["Gram.of"],
    "solving: corrections": ["choose_correction", "fixed_correction"],
    "solving: levels": ["RowLevels.fit"],
    "solving: rounding": ["gptq"],
    "solving: refinement": ["refine"],
    "solving: other": ["solve_layer"],
    "sweep: other": ["convert"],
    "storing": ["save"],
}
"""What is measured: stage -> functions and methods, wherever in the package they are."""

Case = tuple[nn.Module, Sequence[Mapping[str, Any]], dict[str, Any]]
"""A model, its calls, and the settings it is quantized with."""


def home_of(name: str) -> ModuleType:
    """The module of the package that defines a function or a class; checkouts differ in it."""
    package = Path(importlib.import_module("mpqdm_fx").__path__[0])
    defined = re.compile(rf"^(?:def|class) {name}\b", re.MULTILINE)
    files = [path for path in package.rglob("*.py") if defined.search(path.read_text("utf-8"))]
    if len(files) != 1:
        raise SystemExit(f"{package} defines {name} {len(files)} times; one is measured here")
    parts = files[0].relative_to(package.parent).with_suffix("").parts
    return importlib.import_module(".".join(parts))


class Stopwatch:
    """CPU seconds by stage, each second in the innermost stage that is running."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def wrap(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        return timed

    def install(self) -> None:
        """Wrap everything of `STAGES`, wherever the package has imported it."""
        for stage, names in STAGES.items():
            for name in names:
                *classes, attribute = name.split(".")
                owner: Any = home_of(name.partition(".")[0])
                for class_name in classes:
                    owner = getattr(owner, class_name)
                function = vars(owner)[attribute]
                if isinstance(function, classmethod):
                    setattr(owner, attribute, classmethod(self.wrap(function.__func__, stage)))
                    continue
                timed = self.wrap(function, stage)
                setattr(owner, attribute, timed)
                for module_name, module in list(sys.modules.items()):
                    if (
                        module_name.startswith("mpqdm_fx")
                        and vars(module).get(attribute) is function
                    ):
                        setattr(module, attribute, timed)


def digits() -> Case:
    """The bundled model at its defaults."""
    source = home_of("load_source").load_source("digits")
    calibration_of = home_of("calibration_of").calibration_of
    return source.model, list(calibration_of(source, trajectories=16, steps=20, seed=0)), {}


def captions() -> Case:
    """A text-conditioned UNet of 2.1 M parameters, 320 samples of 16x16, W2A4 with static ranges.

    Its weights are random: they say nothing about quality, and time does not depend on them.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    generator = torch.Generator().manual_seed(0)
    calls = [
        {
            "sample": torch.randn(32, 3, 16, 16, generator=generator),
            "timestep": torch.randint(1, 1000, (32,), generator=generator),
            "encoder_hidden_states": torch.randn(32, 5, 32, generator=generator),
        }
        for _ in range(10)
    ]
    settings = {"weight_bits": 2, "activation_bits": 4, "activation_mode": "static"}
    return unet.eval(), calls, settings


def unet() -> Case:
    """Stable Diffusion 1.5's UNet, eight times narrower, on 8 inputs of 64x64."""
    return large_model.model(8), large_model.calls(), {}


def unet4() -> Case:
    """The same, four times narrower: less of its time is attention, which has no weights."""
    return large_model.model(4), large_model.calls(), {}


def terrain() -> Case:
    """The model that nobody here trained, on 20 calls of two rows, W4A8 dynamic."""
    network = terrain_model.load_terrain()
    settings = {"weight_bits": 4, "activation_mode": "dynamic"}
    return network, terrain_model.calls_along(network, 4, 0), settings


MODELS: Mapping[str, Callable[[], Case]] = {
    "digits": digits,
    "captions": captions,
    "unet": unet,
    "unet4": unet4,
    "terrain": terrain,
}


def own_model(place: str) -> Case:
    """What a function of a file returns, given as FILE.py:FUNCTION."""
    file, _, function = place.rpartition(":")
    spec = importlib.util.spec_from_file_location("own_model", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case: Case = getattr(module, function)()
    return case


def measure(case: Callable[[], Case]) -> dict[str, Any]:
    """Quantize one model in this process, and store it."""
    from mpqdm_fx import MPQConfig

    api, storage, sampling, metrics = map(home_of, ("prepare", "save", "first_tensor", "sqnr_db"))

    model, calls, settings = case()
    watch = Stopwatch()
    watch.install()
    start = time.process_time()
    prepared = api.prepare(model, MPQConfig(**settings), calls[0])
    for index, call in enumerate(calls):
        if index < len(calls) - len(calls) // 4:
            prepared.record(**call)
        else:
            with prepared.held_out():
                prepared.record(**call)
    quantized = api.convert(prepared)
    with tempfile.TemporaryDirectory() as folder:
        storage.save(quantized, Path(folder) / "model")
    total = time.process_time() - start
    with torch.no_grad():
        answers = [sampling.first_tensor(net(**calls[-1])) for net in (model, quantized)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {stage: watch.seconds[stage] for stage in STAGES},
        "total": total,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "db": metrics.sqnr_db(*answers),
        "integers": _digest(quantized),
    }


def _digest(quantized: Any) -> str:
    """Of all weights, codes, scales and biases, and of the ranges of activations."""
    digest = hashlib.sha256()
    for name, tensor in sorted(quantized.rounded.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    digest.update(repr(sorted(quantized.ranges.items())).encode())
    return digest.hexdigest()


def run(arguments: Sequence[str], checkout: Path) -> dict[str, Any]:
    """`measure` in a process of its own that imports the package from a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, __file__, *arguments, "--worker", str(file)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True)
        numbers: dict[str, Any] = json.loads(file.read_text())
    return numbers


def table(name: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one row a stage; with two results, their ratio."""
    heads = ["before", "after", "ratio"] if len(results) == 2 else ["CPU seconds"]
    parameters = results[0]["parameters"] / 1e6
    lines = [
        f"| {name}, {parameters:.1f} M parameters | {' | '.join(heads)} |",
        "|---" + "|---:" * len(heads) + "|",
    ]

    def row(label: str, values: Iterable[float], places: int = 1) -> None:
        numbers = list(values)
        cells = [f"{value:.{places}f}" for value in numbers]
        if len(numbers) == 2:
            cells.append(f"{numbers[1] / numbers[0]:.2f}" if numbers[0] else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")

    for stage in STAGES:
        row(stage, (result["seconds"][stage] for result in results))
    row("**total**", (result["total"] for result in results))
    row("peak memory, GiB", (result["peak_gib"] for result in results), 2)
    row("output, dB", (result["db"] for result in results), 3)
    if len(results) == 2:
        same = results[0]["integers"] == results[1]["integers"]
        lines.append(f"| same integers | | | {'yes' if same else 'no'} |")
    return "\n".join(lines)


def main() -> None:
    """Quantize, print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=", ".join(MODELS))
    parser.add_argument("--own", help="FILE.py:FUNCTION that returns (model, calls, settings)")
    parser.add_argument("--against", type=Path, help="another checkout of the package")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    if arguments.worker:
        case = MODELS[arguments.models[0]] if arguments.models else own_model
        numbers = measure(case if arguments.models else functools.partial(case, arguments.own))
        arguments.worker.write_text(json.dumps(numbers))
        return
    checkouts = [Path(__file__).resolve().parents[1]]
    if arguments.against:
        checkouts.insert(0, arguments.against.resolve())
    cases = [(name, [name]) for name in arguments.models]
    if arguments.own:
        cases.append((arguments.own, ["--own", arguments.own]))
    if not cases or not set(arguments.models) <= set(MODELS):
        parser.error(f"give models ({', '.join(MODELS)}), or --own")
    for name, options in cases:
        print(table(name, [run(options, checkout) for checkout in checkouts]), flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
