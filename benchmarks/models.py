"""What the benchmarks run: our pipelines and the stock ones with the same weights, and each sampler's scheduler."""

from __future__ import annotations

import contextlib
import gc
import inspect
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
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
from gallery.options import PROMPT, number  # noqa: E402
from sdxl_comfy_pipeline import StableDiffusionXLComfyPipeline, sampling  # noqa: E402

positive = number(int, "a whole number, at least 1", lambda value: value >= 1)
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32")}
CLASSES: dict[str, tuple[Any, Any]] = {
    "sdxl": (StableDiffusionXLComfyPipeline, diffusers.StableDiffusionXLPipeline),
    "flux": (FluxComfyPipeline, diffusers.FluxPipeline),
}
DPM_SOLVER = {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"}
# the scheduler of the same method; lms starts at order 1, dpm_fast mixes orders 3, 2 and 1
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

# stabilityai/stable-diffusion-xl-base-1.0's U-Net, 2.6 B
SDXL_CONFIG: dict[str, Any] = {"sample_size": 128, "block_out_channels": (320, 640, 1280)}
SDXL_CONFIG["down_block_types"] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
SDXL_CONFIG["up_block_types"] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
SDXL_CONFIG |= {"transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20)}
SDXL_CONFIG |= {"cross_attention_dim": 2048, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
SDXL_CONFIG |= {"projection_class_embeddings_input_dim": 2816, "use_linear_projection": True}
FLUX_CONFIG = {"guidance_embeds": True}  # black-forest-labs/FLUX.1-dev's transformer, 12 B; the rest are the defaults


@dataclass
class Bench:
    """One network in both pipelines. `call(pipe, steps, **arguments)` gives latents and needs no text encoder."""

    name: str
    ours: Any
    stock: Any
    schedulers: dict[str, tuple[str, dict[str, Any]]]
    arguments: dict[str, Any]
    generator: str = "cpu"

    @property
    def network(self) -> torch.nn.Module:
        return self.ours.unet if self.name == "sdxl" else self.ours.transformer

    def call(self, pipe: Any, steps: int, **arguments: Any) -> torch.Tensor:
        fixed = {"generator": torch.Generator(self.generator).manual_seed(0), "output_type": "latent", **self.arguments}
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
    ours = CLASSES[name][0].from_pretrained(ROOT / "demo" / name, dtype=torch.float32).to(device)
    with torch.no_grad():
        embeds = ours.encode_prompt(PROMPT, **({"prompt_2": PROMPT} if name == "flux" else {}))
    ours.to(dtype=dtype)
    embeds = [one.to(dtype) for one in embeds]
    return _bench(name, ours, embeds, 128)


def full(name: str, device: str, dtype: torch.dtype, config: dict[str, Any] | None = None, size: int = 1024) -> Bench:
    """The real architecture with random weights and embeddings, built on the device: no file, no text encoder.

    It has no autoencoder. `config` overrides values of the architecture, for a small stand-in.
    """
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    if name == "sdxl":
        network = build(diffusers.UNet2DConditionModel, {**SDXL_CONFIG, **(config or {})}, dtype, device)
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = diffusers.EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
        pooled = network.config.projection_class_embeddings_input_dim - 6 * network.config.addition_time_embed_dim
        shapes = [(1, 77, network.config.cross_attention_dim)] * 2 + [(1, pooled)] * 2
        ours = CLASSES[name][0](**parts, unet=network, scheduler=scheduler, add_watermarker=False)
    else:
        network = build(diffusers.FluxTransformer2DModel, {**FLUX_CONFIG, **(config or {})}, dtype, device)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        shapes = [(1, 512, network.config.joint_attention_dim), (1, network.config.pooled_projection_dim)]
        ours = CLASSES[name][0](**parts, transformer=network, scheduler=scheduler)
    generator = torch.Generator().manual_seed(0)
    embeds = [torch.randn(shape, generator=generator).to(device, network.dtype) for shape in shapes]
    return _bench(name, ours, embeds, size)


@contextlib.contextmanager
def built(name: str, size: str, device: str, dtype: torch.dtype) -> Iterator[Bench]:
    """`demo` or `full`, freed afterwards: SDXL's and FLUX's networks need not fit in memory together."""
    warnings.simplefilter("ignore")  # diffusers' of NumPy 2 and old algorithms, torchsde's of a rounded end
    bench = demo(name, dtype, device) if size == "demo" else full(name, device, dtype)
    yield bench
    bench.ours = bench.stock = None
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


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


def function(sampler: str) -> Callable[..., torch.Tensor]:
    """k-diffusion's function, by its name without `sample_`."""
    return getattr(sampling, f"sample_{sampler}")


def stochastic(sampler: str) -> bool:
    """Whether a sampler adds noise by default. dpm_fast and dpm_adaptive do not."""
    parameters = inspect.signature(function(sampler)).parameters
    return "noise_sampler" in parameters and "sigma_min" not in parameters


def _bench(name: str, ours: Any, embeds: list[torch.Tensor], size: int) -> Bench:
    stock = CLASSES[name][1](**ours.components)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    if name == "sdxl":
        names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    arguments = {**dict(zip(names, embeds)), "height": size, "width": size}
    return Bench(name, ours, stock, SDXL_SCHEDULERS if name == "sdxl" else FLUX_SCHEDULERS, arguments)


def where(device: str) -> str:
    """The machine and the versions, one line for RESULTS.md. Ends the script if there is no such device."""
    cuda = torch.device(device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit(f"--device {device}: there is no CUDA device here")
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = f"{found[1] if found else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    threads = f"{torch.get_num_threads()} threads of {processor}"
    hardware = f"{torch.cuda.get_device_name(device)} and {processor}" if cuda else threads
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "k-diffusion"))
    return f"{hardware}; Python {platform.python_version()}, {packages}"
