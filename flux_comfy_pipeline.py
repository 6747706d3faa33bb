"""FluxComfyPipeline: FLUX.1 in diffusers, sampled by k-diffusion.

    pipe = FluxComfyPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
    image = pipe("an astronaut", sampler="dpmpp_2m", num_inference_steps=28).images[0]

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

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class FluxComfyPipeline(FluxPipeline):
    """`FluxPipeline` with the scheduler's loop replaced by one call of a k-diffusion sampler.

    Components, loaders, LoRA, IP-adapter and offloading are the parent's. The scheduler gives the shift and, when the
    caller names no schedule, the noise levels. Its `step` is never called. One call at a time, as with the parent.

    FLUX predicts v = noise - x0 at x = (1 - t) x0 + t noise, so x0 = x - t v. k-diffusion's samplers expect
    y = x0 + sigma noise, which is x / (1 - t) with sigma = t / (1 - t) ("ve"). A deterministic sampler can use x and t
    directly ("flow"): the derivative of its ODE, (x - x0) / t, is v.
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
        """Draws images. The parent's arguments keep their names, meanings and defaults. New arguments:

        Args:
            sampler: a k-diffusion sampler by name (`sampler_names()`), or a callable with the same signature,
                `sampler(model, x, sigmas, extra_args=None, callback=None, disable=None)`. Its noise follows the
                generator. `model(x, sigma, with_uncond=True)` stacks x0 with guidance and for the negative prompt.
            sampler_kwargs: the sampler's options: `eta`, `s_noise`, `s_churn`, `noise_sampler`, `solver_type`, ...
            schedule: "karras", "exponential" or "polyexponential", or the noise levels themselves, falling, in t.
            parameterization: the sampler's sigma is t ("flow") or t / (1 - t) ("ve"). "auto" is "ve" for samplers that
                add noise (`noise_sampler`, `s_churn` above 0) or place their own levels, and "flow" for all others.

        `sigmas` are t, shifted by the scheduler as in the parent. `latents` are packed: (1 - t) x0 + t noise at the
        first t. The default is pure noise at any first t. ValueError, TypeError: a wrong argument, at once.

        `callback_on_step_end` is called once per step with the latents at the step's end and the timestep, 1000 t, at
        its start. By name it also gets `sigma`, t at the start, and `denoised`, the x0 predicted there. It may return
        other latents; with a user-supplied sampler only if that loops over this module's `sampling.trange`.
        """
        size = getattr(getattr(self.vae, "config", None), "sample_size", 1024)  # FLUX.1's; some test VAEs have none
        height, width = height or size, width or size
        rows, columns = (side // (2 * self.vae_scale_factor) for side in (height, width))
        embeds = (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        rest = (negative_prompt, negative_prompt_2, *embeds, callback_on_step_end_tensor_inputs, max_sequence_length)
        self.check_inputs(prompt, prompt_2, height, width, *rest)
        guided = true_cfg_scale > 1 and (negative_prompt is not None or negative_prompt_embeds is not None)
        if guided and len({one.shape for one in embeds[:2] if one is not None}) > 1:
            raise ValueError("`negative_prompt_embeds`, `prompt_embeds` must have the same shape when passed directly")
        chosen = find_sampler(sampler, sampler_kwargs)
        levels = self.noise_levels(rows * columns, num_inference_steps, sigmas, schedule)
        ve = uses_ve(parameterization, chosen, levels)
        given: Any = prompt_embeds if prompt is None else prompt
        batch_size = (1 if isinstance(given, str) else len(given)) * (num_images_per_prompt or 1)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator`: has to be one or {batch_size}, one per image, but is {len(generator)}")

        self._guidance_scale = guidance_scale
        self._joint_attention_kwargs = dict(joint_attention_kwargs or {})
        self._current_timestep: Any = None
        self._interrupt, self._num_timesteps = False, len(levels) - 1
        device, dtype = self._execution_device, self.transformer.dtype  # the text encoders' dtype may be another
        state_dtype = torch.promote_types(dtype, torch.float32)
        try:
            # prompts, images -> conditioning
            prompts = {"cond": (prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)}
            if guided:
                embeds = (negative_prompt_embeds, negative_pooled_prompt_embeds)
                prompts["uncond"] = (negative_prompt, negative_prompt_2, *embeds)
            images = {"cond": (ip_adapter_image, ip_adapter_image_embeds)}
            images["uncond"] = (negative_ip_adapter_image, negative_ip_adapter_image_embeds)
            rest = (max_sequence_length, batch_size, device, dtype)
            noise_dtype, conditioning, adapters = self._encode(prompts, images, *rest)

            # generator -> noise, the stock pipeline's own; t -> sigmas; noise -> y at the first of them
            shape = (batch_size, self.transformer.config.in_channels // 4, height, width)
            noise, image_ids = self.prepare_latents(*shape, noise_dtype, device, generator, latents)
            sigmas = (ve_sigmas(levels) if ve else levels).to(state_dtype)
            x = (noise if latents is None else latents.clone()).to(device, state_dtype)  # a sampler may write on it
            y = x * (sigmas[0] / levels[0]).item() if ve else x
            denoiser = self._denoiser(conditioning, adapters, image_ids, true_cfg_scale, ve)

            # y, sigmas -> latents
            def after_step(i, y, sigma, began, denoised) -> torch.Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return y
                scale, t = (1 + sigma, began / (1 + began)) if ve else (1, began)
                tensors = {"latents": y / scale, "sigma": t.clone(), "denoised": denoised.clone()}
                tensors["prompt_embeds"] = conditioning["cond"]["encoder_hidden_states"]
                shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = tensors | (callback_on_step_end(self, i, t * 1000, shown) or {})
                conditioning["cond"]["encoder_hidden_states"] = changed["prompt_embeds"].to(device, dtype)
                return y + (changed["latents"] - y / scale) * scale if ve else changed["latents"]  # y if unchanged

            with self.progress_bar(total=math.inf if "sigma_min" in chosen.arguments else len(levels) - 1) as bar:
                y, sigma = run_sampler(chosen, denoiser, y, sigmas, generator, after_step, lambda: self.interrupt)
            latents = y / (1 + sigma) if ve else y

            # latents -> images
            image = latents if output_type == "latent" else self._decode(latents, height, width, output_type)
        finally:
            self._current_timestep = None
            self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=image) if return_dict else (image,)

    def _encode(self, prompts, images, max_length, batch_size: int, device, dtype) -> tuple[torch.dtype, dict, dict]:
        """The text encoders' dtype, and the transformer's text and IP-adapter arguments for each side of true CFG."""
        conditioning, adapters, lora_scale = {}, {}, self._joint_attention_kwargs.get("scale")
        for side, (prompt, prompt_2, *embeds) in prompts.items():
            *embeds, ids = self.encode_prompt(prompt, prompt_2, device, 1, *embeds, max_length, lora_scale=lora_scale)
            noise_dtype = embeds[0].dtype
            # for several images of a prompt, and one negative prompt for several
            repeated = [e if len(e) == batch_size else e.repeat_interleave(batch_size // len(e), 0) for e in embeds]
            named = zip(("encoder_hidden_states", "pooled_projections", "txt_ids"), (*repeated, ids), strict=True)
            conditioning[side] = {name: value.to(device, dtype) for name, value in named}
        if any(one is not None for pair in images.values() for one in pair):  # a side without an image gets a black one
            black = [np.zeros((224, 224, 3), np.uint8)] * self.transformer.encoder_hid_proj.num_ip_adapters
            for side in prompts:
                pair = images[side] if any(one is not None for one in images[side]) else (black, None)
                embeds = self.prepare_ip_adapter_image_embeds(*pair, device, batch_size)
                adapters[side] = {"ip_adapter_image_embeds": embeds}
        return noise_dtype, conditioning, adapters

    def _denoiser(self, conditioning, adapters, image_ids, true_cfg_scale: float, ve: bool) -> Callable:
        """A function of the sampler's state and sigma, shape (b,), that calls the network: x0 with true CFG."""
        prompt = conditioning["cond"]["encoder_hidden_states"]  # of the network's dtype: to look that up takes 0.5 ms
        guidance = torch.full([len(prompt)], self._guidance_scale, device=prompt.device, dtype=torch.float32)
        shared = {"guidance": guidance if self.transformer.config.guidance_embeds else None, "img_ids": image_ids}

        def denoiser(y: torch.Tensor, sigma: torch.Tensor, with_uncond: bool = False) -> torch.Tensor:
            if with_uncond and "uncond" not in conditioning:
                raise ValueError("`sampler` needs both sides of true CFG: pass `negative_prompt`, `true_cfg_scale`")
            sigma = sigma.view(-1, 1, 1)
            x, t = (y / (1 + sigma), sigma / (1 + sigma)) if ve else (y, sigma)
            named = {"hidden_states": x.to(prompt.dtype), "timestep": t.flatten(), **shared}
            self._current_timestep = named["timestep"][0] * 1000
            velocities: dict[str, Any] = {}  # noise - x0, predicted for either side
            for side, text in conditioning.items():
                named["joint_attention_kwargs"] = {**self.joint_attention_kwargs, **adapters.get(side, {})}
                with self.transformer.cache_context(side):
                    velocities[side] = self.transformer(**named, **text, return_dict=False)[0].to(y.dtype)
            v, negative = velocities["cond"], velocities.get("uncond", velocities["cond"])
            if "uncond" in velocities:
                v = negative + true_cfg_scale * (v - negative)
            return x - t * (torch.stack([v, negative]) if with_uncond else v)

        return denoiser

    def noise_levels(
        self, tokens: int, num_inference_steps: int | None = 28, sigmas: list[float] | None = None, schedule: Any = None
    ) -> torch.Tensor:
        """The noise levels of a call with these arguments, for `tokens` 2x2 patches: t, falling, float64."""
        if schedule is not None and sigmas is not None:
            raise ValueError("`schedule` and `sigmas` both give the noise levels: pass one of them")
        n = num_inference_steps or 0  # 0 where the levels are given
        name, given = ("sigmas", sigmas) if schedule is None else ("schedule", schedule)
        if isinstance(given, str | None) and n < 1:
            raise ValueError(f"`num_inference_steps` has to be at least 1, but is {num_inference_steps}")
        if not isinstance(given, str | None) and check_sigmas(given, name)[0] > 1:
            raise ValueError(f"`{name}`: FLUX's t lies in 0..1, but the first is {float(given[0])}")
        config = self.scheduler.config
        keys = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(tokens, *(config.get(key, default) for key, default in keys.items()))
        if isinstance(schedule, str):  # between t = 1 and the lowest of 10,000 levels, shifted
            own = hasattr(type(self.scheduler), "shift")  # `set_shift` changes the attribute, not the config
            shift = self.scheduler.shift if own else config.get("flow_shift", config.get("shift", 1.0))
            if config.get("use_dynamic_shifting"):
                shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
            return named_sigmas(schedule, n, shift / (shift + 9999), 1.0)
        if schedule is not None:
            return check_sigmas(schedule, "schedule", at_least=2)
        scheduler = copy.deepcopy(self.scheduler)  # set_timesteps changes it
        unshifted = np.linspace(1.0, 1 / n, n) if sigmas is None else sigmas
        sigmas = None if config.get("use_flow_sigmas") else [t for t in unshifted if t > 0]  # zero is appended there
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


# --- the block's part for flow models ---


def uses_ve(parameterization: str, sampler: Sampler, ts: torch.Tensor) -> bool:
    """Whether the sampler's sigma is t / (1 - t), "ve", or t, "flow". "auto": "ve" for noise and for own levels."""
    if parameterization == "auto":
        one_step, named = len(ts) == 2 and ts[1] == 0 and sampler.is_k_diffusions, sampler.arguments
        return not one_step and bool("noise_sampler" in named or "sigma_min" in named or named.get("s_churn"))
    if parameterization not in ("flow", "ve"):
        raise ValueError(f"`parameterization` has to be 'auto', 'flow' or 've', but is {parameterization!r}")
    return parameterization == "ve"


def ve_sigmas(ts: torch.Tensor) -> torch.Tensor:
    """sigma = t / (1 - t). At t = 1, where it is infinite, the first one continues the ratio of the next two."""
    sigmas = ts / (1 - ts)
    if ts[0] > 0.9999:  # at least 15, SDXL's highest: noise of a lower sigma would hide too little of the picture
        second, third = sigmas[1].item(), sigmas[2].item() if len(sigmas) > 2 else 0.0
        sigmas[0] = max(second * (second / third if third > 0 else 4.0), 15.0)
    return sigmas


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
