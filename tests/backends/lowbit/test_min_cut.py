"""The minimum cut is the cheapest of all ways to sort, and the smallest of the cheapest."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.backends.lowbit.min_cut import SOURCE, TARGET, MinimumCut

ENDS = st.sampled_from([SOURCE, TARGET, "a", "b", "c", "d", "e"])
EDGES = st.lists(
    st.tuples(ENDS, ENDS, st.integers(0, 6)).filter(lambda e: e[0] != e[1]), max_size=16
)


def cost(edges, group):
    return sum(weight for start, end, weight in edges if start in group and end not in group)


@given(edges=EDGES)
def test_no_way_is_cheaper(edges):
    cut = MinimumCut()
    for edge in edges:
        cut.add(*edge)
    group = cut.solve()
    inner = sorted({end for edge in edges for end in edge[:2]} - {SOURCE, TARGET})
    ways = [
        {SOURCE, *chosen}
        for k in range(len(inner) + 1)
        for chosen in itertools.combinations(inner, k)
    ]
    least = min(cost(edges, way) for way in ways)
    assert cost(edges, group) == least
    assert len(group) == min(len(way) for way in ways if cost(edges, way) == least)
    assert TARGET not in group
