"""The code of docs/recipes.md, as it stands there, on the demo models: against the stock pipelines where they can."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from conftest import PROMPT, ROOT, relative, seeded, stock_of
from diffusers import ControlNetModel, EulerDiscreteScheduler
from PIL import Image

from comfy_ksampler import levels

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = {
    title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for title, text in re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
}


def run_recipe(code: str, **names) -> dict:
    """The names that the code defines, run with these names."""
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


@pytest.mark.parametrize(
    "kind, sampler", [("EulerDiscrete", "euler"), ("DPMSolverMultistep", "dpmpp_2m"), ("", "euler")]
)
def test_image_to_image(request, kind, sampler):
    """With SDXL, whether the scheduler keeps x0 + sigma noise or that divided by sqrt(1 + sigma^2); and with FLUX."""
    pipe, size = request.getfixturevalue("sdxl" if kind else "flux"), {}
    if kind:
        scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(pipe.scheduler.config)
        pipe = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    else:
        size = {"width": 128, "height": 128, "guidance_scale": 3.5}
    stock = stock_of(pipe, getattr(diffusers, f"{'StableDiffusionXL' if kind else 'Flux'}Img2ImgPipeline"))
    recipe = RECIPES["Image to image"][0 if kind else 1]
    ours = run_recipe(recipe, pipe=Latents(pipe, sampler=sampler), picture=picture())["image"]
    call = {"strength": 0.6, "num_inference_steps": 20, "generator": seeded(1), "output_type": "latent"}
    theirs = stock(PROMPT, image=picture(), **size, **call).images[0]
    assert relative(ours, theirs) < 5e-6  # float32 over 12 steps; measured 6e-7 and 9e-7, FLUX 2e-7


def test_lcm(sdxl):
    """With LCMScheduler's levels and noise, its own pictures."""
    pipe, stock = (stock_of(sdxl, kind) for kind in (type(sdxl), diffusers.StableDiffusionXLPipeline))
    stock.scheduler = diffusers.LCMScheduler.from_config(sdxl.scheduler.config)
    code = "\n".join(RECIPES["A user-supplied sampler: LCM"])
    ours = run_recipe(code, pipe=Latents(pipe, generator=seeded(1)))["image"]
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": seeded(1), "output_type": "latent"}
    assert relative(ours, stock(PROMPT, **call).images[0]) < 1e-4  # float32 over four steps


def test_other_levels(sdxl):
    seen = []
    call = {"callback_on_step_end": lambda *a: seen.append(float(a[3]["sigma"])) or {}}
    call["callback_on_step_end_tensor_inputs"] = ["sigma"]
    run_recipe(RECIPES["Karras levels with another rho, or another range"][0], pipe=Latents(sdxl, **call))
    # Karras et al. 2022, equation 5, with rho 5
    low, high = 0.05 ** (1 / 5), 14.6 ** (1 / 5)
    assert seen == pytest.approx([(high + i / 24 * (low - high)) ** 5 for i in range(25)], rel=1e-5)


def code_of(title: str) -> str:
    (code,) = RECIPES[title]
    return code


def test_align_your_steps(sdxl):
    """With euler, what the stock scheduler draws over the same list."""
    code = code_of("A list of levels: Align Your Steps and others").replace("levels)", "levels, **call)")
    size = {"output_type": "latent", "width": 64, "height": 64}
    names = {"pipe": sdxl, "call": {**size, "generator": seeded(3)}}
    found = run_recipe(code.replace("dpmpp_2m", "euler"), **names)
    found["stock"].scheduler = EulerDiscreteScheduler.from_config(sdxl.scheduler.config)
    expected = found["stock"](PROMPT, sigmas=found["levels"], generator=seeded(3), **size).images[0]
    assert relative(found["image"], expected) < 1e-5  # float32 over ten steps


def test_diffusers_beta_sigmas_are_other_levels(sdxl):
    """By the number that the page says."""
    theirs = EulerDiscreteScheduler.from_config(sdxl.scheduler.config, use_beta_sigmas=True)
    theirs.set_timesteps(30)
    ratio = theirs.sigmas[:-1] / levels(sdxl, "beta", 30)[:-1]
    assert torch.maximum(ratio, 1 / ratio).max().item() == pytest.approx(3.8, abs=0.05)


