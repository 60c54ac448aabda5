"""A pipeline's own modules in the place of programs, and what they meet while it draws in float.

Calibration runs the loop that the exported folder runs, so a part is calibrated on what its program
will get: whatever the family, nothing is said twice.
"""

import contextlib
import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpqdm_fx.errors import CalibrationError
from mpqdm_fx.graph.nested import concatenate, take_rows, tensors_of
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.io.progress import stage
from mpqdm_fx.pipelines.layout import Layout, Size
from mpqdm_fx.pipelines.loops.loop import Loop, Request, Spec
from mpqdm_fx.pipelines.memory import nested

__all__ = ["ModuleParts", "PartCalls", "RecordedRuns", "decoder_call", "first_calls", "float_loop"]

#: Bytes of recorded calls of one part; a control network's residuals are many times its inputs.
_MEMORY = 2 << 30
_LONG = 100  # calls of a part in the first run, whose number is not known

Call = dict[str, Any]


class ModuleParts:
    """A pipeline's own modules, called as its programs are.

    Args:
        layout: The pipeline.
        timesteps: Those that the programs have table rows for: stepped parts are given rows.
    """

    def __init__(self, layout: Layout, timesteps: Sequence[float] | None = None) -> None:
        self._layout = layout
        self._timesteps = timesteps

    def has(self, part: str, size: Size | None = None) -> bool:
        """Whether the pipeline has a part; modules compute nothing once per image apart."""
        component = self._layout.parts.get(part)
        return component is not None and component.sized == (size is not None)

    def run(self, part: str, size: Size | None, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a part as torch does; see `Parts.run`."""
        component = self._layout.parts[part]
        call = self.call(part, inputs)
        with torch.no_grad():
            outputs = pytree.tree_leaves(component.module(**call))
        return dict(zip(component.outputs, outputs, strict=True))

    def call(self, part: str, inputs: Mapping[str, Tensor]) -> Call:
        """Keyword arguments of a part's module: those of the inputs that it takes."""
        component = self._layout.parts[part]
        taken = inspect.signature(component.module.forward).parameters
        named = {name: value for name, value in inputs.items() if name.partition(".")[0] in taken}
        if self._timesteps is not None and component.stepped:
            name = self._layout.convention.timestep
            named[name] = torch.tensor([self._timesteps[int(named[name])]])
        return nested(named)


def float_loop(layout: Layout, parts: Any) -> Loop:
    """A pipeline's loop over parts that are not an exported folder's.

    Args:
        layout: The pipeline.
        parts: `Parts`.
    """
    spec = Spec(
        settings=layout.settings,
        channels=layout.latent_channels,
        scale=layout.scale,
        convention=layout.convention,
        timesteps=None,
        tokenizer=layout.tokenizers.__getitem__,
    )
    return layout.loop(parts, spec)


class _Recorder(ModuleParts):
    """Keeps what parts are called with: all calls, or one of so many where they are large."""

    def __init__(self, layout: Layout, draws: int) -> None:
        super().__init__(layout)
        self.calls: defaultdict[str, list[tuple[int, Call]]] = defaultdict(list)
        self.draw = 0
        self._draws = draws
        self._counts: defaultdict[str, int] = defaultdict(int)

    def call(self, part: str, inputs: Mapping[str, Tensor]) -> Call:
        call = super().call(part, inputs)
        every = self._every(part, call)
        # a prime number more each run: every step of the schedule is kept in some runs
        if (self._counts[part] + 7 * self.draw) % every == 0:
            self.calls[part].append((self.draw, call))
        self._counts[part] += 1
        return call

    def _every(self, part: str, call: Call) -> int:
        """Of how many calls one is kept, so that all runs' fit into memory."""
        size = sum(tensor.nbytes for tensor in tensors_of(call))
        seen = max(1, self._counts[part] // max(1, self.draw)) if self.draw else _LONG
        return -(-size * seen * self._draws // _MEMORY)


@dataclass(frozen=True)
class PartCalls:
    """Calls of one part in batches; those of held-out runs stand last.

    Attributes:
        calls: Keyword arguments.
        held_out: How many of them, the last ones, are of held-out runs alone.
    """

    calls: Sequence[Call]
    held_out: int

    @property
    def held_out_calls(self) -> range:
        """Indices of the held-out runs' calls."""
        return range(len(self.calls) - self.held_out, len(self.calls))

    def __len__(self) -> int:
        """Number of calls."""
        return len(self.calls)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Yield keyword arguments of the part's module."""
        yield from self.calls


class RecordedRuns:
    """What a pipeline draws in float, and all calls of its parts on the way; made when asked for.

    Args:
        layout: The pipeline.
        requests: What is drawn.
        held_out: So many of the requests, the last ones, are held out of calibration.
        batch_size: Rows of a call in `calls`.
        seed: Of the order of rows.
    """

    def __init__(
        self,
        layout: Layout,
        requests: Sequence[Request],
        *,
        held_out: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self._layout = layout
        self._requests = requests
        self._first_held_out = len(requests) - held_out
        self._batch_size = batch_size
        self._seed = seed

    @property
    def final_samples(self) -> Tensor:
        """What the scheduler ended with, float [requests, C, h, w]."""
        return self._drawn[0]

    def calls(self, part: str, *, batch_size: int | None = None) -> PartCalls:
        """The calls of a part, rows mixed, in batches.

        Args:
            part: One that runs while latents are made.
            batch_size: Rows of a call; None: those of the runs.
        """
        recorded = self._drawn[1][part]
        generator = torch.Generator().manual_seed(self._seed)
        halves = []
        for unseen in (False, True):
            rows = [c for draw, c in recorded if (draw >= self._first_held_out) == unseen]
            order = torch.randperm(len(rows), generator=generator).tolist()
            size = batch_size or self._batch_size
            batches = [order[start : start + size] for start in range(0, len(order), size)]
            halves.append([concatenate([rows[row] for row in batch]) for batch in batches])
        known, held_out = halves
        return PartCalls([*known, *held_out], len(held_out))

    @cached_property
    def _drawn(self) -> tuple[Tensor, Mapping[str, list[tuple[int, Call]]]]:
        return self._draw()

    @plain_torch()
    def _draw(self) -> tuple[Tensor, Mapping[str, list[tuple[int, Call]]]]:
        layout = self._layout
        recorder = _Recorder(layout, len(self._requests))
        loop, samples = float_loop(layout, recorder), []
        steps = loop.count(self._requests[0], copy.deepcopy(layout.pipeline.scheduler))
        with stage("float model's runs", len(self._requests) * steps, unit="step") as advance:
            for recorder.draw, request in enumerate(self._requests):
                scheduler = copy.deepcopy(layout.pipeline.scheduler)
                samples.append(loop.draw(request, scheduler, lambda *_: advance(1)))
        finals = torch.cat(samples)
        if not torch.isfinite(finals).all():
            raise CalibrationError(
                "the pipeline's own denoising run gave NaN or infinite samples; check its float "
                "weights, and that its scheduler belongs to its denoiser"
            )
        return finals, recorder.calls


class _Decoder(ModuleParts):
    """Keeps what the decoder is called with, and decodes nothing."""

    def run(self, part: str, size: Size | None, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.inputs = self.call(part, inputs)
        raise _BegunError


def decoder_call(layout: Layout, latents: Tensor, request: Request) -> Call:
    """What the decoder is called with for latents as a scheduler leaves them.

    Args:
        layout: A pipeline with a decoder.
        latents: With a batch of one.
        request: What was drawn.
    """
    decoder = _Decoder(layout)
    with contextlib.suppress(_BegunError):
        float_loop(layout, decoder).decode(latents, request)
    return decoder.inputs


class _BegunError(Exception):
    """A step was done, which is all that was wanted."""


def first_calls(layout: Layout, request: Request) -> dict[str, Call]:
    """The first call of every part that runs before a picture is decoded, batch 1.

    Args:
        layout: The pipeline.
        request: What is drawn, for one step.
    """

    def stop(step: int, count: int) -> None:
        raise _BegunError

    recorder = _Recorder(layout, 1)
    scheduler = copy.deepcopy(layout.pipeline.scheduler)
    with contextlib.suppress(_BegunError):
        float_loop(layout, recorder).draw(request, scheduler, stop)
    return {part: take_rows(calls[0][1], slice(0, 1)) for part, calls in recorder.calls.items()}
