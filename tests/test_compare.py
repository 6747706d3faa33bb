"""`compare.py`: pairs that are the same, faults that were planted, the command and its report."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from scripts import ENVIRONMENT, command_here

import flux_comfy_pipeline
import sdxl_comfy_pipeline
from gallery.refused import Refused
from parity import truth
from parity.command import run
from parity.diagnose import compare_sides
from parity.exact import flux_pipeline, mixture, patched, sdxl_pipeline, solve_ode, unpatched
from parity.follow import Session
from parity.options import parse_compare
from parity.report import TOP, report
from parity.result import Ours, Truth
from parity.sides import find_side
from parity.truth import Path as BrownianPath
from parity.truth import Solution, next_size, split

FAULTY = f"{ROOT}/tests/faulty_schedulers.py"
COMFY = f"{ROOT}/tests/comfy_like.py"
TOLERANCE = 1e-6  # what rounding diffusers' sigmas to float32 leaves of a float64 network's trajectory


class Compared:
    """A session of few steps on a demo model in float64, and comparisons in it."""

    def __init__(self, *arguments: str):
        few = ["--width", "64", "--height", "64", "--steps", "6", "--no-truth", "--truth-seconds", "1e9"]
        options, family = parse_compare([*few, *arguments])
        self.module = {"sdxl": sdxl_comfy_pipeline, "flux": flux_comfy_pipeline}[family.name]
        self.session = Session.load(family, self.module, options)

    def __call__(self, ours: str, theirs: str, switches: bool = False, tolerance: float = TOLERANCE, **options):
        before = vars(self.session.options).copy()
        vars(self.session.options).update(options, switches=switches)
        try:
            sides = find_side(ours, self.module, "--sampler"), find_side(theirs, self.module, "--against")
            with torch.no_grad():
                return compare_sides(self.session, *sides, tolerance, {} if options.get("truth") else None)[0]
        finally:
            vars(self.session.options).update(before)


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    """Of fine solutions, so that their number of evaluations is known, and not the time that they may take."""
    monkeypatch.setattr(truth, "ODE_SIZES", [16, 48])
    monkeypatch.setattr(truth, "SDE_SIZES", [2, 4])


@pytest.fixture(scope="module")
def sdxl_pair():
    return Compared()


@pytest.fixture(scope="module")
def flux_pair():
    return Compared("--family", "flux", "--steps", "3")


SAME = [
    ("euler", "EulerDiscreteScheduler"),
    ("euler", "DDIMScheduler(clip_sample=False)"),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
    ("heun", "HeunDiscreteScheduler"),
    ("dpm_2", "KDPM2DiscreteScheduler"),
    ("dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
    ("lms", "LMSDiscreteScheduler"),
    ("dpmpp_2m", "DPMSolverMultistepScheduler"),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler(algorithm_type='sde-dpmsolver++')"),
    ("dpmpp_sde", "DPMSolverSDEScheduler"),
    ("euler", "EulerDiscreteScheduler(use_karras_sigmas=True)"),
    ("heun", "HeunDiscreteScheduler(use_beta_sigmas=True)"),
]


@pytest.mark.parametrize("ours, theirs", SAME)
def test_counterparts_are_identical_to_rounding(sdxl_pair, ours, theirs):
    result = sdxl_pair(ours, theirs)
    assert result.cause is None and result.largest < TOLERANCE, result.verdict
    assert result.verdict.startswith("identical to rounding")
    assert len(result.rows) == 6 and result.rows[0].step == 1
    count = 1 if ours in ("euler", "euler_ancestral", "lms", "dpmpp_2m", "dpmpp_2m_sde") else 2
    assert [len(row.timesteps[0]) for row in result.rows] == [count] * 5 + [1]
    for row in result.rows:  # at the same timesteps, to the rounding of float32
        np.testing.assert_allclose(*row.timesteps, atol=2e-4)


@pytest.mark.parametrize("ours", ["dpmpp_2m", "dpmpp_2m_sde", "dpm_adaptive"])
def test_one_step_is_denoised_in_all_of_them(sdxl_pair, ours):
    """k-diffusion's own dpmpp_2m_sde fails on it."""
    result = sdxl_pair(ours, "EulerDiscreteScheduler", steps=1)
    assert len(result.rows) == 1 and result.largest < TOLERANCE, result.verdict


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("euler", "FlowMatchEulerDiscreteScheduler"),
        ("euler", "FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)"),
    ],
)
def test_flux_counterparts_are_identical_to_rounding(flux_pair, ours, theirs):
    result = flux_pair(ours, theirs)
    assert result.cause is None and result.largest < TOLERANCE, result.verdict


