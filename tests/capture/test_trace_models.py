"""trace is bit-equal to eager execution on diffusers' models, at several timesteps and batches."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0 as IPAttention
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from model_zoo import ALL, REFUSED, by_name
from torch import fx, nn
from zoo_base import Case, normal

from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import TraceError

TIMESTEPS = (1, 250, 999)
QUICK = (
    "UNet2DModel",
    "UNet2DConditionModel/sdxl",
    "UNet1DModel/diffuser",
    "DiTTransformer2DModel",
)
FIXED_BATCH = {
    "ChromaTransformer2DModel",
    "HiDreamImageTransformer2DModel",
    "LuminaNextDiT2DModel",
    "MochiTransformer3DModel",
    "OmniGenTransformer2DModel",
    "OmniGenTransformer2DModel/images",
    "TransformerTemporalModel",
    "ZImageTransformer2DModel",
}


def assert_bit_equal(model: nn.Module, graph_module: fx.GraphModule, case: Case) -> None:
    signature = graph_module.meta["signature"]
    options = {"return_dict": False} if "return_dict" in signature.parameters else {}
    for batch in (1, 3) if signature.dynamic_batch else (2,):
        for timestep in TIMESTEPS:
            inputs = case.inputs(batch, timestep)
            with torch.no_grad():
                expected = model(**inputs, **options)
                result = graph_module(**signature.normalize((), inputs))
            assert same_bits(result, expected), (batch, timestep)


def assert_traced(case: Case) -> None:
    model = case.model()
    graph_module = trace(model, case.inputs(2, 7))
    assert graph_module.meta["signature"].dynamic_batch == (case.name not in FIXED_BATCH)
    assert_bit_equal(model, graph_module, case)
    # every layer that the model calls is called in the graph, not inlined
    inlined = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
    assert {f"{name}.weight" for name in called_layers(model, case)} & inlined == set()


def called_layers(model: nn.Module, case: Case) -> set[str]:
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: called.add(name))
        for name, module in model.named_modules()
        if type(module) in (nn.Conv2d, nn.Linear)
    ]
    with torch.no_grad():
        model(**case.inputs(1, 7))
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize("name", QUICK)
def test_trace_is_bit_equal_on(name: str) -> None:
    assert_traced(by_name(name))


@pytest.mark.matrix
@pytest.mark.parametrize("case", [c for c in ALL if c.name not in QUICK], ids=lambda c: c.name)
def test_every_class_is_bit_equal_or_refused_with_its_line(case: Case) -> None:
    if case.name in REFUSED:
        with pytest.raises(TraceError, match=REFUSED[case.name]):
            trace(case.model(), case.inputs(2, 7))
    else:
        assert_traced(case)


# -- variants of one model ---------------------------------------------------


def set_processor(model: nn.Module, processor: object) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(copy.deepcopy(processor))


class ScaledAttention(AttnProcessor):
    """A custom processor that takes a keyword argument from ``cross_attention_kwargs``."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args, gain=1.0, **kwargs):
        return gain * super().__call__(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("processor", "operator"),
    [
        (AttnProcessor(), "aten.softmax.int"),
        (AttnProcessor2_0(), "aten.scaled_dot_product_attention.default"),
    ],
)
def test_attention_processors_decide_the_operators(processor: object, operator: str) -> None:
    case = by_name("UNet2DModel")
    model = case.model()
    set_processor(model, processor)
    graph_module = trace(model, case.inputs(2, 7))
    assert operator in {str(n.target) for n in graph_module.graph.nodes}
    assert_bit_equal(model, graph_module, case)


@pytest.mark.matrix
def test_custom_attention_with_keyword_arguments() -> None:
    base = by_name("UNet2DConditionModel")
    case = Case(
        name="scaled",
        build=base.build,
        inputs=lambda b, t: base.inputs(b, t) | {"cross_attention_kwargs": {"gain": 0.5}},
    )
    model = case.model()
    set_processor(model, ScaledAttention())
    graph_module = trace(model, case.inputs(2, 7))
    assert_bit_equal(model, graph_module, case)
    unscaled = trace(model, base.inputs(2, 7))
    inputs = graph_module.meta["signature"].normalize((), case.inputs(2, 7))
    assert not same_bits(graph_module(**inputs), unscaled(**inputs))
    with pytest.raises(TraceError, match="cross_attention_kwargs"):
        graph_module.meta["signature"].normalize(
            (), base.inputs(2, 7) | {"cross_attention_kwargs": {"gain": 0.7}}
        )


def test_fuse_qkv_projections_of_the_model() -> None:
    case = by_name("UNet2DConditionModel")
    model = case.model()
    model.fuse_qkv_projections()
    graph_module = trace(model, case.inputs(2, 7))
    names = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    assert any(name.endswith("attn1.to_qkv") for name in names)
    assert any(name.endswith("attn2.to_kv") for name in names)
    assert_bit_equal(model, graph_module, case)


@pytest.mark.matrix
def test_gradient_checkpointing_changes_nothing() -> None:
    case = by_name("UNet2DModel")
    model = case.model()
    plain = trace(model, case.inputs(2, 7))
    model.enable_gradient_checkpointing()
    model.train()
    graph_module = trace(model, case.inputs(2, 7))
    assert all(module.training for module in model.modules())
    model.eval()
    assert graph_module.code == plain.code
    assert_bit_equal(model, graph_module, case)


def test_circular_padding_keeps_the_convolutions() -> None:
    case = by_name("UNet2DModel")
    model = case.model()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    graph_module = trace(model, case.inputs(2, 7))
    assert "aten.pad.default" not in {str(n.target) for n in graph_module.graph.nodes}
    assert_bit_equal(model, graph_module, case)


def test_shared_activation_is_called_by_many_names_and_stays_one_object() -> None:
    case = by_name("UNet2DModel")
    model = case.model()
    graph_module = trace(model, case.inputs(2, 7))
    calls = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    acts = [graph_module.get_submodule(c) for c in calls if c.endswith("nonlinearity")]
    assert len(acts) > len({id(act) for act in acts})


@pytest.mark.matrix
def test_image_prompt_adapter_with_a_list_of_embeddings() -> None:
    base = by_name("UNet2DConditionModel")

    def build() -> nn.Module:
        model = base.build()
        model.encoder_hid_proj = MultiIPAdapterImageProjection(
            [ImageProjection(image_embed_dim=20, cross_attention_dim=24, num_image_text_embeds=2)]
        )
        model.config.encoder_hid_dim_type = "ip_image_proj"
        for name, module in model.named_modules():
            if isinstance(module, Attention) and name.endswith("attn2"):
                width = module.to_q.in_features
                module.set_processor(
                    IPAttention(hidden_size=width, cross_attention_dim=24, num_tokens=(2,))
                )
        return model

    def inputs(batch: int, timestep: int) -> dict[str, object]:
        embeds = [normal(batch, 1, 20, seed=5)]
        return base.inputs(batch, timestep) | {"added_cond_kwargs": {"image_embeds": embeds}}

    case = Case(name="ip-adapter", build=build, inputs=inputs)
    model = case.model()
    graph_module = trace(model, case.inputs(2, 7))
    names = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    assert any("to_k_ip" in name for name in names)
    assert_bit_equal(model, graph_module, case)
