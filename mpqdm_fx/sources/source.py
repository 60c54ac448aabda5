"""A float model, its scheduler and the inputs it can be run on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.calibration.conventions import CallingConvention, convention_of
from mpqdm_fx.calibration.samplers import model_convention
from mpqdm_fx.calibration.sampling import EXTRA_CHANNELS
from mpqdm_fx.graph.nested import tensor_leaves
from mpqdm_fx.sources.components import Components
from mpqdm_fx.sources.example_inputs import ModelInputs
from mpqdm_fx.sources.extra_channels import ExtraChannels
from mpqdm_fx.sources.functions import GivenCalls

__all__ = ["Source"]

# Conditions that are numbers of the run, and no embeddings of anything.
_ENCODED = ("encoder_hidden_states", "text_embeds")
_NUMBERS = (
    "time_ids", "timestep_cond", "encoder_attention_mask", "guidance", "img_ids", "txt_ids",
    "resolution", "aspect_ratio",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """A float model and what is needed to run it.

    Attributes:
        name: What the user called it.
        model: The model in evaluation mode, or what is called like it.
        scheduler: A diffusers scheduler; None for a model that a function made.
        example_inputs: Keyword arguments of one call, batch 2.
        sample_shape: Shape of one noisy sample, without the batch axis and without channels that
            are no noise.
        inputs: What the model takes, by its config; None for a model that diffusers does not know.
        extra: What it takes behind the noisy channels, None for nothing.
        variant: Variant of its weight files.
        calls: Calls of the user's own, to calibrate on and to measure with; None draws them.
        components: The rest of its pipeline, which gives prompts their embeddings; None without
            one, or for a source that need not know of it.
    """

    name: str
    model: Any
    scheduler: Any
    example_inputs: Mapping[str, Any]
    sample_shape: tuple[int, ...]
    inputs: ModelInputs | None = None
    extra: ExtraChannels | None = None
    variant: str | None = None
    calls: GivenCalls | None = None
    components: Components | None = None

    @property
    def convention(self) -> CallingConvention:
        """How a scheduler's loop calls the model, whatever the model is called through."""
        if self.inputs is None:
            return model_convention(self.model)
        return convention_of(self.inputs.class_name, self.inputs.config)

    def with_calls(self, calls: GivenCalls) -> "Source":
        """The source with calls of the user's own."""
        example = calls.calls[0]
        first = next((t for _, t in tensor_leaves(example) if t.ndim > 1), torch.empty(0))
        shape = self.sample_shape or tuple(first.shape[1:])
        return replace(self, calls=calls, example_inputs=example, sample_shape=shape)

    def with_context(self, length: int) -> "Source":
        """The source with texts of so many tokens, which its encoder or its graph has."""
        if self.inputs is None or self.inputs.context_length == length:
            return self
        inputs = replace(self.inputs, context_length=length)
        example = inputs.example() if self.calls is None else self.example_inputs
        return replace(self, inputs=inputs, example_inputs=example)

    def conditions(self, count: int, seed: int) -> dict[str, Any]:
        """Conditions for `count` samples: balanced class labels, seeded random embeddings.

        A model with extra channels is shown samples that it draws itself; see `extra_channels`.

        Args:
            count: Number of samples.
            seed: Seed of the random values.

        Returns:
            Keyword arguments beside the sample and the time, batch `count`; extra channels as
            `"extra_channels"`.

        Raises:
            ConfigError: It is not known how denoising runs of such a model are conditioned.
        """
        if self.inputs is None:
            generator = torch.Generator().manual_seed(seed)
            return {
                name: _random_like(value, count, generator)
                for name, value in self.example_inputs.items()
                if name not in (self.convention.sample, self.convention.timestep)
            }
        return self._with_extra(self._made(count, seed), count, seed)

    def runs(self, count: int, seed: int, *, unseen: bool = False) -> dict[str, Any]:
        """What denoising runs are conditioned on: the pipeline's prompts where it encodes them.

        Args:
            count: Number of runs.
            seed: Seed of what is made at random.
            unseen: Take turns with the prompts from the last one backwards, so that runs which
                judge have others than those that were calibrated on.

        Returns:
            Arguments of `denoise` and `Trajectories`: `conditions`, and for guidance
            `guidance_scale` and `unconditional`.

        Raises:
            ConfigError: As `conditions`.
        """
        beside = self.components
        if beside is None or not beside.prompts:
            return {"conditions": self.conditions(count, seed)}
        plain, negative = beside.halves(self._made(count, seed), count, unseen=unseen)
        plain = self._with_extra(plain, count, seed)
        if beside.guidance is None:
            return {"conditions": plain}
        if EXTRA_CHANNELS in plain:  # both halves see the picture
            negative[EXTRA_CHANNELS] = plain[EXTRA_CHANNELS]
        return {
            "conditions": plain,
            "guidance_scale": beside.guidance,
            "unconditional": negative,
        }

    def prompts(self, count: int) -> tuple[str, ...]:
        """What each of so many runs is told; empty where it is told no text.

        Args:
            count: Number of runs, of `runs` with seen prompts.
        """
        beside = self.components
        return () if beside is None else tuple(islice(cycle(beside.prompts), count))

    @property
    def is_guided(self) -> bool:
        """Whether each sample has two rows of a call, one without its prompt."""
        return self.components is not None and self.components.guidance is not None

    @property
    def is_decoded(self) -> bool:
        """Whether samples are latents, and its pipeline's VAE is there to decode them."""
        return self.components is not None and self.components.decodes

    @property
    def no_pictures(self) -> str | None:
        """Why samples cannot be looked at; None if they are pictures, or latents that are decoded.

        Pictures have three axes and 1 or 3 channels.
        """
        beside, shape = self.components, self.sample_shape
        if self.is_decoded:
            return None
        if beside is not None and beside.undecoded is not None:
            return beside.undecoded
        if len(shape) == 3 and shape[0] in (1, 3):
            return None
        dimensions = "x".join(map(str, shape)) or "unknown shape"
        return f"samples of {dimensions} are no pictures, and no pipeline's VAE decodes them"

    def pictures(self, samples: Tensor) -> Tensor | None:
        """Samples as pictures [N, 1 or 3, H, W], about -1 to 1; None where they cannot be.

        Args:
            samples: [N, *sample_shape], as the scheduler leaves them.
        """
        if self.no_pictures is not None:
            return None
        if self.components is None or not self.is_decoded:
            return samples
        return self.components.pictures(samples)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is to be known of the runs: which embeddings are random numbers."""
        if self.calls is not None or self.inputs is None or not self.inputs.is_denoiser:
            return ()
        embeddings = () if self.components is None or not self.components.prompts else _ENCODED
        random = [
            name
            for name, value in tensor_leaves(self._made(1, 0))
            if value.is_floating_point() and name.rpartition(".")[2] not in (*embeddings, *_NUMBERS)
        ]
        if not random:
            return ()
        why = None if self.components is None else self.components.unencoded
        reason = "" if embeddings else f": {why or 'no text encoder belongs to it'}"
        remark = f"runs are conditioned on seeded random numbers as {', '.join(random)}{reason}"
        return (f"{remark}; what they say of real prompts is not known",)

    def _made(self, count: int, seed: int) -> dict[str, Any]:
        """Conditions made of the config alone, without extra channels."""
        assert self.inputs is not None
        conditions = self.inputs.conditions(count, seed)
        if self.extra is not None and "class_labels" in conditions and self._is_told_noise:
            # how much their picture has; these pictures have none
            conditions["class_labels"] = torch.zeros_like(conditions["class_labels"])
        return conditions

    def _with_extra(self, conditions: dict[str, Any], count: int, seed: int) -> dict[str, Any]:
        if self.extra is None:
            return conditions
        extra = self.extra.draw(
            self.model,
            self.scheduler,
            self.sample_shape[1:],
            conditions,
            count=count,
            seed=seed,
        )
        return {**conditions, EXTRA_CHANNELS: extra}

    @property
    def _is_told_noise(self) -> bool:
        """Whether the class label is a level of noise, as of upscalers."""
        assert self.inputs is not None
        kind = self.inputs.config.get("class_embed_type")
        thumbnail = self.extra is not None and self.extra.kind == "thumbnail"
        return kind == "timestep" or (kind is None and thumbnail)


def _random_like(value: Any, count: int, generator: torch.Generator) -> Any:
    """Random values of a shape; integers are 0 or 1, which every embedding table has."""
    if isinstance(value, Mapping):
        return {key: _random_like(entry, count, generator) for key, entry in value.items()}
    shape = (count, *value.shape[1:])
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.dtype)
    return torch.randint(2, shape, generator=generator).to(value.dtype)
