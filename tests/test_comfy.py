"""ComfyUI's noise levels, seed and latents, against what ComfyUI 0.3.64 itself computed (tests/data)."""

from __future__ import annotations

import copy
import inspect
import json
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from closed_form import Mixture, flux_pipeline, sdxl_pipeline
from conftest import PROMPT, ROOT, relative, seeded
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from safetensors import safe_open

from flux_comfy_pipeline import flow_levels
from gallery.comfy import ending_in_denoised
from sdxl_comfy_pipeline import SCHEDULES, comfy_noise_sampler, find_sampler, sampler_names, sampling

DATA = ROOT / "tests" / "data"
SIGMAS = json.loads((DATA / "comfyui_sigmas.json").read_text())["sigmas"]
LATENTS = safe_open(DATA / "comfyui_latents.safetensors", "pt")
NINE = list(SIGMAS["sdxl"])
SHIFT = 1.15  # of the references, FLUX's at 1024x1024: diffusers' mu


def mixture(channels: int) -> Mixture:
    """The references' model, by the words of their metadata, flat in the order of the latents."""
    c, h, w = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (channels, 16, 16)), indexing="ij")
    means = torch.stack([torch.sin(0.1 * (k + 1) * (h + 2 * w) + c) for k in range(3)])
    if channels == 16:  # FLUX's network sees them packed
        means = torch.cat([packed(mean[None]) for mean in means])
    return Mixture(means.flatten(1), torch.full((3,), 0.5))


def packed(latents: torch.Tensor) -> torch.Tensor:
    """(b, 16, 16, 16) -> (b, 64, 64): 2x2 patches, as FLUX's."""
    return latents.view(-1, 16, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 64, 64)


@pytest.fixture(scope="module")
def pipes():
    """Float32, as ComfyUI's sampling."""
    with torch.random.fork_rng():
        return {
            "sdxl": sdxl_pipeline(mixture(4), torch.float32),
            "sdxl_v_prediction_zsnr": sdxl_pipeline(
                mixture(4), torch.float32, prediction_type="v_prediction", rescale_betas_zero_snr=True
            ),
            "flux": flux_pipeline(mixture(16), torch.float32, mu=SHIFT, channels=64),
        }


def draw(pipe, images=1, **call):
    """The latents of a call without a prompt, of the reference's size, as ComfyUI has them: unpacked."""
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    nothing = torch.zeros(images, 1, 1, dtype=network.dtype)
    call = {"guidance_scale": 1.0, "output_type": "latent", "height": 128, "width": 128, **call}
    latents = pipe(prompt_embeds=nothing, pooled_prompt_embeds=nothing[:, 0], **call).images
    return latents if latents.ndim == 4 else pipe._unpack_latents(latents, 128, 128, 8)


def levels(pipe, steps, schedule):
    """float64, from the highest to zero; t on FLUX."""
    if hasattr(pipe, "unet"):
        return pipe.noise_levels(steps, schedule=schedule)[0]
    return pipe.noise_levels(64, steps, schedule=schedule)


