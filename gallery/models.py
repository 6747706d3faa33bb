"""A model for the scripts: loading, kind, sizes, prompts, and errors in words."""

import json
import math
import re
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from diffusers.utils import logging
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from gallery.options import FLUX, SDXL, Family
from gallery.refused import Refused, refusing


def check_output(folder: Path) -> None:
    """Makes the folder. Raises Refused where nothing can be written to it."""
    with refusing(OSError, text=lambda e: f"can't write to {folder}: {e.strerror}. Name another folder with --output"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a unique name: several processes look at the same time


def device_of(options: Namespace) -> str:
    """The device to draw on. Raises Refused where this machine has no device of that name."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = options.device or default
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise Refused(f"--device: no {device} on this machine ({why}); without it, {default} is used") from None
    if torch.device(device).type == "cpu" and options.offload in ("model", "sequential"):
        raise Refused(f"--offload {options.offload}: there is no GPU to load the model to in parts; leave it out")
    return device


def load(family: Family, module: Any, model: str, device: str, options: Namespace) -> Any:
    """The pipeline on its device, from the demo folder, a folder, a .safetensors file or the hub."""
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    dtype = getattr(torch, options.dtype or ("float32" if torch.device(device).type == "cpu" else family.dtype))
    pipeline = getattr(module, family.pipeline)
    source = str(family.demo) if model == "demo" else model
    single = source.endswith((".safetensors", ".ckpt"))
    (_check_file if single else _check_kind)(family, source)
    try:
        if single:
            pipe = pipeline.from_single_file(source, torch_dtype=dtype)
        else:  # for float16 the hub's files of float16, if there are any: half as much to download
            half = "fp16" if dtype == torch.float16 and not Path(source).is_dir() else None
            try:
                pipe = pipeline.from_pretrained(source, dtype=dtype, variant=half)
            except ValueError as error:
                if "variant=fp16" not in str(error):
                    raise
                pipe = pipeline.from_pretrained(source, dtype=dtype)
        offload = offload_of(family, pipe, device, options)
        moves = {"model": pipe.enable_model_cpu_offload, "sequential": pipe.enable_sequential_cpu_offload}
        moves.get(offload, pipe.to)(device=device)
    except Exception as error:
        if not single:
            _check_kind(family, source)  # again: now the index of a model of the hub is here
            _check_parts(source)
        elif _names(error) & OFFLINE:
            hub = f"{source} is read with the configuration of {family.hub_model}"
            raise Refused(f"--model: {hub}, which is not on this machine, and the hub can't be reached") from error
        why = reason(error, source)
        raise Refused(why if source in why or "memory" in why else f"--model: {source}: {why}") from error
    pipe.set_progress_bar_config(position=1, leave=False, disable=not sys.stderr.isatty())
    return pipe


def _check_kind(family: Family, source: str) -> None:
    """Refuses a model of another family, by its index if that is on this machine, and a path that is no model."""
    if Path(source).is_file():
        raise Refused(f"--model: {source} is a file, but neither a .safetensors nor a .ckpt")
    index = _index_of(source)
    if index is None:
        return  # loading the model fails with the reason
    if not index.is_file():
        raise Refused(f"--model: {source} has no model_index.json, so it is no folder of a diffusers pipeline")
    kind = _read_json(index).get("_class_name")
    if not isinstance(kind, str):
        raise Refused(f"--model: {index} names no _class_name, so it is no index of a diffusers pipeline")
    for other in (SDXL, FLUX):
        if kind == other.stock != family.stock:
            scripts = f"{other.script} draws it, compare.py takes it with --family {other.name}"
            raise Refused(f"--model: {source} is a model of {other.name.upper()}: {scripts}")
    if kind in dir(diffusers) and family.stock.removesuffix("Pipeline") not in kind:
        raise Refused(f"--model: {source} is a model of {kind}, not of {family.stock}")


def _index_of(source: str) -> Path | None:
    """The model_index.json of a folder, or of a model of the hub that is on this machine."""
    if Path(source).is_dir():
        return Path(source, "model_index.json")
    try:
        cached = try_to_load_from_cache(source, "model_index.json")
    except ValueError:  # not a name that the hub allows
        return None
    return Path(cached) if isinstance(cached, str) else None


def _check_file(family: Family, source: str) -> None:
    """Refuses a file that is not a checkpoint of the family, by the names of its tensors."""
    if not Path(source).is_file():
        raise Refused(f"--model: there is no file {source}")
    tensors = _tensors(Path(source))
    if any(re.search(r"lora_(up|down|A|B|unet|te)|\.lora\.|hada_w1|lokr_w", name) for name in tensors):
        example = f'pipe.load_lora_weights("{source}")'
        raise Refused(f"--model: {source} is a LoRA, which is loaded on top of a model: in Python, {example}")
    try:
        kind = infer_diffusers_model_type(tensors)
    except Exception:
        kind = "v1"
    unets = ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight")
    if kind == "v1" and unets[0] not in tensors:  # diffusers' answer for unknown tensors
        some = ", ".join(sorted(tensors)[:2]) or "none"
        raise Refused(f"--model: {source} is no checkpoint of {family.name.upper()}; its tensors are {some}, ...")
    if kind == "v1" and unets[1] in tensors:
        raise Refused(f"--model: {source} has the UNet of an SDXL model alone; give the whole checkpoint")
    kind = {"v1": "Stable Diffusion 1", "v2": "Stable Diffusion 2"}.get(kind, kind)
    found = {"xl_base": SDXL, "playground-v2-5": SDXL, "flux-dev": FLUX, "flux-schnell": FLUX}.get(kind)
    if found is not family:
        draws = f"; {found.script} draws it" if found else ""
        what = found.name.upper() if found else f"another architecture, {kind}"
        raise Refused(f"--model: {source} is a checkpoint of {what}, not of {family.name.upper()}{draws}")


def _check_parts(source: str) -> None:
    """Refuses a folder, or the hub's copy of one, with a broken JSON or .safetensors file, and names the file."""
    index = _index_of(source)
    for path in sorted(index.parent.glob("**/*")) if index and index.is_file() else ():
        if path.name in ("model_index.json", "config.json", "scheduler_config.json"):
            _read_json(path)
        elif path.suffix == ".safetensors":
            _tensors(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused(f"--model: {path} is no JSON, or cut off: {error}") from None
    except OSError as error:
        raise Refused(f"--model: can't read {path}: {error.strerror}") from None
    if not isinstance(value, dict):
        raise Refused(f"--model: {path} has a JSON {type(value).__name__} where a model has an object of settings")
    return value


def _tensors(path: Path) -> dict[str, Any]:
    """The tensors of a .safetensors file by its header, or of a .ckpt, on the meta device without values."""
    if path.suffix == ".ckpt":
        with refusing(
            Exception, text=lambda e: f"--model: {path} is no .ckpt of tensors, or cut off ({type(e).__name__})"
        ):
            found = torch.load(path, map_location="meta", weights_only=True)
            return found.get("state_dict", found)
    cut = f"--model: {path} is no .safetensors file, or is cut off"
    with (
        refusing(SafetensorError, text=lambda e: f"{cut} ({e}); copy or download it again"),
        safe_open(path, "pt") as f,
    ):
        return {name: torch.empty(f.get_slice(name).get_shape(), device="meta") for name in f.keys()}


def size_of(family: Family, pipe: Any, options: Namespace) -> tuple[int, int]:
    """Width and height to draw, in pixels: by default the model's own."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor if family is SDXL else pipe.vae.config.sample_size
    return options.width or side, options.height or side


def free_memory(device: str) -> int | None:
    """Free bytes on a CUDA device; None on other devices."""
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else None


def needed_memory(family: Family, pipe: Any, options: Namespace) -> int:
    """Bytes of the weights and of the largest work beside them: four feature maps of the VAE's decoder.

    They have the picture's size and the channels of the last but one block. The profiler counts 3.76 for SDXL.
    """
    parts = [part for part in pipe.components.values() if hasattr(part, "parameters")]
    weights = sum(tensor.nbytes for part in parts for tensor in part.parameters())
    pixels = getattr(options, "batch", 1) * math.prod(size_of(family, pipe, options))
    itemsize = 4 if pipe.vae.config.force_upcast else pipe.vae.dtype.itemsize
    return weights + 4 * pixels * pipe.vae.config.block_out_channels[:2][-1] * itemsize


def offload_of(family: Family, pipe: Any, device: str, options: Namespace) -> str:
    """Where the model is kept: as --offload says, or for "auto" by the free memory of a CUDA device."""
    if options.offload != "auto":
        return options.offload
    free, needed = free_memory(device), needed_memory(family, pipe, options)
    if free is None or needed <= free:
        return "none"
    have, want = (math.floor(free / 1e8) / 10, math.ceil(needed / 1e8) / 10)
    print(f"{device} has {have} GB free, the model and its work need {want} GB: --offload model.", file=sys.stderr)
    return "model"


OFFLINE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "ConnectTimeout"}


def reason(error: BaseException, source: str = "") -> str:
    """One line for a person: what went wrong and what to do."""
    seen, text = _names(error), " ".join(str(error).split())
    if "OutOfMemoryError" in seen or "out of memory" in text.lower():
        return "out of GPU memory: try --offload model, then --offload sequential, or a smaller --width and --height"
    if "GatedRepoError" in seen or "gated" in text.lower():
        return f"{source} is gated: accept its licence on its hub page, then `hf auth login` (or set HF_TOKEN)"
    if seen & OFFLINE:
        return f"{source} is not on this machine and the hub can't be reached: check the network, or use --model demo"
    if "RepositoryNotFoundError" in seen or re.search("not a valid model identifier|neither a valid local path", text):
        return (
            f"--model: {source} is neither a folder here nor a model on the hub (a private one needs `hf auth login`)"
        )
    return f"{type(error).__name__}: {text[:400]}"


def _names(error: BaseException | None) -> set[str]:
    """The classes of an error and of its causes."""
    return {type(error).__name__} | _names(error.__cause__ or error.__context__) if error else set()


def short_name(family: Family, model: str) -> str:
    """The beginning of the files' names: sdxl, flux-dev, flux-schnell, sdxl-demo, or the family and the model."""
    if model == "demo":
        return f"{family.name}-demo"
    last = re.sub(r"\.(safetensors|ckpt)$", "", model.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1])
    known = {"stable-diffusion-xl-base-1.0": "sdxl", "FLUX.1-dev": "flux-dev", "FLUX.1-schnell": "flux-schnell"}
    slug = re.sub(r"[^a-z0-9]+", "-", known.get(last, last).lower()).strip("-")
    return slug if slug.startswith(family.name) else f"{family.name}-{slug}"


@torch.no_grad()
def encode(family: Family, pipe: Any, text: str, options: Namespace, length: int | None = None) -> dict[str, Any]:
    """The arguments with one prompt, encoded once for all samplers; FLUX's have `length` tokens."""
    if family is SDXL:
        # ComfyUI encodes an empty negative prompt; diffusers uses zeros in its place
        negative = options.negative_prompt or ("" if options.comfy else None)
        embeds = pipe.encode_prompt(text, negative_prompt=negative, do_classifier_free_guidance=options.guidance > 1)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, embeds))
    length = length or (512 if pipe.transformer.config.guidance_embeds else 256)  # schnell was trained with 256
    prompt_embeds, pooled, _ = pipe.encode_prompt(text, max_sequence_length=length)
    encoded = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}
    if options.negative_prompt is not None:
        negative, pooled, _ = pipe.encode_prompt(options.negative_prompt, max_sequence_length=length)
        encoded |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": pooled}
        encoded["true_cfg_scale"] = options.true_cfg
    return encoded
