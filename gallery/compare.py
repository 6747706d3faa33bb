"""Two samplers on one network: where they part, why, and which is nearer to the truth."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize_scalar

from gallery.follow import Evaluation, Ours, Session, Trajectory
from gallery.models import Refused
from gallery.options import Family
from gallery.sides import Side, find_side
from gallery.truth import Truth, solve


@dataclass
class Row:
    """One step. Differences are relative, ||ours - theirs|| / ||theirs||.

    Args:
        step: from 1.
        level: sigma (FLUX: t) that it begins at.
        timesteps: that each side gave to the network, one for each evaluation of the step.
        latents: difference after the step.
        denoised: difference of the predictions, the largest of the step.
    """

    step: int
    level: float
    timesteps: tuple[list[float], list[float]]
    latents: float
    denoised: float


@dataclass
class Cause:
    """What differs where two trajectories part.

    Args:
        kind: "initial scale", "initial noise", "noise levels", "timestep", "prediction", "step noise", "last step",
            "update", "rounding" of the latents, or "not finite".
        step: from 1; 0 for the initial latents.
        level: that the step begins at.
        what: in words.
    """

    kind: str
    step: int
    level: float
    what: str


@dataclass
class Switch:
    """A known switch that was tried, or several at once.

    Args:
        side: "ours" or "theirs".
        difference: the largest that is left with it.
        parts: the step that the sides part at with it, from 1; 0 for the initial latents; None if it removes it all.
    """

    name: str
    side: str
    difference: float
    parts: int | None

    @property
    def removes(self) -> bool:
        return self.parts is None

    @property
    def reach(self) -> tuple[float, float]:
        """Greater for a switch that takes the sides further together."""
        return (math.inf if self.parts is None else self.parts, -self.difference)


@dataclass
class Result:
    """All of one comparison.

    Args:
        initial, final: difference of the first and of the last latents.
        local: the largest difference that arises within one step, where only these tell whether it is rounding.
    """

    ours: str
    theirs: str
    steps: int
    tolerance: float
    initial: float
    rows: list[Row]
    final: float
    cause: Cause | None
    local: float | None
    switches: list[Switch]
    truth: Truth | None
    notes: list[str]
    verdict: str = ""

    @property
    def largest(self) -> float:
        """The largest difference of all."""
        values = [self.initial, self.final, *(max(row.latents, row.denoised) for row in self.rows)]
        return math.inf if any(math.isnan(value) for value in values) else max(values)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """||ours - theirs|| / ||theirs||. NaN where one of them is not finite."""
    difference = (ours.double() - theirs.double()).norm()
    return (difference / theirs.double().norm().clamp(min=1e-30)).item()


# --- one pair --------------------------------------------------------------------------------------------------------


class Pair:
    """Two sides in one session."""

    def __init__(self, session: Session, ours: Side, theirs: Side, tolerance: float):
        self.session, self.ours, self.theirs, self.tolerance = session, ours, theirs, tolerance

    def run(self, ours: Side | None = None, changes: dict[str, Any] | None = None, **settings: Any):
        """Both trajectories, and how ours ran. `changes` are options of their scheduler, `settings` those of `Ours`."""
        theirs = self.follow_theirs(changes)
        setup = self.setup(theirs, **settings)
        return self.session.follow_sampler(ours or self.ours, setup), theirs, setup

    def follow_theirs(self, changes: dict[str, Any] | None = None) -> Trajectory:
        if self.theirs.is_scheduler:
            return self.session.follow_scheduler(self.theirs, **changes or {})
        return self.session.follow_sampler(self.theirs, self._common())

    def _common(self) -> Ours:
        """For two samplers of k-diffusion's kind: the pipeline's own levels and start, and one Brownian path."""
        session = self.session
        levels = session.named_levels(session.options.schedule, session.options.steps).to(session.dtype)
        start = (
            1.0 if session.flux else session.pipe.noise_levels(len(levels) - 1, schedule=session.options.schedule)[1]
        )
        x = session.noise.to(session.dtype) * start
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
        """The table, and the cause of the first difference past the tolerance."""
        result = Result(
            self.ours.text, self.theirs.text, len(b.starts), self.tolerance, 0, [], 0, None, None, [], None, []
        )
        result.notes = list(dict.fromkeys([*b.notes, *a.notes]))
        result.initial = relative(a.state(0), b.state(0))
        result.final = relative(a.final, b.final)
        if len(a.levels) != len(b.levels):
            what = f"ours takes {len(a.starts)} steps, theirs {len(b.starts)}"
            result.cause = Cause("noise levels", 0, b.levels[0], what)
            return result
        past, first = self.tolerance, math.inf
        if not result.initial <= past:
            result.cause = self._initial(a, b)
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
                result.cause = self._not_finite(i, a, b)
                continue
            for j, (one, other) in enumerate(zip(ours, theirs)):
                apart = relative(one.x, other.x) if j and alike else 0.0
                if apart > past or (j and alike and abs(one.level / other.level - 1) > 1e-5):
                    result.cause, first = self._update(i, a, b, setup, inner=j), apart
                elif j < len(differences) and differences[j] > past:
                    result.cause, first = self._prediction(i, one, other, b), differences[j]
                if result.cause is not None:
                    break
            if result.cause is None and latents > past:
                result.cause, first = self._update(i, a, b, setup), latents
        if result.cause is not None and result.cause.step and min(first, result.largest / 3) < 30 * past:
            self._local(result, b, setup)
        return result

    def _local(self, result: Result, b: Trajectory, setup: Ours) -> None:
        """Looks at each step by itself, where the differences are so small that the network may have made them large.

        Our network and sampler get their latents and their predictions, step by step. A timestep that is theirs to
        float32's rounding, 1e-4, is taken for the same.
        """
        exact = [self.session.timestep_of(evaluation.level) for evaluation in b.evaluations]
        given = [evaluation.timestep for evaluation in b.evaluations]
        timesteps = [t if abs(t - ours) < 1e-4 else None for t, ours in zip(given, exact)]

        def probe(model, x, sigmas, extra_args=None, callback=None, disable=None):
            for evaluation in b.evaluations:
                model(evaluation.x, x.new_full([x.shape[0]], evaluation.level))
            return x

        probed = replace(setup, flow=True, timesteps=setup.timesteps or timesteps)
        seen = self.session.follow_sampler(Side("probe", probe, {}), probed).evaluations
        denoised = [evaluation.denoised for evaluation in b.evaluations]
        replayed = self.session.replay(self.ours, setup, denoised)
        moved = self.session.replay(self.ours, replace(setup, start=setup.start + 1), denoised)
        if len(replayed.evaluations) != len(b.evaluations) or replayed.starts != b.starts:
            return

        def latents(side: Trajectory) -> list[torch.Tensor]:
            return [*(evaluation.x for evaluation in side.evaluations), side.final]

        xs, ours, theirs = latents(moved), latents(replayed), latents(b)
        result.local = 0.0
        for i, start in enumerate(b.starts):
            end = start + len(b.step_evaluations(i))
            for j in range(start, end):
                apart = relative(seen[j].denoised, b.evaluations[j].denoised)
                # with the predictions given, latents are linear in those that the step began with
                slope = (xs[j + 1] - ours[j + 1]).mean() / (xs[start] - ours[start]).mean()
                arisen = ours[j + 1] - slope * (ours[start] - theirs[start])
                step = relative(arisen, theirs[j + 1])
                result.local = max(result.local, apart, step)
                if apart > self.tolerance:
                    result.cause = self._prediction(i, seen[j], b.evaluations[j], b)
                    return
                if step > self.tolerance:
                    result.cause = self._update(i, replayed, b, setup, inner=j + 1 - start if j + 1 < end else 0)
                    return
        result.cause = None

    # --- what differs ---

    def _not_finite(self, i: int, a: Trajectory, b: Trajectory) -> Cause:
        """Whose latents or predictions are NaN or infinite in step i; i = -1 for the initial latents."""

        def finite(side: Trajectory) -> bool:
            tensors = [e.denoised for e in side.step_evaluations(i)] if i >= 0 else []
            return all(tensor.isfinite().all() for tensor in [*tensors, side.state(i + 1)])

        who = " and ".join(name for name, side in (("ours", a), ("theirs", b)) if not finite(side))
        return Cause("not finite", i + 1, b.levels[max(i, 0)], f"NaN or infinite numbers in {who}")

    def _initial(self, a: Trajectory, b: Trajectory) -> Cause:
        x, y = a.state(0), b.state(0)
        if not (x.isfinite().all() and y.isfinite().all()):
            return self._not_finite(-1, a, b)
        factor = ((x * y).sum() / (x * x).sum()).item()
        level = b.levels[0]
        first = a.evaluations[0].level
        if abs(first / b.evaluations[0].level - 1) > 1e-5:
            name = "t" if self.session.flux else "sigma"
            what = f"ours begins at {name} {first:.6g}, theirs at {b.evaluations[0].level:.6g}"
            churned = self.ours.options.get("s_churn") or self.theirs.options.get("s_churn")
            return Cause("noise levels", 0, level, what + (": s_churn adds noise first" if churned else ""))
        if relative(x * factor, y) < 1e-5:
            return Cause("initial scale", 0, level, f"theirs begins with {factor:.6g} times our initial latents")
        return Cause("initial noise", 0, level, "the initial latents are not multiples of each other")

    def _prediction(self, i: int, ours: Evaluation, theirs: Evaluation, b: Trajectory) -> Cause:
        """Why the network predicts something else from the same latents."""
        level, name = b.levels[i], "t" if self.session.flux else "sigma"
        if abs(ours.level / theirs.level - 1) > 1e-5:
            what = f"the network is asked at {name} {ours.level:.6g} by ours, at {theirs.level:.6g} by theirs"
            return Cause("noise levels", i + 1, level, what)
        exact, given = self.session.timestep_of(theirs.level), theirs.timestep
        what = f"the network gets timestep {ours.timestep:.6g} from ours and {given:.6g} from theirs"
        if abs(given - ours.timestep) < 1e-6:
            what = "the network predicts something else from the same latents and timestep"
            return Cause("prediction", i + 1, level, f"{what}: another conditioning or another type of prediction")
        whole = all(evaluation.timestep == round(evaluation.timestep) for evaluation in b.evaluations)
        off = [evaluation.timestep - self.session.timestep_of(evaluation.level) for evaluation in b.evaluations]
        if whole and -1.001 < min(off) < -0.5 and max(off) < 1e-3:
            return Cause("timestep", i + 1, level, f"{what}: theirs is cut off to a whole number")
        if given == round(given) and abs(given - exact) <= 0.501:
            return Cause("timestep", i + 1, level, f"{what}: theirs is rounded")
        if abs(given - exact) < 0.5:
            return Cause("timestep", i + 1, level, f"{what}: theirs is interpolated in another way")
        if self.session.flux:
            return Cause("timestep", i + 1, level, what)
        belongs = self.session.level_of(given)
        what += f", which belongs to {name} {belongs:.6g}, not to the {theirs.level:.6g} that the scheduler lists"
        return Cause("noise levels", i + 1, level, what)

    def _update(self, i: int, a: Trajectory, b: Trajectory, setup: Ours, inner: int = 0) -> Cause:
        """Why a step leads elsewhere from the same latents and predictions."""
        level, last = b.levels[i], i == len(b.starts) - 1
        kind = "last step" if last else "update"
        after = b.starts[i] + inner - 1 if inner else b.starts[i] + len(b.step_evaluations(i)) - 1
        target = b.evaluations[b.starts[i] + inner].x if inner else b.state(i + 1)
        mine = a.evaluations[a.starts[i] + inner].x if inner else a.state(i + 1)
        gap = relative(mine, target)
        past, name = max(self.tolerance, 1e-7) * 3, "t" if self.session.flux else "sigma"
        if last and b.levels[-1] == level:
            what = f"its list repeats the last {name}, so that theirs stays at {level:.4g} where ours goes to 0"
            return Cause(kind, i + 1, level, what)
        if not inner and abs(a.levels[i + 1] - b.levels[i + 1]) > 1e-5 * level:
            what = f"ours goes to {name} {a.levels[i + 1]:.6g}, theirs to {b.levels[i + 1]:.6g}"
            return Cause("noise levels", i + 1, level, what)
        if dtype := b.rounded.get(after):
            if gap < 2 * {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]:
                return Cause("rounding", i + 1, level, f"theirs rounds its latents to {dtype}")
        if (wrong := self._step_noise(i, a, b, setup, target, mine)) is not None:
            return Cause("step noise", i + 1, level, wrong)
        if inner:
            one, other = (side.step_evaluations(i)[inner] for side in (a, b))
            if abs(one.level / other.level - 1) > 1e-5:
                what = f"evaluation {inner + 1} of the step is at {name} {one.level:.6g} in ours"
                return Cause(kind, i + 1, level, f"the update itself: {what}, {other.level:.6g} in theirs")
        denoised = [evaluation.denoised for evaluation in b.evaluations]

        def ends_at(value: float) -> torch.Tensor:
            """Our state after the step, had its level been another."""
            levels = setup.levels.clone()
            levels[i + 1] = value
            replayed = self.session.replay(self.ours, replace(setup, levels=levels), denoised)
            if inner:
                return replayed.step_evaluations(i)[inner].x
            scale = math.sqrt((1 + setup.levels[i + 1].item() ** 2) / (1 + value**2)) if b.keeps_alpha_x else 1.0
            return replayed.state(i + 1) * scale

        def begins_at(value: float) -> torch.Tensor:
            """Our step from the same latents, had they been taken for those of another level."""
            levels = torch.cat([setup.levels[i : i + 1] * 0 + value, setup.levels[i + 1 : i + 2]])
            state = self._restarted(i, 0, b, replace(setup, levels=torch.cat([setup.levels[:i], levels])))
            if state is None:
                raise ValueError("the sampler can't begin here")  # suppressed below: no such level
            return state

        above = setup.levels[i - 1].item() if i else 4 * setup.levels[0].item()
        here, following = setup.levels[i].item(), setup.levels[i + 1].item()
        below = setup.levels[i + 2].item() if i + 2 < len(setup.levels) else 0.0
        tries = [(ends_at, "ends at", following, below, here)] if following > 0 else []
        tries += [] if inner or b.keeps_alpha_x else [(begins_at, "begins at", here, following, above)]
        for state, words, listed, low, high in tries:
            low = max(low, listed / 10)
            with contextlib.suppress(RuntimeError, ValueError, IndexError):
                found = minimize_scalar(
                    lambda log, state=state: relative(state(math.exp(log)), target),
                    bounds=(math.log(low) + 1e-9, math.log(high) - 1e-9),
                    method="bounded",
                    options={"xatol": 1e-11},
                )
                value = math.exp(found.x)
                if found.fun < min(past, gap / 10) and abs(value / listed - 1) > 1e-5:
                    what = f"the step {words} {name} {value:.6g}, where its levels say {listed:.6g}"
                    return Cause("noise levels", i + 1, level, what)
        if not inner:
            euler = self._euler(i, b)
            if euler is not None and relative(euler, target) < min(past, gap / 10):
                what = f"the update itself: theirs takes Euler's step to {name} {b.levels[i + 1]:.6g}"
                return Cause(kind, i + 1, level, f"{what}, order 1, ours corrects it by other predictions")
            for back in range(min(i, 2)):
                shorter = self._restarted(i, back, b, setup)
                if shorter is not None and relative(shorter, target) < min(past, gap / 10):
                    what = f"the update itself: theirs uses {back or 'none'} of the earlier predictions"
                    return Cause(kind, i + 1, level, f"{what}, a step of order {back + 1}")
        what = "the update itself, from the same latents, predictions and noise levels"
        return Cause(kind, i + 1, level, f"{what}: {name} {level:.6g} to {b.levels[i + 1]:.6g}")

    def _euler(self, i: int, b: Trajectory) -> torch.Tensor | None:
        """Euler's step from where step i of theirs began."""
        start = b.step_evaluations(i)[0]
        return start.denoised + b.levels[i + 1] / b.levels[i] * (start.x - start.denoised)

    def _restarted(self, i: int, back: int, b: Trajectory, setup: Ours) -> torch.Tensor | None:
        """Our step i with `back` earlier predictions in its memory."""
        first = i - back
        begin = b.starts[first]
        noise = {key - begin: value for key, value in (setup.noise or {}).items() if key >= begin}
        shorter = replace(setup, levels=setup.levels[first : i + 2], start=b.state(first), noise=noise)
        denoised = [evaluation.denoised for evaluation in b.evaluations[begin:]]
        with contextlib.suppress(RuntimeError, ValueError, IndexError):
            run = self.session.replay(self.ours, shorter, denoised)
            if back == 0:
                return run.final
            # with the predictions given, the latents before the last step are linear in those of the start
            probe = self.session.replay(self.ours, replace(shorter, start=shorter.start + 1), denoised)
            slope = (probe.state(back) - run.state(back)).mean()
            start = shorter.start + (b.state(i) - run.state(back)) / slope
            return self.session.replay(self.ours, replace(shorter, start=start), denoised).final
        return None

    def _step_noise(
        self, i: int, a: Trajectory, b: Trajectory, setup: Ours, target: torch.Tensor, mine: torch.Tensor
    ) -> str | None:
        """What is wrong with the step noise, if the difference looks like noise."""
        evaluations = range(a.starts[i], a.starts[i] + len(a.step_evaluations(i)))
        draws = [draw for j in evaluations for draw in a.noise.get(j, [])]
        if not a.noise and i in {self._step_of(b, j) for j in b.noise}:
            return "theirs adds step noise, ours none"
        rest = (target - mine).double().flatten()
        for draw in draws:
            draw = draw.double().flatten()
            factor = (rest @ draw) / (draw @ draw)
            if (rest - factor * draw).norm() < 1e-3 * rest.norm():
                silent = {j: [torch.zeros_like(d) for d in many] for j, many in a.noise.items() if j >= a.starts[i]}
                noise = {**a.noise, **silent}
                quiet = self.session.replay(
                    self.ours, replace(setup, noise=noise, noise_sampler=None), [e.denoised for e in b.evaluations]
                ).state(i + 1)
                amount = (mine - quiet).double().flatten() @ draw / (draw @ draw)
                if amount == 0:
                    return None
                return f"theirs adds the step noise {((amount + factor) / amount).item():.6g} times"
        if draws and not b.noise and not self.theirs.is_scheduler:
            return "theirs adds no step noise"
        if draws and not b.noise and setup.noise_sampler is None:
            return "theirs draws no step noise from the generator"
        if draws and setup.noise_sampler is None:
            # noise that is not ours: as strong, and not along it
            draw = draws[-1].double().flatten()
            theirs_missing = i not in {self._step_of(b, j) for j in b.noise}
            if theirs_missing:
                return "theirs draws no step noise from the generator in this step"
            kurtosis = (rest**4).mean() / (rest**2).mean() ** 2
            along = (rest @ draw) / (rest.norm() * draw.norm())
            if rest.numel() > 100 and abs(kurtosis - 3) < 0.5 and -0.9 < along < -0.5:
                return "theirs adds other step noise than the generator gave"
        return None

    def _step_of(self, b: Trajectory, evaluation: int) -> int:
        return sum(start <= evaluation for start in b.starts) - 1

    # --- the switches ---

    def try_switches(self, result: Result, a: Trajectory, b: Trajectory) -> list[Switch]:
        """The known switches, those first that fit the cause; the others only if none of them removes it."""
        if result.cause is None:
            return []
        likely, others = self._switches(result.cause, b)
        tried: list[Switch] = []
        for batch in (likely, others):
            tried += [self._try([switch], b) for switch in batch]
            if any(switch.removes for switch in tried):
                return tried
        # none alone: the one that takes them furthest, with each of the others, as long as that leads on
        sets = [[switch] for switch in likely + others]
        best, kept = max(zip(tried, sets), key=lambda pair: pair[0].reach, default=(None, []))
        while best is not None and best.parts is not None and best.parts > result.cause.step and len(kept) < 3:
            more = [[*kept, switch] for switch in likely + others if switch[:2] not in [old[:2] for old in kept]]
            further = [(self._try(switches, b), switches) for switches in more]
            next_best, next_kept = max(further, key=lambda pair: pair[0].reach, default=(best, kept))
            if next_best.reach[0] <= best.reach[0]:
                break
            tried.append(next_best)
            best, kept = next_best, next_kept
        return tried

    def _switches(self, cause: Cause, b: Trajectory) -> tuple[list[tuple], list[tuple]]:
        """(side, name, value) of each switch that the two sides have."""
        timesteps, steps = [], []
        if not self.session.flux:
            timesteps += [("ours", "quantize_timesteps", True), ("ours", "quantised sigmas", True)]
        timesteps.append(("ours", "timesteps of the other side", True))
        if self.theirs.is_scheduler:
            config = b.scheduler.config
            for name, values in KNOWN.items():
                if name in config:
                    steps += [("theirs", name, value) for value in values if value != config[name]]
        parameters = self.session.module.inspect.signature(self.ours.target).parameters
        if "solver_type" in parameters:
            now = self.ours.options.get("solver_type", parameters["solver_type"].default)
            steps += [("ours", "solver_type", value) for value in ("midpoint", "heun") if value != now]
        if cause.kind in ("timestep", "noise levels", "prediction"):
            return timesteps, steps
        return steps, timesteps

    def _try(self, switches: list[tuple], b: Trajectory) -> Switch:
        ours, changes, settings = self.ours, dict[str, Any](), dict[str, Any]()
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
            theirs = self.follow_theirs(changes) if changes else b
            if "timesteps" in settings:
                settings["timesteps"] = [evaluation.timestep for evaluation in theirs.evaluations]
            if "levels" in settings:
                settings["levels"] = self._quantised(self.setup(theirs).levels)
                settings["quantize"] = True
            setup = self.setup(theirs, **settings)
            a = self.session.follow_sampler(ours, setup)
            difference, parts = self.distance(a, theirs)
            if parts is not None and difference < 30 * self.tolerance:  # rounding, perhaps
                if Pair(self.session, ours, self.theirs, self.tolerance).compare(a, theirs, setup).cause is None:
                    parts = None
        except Refused:
            difference, parts = math.inf, 0
        return Switch(words, sides, difference, parts)

    def _quantised(self, levels: torch.Tensor) -> torch.Tensor:
        trained = self.session.trained()
        levels = levels.clone()
        for i, level in enumerate(levels.tolist()):
            if level > 0:
                levels[i] = trained[(trained.log() - math.log(level)).abs().argmin()]
        return levels

    def distance(self, a: Trajectory, b: Trajectory) -> tuple[float, int | None]:
        """The largest difference of two trajectories, and the step of the first one past the tolerance."""
        if len(a.levels) != len(b.levels):
            return math.inf, 0
        values = [(relative(a.state(0), b.state(0)), 0)]
        for i in range(len(b.starts)):
            pairs = zip(a.step_evaluations(i), b.step_evaluations(i))
            values += [(relative(one.denoised, other.denoised), i + 1) for one, other in pairs]
            values.append((relative(a.state(i + 1), b.state(i + 1)), i + 1))
        past = [step for value, step in values if not value <= self.tolerance]
        return max(math.inf if math.isnan(value) else value for value, _ in values), past[0] if past else None


