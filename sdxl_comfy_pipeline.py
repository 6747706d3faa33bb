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
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils import torch_utils
from diffusers.utils.torch_utils import randn_tensor
from torch.overrides import TorchFunctionMode


class StableDiffusionXLComfyPipeline(StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with the scheduler's loop replaced by one call of a k-diffusion sampler.

    Components, loaders, LoRA, IP-adapter and offloading are the parent's. The scheduler says which betas the network
    was trained with and, when the caller names no schedule, which noise levels to use; its `step` is never called.
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
        num_inference_steps: int = 50,
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
        schedule: str | None = None,
        quantize_timesteps: bool = False,
        comfy_seed: int | list[int] | None = None,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        """Draws images. What the parent's `__call__` takes keeps its name, meaning and default. New are:

        Args:
            sampler: a sampler of k-diffusion by name, with or without `sample_` (`sampler_names()` has them), or a
                callable with its signature, `sampler(model, x, sigmas, extra_args=None, callback=None, disable=None)`.
                Its noise comes from `generator` if it draws with `noise_sampler(sigma, sigma_next)`, an argument that
                it may have, or with `torch.randn_like`.
            sampler_kwargs: the sampler's options: `eta`, `s_noise`, `s_churn`, `solver_type`, `order`, `rtol`, ...
            schedule: noise levels by name, k-diffusion's "karras", "exponential", "polyexponential" and "vp", between
                the lowest and the highest level that the network was trained with, and ComfyUI's "simple", "normal",
                "sgm_uniform", "ddim_uniform", "beta", "linear_quadratic" and "kl_optimal". None: the scheduler's own.
            quantize_timesteps: give the network the nearest trained timestep, as DPMSolverMultistepScheduler does, and
                not an interpolated one, as EulerDiscreteScheduler does. ComfyUI does too.
            comfy_seed: ComfyUI's seed, or one for each image, in place of `generator` and `latents`: the noise that
                ComfyUI draws, its start and its step noise. With one of its schedules and `quantize_timesteps=True`
                the latents are ComfyUI's.

        `sigmas` and the callback's `sigma` are noise levels of the variance-exploding process x = x0 + sigma noise, in
        which `latents` live too; `timesteps` are the trained ones. The state is float32 (float64 for a float64 network)
        whatever the network's dtype; `latents` that are given are scaled to the first level, as in the parent.

        `callback_on_step_end(pipe, step, timestep, tensors)` is called once a step, with the latents that it ended with
        and the timestep that it began at. `callback_on_step_end_tensor_inputs` may also name `denoised`, the x0
        that was predicted there, and `sigma`, the level. The next step starts from what it returns. Before the run the
        sampler is called once on a single number, to learn which evaluations begin a step. Where that can't be learned
        (see below) it is called as the sampler calls back, with the latents, timestep and level of that moment.

        Raises:
            ValueError, TypeError: for arguments that do not fit, before any network runs; and where a callback changes
                the latents of a sampler whose steps can't be known beforehand, `dpm_adaptive` or some callables.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor
        original_size = original_size or (height, width)
        target_size = target_size or (height, width)

        check_ip_adapter(self.unet, ip_adapter_image, ip_adapter_image_embeds)
        if eta:
            raise ValueError("`eta` is an option of the sampler here: pass sampler_kwargs={'eta': ...}")
        if min(height, width) < 1:
            raise ValueError(f"`height` and `width` have to be positive, but are {height} and {width}")
        given = prompt_embeds if prompt is None else prompt
        prompts = 1 if isinstance(given, str) else 0 if given is None else len(given)
        batch_size = prompts * (num_images_per_prompt or 0)
        channels = self.unet.config.in_channels
        projection_dim = self.unet.add_embedding.linear_1.in_features - 6 * self.unet.config.addition_time_embed_dim
        tokens = self.tokenizer_2.model_max_length if prompt_embeds is None else None
        check_call(
            num_inference_steps,
            num_images_per_prompt,
            batch_size,
            generator,
            latents=(latents, (batch_size, channels, None, None)),
            prompt_embeds=(prompt_embeds, (prompts, tokens, self.unet.config.cross_attention_dim)),
            negative_prompt_embeds=(negative_prompt_embeds, (prompts, tokens, self.unet.config.cross_attention_dim)),
            pooled_prompt_embeds=(pooled_prompt_embeds, (prompts, projection_dim)),
            negative_pooled_prompt_embeds=(negative_pooled_prompt_embeds, (prompts, projection_dim)),
        )
        negative = (negative_prompt, negative_prompt_2)
        embeds = (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        rest = (ip_adapter_image, ip_adapter_image_embeds, callback_on_step_end_tensor_inputs)
        self.check_inputs(prompt, prompt_2, height, width, None, *negative, *embeds, *rest)
        texts = per_prompt(prompts, prompt, prompt_2, negative_prompt, negative_prompt_2)
        prompt, prompt_2, negative_prompt, negative_prompt_2 = texts
        if clip_skip is not None and prompt is not None:
            layers = min(e.config.num_hidden_layers for e in (self.text_encoder, self.text_encoder_2) if e is not None)
            if not -1 <= clip_skip < layers:
                raise ValueError(f"`clip_skip` has to be below the text encoders' {layers} layers, but is {clip_skip}")
        sizes = (original_size, crops_coords_top_left, target_size)
        negative_sizes = (negative_original_size, negative_crops_coords_top_left, negative_target_size)
        if negative_original_size is None or negative_target_size is None:
            negative_sizes = sizes
        dtype = self.unet.dtype  # the text encoders' may be another
        time_ids, negative_time_ids = (
            self._get_add_time_ids(*s, dtype, projection_dim).repeat(batch_size, 1) for s in (sizes, negative_sizes)
        )
        check_comfy_seed(comfy_seed, batch_size, generator=generator, latents=latents)
        noise_on_device = str(sampler).endswith("_gpu")
        sampler = find_sampler(sampler)
        sampler_kwargs = check_sampler_kwargs(sampler, sampler_kwargs)
        denoiser_class, alphas_cumprod = self._trained_with(schedule)
        sigmas, start = self.noise_levels(num_inference_steps, timesteps, sigmas, schedule, denoising_end)

        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._denoising_end = denoising_end
        self._interrupt = False
        self._num_timesteps = len(sigmas) - 1
        device = self._execution_device

        try:
            # prompt -> conditioning
            embeds = self.encode_prompt(
                prompt=prompt,
                prompt_2=prompt_2,
                device=device,
                num_images_per_prompt=num_images_per_prompt,
                do_classifier_free_guidance=self.do_classifier_free_guidance,
                negative_prompt=negative_prompt,
                negative_prompt_2=negative_prompt_2,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
                lora_scale=dict(cross_attention_kwargs or {}).get("scale"),
                clip_skip=clip_skip,
            )
            noise_dtype, state_dtype = embeds[0].dtype, torch.promote_types(dtype, torch.float32)

            def both(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
                """The two sides of classifier-free guidance in one batch, the negative one first."""
                joined = torch.cat([negative, positive]) if self.do_classifier_free_guidance else positive
                return joined.to(device, dtype)

            conditioning = {
                "prompt_embeds": both(*embeds[:2]),
                "add_text_embeds": both(*embeds[2:]),
                "add_time_ids": both(time_ids, negative_time_ids),
            }
            del embeds  # not to be kept beside their copies
            image_embeds = {}
            if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
                image_embeds["image_embeds"] = self.prepare_ip_adapter_image_embeds(
                    ip_adapter_image, ip_adapter_image_embeds, device, batch_size, self.do_classifier_free_guidance
                )
            timestep_cond = None
            if self.unet.config.time_cond_proj_dim is not None:
                timestep_cond = self.get_guidance_scale_embedding(
                    torch.tensor(guidance_scale - 1.0).repeat(batch_size), self.unet.config.time_cond_proj_dim
                ).to(device, dtype)

            # generator -> noise, the stock pipeline's own
            shape = (batch_size, channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
            if comfy_seed is not None:
                latents, generator = comfy_noise(comfy_seed, shape, device)
                # ComfyUI begins with nothing but noise, x / sqrt(sigma^2 + 1), at the highest level, and below it with
                # an empty latent and noise, x = 0 + sigma noise
                at_highest = sigmas[0] ** 2 >= (1 / alphas_cumprod[-1] - 1) * (1 - 2e-5)
                start = (sigmas[0] ** 2 + 1).sqrt() if at_highest else sigmas[0]
            elif latents is None:
                latents = randn_tensor(shape, generator, device, noise_dtype)
            latents = latents.to(device, state_dtype) * start.item()
            sigmas = sigmas.to(state_dtype)
            if comfy_seed is not None:
                step_noise = comfy_noise_sampler(sampler, latents, sigmas, comfy_seed, noise_on_device)
                sampler_kwargs.setdefault("noise_sampler", step_noise)

            # conditioning -> denoiser, the only place that knows the network
            def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                """Epsilon or v of the input x / sqrt(sigma^2 + 1) at a timestep of shape (b,), with guidance."""
                guided = self.do_classifier_free_guidance
                if guided:
                    x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
                prediction = self.unet(
                    x.to(dtype),
                    timestep,
                    encoder_hidden_states=conditioning["prompt_embeds"],
                    timestep_cond=timestep_cond,
                    cross_attention_kwargs=self.cross_attention_kwargs,
                    added_cond_kwargs={
                        "text_embeds": conditioning["add_text_embeds"],
                        "time_ids": conditioning["add_time_ids"],
                        **image_embeds,
                    },
                    return_dict=False,
                )[0].to(state_dtype)
                if not guided:
                    return prediction
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + self.guidance_scale * (conditional - unconditional)
                if self.guidance_rescale > 0:
                    prediction = rescale_noise_cfg(prediction, conditional, guidance_rescale=self.guidance_rescale)
                return prediction

            denoiser = denoiser_class(predict, alphas_cumprod.to(device, state_dtype), quantize_timesteps)

            def after_step(i, x, sigma, began, denoised) -> torch.Tensor:
                timestep = denoiser.sigma_to_t(began.to(device, non_blocking=True).reshape(1))[0]
                tensors = {"latents": x, "sigma": began, "denoised": denoised, **conditioning}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, i, timestep, chosen) or {}  # type: ignore
                for name in conditioning.keys() & returned.keys():
                    conditioning[name] = returned[name].to(device, dtype)
                return returned.get("latents", x)

            # noise, sigmas -> latents
            after = None if callback_on_step_end is None else after_step
            steps = math.inf if _first_parameters(sampler) == BY_RANGE else len(sigmas) - 1  # those decide themselves
            with self.progress_bar(total=steps) as bar:
                latents, _ = run_sampler(
                    sampler,
                    sampler_kwargs,
                    denoiser,
                    latents,
                    sigmas,
                    generator,
                    after,
                    bar.update,
                    lambda: self.interrupt,
                )

            # latents -> images
            image = latents if output_type == "latent" else self._decode(latents, output_type)
        finally:
            self.maybe_free_model_hooks()
        return StableDiffusionXLPipelineOutput(images=image) if return_dict else (image,)

    def _trained_with(self, schedule: str | None = None) -> tuple[type, torch.Tensor]:
        """k-diffusion's wrapper for the network's prediction, and the alphas_cumprod it was trained with, float64.

        Named noise levels get them from the betas in float64, as ComfyUI computes them; the scheduler's own levels get
        the scheduler's, which are float32 (its lowest sigma is off by 1e-5).
        """
        wrappers = {
            "epsilon": external.DiscreteEpsDDPMDenoiser,
            "v_prediction": external.DiscreteVDDPMDenoiser,
        }
        prediction_type = self.scheduler.config.get("prediction_type", "epsilon")
        if prediction_type not in wrappers or not hasattr(self.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"`scheduler`: needs betas and prediction_type 'epsilon' or 'v_prediction', but is"
                f" {type(self.scheduler).__name__} with {prediction_type!r}"
            )
        if schedule is None:
            # zero terminal SNR has no finite last sigma: as EulerDiscreteScheduler does, take 4096 for it
            return wrappers[prediction_type], self.scheduler.alphas_cumprod.double().cpu().clamp(min=2**-24)
        scheduler, rescaled = self.scheduler, self.scheduler.config.get("rescale_betas_zero_snr", False)
        if rescaled:
            scheduler = type(scheduler).from_config(scheduler.config, rescale_betas_zero_snr=False)
        alphas_cumprod = (1 - scheduler.betas.double().cpu()).cumprod(0)
        if rescaled:  # Lin et al. 2024, algorithm 1, on the betas before scheduler and float32 had them
            alphas = alphas_cumprod.sqrt()
            alphas_cumprod = ((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])) ** 2
        # ComfyUI takes this for the zero, which makes the highest sigma 4518.76
        return wrappers[prediction_type], alphas_cumprod.where(alphas_cumprod > 0, 4.8973451890853435e-08)

    def noise_levels(
        self,
        num_inference_steps: int,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        schedule: str | None = None,
        denoising_end: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise levels of a call with these arguments, and the factor that takes unit noise to the first of them.

        Returns:
            sigmas of shape (steps + 1,), falling, and a number; float64, on the CPU. `denoising_end`, "beta" and
            "ddim_uniform" give other numbers of steps than asked for.
        """
        alphas_cumprod = self._trained_with(schedule)[1]
        check_schedule(schedule, sigmas=sigmas, timesteps=timesteps)
        if sigmas is not None:
            check_sigmas(sigmas)
        trained = external.DiscreteSchedule(((1 - alphas_cumprod) / alphas_cumprod).sqrt(), quantize=False)
        if schedule is not None:
            table = external.DiscreteSchedule(trained.sigmas.float(), quantize=False)
            kept = TrainedLevels(table.sigmas, lambda n: table.get_sigmas(n)[:-1])
            levels = trained_sigmas(schedule, num_inference_steps, kept).double()
            start = levels[0]
        else:
            scheduler = copy.deepcopy(self.scheduler)  # set_timesteps changes it
            retrieve_timesteps(scheduler, num_inference_steps, "cpu", timesteps, sigmas)
            if hasattr(scheduler, "sigmas"):
                levels = scheduler.sigmas.double().cpu()
            else:
                levels = trained.t_to_sigma(scheduler.timesteps.cpu()).double()
                levels = torch.cat([levels, levels.new_zeros(1)])
            levels = levels.unique_consecutive()  # Heun's and KDPM2's schedulers list a level twice
            if timesteps is None and sigmas is None and len(levels) <= num_inference_steps > len(alphas_cumprod):
                raise ValueError(
                    f"`num_inference_steps`: of {num_inference_steps} the scheduler makes {len(levels) - 1}, since the"
                    f" network was trained with {len(alphas_cumprod)}; name a `schedule` or ask for fewer"
                )
            check_sigmas(levels, name=f"{type(scheduler).__name__}.sigmas")
            # a tensor, but 1.0 for those that keep alpha x: their unit noise is sqrt(sigma^2 + 1) noise here
            start = scheduler.init_noise_sigma
            start = start.double().cpu() if isinstance(start, torch.Tensor) else (levels[0] ** 2 + 1).sqrt()
        if denoising_end is not None and 0 < denoising_end < 1:
            count = self.scheduler.config.num_train_timesteps
            # sigma_to_t misses a timestep by a rounding of the scheduler's float32 sigmas
            reached = trained.sigma_to_t(levels[:-1]) > round(count - denoising_end * count) - 1e-3
            levels = levels[: int(reached.sum()) + 1]
        return levels, start

    def _decode(self, latents: torch.Tensor, output_type: str | None) -> Any:
        """Images of the final latents, with the VAE in float32 where it would overflow in float16."""
        vae_dtype = self.vae.dtype
        config = self.vae.config
        upcast = vae_dtype == torch.float16 and config.force_upcast
        if upcast:
            self.vae.to(dtype=torch.float32)
        try:
            latents = for_module(latents, self.vae) / config.scaling_factor
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


# --- shared block: the same text stands in sdxl_comfy_pipeline.py and flux_comfy_pipeline.py ---
# What the pipeline above calls: k-diffusion without its package, samplers by name, step noise, run_sampler (the one
# call of a sampler), noise levels by name, checks of the arguments, ComfyUI's noise.


def _k_diffusion(*submodules: str) -> list[ModuleType]:
    """`k_diffusion.sampling` and its kind, without the package's `__init__`.

    That one imports the training code, whose dependencies no longer install. An empty module stands in for the package
    while the submodules are imported, then all of it leaves `sys.modules`, so that a later `import k_diffusion` by
    anyone else does what it always did.
    """
    names = [f"k_diffusion.{name}" for name in submodules]
    if all(name in sys.modules for name in names):
        return [sys.modules[name] for name in names]
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        raise ImportError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "k_diffusion"}
    sys.modules["k_diffusion"] = importlib.util.module_from_spec(spec)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "k_diffusion"]:
            del sys.modules[name]
        sys.modules.update(before)


