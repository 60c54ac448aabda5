"""Which axes follow the batch, and that the caller's model is as it was before."""

import copy
import logging

import pytest
import torch
from torch import nn
from trace_helpers import Block, assert_equal_to_eager, randn

from mpqdm_fx.capture.trace import trace

# -- the caller's model ------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_survive(fails: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return y if not fails or y.sum() > 0 else -y

    model = Model()
    model.body[0].eval()
    flags = [m.training for m in model.modules()]
    if fails:
        with pytest.raises(Exception, match="Model cannot be captured"):
            trace(model, (randn(2, 4),))
    else:
        gm = trace(model, (randn(2, 4),))
        assert torch.equal(gm(randn(2, 4)), gm(randn(2, 4)))  # dropout is off
        assert_equal_to_eager(model, gm, randn(3, 4))
    assert [m.training for m in model.modules()] == flags


def test_batch_norm_in_training_mode_is_traced_with_its_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(model.state_dict())
    gm = trace(model, (randn(2, 3, 4, 4),))
    assert_equal_to_eager(model, gm, randn(3, 3, 4, 4))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert gm.get_parameter("1.weight") is model[1].weight
    assert model[1].training


def test_lazy_caches_and_random_state_are_left_alone() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table: torch.Tensor | None = None
            self.cache: dict[int, torch.Tensor] = {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.table is None:
                self.table = torch.linspace(0, 1, 4)
            if 1 not in self.cache:
                self.cache[1] = torch.ones(4)
            torch.rand(1)
            return x * self.table + self.cache[1]

    model = Lazy()
    state = torch.get_rng_state()
    gm = trace(model, (randn(2, 4),))
    assert model.table is None
    assert model.cache == {}
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(gm(randn(3, 4)), model(randn(3, 4)))


# -- the batch ------------------------------------------------------------


def test_inputs_without_a_batch_axis_stay_static() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x * scale[:, None, None] + ids.repeat(x.shape[0], 1, 1)

    model = Model()
    gm = trace(model, (randn(2, 5, 3), randn(5, 3), randn(2)))
    axes = {s.name: s.batch_axis for s in gm.meta["signature"].inputs}
    assert axes == {"x": 0, "ids": None, "scale": 0}
    assert_equal_to_eager(model, gm, randn(4, 5, 3), randn(5, 3), randn(4))


def test_axis_that_has_the_batch_size_by_chance_stays_static() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
            left, right = pair.unbind(0)
            return x * left + right

    model = Model()
    gm = trace(model, (randn(2, 4), randn(2, 4)))
    assert {s.name: s.batch_axis for s in gm.meta["signature"].inputs} == {"x": 0, "pair": None}
    assert_equal_to_eager(model, gm, randn(5, 4), randn(2, 4))


@pytest.mark.parametrize("batch", [1, 2])
def test_several_rows_per_sample_follow_the_batch(batch: int) -> None:
    class Model(nn.Module):
        def forward(self, video: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
            return video.flatten(0, 1) + prompts

    model = Model()
    gm = trace(model, (randn(batch, 3, 4), randn(3 * batch, 4)))
    spec = gm.meta["signature"].spec("prompts")
    assert (spec.batch_axis, spec.batch_multiple) == (0, 3)
    assert_equal_to_eager(model, gm, randn(5, 3, 4), randn(15, 4))
    assert gm.meta["signature"].normalize((randn(5, 3, 4), randn(15, 4)))["prompts"].shape[0] == 15


@pytest.mark.parametrize("batch", [2, 80])
def test_branch_on_the_batch_size_bounds_the_range(batch: int) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] < 64 else x * 3

    model = Model()
    gm = trace(model, (randn(batch, 4),))
    low, high = gm.meta["signature"].batch_range
    assert (low, high) == ((1, 63) if batch == 2 else (64, None))
    assert_equal_to_eager(model, gm, randn(63 if high else 64, 4))
    with pytest.raises(Exception, match="outside the traced range"):
        gm.meta["signature"].normalize((randn(64 if high else 63, 4),))


def test_fixed_batch_is_announced_and_enforced(caplog: pytest.LogCaptureFixture) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(randn(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.table

    model = Model()
    with caplog.at_level(logging.WARNING):
        gm = trace(model, (randn(3, 4),))
    signature = gm.meta["signature"]
    assert not signature.dynamic_batch
    assert signature.note in caplog.text
    assert "the batch is fixed" in signature.note
    assert_equal_to_eager(model, gm, randn(3, 4))
    with pytest.raises(Exception, match=r"x has shape \[2, 4\].*the batch is fixed"):
        signature.normalize((randn(2, 4),))


def test_static_batch_on_request_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        gm = trace(Block().eval(), (randn(1, 3, 8, 8),), dynamic_batch=False)
    assert not gm.meta["signature"].dynamic_batch
    assert not caplog.records
