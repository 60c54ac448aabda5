"""Passes by name, pipelines from text, functions as passes."""

import contextlib
import dataclasses

import laws
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.backends.xnnpack.passes import LinearizePointwise
from mpqdm_fx.backends.xnnpack.pipelines import DECOMPOSE, REMEDIES
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.passes import NORMALIZE, DropDropout, graph_pass, known_passes, name_of, parse
from mpqdm_fx.passes.base import GraphPass, Pipeline

#: Passes that a name alone makes.
PLAIN = [c for c in laws.discover_passes() if not dataclasses.fields(c)]


def test_every_pass_of_the_package_is_known_by_a_name_of_its_own():
    names = [name_of(pass_class) for pass_class in laws.discover_passes()]
    assert len(set(names)) == len(names)
    known = known_passes()
    assert [known[name_of(c)] for c in laws.discover_passes()] == laws.discover_passes()


@given(
    chosen=st.lists(st.sampled_from(PLAIN), max_size=6), gap=st.sampled_from([",", " , ", ",\n"])
)
def test_a_pipeline_is_read_back_from_its_names(chosen, gap):
    text = gap.join(name_of(pass_class) for pass_class in chosen)
    assert parse(text) == Pipeline(passes=tuple(pass_class() for pass_class in chosen))


@pytest.mark.parametrize("passes", [NORMALIZE, DECOMPOSE.passes, REMEDIES.passes])
def test_the_lists_of_the_road_can_be_written_as_text(passes):
    assert parse(",".join(name_of(type(entry)) for entry in passes)).passes == passes


def test_settings_stand_in_parentheses_behind_a_name():
    text = 'drop-dropout, linearize-pointwise(layers={"a)", "(b,"}),drop-dropout'
    between = LinearizePointwise(layers=frozenset({"a)", "(b,"}))
    assert parse(text).passes == (DropDropout(), between, DropDropout())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drop-dropuot", "did you mean drop-dropout"),
        ("no-such-pass-at-all", "there is no pass no-such-pass-at-all; passes: "),
        ("drop-dropout drop-dropout", "cannot read"),
        (",", "cannot read"),
        ("drop-dropout(", "cannot read"),
        ("drop-dropout(rate=1)", "its settings: none"),
        ("drop-dropout(1)", "cannot read"),
        ("drop-dropout()x", "cannot read"),
        ("quantize-activations", "its settings: ranges"),
        ("linearize-pointwise(layers=open('x'))", "cannot read"),
        ("linearize-pointwise(layers=3)", "layers"),
    ],
)
def test_what_is_no_pipeline_is_one_clear_error(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


@given(text=st.text(alphabet="drop-dropout,{}=()1 \"'", max_size=30))
def test_any_text_is_a_pipeline_or_an_error_of_ours(text):
    with contextlib.suppress(ConfigError):
        assert isinstance(parse(text), Pipeline)


@graph_pass
def double_negation_goes(graph_module):
    """Replace neg(neg(x)) by x."""
    modified = False
    for node in list(graph_module.graph.find_nodes(op="call_function", target=torch.neg)):
        (inner,) = node.args
        if inner.target is torch.neg:
            node.replace_all_uses_with(inner.args[0])
            graph_module.graph.erase_node(node)
            modified = True
    return modified


def test_a_function_is_a_pass_with_a_name_and_its_own_words():
    assert isinstance(double_negation_goes, GraphPass)
    assert type(double_negation_goes).__doc__ == "Replace neg(neg(x)) by x."
    assert parse("double-negation-goes").passes == (double_negation_goes,)


def _with_negations(case):
    """A case whose output is negated twice."""
    graph_module = laws.copy_graph_module(case.graph_module)
    output = graph_module.graph.output_node()
    (value,) = output.all_input_nodes[:1]
    with graph_module.graph.inserting_before(output):
        once = graph_module.graph.call_function(torch.neg, (value,))
        twice = graph_module.graph.call_function(torch.neg, (once,))
    once.meta, twice.meta = dict(value.meta), dict(value.meta)
    output.replace_input_with(value, twice)
    graph_module.recompile()
    return dataclasses.replace(case, graph_module=graph_module)


@given(case=laws.cases(max_blocks=2))
def test_a_pass_of_a_function_obeys_every_law(case):
    for graph in (case, _with_negations(case)):
        trial = laws.try_pass(double_negation_goes, graph)
        for law in laws.LAWS:
            law(trial)
    assert double_negation_goes(graph.graph_module).modified


def test_a_function_that_changes_numbers_says_so():
    @graph_pass(preserves_function=False, tolerance=0.5)
    def halve_everything(graph_module):
        return False

    assert (halve_everything.preserves_function, halve_everything.tolerance) == (False, 0.5)
    assert known_passes()["halve-everything"] is type(halve_everything)


def test_two_passes_of_one_name_are_refused():
    def made():
        @graph_pass
        def come_twice(graph_module):
            return False

        return come_twice

    first, second = made(), made()
    with pytest.raises(ConfigError, match="2 passes are named come-twice"):
        parse("come-twice")
    del first, second
