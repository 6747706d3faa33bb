"""How far the final latents of half-precision networks are from float64, in the stock loop and in this one.

    uv run benchmarks/precision.py

Each loop is compared with itself, run in float64 throughout on the same (rounded) weights, embeddings, noise levels,
initial noise and step noise. So the distance is what the arithmetic of the network and of the loop rounds away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from models import Bench, demo, find_sampler, where

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# draws its noise from a tree of its own, in the dtype of the latents
OWN_TREE = ("dpmpp_sde",)


def float32_noise(seed: int) -> Callable[..., torch.Tensor]:
    """A `randn_tensor` whose numbers do not depend on the dtype that is asked for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=generator).to(dtype or torch.float32)

    return draw


@contextlib.contextmanager
def stock_noise(scheduler: Any, seed: int) -> Iterator[None]:
    """The scheduler's own step noise, with the same numbers for every dtype."""
    module = importlib.import_module(type(scheduler).__module__)
    with (
        patch.object(module, "randn_tensor", float32_noise(seed))
        if hasattr(module, "randn_tensor")
        else (contextlib.nullcontext())
    ):
        yield


def our_noise(bench: Bench, sampler: str, seed: int, shape: torch.Size) -> dict[str, Any]:
    """`sampler_kwargs` with the step noise that the sampler would get, with the same numbers for every dtype."""
    if "noise_sampler" not in inspect.signature(find_sampler(sampler)).parameters:
        return {}
    state = torch.promote_types(bench.network.dtype, torch.float32)
    if sampler.endswith("_sde"):
        module = sys.modules[type(bench.ours).__module__]
        path = module.brownian_noise(torch.empty(shape), [seed], "cpu")
        return {"noise_sampler": lambda sigma, sigma_next: path(sigma, sigma_next).to(state)}
    draw = float32_noise(seed)
    return {"noise_sampler": lambda sigma, sigma_next: draw(shape, dtype=state)}


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
    with stock_noise(bench.scheduler_of(sampler), seed):
        return call(steps, latents=noise).double()


def distances(name: str, dtype: torch.dtype, steps: int, seeds: int, size: int) -> Iterator[tuple[str, float, float]]:
    """(sampler, stock, ours): relative distance of the latents from their float64 run, root mean square of seeds."""
    half, truth = demo(name, dtype), demo(name, dtype)
    truth.ours.to(dtype=torch.float64)
    for bench in (half, truth):
        to = bench.network.dtype
        sizes = {"height": size, "width": size}
        bench.arguments = {
            key: value.to(dtype).to(to) if isinstance(value, torch.Tensor) else value
            for key, value in bench.arguments.items()
        } | sizes
    pixels = size // half.ours.vae_scale_factor
    shape = (1, 4, pixels, pixels) if name == "sdxl" else (1, pixels**2 // 4, half.network.config.in_channels)
    for sampler in half.schedulers:
        squares = {"stock": 0.0, "ours": 0.0}
        for seed in range(seeds):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            for loop in squares:
                exact, rounded = (latents(bench, loop, sampler, steps, seed, noise) for bench in (truth, half))
                squares[loop] += ((rounded - exact).norm() / exact.norm()).item() ** 2 / seeds
        stock = float("nan") if sampler in OWN_TREE else squares["stock"] ** 0.5
        yield sampler, stock, squares["ours"] ** 0.5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("sdxl", "flux"), default=["sdxl", "flux"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--size", type=int, default=64, help="pixels (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(
        f"demo models, {options.size}x{options.size}, on {where('cpu')}; {options.steps} steps, {options.seeds} seeds"
    )
    worst = ("", 0.0)
    for name in options.models:
        for dtype in options.dtypes:
            print(f"\n### {name}, {dtype} network: relative distance from float64\n")
            print("| sampler | stock loop | this one | ratio |\n|---|---|---|---|")
            for sampler, stock, ours in distances(name, DTYPES[dtype], options.steps, options.seeds, options.size):
                ratio = ours / stock
                missing = sampler in OWN_TREE
                cells = ("not measured", "not measured") if missing else (f"{stock:.2e}", f"{ratio:.2f}")
                print(f"| {sampler} | {cells[0]} | {ours:.2e} | {cells[1]} |", flush=True)
                if not missing and ratio > worst[1]:
                    worst = (f"{sampler}, {name}, {dtype}", ratio)
    print(f"\nworst ratio: {worst[1]:.2f} of the stock loop's distance ({worst[0]})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
