"""Passes by name, pipelines from text, and functions as passes."""

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, overload

from torch import fx

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.passes.base import GraphPass, Pipeline

__all__ = ["graph_pass", "known_passes", "name_of", "parse"]

_Rewrite = Callable[[fx.GraphModule], bool]

_NAME = re.compile(r"\s*([A-Za-z][\w-]*)\s*")


def name_of(pass_class: type[GraphPass]) -> str:
    """Name of a pass in text: `drop-dropout` for `DropDropout`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", pass_class.__name__).lower()


def known_passes() -> dict[str, type[GraphPass]]:
    """Every pass whose module was imported, by name; of a name that several have, none.

    Passes of a backend are known once its package is imported.
    """
    return {name: classes[0] for name, classes in sorted(_by_name().items()) if len(classes) == 1}


def _by_name() -> dict[str, list[type[GraphPass]]]:
    classes: dict[str, list[type[GraphPass]]] = {}
    for pass_class in _below(GraphPass):  # type: ignore[type-abstract]
        classes.setdefault(name_of(pass_class), []).append(pass_class)
    return classes


def _below(pass_class: type[GraphPass]) -> Iterator[type[GraphPass]]:
    for below in pass_class.__subclasses__():
        private = below.__name__.startswith("_") or below is Pipeline
        if not private and not inspect.isabstract(below):
            yield below
        yield from _below(below)


def parse(text: str) -> Pipeline:
    """A pipeline from text, for example `drop-dropout,fold-batch-norm`.

    Settings follow a name as in a call, in Python literals: `linearize-pointwise(layers={"a"})`.

    Args:
        text: Names of passes, parted by commas, in running order.

    Raises:
        ConfigError: A name or a setting is unknown, or settings are missing that a pass needs.
    """
    entries: list[GraphPass] = []
    rest = text
    while rest.strip():
        match = _NAME.match(rest)
        settings, behind = _settings(rest[match.end() :]) if match else (None, "")
        if match is None or settings is None or not re.match(r"\s*(,|$)", behind):
            raise ConfigError(
                f"passes {text!r}: cannot read {rest.strip()!r}; write names parted by commas, "
                "settings behind a name as (field=value, field=value) in Python literals"
            )
        entries.append(_made(match[1], settings))
        rest = behind.strip()[1:]
    return Pipeline(passes=tuple(entries))


def _settings(text: str) -> tuple[dict[str, Any] | None, str]:
    """Settings in parentheses at the start of a text, None if they are unreadable; and the rest."""
    if not text.startswith("("):
        return {}, text
    for end in (place + 1 for place, sign in enumerate(text) if sign == ")"):
        try:
            call = ast.parse(f"settings{text[:end]}", mode="eval").body
            assert isinstance(call, ast.Call)
            read = {str(entry.arg): ast.literal_eval(entry.value) for entry in call.keywords}
        except (SyntaxError, ValueError):  # this parenthesis closes another one
            continue
        sets = {field: frozenset(v) if isinstance(v, set) else v for field, v in read.items()}
        return (None if call.args else sets), text[end:]
    return None, text


def _made(name: str, settings: Mapping[str, Any]) -> GraphPass:
    """One pass of a text."""
    classes = _by_name().get(name, [])
    if len(classes) > 1:
        places = " and ".join(pass_class.__module__ for pass_class in classes)
        raise ConfigError(f"{len(classes)} passes are named {name}, in {places}; rename one")
    if not classes:
        passes = known_passes()
        near = difflib.get_close_matches(name, passes, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"there is no pass {name}; {hint}passes: {', '.join(passes)}")
    try:
        return classes[0](**settings)
    except TypeError as error:
        parameters = ", ".join(inspect.signature(classes[0]).parameters) or "none"
        raise ConfigError(f"pass {name}: {error}; its settings: {parameters}") from error


@overload
def graph_pass(rewrite: _Rewrite, /) -> GraphPass: ...
@overload
def graph_pass(
    *, preserves_function: bool = True, tolerance: float = 0.0
) -> Callable[[_Rewrite], GraphPass]: ...


def graph_pass(
    rewrite: _Rewrite | None = None, /, *, preserves_function: bool = True, tolerance: float = 0.0
) -> GraphPass | Callable[[_Rewrite], GraphPass]:
    """Make a pass of a function; as a decorator, with or without arguments.

    The function changes a private copy in place and returns whether it changed anything, as
    `GraphPass.rewrite` does. The pass is registered under the function's name.

    Args:
        rewrite: The function.
        preserves_function: As of `GraphPass`.
        tolerance: As of `GraphPass`.
    """

    def wrap(function: _Rewrite) -> GraphPass:
        def apply(self: GraphPass, graph_module: fx.GraphModule) -> bool:
            return function(graph_module)

        title = "".join(part.title() for part in function.__name__.split("_"))
        body = {
            "__doc__": function.__doc__,
            "__module__": function.__module__ or "__main__",  # None in text that is executed
            "preserves_function": preserves_function,
            "tolerance": tolerance,
            "rewrite": apply,
        }
        kind: type[GraphPass] = dataclass(frozen=True, kw_only=True)(
            type(title, (GraphPass,), body)
        )
        return kind()

    return wrap if rewrite is None else wrap(rewrite)
