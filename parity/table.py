"""`compare.py --all`: every known pair, as a table in Markdown and JSON."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
from importlib.metadata import version
from typing import Any, NamedTuple

from diffusers import FlowMatchHeunDiscreteScheduler

from gallery.models import check_output
from gallery.options import FLUX, SDXL, Family
from gallery.refused import Refused
from parity.diagnose import compare_sides
from parity.follow import Session
from parity.result import Result, write_text
from parity.sides import Side, find_side, prepared

PACKAGES = ("k-diffusion", "diffusers", "torch")
LEVELS = {"own": None, "Karras": "karras", "exponential": "exponential", "beta": "beta"}
SDXL_PAIRS = [
    ("euler", "EulerDiscreteScheduler"),
    ("euler", "DDIMScheduler(clip_sample=False)"),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
    ("heun", "HeunDiscreteScheduler"),
    ("dpm_2", "KDPM2DiscreteScheduler"),
    ("dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
    ("lms", "LMSDiscreteScheduler"),
    ("dpmpp_2m", "DPMSolverMultistepScheduler"),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler(algorithm_type='sde-dpmsolver++')"),
    ("dpmpp_3m_sde", "DPMSolverMultistepScheduler(algorithm_type='sde-dpmsolver++', solver_order=3)"),
    ("dpmpp_2s_ancestral(eta=0)", "DPMSolverSinglestepScheduler"),
    ("dpmpp_sde", "DPMSolverSDEScheduler"),
]
FLOW = "use_flow_sigmas=True, prediction_type='flow_prediction'"
FLUX_PAIRS = [
    ("euler", "FlowMatchEulerDiscreteScheduler", "auto"),
    ("heun", "FlowMatchHeunDiscreteScheduler", "auto"),
    ("dpmpp_2m", f"DPMSolverMultistepScheduler({FLOW})", "ve"),
    ("dpmpp_2m", f"UniPCMultistepScheduler({FLOW})", "ve"),
    ("euler", f"DEISMultistepScheduler({FLOW}, solver_order=1)", "auto"),
    ("lms(order=2)", f"DEISMultistepScheduler({FLOW})", "ve"),
]


class FlowMatchHeunForFlux(FlowMatchHeunDiscreteScheduler):
    """FlowMatchHeunDiscreteScheduler, which takes no `sigmas` and no `mu`, as FluxPipeline can call it."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        """Its own levels, as many as there are sigmas."""
        super().set_timesteps(num_inference_steps or len(sigmas), device)


class Job(NamedTuple):
    """One row of the table that is to be made."""

    pair: tuple[str, str]  # the sampler and the scheduler as the table names them
    levels: str  # a key of `LEVELS`
    side: Side
    parameterization: str = "auto"


def write_table(options: argparse.Namespace) -> int:
    """Runs all pairs and writes parity.json and parity.md. Exit status: 0 if all are identical, else 1."""
    check_output(options.output)
    rows = list[dict[str, Any]]()
    for family in [family for family in (SDXL, FLUX) if options.family in (None, family.name)]:
        session, pairs = Session.load(family, options), jobs(family)
        for i, job in enumerate(pairs, 1):
            rows.append(row := make(session, job))
            words = f"{row['ours']} | {row['theirs']}\n    {row['verdict']}"
            print(f"{family.name} {i} of {len(pairs)}: {words}", flush=True)
    write_text(options.output / "parity.json", "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    write_text(options.output / "parity.md", markdown(rows, options))
    print(f"{sum(row['identical'] for row in rows)} of {len(rows)} identical, in {options.output / 'parity.md'}")
    return int(not all(row["identical"] for row in rows))


def jobs(family: Family) -> list[Job]:
    """All rows of one family, in the order of the table."""
    found, module = list[Job](), importlib.import_module(family.module)
    for ours, theirs, *choice in SDXL_PAIRS if family is SDXL else FLUX_PAIRS:
        for levels, name in LEVELS.items():
            options = theirs.removesuffix(")") + (", " if "(" in theirs else "(") + f"use_{name}_sigmas=True)"
            if name is not None and family is FLUX and not theirs.startswith("FlowMatchEuler"):
                continue  # flow sigmas are these schedulers' own levels
            with contextlib.suppress(Refused):  # it has no such option
                side = find_side(options if name else theirs, module, "--against")
                found.append(Job((ours, theirs), levels, side, *choice))
        if theirs == "FlowMatchHeunDiscreteScheduler":
            text = f"{theirs}, made to take FluxPipeline's arguments"
            found.append(Job((ours, text), "own", Side(text, FlowMatchHeunForFlux, {}), *choice))
    return found


def make(session: Session, job: Job) -> dict[str, Any]:
    """Runs the pair. One that diffusers can't run gets a row that says so."""
    session.options.parameterization, (ours, theirs) = job.parameterization, job.pair
    row: dict[str, Any] = {"family": session.family.name, "pair": [ours, theirs], "levels": job.levels}
    try:
        prepared(session.scheduler(job.side), session.options.steps, session.tokens)
    except Refused as refused:
        why = str(refused)
        row |= {"cell": "does not run", "identical": False, "ours": ours, "theirs": theirs}
        return {**row, "verdict": why[0].upper() + why[1:]}
    result, *_ = compare_sides(session, find_side(ours, session.module, "--sampler"), job.side)
    return {**row, "cell": cell(result), **result.as_json()}


def cell(result: Result) -> str:
    """The result in a few words, for the overview."""
    if result.cause is None:
        return f"{result.largest:.0e}"
    words = {"rounded": "rounded timesteps", "cut off": "timesteps cut off", "interpolated": "timesteps interpolated"}
    kind = next((text for word, text in words.items() if word in result.cause.what), result.cause.kind)
    return f"**{result.largest:.0e}**, step {result.cause.step}: {kind}"


def markdown(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The overview and the verdicts."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    table = "\n".join(overview(rows))
    verdicts = "".join(
        f"- `{row['ours']}` and `{row['theirs']}` ({row['family'].upper()}): {row['verdict']}\n" for row in rows
    )
    return f"""# Parity with diffusers

Made by `compare.py --all` with {packages}: {options.model} models, {options.steps} steps.
A number is the largest relative difference of latents and predictions in any step. A bold one is past the
tolerance; beside it, the step at which the sides diverge and what differs there. `docs/parity.md` explains.

{table}

## Verdicts

{verdicts}"""


def overview(rows: list[dict[str, Any]]) -> list[str]:
    """The table: a line for each pair, a column for each kind of noise levels."""
    lines = [f"| k-diffusion | diffusers | {' | '.join(LEVELS)} |", "|---|---|" + "---|" * len(LEVELS)]
    cells = {(row["family"], *row["pair"], row["levels"]): row["cell"] for row in rows}
    for family, ours, theirs in dict.fromkeys(key[:3] for key in cells):
        name = f"`{ours}`" + " (FLUX)" * (family == "flux")
        found = " | ".join(cells.get((family, ours, theirs, levels), "") for levels in LEVELS)
        lines.append(f"| {name} | `{theirs}` | {found} |")
    return lines
