"""Turn a finished training run into the files the package ships: half precision, measured first.

`python tools/package_digits.py --trained DIR --target mpqdm_fx/digits/model`. What
rounding to float16 costs (noise prediction and class accuracy) is written into the log beside the
weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import nn
from train_digits import CLASSIFIER_NAME, LOG_NAME

from mpqdm_fx.calibration.trajectories import digits_trajectories
from mpqdm_fx.digits.assessment import sample_accuracies
from mpqdm_fx.digits.classifier import accuracy, load_classifier
from mpqdm_fx.digits.dataset import load_digits_split
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.numerics.metrics import sqnr_db

logger = logging.getLogger(__name__)

PRECISION_SEEDS = (3001, 3002, 3003)


def half_and_back(model: nn.Module) -> Any:
    """Return a float32 copy of a model whose weights went through float16."""
    return copy.deepcopy(model).half().float()


@torch.no_grad()
def measure_half_precision(
    model: UNet2DModel,
    rounded: UNet2DModel,
    scheduler: DDIMScheduler,
    classifier: nn.Module,
    *,
    count: int = 256,
) -> dict[str, Any]:
    """Compare a model with its half-precision rounding, both computing in float32.

    Returns:
        The epsilon-SQNR (decibels) on 320 inputs of the model's own trajectories, the lowest and
        the mean of ten batches, and the class accuracy of `count` samples for each of three noise
        seeds before and after.
    """
    batches = list(digits_trajectories(model, scheduler, seed=PRECISION_SEEDS[0]))
    ratios = [
        sqnr_db(model(**batch, return_dict=False)[0], rounded(**batch, return_dict=False)[0])
        for batch in batches
    ]
    accuracies = {
        name: sample_accuracies(net, scheduler, classifier, seeds=PRECISION_SEEDS, count=count)
        for name, net in (("float32", model), ("float16_weights", rounded))
    }
    return {
        "inputs": sum(len(batch["sample"]) for batch in batches),
        "epsilon_sqnr_db_lowest_of_batches": min(ratios),
        "epsilon_sqnr_db_mean_of_batches": sum(ratios) / len(ratios),
        "seeds": PRECISION_SEEDS,
        "accuracy": accuracies,
    }


def package_digits(trained: Path, target: Path, *, count: int = 256) -> dict[str, Any]:
    """Write the bundled model's folder from a training run's output.

    Args:
        trained: folder left by `train_digits`, finished.
        target: folder to make; one that exists is replaced as a whole, once the new one is
            complete.
        count: samples for each noise seed when the cost of half precision is measured.

    Returns:
        The log, with the entry `half_precision` added.

    Raises:
        ArtifactError: the run is not finished.
    """
    if not (trained / "unet" / "config.json").exists():
        raise ArtifactError(f"{trained} holds no finished training run; resume it with --resume")
    model = UNet2DModel.from_pretrained(trained / "unet").eval().requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(trained / "scheduler")
    classifier = load_classifier(trained / CLASSIFIER_NAME)
    rounded_classifier = half_and_back(classifier)
    split = load_digits_split()
    log: dict[str, Any] = json.loads((trained / LOG_NAME).read_text(encoding="utf-8"))
    log["half_precision"] = measure_half_precision(
        model, half_and_back(model), scheduler, rounded_classifier, count=count
    )
    log["half_precision"]["classifier_accuracy_held_out"] = accuracy(
        rounded_classifier, split.held_out_images, split.held_out_labels
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".digits-") as scratch:
        fresh = Path(scratch) / target.name
        model.half().save_pretrained(fresh / "unet")
        _forget_origin(fresh / "unet" / "config.json")
        scheduler.save_pretrained(fresh / "scheduler")
        state = {name: tensor.half() for name, tensor in classifier.state_dict().items()}
        save_file(state, fresh / CLASSIFIER_NAME)
        (fresh / LOG_NAME).write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
        for path in fresh.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            shutil.move(target, Path(scratch) / "old")
        shutil.move(fresh, target)
    return log


def _forget_origin(path: Path) -> None:
    """Take out of a diffusers config the path that the model was loaded from."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Package a training run from the command line."""
    parser = argparse.ArgumentParser(description="Package a trained digits model.")
    parser.add_argument("--trained", type=Path, required=True, help="output folder of the training")
    parser.add_argument("--target", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    log = package_digits(options.trained, options.target)
    logger.info("half precision: %s", log["half_precision"])


if __name__ == "__main__":
    main()
