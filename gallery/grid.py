"""The grid: one model, one prompt, the same noise, every sampler, with one or more values of an option."""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import json
import sys
import time
import warnings
import zlib
from argparse import Namespace
from datetime import timedelta
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from comfy_ksampler import SAMPLERS, SCHEDULERS, ksampler, levels, load_custom_nodes, names
from gallery.models import check_output, device_of, encode, load, reason, short_name, size_of
from gallery.options import Family, unknown
from gallery.parameters import VARIANTS, listed, write_parameters
from gallery.pictures import read_settings, write_png
from gallery.refused import Refused
from gallery.sheet import Drawn, Picture, finish, outcome
from gallery.start import raise_on_ctrl_c

PLAIN = (None, "karras", "exponential", "polyexponential")  # the pipeline makes these levels, without --comfy
COMFY = "since 0.7"  # the versions of ComfyUI whose noise --comfy draws
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
    try:
        module = importlib.import_module(family.module)
    except ImportError as error:
        raise Refused(str(error)) from error
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
    try:
        settings = [
            {one: _settings(family, pipe, module, model, column, one) for one in samplers} for column in columns
        ]
        if options.comfy and not options.samplers:
            samplers = _runnable(pipe, samplers, settings)
    except ValueError as error:
        raise Refused(str(error)) from None
    units = units_of(name, module, samplers, options)
    own = [(column, unit) for share, column, unit in units if share % state.num_processes == state.process_index]

    drawn: list[Any] = []
    encoded: dict[Any, dict[str, Any]] = {}
    interactive = sys.stderr.isatty()
    silent = not (interactive and state.is_main_process)
    with tqdm(total=sum(len(unit) for _, unit in own), desc=f"{name} grid", position=0, disable=silent) as bar:
        for number, unit in own:
            column = columns[number]
            bar.set_postfix_str(unit[0].name)
            wanted = [{**settings[number][one.row], "prompt": one.prompt, "seed": str(one.seed)} for one in unit]
            kept = [_kept(*one) if options.resume else None for one in zip(unit, wanted)]
            drawn += filter(None, kept)
            if column.dtype != dtype and not all(kept):
                dtype, pipe = column.dtype, None
                gc.collect()  # the weights of only one dtype are in memory
                torch.cuda.empty_cache()
                try:
                    pipe = load(family, module, model, device, column)
                except Refused as refused:
                    pipe = refused
            if isinstance(pipe, Refused):
                drawn += [Drawn(one, None, error=str(pipe)) for one, there in zip(unit, kept) if there is None]
            elif not all(kept):
                prompts = _encode_all(family, pipe, unit, encoded, column)
                drawn += _draw(pipe, unit, kept, wanted, prompts)
            bar.update(len(unit))
            for one in () if interactive else drawn[-len(unit) :]:
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
    the number of processes. A sampler that chooses its steps by their error draws alone, and so does ComfyUI's noise.
    """
    seeds = range(options.seed, options.seed + options.seeds)
    places: list[tuple[str, str, int]] = []
    units: list[tuple[int, int, list[Picture]]] = []
    for (number, prompt), seed in itertools.product(enumerate(options.prompts or [options.prompt], 1), seeds):
        tags = [f"{number:03}"] * (options.prompts is not None) + [f"seed{seed}"] * (len(seeds) > 1)
        places.append(("-".join([name, *tags]), prompt, seed))
    blocks = [places[first : first + options.batch] for first in range(0, len(places), options.batch)]
    labels = [f"{options.axis} {_shown(one[options.axis])}" if one else "" for one in options.columns]
    for (block, its_places), (column, label), (number, sampler) in itertools.product(
        enumerate(blocks), enumerate(labels), enumerate(samplers)
    ):
        file = f"sample_{sampler}{'-' * bool(label)}{label.replace(' ', '')}.png"
        pictures = [Picture(*place, sampler, label, options.output / f"{place[0]}-{file}") for place in its_places]
        alone = options.comfy or "rtol" in module.find_sampler(VARIANTS.get(sampler, [sampler])[0]).arguments
        share = number + block + column  # so that all processes draw the slow samplers
        units += [(share, column, unit) for unit in ([[one] for one in pictures] if alone else [pictures])]
    # each dtype's network is loaded once
    return sorted(units, key=lambda unit: unit[1]) if options.axis == "dtype" else units


def _shown(value: Any) -> str:
    """A value of an option as on the command line. A list of levels, too long for a file's name, ends in a hash."""
    text = "scheduler" if value is None else str(value).removesuffix(".0")
    return text if len(text) <= 40 else f"{text[:24]}~{zlib.crc32(text.encode()):08x}"


