"""Nested values: leaves by name, rows, batches put together, in every container alike."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.nested import (
    concatenate,
    constant_leaves,
    first_row,
    map_tensors,
    named_leaves,
    take_rows,
    tensor_leaves,
    tensors_of,
    to_device,
)


class Pair(NamedTuple):
    first: object
    second: object


ROWS = 5

LEAVES = st.one_of(
    st.sampled_from([True, False, None, 3, 0.5, "text"]),
    st.integers(0, 9).map(lambda n: torch.arange(float(ROWS)) + n),
    st.integers(0, 9).map(lambda n: torch.full((ROWS, 2), n)),
    st.just(torch.tensor(7)),
)

VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
        st.tuples(inner, inner).map(lambda both: Pair(*both)),
    ),
    max_leaves=6,
)


def same(a, b):
    """Whether two nested values are equal, kinds of containers included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(value=VALUES)
def test_every_leaf_has_one_name_and_tensors_are_some_of_them(value):
    leaves = list(named_leaves({"root": value}))
    names = [name for name, _ in leaves]
    assert len(set(names)) == len(names)
    tensors = [(name, leaf) for name, leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert [name for name, _ in tensor_leaves({"root": value})] == [name for name, _ in tensors]
    assert list(map(id, tensors_of(value))) == [id(leaf) for _, leaf in tensors]
    constants = {name for name, _ in constant_leaves({"root": value})}
    assert not constants & {name for name, _ in tensors}


@given(value=VALUES)
def test_changing_nothing_gives_the_same_value_and_names_are_those_of_the_leaves(value):
    seen = []
    whole = {"root": value}
    assert same(map_tensors(whole, lambda name, leaf: seen.append(name) or leaf), whole)
    assert seen == [name for name, _ in tensor_leaves(whole)]
    assert same(to_device(whole, "cpu"), whole)


@given(value=VALUES, cut=st.integers(1, ROWS - 1))
def test_rows_that_are_taken_and_put_behind_each_other_are_the_whole(value, cut):
    parts = [take_rows(value, slice(0, cut)), take_rows(value, torch.arange(cut, ROWS))]
    if any(not leaf.dim() for leaf in tensors_of(value)):
        with pytest.raises(CalibrationError, match="belong together"):
            concatenate(parts)
    else:
        assert same(concatenate(parts), value)
    first = first_row({"value": value})["value"]
    assert all(len(leaf) == 1 for leaf in tensors_of(first) if leaf.dim())


def test_a_flag_that_differs_is_refused():
    rows = torch.arange(2.0)
    with pytest.raises(CalibrationError, match="have no rows"):
        concatenate([{"rows": rows, "flag": True}, {"rows": rows, "flag": False}])
