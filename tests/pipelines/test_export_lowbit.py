"""Pipelines exported for own kernels: programs, report, and a runner that asks for the library."""

import json
import lzma
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_pipelines
from diffusers import DDPMPipeline, DDPMScheduler
from kernel_package import kernels_installed, kernels_missing
from small import plain_unet
from torch import nn

from mpqdm_fx import ConfigError, export_pipeline
from mpqdm_fx.backends.compressed import drop_expansions, expand_program
from mpqdm_fx.backends.kernel_library import calls_own_operators
from mpqdm_fx.errors import LoweringError
from mpqdm_fx.pipelines.estimate import estimate_export
from mpqdm_fx.pipelines.runner import PipelineRunner, RunnerError

SETTINGS = tiny_pipelines.cheap_settings(activation_mode="dynamic")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    root = tmp_path_factory.mktemp("ddpm")
    DDPMPipeline(plain_unet(), DDPMScheduler()).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    with kernels_installed(tmp_path_factory.mktemp("kernels")):
        yield


@pytest.fixture(scope="module")
def exported(installed, pipeline, tmp_path_factory):
    output = tmp_path_factory.mktemp("lowbit") / "out"
    return export_pipeline(
        pipeline, SETTINGS, output, steps=2, trajectories=2, samples=1, measure=False,
        backend="lowbit", kernels="memory", compress=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (SETTINGS, {"kernels": "memory"}, "kernels='memory': xnnpack has no own kernels"),
        (None, {"backend": "lowbit"}, "float programs have no layers for own kernels"),
        (
            tiny_pipelines.cheap_settings(activation_mode="timestep"),
            {"backend": "lowbit"},
            "lowbit does not run activation_mode='timestep'",
        ),
    ],
)
def test_settings_that_own_kernels_do_not_run_are_refused(
    pipeline, tmp_path, settings, options, message
):
    with pytest.raises(ConfigError, match=message):
        export_pipeline(pipeline, settings, tmp_path / "out", **options)


def test_without_the_library_nothing_is_begun(pipeline, tmp_path):
    with kernels_missing(), pytest.raises(LoweringError, match=r"calls mpqdm::conv2d_mixed"):
        export_pipeline(pipeline, SETTINGS, tmp_path / "out", backend="lowbit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.xnnpack
def test_the_denoiser_calls_own_kernels_and_its_report_says_so(exported):
    folder = exported.directory
    packed = folder / "denoiser.pte.xz"
    assert lzma.decompress(packed.read_bytes()).endswith(b"MPQC")  # its weights are coded
    assert calls_own_operators(expand_program(packed)).startswith("mpqdm::")
    (part,) = json.loads((folder / "report.json").read_text())["parts"]
    assert part["backend"] == "lowbit"
    assert part["program"]["own_layers"]
    assert part["program"]["crossings"] > 0
    assert PipelineRunner(folder).sample(steps=2, seed=1).shape == (8, 8, 1)


@pytest.mark.xnnpack
def test_an_estimate_counts_the_bits_that_own_kernels_keep(exported, pipeline):
    settings = replace(SETTINGS, weight_bits=2)
    runs = {"steps": 2, "trajectories": 2, "measure": False}
    wide, narrow = (
        estimate_export(pipeline, settings, **runs, **options).parts["denoiser"].program_bytes
        for options in ({}, {"backend": "lowbit", "kernels": "memory"})
    )
    report = json.loads((exported.directory / "report.json").read_text())
    left = report["parts"][0]["program"]["left_layers"]
    layers = (
        module
        for name, module in plain_unet().named_modules()
        if name not in left and not name.startswith("time_embedding")  # which keeps eight bits
    )
    counts = [m.weight.numel() for m in layers if isinstance(m, nn.Conv2d | nn.Linear)]
    assert wide - narrow == sum(count * 6 // 8 for count in counts) > 0


@pytest.mark.xnnpack
def test_the_runner_refuses_before_it_loads_where_the_library_is_missing(exported):
    with kernels_missing(), pytest.raises(RunnerError, match=r"the program calls|the weights of"):
        PipelineRunner(exported.directory).sample(steps=1)
    drop_expansions(exported.directory / "denoiser.pte.xz")
    # the copy in the folder, which knows nothing of this package
    code = (
        "import sys, runpy; sys.modules.update(mpqdm_kernels=None, mpqdm_fx=None); "
        "sys.argv = ['run.py', '--steps', '1', '--output', sys.argv[1]]; "
        "sys.path.insert(0, '.'); runpy.run_path('run.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported.directory.parent / "picture.png")],
        cwd=exported.directory, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode not in (0, None)
    assert "the weights of " in done.stderr
    assert 'pip install "mpqdm-fx[kernels]"' in done.stderr
    assert "Traceback" not in done.stderr
