"""The parent and the child, called with the same arguments, on the same weights, in float32: the same latents.

This is the promise that the parent's arguments keep their meaning, so each of them is here, alone or with others.
Where the two differ on purpose, README says so, and the test of that stands at the end.
"""

from __future__ import annotations

import copy
import functools

import addons
import numpy as np
import pytest
import torch
from conftest import CHILDREN, PARENTS, PROMPT, load, relative, seeded, stock_of
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from sdxl_comfy_pipeline import StableDiffusionXLComfyPipeline

# float32 rounding (6e-8) of both, times sigma (up to 15) and guidance (5)
CLOSE = 1e-5
CAR, CAT = "a red car in the desert", "a cat in the snow, warm colors"


@functools.cache
def pair(name: str, with_image: bool = False):
    child = load(CHILDREN[name], name)
    child = addons.with_ip_adapter(child) if with_image else child
    return child, stock_of(child, PARENTS[name])


def normal(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def same(pipes, call) -> None:
    child, parent = pipes
    call = {"num_inference_steps": 3, "output_type": "latent", **call}
    if {"sigmas", "timesteps"} & call.keys():
        del call["num_inference_steps"]

    def arguments():  # the parent changes some of them
        return {name: seeds() if callable(seeds := value) else copy.deepcopy(value) for name, value in call.items()}

    expected = parent(**{"generator": seeded(), **arguments()})
    drawn = child(**{"generator": seeded(), **arguments()}, sampler="euler")
    assert type(drawn) is type(expected)
    expected, drawn = (out[0] if isinstance(out, tuple) else out.images for out in (expected, drawn))
    if isinstance(expected, list):
        assert [image.size for image in drawn] == [image.size for image in expected]
        expected, drawn = (
            np.stack([np.asarray(image, dtype=np.float32) for image in out]) for out in (expected, drawn)
        )
        assert np.abs(drawn - expected).max() <= 1  # of 255: a value on the edge between two
        return
    assert drawn.shape == expected.shape
    assert relative(torch.as_tensor(drawn), torch.as_tensor(expected)) < CLOSE


SMALL = {"prompt": PROMPT, "height": 64, "width": 64}
SDXL_EMBEDS = {
    "prompt_embeds": normal(2, 77, 160, seed=1),
    "negative_prompt_embeds": normal(2, 77, 160, seed=2),
    "pooled_prompt_embeds": normal(2, 96, seed=3),
    "negative_pooled_prompt_embeds": normal(2, 96, seed=4),
}
ALONE = {"guidance_scale": 1.0}
SDXL = [
    {"prompt": PROMPT},
    {**SMALL, "num_inference_steps": 1},
    {**SMALL, "height": 72, "width": 128},
    {**SMALL, **ALONE},
    {**SMALL, "guidance_scale": 0.0},
    {**SMALL, "guidance_scale": 12.5},
    {**SMALL, "guidance_rescale": 0.7, "guidance_scale": 9.0},
    {**SMALL, "guidance_rescale": 0.7, **ALONE},
    {**SMALL, "negative_prompt": CAT, **ALONE},
    {**SMALL, "prompt_2": CAR, "negative_prompt": CAT, "negative_prompt_2": "snow"},
    {**SMALL, "negative_prompt_2": "snow"},
    {**SMALL, "prompt": [PROMPT, CAR], "negative_prompt": CAT},
    {**SMALL, "prompt": [PROMPT, CAR], "prompt_2": [CAR, CAT], "negative_prompt": [CAT, ""]},
    {**SMALL, "prompt": [PROMPT, CAR], "num_images_per_prompt": 2},
    {**SMALL, "prompt": "", "num_images_per_prompt": 3},
    {**SMALL, "prompt": PROMPT * 9},  # longer than the tokenizer takes
    {**SMALL, "prompt": [PROMPT, CAR], "generator": lambda: [seeded(3), seeded(4)]},
    {**SMALL, "num_images_per_prompt": 2, "generator": lambda: [seeded(3), seeded(4)], "negative_prompt": CAT},
    {**SMALL, "latents": normal(1, 4, 8, 8)},
    {**SMALL, "latents": normal(2, 4, 8, 8), "num_images_per_prompt": 2, "generator": None},
    {"height": 64, "width": 64, **SDXL_EMBEDS, "num_images_per_prompt": 2},
    {"height": 64, "width": 64, **SDXL_EMBEDS, **ALONE},
    {"height": 64, "width": 64, "prompt_embeds": normal(1, 77, 160), "pooled_prompt_embeds": normal(1, 96), **ALONE},
    {**SMALL, "timesteps": [999, 600, 333, 1], "guidance_scale": 2.0},
    {**SMALL, "sigmas": [14.6, 3.0, 0.2], "guidance_scale": 2.0},
    {**SMALL, "sigmas": [2.0, 0.5]},
    {**SMALL, "denoising_end": 0.5, "num_inference_steps": 10},
    {**SMALL, "denoising_end": 0.6, "timesteps": [800, 600, 400, 200]},  # one of them is where it ends
    {**SMALL, "denoising_end": 0.8, "num_inference_steps": 10, "negative_prompt": CAT, "guidance_rescale": 0.3},
    {**SMALL, "denoising_end": 0.0001},  # before the first step
    {**SMALL, "denoising_end": 1.0},
    {**SMALL, "clip_skip": 0},
    {**SMALL, "clip_skip": 1, "negative_prompt": CAT},
    {**SMALL, "cross_attention_kwargs": {"scale": 0.5}},
    {**SMALL, "original_size": (32, 48), "target_size": (256, 192), "crops_coords_top_left": (8, 16)},
    {**SMALL, "negative_crops_coords_top_left": (8, 16)},
    {**SMALL, "negative_original_size": (32, 48), "negative_target_size": (48, 32)},
    {**SMALL, "negative_original_size": (32, 48)},  # without the other: none of both
    {**SMALL, "original_size": (32, 48), "prompt": [PROMPT, CAR], "negative_target_size": (8, 8)},
    {**SMALL, "output_type": "pil"},
    {**SMALL, "output_type": "np"},
    {**SMALL, "output_type": "pt", "return_dict": False},
    {**SMALL, "return_dict": False},
]
TEXT = {"max_sequence_length": 64}
FLUX_SMALL = {**SMALL, **TEXT}
FLUX_EMBEDS = {"prompt_embeds": normal(2, 32, 128, seed=1), "pooled_prompt_embeds": normal(2, 64, seed=2)}
FLUX_NEGATIVE = {
    "negative_prompt_embeds": normal(2, 32, 128, seed=3),
    "negative_pooled_prompt_embeds": normal(2, 64, seed=4),
}
FLUX = [
    {**FLUX_SMALL, "height": 128, "width": 128},
    {**FLUX_SMALL, "num_inference_steps": 1},
    {**FLUX_SMALL, "height": 48, "width": 128},
    {**FLUX_SMALL, "height": 72, "width": 70},  # rounded down to a multiple of 16, with a warning
    {**FLUX_SMALL, "guidance_scale": 0.0},
    {**FLUX_SMALL, "prompt": [PROMPT, CAR], "prompt_2": [CAT, CAR], "num_images_per_prompt": 2},
    {**FLUX_SMALL, "prompt": PROMPT * 9},
    {**FLUX_SMALL, "negative_prompt": CAT},  # of no effect at true_cfg_scale 1
    {**FLUX_SMALL, "true_cfg_scale": 3.0},  # of no effect without a negative prompt
    {**FLUX_SMALL, "negative_prompt": CAT, "true_cfg_scale": 3.0},
    {**FLUX_SMALL, "negative_prompt": "", "true_cfg_scale": 1.5, "guidance_scale": 1.0},
    {**FLUX_SMALL, "negative_prompt": CAT, "negative_prompt_2": "snow", "true_cfg_scale": 2},
    {**FLUX_SMALL, "negative_prompt_2": "snow", "true_cfg_scale": 2.0},
    {**FLUX_SMALL, "prompt": [PROMPT, CAR], "negative_prompt": [CAT, ""], "true_cfg_scale": 2.0},
    {**FLUX_SMALL, "prompt": [PROMPT, CAR], "generator": lambda: [seeded(3), seeded(4)]},
    {**FLUX_SMALL, "latents": normal(2, 16, 64), "num_images_per_prompt": 2, "generator": None},
    {**FLUX_SMALL, "latents": normal(1, 16, 64), "sigmas": [0.7, 0.3]},
    {**TEXT, "height": 64, "width": 64, **FLUX_EMBEDS, **FLUX_NEGATIVE, "true_cfg_scale": 2.0},
    {**TEXT, "height": 64, "width": 64, **FLUX_EMBEDS, **FLUX_NEGATIVE},
    # of another length: of no effect at true_cfg_scale 1
    {**TEXT, "height": 64, "width": 64, **FLUX_EMBEDS, **FLUX_NEGATIVE, "negative_prompt_embeds": normal(2, 16, 128)},
    {**TEXT, "height": 64, "width": 64, **FLUX_EMBEDS, "negative_prompt": [CAT, CAR], "true_cfg_scale": 2.0},
    {**FLUX_SMALL, "sigmas": [1.0, 0.6, 0.1]},
    {**FLUX_SMALL, "sigmas": [0.9, 0.4]},
    {**FLUX_SMALL, "sigmas": np.linspace(1, 0.25, 4)},
    {**FLUX_SMALL, "joint_attention_kwargs": {"scale": 0.5}},
    {**SMALL, "max_sequence_length": 8},
    {**SMALL, "max_sequence_length": 256, "negative_prompt": CAT, "true_cfg_scale": 2.0},
    {**SMALL},
    {**FLUX_SMALL, "output_type": "pil"},
    {**FLUX_SMALL, "output_type": "np"},
    {**FLUX_SMALL, "output_type": "pt", "return_dict": False},
    {**FLUX_SMALL, "return_dict": False},
]


def label(call) -> str | None:
    if not isinstance(call, dict):
        return None
    values = {name: "..." if callable(value) else value for name, value in call.items() if name not in SMALL}
    return ",".join(f"{name}={value}"[:40] for name, value in values.items()) or "default"


IMAGE_EMBEDS = normal(1, 1, addons.IMAGE_DIM)
SDXL_IMAGE = [
    {"ip_adapter_image": addons.IMAGE},
    {"ip_adapter_image": [addons.IMAGE], "num_images_per_prompt": 2},
    {"ip_adapter_image": addons.IMAGE, **ALONE},
    {"ip_adapter_image_embeds": [torch.cat([IMAGE_EMBEDS * 0, IMAGE_EMBEDS])]},
    {"ip_adapter_image_embeds": [IMAGE_EMBEDS], **ALONE},
]
TRUE_CFG = {"negative_prompt": CAT, "true_cfg_scale": 2.0}
FLUX_IMAGE = [
    {"ip_adapter_image": addons.IMAGE},
    {"ip_adapter_image": [addons.IMAGE], "num_images_per_prompt": 2},
    {"ip_adapter_image_embeds": [IMAGE_EMBEDS]},
    {"negative_ip_adapter_image": addons.IMAGE, **TRUE_CFG},
    {"negative_ip_adapter_image_embeds": [IMAGE_EMBEDS], **TRUE_CFG},
    {"ip_adapter_image": addons.IMAGE, **TRUE_CFG},
    {"ip_adapter_image_embeds": [IMAGE_EMBEDS], "negative_ip_adapter_image": addons.IMAGE, **TRUE_CFG},
    {"ip_adapter_image": addons.IMAGE, "joint_attention_kwargs": {"scale": 0.5}},
]
CALLS = [("sdxl", False, call) for call in SDXL] + [("flux", False, call) for call in FLUX]
CALLS += [("sdxl", True, {**SMALL, **call}) for call in SDXL_IMAGE]
CALLS += [("flux", True, {**FLUX_SMALL, **call}) for call in FLUX_IMAGE]


@pytest.mark.parametrize("name, with_image, call", CALLS, ids=label)
def test_the_same_latents(name, with_image, call):
    same(pair(name, with_image), call)


def test_the_image_is_seen():
    """The adapters of these tests are strong enough for the comparison to mean something."""
    for name, call in (("sdxl", SMALL), ("flux", FLUX_SMALL)):
        child, call = pair(name, with_image=True)[0], {**call, "num_inference_steps": 3, "output_type": "latent"}
        images = [addons.IMAGE, addons.IMAGE.rotate(90)]
        first, second = (child(ip_adapter_image=image, generator=seeded(), **call).images for image in images)
        assert relative(first, second) > 100 * CLOSE


@pytest.mark.parametrize("call", [{}, ALONE, {"num_images_per_prompt": 2, "guidance_scale": 8.0}], ids=label)
def test_sdxl_guidance_embedding(call):
    """A U-Net that takes the guidance scale as an input, as LCM's do (`time_cond_proj_dim`), gets it."""
    child = pair("sdxl")[0]
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(child.unet.config, time_cond_proj_dim=32)
    unet.load_state_dict(child.unet.state_dict(), strict=False)
    child = StableDiffusionXLComfyPipeline(**{**child.components, "unet": unet.eval()})
    child.set_progress_bar_config(disable=True)
    same((child, stock_of(child, StableDiffusionXLPipeline)), {**SMALL, **call})


def test_flux_repeats_what_the_parent_does_not():
    """Embeddings for several images of a prompt, and one second or negative text for several prompts.

    diffusers does so for SDXL; with FLUX it fails inside the transformer. Here both are what repeating by hand gives.
    """
    child = pair("flux")[0]
    call = {**TEXT, "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    by_hand = {name: embeds.repeat_interleave(2, 0) for name, embeds in FLUX_EMBEDS.items()}
    expected = child(generator=seeded(), **by_hand, **call).images
    assert child(generator=seeded(), **FLUX_EMBEDS, num_images_per_prompt=2, **call).images.equal(expected)

    call = {**call, "prompt": [PROMPT, CAR], "true_cfg_scale": 2.0}
    expected = child(generator=seeded(), prompt_2=[CAT] * 2, negative_prompt=[CAT] * 2, **call).images
    assert child(generator=seeded(), prompt_2=CAT, negative_prompt=CAT, **call).images.equal(expected)
