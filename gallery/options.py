"""The command line of `test.py` and `test_flux.py`. Nothing heavy is imported, so that `--help` answers at once."""

import argparse
import contextlib
import difflib
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"
OFFLOAD = ("auto", "none", "model", "sequential")
TRUE_CFG = 2.0
OFFLOAD_HELP = "keep the model in main memory, for small GPUs; auto does so where too little GPU memory is free"
SCHEDULES = """karras, exponential, polyexponential, ComfyUI's simple, normal, sgm_uniform, ddim_uniform, beta,
    linear_quadratic and kl_optimal, or 'scheduler' for the scheduler's own"""
DTYPES = ("float16", "bfloat16", "float32", "float64")
AXES = ("steps", "schedule", "guidance", "dtype")  # one of them may have several values, the columns of a sheet
SEEDS = range(-(2**63), 2**64)  # what torch.Generator.manual_seed takes
STEPS, SIDE, BATCH, PICTURES = 1000, 4096, 256, 100_000  # the largest allowed values


@dataclass(frozen=True)
class Family:
    """What differs between SDXL and FLUX: the pipeline, the real model and its defaults."""

    name: str
    script: str
    module: str
    pipeline: str
    stock: str
    hub_model: str
    dtype: str
    multiple: int
    steps: int
    guidance: float
    schedule: str | None
    comfy_schedule: str

    @property
    def demo(self) -> Path:
        return ROOT / "demo" / self.name


# fmt: off
SDXL = Family(
    name="sdxl", script="test.py", module="sdxl_comfy_pipeline", pipeline="StableDiffusionXLComfyPipeline",
    stock="StableDiffusionXLPipeline", hub_model="stabilityai/stable-diffusion-xl-base-1.0", dtype="float16",
    multiple=8, steps=25, guidance=5.0, comfy_schedule="normal",
    schedule="karras",  # dpmpp_3m_sde needs small last steps, which the scheduler's own levels lack
)
FLUX = Family(
    name="flux", script="test_flux.py", module="flux_comfy_pipeline", pipeline="FluxComfyPipeline",
    stock="FluxPipeline", hub_model="black-forest-labs/FLUX.1-dev", dtype="bfloat16",
    multiple=16,  # two by two latents are one token
    steps=28, guidance=3.5, comfy_schedule="simple", schedule=None,
)
# fmt: on


