"""Keywords that became fields of `RunOptions`: taken for one more version, with a warning."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.run_options import RunOptions

__all__ = ["former_keywords"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def former_keywords(**fields: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Make a function with a parameter `run` take keywords that it had before.

    Its signature does not show them. Outermost of the decorators, so that the warning is of the
    caller's line.

    Args:
        **fields: The field of `RunOptions` that each keyword became.

    Raises:
        ConfigError: From the function, when it is given such a keyword and `run`.
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            values: dict[str, Any] = {n: kwargs.pop(n) for n in fields if n in kwargs}
            if not values:
                return function(*args, **kwargs)
            former = f"{function.__name__}({', '.join(f'{name}=...' for name in values)})"
            new = f"run=RunOptions({', '.join(f'{fields[name]}=...' for name in values)})"
            if "run" in kwargs:
                raise ConfigError(f"{former} is given `run` as well; give {new} alone")
            remark = f"{former} goes with the next version; give {new}"
            warnings.warn(remark, DeprecationWarning, stacklevel=2)
            kwargs["run"] = RunOptions(**{fields[name]: value for name, value in values.items()})
            return function(*args, **kwargs)

        return call

    return decorate
