"""The settings of a picture that ComfyUI or the web UI drew, from the text that it carries. Nothing in it is run.

ComfyUI writes its graph into `prompt`: {id: {"class_type": ..., "inputs": {name: value or [id, output]}}}. The settings
are found by going up the links, from a node that saves to the first sampler and from there to what it was given. What
a node is, its inputs say. What comes out of a node that may change it is not guessed: it is left out, and named.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gallery.parameters import ALIASES, NAMES, read_pairs, read_parameters, schedule_name, split_sampler
from gallery.pictures import read_settings

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
# Nodes that are understood, or change no setting. Whatever else leads to the picture is told as unused.
PLAIN = set(
    """CheckpointLoaderSimple CheckpointLoader UNETLoader VAELoader CLIPLoader DualCLIPLoader VAEDecode CLIPTextEncode
    CLIPTextEncodeSDXL CLIPTextEncodeFlux ConditioningZeroOut FluxGuidance ModelSamplingFlux KSamplerSelect
    BasicScheduler RandomNoise CFGGuider BasicGuider EmptyLatentImage EmptySD3LatentImage PrimitiveNode PrimitiveInt
    PrimitiveFloat PrimitiveString PrimitiveStringMultiline Note MarkdownNote Reroute""".split()
) | {*SAMPLERS}
# The inputs by which nodes pass a thing on, the preferred ones first.
PASSED = {
    "conditioning": ("conditioning", "positive", "conditioning_to", "conditioning_1"),
    "latent": ("latent_image", "latent", "samples", "images", "image", "pixels"),
    "model": ("model",),
    "sigmas": ("sigmas",),
    "sampler": ("sampler",),
    "noise": ("noise",),
    "guider": ("guider",),
}
TEXTS = ("populated_text", "text", "text_g", "text_l", "prompt", "t5xxl", "clip_l", "clip_g")  # of encoders
SETTINGS = {"noise_seed", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise", "width", "height"}
SETTINGS |= {"batch_size", "guidance", "positive", "negative", "latent_image", "model"}
PIPE = re.compile("pipe|tuple|context|ctx")  # inputs that carry several of these
DRAWS = ("model", "guider", "latent_image", "latent", "samples")  # of which a sampler takes one
# A text or a number passes a node that has one input beside these, unless the node's name says that it changes it.
KNOB = re.compile("control_(after|before)_generate|Update inputs|preview|decode")
CHANGES = re.compile(
    "random|shuffl|replac|regex|split|substr|trim|strip|clean|truncat|case|format|extract|remov|pars|translat|enhanc"
    "|expan|llm|gpt|gemini|ollama|caption|interrog|descri|tagger|wildcard|length|count|math|expr|calc|round|clamp|nary",
    re.IGNORECASE,
)
SHOWS = re.compile("^(easy )?(show|preview|display)", re.IGNORECASE)  # what they keep is of an earlier run
TEXT = re.compile("text|str|prompt|value|positive|negative|content|input|line|any|word|tag", re.IGNORECASE)
# Nodes that join texts: their parts, what stands between, and how they are told to.
JOINS = re.compile("join|concat|combine|append|merge", re.IGNORECASE)
PART = re.compile(r"(\w+\.)?(text|string|str|prompt|input|value|any|line)?[ _]?([a-z]|[0-9]{1,2})", re.IGNORECASE)
BETWEEN = re.compile("delim|separat|^sep$", re.IGNORECASE)
JOINED = ("inputcount", "return_list", "clean_whitespace", "action", "tidy_tags", "result")
LONGEST = 100_000  # letters: a graph can join a text to itself, again and again
KEEP_EMPTY = ("StringConcatenate", "JoinStrings", "CR Text Concatenate")
SKIP_EMPTY = ("Text Concatenate", "JoinStringMulti", "StringFunction|pysssss")
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


class _Unread(Exception):
    """A value that can't be known. The message is the class of the node that it comes from."""


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
        _read_graph(_Graph(graph), settings)
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


def _linked(value: Any) -> str:
    """The id of the node that an input is linked to; empty for a value."""
    link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int))
    return str(value[0]) if link else ""


