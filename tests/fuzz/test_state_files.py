"""Mutants of what runs leave for their own resume: refused, or the state that was written."""

import json

import pytest
import torch
from mutants import AMOUNTS, byte_mutants, check_mutants, json_mutants
from torch import nn

from mpqdm_fx.backends.xnnpack.reference import CLOSE_DB
from mpqdm_fx.bits.noise_groups import NoiseGroups
from mpqdm_fx.bits.sensitivity_table import LayerSensitivity, SensitivityTable
from mpqdm_fx.distill.checkpoint import load_state, save_state, state_path
from mpqdm_fx.graph.layers import WeightLayer
from mpqdm_fx.graph.signature import InputSpec, Signature
from mpqdm_fx.io.sealed import read_json, seal, verified
from mpqdm_fx.io.tensors import read_record, write_record
from mpqdm_fx.numerics.levels.row_levels import RowLevels
from mpqdm_fx.parity.rung_inputs import read_calls, write_calls
from mpqdm_fx.parity.sites import Site
from mpqdm_fx.parity.thresholds import RungThresholds, Seen, Thresholds
from mpqdm_fx.pipelines.work_folder import WorkFolder
from mpqdm_fx.records.activations import NoiseLevels
from mpqdm_fx.records.plan import LayerPlan
from mpqdm_fx.sweep.checkpoint import HEADER, Checkpoint
from mpqdm_fx.sweep.solve import LayerSolution

RUN = {"settings": {"weight_bits": 3, "seed": 0}, "model": "abc", "versions": {"torch": "2"}}
SIGNATURE = Signature(
    model_class="Net",
    parameters=("x",),
    arguments=("x",),
    inputs=(InputSpec(name="x", shape=(1, 3), dtype=torch.float32, batch_axis=0),),
    batch=1,
    batch_range=(1, None),
)


