"""StableDiffusionXLComfyPipeline against the stock pipeline, its options, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import PROMPT, relative, seeded
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)

from sdxl_comfy_pipeline import StableDiffusionXLComfyPipeline

# rounding alone: the scheduler keeps its sigmas and timesteps in float32
EXACT = 1e-6
SMALL = {"height": 64, "width": 64, "output_type": "latent"}
CONTINUOUS = {"prediction_type": "v_prediction", "timestep_type": "continuous"}  # the timestep is 0.25 ln sigma


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"guidance_rescale": 0.7},
        {"prompt": [PROMPT, "a red car in the desert"], "negative_prompt": ["snow", ""]},
        {"denoising_end": 0.6},
        {"sigmas": [12.0, 6.0, 2.0, 0.5, 0.1, 0.0]},
        {"timesteps": [990, 700, 400, 100]},
    ],
    ids=lambda call: ",".join(call) + str(call.get("sigmas", "")) or "default",
)
def test_euler_is_the_stock_pipeline(sdxl64, call):
    """EulerDiscreteScheduler through the untouched parent, in float64. All arguments: test_side_by_side.py."""
    child, parent = sdxl64
    call = {"prompt": PROMPT, "num_inference_steps": 4, **SMALL, **call}
    if "sigmas" in call or "timesteps" in call:
        del call["num_inference_steps"]
    expected = parent(generator=seeded(), **call).images
    assert relative(child(generator=seeded(), sampler="euler", **call).images, expected) < EXACT


def test_negative_sizes_reach_every_image_of_a_batch(sdxl64):
    """Each image gets the negative sizes on its negative half. (The stock pipeline deals them out alternately.)"""
    child, parent = sdxl64
    sizes = {"negative_original_size": (1024, 64), "negative_target_size": (64, 1024)}
    call = {"num_inference_steps": 4, **SMALL, **sizes}

    def both(pipe):
        alone = pipe(PROMPT, generator=seeded(1), **call).images
        batch = pipe([PROMPT] * 2, generator=[seeded(0), seeded(1)], **call).images
        return relative(batch[1:], alone)

    assert both(child) < 1e-9
    assert both(parent) > 1e-6  # when this fails, diffusers has fixed it: then README's remark goes


def with_scheduler(pipe, scheduler):
    return type(pipe)(**{**pipe.components, "scheduler": scheduler}, add_watermarker=False)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing"},
        {"beta_schedule": "linear", "beta_end": 0.02},
        CONTINUOUS | {"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0},  # as CosXL's
    ],
    ids=str,
)
def test_euler_is_the_stock_pipeline_with_other_schedulers(sdxl64, options):
    """v prediction, zero terminal SNR and other betas: the numbers follow, whatever the network makes of them."""
    child, parent = sdxl64
    scheduler = EulerDiscreteScheduler.from_config(parent.scheduler.config, **options)
    child, parent = (quiet(with_scheduler(pipe, scheduler)) for pipe in (child, parent))
    call = {"num_inference_steps": 8, "guidance_rescale": 0.7, **SMALL}
    expected = parent(PROMPT, generator=seeded(), **call).images
    # at zero terminal SNR sigma is 4096 in the first step, and the state that float64 keeps exactly in both
    # goes through timesteps that differ by the float32 rounding of sigma
    assert relative(child(PROMPT, generator=seeded(), **call).images, expected) < 5 * EXACT


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("call", [{"sigmas": [0.9, 0.5, 0.2, 0.0]}, {"timesteps": [300, 200, 100]}], ids=str)
def test_start_below_one_is_the_stock_pipelines(sdxl64, spacing, call):
    """These schedulers start from the level itself, which must not be taken for the 1 of those that keep alpha x."""
    child, parent = sdxl64
    scheduler = EulerDiscreteScheduler.from_config(parent.scheduler.config, timestep_spacing=spacing)
    child, parent = (quiet(with_scheduler(pipe, scheduler)) for pipe in (child, parent))
    expected = parent(PROMPT, generator=seeded(), **SMALL, **call).images
    assert relative(child(PROMPT, generator=seeded(), **SMALL, **call).images, expected) < 5 * EXACT


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, LCMScheduler],
    ids=lambda s: s.__name__,
)
def test_levels_of_other_schedulers(sdxl, scheduler):
    """Schedulers that keep alpha x, list a level twice or have no sigmas give falling levels."""
    pipe = with_scheduler(sdxl, scheduler.from_config(sdxl.scheduler.config))
    sigmas = pipe.noise_levels(10)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == 11 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_is_euler(sdxl64, zero_snr):
    """DDIM is Euler in these coordinates (Song et al. 2021, eq. 14), so its stock pipeline gives the same picture.

    At zero terminal SNR, where DDIM begins at an infinite sigma, 4096 stands in: 1 / 4096 of the latents is off.
    """
    child, parent = sdxl64
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True} if zero_snr else {}
    scheduler = DDIMScheduler.from_config(
        parent.scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", **options
    )
    child, parent = (quiet(with_scheduler(pipe, scheduler)) for pipe in (child, parent))
    call = {"num_inference_steps": 4, **SMALL}
    expected = parent(PROMPT, generator=seeded(), **call).images
    assert relative(child(PROMPT, generator=seeded(), **call).images, expected) < (1e-3 if zero_snr else 5 * EXACT)


def test_levels_cut_in_two_are_one_run(sdxl64):
    """Latents beside the caller's own levels are x0 + sigma noise, in and out, whatever the scheduler's scale."""
    child = quiet(with_scheduler(sdxl64[0], DDIMScheduler.from_config(sdxl64[0].scheduler.config)))
    levels = [14.0, 6.0, 2.0, 0.5, 0.0]
    whole = child(PROMPT, schedule=levels, generator=seeded(), **SMALL).images
    first = child(PROMPT, schedule=levels[:3], generator=seeded(), **SMALL).images
    assert relative(child(PROMPT, schedule=levels[2:], latents=first, **SMALL).images, whole) < 1e-12


def test_quantize_timesteps_is_what_dpm_solver_does(sdxl64):
    """With Karras levels diffusers' DPM-Solver rounds timesteps. Rounding here too removes the difference."""
    child, parent = sdxl64
    scheduler = DPMSolverMultistepScheduler.from_config(parent.scheduler.config, use_karras_sigmas=True)
    child, parent = (quiet(with_scheduler(pipe, scheduler)) for pipe in (child, parent))
    call = {"num_inference_steps": 12, **SMALL}
    expected = parent(PROMPT, generator=seeded(), **call).images
    ours = {
        rounds: child(PROMPT, sampler="dpmpp_2m", quantize_timesteps=rounds, generator=seeded(), **call).images
        for rounds in (False, True)
    }
    assert relative(ours[True], expected) < 1e-5  # the first level's timestep is rounded from a level of its own
    assert relative(ours[False], expected) > 1e-4  # 4e-4 on a closed-form model


