import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_strategies import weights_and_bits

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.numerics.levels import packing
from mpqdm_fx.numerics.levels.codebook import quantize_codebook
from mpqdm_fx.numerics.levels.grids import uniform_levels
from mpqdm_fx.numerics.levels.packing import (
    PackedLayer,
    pack_bits,
    pack_layer,
    storage_bits,
    unpack_bits,
    unpack_layer,
)

WIDTHS = st.integers(1, 8)


def integers(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**width, (count,), generator=generator)


@st.composite
def layers(draw):
    """Codes, bits and level kind of one layer; uniform codes cover the whole range."""
    W, bits = draw(weights_and_bits())
    if draw(st.booleans()):
        bits = bits[:1].expand(len(bits)).clone()
    levels = draw(st.sampled_from(["uniform", "codebook"]))
    if levels == "codebook":
        return quantize_codebook(W, bits)[0], bits, levels
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    codes = torch.empty(W.shape, dtype=torch.int8)
    for row, width in enumerate(bits.tolist()):
        legal = uniform_levels(width)
        codes[row] = legal[torch.randint(len(legal), codes[row].shape, generator=generator)]
    return codes, bits, levels


@given(st.integers(0, 300), WIDTHS, st.integers(0, 2**16), st.sampled_from([8, 64, 1 << 21]))
def test_integers_of_every_width_and_length_survive(count, width, seed, chunk):
    values = integers(count, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_CHUNK", chunk)
        stream = pack_bits(values, width)
        assert torch.equal(unpack_bits(stream, width, count).long(), values)
    assert stream.dtype == torch.uint8
    assert len(stream) == -(-count * width // 8)


@given(st.integers(0, 100), WIDTHS, st.integers(0, 2**16))
def test_the_stream_is_the_values_written_lowest_bit_first(count, width, seed):
    values = integers(count, width, seed)
    bits = "".join(f"{value:0{width}b}"[::-1] for value in values.tolist())
    padded = bits.ljust(-(-len(bits) // 8) * 8, "0")
    expected = [int(padded[i : i + 8][::-1], 2) for i in range(0, len(padded), 8)]
    assert pack_bits(values, width).tolist() == expected


@pytest.mark.parametrize("width", range(1, 9))
def test_packing_is_injective_on_all_short_sequences(width):
    length = 2 if width <= 4 else 1
    sequences = torch.cartesian_prod(*[torch.arange(2**width)] * length).view(-1, length)
    streams = {tuple(pack_bits(values, width).tolist()) for values in sequences}
    assert len(streams) == len(sequences)


@pytest.mark.parametrize("width", range(1, 9))
def test_values_that_do_not_fit_are_refused(width):
    for value in (-1, 2**width):
        with pytest.raises(ConfigError, match="do not fit"):
            pack_bits(torch.tensor([0, value]), width)


@pytest.mark.parametrize("width", [0, 9])
def test_widths_outside_one_to_eight_are_refused(width):
    with pytest.raises(ConfigError, match="1 to 8"):
        pack_bits(torch.zeros(1, dtype=torch.int64), width)
    with pytest.raises(ConfigError, match="1 to 8"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), width, 1)


@given(st.integers(1, 100), WIDTHS, st.integers(0, 2**16))
def test_truncated_and_over_long_streams_are_refused(count, width, seed):
    stream = pack_bits(integers(count, width, seed), width)
    for wrong in (stream[:-1], torch.cat([stream, stream[:1]])):
        with pytest.raises(ArtifactError, match="truncated"):
            unpack_bits(wrong, width, count)


@given(st.integers(1, 100), WIDTHS, st.integers(0, 2**16))
def test_padding_is_zero_and_a_set_padding_bit_is_refused(count, width, seed):
    stream = pack_bits(integers(count, width, seed), width)
    used = count * width % 8
    if used:
        assert int(stream[-1]) >> used == 0
        stream[-1] |= 1 << used
        with pytest.raises(ArtifactError, match="padding"):
            unpack_bits(stream, width, count)


@given(layers())
def test_layers_of_mixed_widths_survive(layer):
    codes, bits, levels = layer
    packed = pack_layer(codes, bits, levels)
    unpacked, widths = unpack_layer(packed, codes.shape, bits, levels)
    assert torch.equal(unpacked, codes)
    assert torch.equal(widths, bits)
    if len(packed.widths):  # the tags alone tell the widths
        again, widths = unpack_layer(packed, codes.shape, levels=levels)
        assert torch.equal(again, codes)
        assert torch.equal(widths, bits)


@given(layers())
def test_counted_storage_is_the_length_of_the_parts(layer):
    codes, bits, levels = layer
    packed = pack_layer(codes, bits, levels)
    counted = storage_bits(codes.shape, bits, levels)
    assert counted.codes == 8 * packed.stream.nbytes
    assert counted.tables == 8 * packed.tables.nbytes
    assert counted.widths == 8 * packed.widths.nbytes
    assert counted.scales == 16 * len(codes)
    assert counted.total == sum(counted)
    exact = int(bits.sum()) * codes.shape[1]
    assert exact <= counted.codes < exact + 8


@given(layers(), st.data())
def test_a_changed_code_changes_the_bytes(layer, data):
    codes, bits, _ = layer
    row = data.draw(st.integers(0, len(codes) - 1))
    column = data.draw(st.integers(0, codes.shape[1] - 1))
    legal = uniform_levels(int(bits[row])).tolist()
    original = torch.stack([uniform_levels(int(b))[:1].expand(codes.shape[1]) for b in bits])
    changed = original.clone()
    changed[row, column] = data.draw(st.sampled_from(legal[1:]))
    before, after = (pack_layer(c, bits, "uniform").stream for c in (original, changed))
    assert not torch.equal(before, after)


@given(layers())
def test_truncated_and_over_long_layers_are_refused(layer):
    codes, bits, levels = layer
    packed = pack_layer(codes, bits, levels)
    for field, part in packed._asdict().items():
        if not len(part):
            continue
        for wrong in (part[:-1], torch.cat([part, part[-1:]])):
            if field == "widths" and not len(wrong):
                continue
            broken = packed._replace(**{field: wrong})
            with pytest.raises(ArtifactError):
                unpack_layer(broken, codes.shape, bits, levels)


def test_equal_widths_store_no_tags_and_need_to_be_told():
    packed = pack_layer(torch.ones(3, 4, dtype=torch.int8), torch.tensor([2, 2, 2]), "uniform")
    assert not len(packed.widths)
    with pytest.raises(ConfigError, match="pass bits"):
        unpack_layer(packed, (3, 4))
    assert torch.equal(unpack_layer(packed, (3, 4), 2)[1], torch.tensor([2, 2, 2]))


def test_bits_that_contradict_the_stored_widths_are_refused():
    codes = torch.ones(2, 4, dtype=torch.int8)
    packed = pack_layer(codes, torch.tensor([2, 4]), "uniform")
    with pytest.raises(ArtifactError, match="not the plan's"):
        unpack_layer(packed, (2, 4), torch.tensor([4, 2]))
    without = packed._replace(widths=packed.widths[:0])
    with pytest.raises(ArtifactError, match="none stored"):
        unpack_layer(without, (2, 4), torch.tensor([2, 4]))


@pytest.mark.parametrize(("code", "width"), [(2, 3), (0, 1), (5, 2), (-128, 8), (-9, 3)])
def test_codes_that_are_no_levels_are_refused(code, width):
    codes = torch.tensor([[1, 1], [1, code]], dtype=torch.int8)
    with pytest.raises(ConfigError, match="channel 1"):
        pack_layer(codes, torch.tensor([width, width]), "uniform")


def test_an_eight_bit_index_that_is_no_level_is_refused():
    stream = torch.tensor([255], dtype=torch.uint8)
    empty = torch.empty(0, dtype=torch.uint8)
    with pytest.raises(ArtifactError, match="255"):
        unpack_layer(PackedLayer(stream, empty, empty.view(torch.int8)), (1, 1), 8)


def test_a_shuffled_table_is_refused():
    codes = torch.tensor([[-5, 9, 9]], dtype=torch.int8)
    packed = pack_layer(codes, torch.tensor([1]), "codebook")
    assert packed.tables.tolist() == [-5, 9]
    with pytest.raises(ArtifactError, match="ascend"):
        unpack_layer(packed._replace(tables=packed.tables.flip(0)), (1, 3), 1, "codebook")


def test_codes_must_be_an_int8_matrix():
    with pytest.raises(ConfigError, match="int8"):
        pack_layer(torch.ones(2, 2), torch.tensor([2, 2]), "uniform")
