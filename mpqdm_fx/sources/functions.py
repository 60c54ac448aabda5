"""Functions of the user's own on the command line: what makes a model, or calls to calibrate it on.

`module:function` names a function of a module on Python's path, `path/to/file.py:function` one of a
file. It is called without arguments. Only what was typed is called so, never what a file says.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from mpqdm_fx.calibration.calls import check_calls
from mpqdm_fx.errors import CalibrationError, ConfigError, first_line

__all__ = ["GivenCalls", "calls_of", "model_of"]


class GivenCalls:
    """Calls that a user's function made: an iterable that says which of them are held out.

    Args:
        calls: Keyword arguments of each call.
        held_out: So many of them, the last ones, judge corrections and are not fitted to.
        name: The function, as it was named; None for calls of another origin.

    Raises:
        ConfigError: None is left to be fitted to.
    """

    def __init__(self, calls: list[dict[str, Any]], held_out: int, name: str | None = None) -> None:
        if not 0 <= held_out < len(calls):
            raise ConfigError(
                f"--held-out {held_out}: of the {len(calls)} calls some have to be left; give 0 to "
                f"{len(calls) - 1}"
            )
        self.calls = calls
        self.name = name
        self.held_out_calls = range(len(calls) - held_out, len(calls))

    def __len__(self) -> int:
        """Number of calls."""
        return len(self.calls)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The calls in order."""
        return iter(self.calls)

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """The calls that are held out; all of them if none are."""
        return [self.calls[index] for index in self.held_out_calls] or self.calls


def model_of(name: str) -> nn.Module:
    """The model that a function returns, in evaluation mode.

    Args:
        name: `module:function` or `path/to/file.py:function`.

    Raises:
        ConfigError: There is no such function, it fails, or it returns no module.
    """
    model = _returned(name, "MODEL")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"MODEL {name}: it returned a {type(model).__name__}; return a torch.nn.Module"
        )
    return model.eval()


def calls_of(name: str, model: nn.Module, held_out: int | None = None) -> GivenCalls:
    """The calibration calls that a function yields or returns.

    Args:
        name: `module:function` or `path/to/file.py:function`.
        model: What is to be called with them.
        held_out: Calls at the end that judge corrections; None is a quarter.

    Raises:
        ConfigError: There is no such function, it fails, or it gives no iterable; or `held_out`
            leaves nothing.
        CalibrationError: There is no call, one is no dict of the model's arguments, or it cannot be
            used; names call and argument.
    """
    place = f"--inputs {name}"
    output = _returned(name, "--inputs")
    if isinstance(output, Mapping | str) or not isinstance(output, Iterable):
        raise ConfigError(
            f"{place}: it returned a {type(output).__name__}; yield or return calls, each a dict "
            f"of keyword arguments"
        )
    calls: list[dict[str, Any]] = []
    iterator = iter(output)
    while True:
        try:
            call = next(iterator)
        except StopIteration:
            break
        except Exception as error:  # a generator runs only here
            raise _failed(place, error) from error
        if not isinstance(call, Mapping):
            raise CalibrationError(
                f"{place}: call {len(calls)} is a {type(call).__name__}; give a dict of keyword "
                f"arguments"
            )
        calls.append(dict(call))
    if not calls:
        raise CalibrationError(f"{place}: it gave no call; give at least one")
    for index, call in enumerate(calls):
        _check_names(call, model, f"{place}: call {index}")
    check_calls(calls, f"{place}: call")
    return GivenCalls(calls, len(calls) // 4 if held_out is None else held_out, name)


def _check_names(call: Mapping[str, Any], model: nn.Module, place: str) -> None:
    """Refuse a call that has other arguments than the model."""
    try:
        inspect.signature(model.forward).bind(**call)
    except TypeError as error:
        takes = ", ".join(inspect.signature(model.forward).parameters)
        raise CalibrationError(
            f"{place} has ({', '.join(call)}), and {type(model).__name__} takes ({takes}): {error}"
        ) from None


def _returned(name: str, option: str) -> Any:
    """What the function returns."""
    function = _function(name, option)
    try:
        return function()
    except Exception as error:
        raise _failed(f"{option} {name}", error) from error


def _failed(place: str, error: Exception) -> ConfigError:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
    return ConfigError(f"{place}: it failed: {type(error).__name__}: {first_line(error)}{where}")


def _function(name: str, option: str) -> Callable[[], Any]:
    origin, _, attribute = name.rpartition(":")
    if not origin or not attribute:
        raise ConfigError(
            f"{option} {name}: write module:function, or path/to/file.py:function for one of a file"
        )
    module = _module(origin, f"{option} {name}")
    function = getattr(module, attribute, None)
    if function is None:
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(
            f"{option} {name}: {origin} has no function {attribute!r}; it has {', '.join(names)}"
        )
    if not callable(function):
        raise ConfigError(
            f"{option} {name}: {attribute} is a {type(function).__name__}, no function"
        )
    return function  # type: ignore[no-any-return]


def _module(origin: str, place: str) -> ModuleType:
    try:
        if Path(origin).suffix == ".py":
            return _of_file(Path(origin), place)
        return importlib.import_module(origin)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{origin}.".startswith(f"{error.name}."):
            raise _failed(place, error) from error  # the module is there, and imports another
        raise ConfigError(
            f"{place}: there is no module {error.name!r} on Python's path; give a file, "
            f"path/to/file.py:function, or set PYTHONPATH"
        ) from None
    except Exception as error:  # whatever a module does when it is imported
        raise _failed(place, error) from error


def _of_file(path: Path, place: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{place}: there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as `python path/to/file.py` has it, for what lies beside it
        sys.path.insert(0, folder)
    if path.stem in sys.modules:
        known = sys.modules[path.stem]
        if Path(getattr(known, "__file__", None) or "").resolve() == path.resolve():
            return known
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
