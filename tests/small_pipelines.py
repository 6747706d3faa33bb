"""Pipelines of diffusers with random networks of a few thousand parameters, and without text encoders."""

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
from conftest import default_dtype
from diffusers import modular_pipelines
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from PIL import Image

from scheduling_k_diffusion import sampling

SIZE, TOKENS = 32, 4


def random(*shape: int, seed: int = 1, dtype: Any = None) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
MASK = Image.fromarray(np.repeat([[0, 255]], SIZE // 2, 1).repeat(SIZE, 0).astype(np.uint8))  # the right half

# fmt: off
ATTENTION = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8)
JOINT = dict(**ATTENTION, joint_attention_dim=8, axes_dims_rope=(4, 2, 2))
BLOCKS = dict(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4,
              down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
LATENTS = dict(z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
CONFIGS = {
    "UNet2DConditionModel": dict(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=SIZE // 2,
        cross_attention_dim=8, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
    "MotionAdapter": dict(block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2,
                          motion_num_attention_heads=2),
    "PixArtTransformer2DModel": dict(
        sample_size=SIZE // 2, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2,
        caption_channels=8, in_channels=4, cross_attention_dim=8, out_channels=8, use_additional_conditions=False),
    "SD3Transformer2DModel": dict(
        **ATTENTION, sample_size=SIZE // 2, patch_size=1, in_channels=4, out_channels=4, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=SIZE // 2),
    "FluxTransformer2DModel": dict(**JOINT, num_single_layers=1, in_channels=16, out_channels=16,
                                   pooled_projection_dim=8),
    "Flux2Transformer2DModel": dict(**JOINT | dict(axes_dims_rope=(2, 2, 2, 2)), num_single_layers=1, in_channels=16,
                                    timestep_guidance_channels=8),
    "QwenImageTransformer2DModel": dict(**JOINT, patch_size=2, in_channels=16, out_channels=4),
    "ZImageTransformer2DModel": dict(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 2, 2], axes_lens=[64, 32, 32]),
    "WanTransformer3DModel": dict(
        **ATTENTION | dict(attention_head_dim=12), in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=16,
        rope_max_seq_len=32),
    "LTXVideoTransformer3DModel": dict(**ATTENTION, in_channels=4, out_channels=4, cross_attention_dim=16,
                                       caption_channels=8),
    "SanaTransformer2DModel": dict(
        **ATTENTION | dict(attention_head_dim=4), in_channels=4, out_channels=4, num_cross_attention_heads=2,
        cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=SIZE),
    "ChromaTransformer2DModel": dict(
        **JOINT, num_single_layers=1, in_channels=16, approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1),
    "StableAudioDiTModel": dict(
        **ATTENTION, sample_size=4, in_channels=4, out_channels=4, num_key_value_attention_heads=2,
        cross_attention_input_dim=8, cross_attention_dim=8, time_proj_dim=8, global_states_input_dim=16),
    "StableAudioProjectionModel": dict(text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32),
    "AutoencoderKL": dict(**BLOCKS, sample_size=SIZE),
    "AutoencoderKLFlux2": BLOCKS,
    "AutoencoderKLQwenImage": dict(**LATENTS, base_dim=8, dim_mult=[1, 1], temperal_downsample=[False]),
    "AutoencoderKLWan": dict(**LATENTS, base_dim=4, dim_mult=[1, 1], temperal_downsample=[True]),
    "AutoencoderKLLTXVideo": dict(
        latent_channels=4, block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
        down_block_types=("LTXVideoDownBlock3D",) * 2, layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True), decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3, patch_size=1),
    "AutoencoderOobleck": dict(
        encoder_hidden_size=4, downsampling_ratios=[1, 2], channel_multiples=[2, 4], decoder_channels=4,
        decoder_input_channels=4, sampling_rate=4),
    "EulerDiscreteScheduler": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
    # of order 1 it is Euler's method
    "DPMSolverMultistepScheduler": dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0,
                                        solver_order=1),
    "EDMEulerScheduler": dict(sigma_data=1.0, sigma_max=50.0, prediction_type="v_prediction"),
}


def flow(**config: Any) -> tuple[str, dict[str, Any]]:
    return "FlowMatchEulerDiscreteScheduler", config


# {component: class, or class and what its config has beside the above}
VAE, SHIFTED_VAE = "AutoencoderKL", ("AutoencoderKL", dict(shift_factor=0.1, scaling_factor=0.4))
SD = dict(unet="UNet2DConditionModel", vae=VAE, scheduler="EulerDiscreteScheduler")
SDXL = SD | dict(unet=("UNet2DConditionModel", dict(
    addition_embed_type="text_time", addition_time_embed_dim=2, transformer_layers_per_block=1,
    projection_class_embeddings_input_dim=6 * 2 + 8)))
SD3 = dict(transformer="SD3Transformer2DModel", vae=SHIFTED_VAE, scheduler=flow(shift=3.0))
FLUX = dict(transformer="FluxTransformer2DModel", vae=SHIFTED_VAE, scheduler=flow(use_dynamic_shifting=True))
# latents, the masked image's, and the mask's 2 x 2 pixels in 2 x 2 patches
FILL = FLUX | dict(transformer=("FluxTransformer2DModel", dict(in_channels=16 + 16 + 16)))
FLUX2 = FLUX | dict(transformer="Flux2Transformer2DModel", vae="AutoencoderKLFlux2")
QWEN = FLUX | dict(transformer="QwenImageTransformer2DModel", vae="AutoencoderKLQwenImage")
# the pipeline makes a megapixel of any picture
EDIT = QWEN | dict(vae=("AutoencoderKLQwenImage", dict(base_dim=2, dim_mult=[1] * 6, temperal_downsample=[False] * 5)))
WAN = dict(transformer="WanTransformer3DModel", vae="AutoencoderKLWan", scheduler="DPMSolverMultistepScheduler")
AUDIO = dict(transformer="StableAudioDiTModel", vae="AutoencoderOobleck", scheduler="EDMEulerScheduler",
             projection_model="StableAudioProjectionModel")

ONES = torch.ones(1, TOKENS, dtype=torch.long)
EMBEDS, POOLED = dict(prompt_embeds=random(1, TOKENS, 8)), dict(pooled_prompt_embeds=random(1, 8))
TEXT = EMBEDS | dict(negative_prompt_embeds=random(1, TOKENS, 8, seed=2))
MASKED = TEXT | dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES)
UNBINNED = dict(negative_prompt=None, use_resolution_binning=False)
SIZED, SMALL, SOME = dict(height=SIZE, width=SIZE), dict(height=16, width=16), dict(image=PICTURE, strength=0.6)
SD_TEXT = TEXT | dict(num_images_per_prompt=1, guidance_scale=3.0)
SD3_TEXT = TEXT | POOLED | dict(negative_pooled_prompt_embeds=random(1, 8)) | SIZED
FLUX_TEXT = EMBEDS | POOLED | SIZED
QWEN_TEXT = EMBEDS | dict(prompt_embeds_mask=ONES, true_cfg_scale=1.0) | SIZED
PIPELINES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd_text": ("StableDiffusionPipeline", SD, SD_TEXT | SIZED),
    "sd_image": ("StableDiffusionImg2ImgPipeline", SD, SD_TEXT | SOME),
    "sd_inpaint": ("StableDiffusionInpaintPipeline", SD,
                   SD_TEXT | SIZED | dict(image=PICTURE, mask_image=MASK, strength=0.8)),
    "animate_diff": ("AnimateDiffPipeline", SD | dict(motion_adapter="MotionAdapter"),
                     TEXT | SMALL | dict(num_frames=2)),
    "pixart_sigma": ("PixArtSigmaPipeline", SD | dict(transformer="PixArtTransformer2DModel"),
                     MASKED | UNBINNED | SIZED | dict(num_images_per_prompt=1)),
    "sd3_text": ("StableDiffusion3Pipeline", SD3, SD3_TEXT),
    "sd3_image": ("StableDiffusion3Img2ImgPipeline", SD3, SD3_TEXT | dict(image=[PICTURE], strength=0.6)),
    "flux_text": ("FluxPipeline", FLUX, FLUX_TEXT),
    "flux_image": ("FluxImg2ImgPipeline", FLUX, FLUX_TEXT | SOME),
    "flux_inpaint": ("FluxInpaintPipeline", FLUX, FLUX_TEXT | dict(image=PICTURE, mask_image=MASK, strength=0.8)),
    "flux_fill": ("FluxFillPipeline", FILL, FLUX_TEXT | dict(image=PICTURE, mask_image=MASK)),
    "flux_kontext": ("FluxKontextPipeline", FLUX,
                     FLUX_TEXT | dict(image=PICTURE, max_area=SIZE * SIZE, _auto_resize=False)),
    "flux2": ("Flux2Pipeline", FLUX2, EMBEDS | SIZED),
    "qwen_text": ("QwenImagePipeline", QWEN, QWEN_TEXT),
    "qwen_image": ("QwenImageImg2ImgPipeline", QWEN, QWEN_TEXT | SOME),
    "qwen_edit": ("QwenImageEditPipeline", EDIT, QWEN_TEXT | dict(image=PICTURE, height=256, width=256)),
    "z_image": ("ZImagePipeline", SD3 | dict(transformer="ZImageTransformer2DModel", vae=VAE),
                SIZED | dict(prompt_embeds=[random(TOKENS, 8)], guidance_scale=0.0)),
    "wan_text": ("WanPipeline", WAN, TEXT | SMALL | dict(num_frames=5)),
    "wan_video": ("WanVideoToVideoPipeline", WAN,
                  TEXT | SMALL | dict(video=[PICTURE.resize((16, 16))] * 5, strength=0.7)),
    "ltx": ("LTXPipeline", FLUX | dict(transformer="LTXVideoTransformer3DModel", vae="AutoencoderKLLTXVideo"),
            MASKED | SIZED | dict(num_frames=5)),
    "sana": ("SanaPipeline", dict(transformer="SanaTransformer2DModel", scheduler=flow(shift=3.0)),
             MASKED | UNBINNED | dict(height=256, width=256)),
    "chroma": ("ChromaPipeline",
               FLUX | dict(transformer="ChromaTransformer2DModel", scheduler=flow(use_beta_sigmas=True)),
               EMBEDS | SIZED | dict(prompt_attention_mask=ONES.bool(), guidance_scale=0.0)),
    "stable_audio": ("StableAudioPipeline", AUDIO, TEXT | dict(
        attention_mask=ONES, negative_attention_mask=ONES, audio_end_in_s=2.0, num_waveforms_per_prompt=1)),
    "modular_flux": ("FluxAutoBlocks", FLUX, FLUX_TEXT),
    "modular_sdxl": ("StableDiffusionXLAutoBlocks", SDXL,
                     TEXT | POOLED | dict(negative_pooled_prompt_embeds=random(1, 8, seed=3)) | SIZED),
}
# fmt: on


