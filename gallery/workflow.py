"""The settings of a picture that ComfyUI or the web UI drew, from the text that it carries. Nothing in it is run.

ComfyUI writes its graph into `prompt`: {id: {"class_type": ..., "inputs": {name: value or [id, output]}}}. The settings
are found by going up the links, from a node that saves to the first sampler and from there to what it was given. What
a node is, its inputs say. What comes out of a node that may change it is not guessed: it is left out, and named.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gallery.graph import (
    KNOB,
    LONGEST,
    PASSED,
    PIPE,
    PLAIN,
    SAMPLERS,
    SETTINGS,
    TEXTS,
    Graph,
    Unread,
    idle,
    is_sampler,
    linked,
    number_of,
)
from gallery.parameters import ALIASES, NAMES, read_pairs, read_parameters, schedule_name, split_sampler
from gallery.pictures import read_settings

# Of the web UI's line, what says how the picture was computed and not what it is of.
PARAMETERS = {*NAMES, *"Denoising strength|Model hash|Version|VAE|VAE hash|RNG|User|App|Hashes|TI hashes".split("|")}
PARAMETERS |= {"Lora hashes", "Beta schedule", "Module 1", "Module 2", "Module 3"}


@dataclass
class Settings:
    """What a picture was drawn with.

    `values` has what was found of `prompt`, `negative_prompt`, `seed`, `steps`, `cfg`, `sampler_name`, `scheduler`,
    `denoise`, `width`, `height`, `guidance` (FLUX's distilled one) and `model` (a file's name). `family` is "sdxl",
    "flux", or None where the picture does not say. `unused` names what else the picture was drawn with, and `unread`
    the node for each setting that can't be known. `comfy` is True for pictures of ComfyUI's, and for those drawn here
    with `--comfy`. A `scheduler` may be levels, "14.6, 3, 0", and `discard` is True where the last but one is dropped.
    """

    values: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    unused: list[str] = field(default_factory=list)
    comfy: bool = False
    unread: dict[str, str] = field(default_factory=dict)


def import_settings(path: Path, family: str | None = None) -> Settings:
    """The settings in a picture of ComfyUI's or the web UI's, PNG, JPEG or WebP.

    Raises:
        ValueError: in one line: no picture, no settings in it, or a picture of another family than this one.
    """
    try:
        texts = read_settings(Path(path))
    except ValueError as error:  # Pillow's, of more text than it reads
        raise ValueError(f"{path}: {error}") from error
    if texts is None:
        raise ValueError(f"{path}: can't be read as a picture")
    settings = Settings()
    if graph := _graph(texts.get("prompt", "")):
        settings.comfy = True
        _read_graph(Graph(graph), settings)
    if "parameters" in texts and (settings.unread or not settings.values):
        text = Settings()
        _read_parameters(texts["parameters"], text, "sigmas" in texts and "discard" not in texts)
        if not settings.values or text.values.keys() >= {"prompt", "seed", "steps", "sampler_name"}:
            settings, text.comfy = text, text.comfy or settings.comfy
    if not settings.values.keys() & {"seed", "steps", "sampler_name"}:
        nodes = ", ".join(sorted({kind for kind, _ in graph.values()}))
        why = f"a sampler; its nodes are {nodes[:600]}" if graph else "ComfyUI's or the web UI's"
        raise ValueError(f"{path}: has no settings of {why}")
    if family and settings.family not in (None, family):
        raise ValueError(f"{path}: was drawn with {settings.family.upper()}, which this script does not draw")
    wanted = ("prompt", "seed", "steps", "sampler_name", "scheduler", "width")
    missing = [name for name in wanted if name not in settings.values.keys() | settings.unread.keys()]
    settings.unused += [f"no {name} was found" for name in missing]
    if "prompt" in missing:
        settings.unread["prompt"] = "no text leads to the sampler"
    settings.unused = list(dict.fromkeys(settings.unused))
    return settings


def _graph(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """{id: (class, inputs)} of what is a node. Empty where the text is no graph: other tools write `prompt` too."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {
        name: (str(node.get("class_type")), node["inputs"])
        for name, node in (found.items() if isinstance(found, dict) else ())
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }


