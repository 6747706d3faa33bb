"""The `parameters` text of the pictures, `--comfy`, and drawing a picture again from its text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scripts import run_here
from test_workflow import picture, plain_graph

from comfy_ksampler import SAMPLERS as COMFY_SAMPLERS
from comfy_ksampler import SCHEDULERS, ksampler, levels
from gallery.options import FLUX, SDXL, parse
from gallery.parameters import read_parameters, write_parameters
from gallery.pictures import read_settings, write_png
from sdxl_comfy_pipeline import sampler_names


def run(family, *arguments):
    assert run_here(family, *arguments) == 0


# Texts in the web UI's form (prompt, lines after "Negative prompt:", pairs) and their meaning, by grammar.
LABELS = {  # sampler and schedule as spelt since version 1.9, and their names here
    ("Euler", "Automatic"): ("euler", "normal"),
    ("Euler a", "Automatic"): ("euler_ancestral", "normal"),
    ("DPM2", "Automatic"): ("dpm_2", "karras"),
    ("DPM2 a", "Automatic"): ("dpm_2_ancestral", "karras"),
    ("DPM++ 2S a", "Automatic"): ("dpmpp_2s_ancestral", "karras"),
    ("DPM++ SDE", "Automatic"): ("dpmpp_sde", "karras"),
    ("DPM++ 2M", "Automatic"): ("dpmpp_2m", "karras"),
    ("DPM++ 2M SDE", "Automatic"): ("dpmpp_2m_sde", "exponential"),
    ("DPM++ 3M SDE", "Automatic"): ("dpmpp_3m_sde", "exponential"),
    ("DDIM", "Automatic"): ("euler", "ddim_uniform"),
    ("DDIM", "Karras"): ("euler", "ddim_uniform"),
    ("DDIM", None): ("euler", "ddim_uniform"),
    ("DPM++ 2M", "Uniform"): ("dpmpp_2m", "normal"),
    ("Euler", "Karras"): ("euler", "karras"),
    ("Euler a", "Exponential"): ("euler_ancestral", "exponential"),
    ("LMS", "Polyexponential"): ("lms", "polyexponential"),
    ("DPM++ 2M", "SGM Uniform"): ("dpmpp_2m", "sgm_uniform"),
    ("Euler", "KL Optimal"): ("euler", "kl_optimal"),
    ("Euler", "DDIM"): ("euler", "ddim_uniform"),
    ("Euler", "Beta"): ("euler", "beta"),
    # both in one name, as before version 1.9, and a name without a schedule
    ("DPM++ 2M Karras", None): ("dpmpp_2m", "karras"),
    ("DPM++ 2M SDE Exponential", None): ("dpmpp_2m_sde", "exponential"),
    ("DPM2 a Karras", None): ("dpm_2_ancestral", "karras"),
    ("DPM++ 2M", None): ("dpmpp_2m", "normal"),
    ("Euler a", None): ("euler_ancestral", "normal"),
    ("Euler A", None): ("euler_ancestral", "normal"),
    # names that k-diffusion lacks stay as they are; the scripts refuse them
    ("Restart", "Karras"): ("Restart", "karras"),
    ("Euler", "Align Your Steps"): ("euler", "Align Your Steps"),
}
PROMPTS = {  # the lines before the pairs, and the two prompts in them
    "a cat": ("a cat", ""),
    "a cat\nNegative prompt: snow": ("a cat", "snow"),
    "a cat,\n(red:1.2) <lora:x:1>\nNegative prompt: snow,\nice": ("a cat,\n(red:1.2) <lora:x:1>", "snow,\nice"),
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


def test_prompts_in_one_line_with_the_settings():
    """Before the settings. Without prompts the line has the settings alone."""
    pairs = PAIRS.format(sampler="Sampler: Euler, Schedule type: Karras, ")
    for line, prompts in {
        f"a cat, red. {pairs}": ("a cat, red", ""),
        f"a cat Negative prompt: snow, ice, {pairs}": ("a cat", "snow, ice"),
        pairs: ("", ""),
    }.items():
        read = read_parameters(line)
        assert (read["prompt"], read["negative_prompt"], read["steps"]) == (*prompts, "20")


WRITTEN = [  # the sampler, and how the text spells it; the web UI lacks ComfyUI's second names
    ("dpmpp_2s_ancestral", "DPM++ 2S a", ""),
    ("ddim", "DDIM", ", ComfyUI sampler: ddim"),
    ("dpmpp_2m_sde_gpu", "DPM++ 2M SDE", ", ComfyUI sampler: dpmpp_2m_sde_gpu"),
]


@pytest.mark.parametrize("sampler, label, end", WRITTEN)
def test_text_is_that_of_the_web_ui(sampler, label, end):
    settings = {"prompt": "an astronaut", "negative_prompt": "snow, cars", "sampler": sampler}
    settings |= {"schedule": "sgm_uniform", "steps": "25", "guidance": "5.0", "seed": "2", "size": "128x128"}
    settings |= {"model": "C:\\models\\sd_xl.safetensors"}
    assert write_parameters({**settings, "comfy": "False"}) == (
        "an astronaut\nNegative prompt: snow, cars\n"
        f"Steps: 25, Sampler: {label}, Schedule type: SGM Uniform, CFG scale: 5.0, Seed: 2, Size: 128x128,"
        f' Model: "C:\\\\models\\\\sd_xl.safetensors"{end}'
    )
    assert read_parameters(write_parameters(settings)) == settings


text = st.text(st.characters(exclude_categories=("Cs",)))
# the web UI's form cannot hold these
hard = st.sampled_from(
    ["a cat\nNegative prompt: snow", " a cat ", "a\n  b", "Negative prompt:", "\n", "a\rb", "ice\n\n"]
)


@given(
    prompt=text | hard,
    negative=text | hard,
    model=text.map(str.strip).filter(bool),
    sampler=st.sampled_from([*sampler_names(), "ddim", "dpmpp_2m_sde_gpu", "dpmpp_sde_gpu"]),
    schedule=st.sampled_from(["scheduler", "polyexponential", *SCHEDULERS]),
    true_cfg=st.none() | st.floats(1, 20).map(str),
)
def test_any_settings_come_back(prompt, negative, model, sampler, schedule, true_cfg):
    settings = {"prompt": prompt, "negative_prompt": negative, "model": model, "sampler": sampler, "schedule": schedule}
    settings |= {"steps": "4", "guidance": "3.5", "seed": "0", "size": "64x64", "dtype": "float32", "comfy": "True"}
    settings |= {"true_cfg": true_cfg} if true_cfg else {}
    assert read_parameters(write_parameters(settings)) == settings


@pytest.mark.parametrize(
    "family, options",
    [
        (SDXL, ("--samplers", "dpmpp_2m_sde", "--negative-prompt", "snow: deep, cold", "--seed", 5)),
        (SDXL, ("--samplers", "dpmpp_2m_sde_gpu", "--comfy")),
        (SDXL, ("--samplers", "ddim", "--comfy", "--guidance", 4, "--width", 96)),
        (FLUX, ("--samplers", "heun", "--schedule", "simple", "--height", 96)),
        (FLUX, ("--samplers", "dpm_2", "--schedule", "beta", "--comfy", "--guidance", 2)),
        (FLUX, ("--samplers", "dpmpp_2m", "--negative-prompt", "a cat", "--true-cfg", 1.5)),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else value.name,
)
def test_the_text_draws_the_picture_again(tmp_path, family, options):
    """From only the `parameters` of the first picture."""
    run(family, "--width", 64, "--height", 64, *options, "--steps", 2, "--output", tmp_path / "first")
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


def test_resume_distinguishes_pictures_of_comfyui_from_plain_ones(tmp_path, capsys):
    """With the same levels and seed, in either order. Older plain pictures have no `comfy`."""
    arguments = ["--samplers", "euler", "--steps", 2, "--schedule", "karras", "--output", tmp_path, "--resume"]
    kept, path = [], tmp_path / "sdxl-demo-sample_euler.png"
    for comfy in (["--comfy"], [], [], ["--comfy"], ["--comfy"], [], []):
        run(SDXL, *arguments, *comfy)
        kept.append(capsys.readouterr().out.count("(kept)"))
        settings = read_settings(path)
        if settings.pop("comfy", None) == "False":
            assert "ComfyUI" not in settings["parameters"]
            write_png(Image.open(path), path, settings)
    assert kept == [0, 0, 1, 0, 1, 0, 1]


def test_comfy_in_the_options(capsys):
    """ComfyUI's usual levels, unless others are requested."""
    assert parse(SDXL, ["--comfy"]).schedule == "normal" and parse(FLUX, ["--comfy"]).schedule == "simple"
    assert parse(SDXL, ["--comfy", "--schedule", "beta"]).schedule == "beta"
    assert parse(SDXL, []).schedule == "karras" and parse(FLUX, []).schedule is None
    with pytest.raises(SystemExit):
        parse(SDXL, ["--comfy", "--seed", "-1"])
    assert "--seed" in capsys.readouterr().err


