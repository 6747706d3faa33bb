"""The same ODE or SDE solved finely, and how far each side ends from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from gallery.follow import Ours, Session, Trajectory
from gallery.sides import Side

ODE_SPLITS = (1, 2, 4)
SDE_SPLITS = (4, 8, 16)


@dataclass
class Truth:
    """How far the final latents of each side are from the fine solution, relative to its norm.

    Args:
        equation: "ODE", "SDE", or why there is no truth to speak of.
        error: of the fine solution itself, by the change of its last refinement.
        evaluations: of the network in its finest run.
    """

    equation: str
    ours: float = math.nan
    theirs: float = math.nan
    error: float = math.nan
    evaluations: int = 0

    @property
    def nearer(self) -> str | None:
        """ "ours", "theirs", or None if the fine solution can't tell."""
        if not abs(self.ours - self.theirs) > self.error:
            return None
        return "ours" if self.ours < self.theirs else "theirs"

    def words(self) -> str:
        """For the verdict."""
        if math.isnan(self.ours):
            return f"Distance from the truth: {self.equation}."
        who = {"ours": "k-diffusion's", "theirs": "theirs", None: "neither, as far as can be told"}[self.nearer]
        return (
            f"Nearer to the {self.equation} solved finely: {who} (distance of ours {self.ours:.2e}, of theirs"
            f" {self.theirs:.2e}; the solution is known to {self.error:.0e})."
        )


