"""comfy_ksampler.py against latents and levels that ComfyUI 0.27.0 and 0.3.64 computed (tests/data)."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from types import SimpleNamespace

import comfy_like
import comfy_references
import numpy as np
import pytest
import scipy.stats
import small_pipelines
import torch
from comfy_references import LATENTS, SHIFT, SIGMAS, SIZE, draw, draw_anywhere, mixture, pipelines, references, settings
from comfy_samplers import ON_BOTH, ON_FLUX
from conftest import ROOT, default_dtype, parent_of, relative, seeded
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    VQDiffusionScheduler,
)
from pretend_mps import placed

import comfy_ksampler
from comfy_ksampler import SCHEDULERS, comfy_sampler, ksampler, levels, load_custom_nodes, model_sampling, names
from parity.exact import flux_pipeline, sdxl_pipeline

STAND_IN = ROOT / "tests" / "comfyui"


@pytest.fixture(scope="module")
def pipes():
    return pipelines()


@pytest.fixture(autouse=True)
def no_comfyui(monkeypatch):
    """ComfyUI can't be imported, even if it is installed."""
    monkeypatch.setitem(sys.modules, "comfy", None)


@pytest.mark.parametrize(
    "model, sampler_name",
    [
        *itertools.product(["sdxl", "flux"], comfy_ksampler.K_DIFFUSIONS),
        *(("sdxl", name) for name in comfy_ksampler.SDXL_ONLY),
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")  # torchsde's, of times beyond its ends
def test_latents_are_comfyuis(pipes, record_property, model, sampler_name):
    """To the rounding of float32, at cfg 1 and 7, denoise 1 and 0.6.

    On SDXL k-diffusion adds in another order. On FLUX the operations are the same: exp and log of another processor
    move the levels by an ulp, the latents by 2e-7.
    """
    keys = references(model, sampler_name)
    calls = [ksampler(pipes[model], **settings(key)) for key in keys]
    worst = max(relative(draw(pipes[model], **call), LATENTS.get_tensor(key)) for key, call in zip(keys, calls))
    record_property("distance", f"{model} {sampler_name} {worst:.0e}")
    assert worst < {"sdxl": 1e-6, "flux": 5e-7}[model]


@pytest.mark.parametrize("key", comfy_references.BEFORE.keys())
def test_latents_of_comfyui_before_0_7(pipes, key):
    """ComfyUI 0.3.64's, whose white step noise comes from the seed itself: docs/comfyui.md has the recipe.

    They have all levels, dpm_2's too. Two versions of ComfyUI are 3e-6 apart, in lms.
    """
    pipe, fields = pipes[key.split("/")[0]], settings(key)
    call = ksampler(pipe, **fields)
    if "ancestral" in key:
        older = ksampler(pipe, **fields | {"seed": fields["seed"] - 1})
        call = older | {name: call[name] for name in ("latents", "generator")}
    call |= {"schedule": levels(pipe, fields["scheduler"], fields["steps"], **SIZE)}
    assert relative(draw(pipe, **call), comfy_references.BEFORE.get_tensor(key)) < 5e-6


def test_one_seed_draws_a_batch_at_once(pipes):
    """One draw of the whole shape: the first image is the same as in a batch of one."""
    for pipe in (pipes["sdxl"], pipes["flux"]):
        fields = settings("either/euler/simple/4/3")
        batch = draw(pipe, **ksampler(pipe, **fields, batch_size=2))
        torch.testing.assert_close(batch[:1], draw(pipe, **ksampler(pipe, **fields)), rtol=1e-5, atol=1e-6)
        assert len(batch) == 2 and relative(batch[1:], batch[:1]) > 0.1


@pytest.mark.parametrize(
    "key",
    ["sdxl/dpmpp_2m_sde/karras/20/0/7/1", "sdxl/lms/simple/20/0/1/1", "sdxl/dpm_2/simple/20/0/1/0.6"]
    + ["flux/heun/beta/20/0/1/1", "flux/dpm_2/simple/20/0/1/0.6"],
)
def test_in_a_stock_pipeline(pipes, key):
    """The scheduler takes the sampler's arguments, the stock pipeline the rest."""
    pipe = parent_of(pipes[key.split("/")[0]], key.split("/")[0])
    pipe.set_progress_bar_config(disable=True)
    assert relative(draw_anywhere(pipe, ksampler(pipe, **settings(key))), LATENTS.get_tensor(key)) < 2e-6


def test_zero_terminal_snr(pipes):
    """v prediction from sigma 4518.76: x0 at the first step is -v of the noise, hence the mean of the means."""
    pipe = pipes["sdxl_v_prediction_zsnr"]
    latents = draw(pipe, **ksampler(pipe, **settings("sdxl/euler/simple/1/0")))
    assert relative(latents, mixture(4).mean.view(1, 4, 16, 16).float()) < 0.02  # 4518 instead of infinity


def test_churn_continues_after_the_initial_noise(pipes):
    """ComfyUI draws both from the same generator."""
    call = ksampler(pipes["sdxl"], **settings("sdxl/euler/karras/8/6")) | {"sampler_kwargs": {"s_churn": 4.0}}
    generator = seeded(6)
    torch.randn(1, 4, 16, 16, generator=generator)
    expected = draw(pipes["sdxl"], **call | {"generator": generator})
    assert draw(pipes["sdxl"], **call).equal(expected)


@pytest.mark.parametrize(
    "model, sampler_name",
    [
        ("sdxl", "euler_ancestral"),
        ("sdxl", "dpmpp_2m_sde"),
        *itertools.product(["sdxl", "flux"], ["euler", "dpm_fast"]),
    ],
)
def test_a_float64_network_gets_the_same_noise(pipes, model, sampler_name):
    """It is drawn in float32 and then converted, so that a comparison in float64 is of the same picture."""
    exact = sdxl_pipeline(mixture(4)) if model == "sdxl" else flux_pipeline(mixture(16), mu=SHIFT, channels=64)
    fields = settings(f"{model}/{sampler_name}/simple/8/4")
    with default_dtype(torch.float64):
        with torch.device("meta"):
            call = ksampler(exact, **fields)
        latents = draw(exact, **call)
    assert latents.dtype == torch.float64
    assert relative(draw(pipes[model], **ksampler(pipes[model], **fields)), latents) < 1e-5  # float32


def test_no_float64_on_the_latents_device(pipes):
    """Betas on a device without float64 give the same levels, and times there the same Brownian noise."""
    pipe, scheduler = pipes["sdxl"], copy.deepcopy(pipes["sdxl"].scheduler)
    scheduler.betas = placed(scheduler.betas)
    assert model_sampling(SimpleNamespace(scheduler=scheduler)).sigmas.equal(model_sampling(pipe).sigmas)
    draws = ksampler(pipe, **settings("sdxl/dpmpp_sde/karras/4/0"))["sampler_kwargs"]["noise_sampler"]
    times = torch.tensor([5.0, 3.0])
    assert draws(*map(placed, times)).equal(draws(*times))


@pytest.mark.parametrize(
    "model, name", [("sdxl", name) for name in ON_BOTH] + [("flux", name) for name in ON_BOTH | ON_FLUX]
)
def test_comfyuis_functions_give_its_latents(comfyui, pipes, record_property, model, name):
    """test_comfyui.py runs ComfyUI's own functions; these look up the same things, such as ComfyUI's CONST."""
    pipe, worst = pipes[model], 0.0
    for key in references(model, name):
        call = ksampler(pipe, **settings(key))
        assert callable(call["sampler"]), "ComfyUI's is taken where k-diffusion's is another"
        worst = max(worst, relative(draw(pipe, **call), LATENTS.get_tensor(key)))
    record_property("distance", f"{model} {name} {worst:.0e} (a function like ComfyUI's)")
    # float32, with sums in another order: a Brownian tree depends on the last digits of its times, and a guidance
    # of 7 multiplies them
    assert worst < (1e-5 if "_sde" in name or "cfg_pp" in name else 1e-6)


def test_custom_nodes(comfyui, pipes, tmp_path):
    """Their names are known after loading, and nothing is written into ComfyUI's folder."""
    pipe, fields = pipes["sdxl"], settings("sdxl/stand_in/halves/4/0")
    with pytest.raises(ValueError, match="no 'stand_in'.*ComfyUI was found, and loaded are no custom nodes"):
        ksampler(pipe, **fields)
    # otherwise ComfyUI asks for a GPU
    assert sys.modules["comfy.cli_args"].args.cpu == (not torch.accelerator.is_available())
    before = {path: path.stat().st_mtime_ns for path in STAND_IN.rglob("*") if "__pycache__" not in path.parts}
    for _ in range(2):
        load_custom_nodes("stand_in")
    assert before == {path: path.stat().st_mtime_ns for path in STAND_IN.rglob("*") if "__pycache__" not in path.parts}
    assert "stand_in" in names()[0] and "halves" in names()[1] and len(names()[0]) == len(set(names()[0]))
    sigma = model_sampling(pipe).sigma_max
    torch.testing.assert_close(levels(pipe, "halves", 3), sigma * torch.tensor([1, 0.5, 0.25, 0]))
    torch.testing.assert_close(levels(pipe, "halves", 2, 0.5), sigma * torch.tensor([0.25, 0.125, 0]))
    with pytest.raises(ValueError, match="no 'stand_ni'; did you mean stand_in.*loaded are stand_in"):
        ksampler(pipe, **fields | {"sampler_name": "stand_ni"})
    with pytest.raises(ValueError, match="'standin' is no path, and not in .*custom_nodes, which has stand_in"):
        load_custom_nodes("standin")
    (tmp_path / "needs_more.py").write_text("import comfy.samplers\nimport not_installed.part\n")
    with pytest.raises(ImportError, match="needs_more.*No module named 'not_installed'.*the package 'not_installed'"):
        load_custom_nodes(tmp_path / "needs_more.py")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("raise RuntimeError('the node says so')")
    for _ in range(2):
        with pytest.raises(ImportError, match="broken.*RuntimeError: the node says so"):
            load_custom_nodes(str(tmp_path / "broken"))


def test_a_schedule_sees_the_class_of_the_prediction(comfyui, pipes):
    load_custom_nodes("stand_in")
    comfy, seen = sys.modules["comfy"], []
    comfy.SCHEDULER_HANDLERS["look"] = lambda sampling, steps: seen.append(sampling) or torch.tensor([1.0, 0.0])
    kinds = {"sdxl": comfy.EPS, "sdxl_v_prediction_zsnr": comfy.V_PREDICTION, "flux": comfy.CONST}
    for name in kinds:
        levels(pipes[name], "look", 1, **SIZE)
    assert [type(sampling).__bases__[1] for sampling in seen] == [*kinds.values()]


def test_custom_nodes_need_comfyui():
    with pytest.raises(ImportError, match="custom nodes need ComfyUI, .*PYTHONPATH"):
        load_custom_nodes("stand_in")


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
@pytest.mark.parametrize("model, cfg", [("sdxl", 1.0), ("sdxl", 3.0), ("flux", 1.0)])
def test_a_custom_nodes_sampler(comfyui, pipes, model, cfg, stock):
    """Euler's method, plus a tenth of the next level's noise, from one generator with the next seed for a batch."""
    load_custom_nodes("stand_in")
    pipe = parent_of(pipes[model], model) if stock else pipes[model]
    pipe.set_progress_bar_config(disable=True)
    fields = settings(f"{model}/stand_in/simple/5/7/{cfg}/1", batch_size=2)
    state = torch.get_rng_state()
    latents = draw_anywhere(pipe, ksampler(pipe, **fields))
    assert torch.get_rng_state().equal(state), "torch's own generator is as before"

    def expected(model, x, sigmas, extra_args=None, callback=None, disable=None):
        generator, channels = seeded(8), 16 if flow else 4
        for sigma, after in zip(sigmas[:-1], sigmas[1:]):
            noise = torch.randn(2, channels, 16, 16, generator=generator)
            denoised = model(x, sigma * x.new_ones([len(x)]))
            x = denoised + (x - denoised) * after / sigma + 0.1 * after * sampling.packed(noise)
        return x

    sampling, flow = model_sampling(pipes[model], **SIZE), model == "flux"
    assert relative(latents, draw(pipes[model], **ksampler(pipes[model], **fields) | {"sampler": expected})) < 2e-6


def test_a_scheduler_has_no_prediction_without_guidance(comfyui, pipes):
    pipe = parent_of(pipes["sdxl"], "sdxl")
    with pytest.raises(ValueError, match="can't run in a scheduler: it needs both sides of guidance"):
        draw_anywhere(pipe, ksampler(pipe, **settings("sdxl/euler_cfg_pp/simple/4/0/2/1")))


@pytest.mark.parametrize("model", ["sdxl", "flux"])
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_a_function_written_for_comfyui(comfyui, pipes, model, stock):
    """It is k-diffusion's `euler`, also where a stock pipeline's callback changes the latents. FLUX's are unpacked."""
    pipe, fields = parent_of(pipes[model], model) if stock else pipes[model], settings(f"{model}/euler/simple/6/0")
    change = (
        {"callback_on_step_end": lambda pipe, i, t, tensors: {"latents": tensors["latents"] * 1.1}} if stock else {}
    )
    theirs = {"sampler": comfy_sampler(comfy_like.sample_euler, pipe, **SIZE)}
    ours, expected = (draw_anywhere(pipe, ksampler(pipe, **fields) | change | other) for other in (theirs, {}))
    assert relative(ours, expected) < 1e-6


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_noise_of_a_function_follows_the_generator_or_the_seed(comfyui, pipes, model):
    """Without a seed, `noise_sampler` draws from the caller's generator; with a seed the function makes its noise."""
    pipe = pipes[model]
    call = ksampler(pipe, **settings(f"{model}/euler/simple/6/0"))
    call |= {"sampler": comfy_sampler(comfy_like.sample_lcm, pipe, **SIZE), "sampler_kwargs": {"s_noise": 0.1}}
    one, same, other = (draw(pipe, **call | {"generator": seeded(seed)}) for seed in (1, 1, 2))
    assert one.equal(same) and not one.equal(other)

    def own_noise(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        assert noise_sampler is None and extra_args["seed"] == 7
        return x

    draw(pipe, **call | {"sampler": comfy_sampler(own_noise, pipe, **SIZE, seed=7), "sampler_kwargs": {}})


@pytest.mark.parametrize("model", ["sdxl", "flux"])
@pytest.mark.parametrize("name", ["ipndm", "stand_in"])
def test_callbacks_see_the_steps_of_a_function(comfyui, pipes, model, name):
    """The state of each evaluation, once, packed on FLUX. ipndm reports its first x, stand_in the last step twice."""
    load_custom_nodes("stand_in")
    pipe, call, seen = pipes[model], ksampler(pipes[model], **settings(f"{model}/{name}/simple/6/0")), []

    def look(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"], tensors["denoised"].shape))
        return {"latents": tensors["latents"] * 1.01} if change and step == 2 else {}

    change = False
    call |= {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["latents", "denoised"]}
    draw(pipe, **call)
    steps, timesteps, states, shapes = zip(*seen)
    assert steps == (*range(6),) and sorted(timesteps, reverse=True) == [*timesteps]
    assert {*shapes} == {call["latents"].shape} and not any(a.equal(b) for a, b in zip(states, states[1:]))
    torch.testing.assert_close(states[0], call["latents"])
    change = True
    with pytest.raises(ValueError, match="callback can't change the latents"):
        draw(pipe, **call)


@pytest.mark.parametrize("model", ["sdxl", "flux"])
@pytest.mark.parametrize("reported", [[], ["sigma"], ["sigma", "sigma_hat"]], ids=len)
def test_what_a_callback_gets_of_two_evaluations_per_step(comfyui, pipes, model, reported):
    """The last evaluation's prediction with its x, packed on FLUX; sigma and sigma_hat as the function reports them.

    As RES4LYF's functions do, this one reports the step's sigma and its last evaluation's sigma_hat.
    """
    pipe, given, seen = pipes[model], ksampler(pipes[model], **settings(f"{model}/euler/simple/3/0")), []

    def midpoint(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:])):
            middle, ones = (sigma + after) / 2, x.new_ones([len(x)])
            x_2 = x + (x - model(x, sigma * ones, **extra_args)) / sigma * (middle - sigma)
            denoised = model(x_2, middle * ones, **extra_args)
            info = {"x": x, "i": i, "sigma": sigma, "sigma_hat": middle, "denoised": denoised}
            callback({key: value for key, value in info.items() if key in reported or "sigma" not in key})
            x = x + (x_2 - denoised) / middle * (after - sigma)
        return x

    def network(x, sigma):
        asked.append((x.clone(), float(sigma[0]), 0.9 * x))
        return asked[-1][-1]

    asked, sigmas = [], given["schedule"]
    comfy_sampler(midpoint, pipe, **SIZE)(network, given["latents"], sigmas, callback=seen.append)
    for step, (info, (x, middle, denoised)) in enumerate(zip(seen, asked[1::2], strict=True)):
        assert info["i"] == step and info["x"].equal(x) and info["denoised"].equal(denoised)
        sigma = float(sigmas[step]) if reported else middle
        assert float(info["sigma"]) == sigma
        assert float(info["sigma_hat"]) == (sigma if reported == ["sigma"] else middle)


def test_post_cfg_functions(comfyui, pipes):
    """They get the network's input and replace the guided prediction. What they get: `euler_cfg_pp`'s references."""
    pipe = pipes["sdxl"]

    def zero(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def after(arguments):
            assert arguments["input"].equal(x) and arguments["sigma"] == sigmas[0]
            assert arguments["model_options"]["sampler_post_cfg_function"] and arguments["model"].model_sampling
            return arguments["denoised"] * 0

        options = {**extra_args["model_options"], "sampler_post_cfg_function": [after]}
        return model(x, sigmas[0] * x.new_ones([1]), **{**extra_args, "model_options": options})

    call = ksampler(pipe, **settings("sdxl/euler/karras/4/0/7/1"))
    assert not draw(pipe, **call | {"sampler": comfy_sampler(zero, pipe, **SIZE)}).any()


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_uncond_denoised_needs_guidance(comfyui, pipes, model):
    def cfg_pp(model, x, sigmas, extra_args=None, callback=None, disable=None):
        options = {"sampler_post_cfg_function": [lambda arguments: arguments["denoised"]]}
        return model(x, sigmas[0] * x.new_ones([1]), denoise_mask=None, model_options=options)

    pipe = pipes[model]
    call = ksampler(pipe, **settings(f"{model}/euler/simple/4/0"))
    with pytest.raises(ValueError, match={"sdxl": "guidance", "flux": "`cfg`: the sampler asks"}[model]):
        draw(pipe, **call | {"sampler": comfy_sampler(cfg_pp, pipe, **SIZE)})


@pytest.mark.parametrize("model, scale", [("sdxl", 1.0), ("flux", 1 / 0.999)])
def test_levels_are_a_copy_and_the_last_one_counts(comfyui, pipes, model, scale):
    """uni_pc writes 0.001 into its levels; ComfyUI then divides FLUX's latents by 1 - 0.001."""
    pipe = pipes[model]

    def writes(model, x, sigmas, extra_args=None, callback=None, disable=None):
        sigmas[-1] = 0.001
        return torch.ones_like(x)

    call = ksampler(pipe, **settings(f"{model}/euler/simple/4/0"))
    latents = draw(pipe, **call | {"sampler": comfy_sampler(writes, pipe, **SIZE)})
    torch.testing.assert_close(latents, torch.full_like(latents, scale))
    assert call["schedule"][-1] == 0


def test_flux_needs_the_pictures_size(comfyui, pipes):
    call = ksampler(pipes["flux"], **settings("flux/euler/simple/4/0"))
    with pytest.raises(ValueError, match="give comfy_sampler the picture's `width` and `height`"):
        draw(pipes["flux"], **call | {"sampler": comfy_sampler(comfy_like.sample_euler, pipes["flux"], 256, 128)})
    for model, width in (("sdxl", 8 * 16), ("flux", 1024)):  # the network's; FLUX.1's, without a VAE to ask
        fields = settings(f"{model}/euler/simple/4/0", width=0, height=0)
        assert ksampler(pipes[model], **fields)["width"] == width


def test_the_names_are_comfyuis():
    """All names in the references, so all of version 0.27: k-diffusion has sixteen of the 44, and an alias."""
    assert len(comfy_ksampler.SAMPLERS) == len(set(comfy_ksampler.SAMPLERS)) == 44
    assert set(comfy_ksampler.SAMPLERS) == {key.split("/")[1] for key in LATENTS.keys()}
    assert set(SCHEDULERS) == set(SIGMAS["sdxl"]) and set(ON_BOTH) < set(comfy_ksampler.COMFYUI_ONLY)


@pytest.mark.parametrize(
    "model, name",
    [*itertools.product(["sdxl", "flux"], comfy_ksampler.COMFYUI_ONLY)]
    + [("flux", name) for name in comfy_ksampler.SDXL_ONLY],
)
def test_comfyuis_own_say_what_to_do(pipes, model, name):
    own = f"'{name}' is ComfyUI's own{' on FLUX' * (name in comfy_ksampler.SDXL_ONLY)}"
    with pytest.raises(ImportError, match=f"{own}, and ComfyUI was not found.*PYTHONPATH"):
        ksampler(pipes[model], **settings(f"{model}/{name}/simple/4/0"))


def test_functions_written_for_comfyui_need_comfyui(monkeypatch, pipes):
    with pytest.raises(ImportError, match="comfy_sampler needs ComfyUI, but ComfyUI was not found.*PYTHONPATH"):
        comfy_sampler(comfy_like.sample_euler, pipes["sdxl"])


def test_what_comfyui_lacks_is_named(comfyui, monkeypatch, pipes, tmp_path):
    (tmp_path / "comfy.py").write_text("import not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="ComfyUI was found, but can't be imported: .*'not_installed'.*requirements"):
        comfy_sampler(comfy_like.sample_euler, pipes["sdxl"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampler_name": "eular"}, "`sampler_name`: there is no 'eular'; did you mean euler"),
        ({"scheduler": "beta57"}, "`scheduler`: there is no 'beta57'; did you mean beta.*ComfyUI was not found"),
        ({"cfg": 0.5}, "`cfg` has to be at least 1"),
        ({"steps": 0}, "`steps` has to be at least 1"),
        ({"denoise": 0.0}, "`denoise` above 0"),
        ({"denoise": 1.5}, "`denoise` above 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_refused(pipes, changes, message):
    for model in ("sdxl", "flux"):
        with pytest.raises(ValueError, match=message):
            ksampler(pipes[model], **settings(f"{model}/euler/simple/4/0", **changes))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("model", SIGMAS)
def test_levels_are_comfyuis(pipes, model, scheduler):
    """At every step count in the file. exp and log of other processors differ by ulps, karras' seventh power by ten."""
    for steps, expected in SIGMAS[model][scheduler].items():
        ours = levels(pipes[model.removesuffix("_shift_1.15")], scheduler, int(steps), **SIZE)
        if scheduler == "kl_optimal" and steps == "1":  # NaN in ComfyUI; here it begins at the highest level
            expected = [SIGMAS[model][scheduler]["2"][0], 0.0]
        assert ours.dtype == torch.float32 and ours.device.type == "cpu"
        torch.testing.assert_close(ours, torch.tensor(expected), rtol=2e-6, atol=0, msg=steps)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_denoise_is_the_lower_end_of_more_steps(pipes, model, scheduler):
    """Of int(steps / denoise)."""
    whole = levels(pipes[model], scheduler, 20, **SIZE)
    assert levels(pipes[model], scheduler, 15, 0.75, **SIZE).equal(whole[-16:])
    assert levels(pipes[model], scheduler, 14, 0.6671, **SIZE).equal(whole[-15:])  # 20.98...


@pytest.mark.parametrize("name", ["dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"])
def test_four_samplers_skip_a_level(pipes, name):
    more = levels(pipes["sdxl"], "normal", 21)
    assert levels(pipes["sdxl"], "normal", 20, sampler_name=name).equal(torch.cat([more[:-2], more[-1:]]))


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
    """By independent formulas: numpy on the trained sigmas, and scipy's Beta."""
    pipe = sdxl_pipeline(mixture(4), torch.float32, **betas)
    trained = ((1 - pipe.scheduler.betas.double()).cumprod(0).reciprocal() - 1).sqrt().numpy()
    last = len(trained) - 1

    def at(t):
        return np.exp(np.interp(t, np.arange(last + 1), np.log(trained)))

    places = np.rint(scipy.stats.beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6) * last).astype(int)
    expected = {
        "normal": at(np.linspace(last, 0, steps)),
        "sgm_uniform": at(np.linspace(last, 0, steps + 1)[:-1]),
        "beta": trained[np.unique(places)[::-1]],
        "kl_optimal": np.tan(np.linspace(np.arctan(trained[-1]), np.arctan(trained[0]), steps)),
        "karras": comfy_ksampler.k_diffusion().get_sigmas_karras(steps, trained[0], trained[-1])[:-1].numpy(),
        "exponential": np.geomspace(trained[-1], trained[0], steps),
        "simple": trained[[last - i * (last + 1) // steps for i in range(steps)]],
        "ddim_uniform": trained[1 :: (last + 1) // steps][::-1],
    }
    for scheduler, sigmas in expected.items():
        ours = levels(pipe, scheduler, steps).numpy()
        np.testing.assert_allclose(ours, [*sigmas, 0], rtol=3e-6, err_msg=scheduler)  # float32


SET_LATER = FlowMatchEulerDiscreteScheduler()
SET_LATER.set_shift(3.0)
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.8, "max_shift": 0.8}


@pytest.mark.parametrize(
    "scheduler, shift",
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
        (FlowMatchEulerDiscreteScheduler(**DYNAMIC), math.exp(0.8)),
        (FlowMatchEulerDiscreteScheduler(**DYNAMIC, time_shift_type="linear"), 0.8),
        (SET_LATER, 3.0),
        (FlowMatchHeunDiscreteScheduler(shift=3.0), 3.0),
    ],
)
def test_levels_of_other_shifts(flux, scheduler, shift):
    """Wherever diffusers keeps the shift. `normal` shifts once more, from the lowest of 10,000 levels to 1."""
    pipe = type(flux)(**{**flux.components, "scheduler": scheduler})

    def shifted(t):
        return shift * t / (1 + (shift - 1) * t)

    lowest = shifted(1e-4)
    for name, times in (("simple", [1, 0.75, 0.5, 0.25]), ("normal", np.linspace(1, lowest, 4))):
        expected = [*map(shifted, times), 0]
        np.testing.assert_allclose(levels(pipe, name, 4), expected, rtol=2e-6)  # float32
    np.testing.assert_allclose(levels(pipe, "karras", 4)[[0, -2]], [1, lowest], rtol=2e-6)


def test_the_shift_is_the_pictures(flux):
    """mu grows evenly with the tokens, from 0.5 at 256 to 1.15 at 4096; t = 1/2 becomes exp(mu) / (1 + exp(mu))."""
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15)
    pipe = type(flux)(**{**flux.components, "scheduler": dynamic})
    per_token = 2 * pipe.vae_scale_factor
    for columns, rows in ((16, 16), (64, 64), (32, 64)):
        mu = 0.5 + (columns * rows - 256) / (4096 - 256) * (1.15 - 0.5)
        middle = levels(pipe, "simple", 2, width=columns * per_token, height=rows * per_token)[1].item()
        assert middle == pytest.approx(math.exp(mu) / (1 + math.exp(mu)))
    assert levels(flux, "simple", 4).equal(levels(flux, "simple", 4, width=128, height=128)), "the demo model's size"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_levels_fall_at_every_step_count(pipes, scheduler):
    """Strictly, to zero, from 1 step to more than there are trained levels; where levels coincide there are fewer.

    In float32 on the CPU, whatever the defaults are: meta stands in for a GPU, since its tensors have no numbers.
    """
    for pipe in (pipes["sdxl"], pipes["flux"]):
        for steps in (1, 2, 3, 9, 100, 1001):
            with torch.device("meta"), default_dtype(torch.float64):
                sigmas = levels(pipe, scheduler, steps)
            torch.testing.assert_close(sigmas, levels(pipe, scheduler, steps), rtol=2e-6, atol=0)
            assert sigmas[-1] == 0 and (sigmas.diff() < 0).all() and sigmas.isfinite().all(), steps
            assert len(sigmas) == steps + 1 or scheduler in ("beta", "ddim_uniform") or steps > 1000
            assert scheduler != "linear_quadratic" or steps == 1 or sigmas[steps // 2].isclose(0.975 * sigmas[0])


SHIFTS = dict.fromkeys(["sd3_text", "wan_text", "z_image", "sana"], 3.0)
SHIFTS |= {"chroma": 1.0, "qwen_text": math.exp(0.5), "ltx": 2.5}


@pytest.mark.parametrize("kind", ["sd_text", "animate_diff", "pixart_sigma", "stable_audio", "continuous", *SHIFTS])
def test_levels_of_any_pipeline(kind):
    """By the kind of scheduler: the ends of the trained betas or of EDM, or t = 1/2 shifted. 256 tokens have mu 0.5."""
    pipe = small_pipelines.small_pipeline("sd_text" if kind == "continuous" else kind)[0]
    if kind == "continuous":
        options = {"timestep_type": kind, "sigma_min": 0.002, "sigma_max": 700.0}
        pipe.scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", **options)
    if kind == "ltx":
        with pytest.raises(ValueError, match="LTXPipeline shifts by more than a width and a height.*shift=exp"):
            levels(pipe, "simple", 2)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFTS[kind])
    if kind in SHIFTS:
        many = 32 * getattr(pipe, "vae_scale_factor", 8)  # 256 tokens of 2x2
        found, shift = levels(pipe, "simple", 2, width=many, height=many), SHIFTS[kind]
        assert found.tolist() == pytest.approx([1, shift / (1 + shift), 0], rel=1e-4)
        lowest = shift / (shift + (9999 if kind in ("chroma", "qwen_text", "ltx") else 999))  # as in ComfyUI
        assert levels(pipe, "karras", 2, width=many, height=many)[1].item() == pytest.approx(lowest, rel=1e-4)
    else:
        config, schedules = pipe.scheduler.config, ["exponential"]
        if config.get("sigma_min"):
            low, high = config["sigma_min"], config["sigma_max"]
            schedules += ["normal"]  # time is a logarithm of sigma there
        else:
            low, high = (((1 - a) / a) ** 0.5 for a in pipe.scheduler.alphas_cumprod[[0, -1]].tolist())
        for schedule in schedules:  # diffusers' alphas_cumprod is float32: 2e-4 of the lowest level
            assert levels(pipe, schedule, 3).tolist() == pytest.approx([high, (low * high) ** 0.5, low, 0], rel=3e-4)
    if kind not in ("sd_text", "continuous"):
        with pytest.raises(ValueError, match=f"{type(pipe).__name__} is not of SDXL or FLUX"):
            ksampler(pipe, **settings("none/euler/simple/4/0"))
    pipe.scheduler = VQDiffusionScheduler(num_vec_classes=4)
    with pytest.raises(ValueError, match="VQDiffusionScheduler is no scheduler of a known kind"):
        levels(pipe, "simple", 2)
