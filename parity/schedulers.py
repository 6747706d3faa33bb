"""Schedulers of diffusers: set up as the stock pipelines do it, and what their lists say of steps and levels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gallery.models import reason
from gallery.refused import Refused


def prepared(scheduler: Any, steps: int, tokens: int | None = None) -> Any:
    """A copy with its timesteps set as the stock pipeline sets them; FLUX's for that many tokens of the picture."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps  # slow to import

    scheduler, arguments = copy.deepcopy(scheduler), {}
    if tokens is not None:
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        shift = (scheduler.config.get(name, default) for name, default in defaults.items())
        arguments["mu"] = calculate_shift(tokens, *shift)
        if not scheduler.config.get("use_flow_sigmas"):
            arguments["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    try:
        retrieve_timesteps(scheduler, steps, "cpu", **arguments)
    except Exception as error:
        stock = "StableDiffusionXLPipeline" if tokens is None else "FluxPipeline"
        raise Refused(f"{type(scheduler).__name__} does not run in {stock}: {reason(error)}") from error
    return scheduler


def levels_of(scheduler: Any, level_of: Callable[[float], float]) -> tuple[list[float], list[float], list[int]]:
    """Of a scheduler with its timesteps set: the levels of its evaluations, of its steps and their end, the starts.

    A scheduler of order 2 lists a level twice or has midpoints between; its steps begin at every other evaluation.
    A DPMSolverSinglestepScheduler begins a step where its order is 1 and goes on from there.

    Args:
        level_of: the level of a timestep.
    """
    count = len(scheduler.timesteps)
    if getattr(scheduler, "sigmas", None) is None:
        alpha = float(getattr(scheduler, "final_alpha_cumprod", None) or 1.0)
        listed = [*(level_of(float(t)) for t in scheduler.timesteps), math.sqrt((1 - alpha) / alpha)]
    else:
        listed = scheduler.sigmas.tolist()
    levels, starts = listed[:count], list(range(count))
    if orders := getattr(scheduler, "order_list", None):
        starts = [i for i, order in enumerate(orders) if order == 1]
    elif getattr(scheduler, "order", 1) == 2:
        starts = starts[::2]
        if getattr(scheduler, "sigmas_interpol", None) is not None:
            middle, back = scheduler.sigmas_interpol.tolist(), int("sigmas_down" in vars(scheduler))
            levels = [middle[i - back] if i % 2 else level for i, level in enumerate(levels)]
        elif hasattr(scheduler, "mid_point_sigma"):
            levels = [math.sqrt(levels[i - 1] * level) if i % 2 else level for i, level in enumerate(levels)]
    return levels, [levels[i] for i in starts] + [listed[-1]], starts
