"""The rules that all samplers keep, each seen on a run or two of a small problem."""

from __future__ import annotations

import copy
import functools
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
from parity.subject import Run, Subject, mixed, reference, start

SMALL, SEVERAL = (1, 2, 2), (3, 2, 2)  # images, rows and columns of patches
STEPS = 10


class NotKept(Exception):
    """The rule is broken. The message says why."""


class NotJudged(Exception):
    """This kind of sampler can't keep the rule by design, or two runs can't show it. The message says why."""


@dataclass
class Rule:
    """One rule. None: not judged, or a rule that this kind of sampler can't keep by design."""

    name: str
    kept: bool | None
    words: str = ""


def rules(subject: Subject) -> Iterator[Rule]:
    """All of them that apply to a function or to a scheduler."""
    differs = False  # where two runs differ anyway, comparing runs decides nothing
    mixes = any(hasattr(subject.side.target, name) for name in ("add_noise", "scale_noise"))
    for name, check in {**ALL, **(OF_SCHEDULERS if subject.stock else OF_FUNCTIONS)}.items():
        try:
            if differs and check in (_batch, _precision, _copies):
                raise NotJudged("not judged: two runs differ anyway")
            if not mixes and check in (_part_way, _add_noise):
                raise NotJudged("it has neither add_noise nor scale_noise")
            rule = Rule(name, True, check(subject) or "")
        except NotJudged as why:
            rule = Rule(name, None, str(why))
        except Exception as error:
            rule = Rule(name, False, str(error) if isinstance(error, (NotKept, Refused)) else reason(error))
            differs |= check is _generator
        yield rule


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The median over samples of their relative errors: a few that end in another mode would hide the rest."""
    return ((x - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()


def need(kept: Any, words: str) -> None:
    """NotKept with these words where the rule is broken."""
    if not kept:
        raise NotKept(words)


def _generator(subject: Subject) -> str | None:
    first, again, other = (subject.run(STEPS, shape=SMALL, seed=seed).end for seed in (3, 3, 4))
    apart = relative(first, again)
    need(apart <= 1e-9, f"two runs with the same generator are {apart:.1e} apart: it has randomness of its own")
    if not subject.stochastic:
        return None
    need(relative(first, other) > 1e-9, "another generator gives the same noise: it has randomness of its own")
    return "another gives another"


def _global(subject: Subject) -> None:
    states = {"Python's random": lambda: str(random.getstate()), "numpy.random": lambda: str(np.random.get_state())}
    before = {name: state() for name, state in states.items()}
    subject.run(STEPS, shape=SMALL)
    drawn = [name for name, state in states.items() if state() != before[name]]
    need(not drawn, f"draws from {' and '.join(drawn)}")


def _batch(subject: Subject) -> None:
    x, other = (start(float(subject.ts(STEPS)[0]), 3, 4, seed=seed) for seed in (1, 2))
    other[1] = x[1]  # the same image among others
    together, among = (subject.run(STEPS, x=batch, shape=SEVERAL, seed=[5, 6, 7]).end[1:2] for batch in (x, other))
    alone = subject.run(STEPS, x=x[1:2], shape=SMALL, seed=[6]).end
    apart, streams = relative(together, among), relative(together, alone)
    worst = max(apart, streams)
    if worst > 1e-6 and subject.own_steps:
        raise NotJudged(f"{worst:.1e} apart: its step sizes depend on the whole batch, by design")
    if apart <= 1e-6 < streams and not subject.stock and "noise_sampler" not in subject.parameters:
        raise NotJudged("its noise is one stream for the whole batch; with a noise_sampler each image has its own")
    need(worst <= 1e-6, f"an image alone or among others ends {worst:.1e} apart")


class Observed:
    """One run of a function, which notes what it asks the model, calls back with and writes on."""

    def __init__(self, subject: Subject):
        self.asked = list[tuple[torch.Tensor, float, torch.Tensor]]()  # x, sigma and the prediction
        self.callbacks, self.written, function = list[dict[str, Any]](), list[str](), subject.side.target

        @functools.wraps(function)
        def sampler(model: Any, x: torch.Tensor, *levels: Any, callback: Any = None, **options: Any) -> torch.Tensor:
            def called_back(info: dict[str, Any]) -> None:
                self.callbacks.append(copy.deepcopy(info))
                callback(info)

            self.model, before = model, copy.deepcopy([x, *levels])
            options |= {} if callback is None else {"callback": called_back}
            end = function(self, x, *levels, **options)
            pairs = zip(("latents", "levels"), (x, *levels), before)
            self.written += [name for name, now, old in pairs if torch.is_tensor(now) and not now.equal(old)]
            return end

        subject.run(STEPS, shape=SMALL, function=sampler)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **given: Any) -> torch.Tensor:
        """The model."""
        before, denoised = x.clone(), self.model(x, sigma, **given)
        self.asked.append((before, float(sigma.flatten()[0]), denoised.clone()))
        return denoised

    def __getattr__(self, name: str) -> Any:  # functions written for ComfyUI look into the model
        return getattr(vars(self)["model"], name)


def _written(subject: Subject) -> None:
    written = subject.run(STEPS, shape=SMALL).written if subject.stock else Observed(subject).written
    need(not written, f"writes on {', '.join(written)}")


def _last_level(subject: Subject) -> None:
    """Where the levels end above zero, at sigma 0.3 or so, and for a scheduler that its own list ends at zero."""
    if subject.stock:
        last = subject.run(STEPS, shape=SMALL).last
        words = f"its levels end at sigma {last / (1 - last):.3g}, not at zero"
        if last > 0 and subject.side.options.get("final_sigmas_type") == "sigma_min":
            raise NotJudged(words)
        return need(last == 0, words)
    levels = subject.levels(50)
    ts = subject.t(levels)
    sigmas = ts / (1 - ts)
    kept, last = int((sigmas > 0.6).sum()), int((sigmas > 0.3).sum())  # the last step is a large one
    cut = torch.cat([levels[:kept], levels[last - 1 : last]])
    where = f"with levels that end at sigma {sigmas[last - 1]:.2g}"
    if subject.stochastic and not subject.quiet:
        spread = KNOWN.within((run := subject.run(0, levels=cut, shape=(1, 50, 80))).end[0], run.last)
        return need(abs(spread - 1) < 0.15, f"{where} its samples spread {spread:.2f} times as far as true ones")
    run = subject.run(0, levels=cut, **subject.quiet)
    above, exact, zero = solve(KNOWN, run.begin, run.first, [float(ts[kept - 1]), run.last, 0.0])
    error = distance(run.end, exact)
    near = error < 0.5 * min(distance(one, exact) for one in (above, zero))
    return need(near, f"{where} it is {error:.1%} from the exact state there")


def _one_step(subject: Subject) -> None:
    run = subject.run(1, shape=SMALL)
    far = (run.end - KNOWN.mean).square().sum(-1).mean().sqrt().item() / KNOWN.covariance.trace().sqrt().item()
    need(far < 3, f"it ends {far:.3g} times as far from the mean as true samples")  # not for NaN


def _precision(subject: Subject) -> None:
    """In float64 a small change of the latents makes a change of the end in proportion, above float64's rounding."""
    quiet = subject.quiet
    if quiet or not subject.stochastic:
        apart, euler = (
            relative(one.run(STEPS, dtype=torch.float32, **one.quiet).end, one.run(STEPS, **one.quiet).end)
            for one in (subject, reference("euler", subject.family))
        )
        need(apart < 100 * max(euler, 1e-6), f"{apart:.1e} apart, Euler's method {euler:.1e}")
    x = start(float(subject.ts(STEPS)[0]), 1, 4)
    base = subject.run(STEPS, x=x, shape=SMALL, **quiet).end
    slopes = [(subject.run(STEPS, x=x * (1 + step), shape=SMALL, **quiet).end - base) / step for step in (1e-8, 1e-6)]
    kept, inside = relative(*slopes) < 0.05, "its state is rounded to float32 or less although latents and levels are"
    if not kept and subject.stock:
        raise NotJudged(f"{inside} float64, as in many of diffusers'")
    need(kept, f"{inside} float64")


