import pytest

from mpqdm_fx.report.units import amount, duration


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (906_712, "885 KiB"), (6_977_540, "6.65 MiB"),
     (2**40 * 5000, "5,000 TiB")],
)  # fmt: skip
def test_an_amount_has_three_digits_and_a_unit(size, text):
    assert amount(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119.4, "119 s"), (120, "2 min"), (7200, "2.0 h")]
)
def test_a_time_has_one_unit(seconds, text):
    assert duration(seconds) == text