def _read_graph(graph: Graph, settings: Settings) -> None:
    nodes = graph.nodes
    samplers = {name for name, (_, inputs) in nodes.items() if is_sampler(inputs)}
    sources = {linked(value) for _, inputs in nodes.values() for value in inputs.values()}
    ends = [name for name in nodes if name not in sources and {*nodes[name][1]} & {*PASSED["latent"]}]
    ends.sort(key=lambda name: ("preview" in nodes[name][0].lower(), "save" not in nodes[name][0].lower()))
    used = graph.before(ends)
    passes = [name for name in used if name in samplers] or sorted(samplers)
    if not passes:
        return
    first = next((name for end in ends for name in graph.way([end, 0], "latent") if name in samplers), passes[0])
    later = []
    while True:  # to the pass whose latent no other made
        way = graph.way([first, 0], "latent")
        sampler = next((name for name in way if name in samplers and name != first), None)
        if sampler is None or sampler in later:
            break
        later.append(first)
        settings.unused.append(f"a later {nodes[first][0]}")
        first = sampler
    settings.unused += [f"another {nodes[name][0]}" for name in passes if name not in (first, *later)]
    _read_sampler(graph, first, settings)
    known, plain = samplers | graph.read | {*ends}, PLAIN | {*settings.unread.values()}
    for name in graph.before([first]) + used:
        kind, inputs = nodes[name]
        files = [value for key, value in inputs.items() if key.endswith("_name") and isinstance(value, str)]
        if kind not in plain and name not in known:
            settings.unused.append(f"{kind} ({files[0]})" if files else kind)
        of_flux = kind in ("CLIPTextEncodeFlux", "FluxGuidance", "ModelSamplingFlux") or inputs.get("type") == "flux"
        if of_flux or kind == "CLIPTextEncodeSDXL":
            settings.family = settings.family or ("flux" if of_flux else "sdxl")
    settings.family = settings.family or _family_of(settings.values.get("model", ""))


def _family_of(model: str) -> str | None:
    """By a file's name."""
    return "flux" if "flux" in model.lower() else "sdxl" if "xl" in model.lower() else None


def _read_sampler(graph: Graph, name: str, settings: Settings) -> None:
    """A sampler's own fields, and what its links lead to."""
    kind, fields = graph.nodes[name]
    values, links = settings.values, {key: value for key, value in fields.items() if linked(value)}
    for part in links.keys() & {"guider", "noise", "sampler"}:
        for node in graph.way(links[part], part):
            fields = {**graph.nodes[node][1], **fields}
    pipes = [linked(links[key]) for key in links if PIPE.search(key)]
    piped = graph.before([node for node in pipes if node in graph.nodes])
    for node in piped:
        fields = {key: value for key, value in graph.nodes[node][1].items() if key in SETTINGS} | fields

    def miss(setting: str, node: str) -> None:
        settings.unused.append(f"the {setting.replace('_', ' ')} could not be read ({node})")
        settings.unread[setting] = node

    def read(setting: str, value: Callable[..., Any], *given: Any) -> None:
        try:
            if (found := value(*given)) is not None:
                values[setting] = found
        except (Unread, RecursionError) as error:
            miss(setting, str(error) if isinstance(error, Unread) else kind)

    if "sigmas" in links:
        way = [graph.nodes[node] for node in graph.way(links["sigmas"], "sigmas")]
        source, levels = next((node for node in way if not linked(node[1].get("sigmas"))), (kind, {}))
        fields = {key: value for key, value in fields.items() if key not in ("scheduler", "steps", "denoise")}
        fields |= {key: value for key, value in levels.items() if key in ("scheduler", "steps", "denoise")}
        if "scheduler" not in levels:
            read("scheduler", _levels, graph, source, levels)
            if "scheduler" in values:
                values["steps"] = fields["steps"] = values["scheduler"].count(",")
    fields = {"seed": fields.get("noise_seed"), "positive": fields.get("conditioning"), **fields}
    for setting, number in {"seed": int, "steps": int, "cfg": float, "denoise": float}.items():
        read(setting, graph.number, fields.get(setting), setting, number)
    for setting in ("sampler_name", "scheduler"):
        read(setting, graph.text, fields.get(setting), setting)
    if "sampler_name" in values and values["sampler_name"] not in ALIASES:
        values["sampler_name"], schedule = split_sampler(values["sampler_name"])
        if schedule:
            values.setdefault("scheduler", schedule)
    for setting, part in {"sampler_name": "sampler", "cfg": "guider"}.items():
        if part in links and fields.get(setting) is None:
            source, inputs = graph.nodes.get(linked(links[part]), ("", {}))
            if part == "guider" and "negative" not in inputs and not any(key.startswith("cfg") for key in inputs):
                values["cfg"] = 1.0  # BasicGuider's
            else:
                miss(setting, source)
    if str(fields.get("add_noise")).lower() in ("disable", "false"):
        settings.unused.append("add_noise: disable")
    for setting in ("start_at_step", "end_at_step"):
        read(setting, graph.number, fields.get(setting), setting, int)
    start, end = values.pop("start_at_step", None), values.pop("end_at_step", None)
    if start or (end is not None and end < values.get("steps", 0)):
        settings.unused.append(f"steps {start or 0} to {end} alone")
    for setting, side in (("prompt", "positive"), ("negative_prompt", "negative")):
        read(setting, _read_prompt, graph, fields.get(side), side, settings)
    for node in graph.way(fields.get("positive"), "conditioning", "positive"):
        if "guidance" not in values.keys() | settings.unread.keys():  # FLUX's, on the way to the text
            read("guidance", graph.number, graph.nodes[node][1].get("guidance"), "guidance", float)
    for node in [*graph.way(fields.get("latent_image"), "latent"), *piped]:
        inputs = graph.nodes[node][1]
        sides = next((s for s in ("", "empty_latent_") if {f"{s}width", f"{s}height"} <= inputs.keys()), None)
        if sides is not None:
            for side in ("width", "height"):
                read(side, graph.number, inputs[sides + side], side, int)
            break
    for node in [*graph.way(fields.get("model"), "model"), *piped]:
        for key in ("ckpt_name", "unet_name"):
            if isinstance(file := graph.nodes[node][1].get(key), str):
                values["model"] = file
    own = {} if kind in SAMPLERS else graph.nodes[name][1]  # of others, what KSampler has not
    for key, value in own.items():
        if not (idle(value) or linked(value) or value in (0, -1) or key in SETTINGS or KNOB.search(key)):
            settings.unused.append(f"{kind}'s {key} {str(value)[:40]}")


