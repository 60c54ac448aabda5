"""The words for what a model can become; without torch, for the command line."""

from typing import Literal, get_args

__all__ = [
    "BACKENDS",
    "CPUS",
    "PROGRAMS",
    "Backend",
    "Cpu",
    "FourBit",
    "Kernels",
    "ProgramBackend",
    "SideBits",
    "fewest_program_bits",
    "may_call_own_kernels",
]

Backend = Literal["torch_ao", "xnnpack", "lowbit", "packed"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

ProgramBackend = Literal["xnnpack", "lowbit"]
"""Backends that write an ExecuTorch program."""
PROGRAMS: tuple[ProgramBackend, ...] = get_args(ProgramBackend)

Kernels = Literal["auto", "memory", "xnnpack"]
"""Which layers run in own kernels: those that are faster there, all that fit, or none."""

Cpu = Literal["avx2", "vnni", "dotprod"]
"""Classes of CPUs, by the instructions that multiply int8: AVX2 alone, AVX-VNNI or AVX512-VNNI,
and ARM's dot product."""
CPUS: tuple[Cpu, ...] = get_args(Cpu)

FourBit = Literal["never", "whole", "split"]
"""Weights that a program stores at four bits.

Those of linear layers and 1x1 convolutions that fit as a whole, or also the channels that fit in
layers of mixed widths, or none.
"""

SideBits = Literal[4, 8]
"""Bits of weights of what runs once per image."""


def may_call_own_kernels(backend: Backend, kernels: Kernels) -> bool:
    """Whether a program of these settings may need the library of own kernels where it runs."""
    return backend == "lowbit" and kernels != "xnnpack"


def fewest_program_bits(backend: Backend, four_bit: FourBit, *, narrow: bool) -> int:
    """The fewest bits that a weight of rounded layers has in a program.

    Args:
        backend: What the program is for.
        four_bit: Which weights it may store at four bits.
        narrow: Whether weights may have fewer than eight bits.
    """
    if not narrow:
        return 8
    own = backend == "lowbit"
    return 1 if own else 8 if four_bit == "never" else 4
