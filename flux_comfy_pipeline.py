"""FluxComfyPipeline: FLUX.1 in diffusers, sampled by k-diffusion.

    pipe = FluxComfyPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
    image = pipe("an astronaut", sampler="dpmpp_2m", num_inference_steps=28).images[0]

This file works alone: it needs torch, diffusers, transformers and k-diffusion, and can be copied anywhere.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
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

# --- shared block: the same text stands in sdxl_comfy_pipeline.py and flux_comfy_pipeline.py ---


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
SCHEDULES = ("karras", "exponential", "polyexponential", "vp")


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

    Raises:
        ValueError: no sampler of k-diffusion has this name.
        TypeError: not a name, and not callable as `sampler(model, x, sigmas, ...)`.
    """
    if isinstance(sampler, str):
        function = getattr(sampling, f"sample_{sampler.removeprefix('sample_')}", None)
        if callable(function) and _first_parameters(function):
            return function
        raise _unknown("sampler", sampler, sampler_names())
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
    """A copy of the sampler's options. Raises a ValueError for one that it does not take, and lists those it takes."""
    options, parameters = dict(sampler_kwargs or {}), inspect.signature(sampler).parameters.values()
    known = [p.name for p in parameters if p.name not in GIVEN and p.kind is not p.POSITIONAL_ONLY]
    unknown = ", ".join(name for name in options if name not in known)
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        name = getattr(sampler, "__name__", repr(sampler))
        raise ValueError(f"`sampler_kwargs`: {name} takes no {unknown}; it takes {', '.join(known) or 'none'}")
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
            return self.draw(args[0])
        if func is torch.Tensor.__getitem__ and args[0].ndim == 0 and args[0].device.type == "cpu":
            return args[0]
        return func(*args, **(kwargs or {}))


class _Interrupted(Exception):
    """Carries the state and its sigma out of a sampler."""


def _is_k_diffusion(sampler: Callable) -> bool:
    return getattr(sampler, "__module__", None) == sampling.__name__


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


