"""Right samplers of each kind, and by their options the faults that `compare.py --against exact` has to find."""

from __future__ import annotations

import random

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler


def predict(model, x, sigmas, i, callback, at=None):
    """The prediction at step i, with the callback that belongs to it."""
    at = sigmas[i] if at is None else at
    denoised = model(x, at * x.new_ones([len(x)]))
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": at, "denoised": denoised})
    return denoised


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None, factor=1.0, skip=0, mixes=0.0, writes="",
          shows="", rounds=False):  # fmt: skip
    sigmas = torch.cat([sigmas[:skip], sigmas[skip:][1:]]) if skip and len(sigmas) > 3 else sigmas
    first = x
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([len(x)]))
        denoised = denoised + mixes * (denoised.mean(0, keepdim=True) - denoised) if mixes else denoised
        denoised = denoised.float().to(x.dtype) if rounds else denoised
        if callback is not None:
            shown = first if shows == "first" else x
            callback({"x": shown, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        step = factor * (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
        x = x.add_(step) if writes == "latents" else x + step
        if writes == "levels":
            sigmas[i] *= 1.001
    return x


def multistep(model, x, sigmas, extra_args=None, callback=None, disable=None, sign=1.0, weight=1.0, history=""):
    old = torch.zeros_like(x) if history == "zeros" else None
    for i in range(len(sigmas) - 1):
        denoised = predict(model, x, sigmas, i, callback)
        if sigmas[i + 1] == 0:
            return denoised
        h, better = (sigmas[i] / sigmas[i + 1]).log(), denoised
        if old is not None:
            ratio = h / ((sigmas[i - 1] / sigmas[i]).log() if i else h)
            better = (1 + sign * weight * ratio / 2) * denoised - weight * ratio / 2 * old
        x, old = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * better, denoised
    return x


def rk4(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i in range(len(sigmas) - 1):

        def slope(x, sigma):
            return (x - model(x, sigma * x.new_ones([len(x)]))) / sigma

        s, h, k1 = sigmas[i], sigmas[i + 1] - sigmas[i], (x - predict(model, x, sigmas, i, callback)) / sigmas[i]
        if sigmas[i + 1] == 0:
            return x + h * k1
        k2 = slope(x + h / 2 * k1, s + h / 2)
        k3 = slope(x + h / 2 * k2, s + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, s + h))
    return x


def ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None, strong=1.0, early=1.0,
              after=False, draws=""):  # fmt: skip
    sources = {
        "numpy": lambda i: torch.from_numpy(np.random.randn(*x.shape)),
        "python": lambda i: torch.tensor([random.gauss(0, 1) for _ in range(x.numel())]).view(x.shape),
        "fixed": lambda i: torch.randn(x.shape, generator=torch.Generator().manual_seed(i)),
        "fixed once": lambda i: sources["fixed" if i == 3 else ""](i),
        "seeded": lambda i: random.seed(i) or sources["python"](i),
        "": lambda i: noise_sampler(sigmas[i], sigmas[i + 1]),
    }
    for i in range(len(sigmas) - 1):
        high, low, denoised = sigmas[i], sigmas[i + 1], predict(model, x, sigmas, i, callback)
        up = (low**2 * (high**2 - low**2) / high**2) ** 0.5
        x = denoised + (low**2 - up**2) ** 0.5 / high * (x - denoised)
        noise = sources[draws](i).to(x)
        if low > 0:
            x = x + noise * up * (strong if i >= len(sigmas) // 3 else strong * early)
        elif after:
            x = x + high * noise
    return x


def churn(model, x, sigmas, extra_args=None, callback=None, disable=None, strong=1.0):
    for i in range(len(sigmas) - 1):
        high = sigmas[i] * (1 + min(20 / (len(sigmas) - 1), 0.4))
        x = x + strong * torch.randn_like(x) * (high**2 - sigmas[i] ** 2) ** 0.5
        denoised = predict(model, x, sigmas, i, callback, at=high)
        slope, h = (x - denoised) / high, sigmas[i + 1] - high
        if sigmas[i + 1] > 0:
            ahead = x + h * slope
            slope = (slope + (ahead - model(ahead, sigmas[i + 1] * x.new_ones([len(x)]))) / sigmas[i + 1]) / 2
        x = x + h * slope
    return x


class Scheduler(EulerDiscreteScheduler):
    pass


class IgnoresBegin(EulerDiscreteScheduler):
    def _init_step_index(self, timestep):
        self._step_index = 0


class WrongAddNoise(EulerDiscreteScheduler):
    def add_noise(self, original_samples, noise, timesteps):
        return super().add_noise(original_samples, 1.2 * noise, timesteps)


class WritesSample(EulerDiscreteScheduler):
    def step(self, model_output, timestep, sample, **options):
        found = super().step(model_output, timestep, sample, **options)
        sample.mul_(2)
        return found


class ForgetsOption(EulerDiscreteScheduler):
    """Its option is no part of its configuration."""

    def __init__(self, *args, shift=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.shift_of_levels = shift

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.sigmas[1] *= 1 - self.shift_of_levels
