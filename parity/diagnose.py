"""One comparison: where the sides part, which switch removes it, and who is nearer to the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from parity.follow import Session
from parity.pair import Pair
from parity.result import Result, Trajectory
from parity.sides import Side
from parity.switches import try_switches
from parity.truth import solve


def tolerance_of(dtype: torch.dtype) -> float:
    """Below this, a difference is rounding: of diffusers' float32 sigmas for a float64 network, else of the network."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 2e-2)


@torch.no_grad()
def compare_sides(
    session: Session,
    ours: Side,
    theirs: Side,
    tolerance: float | None = None,
    truths: dict[Any, Any] | None = None,
    show: Callable[[Result, str], None] = lambda result, words: None,
) -> tuple[Result, Trajectory, Trajectory]:
    """The result and both trajectories.

    Args:
        tolerance: of relative differences; None: by the network's dtype.
        truths: solutions that were found before, by what they depend on; None: don't look for the truth.
        show: called with what is known so far and the words for what was just found: the cause first, then what the
            switches did, then the truth.
    """
    pair = Pair(session, ours, theirs, tolerance or session.options.tolerance or tolerance_of(session.network.dtype))
    a, b, setup = pair.run()
    result = pair.compare(a, b, setup)
    show(result, result.parting())
    if result.cause is not None and session.options.switches:
        with tqdm(desc="trying switches", unit=" tried", leave=False, disable=None) as bar:
            result.switches = try_switches(pair, result.cause, b, bar.update)
        show(result, result.removal())
    if result.cause is not None and truths is not None:
        result.truth = solve(session, (ours, theirs), setup, a, b, truths)
        show(result, result.truth.words())
    return result, a, b
