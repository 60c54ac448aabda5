"""A whole pipeline of TinySD's size, beside the stock recipe that is on public record for it.

    python benchmarks/tiny_sd.py --directory tiny_sd
    python benchmarks/tiny_sd.py --directory try --narrower 4      # a quick try
    python benchmarks/tiny_sd.py --save sd-1.5     # only a folder for `mpqdm-fx export`, of SD 1.5

TinySD's networks (UNet 323 M parameters, CLIP ViT-L, Stable Diffusion's VAE), 512x512, with seeded
random weights: bytes, memory and time, no quality. The stock recipe is that of Arm's
tiny-sd-int8-xnnpack-executorch as it is described: the UNet by ExecuTorch's XNNPACKQuantizer,
dynamic int8 per channel, text encoder and VAE in float. Ours is `export_pipeline`. Each form is
made and run in processes of its own, and runs through the same loop. What is in the directory is
not made again.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from large_model import peak_gib
from machine import anonymous_bytes, hide_dot_products
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mpqdm_fx import MPQConfig, RunOptions, export_pipeline
from mpqdm_fx.pipelines.layout import layout_of
from mpqdm_fx.pipelines.runner import PipelineRunner

SIDE, STEPS, IMAGE_STEPS, TOKENS = 512, 4, 25, 77
STOCK = "stock"
#: Bits of the denoiser's weights, and what its programs call.
OURS: Mapping[str, tuple[int, str]] = {
    "W8-xnnpack": (8, "xnnpack"),
    "W4-own": (4, "lowbit"),
    "W3-own": (3, "lowbit"),
}


_TINY: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 1,
    "mid_block_type": None,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
_SD_1_5: Mapping[str, Any] = {"block_out_channels": (320, 640, 1280, 1280)}  # else defaults


def pipeline(
    directory: Path, narrower: int, shape: Mapping[str, Any] = _TINY
) -> StableDiffusionPipeline:
    """Networks of a UNet's shape, all widths divided, with a tokenizer of letters."""
    torch.manual_seed(0)
    widths = tuple(width // narrower for width in shape["block_out_channels"])
    unet = UNet(
        sample_size=SIDE // 8,
        **{**shape, "block_out_channels": widths},
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=32 if narrower == 1 else 8,
    ).eval()
    tokens = _tokenizer(directory / "tokens")
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=max(1, 12 // narrower),
        num_attention_heads=12, max_position_embeddings=TOKENS, vocab_size=49408,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(width // narrower for width in (128, 256, 512, 512)),
        layers_per_block=2,
        norm_num_groups=32 if narrower == 1 else 8,
        sample_size=SIDE,
    ).eval()
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text).eval(), tokenizer=tokens, unet=unet,
        scheduler=DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085,
                                              beta_end=0.012, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    names = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return CLIPTokenizer(*names, model_max_length=TOKENS)


class _Positional(nn.Module):
    """A part that is called without names, as stock export wants it."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *values: Tensor) -> Tensor:
        output = self.module(**dict(zip(self.names, values, strict=True)))
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        return result


def make_stock(directory: Path, narrower: int) -> dict[str, Any]:
    """The three programs of the public recipe."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    generator = torch.Generator().manual_seed(0)
    side = SIDE // 8
    latents = torch.randn(1, 4, side, side, generator=generator)
    calls = {
        "text_encoder": {"input_ids": torch.randint(50, (1, TOKENS), generator=generator)},
        "denoiser": {
            "sample": latents,
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, TOKENS, 768, generator=generator),
        },
        "vae_decoder": {"latents": latents},
    }
    facts: dict[str, Any] = {}
    for name, part in layout_of(pipeline(directory, narrower)).parts.items():
        names, values = tuple(calls[name]), tuple(calls[name].values())
        exported = torch.export.export(_Positional(part.module, names), values)
        if name == "denoiser":
            config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
            prepared = prepare_pt2e(exported.module(), XNNPACKQuantizer().set_global(config))
            prepared(*values)
            exported = torch.export.export(convert_pt2e(prepared), values)
        partitioners = [XnnpackPartitioner()]
        if name == "denoiser":
            # by itself it ends with "Invalid partition, found dependency cycles" here
            partitioners.insert(0, XnnpackDynamicallyQuantizedPartitioner())
        program = to_edge_transform_and_lower(exported, partitioner=partitioners).to_executorch()
        path = directory / f"{name}.pte"
        with path.open("wb") as file:
            program.write_to_file(file)
        facts[name] = path.stat().st_size
        print(f"{STOCK}: {name} {facts[name] / 1e6:.0f} MB", flush=True)
    return {"bytes": sum(facts.values()), "part_bytes": facts}


