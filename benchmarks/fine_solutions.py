"""How many evaluations of the network a fine solution of the ODE costs, by method: the tables of docs/parity.md.

uv run benchmarks/fine_solutions.py                  # both demo models, some six minutes on one core
uv run benchmarks/fine_solutions.py --family flux
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parity.follow import Session  # noqa: E402
from parity.options import parse_compare  # noqa: E402
from parity.result import Ours, relative  # noqa: E402
from parity.sides import find_side  # noqa: E402
from parity.truth import fine_levels  # noqa: E402

METHODS = ("euler", "heun", "dpm_2", "lms(order=2)", "lms(order=3)", "lms(order=4)")
EVALUATIONS = (48, 96, 192, 384, 768)
FINEST = 2048  # evaluations of the solution that the others are held against, by lms(order=3)


def solve(session: Session, method: str, evaluations: int) -> torch.Tensor:
    """The latents at zero, from the noise of the session's seed."""
    each = 2 if method in ("heun", "dpm_2") else 1
    first = session.named_levels(None, session.options.steps)[0].item()
    levels = fine_levels(session, first, 0.0, evaluations // each)
    start = session.noise.to(session.dtype) * first
    side = find_side(method, session.module, "method")
    return session.follow_sampler(side, Ours(levels, start, flow=True, keep=False)).final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=("sdxl", "flux"), nargs="+", default=["sdxl", "flux"])
    for name in parser.parse_args().family:
        options, family = parse_compare(["--family", name, "--against", "euler"])
        session = Session.load(family, importlib.import_module(family.module), options)
        finest = solve(session, "lms(order=3)", FINEST)
        print(f"\n| {name.upper()}, evaluations | {' | '.join(f'`{method}`' for method in METHODS)} |")
        print("|---|" + "---|" * len(METHODS))
        for evaluations in EVALUATIONS:
            errors = [relative(solve(session, method, evaluations), finest) for method in METHODS]
            print(f"| {evaluations} | {' | '.join(f'{error:.1e}' for error in errors)} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
