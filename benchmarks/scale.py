"""The grid script at scale: 13 samplers x 50 prompts x 4 seeds, killed six times at random moments, and resumed.

    uv run benchmarks/scale.py

It runs SDXL's demo model on one CPU thread. The exit status is 1 if a picture is missing, broken or different.
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

from models import ROOT, positive, where
from PIL import Image

from gallery.pictures import read_settings

sys.path.append(str(ROOT / "demo"))

from scenes import PALETTES, PLACES, SUBJECTS  # noqa: E402

WORDS = itertools.product(SUBJECTS.values(), PLACES.values(), PALETTES.values())
PROMPTS = [f"{subject[0]} {place[0]}, {palette[0]}" for subject, place, palette in WORDS]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder: Path, prompts: int, *options: object) -> list[str]:
    """test.py on the first of the prompts, writing to `folder`."""
    listed = folder.with_suffix(".txt")
    listed.write_text("\n".join(PROMPTS[:prompts]))
    fixed = ["test.py", "--model", "demo", "--device", "cpu", "--prompts", listed, "--output", folder]
    return [sys.executable, *map(str, fixed), *map(str, options)]


def pixels(folder: Path) -> dict[str, bytes]:
    return {file.name: Image.open(file).tobytes() for file in folder.glob("*-sample_*.png")}


def killed(kills: int, prompts: int, seeds: int, folder: Path) -> bool:
    """A grid that is killed at random moments and resumed: what is on disk, and the memory over time."""
    options = ("--seeds", seeds, "--batch", seeds, "--steps", 2, "--width", 64, "--height", 64)
    arguments = command(folder / "killed", prompts, *options, "--resume")
    print(f"\n### A grid of 13 samplers x {prompts} prompts x {seeds} seeds in batches of {seeds}, 2 steps, 64x64")
    print("\n| run | exit | pictures on disk | other files | MiB after 20 s, at the end, peak |")
    print("|---|---|---|---|---|")
    moments = random.Random(0)
    for run in range(kills + 1):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, **quiet)
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
    subprocess.run(
        command(folder / "whole", again, *options), cwd=ROOT, env=ENVIRONMENT, check=True
    )  # the same batches
    same = {name: drawn.get(name) == picture for name, picture in pixels(folder / "whole").items()}
    print(f"\ncomplete, with settings: {whole} of {13 * prompts * seeds}", end="; ")
    print(f"of the first {again} prompts, drawn again in one run: {sum(same.values())} of {len(same)} are the same")
    return whole == 13 * prompts * seeds and all(same.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("kills", 6), ("prompts", 50), ("seeds", 4)):
        parser.add_argument(f"--{name}", type=positive, default=default, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    print(f"demo SDXL; {where('cpu')}")
    with tempfile.TemporaryDirectory() as folder:
        return int(not killed(options.kills, min(options.prompts, len(PROMPTS)), options.seeds, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
