"""The command line of `compare.py`. Nothing heavy is imported, so that `--help` is quick."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from gallery import options as grids
from gallery.options import DTYPES, FLUX, OFFLOAD, OFFLOAD_HELP, PROMPT, SDXL, Family, check_size, finite, number, text

above_zero = number(float, "a number above 0", lambda value: 0 < value < math.inf)
OF_PAIRS = ("sampler", "against", "schedule", "parameterization", "guidance", "json", "html")
OF_MODELS = ("model", "steps", "width", "height", "prompt", "guidance", "seed", "dtype", "device", "tolerance")


def parse_compare(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Family]:
    """The options of `compare.py`. Raises SystemExit(2) with one line for values that can't be right."""
    parser = grids.Parser(
        description="Runs two samplers on one network from the same noise, and finds where they diverge and why.",
        epilog="A side is NAME or NAME(option=value, ...). Exit status: 0 identical to rounding, 1 not, 2 bad input.",
    )
    parser.set_defaults(comfy=False)  # that switch is the grids'
    add = parser.add_argument
    words = "a sampler of k-diffusion, by name or a function; with --against exact also a scheduler (%(default)s)"
    add("--sampler", type=text, default="dpmpp_2m", help=words)
    words = "'exact' (is --sampler right? no model is loaded), a scheduler class of diffusers, which runs in the stock"
    words += " pipeline, another sampler of k-diffusion, or a user-supplied function or scheduler class:"
    words += " path/to/file.py:name or package.module:name (its code is run)"
    add("--against", type=text, metavar="SIDE", help=words)
    add("--family", choices=("sdxl", "flux"), help="(default: sdxl; with --all, both)")
    words = "hub id, folder, .safetensors file, or 'demo' (default: %(default)s)"
    add("--model", type=text, default="demo", help=words)
    add("--steps", type=grids.steps, default=25, help="(default: %(default)s)")
    add("--schedule", type=text, help="noise levels of the k-diffusion side by name (default: the other side's)")
    words = "FLUX: what the sampler sees as sigma"
    add("--parameterization", choices=("auto", "flow", "ve"), default="auto", help=words)
    for name in ("--width", "--height"):
        add(name, type=grids.side, help="pixels (default: the model's)")
    add("--prompt", default=PROMPT, help="(default: %(default)s)")
    add("--guidance", type=finite, help="guidance scale (default: FLUX 3.5, SDXL 1: no part of a sampler)")
    add("--seed", type=grids.seed, default=2, help="of the initial and the step noise (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="of the network (default: float64 for the demo models, else float32)")
    add("--device", type=text, help="cuda, cuda:1, mps, cpu, ... (default: cuda where there is one, else cpu)")
    add("--offload", choices=OFFLOAD, default="auto", help=f"{OFFLOAD_HELP} (default: auto)")
    words = "of relative differences (default: 1e-6 in float64, 1e-4 in float32, 0.02 in half precision)"
    add("--tolerance", type=above_zero, help=words)
    add("--no-switches", dest="switches", action="store_false", help="don't try the known switches")
    add("--no-truth", dest="truth", action="store_false", help="don't solve the ODE or SDE finely")
    words = "CPU seconds for that (with --device cuda: seconds); what is found by then is reported (default: 15)"
    add("--truth-seconds", type=above_zero, default=15.0, metavar="N", help=words)
    words = "write all of it as JSON, to standard output without FILE"
    add("--json", type=text, nargs="?", const="-", metavar="FILE", help=words)
    add("--html", type=text, metavar="FILE", help="write a report to look at, one file")
    add("--all", action="store_true", help="run every known pair, and write parity.md and parity.json")
    words = "with --all: keep the rows of parity.json that were made with the same settings"
    add("--resume", action="store_true", help=words)
    add("--output", type=Path, default=Path("output"), help="folder for --all (default: %(default)s)")
    options = parser.parse_args(arguments)
    exact = options.against == "exact" and not options.all
    unused = dict[str, str]()
    if exact:
        words = "argument --against exact: goes without --{}, its model is its own"
        unused = dict.fromkeys((*OF_MODELS, "truth_seconds"), words)
    if options.all:
        unused |= dict.fromkeys(OF_PAIRS, "argument --all: goes without --{}, each pair has its own settings")
    else:
        unused |= dict.fromkeys(("resume", "output"), "argument --{}: goes with --all alone")
    for name, message in unused.items():
        if getattr(options, name) != parser.get_default(name):
            parser.error(message.format(name.replace("_", "-")))
    if options.all and options.model != "demo" and options.family is None:
        parser.error("argument --all: needs --family to say whose pairs --model can run")
    family = {"sdxl": SDXL, "flux": FLUX}[options.family or "sdxl"]
    if exact:  # before the imports, which take seconds
        model = f"a mixture of Gaussians, whose answer is known, in the pipeline of {family.name.upper()}"
        print(options.sampler, "on", model, file=sys.stderr if options.json == "-" else sys.stdout, flush=True)
    check_size(parser, family, options)
    options.negative_prompt, options.true_cfg = None, 1.0
    if options.guidance is None:
        options.guidance = FLUX.guidance if family is FLUX else 1.0
    options.dtype = options.dtype or ("float64" if options.model == "demo" else "float32")
    return options, family
