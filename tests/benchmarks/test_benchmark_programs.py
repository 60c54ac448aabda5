"""The programs that measure find what they measure."""

import importlib
from pathlib import Path

import pytest

PROGRAMS = sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_finds_what_it_imports(name):
    pytest.importorskip("executorch")
    assert importlib.import_module(name).__doc__


def test_every_stage_is_somewhere_in_the_package():
    compile_time = importlib.import_module("compile_time")
    for stage, names in compile_time.STAGES.items():
        for name in names:
            held = compile_time.home_of(name.partition(".")[0])
            for attribute in name.split("."):
                held = getattr(held, attribute)
            assert callable(held), stage


def test_a_stage_that_is_nowhere_is_told():
    compile_time = importlib.import_module("compile_time")
    with pytest.raises(SystemExit, match="defines nothing_of_this_name 0 times"):
        compile_time.home_of("nothing_of_this_name")
