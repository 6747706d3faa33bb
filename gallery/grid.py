"""The grid: one model, one prompt, the same noise, every sampler, with one or more values of an option."""

import functools
import gc
import importlib
import itertools
import json
import sys
import time
import zlib
from argparse import Namespace
from datetime import timedelta
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from comfy_ksampler import SAMPLERS, SCHEDULERS, ksampler, levels, load_custom_nodes, names
from gallery.models import check_output, device_of, encode, load, reason, short_name, size_of
from gallery.options import Family, unknown
from gallery.parameters import VARIANTS, listed, write_parameters
from gallery.pictures import read_settings, write_png
from gallery.refused import Refused, refusing
from gallery.sheet import Drawn, Picture, finish, outcome
from gallery.start import raise_on_ctrl_c

PLAIN = (None, "karras", "exponential", "polyexponential")  # the pipeline makes these levels, without --comfy
COMFY = "since 0.7"  # the versions of ComfyUI whose noise --comfy draws
VERSIONS = {"diffusers": diffusers.__version__, "torch": torch.__version__}
VERSIONS |= {one.name: one.version for one in distributions(name="k-diffusion")}
NOT_FINITE = "the picture is not finite: a number overflowed; try a lower --guidance, or --dtype bfloat16 or float32"


def run(family: Family, options: Namespace) -> int:
    """Draws the grid. Returns 0, 1 if something failed, 130 after Ctrl-C. Raises Refused where nothing can start."""
    try:
        return _run(family, options)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130


def _run(family: Family, options: Namespace) -> int:
    check_output(options.output)
    with refusing(ImportError):
        module = importlib.import_module(family.module)
    columns = [Namespace(**{**vars(options), **values}) for values in options.columns]
    samplers = _check_names(module, options, columns)

    device = device_of(options)
    model = options.model or (family.hub_model if torch.cuda.is_available() else "demo")
    if Path(model).resolve() == family.demo:
        model = "demo"  # so that the files have the same names
    # the processes wait for each other at the end, perhaps longer than the half hour that torch allows
    state = PartialState(cpu=torch.device(device).type == "cpu", timeout=timedelta(days=7))
    if state.num_processes > 1 and torch.device(device).index is None:
        device = str(state.device)
    if options.model is None and model == "demo" and state.is_main_process:
        print(f"No CUDA device here: drawing with the small demo model, demo/{family.name}.")

    pipe, dtype = load(family, module, model, device, columns[0]), columns[0].dtype
    raise_on_ctrl_c()
    name = short_name(family, model)
    with refusing(ValueError):
        settings = [{one: _settings(family, pipe, module, model, each, one) for one in samplers} for each in columns]
        if options.comfy and not options.samplers:
            samplers = _runnable(pipe, samplers, settings)
    units = units_of(name, module, samplers, options)
    own = [(column, unit) for share, column, unit in units if share % state.num_processes == state.process_index]

    @functools.lru_cache(options.batch)  # all samplers draw the latest prompts
    def encoded(prompt: str, guidance: float, dtype: str | None) -> dict[str, Any]:
        with refusing(Exception, text=reason):
            return encode(family, pipe, prompt, column)

    drawn: list[Any] = []
    interactive = sys.stderr.isatty()
    silent = not (interactive and state.is_main_process)
    with tqdm(total=sum(len(unit) for _, unit in own), desc=f"{name} grid", position=0, disable=silent) as bar:
        for number, unit in own:
            column = columns[number]
            bar.set_postfix_str(unit[0].name)
            wanted = [{**settings[number][one.row], "prompt": one.prompt, "seed": str(one.seed)} for one in unit]
            results = [_kept(*one) if options.resume else Drawn(one[0], None) for one in zip(unit, wanted)]
            missing = [one for one in results if one.path is None]
            if column.dtype != dtype and missing:
                dtype, pipe = column.dtype, None
                gc.collect()  # the weights of only one dtype are in memory
                torch.cuda.empty_cache()
                try:
                    pipe = load(family, module, model, device, column)
                except Refused as refused:
                    pipe = refused
            if isinstance(pipe, Refused):
                for one in missing:
                    one.error = str(pipe)
            elif missing:
                each = [encoded(one.prompt, column.guidance, column.dtype) for one in unit]
                tensors = [key for key, value in each[0].items() if torch.is_tensor(value)]
                _draw(pipe, results, wanted, each[0] | {key: torch.cat([one[key] for one in each]) for key in tensors})
            drawn += results
            bar.update(len(unit))
            for one in () if interactive else results:
                print(f"{one.picture.path.name}: {outcome(one)}", file=sys.stderr, flush=True)

    order = {one: i for i, one in enumerate(one for _, _, unit in units for one in unit)}
    drawn = sorted(gather_object(drawn), key=lambda one: order[one.picture])
    if state.is_main_process:
        by = f" by {state.num_processes} processes" if state.num_processes > 1 else ""
        every = [column[sampler] for column in settings for sampler in samplers]
        common = {key: value for key, value in every[0].items() if all(one[key] == value for one in every)}
        if options.axis:
            common[options.axis] = ", ".join(dict.fromkeys(one[options.axis] for one in every))
        title = functools.partial(title_of, len(samplers), options.axis)
        return finish(drawn, model + by, common, title, options, distances=options.axis == "steps")
    return int(any(one.error for one in drawn))


