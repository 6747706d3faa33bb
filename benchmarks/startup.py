"""The grid scripts: how long they take until they draw, and the drawing beside the network's own time.

    uv run benchmarks/startup.py

From the command to the first evaluation of the network, in CPU seconds of all threads, user and system: each script
runs three times with warm files, that is with Python's bytecode there and the disk cached. Beside it stands what the
stock pipeline takes for the same: its imports, the demo model, one prompt. Drawing is compared with its limit: as many
evaluations of the network and as many decodings, and nothing else.

Exit status 1 if a script takes more than 6 s to its first evaluation, or if drawing is above 1.10 of its limit by more
than the spread.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from models import ROOT, Bench, demo, where
from overhead import bare, spread

START, DRAWING = 6.0, 1.10  # CPU seconds; of the limit
SCRIPTS = {"sdxl": "test.py", "flux": "test_flux.py"}
STOCK = {
    "sdxl": ("StableDiffusionXLPipeline", "UNet2DConditionModel"),
    "flux": ("FluxPipeline", "FluxTransformer2DModel"),
}
# ends the process at the first evaluation
FIRST = """
import os, sys, time
def first(module, arguments):
    if type(module).__name__ == {network!r}:
        sys.stderr.write(f"{{time.process_time():.3f}}")
        sys.stderr.flush()
        os._exit(0)
from torch.nn.modules.module import register_module_forward_pre_hook
register_module_forward_pre_hook(first)
"""
SCRIPT = """
import runpy
sys.argv = [{script!r}, "--model", "demo", "--device", "cpu", "--samplers", "euler", "--output", {output!r}]
runpy.run_path({script!r}, run_name="__main__")
"""
PIPELINE = """
import diffusers
pipe = diffusers.{pipeline}.from_pretrained({demo!r})
pipe("a cat", num_inference_steps=1)
"""


def seconds(code: str, cache: str) -> float:
    """CPU seconds of a new process until its first evaluation, the least of three, after one that fills the caches."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    line = [sys.executable, "-c", code]
    runs = [
        subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT, check=True) for _ in range(4)
    ]
    return min(float(run.stderr.split()[-1].rsplit("]", 1)[-1]) for run in runs[1:])


def starting(rounds: int = 3) -> None:
    """Seconds that importing a pipeline file adds to diffusers' own, and that `--help` takes."""
    print("\n### Seconds to start, least of three\n\n| | seconds |\n|---|---|")
    code = (
        "import time, torch\nfrom diffusers import {0}\nstart = time.perf_counter()\nimport {1}\n"
        "print(time.perf_counter() - start)"
    )
    for name, module in (("sdxl", "sdxl_comfy_pipeline"), ("flux", "flux_comfy_pipeline")):
        parent = STOCK[name][0]
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


def drawing(bench: Bench, steps: int, rounds: int) -> bool:
    """One row: the seconds that a grid takes to draw, over its limit, which is measured after each grid anew."""
    latents = bench.call(bench.ours, 1)
    if bench.name == "flux":
        latents = bench.ours._unpack_latents(latents, 128, 128, bench.ours.vae_scale_factor)
    network, decode = partial(bare(bench), 8), partial(bench.ours.vae.decode, latents.to(bench.ours.vae.dtype))
    walls, draws, limits = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            options = ("--model", "demo", "--device", "cpu", "--steps", str(steps), "--output", folder)
            wall, output = script(SCRIPTS[bench.name], *options)
        drawn = re.findall(r"^(\w+) +(\d+) +([\d.]+)  \S+\.png", output, re.MULTILINE)
        evaluations = sum(int(one[1]) for one in drawn)
        walls.append(wall)
        draws.append(sum(float(one[2]) for one in drawn))
        with torch.no_grad():
            limits.append(middle(network) / 8 * evaluations + middle(decode) * len(drawn))
    ratios = [draw / limit for draw, limit in zip(draws, limits)]
    ratio, around = median(ratios), spread(ratios)
    cells = f"{evaluations} | {median(limits):.1f} | {median(draws):.1f} | {ratio:.3f} ({around:.3f})"
    print(f"| `{SCRIPTS[bench.name]} --steps {steps}` | {cells} | {median(walls):.1f} |", flush=True)
    return ratio - around <= DRAWING


def middle(run: Callable[[], object]) -> float:
    """Seconds: the median of three after a warm-up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25, help="of the grids (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the grids (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(where("cpu"))
    print("\n### CPU seconds to the first evaluation, least of three\n")
    print("| script | seconds | stock pipeline |\n|---|---|---|")
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        for name, file in SCRIPTS.items():
            pipeline, network = STOCK[name]
            first = FIRST.format(network=network)
            ours = seconds(first + SCRIPT.format(script=file, output=folder), folder)
            stock = seconds(first + PIPELINE.format(pipeline=pipeline, demo=str(ROOT / "demo" / name)), folder)
            print(f"| `{file}` | {ours:.1f} | {stock:.1f} |", flush=True)
            fine &= ours <= START
    starting()
    print("\n### The grid scripts: seconds, medians\n")
    print("| script | evaluations | limit | drawing | drawing / limit (spread) | with start and load |")
    print("|---|---|---|---|---|---|")
    for name in SCRIPTS:
        fine &= drawing(demo(name), options.steps, options.rounds)
    print("\n" + ("every goal is met" if fine else f"a goal is missed: {START:.0f} CPU s, {DRAWING:.2f} of the limit"))
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