def _evaluations(subject: Subject) -> str:
    if subject.own_steps:
        raise NotJudged("it chooses its steps by itself")
    few, many = (len(subject.run(steps, shape=SMALL).asked) for steps in (STEPS // 2, STEPS))
    each = 2 * (many - few) / STEPS
    need(each >= 1 and many > each * (STEPS - 1), f"{many} in {STEPS} steps, {few} in {STEPS // 2}")
    if not subject.stock:
        run = subject.run(20, shape=SMALL)
        ts = [max(run.first, *(t for t, *_ in run.asked)), *subject.ts(20).tolist()[1:]]  # s_churn begins above
        missing = [i for i, t in enumerate(ts) if t > 0 and not any(abs(t - one) <= 1e-4 * t for one, *_ in run.asked)]
        if 0 < len(missing) < 5:
            level = subject.levels(20)[missing[0]].item()
            raise NotKept(f"the model is never asked at level {missing[0] + 1} of 20 ({level:.3g})")
    return f"{each:.3g} per step"


def _callback(subject: Subject) -> str | None:
    if "callback" not in subject.parameters:
        raise NotJudged("it takes no callback")
    seen = Observed(subject)
    count = len(seen.callbacks)
    if subject.own_steps or "sigma_min" in subject.parameters:
        need(count, "never called")
        return f"{count} times"
    need(count == STEPS, f"called {count} times in {STEPS} steps")
    levels = subject.session().sampler_sigmas(subject.levels(STEPS), subject.options.parameterization == "ve").tolist()
    for i, (info, level) in enumerate(zip(seen.callbacks, levels)):
        missing = sorted({"x", "i", "sigma", "denoised"} - info.keys())
        need(not missing, f"lacks {', '.join(missing)}")
        need(int(info["i"]) == i, f"step {i + 1} calls itself i={info['i']}")
        sigma, at = float(info["sigma"]), float(info.get("sigma_hat", info["sigma"]))
        need(abs(sigma - level) <= 1e-5 * level, f"step {i + 1} has sigma {sigma:.5g}, its level is {level:.5g}")
        here = [(x, denoised) for x, sigma, denoised in seen.asked if abs(sigma - at) <= 1e-5 * at]
        for which, name in enumerate(("x", "denoised")):
            same = any(relative(info[name], one[which]) < 1e-9 for one in here)
            need(same, f"its {name} is not that of step {i + 1}")
    return None


def _part_way(subject: Subject) -> None:
    """From a true state in the middle of 40 steps to the end, with and without `set_begin_index`."""

    def off(run: Run) -> float:
        if subject.stochastic:
            return abs(KNOWN.within(run.end[0], run.last) - 1)
        return distance(run.end, solve(KNOWN, run.begin, run.first, [0.0])[0])

    most = 0.4 if subject.stochastic else 2 * off(subject.run(40)) + 0.01
    for named, words in ((True, "with set_begin_index"), (False, "found by its first timestep")):
        error = off(subject.run_part((1, 20, 40) if subject.stochastic else (1, 8, 8), 20, 40, named))
        need(error < most, f"{words}, {error:.1%} off (a whole run {most / 2 - 0.005:.1%})")


def _add_noise(subject: Subject) -> None:
    scheduler = subject.listed(STEPS)[0]
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for timestep in scheduler.timesteps[:: getattr(scheduler, "order", 1)]:
        alpha, sigma = (float(mixed(scheduler, *shares, timestep.reshape(1))) for shares in ((one, zero), (zero, one)))
        level, (low, high) = sigma / max(alpha, 1e-12), subject.near(float(timestep))
        words = f"at timestep {float(timestep):.5g} it mixes sigma {level:.4g}, the network takes"
        need(low <= level <= high, f"{words} {(low * high) ** 0.5:.4g}")


def _copies(subject: Subject) -> None:
    expected = subject.run(STEPS, shape=SMALL).end
    scheduler, used = (subject.session().scheduler(subject.side) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_config(folder)
        saved = type(scheduler).from_config(type(scheduler).load_config(folder))
    subject.run(STEPS, shape=SMALL, scheduler=used)
    for words, other in (("saved and loaded", saved), ("copied after a run", copy.deepcopy(used))):
        apart = relative(subject.run(STEPS, shape=SMALL, scheduler=other).end, expected)
        need(apart < 1e-6, f"{words}, it ends {apart:.1e} away")


ALL: dict[str, Callable[[Subject], str | None]] = {
    "the same generator gives the same result": _generator,
    "nothing is drawn from numpy's or Python's state": _global,
    "an image does not depend on its batch": _batch,
    "latents and levels are not written on": _written,
    "it ends at the last level": _last_level,
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
