"""The sensitivity table: what it predicts, what it costs to allocate by it, and its file."""

import dataclasses

import pytest
import torch
from records import change_tensor, edit_record, flip
from safetensors.torch import save_file
from small import TinyEDM, TinyNet, edm_calls, net_calls, tiny_unet, unet_calls

from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.probes import output_energies
from mpqdm_fx.bits.sensitivity import measure_sensitivity
from mpqdm_fx.bits.sensitivity_table import SensitivityTable
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import ArtifactError, CalibrationError, ConfigError
from mpqdm_fx.graph.fingerprint import graph_fingerprint
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.io.tensors import write_record
from mpqdm_fx.numerics.bits.budget import LayerChoice, allocate_budget, total_bits, total_cost
from mpqdm_fx.passes.quantize.round_weights import RoundWeights
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import BitPlan, LayerPlan


@pytest.fixture(scope="module")
def net():
    calls = net_calls(calls=4, batch=4)
    graph = trace(TinyNet(), calls[0])
    return graph, calls, measure_sensitivity(graph, calls, probes=8)


@pytest.fixture(scope="module")
def unet():
    calls = unet_calls(calls=6)
    graph = trace(tiny_unet(), calls[0])
    return graph, calls, measure_sensitivity(graph, calls)


def _output_error(graph, calls, choices):
    """Mean squared change of the output per sample, all its elements, weights alone rounded."""
    layers = weight_layers(graph, embeddings=True)
    plan = BitPlan(
        layers=tuple(
            LayerPlan(
                name=name,
                kind=type(layers[name].module).__name__,
                shape=tuple(layers[name].weight.shape),
                bits=tuple(choice.bits.tolist()),
                levels=choice.levels,
            )
            for name, choice in choices.items()
        )
    )
    rounded = RoundWeights(plan=plan)(graph).graph_module
    error = samples = 0
    with torch.no_grad():
        for call in calls:
            pairs = zip(_tuple(graph(**call)), _tuple(rounded(**call)), strict=True)
            error += sum(float((a - b).double().square().sum()) for a, b in pairs)
            samples += len(next(iter(call.values())))
    return error / samples


def _tuple(output):
    return output if isinstance(output, tuple) else (output,)


def _same_width(table, bits, levels="uniform"):
    return {
        layer.name: LayerChoice(bits=torch.full((layer.shape[0],), bits), levels=levels)
        for layer in table.layers
    }


@pytest.mark.parametrize("name", ["conv_in", "body", "mix", "conv_out"])
def test_a_layers_cost_predicts_the_output_error_of_rounding_it(net, name):
    graph, calls, table = net
    choice = _same_width(table, 5)[name]
    predicted = total_cost([table.layer(name).costs("uniform", feedback=False)], [choice])
    measured = _output_error(graph, calls, {name: choice})
    # One draw of a layer's rounding errors, whose mean is left in the output here.
    assert 0.4 < measured / predicted < 2.5


def test_every_layer_is_in_the_table_and_has_finite_costs(unet):
    graph, _, table = unet
    layers = weight_layers(graph, embeddings=True)
    assert [layer.name for layer in table.layers] == list(layers)
    for layer in table.layers:
        assert layer.shape == tuple(layers[layer.name].weight.shape)
        assert float(layer.sensitivity.min()) >= 0
        assert float(layer.uniform[:, 7].sum()) < float(layer.uniform[:, 1].sum())


def test_rows_of_an_embedding_that_no_call_used_count_as_the_average(unet):
    _, calls, table = unet
    used = torch.cat([call["class_labels"] for call in calls]).unique()
    unused = [row for row in range(10) if row not in used.tolist()]
    assert unused
    sensitivity = table.layer("class_embedding").sensitivity
    assert float(sensitivity.min()) > 0
    for row in unused:
        torch.testing.assert_close(sensitivity[row], sensitivity[used].mean())


def test_measured_bits_are_better_than_equal_bits_of_the_same_size(unet):
    graph, calls, table = unet
    equal = _same_width(table, 4)
    costs = table.costs("uniform", feedback=False)
    budget = total_bits(costs, list(equal.values()))
    choices = allocate_budget(costs, budget)
    measured = dict(zip(equal, choices, strict=True))
    assert total_bits(costs, choices) <= budget
    assert _output_error(graph, calls, measured) < 0.5 * _output_error(graph, calls, equal)


