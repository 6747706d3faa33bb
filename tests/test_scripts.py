"""`test.py` and `test_flux.py` as they are run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import PROMPT, ROOT
from diffusers.utils import logging
from PIL import Image, ImageChops, ImageStat

from gallery import grid as gallery_grid
from gallery.grid import _title
from gallery.models import reason
from gallery.options import FLUX, SDXL, parse
from gallery.pictures import contact_sheet, read_settings, write_png
from parity.options import parse_compare
from sdxl_comfy_pipeline import sampler_names

sys.path.append(str(ROOT / "benchmarks"))

import precision  # noqa: E402
import work_precision  # noqa: E402


def run(*arguments, script: str = "test.py", launcher: tuple[str, ...] = ()):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, *launcher, ROOT / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def run_here(family, *arguments) -> int:
    """As the script does, without a second import of torch."""
    verbosity = logging.get_verbosity()
    try:
        return gallery_grid.run(family, parse(family, ["--device", "cpu", *map(str, arguments)]))
    finally:
        logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """One grid of three samplers at four steps, of each family."""
    folder = tmp_path_factory.mktemp("grid")
    arguments = ("--samplers", "euler", "sample_dpm_2", "dpmpp_2m", "--steps", 4, "--output", folder)
    return folder, {script: run(*arguments, script=script) for script in ("test.py", "test_flux.py")}


@pytest.mark.parametrize("script, family", [("test.py", "sdxl"), ("test_flux.py", "flux")])
def test_grid(grid, script, family):
    folder, runs = grid
    assert runs[script].returncode == 0, runs[script].stderr
    assert f"No CUDA device here: drawing with the small demo model, demo/{family}." in runs[script].stdout
    assert f"3 of 3 drawn with demo, side by side in {folder / f'{family}-demo-grid.png'}" in runs[script].stdout
    churn = {"s_churn", "s_tmin", "s_tmax", "s_noise"}
    expected_options = {"euler": churn, "dpm_2": churn, "dpmpp_2m": set()}
    for sampler, evaluations in (("euler", "4"), ("dpm_2", "7"), ("dpmpp_2m", "4")):
        path = folder / f"{family}-demo-sample_{sampler}.png"
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


def test_resume_draws_only_what_is_missing(grid, tmp_path):
    folder = shutil.copytree(grid[0], tmp_path / "grid")
    kept, gone = folder / "sdxl-demo-sample_euler.png", folder / "sdxl-demo-sample_dpm_2.png"
    half = folder / "sdxl-demo-sample_dpmpp_2m.png"
    before = kept.stat().st_mtime_ns
    gone.unlink()
    half.write_bytes(half.read_bytes()[:2000])  # as if an older version had been cut off
    arguments = ("--samplers", "euler", "dpm_2", "dpmpp_2m", "--steps", 4, "--output", folder, "--resume")
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("(kept)") == 1
    assert kept.stat().st_mtime_ns == before and gone.exists() and read_settings(half)
    assert run(*arguments, "--seed", 1).stdout.count("(kept)") == 0


def test_several_processes_draw_the_same_files(grid, tmp_path):
    """By accelerate's launcher of several processes, which needs no GPU; its --cpu would start one of them."""
    folder, _ = grid
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    samplers = ("euler", "dpm_2", "dpmpp_2m")
    result = run("--samplers", *samplers, "--steps", 4, "--output", tmp_path, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert "3 of 3 drawn with demo by 2 processes" in result.stdout
    for sampler in samplers:
        one, two = (Image.open(path / f"sdxl-demo-sample_{sampler}.png") for path in (folder, tmp_path))
        assert one.tobytes() == two.tobytes()


def test_a_sampler_that_fails_does_not_stop_the_others(tmp_path):
    """A file in the way of one picture."""
    (tmp_path / "sdxl-demo-sample_euler.png").mkdir()
    result = run("--samplers", "euler", "heun", "--steps", 2, "--output", tmp_path)
    assert result.returncode == 1
    assert "1 of 2 drawn" in result.stdout
    assert "FAILED: IsADirectoryError" in result.stdout
    assert (tmp_path / "sdxl-demo-sample_heun.png").is_file() and (tmp_path / "sdxl-demo-grid.png").is_file()
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_sheet_that_cannot_be_written_is_told_beside_the_table(tmp_path, capsys, seeds):
    """The pictures are there; a folder has the name of the (first) sheet."""
    (tmp_path / f"sdxl-demo{'-seed2' * (seeds > 1)}-grid.png").mkdir()
    arguments = ("--model", "demo", "--samplers", "euler", "--steps", 1, "--seeds", seeds, "--output", tmp_path)
    assert run_here(SDXL, *arguments) == 1
    *table, failed, summary = capsys.readouterr().out.splitlines()
    assert any(line.startswith("euler  ") for line in table)
    assert failed.startswith("FAILED: ") and "-grid.png: IsADirectoryError" in failed
    assert summary.startswith(f"{seeds} of {seeds} drawn with demo") and ("1 sheets like" in summary) == (seeds > 1)
    assert len(list(tmp_path.glob("*-sample_euler.png"))) == seeds and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("scale", [1, 3])
def test_evaluations_are_counted_once_a_step_with_true_cfg(tmp_path, scale):
    """FLUX's transformer is called twice for one evaluation there; SDXL's guidance is one call of twice the batch."""
    options = ("--negative-prompt", "snow", "--true-cfg", scale, "--samplers", "euler", "heun", "--steps", 2)
    assert run_here(FLUX, "--model", "demo", *options, "--output", tmp_path) == 0
    for sampler, evaluations in (("euler", "2"), ("heun", "3")):
        assert read_settings(tmp_path / f"flux-demo-sample_{sampler}.png")["evaluations"] == evaluations


def test_the_demo_model_by_its_path_has_the_demo_models_names(tmp_path, monkeypatch):
    """Not the real model's, sdxl-*.png, which it would overwrite."""
    monkeypatch.chdir(ROOT)
    for folder in ("demo/sdxl", ROOT / "demo" / "sdxl"):
        options = ("--model", folder, "--samplers", "euler", "--steps", 1, "--resume", "--output", tmp_path)
        assert run_here(SDXL, *options) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"sdxl-demo-sample_euler.png", "sdxl-demo-grid.png"}
    assert read_settings(tmp_path / "sdxl-demo-sample_euler.png")["model"] == "demo"


