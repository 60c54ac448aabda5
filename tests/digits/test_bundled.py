import json

import pytest
import torch

from mpqdm_fx.digits.assessment import (
    balanced_labels,
    draw_samples,
    measure_memorisation,
    sample_accuracies,
)
from mpqdm_fx.digits.bundled import (
    digits_folder,
    held_out_digits,
    load_digits_classifier,
    load_digits_scheduler,
    load_digits_unet,
)
from mpqdm_fx.digits.classifier import accuracy, load_classifier
from mpqdm_fx.digits.dataset import load_digits_split
from mpqdm_fx.errors import ArtifactError


@pytest.fixture(scope="module")
def unet():
    return load_digits_unet()


@pytest.mark.matrix
def test_samples_show_the_class_asked_for_at_least_95_percent_of_the_time(unet):
    (share,) = sample_accuracies(
        unet, load_digits_scheduler(), load_digits_classifier(), seeds=(77,), count=256
    )
    assert share >= 0.95


def test_classifier_is_right_on_at_least_98_5_percent_of_held_out_digits():
    images, labels = held_out_digits()
    assert accuracy(load_digits_classifier(), images, labels) >= 0.985


def test_unet_is_the_float32_network_of_the_log(unet):
    log = json.loads((digits_folder() / "training_log.json").read_text())
    assert unet.dtype == torch.float32
    assert not unet.training
    assert sum(parameter.numel() for parameter in unet.parameters()) == log["parameters"]
    assert 1.7e6 < log["parameters"] < 1.8e6


def test_log_tells_steps_accuracy_and_memorisation():
    log = json.loads((digits_folder() / "training_log.json").read_text())
    assert log["step"] == log["config"]["steps"]
    assert len(log["accuracy_ddim20_seeds"]) == 3
    assert min(log["accuracy_ddim20_seeds"].values()) >= 0.95
    assert log["held_out_images"] == 360
    assert log["memorisation"]["samples"] > 0


def test_all_files_together_are_under_8_megabytes():
    assert sum(path.stat().st_size for path in digits_folder().rglob("*")) < 8e6


def test_samples_are_no_copies_of_training_images(unet):
    samples = draw_samples(unet, load_digits_scheduler(), count=40, seed=78)
    distances = measure_memorisation(samples, load_digits_split())
    assert distances.ratio > 0.5


def test_training_images_themselves_would_be_reported_as_copies():
    split = load_digits_split()
    distances = measure_memorisation(split.train_images[:40], split)
    assert distances.samples == pytest.approx(0.0, abs=1e-2)
    assert distances.held_out > 1.0


def test_samples_are_determined_by_the_seed(unet):
    scheduler = load_digits_scheduler()
    first, again, reseeded = (
        draw_samples(unet, scheduler, count=10, seed=seed, num_inference_steps=2)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, reseeded)


def test_balanced_labels_give_each_class_its_turn():
    assert balanced_labels(30).bincount().tolist() == [3] * 10


def test_damaged_classifier_file_is_an_artifact_error(tmp_path):
    whole = (digits_folder() / "classifier.safetensors").read_bytes()
    damaged = tmp_path / "classifier.safetensors"
    damaged.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="is not a digits classifier"):
        load_classifier(damaged)
