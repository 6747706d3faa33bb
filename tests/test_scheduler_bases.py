"""KDiffusionScheduler over each kind of base: k-diffusion's functions over the same network, to 1e-5."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from conftest import relative, seeded
from pretend_mps import PretendMps, placed
from small_pipelines import LevelNoise, flux_image, random, run_over_k_diffusion, sd3_image, sd_inpaint
from test_scheduler import BETAS, CLOSE, SAMPLERS, fixed_noise

from scheduling_k_diffusion import KDiffusionScheduler, external, find_sampler, sampling

STEPS = 5
V = {**BETAS, "prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
CONTINUOUS = {**V, "timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
UNCLIPPED = {"clip_sample": False, "steps_offset": 1}


def network(x: torch.Tensor, t: torch.Tensor, **_: Any) -> torch.Tensor:
    """It depends on the timestep, whatever that counts."""
    return (x * 1.3 + (t.double() / 97).sin().view(-1, *[1] * (x.ndim - 1))).sin()


def of_betas(scheduler: Any) -> Any:
    """k-diffusion's own wrapper of the network."""
    alphas = scheduler.alphas_cumprod.double().clamp(min=2**-24)
    kind = "V" if scheduler.config.prediction_type == "v_prediction" else "Eps"
    return getattr(external, f"Discrete{kind}DDPMDenoiser")(network, alphas, quantize=False)


def of_logarithm(scheduler: Any) -> Any:
    """The preconditioning of Karras et al. 2022, Table 1, with c_noise = ln(sigma) / 4; or its sign turned, for v."""
    data = scheduler.config.get("sigma_data", 1.0)
    sign = -1 if scheduler.config.prediction_type == "v_prediction" else 1

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        norm = (s**2 + data**2).sqrt()
        return data**2 / norm**2 * x + sign * s * data / norm * network(x / norm, sigma.log() / 4)

    return denoise


def of_cosine(scheduler: Any) -> Any:
    """As Stable Audio's: the timestep is atan(sigma) 2 / pi."""
    return external.VDenoiser(network)


def of_flow(scheduler: Any) -> Any:
    """x0 = x - t v. Mochi's network gets 1 - t, and predicts -v."""
    inverted = scheduler.config.get("invert_sigmas")

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        velocity = -network(x, 1000 * (1 - t)) if inverted else network(x, 1000 * t)
        return x - t.view(-1, *[1] * (x.ndim - 1)) * velocity

    return denoise


BASES = {
    "epsilon": (diffusers.EulerDiscreteScheduler(**BETAS), of_betas),
    "v": (diffusers.HeunDiscreteScheduler(**V), of_betas),
    "zero SNR": (diffusers.EulerDiscreteScheduler(**ZERO_SNR), of_betas),
    "vp": (diffusers.DDIMScheduler(**BETAS, **UNCLIPPED), of_betas),
    "vp, zero SNR": (diffusers.DDIMScheduler(**ZERO_SNR, clip_sample=False), of_betas),
    "multistep": (diffusers.DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing"), of_betas),
    "continuous": (diffusers.EulerDiscreteScheduler(**CONTINUOUS), of_logarithm),
    "EDM": (diffusers.EDMEulerScheduler(), of_logarithm),
    "EDM, v": (diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0), of_logarithm),
    "EDM, cosine": (diffusers.CosineDPMSolverMultistepScheduler(sigma_data=1.0, sigma_max=50.0), of_cosine),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), of_flow),
    "flow, inverted": (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), of_flow),
    "flow, UniPC": (diffusers.UniPCMultistepScheduler(**FLOW), of_flow),
}


def ends(base: Any) -> tuple[float, float]:
    """The lowest and the highest level that the network was trained with, or that the config names."""
    if hasattr(base, "alphas_cumprod") and not base.config.get("use_flow_sigmas"):
        sigmas = (1 / base.alphas_cumprod.double().clamp(min=2**-24) - 1).sqrt()
        return base.config.get("sigma_min") or float(sigmas[0]), base.config.get("sigma_max") or float(sigmas[-1])
    if "sigma_data" in base.config:
        return base.config.sigma_min, base.config.sigma_max
    shift = base.config.get("flow_shift", base.config.get("shift"))
    return shift / (shift + 9999), 1.0


