"""ComfyUI's KSampler for diffusers: converts the node's fields to the arguments of a pipeline's call.

    pipe = StableDiffusionXLComfyPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", ...)
    settings = {"seed": 42, "steps": 20, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    image = pipe("an astronaut", negative_prompt="", **ksampler(pipe, **settings)).images[0]

Apart from a pipeline's file, this file needs ComfyUI only for the samplers and schedules that ComfyUI alone has.
"""

import difflib
import functools
import importlib.util
import inspect
import math
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from scipy.special import betaincinv

# k-diffusion's samplers that give ComfyUI's latents on both models ("ddim" is ComfyUI's second name for "euler")
K_DIFFUSIONS = ("euler", "ddim", "heun", "dpm_2", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2m")
# those that do so on SDXL only, and on FLUX ||k-diffusion's latents - ComfyUI's|| / ||ComfyUI's||
FLUX_DISTANCES = {"euler_ancestral": 1.2, "dpm_2_ancestral": 0.04, "dpmpp_2s_ancestral": 1.2}
FLUX_DISTANCES |= {f"dpmpp_{sde}{gpu}": 0.004 for sde in ("sde", "2m_sde", "3m_sde") for gpu in ("", "_gpu")}
COMFYUI_ONLY = """euler_cfg_pp euler_ancestral_cfg_pp heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde dpmpp_2s_ancestral_cfg_pp
    dpmpp_2m_cfg_pp dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu ddpm lcm ipndm ipndm_v deis res_multistep
    res_multistep_cfg_pp res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation
    gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver sa_solver_pece uni_pc uni_pc_bh2""".split()
SAMPLERS = (*K_DIFFUSIONS, *FLUX_DISTANCES, *COMFYUI_ONLY)
SKIPPING = ("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2")  # these make one more level and skip the last but one


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

    `cfg` is SDXL's guidance and FLUX's true CFG. `denoise` is the share of the levels that run over `latent_image`,
    (b, channels, height / 8, width / 8), unpacked on FLUX, in the network's scale; zeros by default. `noise` is "today"
    or "before 0.7", when white step noise on a CPU came from the seed, not from seed + 1.
    ValueError: an argument is unknown or out of range. ImportError: ComfyUI is needed and can't be imported.
    """
    _check("sampler_name", sampler_name, SAMPLERS)
    if noise not in ("today", "before 0.7"):
        raise ValueError(f"`noise`: there is no {noise!r}; there are 'today' and 'before 0.7'")
    if not re.search(r"\b(StableDiffusion(?!3)|Flux(?!2))\w*Pipeline'", str(type(pipe).__mro__)):
        raise ValueError(f"`pipe`: {type(pipe).__name__} is not of SDXL or FLUX, whose latents are known; see `levels`")
    if cfg < 1:
        raise ValueError(f"`cfg` has to be at least 1, since diffusers does not guide below, but is {cfg}")
    if latent_image is not None:
        height, width = (pipe.vae_scale_factor * side for side in latent_image.shape[-2:])
    width, height, *sides = _sizes(pipe, width, height)
    flow, sampling, device = hasattr(pipe, "transformer"), model_sampling(pipe, width, height), pipe._execution_device
    if latent_image is None:
        channels = pipe.transformer.config.in_channels // 4 if flow else pipe.unet.config.in_channels
        latent_image = torch.zeros(batch_size, channels, *sides, device="cpu")
    sigmas = levels(pipe, scheduler, steps, denoise, width, height, sampler_name)
    generator = torch.Generator("cpu").manual_seed(seed)
    unit = torch.randn(latent_image.shape, generator=generator, dtype=torch.float32, device="cpu")
    highest = bool(sigmas[0] >= sampling.sigma_max * (1 - 1e-5))
    latents = sampling.noise_scaling(sigmas[0], unit, latent_image.float().cpu(), highest)
    call = {"schedule": sigmas, "num_inference_steps": len(sigmas) - 1, "num_images_per_prompt": len(latents)}
    call |= {"latents": sampling.packed(latents), "generator": generator, "width": width, "height": height}
    call |= {"parameterization": "flow"} if flow else {"quantize_timesteps": True}
    # the cfg_pp samplers use the negative prompt even at cfg 1
    call["true_cfg_scale" if flow else "guidance_scale"] = max(cfg, 1 + 2**-23) if "cfg_pp" in sampler_name else cfg
    if sampler_name in K_DIFFUSIONS:
        positive = sigmas[sigmas > 0].tolist()
        if sampler_name in ("dpm_fast", "dpm_adaptive") and len(positive) > 1:  # they use only the ends and the number
            ends = positive[0], positive[-1]
            call["schedule"] = torch.linspace(*ends, len(sigmas), dtype=torch.float32, device="cpu")
        return call | {"sampler": {"ddim": "euler", "lms": _lms}.get(sampler_name, sampler_name)}
    brownian, on_cpu = sampler_name.startswith("dpmpp") and "_sde" in sampler_name, device.type == "cpu"
    if flow or sampler_name not in FLUX_DISTANCES:
        if not isinstance(comfy := _comfyui(), ImportError):
            theirs = comfy.samplers.sampler_object(sampler_name)
            function = functools.partial(theirs.sampler_function, **theirs.extra_options)
            before = on_cpu and noise != "today" and sampler_name in SAMPLERS and not brownian
            return call | {"sampler": comfy_sampler(function, pipe, width, height, seed - before, cfg)}
        if sampler_name in COMFYUI_ONLY:
            raise ImportError(f"`sampler_name`: {sampler_name!r} is ComfyUI's own, and {comfy}")
        warnings.warn(f"{sampler_name} is k-diffusion's, {FLUX_DISTANCES[sampler_name]} off, as {comfy}", stacklevel=2)
    generator_of_steps = torch.Generator(device).manual_seed((seed + (on_cpu and noise == "today")) % 2**64)
    white = functools.partial(torch.randn, latents.shape, generator=generator_of_steps, device=device)
    tree = brownian and _brownian_noise(latents.shape, device, sampler_name.endswith("_gpu"), sigmas, seed)

    def noise_sampler(*of_step: torch.Tensor) -> torch.Tensor:
        of_step = [sigma / (1 + sigma) for sigma in of_step] if flow else of_step
        return sampling.packed(tree(*of_step) if tree else white(dtype=torch.float32))

    call |= {"sampler": sampler_name.removesuffix("_gpu"), "sampler_kwargs": {"noise_sampler": noise_sampler}}
    return call | ({"parameterization": "ve"} if flow else {})


def levels(
    pipe: Any, scheduler: Any, steps: int, denoise: float = 1.0, width: int = 0, height: int = 0, sampler_name: str = ""
) -> torch.Tensor:
    """ComfyUI's levels by name, for `schedule=` of a call: sigmas, or a flow's t; float32, on the CPU, falling to zero.

    As in ComfyUI, some names make fewer or more than `steps` + 1. `pipe` is any that `model_sampling` knows.
    """
    if not isinstance(scheduler, str):  # the levels themselves, as ComfyUI's nodes make them from numbers
        return torch.tensor(scheduler, dtype=torch.float32, device="cpu")
    _check("scheduler", scheduler, SCHEDULERS)
    if steps < 1 or not 0 < denoise <= 1:
        raise ValueError(f"`steps` has to be at least 1, `denoise` above 0 and at most 1: {steps}, {denoise}")
    part, sampling = denoise <= 0.9999, model_sampling(pipe, width, height)
    theirs = getattr(sys.modules.get("comfy.samplers"), "KSampler", None)  # custom nodes add names to it
    skipping = sampler_name in (*SKIPPING, *getattr(theirs, "DISCARD_PENULTIMATE_SIGMA_SAMPLERS", ()))
    count = skipping + (int(steps / denoise) if part else steps)
    with torch.device("cpu"):
        if scheduler in SCHEDULERS:
            falling = SCHEDULERS[scheduler](count, sampling).float().unique_consecutive()
            falling = torch.nn.functional.pad(falling, (0, 1))
        else:
            comfy = _comfyui()
            if isinstance(sampling, (Discrete, Flow)):
                sampling = _base_model(comfy.model_base.BaseModel, sampling, "cpu").model_sampling
            falling = comfy.samplers.calculate_sigmas(sampling, scheduler, count).float().cpu()
        falling = torch.cat([falling[:-2], falling[-1:]]) if skipping else falling
    return falling[-steps - 1 :] if part else falling


def names() -> tuple[list[str], list[str]]:
    """All samplers and schedulers: `SAMPLERS` and `SCHEDULERS`, ComfyUI's, and those of the custom nodes loaded."""
    samplers, schedulers = [*SAMPLERS], [*SCHEDULERS]
    if not isinstance(comfy := _comfyui(), ImportError):
        samplers += comfy.samplers.KSampler.SAMPLERS
        schedulers += [*comfy.samplers.KSampler.SCHEDULERS, *getattr(comfy.samplers, "SCHEDULER_HANDLERS", ())]
    return list(dict.fromkeys(samplers)), list(dict.fromkeys(schedulers))


def load_custom_nodes(*nodes: str | Path) -> None:
    """Loads custom nodes, by name in ComfyUI's folder `custom_nodes` or by path, so that their names are known here.

    No server runs and no port is opened. The nodes are copied to a temporary folder, into which they write.
    ImportError: ComfyUI or a node can't be imported, with the original message. ValueError: there is no such node.
    """
    if isinstance(comfy := _comfyui(), ImportError):
        raise ImportError(f"custom nodes need ComfyUI, but {comfy}")
    folder, scratch = _folders()
    for node in map(str, nodes):
        source = (folder / node if (folder / node).exists() else Path(node)).resolve()
        if not source.exists():
            there = ", ".join(sorted(path.name for path in folder.iterdir()))
            raise ValueError(f"custom node {node!r} is no path, and not in {folder}, which has {there}")
        name = source.name.removesuffix(".py").replace(".", "_x_")  # as ComfyUI names it
        if f"custom_nodes.{name}" in sys.modules:
            continue
        copy = Path(scratch.name, "custom_nodes", name)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"), dirs_exist_ok=True)
        else:
            copy.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy / "__init__.py")
        importlib.invalidate_caches()
        try:
            importlib.import_module(f"custom_nodes.{name}")
        except Exception as error:
            lacks = f"; it needs the package {error.name!r}" if isinstance(error, ModuleNotFoundError) else ""
            raise ImportError(f"custom node {node!r}: {type(error).__name__}: {error}{lacks}") from error


