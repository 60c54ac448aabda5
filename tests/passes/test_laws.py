"""Every pass, of this package and of a backend, obeys the generic laws, listed somewhere or not."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import laws
import pytest
from hypothesis import given, settings

from mpqdm_fx.errors import DialectError
from mpqdm_fx.passes import NORMALIZE
from mpqdm_fx.passes.base import GraphPass, Pipeline
from mpqdm_fx.testing import assert_same_function, digest, graphs

PASSES = laws.discover_passes()


def _ids(value):
    return value.__name__


def test_discovery_finds_every_pass_of_the_normal_pipeline():
    assert {type(p) for p in NORMALIZE} <= set(PASSES)


def test_every_pass_can_be_imported_from_the_folder():
    offered = [value for folder in laws.FOLDERS for value in vars(folder).values()]
    assert [pass_class for pass_class in PASSES if pass_class not in offered] == []


def test_every_file_of_a_folder_of_passes_holds_exactly_one_pass():
    paths = [path for folder in laws.FOLDERS for path in Path(folder.__path__[0]).rglob("[!_]*.py")]
    files = sorted(path.stem for path in paths)
    infrastructure = ["base", "pipelines", "registry"]
    assert files == sorted(
        [*infrastructure, *(cls.__module__.rpartition(".")[2] for cls in PASSES)]
    )


@pytest.mark.parametrize("pass_class", PASSES, ids=_ids)
@given(case=laws.cases(max_blocks=4))
def test_pass_obeys_every_law(pass_class: type[GraphPass], case):
    # one test for all laws: drawing the graph costs more than checking it
    for graph_pass in pass_class.examples(case.graph_module):
        trial = laws.try_pass(graph_pass, case)
        for law in laws.LAWS:
            law(trial)


@pytest.mark.parametrize("pass_class", PASSES, ids=_ids)
@settings(max_examples=3)
@given(case=laws.cases(max_blocks=4))
def test_result_survives_export(pass_class: type[GraphPass], case):
    for graph_pass in pass_class.examples(case.graph_module)[:1]:
        laws.survives_export(graph_pass, case)


@pytest.mark.parametrize("pass_class", PASSES, ids=_ids)
def test_pass_keeps_what_reads_the_weights_of_layers(pass_class: type[GraphPass]):
    for case in laws.weight_fetching_zoo():
        for graph_pass in pass_class.examples(case.graph_module):
            trial = laws.try_pass(graph_pass, case)
            for law in laws.LAWS:
                law(trial)


@pytest.mark.parametrize("pass_class", PASSES, ids=_ids)
def test_pass_meets_graphs_that_it_changes(pass_class: type[GraphPass]):
    # else the laws above could all hold because the pass never did anything
    assert any(
        graph_pass(case.graph_module).modified
        for case in laws.zoo()
        for graph_pass in pass_class.examples(case.graph_module)
    )


@given(case=graphs())
def test_normal_pipeline_obeys_the_laws(case):
    trial = laws.try_pass(Pipeline(passes=NORMALIZE), case)
    for law in laws.LAWS:
        if law is not laws.same_function:
            law(trial)
    tolerance = sum(p.tolerance for p in NORMALIZE)
    assert_same_function(trial.before, trial.after, case.inputs, rtol=tolerance)


@given(case=graphs(max_blocks=3))
def test_every_prefix_of_the_normal_pipeline_is_a_fixed_point_of_its_passes(case):
    graph_module = case.graph_module
    for index, graph_pass in enumerate(NORMALIZE):
        graph_module = graph_pass(graph_module).graph_module
        for earlier in NORMALIZE[: index + 1]:
            assert not earlier(graph_module).modified


_HASH_PROGRAM = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import laws, torch
from mpqdm_fx.passes.base import Pipeline
from mpqdm_fx.passes import NORMALIZE
torch.set_num_threads(1)
h = hashlib.sha256()
for case in laws.zoo(stride=4):
    h.update(laws.digest(Pipeline(passes=NORMALIZE)(case.graph_module).graph_module).encode())
sys.stdout.write("digest " + h.hexdigest())
"""


def test_result_does_not_depend_on_the_hash_seed():
    h = hashlib.sha256()
    for case in laws.zoo(stride=4):
        result = Pipeline(passes=NORMALIZE)(case.graph_module)
        h.update(digest(result.graph_module).encode())
    support = Path(laws.__file__).parent
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(support.parents[1])}
    program = [sys.executable, "-c", _HASH_PROGRAM, str(support)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.rpartition("digest ")[2] == h.hexdigest()


def test_pass_with_required_settings_and_no_examples_is_refused():
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class NeedsSettings(GraphPass):
        bits: int

        def rewrite(self, graph_module):
            return False

    case = laws.zoo(stride=4)[0]
    with pytest.raises(NotImplementedError, match="examples"):
        NeedsSettings.examples(case.graph_module)
    with pytest.raises(DialectError, match="wrote into its input"):
        # the laws rest on the base class noticing; see graph/test_pass_interface.py for the rest
        _WritesIntoItsInput()(case.graph_module)


class _WritesIntoItsInput(GraphPass):
    def rewrite(self, graph_module):
        next(iter(graph_module.parameters())).add_(1.0)
        return True
