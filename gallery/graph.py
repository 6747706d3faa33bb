"""ComfyUI's graph, as its pictures contain it: paths along its links, and the outputs of nodes, if they are certain."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
# Nodes whose settings are read, or which have none. Any other node before the picture is reported as unused.
UNDERSTOOD = set(
    """CheckpointLoaderSimple CheckpointLoader UNETLoader VAELoader CLIPLoader DualCLIPLoader VAEDecode CLIPTextEncode
    CLIPTextEncodeSDXL CLIPTextEncodeFlux ConditioningZeroOut FluxGuidance ModelSamplingFlux KSamplerSelect
    BasicScheduler RandomNoise CFGGuider BasicGuider EmptyLatentImage EmptySD3LatentImage PrimitiveNode PrimitiveInt
    PrimitiveFloat PrimitiveString PrimitiveStringMultiline Note MarkdownNote Reroute""".split()
) | {*SAMPLERS}
LATENT = ("latent_image", "latent", "samples", "images", "image", "pixels")
# The inputs by which nodes pass latents and conditioning on, the preferred first. Others have an input of that name.
PASSED = {"latent": LATENT, "conditioning": ("conditioning", "positive", "conditioning_to", "conditioning_1")}
TEXTS = ("populated_text", "text", "text_g", "text_l", "prompt", "t5xxl", "clip_l", "clip_g")  # of encoders
SETTINGS = {*"noise_seed seed steps cfg sampler_name scheduler denoise width height batch_size guidance".split()}
DRAWS = re.compile("model|guider|latent|samples|pipe|tuple|context|ctx")  # a sampler has a link of such a name
# A node with only one input beside these passes a text or number unchanged, unless the node's name matches CHANGES.
KNOB = re.compile("control_(after|before)_generate|Update inputs|preview|decode")
CHANGES = re.compile(
    "(?i)random|shuffl|replac|regex|split|substr|trim|strip|clean|truncat|case|format|extract|remov|pars|translat"
    "|enhanc|expan|llm|gpt|gemini|ollama|caption|interrog|descri|tagger|wildcard|length|count|math|expr|calc|round"
    "|clamp|nary"
)
SHOWS = re.compile("^(easy )?(show|preview|display)", re.IGNORECASE)  # their texts are from an earlier run
TEXT = re.compile("text|str|prompt|value|positive|negative|content|input|line|any|word|tag", re.IGNORECASE)
# Nodes that join texts, their parts, and the delimiter between the parts
JOINS = re.compile("join|concat|combine|append|merge", re.IGNORECASE)
PART = re.compile(r"(\w+\.)?(text|string|str|prompt|input|value|any|line)?[ _]?([a-z]|[0-9]{1,2})", re.IGNORECASE)
BETWEEN = re.compile("delim|separat|^sep$", re.IGNORECASE)
LONGEST = 100_000  # letters: a graph can join a text to itself many times


class Unread(Exception):
    """A value that can't be known. The message is the class of its node."""


def linked(value: Any) -> str:
    """The id of the node that an input is linked to; empty for a value."""
    link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int))
    return str(value[0]) if link else ""


def is_sampler(inputs: dict[str, Any]) -> bool:
    """By its inputs: a sampler, steps or guidance, and the model or latents."""
    parts = ({"sampler_name", "sampler"}, {"steps", "sigmas", "cfg", "steps_to_run"})
    return all(inputs.keys() & part for part in parts) and any(DRAWS.search(key) for key in links_of(inputs))


def links_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if linked(value)}


