"""FluxComfyPipeline against the stock pipeline, its two parameterizations and its options."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from conftest import CHILDREN, FAMILIES, PROMPT, load, relative, seeded
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from flux_comfy_pipeline import FluxComfyPipeline, find_sampler, sampler_names, sampling, uses_ve, ve_sigmas

# rounding alone: the scheduler keeps its sigmas and timesteps in float32
EXACT = 1e-6
SIZE = {"height": 128, "width": 128, "max_sequence_length": 64}
SMALL = {"height": 64, "width": 64, "max_sequence_length": 64, "output_type": "latent"}


@pytest.mark.parametrize("schnell", [False, True])
@pytest.mark.parametrize("call", [{"negative_prompt": "snow", "true_cfg_scale": 2.0}, {"sigmas": [1.0, 0.7, 0.4, 0.1]}])
def test_euler_is_the_stock_pipeline(flux64, call, schnell):
    """FlowMatchEulerDiscreteScheduler through the untouched parent, in float64. All arguments: test_side_by_side.py.

    schnell has no guidance embedding and no dynamic shift. Weights are the demo's where the layers match.
    """
    child, parent = flux64
    if schnell:
        transformer = FluxTransformer2DModel.from_config(parent.transformer.config, guidance_embeds=False).double()
        transformer.load_state_dict(parent.transformer.state_dict(), strict=False)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        components = {**child.components, "transformer": transformer, "scheduler": scheduler}
        child, parent = FluxComfyPipeline(**components), FluxPipeline(**components)
    call = {"prompt": PROMPT, "num_inference_steps": 4, **SMALL, **call}
    expected = parent(generator=seeded(), **call).images
    assert relative(child(generator=seeded(), sampler="euler", **call).images, expected) < EXACT


@FAMILIES
def test_default_size_is_the_models(name):
    """Of a half precision model too: the VAE gets latents of its dtype."""
    half = load(CHILDREN[name], name, torch.bfloat16)
    assert half(PROMPT, num_inference_steps=1, generator=seeded()).images[0].size == (128, 128)


def test_which_parameterization():
    ts = torch.tensor([1.0, 0.8, 0.5, 0.0])
    ve = {name for name in sampler_names() if uses_ve("auto", find_sampler(name), ts)}
    assert ve == set(sampler_names()) - {"euler", "heun", "dpm_2", "lms", "dpmpp_2m"}
    assert uses_ve("auto", find_sampler("euler", {"s_churn": 1.0}), ts)
    assert not uses_ve("flow", find_sampler("dpmpp_sde"), ts)
    assert uses_ve("ve", find_sampler("euler"), ts)
    churning = functools.partial(find_sampler("euler").function, s_churn=1.0)
    assert uses_ve("auto", find_sampler(churning), ts)
    assert not uses_ve("auto", find_sampler(churning, {"s_churn": 0.0}), ts)
    assert [uses_ve("auto", find_sampler("dpmpp_sde"), ts[one]) for one in ([0, 1], [0, -1])] == [True, False]


@pytest.mark.parametrize("first", [1.0, 0.999999, 0.99])
def test_ve_gives_the_network_noise_of_its_level(flux, first):
    """From t near 1, where its first sigma is another than t's, too: x = t noise while there is no picture in it."""
    seen = []

    def look(module, args, kwargs):
        seen.append((kwargs["timestep"][0].item(), kwargs["hidden_states"].std().item()))

    hook = flux.transformer.register_forward_pre_hook(look, with_kwargs=True)
    call = {"sigmas": [first, 0.7, 0.4], "parameterization": "ve", "output_type": "latent"}
    noise = torch.randn(1, 64, 64, generator=seeded())
    flux(PROMPT, latents=noise * flux.noise_levels(64, 3, call["sigmas"])[0].float(), **call, **SIZE)
    hook.remove()
    t, std = seen[0]
    assert std / noise.std().item() == pytest.approx(t, rel=1e-5)


def test_tiny_autoencoder(flux):
    """It has no size of its own: given ones are taken, FLUX.1's 1024 stands in otherwise."""
    tiny = AutoencoderTiny(latent_channels=16, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    pipe = FluxComfyPipeline(**{**flux.components, "vae": tiny})
    pipe.set_progress_bar_config(disable=True)
    image = pipe(PROMPT, num_inference_steps=1, output_type="np", **SIZE).images
    assert image.shape == (1, 128, 128, 3)


@pytest.mark.parametrize("shift", [1.0, 3.158])
@pytest.mark.parametrize("steps", [2, 3, 4, 20, 100])
def test_first_ve_sigma_continues_the_ratio(steps, shift):
    """sigma_1^2 / sigma_2, but for grids so short that this would begin below the noise SDXL begins at."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    t = shift * t / (1 + (shift - 1) * t)
    sigmas = ve_sigmas(t)
    assert float(ve_sigmas(torch.tensor([1.0, 0.9]))[0]) == pytest.approx(36)  # one step: four times
    torch.testing.assert_close(sigmas[1:] / (1 + sigmas[1:]), t[1:])
    ratio = sigmas[1] ** 2 / sigmas[2] if steps > 2 else torch.zeros(())
    assert float(sigmas[0]) == pytest.approx(max(float(ratio), 15)) and sigmas[0] > sigmas[1]


def test_callback_speaks_in_t(flux):
    """Levels and latents are FLUX's own, in both parameterizations."""
    ts, spread = flux.noise_levels(64, 5), {}
    call = {"num_inference_steps": 5, "output_type": "latent", **SIZE}
    for parameterization in ("flow", "ve"):
        seen = []

        def callback(pipe, i, timestep, tensors, seen=seen):
            seen.append((timestep.item() / 1000, tensors["sigma"].item(), tensors["latents"].std().item()))
            return {}

        call |= {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "sigma"]}
        flux(PROMPT, generator=seeded(), parameterization=parameterization, **call)
        times, levels, spread[parameterization] = zip(*seen)
        first = 1 if parameterization == "ve" else 0  # "ve" begins a little below t = 1
        torch.testing.assert_close(torch.tensor(levels[first:]), ts[first:-1].float())
        assert times == pytest.approx(levels)
    assert spread["ve"] == pytest.approx(spread["flow"], rel=0.1)


def test_given_latents_stay_as_they_are(flux):
    """Whatever a user-supplied sampler writes on."""

    def writing(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return x.mul_(0.5)

    latents = torch.ones(1, 64, 64)
    found = flux(PROMPT, latents=latents, sampler=writing, num_inference_steps=2, output_type="latent", **SIZE).images
    assert latents.eq(1).all() and found.eq(0.5).all()


@pytest.mark.parametrize(
    "options, shift",
    [({}, 2.0), ({"set_shift": 3.0}, 3.0), ({"use_dynamic_shifting": True}, math.exp(calculate_shift(1000)))]
    + [({"use_dynamic_shifting": True, "time_shift_type": "linear"}, calculate_shift(1000))],
    ids=str,
)
def test_named_levels_end_at_the_shifted_time(options, shift, flux):
    """The shift is the config's, what `set_shift` gave, or the picture's (two kinds). The lowest t is 1 / 10,000."""
    config = {name: value for name, value in options.items() if name != "set_shift"}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0, **config)
    scheduler.set_shift(options.get("set_shift", 2.0))
    pipe = FluxComfyPipeline(**{**flux.components, "scheduler": scheduler})
    expected = sampling.get_sigmas_karras(4, shift / (shift + 9999), 1.0)
    torch.testing.assert_close(pipe.noise_levels(1000, 4, schedule="karras").float(), expected)
