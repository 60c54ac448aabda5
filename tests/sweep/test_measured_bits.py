"""Measured allocation in the run: the budget holds to the byte, files are reused, rules count."""

import pytest
from small import TinyNet, net_calls
from sweeps import quantized, recorded, settings_of, traced

from mpqdm_fx.bits.allocate import layer_limits
from mpqdm_fx.bits.sensitivity import measure_sensitivity
from mpqdm_fx.bits.sensitivity_table import SensitivityTable
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.records.plan import BitPlan
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.sweep import preparation
from mpqdm_fx.sweep.measured_bits import solve_budget
from mpqdm_fx.sweep.start import start_sweep


@pytest.fixture(scope="module")
def net():
    return traced(TinyNet(), net_calls())


@pytest.fixture(scope="module")
def table(net):
    graph, calls = net
    return measure_sensitivity(graph, calls, probes=1, max_rows=256)


def _plan(net, table, **settings):
    config = settings_of(allocation="measured", **settings)
    plans = solve_budget(net[0], table, config, layer_limits(net[0], config))
    return BitPlan(layers=tuple(plans.values()))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_the_default_budget_is_what_uniform_bits_take(net, table, bits):
    uniform = quantized(
        *net, weight_bits=bits, levels="uniform", rounding="nearest", propagation=0
    ).plan
    measured = _plan(net, table, weight_bits=bits)
    assert measured.weight_bytes <= uniform.weight_bytes
    assert measured.weight_bytes > 0.97 * uniform.weight_bytes


def test_a_budget_in_bits_or_bytes_is_kept(net, table):
    in_bits = _plan(net, table, effective_bits=3.5)
    assert 3.4 < in_bits.effective_bits <= 3.5
    in_bytes = _plan(net, table, weight_bytes=2_000)
    assert 1_950 < in_bytes.weight_bytes <= 2_000


def test_no_layer_is_forced_to_eight_bits(net, table):
    plan = _plan(net, table, effective_bits=2.5)
    assert all(layer.reason is None for layer in plan.layers)
    assert plan.layer("conv_in").mean_bits < 8


def test_overrides_count_against_the_budget(net, table):
    rules = [{"pattern": "body", "weight_bits": 3}, {"pattern": "mix", "skip": True}]
    free, ruled = (_plan(net, table, effective_bits=6.0, overrides=o) for o in ((), rules))
    assert set(ruled.layer("body").bits) == {3}
    assert "mix" not in ruled
    in_float = 4 * net[0].get_submodule("mix").weight.numel()
    assert ruled.weight_bytes + in_float <= free.weight_bytes + 8  # the float layer took its part
    assert ruled.weight_bytes + in_float > 0.9 * free.weight_bytes


def test_channels_share_widths_in_blocks_of_the_alignment(net, table):
    plan = _plan(net, table, effective_bits=3.5, align=8)
    for layer in plan.layers:
        counts = [layer.bits.count(b) for b in set(layer.bits)]
        assert sum(count % 8 != 0 for count in counts) <= (layer.shape[0] % 8 != 0)


def test_a_budget_below_the_smallest_widths_is_refused_with_the_smallest(net, table):
    with pytest.raises(ConfigError, match="smallest"):
        _plan(net, table, weight_bytes=100)


def test_the_table_is_written_once_and_read_for_another_budget(net, tmp_path, monkeypatch):
    graph, calls = net
    path = tmp_path / "table.safetensors"
    config = settings_of(allocation="measured", effective_bits=3.0)
    start_sweep(graph, recorded(calls), config, run=RunOptions(sensitivity=path))
    assert path.exists()

    def refuse(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr("mpqdm_fx.sweep.measured_bits.measure_sensitivity", refuse)
    larger = settings_of(allocation="measured", effective_bits=4.0)
    start_sweep(graph, recorded(calls), larger, run=RunOptions(sensitivity=path))


def test_a_table_of_another_model_is_refused(net, table, tmp_path):
    path = table.save(tmp_path / "table.safetensors")
    graph, calls = traced(TinyNet(seed=1), net_calls())
    settings, run = settings_of(allocation="measured"), RunOptions(sensitivity=path)
    with pytest.raises(ArtifactError, match="another model"):
        start_sweep(graph, recorded(calls), settings, run=run)


@pytest.mark.parametrize("levels", ["uniform", "codebook", "int4"])
def test_fitted_levels_are_measured_only_where_the_settings_can_use_them(net, tmp_path, levels):
    graph, calls = net
    path = tmp_path / "table.safetensors"
    settings = settings_of(allocation="measured", effective_bits=4.0, levels=levels)
    start_sweep(graph, recorded(calls), settings, run=RunOptions(sensitivity=path))
    table = SensitivityTable.load(path)
    assert all((layer.codebook is not None) == (levels == "codebook") for layer in table.layers)


def test_a_table_without_fitted_levels_refuses_to_share_bits_with_them(net):
    graph, calls = net
    plain = measure_sensitivity(graph, calls, probes=1, max_rows=256, codebooks=False)
    assert _plan(net, plain, effective_bits=4.0).effective_bits <= 4.0
    with pytest.raises(ConfigError, match=r"without fitted levels.*codebooks=True"):
        _plan(net, plain, effective_bits=4.0, levels="codebook")


@pytest.mark.parametrize("mode", ["static", "measured"])
def test_another_budget_finds_what_was_measured_of_the_same_inputs(
    net, tmp_path, monkeypatch, mode
):
    graph, calls = net
    probed = []
    probe = preparation.output_energies

    def count(*arguments, **options):
        probed.append(probe(*arguments, **options))
        return probed[-1]

    monkeypatch.setattr(preparation, "output_energies", count)
    path, records = tmp_path / "table.safetensors", recorded(calls)

    def prepared(bits, inputs, **settings):
        config = settings_of(
            allocation="measured", activation_mode=mode, slowdown=1.5, effective_bits=bits,
            **settings,
        )  # fmt: skip
        return start_sweep(graph, inputs, config, run=RunOptions(sensitivity=path)).prepared

    prepared(3.0, records)
    shared = prepared(4.0, records)
    assert len(probed) == 1
    alone = prepared(4.0, recorded(calls))
    assert len(probed) == 2
    assert shared.plans == alone.plans
    assert shared.choices == alone.choices
    prepared(4.0, records, seed=1)  # other directions
    records.append(calls[0])
    prepared(4.0, records)
    assert len(probed) == 4
