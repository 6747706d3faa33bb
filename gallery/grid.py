"""The grid: one model, one prompt, one noise, every sampler."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gallery.options import Family
from gallery.pictures import contact_sheet, read_settings, write_png


class Refused(Exception):
    """Something that the user can mend. Its message is the one line to show."""


@dataclass
class Drawn:
    """What became of one sampler: its file, or why there is none."""

    sampler: str
    path: Path | None
    seconds: float = 0.0
    evaluations: int = 0
    note: str = ""
    error: str = ""


def run(family: Family, options: argparse.Namespace) -> int:
    """Draws the grid. Exit status: 0 if all was drawn, 1 if some sampler failed, 2 if nothing could start."""
    try:
        return _run(family, options)
    except Refused as refused:
        print(f"{Path(sys.argv[0]).name}: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130


def _run(family: Family, options: argparse.Namespace) -> int:
    _check_output(options.output)
    try:
        module = importlib.import_module(family.module)
    except ImportError as error:
        raise Refused(str(error)) from error
    samplers = _check_names(module, options)

    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    try:
        torch.device(options.device or "cpu")
    except RuntimeError as error:
        raise Refused(f"--device: {str(error).splitlines()[0]}") from None
    model = options.model or (family.hub_model if torch.cuda.is_available() else "demo")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    state = PartialState(cpu=torch.device(device).type == "cpu")
    if state.num_processes > 1 and torch.device(device).index is None:
        device = str(state.device)
    if options.model is None and model == "demo" and state.is_main_process:
        print(f"No CUDA device here: drawing with the small demo model, demo/{family.name}.")

    pipe = _load(family, module, model, device, options)
    name = _short_name(family, model)
    settings = _settings(family, pipe, model, options)
    try:
        prompt = _encode(family, pipe, options)
    except Exception as error:
        raise Refused(_reason(error)) from error
    files = {sampler: options.output / f"{name}-sample_{sampler}.png" for sampler in samplers}

    drawn = []
    mine = samplers[state.process_index :: state.num_processes]
    with tqdm(mine, desc=f"{name} grid", position=0, disable=not state.is_main_process) as bar:
        for sampler in bar:
            bar.set_postfix_str(sampler)
            wanted = {**settings, "sampler": sampler, "sampler_options": _sampler_options(module, sampler)}
            if options.resume and (found := read_settings(files[sampler])):
                if {key: found.get(key) for key in wanted} == wanted:
                    drawn.append(_from_settings(sampler, files[sampler], found))
                    continue
            drawn.append(_draw(family, pipe, sampler, prompt, wanted, files[sampler], device, options))

    drawn = sorted(gather_object(drawn), key=lambda one: samplers.index(one.sampler))
    if state.is_main_process:
        _finish(name, model, settings, drawn, options)
    return int(any(one.error for one in drawn))


# --- before anything runs --------------------------------------------------------------------------------------------


def _check_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Refused(f"can't write to {folder}: {error.strerror}. Name another folder with --output") from None


def _check_names(module: Any, options: argparse.Namespace) -> list[str]:
    """The samplers to draw, without `sample_`, each once."""
    try:
        for sampler in options.samplers or []:
            module.find_sampler(sampler)
        module.check_schedule(options.schedule)
    except ValueError as error:
        raise Refused(str(error).replace("`sampler`", "--samplers").replace("`schedule`", "--schedule")) from None
    return list(
        dict.fromkeys(sampler.removeprefix("sample_") for sampler in options.samplers or module.sampler_names())
    )


def _load(family: Family, module: Any, model: str, device: str, options: argparse.Namespace) -> Any:
    """The pipeline on its device, from the demo folder, a folder, a .safetensors file or the hub."""
    import torch
    from diffusers.utils import logging

    logging.set_verbosity_error()
    dtype = getattr(torch, options.dtype or ("float32" if torch.device(device).type == "cpu" else family.dtype))
    pipeline = getattr(module, family.pipeline)
    source = str(family.demo) if model == "demo" else model
    try:
        if source.endswith((".safetensors", ".ckpt")):
            if not Path(source).is_file():
                raise Refused(f"--model: there is no file {source}")
            pipe = pipeline.from_single_file(source, torch_dtype=dtype)
        else:
            pipe = pipeline.from_pretrained(source, dtype=dtype)
        if options.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif options.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.to(device)
    except Refused:
        raise
    except Exception as error:
        raise Refused(_reason(error, source)) from error
    pipe.set_progress_bar_config(position=1, leave=False)
    return pipe


def _reason(error: BaseException, source: str = "") -> str:
    """One line for a person: what went wrong and what to do."""
    chain, seen = error, []
    while chain is not None:
        seen.append(type(chain).__name__)
        chain = chain.__cause__ or chain.__context__
    text = " ".join(str(error).split())
    if "OutOfMemoryError" in seen or "out of memory" in text.lower():
        return "out of GPU memory: try --offload model, then --offload sequential, or a smaller --width and --height"
    if "GatedRepoError" in seen or "gated" in text.lower():
        return f"{source} is gated: accept its licence on its hub page, then `hf auth login` (or set HF_TOKEN)"
    if {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "ConnectTimeout"} & set(
        seen
    ):
        return f"{source} is not on this machine and the hub can't be reached: check the network, or use --model demo"
    if "RepositoryNotFoundError" in seen or "not a valid model identifier" in text:
        return (
            f"--model: {source} is neither a folder here nor a model on the hub (a private one needs `hf auth login`)"
        )
    return f"{type(error).__name__}: {text[:400]}"


def _short_name(family: Family, model: str) -> str:
    """What the files begin with: sdxl, flux-dev, flux-schnell, sdxl-demo, or the family and the model's own name."""
    if model == "demo":
        return f"{family.name}-demo"
    last = re.sub(r"\.(safetensors|ckpt)$", "", model.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1])
    last = {"stable-diffusion-xl-base-1.0": "sdxl", "FLUX.1-dev": "flux-dev", "FLUX.1-schnell": "flux-schnell"}.get(
        last, last
    )
    slug = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")
    return slug if slug.startswith(family.name) else f"{family.name}-{slug}"


