"""Holds a k-diffusion sampler against a scheduler of diffusers or another sampler. `uv run compare.py --help`"""

import sys

from parity.options import parse_compare

if __name__ == "__main__":
    options, family = parse_compare()
    from parity.command import run  # after the options, so that --help is quick

    sys.exit(run(options, family))
