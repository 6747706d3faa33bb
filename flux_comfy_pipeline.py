"""FluxComfyPipeline: FLUX.1 in diffusers, sampled by k-diffusion.

    pipe = FluxComfyPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
    image = pipe("an astronaut", sampler="dpmpp_2m", num_inference_steps=28).images[0]

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

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch.overrides import TorchFunctionMode


class FluxComfyPipeline(FluxPipeline):
    """`FluxPipeline` with the scheduler's loop replaced by one call of a k-diffusion sampler.

    Components, loaders, LoRA, IP-adapter and offloading are the parent's. The scheduler gives the shift and, when the
    caller names no schedule, the noise levels. Its `step` is never called. One call at a time, as with the parent.

    FLUX predicts the velocity v = noise - x0 at x = (1 - t) x0 + t noise, so x0 = x - t v. k-diffusion's samplers know
    y = x0 + sigma noise. x / (1 - t) is such a y, with sigma = t / (1 - t) ("ve"). A sampler that adds no noise may as
    well take x for y and t for sigma, since the ODE's derivative (x - x0) / t is v ("flow").
    """

    _callback_tensor_inputs = [*FluxPipeline._callback_tensor_inputs, "denoised", "sigma"]

    def to_json_string(self) -> str:
        """The configuration. It names the parent, so that every loader of diffusers reads a saved folder."""
        return super().to_json_string().replace(f'"{type(self).__name__}"', '"FluxPipeline"')

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        negative_ip_adapter_image: PipelineImageInput | None = None,
        negative_ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, the parent's default
        max_sequence_length: int = 512,
        *,
        sampler: str | Callable = "euler",
        sampler_kwargs: dict[str, Any] | None = None,
        schedule: str | Sequence[float] | torch.Tensor | None = None,
        parameterization: str = "auto",
    ) -> FluxPipelineOutput | tuple:
        """Draws images. What the parent's `__call__` takes keeps its name, meaning and default. New are:

        Args:
            sampler: one of k-diffusion's by name (`sampler_names()`), with or without `sample_`, or a callable with the
                same signature, `sampler(model, x, sigmas, extra_args=None, callback=None, disable=None)`. Its noise is
                the generator's if it has an argument `noise_sampler(sigma, sigma_next)` or uses `torch.randn_like`.
                `model(x, sigma, with_uncond=True)` stacks x0 with guidance and x0 for the negative prompt.
            sampler_kwargs: its options: `eta`, `s_noise`, `s_churn`, `solver_type`, `order`, `rtol`, ...
            schedule: noise levels by name, k-diffusion's "karras", "exponential", "polyexponential" and "vp", or the
                levels themselves, falling, in t. None: the scheduler's own.
            parameterization: what the sampler sees as sigma. "flow": t. "ve": t / (1 - t). "auto": "ve" for samplers
                that have a `noise_sampler` or `s_churn` above 0 or place their own levels, "flow" for the others, also
                for callables that use `torch.randn_like`.

        `sigmas` are t, 1 for noise and 0 for the picture, shifted by the scheduler as in the parent. `latents` are
        packed, x = (1 - t) x0 + t noise at the first t. Without them x is noise, whatever that t. The state is float32
        or more whatever the network's dtype.

        `callback_on_step_end` gets, once a step, the latents that the step ended with and the timestep, 1000 t, that it
        began at; by name also `sigma`, that t, and `denoised`, the x0 predicted there. The next step starts from the
        latents that it returns. With `s_churn` they include the noise that the next step adds first. A trial on a
        tensor of one element tells where steps begin. Where it can't (`dpm_adaptive`, some callables) latents and
        `sigma` are those with which the sampler calls back, and to change the latents is an error.

        Raises ValueError or TypeError for arguments that do not fit, before any network runs; later for a callable that
        does not return latents, or whose evaluations depend on the prediction, so that a callback can't follow them.
        """
        # FLUX.1's is 1024, which is the parent's default; the tiny autoencoders do not say
        size = getattr(getattr(self.vae, "config", None), "sample_size", 1024)
        height, width = height or size, width or size
        rows, columns = (side // (2 * self.vae_scale_factor) for side in (height, width))
        embeds = (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        rest = (negative_prompt, negative_prompt_2, *embeds, callback_on_step_end_tensor_inputs, max_sequence_length)
        self.check_inputs(prompt, prompt_2, height, width, *rest)
        if true_cfg_scale > 1 and prompt_embeds is not None and negative_prompt_embeds is not None:
            if (wanted := prompt_embeds.shape) != (shape := negative_prompt_embeds.shape):
                raise ValueError(f"`negative_prompt_embeds`: the shape of `prompt_embeds` is {wanted}, its own {shape}")
        sampler = find_sampler(sampler, sampler_kwargs)
        levels = self.noise_levels(rows * columns, num_inference_steps, sigmas, schedule)
        ve = uses_ve(parameterization, sampler, levels)
        given: Any = prompt_embeds if prompt is None else prompt
        batch_size = (1 if isinstance(given, str) else len(given)) * (num_images_per_prompt or 1)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator`: has to be one or {batch_size}, one an image, but is {len(generator)}")

        self._guidance_scale = guidance_scale
        self._joint_attention_kwargs = dict(joint_attention_kwargs or {})
        self._current_timestep = None
        self._interrupt = False
        self._num_timesteps = len(levels) - 1
        device, dtype = self._execution_device, self.transformer.dtype  # the text encoders' dtype may be another
        state_dtype = torch.promote_types(dtype, torch.float32)

        try:
            # prompt -> conditioning
            def encode(prompt, prompt_2, embeds, pooled) -> tuple[torch.dtype, dict[str, Any]]:
                """The text encoders' dtype, and the transformer's arguments for one side of true CFG."""
                texts = (prompt, prompt_2, device, num_images_per_prompt, embeds, pooled, max_sequence_length)
                embeds, pooled, ids = self.encode_prompt(*texts, lora_scale=self._joint_attention_kwargs.get("scale"))
                # encode_prompt repeats neither given embeddings for several images nor one text for several prompts
                if len(embeds) < batch_size:  # a copy otherwise
                    embeds, pooled = (e.repeat_interleave(batch_size // len(e), 0) for e in (embeds, pooled))
                named = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}
                return embeds.dtype, {name: value.to(device, dtype) for name, value in named.items()}

            noise_dtype, conditional = encode(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)
            unconditional = None
            if true_cfg_scale > 1 and (negative_prompt is not None or negative_prompt_embeds is not None):
                negative = (negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds)
                unconditional = encode(*negative)[1]
            images = {"cond": (ip_adapter_image, ip_adapter_image_embeds)}
            images["uncond"] = (negative_ip_adapter_image, negative_ip_adapter_image_embeds)
            image_embeds = {}
            if any(image is not None for pair in images.values() for image in pair):  # black where one is missing
                black = [np.zeros((width, height, 3), np.uint8)] * self.transformer.encoder_hid_proj.num_ip_adapters
                for side, (picture, embeds) in images.items():
                    picture = black if picture is None and embeds is None else picture
                    embeds = self.prepare_ip_adapter_image_embeds(picture, embeds, device, batch_size)
                    image_embeds[side] = {"ip_adapter_image_embeds": embeds}

            # generator -> noise, the stock pipeline's own
            shape = (batch_size, self.transformer.config.in_channels // 4, height, width)
            noise, image_ids = self.prepare_latents(*shape, noise_dtype, device, generator, latents)

            # conditioning -> denoiser, the only place that knows the network
            guidance = None
            if self.transformer.config.guidance_embeds:
                guidance = torch.full([batch_size], guidance_scale, device=device, dtype=torch.float32)

            def velocity(x: torch.Tensor, t: torch.Tensor, with_uncond: bool = False) -> torch.Tensor:
                """v = noise - x0, predicted at the packed flow latents x and t of shape (b,), with true CFG."""
                if with_uncond and unconditional is None:
                    raise ValueError("`sampler` needs both sides of true CFG: pass `negative_prompt`, `true_cfg_scale`")
                self._current_timestep = t[0] * 1000
                shared = {"hidden_states": x.to(dtype), "timestep": t, "guidance": guidance, "img_ids": image_ids}

                def predict(side: str, text: dict[str, torch.Tensor]) -> torch.Tensor:
                    attention = {**self.joint_attention_kwargs, **image_embeds.get(side, {})}
                    with self.transformer.cache_context(side):
                        v = self.transformer(**shared, **text, joint_attention_kwargs=attention, return_dict=False)[0]
                    return v.to(state_dtype)

                v = predict("cond", conditional)
                if unconditional is None:
                    return v
                negative = predict("uncond", unconditional)
                guided = negative + true_cfg_scale * (v - negative)
                return torch.stack([guided, negative]) if with_uncond else guided

            def denoiser(y: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                sigma = sigma.view(-1, 1, 1)
                x, t = (y / (1 + sigma), sigma / (1 + sigma)) if ve else (y, sigma)
                return x - t * velocity(x, t.flatten(), **kwargs)

            # t -> sigmas, and the noise -> y at the first of them
            sigmas = (ve_sigmas(levels) if ve else levels).to(state_dtype)
            x = (noise if latents is None else latents.clone()).to(device, state_dtype)  # a sampler may write on it
            y = x * (sigmas[0] / levels[0]).item() if ve else x

            def after_step(i, y, sigma, began, denoised) -> torch.Tensor:
                scale, t = (1 + sigma, began / (1 + began)) if ve else (1, began)
                tensors = {"latents": y / scale, "sigma": t, "denoised": denoised}
                tensors["prompt_embeds"] = conditional["encoder_hidden_states"]
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, i, t * 1000, chosen) or {}  # type: ignore
                embeds = returned.get("prompt_embeds", tensors["prompt_embeds"])
                conditional["encoder_hidden_states"] = embeds.to(device, dtype)
                changed = returned.get("latents", tensors["latents"])
                return y + (changed - y / scale) * scale if ve else changed  # y itself if unchanged

            # noise, sigmas -> latents
            after = None if callback_on_step_end is None else after_step
            with self.progress_bar(total=math.inf if "sigma_min" in arguments_of(sampler) else len(sigmas) - 1) as bar:
                hooks = (after, bar.update, lambda: self.interrupt)
                y, sigma = run_sampler(sampler, denoiser, y, sigmas, generator, *hooks)
            latents = y / (1 + sigma) if ve else y

            # latents -> images
            image = latents if output_type == "latent" else self._decode(latents, height, width, output_type)
        finally:
            self._current_timestep = None
            self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=image) if return_dict else (image,)

    def noise_levels(
        self,
        tokens: int,
        num_inference_steps: int | None = 28,
        sigmas: list[float] | None = None,
        schedule: str | Sequence[float] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise levels of a call with these arguments, in FLUX's t: falling to zero, float64, on the CPU.

        Args:
            tokens: 2x2 patches of the latents, height / 16 * width / 16, on which the scheduler's shift depends.
        """
        if schedule is not None and sigmas is not None:
            raise ValueError("`schedule` and `sigmas` both give the noise levels: pass one of them")
        if sigmas is None and (schedule is None or isinstance(schedule, str)) and (num_inference_steps or 0) < 1:
            raise ValueError(f"`num_inference_steps` has to be at least 1, but is {num_inference_steps}")
        n = num_inference_steps or 0  # 0 where the levels are given
        for name, levels in (("sigmas", sigmas), ("schedule", schedule)):
            if levels is not None and not isinstance(levels, str) and check_sigmas(levels, name)[0] > 1:
                raise ValueError(f"`{name}`: FLUX's t lies in 0..1, but the first is {float(levels[0])}")
        config = self.scheduler.config
        keys = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(tokens, *(config.get(key, default) for key, default in keys.items()))
        if schedule == "vp":
            with torch.device("cpu"), SamplerMode():
                levels = sampling.get_sigmas_vp(n)
            return levels / (1 + levels)
        if isinstance(schedule, str):  # between t = 1 and the lowest of 10,000 levels, shifted
            own = hasattr(type(self.scheduler), "shift")  # its `set_shift` leaves the config alone
            shift = self.scheduler.shift if own else config.get("flow_shift", config.get("shift", 1.0))
            if config.get("use_dynamic_shifting"):
                shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
            return named_sigmas(schedule, n, shift / (shift + 9999), 1.0)
        if schedule is not None:
            return check_sigmas(schedule, "schedule", at_least=2)
        scheduler = copy.deepcopy(self.scheduler)  # set_timesteps changes it
        given = np.linspace(1.0, 1 / n, n) if sigmas is None else sigmas
        sigmas = None if config.get("use_flow_sigmas") else [sigma for sigma in given if sigma > 0]  # it appends zero
        shifting = {"mu": mu} if config.get("use_dynamic_shifting") else {}
        with torch.device("cpu"):  # whatever the default device
            retrieve_timesteps(scheduler, num_inference_steps, "cpu", sigmas=sigmas, **shifting)
        levels = torch.as_tensor(scheduler.sigmas, dtype=torch.float64, device="cpu").clone()
        levels[-1] = 0.0  # DEIS's ends with the lowest level, Heun's lists a level twice
        return check_sigmas(levels.unique_consecutive(), f"{type(scheduler).__name__}.sigmas")

    def _decode(self, latents: torch.Tensor, height: int, width: int, output_type: str | None) -> Any:
        """Images of the final packed latents."""
        latents = self._unpack_latents(latents, height, width, self.vae_scale_factor)
        hooked = hasattr(self.vae, "_hf_hook") or hasattr(self.vae, "_diffusers_hook")
        latents = latents.to(latents.device if hooked else self.vae.device, self.vae.dtype)
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.image_processor.postprocess(self.vae.decode(latents, return_dict=False)[0], output_type=output_type)


