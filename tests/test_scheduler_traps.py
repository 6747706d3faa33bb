"""What pipelines' loops do to a scheduler, and that its sampler changes nothing outside."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import itertools
import pickle
import warnings
import weakref
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from closed_form import call
from conftest import ROOT, parent_of, relative, seeded
from small_pipelines import random
from test_scheduler import BETAS, CLOSE, SAMPLERS, draw, made, ours

from parity.exact import KNOWN, flux_pipeline, sliced_wasserstein
from scheduling_k_diffusion import KDiffusionScheduler, find_sampler, sampling

FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
EULER = diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
EDM = diffusers.EDMEulerScheduler()
MULTISTEP = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
HEUN = {EULER: diffusers.HeunDiscreteScheduler, FLOW: diffusers.FlowMatchHeunDiscreteScheduler}


def stock_of(base: Any, sampler: str) -> Any:
    """diffusers' own scheduler for this sampler, if there is one."""
    if sampler == "heun" and base in HEUN:
        return HEUN[base].from_config(base.config)
    return copy.deepcopy(base) if sampler == "euler" else None


def levels_of(base: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The stock scheduler's levels after `set_timesteps` with these arguments."""
    stock = copy.deepcopy(base)
    stock.set_timesteps(*args, **kwargs)
    return stock.sigmas.double()


def loop(scheduler: Any, steps: int = 6, start: int = 0, named: bool = True, **options: Any):
    """The samples that a network saw in a pipeline's loop, and the last sample. `options`: as of `samples_of`."""
    scheduler.set_timesteps(steps)
    if named:
        scheduler.set_begin_index(start)
    *seen, last = samples_of(scheduler, start=start, **options)
    return seen, last


def samples_of(scheduler: Any, x=None, start=0, predict=lambda x: 0.5 * x, change: Any = None, generator=None):
    """The samples of a loop, one by one, over a network that returns `predict(x)`."""
    x = random(1, 2, 4, 4) * float(getattr(scheduler, "init_noise_sigma", 1.0)) if x is None else x
    yield x
    for i, t in enumerate(scheduler.timesteps[start:]):
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        more = {"generator": generator} if generator else {}
        x = scheduler.step(predict(given), t, x, return_dict=False, **more)[0]
        x = x if change is None else change(i, x)
        yield x


def step_of(model, x, sigma, after, heun):
    """Euler's step or Heun's."""
    slope = (x - model(x, sigma * x.new_ones(len(x)))) / sigma
    y = x + slope * (after - sigma)
    if heun and after > 0:
        y = x + (slope + (y - model(y, after * x.new_ones(len(x)))) / after) / 2 * (after - sigma)
    return y


def varying(heun: Any) -> Any:
    """Heun's step where `heun(sigma)`, else Euler's."""

    def sampler(model, x, sigmas, disable=None):
        for sigma, after in zip(sigmas, sigmas[1:]):
            x = step_of(model, x, sigma, after, heun(sigma))
        return x

    return sampler


def restart(model, x, sigmas):
    """Xu et al. 2023: from below 0.5 back to the first level below 0.95, once. Without noise."""
    levels, k, back = sigmas.tolist(), 0, next((k for k, level in enumerate(sigmas) if level < 0.95), 0)
    while k < len(levels) - 1:
        x, k = step_of(model, x, sigmas[k], sigmas[k + 1], True), k + 1
        if back is not None and levels[k] < 0.5 and back < k:
            x, k, back = x * (sigmas[back] / sigmas[k]), back, None
    return x


def churned(model, x, sigmas, callback=None):
    """Heun's steps from a tenth above each level, with which it calls back at the end of a step."""
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        x = step_of(model, x, 1.1 * sigma, after, True)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma})
    return x


CALLABLES = {"varies": varying(lambda sigma: sigma < 0.9), "restart": restart}
CALLABLES |= {"heun first": varying(lambda sigma: sigma > 0.9), "heun": varying(lambda sigma: True), "churn": churned}


