"""Why two trajectories diverge: each function finds the kind of the cause, and what differs in words."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import minimize_scalar

from parity.pair import Pair
from parity.result import Evaluation, Ours, Trajectory, relative

ROUNDING = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}
Named = tuple[str, str]  # kind and words


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


def update(pair: Pair, i: int, a: Trajectory, b: Trajectory, setup: Ours, inner: int = 0) -> Named:
    """Why a step leads elsewhere from the same latents and predictions, to its end or to an inner evaluation."""
    level, last, name = b.levels[i], i == len(b.starts) - 1, pair.session.level_name
    kind, at = "last step" if last else "update", (i, inner) if inner else (i + 1, 0)
    ours, target = a.state(*at), b.state(*at)
    gap = relative(ours, target)
    if last and b.levels[-1] == level:
        return kind, f"its list repeats the last {name}, so that theirs stays at {level:.4g} where ours goes to 0"
    if not inner and abs(a.levels[i + 1] - b.levels[i + 1]) > 1e-5 * level:
        return "noise levels", f"ours goes to {name} {a.levels[i + 1]:.6g}, theirs to {b.levels[i + 1]:.6g}"
    if (dtype := b.rounded.get(b.starts[i] + (inner or len(b.span(i))) - 1)) and gap < 2 * ROUNDING[dtype]:
        return "rounding", f"theirs rounds its latents to {dtype}"
    if (wrong := _step_noise(pair, i, at, a, b, setup)) is not None:
        return "step noise", wrong
    if inner:
        one, other = (side.step_evaluations(i)[inner].level for side in (a, b))
        if _apart(one, other):
            what = f"evaluation {inner + 1} of the step is at {name} {one:.6g} in ours, {other:.6g} in theirs"
            return kind, f"the update itself: {what}"

    def fits(state: Any) -> bool:
        return state is not None and relative(state, target) < min(3 * max(pair.tolerance, 1e-7), gap / 10)

    for state, words, listed, bounds in _other_levels(pair, i, b, setup, inner):
        value = _nearest(state, target, max(bounds[0], listed / 10), bounds[1])
        if value is not None and _apart(value, listed) and fits(state(value)):
            return "noise levels", f"the step {words} {name} {value:.6g}, where its levels say {listed:.6g}"
    if not inner:
        start = b.step_evaluations(i)[0]
        if fits(start.denoised + b.levels[i + 1] / level * (start.x - start.denoised)):
            what = f"theirs takes Euler's step to {name} {b.levels[i + 1]:.6g}, order 1, ours corrects it by other"
            return kind, f"the update itself: {what} predictions"
        for back in range(min(i, 2)):
            if fits(_restarted(pair, i, back, b, setup)):
                what = f"theirs uses {back or 'none'} of the earlier predictions, a step of order {back + 1}"
                return kind, f"the update itself: {what}"
    what = f"the same latents, predictions and noise levels: {name} {level:.6g} to {b.levels[i + 1]:.6g}"
    return kind, f"the update itself, from {what}"


def _other_levels(pair: Pair, i: int, b: Trajectory, setup: Ours, inner: int) -> list[tuple]:
    """Our step i with another level at its end or begin: (state by that level, words, the level, its bounds)."""

    def ends_at(value: float) -> torch.Tensor:
        levels = setup.levels.clone()
        levels[i + 1] = value
        replayed = pair.replay(b, setup, levels=levels)
        if inner:
            return replayed.state(i, inner)
        scale = math.hypot(1, setup.levels[i + 1].item()) / math.hypot(1, value) if b.keeps_alpha_x else 1.0
        return replayed.state(i + 1) * scale

    def begins_at(value: float) -> torch.Tensor | None:
        levels = torch.cat([setup.levels[:i], setup.levels.new_tensor([value]), setup.levels[i + 1 : i + 2]])
        return _restarted(pair, i, 0, b, replace(setup, levels=levels))

    above, here, following, below = [4 * setup.levels[0].item(), *setup.levels.tolist(), 0.0][i : i + 4]
    ways = [(ends_at, "ends at", following, (below, here))] if following > 0 else []
    begins = [(begins_at, "begins at", here, (following, above))]
    return ways + ([] if inner or b.keeps_alpha_x else begins)


def _restarted(pair: Pair, i: int, back: int, b: Trajectory, setup: Ours) -> torch.Tensor | None:
    """The end of our step i with `back` earlier predictions in its memory. None where the sampler can't."""
    first = i - back
    begin = b.starts[first]
    noise = {key - begin: value for key, value in (setup.noise or {}).items() if key >= begin}
    shorter = replace(setup, levels=setup.levels[first : i + 2], noise=noise)

    def run(start: torch.Tensor) -> Trajectory:
        return pair.replay(b, shorter, begin, start=start)

    with contextlib.suppress(RuntimeError, ValueError, IndexError):
        start = b.state(first)
        if back == 0:
            return run(start).final
        # with the predictions given, the latents before the last step are linear in the first ones
        one, other = run(start).state(back), run(start + 1).state(back)
        return run(start + (b.state(i) - one) / (other - one).mean()).final
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


def _nearest(state: Callable[[float], Any], target: torch.Tensor, low: float, high: float) -> float | None:
    """The level between these with which `state(level)` comes nearest to the target; None where there is none."""

    def away(log: float) -> float:
        if (found := state(math.exp(log))) is None:
            raise ValueError("the sampler can't begin here")
        return relative(found, target)

    bounds = (math.log(low) + 1e-9, math.log(high) - 1e-9)
    with contextlib.suppress(RuntimeError, ValueError, IndexError):
        return math.exp(minimize_scalar(away, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
    return None
