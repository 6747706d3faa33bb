"""The shared block: names, checks, randomness, callbacks, and what a GPU asks of the samplers."""

from __future__ import annotations

import functools
import inspect
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import seeded
from torch._subclasses.fake_tensor import FakeTensorMode

import flux_comfy_pipeline
import sdxl_comfy_pipeline as pipeline_file
from sdxl_comfy_pipeline import Sampler, find_sampler, sampler_names, sampling, step_noise

THIRTEEN = "euler euler_ancestral heun dpm_2 dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral".split()
THIRTEEN += "dpmpp_sde dpmpp_2m dpmpp_2m_sde dpmpp_3m_sde".split()
SIGMAS = torch.tensor([14.6, 8.0, 4.0, 2.0, 1.0, 0.5, 0.1, 0.0])


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The ideal denoiser of x0 ~ N(0, 1): x / (1 + sigma^2)."""
    return x / (1 + sigma.view(-1, *[1] * (x.ndim - 1)) ** 2)


def noise(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=seeded(seed)) * SIGMAS[0]


def run_sampler(sampler, *arguments, **options):
    sampler = sampler if isinstance(sampler, Sampler) else find_sampler(sampler)
    return pipeline_file.run_sampler(sampler, *arguments, **options)


def function_of(name: str) -> Callable:
    return getattr(sampling, f"sample_{name}")


def test_all_thirteen_are_found():
    assert sampler_names() == flux_comfy_pipeline.sampler_names() == THIRTEEN
    for sampler in ("dpmpp_2m", "sample_dpmpp_2m", sampling.sample_dpmpp_2m):
        assert find_sampler(sampler).function is sampling.sample_dpmpp_2m


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "euler_ancestral"])
def test_bound_and_wrapped_samplers_draw_as_by_name(name):
    """A Brownian path for `*_sde`, whoever wrote it: dpmpp_sde asks for intervals that overlap.

    With white noise the samples of N(0, 1) that dpmpp_sde ends with have a standard deviation of 0.95 after 60 steps.
    """
    function, x = function_of(name), noise()
    labelled = functools.partial(function, s_noise=0.9)
    labelled.label = "soft"  # functools.partial does not join those that have attributes

    def run(sampler, **options):
        return run_sampler(find_sampler(sampler, options), gaussian, x, SIGMAS, seeded())[0]

    def copied(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, noise_sampler=None):
        return function(model, x, sigmas, callback=callback, disable=disable, eta=eta, noise_sampler=noise_sampler)

    copied.__name__ = function.__name__
    assert run(functools.partial(labelled, eta=0.7)).equal(run(name, eta=0.7, s_noise=0.9))
    assert run(copied, eta=0.7).equal(run(name, eta=0.7))


def test_an_option_that_a_callable_needs():
    def needy(model, x, sigmas, order, *, extra_args=None, callback=None, disable=None, power):
        return x

    assert find_sampler(needy, {"order": 2, "power": 1}).options == {"order": 2, "power": 1}
    with pytest.raises(ValueError, match="`sampler_kwargs`: needy needs order; it takes order, power"):
        find_sampler(needy, {"power": 1})
    with pytest.raises(ValueError, match="needy takes no x; it takes order, power"):
        find_sampler(needy, {"order": 2, "power": 1, "x": 3})


@pytest.mark.parametrize("name", THIRTEEN)
def test_sampler_is_k_diffusions_own(name, capsys):
    """Called by hand with the same noise, the function gives the same numbers, to the bit, and prints no progress."""
    x, function = noise(), function_of(name)

    def draws():
        generator = seeded(3)
        return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator)

    stochastic = "noise_sampler" in inspect.signature(function).parameters
    options = {"noise_sampler": draws()} if stochastic else {}
    if name in ("dpm_fast", "dpm_adaptive"):
        counted = {"n": 6} if name == "dpm_fast" else {}
        expected = function(gaussian, x, 0.1, SIGMAS[0].item(), disable=True, **counted, **options)
        expected = gaussian(expected, torch.tensor(0.1).expand(2))  # the step to zero, Euler's
    else:
        expected = function(gaussian, x, SIGMAS, disable=True, **options)
    options = {"noise_sampler": draws()} if stochastic else {}
    assert run_sampler(functools.partial(function, **options), gaussian, x, SIGMAS)[0].equal(expected)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", THIRTEEN)
def test_a_sampler_that_adds_no_noise_draws_none(name):
    """As in the stock loop. (k-diffusion draws in every step, and multiplies by zero.) Nor does one step to zero."""
    function = function_of(name)
    options = {"eta": 0.0} if "eta" in inspect.signature(function).parameters else {}
    generator = seeded()
    before, before_global = generator.get_state(), torch.get_rng_state()
    drawn = run_sampler(functools.partial(function, **options), gaussian, noise(), SIGMAS, generator)[0]
    run_sampler(function, gaussian, noise(), SIGMAS[[0, -1]], generator)
    assert generator.get_state().equal(before) and torch.get_rng_state().equal(before_global)
    assert drawn.shape == noise().shape


def test_step_noise_of_sde_samplers_is_brownian_with_any_suffix():
    """ComfyUI has `sample_dpmpp_sde_gpu`. Noise over an interval is that of its halves together."""

    def sample_dpmpp_sde_gpu(model, x, sigmas, noise_sampler=None): ...

    draw = step_noise(find_sampler(sample_dpmpp_sde_gpu), noise(), seeded())
    whole, halves = 8**0.5 * draw(9.0, 1.0), 2 * draw(9.0, 5.0) + 2 * draw(5.0, 1.0)
    torch.testing.assert_close(whole, halves)


def test_a_callback_gets_the_level_of_what_was_predicted():
    """With `s_churn` the network is asked above the step's first level."""
    asked, levels = [], []

    def denoiser(x, sigma):
        asked.append(sigma[0].item())
        return gaussian(x, sigma)

    def look(i, x, sigma, began, denoised):
        levels.append(began.item())
        return x

    run_sampler(functools.partial(sampling.sample_euler, s_churn=2.0), denoiser, noise(), SIGMAS, None, look)
    assert levels == asked and asked[0] > SIGMAS[0]


