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
from parity.subject import Function, Run, Stock, Subject, reference, start

SMALL, SEVERAL = (1, 2, 2), (3, 2, 2)  # images, rows and columns of patches
STEPS = 10


@dataclass
class Rule:
    """One rule: kept, broken, or (None) not judged or not to be kept by this kind of sampler. `words` say why."""

    name: str
    kept: bool | None
    words: str = ""


def rules(subject: Subject, stochastic: bool, own_steps: bool, counts: dict[int, int]) -> Iterator[Rule]:
    """All of them. `counts` are evaluations by steps; `own_steps`: the sampler places its steps by itself."""
    quiet = {"eta": 0.0} if stochastic and subject.takes("eta") else {}
    smooth = not stochastic or bool(quiet)
    checks: list[tuple[str, Callable[[], Any]]] = [
        ("the same generator gives the same result", lambda: _generator(subject, stochastic)),
        ("nothing is drawn from numpy's or Python's state", lambda: _global(subject)),
        ("an image does not depend on its batch", lambda: _batch(subject, own_steps)),
        ("latents and levels are not written on", lambda: _written(subject)),
        ("it ends at the last level", lambda: _last_level(subject, quiet, smooth)),
        ("one step works", lambda: _one_step(subject)),
        ("float32 and float64 agree", lambda: _precision(subject, quiet, smooth)),
        ("as many evaluations as the steps ask", lambda: _evaluations(subject, own_steps, counts)),
    ]
    if isinstance(subject, Function):
        checks.append(("callback once per step, with the step's x", lambda: _callback(subject, own_steps)))
    else:
        checks += [
            ("a run begun part-way is right", lambda: _part_way(subject, stochastic)),
            ("add_noise agrees with the levels", lambda: _add_noise(subject)),
            ("copy.deepcopy, save_config and from_config", lambda: _copies(subject)),
        ]
    differs = False  # where two runs differ anyway, nothing can be told by comparing runs
    for name, check in checks:
        try:
            unknown = differs and any(word in name for word in ("batch", "float32", "copy"))
            found = (None, "not judged: two runs differ anyway") if unknown else check()
        except Refused as refused:
            found = False, str(refused)
        except Exception as error:
            found = False, reason(error)
        differs |= name == checks[0][0] and found[0] is False
        yield Rule(name, *found)


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The median over samples of their relative errors: a few that end in another mode would hide the rest."""
    return ((x - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()


def _apart(one: Run, other: Run) -> float:
    return relative(one.end, other.end)


def _generator(subject: Subject, stochastic: bool) -> tuple[bool, str]:
    first, again, other = (subject.run(STEPS, shape=SMALL, seed=seed) for seed in (3, 3, 4))
    if (apart := _apart(first, again)) > 1e-9:
        return False, f"two runs with the same generator are {apart:.1e} apart: it has randomness of its own"
    if stochastic and _apart(first, other) < 1e-9:
        return False, "another generator gives the same noise: it has randomness of its own"
    return True, "another gives another" if stochastic else ""


def _global(subject: Subject) -> tuple[bool, str]:
    states = {"Python's random": lambda: str(random.getstate()), "numpy.random": lambda: str(np.random.get_state())}
    before = {name: state() for name, state in states.items()}
    subject.run(STEPS, shape=SMALL)
    drawn = [name for name, state in states.items() if state() != before[name]]
    return not drawn, f"draws from {' and '.join(drawn)}" if drawn else ""


def _batch(subject: Subject, own_steps: bool) -> tuple[bool | None, str]:
    x = start(float(subject.ts(STEPS)[0]), 3, 4, seed=1)
    other = start(float(subject.ts(STEPS)[0]), 3, 4, seed=2)
    other[1] = x[1]  # the same image among others
    together, among = (subject.run(STEPS, x=batch, shape=SEVERAL, seed=[5, 6, 7]).end[1:2] for batch in (x, other))
    alone = subject.run(STEPS, x=x[1:2], shape=SMALL, seed=[6]).end
    apart, streams = relative(together, among), relative(together, alone)
    if max(apart, streams) > 1e-6 and own_steps:
        return None, f"{max(apart, streams):.1e} apart: its step sizes depend on the whole batch, by design"
    if apart <= 1e-6 < streams and isinstance(subject, Function) and not subject.takes("noise_sampler"):
        return None, "its noise is one stream for the whole batch; with a noise_sampler each image has its own"
    found = max(apart, streams)
    return found <= 1e-6, "" if found <= 1e-6 else f"an image alone or among others ends {found:.1e} apart"


def _written(subject: Subject) -> tuple[bool, str]:
    run = subject.run(STEPS, shape=SMALL, observe=True)
    return not run.written, f"writes on {', '.join(dict.fromkeys(run.written))}" if run.written else ""


def _last_level(subject: Any, quiet: dict[str, Any], smooth: bool) -> tuple[bool | None, str]:
    """Where the levels end above zero, at sigma 0.3 or so, and for a scheduler that its own list ends at zero."""
    if isinstance(subject, Stock):
        last = subject.run(STEPS, shape=SMALL).last
        asked = subject.side.options.get("final_sigmas_type") == "sigma_min"
        if last > 0:
            return None if asked else False, f"its levels end at sigma {last / (1 - last):.3g}, not at zero"
        return True, ""
    levels = subject.levels(50)
    sigmas = levels / (1 - levels) if subject.flux else levels
    kept, last = int((sigmas > 0.6).sum()), int((sigmas > 0.3).sum())  # the last step is a large one
    cut = torch.cat([levels[:kept], levels[last - 1 : last]])
    where = f"with levels that end at sigma {sigmas[last - 1]:.2g}"
    if not smooth:
        spread = KNOWN.within((run := subject.run(0, levels=cut, shape=(1, 50, 80))).end[0], run.last)
        words = f"{where} its samples spread {spread:.2f} times as far as true ones"
        return (True, "") if abs(spread - 1) < 0.15 else (False, words)
    run = subject.run(0, levels=cut, **quiet)
    before = float(levels[kept - 1]) if subject.flux else float(levels[kept - 1] / (1 + levels[kept - 1]))
    above, exact, zero = solve(KNOWN, run.begin, run.first, [before, run.last, 0.0])
    if distance(run.end, exact) < 0.5 * min(distance(one, exact) for one in (above, zero)):
        return True, ""
    return False, f"{where} it is {distance(run.end, exact):.1%} from the exact state there"


def _one_step(subject: Subject) -> tuple[bool, str]:
    run = subject.run(1, shape=SMALL)
    if not run.asked:
        return False, "it never calls the model"
    far = (run.end - KNOWN.mean).square().sum(-1).mean().sqrt().item() / KNOWN.covariance.trace().sqrt().item()
    if not far < 3:  # NaN too
        return False, f"it ends {far:.3g} times as far from the mean as true samples"
    return True, ""


def _precision(subject: Subject, quiet: dict[str, Any], smooth: bool) -> tuple[bool | None, str]:
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
    lost = relative(*slopes)
    if not lost < 0.05:
        inside = "its state is rounded to float32 or less although latents and levels are float64"
        return (None, f"{inside}, as in many of diffusers'") if isinstance(subject, Stock) else (False, inside)
    return True, ""


def _evaluations(subject: Subject, own_steps: bool, counts: dict[int, int]) -> tuple[bool | None, str]:
    if own_steps:
        return None, "it chooses its steps by itself"
    (fewer, least), (more, most) = sorted(counts.items())[-2:]
    each = (most - least) / (more - fewer)
    if each < 1 or most <= each * (more - 1):
        return False, f"{most} in {more} steps, {least} in {fewer}"
    if isinstance(subject, Function):
        ts, run = subject.ts(20), subject.run(20, shape=SMALL)
        ts[0], asked = run.first, [t for t, *_ in run.asked]
        missing = [i for i, t in enumerate(ts.tolist()) if t > 0 and not any(abs(t - one) <= 1e-4 * t for one in asked)]
        if 0 < len(missing) < 5:
            level = subject.levels(20)[missing[0]].item()
            return False, f"the model is never asked at level {missing[0] + 1} of 20 ({level:.3g})"
    return True, f"{each:.3g} a step"


def _callback(subject: Any, own_steps: bool) -> tuple[bool | None, str]:
    if "callback" not in subject.parameters:
        return None, "it takes no callback"
    run = subject.run(STEPS, shape=SMALL, observe=True)
    levels = subject.sigmas(subject.levels(STEPS))
    if own_steps or "sigma_min" in subject.parameters:
        return (True, f"{len(run.callbacks)} times") if run.callbacks else (False, "never called")
    if len(run.callbacks) != STEPS:
        return False, f"called {len(run.callbacks)} times in {STEPS} steps"
    for i, (info, _) in enumerate(run.callbacks):
        if missing := {"x", "i", "sigma", "denoised"} - info.keys():
            return False, f"lacks {', '.join(sorted(missing))}"
        if int(info["i"]) != i:
            return False, f"step {i + 1} calls itself i={info['i']}"
        if abs(float(info["sigma"]) - float(levels[i])) > 1e-5 * float(levels[i]):
            return False, f"step {i + 1} has sigma {float(info['sigma']):.5g}, its level is {float(levels[i]):.5g}"
        at = float(info.get("sigma_hat", info["sigma"]))
        here = [(x, denoised) for x, sigma, denoised in run.model if abs(sigma - at) <= 1e-5 * at]
        for name, which in (("x", 0), ("denoised", 1)):
            if not any(relative(info[name], one[which]) < 1e-9 for one in here):
                return False, f"its {name} is not that of step {i + 1}"
    return True, ""


def _part_way(subject: Any, stochastic: bool) -> tuple[bool | None, str]:
    """From a true state in the middle of 40 steps to the end, with and without `set_begin_index`."""
    whole, found = subject.run(40, shape=(1, 8, 8)), []
    for named in (True, False):
        run = subject.run(40, shape=(1, 20, 40) if stochastic else (1, 8, 8), begin=0.5, named=named)
        if stochastic:
            found.append(abs(KNOWN.within(run.end[0], run.last) - 1))
        else:
            (exact,) = solve(KNOWN, run.begin, run.first, [0.0])
            found.append(distance(run.end, exact))
    (exact,) = solve(KNOWN, whole.begin, whole.first, [0.0])
    most = 0.4 if stochastic else 2 * distance(whole.end, exact) + 0.01
    for error, words in zip(found, ("with set_begin_index", "found by its first timestep")):
        if not error < most:
            return False, f"{words}, {error:.1%} off (a whole run {most / 2 - 0.005:.1%})"
    return True, ""


def _add_noise(subject: Any) -> tuple[bool | None, str]:
    scheduler = subject.listed(STEPS)[0]
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    add = getattr(scheduler, "scale_noise", None)
    if add is None and not hasattr(scheduler, "add_noise"):
        return None, "it has neither add_noise nor scale_noise"
    for timestep in scheduler.timesteps[:: getattr(scheduler, "order", 1)]:
        at = timestep.reshape(1)
        share = [
            (add(x0, at, noise) if add else scheduler.add_noise(x0, noise, at)).double().item()
            for x0, noise in ((one, zero), (zero, one))
        ]
        level, (low, high) = share[1] / max(share[0], 1e-12), subject.near(float(timestep))
        if not low <= level <= high:
            taken = (low * high) ** 0.5
            return False, f"at timestep {float(timestep):.5g} it mixes sigma {level:.4g}, the network takes {taken:.4g}"
    return True, ""


def _copies(subject: Any) -> tuple[bool, str]:
    expected = subject.run(STEPS, shape=SMALL)
    with tempfile.TemporaryDirectory() as folder:
        scheduler = subject.scheduler()
        scheduler.save_config(folder)
        saved = type(scheduler).from_config(type(scheduler).load_config(folder))
    used = subject.scheduler()
    subject.run(STEPS, shape=SMALL, scheduler=used)
    for words, other in (("saved and loaded", saved), ("copied after a run", copy.deepcopy(used))):
        apart = _apart(subject.run(STEPS, shape=SMALL, scheduler=other), expected)
        if not apart < 1e-6:
            return False, f"{words}, it ends {apart:.1e} away"
    return True, ""
