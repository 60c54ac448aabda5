"""Sampling loops for tests, over `small.TinyEDM`: EDM's Heun, with guidance, and one-step ones."""

import itertools

import torch
from small import SIGMAS


class Heun:
    """Karras et al. (2022), algorithm 1: a step, and a second call that corrects it."""

    def __init__(self, sigmas=(*SIGMAS, 0.0)):
        self.sigmas = sigmas

    def sample(self, model, noise, conditions, generator):
        x = noise * self.sigmas[0]
        for now, then in itertools.pairwise(self.sigmas):
            slope = (x - self.denoised(model, x, now, conditions)) / now
            ahead = x + (then - now) * slope
            if then:
                next_slope = (ahead - self.denoised(model, ahead, then, conditions)) / then
                ahead = x + (then - now) * (slope + next_slope) / 2
            x = ahead
        return x

    def denoised(self, model, x, sigma, conditions):
        return model(noisy=x, sigma=torch.full((len(x),), sigma), **conditions)


class InPlace(Heun):
    """Euler over the sigmas, in the memory of the tensors that it called the model with."""

    def sample(self, model, noise, conditions, generator):
        x, sigma = noise * self.sigmas[0], torch.empty(len(noise))
        for now, then in itertools.pairwise(self.sigmas):
            clean = model(noisy=x, sigma=sigma.fill_(now), **conditions)
            x += (then - now) * (x - clean) / now
        return x


class Guided(Heun):
    """Both halves of guidance in one call, the unconditional one first."""

    def denoised(self, model, x, sigma, conditions):
        difficulty = conditions["difficulty"]
        plain, conditional = model(
            noisy=torch.cat([x, x]),
            sigma=torch.full((2 * len(x),), sigma),
            difficulty=torch.cat([torch.zeros_like(difficulty), difficulty]),
        ).chunk(2)
        return plain + 2.0 * (conditional - plain)


class Consistency:
    """Song et al. (2023), algorithm 1: one call, and noise again before each further one."""

    def __init__(self, sigmas=(80.0,)):
        self.sigmas = sigmas

    def sample(self, model, noise, conditions, generator):
        x = noise * self.sigmas[0]
        for index, sigma in enumerate(self.sigmas):
            if index:
                x = x + sigma * torch.randn(x.shape, generator=generator)
            x = model(noisy=x, sigma=torch.full((len(x),), sigma), **conditions)
        return x
