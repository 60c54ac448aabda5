"""Lengths read off a mask are fixed to those of the example, and nothing else is."""

import pytest
import torch
from torch import nn

from mpqdm_fx.capture.trace import trace
from mpqdm_fx.errors import TraceError


class Lengths(nn.Module):
    """Cuts a prompt where its mask ends, as Lumina2 does, and adds what is left to an image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, sample, prompt, mask):
        lengths = mask.sum(dim=1).tolist()
        if len(set(lengths)) > 1 or bool(mask[0, 0]) is False:
            raise ValueError("unequal lengths")
        return self.linear(sample) + prompt[:, : lengths[0]].mean(1, keepdim=True)


class Routes(Lengths):
    """Cuts by what an image says, as a mixture of experts does."""

    def forward(self, sample, prompt, mask):
        count = int((sample > 0).sum().item())
        return self.linear(sample) + prompt[:, : count % 3 + 1].mean(1, keepdim=True)


class Steps(Lengths):
    """Branches on the noise level."""

    def forward(self, sample, timestep):
        return self.linear(sample) * (2 if timestep.sum().item() > 3 else 1)


def inputs():
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3:] = False
    sample, prompt = (torch.randn(2, n, 4, generator=generator) for n in (3, 5))
    return {"sample": sample, "prompt": prompt, "mask": mask}


def test_lengths_are_those_of_the_example_and_it_is_said(caplog):
    model = Lengths()
    with caplog.at_level("WARNING"):
        graph = trace(model, inputs())
    other = inputs() | {"sample": torch.randn(2, 3, 4), "prompt": torch.randn(2, 5, 4)}
    assert torch.equal(graph(**other), model(**other))
    note = graph.meta["signature"].note
    assert "mask has the lengths of the example (3, True)" in note
    assert note in caplog.text


class Branches(Lengths):
    """Takes another table of frequencies for long prompts, as OmniGen does."""

    def forward(self, sample, positions):
        factor = 2.0 if positions.max() + 1 > 8 else 0.5
        return self.linear(sample) * factor


@pytest.mark.parametrize("length", [8, 9])
def test_a_branch_is_that_of_the_example_and_it_is_said(length):
    model, sample = Branches(), inputs()["sample"]
    graph = trace(model, {"sample": sample, "positions": torch.arange(length).repeat(2, 1)})
    other = {"sample": sample, "positions": torch.arange(length).flip(0).repeat(2, 1)}
    assert torch.equal(graph(**other), model(**other))
    note = graph.meta["signature"].note
    assert f"positions answers the model's comparisons as the example does ({length > 8})" in note


def test_what_an_image_says_is_not_fixed():
    with pytest.raises(TraceError, match="branches on a tensor's value"):
        trace(Routes(), inputs(), dynamic_batch=False)


def test_what_a_noise_level_says_is_not_fixed():
    with pytest.raises(TraceError, match="branches on a tensor's value"):
        trace(Steps(), {"sample": inputs()["sample"], "timestep": torch.tensor([1, 2])})


class Listed(nn.Module):
    """Takes a list of images, as Z-Image does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, t):
        assert len(t) == len(x)
        return [self.linear(image) * time for image, time in zip(x, t, strict=True)]


@pytest.mark.parametrize("batch", [1, 2])
def test_samples_of_a_list_get_a_time_each(batch):
    images = [torch.randn(4, 6) for _ in range(batch)]
    model = Listed()
    graph = trace(model, {"x": images, "t": 0.5})
    signature = graph.meta["signature"]
    assert (signature.batch, signature.spec("t").shape) == (batch, (batch,))
    assert "the length of a list" in signature.note
    expected = model(images, torch.full((batch,), 0.5))
    assert all(map(torch.equal, graph(x=images, t=0.5), expected))
