"""What is read is what was written, by its size and hash, and JSON is what every parser takes."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import flip

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.sealed import (
    Entry,
    SealedFolder,
    digest_of,
    hash_bytes,
    parse_json,
    read_json,
    seal,
    verified,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=3), JSON, max_size=4)


@given(value=OBJECTS)
def test_what_json_wrote_is_read_back(value):
    assert parse_json(json.dumps(value).encode(), "file") == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "key 'a' is there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"a": ' + "[" * 33 + "]" * 33 + "}", "nested too deeply"),
        ('{"a": ' + "[" * 100_000, "nested too deeply|no JSON"),
        ("[1]", "no JSON object"),
        ('{"a": 1', "truncated"),
        ("\udcff", "damaged"),
        ("", "truncated"),
    ],
)
def test_json_that_parsers_read_differently_is_refused(text, reason):
    with pytest.raises(ArtifactError, match=reason):
        parse_json(text.encode("utf-8", "surrogateescape"), "file")


@given(value=OBJECTS, substitute=OBJECTS)
def test_a_sealed_manifest_is_known_from_any_other(value, substitute):
    sealed = seal(value)
    content = {key: entry for key, entry in value.items() if key != "digest"}
    assert verified(json.loads(json.dumps(sealed)), "file") == content
    forged = {**substitute, "digest": sealed["digest"]}
    if digest_of({k: v for k, v in substitute.items() if k != "digest"}) != sealed["digest"]:
        with pytest.raises(ArtifactError, match="digest"):
            verified(forged, "file")


def test_configurations_of_diffusers_may_have_infinities():
    text = b'{"lambda_min_clipped": -Infinity, "beta_start": NaN}'
    config = parse_json(text, "file", finite=False)
    assert config["lambda_min_clipped"] == -float("inf")
    assert config["beta_start"] != config["beta_start"]


def folder(root, **contents):
    root.mkdir(exist_ok=True)
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return {name: Entry.of(root / name).to_dict() for name in contents}


@pytest.fixture
def sealed(tmp_path):
    files = folder(tmp_path / "folder", a=b"content", b=b"{}")
    return SealedFolder(tmp_path / "folder", files, "manifest")


def test_listed_files_are_read(sealed):
    assert sealed.read("a") == b"content"
    assert sealed.read_json("b") == {}
    with sealed.opened("a") as path:
        assert path.read_bytes() == b"content"
    sealed.check()


@pytest.mark.parametrize("position", range(7))
def test_a_flipped_bit_is_found_before_the_file_is_used(sealed, position):
    flip(sealed.root / "a", position, bit=2)
    for use in (lambda: sealed.read("a"), lambda: sealed.opened("a").__enter__(), sealed.check):
        with pytest.raises(ArtifactError, match="checksum"):
            use()
    assert sealed.read_json("b") == {}


def test_a_file_that_takes_the_name_after_the_hash_is_not_seen(sealed):
    with sealed.opened("a") as path:
        substitute = sealed.root / "other"
        substitute.write_bytes(b"another")
        substitute.replace(sealed.root / "a")
        assert path.read_bytes() == b"content"


def test_a_file_that_is_not_listed_is_not_read(sealed):
    (sealed.root / "c").write_bytes(b"")
    with pytest.raises(ArtifactError, match="lists no c"):
        sealed.read("c")


def test_a_file_of_another_size_is_refused_before_anything_is_hashed(sealed):
    files = {name: entry.to_dict() for name, entry in sealed.entries.items()}
    (sealed.root / "a").write_bytes(b"conten")
    with pytest.raises(ArtifactError, match="6 bytes, 7 were written"):
        SealedFolder(sealed.root, files, "manifest")


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "x/../a", "./a", "a/", "a//b", "", ".", "a\0", "c:\\a", "a\nb"]
)
def test_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    entry = folder(tmp_path / "folder", a=b"content")["a"]
    with pytest.raises(ArtifactError, match="is no file's name"):
        SealedFolder(tmp_path / "folder", {name: entry}, "manifest")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"bytes": 7},
        {"bytes": -1, "sha256": "0" * 64},
        {"bytes": True, "sha256": "0" * 64},
        {"bytes": 7, "sha256": "0" * 63},
        {"bytes": 7, "sha256": "G" * 64},
        {"bytes": 7, "sha256": "0" * 64, "more": 1},
    ],
)
def test_malformed_entries_are_refused(tmp_path, entry):
    folder(tmp_path / "folder", a=b"content")
    with pytest.raises(ArtifactError, match="malformed"):
        SealedFolder(tmp_path / "folder", {"a": entry}, "manifest")


def test_links_devices_pipes_and_folders_are_no_files_of_ours(tmp_path):
    root = tmp_path / "folder"
    files = folder(root, a=b"content")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(b"content")

    def refused(name, reason):
        with pytest.raises(ArtifactError, match=reason):
            SealedFolder(root, {name: files["a"]}, "manifest")

    (root / "link").symlink_to(root / "a")
    refused("link", "is a link")
    (root / "linked").symlink_to(outside)
    refused("linked/a", "is a link")
    os.mkfifo(root / "pipe")
    refused("pipe", "no regular file")
    (root / "sub").mkdir()
    refused("sub", "no regular file")
    refused("missing", "does not exist")
    with pytest.raises(ArtifactError, match="no regular file"):
        read_json("/dev/zero")


def test_a_sparse_file_of_a_terabyte_is_refused_unread(tmp_path):
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ArtifactError, match="more than any JSON file"):
        read_json(tmp_path / "huge.json")


def test_hash_is_sha256():
    assert hash_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
