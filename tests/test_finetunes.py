"""SDXL as people retrain it: v prediction with zero terminal SNR, few steps. For LCM see test_recipes.py."""

from __future__ import annotations

import copy

import pytest
from conftest import PROMPT, relative, seeded
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)

from sdxl_comfy_pipeline import StableDiffusionXLComfyPipeline, external, sampler_names

CLOSE = 1e-5  # float32 rounding; see test_side_by_side.py
CALL = {"prompt": PROMPT, "height": 64, "width": 64, "output_type": "latent", "num_inference_steps": 4}


def pair(pipe, scheduler):
    """Child and parent on the same weights with this scheduler."""
    pipes = [
        one(**{**pipe.components, "scheduler": copy.deepcopy(scheduler)})
        for one in (StableDiffusionXLComfyPipeline, StableDiffusionXLPipeline)
    ]
    for one in pipes:
        one.set_progress_bar_config(disable=True)
    return pipes


def draw(pipe, **call):
    return pipe(**{"generator": seeded(), **CALL, **call}).images


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_lightning(sdxl, steps, guidance):
    """Euler on trailing timesteps, few steps, no guidance."""
    child, parent = pair(sdxl, EulerDiscreteScheduler.from_config(sdxl.scheduler.config, timestep_spacing="trailing"))
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    assert relative(draw(child, **call), draw(parent, **call)) < CLOSE
    assert float(child.noise_levels(steps)[0]) == pytest.approx(14.6146, abs=1e-3)  # from pure noise, t = 999


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_turbo(sdxl, steps):
    """Ancestral Euler on trailing timesteps, no guidance. The step noise is the stock pipeline's as well."""
    scheduler = EulerAncestralDiscreteScheduler.from_config(sdxl.scheduler.config, timestep_spacing="trailing")
    child, parent = pair(sdxl, scheduler)
    call = {"num_inference_steps": steps, "guidance_scale": 0.0}
    assert relative(draw(child, sampler="euler_ancestral", **call), draw(parent, **call)) < CLOSE


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("call", [{}, {"guidance_rescale": 0.7}, {"num_inference_steps": 1}], ids=str)
def test_v_prediction_with_zero_terminal_snr(sdxl, call):
    """Lin et al. 2023: the whole recipe, with the rescaled guidance, is the stock pipeline's."""
    child, parent = pair(sdxl, EulerDiscreteScheduler.from_config(sdxl.scheduler.config, **ZERO_SNR))
    # sigma begins at 4096, of whose rounding (2e-4) the first step keeps a share in the latents
    assert relative(draw(child, **call), draw(parent, **call)) < 10 * CLOSE


@pytest.mark.parametrize("sampler", sampler_names())
def test_every_sampler_ends_right_from_zero_terminal_snr(sdxl, sampler, monkeypatch):
    """On the exact v of latents drawn from N(0, 0.7^2) every sampler ends with that spread, from sigma = 4096 on.

    v = alpha noise - sqrt(1 - alpha^2) x0 (Salimans & Ho 2022), of which x / (...) is the expectation given x.
    """
    child, _ = pair(sdxl, EulerDiscreteScheduler.from_config(sdxl.scheduler.config, **ZERO_SNR))
    variance = 0.7**2
    alphas_cumprod = child._trained_with()[1]
    trained = external.DiscreteSchedule(((1 - alphas_cumprod) / alphas_cumprod).sqrt().float(), quantize=False)

    def exact_v(x, timestep, **kwargs):
        sigma = trained.t_to_sigma(timestep).view(-1, 1, 1, 1)
        alpha, beta = 1 / (sigma**2 + 1).sqrt(), sigma / (sigma**2 + 1).sqrt()
        total = alpha**2 * variance + beta**2
        x0, noise = alpha * variance / total * x, beta / total * x
        return (alpha * noise - beta * x0,)

    monkeypatch.setattr(child.unet, "forward", exact_v)
    call = {"guidance_scale": 1.0, "num_inference_steps": 100, "height": 256, "width": 256, "schedule": "exponential"}
    options = {"rtol": 5e-4} if sampler == "dpm_adaptive" else {}  # its error is relative, and 4096 / 0.7 is large
    latents = draw(child, sampler=sampler, sampler_kwargs=options, **call)
    # 4096 numbers: their spread is known to 1/sqrt(2 * 4096) = 1.1%; and the error of first order of ancestral Euler
    assert latents.std().item() == pytest.approx(0.7, rel=0.08)