def test_rounded_timesteps_are_found_and_switched(sdxl_pair):
    """diffusers' DPM-Solver rounds Karras timesteps: `quantize_timesteps` and its own timesteps take that away."""
    result = sdxl_pair("dpmpp_2m", "DPMSolverMultistepScheduler(use_karras_sigmas=True)", switches=True)
    assert result.cause.kind == "timestep" and "rounded" in result.cause.what
    # the first level is timestep 999 itself, the second the first that falls between two
    assert result.cause.step == 2
    assert result.rows[1].timesteps[1][0] == round(result.rows[1].timesteps[0][0])
    removing = [switch.name for switch in result.switches if switch.removes]
    assert removing == ["quantize_timesteps", "timesteps of the other side"]
    assert "Removed by quantize_timesteps" in result.verdict


def test_timesteps_cut_off_are_told_from_rounded_ones(sdxl_pair):
    """The int64 of exponential levels is no rounding: 998.99... becomes 998."""
    result = sdxl_pair("dpmpp_2m", "DPMSolverMultistepScheduler(use_exponential_sigmas=True)")
    assert result.cause.kind == "timestep" and "cut off" in result.cause.what and result.cause.step == 1
    for row in result.rows:
        assert -1.001 < row.timesteps[1][0] - row.timesteps[0][0] < 1e-3


SWITCHES = [
    ("dpmpp_2m", "DPMSolverMultistepScheduler(final_sigmas_type='sigma_min')", 6, "lower_order_final=False"),
    (
        "dpmpp_2m",
        "DPMSolverMultistepScheduler(final_sigmas_type='sigma_min', lower_order_final=False, euler_at_final=True)",
        6,
        "euler_at_final=False",
    ),
    (
        "dpmpp_2m_sde(solver_type='heun')",
        "DPMSolverMultistepScheduler(algorithm_type='sde-dpmsolver++')",
        2,
        "solver_type",
    ),
    ("euler", "DDIMScheduler", 1, "clip_sample=False"),
]


@pytest.mark.parametrize("ours, theirs, step, name", SWITCHES)
def test_the_switch_that_removes_it_is_named(sdxl_pair, ours, theirs, step, name):
    result = sdxl_pair(ours, theirs, switches=True)
    assert result.cause.step == step, result.verdict
    assert result.cause.kind == ("last step" if step == 6 else "update")
    assert any(switch.removes and switch.name.startswith(name) for switch in result.switches), result.switches


FAULTS = [
    ("euler", "WrongSigmaEuler", 3, "noise levels", "The step ends at"),
    ("dpmpp_2m", "WrongSigmaMultistep", 3, "noise levels", "The step ends at"),
    ("euler", "WrongSigmaInList", 3, "noise levels", "that the scheduler lists"),
    ("euler", "RoundedTimesteps(use_karras_sigmas=True)", 2, "timestep", "theirs is rounded"),
    ("euler", "RoundedLatents", 3, "rounding", "to float16"),
    ("heun", "HeunWithoutLastCorrection", 5, "update", "Euler's step"),
    ("dpmpp_2m", "MultistepWithoutHistory", 3, "update", "order 1"),
    ("euler", "WrongInitialScale", 0, "initial scale", "1.1 times"),
    ("euler_ancestral", "WeakNoise", 3, "step noise", "0.9 times"),
    ("euler_ancestral", "OtherNoise", 3, "step noise", "other step noise"),
]


@pytest.mark.parametrize("ours, fault, step, kind, words", FAULTS)
def test_planted_faults_are_caught_at_their_step(sdxl_pair, ours, fault, step, kind, words):
    result = sdxl_pair(ours, f"{FAULTY}:{fault}")
    assert (result.cause.kind, result.cause.step) == (kind, step), result.verdict
    assert words in result.verdict
    # up to there the two are the same
    before = [max(row.latents, row.denoised) for row in result.rows[: max(step - 1, 0)]]
    assert all(value < TOLERANCE for value in before)


