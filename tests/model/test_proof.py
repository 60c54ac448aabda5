"""A loaded model is the model that was saved, or it is refused by name."""

import json
import lzma
from collections import OrderedDict

import changed_unets
import pytest
import torch
from changed_unets import CHANGES, REFUSED, assert_same_or_refused, returned, rounded_model
from diffusers import UNet2DModel
from diffusers.configuration_utils import FrozenDict
from manifests import edit_manifest
from safetensors.torch import load_file, save_file
from small import TinyNet, net_calls, plain_unet
from torch import nn

from mpqdm_fx.capture.trace import same_bits
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.distillation import distill
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.folders import GRAPH, MANIFEST, OUTPUTS, seal_folder
from mpqdm_fx.model import proof, storage
from mpqdm_fx.model.proof import proof_inputs
from mpqdm_fx.model.storage import load, save

CALL = {"sample": torch.ones(2, 1, 8, 8), "timestep": torch.tensor([7, 400])}


@pytest.fixture(scope="module")
def quantized():
    return rounded_model(plain_unet(), CALL)


@pytest.fixture
def saved(quantized, tmp_path):
    return save(quantized, tmp_path / "saved")


def rewrite(folder, name, content):
    """Replace a file, with a manifest that knows it."""
    (folder / name).write_bytes(content)
    seal_folder(folder)


@pytest.mark.parametrize("change", [*CHANGES[:4], CHANGES[5]], ids=lambda change: change.__name__)
def test_a_model_that_was_changed_at_run_time_loads_with_the_same_bits(change, tmp_path, quantized):
    model = plain_unet()
    change(model)
    loaded = assert_same_or_refused(model, CALL, tmp_path / "model")
    assert loaded or change.__name__ in REFUSED
    if loaded:
        assert not same_bits(returned(load(tmp_path / "model")), returned(quantized))


def test_a_model_given_to_load_is_compared_and_refused_by_name(tmp_path):
    model = plain_unet()
    changed_unets.circular_padding(model)
    folder = save(rounded_model(model, CALL), tmp_path / "model")
    assert same_bits(returned(load(folder, model=model)), returned(load(folder)))
    with pytest.raises(ArtifactError, match=r"conv_in\.\w+ is .* and not"):
        load(folder, model=plain_unet())
    changed = plain_unet()
    changed_unets.circular_padding(changed)
    changed.up_blocks[0].resnets[0].output_scale_factor = 1.7
    with pytest.raises(ArtifactError, match=r"up_blocks\.0\.resnets\.0 is .*1\.7\] and not .*1\b"):
        load(folder, model=changed)


def test_code_of_the_models_own_is_refused_by_name_and_loads_with_the_model(tmp_path, monkeypatch):
    model = TinyNet()
    quantized = rounded_model(model, net_calls()[0])
    body = quantized.rounded.get_submodule("body")
    monkeypatch.setattr(body, "_conv_forward", nn.Conv2d._conv_forward.__get__(body), raising=False)
    with pytest.raises(ArtifactError, match=r"body\._conv_forward .*model_required=True"):
        save(quantized, tmp_path / "net")
    assert not (tmp_path / "net").exists()
    folder = save(quantized, tmp_path / "net", model_required=True)
    with pytest.raises(ArtifactError, match=r"body\._conv_forward .*load\(folder, model=\.\.\.\)"):
        load(folder)
    with pytest.raises(ArtifactError, match=r"body\._conv_forward is None and not"):
        load(folder, model=model)


def test_other_outputs_are_refused_on_the_same_machine_to_the_last_bit(saved):
    tensors = load_file(saved / OUTPUTS)
    first = tensors["quantized.0"].view(-1)
    first[0] = torch.nextafter(first[0], torch.tensor(9.0))
    save_file(tensors, saved / "changed")
    rewrite(saved, OUTPUTS, (saved / "changed").read_bytes())
    with pytest.raises(ArtifactError, match="same machine, same torch"):
        load(saved)


