"""What a picture costs beside its network: every sampler here, in the stock pipeline, in k-diffusion by itself, and as
a scheduler of the stock pipeline.

    uv run benchmarks/overhead.py                  # the demo models
    uv run benchmarks/overhead.py --size full      # SDXL's and FLUX's real architectures, random weights, needs CUDA

All loops of a row, and the bare network, run in turn, round by round, after a warm-up, so that a machine that slows
down slows all of them. Exit status 1 if a whole time over the stock pipeline's misses its goal (`goal`) by more than
its spread: with --size full, since beside a demo model's network a loop is no small part.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from models import DTYPES, Bench, built, function, positive, stochastic, where

from scheduling_k_diffusion import KDiffusionScheduler
from sdxl_comfy_pipeline import external, sampler_names

Times = dict[str, list[tuple[float, float, int]]]  # by loop, round by round: as of `Clock`
LOOPS = ["ours", "stock", "k-diffusion", "scheduler", "bare"]


class Clock:
    """Times calls on the device, and within them the network's share."""

    def __init__(self, network: torch.nn.Module, device: str):
        self.network, self.cuda, self.device = network, torch.device(device).type == "cuda", device

    def __call__(self, call: Callable[[], object]) -> tuple[float, float, int]:
        """Seconds of the call, seconds of them outside the network (nan on CUDA, which runs on by itself), evaluations.

        On CUDA by events, which wait for nothing inside the call.
        """
        began, inside, evaluations = 0.0, 0.0, 0

        def before(*_: object) -> None:
            nonlocal began
            began = time.perf_counter()

        def after(*_: object) -> None:
            nonlocal inside, evaluations
            inside, evaluations = inside + time.perf_counter() - began, evaluations + 1

        hooks = [self.network.register_forward_pre_hook(before), self.network.register_forward_hook(after)]
        try:
            if self.cuda:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize(self.device)
                first.record()
                call()
                last.record()
                torch.cuda.synchronize(self.device)
                return first.elapsed_time(last) / 1000, float("nan"), evaluations
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            return seconds, seconds - inside, evaluations
        finally:
            for hook in hooks:
                hook.remove()


def inputs(bench: Bench) -> tuple[tuple, dict[str, Any]]:
    """What the pipeline gives the network: positional and named arguments of its first evaluation."""
    found = []
    hook = bench.network.register_forward_pre_hook(lambda _, *given: found.append(given), with_kwargs=True)
    bench.call(bench.ours, 1)
    hook.remove()
    return found[0]


def bare(bench: Bench) -> Callable[[int], None]:
    """The bare network: a function that calls it n times with what the pipeline gave it, and does nothing else."""
    args, kwargs = inputs(bench)

    @torch.no_grad()
    def run(n: int) -> None:
        for _ in range(n):
            bench.network(*args, **kwargs)

    return run


def alone(bench: Bench) -> Callable[[int, str], torch.Tensor]:
    """k-diffusion by itself: its sampler over the network in its own wrapper, with nothing of this project in between.

    It has no wrapper for FLUX, which gets x - t v, with t for sigma. Step noise is k-diffusion's own, and so is the end
    of the samplers that place their own levels: the lowest positive one.
    """
    args, kwargs = inputs(bench)
    network, dtype = bench.network, bench.network.dtype  # once: diffusers looks through all modules for it
    texts = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "timestep")}

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        prediction = network(torch.cat([x, x]).to(dtype), torch.cat([timestep, timestep]), **texts)[0].float()
        negative, positive = prediction.chunk(2)
        return negative + 5.0 * (positive - negative)

    def flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - t.view(-1, 1, 1) * network(hidden_states=x.to(dtype), timestep=t, **texts)[0].float()

    @torch.no_grad()
    def run(steps: int, sampler: str) -> torch.Tensor:
        if bench.name == "sdxl":
            sigmas, noise = bench.ours.noise_levels(steps), args[0][:1].float()
            start = (sigmas[0] ** 2 + 1).sqrt().item()  # as the scheduler's, whose timesteps are 'leading'
            alphas_cumprod = bench.ours.scheduler.alphas_cumprod.to(noise)
            model = external.DiscreteEpsDDPMDenoiser(predict, alphas_cumprod, quantize=False)
        else:
            model, start, noise = flow, 1.0, kwargs["hidden_states"].float()
            sigmas = bench.ours.noise_levels(noise.shape[1], steps)
        sample = function(sampler)
        if "sigmas" in inspect.signature(sample).parameters:
            return sample(model, noise * start, sigmas.to(noise), disable=True)
        ends = {"sigma_min": sigmas[-2].item(), "sigma_max": sigmas[0].item()}
        return sample(model, noise * start, **ends, **({"n": steps} if sampler == "dpm_fast" else {}), disable=True)

    return run


def scheduled(bench: Bench, sampler: str) -> Callable[[int], torch.Tensor] | None:
    """The stock pipeline's call with `KDiffusionScheduler`; None for dpm_adaptive, which can't be one."""
    if sampler == "dpm_adaptive":
        return None
    scheduler = KDiffusionScheduler.from_scheduler(bench.ours.scheduler, sampler=sampler)

    def run(steps: int) -> torch.Tensor:
        bench.stock.scheduler = scheduler
        return bench.call(bench.stock, steps)

    return run


