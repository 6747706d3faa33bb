"""Draws every sampler of k-diffusion with SDXL into `output/`. `uv run test.py --help` has the options."""

import sys

from gallery.start import command, set_wait_policy


def draw() -> int:
    from gallery.options import SDXL, parse

    options = parse(SDXL)
    set_wait_policy(options)
    from gallery.grid import run  # after the options, so that --help is quick

    return run(SDXL, options)


if __name__ == "__main__":
    sys.exit(command(draw))
