"""The command that makes a folder again, from what a job was called with."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.records.config import MPQConfig

__all__ = ["distill_command", "export_command", "quantize_command", "typed"]

#: Settings that have an option, and the option.
_OPTIONS: Mapping[str, str] = {
    "activation_bits": "--activations",
    "activation_allocation": "--activation-allocation",
    "activation_levels": "--activation-levels",
    "weight_storage": "--weight-storage",
    "slowdown": "--slowdown",
    "allocation": "--allocation",
    "effective_bits": "--effective-bits",
    "weight_bytes": "--weight-bytes",
    "levels": "--levels",
    "rounding": "--rounding",
    "refinements": "--refinements",
    "propagation": "--propagation",
    "noise_argument": "--noise-argument",
    "seed": "--seed",
}
_APART = {"weight_bits", "activation_mode", "overrides"}


def quantize_command(model: str, config: MPQConfig, options: Mapping[str, Any]) -> str | None:
    """The `mpqdm-fx quantize` that was asked for; None if no command line asks for these settings.

    Args:
        model: What was quantized, as it was called.
        config: Settings.
        options: Further options by name; None and False are left out, and True has no value.
    """
    settings = _settings(config)
    if settings is None:
        return None
    return typed("quantize", [model], {**settings, **options})


def export_command(model: str, config: MPQConfig | None, options: Mapping[str, Any]) -> str | None:
    """The `mpqdm-fx export` that was asked for; None if no command line asks for these settings.

    Args:
        model: The pipeline's folder, as it was called.
        config: Settings of the denoiser; None if all stays in float.
        options: As of `quantize_command`.
    """
    settings = {"--float": True} if config is None else _settings(config)
    if settings is None:
        return None
    return typed("export", [model], {**settings, **options})


def _settings(config: MPQConfig) -> dict[str, Any] | None:
    """The options that ask for settings; None if no options do."""
    usual = MPQConfig()
    options: dict[str, Any] = {}
    if config.effective_bits is None and config.weight_bytes is None:
        options["--weights"] = config.weight_bits
    options["--activation-mode"] = config.activation_mode
    for name in usual.to_dict():
        if name in _APART or getattr(config, name) == getattr(usual, name):
            continue
        if name not in _OPTIONS:
            return None
        options[_OPTIONS[name]] = getattr(config, name)
    options["--override"] = [_override(rule) for rule in config.to_dict()["overrides"]]
    return options


#: Settings of a training that have an option, and the option.
_TRAINING: Mapping[str, str] = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "updates", "trajectories", "steps", "batch_size", "rank", "relation", "recompute", "seed",
    )
} | {"guidance_scale": "--guidance"}  # fmt: skip


def distill_command(folder: Path, config: DistillConfig, options: Mapping[str, Any]) -> str | None:
    """The `mpqdm-fx distill` that was asked for; None if no command line asks for these settings.

    Args:
        folder: What was trained.
        config: Settings of the training.
        options: As of `quantize_command`.
    """
    usual, settings = DistillConfig(updates=1).to_dict(), config.to_dict()
    training: dict[str, Any] = {}
    if config.seconds is not None:
        training["--budget"] = f"{config.seconds:g}s"
    for name, value in settings.items():
        if name == "seconds" or value is None or value == usual[name]:
            continue
        if name not in _TRAINING:
            return None
        training[_TRAINING[name]] = value
    if config.updates is not None:
        training["--updates"] = config.updates
    return typed("distill", [str(folder)], {**training, **options})


def typed(command: str, arguments: list[str], options: Mapping[str, Any]) -> str:
    """A command line as it is typed.

    Args:
        command: Name of the command.
        arguments: What it is given without an option.
        options: By name; None and False are left out, True has no value, of a list each entry gets
            the option.
    """
    words = ["mpqdm-fx", command, *arguments]
    for name, value in options.items():
        for entry in value if isinstance(value, list) else [value]:
            if entry is None or entry is False:
                continue
            words += [name] if entry is True else [name, str(entry)]
    return shlex.join(words)


def _override(rule: Mapping[str, Any]) -> str:
    if rule["skip"]:
        return f"{rule['pattern']}=float"
    weights, inputs = rule["weight_bits"], rule["activation_bits"]
    value = ("" if weights is None else f"W{weights}") + ("" if inputs is None else f"A{inputs}")
    return f"{rule['pattern']}={value}"
