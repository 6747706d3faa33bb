"""StableDiffusionXLComfyPipeline: SDXL in diffusers, sampled by k-diffusion.

    pipe = StableDiffusionXLComfyPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", ...)
    image = pipe("an astronaut", sampler="dpmpp_2m", schedule="karras", num_inference_steps=25).images[0]

This file works alone: it needs torch, diffusers, transformers and k-diffusion, and can be copied anywhere.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import importlib.util
import inspect
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor


class StableDiffusionXLComfyPipeline(StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with the scheduler's loop replaced by one call of a k-diffusion sampler.

    Components, loaders, LoRA, IP-adapter and offloading are the parent's. The scheduler says which betas the network
    was trained with and, when the caller names no schedule, which noise levels to use. Its `step` is never called.
    Like the parent it serves one call at a time.
    """

    _callback_tensor_inputs = [*StableDiffusionXLPipeline._callback_tensor_inputs, "denoised", "sigma"]

    def to_json_string(self) -> str:
        """The configuration. It names the parent, so that every loader of diffusers reads a saved folder."""
        return super().to_json_string().replace(f'"{type(self).__name__}"', '"StableDiffusionXLPipeline"')

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, the parent's default
        *,
        sampler: str | Callable = "euler",
        sampler_kwargs: dict[str, Any] | None = None,
        schedule: str | Sequence[float] | torch.Tensor | None = None,
        quantize_timesteps: bool = False,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        """Draws images. The parent's arguments keep their names, meanings and defaults. New arguments:

        Args:
            sampler: a k-diffusion sampler by name (`sampler_names()`), or a callable with the same signature,
                `sampler(model, x, sigmas, extra_args=None, callback=None, disable=None)`. Its noise follows the
                generator. `model(x, sigma, with_uncond=True)` stacks x0 with guidance and x0 without guidance.
            sampler_kwargs: the sampler's options: `eta`, `s_noise`, `s_churn`, `noise_sampler`, `solver_type`, ...
            schedule: "karras", "exponential" or "polyexponential" between the lowest and the highest trained level, or
                the noise levels themselves, falling sigmas. Latents, in and out, are then x0 + sigma noise.
            quantize_timesteps: give the network the nearest trained timestep instead of an interpolated one.

        Unless `schedule` is a list of levels, latents have the scheduler's scale (see `latents_scale`), and `latents`
        are unit noise. ValueError, TypeError: an argument is wrong, before any network runs.

        `callback_on_step_end` is called once per step with the latents at the step's end and the timestep at its start.
        By name it also gets `sigma`, the level at the start, and `denoised`, the x0 predicted there. It may return
        other latents; with a user-supplied sampler only if that loops over this module's `sampling.trange`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor
        embeds = (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        images = (ip_adapter_image, ip_adapter_image_embeds)
        rest = (negative_prompt, negative_prompt_2, *embeds, *images, callback_on_step_end_tensor_inputs)
        self.check_inputs(prompt, prompt_2, height, width, None, *rest)
        if eta:
            raise ValueError("`eta` is an option of the sampler here: pass sampler_kwargs={'eta': ...}")
        resolved = find_sampler(sampler, sampler_kwargs)
        levels = self.noise_levels(num_inference_steps, timesteps, sigmas, schedule, denoising_end)
        given: Any = prompt_embeds if prompt is None else prompt
        batch_size = (1 if isinstance(given, str) else len(given)) * (num_images_per_prompt or 1)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator`: has to be one or {batch_size}, one per image, but is {len(generator)}")

        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._denoising_end = denoising_end
        self._interrupt, self._num_timesteps = False, len(levels) - 1
        device, dtype = self._execution_device, self.unet.dtype  # the text encoders' dtype may be another
        state_dtype = torch.promote_types(dtype, torch.float32)

        try:
            # prompts, images, sizes -> conditioning
            texts = (prompt, prompt_2, device, num_images_per_prompt, self.do_classifier_free_guidance)
            texts += (negative_prompt, negative_prompt_2, *embeds)
            sizes = (original_size or (height, width), crops_coords_top_left, target_size or (height, width))
            negative_sizes = (negative_original_size, negative_crops_coords_top_left, negative_target_size)
            if negative_original_size is None or negative_target_size is None:
                negative_sizes = sizes
            rest = ((sizes, negative_sizes), batch_size, dtype)
            noise_dtype, conditioning, image_embeds = self._encode(texts, images, *rest)
            denoiser = self._denoiser(conditioning, image_embeds, quantize_timesteps)

            # generator -> noise, the stock pipeline's own -> x at the first level
            explicit = schedule is not None and not isinstance(schedule, str)  # latents are x0 + sigma noise then
            spacing = self.scheduler.config.get("timestep_spacing")
            start = math.hypot(1, levels[0])  # this and sigma, below, as the schedulers' init_noise_sigma
            if explicit or ((schedule or spacing in ("linspace", "trailing")) and self.latents_scale(levels[0]) == 1):
                start = float(levels[0]) if latents is None or not explicit else 1.0
            if latents is None:
                shape = (self.unet.config.in_channels, *(side // self.vae_scale_factor for side in (height, width)))
                latents = randn_tensor((batch_size, *shape), generator, device, noise_dtype)
            x = latents.to(device, state_dtype) * start

            # noise, levels -> latents
            def after_step(i, x, sigma, began, denoised) -> torch.Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return x
                timestep = denoiser.sigma_to_t(began.to(device, non_blocking=True).reshape(1))[0]
                scale = 1.0 if explicit else self.latents_scale(sigma)
                tensors = {"latents": x / scale, "sigma": began.clone(), "denoised": denoised.clone(), **conditioning}
                shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = tensors | (callback_on_step_end(self, i, timestep, shown) or {})
                conditioning.update({name: changed[name].to(device, dtype) for name in conditioning})
                back = changed["latents"]
                return x + (back - x / scale) * scale if torch.is_tensor(scale) else back  # x if unchanged

            with self.progress_bar(total=math.inf if "sigma_min" in resolved.arguments else len(levels) - 1) as bar:
                given = (levels.to(state_dtype), generator, after_step, lambda: self.interrupt)
                x, sigma = run_sampler(resolved, denoiser, x, *given)
            latents = x / (1.0 if explicit else self.latents_scale(sigma))

            # latents -> images
            image = latents if output_type == "latent" else self._decode(latents, output_type)
        finally:
            self.maybe_free_model_hooks()
        return StableDiffusionXLPipelineOutput(images=image) if return_dict else (image,)

    def _encode(self, texts, images, sizes, batch_size: int, dtype: torch.dtype) -> tuple[torch.dtype, dict, dict]:
        """The text encoders' dtype, and the U-Net's text and image conditioning, its negative half first."""
        device, _, guided = texts[2:5]
        embeds = self.encode_prompt(*texts, (self.cross_attention_kwargs or {}).get("scale"), self.clip_skip)
        time_ids = [self._get_add_time_ids(*size, dtype, embeds[2].shape[-1]).repeat(batch_size, 1) for size in sizes]
        pairs = {"prompt_embeds": embeds[:2], "add_text_embeds": embeds[2:], "add_time_ids": time_ids}
        halves = {name: torch.cat([pair[1], pair[0]]) if guided else pair[0] for name, pair in pairs.items()}
        image_embeds = {}
        if any(image is not None for image in images):
            image_embeds["image_embeds"] = self.prepare_ip_adapter_image_embeds(*images, device, batch_size, guided)
        return embeds[0].dtype, {name: value.to(device, dtype) for name, value in halves.items()}, image_embeds

    def _denoiser(self, conditioning: dict[str, torch.Tensor], image_embeds: dict[str, Any], quantize: bool) -> Any:
        """k-diffusion's wrapper of the network: a function of x and sigma, shape (b,), that predicts x0."""
        pooled = conditioning["add_text_embeds"]  # where the network is, in its dtype: to ask it takes milliseconds
        dtype, state_dtype, timestep_cond = pooled.dtype, torch.promote_types(pooled.dtype, torch.float32), None
        if (dim := self.unet.config.time_cond_proj_dim) is not None:
            scales = torch.full([len(pooled)], self.guidance_scale - 1.0)
            timestep_cond = self.get_guidance_scale_embedding(scales, dim).to(pooled)

        def predict(x: torch.Tensor, timestep: torch.Tensor, with_uncond: bool = False) -> torch.Tensor:
            """Epsilon or v of the input x / sqrt(sigma^2 + 1) at a timestep of shape (b,), with guidance."""
            guided = self.do_classifier_free_guidance
            if with_uncond and not guided:
                raise ValueError("`sampler` needs both sides of guidance: `guidance_scale` has to be above 1")
            if guided:
                x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
            text, pooled, ids = conditioning.values()
            named = {"encoder_hidden_states": text, "timestep_cond": timestep_cond, "return_dict": False}
            named["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids, **image_embeds}
            named["cross_attention_kwargs"] = self.cross_attention_kwargs
            prediction = self.unet(x.to(dtype), timestep, **named)[0].to(state_dtype)
            if not guided:
                return prediction
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + self.guidance_scale * (conditional - unconditional)
            if self.guidance_rescale > 0:
                prediction = rescale_noise_cfg(prediction, conditional, guidance_rescale=self.guidance_rescale)
            return torch.stack([prediction, unconditional]) if with_uncond else prediction

        wrapper, alphas_cumprod = self._trained_with()
        denoiser = wrapper(predict, alphas_cumprod.to(pooled.device, state_dtype), quantize)
        if self.scheduler.config.get("timestep_type") == "continuous" and wrapper is external.DiscreteVDDPMDenoiser:
            denoiser.sigma_to_t = lambda sigma, quantize=None: 0.25 * sigma.log()
        return denoiser

    def latents_scale(self, sigma: torch.Tensor) -> torch.Tensor | float:
        """sqrt(1 + sigma^2) for schedulers that divide x0 + sigma noise by that, as DDIM's does. Otherwise 1."""
        return (1 + sigma**2).sqrt() if float(self.scheduler.init_noise_sigma) == 1 else 1.0

    def _trained_with(self) -> tuple[type, torch.Tensor]:
        """k-diffusion's wrapper for the network's prediction, and the alphas_cumprod it was trained with, float64."""
        wrappers = {"epsilon": external.DiscreteEpsDDPMDenoiser, "v_prediction": external.DiscreteVDDPMDenoiser}
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind not in wrappers or not hasattr(self.scheduler, "alphas_cumprod"):
            name = f"{type(self.scheduler).__name__} with {kind!r}"
            raise ValueError(f"`scheduler`: needs betas and 'epsilon' or 'v_prediction', but is {name}")
        # zero terminal SNR has no finite last sigma: as EulerDiscreteScheduler does, take 4096 for it
        return wrappers[kind], self.scheduler.alphas_cumprod.cpu().double().clamp(min=2**-24)

    def noise_levels(
        self,
        num_inference_steps: int | None = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        schedule: str | Sequence[float] | torch.Tensor | None = None,
        denoising_end: float | None = None,
    ) -> torch.Tensor:
        """The noise levels of a call with these arguments: sigmas, falling, float64, on the CPU."""
        alphas_cumprod = self._trained_with()[1]
        trained = external.DiscreteSchedule(((1 - alphas_cumprod) / alphas_cumprod).sqrt(), quantize=False)
        given = [f"`{name}`" for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None]
        if schedule is not None and given:
            raise ValueError(f"`schedule` and {given[0]} both give the noise levels: pass one of them")
        if not given and (schedule is None or isinstance(schedule, str)) and (num_inference_steps or 0) < 1:
            raise ValueError(f"`num_inference_steps` has to be at least 1, but is {num_inference_steps}")
        n = num_inference_steps or 0  # 0 where the levels are given
        if isinstance(schedule, str):
            ends = [self.scheduler.config.get(s) or getattr(trained, s).item() for s in ("sigma_min", "sigma_max")]
            levels = named_sigmas(schedule, n, *ends)
        elif schedule is not None:
            levels = check_sigmas(schedule, "schedule", at_least=2)
        else:
            scheduler = copy.deepcopy(self.scheduler)  # set_timesteps changes it
            if sigmas is not None:
                check_sigmas(sigmas)
                if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
                    raise ValueError(f"`sigmas`: {type(scheduler).__name__} takes none; pass them as `schedule`")
            with torch.device("cpu"):  # whatever the default device
                retrieve_timesteps(scheduler, num_inference_steps, "cpu", timesteps, sigmas)
            if hasattr(scheduler, "sigmas"):
                levels = torch.as_tensor(scheduler.sigmas, dtype=torch.float64, device="cpu").clone()
                if sigmas is None:
                    levels[-1] = 0.0  # DEIS and others end with the lowest level
            else:
                levels = trained.t_to_sigma(scheduler.timesteps.cpu()).double()
                levels = torch.cat([levels, levels.new_zeros(1)])
            levels = levels.unique_consecutive()  # Heun's and KDPM2's schedulers list a level twice
            if not given and len(levels) <= n:
                raise ValueError(f"`num_inference_steps`: the scheduler makes {len(levels) - 1} of {n} steps")
            check_sigmas(levels, f"{type(scheduler).__name__}.sigmas")
        if denoising_end is not None and 0 < denoising_end < 1:
            count = self.scheduler.config.num_train_timesteps
            # 1e-3: sigma_to_t differs from a timestep by the rounding of the scheduler's float32 sigmas
            reached = trained.sigma_to_t(levels[:-1]) > round(count - denoising_end * count) - 1e-3
            levels = levels[: int(reached.sum()) + 1]
        return levels

    def _decode(self, latents: torch.Tensor, output_type: str | None) -> Any:
        """Images of the final latents. A VAE that would overflow in float16 runs in float32."""
        config, vae_dtype = self.vae.config, self.vae.dtype
        upcast = vae_dtype == torch.float16 and config.force_upcast
        if upcast:
            self.vae.to(dtype=torch.float32)
        try:
            hooked = hasattr(self.vae, "_hf_hook") or hasattr(self.vae, "_diffusers_hook")
            latents = latents.to(latents.device if hooked else self.vae.device, self.vae.dtype) / config.scaling_factor
            mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
            if mean is not None and std is not None:
                mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
                latents = latents * std + mean
            image = self.vae.decode(latents, return_dict=False)[0]
        finally:
            if upcast:
                self.vae.to(dtype=vae_dtype)
        if self.watermark is not None:
            image = self.watermark.apply_watermark(image)
        return self.image_processor.postprocess(image, output_type=output_type)


# --- shared block: the same text in the three files that are copied alone; `python tests/blocks.py` copies it ---

# k-diffusion's submodules, in a package of another name: the `__init__` of its own imports the training code
if (spec := importlib.util.find_spec("k_diffusion")) is None:
    raise ImportError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
package = sys.modules.setdefault("k_diffusion_alone", ModuleType("k_diffusion_alone"))
package.__path__ = spec.submodule_search_locations or []
modules: Any = (importlib.import_module(f"k_diffusion_alone.{name}") for name in ("sampling", "external"))
sampling, external = modules
CODE = sampling.__spec__.loader.get_code(sampling.__name__)
GIVEN = {"model", "x", "sigmas", "sigma_min", "sigma_max", "n", "extra_args", "callback", "disable"}  # not options
GLOBAL_GENERATORS = vars(sampling).setdefault("global_generators", threading.RLock())  # all copies share it


def fresh_sampling(dtype: torch.dtype, **functions: Callable) -> Any:
    """k-diffusion's `sampling`, executed again as a module of its own, with these functions in place of torch's."""
    module: Any = importlib.util.module_from_spec(sampling.__spec__)
    exec(CODE, vars(module))
    # 0-dim tensors on the CPU mix with latents on any device; torch's defaults (dtype, device) do not count
    functions["linspace"] = lambda *args, device=None: torch.linspace(*args, dtype=dtype, device="cpu")
    functions["tensor"] = lambda value: torch.tensor(value, dtype=dtype, device="cpu")
    functions["__getattr__"] = functools.partial(getattr, torch)  # all other names are torch's
    module.torch, module.trange, module.DPMSolver.eps = ModuleType("torch"), sampling.trange, sampling.DPMSolver.eps
    vars(module.torch).update(functions)
    module.utils = SimpleNamespace(append_dims=lambda sigma, n: sigma)  # its levels stay 0-dim
    return module


def sampler_names() -> list[str]:
    """The samplers of the installed k-diffusion, without `sample_`, in the order of its source."""
    return [name[7:] for name in vars(sampling) if name.startswith("sample_")]


class Sampler(NamedTuple):
    """A function of k-diffusion, or a user-supplied callable with such a signature, and its options."""

    function: Callable
    name: str
    options: dict[str, Any]
    arguments: dict[str, Any]  # all that it takes, by name: the option, else the default, else None
    takes_any: bool  # it has **kwargs
    is_k_diffusions: bool


def find_sampler(sampler: Any, sampler_kwargs: dict[str, Any] | None = None) -> Sampler:
    """A sampler by name, or a callable, with its options. ValueError, TypeError: there is none, or not these."""
    options = dict(sampler_kwargs or {})
    if isinstance(sampler, str):
        if (name := sampler.removeprefix("sample_")) not in sampler_names():
            others = f"there are {', '.join(sampler_names())}; comfy_ksampler.py has ComfyUI's"
            raise ValueError(f"`sampler`: there is no {sampler!r}; {others}")
        sampler = getattr(sampling, f"sample_{name}")
    while isinstance(sampler, functools.partial) and not sampler.args:
        options, sampler = {**sampler.keywords, **options}, sampler.func
    try:
        (taken := inspect.signature(sampler)).bind_partial("model", "x", "sigmas")
        parameters = [*taken.parameters.values()]
    except (TypeError, ValueError):
        signature = "sampler(model, x, sigmas, extra_args=None, callback=None, disable=None, ...)"
        raise TypeError(f"`sampler` has to be a name or a callable, {signature}, but is {sampler!r}") from None
    name, takes_any = getattr(sampler, "__name__", repr(sampler)), any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    named = [p.name for p in parameters[3:] if p in by_name and p.name not in GIVEN]
    wrong = [f"needs {p.name}" for p in by_name if p.name in named and p.default is p.empty and p.name not in options]
    wrong += [f"takes no {option}" for option in sampler_kwargs or {} if option not in named and not takes_any]
    if wrong:
        raise ValueError(f"`sampler_kwargs`: {name} {', '.join(wrong)}; it takes {', '.join(named) or 'none'}")
    arguments: dict[str, Any] = {p.name: None if p.default is p.empty else p.default for p in by_name}
    arguments |= {key: value for key, value in options.items() if key not in GIVEN}
    is_k_diffusions = any(sampler is one for one in vars(sampling).values())
    if is_k_diffusions and "rtol" in arguments and not arguments["rtol"] + arguments["atol"] > 0:
        raise ValueError("`sampler_kwargs`: rtol or atol has to be above 0, or the steps never end")
    return Sampler(sampler, name, options, arguments, takes_any, is_k_diffusions)


def check_sigmas(sigmas: Any, name: str = "sigmas", at_least: int = 1) -> torch.Tensor:
    """`sigmas` (any scale), copied in float64 to the CPU. ValueError unless finite, falling and not below zero."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten().clone()
    single = levels.float()  # in which a sampler may get them
    falling = single.isfinite().all() and (single.diff() < 0).all() and (single[:1] > 0).all() and (levels >= 0).all()
    if len(levels) < at_least or not falling:
        rule = f"finite and fall from a positive number to zero or above (as float32), {at_least} of them at least"
        raise ValueError(f"`{name}` have to be {rule}: {sigmas}")
    return levels


def white_noise(x: torch.Tensor, generator: Any) -> torch.Tensor:
    """Standard normals of x's shape, dtype and device, drawn where the caller's generator or generators are."""
    first = generator[0] if isinstance(generator, list) else generator
    return _sent(randn_tensor(x.shape, generator, first.device if first else x.device, x.dtype), x.device)


def _sent(noise: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Noise on the latents' device. From pinned memory, so that the CPU does not wait for a GPU to take it."""
    pinned = noise.device.type == "cpu" and device.type == "cuda"
    return noise.pin_memory().to(device, non_blocking=True) if pinned else noise.to(device)


def brownian_noise(x: torch.Tensor, seeds: Sequence[int], device: torch.device | str) -> Callable:
    """Step noise (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|) of x's shape: a path W for each image's seed.

    In law k-diffusion's BrownianTreeNoiseSampler, but W depends on the seed alone. Levy's construction: W(2^-64) = 0,
    normal 0 gives W(2^64), normal 1 W at the middle in log sigma, 2 n and 2 n + 1 at the middles of n's two halves.
    """
    generator = torch.Generator(device)

    @functools.lru_cache(22)  # for speed: a level has 22, and the next one draws about 13 of them anew
    def normal(node: int) -> torch.Tensor:
        noise = torch.empty(x.shape, dtype=x.dtype, device=device)
        for image, seed in zip(noise, seeds, strict=True):
            # the CPU's generator uses the low 32 bits of a seed; the odd factor keeps a path's nodes apart there
            image.normal_(generator=generator.manual_seed((seed + node * 0x9E3779B97F4A7C15) % 2**63))
        return noise

    @functools.lru_cache(2)  # for speed: a step begins where another ended
    def w(sigma: float) -> torch.Tensor:
        low, high, node = 2.0**-64, 2.0**64, 1
        total = normal(0) * ((sigma - low) / math.sqrt(high - low))
        for _ in range(20):
            middle = math.sqrt(low * high)
            hat = (sigma - low) / (middle - low) if sigma < middle else (high - sigma) / (high - middle)
            total.add_(normal(node), alpha=math.sqrt((middle - low) * (high - middle) / (high - low)) * hat)
            low, high, node = (low, middle, 2 * node) if sigma < middle else (middle, high, 2 * node + 1)
        return total.add_(normal(node), alpha=math.sqrt((sigma - low) * (high - sigma) / (high - low)))

    def noise_sampler(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        start, end = (w(max(float(s), 2.0**-64)) for s in (sigma, sigma_next))  # `end` last: the next step begins there
        return _sent((end - start) / math.sqrt(abs(float(sigma_next) - float(sigma))), x.device)

    return noise_sampler


def step_noise(sampler: Sampler, x: torch.Tensor, generator: Any) -> Callable:
    """Noise of x's shape, unit variance: Brownian for any dpmpp_*_sde, whose intervals may overlap; else white."""
    if sampler.is_k_diffusions and not sampler.arguments.get("eta", 1):  # k-diffusion multiplies the noise by zero
        return lambda sigma, sigma_next: x.new_zeros(())
    if not ("dpmpp" in sampler.name and "_sde" in sampler.name):
        return lambda sigma, sigma_next: white_noise(x, generator)
    generators = generator if isinstance(generator, list) else [generator]
    generators = generators * max(1, len(x) // len(generators))  # one may be for all images
    seeds = [int(torch.randint(2**63 - 1, (), generator=g, device=g.device if g else "cpu")) for g in generators]
    return brownian_noise(x, seeds, generators[0].device if generators[0] else x.device)


@contextlib.contextmanager
def exchanged(states: dict[torch.device, torch.Tensor], enter: bool) -> Iterator[None]:
    """Swaps the states of torch's global generators with these, and back. A lock is held if `enter`, else released."""

    def exchange(enter: bool) -> None:
        with GLOBAL_GENERATORS:
            for device, state in states.items():
                where = () if device.type in ("cpu", "mps") else (device,)
                module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
                states[device], _ = module.get_rng_state(*where), module.set_rng_state(state, *where)
            (GLOBAL_GENERATORS.acquire if enter else GLOBAL_GENERATORS.release)()

    exchange(enter)
    try:
        yield
    finally:
        exchange(not enter)


def call_sampler(sampler: Sampler, model: Callable, x: torch.Tensor, sigmas: torch.Tensor, generator, **given) -> Any:
    """Calls `sampler(model, x, sigmas)` with `given`, a `callback` or `noise_sampler`.

    A function of k-diffusion runs in its own module, whose `torch.randn_like` draws from the generator. Other code runs
    with torch's global generators seeded from it, but not the network and callbacks. Euler's method takes the last step
    to zero of samplers that place their own levels, and a run of one step to zero.
    """
    own, positive, unwrapped = sampler.is_k_diffusions, sigmas[sigmas > 0].tolist(), model
    sampler = find_sampler("euler") if own and len(sigmas) == 2 and sigmas[1] == 0 else sampler
    function, named = sampler.function, sampler.arguments
    if own:  # it calls randn_like even where s_churn is 0
        draw = (lambda x: white_noise(x, generator)) if named.get("s_churn") else (lambda x: x.new_zeros(()))
        function = getattr(fresh_sampling(x.dtype, randn_like=draw), function.__name__)
    if generator is not None and (not own or named.get("noise_sampler")):
        first = generator[0] if isinstance(generator, list) else generator  # a clone: the caller's stays as it is
        seed = int(torch.randint(2**63 - 1, (), generator=first.clone_state(), device=first.device))
        states = {d: torch.Generator(d).manual_seed(seed).get_state() for d in {torch.device("cpu"), x.device}}
        inside, outside = exchanged(states, enter=True), exchanged(states, enter=False)
        function, model, given = inside(function), outside(model), {name: outside(f) for name, f in given.items()}
    options = {"extra_args": {}, **sampler.options, "disable": True, **given}
    if "noise_sampler" in named and options.get("noise_sampler") is None:
        options["noise_sampler"] = step_noise(sampler, x, generator)
    if "sigma_min" in named:
        options |= {"sigma_min": positive[-1], "sigma_max": positive[0], "n": len(positive) - 1, "return_info": False}
        options["eta"] = eta if (eta := named.get("eta") or 0.0) >= 1e-3 else 0.0  # float32 makes NaN of lower ones
    options = {name: value for name, value in options.items() if sampler.takes_any or name in named}
    if "sigma_min" not in named:
        return function(model, x, sigmas if own else sigmas.to(x, copy=True), **options)
    x = function(model, x, **options) if len(positive) > 1 else x
    for _ in sampling.trange(int(sigmas[-1] == 0), disable=True):  # a step like the others
        x = unwrapped(x, positive[-1] * x.new_ones([x.shape[0]]))
    return x


# --- the block's last part, for the pipelines alone ---

SCHEDULES = ("karras", "exponential", "polyexponential")


def named_sigmas(schedule: str, n: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """k-diffusion's noise levels of this name, n from sigma_max down to sigma_min, then zero; float64, on the CPU."""
    if schedule in SCHEDULES:
        return getattr(fresh_sampling(torch.float64), f"get_sigmas_{schedule}")(n, sigma_min, sigma_max)
    others = "comfy_ksampler.levels makes ComfyUI's, sampling.get_sigmas_vp(n) \"vp\" (a flow model's t: s / (1 + s))"
    raise ValueError(f"`schedule`: there is no {schedule!r}; there are {', '.join(SCHEDULES)}; {others}")


STEP_BEGINS = vars(sampling).setdefault("step_begins", contextvars.ContextVar("step_begins", default=lambda: None))
evaluate = sampling.DPMSolver.eps


def trange(n: int, disable: bool | None = None) -> Iterator[int]:
    for i in sampling.tqdm(range(n), disable=disable):
        STEP_BEGINS.get()()
        yield i


def eps(solver: Any, cache: dict, key: str, x: torch.Tensor, t: torch.Tensor) -> tuple:
    if not cache and t is not getattr(solver, "began", None):  # the same t: dpm_adaptive retries
        solver.began = t
        STEP_BEGINS.get()()
    return evaluate(solver, cache, key, x, t)


sampling.trange, sampling.DPMSolver.eps = trange, eps  # fresh modules, and user-supplied functions, take them from here


def run_sampler(
    sampler: Sampler,
    denoiser: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    after_step: Callable[..., torch.Tensor] = lambda i, x, *rest: x,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls `sampler(denoiser, x, sigmas)` with the caller's randomness. Returns the last state and its sigma.

    `after_step(i, x, sigma, began, denoised)` gets the state at the end of step i and its sigma, the sigma at the start
    and the prediction there. It returns the next state, which is x itself where only callbacks report the steps.
    """

    class Interrupted(Exception): ...

    steps, starts, followed = itertools.count(), list[bool](), True  # `starts`: empty after a step's first evaluation
    latest, first = (x, sigmas[0], x), ()  # (x, sigma, x0) of the last evaluation; (sigma, x0) of the step's first one

    def model(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        nonlocal latest, first
        begins, level = bool(starts) and followed, sigma[0]
        starts.clear()
        if begins and first and (after := after_step(next(steps), x, level, *first)) is not x:
            x.copy_(after)
        if interrupted():
            raise Interrupted(x, level.cpu())
        predicted = denoiser(x, sigma, **kwargs)
        here = level, predicted if predicted.ndim == x.ndim else predicted[0]  # or both sides of guidance
        first, latest = (here if begins else first), (latest if sampler.is_k_diffusions else (x, *here))
        return predicted

    def callback(info: dict[str, Any]) -> None:  # of a user-supplied sampler
        nonlocal followed
        x, sigma, denoised = latest
        followed = followed and bool(first) and info.get("x") is x  # on another tensor, a change would be lost
        after = x if followed else after_step(next(steps), x, sigma, sigma, denoised)
        if after is not x and not torch.allclose(after.to(x), x, rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"a callback can't change the latents: {sampler.name} does not say where its steps begin")

    try:
        given = {} if sampler.is_k_diffusions else {"callback": callback}
        context = contextvars.copy_context()
        context.run(STEP_BEGINS.set, lambda: starts.append(True))
        end = context.run(call_sampler, sampler, model, x, sigmas, generator, **given)
    except Interrupted as stopped:
        return stopped.args
    shape = list(end.shape) if isinstance(end, torch.Tensor) else type(end).__name__
    if shape != list(x.shape):
        raise TypeError(f"`sampler` has to return the latents, a tensor of shape {list(x.shape)}, but returned {shape}")
    if followed and first:
        end = after_step(next(steps), end, sigmas[-1], *first)
    return end, sigmas[-1]


# --- end of the shared block ---