class Parser(argparse.ArgumentParser):
    """Reports an error in one line. --help has the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(family: Family, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a grid. Raises SystemExit(2), with one line, for values that can't be right."""
    parser = Parser(
        description=f"Draws every sampler of k-diffusion with {family.name.upper()}, from the same noise, into a grid.",
        epilog="Without --model: the real model on a machine with CUDA, the demo model of this repository elsewhere."
        " --steps, --schedule, --guidance or --dtype may have several values, which are the columns of a sheet.",
    )
    add, flux = parser.add_argument, family is FLUX
    add("--model", type=text, help=f"hub id, folder, .safetensors or 'demo' (default: {family.hub_model} or demo)")
    add("--samplers", nargs="+", metavar="NAME", help="only these (default: all), with or without 'sample_'")
    add("--steps", type=steps, nargs="+", metavar="N", help=f"(default: {family.steps}{', schnell: 4' * flux})")
    schedules = f"noise levels (default: {family.schedule or 'scheduler'}): {SCHEDULES}"
    add("--schedule", type=text, nargs="+", metavar="NAME", help=schedules)
    discard = "drop the second-to-last level, as the web UI does for DPM2, DPM2 a and DPM++ 3M SDE"
    add("--discard-penultimate", dest="discard", action="store_true", help=discard)
    add("--width", type=side, help="pixels (default: the model's)")
    add("--height", type=side, help="pixels (default: the model's)")
    add("--prompt", help=f"(default: {PROMPT})")
    add("--negative-prompt", help="what not to draw")
    add("--guidance", type=finite, nargs="+", metavar="X", default=family.guidance, help="scale (default: %(default)s)")
    if flux:
        add("--true-cfg", type=finite, help=f"scale of the negative prompt (default: {TRUE_CFG})")
    add("--prompts", type=Path, metavar="FILE", help="draw every line of a text file instead of --prompt")
    add("--seed", type=seed, default=2, help="of the noise, the same for every sampler (default: %(default)s)")
    add("--seeds", type=_seeds, default=1, metavar="N", help="draw N seeds, from --seed on (default: 1)")
    batch = "draw N prompts and seeds at once (default: 1); pictures differ by rounding, and --resume ignores it"
    add("--batch", type=_batch, default=1, metavar="N", help=batch)
    comfy = f"draw what ComfyUI's KSampler draws, by default with all of its samplers (levels: {family.comfy_schedule})"
    add("--comfy", action="store_true", help=comfy)
    nodes = "packs of ComfyUI's custom nodes, by name or path, whose samplers and schedules can then be named"
    add("--custom-nodes", nargs="+", default=[], metavar="NAME", help=nodes)
    add("--dtype", choices=DTYPES, nargs="+", help=f"of the network (default: {family.dtype}, on a CPU float32)")
    add("--device", type=text, help="cuda, cuda:1, mps, cpu, ... (default: cuda where there is one, else cpu)")
    add("--offload", choices=OFFLOAD, default="auto", help=f"{OFFLOAD_HELP} (default: auto)")
    add("--output", type=Path, default=Path("output"), help="folder (default: %(default)s)")
    add("--html", action="store_true", help="write each sheet as a page too, to compare its pictures in place")
    add("--resume", action="store_true", help="keep the pictures that are there already with the same settings")
    picture = "draw with the settings in a picture of ComfyUI or the web UI; other options take precedence"
    add("--from", dest="picture", type=Path, metavar="PICTURE", help=picture)
    options = parser.parse_args(arguments)
    if options.picture is not None:
        defaults, unread = _of_picture(parser, family, options)
        parser.set_defaults(**defaults)
        options = parser.parse_args(arguments)
        for name, why in unread.items():  # the command line has to set these
            if getattr(options, name) is None and not (name == "prompt" and options.prompts):
                option = f"--{name.replace('_', '-')}"
                parser.error(f"argument --from: {options.picture}: the {why}; name it with {option}")
    if options.discard and options.comfy:
        parser.error("argument --discard-penultimate: not with --comfy, whose samplers drop the level themselves")
    check_size(parser, family, options)
    if options.prompt is not None and options.prompts is not None:
        parser.error("argument --prompts: not with --prompt; the file's lines are the prompts")
    options.prompt = PROMPT if options.prompt is None else options.prompt
    if flux:
        if not options.comfy:  # ComfyUI guides away from an empty text too
            options.negative_prompt = options.negative_prompt or None
        if (options.true_cfg or 0) > 1 and options.negative_prompt is None:
            parser.error("argument --true-cfg: needs --negative-prompt, whose scale it is")
        options.true_cfg = TRUE_CFG if options.true_cfg is None else options.true_cfg
    options.schedule = options.schedule or (family.comfy_schedule if options.comfy else family.schedule)
    _split_columns(parser, options)
    if options.prompts is not None:
        try:
            lines = options.prompts.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"argument --prompts: can't read {options.prompts}: {error}")
        if not (found := [line.strip() for line in lines if line.strip()]):
            parser.error(f"argument --prompts: {options.prompts} has no line with a prompt")
        options.prompts = found
    pictures = len(options.prompts or [options.prompt]) * options.seeds * len(options.columns)
    if pictures > PICTURES:
        parser.error(f"argument --seeds: {pictures} pictures of each sampler; one folder takes at most {PICTURES}")
    if options.comfy and options.seed < 0:
        parser.error(f"argument --seed: ComfyUI's seeds begin at 0, but this is {options.seed}")
    if (last := options.seed + options.seeds - 1) not in SEEDS:
        parser.error(f"argument --seeds: the last seed would be {last}, but the largest is {SEEDS[-1]}")
    if options.samplers is not None:
        options.samplers = [name.strip() for names in options.samplers for name in names.split(",") if name.strip()]
        if not options.samplers:
            parser.error("argument --samplers: names none; leave it out to draw all of them")
    return options


