"""Callbacks, generators, interruption, threads, and what an exception leaves behind. On both pipelines."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys

import pytest
import torch
from conftest import CALLS, PARENTS, fail, network, parent_of, relative, seeded
from diffusers.callbacks import MultiPipelineCallbacks, SDXLCFGCutoffCallback
from tqdm.auto import tqdm

from sdxl_comfy_pipeline import sampler_names

CLOSE = 1e-5  # float32 rounding; see test_side_by_side.py
PARENTS_INPUTS = {name: parent._callback_tensor_inputs for name, parent in PARENTS.items()}


def draw(pipe, name, callback=None, inputs=("latents",), **call):
    call = {"generator": seeded(), **CALLS[name], "num_inference_steps": 4, **call}
    if "sigmas" in call:
        del call["num_inference_steps"]
    return pipe(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=list(inputs), **call).images


@contextlib.contextmanager
def counted(pipe):
    """A list that grows with each evaluation of the network."""
    evaluations = []
    hook = network(pipe).register_forward_hook(lambda *_: evaluations.append(1))
    yield evaluations
    hook.remove()


def test_callback_sees_what_the_parents_sees(family):
    name, pipe = family
    seen = {}

    def record(one, i, timestep, tensors):
        tensors = {key: value.clone() for key, value in tensors.items()}
        seen.setdefault(type(one), []).append((one.num_timesteps, i, float(timestep), tensors))
        assert name == "sdxl" or float(one.current_timestep) == pytest.approx(float(timestep), rel=1e-5)
        return {}

    parent = parent_of(pipe, name)
    expected = draw(parent, name, record, PARENTS_INPUTS[name])
    assert relative(draw(pipe, name, record, PARENTS_INPUTS[name]), expected) < CLOSE
    assert [one[:2] for one in seen[type(pipe)]] == [(4, i) for i in range(4)]
    for ours, theirs in zip(seen[type(pipe)], seen[type(parent)]):
        assert ours[:2] == theirs[:2] and ours[2] == pytest.approx(theirs[2], rel=1e-5)
        assert list(ours[3]) == list(theirs[3]) == PARENTS_INPUTS[name]
        for key in theirs[3]:
            assert relative(ours[3][key], theirs[3][key]) < CLOSE


def scaled(pipe, i, timestep, tensors):
    return {"latents": tensors["latents"] * 0.8} if i == 1 else {}


def scaled_in_place(pipe, i, timestep, tensors):
    if i == 1:
        tensors["latents"].mul_(0.8)
    return tensors


def other_prompt(pipe, i, timestep, tensors):
    return {"prompt_embeds": tensors["prompt_embeds"].flip(1) * 1.5} if i == 1 else {}


def everything(pipe, i, timestep, tensors):
    return {key: value if key == "latents" else value + 0.1 * i for key, value in tensors.items()}


def stop_before_the_last(pipe, i, timestep, tensors):
    pipe._interrupt = i == 2
    return scaled(pipe, i, timestep, tensors)


def less_guidance(pipe, i, timestep, tensors):
    if i == 1:
        pipe._guidance_scale = 2.0
    return {}


@pytest.mark.parametrize(
    "callback",
    [scaled, scaled_in_place, other_prompt, everything, stop_before_the_last, less_guidance],
    ids=lambda callback: callback.__name__,
)
def test_returned_values_act_as_in_the_parent(family, callback):
    name, pipe = family
    parent = parent_of(pipe, name)
    expected = draw(parent, name, callback, PARENTS_INPUTS[name])
    assert relative(draw(pipe, name, callback, PARENTS_INPUTS[name]), expected) < CLOSE
    if not (name == "flux" and callback is less_guidance):  # in the parent too, FLUX's guidance is set for the call
        assert relative(draw(parent, name), expected) > 100 * CLOSE


@pytest.mark.parametrize("returned", [True, False])
def test_latents_changed_in_place(family, returned):
    name, pipe = family
    for option in [{"parameterization": "flow"}, {"parameterization": "ve"}] if name == "flux" else [{}]:
        change = scaled_in_place if returned else lambda *seen: (scaled_in_place(*seen), None)[1]
        found = draw(pipe, name, change, **option)
        assert relative(found, draw(pipe, name, scaled, **option)) < CLOSE


def test_callback_that_only_looks_changes_nothing(family):
    name, pipe = family
    options = {"heun": {}, "dpmpp_2m_sde": {}, "dpm_adaptive": {"rtol": 1.0, "atol": 1.0, "eta": 1.0}}
    for sampler in options:
        call, seen = {"sampler": sampler, "sampler_kwargs": options[sampler]}, []

        def look(one, i, timestep, tensors, seen=seen):
            seen.append(i)
            torch.randn_like(tensors["latents"])  # the caller's own: no draw from the call's generator

        plain = draw(pipe, name, **call)
        assert draw(pipe, name, look, ("latents", "denoised", "sigma"), **call).equal(plain)
        assert seen == list(range(len(seen)))


MEMORYLESS = dict.fromkeys(["euler", "heun", "dpm_2"], {})
MEMORYLESS |= dict.fromkeys(["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"], {"eta": 0.0})


@pytest.mark.parametrize("sampler", MEMORYLESS)
def test_changed_latents_are_where_the_next_step_starts(family, sampler):
    """A step without memory goes on from the changed latents as a call does that starts with them."""
    name, pipe = family
    levels = {"sdxl": [12.0, 5.0, 2.0, 0.6, 0.2, 0.0], "flux": [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]}[name]
    other = torch.randn(draw(pipe, name, num_inference_steps=1).shape, generator=seeded(5))
    call = {"sampler": sampler, "sampler_kwargs": MEMORYLESS[sampler]}
    kept = []

    def change(one, i, timestep, tensors):
        kept.append((tensors["latents"], tensors["latents"].clone()))
        return {"latents": other} if i == 1 else {}

    changed = draw(pipe, name, change, schedule=levels, **call)
    assert all(latents.equal(then) for latents, then in kept)  # what was handed out is not written on
    expected = draw(pipe, name, schedule=levels[2:], latents=other, **call)
    assert relative(changed, expected) < 10 * CLOSE  # "ve" rounds t once more


def test_dpm_adaptive_is_followed(family):
    """The callback sees every accepted step and no rejected one; the next step begins with what it returns."""
    name, pipe = family
    seen = []

    def look(one, i, timestep, tensors):
        seen.append((float(tensors["sigma"]), tensors["latents"]))
        return {}

    options = {"sampler": "dpm_adaptive", "sampler_kwargs": {"h_init": 4.0}}  # too long a first step
    with counted(pipe) as evaluations:
        plain = draw(pipe, name, look, ("latents", "sigma"), **options)
    levels = [sigma for sigma, _ in seen]
    assert levels == sorted(set(levels), reverse=True)
    assert len(evaluations) > 3 * (len(seen) - 1) + 1  # three evaluations for each step, accepted or not; then to zero
    assert relative(draw(pipe, name, scaled, **options), plain) > 100 * CLOSE
    assert relative(seen[-1][1], plain) < CLOSE


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2_ancestral", "dpm_fast", "dpm_adaptive", "dpmpp_2m_sde"])
def test_interrupt_stops_at_that_step(family, sampler, monkeypatch):
    """The callback is the last one, and its latents come back. A progress bar has the steps, where they are known."""
    name, pipe = family
    seen, bar = [], pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda total: seen.append(total) or bar(total=total))

    def stop(one, i, timestep, tensors):
        seen.append((tensors["latents"], len(evaluations)))
        one._interrupt = i == 1
        return {}

    with counted(pipe) as evaluations:
        stopped = draw(pipe, name, stop, sampler=sampler, num_inference_steps=6)
    assert seen.pop(0) == (math.inf if sampler in ("dpm_fast", "dpm_adaptive") else 6)
    assert len(seen) == 2 and relative(stopped, seen[1][0]) < CLOSE
    assert len(evaluations) == seen[1][1]  # the network doesn't run again


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_returned_embeddings_are_cast(family, dtype):
    """Embeddings of another dtype than the network's do what they say, to their own rounding."""
    name, pipe = family

    def cast(one, i, timestep, tensors):
        return {key: value.to(dtype) for key, value in other_prompt(one, i, timestep, tensors).items()}

    expected = draw(pipe, name, other_prompt, ["prompt_embeds"])
    assert relative(draw(pipe, name, cast, ["prompt_embeds"]), expected) < (0.02 if dtype == torch.bfloat16 else CLOSE)