def units_of(name: str, module: Any, samplers: list[str], options: Namespace) -> list[tuple[int, int, list[Picture]]]:
    """In the order of drawing: the process (modulo their number), the column, the pictures of one batch.

    A picture depends on its batch by rounding, so batches do not depend on the pictures that are there already or on
    the number of processes. dpm_adaptive, whose steps depend on the batch, and --comfy draw one picture at a time.
    """
    seeds = range(options.seed, options.seed + options.seeds)
    places: list[tuple[str, str, int]] = []
    units: list[tuple[int, int, list[Picture]]] = []
    for (number, prompt), seed in itertools.product(enumerate(options.prompts or [options.prompt], 1), seeds):
        tags = [f"{number:03}"] * (options.prompts is not None) + [f"seed{seed}"] * (len(seeds) > 1)
        places.append(("-".join([name, *tags]), prompt, seed))
    blocks = [places[first : first + options.batch] for first in range(0, len(places), options.batch)]
    labels = [f"{options.axis} {_shown(one[options.axis])}" if one else "" for one in options.columns]
    every = itertools.product(enumerate(blocks), enumerate(labels), enumerate(samplers))
    for (block, its_places), (column, label), (number, sampler) in every:
        file = f"sample_{sampler}{'-' * bool(label)}{label.replace(' ', '')}.png"
        pictures = [Picture(*place, sampler, label, options.output / f"{place[0]}-{file}") for place in its_places]
        alone = options.comfy or "rtol" in module.find_sampler(VARIANTS.get(sampler, [sampler])[0]).arguments
        share = number + block + column  # so that all processes draw the slow samplers
        units += [(share, column, unit) for unit in ([[one] for one in pictures] if alone else [pictures])]
    # so that each dtype's network is loaded only once
    return sorted(units, key=lambda unit: unit[1]) if options.axis == "dtype" else units


def _shown(value: Any) -> str:
    """A value of an option as on the command line. A list of levels, too long for a file's name, ends in a hash."""
    text = "scheduler" if value is None else str(value).removesuffix(".0")
    return text if len(text) <= 40 else f"{text[:24]}~{zlib.crc32(text.encode()):08x}"


def title_of(count: int, axis: str | None, place: str, settings: dict[str, str]) -> list[str]:
    """What all pictures of a sheet, of `count` samplers, have in common."""
    negative, seed, comfy = settings["negative_prompt"], settings["seed"], settings["comfy"] != "False"
    parts = {"steps": "{} steps", "schedule": "{} noise levels", "guidance": "guidance {}"}
    parts |= {"true_cfg": "true CFG {}"} if negative else {}
    shared = [text.format(settings[name]) for name, text in parts.items() if name in settings and name != axis]
    return [
        f"{place}: {count} samplers of k-diffusion{' as in ComfyUI' * comfy}, {', '.join(shared)}, seed {seed}",
        settings["prompt"] + (f"   (not: {negative})" if negative else ""),
    ] + ["difference: root mean square over pixels (of 255) from the same sampler's last picture"] * (axis == "steps")


