"""The settings of a picture that ComfyUI or the web UI drew, from the text that it carries. Nothing in it is run.

ComfyUI writes its graph into `prompt`: {id: {"class_type": ..., "inputs": {name: value or [id, output]}}}. The settings
are found by going up the links, from a node that saves to the first sampler and from there to what it was given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gallery.parameters import NAMES, read_parameters
from gallery.pictures import read_settings

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
OUTPUTS = ("SaveImage", "PreviewImage", "SaveImageWebsocket")
# Nodes that are understood, or change no setting. Whatever else leads to the picture is told as unused.
PLAIN = set(
    """CheckpointLoaderSimple CheckpointLoader UNETLoader VAELoader CLIPLoader DualCLIPLoader VAEDecode CLIPTextEncode
    CLIPTextEncodeSDXL CLIPTextEncodeFlux ConditioningZeroOut FluxGuidance ModelSamplingFlux KSamplerSelect
    BasicScheduler RandomNoise CFGGuider BasicGuider EmptyLatentImage EmptySD3LatentImage PrimitiveNode PrimitiveInt
    PrimitiveFloat PrimitiveString PrimitiveStringMultiline Note MarkdownNote""".split()
) | {*SAMPLERS, *OUTPUTS}
# The inputs by which nodes pass a thing on, the preferred ones first.
PASSED = {
    "conditioning": ("conditioning", "positive", "conditioning_to", "conditioning_1"),
    "latent": ("latent_image", "latent", "samples", "images", "image", "pixels"),
    "model": ("model",),
    "sigmas": ("sigmas",),
    "sampler": ("sampler",),
    "noise": ("noise",),
    "guider": ("guider",),
    "text": ("text", "string", "value", "prompt", "text_g", "wildcard_text", "string_a"),
    "number": ("value", "int", "float", "number", "seed", "noise_seed", "a"),
}
# Of the web UI's line, what says how the picture was computed and not what it is of.
PARAMETERS = {*NAMES, "Denoising strength", "Model hash", "Version", "VAE", "VAE hash", "RNG", "User", "Module 1"}
PARAMETERS |= {"Hashes", "TI hashes", "Lora hashes", "Beta schedule", "Module 2", "Module 3"}


@dataclass
class Settings:
    """What a picture was drawn with.

    `values` has what was found of `prompt`, `negative_prompt`, `seed`, `steps`, `cfg`, `sampler_name`, `scheduler`,
    `denoise`, `width`, `height`, `guidance` (FLUX's distilled one) and `model` (a file's name). `family` is "sdxl",
    "flux", or None where the picture does not say. `unused` names what else the picture was drawn with. `comfy` is True
    for pictures of ComfyUI's, and for those drawn here with `--comfy`.
    """

    values: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    unused: list[str] = field(default_factory=list)
    comfy: bool = False


def import_settings(path: Path, family: str | None = None) -> Settings:
    """The settings in a PNG of ComfyUI's or the web UI's.

    Raises:
        ValueError: in one line: no PNG, no settings in it, or a picture of another family than this one.
    """
    try:
        texts = read_settings(Path(path))
    except ValueError as error:  # Pillow's, of more text than it reads
        raise ValueError(f"{path}: {error}") from error
    if texts is None:
        raise ValueError(f"{path}: can't be read as a PNG")
    settings = Settings()
    if graph := _graph(texts.get("prompt", "")):
        settings.comfy = True
        _read_graph(_Graph(graph), settings)
    elif "parameters" in texts:
        _read_parameters(texts["parameters"], settings)
    if not settings.values.keys() & {"seed", "steps", "sampler_name"}:
        raise ValueError(f"{path}: has no settings of ComfyUI's or the web UI's")
    if family and settings.family not in (None, family):
        raise ValueError(f"{path}: was drawn with {settings.family.upper()}, which this script does not draw")
    wanted = ("prompt", "seed", "steps", "sampler_name", "scheduler", "width")
    settings.unused += [f"no {name} was found" for name in wanted if name not in settings.values]
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


def _linked(value: Any) -> str:
    """The id of the node that an input is linked to; empty for a value."""
    link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int))
    return str(value[0]) if link else ""


@dataclass
class _Graph:
    nodes: dict[str, tuple[str, dict[str, Any]]]

    def way(self, value: Any, kind: str, preferred: str = "") -> Iterator[str]:
        """The ids of the nodes from a link up, each once, through those that pass things of a `kind` on.

        They do it by the inputs that `PASSED` names, `preferred` first (ControlNets pass two), or by their only link.
        """
        met: set[str] = set()
        while (name := _linked(value)) in self.nodes and name not in met:
            met.add(name)
            yield name
            kind_of_node, inputs = self.nodes[name]
            links = [key for key in (preferred, *PASSED[kind]) if _linked(inputs.get(key)) in self.nodes]
            if not links and kind_of_node not in PLAIN:
                links = [key for key in inputs if _linked(inputs[key]) in self.nodes]
                links = links if len(links) == 1 else []
            value = inputs[links[0]] if links else None

    def text(self, value: Any) -> str | None:
        """A text, or the one that a link leads to."""
        return (
            value if isinstance(value, str) else self._first(value, "text", lambda v: v if isinstance(v, str) else None)
        )

    def number(self, value: Any, kind: type) -> Any:
        """A number, also one written as text, or the one that a link leads to."""
        return self._first(value, "number", lambda v: _number(v, kind)) if _linked(value) else _number(value, kind)

    def _first(self, value: Any, kind: str, read: Any) -> Any:
        for name in self.way(value, kind):
            for key in PASSED[kind]:
                if (found := read(self.nodes[name][1].get(key))) is not None:
                    return found
        return None

    def before(self, names: list[str]) -> list[str]:
        """The ids of these nodes and of all that lead to them, the nearest first."""
        found = list(names)
        met = set(found)
        for name in found:
            for link in map(_linked, self.nodes[name][1].values()):
                if link in self.nodes and link not in met:
                    met.add(link)
                    found.append(link)
        return found


def _number(value: Any, kind: type) -> Any:
    try:
        number = kind(value)
        return number if not isinstance(value, bool) and math.isfinite(number) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _read_graph(graph: _Graph, settings: Settings) -> None:
    nodes = graph.nodes
    used = graph.before([name for name, (kind, _) in nodes.items() if kind in OUTPUTS])
    passes = [name for name in used if nodes[name][0] in SAMPLERS]
    passes = passes or [name for name, (kind, _) in nodes.items() if kind in SAMPLERS]
    if not passes:
        return
    first = passes[0]
    while True:  # to the pass whose latent no other made
        way = graph.way(nodes[first][1].get("latent_image"), "latent")
        sampler = next((name for name in way if nodes[name][0] in SAMPLERS), None)
        if sampler is None or sampler not in passes:
            break
        passes.remove(first)
        settings.unused.append(f"a later {nodes[first][0]}")
        first = sampler
    settings.unused += [f"another {nodes[name][0]}" for name in passes if name != first]
    _read_sampler(graph, first, settings)
    for name in graph.before([first]) + used:
        kind, inputs = nodes[name]
        files = [value for key, value in inputs.items() if key.endswith("_name") and isinstance(value, str)]
        if kind not in PLAIN | {"Reroute"}:
            settings.unused.append(f"{kind} ({files[0]})" if files else kind)
        of_flux = kind in ("CLIPTextEncodeFlux", "FluxGuidance", "ModelSamplingFlux") or inputs.get("type") == "flux"
        if of_flux or kind == "CLIPTextEncodeSDXL":
            settings.family = settings.family or ("flux" if of_flux else "sdxl")
    settings.family = settings.family or _family_of(settings.values.get("model", ""))


def _family_of(model: str) -> str | None:
    """By a file's name."""
    return "flux" if "flux" in model.lower() else "sdxl" if "xl" in model.lower() else None


