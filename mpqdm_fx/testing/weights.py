"""Strategies for weight matrices and for bits of channels."""

import math
from collections.abc import Sequence

import torch
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor, fx

from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.records.plan import BitPlan, LayerPlan

__all__ = ["FAMILIES", "bit_plans", "bit_vectors", "make_weight", "weights"]

#: Families of weights, from plain to nasty; strategies shrink toward the first.
FAMILIES = (
    "normal",
    "student_t",
    "outlier_row",
    "outlier_element",
    "constant",
    "zero_rows",
    "tiny",
    "huge",
)


def make_weight(family: str, rows: int, columns: int, seed: int) -> Tensor:
    """Make a weight matrix of a family.

    Args:
        family: one of `FAMILIES`. `normal` has standard deviation 0.1; `student_t` three degrees
            of freedom; an outlier is 30 times the rest; `zero_rows` has at least one; `tiny` is
            around 1e-20 and `huge` around 1e10.
        rows: output channels.
        columns: weights per output channel.
        seed: of the draw; the global random state is not used.

    Returns:
        float32 [rows, columns], finite.

    Raises:
        ValueError: there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r}; choose one of {', '.join(FAMILIES)}")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    row = int(torch.randint(rows, (), generator=generator))
    column = int(torch.randint(columns, (), generator=generator))
    if family == "student_t":
        chi_squared = torch.randn(3, rows, columns, generator=generator).square().sum(0)
        weight *= math.sqrt(3) / chi_squared.clamp(min=1e-3).sqrt()
    elif family == "outlier_row":
        weight[row] *= 30
    elif family == "outlier_element":
        weight[row, column] *= 30
    elif family == "constant":
        weight.fill_(float(weight[row, column]))
    elif family == "zero_rows":
        weight[torch.rand(rows, generator=generator) < 0.3] = 0
        weight[row] = 0
    elif family == "tiny":
        weight *= 1e-19
    elif family == "huge":
        weight *= 1e11
    return weight


@st.composite
def weights(
    draw: st.DrawFn,
    *,
    max_rows: int = 12,
    max_columns: int = 48,
    families: Sequence[str] = FAMILIES,
) -> Tensor:
    """Draw a weight matrix, float32 [rows, columns], of one of the families.

    Args:
        draw: given by hypothesis.
        max_rows: largest number of output channels.
        max_columns: largest number of weights per channel.
        families: the families to draw from; see `FAMILIES`.
    """
    family = draw(st.sampled_from(list(families)))
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    seed = draw(st.integers(0, 2**16))
    note(f"weights: make_weight({family!r}, {rows}, {columns}, {seed})")
    return make_weight(family, rows, columns, seed)


def bit_vectors(rows: int, ladder: Sequence[int] = range(1, 9)) -> st.SearchStrategy[Tensor]:
    """Draw the bits of `rows` output channels, int64 [rows].

    Args:
        rows: number of channels.
        ladder: allowed widths, ascending; shrinks toward all channels at the first.
    """
    widths = st.sampled_from(list(ladder))
    mixed = st.lists(widths, min_size=rows, max_size=rows)
    uniform = widths.map(lambda bits: [bits] * rows)
    return st.one_of(uniform, mixed).map(lambda bits: torch.tensor(bits, dtype=torch.int64))


@st.composite
def bit_plans(
    draw: st.DrawFn,
    graph_module: fx.GraphModule,
    *,
    ladder: Sequence[int] = range(1, 9),
    embeddings: bool = True,
) -> BitPlan:
    """Draw a plan for the weight layers of a graph: any widths, some layers left out.

    Args:
        draw: given by hypothesis.
        graph_module: the graph the plan is for.
        ladder: allowed widths.
        embeddings: plan embeddings too.
    """
    plans = []
    for layer in weight_layers(graph_module, embeddings=embeddings).values():
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        if draw(st.integers(0, 4)) == 4:  # left in float
            continue
        bits = draw(bit_vectors(weight.shape[0], ladder))
        plans.append(
            LayerPlan(
                name=layer.name,
                kind=type(layer.module).__name__,
                shape=tuple(weight.shape),
                bits=tuple(bits.tolist()),
                levels=draw(st.sampled_from(["uniform", "codebook", "int4"])),
            )
        )
    return BitPlan(layers=tuple(plans))