# --- noise levels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", NINE)
@pytest.mark.parametrize("model", SIGMAS)
def test_levels_are_comfyuis(pipes, model, schedule):
    """At every step count of the file. The scheduler keeps betas in float32, which is 2e-7 of a sigma."""
    worst = 0.0
    for steps, expected in SIGMAS[model][schedule].items():
        ours = levels(pipes[model.removesuffix("_shift_1.15")], int(steps), schedule)
        expected = torch.tensor(expected, dtype=torch.float64)
        if schedule == "kl_optimal" and steps == "1":  # NaN there; here one step begins where the others do
            expected = torch.tensor([SIGMAS[model][schedule]["2"][0], 0.0], dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
        worst = max(worst, ((ours - expected) / expected)[:-1].abs().max().item())
    print(f"{model}/{schedule}: levels {worst:.1e}")


@pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.015, "num_train_timesteps": 500},
        {"trained_betas": np.linspace(0.001, 0.01, 700).tolist(), "num_train_timesteps": 700},
    ],
    ids=lambda betas: betas.get("beta_schedule", "trained_betas"),
)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_levels_of_other_betas(betas, steps):
    """By another road each: numpy on the trained sigmas, scipy's Beta, diffusers' own spacings."""
    pipe = sdxl_pipeline(mixture(4), torch.float32, **betas)
    trained = ((1 - pipe.scheduler.betas.double()).cumprod(0).reciprocal() - 1).sqrt().numpy()
    last = len(trained) - 1

    def at(t):
        return np.exp(np.interp(t, np.arange(last + 1), np.log(trained)))

    def spaced(name, **options):
        scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=name, **options)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas[:-1].double().numpy()

    places = np.rint(scipy.stats.beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6) * last).astype(int)
    expected = {
        "normal": at(np.linspace(last, 0, steps)),
        "sgm_uniform": at(np.linspace(last, 0, steps + 1)[:-1]),
        "beta": trained[np.unique(places)[::-1]],
        "kl_optimal": np.tan(np.linspace(np.arctan(trained[-1]), np.arctan(trained[0]), steps)),
        "karras": sampling.get_sigmas_karras(steps, trained[0], trained[-1])[:-1].numpy(),
        "exponential": np.geomspace(trained[-1], trained[0], steps),
    }
    if (last + 1) % steps == 0:  # then the spacings round nothing, and are the same
        expected |= {"simple": spaced("trailing"), "ddim_uniform": spaced("leading", steps_offset=1)}
    for schedule, sigmas in expected.items():
        ours = levels(pipe, steps, schedule).numpy()
        # float32; diffusers loses 1 - alphas_cumprod, 2e-4 at the lowest, to the float32 of alphas_cumprod as well
        rtol = 3e-4 if schedule in ("simple", "ddim_uniform") else 3e-6
        np.testing.assert_allclose(ours[:-1], sigmas, rtol=rtol, err_msg=schedule)
        assert ours[-1] == 0


@pytest.mark.parametrize("steps", [2, 5, 20, 31])
def test_linear_quadratic(pipes, steps):
    """Half of the steps are even and end at 97.5 %; a parabola goes on from there at the same slope, to zero."""
    share = levels(pipes["flux"], steps, "linear_quadratic").numpy()
    half = steps // 2
    np.testing.assert_allclose(share[: half + 1], np.linspace(1, 0.975, half + 1), rtol=1e-6)
    np.testing.assert_allclose(np.diff(share[half:], 3), 0, atol=1e-6)  # the third difference of a parabola
    parabola = np.polynomial.Polynomial.fit(np.arange(half, steps + 1), share[half:], min(2, steps - half))
    if steps - half > 1:
        np.testing.assert_allclose(parabola.deriv()(half), -0.025 / half, rtol=1e-3)
    assert share[-1] == 0


