"""The small classifier that judges samples of the bundled model: classes and 64-d features."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from mpqdm_fx.digits.dataset import DigitsSplit, shift_randomly
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.progress import tracked

logger = logging.getLogger(__name__)

FEATURE_SIZE = 64


class DigitsClassifier(nn.Module):
    """Three convolutions, a 64-d feature layer and a linear head: about 94 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.embed = nn.Linear(64 * 4 * 4, FEATURE_SIZE)
        self.head = nn.Linear(FEATURE_SIZE, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return the features that distances are measured in.

        Args:
            images: float [N, 1, 16, 16] in [-1, 1].

        Returns:
            float [N, 64], before the last activation (so no feature is dead).
        """
        hidden = functional.relu(self.conv1(images))
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv3(hidden)), 2)
        embedding: Tensor = self.embed(hidden.flatten(1))
        return embedding

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, 10] of images float [N, 1, 16, 16] in [-1, 1]."""
        logits: Tensor = self.head(functional.relu(self.features(images)))
        return logits


@torch.no_grad()
def classify(classifier: nn.Module, images: Tensor) -> Tensor:
    """Return the most likely class, int64 [N], of each image."""
    logits: Tensor = classifier(images)
    return logits.argmax(1)


def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images, in 0..1, that the classifier gives their label."""
    return float((classify(classifier, images) == labels).float().mean())


def train_classifier(
    split: DigitsSplit, *, seed: int, epochs: int = 40, batch_size: int = 64
) -> DigitsClassifier:
    """Train a classifier on the training part of the split.

    Shifts of one pixel and weak noise (standard deviation drawn from 0..0.15) are the augmentation:
    the classifier is to judge generated images, which are never quite as clean as real ones.

    Args:
        split: the digits; the held-out part is not looked at.
        seed: of the initial weights, the order and the augmentation.
        epochs: passes over the training images.
        batch_size: images in a step.

    Returns:
        The trained classifier in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitsClassifier()
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(split.train_labels) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=epochs * steps_per_epoch
    )
    classifier.train()
    for _ in tracked(range(epochs), "training the classifier"):
        order = torch.randperm(len(split.train_labels), generator=generator)
        for step in range(steps_per_epoch):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            images = shift_randomly(split.train_images[chosen], generator)
            strength = 0.15 * torch.rand(len(chosen), 1, 1, 1, generator=generator)
            images = images + strength * torch.randn(images.shape, generator=generator)
            loss = functional.cross_entropy(
                classifier(images), split.train_labels[chosen], label_smoothing=0.05
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return classifier.eval()


def load_classifier(path: str | Path) -> DigitsClassifier:
    """Load a classifier from a safetensors file of its state dict.

    Args:
        path: the file; half-precision tensors are widened to float32.

    Returns:
        The classifier in eval mode, float32, without gradients.

    Raises:
        ArtifactError: the file is missing, damaged or of another network.
    """
    classifier = DigitsClassifier()
    try:
        state = load_file(str(path))
        classifier.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except Exception as error:
        raise ArtifactError(f"{path} is not a digits classifier: {error}") from error
    return classifier.eval().requires_grad_(False)
