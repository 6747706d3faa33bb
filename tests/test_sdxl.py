"""StableDiffusionXLComfyPipeline against the stock pipeline, models that people retrained, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from conftest import PROMPT, relative, seeded

from sdxl_comfy_pipeline import external, sampler_names

# rounding alone: the scheduler keeps its sigmas and timesteps in float32
EXACT = 1e-6
SMALL = {"height": 64, "width": 64, "output_type": "latent"}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
TRAILING, RESCALED = {"timestep_spacing": "trailing"}, {"num_inference_steps": 8, "guidance_rescale": 0.7}


def with_scheduler(pipes, kind: str, **options):
    """Pipelines with this scheduler and the same networks."""
    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(pipes[0].scheduler.config, **options)
    found = [type(one)(**{**one.components, "scheduler": copy.deepcopy(scheduler)}) for one in pipes]
    for one in found:
        one.set_progress_bar_config(disable=True)
    return found


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
    child, parent = with_scheduler(sdxl64, kind, **options)
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


@pytest.mark.parametrize("kind", ["DDIM", "DPMSolverMultistep", "HeunDiscrete", "LCM"])
def test_levels_of_other_schedulers(sdxl, kind):
    """Schedulers that keep alpha x, list a level twice or have no sigmas give falling levels."""
    (pipe,) = with_scheduler([sdxl], kind)
    sigmas = pipe.noise_levels(10)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == 11 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_is_euler(sdxl64, zero_snr):
    """DDIM is Euler in these coordinates (Song et al. 2021, eq. 14), so its stock pipeline gives the same picture.

    At zero terminal SNR, where DDIM begins at an infinite sigma, 4096 stands in: 1 / 4096 of the latents is off.
    """
    options = {"clip_sample": False, "set_alpha_to_one": True, **TRAILING, **(ZERO_SNR if zero_snr else {})}
    child, parent = with_scheduler(sdxl64, "DDIM", **options)
    assert relative(draw(child), draw(parent)) < (1e-3 if zero_snr else 5 * EXACT)


def test_levels_cut_in_two_are_one_run(sdxl64):
    """Latents beside the caller's own levels are x0 + sigma noise, in and out, whatever the scheduler's scale."""
    (child,) = with_scheduler(sdxl64[:1], "DDIM")
    levels = [14.0, 6.0, 2.0, 0.5, 0.0]
    whole, first = (draw(child, schedule=one) for one in (levels, levels[:3]))
    assert relative(draw(child, schedule=levels[2:], latents=first), whole) < 1e-12


def test_quantize_timesteps_is_what_dpm_solver_does(sdxl64):
    """With Karras levels diffusers' DPM-Solver rounds timesteps. Rounding here too removes the difference."""
    child, parent = with_scheduler(sdxl64, "DPMSolverMultistep", use_karras_sigmas=True)
    expected = draw(parent, num_inference_steps=12)
    ours = {
        rounds: draw(child, sampler="dpmpp_2m", quantize_timesteps=rounds, num_inference_steps=12)
        for rounds in (False, True)
    }
    assert relative(ours[True], expected) < 1e-5  # the first level's timestep is rounded from a level of its own
    assert relative(ours[False], expected) > 1e-4  # 4e-4 on a closed-form model


@pytest.mark.parametrize("sampler", sampler_names())
def test_every_sampler_ends_right_from_zero_terminal_snr(sdxl, sampler, monkeypatch):
    """On the exact v of latents drawn from N(0, 0.7^2) every sampler ends with that spread, from sigma = 4096 on.

    v = alpha noise - sqrt(1 - alpha^2) x0 (Salimans & Ho 2022), of which x / (...) is the expectation given x.
    """
    (child,) = with_scheduler([sdxl], "EulerDiscrete", **ZERO_SNR)
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


def no_network(*args, **kwargs):
    raise AssertionError("a network ran before the arguments were checked")


BAD = [
    ({"num_inference_steps": 1001}, ValueError, "the scheduler makes 1 of 1001 steps"),
    ({"sampler": "dpmp_2m"}, ValueError, "did you mean dpmpp_2m"),
    ({"sampler": "quux"}, ValueError, "there are euler, euler_ancestral, heun"),
    ({"sampler": lambda model: model}, TypeError, "a name or a callable, sampler\\(model, x, sigmas"),
    ({"sampler": 3}, TypeError, "a name or a callable"),
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
    (pipe,) = with_scheduler([sdxl], "EulerDiscrete", prediction_type="sample")
    with pytest.raises(ValueError, match="`scheduler`: needs betas and 'epsilon' or 'v_prediction'"):
        pipe(PROMPT)