def _check_names(module: Any, options: Namespace, columns: list[Namespace]) -> list[str]:
    """The samplers to draw, without `sample_`, each once; with --comfy all of ComfyUI's by default."""
    with refusing(ImportError, ValueError, text="--custom-nodes: {}".format):
        load_custom_nodes(*options.custom_nodes) if options.custom_nodes else None
    wanted, comfyuis = [column.schedule or "scheduler" for column in columns], (list(SAMPLERS), [*SCHEDULERS])
    named = [*wanted, *(options.samplers or []) * options.comfy]
    if options.custom_nodes or {*named} - {*SAMPLERS, *SCHEDULERS, *module.SCHEDULES, *VARIANTS, "scheduler"}:
        comfyuis = names()  # ComfyUI is imported for a name that is not known without it
    schedules = comfyuis[1] if options.comfy else [*module.SCHEDULES, *comfyuis[1], "scheduler"]
    known = comfyuis[0] if options.comfy else module.sampler_names()
    samplers = [name.removeprefix("sample_") for name in options.samplers or known]
    for flag, given, of in (("samplers", samplers, [*known, *VARIANTS]), ("schedule", wanted, schedules)):
        for name in given:
            if name not in of and not (flag == "schedule" and listed(name)):
                raise Refused(f"--{flag}: {unknown(name, dict.fromkeys(of))}")
    return list(dict.fromkeys(samplers))


def _runnable(pipe: Any, samplers: list[str], settings: list[dict[str, dict[str, str]]]) -> list[str]:
    """The samplers of ComfyUI that run here with all columns' settings. Prints how many are left out, and why."""
    runs, reasons = [], set[str]()
    for name in samplers:
        try:
            for column in settings:
                if float(column[name].get("true_cfg", column[name]["guidance"])) <= 1 and "_cfg_pp" in name:
                    raise ImportError("the cfg_pp samplers need guidance above 1")
                _arguments(pipe, column[name])
            runs.append(name)
        except ImportError as error:
            reasons.add(str(error).split(", and ", 1)[-1])
    if reasons:
        print(f"{len(samplers) - len(runs)} of ComfyUI's samplers are left out: {'; '.join(sorted(reasons))}.")
    return runs


def _settings(family: Family, pipe: Any, module: Any, model: str, options: Namespace, sampler: str) -> dict[str, str]:
    """What a picture depends on, as text for the PNG. `sigmas` are t on FLUX. ValueError: they can't be drawn."""
    flux = family.name == "flux"
    steps = options.steps or (4 if flux and not pipe.transformer.config.guidance_embeds else family.steps)
    if given := listed(options.schedule):
        steps = len(given) - 1
    width, height = size_of(family, pipe, options)
    sigmas = _levels(pipe, options.schedule, steps, [width, height], options.discard, sampler * options.comfy)
    name, given_options = (sampler, {}) if options.comfy else VARIANTS.get(sampler, (sampler, {}))
    arguments = module.find_sampler(name).arguments if name in module.sampler_names() else {}  # or ComfyUI's own
    sampler_options = {key: arguments[key] for key in arguments if key not in module.GIVEN | {"noise_sampler"}}
    dtype = str((pipe.transformer if flux else pipe.unet).dtype).removeprefix("torch.")
    settings = {"prompt": options.prompt, "negative_prompt": options.negative_prompt or "", "model": model}
    settings |= {"steps": str(steps), "schedule": options.schedule or "scheduler", "guidance": str(options.guidance)}
    settings |= {"sigmas": json.dumps([round(sigma, 6) for sigma in sigmas.tolist()])}
    if flux:
        settings |= {"true_cfg": str(1.0 if options.negative_prompt is None else options.true_cfg)}
    settings |= {"seed": str(options.seed), "comfy": COMFY if options.comfy else "False", "size": f"{width}x{height}"}
    settings |= {"dtype": options.dtype or dtype, "versions": json.dumps(VERSIONS)}
    settings |= {"sampler": sampler, "sampler_options": json.dumps(sampler_options | given_options)}
    return settings | ({"discard": "True"} if options.discard else {})


