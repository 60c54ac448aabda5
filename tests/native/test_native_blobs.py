"""The C++ reader and the Python reader take the same bytes for blobs."""

import pytest
import torch
from blob_rows import field, layers, sealed, with_field
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.backends.lowbit.blob import pack_blob, unpack_blob
from mpqdm_fx.errors import ArtifactError


def is_refused_in_python(blob):
    try:
        unpack_blob(blob)
    except ArtifactError:
        return True
    return False


def small_blob():
    codes = torch.arange(-60, 60, dtype=torch.int8).repeat(3)[: 18 * 8].reshape(18, 8)
    return pack_blob(codes, torch.ones(18), torch.ones(18))


@given(layer=layers(max_rows=12, max_groups=4), data=st.data())
def test_changed_bytes_are_refused_by_both(native, layer, data):
    blob = pack_blob(*layer)
    changed = blob.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(blob) - 1) | st.integers(0, 127))
        changed[at] ^= data.draw(st.integers(1, 255))
    is_refused = not torch.equal(changed, blob)
    assert (native.blob_error(changed) is not None) == is_refused
    assert is_refused_in_python(changed) == is_refused


def test_every_bit_of_the_header_matters(native):
    blob = small_blob()
    assert native.blob_error(blob) is None
    for bit in range(8 * 128):
        changed = blob.clone()
        changed[bit // 8] ^= 1 << bit % 8
        assert native.blob_error(changed) is not None, f"bit {bit}"


def test_a_cut_blob_is_refused(native):
    blob = small_blob()
    for length in range(1, len(blob)):
        assert native.blob_error(blob[:length].clone()) is not None


ORDER, BLOCKS = 48, 56  # where the header says where sections are
FAULTS = {
    "magic": (lambda b: with_field(b, 0, 7), "holds no weight blob"),
    "version": (lambda b: with_field(b, 4, 2, "H"), "a format version that this library does not"),
    "length": (lambda b: with_field(b, 8, len(b) + 64, "Q"), "shorter than its header says"),
    "rows": (lambda b: with_field(b, 24, 0), "do not fit together"),
    "kernel": (lambda b: with_field(b, 36, 2), "do not fit together"),
    "offset": (lambda b: with_field(b, ORDER, 192, "Q"), "lies outside the blob"),
    "codes": (lambda b: with_field(b, field(b, BLOCKS), 2**40, "Q"), "lies outside the blob"),
    "width": (
        lambda b: with_field(b, field(b, BLOCKS) + 13, 9, "B"),
        "an encoding, width",
    ),
    "order": (lambda b: with_field(b, field(b, ORDER), 1), "is no permutation"),
    "checksum": (lambda b: with_field(b, len(b) - 4, 1), "the checksum differs"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_sentence(native, name):
    change, sentence = FAULTS[name]
    changed = change(small_blob())
    assert sentence in native.blob_error(changed if name == "checksum" else sealed(changed))
