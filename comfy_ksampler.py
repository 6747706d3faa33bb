"""ComfyUI's KSampler for diffusers: its fields in, the arguments of a pipeline's call out.

    pipe = StableDiffusionXLComfyPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", ...)
    settings = {"seed": 42, "steps": 20, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    image = pipe("an astronaut", negative_prompt="", **ksampler(pipe, **settings)).images[0]

This file works alone beside sdxl_comfy_pipeline.py or flux_comfy_pipeline.py: it needs torch, scipy and k-diffusion.
ComfyUI is imported for the samplers that it alone has, and only when one of them is named.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from scipy.special import betaincinv

# k-diffusion's samplers that give ComfyUI's latents on both models ("ddim" is ComfyUI's name for Euler's method)
SAME = ("euler", "ddim", "heun", "dpm_2", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2m")
# and on SDXL alone. On FLUX, ComfyUI's are others: ||difference|| / ||ComfyUI's||, the larger of "simple" and "beta" at
# 20 steps, for a mixture of three Gaussians. Above 1 is another picture.
FLUX_APART = {"euler_ancestral": 1.2, "dpm_2_ancestral": 0.04, "dpmpp_2s_ancestral": 1.2}
FLUX_APART |= {f"dpmpp_{sde}{gpu}": 0.004 for sde in ("sde", "2m_sde", "3m_sde") for gpu in ("", "_gpu")}
OWN = """euler_cfg_pp euler_ancestral_cfg_pp heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde dpmpp_2s_ancestral_cfg_pp
    dpmpp_2m_cfg_pp dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu ddpm lcm ipndm ipndm_v deis res_multistep
    res_multistep_cfg_pp res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation
    gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver sa_solver_pece uni_pc uni_pc_bh2""".split()
SAMPLERS = (*SAME, *FLUX_APART, *OWN)
SKIPPING = ("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2")  # one level more, without the last but one


def ksampler(
    pipe: Any,
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: Any,
    denoise: float = 1.0,
    width: int = 0,
    height: int = 0,
    latent_image: torch.Tensor | None = None,
    batch_size: int = 1,
    noise: str = "today",
) -> dict[str, Any]:
    """The arguments of `pipe(prompt, negative_prompt="", **ksampler(pipe, ...))` for the fields of a KSampler node.

    Args:
        pipe: a StableDiffusionXLComfyPipeline or a FluxComfyPipeline.
        seed: of the whole batch, as in ComfyUI.
        cfg: SDXL's guidance and FLUX's true CFG. FLUX's distilled guidance is the call's own `guidance_scale`.
        sampler_name, scheduler: of `SAMPLERS` and `SCHEDULERS`, or a list of levels for the latter. The function is
            ComfyUI's where k-diffusion's differs.
        denoise: the share of the noise levels that is run, from the lower end, over `latent_image`.
        latent_image: of shape (b, channels, height / 8, width / 8), unpacked on FLUX, in the scale that the network
            works in: the VAE's latents less its `shift_factor`, times its `scaling_factor`. By default zeros.
        noise: "today", or "before 0.7", when ComfyUI drew white step noise on a CPU from the seed, not from seed + 1.

    Raises a ValueError for what is unknown or out of range, an ImportError where ComfyUI is needed but absent.
    """
    _check("sampler_name", sampler_name, SAMPLERS)
    _check("noise", noise, ("today", "before 0.7"))
    if cfg < 1:
        raise ValueError(f"`cfg` has to be at least 1, since diffusers does not guide below, but is {cfg}")
    if "cfg_pp" in sampler_name:  # these ask for the negative prompt's prediction at 1 too: guide as little as counts
        cfg = max(cfg, 1 + 2**-23)
    if latent_image is not None:
        height, width = (pipe.vae_scale_factor * side for side in latent_image.shape[-2:])
    width, height, shape = _sizes(pipe, width, height)
    latent_image = torch.zeros(batch_size, *shape, device="cpu") if latent_image is None else latent_image
    model, device = model_sampling(pipe, width, height), pipe._execution_device
    sigmas = levels(pipe, scheduler, steps, denoise, width, height, sampler_name)
    generator = torch.Generator("cpu").manual_seed(seed)
    unit = torch.randn(latent_image.shape, generator=generator, dtype=torch.float32, device="cpu")
    highest = bool(sigmas[0] >= model.sigma_max * (1 - 1e-5))
    latents = model.noise_scaling(sigmas[0], unit, latent_image.float().cpu(), highest)
    call = {"schedule": sigmas, "num_inference_steps": len(sigmas) - 1, "num_images_per_prompt": len(latents)}
    call |= {"latents": model.packed(latents), "generator": generator, "width": width, "height": height}
    call |= {"true_cfg_scale": cfg} if isinstance(model, Flow) else {"guidance_scale": cfg, "quantize_timesteps": True}

    later = noise == "today" and device.type == "cpu"
    step_generator = torch.Generator(device).manual_seed((seed + later) % 2**64)

    def white(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        return torch.randn(latents.shape, generator=step_generator, dtype=torch.float32, device=device)

    flow = {"parameterization": "flow"} if isinstance(model, Flow) else {}
    if sampler_name in SAME:
        name = sampler_name.replace("ddim", "euler")
        own_end = name in ("lms", "dpm_fast", "dpm_adaptive")
        return call | flow | {"sampler": _ending_as_there(name) if own_end else name}
    brownian = sampler_name.startswith("dpmpp") and "_sde" in sampler_name
    comfyui = _comfyui() if flow or sampler_name in OWN else None
    if isinstance(comfyui, ModuleType):
        function = comfyui.sampler_object(sampler_name).sampler_function
        if not later and not brownian and "noise_sampler" in inspect.signature(function).parameters:
            function = functools.partial(function, noise_sampler=white)
        return call | flow | {"sampler": comfy_sampler(function, pipe, width, height, seed)}
    what_to_do = f"{comfyui}: put ComfyUI's folder on the path, PYTHONPATH=..., and install its requirements"
    if sampler_name in OWN:
        raise ImportError(f"`sampler_name`: {sampler_name!r} is ComfyUI's own, and {what_to_do}")
    on = device if sampler_name.endswith("_gpu") else torch.device("cpu")
    draw = _brownian_noise(latents.shape, device, on, sigmas, seed) if brownian else white
    call |= {"sampler": sampler_name.removesuffix("_gpu"), "sampler_kwargs": {"noise_sampler": draw}}
    if not flow:
        return call
    warnings.warn(f"{sampler_name} is k-diffusion's, {FLUX_APART[sampler_name]} off, as {what_to_do}", stacklevel=2)
    in_t = {"noise_sampler": lambda *sigmas: model.packed(draw(*(sigma / (1 + sigma) for sigma in sigmas)))}
    return call | {"parameterization": "ve", "sampler_kwargs": in_t}


def levels(
    pipe: Any, scheduler: Any, steps: int, denoise: float = 1.0, width: int = 0, height: int = 0, sampler_name: str = ""
) -> torch.Tensor:
    """ComfyUI's noise levels by its nine names (`SCHEDULERS`), for `schedule=` of a call.

    They are sigmas, FLUX's t: of shape (steps + 1,), falling to zero, float32, on the CPU. As in ComfyUI, "beta" and
    "ddim_uniform" may have fewer or more steps than asked for, and samplers that are `SKIPPING` lack a level. FLUX's
    shift depends on width and height (0: the pipeline's default).
    """
    if not isinstance(scheduler, str):  # the levels themselves, as ComfyUI's nodes make them from numbers
        return torch.tensor(scheduler, dtype=torch.float32, device="cpu")
    _check("scheduler", scheduler, tuple(SCHEDULERS))
    if steps < 1 or not 0 < denoise <= 1:
        raise ValueError(f"`steps` has to be at least 1, `denoise` above 0 and at most 1: {steps}, {denoise}")
    part, skipping = denoise <= 0.9999, sampler_name in SKIPPING
    with torch.device("cpu"):
        count = skipping + (int(steps / denoise) if part else steps)
        falling = SCHEDULERS[scheduler](count, model_sampling(pipe, width, height)).unique_consecutive()
        falling = falling[: -1 if skipping else None]
        return torch.cat([falling, falling.new_zeros(1)])[-steps - 1 if part else 0 :]


def comfy_sampler(function: Callable, pipe: Any, width: int = 0, height: int = 0, seed: int | None = None) -> Callable:
    """A sampler for `pipe(sampler=...)` of a function written for ComfyUI, its own or a custom node's.

    `function(model, x, sigmas, extra_args=, callback=, disable=, ...)` runs as it is, on a `model` with what such
    functions look up: `inner_model.inner_model.model_sampling`, `inner_model.model_patcher`, and `model_options` whose
    `sampler_post_cfg_function`s are called after guidance with `uncond_denoised`. On FLUX the function sees unpacked
    latents, of this width and height, and t for sigma: call with parameterization="flow". With a seed the function
    makes its own noise; without one its `noise_sampler` is the pipeline's, which draws from the caller's generators.
    """
    sampling = model_sampling(pipe, width, height)

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        if draw := options.get("noise_sampler"):
            options["noise_sampler"] = lambda *sigmas: sampling.unpacked(draw(*sigmas))
        surface, at = _Model(model, sampling), sigmas.to(x.device, copy=True)  # uni_pc writes into the levels
        options |= {"extra_args": {"model_options": {}, "seed": seed, **(extra_args or {})}, "disable": disable}
        options["callback"] = callback and functools.partial(surface.call_back, callback)
        x = function(surface, sampling.unpacked(x), at, **options)
        whole = isinstance(sampling, Flow) and sigmas[-1] == 0
        return sampling.packed(x / (1 - at[-1]) if whole else x)  # as in ComfyUI: by 0.999 after uni_pc

    sampler.__name__ = getattr(getattr(function, "func", function), "__name__", "sampler")
    given, taken = (list(inspect.signature(f).parameters.values()) for f in (sampler, function))
    hidden = {"extra_args", "callback", "disable", "noise_sampler" if seed is not None else ""}
    own = [p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY) for p in taken[3:] if p.name not in hidden]
    sampler.__signature__ = inspect.Signature([*given[:-1], *own])  # type: ignore[attr-defined]
    return sampler


class _Model:
    """The `model` of a function written for ComfyUI."""

    def __init__(self, model: Callable, sampling: Any):
        base = SimpleNamespace(model_sampling=sampling)
        patcher = SimpleNamespace(model=base, model_options={}, get_model_object=lambda name: getattr(base, name))
        self.inner_model = SimpleNamespace(inner_model=base, model_patcher=patcher, model_options={})
        self.model, self.pack, self.unpack = model, sampling.packed, sampling.unpacked

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options: Any = None, **kwargs: Any) -> torch.Tensor:
        packed, functions = self.pack(x), (model_options or {}).get("sampler_post_cfg_function", [])
        both = self.model(packed, sigma, with_uncond=True) if functions else [self.model(packed, sigma)]
        if packed is not x:
            x.copy_(self.unpack(packed))  # which a callback of the pipeline's may have changed
        denoised, *unconditional = [self.unpack(half) for half in both]
        for function in functions:
            rest = {"input": x, "sigma": sigma, "model": self.inner_model.inner_model, "model_options": model_options}
            denoised = function({"denoised": denoised, "uncond_denoised": unconditional[0], **rest})
        self.last = packed, sigma[0], denoised
        return denoised

    def call_back(self, callback: Callable, info: dict[str, Any]) -> None:
        """Packed, with the step's x where the function tells its first one (ipndm, deis), and with sigma (uni_pc)."""
        packed, sigma, denoised = self.last
        x = packed if info["denoised"] is denoised else self.pack(info["x"])
        callback({"sigma": sigma, "sigma_hat": sigma, **info, "x": x, "denoised": self.pack(info["denoised"])})


def _ending_as_there(name: str) -> Callable:
    """k-diffusion's lms with `denoised` for its last step, which there goes on to zero, or its dpm_fast or dpm_adaptive
    to the lowest positive level: as ComfyUI's end."""
    function = getattr(k_diffusion(), f"sample_{name}")

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        options = {"extra_args": extra_args, "callback": callback, "disable": disable}
        if name != "lms":
            steps = [len(sigmas) - 1] if name == "dpm_fast" else []
            return function(model, x, sigmas[-2].item(), sigmas[0].item(), *steps, **options)
        x = function(model, x, sigmas[:-1], **options)
        sigma = sigmas[-2]
        denoised = model(x, sigma * x.new_ones([len(x)]))
        if callback is not None:
            callback({"x": x, "i": len(sigmas) - 2, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return denoised

    return sampler


@functools.cache
def k_diffusion() -> ModuleType:
    """k-diffusion's `sampling`, in a package of another name: its own has training code that can't be installed."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    package = sys.modules["comfy_k_diffusion"] = ModuleType("comfy_k_diffusion")
    package.__path__ = spec.submodule_search_locations
    return importlib.import_module("comfy_k_diffusion.sampling")


def _comfyui() -> ModuleType | ImportError:
    """`comfy.samplers`, or why not. Without a GPU it is imported with its option --cpu, as has to be."""
    try:
        importlib.import_module("comfy.cli_args").args.cpu |= not torch.accelerator.is_available()
        return importlib.import_module("comfy.samplers")
    except ImportError as error:
        return error


def _brownian_noise(shape: tuple[int, ...], device: Any, on: Any, sigmas: torch.Tensor, seed: int) -> Callable:
    """k-diffusion's, of one tree from the lowest to the highest level, which draws on the device `on`."""
    positive = sigmas[sigmas > 0]
    ends = positive[-1].to(on), positive[0].to(on)
    tree = k_diffusion().BrownianTreeNoiseSampler(torch.zeros(shape, device=on), *ends, seed)
    rounded = [round(end.item(), 6) for end in ends]  # as torchsde does, which warns of times beyond

    def noise_sampler(*of_step: torch.Tensor) -> torch.Tensor:
        # dpmpp_sde asks for exp(log(sigma)), ComfyUI's for sigma: the tree tells their last digits apart
        times = (next((s for s in positive if abs(s - sigma) < 1e-6 * s), sigma) for sigma in of_step)
        return tree(*(torch.as_tensor(time).double().cpu().clamp(*rounded) for time in times)).to(device)

    return noise_sampler


class Discrete:
    """A network trained with betas, as ComfyUI's `model_sampling` knows it: float32 levels, from float64 betas."""

    def __init__(self, scheduler: Any):
        config, betas = scheduler.config, scheduler.betas.double().cpu()
        if config.get("beta_schedule") == "scaled_linear" and config.get("trained_betas") is None:
            ends = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
            betas = torch.linspace(*ends, config["num_train_timesteps"], dtype=torch.float64) ** 2
        alphas_cumprod = (1 - betas).cumprod(0)
        if config.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1, which changes nothing the second time
            alphas = alphas_cumprod.sqrt()
            alphas_cumprod = ((alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))) ** 2
            alphas_cumprod[-1] = 4.8973451890853435e-08  # ComfyUI's, in place of the zero: sigma is 4518.76
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
        self.sigmas, self.log_sigmas = sigmas.float(), sigmas.log().float()
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma.log().view(1, -1) - self.log_sigmas.to(sigma.device)[:, None]).abs().argmin(0).view(sigma.shape)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        t = timestep.float().clamp(0, len(self.sigmas) - 1)
        table, weight = self.log_sigmas.to(t.device), t.frac()
        return ((1 - weight) * table[t.floor().long()] + weight * table[t.ceil().long()]).exp()

    def percent_to_sigma(self, percent: float) -> float:
        reached = self.sigma(torch.tensor((1 - percent) * 999.0)).item()
        return 999999999.9 if percent <= 0 else 0.0 if percent >= 1 else reached

    def noise_scaling(self, sigma: Any, noise: torch.Tensor, latent_image: Any, max_denoise: bool = False) -> Any:
        """x0 + sigma noise; at the highest level sqrt(1 + sigma^2) noise, so that the network is shown noise alone."""
        return noise * ((1.0 + sigma**2.0) ** 0.5 if max_denoise else sigma) + latent_image

    packed = unpacked = staticmethod(lambda latents: latents)


class Flow:
    """FLUX as ComfyUI's `model_sampling` knows it: 10,000 levels in t, float32. `shift` is exp(mu) of diffusers."""

    def __init__(self, shift: float, rows: int, columns: int):
        self.shift, self.sides = shift, (rows, columns)
        self.sigmas = self.sigma(torch.arange(1, 10001) / 10000)
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    timestep = staticmethod(lambda sigma: sigma)

    def sigma(self, timestep: Any) -> Any:
        return self.shift / (self.shift + (1 / timestep - 1))

    def percent_to_sigma(self, percent: float) -> float:
        return self.sigma(1.0 - percent) if 0 < percent < 1 else float(percent <= 0)

    def noise_scaling(self, sigma: Any, noise: torch.Tensor, latent_image: Any, max_denoise: bool = False) -> Any:
        return sigma * noise + (1.0 - sigma) * latent_image

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) to a token for each patch of 2x2, (b, h w / 4, 4 c)."""
        if latents.ndim == 3:  # a pipeline's trial run, on one number
            return latents
        b, c, h, w = latents.shape
        return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)

    def unpacked(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.shape[-1] == 1:
            return tokens
        b, (h, w) = len(tokens), self.sides
        if 4 * tokens.shape[1] != h * w:
            raise ValueError(f"`latents` are not {h}x{w}: give comfy_sampler the picture's `width` and `height`")
        return tokens.reshape(b, h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, h, w)


def model_sampling(pipe: Any, width: int = 0, height: int = 0) -> Any:
    """What the pipeline's network was trained with: a `Discrete` or, with diffusers' shift at this size, a `Flow`.

    Where ComfyUI is loaded, a Flow is an instance of its CONST too: by that its samplers know FLUX.
    """
    config, (_, rows, columns) = pipe.scheduler.config, _sizes(pipe, width, height)[2]
    with torch.device("cpu"):  # whatever the default device
        if not hasattr(pipe, "transformer"):
            return Discrete(pipe.scheduler)
        kept = hasattr(type(pipe.scheduler), "shift")  # `set_shift` leaves the config alone
        shift = pipe.scheduler.shift if kept else config.get("flow_shift", config.get("shift", 1.0))
        if config.get("use_dynamic_shifting"):
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            mu = low + (rows * columns // 4 - few) * (high - low) / (many - few)
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        theirs = sys.modules.get("comfy.model_sampling")
        return (type("Flow", (Flow, theirs.CONST), {}) if theirs else Flow)(shift, rows, columns)


def _evenly(n: int, model: Any) -> torch.Tensor:
    """n levels even in time, from the highest to the lowest. FLUX's t are shifted once more, as in ComfyUI."""
    return model.sigma(torch.linspace(model.timestep(model.sigma_max), model.timestep(model.sigma_min), n))