@functools.cache
def _folders() -> tuple[Path, Any]:
    """ComfyUI's folder of custom nodes, and a temporary folder for their copies and all that ComfyUI and they write."""
    args, scratch = _comfyui().cli_args.args, tempfile.TemporaryDirectory(prefix="comfy_ksampler-")
    folder = Path(args.base_directory or Path(_comfyui().samplers.__file__).parents[1], "custom_nodes")
    args.base_directory = args.front_end_root = scratch.name
    sys.modules["custom_nodes"] = package = ModuleType("custom_nodes")
    package.__path__ = [str(Path(scratch.name, "custom_nodes"))]
    if importlib.util.find_spec("server"):  # nodes register with the server, which does not run
        server = importlib.import_module("server").PromptServer
        server.instance = getattr(server, "instance", None) or server(None)
    return folder, scratch


def comfy_sampler(
    function: Callable, pipe: Any, width: int = 0, height: int = 0, seed: int | None = None, cfg: float | None = None
) -> Callable:
    """A sampler for `pipe(sampler=...)` from a function written for ComfyUI, its own or a custom node's, unmodified.

    On FLUX the function sees t, and latents unpacked to this width and height: call with parameterization="flow".
    With a seed the function makes its own noise; else its `noise_sampler` is the pipeline's. `cfg`, the call's
    guidance, is for functions that ask for the prediction without guidance.
    """
    comfy, sampling = _comfyui(), model_sampling(pipe, width, height)
    flow, loaded = isinstance(sampling, Flow), sys.modules.get("comfy.model_sampling")
    if flow and loaded:  # ComfyUI's functions know a flow by this class
        sampling.__class__ = type("Flow", (Flow, loaded.CONST), {})

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        ours = _Model(model, sampling, cfg or (None if flow else getattr(pipe, "_guidance_scale", None)))
        x, at = sampling.unpacked(x), sigmas.to(x.device, copy=True)  # uni_pc writes into the levels
        surface, given = (ours, {}) if isinstance(comfy, ImportError) else _comfy_model(comfy, ours, x, at)
        if draw := options.get("noise_sampler"):
            options["noise_sampler"] = lambda *sigmas: sampling.unpacked(draw(*sigmas))
        options["callback"] = callback and functools.partial(ours.call_back, callback)
        given = {"model_options": {}, "seed": seed, **given, **(extra_args or {})}
        with torch.random.fork_rng(range(torch.cuda.device_count()), seed is not None):
            if seed is not None:  # torch's generator is seeded and has drawn the initial noise, as in ComfyUI
                torch.randn(x.numel(), generator=torch.manual_seed(seed), dtype=torch.float32, device="cpu")
            end = function(surface, x, at, extra_args=given, disable=disable, **options)
        if not isinstance(end, torch.Tensor):
            return end  # the pipeline raises the error
        whole = flow and sigmas[-1] == 0  # uni_pc has set the last level to 0.001: ComfyUI divides by 0.999 then
        return sampling.packed(end.to(x.dtype) / (1 - at[-1]) if whole else end.to(x.dtype))

    sampler.__name__ = getattr(getattr(function, "func", function), "__name__", "sampler")
    taken = [p for p in inspect.signature(function).parameters.values() if seed is None or p.name != "noise_sampler"]
    sampler.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    return sampler


