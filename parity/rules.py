"""The rules that all samplers keep, each seen on a run or two of a small problem."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from parity.exact import KNOWN, solve
from parity.result import relative
from parity.subject import Run, Subject, mixed, start

STEPS = 10
Found = tuple[bool | None, str]  # None: not judged, or a rule that this kind of sampler can't keep by design


@dataclass
class Rule:
    """One rule, whether it is kept, and what is seen."""

    name: str
    kept: bool | None
    words: str


def rules(subject: Subject) -> Iterator[Rule]:
    """All of them that apply to a function or to a scheduler."""
    unjudged = dict[Callable, str]()
    if not any(hasattr(subject.side.target, name) for name in ("add_noise", "scale_noise")):
        unjudged |= dict.fromkeys((_part_way, _add_noise), "it has neither add_noise nor scale_noise")
    for name, check in {**ALL, **(OF_SCHEDULERS if subject.stock else OF_FUNCTIONS)}.items():
        try:
            kept, words = (None, unjudged[check]) if check in unjudged else check(subject)
        except Exception as error:
            kept, words = False, subject.side.failure(error)
        if check is _generator and not kept:
            unjudged |= dict.fromkeys((_batch, _precision, _copies), "not judged: two runs differ anyway")
        yield Rule(name, kept, words)


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The median over samples of their relative errors: a few that end in another mode would hide the rest."""
    return ((x - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()


def step_noises(run: Run) -> Iterator[tuple[torch.Tensor, float]]:
    """The noise of each step after the first, and the variance that its levels leave room for, in units of the level.

    A step from t to s makes a x + b_1 D_1 + b_2 D_2 + ... + r noise of the predictions D. Its noise is right if
    (a t)^2 + r^2 = s^2, whatever b: so much old noise is kept and so much is added. Least squares find a and r.
    """
    for i in range(1, len(run.asked) - 1):
        (t, x, *_), (s, after, *_) = run.asked[i : i + 2]
        terms = torch.stack([x, *(state[2] for state in run.asked[max(i - 2, 0) : i + 1])]).flatten(1).T
        weights = torch.linalg.lstsq(terms, after.flatten()[:, None], driver="gelsd").solution[:, 0]
        yield (after.flatten() - terms @ weights) / s, 1 - (weights[0].item() * t / s) ** 2


def _generator(subject: Subject) -> Found:
    if subject.stock and subject.flux and subject.stochastic:
        return None, "not judged: FluxPipeline passes no generator to `step`"
    first, again, other = (subject.run(STEPS, seed=seed).end for seed in (3, 3, 4))
    if not (apart := relative(first, again)) <= 1e-9:
        return False, f"two runs with the same generator are {apart:.1e} apart: it has randomness of its own"
    if subject.stochastic and relative(first, other) <= 1e-9:
        return False, "another generator gives the same noise: it has randomness of its own"
    x = start(float(subject.ts(STEPS)[0]), 1, 64)
    pairs = zip(*(step_noises(subject.run(STEPS, x=x, seed=seed)) for seed in (3, 4) if subject.stochastic))
    for i, ((one, _), (two, _)) in enumerate(pairs):  # 5 %: what a step without noise leaves is smaller
        if min(one.square().mean(), two.square().mean()) > 0.05**2 and torch.cosine_similarity(one, two, 0) > 0.9:
            return (
                False,
                f"another generator gives the same noise after evaluation {i + 2}: it has randomness of its own",
            )
    return True, "another gives another" if subject.stochastic else ""


def _global(subject: Subject) -> Found:
    states: dict[str, Callable] = {"Python's random": random.getstate, "numpy.random": np.random.get_state}
    with contextlib.ExitStack() as restored:
        restored.callback(random.setstate, random.getstate())
        restored.callback(np.random.set_state, np.random.get_state())
        random.seed(2718281828)  # a state that a sampler which seeds them does not leave
        np.random.seed(2718281828)
        before = {name: str(state()) for name, state in states.items()}
        subject.run(STEPS)
        drawn = [name for name, state in states.items() if str(state()) != before[name]]
    return not drawn, f"draws from {' and '.join(drawn)}" if drawn else ""


def _batch(subject: Subject) -> Found:
    x, other = (start(float(subject.ts(STEPS)[0]), 3, 64, seed=seed) for seed in (1, 2))
    other[1] = x[1]  # the same image among others
    together, among = (subject.run(STEPS, x=batch, shape=(3, 8, 8), seed=5).end[1:2] for batch in (x, other))
    apart = relative(together, among)
    if subject.stock or not subject.stochastic or "noise_sampler" in subject.parameters:  # else one stream for all
        apart = max(apart, relative(together, subject.run(STEPS, x=x[1:2], seed=6).end))
    if apart > 1e-6 and subject.own_steps:
        return None, f"{apart:.1e} apart: its step sizes depend on the whole batch, by design"
    return apart <= 1e-6, f"an image alone or among others ends {apart:.1e} apart"


def _observed(subject: Subject) -> tuple[Run, list[dict[str, Any]]]:
    """A run of a function, with what it writes on, and the data of its callbacks."""
    infos, written, function = list[dict[str, Any]](), list[str](), subject.side.target

    @functools.wraps(function)
    def sampler(model: Any, *given: torch.Tensor, **options: Any) -> torch.Tensor:
        before = copy.deepcopy(given)
        if "callback" in options:
            options["callback"] = lambda info: infos.append(copy.deepcopy(info))
        end = function(model, *given, **options)
        written.extend(n for n, now, old in zip(("latents", "levels"), given, before) if not now.equal(old))
        return end

    run = subject.run(STEPS, instead=sampler)
    run.written.extend(written)
    return run, infos


def _written(subject: Subject) -> Found:
    run = subject.run(STEPS) if subject.stock else _observed(subject)[0]
    if subject.stock:
        scheduler, shape = subject.scheduler(STEPS), (1, 8, 8)
        given = {name: subject.shaped(start(0.9, 1, 64), shape) for name in ("model_output", "sample")}
        before = copy.deepcopy(given)
        scheduler.step(timestep=scheduler.timesteps[0], return_dict=False, **given)
        run.written.extend(name for name in given if not given[name].equal(before[name]))
    return not run.written, f"writes on {', '.join(run.written)}" if run.written else ""


def _levels(subject: Subject) -> Found:
    """A scheduler begins at its first level and its list ends at zero. A function may have to end above zero."""
    if subject.stock:
        run = subject.run(STEPS)
        ratio, sigma = (run.begin.norm() / start(run.first, 1, 64).norm()).item(), run.last / (1 - run.last)
        if abs(ratio - 1) > 0.05:
            return False, f"its first latents are {ratio:.3g} times as large as its first level asks"
        by_option = sigma > 0 and subject.side.options.get("final_sigmas_type") == "sigma_min"
        return None if by_option else sigma == 0, f"its levels end at sigma {sigma:.3g}"
    levels, ts = subject.levels(50), subject.ts(50)
    cut = torch.cat([levels[ts > 0.37], levels[ts > 0.23][-1:]])  # the last step is a large one, from sigma 0.6 to 0.3
    run = subject.run(len(cut) - 1, levels=cut, shape=(1, 50, 80), **subject.quiet)
    spread, sigma = KNOWN.within(run.end[0], run.last), run.last / (1 - run.last)
    words = f"with levels that end at sigma {sigma:.2g} its samples spread {spread:.2f} times as far as true ones"
    return abs(spread - 1) < 0.15, words


def _one_step(subject: Subject) -> Found:
    run = subject.run(1)
    far = (run.end - KNOWN.mean).square().sum(-1).mean().sqrt().item() / KNOWN.covariance.trace().sqrt().item()
    return far < 3, f"it ends {far:.3g} times as far from the mean as true samples"  # not for NaN


def _precision(subject: Subject) -> Found:
    """In float64 a small change of the latents makes a change of the end in proportion, above float64's rounding."""
    quiet = subject.quiet
    if quiet or not subject.stochastic:
        single, double = (subject.run(STEPS, dtype=dtype, **quiet).end for dtype in (torch.float32, torch.float64))
        if not (apart := relative(single, double)) < 1e-4:
            return False, f"{apart:.1e} apart"
    x = start(float(subject.ts(STEPS)[0]), 1, 64)
    base = subject.run(STEPS, x=x, **quiet).end
    slopes = [(subject.run(STEPS, x=x * (1 + step), **quiet).end - base) / step for step in (1e-8, 1e-6)]
    kept = relative(*slopes) < 0.05 or (None if subject.stock else False)  # many of diffusers' schedulers round
    return kept, "" if kept else "its state is rounded to float32 or less although latents and levels are float64"


def _evaluations(subject: Subject) -> Found:
    if subject.own_steps:
        return None, "it chooses its steps by itself"
    asked, twice = ([t for t, *_ in subject.run(steps).asked] for steps in (STEPS, 2 * STEPS))
    few, many = len(asked), len(twice)
    each = (many - few) / STEPS
    if each > 2 and few == each * (STEPS - 1):  # as heunpp2, whose last two steps have 2 and 1 in place of 3
        few += all(any(abs(t - one) <= 1e-4 * t for one in asked) for t in subject.ts(STEPS).tolist() if t > 0)
    return each >= 1 and few > each * (STEPS - 1), f"{len(asked)} in {STEPS} steps, {many} in {2 * STEPS}"


def _callback(subject: Subject) -> Found:
    if "callback" not in subject.parameters:
        return None, "it takes no callback"
    run, infos = _observed(subject)
    own_levels = subject.own_steps or "sigma_min" in subject.parameters
    if own_levels or len(infos) != STEPS:
        return own_levels and len(infos) > 0, f"called {len(infos)} times in {STEPS} steps"
    levels = subject.session().sampler_sigmas(subject.levels(STEPS), subject.ve).tolist()
    for i, (info, level) in enumerate(zip(infos, levels)):
        sigma, at = float(info["sigma"]), float(info.get("sigma_hat", info["sigma"]))
        scale = 1 + at if subject.ve else 1.0
        shown = {"x": subject.state(info["x"] / scale, at / scale), "denoised": subject.state(info["denoised"], 0.0)}
        here = [states for t, *states, _ in run.asked if abs(t - subject.t(at / scale)) <= 1e-5 * t]
        wrong = [name for n, name in enumerate(shown) if not any(relative(shown[name], x[n]) < 1e-9 for x in here)]
        wrong += ["i"] * (int(info["i"]) != i) + ["sigma"] * (not abs(sigma - level) <= 1e-5 * level)
        if wrong:
            return False, f"the callback of step {i + 1} gets another {' and '.join(wrong)}"
    return True, ""


def _part_way(subject: Subject) -> Found:
    """From a true state in the middle of 40 steps to the end, with and without `set_begin_index`."""

    def off(run: Run) -> float:
        if subject.stochastic:
            return abs(KNOWN.within(run.end[0], run.last) - 1)
        return distance(run.end, solve(KNOWN, run.begin, run.first, [run.last])[0])

    shape = (1, 20, 40) if subject.stochastic else (1, 8, 8)
    whole = off(subject.run(40, shape=shape))
    parts = [off(subject.run_part(shape, 40, named)) for named in (True, False)]
    most = 0.4 if subject.stochastic else 2 * whole + 0.01
    words = "with set_begin_index {:.1%} off, found by its first timestep {:.1%}, a whole run {:.1%}"
    return all(part < most for part in parts), words.format(*parts, whole)


def _add_noise(subject: Subject) -> Found:
    scheduler, session = subject.scheduler(STEPS), subject.session()
    x0, noise = torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1, 1)  # one without noise, and noise alone
    for timestep in scheduler.timesteps[:: getattr(scheduler, "order", 1)]:
        alpha, sigma = mixed(scheduler, x0, noise, timestep.repeat(2)).flatten().tolist()
        level, t = sigma / (alpha + sigma if subject.flux else alpha), float(timestep)
        low, given, high = (session.level_of(t + near) for near in (-1, 0, 1))
        if not low * 0.999 <= level <= high * 1.001:
            return (
                False,
                f"at timestep {t:.5g} it mixes {session.level_name} {level:.4g}, the network takes {given:.4g}",
            )
    return True, ""


def _copies(subject: Subject) -> Found:
    expected = subject.run(STEPS).end
    scheduler, used = (subject.session().scheduler(subject.side) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_config(folder)
        saved = type(scheduler).from_config(type(scheduler).load_config(folder))
    subject.run(STEPS, instead=used)
    apart = [relative(subject.run(STEPS, instead=other).end, expected) for other in (saved, copy.deepcopy(used))]
    return all(one < 1e-6 for one in apart), "saved and loaded {:.1e} apart, copied after a run {:.1e}".format(*apart)


ALL: dict[str, Callable[[Subject], Found]] = {
    "the same generator gives the same result": _generator,
    "nothing is drawn from numpy's or Python's state": _global,
    "an image does not depend on its batch": _batch,
    "latents and levels are not written on": _written,
    "it begins at the first level and ends at the last": _levels,
    "one step works": _one_step,
    "float32 and float64 agree": _precision,
    "as many evaluations as the steps ask": _evaluations,
}
OF_SCHEDULERS = {
    "a run begun part-way is right": _part_way,
    "add_noise agrees with the levels": _add_noise,
    "copy.deepcopy, save_config and from_config": _copies,
}
OF_FUNCTIONS = {"callback once per step, with the step's x": _callback}
