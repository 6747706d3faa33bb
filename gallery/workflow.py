"""The settings of a picture of ComfyUI or the web UI, from the text in the picture. Nothing in the text is run.

ComfyUI writes its graph into `prompt`: {id: {"class_type": ..., "inputs": {name: value or [id, output]}}}. The settings
are found along the links, from a node that saves, up to the first sampler, and on to the sampler's inputs. A node's
kind is known by its inputs. If a node may change a value, that value is not guessed, but left out and reported.
"""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gallery import graph as graphs
from gallery.graph import Graph, Unread, idle, linked, number_of
from gallery.parameters import ALIASES, NAMES, read_pairs, read_parameters, schedule_name, split_sampler
from gallery.pictures import read_settings

# Entries of the web UI's text that are read, or do not change the picture.
PARAMETERS = {*NAMES, *"Denoising strength|Model hash|Version|VAE|VAE hash|RNG|User|App|Hashes|TI hashes".split("|")}
PARAMETERS |= {"Lora hashes", "Beta schedule", "Module 1", "Module 2", "Module 3"}


@dataclass
class Settings:
    """The settings of a picture.

    `values` may have `prompt`, `negative_prompt`, `seed`, `steps`, `cfg`, `sampler_name`, `scheduler`, `denoise`,
    `width`, `height`, `guidance` (FLUX's distilled guidance), `model` (a file's name) and `discard` (True: the
    second-to-last level is dropped). A `scheduler` may be levels, "14.6, 3, 0". `family` is "sdxl", "flux" or None.
    `unused` names everything else that the picture depends on, and `unread` the node of each setting that can't be
    known. `comfy`: ComfyUI drew the picture, or this project with `--comfy`.
    """

    values: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    unused: list[str] = field(default_factory=list)
    comfy: bool = False
    unread: dict[str, str] = field(default_factory=dict)


def import_settings(path: Path, family: str | None = None) -> Settings:
    """The settings in a picture of ComfyUI or the web UI. ValueError, in one line: it has none, or not `family`'s."""
    try:
        texts = read_settings(Path(path))
    except ValueError as error:  # from Pillow: too much text
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
    missing = [name for name in wanted if name not in {*settings.values, *settings.unread}]
    settings.unused += [f"no {name} was found" for name in missing]
    if "prompt" in missing:
        settings.unread["prompt"] = "no text leads to the sampler"
    settings.unused = list(dict.fromkeys(settings.unused))
    return settings


