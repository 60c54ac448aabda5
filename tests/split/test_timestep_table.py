"""A table over a schedule has the bits of the live time branch, and nothing of it is left."""

import pytest
import torch
from hypothesis import given
from small import (
    condition_calls,
    sdxl_calls,
    tiny_condition_unet,
    tiny_sdxl_unet,
    tiny_unet,
    unet_calls,
)
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ConfigError, DialectError
from mpqdm_fx.run.cost import multiply_adds
from mpqdm_fx.split.methods import run_methods, split_methods
from mpqdm_fx.split.timestep_table import TimestepTable, tabulate_timesteps
from mpqdm_fx.testing import assert_same_function, count, digest, graphs

SCHEDULE = (999, 666, 333, 1, 0)
MODELS = {
    "text": (tiny_condition_unet, condition_calls),
    "sdxl": (tiny_sdxl_unet, sdxl_calls),
    "class": (tiny_unet, unet_calls),
}


@pytest.fixture(scope="module", params=MODELS)
def unet(request):
    make, calls = MODELS[request.param]
    return trace(make(), calls(1)[0]), calls


@pytest.fixture(scope="module")
def text_unet():
    return trace(tiny_condition_unet(), condition_calls(1)[0])


def assert_same_steps(live, table, inputs, *, steps=None, rtol=0.0):
    """The table at each step is the live branch at its timestep."""
    batch = len(inputs["sample"])
    for step, timestep in enumerate(table.meta["timesteps"]):
        if steps is not None and step not in steps:
            continue

        class Live(nn.Module):
            def forward(self, timestep, **kwargs):
                at = torch.tensor(table.meta["timesteps"])[timestep]
                return live(timestep=at, **kwargs)

        given = {**inputs, "timestep": torch.full((batch,), step)}
        assert_same_function(Live(), table, given, rtol=rtol)


def test_table_has_the_bits_of_the_live_branch_at_the_traced_batch_size(unet):
    live, calls = unet
    before = digest(live)
    table = tabulate_timesteps(live, SCHEDULE)
    batch = live.meta["signature"].batch
    assert_same_steps(live, table, calls(1, batch=batch)[0])
    assert digest(live) == before


@pytest.mark.parametrize("batch", [1, 5])
def test_other_batch_sizes_differ_by_the_order_of_sums_alone(unet, batch):
    live, calls = unet
    table = tabulate_timesteps(live, SCHEDULE)
    assert_same_steps(live, table, calls(1, batch=batch)[0], steps=(1,), rtol=1e-5)


def test_samples_may_be_at_different_steps(text_unet):
    table = tabulate_timesteps(text_unet, SCHEDULE)
    (inputs,) = condition_calls(1)
    steps = torch.tensor([3, 1])
    (expected,) = text_unet(**{**inputs, "timestep": torch.tensor(SCHEDULE)[steps]})
    (actual,) = table(**{**inputs, "timestep": steps})
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_whole_time_branch_of_a_text_unet_is_gone(text_unet):
    table = tabulate_timesteps(text_unet, SCHEDULE)
    names = set(table.state_dict())
    assert not [name for name in names if name.startswith("time_embedding")]
    kept = [n for n in names if "time_emb_proj" in n and not n.startswith("timestep_tables")]
    assert not kept
    tables = [m for m in table.modules() if isinstance(m, TimestepTable)]
    projections = [n for n, _ in text_unet.named_modules() if n.endswith("time_emb_proj")]
    assert len(tables) == len(projections) == count(table, TimestepTable)
    assert {len(m.rows) for m in tables} == {len(SCHEDULE)}
    assert multiply_adds(table) < multiply_adds(text_unet)


@pytest.mark.parametrize("kind", ["sdxl", "class"])
def test_what_another_input_is_added_to_stays_live_behind_one_table(kind):
    make, calls = MODELS[kind]
    table = tabulate_timesteps(trace(make(), calls(1)[0]), SCHEDULE)
    assert [n for n, m in table.named_modules() if isinstance(m, TimestepTable)] == [
        "timestep_tables.time_embedding_linear_2"
    ]


