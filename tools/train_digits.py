"""Train the bundled digits model and its classifier: `python tools/train_digits.py`.

First the classifier that judges samples, then the class-conditional denoiser: a diffusers
`UNet2DModel` that predicts the noise (DDPM, Ho et al. 2020, equation 14) on the squared-cosine
schedule (Nichol and Dhariwal 2021, equation 17), trained with AdamW, a cosine learning rate and an
exponential moving average of the weights. The run checkpoints itself; `--resume` continues it bit
for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.nn import functional

from mpqdm_fx.digits.assessment import draw_samples, measure_memorisation, sample_accuracies
from mpqdm_fx.digits.classifier import DigitsClassifier, accuracy, train_classifier
from mpqdm_fx.digits.dataset import (
    HELD_OUT_RULE,
    DigitsSplit,
    load_digits_split,
    shift_randomly,
)
from mpqdm_fx.digits.network import TRAIN_TIMESTEPS, build_scheduler, build_unet
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.files import replacing, write_text
from mpqdm_fx.io.progress import stage
from mpqdm_fx.records.validation import Count, Positive, Seed, Share, Some, check_fields

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "training_log.json"
CLASSIFIER_NAME = "classifier.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run; two runs with equal settings give equal weights on one machine.

    Attributes:
        seed: of the initial weights and of every draw of the training.
        steps: optimizer steps of the whole run; the learning rate reaches zero there.
        cosine_steps: length of the cosine that the learning rate follows; with more than `steps`
            the run ends before the cosine does, by way of the cooldown.
        cooldown_steps: last steps, over which the learning rate falls linearly to zero.
        batch_size: images in a step.
        learning_rate: its peak, after the warm-up.
        warmup_steps: steps of linear rise.
        ema_decay: largest decay of the moving average; it starts lower, as 1 - (1 + step)^-0.75.
        checkpoint_every: steps between checkpoints.
        evaluate_every: steps between evaluations of the averaged weights.
        evaluate_samples: samples in an evaluation, of each noise seed.
        evaluate_seeds: noise seeds of the evaluation at the end.
        block_channels: widths of the three levels of the network.
        classifier_epochs: passes of the classifier's training.
    """

    seed: Seed = 0
    steps: Count = 4500
    cosine_steps: Count = 6000
    cooldown_steps: Some = 1000
    batch_size: Count = 64
    learning_rate: Positive = 1.5e-3
    warmup_steps: Some = 200
    ema_decay: Share = 0.999
    checkpoint_every: Count = 250
    evaluate_every: Count = 500
    evaluate_samples: Count = 256
    evaluate_seeds: tuple[Seed, ...] = (1001, 1002, 1003)
    block_channels: tuple[Count, Count, Count] = (32, 64, 96)
    classifier_epochs: Count = 40

    def __post_init__(self) -> None:
        check_fields(self)


