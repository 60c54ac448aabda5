"""`verify` on folders with a program: every rung down to the `.pte`, and the first that departs."""

import json
import math
import shutil

import pytest
import torch
from parity_folders import edit_thresholds, flip_a_weight, folder_of_net
from small import TinyNet, net_calls
from torch import nn

from mpqdm_fx import MPQConfig, lower, quantize
from mpqdm_fx.backends.xnnpack.road import ProgramGraphs
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.folders import seal_folder
from mpqdm_fx.model.storage import load, save, write_model
from mpqdm_fx.parity.rung_inputs import INPUTS, read_calls
from mpqdm_fx.parity.sites import sites
from mpqdm_fx.parity.verify import verify

RUNGS = ["float", "quantized", "decomposed", "converted", "edge", "pte"]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """A folder with a program, the ladder of its thresholds, and the graphs of its lowering."""
    folder = folder_of_net(tmp_path_factory.mktemp("parity") / "net", program=False)
    quantized = load(folder, TinyNet())
    program = lower(quantized, "xnnpack", output=folder / "unet.pte", keep_graphs=True)
    seal_folder(folder)
    return folder, verify(folder, model=TinyNet(), store=True), program.graphs


@pytest.mark.xnnpack
def test_all_rungs_of_a_program_are_measured_and_pass(lowered):
    folder, first, _ = lowered
    assert [rung.name for rung in first.rungs] == RUNGS
    assert first.passed
    for name in RUNGS[1:]:
        assert {n.site.module for n in first.rung(name).layers} == {
            "conv_in", "body", "mix", "conv_out",
        }  # fmt: skip
        assert first.rung(name).unmatched == ()
    # the same integers, up to the order of sums in what stays float
    assert first.rung("converted").previous_db == math.inf
    assert min(node.own_db for node in first.rung("edge").nodes) > 100
    program = first.rung("pte")
    assert program.previous_db > 60
    assert min(node.own_db for node in program.nodes) > 100
    assert {n.site for n in program.nodes} >= {n.site for n in first.rung("edge").nodes}
    assert not [note for note in first.notes if "copy" in note]
    again = verify(folder, model=TinyNet())
    assert again.passed
    assert json.loads(json.dumps(again.to_dict(), allow_nan=False))["passed"] is True


@pytest.mark.xnnpack
def test_the_graphs_on_the_road_to_a_program_are_those_that_verify_makes(lowered):
    folder, _, graphs = lowered
    model = load(folder, TinyNet())
    programs = ProgramGraphs.of(model.rounded, model.ranges, graphs.inputs)
    calls, _ = read_calls(folder / INPUTS, model.signature)
    for name in ("decomposed", "converted", "edge"):
        expected, actual = getattr(graphs, name), getattr(programs, name)
        assert list(sites(expected)) == list(sites(actual))
        for call in calls:
            with torch.no_grad():
                assert torch.equal(expected(call["x"]), actual(call["x"]))


@pytest.mark.xnnpack
def test_a_program_that_computes_other_numbers_fails_with_its_rung_named(lowered, monkeypatch):
    folder, _, graphs = lowered
    runner = XnnpackRunner(folder / "unet.pte")
    monkeypatch.setattr(
        "mpqdm_fx.parity.verify.open_program", lambda _: lambda x: [runner(x)[0] * 1.01]
    )
    monkeypatch.setattr("mpqdm_fx.parity.verify._program_graphs", lambda *_: graphs)
    first = verify(folder, model=TinyNet()).first_divergence
    assert (first.rung, first.against, first.node) == ("pte", "edge", None)
    assert first.sqnr_db == pytest.approx(40, abs=0.5)


@pytest.mark.xnnpack
@pytest.mark.parametrize("layer", ["conv_in", "body", "mix", "conv_out"])
def test_one_changed_weight_in_a_program_is_found_and_its_layer_named(
    lowered, layer, tmp_path, monkeypatch
):
    folder = shutil.copytree(lowered[0], tmp_path / "net")
    flip_a_weight(folder, layer)
    monkeypatch.setattr("mpqdm_fx.parity.verify._program_graphs", lambda *_: lowered[2])
    ladder = verify(folder, model=TinyNet())
    assert ladder.passed is False
    first = ladder.first_divergence
    assert (first.rung, first.against, first.node.site.module) == ("pte", "edge", layer)
    assert f"rung `pte` falls short: {layer}: {first.node.site.op} [" in str(first)
    # what stands behind it reads other values; alone, only the damaged layer computes others
    short = {node.site.module for node in ladder.rung("pte").nodes if node.short_alone}
    assert short == {layer}


