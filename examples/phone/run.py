"""Build `denoise.cpp` against the installed ExecuTorch and check it against diffusers.

    mpqdm-fx quantize digits --output out
    python examples/phone/run.py out --label 3

It links the libraries of the wheel, which need no Python; on a phone, link ExecuTorch's own
libraries instead (docs/mobile.md). Needs g++.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import executorch
import numpy as np
import torch

from mpqdm_fx.model.folder import open_folder
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.sources.denoisers import PROGRAM, draw, open_denoiser, program_names

HERE = Path(__file__).parent
#: Of the wheel. Kernels and delegate register themselves, so they are linked unasked.
LIBRARIES = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
)


def build(target: Path) -> Path:
    """Compile the program; about ten seconds."""
    root = Path(next(iter(executorch.__path__)))
    include, libraries = root / "include", root / "lib"
    subprocess.run(
        [
            "g++", "-std=c++20", "-O2", str(HERE / "denoise.cpp"), "-o", str(target),
            f"-I{include}", f"-I{include}/executorch/runtime/core/portable_type/c10",
            "-DC10_USING_CUSTOM_GENERATED_MACROS",
            "-Wl,--no-as-needed", f"-L{libraries}", *(f"-l{name}" for name in LIBRARIES),
            f"-Wl,-rpath,{libraries}",
        ],
        check=True,
    )  # fmt: skip
    return target


def schedule_of(scheduler: object, steps: int) -> str:
    """A DDIM schedule as the program reads it."""
    scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
    times = [int(time) for time in scheduler.timesteps]  # type: ignore[attr-defined]
    alphas = [float(scheduler.alphas_cumprod[time]) for time in times]  # type: ignore[attr-defined]
    after = [*alphas[1:], float(scheduler.final_alpha_cumprod)]  # type: ignore[attr-defined]
    config = scheduler.config  # type: ignore[attr-defined]
    lines = [str(config.clip_sample_range if config.clip_sample else 0)]
    lines += [f"{t} {a:.9g} {b:.9g}" for t, a, b in zip(times, alphas, after, strict=True)]
    return "\n".join(lines)


def main() -> None:
    """Draw one digit twice and print how far the two are apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="written by `quantize` with --backend xnnpack")
    parser.add_argument("--label", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if program_names(open_folder(arguments.folder)) != (PROGRAM,):
        sys.exit(
            f"{arguments.folder} has no {PROGRAM} that is plain and whole: quantize without "
            f"--compress and --external-weights"
        )
    source, denoiser = open_denoiser(str(arguments.folder), None, "pte")
    noise = torch.randn(
        1, *source.sample_shape, generator=torch.Generator().manual_seed(arguments.seed)
    )

    def labelled(**inputs: object) -> object:
        return denoiser(**{**inputs, "class_labels": torch.tensor([arguments.label])})

    expected = draw(source, labelled, num=1, steps=arguments.steps, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        program = build(here / "denoise")
        (here / "schedule.txt").write_text(schedule_of(source.scheduler, arguments.steps))
        noise.numpy().tofile(here / "noise.f32")
        subprocess.run(
            [
                program, arguments.folder / PROGRAM, here / "schedule.txt", here / "noise.f32",
                str(arguments.label), here / "image.f32",
            ],
            check=True,
        )  # fmt: skip
        actual = np.fromfile(here / "image.f32", dtype=np.float32).reshape(expected.shape)
    # Sums in another precision move a number next to a tie to another int8 code now and then.
    close = sqnr_db(expected, torch.from_numpy(actual))
    print(f"C++ and diffusers are {close:.1f} dB apart")
    if close < 30:
        sys.exit(1)


if __name__ == "__main__":
    main()
