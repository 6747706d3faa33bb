"""The rules that all samplers keep, each seen on a run or two of a small problem."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gallery.models import reason
from gallery.refused import Refused
from parity.exact import KNOWN, solve
from parity.result import relative
from parity.subject import Subject, reference, run_part, start

SMALL, SEVERAL = (1, 2, 2), (3, 2, 2)  # images, rows and columns of patches
STEPS = 10
Found = tuple[bool | None, str]  # kept, broken or (None) not judged, and why


@dataclass
class Rule:
    """One rule. None: not judged, or a rule that this kind of sampler can't keep by design."""

    name: str
    kept: bool | None
    words: str = ""


def rules(subject: Subject, stochastic: bool, own_steps: bool, counts: dict[int, int]) -> Iterator[Rule]:
    """All of them.

    Args:
        own_steps: the sampler places its steps by itself.
        counts: evaluations by steps.
    """
    quiet = {"eta": 0.0} if stochastic and "eta" in subject.parameters else {}
    smooth = not stochastic or bool(quiet)
    checks: list[tuple[str, Callable[[], Found]]] = [
        ("the same generator gives the same result", lambda: _generator(subject, stochastic)),
        ("nothing is drawn from numpy's or Python's state", lambda: _global(subject)),
        ("an image does not depend on its batch", lambda: _batch(subject, own_steps)),
        ("latents and levels are not written on", lambda: _written(subject)),
        ("it ends at the last level", lambda: _last_level(subject, quiet, smooth)),
        ("one step works", lambda: _one_step(subject)),
        ("float32 and float64 agree", lambda: _precision(subject, quiet, smooth)),
        ("as many evaluations as the steps ask", lambda: _evaluations(subject, own_steps, counts)),
    ]
    if subject.stock:
        checks += [
            ("a run begun part-way is right", lambda: _part_way(subject, stochastic)),
            ("add_noise agrees with the levels", lambda: _add_noise(subject)),
            ("copy.deepcopy, save_config and from_config", lambda: _copies(subject)),
        ]
    else:
        checks.append(("callback once per step, with the step's x", lambda: _callback(subject, own_steps)))
    differs = False  # where two runs differ anyway, comparing runs decides nothing
    for name, check in checks:
        try:
            unknown = differs and any(word in name for word in ("batch", "float32", "copy"))
            kept, words = (None, "not judged: two runs differ anyway") if unknown else check()
        except Exception as error:
            kept, words = False, str(error) if isinstance(error, Refused) else reason(error)
        differs |= name == checks[0][0] and kept is False
        yield Rule(name, kept, words)


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The median over samples of their relative errors: a few that end in another mode would hide the rest."""
    return ((x - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()


def _generator(subject: Subject, stochastic: bool) -> Found:
    first, again, other = (subject.run(STEPS, shape=SMALL, seed=seed).end for seed in (3, 3, 4))
    if (apart := relative(first, again)) > 1e-9:
        return False, f"two runs with the same generator are {apart:.1e} apart: it has randomness of its own"
    if stochastic and relative(first, other) < 1e-9:
        return False, "another generator gives the same noise: it has randomness of its own"
    return True, "another gives another" if stochastic else ""


def _global(subject: Subject) -> Found:
    states = {"Python's random": lambda: str(random.getstate()), "numpy.random": lambda: str(np.random.get_state())}
    before = {name: state() for name, state in states.items()}
    subject.run(STEPS, shape=SMALL)
    drawn = [name for name, state in states.items() if state() != before[name]]
    return not drawn, f"draws from {' and '.join(drawn)}" if drawn else ""


def _batch(subject: Subject, own_steps: bool) -> Found:
    x, other = (start(float(subject.ts(STEPS)[0]), 3, 4, seed=seed) for seed in (1, 2))
    other[1] = x[1]  # the same image among others
    together, among = (subject.run(STEPS, x=batch, shape=SEVERAL, seed=[5, 6, 7]).end[1:2] for batch in (x, other))
    alone = subject.run(STEPS, x=x[1:2], shape=SMALL, seed=[6]).end
    apart, streams = relative(together, among), relative(together, alone)
    worst = max(apart, streams)
    if worst <= 1e-6:
        return True, ""
    if own_steps:
        return None, f"{worst:.1e} apart: its step sizes depend on the whole batch, by design"
    if apart <= 1e-6 and not subject.stock and "noise_sampler" not in subject.parameters:
        return None, "its noise is one stream for the whole batch; with a noise_sampler each image has its own"
    return False, f"an image alone or among others ends {worst:.1e} apart"


def _written(subject: Subject) -> Found:
    written = subject.run(STEPS, shape=SMALL, observe=True).found.written
    return not written, f"writes on {', '.join(dict.fromkeys(written))}" if written else ""


def _last_level(subject: Subject, quiet: dict[str, Any], smooth: bool) -> Found:
    """Where the levels end above zero, at sigma 0.3 or so, and for a scheduler that its own list ends at zero."""
    if subject.stock:
        last = subject.run(STEPS, shape=SMALL).last
        asked = subject.side.options.get("final_sigmas_type") == "sigma_min"
        words = f"its levels end at sigma {last / (1 - last):.3g}, not at zero"
        return (True, "") if last == 0 else (None if asked else False, words)
    levels = subject.levels(50)
    ts = subject.t(levels)
    sigmas = ts / (1 - ts)
    kept, last = int((sigmas > 0.6).sum()), int((sigmas > 0.3).sum())  # the last step is a large one
    cut = torch.cat([levels[:kept], levels[last - 1 : last]])
    where = f"with levels that end at sigma {sigmas[last - 1]:.2g}"
    if not smooth:
        spread = KNOWN.within((run := subject.run(0, levels=cut, shape=(1, 50, 80))).end[0], run.last)
        words = f"{where} its samples spread {spread:.2f} times as far as true ones"
        return (True, "") if abs(spread - 1) < 0.15 else (False, words)
    run = subject.run(0, levels=cut, **quiet)
    above, exact, zero = solve(KNOWN, run.begin, run.first, [float(ts[kept - 1]), run.last, 0.0])
    if distance(run.end, exact) < 0.5 * min(distance(one, exact) for one in (above, zero)):
        return True, ""
    return False, f"{where} it is {distance(run.end, exact):.1%} from the exact state there"


def _one_step(subject: Subject) -> Found:
    run = subject.run(1, shape=SMALL)
    far = (run.end - KNOWN.mean).square().sum(-1).mean().sqrt().item() / KNOWN.covariance.trace().sqrt().item()
    if not far < 3:  # NaN too
        return False, f"it ends {far:.3g} times as far from the mean as true samples"
    return True, ""


def _precision(subject: Subject, quiet: dict[str, Any], smooth: bool) -> Found:
    """In float64 a small change of the latents makes a change of the end in proportion, above float64's rounding."""
    if smooth:
        apart, euler = (
            relative(one.run(STEPS, dtype=torch.float32, **more).end, one.run(STEPS, **more).end)
            for one, more in ((subject, quiet), (reference("euler", subject.family, subject.module), {}))
        )
        if not apart < 100 * max(euler, 1e-6):
            return False, f"{apart:.1e} apart, Euler's method {euler:.1e}"
    x = start(float(subject.ts(STEPS)[0]), 1, 4)
    base = subject.run(STEPS, x=x, shape=SMALL, **quiet).end
    slopes = [(subject.run(STEPS, x=x * (1 + step), shape=SMALL, **quiet).end - base) / step for step in (1e-8, 1e-6)]
    if not relative(*slopes) < 0.05:
        inside = "its state is rounded to float32 or less although latents and levels are float64"
        return (None, f"{inside}, as in many of diffusers'") if subject.stock else (False, inside)
    return True, ""


