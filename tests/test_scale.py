"""Many prompts and seeds: batches, a grid that is killed and goes on, and who draws what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from conftest import ROOT
from PIL import Image
from scripts import ENVIRONMENT, run, run_here

import sdxl_comfy_pipeline
from gallery import grid
from gallery.grid import units_of
from gallery.models import check_output
from gallery.options import FLUX, SDXL, parse
from gallery.pictures import read_settings, write_whole
from gallery.refused import Refused

PROMPTS = ["a robot in a desert", "a cat at sea, warm colors"]
SAMPLERS = ("euler", "dpmpp_2m_sde", "dpm_adaptive")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return ["--model", "demo", "--device", "cpu", "--samplers", *SAMPLERS, "--steps", "2", "3", "--seeds", "2"] + [
        *("--batch", "4", "--prompts", str(file), "--width", "64", "--height", "64")
    ]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(*arguments, "--output", folder).returncode == 0  # one thread: another number rounds otherwise
    return folder


def pixels(folder):
    return {path.name: Image.open(path).tobytes() for path in folder.glob("*-sample_*.png")}


def test_every_prompt_seed_and_sampler_has_its_picture(whole):
    expected = {
        f"sdxl-demo-{number:03}-seed{seed}-sample_{sampler}-steps{steps}.png": (prompt, str(seed), sampler, steps)
        for number, prompt in enumerate(PROMPTS, 1)
        for seed in (2, 3)
        for sampler in SAMPLERS
        for steps in "23"
    }
    found = {path.name: read_settings(path) for path in whole.glob("*-sample_*.png")}
    assert {name: (s["prompt"], s["seed"], s["sampler"], s["steps"]) for name, s in found.items()} == expected
    assert len(set(pixels(whole).values())) == len(expected) - 4  # dpm_adaptive chooses its own number of steps
    assert len(list(whole.glob("*-steps-grid.png"))) == len(PROMPTS) * 2
    assert not list(whole.glob(".*"))


def test_processes_check_the_folder_at_the_same_time(tmp_path):
    """Each process checks that it can write there, and none removes another's file."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check_output, [tmp_path] * 400))
    assert not list(tmp_path.iterdir())


def test_a_picture_of_a_batch_is_the_one_drawn_alone(whole, tmp_path):
    """To the rounding of float32 networks, which eight bits hardly show: one step of 255 at most."""
    options = ["--model", "demo", "--device", "cpu", "--samplers", *SAMPLERS, "--steps", "2", "--seed", "3"]
    options += ["--prompt", PROMPTS[1], "--width", "64", "--height", "64", "--output", str(tmp_path)]
    assert run_here(SDXL, *options) == 0
    for sampler in SAMPLERS:
        alone = Image.open(tmp_path / f"sdxl-demo-sample_{sampler}.png").tobytes()
        batch = Image.open(whole / f"sdxl-demo-002-seed3-sample_{sampler}-steps2.png").tobytes()
        assert max(abs(a - b) for a, b in zip(alone, batch)) <= 1


