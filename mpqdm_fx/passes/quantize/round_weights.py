"""Put every planned layer's weight on its grid.

The codes are chosen here and nowhere else: the torch.ao and PT2E doors, the packed file and the
`.pte` only write down what this pass decided (architecture decision 2: decide, then act).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.errors import CalibrationError, DialectError
from mpqdm_fx.graph.layers import replace_module, weight_layers, weight_rows
from mpqdm_fx.numerics.lazy_tensor import CodedTensor, LazyTensor
from mpqdm_fx.numerics.levels.grids import dequantize
from mpqdm_fx.numerics.levels.level_sets import LEVEL_SETS
from mpqdm_fx.passes.base import GraphPass
from mpqdm_fx.records.plan import BitPlan, LayerPlan

__all__ = ["RoundWeights", "hold_codes", "install_codes"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundWeights(GraphPass):
    """Replace planned layers by copies whose weight lies exactly on the plan's grid.

    1. Each output channel with b bits gets the scale and the 2^b int8 levels that minimise the
       weighted squared error of its weights, and every weight its nearest level.
    2. The copy carries `weight_codes` (int8, the weight's shape) and `weight_scale` (float32
       [out_channels]); `weight == weight_codes * weight_scale` holds exactly.
    3. A layer whose weight is on the plan's grid already is left alone.

    Attributes:
        plan: Bits and kind of levels of every layer.
        importance: Nonnegative weight of each row entry's squared error, by layer: [K], with K
            the numbers of one output channel. Layers without an entry weigh all alike.
    """

    plan: BitPlan
    importance: Mapping[str, Tensor] = field(default_factory=dict)

    preserves_function: ClassVar[bool] = False

    @classmethod
    def examples(cls, graph_module: fx.GraphModule) -> tuple[Self, ...]:
        """Return the pass with mixed widths and both kinds of levels, and with an empty plan."""
        layers = []
        for index, layer in enumerate(weight_layers(graph_module, embeddings=True).values()):
            shape = tuple(layer.weight.shape)
            layers.append(
                LayerPlan(
                    name=layer.name,
                    kind=type(layer.module).__name__,
                    shape=shape,
                    bits=tuple(1 + (index + row) % 8 for row in range(shape[0])),
                    levels="uniform" if index else "codebook",
                )
            )
        return (cls(plan=BitPlan(layers=tuple(layers))), cls(plan=BitPlan(layers=())))

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Every planned layer is in the graph and has the planned shape.

        Raises:
            DialectError: One is missing, or has another shape.
        """
        layers = weight_layers(graph_module, embeddings=True)
        for planned in self.plan.layers:
            if planned.name not in layers:
                raise DialectError(
                    f"the plan names {planned.name!r} ({planned.kind}), which this graph does not "
                    f"have; run the passes on it that the planned graph went through"
                )
            shape = tuple(layers[planned.name].weight.shape)
            if shape != planned.shape:
                raise DialectError(
                    f"{planned.name}: weight has shape {shape}, the plan expects {planned.shape}"
                )

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Install the rounded copies; False if every layer was on its grid."""
        layers = weight_layers(graph_module, embeddings=True)
        modified = False
        for planned in self.plan.layers:
            module = layers[planned.name].module
            if _is_rounded(module, planned):
                continue
            codes, scale = self._quantize(module, planned)
            replace_module(graph_module, planned.name, install_codes(module, codes, scale))
            modified = True
        return modified

    def _quantize(self, module: nn.Module, planned: LayerPlan) -> tuple[Tensor, Tensor]:
        rows = weight_rows(module)
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(
                f"{planned.name} ({planned.kind}): its weight (shape {planned.shape}) holds NaN "
                f"or infinity; repair the checkpoint"
            )
        codes, scale = LEVEL_SETS[planned.levels].quantize(
            rows, planned.bits_tensor(), self.importance.get(planned.name)
        )
        return codes.reshape(planned.shape), scale


def install_codes(
    module: nn.Module, codes: Tensor, scale: Tensor, *, lazy: bool = False
) -> nn.Module:
    """A copy of `module` whose weight is `codes * scale`, carrying both as buffers.

    Args:
        module: Convolution, linear or embedding layer; it is not changed.
        codes: int8, shape of the weight.
        scale: float32 [out_channels].
        lazy: Compute a float32 weight whenever it is read, and hold only the codes.

    Returns:
        New module of the same class with buffers `weight_codes` and `weight_scale`. Its weight is
        lazy also if that of `module` is.
    """
    old = module.weight
    assert isinstance(old, Tensor)
    # The copy gets a weight of its own below; copying the old one would double peak memory.
    rounded = copy.deepcopy(module, {id(old): old})
    weight: Tensor
    if isinstance(old, LazyTensor) or (lazy and old.dtype == torch.float32):
        weight = CodedTensor(codes, scale)
    else:
        weight = dequantize(codes.flatten(1), scale).reshape(codes.shape).to(old.dtype)
    rounded.weight = nn.Parameter(weight, requires_grad=False)
    rounded.register_buffer("weight_codes", codes)
    rounded.register_buffer("weight_scale", scale)
    return rounded


def hold_codes(*models: nn.Module) -> None:
    """Let rounded layers hold only their codes, and compute float32 weights when they are read.

    Args:
        models: Changed in place; layers that share a weight go on sharing it.
    """
    lazy: dict[nn.Parameter, nn.Parameter] = {}
    for module in (module for model in models for module in model.modules()):
        codes, weight = getattr(module, "weight_codes", None), getattr(module, "weight", None)
        if not isinstance(codes, Tensor) or isinstance(weight, LazyTensor):
            continue
        if not isinstance(weight, nn.Parameter) or weight.dtype != torch.float32:
            continue
        scale = module.weight_scale
        assert isinstance(scale, Tensor)
        if weight not in lazy:
            lazy[weight] = nn.Parameter(CodedTensor(codes, scale), requires_grad=False)
        module.weight = lazy[weight]


def _is_rounded(module: nn.Module, planned: LayerPlan) -> bool:
    """Whether the module carries codes that the plan allows and a weight that equals them."""
    codes = getattr(module, "weight_codes", None)
    scale = getattr(module, "weight_scale", None)
    weight = module.weight
    if not (isinstance(codes, Tensor) and isinstance(scale, Tensor) and isinstance(weight, Tensor)):
        return False
    rows = codes.flatten(1)
    on_grid = dequantize(rows, scale).reshape(codes.shape).to(weight.dtype)
    if not torch.equal(on_grid, weight.detach()):
        return False
    return LEVEL_SETS[planned.levels].legal(rows, planned.bits_tensor())
