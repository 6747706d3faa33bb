"""Arguments at random: what does not fit is a ValueError or a TypeError, and the pipeline draws on as before."""

from __future__ import annotations

import addons
import numpy as np
import pytest
import torch
from conftest import PROMPT, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_comfy_pipeline import SCHEDULES, sampler_names

NAN, INF = float("nan"), float("inf")
TEXTS = [None, "", "a cat", "ünïcode ☃", ["a cat"], ["a cat", "a dog"], [], [None], [3], 3, ("a cat",), "a " * 300]


def tensors(*shapes: tuple[int, ...]) -> list:
    values = [torch.zeros(shape) for shape in shapes]
    return [None, *values, values[0].half(), values[0].numpy(), values[0].tolist(), "a", torch.full(shapes[0], NAN)]


# good and bad values of every argument; those of a call are drawn from here, a few at a time
BOTH = {
    "prompt": TEXTS,
    "prompt_2": TEXTS,
    "negative_prompt": TEXTS,
    "negative_prompt_2": TEXTS,
    "height": [None, 64, 48, 16, 8, 7, 0, -64, 64.0, "64"],
    "width": [None, 64, 80, 8, 7, 0, -64, 64.5, "64"],
    "num_inference_steps": [1, 2, 3, 0, -1, 2.0, "2", None, np.int64(2), True],
    "guidance_scale": [0.0, 1, 2.5, -1.0, NAN, "5", None],
    "num_images_per_prompt": [1, 2, 0, -1, None, 1.5, "1", np.int32(2)],
    "generator": [None, "G", ["G"], ["G", "G"], [], [None], 3, "seed", (3,)],
    "output_type": ["pil", "np", "pt", "latent"],
    "return_dict": [True, False, 0, 1],
    "callback_on_step_end_tensor_inputs": [["latents"], [], ["denoised", "sigma"], ["prompt_embeds"], ["noise"], None],
    "callback_on_step_end": [None, "look", "change", 3, "stop"],
    "sampler": [
        *sampler_names(),
        "sample_euler",
        "",
        "euler ",
        "k_euler",
        None,
        3,
        lambda: 1,
        lambda model: model,
        "function",
    ],
    "sampler_kwargs": [
        None,
        {},
        {"eta": 0.0},
        {"eta": 0.5, "s_noise": 1.1},
        {"s_churn": 4.0},
        {"order": 2},
        {"order": 3},
        {"solver_type": "heun"},
        {"solver_type": "new"},
        {"r": 0.4},
        {"noise_sampler": None},
        {"rtol": 0.5, "atol": 0.5},
        {"eta": "much"},
        {"model": 1},
        {"disable": True},
        [],
        3,
        "eta",
    ],
    "schedule": [None, "scheduler", "", 3, ["karras"], *SCHEDULES],
    "comfy_seed": [None, 0, 2**64 - 1, -1, 2**64, 1.5, "1", True, np.int64(3), [5], [5, 6], [], [None], (5,)],
    "ip_adapter_image": [None, addons.IMAGE, [addons.IMAGE], 3],
    "ip_adapter_image_embeds": [None, [torch.zeros(1, 1, 32)], [torch.zeros(2, 1, 32)], torch.zeros(1, 1, 32), []],
}
SIZES = [None, (64, 64), [64, 64], (64,), (64, 64, 64), (), 64, "64", (0, 0), (-64, 64), ("a", "b"), (NAN, 64)]
SDXL = {
    **BOTH,
    "timesteps": [None, [900, 300], [300], [300, 900], [], [999.5, 3], [-5], [5000, 10], ["a"], 3, [0], np.array([9])],
    "sigmas": [None, [3.0, 0.5], [3.0, 0.5, 0.0], [0.0], [], [1.0, 2.0], [NAN], [INF, 1.0], ["a"], 3, [1e9, 1e-9], "a"],
    "denoising_end": [None, 0.0, 0.5, 0.9999, 1.0, 1.5, -1.0, NAN, 1, "half"],
    "eta": [0.0, 0.5, None, "a"],
    "latents": tensors((1, 4, 8, 8), (2, 4, 8, 8), (1, 4), (1, 16, 8, 8), (1, 4, 9, 7), ()),
    "prompt_embeds": tensors((1, 77, 160), (2, 77, 160), (1, 160), (1, 77, 128), (1, 12, 160)),
    "negative_prompt_embeds": tensors((1, 77, 160), (2, 77, 160), (1, 12, 160), (1, 0, 160)),
    "pooled_prompt_embeds": tensors((1, 96), (2, 96), (1, 64), (96,)),
    "negative_pooled_prompt_embeds": tensors((1, 96), (2, 96), (1, 64)),
    "cross_attention_kwargs": [None, {}, {"scale": 0.5}, {"scale": "a"}, {"new": 1}, 3],
    "guidance_rescale": [0.0, 0.7, 2.0, NAN, None, "a"],
    "original_size": SIZES,
    "crops_coords_top_left": SIZES[1:],
    "target_size": SIZES,
    "negative_original_size": SIZES,
    "negative_crops_coords_top_left": SIZES[1:],
    "negative_target_size": SIZES,
    "clip_skip": [None, 0, 1, 2, 12, -1, -3, 0.5, "1"],
    "quantize_timesteps": [True, False, None, "a"],
}
FLUX = {
    **BOTH,
    "sigmas": [None, [1.0, 0.5], [0.7, 0.0], [0.0], [], [0.5, 0.9], [NAN], [14.0, 1.0], ["a"], 3, [1.0, 1e-9], "a"],
    "true_cfg_scale": [1.0, 2, 0.0, -1.0, NAN, None, "a"],
    "latents": tensors((1, 16, 64), (2, 16, 64), (1, 64), (1, 16, 16, 16), (1, 15, 64), ()),
    "prompt_embeds": tensors((1, 32, 128), (2, 32, 128), (1, 128), (1, 32, 160), (1, 12, 128), (1, 0, 128)),
    "negative_prompt_embeds": tensors((1, 32, 128), (2, 32, 128), (1, 12, 128)),
    "pooled_prompt_embeds": tensors((1, 64), (2, 64), (1, 96), (64,)),
    "negative_pooled_prompt_embeds": tensors((1, 64), (2, 64), (1, 96)),
    "negative_ip_adapter_image": BOTH["ip_adapter_image"],
    "negative_ip_adapter_image_embeds": BOTH["ip_adapter_image_embeds"],
    "joint_attention_kwargs": [None, {}, {"scale": 0.5}, {"scale": "a"}, {"new": 1}, 3],
    "max_sequence_length": [64, 1, 512, 513, 0, -1, None, "64", 8.5],
    "parameterization": ["auto", "flow", "ve", "v", None, 3],
}


