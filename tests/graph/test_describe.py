"""A graph's description tells apart what computes other numbers, and the graph is made from it."""

import copy
import json

import pytest
import torch
from model_zoo import UNETS
from small import TinyNet, condition_calls, net_calls, tiny_condition_unet
from torch import nn

from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.graph.describe import code_in, describe, first_difference, read_names
from mpqdm_fx.graph.fingerprint import graph_fingerprint
from mpqdm_fx.graph.leaves import LEAF_CLASSES
from mpqdm_fx.graph.literals import literal, target_name, target_of, value_of
from mpqdm_fx.graph.rebuild import infer_values, rebuild
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.records.config import MPQConfig


def rebuilt(graph_module):
    description = json.loads(json.dumps(describe(graph_module)))
    result = rebuild(description, graph_module.meta["signature"])
    # a weight that wants a gradient is multiplied by another kernel
    state = {name: value.detach() for name, value in graph_module.state_dict().items()}
    result.load_state_dict(state, assign=True)
    infer_values(result)
    return result


def shapes(graph_module):
    """Dtype and shape of every tensor value, None for a size that varies."""
    values = {}
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes = [size if isinstance(size, int) else None for size in value.shape]
            values[node.name] = (value.dtype, sizes)
    return values


@pytest.fixture(scope="module")
def graph():
    return normalized(tiny_condition_unet(), condition_calls()[0], MPQConfig())


def assert_made_again(graph_module):
    again = rebuilt(graph_module)
    assert first_difference(describe(again), describe(graph_module)) is None
    assert again.code == graph_module.code
    frozen = copy.deepcopy(graph_module).requires_grad_(False)
    inputs = example_inputs(graph_module.meta["signature"])
    with torch.no_grad():
        assert same_bits(again(**inputs), frozen(**inputs))
    return again


def test_a_graph_is_made_again_from_its_description_alone(graph):
    again = assert_made_again(graph)
    assert shapes(again) == shapes(graph)
    paths = [
        [
            list(node.meta["nn_module_stack"].values())[-1][0]
            for node in graph_module.graph.nodes
            if node.op == "call_module"
        ]
        for graph_module in (again, graph)
    ]
    assert paths[0] == paths[1]


@pytest.mark.matrix
@pytest.mark.parametrize("case", UNETS, ids=lambda case: case.name)
def test_every_unet_of_diffusers_is_made_again_from_its_description(case):
    assert_made_again(normalized(case.model(), case.inputs(2, 500), MPQConfig()))


# Each setting of a stock layer, changed on the layer after it was made: what is told, and how.
CHANGES = [
    (nn.Conv2d(3, 4, 3, padding=1), "padding_mode", "circular"),
    (nn.Conv2d(3, 4, 3, padding=1), "_reversed_padding_repeated_twice", [2, 2, 2, 2]),
    (nn.Conv2d(3, 4, 3), "stride", (2, 2)),
    (nn.Conv2d(3, 4, 3), "padding", (1, 0)),
    (nn.Conv2d(3, 4, 3), "dilation", (2, 1)),
    (nn.Conv2d(4, 4, 3), "groups", 1.0),  # equal to 1 in Python
    (nn.ConvTranspose2d(3, 4, 3, stride=2), "output_padding", (1, 1)),
    (nn.Embedding(5, 4), "max_norm", 1.0),
    (nn.GroupNorm(2, 4), "num_groups", 4),
    (nn.GroupNorm(2, 4), "eps", 1e-6),
    (nn.LayerNorm(4), "eps", 1e-6),
    (nn.LayerNorm((2, 4)), "normalized_shape", (4,)),
    (nn.RMSNorm(4), "eps", 1e-6),
    (nn.BatchNorm2d(4), "eps", 1e-3),
    (nn.GELU(), "approximate", "tanh"),
    (nn.LeakyReLU(), "negative_slope", 0.2),
    (nn.SiLU(), "inplace", True),
    (nn.Dropout(), "p", 0.25),
    (nn.Softmax(dim=1), "dim", -1),
    (nn.Softplus(), "threshold", 10.0),
    (nn.ELU(), "alpha", float("inf")),
    (nn.Hardtanh(), "max_val", 2.0),
]


def called(layer):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("layer", (x,)))
    return torch.fx.GraphModule({"layer": layer}, graph)


@pytest.mark.parametrize(("layer", "name", "value"), CHANGES, ids=lambda v: str(v)[:40])
def test_every_setting_of_a_layer_tells_two_graphs_apart_by_name(layer, name, value):
    changed = copy.deepcopy(layer)
    setattr(changed, name, value)
    before, after = called(layer), called(changed)
    assert first_difference(describe(before), describe(before)) is None
    assert f"layer.{name} is" in first_difference(describe(after), describe(before))
    assert graph_fingerprint(after) != graph_fingerprint(before)


@pytest.mark.parametrize("stock", LEAF_CLASSES, ids=lambda stock: stock.__name__)
def test_what_a_layer_reads_is_read_off_its_code(stock):
    names = read_names(stock)
    assert "forward" in names
    constants = set(getattr(stock, "__constants__", ())) & names
    assert not {name for name in constants if hasattr(nn.Module, name)}


