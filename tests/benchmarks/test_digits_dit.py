"""The DiT of digits that transformers are measured on: small, and it draws digits."""

import importlib

import pytest
from train_digits_dit import DitTrainer, TrainConfig

from mpqdm_fx.digits.assessment import sample_accuracies
from mpqdm_fx.digits.bundled import load_digits_classifier
from mpqdm_fx.digits.dataset import load_digits_split
from mpqdm_fx.sources.sources import load_source


def accuracy(count, steps):
    source = load_source(*importlib.import_module("quality").MODELS["dit"])
    return sample_accuracies(
        source.model,
        source.scheduler,
        load_digits_classifier(),
        seeds=(1001,),
        count=count,
        num_inference_steps=steps,
    )[0]


def test_it_draws_digits_of_the_classes_asked_for():
    assert accuracy(40, 10) >= 0.9


@pytest.mark.matrix
def test_the_whole_evaluation_is_that_of_the_log():
    assert accuracy(256, 20) == pytest.approx(0.988, abs=0.01)


def test_the_training_learns_and_repeats_itself():
    config = TrainConfig(steps=40, batch_size=8, layers=1, heads=2, warmup_steps=4)
    split = load_digits_split()

    def losses():
        trainer = DitTrainer(config, split)
        return [trainer.train_step() for _ in range(40)]

    first = losses()
    assert first == losses()
    assert sum(first[-10:]) < 0.8 * sum(first[:10])