def plain(value):
    """Tensors as lists, so that `==` compares them; NaN never occurs."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.flatten().tolist()]
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


def solved_layer(root):
    torch.manual_seed(0)
    body = WeightLayer(name="body", module=nn.Linear(9, 4), nodes=())
    rows = body.weight.detach()
    bits = (1, 2, 4, 8)
    fitted = RowLevels.fit(rows, torch.tensor(bits), "uniform")
    kept = Checkpoint(root, RUN)
    kept.save(
        LayerSolution(
            plan=LayerPlan(name="body", kind="Linear", shape=(4, 9), bits=bits),
            codes=fitted.snap(rows).to(torch.int8),
            scale=fitted.scale,
            bias=body.module.bias.detach(),
        )
    )

    def read():
        found = Checkpoint(root, RUN, resume=True).load(body)
        return None if found is None else plain([found.codes, found.scale, found.bias, found.alpha])

    return kept._path("body"), read


def run_header(root):
    _, read = solved_layer(root)
    return root / HEADER, read


def sensitivities(root):
    layer = LayerSensitivity(
        name="body",
        shape=(4, 9),
        sensitivity=torch.rand(4, dtype=torch.float64),
        by_group=torch.rand(2, dtype=torch.float64),
        uniform=torch.rand(4, 8, dtype=torch.float64),
        uniform_gain=torch.rand(8, dtype=torch.float64),
    )
    groups = NoiseGroups(levels=NoiseLevels(boundaries=(5.0,), argument="timestep"))
    table = SensitivityTable(
        layers=(layer,), fingerprint="0" * 64, seed=0, probes=1, samples=2, groups=groups
    )
    path = table.save(root / "table.safetensors")

    def read():
        found = SensitivityTable.load(path)
        tensors = [
            [e.name, e.shape, e.sensitivity, e.by_group, e.uniform, e.uniform_gain]
            for e in found.layers
        ]
        return plain([tensors, found.fingerprint, found.seed, found.probes, found.samples])

    return path, read


def training_state(root):
    history = {"updates": 3, "seconds": 1.5, "losses": [0.5], "resumed": 0}
    numbers = {"history": history, "weight": 0.0, "recent": [0.25, 0.125]}
    save_state(root, RUN, {"now": torch.arange(3.0)}, **numbers)

    def read():
        state = load_state(root, RUN)
        return None if state is None else plain([dict(state.tensors), state.numbers.model_dump()])

    return state_path(root), read


def stored_calls(root):
    path = root / "parity.safetensors"
    write_calls(path, [{"x": torch.rand(1, 3)}] * 2, [(torch.rand(1, 2),)] * 2)

    def read():
        return plain(read_calls(path, SIGNATURE))

    return path, read


FILES = [solved_layer, run_header, sensitivities, training_state]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
def test_bytes_that_were_changed_are_refused(tmp_path, make, amount):
    path, read = make(tmp_path)
    expected = read()

    def mutated(mutant):
        path.write_bytes(mutant)
        return read()

    original = path.read_bytes()
    check_mutants(byte_mutants(original, amount, seed=1), mutated, expected, refused=0.9)


KINDS = [solved_layer, sensitivities, training_state]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_heads_that_were_hashed_again_are_checked_by_their_fields(tmp_path, make, amount):
    """Whatever is read back has the types and sizes of the state; it may be another state."""
    path, read = make(tmp_path)
    kind, version = _kind_of(path)
    record = read_record(path, kind, version, fix="")
    expected = _kinds(read())

    def mutated(mutant):
        write_record(path, kind, version, mutant, record.tensors)
        return _kinds(read())

    mutants = (m for m in json_mutants(record.head, amount, seed=2) if isinstance(m, dict))
    check_mutants(mutants, mutated, expected, refused=0.5)


def _kind_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["record"])
    return told["kind"], told["version"]


def _kinds(value):
    """What a state of `plain` is made of, all the way down: dtypes, shapes, types, names.

    Lists of numbers alone are of one kind: a history may have any length, and a shape any rank.
    """
    if isinstance(value, dict):
        return {key: _kinds(entry) for key, entry in value.items()}
    if not isinstance(value, list):
        return type(value).__name__
    if value and str(value[0]).startswith("torch."):
        return value[:2]  # a tensor
    kinds = [_kinds(entry) for entry in value]
    for number in ("float", "int"):
        if all(kind == number for kind in kinds):
            return f"{number}s"
    return kinds


def test_states_of_other_kinds_are_told_apart():
    state = [torch.zeros(2, 3), {"losses": [0.5], "updates": 3}, None]
    assert _kinds(plain(state)) == [
        ["torch.float32", [2, 3]], {"losses": "floats", "updates": "int"}, "NoneType",
    ]  # fmt: skip
    for other in (
        [torch.zeros(3, 2), *state[1:]],
        [torch.zeros(2, 3).half(), *state[1:]],
        [state[0], {"losses": [1], "updates": 3}, None],
        [state[0], {"losses": [0.5]}, None],
        [*state, None],
        state[:2],
    ):
        assert _kinds(plain(other)) != _kinds(plain(state))


@pytest.mark.parametrize("amount", AMOUNTS)
def test_calls_of_other_shapes_kinds_or_names_are_refused(tmp_path, amount):
    path, read = stored_calls(tmp_path)
    expected = _kinds(read())

    def mutated(mutant):
        path.write_bytes(mutant)
        return _kinds(read())

    check_mutants(byte_mutants(path.read_bytes(), amount, seed=3), mutated, expected)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_finished_programs_of_an_export_are_those_that_were_written(tmp_path, amount):
    work = WorkFolder(tmp_path / "out.checkpoint", RUN, resume=False)
    work.path("denoiser").write_bytes(b"program")
    record = {"methods": [{"part": "denoiser"}], "quality": {"bits": 4}, "report": {"seconds": 1}}
    expected = work.finish("denoiser", record)
    for number, name in enumerate(("export.json", "denoiser.json", "denoiser.pte")):
        path = work.directory / name
        original = path.read_bytes()

        def read(mutant, path=path):
            path.write_bytes(mutant)
            return WorkFolder(work.directory, RUN, resume=True).finished("denoiser")

        mutants = byte_mutants(original, amount // 3, seed=number)
        check_mutants(mutants, read, expected, refused=0.8)
        path.write_bytes(original)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_thresholds_that_were_changed_are_refused(tmp_path, amount):
    written, path = thresholds(tmp_path)

    def read(mutant):
        path.write_text(json.dumps(mutant))
        return Thresholds.from_dict(read_json(path), path)

    mutants = json_mutants(read_json(path), amount, seed=5)
    check_mutants(mutants, read, written, refused=0.9)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_thresholds_that_were_sealed_again_are_read_as_they_stand_or_refused(tmp_path, amount):
    """Their digest is right: they may ask for other numbers, and for those that the file has."""
    _, path = thresholds(tmp_path)
    again = tmp_path / "again.json"

    def read(mutant):
        path.write_text(json.dumps(seal(mutant)))
        found = Thresholds.from_dict(read_json(path), path)
        found.write(again)
        wanted = [
            seen.wanted_db
            for rung in found.rungs.values()
            for seen in (rung.output, rung.previous, *rung.nodes.values(), *rung.own.values())
        ]
        written = verified(read_json(again), again)  # but for the digest: 1 and 1.0 are equal
        return written == verified(read_json(path), path), all(
            value <= CLOSE_DB for value in wanted
        )

    mutants = json_mutants(read_json(path), amount, seed=5)
    check_mutants(mutants, read, (True, True), refused=0.3)


def thresholds(root):
    """Thresholds of one rung, and their file."""
    rung = RungThresholds(
        against="float",
        output=Seen(40.0),
        previous=Seen(40.0, 50.0),
        nodes={Site("body", 0, "linear", 0): Seen(30.0)},
        own={},
    )
    listed = {"parity.safetensors": {"bytes": 1, "sha256": "0" * 64}}
    written = Thresholds(rungs={"quantized": rung}, files=listed, versions={"torch": "2"})
    path = root / "parity.json"
    written.write(path)
    return written, path
