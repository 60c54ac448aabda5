"""Models in training mode: float models are run as in evaluation, and stay as they are."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from mpqdm_fx.api import prepare
from mpqdm_fx.calibration.sampling import denoise
from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.capture.entry import in_float32
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.reference_run import outputs_of


class Denoiser(nn.Module):
    """What training mode shows in: dropout, a batch norm, and a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.conv(self.norm(self.dropout(sample)))
        return 2 * x if self.training else x


@pytest.fixture
def model() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().train()


def calls(model: nn.Module) -> list[dict[str, Any]]:
    return [*Trajectories(
        model, DDIMScheduler(), num_trajectories=2, num_inference_steps=3, batch_size=2, seed=0,
        sample_shape=(3, 4, 4),
    )]  # fmt: skip


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_float_models_run_as_in_evaluation(model: Denoiser) -> None:
    evaluated = copy.deepcopy(model).eval()
    noise, schedule = torch.randn(2, 3, 4, 4), DDIMScheduler()
    batch = {"sample": noise, "timestep": torch.tensor([1, 2])}
    random, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    recorded = [calls(model), calls(model)]
    finished = denoise(model, schedule, noise, num_inference_steps=2, seed=0)
    (output,) = outputs_of(model, [batch])
    assert torch.equal(torch.get_rng_state(), random)
    assert same(model.state_dict(), state)
    assert all(module.training for module in model.modules())
    expected = calls(evaluated)
    for made in recorded:
        assert all(same(*pair) for pair in zip(made, expected, strict=True))
    assert torch.equal(finished, denoise(evaluated, schedule, noise, num_inference_steps=2, seed=0))
    assert torch.equal(output, evaluated(**batch))


def test_what_needs_no_copy_is_not_copied(model: Denoiser) -> None:
    own = in_float32(model)
    assert not any(module.training for module in own.modules())
    assert own.conv.weight is model.conv.weight
    assert in_float32(model.eval()) is model
    example = {"sample": torch.randn(2, 3, 4, 4), "timestep": torch.tensor([1, 2])}
    prepared = prepare(model.train(), MPQConfig(), example)
    assert in_float32(prepared) is prepared


def test_a_traced_model_stays_in_evaluation_when_its_owner_goes_on_to_train(
    model: Denoiser,
) -> None:
    batch = {"sample": torch.randn(2, 3, 4, 4), "timestep": torch.tensor([1, 2])}
    prepared = prepare(model.eval(), MPQConfig(), batch)
    before, state = prepared(**batch), copy.deepcopy(model.state_dict())
    model.train()
    assert torch.equal(prepared(**batch), before)
    assert same(model.state_dict(), state)
    assert all(module.training for module in model.modules())
