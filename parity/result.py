"""What a comparison found, as data and in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gallery.pictures import write_whole
from gallery.refused import Refused


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """||ours - theirs|| / ||theirs||. NaN where one of them is not finite."""
    ours, theirs = ours.cpu().double(), theirs.cpu().double()  # in this order: Apple's GPU has no float64
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def write_text(path: Path, text: str) -> None:
    """Writes `text`, whole or not at all."""
    try:
        write_whole(path, lambda new: new.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise Refused(f"can't write {path}: {error.strerror}") from None


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """One call of the network: at which level and timestep, on which x, and what was predicted."""

    level: float
    timestep: float
    x: torch.Tensor
    denoised: torch.Tensor


@dataclass
class Trajectory:
    """What one side did.

    Args:
        levels: where its steps begin and the last one ends, n + 1 of them.
        evaluations: in order; step i begins with evaluations[starts[i]].
        final: the latents at levels[-1].
        noise: step noise by the evaluation after which it was drawn, in the order of the draws.
        scheduler: a fresh one with its timesteps set, where the side is one of diffusers.
        notes: what was seen on the way and is worth telling.
        rounded: the shorter dtype that the latents after an evaluation fit into, by evaluation.
        keeps_alpha_x: the side itself keeps x / sqrt(sigma^2 + 1), as DPM-Solver's schedulers do.
    """

    levels: list[float]
    evaluations: list[Evaluation]
    starts: list[int]
    final: torch.Tensor
    noise: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    scheduler: Any = None
    notes: list[str] = field(default_factory=list)
    rounded: dict[int, str] = field(default_factory=dict)
    keeps_alpha_x: bool = False

    def state(self, i: int) -> torch.Tensor:
        """The latents that step i begins with; those of the end for i = n."""
        return self.evaluations[self.starts[i]].x if i < len(self.starts) else self.final

    def step_evaluations(self, i: int) -> list[Evaluation]:
        """The evaluations of step i."""
        end = self.starts[i + 1] if i + 1 < len(self.starts) else len(self.evaluations)
        return self.evaluations[self.starts[i] : end]


@dataclass(frozen=True)
class Ours:
    """How our side runs: over which levels, from which latents, with which step noise.

    Args:
        levels: in the common coordinates, float64.
        start: latents at levels[0].
        noise: step noise by evaluation, another sampler's; or None.
        noise_sampler: step noise as a function of two sigmas of the sampler; or None.
        quantize: round to the trained timesteps (SDXL).
        timesteps: what to give to the network, whatever the sigma, an entry for each evaluation, None for sigma's own.
        flow: FLUX's sampler sees t, whatever is asked for otherwise.
        keep: the evaluations; not those of a very fine run.
    """

    levels: torch.Tensor
    start: torch.Tensor
    noise: dict[int, list[torch.Tensor]] | None = None
    noise_sampler: Callable | None = None
    quantize: bool = False
    timesteps: list[float | None] | None = None
    flow: bool = False
    keep: bool = True


class Record:
    """What a sampler of ours did, in its own coordinates."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, float, torch.Tensor]] = []
        self.starts: list[int] = []
        self.noise: dict[int, list[torch.Tensor]] = {}
        self.unmatched: list[int] = []
        self.draws = 0
        self.final = torch.empty(0)

    def trajectory(self, levels: torch.Tensor, timesteps: list[float], ve: bool) -> Trajectory:
        """The same in the common coordinates."""
        evaluations = []
        for (x, sigma, denoised), timestep in zip(self.calls, timesteps):
            x, level = (x / (1 + sigma), sigma / (1 + sigma)) if ve else (x, sigma)
            evaluations.append(Evaluation(level, timestep, x, denoised))
        notes = []
        complete = len(self.starts) == len(levels) - 1
        starts = self.starts if complete else list(range(len(evaluations)))
        step_levels = [evaluations[i].level for i in starts] + [levels[-1].item()]
        # a sampler that says where its steps begin takes them over the levels; another may have placed its own
        if complete or (len(step_levels) == len(levels) and np.allclose(step_levels, levels, rtol=1e-4)):
            step_levels = levels.tolist()
        else:
            notes.append(
                "the k-diffusion sampler does not step over the levels given; each evaluation counts as a step"
            )
        final = self.final
        if ve and levels[-1] > 0:
            final = final * (1 - levels[-1].item())
        if self.unmatched:
            count = len(set(self.unmatched))
            notes.append(f"the k-diffusion sampler adds noise in {count} steps where the other side drew none")
        return Trajectory(step_levels, evaluations, starts, final, self.noise, notes=notes)


