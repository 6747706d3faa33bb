"""Compares a k-diffusion sampler with a scheduler of diffusers or another sampler. `uv run compare.py --help`"""

import sys

from gallery.start import command, set_wait_policy


def compare() -> int:
    from parity.command import parse_compare, run

    options, family = parse_compare()
    set_wait_policy(options)
    return run(options, family)


if __name__ == "__main__":
    sys.exit(command(compare))