def test_the_table_depends_on_the_seed_alone(net):
    graph, calls, _ = net
    first, again, reseeded = (measure_sensitivity(graph, calls, seed=seed) for seed in (0, 0, 1))
    for a, b in zip(first.layers, again.layers, strict=True):
        assert torch.equal(a.sensitivity, b.sensitivity)
        assert torch.equal(a.uniform, b.uniform)
        assert torch.equal(a.codebook_gain, b.codebook_gain)
    assert not torch.equal(first.layers[0].sensitivity, reseeded.layers[0].sensitivity)


def test_the_table_tells_noise_levels_apart(tmp_path):
    calls = edm_calls(10)
    graph = trace(TinyEDM(), calls[0])
    groups = NoiseGroups.of(graph, calls, MPQConfig())
    table = measure_sensitivity(graph, calls, groups=groups)
    assert table.groups == groups
    for layer in table.layers:
        # each group has as many samples
        torch.testing.assert_close(layer.by_group.mean(), layer.sensitivity.sum())
    loaded = SensitivityTable.load(table.save(tmp_path / "table.safetensors"))
    assert loaded.groups == groups
    assert torch.equal(loaded.layers[0].by_group, table.layers[0].by_group)


def test_rows_of_a_noise_level_at_which_errors_do_nothing_have_no_say():
    calls = edm_calls(10)
    graph = trace(TinyEDM(), calls[0])
    groups = NoiseGroups.of(graph, calls, MPQConfig())
    energies = output_energies(graph, calls, groups=groups)
    energy = torch.tensor([0.0, 0, 0, 0, 1]).double()  # sigma 80 alone
    only = dataclasses.replace(energies, groups=dict.fromkeys(energies.groups, energy))
    loud = [
        {**call, "difficulty": call["difficulty"] + 3 * (float(call["sigma"][0]) < 80)}
        for call in calls
    ]
    options = {"groups": groups, "codebooks": False}
    tables = [measure_sensitivity(graph, data, energies=only, **options) for data in (calls, loud)]
    weighted, moved = (table.layer("conv_out").uniform for table in tables)
    torch.testing.assert_close(weighted, moved, rtol=0.01, atol=0)
    plain = [measure_sensitivity(graph, data, codebooks=False) for data in (calls, loud)]
    first, second = (table.layer("conv_out").uniform for table in plain)
    assert float((second / first).mean()) > 1.1


def test_few_calls_are_enough(net):
    graph, calls, _ = net
    table = measure_sensitivity(graph, [{"x": calls[0]["x"][:1]}], codebooks=False)
    assert table.samples == 1
    assert table.layers[0].codebook is None
    assert table.costs()[0].codebook is None


def test_costs_are_sensitivity_times_what_rounding_leaves(net):
    _, _, table = net
    layer = table.layer("body")
    fed_back, nearest = (
        table.costs("codebook", fixed={"mix": 8}, skip=["conv_in"], feedback=feedback)
        for feedback in (True, False)
    )
    assert [cost.name for cost in nearest] == ["body", "mix", "conv_out"]
    assert [cost.fixed for cost in nearest] == [None, 8, None]
    torch.testing.assert_close(nearest[0].uniform, layer.sensitivity[:, None] * layer.uniform)
    torch.testing.assert_close(fed_back[0].uniform, nearest[0].uniform * layer.uniform_gain)
    torch.testing.assert_close(fed_back[0].codebook, nearest[0].codebook * layer.codebook_gain)
    with pytest.raises(ConfigError, match="no layer 'bodi'"):
        table.costs(skip=["bodi"])


def test_bad_data_is_refused_with_the_layer(net):
    graph, calls, _ = net
    with pytest.raises(CalibrationError, match="at least one call"):
        measure_sensitivity(graph, [])
    with pytest.raises(ConfigError, match="probes=0"):
        measure_sensitivity(graph, calls, probes=0)
    broken = trace(TinyNet(), calls[0])
    with torch.no_grad():
        broken.get_submodule("mix").weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="mix: its weight holds NaN"):
        measure_sensitivity(broken, calls)


