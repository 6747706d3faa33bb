"""Results of ComfyUI (tests/data), and the model that they were computed with, in the pipelines."""

from __future__ import annotations

import json
from typing import Any

import torch
from conftest import ROOT, network
from safetensors import safe_open

from comfy_ksampler import model_sampling
from parity.exact import Mixture, Transformer, UNet, flux_pipeline, sdxl_pipeline
from scheduling_k_diffusion import KDiffusionScheduler

DATA = ROOT / "tests" / "data"
SIGMAS = json.loads((DATA / "comfyui_sigmas.json").read_text())["sigmas"]
LATENTS = safe_open(DATA / "comfyui_0.27_latents.safetensors", "pt")
RES4LYF = safe_open(DATA / "comfyui_res4lyf_latents.safetensors", "pt")
BEFORE = safe_open(DATA / "comfyui_latents.safetensors", "pt")  # of 0.3.64
SHIFT = 1.15  # of the references, FLUX's at 1024x1024: diffusers' mu
SIZE = {"width": 128, "height": 128}  # theirs


def grid(channels: int) -> tuple[torch.Tensor, ...]:
    """The channel, row and column of each number of the references' latents, float64."""
    return torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (channels, 16, 16)), indexing="ij")


def mixture(channels: int) -> Mixture:
    """The references' model, as their metadata describe it, flat in the order of the latents."""
    c, h, w = grid(channels)
    means = torch.stack([torch.sin(0.1 * (k + 1) * (h + 2 * w) + c) for k in range(3)])
    if channels == 16:  # FLUX's network sees them packed: 2x2 patches
        means = means.view(3, 16, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5)
    return Mixture(means.flatten(1), torch.full((3,), 0.5))


def latent_image(channels: int) -> torch.Tensor:
    """The references' initial latents for denoise 0.6."""
    c, h, w = grid(channels)
    return torch.cos(0.2 * (h - w) + c)[None].float()


class Guided(UNet):
    """Predicts for the mixture of the negative means where the prompt's embedding is -1, as the references' does."""

    def forward(self, sample, timestep, encoder_hidden_states, **conditioning):
        known, halves = self.mixture, []
        for x, t, sign in zip(sample, timestep.expand(len(sample)), encoder_hidden_states[:, 0, 0].sign().double()):
            self.mixture = Mixture(known.means * sign, known.stds)
            halves += super().forward(x[None], t[None])
        self.mixture = known
        return (torch.cat(halves),)


class GuidedFlow(Transformer):
    """The same for FLUX, whose pipeline evaluates one prompt at a time."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, **conditioning):
        known = self.mixture
        self.mixture = Mixture(known.means * encoder_hidden_states[0, 0, 0].sign().double(), known.stds)
        velocity = super().forward(hidden_states, timestep)
        self.mixture = known
        return velocity


def pipelines() -> dict[str, Any]:
    """Float32, like ComfyUI's sampling."""
    zsnr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    with torch.random.fork_rng():
        return {
            "sdxl": sdxl_pipeline(mixture(4), torch.float32, Guided),
            "sdxl_v_prediction_zsnr": sdxl_pipeline(mixture(4), torch.float32, **zsnr),
            "flux": flux_pipeline(mixture(16), torch.float32, GuidedFlow, mu=SHIFT, channels=64),
        }


def draw(pipe: Any, **call: Any) -> torch.Tensor:
    """The latents of a call, as ComfyUI has them: unpacked."""
    prompt = torch.ones(1, 1, 1, dtype=network(pipe).dtype)
    embeds = {"prompt_embeds": prompt, "pooled_prompt_embeds": prompt[:, 0]}
    if max(call.get("guidance_scale", 1.0), call.get("true_cfg_scale", 1.0)) > 1:
        embeds |= {"negative_prompt_embeds": -prompt, "negative_pooled_prompt_embeds": -prompt[:, 0]}
    latents = pipe(**{"output_type": "latent", "guidance_scale": 1.0, **SIZE, **embeds, **call}).images
    return model_sampling(pipe, **SIZE).unpacked(latents)


def draw_anywhere(pipe, call):
    """The latents of `ksampler`'s call, also in a stock pipeline, as docs/comfyui.md shows."""
    if "ComfyPipeline" in type(pipe).__name__:
        return draw(pipe, **call)
    keys = ("sampler", "sampler_kwargs", "schedule", "parameterization", "quantize_timesteps")
    options = {key: call.pop(key) for key in keys if key in call}
    pipe.scheduler = KDiffusionScheduler.from_scheduler(pipe.scheduler, **options)
    if hasattr(pipe, "unet"):  # the stock pipeline scales given latents to the first level
        pipe.scheduler.set_timesteps(call["num_inference_steps"])
        call["latents"] = call["latents"] / float(pipe.scheduler.init_noise_sigma)
    return draw(pipe, **call)


def settings(key: str, **changes) -> dict:
    """The fields of a reference's name."""
    model, sampler_name, scheduler, steps, seed, *rest = key.split("/")
    cfg, denoise = (float(number) for number in rest or (1, 1))
    image = latent_image(4 if model == "sdxl" else 16) if denoise < 1 else None
    names = {"sampler_name": sampler_name, "scheduler": scheduler, "denoise": denoise, "latent_image": image}
    return {"seed": int(seed), "steps": int(steps), "cfg": cfg, **names, **SIZE, **changes}


def references(model: str, sampler_name: str) -> list[str]:
    return [key for key in LATENTS.keys() if key.startswith(f"{model}/{sampler_name}/")]
