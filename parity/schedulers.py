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

    scheduler = copy.deepcopy(scheduler)
    arguments = {}
    if tokens is not None:
        config = scheduler.config
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        values = (config.get(key, default) for key, default in zip(keys, (256, 4096, 0.5, 1.15)))
        arguments["mu"] = calculate_shift(tokens, *values)
        if not config.get("use_flow_sigmas"):
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
    timesteps = [float(t) for t in scheduler.timesteps]
    count = len(timesteps)
    if getattr(scheduler, "sigmas", None) is None:
        listed = [level_of(t) for t in timesteps]
        alpha = getattr(scheduler, "final_alpha_cumprod", None)
        listed.append(0.0 if alpha is None else math.sqrt((1 - float(alpha)) / float(alpha)))
    else:
        listed = scheduler.sigmas.tolist()
    levels = listed[:count]
    orders = getattr(scheduler, "order_list", None)
    if orders:
        starts = [i for i, order in enumerate(orders) if order == 1]
    elif getattr(scheduler, "order", 1) == 2:
        starts = list(range(0, count, 2))
        if getattr(scheduler, "sigmas_interpol", None) is not None:
            middle = scheduler.sigmas_interpol.tolist()
            back = 1 if "sigmas_down" in vars(scheduler) else 0
            levels = [middle[i - back] if i % 2 else level for i, level in enumerate(levels)]
        elif hasattr(scheduler, "mid_point_sigma"):
            levels = [math.sqrt(levels[i - 1] * level) if i % 2 else level for i, level in enumerate(levels)]
    else:
        starts = list(range(count))
    return levels, [levels[i] for i in starts] + [listed[-1]], starts