def test_saving_and_loading_gives_the_same_table(net, tmp_path):
    graph, _, table = net
    path = table.save(tmp_path / "new" / "table.safetensors")
    loaded = SensitivityTable.load(path)
    loaded.check(graph)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for key in ("fingerprint", "seed", "probes", "samples"):
        assert getattr(loaded, key) == getattr(table, key)
    for a, b in zip(table.layers, loaded.layers, strict=True):
        for field in dataclasses.fields(a):
            want, got = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(want, got) if isinstance(want, torch.Tensor) else want == got


def test_a_table_of_another_model_is_refused(net):
    _, calls, table = net
    stranger = trace(TinyNet(seed=1), calls[0])
    assert graph_fingerprint(stranger) != table.fingerprint
    with pytest.raises(ArtifactError, match="measured on another model"):
        table.check(stranger)


def test_a_failed_save_leaves_the_old_file_alone(net, tmp_path, monkeypatch):
    _, _, table = net
    path = table.save(tmp_path / "table.safetensors")
    before = path.read_bytes()

    def full(*_args, **_settings):
        raise OSError("no space left")

    monkeypatch.setattr("mpqdm_fx.io.tensors.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        table.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_damaged_and_foreign_files_are_refused(net, tmp_path):
    _, _, table = net
    path = table.save(tmp_path / "table.safetensors")
    whole = path.read_bytes()
    with pytest.raises(ArtifactError, match="does not exist"):
        SensitivityTable.load(tmp_path / "missing")
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match="damaged"):
            SensitivityTable.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ArtifactError, match="no file of this package"):
        SensitivityTable.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head, _: head.update(probes=0), "probes"),
        (lambda head, _: head.update(probes=True), "probes"),
        (lambda head, _: head.update(probez=head.pop("probes")), "probe"),
        (lambda head, _: head.update(fingerprint="x"), "fingerprint"),
        (lambda head, _: head["layers"].append(head["layers"][0]), "missing|twice"),
        (lambda head, _: head["layers"][0].__setitem__(1, [10**9, 1]), "needs float64"),
        (lambda head, _: head["layers"][0].__setitem__(1, []), "at least one axis"),
        (lambda head, _: head["layers"][1].__setitem__(0, head["layers"][0][0]), "twice|needs"),
        (change_tensor("0.uniform", lambda x: x[:, :7].contiguous()), "needs float64"),
        (change_tensor("0.uniform", lambda x: x.float()), "needs float64"),
        (change_tensor("1.sensitivity", lambda x: -x), "negative"),
        (change_tensor("1.sensitivity", lambda x: x * float("nan")), "NaN"),
        (lambda _, tensors: tensors.pop("0.uniform"), "uniform is missing"),
        (lambda _, tensors: tensors.pop("1.by_group"), "by_group is missing"),
        (change_tensor("1.by_group", lambda x: x.repeat(2)), "by_group has 2 groups"),
        (change_tensor("1.by_group", lambda x: -x), "negative"),
        (lambda head, _: head.update(boundaries=[5.0]), "by_group has 1 groups"),
        (lambda head, _: head.update(boundaries=[5.0, 5.0]), "not ascending"),
        (lambda head, _: head.pop("argument"), "argument"),
        (lambda _, tensors: tensors.update({"99.uniform": torch.ones(1)}), "tensors of no layer"),
    ],
)
def test_a_table_that_is_none_is_refused_with_the_remedy(net, tmp_path, change, message):
    path = net[2].save(tmp_path / "table.safetensors")
    edit_record(path, "sensitivities", 3, change)
    with pytest.raises(ArtifactError, match=rf"table\.safetensors.*({message}).*delete it"):
        SensitivityTable.load(path)


def test_a_flipped_bit_and_a_newer_version_are_refused(net, tmp_path):
    path = net[2].save(tmp_path / "table.safetensors")
    flip(path, -3, bit=4)
    with pytest.raises(ArtifactError, match=r"is corrupted.*delete it"):
        SensitivityTable.load(path)
    write_record(path, "sensitivities", 9, {}, {})
    with pytest.raises(ArtifactError, match="format version 9"):
        SensitivityTable.load(path)
