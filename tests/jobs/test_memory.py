import subprocess
import sys

import pytest

from mpqdm_fx.errors import MPQError
from mpqdm_fx.jobs.memory import peak_memory

_LATE_IMPORTS = """
import sys
from mpqdm_fx.jobs import memory

memory.import_classes("digits")
before = set(sys.modules)
memory.open_denoiser("digits", None, "float")
print(len(set(sys.modules) - before))
"""


def test_loading_and_one_step_of_the_bundled_model_take_more_than_its_weights():
    size = peak_memory("float", "digits")
    assert size is None or 4 * 1_744_385 < size < 2**30


@pytest.mark.matrix
def test_imports_are_not_measured():
    done = subprocess.run([sys.executable, "-c", _LATE_IMPORTS], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["0"], done.stderr[-2000:]


def test_a_form_that_is_not_there_is_an_error():
    with pytest.raises(MPQError, match="nowhere"):
        peak_memory("pte", "nowhere")