@pytest.mark.parametrize(
    "options, mu",
    [
        ({"shift": 3.0}, None),
        ({"shift": 1.0}, None),
        ({"use_dynamic_shifting": True}, 0.8),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.0),
    ],
    ids=str,
)
def test_levels_of_other_shifts(flux, options, mu):
    """The table is the scheduler's own shift of 1/10,000 ... 1; `normal` shifts once more, from its lowest to 1."""
    scheduler = FlowMatchEulerDiscreteScheduler(**options, **({"base_shift": mu, "max_shift": mu} if mu else {}))
    pipe = type(flux)(**{**flux.components, "scheduler": scheduler})

    def shifted(ts):
        own = copy.deepcopy(scheduler)
        own.set_timesteps(sigmas=list(ts), mu=mu)
        return own.sigmas[:-1].double()

    table = shifted(np.arange(10_000, 0, -1) / 10_000)
    for steps in (4, 25):
        close = {"rtol": 2e-6, "atol": 0}
        torch.testing.assert_close(levels(pipe, steps, "simple")[:-1], table[:: 10_000 // steps], **close)
        torch.testing.assert_close(
            levels(pipe, steps, "ddim_uniform")[:-1], table.flip(0)[1 :: 10_000 // steps].flip(0), **close
        )
        evenly = np.linspace(1, table[-1].item(), steps)
        torch.testing.assert_close(levels(pipe, steps, "normal")[:-1], shifted(evenly), **close)
        karras = levels(pipe, steps, "karras")
        torch.testing.assert_close(karras[[0, -2]], table[[0, -1]], **close)


def test_shift_of_other_flow_schedulers(flux):
    """Wherever diffusers keeps it: half way, t = 1/2, a shift of 3 makes 3/4."""
    set_later = FlowMatchEulerDiscreteScheduler()
    set_later.set_shift(3.0)
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    for scheduler in (set_later, solver, FlowMatchHeunDiscreteScheduler(shift=3.0)):
        pipe = type(flux)(**{**flux.components, "scheduler": scheduler})
        assert levels(pipe, 2, "simple").tolist() == pytest.approx([1, 0.75, 0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_fall_at_every_step_count(pipes, schedule):
    """Strictly, to zero, from 1 step to more than there are trained levels; where levels coincide there are fewer."""
    for pipe in (pipes["sdxl"], pipes["flux"]):
        for steps in (1, 2, 3, 9, 100, 1001):
            sigmas = levels(pipe, steps, schedule)
            assert sigmas[-1] == 0 and (sigmas.diff() < 0).all() and sigmas.isfinite().all(), steps
            assert len(sigmas) == steps + 1 or schedule in ("beta", "ddim_uniform") or steps > 1000


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_are_on_the_cpu_whatever_the_default_device(pipes, schedule):
    """The meta device stands in for a GPU: what is made there has no numbers."""
    for pipe, tokens in ((pipes["sdxl"], ()), (pipes["flux"], (64,))):
        expected = pipe.noise_levels(*tokens, 5, schedule=schedule)
        with torch.device("meta"):
            found = pipe.noise_levels(*tokens, 5, schedule=schedule)
        for one, other in zip(found, expected) if tokens == () else [(found, expected)]:
            assert one.device.type == "cpu" and one.equal(other)


def test_flow_levels_are_in_float32():
    """As in ComfyUI, whose FLUX levels these are to the bit."""
    assert flow_levels(math.exp(SHIFT)).sigmas.dtype == torch.float32


# --- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", LATENTS.keys())
def test_latents_are_comfyuis(pipes, key):
    """Every latent of the file, by the pipeline. `pytest -s` prints how far apart they are.

    torchsde rounds times to 1e-6, so one rounding of sigma can move a draw of dpmpp_sde: 3e-5, once.
    """
    model, sampler, schedule, steps, seed = key.split("/")
    call = {"sampler": sampler, "schedule": schedule, "num_inference_steps": int(steps), "comfy_seed": int(seed)}
    call |= {"quantize_timesteps": True} if model == "sdxl" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torchsde's, of times beyond its ends
        latents = draw(pipes[model], **call)
    apart = relative(latents, LATENTS.get_tensor(key))
    print(f"{key}: {apart:.1e}")
    if sampler == "lms":  # ComfyUI's ends in `denoised`
        assert 1e-4 < apart < 0.1  # when this fails, they are one again: then README's remark goes
        latents = draw(pipes[model], **{**call, "sampler": ending_in_denoised(sampling.sample_lms)})
        apart = relative(latents, LATENTS.get_tensor(key))
    assert apart < (1e-4 if sampler == "dpmpp_sde" else 1e-5)


def test_comfy_seed_needs_its_rounding(pipes):
    """Without `quantize_timesteps` the network is shown other timesteps, and the latents are others."""
    call = {"sampler": "euler", "schedule": "karras", "num_inference_steps": 20, "comfy_seed": 0}
    assert relative(draw(pipes["sdxl"], **call), LATENTS.get_tensor("sdxl/euler/karras/20/0")) > 1e-4


@pytest.mark.parametrize("model", ["sdxl", "flux"])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_sde"])
def test_a_list_of_seeds_draws_each_image_as_if_alone(pipes, model, sampler):
    call = {"sampler": sampler, "schedule": "simple", "num_inference_steps": 6}
    together = draw(pipes[model], images=3, comfy_seed=[5, 0, 7], **call)
    for image, seed in zip(together, (5, 0, 7)):
        alone = draw(pipes[model], comfy_seed=seed, **call)
        torch.testing.assert_close(image[None], alone, rtol=1e-4, atol=1e-5)


def test_one_seed_draws_a_batch_at_once(pipes):
    """ComfyUI's batch: one draw of the whole shape, so that its first image is that of a batch of one."""
    call = {"sampler": "euler", "schedule": "simple", "num_inference_steps": 4, "comfy_seed": 3}
    batch = draw(pipes["sdxl"], images=2, **call)
    torch.testing.assert_close(batch[:1], draw(pipes["sdxl"], **call), rtol=1e-5, atol=1e-6)
    assert relative(batch[1:], batch[:1]) > 0.1


@pytest.mark.parametrize("schedule, factor", [("normal", "sqrt(1 + sigma^2)"), ("ddim_uniform", "sigma")])
def test_start(pipes, schedule, factor):
    """What the network is shown first is sigma noise / sqrt(1 + sigma^2) below the highest level, and noise at it."""
    pipe, shown = pipes["sdxl"], []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: shown.append(args[0].clone()))
    try:
        draw(pipe, schedule=schedule, num_inference_steps=4, comfy_seed=1)
    finally:
        hook.remove()
    noise = torch.randn(1, 4, 16, 16, generator=seeded(1))
    sigma = levels(pipe, 4, schedule)[0].item()
    scale = 1.0 if factor != "sigma" else sigma / math.sqrt(1 + sigma**2)
    torch.testing.assert_close(shown[0], noise * scale, rtol=1e-6, atol=1e-7)


def test_zero_terminal_snr(pipes):
    """v prediction from sigma 4518.76: x0 at the first step is -v of the noise, hence the mean of the means."""
    latents = draw(
        pipes["sdxl_v_prediction_zsnr"],
        schedule="simple",
        num_inference_steps=1,
        comfy_seed=0,
        quantize_timesteps=True,
    )
    mean = mixture(4).mean.view(1, 4, 16, 16).float()
    assert relative(latents, mean) < 0.02  # 4518 instead of infinity


def test_churn_goes_on_where_the_initial_noise_ended(pipes):
    """ComfyUI draws both from the global generator: here the noise, then a draw a step, and nothing global moves."""
    call = {"sampler": "euler", "sampler_kwargs": {"s_churn": 4.0}, "schedule": "karras", "num_inference_steps": 8}
    torch.manual_seed(99)
    before = torch.get_rng_state()
    ours = draw(pipes["sdxl"], comfy_seed=6, **call)
    assert torch.get_rng_state().equal(before)
    generator, sigma = seeded(6), levels(pipes["sdxl"], 8, "karras")[0]
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    start = noise * (1 + 1 / sigma**2).sqrt()  # `latents` are taken times sigma
    expected = draw(pipes["sdxl"], latents=start, generator=generator, **call)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_brownian_noise_is_k_diffusions_with_the_seed():
    """`dpmpp_*_sde` gets the tree between the lowest positive and the highest level, to the float32 of a division."""
    x, sigmas = torch.zeros(2, 4, 8, 8), sampling.get_sigmas_karras(6, 0.0291671, 14.6146)
    ours = comfy_noise_sampler(sampling.sample_dpmpp_2m_sde, x, sigmas, 11)
    tree = sampling.BrownianTreeNoiseSampler(x, sigmas[:-1].min(), sigmas.max(), seed=11)
    for sigma, sigma_next in zip(sigmas[:-2], sigmas[1:-1]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = tree(sigma, sigma_next)
        torch.testing.assert_close(ours(sigma, sigma_next), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_a_float64_network_gets_the_same_noise(pipes, model, sampler):
    """Drawn in float32 and then widened, so that a comparison in float64 is one of the same picture."""
    exact = sdxl_pipeline(mixture(4)) if model == "sdxl" else flux_pipeline(mixture(16), mu=SHIFT, channels=64)
    call = {"sampler": sampler, "schedule": "simple", "num_inference_steps": 8, "comfy_seed": 4}
    latents = draw(exact, **call)
    assert latents.dtype == torch.float64
    assert relative(draw(pipes[model], **call), latents) < 1e-4  # float32, and the Brownian tree's times


def test_step_noise_can_be_the_callers(pipes):
    """A `noise_sampler` in `sampler_kwargs` comes before the seed's."""
    call = {"sampler": "euler_ancestral", "schedule": "simple", "num_inference_steps": 4, "comfy_seed": 0}
    nothing = {"sampler_kwargs": {"noise_sampler": lambda sigma, sigma_next: torch.zeros(1, 4, 16, 16)}}
    silent = {"sampler_kwargs": {"s_noise": 0.0}}
    assert draw(pipes["sdxl"], **call, **nothing).equal(draw(pipes["sdxl"], **call, **silent))


# --- FLUX's stochastic samplers, which ComfyUI writes for the flow ---------------------------------------------------


def flow_euler_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    """ComfyUI's at eta 1: Euler to t_next^2 / t, then alpha and noise are brought up to those of t_next."""
    for t, t_next in zip(sigmas[:-1], sigmas[1:]):
        denoised, down = model(x, t * x.new_ones(len(x))), t_next**2 / t
        x = denoised + (x - denoised) * (down / t)
        if t_next > 0:
            scale = (1 - t_next) / (1 - down)
            x = scale * x + (t_next**2 - (scale * down) ** 2).sqrt() * noise_sampler(t, t_next)
    return x


def flow_dpmpp_2m_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    """ComfyUI's: k-diffusion's in y = x / (1 - t), from t = shift(0.9999) in place of 1, where y is noise."""
    first = flow_levels(math.exp(SHIFT)).sigmas[9998]
    sigmas = torch.cat([first.view(1), sigmas[1:]])

    def in_y(y, sigma):
        return model(y / (1 + sigma.view(-1, 1, 1)), sigma / (1 + sigma))

    def noise(*levels):
        return noise_sampler(*(sigma / (1 + sigma) for sigma in levels))

    y = x / (1 - first)
    return sampling.sample_dpmpp_2m_sde(in_y, y, sigmas / (1 - sigmas), disable=True, noise_sampler=noise)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
def test_flux_stochastic_samplers_are_others_than_comfyuis(pipes, name):
    """ComfyUI's ancestral ones add other amounts of noise, its `sde` ones begin elsewhere. `pytest -s` says how far."""
    call = {"schedule": "simple", "num_inference_steps": 20, "comfy_seed": 0}
    ours = draw(pipes["flux"], sampler=name, **call)
    theirs = draw(pipes["flux"], sampler=globals()[f"flow_{name}"], parameterization="flow", **call)
    another = draw(pipes["flux"], sampler=name, **{**call, "comfy_seed": 1})
    print(f"flux/{name}: {relative(ours, theirs):.2f}; another seed: {relative(ours, another):.2f}")
    assert relative(ours, theirs) > 0.01


# --- names -----------------------------------------------------------------------------------------------------------

COMFY_SAMPLERS = """euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 exp_heun_2_x0
    exp_heun_2_x0_sde dpm_2 dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp
    dpmpp_sde dpmpp_sde_gpu
    dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde
    dpmpp_3m_sde_gpu ddpm lcm ipndm ipndm_v deis res_multistep res_multistep_cfg_pp res_multistep_ancestral
    res_multistep_ancestral_cfg_pp gradient_estimation gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver
    sa_solver_pece ddim uni_pc uni_pc_bh2""".split()


@pytest.mark.parametrize("name", COMFY_SAMPLERS)
def test_comfyui_names(name):
    """Each of ComfyUI's is k-diffusion's of that name, or says how to pass ComfyUI's own function."""
    same = {"ddim": "euler"}.get(name, name.removesuffix("_gpu"))
    if same in sampler_names():
        assert find_sampler(name) is getattr(sampling, f"sample_{same}")
    else:
        with pytest.raises(ValueError, match=rf"comfy\.samplers\.sampler_object\('{name}'\)\.sampler_function"):
            find_sampler(name)


def test_no_gpu_name_of_what_has_none():
    with pytest.raises(ValueError, match="did you mean euler"):
        find_sampler("euler_gpu")


def test_a_function_of_comfyuis_form_can_be_passed(pipes):
    """Its own names for the arguments, as uni_pc has them, and a `noise_sampler` where it asks for one."""

    def sample_unipc(model, noise, sigmas, extra_args=None, callback=None, disable=False):
        assert set(inspect.signature(sample_unipc).parameters) >= {"noise", "extra_args"}
        return sampling.sample_euler(model, noise, sigmas, callback=callback, disable=disable)

    call = {"schedule": "simple", "num_inference_steps": 5, "comfy_seed": 0}
    assert draw(pipes["sdxl"], sampler=sample_unipc, **call).equal(draw(pipes["sdxl"], sampler="ddim", **call))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        ({"comfy_seed": 1, "generator": seeded()}, "`comfy_seed` and `generator` both give the noise"),
        ({"comfy_seed": 1, "latents": torch.zeros(1, 4, 16, 16)}, "`comfy_seed` and `latents` both give the noise"),
        ({"comfy_seed": [1, 2]}, "one seed an image, 1, but has 2"),
        ({"comfy_seed": -1}, r"0\.\.2\^64 - 1"),
        ({"comfy_seed": "1"}, r"0\.\.2\^64 - 1"),
        ({"sampler": "uni_pc"}, "sampler_object"),
        ({"schedule": "beta57"}, "did you mean beta"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_bad_input_is_told_before_any_network_runs(request, monkeypatch, family, call, message):
    pipe = request.getfixturevalue(family)
    if family == "flux" and "latents" in call:
        call = {**call, "latents": torch.zeros(1, 64, 64)}

    def no_network(*args, **kwargs):
        raise AssertionError("a network ran before the arguments were checked")

    for name in ("text_encoder", "text_encoder_2", "unet" if family == "sdxl" else "transformer"):
        monkeypatch.setattr(getattr(pipe, name), "forward", no_network)
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **call)