def calls(arguments: dict[str, list]):
    """Calls with up to five arguments, besides a prompt, that are not the defaults."""
    pairs = [(name, i) for name, values in arguments.items() for i in range(len(values))]
    return st.lists(st.sampled_from(pairs), max_size=5, unique_by=lambda pair: pair[0])


def euler(model, x, sigmas, callback=None):
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]))
        x = denoised + (x - denoised) * sigmas[i + 1] / sigmas[i]
    return x


def stop(pipe, i, timestep, tensors):
    pipe._interrupt = True


NAMED = {
    "look": lambda *_: None,
    "change": lambda pipe, i, timestep, tensors: {name: value * 1.1 for name, value in tensors.items()},
    "stop": stop,
    "function": euler,
}


def value_of(name: str, value):
    """Generators anew for each call, functions by their name."""
    if name == "generator" and isinstance(value, list):
        return [seeded() if one == "G" else one for one in value]
    if name == "generator" and value == "G":
        return seeded()
    return NAMED.get(value, value) if name in ("callback_on_step_end", "sampler") and isinstance(value, str) else value


def fuzz(pipe, arguments, chosen, reference):
    call = {"prompt": PROMPT, "num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}
    call |= {"max_sequence_length": 64} if arguments is FLUX else {"guidance_scale": 1.0}
    plain = dict(call)
    call |= {name: value_of(name, arguments[name][i]) for name, i in chosen}
    if call.get("prompt_embeds") is not None and not any(name == "prompt" for name, _ in chosen):
        del call["prompt"]
    try:
        out = pipe(**call)
        assert isinstance(out, tuple) or hasattr(out, "images")
    except (ValueError, TypeError) as error:
        assert str(error)
        assert pipe(**plain, generator=seeded()).images.equal(reference)


FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # the same calls in every run
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def references(sdxl, flux):
    call = {"prompt": PROMPT, "num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}
    return {
        "sdxl": sdxl(**call, guidance_scale=1.0, generator=seeded()).images,
        "flux": flux(**call, max_sequence_length=64, generator=seeded()).images,
    }


@FUZZ
@given(calls(SDXL))
def test_sdxl(sdxl, references, chosen):
    fuzz(sdxl, SDXL, chosen, references["sdxl"])


@FUZZ
@given(calls(FLUX))
def test_flux(flux, references, chosen):
    fuzz(flux, FLUX, chosen, references["flux"])


@pytest.mark.parametrize("name", SDXL)
def test_sdxl_one_by_one(sdxl, references, name):
    for i in range(len(SDXL[name])):
        fuzz(sdxl, SDXL, [(name, i)], references["sdxl"])


@pytest.mark.parametrize("name", FLUX)
def test_flux_one_by_one(flux, references, name):
    for i in range(len(FLUX[name])):
        fuzz(flux, FLUX, [(name, i)], references["flux"])
