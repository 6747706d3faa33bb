"""One comparison: where the sides diverge, which known switch removes it, and who is nearer to the truth."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from gallery.refused import Refused
from parity.follow import Session
from parity.pair import Pair
from parity.result import Cause, Result, Switch, Trajectory, relative
from parity.sides import Side
from parity.truth import solve

KNOWN = {
    "final_sigmas_type": ("zero", "sigma_min"),
    "euler_at_final": (True, False),
    "lower_order_final": (True, False),
    "solver_type": ("midpoint", "heun"),
    "clip_sample": (False,),
    "thresholding": (False,),
}
ROUNDED, QUANTISED, THEIRS = "quantize_timesteps", "quantised sigmas", "timesteps of the other side"
Option = tuple[str, str, Any]  # of which side, its name and value


@torch.no_grad()
def compare_sides(
    session: Session, ours: Side, theirs: Side, tolerance: float = 0.0, truths: Any = None, show: Callable | None = None
) -> tuple[Result, Trajectory, Trajectory]:
    """The result and both trajectories.

    Args:
        tolerance: of relative differences; 0: the options', or rounding in the network's dtype.
        truths: solutions that were found before, by what they depend on; None: don't look for the truth.
        show: called with the result and the words for what was just found: the cause, the switches, the truth.
    """
    # of float64, the rounding of diffusers' float32 sigmas
    rounding = {torch.float64: 1e-6, torch.float32: 1e-4}.get(session.network.dtype, 2e-2)
    pair = Pair(session, ours, theirs, tolerance or session.options.tolerance or rounding)
    show = show or (lambda result, words: None)
    a, b, setup = pair.run()
    result = pair.compare(a, b, setup)
    show(result, result.parting())
    if result.cause is not None and session.options.switches:
        with tqdm(desc="trying switches", unit=" tried", leave=False, disable=None) as bar:
            result.switches = try_switches(pair, result.cause, b, bar.update)
        show(result, result.removal())
    if result.cause is not None and truths is not None:
        result.truth = solve(session, (ours, theirs), setup, a, b, truths)
        show(result, result.truth.words())
    return result, a, b


def try_switches(pair: Pair, cause: Cause, b: Trajectory, tick: Callable[[], Any] = lambda: None) -> list[Switch]:
    """The known switches, the ones that fit the cause first; the others only if none of them removes the difference.

    Args:
        b: their run as it is.
        tick: called after each try.
    """
    tried = list[tuple[Switch, list[Option]]]()

    def attempt(options: list[Option]) -> tuple[Switch, list[Option]]:
        switch = _try(pair, options, b)
        tick()
        return switch, options

    batches = _options(pair, cause, b)
    for batch in batches:
        tried += [attempt([option]) for option in batch]
        if any(switch.removes for switch, _ in tried):
            return [switch for switch, _ in tried]
    # none alone: the best one with each of the others, as long as the sides agree for longer
    best = max(tried, key=lambda each: each[0].reach, default=None)
    while best is not None and not best[0].removes and best[0].reach[0] > cause.step and len(best[1]) < 3:
        names = [option[:2] for option in best[1]]
        more = [attempt([*best[1], option]) for batch in batches for option in batch if option[:2] not in names]
        further = max(more, key=lambda each: each[0].reach, default=best)
        if further[0].reach[0] <= best[0].reach[0]:
            break
        tried.append(further)
        best = further
    return [switch for switch, _ in tried]


def _options(pair: Pair, cause: Cause, b: Trajectory) -> tuple[list[Option], list[Option]]:
    """The switches that the two sides have, the likely ones first."""
    names = [THEIRS] if pair.session.flux else [ROUNDED, QUANTISED, THEIRS]
    timesteps, steps = [("ours", name, True) for name in names], list[Option]()
    if pair.theirs.is_scheduler:
        now = {name: b.scheduler.config[name] for name in KNOWN if name in b.scheduler.config}
        steps += [("theirs", name, value) for name in now for value in KNOWN[name] if value != now[name]]
    parameters = inspect.signature(pair.ours.target).parameters
    if "solver_type" in parameters:
        type_now = pair.ours.options.get("solver_type", parameters["solver_type"].default)
        steps += [("ours", "solver_type", value) for value in KNOWN["solver_type"] if value != type_now]
    return (timesteps, steps) if cause.kind in ("timestep", "noise levels", "prediction") else (steps, timesteps)


def _try(pair: Pair, options: list[Option], b: Trajectory) -> Switch:
    chosen = {side: {name: value for where, name, value in options if where == side} for side in ("ours", "theirs")}
    ways = [name for name in (ROUNDED, QUANTISED, THEIRS) if chosen["ours"].pop(name, False)]
    ours = replace(pair.ours, options={**pair.ours.options, **chosen["ours"]})
    try:
        theirs = pair.follow_theirs(**chosen["theirs"]) if chosen["theirs"] else b
        settings: dict[str, Any] = {"quantize": True} if ROUNDED in ways or QUANTISED in ways else {}
        if THEIRS in ways:
            settings["timesteps"] = [evaluation.timestep for evaluation in theirs.evaluations]
        if QUANTISED in ways:
            settings["levels"] = _quantised(pair.setup(theirs).levels, pair.session.trained())
        setup = pair.setup(theirs, **settings)
        a = pair.session.follow_sampler(ours, setup)
        difference, parts = distance(a, theirs, pair.tolerance)
        if parts is not None and difference < 30 * pair.tolerance:  # rounding, perhaps
            if Pair(pair.session, ours, pair.theirs, pair.tolerance).compare(a, theirs, setup).cause is None:
                parts = None
    except Refused:
        difference, parts = math.inf, 0
    words = " and ".join(name if value is True else f"{name}={value!r}" for _, name, value in options)
    return Switch(words, " and ".join(dict.fromkeys(side for side, *_ in options)), difference, parts)


def _quantised(levels: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """The nearest trained level of each, but for zero."""
    nearest = (trained.log() - levels[levels > 0].log()[:, None]).abs().argmin(1)
    return torch.cat([trained[nearest].to(levels), levels[levels <= 0]])


def distance(a: Trajectory, b: Trajectory, tolerance: float) -> tuple[float, int | None]:
    """The largest difference of two trajectories, and the step of the first one above the tolerance."""
    if len(a.levels) != len(b.levels):
        return math.inf, 0
    values = [(relative(a.state(0), b.state(0)), 0)]
    for i in range(len(b.starts)):
        pairs = zip(a.step_evaluations(i), b.step_evaluations(i))
        values += [(relative(one.denoised, other.denoised), i + 1) for one, other in pairs]
        values.append((relative(a.state(i + 1), b.state(i + 1)), i + 1))
    past = [step for value, step in values if not value <= tolerance]
    return max(math.inf if math.isnan(value) else value for value, _ in values), past[0] if past else None
