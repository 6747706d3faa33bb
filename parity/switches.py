"""Known switches of the two sides, tried one by one and together: which of them removes the difference."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gallery.refused import Refused
from parity.pair import Pair
from parity.result import Cause, Switch, Trajectory, relative

KNOWN = {
    "final_sigmas_type": ("zero", "sigma_min"),
    "euler_at_final": (True, False),
    "lower_order_final": (True, False),
    "solver_type": ("midpoint", "heun"),
    "clip_sample": (False,),
    "thresholding": (False,),
}


def try_switches(pair: Pair, cause: Cause, b: Trajectory, tick: Callable[[], Any] = lambda: None) -> list[Switch]:
    """The known switches, those first that fit the cause; the others only if none of them removes it.

    Args:
        b: their run as it is.
        tick: called after each try.
    """
    likely, others = _switches(pair, cause, b)
    tried: list[Switch] = []

    def attempt(switches: list[tuple]) -> Switch:
        switch = _try(pair, switches, b)
        tick()
        return switch

    for batch in (likely, others):
        tried += [attempt([switch]) for switch in batch]
        if any(switch.removes for switch in tried):
            return tried
    # none alone: the one that takes them furthest, with each of the others, as long as that leads on
    sets = [[switch] for switch in likely + others]
    best, kept = max(zip(tried, sets), key=lambda each: each[0].reach, default=(None, []))
    while best is not None and best.parts is not None and best.parts > cause.step and len(kept) < 3:
        more = [[*kept, switch] for switch in likely + others if switch[:2] not in [old[:2] for old in kept]]
        further = [(attempt(switches), switches) for switches in more]
        next_best, next_kept = max(further, key=lambda each: each[0].reach, default=(best, kept))
        if next_best.reach[0] <= best.reach[0]:
            break
        tried.append(next_best)
        best, kept = next_best, next_kept
    return tried


def _switches(pair: Pair, cause: Cause, b: Trajectory) -> tuple[list[tuple], list[tuple]]:
    """(side, name, value) of each switch that the two sides have."""
    timesteps, steps = [], []
    if not pair.session.flux:
        timesteps += [("ours", "quantize_timesteps", True), ("ours", "quantised sigmas", True)]
    timesteps.append(("ours", "timesteps of the other side", True))
    if pair.theirs.is_scheduler:
        config = b.scheduler.config
        for name, values in KNOWN.items():
            if name in config:
                steps += [("theirs", name, value) for value in values if value != config[name]]
    parameters = inspect.signature(pair.ours.target).parameters
    if "solver_type" in parameters:
        now = pair.ours.options.get("solver_type", parameters["solver_type"].default)
        steps += [("ours", "solver_type", value) for value in ("midpoint", "heun") if value != now]
    if cause.kind in ("timestep", "noise levels", "prediction"):
        return timesteps, steps
    return steps, timesteps


def _try(pair: Pair, switches: list[tuple], b: Trajectory) -> Switch:
    ours, changes, settings = pair.ours, dict[str, Any](), dict[str, Any]()
    for side, name, value in switches:
        if side == "theirs":
            changes[name] = value
        elif name == "quantize_timesteps":
            settings["quantize"] = True
        elif name == "timesteps of the other side":
            settings["timesteps"] = True
        elif name == "quantised sigmas":
            settings["levels"] = True
        else:
            ours = replace(ours, options={**ours.options, name: value})
    words = " and ".join(name if value is True else f"{name}={value!r}" for _, name, value in switches)
    sides = " and ".join(dict.fromkeys(side for side, *_ in switches))
    try:
        theirs = pair.follow_theirs(changes) if changes else b
        if "timesteps" in settings:
            settings["timesteps"] = [evaluation.timestep for evaluation in theirs.evaluations]
        if "levels" in settings:
            settings["levels"] = _quantised(pair.setup(theirs).levels, pair.session.trained())
            settings["quantize"] = True
        setup = pair.setup(theirs, **settings)
        a = pair.session.follow_sampler(ours, setup)
        difference, parts = distance(a, theirs, pair.tolerance)
        if parts is not None and difference < 30 * pair.tolerance:  # rounding, perhaps
            if Pair(pair.session, ours, pair.theirs, pair.tolerance).compare(a, theirs, setup).cause is None:
                parts = None
    except Refused:
        difference, parts = math.inf, 0
    return Switch(words, sides, difference, parts)


def _quantised(levels: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    levels = levels.clone()
    for i, level in enumerate(levels.tolist()):
        if level > 0:
            levels[i] = trained[(trained.log() - math.log(level)).abs().argmin()]
    return levels


def distance(a: Trajectory, b: Trajectory, tolerance: float) -> tuple[float, int | None]:
    """The largest difference of two trajectories, and the step of the first one past the tolerance."""
    if len(a.levels) != len(b.levels):
        return math.inf, 0
    values = [(relative(a.state(0), b.state(0)), 0)]
    for i in range(len(b.starts)):
        pairs = zip(a.step_evaluations(i), b.step_evaluations(i))
        values += [(relative(one.denoised, other.denoised), i + 1) for one, other in pairs]
        values.append((relative(a.state(i + 1), b.state(i + 1)), i + 1))
    past = [step for value, step in values if not value <= tolerance]
    return max(math.inf if math.isnan(value) else value for value, _ in values), past[0] if past else None
