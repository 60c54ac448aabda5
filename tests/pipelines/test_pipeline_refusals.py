"""What cannot be exported is refused before any work, with what to do."""

import json
import shutil

import pytest
import tiny_pipelines
import torch
from eager_programs import eager_export
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mpqdm_fx import (
    ArtifactError,
    ConfigError,
    MPQConfig,
    RunOptions,
    export_pipeline,
    quantize,
)
from mpqdm_fx.cli import app as cli
from mpqdm_fx.errors import MPQError, TraceError
from mpqdm_fx.pipelines.adapters import adapter_layers, refuse_adapters
from mpqdm_fx.pipelines.layout import open_pipeline
from mpqdm_fx.pipelines.prompts import DEFAULT_PROMPTS, read_prompts


@pytest.fixture
def pipeline(tmp_path):
    return tiny_pipelines.stable_diffusion(tmp_path)


@pytest.fixture
def folder(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path / "sd")
    return tmp_path / "sd"


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)


def refused(error, message, source, output, **options):
    with pytest.raises(error, match=message):
        export_pipeline(source, None, output, **options)
    assert not output.exists()
    assert not output.with_name(f"{output.name}.checkpoint").exists()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"run": RunOptions(device="cpu")}, "device"),
        ({"run": RunOptions(sensitivity="s")}, "sensitivity"),
        ({"run": RunOptions(activation_memory=10**9)}, "activation_memory"),
        ({"minimum_sqnr_db": 40.0}, "minimum_sqnr_db"),
        ({"encoder_bits": 4}, "encoder_bits=4"),
    ],
)
def test_what_has_no_meaning_in_float_is_refused_by_name(pipeline, tmp_path, options, name):
    message = rf"^{name}: all parts are to stay in float.* quantize, or leave"
    refused(ConfigError, message, pipeline, tmp_path / "o", **options)


def test_a_lora_that_is_not_fused_is_refused_with_both_ways_out(pipeline, tmp_path):
    pipeline.unet.add_adapter(lora_config(), adapter_name="style")
    assert set(adapter_layers(pipeline.unet)) == {
        name for name, _ in pipeline.unet.named_modules() if name.endswith(("to_q", "to_k"))
    }
    refused(
        ConfigError, r"unet: \d+ layers carry a LoRA \(style\).*fuse_lora", pipeline, tmp_path / "o"
    )


def test_a_denoiser_with_a_lora_is_refused_by_python_verbs_too(pipeline):
    pipeline.unet.add_adapter(lora_config(), adapter_name="style")
    with pytest.raises(TraceError, match=r"attn1.to_q carries a LoRA.*fuse_lora.*merge_and_unload"):
        quantize(pipeline.unet, MPQConfig(), [])


def test_a_lora_in_the_text_encoder_is_found_too(pipeline, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["q_proj"])
    # not through transformers: its newest version wants a PEFT that is not out yet
    inject_adapter_in_model(config, pipeline.text_encoder)
    refused(ConfigError, "text_encoder: 1 layers carry a LoRA", pipeline, tmp_path / "o")


def test_a_fused_lora_must_be_unloaded_and_is_then_part_of_the_weights(
    pipeline, tmp_path, monkeypatch
):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    before = pipeline.unet.get_submodule(name).weight.clone()
    pipeline.unet.add_adapter(lora_config())
    pipeline.unet.fuse_lora()
    refused(ConfigError, "It is fused.*unload_lora_weights", pipeline, tmp_path / "o")
    pipeline.unload_lora_weights()
    refuse_adapters(pipeline.components)
    assert not torch.equal(pipeline.unet.get_submodule(name).weight, before)
    eager_export(pipeline, tmp_path / "out", monkeypatch)


def test_other_pipelines_are_refused_by_name(folder, tmp_path):
    from diffusers import StableDiffusionUpscalePipeline

    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "AuraFlowPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    message = "AuraFlowPipeline cannot be exported; supported are Stable"
    refused(ConfigError, message, folder, tmp_path / "o")
    pipeline = object.__new__(StableDiffusionUpscalePipeline)
    refused(ConfigError, "StableDiffusionUpscalePipeline cannot", pipeline, tmp_path / "o")


