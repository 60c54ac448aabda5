"""Tables: no number is ever cut, and no line is wider than the terminal."""

import io
import math
import re

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from mpqdm_fx.cli.screens.columns import Column, Columns, fold
from mpqdm_fx.cli.screens.layers import ORDERS, activation_table, judgement_table, layer_table
from mpqdm_fx.cli.screens.parity import rung_table, worst_table
from mpqdm_fx.parity.ladder import Ladder, NodeParity, Rung
from mpqdm_fx.parity.sites import Site
from mpqdm_fx.records.report import (
    ActivationChoice,
    Judgement,
    LayerReport,
    QuantizationReport,
)

WIDTHS = st.sampled_from([80, 100, 120, 200])
part = st.one_of(
    st.sampled_from(
        ["down_blocks", "0", "attentions", "transformer_blocks", "conv_shortcut_part0"]
    ),
    st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=40),
    st.text("層注意üß", min_size=1, max_size=12),
)
names = st.lists(part, min_size=1, max_size=7).map(".".join)
decibels = st.floats(-99, 199) | st.just(math.inf)


def printed(width, *tables):
    console = Console(width=width)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


@st.composite
def layer_reports(draw):
    shape = st.lists(st.integers(1, 99_999), min_size=2, max_size=5).map(tuple)
    return LayerReport(
        name=draw(names),
        kind="Conv2d",
        shape=draw(shape),
        mean_bits=draw(st.floats(1, 8)),
        bytes=draw(st.integers(1, 10**13)),
        sqnr_db=draw(st.none() | decibels),
        fraction=draw(st.sampled_from([0.0, 0.25])),
        reason=draw(st.none() | st.just("override 're:mid[a-z]+[01]' of a long pattern, and more")),
        base_sqnr_db=draw(st.none() | decibels),
        alpha=draw(st.floats(0, 1)),
    )


@st.composite
def reports(draw):
    choices = st.builds(
        lambda name, costs: ActivationChoice(
            layers=tuple(f"{name}.{index}" for index in range(3)),
            kind="dynamic", exponent=0.5, quantized_cost=costs[0], cost=costs[1], slowdown=costs[2],
        ),
        names,
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(-1, 99)),
    )  # fmt: skip
    count = draw(st.integers(1, 9))
    levels = st.lists(st.none() | decibels, min_size=count, max_size=count).map(tuple)
    judged = st.builds(
        lambda sqnr, chosen: Judgement(
            recipe="plain rounding with the same bits", error=0.1, sqnr_db=sqnr, chosen=chosen
        ),
        levels,
        st.booleans(),
    )
    return QuantizationReport(
        layers=tuple(draw(st.lists(layer_reports(), min_size=1, max_size=5))),
        calibration_calls=1,
        seconds=1.0,
        versions={},
        activations=tuple(draw(st.lists(choices, max_size=15))),
        judged=tuple(draw(st.lists(judged, min_size=1, max_size=3))),
    )


def check_lines(text, width):
    for line in text.splitlines():
        assert cell_len(line) <= width, line
        # an ellipsis stands between the two ends of a name, never where a number was
        assert not re.search(r"\d…(\s|$)|(^|\s)…|…(\s|$)", line), line


@given(report=reports(), width=WIDTHS, order=st.none() | st.sampled_from(sorted(ORDERS)))
def test_tables_of_layers_fit_and_cut_no_number(report, width, order):
    text = printed(width, layer_table(report, order=order))
    check_lines(text, width)
    words = text.split()
    for layer in report.layers:
        assert {f"{layer.mean_bits:.2f}", f"{layer.bytes:,}"} <= set(words)
        assert layer.sqnr_db is None or f"{layer.sqnr_db:.1f}" in words


@given(report=reports(), width=WIDTHS)
def test_tables_of_inputs_and_judgements_fit_and_cut_no_number(report, width):
    text = printed(width, activation_table(report), judgement_table(report))
    check_lines(text, width)
    for judgement in report.judged:
        assert f"{judgement.decibels:.1f}" in text.split()