def _read_sampler(graph: _Graph, name: str, settings: Settings) -> None:
    """A sampler's own fields, and what its links lead to."""
    kind, fields = graph.nodes[name]
    values, custom = settings.values, kind.startswith("SamplerCustom")
    for part in ("guider", "noise", "sampler", "sigmas") if custom else ():
        for node in graph.way(graph.nodes[name][1].get(part), part):
            fields = {**graph.nodes[node][1], **fields}
    fields = {"seed": fields.get("noise_seed"), "positive": fields.get("conditioning"), **fields}
    for field_, number in {"seed": int, "steps": int, "cfg": float, "denoise": float}.items():
        if (found := graph.number(fields.get(field_), number)) is not None:
            values[field_] = found
    for field_ in ("sampler_name", "scheduler"):
        if (found := graph.text(fields.get(field_))) is not None:
            values[field_] = found
    if custom and "cfg" not in values:
        values["cfg"] = 1.0  # BasicGuider's
    if str(fields.get("add_noise")).lower() in ("disable", "false"):
        settings.unused.append("add_noise: disable")
    start, end = (graph.number(fields.get(f"{side}_at_step"), int) for side in ("start", "end"))
    if start or (end is not None and end < values.get("steps", 0)):
        settings.unused.append(f"steps {start or 0} to {end} alone")
    for field_, side in (("prompt", "positive"), ("negative_prompt", "negative")):
        if (found := _read_prompt(graph, fields.get(side), side, settings)) is not None:
            values[field_] = found
    for node in graph.way(fields.get("latent_image"), "latent"):
        size = {side: graph.number(graph.nodes[node][1].get(side), int) for side in ("width", "height")}
        if all(size.values()):
            values |= size
            break
    for node in graph.way(fields.get("model"), "model"):
        for field_ in ("ckpt_name", "unet_name"):
            if isinstance(file := graph.nodes[node][1].get(field_), str):
                values["model"] = file


