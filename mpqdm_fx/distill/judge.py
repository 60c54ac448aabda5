"""Whether training helped: errors on runs of other noise, weighed as training weighs them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpqdm_fx.calibration.samplers import first_tensor
from mpqdm_fx.calibration.sampling import guided
from mpqdm_fx.distill.runs import Predict, Recorder, Runs
from mpqdm_fx.distill.student import Student

__all__ = ["Errors", "Judge"]


@dataclass(frozen=True, kw_only=True)
class Errors:
    """A student's errors on recorded runs.

    Attributes:
        mean: Mean error of each output channel [C].
        steps: Squared error of each step as a share of the energy of all targets, float64 [calls].
    """

    mean: Tensor
    steps: Tensor

    @property
    def share(self) -> float:
        """Squared error as a share of the targets' energy."""
        return float(self.steps.sum())


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Measures a student on runs.

    Attributes:
        model: The student, called with the model's keyword arguments.
        recorder: Rows at once, guidance and device.
    """

    model: Predict
    recorder: Recorder

    @torch.no_grad()
    def errors(self, runs: Runs) -> Errors:
        """Errors over all calls of all runs."""
        total, count = torch.zeros(()), 0
        squares = torch.zeros(runs.calls, dtype=torch.float64)
        for call in range(runs.calls):
            for rows in torch.split(torch.arange(len(runs)), self.recorder.batch_size):
                batch = runs.batch(rows, torch.full((len(rows),), call)).to(self.recorder.device)
                output = first_tensor(self.model(**batch.inputs))
                answer = guided(output, self.recorder.guidance_scale)
                error = (answer[:, : batch.target.shape[1]] - batch.target).cpu()
                total = total + error.transpose(0, 1).flatten(1).sum(1)
                squares[call] += error.square().sum()
                count += error.numel() // error.shape[1]
        energy = float(runs.targets.double().square().sum())
        return Errors(mean=total / max(1, count), steps=squares / energy if energy else squares)

    @torch.no_grad()
    def correct_mean(self, student: Student, fit: Runs, test: Runs) -> Errors:
        """Take the output's mean error out of the last layer's bias if that lowers the error.

        Args:
            student: What is measured; its bias is changed.
            fit: Runs that the mean is taken over.
            test: Runs that the correction is judged by.

        Returns:
            The errors on `test` in the end.
        """
        last = list(student.layers.values())[-1]
        before = self.errors(test)
        mean = self.errors(fit).mean.to(self.recorder.device)
        if last.bias is None or len(last.bias) != len(mean):
            return before
        bias = last.bias.detach().clone()
        # guidance combines two outputs with weights 1 - g and g, which sum to 1
        last.bias.sub_(mean)
        after = self.errors(test)
        if after.share < before.share:
            return after
        last.bias.copy_(bias)
        return before
