"""The stages of a part are those that are foretold, in that order; more of them cost more."""

import pytest
import tiny_pipelines
from diffusers import DDPMPipeline, DDPMScheduler
from reporters import Told
from small import plain_unet

from mpqdm_fx.cli.course import Course
from mpqdm_fx.io.progress import reporting
from mpqdm_fx.pipelines.export import export_pipeline
from mpqdm_fx.pipelines.layout import layout_of
from mpqdm_fx.pipelines.part_seconds import part_stages


class Followed(Told):
    """Also keeps a course, and how it stood when stages began."""

    def __init__(self):
        super().__init__()
        self.course, self.totals = Course(), []

    def opened(self, stage):
        super().opened(stage)
        self.course.begin(stage)
        self.totals.append(self.course.total)

    def closed(self, stage, finished):
        super().closed(stage, finished)
        self.course.end(stage)

    def expected(self, seconds):
        super().expected(seconds)
        self.course.expect(self.expectations[-1])


@pytest.mark.xnnpack
def test_a_part_has_the_stages_that_are_foretold(tmp_path):
    DDPMPipeline(plain_unet(), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    reporter = Followed()
    with reporting(reporter):
        export_pipeline(
            tmp_path / "ddpm", tiny_pipelines.cheap_settings(activation_mode="dynamic"),
            tmp_path / "out", steps=2, trajectories=2, samples=0, measure=False,
        )  # fmt: skip
    outer, inner, *_ = reporter.expectations
    assert outer["denoiser"] == pytest.approx(sum(inner.values()))
    assert reporter.outer_names == list(outer)
    inside = [name for name in reporter.names if name not in outer]
    assert len(inside) > 3
    assert inside == [name for name in inner if name in inside]
    assert any(total is not None for total in reporter.totals)


def test_a_part_that_is_only_lowered_takes_the_time_of_that(tmp_path):
    layout = layout_of(tiny_pipelines.stable_diffusion(tmp_path))
    for part in layout.parts.values():
        whole = part_stages(part, sizes=1, is_quantized=True)
        lowered = part_stages(part, sizes=1, is_quantized=False)
        assert lowered == {"lowering": whole["lowering"]}
        twice = part_stages(part, sizes=2, is_quantized=False)["lowering"]
        assert twice == (2 if part.sized else 1) * whole["lowering"]
