"""Compressed programs expand to the same bytes, once, or not at all."""

import lzma

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from records import flip

from mpqdm_fx.backends.compressed import (
    compress_program,
    drop_expansions,
    expand_program,
)
from mpqdm_fx.backends.kernel_library import CODED_END
from mpqdm_fx.backends.xnnpack.runner import stored_files
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io import expansion
from mpqdm_fx.io.sealed import Entry


@given(content=st.binary(max_size=300), repeats=st.integers(1, 50))
def test_expanded_bytes_are_those_compressed(tmp_path_factory, content, repeats):
    assume(not (content * repeats).endswith(CODED_END))  # coded weights, which end so, go back
    folder = tmp_path_factory.mktemp("files")
    path = folder / "net.pte"
    path.write_bytes(content * repeats)
    packed = compress_program(path)
    assert packed == folder / "net.pte.xz"
    assert expand_program(packed).read_bytes() == content * repeats
    assert path.read_bytes() == content * repeats


def program(folder, seed=0, levels=16):
    path = folder / "net.pte"
    codes = np.random.default_rng(seed).integers(0, levels, 50_000, dtype=np.int8)
    path.write_bytes(codes.tobytes())
    return path


@pytest.mark.parametrize(("levels", "most"), [(4, 2.4), (8, 3.4), (16, 4.25)])
def test_codes_of_few_levels_take_about_their_own_bits(levels, most, tmp_path):
    packed = compress_program(program(tmp_path, levels=levels))
    assert 8 * packed.stat().st_size / 50_000 < most


def test_a_file_whose_content_is_known_is_expanded_once_and_anew_when_it_changes(
    tmp_path, monkeypatch
):
    content = Entry.of(program(tmp_path))
    packed = compress_program(tmp_path / "net.pte")
    first = expand_program(packed, content=content)
    with monkeypatch.context() as patch:
        patch.setattr(expansion.lzma, "LZMADecompressor", None)  # a second expansion would call it
        assert expand_program(packed, content=content) == first
    compress_program(program(tmp_path, seed=1))
    second = expand_program(packed)
    assert second != first
    assert second.read_bytes() == (tmp_path / "net.pte").read_bytes()
    assert not first.exists()


def test_a_hash_that_is_known_is_not_computed_again(tmp_path, monkeypatch):
    content = Entry.of(program(tmp_path))
    packed = compress_program(tmp_path / "net.pte")
    digest, first = Entry.of(packed).sha256, expand_program(packed, content=content)
    measured, measure = [], Entry.of
    monkeypatch.setattr(Entry, "of", lambda path: measured.append(path) or measure(path))
    assert expand_program(packed, content=content, sha256=digest) == first
    assert expand_program(packed, content=content) == first
    assert measured == [packed]


@pytest.mark.parametrize("known", [True, False])
def test_a_file_is_not_trusted_because_its_name_fits(tmp_path, known):
    content = Entry.of(program(tmp_path))
    packed = compress_program(tmp_path / "net.pte")
    first = expand_program(packed)
    flip(first, 1000)
    assert expand_program(packed, content=content if known else None) == first
    assert Entry.of(first) == content


def test_a_file_expands_to_no_more_than_its_manifest_says(tmp_path):
    path = tmp_path / "net.pte"
    path.write_bytes(bytes(2**24))
    content = Entry.of(path)
    packed = compress_program(path, keep=False)
    most = 1000 + 2 * packed.stat().st_size  # what may follow a program
    with pytest.raises(ArtifactError, match=f"more than the {most} bytes"):
        expand_program(packed, content=Entry(bytes=1000, sha256=content.sha256))
    with pytest.raises(ArtifactError, match="more than the"):
        expand_program(packed)  # more than 256 times its size
    with pytest.raises(ArtifactError, match="another file"):
        expand_program(packed, content=Entry(bytes=content.bytes, sha256="0" * 64))
    assert [file.name for file in tmp_path.iterdir()] == ["net.pte.xz"]
    assert Entry.of(expand_program(packed, content=content)) == content


def test_expansion_can_be_kept_elsewhere(tmp_path):
    packed = compress_program(program(tmp_path))
    (tmp_path / "cache").mkdir()
    plain = expand_program(packed, tmp_path / "cache")
    assert plain.parent == tmp_path / "cache"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "net.pte", "net.pte.xz"]


def test_a_compressed_file_takes_the_place_of_the_plain_one_and_its_expansions_go(tmp_path):
    plain = program(tmp_path)
    content = plain.read_bytes()
    (tmp_path / "net.ptd").write_bytes(b"weights")
    assert stored_files(plain) == (plain, tmp_path / "net.ptd")
    packed = compress_program(plain, keep=False)
    assert stored_files(plain) == (packed, tmp_path / "net.ptd")
    assert expand_program(packed).read_bytes() == content
    (tmp_path / ".net.pte.note").write_text("not ours")
    drop_expansions(packed)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".net.pte.note", "net.ptd", "net.pte.xz"]
    packed.unlink()
    assert stored_files(plain) == ()


@pytest.mark.parametrize(
    "damage", ["flipped", "truncated", "no xz", "zeros", "lzma", "joined", "padded"]
)
def test_damage_is_found_and_leaves_nothing_behind(damage, tmp_path):
    packed = compress_program(program(tmp_path))
    content = packed.read_bytes()
    if damage == "flipped":
        flip(packed)
    else:  # zeros are a file of 0 bytes in the format before .xz, which has no checksum
        contents = {
            "truncated": content[:-40],
            "no xz": b"not compressed",
            "zeros": bytes(len(content)),
            "lzma": lzma.compress(b"program", format=lzma.FORMAT_ALONE),
            "joined": content + content,
            "padded": content + b"more",
        }
        packed.write_bytes(contents[damage])
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        expand_program(packed)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_content_is_held_by_sha256(tmp_path):
    packed = compress_program(program(tmp_path))
    with lzma.open(packed) as file:
        file.read(1)
    decompressor = lzma.LZMADecompressor()
    decompressor.decompress(packed.read_bytes())
    assert decompressor.check == lzma.CHECK_SHA256


def test_names_are_checked(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        compress_program(tmp_path / "none.pte")
    with pytest.raises(ArtifactError, match="does not exist"):
        expand_program(tmp_path / "none.pte.xz")
    with pytest.raises(ArtifactError, match="ends in"):
        compress_program(program(tmp_path), tmp_path / "net.zip")