@pytest.mark.parametrize("base", [EULER, FLOW], ids=["sdxl", "flow"])
@pytest.mark.parametrize("levels", [False, True], ids=["", "given"])
@pytest.mark.parametrize("name", CALLABLES)
def test_a_callable_begins_with_the_step_that_strength_asks_for(name, base, levels):
    """It ends as the callable does over the levels from there, or is refused before. Heun's method never is."""
    sampler, uniform, n, refused = CALLABLES[name], name in ("heun", "churn"), 12, []
    scheduler = KDiffusionScheduler.from_scheduler(base, sampler=sampler)
    given = {"num_inference_steps": n}
    if levels:  # as FLUX's pipelines
        ends = (1, 1 / n) if base is FLOW else (14, 0.1)
        given = {"sigmas": np.geomspace(*ends, n + (base is EULER))}
    planned = levels_of(base, **given)

    def model(x, sigma):
        slope = 0.5 * (x if base is FLOW else x / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt())
        return x - sigma.view(-1, 1, 1, 1) * slope

    for start in range(1 if levels and uniform else n):
        scheduler.set_timesteps(**given)
        try:
            cut = start * scheduler.order
            times = scheduler.timesteps[cut:]
            scheduler.set_begin_index(cut)
            first = x = scheduler.add_noise(random(1, 2, 4, 4), random(1, 2, 4, 4, seed=2), times[:1])
        except ValueError as error:
            assert "part-way" in str(error) and "schedule=levels[i:]" in str(error)
            refused.append(start)
            continue
        for t in times:
            x = scheduler.step(scheduler.scale_model_input(x, t) * 0.5, t, x).prev_sample
        # FLUX's pipelines count evaluations: the run begins with the step of evaluation `start`
        begins = int((planned - float(scheduler.sigmas[start])).abs().argmin()) if levels and not uniform else start
        assert relative(x, sampler(model, first.double(), planned[begins:])) < CLOSE
    assert 0 not in refused and not (uniform and refused)
    assert len(refused) < n - 1 or levels or name != "heun first"


