"""`compare.py --against exact`: right samplers come out right, planted faults wrong for their reason."""

from __future__ import annotations

import importlib
import json

import pytest
from conftest import ROOT

from gallery.options import FLUX, SDXL
from gallery.refused import Refused
from parity.command import run
from parity.judge import Answer, judge
from parity.options import parse_compare
from parity.sides import find_side
from parity.subject import Function, Stock

OWN = f"{ROOT}/tests/exact_samplers.py"
FLOW = "use_flow_sigmas=True, prediction_type='flow_prediction'"


def judged(text: str, family=SDXL, parameterization: str = "auto") -> Answer:
    module = importlib.import_module(family.module)
    side = find_side(text, module, "--sampler")
    if side.is_scheduler:
        return judge(Stock(side, family, module))
    return judge(Function(side, family, module, None, parameterization))


RIGHT = [*("lms", "heun", "dpmpp_3m_sde", "dpm_fast", "dpm_adaptive"), *(f"{OWN}:{n}" for n in ("euler", "multistep"))]
RIGHT += [f"{OWN}:ancestral", f"{OWN}:churn", f"{OWN}:rk4", f"{OWN}:Scheduler", "LMSDiscreteScheduler"]
RIGHT += ["EulerAncestralDiscreteScheduler"]


@pytest.mark.parametrize("text", RIGHT, ids=lambda text: text.removeprefix(OWN))
def test_right_ones(text):
    answer = judged(text)
    assert answer.right, answer.verdict
    for order, name in ((1, ":euler"), (2, ":multistep"), (4, ":rk4")):
        assert not text.endswith(name) or f"order {order}.0" in answer.verdict


@pytest.mark.parametrize(
    "text", ["euler", "dpmpp_2m", "dpm_adaptive", "dpmpp_2m_sde", "FlowMatchEulerDiscreteScheduler"]
)
def test_right_ones_on_flux(text):
    answer = judged(text, FLUX)
    assert answer.right, answer.verdict


def test_flow_is_wrong_for_a_sampler_that_adds_noise():
    answer = judged("euler_ancestral", FLUX, "flow")
    assert 'parameterization "flow" adds its noise to the wrong process; with "ve" it is right' in answer.verdict


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("euler(factor=0.98)", "from the exact end however many steps it takes"),
        ("multistep(sign=-1.0)", "from the exact end however many steps it takes"),
        ("multistep(history='zeros')", "step 1 of 160 has an error that does not fall as its length squared"),
        ("multistep(weight=0.5)", "order 1.0, which Euler's method has, although it uses earlier predictions"),
        ("ancestral(strong=1.1)", "1.10 times the noise that its levels leave room for"),
        ("ancestral(early=1.3)", "in the first third of the steps: too much noise"),
        ("churn(strong=1.1)", "too much noise"),
        ("ancestral(after=True)", "noise is added after it"),
        ("euler(skip=1)", "evaluations as the steps ask: no"),
        ("euler(skip=-2)", "evaluations as the steps ask: no"),
        ("euler(mixes=0.02)", "an image does not depend on its batch: no"),
        ("ancestral(draws='numpy')", "draws from numpy.random"),
        ("ancestral(draws='python')", "draws from Python's random"),
        ("ancestral(draws='fixed')", "another generator gives the same noise"),
        ("euler(writes='levels')", "writes on levels"),
        ("euler(writes='latents')", "writes on latents"),
        ("euler(shows='first')", "its x is not that of step 2"),
        ("euler(rounds=True)", "float32 and float64 agree: no"),
        ("IgnoresBegin", "a run begun part-way is right: no"),
        ("WrongAddNoise", "add_noise agrees with the levels: no"),
        ("ForgetsOption(shift=0.5)", "copy.deepcopy, save_config and from_config: no"),
    ],
)
def test_planted_faults_are_wrong_for_their_reason(fault, reason):
    answer = judged(f"{OWN}:{fault}")
    assert not answer.right and reason in answer.verdict, answer.verdict


def test_status_json_and_page(tmp_path, capsys):
    files = {name: tmp_path / f"answer.{name}" for name in ("json", "html")}
    options = [f"--{name}={path}" for name, path in files.items()]
    assert run(*parse_compare(["--against", "exact", "--sampler", "euler_ancestral", *options])) == 0
    out = capsys.readouterr().out
    assert out.startswith("euler_ancestral on a mixture") and "\nRight. " in out and "ok     one step works" in out
    found, page = json.loads(files["json"].read_text()), files["html"].read_text()
    assert found["right"] and len(found["rows"]) == 6 and len(found["draws"]["euler_ancestral"]) == 4
    assert page.count("<svg") == 4 and found["verdict"][1:] in page
    assert run(*parse_compare(["--against", "exact", "--sampler", f"{OWN}:euler(factor=0.98)"])) == 1
    with pytest.raises(Refused, match="is for flow models"):
        run(*parse_compare(["--against", "exact", "--sampler", "FlowMatchEulerDiscreteScheduler"]))
    with pytest.raises(SystemExit, match="2"):
        parse_compare(["--against", "exact", "--steps", "3"])
