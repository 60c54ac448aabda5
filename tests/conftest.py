"""Hypothesis profiles and one torch thread for every test.

HYPOTHESIS_PROFILE chooses the profile: dev (12 examples, default) and ci (100), the same ones every
time; nightly (1000, others every time), which belongs to the matrix.
"""

import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

_SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large)

settings.register_profile(
    "dev",
    max_examples=12,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(
    "nightly", max_examples=1000, deadline=None, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# A shell that starts the tests in the background has them ignore it, and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Sums of convolutions depend on the number of threads; bit-equality is claimed at equal numbers.
torch.set_num_threads(1)


#: Files whose tests look at one exported pipeline, which takes a minute to make.
_OF_ONE_EXPORT = ("test_export_page.py", "test_export_programs.py", "test_export_report.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of one file run in one process: what they share is made once, not once a process.

    So do files that share a session's fixture. Not so in the matrix, where single files take most
    of the time.
    """
    if config.getoption("markexpr") == "matrix":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "exported" if file.rpartition("/")[2] in _OF_ONE_EXPORT else file

    return Scheduling(config, log)
