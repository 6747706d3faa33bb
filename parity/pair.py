"""Two sides on one network: how each of them runs beside the other."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from gallery.refused import Refused
from parity.follow import Session
from parity.result import Ours, Trajectory
from parity.sides import Side


@dataclass(frozen=True)
class Pair:
    """Two sides in one session."""

    session: Session
    ours: Side
    theirs: Side
    tolerance: float  # of relative differences

    def follow_theirs(self, **changes: Any) -> Trajectory:
        """Their run, with other options of their scheduler."""
        if not self.theirs.is_scheduler:
            return self.session.follow_sampler(self.theirs, self._common())
        if "noise_sampler_seed" in {*inspect.signature(self.theirs.target).parameters} - {*self.theirs.options}:
            changes["noise_sampler_seed"] = self.session.options.seed  # of its own Brownian tree, which has to be known
        return self.session.follow_scheduler(self.theirs, **changes)

    def _common(self) -> Ours:
        """For two samplers of k-diffusion's kind: the pipeline's own levels and one Brownian path."""
        session = self.session
        levels = session.named_levels(session.options.schedule, session.options.steps).to(session.dtype)
        x = session.noise.to(session.dtype) * levels[0].item()
        sigmas = session.sampler_sigmas(levels.clone(), session.uses_ve(self.ours, Ours(levels, x)))
        low, high = sigmas[sigmas > 0].min().item(), sigmas.max().item()
        tree = session.module.sampling.BrownianTreeNoiseSampler
        return Ours(levels, x, noise_sampler=tree(x, low * 0.999, high * 1.001, seed=session.options.seed))

    def setup(self, theirs: Trajectory, **settings: Any) -> Ours:
        """How our side runs beside theirs: over its levels, from its initial latents, with its step noise."""
        session = self.session
        if not self.theirs.is_scheduler:
            return replace(self._common(), **settings)
        levels = torch.tensor(theirs.levels, dtype=torch.float64)
        if session.options.schedule is not None:
            levels = session.named_levels(session.options.schedule, len(levels) - 1)
        if len(levels) > 2 and levels[-1] == levels[-2]:
            levels[-1] = 0.0  # theirs ends where its last step begins
        if not (levels.diff() < 0).all():
            raise Refused(f"{self.theirs.text}: its noise levels don't fall, so that no sampler can follow them")
        noise, first = session.noise.to(session.dtype), levels[0].item()
        # the two conventions of diffusers for the first latents: FLUX's noise is taken for t, or mixed with zeros
        scales = (1.0, first) if session.flux else (first, math.hypot(first, 1))
        size = (theirs.state(0).norm() / noise.norm()).item()
        start = noise * min(scales, key=lambda scale: abs(scale - size) / scale)
        tree = _their_tree(theirs) if hasattr(theirs.scheduler, "noise_sampler_seed") else None
        return replace(Ours(levels, start, noise=theirs.noise, noise_sampler=tree), **settings)

    def replay(self, b: Trajectory, setup: Ours, begin: int = 0, **changes: Any) -> Trajectory:
        """Our sampler with their predictions from evaluation `begin` on. No network runs."""
        denoised = [evaluation.denoised for evaluation in b.evaluations[begin:]]
        return self.session.follow_sampler(self.ours, replace(setup, **changes), denoised=denoised)


def _their_tree(theirs: Trajectory) -> Any:
    """The Brownian tree that DPMSolverSDEScheduler makes at its first step, made again and asked as it asks.

    A Brownian path is as rough as the square root: asked at a sigma that differs by the rounding of float32, 1e-7, it
    gives noise that differs by 1e-4. So our sigmas are moved to the scheduler's own, float32 and through exp(log()).
    """
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    sigmas, seed = theirs.scheduler.sigmas, theirs.scheduler.noise_sampler_seed
    tree = BrownianTreeNoiseSampler(theirs.state(0), sigmas[sigmas > 0].min().item(), sigmas.max().item(), seed)
    t = sigmas[sigmas > 0].unique().flip(0).log().neg()
    asked = torch.cat([t, t[:-1] + (t[1:] - t[:-1]) * 0.5]).neg().exp()

    def nearest(sigma: torch.Tensor) -> torch.Tensor:
        found = asked[(asked.cpu().double() - float(sigma)).abs().argmin()]
        return found if abs(found.item() / float(sigma) - 1) < 1e-5 else torch.as_tensor(float(sigma))

    return lambda sigma, sigma_next: tree(nearest(sigma), nearest(sigma_next))
