"""The CLIP score is the cosine of picture and prompt, by a model that lies on the disk."""

import json
import shutil
import socket

import pytest
import tiny_pipelines
import torch
from conditioned import PROMPTS, run, source_in
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import mpqdm_fx
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.jobs.evaluation import Evaluation, check_networks
from mpqdm_fx.pipelines.open_clip import open_clip
from mpqdm_fx.report.networks import Networks

FEW = ["--num", 3, "--steps", 2]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of a tiny CLIP whose cosines are not all of one sign."""
    root = tmp_path_factory.mktemp("clip")
    tokens = tiny_pipelines.tokenizer(root / "tokens")
    size = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    words = {
        "vocab_size": len(tokens), "max_position_embeddings": tiny_pipelines.LENGTH,
        "bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(3)
    model = CLIPModel(
        CLIPConfig(
            text_config={**size, **words},
            vision_config={**size, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )
    torch.nn.init.normal_(model.text_projection.weight)
    torch.nn.init.normal_(model.visual_projection.weight)
    scale = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    model.save_pretrained(root / "clip")
    CLIPProcessor(image_processor=scale, tokenizer=tokens).save_pretrained(root / "clip")
    return root / "clip"


def cosines(folder, images, prompts):
    """The model's own similarity of each pair; CLIPModel scales it by its temperature."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        output = model(
            **processor(
                text=list(prompts), images=list(pixels), return_tensors="pt", padding="max_length",
                truncation=True, max_length=tiny_pipelines.LENGTH,
            )
        )  # fmt: skip
    return output.logits_per_image.diagonal() / model.logit_scale.exp()


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(len(PROMPTS), 3, 16, 16, generator=generator) * 3 - 1.5


def test_the_score_is_the_cosine_of_picture_and_prompt(clip, pictures):
    expected = cosines(clip, pictures, PROMPTS)
    chosen = [index for index, cosine in enumerate(expected) if cosine > 0]
    assert len(chosen) > 0
    networks = Networks(clip=open_clip(clip))
    score = networks.clip_score(pictures[chosen], [PROMPTS[index] for index in chosen])
    assert score == pytest.approx(100 * float(expected[chosen].mean()), abs=1e-3)


def test_a_long_prompt_counts_by_its_beginning_and_is_told_once(clip, pictures, caplog):
    long = "a long prompt of more letters than it takes"
    judge = open_clip(clip)
    networks = Networks(clip=judge)
    expected = 100 * float(cosines(clip, pictures[:1], [long])[0])
    scores = [networks.clip_score(pictures[:1], [long]) for _ in range(2)]
    assert scores == [pytest.approx(max(expected, 0), abs=1e-3)] * 2
    assert caplog.text.count("1 of 1 prompts have more than the 12 tokens") == 1


def test_evaluate_tells_the_score_beside_the_float_models_and_fetches_nothing(
    pipeline, quantized, clip, monkeypatch
):
    def refused(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    gate = ["--gate", "clip_score>=0"]
    status, text = run("evaluate", quantized, *FEW, "--clip", clip, *gate, "--json")
    assert status == 0, text
    metrics = json.loads(text)
    source = source_in(pipeline[1], prompts=PROMPTS, guidance=3.0)
    evaluation = Evaluation.of(source, num=3, steps=2, seed=90_000)
    drawn = {
        "clip_score": evaluation.draw(mpqdm_fx.load(quantized)),
        "reference_clip_score": evaluation.run.images,
    }
    for name, latents in drawn.items():
        expected = 100 * float(cosines(clip, source.pictures(latents), PROMPTS[:3]).mean())
        assert metrics[name] == pytest.approx(max(expected, 0), abs=1e-2)
    assert metrics["gates"][0]["measured"] == metrics["clip_score"]
    status, text = run("evaluate", quantized, *FEW, "--clip", clip)
    assert (status, "clip_score" in text, "float: " in text) == (0, True, True), text


def test_a_path_that_is_no_clip_is_refused_in_one_line(pipeline, clip, quantized, tmp_path):
    status, text = run("evaluate", quantized, *FEW, "--clip", "openai/clip-vit-base-patch32")
    assert (status, "nothing is downloaded" in text) == (2, True), text
    with pytest.raises(ArtifactError, match="of type 'clip_text_model', not CLIP"):
        open_clip(pipeline[1] / "text_encoder")
    bare = tmp_path / "bare"
    shutil.copytree(clip, bare)
    (bare / "processor_config.json").unlink()
    with pytest.raises(ArtifactError, match="no CLIPProcessor"):
        open_clip(bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"bare.*could not load"):
        open_clip(bare)


def test_what_is_told_no_text_has_no_score(clip, tmp_path):
    tiny_pipelines.ddim(tmp_path).save_pretrained(tmp_path / "p")
    networks = Networks(clip=open_clip(clip))
    with pytest.raises(ConfigError, match=r"--clip: .* draws from no prompts \(the denoiser takes"):
        check_networks(networks, source_in(tmp_path / "p"), inputs=None)
    with pytest.raises(ConfigError, match="2 pictures and 0 prompts"):
        networks.clip_score(torch.zeros(2, 3, 8, 8), ())


def test_networks_are_refused_where_nothing_is_drawn(pipeline, clip):
    networks = Networks(clip=open_clip(clip))
    with pytest.raises(ConfigError, match="clip_score: --inputs calls:some draws nothing"):
        check_networks(networks, source_in(pipeline[1]), inputs="calls:some")
