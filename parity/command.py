"""`compare.py`: its options, and one comparison, printed as it is found, or all of them.

Nothing heavy is imported above, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from gallery import options as grids
from gallery.options import FLUX, SDXL, Family, finite, number, text, unknown
from gallery.refused import Refused, refusing
from gallery.start import raise_on_ctrl_c

Answered = tuple[dict[str, Any], Callable[[], str], int]  # data for --json, the page for --html, exit status
above_zero = number(float, "a number above 0", lambda value: 0 < value < math.inf)
four_or_more = number(int, "a whole number of 4 or more", lambda value: value >= 4)
OF_PAIRS = ("sampler", "against", "schedule", "parameterization", "guidance", "json", "html")
OF_MODELS = ("model", "steps", "width", "height", "prompt", "guidance", "seed", "dtype", "device", "tolerance")
SAMPLER = "a k-diffusion sampler, or a function; with --against exact also a scheduler (default: %(default)s)"
AGAINST = """'exact' (is --sampler right? no model is loaded), a scheduler class of diffusers, in the stock pipeline,
another sampler of k-diffusion, or a user-supplied function or scheduler class: path/to/file.py:name or
package.module:name (its code is run)"""
TOLERANCE = "of relative differences (default: 1e-6 in float64, 1e-4 in float32, 0.02 in half precision)"
TRUTH_STEPS = "of the fine solution; a quarter as many say how exact it is (default: %(default)s)"


def parse_compare(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Family]:
    """The options of `compare.py`. Raises SystemExit(2) with one line for values that can't be right."""
    parser = grids.Parser(
        description="Runs two samplers on one network from the same noise, and finds where they diverge and why.",
        epilog="A side is NAME or NAME(option=value, ...). Exit status: 0 identical to rounding, 1 not, 2 bad input.",
    )
    parser.set_defaults(comfy=False, negative_prompt=None, true_cfg=1.0)  # the grids' options
    add = parser.add_argument
    add("--sampler", type=text, default="dpmpp_2m", help=SAMPLER)
    add("--against", type=text, metavar="SIDE", help=AGAINST)
    add("--family", choices=("sdxl", "flux"), help="(default: sdxl; with --all, both)")
    add("--model", type=text, default="demo", help="hub id, folder, .safetensors file, or 'demo' (default)")
    add("--steps", type=grids.steps, default=25, help="(default: %(default)s)")
    add("--schedule", type=text, help="noise levels of the k-diffusion side by name (default: the other side's)")
    add("--parameterization", choices=("auto", "flow", "ve"), default="auto", help="FLUX: the sampler's sigma")
    add("--width", type=grids.side, help="pixels (default: the model's)")
    add("--height", type=grids.side, help="pixels (default: the model's)")
    add("--prompt", default=grids.PROMPT, help="(default: %(default)s)")
    add("--guidance", type=finite, help="guidance scale (default: FLUX 3.5, SDXL 1: no part of a sampler)")
    add("--seed", type=grids.seed, default=2, help="of the initial and the step noise (default: %(default)s)")
    add("--dtype", choices=grids.DTYPES, help="of the network (default: float64 for the demo models, else float32)")
    add("--device", type=text, help="cuda, cuda:1, mps, cpu, ... (default: cuda where there is one, else cpu)")
    add("--offload", choices=grids.OFFLOAD, default="auto", help=f"{grids.OFFLOAD_HELP} (default: auto)")
    add("--tolerance", type=above_zero, help=TOLERANCE)
    add("--no-switches", dest="switches", action="store_false", help="don't try the known switches")
    add("--no-truth", dest="truth", action="store_false", help="don't solve the ODE or SDE finely")
    add("--truth-steps", type=four_or_more, default=512, metavar="N", help=TRUTH_STEPS)
    add("--json", type=text, nargs="?", const="-", metavar="FILE", help="write all as JSON; without FILE to stdout")
    add("--html", type=text, metavar="FILE", help="write a report to look at, one file")
    add("--all", action="store_true", help="run every known pair, and write parity.md and parity.json")
    add("--output", type=Path, default=Path("output"), help="folder for --all (default: %(default)s)")
    options = parser.parse_args(arguments)
    exact = options.against == "exact" and not options.all
    for applies, names, message in (
        (exact, (*OF_MODELS, "truth_steps"), "--against exact: not with --{}; the model is a mixture of Gaussians"),
        (options.all, OF_PAIRS, "--all: not with --{}; each pair has its own settings"),
        (not options.all, ("output",), "--{}: only with --all"),
    ):
        for name in names:
            if applies and getattr(options, name) != parser.get_default(name):
                parser.error("argument " + message.format(name.replace("_", "-")))
    if options.all and options.model != "demo" and options.family is None:
        parser.error("argument --all: needs --family to say whose pairs --model can run")
    family = {"sdxl": SDXL, "flux": FLUX}[options.family or "sdxl"]
    if exact:  # before the imports, which take seconds
        model = f"a mixture of Gaussians, with a known exact solution, in the pipeline of {family.name.upper()}"
        print(options.sampler, "on", model, file=words_to(options), flush=True)
    grids.check_size(parser, family, options)
    options.dtype = options.dtype or ("float64" if options.model == "demo" else "float32")
    return options, family


