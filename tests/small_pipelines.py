"""Pipelines of diffusers with random networks of a few thousand parameters, and without text encoders.

Each function of `MAKERS` returns a pipeline and the arguments of its call for n images (the arguments of one image
repeated; the first sample differs). Latents come back, not images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SIZE = 32
TOKENS = 4


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