def _levels(graph: Graph, node: str, inputs: dict[str, Any]) -> str:
    """The levels of a node that makes them from numbers alone: KarrasScheduler and its kin, or a list of them."""
    from sdxl_comfy_pipeline import sampling

    if isinstance(listed := inputs.get("sigmas"), str):
        levels = [float(level) for level in re.findall(r"[0-9.]+(?:e[+-]?[0-9]+)?", listed)]
    else:
        function = getattr(sampling, f"get_sigmas_{node.removesuffix('Scheduler').lower()}", None)
        steps = graph.number(inputs.get("steps"), "steps", int)
        if function is None or steps is None:
            raise Unread(node)
        names = inspect.signature(function).parameters.keys() & inputs.keys()
        levels = function(min(steps, LONGEST), **{key: graph.number(inputs[key], key, float) for key in names}).tolist()
    return ", ".join(f"{level:.9g}" for level in levels)


def _read_prompt(graph: Graph, link: Any, side: str, settings: Settings) -> str | None:
    """The text of a conditioning."""
    if isinstance(link, str):  # of a node that encodes, too
        return link
    kind = node = ""
    for node in graph.way(link, "conditioning", side):
        kind, inputs = graph.nodes[node]
        if kind == "ConditioningZeroOut":
            return ""
        keys = [key for key in TEXTS if isinstance(inputs.get(key), str) or linked(inputs.get(key))]
        keys += [side] * isinstance(inputs.get(side), str)
        if keys:
            texts = [graph.text(inputs[key], "prompt") for key in keys]
            if None in texts:
                raise Unread(kind)
            first = next((text for text in texts if text), "")
            if "populated_text" not in keys:
                settings.unused += [f"{kind}'s other text" for text in texts if text and text != first]
            return first
    return graph.text([node, 0], "prompt") if node else None


def _read_parameters(text: str, settings: Settings, whole: bool = False) -> None:
    found, values = read_parameters(text), settings.values
    settings.comfy = "comfy" in found
    names = {"prompt": "prompt", "negative_prompt": "negative_prompt", "model": "model"}
    names |= {"sampler": "sampler_name", "schedule": "scheduler"}
    values |= {name: found[old] for old, name in names.items() if old in found}
    if values.get("scheduler") == "scheduler":
        del values["scheduler"]  # the pipeline's own
    others = read_pairs(text)[1]
    # `whole`: older versions of this project wrote no word of it, and dropped none
    if "discard" in found and not (whole and "Discard penultimate sigma" not in others):
        values["discard"] = True
    settings.family = "flux" if "true_cfg" in found else _family_of(found.get("model", ""))
    cfg, guidance = ("true_cfg", found.get("guidance")) if "true_cfg" in found else ("guidance", None)
    numbers = {"seed": (found.get("seed"), int), "steps": (found.get("steps"), int), "cfg": (found.get(cfg), float)}
    numbers |= {"denoise": (others.get("Denoising strength"), float), "guidance": (guidance, float)}
    if any(name.startswith("Hires") for name in others):
        del numbers["denoise"]  # of the second pass
    values |= {name: read for name, given in numbers.items() if (read := number_of(*given)) is not None}
    if size := re.fullmatch(r"\s*(\d+)x(\d+)\s*", found.get("size", "")):
        values |= {"width": int(size[1]), "height": int(size[2])}
    network = r"\s*<(?:lora|lyco|hypernet):[^<>]*>"
    for name in ("prompt", "negative_prompt"):
        settings.unused += [tag.strip() for tag in re.findall(network, values.get(name, ""))]
        values[name] = re.sub(network, "", values.get(name, "")).strip()
    named = [name for name, value in others.items() if schedule_name(value) == values.get("scheduler")]
    settings.unused += [name for name in others if name not in PARAMETERS | {*named}]
