"""The grid script at scale: several processes, many pictures, and kills at any moment.

    uv run benchmarks/scale.py                       # both tables
    uv run benchmarks/scale.py --processes 2         # 1/N of the drawing time? Needs as many idle cores
    uv run benchmarks/scale.py --kills 6             # 13 samplers x 50 prompts x 4 seeds, killed six times, resumed

All on the demo SDXL on a CPU with one thread a process. Exit status 1 if a picture is lost, broken or another one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from models import ROOT, where
from PIL import Image

from gallery.pictures import read_settings

sys.path.append(str(ROOT / "demo"))

from scenes import PALETTES, PLACES, SUBJECTS  # noqa: E402

WORDS = itertools.product(SUBJECTS.values(), PLACES.values(), PALETTES.values())
PROMPTS = [f"{subject[0]} {place[0]}, {palette[0]}" for subject, place, palette in WORDS]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder: Path, prompts: int, *options: object, processes: int = 1) -> list[str]:
    """test.py on the first of the prompts, writing to `folder`."""
    listed = folder.with_suffix(".txt")
    listed.write_text("\n".join(PROMPTS[:prompts]))
    launch: list[str] = []
    if processes > 1:
        # its launcher of several processes, which needs no GPU; with --cpu it would start one
        launch = f"-m accelerate.commands.launch --multi_gpu --num_processes {processes} --num_machines 1".split()
        launch += "--mixed_precision no --dynamo_backend no --main_process_port 0".split()
    fixed = ["test.py", "--model", "demo", "--device", "cpu", "--prompts", listed, "--output", folder]
    return [sys.executable, *launch, *map(str, fixed), *map(str, options)]


def pixels(folder: Path) -> dict[str, bytes]:
    return {file.name: Image.open(file).tobytes() for file in folder.glob("*-sample_*.png")}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    run = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return time.perf_counter() - start


def shared(processes: int, folder: Path) -> bool:
    """How the drawing time falls with the processes. What is not drawing is a second run that finds all pictures."""
    print("\n### A grid of 13 samplers x 4 prompts, 10 steps, one thread a process: seconds")
    print("\n| processes | whole | start and load | drawing | of one process's | 1 / N |\n|---|---|---|---|---|---|")
    drawing, drawn = [], []
    for n in (1, processes):
        arguments = command(folder / str(n), 4, "--steps", 10, processes=n)
        whole, rest = seconds(arguments), seconds([*arguments, "--resume"])
        drawing.append(whole - rest)
        drawn.append(pixels(folder / str(n)))
        share = drawing[-1] / drawing[0]
        print(f"| {n} | {whole:.1f} | {rest:.1f} | {drawing[-1]:.1f} | {share:.2f} | {1 / n:.2f} |", flush=True)
    print(f"\nthe same pictures: {drawn[0] == drawn[1]}, {len(drawn[0])}")
    return drawn[0] == drawn[1]


def killed(kills: int, prompts: int, seeds: int, folder: Path) -> bool:
    """A grid that is killed at random moments and resumed: what is on disk, and the memory over time."""
    options = ("--seeds", seeds, "--batch", seeds, "--steps", 2, "--width", 64, "--height", 64)
    arguments = command(folder / "killed", prompts, *options, "--resume")
    print(f"\n### A grid of 13 samplers x {prompts} prompts x {seeds} seeds in batches of {seeds}, 2 steps, 64x64")
    print("\n| run | ended | pictures on disk | other files | memory after 20 s, at the end, most: MiB |")
    print("|---|---|---|---|---|")
    moments = random.Random(0)
    for run in range(kills + 1):
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        start, end = time.monotonic(), moments.uniform(20, 60) if run < kills else float("inf")
        memory = []
        while process.poll() is None and time.monotonic() - start < end:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory += [int(found[1]) // 1024 for found in [re.search(r"VmRSS:\s+(\d+)", status)] if found]
            time.sleep(1)
        ended = f"{process.returncode}" if process.poll() is not None else "killed"
        process.kill()
        process.wait()
        there = [file.name for file in (folder / "killed").iterdir()]
        pictures = sum("-sample_" in name and name.endswith(".png") for name in there)
        other = sum(not name.endswith(".png") for name in there)
        cells = f"{memory[min(20, len(memory) - 1)]}, {memory[-1]}, {max(memory)}"
        print(f"| {run + 1} | {ended} | {pictures} | {other} | {cells} |", flush=True)
    drawn = pixels(folder / "killed")
    whole = sum(read_settings(folder / "killed" / name) is not None for name in drawn)
    again = min(3, prompts)
    seconds(command(folder / "whole", again, *options))  # the same batches
    same = {name: drawn.get(name) == picture for name, picture in pixels(folder / "whole").items()}
    print(f"\nwhole with their settings: {whole} of {13 * prompts * seeds}", end="; ")
    print(f"of the first {again} prompts, drawn again without a kill: {sum(same.values())} of {len(same)} are the same")
    return whole == 13 * prompts * seeds and all(same.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--processes", type=int, help="only this table (default: 2, and the other one)")
    add("--kills", type=int, help="only this table (default: 6, and the other one)")
    add("--prompts", type=int, default=50, help=f"at most {len(PROMPTS)} (default: %(default)s)")
    add("--seeds", type=int, default=4, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if not 1 <= options.prompts <= len(PROMPTS) or options.seeds < 1:
        parser.error(f"--prompts has to be in 1..{len(PROMPTS)}, --seeds at least 1")
    both = options.processes is None and options.kills is None
    print(f"demo SDXL, {len(os.sched_getaffinity(0))} cores; {where('cpu')}")
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        if both or options.processes is not None:
            fine &= shared(options.processes or 2, Path(folder))
        if both or options.kills is not None:
            fine &= killed(6 if options.kills is None else options.kills, options.prompts, options.seeds, Path(folder))
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