@pytest.mark.parametrize("name", THIRTEEN)
def test_one_step_gives_denoised(name):
    """And no warning: the Brownian tree warns of a time beyond its ends. Other numbers: test_closed_form.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = run_sampler(name, gaussian, noise(), SIGMAS[[0, -1]], seeded())[0]
    # float32 rounding of states of up to 60
    torch.testing.assert_close(y, gaussian(noise(), SIGMAS[:1].expand(2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in THIRTEEN if name != "dpm_adaptive"])  # looks at its error
def test_sampler_runs_on_gpu_tensors_without_waiting(name, monkeypatch):
    """A stand-in for CUDA tensors: it raises where a device meets another, and where the CPU waits for a value."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x, step_noise = torch.empty(2, 4, 8, 8, device="cuda"), torch.empty(2, 4, 8, 8, device="cuda")
    monkeypatch.setattr(pipeline_file, "randn_tensor", lambda *args, **kwargs: step_noise)

    function = function_of(name)
    options = {"noise_sampler": lambda sigma, sigma_next: step_noise}
    options = options if "noise_sampler" in inspect.signature(function).parameters else {}

    def denoiser(x, sigma):
        assert sigma.device.type == "cuda" and sigma.shape == (2,)
        return gaussian(x, sigma)

    y, _ = run_sampler(functools.partial(function, **options), denoiser, x, SIGMAS)
    assert y.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [name for name in THIRTEEN if name != "dpm_adaptive"])