sampling, external = _k_diffusion("sampling", "external")

BY_LEVELS = ("model", "x", "sigmas")
BY_RANGE = ("model", "x", "sigma_min", "sigma_max")  # dpm_fast and dpm_adaptive place their own levels in log sigma
GIVEN = {*BY_LEVELS, *BY_RANGE, "n", "extra_args", "callback", "disable"}


def sampler_names() -> list[str]:
    """The samplers of the installed k-diffusion, without `sample_`, in the order of its source."""
    functions = {name: value for name, value in vars(sampling).items() if name.startswith("sample_")}
    return [name[7:] for name, value in functions.items() if callable(value) and _first_parameters(value)]


def _first_parameters(function: Callable) -> tuple[str, ...] | None:
    """`BY_LEVELS` or `BY_RANGE`, by the names of the function's first parameters; None if they are others."""
    names = tuple(inspect.signature(function).parameters)
    return next((first for first in (BY_LEVELS, BY_RANGE) if names[: len(first)] == first), None)


def _unknown(argument: str, name: Any, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return ValueError(f"`{argument}`: there is no {name!r}; {hint}")


def find_sampler(sampler: str | Callable) -> Callable:
    """The sampler of this name, with or without `sample_`. A callable with k-diffusion's signature comes back as it is.

    ComfyUI's names are known too: its `ddim` is Euler's method, its `dpmpp_*_sde_gpu` the samplers without `_gpu`.

    Raises:
        ValueError: no sampler of k-diffusion has this name.
        TypeError: not a name, and not callable as `sampler(model, x, sigmas, ...)`.
    """
    if isinstance(sampler, str):
        name = sampler.removeprefix("sample_")
        name = "euler" if name == "ddim" else name.removesuffix("_gpu") if name.endswith("_sde_gpu") else name
        function = getattr(sampling, f"sample_{name}", None)
        if callable(function) and _first_parameters(function):
            return function
        raise ValueError(
            f"{_unknown('sampler', sampler, sampler_names())}. One that ComfyUI alone has can be passed as a function,"
            f" sampler=comfy.samplers.sampler_object({name!r}).sampler_function"
        )
    try:
        if _first_parameters(sampler) is None:
            inspect.signature(sampler).bind("model", "x", "sigmas")
    except (TypeError, ValueError):
        raise TypeError(
            "`sampler` has to be a name or a callable with k-diffusion's signature, sampler(model, x, sigmas,"
            f" extra_args=None, callback=None, disable=None, ...), but is {sampler!r}"
        ) from None
    return sampler


def check_sampler_kwargs(sampler: Callable, sampler_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of the sampler's options. Raises a ValueError, with those it takes, for another and for one it lacks."""
    options, parameters = dict(sampler_kwargs or {}), list(inspect.signature(sampler).parameters.values())
    named = [p for p in parameters[3:] if p.kind is p.POSITIONAL_OR_KEYWORD]  # after model, x, sigmas
    named = [p for p in named + [p for p in parameters if p.kind is p.KEYWORD_ONLY] if p.name not in GIVEN]
    known, name = ", ".join(p.name for p in named) or "none", getattr(sampler, "__name__", repr(sampler))
    unknown = ", ".join(option for option in options if option not in [p.name for p in named])
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"`sampler_kwargs`: {name} takes no {unknown}; it takes {known}")
    missing = ", ".join(p.name for p in named if p.default is p.empty and p.name not in options)
    if missing:
        raise ValueError(f"`sampler_kwargs`: {name} needs {missing}; it takes {known}")
    return options


def check_sigmas(sigmas: Any, name: str = "sigmas") -> None:
    """Raises a ValueError unless `sigmas` (any scale) are finite, positive up to a last zero, and fall strictly."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64).flatten()
    if levels.numel() == 0 or not levels.isfinite().all():
        raise ValueError(f"`{name}` have to be finite numbers, at least one, but are {levels.tolist()}")
    if levels[0] <= 0 or levels[-1] < 0 or not (levels.diff() < 0).all():
        raise ValueError(f"`{name}` have to fall from a positive number to zero or above, but are {levels.tolist()}")


class _SamplerMode(TorchFunctionMode):
    """Two torch calls that samplers make, answered differently while one runs, in this thread and outside the network.

    `torch.randn_like`, the noise of `s_churn` and of callables, draws from the caller's generators. And a sigma that is
    spread over the latents' dimensions stays a number: a number on the CPU combines with tensors on any device, where a
    CPU tensor of shape (1, 1, 1, 1) does not.
    """

    def __init__(self, draw: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.draw = draw

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.randn_like:
            return self.draw(torch.empty_like(*args, **(kwargs or {})))
        if func is torch.Tensor.__getitem__ and args[0].ndim == 0 and args[0].device.type == "cpu":
            index = args[1] if isinstance(args[1], tuple) else ()
            if index and index[0] is ... and all(i is None for i in index[1:]):  # k-diffusion's append_dims
                return args[0]
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not the sampler's: the network, the callbacks and the noise that is drawn here."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()


class _Interrupted(Exception):
    """Carries the state and its sigma out of a sampler."""


def _function(sampler: Callable) -> Callable:
    """What a `functools.partial` calls, or the sampler itself."""
    return sampler.func if isinstance(sampler, functools.partial) else sampler


def _is_k_diffusion(sampler: Callable) -> bool:
    return getattr(_function(sampler), "__module__", None) == sampling.__name__


def _name(sampler: Callable) -> str:
    return getattr(_function(sampler), "__name__", "")


def brownian_weights(sigma: float) -> dict[int, float]:
    """W(sigma) of a Brownian motion from W(2^-64) = 0, as a sum of independent standard normals: {node: weight}.

    Levy's construction. Node 0 is W(2^64). Node 1 is how far W is, in the middle of the whole interval by log sigma,
    from the line between its ends; nodes 2 n and 2 n + 1 are the same for the halves of node n's interval. After 20
    halvings an interval is 0.01 % of sigma wide, and its node how far W(sigma) itself is from the line (Jelincic et al.
    2024, arXiv:2405.06464). That is exact for any sigmas of which no two lie in one such interval.
    """
    low, high, node = 2.0**-64, 2.0**64, 1
    weights = {0: (sigma - low) / math.sqrt(high - low)}
    for _ in range(20):
        middle = math.sqrt(low * high)
        deviation = math.sqrt((middle - low) * (high - middle) / (high - low))
        if sigma < middle:
            weights[node] = deviation * (sigma - low) / (middle - low)
            high, node = middle, 2 * node
        else:
            weights[node] = deviation * (high - sigma) / (high - middle)
            low, node = middle, 2 * node + 1
    return {**weights, node: math.sqrt((sigma - low) * (high - sigma) / (high - low))}


def _sent(noise: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Noise on another device. The CPU does not wait for a GPU to take it, as it would with memory not pinned."""
    if noise.device.type == "cpu" and device.type == "cuda":
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


def for_module(x: torch.Tensor, module: Any) -> torch.Tensor:
    """x in the module's dtype and on the device of its input: components may be placed on several by hand."""
    device_of = getattr(torch_utils, "get_module_execution_device", lambda module: x.device)  # diffusers 0.42
    return x.to(device_of(module), module.dtype)


def white_noise(x: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """Standard normals of x's shape, dtype and device, drawn where the caller's generators are."""
    first = generator[0] if isinstance(generator, list) else generator
    return _sent(randn_tensor(x.shape, generator, first.device if first else x.device, x.dtype), x.device)


def brownian_noise(x: torch.Tensor, seeds: Sequence[int], device: torch.device | str) -> Callable:
    """Step noise (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|) of x's shape: a path W for each image's seed.

    In law it is k-diffusion's BrownianTreeNoiseSampler, but W depends on the seed alone and not on the levels. The
    normals are drawn on `device`; those of the last level are kept, so that the next one makes about 13 draws.
    """
    generator = torch.Generator(device)
    nodes = [-1] * len(brownian_weights(1.0))  # whose normals are kept: one of each depth
    normals = [torch.empty(x.shape, dtype=x.dtype, device=device) for _ in nodes]

    @functools.lru_cache(2)  # a step begins where another ended
    def w(sigma: float) -> torch.Tensor:
        total = torch.zeros(x.shape, dtype=x.dtype, device=device)
        for i, (node, weight) in enumerate(brownian_weights(sigma).items()):
            if nodes[i] != node:
                nodes[i] = node
                for image, seed in zip(normals[i], seeds):
                    # the CPU's generator reads 32 bits of its seed: odd factors differ between the nodes of a path
                    image.normal_(generator=generator.manual_seed((seed + node * 0x9E3779B97F4A7C15) % 2**63))
            total.add_(normals[i], alpha=weight)
        return total

    def noise_sampler(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        before, after = w(float(sigma)), w(float(sigma_next))
        return _sent((after - before) / math.sqrt(abs(float(sigma_next) - float(sigma))), x.device)

    return noise_sampler


def _adds_noise(sampler: Callable, sampler_kwargs: dict[str, Any]) -> bool:
    """False for k-diffusion's with neither `s_churn` nor `eta` above zero. They draw noise then too, times zero."""
    parameters = inspect.signature(sampler).parameters.items()
    amounts = [sampler_kwargs.get(name, p.default) for name, p in parameters if name in ("s_churn", "eta")]
    return any(amounts) or not _is_k_diffusion(sampler)


def _noise_sampler(
    sampler: Callable, x: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
) -> Callable:
    """Step noise of unit variance and x's shape: Brownian for `*_sde`, with a seed for each image; white for others.

    A `*_sde` of one's own gets it too: dpmpp_sde asks for intervals that overlap, for which white noise is wrong.
    """
    if not _name(sampler).endswith("_sde"):
        return lambda sigma, sigma_next: white_noise(x, generator)
    generators = generator if isinstance(generator, list) else [generator] * x.shape[0]
    seeds = [int(torch.randint(2**63 - 1, (), generator=g, device=g.device if g else "cpu")) for g in generators]
    return brownian_noise(x, seeds, generators[0].device if generators[0] else x.device)


def for_levels(sampler: Callable, sigmas: torch.Tensor) -> Callable:
    """The sampler, or for one step to zero Euler's: that is `denoised` in all of k-diffusion's, and some fail on it."""
    return sampling.sample_euler if len(sigmas) == 2 and sigmas[1] == 0 and _is_k_diffusion(sampler) else sampler


def _call(
    sampler: Callable, model: Callable, x: torch.Tensor, sigmas: torch.Tensor, arguments: dict[str, Any]
) -> torch.Tensor:
    """Calls a sampler of either signature with those of the arguments that it takes.

    A sampler by range stops at the lowest positive level. Where the levels end at zero, the step to it, Euler's, is
    taken here; dpm_fast counts it among its evaluations.
    """
    positive = sigmas[sigmas > 0]
    parameters = inspect.signature(sampler).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    if _first_parameters(sampler) != BY_RANGE:
        return sampler(model, x, sigmas, **arguments)
    if "n" in parameters:
        arguments["n"] = max(len(positive) - 1, 1)
    if 0 < arguments.get("eta", 0) < 1e-3:
        arguments["eta"] = 0.0  # these two find their noise by a difference that float32 loses, with NaN for its root
    if len(positive) > 1:
        x = sampler(model, x, sigma_min=positive[-1].item(), sigma_max=positive[0].item(), **arguments)
        x = x[0] if isinstance(x, tuple) else x  # return_info=True
    return x if sigmas[-1] > 0 else model(x, positive[-1] * x.new_ones([x.shape[0]]))


def _step_starts(sampler: Callable, ndim: int, sigmas: torch.Tensor, arguments: dict[str, Any]) -> dict[int, int]:
    """Which evaluation of the model begins which step: {evaluation: step}, found by a run on a one-element tensor.

    A sampler of k-diffusion calls back after the first evaluation of a step, with what it gave to the model. Empty for
    one whose steps depend on its error, which can't be known beforehand, and for a callable that does otherwise or
    can't run on one element.
    """
    parameters = inspect.signature(sampler).parameters
    if "rtol" in parameters:
        return {}
    inputs, starts = list[torch.Tensor](), dict[int, int]()

    def model(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        inputs.append(x)
        return torch.zeros_like(x)

    def callback(info: dict[str, Any]) -> None:
        if info["x"] is not inputs[-1]:
            raise ValueError("the step does not begin at the evaluation that was just made")
        starts[len(inputs) - 1] = info["i"]

    x = torch.ones([1] * ndim, dtype=sigmas.dtype)
    dry: dict[str, Any] = {"callback": callback}
    if "noise_sampler" in parameters:
        dry["noise_sampler"] = lambda sigma, sigma_next: torch.zeros_like(x)
    try:
        with _SamplerMode(torch.zeros_like):
            _call(sampler, model, x, sigmas, {**arguments, **dry})
    except Exception:
        return {}
    return starts


def run_sampler(
    sampler: Callable,
    sampler_kwargs: dict[str, Any],
    denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    after_step: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    on_step: Callable[[], Any] = lambda: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of a k-diffusion sampler, `sampler(denoiser, x, sigmas)`, with the caller's randomness and callbacks.

    Args:
        denoiser: `denoiser(x, sigma) -> denoised`; x and denoised of shape (b, ...), sigma of shape (b,).
        x: the state at sigmas[0], float32 or float64.
        sigmas: on the CPU, 1-D, falling. They stay there: to compare sigmas on a GPU, the sampler would wait for it.
        after_step: `after_step(i, x, sigma, began, denoised) -> x` gets the state that step i ended with and its sigma,
            the sigma that the step began at and what was predicted there. The sampler goes on from what it returns.
            Where it can't be known which evaluation begins a step, as in dpm_adaptive, both sigmas are that of x, and
            another x is a ValueError.
        on_step: called in every step.
        interrupted: asked in every step; the run ends there if it answers True.

    Returns:
        The state at the end and its sigma, which is sigmas[-1] unless interrupted.
    """
    sampler = for_levels(sampler, sigmas)
    evaluations, ended = 0, None  # the step that waits for its end: its number, sigma and prediction
    arguments = {"disable": True, **sampler_kwargs}
    starts = _step_starts(sampler, x.ndim, sigmas, arguments) if after_step else {}
    noisy = _adds_noise(sampler, sampler_kwargs)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return white_noise(like, generator) if noisy else like.new_zeros(())

    parameters, given = inspect.signature(sampler).parameters, arguments.get("noise_sampler") is not None
    # makes neither of the mode's calls
    plain = _is_k_diffusion(sampler) and x.device.type == "cpu" and "s_churn" not in parameters and not given
    mode = _SamplerMode(draw)
    paused = contextlib.nullcontext if plain else mode.paused

    def model(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        nonlocal evaluations, ended
        begins, evaluations = evaluations in starts, evaluations + 1
        with paused():
            if after_step and begins and ended:
                # the tensors are the sampler's own; the caller gets others, to keep or to write on
                (i, *of_step), ended = ended, None
                x.copy_(after_step(i, x.clone(), sigma[0], *of_step))
                if interrupted():
                    raise _Interrupted(x, sigma[0].cpu())
            return denoiser(x, sigma)

    def callback(info: dict[str, Any]) -> None:
        nonlocal ended
        on_step()
        i, x, sigma, denoised = (info[key] for key in ("i", "x", "sigma", "denoised"))
        if starts:
            ended = i, sigma.clone(), denoised.clone()
        elif after_step:
            with paused():
                changed = after_step(i, x.clone(), sigma, sigma.clone(), denoised.clone())
            if not torch.allclose(changed.to(x), x, rtol=0, atol=0, equal_nan=True):
                name = getattr(sampler, "__name__", sampler)
                raise ValueError(f"a callback can't change the latents: {name} does not say where its steps begin")
        if interrupted():
            raise _Interrupted(x, info.get("sigma_hat", sigma).cpu())

    def noise_sampler(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        with paused():
            return noise(sigma, sigma_next)

    arguments["callback"] = callback
    if "noise_sampler" in parameters and not given:
        noise = _noise_sampler(sampler, x, generator) if noisy else lambda *_: x.new_zeros(())
        arguments["noise_sampler"] = noise_sampler
    try:
        with contextlib.nullcontext() if plain else mode:
            x = _call(sampler, model, x, sigmas, arguments)
    except _Interrupted as stopped:
        return stopped.args
    if after_step and ended:
        i, *of_step = ended
        x = after_step(i, x, sigmas[-1], *of_step)
    return x, sigmas[-1]


def named_sigmas(schedule: str, n: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """k-diffusion's noise levels of this name: n from sigma_max down to sigma_min, then zero.

    `vp` gets the betas that make it begin and end at the same levels.
    """
    if schedule == "vp":
        eps, low, high = 1e-3, math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_min = (low - high * eps**2) / (eps - eps**2)
        return sampling.get_sigmas_vp(n, beta_d=2 * (high - beta_min), beta_min=beta_min, eps_s=eps)
    return getattr(sampling, f"get_sigmas_{schedule}")(n, sigma_min, sigma_max)


class TrainedLevels(NamedTuple):
    """The noise levels that a network was trained with, as ComfyUI keeps them: float32, on the CPU."""

    sigmas: torch.Tensor
    """Rising."""
    evenly: Callable[[int], torch.Tensor]
    """`evenly(n)`: n levels from the highest to the lowest, even in the network's own time."""


def _beta(n: int, trained: TrainedLevels) -> torch.Tensor:
    """Quantiles of Beta(0.6, 0.6), Lee et al. 2024. With many steps some round to the same level."""
    from scipy.special import betaincinv

    places = betaincinv(0.6, 0.6, 1 - torch.arange(n, dtype=torch.float64).numpy() / n) * (len(trained.sigmas) - 1)
    return trained.sigmas[torch.as_tensor(places).round().long()]


def _linear_quadratic(n: int, trained: TrainedLevels, threshold: float = 0.025) -> torch.Tensor:
    """A line from 1 to 1 - threshold in the first half of the steps, then the parabola that goes on smoothly to 0."""
    half, i = n // 2, torch.arange(n, dtype=torch.float64)
    slope = threshold / max(half, 1)
    share = 1 - slope * i - (1 - slope * n) * ((i - half).clamp(min=0) / (n - half)) ** 2
    return share.float() * trained.sigmas[-1]


def _kl_optimal(n: int, trained: TrainedLevels) -> torch.Tensor:
    """Even in atan(sigma), Sabour et al. 2024. One step, for which ComfyUI has NaN, begins at the highest level."""
    share = torch.arange(n) / max(n - 1, 1)
    low, high = trained.sigmas[0].item(), trained.sigmas[-1].item()
    return (share * math.atan(low) + (1 - share) * math.atan(high)).tan()


# ComfyUI's noise levels by its names, falling, without the zero at their end. It takes karras and exponential from
# k-diffusion, as is done here.
COMFY_SCHEDULES: dict[str, Callable[[int, TrainedLevels], torch.Tensor]] = {
    # n of the table, at an even stride from the top
    "simple": lambda n, trained: trained.sigmas.flip(0)[[int(i * (len(trained.sigmas) / n)) for i in range(n)]],
    "normal": lambda n, trained: trained.evenly(n),
    "sgm_uniform": lambda n, trained: trained.evenly(n + 1)[:-1],
    # at an even stride from the second lowest up; more than n where n does not divide the table
    "ddim_uniform": lambda n, trained: trained.sigmas[1 :: max(len(trained.sigmas) // n, 1)].flip(0),
    "beta": _beta,
    "linear_quadratic": _linear_quadratic,
    "kl_optimal": _kl_optimal,
}
SCHEDULES = ("karras", "exponential", "polyexponential", "vp", *COMFY_SCHEDULES)


def trained_sigmas(schedule: str, n: int, trained: TrainedLevels) -> torch.Tensor:
    """The noise levels of this name, one of `SCHEDULES`, for n steps: falling, then zero; float32.

    They equal ComfyUI's to its float32. `beta` and `ddim_uniform` may have a few less or more than n steps, as there.
    """
    with torch.device("cpu"):  # whatever the default device
        if schedule in COMFY_SCHEDULES:
            return sampling.append_zero(COMFY_SCHEDULES[schedule](n, trained).unique_consecutive())
        return named_sigmas(schedule, n, trained.sigmas[0].item(), trained.sigmas[-1].item())


def check_call(
    num_inference_steps: int,
    num_images_per_prompt: int | None,
    images: int,
    generator: torch.Generator | list[torch.Generator] | None,
    **tensors: tuple[torch.Tensor | None, tuple[int | None, ...]],
) -> None:
    """Raises a ValueError for counts below 1, too few generators, or a tensor that is not of the shape beside it.

    None in a shape stands for any number. What is no generator at all is a TypeError.
    """
    counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
    for name, count in counts.items():
        if not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"`{name}` has to be a whole number, at least 1, but is {count!r}")
    generators = generator if isinstance(generator, list) else [generator] * images
    if generator is not None and not all(isinstance(g, torch.Generator) for g in generators):
        raise TypeError(f"`generator` has to be a torch.Generator or a list of them, but is {generator!r}")
    if len(generators) != images:
        raise ValueError(f"`generator` has to have one generator an image, {images}, but has {len(generators)}")
    for name, (tensor, shape) in tensors.items():
        found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()
        fits = len(found) == len(shape) and all(n in (None, m) for n, m in zip(shape, found))
        if tensor is not None and not fits:
            wanted, found = str(shape).replace("None", "any"), found or type(tensor)
            raise ValueError(f"`{name}` have to be of shape {wanted}, but are {found}")


def per_prompt(count: int, *texts: str | list[str] | None) -> list[list[str] | None]:
    """prompt, prompt_2 and their negatives as lists of `count`: a single text goes to every prompt.

    Raises a ValueError for a list of another length or of other things than texts.
    """
    lists = [[text] * count if isinstance(text, str) else text for text in texts]
    for name, texts in zip(("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"), lists):
        fits = isinstance(texts, list) and len(texts) == count > 0 and all(isinstance(text, str) for text in texts)
        if texts is not None and not fits:
            raise ValueError(
                f"`{name}` has to be a text, or a list of one for each of {count} prompts, but is {texts!r}"
            )
    return lists


def check_ip_adapter(network: torch.nn.Module, *images: Any) -> None:
    """Raises a ValueError for images (or embeddings) that the network has no adapter for, and for a list of none."""
    given = [image for image in images if image is not None]
    if given and getattr(network, "encoder_hid_proj", None) is None:
        raise ValueError("`ip_adapter_image`: there is no IP-adapter, call load_ip_adapter first")
    if any(isinstance(image, list) and not image for image in given):
        raise ValueError("`ip_adapter_image` and `ip_adapter_image_embeds` have to be None or one for each IP-adapter")


def check_comfy_seed(comfy_seed: int | list[int] | None, batch_size: int, **instead: Any) -> None:
    """Raises a ValueError unless it is a seed, or one for every image, and no other argument gives noise too."""
    if comfy_seed is None:
        return
    given = [name for name, value in instead.items() if value is not None]
    if given:
        raise ValueError(f"`comfy_seed` and `{given[0]}` both give the noise: pass one of them")
    seeds = comfy_seed if isinstance(comfy_seed, list) else [comfy_seed]
    if not all(type(seed) is int and 0 <= seed < 2**64 for seed in seeds):  # torch takes neither bools nor numpy's
        raise ValueError(
            f"`comfy_seed` has to be a whole number in 0..2^64 - 1, or a list of them, but is {comfy_seed}"
        )
    if isinstance(comfy_seed, list) and len(seeds) != batch_size:
        raise ValueError(f"`comfy_seed` has to have one seed an image, {batch_size}, but has {len(seeds)}")


def _seeded(seed: int | list[int], device: torch.device | str) -> torch.Generator | list[torch.Generator]:
    if isinstance(seed, list):
        return [torch.Generator(device).manual_seed(one) for one in seed]
    return torch.Generator(device).manual_seed(seed)


def comfy_noise(
    seed: int | list[int], shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Generator | list[torch.Generator]]:
    """ComfyUI's initial noise, float32 on the CPU, and the generator that its `s_churn` draws from on this device.

    A seed draws the whole batch, as there; a list draws each image as if it were alone.
    """
    generator = _seeded(seed, "cpu")
    noise = randn_tensor(shape, generator, torch.device("cpu"), torch.float32)
    return noise, generator if device.type == "cpu" else _seeded(seed, device)


def comfy_noise_sampler(
    sampler: Callable, x: torch.Tensor, sigmas: torch.Tensor, seed: int | list[int], on_device: bool = False
) -> Callable:
    """ComfyUI's step noise, float32: for `*_sde` a Brownian tree's, for others white on x's device.

    The tree draws on the CPU, or, as in ComfyUI for the names that end in `_gpu`, on x's device.
    """
    if _name(sampler).startswith("sample_dpmpp") and _name(sampler).endswith("_sde"):
        ends = sigmas[sigmas > 0].min().float(), sigmas.max().float()
        tree = sampling.BrownianTreeNoiseSampler((x if on_device else x.cpu()).float(), *ends, seed)
        # torchsde rounds the ends to 1e-6 and warns of a time beyond them, which it takes for the end
        inside = [round(end.item(), 6) for end in ends]

        def from_tree(*sigmas: torch.Tensor) -> torch.Tensor:
            drawn = tree(*(torch.as_tensor(sigma).double().clamp(*inside) for sigma in sigmas))
            return _sent(drawn, x.device).to(x.dtype)

        return from_tree
    generator = _seeded(seed, x.device)
    return lambda sigma, sigma_next: randn_tensor(x.shape, generator, x.device, torch.float32).to(x)


def check_schedule(schedule: str | None, **instead: Any) -> None:
    """Raises a ValueError for an unknown name, or for one beside the arguments that also give noise levels."""
    if schedule is None:
        return
    given = [name for name, value in instead.items() if value is not None]
    if given:
        raise ValueError(f"`schedule` and `{given[0]}` both give the noise levels: pass one of them")
    if schedule not in SCHEDULES:
        raise _unknown("schedule", schedule, SCHEDULES)


# --- end of the shared block ---
