"""Mutants of a quantized folder's files: refused, or the model that was saved."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler
from mutants import AMOUNTS, byte_mutants, check_mutants, json_mutants, text_mutants
from small import TinyNet, net_calls

from mpqdm_fx.api import quantize
from mpqdm_fx.cli.screens.result import summary_table
from mpqdm_fx.io.folders import MANIFEST, SCHEDULER_CONFIG, WEIGHTS, seal_folder
from mpqdm_fx.io.sealed import seal
from mpqdm_fx.model.folder import open_folder
from mpqdm_fx.model.proof import proof_inputs
from mpqdm_fx.model.storage import load, save
from mpqdm_fx.model.summary import read_summary
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.sources.denoisers import origin_of

CALL = net_calls(1, seed=9)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved net with the small files that commands write beside it."""
    settings = MPQConfig(weight_bits=3, levels="codebook", refinements=0, propagation=0.0)
    root = save(quantize(TinyNet(), settings, net_calls()), tmp_path_factory.mktemp("net") / "net")
    DDPMScheduler().save_pretrained(root / "scheduler")
    (root / "source.json").write_text(json.dumps({"model": "digits", "subfolder": None}))
    seal_folder(root)
    return root


@pytest.fixture
def mutable(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "net")


def content(root):
    """What a load gives: integers, ranges and outputs, as a value that `==` compares."""
    model = load(root, model=TinyNet())
    with torch.no_grad():
        outputs = [tensor.tolist() for tensor in torch.utils._pytree.tree_leaves(model(**CALL))]
    return outputs, model.plan, dict(model.ranges)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_bytes_of_a_folder_that_were_changed_are_refused(mutable, name, amount):
    original = (mutable / name).read_bytes()

    def read(mutant):
        (mutable / name).write_bytes(mutant)
        return content(mutable)

    check_mutants(byte_mutants(original, amount, seed=1), read, content(mutable), refused=0.95)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_fields_of_a_manifest_that_was_sealed_again_are_checked(mutable, amount):
    """Its digest is right, so its schema and the folder itself have to tell."""
    original = json.loads((mutable / MANIFEST).read_text())

    def read(mutant):
        if isinstance(mutant, dict):
            mutant = seal(mutant)
        (mutable / MANIFEST).write_text(json.dumps(mutant))
        folder = open_folder(mutable)
        folder.files.check()
        return set(folder.files.entries) <= set(original["files"])

    check_mutants(json_mutants(original, amount, seed=2), read, True, refused=0.5)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_texts_that_are_no_json_of_ours_are_refused(mutable, amount):
    original = json.loads((mutable / MANIFEST).read_text())

    def read(mutant):
        (mutable / MANIFEST).write_bytes(mutant)
        return content(mutable)

    check_mutants(text_mutants(original, amount, seed=3), read, None, refused=1.0)


def proven(root):
    """What a load returns for the input that it is proven on: the same, whatever was sealed."""
    model = load(root)
    outputs = model(**proof_inputs(model.signature))
    return [tensor.tolist() for tensor in torch.utils._pytree.tree_leaves(outputs)]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("part", ["settings", "ranges", "weights", "signature"])
def test_a_part_that_decides_numbers_is_refused_if_the_proof_tells_it(mutable, part, amount):
    """Sealed again with another part, a folder is another one; the stored output has to tell."""
    original = json.loads((mutable / MANIFEST).read_text())
    expected = proven(mutable)

    def read(mutant):
        (mutable / MANIFEST).write_text(json.dumps(seal({**original, part: mutant})))
        return proven(mutable)

    check_mutants(json_mutants(original[part], amount // 10, seed=4), read, expected)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_weights_that_were_listed_again_are_refused_if_the_proof_tells_it(mutable, amount):
    """Their hash is right, so the layout and the stored output have to tell."""
    original = (mutable / WEIGHTS).read_bytes()
    expected = proven(mutable)

    def read(mutant):
        (mutable / WEIGHTS).write_bytes(mutant)
        seal_folder(mutable)
        return proven(mutable)

    check_mutants(byte_mutants(original, amount // 5, seed=5), read, expected)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_the_source_is_a_name_and_a_subfolder(mutable, amount):
    original = json.loads((mutable / "source.json").read_text())

    def read(mutant):
        (mutable / "source.json").write_text(json.dumps(mutant))
        seal_folder(mutable)
        origin = origin_of(mutable)
        return isinstance(origin.model, str) and isinstance(origin.subfolder, str | None)

    check_mutants(json_mutants(original, amount, seed=6), read, True, refused=0.3)


NUMBERS = {
    "backend": "xnnpack",
    "settings": {"weight_bits": 4},
    "mean_bits": 4.0,
    "effective_bits": 4.1,
    "num_weights": 100,
    "weight_bytes": 52,
    "float_remainder_bytes": 10,
    "float32_bytes": 500,
    "parameters": {"quantized": 100, "float": 25},
    "remarks": ["a remark"],
    "epsilon_sqnr_db": "inf",
    "backend_epsilon_sqnr_db": 44.0,
    "milliseconds_per_step": {"xnnpack": 1.5, "float": 3.0},
    "threads": 1,
    "seconds_to_quantize": 2.5,
    "program": None,
    "peak_memory_bytes": {"pte": 1000, "float": 2000},
    "files": {"model.safetensors": 52},
}


@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_summary_is_printed_or_refused(mutable, amount):
    """Sealed again with any other numbers, it is a table or one line."""

    def read(mutant):
        (mutable / "summary.json").write_text(json.dumps(mutant))
        seal_folder(mutable)
        return summary_table(read_summary(open_folder(mutable))).title

    expected = read(NUMBERS)
    check_mutants(json_mutants(NUMBERS, amount, seed=8), read, expected, refused=0.3)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_bytes_of_the_scheduler_that_were_changed_are_refused(mutable, amount):
    original = (mutable / SCHEDULER_CONFIG).read_bytes()

    def read(mutant):
        (mutable / SCHEDULER_CONFIG).write_bytes(mutant)
        return open_folder(mutable).files.read_json(SCHEDULER_CONFIG)

    mutants = byte_mutants(original, amount, seed=7)
    check_mutants(mutants, read, json.loads(original), refused=0.95)