class _Model:
    """The pipeline's denoiser of unpacked latents: the `model` of a function for ComfyUI where ComfyUI is absent."""

    def __init__(self, model: Callable, sampling: Any, cfg: Any):
        base = SimpleNamespace(model_sampling=sampling)
        patcher = SimpleNamespace(model=base, model_options={}, get_model_object=functools.partial(getattr, base))
        self.inner_model = SimpleNamespace(inner_model=base, model_patcher=patcher, model_options={}, cfg=cfg)
        self.model, self.sampling, self.cfg = model, sampling, cfg
        self.last: Any = None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options: Any = None, **kwargs: Any) -> torch.Tensor:
        functions = (model_options or {}).get("sampler_post_cfg_function", [])
        denoised, *sides = self.predict(x, sigma, both=bool(functions))
        rest = dict(zip(("cond_denoised", "uncond_denoised"), sides), input=x, sigma=sigma, model_options=model_options)
        for function in functions:
            denoised = function({"denoised": denoised, "model": self.inner_model.inner_model, **rest})
        self.last = sigma[0], denoised
        return denoised

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, both: bool) -> list[torch.Tensor]:
        """x0 with guidance; for `both` also x0 for the prompt and x0 for the negative prompt."""
        if both and not self.cfg:
            raise ValueError("`cfg`: the sampler asks for the prediction without guidance: pass cfg to comfy_sampler")
        self.packed = packed = self.sampling.packed(x)
        found = self.model(packed, sigma, with_uncond=True) if both else [self.model(packed, sigma)]
        if packed is not x:
            x.copy_(self.sampling.unpacked(packed))  # a callback may have changed the latents
        guided, *negative = map(self.sampling.unpacked, found)
        return [guided, *(one + (guided - one) / self.cfg for one in negative), *negative]

    def call_back(self, callback: Callable, info: dict[str, Any]) -> None:
        """Adds what functions leave out: the step's x (ipndm and deis report their first x), and sigma (uni_pc).

        Once per evaluation: RES4LYF's functions report the last one twice.
        """
        if self.last is None:
            return
        (sigma, denoised), pack, self.last = self.last, self.sampling.packed, None
        x = self.packed if info["denoised"] is denoised else pack(info["x"])
        sigma = info.get("sigma", sigma)
        callback({"sigma": sigma, "sigma_hat": sigma, **info, "x": x, "denoised": pack(info["denoised"])})