def _settings(family: Family, pipe: Any, model: str, options: argparse.Namespace) -> dict[str, str]:
    """What a picture depends on beside its sampler, as text for the PNG. `sigmas` are t on FLUX."""
    import diffusers
    import torch

    flux = family.name == "flux"
    distilled = flux and not pipe.transformer.config.guidance_embeds
    steps = options.steps or (4 if distilled else family.steps)
    native = pipe.vae.config.sample_size if flux else pipe.unet.config.sample_size * pipe.vae_scale_factor
    width, height = options.width or native, options.height or native
    try:
        if flux:
            tokens = (height // (2 * pipe.vae_scale_factor)) * (width // (2 * pipe.vae_scale_factor))
            sigmas = pipe.noise_levels(tokens, steps, schedule=options.schedule)
        else:
            sigmas = pipe.noise_levels(steps, schedule=options.schedule)[0]
        pipe.check_inputs(options.prompt, None, height, width, *(() if flux else (None,)))
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
        **({"true_cfg": str(options.true_cfg)} if flux and options.negative_prompt else {}),
        "seed": str(options.seed),
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


def _encode(family: Family, pipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that carry the prompt, encoded once for the whole grid."""
    import torch

    with torch.no_grad():
        if family.name == "sdxl":
            names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
            embeds = pipe.encode_prompt(
                options.prompt,
                negative_prompt=options.negative_prompt,
                do_classifier_free_guidance=options.guidance > 1,
            )
            return dict(zip(names, embeds))
        length = 512 if pipe.transformer.config.guidance_embeds else 256  # schnell was trained with 256
        prompt_embeds, pooled, _ = pipe.encode_prompt(options.prompt, max_sequence_length=length)
        encoded = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}
        if options.negative_prompt:
            negative, pooled, _ = pipe.encode_prompt(options.negative_prompt, max_sequence_length=length)
            encoded |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": pooled}
            encoded["true_cfg_scale"] = options.true_cfg
        return encoded


def _draw(
    family: Family,
    pipe: Any,
    sampler: str,
    prompt: dict[str, Any],
    settings: dict[str, str],
    path: Path,
    device: str,
    options: argparse.Namespace,
) -> Drawn:
    """Draws and writes one picture. What fails is told, not raised, so that the others go on."""
    import torch

    network = pipe.unet if family.name == "sdxl" else pipe.transformer
    drawn = Drawn(sampler, None)

    def count(*_: Any) -> None:
        drawn.evaluations += 1

    hook = network.register_forward_pre_hook(count)
    width, height = (int(side) for side in settings["size"].split("x"))
    start = time.perf_counter()
    try:
        image = pipe(
            **prompt,
            sampler=sampler,
            schedule=options.schedule,
            num_inference_steps=int(settings["steps"]),
            guidance_scale=options.guidance,
            width=width,
            height=height,
            generator=torch.Generator("cpu").manual_seed(options.seed),  # the same noise for every sampler
        ).images[0]
        drawn.seconds = time.perf_counter() - start
        written = {**settings, "evaluations": str(drawn.evaluations), "seconds": f"{drawn.seconds:.1f}"}
        write_png(image, path, written)
        drawn.path = path
    except Exception as error:
        drawn.error = _reason(error)
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    finally:
        hook.remove()
    return drawn


def _from_settings(sampler: str, path: Path, found: dict[str, str]) -> Drawn:
    return Drawn(sampler, path, float(found.get("seconds", 0)), int(found.get("evaluations", 0)), note="kept")


def _finish(name: str, model: str, settings: dict[str, str], drawn: list[Drawn], options: argparse.Namespace) -> None:
    """The contact sheet and the table."""
    title = [
        f"{name}: {len(drawn)} samplers of k-diffusion, {settings['steps']} steps, {settings['schedule']} noise levels,"
        f" guidance {settings['guidance']}, seed {settings['seed']}",
        options.prompt + (f"   (not: {options.negative_prompt})" if options.negative_prompt else ""),
    ]
    entries = [
        (one.sampler, one.error or f"{one.evaluations} evaluations, {one.seconds:.1f} s", one.path) for one in drawn
    ]
    sheet = options.output / f"{name}-grid.png"
    write_png(contact_sheet(title, entries), sheet, settings)
    print(f"\n{'sampler':20}{'evaluations':>12}{'seconds':>10}  picture")
    for one in drawn:
        note = f" ({one.note})" if one.note else ""
        print(f"{one.sampler:20}{one.evaluations:12}{one.seconds:10.1f}  {one.path or 'FAILED: ' + one.error}{note}")
    failed = sum(bool(one.error) for one in drawn)
    print(f"{len(drawn) - failed} of {len(drawn)} drawn with {model}, side by side in {sheet}")
