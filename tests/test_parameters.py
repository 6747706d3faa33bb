"""The `parameters` text of the pictures, `--comfy`, and that the text draws the picture again."""

from __future__ import annotations

import pytest
import torch
from closed_form import Mixture, sdxl_pipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scripts import run_here

from gallery.comfy import comfy_arguments
from gallery.options import FLUX, SDXL, parse
from gallery.parameters import AUTOMATIC, EVEN, SAMPLERS, SCHEDULES, read_parameters, write_parameters
from gallery.pictures import read_settings, write_png
from sdxl_comfy_pipeline import SCHEDULES as PIPELINE_SCHEDULES
from sdxl_comfy_pipeline import find_sampler, sampler_names

# as the web UI writes it: infotext of a picture of version 1.10, with a weight, a LoRA and values in quotes
WEB_UI = """(astronaut:1.2) in a jungle,
detailed <lora:cold:0.5>
Negative prompt: snow, cars
and text
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 6ce0, \
Model: "a, b: c", Lora hashes: "cold: 1a2b", Version: v1.10.1"""


def run(family, *arguments):
    assert run_here(family, *arguments) == 0


def test_text_of_the_web_ui_is_read():
    assert read_parameters(WEB_UI) == {
        "prompt": "(astronaut:1.2) in a jungle,\ndetailed <lora:cold:0.5>",
        "negative_prompt": "snow, cars\nand text",
        "steps": "20",
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "guidance": "7",
        "seed": "965400086",
        "size": "512x768",
        "model": "a, b: c",
    }


# Texts of the web UI's form: prompt, lines after "Negative prompt:", pairs; and what they say. 50 of them, by grammar.
LABELS = {  # sampler and schedule as versions since 1.9 spell them, and what they are
    ("Euler", "Automatic"): ("euler", "normal"),
    ("Euler a", "Automatic"): ("euler_ancestral", "normal"),
    ("Heun", "Automatic"): ("heun", "normal"),
    ("LMS", "Automatic"): ("lms", "normal"),
    ("DPM fast", "Automatic"): ("dpm_fast", "normal"),
    ("DPM adaptive", "Automatic"): ("dpm_adaptive", "normal"),
    ("DPM2", "Automatic"): ("dpm_2", "karras"),
    ("DPM2 a", "Automatic"): ("dpm_2_ancestral", "karras"),
    ("DPM++ 2S a", "Automatic"): ("dpmpp_2s_ancestral", "karras"),
    ("DPM++ SDE", "Automatic"): ("dpmpp_sde", "karras"),
    ("DPM++ 2M", "Automatic"): ("dpmpp_2m", "karras"),
    ("DPM++ 2M SDE", "Automatic"): ("dpmpp_2m_sde", "exponential"),
    ("DPM++ 3M SDE", "Automatic"): ("dpmpp_3m_sde", "exponential"),
    ("DDIM", "Automatic"): ("ddim", "normal"),
    ("DPM++ 2M", "Uniform"): ("dpmpp_2m", "normal"),
    ("Euler", "Uniform"): ("euler", "normal"),
    ("Euler", "Karras"): ("euler", "karras"),
    ("Euler a", "Exponential"): ("euler_ancestral", "exponential"),
    ("LMS", "Polyexponential"): ("lms", "polyexponential"),
    ("DPM++ 2M", "SGM Uniform"): ("dpmpp_2m", "sgm_uniform"),
    ("Euler", "KL Optimal"): ("euler", "kl_optimal"),
    ("Euler", "Simple"): ("euler", "simple"),
    ("Euler", "Normal"): ("euler", "normal"),
    ("Euler", "DDIM"): ("euler", "ddim_uniform"),
    ("Euler", "Beta"): ("euler", "beta"),
    # as versions before 1.9 spell both in one, and a name without a schedule
    ("DPM++ 2M Karras", None): ("dpmpp_2m", "karras"),
    ("DPM++ SDE Karras", None): ("dpmpp_sde", "karras"),
    ("DPM++ 2S a Karras", None): ("dpmpp_2s_ancestral", "karras"),
    ("DPM++ 2M SDE Karras", None): ("dpmpp_2m_sde", "karras"),
    ("DPM++ 2M SDE Exponential", None): ("dpmpp_2m_sde", "exponential"),
    ("DPM++ 3M SDE Karras", None): ("dpmpp_3m_sde", "karras"),
    ("DPM++ 3M SDE Exponential", None): ("dpmpp_3m_sde", "exponential"),
    ("LMS Karras", None): ("lms", "karras"),
    ("DPM2 Karras", None): ("dpm_2", "karras"),
    ("DPM2 a Karras", None): ("dpm_2_ancestral", "karras"),
    ("DPM++ 2M", None): ("dpmpp_2m", "normal"),
    ("DPM++ 3M SDE", None): ("dpmpp_3m_sde", "normal"),
    ("Euler a", None): ("euler_ancestral", "normal"),
    ("Euler A", None): ("euler_ancestral", "normal"),
    # names that k-diffusion has not: as they stand, for the scripts to refuse
    ("DPM++ 2M SDE Heun", "Karras"): ("DPM++ 2M SDE Heun", "karras"),
    ("Euler", "Align Your Steps"): ("euler", "Align Your Steps"),
}
PROMPTS = {  # the lines before the pairs, and the two prompts in them
    "a cat": ("a cat", ""),
    "a cat\nNegative prompt: snow": ("a cat", "snow"),
    "a cat,\n(red:1.2) <lora:x:1>\nNegative prompt: snow,\nice": ("a cat,\n(red:1.2) <lora:x:1>", "snow,\nice"),
    "a cat\n Negative prompt: snow": ("a cat", "snow"),
    "a cat\n\tNegative prompt:snow ": ("a cat", "snow"),
    "Negative prompt: snow": ("", "snow"),
    "a cat\n\nNegative prompt: snow\n\nice": ("a cat", "snow\n\nice"),
    "a cat\nNegative prompt: snow\nNegative prompt: ice": ("a cat", "snow\nice"),
    "Steps: to the sea, Size: large": ("Steps: to the sea, Size: large", ""),
}
PAIRS = (
    "Steps: 20, {sampler}CFG scale: 7, Seed: 42, Size: 512x768, Model hash: 31e35c80fc, Clip skip: 2, Version: v1.9.4"
)