def _read_prompt(graph: _Graph, link: Any, side: str, settings: Settings) -> str | None:
    """The text of a conditioning. FLUX's guidance is on the way to it."""
    for node in graph.way(link, "conditioning", side):
        kind, inputs = graph.nodes[node]
        guidance = graph.number(inputs.get("guidance"), float)
        if guidance is not None and side == "positive":
            settings.values.setdefault("guidance", guidance)
        if kind == "ConditioningZeroOut":
            return ""
        texts = [graph.text(inputs[name]) for name in ("text", "text_g", "text_l", "t5xxl", "clip_l") if name in inputs]
        if kind.startswith("CLIPTextEncode") and texts:
            first = next((text for text in texts if text), "")
            settings.unused += [f"{kind}'s other text" for text in texts if text and text != first]
            return first
    return None


def _read_parameters(text: str, settings: Settings) -> None:
    found, values = read_parameters(text), settings.values
    settings.comfy = "comfy" in found
    label, _, schedule = found.get("sampler", "").rpartition(" ")
    if schedule in ("Karras", "Exponential"):  # as old versions wrote both: DPM++ 2M Karras
        old = read_parameters(f"\nSteps: 1, Seed: 1, Sampler: {label}, Schedule type: {schedule}")
        found |= {name: old[name] for name in ("sampler", "schedule")}
    names = {"prompt": "prompt", "negative_prompt": "negative_prompt", "model": "model"}
    names |= {"sampler": "sampler_name", "schedule": "scheduler"}
    values |= {name: found[old] for old, name in names.items() if old in found}
    if values.get("scheduler") == "scheduler":
        del values["scheduler"]  # "Automatic"
    last = text.rpartition("\n")[2]
    others = dict(re.findall(r'(?:^|, ?)(\w[\w \-/]*): ("(?:\\.|[^\\"])*"|[^,]*)', last))
    settings.family = "flux" if "true_cfg" in found else _family_of(found.get("model", ""))
    cfg, guidance = ("true_cfg", found.get("guidance")) if "true_cfg" in found else ("guidance", None)
    numbers = {"seed": (found.get("seed"), int), "steps": (found.get("steps"), int), "cfg": (found.get(cfg), float)}
    numbers |= {"denoise": (others.get("Denoising strength"), float), "guidance": (guidance, float)}
    values |= {name: read for name, given in numbers.items() if (read := _number(*given)) is not None}
    if size := re.fullmatch(r"\s*(\d+)x(\d+)\s*", found.get("size", "")):
        values |= {"width": int(size[1]), "height": int(size[2])}
    network = r"\s*<(?:lora|lyco|hypernet):[^<>]*>"
    for name in ("prompt", "negative_prompt"):
        settings.unused += [tag.strip() for tag in re.findall(network, values.get(name, ""))]
        values[name] = re.sub(network, "", values.get(name, "")).strip()
    settings.unused += [name for name in others if name not in PARAMETERS]