def test_diffusers_own_callbacks(sdxl):
    """Guidance is cut off in the middle of the run, in one callback and in a chain."""
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)
    for callback in (cutoff, MultiPipelineCallbacks([cutoff])):
        expected = draw(parent_of(sdxl, "sdxl"), "sdxl", callback)
        assert relative(draw(sdxl, "sdxl", callback), expected) < CLOSE
        assert relative(draw(sdxl, "sdxl"), expected) > 100 * CLOSE


@pytest.mark.parametrize("sampler", sampler_names())
def test_the_same_seed_gives_the_same_picture(family, sampler):
    """Twice, and in a batch; the global generator is neither moved nor needed."""
    name, pipe = family
    call = {"sampler": sampler, "num_inference_steps": 3, "guidance_scale": 1.0}
    if sampler in ("euler", "heun", "dpm_2"):
        call["sampler_kwargs"] = {"s_churn": 2.0}
    if sampler == "dpm_adaptive":
        call["sampler_kwargs"] = {"rtol": 1.0, "atol": 1.0, "eta": 1.0}  # few steps, with noise
    torch.manual_seed(1)
    state = torch.get_rng_state()
    alone = draw(pipe, name, generator=seeded(4), **call)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert draw(pipe, name, generator=seeded(4), **call).equal(alone)
    assert draw(pipe, name, generator=[seeded(4)], **call).equal(alone)
    if sampler != "dpm_adaptive":  # whose step size depends on the whole batch
        batch = draw(pipe, name, generator=[seeded(3), seeded(4)], num_images_per_prompt=2, **call)
        assert relative(batch[1:], alone) < 10 * CLOSE  # batches are rounded in another order
    assert relative(draw(pipe, name, generator=seeded(5), **call), alone) > 0.1


