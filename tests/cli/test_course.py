import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.cli.course import Course, clock
from mpqdm_fx.io.progress import SILENT, reporting, stage


class Time:
    """A clock that goes by hand."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def passes(self, seconds):
        self.seconds += seconds


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def course(time):
    return Course(now=time)


def begun(course, name, total=None):
    with reporting(SILENT):
        part = stage(name, total)
    course.begin(part)
    return part


def test_the_line_says_stage_share_and_times(course, time):
    course.expect({"runs": 100, "rounding": 300, "lowering": 360})
    runs = begun(course, "runs")
    time.passes(100)
    course.end(runs)
    rounding = begun(course, "rounding", total=50)
    rounding(31)
    time.passes(90)
    assert str(course).startswith("[2/3] rounding 62 % · 3:10 of about ")


def test_before_anything_is_known_there_is_no_number_and_no_whole_time(course, time):
    time.passes(5)
    assert str(course) == "loading · 0:05"
    course.expect({"runs": 100, "rounding": 300})
    begun(course, "runs", total=100)
    time.passes(1)
    assert str(course) == "[1/2] runs 0 % · 0:06"


def test_a_machine_that_is_three_times_slower_takes_three_times_as_long(course, time):
    course.expect({"runs": 10, "rounding": 20, "lowering": 30})
    for name, seconds in (("runs", 30), ("rounding", 60)):
        part = begun(course, name)
        time.passes(seconds)
        course.end(part)
    assert course.total == pytest.approx(180, rel=0.05)


def test_stages_that_do_not_come_are_passed_over(course, time):
    course.expect({"runs": 10, "channels": 1000, "rounding": 10})
    runs = begun(course, "runs")
    time.passes(10)
    course.end(runs)
    begun(course, "rounding")
    assert course.total == pytest.approx(20, rel=0.01)
    assert str(course).startswith("[3/3] rounding · ")


def test_better_expectations_take_the_place_of_those_named(course, time):
    course.expect({"runs": 10, "rounding": 10, "lowering": 10})
    runs = begun(course, "runs")
    time.passes(20)  # everything takes twice as long
    course.end(runs)
    course.expect({"rounding": 300.0})
    assert course.total == pytest.approx(20 + 300 + 20, rel=0.05)


def test_stages_inside_others_are_named_and_do_not_count(course, time):
    course.expect({"unet": 100, "vae": 50})
    begun(course, "unet")
    inner = begun(course, "rounding", total=4)
    inner(1, note="mid")
    assert str(course).startswith("[1/2] unet: rounding 25 %: mid · ")
    course.end(inner)
    assert str(course).startswith("[1/2] unet · ")


def test_a_run_without_expectations_tells_stages_alone(course, time):
    begun(course, "drawing", total=8)(2)
    time.passes(61)
    assert str(course) == "drawing 25 % · 1:01"


def test_between_stages_the_last_one_stands(course):
    course.end(begun(course, "rounding", total=2))
    assert course.label == "rounding"


def test_a_stage_that_goes_on_under_the_same_name_is_no_new_one(course):
    with reporting(SILENT):
        first, second, inner, sibling = (stage(name) for name in ("a", "a", "b", "b"))
    assert course.begin(first)
    assert not course.begin(inner)
    course.end(inner)
    course.end(first)
    assert not course.begin(second)
    course.end(second)
    assert course.begin(sibling)


def test_a_stage_that_goes_on_is_expected_once(course, time):
    course.expect({"drawing": 20, "page": 10})
    for _ in ("float", "quantized"):  # both together take as long as was expected
        part = begun(course, "drawing")
        time.passes(10)
        course.end(part)
    assert course.total == pytest.approx(30, rel=0.01)


stages = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.floats(0.01, 1e4), min_size=1, max_size=6
)


@given(expected=stages, factor=st.floats(0.1, 50), shares=st.lists(st.floats(0, 1), max_size=4))
def test_the_whole_is_never_less_than_what_has_passed_and_ends_as_it(expected, factor, shares):
    time = Time()
    course = Course(now=time)
    course.expect(expected)
    for name, seconds in expected.items():
        part = begun(course, name, total=1.0)
        for share in sorted(shares):
            time.seconds += factor * seconds * (share - part.done)
            part(share - part.done)
            assert course.total is None or course.total >= course.seconds * (1 - 1e-9)
            assert re.fullmatch(r"\[\d/\d] \w+ \d+ % · [\d:]+( of about [\d:]+)?", str(course))
        time.seconds += factor * seconds * (1 - part.done)
        course.end(part)
    assert course.total == pytest.approx(course.seconds)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (190, "3:10"), (3790, "1:03:10")]
)
def test_times_have_seconds(seconds, text):
    assert clock(seconds) == text


def test_stages_expected_inside_another_tell_when_that_one_ends(course, time):
    course.expect({"unet": 10_000, "vae": 1000})
    unet = begun(course, "unet")
    time.passes(10)
    course.expect({"tracing": 10, "rounding": 100, "lowering": 90})
    tracing = begun(course, "tracing")
    time.passes(10)
    course.end(tracing)
    # 210 for the UNet where 10,000 were expected: so much less for the VAE, where 1000 were
    assert course.total == pytest.approx(10 + 200 + 50, rel=0.05)
    rounding = begun(course, "rounding", total=10)
    rounding(5)
    time.passes(100)  # twice as slow
    assert course.total == pytest.approx(120 + 100 + 180 + 70, rel=0.2)
    course.end(rounding)
    course.end(unet)
    vae = begun(course, "vae")
    course.expect({"rounding": 500.0, "lowering": 5.0})
    course.expect({"rounding": 5.0})  # known better once it is traced
    assert course.total == pytest.approx(120 + 10, rel=0.05)
    course.end(vae)
    assert course.total == pytest.approx(course.seconds)


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.floats(1, 1000))
def test_whatever_is_expected_inside_nothing_ends_before_now(names, seconds):
    time = Time()
    course = Course(now=time)
    course.expect({"a": 10, "b": seconds})
    for name in names:
        stage = begun(course, name)
        course.expect({"c": seconds, "d": 1.0})
        inner = begun(course, "c", total=3)
        inner(1)
        time.passes(seconds)
        assert course.total is None or course.total >= course.seconds
        course.end(inner)
        course.end(stage)