def brownian_noise(x: torch.Tensor, seeds: Sequence[int], device: torch.device | str) -> Callable:
    """Step noise (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|) of x's shape: a path W for each image's seed.

    In law it is k-diffusion's BrownianTreeNoiseSampler, but W depends on the seed alone and not on the levels. The
    normals are drawn on `device`; those of the last call are kept, so that the next one makes about 15 draws.
    """
    generator, normals, motion = torch.Generator(device), {}, {}

    def draw(node: int) -> torch.Tensor:
        # the CPU's generator reads 32 bits of its seed: with an odd factor they differ between the nodes of a path
        states = (generator.manual_seed((seed + node * 0x9E3779B97F4A7C15) % 2**63) for seed in seeds)
        return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=device) for g in states])

    def total(weights: dict[int, float]) -> torch.Tensor:
        w = torch.zeros(x.shape, dtype=x.dtype, device=device)
        for node, weight in weights.items():
            w.add_(normals[node], alpha=weight)
        return w

    def noise_sampler(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        nonlocal normals, motion
        weights = {level: brownian_weights(level) for level in (float(sigma), float(sigma_next))}
        normals = {n: normals[n] if n in normals else draw(n) for nodes in weights.values() for n in nodes}
        motion = {level: motion[level] if level in motion else total(nodes) for level, nodes in weights.items()}
        (begin, w_begin), (end, w_end) = motion.items()
        return ((w_end - w_begin) / math.sqrt(abs(end - begin))).to(x.device)

    return noise_sampler


def _noise_sampler(
    sampler: Callable, x: torch.Tensor, sigmas: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
) -> Callable:
    """Step noise of unit variance and x's shape: Brownian for `*_sde`, with a seed for each image; white for others."""
    if not (_is_k_diffusion(sampler) and sampler.__name__.endswith("_sde")):
        return lambda sigma, sigma_next: randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    generators = generator if isinstance(generator, list) else [generator] * x.shape[0]
    seeds = [torch.randint(2**63 - 1, (), generator=g, device=g.device if g else "cpu").item() for g in generators]
    return brownian_noise(x, seeds, generators[0].device if generators[0] else x.device)


def _call(
    sampler: Callable, model: Callable, x: torch.Tensor, sigmas: torch.Tensor, arguments: dict[str, Any]
) -> torch.Tensor:
    """Calls a sampler of either signature with those of the arguments that it takes.

    A sampler by range stops at the lowest positive level. Where the levels end at zero, the step to it, Euler's, is
    taken here; dpm_fast counts it among its evaluations.
    """
    positive = sigmas[sigmas > 0]
    if len(sigmas) == 2 and len(positive) == 1 and _is_k_diffusion(sampler):
        sampler = sampling.sample_euler  # one step to zero is `denoised` in all of them, and some fail on it
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


def _step_starts(sampler: Callable, sigmas: torch.Tensor, arguments: dict[str, Any]) -> dict[int, int]:
    """Which evaluation of the model begins which step: {evaluation: step}, found by a run on a one-element tensor.

    A sampler of k-diffusion calls back after the first evaluation of a step. Empty for one whose steps depend on its
    error, which can't be known beforehand.
    """
    if "rtol" in inspect.signature(sampler).parameters:
        return {}
    evaluations, starts = 0, {}

    def model(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        return torch.zeros_like(x)

    def callback(info: dict[str, Any]) -> None:
        starts[evaluations - 1] = info["i"]

    x = torch.ones(1, dtype=sigmas.dtype)
    dry = {"callback": callback, "noise_sampler": lambda sigma, sigma_next: torch.zeros_like(x)}
    with _SamplerMode(torch.zeros_like):
        _call(sampler, model, x, sigmas, {**arguments, **dry})
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
        on_step: called in every step.
        interrupted: asked in every step; the run ends there if it answers True.

    Returns:
        The state at the end and its sigma, which is sigmas[-1] unless interrupted.
    """
    evaluations, steps = 0, {}
    arguments = {"disable": True, **sampler_kwargs}
    starts = _step_starts(sampler, sigmas, arguments) if after_step else {}
    mode = _SamplerMode(lambda like: randn_tensor(like.shape, generator, like.device, like.dtype))

    def model(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        nonlocal evaluations
        step, evaluations = starts.get(evaluations, 0), evaluations + 1
        mode.__exit__(None, None, None)
        try:
            if step > 0:
                changed = after_step(step - 1, x, sigma[0], *steps.pop(step - 1))
                if changed is not x:
                    x.copy_(changed)  # x is the sampler's own tensor
                if interrupted():
                    raise _Interrupted(x, sigma[0].cpu())
            return denoiser(x, sigma)
        finally:
            mode.__enter__()

    def callback(info: dict[str, Any]) -> None:
        on_step()
        if interrupted():
            raise _Interrupted(info["x"], info["sigma_hat"].cpu())
        i, x, sigma, denoised = (info[key] for key in ("i", "x", "sigma", "denoised"))
        if starts:
            steps[i] = sigma, denoised
        elif after_step and after_step(i, x, sigma, sigma, denoised) is not x:
            name = getattr(sampler, "__name__", sampler)
            raise ValueError(f"the latents can't be changed in a callback: {name} does not say where its steps begin")

    def noise_sampler(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        mode.__exit__(None, None, None)
        try:
            return noise(sigma, sigma_next)
        finally:
            mode.__enter__()

    arguments["callback"] = callback
    if "noise_sampler" not in arguments:
        noise, arguments["noise_sampler"] = _noise_sampler(sampler, x, sigmas, generator), noise_sampler
    try:
        with mode:
            x = _call(sampler, model, x, sigmas, arguments)
    except _Interrupted as stopped:
        return stopped.args
    if steps:
        last = max(steps)
        x = after_step(last, x, sigmas[-1], *steps[last])
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


def steps_of(sampler: Callable, sigmas: torch.Tensor) -> float:
    """How many steps the sampler takes over these levels; infinity where it decides itself."""
    return math.inf if _first_parameters(sampler) == BY_RANGE else len(sigmas) - 1


def check_call(
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    shape: tuple[int | None, ...],
) -> None:
    """Raises a ValueError unless there is a step to take, and a generator or latents for every image."""
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` has to be a whole number, at least 1, but is {num_inference_steps!r}")
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"`generator` has to have one generator an image, {shape[0]}, but has {len(generator)}")
    if latents is not None and [n for n, fixed in zip(latents.shape, shape) if fixed] != [n for n in shape if n]:
        raise ValueError(f"`latents` have to be of shape {shape}, but are of shape {tuple(latents.shape)}")


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


class FluxComfyPipeline(FluxPipeline):
    """`FluxPipeline` with the scheduler's loop replaced by one call of a k-diffusion sampler.

    Components, loaders, LoRA, IP-adapter and offloading are the parent's. The scheduler gives the shift and, when the
    caller names no schedule, the noise levels; its `step` is never called.

    FLUX predicts the velocity v = noise - x0 at x = (1 - t) x0 + t noise, so x0 = x - t v. k-diffusion's samplers know
    y = x0 + sigma noise. With y = x / (1 - t) and sigma = t / (1 - t) the one is the other, exactly ("ve"). Samplers
    that add no noise may as well take t for sigma and x for y, since the ODE's derivative (x - x0) / t is v ("flow").
    """

    _callback_tensor_inputs = [*FluxPipeline._callback_tensor_inputs, "denoised", "sigma"]

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
        num_inference_steps: int = 28,
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
        schedule: str | None = None,
        parameterization: str = "auto",
    ) -> FluxPipelineOutput | tuple:
        """Draws images. What the parent's `__call__` takes keeps its name, meaning and default. New are:

        Args:
            sampler: a sampler of k-diffusion by name, with or without `sample_` (`sampler_names()` has them), or a
                callable with its signature, `sampler(model, x, sigmas, extra_args=None, callback=None, disable=None)`.
            sampler_kwargs: the sampler's options: `eta`, `s_noise`, `s_churn`, `solver_type`, `order`, `rtol`, ...
            schedule: noise levels by name: "karras", "exponential", "polyexponential", "vp". None: the scheduler's own.
            parameterization: what the sampler sees as sigma. "flow": t. "ve": t / (1 - t). "auto": "ve" for samplers
                that add noise or place their own noise levels, "flow" for the others.

        `sigmas` and the callback's `sigma` are FLUX's t, 1 for noise and 0 for the picture, whatever the sampler sees;
        `sigmas` are shifted by the scheduler as in the parent. `latents` are packed, x = (1 - t) x0 + t noise at the
        first t. The state is float32 (float64 for a float64 network) whatever the network's dtype.
        `callback_on_step_end_tensor_inputs` may also name `denoised`, the x0 that the step began with, and `sigma`, the
        t that it began at.

        Raises:
            ValueError, TypeError: for arguments that do not fit, before any network runs.
        """
        size = self.vae.config.sample_size if self.vae is not None else 1024  # FLUX.1's is 1024, the parent's default
        height, width = height or size, width or size
        self.check_inputs(
            prompt,
            prompt_2,
            height,
            width,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
        rows, columns = (size // (2 * self.vae_scale_factor) for size in (height, width))
        if min(rows, columns) < 1:
            raise ValueError(
                f"`height`, `width` have to be at least {2 * self.vae_scale_factor}, but are {height}, {width}"
            )
        batch_size = 1 if isinstance(prompt, str) else len(prompt if prompt is not None else prompt_embeds)
        batch_size *= num_images_per_prompt
        channels = self.transformer.config.in_channels
        check_call(num_inference_steps, generator, latents, (batch_size, rows * columns, channels))
        sampler = find_sampler(sampler)
        sampler_kwargs = check_sampler_kwargs(sampler, sampler_kwargs)
        ts = self.noise_levels(rows * columns, num_inference_steps, sigmas, schedule)
        ve = uses_ve(parameterization, sampler, sampler_kwargs, ts)
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        if negative_prompt_embeds is not None and prompt_embeds is not None:
            if prompt_embeds.shape != negative_prompt_embeds.shape:
                raise ValueError(
                    "`prompt_embeds` and `negative_prompt_embeds` have to be of one shape, but are"
                    f" {tuple(prompt_embeds.shape)} and {tuple(negative_prompt_embeds.shape)}"
                )

        self._guidance_scale = guidance_scale
        self._joint_attention_kwargs = joint_attention_kwargs or {}
        self._current_timestep = None
        self._interrupt = False
        self._num_timesteps = len(ts) - 1
        device = self._execution_device

        try:
            dtype = self.transformer.dtype  # the text encoders' may be another
            state_dtype = torch.promote_types(dtype, torch.float32)

            # prompt -> conditioning
            def encode(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds) -> tuple[torch.dtype, dict[str, Any]]:
                """The text encoders' dtype, and the transformer's arguments for one side of true CFG."""
                prompt_embeds, pooled_prompt_embeds, text_ids = self.encode_prompt(
                    prompt,
                    prompt_2,
                    device=device,
                    num_images_per_prompt=num_images_per_prompt,
                    prompt_embeds=prompt_embeds,
                    pooled_prompt_embeds=pooled_prompt_embeds,
                    max_sequence_length=max_sequence_length,
                    lora_scale=self._joint_attention_kwargs.get("scale"),
                )
                names = ("encoder_hidden_states", "pooled_projections", "txt_ids")
                values = (prompt_embeds, pooled_prompt_embeds, text_ids)
                return prompt_embeds.dtype, {name: value.to(device, dtype) for name, value in zip(names, values)}

            noise_dtype, conditional = encode(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)
            unconditional = None
            if true_cfg_scale > 1 and has_negative:
                negative = (negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds)
                unconditional = encode(*negative)[1]
            image_embeds = self._image_embeds(
                (ip_adapter_image, ip_adapter_image_embeds),
                (negative_ip_adapter_image, negative_ip_adapter_image_embeds),
                (width, height),
                batch_size,
            )
            guidance = None
            if self.transformer.config.guidance_embeds:
                guidance = torch.full([batch_size], guidance_scale, device=device, dtype=torch.float32)

            # generator -> noise, the stock pipeline's own
            noise, image_ids = self.prepare_latents(
                batch_size, channels // 4, height, width, noise_dtype, device, generator, latents
            )

            # conditioning -> denoiser, the only place that knows the network
            def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                """v = noise - x0, predicted at the packed flow latents x and t of shape (b,), with true CFG."""
                self._current_timestep = t[0] * 1000

                def predict(side: str, text: dict[str, torch.Tensor]) -> torch.Tensor:
                    with self.transformer.cache_context(side):
                        return self.transformer(
                            hidden_states=x.to(dtype),
                            timestep=t,
                            guidance=guidance,
                            img_ids=image_ids,
                            joint_attention_kwargs={**self.joint_attention_kwargs, **image_embeds.get(side, {})},
                            return_dict=False,
                            **text,
                        )[0].to(state_dtype)

                v = predict("cond", conditional)
                if unconditional is None:
                    return v
                negative = predict("uncond", unconditional)
                return negative + true_cfg_scale * (v - negative)

            def to_flow(y: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                """The flow latents x and their t of the sampler's state y and its sigma."""
                return (y / (1 + sigma), sigma / (1 + sigma)) if ve else (y, sigma)

            def denoiser(y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
                x, t = to_flow(y, sigma.view(-1, 1, 1))
                return x - t * velocity(x, t.flatten())

            # t -> sigmas, and the noise -> y at the first of them
            ts = ts.to(state_dtype)
            sigmas = ve_sigmas(ts) if ve else ts
            x = (noise if latents is None else latents).to(device, state_dtype)
            if latents is None or ts[0] == 1:
                y = x * sigmas[0].item()
            else:
                y = x * (1 + sigmas[0].item()) if ve else x

            def after_step(i, y, sigma, began, denoised) -> torch.Tensor:
                x, t = to_flow(y, sigma)[0], to_flow(y, began)[1]
                tensors = {"latents": x, "sigma": t, "denoised": denoised}
                tensors["prompt_embeds"] = conditional["encoder_hidden_states"]
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, i, t * 1000, chosen)
                conditional["encoder_hidden_states"] = returned.get("prompt_embeds", tensors["prompt_embeds"])
                changed = returned.get("latents", x)
                return y if changed is x else changed * (1 + sigma if ve else 1)

            # noise, sigmas -> latents
            with self.progress_bar(total=steps_of(sampler, sigmas)) as progress_bar:
                y, sigma = run_sampler(
                    sampler,
                    sampler_kwargs,
                    denoiser,
                    y,
                    sigmas,
                    generator,
                    after_step if callback_on_step_end is not None else None,
                    progress_bar.update,
                    lambda: self.interrupt,
                )
            latents = to_flow(y, sigma)[0]
            self._current_timestep = None

            # latents -> images
            image = latents
            if output_type != "latent":
                latents = self._unpack_latents(latents, height, width, self.vae_scale_factor)
                latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
                image = self.vae.decode(latents, return_dict=False)[0]
                image = self.image_processor.postprocess(image, output_type=output_type)
        finally:
            self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=image) if return_dict else (image,)

    def noise_levels(
        self,
        tokens: int,
        num_inference_steps: int,
        sigmas: list[float] | None = None,
        schedule: str | None = None,
    ) -> torch.Tensor:
        """The noise levels of a call with these arguments, in FLUX's t: falling to zero, float64, on the CPU.

        Args:
            tokens: 2x2 patches of the latents, height / 16 * width / 16, on which the scheduler's shift depends.
        """
        check_schedule(schedule, sigmas=sigmas)
        if sigmas is not None:
            check_sigmas(sigmas)
            if max(sigmas) > 1:
                raise ValueError(f"`sigmas` are FLUX's t, which lies in 0..1, but are {list(sigmas)}")
            sigmas = [sigma for sigma in sigmas if sigma > 0]  # the scheduler appends the zero
        if schedule == "vp":
            levels = sampling.get_sigmas_vp(num_inference_steps).double()
            return levels / (1 + levels)
        config = self.scheduler.config
        mu = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        scheduler = copy.deepcopy(self.scheduler)  # set_timesteps changes it
        if schedule is not None:
            # between t = 1 and the lowest of 10,000 shifted levels, as in ComfyUI
            retrieve_timesteps(scheduler, None, "cpu", sigmas=[1.0, 1e-4], mu=mu)
            return named_sigmas(schedule, num_inference_steps, scheduler.sigmas[1].item(), 1.0).double()
        if sigmas is None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        if config.get("use_flow_sigmas"):
            sigmas = None
        retrieve_timesteps(scheduler, num_inference_steps, "cpu", sigmas=sigmas, mu=mu)
        levels = scheduler.sigmas.double().cpu().unique_consecutive()  # Heun's scheduler lists a level twice
        check_sigmas(levels, name=f"{type(scheduler).__name__}.sigmas")
        return levels

    def _image_embeds(
        self, positive: tuple[Any, Any], negative: tuple[Any, Any], size: tuple[int, int], batch_size: int
    ) -> dict[str, dict[str, Any]]:
        """IP-adapter arguments for both sides of true CFG from their (image, embeds); black where one is missing."""
        sides = {"cond": positive, "uncond": negative}
        if all(image is None and embeds is None for image, embeds in sides.values()):
            return {}
        black = [np.zeros((*size, 3), dtype=np.uint8)] * self.transformer.encoder_hid_proj.num_ip_adapters
        prepared = {}
        for side, (image, embeds) in sides.items():
            image = black if image is None and embeds is None else image
            embeds = self.prepare_ip_adapter_image_embeds(image, embeds, self._execution_device, batch_size)
            prepared[side] = {"ip_adapter_image_embeds": embeds}
        return prepared


def uses_ve(parameterization: str, sampler: Callable, sampler_kwargs: dict[str, Any], ts: torch.Tensor) -> bool:
    """Whether the sampler sees "ve", not "flow". See `FluxComfyPipeline`."""
    if parameterization not in ("auto", "flow", "ve"):
        raise ValueError(f"`parameterization` has to be 'auto', 'flow' or 've', but is {parameterization!r}")
    if parameterization != "auto":
        return parameterization == "ve"
    if sampler_kwargs.get("s_churn"):
        return True
    if len(ts) == 2 and ts[1] == 0 and _is_k_diffusion(sampler):
        return False  # one step to zero is x0 either way, and this way it begins at t = 1
    return "noise_sampler" in inspect.signature(sampler).parameters or _first_parameters(sampler) == BY_RANGE


def ve_sigmas(ts: torch.Tensor) -> torch.Tensor:
    """sigma = t / (1 - t). At t = 1, where it is infinite, the first one continues the ratio of the next two.

    It is at least 15, SDXL's highest: below, the picture that noise of finite sigma still shows would be missed.
    """
    sigmas = ts / (1 - ts)
    if ts[0] > 0.9999:
        second, third = sigmas[1], sigmas[2] if len(sigmas) > 2 else torch.tensor(0.0)
        sigmas[0] = max(second * (second / third if third > 0 else 4.0), torch.tensor(15.0))
    return sigmas
