"""The code of docs/recipes.md, as it stands there, on the demo models: against the stock pipelines where they can."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from conftest import FAMILIES, PROMPT, ROOT, relative, seeded
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = {
    title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for title, text in re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
}


def cook(code: str, **names) -> dict:
    """The names after the code has run, with these before it."""
    names["prompt"] = PROMPT
    exec(compile(code, "docs/recipes.md", "exec"), names)
    return names


def picture() -> Image.Image:
    return Image.open(ROOT / "output" / "sdxl-demo-sample_dpmpp_2m.png").convert("RGB")


class Latents:
    """A pipeline whose calls return latents, with other arguments than the recipe's."""

    def __init__(self, pipe, **call):
        self.__dict__.update(pipe=pipe, call=call)

    def __setattr__(self, name, value):
        setattr(self.pipe, name, value)

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def __call__(self, *args, **call):
        return self.pipe(*args, **{**call, **self.call, "output_type": "latent"})


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_image_to_image_with_sdxl(sdxl, scheduler):
    """Whether the scheduler keeps x0 + sigma noise or that divided by sqrt(1 + sigma^2)."""
    pipe = type(sdxl)(**{**sdxl.components, "scheduler": scheduler.from_config(sdxl.scheduler.config)})
    stock = StableDiffusionXLImg2ImgPipeline(**pipe.components)
    for one in (pipe, stock):
        one.set_progress_bar_config(disable=True)
    sampler = "euler" if scheduler is EulerDiscreteScheduler else "dpmpp_2m"
    ours = cook(RECIPES["Image to image"][0], pipe=Latents(pipe, sampler=sampler), picture=picture())["image"]
    call = {"strength": 0.6, "num_inference_steps": 20, "generator": seeded(1), "output_type": "latent"}
    theirs = stock(PROMPT, image=picture(), **call).images[0]
    assert relative(ours, theirs) < 5e-6  # float32 over 12 steps; measured 6e-7 and 9e-7


def test_image_to_image_with_flux(flux):
    stock = FluxImg2ImgPipeline(**flux.components)
    stock.set_progress_bar_config(disable=True)
    ours = cook(RECIPES["Image to image"][1], pipe=Latents(flux, sampler="euler"), picture=picture())["image"]
    size = {"width": 128, "height": 128, "guidance_scale": 3.5}
    call = {"strength": 0.6, "num_inference_steps": 20, "generator": seeded(1), "output_type": "latent"}
    theirs = stock(PROMPT, image=picture(), **size, **call).images[0]
    assert relative(ours, theirs) < 2e-6  # float32 over 12 steps; measured 2e-7


def test_lcm(sdxl):
    """With LCMScheduler's levels and noise, its own pictures."""
    pipe = type(sdxl)(**sdxl.components)
    stock = StableDiffusionXLPipeline(
        **{**sdxl.components, "scheduler": LCMScheduler.from_config(sdxl.scheduler.config)}
    )
    for one in (pipe, stock):
        one.set_progress_bar_config(disable=True)
    code = "\n".join(RECIPES["A sampler of your own: LCM"])
    ours = cook(code, pipe=Latents(pipe, generator=seeded(1)))["image"]
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": seeded(1), "output_type": "latent"}
    assert relative(ours, stock(PROMPT, **call).images[0]) < 1e-4  # as in tests/test_finetunes.py


def test_other_levels(sdxl):
    seen = []
    call = {"callback_on_step_end": lambda *a: seen.append(float(a[3]["sigma"])) or {}}
    call["callback_on_step_end_tensor_inputs"] = ["sigma"]
    cook(RECIPES["Karras levels with another rho, or another range"][0], pipe=Latents(sdxl, **call))
    # Karras et al. 2022, equation 5, with rho 5
    low, high = 0.05 ** (1 / 5), 14.6 ** (1 / 5)
    assert seen == pytest.approx([(high + i / 24 * (low - high)) ** 5 for i in range(25)], rel=1e-5)


def test_a_seed_for_each_image(sdxl):
    few = {"num_inference_steps": 6}
    images = cook(RECIPES["A seed for each image"][0], pipe=Latents(sdxl, **few))["images"]
    alone = sdxl(PROMPT, sampler="dpmpp_2m_sde", generator=seeded(12), output_type="latent", **few).images[0]
    assert relative(images[1], alone) < 1e-4  # rounding of a batch in float32
    assert relative(images[0], alone) > 0.1


@FAMILIES
def test_threads(name, sdxl, flux):
    """Four threads, each with a pipeline, sampler and guidance of its own, draw what they draw alone."""
    pipes = [{"sdxl": sdxl, "flux": flux}[name]]
    pipes += [cook(RECIPES["Threads"][0], pipe=pipes[0])["second"] for _ in range(3)]
    samplers = ("euler", "heun", "dpmpp_2m_sde", "euler_ancestral")
    encoded = pipes[0].encode_prompt(PROMPT, PROMPT)  # beforehand, since they share their tokenizers
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    if name == "sdxl":
        names = [side + one for one in names for side in ("", "negative_")]
    embeds = dict(zip(names, encoded))

    def draw(i: int) -> torch.Tensor:
        pipes[i].set_progress_bar_config(disable=True)
        call = {"sampler": samplers[i], "guidance_scale": 2.0 + i, "num_inference_steps": 5, "generator": seeded(i)}
        return pipes[i](**embeds, output_type="latent", **call).images

    alone = [draw(i) for i in range(4)]
    together: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: draw(i)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(together[i].equal(alone[i]) for i in range(4))