@torch.no_grad()
def sample_rk4(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The classical Runge-Kutta method of order 4 on dx/dsigma = (x - denoised) / sigma; Euler's step to zero."""
    ones = x.new_ones([x.shape[0]])

    def slope(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (x - model(x, sigma * ones)) / sigma

    for sigma, following in zip(sigmas, sigmas[1:]):
        h = following - sigma
        k1 = slope(x, sigma)
        if following > 0:
            k2 = slope(x + h / 2 * k1, sigma + h / 2)
            k3 = slope(x + h / 2 * k2, sigma + h / 2)
            k4 = slope(x + h * k3, following)
            k1 = (k1 + 2 * k2 + 2 * k3 + k4) / 6
        x = x + h * k1
    return x


def split(levels: torch.Tensor, pieces: int, tail: int = 0) -> torch.Tensor:
    """Each interval of positive levels in `pieces`, evenly in log; `tail` more before zero, a quarter each time."""
    positive = levels[levels > 0]
    if levels[-1] == 0 and tail:
        positive = torch.cat([positive, positive[-1] / 4.0 ** torch.arange(1, tail + 1, dtype=levels.dtype)])
    logs = positive.log()
    shares = torch.arange(pieces, dtype=levels.dtype) / pieces
    fine = (logs[:-1, None] + (logs[1:] - logs[:-1])[:, None] * shares).flatten().exp()
    ends = [positive[-1:]] + ([levels.new_zeros(1)] if levels[-1] == 0 else [])
    fine = torch.cat([fine, *ends])
    fine[0] = levels[0]
    return fine


class Path:
    """A Brownian path over the positive levels that has the given step noise, refined by bridges.

    Args:
        levels: positive, falling.
        noise: of unit variance, one for each interval.
    """

    def __init__(self, levels: torch.Tensor, noise: list[torch.Tensor], seed: int):
        self.levels, self.generator = levels, torch.Generator("cpu").manual_seed(seed)
        self.w = [torch.zeros_like(noise[0])]
        for draw, high, low in zip(noise, levels, levels[1:]):
            self.w.append(self.w[-1] + draw * (high - low).sqrt().item())

    def halve(self) -> None:
        """Puts a level between every two, in the middle of their logs, and the path's value there."""
        levels, w = [self.levels[0]], [self.w[0]]
        for i in range(len(self.levels) - 1):
            high, low = self.levels[i].item(), self.levels[i + 1].item()
            middle = math.sqrt(high * low)
            share = (high - middle) / (high - low)
            draw = torch.randn(w[0].shape, generator=self.generator, dtype=torch.float64).to(w[0])
            spread = math.sqrt((high - middle) * (middle - low) / (high - low))
            w += [self.w[i] + share * (self.w[i + 1] - self.w[i]) + spread * draw, self.w[i + 1]]
            levels += [self.levels.new_tensor(middle), self.levels[i + 1]]
        self.levels, self.w = torch.stack(levels), w

    def noise(self) -> dict[int, list[torch.Tensor]]:
        """Unit step noise of each interval."""
        widths = (self.levels[:-1] - self.levels[1:]).sqrt().tolist()
        return {i: [(self.w[i + 1] - self.w[i]) / width] for i, width in enumerate(widths)}


def solve(
    session: Session, sides: tuple[Side, Side], setup: Ours, a: Trajectory, b: Trajectory, known: dict[Any, Any]
) -> Truth:
    """The distances of both sides from the truth of our side's levels, initial latents and step noise.

    Args:
        known: fine solutions of ODEs found before, by levels and start; extended.
    """
    if not torch.isfinite(b.final).all() or not torch.isfinite(a.final).all():
        return Truth("not defined, a side is not finite")
    gap = abs((a.final - b.final).norm() / b.final.norm()).item()
    if any(side.options.get("s_churn") or side.options.get("s_noise", 1.0) != 1.0 for side in sides):
        return Truth("not defined for s_churn, and for s_noise other than 1")
    if a.noise or b.noise:
        return _sde(session, sides[0], setup, a, b, gap)
    key = (session.family.name, tuple(setup.levels.tolist()), setup.start.flatten()[0].item())
    fine = Side("sample_rk4", sample_rk4, {})
    for pieces in ODE_SPLITS:
        if known.get(key, (None, math.inf, 0))[1] < gap / 10:
            break
        if pieces <= known.get(key, (None, math.inf, 0))[2]:
            continue
        levels = split(setup.levels, pieces, tail=6)
        run = session.follow_sampler(fine, Ours(levels, setup.start, flow=True, keep=False))
        error = math.inf
        if key in known:
            error = ((run.final - known[key][0]).norm() / run.final.norm()).item()
        known[key] = (run.final, error, pieces, len(run.evaluations))
    final, error, _, evaluations = known[key]
    return _distances("ODE", a, b, final, error, evaluations)


def _sde(session: Session, side: Side, setup: Ours, a: Trajectory, b: Trajectory, gap: float) -> Truth:
    """The reverse SDE that the sampler's steps tend to, on a Brownian path with this step noise."""
    name = getattr(side.target, "__name__", "")
    if session.flux:
        return Truth("not computed for SDEs on FLUX, whose first sigma depends on the steps")
    if getattr(side.target, "__module__", "") != session.module.sampling.__name__:
        return Truth(f"not defined, {name} is not one of k-diffusion's SDE samplers")
    if side.eta is None:
        return Truth(f"not defined, {name} adds no step noise and theirs does")
    # of ancestral steps, sigma_up ~ eta
    eta = side.eta if name in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde") else side.eta**2
    fine = Side("dpmpp_2m_sde", session.module.find_sampler("dpmpp_2m_sde"), {"eta": eta, "solver_type": "heun"})
    positive = setup.levels[setup.levels > 0]
    path = None
    if setup.noise_sampler is None:
        ends = _last_evaluations(a)[: len(positive) - 1]
        if not all(a.noise.get(end) for end in ends):
            return Truth("not defined, not every step has its noise")
        path = Path(positive, [a.noise[end][-1] for end in ends], seed=(session.options.seed + 1) % 2**63)
    final, error, evaluations = torch.empty(0), math.inf, 0
    pieces = 1
    for wanted in SDE_SPLITS:
        if path is not None:
            while pieces < wanted:
                path.halve()
                pieces *= 2
        levels = split(setup.levels, wanted)
        noise = path.noise() if path is not None else None
        fine_setup = replace(setup, levels=levels, noise=noise, quantize=False, timesteps=None, keep=False)
        run = session.follow_sampler(fine, fine_setup)
        if evaluations:
            error = ((run.final - final).norm() / run.final.norm()).item()
        final, evaluations = run.final, len(run.evaluations)
        if error < gap / 10:
            break
    return _distances("SDE", a, b, final, error, evaluations)


def _last_evaluations(a: Trajectory) -> list[int]:
    """The evaluation that ends each step, after which its noise is drawn."""
    return [start - 1 for start in a.starts[1:]] + [len(a.evaluations) - 1]


def _distances(
    equation: str, a: Trajectory, b: Trajectory, final: torch.Tensor, error: float, evaluations: int
) -> Truth:
    ours, theirs = (((side.final - final).norm() / final.norm()).item() for side in (a, b))
    return Truth(equation, ours, theirs, error, evaluations)
