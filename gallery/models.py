"""A model for the scripts: loading it, its kind and sizes, its prompts, and what went wrong in words."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from gallery.options import FLUX, SDXL, Family


class Refused(Exception):
    """Something that the user can mend. Its message is the one line to show."""


def check_output(folder: Path) -> None:
    """Makes the folder. Raises Refused where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of its own: several processes look at the same time
            pass
    except OSError as error:
        raise Refused(f"can't write to {folder}: {error.strerror}. Name another folder with --output") from None


def load(family: Family, module: Any, model: str, device: str, options: argparse.Namespace) -> Any:
    """The pipeline on its device, from the demo folder, a folder, a .safetensors file or the hub."""
    import torch
    from diffusers.utils import logging

    logging.set_verbosity_error()
    dtype = getattr(torch, options.dtype or ("float32" if torch.device(device).type == "cpu" else family.dtype))
    pipeline = getattr(module, family.pipeline)
    source = str(family.demo) if model == "demo" else model
    if options.offload == "sequential" and torch.device(device).type == "cpu":
        raise Refused("--offload sequential: there is no GPU to load the model to, a layer at a time; leave it out")
    try:
        if source.endswith((".safetensors", ".ckpt")):
            if not Path(source).is_file():
                raise Refused(f"--model: there is no file {source}")
            pipe = pipeline.from_single_file(source, torch_dtype=dtype)
        else:
            _check_kind(family, source)
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
        _check_kind(family, source)  # again: a model of the hub has its index here now
        raise Refused(reason(error, source)) from error
    pipe.set_progress_bar_config(position=1, leave=False)
    return pipe


def _check_kind(family: Family, source: str) -> None:
    """Refuses another family's model by its index, if that is on this machine."""
    import diffusers
    from huggingface_hub import try_to_load_from_cache

    try:
        name = "model_index.json"
        index = Path(source, name) if Path(source).is_dir() else try_to_load_from_cache(source, name)
        kind = json.loads(Path(index).read_text(encoding="utf-8"))["_class_name"]  # type: ignore[arg-type]
    except Exception:
        return  # what loads the model says why
    for other in (SDXL, FLUX):
        if kind == other.stock != family.stock:
            scripts = f"{other.script} draws it, compare.py takes it with --family {other.name}"
            raise Refused(f"--model: {source} is a model of {other.name.upper()}: {scripts}")
    if kind in dir(diffusers) and family.stock.removesuffix("Pipeline") not in kind:
        raise Refused(f"--model: {source} is a model of {kind}, not of {family.stock}")


def reason(error: BaseException, source: str = "") -> str:
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


def short_name(family: Family, model: str) -> str:
    """What the files begin with: sdxl, flux-dev, flux-schnell, sdxl-demo, or the family and the model's own name."""
    if model == "demo":
        return f"{family.name}-demo"
    last = re.sub(r"\.(safetensors|ckpt)$", "", model.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1])
    last = {"stable-diffusion-xl-base-1.0": "sdxl", "FLUX.1-dev": "flux-dev", "FLUX.1-schnell": "flux-schnell"}.get(
        last, last
    )
    slug = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")
    return slug if slug.startswith(family.name) else f"{family.name}-{slug}"


def size_of(family: Family, pipe: Any, options: argparse.Namespace) -> tuple[int, int]:
    """Width and height to draw, in pixels: the model's own where none is named."""
    sides = pipe.vae.config.sample_size
    if family is SDXL:
        sides = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return options.width or sides, options.height or sides


def encode(
    family: Family, pipe: Any, text: str, options: argparse.Namespace, length: int | None = None
) -> dict[str, Any]:
    """The arguments that carry one prompt, encoded once for all samplers; FLUX's of `length` tokens."""
    import torch

    with torch.no_grad():
        if family.name == "sdxl":
            names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
            embeds = pipe.encode_prompt(
                text,
                negative_prompt=_negative_prompt(options),
                do_classifier_free_guidance=options.guidance > 1,
            )
            return dict(zip(names, embeds))
        length = length or (512 if pipe.transformer.config.guidance_embeds else 256)  # schnell was trained with 256
        prompt_embeds, pooled, _ = pipe.encode_prompt(text, max_sequence_length=length)
        encoded = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}
        if options.negative_prompt:
            negative, pooled, _ = pipe.encode_prompt(options.negative_prompt, max_sequence_length=length)
            encoded |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": pooled}
            encoded["true_cfg_scale"] = options.true_cfg
        return encoded


def _negative_prompt(options: argparse.Namespace) -> str | None:
    """ComfyUI encodes an empty one; diffusers takes zeros where there is none."""
    return options.negative_prompt or ("" if options.comfy else None)
