"""Models that cannot be quantized as they are: each is refused by name, with the remedy.

Offloading, casting hooks and other quantizers decide what a module computes, or where its weights
are, outside its own forward. A trace would miss that, or fail somewhere in the middle.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.errors import TraceError
from mpqdm_fx.numerics.lazy_tensor import LazyTensor

__all__ = ["LOW_PRECISION", "check_model", "is_adapter", "own_tensors"]

LOW_PRECISION = (torch.float16, torch.bfloat16)
"""What a caller's model may be stored in beside float32."""

# Modules of these packages hold codes, or observe values to make some.
_QUANTIZERS = re.compile(
    r"torch\.ao\.(nn\.(intrinsic\.)?(quantized|qat|sparse)|quantization)\b|diffusers\.quantizers\."
    r"|(torchao|bitsandbytes|optimum\.quanto|quanto|hqq|gptqmodel|auto_gptq|awq|modelopt"
    r"|compressed_tensors|nunchaku|quark|fbgemm_gpu)\b"
)

# peft's base class of every layer that wraps another one. By name: peft need not be installed, and
# where it is not, no model has one.
_ADAPTER = "BaseTunerLayer"

_FLOAT_MODEL = "load the float model and give that one"

# dtype of a parameter -> (what it is, remedy)
_REFUSED_DTYPES = (
    ((torch.float64,), "double precision", "call model.float(): quantized models compute so"),
    (
        (torch.complex32, torch.complex64, torch.complex128),
        "complex",
        "hold its real and imaginary part as two parameters",
    ),
)


def check_model(model: nn.Module, *, rounded: bool = False) -> None:
    """Refuse a model whose modules do more, or whose tensors are less, than they show.

    Args:
        model: The caller's model; nothing is run and nothing is changed.
        rounded: Whether its layers may have been rounded by this package: they compute what they
            show, but are not to be quantized again.

    Raises:
        TraceError: It is offloaded, cast layer by layer, hooked by accelerate or diffusers,
            carries a LoRA, is quantized, scripted, sharded or not initialised, or in a dtype that
            does not fit.
    """
    for name, module in model.named_modules():
        reason = _module_reason(module, rounded=rounded)
        if reason:
            raise TraceError(f"{_place(model, name)} {reason}")
    for name, tensor, is_parameter in own_tensors(model):
        reason = _tensor_reason(tensor, is_parameter=is_parameter)
        if reason:
            raise TraceError(f"{_place(model, name)} {reason}")


def is_adapter(module: nn.Module) -> bool:
    """Tell whether a layer is one of peft's, which computes another layer and a path beside it."""
    return any(base.__name__ == _ADAPTER for base in type(module).__mro__)


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name, tensor, whether it is a parameter) of parameters, buffers and attributes."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        # `__dict__`: of OptimizedModule and its like, not what they pass on
        for key, is_parameter in (("_parameters", True), ("_buffers", False)):
            for name, tensor in module.__dict__[key].items():
                if tensor is not None:
                    yield prefix + name, tensor, is_parameter
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                yield prefix + name, value, False


def _place(model: nn.Module, name: str) -> str:
    return f"{type(model).__name__}: {name or 'the model'}"


def _module_reason(module: nn.Module, *, rounded: bool) -> str:
    """Why a module is refused; empty if it is not."""
    kind = type(module)
    attributes = module.__dict__
    if isinstance(module, torch.jit.ScriptModule):
        return f"is scripted ({kind.__name__}); give the module that it was made of"
    if _is_quantized(module) or ("weight_codes" in module._buffers and not rounded):
        return f"is quantized already ({kind.__name__}); {_FLOAT_MODEL}"
    if kind.__module__.startswith("torch.distributed.fsdp"):
        return f"is sharded ({kind.__name__}); gather it into a module of one process"
    if is_adapter(module):
        return (
            f"carries a LoRA ({kind.__name__}), whose path would stay beside the rounded weight; "
            "of a pipeline call fuse_lora() and then unload_lora_weights(), of peft's model "
            "merge_and_unload()"
        )
    if "_hf_hook" in attributes:
        return (
            f"is under a hook of accelerate ({type(attributes['_hf_hook']).__name__}: offloading "
            "or a device map); load it without, or call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    if "_original_forward" in attributes:
        return (
            "was prepared by accelerate; call "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )
    hooks = list(getattr(attributes.get("_diffusers_hook"), "hooks", ()))
    if hooks:
        return (
            f"is under a hook of diffusers ({', '.join(map(str, hooks))}: casting, offloading or "
            "caching); load the model anew without it"
        )
    return ""


def _is_quantized(module: nn.Module) -> bool:
    """Tell whether a module holds codes, by its class, its flag or its graph."""
    attributes = module.__dict__
    if _QUANTIZERS.match(f"{type(module).__module__}."):
        return True
    if attributes.get("is_quantized") or attributes.get("hf_quantizer") is not None:
        return True
    return isinstance(module, fx.GraphModule) and any(
        node.op == "call_function" and str(node.target).startswith(("quantized", "torchao"))
        for node in module.graph.nodes
    )


def _tensor_reason(tensor: Any, *, is_parameter: bool) -> str:
    """Why a tensor is refused; empty if it is not."""
    kind = type(tensor)
    if nn.parameter.is_lazy(tensor):
        return "is not initialised yet; call the model once"
    if not _is_plain(kind) and not issubclass(kind, LazyTensor):
        return (
            f"is a {kind.__module__}.{kind.__name__}, not a plain tensor: quantized or sharded "
            f"already; {_FLOAT_MODEL}"
        )
    if tensor.is_meta:
        return "has no values (device meta): offloaded or never loaded; load the weights first"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}; call to_dense() or to_strided() on it"
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized or name.startswith(("float8", "float4")):
        return f"is {name}: cast layer by layer, or quantized already; {_FLOAT_MODEL}"
    if is_parameter:
        if tensor.dtype in (torch.int8, torch.uint8):
            return f"is {name}: quantized already; {_FLOAT_MODEL}"
        for dtypes, what, remedy in _REFUSED_DTYPES:
            if tensor.dtype in dtypes:
                return f"is {name} ({what}); {remedy}"
    return ""


def _is_plain(kind: type[Tensor]) -> bool:
    """Tell whether operations on tensors of this class are PyTorch's own."""
    stock = (Tensor, nn.Parameter)
    return all(
        any(_function(kind, name) is _function(base, name) for base in stock)
        for name in ("__torch_function__", "__torch_dispatch__")
    )


def _function(kind: type, name: str) -> object:
    method = getattr(kind, name)
    return getattr(method, "__func__", method)