KNOWN = {
    "final_sigmas_type": ("zero", "sigma_min"),
    "euler_at_final": (True, False),
    "lower_order_final": (True, False),
    "solver_type": ("midpoint", "heun"),
    "clip_sample": (False,),
    "thresholding": (False,),
}


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
        found = asked[(asked.double() - float(sigma)).abs().argmin()]
        return found if abs(found.item() / float(sigma) - 1) < 1e-5 else torch.as_tensor(float(sigma))

    return lambda sigma, sigma_next: tree(nearest(sigma), nearest(sigma_next))


def compare_sides(session: Session, ours: Side, theirs: Side, tolerance: float, truths: dict | None = None):
    """One comparison: the result and both trajectories.

    Args:
        truths: solutions that were found before, by what they depend on; None: don't look for the truth.
    """
    pair = Pair(session, ours, theirs, tolerance)
    a, b, setup = pair.run()
    result = pair.compare(a, b, setup)
    if session.options.switches:
        result.switches = pair.try_switches(result, a, b)
    if result.cause is not None and truths is not None:
        result.truth = solve(session, (ours, theirs), setup, a, b, truths)
    result.verdict = verdict(result, session)
    return result, a, b


# --- words -----------------------------------------------------------------------------------------------------------


def verdict(result: Result, session: Session) -> str:
    """The result in a few sentences."""
    cause, name = result.cause, "t" if session.flux else "sigma"
    if cause is None and result.local is not None:
        return (
            f"identical to rounding (each step by itself to {result.local:.1e}, tolerance {result.tolerance:.0e}; over"
            f" {result.steps} steps the network makes {result.largest:.1e} of it)"
        )
    if cause is None:
        return f"identical to rounding (largest difference {result.largest:.1e}, tolerance {result.tolerance:.0e})"
    if cause.step == 0:
        where = f"part before the first step ({name} {cause.level:.4g})"
    else:
        where = f"part at step {cause.step} of {result.steps} ({name} {cause.level:.4g})"
    words = [f"{where}: {cause.kind}. {cause.what[0].upper()}{cause.what[1:]}."]
    removing = [switch for switch in result.switches if switch.removes]
    if removing:
        tried = "; ".join(f"{switch.name} ({switch.side}): {switch.difference:.1e}" for switch in removing)
        words.append(f"Removed by {tried}.")
    elif result.switches:
        best = max(result.switches, key=lambda switch: switch.reach)
        words.append(f"None of the {len(result.switches)} switches tried removes it.")
        if best.reach[0] > cause.step:
            words.append(f"The furthest goes {best.name} ({best.side}), with which they part at step {best.parts}.")
    if result.truth is not None:
        words.append(result.truth.words())
    return " ".join(words)


