"""Mutants of programs and of exported folders: refused, or the program that was written."""

import importlib
import json
import logging
import lzma
import os
import shutil
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from forked import check_forked, read_forked
from mutants import AMOUNTS, byte_mutants, check_mutants, json_mutants
from small import TinyNet, net_calls, plain_unet
from typer.testing import CliRunner

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.compressed import compress_program, expand_program
from mpqdm_fx.backends.lower import lower
from mpqdm_fx.cli import app as cli
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.folders import listed_files, seal_folder
from mpqdm_fx.io.sealed import Entry, seal
from mpqdm_fx.model.folder import open_folder
from mpqdm_fx.model.storage import save
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.sources.denoisers import open_program

pytestmark = [
    pytest.mark.xnnpack,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked processes"),
]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """A net's folder with a program."""
    root = tmp_path_factory.mktemp("lowered") / "net"
    settings = MPQConfig(weight_bits=4, allocation="uniform", refinements=0)
    quantized = quantize(TinyNet(), settings, net_calls())
    save(quantized, root)
    lower(quantized, "xnnpack", output=root / "unet.pte")
    seal_folder(root)
    return root


@pytest.mark.parametrize("amount", AMOUNTS)
def test_bytes_of_a_program_that_were_changed_never_reach_the_runtime(lowered, tmp_path, amount):
    root = shutil.copytree(lowered, tmp_path / "net")
    original = (root / "unet.pte").read_bytes()
    inputs = [torch.ones(shape) for shape in open_program(open_folder(root)).input_shapes]

    def read(mutant):
        (root / "unet.pte").write_bytes(mutant)
        return [output.tolist() for output in open_program(open_folder(root))(*inputs)]

    expected = read_forked(read, original)
    check_forked(byte_mutants(original, amount, seed=1), read, expected, refused=0.95)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("known", [True, False])
def test_compressed_files_expand_to_their_content_or_to_nothing(tmp_path, amount, known):
    plain = tmp_path / "unet.pte"
    plain.write_bytes(bytes(range(256)) * 40)
    content = Entry.of(plain)
    packed = compress_program(plain, keep=False)
    original = packed.read_bytes()

    def read(mutant):
        packed.write_bytes(mutant)
        return Entry.of(expand_program(packed, content=content if known else None))

    check_mutants(byte_mutants(original, amount, seed=2), read, content, refused=0.5)


def test_a_small_file_does_not_fill_the_disk(tmp_path):
    bomb = tmp_path / "unet.pte.xz"
    with lzma.open(bomb, "wb") as file:
        for _ in range(256):
            file.write(bytes(2**20))
    with pytest.raises(ArtifactError, match="more than"):
        expand_program(bomb)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == bomb.stat().st_size


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported folder of few nodes, compressed, and its copied runner as a module."""
    root = tmp_path_factory.mktemp("exported")
    DDPMPipeline(plain_unet(), DDPMScheduler()).save_pretrained(root / "ddpm")
    words = ["export", root / "ddpm", "--output", root / "out", "--allocation", "uniform"]
    words += ["--refinements", 0, "--steps", 1, "--trajectories", 2, "--compress"]
    run = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    own = {name: sys.modules.pop(name) for name in ("run", "errors") if name in sys.modules}
    sys.path.insert(0, str(root / "out"))
    try:
        runner = importlib.import_module("run")
    finally:
        sys.path.remove(str(root / "out"))
        sys.modules.update(own)
    assert "mpqdm_fx" not in runner.ProgramFiles.__module__
    return root / "out", runner


def drawn(runner, folder, output):
    """The picture that the copied runner's command line draws; its refusal as the package's."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    runner.logger.addHandler(handler)
    try:
        words = ["--folder", str(folder), "--steps", "1", "--output", str(output)]
        status = runner.main(words)
    finally:
        runner.logger.removeHandler(handler)
    if status == 2:
        (error,) = [record.args[0] for record in records if record.levelno == logging.ERROR]
        if isinstance(error, runner.ArtifactError):
            raise ArtifactError(str(error))
        raise error
    assert status == 0
    return output.read_bytes()


@pytest.mark.matrix
@pytest.mark.parametrize("amount", AMOUNTS)
def test_an_exported_folder_whose_files_were_changed_is_refused(exported, tmp_path, amount):
    folder, runner = exported
    copied = shutil.copytree(folder, tmp_path / "out")
    used = ["pipeline.json", "denoiser.pte.xz", "scheduler/scheduler_config.json"]
    for seed, name in enumerate(used):
        original = (copied / name).read_bytes()

        def read(mutant, name=name):
            (copied / name).write_bytes(mutant)
            return drawn(runner, copied, tmp_path / "image.png")

        expected = read_forked(read, original)
        mutants = byte_mutants(original, amount // 3, seed=seed)
        check_forked(mutants, read, expected, refused=0.9)
        (copied / name).write_bytes(original)


@pytest.mark.matrix
@pytest.mark.parametrize("amount", AMOUNTS)
def test_an_exported_manifest_that_was_sealed_again_ends_in_one_line(exported, tmp_path, amount):
    """Its digest is right: it draws a picture, or its schema and the programs have to tell."""
    folder, runner = exported
    copied = shutil.copytree(folder, tmp_path / "out")
    original = json.loads((copied / "pipeline.json").read_text())

    def read(mutant):
        (copied / "pipeline.json").write_text(json.dumps(seal(mutant)))
        return bool(drawn(runner, copied, tmp_path / "image.png"))

    assert read_forked(read, original)
    check_forked(json_mutants(original, amount // 2, seed=4), read, True, refused=0.5)


@pytest.mark.matrix
@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_program_under_anothers_name_is_refused(exported, tmp_path, amount):
    """Its hash is right, so what it takes has to tell."""
    folder, runner = exported
    copied = shutil.copytree(folder, tmp_path / "out")
    manifest = json.loads((copied / "pipeline.json").read_text())
    inputs = manifest["methods"][0]["inputs"]

    def read(mutant):
        changed = {**manifest, "methods": [{**manifest["methods"][0], "inputs": mutant}]}
        changed["files"] = listed_files(copied, "pipeline.json")
        (copied / "pipeline.json").write_text(json.dumps(seal(changed)))
        return drawn(runner, copied, tmp_path / "image.png")

    expected = read_forked(read, inputs)
    check_forked(json_mutants(inputs, amount // 10, seed=5), read, expected, refused=0.5)
