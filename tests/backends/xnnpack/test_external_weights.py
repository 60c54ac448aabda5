"""Programs whose weights are in a file of their own, plain and compressed."""

import pytest
import torch
from rounded_nets import rounded
from torch import nn

from mpqdm_fx.backends.compressed import compress_program
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.errors import ArtifactError, LoweringError
from mpqdm_fx.records.activations import DynamicActivation

pytestmark = pytest.mark.xnnpack


class Net(nn.Module):
    """Weights inside a delegate, and a table that a portable kernel reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(6, 64, 3, padding=1), nn.Linear(10, 64)
        self.table = nn.Embedding(10, 64)

    def forward(self, x, labels):
        return self.linear(self.conv(x)) + self.table(labels)[:, :, None, None]

    @staticmethod
    def inputs():
        x = torch.randn(2, 6, 8, 10, generator=torch.Generator().manual_seed(1))
        return {"x": x, "labels": torch.tensor([3, 8])}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("external")
    graph, ranges, inputs = rounded(Net())
    dynamic = dict.fromkeys(ranges, DynamicActivation())
    whole = lower_xnnpack(graph, dynamic, inputs, folder / "whole.pte")
    parted = lower_xnnpack(graph, dynamic, inputs, folder / "net.pte", external_weights=True)
    (want,) = XnnpackRunner(whole.path)(*inputs.values())
    return whole, parted, tuple(inputs.values()), want


def test_all_weights_are_in_the_file_and_the_numbers_are_the_same(programs):
    whole, parted, inputs, want = programs
    assert whole.weights_path is None
    assert parted.weights_path == parted.path.with_suffix(".ptd")
    assert parted.weights_bytes == parted.weights_path.stat().st_size
    assert parted.bytes == parted.path.stat().st_size
    weights = 64 * 6 * 9 + 64 * 10 + 4 * 64 * 10
    assert parted.weights_bytes > weights
    assert parted.bytes < whole.bytes - weights
    assert torch.equal(XnnpackRunner(parted.path)(*inputs)[0], want)
    assert (parted.subgraphs, parted.undelegated) == (whole.subgraphs, whole.undelegated)
    assert parted.to_dict()["weights_path"] == "net.ptd"


def test_compressed_files_run_in_place_of_the_plain_ones(programs, tmp_path):
    whole, parted, inputs, want = programs
    packed = compress_program(whole.path, tmp_path / "whole.pte.xz")
    assert packed.stat().st_size < whole.bytes
    assert torch.equal(XnnpackRunner(packed)(*inputs)[0], want)
    program = compress_program(parted.path, tmp_path / "net.pte.xz")
    compress_program(parted.weights_path, tmp_path / "net.ptd.xz")
    assert torch.equal(XnnpackRunner(program)(*inputs)[0], want)


def test_a_program_without_its_weights_is_refused(programs, tmp_path):
    _, parted, inputs, _ = programs
    alone = tmp_path / "net.pte"
    alone.write_bytes(parted.path.read_bytes())
    with pytest.raises((ArtifactError, LoweringError)):
        XnnpackRunner(alone)(*inputs)
    runner = XnnpackRunner(alone, weights=parted.weights_path)
    assert runner.input_shapes == tuple(tuple(x.shape) for x in inputs)


def test_an_unknown_method_is_named(programs):
    _, parted, _, _ = programs
    with pytest.raises(ArtifactError, match="no method `other`; it has forward"):
        XnnpackRunner(parted.path, "other")
