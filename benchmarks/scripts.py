"""The time of the scripts: for one step, and while other processes are busy.

    uv run benchmarks/scripts.py                       # both tables, about ten minutes
    uv run benchmarks/scripts.py --only neighbours

"starts": one step of Euler's method, from the command to the picture, compared with the stock pipeline. CPU seconds of
all threads, user and system, with warm files, the minimum of three runs.
"neighbours": a script runs with zero, one and two busy processes, with its own OpenMP settings and with others. The
machine has to be idle otherwise.

The exit status is 1 if a goal (`START`, `BESIDE`, `QUIET`) is missed.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time

from models import PROMPT, ROOT, where

START = 1.1  # of the stock pipeline's CPU seconds
BESIDE = {1: 1.7, 2: 2.6}  # busy processes: the largest allowed ratio of a script's time to its time without them
QUIET = 1.1  # without busy processes: of the time with torch's default settings
LIMIT = 60  # seconds, after which a run is stopped
SCRIPTS = {"test.py": ("sdxl", "StableDiffusionXLPipeline"), "test_flux.py": ("flux", "FluxPipeline")}
SPIN, PASSIVE = {"GOMP_SPINCOUNT": "300000"}, {"OMP_WAIT_POLICY": "passive"}  # the first is libgomp's default
COMPARE = ["compare.py", "--against", "DPMSolverMultistepScheduler(use_karras_sigmas=True)", "--no-truth"]
STOCK = """
import diffusers
pipe = diffusers.{pipeline}.from_pretrained({demo!r})
pipe({prompt!r}, num_inference_steps=1).images[0].save({file!r})
"""


def seconds(arguments: list[str], busy: int = 0, **settings: str) -> tuple[float, float]:
    """Wall-clock (at most `LIMIT`) and CPU seconds of Python with these arguments, with `busy` busy processes.

    The environment has only these OpenMP settings, and no GPU.
    """
    dropped = ("OMP_", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if not any(one in name for one in dropped)}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **settings}
    neighbours = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(busy)]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        line = [sys.executable, *arguments]
        run = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
        if run.returncode > 1:  # 1 of compare.py: the sides differ
            raise RuntimeError(run.stderr)
    except subprocess.TimeoutExpired:
        return LIMIT, LIMIT
    else:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter() - start, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    finally:
        for process in neighbours:
            process.kill()
            process.wait()


def starts(folder: str) -> bool:
    print("\n### CPU seconds of one step, from the command to the picture, minimum of three")
    print("\n| script | seconds | stock pipeline |\n|---|---|---|")
    fine = True
    for script, (name, pipeline) in SCRIPTS.items():
        ours = [script, "--model", "demo", "--device", "cpu", "--samplers", "euler", "--steps", "1", "--output", folder]
        demo, file = str(ROOT / "demo" / name), f"{folder}/stock.png"
        stock = ["-c", STOCK.format(pipeline=pipeline, demo=demo, prompt=PROMPT, file=file)]
        # its own bytecode cache, which the first of four runs fills
        cpu = [min([seconds(one, PYTHONPYCACHEPREFIX=folder)[1] for _ in range(4)][1:]) for one in (ours, stock)]
        print(f"| `{script}` | {cpu[0]:.1f} | {cpu[1]:.1f} |", flush=True)
        fine &= cpu[0] <= START * cpu[1]
    return fine


def neighbours(folder: str) -> bool:
    cores = len(os.sched_getaffinity(0))
    columns: dict[str, dict[str, str]] = {"the script's choice": {}}
    for n in dict.fromkeys((2, cores)):
        columns[f"{n} threads, spinning"] = {"OMP_NUM_THREADS": str(n), **SPIN}
        columns[f"{n} threads, passive"] = {"OMP_NUM_THREADS": str(n), **PASSIVE}
    columns["1 thread"] = {"OMP_NUM_THREADS": "1", **SPIN}
    print(f"\n### Seconds of a script with busy processes, on {cores} cores\n")
    print(f"| script | busy | {' | '.join(columns)} |\n{'|---' * (len(columns) + 2)}|")
    drawing = ["--model", "demo", "--samplers", "euler", "dpmpp_2m", "--output", folder]
    fine = True
    for arguments in (*([script, *drawing] for script in SCRIPTS), COMPARE):
        chosen: dict[int, float] = {}
        for busy in (0, *BESIDE):
            line = [*arguments, "--device", "cpu"]
            chosen[busy], *others = [seconds(line, busy, **settings)[0] for settings in columns.values()]
            cells = (f"{value:.1f}" if value < LIMIT else f"over {LIMIT}" for value in (chosen[busy], *others))
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
    print("\n" + ("every goal is met" if fine else f"a goal is missed: {START=}, {BESIDE=}, {QUIET=}"))
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
