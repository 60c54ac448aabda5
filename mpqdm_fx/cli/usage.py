"""Commands of one manner: options in panels, and one line for what was typed wrong."""

import re
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mpqdm_fx.cli.panels import BITS, CALIBRATION, MODEL, PROGRAM, RUN

__all__ = ["USAGE_ERROR", "Command", "Group", "usage_line"]

_ORDER = (None, MODEL, BITS, CALIBRATION, PROGRAM, RUN)

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer refuses before a command begins; it has no public name for all of it."""


class Command(TyperCommand):
    """A command that leaves what was typed for the line of an error (see `cli.boundary.run`)."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        if isinstance(ctx.obj, dict):
            options = {parameter.name: max(parameter.opts, key=len) for parameter in self.params}
            ctx.obj.update(ctx.params, command=ctx.info_name, options=options)
        return super().invoke(ctx)

    def get_params(self, ctx: Any) -> Any:
        """Its parameters, panel by panel in the order of all commands; `--help` goes last."""
        params = _plain(super().get_params(ctx))
        for parameter in params:
            if parameter.opts[0].startswith("-") and parameter.rich_help_panel is None:
                parameter.rich_help_panel = RUN  # of which every command has one
        return sorted(params, key=lambda parameter: _ORDER.index(parameter.rich_help_panel))


class Group(TyperGroup):
    """All commands."""

    def get_params(self, ctx: Any) -> Any:
        """Its own options."""
        return _plain(super().get_params(ctx))


def _plain(params: Iterable[Any]) -> list[Any]:
    """Parameters whose flags show no type: they take no value."""
    parameters = list(params)
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def usage_line(error: Any) -> str:
    """What is wrong with what was typed: the option, its value, what it takes, where to read on.

    Args:
        error: A `USAGE_ERROR`.
    """
    command = error.ctx.command_path if error.ctx is not None else "mpqdm-fx"
    message = _message(error) or "no command was given"
    see = " See" if message.endswith("?") else "; see"
    return f"{message}{see} {command} --help"


def _message(error: Any) -> str:
    param = getattr(error, "param", None)
    if param is None or not error.message:
        return str(error.format_message()).strip().rstrip(".").removeprefix("Invalid value: ")
    name = max(param.opts, key=len) if param.opts[0].startswith("-") else param.metavar
    reason = re.sub(r"^Value error, |^Invalid value: |\.$|, unable to .*$", "", error.message)
    reason = re.sub(r"^'[^']*' is not one of ", "choose one of ", reason)
    reason = re.sub(r"^Input should be (?=greater|less)", "give a number ", reason)
    reason = re.sub(r"^Input should be ", "give ", reason)
    errors = getattr(error.__cause__, "errors", None)  # pydantic's, which keep the value
    return f"{name} {errors()[0]['input']}: {reason}" if errors else f"{name} {reason}"
