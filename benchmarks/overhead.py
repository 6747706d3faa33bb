"""What a picture costs beside its network: every sampler here, in the stock pipeline, and in k-diffusion by itself.

    uv run benchmarks/overhead.py                  # the demo models
    uv run benchmarks/overhead.py --size full      # SDXL's and FLUX's real architectures, random weights, needs CUDA

Those of a row, and the bare network, run in turn, round by round, after a warm-up, so that a machine that slows down
slows all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from models import ROOT, Bench, demo, external, find_sampler, full, sampler_names, where
from torch.profiler import ProfilerActivity, profile

STOCHASTIC = ("_ancestral", "_sde")


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
        function = find_sampler(sampler)
        if "sigmas" in inspect.signature(function).parameters:
            return function(model, noise * start, sigmas.to(noise), disable=True)
        ends = {"sigma_min": sigmas[-2].item(), "sigma_max": sigmas[0].item()}
        return function(model, noise * start, **ends, **({"n": steps} if sampler == "dpm_fast" else {}), disable=True)

    return run


def measured(bench: Bench, samplers: list[str], steps: int, rounds: int, device: str) -> list[dict[str, object]]:
    """One row for each sampler: lists over the rounds of (seconds, seconds outside, evaluations) of each loop."""
    clock = Clock(bench.network, device)
    network, k_diffusion = bare(bench), alone(bench)
    rows = []
    for sampler in samplers:
        stock = bench.stock_with(sampler)
        runs = {"ours": lambda n, sampler=sampler: bench.call(bench.ours, n, sampler=sampler)}
        if stock is not None:
            runs["stock"] = stock
        runs["k-diffusion"] = lambda n, sampler=sampler: k_diffusion(n, sampler)
        runs["bare"] = network
        rows.append({"sampler": sampler, "runs": runs, "times": {name: [] for name in runs}})
    for number in range(rounds + 1):
        for row in rows:
            for name, run in row["runs"].items():
                timed = clock(partial(run, steps))
                if number:  # the first round warms up
                    row["times"][name].append(timed)
    peak = peak_on_gpu if clock.cuda else peak_on_cpu
    for row in rows:
        # five steps fill every history, and a profile of many takes minutes
        row["peak"] = {name: peak(partial(run, min(steps, 5))) for name, run in row["runs"].items()}
        row["waits"] = {name: waits(partial(run, steps)) / steps for name, run in row["runs"].items() if clock.cuda}
    return rows


def peak_on_cpu(run: Callable[[], object]) -> float:
    """MiB of tensors at the highest, above what was there before the call: the weights are not counted."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) / 2**20


