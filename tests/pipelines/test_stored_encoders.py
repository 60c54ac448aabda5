"""An encoder that is read from its files layer by layer becomes what it becomes loaded whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from mpqdm_fx import MPQConfig, RunOptions
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.pipelines import encoder_memory, stored_encoders
from mpqdm_fx.pipelines.encoder_memory import check_memory
from mpqdm_fx.pipelines.folder import load_encoder
from mpqdm_fx.pipelines.parts import MaskedTextEncoder, Part
from mpqdm_fx.pipelines.programs import quantize_part, write_programs
from mpqdm_fx.pipelines.stored_encoders import is_held_as_stored, stored_bytes, stored_dtype

DYNAMIC = MPQConfig(activation_mode="dynamic")
_HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
_SIZES = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "head_dim": 12, **_HEADS}
MODELS = {
    "t5": lambda: T5EncoderModel(
        T5Config(
            vocab_size=64, d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ),
    "gemma_2": lambda: Gemma2Model(Gemma2Config(**_SIZES, max_position_embeddings=64)),
    "qwen_3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_SIZES, max_position_embeddings=64, tie_word_embeddings=True)
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(stored_encoders, "LARGE", 0)
    monkeypatch.setattr(stored_encoders, "_SMALL", 0)


def written(folder, name, dtype=torch.bfloat16):
    """Shards of a few layers each."""
    torch.manual_seed(3)
    model = MODELS[name]().eval().to(dtype)
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return type(model).__name__


def part_of(folder, kind, *, stored):
    encoder = load_encoder(folder, kind, None, stored=stored)
    module = MaskedTextEncoder(getattr(encoder, "base_model", encoder)).eval()
    return Part(name="text_encoder", module=module, outputs=("states",), sized=False)


def calls():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[:, 5:] = 0
    ids = [torch.randint(3, 60, (2, 8), generator=generator) for _ in range(2)]
    return [{"input_ids": tokens, "attention_mask": mask} for tokens in ids]


@pytest.mark.parametrize(
    "name",
    ["t5", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("gemma_2", "qwen_3"))],
)
def test_the_same_integers_scales_and_outputs(tmp_path, name):
    kind = written(tmp_path, name)
    whole, stored = (part_of(tmp_path, kind, stored=way) for way in (False, True))
    assert is_held_as_stored(stored.module)
    assert not is_held_as_stored(whole.module)
    assert (stored.digest, stored.parameters) == (whole.digest, whole.parameters)
    assert stored_bytes(stored.module) < 2 * stored.parameters + 1
    judged = [
        quantize_part(part, calls(), DYNAMIC, bound=-300, run=RunOptions())
        for part in (whole, stored)
    ]
    first, second = (entry.quantized for entry in judged)
    assert judged[0].sqnr_db == judged[1].sqnr_db
    assert first.plan == second.plan
    for layer in first.plan.layers:
        assert torch.equal(first.codes(layer.name), second.codes(layer.name))
    with torch.no_grad():
        for call in calls():
            assert torch.equal(whole.module(**call), stored.module(**call))
            assert torch.equal(first(**call), second(**call))


def test_four_bits_are_stored_at_four(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2)
    model = T5EncoderModel(config).eval().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    part = part_of(tmp_path, "T5EncoderModel", stored=True)
    judged = quantize_part(part, calls(), DYNAMIC, bound=-300, run=RunOptions(), bits=4)
    widths = {layer.name: set(layer.bits) for layer in judged.quantized.plan.layers}
    assert {4} in widths.values()
    assert all(bits == {8} for name, bits in widths.items() if "shared" in name)
    narrow = {name for name, bits in widths.items() if bits == {4}}
    example = {name: value[:1] for name, value in calls()[0].items()}
    (method,) = write_programs(part, judged.quantized, {None: example}, tmp_path / "four.pte")
    assert narrow <= set(method.program.four_bit_layers)


@pytest.mark.matrix
def test_it_lowers_in_float_where_it_is_not_good_enough(tmp_path):
    kind = written(tmp_path, "t5")
    part = part_of(tmp_path, kind, stored=True)
    judged = quantize_part(part, calls(), DYNAMIC, bound=300, run=RunOptions())
    assert judged.quantized is None
    example = {name: value[:1] for name, value in calls()[0].items()}
    (method,) = write_programs(part, None, {None: example}, tmp_path / "float.pte")
    assert method.program.sqnr_db > 60


def test_what_would_not_fit_in_float_is_refused(tmp_path, monkeypatch):
    part = part_of(tmp_path, written(tmp_path, "t5"), stored=True)
    monkeypatch.setattr(encoder_memory, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"text_encoder: .*--minimum-sqnr"):
        quantize_part(part, calls(), DYNAMIC, bound=300, run=RunOptions())
    with pytest.raises(ConfigError, match=r"text_encoder: .* parameters takes about"):
        check_memory([part], lambda name: 8)
    monkeypatch.setattr(encoder_memory, "available_memory", lambda: None)
    check_memory([part], lambda name: 8)


def test_files_of_several_dtypes_are_loaded_whole(tmp_path):
    kind = written(tmp_path, "t5")
    assert stored_dtype(tmp_path) is torch.bfloat16
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = tmp_path / index["weight_map"]["encoder.final_layer_norm.weight"]
    tensors = load_file(file)
    tensors["encoder.final_layer_norm.weight"] = torch.full((24,), 1.0 + 2**-20)
    save_file(tensors, file, metadata={"format": "pt"})
    assert stored_dtype(tmp_path) is None
    encoder = load_encoder(tmp_path, kind, None, stored=True)
    assert not is_held_as_stored(encoder)
    assert float(encoder.encoder.final_layer_norm.weight[0]) == 1.0 + 2**-20


def test_a_missing_shard_is_named(tmp_path):
    kind = written(tmp_path, "t5")
    file = next(tmp_path.glob("*.safetensors"))
    file.unlink()
    with pytest.raises(ArtifactError, match=file.name):
        load_encoder(tmp_path, kind, None, stored=True)


def test_small_encoders_are_loaded_whole(tmp_path, monkeypatch):
    kind = written(tmp_path, "t5")
    monkeypatch.undo()
    assert stored_dtype(tmp_path) is None
    assert not is_held_as_stored(load_encoder(tmp_path, kind, None, stored=True))