def test_table_and_methods_combine(text_unet):
    prompt = {"encode_prompt": ["encoder_hidden_states"]}
    (inputs,) = condition_calls(1)
    inputs["timestep"] = torch.tensor([2, 2])
    live = text_unet(**{**inputs, "timestep": torch.tensor([SCHEDULE[2]] * 2)})
    table_then_split = split_methods(tabulate_timesteps(text_unet, SCHEDULE), prompt)
    methods = split_methods(text_unet, prompt)
    methods["denoise"] = tabulate_timesteps(methods["denoise"], SCHEDULE)
    for chain in (table_then_split, methods):
        torch.testing.assert_close(run_methods(chain, inputs)[0], live[0], rtol=1e-4, atol=1e-5)


def test_signature_takes_the_step_as_the_model_takes_its_timestep(text_unet):
    table = tabulate_timesteps(text_unet, SCHEDULE)
    signature = table.meta["signature"]
    assert signature.arguments == text_unet.meta["signature"].arguments
    (inputs,) = condition_calls(1)
    taken = signature.normalize((inputs["sample"], 4, inputs["encoder_hidden_states"]))
    assert taken["timestep"].tolist() == [4, 4]
    assert taken["timestep"].dtype == torch.int64
    assert table(**taken)[0].shape == inputs["sample"].shape
    assert table.meta["timesteps"] == SCHEDULE


@pytest.mark.parametrize("step", [5, 999, -1])
def test_step_outside_the_table_is_refused_clearly(text_unet, step):
    table = tabulate_timesteps(text_unet, SCHEDULE)
    (inputs,) = condition_calls(1)
    with pytest.raises(ConfigError, match=rf"step {step} is outside .* steps 0\.\.4 .*999 to 0"):
        table(**{**inputs, "timestep": torch.tensor([0, step])})


def test_exported_table_is_a_plain_selection(text_unet):
    table = tabulate_timesteps(text_unet, SCHEDULE)
    (inputs,) = condition_calls(1)
    inputs["timestep"] = torch.tensor([1, 1])
    exported = torch.export.export(table, (), kwargs=inputs, strict=False)
    nodes = exported.graph.find_nodes(
        op="call_function", target=torch.ops.aten.index_select.default
    )
    assert len(nodes) == count(table, TimestepTable)
    assert torch.equal(exported.module()(**inputs)[0], table(**inputs)[0])


@given(case=graphs(kinds=("time_embedding", "conv", "linear")))
def test_tables_of_random_graphs_compute_what_they_do(case):
    if not any(block.kind == "time_embedding" for block in case.spec.blocks):
        with pytest.raises(DialectError, match="nothing reads 'timestep'"):
            tabulate_timesteps(case.graph_module, range(10))
        return
    table = tabulate_timesteps(case.graph_module, range(10))
    inputs = {**case.inputs, "timestep": case.inputs["timestep"][:1].repeat(case.spec.batch)}
    assert_same_function(case.graph_module, table, inputs, rtol=1e-5)


def test_timestep_that_is_read_as_it_is_becomes_a_table_too():
    class Scaled(nn.Module):
        def forward(self, sample, timestep):
            return sample * timestep[:, None]

    inputs = {"sample": torch.randn(2, 3), "timestep": torch.tensor([5.5, 6.5])}
    live = trace(Scaled(), inputs)
    table = tabulate_timesteps(live, [6.5, 0.25])
    (want,) = (live(inputs["sample"], torch.tensor([0.25, 6.5])),)
    assert torch.equal(table(inputs["sample"], torch.tensor([1, 0])), want)


def test_timesteps_that_the_graph_cannot_take_are_refused(text_unet):
    with pytest.raises(ConfigError, match=r"timestep 3.5 cannot be given .*int64"):
        tabulate_timesteps(text_unet, [1, 3.5])
    with pytest.raises(ConfigError, match="no timesteps"):
        tabulate_timesteps(text_unet, [])


def test_graphs_without_a_time_branch_or_with_tables_are_refused(text_unet):
    net = trace(nn.Linear(2, 2), {"input": torch.randn(2, 2)})
    with pytest.raises(DialectError, match="no noise level of shape"):
        tabulate_timesteps(net, [1])
    with pytest.raises(DialectError, match="tables already"):
        tabulate_timesteps(tabulate_timesteps(text_unet, [1]), [1])


def test_values_that_mix_samples_are_refused():
    class Centred(nn.Module):
        def forward(self, sample, timestep):
            return sample * (timestep - timestep.mean())[:, None]

    inputs = {"sample": torch.randn(2, 3), "timestep": torch.tensor([5.5, 6.5])}
    with pytest.raises(DialectError, match="mixes the timesteps"):
        tabulate_timesteps(trace(Centred(), inputs), [6.5, 0.25])