@pytest.mark.parametrize("name, family", [("sdxl", SDXL), ("flux", FLUX)])
def test_comfy_draws_ksamplers_picture(request, tmp_path, name, family):
    """The same picture as from the node's fields in Python."""
    pipe = request.getfixturevalue(name)
    fields = {"seed": 5, "steps": 3, "sampler_name": "dpm_2", "scheduler": "beta", "width": 96, "height": 64}
    guidance = {} if name == "sdxl" else {"guidance_scale": 3.5}
    by_hand = pipe("a cat", negative_prompt="snow", **ksampler(pipe, cfg=2.0, **fields), **guidance).images[0]
    cfg = ("--guidance", 2) if name == "sdxl" else ("--true-cfg", 2, "--guidance", 3.5)
    options = ("--prompt", "a cat", "--negative-prompt", "snow", "--seed", 5, "--steps", 3, "--samplers", "dpm_2")
    options += ("--schedule", "beta", "--width", 96, "--height", 64, *cfg)
    run(family, *options, "--comfy", "--output", tmp_path)
    path = tmp_path / f"{name}-demo-sample_dpm_2.png"
    assert Image.open(path).tobytes() == by_hand.tobytes()
    of_node = levels(pipe, "beta", 3, width=96, height=64, sampler_name="dpm_2").tolist()
    assert json.loads(read_settings(path)["sigmas"]) == pytest.approx(of_node, abs=1e-6)


