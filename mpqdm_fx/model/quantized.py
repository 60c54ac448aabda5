"""The two models that users hold: prepared (records its inputs) and quantized."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpqdm_fx.calibration.calls import check_call, check_indices, table_sizes
from mpqdm_fx.calibration.records import RecordedInputs
from mpqdm_fx.errors import TraceError
from mpqdm_fx.graph.calling import in_dtype, join_outputs, pack_output, split_batch
from mpqdm_fx.graph.editing import copy_graph_module, replace_module, shallow_clone
from mpqdm_fx.graph.signature import Signature
from mpqdm_fx.io.ambient import plain_torch, without_autocast
from mpqdm_fx.passes.quantize.assign_qconfigs import AssignQConfigs
from mpqdm_fx.passes.quantize.quantize_activations import QuantizeActivations
from mpqdm_fx.records.activations import (
    Activation,
    NoiseLevels,
    StaticActivation,
    TimestepActivation,
)
from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.records.plan import BitPlan
from mpqdm_fx.records.report import Judgement, LayerReport, QuantizationReport

__all__ = ["PreparedModel", "Quantization", "QuantizedModel"]


class _TracedModel(nn.Module):
    """A traced graph behind the calling convention of the model that it was traced from."""

    def __init__(self, graph_module: fx.GraphModule, signature: Signature, config: Any) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.signature = signature
        # Pipelines read `unet.config.in_channels` and the like.
        self.config = config
        # Not `eval()`: the leaf modules may be the caller's own, whose flags are not ours to set.
        self.training = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that inputs are taken and outputs returned in; what is computed is float32."""
        return self.signature.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _bound(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], bool]:
        """Arguments of one call of the model by name, and whether it wants an output class.

        `return_dict` is taken of models whose forward lacks it too.
        """
        arguments, return_dict = dict(kwargs), True
        if "return_dict" not in self.signature.parameters:
            return_dict = arguments.pop("return_dict", True)
        arguments = self.signature.bind(args, arguments)
        return arguments, arguments.pop("return_dict", return_dict)

    def _parts(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Normalized inputs of one call of the model, in parts if it is large."""
        return [self.signature.normalize((), part) for part in split_batch(self.signature, values)]

    def _output(self, parts: list[dict[str, Any]], *, return_dict: bool) -> Any:
        """What the model returns for a call of these parts."""
        with without_autocast():
            output = join_outputs([self.graph_module(**part) for part in parts])
        output = in_dtype(output, self.signature.dtype)
        return pack_output(self.signature, output) if return_dict else output


class PreparedModel(_TracedModel):
    """The float graph; each call returns what the model returns and records its inputs.

    Attributes:
        records: The recorded calls.
        settings: The run's settings.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        signature: Signature,
        model_config: Any,
        settings: MPQConfig,
        records: RecordedInputs,
    ) -> None:
        super().__init__(graph_module, signature, model_config)
        self.settings = settings
        self.records = records
        self._holding_out = False
        self._table_sizes = table_sizes(graph_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the float graph on the model's own arguments and record them.

        Raises:
            TraceError: The arguments do not fit the traced signature.
            CalibrationError: An argument cannot be used, see `record`.
        """
        parts, return_dict = self._judged(args, kwargs)
        with torch.no_grad():
            output = self._output(parts, return_dict=return_dict)
        self._keep(parts)
        return output

    def _judged(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], bool]:
        """Normalized inputs of one call that calibration can use, and whether it wants a class.

        Errors say which call it is.
        """
        place = self.records.place
        try:
            arguments, return_dict = self._bound(args, kwargs)
            check_call(arguments, place)
            parts = self._parts(arguments)
        except TraceError as error:
            raise TraceError(f"{place}: {error}") from None
        for part in parts:
            check_indices(part, self._table_sizes, place)
        return parts, return_dict

    @contextlib.contextmanager
    def held_out(self) -> Iterator[None]:
        """Mark the calls made inside as held out: they judge corrections and fit none.

        Give whole images or denoising runs, never parts of one. Without any, the last quarter of
        the calls is held out.
        """
        self._holding_out = True
        try:
            yield
        finally:
            self._holding_out = False

    def record(self, **kwargs: Any) -> None:
        """Record a call's keyword arguments without running the graph.

        Raises:
            TraceError: The arguments do not fit the traced signature.
            CalibrationError: An argument is empty, holds NaN, infinity or an index that the model's
                table does not have, or is no tensor where one belongs. Call and input are named.
        """
        parts, _ = self._judged((), kwargs)
        self._keep(parts)

    @plain_torch()
    def _keep(self, parts: Iterable[Mapping[str, Any]]) -> None:
        for part in parts:
            self.records.append(part, held_out=self._holding_out)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What a quantized model is, beside its graph.

    Attributes:
        plan: Bits of every output channel and what they cost.
        ranges: How each layer's activations are quantized, by layer name.
        noise_levels: What the groups of ranges by noise level are; None if there are no such
            ranges.
        settings: The run's settings.
        report: What quantization did, layer by layer.
        config: Configuration of the model that was quantized, if it has one.
    """

    plan: BitPlan
    ranges: Mapping[str, Activation]
    noise_levels: NoiseLevels | None = None
    settings: MPQConfig
    report: QuantizationReport
    config: Any = None


class QuantizedModel(_TracedModel):
    """The quantized graph, called exactly like the model that it came from.

    Its activations are quantized here, and nothing else happens.

    Args:
        rounded: The graph with rounded weights and float activations, and the signature in its
            `meta`; it is not changed.
        quantization: What the model is.
    """

    def __init__(self, rounded: fx.GraphModule, quantization: Quantization) -> None:
        ranges = quantization.ranges
        assign = AssignQConfigs(plan=quantization.plan, activations=ranges)
        rounded = assign(_detached(rounded)).graph_module
        quantize = QuantizeActivations(ranges=ranges, noise_levels=quantization.noise_levels)
        graph_module = quantize(rounded).graph_module
        super().__init__(graph_module, rounded.meta["signature"], quantization.config)
        self.quantization = quantization
        # Outside `modules()`: it shares every parameter with `graph_module`.
        self._rounded = (rounded,)

    def with_graph(self, rounded: fx.GraphModule, **changes: Any) -> "QuantizedModel":
        """The same model of another graph.

        Args:
            rounded: Its rounded graph, changed or made again.
            **changes: What else of `Quantization` is to be another.
        """
        return QuantizedModel(rounded, dataclasses.replace(self.quantization, **changes))

    def with_dtype(self, dtype: torch.dtype) -> "QuantizedModel":
        """The same model, which takes inputs and returns outputs in another dtype."""
        rounded = copy_graph_module(self.rounded)
        rounded.meta["signature"] = dataclasses.replace(self.signature, dtype=dtype)
        return self.with_graph(rounded)

    @property
    def plan(self) -> BitPlan:
        """Bits of every output channel and what they cost."""
        return self.quantization.plan

    @property
    def ranges(self) -> Mapping[str, Activation]:
        """How each layer's activations are quantized, by layer name."""
        return self.quantization.ranges

    @property
    def noise_levels(self) -> NoiseLevels | None:
        """What the groups of ranges by noise level are; None if there are no such ranges."""
        return self.quantization.noise_levels

    @property
    def report(self) -> QuantizationReport:
        """What quantization did, layer by layer."""
        return self.quantization.report

    @property
    def settings(self) -> MPQConfig:
        """The run's settings."""
        return self.quantization.settings

    @property
    def rounded(self) -> fx.GraphModule:
        """Graph with rounded weights and float activations; backends start from it."""
        return self._rounded[0]

    def codes(self, name: str) -> Tensor:
        """Integer weight codes of a layer, int8, shape of its weight.

        Raises:
            ConfigError: The plan has no such layer.
        """
        self.plan.layer(name)
        return self.rounded.get_buffer(f"{name}.weight_codes")

    def summary(self) -> str:
        """What this model is, in ten lines of at most 80 columns; `print` shows the same."""
        plan, report, settings = self.plan, self.report, self.settings
        size, whole = plan.weight_bytes + plan.float_bytes, 4 * plan.num_parameters
        facts = {
            "weights": f"{plan.num_weights:,}, {plan.mean_bits:.2f} bits over the budget, "
            f"{plan.effective_bits:.2f} with all overhead",
            "channels": _channels(plan),
            "bytes": f"{size:,} of {whole:,} in float32, {whole / max(size, 1):.1f} times less",
            "activations": f"{settings.activation_bits} bits{_average(report)}, "
            f"{settings.activation_mode}: "
            + _counts(_kind(self.ranges.get(layer.name)) for layer in plan.layers),
            "recipe": f"{settings.allocation} bits, {settings.rounding} rounding, "
            f"{settings.levels} levels, propagation {settings.propagation}",
            "output": _judged(report.judged) or "not judged against plain rounding",
            "worst layers": _worst(report.layers) or "not measured",
            "in float": plan.float_remark or "at most 1 % of the weights",
            "made": f"{report.calibration_calls} calls, {report.seconds:.0f} s, "
            + ", ".join(f"{name} {v}" for name, v in report.versions.items() if name in _MADE_WITH),
        }
        lines = [f"{self.signature.model_class}, quantized: {len(plan.layers)} layers"]
        lines += [f"  {name:<13}{fact}" for name, fact in facts.items()]
        return "\n".join(_cut(line) for line in lines)

    def __repr__(self) -> str:
        return self.summary()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fake-quantized graph on the model's own arguments.

        Raises:
            TraceError: The arguments do not fit the traced signature.
        """
        arguments, return_dict = self._bound(args, kwargs)
        return self._output(self._parts(arguments), return_dict=return_dict)


def _detached(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph with parameters that need no gradient and lie in memory as in a file.

    Both decide bits: a product folds its batch axes or not by whether its weight wants a gradient,
    and kernels for channels-last weights sum in another order. Values are shared where they can be.
    """
    result = copy_graph_module(graph_module)
    copies: dict[nn.Parameter, nn.Parameter] = {}

    def plain(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or (not parameter.requires_grad and parameter.is_contiguous()):
            return parameter
        value = parameter.detach().contiguous()
        return copies.setdefault(parameter, nn.Parameter(value, requires_grad=False))

    for name, module in list(result.named_modules()):
        parameters = {key: plain(value) for key, value in module._parameters.items()}
        if any(value is not module._parameters[key] for key, value in parameters.items()):
            if name:
                module = shallow_clone(module)
                replace_module(result, name, module)
            module._parameters = parameters
    return result


_COLUMNS = 80
_NAME = 22  # columns of a layer's name
_MADE_WITH = ("mpqdm-fx", "torch")


def _channels(plan: BitPlan) -> str:
    """Channels by width; those of entropy-coded layers have none."""
    fixed = Counter(bits for layer in plan.layers if layer.coded is None for bits in layer.bits)
    coded = sum(layer.shape[0] for layer in plan.layers if layer.coded is not None)
    words = [f"{coded:,} entropy-coded"] if coded else []
    return "; ".join(words + ([_shares(fixed)] if fixed or not coded else []))


def _shares(counts: Counter[int]) -> str:
    total = sum(counts.values())
    shares = [f"{counts[bits] / total:.0%} at {bits}" for bits in sorted(counts)]
    return f"{total:,}: {', '.join(shares)} bits" if shares else "none"


def _counts(kinds: Iterable[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common())


def _average(report: QuantizationReport) -> str:
    """That widths differ, and their other average."""
    averages = report.input_bits
    if averages is None or len({choice.bits for choice in report.activations}) < 2:
        return ""
    return f" on average ({averages[1]:.2f} by multiply-adds)"


def _kind(activation: Activation | None) -> str:
    if activation is None:
        return "float"
    names = {StaticActivation: "static", TimestepActivation: "by noise level"}
    return names.get(type(activation), "dynamic")


def _judged(judged: Iterable[Judgement]) -> str:
    """What was taken, then the next best."""
    ordered = sorted(judged, key=lambda judgement: (not judgement.chosen, judgement.error))
    return "; ".join(f"{judgement.decibels:.1f} dB {judgement.recipe}" for judgement in ordered[:2])


def _worst(layers: Iterable[LayerReport]) -> str:
    known = sorted((layer.sqnr_db, layer.name) for layer in layers if layer.sqnr_db is not None)
    return ", ".join(f"{_folded(name)} {db:.1f} dB" for db, name in known[:2])


def _folded(name: str) -> str:
    """A long name without its middle."""
    return name if len(name) <= _NAME else f"{name[:6]}..{name[8 - _NAME :]}"


def _cut(line: str) -> str:
    return line if len(line) <= _COLUMNS else f"{line[: _COLUMNS - 3]}..."
