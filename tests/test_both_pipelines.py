"""The signature, refusals, batches, callbacks, and missing or half precision components, for both pipelines."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import CHILDREN, FAMILIES, PARENTS, PROMPT, draw, load, relative, seeded

CLOSE = 1e-5  # float32 rounding; see test_side_by_side.py
PROMPTS = ["a cat", PROMPT, "a robot in a city, warm colors, vivid colors"]
EMBEDS = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]


@FAMILIES
def test_signature_is_the_parents_and_more(name):
    """Every argument of the parent, in its place, with its default; new arguments follow, by keyword only.

    The parent's `**kwargs` is left out: it takes `callback` and `callback_steps`, which diffusers has deprecated, and
    swallows every misspelt argument.
    """
    parameters = [list(inspect.signature(one.__call__).parameters.values()) for one in (PARENTS[name], CHILDREN[name])]
    parents = [p for p in parameters[0] if p.kind is not p.VAR_KEYWORD]
    for theirs, ours in zip(parents, parameters[1]):
        assert (ours.name, ours.kind, ours.default) == (theirs.name, theirs.kind, theirs.default)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[1][len(parents) :])


def test_batch_is_consistent(family):
    """Prompts of three lengths in one batch give the same as each alone, with its own generator."""
    name, pipe = family
    batch = draw(pipe, name, prompt=PROMPTS, generator=[seeded(i) for i in range(3)])
    assert len(batch) == 3
    for i, prompt in enumerate(PROMPTS):
        alone = draw(pipe, name, prompt=prompt, generator=seeded(i))
        assert relative(batch[i : i + 1], alone) < 10 * CLOSE  # batches are rounded in another order
        assert relative(batch[i : i + 1], batch[i - 1 : i or None]) > 0.1


def test_callback_inputs(family):
    """Every listed tensor can be requested, and no other; only requested tensors are passed."""
    name, pipe = family
    offered = pipe._callback_tensor_inputs
    assert offered == [*PARENTS[name]._callback_tensor_inputs, "denoised", "sigma"]
    seen = []

    def record(one, i, timestep, tensors):
        assert one is pipe and isinstance(i, int)
        seen.append(tensors)
        return tensors

    for inputs in (offered, offered[:1], []):
        draw(pipe, name, callback_on_step_end=record, callback_on_step_end_tensor_inputs=inputs)
        assert list(seen[-1]) == inputs and all(isinstance(value, torch.Tensor) for value in seen[-1].values())
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` has to be in"):
        draw(pipe, name, callback_on_step_end=record, callback_on_step_end_tensor_inputs=["noise_pred"])


ZEROS = {part: torch.zeros(1, 64, 128) if "pooled" not in part else torch.zeros(1, 64) for part in EMBEDS}
BOTH = ["sdxl", "flux"]
REFUSED = [  # by which pipelines, the call, the error and its words
    (BOTH, {"sampler": "dpmp_2m"}, ValueError, "there are euler, .* dpmpp_2m,"),
    (BOTH, {"sampler": "quux"}, ValueError, "there are euler, euler_ancestral, heun"),
    (BOTH, {"sampler": "lcm"}, ValueError, "no 'lcm'; there are euler, .*, dpmpp_3m_sde"),
    (BOTH, {"sampler": lambda model: model}, TypeError, "a name or a callable, sampler\\(model, x, sigmas"),
    (BOTH, {"sampler": 3}, TypeError, "a name or a callable"),
    (BOTH, {"sampler": "euler", "sampler_kwargs": {"eta": 0.5}}, ValueError, "takes no eta; it takes s_churn"),
    (BOTH, {"sigmas": [0.5, 0.8]}, ValueError, "`sigmas` have to be"),
    (BOTH, {"sigmas": [0.9, float("nan"), 0.1]}, ValueError, "finite"),
    (BOTH, {"sigmas": []}, ValueError, "and fall from a positive number"),
    (BOTH, {"sigmas": [0.9, 0.1, 0.1]}, ValueError, "to zero or above"),
    (BOTH, {"sigmas": [0.9, 0.1, -0.1]}, ValueError, "to zero or above"),
    (BOTH, {"schedule": [0.9]}, ValueError, "2 of them at least"),
    (BOTH, {"schedule": [1.0, 1.0 - 1e-9, 0.0]}, ValueError, "as float32"),  # dpmpp_2m divides by their difference
    (BOTH, {"schedule": "karras", "sigmas": [1.0, 0.5]}, ValueError, "pass one of them"),
    (BOTH, {"schedule": "karas"}, ValueError, "there are karras, exponential, polyexponential; "),
    (BOTH, {"num_inference_steps": 0}, ValueError, "at least 1"),
    (BOTH, {"negative_prompt_embeds": torch.zeros(1, 64, 128)}, ValueError, "negative_pooled_prompt_embeds"),
    (BOTH, {"generator": [seeded(), seeded()]}, ValueError, "has to be one or 1, one per image, but is 2"),
    (["sdxl"], {"num_inference_steps": 1001}, ValueError, "the scheduler makes 1 of 1001 steps"),
    (["sdxl"], {"eta": 0.5}, ValueError, "sampler_kwargs"),
    (["sdxl"], {"schedule": "karras", "timesteps": [900, 1]}, ValueError, "pass one of them"),
    (["sdxl"], {"height": 100}, ValueError, "divisible by 8"),
    (["flux"], {"parameterization": "vp"}, ValueError, "'auto', 'flow' or 've'"),
    (["flux"], {"sigmas": [14.6, 1.0]}, ValueError, "lies in 0..1"),
    (["flux"], {"generator": [seeded()], "num_images_per_prompt": 2}, ValueError, "one or 2"),
    (
        ["flux"],
        {"prompt": None, "true_cfg_scale": 2.0, **ZEROS, "negative_prompt_embeds": torch.zeros(1, 32, 128)},
        ValueError,
        "must have the same shape when passed",
    ),
]


@pytest.mark.parametrize("name, call, error, words", [(name, *rest) for names, *rest in REFUSED for name in names])
def test_bad_input_is_reported_before_any_network_runs(request, monkeypatch, name, call, error, words):
    pipe = request.getfixturevalue(name)
    for part, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            monkeypatch.setattr(component, "forward", lambda *_, part=part, **__: pytest.fail(f"{part} ran"))
    with pytest.raises(error, match=words):
        draw(pipe, name, **call)


@FAMILIES
def test_save_and_load_with_optional_components(name, tmp_path):
    pipe = load(CHILDREN[name], name)
    with torch.no_grad():
        embeds = pipe.encode_prompt(PROMPT, **({"prompt_2": None} if name == "flux" else {}))
    encoded = {"prompt": None, **dict(zip(EMBEDS if name == "sdxl" else EMBEDS[::2], embeds))}
    expected = draw(pipe, name, **encoded)
    optional = [part for part in pipe.components if part.startswith(("text", "tokenizer"))]
    for part in optional:
        setattr(pipe, part, None)
    pipe.save_pretrained(tmp_path)
    loaded = CHILDREN[name].from_pretrained(tmp_path, **({} if name == "sdxl" else dict.fromkeys(optional)))
    assert all(getattr(loaded, part) is None for part in optional)
    assert draw(loaded, name, **encoded).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@FAMILIES
def test_half_precision_draws_the_same_picture(name, dtype, sdxl, flux):
    """To the network's rounding (5e-4 and 4e-3 of each value, through two steps); the latents are float32."""
    half = load(CHILDREN[name], name, dtype)
    shape = {"sdxl": (1, 4, 8, 8), "flux": (1, 16, 64)}[name]
    noise = torch.randn(shape, generator=seeded())  # older versions of torch draw other noise in bfloat16
    drawn = draw(half, name, latents=noise)
    assert drawn.dtype == torch.float32
    expected = draw({"sdxl": sdxl, "flux": flux}[name], name, latents=noise)
    assert relative(drawn, expected) < {torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
