"""The grid: one model, one prompt, one noise, every sampler."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from comfy_ksampler import SAMPLERS, SCHEDULERS, ksampler, levels
from gallery.models import check_output, device_of, encode, load, reason, short_name, size_of
from gallery.options import Family, unknown
from gallery.parameters import write_parameters
from gallery.pictures import read_settings, write_png
from gallery.refused import Refused
from gallery.sheet import Drawn, Picture, finish, said
from gallery.start import raise_on_ctrl_c

PLAIN = ("karras", "exponential")  # names of k-diffusion's, too: without --comfy they mean its levels
COMFY = "since 0.7"  # the versions whose noise --comfy draws
NOT_FINITE = "the picture is not finite: a number overflowed; try a lower --guidance, or --dtype bfloat16 or float32"


def run(family: Family, options: argparse.Namespace) -> int:
    """Draws the grid. Exit status: 0 if all was drawn, 1 if something failed, 130 after Ctrl-C.

    Raises Refused where nothing can start.
    """
    try:
        return _run(family, options)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130


def _run(family: Family, options: argparse.Namespace) -> int:
    check_output(options.output)
    try:
        module = importlib.import_module(family.module)
    except ImportError as error:
        raise Refused(str(error)) from error
    samplers = _check_names(module, options)

    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    device = device_of(options)
    model = options.model or (family.hub_model if torch.cuda.is_available() else "demo")
    if Path(model).resolve() == family.demo:
        model = "demo"  # the same by its path, so with the same names of files
    # who is done first waits for the others, longer than the half hour that torch allows
    state = PartialState(cpu=torch.device(device).type == "cpu", timeout=timedelta(days=7))
    if state.num_processes > 1 and torch.device(device).index is None:
        device = str(state.device)
    if options.model is None and model == "demo" and state.is_main_process:
        print(f"No CUDA device here: drawing with the small demo model, demo/{family.name}.")

    pipe = load(family, module, model, device, options)
    raise_on_ctrl_c()
    name = short_name(family, model)
    settings = _settings(family, pipe, model, options)
    if options.comfy and not options.samplers:
        samplers = _that_run(pipe, samplers, settings)
    units = list(units_of(name, module, samplers, options))
    mine = [unit for turn, unit in units if turn % state.num_processes == state.process_index]

    drawn: list[Any] = []
    encoded: dict[Any, dict[str, Any]] = {}
    interactive = sys.stderr.isatty()
    silent = not (interactive and state.is_main_process)
    with tqdm(total=sum(map(len, mine)), desc=f"{name} grid", position=0, disable=silent) as bar:
        for unit in mine:
            sampler = unit[0].sampler
            bar.set_postfix_str(sampler)
            shared = {**settings, "sampler": sampler, "sampler_options": _sampler_options(module, sampler)}
            if options.comfy:
                shared["sigmas"] = _levels_of(pipe, settings, sampler)
            wanted = [{**shared, "prompt": one.prompt, "seed": str(one.seed)} for one in unit]
            kept = [_kept(one, settings) if options.resume else None for one, settings in zip(unit, wanted)]
            drawn += filter(None, kept)
            if not all(kept):
                prompts = _encode_all(family, pipe, unit, encoded, options)
                drawn += _draw(family, pipe, unit, kept, prompts, wanted, device, options)
            bar.update(len(unit))
            for one in () if interactive else drawn[-len(unit) :]:
                print(f"{one.picture.path.name}: {said(one)}", file=sys.stderr, flush=True)

    order = {one: i for i, one in enumerate(one for _, unit in units for one in unit)}
    drawn = sorted(gather_object(drawn), key=lambda one: order[one.picture])
    if state.is_main_process:
        by = f" by {state.num_processes} processes" if state.num_processes > 1 else ""
        return finish(name, model + by, settings, drawn, options)
    return int(any(one.error for one in drawn))


def units_of(
    name: str, module: Any, samplers: list[str], options: argparse.Namespace
) -> Iterator[tuple[int, list[Picture]]]:
    """What is drawn in one batch, in the order of drawing, and whose turn it is.

    Always the same batches, whatever is there already and however many processes share them: a picture depends on its
    batch by the rounding. A sampler that chooses its steps by their error would choose them for all of a batch;
    and ComfyUI's noise is one stream for a batch.
    """
    prompts = options.prompts or [options.prompt]
    seeds = range(options.seed, options.seed + options.seeds)
    places = []
    for number, prompt in enumerate(prompts, 1):
        for seed in seeds:
            tags = [f"{number:03}"] * (options.prompts is not None) + [f"seed{seed}"] * (len(seeds) > 1)
            places.append(("-".join([name, *tags]), prompt, seed))
    for block, first in enumerate(range(0, len(places), options.batch)):
        for number, sampler in enumerate(samplers):
            pictures = [
                Picture(place, prompt, seed, sampler, options.output / f"{place}-sample_{sampler}.png")
                for place, prompt, seed in places[first : first + options.batch]
            ]
            alone = options.comfy or "rtol" in inspect.signature(module.find_sampler(sampler)).parameters
            for unit in [[one] for one in pictures] if alone else [pictures]:
                yield number + block, unit  # plus block: a slow sampler is not always the same process's


# --- before anything runs --------------------------------------------------------------------------------------------


def _check_names(module: Any, options: argparse.Namespace) -> list[str]:
    """The samplers to draw, without `sample_`, each once; with --comfy all of ComfyUI's by default."""
    schedules = [*SCHEDULERS] if options.comfy else [*module.SCHEDULES, *SCHEDULERS, "scheduler"]
    known = list(SAMPLERS) if options.comfy else module.sampler_names()
    samplers = [name.removeprefix("sample_") for name in options.samplers or known]
    for flag, names, of in (("samplers", samplers, known), ("schedule", [options.schedule or "scheduler"], schedules)):
        for name in names:
            if name not in of:
                raise Refused(f"--{flag}: {unknown(name, dict.fromkeys(of))}")
    return list(dict.fromkeys(samplers))