@pytest.mark.parametrize("part", ["tokenizer", "vae", "unet", "scheduler"])
def test_folders_that_lack_a_component_are_refused(folder, tmp_path, part):
    shutil.rmtree(folder / part)
    refused(ArtifactError, f"names {part!r}.*missing", folder, tmp_path / "o")


@pytest.mark.parametrize(
    ("part", "entry", "words"),
    [
        ("scheduler", ["os", "system"], "must be one of"),
        ("scheduler", ["diffusers", "logging"], "no scheduler class 'logging'"),
        ("unet", ["diffusers", "DiffusionPipeline"], "no scheduler class 'DiffusionPipeline'"),
        ("unet", ["diffusers", 3], "must be one of"),
        ("vae", ["diffusers"], "must be one of"),
    ],
)
def test_components_that_are_no_models_and_schedulers_are_refused(
    folder, tmp_path, part, entry, words
):
    index = json.loads((folder / "model_index.json").read_text()) | {part: entry}
    (folder / "model_index.json").write_text(json.dumps(index))
    refused(ArtifactError, f"model_index.json: {part}.*{words}", folder, tmp_path / "o")


def test_configs_of_absurd_sizes_are_refused_before_a_part_is_built(folder, tmp_path):
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_channels": 10**9}))
    refused(ArtifactError, "latent_channels is 1000000000", folder, tmp_path / "o")


def test_folders_with_damaged_weights_are_refused(folder, tmp_path):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(ArtifactError, rf"{weights.name} is damaged.*copy it again", folder, tmp_path / "o")


def test_what_is_no_pipeline_folder_is_refused(tmp_path):
    message = "is neither a bundled model .* nor a folder"
    refused(ConfigError, message, tmp_path / "none", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    refused(ConfigError, "model_index.json is missing", tmp_path / "empty", tmp_path / "o")


def test_pipelines_without_a_needed_component_are_refused(pipeline, tmp_path):
    pipeline.tokenizer = None
    refused(ConfigError, "has no tokenizer", pipeline, tmp_path / "o")


def test_inpainting_models_of_four_channels_are_refused(tmp_path):
    pipeline = tiny_pipelines.inpainting(tmp_path, channels=4)
    refused(ConfigError, "takes 4 channels", pipeline, tmp_path / "o")


def test_decoders_that_take_more_than_latents_are_refused(pipeline, tmp_path):
    from diffusers import AsymmetricAutoencoderKL, AutoencoderKLTemporalDecoder

    other = tiny_pipelines.inpainting(tmp_path / "p", vae=AsymmetricAutoencoderKL())
    message = "vae, of class AsymmetricAutoencoderKL, .*only AutoencoderKL and AutoencoderTiny"
    refused(ConfigError, message, other, tmp_path / "o")  # it wants picture and mask
    pipeline.vae = AutoencoderKLTemporalDecoder(block_out_channels=(32,))
    refused(ConfigError, "vae, of class AutoencoderKLTemporal", pipeline, tmp_path / "o")


def test_image_adapters_and_attention_masks_are_refused(pipeline, tmp_path):
    pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    refused(ConfigError, "IP-Adapter.*unload_ip_adapter", pipeline, tmp_path / "o")
    pipeline.unet.register_to_config(encoder_hid_dim_type=None)
    pipeline.text_encoder.config.use_attention_mask = True
    refused(ConfigError, "attention mask", pipeline, tmp_path / "o")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [(16, 17)]}, "16x17: height and width must be multiples of 2"),
        ({"sizes": [(16, 16), (16, 16)]}, "each size once"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "a cat"}, "sequence"),
        (
            {"run": RunOptions(directory="a", start_from="a/b")},
            "start_from='a/b': it lies in directory='a'; give another folder",
        ),
    ],
)
def test_sizes_prompts_and_the_run_are_checked(pipeline, tmp_path, options, message):
    refused(ConfigError, message, pipeline, tmp_path / "o", **options)


