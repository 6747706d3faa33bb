"""Two sides on one network: run side by side, compared step by step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from gallery.refused import Refused
from parity.causes import Causes
from parity.follow import Session
from parity.result import Cause, Ours, Result, Row, Trajectory, relative
from parity.sides import Side


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

    def follow_theirs(self, changes: dict[str, Any] | None = None) -> Trajectory:
        """Their run, with other options of their scheduler."""
        if self.theirs.is_scheduler:
            return self.session.follow_scheduler(self.theirs, **changes or {})
        return self.session.follow_sampler(self.theirs, self._common())

    def _common(self) -> Ours:
        """For two samplers of k-diffusion's kind: the pipeline's own levels and one Brownian path."""
        session = self.session
        levels = session.named_levels(session.options.schedule, session.options.steps).to(session.dtype)
        x = session.noise.to(session.dtype) * levels[0].item()
        ve = session.uses_ve(self.ours, Ours(levels, x))
        sigmas = session.sampler_sigmas(levels.clone(), ve)
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
        scales = (1.0, first) if session.flux else (first, math.sqrt(first**2 + 1))
        distances = [abs(scale - (theirs.state(0).norm() / noise.norm()).item()) / scale for scale in scales]
        start = noise * scales[distances.index(min(distances))]
        setup = Ours(levels, start, noise=theirs.noise)
        if hasattr(theirs.scheduler, "noise_sampler_seed"):
            setup = replace(setup, noise_sampler=_their_tree(theirs))
        return replace(setup, **settings)

    def compare(self, a: Trajectory, b: Trajectory, setup: Ours) -> Result:
        """The table, the cause of the first difference past the tolerance, and what differs beside it."""
        session, tolerance = self.session, self.tolerance
        result = Result(self.ours.text, self.theirs.text, len(b.starts), tolerance, session.level_name)
        result.notes = list(dict.fromkeys([*b.notes, *a.notes]))
        result.initial = relative(a.state(0), b.state(0))
        result.final = relative(a.final, b.final)
        if len(a.levels) != len(b.levels):
            what = f"ours takes {len(a.starts)} steps, theirs {len(b.starts)}"
            result.cause = Cause("noise levels", 0, b.levels[0], what)
            return result
        first = math.inf  # the difference that the cause was seen by
        if not result.initial <= tolerance:
            result.cause = self.causes.initial(a, b)
        for i in range(len(b.starts)):
            ours, theirs = a.step_evaluations(i), b.step_evaluations(i)
            alike = len(ours) == len(theirs)
            differences = [relative(one.denoised, other.denoised) for one, other in zip(ours, theirs)]
            differences = differences if alike else differences[:1]
            latents = relative(a.state(i + 1), b.state(i + 1))
            timesteps = ([e.timestep for e in ours], [e.timestep for e in theirs])
            lost = any(map(math.isnan, differences))
            result.rows.append(Row(i + 1, b.levels[i], timesteps, latents, math.nan if lost else max(differences)))
            if result.cause is not None:
                continue
            if lost or math.isnan(latents):
                result.cause = self.causes.not_finite(i, a, b)
                continue
            for j, (one, other) in enumerate(zip(ours, theirs)):
                apart = relative(one.x, other.x) if j and alike else 0.0
                if apart > tolerance or (j and alike and abs(one.level / other.level - 1) > 1e-5):
                    result.cause, first = self.causes.update(i, a, b, setup, inner=j), apart
                elif j < len(differences) and differences[j] > tolerance:
                    result.cause, first = self.causes.prediction(i, one, other, b), differences[j]
                if result.cause is not None:
                    break
            if result.cause is None and latents > tolerance:
                result.cause, first = self.causes.update(i, a, b, setup), latents
        if result.cause is None or result.cause.kind == "not finite" or result.largest == math.inf:
            return result
        apart = self._alone(b, setup)
        if apart is not None and result.cause.step and min(first, result.largest / 3) < 30 * tolerance:
            # so small that the network may have made it of rounding: each step by itself decides
            result.local = max((one.size for one in apart), default=0.0)
            past = [one for one in apart if one.size > tolerance]
            result.cause = past[0].named() if past else None
        if result.cause is not None:
            result.others = self._others(result.cause, apart or [])
        return result

    def _others(self, cause: Cause, apart: list[Apart]) -> list[Cause]:
        """What differs in predictions, updates and the last step beside `cause`: where each first comes to its size."""
        others = list[Cause]()
        for kind in dict.fromkeys(one.kind for one in apart):
            those = [one for one in apart if one.kind == kind and one.size > self.tolerance]
            if not those:
                continue
            largest = max(one.size for one in those)
            first = next(one for one in those if one.size > largest / 10)
            found = replace(first.named(), size=first.size)
            kinds = {one.kind for one in [cause, *others]}
            # a last step that differs as the other updates do is no news
            if found.kind not in kinds and not ("update" in kinds and found.what.startswith("the update itself")):
                others.append(found)
        return sorted(others, key=lambda one: one.step)

    def _alone(self, b: Trajectory, setup: Ours) -> list[Apart] | None:
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
        replayed = self.session.replay(self.ours, setup, denoised)
        moved = self.session.replay(self.ours, replace(setup, start=setup.start + 1), denoised)
        if len(replayed.evaluations) != len(b.evaluations) or replayed.starts != b.starts:
            return None
        probed = replace(setup, flow=True, timesteps=setup.timesteps or timesteps)
        seen = self.session.follow_sampler(Side("probe", probe, {}), probed).evaluations

        def latents(side: Trajectory) -> list[torch.Tensor]:
            return [*(evaluation.x for evaluation in side.evaluations), side.final]

        xs, ours, theirs = latents(moved), latents(replayed), latents(b)
        found = list[Apart]()
        for i, start in enumerate(b.starts):
            last = i == len(b.starts) - 1
            end = start + len(b.step_evaluations(i))
            for j in range(start, end):
                one, other = seen[j], b.evaluations[j]
                named = functools.partial(self.causes.prediction, i, one, other, b)
                found.append(Apart("prediction", relative(one.denoised, other.denoised), named))
                # with the predictions given, latents are linear in those that the step began with
                slope = (xs[j + 1] - ours[j + 1]).mean() / (xs[start] - ours[start]).mean()
                arisen = ours[j + 1] - slope * (ours[start] - theirs[start])
                inner = j + 1 - start if j + 1 < end else 0
                named = functools.partial(self.causes.update, i, replayed, b, setup, inner)
                found.append(Apart("last step" if last else "update", relative(arisen, theirs[j + 1]), named))
        return found


@dataclass
class Apart:
    """A difference that arises within one step: of which kind, how large, and what names its cause."""

    kind: str
    size: float
    named: Callable[[], Cause]


def _their_tree(theirs: Trajectory) -> Any:
    """The Brownian tree that DPMSolverSDEScheduler makes at its first step, made once more and asked as it asks.

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