def table(result: Result, session: Session) -> str:
    """The steps as text, the first one past the tolerance marked."""
    name = "t" if session.flux else "sigma"
    lines = [
        f"{'step':>4}  {name:>9}  {'timestep, ours':>17}  {'timestep, theirs':>17}  {'latents':>8}  {'denoised':>8}"
    ]
    lines.append(f"{'':>4}  {'':>9}  {'':>17}  {'initial':>17}  {result.initial:8.1e}")
    marked = result.cause.step if result.cause else None
    for row in result.rows:
        timesteps = ["/".join(f"{t:.2f}".rstrip("0").rstrip(".") for t in side) for side in row.timesteps]
        mark = " <-- parts here" if row.step == marked else ""
        differences = f"{row.latents:8.1e}  {row.denoised:8.1e}"
        lines.append(f"{row.step:4}  {row.level:9.5f}  {timesteps[0]:>17}  {timesteps[1]:>17}  {differences}{mark}")
    return "\n".join(lines)


def as_json(result: Result) -> dict[str, Any]:
    """All of it, for `--json`."""
    whole = asdict(result)
    for switch, written in zip(result.switches, whole["switches"]):
        written["removes"] = switch.removes
    if result.truth is not None:
        whole["truth"]["nearer"] = result.truth.nearer
    whole = {"verdict": result.verdict, "identical": result.cause is None, "largest": result.largest, **whole}
    return json.loads(json.dumps(whole), parse_constant=lambda _: None)  # JSON has no NaN and no Infinity