@pytest.mark.parametrize(
    "family, kind, message",
    [
        (SDXL, "FluxPipeline", "is a model of FLUX: test_flux.py draws it"),
        (FLUX, "StableDiffusionXLPipeline", "is a model of SDXL: test.py draws it"),
        (FLUX, "StableDiffusion3Pipeline", "is a model of StableDiffusion3Pipeline, not of FluxPipeline"),
        (SDXL, "StableDiffusionXLImg2ImgPipeline", "no file named config.json"),  # the same models, so it goes on
        (SDXL, "SomebodysPipeline", "no file named config.json"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_its_index(tmp_path, capsys, family, kind, message):
    """Before anything of it is loaded: there is nothing but the index here."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "vae": ["diffusers", "AutoencoderKL"]}))
    assert run_here(family, "--model", tmp_path, "--output", tmp_path / "output") == 2
    assert message in capsys.readouterr().err


def test_a_model_of_another_kind_is_refused_by_the_hubs_index(tmp_path, monkeypatch, capsys):
    """As it stands in the cache, which a download fills."""
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "models--somebody--something" / "refs").mkdir()
    (tmp_path / "models--somebody--something" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert run_here(SDXL, "--model", "somebody/something", "--output", tmp_path / "output") == 2
    assert "somebody/something is a model of FLUX: test_flux.py draws it" in capsys.readouterr().err


def test_sequential_offload_without_a_gpu_is_one_line(tmp_path, capsys):
    assert run_here(SDXL, "--model", "demo", "--offload", "sequential", "--output", tmp_path) == 2
    assert "--offload sequential: there is no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--steps", "abc"), "--steps: has to be a whole number, at least 1, but is 'abc'"),
        (("--samplers", ""), "--samplers: names none"),
        (("--samplers", ",", " "), "--samplers: names none"),
        (("--guidance", "nan"), "--guidance: has to be a finite number, but is 'nan'"),
        (("--guidance=-inf",), "--guidance: has to be a finite number"),
        (("--seed", "99999999999999999999"), "--seed: has to be a whole number in -9223372036854775808.."),
        (("--seed", "-9223372036854775809"), "--seed: has to be a whole number in"),
        (("--seed", "18446744073709551615", "--seeds", "2"), "--seeds: the last of them would be 18446744073709551616"),
        (("--seed", "18446744073709551616", "--comfy"), "--seed: has to be a whole number in"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_cannot_be_right_are_refused_in_words(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        parse(SDXL, list(arguments))
    assert f"error: argument {message}" in capsys.readouterr().err.splitlines()[-1]
    if not {"--samplers", "--seeds", "--comfy"} & set(arguments):  # compare.py has the others too
        with pytest.raises(SystemExit, match="2"):
            parse_compare(list(arguments))


@pytest.mark.parametrize("seed, comfy", [(-(2**63), ()), (2**64 - 1, ()), (2**64 - 1, ("--comfy",))])
def test_the_first_and_the_last_seed_draw(tmp_path, seed, comfy):
    options = ("--model", "demo", "--samplers", "dpmpp_sde", "--steps", 2, *comfy, "--seed", seed)
    assert run_here(SDXL, *options, "--output", tmp_path) == 0


def test_names_in_one_argument():
    assert parse(SDXL, ["--samplers", "euler, heun", "lms"]).samplers == ["euler", "heun", "lms"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--samplers", "dpmp_2m"), "did you mean dpmpp_2m"),
        (("--schedule", "karas"), "did you mean karras"),
        (("--steps", "0"), "at least 1"),
        (("--height", "100"), "divisible by 8"),
        (("--output", "/proc/nothing"), "Name another folder with --output"),
        (("--model", "nobody/nothing-of-this-name"), "use --model demo"),
        (("--model", "missing.safetensors"), "there is no file missing.safetensors"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    result = run(*(("--output", tmp_path) if "--output" not in arguments else ()), *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_help_is_quick():
    """It must not import torch. Ten times what it takes, a third of what torch alone takes."""
    start = time.perf_counter()
    result = run("--help", script="test_flux.py")
    assert result.returncode == 0 and "--samplers" in result.stdout
    assert time.perf_counter() - start < 1.5


def test_png_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "picture.png"
    write_png(Image.new("RGB", (8, 8)), path, {"prompt": "Grüße, 宇航员", "sampler": "euler"})
    assert read_settings(path) == {"prompt": "Grüße, 宇航员", "sampler": "euler"}

    class Broken(Image.Image):
        def save(self, target, **options):
            target.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_png(Broken(), path)
    assert read_settings(path)["sampler"] == "euler"
    assert list(tmp_path.iterdir()) == [path]


def test_contact_sheet_shows_failures_too(tmp_path):
    write_png(Image.new("RGB", (64, 32), "red"), tmp_path / "a.png")
    sheet = contact_sheet(
        ["title"], [("a", "4 evaluations", tmp_path / "a.png"), ("b", "out of memory", None)], cell=200
    )
    colours = {colour for _, colour in sheet.getcolors(100_000)}
    assert (255, 0, 0) in colours and (245, 236, 236) in colours


LONG = "a word of several that tell what failed " * 40


def ink(entries, changed):
    """The box around what is drawn for one text: where the sheet differs with `changed` in place of `entries`."""
    return ImageChops.difference(contact_sheet(["title"], entries), contact_sheet(["title"], changed)).getbbox()


@pytest.mark.parametrize("label", ["lms", "dpmpp_2s_ancestral"])
@pytest.mark.parametrize("size", [(16, 64), (64, 64), (64, 6)])
def test_labels_of_a_sheet_do_not_overlap(tmp_path, size, label):
    """Names and notes side by side, however narrow the pictures, each within its own column."""
    write_png(Image.new("RGB", size, "red"), tmp_path / "a.png")
    entries = [(label, "17 evaluations, 1234.5 s", tmp_path / "a.png")] * 4
    boxes = []
    for i in range(3):  # the fourth keeps the columns as they are
        boxes.append(ink(entries, [*entries[:i], ("", "", entries[i][2]), *entries[i + 1 :]]))
    assert all(a[2] < b[0] for a, b in zip(boxes, boxes[1:]))


@pytest.mark.parametrize("size", [(64, 64), (64, 6), (320, 10)])
def test_why_a_sampler_failed_stays_in_its_row(tmp_path, size):
    write_png(Image.new("RGB", size, "red"), tmp_path / "a.png")
    entries = [("a", "1 evaluation", tmp_path / "a.png"), ("b", LONG, None)] + [("c", "", tmp_path / "a.png")] * 5
    why = ink(entries, [entries[0], ("b", "", None), *entries[2:]])
    below = ink(entries, [*entries[:6], ("", "", entries[6][2])])  # the label in the next row
    beside = ink(entries, [*entries[:2], ("", "", entries[2][2]), *entries[3:]])
    assert why[3] < below[1] and why[2] < beside[0] and why[3] - why[1] > 10
    sheet, left = contact_sheet(["title"], entries), why[0] - 4
    box = [y for y in range(sheet.height) if sheet.getpixel((left, y)) == (245, 236, 236)]
    assert box[0] < why[1] and why[3] < box[-1] - 4  # whole lines, with room below


@pytest.mark.parametrize("word", ["WWWW ", "iiii ", "W", "a/long-path/with_no_space"])
def test_text_is_wrapped_by_its_width(word):
    """No line reaches into the margin, and none is broken long before it."""
    sheet = contact_sheet([word * 60, word * 60], [("a", "failed", None)])
    right = ImageChops.invert(sheet).getbbox()[2]
    assert 0.85 * (sheet.width - 14) < right <= sheet.width - 14


def test_the_first_text_of_a_title_is_large_on_all_of_its_lines():
    sheet = contact_sheet(
        ["several words that take more than one line of a title " * 2, "prompt"], [("a", "failed", None)]
    )
    rows = [sheet.crop((0, 14 + 26 * i, sheet.width, 40 + 26 * i)) for i in range(3)]
    heights = [box[3] - box[1] for box in (ImageChops.invert(row).getbbox() for row in rows)]
    assert heights[0] == heights[1] > heights[2]


def test_title_names_what_the_pictures_have_in_common():
    settings = {"steps": "4", "schedule": "beta", "guidance": "3.5", "seed": "7", "prompt": "a cat", "comfy": "False"}
    settings |= {"negative_prompt": "", "true_cfg": "1.0"}
    plain = "flux-demo: 2 samplers of k-diffusion, 4 steps, beta noise levels, guidance 3.5, seed 7"
    assert _title("flux-demo", 2, settings) == [plain, "a cat"]
    settings |= {"negative_prompt": "snow", "true_cfg": "2.0", "comfy": "True"}
    assert _title("flux-demo", 2, settings) == [
        plain.replace("k-diffusion", "k-diffusion as in ComfyUI").replace("3.5", "3.5, true CFG 2.0"),
        "a cat   (not: snow)",
    ]


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_the_committed_sheets_are_laid_out_as_they_were(tmp_path, family):
    """The committed pictures on a sheet are the committed sheet, but for how Pillow's versions draw letters."""
    sheet = ROOT / "output" / f"{family}-demo-grid.png"
    drawn = []
    for sampler in sampler_names():
        path = ROOT / "output" / f"{family}-demo-sample_{sampler}.png"
        said = read_settings(path)
        picture = gallery_grid.Picture(f"{family}-demo", said["prompt"], int(said["seed"]), sampler, path)
        drawn.append(gallery_grid.Drawn(picture, path, float(said["seconds"]), int(said["evaluations"])))
    settings = {"comfy": "False", **read_settings(sheet)}
    gallery_grid._write_sheet(tmp_path / "sheet.png", f"{family}-demo", settings, drawn)
    again, there = Image.open(tmp_path / "sheet.png"), Image.open(sheet)
    assert again.size == there.size
    assert max(ImageStat.Stat(ImageChops.difference(again, there)).mean) < 0.5


def test_work_precision_measures_again_for_another_number_of_images(tmp_path, monkeypatch):
    """What is committed holds for the default number; only samplers without noise, of one image, share it with 2."""
    file = tmp_path / "work_precision.json"
    shutil.copy(ROOT / "benchmarks" / file.name, file)
    name, before, results = "demo SDXL", json.loads(file.read_text()), work_precision.Results(file)
    model = work_precision.Demo(name, 16)
    work_precision.measure(name, model, results)
    assert results.get(f"{model.key}/floor", lambda: None) == before[f"{name}/floor"]
    assert json.loads(file.read_text()) == before
    monkeypatch.setattr(work_precision, "runs", lambda sampler: [{"steps": 4}])
    monkeypatch.setattr(work_precision, "sampler_names", lambda: ["euler", "euler_ancestral"])
    curves = work_precision.measure(name, work_precision.Demo(name, 2), results)
    assert curves["euler"] == [tuple(before[f'{name}/euler/{{"steps": 4}}'])]
    assert curves["euler_ancestral"][0][1] != before[f'{name}/euler_ancestral/{{"steps": 4}}'][1]
    assert json.loads(file.read_text()).keys() - before.keys() == {f'{name}, 2 images/euler_ancestral/{{"steps": 4}}'}


@pytest.mark.parametrize(
    "main, arguments, message",
    [
        (work_precision.main, ["--images", "0"], "argument --images: has to be a whole number, at least 1"),
        (precision.main, ["--samplers", "nope"], "argument --samplers: there is no 'nope'"),
        (
            precision.main,
            ["--samplers", "dpm_adaptive", "--models", "sdxl", "--dtypes", "bfloat16"],
            "argument --samplers: none of dpm_adaptive has a counterpart",
        ),
        (precision.main, ["--images", "5"], "argument --images: has to be a multiple of --batch"),
        (precision.main, ["--steps", "0"], "argument --steps: has to be a whole number, at least 1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_input_of_the_benchmarks(capsys, main, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_versions_that_do_not_exist_are_no_success():
    environment = {**os.environ, "ONLY": "nope"}
    result = subprocess.run([ROOT / ".ci" / "versions"], capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "ONLY=nope: there are lowest-direct-3.10 lowest" in result.stderr


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "--offload model"),
        (OSError("You are trying to access a gated repo."), "accept its licence"),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
def test_reasons(error, message):
    assert message in reason(error, "some/model") and "\n" not in reason(error)
