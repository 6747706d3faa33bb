"""Pipelines of diffusers with random networks of a few thousand parameters, and without text encoders.

Each function of `MAKERS` returns a pipeline and the arguments of its call for n images (the arguments of one image
repeated; the first sample differs). Latents come back, not images.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from PIL import Image

from scheduling_k_diffusion import sampling

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SIZE = 32
TOKENS = 4


def random(*shape: int, seed: int = 1, dtype: Any = None) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask() -> Image.Image:
    pixels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    pixels[:, SIZE // 2 :] = 255
    return Image.fromarray(pixels)


def seeded(network: Callable[..., Any], **config: Any) -> Any:
    """A network with weights that are the same each time, large enough to matter: some begin with zeros."""
    torch.manual_seed(0)
    made = network(**config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05, generator=generator)
    return made


def unet(**config: Any) -> Any:
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": SIZE // 2}
    small |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 8}
    small |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2}
    return seeded(diffusers.UNet2DConditionModel, **{**small, **config})


def vae(**config: Any) -> Any:
    small = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 4, "sample_size": SIZE}
    small |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return seeded(diffusers.AutoencoderKL, **{**small, **config})


def euler(**config: Any) -> Any:
    return diffusers.EulerDiscreteScheduler(**{**BETAS, **config})


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def built(pipeline: type, **components: Any) -> Any:
    """The pipeline, with None for every component that is not given."""
    needed = [p.name for p in inspect.signature(pipeline).parameters.values() if p.default is p.empty]
    pipe = pipeline(**{**dict.fromkeys(needed), **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(kind: str, n: int, **extra: Any) -> tuple[Any, dict[str, Any]]:
    pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline")
    pipe = built(pipeline, unet=unet(), vae=vae(), scheduler=euler(), requires_safety_checker=False)
    embeds = {"prompt_embeds": random(1, TOKENS, 8), "negative_prompt_embeds": random(1, TOKENS, 8, seed=2)}
    return pipe, {**embeds, "num_images_per_prompt": n, "guidance_scale": 3.0, **extra}


def sd_text(n: int) -> tuple[Any, dict[str, Any]]:
    return stable_diffusion("", n, height=SIZE, width=SIZE)


def sd_image(n: int) -> tuple[Any, dict[str, Any]]:
    return stable_diffusion("Img2Img", n, image=picture(), strength=0.6)


def sd_inpaint(n: int) -> tuple[Any, dict[str, Any]]:
    return stable_diffusion("Inpaint", n, image=picture(), mask_image=mask(), strength=0.8, height=SIZE, width=SIZE)


def animate_diff(n: int) -> tuple[Any, dict[str, Any]]:
    adapter = seeded(
        diffusers.MotionAdapter,
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    pipe = built(diffusers.AnimateDiffPipeline, unet=unet(), vae=vae(), scheduler=euler(), motion_adapter=adapter)
    embeds = {"prompt_embeds": random(1, TOKENS, 8).repeat(n, 1, 1)}
    embeds["negative_prompt_embeds"] = random(1, TOKENS, 8, seed=2).repeat(n, 1, 1)
    return pipe, {**embeds, "num_frames": 2, "height": 16, "width": 16}


def pixart_sigma(n: int) -> tuple[Any, dict[str, Any]]:
    network = seeded(
        diffusers.PixArtTransformer2DModel,
        sample_size=SIZE // 2,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=8,
        out_channels=8,
        use_additional_conditions=False,
    )
    pipe = built(diffusers.PixArtSigmaPipeline, transformer=network, vae=vae(), scheduler=euler())
    ones = torch.ones(1, TOKENS, dtype=torch.long)
    text = {"prompt_embeds": random(1, TOKENS, 8), "prompt_attention_mask": ones, "negative_prompt": None}
    text |= {"negative_prompt_embeds": random(1, TOKENS, 8, seed=2), "negative_prompt_attention_mask": ones}
    return pipe, {
        **text, "num_images_per_prompt": n, "height": SIZE, "width": SIZE, "use_resolution_binning": False
    }  # fmt: skip


def sd3(kind: str, n: int, **extra: Any) -> tuple[Any, dict[str, Any]]:
    network = seeded(
        diffusers.SD3Transformer2DModel,
        sample_size=SIZE // 2,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=SIZE // 2,
    )
    pipe = built(
        getattr(diffusers, f"StableDiffusion3{kind}Pipeline"),
        transformer=network,
        vae=vae(shift_factor=0.1),
        scheduler=flow(shift=3.0),
    )
    text = {"prompt_embeds": random(1, TOKENS, 8), "pooled_prompt_embeds": random(1, 8)}
    text |= {"negative_prompt_embeds": random(1, TOKENS, 8, seed=2), "negative_pooled_prompt_embeds": random(1, 8)}
    return pipe, {**{name: value.repeat(n, *[1] * (value.ndim - 1)) for name, value in text.items()}, **extra}


def sd3_text(n: int) -> tuple[Any, dict[str, Any]]:
    return sd3("", n, height=SIZE, width=SIZE)


def sd3_image(n: int) -> tuple[Any, dict[str, Any]]:
    return sd3("Img2Img", n, image=[picture()] * n, strength=0.6, height=SIZE, width=SIZE)


def flux(kind: str, n: int, channels: int = 16, **extra: Any) -> tuple[Any, dict[str, Any]]:
    network = seeded(
        diffusers.FluxTransformer2DModel,
        in_channels=channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 2, 2),
    )
    pipe = built(
        getattr(diffusers, f"Flux{kind}Pipeline"),
        transformer=network,
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        scheduler=flow(use_dynamic_shifting=True),
    )
    text = {
        "prompt_embeds": random(n, TOKENS, 8)[:1].repeat(n, 1, 1),
        "pooled_prompt_embeds": random(1, 8).repeat(n, 1),
    }
    return pipe, {**text, "height": SIZE, "width": SIZE, **extra}


def flux_text(n: int) -> tuple[Any, dict[str, Any]]:
    return flux("", n)


def flux_image(n: int) -> tuple[Any, dict[str, Any]]:
    return flux("Img2Img", n, image=picture(), strength=0.6)


def flux_inpaint(n: int) -> tuple[Any, dict[str, Any]]:
    return flux("Inpaint", n, image=picture(), mask_image=mask(), strength=0.8)


def flux_fill(n: int) -> tuple[Any, dict[str, Any]]:
    # latents, the masked image's, and the mask's 2 x 2 pixels in 2 x 2 patches
    return flux("Fill", n, channels=16 + 16 + 16, image=picture(), mask_image=mask())


def flux_kontext(n: int) -> tuple[Any, dict[str, Any]]:
    return flux("Kontext", n, image=picture(), max_area=SIZE * SIZE, _auto_resize=False)


def flux2(n: int) -> tuple[Any, dict[str, Any]]:
    network = seeded(
        diffusers.Flux2Transformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 2, 2),
        timestep_guidance_channels=8,
    )
    autoencoder = seeded(
        diffusers.AutoencoderKLFlux2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = built(
        diffusers.Flux2Pipeline,
        transformer=network,
        vae=autoencoder,
        scheduler=flow(use_dynamic_shifting=True),
    )
    return pipe, {"prompt_embeds": random(1, TOKENS, 8).repeat(n, 1, 1), "height": SIZE, "width": SIZE}


def qwen_vae(halvings: int, width: int) -> Any:
    config = {"base_dim": width, "z_dim": 4, "dim_mult": [1] * (halvings + 1), "num_res_blocks": 1}
    config |= {"temperal_downsample": [False] * halvings, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return seeded(diffusers.AutoencoderKLQwenImage, **config)


def qwen(kind: str, n: int, halvings: int = 1, width: int = 8, **extra: Any) -> tuple[Any, dict[str, Any]]:
    network = seeded(
        diffusers.QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 2, 2),
    )
    pipe = built(
        getattr(diffusers, f"QwenImage{kind}Pipeline"),
        transformer=network,
        vae=qwen_vae(halvings, width),
        scheduler=flow(use_dynamic_shifting=True),
    )
    ones = torch.ones(n, TOKENS, dtype=torch.long)
    text = {"prompt_embeds": random(1, TOKENS, 8).repeat(n, 1, 1), "prompt_embeds_mask": ones, "true_cfg_scale": 1.0}
    side = SIZE * 2 ** (halvings - 1) // (halvings // 5 + 1)
    return pipe, {**text, "height": side, "width": side, **extra}


def qwen_text(n: int) -> tuple[Any, dict[str, Any]]:
    return qwen("", n)


def qwen_image(n: int) -> tuple[Any, dict[str, Any]]:
    return qwen("Img2Img", n, image=picture(), strength=0.6)


def qwen_edit(n: int) -> tuple[Any, dict[str, Any]]:
    # the pipeline makes a megapixel of any picture
    return qwen("Edit", n, halvings=5, width=2, image=picture())


def modular(blocks: str, components: dict[str, Any]) -> Any:
    """A modular pipeline's way from embeddings to latents."""
    from diffusers import modular_pipelines

    denoise = getattr(modular_pipelines, blocks)().sub_blocks["denoise"]
    kept = modular_pipelines.SequentialPipelineBlocks.from_blocks_dict({"denoise": denoise})
    pipe = kept.init_pipeline()
    pipe.update_components(**{name: components[name] for name in pipe.component_names if name in components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular_flux(n: int) -> tuple[Any, dict[str, Any]]:
    pipe, arguments = flux_text(n)
    return modular("FluxAutoBlocks", pipe.components), arguments


def modular_sdxl(n: int) -> tuple[Any, dict[str, Any]]:
    size = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2, "transformer_layers_per_block": 1}
    network = unet(**size, projection_class_embeddings_input_dim=6 * 2 + 8)
    text = {"prompt_embeds": random(1, TOKENS, 8), "negative_prompt_embeds": random(1, TOKENS, 8, seed=2)}
    text |= {"pooled_prompt_embeds": random(1, 8), "negative_pooled_prompt_embeds": random(1, 8, seed=3)}
    text = {name: value.repeat(n, *[1] * (value.ndim - 1)) for name, value in text.items()}
    components = {"unet": network, "vae": vae(), "scheduler": euler()}
    return modular("StableDiffusionXLAutoBlocks", components), {**text, "height": SIZE, "width": SIZE}


def z_image(n: int) -> tuple[Any, dict[str, Any]]:
    network = seeded(
        diffusers.ZImageTransformer2DModel,
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 32, 32],
    )
    pipe = built(diffusers.ZImagePipeline, transformer=network, vae=vae(), scheduler=flow(shift=3.0))
    embeds = {"prompt_embeds": [random(TOKENS, 8)] * n, "guidance_scale": 0.0}
    return pipe, {**embeds, "height": SIZE, "width": SIZE}


