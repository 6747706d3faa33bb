"""Samplers that ComfyUI has and k-diffusion lacks, from their papers, as functions for ComfyUI.

They look up the process on `model` and the seed and guidance in `extra_args`, and make their own noise: at least one
function for each kind of look-up. test_comfyui.py runs ComfyUI's own functions, all of them, where ComfyUI is there.

On FLUX x is (1 - t) x0 + t noise and sigma is t; elsewhere x is x0 + sigma noise, which is the same with alpha 1.
"""

from __future__ import annotations

import sys
import warnings

import torch

from comfy_ksampler import k_diffusion


class Run:
    """A run of the samplers below."""

    def __init__(self, model, x, sigmas, extra_args, callback, noise_sampler):
        self.model, self.extra_args, self.callback, self.count = model, dict(extra_args), callback, 0
        self.sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
        assert self.sampling is model.inner_model.inner_model.model_sampling
        self.flow = isinstance(self.sampling, sys.modules["comfy.model_sampling"].CONST)
        generator = torch.Generator().manual_seed(extra_args["seed"] + 1)
        self.noise = lambda: noise_sampler(None, None) if noise_sampler else torch.randn(x.shape, generator=generator)
        self.x, self.sigmas = x, sigmas.clone()

    def __call__(self, x, sigma, reported=None):
        """The prediction. With `reported`, the callback gets that as its x."""
        denoised = self.model(x, sigma * x.new_ones([len(x)]), **self.extra_args)
        if reported is not None and self.callback is not None:
            self.callback({"x": reported, "i": self.count, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            self.count += 1
        return denoised

    def steps(self):
        return zip(self.sigmas[:-1], self.sigmas[1:])

    def alpha(self, sigma):
        return 1 - sigma if self.flow else torch.ones_like(sigma)


def sampler(function, **options):
    """`function(run, **options)` with the signature of ComfyUI's."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        return function(Run(model, x, sigmas, extra_args, callback, noise_sampler), **options)

    return sample


def euler_cfg_pp(run, eta=0.0):
    """CFG++ (Chung et al. 2024, algorithm 2): guided x0, unguided noise."""
    unguided = []

    def keep(arguments):
        unguided.append(arguments["uncond_denoised"])
        return arguments["denoised"]

    options = dict(run.extra_args["model_options"])
    after = [*options.get("sampler_post_cfg_function", []), keep]
    run.extra_args["model_options"] = {**options, "sampler_post_cfg_function": after}
    x = run.x
    for s, t in run.steps():
        denoised = run(x, s, reported=x)
        if t == 0:
            return denoised
        noise = (x - run.alpha(s) * unguided[-1]) / s
        sigma, sigma_next = s / run.alpha(s), t / run.alpha(t)
        up = eta * sigma_next * (1 - (sigma_next / sigma) ** 2).clamp(min=0).sqrt()
        x = run.alpha(t) * (denoised + (sigma_next**2 - up**2).sqrt() * noise)
        if eta:
            x = x + run.alpha(t) * up * run.noise()
    return x


def lcm(run):
    """Song et al. 2023, algorithm 1: x0, and new noise of the next level by the model's own scaling."""
    x = run.x
    for s, t in run.steps():
        x = run(x, s, reported=x)
        if t > 0:
            x = run.sampling.noise_scaling(t, run.noise(), x)
    return x


def ipndm(run):
    """Zhang and Chen 2022: Adams-Bashforth of order 4. Reports its first x in every step, as ComfyUI's does."""
    weights = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    x, slopes = run.x, []
    for s, t in run.steps():
        denoised = run(x, s, reported=run.x)
        if t == 0:
            return denoised
        slopes = [(x - denoised) / s, *slopes][:4]
        x = x + (t - s) * sum(w * d for w, d in zip(weights[len(slopes) - 1], slopes))
    return x


def flow_ancestral(run):
    """ComfyUI's ancestral step on FLUX: by the ODE to t^2 / s, from where alpha and noise are brought up to t."""
    x = run.x
    for s, t in run.steps():
        denoised, down = run(x, s, reported=x), t**2 / s
        if t == 0:
            return denoised
        x = denoised + (x - denoised) * (down / s)
        scale = (1 - t) / (1 - down)
        x = scale * x + (t**2 - (scale * down) ** 2).sqrt() * run.noise()
    return x


def brownian(run, name, **options):
    """k-diffusion's `*_sde`; on FLUX of y = x / (1 - t), which is x0 + sigma noise at sigma = t / (1 - t)."""
    positive = run.sigmas[run.sigmas > 0]
    tree = k_diffusion().BrownianTreeNoiseSampler(run.x, positive[-1], positive[0], run.extra_args["seed"])
    if run.flow and run.sigmas[0] >= 1:  # there the share of x0 is zero; ComfyUI begins a little lower
        run.sigmas[0] = run.sampling.percent_to_sigma(1e-4)
    levels = run.sigmas / (1 - run.sigmas) if run.flow else run.sigmas

    def to_t(sigma):
        near = (levels - sigma).abs().argmin()
        exact = abs(levels[near] - sigma) < 1e-5 * sigma
        return run.sigmas[near] if exact else sigma / (1 + sigma) if run.flow else sigma

    def model(y, sigma):
        t = to_t(sigma[0])
        return run(y * (1 - t) if run.flow else y, t)

    def noise_sampler(*sigmas):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchsde's, of times beyond its ends
            return tree(*map(to_t, sigmas))

    y = run.x / (1 - run.sigmas[0]) if run.flow else run.x
    function = getattr(k_diffusion(), f"sample_{name}")
    return function(model, y, levels, disable=True, noise_sampler=noise_sampler, **options)


ON_BOTH = {
    "euler_cfg_pp": sampler(euler_cfg_pp),
    "euler_ancestral_cfg_pp": sampler(euler_cfg_pp, eta=1.0),
    "lcm": sampler(lcm),
    "ipndm": sampler(ipndm),
    "dpmpp_2m_sde_heun": sampler(brownian, name="dpmpp_2m_sde", solver_type="heun"),
}
ON_BOTH["dpmpp_2m_sde_heun_gpu"] = ON_BOTH["dpmpp_2m_sde_heun"]  # the same on a CPU
ON_FLUX = {name: sampler(brownian, name=name) for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")}
ON_FLUX["euler_ancestral"] = sampler(flow_ancestral)