def title_of(count: int, axis: str | None, place: str, settings: dict[str, str]) -> list[str]:
    """What all pictures of a sheet, of `count` samplers, have in common."""
    negative, comfy = settings["negative_prompt"], settings["comfy"] != "False"
    parts = {"steps": "{} steps", "schedule": "{} noise levels", "guidance": "guidance {}"}
    shared = [text.format(settings[name]) for name, text in parts.items() if name in settings and name != axis]
    shared += [f"true CFG {settings['true_cfg']}"] if negative and "true_cfg" in settings else []
    shared += [f"seed {settings['seed']}"]
    return [
        f"{place}: {count} samplers of k-diffusion{' as in ComfyUI' * comfy}, {', '.join(shared)}",
        settings["prompt"] + (f"   (not: {negative})" if negative else ""),
    ] + ["levels of 255: root mean square over pixels, from the last picture of the same sampler"] * (axis == "steps")


def _check_names(module: Any, options: Namespace, columns: list[Namespace]) -> list[str]:
    """The samplers to draw, without `sample_`, each once; with --comfy all of ComfyUI's by default."""
    try:
        load_custom_nodes(*options.custom_nodes) if options.custom_nodes else None
    except (ImportError, ValueError) as error:
        raise Refused(f"--custom-nodes: {error}") from None
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
    runs, why = [], set[str]()
    for name in samplers:
        try:
            for column in settings:
                if float(column[name].get("true_cfg", column[name]["guidance"])) <= 1 and "_cfg_pp" in name:
                    raise ImportError("the cfg_pp samplers need guidance above 1")
                _comfy_arguments(pipe, column[name])
            runs.append(name)
        except ImportError as error:
            why.add(str(error).split(", and ", 1)[-1])
    if why:
        print(f"{len(samplers) - len(runs)} of ComfyUI's samplers are left out: {'; '.join(sorted(why))}.")
    return runs


def _settings(family: Family, pipe: Any, module: Any, model: str, options: Namespace, sampler: str) -> dict[str, str]:
    """What a picture depends on, as text for the PNG. `sigmas` are t on FLUX. ValueError: such a picture can't be."""
    flux = family.name == "flux"
    distilled = flux and not pipe.transformer.config.guidance_embeds
    steps = options.steps or (4 if distilled else family.steps)
    if given := listed(options.schedule):
        steps = len(given) - 1
    width, height = size_of(family, pipe, options)
    sigmas = _levels(pipe, options.schedule, steps, width, height, options.discard, sampler if options.comfy else "")
    name, given_options = (sampler, {}) if options.comfy else VARIANTS.get(sampler, (sampler, {}))
    arguments = module.find_sampler(name).arguments if name in module.sampler_names() else {}  # or ComfyUI's own
    sampler_options = {key: arguments[key] for key in arguments if key not in module.GIVEN | {"noise_sampler"}}
    network = pipe.transformer if flux else pipe.unet
    settings = {"prompt": options.prompt, "negative_prompt": options.negative_prompt or "", "model": model}
    settings |= {"steps": str(steps), "schedule": options.schedule or "scheduler"}
    settings |= {"sigmas": json.dumps([round(sigma, 6) for sigma in sigmas.tolist()])}
    settings |= {"guidance": str(options.guidance)}
    if flux:
        settings |= {"true_cfg": str(1.0 if options.negative_prompt is None else options.true_cfg)}
    settings |= {"seed": str(options.seed), "comfy": COMFY if options.comfy else "False", "size": f"{width}x{height}"}
    settings |= {"dtype": options.dtype or str(network.dtype).removeprefix("torch."), "versions": _versions()}
    settings |= {"sampler": sampler, "sampler_options": json.dumps(sampler_options | given_options)}
    return settings | ({"discard": "True"} if options.discard else {})