class DigitsTrainer:
    """The state of a training run: weights, optimizer, average, random numbers, log.

    Args:
        config: the settings.
        split: the digits.
        output: the folder of checkpoints and results.
    """

    def __init__(self, config: TrainConfig, split: DigitsSplit, output: Path) -> None:
        self.config = config
        self.split = split
        self.output = output
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build_unet(config.block_channels)
        self.scheduler = build_scheduler()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate)
        self.ema = EMAModel(
            self.model.parameters(),
            decay=config.ema_decay,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
        )
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        self.step = 0
        self.wall_seconds = 0.0
        self.recent_losses: list[float] = []
        self.evaluations: list[dict[str, float]] = []

    def learning_rate(self) -> float:
        """Return the learning rate of the coming step: linear rise, cosine, linear cooldown."""
        config = self.config
        if self.step < config.warmup_steps:
            return config.learning_rate * (self.step + 1) / config.warmup_steps
        span = max(1, config.cosine_steps - config.warmup_steps)
        progress = min(1.0, (self.step - config.warmup_steps) / span)
        cooldown = min(1.0, (config.steps - self.step) / max(1, config.cooldown_steps))
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress)) * cooldown

    def train_step(self) -> float:
        """Take one optimizer step on one batch and return its loss (mean squared error)."""
        count = self.config.batch_size
        chosen = torch.randint(0, len(self.split.train_labels), (count,), generator=self.generator)
        images = shift_randomly(self.split.train_images[chosen], self.generator)
        # one offset and equal spacing: each batch covers all noise levels, so losses vary less
        offset = torch.rand((), generator=self.generator)
        timesteps = ((torch.arange(count) / count + offset) % 1.0 * TRAIN_TIMESTEPS).long()
        noise = torch.randn(images.shape, generator=self.generator)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.model.train()
        predicted = self.model(
            noisy, timesteps, class_labels=self.split.train_labels[chosen], return_dict=False
        )[0]
        loss = functional.mse_loss(predicted, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        self.step += 1
        value = loss.item()
        self.recent_losses = [*self.recent_losses[-199:], value]
        return value

    def averaged_model(self) -> UNet2DModel:
        """Return a copy of the network with the averaged weights, in eval mode."""
        model = build_unet(self.config.block_channels)
        self.ema.copy_to(model.parameters())
        return model.eval().requires_grad_(False)

    def evaluate(self, classifier: DigitsClassifier) -> dict[str, float]:
        """Measure the averaged weights now, and note the result in the log."""
        record = {
            "step": self.step,
            "wall_seconds": round(self.wall_seconds, 1),
            "loss_mean_of_last_200": sum(self.recent_losses) / max(1, len(self.recent_losses)),
            "learning_rate": self.learning_rate(),
            "accuracy_ddim20": sample_accuracies(
                self.averaged_model(),
                self.scheduler,
                classifier,
                seeds=(2001,),
                count=self.config.evaluate_samples,
            )[0],
        }
        self.evaluations.append(record)
        return record

    def save_checkpoint(self) -> None:
        """Write all that the rest of the run depends on; the file is replaced in one move."""
        state = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "generator": self.generator.get_state(),
            "wall_seconds": self.wall_seconds,
            "recent_losses": self.recent_losses,
            "evaluations": self.evaluations,
        }
        with replacing(self.output / CHECKPOINT_NAME) as part:
            torch.save(state, part)

    def load_checkpoint(self) -> None:
        """Continue from the checkpoint in the output folder.

        Raises:
            ArtifactError: there is none, or it cannot be read.
            ConfigError: it belongs to a run with other settings; they are named.
        """
        path = self.output / CHECKPOINT_NAME
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise ArtifactError(f"cannot resume from {path}: {error}") from error
        fields = dataclasses.asdict(self.config)
        differing = sorted(name for name in fields if fields[name] != state["config"].get(name))
        if differing:
            raise ConfigError(f"{path} was written with other settings of {', '.join(differing)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]
        self.wall_seconds = state["wall_seconds"]
        self.recent_losses = state["recent_losses"]
        self.evaluations = state["evaluations"]


def write_json(path: Path, content: object) -> None:
    """Write JSON so that the file appears whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def prepare_classifier(
    config: TrainConfig, split: DigitsSplit, output: Path, resume: bool
) -> tuple[DigitsClassifier, dict[str, float]]:
    """Train the classifier, or with `resume` take the one already there; measure it either way."""
    path = output / CLASSIFIER_NAME
    if resume and path.exists():
        classifier = DigitsClassifier().eval()
        classifier.load_state_dict(load_file(path))
    else:
        classifier = train_classifier(split, seed=config.seed, epochs=config.classifier_epochs)
        with replacing(path) as part:
            save_file(classifier.state_dict(), part)
    facts = {
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "accuracy_held_out": accuracy(classifier, split.held_out_images, split.held_out_labels),
        "accuracy_train": accuracy(classifier, split.train_images, split.train_labels),
    }
    logger.info("classifier: %s", facts)
    return classifier.requires_grad_(False), facts


def describe_run(trainer: DigitsTrainer, classifier_facts: dict[str, float]) -> dict[str, Any]:
    """Return the facts of the run as they go into the training log."""
    return {
        "config": dataclasses.asdict(trainer.config),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "data": "scikit-learn load_digits, 1797 images 8x8 -> 16x16 bilinear, one-pixel shifts",
        "train_images": len(trainer.split.train_labels),
        "held_out_images": len(trainer.split.held_out_labels),
        "held_out_rule": HELD_OUT_RULE,
        "classifier": classifier_facts,
        "step": trainer.step,
        "wall_seconds": round(trainer.wall_seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "evaluations": trainer.evaluations,
    }


def train(config: TrainConfig, output: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train classifier and denoiser and leave both in a folder, with a log.

    Args:
        config: the settings.
        output: folder for `unet/`, `scheduler/`, `classifier.safetensors`, `training_log.json`,
            and the checkpoint.
        resume: continue from the checkpoint in `output`, bit for bit.

    Returns:
        What `training_log.json` holds.

    Raises:
        ConfigError: the checkpoint belongs to other settings.
        ArtifactError: there is nothing to resume from.
    """
    output.mkdir(parents=True, exist_ok=True)
    split = load_digits_split()
    classifier, classifier_facts = prepare_classifier(config, split, output, resume)
    trainer = DigitsTrainer(config, split, output)
    if resume:
        trainer.load_checkpoint()
    training = stage("training the denoiser", config.steps)
    training(trainer.step)
    started = time.monotonic() - trainer.wall_seconds
    while trainer.step < config.steps:
        loss = trainer.train_step()
        training(note=f"loss {loss:.4f}")
        trainer.wall_seconds = time.monotonic() - started
        last = trainer.step == config.steps
        if last or trainer.step % config.evaluate_every == 0:
            logger.info("%s", trainer.evaluate(classifier))
            write_json(output / LOG_NAME, describe_run(trainer, classifier_facts))
        if last or trainer.step % config.checkpoint_every == 0:
            trainer.save_checkpoint()
    training.close()
    return finish(trainer, classifier, classifier_facts)


def finish(
    trainer: DigitsTrainer, classifier: DigitsClassifier, classifier_facts: dict[str, float]
) -> dict[str, Any]:
    """Measure the trained model, save it in float32, and write the log."""
    model, seeds = trainer.averaged_model(), trainer.config.evaluate_seeds
    count = trainer.config.evaluate_samples
    samples = draw_samples(model, trainer.scheduler, count=count, seed=seeds[0])
    log = describe_run(trainer, classifier_facts)
    log["accuracy_ddim20_seeds"] = dict(
        zip(
            map(str, seeds),
            sample_accuracies(model, trainer.scheduler, classifier, seeds=seeds, count=count),
            strict=True,
        )
    )
    log["memorisation"] = dataclasses.asdict(measure_memorisation(samples, trainer.split))
    model.save_pretrained(trainer.output / "unet")
    trainer.scheduler.save_pretrained(trainer.output / "scheduler")
    write_json(trainer.output / LOG_NAME, log)
    return log


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the training from the command line."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(description="Train the bundled digits model.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--cosine-steps", type=int, default=defaults.cosine_steps)
    parser.add_argument("--cooldown-steps", type=int, default=defaults.cooldown_steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--checkpoint-every", type=int, default=defaults.checkpoint_every)
    parser.add_argument("--evaluate-every", type=int, default=defaults.evaluate_every)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    settings = vars(parser.parse_args(arguments))
    output, resume = settings.pop("output"), settings.pop("resume")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    log = train(TrainConfig(**settings), output, resume=resume)
    logger.info("accuracy %s, memorisation %s", log["accuracy_ddim20_seeds"], log["memorisation"])


if __name__ == "__main__":
    main()
