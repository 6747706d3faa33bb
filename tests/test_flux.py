"""FluxComfyPipeline against the stock pipeline, its two parameterizations, its options, and what it refuses."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import PROMPT, relative, seeded
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from flux_comfy_pipeline import FluxComfyPipeline, find_sampler, sampler_names, uses_ve, ve_sigmas

# rounding alone: the scheduler keeps its sigmas and timesteps in float32
EXACT = 1e-6
SIZE = {"height": 128, "width": 128, "max_sequence_length": 64}
SMALL = {"height": 64, "width": 64, "max_sequence_length": 64, "output_type": "latent"}


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"negative_prompt": "a cat in the snow, warm colors", "true_cfg_scale": 2.0},
        {"prompt": [PROMPT, "a red car in the desert"]},
        {"sigmas": [1.0, 0.7, 0.4, 0.1]},
    ],
    ids=lambda call: ",".join(call) or "default",
)
def test_euler_is_the_stock_pipeline(flux64, call):
    """FlowMatchEulerDiscreteScheduler through the untouched parent, in float64. All arguments: test_side_by_side.py."""
    child, parent = flux64
    call = {"prompt": PROMPT, "num_inference_steps": 4, **SMALL, **call}
    expected = parent(generator=seeded(), **call).images
    assert relative(child(generator=seeded(), sampler="euler", **call).images, expected) < EXACT


def test_schnell_has_no_guidance_embedding_and_a_fixed_shift(flux64):
    """The layout of schnell: no guidance embedding, no dynamic shift. Weights are the demo's where the layers match."""
    child, parent = flux64
    transformer = FluxTransformer2DModel.from_config(parent.transformer.config, guidance_embeds=False).double()
    transformer.load_state_dict(parent.transformer.state_dict(), strict=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    components = {**child.components, "transformer": transformer, "scheduler": scheduler}
    child, parent = FluxComfyPipeline(**components), FluxPipeline(**components)
    call = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 0.0, **SIZE}
    expected = parent(PROMPT, generator=seeded(), **call).images
    assert relative(child(PROMPT, generator=seeded(), **call).images, expected) < EXACT


def test_default_size_is_the_models(flux):
    assert flux(PROMPT, num_inference_steps=1, generator=seeded()).images[0].size == (128, 128)


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


def test_no_timestep_is_left_after_an_error(flux):
    def broken(*args):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        flux(PROMPT, num_inference_steps=2, callback_on_step_end=broken, **SIZE)
    assert flux.current_timestep is None


@pytest.mark.parametrize("shift", [1.0, 3.158])
@pytest.mark.parametrize("steps", [2, 3, 4, 20, 100])
def test_first_ve_sigma_continues_the_ratio(steps, shift):
    """sigma_1^2 / sigma_2, but for grids so short that this would begin below the noise SDXL begins at."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    t = shift * t / (1 + (shift - 1) * t)
    sigmas = ve_sigmas(t)
    assert sigmas.isfinite().all() and (sigmas.diff() < 0).all()
    torch.testing.assert_close(sigmas[1:] / (1 + sigmas[1:]), t[1:])
    if steps >= 20:
        torch.testing.assert_close(sigmas[0] / sigmas[1], sigmas[1] / sigmas[2])
    assert sigmas[0] >= 15


def test_callback_speaks_in_t(flux):
    """Levels and latents are FLUX's own, in both parameterizations."""
    ts = flux.noise_levels(64, 5)
    expected = {}
    for parameterization in ("flow", "ve"):
        seen = []

        def callback(pipe, i, timestep, tensors, seen=seen):
            seen.append((i, timestep.item() / 1000, tensors["sigma"].item(), tensors["latents"].std().item()))
            return {}

        flux(
            PROMPT,
            num_inference_steps=5,
            generator=seeded(),
            output_type="latent",
            parameterization=parameterization,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", "sigma", "denoised", "prompt_embeds"],
            **SIZE,
        )
        assert [one[0] for one in seen] == list(range(5))
        first = 1 if parameterization == "ve" else 0  # "ve" begins a little below t = 1
        torch.testing.assert_close(torch.tensor([one[2] for one in seen[first:]]), ts[first:-1].float())
        assert all(one[1] == pytest.approx(one[2]) for one in seen)
        expected[parameterization] = [one[3] for one in seen]
    assert expected["ve"] == pytest.approx(expected["flow"], rel=0.1)


