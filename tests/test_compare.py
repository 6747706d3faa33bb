"""`compare.py`: pairs that are the same, faults that were planted, the command and its report."""

from __future__ import annotations

import functools
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import EulerAncestralDiscreteScheduler
from scripts import ENVIRONMENT, command_here

import sdxl_comfy_pipeline
from gallery.options import FLUX, SDXL
from gallery.refused import Refused
from parity import truth
from parity.command import parse_compare, run
from parity.diagnose import compare_sides
from parity.exact import KNOWN, patched, solve, unpatched
from parity.follow import Session
from parity.report import TOP, report
from parity.result import Ours, Result, Trajectory, Truth
from parity.sides import find_side
from parity.subject import Subject
from parity.truth import bridges, finer, split

FAULTY = f"{ROOT}/tests/faulty_schedulers.py"
COMFY = f"{ROOT}/tests/comfy_like.py"
TOLERANCE = 1e-6  # what rounding diffusers' sigmas to float32 leaves of a float64 network's trajectory


@functools.cache
def session(family: str = "sdxl") -> Session:
    """A few steps on a demo model in float64."""
    steps = {"sdxl": "6", "flux": "3"}[family]
    few = ["--width", "64", "--height", "64", "--steps", steps, "--no-switches", "--no-truth", "--truth-steps", "48"]
    options, kind = parse_compare([*few, "--family", family])
    return Session.load(kind, options)


def follow(ours: str, theirs: str, family: str = "sdxl", **options: Any):
    """The result and both trajectories, with these options of `compare.py`."""
    one = session(family)
    before = vars(one.options).copy()
    vars(one.options).update(options)
    try:
        sides = find_side(ours, one.module, "--sampler"), find_side(theirs, one.module, "--against")
        return compare_sides(one, *sides)
    finally:
        vars(one.options).update(before)


def compared(*arguments: Any, **options: Any) -> Result:
    return follow(*arguments, **options)[0]


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


SAME = [("sdxl", *pair, 6) for pair in SAME] + [
    ("sdxl", "dpmpp_2m", "EulerDiscreteScheduler", 1),
    ("sdxl", "dpmpp_2m_sde", "EulerDiscreteScheduler", 1),  # k-diffusion's own fails on one step
    ("sdxl", "dpm_adaptive", "EulerDiscreteScheduler", 1),
    ("flux", "euler", "FlowMatchEulerDiscreteScheduler", 3),
    ("flux", "euler", "FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)", 3),
]


@pytest.mark.parametrize("family, ours, theirs, steps", SAME)
def test_counterparts_are_identical_to_rounding(family, ours, theirs, steps):
    result = compared(ours, theirs, family, steps=steps)
    assert result.cause is None and result.largest < TOLERANCE, result.verdict
    assert result.verdict.startswith("identical to rounding")
    assert len(result.rows) == steps and result.rows[0].step == 1
    count = 1 if ours in ("euler", "euler_ancestral", "lms", "dpmpp_2m", "dpmpp_2m_sde") else 2
    assert [len(row.timesteps[0]) for row in result.rows] == [count] * (steps - 1) + [1]
    for row in result.rows:  # at the same timesteps, to the rounding of float32
        np.testing.assert_allclose(*row.timesteps, atol=2e-4)


