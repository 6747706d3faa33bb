"""ComfyUI's KSampler for diffusers: converts the node's fields to the arguments of a pipeline's call.

    pipe = StableDiffusionXLComfyPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", ...)
    settings = {"seed": 42, "steps": 20, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    image = pipe("an astronaut", negative_prompt="", **ksampler(pipe, **settings)).images[0]

Apart from a pipeline's file, this file needs ComfyUI only for the samplers and schedules that ComfyUI alone has.
"""

import contextlib
import difflib
import functools
import importlib.util
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from scipy.special import betaincinv

# k-diffusion's samplers that give ComfyUI's latents, on both models ("ddim" is "euler" there) and on SDXL only
K_DIFFUSIONS = ("euler", "ddim", "heun", "dpm_2", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2m")
SDXL_ONLY = """euler_ancestral dpm_2_ancestral dpmpp_2s_ancestral dpmpp_sde dpmpp_sde_gpu dpmpp_2m_sde dpmpp_2m_sde_gpu
    dpmpp_3m_sde dpmpp_3m_sde_gpu""".split()
COMFYUI_ONLY = """euler_cfg_pp euler_ancestral_cfg_pp heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde dpmpp_2s_ancestral_cfg_pp
    dpmpp_2m_cfg_pp dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu ddpm lcm ipndm ipndm_v deis res_multistep
    res_multistep_cfg_pp res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation
    gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver sa_solver_pece uni_pc uni_pc_bh2""".split()
SAMPLERS = (*K_DIFFUSIONS, *SDXL_ONLY, *COMFYUI_ONLY)
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
) -> dict[str, Any]:
    """The arguments of `pipe(prompt, negative_prompt="", **ksampler(pipe, ...))` for the fields of a KSampler node.

    `cfg` is SDXL's guidance and FLUX's true CFG. `denoise` is the share of the levels that run over `latent_image`,
    (b, channels, height / 8, width / 8), unpacked on FLUX, in the network's scale; zeros by default.
    ValueError: an argument is unknown or out of range. ImportError: ComfyUI is needed and can't be imported.
    """
    _check("sampler_name", sampler_name, SAMPLERS)
    if not re.search(r"\b(StableDiffusion(?!3)|Flux(?!2))\w*Pipeline'", str(type(pipe).__mro__)):
        raise ValueError(f"`pipe`: {type(pipe).__name__} is not of SDXL or FLUX, whose latents are known; see `levels`")
    if cfg < 1:
        raise ValueError(f"`cfg` has to be at least 1, since diffusers does not guide below, but is {cfg}")
    if latent_image is not None:
        height, width = (pipe.vae_scale_factor * side for side in latent_image.shape[-2:])
    width, height, *sides = _sizes(pipe, width, height)
    flow, sampling, device = hasattr(pipe, "transformer"), model_sampling(pipe, width, height), pipe._execution_device
    channels = pipe.transformer.config.in_channels // 4 if flow else pipe.unet.config.in_channels
    image = torch.zeros(batch_size, channels, *sides, device="cpu") if latent_image is None else latent_image
    sigmas = levels(pipe, scheduler, steps, denoise, width, height, sampler_name)
    start, generator = sigmas[0], torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator, dtype=torch.float32, device="cpu")
    highest = not flow and start >= sampling.sigma_max * (1 - 1e-5)  # there SDXL's network sees only noise
    scale = (1 + start**2) ** 0.5 if highest else start
    latents = scale * noise + (1 - start if flow else 1) * image.float().cpu()
    call = {"schedule": sigmas, "num_inference_steps": len(sigmas) - 1, "num_images_per_prompt": len(latents)}
    call |= {"latents": sampling.packed(latents), "generator": generator, "width": width, "height": height}
    call |= {"parameterization": "flow"} if flow else {"quantize_timesteps": True}
    # the cfg_pp samplers use the negative prompt even at cfg 1
    call["true_cfg_scale" if flow else "guidance_scale"] = max(cfg, 1 + 2**-23) if "cfg_pp" in sampler_name else cfg
    if sampler_name in K_DIFFUSIONS:
        high, low = sigmas[sigmas > 0][[0, -1]].tolist()
        if sampler_name in ("dpm_fast", "dpm_adaptive") and high > low:  # they use only the ends and the number
            call["schedule"] = torch.linspace(high, low, len(sigmas), dtype=torch.float32, device="cpu")
        return call | {"sampler": {"ddim": "euler", "lms": _lms}.get(sampler_name, sampler_name)}
    if flow or sampler_name not in SDXL_ONLY:
        what = f"{sampler_name!r} is ComfyUI's own{' on FLUX' * (sampler_name in SDXL_ONLY)}"
        theirs = _comfyui(f"`sampler_name`: {what}, and ").samplers.sampler_object(sampler_name)
        function = comfy_sampler(theirs.sampler_function, pipe, width, height, seed, cfg)
        return call | {"sampler": functools.partial(function, **theirs.extra_options)}
    noise_sampler = _step_noise(sampler_name, latents.shape, device, sigmas, seed)
    return call | {"sampler": sampler_name.removesuffix("_gpu"), "sampler_kwargs": {"noise_sampler": noise_sampler}}


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
            falling = F.pad(SCHEDULERS[scheduler](count, sampling).float().unique_consecutive(), (0, 1))
        else:
            model = _base_model(sampling, "cpu")
            falling = _comfyui().samplers.calculate_sigmas(model.model_sampling, scheduler, count).float().cpu()
        falling = torch.cat([falling[:-2], falling[-1:]]) if skipping else falling
    return falling[-steps - 1 :] if part else falling


