"""Small result folders, made once for the tests of reports."""

import pytest
from unet_folders import saved_unet

from mpqdm_fx.api import quantize
from mpqdm_fx.jobs.calibration import calibration_of
from mpqdm_fx.jobs.quantize import quantize_to_folder
from mpqdm_fx.model.folder import rewritten_folder
from mpqdm_fx.model.storage import save
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.sources.denoisers import SOURCE, Origin
from mpqdm_fx.sources.sources import load_source

SETTINGS = {"allocation": "uniform", "refinements": 0}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return saved_unet(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def three_bits(model_folder, tmp_path_factory):
    """A folder of `quantize_to_folder`."""
    output = tmp_path_factory.mktemp("three") / "three"
    quantize_to_folder(
        load_source(str(model_folder)),
        MPQConfig(weight_bits=3, **SETTINGS),
        backend="packed",
        output=output,
        trajectories=4,
        steps=3,
        samples=3,
    )
    return output


@pytest.fixture(scope="session")
def five_bits(model_folder, tmp_path_factory):
    """A folder of `save` that says where its float model is: nothing was measured."""
    output = tmp_path_factory.mktemp("five") / "five"
    source = load_source(str(model_folder))
    calls = calibration_of(source, trajectories=4, steps=3, seed=0)
    save(quantize(source.model, MPQConfig(weight_bits=5, **SETTINGS), calls), output)
    with rewritten_folder(output) as stage:
        (stage / SOURCE).write_text(Origin.of(source, None).model_dump_json())
        source.scheduler.save_pretrained(stage / "scheduler")
    return output
