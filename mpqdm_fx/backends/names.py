"""The words for what a model can become; without torch, for the command line."""

from typing import Literal, get_args

__all__ = ["BACKENDS", "Backend", "FourBit"]

Backend = Literal["torch_ao", "xnnpack", "packed"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

FourBit = Literal["never", "whole", "split"]
"""Weights that a program stores at four bits.

Those of linear layers and 1x1 convolutions that fit as a whole, or also the channels that fit in
layers of mixed widths, or none.
"""
