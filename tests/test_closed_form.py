"""Every sampler, through both pipelines, against a model with a known exact solution.

The checks have to pass for the pipelines as they are, and to fail for pipelines with planted faults.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from closed_form import PassesVelocity, call, evaluations, solve_ode
from conftest import relative, seeded

from flux_comfy_pipeline import SCHEDULES, find_sampler, sampler_names
from parity.exact import KNOWN, Transformer, UNet, flux_pipeline, sdxl_pipeline, sliced_wasserstein

PROCESSES = ("sdxl", "flow", "ve")  # SDXL's, and FLUX's in both parameterizations
NETWORKS = {"sdxl": UNet, "flow": Transformer, "ve": Transformer}


def takes(sampler: str, option: str) -> bool:
    return option in find_sampler(sampler).arguments


DETERMINISTIC = [name for name in sampler_names() if not takes(name, "noise_sampler")]
# each with its noise: eta is 1 by default but for the two that place their own levels
STOCHASTIC = {name: {"eta": 1.0} for name in sampler_names() if takes(name, "noise_sampler")}
STOCHASTIC |= {name: {"s_churn": 5.0} for name in DETERMINISTIC if takes(name, "s_churn")}


@functools.cache
def pipeline(process: str, dtype: torch.dtype, network: Any = None, **options: Any) -> Any:
    make = sdxl_pipeline if process == "sdxl" else flux_pipeline
    return make(KNOWN, dtype, network or NETWORKS[process], **options)


@functools.cache
def truth(seed: int = 0) -> torch.Tensor:
    return KNOWN.sample(4000, seeded(seed))


# lms is of order 4, but its first three steps are of orders 1, 2 and 3. The first, Euler's, leaves an error of h^2
# once, which the others carry to the end: order 2 in all. dpm_fast takes steps of order 3; with n = 2 (mod 3)
# evaluations its last is of order 2, which leaves an error of h^3 once, so that the whole keeps order 3.
ORDERS = {"euler": 1, "heun": 2, "dpm_2": 2, "dpmpp_2m": 2, "lms": 2, "dpm_fast": 3}
STEPS = {name: (65, 128) if order < 3 else (128, 257) for name, order in ORDERS.items()}  # dpm_fast's are 2 (mod 3)


def check_order(process: str, sampler: str, network: type | None = None, disturb: Callable = lambda sampler: sampler):
    """The error at a positive level falls as steps^-order, and Euler's method is what it is by hand.

    The last evaluation, that of the step to zero, sees the state at the last positive level. Between 65 and 128 steps
    the measured order is within 0.2: the next term is h of the leading one, with h = log(2 / 0.4) / 65 = 0.025 and
    constants of up to four. dpm_fast takes three evaluations a step, so it needs more.
    """
    pipe = pipeline(process, torch.float64, network, **({} if process == "sdxl" else {"mu": 0.0}))
    errors, counts = [], STEPS[sampler]
    for steps in counts:
        sigmas = np.geomspace(2.0, 0.4, steps + 1)
        sigmas = np.append(sigmas if process == "sdxl" else sigmas / (1 + sigmas), 0.0)
        options = {} if process == "sdxl" else {"parameterization": process}
        function = disturb(find_sampler(sampler).function)
        seen, _ = evaluations(pipe, 4, 4, sampler=function, sigmas=sigmas.tolist(), generator=seeded(), **options)
        (sigma, y), (sigma_end, y_end) = seen[0], seen[-1]
        assert sigma == pytest.approx(2.0, rel=1e-6) and sigma_end == pytest.approx(0.4, rel=1e-6)
        errors.append(relative(y_end, solve_ode(KNOWN, y, sigma, sigma_end)))
        if sampler == "euler":
            for (sigma, y), (sigma_next, y_next) in itertools.pairwise(seen):
                by_hand = y + (sigma_next - sigma) * (y - KNOWN.split(y, 1.0, sigma)[0]) / sigma
                assert relative(y_next, by_hand) < 1e-6  # the schedulers keep their levels in float32
    order = math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])
    assert order == pytest.approx(ORDERS[sampler], abs=0.2), (errors, order)


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize("process", PROCESSES)
def test_convergence_order(process, sampler):
    if process == "flow" and takes(sampler, "sigma_min"):
        pytest.skip("dpm_fast is exact where sigma multiplies the noise of y = x0 + sigma noise: only in 've'")
    check_order(process, sampler)


def distances(samples: torch.Tensor, others: torch.Tensor | None = None) -> dict[str, float]:
    """How far samples (n, d) are from true ones, from the mean and from the covariance that they should have."""
    samples, covariance = samples.double(), KNOWN.covariance
    return {
        "distribution": sliced_wasserstein(samples, truth() if others is None else others),
        "mean": (samples.mean(0) - KNOWN.mean).norm().item() / covariance.trace().sqrt().item(),
        "covariance": relative(torch.cov(samples.T), covariance),
    }


@functools.cache
def true_distances() -> dict[str, float]:
    """The same of true samples, the mean over twelve pairs of sets."""
    pairs = [distances(truth(2 * i + 1), truth(2 * i + 2)) for i in range(12)]
    return {name: float(np.mean([pair[name] for pair in pairs])) for name in pairs[0]}


def sample(
    process: str, sampler: str, network: Any = None, disturb: Any = lambda sampler: sampler, parameterization="auto"
):
    """4,000 samples at 50 steps, SDXL's Karras levels or FLUX's own with shift 1.15, and how they came about."""
    options = {"schedule": "karras"} if process == "sdxl" else {"parameterization": parameterization}
    options |= {"sampler": disturb(find_sampler(sampler).function), "sampler_kwargs": STOCHASTIC[sampler]}
    pipe = pipeline(process, torch.float32, network)
    seen, samples = evaluations(pipe, 50, 80, num_inference_steps=50, generator=seeded(), **options)
    return seen, samples[0]


def check_distribution(samples: torch.Tensor) -> None:
    """Twice the distance of true samples leaves the discretization as much as chance."""
    for name, distance in distances(samples).items():
        assert distance < 2 * true_distances()[name], (name, distance, true_distances()[name])


def check_step_noise(seen: list[tuple[float, torch.Tensor]]) -> None:
    """At each evaluation y = x0 + sigma noise has the variance of x0 plus sigma^2, the mean over dimensions.

    Chance is 0.6 % (64,000 numbers); Euler's method at 50 steps lacks 6 % at worst, s_churn, and the other samplers
    less. (FLUX's t = 1, where there is no y, is left out.)
    """
    for sigma, y in seen:
        if sigma < 1e6:
            expected = KNOWN.covariance.trace().item() / KNOWN.dimensions + sigma**2
            assert torch.cov(y[0].T).trace().item() / KNOWN.dimensions == pytest.approx(expected, rel=0.08), sigma


@pytest.mark.parametrize("sampler", STOCHASTIC)
@pytest.mark.parametrize("process", ["sdxl", "ve"])
def test_distribution_and_step_noise(process, sampler):
    """ "auto" takes "ve" for all of them on FLUX."""
    seen, samples = sample(process, sampler)
    check_distribution(samples)
    check_step_noise(seen)


def ends(process: str) -> tuple[float, float]:
    """sigma where 20 steps begin and at their last positive level, by hand."""
    if process == "sdxl":
        alphas_cumprod = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        sigmas = np.sqrt(1 / alphas_cumprod - 1)
        return sigmas[-1], sigmas[0]
    sigmas = math.exp(1.15) * np.array([19, 18, 1]) / (20 - np.array([19, 18, 1]))  # t / (1 - t) is shifted by a factor
    return sigmas[0] ** 2 / sigmas[1], sigmas[2]


def check_adaptive(process: str, network: type | None = None, disturb: Callable = lambda sampler: sampler) -> None:
    """dpm_adaptive's error against the ODE at least halves with a quarter of rtol; it takes more evaluations."""
    pipe, (sigma, sigma_end) = pipeline(process, torch.float32, network), ends(process)
    found = []
    for rtol in (0.2, 0.05, 0.0125):
        options = {"rtol": rtol, "atol": 0.15 * rtol}  # as far apart as its defaults
        arguments = {"sampler": disturb(find_sampler("dpm_adaptive").function), "sampler_kwargs": options}
        arguments |= {"schedule": "karras"} if process == "sdxl" else {}
        seen, _ = evaluations(pipe, 4, 4, num_inference_steps=20, generator=seeded(), **arguments)
        found.append((len(seen), relative(seen[-1][1], solve_ode(KNOWN, seen[0][1], sigma, sigma_end))))
    (first, worst), (second, middle), (third, best) = found
    assert worst > 2 * middle > 4 * best and first < second < third, found


@pytest.mark.parametrize("process", ["sdxl", "ve"])
def test_adaptive(process):
    check_adaptive(process)


class PassesEpsilon(UNet):
    """A planted fault: the pipeline's `denoised` becomes the predicted epsilon."""

    def prediction(self, y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (y - super().prediction(y, sigma)) / sigma


def limited(function: Callable, most: int = 2000) -> Callable:
    """The denoiser. AssertionError if a sampler calls it more than `most` times."""
    count = itertools.count()

    def model(x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        assert next(count) < most, "no end"
        return function(x, sigma, **extra)

    return model


def counted(sampler: Callable) -> Callable:
    return functools.wraps(sampler)(lambda model, *levels, **options: sampler(limited(model), *levels, **options))


def one_step_late(sampler: Callable) -> Callable:
    """The network gets the next level in place of that of the state, or half that where there is none."""

    @functools.wraps(sampler)
    def run(model: Callable, x: torch.Tensor, *levels: Any, **options: Any) -> torch.Tensor:
        sigmas = levels[0] if levels else torch.tensor([options["sigma_max"], options["sigma_min"]])

        def late(x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
            below = sigmas[(sigmas < sigma[0] * 0.999) & (sigmas > 0)] if levels else [sigma[0] / 2]
            return model(x, sigma.new_full(sigma.shape, below[0] if len(below) else sigma[0] / 2), **extra)

        return sampler(limited(late), x, *levels, **options)

    return run


def in_flow_coordinates(sampler: Callable) -> Callable:
    """The sampler sees t = sigma / (1 + sigma) and x = y / (1 + sigma), and adds its noise to that."""

    @functools.wraps(sampler)
    def run(model: Callable, x: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> torch.Tensor:
        def at(x: torch.Tensor, t: torch.Tensor, **extra: Any) -> torch.Tensor:
            return model(x / (1 - t[0]), t / (1 - t), **extra)

        return sampler(at, x / (1 + sigmas[0]), sigmas / (1 + sigmas), **options)

    return run


PASSES = {"sdxl": PassesEpsilon, "flow": PassesVelocity, "ve": PassesVelocity}


def fails(check: Callable, *arguments: Any) -> None:
    with pytest.raises(AssertionError):
        check(*arguments)


def faults(process: str) -> dict[str, tuple[type | None, Callable]]:
    return {"network as it is": (PASSES[process], counted), "one step late": (None, one_step_late)}


@pytest.mark.parametrize("fault", ["network as it is", "one step late"])
@pytest.mark.parametrize("process, sampler", zip(itertools.cycle(PROCESSES), ORDERS))
def test_order_shows_a_fault(process, sampler, fault):
    fails(check_order, process, sampler, *faults(process)[fault])


FLOW_NOISE = {"sdxl": {"disturb": in_flow_coordinates}, "ve": {"parameterization": "flow"}}
FAULTY = [
    *((process, sampler, {"network": PASSES[process]}, True) for process, sampler in (
        ("sdxl", "heun"), ("ve", "euler_ancestral"), ("ve", "dpmpp_sde"), ("sdxl", "dpmpp_3m_sde"),
        ("ve", "dpm_fast"))),
    # "auto" guards against noise in FLUX's own coordinates, for every sampler with noise
    *((process, sampler, FLOW_NOISE[process], True) for process, sampler in (
        ("sdxl", "dpmpp_2m_sde"), ("ve", "euler"), ("ve", "dpm_2_ancestral"), ("ve", "dpmpp_sde"))),
    # one step late is an error of first order: among 50 steps samplers of second order alone show it at the end
    *((process, sampler, {"disturb": one_step_late}, second) for process, sampler, second in (
        ("sdxl", "dpm_2_ancestral", True), ("ve", "dpmpp_2s_ancestral", True), ("sdxl", "euler", False),
        ("ve", "dpmpp_2m_sde", False))),
]  # fmt: skip


@pytest.mark.parametrize("process, sampler, fault, at_the_end", FAULTY)
def test_distribution_and_step_noise_show_a_fault(process, sampler, fault, at_the_end):
    seen, samples = sample(process, sampler, **fault)
    fails(check_step_noise, seen)
    if at_the_end:
        fails(check_distribution, samples)


@pytest.mark.parametrize("process, fault", [("sdxl", "network as it is"), ("ve", "one step late")])
def test_adaptive_shows_a_fault(process, fault):
    fails(check_adaptive, process, *faults(process)[fault])


STEP_COUNTS = [{"num_inference_steps": n} for n in (1, 2, 3, 20)]
SIGMA_LISTS = [[1.0, 0.5, 0.2], [0.9, 0.5, 0.0], [1.0], [0.5], [1.0, 0.999, 0.998, 0.01], [1.0, 1e-4]]
GRIDS = [{"sigmas": t} for t in SIGMA_LISTS]
GRIDS += [{"schedule": name, "num_inference_steps": n} for name in SCHEDULES for n in (1, 20)]


@pytest.mark.parametrize("sampler", sampler_names())
def test_every_sampler_at_every_grid(sampler):
    """No NaN and no warning at any number of steps, shift, schedule, eta and s_churn, for a bfloat16 network too."""
    options = [{}]
    options += [{"eta": eta} for eta in (0.0, 1e-4, 1.0) if takes(sampler, "eta")]
    options += [{"s_churn": churn} for churn in (0.01, 40.0) if takes(sampler, "s_churn")]
    product = itertools.product
    calls = [("auto", torch.float32, 1.15, *rest) for rest in product(options, STEP_COUNTS)]
    calls += [(p, torch.float32, 1.15, {}, grid) for p, grid in product(("flow", "ve"), STEP_COUNTS)]
    calls += [(p, torch.float32, 1.15, options[-1], grid) for p, grid in product(("auto", "flow", "ve"), GRIDS)]
    calls += [
        ("auto", *rest) for rest in product((torch.float32, torch.bfloat16), (0.0, 2.5), options[-1:], STEP_COUNTS)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for parameterization, dtype, mu, kwargs, grid in calls:
            arguments = {"parameterization": parameterization, "sampler_kwargs": kwargs, **grid}
            latents = call(pipeline("ve", dtype, mu=mu), 1, 2, sampler=sampler, generator=seeded(), **arguments)
            assert latents.isfinite().all() and latents.dtype == torch.float32, (dtype, mu, arguments)


def test_evaluations_are_as_many_as_the_readme_says():
    pipe, names = pipeline("ve", torch.float32), sampler_names()
    counts = {name: len(evaluations(pipe, 1, 1, sampler=name, num_inference_steps=20)[0]) for name in names}
    once = {"euler", "euler_ancestral", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpm_fast"}
    assert {name for name, count in counts.items() if count == 20} == once
    assert {name for name, count in counts.items() if count == 39} == set(counts) - once - {"dpm_adaptive"}