def peak_on_gpu(run: Callable[[], object]) -> float:
    """As `peak_on_cpu`."""
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def waits(run: Callable[[], object]) -> int:
    """How often a call makes the CPU wait for the GPU; those before and after the loop, to seed, are counted along."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in caught)


def per_evaluation(times: list[tuple[float, float, int]]) -> list[float]:
    return [1000 * seconds / evaluations for seconds, _, evaluations in times]


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, in per cent of the median."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return 50 * (high - low) / middle


RATIOS = {
    "bare": "of the bare network",
    "deterministic": "of it without step noise",
    "stock": "of the stock pipeline",
    "outside": "of the stock pipeline by what is outside the network",
    "floor": "of it so for k-diffusion by itself",
}


def cell(ratio: float | None) -> str:
    return "none" if ratio is None else f"{ratio:.3f}"


def table(name: str, rows: list[dict]) -> dict[str, list[float]]:
    """Prints the rows and gives their ratios, by the names of `RATIOS`.

    "outside" takes the bare network's median for both loops and adds what each spends outside: a machine whose network
    times scatter by more than the loops differ shows the difference there. "floor" is that of k-diffusion by itself.
    """
    print(f"\n### {name}: milliseconds per network evaluation, medians (half the quartiles' distance)\n")
    cuda = any(row["waits"] for row in rows)
    loops = ["ours", "stock", "k-diffusion", "bare"]
    heads = ["sampler", "evaluations", *loops, "ours / bare", "ours / stock"]
    if cuda:
        heads += ["waits a step: ours, stock, k-diffusion"]
    else:
        heads += ["outside: ours, stock, k-diffusion", "so ours / stock", "so k-diffusion / stock"]
    heads += ["MiB: ours, stock, k-diffusion, bare"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    ratios: dict[str, list[float]] = {key: [] for key in RATIOS}
    for row in rows:

        def listed(values: dict[str, float], spec: str, keys: list[str], row: dict = row) -> str:
            return ", ".join(f"{values[key]:{spec}}" if key in row["times"] else "none" for key in keys)

        each = {key: per_evaluation(times) for key, times in row["times"].items()}
        cells = {key: f"{median(values):.2f} ({spread(values):.1f} %)" for key, values in each.items()}
        found = {
            key: median(a / b for a, b in zip(each["ours"], each[key])) for key in ("bare", "stock") if key in each
        }
        line = [row["sampler"], str(row["times"]["ours"][0][2]), *(cells.get(key, "none") for key in loops)]
        line += [cell(found["bare"]), cell(found.get("stock"))]
        if cuda:
            line.append(listed(row["waits"], ".1f", loops[:3]))
        else:
            network = median(each["bare"])
            outside = {key: median(1000 * out / n for _, out, n in times) for key, times in row["times"].items()}
            if "stock" in each:
                found["outside"] = (network + outside["ours"]) / (network + outside["stock"])
                found["floor"] = (network + outside["k-diffusion"]) / (network + outside["stock"])
            line += [listed(outside, ".2f", loops[:3]), cell(found.get("outside")), cell(found.get("floor"))]
        line.append(listed(row["peak"], ".2f", loops))
        print("| " + " | ".join(line) + " |", flush=True)
        if not row["sampler"].endswith(STOCHASTIC):
            found["deterministic"] = found["bare"]
        for key, ratio in found.items():
            ratios[key].append(ratio)
    return ratios


def step_noise(device: str, queries: int = 24) -> None:
    """Milliseconds of one draw of step noise: k-diffusion's tree, this project's path, white noise."""
    from sdxl_comfy_pipeline import brownian_noise, named_sigmas, sampling

    print("\n### Milliseconds for one step's noise, median (least)")
    print("\n| latents | tree | path | white |\n|---|---|---|---|")
    sigmas = named_sigmas("karras", queries + 1, 0.0292, 14.6146)[:-1]
    for shape in ((1, 4, 128, 128), (1, 4096, 64)):
        x = torch.zeros(shape, device=device)
        tree = sampling.BrownianTreeNoiseSampler(x, sigmas[-1] * 0.999, sigmas[0] * 1.001, seed=[1])
        path, generator = brownian_noise(x, [1], x.device), torch.Generator(device)
        cells = []
        for draw in (tree, path, lambda a, b: torch.randn(shape, generator=generator, device=device)):  # noqa: B023
            times = []
            for a, b in zip(sigmas, sigmas[1:]):
                start = time.perf_counter()
                draw(a, b)
                if x.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(1000 * (time.perf_counter() - start))
            cells.append(f"{median(times[2:]):.2f} ({min(times[2:]):.2f})")
        print(f"| {'x'.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)


def starting(rounds: int = 3) -> None:
    """Seconds that importing a pipeline file adds to diffusers' own, and that `--help` takes."""
    print("\n### Seconds to start, least of three\n\n| | seconds |\n|---|---|")
    code = (
        "import time, torch\nfrom diffusers import {0}\nstart = time.perf_counter()\nimport {1}\n"
        "print(time.perf_counter() - start)"
    )
    for parent, module in (
        ("StableDiffusionXLPipeline", "sdxl_comfy_pipeline"),
        ("FluxPipeline", "flux_comfy_pipeline"),
    ):
        runs = (script("-c", code.format(parent, module)) for _ in range(rounds))
        print(f"| `import {module}` after torch and `{parent}` | {min(float(run[1]) for run in runs):.2f} |")
    print(f"| `test.py --help` | {min(script('test.py', '--help')[0] for _ in range(rounds)):.2f} |", flush=True)


def script(*arguments: str) -> tuple[float, str]:
    """Seconds and the standard output of a Python that runs in the repository's root."""
    start = time.perf_counter()
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return time.perf_counter() - start, run.stdout


def grid(bench: Bench) -> None:
    """The grid script's wall time over the limit: its evaluations, as many decodings, and nothing else."""
    print("\n### The grid script: seconds\n")
    print("| script | evaluations | limit: network, decoder | drawing | drawing / limit | with start and load |")
    print("|---|---|---|---|---|---|")
    name, steps = ("test.py", "10") if bench.name == "sdxl" else ("test_flux.py", "10")
    with tempfile.TemporaryDirectory() as folder:
        wall, output = script(name, "--model", "demo", "--device", "cpu", "--steps", steps, "--output", folder)
    drawn = re.findall(r"^(\w+) +(\d+) +([\d.]+)  \S+\.png", output, re.MULTILINE)
    evaluations, drawing = sum(int(one[1]) for one in drawn), sum(float(one[2]) for one in drawn)
    network = least(partial(bare(bench), 8)) / 8 * evaluations
    latents = bench.call(bench.ours, 1)
    if bench.name == "flux":
        latents = bench.ours._unpack_latents(latents, 128, 128, bench.ours.vae_scale_factor)
    with torch.no_grad():
        decoder = least(lambda: bench.ours.vae.decode(latents.to(bench.ours.vae.dtype))) * len(drawn)
    limit = network + decoder
    print(
        f"| `{name} --steps {steps}` | {evaluations} | {network:.1f}, {decoder:.1f} | {drawing:.1f} |"
        f" {drawing / limit:.3f} | {wall:.1f} |",
        flush=True,
    )


def least(run: Callable[[], object], rounds: int = 4) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times[1:])


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
    add("--only-samplers", action="store_true", help="leave out the tables of noise, start and grids")
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
    ratios: dict[str, list[float]] = {key: [] for key in RATIOS}
    for name in options.models:
        with built(name, options.size, device) as bench:
            rows = measured(bench, options.samplers, steps, options.rounds, device)
            for key, these in table(f"{name}, {options.size}", rows).items():
                ratios[key].extend(these)
            if options.size == "demo" and not options.only_samplers:
                grid(bench)
    if not options.only_samplers:
        step_noise(device)
        starting()
    worst = (f"{max(ratios[key]):.3f} {words}" for key, words in RATIOS.items() if ratios[key])
    print(f"\nworst ratio: {', '.join(worst)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
