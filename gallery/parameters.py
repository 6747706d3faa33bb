"""Settings as AUTOMATIC1111's web UI writes them into `parameters`, the text that viewers and other tools read.

    a prompt, of one line or more
    Negative prompt: what not to draw
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.0, Seed: 2, Size: 1024x1024, Model: ...

A value with a comma, a colon or a line break is quoted as JSON. Names that the web UI lacks stand unchanged. An entry
of our own follows where the text is ambiguous: `ComfyUI sampler` for a sampler that the web UI spells like another
one, and `Exact prompt` for a prompt that would be read differently.
"""

import json
import re

# fmt: off
SAMPLERS = {
    "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "dpm_2": "DPM2", "dpm_2_ancestral": "DPM2 a",
    "lms": "LMS", "dpm_fast": "DPM fast", "dpm_adaptive": "DPM adaptive", "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE", "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE",
}
SCHEDULES = {
    "karras": "Karras", "exponential": "Exponential", "polyexponential": "Polyexponential", "simple": "Simple",
    "normal": "Normal", "sgm_uniform": "SGM Uniform", "ddim_uniform": "DDIM", "beta": "Beta",
    "kl_optimal": "KL Optimal",
}
# names in the text: names of the settings in the picture
NAMES = {
    "Steps": "steps", "Sampler": "sampler", "Schedule type": "schedule", "Discard penultimate sigma": "discard",
    "CFG scale": "guidance", "Distilled CFG Scale": "distilled", "Seed": "seed", "Size": "size", "Model": "model",
    "ComfyUI": "comfy", "ComfyUI sampler": "alias", "Precision": "dtype", "Exact prompt": "exact_prompt",
    "Exact negative prompt": "exact_negative_prompt",
}
# fmt: on
ALIASES = {"ddim": "DDIM"} | {f"dpmpp_{sde}_gpu": SAMPLERS[f"dpmpp_{sde}"] for sde in ("sde", "2m_sde", "3m_sde")}
# samplers of k-diffusion with an option, by ComfyUI's names; the web UI has labels for them
VARIANTS = {"dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {"solver_type": "heun"})}
LABELS = SAMPLERS | ALIASES | {"dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun"}
# For these the web UI makes one more level and drops the second-to-last. ComfyUI does so for the first two.
DISCARDING = ("dpm_2", "dpm_2_ancestral", "dpmpp_3m_sde")
# The web UI's "Automatic" is the sampler's own schedule. Other samplers, and samplers without a schedule before version
# 1.9, have levels even in the trained timesteps: the web UI's "Uniform", ComfyUI's "normal".
AUTOMATIC = dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_ancestral", "dpm_2", "dpm_2_ancestral"), "karras")
AUTOMATIC |= dict.fromkeys(("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"), "exponential")
EVEN = "normal"
_NEGATIVE = "Negative prompt:"
# a sampler and a schedule in one name, as of nodes and old versions; "rk_beta" of RES4LYF is a sampler
_IN_ONE = r"(.{3,}?)[ _](karras|(?:poly)?exponential|simple|normal|(?:sgm|ddim)[ _]?uniform|beta57|beta|kl[ _]optimal"
_IN_ONE += r"|linear_quadratic|bong_tangent)"
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def write_parameters(settings: dict[str, str]) -> str:
    """The text of a picture's settings. FLUX's guidance is its `Distilled CFG Scale`, and true CFG its `CFG scale`.

    The text says whether a level was dropped, if the web UI would do the opposite for this sampler.
    """
    values = dict(settings)
    sampler = values.get("sampler", "")
    values["sampler"] = LABELS.get(sampler, sampler)
    if sampler in ALIASES:  # ComfyUI's second name for a sampler
        values["alias"] = sampler
    if values.get("comfy") == "False":
        del values["comfy"]
    discarded = values.pop("discard", "") == "True" or ("comfy" in values and sampler in DISCARDING[:2])
    if discarded != (sampler in DISCARDING):
        values["discard"] = str(discarded)
    values["schedule"] = SCHEDULES.get(values["schedule"], values["schedule"])
    if "true_cfg" in values:
        values["distilled"], values["guidance"] = values["guidance"], values["true_cfg"]
    prompt, negative = values["prompt"], values.get("negative_prompt", "")
    lines = [prompt] + [f"{_NEGATIVE} {negative}"] * bool(negative)
    if _prompts("\n".join(lines).split("\n")) != (prompt, negative):
        values |= {"exact_prompt": prompt, "exact_negative_prompt": negative}
    quoted = ("exact_prompt", "exact_negative_prompt")
    pairs = [f"{name}: {_quoted(values[key], key in quoted)}" for name, key in NAMES.items() if values.get(key)]
    return "\n".join([*lines, ", ".join(pairs)])


def read_parameters(text: str) -> dict[str, str]:
    """The settings in a text of `write_parameters` or of the web UI.

    Unknown samplers and schedules keep their names. `discard` is "True" where the second-to-last level was dropped.
    """
    lines, found = read_pairs(text)
    settings = dict(zip(("prompt", "negative_prompt"), _prompts(lines)))
    settings |= {key: _unquoted(found[name]) for name, key in NAMES.items() if name in found}
    if "exact_prompt" in settings or "exact_negative_prompt" in settings:
        settings |= {key: settings.pop(f"exact_{key}", "") for key in ("prompt", "negative_prompt")}
    settings |= {"comfy": "True"} if found.get("Version", "").lower().startswith("comfy") else {}
    for name in ("Scheduler", "Sampler sigma"):  # of ComfyUI's nodes; of SD.Next, where both may mean something else
        if schedule_name(found.get(name, "")) in (SCHEDULES if name == "Scheduler" else ("karras", "exponential")):
            settings.setdefault("schedule", found[name])
    if "sampler" in settings:
        settings["sampler"], schedule = split_sampler(settings["sampler"])
        settings["schedule"] = schedule_name(settings.get("schedule", schedule or "Uniform"), settings["sampler"])
        if found["Sampler"] == "DDIM" and not {"comfy", "alias"} & settings.keys() and "App" not in found:
            settings["schedule"] = "ddim_uniform"  # the web UI's, whatever the schedule type
    settings |= {"sampler": settings.pop("alias")} if "alias" in settings else {}
    drops = "App" not in found and settings.get("sampler") in DISCARDING  # SD.Next's samplers are diffusers'
    if "comfy" in settings or settings.setdefault("discard", str(drops)) != "True":
        settings.pop("discard", None)
    if "distilled" in settings:
        settings["true_cfg"], settings["guidance"] = settings.get("guidance", "1.0"), settings.pop("distilled")
    return settings


def read_pairs(text: str) -> tuple[list[str], dict[str, str]]:
    """The lines of the prompts, and the pairs in the line after them. Later lines are templates'."""
    lines = text.strip().split("\n")
    if len(lines) == 1 and lines[0].partition(":")[0] not in NAMES:  # as some tools write the prompts, too
        lines = re.sub(r"[.,]?\s+(?=(Negative prompt|Steps): )", "\n", lines[0]).split("\n")
    for last in [i for i in reversed(range(len(lines))) if lines[i].startswith("Steps: ")] + [len(lines) - 1]:
        if len(found := dict(_PAIR.findall(lines[last]))) >= 3:
            return lines[:last], found
    return lines, {}  # without pairs the last line belongs to the prompt, as in the web UI


def _prompts(lines: list[str]) -> tuple[str, str]:
    """The prompt and the negative prompt, which begins at the first line that says so, as in the web UI."""
    stripped = [line.strip() for line in lines]
    first = next((i for i, line in enumerate(stripped) if line.startswith(_NEGATIVE)), len(lines))
    negative = [line.removeprefix(_NEGATIVE).strip() for line in stripped[first:]]
    return "\n".join(stripped[:first]).strip(), "\n".join(negative).strip()


def _key(name: str) -> str:
    """A common form of a name's spellings: "DPM++ 2S a", "dpmpp_2s_a" and "k_dpmpp_2s_a" are the same."""
    return re.sub(r"[\s_-]", "", name.strip().lower().removeprefix("sample_").removeprefix("k_").replace("++", "pp"))


def split_sampler(label: str) -> tuple[str, str]:
    """A sampler by its label or name, and its schedule where the label has both: "DPM++ 2M Karras".

    An unknown sampler keeps its name, without a folder before it, as in RES4LYF's.
    """
    label = label.strip().rpartition("/")[2]
    names = {_key(name): name for name in LABELS} | {_key(LABELS[name]): name for name in (*SAMPLERS, *VARIANTS)}
    names["ddim"] = "euler"  # the same without eta
    known = _key(label) not in names and re.fullmatch(_IN_ONE, label, re.IGNORECASE)
    alone, schedule = known.groups() if known else (label, "")
    return names.get(_key(alone), alone), schedule_name(schedule)


def schedule_name(label: str, sampler: str = "") -> str:
    names = {_key(text): name for name, text in SCHEDULES.items() for text in (name, text)}
    return {"uniform": EVEN, "automatic": AUTOMATIC.get(sampler, EVEN), **names}.get(_key(label), label)


def listed(schedule: str | None) -> list[float] | None:
    """Levels in place of a schedule's name: "14.6, 3, 0"."""
    try:
        return [float(level) for level in schedule.split(",")] if schedule and "," in schedule else None
    except ValueError:
        return None


def _quoted(value: str, always: bool = False) -> str:
    return json.dumps(value, ensure_ascii=False) if always or set(value) & set(',:\n"') else value


def _unquoted(value: str) -> str:
    try:
        return json.loads(value) if value.startswith('"') else value.strip()
    except json.JSONDecodeError:  # the quote belongs to the value
        return value.strip()