# what differs, from which step on, and the switch that removes it
DPM, KARRAS, SDE = "DPMSolverMultistepScheduler", "use_karras_sigmas=True", "algorithm_type='sde-dpmsolver++'"
SIGMA_MIN = "final_sigmas_type='sigma_min'"
DIFFERENT = [
    # the first level is timestep 999 itself, the second the first that falls between two
    ("dpmpp_2m", f"{DPM}({KARRAS})", 2, "timestep", "theirs is rounded", "quantize_timesteps"),
    ("dpmpp_2m", f"{DPM}(use_exponential_sigmas=True)", 1, "timestep", "cut off to a whole number", None),
    ("dpmpp_2m", f"{DPM}({SIGMA_MIN})", 6, "last step", "", "lower_order_final=False"),
    (
        "dpmpp_2m",
        f"{DPM}({SIGMA_MIN}, lower_order_final=False, euler_at_final=True)",
        6,
        "last step",
        "",
        "euler_at_final=False",
    ),
    ("dpmpp_2m_sde(solver_type='heun')", f"{DPM}({SDE})", 2, "update", "", "solver_type"),
    ("euler", "DDIMScheduler", 1, "update", "", "clip_sample=False"),
    ("euler", f"{FAULTY}:WrongSigmaEuler", 3, "noise levels", "The step ends at", None),
    ("dpmpp_2m", f"{FAULTY}:WrongSigmaMultistep", 3, "noise levels", "The step ends at", None),
    ("euler", f"{FAULTY}:WrongSigmaInList", 3, "noise levels", "that the scheduler lists", None),
    ("euler", f"{FAULTY}:RoundedTimesteps({KARRAS})", 2, "timestep", "theirs is rounded", None),
    ("heun", f"{FAULTY}:HeunWithoutLastCorrection", 5, "update", "Euler's step", None),
    ("dpmpp_2m", f"{FAULTY}:MultistepWithoutHistory", 3, "update", "order 1", None),
    ("euler", f"{FAULTY}:WrongInitialScale", 0, "initial scale", "1.1 times", None),
    ("euler_ancestral", f"{FAULTY}:WeakNoise", 3, "step noise", "0.9 times", None),
    ("euler_ancestral", f"{FAULTY}:OtherNoise", 3, "step noise", "other step noise", None),
    ("euler(s_churn=1)", "EulerDiscreteScheduler", 0, "noise levels", "s_churn adds noise first", None),
    ("euler", "euler(s_churn=1)", 0, "noise levels", "s_churn adds noise first", None),
    ("euler", "EulerAncestralDiscreteScheduler", 1, "step noise", "heirs adds step noise, ours none", None),
    ("dpmpp_2m", "dpmpp_2m_sde", 1, "step noise", "heirs adds step noise, ours none", None),
    ("dpmpp_2m_sde", "dpmpp_2m", 1, "step noise", "heirs adds no step noise", None),
    ("euler_ancestral", "euler", 1, "step noise", "heirs adds no step noise", None),
    ("dpmpp_2m_sde", "dpmpp_2m_sde(eta=0.5)", 1, "update", "", None),
]


@pytest.mark.parametrize("ours, theirs, step, kind, words, switch", DIFFERENT)
def test_what_differs_is_found_at_its_step(ours, theirs, step, kind, words, switch):
    result = compared(ours, theirs, switches=switch is not None, truth="s_churn" in words)
    assert (result.cause.kind, result.cause.step) == (kind, step) and words in result.verdict, result.verdict
    # up to there the two are the same
    assert all(max(row.latents, row.denoised) < TOLERANCE for row in result.rows[: max(step - 1, 0)])
    if switch is not None:
        removing = [one.name for one in result.switches if one.removes]
        assert any(name.startswith(switch) for name in removing), result.switches
        assert f"Removed by {removing[0]}" in result.verdict
    if "s_churn" in words:
        assert result.truth.equation.startswith("not defined for s_churn")
        assert compared(ours, theirs, switches=False, truth=False).parting() == result.parting(), "twice the same"
    if "ends at" in words:  # 1.1 times what the list says, as planted
        found, listed = (float(word.strip(",.")) for word in result.cause.what.split() if word[0].isdigit())
        assert found / listed == pytest.approx(1.1, rel=1e-5)
    if "cut off" in words:  # 998.99... becomes 998, which is no rounding
        assert all(-1.001 < row.timesteps[1][0] - row.timesteps[0][0] < 1e-3 for row in result.rows)


DEIS = "DEISMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction')"
SEVERAL = [
    ("sdxl", "lms(order=2)", "DPMSolverMultistepScheduler(use_karras_sigmas=True)", {"timestep": 2, "update": 2}),
    ("sdxl", "euler", f"{FAULTY}:RoundedTimestepsAndLatents(use_karras_sigmas=True)", {"timestep": 2, "update": 3}),
    ("flux", "lms(order=2)", DEIS, {"timestep": 1, "update": 2, "last step": 4}),
    # near t = 1 its update subtracts two terms that are a thousand times as large as what is left, in float32
    ("flux", "euler", DEIS.replace(")", ", solver_order=1)"), {"timestep": 1, "update": 1, "last step": 4}),
]


@pytest.mark.parametrize("family, ours, theirs, kinds", SEVERAL)
def test_of_several_causes_each_is_named(family, ours, theirs, kinds):
    """Also those that another one before them hides, at their first step."""
    result = compared(ours, theirs, family, **({"steps": 4, "parameterization": "ve"} if family == "flux" else {}))
    found = {cause.kind: cause.step for cause in [result.cause, *result.others]}
    assert found == kinds, result.verdict
    for cause in result.others:
        marked = f"<-- {cause.kind}" in result.table() or cause.step == result.cause.step
        assert cause.what[1:] in result.verdict and marked


