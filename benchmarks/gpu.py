"""A picture on the real architectures with random weights, in half precision: on the GPU, and in each offload mode.

    uv run benchmarks/gpu.py                                # 1024x1024; FLUX needs 30 GB of GPU memory
    uv run benchmarks/gpu.py --device cpu --size demo       # the demo models, to try the script

The weights are normal with a standard deviation of 0.02, the biases are zero, and the norms' weights are one. The
activations then stay in float16's range. The pictures mean nothing. The exit status is 1 if a picture is not finite or
if an offloaded pipeline draws another picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from models import DTYPES, Bench, build, built, where

OFFLOAD: dict[str, Callable[[Any, str], object]] = {
    "on the device": lambda pipe, device: None,
    "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "sequential": lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
    "group": lambda pipe, device: pipe.enable_group_offload(torch.device(device), offload_type="leaf_level"),
}
VAE: dict[str, Any] = {"sample_size": 1024, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
FLUX_VAE = {"latent_channels": 16, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
VAE_CONFIGS = {"sdxl": {**VAE, "scaling_factor": 0.13025}, "flux": {**VAE, **FLUX_VAE, "scaling_factor": 0.3611}}
CLOSE = 1e-3  # the same kernels on the same weights


def offloaded(bench: Bench, device: str) -> bool:
    """A model's rows: the distance of each picture from the picture without offloading, and the memory."""
    cuda, fine, expected = torch.device(device).type == "cuda", True, None
    for mode, offload in OFFLOAD.items():
        if mode == "sequential" and not cuda:  # accelerate can't do this on a CPU
            continue
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            bench.ours.remove_all_hooks()
            offload(bench.ours, device)
            picture = bench.call(bench.ours, 2, sampler="euler", output_type="pt").float().cpu()
            expected = picture if expected is None else expected
            distance = ((picture - expected).norm() / expected.norm()).item()
            fine &= distance < CLOSE  # NaN is not
            cells = f"{distance:.1e} | {picture.mean():.2f}, {picture.std():.2f}"
        except Exception as error:  # the other modes still run
            fine, cells = False, repr(error)[:200].replace("|", "/") + " | none"
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if cuda else "none"
        print(f"| {bench.name}, {bench.network.dtype}, {mode} | {cells} | {peak} |".replace("torch.", ""), flush=True)
    return fine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("sdxl", "flux"), default=["sdxl", "flux"])
    parser.add_argument("--size", choices=("demo", "full"), default="full")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    print(f"{options.size} models on {where(options.device)}; euler, 2 steps\n")
    print("| model | relative distance from on the device | mean, standard deviation | GiB |\n|---|---|---|---|")
    fine = True
    for name in options.models:
        for dtype in ("float16", "bfloat16"):
            with built(name, options.size, options.device, DTYPES[dtype]) as bench:
                if options.size == "full":
                    vae = build(AutoencoderKL, VAE_CONFIGS[name], DTYPES[dtype], options.device)
                    bench.ours.register_modules(vae=vae)
                bench.stock = None
                fine &= offloaded(bench, options.device)
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