def test_a_callable_that_asks_for_another_sigma_than_planned():
    def by_value(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return sampling.sample_euler(model, x, sigmas if x.numel() == 1 else sigmas * 0.9)

    with pytest.raises(ValueError, match="other evaluations"):
        loop(KDiffusionScheduler.from_scheduler(EULER, sampler=by_value))


@pytest.mark.parametrize("name", ["sd_image", "sd3_image", "flux_image"])
def test_strength_is_the_same_share_of_any_sampler(name):
    """Also where the pipeline passes levels, as FLUX's: those count evaluations in the place of steps."""
    begins = {}
    for sampler in ("euler", "heun", "dpm_2"):
        scheduler = ours(name, sampler)
        draw(name, scheduler, steps=10)
        begins[sampler] = float(scheduler.timesteps[scheduler.begin_index])
    later = float(scheduler.timesteps[scheduler.begin_index + 1])  # dpm_2 may begin between two levels
    assert begins["heun"] == begins["euler"] and begins["euler"] in (begins["dpm_2"], later)


def test_heun_begins_with_a_step_and_not_within_one():
    """Evaluation 4 begins step 2. A pipeline that ignores `order` begins with 3, the end of an Euler step."""
    expected = loop(stock_of(EULER, "heun"), start=4)[1]
    scheduler = KDiffusionScheduler.from_scheduler(EULER, sampler="heun")
    assert relative(loop(scheduler, start=4)[1], expected) < CLOSE
    assert relative(loop(scheduler, start=4, named=False)[1], expected) < CLOSE  # its timestep is evaluation 3's too
    assert relative(loop(scheduler, start=3)[1], expected) < CLOSE


@pytest.mark.parametrize("sampler, steps, within", [("dpm_2", 6, (1, 3, 5)), ("dpm_fast", 9, (1, 2, 4, 5, 7))])
def test_a_run_that_begins_within_a_step_continues_with_euler(sampler, steps, within):
    """dpm_2's second evaluation is in the middle of a step, by log sigma; dpm_fast's steps have 3, 3, 2 and 1."""
    scheduler = KDiffusionScheduler.from_scheduler(EULER, sampler=sampler)
    for start in within:
        seen, _ = loop(scheduler, steps=steps, start=start)
        now, after = scheduler.sigmas[start : start + 2]
        slope = seen[0] / (1 + now**2) ** 0.5 * 0.5  # the network's epsilon
        assert relative(seen[1], seen[0] + slope * (after - now)) < CLOSE


@pytest.mark.parametrize("sampler, steps, start", [("dpm_fast", 9, 3), ("heun", 6, 6)])
def test_a_second_run_continues_the_first(sampler, steps, start):
    """`denoising_end` of one is `denoising_start` of the next: together the whole. dpm_fast keeps its grid."""
    scheduler = KDiffusionScheduler.from_scheduler(EULER, sampler=sampler)
    whole, end = loop(scheduler, steps=steps)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(start)
    assert relative([*samples_of(scheduler, whole[start], start)][-1], end) < CLOSE


def test_churn_is_spread_over_the_whole_run():
    """A run that begins later adds as much noise in each step: k-diffusion divides `s_churn` by its steps."""
    scheduler = KDiffusionScheduler.from_scheduler(EULER, sampler="euler", sampler_kwargs={"s_churn": 1.0})
    seen, _ = loop(scheduler, start=3, generator=seeded())
    now, after = scheduler.sigmas[3:5].tolist()
    level = float(levels_of(EULER, 6)[4])
    assert after == pytest.approx(level * (1 + 1 / 6))
    slope = seen[0] / (1 + now**2) ** 0.5 * 0.5  # the network's epsilon
    noise = seen[1] - (seen[0] + slope * (level - now))
    # of 32 numbers the standard deviation is within 12 %; spread over the last three steps it were 45 % more
    assert float(noise.std()) == pytest.approx((after**2 - level**2) ** 0.5, rel=0.25)


def test_churn_of_a_flow_model_begins_with_noise_of_its_level():
    """The first sample is pure noise, also at the higher level. Towards x0 = 0 the next is t times the same noise."""
    options = {"s_churn": 2.0, "s_noise": 0.0}  # the network is asked at higher levels, and nothing is added
    scheduler = KDiffusionScheduler.from_scheduler(FLOW, sampler_kwargs=options)
    scheduler.set_timesteps(6)
    noise = random(1, 2, 4, 4)
    x = scheduler.step(noise, scheduler.timesteps[0], noise, seeded(), return_dict=False)[0]  # v = noise: x0 is 0
    t, level = (float(levels[1]) for levels in (scheduler.sigmas, levels_of(FLOW, 6)))
    assert t > level
    assert relative(x / (1 - t), noise * level / (1 - level)) < CLOSE


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("base", [EULER, FLOW], ids=["sdxl", "flow"])
def test_changed_samples_are_the_state(base, sampler):
    """As inpainting and callbacks change them, in place or not."""

    def change(i, x):
        return x * 0.5 + 1 if i in (0, 2) else x  # between steps of both

    def in_place(i, x):
        return x.copy_(change(i, x))

    expected = loop(stock_of(base, sampler), change=change)[1]
    for each in (change, in_place):
        scheduler = KDiffusionScheduler.from_scheduler(base, sampler=sampler)
        assert relative(loop(scheduler, change=each)[1], expected) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_stays_unrounded(dtype):
    """In half precision only what the network sees is rounded. With a prediction that does not depend on it, the last
    sample is that of float32, rounded once."""
    x, v = (random(1, 2, 4, 4, seed=seed).to(dtype) for seed in (1, 2))
    end = loop(KDiffusionScheduler.from_scheduler(FLOW), 50, x=x, predict=lambda x: v)[1]
    assert end.dtype == dtype
    assert relative(end, x.double() - v.double()) < torch.finfo(dtype).eps  # one rounding, of half an eps


def test_noise_is_added_at_any_timestep():
    """During a run, too, as inpainting asks at each next timestep."""
    for base in (EULER, FLOW, diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)):
        scheduler, stock = KDiffusionScheduler.from_scheduler(base), copy.deepcopy(base)
        x0, noise = random(2, 2, 4, 4), random(2, 2, 4, 4, seed=2)
        for each in (scheduler, stock):
            each.set_timesteps(5)
        name = "scale_noise" if base is FLOW else "add_noise"
        for running in (False, True):
            for t in scheduler.timesteps:
                given = (x0, t.repeat(2), noise) if base is FLOW else (x0, noise, t.repeat(2))
                assert relative(getattr(scheduler, name)(*given), getattr(stock, name)(*given)) < CLOSE
                if running:
                    scheduler.step(scheduler.scale_model_input(x0, t), t, x0)
    base = diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True)
    scheduler, stock = KDiffusionScheduler.from_scheduler(base), copy.deepcopy(base)
    for start in range(85, 100):  # some of these timesteps are equal: they are rounded
        for each in (scheduler, stock):
            each.set_timesteps(100)
            each.set_begin_index(start)
        expected, found = (one.add_noise(x0, noise, one.timesteps[start].repeat(2)) for one in (stock, scheduler))
        assert relative(found, expected) < CLOSE