# --- what differs ----------------------------------------------------------------------------------------------------


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
        size: of the difference that arises there, where each step was looked at by itself.
    """

    kind: str
    step: int
    level: float
    what: str
    size: float = math.nan


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
class Truth:
    """How far the final latents of each side are from the fine solution, relative to its norm.

    Args:
        equation: "ODE", "SDE", or why there is no truth to speak of.
        apart: how far the sides are from each other, relative to the same norm.
        error: of the fine solution itself, estimated.
        evaluations: of the network, in all fine runs.
        stopped: whether the time was over before the error was small enough to tell the sides apart.
    """

    equation: str
    ours: float = math.nan
    theirs: float = math.nan
    apart: float = math.nan
    error: float = math.nan
    evaluations: int = 0
    stopped: bool = False

    @property
    def nearer(self) -> str | None:
        """ "ours", "theirs", or None if the fine solution can't tell."""
        # |a - T|^2 - |b - T|^2 changes by 2 <a - b, e> when T is off by e: by 2 |a - b| |e| at most
        if not abs(self.ours**2 - self.theirs**2) > 2 * self.apart * self.error:
            return None
        return "ours" if self.ours < self.theirs else "theirs"

    def words(self) -> str:
        """For the verdict."""
        if math.isnan(self.ours):
            return f"Distance from the truth: {self.equation}."
        who = {"ours": "k-diffusion's", "theirs": "theirs", None: "neither, as far as can be told"}[self.nearer]
        known = f"the solution is known to {self.error:.0e} after {self.evaluations} evaluations"
        if self.stopped and self.nearer is None:
            known += "; more of them take more --truth-seconds"
        return (
            f"Nearer to the {self.equation} solved finely: {who} (distance of ours {self.ours:.2e}, of theirs"
            f" {self.theirs:.2e}; {known})."
        )


@dataclass
class Result:
    """All of one comparison.

    Args:
        level_name: "sigma", or FLUX's "t".
        initial, final: difference of the first and of the last latents.
        cause: of the first difference past the tolerance; None if there is none.
        others: differences of other kinds that remain when that one is removed, each at its first step.
        local: the largest difference that arises within one step, where only these tell whether it is rounding.
    """

    ours: str
    theirs: str
    steps: int
    tolerance: float
    level_name: str
    initial: float = 0.0
    rows: list[Row] = field(default_factory=list)
    final: float = 0.0
    cause: Cause | None = None
    others: list[Cause] = field(default_factory=list)
    local: float | None = None
    switches: list[Switch] = field(default_factory=list)
    truth: Truth | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """The largest difference of all."""
        values = [self.initial, self.final, *(max(row.latents, row.denoised) for row in self.rows)]
        return math.inf if any(math.isnan(value) for value in values) else max(values)

    @property
    def verdict(self) -> str:
        """All that is known, in a few sentences."""
        parts = (self.parting(), self.removal(), self.truth.words() if self.truth else "")
        return " ".join(part for part in parts if part)

    def parting(self) -> str:
        """Where the sides part and why; or that they don't."""
        tolerance = f"tolerance {self.tolerance:.0e}"
        if self.cause is None and self.local is not None:
            return (
                f"identical to rounding (each step by itself to {self.local:.1e}, {tolerance}; over {self.steps} steps"
                f" the network makes {self.largest:.1e} of it)"
            )
        if self.cause is None:
            return f"identical to rounding (largest difference {self.largest:.1e}, {tolerance})"
        return " ".join(
            [f"part {self._describe(self.cause)}", *(f"Also {self._describe(cause)}" for cause in self.others)]
        )

    def _describe(self, cause: Cause) -> str:
        size = "" if math.isnan(cause.size) else f", {cause.size:.0e}"
        at = f"({self.level_name} {cause.level:.4g}{size}): {cause.kind}. {cause.what[0].upper()}{cause.what[1:]}."
        return f"at step {cause.step} of {self.steps} {at}" if cause.step else f"before the first step {at}"

    def removal(self) -> str:
        """What the switches did."""
        if removing := [switch for switch in self.switches if switch.removes]:
            tried = "; ".join(f"{switch.name} ({switch.side}): {switch.difference:.1e}" for switch in removing)
            return f"Removed by {tried}."
        if not self.switches or self.cause is None:
            return ""
        best = max(self.switches, key=lambda switch: switch.reach)
        words = f"None of the {len(self.switches)} switches tried removes it."
        if best.reach[0] > self.cause.step:
            words += f" The furthest goes {best.name} ({best.side}), with which they part at step {best.parts}."
        return words

    def table(self) -> str:
        """The steps as text, those marked at which the sides part."""
        heads = (f"{self.level_name:>9}", f"{'timestep, ours':>17}", f"{'timestep, theirs':>17}")
        lines = ["  ".join([f"{'step':>4}", *heads, f"{'latents':>8}", f"{'denoised':>8}"])]
        lines.append(f"{'':>4}  {'':>9}  {'':>17}  {'initial':>17}  {self.initial:8.1e}")
        marks = {cause.step: f" <-- {cause.kind}" for cause in reversed(self.others)}
        marks |= {self.cause.step: " <-- parts here"} if self.cause else {}
        for row in self.rows:
            ours, theirs = ("/".join(f"{t:.2f}".rstrip("0").rstrip(".") for t in side) for side in row.timesteps)
            differences = f"{row.latents:8.1e}  {row.denoised:8.1e}"
            mark = marks.get(row.step, "")
            lines.append(f"{row.step:4}  {row.level:9.5f}  {ours:>17}  {theirs:>17}  {differences}{mark}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """All of it. What is not finite is None, since JSON has no NaN and no Infinity."""
        whole = asdict(self)
        for switch, written in zip(self.switches, whole["switches"]):
            written["removes"] = switch.removes
        if self.truth is not None:
            whole["truth"]["nearer"] = self.truth.nearer
        whole = {"verdict": self.verdict, "identical": self.cause is None, "largest": self.largest, **whole}
        return json.loads(json.dumps(whole), parse_constant=lambda _: None)
