"""KDiffusionScheduler and comfy_ksampler on a GPU. Other tests that need CUDA are beside those for a CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import CHILDREN, FAMILIES, PROMPT, draw, load, parent_of, relative, seeded

from comfy_ksampler import K_DIFFUSIONS, ksampler
from scheduling_k_diffusion import KDiffusionScheduler, sampler_names

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
NOISY = ("_ancestral", "_sde")
SIZE = {"width": 64, "height": 64}


@pytest.mark.parametrize("generators", ["cpu", "cuda"])
@FAMILIES
def test_the_scheduler_draws_what_the_pipelines_do(name, generators):
    """As test_scheduler.py has it on a CPU. FLUX's pipeline gives `step` no generator: other noise there."""
    pipe = load(CHILDREN[name], name, torch.float64).to("cuda")
    stock = parent_of(pipe, name)
    levels = {"sigmas": [0.95, 0.7, 0.4], "num_inference_steps": 3} if name == "flux" else {}
    schedule = {} if name == "flux" else {"schedule": "karras"}
    for sampler in (one for one in sampler_names() if one != "dpm_adaptive"):
        stock.scheduler = KDiffusionScheduler.from_scheduler(pipe.scheduler, sampler=sampler, **schedule)
        found, expected = (
            draw(one, name, generator=torch.Generator(generators).manual_seed(3), **levels, **options)
            for one, options in ((stock, {}), (pipe, {"sampler": sampler, **schedule}))
        )
        assert found.is_cuda and found.isfinite().all()
        if name == "sdxl" or (sampler != "dpm_fast" and not sampler.endswith(NOISY)):
            # dpm_fast places its levels in float32
            assert relative(found, expected) < (1e-5 if sampler == "dpm_fast" else 1e-12), sampler


# FLUX's dpmpp_2m_sde is ComfyUI's own
@pytest.mark.parametrize("name, sampler_name", [*itertools.product(CHILDREN, K_DIFFUSIONS), ("sdxl", "dpmpp_2m_sde")])
def test_ksampler_draws_the_cpus_pictures(name, sampler_name):
    """The noise is that of the CPU, as in ComfyUI: pictures agree but for the GPU's arithmetic."""
    pipe, drawn = load(CHILDREN[name], name), {}
    for device in ("cpu", "cuda"):
        fields = {"sampler_name": sampler_name, "scheduler": "simple", "cfg": 3.0}
        call = ksampler(pipe.to(device), seed=7, steps=3, **fields, **SIZE)
        drawn[device] = draw(pipe, name, negative_prompt="", **call).cpu()
    assert relative(drawn["cuda"], drawn["cpu"]) < 0.05


def test_ksampler_draws_step_noise_on_the_gpu():
    """From the seed itself; on a CPU ComfyUI takes seed + 1, since there one generator would draw both noises."""
    pipe = load(CHILDREN["sdxl"], "sdxl").to("cuda")
    fields = {"seed": 7, "steps": 3, "cfg": 3.0, "scheduler": "karras", **SIZE}
    call = ksampler(pipe, sampler_name="euler_ancestral", **fields)
    drawn = draw(pipe, "sdxl", prompt=PROMPT, negative_prompt="", **call)
    generator = torch.Generator("cuda").manual_seed(7)
    noise = {"noise_sampler": lambda *_: torch.randn(1, 4, 8, 8, generator=generator, device="cuda")}
    assert drawn.equal(draw(pipe, "sdxl", prompt=PROMPT, negative_prompt="", **{**call, "sampler_kwargs": noise}))
    unit = torch.randn(1, 4, 8, 8, generator=seeded(7))
    assert relative(call["latents"] / call["latents"].std(), unit / unit.std()) < 1e-6
    paths = [draw(pipe, "sdxl", **ksampler(pipe, sampler_name=f"dpmpp_sde{gpu}", **fields)) for gpu in ("", "_gpu")]
    assert relative(*paths) > 0.1 and all(path.isfinite().all() for path in paths)