def test_cosmos_calls_step_twice():
    """For x0 of both halves of guidance; then Cosmos goes a step back and passes the guided x0."""

    def run(scheduler: Any, guided: bool) -> torch.Tensor:
        scheduler.set_timesteps(4)
        x = random(1, 2, 4, 4) * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            halves = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            output = halves * torch.tensor([0.5, 0.2])[: len(halves), None, None, None]
            x0 = scheduler.step(output, t, torch.cat([x, x]) if guided else x, return_dict=False)[1]
            scheduler._step_index -= 1
            x0 = 3 * x0[:1] - 2 * x0[-1:]
            x = scheduler.step(x0, t, x, return_dict=False, pred_original_sample=x0)[0]
        return x

    assert relative(run(KDiffusionScheduler.from_scheduler(EDM), True), run(copy.deepcopy(EDM), True)) < CLOSE
    for sampler in ("euler", "dpmpp_2m"):  # without guidance as in any pipeline
        scheduler = KDiffusionScheduler.from_scheduler(EDM, sampler=sampler)
        assert relative(run(scheduler, False), loop(scheduler, steps=4)[1]) < CLOSE


def test_ltx_gives_a_timestep_for_each_token():
    """LTX also flips the sign of its network's output, as the stock scheduler expects."""
    found = []
    for scheduler in (KDiffusionScheduler.from_scheduler(FLOW), copy.deepcopy(FLOW)):
        scheduler.set_timesteps(4)
        x = random(1, 6, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(-0.5 * x, t, x, per_token_timesteps=t.expand(1, 6), return_dict=False)[0]
        found.append(x)
    assert relative(*found) < CLOSE


def test_a_predicted_variance_is_left_out():
    """DiT's and PixArt's networks return it in a second half of the channels."""
    x, variance, scheduler = random(1, 4, 4, 4), random(1, 4, 4, 4, seed=2), KDiffusionScheduler.from_scheduler(FLOW)
    found = loop(scheduler, x=x, predict=lambda x: torch.cat([0.5 * x, variance], 1))[1]
    assert torch.equal(found, loop(scheduler, x=x)[1])


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "euler_ancestral"])
@pytest.mark.parametrize("name", ["flux_text", "flux_image", "flux_inpaint", "flux_fill", "sd3_image", "wan_video"])
def test_noise_does_not_depend_on_the_last_bits_of_a_picture(name, sampler):
    """Another number of threads changes these bits. Also where the pipeline gives `step` no generator."""
    arguments = made(name)[1]
    key = next(key for key in ("video", "image", "prompt_embeds") if key in arguments)
    value = arguments[key]
    if key != "prompt_embeds":
        frames = [np.array(one) for one in (value if isinstance(value, list) else [value])]
        value = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
        value = value[None] if key == "video" else value
    found = [draw(name, ours(name, sampler), **{key: value * (1 - nudge)}) for nudge in (0.0, 1e-7)]
    assert 0 < relative(*found) < 1e-4
    assert relative(draw(name, ours(name, sampler), generator=seeded(1)), found[0]) > 0.1


