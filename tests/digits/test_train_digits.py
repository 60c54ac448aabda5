import dataclasses
import json

import pytest
import torch
from package_digits import package_digits
from train_digits import DigitsTrainer, TrainConfig, train

from mpqdm_fx.digits.dataset import load_digits_split
from mpqdm_fx.digits.network import build_unet
from mpqdm_fx.errors import ArtifactError, ConfigError

TINY = TrainConfig(
    steps=6,
    cosine_steps=8,
    cooldown_steps=2,
    batch_size=4,
    warmup_steps=2,
    checkpoint_every=3,
    evaluate_every=6,
    evaluate_samples=10,
    evaluate_seeds=(1,),
    block_channels=(8, 16, 16),
    classifier_epochs=1,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(TINY, folder)


def run_steps(trainer, count):
    return [trainer.train_step() for _ in range(count)]


def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path):
    split = load_digits_split()
    whole = DigitsTrainer(TINY, split, tmp_path)
    first_losses = run_steps(whole, 3)
    whole.save_checkpoint()
    last_losses = run_steps(whole, 3)

    torch.manual_seed(12345)  # ambient randomness must not matter
    resumed = DigitsTrainer(TINY, split, tmp_path)
    resumed.load_checkpoint()
    assert resumed.recent_losses == first_losses
    assert run_steps(resumed, 3) == last_losses
    for expected, actual in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, actual)
    averaged = zip(
        whole.averaged_model().parameters(), resumed.averaged_model().parameters(), strict=True
    )
    assert all(torch.equal(expected, actual) for expected, actual in averaged)


def test_another_seed_trains_another_model(tmp_path):
    split = load_digits_split()
    first = DigitsTrainer(TINY, split, tmp_path)
    second = DigitsTrainer(dataclasses.replace(TINY, seed=1), split, tmp_path)
    assert run_steps(first, 1) != run_steps(second, 1)


def test_evaluation_in_between_does_not_change_training(tmp_path):
    split = load_digits_split()
    plain, evaluated = (DigitsTrainer(TINY, split, tmp_path) for _ in range(2))
    run_steps(plain, 1)
    run_steps(evaluated, 1)
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))
    evaluated.evaluate(classifier)
    assert run_steps(plain, 1) == run_steps(evaluated, 1)


def test_learning_rate_rises_to_its_peak_and_falls_to_zero(tmp_path):
    trainer = DigitsTrainer(TINY, load_digits_split(), tmp_path)
    rates = []
    for trainer.step in range(TINY.steps + 1):
        rates.append(trainer.learning_rate())
    assert rates[0] == TINY.learning_rate / 2
    assert max(rates) == rates[1] == rates[2] == TINY.learning_rate
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[5] < 0.5 * rates[4]  # the cooldown of two steps
    assert rates[-1] == 0.0


def test_run_leaves_model_classifier_and_log_and_no_temporary_file(finished):
    folder, log = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "checkpoint.pt",
        "classifier.safetensors",
        "scheduler",
        "training_log.json",
        "unet",
    }
    assert json.loads((folder / "training_log.json").read_text())["step"] == log["step"] == 6


def test_resuming_a_finished_run_changes_nothing(finished):
    folder, log = finished
    before = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    again = train(TINY, folder, resume=True)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert again["accuracy_ddim20_seeds"] == log["accuracy_ddim20_seeds"]


def test_resume_with_other_settings_names_them(finished):
    folder, _ = finished
    with pytest.raises(ConfigError, match="learning_rate"):
        train(dataclasses.replace(TINY, learning_rate=1e-4), folder, resume=True)


def test_resume_without_checkpoint_is_an_artifact_error(tmp_path):
    trainer = DigitsTrainer(TINY, load_digits_split(), tmp_path)
    with pytest.raises(ArtifactError, match="cannot resume"):
        trainer.load_checkpoint()


def test_zero_steps_are_refused():
    with pytest.raises(ConfigError, match="steps"):
        TrainConfig(steps=0)


def test_build_unet_has_1_74_million_parameters():
    assert sum(parameter.numel() for parameter in build_unet().parameters()) == 1_744_385


def test_packaging_stores_half_precision_and_reports_its_cost(finished, tmp_path):
    folder, _ = finished
    target = tmp_path / "digits"
    log = package_digits(folder, target, count=10)
    assert log["half_precision"]["epsilon_sqnr_db_lowest_of_batches"] > 40
    whole = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    half = (target / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert half < 0.55 * whole
    assert {path.name for path in target.iterdir()} == {
        "classifier.safetensors",
        "scheduler",
        "training_log.json",
        "unet",
    }
    assert list(tmp_path.iterdir()) == [target]
    for path in target.rglob("*.json"):  # where it was trained is nobody's business
        assert str(folder) not in path.read_text()


def test_packaging_an_unfinished_run_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="no finished training run"):
        package_digits(tmp_path, tmp_path / "digits")
