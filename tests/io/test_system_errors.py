"""What the system refuses a writer is told with path and remedy, and leaves nothing behind."""

import errno
import os

import pytest
import torch
from limits import small_files
from safetensors.torch import save_file
from small import TinyNet, net_calls

from mpqdm_fx.api import quantize
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.exchange import remove_folder, staged_folder
from mpqdm_fx.io.files import checkpoint_of, replacing, write_text
from mpqdm_fx.io.folders import check_target
from mpqdm_fx.io.system_errors import writing
from mpqdm_fx.io.tensors import write_record
from mpqdm_fx.io.unfinished import UnfinishedRun
from mpqdm_fx.model.storage import save
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.run_options import RunOptions
from mpqdm_fx.report.images import save_grid

LONGEST = 228  # bytes of a folder's name: 27 are added while it is made


def in_text(path):
    write_text(path, "x" * 10_000)


def in_tensors(path):
    write_record(path, "kind", 1, {}, {"x": torch.zeros(10_000)})


def in_a_folder(path):
    with staged_folder(path) as stage:
        save_file({"x": torch.zeros(10_000)}, stage / "weights")


def in_a_file_of_a_folder(path):
    with staged_folder(path) as stage:
        write_text(stage / "file", "x" * 10_000)


def in_a_run(path):
    UnfinishedRun(path, "run.json", {"setting": "x" * 10_000}, resume=False)


def in_a_picture(path):
    save_grid(torch.rand(4, 3, 32, 32), path)


@pytest.mark.parametrize(
    "write",
    [in_text, in_tensors, in_a_folder, in_a_file_of_a_folder, in_a_run, in_a_picture],
    ids=lambda write: write.__name__,
)
def test_a_limit_is_told_with_path_and_remedy_and_nothing_is_left(write, tmp_path):
    path = tmp_path / "out"
    with (
        small_files(),
        pytest.raises(
            ArtifactError, match=rf"^{path} cannot be written: File too .*; raise"
        ) as told,
    ):
        write(path)
    assert ".stage" not in str(told.value).partition(" (")[0]
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == []


def test_a_model_is_not_half_saved(tmp_path):
    quantized = quantize(TinyNet(), MPQConfig(weight_bits=4), net_calls())
    path = tmp_path / "out"
    with small_files(), pytest.raises(ArtifactError, match=rf"{path} cannot be written.*ulimit -f"):
        save(quantized, path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_met_a_limit_goes_on_without_it(tmp_path):
    run = RunOptions(directory=tmp_path / "run")
    config = MPQConfig(weight_bits=4)
    with small_files(), pytest.raises(ArtifactError, match=r"cannot be written: .*ulimit -f"):
        quantize(TinyNet(), config, net_calls(), run=run)
    resumed = RunOptions(directory=tmp_path / "run", resume=True)
    again = quantize(TinyNet(), config, net_calls(), run=resumed)
    whole = quantize(TinyNet(), config, net_calls())
    assert again.plan == whole.plan


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_of_a_full_disk_another_one_is_the_remedy(tmp_path, number):
    path = tmp_path / "out"
    file = "/elsewhere/part"
    message = rf"^{path} cannot .* \({file}\); free space"
    with pytest.raises(ArtifactError, match=message) as told, writing(path):
        raise OSError(number, os.strerror(number), file)
    assert told.value.__cause__.errno == number


def test_other_errors_are_as_they_were(tmp_path):
    error = OSError(errno.EISDIR, "Is a directory", "somewhere")
    with pytest.raises(IsADirectoryError) as raised, replacing(tmp_path / "out"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("letter", ["x", "ö"])
def test_the_longest_name_is_made_and_a_longer_one_refused_first(tmp_path, letter):
    count = LONGEST // len(letter.encode())
    path = tmp_path / (letter * count)
    check_target(path)
    UnfinishedRun(checkpoint_of(path), "run.json", {}, resume=False)
    for text in ("first", "second"):
        with staged_folder(path) as stage:
            (stage / "file").write_text(text)
    remove_folder(checkpoint_of(path))
    assert list(tmp_path.iterdir()) == [path]
    longer = tmp_path / (letter * (count + 1))
    for refuse in (check_target, lambda path: staged_folder(path).__enter__()):
        with pytest.raises(ArtifactError, match=f"a name of at most {LONGEST} bytes"):
            refuse(longer)


def test_a_file_whose_name_no_system_takes_is_refused_by_name(tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot .*: File name too long.*shorter name"):
        write_text(tmp_path / ("x" * 256), "text")
    write_text(tmp_path / ("x" * 255), "text")
