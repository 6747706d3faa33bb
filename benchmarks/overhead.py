"""What a picture costs beside its network: every sampler here, in the stock pipeline, in k-diffusion by itself, and as
a scheduler of the stock pipeline.

    uv run benchmarks/overhead.py                  # the demo models
    uv run benchmarks/overhead.py --size full      # SDXL's and FLUX's real architectures, random weights, needs CUDA

Those of a row, and the bare network, run in turn, round by round, after a warm-up, so that a machine that slows down
slows all of them. Exit status 1 if a ratio misses its goal (`GOALS`) by more than its spread.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from models import Bench, demo, external, find_sampler, full, sampler_names, where
from torch.profiler import ProfilerActivity, profile

from scheduling_k_diffusion import KDiffusionScheduler
from sdxl_comfy_pipeline import brownian_noise, named_sigmas, sampling, white_noise


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
        function = find_sampler(sampler).function
        if "sigmas" in inspect.signature(function).parameters:
            return function(model, noise * start, sigmas.to(noise), disable=True)
        ends = {"sigma_min": sigmas[-2].item(), "sigma_max": sigmas[0].item()}
        return function(model, noise * start, **ends, **({"n": steps} if sampler == "dpm_fast" else {}), disable=True)

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


def measured(bench: Bench, samplers: list[str], steps: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """One row for each sampler: lists over the rounds of (seconds, seconds outside, evaluations) of each loop."""
    clock = Clock(bench.network, device)
    network, k_diffusion = bare(bench), alone(bench)
    rows: list[dict[str, Any]] = []
    for sampler in samplers:
        runs = {
            "ours": lambda n, sampler=sampler: bench.call(bench.ours, n, sampler=sampler),
            "stock": bench.stock_with(sampler),
            "k-diffusion": lambda n, sampler=sampler: k_diffusion(n, sampler),
            "scheduler": scheduled(bench, sampler),
            "bare": network,
        }
        runs = {name: run for name, run in runs.items() if run is not None}
        rows.append({"sampler": sampler, "runs": runs, "times": {name: [] for name in runs}, "peak": {}, "waits": {}})
    network(1)  # libraries' workspaces, which stay, are nobody's peak
    for row in rows:  # the warm-up
        for name, run in row["runs"].items():
            if clock.cuda:
                row["peak"][name], row["waits"][name] = peak_and_waits(partial(run, steps), steps)
            else:
                # five steps fill every history, and a profile of many takes minutes
                row["peak"][name] = peak_on_cpu(partial(run, min(steps, 5)))
    for _ in range(rounds):
        for row in rows:
            for name, run in row["runs"].items():
                row["times"][name].append(clock(partial(run, steps)))
    return rows


def peak_on_cpu(run: Callable[[], object]) -> float:
    """MiB of tensors at the highest, above what was there before the call: the weights are not counted."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) / 2**20


def peak_and_waits(run: Callable[[], object], steps: int) -> tuple[float, float]:
    """MiB as `peak_on_cpu`, and how often a step makes the CPU wait for the GPU.

    What waits before and after the loop, to seed, is counted along.
    """
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(one.message) for one in caught)
    return (torch.cuda.max_memory_allocated() - before) / 2**20, waits / steps


def per_evaluation(times: list[tuple[float, float, int]]) -> list[float]:
    return [1000 * seconds / evaluations for seconds, _, evaluations in times]


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return (high - low) / 2


# (what is divided by what, the most that it may be); times outside the network, for "stock" whole times
GOALS = {
    "k-diffusion": ("ours / k-diffusion", {"sdxl": 1.10, "flux": 1.10}),
    "stock": ("ours / stock", {"sdxl": 1.01, "flux": 1.00}),
    "scheduler": ("scheduler / ours", {"sdxl": 1.05, "flux": 1.05}),
}


