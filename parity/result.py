"""What a comparison found, as data and in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gallery.pictures import write_whole
from gallery.refused import refusing


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """||ours - theirs|| / ||theirs||. NaN where one of them is not finite."""
    ours, theirs = ours.cpu().double(), theirs.cpu().double()  # in this order: Apple's GPU has no float64
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def write_text(path: Path, text: str) -> None:
    """Writes `text`, whole or not at all."""
    with refusing(OSError, text=lambda error: f"can't write {path}: {error.strerror}"):
        write_whole(path, lambda new: new.write_text(text, encoding="utf-8"))


@dataclass
class Evaluation:
    """One call of the network."""

    level: float
    timestep: float
    x: torch.Tensor
    denoised: torch.Tensor


@dataclass
class Trajectory:
    """What one side did, in the coordinates of `parity.follow`."""

    levels: list[float]  # where its steps begin and the last one ends, n + 1 of them
    evaluations: list[Evaluation]
    starts: list[int]  # step i begins with evaluations[starts[i]]
    final: torch.Tensor  # the latents at levels[-1]
    noise: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # by the evaluation after which it was drawn
    scheduler: Any = None  # with its timesteps set and not run, where the side is a scheduler
    keeps_alpha_x: bool = False  # the scheduler keeps x / sqrt(sigma^2 + 1), as DPM-Solver's do
    written: list[str] = field(default_factory=list)  # what the side was given and wrote on

    def state(self, i: int, inner: int = 0) -> torch.Tensor:
        """The latents of step i at its first or an inner evaluation, for i = n the final ones."""
        return self.evaluations[self.starts[i] + inner].x if i < len(self.starts) else self.final

    def span(self, i: int) -> range:
        """The indices of the evaluations of step i."""
        return range(*[*self.starts, len(self.evaluations)][i : i + 2])

    def step_evaluations(self, i: int) -> list[Evaluation]:
        """The evaluations of step i."""
        return [self.evaluations[j] for j in self.span(i)]


@dataclass(frozen=True)
class Ours:
    """How our side runs."""

    levels: torch.Tensor  # float64
    start: torch.Tensor  # latents at levels[0]
    noise: dict[int, list[torch.Tensor]] | None = None  # step noise by evaluation; None: from the pipeline's generator
    noise_sampler: Callable | None = None  # step noise as a function of two sigmas of the sampler
    quantize: bool = False  # round to the trained timesteps (SDXL)
    timesteps: list[float | None] | None = None  # for the network, by evaluation; None: the sigma's own
    flow: bool = False  # FLUX's sampler sees t, whatever the options say
    keep: bool = True  # the evaluations; a very fine run has too many


@dataclass
class Row:
    """One step. Differences are relative, ||ours - theirs|| / ||theirs||."""

    step: int  # from 1
    level: float  # sigma (FLUX: t) that it begins at
    timesteps: tuple[list[float], list[float]]  # that each side gave to the network, by evaluation
    latents: float  # difference after the step
    denoised: float  # the largest difference of the step's predictions

    def cells(self) -> list[str]:
        """The step, level, timesteps of both sides and differences as text."""
        timesteps = ("/".join(f"{t:.2f}".rstrip("0").rstrip(".") for t in side) for side in self.timesteps)
        return [f"{self.step}", f"{self.level:.5f}", *timesteps, f"{self.latents:.1e}", f"{self.denoised:.1e}"]


@dataclass
class Cause:
    """What differs where two trajectories diverge."""

    kind: str  # "initial scale" or "noise", "noise levels", "timestep", "prediction", "update", ...
    step: int  # from 1; 0 for the initial latents
    level: float  # that the step begins at
    what: str
    size: float = math.nan  # of the difference that arises in this step, where each step was compared by itself


@dataclass
class Switch:
    """A known switch that was tried, or several at once."""

    name: str
    side: str  # "ours" or "theirs"
    difference: float  # the largest that is left
    parts: int | None  # the step at which the sides still diverge, from 1; 0: the initial latents; None: they agree

    @property
    def removes(self) -> bool:
        return self.parts is None

    @property
    def reach(self) -> tuple[float, float]:
        """Greater for a switch with which the sides agree for longer."""
        return (math.inf if self.parts is None else self.parts, -self.difference)


@dataclass
class Truth:
    """How far the final latents of each side are from the fine solution, relative to its norm."""

    equation: str  # "ODE", "SDE", or why there is no fine solution
    ours: float = math.nan
    theirs: float = math.nan
    apart: float = math.nan  # distance of the sides, relative to the same norm
    error: float = math.nan  # of the fine solution itself, estimated

    @property
    def nearer(self) -> str | None:
        """ "ours", "theirs", or None if the fine solution is too rough to decide."""
        # |a - T|^2 - |b - T|^2 changes by 2 <a - b, e> when T is off by e: by 2 |a - b| |e| at most
        if not abs(self.ours**2 - self.theirs**2) > 2 * self.apart * self.error:
            return None
        return "ours" if self.ours < self.theirs else "theirs"

    def words(self) -> str:
        """For the verdict."""
        if math.isnan(self.ours):
            return f"Distance from the truth: {self.equation}."
        who = {"ours": "k-diffusion's", "theirs": "theirs", None: "neither, as far as can be known"}[self.nearer]
        distances = f"distance of ours {self.ours:.2e}, of theirs {self.theirs:.2e}"
        known = f"the solution is known to {self.error:.0e}"
        return f"Nearer to the {self.equation} solved finely: {who} ({distances}; {known})."


@dataclass
class Result:
    """All of one comparison."""

    ours: str
    theirs: str
    steps: int
    tolerance: float
    level_name: str  # "sigma", or FLUX's "t"
    initial: float = 0.0  # difference of the first latents
    rows: list[Row] = field(default_factory=list)
    final: float = 0.0  # difference of the last latents
    cause: Cause | None = None  # of the first difference above the tolerance
    others: list[Cause] = field(default_factory=list)  # of other kinds, which remain without it, each at its first step
    local: float | None = None  # the largest difference that arises within one step, where this decides on rounding
    switches: list[Switch] = field(default_factory=list)
    truth: Truth | None = None

    @property
    def largest(self) -> float:
        """The largest difference of all."""
        values = [self.initial, self.final, *(max(row.latents, row.denoised) for row in self.rows)]
        return math.inf if any(math.isnan(value) for value in values) else max(values)

    @property
    def verdict(self) -> str:
        """All that is known, in a few sentences."""
        return " ".join(filter(None, (self.parting(), self.removal(), self.truth.words() if self.truth else "")))

    def parting(self) -> str:
        """Where the sides diverge and why, or that they agree."""
        if self.cause is not None:
            first, *more = (self._describe(cause) for cause in (self.cause, *self.others))
            return " ".join([f"diverge {first}", *(f"Also {words}" for words in more)])
        tolerance = f"tolerance {self.tolerance:.0e}"
        if self.local is None:
            return f"identical to rounding (largest difference {self.largest:.1e}, {tolerance})"
        whole = f"over {self.steps} steps the network makes {self.largest:.1e} of it"
        return f"identical to rounding (each step by itself to {self.local:.1e}, {tolerance}; {whole})"

    def _describe(self, cause: Cause) -> str:
        where = f"at step {cause.step} of {self.steps}" if cause.step else "before the first step"
        size = "" if math.isnan(cause.size) else f", {cause.size:.0e}"
        level = f"({self.level_name} {cause.level:.4g}{size})"
        return f"{where} {level}: {cause.kind}. {cause.what[0].upper()}{cause.what[1:]}."

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
            words += f" The furthest goes {best.name} ({best.side}), with which they diverge at step {best.parts}."
        return words

    def table(self) -> str:
        """The steps as text, with marks where the sides diverge."""
        marks = {cause.step: f" <-- {cause.kind}" for cause in reversed(self.others)}
        marks |= {self.cause.step: " <-- diverges here"} if self.cause else {}
        heads = ["step", self.level_name, "timestep, ours", "timestep, theirs", "latents", "denoised"]
        lines = [(heads, ""), (["", "", "", "initial", f"{self.initial:.1e}"], "")]
        lines += [(row.cells(), marks.get(row.step, "")) for row in self.rows]
        widths = (4, 9, 17, 17, 8, 8)
        return "\n".join("  ".join(f"{cell:>{n}}" for cell, n in zip(cells, widths)) + mark for cells, mark in lines)

    def as_json(self) -> dict[str, Any]:
        """All of it. What is not finite is None, since JSON has no NaN and no Infinity."""
        whole = {"verdict": self.verdict, "identical": self.cause is None, "largest": self.largest, **asdict(self)}
        whole["switches"] = [{**asdict(switch), "removes": switch.removes} for switch in self.switches]
        whole["truth"] = self.truth and {**asdict(self.truth), "nearer": self.truth.nearer}
        return without_nan(whole)


def without_nan(data: Any) -> Any:
    """Data for JSON, which has no NaN and no Infinity: None stands for them."""
    return json.loads(json.dumps(data), parse_constant=lambda _: None)
