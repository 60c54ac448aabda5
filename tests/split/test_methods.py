"""A graph split into methods computes the bits of the whole, and each value once where it can."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
from mpqdm_fx.graph.editing import replace_module
from mpqdm_fx.run.cost import bind_sizes, multiply_adds, node_cost
from mpqdm_fx.split.methods import run_methods, split_methods
from mpqdm_fx.testing import assert_same_function, digest, graphs

PROMPT = {"encode_prompt": ["encoder_hidden_states"]}


@pytest.fixture(scope="module")
def text_unet():
    return trace(tiny_condition_unet(), condition_calls(1)[0])


@pytest.fixture(scope="module")
def sdxl_unet():
    return trace(tiny_sdxl_unet(), sdxl_calls(1)[0])


def assert_same_bits(whole, methods, inputs):
    class Chain(nn.Module):
        def forward(self, **inputs):
            return run_methods(methods, inputs)

    assert_same_function(whole, Chain(), inputs)


def targets(graph_module):
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]


def test_prompt_method_has_the_keys_and_values_of_all_cross_attentions(text_unet):
    before = digest(text_unet)
    methods = split_methods(text_unet, PROMPT)
    assert list(methods) == ["encode_prompt", "denoise"]
    hoisted = [t for t in targets(text_unet) if t.endswith(("attn2.to_k", "attn2.to_v"))]
    assert targets(methods["encode_prompt"]) == hoisted
    assert sorted(targets(methods["denoise"]) + hoisted) == sorted(targets(text_unet))
    arguments = methods["denoise"].meta["signature"].arguments
    assert arguments == ("sample", "timestep", *(t.replace(".", "_") for t in hoisted))
    assert digest(text_unet) == before


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_methods_of_a_text_unet_give_its_bits_at_every_batch_size(text_unet, batch):
    methods = split_methods(text_unet, PROMPT)
    (inputs,) = condition_calls(1, batch=batch, seed=batch)
    assert_same_bits(text_unet, methods, inputs)


def test_values_of_one_prompt_serve_every_step(text_unet):
    methods = split_methods(text_unet, PROMPT)
    first, second = condition_calls(2)
    prompt = first.pop("encoder_hidden_states")
    values = methods["encode_prompt"](encoder_hidden_states=prompt)
    for call in (first, {**second, "encoder_hidden_states": prompt}):
        call.pop("encoder_hidden_states", None)
        (actual,) = methods["denoise"](**call, **values)
        (expected,) = text_unet(**call, encoder_hidden_states=prompt)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_added_conditions_of_an_sdxl_unet_are_computed_with_the_prompt(sdxl_unet, batch):
    groups = {"encode_prompt": ["encoder_hidden_states", "added_cond_kwargs"]}
    methods = split_methods(sdxl_unet, groups)
    assert "add_embedding.linear_2" in targets(methods["encode_prompt"])
    assert "time_embedding.linear_2" in targets(methods["denoise"])
    arguments = methods["denoise"].meta["signature"].arguments
    assert "add_embedding_linear_2" in arguments
    assert not {"added_cond_kwargs", "encoder_hidden_states"} & set(arguments)
    assert_same_bits(sdxl_unet, methods, sdxl_calls(1, batch=batch)[0])


def test_groups_have_a_method_each(sdxl_unet):
    groups = {
        "encode_prompt": ["encoder_hidden_states"],
        "encode_size": ["added_cond_kwargs"],
        "encode_time": ["timestep"],
    }
    methods = split_methods(sdxl_unet, groups, rest="step")
    assert list(methods) == [*groups, "step"]
    assert "time_embedding.linear_2" in targets(methods["encode_time"])
    # what mixes both stays where they meet
    assert any(t.endswith("time_emb_proj") for t in targets(methods["step"]))
    assert_same_bits(sdxl_unet, methods, sdxl_calls(1)[0])


def test_class_labels_are_embedded_in_a_method_of_their_own():
    inputs, call = unet_calls(2)
    whole = trace(tiny_unet(), inputs)
    methods = split_methods(whole, {"encode_class": ["class_labels"]})
    assert targets(methods["encode_class"]) == ["class_embedding"]
    assert_same_bits(whole, methods, call)


def test_whole_time_branch_leaves_a_unet_without_other_conditions(text_unet):
    methods = split_methods(text_unet, {"encode_time": ["timestep"]})
    hoisted = targets(methods["encode_time"])
    assert not [t for t in targets(methods["denoise"]) if "time_e" in t]
    assert sum(t.endswith("time_emb_proj") for t in hoisted) > 3
    assert_same_bits(text_unet, methods, condition_calls(1)[0])


def test_multiply_adds_of_a_step_fall_by_those_of_the_hoisted_layers(text_unet):
    methods = split_methods(text_unet, PROMPT)
    (inputs,) = condition_calls(1, batch=3)
    sizes = bind_sizes(text_unet, inputs)
    hoisted = [
        node_cost(text_unet, node, sizes)
        for node in text_unet.graph.nodes
        if str(node.target).endswith(("attn2.to_k", "attn2.to_v"))
    ]
    whole, encode, step = (
        multiply_adds(graph, sizes)
        for graph in (text_unet, methods["encode_prompt"], methods["denoise"])
    )
    assert whole - step == encode == sum(hoisted)
    layers = [text_unet.get_submodule(t) for t in targets(methods["encode_prompt"])]
    assert encode == 3 * 7 * sum(layer.weight.numel() for layer in layers)


def test_methods_share_modules_with_the_graph(text_unet):
    methods = split_methods(text_unet, PROMPT)
    for method in methods.values():
        for name in targets(method):
            assert method.get_submodule(name) is text_unet.get_submodule(name)
    encode = methods["encode_prompt"]
    assert set(encode.state_dict()) == {f"{name}.weight" for name in targets(encode)}


def test_signatures_of_methods_tell_what_they_take(sdxl_unet):
    groups = {"encode_prompt": ["encoder_hidden_states", "added_cond_kwargs"]}
    methods = split_methods(sdxl_unet, groups)
    (inputs,) = sdxl_calls(1, batch=4)
    prompt = {name: inputs.pop(name) for name in groups["encode_prompt"]}
    encode, step = (method.meta["signature"] for method in methods.values())
    assert [s.name for s in encode.inputs] == [
        "encoder_hidden_states",
        "added_cond_kwargs.text_embeds",
        "added_cond_kwargs.time_ids",
    ]
    values = methods["encode_prompt"](**encode.normalize((), prompt))
    taken = step.normalize((), {**inputs, **values})
    assert list(taken) == list(step.arguments)
    for name, value in values.items():
        assert step.spec(name).shape_at(4) == value.shape
        assert step.spec(name).dtype == value.dtype
    assert step.output_class == sdxl_unet.meta["signature"].output_class
    assert encode.output_class is None


class Mixed(nn.Module):
    """Views, entries and expansions of a condition, and a value read in two layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.table = nn.Parameter(torch.arange(6.0))

    def forward(self, sample, condition, bare):
        e = self.embed(condition) * self.table
        wide = e.unsqueeze(1).expand(-1, 50, -1)
        return sample + wide + e.flip(-1).unsqueeze(1), bare["x"].view(-1) + sample.mean()


