"""The recipe against plain rounding at the model's output: never worse, and it says so."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import read_back
from torch import Tensor, nn
from torch.nn import functional

from mpqdm_fx import MPQConfig, QuantizedModel, convert, prepare
from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.output_powers import output_powers
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.records.report import Judgement, QuantizationReport

CALLS, HELD_OUT = 6, 2


class OutlierNet(nn.Module):
    """A residual block whose channels are of very different sizes, read by a 1x1 shortcut.

    Args:
        seed: Of the weights.
        size: Factor of the channels that are outliers.
        outliers: Which channels those are.
        in_weights: Whether weights or activations have the outliers.
    """

    def __init__(self, seed: int, size: float, outliers: list[int], *, in_weights: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 4, 1)
        self.head = nn.Conv2d(8, 4, 3, padding=1)
        gain = torch.ones(8)
        gain[outliers] = size
        self.register_buffer("gain", torch.ones(8) if in_weights else gain)
        with torch.no_grad():
            if in_weights:
                self.second.weight *= gain[:, None, None, None]
                self.head.weight[:, outliers] *= size
            else:
                for layer in (self.second, self.shortcut):
                    layer.weight /= gain[None, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        h = functional.silu(self.first(x)) * self.gain[:, None, None]
        residual = functional.silu(self.second(h))
        return self.shortcut(h) + self.head(residual)


def _calls(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 6, 6, generator=generator) for _ in range(CALLS)]


def _quantized(model: nn.Module, config: MPQConfig, calls: list[Tensor]) -> QuantizedModel:
    prepared = prepare(model, config, (calls[0],))
    for index, x in enumerate(calls):
        if index < CALLS - HELD_OUT:
            prepared.record(x=x)
        else:
            with prepared.held_out():
                prepared.record(x=x)
    return convert(prepared)


def _plainly_rounded(weight: Tensor, bits: int) -> Tensor:
    """Nearest of the levels that reach from minus to plus the largest weight of each row."""
    rows = weight.detach().flatten(1)
    largest = rows.abs().amax(dim=1, keepdim=True)
    if bits == 8:
        scale = (largest / 127).bfloat16().float()
        codes = (rows / scale).round().clamp(-127, 127)
    else:
        top = 2**bits - 1
        scale = (largest / top).bfloat16().float()
        codes = (2 * (rows / scale / 2).floor() + 1).clamp(-top, top)
    return (codes * scale).view_as(weight)


def _dynamic(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Affine 8-bit integers over the range of each sample or pixel, 0 among them."""
    low, high = x.amin(dims, keepdim=True).clamp_max(0), x.amax(dims, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-30)
    zero = (-128 - low / scale).round()
    return ((x / scale + zero).round().clamp(-128, 127) - zero) * scale


def _plain_outputs(net: OutlierNet, bits: int, calls: list[Tensor]) -> list[Tensor]:
    """What a few lines of PyTorch give: nearest weights, dynamic inputs but the first one's."""

    def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
        weight = _plainly_rounded(layer.weight, bits)
        return functional.conv2d(x, weight, layer.bias, padding=layer.padding)

    outputs = []
    for x in calls:
        h = functional.silu(conv(net.first, x)) * net.gain[:, None, None]
        residual = functional.silu(conv(net.second, _dynamic(h, (1, 2, 3))))
        shortcut = conv(net.shortcut, _dynamic(h, (1,)))
        outputs.append(shortcut + conv(net.head, _dynamic(residual, (1, 2, 3))))
    return outputs


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([10.0, 100.0, 1000.0]),
    outliers=st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True),
    in_weights=st.booleans(),
    bits=st.sampled_from([2, 4, 8]),
)
@torch.no_grad()
def test_the_default_is_never_worse_at_the_output_than_plain_rounding_on_held_out_calls(
    seed: int, size: float, outliers: list[int], in_weights: bool, bits: int
) -> None:
    net = OutlierNet(seed, size, outliers, in_weights=in_weights).eval()
    calls = _calls(seed)
    config = MPQConfig(weight_bits=bits, activation_mode="dynamic")
    quantized = _quantized(net, config, calls)
    held_out = calls[-HELD_OUT:]
    exact = torch.cat([net(x) for x in held_out])
    ours = torch.cat([quantized(x) for x in held_out])
    plain = torch.cat(_plain_outputs(net, bits, held_out))
    error, plain_error = (float((exact - y).double().square().sum()) for y in (ours, plain))
    # the recipe has as many stored bits as equal ones and 8 in the first and the last layer take
    assert error <= plain_error * (1 + 1e-6)


@torch.no_grad()
def test_plain_rounding_is_taken_where_it_errs_less_and_the_report_says_so() -> None:
    net = OutlierNet(0, 10.0, [1], in_weights=True).eval()
    calls = _calls(0)
    config = MPQConfig(
        weight_bits=8, allocation="uniform", rounding="nearest", activation_mode="float"
    )
    # corrections fitted to rows of another world: all calls that fit are of one constant picture
    calls = [torch.full_like(x, 1e-3) if i < CALLS - HELD_OUT else x for i, x in enumerate(calls)]
    unjudged, judged = (
        _quantized(net, MPQConfig(**{**config.to_dict(), "judge": judge}), calls)
        for judge in (False, True)
    )
    assert not unjudged.report.judged
    recipe, plain = judged.report.judged
    assert recipe.chosen == (recipe.error <= plain.error)
    assert plain.chosen != recipe.chosen
    best = min(recipe.error, plain.error)
    held_out = calls[-HELD_OUT:]
    exact = torch.cat([net(x) for x in held_out])
    output = torch.cat([judged(x) for x in held_out])
    measured = float((exact - output).square().sum() / exact.square().sum())
    assert measured == pytest.approx(best, rel=1e-3)


def test_a_report_with_judgements_survives_json() -> None:
    judgement = Judgement(recipe="the recipe", sqnr_db=(30.0, None), error=1e-3, chosen=True)
    report = QuantizationReport(
        layers=(), calibration_calls=1, seconds=0.0, versions={}, judged=(judgement,)
    )
    assert read_back(QuantizationReport, report.to_dict()) == report
    assert judgement.decibels == pytest.approx(30.0)


def test_errors_count_in_the_group_of_their_sample() -> None:
    groups = NoiseGroups(levels=NoiseLevels(boundaries=(5.0,), argument="timestep"))
    call = {"sample": torch.zeros(3, 2), "timestep": torch.tensor([1, 9, 2])}
    reference = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    output = reference + torch.tensor([[0.5, 0.0], [0.0, 1.0], [0.0, 0.0]])
    powers = output_powers(groups, call, reference, (output,))
    assert powers.tolist() == [[10.0, 0.25], [4.0, 1.0]]
    judged = Judgement.of("one", powers)
    assert judged.error == pytest.approx((0.025 + 0.25) / 2)
    assert judged.sqnr_db[1] == pytest.approx(10 * math.log10(4))


def test_a_group_without_calls_and_an_exact_one_are_no_numbers() -> None:
    judged = Judgement.of("one", torch.tensor([[0.0, 0.0], [4.0, 0.0]], dtype=torch.float64))
    assert judged.sqnr_db == (None, None)
    assert judged.error == 0
