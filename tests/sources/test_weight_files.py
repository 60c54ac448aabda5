"""Weights are safetensors of the folder, in the variant that was asked for."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from unet_folders import edit, folder_of, unet_of

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.sources.sources import load_source
from mpqdm_fx.sources.weight_files import count_numbers, load_weights, weight_files

KIND = "class_timestep"


def load(folder, variant=None):
    return load_source(str(folder), "unet", variant)


def same(source, dtype=torch.float32):
    expected = unet_of(KIND).state_dict()
    state = source.model.state_dict()
    return all(
        torch.equal(state[name], tensor.to(dtype).float()) for name, tensor in expected.items()
    )


@pytest.fixture
def sharded(tmp_path):
    folder = folder_of(KIND, tmp_path, max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    return folder


def test_a_folder_with_the_fp16_variant_alone_says_so_and_loads_with_it(tmp_path):
    folder = folder_of(KIND, tmp_path)
    shutil.rmtree(folder / "unet")
    unet_of(KIND).half().save_pretrained(folder / "unet", variant="fp16")
    with pytest.raises(ConfigError, match="give --variant fp16"):
        load(folder)
    source = load(folder, "fp16")
    assert source.variant == "fp16"
    assert same(source, torch.float16)
    assert {p.dtype for p in source.model.parameters()} == {torch.float32}


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    folder = folder_of(KIND, tmp_path)
    with pytest.raises(ConfigError, match="give no --variant"):
        load(folder, "fp16")
    with pytest.raises(ConfigError, match="such as fp16"):
        load(folder, "../fp16")
    with pytest.raises(ConfigError, match="no variant"):
        load_source("digits", variant="fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_several_files_load_as_one_model(tmp_path, variant):
    folder = folder_of(KIND, tmp_path, max_shard_size="100KB", variant=variant)
    files = weight_files(folder / "unet", variant)
    assert len(files) > 1
    numbers = sum(tensor.numel() for tensor in unet_of(KIND).state_dict().values())
    assert count_numbers(files) == numbers
    assert same(load(folder, variant))


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", ""]
)
def test_an_index_that_leaves_the_folder_is_refused(sharded, name):
    index = sharded / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=names | {"conv_in.weight": name})
    with pytest.raises(ArtifactError, match="only safetensors files of the same folder"):
        load(sharded)


def test_a_missing_part_is_named(sharded):
    first = min((sharded / "unet").glob("*-of-*.safetensors"))
    first.unlink()
    with pytest.raises(ArtifactError, match=f"{first.name} is missing"):
        load(sharded)


def test_pickles_are_refused_with_the_remedy(tmp_path):
    folder = folder_of(KIND, tmp_path, safe_serialization=False)
    with pytest.raises(ConfigError, match="safe_serialization=True"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100])
def test_a_truncated_file_is_refused(tmp_path, keep):
    folder = folder_of(KIND, tmp_path)
    (file,) = weight_files(folder / "unet", None)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"damaged|do not belong together"):
        load(folder)


@pytest.mark.parametrize("rename", ["model.conv_in.weight", None])
def test_a_weight_that_no_file_holds_is_refused_and_not_random(tmp_path, rename):
    folder = folder_of(KIND, tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    taken = tensors.pop("conv_in.weight")
    # as many numbers as before, under another name
    tensors[rename or "padding"] = taken
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=r"lack conv_in\.weight.*save_pretrained"):
        load(folder)


def test_buffers_that_are_made_anew_need_no_file(tmp_path):
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=16,
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        act_fn="gelu",
    )
    stored = model.state_dict()
    assert {name for name, _ in model.named_buffers()} - set(stored)
    model.save_pretrained(tmp_path)
    loaded = load_weights(UNet2DConditionModel, dict(model.config), tmp_path)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())