def mixed_inputs(batch=2):
    return {
        "sample": torch.randn(batch, 50, 6),
        "condition": torch.randn(batch, 4),
        "bare": {"x": torch.randn(batch, 3), "y": torch.randn(batch, 3)},
    }


def test_bare_views_stay_and_expanded_values_are_passed_narrow():
    torch.manual_seed(0)
    whole = trace(Mixed().eval(), mixed_inputs())
    methods = split_methods(whole, {"encode": ["condition", "bare"]})
    assert [spec.shape for spec in methods["denoise"].meta["signature"].inputs] == [
        (2, 50, 6),
        (2, 3),
        (2, 3),
        (2, 1, 6),
        (2, 1, 6),
    ]
    assert_same_bits(whole, methods, mixed_inputs(5))


def test_value_that_is_read_in_two_layouts_is_passed_once():
    class TwoLayouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 6)

        def forward(self, sample, condition):
            e = self.embed(condition)
            return sample @ e.transpose(1, 2) @ e.unflatten(-1, (2, 3)).flatten(-2)

    torch.manual_seed(0)
    inputs = {"sample": torch.randn(2, 5, 6), "condition": torch.randn(2, 7, 4)}
    whole = trace(TwoLayouts().eval(), inputs)
    methods = split_methods(whole, {"encode": ["condition"]})
    assert methods["denoise"].meta["signature"].arguments == ("sample", "embed")
    assert_same_bits(whole, methods, inputs)


def test_group_for_which_nothing_pays_has_no_method():
    whole = trace(Mixed().eval(), mixed_inputs())
    methods = split_methods(whole, {"encode": ["bare"]})
    assert list(methods) == ["denoise"]
    assert methods["denoise"].meta["signature"] == whole.meta["signature"]
    assert_same_bits(whole, methods, mixed_inputs())


@given(case=graphs(), group=st.sampled_from([["timestep"], ["sample"], ["sample", "timestep"]]))
def test_methods_of_random_graphs_give_their_bits(case, group):
    before = digest(case.graph_module)
    methods = split_methods(case.graph_module, {"once": group})
    assert_same_bits(case.graph_module, methods, case.inputs)
    assert digest(case.graph_module) == before


@pytest.mark.parametrize(
    ("invariant", "message"),
    [
        ({"encode": ["encoder_hidden_state"]}, "did you mean encoder_hidden_states"),
        ({"encode": ["zzz"]}, "it takes sample, timestep, encoder_hidden_states"),
        ({"denoise": ["timestep"]}, "method of the rest"),
        ({"encode": "timestep"}, "collection of argument names"),
        ({"a": ["timestep"], "b": ["timestep"]}, "in two groups: 'a' and 'b'"),
    ],
)
def test_groups_that_make_no_sense_are_refused(text_unet, invariant, message):
    with pytest.raises(ConfigError, match=message):
        split_methods(text_unet, invariant)


def test_graph_that_writes_in_place_is_refused():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x, y):
            return self.act(x + 1) + self.act(y * 2)

    x = torch.randn(2, 3)
    graph = trace(InPlace(), {"x": x, "y": x})
    (node, *_) = graph.graph.find_nodes(op="call_module")
    replace_module(graph, str(node.target), nn.ReLU(inplace=True))  # a trace has none
    with pytest.raises(DialectError, match="writes into its input"):
        split_methods(graph, {"once": ["y"]})


def test_graph_without_signature_is_refused():
    with pytest.raises(DialectError, match="no signature"):
        split_methods(torch.fx.symbolic_trace(nn.Linear(2, 2)), {"once": ["input"]})