def make_ours(form: str, directory: Path, narrower: int) -> dict[str, Any]:
    """The whole pipeline by `export_pipeline`, nearest rounding."""
    bits, backend = OURS[form]
    settings = MPQConfig(
        weight_bits=bits, activation_mode="dynamic", allocation="uniform", levels="uniform",
        rounding="nearest", refinements=0, propagation=0.0, bias_correction=False, slowdown=1,
        judge=False,
        row_weights="plain",
    )  # fmt: skip
    result = export_pipeline(
        pipeline(directory.parent, narrower), settings, directory, steps=STEPS, trajectories=2,
        prompts=("a cat", "a dog"), batch_size=1, minimum_sqnr_db=-300.0, backend=backend,
        kernels="memory" if backend == "lowbit" else "auto", samples=0, measure=False,
        run=RunOptions(resume=True), overwrite=True,
    )  # fmt: skip
    parts = {name: part["bytes"] for name, part in result.summary["parts"].items()}
    return {"bytes": sum(parts.values()), "part_bytes": parts}


class StockParts:
    """The stock programs, run as an exported folder's are."""

    names: Mapping[str, tuple[tuple[str, ...], str]] = {
        "text_encoder": (("input_ids",), "encoder_hidden_states"),
        "denoiser": (("sample", "timestep", "encoder_hidden_states"), "noise_pred"),
        "vae_decoder": (("latents",), "image"),
    }

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._methods: dict[str, Any] = {}

    def has(self, part: str, size: tuple[int, int] | None = None) -> bool:
        """Every part is there, once."""
        return part in self.names and (part == "text_encoder") == (size is None)

    def run(self, part: str, size: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a part."""
        from executorch.runtime import Runtime

        if part not in self._methods:
            program = Runtime.get().load_program(self._directory / f"{part}.pte")
            self._methods[part] = program.load_method("forward")
        taken, output = self.names[part]
        return {output: self._methods[part].execute([inputs[name] for name in taken])[0]}


class _Timed:
    """Parts that note how long each call takes."""

    def __init__(self, parts: Any) -> None:
        self._parts = parts
        self.seconds: dict[str, list[float]] = {}

    def has(self, part: str, size: tuple[int, int] | None = None) -> bool:
        """As of the parts."""
        there: bool = self._parts.has(part, size)
        return there

    def run(self, part: str, size: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As of the parts."""
        start = time.perf_counter()
        outputs: dict[str, Tensor] = self._parts.run(part, size, inputs)
        name = part if size is not None or part == "text_encoder" else f"{part} once"
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return outputs


def run_form(form: str, directory: Path, threads: int, instructions: str) -> dict[str, Any]:
    """Draw a picture of a few steps; this process's peak is that of loading and drawing."""
    if instructions == "avx2":
        hide_dot_products()
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    folder = directory / (form if form in OURS else next(iter(made(directory))))
    runner = PipelineRunner(folder)
    parts = _Timed(StockParts(directory / STOCK) if form == STOCK else runner.programs)
    request = runner.request("a cat", steps=STEPS, guidance=7.5)
    runner.scheduler()  # what is imported for it is no part's
    idle, anonymous = peak_gib(), anonymous_bytes()
    runner.draw(request, parts)
    medians = {name: statistics.median(taken[1:] or taken) for name, taken in parts.seconds.items()}
    per_image = {"text_encoder": 2, "denoiser once": 2, "denoiser": 2 * IMAGE_STEPS}
    return {
        "seconds": medians,
        "step_seconds": 2 * medians["denoiser"],
        "image_seconds": sum(per_image.get(n, 1) * taken for n, taken in medians.items()),
        "peak_gib": peak_gib() - idle,
        "anonymous_gib": (anonymous_bytes() - anonymous) / 2**30,
        "threads": threads,
        "instructions": instructions,
    }


def made(directory: Path) -> list[str]:
    """Forms of ours that are in the directory."""
    return [form for form in OURS if (directory / form / "pipeline.json").is_file()]


def main() -> None:
    """Make and run what is missing, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path)
    parser.add_argument(
        "--save", type=Path, help="write a float folder with SD 1.5's UNet, no more"
    )
    parser.add_argument("--forms", nargs="+", default=[*OURS, STOCK], choices=[*OURS, STOCK])
    parser.add_argument("--narrower", type=int, default=1, help="divide all widths, to try it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--instructions", choices=["all", "avx2"], default="all")
    parser.add_argument("--task", choices=["make", "run"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(options.threads)
    if options.save is not None:
        pipeline(options.save, options.narrower, _SD_1_5).save_pretrained(options.save)
        return
    if options.directory is None:
        parser.error("give --directory or --save")
    options.directory.mkdir(parents=True, exist_ok=True)
    suffix = f"{options.threads}.{options.instructions}.json"
    files = {"make": "make.json", "run": f"run.{suffix}"}
    for task in ("make", "run"):
        for form in options.forms:
            path = options.directory / f"{form}.{files[task]}"
            if options.task is None and not path.exists():
                again = [sys.executable, *sys.argv, "--task", task, "--forms", form]
                subprocess.run(again, check=True)
            elif options.task == task:
                path.write_text(json.dumps(_do(task, form, options), indent=1), encoding="utf-8")
    if options.task is None:
        rows = rows_of(options.directory)
        (options.directory / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(table(rows))


def _do(task: str, form: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own does, with its time."""
    start = time.perf_counter()
    directory: Path = options.directory
    if task == "run":
        return run_form(form, directory, options.threads, options.instructions)
    if form == STOCK:
        (directory / STOCK).mkdir(exist_ok=True)
        facts = make_stock(directory / STOCK, options.narrower)
    else:
        facts = make_ours(form, directory / form, options.narrower)
    return {**facts, "seconds": time.perf_counter() - start, "peak_gib": peak_gib()}


def rows_of(directory: Path) -> dict[str, Any]:
    """What was made and run in a directory, by `FORM, THREADS threads, INSTRUCTIONS`."""
    rows: dict[str, Any] = {}
    for path in sorted(directory.glob("*.run.*.json")):
        form, _, threads, instructions, _ = path.name.split(".")
        made_of = json.loads((directory / f"{form}.make.json").read_text())
        ran = json.loads(path.read_text())
        key = f"{form}, {threads} threads, {instructions}"
        rows[key] = {**ran, "bytes": made_of["bytes"], "made_seconds": made_of["seconds"]}
    return rows


def table(rows: Mapping[str, Any]) -> str:
    """The rows, as Markdown."""
    headings = (
        "instructions", "threads", "form", "MB", "peak GiB", "anonymous GiB", "s a step",
        "s an image",
    )  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    order = sorted(rows.items(), key=lambda pair: (pair[1]["instructions"], pair[1]["threads"]))
    for key, row in order:
        lines.append(
            f"| {row['instructions']} | {row['threads']} | {key.partition(',')[0]} | "
            f"{row['bytes'] / 1e6:.0f} | {row['peak_gib']:.2f} | {row['anonymous_gib']:.2f} | "
            f"{row['step_seconds']:.2f} | {row['image_seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