@pytest.mark.parametrize("labels, names", LABELS.items(), ids=str)
def test_samplers_and_schedules_of_the_web_ui(labels, names):
    sampler, schedule = labels
    text = f"Sampler: {sampler}, " + (f"Schedule type: {schedule}, " if schedule else "")
    read = read_parameters("a cat\n" + PAIRS.format(sampler=text))
    assert (read["sampler"], read["schedule"]) == names
    assert (read["steps"], read["guidance"], read["seed"], read["size"]) == ("20", "7", "42", "512x768")
    assert read_parameters(write_parameters(read)) == read


@pytest.mark.parametrize("lines, prompts", PROMPTS.items(), ids=repr)
def test_prompts_of_the_web_ui(lines, prompts):
    read = read_parameters(lines + "\n" + PAIRS.format(sampler="Sampler: Euler, Schedule type: Karras, "))
    assert (read["prompt"], read["negative_prompt"]) == prompts
    assert read_parameters(write_parameters(read)) == read


def test_fifty_texts():
    assert len(LABELS) + len(PROMPTS) == 50


def test_the_schedulers_own_levels_are_not_called_automatic():
    """That is the sampler's own in the web UI, another picture."""
    settings = {"prompt": "a cat", "sampler": "dpmpp_2m", "schedule": "scheduler", "steps": "4"}
    assert "Schedule type: scheduler" in write_parameters(settings)
    assert read_parameters(write_parameters(settings))["schedule"] == "scheduler"
    assert "scheduler" not in {*AUTOMATIC.values(), EVEN}


@pytest.mark.parametrize(
    "prompt", ["a cat\nNegative prompt: snow", " a cat ", "a\n  b", "Negative prompt:", "\n", "a\rb"]
)
@pytest.mark.parametrize("negative", ["", "ice\n\n", "Negative prompt: ice"])
def test_a_prompt_that_the_form_cannot_hold_comes_back(prompt, negative):
    settings = {"prompt": prompt, "negative_prompt": negative, "sampler": "euler", "schedule": "karras", "steps": "4"}
    assert read_parameters(write_parameters(settings)) == settings


