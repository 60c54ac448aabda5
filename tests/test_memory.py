import pytest

from mpqdm_fx.errors import MPQError
from mpqdm_fx.memory import peak_memory


def test_loading_and_one_step_of_the_bundled_model_take_more_than_its_weights():
    size = peak_memory("float", "digits")
    assert size is None or 4 * 1_744_385 < size < 2**30


def test_a_form_that_is_not_there_is_an_error():
    with pytest.raises(MPQError, match="nowhere"):
        peak_memory("pte", "nowhere")