def ways(name: str, base: Any) -> dict[str, tuple[dict[str, Any], dict[str, Any], torch.Tensor]]:
    """{a way to name levels: (options of the scheduler, arguments of `set_timesteps`, the levels)}."""
    stock = type(base).from_config(base.config)
    stock.set_timesteps(STEPS)
    if name.startswith("vp"):
        sigmas = (1 / stock.alphas_cumprod.double().clamp(min=2**-24) - 1).sqrt()[stock.timesteps]
    else:
        sigmas = stock.sigmas.double().unique_consecutive()[:STEPS]
        sigmas = 1 - sigmas if base.config.get("invert_sigmas") else sigmas
    explicit = [0.93, 0.61, 0.6, 0.33, 0.12] if "flow" in name else [13.1, 4.3, 4.2, 1.1, 0.2]
    found = {
        "its own": ({}, {}, sampling.append_zero(sigmas)),
        "karras": ({"schedule": "karras"}, {}, sampling.get_sigmas_karras(STEPS, *ends(base)).double()),
        "a list": ({"schedule": [*explicit, 0.05]}, {}, torch.tensor([*explicit, 0.05]).double()),
    }
    if base.config.get("use_flow_sigmas"):
        del found["its own"]  # whose timesteps it cuts off to whole numbers, for the network too
    if type(base).__name__ == "EulerDiscreteScheduler":
        found["sigmas"] = ({}, {"sigmas": [*explicit, 0.05]}, torch.tensor([*explicit, 0.05]).double())
    elif type(base).__name__ == "FlowMatchEulerDiscreteScheduler":
        ts, shift = torch.tensor(explicit), base.config.shift
        found["sigmas"] = ({}, {"sigmas": explicit}, sampling.append_zero(shift * ts / (1 + (shift - 1) * ts)).double())
    return found


def k_diffusions(
    sampler: str, model: Any, x: torch.Tensor, sigmas: torch.Tensor, noise: dict[str, Any]
) -> torch.Tensor:
    function = getattr(sampling, f"sample_{sampler}")
    if sampler != "dpm_fast":
        return function(model, x, sigmas, disable=True, **noise)
    positive = sigmas[sigmas > 0]  # its last of n evaluations goes to zero
    x = function(model, x, positive[-1], positive[0], len(positive) - 1, disable=True, **noise)
    return x if sigmas[-1] > 0 else model(x, positive[-1:])


@pytest.fixture
def double():
    """k-diffusion makes numbers of torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", BASES)
def test_every_sampler_is_k_diffusions(double, name):
    """In float64, with step noise that depends on the levels alone. Over other levels each third sampler."""
    base, denoiser = BASES[name]
    vp = name.startswith(("vp", "multistep"))  # whose latents are divided by sqrt(1 + sigma^2)
    x = random(1, 2, 3, 3).double()
    for i, (way, (options, arguments, sigmas)) in enumerate(ways(name, base).items()):
        for sampler in SAMPLERS if i == 0 else SAMPLERS[i::3]:
            noisy = "noise_sampler" in find_sampler(sampler).arguments
            noise = {"noise_sampler": fixed_noise(x, 3)} if noisy else {}
            scheduler = KDiffusionScheduler.from_scheduler(
                base, sampler=sampler, sampler_kwargs=noise, parameterization="flow", **options
            )
            scheduler.set_timesteps(**(arguments or {"num_inference_steps": STEPS}))
            sample = x * float(scheduler.init_noise_sigma)
            start = sample * float((1 + sigmas[0] ** 2).sqrt()) if vp else sample
            for t in scheduler.timesteps:
                given = scheduler.scale_model_input(sample, t)
                sample = scheduler.step(network(given, t.view(1)), t, sample, generator=seeded()).prev_sample
            sample = sample * float((1 + sigmas[-1] ** 2).sqrt()) if vp else sample
            expected = k_diffusions(sampler, denoiser(base), start, sigmas, noise)
            assert relative(sample, expected) < CLOSE, (way, sampler)


@pytest.mark.parametrize("maker", [sd_inpaint, sd3_image, flux_image], ids=lambda maker: maker.__name__)
def test_every_sampler_in_a_pipeline_is_k_diffusions(maker):
    """Part-way, with timesteps that the network gets."""
    pipe, arguments = maker(1)
    base, noise = pipe.scheduler, LevelNoise()

    def run(scheduler: Any) -> torch.Tensor:
        pipe.scheduler = scheduler
        return pipe(**arguments, num_inference_steps=4, generator=seeded(), output_type="latent")[0]

    for sampler in SAMPLERS:
        options = {"noise_sampler": noise} if "noise_sampler" in find_sampler(sampler).arguments else {}
        expected = run_over_k_diffusion(run, base, sampler, noise)
        found = run(KDiffusionScheduler.from_scheduler(base, sampler=sampler, sampler_kwargs=options))
        assert relative(found, expected) < CLOSE, sampler


@pytest.mark.parametrize("name", ["epsilon", "vp", "EDM", "EDM, cosine", "flow", "flow, UniPC"])
def test_no_float64_on_the_device(name):
    base, _ = BASES[name]
    with PretendMps():
        for sampler in SAMPLERS:
            for options in ({}, {"s_churn": 1.0}) if sampler in ("euler", "heun", "dpm_2") else ({},):
                scheduler = KDiffusionScheduler.from_scheduler(base, sampler=sampler, sampler_kwargs=options)
                scheduler.set_timesteps(STEPS, device="mps")
                sample = scheduler.add_noise(*(placed(random(1, 2, 3, 3)) for _ in "12"), scheduler.timesteps[:1])
                for t in scheduler.timesteps:
                    given = scheduler.scale_model_input(sample, t)
                    sample = scheduler.step(given * 0.5, t, sample, generator=seeded()).prev_sample
                assert sample.device.type == "mps" and sample.isfinite().all()
