"""What programs return: tensors alone, by name, whatever a model returns beside them."""

import pytest
import torch
from rounded_nets import rounded
from torch import nn

from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack, lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner

pytestmark = pytest.mark.xnnpack


class WithConstants(nn.Module):
    """Nested outputs with a loss that is None, a flag and a number among them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.end = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        hidden = self.body(x)
        image = self.end(hidden)
        return {"loss": None, "image": image, "more": {"flag": True, "states": [3, hidden]}}

    @staticmethod
    def inputs(batch=2):
        return {"x": torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("quantized", [True, False])
def test_constants_among_the_outputs_are_left_out(tmp_path, quantized):
    graph, ranges, inputs = rounded(WithConstants(), bits=4)
    path = tmp_path / "net.pte"
    if quantized:
        program = lower_xnnpack(graph, ranges, inputs, path)
    else:
        program = lower_xnnpack_float(graph, inputs, path)
    shapes = [(spec.name, spec.shape) for spec in program.outputs]
    assert shapes == [("image", (2, 4, 8, 8)), ("more.states.1", (2, 8, 8, 8))]
    outputs = XnnpackRunner(path)(inputs["x"])
    assert [(tuple(output.shape)) for output in outputs] == [shape for _, shape in shapes]
    assert graph(**inputs)["loss"] is None  # the caller's graph is as it was
