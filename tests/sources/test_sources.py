"""A folder becomes a model with inputs that are right, or is refused before anything is built."""

import importlib
import importlib.util
import json

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from unet_folders import KINDS, edit, folder_of, unet_of

from mpqdm_fx import MPQConfig, quantize
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ArtifactError, CalibrationError, ConfigError, MPQError
from mpqdm_fx.graph.unread import unread_inputs
from mpqdm_fx.io.classes import diffusers_class, is_model_class
from mpqdm_fx.io.model_config import read_model_config
from mpqdm_fx.jobs.calibration import calibration_of
from mpqdm_fx.sources.denoisers import draw
from mpqdm_fx.sources.sources import load_source, make_source

NOISE = {
    "deepfloyd": 3,
    "deepfloyd_upscaling": 3,
    "unclip": 3,
    "super_resolution": 3,
    "class_timestep": 3,
}


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    return folder_of("inpainting", tmp_path_factory.mktemp("inpainting"))


@pytest.fixture
def copied(tmp_path):
    return folder_of("latent_consistency", tmp_path)


def load(folder, **options):
    return load_source(str(folder), "unet", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_calibrated_on_its_own_runs_and_draws(kind, tmp_path):
    source = load(folder_of(kind, tmp_path))
    assert source.sample_shape == (NOISE.get(kind, 4), 8, 8)
    calls = list(calibration_of(source, trajectories=2, steps=2, seed=0))
    assert all(torch.isfinite(call["sample"]).all() for call in calls)
    assert calls[0]["sample"].shape[1:] == source.example_inputs["sample"].shape[1:]
    assert calls[0].keys() == source.example_inputs.keys()
    assert draw(source, source.model, num=2, steps=2, seed=0).shape == (2, *source.sample_shape)


def test_class_labels_are_noise_levels_of_upscalers_alone(tmp_path):
    upscaler = load(folder_of("upscaling", tmp_path / "upscaling"))
    assert not upscaler.conditions(4, seed=0)["class_labels"].any()
    by_class = make_source(
        "classes",
        UNet2DModel(
            sample_size=8,
            in_channels=6,
            out_channels=3,
            num_class_embeds=4,
            block_out_channels=(16, 24),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        ).eval(),
        DDIMScheduler(),
    )
    assert by_class.extra is not None
    assert sorted(by_class.conditions(8, seed=0)["class_labels"].tolist()) == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]


def test_an_integer_as_scaling_factor_is_taken(tmp_path):
    folder = folder_of("editing", tmp_path)
    (folder / "vae").mkdir(exist_ok=True)
    (folder / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 1}))
    assert load(folder).extra.scaling == 1


@pytest.mark.parametrize("kind", ["inpainting", "kandinsky"])
def test_a_graph_of_a_folder_reads_every_input_of_its_calibration(kind, tmp_path):
    source = load(folder_of(kind, tmp_path))
    graph = trace(source.model, source.example_inputs)
    assert unread_inputs(graph) == ()
    call = next(iter(calibration_of(source, trajectories=2, steps=2, seed=0)))
    output = graph(**graph.meta["signature"].normalize((), call))[0]
    with torch.no_grad():
        assert torch.equal(output, source.model(**call).sample)


def test_an_input_that_the_graph_does_not_read_is_named(caplog):
    unet, call = unet_of("latent_consistency"), {"class_labels": torch.zeros(2, dtype=torch.int64)}
    call |= {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1, 2])}
    call |= {"encoder_hidden_states": torch.randn(2, 5, 12), "timestep_cond": torch.randn(2, 6)}
    graph = trace(unet, {**call, "added_cond_kwargs": {"image_embeds": torch.randn(2, 3)}})
    assert unread_inputs(graph) == ("class_labels", "added_cond_kwargs.image_embeds")
    assert "does not read the input class_labels" in caplog.text
    assert "does not read the input added_cond_kwargs.image_embeds" in caplog.text


def test_masked_images_are_the_models_own_samples_outside_the_mask(inpainting):
    source = load(inpainting)
    extra = source.conditions(6, seed=3)["extra_channels"]
    mask, masked = extra[:, :1], extra[:, 1:]
    assert mask.unique().tolist() == [0.0, 1.0]
    assert mask.flatten(1).mean(1).unique().numel() > 2
    assert not (masked * mask).any()
    assert masked.abs().amax() > 0
    assert torch.equal(extra, source.conditions(6, seed=3)["extra_channels"])
    assert not torch.equal(extra, source.conditions(6, seed=4)["extra_channels"])


@pytest.mark.matrix
def test_an_inpainting_unet_is_quantized_on_nine_channels(inpainting):
    source = load(inpainting)
    data = calibration_of(source, trajectories=2, steps=2, seed=0)
    config = MPQConfig(
        weight_bits=8, rounding="nearest", allocation="uniform", activation_mode="float"
    )
    quantized = quantize(source.model, config, data)
    right = draw(source, source.model, num=2, steps=2, seed=5)
    images = draw(source, quantized, num=2, steps=2, seed=5)
    assert (images - right).norm() < 0.1 * right.norm()


def test_the_refiner_has_four_sizes_and_a_score_beside_a_text(tmp_path):
    source = load(folder_of("refiner", tmp_path))
    added = source.conditions(3, seed=0)["added_cond_kwargs"]
    assert added["text_embeds"].shape == (3, 10)
    assert added["time_ids"].tolist() == [[64.0, 64.0, 0.0, 0.0, 6.0]] * 3


