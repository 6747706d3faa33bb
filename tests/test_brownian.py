"""Step noise of the `*_sde` samplers: one Brownian path for each seed, whatever levels are drawn first."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from sdxl_comfy_pipeline import brownian_noise, find_sampler, named_sigmas, run_sampler, sampling

SHAPE = (1, 4, 96, 96)
N = math.prod(SHAPE)


def noise(seed: int = 0, x: torch.Tensor | None = None):
    return brownian_noise(torch.empty(SHAPE) if x is None else x, [seed] * (1 if x is None else len(x)), "cpu")


def step_noise(noise_sampler, sigma: float, sigma_next: float) -> torch.Tensor:
    return noise_sampler(torch.tensor(sigma), torch.tensor(sigma_next))


def levels(steps: int, lowest: float = 0.0292, highest: float = 14.6146) -> list[float]:
    """Karras levels of SDXL, with the midpoints in log sigma that dpmpp_sde also asks for."""
    sigmas = named_sigmas("karras", steps, lowest, highest)[:-1].tolist()
    middles = [math.sqrt(a * b) for a, b in zip(sigmas, sigmas[1:])]
    return sorted([*sigmas, *middles], reverse=True)


# the closest of any named schedule: ComfyUI's linear_quadratic begins with 50 of 100 steps in 2.5 % of sigma
CLOSE_TOGETHER = [14.6146 * (1 - 0.025 * i / 50) for i in range(16)]


@pytest.mark.parametrize(
    "sigmas", [levels(8), levels(8, 1e-4, 4096.0), CLOSE_TOGETHER], ids=["SDXL", "wide", "close together"]
)
def test_noise_is_that_of_a_brownian_motion(sigmas):
    """Unit variance, Gaussian, and independent over disjoint intervals, over pixels and over seeds that are neighbours.

    4.5 standard errors: with about 500 comparisons, one false alarm in 300 sets of seeds. These seeds are fixed.
    """
    bound = 4.5 / math.sqrt(N)
    drawn = [step_noise(noise(seed), a, b).flatten() for seed in (0, 1) for a, b in zip(sigmas, sigmas[1:])]
    for one in drawn:
        assert abs(one.mean()) < bound
        assert abs(one.var() - 1) < bound * math.sqrt(2)  # the variance of z^2 is 2
        assert abs((one**4).mean() - 3) < bound * math.sqrt(96)  # and of z^4 it is 96
        assert abs((one * one.roll(1)).mean()) < bound
    correlations = torch.stack(drawn) @ torch.stack(drawn).T / N
    assert (correlations - correlations.diag().diag()).abs().max() < bound
    assert stats.kstest(torch.cat(drawn).numpy(), "norm").pvalue > 1e-3


def test_overlapping_intervals_correlate_as_in_k_diffusion():
    """dpmpp_sde asks for (t, s) and (t, t_next). Their correlation is that of k-diffusion's own tree."""
    t, s, t_next = 4.0, 2.0, 1.0
    expected = math.sqrt((t - s) / (t - t_next))
    tree = sampling.BrownianTreeNoiseSampler(torch.empty(SHAPE), 0.02, 15.0, seed=[3])
    for noise_sampler in (noise(3), tree):
        correlation = (step_noise(noise_sampler, t, s) * step_noise(noise_sampler, t, t_next)).mean()
        assert correlation == pytest.approx(expected, abs=4.5 * math.sqrt(2 / N))


def test_increments_add_up():
    """W(a, b) + W(b, c) = W(a, c), to float32's rounding of a sum of 22 terms as large as sqrt(a)."""
    one, a, b, c = noise(), 9.0, 5.0, 2.5
    parts = step_noise(one, a, b) * math.sqrt(a - b) + step_noise(one, b, c) * math.sqrt(b - c)
    whole = step_noise(one, a, c) * math.sqrt(a - c)
    torch.testing.assert_close(parts, whole, rtol=0, atol=22 * 2**-24 * 5 * math.sqrt(a))


def test_path_does_not_depend_on_other_draws():
    """Bit for bit: the noise between two levels is the same at any number of steps, in any order, and backwards."""
    fresh = step_noise(noise(), 3.0, 0.7)
    for steps in (10, 20, 57):
        walked = noise()
        sigmas = levels(steps)
        for a, b in zip(sigmas, sigmas[1:]):
            step_noise(walked, a, b)
            if a > 3.0 > b:
                assert step_noise(walked, 3.0, 0.7).equal(fresh)
        assert step_noise(walked, 3.0, 0.7).equal(fresh)
        assert step_noise(walked, 0.7, 3.0).equal(-fresh)


def test_a_step_begins_where_another_ended(monkeypatch):
    """A step then draws only the normals of one level that are not cached yet: 346 in all, else 681."""
    draws, normal_ = [], torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda x, **options: draws.append(x) or normal_(x, **options))
    draw, sigmas = noise(x=torch.empty(1, 2)), named_sigmas("karras", 25, 0.0292, 14.6146)[:-1]
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        draw(sigma, sigma_next)
    assert len(draws) < 22 + 15 * (len(sigmas) - 1)


def test_each_image_has_its_own_path():
    x = torch.empty(3, *SHAPE[1:])
    together = brownian_noise(x, [5, 6, 2**63 - 2], "cpu")
    for i, seed in enumerate([5, 6, 2**63 - 2]):
        assert step_noise(together, 3.0, 2.0)[i].equal(step_noise(noise(seed), 3.0, 2.0)[0])
    assert step_noise(noise(5, x.double()[:1]), 3.0, 2.0).dtype == torch.float64


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_more_steps_follow_the_same_path(name):
    """The sample of one seed converges as steps are added, although the ends move: SDXL's lowest, FLUX's highest.

    x0 is N(0, 0.2^2). Two samples of independent paths are sqrt(2) of its spread apart. On one path the error is at
    worst of order 1/2 in the step: four times as many steps come about twice as near. 1.7 leaves the first ones room.
    """

    def ideal(x, sigma):
        return x * 0.04 / (0.04 + sigma.view(-1, 1, 1, 1) ** 2)

    start = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))

    def sample(steps: int, seed: int) -> torch.Tensor:
        sigmas = named_sigmas("karras", steps, 0.02 + 0.2 / steps, 10 + steps / 8)
        generator = torch.Generator().manual_seed(seed)
        return run_sampler(find_sampler(name), ideal, start * sigmas[0], sigmas, generator)[0] / 0.2

    finest = sample(320, 1)
    few, many, other = [(sample(*run) - finest).pow(2).mean().sqrt().item() for run in ((20, 1), (80, 1), (320, 2))]
    assert other == pytest.approx(math.sqrt(2), rel=0.05)
    assert many < few / 1.7 and few < 0.6 * other


def test_the_path_at_zero():
    """A user-supplied sampler may ask for the noise of the last step: W(0) is W(2^-64) to 1e-10."""
    draw = noise()
    torch.testing.assert_close(draw(1.0, 0.0), draw(1.0, 2.0**-64), rtol=0, atol=1e-6)