def names() -> tuple[list[str], list[str]]:
    """All samplers and schedulers: `SAMPLERS` and `SCHEDULERS`, ComfyUI's, and those of the custom nodes loaded."""
    samplers, schedulers = [*SAMPLERS], [*SCHEDULERS]
    with contextlib.suppress(ImportError):
        theirs = _comfyui().samplers
        samplers += theirs.KSampler.SAMPLERS
        schedulers += [*theirs.KSampler.SCHEDULERS, *getattr(theirs, "SCHEDULER_HANDLERS", ())]
    return list(dict.fromkeys(samplers)), list(dict.fromkeys(schedulers))


def load_custom_nodes(*nodes: str | Path) -> None:
    """Loads custom nodes, by name in ComfyUI's folder `custom_nodes` or by path, so that their names are known here.

    No server runs and no port is opened. The nodes are copied to a temporary folder, into which they write.
    ImportError: ComfyUI or a node can't be imported, with the original message. ValueError: there is no such node.
    """
    comfy: Any = _comfyui("custom nodes need ComfyUI, but ")
    folder = Path(comfy.samplers.__file__).parents[1] / "custom_nodes"
    if "custom_nodes" not in sys.modules:  # a package of copies, in a folder for all that ComfyUI and the nodes write
        package: Any = ModuleType("custom_nodes")
        package.scratch, args = tempfile.TemporaryDirectory(prefix="comfy_ksampler-"), comfy.cli_args.args
        args.base_directory = args.front_end_root = package.scratch.name
        package.__path__ = [str(Path(package.scratch.name, "custom_nodes"))]
        if importlib.util.find_spec("server"):  # nodes register with the server, which does not run
            server = importlib.import_module("server").PromptServer
            server.instance = getattr(server, "instance", None) or server(None)
        sys.modules["custom_nodes"] = package
    for node in map(str, nodes):
        source = (folder / node if (folder / node).exists() else Path(node)).resolve()
        if not source.exists():
            there = ", ".join(sorted(path.name for path in folder.iterdir()))
            raise ValueError(f"custom node {node!r} is no path, and not in {folder}, which has {there}")
        name = source.name.removesuffix(".py").replace(".", "_x_")  # as ComfyUI names it
        if f"custom_nodes.{name}" in sys.modules:
            continue
        copy = Path(sys.modules["custom_nodes"].__path__[0], name)
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