def uses_ve(parameterization: str, sampler: Callable, ts: torch.Tensor) -> bool:
    """Whether the sampler sees "ve", not "flow". See `FluxComfyPipeline`."""
    if parameterization not in ("auto", "flow", "ve"):
        raise ValueError(f"`parameterization` has to be 'auto', 'flow' or 've', but is {parameterization!r}")
    named = arguments_of(sampler)
    one = len(ts) == 2 and ts[1] == 0 and is_k_diffusions(sampler)  # x0 either way, and "flow" begins at t = 1
    auto = named.get("s_churn") or named.keys() & {"noise_sampler", "sigma_min"} and not one
    return parameterization == "ve" or parameterization == "auto" and bool(auto)


def ve_sigmas(ts: torch.Tensor) -> torch.Tensor:
    """sigma = t / (1 - t). At t = 1, where it is infinite, the first one continues the ratio of the next two.

    It is at least 15, SDXL's highest: noise of a lower sigma would hide less of the picture than pure noise does.
    """
    sigmas = ts / (1 - ts)
    if ts[0] > 0.9999:
        second, third = sigmas[1].item(), sigmas[2].item() if len(sigmas) > 2 else 0.0
        sigmas[0] = max(second * (second / third if third > 0 else 4.0), 15.0)
    return sigmas


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