# --- the command -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, family: Family) -> int:
    """`compare.py`. Exit status: 0 within the tolerance, 1 past it, 2 on bad input."""
    try:
        return _run(options, family)
    except Refused as refused:
        print(f"{Path(sys.argv[0]).name}: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace, family: Family) -> int:
    for path in (options.json, options.html):
        if path not in (None, "-") and not Path(path).resolve().parent.is_dir():
            raise Refused(f"can't write {path}: there is no folder {Path(path).resolve().parent}")
    try:
        module = importlib.import_module(family.module)
    except ImportError as error:
        raise Refused(str(error)) from error
    if options.all:
        from gallery.parity import write_parity

        return write_parity(options)
    if options.against is None:
        raise Refused("--against: name a scheduler, a sampler or a function, or use --all")
    ours, theirs = find_side(options.sampler, module, "--sampler"), find_side(options.against, module, "--against")
    if ours.is_scheduler:
        raise Refused("--sampler: has to be a sampler; name the scheduler with --against")
    try:
        module.check_schedule(options.schedule)
    except ValueError as error:
        raise Refused(str(error).replace("`schedule`", "--schedule")) from None
    session = Session(family, module, options)
    tolerance = options.tolerance or tolerance_of(session.network.dtype)
    with torch.no_grad():
        result, a, b = compare_sides(session, ours, theirs, tolerance, {} if options.truth else None)
    out = sys.stderr if options.json == "-" else sys.stdout
    print(f"ours    {result.ours}\ntheirs  {result.theirs}\n", file=out)
    print(table(result, session), file=out)
    for note in result.notes:
        print(f"note: {note}", file=out)
    print(f"\n{result.verdict}", file=out)
    if options.json:
        text = json.dumps(as_json(result), indent=1)
        if options.json == "-":
            print(text)
        else:
            write_text(Path(options.json), text + "\n")
    if options.html:
        from gallery.report import report

        write_text(Path(options.html), report(session, result, a, b))
        print(f"report in {options.html}", file=out)
    return int(result.cause is not None)


def tolerance_of(dtype: torch.dtype) -> float:
    """Below this, a difference is rounding: of diffusers' float32 sigmas for a float64 network, else of the network."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 2e-2)


def write_text(path: Path, text: str) -> None:
    """Writes `text`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise Refused(f"can't write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
