"""Two sides on one network: how each runs beside the other, and the causes of differences, as a kind and in words."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import minimize_scalar

from gallery.refused import Refused
from parity.follow import Session
from parity.result import Evaluation, Ours, Trajectory, relative
from parity.sides import Side

Named = tuple[str, str]  # the kind of a cause, and what differs


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


def initial(pair: Pair, a: Trajectory, b: Trajectory) -> Named:
    """Of a difference of the initial latents."""
    x, y, name = a.state(0), b.state(0), pair.session.level_name
    factor = ((x * y).sum() / (x * x).sum()).item()
    first, other = a.evaluations[0].level, b.evaluations[0].level
    if _apart(first, other):
        churned = pair.ours.options.get("s_churn") or pair.theirs.options.get("s_churn")
        what = f"ours begins at {name} {first:.6g}, theirs at {other:.6g}"
        return "noise levels", what + (": s_churn adds noise first" if churned else "")
    if relative(x * factor, y) < 1e-5:
        return "initial scale", f"theirs begins with {factor:.6g} times our initial latents"
    return "initial noise", "the initial latents are not multiples of each other"


def not_finite(i: int, a: Trajectory, b: Trajectory) -> Named:
    """Whose latents or predictions are NaN or infinite in step i; i = -1 for the initial latents."""
    who = list[str]()
    for name, side in (("ours", a), ("theirs", b)):
        tensors = [*(e.denoised for e in (side.step_evaluations(i) if i >= 0 else [])), side.state(i + 1)]
        who += [] if all(tensor.isfinite().all() for tensor in tensors) else [name]
    return "not finite", f"NaN or infinite numbers in {' and '.join(who)}"


def prediction(pair: Pair, ours: Evaluation, theirs: Evaluation, b: Trajectory) -> Named:
    """Why the network predicts something else from the same latents."""
    session, name = pair.session, pair.session.level_name
    if _apart(ours.level, theirs.level):
        what = f"the network is asked at {name} {ours.level:.6g} by ours, at {theirs.level:.6g} by theirs"
        return "noise levels", what
    exact, given = session.timestep_of(theirs.level), theirs.timestep
    if abs(given - ours.timestep) < 1e-6:
        what = "the network predicts something else from the same latents and timestep"
        return "prediction", f"{what}: another conditioning or another type of prediction"
    off = [evaluation.timestep - session.timestep_of(evaluation.level) for evaluation in b.evaluations]
    whole = all(evaluation.timestep == round(evaluation.timestep) for evaluation in b.evaluations)
    ways = {
        ": theirs is cut off to a whole number": whole and -1.001 < min(off) < -0.5 and max(off) < 1e-3,
        ": theirs is rounded": given == round(given) and abs(given - exact) <= 0.501,
        ": theirs is interpolated in another way": abs(given - exact) < 0.5,
        "": session.flux,
    }
    what = f"the network gets timestep {ours.timestep:.6g} from ours and {given:.6g} from theirs"
    for way, applies in ways.items():
        if applies:
            return "timestep", what + way
    belongs = f"{session.level_of(given):.6g}, not to the {theirs.level:.6g} that the scheduler lists"
    return "noise levels", f"{what}, which belongs to {name} {belongs}"


def update(pair: Pair, i: int, at: tuple[int, int], a: Trajectory, b: Trajectory, setup: Ours) -> Named:
    """Why step i leads elsewhere from the same latents and predictions: to its end, or to an inner evaluation, `at`."""
    level, end, name = b.levels[i], b.levels[i + 1], pair.session.level_name
    last, inner, gap = i == len(b.starts) - 1, at[1], relative(a.state(*at), b.state(*at))
    kind = "last step" if last else "update"
    if last and end == level:
        return kind, f"its list repeats the last {name}, so that theirs stays at {level:.4g} where ours goes to 0"
    if not inner and abs(a.levels[i + 1] - end) > 1e-5 * level:
        return "noise levels", f"ours goes to {name} {a.levels[i + 1]:.6g}, theirs to {end:.6g}"
    if (wrong := _step_noise(pair, i, at, a, b, setup)) is not None:
        return "step noise", wrong
    if inner:
        one, other = (side.step_evaluations(i)[inner].level for side in (a, b))
        if _apart(one, other):
            what = f"evaluation {inner + 1} of the step is at {name} {one:.6g} in ours, {other:.6g} in theirs"
            return kind, f"the update itself: {what}"

    def fits(state: torch.Tensor) -> bool:
        return relative(state, b.state(*at)) < min(3 * max(pair.tolerance, 1e-7), gap / 10)

    if (value := _other_end(pair, i, at, b, setup, fits)) is not None:
        return "noise levels", f"the step ends at {name} {value:.6g}, where its levels say {setup.levels[i + 1]:.6g}"
    start = b.step_evaluations(i)[0]
    if not inner and fits(start.denoised + end / level * (start.x - start.denoised)):
        what = f"theirs takes Euler's step to {name} {end:.6g}, order 1, ours corrects it by other predictions"
        return kind, f"the update itself: {what}"
    what = f"the same latents, predictions and noise levels: {name} {level:.6g} to {end:.6g}"
    return kind, f"the update itself, from {what}"


def _other_end(pair: Pair, i: int, at: tuple[int, int], b: Trajectory, setup: Ours, fits: Callable) -> float | None:
    """The level to which our step i has to go for their latents, where that is another one than the levels say."""
    above, listed, below = [*setup.levels.tolist(), 0.0][i : i + 3]
    if listed == 0:
        return None

    def state(value: float) -> torch.Tensor:
        levels = setup.levels.clone()
        levels[i + 1] = value
        scale = math.hypot(1, listed) / math.hypot(1, value) if b.keeps_alpha_x and at == (i + 1, 0) else 1.0
        return pair.replay(b, setup, levels=levels).state(*at) * scale

    def away(log: float) -> float:
        return relative(state(math.exp(log)), b.state(*at))

    bounds = (math.log(max(below, listed / 10)) + 1e-9, math.log(above) - 1e-9)
    with contextlib.suppress(RuntimeError, ValueError, IndexError):
        value = math.exp(minimize_scalar(away, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
        return value if _apart(value, listed) and fits(state(value)) else None
    return None


def _step_noise(pair: Pair, i: int, at: tuple[int, int], a: Trajectory, b: Trajectory, setup: Ours) -> str | None:
    """What is wrong with the step noise, if the difference of the states looks like noise."""
    draws = [draw.cpu().double().flatten() for j in a.span(i) for draw in a.noise.get(j, [])]
    theirs_draws = any(j in b.noise for j in b.span(i))
    if not draws:
        return "theirs adds step noise, ours none" if theirs_draws and not a.noise else None
    rest = (b.state(*at) - a.state(*at)).cpu().double().flatten()
    for draw in draws:
        factor = (rest @ draw) / (draw @ draw)
        if (rest - factor * draw).norm() < 1e-3 * rest.norm():
            silent = {j: [torch.zeros_like(d) for d in many] for j, many in a.noise.items() if j >= a.starts[i]}
            quiet = pair.replay(b, setup, noise={**a.noise, **silent}, noise_sampler=None).state(*at)
            amount = (a.state(*at) - quiet).cpu().double().flatten() @ draw / (draw @ draw)
            return f"theirs adds the step noise {1 + (factor / amount).item():.6g} times" if amount else None
    if not b.noise and not pair.theirs.is_scheduler:
        return "theirs adds no step noise"
    if setup.noise_sampler is not None:
        return None
    if not theirs_draws:
        return "theirs draws no step noise from the generator" + (" in this step" if b.noise else "")
    # noise that is not ours: as strong, and not along it
    kurtosis, draw = (rest**4).mean() / (rest**2).mean() ** 2, draws[-1]
    along = (rest @ draw) / (rest.norm() * draw.norm())
    normal = rest.numel() > 100 and abs(kurtosis - 3) < 0.5 and -0.9 < along < -0.5
    return "theirs adds other step noise than the generator gave" if normal else None


def _apart(one: float, other: float) -> bool:
    """Whether two levels differ by more than float32's rounding."""
    return abs(one / other - 1) > 1e-5