def test_drift_by_rounding_is_not_a_difference():
    """A tolerance that the whole run misses and each step by itself keeps: the verdict is the steps'."""
    largest = compared("dpm_2", "KDPM2DiscreteScheduler").largest
    result = compared("dpm_2", "KDPM2DiscreteScheduler", tolerance=0.8 * largest)
    assert result.local < 0.8 * largest < result.largest
    assert result.cause is None and "each step by itself" in result.verdict


def test_levels_of_our_own_differ_from_theirs():
    """Named ones, and those of "ve", which begins at the t of a finite sigma where the scheduler begins at 1."""
    result = compared("euler", "EulerDiscreteScheduler", schedule="karras")
    assert result.cause.kind in ("initial scale", "noise levels")
    result = compared("euler", "FlowMatchEulerDiscreteScheduler", "flux", parameterization="ve")
    assert result.cause.kind == "noise levels" and result.cause.what.endswith("theirs at 1"), result.verdict


BROKEN = """import dataclasses
def sample_nan(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]))
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        x = x * float("nan") if i == 1 else x
    return x
dataclasses.make_dataclass("Options", [("a", "int")], namespace={"__module__": __name__})
def sample_none(model, x, sigmas, extra_args=None, callback=None, disable=None):
    model(x, sigmas[0] * x.new_ones([x.shape[0]]))

def sample_short(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return model(x, sigmas[0] * x.new_ones([x.shape[0]]))[..., 0]

def sample_idle(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return x

def sample_raises(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return [][len(sigmas)]

from diffusers import EulerDiscreteScheduler
class Raises(EulerDiscreteScheduler):
    def _init_step_index(self, timestep):  # called from diffusers' code
        return self.nothing
"""


def test_a_side_that_is_not_finite_is_never_identical(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    result = compared("euler", f"{tmp_path}/broken.py:sample_nan", truth=True)
    assert (result.cause.kind, result.cause.step) == ("not finite", 2) and "in theirs" in result.verdict
    assert result.largest == math.inf and "a side is not finite" in result.verdict
    page = report(session(), *follow("euler", f"{tmp_path}/broken.py:sample_nan"))
    curve = page[page.index('<polyline class="latents"') :].split('"')[3].split()
    assert [float(point.split(",")[1]) == TOP for point in curve[:3]] == [False, True, True]  # at the top, not the best


def test_k_diffusions_own_file_can_be_named():
    """As module and as file, though neither can be imported by itself."""
    sampling = session().module.sampling
    for source in (sampling.__name__, sampling.__file__):
        assert find_side(f"{source}:sample_heun", session().module, "--against").target is sampling.sample_heun


@pytest.mark.parametrize(
    "name, message",
    [
        ("sample_none", r"has to return a tensor of shape \(1, 4, 8, 8\), but returned NoneType"),
        ("sample_short", r"but returned one of shape \(1, 4, 8\)"),
        ("sample_idle", "never calls the model"),
        ("sample_raises", r"IndexError: list index out of range \(.*broken.py, line 20\)"),
        ("Raises", r"object has no attribute 'nothing' \(.*broken.py, line 25\)"),
    ],
)
def test_an_error_of_a_side_is_reported(tmp_path, name, message):
    (tmp_path / "broken.py").write_text(BROKEN)
    with pytest.raises(Refused, match=message):
        compared("euler", f"{tmp_path}/broken.py:{name}")
    if name.startswith("sample_"):
        with pytest.raises(Refused, match=message):
            compared(f"{tmp_path}/broken.py:{name}", "euler")


def test_samplers_that_place_their_own_levels():
    """Their levels are those of their evaluations, and without eta they add no noise: the truth is the ODE's."""
    result = compared("dpm_fast", "DPMSolverMultistepScheduler", truth=True)
    assert result.cause.kind == "noise levels" and result.cause.what.startswith("ours goes to sigma")
    assert result.truth.equation == "ODE"
    result = compared("dpm_adaptive", "EulerDiscreteScheduler")
    assert (result.cause.kind, result.cause.step, result.rows) == ("noise levels", 0, [])
    assert result.cause.what.startswith("ours takes ") and result.cause.what.endswith(" steps, theirs 6")


def test_functions_of_a_file(comfyui):
    """They find ComfyUI's look-ups, agree with the sampler that they repeat, and diverge where they don't."""
    for family in ("sdxl", "flux"):
        assert compared("euler", f"{COMFY}:sample_euler", family).largest == 0
        assert compared(*[f"{COMFY}:sample_lcm"] * 2, family, parameterization="flow").largest == 0
    assert compared(*["dpmpp_2m_sde"] * 2).largest == 0
    assert compared("euler", f"{COMFY}:sample_euler(half=2)").cause.step == 3


def test_a_file_of_a_package_is_loaded_as_the_package_s(comfyui, tmp_path, monkeypatch):
    """With relative imports, as ComfyUI's, and `model_sampling` is then a `CONST` of ComfyUI's for a flow alone."""
    folder = Path(shutil.copytree(ROOT / "tests" / "comfyui" / "comfy", tmp_path / "comfy")) / "k_diffusion"
    folder.mkdir()
    (folder / "utils.py").write_text("ONE = 1\n")
    docstring = '"""Euler\'s method, with a second look at the model\'s range. Step `half` goes half as far."""'
    looks = "isinstance(model.inner_model.inner_model.model_sampling, comfy.model_sampling.CONST)"
    source = Path(COMFY).read_text()
    assert docstring in source
    source = source.replace(docstring, f"assert {looks} == (float(sigmas[0]) <= 1)")
    (folder / "sampling.py").write_text("from . import utils\nimport comfy.model_sampling\n" + source)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.endswith("comfyui")])
    for family in ("sdxl", "flux"):
        assert compared("euler", f"{folder}/sampling.py:sample_euler", family).largest == 0
    assert "comfy.k_diffusion.sampling" in sys.modules


