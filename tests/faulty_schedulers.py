"""Schedulers of diffusers with one fault each, in step AT or in all steps, for `compare.py` to find."""

from __future__ import annotations

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

AT = 3  # counted from 1


def here(scheduler, timestep) -> bool:
    """Whether the scheduler is at the first evaluation of step AT."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return scheduler.step_index == (AT - 1) * scheduler.order


class _WrongSigma:
    """Goes to 1.1 times the sigma that its list says, in one step."""

    def step(self, model_output, timestep, sample, **kwargs):
        if not here(self, timestep):
            return super().step(model_output, timestep, sample, **kwargs)
        right = self.sigmas.clone()
        self.sigmas[self.step_index + 1] *= 1.1
        result = super().step(model_output, timestep, sample, **kwargs)
        self.sigmas = right
        return result


class WrongSigmaEuler(_WrongSigma, EulerDiscreteScheduler):
    pass


class WrongSigmaMultistep(_WrongSigma, DPMSolverMultistepScheduler):
    pass


class WrongSigmaInList(EulerDiscreteScheduler):
    """Lists a sigma that does not belong to the timestep beside it."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.sigmas[AT - 1] *= 1.1


class RoundedTimesteps(EulerDiscreteScheduler):
    """Rounds the timesteps that the network is given."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps.round()


class RoundedLatents(EulerDiscreteScheduler):
    """Keeps its latents in float16 after one step."""

    def step(self, model_output, timestep, sample, **kwargs):
        rounds = here(self, timestep)
        (x, *rest) = super().step(model_output, timestep, sample, **kwargs)
        return (x.half().to(x.dtype) if rounds else x, *rest)


class RoundedTimestepsAndLatents(RoundedTimesteps, RoundedLatents):
    """Has both faults."""


class HeunWithoutLastCorrection(HeunDiscreteScheduler):
    """Leaves out the correction of the last step that has one."""

    def step(self, model_output, timestep, sample, **kwargs):
        if self.state_in_first_order:
            self.predicted = None
        dropped = not self.state_in_first_order and self.step_index == len(self.timesteps) - 2
        (x, *rest) = super().step(model_output, timestep, sample, **kwargs)
        if dropped:
            x = self.predicted
        elif self.predicted is None:
            self.predicted = x
        return (x, *rest)


class MultistepWithoutHistory(DPMSolverMultistepScheduler):
    """Forgets the earlier predictions in one step."""

    def step(self, model_output, timestep, sample, **kwargs):
        if here(self, timestep):
            self.lower_order_nums = 0
        return super().step(model_output, timestep, sample, **kwargs)


class WrongInitialScale(EulerDiscreteScheduler):
    """Begins with noise that is a tenth too strong."""

    @property
    def init_noise_sigma(self):
        return super().init_noise_sigma * 1.1


class _Noise(EulerAncestralDiscreteScheduler):
    """`changed(noise)` in the place of the noise of one step."""

    def step(self, model_output, timestep, sample, generator=None, **kwargs):
        if not here(self, timestep):
            return super().step(model_output, timestep, sample, generator=generator, **kwargs)
        before = generator.get_state()
        (x, *rest) = super().step(model_output, timestep, sample, generator=generator, **kwargs)
        after = generator.get_state()
        generator.set_state(before)
        noise = torch.randn(sample.shape, generator=generator, dtype=sample.dtype)
        generator.set_state(after)
        sigma, following = self.sigmas[AT - 1].double(), self.sigmas[AT].double()
        up = (following**2 * (sigma**2 - following**2) / sigma**2).sqrt()
        return (x + up * (self.changed(noise) - noise), *rest)


class WeakNoise(_Noise):
    """Adds 0.9 times its noise in one step."""

    def changed(self, noise):
        return 0.9 * noise


class OtherNoise(_Noise):
    """Draws the noise of one step from a generator of its own."""

    def changed(self, noise):
        return torch.randn(noise.shape, generator=torch.Generator().manual_seed(99), dtype=noise.dtype)
