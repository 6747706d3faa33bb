"""Every sampler on the real architectures with random weights, in half precision, and in each offload mode.

    uv run benchmarks/gpu.py                                # 1024x1024; FLUX's takes 30 GB of the card
    uv run benchmarks/gpu.py --device cpu --size demo       # the demo models, to try the script
    uv run benchmarks/gpu.sh                                # all that needs a GPU

The weights are normal with a standard deviation of 0.02, the biases zero, the norms' weights one. With these the
activations stay in float16's range, and the pictures mean nothing. Exit status 1 if latents or a picture are not finite
or an offloaded pipeline draws another picture.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from models import Bench, demo, full, sampler_names, where
from overhead import Clock

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
OFFLOAD: dict[str, Callable[[Any, str], object]] = {
    "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "sequential": lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
    "group": lambda pipe, device: pipe.enable_group_offload(torch.device(device), offload_type="leaf_level"),
}
CLOSE = 1e-3  # the same kernels on the same weights


def samplers_run(bench: Bench, steps: int, device: str) -> list[tuple[str, bool]]:
    """For each sampler a cell of the table and whether its latents are finite; then the same for a picture."""
    clock, found, cells = Clock(bench.network, device), [], []
    for sampler in sampler_names():
        _, _, evaluations = clock(lambda: found.append(bench.call(bench.ours, steps, sampler=sampler)))  # noqa: B023
        latents = found.pop()
        finite = bool(latents.isfinite().all())
        cells.append((f"{evaluations}, {latents.std().item():.2f}" if finite else "not finite", finite))
    picture = drawn(bench, "euler", steps)
    finite = bool(picture.isfinite().all())
    return [*cells, (f"{picture.mean().item():.2f}, {picture.std().item():.2f}" if finite else "not finite", finite)]


def drawn(bench: Bench, sampler: str, steps: int) -> torch.Tensor:
    """A picture, (1, 3, height, width), on the CPU."""
    return bench.call(bench.ours, steps, sampler=sampler, output_type="pt").float().cpu()


def offloaded(bench: Bench, samplers: list[str], steps: int, device: str) -> bool:
    """The table of the offload modes: how far a picture is from that of the whole pipeline on the device."""
    print(f"\n### {bench.name}: offloaded, ||picture - on the device|| / ||on the device||, and GiB of the card\n")
    print(f"| mode | {' | '.join(samplers)} | GiB |\n{'|---' * (len(samplers) + 2)}|")
    cuda, fine = torch.device(device).type == "cuda", True
    expected: dict[str, torch.Tensor] = {}
    bench.stock = None
    for mode in ("on the device", *OFFLOAD):
        if mode == "sequential" and not cuda:  # which accelerate can't to a CPU
            continue
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cells = []
        try:
            if mode in OFFLOAD:
                bench.ours.remove_all_hooks()
                OFFLOAD[mode](bench.ours, device)
            for sampler in samplers:
                picture = drawn(bench, sampler, steps)
                wanted = expected.setdefault(sampler, picture)
                distance = ((picture - wanted).norm() / wanted.norm()).item()
                fine &= distance < CLOSE  # NaN is not
                cells.append(f"{distance:.1e}")
        except Exception as error:  # the other modes are tried all the same
            fine = False
            cells += [repr(error)[:200].replace("|", "/")] * (len(samplers) - len(cells))
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if cuda else "none"
        print(f"| {mode} | {' | '.join(cells)} | {peak} |", flush=True)
    return fine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=("sdxl", "flux"), default=["sdxl", "flux"])
    add("--size", choices=("demo", "full"), default="full")
    add("--device", default="cuda")
    add("--steps", type=int, default=3, help="(default: %(default)s; offloaded: 2)")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: there is no CUDA device here")
    warnings.simplefilter("ignore")  # diffusers' of NumPy 2, torchsde's of a rounded end
    fine = True
    for name in options.models:
        size = "64x64" if options.size == "demo" else "1024x1024"
        print(f"{name}, {options.size}, {size}, on {where(options.device)}; {options.steps} steps")
        columns = []
        for dtype in DTYPES.values():
            bench = None
            gc.collect()  # before the next is built
            if options.size == "demo":
                bench = demo(name, dtype, options.device)
                bench.arguments |= {"height": 64, "width": 64}
            else:
                bench = full(name, options.device, dtype=dtype, decoder=True)
            columns.append(samplers_run(bench, options.steps, options.device))
        print(f"\n### {name}: evaluations, standard deviation of the latents; of a picture its mean and this\n")
        print(f"| sampler | {' | '.join(DTYPES)} |\n{'|---' * (len(DTYPES) + 1)}|")
        for row, cells in zip([*sampler_names(), "a picture"], zip(*columns)):
            print(f"| {row} | {' | '.join(text for text, _ in cells)} |", flush=True)
            fine &= all(finite for _, finite in cells)
        fine &= offloaded(bench, ["euler", "dpmpp_2m_sde"][: 1 if name == "flux" else 2], 2, options.device)
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
