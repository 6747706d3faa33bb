"""Two sides on one network: run side by side, compared step by step."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from gallery.refused import Refused
from parity.causes import Causes, apart
from parity.follow import Session
from parity.result import Cause, Ours, Result, Row, Trajectory, relative
from parity.sides import Side


class Arisen(NamedTuple):
    """A difference that arises within one step: of which kind, how large, and what names its cause."""

    kind: str
    size: float
    named: Callable[[], Cause]


class Pair:
    """Two sides in one session."""

    def __init__(self, session: Session, ours: Side, theirs: Side, tolerance: float):
        self.session, self.ours, self.theirs, self.tolerance = session, ours, theirs, tolerance
        self.causes = Causes(session, ours, theirs, tolerance)

    def run(self) -> tuple[Trajectory, Trajectory, Ours]:
        """Both trajectories, and how ours ran."""
        theirs = self.follow_theirs()
        setup = self.setup(theirs)
        return self.session.follow_sampler(self.ours, setup), theirs, setup

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

    def compare(self, a: Trajectory, b: Trajectory, setup: Ours) -> Result:
        """The table, the cause of the first difference above the tolerance, and what differs beside it."""
        result = Result(self.ours.text, self.theirs.text, len(b.starts), self.tolerance, self.session.level_name)
        result.notes = list(dict.fromkeys([*b.notes, *a.notes]))
        result.initial, result.final = relative(a.state(0), b.state(0)), relative(a.final, b.final)
        if len(a.levels) != len(b.levels):
            what = f"ours takes {len(a.starts)} steps, theirs {len(b.starts)}"
            result.cause = Cause("noise levels", 0, b.levels[0], what)
            return result
        seen = math.inf  # the difference by which the cause was seen
        if not result.initial <= self.tolerance:
            result.cause = self.causes.initial(a, b)
        for i in range(len(b.starts)):
            ours, theirs = a.step_evaluations(i), b.step_evaluations(i)
            differences = [relative(one.denoised, other.denoised) for one, other in zip(ours, theirs)]
            differences = differences if len(ours) == len(theirs) else differences[:1]
            denoised = math.nan if any(map(math.isnan, differences)) else max(differences)
            timesteps = ([e.timestep for e in ours], [e.timestep for e in theirs])
            row = Row(i + 1, b.levels[i], timesteps, relative(a.state(i + 1), b.state(i + 1)), denoised)
            result.rows.append(row)
            if result.cause is None:
                result.cause, seen = self._cause(i, a, b, setup, differences, row)
        if result.cause is None or result.cause.kind == "not finite" or result.largest == math.inf:
            return result
        arisen = self._alone(b, setup)
        if arisen is not None and result.cause.step and min(seen, result.largest / 3) < 30 * self.tolerance:
            # so small that the network may have made it of rounding: each step by itself decides
            result.local = max((one.size for one in arisen), default=0.0)
            past = [one for one in arisen if one.size > self.tolerance]
            result.cause = past[0].named() if past else None
        if result.cause is not None:
            result.others = self._others(result.cause, arisen or [])
        return result

    def _cause(
        self, i: int, a: Trajectory, b: Trajectory, setup: Ours, differences: list[float], row: Row
    ) -> tuple[Cause | None, float]:
        """The cause of the first difference in step i above the tolerance, and that difference."""
        ours, theirs = a.step_evaluations(i), b.step_evaluations(i)
        if math.isnan(row.denoised) or math.isnan(row.latents):
            return self.causes.not_finite(i, a, b), math.inf
        for j, (one, other, difference) in enumerate(zip(ours, theirs, differences)):
            moved = relative(one.x, other.x) if j else 0.0
            if moved > self.tolerance or (j and apart(one.level, other.level)):
                return self.causes.update(i, a, b, setup, inner=j), moved
            if difference > self.tolerance:
                return self.causes.prediction(i, one, other, b), difference
        if row.latents > self.tolerance:
            return self.causes.update(i, a, b, setup), row.latents
        return None, math.inf

    def _others(self, cause: Cause, arisen: list[Arisen]) -> list[Cause]:
        """What differs in predictions, updates and the last step beside `cause`: where each first comes to its size."""
        others = list[Cause]()
        for kind in dict.fromkeys(one.kind for one in arisen):
            past = [one for one in arisen if one.kind == kind and one.size > self.tolerance]
            if not past:
                continue
            first = next(one for one in past if one.size > max(one.size for one in past) / 10)
            found, kinds = replace(first.named(), size=first.size), {one.kind for one in [cause, *others]}
            # a last step that differs as the other updates do is no news
            if found.kind not in kinds and not ("update" in kinds and found.what.startswith("the update itself")):
                others.append(found)
        return sorted(others, key=lambda one: one.step)

    def _alone(self, b: Trajectory, setup: Ours) -> list[Arisen] | None:
        """The differences that arise within each step by itself, in order.

        Our network and sampler get their latents and their predictions, step by step. A timestep that is theirs to
        float32's rounding, 1e-4, is taken for the same. None where ours takes other steps.
        """
        exact = [self.session.timestep_of(evaluation.level) for evaluation in b.evaluations]
        given = [evaluation.timestep for evaluation in b.evaluations]
        timesteps = [t if abs(t - ours) < 1e-4 else None for t, ours in zip(given, exact)]

        def probe(model, x, sigmas, extra_args=None, callback=None, disable=None):
            for evaluation in b.evaluations:
                model(evaluation.x, x.new_full([x.shape[0]], evaluation.level))
            return x

        denoised = [evaluation.denoised for evaluation in b.evaluations]
        replayed, moved = (
            self.session.follow_sampler(self.ours, replace(setup, start=setup.start + more), denoised=denoised)
            for more in (0, 1)
        )
        if len(replayed.evaluations) != len(b.evaluations) or replayed.starts != b.starts:
            return None
        probed = replace(setup, flow=True, timesteps=setup.timesteps or timesteps)
        seen = self.session.follow_sampler(Side("probe", probe, {}), probed).evaluations
        xs, ours, theirs = ([*(e.x for e in side.evaluations), side.final] for side in (moved, replayed, b))
        found = list[Arisen]()
        for i, start in enumerate(b.starts):
            end = start + len(b.step_evaluations(i))
            for j in range(start, end):
                one, other = seen[j], b.evaluations[j]
                named = functools.partial(self.causes.prediction, i, one, other, b)
                found.append(Arisen("prediction", relative(one.denoised, other.denoised), named))
                # with the predictions given, latents are linear in the ones that the step began with
                slope = (xs[j + 1] - ours[j + 1]).mean() / (xs[start] - ours[start]).mean()
                arisen = relative(ours[j + 1] - slope * (ours[start] - theirs[start]), theirs[j + 1])
                inner = j + 1 - start if j + 1 < end else 0
                named = functools.partial(self.causes.update, i, replayed, b, setup, inner)
                found.append(Arisen("last step" if i == len(b.starts) - 1 else "update", arisen, named))
        return found


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
