"""The numbers are right with any scheduler, with any torch defaults, and with latents in and out."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import FAMILIES, PROMPT, default_dtype, parent_of, relative, seeded, stock_of, with_scheduler
from diffusers import StableDiffusionXLImg2ImgPipeline

from sdxl_comfy_pipeline import SCHEDULES

CLOSE = 1e-5  # float32 rounding; see test_side_by_side.py
CALL = {"prompt": PROMPT, "height": 64, "width": 64, "output_type": "latent"}
SIZES = {"original_size": (64, 64), "target_size": (64, 64)}


# at first order each solver takes Euler's step (DPM-Solver, Lu et al. 2022, section 3.1): the whole run is known
EULERS = {"solver_order": 1, "final_sigmas_type": "zero"}
FIRST_ORDER = {
    "EulerDiscrete": {},
    "DDIM": {"clip_sample": False, "set_alpha_to_one": True},
    "DPMSolverMultistep": EULERS,
    "UniPCMultistep": {**EULERS, "disable_corrector": [*range(10)]},
}


@pytest.mark.parametrize("end", [0.3, 0.6])
@pytest.mark.parametrize("kind", FIRST_ORDER)
def test_hand_over_to_a_stock_refiner(sdxl, kind, end):
    """`denoising_end`, then diffusers' image-to-image pipeline with the same scheduler, equal the whole run."""
    pipe = with_scheduler(sdxl, kind, **FIRST_ORDER[kind])
    call = {**CALL, "num_inference_steps": 10}
    whole = pipe(generator=seeded(), **call).images
    handed = pipe(generator=seeded(), denoising_end=end, **call).images
    del call["height"], call["width"]
    refiner = stock_of(pipe, StableDiffusionXLImg2ImgPipeline)
    refined = refiner(image=handed, denoising_start=end, **SIZES, **call).images
    assert relative(refined, whole) < CLOSE


@pytest.mark.parametrize(
    "kind, options, sampler",
    [
        ("LMSDiscrete", {}, "lms"),
        ("DEISMultistep", {"solver_order": 1}, "euler"),
        ("DPMSolverMultistep", {"final_sigmas_type": "zero"}, "dpmpp_2m"),
    ],
)
def test_hand_over_is_the_stock_pipelines(sdxl, kind, options, sampler):
    """The latents at `denoising_end` have the scale that a stock refiner with this scheduler expects."""
    pipe = with_scheduler(sdxl, kind, **options)
    call = {**CALL, "num_inference_steps": 10, "denoising_end": 0.6}
    ours = pipe(generator=seeded(), sampler=sampler, **call).images
    # DPM-Solver++ rounds its timesteps, which moves the latents by 1e-3; sqrt(1 + sigma^2) is 1.3 there and more
    bound = 1e-2 if kind in ("DPMSolverMultistep", "DEISMultistep") else CLOSE
    assert relative(ours, parent_of(pipe, "sdxl")(generator=seeded(), **call).images) < bound


@pytest.mark.parametrize("kind", FIRST_ORDER)
def test_a_callback_inpaints_with_add_noise(sdxl, kind):
    """As in the stock pipeline, the scheduler adds the level's noise to the kept part of the picture."""
    pipe = with_scheduler(sdxl, kind, **FIRST_ORDER[kind])
    noiser = copy.deepcopy(pipe.scheduler)
    noiser.set_timesteps(4)
    kept, noise = torch.randn(2, 1, 4, 8, 8, generator=seeded(5))
    mask = (torch.arange(8) < 4).float()

    def inpaint(one, i, timestep, tensors):
        noisy = noiser.add_noise(kept, noise, noiser.timesteps[i + 1 : i + 2]) if i < 3 else kept
        return {"latents": mask * noisy + (1 - mask) * tensors["latents"]}

    call = {**CALL, "num_inference_steps": 4, "callback_on_step_end": inpaint}
    expected = parent_of(pipe, "sdxl")(generator=seeded(), **call).images
    assert relative(pipe(generator=seeded(), **call).images, expected) < 10 * CLOSE


KARRAS = {"use_karras_sigmas": True}
LISTS_A_LEVEL_TWICE = {"HeunDiscrete": {}, "DEISMultistep": KARRAS, "SASolver": KARRAS}
LISTS_A_LEVEL_TWICE |= {"DPMSolverMultistep": {**KARRAS, "final_sigmas_type": "sigma_min"}}
FLOWS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOWS = {"DEISMultistep": FLOWS, "DPMSolverMultistep": {**FLOWS, "use_dynamic_shifting": False}}


@pytest.mark.parametrize(
    "family, kind, options",
    [("sdxl", *one) for one in (*LISTS_A_LEVEL_TWICE.items(), ("DDIM", {}), ("LCM", {}), ("DPMSolverMultistep", {}))]
    + [("flux", *one) for one in FLOWS.items()],
)
def test_levels_are_as_many_as_asked_for_and_fall_to_zero(request, family, kind, options):
    """Some of these schedulers list a level twice, others have no sigmas."""
    pipe = with_scheduler(request.getfixturevalue(family), kind, **options)
    levels = pipe.noise_levels(*([64] if family == "flux" else []), 10)
    assert levels.dtype == torch.float64
    assert len(levels) == 11 and levels[-1] == 0 and (levels.diff() < 0).all()


def test_levels_whatever_the_scheduler(sdxl):
    """`sigmas` is for schedulers that take them, as in the parent; `schedule` takes levels for any scheduler."""
    pipe = with_scheduler(sdxl, "DDIM")
    with pytest.raises(ValueError, match="DDIMScheduler takes none; pass them as `schedule`"):
        pipe(sigmas=[10.0, 3.0], **CALL)
    assert pipe.noise_levels(schedule=[10.0, 3.0, 0.0]).tolist() == [10, 3, 0]
    exponential, poly = (pipe.noise_levels(8, schedule=name) for name in ("exponential", "polyexponential"))
    torch.testing.assert_close(poly, exponential)  # rho is 1


MODES = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@FAMILIES
@pytest.mark.parametrize("mode", MODES)
def test_levels_under_other_defaults(name, mode, sdxl, flux):
    """Levels by name, the scheduler's levels, and given levels."""
    pipe, tokens = {"sdxl": (sdxl, ()), "flux": (flux, (64,))}[name]
    schedules = [*SCHEDULES, [0.9, 0.5, 0.0], None]
    plain = [pipe.noise_levels(*tokens, 8, schedule=schedule) for schedule in schedules]
    with MODES[mode]():
        under = [pipe.noise_levels(*tokens, 8, schedule=schedule) for schedule in schedules]
    for schedule, levels, expected in zip(schedules, under, plain):
        assert levels.dtype == torch.float64 and levels.equal(expected), schedule


@FAMILIES
@pytest.mark.parametrize(
    "mode, sampler", [("bfloat16", "dpmpp_2m_sde"), ("float64", "dpm_fast"), ("inference", "dpmpp_2m")]
)
def test_pictures_under_other_defaults(name, mode, sampler, sdxl, flux):
    pipe = {"sdxl": sdxl, "flux": flux}[name]
    call = {**CALL, "num_inference_steps": 4, "sampler": sampler, "schedule": "karras"}
    call |= {"max_sequence_length": 64} if name == "flux" else {}
    plain = pipe(generator=seeded(), **call).images
    with MODES[mode]():
        assert relative(pipe(generator=seeded(), **call).images, plain) < CLOSE
