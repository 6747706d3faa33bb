"""Draws every sampler of k-diffusion with FLUX into `output/`. `uv run test_flux.py --help` has the options."""

import sys

from gallery.start import command, set_wait_policy


def draw() -> int:
    from gallery.options import FLUX, parse

    options = parse(FLUX)
    set_wait_policy(options)
    from gallery.grid import run  # after the options, so that --help is quick

    return run(FLUX, options)


if __name__ == "__main__":
    sys.exit(command(draw))
