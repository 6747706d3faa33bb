"""A pack of custom nodes: on import it asks for the server and writes a file, then it adds a sampler and a schedule."""

from pathlib import Path

import comfy.model_sampling
import comfy.samplers
import torch
from server import PromptServer

from .steps import euler, halves

PromptServer.instance.routes["/stand_in"] = euler
Path(__file__).with_name("settings.json").write_text("{}")


def sample_stand_in(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=0.0):
    """Euler's method with noise from torch's seed, which looks up what the functions of such packs do."""
    guider, base = model.inner_model, model.inner_model.inner_model
    flow, options = isinstance(base.model_sampling, comfy.model_sampling.CONST), extra_args["model_options"]
    assert flow != isinstance(base.model_sampling, comfy.model_sampling.EPS) and base.device == x.device
    assert base.model_config.unet_config["image_model"] == ("Flux" if flow else "SDXL")
    assert base.diffusion_model._get_name() and guider.model_patcher.model is base is base.current_patcher.model
    assert guider.cfg >= 1 and {"positive", "negative"} == guider.conds.keys() and model.noise.shape == x.shape
    assert options["transformer_options"]["sample_sigmas"].equal(sigmas) and x.ndim == 4
    assert base.model_sampling.sigma_min.to(x.device) < sigmas[0] <= base.model_sampling.sigma_max.to(x.device)
    generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
    for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        denoised = model(x, sigma * x.new_ones([len(x)]), **extra_args)
        if callback is not None:
            for _ in range(1 + (after == 0)):  # RES4LYF's report the last evaluation twice
                callback({"x": x, "i": i, "sigma": sigma, "sigma_next": after, "denoised": denoised})
        x = euler(x, denoised, sigma, after) + eta * after * torch.randn(x.shape, generator=generator)
    return x


comfy.samplers.KSampler.SAMPLERS.append("stand_in")
comfy.samplers.functions["stand_in"] = sample_stand_in
comfy.samplers.SCHEDULER_HANDLERS["halves"] = halves