def test_sampler_runs_on_a_gpu_without_waiting(name, device):
    """Not for its own noise either, wherever the caller's generator is."""
    x, generator = noise().to("cuda"), torch.Generator(device).manual_seed(0)
    try:

        def forbid(i, x, *rest):  # from the first step on
            torch.cuda.set_sync_debug_mode("error")
            return x

        y, _ = run_sampler(name, gaussian, x, SIGMAS, generator, forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.is_cuda and y.isfinite().all()


@pytest.mark.parametrize("name", THIRTEEN)
def test_after_step_sees_the_state_between_steps(name):
    """Called once per step, in order, with the state at the level that the step ended at."""
    function, x = function_of(name), noise()
    seen = []

    def after_step(i, x, sigma, began, denoised):
        seen.append((i, sigma.item(), began.item(), x.clone(), denoised.clone()))
        return x

    y = run_sampler(function, gaussian, x, SIGMAS, seeded(), after_step)[0]
    assert y.equal(run_sampler(function, gaussian, x, SIGMAS, seeded())[0])
    assert [one[0] for one in seen] == list(range(len(seen)))
    assert seen[-1][1] == 0 and seen[-1][3].equal(y)
    for one, following in zip(seen, seen[1:]):
        assert one[1] == following[2]  # where a step ends, the next begins
        torch.testing.assert_close(gaussian(one[3], torch.tensor(one[1]).expand(2)), following[4])
    if name not in ("dpm_fast", "dpm_adaptive"):
        torch.testing.assert_close(torch.tensor([one[2] for one in seen]), SIGMAS[:-1])


def calling_back(how: str) -> Callable:
    """A user-supplied Euler's method that calls back otherwise than k-diffusion's functions do."""

    def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        first = x
        for i in range(len(sigmas) - 1):
            if how == "before its evaluation":
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x})
            denoised = model(x * 1.0 if how == "on another tensor" else x, sigmas[i] * x.new_ones([x.shape[0]]))
            if how != "before its evaluation":
                shown = first if how == "with the first x" else x
                callback({"x": shown, "i": i, "sigma": sigmas[i], "denoised": denoised})
            x = denoised + sigmas[i + 1] / sigmas[i] * (x - denoised)
        return x

    return euler


@pytest.mark.parametrize("how", ["before its evaluation", "on another tensor", "with the first x"])
def test_changed_latents_are_refused_where_they_would_be_lost(how):
    """A step does not begin at the evaluation before the callback, or not with the tensor that is handed over."""
    with pytest.raises(ValueError, match="euler does not say"):
        run_sampler(calling_back(how), gaussian, noise(), SIGMAS, None, lambda i, x, *_: x * 2)


def test_a_callback_gets_the_steps_state_whatever_the_sampler_calls_back_with():
    seen, x = [], noise()

    def look(i, x, sigma, began, denoised):
        seen.append((x, sigma, denoised))
        return x

    run_sampler(calling_back("with the first x"), gaussian, x, SIGMAS, None, look)
    for found, now, then in zip(seen, SIGMAS[:-1], SIGMAS[1:], strict=True):
        denoised = gaussian(x, now.expand(2))
        torch.testing.assert_close(found, (x, now, denoised))
        x = denoised + then / now * (x - denoised)


def test_latents_that_are_not_finite_are_not_changed_latents():
    sampler, same = calling_back("with the first x"), lambda i, x, *_: x * 1
    y, _ = run_sampler(sampler, lambda x, sigma: x * float("nan"), noise(), SIGMAS, None, same)
    assert y.isnan().all()


def ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0):
    """User-supplied: it loops over `sampling.trange`, and draws from torch's global generator."""
    for i in sampling.trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]))
        callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
        time.sleep(1e-3)  # another thread goes on here, if it may
        down, up = sampling.get_ancestral_step(sigmas[i], sigmas[i + 1], eta)
        x = x + (x - denoised) / sigmas[i] * (down - sigmas[i]) + up * torch.randn_like(x)
    return x


