"""KDiffusionScheduler in stock pipelines: equal to the stock schedulers and to our own pipelines, and its traps."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import PROMPT, relative, seeded
from small_pipelines import MASK, PICTURE, PIPELINES, LevelNoise, built, small_pipeline

from scheduling_k_diffusion import KDiffusionScheduler, find_sampler, sampler_names, sampling

SAMPLERS = [name for name in sampler_names() if name != "dpm_adaptive"]
STEPS = 4
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# float32: the two do the same arithmetic in another order, four or five roundings of 6e-8 in each of a few steps
CLOSE = 1e-5


@functools.cache
def made(name: str, n: int = 1) -> tuple[Any, dict[str, Any], Any]:
    pipe, arguments = small_pipeline(name, n)
    return pipe, arguments, pipe.scheduler


def draw(name: str, scheduler: Any = None, n: int = 1, steps: int = STEPS, generator: Any = "seeded", **more: Any):
    """Latents of a small pipeline with this scheduler; None: its own."""
    pipe, arguments, own = made(name, n)
    scheduler = copy.deepcopy(own) if scheduler is None else scheduler
    if generator == "seeded":
        generator = seeded() if n == 1 else [seeded(i) for i in range(n)]
    arguments = {**arguments, "num_inference_steps": steps, "generator": generator, **more}
    if name.startswith("modular"):
        pipe.update_components(scheduler=scheduler)
        return pipe(**arguments, output="latents")
    pipe.scheduler = scheduler
    return pipe(**arguments, output_type="latent")[0]


def ours(name: str, sampler: Any = "euler", **options: Any) -> KDiffusionScheduler:
    return KDiffusionScheduler.from_scheduler(made(name)[2], sampler=sampler, **options)


SMALL = [name for name in PIPELINES if name != "wan_video"]


@pytest.mark.parametrize("name", SMALL)
def test_euler_is_the_stock_scheduler(name):
    assert relative(draw(name, ours(name)), draw(name)) < CLOSE


@pytest.mark.parametrize("name", SMALL)
def test_samplers_in_every_small_pipeline(name):
    """Finite, and an image does not depend on the batch it was drawn in: with a generator each, or none to step.

    Every other sampler, so that each pipeline has stochastic ones, ones with history and ones with two evaluations.
    """
    slow = name == "qwen_edit"  # makes a megapixel of its picture
    for sampler in SAMPLERS[:1] if slow else SAMPLERS[SMALL.index(name) % 2 :: 2]:
        pair = draw(name, ours(name, sampler), n=2, steps=2)
        assert pair.isfinite().all(), sampler
        # float32 sums of another order in a batch, in which the first of two steps, from pure noise, multiplies errors
        assert relative(draw(name, ours(name, sampler), steps=2), pair[:1]) < 10 * CLOSE, sampler


DPM, HEUN, FLOW_HEUN = "DPMSolverMultistep", "HeunDiscrete", "FlowMatchHeunDiscrete"
KARRAS = {"use_karras_sigmas": True}
STOCK = [
    *(("sd_text", HEUN, {}, "heun"), ("sd_inpaint", HEUN, {}, "heun"), ("sd3_text", FLOW_HEUN, {}, "heun")),
    # diffusers' multistep solver ends with a step of order 1 to zero, as k-diffusion's; below 15 steps it asks for it.
    # It keeps its latents in another scale, and added noise too
    *((name, DPM, {"final_sigmas_type": "zero"}, "dpmpp_2m") for name in ("sd_text", "sd_inpaint")),
    *(("sd_text", "EulerDiscrete", {"prediction_type": kind}, "euler") for kind in ("v_prediction", "sample")),
    # DDIM without eta is Euler's method, on latents divided by sqrt(1 + sigma^2)
    *(
        ("sd_text", "DDIM", {"prediction_type": kind, "clip_sample": False, "set_alpha_to_one": True}, "euler")
        for kind in ("epsilon", "v_prediction", "sample")
    ),
    # `invert_sigmas` is Mochi's: t is 1 - t, and the network predicts the velocity the other way
    *(
        ("sd3_text", "FlowMatchEulerDiscrete", options, "euler")
        for options in ({"shift": 1.0, **KARRAS}, {"shift": 1.0, "invert_sigmas": True}, {"shift_terminal": 0.1})
    ),
]


@pytest.mark.parametrize("name, stock, options, sampler", STOCK)
def test_samplers_are_diffusers_own(name, stock, options, sampler):
    """Over the same levels, for each kind of prediction and of scale."""
    scheduler = getattr(diffusers, f"{stock}Scheduler").from_config(made(name)[2].config, **options)
    expected = draw(name, copy.deepcopy(scheduler))
    found = draw(name, KDiffusionScheduler.from_scheduler(scheduler, sampler=sampler))
    assert relative(found, expected) < (CLOSE if sampler == "euler" else 2 * CLOSE)  # twice the evaluations, or history


def test_a_pipeline_passes_levels():
    for name, levels in (
        ("sd_text", {"timesteps": [900, 500, 100]}),
        ("sd_text", {"sigmas": [9.0, 3.0, 1.0, 0.0]}),
        ("sd_text", {"sigmas": [12.0, 4.0, 1.0, 0.2]}),  # as they are: it ends at 0.2
        ("flux_text", {"sigmas": [0.9, 0.5, 0.2]}),
    ):
        assert relative(draw(name, ours(name), steps=3, **levels), draw(name, steps=3, **levels)) < CLOSE


@pytest.mark.parametrize(
    "options", [{"sampler": "dpm_2"}, {"sampler": "dpm_fast"}, {"schedule": [0.9, 0.7, 0.6, 0.3, 0.2, 0.1, 0]}], ids=str
)
@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_a_pipeline_passes_timesteps_of_flow(kind, options):
    """CogView4's and GLM-Image's networks get t before its shift to m t / (1 + (m - 1) t) (Esser et al. 2024)."""
    base = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    scheduler, m = KDiffusionScheduler.from_scheduler(base, **options), 3.25
    unshifted = np.linspace(1000, 1, 6)
    scheduler.set_timesteps(timesteps=unshifted, sigmas=unshifted / 1000, mu=m if kind == "linear" else math.log(m))
    if scheduler.base.timesteps[1] != pytest.approx(unshifted[1]):
        pytest.skip("this diffusers drops the timesteps that a pipeline passes beside levels")  # 0.40, 0.41
    for s, time in zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps.tolist(), strict=True):
        assert time == pytest.approx(1000 * s / (s + m * (1 - s)), rel=1e-5)  # the base's are float32


def same_in_float64(child: Any, parent: Any, arguments: dict[str, Any], sampler: str, **options: Any) -> None:
    """To 1e-12, which float64 keeps over 20 layers."""
    own = child.scheduler
    arguments = {"prompt": PROMPT, "num_inference_steps": 3, "height": 32, "width": 32, **arguments}
    expected = child(**arguments, generator=seeded(), output_type="latent", sampler=sampler, **options).images
    try:
        parent.scheduler = KDiffusionScheduler.from_scheduler(own, sampler=sampler, **options)
        found = parent(**arguments, generator=seeded(), output_type="latent").images
    finally:
        parent.scheduler = own
    # dpm_fast places its levels in float32, which leaves the state that the pipeline gives 6e-8 beside its own
    assert relative(found, expected) < (1e-5 if sampler == "dpm_fast" else 1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_sdxl_pipeline_in_float64(sdxl64, sampler):
    """The same sampler, noise and levels from the generator."""
    same_in_float64(*sdxl64, {}, sampler, schedule=sampling.get_sigmas_karras(3, 0.0292, 14.6146))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_flux_pipeline_in_float64(flux64, sampler):
    """Below t = 1: there the network sees pure noise here, and there noise times a t below 1."""
    options = {}
    if "noise_sampler" in find_sampler(sampler).arguments and sampler != "dpm_fast":
        options["noise_sampler"] = LevelNoise(torch.zeros(1, 4, 64, dtype=torch.float64))
    arguments = {"sigmas": [0.95, 0.7, 0.4], "max_sequence_length": 64}
    same_in_float64(*flux64, arguments, sampler, sampler_kwargs=options)


def test_inpainting_with_the_demo_model(sdxl):
    """As in SDXL's stock pipeline. ControlNet's pipeline: test_recipes.py."""
    arguments = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent", "height": 64, "width": 64}
    arguments |= {"image": PICTURE.resize((64, 64)), "mask_image": MASK.resize((64, 64)), "strength": 0.6}
    pipe = built("StableDiffusionXLInpaintPipeline", sdxl.components)
    expected = pipe(**arguments, generator=seeded())[0]
    pipe.scheduler = KDiffusionScheduler.from_scheduler(pipe.scheduler)
    assert relative(pipe(**arguments, generator=seeded())[0], expected) < CLOSE
