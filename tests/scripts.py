"""`test.py` and `test_flux.py`, as they are run and without a second import of torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

from conftest import ROOT
from diffusers.utils import logging
from transformers.utils import logging as transformers_logging

from gallery import grid
from gallery.options import Family, parse
from gallery.start import command

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments, script: str = "test.py", launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    line = [sys.executable, *launcher, ROOT / script, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


def run_here(family: Family, *arguments) -> int:
    """The exit status. `--model demo`, unless another is named."""
    model = () if "--model" in arguments else ("--model", "demo")
    return command_here(lambda: grid.run(family, parse(family, [*model, *map(str, arguments)])))


def command_here(script: Callable[[], int]) -> int:
    verbosity, handler = logging.get_verbosity(), signal.getsignal(signal.SIGINT)
    try:
        return command(script)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()
        signal.signal(signal.SIGINT, handler)