def test_a_callable_that_loops_over_trange_is_followed():
    """Its callback sees what the one of k-diffusion's function sees, and latents that it changes take effect."""

    def run(sampler):
        seen = []

        def after_step(i, x, sigma, began, denoised):
            seen.append(torch.cat([x, sigma.expand(x.shape), began.expand(x.shape), denoised]))
            return x * 0.5 if i == 3 else x

        return run_sampler(sampler, gaussian, noise(), SIGMAS, seeded(), after_step)[0], torch.stack(seen)

    for found, expected in zip(run(find_sampler(ancestral, {"eta": 0.0})), run("euler"), strict=True):
        torch.testing.assert_close(found, expected)


CHURNING = functools.partial(sampling.sample_heun, s_churn=5.0)


@pytest.mark.parametrize("sampler", [ancestral, CHURNING, "dpmpp_sde"], ids=["user-supplied", "s_churn", "brownian"])
def test_threads_draw_what_they_draw_alone(sampler):
    meeting = threading.Barrier(2, timeout=60)

    def run(seed, meet=lambda: None):
        def denoiser(x, sigma):
            meet()  # both threads are within their runs
            return gaussian(x, sigma)

        return run_sampler(sampler, denoiser, noise(), SIGMAS, seeded(seed))[0]

    alone = [run(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = pool.map(lambda seed: run(seed, meeting.wait), range(2))
    assert all(one.equal(other) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("sampler", [ancestral, CHURNING], ids=["user-supplied", "s_churn"])
@pytest.mark.parametrize("module", [pipeline_file, flux_comfy_pipeline], ids=["the same file", "another copy"])
def test_a_callback_may_sample(sampler, module):
    """Each run, the one within the other too, counts its own steps and draws what it draws alone."""

    def run(seed, after_step):
        seen = []

        def count(i, x, *rest):
            seen.append(i)
            return after_step(i, x, *rest)

        arguments = module.find_sampler(sampler), gaussian, noise(), SIGMAS, seeded(seed), count
        end = (pipeline_file if seed else module).run_sampler(*arguments)[0]
        assert seen == list(range(len(SIGMAS) - 1))
        return end

    inner, outer = (run(seed, lambda i, x, *rest: x) for seed in range(2))

    def sample(i, x, *rest):
        assert run(0, lambda i, x, *rest: x).equal(inner)
        return x

    assert run(1, sample).equal(outer)


@pytest.mark.parametrize("calls_back", [True, False])
def test_interrupt_of_a_callable(calls_back):
    """Whether or not it calls back, the latents are those that the third evaluation left."""
    asked = []

    def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return sampling.sample_euler(model, x, sigmas, callback=callback if calls_back else None, disable=True)

    def denoiser(x, sigma):
        asked.append(x)
        return gaussian(x, sigma)

    y, sigma = run_sampler(euler, denoiser, noise(), SIGMAS, interrupted=lambda: len(asked) == 3)
    assert sigma == SIGMAS[3]
    torch.testing.assert_close(y, sampling.sample_euler(gaussian, noise(), SIGMAS[:4], disable=True))


def test_tolerances_end_the_steps():
    """A step's error may be max(atol, rtol |x|), so that one of them is enough, however it was given."""
    bound = functools.partial(sampling.sample_dpm_adaptive, rtol=0.0)
    assert run_sampler(find_sampler(bound, {"atol": 0.5}), gaussian, noise(), SIGMAS)[0].isfinite().all()
    for sampler, options in ((bound, {"atol": 0.0}), (functools.partial(bound, atol=float("nan")), {})):
        with pytest.raises(ValueError, match="rtol or atol has to be above 0"):
            find_sampler(sampler, options)


@pytest.mark.parametrize("passes_on", [True, False], ids=["passed on", ""])  # by a callable without `noise_sampler`
@pytest.mark.parametrize(
    "name, options",
    [("euler", {"s_churn": 1.0}), ("euler_ancestral", {"eta": 0.5}), ("dpmpp_2m_sde", {"noise_sampler": None})]
    + [("dpmpp_2m_sde", {"noise_sampler": lambda sigma, sigma_next: torch.randn_like(noise())})],
)
def test_noise_of_a_callable_follows_the_generator(name, options, passes_on):
    function, same = function_of(name), lambda i, x, *_: x * 1.0
    passing = (lambda model, x, sigmas, **options: function(model, x, sigmas, **options)) if passes_on else function
    drawn = []
    for seed in range(2):
        torch.manual_seed(seed)
        drawn += run_sampler(functools.partial(passing, **options), gaussian, noise(), SIGMAS, seeded(), same)[:1]
    assert drawn[0].equal(drawn[1])


def test_noise_that_is_zero_may_be_written_on():
    x = noise()
    own = {"eta": 0.0, "noise_sampler": lambda sigma, sigma_next: torch.randn_like(x).mul_(2.0)}
    assert run_sampler(find_sampler("euler_ancestral", own), gaussian, x, SIGMAS)[0].isfinite().all()

    def writing(model, x, sigmas, extra_args=None, callback=None, disable=None):
        torch.randn_like(x.repeat(2, 1, 1, 1)).mul_(0.1)
        return sampling.sample_euler(model, x, sigmas, callback=callback, disable=True)

    assert run_sampler(writing, gaussian, noise(), SIGMAS)[0].isfinite().all()


def test_a_callable_may_have_any_attributes_and_options():
    def sampler(model, x, sigmas, **options):
        return x * options.get("sigma_min", 1.0)

    sampler.keywords = ["a"]
    bound = find_sampler(sampler, {"sigma_min": 0.5})
    assert run_sampler(bound, gaussian, noise(), SIGMAS)[0].equal(noise() * 0.5)


@pytest.mark.parametrize("name, sigmas", [("euler", SIGMAS), ("dpmpp_2m", SIGMAS[[0, -1]])], ids=["steps", "one step"])
@pytest.mark.parametrize("draw", [torch.randn_like, lambda x: torch.randn(x.shape)], ids=["randn_like", "randn"])
def test_what_a_wrapper_draws_follows_the_generator(name, sigmas, draw):
    """`functools.wraps` copies name, module and signature, but it is not k-diffusion's function: it runs itself.

    torch's global generator is neither needed nor moved. The network and the callback see it as they left it.
    """
    function, x, added = function_of(name), noise(), []

    @functools.wraps(function)
    def wrapper(model, x, sigmas, **options):
        added.append(draw(x))
        return function(model, x + added[-1], sigmas, **options)

    def run(seed, global_seed):
        def unmoved(x):
            assert torch.rand(()).equal(torch.rand((), generator=expected))
            return x

        torch.manual_seed(global_seed)
        expected, denoiser = seeded(global_seed), lambda x, sigma: gaussian(unmoved(x), sigma)
        drawn = run_sampler(wrapper, denoiser, x, sigmas, seeded(seed), lambda i, x, *_: unmoved(x))[0]
        assert torch.get_rng_state().equal(expected.get_state())
        torch.testing.assert_close(drawn, run_sampler(function, gaussian, x + added[-1], sigmas)[0])
        return drawn

    assert run(3, 1).equal(run(3, 2)) and not run(4, 1).equal(run(3, 1))
    assert 0.9 < added[0].std() < 1.1


@pytest.mark.parametrize(
    "end, what",
    [(lambda x: None, "NoneType"), (lambda x: x.numpy(), "ndarray"), (lambda x: x[:, :1], r"\[2, 1, 8, 8\]")],
    ids=["nothing", "array", "shape"],
)
def test_a_callable_has_to_return_latents(end, what):
    with pytest.raises(TypeError, match=rf"shape \[2, 4, 8, 8\], but returned {what}"):
        run_sampler(lambda model, x, sigmas: end(x), gaussian, noise(), SIGMAS)
