import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.report.evaluation_tables import evaluation_table
from mpqdm_fx.report.words import WORD_SCALES, word_of, word_of_sqnr, word_of_x0


@pytest.mark.parametrize(
    ("db", "word"),
    [(math.inf, "as float"), (40, "as float"), (39.9, "very close"), (20, "close"), (10, "rough"),
     (9.9, "broken"), (-math.inf, "broken"), (math.nan, "not a number")],
)  # fmt: skip
def test_a_ratio_of_the_noise_has_the_word_of_its_threshold(db, word):
    assert word_of_sqnr(db) == word


def test_samples_are_judged_more_mildly_than_one_call():
    assert word_of_x0(20) == "hardly a visible change"
    assert word_of_x0(5) == "other pictures"


@given(st.sampled_from(sorted(WORD_SCALES)), st.floats(-100, 100), st.floats(0, 100))
def test_a_better_value_never_has_a_worse_word(metric, value, gain):
    ladder = WORD_SCALES[metric]
    words = [word for _, word in ladder.steps] + [ladder.otherwise]
    better = value + gain if ladder.higher_is_better else value - gain
    assert words.index(word_of(metric, better)) <= words.index(word_of(metric, value))


def test_a_metric_without_thresholds_has_no_word():
    assert word_of("ms", 3.0) == ""


@pytest.mark.parametrize(("count", "word"), [(255, "no word below 256 samples"), (256, "as float")])
def test_a_distance_that_few_samples_make_larger_has_no_word_of_few(count, word):
    table = evaluation_table(
        {"frechet_distance": 0.1, "num_samples": count, "num_inference_steps": 2, "seed": 0}
    )
    assert list(table.columns[2].cells) == [word]