def test_without_a_generator_the_global_one_is_used(family):
    name, pipe = family
    pictures = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pictures.append(draw(pipe, name, generator=None, sampler="dpmpp_sde", num_inference_steps=2))
    assert pictures[0].equal(pictures[1]) and not pictures[0].equal(pictures[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("sampler", sampler_names())
def test_cpu_generator_on_a_gpu(family, sampler):
    """The noise is that of the CPU, whatever the device: pictures agree but for the GPU's arithmetic."""
    name, pipe = family
    expected = draw(pipe, name, sampler=sampler)
    on_gpu = draw(copy.deepcopy(pipe).to("cuda"), name, sampler=sampler)
    assert on_gpu.is_cuda and relative(on_gpu.cpu(), expected) < 0.05


def press_ctrl_c(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["callback", "network", "text_encoder", "vae", "sampler", "interrupt by Ctrl-C"])
def test_an_exception_leaves_the_pipeline_as_it_was(family, where, monkeypatch):
    name, pipe = family
    call, error = {"sampler": "heun", "output_type": "pt"}, ZeroDivisionError
    before = draw(pipe, name, **call)
    scheduler, modules = copy.deepcopy(vars(pipe.scheduler)), set(sys.modules)
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    monkeypatch.setitem(pipe._progress_bar_config, "disable", False)
    with pytest.MonkeyPatch.context() as patch:
        count = itertools.count()
        if where == "callback":
            call["callback"] = lambda one, i, *rest: fail() if i == 1 else {}
        elif where == "network":
            forward = network(pipe).forward
            patch.setattr(network(pipe), "forward", lambda *a, **k: fail() if next(count) == 4 else forward(*a, **k))
        elif where == "sampler":
            call["sampler_kwargs"], error = {"s_churn": 1.0, "s_noise": "loud"}, TypeError
        elif where == "interrupt by Ctrl-C":
            call["callback"], error = press_ctrl_c, KeyboardInterrupt
        else:
            patch.setattr(getattr(pipe, where), "decode" if where == "vae" else "forward", fail)
        with pytest.raises(error):
            draw(pipe, name, num_inference_steps=5, **call)
    assert freed == [True]  # offloaded models went back
    assert name == "sdxl" or pipe.current_timestep is None
    assert not tqdm._instances  # no progress bar stays open
    assert torch.overrides._len_torch_function_stack() == 0
    assert set(sys.modules) == modules
    assert all(str(value) == str(scheduler[key]) for key, value in vars(pipe.scheduler).items())
    pipe.set_progress_bar_config(disable=True)
    assert draw(pipe, name, sampler="heun", output_type="pt").equal(before)


def test_half_precision_vae_is_half_again_after_an_exception(sdxl):
    """Decoding in float32, as SDXL's VAE asks for, is undone when it fails."""
    pipe = copy.copy(sdxl)
    pipe.vae = copy.deepcopy(sdxl.vae).half()
    pipe.vae.register_to_config(force_upcast=True)
    whole = copy.copy(sdxl)
    whole.vae = copy.deepcopy(pipe.vae).float()
    assert draw(pipe, "sdxl", output_type="pt").equal(draw(whole, "sdxl", output_type="pt"))
    assert pipe.vae.dtype == torch.float16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vae, "decode", fail)
        with pytest.raises(ZeroDivisionError):
            draw(pipe, "sdxl", output_type="pt")
    assert pipe.vae.dtype == torch.float16