def comfy_sampler(
    function: Callable, pipe: Any, width: int = 0, height: int = 0, seed: int | None = None, cfg: float | None = None
) -> Callable:
    """A sampler for `pipe(sampler=...)` from a function written for ComfyUI, its own or a custom node's, unmodified.

    On FLUX the function sees t, and latents unpacked to this width and height: call with parameterization="flow".
    With a seed it makes its own noise; else its `noise_sampler` is the pipeline's. `cfg` is the call's guidance, for
    functions that ask for the prediction without guidance. ImportError: ComfyUI can't be imported.
    """
    comfy, sampling = _comfyui("comfy_sampler needs ComfyUI, but "), model_sampling(pipe, width, height)
    flow = isinstance(sampling, Flow)

    @functools.wraps(function)
    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        x, at = sampling.unpacked(x), sigmas.to(x.device, copy=True)  # uni_pc writes into the levels
        guidance = cfg or (None if flow else getattr(pipe, "_guidance_scale", None))
        guider = _guider(comfy, model, sampling, guidance, x.device)
        surface = comfy.samplers.KSamplerX0Inpaint(guider, at)
        surface.latent_image, surface.noise = torch.zeros_like(x), x / at[0]
        model_options = {**guider.model_options, "transformer_options": {"sample_sigmas": at}}
        given = {"model_options": model_options, "denoise_mask": None, "seed": seed, **(extra_args or {})}
        if (draw := options.pop("noise_sampler", None)) and seed is None:
            options["noise_sampler"] = lambda *of_step: sampling.unpacked(draw(*of_step))
        options["callback"] = callback and functools.partial(guider.call_back, callback)
        with torch.random.fork_rng(range(torch.cuda.device_count()), seed is not None):
            if seed is not None:  # torch's generator is seeded and has drawn the initial noise, as in ComfyUI
                torch.randn(x.numel(), generator=torch.manual_seed(seed), dtype=torch.float32, device="cpu")
            end = function(surface, x, at, extra_args=given, disable=disable, **options)
        if not isinstance(end, torch.Tensor):
            return end  # the pipeline raises the error
        whole = flow and sigmas[-1] == 0  # uni_pc has set the last level to 0.001: ComfyUI divides by 0.999 then
        return sampling.packed(end.to(x.dtype) / (1 - at[-1]) if whole else end.to(x.dtype))

    return sampler


def _guider(comfy: Any, denoiser: Callable, sampling: Any, cfg: float | None, device: Any) -> Any:
    """ComfyUI's `CFGGuider` of a `BaseModel` whose network is the pipeline's denoiser, of unpacked latents.

    The pipeline guides, and no model is moved.
    """

    def predict(x: torch.Tensor, sigma: torch.Tensor, **options: bool) -> Any:
        packed = sampling.packed(x)
        base.last = packed, sigma[0]
        found = denoiser(packed, sigma, **options)
        x.copy_(sampling.unpacked(packed))  # a callback may have changed the latents
        return found

    def apply_model(x, t, concat, context, control, transformer_options, **kwargs):
        wanted = transformer_options.get("cond_or_uncond", [0])  # 0: the prompt, 1: the negative prompt
        x, sigma = x.chunk(len(wanted))[0], t.chunk(len(wanted))[0]
        if wanted == [0] and cfg == 1:
            return sampling.unpacked(predict(x, sigma))
        if not cfg:
            raise ValueError("`cfg`: the sampler asks for the prediction without guidance: pass cfg to comfy_sampler")
        guided, negative = map(sampling.unpacked, predict(x, sigma, with_uncond=True))
        sides = negative + (guided - negative) / cfg, negative
        return torch.cat([sides[side] for side in wanted])

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            asked = dict(model_options or {})
            if asked.pop("transformer_options", {}).get("wrappers") or any(asked.values()):
                return super().predict_noise(x, timestep, model_options, seed)
            return sampling.unpacked(predict(x, timestep))

        def call_back(self, callback: Callable, info: dict[str, Any]) -> None:
            """Adds what functions leave out: the step's x (ipndm and deis report their first x), and sigma (uni_pc)."""
            if base.last is not None:  # RES4LYF's functions report the last evaluation twice
                (x, sigma), base.last, denoised = base.last, None, sampling.packed(info["denoised"])
                sigma = info.get("sigma", sigma)
                callback({"sigma": sigma, "sigma_hat": sigma, **info, "x": x, "denoised": denoised})

    base = _base_model(sampling, device)
    base._apply_model, base.last = apply_model, None  # last: x and sigma of an evaluation, until it is reported
    base.diffusion_model, base.memory_usage_factor = torch.nn.Identity(), 0  # so that both sides fit into one call
    base.diffusion_model.dtype = torch.float32
    patcher = comfy.model_patcher.ModelPatcher(base, device, device)
    patcher.pre_run()
    guider, prompt = Guider(patcher), [[torch.zeros(1, 1, 1, device=device), {}]]
    guider.set_conds(prompt, prompt)
    guider.inner_model, guider.conds, guider.cfg = base, {**guider.original_conds}, cfg or 1.0
    return guider