def _evaluations(subject: Subject, own_steps: bool, counts: dict[int, int]) -> Found:
    if own_steps:
        return None, "it chooses its steps by itself"
    (fewer, least), (more, most) = sorted(counts.items())[-2:]
    each = (most - least) / (more - fewer)
    if each < 1 or most <= each * (more - 1):
        return False, f"{most} in {more} steps, {least} in {fewer}"
    if not subject.stock:
        run = subject.run(20, shape=SMALL)
        ts = [max(run.first, *(t for t, *_ in run.asked)), *subject.ts(20).tolist()[1:]]  # s_churn begins above
        missing = [i for i, t in enumerate(ts) if t > 0 and not any(abs(t - one) <= 1e-4 * t for one, *_ in run.asked)]
        if 0 < len(missing) < 5:
            level = subject.levels(20)[missing[0]].item()
            return False, f"the model is never asked at level {missing[0] + 1} of 20 ({level:.3g})"
    return True, f"{each:.3g} per step"


def _callback(subject: Subject, own_steps: bool) -> Found:
    if "callback" not in subject.parameters:
        return None, "it takes no callback"
    found = subject.run(STEPS, shape=SMALL, observe=True).found
    levels = subject.session().sampler_sigmas(subject.levels(STEPS), subject.options.parameterization == "ve").tolist()
    if own_steps or "sigma_min" in subject.parameters:
        return (True, f"{len(found.callbacks)} times") if found.callbacks else (False, "never called")
    if len(found.callbacks) != STEPS:
        return False, f"called {len(found.callbacks)} times in {STEPS} steps"
    for i, info in enumerate(found.callbacks):
        if missing := {"x", "i", "sigma", "denoised"} - info.keys():
            return False, f"lacks {', '.join(sorted(missing))}"
        if int(info["i"]) != i:
            return False, f"step {i + 1} calls itself i={info['i']}"
        sigma, at = float(info["sigma"]), float(info.get("sigma_hat", info["sigma"]))
        if abs(sigma - levels[i]) > 1e-5 * levels[i]:
            return False, f"step {i + 1} has sigma {sigma:.5g}, its level is {levels[i]:.5g}"
        here = [(x, denoised) for x, sigma, denoised in found.calls if abs(sigma - at) <= 1e-5 * at]
        for which, name in enumerate(("x", "denoised")):
            if not any(relative(info[name], one[which]) < 1e-9 for one in here):
                return False, f"its {name} is not that of step {i + 1}"
    return True, ""


