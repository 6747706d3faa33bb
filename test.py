"""Draws every sampler of k-diffusion with SDXL into `output/`. `uv run test.py --help` has the options."""

import sys

from gallery.options import SDXL, parse

if __name__ == "__main__":
    options = parse(SDXL)
    from gallery.grid import run  # after the options, so that --help is quick

    sys.exit(run(SDXL, options))