def test_sizes_that_the_denoiser_does_not_run_at_are_refused_before_any_work(tmp_path):
    message = "size 9x9: this DDPMPipeline draws nothing of that size: RuntimeError: Sizes"
    pipeline = tiny_pipelines.ddpm(tmp_path)
    refused(ConfigError, message, pipeline, tmp_path / "o", sizes=[(8, 8), (9, 9)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_mode": "timestep"}, "does not run activation_mode='timestep'"),
        ({"activation_bits": 6}, "activations of 8 bits, not 6"),
    ],
)
def test_settings_that_no_program_runs_are_refused(pipeline, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        export_pipeline(pipeline, MPQConfig(**settings), tmp_path / "o")


def test_a_folder_with_other_files_is_not_overwritten(pipeline, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match=r"pipeline.json is missing"):
        export_pipeline(pipeline, None, tmp_path / "o")
    assert (tmp_path / "o" / "letter.txt").read_text() == "dear"


def test_the_command_line_refuses_sizes_and_prompt_files_it_cannot_read(folder, tmp_path):
    for words, message in [
        (["--size", "512"], "HEIGHTxWIDTH"),
        (["--prompts", str(tmp_path / "none.txt")], "none.txt"),
    ]:
        result = CliRunner().invoke(cli.app, ["export", str(folder), *words])
        assert isinstance(result.exception, MPQError)
        assert message in str(result.exception)


@pytest.mark.parametrize("words", [["--guidance", "3"], ["--prompts", "file"]])
def test_the_command_line_refuses_prompting_where_nothing_is_prompted(tmp_path, words):
    tiny_pipelines.ddpm(tmp_path).save_pretrained(tmp_path / "ddpm")
    result = CliRunner().invoke(cli.app, ["export", str(tmp_path / "ddpm"), *words])
    assert isinstance(result.exception, ConfigError)
    assert f"{words[0]}: {tmp_path / 'ddpm'} has no text encoder" in str(result.exception)


def test_prompt_files_hold_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert read_prompts(path) == ("a cat", "a dog")
    path.write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")  # as editors on Windows save it
    assert read_prompts(path) == ("a cat", "a dog")
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_prompts(path)


def test_a_file_that_holds_no_prompts_is_told_with_the_remedy(tmp_path):
    (tmp_path / "wide.txt").write_bytes("a cat".encode("utf-16"))
    remedies = {
        "wide.txt": "no text in UTF-8; save it so",
        "nowhere.txt": "No such file or directory; give a text file",
        ".": "Is a directory; give a text file",
    }
    for name, remedy in remedies.items():
        with pytest.raises(ConfigError, match=f"--prompts .*{remedy}") as raised:
            read_prompts(tmp_path / name)
        assert "Errno" not in str(raised.value)
        assert "codec" not in str(raised.value)


@pytest.mark.parametrize("size", ["0x512", "512x0", "0", f"16x{2**20 + 1}"])
def test_a_side_of_no_pixels_or_too_many_is_told_as_it_was_typed(tmp_path, size):
    tiny_pipelines.ddpm(tmp_path).save_pretrained(tmp_path / "ddpm")
    words = ["export", str(tmp_path / "ddpm"), "--size", size]
    result = CliRunner().invoke(cli.app, words)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == f"--size {size}: give numbers from 1 to {2**20}"


@pytest.mark.parametrize("words", [["export", ""], ["trace", ""], ["plan", ""]])
def test_an_empty_name_is_not_the_current_folder(words):
    result = CliRunner().invoke(cli.app, words)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("'' is neither a bundled model (digits) nor a folder")


def test_there_are_32_different_default_prompts():
    assert len(set(DEFAULT_PROMPTS)) == 64
    assert all(prompt == prompt.strip() for prompt in DEFAULT_PROMPTS)


def test_a_safety_checker_is_left_out_and_that_is_said(folder, caplog):
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert open_pipeline(folder).safety_checker is None
    assert "safety checker is not exported" in caplog.text


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_with_weights_that_no_file_holds_is_refused_and_not_random(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors["other.weight"] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"{part}: its weight files lack .*save_pretrained"):
        open_pipeline(folder)


def test_an_autoencoder_with_the_old_names_of_attention_loads(tmp_path):
    folder = tmp_path / "sd"
    tiny_pipelines.stable_diffusion(tmp_path, kl=True).save_pretrained(folder)
    expected = open_pipeline(folder).vae.state_dict()
    (file,) = (folder / "vae").glob("*.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    assert any("query" in name for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    state = open_pipeline(folder).vae.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
