"""What the benchmarks run: both pipelines beside the stock ones on the same weights, and which scheduler is whose."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flux_comfy_pipeline import FluxComfyPipeline  # noqa: E402
from sdxl_comfy_pipeline import StableDiffusionXLComfyPipeline, external, find_sampler, sampler_names  # noqa: E402

PROMPT = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"

DPM_SOLVER = {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"}
# the scheduler that does what the sampler does; lms takes its order from the step, dpm_fast mixes orders 3, 2 and 1
SDXL_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm_fast": ("DPMSolverSinglestepScheduler", DPM_SOLVER),
    "dpmpp_2s_ancestral": ("DPMSolverSinglestepScheduler", {"solver_order": 2}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True}
FLUX_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", FLOW),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **FLOW}),
}

SDXL_CONFIG = {  # stabilityai/stable-diffusion-xl-base-1.0's U-Net, 2.6 B
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX_CONFIG = {"guidance_embeds": True}  # black-forest-labs/FLUX.1-dev's transformer, 12 B; the rest are the defaults
_VAE = {  # of both
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
VAE_CONFIGS: dict[str, dict[str, Any]] = {
    "sdxl": {**_VAE, "latent_channels": 4, "scaling_factor": 0.13025},
    "flux": {
        **_VAE,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


@dataclass
class Bench:
    """One network in both pipelines. `call(pipe, steps, **arguments)` gives latents and needs no text encoder."""

    name: str
    ours: Any
    stock: Any
    schedulers: dict[str, tuple[str, dict[str, Any]]]
    arguments: dict[str, Any]

    @property
    def network(self) -> torch.nn.Module:
        return self.ours.unet if self.name == "sdxl" else self.ours.transformer

    def call(self, pipe: Any, steps: int, **arguments: Any) -> torch.Tensor:
        fixed = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **self.arguments}
        return pipe(num_inference_steps=steps, **{**fixed, **arguments}).images

    def scheduler_of(self, sampler: str) -> Any:
        """The sampler's counterpart in diffusers, for this network."""
        name, options = self.schedulers[sampler]
        return getattr(diffusers, name).from_config(self.ours.scheduler.config, **options)

    def stock_with(self, sampler: str) -> Callable[..., torch.Tensor] | None:
        """The stock pipeline's call with the sampler's counterpart; None where diffusers has none."""
        if sampler not in self.schedulers:
            return None
        scheduler = self.scheduler_of(sampler)

        def call(steps: int, **arguments: Any) -> torch.Tensor:
            self.stock.scheduler = scheduler
            return self.call(self.stock, steps, **arguments)

        return call


def demo(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Bench:
    """The demo model, 128x128, with its own text encoders' embeddings of the usual prompt."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ours_class, stock_class = _classes(name)
    ours = ours_class.from_pretrained(ROOT / "demo" / name, dtype=torch.float32).to(device)
    with torch.no_grad():
        embeds = ours.encode_prompt(PROMPT, **({"prompt_2": PROMPT} if name == "flux" else {}))
    ours.to(dtype=dtype)
    embeds = [one.to(dtype) for one in embeds]
    return _bench(name, ours, stock_class, embeds, 128)


def full(
    name: str,
    device: str,
    config: dict[str, Any] | None = None,
    size: int = 1024,
    dtype: torch.dtype | None = None,
    decoder: bool = False,
) -> Bench:
    """The real architecture with random weights and embeddings, built on the device: no file and no text encoder.

    Args:
        config: overrides the architecture's, for a small stand-in.
        dtype: default: SDXL's float16, FLUX's bfloat16.
        decoder: with the real autoencoder, else with none.
    """
    ours_class, stock_class = _classes(name)
    dtype = dtype or {"sdxl": torch.float16, "flux": torch.bfloat16}[name]
    parts: dict[str, Any] = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    parts["vae"] = build(diffusers.AutoencoderKL, VAE_CONFIGS[name], dtype, device) if decoder else None
    if name == "sdxl":
        network = build(diffusers.UNet2DConditionModel, {**SDXL_CONFIG, **(config or {})}, dtype, device)
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = diffusers.EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
        pooled = network.config.projection_class_embeddings_input_dim - 6 * network.config.addition_time_embed_dim
        shapes = [(1, 77, network.config.cross_attention_dim)] * 2 + [(1, pooled)] * 2
        ours = ours_class(**parts, unet=network, scheduler=scheduler, add_watermarker=False)
    else:
        network = build(diffusers.FluxTransformer2DModel, {**FLUX_CONFIG, **(config or {})}, dtype, device)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        shapes = [(1, 512, network.config.joint_attention_dim), (1, network.config.pooled_projection_dim)]
        ours = ours_class(**parts, transformer=network, scheduler=scheduler)
    generator = torch.Generator().manual_seed(0)
    embeds = [torch.randn(shape, generator=generator).to(device, network.dtype) for shape in shapes]
    return _bench(name, ours, stock_class, embeds, size)


def build(kind: type, config: dict[str, Any], dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A network with small random weights, never in main memory nor in float32: FLUX's would need 48 GB."""
    with torch.device("meta"):
        network = kind(**config).to(dtype)
    network = network.to_empty(device=device).requires_grad_(False).eval()
    for parameter in network.parameters():
        parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(0.0)
    for module in network.modules():
        if type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None:
            module.weight.fill_(1.0)
    return network


def _classes(name: str) -> tuple[type, type]:
    if name == "sdxl":
        return StableDiffusionXLComfyPipeline, diffusers.StableDiffusionXLPipeline
    return FluxComfyPipeline, diffusers.FluxPipeline


def _bench(name: str, ours: Any, stock_class: type, embeds: list[torch.Tensor], size: int) -> Bench:
    stock = stock_class(**ours.components)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    if name == "sdxl":
        names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    arguments = {**dict(zip(names, embeds)), "height": size, "width": size}
    return Bench(name, ours, stock, SDXL_SCHEDULERS if name == "sdxl" else FLUX_SCHEDULERS, arguments)


def where(device: str) -> str:
    """The machine and the versions, one line for RESULTS.md."""
    cuda = torch.device(device).type == "cuda"
    hardware = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "k-diffusion"))
    return f"{hardware}; Python {platform.python_version()}, {packages}"


__all__ = ["PROMPT", "ROOT", "Bench", "build", "demo", "external", "find_sampler", "full", "sampler_names", "where"]