def _base_model(sampling: Any, device: Any) -> Any:
    """ComfyUI's `BaseModel` with these levels and without a network."""
    comfy, flow = _comfyui(), isinstance(sampling, Flow)
    with torch.device("cpu"):
        config = comfy.supported_models.Flux if flow else comfy.supported_models.SDXL
        config = config({**config.unet_config, "disable_unet_model_creation": True})
        base = comfy.model_base.BaseModel(config, comfy.model_base.ModelType[sampling.model_type], device)
        if flow:
            base.model_sampling.set_parameters(math.log(sampling.shift), len(sampling.sigmas))
        else:
            base.model_sampling.set_sigmas(sampling.exact)
    return base.to(device)


def _comfyui(wanted: str = "") -> Any:
    """ComfyUI's package `comfy`, without a GPU as with --cpu. ImportError: it can't be imported, and what to do."""
    try:
        sys.dont_write_bytecode |= importlib.util.find_spec("comfy") is not None  # ComfyUI's folder stays as it is
        importlib.import_module("comfy.cli_args").args.cpu |= not torch.accelerator.is_available()
        importlib.import_module("comfy.samplers")
        return importlib.import_module("comfy.supported_models") and sys.modules["comfy"]
    except ImportError as error:
        found = "was found, but can't be imported" if importlib.util.find_spec("comfy") else "was not found"
        do = "put its folder on the path, PYTHONPATH=..., and install its requirements"
        raise ImportError(f"{wanted}ComfyUI {found}: {error}; {do}") from error


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


def _step_noise(sampler_name: str, shape: tuple[int, ...], device: Any, sigmas: torch.Tensor, seed: int) -> Callable:
    """White noise, or k-diffusion's of one Brownian tree from the lowest to the highest level."""
    if "_sde" not in sampler_name:
        generator = torch.Generator(device).manual_seed((seed + (device.type == "cpu")) % 2**64)
        return lambda *of_step: torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    positive, on = sigmas[sigmas > 0], device if sampler_name.endswith("_gpu") else "cpu"
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
    """ComfyUI's `model_sampling` for a table of levels, rising, float64 in `exact`; timesteps count them."""

    def __init__(self, exact: torch.Tensor, v_prediction: bool):
        self.model_type, self.exact = "V_PREDICTION" if v_prediction else "EPS", exact
        self.sigmas, self.log_sigmas = exact.float(), exact.log().float()
        self.sigma_min, self.sigma_max, self.times = self.sigmas[0], self.sigmas[-1], (0, len(exact) - 1)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        low, high, weight = timestep.floor().long(), timestep.ceil().long(), timestep.float().frac()
        return ((1 - weight) * self.log_sigmas[low] + weight * self.log_sigmas[high]).exp()

    packed = unpacked = staticmethod(lambda latents: latents)