def _levels(pipe: Any, named: str | None, steps: int, size: list[int], discard: bool, comfy_sampler: str = "") -> Any:
    """The levels by name, or as listed. Some of ComfyUI's samplers take another number of levels."""
    width, height = size
    if listed(named) or (named in PLAIN and not comfy_sampler):
        area = (height // (2 * pipe.vae_scale_factor)) * (width // (2 * pipe.vae_scale_factor))
        tokens = [area] if hasattr(pipe, "transformer") else []
        sigmas = pipe.noise_levels(*tokens, steps + discard, schedule=listed(named) or named)
    else:
        sigmas = levels(pipe, named, steps + discard, width=width, height=height, sampler_name=comfy_sampler)
    return sigmas[[*range(len(sigmas) - 2), -1]] if discard and not listed(named) else sigmas


def _draw(pipe: Any, drawn: list[Drawn], settings: list[dict[str, str]], prompts: dict[str, Any]) -> None:
    """Draws a unit in one batch and writes the pictures that are not there. A failure is noted, not raised."""
    calls: list[bool] = []
    network = getattr(pipe, "unet", None) or pipe.transformer
    hook = network.register_forward_pre_hook(lambda *_: calls.append(True))
    start = time.perf_counter()
    try:
        arguments = _arguments(pipe, settings[0])
        if settings[0]["comfy"] == "False":  # the same noise for every sampler
            arguments["generator"] = [torch.Generator("cpu").manual_seed(one.picture.seed) for one in drawn]
        arguments = {"guidance_scale": float(settings[0]["guidance"]), **prompts, **arguments}
        images = pipe(**arguments, output_type="pt").images
        seconds = (time.perf_counter() - start) / len(drawn)
        evaluations = len(calls) // (1 + (float(settings[0].get("true_cfg", 1)) > 1))  # FLUX: a call for each prompt
        pictures = pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(images.nan_to_num()))
        for one, image, values, wanted in zip(drawn, pictures, images, settings):
            if one.path is None and not values.isfinite().all():
                one.error = NOT_FINITE
            elif one.path is None:
                one.seconds, one.evaluations = seconds, evaluations
                written = {**wanted, "evaluations": str(evaluations), "seconds": f"{seconds:.1f}"}
                write_png(image, one.picture.path, written, write_parameters(written))
                one.path = one.picture.path
    except Exception as error:
        for one in drawn:
            one.error = one.error or ("" if one.path else reason(error))
        torch.cuda.empty_cache()
    finally:
        hook.remove()


def _arguments(pipe: Any, settings: dict[str, str]) -> dict[str, Any]:
    """The arguments of a call, without the prompts; the generators only where ComfyUI's KSampler makes the noise."""
    schedule = None if settings["schedule"] == "scheduler" else settings["schedule"]
    steps, sampler = int(settings["steps"]), settings["sampler"]
    size: dict[str, Any] = dict(zip(("width", "height"), map(int, settings["size"].split("x"))))
    if settings["comfy"] == "False":
        sampler, options = VARIANTS.get(sampler, (sampler, {}))
        arguments = {"sampler": sampler, "sampler_kwargs": options, **size}
        if "discard" in settings or schedule not in PLAIN:
            return arguments | {"schedule": _levels(pipe, schedule, steps, [*size.values()], "discard" in settings)}
        return arguments | {"num_inference_steps": steps, "schedule": schedule}
    node = {"seed": int(settings["seed"]), "cfg": float(settings.get("true_cfg", settings["guidance"]))} | size
    return ksampler(pipe, **node, steps=steps, sampler_name=sampler, scheduler=listed(schedule) or schedule)


def _kept(picture: Picture, wanted: dict[str, str]) -> Drawn:
    """The picture, if it is there already, complete and with these settings."""
    try:
        found = {"comfy": "False", **(read_settings(picture.path) or {})}  # older pictures without --comfy lack it
    except ValueError:
        found = {}
    if any(found.get(key) != value for key, value in wanted.items()):
        return Drawn(picture, None)
    return Drawn(picture, picture.path, float(found.get("seconds", 0)), int(found.get("evaluations", 0)), note="kept")
