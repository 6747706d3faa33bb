"""The scripts as they are run: how long they take to start, and how long beside busy processes.

    uv run benchmarks/scripts.py                       # both tables, about ten minutes
    uv run benchmarks/scripts.py --only neighbours

The start is the CPU seconds of all threads, user and system, from the command to the first evaluation of the network,
with warm files: the least of three runs. Beside it stands what the stock pipeline takes for the same.
The neighbours are processes that never wait. A script runs beside none, one and two of them, with the settings of
OpenMP that it chooses by itself and with others. It needs a machine that does nothing else.

Exit status 1 if a goal (`START`, `BESIDE`, `QUIET`) is missed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

from models import ROOT, where

START = 6.0  # CPU seconds
BESIDE = {1: 1.7, 2: 2.6}  # busy processes: the most that a script's time may be of its time beside none
QUIET = 1.1  # beside none: of the time with what torch does by default
LIMIT = 60  # seconds of a run, which is ended then
SCRIPTS = {
    "test.py": ("StableDiffusionXLPipeline", "UNet2DConditionModel"),
    "test_flux.py": ("FluxPipeline", "FluxTransformer2DModel"),
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
SPIN, PASSIVE = {"GOMP_SPINCOUNT": "300000"}, {"OMP_WAIT_POLICY": "passive"}  # the first is the default, by its number
COMPARE = ["compare.py", "--against", "DPMSolverMultistepScheduler(use_karras_sigmas=True)", "--no-truth"]


def environment(**more: str) -> dict[str, str]:
    """This process's, without a GPU and without settings of OpenMP but these."""
    fixed = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    return {name: value for name, value in os.environ.items() if "OMP_" not in name} | fixed


def until_first(code: str, cache: str) -> float:
    """CPU seconds of a new process until its first evaluation, the least of three, after one that fills the caches."""
    line, settings = [sys.executable, "-c", code], environment(PYTHONPYCACHEPREFIX=cache)
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    runs = [subprocess.run(line, capture_output=True, text=True, env=settings, cwd=ROOT, check=True) for _ in range(4)]
    return min(float(run.stderr.split()[-1].rsplit("]", 1)[-1]) for run in runs[1:])


def starts(folder: str) -> bool:
    print("\n### CPU seconds to the first evaluation, least of three")
    print("\n| script | seconds | stock pipeline |\n|---|---|---|")
    fine = True
    for script, (pipeline, network) in SCRIPTS.items():
        first, demo = FIRST.format(network=network), str(ROOT / "demo" / ("flux" if "flux" in script else "sdxl"))
        ours = until_first(first + SCRIPT.format(script=script, output=folder), folder)
        stock = until_first(first + PIPELINE.format(pipeline=pipeline, demo=demo), folder)
        print(f"| `{script}` | {ours:.1f} | {stock:.1f} |", flush=True)
        fine &= ours <= START
    return fine


def seconds(arguments: list[str], busy: int, settings: dict[str, str]) -> float:
    """Of a script beside so many busy processes, at most `LIMIT`."""
    yes = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(busy)]
    line, quiet, start = [sys.executable, *arguments], subprocess.DEVNULL, time.perf_counter()
    try:
        run = subprocess.run(line, cwd=ROOT, env=environment(**settings), stdout=quiet, stderr=quiet, timeout=LIMIT)
        if run.returncode > 1:
            raise RuntimeError(f"{line} ended with {run.returncode}")
        return time.perf_counter() - start
    except subprocess.TimeoutExpired:
        return LIMIT
    finally:
        for process in yes:
            process.kill()
            process.wait()


def neighbours(folder: str) -> bool:
    cores = len(os.sched_getaffinity(0))
    columns: dict[str, dict[str, str]] = {"the script's choice": {}}
    for n in dict.fromkeys((2, cores)):
        columns |= {
            f"{n} threads, {how}": {"OMP_NUM_THREADS": f"{n}", **wait}
            for how, wait in (("spinning", SPIN), ("passive", PASSIVE))
        }
    columns["1 thread"] = {"OMP_NUM_THREADS": "1", **SPIN}
    print(f"\n### Seconds of a script beside busy processes, on {cores} cores\n")
    print(f"| script | busy | {' | '.join(columns)} |\n{'|---' * (len(columns) + 2)}|")
    drawing = ["--model", "demo", "--samplers", "euler", "dpmpp_2m", "--output", folder]
    fine = True
    for arguments in (*([script, *drawing] for script in SCRIPTS), COMPARE):
        chosen: dict[int, float] = {}
        for busy in (0, *BESIDE):
            found = {
                name: seconds([*arguments, "--device", "cpu"], busy, settings) for name, settings in columns.items()
            }
            chosen[busy], *others = found.values()
            cells = (f"{value:.1f}" if value < LIMIT else f"over {LIMIT}" for value in found.values())
            print(f"| `{arguments[0]}` | {busy} | {' | '.join(cells)} |", flush=True)
            fine &= chosen[busy] <= (BESIDE[busy] * chosen[0] if busy else QUIET * others[0])
    return fine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("starts", "neighbours"), help="one of the two tables")
    only = parser.parse_args(arguments).only
    print(where("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        fine = all([table(folder) for table in (starts, neighbours) if only in (None, table.__name__)])
    print("\n" + ("every goal is met" if fine else f"a goal is missed: {START} CPU s; {BESIDE}; {QUIET}"))
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
