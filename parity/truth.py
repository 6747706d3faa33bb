"""The same ODE or SDE solved finely, and how far each side ends from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torchsde import BrownianInterval
from tqdm.auto import tqdm

from parity.follow import Session
from parity.result import Ours, Trajectory, Truth, relative
from parity.sides import Side


def solve(session: Session, sides: tuple[Side, Side], setup: Ours, a: Trajectory, b: Trajectory) -> Truth:
    """The distances of both sides from the truth of our side's first latents and step noise.

    The truth is a solution of about `truth_steps` steps. Its error is estimated by the change to a solution that is
    four times as coarse, over 3. That is right for order 1, to which the roughness of a network limits every method,
    and too large for smooth networks.
    """
    if why := _undefined(session, sides, setup, a, b):
        return Truth(why)
    equation = "SDE" if a.noise or b.noise else "ODE"
    method, setups = _sde(session, sides[0], setup, a) if equation == "SDE" else _ode(session, setup)
    count = sum(len(each.levels) - 1 for each in setups)
    with tqdm(desc=f"solving the {equation} finely", total=count, leave=False, disable=None) as bar:
        coarse, fine = (session.follow_sampler(method, each, bar.update).final for each in setups)
    apart = ((a.final - b.final).norm() / fine.norm()).item()
    return Truth(equation, relative(a.final, fine), relative(b.final, fine), apart, relative(coarse, fine) / 3)


def _undefined(session: Session, sides: tuple[Side, Side], setup: Ours, a: Trajectory, b: Trajectory) -> str | None:
    """Why there is nothing to compare with, if there is nothing."""
    name = getattr(sides[0].target, "__name__", "")
    other_noise = any(side.options.get("s_churn") or side.options.get("s_noise", 1.0) != 1.0 for side in sides)
    reasons = {
        "not defined, a side is not finite": not all(side.final.isfinite().all() for side in (a, b)),
        "not defined for s_churn, and for s_noise other than 1": other_noise,
    }
    if a.noise or b.noise:
        ours = name.removeprefix("sample_") in session.module.sampler_names()
        reasons |= {
            "not computed for SDEs on FLUX, whose first sigma depends on the steps": session.flux,
            f"not defined, {name} is not one of k-diffusion's SDE samplers": not ours,
            f"not defined, {name} adds no step noise and theirs does": sides[0].eta is None,
            "not defined, not every step has its noise": setup.noise_sampler is None
            and any(draw is None for draw in _step_noise(setup, a)),
        }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _ode(session: Session, setup: Ours) -> tuple[Side, list[Ours]]:
    """The method with the smallest error for its evaluations (docs/parity.md), and how it runs coarsely and finely."""
    multistep = Side("lms", session.module.find_sampler("lms").function, {"order": 2 if session.flux else 3})
    first, last = setup.levels[0].item(), setup.levels[-1].item()
    fine = session.options.truth_steps
    levels = (fine_levels(session, first, last, size) for size in (fine // 4, fine))
    return multistep, [Ours(each, setup.start, flow=True, keep=False) for each in levels]


def fine_levels(session: Session, first: float, last: float, n: int) -> torch.Tensor:
    """Some more than n levels from the first one down to the last: Karras', or FLUX's evenly in t.

    The first interval is cut at a sixteenth and a quarter: a multistep method begins with a step of order 1. Below
    SDXL's lowest trained level the network gets timestep 0; the way from there to zero is cut evenly in sigma.
    """
    if session.flux:
        levels = torch.linspace(first, last, n + 1, dtype=torch.float64).tolist()[:-1]
    else:
        lowest, more = last or session.level_of(0.0), max(n // 100, 1)
        levels = session.module.named_sigmas("karras", n + 1, lowest, first).double().tolist()[:-2]
        levels += [lowest * (1 - i / more) for i in range(more)] if last == 0 else []
    begin = [first + share * ([*levels, last][1] - first) for share in (1 / 16, 1 / 4)]
    return torch.tensor([first, *begin, *levels[1:], last], dtype=torch.float64)


def _sde(session: Session, side: Side, setup: Ours, a: Trajectory) -> tuple[Side, list[Ours]]:
    """The method for the reverse SDE that the sampler's steps tend to, and how it runs coarsely and finely.

    Both run on the same Brownian path, which has this step noise.
    """
    eta = side.eta or 0.0
    if side.target.__name__ not in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"):
        eta = eta**2  # of ancestral steps, sigma_up ~ eta
    sampler = session.module.find_sampler("dpmpp_2m_sde").function
    positive = setup.levels[setup.levels > 0].tolist()
    path = [] if setup.noise_sampler else bridges(positive, _step_noise(setup, a), session.options.seed + 1)
    pieces = max(session.options.truth_steps // (4 * len(positive)), 1)

    def cut(pieces: int) -> Ours:
        levels = split(setup.levels, pieces)
        noise = finer(path, levels[levels > 0].tolist()) if path else None
        return replace(setup, levels=levels, noise=noise, keep=False)

    return Side("dpmpp_2m_sde", sampler, {"eta": eta, "solver_type": "heun"}), [cut(pieces), cut(4 * pieces)]


def _step_noise(setup: Ours, a: Trajectory) -> list[Any]:
    """What each step between positive levels adds. A step draws after its last evaluation."""
    steps = range(len(a.starts))[: int((setup.levels > 0).sum()) - 1]
    return [a.noise.get(a.span(i)[-1], [None])[-1] for i in steps]


def split(levels: torch.Tensor, pieces: int) -> torch.Tensor:
    """Each interval of positive levels in `pieces`, evenly in log."""
    positive, shares = levels[levels > 0], torch.arange(pieces, dtype=levels.dtype) / pieces
    fine = positive[:-1, None] ** (1 - shares) * positive[1:, None] ** shares
    return torch.cat([fine.flatten(), positive[-1:], levels[len(positive) :]])


def bridges(levels: Sequence[float], noise: Sequence[torch.Tensor], seed: int) -> list[BrownianInterval]:
    """A Brownian path that has the given step noise: one for each interval of the falling levels."""
    return [
        BrownianInterval(low, high, W=draw * math.sqrt(high - low), entropy=seed + i)
        for i, (high, low, draw) in enumerate(zip(levels, levels[1:], noise))
    ]


def finer(path: list[BrownianInterval], levels: Sequence[float]) -> dict[int, list[torch.Tensor]]:
    """The path's unit step noise over levels that cut each of its intervals into equally many."""
    pieces = (len(levels) - 1) // len(path)
    intervals = enumerate(zip(levels, levels[1:]))
    return {i: [path[i // pieces](low, high) / math.sqrt(high - low)] for i, (high, low) in intervals}
