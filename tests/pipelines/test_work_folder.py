"""Finished programs of an export wait unharmed for the rest, or are refused by name."""

import lzma
import math

import pytest
from records import edit_json, flip

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.io.sealed import Entry
from mpqdm_fx.pipelines.work_folder import WorkFolder

RUN = {"pipeline": "DDPMPipeline", "settings": {"seed": 0}, "sizes": [[8, 8]]}
RECORD = {
    "methods": [{"part": "denoiser", "program_sqnr_db": math.inf}],
    "quality": {"bits": 4},
    "report": {"seconds": 1.5},
}
#: JSON has no infinity.
TOLD = {**RECORD, "methods": [{"part": "denoiser", "program_sqnr_db": "inf"}]}


@pytest.fixture
def work(tmp_path):
    """A folder with one finished program whose weights are apart."""
    work = WorkFolder(tmp_path / "out.checkpoint", RUN, resume=False)
    work.path("denoiser").write_bytes(b"program")
    work.path("denoiser").with_suffix(".ptd").write_bytes(b"weights")
    assert work.finish("denoiser", RECORD) == TOLD
    return work


def resumed(work, identity=RUN):
    return WorkFolder(work.directory, identity, resume=True)


def test_a_finished_program_is_found_again_and_placed(work, tmp_path):
    assert resumed(work).finished("denoiser") == TOLD
    assert resumed(work).finished("vae_decoder") is None
    (tmp_path / "stage").mkdir()
    assert work.place("denoiser", tmp_path / "stage") == {}
    expanded = work.place("denoiser", tmp_path / "stage", compress=True)
    assert expanded["denoiser.ptd.xz"] == Entry.of(tmp_path / "stage" / "denoiser.ptd").to_dict()
    placed = {path.name: path.read_bytes() for path in (tmp_path / "stage").iterdir()}
    assert placed["denoiser.pte"] == lzma.decompress(placed["denoiser.pte.xz"]) == b"program"
    assert placed["denoiser.ptd"] == lzma.decompress(placed["denoiser.ptd.xz"]) == b"weights"
    work.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def _flip(name):
    return lambda folder: flip(folder / name)


def _edit(change):
    return lambda folder: edit_json(folder / "denoiser.json", change, sealed=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip("denoiser.pte"), r"denoiser\.pte is corrupted.*delete .*denoiser\.json and resume"),
        (_flip("denoiser.ptd"), r"denoiser\.ptd is corrupted.*delete .*denoiser\.json and resume"),
        (lambda f: (f / "denoiser.pte").write_bytes(b"half"), r"denoiser\.pte is truncated"),
        (lambda f: (f / "denoiser.ptd").unlink(), r"denoiser\.ptd does not exist"),
        (_flip("denoiser.json"), r"denoiser\.json is (corrupted|damaged)"),
        (_edit(lambda r: r["files"].pop("denoiser.ptd")), r"beside it lie denoiser\.ptd"),
        (_edit(lambda r: r["files"].clear()), "files"),
        (_edit(lambda r: r.update(methods=[])), "methods"),
        (_edit(lambda r: r.update(run="0" * 64)), "another run"),
        (_edit(lambda r: r.update(program="vae_decoder")), "vae_decoder in another run"),
    ],
)
def test_a_program_that_is_not_what_was_finished_is_refused(work, damage, message):
    damage(work.directory)
    with pytest.raises(ArtifactError, match=message):
        resumed(work).finished("denoiser")


def test_a_program_that_was_damaged_while_others_were_made_is_not_placed(work, tmp_path):
    (tmp_path / "stage").mkdir()
    _flip("denoiser.pte")(work.directory)
    with pytest.raises(ArtifactError, match=r"denoiser\.pte is corrupted"):
        work.place("denoiser", tmp_path / "stage")
    assert not (tmp_path / "stage" / "denoiser.pte").exists()


def test_another_run_is_refused_with_the_first_difference(work):
    with pytest.raises(ConfigError, match=r"settings\.seed was 0, is 1"):
        resumed(work, {**RUN, "settings": {"seed": 1}})
    with pytest.raises(ConfigError, match="not finished; resume it"):
        WorkFolder(work.directory, RUN, resume=False)


def test_a_kill_before_the_header_was_written_is_no_hindrance(tmp_path):
    (tmp_path / "out" / ".export.json.0123abcd.part").mkdir(parents=True)
    WorkFolder(tmp_path / "out", RUN, resume=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["export.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"in the way: it holds no export\.json"):
        WorkFolder(tmp_path / "other", RUN, resume=True)
