"""Write what `draw_digits` reads: noise, labels and the steps of the bundled model's scheduler.

python write_inputs.py --labels 3 7 --steps 20 --output inputs.txt
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from mpqdm_fx.digits.bundled import load_digits_scheduler


def line(word: str, values: Iterable[float]) -> str:
    """A word and its numbers; nine digits give a float32 back exactly."""
    return " ".join([word, *(f"{value:.9g}" for value in values)])


def inputs_text(labels: list[int], steps: int, noise: torch.Tensor) -> str:
    """The lines of a run of DDIM.

    Args:
        labels: Digits to draw, 0 to 9.
        steps: Of the run.
        noise: float32 [len(labels), 1, H, W].
    """
    scheduler = load_digits_scheduler()
    scheduler.set_timesteps(steps)
    bound = [scheduler.config.clip_sample_range] if scheduler.config.clip_sample else []
    distance = scheduler.config.num_train_timesteps // steps
    lines = [line("clip", bound)] if bound else []
    lines += [line("labels", labels), line("noise", noise.flatten().tolist())]
    for time in map(int, scheduler.timesteps):
        after = time - distance
        next_alpha = (
            scheduler.alphas_cumprod[after] if after >= 0 else scheduler.final_alpha_cumprod
        )
        alphas = (float(scheduler.alphas_cumprod[time]), float(next_alpha))
        lines.append(line("step", (time, *alphas)))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=int, nargs="+", default=[3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    noise = torch.randn(len(arguments.labels), 1, 16, 16, generator=generator)
    arguments.output.write_text(inputs_text(arguments.labels, arguments.steps, noise))


if __name__ == "__main__":
    main()