def component(name: str, config: dict[str, Any]) -> Any:
    """A scheduler, or a network whose weights are the same each time and large enough to matter. (Some begin as 0.)"""
    torch.manual_seed(0)
    made = getattr(diffusers, name)(**CONFIGS.get(name, {}) | config)
    if isinstance(made, torch.nn.Module):
        made.eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in made.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.05, generator=generator)
    return made


def built(kind: str, components: dict[str, Any]) -> Any:
    """The pipeline, with None for each component that is not given; a modular one from embeddings to latents."""
    if kind.endswith("Blocks"):
        denoise = getattr(modular_pipelines, kind)().sub_blocks["denoise"]
        pipe = modular_pipelines.SequentialPipelineBlocks.from_blocks_dict({"denoise": denoise}).init_pipeline()
        pipe.update_components(**{name: components[name] for name in pipe.component_names if name in components})
    else:
        parameters = inspect.signature(getattr(diffusers, kind)).parameters
        needed = [name for name, one in parameters.items() if one.default is one.empty]
        given = {name: one for name, one in components.items() if name in parameters}
        options = {"requires_safety_checker": False} if "requires_safety_checker" in parameters else {}
        pipe = getattr(diffusers, kind)(**dict.fromkeys(needed) | given | options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_pipeline(name: str, n: int = 1) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and the arguments of its call for n images: those of one image repeated."""
    kind, components, arguments = PIPELINES[name]
    made = {part: component(*((one, {}) if isinstance(one, str) else one)) for part, one in components.items()}
    found = dict(arguments)
    count = next((key for key in arguments if key.endswith("_per_prompt")), None)
    for key, value in arguments.items() if count is None else ():
        if isinstance(value, torch.Tensor):
            found[key] = value.repeat(n, *[1] * (value.ndim - 1))
        elif isinstance(value, list):
            found[key] = value * n
    return built(kind, made), found if count is None else found | {count: n}


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
    skipped = 0  # steps that are left out (`strength`)
    unused = 0  # timesteps that the pipeline cuts off
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
        # the level of a first sample that is pure noise
        self.pure = float(levels[0]) if self.ve and not self.skipped and float(levels[0]) > 0.9999 else 0.0
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
        with default_dtype(torch.float64):  # in which dpm_fast makes its levels
            return self.call(function, model, start.clone(), noise)

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
        return (self.pure if self.pure and i == 0 else sigma / (1 + sigma)) if self.ve else sigma

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
        # a sample that comes back unchanged is the rounded state: the unrounded one is kept
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
    """A noise sampler of k-diffusion's whose noise depends on the levels alone, for states as `like`."""

    def __init__(self, like: Any = None):
        self.like = like

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
    for _ in range(4):  # the number that some pipelines cut off depends on the number of timesteps
        found = run(scheduler := over_k_diffusion(base, sampler, noise, skipped=skipped, unused=unused, **options))
        if scheduler.begun == unused:
            return found
        unused = scheduler.begun
    raise ValueError("it begins within a step")