def _split_columns(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Finds `axis`, the option with several values or None, and `columns`, what each column of the sheet sets."""
    options.axis, options.columns = None, [{}]
    for name in AXES:
        given = one if isinstance(one := getattr(options, name), list) else [one]
        values = list(dict.fromkeys(None if value == "scheduler" else value for value in given))
        setattr(options, name, values[0])
        if len(values) > 1:
            if options.axis:
                parser.error(f"argument --{name}: has several values, and so has --{options.axis}; only one option may")
            options.axis, options.columns = name, [{name: value} for value in values]


def number(kind: Callable[[str], Any], wanted: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A `type` for argparse whose error says what is wanted."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"has to be {wanted}, but is {text!r}")

    return read


def _of_picture(parser: Parser, family: Family, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of `--from` as defaults of the options, and why others can't be read. Prints what is not used."""
    from gallery.workflow import import_settings

    try:
        read = import_settings(options.picture, family.name)
    except (ValueError, OSError) as error:
        parser.error(f"argument --from: {error}")
    values, unused = dict(read.values), list(read.unused)
    if values.get("denoise", 1) != 1:
        unused.append(f"denoise {values['denoise']}: image to image")
    if "model" in values and options.model is None:
        unused.append(f"the model {values['model']}: name it with --model")
    if unused:
        print(f"{options.picture}: not used: {', '.join(unused)}", file=sys.stderr)
    names = {"cfg": "true_cfg" if family is FLUX else "guidance", "scheduler": "schedule", "sampler_name": "samplers"}
    names |= {name: name for name in ("prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height")}
    # as text, so that each value is checked like one of the command line; `cfg` goes before SDXL's `guidance`
    defaults: dict[str, Any] = {names[name]: str(values[name]) for name in reversed(names) if name in values}
    if options.prompts is not None:
        defaults.pop("prompt", None)
    if "samplers" in defaults:
        defaults["samplers"] = [defaults["samplers"]]
    unread = {names[name]: f"{name.replace('_', ' ')} could not be read ({node})"
              for name, node in read.unread.items() if name in names}  # fmt: skip
    discard = options.discard or ("discard" in values and options.samplers is None)
    return defaults | dict.fromkeys(unread) | {"comfy": read.comfy, "discard": discard}, unread


def unknown(name: str, known: Iterable[str]) -> str:
    """The message for an unknown name: the nearest known names, or all of them."""
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1 if name.lower() in lower else 3, cutoff=0.75)
    meant = f"did you mean {' or '.join(lower[one] for one in near)}?"
    return f"there is no {name!r}; {meant if near else 'there are ' + ', '.join(lower.values())}"


def check_size(parser: argparse.ArgumentParser, family: Family, options: argparse.Namespace) -> None:
    """Raises SystemExit(2) for a width or height that the family's latents can't have."""
    for name in ("width", "height"):
        if (side := getattr(options, name) or 0) % family.multiple:
            wanted = f"divisible by {family.multiple} for {family.name.upper()}"
            parser.error(f"argument --{name}: has to be {wanted}, but is {side}")


def text(value: str) -> str:
    """A `type` for argparse that refuses an empty value."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty; name one, or leave it out")
    return value


def _up_to(most: int, why: str) -> Callable[[str], Any]:
    return number(int, f"a whole number from 1 to {most} ({why})", range(1, most + 1).__contains__)


steps = _up_to(STEPS, "the models were trained with as many timesteps")
side = _up_to(SIDE, "16 times the pixels that the models were trained with")
_batch = _up_to(BATCH, "all of them are in memory at once")
_seeds = _up_to(PICTURES, "each is a file in one folder")
seed = number(int, f"a whole number in {SEEDS[0]}..{SEEDS[-1]}", SEEDS.__contains__)
finite = number(float, "a finite number", math.isfinite)
