"""Models that return masks, complex numbers, flags and indices are saved, loaded and verified."""

import pytest
import torch
from changed_unets import returned
from rare_outputs import RareOutputs, rare_calls
from safetensors.torch import load_file, save_file

import mpqdm_fx
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.difference import same_bits
from mpqdm_fx.io.folders import OUTPUTS, seal_folder
from mpqdm_fx.model import proof
from mpqdm_fx.model.storage import load, save
from mpqdm_fx.parity.verify import verify


@pytest.fixture(scope="module")
def quantized():
    config = mpqdm_fx.MPQConfig(weight_bits=4, allocation="uniform", refinements=0)
    return mpqdm_fx.quantize(RareOutputs(), config, rare_calls())


@pytest.fixture
def saved(quantized, tmp_path):
    return save(quantized, tmp_path / "saved")


def _change(folder, relative):
    """Move the stored complex numbers by a share of their imaginary part."""
    tensors = load_file(folder / OUTPUTS)
    for name, value in tensors.items():
        if value.is_complex():
            tensors[name] = torch.complex(value.real, value.imag * (1 + relative))
    save_file(tensors, folder / OUTPUTS)
    seal_folder(folder)


def test_another_machine_loads_what_has_infinities(saved, quantized, monkeypatch):
    monkeypatch.setattr(proof.platform, "node", lambda: "elsewhere")
    _change(saved, 1e-5)
    assert same_bits(returned(load(saved)), returned(quantized))


def test_another_imaginary_part_is_refused(saved, monkeypatch):
    monkeypatch.setattr(proof.platform, "node", lambda: "elsewhere")
    _change(saved, 0.5)
    with pytest.raises(ArtifactError, match="dB between"):
        load(saved)


def test_thresholds_of_such_a_model_are_stored_and_met(saved):
    assert verify(saved, model=RareOutputs(), store=True).passed
    assert verify(saved, model=RareOutputs()).passed
    assert verify(saved).passed  # by the float model's outputs as they were stored