def test_noise_without_a_generator_follows_from_each_images_bits():
    scheduler, x = KDiffusionScheduler.from_scheduler(FLOW, sampler="euler_ancestral"), random(2, 2, 4, 4)
    pair, again, second, other = (loop(scheduler, x=one)[1] for one in (x, x, x[1:], x + 1e-4))
    assert torch.equal(again, pair) and torch.equal(second, pair[1:])
    many = loop(scheduler, x=x[:1] + 1e-4 * torch.arange(200).view(-1, 1, 1, 1))[1]
    assert relative(other, pair) > 0.1 and torch.pdist(many.flatten(1)).min() > 0.1  # no two have the same noise


def test_one_generator_for_all_frames_of_a_batch():
    """Text-to-video pipelines step with the frames as the batch, and with the caller's list of one generator."""
    one, listed = (
        loop(KDiffusionScheduler.from_scheduler(EULER, sampler="dpmpp_sde"), x=random(3, 2, 4, 4), generator=given)[1]
        for given in (seeded(), [seeded()])
    )
    assert one.equal(listed)


def entering(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A sampler that enters torch's modes and stays in them for the whole run."""
    with torch.inference_mode(), torch.enable_grad():
        return sampling.sample_euler(model, x, sigmas, callback=callback, disable=True)


def on_meta(model, x, sigmas):
    with torch.device("meta"):
        return sampling.sample_euler(model, x, sigmas, disable=True)


def state() -> tuple:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", entering])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_of_the_sampler_is_seen_outside(sampler, grad):
    with torch.set_grad_enabled(grad):
        before = state()

        def look(i, x):
            assert state() == before
            return x

        loop(KDiffusionScheduler.from_scheduler(EULER, sampler=sampler), change=look)
        assert state() == before


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", entering])
@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_run_left_half_way_leaves_nothing(sampler, within):
    """Its end, which may come with the garbage, must not change the modes of whoever is running then."""
    scheduler, x, before = KDiffusionScheduler.from_scheduler(EULER, sampler=sampler), random(1, 2, 4, 4), state()
    scheduler.set_timesteps(4)
    first, second = scheduler.timesteps[:2]
    with within():
        x = scheduler.step(scheduler.scale_model_input(x, first), first, x).prev_sample
    x = scheduler.step(scheduler.scale_model_input(x.clone(), second), second, x.clone()).prev_sample
    assert state() == before
    left = weakref.ref(scheduler._run)
    del scheduler
    gc.collect()
    assert left() is None and state() == before


def test_a_run_after_one_that_was_interrupted():
    scheduler = KDiffusionScheduler.from_scheduler(EULER, sampler="dpmpp_2m")
    expected = loop(scheduler)[1]
    with pytest.raises(ZeroDivisionError):
        loop(scheduler, change=lambda i, x: x * (1 // (2 - i)))
    assert torch.equal(loop(scheduler)[1], expected)


def test_an_error_of_the_sampler_comes_out_of_step():
    def broken(model, x, sigmas, extra_args=None, callback=None, disable=None):
        x = model(x, sigmas[0] * x.new_ones(len(x)))
        if x.numel() > 1:  # not in the trial
            raise ArithmeticError("broken")
        return x

    scheduler = KDiffusionScheduler.from_scheduler(EULER, sampler=broken)
    with pytest.raises(ArithmeticError, match="broken"):
        loop(scheduler)
    x = random(1, 2, 4, 4)
    with pytest.raises(ArithmeticError, match="broken"):  # the next step begins anew
        scheduler.step(x, scheduler.timesteps[0], x)


def grown(i: int, x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1) if i == 3 else x  # between steps of Heun's method too


@pytest.mark.parametrize("base", [EULER, FLOW, EDM], ids=["sdxl", "flow", "edm"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_change_their_shape(sampler, base):
    """The stock scheduler's, for Euler's methods. Batches may grow too."""
    scheduler = KDiffusionScheduler.from_scheduler(base, sampler=sampler)
    if sampler not in ("euler", "euler_ancestral"):
        with pytest.raises(ValueError, match="another shape"):
            loop(scheduler, change=grown, generator=seeded())
        return
    found = loop(scheduler, change=grown, generator=seeded())[1]
    assert found.shape == (1, 2, 4, 8) and found.isfinite().all()
    if stock := stock_of(base, sampler):
        assert relative(found, loop(stock, change=grown)[1]) < CLOSE
        doubled = loop(scheduler, change=lambda i, x: torch.cat([x, x]) if i == 3 else x)[1]
        assert relative(doubled[1:], loop(scheduler)[1]) < CLOSE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_copies_at_any_time(sampler):
    """MultiDiffusion copies `__dict__` after each step, each part of the picture its own."""
    scheduler = KDiffusionScheduler.from_scheduler(EULER, sampler=sampler)
    expected = loop(scheduler, generator=seeded())[1]
    scheduler.set_timesteps(6)
    parts = [random(1, 2, 4, 4) * float(scheduler.init_noise_sigma) for _ in range(2)]
    kept, generators = [copy.deepcopy(vars(scheduler))] * 2, [seeded(), seeded()]
    saved, at = pickle.dumps(scheduler), parts[0]
    for i, t in enumerate(scheduler.timesteps):
        for j, x in enumerate(parts):
            vars(scheduler).update(kept[j])
            given = scheduler.scale_model_input(x, t) * 0.5
            parts[j] = scheduler.step(given, t, x, generator=generators[j]).prev_sample
            kept[j] = copy.deepcopy(vars(scheduler))
        if i == 2:
            saved, at, state = pickle.dumps(scheduler), parts[0], generators[0].get_state()
    assert all(part.equal(expected) for part in parts)
    again, x = pickle.loads(saved), at  # a run can't be saved, but one without history begins anew
    generators[0].set_state(state)
    try:
        for t in again.timesteps[3:]:
            x = again.step(again.scale_model_input(x, t) * 0.5, t, x, generator=generators[0]).prev_sample
    except ValueError as error:
        assert "can't go on with a copy" in str(error) and sampler not in ("euler", "euler_ancestral")
    else:
        assert relative(x, expected) < CLOSE


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde"])
def test_each_step_in_another_thread(sampler):
    scheduler = KDiffusionScheduler.from_scheduler(EULER, sampler=sampler)
    expected = loop(scheduler, generator=seeded())[1]
    scheduler.set_timesteps(6)
    going, x = samples_of(scheduler, generator=seeded()), None
    try:
        for _ in range(len(scheduler.timesteps) + 1):
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                x = thread.submit(next, going).result()
    except ValueError as error:
        assert "another thread" in str(error) and sampler not in ("euler", "euler_ancestral")
    else:
        assert relative(x, expected) < CLOSE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_loops_that_step_again_from_a_timestep(sampler):
    """From the first one after a part of a run, as a new run. Twice from each, as for a preview, as DDIM's can."""
    scheduler, x = KDiffusionScheduler.from_scheduler(EULER, sampler=sampler), random(1, 2, 4, 4)
    expected = loop(scheduler, generator=seeded())[1]
    scheduler.set_timesteps(6)
    list(itertools.islice(samples_of(scheduler, generator=seeded()), 4))
    assert [*samples_of(scheduler, generator=seeded())][-1].equal(expected)
    scheduler.set_timesteps(6)
    x = x * float(scheduler.init_noise_sigma)
    try:
        for t in scheduler.timesteps:
            output = scheduler.scale_model_input(x, t) * 0.5
            _, x = (scheduler.step(output, t, x, generator=seeded()).prev_sample for _ in "12")
    except ValueError as error:
        assert "twice from a timestep" in str(error) and sampler not in ("euler", "euler_ancestral")
    else:
        assert sampler == "euler_ancestral" or relative(x, expected) < CLOSE


# --- construction and saving ------------------------------------------------------------------------------------------


OTHER_KINDS = ("CMStochasticIterative", "SCM", "DDIMInverse", "RePaint", "Helios", "CogVideoXDPM")
REFUSED = [
    *((getattr(diffusers, f"{name}Scheduler")(), {}, "needs betas") for name in OTHER_KINDS),
    (EULER, {"sampler": "dpm_adaptive"}, "StableDiffusionXLComfyPipeline"),
    (EULER, {"sampler": "eular"}, "there are euler, "),
    (EULER, {"sampler": on_meta}, "another default device"),
    (EULER, {"sampler": lambda model, x, sigmas: None}, "call the network, and to return"),
    (EULER, {"schedule": "karras"}, "levels, as of sampling.get_sigmas_karras"),
    (EULER, {"sampler_kwargs": {"eta": 1.0}}, "takes no eta"),
    (EULER, {"parameterization": "vp"}, "parameterization"),
    (EULER, {"schedule": [1.0, 2.0]}, "schedule"),
]


@pytest.mark.parametrize("base, options, words", REFUSED)
def test_what_is_refused_in_words(base, options, words):
    with pytest.raises(ValueError, match=words):
        KDiffusionScheduler.from_scheduler(base, **options)


def test_another_number_of_levels_is_refused():
    with pytest.raises(ValueError, match="num_inference_steps=2"):
        KDiffusionScheduler.from_scheduler(EULER, schedule=[2.0, 1.0, 0.0]).set_timesteps(5)


def test_what_the_base_does_to_x0_is_ignored_with_a_warning():
    for options in ({"clip_sample": True}, {"clip_sample": False, "thresholding": True}):
        with pytest.warns(UserWarning, match="is ignored") as warned:
            loop(KDiffusionScheduler.from_scheduler(diffusers.DDPMScheduler(**BETAS, **options)))
        assert len(warned) == 1
    config = diffusers.DDIMScheduler(**BETAS, clip_sample=True).config
    with warnings.catch_warnings():  # this one does not clip
        warnings.simplefilter("error", UserWarning)
        KDiffusionScheduler.from_scheduler(diffusers.EulerDiscreteScheduler.from_config(config))


@pytest.mark.parametrize("base", [EULER, FLOW, EDM, MULTISTEP])
def test_a_configuration_makes_one(base):
    """Also one of a scheduler made in code, which does not name its class."""
    assert "_class_name" not in base.config
    scheduler = KDiffusionScheduler.from_config(base.config, sampler="dpmpp_2m")
    assert isinstance(scheduler, type(base)) and scheduler.sampler.function is sampling.sample_dpmpp_2m
    again = KDiffusionScheduler.from_config(scheduler.config, sampler="heun", num_train_timesteps=500)
    assert again.config.num_train_timesteps == 500 and again.order == 2


def test_the_scheduler_that_it_is_made_of_stays_as_it_is():
    """And lends it what was set later: `set_shift` leaves the config alone."""
    base = diffusers.FlowMatchEulerDiscreteScheduler()
    base.set_shift(3.0)
    base.set_timesteps(3)
    before = base.timesteps.clone()
    scheduler = KDiffusionScheduler.from_scheduler(base)
    assert relative(loop(scheduler)[1], loop(copy.deepcopy(base))[1]) < CLOSE
    assert torch.equal(base.timesteps, before)


def test_noise_of_a_callable_is_seeded_where_the_pipeline_gives_no_generator():
    """torch's global generator is not needed."""

    def sampler(model, x, sigmas):
        return sampling.sample_euler(model, x + torch.randn_like(x), sigmas, disable=True)

    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(loop(KDiffusionScheduler.from_scheduler(EULER, sampler=sampler))[1])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "folder, name", [("sdxl", "EulerDiscreteScheduler"), ("flux", "FlowMatchEulerDiscreteScheduler")]
)
def test_what_is_saved_is_the_base(tmp_path, folder, name):
    scheduler = KDiffusionScheduler.from_pretrained(ROOT / "demo" / folder, subfolder="scheduler", sampler="heun")
    assert scheduler.sampler.function is sampling.sample_heun
    scheduler.save_pretrained(tmp_path)
    read = getattr(diffusers, name).from_pretrained(tmp_path)
    assert type(read) is getattr(diffusers, name) and read.config.items() >= scheduler.base.config.items()
    pipe = made("sd_text" if folder == "sdxl" else "flux_text")[0]
    pipe.scheduler = scheduler
    assert pipe.config["scheduler"] == ("diffusers", name)


def test_attributes_of_the_base_are_available():
    scheduler = KDiffusionScheduler.from_scheduler(EULER)
    assert scheduler.alphas_cumprod is scheduler.base.alphas_cumprod and scheduler.config.beta_start == 0.00085
    assert not hasattr(scheduler, "nonsense")


def test_what_changes_between_two_runs():
    """The second run is that of a new scheduler: with another sampler, or with a callable that has changed."""
    share = 0.5

    def sampler(model, x, sigmas):
        for sigma in sigmas[:-1]:
            x = x + 0.1 * model(x, (sigma * share).expand(len(x)))
        return x

    kept = KDiffusionScheduler.from_scheduler(EULER, sampler=sampler)
    loop(kept)
    share = 0.25
    assert loop(kept)[1].equal(loop(KDiffusionScheduler.from_scheduler(EULER, sampler=sampler))[1])
    kept.sampler = find_sampler("heun")
    assert loop(kept)[1].equal(loop(KDiffusionScheduler.from_scheduler(EULER, sampler="heun"))[1])
    levels = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)
    kept = KDiffusionScheduler.from_scheduler(EULER, schedule=levels)
    first = loop(kept)[1]
    levels.mul_(0.5)
    assert loop(kept)[1].equal(first)


def test_a_sample_that_is_differentiated():
    """As user-supplied guidance has it. Noise is seeded by a hash of the sample's bits all the same."""
    x = torch.ones(1, 4, 8, 8, requires_grad=True)
    for sampler in ("euler", "euler_ancestral"):
        scheduler = KDiffusionScheduler.from_scheduler(EULER, sampler=sampler)
        scheduler.set_timesteps(3)
        assert scheduler.step(x * 0.1, scheduler.timesteps[0], x).prev_sample.isfinite().all()


def test_quantized_timesteps_are_whole():
    base = diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)  # whose own timesteps have fractions
    scheduler = KDiffusionScheduler.from_scheduler(base, sampler="dpm_2", quantize_timesteps=True)
    scheduler.set_timesteps(5)
    assert all(t == round(t) for t in scheduler.timesteps.tolist())


def test_pndm_as_the_base():
    """It lists a timestep twice, and has none before `set_timesteps`. Euler's method over its levels is DDIM's."""
    base = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    ddim = diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)
    scheduler = KDiffusionScheduler.from_scheduler(base)
    assert relative(draw("sd_text", scheduler, steps=5), draw("sd_text", ddim, steps=5)) < CLOSE
    base.set_timesteps(5)
    assert scheduler.timesteps.tolist() == base.timesteps.unique_consecutive().tolist() == [801, 601, 401, 201, 1]
    scheduler = KDiffusionScheduler.from_scheduler(diffusers.PNDMScheduler())  # Runge-Kutta's steps have others between
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [800, 600, 400, 200, 0]


def test_what_step_does_not_take_is_refused():
    """LEDITS++ passes the noise of an inversion, which a sampler would not add. What changes nothing is ignored."""
    scheduler, x = KDiffusionScheduler.from_scheduler(EULER), random(1, 2, 4, 4)
    scheduler.set_timesteps(4)
    with pytest.raises(TypeError, match="step takes no eta, variance_noise"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=0.5, variance_noise=x, use_clipped_model_output=None)
    scheduler.step(x, scheduler.timesteps[0], x, eta=0.0, prev_timestep=scheduler.timesteps[1])


STOCHASTIC = {name: {} for name in SAMPLERS if "noise_sampler" in find_sampler(name).arguments}
STOCHASTIC |= {"dpm_fast": {"eta": 1.0}} | {name: {"s_churn": 5.0} for name in ("euler", "heun", "dpm_2")}


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_distribution(sampler):
    """1024 samples of a mixture that the network knows exactly, one a patch, in the stock FLUX pipeline.

    Two true sets are 0.034 to 0.054 apart; noise in flow coordinates leaves 0.2 or more. SDXL: test_closed_form.py.
    """
    pipe = parent_of(flux_pipeline(KNOWN), "flux")
    base, options = pipe.scheduler, STOCHASTIC[sampler]
    pipe.scheduler = KDiffusionScheduler.from_scheduler(base, sampler=sampler, sampler_kwargs=options)
    samples = call(pipe, 32, 32, num_inference_steps=50, generator=seeded())[0]
    assert sliced_wasserstein(samples, KNOWN.sample(len(samples), seeded(1))) < 0.08
