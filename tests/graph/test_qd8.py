"""The dynamic quantizer computes what XNNPACK's dynamic int8 kernels compute."""

import pytest
import torch
from torch import nn

from mpqdm_fx.graph.quantizer_sites import row_axes
from mpqdm_fx.graph.quantizers import DynamicQuantizer

pytestmark = pytest.mark.xnnpack


def run_on_xnnpack(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the program with dynamic int8 activations, and its int8 weight as float64."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    exported = torch.export.export(model, (x,)).module()
    prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config))
    prepared(x)
    converted = convert_pt2e(prepared)
    program = to_edge_transform_and_lower(
        torch.export.export(converted, (x,)),
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    ).to_executorch()
    (got,) = Runtime.get().load_program(program.buffer).load_method("forward").execute([x])
    (node,) = (n for n in converted.graph.nodes if "dequantize_per_channel" in str(n.target))
    codes, scale = (getattr(converted, source.target) for source in node.args[:2])
    return got, codes.double() * scale.double().view(-1, *[1] * (codes.dim() - 1))


def inputs(*shape: int) -> torch.Tensor:
    """Every sample or row of another size, and not around zero."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-3, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    shift = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return (torch.randn(shape, generator=generator) + shift) * size


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Linear(64, 32, bias=False), inputs(16, 64)),
        (nn.Conv2d(8, 16, 3, padding=1, bias=False), inputs(4, 8, 6, 10)),
        (nn.Conv2d(8, 16, 1, bias=False), inputs(4, 8, 6, 10)),
        (nn.Conv2d(8, 16, 1, stride=2, bias=False), inputs(4, 8, 6, 10)),
        (nn.Conv2d(8, 16, 1, padding=1, bias=False), inputs(4, 8, 6, 10)),
        (nn.Conv2d(8, 16, 1, groups=2, bias=False), inputs(4, 8, 6, 10)),
    ],
    ids=["linear rows", "convolution samples", "pixels", "stride", "padding", "groups"],
)
def test_dynamic_quantizer_is_the_runtimes(model, x):
    got, weight = run_on_xnnpack(model.eval(), x)
    rounded = DynamicQuantizer(8, row_axes(model))(x).double()
    if isinstance(model, nn.Linear):
        want = nn.functional.linear(rounded, weight)
    else:
        settings = (None, model.stride, model.padding, model.dilation, model.groups)
        want = nn.functional.conv2d(rounded, weight, *settings)
    # one different code would show as 1e-3 of its row; float32 sums differ by 1e-7
    largest = want.flatten(1).abs().amax(1)
    error = (got.double() - want).flatten(1).abs().amax(1)
    assert bool((error <= 1e-6 * largest).all())
