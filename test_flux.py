"""Draws every sampler of k-diffusion with FLUX into `output/`. `uv run test_flux.py --help` has the options."""

import sys

from gallery.options import FLUX, parse

if __name__ == "__main__":
    options = parse(FLUX)
    from gallery.grid import run  # after the options, so that --help is quick

    sys.exit(run(FLUX, options))