def wan_text(n: int) -> tuple[Any, dict[str, Any]]:
    return wan("", n, num_frames=5)


def wan_video(n: int) -> tuple[Any, dict[str, Any]]:
    return wan("VideoToVideo", n, video=[picture().resize((16, 16))] * 5, strength=0.7)


def wan(kind: str, n: int, **extra: Any) -> tuple[Any, dict[str, Any]]:
    network = seeded(
        diffusers.WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    autoencoder = seeded(
        diffusers.AutoencoderKLWan,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    # of order 1 it is Euler's method
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1
    )
    pipe = built(getattr(diffusers, f"Wan{kind}Pipeline"), transformer=network, vae=autoencoder, scheduler=scheduler)
    text = {"prompt_embeds": random(1, TOKENS, 8).repeat(n, 1, 1)}
    text["negative_prompt_embeds"] = random(1, TOKENS, 8, seed=2).repeat(n, 1, 1)
    return pipe, {**text, "height": 16, "width": 16, **extra}


def ltx(n: int) -> tuple[Any, dict[str, Any]]:
    network = seeded(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    )
    autoencoder = seeded(
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=4,
        block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        patch_size=1,
    )
    pipe = built(diffusers.LTXPipeline, transformer=network, vae=autoencoder, scheduler=flow(use_dynamic_shifting=True))
    ones = torch.ones(n, TOKENS, dtype=torch.long)
    text = {"prompt_embeds": random(1, TOKENS, 8).repeat(n, 1, 1), "prompt_attention_mask": ones}
    text |= {"negative_prompt_embeds": random(1, TOKENS, 8, seed=2).repeat(n, 1, 1)}
    text |= {"negative_prompt_attention_mask": ones}
    return pipe, {**text, "height": SIZE, "width": SIZE, "num_frames": 5}


def sana(n: int) -> tuple[Any, dict[str, Any]]:
    network = seeded(
        diffusers.SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=SIZE,
    )
    pipe = built(diffusers.SanaPipeline, transformer=network, scheduler=flow(shift=3.0))
    ones = torch.ones(n, TOKENS, dtype=torch.long)
    text = {"prompt_embeds": random(1, TOKENS, 8).repeat(n, 1, 1), "prompt_attention_mask": ones}
    text |= {"negative_prompt_embeds": random(1, TOKENS, 8, seed=2).repeat(n, 1, 1)}
    text |= {"negative_prompt_attention_mask": ones, "use_resolution_binning": False}
    text["negative_prompt"] = None
    return pipe, {**text, "height": 256, "width": 256}


def chroma(n: int) -> tuple[Any, dict[str, Any]]:
    network = seeded(
        diffusers.ChromaTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = built(
        diffusers.ChromaPipeline,
        transformer=network,
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        scheduler=flow(use_beta_sigmas=True),
    )
    ones = torch.ones(n, TOKENS, dtype=torch.bool)
    text = {"prompt_embeds": random(1, TOKENS, 8).repeat(n, 1, 1), "prompt_attention_mask": ones}
    return pipe, {**text, "guidance_scale": 0.0, "height": SIZE, "width": SIZE}


def stable_audio(n: int) -> tuple[Any, dict[str, Any]]:
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    network = seeded(
        diffusers.StableAudioDiTModel,
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_key_value_attention_heads=2,
        num_attention_heads=2,
        cross_attention_input_dim=8,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
    )
    autoencoder = seeded(
        diffusers.AutoencoderOobleck,
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[2, 4],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=4,
    )
    projection = seeded(StableAudioProjectionModel, text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32)
    pipe = built(
        diffusers.StableAudioPipeline,
        transformer=network,
        vae=autoencoder,
        projection_model=projection,
        scheduler=diffusers.EDMEulerScheduler(sigma_data=1.0, sigma_max=50.0, prediction_type="v_prediction"),
    )
    ones = torch.ones(1, TOKENS, dtype=torch.long)
    text = {"prompt_embeds": random(1, TOKENS, 8), "attention_mask": ones}
    text |= {"negative_prompt_embeds": random(1, TOKENS, 8, seed=2), "negative_attention_mask": ones}
    return pipe, {**text, "audio_end_in_s": 2.0, "num_waveforms_per_prompt": n}


MAKERS = (
    sd_text,
    sd_image,
    sd_inpaint,
    animate_diff,
    pixart_sigma,
    sd3_text,
    sd3_image,
    flux_text,
    flux_image,
    flux_inpaint,
    flux_fill,
    flux_kontext,
    flux2,
    qwen_text,
    qwen_image,
    qwen_edit,
    z_image,
    wan_text,
    ltx,
    sana,
    chroma,
    stable_audio,
    modular_flux,
    modular_sdxl,
)


class Evaluate(Exception):
    """k-diffusion's function asks for (state, sigma)."""


class Relay:
    """k-diffusion's own function in a pipeline, in place of its scheduler's method: mixed into the scheduler's class.

    At each step the function runs again from the start, over all that the network predicted so far, until it asks for
    more. The formulas are those of the papers, not those of scheduling_k_diffusion.py.
    """

    base: Any  # a scheduler of the same kind, for its levels and timesteps
    sampler: str
    noise: LevelNoise
    skipped = 0  # so many steps are left out (`strength`)
    unused = 0  # so many timesteps does the pipeline cut off
    quantize = False

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """Its `set_timesteps`."""
        me: Any = self
        type(self.base).set_timesteps(me, *args, **kwargs)
        config, stock = me.config, me.timesteps.double()[:: getattr(type(self.base), "order", 1)]
        self.data, self.inverted = config.get("sigma_data"), config.get("invert_sigmas")
        self.flow = ("alphas_cumprod" not in vars(self.base) and not self.data) or bool(config.get("use_flow_sigmas"))
        self.vp = not self.flow and not self.data and float(self.base.init_noise_sigma) == 1
        self.kind = "flow_prediction" if self.flow else config.get("prediction_type", "epsilon")
        if not self.flow and not self.data:
            self.table = (1 / self.base.alphas_cumprod.double().clamp(min=2**-24) - 1).sqrt().numpy()
        if not hasattr(me, "sigmas"):
            stock = stock.unique_consecutive()
            levels = torch.as_tensor(self.table[stock.long()])
        else:
            levels = 1 - me.sigmas.double() if self.inverted else me.sigmas.double()
            levels = levels.unique_consecutive()[: len(stock)]
        self.known = {} if self.quantize else dict(zip(levels.tolist(), stock.tolist()))
        # a flow model's t as "ve", for functions that add noise or place levels: sigma = t / (1 - t), at first finite
        asks = inspect.signature(getattr(sampling, f"sample_{self.sampler}")).parameters
        self.ve = self.flow and ("noise_sampler" in asks or "sigma_min" in asks)
        self.pure = self.ve and not self.skipped and float(levels[0]) > 0.9999
        if self.ve:
            levels = levels / (1 - levels)
            if not levels[0] < 9999:
                levels[0] = max(float(levels[1] ** 2 / levels[2]), 15.0)
        self.whole, self.within = levels.tolist(), 0
        if self.sampler == "dpm_fast" and self.skipped:  # the pipeline begins where the whole run would be
            self.prepare(levels)
            self.whole, self.within = self.planned, self.skipped
        self.prepare(levels[self.skipped :])
        found = [self.time(i) for i in range(len(self.planned))]
        times, self.at = [*range(-self.unused, 0), *found], {t: self.level(i) for i, t in enumerate(found)}
        whole = all(time == round(time) for time in times)
        me.timesteps = torch.tensor(times, dtype=me.timesteps.dtype if whole else torch.float32)
        if hasattr(me, "sigmas"):
            me.sigmas = torch.tensor([self.level(i) for i in range(len(times) + 1)])
        self.begun, self.start = None, None

    def prepare(self, levels: torch.Tensor) -> None:
        """Where the function evaluates: it runs with a network of zeros."""
        self.levels, self.seen, self.planned = torch.cat([levels, levels.new_zeros(1)]), [], []
        self.result(torch.zeros(1, 1, 1, 1, dtype=torch.float64))

    def result(self, start: torch.Tensor) -> Any:
        """What the function returns; or raises, if it needs more than it saw. Plans where it begins with zeros."""
        known, plan = iter(self.seen), start.dtype == torch.float64 and not self.planned

        def model(x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
            if plan:
                self.planned.append(float(sigma))
                return x * 0.5
            if (one := next(known, None)) is None:
                raise Evaluate(x)
            x.copy_(one[0])
            return one[1]

        function = getattr(sampling, f"sample_{self.sampler}")
        noise = {"noise_sampler": self.noise} if "noise_sampler" in inspect.signature(function).parameters else {}
        self.noise.like = start
        torch.set_default_dtype(torch.float64)  # in which dpm_fast makes its levels
        try:
            return self.call(function, model, start.clone(), noise)
        finally:
            torch.set_default_dtype(torch.float32)

    def call(self, function: Any, model: Any, start: torch.Tensor, noise: dict[str, Any]) -> torch.Tensor:
        if self.sampler != "dpm_fast":
            return function(model, start, self.levels, disable=True, **noise)
        low, whole, n = float(self.levels[-2]), self.whole, len(self.whole) - 1  # the last goes to zero
        # Lu et al. 2022, section 3.4: steps of three evaluations, the rest at the end. Within one, Euler's method
        # goes to the next
        orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
        first = min(i for i in [*itertools.accumulate(orders, initial=0)] if i >= self.within)
        for sigma, after in itertools.pairwise(whole[self.within : first + 1]):
            start = start + (start - model(start, torch.tensor([sigma]))) * (after / sigma - 1)
        x = function(model, start, low, whole[first], n - first, disable=True, **noise) if n > first else start
        return model(x, torch.tensor([low]))

    def level(self, i: int) -> float:
        """The base's level of evaluation i: sigma; for flow models t."""
        sigma = self.planned[i] if i < len(self.planned) else 0.0
        return (1.0 if self.pure and i == 0 else sigma / (1 + sigma)) if self.ve else sigma

    def share(self, i: int) -> float:
        """The pipeline's sample at evaluation i is this times the function's state."""
        sigma = self.planned[i] if i < len(self.planned) else 0.0
        if self.ve:
            return 1 / sigma if self.pure and i == 0 else 1 / (1 + sigma)
        return 1 / math.hypot(1, sigma) if self.vp else 1.0

    def time(self, i: int) -> float:
        """The network's timestep at evaluation i: the base's own at its levels, else by the formula of its kind."""
        level = self.level(i)
        for known, time in self.known.items():
            if math.isclose(known, level, rel_tol=1e-9):
                return time
        config: Any = self.base.config
        if self.flow:
            return config.get("num_train_timesteps", 1000) * (1 - level if self.inverted else level)
        if "Cosine" in type(self.base).__name__:
            return math.atan(level) * 2 / math.pi
        if self.data or config.get("timestep_type") == "continuous":
            return math.log(level) / 4
        distances = np.abs(np.log(self.table) - math.log(level))
        if self.quantize:
            return float(distances.argmin())
        return float(np.interp(math.log(level), np.log(self.table), np.arange(len(self.table))))

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        if self.flow or self.vp:
            return sample
        return sample / math.hypot(self.sigma(timestep), self.data or 1.0)

    def sigma(self, timestep: Any) -> float:
        """Of the evaluation that comes next, which `begun` finds at first."""
        if self.begun is None:
            self.begun = int((self.timesteps.double() - float(torch.as_tensor(timestep).max())).abs().argmin())
        return self.planned[min(len(self.seen), len(self.planned) - 1)]

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Any) -> torch.Tensor:
        near = min(self.at, key=lambda time: abs(time - float(timesteps.flatten()[0])))
        level = self.at[near]
        if self.flow:
            return (1 - level) * original_samples + level * noise
        return (original_samples + level * noise) / (math.hypot(1, level) if self.vp else 1.0)

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor) -> torch.Tensor:
        return self.add_noise(sample, noise, timestep)

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begun = begin_index

    def step(self, model_output: Any, timestep: Any, sample: Any, generator=None, return_dict=True, **_: Any) -> Any:
        sigma, i = self.sigma(timestep), len(self.seen)
        if model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        output = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
        # a pipeline that hands on what it got gives no news of the state, and what it got is rounded
        same = i > 0 and sample.equal(self.given)
        y = self.state if same else sample.to(output.dtype) / self.share(i)
        self.start = y if i == 0 else self.start
        self.seen.append((y, self.x0(output, y, sigma, i)))
        try:
            self.state = self.result(self.start)
        except Evaluate as asked:
            self.state = asked.args[0].clone()
        self.given = (self.state * self.share(i + 1)).to(model_output.dtype)
        both = self.given, self.seen[-1][1]
        return EulerDiscreteSchedulerOutput(*both) if return_dict else both

    def x0(self, output: torch.Tensor, y: torch.Tensor, sigma: float, i: int) -> torch.Tensor:
        if self.flow:
            return y * self.share(i) - self.level(i) * (-output if self.inverted else output)
        if self.data:  # Karras et al. 2022, Table 1; with the sign of v
            norm = math.hypot(sigma, self.data)
            sign = -1 if self.kind == "v_prediction" else 1
            return (self.data / norm) ** 2 * y + sign * sigma * self.data / norm * output
        if self.kind == "epsilon":
            return y - sigma * output
        if self.kind == "v_prediction":
            return y / (1 + sigma**2) - sigma / math.hypot(1, sigma) * output
        return output


class LevelNoise:
    """A noise sampler of k-diffusion's whose noise depends on the levels alone, for states as the one it saw last."""

    like: torch.Tensor

    def __call__(self, sigma: Any, sigma_next: Any) -> torch.Tensor:
        a, b = (math.log(max(float(one), 1e-6)) for one in (sigma, sigma_next))
        first, second = (random(*self.like.shape, seed=seed, dtype=torch.float32).to(self.like) for seed in (5, 6))
        return first * math.cos(9 * a) + second * math.sin(9 * b)


def over_k_diffusion(base: Any, sampler: str, noise: LevelNoise, **options: Any) -> Any:
    """A scheduler of the base's class that hands each prediction to k-diffusion's function."""
    scheduler = copy.deepcopy(base)
    scheduler.__class__ = type("Relay", (Relay, type(base)), {})
    vars(scheduler).update(base=base, sampler=sampler, noise=noise, **options)
    # with the base's signature, in which pipelines look for `sigmas`
    scheduler.set_timesteps = functools.wraps(base.set_timesteps)(functools.partial(scheduler.plan))
    return scheduler


def run_over_k_diffusion(run: Callable[[Any], Any], base: Any, sampler: str, noise: LevelNoise, **options: Any) -> Any:
    """What `run(scheduler)` gives with k-diffusion's function, from the step that the pipeline begins with.

    ValueError: there is none, where a pipeline counts evaluations and begins within a step.
    """
    run(first := over_k_diffusion(base, "euler", noise, **options))
    skipped = unused = first.begun
    for _ in range(4):  # by how many timesteps there are, some pipelines cut off another number
        found = run(scheduler := over_k_diffusion(base, sampler, noise, skipped=skipped, unused=unused, **options))
        if scheduler.begun == unused:
            return found
        unused = scheduler.begun
    raise ValueError("it begins within a step")