def _comfy_model(comfy: Any, ours: _Model, x: torch.Tensor, sigmas: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """`model` made of ComfyUI's classes, and its part of `extra_args`. The pipeline guides, and no model is moved."""

    class Model(comfy.model_base.BaseModel):
        def _apply_model(self, x, t, concat, context, control, transformer_options, **kwargs):
            wanted = transformer_options.get("cond_or_uncond", [0])  # 0: the prompt, 1: the negative prompt
            x, sigma = x.chunk(len(wanted))[0], t.chunk(len(wanted))[0]
            guided, *sides = ours.predict(x, sigma, both=wanted != [0] or ours.cfg != 1)
            return torch.cat([(sides or [guided])[side] for side in wanted])

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            asked = dict(model_options or {})
            if not asked.pop("transformer_options", {}).get("wrappers") and not any(asked.values()):
                return ours(x, timestep)
            ours.last = timestep[0], super().predict_noise(x, timestep, model_options, seed)
            return ours.last[-1]

    base = _base_model(Model, ours.sampling, x.device)
    base.diffusion_model, base.memory_usage_factor = torch.nn.Identity(), 0  # so that both sides fit into one call
    base.diffusion_model.dtype = torch.float32
    patcher = comfy.model_patcher.ModelPatcher(base, x.device, x.device)
    patcher.pre_run()
    guider, prompt = Guider(patcher), [[torch.zeros(1, 1, 1, device=x.device), {}]]
    guider.set_conds(prompt, prompt)
    guider.inner_model, guider.conds, guider.cfg = base, {**guider.original_conds}, ours.cfg or 1.0
    model = comfy.samplers.KSamplerX0Inpaint(guider, sigmas)
    model.latent_image, model.noise = torch.zeros_like(x), x / sigmas[0]
    options = {**patcher.model_options, "transformer_options": {"sample_sigmas": sigmas}}
    return model, {"model_options": options, "denoise_mask": None}


def _base_model(kind: Callable, sampling: Any, device: Any) -> Any:
    """ComfyUI's `BaseModel`, or this kind of it, with these levels and without a network."""
    comfy, flow = _comfyui(), isinstance(sampling, Flow)
    with torch.device("cpu"):
        config = comfy.supported_models.Flux if flow else comfy.supported_models.SDXL
        config = config({**config.unet_config, "disable_unet_model_creation": True})
        name = "FLUX" if flow else "V_PREDICTION" if sampling.prediction_type == "v_prediction" else "EPS"
        base = kind(config, comfy.model_base.ModelType[name], device)
        if flow:
            base.model_sampling.set_parameters(math.log(sampling.shift), len(sampling.sigmas))
        else:
            base.model_sampling.set_sigmas(sampling.exact)
    return base.to(device)


def _comfyui() -> Any:
    """ComfyUI's package `comfy`, or an ImportError that says what to do. Without a GPU it runs as with --cpu."""
    try:
        sys.dont_write_bytecode |= importlib.util.find_spec("comfy") is not None  # ComfyUI's folder stays as it is
        importlib.import_module("comfy.cli_args").args.cpu |= not torch.accelerator.is_available()
        importlib.import_module("comfy.samplers")
        return importlib.import_module("comfy.supported_models") and sys.modules["comfy"]
    except ImportError as error:
        return ImportError(f"{error}: put ComfyUI's folder on the path, PYTHONPATH=..., and install its requirements")


def _lms(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """k-diffusion's lms, but with x0 for the step to zero, as in ComfyUI."""
    last = int((sigmas > 0).sum()) - 1
    x = k_diffusion().sample_lms(model, x, sigmas[: last + 1], extra_args, callback, disable)
    return k_diffusion().sample_euler(model, x, sigmas[last:], extra_args, callback, disable)


@functools.cache
def k_diffusion() -> ModuleType:
    """k-diffusion's `sampling`, in a package of another name: k-diffusion's `__init__` imports its training code."""
    if (spec := importlib.util.find_spec("k_diffusion")) is None:
        raise ImportError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    package = sys.modules["comfy_k_diffusion"] = ModuleType("comfy_k_diffusion")
    package.__path__ = spec.submodule_search_locations or []
    return importlib.import_module("comfy_k_diffusion.sampling")


def _brownian_noise(shape: tuple[int, ...], device: Any, there: bool, sigmas: torch.Tensor, seed: int) -> Callable:
    """k-diffusion's, of one tree from the lowest to the highest level, which draws on the device if `there`."""
    positive, on = sigmas[sigmas > 0], device if there else "cpu"
    ends = positive[-1].to(on), positive[0].to(on)
    with torch.device(on):
        tree = k_diffusion().BrownianTreeNoiseSampler(torch.zeros(shape, dtype=torch.float32), *ends, seed)
    low, high = (round(end.item(), 6) for end in ends)  # as torchsde does, which warns of times beyond

    def noise_sampler(*of_step: torch.Tensor) -> torch.Tensor:
        # dpmpp_sde asks for exp(log(sigma)), ComfyUI's for sigma: the tree gives other noise for other last digits
        times = (next((s for s in positive if abs(s - sigma) < 1e-6 * s), sigma) for sigma in of_step)
        with torch.device(on):
            return tree(*(torch.as_tensor(time).cpu().double().clamp(low, high) for time in times)).to(device)

    return noise_sampler


class Discrete:
    """ComfyUI's `model_sampling` for a network trained with betas: float32 levels, from float64 betas."""

    def __init__(self, scheduler: Any):
        config, betas = scheduler.config, scheduler.betas.cpu().double()
        if config.get("beta_schedule") == "scaled_linear" and config.get("trained_betas") is None:
            ends = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
            betas = torch.linspace(*ends, config["num_train_timesteps"], dtype=torch.float64) ** 2
        alphas_cumprod = (1 - betas).cumprod(0)
        if config.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1; no change where the betas have it
            alphas = alphas_cumprod.sqrt()
            alphas_cumprod = ((alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))) ** 2
            alphas_cumprod[-1] = 4.8973451890853435e-08  # ComfyUI's number in place of the zero: sigma is 4518.76
        self.exact, self.prediction_type = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5, config.get("prediction_type")
        self.sigmas, self.log_sigmas = self.exact.float(), self.exact.log().float()
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
        """x0 + sigma noise; at the highest level sqrt(1 + sigma^2) noise, so that the network sees only noise."""
        return noise * ((1.0 + sigma**2.0) ** 0.5 if max_denoise else sigma) + latent_image

    packed = unpacked = staticmethod(lambda latents: latents)


class Flow:
    """ComfyUI's `model_sampling` for a flow: float32 levels in t. `shift` is exp(mu) of diffusers."""

    def __init__(self, shift: float, rows: int, columns: int, count: int):
        self.shift, self.rows, self.columns = shift, rows, columns
        self.sigmas = self.sigma(torch.arange(1, count + 1, dtype=torch.float32) / count)
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    timestep = staticmethod(lambda sigma: sigma)

    def sigma(self, timestep: Any) -> Any:
        return self.shift / (self.shift + (1 / timestep - 1))

    def percent_to_sigma(self, percent: float) -> float:
        return self.sigma(1.0 - percent) if 0 < percent < 1 else float(percent <= 0)

    def noise_scaling(self, sigma: Any, noise: torch.Tensor, latent_image: Any, max_denoise: bool = False) -> Any:
        return sigma * noise + (1.0 - sigma) * latent_image

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) to a token for each patch of 2x2, (b, h w / 4, 4 c). A scheduler's trial has one number."""
        one = latents.numel() == 1
        return latents if one else torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT.contiguous()

    def unpacked(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.numel() == 1:
            return tokens.view(1, 1, 1, 1)
        if 4 * tokens.shape[1] != self.rows * self.columns:
            raise ValueError("`latents` are of another size: give comfy_sampler the picture's `width` and `height`")
        return torch.nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (self.rows // 2, self.columns // 2)), 2)


def model_sampling(pipe: Any, width: int = 0, height: int = 0) -> Any:
    """ComfyUI's `model_sampling` for a pipeline's scheduler: `Discrete` for betas, `Flow`, or EDM's levels and times.

    ValueError: another kind of scheduler, or a shift that depends on more than the size of a picture.
    """
    base = getattr(pipe.scheduler, "base", pipe.scheduler)
    config, kind = base.config, type(base).__name__
    with torch.device("cpu"):
        if config.get("use_flow_sigmas") or "FlowMatch" in kind or config.get("prediction_type") == "flow_prediction":
            rows, columns = _sizes(pipe, width, height)[2:] if hasattr(pipe, "vae_scale_factor") else (0, 0)
            # `set_shift` leaves the config alone
            shift = base.shift if hasattr(type(base), "shift") else config.get("flow_shift", config.get("shift", 1.0))
            if config.get("use_dynamic_shifting"):
                if not rows:
                    what = f"{type(pipe).__name__} shifts by more than a width and a height"
                    raise ValueError(f"`pipe`: {what}: set its scheduler's use_dynamic_shifting=False, shift=exp(mu)")
                few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
                low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
                mu = low + (rows * columns // 4 - few) * (high - low) / (many - few)
                shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
            of_flux = re.search(r"\b(Flux|Chroma|LTX|Qwen|LongCat)\w*'", str(type(pipe).__mro__))
            return Flow(shift, rows, columns, 10_000 if of_flux else 1000)
        if config.get("sigma_min") and ("sigma_data" in config or config.get("timestep_type") == "continuous"):
            table = torch.linspace(math.log(config["sigma_min"]), math.log(config["sigma_max"]), 1000).exp()
            time = {"timestep": lambda sigma: 0.25 * sigma.log(), "sigma": lambda timestep: (timestep / 0.25).exp()}
            return SimpleNamespace(sigmas=table, sigma_min=table[0], sigma_max=table[-1], **time)
        if hasattr(base, "betas"):
            return Discrete(base)
    raise ValueError(f"`pipe`: {kind} is no scheduler of a known kind, which are betas, flow matching and EDM")


def _linear_quadratic(n: int, m: Any) -> torch.Tensor:
    """A line from 1 to 0.975 in the first half of the steps, then the parabola that continues it smoothly to 0."""
    half, i = n // 2, torch.arange(n, dtype=torch.float64)
    slope = 0.025 / max(half, 1)
    share = 1 - slope * i - (1 - slope * n) * ((i - half).clamp(min=0) / (n - half)) ** 2
    return share.float() * m.sigma_max


def _kl_optimal(n: int, m: Any) -> torch.Tensor:
    # one step is NaN in ComfyUI; here it begins at the highest level
    share = torch.arange(n, dtype=torch.float32) / max(n - 1, 1)
    return (share * math.atan(m.sigma_min) + (1 - share) * math.atan(m.sigma_max)).tan()


SCHEDULERS: dict[str, Callable[[int, Any], torch.Tensor]] = {  # n levels, falling, without the zero at their end
    "simple": lambda n, m: m.sigmas.flip(0)[[int(i * (len(m.sigmas) / n)) for i in range(n)]],  # from the top
    "sgm_uniform": lambda n, m: SCHEDULERS["normal"](n + 1, m)[:-1],
    "karras": lambda n, m: k_diffusion().get_sigmas_karras(n, m.sigma_min.item(), m.sigma_max.item())[:-1],
    "exponential": lambda n, m: k_diffusion().get_sigmas_exponential(n, m.sigma_min.item(), m.sigma_max.item())[:-1],
    "ddim_uniform": lambda n, m: m.sigmas[1 :: max(len(m.sigmas) // n, 1)].flip(0),  # from the second lowest up
    # quantiles of Beta(0.6, 0.6), Lee et al. 2024; with many steps some round to the same level
    "beta": lambda n, m: m.sigmas[
        torch.tensor(betaincinv(0.6, 0.6, [1 - i / n for i in range(n)]) * (len(m.sigmas) - 1)).round().long()
    ],
    # evenly in the network's time; FLUX's are shifted once more
    "normal": lambda n, m: m.sigma(torch.linspace(m.timestep(m.sigma_max), m.timestep(m.sigma_min), n)),
    "linear_quadratic": _linear_quadratic,
    "kl_optimal": _kl_optimal,  # Sabour et al. 2024
}


def _sizes(pipe: Any, width: int, height: int) -> tuple[int, int, int, int]:
    """Width and height, by default the pipeline's, and the latents' rows and columns, even for patches of 2x2."""
    scale, unet, vae = pipe.vae_scale_factor, getattr(pipe, "unet", None), getattr(pipe, "vae", None)
    default = getattr(getattr(vae, "config", None), "sample_size", 1024)
    default, patch = (scale * unet.config.get("sample_size", 128), 1) if unet else (default, 2)
    width, height = width or default, height or default
    return width, height, *(patch * (side // (patch * scale)) for side in (height, width))


def _check(argument: str, name: Any, known: Any) -> None:
    """Raises a ValueError unless the name is known, here or to ComfyUI."""
    if name not in known and name not in (known := names()[argument == "scheduler"]):
        nodes, comfy = (one[13:] for one in sys.modules if re.fullmatch(r"custom_nodes\.[^.]+", one)), _comfyui()
        loaded = f"was found, and loaded are {', '.join(nodes) or 'no custom nodes (load_custom_nodes)'}"
        found = f"was not found: {comfy}" if isinstance(comfy, ImportError) else loaded
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"`{argument}`: there is no {name!r}; {hint}; ComfyUI {found}")