def _part_way(subject: Subject, stochastic: bool) -> Found:
    """From a true state in the middle of 40 steps to the end, with and without `set_begin_index`."""
    whole = subject.run(40)
    most = 0.4 if stochastic else 2 * distance(whole.end, solve(KNOWN, whole.begin, whole.first, [0.0])[0]) + 0.01
    for named, words in ((True, "with set_begin_index"), (False, "found by its first timestep")):
        run = run_part(subject, (1, 20, 40) if stochastic else (1, 8, 8), 20, 40, named)
        if stochastic:
            error = abs(KNOWN.within(run.end[0], run.last) - 1)
        else:
            error = distance(run.end, solve(KNOWN, run.begin, run.first, [0.0])[0])
        if not error < most:
            return False, f"{words}, {error:.1%} off (a whole run {most / 2 - 0.005:.1%})"
    return True, ""


def _add_noise(subject: Subject) -> Found:
    scheduler = subject.listed(STEPS)[0]
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    flow = hasattr(scheduler, "scale_noise")
    if not flow and not hasattr(scheduler, "add_noise"):
        return None, "it has neither add_noise nor scale_noise"
    for timestep in scheduler.timesteps[:: getattr(scheduler, "order", 1)]:
        at = timestep.reshape(1)
        alpha, sigma = (
            float(scheduler.scale_noise(x0, at, noise) if flow else scheduler.add_noise(x0, noise, at))
            for x0, noise in ((one, zero), (zero, one))
        )
        level, (low, high) = sigma / max(alpha, 1e-12), subject.near(float(timestep))
        if not low <= level <= high:
            taken = (low * high) ** 0.5
            return False, f"at timestep {float(timestep):.5g} it mixes sigma {level:.4g}, the network takes {taken:.4g}"
    return True, ""


def _copies(subject: Subject) -> Found:
    expected = subject.run(STEPS, shape=SMALL).end
    scheduler, used = (subject.session().scheduler(subject.side) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_config(folder)
        saved = type(scheduler).from_config(type(scheduler).load_config(folder))
    subject.run(STEPS, shape=SMALL, scheduler=used)
    for words, other in (("saved and loaded", saved), ("copied after a run", copy.deepcopy(used))):
        apart = relative(subject.run(STEPS, shape=SMALL, scheduler=other).end, expected)
        if not apart < 1e-6:
            return False, f"{words}, it ends {apart:.1e} away"
    return True, ""
