"""A stand-in for ComfyUI's package: the classes between a sampler and its network, and the names that nodes extend."""

import enum
import math
import sys
from types import SimpleNamespace

import torch
from comfy_samplers import ON_BOTH, ON_FLUX

from comfy_ksampler import Flow

for name in ("cli_args", "model_base", "model_patcher", "model_sampling", "samplers", "supported_models"):
    globals()[name] = sys.modules[f"comfy.{name}"] = sys.modules["comfy"]

args = SimpleNamespace(cpu=False, base_directory=None, front_end_root=None)
ModelType = enum.Enum("ModelType", "EPS V_PREDICTION FLUX")
SDXL, Flux = (type(name, (SimpleNamespace,), {"unet_config": {"image_model": name}}) for name in ("SDXL", "Flux"))
for config in (SDXL, Flux):
    config.__init__ = lambda self, unet_config: vars(self).update(unet_config=unet_config)

functions = ON_BOTH | ON_FLUX
KSampler = SimpleNamespace(SAMPLERS=["euler", *functions], SCHEDULERS=["simple"])
KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS = {"dpm_2"}
SCHEDULER_HANDLERS = {}


def sampler_object(name):
    return SimpleNamespace(sampler_function=functions[name], extra_options={"eta": 0.1} if name == "stand_in" else {})


def calculate_sigmas(model_sampling, scheduler_name, steps):
    return SCHEDULER_HANDLERS[scheduler_name](model_sampling, steps)


class EPS:
    def noise_scaling(self, sigma, noise, latent_image):
        return sigma * noise + latent_image


class V_PREDICTION(EPS): ...


class CONST:
    def noise_scaling(self, sigma, noise, latent_image):
        return sigma * noise + (1 - sigma) * latent_image


class ModelSamplingDiscrete:
    sigma_min, sigma_max = (property(lambda self, end=end: self.sigmas[end]) for end in (0, -1))

    def set_sigmas(self, sigmas):
        self.sigmas = sigmas.float()


class ModelSamplingFlux(Flow):
    def __init__(self): ...

    def set_parameters(self, shift, timesteps):
        super().__init__(math.exp(shift), 0, 0, timesteps)

    def percent_to_sigma(self, percent):
        return self.sigma(1 - percent)


class BaseModel(torch.nn.Module):
    def __init__(self, model_config, model_type, device):
        super().__init__()
        assert model_config.unet_config["disable_unet_model_creation"]
        levels = ModelSamplingFlux if model_type is ModelType.FLUX else ModelSamplingDiscrete
        kind = CONST if model_type is ModelType.FLUX else globals()[model_type.name]
        self.model_sampling = type("ModelSampling", (levels, kind), {})()
        self.model_config, self.device = model_config, device


class ModelPatcher:
    def __init__(self, model, load_device, offload_device):
        self.model, self.model_options = model, {"transformer_options": {}}
        self.get_model_object = lambda name: getattr(model, name)

    def pre_run(self):
        self.model.current_patcher = self


class CFGGuider:
    def __init__(self, model_patcher):
        self.model_patcher, self.model_options = model_patcher, model_patcher.model_options

    def set_conds(self, positive, negative):
        self.original_conds = {"positive": positive, "negative": negative}

    def set_cfg(self, cfg):
        self.cfg = cfg

    def predict_noise(self, x, timestep, model_options, seed):
        """Both sides in one call, the negative prompt's first."""
        assert self.inner_model.memory_usage_factor == 0
        two = [torch.cat([one, one]) for one in (x, timestep)]
        both = self.inner_model._apply_model(*two, None, None, None, {"cond_or_uncond": [1, 0]})
        sides = dict(zip(("uncond_denoised", "cond_denoised"), both.chunk(2)))
        denoised = sides["uncond_denoised"] + (sides["cond_denoised"] - sides["uncond_denoised"]) * self.cfg
        given = {"model": self.inner_model, "model_options": model_options, "input": x, "sigma": timestep, **sides}
        for function in model_options["sampler_post_cfg_function"]:
            denoised = function({**given, "denoised": denoised})
        return denoised


class KSamplerX0Inpaint:
    def __init__(self, model, sigmas):
        self.inner_model = model

    def __call__(self, x, sigma, denoise_mask, model_options={}, seed=None):  # noqa: B006
        return self.inner_model.predict_noise(x, sigma, model_options, seed)
