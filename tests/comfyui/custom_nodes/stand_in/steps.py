import comfy.model_sampling
import torch


def euler(x, denoised, sigma, after):
    return denoised + (x - denoised) * after / sigma


def halves(model_sampling, steps):
    """Each level is half of the one before, then zero. Schedules of such packs look at ComfyUI's class."""
    assert isinstance(model_sampling, (comfy.model_sampling.EPS, comfy.model_sampling.CONST))
    return torch.cat([float(model_sampling.sigma_max) * 0.5 ** torch.arange(steps), torch.zeros(1)])