def test_a_value_with_a_quote_of_its_own_is_read():
    assert read_parameters("cat\nSteps: 4, Seed: 1, Size: 8x8, Model: \"Anna's")["model"] == "\"Anna's"


def test_text_is_that_of_the_web_ui():
    settings = {
        "prompt": "an astronaut",
        "negative_prompt": "snow, cars",
        "sampler": "dpmpp_2s_ancestral",
        "schedule": "sgm_uniform",
        "steps": "25",
        "guidance": "5.0",
        "seed": "2",
        "size": "128x128",
        "model": "C:\\models\\sd_xl.safetensors",
    }
    assert write_parameters(settings) == (
        "an astronaut\nNegative prompt: snow, cars\n"
        "Steps: 25, Sampler: DPM++ 2S a, Schedule type: SGM Uniform, CFG scale: 5.0, Seed: 2, Size: 128x128,"
        ' Model: "C:\\\\models\\\\sd_xl.safetensors"'
    )
    assert read_parameters(write_parameters(settings)) == settings


@pytest.mark.parametrize(
    "sampler, label, added",
    [
        ("ddim", "DDIM", ""),
        ("dpmpp_2m_sde_gpu", "DPM++ 2M SDE", ", ComfyUI sampler: dpmpp_2m_sde_gpu"),
        ("dpmpp_sde_gpu", "DPM++ SDE", ", ComfyUI sampler: dpmpp_sde_gpu"),
    ],
)
def test_names_of_comfyui_are_spelt_as_in_the_web_ui(sampler, label, added):
    settings = {"prompt": "a cat", "negative_prompt": "", "steps": "4", "sampler": sampler, "schedule": "karras"}
    written = write_parameters({**settings, "comfy": "False"})
    assert written == f"a cat\nSteps: 4, Sampler: {label}, Schedule type: Karras{added}"
    assert read_parameters(written) == settings


text = st.text(st.characters(exclude_categories=("Cs",)))


@given(
    prompt=text,
    negative=text,
    model=text.map(str.strip).filter(bool),
    sampler=st.sampled_from([*sampler_names(), "ddim", "dpmpp_2m_sde_gpu", "dpmpp_sde_gpu"]),
    schedule=st.sampled_from(["scheduler", *PIPELINE_SCHEDULES]),
    true_cfg=st.none() | st.floats(1, 20).map(str),
)
def test_any_settings_come_back(prompt, negative, model, sampler, schedule, true_cfg):
    settings = {"prompt": prompt, "negative_prompt": negative, "model": model, "sampler": sampler, "schedule": schedule}
    settings |= {"steps": "4", "guidance": "3.5", "seed": "0", "size": "64x64", "dtype": "float32", "comfy": "True"}
    settings |= {"true_cfg": true_cfg} if true_cfg else {}
    assert read_parameters(write_parameters(settings)) == settings


def test_names_are_known_to_both_sides():
    """Of the samplers all, so that a new one of k-diffusion's gets a label; of the schedules those of the web UI."""
    assert set(SAMPLERS) == {*sampler_names(), "ddim"}
    assert set(SCHEDULES) <= set(PIPELINE_SCHEDULES)
    for labels in (SAMPLERS, SCHEDULES):
        assert len(set(labels.values())) == len(labels)