def test_comfy_draws_all_that_run(tmp_path, capsys):
    """Without --samplers, all of ComfyUI's samplers that run here. A line reports the others."""
    run(SDXL, "--comfy", "--steps", 1, "--width", 64, "--height", 64, "--output", tmp_path)
    drawn = {path.stem.partition("sample_")[2] for path in tmp_path.glob("*-sample_*.png")}
    assert {*sampler_names(), "ddim", "dpmpp_sde_gpu"} <= drawn <= set(COMFY_SAMPLERS)
    reported = "of ComfyUI's samplers are left out" in capsys.readouterr().out
    assert reported == (drawn != set(COMFY_SAMPLERS))


def of_comfyui(path, **fields):
    """A picture of ComfyUI's first workflow."""
    graph = plain_graph(**{"seed": 7, "steps": 3, "cfg": 4.0, **fields})
    graph["5"]["inputs"] |= {"width": 64, "height": 96}
    return picture(path, prompt=graph)


def test_from_a_picture_of_comfyui(tmp_path, capsys):
    """With the picture's settings and sampler. Options on the command line take precedence."""
    path = of_comfyui(tmp_path / "comfyui.png")
    options = parse(SDXL, ["--from", str(path), "--model", "demo"])
    assert (options.prompt, options.negative_prompt, options.seed, options.steps) == ("a bottle", "watermark", 7, 3)
    assert (options.guidance, options.samplers, options.schedule) == (4.0, ["dpmpp_2m"], "karras")
    assert (options.width, options.height, options.comfy) == (64, 96, True)
    assert capsys.readouterr().err == ""
    options = parse(SDXL, ["--from", str(path), "--samplers", "euler", "heun", "--seed", "1", "--prompt", "a dog"])
    assert (options.samplers, options.seed, options.prompt, options.steps) == (["euler", "heun"], 1, "a dog", 3)
    run(SDXL, "--from", path, "--output", tmp_path / "output")
    (drawn,) = (tmp_path / "output").glob("*-sample_*.png")
    run(SDXL, "--from", drawn, "--output", tmp_path / "again")  # our own picture as well
    assert Image.open(tmp_path / "again" / drawn.name).tobytes() == Image.open(drawn).tobytes()


