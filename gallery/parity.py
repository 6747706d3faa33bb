"""`compare.py --all`: every known pair, as a table in Markdown and JSON."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from diffusers import FlowMatchHeunDiscreteScheduler

from gallery.compare import Result, as_json, compare_sides, tolerance_of, write_text
from gallery.follow import Session
from gallery.models import Refused
from gallery.models import check_output as _check_output
from gallery.options import FLUX, SDXL
from gallery.sides import Side, find_side

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


def write_parity(options: argparse.Namespace) -> int:
    """Runs all pairs and writes parity.md and parity.json. Exit status: 0 if all are identical to rounding, else 1."""
    _check_output(options.output)
    rows = [
        row
        for name, pairs in (("sdxl", _sdxl), ("flux", _flux))
        if options.family in (None, name)
        for row in pairs(options)
    ]
    write_text(options.output / "parity.md", markdown(rows, options))
    write_text(options.output / "parity.json", "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(f"{sum(row['identical'] for row in rows)} of {len(rows)} identical, in {options.output / 'parity.md'}")
    return int(not all(row["identical"] for row in rows))


def _session(family: Any, options: argparse.Namespace) -> tuple[Any, Session]:
    options = copy.copy(options)
    options.guidance = family.guidance if family is FLUX else 1.0
    module = importlib.import_module(family.module)
    return module, Session(family, module, options)


def _sdxl(options: argparse.Namespace) -> list[dict[str, Any]]:
    module, session = _session(SDXL, options)
    rows, truths = list[dict[str, Any]](), dict[Any, Any]()
    for ours, theirs in SDXL_PAIRS:
        for levels, name in LEVELS.items():
            side = find_side(theirs, module, "--against")
            if name is not None:
                option = f"use_{name}_sigmas"
                try:
                    with_levels = theirs.removesuffix(")") + (", " if "(" in theirs else "(") + f"{option}=True)"
                    side = find_side(with_levels, module, "--against")
                except Refused:
                    continue  # it has no such option
            rows.append(_row(session, find_side(ours, module, "--sampler"), side, levels, theirs, truths))
    return rows


def _flux(options: argparse.Namespace) -> list[dict[str, Any]]:
    module, session = _session(FLUX, options)
    rows, truths = list[dict[str, Any]](), dict[Any, Any]()
    for ours, theirs, parameterization in FLUX_PAIRS:
        session.options.parameterization = parameterization
        for levels, name in LEVELS.items():
            if name is not None and not theirs.startswith("FlowMatchEuler"):
                break  # flow sigmas are these schedulers' own
            side = find_side(theirs, module, "--against")
            if name is not None:
                side = replace(side, text=f"{theirs}(use_{name}_sigmas=True)", options={f"use_{name}_sigmas": True})
            try:
                session.prepared(session.scheduler(side), session.options.steps)
            except Refused as refused:
                rows.append(_refused(ours, theirs, levels, str(refused)))
                if theirs != "FlowMatchHeunDiscreteScheduler":
                    continue
                theirs = f"{theirs}, made to take FluxPipeline's arguments"
                side = Side(theirs, FlowMatchHeunForFlux, {})
            rows.append(_row(session, find_side(ours, module, "--sampler"), side, levels, theirs, truths))
    return rows


def _row(session: Session, ours: Side, side: Side, levels: str, theirs: str, truths: dict | None) -> dict[str, Any]:
    tolerance = session.options.tolerance or tolerance_of(session.network.dtype)
    truths = truths if session.options.truth else None
    with torch.no_grad():
        result, *_ = compare_sides(session, ours, side, tolerance, truths)
    print(f"{session.family.name} {result.ours} | {result.theirs}\n    {result.verdict}", flush=True)
    row = {"family": session.family.name, "pair": [result.ours, theirs], "levels": levels}
    return {**row, "cell": cell(result), **as_json(result)}


def _refused(ours: str, theirs: str, levels: str, why: str) -> dict[str, Any]:
    print(f"flux {ours} | {theirs}\n    {why}", flush=True)
    row = {"family": "flux", "pair": [ours, theirs], "levels": levels, "cell": "does not run", "identical": False}
    return {**row, "ours": ours, "theirs": theirs, "verdict": why[0].upper() + why[1:]}


def cell(result: Result) -> str:
    """The result in a few words, for the overview."""
    if result.cause is None:
        return f"{result.largest:.0e}"
    kind = result.cause.kind
    words = {"rounded": "rounded timesteps", "cut off": "timesteps cut off", "interpolated": "timesteps interpolated"}
    if kind == "timestep":
        kind = next((text for word, text in words.items() if word in result.cause.what), kind)
    return f"**{result.largest:.0e}**, step {result.cause.step}: {kind}"


def markdown(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The overview and the verdicts."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("k-diffusion", "diffusers", "torch"))
    lines = [
        "# Parity with diffusers",
        "",
        f"Made by `compare.py --all` with {packages}: {options.model} models, {options.steps} steps.",
        "A number is the largest relative difference of latents and predictions in any step. A bold one is past the",
        "tolerance; beside it, the step at which the sides part and what differs there. `docs/parity.md` explains.",
        "",
        *overview(rows),
        "",
        "## Verdicts",
        "",
    ]
    for row in rows:
        lines.append(f"- `{row['ours']}` and `{row['theirs']}` ({row['family'].upper()}): {row['verdict']}")
    return "\n".join(lines) + "\n"


def overview(rows: list[dict[str, Any]]) -> list[str]:
    """The table: a line for each pair, a column for each kind of noise levels."""
    lines = [f"| k-diffusion | diffusers | {' | '.join(LEVELS)} |", "|---|---|" + "---|" * len(LEVELS)]
    pairs = dict.fromkeys((row["family"], *row["pair"]) for row in rows)
    for family, ours, theirs in pairs:
        cells = {row["levels"]: row["cell"] for row in rows if (row["family"], *row["pair"]) == (family, ours, theirs)}
        name = ours if family == "sdxl" else f"{ours}` (FLUX)`"
        name = f"`{name}`".replace("``", "")
        lines.append(f"| {name} | `{theirs}` | {' | '.join(cells.get(levels, '') for levels in LEVELS)} |")
    return lines
