"""diffusers' tests of each of its own pipelines, for these two."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from conftest import CALLS, CHILDREN, FAMILIES, PARENTS, PROMPT, ROOT, draw, load, relative, seeded

CLOSE = 1e-5  # float32 rounding; see test_side_by_side.py
PROMPTS = ["a cat", PROMPT, "a robot in a city, warm colors, vivid colors"]
ENCODED = {
    "sdxl": ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "flux": ("prompt_embeds", "pooled_prompt_embeds"),
}


# --- the call --------------------------------------------------------------------------------------------------------


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


def test_dict_and_tuple(family):
    name, pipe = family
    call = {**CALLS[name], "output_type": "np"}
    as_tuple = pipe(**call, generator=seeded(), return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert np.array_equal(as_tuple[0], pipe(**call, generator=seeded()).images)


def test_output_types_show_one_picture(family):
    name, pipe = family
    outs = {kind: draw(pipe, name, output_type=kind) for kind in ("pil", "np", "pt")}
    assert isinstance(outs["np"], np.ndarray) and outs["np"].shape == (1, 64, 64, 3)
    assert isinstance(outs["pt"], torch.Tensor) and outs["pt"].shape == (1, 3, 64, 64)
    assert np.array_equal(outs["pt"].permute(0, 2, 3, 1).numpy(), outs["np"])
    assert np.abs(np.asarray(outs["pil"][0]) / 255 - outs["np"][0]).max() <= 0.5001 / 255


def test_batch_is_consistent(family):
    """Prompts of three lengths in one batch give the same as each alone, with its own generator."""
    name, pipe = family
    batch = draw(pipe, name, prompt=PROMPTS, generator=[seeded(i) for i in range(3)])
    assert len(batch) == 3
    for i, prompt in enumerate(PROMPTS):
        alone = draw(pipe, name, prompt=prompt, generator=seeded(i))
        assert relative(batch[i : i + 1], alone) < 10 * CLOSE  # batches are rounded in another order
        assert relative(batch[i : i + 1], batch[i - 1 : i or None]) > 0.1


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("prompts", [1, 2])
def test_number_of_images(family, images, prompts):
    """The images of a prompt are adjacent, each from its own noise."""
    name, pipe = family
    drawn = draw(pipe, name, prompt=PROMPTS[:prompts], num_images_per_prompt=images)
    assert len(drawn) == images * prompts
    by_hand = draw(pipe, name, prompt=[prompt for prompt in PROMPTS[:prompts] for _ in range(images)])
    assert relative(drawn, by_hand) < CLOSE


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


# --- the components --------------------------------------------------------------------------------------------------


def test_the_components_make_an_equal_pipeline(family):
    name, pipe = family
    again = CHILDREN[name](**pipe.components)
    assert set(pipe.components) == {*inspect.signature(type(pipe).__init__).parameters} - {
        "self",
        "force_zeros_for_empty_prompt",
        "add_watermarker",
    }
    assert draw(again, name).equal(draw(pipe, name))


def test_encode_prompt_in_isolation(family):
    """A pipeline of only text encoders encodes; one without them draws the same from the embeddings."""
    name, pipe = family
    texts = {part: getattr(pipe, part) for part in pipe.components if part.startswith(("text", "tokenizer"))}
    rest = {part: value for part, value in pipe.components.items() if part not in texts}
    alone = CHILDREN[name].from_pretrained(
        ROOT / "demo" / name, **texts, vae=None, scheduler=None, **{"unet" if name == "sdxl" else "transformer": None}
    )
    length = {"max_sequence_length": 64} if name == "flux" else {"negative_prompt": "snow"}
    with torch.no_grad():
        embeds = alone.encode_prompt(prompt=PROMPT, prompt_2=None, device="cpu", **length)
    encoded = {"prompt": None, **dict(zip(ENCODED[name], embeds))}
    negative = {"negative_prompt": "snow"} if name == "sdxl" else {}
    expected = draw(pipe, name, **negative)
    without = CHILDREN[name](**dict.fromkeys(texts), **rest)
    assert draw(without, name, **encoded).equal(expected)


@FAMILIES
def test_save_and_load_with_optional_components(name, tmp_path):
    pipe = load(CHILDREN[name], name)
    with torch.no_grad():
        embeds = pipe.encode_prompt(PROMPT, **({"prompt_2": None} if name == "flux" else {}))
    encoded = {"prompt": None, **dict(zip(ENCODED[name], embeds))}
    expected = draw(pipe, name, **encoded)
    optional = [part for part in pipe.components if part.startswith(("text", "tokenizer"))]
    for part in optional:
        setattr(pipe, part, None)
    pipe.save_pretrained(tmp_path)
    loaded = CHILDREN[name].from_pretrained(tmp_path, **({} if name == "sdxl" else dict.fromkeys(optional)))
    assert all(getattr(loaded, part) is None for part in optional)
    assert draw(loaded, name, **encoded).equal(expected)


def test_scheduler_can_be_exchanged(family):
    """A compatible scheduler can be set on the pipeline, and the next call uses its levels."""
    name, pipe = family
    pipe = copy.copy(pipe)
    before = draw(pipe, name)
    options = {"sdxl": {"timestep_spacing": "trailing"}, "flux": {"base_shift": 1.0, "max_shift": 1.0}}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **options[name])
    assert relative(draw(pipe, name), before) > 1e-3


# --- devices and dtypes ----------------------------------------------------------------------------------------------


@FAMILIES
def test_to(name):
    """`to` moves every network, by device, by dtype and by both; the pipeline reports where it is."""
    pipe = load(CHILDREN[name], name)
    networks = [one for one in pipe.components.values() if isinstance(one, torch.nn.Module)]
    assert pipe.to("cpu") is pipe and pipe.device == torch.device("cpu") and pipe.dtype == torch.float32
    pipe.to(torch.bfloat16)
    assert pipe.dtype == torch.bfloat16 and {one.dtype for one in networks} == {torch.bfloat16}
    pipe.to("meta", torch.float32)
    assert pipe.device.type == "meta" and {one.dtype for one in networks} == {torch.float32}


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@FAMILIES
def test_to_cuda_and_back(name):
    pipe = load(CHILDREN[name], name)
    before = draw(pipe, name)
    assert draw(pipe.to("cuda"), name).is_cuda
    assert draw(pipe.to("cpu"), name).equal(before)