def test_another_machine_may_differ_by_what_kernels_do_and_no_more(saved, monkeypatch):
    monkeypatch.setattr(proof.platform, "node", lambda: "elsewhere")
    expected = returned(load(saved))
    tensors = load_file(saved / OUTPUTS)
    for relative, accepted in ((1e-5, True), (1e-2, False)):
        noise = torch.Generator().manual_seed(0)
        moved = {
            name: value + relative * value.std() * torch.randn(value.shape, generator=noise)
            for name, value in tensors.items()
        }
        save_file(moved, saved / "changed")
        rewrite(saved, OUTPUTS, (saved / "changed").read_bytes())
        if accepted:
            assert same_bits(returned(load(saved)), expected)
        else:
            with pytest.raises(ArtifactError, match=r"39\.\d dB between.*another machine"):
                load(saved)


def test_a_graph_that_was_exchanged_is_refused_by_its_outputs(saved, tmp_path):
    """The last line: a description that is whole and belongs to another model."""
    model = plain_unet()
    changed_unets.norm_epsilon(model)
    foreign = save(rounded_model(model, CALL), tmp_path / "other")
    rewrite(saved, GRAPH, (foreign / GRAPH).read_bytes())
    with pytest.raises(ArtifactError, match="other numbers than the one that was saved"):
        load(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", lzma.compress(b"[]"), lzma.compress(b"[" * 100_000), lzma.compress(b"{}") * 2],
    ids=range(5),
)
def test_a_damaged_graph_is_refused(saved, content):
    rewrite(saved, GRAPH, content)
    with pytest.raises(ArtifactError, match=GRAPH):
        load(saved)


def test_a_bomb_is_not_expanded(saved, monkeypatch):
    monkeypatch.setattr("mpqdm_fx.model.stored_graph._LIMIT", 2**20)
    rewrite(saved, GRAPH, lzma.compress(b" " * 2**24))
    with pytest.raises(ArtifactError, match="does not end"):
        load(saved)


def test_older_folders_load_with_a_warning_and_newer_ones_need_their_proof(saved, caplog):
    edit_manifest(saved, lambda manifest: manifest.pop("proof"))
    with pytest.raises(ArtifactError, match="proof"):
        load(saved)
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["digest"]
    (saved / MANIFEST).write_text(json.dumps({**manifest, "version": 2}))
    load(saved)
    assert "carries no proof" in caplog.text


def test_a_configuration_that_json_would_change_is_refused_by_key(quantized, tmp_path, monkeypatch):
    changed = FrozenDict({**quantized.config, "dtype": torch.float32})
    monkeypatch.setattr(quantized, "config", changed)
    with pytest.raises(ArtifactError, match=r"dtype=torch\.float32.*register_to_config"):
        save(quantized, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_class_of_the_users_own_keeps_its_configuration_and_loads_by_itself(tmp_path):
    class OwnUNet(UNet2DModel):
        def forward(self, sample, timestep, return_dict=True):
            return (super().forward(sample, timestep, return_dict=False)[0] * 0.5,)

    plain = plain_unet()
    model = OwnUNet.from_config(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    quantized = rounded_model(model, CALL)
    loaded = load(save(quantized, tmp_path / "own"))
    assert same_bits(returned(loaded), returned(quantized))
    assert loaded.config.block_out_channels == [16]
    assert loaded.signature == quantized.signature


def test_float_layers_return_the_same_bits_whether_they_wanted_gradients_or_channels_last(tmp_path):
    class Mixed(TinyNet):
        def forward(self, x):
            h = super().forward(x).flatten(2)
            return torch.matmul(h.transpose(1, 2), self.mix.weight[:3, :4])

    model = Mixed().to(memory_format=torch.channels_last)
    quantized = rounded_model(model, net_calls()[0])
    assert not any(p.requires_grad for p in quantized.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert same_bits(returned(load(save(quantized, tmp_path / "m"))), returned(quantized))


def test_training_against_another_float_model_than_was_quantized_is_refused(quantized):
    teacher = plain_unet()
    changed_unets.norm_epsilon(teacher)
    with pytest.raises(ConfigError, match=r"eps is 0\.1 and not"):
        distill(
            quantized, teacher, DistillConfig(updates=1), scheduler=None, sample_shape=(1, 8, 8)
        )


def test_the_input_of_the_proof_is_small_and_the_same_everywhere(quantized):
    inputs = proof_inputs(quantized.signature)
    assert inputs["sample"].shape == (1, 1, 8, 8)
    assert (
        inputs["sample"].flatten()[:4].tolist()
        == proof_inputs(quantized.signature)["sample"].flatten()[:4].tolist()
    )
    again = OrderedDict(proof_inputs(quantized.signature))
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert storage.OUTPUTS == "proof.safetensors"
