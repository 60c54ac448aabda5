"""What the quantized models of one source are compared with, and what that measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from mpqdm_fx.digits.bundled import load_digits_classifier
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.jobs.calibration import held_out_of
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.report.gates import Gate, check_measured
from mpqdm_fx.report.metrics import EvaluationResult, FeatureClassifier, evaluate_against
from mpqdm_fx.report.networks import Networks
from mpqdm_fx.report.reference_run import ReferenceRun, reference_run, run_reference, shows_pictures
from mpqdm_fx.report.sample_metrics import SMALLEST_SET, measures_pictures
from mpqdm_fx.sources.model_names import BUNDLED
from mpqdm_fx.sources.source import Source

__all__ = [
    "PICTURE_METRICS",
    "Evaluation",
    "check_evaluated",
    "check_networks",
    "evaluated_metrics",
]

PICTURE_METRICS = ("psnr", "ssim")
"""Metrics of pictures that need no network."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the quantized models of one source are compared with, made once.

    Attributes:
        source: The float model.
        run: What it does.
        classifier: Judge of its samples; None where none is known.
        networks: Further judges of pictures.
    """

    source: Source
    run: ReferenceRun
    classifier: FeatureClassifier | None
    networks: Networks

    @classmethod
    def of(
        cls,
        source: Source,
        *,
        num: int,
        steps: int,
        seed: int,
        networks: Networks | None = None,
        pictures: bool = True,
    ) -> Self:
        """Run the float model on held-out noise.

        Args:
            source: Model and scheduler.
            num: Samples of the free-running metrics.
            steps: Steps of the scheduler.
            seed: Seed of noise and held-out trajectories.
            networks: Further judges of pictures.
            pictures: Whether samples are looked at as pictures, latents decoded for that.

        Raises:
            ConfigError: The source has no scheduler to draw with.
        """
        model, scheduler = source.model, source.scheduler
        classifier: FeatureClassifier | None = None
        if source.name == BUNDLED:
            classifier = load_digits_classifier()
            run = run_reference(
                model, scheduler, num_samples=num, num_inference_steps=steps, seed=seed
            )
        else:
            run = reference_run(
                model,
                scheduler,
                held_out_of(source, steps=steps, seed=seed),
                source.runs(num, seed + 1),
                num,
                sample_shape=source.sample_shape,
                num_inference_steps=steps,
                batch_size=16,
                seed=seed,
                decode=source.pictures if pictures else _no_pictures,
                prompts=source.prompts(num),
                convention=source.convention,
            )
        return cls(source=source, run=run, classifier=classifier, networks=networks or Networks())

    def draw(self, quantized: QuantizedModel) -> Tensor:
        """A quantized model's samples [N, ...] from the noise of the float model's."""
        return self.run.draw(quantized, self.source.scheduler)

    def measure(self, quantized: QuantizedModel, images: Tensor | None = None) -> EvaluationResult:
        """Compare a quantized model with the float one.

        Args:
            quantized: The model.
            images: What `draw` gave for it, where it was drawn already.
        """
        return evaluate_against(
            self.run,
            quantized,
            self.source.scheduler,
            self.classifier,
            networks=self.networks,
            images=images,
        )


def _no_pictures(_: Tensor) -> None:
    """Decode nothing."""


_OF_SETS = (
    "frechet_distance",
    "kernel_distance",
    "inception_distance",
    "inception_kernel_distance",
)


def evaluated_metrics(
    source: Source, networks: Networks | None = None, *, num: int = SMALLEST_SET
) -> tuple[str, ...]:
    """Names of the metrics that the evaluation of a source gives, as in `METRICS`.

    Args:
        source: The float model, with the pipeline that it belongs to.
        networks: Further judges of pictures.
        num: Samples that are drawn; a single one has no distance of sets.
    """
    if source.calls is not None or source.scheduler is None:
        return ("epsilon_sqnr",)
    names = ["epsilon_sqnr", "x0_sqnr", "x0_median_sqnr"]
    if _why_no_pictures(source) is None and measures_pictures():
        names += [*PICTURE_METRICS, *(networks or Networks()).metrics]
    if source.name == BUNDLED:
        names += ["accuracy", "frechet_distance", "kernel_distance"]
    return tuple(name for name in names if num >= SMALLEST_SET or name not in _OF_SETS)


def check_evaluated(
    gates: Sequence[Gate],
    source: Source,
    measured: set[str],
    what: str,
    option: str = "--gate",
) -> None:
    """Refuse gates on what is not measured, as `check_measured`; says why pictures are not.

    Args:
        gates: The gates.
        source: The float model, with the pipeline that it belongs to.
        measured: Names of the metrics that will be there.
        what: What is measured, for the message.
        option: Where gates were typed, for the message.

    Raises:
        ConfigError: A metric will not be there.
    """
    why = _why_no_pictures(source)
    if why is not None and any(gate.metric in PICTURE_METRICS for gate in gates):
        what = f"{what} ({why})"
    check_measured(gates, measured, what, option)


def check_networks(networks: Networks | None, source: Source, *, inputs: str | None) -> None:
    """Refuse networks that would have nothing to judge.

    Args:
        networks: Judges of pictures.
        source: The float model, with the pipeline that it belongs to.
        inputs: Calls of the user's own, which are compared in the place of pictures.

    Raises:
        ConfigError: No pictures are drawn, or samples are none; or they are told no text, and CLIP
            is to judge them by it.
    """
    names = () if networks is None else networks.metrics
    if not names:
        return
    why = _why_no_pictures(source)
    if inputs is not None:
        why = f"--inputs {inputs} draws nothing"
    elif source.scheduler is None:
        why = f"{source.name} has no scheduler to draw with"
    if why is not None:
        raise ConfigError(f"{', '.join(names)}: {why}; leave the networks out")
    if "clip_score" in names and not source.prompts(1):
        reason = None if source.components is None else source.components.unencoded
        raise ConfigError(
            f"--clip: {source.name} draws from no prompts"
            f"{'' if reason is None else f' ({reason})'}, and CLIP compares pictures with theirs; "
            f"leave it out"
        )


def _why_no_pictures(source: Source) -> str | None:
    """Why the evaluation does not look at samples; None if it does."""
    if source.no_pictures is not None:
        return source.no_pictures
    shape = source.sample_shape
    if source.is_decoded or shows_pictures(shape):
        return None
    return f"samples of {'x'.join(map(str, shape))} are too small to look at"
