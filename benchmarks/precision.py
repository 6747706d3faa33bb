"""The distance of half-precision networks' final latents from float64, in the stock loop and in ours.

    uv run benchmarks/precision.py                      # on a CPU
    uv run benchmarks/precision.py --device cuda

Each loop is compared with its own run in float64, with the same (rounded) weights, embeddings, noise levels, initial
noise and step noise. The distance is therefore the rounding of the network and of the loop. It varies much between
images. The table has geometric means over the images, and the standard error of ours / stock.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from statistics import fmean, stdev
from typing import Any
from unittest.mock import patch

import torch
from models import DTYPES, SDXL_SCHEDULERS, Bench, demo, function, positive, where


def float32_noise(seed: int) -> Callable[..., torch.Tensor]:
    """A `randn_tensor` whose numbers do not depend on the requested dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: Any, *_: Any, dtype: torch.dtype | None = None, device: Any = None, **__: Any) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=generator).to(device, dtype or torch.float32)

    return draw


def path_noise(bench: Bench, seed: int, shape: torch.Size, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """This project's Brownian step noise, with the same numbers for every dtype and device."""
    x = torch.empty(shape, device=bench.network.device)
    path = sys.modules[type(bench.ours).__module__].brownian_noise(x, range(seed, seed + shape[0]), "cpu")
    return lambda sigma, sigma_next: path(sigma, sigma_next).to(dtype)


@contextlib.contextmanager
def stock_noise(bench: Bench, scheduler: Any, seed: int) -> Iterator[None]:
    """The scheduler's own step noise, with the same numbers for every dtype. Our Brownian path replaces its tree."""
    module = importlib.import_module(type(scheduler).__module__)
    with contextlib.ExitStack() as stack:
        if hasattr(module, "randn_tensor"):
            stack.enter_context(patch.object(module, "randn_tensor", float32_noise(seed)))
        if hasattr(module, "BrownianTreeNoiseSampler"):

            def tree(x: torch.Tensor, *_: Any) -> Callable[..., torch.Tensor]:
                return path_noise(bench, seed, x.shape, x.dtype)

            stack.enter_context(patch.object(module, "BrownianTreeNoiseSampler", tree))
        yield


def our_noise(bench: Bench, sampler: str, seed: int, shape: torch.Size) -> dict[str, Any]:
    """`sampler_kwargs` with the sampler's usual step noise, with the same numbers for every dtype."""
    if "noise_sampler" not in inspect.signature(function(sampler)).parameters:
        return {}
    state = torch.promote_types(bench.network.dtype, torch.float32)
    if sampler.endswith("_sde"):
        return {"noise_sampler": path_noise(bench, seed, shape, state)}
    draw = float32_noise(seed)
    return {"noise_sampler": lambda sigma, sigma_next: draw(shape, dtype=state, device=bench.network.device)}


def latents(bench: Bench, loop: str, sampler: str, steps: int, seed: int, noise: torch.Tensor) -> torch.Tensor:
    noise = noise.to(bench.network.dtype)
    if loop == "ours":
        options = our_noise(bench, sampler, seed, noise.shape)
        scheduler, bench.ours.scheduler = bench.ours.scheduler, bench.scheduler_of(sampler)  # the stock loop's levels
        try:
            return bench.call(bench.ours, steps, sampler=sampler, sampler_kwargs=options, latents=noise).double()
        finally:
            bench.ours.scheduler = scheduler
    call = bench.stock_with(sampler)
    with stock_noise(bench, bench.scheduler_of(sampler), seed):
        return call(steps, latents=noise).double()


def distances(
    name: str, dtype: torch.dtype, samplers: list[str], steps: int, images: int, batch: int, size: int, device: str
) -> Iterator[tuple[str, list[float], list[float]]]:
    """(sampler, stock, ours): relative distance of each image's latents from their float64 run, on the same device."""
    half, truth = demo(name, dtype, device), demo(name, dtype, device)
    truth.ours.to(dtype=torch.float64)
    for bench in (half, truth):
        to = bench.network.dtype
        bench.arguments = {
            key: value.to(dtype).to(to) if isinstance(value, torch.Tensor) else value
            for key, value in bench.arguments.items()
        } | {"height": size, "width": size, "num_images_per_prompt": batch}
    pixels = size // half.ours.vae_scale_factor
    shape = (batch, 4, pixels, pixels) if name == "sdxl" else (batch, pixels**2 // 4, half.network.config.in_channels)
    for sampler in samplers:
        if sampler not in half.schedulers:
            continue
        found: dict[str, list[float]] = {"stock": [], "ours": []}
        for seed in range(0, images, batch):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            for loop in found:
                exact, rounded = (latents(bench, loop, sampler, steps, seed, noise) for bench in (truth, half))
                errors = (rounded - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
                found[loop].extend(errors.tolist())
        yield sampler, found["stock"], found["ours"]


def compared(stock: list[float], ours: list[float]) -> tuple[float, float, float, float]:
    """Geometric means of both and of ours / stock, and the standard error of the latter."""
    logs = [math.log(one / other) for one, other in zip(ours, stock)]
    ratio = math.exp(fmean(logs))
    means = (math.exp(fmean(map(math.log, values))) for values in (stock, ours))
    return *means, ratio, ratio * stdev(logs) / math.sqrt(len(logs))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=("sdxl", "flux"), default=["sdxl", "flux"])
    add("--dtypes", nargs="+", choices=DTYPES, default=["float16", "bfloat16"])
    names = list(SDXL_SCHEDULERS)
    add("--samplers", nargs="+", choices=names, default=names, help="with a counterpart in diffusers (default: all)")
    add("--steps", type=positive, default=20)
    add("--images", type=positive, default=64, help="for each sampler (default: %(default)s)")
    add("--batch", type=positive, default=16, help="images drawn at once (default: %(default)s)")
    add("--size", type=positive, default=64, help="pixels (default: %(default)s)")
    add("--device", default="cpu", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.images % options.batch or options.images < 2:
        parser.error(f"argument --images: has to be a multiple of --batch, at least 2, but is {options.images}")
    print(f"{where(options.device)}; {options.size} pixels, {options.steps} steps, {options.images} images")
    for name in options.models:
        for dtype in options.dtypes:
            print(f"\n### {name}, {dtype} network: relative distance from float64, geometric means\n")
            print("| sampler | stock loop | ours | ratio (standard error) |\n|---|---|---|---|")
            of_model = (options.samplers, options.steps, options.images, options.batch, options.size, options.device)
            for sampler, stock, ours in distances(name, DTYPES[dtype], *of_model):
                stock_loop, our_loop, ratio, error = compared(stock, ours)
                print(f"| {sampler} | {stock_loop:.2e} | {our_loop:.2e} | {ratio:.2f} ({error:.2f}) |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