@dataclass
class Graph:
    nodes: dict[str, tuple[str, dict[str, Any]]]
    read: set[str] = field(default_factory=set)  # the nodes between settings and their values
    joined: dict[str, Any] = field(default_factory=dict)  # the texts of the nodes that join texts

    def upstream(self, value: Any, kind: str, preferred: str = "") -> Iterator[str]:
        """The nodes upstream of a link, each once: by `preferred`, the kind's inputs in `PASSED`, or the only link."""
        visited: set[str] = set()
        while (name := linked(value)) in self.nodes and name not in visited:
            visited.add(name)
            yield name
            kind_of_node, inputs = self.nodes[name]
            links = {key: link for key, link in links_of(inputs).items() if linked(link) in self.nodes}
            only = [*links] if len(links) == 1 and kind_of_node not in UNDERSTOOD - {"Reroute"} else []
            keys = (preferred, *PASSED.get(kind, (kind,)), *only)
            value = next((links[key] for key in keys if key in links), None)

    def value(self, given: Any, setting: str) -> Any:
        """An input's value, along its link; None if that leads nowhere. Raises `Unread` where a node may change it."""
        visited: list[str] = []
        while name := linked(given):
            if name not in self.nodes or name in visited:
                return None
            visited.append(name)
            kind, inputs = self.nodes[name]
            plain = {key: value for key, value in inputs.items() if not KNOB.search(key)}
            own = {key: value for key, value in plain.items() if not idle(value)} or dict([*plain.items()][:1])
            own = links_of(inputs) if SHOWS.search(kind) else own
            if "populated_text" in inputs:
                given = inputs["populated_text"]
            elif JOINS.search(kind):
                given = self._joined(name, kind, plain)
            elif len(own) == 1 and ({*own} & {setting, "noise_seed"} or not CHANGES.search(kind)):
                ((key, given),) = own.items()
                name_of_file = "prompt" in setting and isinstance(given, str) and not TEXT.search(key)
                if name_of_file or key in LATENT:
                    raise Unread(kind)
            else:
                raise Unread(kind)
        self.read.update(visited)
        return given

    def _joined(self, name: str, kind: str, inputs: dict[str, Any]) -> Any:
        """The joined texts of a node. Raises `Unread` for a node that may do more."""
        if name in self.joined:
            return self.joined[name]
        self.joined[name] = None  # for now: a node may join its own text
        between, parts = [key for key in inputs if BETWEEN.search(key)], [key for key in inputs if PART.fullmatch(key)]
        others = {key for key, value in inputs.items() if not idle(value)} - {*between, *parts}
        if not parts or others - {"inputcount", "clean_whitespace"} or len(between) > 1:
            raise Unread(kind)
        parts.sort(key=lambda key: [(piece.isdigit(), piece.zfill(2)) for piece in re.split("([0-9]+)", key)])
        count = self.typed(inputs.get("inputcount"), "inputcount", int)
        texts = ["" if inputs[key] is None else self.value(inputs[key], "prompt") for key in parts[:count]]
        delimiter = self.value(inputs[between[0]], "prompt") if between else ""
        if not all(isinstance(text, str) for text in (*texts, delimiter)):
            raise Unread(kind)
        if kind == "Text Concatenate":  # of WAS: reads \\n in its delimiter and leaves empty texts out
            delimiter, clean = delimiter.replace("\\n", "\n"), not idle(inputs.get("clean_whitespace"))
            texts = [text for text in (text.strip() if clean else text for text in texts) if text]
        joined = self.joined[name] = delimiter.join(texts)
        unsure = "" in texts and delimiter and kind != "StringConcatenate"  # other nodes may leave empty texts out
        if unsure or len(joined) > LONGEST:
            raise Unread(kind)
        return joined

    def typed(self, given: Any, setting: str, kind: type) -> Any:
        """The value of an input as text, or as a number, which may be written as text. None for any other value."""
        value = self.value(given, setting)
        if kind is str:
            return value if isinstance(value, str) else None
        if (number := number_of(value, kind)) is None and value is not None and (name := linked(given)):
            raise Unread(self.nodes[name][0])
        return number

    def ancestors(self, names: list[str]) -> list[str]:
        """The ids of these nodes and of all nodes that lead to them, the nearest first."""
        found, new = dict.fromkeys(names), names
        while new:
            links = (linked(value) for name in new for value in self.nodes[name][1].values())
            new = [name for name in dict.fromkeys(links) if name in self.nodes and name not in found]
            found |= dict.fromkeys(new)
        return list(found)


def idle(value: Any) -> bool:
    """Whether an input of this value does nothing."""
    return value is None or value is False or str(value).lower() in ("", "none", "disabled", "off", "false", "no")


def number_of(value: Any, kind: type) -> Any:
    try:
        number = kind(value)
        whole = isinstance(value, str) or number == value
        return number if whole and not isinstance(value, bool) and math.isfinite(number) else None
    except (TypeError, ValueError, OverflowError):
        return None