def test_a_wrapped_sampler(sdxl):
    """The network gets 0.95 sigma where the recipe says so, and the sampler is k-diffusion's."""
    seen = []
    hook = sdxl.unet.register_forward_pre_hook(lambda _, args: seen.append(float(torch.as_tensor(args[1]).max())))
    call = {"num_inference_steps": 8, "generator": seeded(2), "width": 64, "height": 64}
    code = code_of("A wrapped sampler: more detail")
    with hook:
        run_recipe(code, pipe=Latents(sdxl, **call))
    sigmas = sdxl.noise_levels(8, schedule="karras")[:-1]
    table = ((1 - sdxl.scheduler.alphas_cumprod) / sdxl.scheduler.alphas_cumprod).sqrt().log()
    shown = torch.where((sigmas > 0.5) & (sigmas < 5), 0.95 * sigmas, sigmas).log()
    assert seen == pytest.approx(np.interp(shown, table, np.arange(1000)), abs=0.02)  # float32's logarithms
    plain = sdxl(PROMPT, sampler="dpmpp_2m", schedule="karras", output_type="latent", **call | {"generator": seeded(2)})
    same = run_recipe(code.replace("0.95", "1.0"), pipe=Latents(sdxl, **call | {"generator": seeded(2)}))["image"]
    assert relative(same, plain.images[0]) < 1e-6


def test_a_picture_of_each_step(sdxl):
    """The last one is the picture itself."""
    call = {"num_inference_steps": 3, "generator": seeded(2), "width": 64, "height": 64}
    code = code_of("A picture of each step").replace("pipe(prompt,", "pipe(prompt, **call,")
    pictures = run_recipe(code, pipe=sdxl, call=call)["pictures"]
    drawn = sdxl(PROMPT, **call | {"generator": seeded(2)}).images[0]
    assert len(pictures) == 3 and np.abs(np.asarray(pictures[-1], int) - np.asarray(drawn, int)).max() <= 1  # rounding


def test_controlnet(sdxl):
    """With euler, what the stock scheduler draws."""
    network = ControlNetModel.from_unet(sdxl.unet, conditioning_channels=3, load_weights_from_unet=False)
    for block in network.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight, std=0.02, generator=seeded(7))  # else they are zeros
    call = {"num_inference_steps": 4, "output_type": "latent", "width": 64, "height": 64}
    edges = picture().resize((64, 64))
    names = {"controlnet": network.eval(), "edges": edges, "call": {**call, "generator": seeded(2)}}
    code = code_of("ControlNet").replace("edges,", "edges, **call,").replace("dpmpp_2m_sde", "euler")
    found = run_recipe(code, pipe=sdxl, **names)
    found["control"].scheduler = EulerDiscreteScheduler.from_config(sdxl.scheduler.config)
    stock = found["control"](PROMPT, image=edges, controlnet_conditioning_scale=0.5, **call, generator=seeded(2))
    assert relative(found["image"], stock.images[0]) < 1e-5  # float32 over 4 steps


def test_inversion(sdxl):
    """Noise at the highest level, from which Euler's method comes back; the way up and down differ by its error."""
    x0 = sdxl(PROMPT, output_type="latent", width=64, height=64, generator=seeded(2), num_inference_steps=8).images
    found = run_recipe(code_of("Inversion"), pipe=Latents(sdxl, width=64, height=64), x0=x0)
    assert found["noise"].std() > 10  # of a highest level of 14.6
    assert relative(found["again"], x0) < 0.1


def test_a_seed_for_each_image(sdxl):
    few = {"num_inference_steps": 6}
    images = run_recipe(RECIPES["A seed for each image"][0], pipe=Latents(sdxl, **few))["images"]
    alone = sdxl(PROMPT, sampler="dpmpp_2m_sde", generator=seeded(12), output_type="latent", **few).images[0]
    assert relative(images[1], alone) < 1e-4  # rounding of a batch in float32
    assert relative(images[0], alone) > 0.1


def test_threads(sdxl):
    """Four threads, each with a pipeline, sampler and guidance scale, draw what they draw alone."""
    pipes = [sdxl, *(run_recipe(code_of("Threads"), pipe=sdxl)["second"] for _ in range(3))]
    samplers = ("euler", "heun", "dpmpp_2m_sde", "euler_ancestral")
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    embeds = dict(zip(names, sdxl.encode_prompt(PROMPT)))  # beforehand, since they share their tokenizers

    def draw(i: int) -> torch.Tensor:
        pipes[i].set_progress_bar_config(disable=True)
        call = {"sampler": samplers[i], "guidance_scale": 2.0 + i, "num_inference_steps": 5, "generator": seeded(i)}
        return pipes[i](**embeds, output_type="latent", **call).images

    alone = [draw(i) for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(draw, range(4)), alone))
