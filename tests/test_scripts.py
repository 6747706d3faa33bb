"""`test.py` and `test_flux.py` as they are run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import PROMPT, ROOT
from PIL import Image
from scripts import ENVIRONMENT, run, run_here

from gallery import grid as gallery_grid
from gallery import start
from gallery.options import FLUX, SDXL, parse
from gallery.pictures import read_settings, write_png
from parity.command import parse_compare


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A grid of three samplers at four steps for each family."""
    folder = tmp_path_factory.mktemp("grid")
    arguments = ("--samplers", "euler", "sample_dpm_2", "dpmpp_2m", "--steps", 4, "--output", folder)
    return folder, {script: run(*arguments, script=script) for script in ("test.py", "test_flux.py")}


@pytest.mark.parametrize("script, family", [("test.py", "sdxl"), ("test_flux.py", "flux")])
def test_grid(grid, script, family):
    """A pipe gets one line per picture, and no progress bar."""
    folder, runs = grid
    assert runs[script].returncode == 0, runs[script].stderr
    assert f"No CUDA device here: drawing with the small demo model, demo/{family}." in runs[script].stdout
    assert f"3 of 3 drawn with demo, side by side in {folder / f'{family}-demo-grid.png'}" in runs[script].stdout
    churn = {"s_churn", "s_tmin", "s_tmax", "s_noise"}
    expected_options = {"euler": churn, "dpm_2": churn, "dpmpp_2m": set()}
    lines = runs[script].stderr.splitlines()
    for sampler, evaluations, line in zip(expected_options, ("4", "7", "4"), lines, strict=True):
        path = folder / f"{family}-demo-sample_{sampler}.png"
        assert line.startswith(f"{path.name}: ") and f"{evaluations} evaluations, " in line and line.endswith(" s")
        settings = read_settings(path)
        assert Image.open(path).size == (128, 128)
        assert settings["prompt"] == PROMPT and settings["seed"] == "2" and settings["sampler"] == sampler
        assert settings["evaluations"] == evaluations
        sigmas = json.loads(settings["sigmas"])
        assert len(sigmas) == 5 and sigmas[-1] == 0
        assert (sigmas[0] == 1) == (family == "flux")
        assert set(json.loads(settings["sampler_options"])) == expected_options[sampler]
        assert {"torch", "diffusers", "k-diffusion"} <= set(json.loads(settings["versions"]))
    assert Image.open(folder / f"{family}-demo-grid.png").width > 900
    assert not list(folder.glob(".*"))


def test_resume_draws_only_what_is_missing(grid, tmp_path, capsys):
    folder = shutil.copytree(grid[0], tmp_path / "grid")
    kept, gone = folder / "sdxl-demo-sample_euler.png", folder / "sdxl-demo-sample_dpm_2.png"
    half = folder / "sdxl-demo-sample_dpmpp_2m.png"
    before = kept.stat().st_mtime_ns
    gone.unlink()
    half.write_bytes(half.read_bytes()[:2000])  # as if an older version had been interrupted
    arguments = ("--samplers", "euler", "dpm_2", "dpmpp_2m", "--steps", 4, "--output", folder, "--resume")
    assert run_here(SDXL, *arguments) == 0
    assert capsys.readouterr().out.count("(kept)") == 1
    assert kept.stat().st_mtime_ns == before and gone.exists() and read_settings(half)
    assert run_here(SDXL, *arguments, "--seed", 1) == 0
    assert capsys.readouterr().out.count("(kept)") == 0


def test_a_sampler_that_fails_does_not_stop_the_others(tmp_path, capsys):
    """A folder where one picture should be written."""
    (tmp_path / "sdxl-demo-sample_euler.png").mkdir()
    assert run_here(SDXL, "--samplers", "euler", "heun", "--steps", 2, "--output", tmp_path) == 1
    out = capsys.readouterr().out
    assert "1 of 2 drawn" in out and "FAILED: IsADirectoryError" in out
    assert (tmp_path / "sdxl-demo-sample_heun.png").is_file() and (tmp_path / "sdxl-demo-grid.png").is_file()


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_sheet_that_cannot_be_written_is_reported(tmp_path, capsys, seeds):
    """The pictures are written; a folder has the name of the (first) sheet."""
    (tmp_path / f"sdxl-demo{'-seed2' * (seeds > 1)}-grid.png").mkdir()
    arguments = ("--model", "demo", "--samplers", "euler", "--steps", 1, "--seeds", seeds, "--output", tmp_path)
    assert run_here(SDXL, *arguments) == 1
    *table, failed, summary = capsys.readouterr().out.splitlines()
    assert any(line.startswith("euler  ") for line in table)
    assert failed.startswith("FAILED: ") and "-grid.png: IsADirectoryError" in failed
    assert summary.startswith(f"{seeds} of {seeds} drawn with demo") and ("1 sheets like" in summary) == (seeds > 1)
    assert len(list(tmp_path.glob("*-sample_euler.png"))) == seeds and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("scale", [1, 3])