def _beta(n: int, model: Any) -> torch.Tensor:
    """Quantiles of Beta(0.6, 0.6), Lee et al. 2024. With many steps some round to the same level."""
    places = betaincinv(0.6, 0.6, 1 - torch.arange(n, dtype=torch.float64).numpy() / n) * (len(model.sigmas) - 1)
    return model.sigmas[torch.as_tensor(places).round().long()]


def _linear_quadratic(n: int, model: Any, threshold: float = 0.025) -> torch.Tensor:
    """A line from 1 to 1 - threshold in the first half of the steps, then the parabola that goes on smoothly to 0."""
    half, i = n // 2, torch.arange(n, dtype=torch.float64)
    slope = threshold / max(half, 1)
    share = 1 - slope * i - (1 - slope * n) * ((i - half).clamp(min=0) / (n - half)) ** 2
    return share.float() * model.sigma_max


def _kl_optimal(n: int, model: Any) -> torch.Tensor:
    """Even in atan(sigma), Sabour et al. 2024. One step, for which ComfyUI has NaN, begins at the highest level."""
    share = torch.arange(n) / max(n - 1, 1)
    return (share * math.atan(model.sigma_min) + (1 - share) * math.atan(model.sigma_max)).tan()


SCHEDULERS: dict[str, Callable[[int, Any], torch.Tensor]] = {  # n levels, falling, without the zero at their end
    # n of the table, at an even stride from the top
    "simple": lambda n, model: model.sigmas.flip(0)[[int(i * (len(model.sigmas) / n)) for i in range(n)]],
    "sgm_uniform": lambda n, model: _evenly(n + 1, model)[:-1],
    "karras": lambda n, m: k_diffusion().get_sigmas_karras(n, m.sigma_min.item(), m.sigma_max.item())[:-1],
    "exponential": lambda n, m: k_diffusion().get_sigmas_exponential(n, m.sigma_min.item(), m.sigma_max.item())[:-1],
    # at an even stride from the second lowest up; more than n where n does not divide the table
    "ddim_uniform": lambda n, model: model.sigmas[1 :: max(len(model.sigmas) // n, 1)].flip(0),
    "beta": _beta,
    "normal": _evenly,
    "linear_quadratic": _linear_quadratic,
    "kl_optimal": _kl_optimal,
}


def _sizes(pipe: Any, width: int, height: int) -> tuple[int, int, tuple[int, int, int]]:
    """Width and height, by default the pipeline's, and the latents' (channels, rows, columns), even on FLUX."""
    scale, network = pipe.vae_scale_factor, getattr(pipe, "transformer", None) or pipe.unet
    patch, config = 2 if hasattr(pipe, "transformer") else 1, getattr(pipe.vae, "config", None)
    default = getattr(config, "sample_size", 1024) if patch == 2 else pipe.default_sample_size * scale
    width, height = width or default, height or default
    sides = (patch * (side // (patch * scale)) for side in (height, width))
    return width, height, (network.config.in_channels // patch**2, *sides)


def _check(argument: str, name: Any, known: Sequence[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise ValueError(f"`{argument}`: there is no {name!r}; {hint}")
