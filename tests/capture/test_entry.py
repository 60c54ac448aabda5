"""The caller's model at the door: unwrapped, copied to float32, or refused by name."""

import functools
import inspect

import accelerate
import pytest
import torch
from diffusers import UNet2DModel
from small import TinyNet, net_calls, plain_unet, tiny_unet
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from trace_helpers import calls

from mpqdm_fx import MPQConfig, Trajectories, load, prepare, quantize, save
from mpqdm_fx.capture.entry import enter, unwrap
from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import TraceError

EXAMPLE = net_calls(1)[0]


class AnyArguments(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Lost(nn.Module):
    """A linear whose packed weight is no float."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x * self.weight.to(x.dtype)


# -- wrappers --------------------------------------------------------------------------------------


def compiled():
    return torch.compile(TinyNet())  # not called: nothing is compiled


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))]
)
def test_wrappers_are_left_out(wrap):
    model = TinyNet()
    assert unwrap(wrap(model)) is model
    graph_module = trace(wrap(model), EXAMPLE)
    assert graph_module.meta["signature"].model_class == "TinyNet"
    assert graph_module.conv_in is model.conv_in
    assert prepare(wrap(tiny_unet()), MPQConfig(), unet_example()).config.in_channels == 1


def unet_example():
    return {"sample": torch.zeros(1, 1, 8, 8), "timestep": 1, "class_labels": torch.tensor([1])}


def test_what_is_compiled_inside_a_model_is_left_out_of_a_copy():
    model, plain = TinyNet(), TinyNet()
    model.body = torch.compile(model.body)
    model.mix.compile()
    model.conv_out.forward = torch.compile(model.conv_out.forward)
    graph_module = trace(model, EXAMPLE)
    assert calls(graph_module) == ["conv_in", "norm", "act", "body", "mix", "conv_out"]
    with torch.no_grad():
        assert torch.equal(graph_module(**EXAMPLE), plain(**EXAMPLE))
    assert graph_module.mix is not model.mix
    assert graph_module.mix.weight is model.mix.weight
    assert type(model.body).__name__ == "OptimizedModule"
    assert model.mix._compiled_call_impl is not None


def test_a_hook_on_a_wrapper_is_not_lost():
    wrapper = nn.DataParallel(TinyNet())
    wrapper.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(TraceError, match="a hook sits on the DataParallel around TinyNet"):
        trace(wrapper, EXAMPLE)


def test_a_wrapper_that_does_not_name_its_arguments_is_refused_with_the_remedy():
    with pytest.raises(TraceError, match=r"\(\*args, \*\*kwargs\).*give the module inside.*inner"):
        trace(AnyArguments(TinyNet()), EXAMPLE)


def test_what_is_no_module_is_refused():
    with pytest.raises(TraceError, match="the model is a function; give a torch"):
        trace(lambda x: x, EXAMPLE)


# -- dtypes ----------------------------------------------------------------------------------------


def test_a_float32_model_is_not_copied():
    model = TinyNet()
    assert enter(model).model is model
    assert enter(model).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_traced_as_a_float32_copy(dtype):
    model = TinyNet().to(dtype)
    example = {"x": EXAMPLE["x"].to(dtype)}
    graph_module = trace(model, example)
    signature = graph_module.meta["signature"]
    assert signature.dtype == dtype
    assert signature.spec("x").dtype == torch.float32
    assert {p.dtype for p in graph_module.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        expected = TinyNet().to(dtype).float()(example["x"].float())
        assert torch.equal(graph_module(**signature.normalize((), example)), expected)


def test_only_what_is_in_half_precision_is_copied():
    model = TinyNet()
    model.body.half()
    model.freqs = torch.ones(3, dtype=torch.bfloat16)  # neither parameter nor buffer
    entry = enter(model)
    assert entry.dtype == torch.float16  # most numbers are
    assert entry.model.conv_in.weight is model.conv_in.weight
    assert entry.model.body.weight.dtype == torch.float32
    assert entry.model.freqs.dtype == torch.float32
    assert model.body.weight.dtype == torch.float16
    assert model.freqs.dtype == torch.bfloat16


def test_what_refers_to_a_module_refers_to_the_copys():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.call = self.linear.forward
            self.steps = [functools.partial(self.linear), self.helper]

        def helper(self, x):
            return x * self.linear.weight.sum()

        def forward(self, x):
            return self.steps[1](self.steps[0](self.call(x)))

    model = Model().half().eval()
    x = torch.randn(2, 4).half()
    graph_module = trace(model, (x,))
    with torch.no_grad():
        assert torch.equal(graph_module(x.float()), Model.forward(model.float(), x.float()))


def test_tied_parameters_stay_tied_in_a_copy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    model[1].weight = model[0].weight
    copied = enter(model).model
    assert copied[1].weight is copied[0].weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.double(), r"conv_in.weight is float64 .*call model.float\(\)"),
        (lambda m: m.to(torch.complex64), "conv_in.weight is complex64"),
        (lambda m: m.body.to(torch.float8_e4m3fn), "body.weight is float8_e4m3fn: cast layer by"),
        (lambda m: m.mix.to("meta"), r"mix.weight has no values \(device meta\)"),
        (lambda m: m.add_module("more", Lost(torch.zeros(3, dtype=torch.uint8))), "more.weight is"),
        (lambda m: m.add_module("lazy", nn.LazyLinear(3)), "lazy.weight is not initialised"),
        (lambda m: setattr(m.mix, "weight", sparse(m.mix.weight)), "mix.weight has the layout"),
        (lambda m: quantize_(m, Int8WeightOnlyConfig()), r"mix.weight is a torchao\..*Tensor"),
        (
            lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True),
            r"mix is quantized already \(Linear\)",
        ),
        (lambda m: setattr(m, "is_quantized", True), "the model is quantized already"),
        (
            lambda m: accelerate.cpu_offload(m, execution_device="cpu"),
            r"under a hook of accelerate \(AlignDevicesHook",
        ),
        (
            lambda m: accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(m),
            "prepared by accelerate; call accelerator.unwrap_model",
        ),
    ],
)
def test_models_that_are_not_what_they_show_are_refused_by_name(change, message):
    model = TinyNet()
    change(model)
    with pytest.raises(TraceError, match=f"TinyNet: .*{message}") as caught:
        trace(model, EXAMPLE)
    assert "\n" not in str(caught.value)


def sparse(weight):
    return nn.Parameter(weight.detach().to_sparse())


def test_diffusers_casting_and_offloading_are_refused_by_name():
    for hook, change in {
        "layerwise_casting": lambda m: m.enable_layerwise_casting(torch.float8_e4m3fn),
        "group_offloading": lambda m: m.enable_group_offload("cpu", offload_type="leaf_level"),
    }.items():
        model = tiny_unet()
        change(model)
        with pytest.raises(TraceError, match=rf"UNet2DModel: \S+ is under a hook.*\({hook}:"):
            trace(model, unet_example())


def test_quantized_and_scripted_modules_are_refused():
    quantized = quantize(TinyNet(), MPQConfig(refinements=0), net_calls())
    with pytest.raises(TraceError, match="quantized already"):
        trace(quantized, EXAMPLE)
    with pytest.raises(TraceError, match="is scripted"):
        trace(torch.jit.trace(TinyNet(), EXAMPLE["x"]), EXAMPLE)


def test_a_model_is_refused_before_its_trajectories_are_run():
    def never():
        raise AssertionError("calibration data was asked for")
        yield

    with pytest.raises(TraceError, match="float64"):
        quantize(TinyNet().double(), MPQConfig(), never())


# -- the road of a model in half precision ---------------------------------------------------------


def test_a_model_in_half_precision_goes_the_whole_road(tmp_path):
    model = TinyNet().half()
    given = [{"x": call["x"].half()} for call in net_calls()]
    settings = MPQConfig(weight_bits=4, refinements=0, activation_mode="static")
    quantized = quantize(model, settings, given)
    assert quantized.dtype == torch.float16
    output = quantized(**given[0])
    assert output.dtype == torch.float16
    # the same numbers as of the float32 model with the same weights
    wide = quantize(model.float(), settings, [{"x": c["x"].float()} for c in given])
    assert wide.plan == quantized.plan
    assert torch.equal(wide(given[0]["x"].float()).half(), output)
    assert torch.equal(quantized(given[0]["x"].float()), output)
    with pytest.raises(TraceError, match=r"x is torch\.bfloat16, but was traced as torch.float32"):
        quantized(given[0]["x"].bfloat16())
    save(quantized, tmp_path / "packed")
    for skeleton in (TinyNet(), TinyNet().half(), torch.compile(TinyNet())):
        loaded = load(tmp_path / "packed", skeleton)
        assert loaded.signature == quantized.signature
        assert torch.equal(loaded(**given[0]), output)


def test_graphs_take_what_a_model_in_half_precision_takes():
    graph = trace(TinyNet().half(), {"x": net_calls()[0]["x"].half()})
    x = net_calls(1, seed=3)[0]["x"].half()
    with torch.no_grad():
        assert torch.equal(graph(x=x), graph(x=x.float()))
        assert torch.equal(graph(x), graph(x=x.float()))
    unet = trace(plain_unet(), {"sample": torch.ones(2, 1, 8, 8), "timestep": 7})
    sample = torch.ones(2, 1, 8, 8)
    with torch.no_grad():
        single, repeated = (
            unet(sample=sample, timestep=t) for t in (torch.tensor(9), torch.full((2,), 9))
        )
    assert same_bits(single, repeated)


def test_an_argument_that_is_given_twice_or_by_place_is_taken_as_the_model_does():
    model = tiny_unet()
    prepared = prepare(model, MPQConfig(), unet_example())
    given = unet_example()
    with pytest.raises(TraceError, match="'sample' is given twice"):
        prepared(given["sample"], **given)
    names = list(inspect.signature(model.forward).parameters)
    places = [given.get(name) for name in names[: names.index("return_dict")]]
    assert same_bits(prepared(*places, False), prepared(**given, return_dict=False))
    assert prepared(*places, True).sample.shape == given["sample"].shape


def test_the_bits_of_a_saved_float32_model_are_read_without_a_dtype(tmp_path):
    from records import read_back

    from mpqdm_fx.graph.calling import signature_to_dict
    from mpqdm_fx.graph.signature import Signature

    signature = trace(TinyNet(), EXAMPLE).meta["signature"]
    stored = signature_to_dict(signature)
    assert read_back(Signature, stored) == signature
    del stored["dtype"]  # as older versions wrote it
    assert read_back(Signature, stored) == signature


def test_a_diffusers_model_in_half_precision_keeps_its_output_class_and_dtype():
    model = tiny_unet().bfloat16()
    prepared = prepare(model, MPQConfig(), {**unet_example(), "sample": torch.zeros(2, 1, 8, 8)})
    output = prepared(**unet_example())
    assert type(output) is type(UNet2DModel.forward.__globals__["UNet2DOutput"](sample=None))
    assert output.sample.dtype == torch.bfloat16
    assert same_bits(prepared(**unet_example(), return_dict=False)[0], output.sample)


def test_trajectories_of_a_model_in_half_precision_are_those_of_its_float32_copy():
    from diffusers import DDIMScheduler
    from small import TinyDenoiser

    def batches(model):
        return Trajectories(
            model, DDIMScheduler(), num_trajectories=2, num_inference_steps=2, batch_size=2,
            seed=0, sample_shape=(2, 6, 10),
        )  # fmt: skip

    model = TinyDenoiser().half()
    trajectories = list(batches(model))
    assert model.conv_in.weight.dtype == torch.float16
    assert same_bits(trajectories, list(batches(model.float())))
