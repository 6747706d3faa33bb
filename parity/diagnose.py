"""One comparison: where the sides diverge, which known switch removes it, and who is nearer to the truth."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from gallery.refused import Refused
from parity.follow import Session
from parity.pair import Named, Pair, initial, not_finite, prediction, update
from parity.result import Cause, Evaluation, Ours, Result, Row, Switch, Trajectory, relative
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


class Arisen(NamedTuple):
    """A difference that arises at one point of a run."""

    step: int  # from 1; 0 for the initial latents
    kind: str
    size: float
    named: Callable[[], Named]  # finds its cause


@torch.no_grad()
def compare_sides(
    session: Session, ours: Side, theirs: Side, show: Callable[[str], Any] = lambda words: None
) -> tuple[Result, Trajectory, Trajectory]:
    """The result and both trajectories. Shows what was just found: the table and the cause, the switches, the truth."""
    # of float64, the rounding of diffusers' float32 sigmas
    rounding = {torch.float64: 1e-6, torch.float32: 1e-4}.get(session.network.dtype, 2e-2)
    pair = Pair(session, ours, theirs, session.options.tolerance or rounding)
    b = pair.follow_theirs()
    setup = pair.setup(b)
    a = session.follow_sampler(ours, setup)
    result = _compare(pair, a, b, setup)
    show(f"ours    {result.ours}\ntheirs  {result.theirs}\n\n{result.table()}")
    show(f"\n{result.parting()}")
    if result.cause is not None and session.options.switches:
        with tqdm(desc="trying switches", unit=" tried", leave=False, disable=None) as bar:
            result.switches = _try_switches(pair, result.cause, b, bar.update)
        show(f"\n{result.removal()}")
    if result.cause is not None and session.options.truth:
        result.truth = solve(session, (ours, theirs), setup, a, b)
        show(f"\n{result.truth.words()}")
    return result, a, b


def _compare(pair: Pair, a: Trajectory, b: Trajectory, setup: Ours) -> Result:
    """The table, the cause of the first difference above the tolerance, and what differs beside it."""
    result, first, alone = _find(pair, a, b, setup)

    def cause(one: Arisen, size: float = math.nan) -> Cause:
        kind, what = not_finite(one.step - 1, a, b) if math.isnan(one.size) else one.named()
        return Cause(kind, one.step, b.levels[max(one.step - 1, 0)], what, size)

    if first is None:
        return result
    result.cause = cause(first)
    if result.largest == math.inf:
        return result
    past = [one for one in alone or _alone(pair, b, setup) or () if one.size > pair.tolerance]
    for kind in dict.fromkeys(one.kind for one in past):
        most = max(one.size for one in past if one.kind == kind)
        first = next(one for one in past if one.kind == kind and one.size > most / 10)
        found, kinds = cause(first, first.size), {one.kind for one in [result.cause, *result.others]}
        # a last step that differs as the other updates do is no news
        if found.kind not in kinds and not ("update" in kinds and found.what.startswith("the update itself")):
            result.others.append(found)
    return result


def _find(pair: Pair, a: Trajectory, b: Trajectory, setup: Ours) -> tuple[Result, Arisen | None, list[Arisen] | None]:
    """The table, the first difference above the tolerance, and `_alone` where that decided."""
    result = Result(pair.ours.text, pair.theirs.text, len(b.starts), pair.tolerance, pair.session.level_name)
    result.initial, result.final = relative(a.state(0), b.state(0)), relative(a.final, b.final)
    if len(a.levels) != len(b.levels):
        what = f"ours takes {len(a.starts)} steps, theirs {len(b.starts)}"
        return result, Arisen(0, "", math.inf, lambda: ("noise levels", what)), None
    arisen = _arisen(pair, a, b, setup, a.evaluations)
    for i, level in enumerate(b.levels[:-1]):
        sizes = [one for one in arisen if one.step == i + 1]
        denoised = torch.tensor([one.size for one in sizes if one.kind == "prediction"]).max().item()  # NaN if one is
        timesteps = [[e.timestep for e in side.step_evaluations(i)] for side in (a, b)]
        result.rows.append(Row(i + 1, level, (timesteps[0], timesteps[1]), sizes[-1].size, denoised))
    arisen.insert(0, Arisen(0, "", result.initial, partial(initial, pair, a, b)))
    first = next((one for one in arisen if not one.size <= pair.tolerance), None)
    if first is None or first.step == 0 or not min(first.size, result.largest / 3) < 30 * pair.tolerance:
        return result, first, None
    # so small that the network may have made it of rounding: each step by itself decides
    if (alone := _alone(pair, b, setup)) is not None:
        result.local = max(one.size for one in alone)
        first = next((one for one in alone if one.size > pair.tolerance), None)
    return result, first, alone


def _alone(pair: Pair, b: Trajectory, setup: Ours) -> list[Arisen] | None:
    """The differences that arise within each step by itself, in order.

    Our network and sampler get their latents and their predictions, step by step. A timestep that is theirs to
    float32's rounding, 1e-4, is taken for the same. None where ours takes other steps.
    """
    exact = [pair.session.timestep_of(evaluation.level) for evaluation in b.evaluations]
    given = [evaluation.timestep for evaluation in b.evaluations]
    timesteps = [t if abs(t - ours) < 1e-4 else None for t, ours in zip(given, exact)]

    def probe(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for evaluation in b.evaluations:
            model(evaluation.x, x.new_full([x.shape[0]], evaluation.level))
        return x

    a, moved = (pair.replay(b, setup, start=setup.start + more) for more in (0, 1))
    if len(a.evaluations) != len(b.evaluations) or a.starts != b.starts:
        return None
    probed = replace(setup, flow=True, timesteps=setup.timesteps or timesteps)
    seen = pair.session.follow_sampler(Side("probe", probe, {}), probed).evaluations
    return _arisen(pair, a, b, setup, seen, moved)


def _arisen(
    pair: Pair, a: Trajectory, b: Trajectory, setup: Ours, seen: list[Evaluation], moved: Trajectory | None = None
) -> list[Arisen]:
    """For each evaluation the difference of the predictions, and that of the latents to which the sampler goes on.

    Args:
        seen: our predictions.
        moved: our side as in `a`, from other latents, where `a` has their predictions. Latents are then linear in the
            ones that a step began with, so that what arose before the step can be taken away.
    """
    found = list[Arisen]()
    for i in range(len(b.starts)):
        kind = "last step" if i == len(b.starts) - 1 else "update"
        count = len(b.span(i)) if len(a.span(i)) == len(b.span(i)) else 1
        for j in range(count):
            one, other = seen[a.starts[i] + j], b.evaluations[b.starts[i] + j]
            named = partial(prediction, pair, one, other, b)
            found.append(Arisen(i + 1, "prediction", relative(one.denoised, other.denoised), named))
            at = (i, j + 1) if j + 1 < count else (i + 1, 0)
            x = a.state(*at)
            if moved is not None:
                slope = (moved.state(*at) - x).mean() / (moved.state(i) - a.state(i)).mean()
                x = x - slope * (a.state(i) - b.state(i))
            named = partial(update, pair, i, at, a, b, setup)
            found.append(Arisen(i + 1, kind, relative(x, b.state(*at)), named))
    return found


def _try_switches(pair: Pair, cause: Cause, b: Trajectory, tick: Callable[[], Any]) -> list[Switch]:
    """The known switches, the ones that fit the cause first; the others only if none of them removes the difference."""
    tried, batches = dict[tuple[Option, ...], Switch](), _options(pair, cause, b)

    def attempt(options: tuple[Option, ...]) -> None:
        tried[options] = _try(pair, options, b)
        tick()

    for batch in batches:
        for option in batch:
            attempt((option,))
        if any(switch.removes for switch in tried.values()):
            return [*tried.values()]
    best = max(tried, key=lambda options: tried[options].reach, default=())
    if best and tried[best].reach[0] > cause.step:  # none alone: the one that helps, with each of the others
        for option in [option for option in (*batches[0], *batches[1]) if option[:2] != best[0][:2]]:
            attempt((*best, option))
    return [*tried.values()]


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


def _try(pair: Pair, options: tuple[Option, ...], b: Trajectory) -> Switch:
    chosen = {side: {name: value for where, name, value in options if where == side} for side in ("ours", "theirs")}
    ways = [name for name in (ROUNDED, QUANTISED, THEIRS) if chosen["ours"].pop(name, False)]
    pair = replace(pair, ours=replace(pair.ours, options={**pair.ours.options, **chosen["ours"]}))
    try:
        theirs = pair.follow_theirs(**chosen["theirs"]) if chosen["theirs"] else b
        settings: dict[str, Any] = {"quantize": True} if ROUNDED in ways or QUANTISED in ways else {}
        if THEIRS in ways:
            settings["timesteps"] = [evaluation.timestep for evaluation in theirs.evaluations]
        if QUANTISED in ways:
            levels, trained = pair.setup(theirs).levels, pair.session.trained()
            nearest = trained.sigmas[trained.sigma_to_t(levels, quantize=True)]
            settings["levels"] = torch.where(levels > 0, nearest, levels)
        setup = pair.setup(theirs, **settings)
        result, first, _ = _find(pair, pair.session.follow_sampler(pair.ours, setup), theirs, setup)
        difference, parts = result.largest, first and first.step
    except Refused:
        difference, parts = math.inf, 0
    words = " and ".join(name if value is True else f"{name}={value!r}" for _, name, value in options)
    return Switch(words, " and ".join(dict.fromkeys(side for side, *_ in options)), difference, parts)
