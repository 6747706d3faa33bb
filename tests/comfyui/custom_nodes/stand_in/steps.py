import torch


def euler(x, denoised, sigma, after):
    return denoised + (x - denoised) * after / sigma


def halves(model_sampling, steps):
    """Each level is half of the one before, then zero."""
    return torch.cat([float(model_sampling.sigma_max) * 0.5 ** torch.arange(steps), torch.zeros(1)])
