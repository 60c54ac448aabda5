"""Functions of the user's own: which are found, what they may give, what is said if not."""

import sys

import pytest
from small import TinyEDM

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.sources.functions import calls_of, model_of
from mpqdm_fx.sources.model_names import is_function

FILE = """
import torch
from small import TinyEDM, edm_calls

model = TinyEDM

def yields():
    yield from edm_calls(5)

def returns():
    return tuple(edm_calls(1))

def nothing():
    return []

def number():
    return 3

def one_call():
    return edm_calls(1)[0]

def lists():
    return [list(edm_calls(1)[0].values())]

def other_names():
    return [{**call, "sgima": call.pop("sigma")} for call in edm_calls(2)]

def too_few():
    yield edm_calls(1)[0]
    yield {"noisy": torch.zeros(1, 2, 6, 10)}

def nan():
    yield {**edm_calls(1)[0], "sigma": torch.tensor([1.0, float("nan")])}

def fails():
    yield edm_calls(1)[0]
    raise KeyError("height")

constant = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "own_calls.py"
    path.write_text(FILE)
    (path.parent / "broken_calls.py").write_text("import no_such_package_at_all\n")
    return path


@pytest.mark.parametrize(("name", "calls"), [("yields", 5), ("returns", 1)])
def test_calls_of_a_file_are_read_whole(file, name, calls):
    data = calls_of(f"{file}:{name}", TinyEDM())
    assert len(data) == len(list(data)) == calls
    assert set(data.calls[0]) == {"noisy", "sigma", "difficulty"}
    assert list(data.held_out_calls) == list(range(calls - calls // 4, calls))


def test_calls_of_a_module_on_the_path_are_found(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    monkeypatch.delitem(sys.modules, "own_calls", raising=False)
    assert len(calls_of("own_calls:yields", TinyEDM(), held_out=2).held_out_calls) == 2


def test_so_many_calls_are_held_out_as_are_asked_for(file):
    data = calls_of(f"{file}:yields", TinyEDM(), held_out=2)
    assert data.held_out_calls == range(3, 5)
    assert data.held_out == data.calls[3:]
    with pytest.raises(ConfigError, match=r"--held-out 5: of the 5 calls.*0 to 4"):
        calls_of(f"{file}:yields", TinyEDM(), held_out=5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}", "write module:function"),
        ("nowhere_at_all:calls", "no module 'nowhere_at_all' on Python's path; give a file"),
        ("{folder}/no_file.py:calls", "there is no file .*no_file.py"),
        ("{folder}/broken_calls.py:calls", "ModuleNotFoundError: .*no_such_package_at_all"),
        ("{file}:yeilds", "no function 'yeilds'; it has .*yields"),
        ("{file}:constant", "constant is a int, no function"),
        ("{file}:number", "returned a int; yield or return calls"),
        ("{file}:one_call", "returned a dict; yield or return calls"),
        ("{file}:fails", r"failed: KeyError: 'height' \(.*own_calls.py:\d+\)"),
    ],
)
def test_what_is_no_function_of_calls_is_refused_by_what_is_wrong(file, name, message):
    with pytest.raises(ConfigError, match=message):
        calls_of(name.format(file=file, folder=file.parent), TinyEDM())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "gave no call"),
        ("lists", "call 0 is a list; give a dict"),
        ("other_names", r"call 0 has \(.*sgima\), and TinyEDM takes \(noisy, sigma, difficulty\)"),
        ("too_few", "call 1 has .noisy., and .*missing .*sigma"),
        ("nan", "call 0: input 'sigma' .*NaN"),
    ],
)
def test_calls_that_the_model_does_not_take_are_refused_by_number_and_name(file, name, message):
    with pytest.raises(CalibrationError, match=message):
        calls_of(f"{file}:{name}", TinyEDM())


def test_a_model_is_what_a_function_returns(file):
    assert isinstance(model_of(f"{file}:model"), TinyEDM)
    with pytest.raises(ConfigError, match=r"returned a int; return a torch\.nn\.Module"):
        model_of(f"{file}:number")


def test_a_folder_is_no_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    assert not is_function("a:b")
    assert not is_function("digits")
    assert is_function("module:function")
