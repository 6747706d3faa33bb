"""The same ODE or SDE solved finely, and how far each side ends from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torchsde import BrownianInterval
from tqdm.auto import tqdm

from parity.follow import Session
from parity.result import Ours, Trajectory, Truth, relative
from parity.sides import Side

ODE_SIZES = range(32, 8193, 32)  # into how many intervals the way may be cut
SDE_SIZES = [2**i for i in range(1, 10)]  # into how many pieces each step


class Solution(NamedTuple):
    """The end of a fine solution."""

    final: torch.Tensor
    size: int
    error: float  # relative
    evaluations: int  # of all solutions so far


def solve(session: Session, sides: tuple[Side, Side], setup: Ours, a: Trajectory, b: Trajectory) -> Truth:
    """The distances of both sides from the truth of our side's first latents and step noise."""
    if not (b.final.isfinite().all() and a.final.isfinite().all()):
        return Truth("not defined, a side is not finite")
    if any(side.options.get("s_churn") or side.options.get("s_noise", 1.0) != 1.0 for side in sides):
        return Truth("not defined for s_churn, and for s_noise other than 1")
    if a.noise or b.noise:
        return _sde(session, sides[0], setup, a, b)
    # the method with the smallest error for its evaluations: docs/parity.md
    multistep = Side("lms", session.module.find_sampler("lms").function, {"order": 2 if session.flux else 3})
    first, last = setup.levels[0].item(), setup.levels[-1].item()
    key = (first, last, setup.start.flatten()[0].item())

    def run(size: int, tick: Callable[[], Any]) -> torch.Tensor:
        levels = fine_levels(session, first, last, size)
        return session.follow_sampler(multistep, Ours(levels, setup.start, flow=True, keep=False), tick).final

    ends, known = (a.final, b.final), session.solutions.get(key)
    truth, session.solutions[key] = refine(session, "ODE", run, lambda n: n + n // 100 + 4, ODE_SIZES, ends, known)
    return truth


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


def refine(
    session: Session, equation: str, run: Callable, cost: Callable, sizes: Sequence[int], ends: tuple, solution=None
) -> tuple[Truth, Solution | None]:
    """Finer solutions, until one shows which side is nearer or the time is over.

    The error is estimated by the change to a solution that was r times as coarse, over r - 1. That is right for order
    1, to which the roughness of a network limits every method, and too large for smooth networks.

    Args:
        run: `run(size, tick)`, the end of a solution; calls `tick()` for each evaluation of the network.
        cost: `cost(size)`, evaluations of that.
        sizes: that may be taken, rising.
        ends: the final latents of both sides.
        solution: one that was found before, to begin with.
    """
    started, truth = time.process_time(), Truth(equation)
    with tqdm(desc=f"solving the {equation} finely", unit=" evaluations", leave=False, disable=None) as bar:
        while True:
            if solution is not None and math.isfinite(solution.error):
                ours, theirs = (relative(end, solution.final) for end in ends)
                apart = ((ends[0] - ends[1]).norm() / solution.final.norm()).item()
                truth = Truth(equation, ours, theirs, apart, solution.error, solution.evaluations)
                if truth.nearer is not None:
                    return truth, solution
            left = session.options.truth_seconds - (time.process_time() - started)
            size = next_size(solution, cost, sizes, session.affordable(0.9 * left))
            if size is None:
                break
            bar.reset(cost(size))
            final, error, evaluations = run(size, bar.update), math.inf, cost(size)
            if solution is not None:
                error = relative(solution.final, final) / (size / solution.size - 1)
                evaluations += solution.evaluations
            solution = Solution(final, size, error, evaluations)
    if math.isnan(truth.ours):
        least = cost(sizes[0]) + cost(2 * sizes[0])
        seconds = least / session.affordable(0.9)
        truth = Truth(f"not looked for, {least} evaluations take {seconds:.0f} s or more (--truth-seconds)")
    return replace(truth, stopped=True), solution


def next_size(solution: Solution | None, cost: Callable, sizes: Sequence[int], affordable: float) -> int | None:
    """Four times the last size, or the largest if not even twice that would come after; None if none is affordable."""
    if solution is None:
        return sizes[0] if cost(sizes[0]) + cost(2 * sizes[0]) <= affordable else None
    fit = [size for size in sizes if size >= 2 * solution.size and cost(size) <= affordable]
    wanted = 4 * solution.size
    if wanted in fit and cost(wanted) + cost(2 * wanted) <= affordable:
        return wanted
    return fit[-1] if fit else None


def split(levels: torch.Tensor, pieces: int) -> torch.Tensor:
    """Each interval of positive levels in `pieces`, evenly in log."""
    positive, shares = levels[levels > 0], torch.arange(pieces, dtype=levels.dtype) / pieces
    fine = positive[:-1, None] ** (1 - shares) * positive[1:, None] ** shares
    return torch.cat([fine.flatten(), positive[-1:], levels[len(positive) :]])


def bridges(levels: Sequence[float], noise: list[torch.Tensor], seed: int) -> list[BrownianInterval]:
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


def _sde(session: Session, side: Side, setup: Ours, a: Trajectory, b: Trajectory) -> Truth:
    """The reverse SDE that the sampler's steps tend to, on a Brownian path with this step noise."""
    name = getattr(side.target, "__name__", "")
    if session.flux:
        return Truth("not computed for SDEs on FLUX, whose first sigma depends on the steps")
    if name.removeprefix("sample_") not in session.module.sampler_names():
        return Truth(f"not defined, {name} is not one of k-diffusion's SDE samplers")
    if side.eta is None:
        return Truth(f"not defined, {name} adds no step noise and theirs does")
    # of ancestral steps, sigma_up ~ eta
    eta = side.eta if name in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde") else side.eta**2
    sampler = session.module.find_sampler("dpmpp_2m_sde").function
    fine = Side("dpmpp_2m_sde", sampler, {"eta": eta, "solver_type": "heun"})
    positive, path = setup.levels[setup.levels > 0].tolist(), list[BrownianInterval]()
    if setup.noise_sampler is None:
        # noise is drawn after the last evaluation of a step
        ends = [*(start - 1 for start in a.starts[1:]), len(a.evaluations) - 1][: len(positive) - 1]
        if not all(a.noise.get(end) for end in ends):
            return Truth("not defined, not every step has its noise")
        path = bridges(positive, [a.noise[end][-1] for end in ends], session.options.seed + 1)

    def run(pieces: int, tick: Callable[[], Any]) -> torch.Tensor:
        levels = split(setup.levels, pieces)
        noise = finer(path, levels[: pieces * steps + 1].tolist()) if path else None
        fine_setup = replace(setup, levels=levels, noise=noise, quantize=False, timesteps=None, keep=False)
        return session.follow_sampler(fine, fine_setup, tick).final

    ends, steps = (a.final, b.final), len(positive) - 1
    return refine(session, "SDE", run, lambda pieces: pieces * steps + 1, SDE_SIZES, ends)[0]