# --- the truth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, first, last, steps", [(SDXL, 14.6, 0.03, 512), (FLUX, 0.99, 1e-9, 2048)])
def test_the_truth_is_the_exact_end(family, first, last, steps):
    """To 1e-6, and within the reported error, which only a smooth network makes too large."""
    one = Subject(find_side("euler", importlib.import_module(family.module), ""), family).session((1, 2, 2))
    one.options.truth_steps = steps
    setup = Ours(torch.linspace(first, last, 9, dtype=torch.float64), one.noise.double() * first)
    if family is FLUX:
        exact = solve(KNOWN, setup.start, first, [last])[0]
    else:
        x, t, end_t = patched(setup.start, KNOWN) / (1 + first), first / (1 + first), last / (1 + last)
        exact = unpatched(solve(KNOWN, x, t, [end_t])[0] * (1 + last), setup.start.shape)
    end = Trajectory([], [], [], exact)
    with torch.no_grad():
        found = truth.solve(one, (find_side("euler", one.module, ""),) * 2, setup, end, end)
    assert found.ours < 1e-6 and found.ours <= found.error, found


def test_a_refined_brownian_path_keeps_its_step_noise_and_is_brownian():
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([8.0, 4.0, 1.0, 0.5], dtype=torch.float64)
    noise = [torch.randn(40000, generator=generator, dtype=torch.float64) for _ in range(3)]
    path, ends = bridges(levels.tolist(), noise, seed=1), {}
    for pieces in (2, 4):
        fine = split(levels, pieces)  # each level of the whole path stays
        assert (fine[:, None] - levels).abs().min(0).values.max() < 1e-12 and fine.diff().max() < 0
        drawn, widths = finer(path, fine.tolist()), (fine[:-1] - fine[1:]).sqrt()
        for i, coarse in enumerate(noise):
            total = sum(drawn[j][0] * widths[j] for j in range(pieces * i, pieces * (i + 1)))
            torch.testing.assert_close(total / (levels[i] - levels[i + 1]).sqrt(), coarse)
        ends[pieces] = [drawn[j][0] * widths[j] for j in range(3 * pieces)]
    for i, whole in enumerate(ends[2]):  # the same path, seen at more levels
        torch.testing.assert_close(ends[4][2 * i] + ends[4][2 * i + 1], whole)
    every = torch.stack([drawn[j][0] for j in range(12)])
    # unit and uncorrelated; 5 sigma of 40,000 draws is 0.025
    assert (every @ every.T / 40000 - torch.eye(12)).abs().max() < 0.04


