"""The calling convention of a traced graph: what is bound, normalized and refused."""

import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from model_zoo import by_name
from torch import nn

from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.signature import InputSpec, Signature, bind_inputs, tensor_leaves


class Denoiser(nn.Module):
    """The arguments of a UNet; the body does not matter here."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        extra: dict[str, Any] | None = None,
        scale: float = 1.0,
        return_dict: bool = True,
    ) -> Any:
        raise NotImplementedError


def bind(**kwargs: Any) -> tuple[Signature, dict[str, Any]]:
    return bind_inputs(Denoiser(), {"sample": torch.zeros(2, 3, 8, 8), "timestep": 7, **kwargs})


def free_batch(signature: Signature) -> Signature:
    inputs = tuple(dataclasses.replace(spec, batch_axis=0) for spec in signature.inputs)
    return dataclasses.replace(signature, inputs=inputs, batch_range=(1, 8))


@pytest.mark.parametrize(
    ("timestep", "dtype", "value"),
    [
        (7, torch.int64, 7),
        (7.5, torch.float32, 7.5),
        (torch.tensor(7), torch.int64, 7),
        (torch.tensor([7]), torch.int64, 7),
        (torch.tensor(7.5), torch.float32, 7.5),
    ],
)
def test_single_timesteps_become_one_per_sample(
    timestep: Any, dtype: torch.dtype, value: float
) -> None:
    signature, call = bind(timestep=timestep)
    assert call["timestep"].tolist() == [value, value]
    assert call["timestep"].dtype == dtype
    assert signature.spec("timestep").shape == (2,)


def test_numbers_that_forward_takes_as_tensors_become_tensors() -> None:
    _, call = bind(class_labels=3, scale=0.5)
    assert call["class_labels"].tolist() == [3, 3]
    assert call["scale"] == 0.5


def test_arguments_follow_the_order_of_forward_not_of_the_example() -> None:
    signature, call = bind_inputs(
        Denoiser(), {"class_labels": None, "timestep": 1, "sample": torch.zeros(1, 3, 4, 4)}
    )
    assert signature.arguments == ("sample", "timestep")
    assert list(call) == ["sample", "timestep", "class_labels", "return_dict"]


def test_positional_examples_bind_in_order() -> None:
    signature, call = bind_inputs(Denoiser(), (torch.zeros(1, 3, 4, 4), 5))
    assert signature.arguments == ("sample", "timestep")
    assert call["return_dict"] is False


def test_containers_are_named_by_dots_and_their_constants_are_baked() -> None:
    signature, _ = bind(extra={"a": torch.zeros(2, 1), "b": [torch.zeros(2), 4.0], "c": "text"})
    assert [s.name for s in signature.inputs] == ["sample", "timestep", "extra.a", "extra.b.0"]
    assert dict(signature.baked) == {
        "extra.b.1": 4.0,
        "extra.c": "text",
        "return_dict": False,
        "scale": 1.0,
    }


def test_output_class_is_read_from_the_annotation() -> None:
    signature, _ = bind_inputs(by_name("UNet2DModel").build(), (torch.zeros(1, 3, 8, 8), 1))
    assert signature.output_class == "diffusers.models.unets.unet_2d.UNet2DOutput"
    assert bind()[0].output_class is None


class Denoised(NamedTuple):
    sample: torch.Tensor


class DenoiserWithOutput(nn.Module):
    """Its output class stands inside it, where no import finds it."""

    @dataclasses.dataclass
    class Output:
        sample: torch.Tensor

    def forward(self, sample: torch.Tensor) -> Output:
        raise NotImplementedError


class DenoiserWithNames(nn.Module):
    def forward(self, sample: torch.Tensor) -> Denoised:
        raise NotImplementedError


@pytest.mark.parametrize("model", [DenoiserWithOutput(), DenoiserWithNames()])
def test_a_class_that_no_file_can_name_is_no_output_class(model: nn.Module) -> None:
    signature, _ = bind_inputs(model, (torch.zeros(1, 3),))
    assert signature.output_class is None


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_normalize_follows_the_batch(batch: int) -> None:
    signature = free_batch(bind()[0])
    given = signature.normalize((torch.zeros(batch, 3, 8, 8), 9))
    assert list(given) == ["sample", "timestep"]
    assert given["timestep"].tolist() == [9] * batch


def test_normalize_leaves_fitting_tensors_alone() -> None:
    signature = free_batch(bind()[0])
    sample, timestep = torch.zeros(3, 3, 8, 8), torch.tensor([1, 2, 3])
    given = signature.normalize((), {"timestep": timestep, "sample": sample})
    assert given["sample"] is sample
    assert given["timestep"] is timestep


def test_return_dict_and_defaults_are_not_inputs() -> None:
    signature = free_batch(bind()[0])
    sample = torch.zeros(2, 3, 8, 8)
    for return_dict in (True, False):
        given = signature.normalize((sample, 1), {"return_dict": return_dict, "class_labels": None})
        assert list(given) == ["sample", "timestep"]


def test_lossless_timestep_conversions_are_made_and_lossy_ones_refused() -> None:
    signature = free_batch(bind()[0])
    sample = torch.zeros(2, 3, 8, 8)
    given = signature.normalize((sample, torch.tensor([3.0, 4.0])))
    assert given["timestep"].dtype == torch.int64
    with pytest.raises(TraceError, match=r"timestep is torch.float32, but was traced as"):
        signature.normalize((sample, 3.5))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {"timestep": 1}, r"missing argument\(s\) sample"),
        ((None, 1), {}, r"missing argument\(s\) sample"),
        ((), {"smaple": 1}, r"no argument 'smaple'; did you mean sample"),
        ((), {"zzz": 1}, r"no argument 'zzz'; \(sample, timestep"),
        ((1, 2), {"sample": 1}, r"'sample' is given twice"),
        ((0,) * 9, {}, r"9 positional arguments, but forward takes 6"),
        ((torch.zeros(2, 4, 8, 8), 1), {}, r"sample has shape \[2, 4, 8, 8\].*\[2, 3, 8, 8\]"),
        ((torch.zeros(2, 3, 8), 1), {}, r"sample has shape \[2, 3, 8\]"),
        ((torch.zeros(9, 3, 8, 8), 1), {}, r"batch size 9 is outside the traced range 1..8"),
        ((torch.zeros(2, 3, 8, 8).double(), 1), {}, r"sample is torch.float64"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(3).long()), {}, r"timestep has shape \[3\]"),
        (("text", 1), {}, r"sample must be a tensor, not str"),
        (
            (torch.zeros(2, 3, 8, 8), 1),
            {"class_labels": torch.zeros(2)},
            r"'class_labels' was traced as the constant None",
        ),
        ((torch.zeros(2, 3, 8, 8), 1), {"scale": 2.0}, r"'scale' was traced as the constant 1.0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        free_batch(bind()[0]).normalize(args, kwargs)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a": torch.zeros(2, 1)}, "lacks the entry extra.b"),
        ({"a": torch.zeros(2, 1), "b": torch.zeros(2), "k": 2}, "'extra.k' was traced as the cons"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2)}, r"extra.a has shape \[2, 3\]"),
        ([torch.zeros(2, 1)], "'extra.0' was traced as the constant None"),
        (torch.zeros(2), "extra must be a container"),
    ],
)
def test_containers_are_checked_entry_by_entry(extra: Any, message: str) -> None:
    signature, _ = bind(extra={"a": torch.zeros(2, 1), "b": torch.zeros(2), "k": 1})
    with pytest.raises(TraceError, match=message):
        free_batch(signature).normalize((torch.zeros(2, 3, 8, 8), 1), {"extra": extra})


def test_constants_in_containers_may_be_repeated_or_left_out() -> None:
    signature, _ = bind(extra={"a": torch.zeros(2, 1), "k": 1})
    sample = torch.zeros(2, 3, 8, 8)
    for extra in ({"a": torch.zeros(2, 1), "k": 1}, {"a": torch.zeros(2, 1)}):
        given = free_batch(signature).normalize((sample, 1), {"extra": extra})
        assert given["extra"]["a"] is extra["a"]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"sample": torch.zeros(1, 3, 4, 4)}, r"lack the argument\(s\) timestep"),
        ({"sample": 1, "timestep": "x", "scale": 2}, "sample"),
        ({"sample": None, "timestep": None}, "no example input is a tensor"),
        (torch.zeros(1), "must be a dict of keyword arguments or a tuple"),
        ({"timesteps": 1}, "did you mean timestep"),
    ],
)
def test_examples_that_cannot_be_bound_are_refused(example: Any, message: str) -> None:
    if message == "sample":  # a number where forward annotates a tensor is taken as one
        assert bind_inputs(Denoiser(), example)[0].arguments == ("sample",)
        return
    with pytest.raises(TraceError, match=message):
        bind_inputs(Denoiser(), example)


def test_video_inputs_scale_by_their_multiple() -> None:
    spec = InputSpec(
        name="prompts", shape=(6, 5, 4), dtype=torch.float32, batch_axis=0, batch_multiple=3
    )
    assert spec.shape_at(4) == (12, 5, 4)


def test_signature_survives_a_deep_copy() -> None:
    signature = free_batch(bind(extra={"a": torch.zeros(2, 1), "k": 1})[0])
    assert copy.deepcopy(signature) == signature


def test_tensor_leaves_are_in_the_order_of_the_containers() -> None:
    value = {"b": torch.zeros(1), "a": [None, (torch.zeros(2), 3)]}
    assert [name for name, _ in tensor_leaves(value)] == ["b", "a.1.0"]