def test_the_second_text_encoder_says_how_wide_its_text_is(tmp_path):
    folder = folder_of("refiner", tmp_path)
    edit(folder / "model_index.json", requires_aesthetics_score=None)
    encoder = folder / "text_encoder_2" / "config.json"
    encoder.parent.mkdir()
    for width, sizes in ((10, 5), (2, 6)):
        encoder.write_text(json.dumps({"projection_dim": width}))
        added = load(folder).example_inputs["added_cond_kwargs"]
        assert added["time_ids"].shape == (2, sizes)
    encoder.write_text(json.dumps({"projection_dim": 11}))
    with pytest.raises(ConfigError, match="five or six sizes"):
        load(folder)


def test_channels_that_nobody_knows_are_refused(tmp_path):
    folder = folder_of("inpainting", tmp_path)
    unet = unet_of("inpainting")
    config = dict(unet.config) | {"in_channels": 11}
    type(unet).from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(ConfigError, match="takes 11 channels and predicts 4"):
        load(folder)


# -- class names ---------------------------------------------------------------------------------

WRONG = [
    "os",
    "DiffusionPipeline",
    "logging",
    "ModelMixin",
    "utils",
    "EMAModel",
    "__doc__",
    None,
    3,
]


@pytest.mark.parametrize("name", WRONG)
def test_only_models_and_schedulers_of_diffusers_are_found_by_name(name, copied):
    assert not is_model_class(name)
    for kind in ("model", "scheduler"):
        with pytest.raises(ArtifactError, match="_class_name"):
            diffusers_class(kind, name)
    edit(copied / "scheduler" / "scheduler_config.json", _class_name=name)
    with pytest.raises(ArtifactError, match=r"scheduler_config\.json.*_class_name"):
        load(copied)
    edit(copied / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    edit(copied / "unet" / "config.json", _class_name=name)
    for read in (load, lambda folder: read_model_config(folder / "unet")):
        with pytest.raises(ArtifactError, match=r"config\.json.*_class_name"):
            read(copied)


def test_a_scheduler_is_no_model_and_a_model_no_scheduler():
    with pytest.raises(ArtifactError, match="no model class 'DDIMScheduler'"):
        diffusers_class("model", "DDIMScheduler")
    with pytest.raises(ArtifactError, match="no scheduler class 'UNet2DModel'"):
        diffusers_class("scheduler", "UNet2DModel")


def test_a_class_that_needs_another_package_is_refused_with_its_name(copied, monkeypatch):
    # what diffusers has in the place of a class where torchsde is missing, as some hosts have it
    dummies = importlib.import_module("diffusers.utils.dummy_torch_and_torchsde_objects")
    name = "DPMSolverSDEScheduler"
    monkeypatch.setattr(diffusers.schedulers, name, getattr(dummies, name))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda package: None if package == "torchsde" else real(package),
    )
    words = rf"{name} of diffusers needs torchsde, .*: pip install torchsde$"
    with pytest.raises(ArtifactError, match=words):
        diffusers_class("scheduler", name)
    edit(copied / "scheduler" / "scheduler_config.json", _class_name=name)
    with pytest.raises(ArtifactError, match=rf"scheduler_config\.json: {words}"):
        load(copied)


# -- configs -------------------------------------------------------------------------------------

BAD_SETTINGS = [
    ({"layers_per_block": 1_000_000}, "layers_per_block is 1000000"),
    ({"layers_per_block": 256}, "10000 modules"),
    ({"block_out_channels": [10**9, 16]}, "block_out_channels is 1000000000"),
    ({"block_out_channels": [2**20, 2**20]}, "parameters"),
    ({"transformer_layers_per_block": [1, 10**12]}, "transformer_layers_per_block"),
    ({"block_out_channels": [64, 64]}, "do not belong together"),
    ({"norm_eps": float("nan")}, "norm_eps is nan"),
    ({"norm_num_groups": 0}, "refuses it"),
    ({"down_block_types": 3}, "refuses it"),
    ({"act_fn": ["silu"] * 2000}, "2000 entries"),
    ({"new_branch_dim": 4}, "new_branch_dim"),
    ({"sample_size": "8"}, "sample_size|no inputs"),
    ({"addition_embed_type": "mystery"}, "mystery"),
    ({"encoder_hid_dim_type": "ip_image_proj", "encoder_hid_dim": 4}, "encoder_hid_dim"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_SETTINGS)
def test_a_config_that_cannot_be_a_model_is_refused_in_one_line(changes, words, copied):
    edit(copied / "unet" / "config.json", **changes)
    with pytest.raises(MPQError, match=words) as refusal:
        load(copied)
    assert "\n" not in str(refusal.value)


BAD_SCHEDULES = [
    ({"beta_start": float("nan")}, "beta_start is nan"),
    ({"beta_end": float("inf")}, "beta_end is inf"),
    ({"beta_end": -0.5}, "beta_end is -0.5"),
    ({"num_train_timesteps": -3}, "num_train_timesteps is -3"),
    ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000"),
    ({"trained_betas": [0.1, float("nan")]}, r"trained_betas\.1 is nan"),
    ({"clip_sample_range": 1e300}, "clip_sample_range is 1e"),
    ({"beta_schedule": "mystery"}, "refuses it"),
    ({"beta_start": "0.1"}, "refuses it"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_SCHEDULES)
def test_a_schedule_of_impossible_numbers_is_refused_with_its_place(changes, words, copied):
    edit(copied / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises((CalibrationError, ArtifactError), match=f"scheduler_config.json.*{words}"):
        load(copied)