@pytest.mark.xnnpack
def test_a_dynamic_program_computes_inside_what_the_decomposed_graph_does(tmp_path):
    config = MPQConfig(
        weight_bits=4, allocation="uniform", refinements=0, activation_mode="dynamic"
    )
    quantized = quantize(TinyNet(), config, net_calls())
    save(quantized, tmp_path / "net")
    lower(quantized, "xnnpack", output=tmp_path / "net" / "unet.pte")
    seal_folder(tmp_path / "net")
    rung = verify(tmp_path / "net", model=TinyNet(), store=True).rung("pte")
    assert (rung.against, rung.unmatched) == ("decomposed", ())
    assert {node.site.module for node in rung.layers} == {"conv_in", "body", "mix", "conv_out"}
    assert min(node.own_db for node in rung.nodes) > 100


@pytest.mark.xnnpack
def test_thresholds_of_an_earlier_version_hold_without_values_inside_the_program(
    lowered, tmp_path, monkeypatch
):
    folder = shutil.copytree(lowered[0], tmp_path / "net")
    monkeypatch.setattr("mpqdm_fx.parity.verify._program_graphs", lambda *_: lowered[2])

    def forget(data):
        data["rungs"]["pte"].update(nodes={}, own={})

    def age(data):
        forget(data)
        data["version"] = 2

    edit_thresholds(folder, age)
    ladder = verify(folder, model=TinyNet())
    assert ladder.passed, ladder.failure
    assert any("rung `pte`: an earlier version stored" in note for note in ladder.notes)
    assert len(ladder.rung("pte").layers) == 4
    folder = shutil.copytree(lowered[0], tmp_path / "new")
    edit_thresholds(folder, forget)
    assert "4 weight layers have no threshold" in verify(folder, model=TinyNet()).failure


@pytest.mark.xnnpack
def test_values_of_a_copy_that_strays_are_told_of(lowered, monkeypatch):
    folder, _, graphs = lowered
    runner = XnnpackRunner(folder / "unet.pte")
    monkeypatch.setattr(
        "mpqdm_fx.parity.verify.open_program", lambda _: lambda x: [runner(x)[0] * 1.01]
    )
    monkeypatch.setattr("mpqdm_fx.parity.verify._program_graphs", lambda *_: graphs)
    (note,) = (note for note in verify(folder, model=TinyNet()).notes if "copy" in note)
    assert note.startswith("rung `pte`: its values are those of a copy")
    assert " 40." in note


@pytest.mark.xnnpack
def test_another_program_than_the_stored_one_is_refused(lowered, tmp_path):
    folder = shutil.copytree(lowered[0], tmp_path / "net")
    (folder / "unet.pte").write_bytes((folder / "unet.pte").read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=r"unet\.pte is truncated or damaged"):
        verify(folder, model=TinyNet())
    (folder / "unet.pte").unlink()
    with pytest.raises(ArtifactError, match=r"unet\.pte does not exist"):
        verify(folder, model=TinyNet())


class _MixedNet(nn.Module):
    """A layer of which some channels matter much more than others."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.first, self.mixed, self.last = nn.Linear(8, 64), nn.Linear(64, 128), nn.Linear(128, 8)
        with torch.no_grad():
            self.last.weight[:, ::3] *= 40

    def forward(self, x):
        return self.last(torch.relu(self.mixed(torch.relu(self.first(x)))))


@pytest.mark.matrix
@pytest.mark.xnnpack
def test_layers_that_were_split_for_the_program_are_split_again(tmp_path):
    generator = torch.Generator().manual_seed(1)
    calls = [{"x": torch.randn(16, 5, 8, generator=generator)} for _ in range(4)]
    config = MPQConfig(levels="int4", activation_mode="dynamic", refinements=0)
    net = _MixedNet().eval()
    quantized = quantize(net, config, calls)
    options = {"four_bit": "split", "external_weights": True, "compress": False, "expanded": {}}
    write_model(quantized, tmp_path, program=options)
    path = tmp_path / "unet.pte"
    program = lower(quantized, "xnnpack", output=path, four_bit="split", external_weights=True)
    seal_folder(tmp_path)
    assert program.four_bit_layers == ("mixed_rows",)
    verify(tmp_path, model=net, store=True)
    assert set(json.loads((tmp_path / "parity.json").read_text())["files"]) == {
        "parity.safetensors",
        "unet.pte",
        "unet.ptd",
    }
    ladder = verify(tmp_path, model=net)
    assert ladder.passed, ladder.first_divergence
    assert "mixed_rows" in {node.site.module for node in ladder.rung("converted").nodes}
    assert not ladder.faults
    assert not [note for note in ladder.notes if "no longer" in note]
