"""Headings of `--help`, in the order in which a command asks itself the questions."""

__all__ = ["BITS", "CALIBRATION", "MODEL", "PROGRAM", "RUN"]

MODEL = "Model"
BITS = "Bits"
CALIBRATION = "Calibration"
PROGRAM = "Program"
RUN = "Run"