DEIS = "DEISMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction')"
SEVERAL = [
    ("sdxl", "lms(order=2)", "DPMSolverMultistepScheduler(use_karras_sigmas=True)", {"timestep": 2, "update": 2}),
    ("sdxl", "euler", f"{FAULTY}:RoundedTimestepsAndLatents(use_karras_sigmas=True)", {"timestep": 2, "rounding": 3}),
    ("flux", "lms(order=2)", DEIS, {"timestep": 1, "update": 2, "last step": 4}),
    # near t = 1 its update subtracts two terms that are a thousand times as large as what is left, in float32
    ("flux", "euler", DEIS.replace(")", ", solver_order=1)"), {"timestep": 1, "update": 1, "last step": 4}),
]


@pytest.mark.parametrize("family, ours, theirs, kinds", SEVERAL)
def test_of_several_causes_each_is_named(request, family, ours, theirs, kinds):
    """Also those that another one before them hides, at their first step."""
    pair = request.getfixturevalue(f"{family}_pair")
    result = pair(ours, theirs, **({"steps": 4, "parameterization": "ve"} if family == "flux" else {}))
    found = {cause.kind: cause.step for cause in [result.cause, *result.others]}
    assert found == kinds, result.verdict
    for cause in result.others:
        assert cause.what[1:] in result.verdict and (
            f"<-- {cause.kind}" in result.table() or cause.step == result.cause.step
        )


def test_the_wrong_sigma_is_found_by_its_value(sdxl_pair):
    """1.1 times what the list says, as planted."""
    result = sdxl_pair("euler", f"{FAULTY}:WrongSigmaEuler")
    found, listed = (float(word.strip(",.")) for word in result.cause.what.split() if word[0].isdigit())
    assert found / listed == pytest.approx(1.1, rel=1e-5)


def test_drift_by_rounding_is_told_from_a_difference(sdxl_pair):
    """A tolerance that the whole run misses and each step by itself keeps: the verdict is the steps'."""
    largest = sdxl_pair("dpm_2", "KDPM2DiscreteScheduler").largest
    result = sdxl_pair("dpm_2", "KDPM2DiscreteScheduler", tolerance=0.8 * largest)
    assert result.local < 0.8 * largest < result.largest
    assert result.cause is None and "each step by itself" in result.verdict


def test_named_levels_of_our_side_part_from_others(sdxl_pair):
    result = sdxl_pair("euler", "EulerDiscreteScheduler", schedule="karras")
    assert result.cause.kind in ("initial scale", "noise levels")


def test_two_samplers_of_k_diffusion(sdxl_pair):
    assert sdxl_pair("dpmpp_2m_sde", "dpmpp_2m_sde").largest == 0
    result = sdxl_pair("dpmpp_2m_sde", "dpmpp_2m_sde(eta=0.5)")
    assert result.cause.step == 1
    result = sdxl_pair("euler_ancestral", "euler")
    assert result.cause.kind == "step noise" and "adds no step noise" in result.cause.what


BROKEN = """
def sample_nan(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]))
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        x = x * float("nan") if i == 1 else x
    return x

def sample_none(model, x, sigmas, extra_args=None, callback=None, disable=None):
    model(x, sigmas[0] * x.new_ones([x.shape[0]]))

def sample_short(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return model(x, sigmas[0] * x.new_ones([x.shape[0]]))[..., 0]

def sample_idle(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return x

def sample_raises(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return [][len(sigmas)]
"""


