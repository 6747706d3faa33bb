"""Settings as AUTOMATIC1111's web UI writes them into `parameters`, the text that viewers and other tools read.

    a prompt, of one line or more
    Negative prompt: what not to draw
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.0, Seed: 2, Size: 1024x1024, Model: ...

A value with a comma, a colon or a line break is quoted as JSON. Names that the web UI lacks stand as they are; those of
samplers that it spells like another are there a second time, as `ComfyUI sampler`.
"""

from __future__ import annotations

import json
import re

SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "lms": "LMS",
    "dpm_fast": "DPM fast",
    "dpm_adaptive": "DPM adaptive",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "ddim": "DDIM",
}
SCHEDULES = {
    "scheduler": "Automatic",
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "simple": "Simple",
    "normal": "Normal",
    "sgm_uniform": "SGM Uniform",
    "ddim_uniform": "DDIM",
    "beta": "Beta",
    "kl_optimal": "KL Optimal",
}
# the text's names, and those of the settings beside them in the picture
NAMES = {
    "Steps": "steps",
    "Sampler": "sampler",
    "Schedule type": "schedule",
    "CFG scale": "guidance",
    "Distilled CFG Scale": "distilled",
    "Seed": "seed",
    "Size": "size",
    "Model": "model",
    "ComfyUI": "comfy",
    "ComfyUI sampler": "alias",
    "Precision": "dtype",
}
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def write_parameters(settings: dict[str, str]) -> str:
    """The text of a picture's settings. FLUX's guidance is its `Distilled CFG Scale`, and true CFG its `CFG scale`."""
    values = dict(settings)
    sampler = values.get("sampler", "")
    values["sampler"] = SAMPLERS.get(sampler.removesuffix("_gpu"), sampler)
    if sampler.endswith("_gpu"):  # the web UI has no second name for what draws its noise on the GPU
        values["alias"] = sampler
    if values.get("comfy") == "False":
        del values["comfy"]
    values["schedule"] = SCHEDULES.get(values["schedule"], values["schedule"])
    if "true_cfg" in values:
        values["distilled"], values["guidance"] = values["guidance"], values["true_cfg"]
    pairs = [f"{name}: {_quoted(values[key])}" for name, key in NAMES.items() if values.get(key)]
    lines = [values["prompt"]]
    if values.get("negative_prompt"):
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    return "\n".join([*lines, ", ".join(pairs)])


def read_parameters(text: str) -> dict[str, str]:
    """The settings of a text that `write_parameters` wrote, or the web UI, as far as it holds them."""
    *lines, last = text.strip().split("\n")
    found = dict(_PAIR.findall(last))
    if len(found) < 3:  # as the web UI has it: then it is a line of the prompt
        lines, found = [*lines, last], {}
    prompt, _, negative = "\n".join(["", *lines]).partition("\nNegative prompt:")
    settings = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    settings |= {key: _unquoted(found[name]) for name, key in NAMES.items() if name in found}
    for key, labels in (("sampler", SAMPLERS), ("schedule", SCHEDULES)):
        names = {label: name for name, label in labels.items()}
        if key in settings:
            settings[key] = names.get(settings[key], settings[key])
    if "alias" in settings:
        settings["sampler"] = settings.pop("alias")
    if "distilled" in settings:
        settings["true_cfg"], settings["guidance"] = settings["guidance"], settings.pop("distilled")
    return settings


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value


def _unquoted(value: str) -> str:
    try:
        return json.loads(value) if value.startswith('"') else value.strip()
    except json.JSONDecodeError:  # a quote that is a value's own
        return value.strip()
