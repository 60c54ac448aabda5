"""Models are judged by runs that they were not made on, and by no set of a single sample."""

import pytest
from unet_folders import saved_unet

from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.jobs.calibration import calibration_of, check_unseen
from mpqdm_fx.jobs.distill import distill_folder
from mpqdm_fx.jobs.evaluate import evaluate_folder
from mpqdm_fx.jobs.evaluation import evaluated_metrics
from mpqdm_fx.jobs.quantize import quantize_to_folder
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.networks import Networks
from mpqdm_fx.report.reference_run import EVALUATION_SEED
from mpqdm_fx.sources.sources import load_source


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return saved_unet(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("made") / "out"
    config = MPQConfig(seed=3, allocation="uniform", refinements=0)
    quantize_to_folder(
        load_source(str(model_folder)), config, backend="packed", output=output,
        trajectories=4, steps=2, samples=0,
    )  # fmt: skip
    return output


@pytest.mark.parametrize("seed", [3, 2])  # of the held-out runs, and of the samples
def test_a_folder_is_not_evaluated_on_the_noise_that_it_was_calibrated_on(folder, seed):
    with pytest.raises(ConfigError, match=r"seed 3 is that of the runs.*give another --seed"):
        evaluate_folder(folder, num=2, steps=2, seed=seed)
    assert evaluate_folder(folder, num=2, steps=2, seed=4).metrics["seed"] == 4


def test_nor_on_the_noise_that_it_was_trained_on(folder, tmp_path):
    trained = tmp_path / "trained"
    distill_folder(
        folder,
        DistillConfig(updates=1, trajectories=2, steps=2, batch_size=2, seed=7, final_share=0.0),
        output=trained,
        samples=0,
    )
    with pytest.raises(ConfigError, match="seed 7 is that of the runs"):
        evaluate_folder(trained, num=2, steps=2, seed=7)


@pytest.mark.parametrize("seed", [EVALUATION_SEED, EVALUATION_SEED + 1])
def test_the_seeds_of_judging_runs_make_no_model(model_folder, folder, tmp_path, seed):
    source = load_source(str(model_folder))
    with pytest.raises(ConfigError, match=f"seed {seed} is that of"):
        calibration_of(source, trajectories=4, steps=2, seed=seed)
    with pytest.raises(ConfigError, match=f"seed {seed} is that of"):
        distill_folder(folder, DistillConfig(updates=1, seed=seed), output=tmp_path / "new")
    assert not list(tmp_path.iterdir())
    check_unseen(EVALUATION_SEED, [0, EVALUATION_SEED - 1, EVALUATION_SEED + 2])


def test_a_single_sample_has_no_distances_to_gate():
    networks = Networks(inception=lambda pixels, return_features: pixels)
    several = evaluated_metrics(load_source("digits"), networks, num=2)
    single = evaluated_metrics(load_source("digits"), networks, num=1)
    assert set(several) - set(single) == {
        "frechet_distance", "kernel_distance", "inception_distance", "inception_kernel_distance",
    }  # fmt: skip
