"""`compare.py --against exact`: right samplers come out right, planted faults wrong for their reason."""

from __future__ import annotations

import importlib
import json

import exact_samplers
import pytest
from conftest import ROOT

from gallery.options import FLUX, SDXL
from gallery.refused import Refused
from parity.command import parse_compare, run
from parity.judge import judge
from parity.rules import rules
from parity.sides import find_side
from parity.subject import Subject

OWN = f"{ROOT}/tests/exact_samplers.py"  # a file, as a user names it


def subject(text: str, family=SDXL, parameterization: str = "auto") -> Subject:
    module = importlib.import_module(family.module)
    own = text.partition("(")[0] in vars(exact_samplers)
    side = find_side(f"{OWN}:{text}" if own else text, module, "--sampler")
    return Subject(side, family, parameterization=parameterization)


@pytest.mark.parametrize(
    "text, family, words",
    [
        ("multistep", SDXL, "right. Order 2.0;"),
        ("multistep(weight=0.5)", SDXL, "right. Order 1.0; at 20 evaluations"),
        ("rk4", SDXL, "right. Order 4.0;"),
        ("churn", SDXL, "right. Distance from true samples"),
        ("ancestral", SDXL, "right. Distance from true samples"),
        ("dpm_adaptive", FLUX, "right. At "),
        ("Scheduler", SDXL, "right. Order "),
        ("UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction')", FLUX, "right. Order "),
    ],
)
def test_right_ones(text, family, words):
    answer = judge(subject(text, family))
    assert not answer.wrong and words in answer.verdict, answer.verdict


def test_flow_is_wrong_for_a_sampler_that_adds_noise():
    words = 'parameterization "flow" adds its noise to the wrong process; with "ve" its samples are right'
    assert words in judge(subject("euler_ancestral", FLUX, "flow")).verdict


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("euler(factor=0.98)", "from the exact end however many steps it takes"),
        ("multistep(sign=-1.0)", "from the exact end however many steps it takes"),
        ("multistep(history='zeros')", "step 1 of 160 has an error that does not fall as its length squared"),
        ("ancestral(strong=1.1)", "1.10 times the noise that its levels leave room for"),
        ("ancestral(early=1.3)", "times the noise that its levels leave room for: too much noise"),
        ("churn(strong=1.1)", "too much noise"),
        ("ancestral(after=True)", "noise is added after it"),
    ],
)
def test_planted_faults_are_wrong_for_their_reason(fault, reason):
    answer = judge(subject(fault))
    assert answer.wrong and reason in answer.verdict, answer.verdict


@pytest.mark.parametrize(
    "fault, rule, words",
    [
        ("euler(skip=1)", "evaluations", "9 in 10 steps, 19 in 20"),
        ("euler(skip=-2)", "callback", "called 9 times in 10 steps"),
        ("euler(mixes=0.02)", "batch", "an image alone or among others"),
        ("ancestral(draws='numpy')", "numpy", "draws from numpy.random"),
        ("ancestral(draws='python')", "numpy", "draws from Python's random"),
        ("ancestral(draws='seeded')", "numpy", "draws from Python's random"),
        ("ancestral(draws='fixed')", "generator", "another generator gives the same noise"),
        ("ancestral(draws='fixed once')", "generator", "the same noise after evaluation 4"),
        ("euler(writes='levels')", "written", "writes on levels"),
        ("euler(writes='latents')", "written", "writes on latents"),
        ("WritesSample", "written", "writes on sample"),
        ("euler(shows='first')", "callback", "the callback of step 2 gets another x"),
        ("euler(rounds=True)", "float64", "rounded to float32"),
        ("IgnoresBegin", "part-way", "with set_begin_index"),
        ("WrongAddNoise", "add_noise", "it mixes sigma"),
        ("ForgetsOption(shift=0.5)", "from_config", "saved and loaded"),
    ],
)
def test_planted_faults_break_their_rule(fault, rule, words):
    broken = {one.name: one.words for one in rules(subject(fault)) if one.kept is False}
    assert any(rule in name and words in reason for name, reason in broken.items()), broken


def test_a_scheduler_without_add_noise_is_not_judged_part_way():
    found = {rule.name: rule.kept for rule in rules(subject("IPNDMScheduler"))}
    assert found["a run begun part-way is right"] is None and found["add_noise agrees with the levels"] is None


def test_status_json_and_page(tmp_path, capsys):
    files = {name: tmp_path / f"answer.{name}" for name in ("json", "html")}
    options = [f"--{name}={path}" for name, path in files.items()]
    assert run(*parse_compare(["--against", "exact", "--sampler", "euler_ancestral", *options])) == 0
    out = capsys.readouterr().out
    assert out.startswith("euler_ancestral on a mixture") and "\nRight. " in out and "ok     one step works" in out
    found, page = json.loads(files["json"].read_text()), files["html"].read_text()
    assert found["right"] and len(found["rows"]) == 6 and len(found["draws"]["euler_ancestral"]) == 4
    assert page.count("<svg") == 2 and found["verdict"][1:] in page
    assert run(*parse_compare(["--against", "exact", "--sampler", f"{OWN}:euler(factor=0.98)"])) == 1
    with pytest.raises(Refused, match="is for flow models"):
        run(*parse_compare(["--against", "exact", "--sampler", "FlowMatchEulerDiscreteScheduler"]))
    with pytest.raises(Refused, match="--schedule: there is no 'nosuch'"):
        run(*parse_compare(["--against", "exact", "--schedule", "nosuch"]))
    with pytest.raises(SystemExit, match="2"):
        parse_compare(["--against", "exact", "--steps", "3"])
