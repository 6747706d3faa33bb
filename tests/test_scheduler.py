"""KDiffusionScheduler in stock pipelines: equal to the stock schedulers and to our own pipelines, and its traps."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from typing import Any

import diffusers
import pytest
import torch
from conftest import PROMPT, relative, seeded
from small_pipelines import MAKERS, mask, picture, sd3_text, sd_inpaint, sd_text
from small_pipelines import flux_text as flux_text_maker

from scheduling_k_diffusion import KDiffusionScheduler, find_sampler, sampler_names

SAMPLERS = [name for name in sampler_names() if name != "dpm_adaptive"]
STEPS = 4
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# float32: the two do the same arithmetic in another order, four or five roundings of 6e-8 in each of a few steps
CLOSE = 1e-5


@functools.cache
def made(maker: Any, n: int = 1) -> tuple[Any, dict[str, Any], Any]:
    pipe, arguments = maker(n)
    return pipe, arguments, pipe.scheduler


def draw(maker: Any, scheduler: Any = None, n: int = 1, steps: int = STEPS, generator: Any = "seeded", **more: Any):
    """Latents of a small pipeline with this scheduler; None: its own."""
    pipe, arguments, own = made(maker, n)
    modular = hasattr(pipe, "update_components")
    scheduler = copy.deepcopy(own) if scheduler is None else scheduler
    if modular:
        pipe.update_components(scheduler=scheduler)
    else:
        pipe.scheduler = scheduler
    if generator == "seeded":
        generator = seeded() if n == 1 else [seeded(i) for i in range(n)]
    arguments = {**arguments, "num_inference_steps": steps, "generator": generator, **more}
    if modular:
        return pipe(**arguments, output="latents")
    return pipe(**arguments, output_type="latent")[0]


def ours(maker: Any, sampler: Any = "euler", **options: Any) -> KDiffusionScheduler:
    return KDiffusionScheduler.from_scheduler(made(maker)[2], sampler=sampler, **options)


# --- equal to the stock schedulers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_euler_is_the_stock_scheduler(maker):
    assert relative(draw(maker, ours(maker)), draw(maker)) < CLOSE


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_samplers_in_every_small_pipeline(maker):
    """Finite, and an image does not depend on the batch it was drawn in: with a generator each, or none to step.

    Every other sampler, so that each pipeline has samplers with noise, with history and with two evaluations.
    """
    slow = maker.__name__ == "qwen_edit"  # makes a megapixel of its picture
    for sampler in SAMPLERS[:1] if slow else SAMPLERS[MAKERS.index(maker) % 2 :: 2]:
        pair = draw(maker, ours(maker, sampler), n=2, steps=2)
        assert pair.isfinite().all(), sampler
        # float32 sums of another order in a batch, in which the first of two steps, from pure noise, multiplies errors
        assert relative(draw(maker, ours(maker, sampler), steps=2), pair[:1]) < 10 * CLOSE, sampler


@pytest.mark.parametrize(
    "sampler, maker", [*itertools.product(["heun", "dpmpp_2m"], [sd_text, sd_inpaint]), ("heun", sd3_text)]
)
def test_other_samplers_are_diffusers_own(maker, sampler):
    """Over the same levels. DPM-Solver++ keeps its latents in another scale, and added noise too."""
    heun = "FlowMatchHeunDiscrete" if maker is sd3_text else "HeunDiscrete"
    name = heun if sampler == "heun" else "DPMSolverMultistep"
    # diffusers' multistep solver ends with a step of order 1 to zero, as k-diffusion's; below 15 steps it asks for it
    options = {"final_sigmas_type": "zero"} if sampler == "dpmpp_2m" else {}
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(made(maker)[2].config, **options)
    expected = draw(maker, copy.deepcopy(scheduler))
    assert relative(draw(maker, KDiffusionScheduler.from_scheduler(scheduler, sampler=sampler)), expected) < 2 * CLOSE


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("stock", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_predictions_and_scales(stock, prediction):
    """DDIM without eta is Euler's method, on latents divided by sqrt(1 + sigma^2)."""
    options = {"clip_sample": False, "set_alpha_to_one": True} if stock == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, stock)(**BETAS, prediction_type=prediction, steps_offset=1, **options)
    expected = draw(sd_text, copy.deepcopy(scheduler))
    assert relative(draw(sd_text, KDiffusionScheduler.from_scheduler(scheduler)), expected) < CLOSE


