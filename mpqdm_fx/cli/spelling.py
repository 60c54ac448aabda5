"""Messages in the words of who typed the command: options, not the fields that they become."""

import re
from collections.abc import Mapping

from mpqdm_fx.cli.settings import SETTINGS

__all__ = ["as_typed", "option_of"]

#: Fields that are called otherwise than the option's parameter, beside those of `SETTINGS`.
_OTHER_NAMES: Mapping[str, str] = {
    "num_trajectories": "trajectories",
    "num_inference_steps": "steps",
    "num_samples": "num",
    "seconds": "budget",
    "activation_memory": "max_memory",
    "directory": "keep_run",
    "minimum_sqnr_db": "minimum_sqnr",
    "guidance_scale": "guidance",
}

#: What refusals of programs advise, whatever command found them: options of `quantize`.
_EVERYWHERE = ("backend", "four_bit", "external_weights", "compress", "kernels", "cpu")

_QUOTED = r"""(?:"[^"]*"|'[^']*')"""
_WORD = rf"(?:{_QUOTED}|\w+(?:[.+-]+\w+)*|\.\.\.|-\d[\w.]*)"
_TYPE = r"(?: \((?:int|float|str|bool|NoneType)\))?"
#: Messages about metrics, some of which are called as a field is.
_OF_METRICS = ("--gate ", "--pick ")
_FLAGS = ("True", "False")


def option_of(parameter: str) -> str:
    """`--weight-bytes` of `weight_bytes`, as typer names options that are not told otherwise."""
    return f"--{parameter.replace('_', '-')}"


def _fields(options: Mapping[str, str]) -> dict[str, str]:
    """The option of each field that one becomes."""
    known = {name: option_of(name) for name in (*SETTINGS, *_EVERYWHERE)} | dict(options)
    fields = {field: known[name] for name, (field, _, _) in SETTINGS.items()}
    fields |= {field: known[name] for field, name in _OTHER_NAMES.items() if name in known}
    return fields | {name: option for name, option in known.items() if name not in SETTINGS}


def as_typed(message: str, options: Mapping[str, str]) -> str:
    """A message of the library with options where it names fields.

    `weight_bits=9 (int): give ...` becomes `--weights 9: give ...`, and `activation_mode="static"
    or "dynamic"` becomes `--activation-mode static or dynamic`. A field without a value is known by
    its underscore: `levels` and `steps` are words of the language too.

    Args:
        message: The message.
        options: Options of the command, by its parameters.
    """
    if message.startswith(_OF_METRICS):
        return message
    fields = _fields(options)
    names = "|".join(sorted(map(re.escape, fields), key=len, reverse=True))
    outside = r"(?<![\w./\-'\"])", r"(?![\w/\-'\"(=])"

    def given(match: re.Match[str]) -> str:
        option, value = fields[match["name"]], match["value"]
        if value in _FLAGS:
            return option if value == "True" else f"no {option}"
        return f"{option} {_unquoted(value)}{_unquoted(match['others'])}"

    def bare(match: re.Match[str]) -> str:
        return fields[match["name"]] if "_" in match["name"] else match[0]

    message = re.sub(
        rf"{outside[0]}(?P<name>{names})=(?P<value>{_WORD})(?P<others>(?: or {_QUOTED})*){_TYPE}",
        given,
        message,
    )
    message = re.sub(rf"{outside[0]}`?(?P<name>{names})`?{outside[1]}", bare, message)
    return re.sub(r"(?<![\w-])override (?=['\"])", "--override ", message)


def _unquoted(text: str) -> str:
    return re.sub(r"\"(\w+)\"|'(\w+)'", lambda match: match[1] or match[2], text)
