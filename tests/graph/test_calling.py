import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import read_back
from small import tiny_unet, unet_calls

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.graph.calling import (
    example_inputs,
    pack_output,
    signature_to_dict,
    split_batch,
)
from mpqdm_fx.graph.signature import InputSpec, Signature


def _signature(largest: int | None = 7) -> Signature:
    specs = (
        InputSpec(name="sample", shape=(3, 2, 4), dtype=torch.float32, batch_axis=0),
        InputSpec(name="timestep", shape=(3,), dtype=torch.int64, batch_axis=0),
        InputSpec(
            name="added.ids", shape=(6, 5), dtype=torch.int64, batch_axis=0, batch_multiple=2
        ),
        InputSpec(name="added.table", shape=(9, 2), dtype=torch.float32),
        InputSpec(name="pair.0", shape=(3, 1), dtype=torch.float32, batch_axis=0),
        InputSpec(name="pair.1", shape=(3, 2), dtype=torch.float32, batch_axis=0),
    )
    return Signature(
        model_class="Net",
        parameters=("sample", "timestep", "added", "pair", "flag"),
        arguments=("sample", "timestep", "added", "pair"),
        baked=(("flag", True),),
        inputs=specs,
        batch=3,
        batch_range=(1, largest),
    )


def test_the_numbers_of_a_mask_are_zero_or_one():
    mask = InputSpec(name="more.attention_mask", shape=(40, 3), dtype=torch.float32)
    signature = Signature(
        model_class="Net",
        parameters=("more",),
        arguments=("more",),
        inputs=(mask,),
        batch=1,
    )
    (values,) = example_inputs(signature)["more"].values()
    assert values.dtype is torch.float32
    assert set(values.unique().tolist()) == {0.0, 1.0}


@given(st.sampled_from([None, 7, 63]))
def test_a_signature_survives_json(largest):
    signature = _signature(largest)
    assert read_back(Signature, signature_to_dict(signature)) == signature


@given(batch=st.integers(1, 9), seed=st.integers(0, 9))
def test_example_inputs_have_the_traced_shapes_at_any_batch(batch, seed):
    inputs = example_inputs(_signature(), batch_size=batch, seed=seed)
    assert inputs["sample"].shape == (batch, 2, 4)
    assert inputs["added"]["ids"].shape == (2 * batch, 5)
    assert inputs["added"]["table"].shape == (9, 2)
    assert [part.shape for part in inputs["pair"]] == [(batch, 1), (batch, 2)]
    again = example_inputs(_signature(), batch_size=batch, seed=seed)
    assert torch.equal(inputs["sample"], again["sample"])


@settings(max_examples=30)
@given(batch=st.integers(1, 30), largest=st.integers(1, 10))
def test_the_parts_of_a_split_batch_are_the_batch_in_order(batch, largest):
    inputs = example_inputs(_signature(), batch_size=batch)
    parts = split_batch(_signature(largest), {**inputs, "flag": True})
    assert len(parts) == -(-batch // largest)
    assert all(len(part["sample"]) <= largest for part in parts)
    assert all(part["flag"] is True for part in parts)
    assert all(part["added"]["table"] is inputs["added"]["table"] for part in parts)
    for pick in (
        lambda call: call["sample"],
        lambda call: call["timestep"],
        lambda call: call["added"]["ids"],
        lambda call: call["pair"][1],
    ):
        assert torch.equal(torch.cat([pick(part) for part in parts]), pick(inputs))


def test_a_shared_timestep_is_not_split():
    inputs = {**example_inputs(_signature(), batch_size=20), "timestep": torch.tensor([5])}
    assert all(part["timestep"].shape == (1,) for part in split_batch(_signature(), inputs))


@pytest.fixture(scope="module")
def traced():
    return trace(tiny_unet(), unet_calls(1)[0])


def test_the_output_is_packed_into_the_models_own_class(traced):
    call = unet_calls(1)[0]
    output = pack_output(traced.meta["signature"], traced(**call))
    expected = tiny_unet()(**call)
    assert type(output) is type(expected)
    assert torch.equal(output.sample, expected.sample)


def test_a_traced_signature_survives_json(traced):
    signature = traced.meta["signature"]
    assert read_back(Signature, signature_to_dict(signature)) == signature
