"""A pipeline, and its denoiser quantized on its prompts; made once a process."""

import pytest
import tiny_pipelines
from conditioned import CHEAP, PROMPTS, RUNS, run, unmeasure


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    made = tiny_pipelines.stable_diffusion(root)
    made.save_pretrained(root / "sd")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return made, root / "sd"


@pytest.fixture(scope="session")
def quantized(pipeline, tmp_path_factory):
    output = tmp_path_factory.mktemp("quantized") / "out"
    words = ["--prompts", pipeline[1].parent / "prompts.txt", "--guidance", 3, "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        unmeasure(patch)
        status, text = run("quantize", pipeline[1], *CHEAP, *RUNS, *words)
    assert status == 0, text
    return output


@pytest.fixture
def unmeasured(monkeypatch):
    unmeasure(monkeypatch)
