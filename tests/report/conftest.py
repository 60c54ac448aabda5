"""Small result folders, made once for the tests of reports."""

from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from small import plain_unet

from mpqdm_fx.config import MPQConfig
from mpqdm_fx.jobs.quantize import quantize_to_folder
from mpqdm_fx.models.sources import load_source


def saved_unet(root: Path, seed: int = 0) -> Path:
    """A model folder with its scheduler."""
    plain_unet(seed).save_pretrained(root)
    DDIMScheduler().save_pretrained(root / "scheduler")
    return root


def quantized_folder(model: Path, output: Path, bits: int, **options) -> Path:
    """A folder of packed weights, in seconds."""
    config = MPQConfig(weight_bits=bits, allocation="uniform", refinements=0)
    quantize_to_folder(
        load_source(str(model)),
        config,
        **{
            "backend": "packed", "output": output, "trajectories": 4, "steps": 3, "samples": 3,
            **options,
        },
    )  # fmt: skip
    return output


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return saved_unet(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def three_bits(model_folder, tmp_path_factory):
    return quantized_folder(model_folder, tmp_path_factory.mktemp("three") / "three", 3)


@pytest.fixture(scope="session")
def five_bits(model_folder, tmp_path_factory):
    return quantized_folder(model_folder, tmp_path_factory.mktemp("five") / "five", 5)