def _levels(
    pipe: Any, named: str | None, steps: int, width: int, height: int, discard: bool, comfy_sampler: str = ""
) -> Any:
    """The levels by name, or as listed. Some of ComfyUI's samplers take another number of levels."""
    if listed(named) or (named in PLAIN and not comfy_sampler):
        area = (height // (2 * pipe.vae_scale_factor)) * (width // (2 * pipe.vae_scale_factor))
        tokens = [area] if hasattr(pipe, "transformer") else []
        sigmas = pipe.noise_levels(*tokens, steps + discard, schedule=listed(named) or named)
    else:
        sigmas = levels(pipe, named, steps + discard, width=width, height=height, sampler_name=comfy_sampler)
    return sigmas[[*range(len(sigmas) - 2), -1]] if discard and not listed(named) else sigmas


@functools.cache
def _versions() -> str:
    import diffusers

    found = {one.name: one.version for one in distributions(name="k-diffusion")}
    return json.dumps({"diffusers": diffusers.__version__, "torch": torch.__version__, **found})


def _encode_all(
    family: Family, pipe: Any, unit: list[Picture], encoded: dict[Any, dict[str, Any]], options: Namespace
) -> dict[str, Any]:
    """The arguments with the unit's prompts. The latest prompts stay in `encoded`: all samplers draw them."""
    keys = [(one.prompt, options.guidance, options.dtype) for one in unit]
    try:
        encoded |= {key: encode(family, pipe, key[0], options) for key in keys if key not in encoded}
    except Exception as error:
        raise Refused(reason(error)) from error
    each = [encoded[key] for key in keys]
    for key in list(encoded)[: -options.batch]:
        del encoded[key]
    tensors = {name for name, value in each[0].items() if isinstance(value, torch.Tensor)}
    return {name: torch.cat([one[name] for one in each]) if name in tensors else each[0][name] for name in each[0]}


def _draw(
    pipe: Any, unit: list[Picture], kept: list[Drawn | None], settings: list[dict[str, str]], prompts: dict[str, Any]
) -> list[Drawn]:
    """Draws a unit in one batch and writes what is not kept. A failure is noted, not raised."""
    drawn = [Drawn(one, None) for one in unit]
    calls: list[bool] = []
    network = getattr(pipe, "unet", None) or pipe.transformer
    hook = network.register_forward_pre_hook(lambda *_: calls.append(True))
    start = time.perf_counter()
    try:
        comfy = settings[0]["comfy"] != "False"
        arguments = (_comfy_arguments if comfy else _plain_arguments)(pipe, settings[0])
        if not comfy:  # the same noise for every sampler
            arguments["generator"] = [torch.Generator("cpu").manual_seed(one.seed) for one in unit]
        arguments = {"guidance_scale": float(settings[0]["guidance"]), **prompts, **arguments}
        images = pipe(**arguments, output_type="pt").images
        seconds = (time.perf_counter() - start) / len(unit)
        evaluations = len(calls) // (1 + (float(settings[0].get("true_cfg", 1)) > 1))  # FLUX: a call for each prompt
        pictures = pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(images.nan_to_num()))
        for one, image, values, wanted, there in zip(drawn, pictures, images, settings, kept):
            if not values.isfinite().all():
                one.error = NOT_FINITE
            elif there is None:
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
    return [one for one, there in zip(drawn, kept) if there is None]


def _plain_arguments(pipe: Any, settings: dict[str, str]) -> dict[str, Any]:
    """The arguments of a call, without the prompts and the generators."""
    width, height = map(int, settings["size"].split("x"))
    steps, schedule = int(settings["steps"]), None if settings["schedule"] == "scheduler" else settings["schedule"]
    sampler, options = VARIANTS.get(settings["sampler"], (settings["sampler"], {}))
    arguments = {"sampler": sampler, "sampler_kwargs": options, "width": width, "height": height}
    if "discard" in settings or schedule not in PLAIN:
        return arguments | {"schedule": _levels(pipe, schedule, steps, width, height, "discard" in settings)}
    return arguments | {"num_inference_steps": steps, "schedule": schedule}


def _comfy_arguments(pipe: Any, settings: dict[str, str]) -> dict[str, Any]:
    """The arguments of a call that draws what ComfyUI's KSampler draws, without the prompts."""
    width, height = map(int, settings["size"].split("x"))
    node: dict[str, Any] = {name: int(settings[name]) for name in ("seed", "steps")}
    node |= {"cfg": float(settings.get("true_cfg", settings["guidance"])), "sampler_name": settings["sampler"]}
    node |= {"scheduler": listed(settings["schedule"]) or settings["schedule"], "width": width, "height": height}
    with warnings.catch_warnings(record=True) as caught:  # of how far k-diffusion's latents are from ComfyUI's
        warnings.simplefilter("always")
        arguments = ksampler(pipe, **node)
    for warning in caught:
        print(warning.message, file=sys.stderr)
    return arguments


def _kept(picture: Picture, wanted: dict[str, str]) -> Drawn | None:
    """The picture that is there already, complete and with these settings."""
    try:
        found = {"comfy": "False", **(read_settings(picture.path) or {})}  # older plain pictures do not name it
    except ValueError:
        return None
    if any(found.get(key) != value for key, value in wanted.items()):
        return None
    return Drawn(picture, picture.path, float(found.get("seconds", 0)), int(found.get("evaluations", 0)), note="kept")