@pytest.mark.parametrize(
    "options", [{"shift": 3.0}, {"use_karras_sigmas": True}, {"invert_sigmas": True}, {"shift_terminal": 0.1}]
)
def test_levels_of_flow(options):
    """`invert_sigmas` is Mochi's: t is 1 - t, and the network predicts the velocity the other way."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    expected = draw(sd3_text, copy.deepcopy(scheduler))
    assert relative(draw(sd3_text, KDiffusionScheduler.from_scheduler(scheduler)), expected) < CLOSE


def test_a_pipeline_passes_levels():
    for maker, levels in (
        (sd_text, {"timesteps": [900, 500, 100]}),
        (sd_text, {"sigmas": [9.0, 3.0, 1.0, 0.0]}),
        (sd_text, {"sigmas": [12.0, 4.0, 1.0, 0.2]}),  # as they are: it ends at 0.2
        (flux_text_maker, {"sigmas": [0.9, 0.5, 0.2]}),
    ):
        assert relative(draw(maker, ours(maker), steps=3, **levels), draw(maker, steps=3, **levels)) < CLOSE


# --- equal to our own pipelines ---------------------------------------------------------------------------------------


def fixed_noise(like: torch.Tensor, seed: int) -> Any:
    """A noise sampler that depends on the levels alone."""
    first, second = (torch.randn(like.shape, generator=seeded(seed + i), dtype=torch.float64) for i in range(2))

    def noise(sigma: Any, sigma_next: Any) -> torch.Tensor:
        return (first * torch.cos(torch.as_tensor(sigma)) + second * torch.sin(torch.as_tensor(sigma_next))).to(like)

    return noise


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
    same_in_float64(*sdxl64, {}, sampler, schedule="karras")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_flux_pipeline_in_float64(flux64, sampler):
    """Below t = 1: there the network sees pure noise here, and there noise times a t below 1."""
    options = {}
    if "noise_sampler" in find_sampler(sampler).arguments and sampler != "dpm_fast":
        options["noise_sampler"] = fixed_noise(torch.zeros(1, 4, 64, dtype=torch.float64), 3)
    arguments = {"sigmas": [0.95, 0.7, 0.4], "max_sequence_length": 64}
    same_in_float64(*flux64, arguments, sampler, sampler_kwargs=options)


# --- the demo model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint", "ControlNet"])
def test_euler_on_the_demo_model(sdxl, kind):
    """As in SDXL's stock pipelines."""
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent"}
    components, small = dict(sdxl.components), picture().resize((64, 64))
    if kind == "ControlNet":
        torch.manual_seed(0)
        network = diffusers.ControlNetModel.from_unet(sdxl.unet, conditioning_channels=3, load_weights_from_unet=False)
        for block in network.controlnet_down_blocks:
            torch.nn.init.normal_(block.weight, std=0.02)  # they begin with zeros, which change nothing
        components["controlnet"] = network.eval()
    arguments |= {"": {}, "ControlNet": {"image": small}}.get(kind, {"image": small, "strength": 0.6})
    arguments |= {"height": 64, "width": 64} if kind != "Img2Img" else {}
    arguments |= {"mask_image": mask().resize((64, 64))} if kind == "Inpaint" else {}
    maker = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")
    pipe = maker(**{key: one for key, one in components.items() if key in inspect.signature(maker).parameters})
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**arguments, generator=seeded())[0]
    pipe.scheduler = KDiffusionScheduler.from_scheduler(pipe.scheduler)
    assert relative(pipe(**arguments, generator=seeded())[0], expected) < CLOSE
