"""StableDiffusionXLComfyPipeline: SDXL in diffusers, sampled by k-diffusion.

    pipe = StableDiffusionXLComfyPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", ...)
    image = pipe("an astronaut", sampler="dpmpp_2m", schedule="karras", num_inference_steps=25).images[0]

This file works alone: it needs torch, diffusers, transformers and k-diffusion, and can be copied anywhere.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch.overrides import TorchFunctionMode


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
        """Draws images. What the parent's `__call__` takes keeps its name, meaning and default. New are:

        Args:
            sampler: one of k-diffusion's by name (`sampler_names()`), with or without `sample_`, or a callable with the
                same signature, `sampler(model, x, sigmas, extra_args=None, callback=None, disable=None)`. Its noise is
                the generator's if it has an argument `noise_sampler(sigma, sigma_next)` or uses `torch.randn_like`.
                `model(x, sigma, with_uncond=True)` stacks x0 with guidance and x0 without the prompt.
            sampler_kwargs: its options: `eta`, `s_noise`, `s_churn`, `solver_type`, `order`, `rtol`, ...
            schedule: noise levels by name, k-diffusion's "karras", "exponential", "polyexponential" and "vp", between
                the lowest and the highest that the network was trained with. Or the levels themselves, falling sigmas:
                latents, in and out, are x0 + sigma noise then. None: the scheduler's own.
            quantize_timesteps: give the network the nearest trained timestep, as DPMSolverMultistepScheduler does, and
                not an interpolated one, as EulerDiscreteScheduler does.

        `sigmas` are levels of x = x0 + sigma noise, `timesteps` trained ones. Without levels in `schedule`, latents
        have the scheduler's scale, in and out, as in the parent (see `latents_scale`), and given ones are noise for
        the first level. The state is float32 or more whatever the network's dtype.

        `callback_on_step_end` gets, once a step, the latents that the step ended with and the timestep that it began
        at; by name also `sigma`, the level there, and `denoised`, the x0 predicted there. The next step starts from the
        latents that it returns. With `s_churn` they include the noise that the next step adds first. A trial on a
        tensor of one element tells where steps begin. Where it can't (`dpm_adaptive`, some callables) latents and
        `sigma` are those with which the sampler calls back, and to change the latents is an error.

        Raises ValueError or TypeError for arguments that do not fit, before any network runs; later for a callable that
        does not return latents, or whose evaluations depend on the prediction, so that a callback can't follow them.
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
        sampler = find_sampler(sampler, sampler_kwargs)
        denoiser_class, alphas_cumprod = self._trained_with()
        levels = self.noise_levels(num_inference_steps, timesteps, sigmas, schedule, denoising_end)
        given: Any = prompt_embeds if prompt is None else prompt
        batch_size = (1 if isinstance(given, str) else len(given)) * (num_images_per_prompt or 1)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator`: has to be one or {batch_size}, one an image, but is {len(generator)}")

        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._denoising_end = denoising_end
        self._interrupt = False
        self._num_timesteps = len(levels) - 1
        device, dtype = self._execution_device, self.unet.dtype  # the text encoders' dtype may be another
        state_dtype = torch.promote_types(dtype, torch.float32)

        try:
            # prompt -> conditioning
            guided = self.do_classifier_free_guidance  # then the negative half of the batch comes first
            texts = (prompt, prompt_2, device, num_images_per_prompt, guided, negative_prompt, negative_prompt_2)
            lora_scale = (cross_attention_kwargs or {}).get("scale")
            embeds = self.encode_prompt(*texts, *embeds, lora_scale=lora_scale, clip_skip=clip_skip)
            noise_dtype = embeds[0].dtype
            sizes = (original_size or (height, width), crops_coords_top_left, target_size or (height, width))
            negative_sizes = (negative_original_size, negative_crops_coords_top_left, negative_target_size)
            if negative_original_size is None or negative_target_size is None:
                negative_sizes = sizes
            time_ids = [self._get_add_time_ids(*s, dtype, embeds[2].shape[-1]) for s in (sizes, negative_sizes)]
            time_ids = [ids.repeat(batch_size, 1) for ids in time_ids]
            pairs = {"prompt_embeds": embeds[:2], "add_text_embeds": embeds[2:], "add_time_ids": time_ids}
            conditioning = {
                name: (torch.cat([negative, positive]) if guided else positive).to(device, dtype)
                for name, (positive, negative) in pairs.items()
            }
            del embeds, pairs  # not to be kept beside their copies
            image_embeds = {}
            if any(image is not None for image in images):
                image_embeds["image_embeds"] = self.prepare_ip_adapter_image_embeds(*images, device, batch_size, guided)
            timestep_cond = None
            if (dim := self.unet.config.time_cond_proj_dim) is not None:
                scales = torch.full([batch_size], guidance_scale - 1.0)
                timestep_cond = self.get_guidance_scale_embedding(scales, dim).to(device, dtype)

            # conditioning -> denoiser, the only place that knows the network
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

            denoiser = denoiser_class(predict, alphas_cumprod.to(device, state_dtype), quantize_timesteps)

            # generator -> noise, the stock pipeline's own -> x at the first level
            first, explicit = float(levels[0]), schedule is not None and not isinstance(schedule, str)
            start, spacing = math.hypot(1, first), self.scheduler.config.get("timestep_spacing")
            if explicit:  # x0 + sigma noise, in and out
                start = first if latents is None else 1.0
            elif self.latents_scale(levels[0]) == 1 and (schedule or spacing in ("linspace", "trailing")):
                start = first  # as the schedulers' init_noise_sigma
            if latents is None:
                shape = (self.unet.config.in_channels, *(side // self.vae_scale_factor for side in (height, width)))
                latents = randn_tensor((batch_size, *shape), generator, device, noise_dtype)
            x = latents.to(device, state_dtype) * start

            def after_step(i, x, sigma, began, denoised) -> torch.Tensor:
                timestep = denoiser.sigma_to_t(began.to(device, non_blocking=True).reshape(1))[0]
                scale = 1.0 if explicit else self.latents_scale(sigma)
                tensors = {"latents": x / scale, "sigma": began, "denoised": denoised, **conditioning}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, i, timestep, chosen) or {}  # type: ignore
                for name in conditioning.keys() & returned.keys():
                    conditioning[name] = returned[name].to(device, dtype)
                changed = returned.get("latents", tensors["latents"])
                return x + (changed - x / scale) * scale if torch.is_tensor(scale) else changed  # x if unchanged

            # noise, levels -> latents
            after = None if callback_on_step_end is None else after_step
            with self.progress_bar(total=math.inf if "sigma_min" in arguments_of(sampler) else len(levels) - 1) as bar:
                hooks = (after, bar.update, lambda: self.interrupt)
                x, sigma = run_sampler(sampler, denoiser, x, levels.to(state_dtype), generator, *hooks)
            latents = x / (1.0 if explicit else self.latents_scale(sigma))

            # latents -> images
            image = latents if output_type == "latent" else self._decode(latents, output_type)
        finally:
            self.maybe_free_model_hooks()
        return StableDiffusionXLPipelineOutput(images=image) if return_dict else (image,)

    def latents_scale(self, sigma: torch.Tensor) -> torch.Tensor | float:
        """What latents of the scheduler have to be multiplied by to be x0 + sigma noise.

        1 for those that keep that, as Euler's. DDIM, DPM-Solver, UniPC and others keep it divided by sqrt(1 + sigma^2).
        """
        return (1 + sigma**2).sqrt() if float(self.scheduler.init_noise_sigma) == 1 else 1.0

    def _trained_with(self) -> tuple[type, torch.Tensor]:
        """k-diffusion's wrapper for the network's prediction, and the alphas_cumprod it was trained with, float64."""
        wrappers = {"epsilon": external.DiscreteEpsDDPMDenoiser, "v_prediction": external.DiscreteVDDPMDenoiser}
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind not in wrappers or not hasattr(self.scheduler, "alphas_cumprod"):
            name = f"{type(self.scheduler).__name__} with {kind!r}"
            raise ValueError(f"`scheduler`: needs betas and 'epsilon' or 'v_prediction', but is {name}")
        # zero terminal SNR has no finite last sigma: as EulerDiscreteScheduler does, take 4096 for it
        return wrappers[kind], self.scheduler.alphas_cumprod.double().cpu().clamp(min=2**-24)

    def noise_levels(
        self,
        num_inference_steps: int | None = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        schedule: str | Sequence[float] | torch.Tensor | None = None,
        denoising_end: float | None = None,
    ) -> torch.Tensor:
        """The noise levels of a call with these arguments: sigmas, falling, of shape (steps + 1,), float64, on the CPU.

        `denoising_end` gives fewer steps than asked for, and may end above zero, as levels in `schedule` may.
        """
        alphas_cumprod = self._trained_with()[1]
        trained = external.DiscreteSchedule(((1 - alphas_cumprod) / alphas_cumprod).sqrt(), quantize=False)
        given = [f"`{name}`" for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None]
        if schedule is not None and given:
            raise ValueError(f"`schedule` and {given[0]} both give the noise levels: pass one of them")
        if not given and (schedule is None or isinstance(schedule, str)) and (num_inference_steps or 0) < 1:
            raise ValueError(f"`num_inference_steps` has to be at least 1, but is {num_inference_steps}")
        n = num_inference_steps or 0  # 0 where the levels are given
        if isinstance(schedule, str):
            levels = named_sigmas(schedule, n, trained.sigma_min.item(), trained.sigma_max.item())
        elif schedule is not None:
            levels = check_sigmas(schedule, "schedule", at_least=2)
        else:
            scheduler = copy.deepcopy(self.scheduler)  # set_timesteps changes it
            if sigmas is not None:
                check_sigmas(sigmas)
                if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
                    name = type(scheduler).__name__
                    raise ValueError(f"`sigmas`: {name} takes none; schedule=[...] takes levels whatever the scheduler")
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
                made = f"the scheduler makes {len(levels) - 1} of {num_inference_steps} steps"
                raise ValueError(f"`num_inference_steps`: {made}; name a `schedule` or ask for fewer")
            check_sigmas(levels, f"{type(scheduler).__name__}.sigmas")
        if denoising_end is not None and 0 < denoising_end < 1:
            count = self.scheduler.config.num_train_timesteps
            # sigma_to_t misses a timestep by a rounding of the scheduler's float32 sigmas
            reached = trained.sigma_to_t(levels[:-1]) > round(count - denoising_end * count) - 1e-3
            levels = levels[: int(reached.sum()) + 1]
        return levels

    def _decode(self, latents: torch.Tensor, output_type: str | None) -> Any:
        """Images of the final latents, with the VAE in float32 where it would overflow in float16."""
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


# --- shared block: the same text in every file that is copied alone; `python tests/blocks.py` keeps it so ---


def _k_diffusion(name: str) -> ModuleType:
    """k-diffusion's submodule, in a package of another name: the `__init__` of its own imports the training code."""
    if (spec := importlib.util.find_spec("k_diffusion")) is None:
        raise ImportError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    package = sys.modules.setdefault("k_diffusion_alone", ModuleType("k_diffusion_alone"))
    package.__path__ = spec.submodule_search_locations or []
    return importlib.import_module(f"k_diffusion_alone.{name}")


sampling, external = _k_diffusion("sampling"), _k_diffusion("external")
SCHEDULES = ("karras", "exponential", "polyexponential", "vp")
GIVEN = {"model", "x", "sigmas", "sigma_min", "sigma_max", "n", "extra_args", "callback", "disable"}  # not options


def sampler_names() -> list[str]:
    """The samplers of the installed k-diffusion, without `sample_`, in the order of its source."""
    return [name[7:] for name in vars(sampling) if name.startswith("sample_")]


def arguments_of(sampler: Callable) -> dict[str, Any]:
    """What a sampler takes, with the values that are bound (`functools.partial`) or the defaults, else None."""
    parameters = inspect.signature(sampler).parameters.values()
    taken = {p.name: None if p.default is p.empty else p.default for p in parameters}
    bound = sampler.keywords if isinstance(sampler, functools.partial) else {}
    return taken | {name: value for name, value in bound.items() if name not in GIVEN}


def unbound(sampler: Any) -> Callable:
    """The function under any `functools.partial`."""
    return unbound(sampler.func) if isinstance(sampler, functools.partial) else sampler


def is_k_diffusions(sampler: Callable) -> bool:
    """Whether it is a function of k-diffusion itself, or a `functools.partial` of one. A wrapper is not."""
    return unbound(sampler) in vars(sampling).values()


def find_sampler(sampler: str | Callable, sampler_kwargs: dict[str, Any] | None = None) -> Callable:
    """The sampler of this name, with or without `sample_`, or the callable itself, with its options bound.

    ValueError, TypeError: there is none; it does not take an option, or lacks one.
    """
    signature = "sampler(model, x, sigmas, extra_args=None, callback=None, disable=None, ...)"
    if isinstance(sampler, str):
        name, names = sampler.removeprefix("sample_"), sampler_names()
        if name not in names:
            near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.7)  # "lcm" is not near "lms"
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}, or pass {signature}"
            raise ValueError(f"`sampler`: k-diffusion has no {sampler!r}; {hint}")
        sampler = getattr(sampling, f"sample_{name}")
    try:
        inspect.signature(sampler).bind_partial("model", "x", "sigmas")
    except (TypeError, ValueError):
        raise TypeError(f"`sampler` has to be a name or a callable, {signature}, but is {sampler!r}") from None
    options, rest = dict(sampler_kwargs or {}), list(inspect.signature(sampler).parameters.values())[3:]
    named = {p.name: p for p in rest if p.name not in GIVEN and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    wrong = [f"needs {name}" for name, p in named.items() if p.default is p.empty and name not in options]
    if all(p.kind is not p.VAR_KEYWORD for p in rest):
        wrong += [f"takes no {name}" for name in options if name not in named]
    if wrong:
        name = getattr(sampler, "__name__", repr(sampler))
        raise ValueError(f"`sampler_kwargs`: {name} {', '.join(wrong)}; it takes {', '.join(named) or 'none'}")
    sampler = functools.partial(sampler, **options) if options else sampler
    tolerances = [value for name, value in arguments_of(sampler).items() if name in ("rtol", "atol")]
    if is_k_diffusions(sampler) and tolerances and not sum(tolerances) > 0:
        raise ValueError("`sampler_kwargs`: rtol or atol has to be above 0, or the steps never end")
    return sampler


def check_sigmas(sigmas: Any, name: str = "sigmas", at_least: int = 1) -> torch.Tensor:
    """`sigmas` (any scale), copied in float64 to the CPU. ValueError unless finite, falling and not below zero."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten().clone()
    single = levels.float()  # in which a sampler may get them
    falling = single.isfinite().all() and (single.diff() < 0).all() and (single[:1] > 0).all() and (levels >= 0).all()
    if len(levels) < at_least or not falling:
        rule = f"finite and fall from a positive number to zero or above (as float32), {at_least} of them at least"
        raise ValueError(f"`{name}` have to be {rule}: {sigmas}")
    return levels


def named_sigmas(schedule: str, n: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """k-diffusion's noise levels of this name, n from sigma_max down to sigma_min, then zero; float64, on the CPU.

    "vp" gets the betas that make it begin and end there. "polyexponential" is "exponential", its default rho being 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"`schedule`: there is no {schedule!r}; there are {', '.join(SCHEDULES)}, or pass the levels")
    arguments = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    if schedule == "vp":
        eps, low, high = 1e-3, math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_min = (low - high * eps**2) / (eps - eps**2)
        arguments = {"beta_d": 2 * (high - beta_min), "beta_min": beta_min, "eps_s": eps}
    with torch.device("cpu"), SamplerMode():
        return getattr(sampling, f"get_sigmas_{schedule}")(n, **arguments)


def white_noise(x: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """Standard normals of x's shape, dtype and device, drawn where the caller's generators are."""
    first = generator[0] if isinstance(generator, list) else generator
    return _sent(randn_tensor(x.shape, generator, first.device if first else x.device, x.dtype), x.device)


def _sent(noise: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Noise on the latents' device. From pinned memory, so that the CPU does not wait for a GPU to take it."""
    pinned = noise.device.type == "cpu" and device.type == "cuda"
    return noise.pin_memory().to(device, non_blocking=True) if pinned else noise.to(device)


def brownian_noise(x: torch.Tensor, seeds: Sequence[int], device: torch.device | str) -> Callable:
    """Step noise (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|) of x's shape: a path W for each image's seed.

    In law it is k-diffusion's BrownianTreeNoiseSampler, but W depends on the seed alone and not on the levels. Levy's
    construction, from W(2^-64) = 0: normal 0 gives W(2^64). Normal 1 gives W at the middle in log sigma, as the
    distance from the line between the ends. Normals 2 n and 2 n + 1 do so in the halves of n's interval. After 20
    halvings an interval is 0.01 % of sigma wide. One more normal gives W(sigma) in it (arXiv:2405.06464).
    """
    generator = torch.Generator(device)

    @functools.lru_cache(22)  # those of one level: a next one draws about 13
    def normal(node: int) -> torch.Tensor:
        noise = torch.empty(x.shape, dtype=x.dtype, device=device)
        for image, seed in zip(noise, seeds, strict=True):
            # the CPU's generator uses the low 32 bits of a seed; the odd factor keeps a path's nodes apart there
            image.normal_(generator=generator.manual_seed((seed + node * 0x9E3779B97F4A7C15) % 2**63))
        return noise

    @functools.lru_cache(2)  # a step begins where another ended
    def w(sigma: float) -> torch.Tensor:
        low, high, node = 2.0**-64, 2.0**64, 1
        total = normal(0) * ((sigma - low) / math.sqrt(high - low))
        for _ in range(20):
            middle = math.sqrt(low * high)
            weight = math.sqrt((middle - low) * (high - middle) / (high - low))
            weight *= (sigma - low) / (middle - low) if sigma < middle else (high - sigma) / (high - middle)
            total.add_(normal(node), alpha=weight)
            low, high, node = (low, middle, 2 * node) if sigma < middle else (middle, high, 2 * node + 1)
        return total.add_(normal(node), alpha=math.sqrt((sigma - low) * (high - sigma) / (high - low)))

    def noise_sampler(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        start, end = (w(max(float(s), 2.0**-64)) for s in (sigma, sigma_next))  # in this order, for the cache of two
        return _sent((end - start) / math.sqrt(abs(float(sigma_next) - float(sigma))), x.device)

    return noise_sampler


def step_noise(sampler: Callable, x: torch.Tensor, generator: Any) -> Callable:
    """Noise of x's shape, unit variance: Brownian for any dpmpp_*_sde, whose intervals may overlap; else white."""
    name = getattr(unbound(sampler), "__name__", "")
    if not ("dpmpp" in name and "_sde" in name):
        return lambda sigma, sigma_next: white_noise(x, generator)
    generators = generator if isinstance(generator, list) else [generator] * x.shape[0]
    seeds = [int(torch.randint(2**63 - 1, (), generator=g, device=g.device if g else "cpu")) for g in generators]
    return brownian_noise(x, seeds, generators[0].device if generators[0] else x.device)


class SamplerMode(TorchFunctionMode):
    """While a sampler runs, `torch.randn_like` (the noise of `s_churn` and of callables) is `draw(like)`.

    `linspace` and float `tensor`s get `dtype`, not torch's default. `sigma[..., None]` of a number on the CPU is the
    number itself, so that it goes with latents on any device.
    """

    def __init__(self, draw: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like, dtype=torch.float64):
        self.draw, self.dtype = draw, dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randn_like:
            return self.draw(torch.empty_like(*args, **kwargs))
        if func is torch.Tensor.__getitem__ and args[0].ndim == 0 and args[0].device.type == "cpu":
            if isinstance(args[1], tuple) and args[1][:1] == (...,) and not any(args[1][1:]):  # (..., None, None)
                return args[0]
        if func is torch.linspace or func is torch.tensor and isinstance(args[0], float):
            kwargs = {"dtype": self.dtype, **kwargs}
        return func(*args, **kwargs)


@contextlib.contextmanager
def outside(depth: int) -> Iterator[None]:
    """Takes off the modes above this depth of torch's stack: with them torch.compile would compile a network again."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack() - depth)]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


def call_sampler(
    sampler: Callable, model: Callable, x: torch.Tensor, sigmas: torch.Tensor, generator: Any = None, **ours: Any
) -> torch.Tensor:
    """Calls a sampler of either signature. Its noise is the generator's (False: zeros, a trial), `ours` a `callback`.

    One step to zero is `denoised` with every sampler of k-diffusion, but some fail there: Euler's method takes it. A
    sampler that takes `sigma_min` stops at the lowest positive level: Euler's step to zero is taken here, and is one of
    dpm_fast's n. k-diffusion draws noise even where `s_churn` and `eta` are 0: it gets zeros, and nothing is drawn.
    """
    if len(sigmas) == 2 and sigmas[1] == 0 and is_k_diffusions(sampler):
        sampler = sampling.sample_euler
    own, named, positive = is_k_diffusions(sampler), arguments_of(sampler), sigmas[sigmas > 0]
    noisy = generator is not False and (not own or named.get("s_churn") or named.get("eta"))
    given = named.get("noise_sampler") is not None

    def draw(like: torch.Tensor) -> torch.Tensor:
        if noisy:
            return white_noise(like, generator)
        return like.new_zeros(()) if own and not given else torch.zeros_like(like)  # others may write on it

    # most of k-diffusion's make none of the mode's calls where x and sigmas are of one kind
    calls = given or {"s_churn", "sigma_min"} & {*named}
    plain = own and not calls and (x.device, x.dtype) == (sigmas.device, sigmas.dtype)
    ours = {"disable": True, **ours}
    if "noise_sampler" in named and (not given or generator is False):
        ours["noise_sampler"] = step_noise(sampler, x, generator) if noisy else lambda *_: draw(x)
    if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(sampler).parameters.values()):
        ours = {name: value for name, value in ours.items() if name in named}
    with contextlib.nullcontext() if plain else SamplerMode(draw, x.dtype):
        if "sigma_min" not in named:
            return sampler(model, x, sigmas, **ours)
        if "n" in named:
            ours["n"] = len(positive) - 1
        if 0 < (named.get("eta") or 0) < 1e-3:
            ours["eta"] = 0.0  # these two find their noise by a difference that float32 loses, with NaN for its root
        if len(positive) > 1:
            x = sampler(model, x, sigma_min=positive[-1].item(), sigma_max=positive[0].item(), **ours)
            x = x[0] if isinstance(x, tuple) else x  # return_info=True
        return x if sigmas[-1] > 0 else model(x, positive[-1] * x.new_ones([x.shape[0]]))


def step_starts(sampler: Callable, ndim: int, sigmas: torch.Tensor) -> tuple[list[float], dict[int, int]]:
    """The level of each evaluation, and {evaluation: step} for those that begin a step.

    Found by a trial on a tensor of one element. Both are empty for dpm_adaptive and where the trial fails. The second
    also is where the sampler's callback gets another x than the model got.
    """
    inputs, levels, starts = [], list[float](), dict[int, int]()

    def model(x: torch.Tensor, sigma: torch.Tensor, with_uncond: bool = False, **kwargs: Any) -> torch.Tensor:
        inputs.append(x)
        levels.append(float(sigma))
        return x.new_zeros([2, *x.shape] if with_uncond else x.shape)

    def callback(info: dict[str, Any]) -> None:
        starts[len(inputs) - 1 if info["x"] is inputs[-1] else -1] = info["i"]

    try:
        if "rtol" not in arguments_of(sampler):
            call_sampler(sampler, model, sigmas.new_ones([1] * ndim), sigmas, False, callback=callback)
    except Exception:
        return [], {}
    return levels, {} if -1 in starts else starts


# --- the block's last part, for the pipelines alone ---


def run_sampler(
    sampler: Callable,
    denoiser: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    after_step: Callable[..., torch.Tensor] | None = None,
    on_step: Callable[[], Any] = lambda: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sampler(denoiser, x, sigmas)` with the caller's randomness and callbacks: the last state, and its sigma.

    `denoiser(x, sigma)` has x of shape (b, ...) and sigma of shape (b,). `sigmas` are on the CPU: to compare them on a
    GPU the sampler would wait for it. `after_step(i, x, sigma, began, denoised)` gets the state that step i ended with,
    its sigma, the sigma that the step began at and what was predicted there. The sampler goes on from what it returns.
    Where `step_starts` is empty, both sigmas are that of x, and another x is a ValueError. Where it is not, another
    number of evaluations than in the trial is one. In every step `on_step()` is called. Where `interrupted()`, the run
    ends before its next evaluation. TypeError: the sampler returns no tensor of x's shape.
    """

    class Interrupted(Exception): ...  # carries the state and its sigma out of the sampler

    levels, starts = step_starts(sampler, x.ndim, sigmas) if after_step else ([], {})
    evaluations, step, last = 0, None, (x, sigmas[0], x)  # the step under way; what was last evaluated
    own, depth = is_k_diffusions(sampler), torch._C._len_torch_function_stack()
    name = getattr(unbound(sampler), "__name__", sampler)

    def model(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        nonlocal evaluations, step, last
        with outside(depth):
            if step and evaluations in starts:
                # the tensors are the sampler's own; the caller gets others, to keep or to write on
                x.copy_(after_step(step[0], x.clone(), sigma[0], *step[1:]))
            if interrupted():
                raise Interrupted(x, sigma[0].cpu())
            predicted = denoiser(x, sigma, **kwargs)
            denoised = predicted[0] if kwargs.get("with_uncond") else predicted
            if evaluations in starts:
                step = starts[evaluations], sigmas.new_tensor(levels[evaluations]), denoised.clone()
            elif not (own or starts):
                last = x, sigma[0], denoised
            evaluations += 1
            return predicted

    def callback(info: dict[str, Any]) -> None:
        on_step()
        if after_step and not starts:
            # others' may call back with a state that is not the step's
            x, sigma, denoised = (info["x"], info["sigma_hat"], info["denoised"]) if own else last
            with outside(depth):
                changed = after_step(info["i"], x.clone(), sigma, sigma.clone(), denoised.clone())
            if not torch.allclose(changed.to(x), x, rtol=0, atol=0, equal_nan=True):
                raise ValueError(f"a callback can't change the latents: {name} does not say where its steps begin")

    try:
        end = call_sampler(sampler, model, x, sigmas, generator, callback=callback)
    except Interrupted as stopped:
        return stopped.args
    if not isinstance(end, torch.Tensor) or end.shape != x.shape:
        what = list(end.shape) if isinstance(end, torch.Tensor) else type(end).__name__
        raise TypeError(f"`sampler` has to return the latents, a tensor of shape {list(x.shape)}, but returned {what}")
    if starts and evaluations != len(levels):
        raise ValueError(f"a callback can't follow {name}: its evaluations depend on what the network predicts")
    return after_step(step[0], end, sigmas[-1], *step[1:]) if step else end, sigmas[-1]


# --- end of the shared block ---