def test_a_side_that_is_not_finite_is_never_identical(sdxl_pair, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    result = sdxl_pair("euler", f"{tmp_path}/broken.py:sample_nan", truth=True)
    assert (result.cause.kind, result.cause.step) == ("not finite", 2) and "in theirs" in result.verdict
    assert result.largest == math.inf and "a side is not finite" in result.verdict
    sides = (
        find_side("euler", sdxl_comfy_pipeline, ""),
        find_side(f"{tmp_path}/broken.py:sample_nan", sdxl_pair.module, ""),
    )
    with torch.no_grad():
        page = report(sdxl_pair.session, *compare_sides(sdxl_pair.session, *sides, TOLERANCE))
    curve = page[page.index('<polyline class="latents"') :].split('"')[3].split()
    assert [float(point.split(",")[1]) == TOP for point in curve[:3]] == [False, True, True]  # at the top, not the best


def test_k_diffusions_own_file_can_be_named(sdxl_pair):
    """As module and as file, though neither can be imported by itself."""
    sampling = sdxl_pair.module.sampling
    for source in (sampling.__name__, sampling.__file__):
        assert find_side(f"{source}:sample_heun", sdxl_pair.module, "--against").target is sampling.sample_heun


@pytest.mark.parametrize(
    "name, message",
    [
        ("sample_none", r"has to return a tensor of shape \(1, 4, 8, 8\), but returned NoneType"),
        ("sample_short", r"but returned one of shape \(1, 4, 8\)"),
        ("sample_idle", "never calls the model"),
        ("sample_raises", r"IndexError: list index out of range \(.*broken.py, line 20\)"),
    ],
)
def test_what_a_function_does_wrong_is_told(sdxl_pair, tmp_path, name, message):
    (tmp_path / "broken.py").write_text(BROKEN)
    with pytest.raises(Refused, match=message):
        sdxl_pair("euler", f"{tmp_path}/broken.py:{name}")
    with pytest.raises(Refused, match=message):
        sdxl_pair(f"{tmp_path}/broken.py:{name}", "euler")


def test_where_a_scheduler_raises_is_told(sdxl_pair, tmp_path):
    """In its own code, also where that was called from diffusers'."""
    lines = ["from diffusers import EulerDiscreteScheduler", "class Mine(EulerDiscreteScheduler):"]
    lines += ["    def _init_step_index(self, timestep):", "        return self.nothing"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    with pytest.raises(Refused, match=r"object has no attribute 'nothing' \(.*mine.py, line 4\)"):
        sdxl_pair("euler", f"{tmp_path}/mine.py:Mine")


def test_samplers_that_place_their_own_levels_are_told_so(sdxl_pair):
    """Their levels are those of their evaluations, and without eta they add no noise: the truth is the ODE's."""
    result = sdxl_pair("dpm_fast", "DPMSolverMultistepScheduler", truth=True)
    assert result.cause.kind == "noise levels" and result.cause.what.startswith("ours goes to sigma")
    assert result.truth.equation == "ODE" and "does not step over the levels given" in result.notes[0]
    result = sdxl_pair("dpm_adaptive", "EulerDiscreteScheduler")
    assert (result.cause.kind, result.cause.step, result.rows) == ("noise levels", 0, [])
    assert result.cause.what.startswith("ours takes ") and result.cause.what.endswith(" steps, theirs 6")


NOISE = [
    ("euler(s_churn=1)", "EulerDiscreteScheduler", "noise levels", "s_churn adds noise first"),
    ("euler", "euler(s_churn=1)", "noise levels", "s_churn adds noise first"),
    ("euler", "EulerAncestralDiscreteScheduler", "step noise", "theirs adds step noise, ours none"),
    ("dpmpp_2m", "dpmpp_2m_sde", "step noise", "theirs adds step noise, ours none"),
    ("dpmpp_2m_sde", "dpmpp_2m", "step noise", "theirs adds no step noise"),
]


@pytest.mark.parametrize("ours, theirs, kind, words", NOISE)
def test_noise_of_one_side_is_named(sdxl_pair, ours, theirs, kind, words):
    result = sdxl_pair(ours, theirs, truth=True)
    assert result.cause.kind == kind and result.cause.what.endswith(words), result.verdict
    if "s_churn" in words:
        assert result.truth.equation.startswith("not defined for s_churn")


def test_where_flux_begins_is_told(flux_pair):
    """In "ve" at the t of a finite sigma, where the scheduler begins at 1."""
    result = flux_pair("euler", "FlowMatchEulerDiscreteScheduler", parameterization="ve")
    assert result.cause.kind == "noise levels" and result.cause.what.endswith("theirs at 1"), result.verdict


def test_functions_of_a_file(sdxl_pair, flux_pair):
    """They find ComfyUI's look-ups, are the same as what they repeat, and part where they don't."""
    for pair in (sdxl_pair, flux_pair):
        assert pair("euler", f"{COMFY}:sample_euler").largest == 0
        lcm = pair(f"{COMFY}:sample_lcm", f"{COMFY}:sample_lcm", parameterization="flow")
        assert lcm.largest == 0
    result = sdxl_pair("euler", f"{COMFY}:sample_half_euler")
    assert result.cause.step == 3


def test_a_file_of_a_package_is_loaded_as_the_package_s(sdxl_pair, flux_pair, tmp_path, monkeypatch):
    """With relative imports, as ComfyUI's, and `model_sampling` is then a `CONST` of ComfyUI's for a flow alone."""
    folder = tmp_path / "comfy" / "k_diffusion"
    folder.mkdir(parents=True)
    (tmp_path / "comfy" / "model_sampling.py").write_text("class CONST: pass\n")
    (folder / "utils.py").write_text("ONE = 1\n")
    docstring = '"""Euler\'s method, with a second look at the model\'s range."""'
    looks = "isinstance(model.inner_model.inner_model.model_sampling, comfy.model_sampling.CONST)"
    source = Path(COMFY).read_text()
    assert docstring in source
    source = source.replace(docstring, f"assert {looks} == (float(sigmas[0]) <= 1)")
    (folder / "sampling.py").write_text("from . import utils\nimport comfy.model_sampling\n" + source)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        for pair in (sdxl_pair, flux_pair):
            assert pair("euler", f"{folder}/sampling.py:sample_euler").largest == 0
        assert "comfy.k_diffusion.sampling" in sys.modules
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "comfy"]:
            del sys.modules[name]


# --- the truth -------------------------------------------------------------------------------------------------------


class Known:
    """A session on a model in closed form, 2x2 patches, and the exact end of its ODE."""

    def __init__(self, family: str):
        options, kind = parse_compare(["--family", family, "--steps", "8", "--truth-seconds", "1e9"])
        known = mixture()
        pipe = {"sdxl": sdxl_pipeline, "flux": flux_pipeline}[family](known)
        nothing = torch.zeros(1, 1, 1, dtype=torch.float64)
        prompt = {"prompt_embeds": nothing, "pooled_prompt_embeds": nothing[:, 0]}
        module = {"sdxl": sdxl_comfy_pipeline, "flux": flux_comfy_pipeline}[family]
        self.session, self.mixture = Session(kind, module, options, pipe, prompt, (32, 32)), known

    def setup(self, first: float, last: float) -> Ours:
        levels = torch.linspace(first, last, 9, dtype=torch.float64)
        return Ours(levels, self.session.noise.double() * first)

    def exact(self, setup: Ours) -> torch.Tensor:
        first, last = setup.levels[0].item(), setup.levels[-1].item()
        if not self.session.flux:
            y = solve_ode(self.mixture, patched(setup.start, self.mixture), first, last)
            return unpatched(y, setup.start.shape)
        y = setup.start / (1 - first)  # sigma = t / (1 - t)
        return solve_ode(self.mixture, y, first / (1 - first), last / (1 - last)) * (1 - last)


@pytest.mark.parametrize("family, first, last, size", [("sdxl", 14.6, 0.03, 512), ("flux", 0.99, 1e-9, 2048)])
def test_the_truth_is_the_exact_end(family, first, last, size, monkeypatch):
    """To 1e-6, and within the error that is told, which only a smooth network lets be too large."""
    monkeypatch.setattr(truth, "ODE_SIZES", [32, 128, 512, 2048][: 3 if size == 512 else 4])
    known, solutions = Known(family), dict[Any, Any]()
    setup = known.setup(first, last)
    exact = known.exact(setup)
    end = SimpleNamespace(final=exact, noise={})
    with torch.no_grad():
        found = truth.solve(
            known.session, (find_side("euler", known.session.module, ""),) * 2, setup, end, end, solutions
        )
    (solution,) = solutions.values()
    assert solution.size == size and found.ours < 1e-6 and found.ours <= found.error, found


def test_split_keeps_the_levels():
    levels = torch.tensor([10.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    fine = split(levels, 4)
    assert fine[0] == 10 and fine[-1] == 0 and (fine.diff() < 0).all() and len(fine) == 2 * 4 + 2
    for level in (3.0, 1.0):
        assert (fine - level).abs().min() < 1e-12


def test_a_refined_brownian_path_keeps_its_step_noise_and_is_brownian():
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([8.0, 4.0, 1.0, 0.5], dtype=torch.float64)
    noise = [torch.randn(40000, generator=generator, dtype=torch.float64) for _ in range(3)]
    path = BrownianPath(levels, noise, seed=1)
    path.halve()
    path.halve()
    assert len(path.levels) == 13
    fine, widths = path.noise(), (path.levels[:-1] - path.levels[1:]).sqrt()
    for i, coarse in enumerate(noise):
        total = sum(fine[j][0] * widths[j] for j in range(4 * i, 4 * i + 4))
        torch.testing.assert_close(total / (levels[i] - levels[i + 1]).sqrt(), coarse)
    every = torch.stack([fine[j][0] for j in range(12)])
    # unit and uncorrelated; 5 sigma of 40,000 draws is 0.025
    assert (every @ every.T / 40000 - torch.eye(12)).abs().max() < 0.04


def test_what_the_error_of_the_truth_leaves_open():
    """Whoever is told to be nearer to T is nearer to every point within T's error, and only where that is not so no
    one is told: 2,000 draws of two sides and a T, each with the worst of 200 points."""
    generator = torch.Generator().manual_seed(0)
    told = 0
    for _ in range(2000):
        a, b, points = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (1, 1, 200))
        error = 0.3
        points *= error / points.norm(dim=1, keepdim=True)
        ours, theirs, apart = a.norm().item(), b.norm().item(), (a - b).norm().item()  # T is the origin
        nearer = Truth("ODE", ours, theirs, apart, error).nearer
        signs = set(((points - a).norm(dim=1) < (points - b).norm(dim=1)).tolist())
        if nearer is not None:
            told += 1
            assert signs == {nearer == "ours"}
    assert 0.5 < told / 2000 < 1  # most of them: what is left is the band of width 2 error between the sides


def test_the_truth_is_not_begun_where_time_is_too_short(sdxl_pair):
    result = sdxl_pair("heun", "euler", truth=True, truth_seconds=1e-3)
    assert result.truth.nearer is None and "--truth-seconds" in result.verdict
    assert "not looked for" in result.truth.equation


def test_a_finer_solution_is_taken_as_long_as_there_is_time():
    """From sizes in steps of four, the last one as large as can be; each costs as many evaluations as its size."""
    taken, left, solution = [], 1000.0, None
    while size := next_size(solution, lambda n: n, range(32, 8193, 32), left):
        solution, left = Solution(torch.empty(0), size, 0.0, 0), left - size
        taken.append(size)
    assert taken == [32, 128, 832] and left < 32


def test_who_is_nearer_to_the_truth(sdxl_pair):
    """heun against euler: the method of order 2 is nearer to the same ODE."""
    result = sdxl_pair("heun", "euler", truth=True)
    truth = result.truth
    assert truth.equation == "ODE" and truth.nearer == "ours" and truth.ours < truth.theirs
    assert "Nearer to the ODE solved finely: k-diffusion's" in result.verdict


# --- the command -----------------------------------------------------------------------------------------------------


def command(capsys, *arguments: str):
    options, family = parse_compare([*arguments, "--no-truth"])
    try:
        status = run(options, family)
    except Refused as refused:  # the script prints it so
        print(refused, file=sys.stderr)
        status = 2
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_exit_status_and_json(capsys, tmp_path):
    path = tmp_path / "result.json"
    arguments = ("--sampler", "euler", "--against", "EulerDiscreteScheduler", "--steps", "3")
    status, out, _ = command(capsys, *arguments, "--json", str(path))
    assert status == 0 and "identical to rounding" in out
    written = json.loads(path.read_text())
    assert written["identical"] and written["steps"] == 3 and written["cause"] is None and len(written["rows"]) == 3
    status, out, err = command(
        capsys, "--against", "DPMSolverMultistepScheduler(use_karras_sigmas=True)", "--steps", "3", "--json"
    )
    written = json.loads(out)  # nothing else on standard output
    assert status == 1 and written["cause"]["kind"] == "timestep" and "<-- diverges here" in err
    assert [switch["name"] for switch in written["switches"] if switch["removes"]][0] == "quantize_timesteps"


BAD = [
    (["--against", "EulerScheduler"], "did you mean"),
    (["--against", "EulerDiscreteScheduler(karras=True)"], "takes no karras; it takes"),
    (["--against", "EulerDiscreteScheduler(use_karras_sigmas=open('x'))"], "expected NAME or NAME(option=value"),
    (["--against", "heun(eta=1)"], "takes no eta"),
    (["--sampler", "DDIMScheduler", "--against", "euler"], "has to be a sampler"),
    (["--against", "nowhere.py:sample"], "there is no file nowhere.py"),
    (["--against", f"{COMFY}:sample_none"], "there are sample_euler, sample_lcm, sample_half_euler\n"),
    (["--against", f"{COMFY}:_step_noise"], "sampler(model, x, sigmas"),
    (["--against", "no.such.module:f"], "can't be imported"),
    (["--against", COMFY], f"which function of {COMFY}?"),
    (["--against", "ScoreSdeVeScheduler"], "there is no 'ScoreSdeVeScheduler'; did you mean DPMSolverSDE"),
    (["--against", "euler", "--schedule", "karas"], "did you mean karras"),
    (["--against", "euler", "--model", "nowhere.safetensors"], "there is no file"),
    (["--against", "euler", "--html", "/nowhere/report.html"], "there is no folder /nowhere"),
    (["--against", "FlowMatchEulerDiscreteScheduler"], "is for flow models: add --family flux"),
    (["--against", "EulerDiscreteScheduler", "--family", "flux"], "is not for flow models"),
    (["--against", "UniPCMultistepScheduler", "--family", "flux"], "needs (use_flow_sigmas=True, prediction_type="),
    (["--sampler", "dpm_adaptive(rtol=0, atol=0)", "--against", "euler"], "rtol or atol has to be above 0"),
    (["--against", "Heun"], "did you mean heun?\n"),
    (["--against", f"{FAULTY}:WrongSigmaEular"], "did you mean WrongSigmaEuler"),
    ([], "--all"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, message):
    status, out, err = command(capsys, "--steps", "2", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1 and not out


EMPTY = ["--sampler", "--against", "--model", "--schedule", "--device", "--json", "--html"]
OPTIONS = [*([name, value] for name in EMPTY for value in ("", " ")), ["--steps", "1001"], ["--steps", "1000000000"]]
OPTIONS += [["--width", "100000"], ["--truth-seconds", "0"], ["--resume"], ["--output", "elsewhere"]]


@pytest.mark.parametrize("arguments", OPTIONS, ids=" ".join)
def test_what_can_not_be_right_is_refused_at_once(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        parse_compare(["--against", "heun", *arguments])
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "small"])
def test_a_tolerance_is_a_number_above_zero(capsys, value):
    with pytest.raises(SystemExit) as stopped:
        parse_compare(["--against", "heun", f"--tolerance={value}"])
    assert stopped.value.code == 2 and "--tolerance" in capsys.readouterr().err.splitlines()[-1]


def test_the_script_by_itself(tmp_path):
    script = [sys.executable, ROOT / "compare.py", "--against", "EulerDiscreteScheduler", "--sampler", "euler"]
    done = subprocess.run([*script, "--steps", "2"], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.startswith("ours    ") and "identical to rounding" in done.stdout


class Interrupts(io.StringIO):
    """Ctrl-C as soon as something is there to read."""

    def flush(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("ends, status", [("by Ctrl-C", 130), ("unread", 141)])
def test_it_ends_at_its_first_words(monkeypatch, tmp_path, ends, status):
    """With switches still to try; no traceback."""
    read, write = os.pipe()
    os.close(read)
    options, family = parse_compare(["--sampler", "heun", "--against", "DDIMScheduler", "--steps", "2", "--no-truth"])
    with os.fdopen(write, "w") as unread, (tmp_path / "errors").open("w") as errors:
        monkeypatch.setattr(sys, "stdout", Interrupts() if ends == "by Ctrl-C" else unread)
        monkeypatch.setattr(sys, "stderr", errors)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert command_here(lambda: run(options, family)) == status


def test_nothing_is_left_behind(sdxl_pair):
    """No hook on the network, no scheduler but the model's own, no attribute of k-diffusion changed."""
    session = sdxl_pair.session
    before, sampler = dict(session.pipe.scheduler.config), sdxl_comfy_pipeline.sampling.sample_euler
    sdxl_pair("euler", f"{FAULTY}:WrongSigmaInList")
    assert not session.network._forward_hooks and not session.network._forward_pre_hooks
    assert dict(session.pipe.scheduler.config) == before
    assert sdxl_comfy_pipeline.sampling.sample_euler is sampler


def test_stock_side_is_what_the_stock_pipeline_gives(sdxl_pair):
    """The followed run and a plain call of the stock pipeline end at the same latents, to the bit."""
    session = sdxl_pair.session
    side = find_side("EulerAncestralDiscreteScheduler", sdxl_comfy_pipeline, "--against")
    with torch.no_grad():
        followed = session.follow_scheduler(side).final
    components = {**session.pipe.components, "scheduler": session.scheduler(side)}
    pipe = session.stock_class(**components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": 1.0, "width": session.width, "height": session.height, "output_type": "latent"}
    generator = torch.Generator("cpu").manual_seed(session.options.seed)
    plain = pipe(**session.prompt, **arguments, num_inference_steps=6, generator=generator).images
    assert followed.equal(plain)


# --- the report ------------------------------------------------------------------------------------------------------


def test_report_in_a_browser(browser, capsys, tmp_path):
    """No error, no request, both pictures there, and the arrow keys move through the steps."""
    path = tmp_path / "report.html"
    arguments = ("--against", "DPMSolverMultistepScheduler(use_karras_sigmas=True)", "--steps", "4", "--no-switches")
    assert command(capsys, *arguments, "--html", str(path))[0] == 1
    assert path.stat().st_size < 300_000
    browser.get(path.as_uri())
    from selenium.webdriver.common.keys import Keys

    def sources():
        return [browser.find_element("id", name).get_attribute("src") for name in ("ours", "theirs")]

    slider, label = browser.find_element("id", "step"), browser.find_element("id", "label")
    assert slider.get_attribute("value") == "2" and label.text.startswith("Step 2 of 4")  # where they diverge
    widths = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(widths) == 5 and all(width == 128 for width in widths)
    at_two = sources()
    slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("value") == "3" and label.text.startswith("Step 3 of 4")
    at_three = sources()
    assert all(one != other for one, other in zip(at_two, at_three)) and at_three[0] != at_three[1]
    slider.send_keys(Keys.HOME)
    assert label.text.startswith("Step 1 of 4")
    browser.find_elements("css selector", "tr[data-step]")[3].click()
    assert label.text.startswith("Step 4 of 4")
    assert len(browser.find_elements("css selector", "svg polyline")) == 2
    assert "diverges here: timestep" in browser.find_element("css selector", "svg").text
    assert "diverge at step 2 of 4" in browser.find_element("css selector", ".verdict").text.lower()
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in sent if not url.startswith(("data:", "chrome:"))] == [path.as_uri()]


def test_report_on_a_narrow_screen(browser, capsys, tmp_path):
    """At 400 pixels the page does not scroll sideways, both differences are in sight, labels are legible."""
    path = tmp_path / "report.html"
    arguments = ("--against", "DPMSolverMultistepScheduler(use_karras_sigmas=True)", "--steps", "4", "--no-switches")
    assert command(capsys, *arguments, "--html", str(path))[0] == 1
    # the window itself can't be as narrow: Chromium's is 500 pixels at least
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        browser.get(path.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        ends = {th.text: th.rect["x"] + th.rect["width"] for th in browser.find_elements("tag name", "th")}
        assert 0 < ends["latents"] < ends["denoised"] <= 400
        labels = browser.find_elements("tag name", "text")
        assert len(labels) > 8 and all(label.rect["height"] >= 11 for label in labels)
        assert all(0 <= label.rect["x"] and label.rect["x"] + label.rect["width"] <= 400 for label in labels)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_report_without_rows_is_written(capsys, tmp_path):
    """dpm_adaptive takes steps of its own, so there is nothing to say of each step."""
    path = tmp_path / "report.html"
    arguments = ("--sampler", "dpm_adaptive", "--against", "EulerDiscreteScheduler", "--steps", "3", "--no-switches")
    assert command(capsys, *arguments, "--html", str(path))[0] == 1
    page = path.read_text()
    assert page.count("<img") == 3 and "<svg" not in page and "steps, theirs 3" in page


def test_names_are_escaped_in_the_report(sdxl_pair, tmp_path):
    with torch.no_grad():
        sides = [find_side("euler", sdxl_comfy_pipeline, "x")] * 2
        session = sdxl_pair.session
        result, a, b = compare_sides(session, *sides, TOLERANCE)
        result.theirs = "<script>alert(1)</script>"
        page = report(session, result, a, b)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
