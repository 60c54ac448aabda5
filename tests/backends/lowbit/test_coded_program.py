"""A compressed program of own kernels has its weights entropy-coded, and expands to its bytes."""

import lzma
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_package import kernels_installed, kernels_missing

from mpqdm_fx.backends.compressed import compress_program, expand_program
from mpqdm_fx.backends.kernel_library import place_codes
from mpqdm_fx.backends.lowbit.blob import pack_blob, unpack_blob
from mpqdm_fx.backends.lowbit.coded_program import take_codes
from mpqdm_fx.backends.lowbit.layout import (
    ENTRY,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Header,
    named_offsets,
)
from mpqdm_fx.errors import ArtifactError, LoweringError

pytestmark = pytest.mark.xnnpack

ALIGNMENT, FOOTER, LAYER = 16, 32, 16  # bytes, as native/FORMAT.md has them


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    with kernels_installed(tmp_path_factory.mktemp("kernels")):
        yield


@st.composite
def blobs(draw):
    """A blob whose rows have sizes of their own; some have codes of all values."""
    kernel = draw(st.sampled_from([1, 3]))
    shape = (draw(st.integers(1, 40)), 4 * draw(st.integers(1, 12)), kernel, kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    sizes = 2 ** (draw(st.integers(0, 8)) * torch.rand(shape[0], 1, 1, 1, generator=generator)) - 1
    codes = (torch.randn(shape, generator=generator) * sizes).round().clamp(-128, 127)
    bias = torch.randn(shape[0], generator=generator) if draw(st.booleans()) else None
    return pack_blob(codes.to(torch.int8), torch.rand(shape[0], generator=generator) + 0.1, bias)


@st.composite
def programs(draw):
    """Blobs at multiples of 16 bytes, among other bytes."""
    content = draw(st.binary(max_size=80))
    for blob in draw(st.lists(blobs(), max_size=3)):
        content += bytes(-len(content) % ALIGNMENT) + blob.numpy().tobytes()
        content += draw(st.binary(max_size=80))
    return content


def coarse_program(path, seed=0):
    """A layer of 64 x 576 codes, most of them small: 3.4 bits of entropy in rows of 6 bits."""
    generator = torch.Generator().manual_seed(seed)
    codes = (2.5 * torch.randn(64, 576, generator=generator)).round().clamp(-31, 31)
    codes[:, 0] = 24  # one large code widens each row
    path.write_bytes(pack_blob(codes.to(torch.int8), torch.ones(64)).numpy().tobytes())
    return path


@given(content=programs())
def test_a_program_expands_to_its_bytes(library, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("program") / "net.pte"
    path.write_bytes(content)
    assert expand_program(compress_program(path)).read_bytes() == content


@given(blob=blobs())
def test_codes_are_taken_where_that_is_shorter_and_nowhere_else(library, blob):
    program = blob.numpy().copy()
    behind = take_codes(program)
    if behind:
        assert len(behind) - FOOTER - LAYER < unpack_blob(blob).sections.codes
    else:
        assert np.array_equal(program, blob.numpy())


def test_wide_rows_of_small_codes_take_about_their_entropy(library, tmp_path):
    path = coarse_program(tmp_path / "net.pte")
    plain = lzma.compress(path.read_bytes())
    packed = compress_program(path)
    entropy = 3.37  # bits of a rounded Gaussian of deviation 2.5
    assert 8 * packed.stat().st_size / (64 * 576) < entropy + 0.35  # with scales and order of rows
    assert packed.stat().st_size < 0.8 * len(plain)


def test_codes_without_structure_stay_in_the_program(library):
    codes = torch.randint(-8, 8, (64, 576), generator=torch.Generator().manual_seed(0))
    program = pack_blob(codes.to(torch.int8), torch.ones(64)).numpy().copy()
    before = program.copy()
    assert take_codes(program) == b""
    assert np.array_equal(program, before)


@pytest.mark.parametrize("part", ["stream", "layers", "length", "version"])
def test_damaged_codes_are_refused_by_name(library, tmp_path, part):
    program = np.fromfile(coarse_program(tmp_path / "net.pte"), np.uint8)
    behind = bytearray(take_codes(program))
    at = {"stream": 900, "layers": -40, "length": -32, "version": -10}[part]
    behind[at] ^= 1
    path = tmp_path / "expanded"
    path.write_bytes(program.tobytes() + behind)
    with pytest.raises(ArtifactError, match=r"net\.pte\.xz is damaged: .*; copy it again"):
        place_codes(path, "net.pte.xz")


def test_a_coded_program_without_the_library_says_how_to_install(library, tmp_path):
    packed = compress_program(coarse_program(tmp_path / "net.pte"), keep=False)
    with kernels_missing(), pytest.raises(LoweringError, match=r"weights of .*net\.pte\.xz.*pip"):
        expand_program(packed)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pte.xz"]


def test_an_expanded_file_that_is_not_completed_is_no_program(library, tmp_path):
    """Zeros in place of the codes are not taken for weights: the blob's checksum is another."""
    path = coarse_program(tmp_path / "net.pte")
    content = bytearray(lzma.decompress(compress_program(path).read_bytes()))
    blob = torch.frombuffer(content, dtype=torch.uint8)[: path.stat().st_size]
    with pytest.raises(ArtifactError, match="bad checksum"):
        unpack_blob(blob)


def blob_of_one_block(rows, depth):
    """A blob that says of all its blocks that their codes, of one bit, are the same bytes."""
    named, codes_at = named_offsets(rows, bias=False)
    blocks, size = rows // 8, codes_at + depth
    entries = np.zeros(blocks, dtype=ENTRY)
    entries["codes_at"], entries["kind"], entries["bits"], entries["largest"] = codes_at, 1, 1, 1
    content = np.zeros(size, dtype=np.uint8)
    order = np.arange(rows, dtype="<u4")
    for at, values in (named.order_at, order), (named.block_at, entries):
        content[at : at + values.nbytes] = values.view(np.uint8)
    sizes = (rows, depth, depth, 1, blocks, 0)
    header = Header(MAGIC, VERSION, HEADER_BYTES, size, 0, *sizes, *named)
    content[:HEADER_BYTES] = np.frombuffer(header.pack(), dtype=np.uint8)
    return content.tobytes()


def test_a_small_file_asks_for_no_large_memory(library, tmp_path):
    blob, stream = blob_of_one_block(4096, 4096), bytes(600)
    footer = struct.pack("<QQIHHI4s", len(blob), 1, 0, FOOTER, 1, 0, b"MPQC")
    path = tmp_path / "net.pte"
    path.write_bytes(blob + stream + struct.pack("<QQ", 0, len(stream)) + footer)
    with pytest.raises(ArtifactError, match="blocks lie on each other"):
        place_codes(path, path.name)
