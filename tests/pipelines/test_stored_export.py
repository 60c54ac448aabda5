"""A pipeline whose text encoder stays in its files becomes what it becomes loaded whole."""

import numpy as np
import pytest
import tiny_transformers
import torch
from eager_programs import UNMEASURED, EagerRunner, eager_writer
from transformers import T5Config, T5EncoderModel

import mpqdm_fx.pipelines.export as export_module
from mpqdm_fx import MPQConfig
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines import stored_encoders
from mpqdm_fx.pipelines.encoder_memory import encoder_peak
from mpqdm_fx.pipelines.estimate import estimate_export
from mpqdm_fx.pipelines.layout import layout_of, open_pipeline
from mpqdm_fx.pipelines.programs import JudgedPart
from mpqdm_fx.pipelines.stored_encoders import is_held_as_stored

DYNAMIC = MPQConfig(activation_mode="dynamic")
RUNS = {"steps": 2, "trajectories": 2, "prompts": ["a cat"]}
WIDTH, HEADS, HEAD, FEED, LAYERS, WORDS = tiny_transformers.T5_WIDTH, 8, 64, 1024, 1, 32
TOKENS = 120
POSITIONS = 8 * TOKENS**2  # bytes of the numbers of distances, a constant
GRAPH = 4000 * 7 * LAYERS  # bytes of nodes and names at most; a layer takes about 2,800


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """PixArt with a T5 of wide layers in several bfloat16 shards."""
    root = tmp_path_factory.mktemp("stored")
    pipeline = tiny_transformers.pixart_sigma(root, alpha=True)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=WORDS, d_model=WIDTH, d_kv=HEAD, d_ff=FEED, num_layers=LAYERS, num_heads=HEADS,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    encoder = T5EncoderModel(config).eval().to(torch.bfloat16)
    pipeline.register_modules(text_encoder=encoder)
    pipeline.save_pretrained(root / "p", max_shard_size="100KB")
    assert len(list((root / "p" / "text_encoder").glob("*.safetensors"))) > 1
    return root / "p"


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """Results and runners, read from files and loaded whole; the encoder alone is lowered."""
    judge, lower = export_module._judge, export_module.write_programs

    def judged(part, *arguments):
        if part.name == "text_encoder":
            return judge(part, *arguments)
        return JudgedPart(quantized=None, sqnr_db=0.0)

    made = {}
    for form, least in {"stored": 0, "whole": stored_encoders.LARGE}.items():
        models = {}
        eager = eager_writer(models)

        def write(part, *arguments, eager=eager, **options):
            writer = lower if part.name == "text_encoder" else eager
            return writer(part, *arguments, **options)

        output = tmp_path_factory.mktemp(form) / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stored_encoders, "LARGE", least)
            patch.setattr(stored_encoders, "_SMALL", 0)
            patch.setattr(export_module, "_judge", judged)
            patch.setattr(export_module, "write_programs", write)
            result = export_module.export_pipeline(
                source, DYNAMIC, output, encoder_bits=4, minimum_sqnr_db=5, **RUNS, **UNMEASURED
            )
        made[form] = result, EagerRunner(output, models)
    return made


@pytest.mark.matrix
@pytest.mark.xnnpack
def test_folder_program_and_picture_are_those_of_the_encoder_loaded_whole(exported):
    (stored, runner), (whole, other) = exported["stored"], exported["whole"]
    # what was read from its files is not kept
    assert (list(stored.quantized), list(whole.quantized)) == ([], ["text_encoder"])
    files = [
        {
            path.relative_to(result.directory): path.read_bytes()
            for path in result.directory.rglob("*")
            if path.is_file() and path.suffix not in (".json", ".html", ".txt")
        }
        for result in (stored, whole)
    ]
    assert len(files[0]) > 10
    assert files[0] == files[1]
    methods = stored.manifest["methods"]
    assert [{**entry, "seconds": 0} for entry in methods] == [
        {**entry, "seconds": 0} for entry in whole.manifest["methods"]
    ]
    assert next(e for e in methods if e["part"] == "text_encoder")["four_bit_layers"] == 5 * LAYERS
    pictures = [each.sample("a cat", steps=2, seed=1) for each in (runner, other)]
    assert np.array_equal(*pictures)
    assert not np.array_equal(pictures[0], runner.sample("a dog with a hat", steps=2, seed=1))


def bytes_at_four() -> int:
    """What a program holds of the encoder's numbers, counted by hand."""
    inner = HEADS * HEAD
    narrow = LAYERS * WIDTH * (3 * inner + 2 * FEED)  # q, k, v, wi_0, wi_1
    wide = LAYERS * WIDTH * (inner + FEED)  # o, wo: added to what is returned
    rest = WORDS * WIDTH + 32 * HEADS + (2 * LAYERS + 1) * WIDTH  # tables and norms
    channels = LAYERS * (3 * inner + 2 * FEED + 2 * WIDTH)
    return narrow // 2 + wide + 4 * (rest + channels)


@pytest.mark.matrix
@pytest.mark.xnnpack
def test_a_dry_run_knows_bits_and_peak_of_an_encoder_that_stays_in_its_files(
    source, exported, monkeypatch
):
    monkeypatch.setattr(stored_encoders, "LARGE", 0)
    monkeypatch.setattr(stored_encoders, "_SMALL", 0)
    part = layout_of(open_pipeline(source, stored=True)).parts["text_encoder"]
    assert is_held_as_stored(part.module)
    told = estimate_export(source, DYNAMIC, encoder_bits=4, **RUNS).parts["text_encoder"]
    whole = estimate_export(source, None, **RUNS).parts["text_encoder"]
    assert told.peak_bytes == encoder_peak(part.module, TOKENS)
    assert told.held_bytes < told.float_bytes
    assert whole.held_bytes == whole.float_bytes == told.float_bytes
    assert whole.program_bytes - told.program_bytes == told.float_bytes - bytes_at_four()
    written = exported["stored"][0].manifest["files"]["text_encoder.pte"]["bytes"]
    assert told.program_bytes == pytest.approx(written - POSITIONS, rel=0.05)
    assert 0 < written - POSITIONS - bytes_at_four() < GRAPH


def test_bits_of_encoders_that_stay_in_float_are_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="encoder_bits=4: all parts are to stay in float"):
        export_module.export_pipeline(source, None, tmp_path / "out", encoder_bits=4)
