"""What surrounds a call (inference mode, autocast, default dtypes) does not reach its result."""

import contextlib

import pytest
import torch
from diffusers import DDIMScheduler
from small import TinyDenoiser, TinyNet, denoiser_calls, net_calls

from mpqdm_fx import MPQConfig, Trajectories, convert, load, open_sweep, prepare, quantize, save
from mpqdm_fx.capture.trace import same_bits
from mpqdm_fx.distill import DistillConfig, distill
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.parity.verify import verify
from mpqdm_fx.report.metrics import epsilon_sqnr

SETTINGS = MPQConfig(weight_bits=4, refinements=0)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
}
in_every_ambient = pytest.mark.parametrize("ambient", AMBIENT.values(), ids=AMBIENT)


@pytest.fixture(scope="module")
def calls():
    return net_calls()


@pytest.fixture(scope="module")
def quantized(calls):
    return quantize(TinyNet(), SETTINGS, calls)


@pytest.fixture(scope="module")
def denoiser():
    return quantize(TinyDenoiser(), SETTINGS, denoiser_calls())


def states():
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


@in_every_ambient
def test_inside_torch_is_plain_and_outside_as_before(ambient):
    plain = (False, True, False, torch.float32, torch.device("cpu"))
    assert states() == plain
    with ambient():
        before = states()
        assert before != plain
        with plain_torch():
            assert states() == plain
        assert states() == before
        with pytest.raises(RuntimeError, match="inside"), plain_torch():
            raise RuntimeError("inside")
        assert states() == before


@in_every_ambient
def test_quantize_gives_the_same_model(ambient, calls, quantized):
    model = TinyNet()
    with ambient():
        result = quantize(model, SETTINGS, calls)
    assert result.plan == quantized.plan
    assert result.ranges == quantized.ranges
    assert torch.equal(result(**calls[0]), quantized(**calls[0]))


def test_each_step_may_be_taken_in_inference_mode(calls, quantized):
    prepared = prepare(TinyNet(), SETTINGS, calls[0])
    with torch.inference_mode():
        clones = [{name: value.clone() for name, value in call.items()} for call in calls]
        for call in clones:
            assert call["x"].is_inference()
            prepared(**call)
        sweep = open_sweep(prepared)
        for _ in range(5):
            next(sweep)
    result = convert(prepared, sweep=sweep)
    assert not any(call["x"].is_inference() for call in prepared.records)
    assert result.plan == quantized.plan
    assert torch.equal(result(**calls[0]), quantized(**calls[0]))


def test_a_model_built_in_inference_mode_is_quantized_like_any_other(calls, quantized):
    with torch.inference_mode():
        model = TinyNet()
    result = quantize(model, SETTINGS, calls)
    assert result.plan == quantized.plan
    assert torch.equal(result(**calls[0]), quantized(**calls[0]))
    assert not any(parameter.is_inference() for parameter in result.parameters())
    assert all(parameter.is_inference() for parameter in model.parameters())


def test_a_model_that_autocast_surrounds_computes_in_float32(calls, quantized):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantized(**calls[0])
    assert torch.equal(inside, quantized(**calls[0]))


def test_saving_loading_and_verifying_take_no_notice(calls, quantized, tmp_path):
    with torch.inference_mode():
        save(quantized, tmp_path / "packed")
        loaded = load(tmp_path / "packed", TinyNet())
        inside = verify(tmp_path / "packed", model=TinyNet(), store=True)
    assert not any(parameter.is_inference() for parameter in loaded.parameters())
    assert torch.equal(loaded(**calls[0]), quantized(**calls[0]))
    outside = verify(tmp_path / "packed", model=TinyNet())
    assert [r.float_db for r in inside.rungs] == [r.float_db for r in outside.rungs]


@in_every_ambient
def test_trajectories_are_the_same_and_take_gradients(ambient):
    model, scheduler = TinyDenoiser(), DDIMScheduler()

    def batches():
        return Trajectories(
            model,
            scheduler,
            num_trajectories=2,
            num_inference_steps=2,
            batch_size=2,
            seed=0,
            sample_shape=(2, 6, 10),
        )

    with ambient():
        inside = list(batches())
    assert same_bits(inside, list(batches()))
    assert not any(batch["sample"].is_inference() for batch in inside)


@in_every_ambient
def test_metrics_are_the_same(ambient, denoiser):
    model, inputs = TinyDenoiser(), denoiser_calls(2, seed=5)
    with ambient():
        inside = epsilon_sqnr(model, denoiser, inputs)
    assert inside == epsilon_sqnr(model, denoiser, inputs)


def test_distilling_gives_the_same_model(denoiser):
    config = DistillConfig(updates=2, trajectories=2, batch_size=2, steps=2, held_out=2)

    def trained():
        return distill(
            denoiser, TinyDenoiser(), config, scheduler=DDIMScheduler(), sample_shape=(2, 6, 10)
        )

    with torch.inference_mode():
        inside = trained()
    outside = trained()
    assert (inside.before, inside.after) == (outside.before, outside.after)
    call = denoiser_calls(1, seed=5)[0]
    assert torch.equal(inside.quantized(**call), outside.quantized(**call))
