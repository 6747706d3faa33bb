"""The `parameters` text of the pictures, `--comfy`, and that the text draws the picture again."""

from __future__ import annotations

import pytest
import torch
from closed_form import Mixture, sdxl_pipeline
from diffusers.utils import logging
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gallery import grid
from gallery.comfy import comfy_arguments
from gallery.options import FLUX, SDXL, parse
from gallery.parameters import SAMPLERS, SCHEDULES, read_parameters, write_parameters
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
    """As the script does, without a second import of torch."""
    verbosity = logging.get_verbosity()
    try:
        assert grid.run(family, parse(family, ["--model", "demo", "--device", "cpu", *map(str, arguments)])) == 0
    finally:
        logging.set_verbosity(verbosity)


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


text = st.text(st.characters(exclude_categories=("Cs", "Cc"))).map(str.strip)


@given(
    prompt=text,
    negative=text,
    model=text.filter(bool),
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
    assert set(SCHEDULES) - {"scheduler"} <= set(PIPELINE_SCHEDULES)
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