def test_state_is_float32_for_a_half_network(sdxl):
    half = quiet(StableDiffusionXLComfyPipeline(**copy.deepcopy(sdxl.components)).to(torch.bfloat16))
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, **SMALL}
    embeds = [embed.to(torch.bfloat16) for embed in sdxl.encode_prompt(PROMPT, do_classifier_free_guidance=False)[::2]]
    latents = half(prompt_embeds=embeds[0], pooled_prompt_embeds=embeds[1], generator=seeded(), **call).images
    assert latents.dtype == torch.float32
    assert half(PROMPT, num_inference_steps=2, generator=seeded()).images[0].size == (128, 128)


def no_network(*args, **kwargs):
    raise AssertionError("a network ran before the arguments were checked")


BAD = [
    ({"num_inference_steps": 1001}, ValueError, "the scheduler makes 1 of 1001 steps"),
    ({"sampler": "dpmp_2m"}, ValueError, "did you mean dpmpp_2m"),
    ({"sampler": "quux"}, ValueError, "there are euler, euler_ancestral, heun"),
    ({"sampler": lambda model: model}, TypeError, "a name or a callable, sampler\\(model, x, sigmas"),
    ({"sampler": 3}, TypeError, "a name or a callable"),
    ({"sampler": "dpmpp_2m", "sampler_kwargs": {"eta": 0.5}}, ValueError, "takes no eta; it takes none"),
    ({"sampler": "euler", "sampler_kwargs": {"eta": 0.5}}, ValueError, "takes no eta; it takes s_churn"),
    ({"eta": 0.5}, ValueError, "sampler_kwargs"),
    ({"sigmas": [1.0, 2.0]}, ValueError, "`sigmas` have to be"),
    ({"sigmas": [3.0, float("nan"), 1.0]}, ValueError, "finite"),
    ({"sigmas": []}, ValueError, "and fall from a positive number"),
    ({"sigmas": [3.0, 1.0, 1.0]}, ValueError, "to zero or above"),
    ({"sigmas": [3.0, 1.0, -1.0]}, ValueError, "to zero or above"),
    ({"schedule": [14.6]}, ValueError, "2 of them at least"),
    ({"schedule": "karras", "sigmas": [3.0, 1.0]}, ValueError, "pass one of them"),
    ({"schedule": "karras", "timesteps": [900, 1]}, ValueError, "pass one of them"),
    ({"schedule": "karas"}, ValueError, "there are karras, exponential, polyexponential; "),
    ({"num_inference_steps": 0}, ValueError, "at least 1"),
    ({"sampler": "lcm"}, ValueError, "no 'lcm'; there are euler, .*, or pass sampler\\(model, x, sigmas"),
    (
        {"sampler": "dpm_adaptive", "sampler_kwargs": {"rtol": 0, "atol": 0}},
        ValueError,
        "rtol or atol has to be above 0",
    ),
    ({"height": 100}, ValueError, "divisible by 8"),
    ({"negative_prompt_embeds": torch.zeros(1, 77, 160)}, ValueError, "negative_pooled_prompt_embeds"),
    ({"generator": [seeded(), seeded()]}, ValueError, "has to be one or 1, one per image, but is 2"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input_is_reported_before_any_network_runs(sdxl, monkeypatch, call, error, message):
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        monkeypatch.setattr(getattr(sdxl, name), "forward", no_network)
    with pytest.raises(error, match=message):
        sdxl(**{"prompt": PROMPT, **call})


def test_unknown_prediction_type(sdxl):
    pipe = with_scheduler(sdxl, EulerDiscreteScheduler.from_config(sdxl.scheduler.config, prediction_type="sample"))
    with pytest.raises(ValueError, match="`scheduler`: needs betas and 'epsilon' or 'v_prediction'"):
        pipe(PROMPT)