def test_a_method_set_on_a_layer_is_code_and_so_is_a_subclass_with_one():
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    patched = nn.Conv2d(3, 4, 3)
    patched._conv_forward = lambda x, weight, bias: x
    hooked = nn.Linear(3, 4)
    hooked.register_forward_hook(lambda *_: None)
    assert "layer._conv_forward is" in code_in(describe(called(patched)))
    assert "Shifted" in code_in(describe(called(Shifted(3, 4))))
    assert "hook" in code_in(describe(called(hooked)))
    assert code_in(describe(called(nn.Conv2d(3, 4, 3)))) is None
    with pytest.raises(ArtifactError, match="_conv_forward"):
        rebuild(describe(called(patched)), None)


def test_two_methods_of_one_name_have_two_fingerprints():
    def patched(factor):
        layer = nn.Linear(3, 4)
        layer.weight.data.fill_(1)
        layer.bias.data.fill_(0)
        layer.forward = {1: lambda x: x + 1, 2: lambda x: x + 2}[factor]
        return graph_fingerprint(called(layer))

    assert patched(1) == patched(1) != patched(2)


def test_constants_of_a_graph_and_the_bits_of_tensors_count():
    class Scaled(TinyNet):
        factor = 1.5

        def forward(self, x):
            return super().forward(x) * self.factor

    first, second = Scaled(), Scaled()
    second.factor = 2.0
    graphs = [trace(model, net_calls()[0]) for model in (first, second)]
    difference = first_difference(*map(describe, reversed(graphs)))
    assert "[conv_out, 2.0] and not [conv_out, 1.5]" in difference
    state = trace(TinyNet(), net_calls()[0])
    before = graph_fingerprint(state)
    with torch.no_grad():
        state.conv_in.bias[0] = torch.nextafter(state.conv_in.bias[0], torch.tensor(9.0))
    assert graph_fingerprint(state) != before


VALUES = [
    None, True, 3, -0.0, 1e-12, float("inf"), "text", [1, (2, 3)], (1, [2]), {"a": (1,), 2: None},
    slice(0, None, 2), ..., torch.float32, torch.channels_last, torch.strided, torch.device("cpu"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_arguments_survive_json(value):
    read = value_of(json.loads(json.dumps(literal(value))), {})
    assert repr(read) == repr(value)


@pytest.mark.parametrize(
    "name",
    ["aten.from_file.default", "os.system", "operator.attrgetter", "aten.__class__.mro", None, 3,
     "aten.save.default", "aten.warn.default", "aten._print.default", "aten.manual_seed.default",
     "aten.add_.Tensor", "aten.add.out",
     "quantized_decomposed.quantize_per_tensor.default", "aten.add", {"code": "os.system"}],
    ids=str,
)  # fmt: skip
def test_no_other_function_is_called_than_those_of_graphs(name):
    with pytest.raises((ValueError, TypeError)):
        target_of(name)


def test_functions_of_graphs_survive_json():
    for function in (
        torch.ops.aten.add.Tensor,
        torch.ops.aten._assert_tensor_metadata.default,
        torch.sym_max,
    ):
        assert target_of(json.loads(json.dumps(target_name(function)))) is function


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d["nodes"][0].__setitem__(2, "x=print('run')"),
        lambda d: d["nodes"][0].__setitem__(0, "x):\n print("),
        lambda d: d["nodes"][1].__setitem__(2, 'conv_in")(print("run'),
        lambda d: d["nodes"][1].__setitem__(4, {"x=print('run'), y": 1}),
        lambda d: d["nodes"][1].__setitem__(1, "call_method"),
        lambda d: d["nodes"].pop(1),
        lambda d: d["nodes"].append(d["nodes"][1]),
        lambda d: d["modules"]["conv_in"].update({"class": "Sequential"}),
        lambda d: d["modules"]["conv_in"]["settings"].update({"__dict__": {}}),
        lambda d: d["modules"]["conv_in"]["settings"].update({"forward": 1}),
        lambda d: d["modules"]["conv_in"]["tensors"].update({"weight": ["parameter", "f", [1]]}),
        lambda d: d["modules"]["conv_in"]["tensors"].update({"forward": None}),
        lambda d: d["modules"].update({"a..b": {"same": "conv_in"}}),
        lambda d: d.update({"model": "A(object)"}),
    ],
    ids=range(14),
)
def test_a_damaged_description_is_refused_and_nothing_in_it_runs(damage, capsys):
    graph_module = trace(TinyNet(), net_calls()[0])
    description = json.loads(json.dumps(describe(graph_module)))
    damage(description)
    with pytest.raises(ArtifactError, match="damaged"):
        rebuild(description, graph_module.meta["signature"])
    assert capsys.readouterr().out == ""


def test_a_group_norm_that_does_not_fit_is_refused_where_shapes_are_found(graph):
    description = json.loads(json.dumps(describe(graph)))
    norms = [e for e in description["modules"].values() if e.get("class") == "GroupNorm"]
    norms[0]["settings"]["num_groups"] = 7
    again = rebuild(description, graph.meta["signature"])
    again.load_state_dict(graph.state_dict(), assign=True)
    with pytest.raises(ArtifactError, match="divisible"):
        infer_values(again)