def _graph(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """{id: (class, inputs)} of the nodes. Empty if the text is no graph: other tools write `prompt` too."""
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
    samplers = {name for name, (_, inputs) in nodes.items() if graphs.is_sampler(inputs)}
    sources = {linked(value) for _, inputs in nodes.values() for value in inputs.values()}
    ends = [name for name in nodes if name not in sources and {*nodes[name][1]} & {*graphs.LATENT}]
    ends.sort(key=lambda name: ("preview" in nodes[name][0].lower(), "save" not in nodes[name][0].lower()))
    used = graph.ancestors(ends)
    passes = [name for name in used if name in samplers] or sorted(samplers)
    if not passes:
        return
    chains = ([name for name in graph.upstream([end, 0], "latent") if name in samplers] for end in [*ends, *passes])
    *later, first = next(filter(None, chains))  # the farthest upstream is the first pass
    settings.unused += [f"a later {nodes[name][0]}" for name in later]
    settings.unused += [f"another {nodes[name][0]}" for name in passes if name not in (first, *later)]
    _read_sampler(graph, first, settings)
    unread = settings.unread.items()
    settings.unused += [f"the {setting.replace('_', ' ')} could not be read ({node})" for setting, node in unread]
    known, plain = samplers | graph.read | {*ends}, graphs.UNDERSTOOD | {*settings.unread.values()}
    for name in graph.ancestors([first]) + used:
        kind, inputs = nodes[name]
        files = [value for key, value in inputs.items() if key.endswith("_name") and isinstance(value, str)]
        if kind not in plain and name not in known:
            settings.unused.append(f"{kind} ({files[0]})" if files else kind)
        of_flux = kind in ("CLIPTextEncodeFlux", "FluxGuidance", "ModelSamplingFlux") or inputs.get("type") == "flux"
        if of_flux or kind == "CLIPTextEncodeSDXL":
            settings.family = settings.family or ("flux" if of_flux else "sdxl")
    settings.family = settings.family or _family_of(settings.values.get("model", ""))


def _family_of(model: str) -> str | None:
    return "flux" if "flux" in model.lower() else "sdxl" if "xl" in model.lower() else None


def _read_sampler(graph: Graph, name: str, settings: Settings) -> None:
    """A sampler's own fields, and the fields at the ends of its links."""
    kind, own = graph.nodes[name]
    values, links, fields = settings.values, graphs.links_of(own), own
    for part in ("guider", "noise", "sampler"):
        for node in graph.upstream(own.get(part), part):
            fields = graph.nodes[node][1] | fields

    def read(setting: str, value: Callable[..., Any], *given: Any) -> None:
        try:
            if (found := value(*given)) is not None:
                values[setting] = found
        except (Unread, RecursionError) as error:
            settings.unread[setting] = str(error) if isinstance(error, Unread) else kind

    if "sigmas" in links:
        chain = [graph.nodes[node] for node in graph.upstream(links["sigmas"], "sigmas")]
        source, levels = next((node for node in chain if not linked(node[1].get("sigmas"))), (kind, {}))
        fields |= {key: levels.get(key) for key in ("scheduler", "steps", "denoise")}
        if "scheduler" not in levels:
            read("scheduler", _levels, graph, source, levels)
            if "scheduler" in values:
                values["steps"] = fields["steps"] = values["scheduler"].count(",")
    fields = {"seed": fields.get("noise_seed"), "positive": fields.get("conditioning"), **fields}
    kinds = {"seed": int, "steps": int, "cfg": float, "denoise": float, "sampler_name": str, "scheduler": str}
    for setting, type_of in (kinds | {"start_at_step": int, "end_at_step": int}).items():
        read(setting, graph.typed, fields.get(setting), setting, type_of)
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
                settings.unread[setting] = source
    settings.unused += ["add_noise: disable"] * (str(fields.get("add_noise")).lower() in ("disable", "false"))
    start, end = values.pop("start_at_step", None), values.pop("end_at_step", None)
    if start or (end is not None and end < values.get("steps", 0)):
        settings.unused.append(f"steps {start or 0} to {end} alone")
    for setting, side in (("prompt", "positive"), ("negative_prompt", "negative")):
        read(setting, _read_prompt, graph, fields.get(side), side, settings)
    for node in graph.upstream(fields.get("positive"), "conditioning", "positive"):
        if "guidance" not in {*values, *settings.unread}:  # FLUX's, between the sampler and the text
            read("guidance", graph.typed, graph.nodes[node][1].get("guidance"), "guidance", float)
    for node in graph.upstream(fields.get("latent_image"), "latent"):
        for key, value in graph.nodes[node][1].items():
            side = key.removeprefix("empty_latent_")
            if side in {"width", "height"} - {*values, *settings.unread}:
                read(side, graph.typed, value, side, int)
            settings.unused += [f"batch_size {value}"] * (key == "batch_size" and value not in (0, 1))
    for node in graph.upstream(fields.get("model"), "model"):
        inputs = graph.nodes[node][1]
        if isinstance(file := inputs.get("ckpt_name", inputs.get("unet_name")), str):
            values["model"] = file
    for key, value in own.items() if kind not in graphs.SAMPLERS else ():  # inputs that KSampler lacks
        plain = idle(value) or linked(value) or value in (0, -1) or graphs.KNOB.search(key)
        if not plain and key not in graphs.SETTINGS | {"positive", "negative"}:
            settings.unused.append(f"{kind}'s {key} {str(value)[:40]}")


def _levels(graph: Graph, node: str, inputs: dict[str, Any]) -> str:
    """The levels of a node that lists them, or makes them only from numbers, as KarrasScheduler does."""
    if isinstance(levels := inputs.get("sigmas"), str):
        return ", ".join(re.findall(r"[0-9.]+(?:e[+-]?[0-9]+)?", levels))
    from sdxl_comfy_pipeline import sampling

    function = getattr(sampling, f"get_sigmas_{node.removesuffix('Scheduler').lower()}", None)
    steps = graph.typed(inputs.get("steps"), "steps", int)
    if function is None or steps is None:
        raise Unread(node)
    named = inspect.signature(function).parameters.keys() & inputs.keys()
    numbers = {key: graph.typed(inputs[key], key, float) for key in named}
    return ", ".join(f"{level:.9g}" for level in function(min(steps, graphs.LONGEST), **numbers).tolist())


def _read_prompt(graph: Graph, link: Any, side: str, settings: Settings) -> str | None:
    """The text of a conditioning."""
    if isinstance(link, str):  # the sampler's node encodes, too
        return link
    kind = node = ""
    for node in graph.upstream(link, "conditioning", side):
        kind, inputs = graph.nodes[node]
        if kind == "ConditioningZeroOut":
            return ""
        keys = [key for key in graphs.TEXTS if isinstance(inputs.get(key), str) or linked(inputs.get(key))]
        keys += [side] * isinstance(inputs.get(side), str)
        if keys:
            if None in (texts := [graph.typed(inputs[key], "prompt", str) for key in keys]):
                raise Unread(kind)
            first = next((text for text in texts if text), "")
            if "populated_text" not in keys:
                settings.unused += [f"{kind}'s other text" for text in texts if text and text != first]
            return first
    return graph.typed([node, 0], "prompt", str) if node else None


def _read_parameters(text: str, settings: Settings, older: bool = False) -> None:
    """`older`: an older version of this project drew the picture, dropped no level and wrote no `discard`."""
    found, others, values = read_parameters(text), read_pairs(text)[1], settings.values
    settings.comfy = "comfy" in found
    names = {"sampler": "sampler_name", "schedule": "scheduler"}
    kept = {"prompt", "negative_prompt", "model", *names}
    values |= {names.get(name, name): found[name] for name in kept & found.keys()}
    if values.get("scheduler") == "scheduler":
        del values["scheduler"]  # the pipeline's own schedule
    if "discard" in found and not (older and "Discard penultimate sigma" not in others):
        values["discard"] = True
    flux = "true_cfg" in found
    settings.family = "flux" if flux else _family_of(found.get("model", ""))
    numbers: dict[str, Any] = {"seed": (found.get("seed"), int), "steps": (found.get("steps"), int)}
    numbers["cfg"] = (found.get("true_cfg" if flux else "guidance"), float)
    numbers["guidance"] = (found.get("guidance") if flux else None, float)
    if not any(name.startswith("Hires") for name in others):  # else it belongs to the second pass
        numbers["denoise"] = (others.get("Denoising strength"), float)
    values |= {name: read for name, given in numbers.items() if (read := number_of(*given)) is not None}
    if size := re.fullmatch(r"\s*(\d+)x(\d+)\s*", found.get("size", "")):
        values |= {"width": int(size[1]), "height": int(size[2])}
    network = r"\s*<(?:lora|lyco|hypernet):[^<>]*>"
    for name in ("prompt", "negative_prompt"):
        settings.unused += [tag.strip() for tag in re.findall(network, values.get(name, ""))]
        values[name] = re.sub(network, "", values.get(name, "")).strip()
    named = [name for name, value in others.items() if schedule_name(value) == values.get("scheduler")]
    settings.unused += [name for name in others if name not in PARAMETERS | {*named}]