class Flow:
    """ComfyUI's `model_sampling` for a flow: float32 levels in t. `shift` is exp(mu) of diffusers."""

    def __init__(self, shift: float, rows: int, columns: int, count: int):
        self.model_type, self.shift, self.rows, self.columns = "FLUX", shift, rows, columns
        self.sigmas = self.sigma(torch.arange(1, count + 1, dtype=torch.float32) / count)
        self.sigma_min, self.sigma_max = self.times = self.sigmas[0], self.sigmas[-1]

    def sigma(self, timestep: Any) -> Any:
        return self.shift / (self.shift + (1 / timestep - 1))

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) to a token for each patch of 2x2, (b, h w / 4, 4 c). A scheduler's trial has one number."""
        return latents if latents.numel() == 1 else F.pixel_unshuffle(latents, 2).flatten(2).mT.contiguous()

    def unpacked(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.numel() == 1:
            return tokens.view(1, 1, 1, 1)
        if 4 * tokens.shape[1] != self.rows * self.columns:
            raise ValueError("`latents` are of another size: give comfy_sampler the picture's `width` and `height`")
        return F.pixel_shuffle(tokens.mT.unflatten(2, (self.rows // 2, self.columns // 2)), 2)


def model_sampling(pipe: Any, width: int = 0, height: int = 0) -> Any:
    """ComfyUI's `model_sampling` for a pipeline's scheduler: `Discrete` for betas and EDM, or `Flow`.

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
        return Discrete(_trained_sigmas(base), config.get("prediction_type") == "v_prediction")


def _trained_sigmas(scheduler: Any) -> torch.Tensor:
    """The levels that a network was trained with, rising: EDM's, or from float64 betas, as in ComfyUI."""
    config = scheduler.config
    if config.get("sigma_min") and ("sigma_data" in config or config.get("timestep_type") == "continuous"):
        low, high = math.log(config["sigma_min"]), math.log(config["sigma_max"])
        return torch.linspace(low, high, 1000, dtype=torch.float64).exp()
    if not hasattr(scheduler, "betas"):
        raise ValueError(f"`pipe`: {type(scheduler).__name__} is no scheduler of a known kind: betas, flow, EDM")
    betas = scheduler.betas.cpu().double()
    if config.get("beta_schedule") == "scaled_linear" and config.get("trained_betas") is None:
        ends = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
        betas = torch.linspace(*ends, config["num_train_timesteps"], dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0).sqrt()
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1; no change where the betas have it
        alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
        alphas[-1] = 4.8973451890853435e-08**0.5  # ComfyUI's number in place of the zero: sigma is 4518.76
    return ((1 - alphas**2) / alphas**2) ** 0.5


def _linear_quadratic(n: int, m: Any) -> torch.Tensor:
    """A line from 1 to 0.975 in the first half of the steps, then the parabola that continues it smoothly to 0."""
    half, i = n // 2, torch.arange(n, dtype=torch.float64)
    slope = 0.025 / max(half, 1)
    return (1 - slope * i - (1 - slope * n) * ((i - half).clamp(min=0) / (n - half)) ** 2).float() * m.sigma_max


def _kl_optimal(n: int, m: Any) -> torch.Tensor:
    share = torch.arange(n, dtype=torch.float32) / max(n - 1, 1)  # one step is NaN in ComfyUI
    return (share * math.atan(m.sigma_min) + (1 - share) * math.atan(m.sigma_max)).tan()


SCHEDULERS: dict[str, Callable[[int, Any], torch.Tensor]] = {  # n levels, falling, without the zero at their end
    "simple": lambda n, m: m.sigmas.flip(0)[[int(i * (len(m.sigmas) / n)) for i in range(n)]],  # from the top
    "sgm_uniform": lambda n, m: SCHEDULERS["normal"](n + 1, m)[:-1],
    "karras": lambda n, m: k_diffusion().get_sigmas_karras(n, m.sigma_min.item(), m.sigma_max.item())[:-1],
    "exponential": lambda n, m: k_diffusion().get_sigmas_exponential(n, m.sigma_min.item(), m.sigma_max.item())[:-1],
    "ddim_uniform": lambda n, m: m.sigmas[1 :: max(len(m.sigmas) // n, 1)].flip(0),  # from the second lowest up
    # quantiles of Beta(0.6, 0.6), Lee et al. 2024; with many steps some round to the same level
    "beta": lambda n, m: m.sigmas[[round(betaincinv(0.6, 0.6, 1 - i / n) * (len(m.sigmas) - 1)) for i in range(n)]],
    "normal": lambda n, m: m.sigma(torch.linspace(m.times[1], m.times[0], n)),  # evenly in time; FLUX's shifted twice
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
        nodes = [one[13:] for one in sys.modules if re.fullmatch(r"custom_nodes\.[^.]+", one)]
        found = f"ComfyUI was found, and loaded are {', '.join(nodes) or 'no custom nodes (load_custom_nodes)'}"
        try:
            _comfyui()
        except ImportError as error:
            found = str(error)
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"`{argument}`: there is no {name!r}; {hint}; {found}")