def run(options: argparse.Namespace, family: Family) -> int:
    """Exit status: 0 within the tolerance, or right; 1 if not. Raises Refused for what the user can fix."""
    raise_on_ctrl_c()
    if options.all:
        from parity.table import write_table

        return write_table(options)
    for path in (options.json, options.html):
        if path not in (None, "-") and not Path(path).resolve().parent.is_dir():
            raise Refused(f"can't write {path}: there is no folder {Path(path).resolve().parent}")
    if options.against is None:
        raise Refused("--against: name a scheduler, a sampler or a function, or use --all")
    with refusing(ImportError):
        module = importlib.import_module(family.module)
    from comfy_ksampler import SCHEDULERS
    from parity.result import write_text
    from parity.sides import find_side

    exact, show = options.against == "exact", functools.partial(print, file=words_to(options), flush=True)
    ours = find_side(options.sampler, module, "--sampler")
    theirs = None if exact else find_side(options.against, module, "--against")
    if theirs is not None and ours.is_scheduler:
        raise Refused("--sampler: has to be a sampler; name the scheduler with --against")
    (theirs or ours).check_family(family, "--sampler" if exact else "--against")
    known = [*module.SCHEDULES, *([] if exact else SCHEDULERS)]
    if options.schedule is not None and options.schedule not in known:
        raise Refused(f"--schedule: {unknown(options.schedule, known)}")
    found, page, status = (_judge if exact else _compare)(options, family, (ours, theirs), show)
    text = json.dumps(found, indent=1)
    if options.json == "-":
        print(text)
    elif options.json:
        write_text(Path(options.json), text + "\n")
    if options.html:
        write_text(Path(options.html), page())
        show(f"report in {options.html}")
    return status


def words_to(options: argparse.Namespace) -> TextIO:
    """Where words are printed: standard output has nothing but JSON with `--json` alone."""
    return sys.stderr if options.json == "-" else sys.stdout


def _compare(options: argparse.Namespace, family: Family, sides: tuple[Any, Any], show: Callable) -> Answered:
    from parity.diagnose import compare_sides
    from parity.follow import Session
    from parity.report import report

    session = Session.load(family, options)
    result, a, b = compare_sides(session, *sides, show=show)
    return result.as_json(), lambda: report(session, result, a, b), int(result.cause is not None)


def _judge(options: argparse.Namespace, family: Family, sides: tuple[Any, Any], show: Callable) -> Answered:
    """`--against exact`: a sampler by itself."""
    from parity.judge import judge
    from parity.report import answer_page
    from parity.subject import Subject

    if sides[0].is_scheduler and options.schedule is not None:
        raise Refused("--schedule: a scheduler has its own levels; name them by its options, as use_karras_sigmas=True")
    answer = judge(Subject(sides[0], family, options.schedule, options.parameterization), show)
    return answer.as_json(), lambda: answer_page(answer), int(bool(answer.wrong))