@st.composite
def ladders(draw):
    bounded = draw(st.booleans())
    node = st.builds(
        lambda name, sqnr, alone: NodeParity(
            site=Site(name, 0, "conv2d", 0), shape=(1, 320, 64, 64), sqnr_db=sqnr, own_db=alone,
            wanted_db=60.0 if bounded else None, wanted_own_db=-30.0 if bounded else None,
        ),
        names, decibels, decibels,
    )  # fmt: skip
    rungs = [Rung(name="float", against=None, float_db=math.inf, previous_db=None)]
    rungs += [
        Rung(
            name=name, against="decomposed", float_db=draw(decibels), previous_db=draw(decibels),
            wanted_float_db=draw(decibels) if bounded else None,
            wanted_db=draw(decibels) if bounded else None,
            nodes=tuple(draw(st.lists(node, max_size=4))),
        )
        for name in ("quantized", "decomposed", "converted")
    ]  # fmt: skip
    return Ladder(rungs=tuple(rungs), calls=4)


@given(ladder=ladders(), width=WIDTHS)
def test_tables_of_rungs_fit_and_cut_no_number(ladder, width):
    text = printed(width, rung_table(ladder), worst_table(ladder))
    check_lines(text, width)
    words = text.split()
    for rung in ladder.rungs[1:]:
        for value in (rung.float_db, rung.previous_db, rung.wanted_db):
            assert value in (None, math.inf) or f"{value:.1f}" in words


@given(name=names, width=st.integers(3, 60))
def test_a_folded_name_has_both_ends_and_fits(name, width):
    folded = fold(name, width)
    assert cell_len(folded) <= width
    if folded != name and folded != "…":
        head, ellipsis, tail = folded.partition("…")
        assert ellipsis
        assert name.startswith(head)
        assert name.endswith(tail)


def test_names_are_folded_at_whole_parts_where_little_is_lost():
    assert fold("down_blocks.0.attentions.1.to_q", 19) == "down_blocks…1.to_q"
    assert fold("mid_block.attentions.0.to_out.0", 24) == "mid_block…0.to_out.0"
    assert fold("a_module_with_a_name_of_one_part", 19) == "a_modul…of_one_part"
    assert fold("mid", 19) == "mid"


def test_a_pipe_gets_whole_names():
    name = "down_blocks.0." + "attentions.1." * 20 + "to_q"
    table = Columns("", [Column(heading="layer", kind="name"), Column(heading="bits")])
    table.add(name, "4.00")
    assert f"{name}  4.00" in printed(100_000, table)


def test_what_matters_least_is_left_out_first():
    table = Columns(
        "",
        [
            Column(heading="layer", kind="name"),
            Column(heading="first", spare=1),
            Column(heading="second", spare=2),
            Column(heading="bytes"),
        ],
    )
    table.add("x" * 60, "1" * 20, "2" * 20, "3" * 20)
    wide, narrow, least = (printed(width, table) for width in (200, 80, 60))
    assert "first" in wide
    assert "first" not in narrow
    assert "2" * 20 in narrow
    assert "second" not in least
    assert "3" * 20 in least


def test_a_spare_column_without_a_cell_is_left_out():
    table = Columns("", [Column(heading="layer", kind="name"), Column(heading="alpha", spare=1)])
    table.add("conv", "")
    assert "alpha" not in printed(80, table)


def test_a_terminal_without_such_characters_gets_others():
    table = Columns("", [Column(heading="layer", kind="name"), Column(heading="bits")])
    table.add("a." * 60 + "to_q", "±25%")
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file, width=80).print(table)
    file.flush()
    text = file.buffer.getvalue().decode("ascii")
    assert "~" in text
    assert "+25%" in text
    assert "-----" in text