def _that_run(pipe: Any, samplers: list[str], settings: dict[str, str]) -> list[str]:
    """Those of ComfyUI's samplers that this machine has and that these settings allow. One line tells of the others."""
    guided = float(settings.get("true_cfg", settings["guidance"])) > 1
    runs, why = [], set[str]()
    for name in samplers:
        try:
            if not guided and "_cfg_pp" in name:
                raise ImportError("those with cfg_pp need guidance above 1")
            _of_comfy(pipe, {**settings, "sampler": name})
            runs.append(name)
        except ImportError as error:
            why.add(str(error).split(", and ", 1)[-1])
        except ValueError as error:
            raise Refused(str(error)) from None
    if why:
        print(f"{len(samplers) - len(runs)} of ComfyUI's samplers are left out: {'; '.join(sorted(why))}.")
    return runs


def _settings(family: Family, pipe: Any, model: str, options: argparse.Namespace) -> dict[str, str]:
    """What a picture depends on beside its sampler, as text for the PNG. `sigmas` are t on FLUX."""
    import diffusers
    import torch

    flux = family.name == "flux"
    distilled = flux and not pipe.transformer.config.guidance_embeds
    steps = options.steps or (4 if distilled else family.steps)
    width, height = size_of(family, pipe, options)
    try:
        if options.schedule in SCHEDULERS and (options.comfy or options.schedule not in PLAIN):
            sigmas = levels(pipe, options.schedule, steps, width=width, height=height)
        elif flux:
            tokens = (height // (2 * pipe.vae_scale_factor)) * (width // (2 * pipe.vae_scale_factor))
            sigmas = pipe.noise_levels(tokens, steps, schedule=options.schedule)
        else:
            sigmas = pipe.noise_levels(steps, schedule=options.schedule)
    except ValueError as error:
        raise Refused(str(error)) from None
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt or "",
        "model": model,
        "steps": str(steps),
        "schedule": options.schedule or "scheduler",
        "sigmas": json.dumps([round(sigma, 6) for sigma in sigmas.tolist()]),
        "guidance": str(options.guidance),
        **({"true_cfg": str(1.0 if options.negative_prompt is None else options.true_cfg)} if flux else {}),
        "seed": str(options.seed),
        "comfy": COMFY if options.comfy else "False",
        "size": f"{width}x{height}",
        "dtype": str((pipe.transformer if flux else pipe.unet).dtype).removeprefix("torch."),
        "versions": json.dumps(
            {"diffusers": diffusers.__version__, "torch": torch.__version__, **_k_diffusion_version()}
        ),
    }


def _levels_of(pipe: Any, settings: dict[str, str], sampler: str) -> str:
    """ComfyUI's levels for a sampler: some take another number of them."""
    width, height = map(int, settings["size"].split("x"))
    of_node = levels(
        pipe, settings["schedule"], int(settings["steps"]), width=width, height=height, sampler_name=sampler
    )
    return json.dumps([round(sigma, 6) for sigma in of_node.tolist()])


