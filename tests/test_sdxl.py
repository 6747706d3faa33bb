"""StableDiffusionXLComfyPipeline against the stock pipeline, models that people retrained, and its schedulers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from conftest import PROMPT, relative, seeded, with_scheduler

from sdxl_comfy_pipeline import external, sampler_names

# rounding alone: the scheduler keeps its sigmas and timesteps in float32
EXACT = 1e-6
SMALL = {"height": 64, "width": 64, "output_type": "latent"}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
TRAILING, RESCALED = {"timestep_spacing": "trailing"}, {"num_inference_steps": 8, "guidance_rescale": 0.7}


def draw(pipe, **call):
    if not {"sigmas", "timesteps"} & call.keys():
        call.setdefault("num_inference_steps", 4)
    return pipe(**{"prompt": PROMPT, "generator": seeded(), **SMALL, **call}).images


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("EulerDiscrete", {}, call) for call in ({}, {"denoising_end": 0.6}, {"timesteps": [990, 700, 400, 100]})),
    ("EulerDiscrete", {}, {"sigmas": [12.0, 6.0, 2.0, 0.5, 0.1, 0.0]}),
    ("EulerDiscrete", V, RESCALED),
    ("EulerDiscrete", {"beta_schedule": "linear", "beta_end": 0.02}, RESCALED),
    # zero terminal SNR, Lin et al. 2023
    *(("EulerDiscrete", ZERO_SNR, call) for call in (RESCALED, {"num_inference_steps": 1})),
    # as CosXL's: the timestep is 0.25 ln sigma
    (
        "EulerDiscrete",
        {**V, "timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0},
        RESCALED,
    ),
    # these start from the level itself, which must not be taken for the 1 of those that keep alpha x
    *(
        ("EulerDiscrete", {"timestep_spacing": spacing}, call)
        for spacing in ("leading", "linspace", "trailing")
        for call in ({"sigmas": [0.9, 0.5, 0.2, 0.0]}, {"timesteps": [300, 200, 100]})
    ),
    # Lightning and Turbo: few steps on trailing timesteps, without guidance
    *(
        ("EulerDiscrete", TRAILING, {"num_inference_steps": steps, "guidance_scale": guidance})
        for steps in (1, 2, 4, 8)
        for guidance in (0.0, 1.0)
    ),
    *(
        ("EulerAncestralDiscrete", TRAILING, {"num_inference_steps": steps, "guidance_scale": 0.0})
        for steps in (1, 2, 4)
    ),
]


@pytest.mark.parametrize("kind, options, call", CASES)
def test_euler_is_the_stock_pipeline(sdxl64, kind, options, call):
    """The scheduler through the untouched parent, in float64. All arguments: test_side_by_side.py."""
    child, parent = (with_scheduler(one, kind, **options) for one in sdxl64)
    sampler = "euler_ancestral" if "Ancestral" in kind else "euler"
    # at zero terminal SNR sigma is 4096 in the first step, and the state that float64 keeps exactly in both
    # goes through timesteps that differ by the float32 rounding of sigma
    assert relative(draw(child, sampler=sampler, **call), draw(parent, **call)) < (5 * EXACT if options else EXACT)


def test_negative_sizes_reach_every_image_of_a_batch(sdxl64):
    """Each image gets the negative sizes on its negative half. (The stock pipeline deals them out alternately.)"""
    sizes = {"negative_original_size": (1024, 64), "negative_target_size": (64, 1024)}
    for pipe in sdxl64:
        alone = draw(pipe, generator=seeded(1), **sizes)
        batch = draw(pipe, prompt=[PROMPT] * 2, generator=[seeded(0), seeded(1)], **sizes)
        if pipe is sdxl64[0]:
            assert relative(batch[1:], alone) < 1e-9
        else:  # when this fails, diffusers has fixed it: then README's remark goes
            assert relative(batch[1:], alone) > 1e-6


@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_is_euler(sdxl64, zero_snr):
    """DDIM is Euler in these coordinates (Song et al. 2021, eq. 14), so its stock pipeline gives the same picture.

    At zero terminal SNR, where DDIM begins at an infinite sigma, 4096 stands in: 1 / 4096 of the latents is off.
    """
    options = {"clip_sample": False, "set_alpha_to_one": True, **TRAILING, **(ZERO_SNR if zero_snr else {})}
    child, parent = (with_scheduler(one, "DDIM", **options) for one in sdxl64)
    assert relative(draw(child), draw(parent)) < (1e-3 if zero_snr else 5 * EXACT)


def test_levels_cut_in_two_are_one_run(sdxl64):
    """Latents beside the caller's own levels are x0 + sigma noise, in and out, whatever the scheduler's scale."""
    child = with_scheduler(sdxl64[0], "DDIM")
    levels = [14.0, 6.0, 2.0, 0.5, 0.0]
    whole, first = (draw(child, schedule=one) for one in (levels, levels[:3]))
    assert relative(draw(child, schedule=levels[2:], latents=first), whole) < 1e-12


def test_quantize_timesteps_is_what_dpm_solver_does(sdxl64):
    """With Karras levels diffusers' DPM-Solver rounds timesteps. Rounding here too removes the difference."""
    child, parent = (with_scheduler(one, "DPMSolverMultistep", use_karras_sigmas=True) for one in sdxl64)
    call = {"num_inference_steps": 12}
    expected, ours = draw(parent, **call), functools.partial(draw, child, sampler="dpmpp_2m", **call)
    assert relative(ours(quantize_timesteps=True), expected) < 1e-5  # the first timestep is rounded from another level
    assert relative(ours(quantize_timesteps=False), expected) > 1e-4  # 4e-4 on a closed-form model


@pytest.mark.parametrize("sampler", sampler_names())
def test_every_sampler_ends_right_from_zero_terminal_snr(sdxl, sampler, monkeypatch):
    """On the exact v of latents drawn from N(0, 0.7^2) every sampler ends with that spread, from sigma = 4096 on.

    v = alpha noise - sqrt(1 - alpha^2) x0 (Salimans & Ho 2022), of which x / (...) is the expectation given x.
    """
    child = with_scheduler(sdxl, "EulerDiscrete", **ZERO_SNR)
    variance, alphas = 0.7**2, child.scheduler.alphas_cumprod.double().clamp(min=2**-24)
    trained = external.DiscreteSchedule((1 / alphas - 1).sqrt().float(), quantize=False)

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


def test_unknown_prediction_type(sdxl):
    with pytest.raises(ValueError, match="`scheduler`: needs betas and 'epsilon' or 'v_prediction'"):
        with_scheduler(sdxl, "EulerDiscrete", prediction_type="sample")(PROMPT)