def test_from_reports_what_it_does_not_use(tmp_path, capsys):
    path = of_comfyui(tmp_path / "comfyui.png", denoise=0.5, model=["10", 0])
    parse(SDXL, ["--from", str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: not used: ") and "denoise 0.5: image to image" in line


@pytest.mark.parametrize(
    "family, fields, message",
    [
        (FLUX, {}, "was drawn with SDXL, which this script does not draw"),
        (SDXL, {"steps": 100_000}, "argument --steps: has to be a whole number from 1 to 1000"),
        (SDXL, {"seed": 2**64}, "argument --seed: has to be a whole number"),
        (SDXL, None, "has no settings of ComfyUI's or the web UI's"),
    ],
)
def test_from_refuses_in_one_line(tmp_path, capsys, family, fields, message):
    path = tmp_path / "picture.png"
    picture(path) if fields is None else of_comfyui(path, **fields)
    with pytest.raises(SystemExit, match="2"):
        parse(family, ["--from", str(path)])
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "field, option",
    [("steps", "--steps=5"), ("cfg", "--guidance=5"), ("seed", "--seed=5"), ("positive", "--prompt=a dog")],
)
def test_what_cannot_be_known_is_named_on_the_command_line(tmp_path, capsys, field, option):
    """If the command line lacks it, nothing is drawn."""
    path = of_comfyui(tmp_path / "a.png", **{field: ["4", 0] if field == "positive" else ["7", 0]})
    with pytest.raises(SystemExit, match="2"):
        parse(SDXL, ["--from", str(path)])
    node = "CheckpointLoaderSimple" if field == "positive" else "CLIPTextEncode"
    assert f"could not be read ({node}); name it with {option.partition('=')[0]}" in capsys.readouterr().err
    parse(SDXL, ["--from", str(path), option])
    assert f"could not be read ({node})" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sampler, drops", [("DPM2 a Karras", True), ("DPM++ 3M SDE", True), ("DPM++ 2M Karras", False)]
)
def test_levels_that_the_web_ui_drops(tmp_path, sampler, drops):
    """They are dropped here too, and a picture that is drawn without them says so."""
    text = "a cat\n" + PAIRS.format(sampler=f"Sampler: {sampler}, ")
    write_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", None, text)
    assert parse(SDXL, ["--from", str(tmp_path / "a.png")]).discard == drops
    assert not parse(SDXL, ["--from", str(tmp_path / "a.png"), "--samplers", "euler"]).discard
    for own in ({}, {"discard": "True"}):  # pictures of this project, of today and of an older version
        write_png(Image.new("RGB", (8, 8)), tmp_path / "b.png", {"sigmas": "[1, 0]", **own}, text)
        assert parse(SDXL, ["--from", str(tmp_path / "b.png")]).discard == (drops and bool(own))
    read = read_parameters(text)
    assert "Discard" not in write_parameters(read)
    read.pop("discard", None)
    assert ("Discard penultimate sigma: False" in write_parameters(read)) == drops
    assert "discard" not in read_parameters(write_parameters(read))


def test_from_a_picture_of_the_web_ui(tmp_path):
    """Without --comfy: the web UI has noise of its own."""
    path = picture(tmp_path / "a.png", parameters="a cat\n" + PAIRS.format(sampler="Sampler: DPM2, "))
    options = parse(SDXL, ["--from", str(path)])
    assert (options.prompt, options.samplers, options.schedule) == ("a cat", ["dpm_2"], "normal")
    assert (options.width, options.height, options.comfy) == (512, 768, False)
    (tmp_path / "prompts.txt").write_text("a dog")
    assert parse(SDXL, ["--from", str(path), "--prompts", str(tmp_path / "prompts.txt")]).prompts == ["a dog"]


def test_comfyui_guides_away_from_an_empty_text(tmp_path):
    """As ComfyUI's KSampler does where cfg is above 1. FLUX's picture changes, and its settings say so."""
    found = []
    for negative in (["--negative-prompt", ""], []):
        run(FLUX, "--comfy", "--samplers", "euler", "--steps", "2", "--output", tmp_path, *negative)
        path = tmp_path / "flux-demo-sample_euler.png"
        found.append((read_settings(path)["true_cfg"], Image.open(path).tobytes()))
    (guided, its_picture), (plain, other) = found
    assert (guided, plain) == ("2.0", "1.0") and its_picture != other