def test_evaluations_are_counted_once_per_step_with_true_cfg(tmp_path, scale):
    """FLUX's true CFG calls the transformer twice per evaluation; SDXL's guidance is one call of twice the batch."""
    options = ("--negative-prompt", "snow", "--true-cfg", scale, "--samplers", "euler", "heun", "--steps", 2)
    assert run_here(FLUX, "--model", "demo", *options, "--output", tmp_path) == 0
    for sampler, evaluations in (("euler", "2"), ("heun", "3")):
        assert read_settings(tmp_path / f"flux-demo-sample_{sampler}.png")["evaluations"] == evaluations


def test_the_demo_model_by_its_path_has_the_demo_models_names(tmp_path, monkeypatch):
    """The names of the real model's pictures, sdxl-*.png, are not used: these would be overwritten."""
    monkeypatch.chdir(ROOT)
    for folder in ("demo/sdxl", ROOT / "demo" / "sdxl"):
        options = ("--model", folder, "--samplers", "euler", "--steps", 1, "--resume", "--output", tmp_path)
        assert run_here(SDXL, *options) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"sdxl-demo-sample_euler.png", "sdxl-demo-grid.png"}
    assert read_settings(tmp_path / "sdxl-demo-sample_euler.png")["model"] == "demo"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--steps", "abc"), "--steps: has to be a whole number from 1 to 1000 (the models were trained with as many"),
        (("--steps", "0"), "--steps: has to be a whole number from 1 to 1000"),
        (("--width", "100000"), "--width: has to be a whole number from 1 to 4096 (16 times the pixels"),
        (("--height", "100"), "--height: has to be divisible by 8 for SDXL, but is 100"),
        (("--batch", "1000000"), "--batch: has to be a whole number from 1 to 256 (all of them are in memory"),
        (("--seeds", "1000000000"), "--seeds: has to be a whole number from 1 to 100000 (each is a file"),
        (("--model", ""), "--model: is empty"),
        (("--prompt", "a cat", "--prompts", "file"), "--prompts: not with --prompt"),
        (("--samplers", ",", " "), "--samplers: names none"),
        (("--guidance", "nan"), "--guidance: has to be a finite number, but is 'nan'"),
        (("--seed", "99999999999999999999"), "--seed: has to be a whole number in -9223372036854775808.."),
        (("--seed", "18446744073709551615", "--seeds", "2"), "--seeds: the last seed would be 18446744073709551616"),
        (("--seed", "18446744073709551616", "--comfy"), "--seed: has to be a whole number in"),
        (("--height", "8"), "--height: has to be divisible by 16 for FLUX, but is 8"),
        (("--true-cfg", "3", "--negative-prompt", ""), "--true-cfg: needs --negative-prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_cannot_be_right_are_refused_in_words(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        parse(FLUX if "FLUX" in message or "--true-cfg" in arguments else SDXL, list(arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: argument {message}" in line
    # compare.py has the others
    if not {"--samplers", "--seeds", "--comfy", "--batch", "--prompts", "--true-cfg", "8"} & {*arguments}:
        with pytest.raises(SystemExit, match="2"):
            parse_compare(list(arguments))


@pytest.mark.parametrize("seed, comfy", [(-(2**63), ()), (2**64 - 1, ()), (2**64 - 1, ("--comfy",))])
def test_the_first_and_the_last_seed_draw(tmp_path, seed, comfy):
    options = ("--model", "demo", "--samplers", "dpmpp_sde", "--steps", 2, *comfy, "--seed", seed)
    assert run_here(SDXL, *options, "--output", tmp_path) == 0


def test_prompts_and_names(tmp_path, capsys):
    """No prompt is the default prompt and "" is none; all prompts of a file count; names may share one argument."""
    (tmp_path / "prompts.txt").write_text("a cat\n" * 11)
    with pytest.raises(SystemExit, match="2"):
        parse(SDXL, ["--prompts", str(tmp_path / "prompts.txt"), "--seeds", "10000"])
    assert "110000 pictures of each sampler; one folder takes at most 100000" in capsys.readouterr().err
    assert parse(SDXL, ["--samplers", "euler, heun", "lms"]).samplers == ["euler", "heun", "lms"]
    assert parse(SDXL, []).prompt == PROMPT and parse(SDXL, ["--prompt", ""]).prompt == ""
    assert parse(FLUX, ["--negative-prompt", "snow"]).true_cfg == 2.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--samplers", "dpmp_2m"), "--samplers: there is no 'dpmp_2m'; did you mean dpmpp_2m"),
        (("--samplers", "lcm"), "--samplers: there is no 'lcm'; there are euler, "),
        (("--samplers", "dpmpp_2m_sd", "--comfy"), "there is no 'dpmpp_2m_sd'; did you mean dpmpp_2m_sde"),
        (("--schedule", "vp", "--comfy"), "--schedule: there is no 'vp'; there are simple, "),
        (("--schedule", "karas"), "--schedule: there is no 'karas'; did you mean karras?\n"),
        (("--output", "/proc/nothing"), "Name another folder with --output"),
        (("--device", "cuda"), "--device: no cuda on this machine"),
        (("--device", "meta"), "--device: no meta on this machine"),
        (("--offload", "model"), "--offload model: there is no GPU"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    """Before a model is loaded."""
    monkeypatch.setattr(gallery_grid, "load", None)
    assert run_here(SDXL, *(("--output", tmp_path) if "--output" not in arguments else ()), *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script, settings, policy",
    [
        *((script, {}, "passive") for script in ("test.py", "test_flux.py", "compare.py")),
        ("test.py", {"OMP_WAIT_POLICY": "active"}, "active"),
        ("test.py", {"GOMP_SPINCOUNT": "9"}, None),
    ],
)
def test_idle_threads_sleep_beside_a_busy_process(tmp_path, script, settings, policy):
    """The policy is set before torch is imported: in torch's place stands a module that prints the policy."""
    prints = "import os\nprint(os.environ.get('OMP_WAIT_POLICY'), end='', flush=True)\nos._exit(0)\n"
    (tmp_path / "torch.py").write_text(prints)
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name} | settings
    line, place = [sys.executable, ROOT / script, "--model", "demo"], {"PYTHONPATH": str(tmp_path)}
    line += ["--against", "heun"] * (script == "compare.py")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            printed = subprocess.run(line, capture_output=True, text=True, env=environment | place)
        finally:
            busy.kill()
    assert printed.stdout == str(policy), printed.stderr


@pytest.mark.parametrize(
    "arguments, running, policy",
    [
        ([], 3, None),  # the real model, on the GPU
        (["--model", "some/model", "--device", "cuda"], 3, None),
        (["--model", "demo"], 3, "passive"),
        (["--device", "cpu"], 3, "passive"),
        (["--model", "demo"], 1, None),  # on an idle machine, spinning is faster
    ],
)
def test_a_gpus_model_and_a_quiet_machine_are_left_alone(monkeypatch, arguments, running, policy):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(start.Path, "exists", lambda path: path.parent.name == "dev")  # a machine with a GPU
    monkeypatch.setattr(start, "_running_processes", lambda: running)
    start.set_wait_policy(parse(SDXL, arguments))
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_help_needs_no_torch(tmp_path):
    """So that --help answers quickly."""
    (tmp_path / "torch.py").write_text("raise ImportError")
    line, place = [sys.executable, ROOT / "test_flux.py", "--help"], {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(line, capture_output=True, text=True, env=os.environ | place)
    assert result.returncode == 0 and "--samplers" in result.stdout


@pytest.mark.parametrize(
    "script, after",
    [("test.py", name) for name in ("gallery.options", "torch", "diffusers")] + [("test_flux.py", "gallery.grid")],
)
def test_ctrl_c_while_the_script_starts(tmp_path, script, after):
    """During the import of a module: exit status 130, and no traceback."""
    interrupts = f"""
import builtins, os, runpy, signal, sys
def importing(name, *rest, real=builtins.__import__, **named):
    if name == {after!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest, **named)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
builtins.__import__ = importing
sys.argv = [{script!r}, "--output", {str(tmp_path)!r}]
runpy.run_path({script!r}, run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", interrupts], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_ctrl_c_while_it_draws(tmp_path, monkeypatch, capsys):
    """The finished pictures are kept, no file is half written, and one line says how to continue."""
    drawn = []

    def write(image, path, *rest):
        if drawn:
            os.kill(os.getpid(), signal.SIGINT)
        drawn.append(path)
        write_png(image, path, *rest)

    monkeypatch.setattr(gallery_grid, "write_png", write)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run_here(SDXL, "--samplers", "euler", "heun", "--steps", 1, "--output", tmp_path) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("interrupted; the same command with --resume goes on")
    assert list(tmp_path.iterdir()) == [drawn[0]] and read_settings(drawn[0])


@pytest.fixture
def closed_pipe():
    """The writing end of a pipe whose reader has ended, like `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as end:
        yield end


def test_help_into_a_closed_pipe(closed_pipe):
    line = [sys.executable, ROOT / "test.py", "--help"]
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": ""}  # argparse ignores an error of a write
    result = subprocess.run(line, stdout=closed_pipe, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert (result.returncode, result.stderr) == (141, "")


def test_output_into_a_closed_pipe(tmp_path, closed_pipe, monkeypatch):
    with (tmp_path / "errors").open("w") as errors:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        monkeypatch.setattr(sys, "stderr", errors)
        assert run_here(SDXL, "--samplers", "euler", "--steps", 1, "--output", tmp_path) == 141


def test_a_picture_that_is_not_finite_has_failed(tmp_path, capsys):
    """The guidance is so strong that float32 overflows. The other picture is drawn."""
    options = ("--samplers", "euler", "--steps", 2, "--guidance", 1e30, "--output", tmp_path)
    assert run_here(SDXL, *options) == 1
    out = capsys.readouterr().out
    assert "FAILED: the picture is not finite" in out and "0 of 1 drawn" in out
    assert [path.name for path in tmp_path.iterdir()] == ["sdxl-demo-grid.png"]


def test_versions_that_do_not_exist_are_no_success():
    environment = {**os.environ, "ONLY": "nope"}
    result = subprocess.run([ROOT / ".ci" / "versions"], capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "ONLY=nope: there are lowest-direct-3.10 lowest" in result.stderr
