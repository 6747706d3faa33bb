"""KDiffusionScheduler over each kind of base: k-diffusion's functions over the same network, to 1e-5."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from conftest import relative, seeded
from pretend_mps import PretendMps, placed
from small_pipelines import LevelNoise, over_k_diffusion, random, run_over_k_diffusion, small_pipeline
from test_scheduler import BETAS, CLOSE, SAMPLERS

from scheduling_k_diffusion import KDiffusionScheduler, find_sampler, sampling

STEPS = 5
V = {**BETAS, "prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
CONTINUOUS = {**V, "timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
UNCLIPPED = {"clip_sample": False, "steps_offset": 1}
BASES = {
    "epsilon": diffusers.EulerDiscreteScheduler(**BETAS),
    "v": diffusers.HeunDiscreteScheduler(**V),
    "zero SNR": diffusers.EulerDiscreteScheduler(**ZERO_SNR),
    "vp": diffusers.DDIMScheduler(**BETAS, **UNCLIPPED),
    "vp, zero SNR": diffusers.DDIMScheduler(**ZERO_SNR, clip_sample=False),
    "vp, multistep": diffusers.DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing"),
    "continuous": diffusers.EulerDiscreteScheduler(**CONTINUOUS),
    "EDM": diffusers.EDMEulerScheduler(),
    "EDM, v": diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
    "EDM, cosine": diffusers.CosineDPMSolverMultistepScheduler(sigma_data=1.0, sigma_max=50.0),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, inverted": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "flow, UniPC": diffusers.UniPCMultistepScheduler(**FLOW),
}


def explicit(name: str) -> list[float]:
    return [0.93, 0.61, 0.6, 0.33, 0.12] if "flow" in name else [13.1, 4.3, 4.2, 1.1, 0.2]


def loop(scheduler: Any, **given: Any) -> torch.Tensor:
    """The last sample over a network that depends on the timestep, whatever that counts."""
    scheduler.set_timesteps(**given)
    x = random(1, 2, 3, 3).double() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        output = (scheduler.scale_model_input(x, t) * 1.3 + (t.double() / 97).sin()).sin()
        x = scheduler.step(output, float(t), x, generator=seeded()).prev_sample  # a number will do
    return x


@pytest.mark.parametrize("name", BASES)
def test_every_sampler_is_k_diffusions(name):
    """In float64, with step noise that depends on the levels alone. Over given levels too, where a base takes them."""
    base, noise, ways = BASES[name], LevelNoise(), [{"num_inference_steps": STEPS}]
    if "EulerDiscrete" in type(base).__name__:
        ways.append({"sigmas": [*explicit(name), *([] if "flow" in name else [0.0])]})
    for given in ways:
        for sampler in SAMPLERS:
            options = {"noise_sampler": noise} if "noise_sampler" in find_sampler(sampler).arguments else {}
            found = loop(KDiffusionScheduler.from_scheduler(base, sampler=sampler, sampler_kwargs=options), **given)
            assert relative(found, loop(over_k_diffusion(base, sampler, noise), **given)) < CLOSE, (sampler, given)


def ends(base: Any) -> tuple[float, float]:
    """The lowest and the highest level that the network was trained with, or that the config names."""
    if hasattr(base, "alphas_cumprod") and not base.config.get("use_flow_sigmas"):
        sigmas = (1 / base.alphas_cumprod.double().clamp(min=2**-24) - 1).sqrt()
        return base.config.get("sigma_min") or float(sigmas[0]), base.config.get("sigma_max") or float(sigmas[-1])
    if "sigma_data" in base.config:
        return base.config.sigma_min, base.config.sigma_max
    shift = base.config.get("flow_shift", base.config.get("shift"))
    return shift / (shift + 9999), 1.0


@pytest.mark.parametrize("name", BASES)
def test_schedules(name):
    """k-diffusion's levels, and a list; the first sample has the noise of the list's first level."""
    listed = [*explicit(name), 0.05]
    for levels in (sampling.get_sigmas_karras(STEPS, *ends(BASES[name])), listed):
        scheduler = KDiffusionScheduler.from_scheduler(BASES[name], schedule=levels)
        scheduler.set_timesteps(STEPS)
        found = 1 - scheduler.sigmas if "inverted" in name else scheduler.sigmas
        torch.testing.assert_close(found, torch.as_tensor(levels), rtol=1e-5, atol=1e-6)
    scale = 1.0 if "flow" in name else listed[0] / (math.hypot(1, listed[0]) if "vp" in name else 1)
    assert float(getattr(scheduler, "init_noise_sigma", 1.0)) == pytest.approx(scale)


@pytest.mark.parametrize("name", ["sd_inpaint", "sd3_image", "flux_image"])
def test_every_sampler_in_a_pipeline_is_k_diffusions(name):
    """Part-way, with timesteps that the network gets."""
    pipe, arguments = small_pipeline(name)
    base, noise = pipe.scheduler, LevelNoise()

    def run(scheduler: Any) -> torch.Tensor:
        pipe.scheduler = scheduler
        return pipe(**arguments, num_inference_steps=4, generator=seeded(), output_type="latent")[0]

    for sampler in SAMPLERS:
        options = {"noise_sampler": noise} if "noise_sampler" in find_sampler(sampler).arguments else {}
        expected = run_over_k_diffusion(run, base, sampler, noise)
        found = run(KDiffusionScheduler.from_scheduler(base, sampler=sampler, sampler_kwargs=options))
        assert relative(found, expected) < CLOSE, sampler


@pytest.mark.parametrize("name", ["epsilon", "vp", "EDM", "EDM, cosine", "flow", "flow, UniPC"])
def test_no_float64_on_the_device(name):
    base = BASES[name]
    with PretendMps():
        for sampler in SAMPLERS:
            for options in ({}, {"s_churn": 1.0}) if sampler in ("euler", "heun", "dpm_2") else ({},):
                scheduler = KDiffusionScheduler.from_scheduler(base, sampler=sampler, sampler_kwargs=options)
                scheduler.set_timesteps(STEPS, device="mps")
                sample = scheduler.add_noise(*(placed(random(1, 2, 3, 3)) for _ in "12"), scheduler.timesteps[:1])
                for t in scheduler.timesteps:
                    given = scheduler.scale_model_input(sample, t)
                    sample = scheduler.step(given * 0.5, t, sample, generator=seeded()).prev_sample
                assert sample.device.type == "mps" and sample.isfinite().all()