def ratios(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """The row's ratios by the names of `GOALS`: the median over the rounds, and its spread.

    A whole time on a CPU is the bare network's median and what the loop spends outside, so that a machine whose network
    times scatter by more than the loops differ shows the difference. On CUDA it is measured.
    """
    each = {key: per_evaluation(times) for key, times in row["times"].items()}
    outside = {key: [1000 * out / n for _, out, n in times] for key, times in row["times"].items()}
    cuda = math.isnan(outside["ours"][0])
    network = 0.0 if cuda else median(each["bare"])
    found = {}
    for goal, (names, _) in GOALS.items():
        above, below = names.split(" / ")
        if not {above, below} <= each.keys() or cuda and goal != "stock":
            continue
        pairs = zip(*((each if cuda else outside)[key] for key in (above, below)))
        more = network if goal == "stock" else 0.0
        rounds = [(a + more) / (b + more) for a, b in pairs]
        found[goal] = median(rounds), spread(rounds)
    return found


LOOPS = ["ours", "stock", "k-diffusion", "scheduler", "bare"]


def table(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Prints the rows, and gives a line for each goal that one misses by more than the spread."""
    print(f"\n### {name}: milliseconds per network evaluation, medians (half the quartiles' distance)\n")
    cuda, missed = bool(rows[0]["waits"]), []
    outside = [] if cuda else ["outside: ours, stock, k-diffusion, scheduler"]
    shown = [f"{names}{'' if goal == 'stock' else ', outside'}" for goal, (names, _) in GOALS.items()]
    shown = shown[1:2] if cuda else shown
    waits = ["waits a step: ours, stock, k-diffusion, scheduler"] if cuda else []
    heads = ["sampler", "evaluations", *LOOPS, *outside, *shown, *waits, f"MiB: {', '.join(LOOPS)}"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for row in rows:

        def listed(values: dict[str, float], spec: str, keys: list[str], row: dict[str, Any] = row) -> str:
            return ", ".join(f"{values[key]:{spec}}" if key in row["times"] else "none" for key in keys)

        line = [row["sampler"], str(row["times"]["ours"][0][2])]
        for key in LOOPS:
            values = per_evaluation(row["times"].get(key, []))
            line.append(f"{median(values):.2f} ({spread(values):.2f})" if values else "none")
        if outside:
            medians = {key: median(1000 * out / n for _, out, n in times) for key, times in row["times"].items()}
            line.append(listed(medians, ".2f", LOOPS[:4]))
        found = ratios(row)
        for goal in ["stock"] if cuda else GOALS:
            ratio, around = found.get(goal, (0.0, 0.0))
            line.append(f"{ratio:.3f} ({around:.3f})" if goal in found else "none")
            limit = GOALS[goal][1][name.split(",")[0]]
            if round(ratio - around, 3) > limit:
                missed.append(f"{name}, {row['sampler']}: {GOALS[goal][0]} is {ratio:.3f}, the goal {limit:.2f}")
        line += [listed(row["waits"], ".1f", LOOPS[:4])] if waits else []
        print(f"| {' | '.join([*line, listed(row['peak'], '.2f', LOOPS)])} |", flush=True)
    return missed


def step_noise(device: str, queries: int = 24) -> None:
    """Milliseconds of one draw of step noise: k-diffusion's tree, this project's path, white noise."""
    print("\n### Milliseconds for one step's noise on the device, median (least)")
    print("\n| latents | drawn on | tree | path | white |\n|---|---|---|---|---|")
    sigmas = named_sigmas("karras", queries + 1, 0.0292, 14.6146)[:-1]
    for shape in ((1, 4, 128, 128), (1, 4096, 64)):
        x = torch.zeros(shape, device=device)
        for on in dict.fromkeys((torch.device(device).type, "cpu")):
            ends = sigmas[-1] * 0.999, sigmas[0] * 1.001
            tree = sampling.BrownianTreeNoiseSampler(x.to(on), *ends, seed=[1])
            path, generator = brownian_noise(x, [1], on), torch.Generator(on)
            cells = []
            for draw in (tree, path, lambda a, b: white_noise(x, generator)):  # noqa: B023
                times = []
                for a, b in zip(sigmas, sigmas[1:]):
                    start = time.perf_counter()
                    draw(a, b).to(device)
                    if x.device.type == "cuda":
                        torch.cuda.synchronize()
                    times.append(1000 * (time.perf_counter() - start))
                cells.append(f"{median(times[2:]):.2f} ({min(times[2:]):.2f})")
            print(f"| {'x'.join(map(str, shape))} | {on} | {' | '.join(cells)} |", flush=True)


@contextlib.contextmanager
def built(name: str, size: str, device: str) -> Iterator[Bench]:
    """The network, gone again afterwards: SDXL's and FLUX's do not have to fit side by side."""
    bench = demo(name, device=device) if size == "demo" else full(name, device)
    yield bench
    bench.ours = bench.stock = None
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=("demo", "full"), default="demo", help="demo models, or the real architectures on CUDA")
    add("--models", nargs="+", choices=("sdxl", "flux"), default=["sdxl", "flux"])
    add("--samplers", nargs="+", default=sampler_names(), help="(default: all)")
    add("--steps", type=int, help="(default: 25, full: 10)")
    add("--rounds", type=int, help="after the warm-up (default: 5)", default=5)
    add("--device", help="(default: cuda for --size full, else cpu)")
    add("--only", choices=("samplers", "noise"), help="one of the two kinds of tables")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if options.size == "full" else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--size {options.size}: there is no CUDA device here")
    for name in options.samplers:
        if name not in sampler_names():
            parser.error(f"argument --samplers: there is no {name!r}; there are {', '.join(sampler_names())}")
    for name in ("steps", "rounds"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"argument --{name}: has to be at least 1, but is {getattr(options, name)}")
    steps = options.steps or (25 if options.size == "demo" else 10)

    warnings.simplefilter("ignore")  # diffusers' of NumPy 2 and old algorithms, torchsde's of a rounded end
    print(f"{options.size} models on {where(device)}; {steps} steps, {options.rounds} rounds")
    missed = []
    for name in options.models if options.only != "noise" else ():
        with built(name, options.size, device) as bench:
            missed += table(f"{name}, {options.size}", measured(bench, options.samplers, steps, options.rounds, device))
    if options.only != "samplers":
        step_noise(device)
    if options.only != "noise":
        print("\n" + ("\n".join(missed) or "every goal is met, to the spread"))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
