"""What a denoising step saves when the prompt's keys and values are computed once per image.

    python benchmarks/hoisting.py --directory hoisting      # programs are kept there and used again

1. Counts multiply-adds per step of Stable Diffusion's UNets, which are traced without weights.
2. Lowers a small text UNet (77 tokens, a prompt 2.4 times as wide as its channels, as Stable
   Diffusion 1.5 has it; random weights, batch 1) three ways and times a step: the whole graph;
   without the prompt (`encode_prompt` runs once); and with tables in the time branch's place as
   well. All forms run in one process on the same threads, interleaved: medians, and medians of the
   ratio to the whole graph within a round. Numbers go to `<directory>/result.json`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, fx

from mpqdm_fx import MPQConfig, quantize
from mpqdm_fx.backends.xnnpack.lower import lower_methods
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.records.activations import Activation
from mpqdm_fx.run.cost import multiply_adds
from mpqdm_fx.split.methods import split_methods
from mpqdm_fx.split.timestep_table import tabulate_timesteps

TOKENS = 77
SCHEDULE = tuple(range(951, 0, -50))
PROMPT = {"encode_prompt": ["encoder_hidden_states"]}
FORMS = ("whole", "prompt once", "prompt once, tables")

#: The UNets of Stable Diffusion 1.5 and 2.1, by their published configurations.
LARGE: Mapping[str, Mapping[str, Any]] = {
    "1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "2.1": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
}


def small() -> UNet2DConditionModel:
    """The network that is timed, seeded: one level, 128 channels."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(128,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=307,
        attention_head_dim=8,
    ).eval()


def inputs(width: int, side: int, *, device: str = "cpu") -> dict[str, Tensor]:
    """One call, batch 1."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, 4, side, side, generator=generator).to(device),
        "timestep": torch.full((1,), float(SCHEDULE[5]), device=device),
        "encoder_hidden_states": torch.randn(1, TOKENS, width, generator=generator).to(device),
    }


def counted(graph: fx.GraphModule) -> dict[str, Any]:
    """Multiply-adds per step before and after, and once per image."""
    methods = split_methods(graph, PROMPT)
    whole, step = multiply_adds(graph), multiply_adds(methods["denoise"])
    time_branch = split_methods(graph, {"time": ["timestep"]}).get("time")
    tables = multiply_adds(time_branch) if time_branch is not None else 0
    return {
        "whole": whole,
        "prompt once": step,
        "prompt once, tables": step - tables,
        "saved by the prompt": 1 - step / whole,
        "saved by both": 1 - (step - tables) / whole,
        "weights of the prompt": 1 - _weights(methods["denoise"]) / _weights(graph),
        "weights of the time": _weights(time_branch) / _weights(graph) if time_branch else 0.0,
    }


def _weights(graph: fx.GraphModule) -> int:
    return sum(parameter.numel() for parameter in graph.parameters())


def large(name: str, side: int) -> dict[str, Any]:
    """Counts of a UNet without weights."""
    config = LARGE[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=side, **config).eval()
    call = inputs(config["cross_attention_dim"], side, device="meta")
    return counted(trace(unet, call, dynamic_batch=False, verify=False))


def methods_of(form: str, graph: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The graphs of one form."""
    if form == "whole":
        return {"denoise": graph}
    return split_methods(tabulate_timesteps(graph, SCHEDULE) if "tables" in form else graph, PROMPT)


def build(
    form: str, graph: fx.GraphModule, ranges: Mapping[str, Activation], directory: Path
) -> dict[str, Any]:
    """Make a program, or take the one that is there."""
    path = directory / f"{form.replace(', ', '_').replace(' ', '_')}.pte"
    facts = path.with_suffix(".json")
    if not facts.exists():
        methods = methods_of(form, graph)
        layers = {name for method in methods.values() for name, _ in method.named_modules()}
        layer_ranges = {name: chosen for name, chosen in ranges.items() if name in layers}
        calls = dict.fromkeys(methods, call_of(form))
        programs = lower_methods(methods, calls, path, ranges=layer_ranges or None)
        content = {name: program.to_dict() for name, program in programs.items()}
        facts.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    read: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
    return {"path": path, "methods": read}


