"""How long `test.py` and `test_flux.py` take from the command to the first evaluation of the network, in CPU seconds.

    uv run benchmarks/startup.py

Each script runs three times with warm files: Python's bytecode is there, as after a first run, and the disk is cached.
Beside it stands what the stock pipeline takes for the same: its imports, the demo model, one prompt. The numbers are of
all threads, user and system, the least of three. Exit status 1 if a script takes more than 6 s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

from models import ROOT, where

LIMIT = 6.0  # CPU seconds
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


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    print(where("cpu"))
    print(f"{'':14}{'script':>8}{'stock pipeline':>16}   CPU seconds to the first evaluation")
    slow = False
    with tempfile.TemporaryDirectory() as folder:
        for name, script in (("sdxl", "test.py"), ("flux", "test_flux.py")):
            pipeline, network = STOCK[name]
            first = FIRST.format(network=network)
            ours = seconds(first + SCRIPT.format(script=script, output=folder), folder)
            demo = str(ROOT / "demo" / name)
            stock = seconds(first + PIPELINE.format(pipeline=pipeline, demo=demo), folder)
            print(f"{script:14}{ours:8.1f}{stock:16.1f}")
            slow |= ours > LIMIT
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