def test_given_latents_are_the_state_at_the_first_t(flux):
    """A half finished picture is finished by a second call, in either parameterization."""
    halves = {}

    def keep(pipe, i, timestep, tensors):
        halves[i] = tensors["latents"]
        return {}

    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2]
    call = {"output_type": "latent", **SIZE}
    whole = flux(PROMPT, sigmas=sigmas, generator=seeded(), callback_on_step_end=keep, **call).images
    # Euler's step is the same in both: (1 - t) x0 + t noise with the x0 and the noise that were predicted
    for parameterization in ("flow", "ve"):
        later = {"sigmas": sigmas[2:], "latents": halves[1], "parameterization": parameterization}
        assert relative(flux(PROMPT, **later, **call).images, whole) < 1e-4


def test_given_latents_stay_as_they_are(flux):
    """Whatever a user-supplied sampler writes on."""

    def writing(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return x.mul_(0.5)

    latents = torch.ones(1, 64, 64)
    found = flux(PROMPT, latents=latents, sampler=writing, num_inference_steps=2, output_type="latent", **SIZE).images
    assert latents.eq(1).all() and found.eq(0.5).all()


def test_bfloat16_network(flux):
    half = FluxComfyPipeline.from_pretrained(flux.name_or_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    for sampler in ("euler", "dpmpp_sde"):
        latents = half(PROMPT, sampler=sampler, num_inference_steps=4, output_type="latent", **SIZE).images
        assert latents.dtype == torch.float32 and latents.isfinite().all()
    assert half(PROMPT, num_inference_steps=2, **SIZE).images[0].size == (128, 128)


def no_network(*args, **kwargs):
    raise AssertionError("a network ran before the arguments were checked")


EMBEDS = {"prompt_embeds": torch.zeros(1, 64, 128), "pooled_prompt_embeds": torch.zeros(1, 64)}
OF_ANOTHER_LENGTH = {
    "negative_prompt_embeds": torch.zeros(1, 32, 128),
    "negative_pooled_prompt_embeds": torch.zeros(1, 64),
}
BAD = [  # what the shared block refuses: test_sdxl.py
    ({"sampler": "dpmp_2m"}, ValueError, "did you mean dpmpp_2m"),
    ({"parameterization": "vp"}, ValueError, "'auto', 'flow' or 've'"),
    ({"sigmas": [0.5, 0.8]}, ValueError, "`sigmas` have to be"),
    ({"sigmas": [14.6, 1.0]}, ValueError, "lies in 0..1"),
    ({"generator": [seeded()], "latents": torch.zeros(2, 64, 64), "num_images_per_prompt": 2}, ValueError, "one or 2"),
    ({"schedule": "karras", "sigmas": [1.0, 0.5]}, ValueError, "pass one of them"),
    ({"num_inference_steps": 0}, ValueError, "at least 1"),
    ({"negative_prompt_embeds": torch.zeros(1, 64, 128)}, ValueError, "negative_pooled_prompt_embeds"),
    (
        {"prompt": None, "true_cfg_scale": 2.0, **EMBEDS, **OF_ANOTHER_LENGTH},
        ValueError,
        "must have the same shape when passed directly",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input_is_reported_before_any_network_runs(flux, monkeypatch, call, error, message):
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        monkeypatch.setattr(getattr(flux, name), "forward", no_network)
    with pytest.raises(error, match=message):
        flux(**{"prompt": PROMPT, **SIZE, **call})
