"""Samplers that ComfyUI has and k-diffusion lacks, from their papers, in the form of functions for ComfyUI.

They look up the process on `model` and the seed and guidance in `extra_args`, and make their own noise.

On FLUX x is (1 - t) x0 + t noise and sigma is t; elsewhere x is x0 + sigma noise, which is the same with alpha 1.
"""

from __future__ import annotations

import functools
import sys
import warnings

import torch

from comfy_ksampler import k_diffusion


class Run:
    """What the samplers below ask of their arguments."""

    def __init__(self, model, x, sigmas, extra_args, callback, noise_sampler):
        self.model, self.extra_args, self.callback, self.count = model, dict(extra_args), callback, 0
        self.sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
        assert self.sampling is model.inner_model.inner_model.model_sampling
        self.flow = isinstance(self.sampling, sys.modules["comfy.model_sampling"].CONST)
        generator = torch.Generator().manual_seed(extra_args["seed"] + 1)
        self.noise = lambda: torch.randn(x.shape, generator=generator)
        if noise_sampler is not None:
            self.noise = lambda: noise_sampler(None, None)
        self.first, self.x = x, x
        self.sigmas = sigmas.clone()
        self.uncond = None

    def from_finite_snr(self):
        """At t = 1 nothing of x0 is left; the samplers that need its share begin a little lower."""
        if self.flow and self.sigmas[0] >= 1:
            self.sigmas[0] = self.sampling.percent_to_sigma(1e-4)
        return self

    def with_uncond(self):
        options = dict(self.extra_args["model_options"])
        after = [*options.get("sampler_post_cfg_function", []), self._keep]
        self.extra_args["model_options"] = {**options, "sampler_post_cfg_function": after}
        return self

    def _keep(self, arguments):
        self.uncond = arguments["uncond_denoised"]
        return arguments["denoised"]

    def __call__(self, x, sigma, begins=False, shown=None):
        denoised = self.model(x, sigma * x.new_ones([len(x)]), **self.extra_args)
        if begins and self.callback is not None:
            told = x if shown is None else shown
            self.callback({"x": told, "i": self.count, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            self.count += 1
        return denoised

    def steps(self):
        return zip(self.sigmas[:-1], self.sigmas[1:])

    def alpha(self, sigma):
        return 1 - sigma if self.flow else torch.ones_like(sigma)

    def lam(self, sigma):
        """Half the log of the signal to noise ratio, log(alpha / sigma)."""
        return sigma.logit().neg() if self.flow else sigma.log().neg()

    def sigma_at(self, lam):
        return lam.neg().sigmoid() if self.flow else lam.neg().exp()


def sampler(function):
    """`function(run)` with the signature of ComfyUI's."""

    @functools.wraps(function)
    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        return function(Run(model, x, sigmas, extra_args, callback, noise_sampler))

    del sample.__wrapped__
    return sample


def ancestral(sigma, sigma_next, eta=1.0):
    """(down, up), Karras et al. 2022 in the notation of k-diffusion."""
    up = eta * sigma_next * (1 - (sigma_next / sigma) ** 2).clamp(min=0).sqrt()
    return (sigma_next**2 - up**2).sqrt(), up


def euler_cfg_pp(run, eta=0.0):
    """CFG++ (Chung et al. 2024, algorithm 2): guided x0, but noise as if unguided."""
    run.with_uncond()
    x = run.x
    for s, t in run.steps():
        denoised = run(x, s, begins=True)
        if t == 0:
            return denoised
        noise = (x - run.alpha(s) * run.uncond) / s
        down, up = ancestral(s / run.alpha(s), t / run.alpha(t), eta)
        x = run.alpha(t) * (denoised + down * noise)
        if eta:
            x = x + run.alpha(t) * up * run.noise()
    return x


def dpmpp_2m_cfg_pp(run):
    """DPM-Solver++(2M), Lu et al. 2022, with the unguided prediction in the place of the noise and of the history."""
    run.with_uncond()
    x, old, h_last = run.x, None, None
    for s, t in run.steps():
        denoised = run(x, s, begins=True)
        if t == 0:
            return denoised
        h = (s / t).log()
        x_next = denoised + (t / s) * (x - run.uncond)
        if old is not None:
            x_next = x_next + (1 - t / s) * (denoised - old) * h / (2 * h_last)
        x, old, h_last = x_next, run.uncond, h
    return x


def dpmpp_2s_ancestral_cfg_pp(run):
    """DPM-Solver++(2S), Lu et al. 2022, from x plus what guidance adds in the latest evaluation, as ComfyUI does."""
    run.with_uncond()
    x = run.x
    for s, t in run.steps():
        denoised = run(x, s, begins=True)
        if t == 0:
            return denoised
        down, up = ancestral(s, t)
        middle = (s * down).sqrt()
        x_2 = middle / s * (x + denoised - run.uncond) + (1 - middle / s) * denoised
        denoised_2 = run(x_2, middle)
        x = down / s * (x + denoised - run.uncond) + (1 - down / s) * denoised_2 + up * run.noise()
    return x


def gradient_estimation(run, cfg_pp=False):
    """Permenter and Yuan 2024: Euler's method along 2 d - d of the last step."""
    if cfg_pp:
        run.with_uncond()
    x, last = run.x, None
    for s, t in run.steps():
        denoised = run(x, s, begins=True)
        if t == 0:
            return denoised
        d = (x - (run.uncond if cfg_pp else denoised)) / s
        x = denoised + t * d if cfg_pp else x + (t - s) * d
        if last is not None:
            x = x + (t - s) * (d - last)
        last = d
    return x


def res_multistep(run, eta=0.0, cfg_pp=False):
    """Second order exponential multistep, Zhang et al. 2023: phi functions of h = log(sigma / sigma_down)."""
    if cfg_pp:
        run.with_uncond()
    x, old, old_down, before = run.x, None, None, None
    for s, t in run.steps():
        denoised = run(x, s, begins=True)
        if t == 0:
            return denoised
        down, up = ancestral(s, t, eta)
        plain = run.uncond if cfg_pp else denoised
        h = (s / down).log()
        if old is None:
            x = denoised + (down / s) * (x - plain)
        else:
            phi_1 = -(-h).expm1() / h
            phi_2 = (1 - phi_1) / h
            c_2 = (old_down / before).log() / h
            x = (-h).exp() * (x + denoised - plain) + h * ((phi_1 - phi_2 / c_2) * plain + phi_2 / c_2 * old)
        if eta:
            x = x + up * run.noise()
        old, old_down, before = plain, down, s
    return x


def ddpm(run):
    """The posterior of Ho et al. 2020, eq. 7, in x0 + sigma noise, whose variance grows by sigma^2 - sigma_next^2."""
    x = run.x
    for s, t in run.steps():
        denoised, share = run(x, s, begins=True), (t / s) ** 2
        x = denoised + share * (x - denoised)
        if t > 0:
            x = x + t * (1 - share).sqrt() * run.noise()
    return x


def lcm(run):
    """Song et al. 2023, algorithm 1: x0, and new noise of the next level by the model's own scaling."""
    x = run.x
    for s, t in run.steps():
        x = run(x, s, begins=True)
        if t > 0:
            x = run.sampling.noise_scaling(t, run.noise(), x)
    return x


def ipndm(run):
    """Zhang and Chen 2022: Adams-Bashforth of order 4. Tells the callback the first x in every step, as ComfyUI's."""
    weights = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    x, slopes = run.x, []
    for s, t in run.steps():
        denoised = run(x, s, begins=True, shown=run.first)
        if t == 0:
            return denoised
        slopes = [(x - denoised) / s, *slopes][:4]
        x = x + (t - s) * sum(w * d for w, d in zip(weights[len(slopes) - 1], slopes))
    return x


def exponential_heun(run, eta=0.0, r=1.0, second_order=True):
    """Two stages in lambda, the first to r of the step (SEEDS-2, Gonzalez et al. 2023; r = 1: exponential Heun).

    The noise of both stages is of one path: its first part goes on in the second.
    """
    run.from_finite_snr()
    x = run.x
    for s, t in run.steps():
        denoised = run(x, s, begins=True)
        if t == 0:
            return denoised
        h = run.lam(t) - run.lam(s)
        middle = run.sigma_at(run.lam(s) + r * h)
        a = (1 + eta) * h
        x_2 = middle / s * (-r * h * eta).exp() * x + run.alpha(middle) * (1 - (-r * a).exp()) * denoised
        if eta:
            path = (1 - (-2 * r * h * eta).exp()).sqrt() * run.noise()
            x_2 = x_2 + middle * path
        denoised_2 = run(x_2, middle)
        whole = 1 - (-a).exp()
        second = (a - whole) / a / r if second_order else whole / (2 * r)
        x = t / s * (-h * eta).exp() * x + run.alpha(t) * ((whole - second) * denoised + second * denoised_2)
        if eta:
            rest = (1 - r) * h * eta
            x = x + t * (path * (-rest).exp() + (1 - (-2 * rest).exp()).sqrt() * run.noise())
    return x


def flow_ancestral(run, middle=False):
    """ComfyUI's ancestral step on FLUX: by the ODE to t^2 / s, from where alpha and noise are brought up to t."""
    x = run.x
    for s, t in run.steps():
        denoised, down = run(x, s, begins=True), t**2 / s
        if t == 0:
            return denoised
        if middle:
            half = (s * down).sqrt()
            x_2 = x + (x - denoised) / s * (half - s)
            x = x + (x_2 - run(x_2, half)) / half * (down - s)
        else:
            x = denoised + (x - denoised) * (down / s)
        scale = (1 - t) / (1 - down)
        x = scale * x + (t**2 - (scale * down) ** 2).sqrt() * run.noise()
    return x


def brownian(run, name, **options):
    """k-diffusion's `*_sde`; on FLUX of y = x / (1 - t), which is x0 + sigma noise at sigma = t / (1 - t)."""
    positive = run.sigmas[run.sigmas > 0]
    tree = k_diffusion().BrownianTreeNoiseSampler(run.x, positive[-1], positive[0], run.extra_args["seed"])
    run.from_finite_snr()
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
    name: sampler(function)
    for name, function in {
        "euler_cfg_pp": euler_cfg_pp,
        "euler_ancestral_cfg_pp": lambda run: euler_cfg_pp(run, eta=1.0),
        "dpmpp_2m_cfg_pp": dpmpp_2m_cfg_pp,
        "dpmpp_2s_ancestral_cfg_pp": dpmpp_2s_ancestral_cfg_pp,
        "gradient_estimation": gradient_estimation,
        "gradient_estimation_cfg_pp": lambda run: gradient_estimation(run, cfg_pp=True),
        "res_multistep": res_multistep,
        "res_multistep_cfg_pp": lambda run: res_multistep(run, cfg_pp=True),
        "res_multistep_ancestral": lambda run: res_multistep(run, eta=1.0),
        "res_multistep_ancestral_cfg_pp": lambda run: res_multistep(run, eta=1.0, cfg_pp=True),
        "ddpm": ddpm,
        "lcm": lcm,
        "ipndm": ipndm,
        "exp_heun_2_x0": exponential_heun,
        "exp_heun_2_x0_sde": lambda run: exponential_heun(run, eta=1.0),
        "seeds_2": lambda run: exponential_heun(run, eta=1.0, r=0.5, second_order=False),
        "dpmpp_2m_sde_heun": lambda run: brownian(run, "dpmpp_2m_sde", solver_type="heun"),
        "dpmpp_2m_sde_heun_gpu": lambda run: brownian(run, "dpmpp_2m_sde", solver_type="heun"),  # the same on a CPU
    }.items()
}
ON_FLUX = {
    name: sampler(function)
    for name, function in {
        "euler_ancestral": flow_ancestral,
        "dpm_2_ancestral": lambda run: flow_ancestral(run, middle=True),
        "dpmpp_sde": lambda run: brownian(run, "dpmpp_sde"),
        "dpmpp_2m_sde": lambda run: brownian(run, "dpmpp_2m_sde"),
        "dpmpp_3m_sde": lambda run: brownian(run, "dpmpp_3m_sde"),
    }.items()
}
