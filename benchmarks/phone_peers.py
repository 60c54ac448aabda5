"""Stock int8, OpenVINO and ONNX Runtime on a network: made as their documentation has it.

pip install openvino nncf onnxruntime onnx onnxscript
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
Run = Callable[[], Any]


def stock_int8(network: nn.Module, calls: list[Inputs]) -> torch.export.ExportedProgram:
    """ExecuTorch's own quantizer, all operators that it knows, static int8 a channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True)
    example = tuple(calls[0].values())
    exported = torch.export.export(network, example).module()
    prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config))
    for call in calls:
        prepared(*call.values())
    return torch.export.export(convert_pt2e(prepared), example)


def _is_large(network: nn.Module) -> bool:
    """Whether weights do not fit in a file of ONNX, of at most 2 GiB, and go to one beside it."""
    return sum(p.numel() * p.element_size() for p in network.parameters()) > 2**30


def _onnx(network: nn.Module, calls: list[Inputs], path: Path) -> None:
    torch.onnx.export(
        network, tuple(calls[0].values()), path, input_names=list(calls[0]), dynamo=True,
        external_data=_is_large(network),
    )  # fmt: skip


def _onnx_float(network: nn.Module, calls: list[Inputs], directory: Path) -> Path:
    path = directory / "float.onnx"
    if not path.exists():
        _onnx(network, calls, path)
    return path


class _Reader:
    """Calibration calls, as onnxruntime reads them."""

    def __init__(self, calls: list[Inputs]) -> None:
        self._calls = iter([_arrays(call) for call in calls])

    def get_next(self) -> dict[str, Any] | None:
        """The next call."""
        return next(self._calls, None)


def _arrays(call: Inputs) -> dict[str, Any]:
    return {name: value.numpy() for name, value in call.items()}


def onnxruntime_static(network: nn.Module, calls: list[Inputs], directory: Path) -> Path:
    """QDQ, int8 weights per channel, static uint8 activations of Conv, MatMul and Gemm."""
    from onnxruntime.quantization import QuantType, quantize_static

    path = directory / "ort_static.onnx"
    if not path.exists():
        quantize_static(
            _onnx_float(network, calls, directory), path, _Reader(calls), per_channel=True,
            weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            use_external_data_format=_is_large(network),
        )  # fmt: skip
    return path


def onnxruntime_dynamic(network: nn.Module, calls: list[Inputs], directory: Path) -> Path:
    """Int8 weights, ranges of activations at run time (ConvInteger, MatMulInteger)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = directory / "ort_dynamic.onnx"
    if not path.exists():
        quantize_dynamic(
            _onnx_float(network, calls, directory), path, weight_type=QuantType.QUInt8,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            use_external_data_format=_is_large(network),
        )  # fmt: skip
    return path


def _openvino(network: nn.Module, calls: list[Inputs], path: Path, change: Any) -> Path:
    import openvino

    if not path.exists():
        model = openvino.convert_model(network, example_input=tuple(calls[0].values()))
        openvino.save_model(change(model), path, compress_to_fp16=False)
    return path


def openvino_static(network: nn.Module, calls: list[Inputs], directory: Path) -> Path:
    """NNCF, static int8, full bias correction; the fast one where full takes hours."""
    import nncf

    def quantized(model: Any) -> Any:
        data = nncf.Dataset([tuple(_arrays(call).values()) for call in calls])
        preset = nncf.QuantizationPreset.MIXED
        fast = _is_large(network)
        return nncf.quantize(model, data, preset=preset, fast_bias_correction=fast)

    return _openvino(network, calls, directory / "ov_static.xml", quantized)


def openvino_weights(network: nn.Module, calls: list[Inputs], directory: Path) -> Path:
    """NNCF, int8 weights; OpenVINO rounds inputs of matrix products at run time where it can."""
    import nncf

    def compressed(model: Any) -> Any:
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)

    return _openvino(network, calls, directory / "ov_weights.xml", compressed)


#: What makes a peer's file, by name.
PEERS: Mapping[str, Callable[[nn.Module, list[Inputs], Path], Path]] = {
    "onnxruntime fp32": _onnx_float,
    "onnxruntime int8 static": onnxruntime_static,
    "onnxruntime int8 dynamic": onnxruntime_dynamic,
    "openvino int8 static": openvino_static,
    "openvino int8 weights": openvino_weights,
}


def open_peer(path: Path, call: Inputs, threads: int) -> Run:
    """Load a peer's file; the result runs a step and gives its output."""
    arrays = _arrays(call)
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # else its threads keep the cores busy between its steps, while others are timed
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        return lambda: torch.from_numpy(session.run(None, arrays)[0])
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if "weights" in path.stem:
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 32
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    inputs = list(arrays.values())
    return lambda: torch.from_numpy(compiled(inputs)[0])


def file_bytes(path: Path) -> int:
    """Size of a peer's file, with its weights."""
    beside = (path.with_suffix(".bin"), path.with_name(f"{path.name}.data"))
    return path.stat().st_size + sum(file.stat().st_size for file in beside if file.exists())
