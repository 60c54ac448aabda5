"""Weight rows and widths for the numerics tests: structure is drawn, floats come from a seed."""

import torch
from hypothesis import strategies as st
from torch import Tensor

FAMILIES = (
    "normal",
    "student_t",
    "outlier_element",
    "outlier_row",
    "constant",
    "zero_row",
    "tiny",
    "huge",
    "small_integers",
)


def make_rows(rows: int, width: int, family: str, seed: int) -> Tensor:
    """Return float32 rows [rows, width] of one family."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, width, generator=generator)
    if family == "student_t":  # 2 degrees of freedom: normal over the root of an exponential
        W = W / torch.rand(rows, width, generator=generator).clamp_min(1e-6).log().neg().sqrt()
    elif family == "outlier_element":
        W[:, seed % width] *= 300
    elif family == "outlier_row":
        W[seed % rows] *= 1e4
    elif family == "constant":
        W = W[:, :1].expand(rows, width).clone()
    elif family == "zero_row":
        W[seed % rows] = 0
    elif family == "tiny":
        W = W * 1e-20
    elif family == "huge":
        W = W * 1e10
    elif family == "small_integers":
        W = torch.randint(-3, 4, (rows, width), generator=generator).float()
    return W


@st.composite
def weight_rows(draw, max_rows: int = 6, max_width: int = 40):
    """Draw weight rows [O, K] of any family."""
    rows = draw(st.integers(1, max_rows))
    width = draw(st.integers(1, max_width))
    return make_rows(rows, width, draw(st.sampled_from(FAMILIES)), draw(st.integers(0, 2**16)))


@st.composite
def weights_and_bits(draw, max_bits: int = 8):
    """Draw weight rows with one width per row."""
    W = draw(weight_rows())
    widths = draw(st.lists(st.integers(1, max_bits), min_size=len(W), max_size=len(W)))
    return W, torch.tensor(widths)


@st.composite
def importances(draw, shape: torch.Size):
    """Draw None, [K] or [O, K] error weights, some of them zero."""
    kind = draw(st.sampled_from(["none", "columns", "full"]))
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size = shape if kind == "full" else shape[1:]
    h = torch.rand(size, generator=generator) ** 3 * 10.0 ** draw(st.integers(-12, 12))
    return h * (torch.rand(size, generator=generator) > 0.2)
