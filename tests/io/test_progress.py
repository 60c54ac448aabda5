import subprocess
import sys

import pytest
from reporters import Told

from mpqdm_fx.io.progress import SILENT, Bars, each, expect, leave_log, reporting, stage, tracked


def test_a_stage_tells_amounts_and_notes_and_its_end_once():
    told = Told()
    with reporting(told), stage("rounding", total=3, unit="layer") as advance:
        advance()
        advance(2, note="mid")
        assert (advance.done, advance.total, advance.note) == (3, 3, "mid")
        advance.close()
    assert (told.names, told.amounts, told.closed_names) == (["rounding"], [1, 2], ["rounding"])


def test_a_stage_that_an_error_ends_is_not_told_as_finished():
    told = Told()
    with reporting(told), pytest.raises(ValueError, match="no"), stage("rounding"):
        raise ValueError("no")
    assert (told.closed_names, told.failed_names) == ([], ["rounding"])


def test_tracked_items_count_when_the_next_one_is_asked_for():
    told = Told()
    with reporting(told):
        for number, _ in enumerate(tracked("abc", "letters")):
            assert sum(told.amounts) == number
        assert list(tracked(iter("ab"), None)) == ["a", "b"]
    assert told.stages[0].total == 3
    assert told.names == told.closed_names == ["letters"]


def test_each_item_has_a_stage_of_its_own():
    told = Told()
    with reporting(told):
        for item in each("ab", str.upper):
            assert told.names[-1] == item.upper()
    assert told.closed_names == ["A", "B"]


def test_the_silent_reporter_is_told_nothing_and_nothing_is_worked_out(tmp_path):
    told = Told()
    with reporting(told), reporting(SILENT):
        with stage("rounding", total=2) as advance:
            assert not advance.is_told
            advance()
        expect(lambda: pytest.fail("nobody wants to know"))
        leave_log(tmp_path)
    assert not told.stages
    assert not list(tmp_path.iterdir())


def test_the_reporter_outside_a_block_is_back_behind_it():
    outer, inner = Told(), Told()
    with reporting(outer):
        with pytest.raises(KeyError), reporting(inner):
            raise KeyError
        expect(lambda: {"rounding": 1.0})
    assert outer.expectations == [{"rounding": 1.0}]
    assert not inner.expectations


def test_bars_of_tqdm_follow_stages(monkeypatch):
    class Bar:
        def __init__(self, **given):
            self.given, self.amounts, self.closed = given, [], False
            bars.append(self)

        def update(self, amount):
            self.amounts.append(amount)

        def set_postfix_str(self, note, refresh):
            self.note = note

        def close(self):
            self.closed = True

    bars = []
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    with reporting(Bars()), stage("outer") as outer:
        with stage("inner", total=2) as inner:
            inner(2, note="b")
        outer()
    outer_bar, inner_bar = bars
    assert (inner_bar.given["desc"], inner_bar.given["total"]) == ("inner", 2)
    assert (inner_bar.amounts, inner_bar.note) == ([2], "b")
    assert outer_bar.amounts == [1]
    assert outer_bar.closed
    assert inner_bar.closed
    assert inner_bar.given["disable"] is None  # none where standard error is no terminal


def test_the_module_is_there_before_torch_is():
    code = "import sys, mpqdm_fx.io.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
