"""The one door to `torch.ao.quantization` and `torchao`: everything else imports them from here.

`torch.ao.quantization` is deprecated but alive, `torchao.quantization.pt2e` is its future. With
both behind one module, a rename or a removal is a change of this file. torchao takes seconds to
import, so its names are fetched when they are first asked for.
"""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

# Registers the quantized_decomposed ops that q/dq graphs are made of.
import torch.ao.quantization.fx._decomposed
from torch.ao.nn.quantized import reference
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    ObservationType,
)
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.observer import FixedQParamsObserver, HistogramObserver, ObserverBase
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

__all__ = [
    "BackendConfig",
    "BackendPatternConfig",
    "DTypeConfig",
    "FixedQParamsObserver",
    "HistogramObserver",
    "ObservationType",
    "ObserverBase",
    "PrepareCustomConfig",
    "QConfig",
    "QConfigMapping",
    "convert_fx",
    "convert_to_reference_fx",
    "prepare_fx",
    "quantized_engine",
    "quiet",
    "reference",
]

_PT2E = "torchao.quantization.pt2e"
_LAZY: dict[str, tuple[str, str]] = {
    "ComposableQuantizer": (f"{_PT2E}.quantizer", "ComposableQuantizer"),
    "FixedQParamsQuantizationSpec": (f"{_PT2E}.quantizer", "FixedQParamsQuantizationSpec"),
    "PT2EHistogramObserver": (f"{_PT2E}.observer", "HistogramObserver"),
    "PT2EDynamicObserver": (f"{_PT2E}.observer", "PlaceholderObserver"),
    "PT2EObserverBase": (f"{_PT2E}.observer", "ObserverBase"),
    "Q_ANNOTATION_KEY": (f"{_PT2E}.quantizer.quantizer", "Q_ANNOTATION_KEY"),
    "QuantizationAnnotation": (f"{_PT2E}.quantizer", "QuantizationAnnotation"),
    "QuantizationSpec": (f"{_PT2E}.quantizer", "QuantizationSpec"),
    "Quantizer": (f"{_PT2E}.quantizer", "Quantizer"),
    "convert_pt2e": (f"{_PT2E}.quantize_pt2e", "convert_pt2e"),
    "prepare_pt2e": (f"{_PT2E}.quantize_pt2e", "prepare_pt2e"),
}

# (logger, beginning of the message): printed by every import of torchao 0.18 on a machine without
# its GPU kernels, and of no consequence here.
_IMPORT_NOISE = (
    ("torchao", "Failed to load"),
    ("torch.utils._pytree", "%s is an Enum subclass"),
)

# Beginnings of warnings that torch.ao gives on every call: that it is deprecated, and that the
# quantized dtypes are. Known, and the reason why this module exists.
_DEPRECATIONS = (
    r"torch\.ao\.quantization is deprecated",
    r".*dtype torch\.quint8, torch\.qint8, and torch\.qint32 are deprecated",
    r"Please use quant_min and quant_max",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"TypedStorage is deprecated",
    r"Please use `TreeSpec\.",
)


def __getattr__(name: str) -> Any:
    """Import a torchao name when it is first used."""
    try:
        module, attribute = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    with quiet(), _without_import_noise():
        value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back torch.ao's deprecation warnings while its code runs; all others pass."""
    with warnings.catch_warnings():
        for message in _DEPRECATIONS:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextlib.contextmanager
def quantized_engine(engine: str) -> Iterator[None]:
    """Select a torch.ao engine for the `with` block and put the old one back.

    Args:
        engine: `onednn`, `fbgemm` or `qnnpack`.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextlib.contextmanager
def _without_import_noise() -> Iterator[None]:
    def is_news(record: logging.LogRecord) -> bool:
        return not any(
            record.name.startswith(name) and str(record.msg).startswith(beginning)
            for name, beginning in _IMPORT_NOISE
        )

    # A filter on a logger sees only its own records: torchao logs through its root package.
    loggers = [logging.getLogger(name) for name, _ in _IMPORT_NOISE]
    for logger in loggers:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)