def _is_sampler(inputs: dict[str, Any]) -> bool:
    """By its inputs: a sampler, how many steps or how guided, and what it draws on."""
    counts = inputs.keys() & {"steps", "sigmas", "cfg", "steps_to_run"}
    draws = any(_linked(value) and (name in DRAWS or PIPE.search(name)) for name, value in inputs.items())
    return bool(inputs.keys() & {"sampler_name", "sampler"} and counts and draws)


@dataclass
class _Graph:
    nodes: dict[str, tuple[str, dict[str, Any]]]
    read: set[str] = field(default_factory=set)  # the nodes that values came through
    joined: dict[str, Any] = field(default_factory=dict)  # the text of each that joins some

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
            if not links and (kind_of_node not in PLAIN or kind_of_node == "Reroute"):
                links = [key for key in inputs if _linked(inputs[key]) in self.nodes]
                links = links if len(links) == 1 else []
            value = inputs[links[0]] if links else None

    def value(self, given: Any, setting: str) -> Any:
        """What an input gets for a setting: its value, or the one that its link leads to; None if it leads nowhere.

        Raises `_Unread` where a node on the way may have changed it.
        """
        met: list[str] = []
        while name := _linked(given):
            if name not in self.nodes or name in met:
                return None
            met.append(name)
            kind, inputs = self.nodes[name]
            plain = {key: value for key, value in inputs.items() if not KNOB.search(key)}
            own = {key: value for key, value in plain.items() if not _idle(value)} or dict([*plain.items()][:1])
            if SHOWS.search(kind):
                own = {key: value for key, value in inputs.items() if _linked(value)}
            if "populated_text" in inputs:
                given = inputs["populated_text"]
            elif JOINS.search(kind) or inputs.get("action") == "append":
                given = self._joined(name, kind, plain)
            elif len(own) == 1 and ({*own} & {setting, "noise_seed"} or not CHANGES.search(kind)):
                ((key, given),) = own.items()
                name_of_file = "prompt" in setting and isinstance(given, str) and not TEXT.search(key)
                if name_of_file or key in PASSED["latent"]:
                    raise _Unread(kind)
            else:
                raise _Unread(kind)
        self.read.update(met)
        return given

    def _joined(self, name: str, kind: str, inputs: dict[str, Any]) -> Any:
        """The texts of a node that joins them."""
        if name in self.joined:
            return self.joined[name]
        self.joined[name] = None  # until it is known: a node may join its own text
        between, parts = [key for key in inputs if BETWEEN.search(key)], [key for key in inputs if PART.fullmatch(key)]
        others = {key for key, value in inputs.items() if not _idle(value)} - {*between, *parts, *JOINED}
        if not parts or others or len(between) > 1 or not _idle(inputs.get("return_list")):
            raise _Unread(kind)
        parts.sort(key=lambda key: [(piece.isdigit(), piece.zfill(2)) for piece in re.split("([0-9]+)", key)])
        count = self.number(inputs.get("inputcount"), "inputcount", int)
        texts = ["" if inputs[key] is None else self.value(inputs[key], "prompt") for key in parts[:count]]
        tidy = not _idle(inputs.get("tidy_tags"))
        delimiter = ", " if tidy else self.value(inputs[between[0]], "prompt") if between else ""
        if not all(isinstance(text, str) for text in (*texts, delimiter)):
            raise _Unread(kind)
        if kind == "Text Concatenate":
            delimiter = delimiter.replace("\\n", "\n")
            texts = [text.strip() for text in texts] if not _idle(inputs.get("clean_whitespace")) else texts
        if kind in SKIP_EMPTY and (texts[0] or kind != "JoinStringMulti"):
            texts = [text for text in texts if text]
        joined = self.joined[name] = delimiter.join(texts)
        unsure = "" in texts and delimiter and kind not in KEEP_EMPTY
        if unsure or (tidy and re.search("  | ,|,,", joined)) or len(joined) > LONGEST:
            raise _Unread(kind)
        return joined

    def number(self, given: Any, setting: str, kind: type) -> Any:
        """A number, also one written as text."""
        number = _number(value := self.value(given, setting), kind)
        if number is None and value is not None and (name := _linked(given)):
            raise _Unread(self.nodes[name][0])
        return number

    def text(self, given: Any, setting: str) -> str | None:
        text = self.value(given, setting)
        return text if isinstance(text, str) else None

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


