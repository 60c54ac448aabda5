"""A damaged blob is refused by name, whatever is wrong with it."""

import pytest
import torch
from blob_rows import field, layers, make_row, sealed, with_field
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.backends.lowbit.blob import pack_blob, unpack_blob
from mpqdm_fx.errors import ArtifactError

ORDER, BLOCKS, SCALE, BIAS = 48, 56, 64, 72  # where the header says where sections are


def small_blob(bias=True):
    """18 rows: two blocks of tables and bytes, and a third of two rows."""
    generator = torch.Generator().manual_seed(0)
    classes = [("table", 2)] * 8 + [("byte", 8)] * 8 + [("odd", 3)] * 2
    rows = [make_row(kind, bits, 36, generator) for kind, bits in classes]
    scale = torch.arange(1, 19).float()
    return pack_blob(torch.stack(rows).reshape(18, 4, 3, 3), scale, scale if bias else None)


def flipped(blob, at, mask):
    changed = blob.clone()
    changed[at] ^= mask
    return changed


def test_every_changed_byte_is_found():
    blob = small_blob()
    unpack_blob(blob)
    for at in range(128):
        with pytest.raises(ArtifactError, match="weight blob: "):
            unpack_blob(flipped(blob, at, 1 << at % 8))
    for at in range(128, len(blob)):
        with pytest.raises(ArtifactError, match="bad checksum"):
            unpack_blob(flipped(blob, at, 1 << at % 8))


@given(layer=layers(max_rows=12, max_groups=4), data=st.data())
def test_no_changed_byte_behind_the_header_goes_unseen(layer, data):
    blob = pack_blob(*layer)
    at = data.draw(st.integers(128, len(blob) - 1))
    with pytest.raises(ArtifactError, match="bad checksum"):
        unpack_blob(flipped(blob, at, data.draw(st.integers(1, 255))))


def test_a_cut_or_longer_blob_is_refused():
    blob = small_blob()
    for length in range(len(blob)):
        with pytest.raises(ArtifactError, match="too short"):
            unpack_blob(blob[:length])
    with pytest.raises(ArtifactError, match="too long"):
        unpack_blob(torch.cat([blob, blob[:64]]))


@given(data=st.data())
def test_a_drawn_header_is_refused_or_says_the_same(data):
    blob = small_blob()
    changed = blob
    for _ in range(data.draw(st.integers(1, 3))):
        at = 4 * data.draw(st.integers(0, 31))
        near = field(blob, at) + 64 * data.draw(st.integers(-3, 3))
        value = data.draw(st.sampled_from([0, 1, 3, 2**31, 2**32 - 1, near % 2**32]))
        changed = with_field(changed, at, value)
    try:
        content = unpack_blob(changed)
    except ArtifactError:
        return
    assert content.codes.shape == unpack_blob(blob).codes.shape


@given(data=st.data())
def test_sealed_nonsense_is_refused_or_read_but_fails_in_no_other_way(data):
    blob = small_blob()
    end = field(blob, SCALE, "Q")  # order and block table are before
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(128, end - 1))
        blob = flipped(blob, at, data.draw(st.integers(1, 255)))
    try:
        assert unpack_blob(sealed(blob)).codes.shape == (18, 36)
    except ArtifactError as error:
        assert str(error).startswith("weight blob: bad ")  # noqa: PT017


def entry(blob, block, at):
    return field(blob, BLOCKS, "Q") + 16 * block + at


FAULTS = {
    "magic": (lambda b: with_field(b, 0, 7), "not a blob: magic"),
    "version": (lambda b: with_field(b, 4, 2, "H"), "other version: 2"),
    "header's size": (lambda b: with_field(b, 6, 64, "H"), "header of 64 bytes"),
    "rows": (lambda b: with_field(b, 24, 0), "bad sizes: 0 output channels"),
    "blocks": (lambda b: with_field(b, 40, 4), "bad sizes: 4 blocks for 18 rows"),
    "depth": (lambda b: with_field(b, 28, 40), "bad sizes: depth 40, not 36"),
    "channels": (lambda b: with_field(b, 32, 6), "bad sizes: 6 input channels"),
    "kernel": (lambda b: with_field(b, 36, 2), "bad sizes: a kernel of 2"),
    "flags": (lambda b: with_field(b, 44, 3), "bad sizes: flags 0x3"),
    "end of header": (lambda b: with_field(b, 124, 1), "end of the header"),
    "checksum": (lambda b: with_field(b, 16, 1, "Q"), "bad checksum"),
    "order's offset": (
        lambda b: with_field(b, ORDER, 130, "Q"),
        "bad offset: order_at is 130, not 128",
    ),
    "table's offset": (lambda b: with_field(b, BLOCKS, 0, "Q"), "bad offset: block_at is 0"),
    "far offset": (lambda b: with_field(b, SCALE, 2**63, "Q"), "bad offset: scale_at"),
    "offset": (
        lambda b: with_field(b, BIAS, field(b, SCALE, "Q"), "Q"),
        "bad offset: bias_at is",
    ),
    "no bias": (lambda b: with_field(b, 44, 0), "bad offset: bias_at is"),
    "codes": (lambda b: with_field(b, entry(b, 1, 0), 128, "Q"), "bad offset: .* runs into"),
    "far codes": (lambda b: with_field(b, entry(b, 1, 0), 2**40, "Q"), "runs into the end"),
    "crooked codes": (
        lambda b: with_field(b, entry(b, 2, 0), field(b, entry(b, 2, 0), "Q") - 32, "Q"),
        "bad offset: codes at .*, no multiple of 64",
    ),
    "cut": (lambda b: with_field(b[:256], 8, 256, "Q"), "bad offset: sections end at 576 of 256"),
    "kind": (lambda b: with_field(b, entry(b, 1, 12), 4, "B"), "bad block: block 1 has the kind 4"),
    "width": (lambda b: with_field(b, entry(b, 0, 13), 8, "B"), "bad block: block 0 has the kind"),
    "no table": (
        lambda b: with_field(b, entry(b, 0, 8), 0),
        "bad block: block 0 of kind table has no",
    ),
    "table": (lambda b: with_field(b, entry(b, 1, 8), 2), "bad block: block 1 of kind byte has a"),
    "bound": (lambda b: with_field(b, entry(b, 2, 14), 6, "B"), "block 2: largest 6, not 7"),
    "bound of tables": (lambda b: with_field(b, entry(b, 0, 14), 1, "B"), "not that of its tables"),
    "bound of bytes": (lambda b: with_field(b, entry(b, 1, 14), 1, "B"), "exceeds its largest"),
    "padding": (lambda b: with_field(b, entry(b, 1, 15), 1, "B"), "bad block: block 1"),
    "order": (lambda b: with_field(b, field(b, ORDER, "Q"), 1), "bad order"),
    "fill": (lambda b: with_field(b, field(b, ORDER, "Q") + 4 * 20, 18), "bad order"),
    "scale": (lambda b: with_field(b, field(b, SCALE, "Q"), -1.0, "f"), "bad scale"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_name(name):
    change, message = FAULTS[name]
    blob = change(small_blob())
    with pytest.raises(ArtifactError, match=message):
        unpack_blob(blob if name == "checksum" else sealed(blob))


@pytest.mark.parametrize("blob", [torch.zeros(128), torch.zeros(2, 128, dtype=torch.uint8)])
def test_another_tensor_is_no_blob(blob):
    with pytest.raises(ArtifactError, match="not a blob: uint8"):
        unpack_blob(blob)
