"""Most samplers that ComfyUI has and k-diffusion lacks, from their papers, as functions for ComfyUI.

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
    """A run of the samplers below."""

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
        self.given, self.sigmas = sigmas, sigmas.clone()
        self.uncond = None

    def from_finite_snr(self):
        """At t = 1 the share of x0 is zero; samplers that divide by it begin a little lower."""
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
            reported = x if shown is None else shown
            self.callback({"x": reported, "i": self.count, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
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
    """CFG++ (Chung et al. 2024, algorithm 2): guided x0, unguided noise."""
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
        middle = ((s.log() + down.log()) / 2).exp()
        x_2 = middle / s * (x + (denoised - run.uncond)) - (middle / s).log().expm1() * denoised
        denoised_2 = run(x_2, middle)
        x = down / s * (x + (denoised - run.uncond)) - (down / s).log().expm1() * denoised_2 + up * run.noise()
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
    """Zhang and Chen 2022: Adams-Bashforth of order 4. Reports its first x in every step, as ComfyUI's does."""
    weights = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    x, slopes = run.x, []
    for s, t in run.steps():
        denoised = run(x, s, begins=True, shown=run.first)
        if t == 0:
            return denoised
        slopes = [(x - denoised) / s, *slopes][:4]
        x = x + (t - s) * sum(w * d for w, d in zip(weights[len(slopes) - 1], slopes))
    return x


def exponential(run, *shares, eta=0.0, second_order=True):
    """Exponential stages at these shares of the step in lambda, each by the one before (SEEDS-2 and -3, Gonzalez et al.
    2023; 1 and 1 are exponential Heun). The noise of a step is of one path through its stages.
    """
    run.from_finite_snr()
    x = run.x
    for s, t in run.steps():
        denoised = latest = run(x, s, begins=True)
        if t == 0:
            return denoised
        h, before, path, level, x_next = run.lam(t) - run.lam(s), 0.0, 0.0, s, x
        for stage, r in enumerate(shares):
            if stage:
                latest = run(x_next, level)
            level = t if stage == len(shares) - 1 else run.sigma_at(run.lam(s) + r * h)
            a = (1 + eta) * r * h
            whole, second = 1 - (-a).exp(), 0.0
            if stage:
                second = r / before * (a - whole) / a if second_order else whole / (2 * before)
            x_next = level / s * (-r * h * eta).exp() * x + run.alpha(level) * (
                (whole - second) * denoised + second * latest
            )
            if eta:
                passed = (r - before) * h * eta
                path = path * (-passed).exp() + (1 - (-2 * passed).exp()).sqrt() * run.noise()
                x_next = x_next + level * path
            before = r
        x = x_next
    return x


def er_sde(run):
    """Cui et al. 2023, ER-SDE-Solver-3, with their fifth noise scale: Taylor's formula in L = sigma / alpha."""
    run.from_finite_snr()

    def scale(level):
        return level * ((level**0.3).exp() + 10)

    x, history = run.x, []  # of denoised and its first derivative
    levels = run.lam(run.sigmas).neg().exp()
    for i, (s, t) in enumerate(run.steps()):
        denoised = run(x, s, begins=True)
        if t == 0:
            return denoised
        now, after, alpha = levels[i], levels[i + 1], run.alpha(t)
        share, d = scale(after) / scale(now), after - now
        x = alpha / run.alpha(s) * share * x + alpha * (1 - share) * denoised
        points = after - d / 200 * torch.arange(200)
        slope = None
        if i:
            slope = (denoised - history[0]) / (now - levels[i - 1])
            x = x + alpha * (d - scale(after) * (1 / scale(points)).sum() * d / 200) * slope
        if i > 1:
            bend = (slope - history[1]) / ((now - levels[i - 2]) / 2)
            x = x + alpha * (d**2 / 2 - scale(after) * ((points - now) / scale(points)).sum() * d / 200) * bend
        x = x + alpha * (after**2 - (now * share) ** 2).clamp(min=0).sqrt() * run.noise()
        history = denoised, slope
    return x


def sa_solver(run, pece=False):
    """Stochastic Adams, Xue et al. 2023, algorithm 1: predictor of order 3, corrector of order 4, tau 1 in the middle.

    In orders that fall at the end. The noise of a prediction is kept for its correction.
    """
    run.from_finite_snr()
    lambdas, first, last = run.lam(run.sigmas).double(), *(run.sampling.percent_to_sigma(p) for p in (0.2, 0.8))
    x, predicted, values, n = run.x, run.x, [], len(run.sigmas) - 1
    tau, noise = 0.0, torch.zeros(())

    def step(x, i, nodes, tau, noise):
        """From level i to i + 1, by the values at `nodes`: (1 + tau^2) times the integral of eq. 14, by its moments."""
        start, end, c = lambdas[i], lambdas[i + 1], 1 + tau**2
        h, moments = end - start, []
        for p in range(len(nodes)):  # of exp(c u) u^p, u = lambda - end
            moments.append(float(p == 0) - (-h) ** p * (-c * h).exp() - (p / c * moments[-1] if p else 0))
        shares = torch.linalg.solve(torch.vander(lambdas[nodes] - end, increasing=True).T, torch.stack(moments))
        change = sum(share.to(x.dtype) * values[node] for share, node in zip(shares, nodes))
        t, s = run.sigmas[i + 1], run.sigmas[i]
        return t / s * (-(tau**2) * h).exp() * x + run.alpha(t) * change + noise

    for i, (s, t) in enumerate(run.steps()):
        denoised = run(predicted, s, begins=True)
        values.append(denoised)
        order = min(4, i + 1, n - i) if i and (t > 0 or pece) else 0
        x = step(x, i - 1, [*range(i + 1 - order, i + 1)], tau, noise) if order else predicted
        if order and pece:
            values[-1] = denoised = run(x, s)
        if t == 0:
            return denoised
        tau = float(first >= t.item() >= last)  # in float64: on FLUX a level may be one of the ends, rounded
        noise = t * (1 - (-2 * tau**2 * (lambdas[i + 1] - lambdas[i])).exp()).sqrt() * run.noise() if tau else 0 * noise
        order = min(3, i + 1, n - 1 - i)
        predicted = step(x, i, [*range(i + 1 - order, i + 1)], tau, noise)
    return predicted