def _idle(value: Any) -> bool:
    """Whether an input that has this value does nothing."""
    return value is None or value is False or str(value).lower() in ("", "none", "disabled", "off", "false", "no")


def _number(value: Any, kind: type) -> Any:
    try:
        number = kind(value)
        whole = isinstance(value, str) or number == value
        return number if whole and not isinstance(value, bool) and math.isfinite(number) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _read_graph(graph: _Graph, settings: Settings) -> None:
    nodes = graph.nodes
    samplers = {name for name, (_, inputs) in nodes.items() if _is_sampler(inputs)}
    linked = {_linked(value) for _, inputs in nodes.values() for value in inputs.values()}
    ends = [name for name in nodes if name not in linked and {*nodes[name][1]} & {*PASSED["latent"]}]
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


def _read_sampler(graph: _Graph, name: str, settings: Settings) -> None:
    """A sampler's own fields, and what its links lead to."""
    kind, fields = graph.nodes[name]
    values, links = settings.values, {key: value for key, value in fields.items() if _linked(value)}
    for part in links.keys() & {"guider", "noise", "sampler"}:
        for node in graph.way(links[part], part):
            fields = {**graph.nodes[node][1], **fields}
    pipes = [_linked(links[key]) for key in links if PIPE.search(key)]
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
        except (_Unread, RecursionError) as error:
            miss(setting, str(error) if isinstance(error, _Unread) else kind)

    if "sigmas" in links:
        way = [graph.nodes[node] for node in graph.way(links["sigmas"], "sigmas")]
        source, levels = next((node for node in way if not _linked(node[1].get("sigmas"))), (kind, {}))
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
            source, inputs = graph.nodes.get(_linked(links[part]), ("", {}))
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
        if not (_idle(value) or _linked(value) or value in (0, -1) or key in SETTINGS or KNOB.search(key)):
            settings.unused.append(f"{kind}'s {key} {str(value)[:40]}")


def _levels(graph: _Graph, node: str, inputs: dict[str, Any]) -> str:
    """The levels of a node that makes them from numbers alone: KarrasScheduler and its kin, or a list of them."""
    from sdxl_comfy_pipeline import sampling

    if isinstance(listed := inputs.get("sigmas"), str):
        levels = [float(level) for level in re.findall(r"[0-9.]+(?:e[+-]?[0-9]+)?", listed)]
    else:
        function = getattr(sampling, f"get_sigmas_{node.removesuffix('Scheduler').lower()}", None)
        steps = graph.number(inputs.get("steps"), "steps", int)
        if function is None or steps is None:
            raise _Unread(node)
        names = inspect.signature(function).parameters.keys() & inputs.keys()
        levels = function(min(steps, LONGEST), **{key: graph.number(inputs[key], key, float) for key in names}).tolist()
    return ", ".join(f"{level:.9g}" for level in levels)


def _read_prompt(graph: _Graph, link: Any, side: str, settings: Settings) -> str | None:
    """The text of a conditioning."""
    if isinstance(link, str):  # of a node that encodes, too
        return link
    kind = node = ""
    for node in graph.way(link, "conditioning", side):
        kind, inputs = graph.nodes[node]
        if kind == "ConditioningZeroOut":
            return ""
        keys = [key for key in TEXTS if isinstance(inputs.get(key), str) or _linked(inputs.get(key))]
        keys += [side] * isinstance(inputs.get(side), str)
        if keys:
            texts = [graph.text(inputs[key], "prompt") for key in keys]
            if None in texts:
                raise _Unread(kind)
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
    values |= {name: read for name, given in numbers.items() if (read := _number(*given)) is not None}
    if size := re.fullmatch(r"\s*(\d+)x(\d+)\s*", found.get("size", "")):
        values |= {"width": int(size[1]), "height": int(size[2])}
    network = r"\s*<(?:lora|lyco|hypernet):[^<>]*>"
    for name in ("prompt", "negative_prompt"):
        settings.unused += [tag.strip() for tag in re.findall(network, values.get(name, ""))]
        values[name] = re.sub(network, "", values.get(name, "")).strip()
    named = [name for name, value in others.items() if schedule_name(value) == values.get("scheduler")]
    settings.unused += [name for name in others if name not in PARAMETERS | {*named}]