@pytest.mark.parametrize(
    "family, axis, values, rest",
    [
        (SDXL, "steps", "1 3", ["--comfy"]),
        (SDXL, "schedule", "scheduler beta 14.6,3,1,0", ["--steps", "2"]),
        (SDXL, "guidance", "1 4.5", ["--steps", "2", "--negative-prompt", "snow"]),
        (FLUX, "schedule", "simple karras", ["--comfy", "--steps", "2"]),
        (FLUX, "dtype", "float64 float32", ["--steps", "2"]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_pictures_of_a_sheet_are_those_of_single_runs(tmp_path, family, axis, values, rest):
    """Bit for bit, with the same settings in them; named by the value."""
    command = ["--samplers", "euler", "dpm_2", "--width", "64", "--height", "64", *rest]
    assert run_here(family, *command, f"--{axis}", *values.split(), "--output", tmp_path / "sheet") == 0
    for value in values.split():
        assert run_here(family, *command, f"--{axis}", value, "--output", tmp_path / value) == 0
        for alone in (tmp_path / value).glob("*-sample_*.png"):
            there = tmp_path / "sheet" / f"{alone.stem}-{axis}{value}.png"
            assert Image.open(there).tobytes() == Image.open(alone).tobytes()
            one, other = ({**read_settings(path), "seconds": ""} for path in (there, alone))
            assert one == other and one[axis].removesuffix(".0") == value
    assert len(list((tmp_path / "sheet").iterdir())) == 2 * len(values.split()) + 1


def test_a_column_whose_network_can_not_be_loaded_has_failed(tmp_path, capsys, monkeypatch):
    """The others are drawn, and the sheet says why these are not."""

    def load(*arguments, real=grid.load):
        if arguments[-1].dtype == "float16":
            raise Refused("out of GPU memory")
        return real(*arguments)

    monkeypatch.setattr(grid, "load", load)
    command = ("--samplers", "euler", "heun", "--steps", 1, "--dtype", "float32", "float16", "float64")
    assert run_here(SDXL, *command, "--output", tmp_path) == 1
    out = capsys.readouterr().out
    assert "4 of 6 drawn" in out and out.count("FAILED: out of GPU memory") == 2
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_one_option_alone_may_have_several_values(capsys):
    options = parse(SDXL, ["--steps", "4", "8", "4", "--guidance", "5", "5.0"])
    assert (options.axis, options.columns) == ("steps", [{"steps": 4}, {"steps": 8}]) and options.guidance == 5
    with pytest.raises(SystemExit, match="2"):
        parse(SDXL, ["--dtype", "float32", "float64", "--schedule", "karras", "scheduler"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "argument --dtype: has several values, and so has --schedule; only one option may" in line


# with --cpu in place of --multi_gpu, which needs no GPU, accelerate would start one process
TWO_PROCESSES = tuple("-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1".split())
TWO_PROCESSES += tuple("--mixed_precision no --dynamo_backend no --main_process_port 0".split())


def test_a_killed_run_resumes_to_the_same_files(arguments, whole, tmp_path):
    """Killed with five pictures or a few more drawn: what is there is whole, and --resume draws the others alone."""
    command = [sys.executable, ROOT / "test.py", *arguments, "--output", tmp_path]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet, cwd=ROOT, env=ENVIRONMENT)  # one thread, as the other runs
    while len(list(tmp_path.glob("*-sample_*.png"))) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = pixels(tmp_path)
    assert 5 <= len(before) < 24
    assert before == {name: value for name, value in pixels(whole).items() if name in before}
    times = {name: os.stat(tmp_path / name).st_mtime_ns for name in before}
    result = run(*arguments, "--output", tmp_path, "--resume", launcher=TWO_PROCESSES)
    assert result.returncode == 0, result.stderr
    assert "24 of 24 drawn with demo by 2 processes, 4 sheets" in result.stdout
    assert pixels(tmp_path) == pixels(whole)
    assert times == {name: os.stat(tmp_path / name).st_mtime_ns for name in before}


def test_every_process_has_its_share(arguments):
    """Each picture once, whatever N; of 13 samplers x 50 prompts x 4 seeds each process has the Nth part of the
    evaluations, to 2 % for N up to 3 and 12 % for 8 and 13."""
    options = parse(SDXL, [*arguments, "--seeds", "4"])
    options.prompts, names = [f"prompt {i}" for i in range(50)], sdxl_comfy_pipeline.sampler_names()
    units = list(units_of("sdxl", sdxl_comfy_pipeline, names, options))
    assert len({one.path for *_, unit in units for one in unit}) == sum(len(unit) for *_, unit in units) == 5200
    assert all(len(unit) == (1 if unit[0].row == "dpm_adaptive" else 4) for *_, unit in units)
    for processes in (2, 3, 8, 13):
        costs = Counter()
        for share, _, unit in units:
            two = unit[0].row in ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
            costs[share % processes] += len(unit) * (2 if two else 1)
        assert max(costs.values()) < (1.02 if processes < 8 else 1.12) * sum(costs.values()) / processes


def test_a_file_that_another_process_is_writing_stays(tmp_path):
    """Eight write the same picture at once; each removes its own temporary file alone, and one of them stands there."""
    theirs = tmp_path / ".99-abc.tmp"

    def write(temporary):
        temporary.write_bytes(b"whole")
        both.wait()  # until all of them have one

    both = Barrier(8)
    theirs.write_bytes(b"half")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write_whole(tmp_path / "a.png", write), range(8)))
    assert (tmp_path / "a.png").read_bytes() == b"whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == [theirs.name, "a.png"]


def test_prompts_file(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    for text, message in ((None, "can't read"), ("\n \n", "has no line with a prompt")):
        if text is not None:
            file.write_text(text)
        with pytest.raises(SystemExit):
            parse(SDXL, ["--prompts", str(file)])
        assert message in capsys.readouterr().err
    file.write_bytes("a cat\r\nein Männchen\r\n".encode("utf-8-sig"))  # as a Windows editor does
    assert parse(SDXL, ["--prompts", str(file)]).prompts == ["a cat", "ein Männchen"]