def uni_pc(run, bh2=False):
    """UniPC of order 3, Zhao et al. 2023, algorithms 5 and 6 (data prediction), B(h) = h or exp(h) - 1, down to 0.001.

    In alpha x0 + sigma noise, and in the float32 of ComfyUI, whose alpha^2 + sigma^2 = 1 loses digits of a low sigma.
    """
    run.sigmas[-1] = run.given[-1] = 0.001
    log_alpha = 0.5 * (1 / (run.sigmas**2 + 1)).log()
    alphas, stds = log_alpha.exp(), (1 - (2 * log_alpha).exp()).sqrt()
    lambdas = log_alpha - 0.5 * (1 - (2 * log_alpha).exp()).log()
    x, values, n = run.x / (1 + run.sigmas[0] ** 2).sqrt(), [], len(run.sigmas) - 1

    def value(x, i):
        """The model's x0 by its noise."""
        s, y = run.sigmas[i], x * (run.sigmas[i] ** 2 + 1).sqrt()
        return (x - stds[i] * ((y - run(y, s, begins=True)) / s)) / alphas[i]

    for i in range(n):
        values.append(value(x, i)) if not i else None
        order, h = min(3, i + 1, n - i), lambdas[i] - lambdas[i + 1]
        ratios = torch.stack([(lambdas[j] - lambdas[i]) / -h for j in range(i - 1, i - order, -1)] + [torch.ones(())])
        differences = [(values[j] - values[i]) / r for j, r in zip(range(i - 1, i - order, -1), ratios)]
        g, factorial, b, scale = h.expm1() / h - 1, 1, [], h.expm1() if bh2 else h
        for k in range(1, order + 1):
            b.append(g * factorial / scale)
            factorial *= k + 1
            g = g / h - 1 / factorial
        powers, b = torch.stack([ratios**k for k in range(order)]), torch.stack(b)
        shares = [0.5] if order == 2 else torch.linalg.solve(powers[:-1, :-1], b[:-1])
        plain = stds[i + 1] / stds[i] * x - alphas[i + 1] * h.expm1() * values[i]
        x = plain - alphas[i + 1] * scale * sum(share * d for share, d in zip(shares, differences))
        if i + 1 < n:
            values.append(value(x, i + 1))
            shares = [0.5] if order == 1 else torch.linalg.solve(powers, b)
            differences.append(values[-1] - values[i])
            x = plain - alphas[i + 1] * scale * sum(share * d for share, d in zip(shares, differences))
    return x / alphas[-1]


def flow_ancestral(run, middle="none"):
    """ComfyUI's ancestral step on FLUX: by the ODE to t^2 / s, from where alpha and noise are brought up to t."""
    x = run.x
    for s, t in run.steps():
        denoised, down = run(x, s, begins=True), t**2 / s
        if t == 0:
            return denoised
        if middle == "dpm_2":
            half = (s * down).sqrt()
            x_2 = x + (x - denoised) / s * (half - s)
            x = x + (x_2 - run(x_2, half)) / half * (down - s)
        else:
            if middle == "dpmpp_2s":
                half = run.sigma_at((run.lam(s) + run.lam(down)) / 2) if s < 1 else 0.9999 * s
                denoised = run(denoised + (x - denoised) * (half / s), half)
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
        "exp_heun_2_x0": lambda run: exponential(run, 1.0, 1.0),
        "exp_heun_2_x0_sde": lambda run: exponential(run, 1.0, 1.0, eta=1.0),
        "seeds_2": lambda run: exponential(run, 0.5, 1.0, eta=1.0, second_order=False),
        "seeds_3": lambda run: exponential(run, 1 / 3, 2 / 3, 1.0, eta=1.0),
        "er_sde": er_sde,
        "sa_solver": sa_solver,
        "sa_solver_pece": lambda run: sa_solver(run, pece=True),
        "uni_pc": uni_pc,
        "uni_pc_bh2": lambda run: uni_pc(run, bh2=True),
        "dpmpp_2m_sde_heun": lambda run: brownian(run, "dpmpp_2m_sde", solver_type="heun"),
        "dpmpp_2m_sde_heun_gpu": lambda run: brownian(run, "dpmpp_2m_sde", solver_type="heun"),  # the same on a CPU
    }.items()
}
ON_FLUX = {
    name: sampler(function)
    for name, function in {
        "euler_ancestral": flow_ancestral,
        "dpm_2_ancestral": lambda run: flow_ancestral(run, middle="dpm_2"),
        "dpmpp_2s_ancestral": lambda run: flow_ancestral(run, middle="dpmpp_2s"),
        "dpmpp_sde": lambda run: brownian(run, "dpmpp_sde"),
        "dpmpp_2m_sde": lambda run: brownian(run, "dpmpp_2m_sde"),
        "dpmpp_3m_sde": lambda run: brownian(run, "dpmpp_3m_sde"),
    }.items()
}