def test_what_the_error_of_the_truth_leaves_open():
    """Whoever is nearer to T is nearer to every point within T's error, which most of 2,000 draws decide."""
    generator, error, decided = torch.Generator().manual_seed(0), 0.3, 0
    for _ in range(2000):
        a, b, points = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (1, 1, 200))
        points *= error / points.norm(dim=1, keepdim=True)
        ours, theirs, apart = a.norm().item(), b.norm().item(), (a - b).norm().item()  # T is the origin
        if (nearer := Truth("ODE", ours, theirs, apart, error).nearer) is not None:
            decided += 1
            signs = set(((points - a).norm(dim=1) < (points - b).norm(dim=1)).tolist())
            assert signs == {nearer == "ours"}
    assert 0.5 < decided / 2000 < 1  # what is left is the band of width 2 error between the sides


@pytest.mark.parametrize(
    "ours, theirs, equation", [("heun", "euler", "ODE"), ("dpmpp_sde", "EulerAncestralDiscreteScheduler", "SDE")]
)
def test_who_is_nearer_to_the_truth(ours, theirs, equation):
    """The method of order 2 is nearer to the same ODE or SDE."""
    result = compared(ours, theirs, truth=True, truth_steps=192)
    truth = result.truth
    assert truth.equation == equation and truth.nearer == "ours" and truth.ours < truth.theirs
    assert f"Nearer to the {equation} solved finely: k-diffusion's" in result.verdict


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
    (
        ["--against", f"{COMFY}:sample_euler"],
        "'inner_model'; the function needs ComfyUI: put its folder on",
    ),
    (["--against", f"{COMFY}:sample_none"], "there are sample_euler, sample_lcm\n"),
    (["--against", f"{ROOT}/tests/blocks.py:expected"], "sampler(model, x, sigmas"),
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
OPTIONS += [["--width", "100000"], ["--truth-steps", "3"], ["--output", "elsewhere"]]
OPTIONS += [[f"--tolerance={value}"] for value in ("0", "-1", "nan", "inf", "small")]
OPTIONS += [["--sampler", "heun", "--all"], ["--schedule", "karras", "--all"], ["--html", "page.html", "--all"]]
OPTIONS += [["--model", "demo/sdxl", "--all"]]


@pytest.mark.parametrize("arguments", OPTIONS, ids=" ".join)
def test_what_can_not_be_right_is_refused_at_once(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        parse_compare(arguments if "--all" in arguments else ["--against", "heun", *arguments])
    assert stopped.value.code == 2 and arguments[0].split("=")[0] in capsys.readouterr().err.splitlines()[-1]


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
def test_ctrl_c_or_a_closed_pipe_ends_the_command(monkeypatch, tmp_path, ends, status):
    """With switches still to try; no traceback."""
    read, write = os.pipe()
    os.close(read)
    options, family = parse_compare(["--sampler", "heun", "--against", "DDIMScheduler", "--steps", "2", "--no-truth"])
    with os.fdopen(write, "w") as unread, (tmp_path / "errors").open("w") as errors:
        monkeypatch.setattr(sys, "stdout", Interrupts() if ends == "by Ctrl-C" else unread)
        monkeypatch.setattr(sys, "stderr", errors)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert command_here(lambda: run(options, family)) == status


def test_nothing_is_left_behind():
    """No hook on the network, no scheduler but the model's own, no attribute of k-diffusion changed."""
    one, sampler = session(), sdxl_comfy_pipeline.sampling.sample_euler
    before = dict(one.pipe.scheduler.config)
    compared("euler", f"{FAULTY}:WrongSigmaInList")
    assert not one.network._forward_hooks and not one.network._forward_pre_hooks
    assert dict(one.pipe.scheduler.config) == before and sdxl_comfy_pipeline.sampling.sample_euler is sampler


def test_stock_side_is_what_the_stock_pipeline_gives():
    """The followed run and a plain call of the stock pipeline end at the same latents, to the bit."""
    one = session()
    _, _, followed = follow("euler_ancestral", "EulerAncestralDiscreteScheduler")
    scheduler = EulerAncestralDiscreteScheduler.from_config(one.pipe.scheduler.config)
    pipe = one.stock_class(**{**one.pipe.components, "scheduler": scheduler}, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": 1.0, "width": 64, "height": 64, "output_type": "latent", "num_inference_steps": 6}
    generator = torch.Generator("cpu").manual_seed(one.options.seed)
    assert followed.final.equal(pipe(**one.prompt, **arguments, generator=generator).images)


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
    # at 400 pixels, for which Chromium's window itself is too wide, the page does not scroll sideways
    narrow = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    try:
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


def test_names_are_escaped_in_the_report():
    result, a, b = follow("euler", "euler")
    result.theirs = "<script>alert(1)</script>"
    page = report(session(), result, a, b)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
