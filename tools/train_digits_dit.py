"""Train a small DiT of the digits: `python tools/train_digits_dit.py --output FOLDER`.

A diffusers `DiTTransformer2DModel` (Peebles and Xie 2023) with classes, trained by flow matching
(Lipman et al. 2023; Liu et al. 2023): a straight line leads from a digit to noise, and the network
predicts the velocity along it. Layers that open a residual branch start at zero (adaLN-Zero). The
folder has diffusers' form, `transformer/` in half precision and `scheduler/`, and a log.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn import functional

from mpqdm_fx.digits.assessment import draw_samples, measure_memorisation, sample_accuracies
from mpqdm_fx.digits.bundled import load_digits_classifier
from mpqdm_fx.digits.dataset import (
    IMAGE_SIZE,
    NUM_CLASSES,
    DigitsSplit,
    load_digits_split,
    shift_randomly,
)
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.progress import stage
from mpqdm_fx.records.validation import Count, Positive, Seed, Share, Some, check_fields

logger = logging.getLogger(__name__)

TRAIN_TIMESTEPS = 1000
LOG_NAME = "training_log.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run; two runs with equal settings give equal weights on one machine.

    Attributes:
        seed: of the initial weights and of every draw of the training.
        steps: optimizer steps; the learning rate reaches zero there.
        batch_size: images in a step.
        learning_rate: its peak, after the warm-up.
        warmup_steps: steps of linear rise.
        ema_decay: largest decay of the moving average of the weights.
        evaluate_every: steps between evaluations of the averaged weights.
        evaluate_samples: samples in an evaluation, of each noise seed.
        evaluate_seeds: noise seeds of the evaluation at the end.
        layers: transformer blocks.
        heads: attention heads of `head_width` channels each.
        head_width: channels of a head.
        patch: side of the square of pixels that becomes a token.
    """

    seed: Seed = 0
    steps: Count = 4500
    batch_size: Count = 32
    learning_rate: Positive = 2e-3
    warmup_steps: Some = 200
    ema_decay: Share = 0.999
    evaluate_every: Count = 1000
    evaluate_samples: Count = 256
    evaluate_seeds: tuple[Seed, ...] = (1001, 1002, 1003)
    layers: Count = 4
    heads: Count = 6
    head_width: Count = 16
    patch: Count = 2

    def __post_init__(self) -> None:
        check_fields(self)


def build_dit(config: TrainConfig) -> DiTTransformer2DModel:
    """Build the untrained network; every block starts as the identity."""
    model = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_width,
        in_channels=1,
        out_channels=1,
        num_layers=config.layers,
        sample_size=IMAGE_SIZE,
        patch_size=config.patch,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler: 1000 training timesteps, no shift, for pictures are small."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=1.0)


class DitTrainer:
    """The state of a training run: weights, optimizer, average, random numbers.

    Args:
        config: the settings.
        split: the digits.
    """

    def __init__(self, config: TrainConfig, split: DigitsSplit) -> None:
        self.config = config
        self.split = split
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        torch.manual_seed(config.seed)  # initial weights, and the labels that training drops
        self.model = build_dit(config).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.ema = EMAModel(
            self.model.parameters(),
            decay=config.ema_decay,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
        )
        self.step = 0

    def learning_rate(self) -> float:
        """Return the learning rate of the coming step: linear rise, then a cosine to zero."""
        config = self.config
        if self.step < config.warmup_steps:
            return config.learning_rate * (self.step + 1) / config.warmup_steps
        span = max(1, config.steps - config.warmup_steps)
        return (
            config.learning_rate
            * 0.5
            * (1 + math.cos(math.pi * (self.step - config.warmup_steps) / span))
        )

    def train_step(self) -> float:
        """Take one optimizer step on one batch and return its loss (mean squared error)."""
        count = self.config.batch_size
        chosen = torch.randint(0, len(self.split.train_labels), (count,), generator=self.generator)
        images = shift_randomly(self.split.train_images[chosen], self.generator)
        # one offset and equal spacing: each batch covers all noise levels, so losses vary less
        offset = torch.rand((), generator=self.generator)
        share = (torch.arange(count) / count + offset) % 1.0
        noise = torch.randn(images.shape, generator=self.generator)
        noisy = torch.lerp(images, noise, share[:, None, None, None])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        predicted = self.model(
            noisy,
            timestep=share * TRAIN_TIMESTEPS,
            class_labels=self.split.train_labels[chosen],
            return_dict=False,
        )[0]
        loss = functional.mse_loss(predicted, noise - images)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        self.step += 1
        return loss.item()

    def averaged_model(self) -> DiTTransformer2DModel:
        """Return a copy of the network with the averaged weights, in eval mode."""
        model = build_dit(self.config)
        self.ema.copy_to(model.parameters())
        return model.eval().requires_grad_(False)


def train(config: TrainConfig, output: Path) -> dict[str, Any]:
    """Train the denoiser and leave it in a folder, in half precision, with a log.

    Args:
        config: the settings.
        output: folder for `transformer/`, `scheduler/` and `training_log.json`.

    Returns:
        What `training_log.json` holds; its accuracies are those of the weights as stored.
    """
    split, classifier, scheduler = load_digits_split(), load_digits_classifier(), build_scheduler()
    trainer = DitTrainer(config, split)
    training = stage("training the denoiser", config.steps)
    started, losses, evaluations = time.monotonic(), [0.0], []
    for _ in range(config.steps):
        losses = [*losses[-199:], trainer.train_step()]
        training(note=f"loss {losses[-1]:.4f}")
        if trainer.step % config.evaluate_every == 0 or trainer.step == config.steps:
            record = {
                "step": trainer.step,
                "wall_seconds": round(time.monotonic() - started, 1),
                "loss_mean_of_last_200": sum(losses) / len(losses),
                "accuracy_euler20": sample_accuracies(
                    trainer.averaged_model(),
                    scheduler,
                    classifier,
                    seeds=(2001,),
                    count=config.evaluate_samples,
                )[0],
            }
            evaluations.append(record)
            logger.info("%s", record)
    training.close()
    model = trainer.averaged_model().half()
    model.save_pretrained(output / "transformer")
    scheduler.save_pretrained(output / "scheduler")
    stored = model.float()
    samples = draw_samples(
        stored, scheduler, count=config.evaluate_samples, seed=config.evaluate_seeds[0]
    )
    accuracies = sample_accuracies(
        stored,
        scheduler,
        classifier,
        seeds=config.evaluate_seeds,
        count=config.evaluate_samples,
    )
    log = {
        "config": dataclasses.asdict(config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": "scikit-learn load_digits, 1797 images 8x8 -> 16x16 bilinear, one-pixel shifts",
        "train_images": len(split.train_labels),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "evaluations": evaluations,
        "accuracy_euler20_seeds": dict(
            zip(map(str, config.evaluate_seeds), accuracies, strict=True)
        ),
        "memorisation": dataclasses.asdict(measure_memorisation(samples, split)),
    }
    write_text(output / LOG_NAME, json.dumps(log, indent=2) + "\n")
    return log


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the training from the command line."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(description="Train a small DiT of the digits.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    settings = vars(parser.parse_args(arguments))
    output = settings.pop("output")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    log = train(TrainConfig(**settings), output)
    logger.info("accuracy %s, memorisation %s", log["accuracy_euler20_seeds"], log["memorisation"])


if __name__ == "__main__":
    main()