@pytest.mark.parametrize(
    "family, options",
    [
        (SDXL, ("--samplers", "dpmpp_2m_sde", "--negative-prompt", "snow: deep, cold", "--seed", 5)),
        (SDXL, ("--samplers", "dpm_2_ancestral", "--comfy", "--guidance", 4, "--width", 96)),
        (SDXL, ("--samplers", "dpmpp_2m_sde_gpu", "--comfy")),
        (SDXL, ("--samplers", "ddim", "--seed", 3)),
        (FLUX, ("--samplers", "euler_ancestral", "--schedule", "beta", "--comfy", "--guidance", 2)),
        (FLUX, ("--samplers", "dpmpp_2m", "--negative-prompt", "a cat", "--true-cfg", 1.5)),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else value.name,
)
def test_the_text_draws_the_picture_again(tmp_path, family, options):
    """With nothing but what the `parameters` of the first picture say."""
    run(family, *options, "--steps", 4, "--output", tmp_path / "first")
    (first,) = (tmp_path / "first").glob("*-sample_*.png")
    read = read_parameters(read_settings(first)["parameters"])
    width, height = read.pop("size").split("x")
    arguments = [f"--width={width}", f"--height={height}", f"--samplers={read.pop('sampler')}"]
    arguments += ["--comfy"] if read.pop("comfy", None) else []
    read.pop("true_cfg" if read.get("true_cfg") == "1.0" else "", None)  # says that there is no negative prompt
    arguments += [f"--{name.replace('_', '-')}={value}" for name, value in read.items()]
    run(family, *arguments, "--output", tmp_path / "again")
    again = tmp_path / "again" / first.name
    assert Image.open(first).tobytes() == Image.open(again).tobytes()
    assert read_settings(first)["parameters"] == read_settings(again)["parameters"]
    (sheet,) = (tmp_path / "again").glob("*-grid.png")
    assert read_parameters(read_settings(sheet)["parameters"])["prompt"] == read["prompt"]


def test_resume_tells_pictures_of_comfyui_from_plain_ones(tmp_path, capsys):
    """With the same levels and seed, whichever was there first."""
    arguments = ["--samplers", "euler", "--steps", 2, "--schedule", "karras", "--output", tmp_path, "--resume"]
    kept = []
    for comfy in (["--comfy"], [], [], ["--comfy"], ["--comfy"]):
        run(SDXL, *arguments, *comfy)
        kept.append(capsys.readouterr().out.count("(kept)"))
    assert kept == [0, 0, 1, 0, 1]


def test_resume_keeps_plain_pictures_that_do_not_say_so(tmp_path, capsys):
    """As the committed ones: `comfy` stood in ComfyUI's alone once."""
    arguments = ["--samplers", "euler", "--steps", 2, "--output", tmp_path]
    run(SDXL, *arguments)
    (path,) = tmp_path.glob("*-sample_euler.png")
    settings = read_settings(path)
    assert settings.pop("comfy") == "False" and "ComfyUI" not in settings["parameters"]
    write_png(Image.open(path), path, settings)
    run(SDXL, *arguments, "--resume")
    assert "(kept)" in capsys.readouterr().out


def test_comfy_in_the_options(capsys):
    """ComfyUI's usual levels, unless others are named."""
    assert parse(SDXL, ["--comfy"]).schedule == "normal" and parse(FLUX, ["--comfy"]).schedule == "simple"
    assert parse(SDXL, ["--comfy", "--schedule", "beta"]).schedule == "beta"
    assert parse(SDXL, ["--comfy", "--schedule", "scheduler"]).schedule is None
    assert parse(SDXL, []).schedule == "karras" and parse(FLUX, []).schedule is None
    with pytest.raises(SystemExit):
        parse(SDXL, ["--comfy", "--seed", "-1"])
    assert "--seed" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["euler", "dpm_2", "dpm_2_ancestral"])
def test_comfy_gives_dpm_2_the_levels_of_the_ksampler_node(sampler):
    """One more than the steps, less the last but one; to all other samplers as many as the steps."""
    pipe = sdxl_pipeline(Mixture(torch.eye(16)[:3], torch.full((3,), 0.5)), torch.float32)
    nothing = torch.zeros(1, 1, 1)
    call = {
        "prompt_embeds": nothing,
        "pooled_prompt_embeds": nothing[0],
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    call |= {"height": 64, "width": 64}
    began = []
    pipe(
        **comfy_arguments(sampler, 6, 3, find_sampler),
        schedule="normal",
        **call,
        callback_on_step_end=lambda pipe, i, timestep, tensors: began.append(tensors["sigma"].item()) or {},
        callback_on_step_end_tensor_inputs=["sigma"],
    )
    if sampler == "euler":
        expected = pipe.noise_levels(6, schedule="normal")[0][:-1]
    else:
        expected = pipe.noise_levels(7, schedule="normal")[0][:-2]
    assert began == expected.tolist()
