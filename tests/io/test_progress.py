import subprocess
import sys

import pytest
from reporters import Told

from mpqdm_fx.io.progress import SILENT, Bars, each, expect, leave_log, reporting, stage, tracked


def test_a_stage_tells_amounts_and_notes_and_its_end_once():
    reporter = Told()
    with reporting(reporter), stage("rounding", total=3, unit="layer") as advance:
        advance()
        advance(2, note="mid")
        assert (advance.done, advance.total, advance.note) == (3, 3, "mid")
        advance.close()
    assert (reporter.names, reporter.amounts, reporter.closed_names) == (
        ["rounding"],
        [1, 2],
        ["rounding"],
    )


def test_a_stage_that_an_error_ends_is_not_told_as_finished():
    reporter = Told()
    with reporting(reporter), pytest.raises(ValueError, match="no"), stage("rounding"):
        raise ValueError("no")
    assert (reporter.closed_names, reporter.failed_names) == ([], ["rounding"])


def test_tracked_items_count_when_the_next_one_is_asked_for():
    reporter = Told()
    with reporting(reporter):
        for number, _ in enumerate(tracked("abc", "letters")):
            assert sum(reporter.amounts) == number
        assert list(tracked(iter("ab"), None)) == ["a", "b"]
    assert reporter.stages[0].total == 3
    assert reporter.names == reporter.closed_names == ["letters"]


def test_each_item_has_a_stage_of_its_own():
    reporter = Told()
    with reporting(reporter):
        for item in each("ab", str.upper):
            assert reporter.names[-1] == item.upper()
    assert reporter.closed_names == ["A", "B"]


def test_the_silent_reporter_is_told_nothing_and_nothing_is_worked_out(tmp_path):
    reporter = Told()
    with reporting(reporter), reporting(SILENT):
        with stage("rounding", total=2) as advance:
            assert not advance.is_told
            advance()
        expect(lambda: pytest.fail("nobody wants to know"))
        leave_log(tmp_path)
    assert not reporter.stages
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
        def __init__(self, **options):
            self.options, self.amounts, self.closed = options, [], False
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
    assert (inner_bar.options["desc"], inner_bar.options["total"]) == ("inner", 2)
    assert (inner_bar.amounts, inner_bar.note) == ([2], "b")
    assert outer_bar.amounts == [1]
    assert outer_bar.closed
    assert inner_bar.closed
    assert inner_bar.options["disable"] is None  # none where standard error is no terminal


def test_the_module_is_there_before_torch_is():
    code = "import sys, mpqdm_fx.io.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
