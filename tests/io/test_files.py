"""Files appear whole or not at all, and what is wrong with one is said."""

import errno
import hashlib
import json
import os
import secrets
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.files import (
    check_version,
    differences,
    first_difference,
    hidden_folder,
    replacing,
    write_text,
    write_texts,
)
from mpqdm_fx.io.sealed import Entry, read_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture
def umask():
    """The mask of a user who lets the group read, restored afterwards."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail():
        with replacing(target) as part:
            part.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "new folder" / "file"
    write_text(target, "ö")
    with replacing(target) as part:
        part.write_text("new")
        assert target.read_text(encoding="utf-8") == "ö"
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_of_a_link_the_file_it_leads_to_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    link = tmp_path / "page"
    link.symlink_to("far/real")
    for text in ("first", "second"):
        write_text(link, text)
        assert link.is_symlink()
        assert (tmp_path / "far" / "real").read_text() == text


def test_no_file_takes_the_place_of_a_pipe_or_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ArtifactError, match=f"{name} is there and no regular file"):
            write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("failing", ["first", "second", "rename"])
def test_of_several_files_all_appear_or_none(tmp_path, monkeypatch, older, failing):
    places = [tmp_path / "numbers", tmp_path / "page"]
    if older:
        for place in places:
            place.write_text(f"old {place.name}")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    texts = ["new", "new"]
    if failing == "rename":  # of the second one, as of another user's file in a shared folder
        rename = Path.replace

        def refused(part, place):
            if part.name == "page" and place == places[1]:
                raise PermissionError(errno.EPERM, "Operation not permitted", str(place))
            return rename(part, place)

        monkeypatch.setattr(Path, "replace", refused)
    else:
        texts[failing == "second"] = "\udc80"  # which is no text
    with pytest.raises((PermissionError, UnicodeError)):
        write_texts(dict(zip(places, texts, strict=True)))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    write_texts(dict.fromkeys(places, "new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "numbers": "new",
        "page": "new",
    }


def test_two_writers_of_one_file_are_not_in_each_others_way(tmp_path):
    target = tmp_path / "file"
    with replacing(target) as first, replacing(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"


def test_who_may_read_a_file_is_left_to_the_user_whatever_wrote_it(tmp_path, umask):
    write_text(tmp_path / "text", "text")
    with replacing(tmp_path / "tensors") as part:
        save_file({"x": torch.arange(3)}, part)
    assert load_file(tmp_path / "tensors")["x"].tolist() == [0, 1, 2]
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


@pytest.mark.parametrize("size", [0, 1, 3 * 2**18 + 1])
def test_checksum_is_that_of_the_whole_content(tmp_path, size):
    content = bytes(range(251)) * (size // 251 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:size])
    digest = hashlib.sha256(content[:size]).hexdigest()
    assert Entry.of(path).to_dict() == {"bytes": size, "sha256": digest}


def test_checksum_never_holds_the_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    monkeypatch.setattr(type(path), "read_bytes", None)
    assert Entry.of(path).to_dict()["bytes"] == 3


def test_a_signal_right_behind_the_making_of_a_folder_leaves_nothing(tmp_path, monkeypatch):
    folders, make = [], Path.mkdir

    def stopped(path, **options):
        make(path, **options)
        folders.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", stopped)
        with pytest.raises(KeyboardInterrupt), hidden_folder(tmp_path, "name", "part"):
            pass
    assert len(folders) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_one_made_is_neither_taken_nor_removed(tmp_path, monkeypatch):
    existing = tmp_path / ".name.0123abcd.part"
    existing.mkdir()
    names = iter(["0123abcd", "4567abcd"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(names))
    with hidden_folder(tmp_path, "name", "part") as folder:
        assert folder == tmp_path / ".name.4567abcd.part"
    assert list(tmp_path.iterdir()) == [existing]


@given(value=JSON)
def test_a_value_does_not_differ_from_itself(value):
    assert differences(json.loads(json.dumps(value)), value) == []


@given(first=JSON, second=JSON)
def test_no_difference_means_equal_and_each_one_is_found_at_its_path(first, second):
    different = differences(first, second)
    assert bool(different) == (first != second) or _only_nones(first, second)
    for path, old, new in different:
        assert old != new
        assert (_at(first, path), _at(second, path)) == (old, new)


def _at(value, path):
    for key in path.split(".") if path else ():
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _only_nones(first, second):
    """Whether two values are equal but for keys whose value is None, which count as absent."""
    return _pruned(first) == _pruned(second)


def _pruned(value):
    if isinstance(value, dict):
        return {key: _pruned(entry) for key, entry in value.items() if entry is not None}
    return value


def test_differences_name_the_innermost_key_and_tuples_are_lists():
    first = {"sizes": [1, 2], "settings": {"bits": 4, "seed": 0}, "old": 1}
    second = {"sizes": (1, 2), "settings": {"bits": 3, "seed": 0}, "new": [2]}
    assert differences(first, second) == [
        ("new", None, [2]),
        ("old", 1, None),
        ("settings.bits", 4, 3),
    ]


@given(first=JSON, second=JSON)
def test_the_first_difference_is_told_where_there_is_one(first, second):
    different = differences(first, second)
    sentence = first_difference(first, second)
    assert (sentence is None) == (different == [])
    if sentence is not None:
        assert sentence.startswith(f"{different[0][0]} was ")


def test_what_is_told_of_a_hostile_file_is_short():
    content = {"x" * 10**6: [["y" * 10**6] * 100] * 100}
    assert len(first_difference(content, {})) < 1000


@pytest.mark.parametrize("name", ["file", "n" * 255, "ä" * 127])
def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path, name):
    target = tmp_path / name
    write_text(target, "first")
    (tmp_path / f".{name[:56]}.0123abcd.part").mkdir()
    (tmp_path / f".{name[:56]}.0123abcd.part" / name).write_text("half")
    write_text(target, "second")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', "is damaged: no JSON, corrupted or truncated"),
        (b"\xff\xfe", "is damaged: no JSON, corrupted or truncated"),
        (b"[1]", "holds no JSON object"),
    ],
)
def test_what_is_no_json_object_is_refused_with_the_fix(tmp_path, content, message):
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"facts\.json {message}.*; delete it and resume$"):
        read_json(path, fix="delete it and resume")
    with pytest.raises(ArtifactError, match=message):
        read_json(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"facts\.json does not exist$"):
        read_json(tmp_path / "facts.json", fix="delete it")


@pytest.mark.parametrize("version", [3, None, "2"])
def test_newer_versions_and_what_is_no_version_are_refused(version):
    check_version("file", 2, 2)
    check_version("file", 1, 2)
    with pytest.raises(ArtifactError, match=f"format version {version!r}, .* reads up to 2;"):
        check_version("file", version, 2)
