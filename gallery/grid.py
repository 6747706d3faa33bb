"""The grid: one model, one prompt, one noise, every sampler."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from gallery.comfy import SKIPPING, comfy_arguments
from gallery.models import Refused, check_output, device_of, encode, load, reason, short_name, size_of
from gallery.options import Family, unknown
from gallery.parameters import write_parameters
from gallery.pictures import contact_sheet, read_settings, write_png
from gallery.start import working

ALIASES = ("ddim", "dpmpp_sde_gpu", "dpmpp_2m_sde_gpu", "dpmpp_3m_sde_gpu")  # names of ComfyUI's for the same samplers
NOT_FINITE = "the picture is not finite: a number overflowed; try a lower --guidance, or --dtype bfloat16 or float32"


@dataclass(frozen=True)
class Picture:
    """One picture to draw. All those of one `place` show one prompt and begin with one noise."""

    place: str
    prompt: str
    seed: int
    sampler: str
    path: Path


@dataclass
class Drawn:
    """What became of one picture: its file, or why there is none."""

    picture: Picture
    path: Path | None
    seconds: float = 0.0
    evaluations: int = 0
    note: str = ""
    error: str = ""


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
    working()
    name = short_name(family, model)
    settings = _settings(family, pipe, model, options)
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
            if options.comfy and sampler in SKIPPING:
                del shared["sigmas"]  # it takes one of them more and leaves one out
            wanted = [{**shared, "prompt": one.prompt, "seed": str(one.seed)} for one in unit]
            kept = [_kept(one, settings) if options.resume else None for one, settings in zip(unit, wanted)]
            drawn += filter(None, kept)
            if not all(kept):
                prompts = _encode_all(family, pipe, unit, encoded, options)
                drawn += _draw(family, pipe, unit, kept, prompts, wanted, device, options)
            bar.update(len(unit))
            for one in () if interactive else drawn[-len(unit) :]:
                print(f"{one.picture.path.name}: {_said(one)}", file=sys.stderr, flush=True)

    order = {one: i for i, one in enumerate(one for _, unit in units for one in unit)}
    drawn = sorted(gather_object(drawn), key=lambda one: order[one.picture])
    if state.is_main_process:
        by = f" by {state.num_processes} processes" if state.num_processes > 1 else ""
        return _finish(name, model + by, settings, drawn, options)
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
    """The samplers to draw, without `sample_`, each once."""
    samplers = [name.removeprefix("sample_") for name in options.samplers or module.sampler_names()]
    for flag, names, known in (
        ("samplers", samplers, [*module.sampler_names(), *ALIASES]),
        ("schedule", [options.schedule or "scheduler"], [*module.SCHEDULES, "scheduler"]),
    ):
        for name in names:
            if name not in known:
                raise Refused(f"--{flag}: {unknown(name, known)}")
    return list(dict.fromkeys(samplers))


def _settings(family: Family, pipe: Any, model: str, options: argparse.Namespace) -> dict[str, str]:
    """What a picture depends on beside its sampler, as text for the PNG. `sigmas` are t on FLUX."""
    import diffusers
    import torch

    flux = family.name == "flux"
    distilled = flux and not pipe.transformer.config.guidance_embeds
    steps = options.steps or (4 if distilled else family.steps)
    width, height = size_of(family, pipe, options)
    try:
        if flux:
            tokens = (height // (2 * pipe.vae_scale_factor)) * (width // (2 * pipe.vae_scale_factor))
            sigmas = pipe.noise_levels(tokens, steps, schedule=options.schedule)
        else:
            sigmas = pipe.noise_levels(steps, schedule=options.schedule)[0]
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
        **({"true_cfg": str(options.true_cfg if options.negative_prompt else 1.0)} if flux else {}),
        "seed": str(options.seed),
        "comfy": str(options.comfy),
        "size": f"{width}x{height}",
        "dtype": str((pipe.transformer if flux else pipe.unet).dtype).removeprefix("torch."),
        "versions": json.dumps(
            {"diffusers": diffusers.__version__, "torch": torch.__version__, **_k_diffusion_version()}
        ),
    }


def _sampler_options(module: Any, sampler: str) -> str:
    """The options that the sampler runs with, its defaults, as JSON."""
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
    sampler, first = unit[0].sampler, settings[0]
    width, height = (int(side) for side in first["size"].split("x"))
    steps = int(first["steps"])
    if options.comfy:
        module = importlib.import_module(family.module)
        arguments = comfy_arguments(sampler, steps, unit[0].seed, module.find_sampler)
        arguments |= {"quantize_timesteps": True} if family.name == "sdxl" else {}
    else:
        arguments = {"sampler": sampler, "num_inference_steps": steps}
        # the same noise for every sampler
        arguments["generator"] = [torch.Generator("cpu").manual_seed(one.seed) for one in unit]
    start = time.perf_counter()
    try:
        images = pipe(
            **prompts,
            **arguments,
            schedule=options.schedule,
            guidance_scale=options.guidance,
            width=width,
            height=height,
            output_type="pt",
        ).images
        seconds = (time.perf_counter() - start) / len(unit)
        evaluations = calls // (2 if float(first.get("true_cfg", 1)) > 1 else 1)  # FLUX calls it once for each prompt
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


def _said(one: Drawn) -> str:
    """What became of a picture, in a few words."""
    return one.error and f"FAILED: {one.error}" or one.note or f"{one.evaluations} evaluations, {one.seconds:.1f} s"


def _kept(picture: Picture, wanted: dict[str, str]) -> Drawn | None:
    """The picture that is there already, whole and with these settings."""
    found = {"comfy": "False", **(read_settings(picture.path) or {})}  # what plain pictures did not say once
    if {key: found.get(key) for key in wanted} != wanted:
        return None
    return Drawn(picture, picture.path, float(found.get("seconds", 0)), int(found.get("evaluations", 0)), note="kept")


def _finish(name: str, model: str, settings: dict[str, str], drawn: list[Drawn], options: argparse.Namespace) -> int:
    """A contact sheet for each prompt and seed, and the table. The exit status: 1 if anything failed."""
    places: dict[str, list[Drawn]] = {}
    for one in drawn:
        places.setdefault(one.picture.place, []).append(one)
    sheets, lost = [], []
    for place, those in places.items():
        path = options.output / f"{place}-grid.png"
        try:
            write_sheet(path, place, settings, those)
            sheets.append(path)
        except OSError as error:
            lost.append(f"FAILED: {path}: {reason(error)}")
    failed = sum(bool(one.error) for one in drawn)
    summary = f"{len(drawn) - failed} of {len(drawn)} drawn with {model}"
    if len(places) == 1:
        print(f"\n{'sampler':20}{'evaluations':>12}{'seconds':>10}  picture")
        for one in drawn:
            note, result = f" ({one.note})" if one.note else "", one.path or "FAILED: " + one.error
            print(f"{one.picture.sampler:20}{one.evaluations:12}{one.seconds:10.1f}  {result}{note}")
        summary += "".join(f", side by side in {path}" for path in sheets)
    else:
        print(f"\n{'sampler':20}{'pictures':>10}{'kept':>6}{'evaluations':>12}{'seconds':>10}")
        for sampler in dict.fromkeys(one.picture.sampler for one in drawn):
            those = [one for one in drawn if one.picture.sampler == sampler and one.path]
            kept, evaluations = sum(bool(one.note) for one in those), sum(one.evaluations for one in those)
            print(f"{sampler:20}{len(those):10}{kept:6}{evaluations:12}{sum(one.seconds for one in those):10.1f}")
        for one in drawn:
            if one.error:
                print(f"FAILED: {one.picture.path}: {one.error}")
        summary += f", {len(sheets)} sheets" + "".join(f" like {path}" for path in sheets[:1])
    print(*lost, summary, sep="\n")
    return int(bool(failed or lost))


def write_sheet(path: Path, place: str, settings: dict[str, str], drawn: list[Drawn]) -> None:
    """All samplers of one prompt and seed side by side, in a file."""
    first = drawn[0].picture
    settings = {**settings, "prompt": first.prompt, "seed": str(first.seed)}
    entries = [
        (one.picture.sampler, one.error or f"{one.evaluations} evaluations, {one.seconds:.1f} s", one.path)
        for one in drawn
    ]
    sheet = contact_sheet(title_of(place, len(drawn), settings), entries)
    write_png(sheet, path, settings, write_parameters(settings))


def title_of(place: str, count: int, settings: dict[str, str]) -> list[str]:
    """What all pictures of a sheet have in common."""
    negative, comfy = settings["negative_prompt"], settings["comfy"] == "True"
    true_cfg = f", true CFG {settings['true_cfg']}" if negative and "true_cfg" in settings else ""
    return [
        f"{place}: {count} samplers of k-diffusion{' as in ComfyUI' * comfy}, {settings['steps']} steps,"
        f" {settings['schedule']} noise levels, guidance {settings['guidance']}{true_cfg}, seed {settings['seed']}",
        settings["prompt"] + (f"   (not: {negative})" if negative else ""),
    ]