def measured(bench: Bench, samplers: list[str], steps: int, rounds: int, device: str) -> dict[str, Times]:
    """For each sampler and loop what `Clock` gives, round by round."""
    clock, network, k_diffusion = Clock(bench.network, device), bare(bench), alone(bench)
    runs: dict[str, dict[str, Any]] = {}
    for sampler in samplers:
        ours = partial(bench.call, bench.ours, sampler=sampler)
        loops = [
            ours,
            bench.stock_with(sampler),
            partial(k_diffusion, sampler=sampler),
            scheduled(bench, sampler),
            network,
        ]
        runs[sampler] = {name: run for name, run in zip(LOOPS, loops) if run is not None}
        for name, run in runs[sampler].items():  # the warm-up
            latents = run(steps)
            if latents is not None and not latents.isfinite().all():
                raise FloatingPointError(f"{bench.name}, {sampler}, {name}: latents that are not finite")
    found: dict[str, Times] = {sampler: {name: [] for name in runs[sampler]} for sampler in samplers}
    for _ in range(rounds):
        for sampler in samplers:
            for name, run in runs[sampler].items():
                found[sampler][name].append(clock(partial(run, steps)))
    return found


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return (high - low) / 2


def goal(sampler: str, generator: str) -> float:
    """The most that a whole time may be of the stock pipeline's: a stochastic sampler also pays for its noise."""
    return 1.005 if not stochastic(sampler) else 1.01 if torch.device(generator).type == "cuda" else 1.02


def ratios(times: Times) -> dict[str, tuple[float, float]]:
    """The ratios of a row: the median over the rounds, and its spread.

    A whole time on a CPU is the bare network's median and what the loop spends outside, so that a machine whose network
    times scatter by more than the loops differ shows the difference. On CUDA it is measured.
    """
    whole = {name: [seconds / n for seconds, _, n in rounds] for name, rounds in times.items()}
    outside = {name: [out / n for _, out, n in rounds] for name, rounds in times.items()}
    if not (cuda := math.isnan(outside["ours"][0])):
        whole = {name: [median(whole["bare"]) + out for out in rounds] for name, rounds in outside.items()}
    found = {}
    for above, below, of, suffix in (
        ("ours", "stock", whole, ""),
        ("scheduler", "stock", whole, ""),
        ("ours", "k-diffusion", outside, ", outside"),
        ("scheduler", "ours", outside, ", outside"),
    ):
        if {above, below} <= times.keys() and not (cuda and suffix):
            rounds = [a / b for a, b in zip(of[above], of[below])]
            found[f"{above} / {below}{suffix}"] = median(rounds), spread(rounds)
    return found


def table(title: str, rows: dict[str, Times], generator: str) -> list[str]:
    """Prints the rows, and returns a line for each goal that one misses by more than the spread."""
    print(f"\n### {title}: milliseconds per network evaluation, medians (half the quartiles' distance)\n")
    shown = list(dict.fromkeys(name for times in rows.values() for name in ratios(times)))
    outside = ["outside: ours, stock, k-diffusion, scheduler"] if any("outside" in name for name in shown) else []
    heads = ["sampler", "evaluations", *LOOPS, *outside, *shown]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    missed = []
    for sampler, times in rows.items():
        each = {name: [1000 * seconds / n for seconds, _, n in rounds] for name, rounds in times.items()}
        cells = [f"{median(each[name]):.2f} ({spread(each[name]):.2f})" if name in each else "none" for name in LOOPS]
        if outside:
            out = {name: f"{median(1000 * out / n for _, out, n in rounds):.2f}" for name, rounds in times.items()}
            cells.append(", ".join(out.get(name, "none") for name in LOOPS[:4]))
        found = ratios(times)
        cells += ["{:.3f} ({:.3f})".format(*found[name]) if name in found else "none" for name in shown]
        print(f"| {sampler} | {times['ours'][0][2]} | {' | '.join(cells)} |", flush=True)
        limit = goal(sampler, generator)
        for name, (ratio, around) in found.items():
            if "stock" in name and round(ratio - around, 3) > limit:
                missed.append(f"{title}, {sampler}: {name} is {ratio:.3f}, the goal {limit:.3f}")
    return missed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=("demo", "full"), default="demo", help="demo models, or the real architectures on CUDA")
    add("--models", nargs="+", choices=("sdxl", "flux"), default=["sdxl", "flux"])
    add("--samplers", nargs="+", choices=sampler_names(), default=sampler_names(), help="(default: all)")
    add("--steps", type=positive, help="(default: 25, full: 10)")
    add("--rounds", type=positive, help="after the warm-up (default: 5)", default=5)
    add("--device", help="(default: cuda for --size full, else cpu)")
    add("--dtype", choices=DTYPES, help="of the network (default: demo float32, SDXL float16, FLUX bfloat16)")
    add("--generator", default="cpu", help="the device that the noise is drawn on (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if options.size == "full" else "cpu")
    steps = options.steps or (25 if options.size == "demo" else 10)
    print(f"{where(device)}; {steps} steps, {options.rounds} rounds, noise drawn on {options.generator}")
    missed = []
    for name in options.models:
        usual = "float32" if options.size == "demo" else {"sdxl": "float16", "flux": "bfloat16"}[name]
        with built(name, options.size, device, DTYPES[options.dtype or usual]) as bench:
            bench.generator = options.generator
            rows = measured(bench, options.samplers, steps, options.rounds, device)
            missed += table(f"{name}, {options.size}, {options.dtype or usual}", rows, options.generator)
    if options.size == "full":
        print("\n" + ("\n".join(missed) or "every goal is met, to the spread"))
    return int(bool(missed) and options.size == "full")


if __name__ == "__main__":
    sys.exit(main())
