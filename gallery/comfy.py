"""The picture of ComfyUI's KSampler node, by a pipeline's arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

SKIPPING = ("dpm_2", "dpm_2_ancestral")


def comfy_arguments(sampler: str, steps: int, seed: int, find_sampler: Callable[[str], Callable]) -> dict[str, Any]:
    """`sampler`, `num_inference_steps` and `comfy_seed` for a sampler of ComfyUI's by name."""
    arguments = {"sampler": sampler, "num_inference_steps": steps, "comfy_seed": seed}
    if sampler in SKIPPING:
        return arguments | {"sampler": skipping_a_level(find_sampler(sampler)), "num_inference_steps": steps + 1}
    if sampler == "lms":
        return arguments | {"sampler": ending_in_denoised(find_sampler(sampler))}
    return arguments


def skipping_a_level(sampler: Callable) -> Callable:
    """Without the last level but one, as the node runs the samplers of `SKIPPING`, to which it gives one level more."""

    @functools.wraps(sampler)  # with its name and options
    def skipping(model: Any, x: Any, sigmas: Any, **options: Any) -> Any:
        levels = [i for i in range(len(sigmas)) if i != len(sigmas) - 2]
        return sampler(model, x, sigmas[levels], **options)

    return skipping


def ending_in_denoised(sampler: Callable) -> Callable:
    """With `denoised` in place of the last step, as ComfyUI's lms ends; k-diffusion's extrapolates to zero."""

    @functools.wraps(sampler)
    def ending(model: Any, x: Any, sigmas: Any, **options: Any) -> Any:
        x = sampler(model, x, sigmas[:-1], **options)
        return model(x, sigmas[-2] * x.new_ones(len(x)))

    return ending
