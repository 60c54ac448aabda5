"""What to train, for how long, and by which losses."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.records.validation import (
    Between,
    Count,
    NonNegative,
    Positive,
    Seed,
    Share,
    Some,
    check_fields,
)

__all__ = ["DistillConfig", "Relation"]

Relation = Literal["none", "trd", "queue", "feature"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of a training run.

    Attributes:
        updates: How many updates; None trains for `seconds`.
        seconds: Wall time of the training, None for no limit; one of the two is needed. The
            learning rates fall linearly to 0 over the run, whichever measures it.
        trajectories: Denoising runs of the float model that give the data.
        steps: Steps of each; a `Sampler` has its own.
        batch_size: Rows in an update, over all processes.
        rank: Rank of the trained change of a weight, 0 trains none (QALoRA, EfficientDM, arXiv
            2310.03270).
        weight_rate: Learning rate of the low-rank factors, in units of the layer's mean distance
            between levels (EfficientDM's scale-aware rate, which has 1/2500).
        scale_rate: Learning rate of the logarithm of weight steps.
        absolute_rates: Take `scale_rate` and `range_rate` as rates of the steps themselves, and of
            zero points in codes, as EfficientDM's code does.
        level_rate: Learning rate of fitted levels, in units of a step; 0 keeps them.
        range_rate: Learning rate of the logarithm of activation steps; zero points have 16 times
            as much, in codes.
        bias_rate: Learning rate of biases, in units of the layer's root mean square bias.
        smoothness: Weight of the squared differences by which neighbouring groups of noise levels
            move apart (TALSQ, kept smooth in the noise level).
        base: What is rounded: `"cell"`, the point nearest to the float weight that has the
            quantized model's codes; `"float"`, the float weight (its nearest codes replace the
            model's: MPQ-DM); `"codes"`, the rounded weight (EfficientDM).
        rounding: Of weights during training: `"nearest"`, or `"stochastic"` to one of the two
            levels around, drawn anew for every update. Either way the gradient passes straight
            through, and what is kept is the nearest.
        relation: Second loss: `"trd"` MPQ-DM's time-smoothed relation distillation, `"queue"` its
            variant with a memory of teacher pixels (MPQ-DMv2), `"feature"` plain squared error of
            features (BitsFusion), `"none"`.
        relation_share: Norm of the second loss's gradient over that of the first.
        temperature: Of the softmax over relations.
        pixels: Pixels of a map that relations use at most.
        memory: Teacher pixels that the queue holds.
        features: Module paths whose outputs are compared; none takes what the last norm reads.
        final_share: Share of the loss, at the start, in which a step's error counts by how far it
            moves the finished sample, which is measured; in the rest it counts as it is. 0
            measures nothing.
        noise_bias: (a, b) of the Beta distribution by which steps count in that rest, 1 being the
            noisiest; (1, 1) is all alike, BitsFusion has (3, 1).
        effect_runs: Runs on which the steps' effects are measured.
        held_out: Further runs, from other noise, that judge what training gave.
        keep_better: Return the model that training started from where those runs say that it did
            not help.
        on_policy: Share of rows whose latents come from the student's own runs.
        refresh: Updates after which the student's runs are drawn anew.
        ema: Decay of the averaged parameters, which are what is kept; 0 keeps the last.
        correct_mean: Take the mean error of the output, by channel, out of the last bias.
        guidance_scale: Weight of classifier-free guidance in runs and loss; None for none.
        mixed_precision: Compute in bfloat16 where autocast does.
        recompute: Parts of the graph between which values are held for the backward pass; the rest
            is computed again, for less memory and about a third more time. 0 holds all.
        seed: Of everything that is drawn.

    Raises:
        ConfigError: A value is out of range.
    """

    updates: Annotated[int, Between(1, 2**31)] | None = None
    seconds: Positive | None = None
    trajectories: Count = 64
    steps: Count = 20
    batch_size: Count = 32
    rank: Some = 8
    weight_rate: NonNegative = 0.06
    scale_rate: NonNegative = 1e-3
    absolute_rates: bool = False
    level_rate: NonNegative = 0.02
    range_rate: NonNegative = 2e-3
    bias_rate: NonNegative = 0.01
    smoothness: NonNegative = 1e-3
    base: Literal["cell", "float", "codes"] = "cell"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    relation: Relation = "none"
    relation_share: NonNegative = 0.1
    temperature: Positive = 0.1
    pixels: Annotated[int, Between(2, 2**20)] = 256
    memory: Annotated[int, Between(2, 2**20)] = 2048
    features: tuple[str, ...] = ()
    final_share: Share = 0.5
    noise_bias: tuple[Positive, Positive] = (1.0, 1.0)
    effect_runs: Count = 8
    held_out: Count = 8
    keep_better: bool = True
    on_policy: Share = 0.0
    refresh: Annotated[int, Between(1, 2**31)] = 100
    ema: Share = 0.99
    correct_mean: bool = True
    guidance_scale: Positive | None = None
    mixed_precision: bool = False
    recompute: Some = 0
    seed: Seed = 0

    def __post_init__(self) -> None:
        for name in ("features", "noise_bias"):
            if isinstance(getattr(self, name), list):  # as JSON has them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fields(self)
        if self.updates is None and self.seconds is None:
            raise ConfigError("say how long to train: updates=..., seconds=..., or both")

    @property
    def guided(self) -> bool:
        """Whether runs and loss are those of classifier-free guidance."""
        return self.guidance_scale is not None

    @classmethod
    def efficientdm(cls, **settings: Any) -> Self:
        """The baseline: EfficientDM's trained parts and rates (arXiv 2310.03270, its code).

        Other than there, nothing decays (AdamW's 0.01 on everything), rates rise over the first
        2 %, factors start wider by the root of 3, weights move with their trained step, and ranges
        are those of noise levels and not of single steps. The rates are made for 16,000 updates of
        4 rows; settings given here replace them.

        Quantize with `allocation="uniform"`, `levels="uniform"`, `rounding="nearest"`,
        `propagation=0`, `activation_mode="timestep"` for its start; give the same `updates` and
        data to what it is compared with.
        """
        published: dict[str, Any] = {
            "rank": 32,
            "weight_rate": 1 / 2500,
            "scale_rate": 1e-6,
            "range_rate": 5e-4,
            "absolute_rates": True,
            "level_rate": 0.0,
            "bias_rate": 0.0,
            "smoothness": 0.0,
            "base": "codes",
            "final_share": 0.0,
            "ema": 0.0,
            "correct_mean": False,
            "keep_better": False,
        }
        return cls(**{**published, **settings})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}
