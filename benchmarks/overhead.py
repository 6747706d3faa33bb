"""The time of a picture outside its network: for every sampler, in this project's pipeline, in the stock pipeline, in
k-diffusion alone, and as a scheduler in the stock pipeline.

    uv run benchmarks/overhead.py                  # the demo models
    uv run benchmarks/overhead.py --size full      # SDXL's and FLUX's real architectures, random weights, needs CUDA

After a warm-up, all loops of a row and the bare network run in turn, round by round. A machine that slows down then
slows all of them. With --size full the exit status is 1 if the ratio of a whole time to the stock pipeline's misses its
goal (`goal`) by more than its spread. With a demo model the loop is too large a share of the time for this goal.
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

Times = dict[str, list[tuple[float, float, int]]]  # by loop, for each round: what `Clock` returns
LOOPS = ["ours", "stock", "k-diffusion", "scheduler", "bare"]


class Clock:
    """Measures the time of calls on the device, and of the network within them."""

    def __init__(self, network: torch.nn.Module, device: str):
        self.network, self.cuda, self.device = network, torch.device(device).type == "cuda", device

    def __call__(self, call: Callable[[], object]) -> tuple[float, float, int]:
        """Seconds of the call, seconds outside the network (nan on CUDA, which is asynchronous), and evaluations.

        On CUDA the time is measured by events, which do not wait inside the call.
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
    """The positional and named arguments of the pipeline's first call of the network."""
    found = []
    hook = bench.network.register_forward_pre_hook(lambda _, *given: found.append(given), with_kwargs=True)
    bench.call(bench.ours, 1)
    hook.remove()
    return found[0]


def bare(bench: Bench) -> Callable[[int], None]:
    """A function that only calls the network, n times, with the arguments that the pipeline gave it."""
    args, kwargs = inputs(bench)

    @torch.no_grad()
    def run(n: int) -> None:
        for _ in range(n):
            bench.network(*args, **kwargs)

    return run


def alone(bench: Bench) -> Callable[[int, str], torch.Tensor]:
    """k-diffusion alone: its sampler and its own wrapper of the network, with nothing from this project.

    For FLUX, which it has no wrapper for, `flow` returns x - t v and sigma is t. The step noise is k-diffusion's own.
    Samplers that place their own levels end at the lowest positive one.
    """
    args, kwargs = inputs(bench)
    network, dtype = bench.network, bench.network.dtype  # read once: diffusers searches all modules for it
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
    """The stock pipeline's call with `KDiffusionScheduler`; None for dpm_adaptive."""
    if sampler == "dpm_adaptive":
        return None
    scheduler = KDiffusionScheduler.from_scheduler(bench.ours.scheduler, sampler=sampler)

    def run(steps: int) -> torch.Tensor:
        bench.stock.scheduler = scheduler
        return bench.call(bench.stock, steps)

    return run


def measured(bench: Bench, samplers: list[str], steps: int, rounds: int, device: str) -> dict[str, Times]:
    """For each sampler and loop, what `Clock` returns in each round."""
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
    """The largest allowed ratio of a whole time to the stock pipeline's. Stochastic samplers also draw noise."""
    return 1.005 if not stochastic(sampler) else 1.01 if torch.device(generator).type == "cuda" else 1.02


def ratios(times: Times) -> dict[str, tuple[float, float]]:
    """The ratios of a row: the median over the rounds, and its spread.

    On a CPU a whole time is the bare network's median plus the loop's time outside: the network's times vary by more
    than the loops differ. On CUDA the whole time is measured.
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
    """Prints the rows, and returns a line for each goal that is missed by more than the spread."""
    print(f"\n### {title}: milliseconds per network evaluation, medians (half the interquartile range)\n")
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
        for name, (ratio, half_range) in found.items():
            if "stock" in name and round(ratio - half_range, 3) > limit:
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
        print("\n" + ("\n".join(missed) or "every goal is met, within the spread"))
    return int(bool(missed) and options.size == "full")


if __name__ == "__main__":
    sys.exit(main())
