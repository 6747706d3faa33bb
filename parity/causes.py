"""Why two trajectories part at a step."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import torch
from scipy.optimize import minimize_scalar

from parity.follow import Session
from parity.result import Cause, Evaluation, Ours, Trajectory, relative
from parity.sides import Side


class Causes:
    """Names what differs between a run of ours and one of theirs, from the state where they part."""

    def __init__(self, session: Session, ours: Side, theirs: Side, tolerance: float):
        self.session, self.ours, self.theirs, self.tolerance = session, ours, theirs, tolerance

    def not_finite(self, i: int, a: Trajectory, b: Trajectory) -> Cause:
        """Whose latents or predictions are NaN or infinite in step i; i = -1 for the initial latents."""

        def finite(side: Trajectory) -> bool:
            tensors = [e.denoised for e in side.step_evaluations(i)] if i >= 0 else []
            return all(tensor.isfinite().all() for tensor in [*tensors, side.state(i + 1)])

        who = " and ".join(name for name, side in (("ours", a), ("theirs", b)) if not finite(side))
        return Cause("not finite", i + 1, b.levels[max(i, 0)], f"NaN or infinite numbers in {who}")

    def initial(self, a: Trajectory, b: Trajectory) -> Cause:
        x, y = a.state(0), b.state(0)
        if not (x.isfinite().all() and y.isfinite().all()):
            return self.not_finite(-1, a, b)
        factor = ((x * y).sum() / (x * x).sum()).item()
        level = b.levels[0]
        first = a.evaluations[0].level
        if abs(first / b.evaluations[0].level - 1) > 1e-5:
            name = self.session.level_name
            what = f"ours begins at {name} {first:.6g}, theirs at {b.evaluations[0].level:.6g}"
            churned = self.ours.options.get("s_churn") or self.theirs.options.get("s_churn")
            return Cause("noise levels", 0, level, what + (": s_churn adds noise first" if churned else ""))
        if relative(x * factor, y) < 1e-5:
            return Cause("initial scale", 0, level, f"theirs begins with {factor:.6g} times our initial latents")
        return Cause("initial noise", 0, level, "the initial latents are not multiples of each other")

    def prediction(self, i: int, ours: Evaluation, theirs: Evaluation, b: Trajectory) -> Cause:
        """Why the network predicts something else from the same latents."""
        level, name = b.levels[i], self.session.level_name
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

    def update(self, i: int, a: Trajectory, b: Trajectory, setup: Ours, inner: int = 0) -> Cause:
        """Why a step leads elsewhere from the same latents and predictions."""
        level, last = b.levels[i], i == len(b.starts) - 1
        kind = "last step" if last else "update"
        after = b.starts[i] + inner - 1 if inner else b.starts[i] + len(b.step_evaluations(i)) - 1
        target = b.evaluations[b.starts[i] + inner].x if inner else b.state(i + 1)
        ours = a.evaluations[a.starts[i] + inner].x if inner else a.state(i + 1)
        gap = relative(ours, target)
        past, name = max(self.tolerance, 1e-7) * 3, self.session.level_name
        if last and b.levels[-1] == level:
            what = f"its list repeats the last {name}, so that theirs stays at {level:.4g} where ours goes to 0"
            return Cause(kind, i + 1, level, what)
        if not inner and abs(a.levels[i + 1] - b.levels[i + 1]) > 1e-5 * level:
            what = f"ours goes to {name} {a.levels[i + 1]:.6g}, theirs to {b.levels[i + 1]:.6g}"
            return Cause("noise levels", i + 1, level, what)
        if dtype := b.rounded.get(after):
            if gap < 2 * {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]:
                return Cause("rounding", i + 1, level, f"theirs rounds its latents to {dtype}")
        if (wrong := self._step_noise(i, a, b, setup, target, ours)) is not None:
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
                    options={"xatol": 1e-9},
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
        self, i: int, a: Trajectory, b: Trajectory, setup: Ours, target: torch.Tensor, ours: torch.Tensor
    ) -> str | None:
        """What is wrong with the step noise, if the difference looks like noise."""
        evaluations = range(a.starts[i], a.starts[i] + len(a.step_evaluations(i)))
        draws = [draw for j in evaluations for draw in a.noise.get(j, [])]
        if not a.noise and i in {self._step_of(b, j) for j in b.noise}:
            return "theirs adds step noise, ours none"
        rest = (target - ours).cpu().double().flatten()
        for draw in draws:
            draw = draw.cpu().double().flatten()
            factor = (rest @ draw) / (draw @ draw)
            if (rest - factor * draw).norm() < 1e-3 * rest.norm():
                silent = {j: [torch.zeros_like(d) for d in many] for j, many in a.noise.items() if j >= a.starts[i]}
                noise = {**a.noise, **silent}
                quiet = self.session.replay(
                    self.ours, replace(setup, noise=noise, noise_sampler=None), [e.denoised for e in b.evaluations]
                ).state(i + 1)
                amount = (ours - quiet).cpu().double().flatten() @ draw / (draw @ draw)
                if amount == 0:
                    return None
                return f"theirs adds the step noise {((amount + factor) / amount).item():.6g} times"
        if draws and not b.noise and not self.theirs.is_scheduler:
            return "theirs adds no step noise"
        if draws and not b.noise and setup.noise_sampler is None:
            return "theirs draws no step noise from the generator"
        if draws and setup.noise_sampler is None:
            # noise that is not ours: as strong, and not along it
            draw = draws[-1].cpu().double().flatten()
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