def call_of(form: str) -> dict[str, Tensor]:
    """What a form takes: with tables the step in the timestep's place."""
    call = inputs(307, 32)
    return {**call, "timestep": torch.tensor([5])} if "tables" in form else call


def opened(form: str, program: Mapping[str, Any]) -> Callable[[], Tensor]:
    """A step, with the prompt encoded beforehand."""
    values: dict[str, Any] = call_of(form)
    for method in ("encode_prompt", "denoise"):
        if method not in program["methods"]:
            continue
        facts = program["methods"][method]
        run = XnnpackRunner(program["path"], method)
        arguments = [values[spec["name"]] for spec in facts["inputs"]]
        if method == "encode_prompt":
            names = [spec["name"] for spec in facts["outputs"]]
            values.update(zip(names, run(*arguments), strict=True))
    return lambda: run(*arguments)[0]


def times(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Median milliseconds of each form and of its ratio to the first one, interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 2):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if index >= 2:
                taken[name].append(1e3 * (time.perf_counter() - start))
    first = taken[next(iter(steps))]
    return {
        name: {
            "ms": statistics.median(milliseconds),
            "ratio": statistics.median(a / b for a, b in zip(milliseconds, first, strict=True)),
        }
        for name, milliseconds in taken.items()
    }


def main() -> None:
    """Count, build, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("hoisting"))
    parser.add_argument("--mode", choices=("float", "static", "dynamic"), default="float")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--count-only", action="store_true")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"mode": arguments.mode, "multiply_adds": {}}
    for name, side in (("1.5", 64), ("1.5", 32), ("2.1", 96)):
        key = f"Stable Diffusion {name}, {8 * side}x{8 * side}"
        result["multiply_adds"][key] = large(name, side)
    unet, call = small(), inputs(307, 32)
    graph, ranges = normalized(unet, call, MPQConfig()), {}
    result["multiply_adds"]["small"] = counted(graph)
    for key, numbers in result["multiply_adds"].items():
        print(
            f"{key:<32} {numbers['whole'] / 1e9:9.3f} G a step; prompt once "
            f"-{numbers['saved by the prompt']:.2%}, with tables -{numbers['saved by both']:.2%}; "
            f"of the weights: prompt {numbers['weights of the prompt']:.2%}, "
            f"time {numbers['weights of the time']:.2%}"
        )
    if not arguments.count_only:
        if arguments.mode != "float":
            settings = MPQConfig(
                weight_bits=8, activation_mode=arguments.mode, allocation="uniform",
                levels="uniform", rounding="nearest", refinements=0, propagation=0.0, slowdown=1,
                judge=False,
            )  # fmt: skip
            quantized = quantize(unet, settings, [call, call])
            graph, ranges = quantized.rounded, quantized.ranges
        programs = {form: build(form, graph, ranges, arguments.directory) for form in FORMS}
        steps = {form: opened(form, program) for form, program in programs.items()}
        outputs = {form: step() for form, step in steps.items()}
        result["times"] = times(steps, arguments.rounds)
        for form, numbers in result["times"].items():
            numbers["bytes"] = programs[form]["path"].stat().st_size
            numbers["sqnr_db"] = sqnr_db(outputs[FORMS[0]], outputs[form])
            print(
                f"{form:<32} {numbers['ms']:7.2f} ms a step, {numbers['ratio']:.3f} of the whole; "
                f"{numbers['bytes']:,} bytes; {numbers['sqnr_db']:.0f} dB"
            )
    text = json.dumps(result, indent=1, default=str)
    (arguments.directory / "result.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