def _sampler_options(module: Any, sampler: str) -> str:
    """The options that the sampler runs with, its defaults, as JSON."""
    if sampler not in module.sampler_names():  # ComfyUI's own
        return "{}"
    parameters = inspect.signature(module.find_sampler(sampler)).parameters.values()
    return json.dumps({p.name: p.default for p in parameters if p.name not in module.GIVEN | {"noise_sampler"}})


def _k_diffusion_version() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    with contextlib.suppress(PackageNotFoundError):
        return {"k-diffusion": version("k-diffusion")}
    return {}


# --- drawing ---------------------------------------------------------------------------------------------------------


def _encode_all(
    family: Family, pipe: Any, unit: list[Picture], encoded: dict[str, dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """The arguments that carry the unit's prompts. The last few stay in `encoded`, since all samplers draw them."""
    import torch

    for prompt in dict.fromkeys(one.prompt for one in unit):
        if prompt not in encoded:
            try:
                encoded[prompt] = encode(family, pipe, prompt, options)
            except Exception as error:
                raise Refused(reason(error)) from error
    each = [encoded[one.prompt] for one in unit]
    for prompt in list(encoded)[: -options.batch]:
        del encoded[prompt]
    tensors = {name for name, value in each[0].items() if isinstance(value, torch.Tensor)}
    return {name: torch.cat([one[name] for one in each]) if name in tensors else each[0][name] for name in each[0]}


def _draw(
    family: Family,
    pipe: Any,
    unit: list[Picture],
    kept: list[Drawn | None],
    prompts: dict[str, Any],
    settings: list[dict[str, str]],
    device: str,
    options: argparse.Namespace,
) -> list[Drawn]:
    """Draws a unit in one batch and writes what is not kept. What fails is told, not raised: the others go on."""
    import torch

    network = pipe.unet if family.name == "sdxl" else pipe.transformer
    drawn = [Drawn(one, None) for one in unit]
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = network.register_forward_pre_hook(count)
    start = time.perf_counter()
    try:
        arguments = (_of_comfy if options.comfy else _plain)(pipe, settings[0])
        if not options.comfy:  # the same noise for every sampler
            arguments["generator"] = [torch.Generator("cpu").manual_seed(one.seed) for one in unit]
        images = pipe(**{"guidance_scale": options.guidance, **prompts, **arguments}, output_type="pt").images
        seconds = (time.perf_counter() - start) / len(unit)
        evaluations = calls // (
            2 if float(settings[0].get("true_cfg", 1)) > 1 else 1
        )  # FLUX calls it once for each prompt
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
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    finally:
        hook.remove()
    return [one for one, there in zip(drawn, kept) if there is None]


def _plain(pipe: Any, settings: dict[str, str]) -> dict[str, Any]:
    """The arguments of a call, but for the prompts and the generators."""
    width, height = map(int, settings["size"].split("x"))
    steps, schedule = int(settings["steps"]), settings["schedule"]
    arguments = {"sampler": settings["sampler"], "num_inference_steps": steps, "width": width, "height": height}
    if schedule in SCHEDULERS and schedule not in PLAIN:
        return arguments | {"schedule": levels(pipe, schedule, steps, width=width, height=height)}
    return arguments | {"schedule": None if schedule == "scheduler" else schedule}


def _of_comfy(pipe: Any, settings: dict[str, str]) -> dict[str, Any]:
    """The arguments of a call that draws what ComfyUI's KSampler draws, but for the prompts."""
    width, height = map(int, settings["size"].split("x"))
    with warnings.catch_warnings(record=True) as told:  # of how far a stand-in is from ComfyUI's own
        warnings.simplefilter("always")
        arguments = ksampler(
            pipe,
            seed=int(settings["seed"]),
            steps=int(settings["steps"]),
            cfg=float(settings.get("true_cfg", settings["guidance"])),
            sampler_name=settings["sampler"],
            scheduler=settings["schedule"],
            width=width,
            height=height,
        )
    for warning in told:
        print(warning.message, file=sys.stderr)
    return arguments


def _kept(picture: Picture, wanted: dict[str, str]) -> Drawn | None:
    """The picture that is there already, whole and with these settings."""
    try:
        found = {"comfy": "False", **(read_settings(picture.path) or {})}  # what plain pictures did not say once
    except ValueError:
        return None
    if {key: found.get(key) for key in wanted} != wanted:
        return None
    return Drawn(picture, picture.path, float(found.get("seconds", 0)), int(found.get("evaluations", 0)), note="kept")
