"""What the benchmarks build and how they count; the timings themselves are not tested."""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import models  # noqa: E402
import overhead  # noqa: E402
import precision  # noqa: E402

from sdxl_comfy_pipeline import sampler_names  # noqa: E402

# fmt: off
TINY = {
    "sdxl": dict(
        sample_size=8, block_out_channels=(32, 32, 64), transformer_layers_per_block=1, attention_head_dim=(2, 2, 4),
        cross_attention_dim=16, addition_time_embed_dim=8, projection_class_embeddings_input_dim=64, norm_num_groups=8),
    "flux": dict(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 6, 6)),
}
# fmt: on


@pytest.mark.parametrize(
    "kind, config, billions",
    [("UNet2DConditionModel", models.SDXL_CONFIG, 2.567), ("FluxTransformer2DModel", models.FLUX_CONFIG, 11.901)],
)
def test_full_size_is_the_real_architecture(kind, config, billions):
    """By the number of weights that the models are published with; no memory is taken for them."""
    with torch.device("meta"):
        network = getattr(models.diffusers, kind)(**config)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own, of NumPy 2
@pytest.mark.parametrize("name", TINY)
def test_full_size_runs_beside_the_stock_pipeline(name):
    """The path of `--size full`, with a small network on the CPU: both loops, the same latents from euler."""
    bench = models.full(name, "cpu", {"sdxl": torch.float16, "flux": torch.bfloat16}[name], TINY[name], size=64)
    assert all(parameter.isfinite().all() for parameter in bench.network.parameters())
    rows = overhead.measured(bench, ["euler", "heun"], 2, 1, "cpu")
    assert [times["ours"][0][2] for times in rows.values()] == [2, 3]
    assert list(rows["euler"]) == overhead.LOOPS
    assert all(0 < outside < whole for times in rows.values() for whole, outside, _ in times["ours"])
    ours, stock = bench.call(bench.ours, 2), bench.stock_with("euler")(2)
    assert ours.isfinite().all() and (ours - stock).norm() < 0.05 * stock.norm()


demo = functools.cache(models.demo)


def peak_on_cpu(run):
    """MiB of tensors at the highest, above what was there before the call: the weights are not counted."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) / 2**20


@functools.cache
def stocks_peak(name):
    return peak_on_cpu(lambda: demo(name).stock_with("euler")(3))


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("name, sampler", [(name, one) for name in ("sdxl", "flux") for one in sampler_names()])
def test_memory_is_the_stock_loops_and_the_samplers_history(name, sampler):
    """Peak of tensors beside the weights, over the stock pipeline's with Euler, in latents of the float32 state.

    A sampler of k-diffusion keeps up to nine at a time (heun: x, d, x_2, denoised twice, d_2, the sums of an update),
    dpm_adaptive two solutions more and the first x0 of its step, for the callback. A Brownian path keeps the 22 normals
    of a level and a few sums. Conditioning that is kept twice would be 12 (SDXL) or 16 (FLUX) more.
    """
    bench = demo(name)
    latent = {"sdxl": 4 * 16 * 16, "flux": 64 * 64}[name] * 4 / 2**20
    few = {"rtol": 1.0, "atol": 1.0} if sampler == "dpm_adaptive" else {}
    ours = peak_on_cpu(lambda: bench.call(bench.ours, 3, sampler=sampler, sampler_kwargs=few))
    history = 13 if sampler == "dpm_adaptive" else 9 + 26 * sampler.endswith("_sde")
    assert ours - stocks_peak(name) < history * latent


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_k_diffusion_by_itself_does_the_same(name):
    """So that its times are those of the same work. To float32's rounding, which a network multiplies."""
    bench = demo(name)
    alone = overhead.alone(bench)
    for sampler in ("euler", "dpmpp_2m"):
        ours = bench.call(bench.ours, 4, sampler=sampler)
        assert (alone(4, sampler) - ours).norm() < 1e-5 * ours.norm()
    assert alone(4, "dpm_fast").isfinite().all() and alone(4, "dpmpp_3m_sde").isfinite().all()


@pytest.mark.filterwarnings("ignore")  # diffusers' own, of NumPy 2 and of its old algorithm
def test_every_counterpart_draws():
    bench = models.full("sdxl", "cpu", torch.float32, TINY["sdxl"], size=64)
    for sampler in models.SDXL_SCHEDULERS:
        assert models.function(sampler) and bench.stock_with(sampler)(3).isfinite().all(), sampler
    assert bench.stock_with("dpm_adaptive") is None


def times_of(whole=1.0, **outside):
    """As of `overhead.measured`: `whole` seconds of network and the seconds outside, of each of two evaluations."""
    return {name: [(2 * (whole + one), 2 * one, 2) for one in rounds] for name, rounds in outside.items()}


def test_goals_missed():
    """A goal is missed by more than the spread: heun's whole times are 1.001, 1.006 and 1.011 of the stock loop's."""
    met = {"ours": [0.044] * 3, "stock": [0.04] * 3, "k-diffusion": [0.04] * 3, "scheduler": [0.045] * 3}
    met["bare"] = [0.0] * 3

    def heun(*shares):
        return {"heun": times_of(**{**met, "ours": [0.04 + 1.04 * share for share in shares]})}

    rows = {"euler": times_of(**met), **heun(0.001, 0.006, 0.011)}
    assert overhead.table("sdxl, demo", rows, "cpu") == []
    missed = "sdxl, demo, heun: ours / stock is 1.009, the goal 1.005"
    assert overhead.table("sdxl, demo", rows | heun(0.0065, 0.009, 0.0115), "cpu") == [missed]


def test_what_a_gpu_runs_runs_on_a_cpu(monkeypatch, capsys):
    """On the demo model, in both dtypes and in the offload modes that a CPU has; another picture is an error."""
    arguments = ["--device", "cpu", "--size", "demo", "--models", "flux"]
    assert gpu.main(arguments) == 0
    printed = capsys.readouterr().out
    for row in ("flux, float16, on the device", "flux, bfloat16, group"):
        assert f"| {row} | 0.0e+00 | " in printed
    monkeypatch.setattr(models.Bench, "call", lambda *_, **__: torch.full((1, 3, 8, 8), math.nan))
    assert gpu.main(arguments) == 1


def test_gpu_sh_runs_each_part_and_goes_on_after_one_that_fails(tmp_path):
    """With another python: one that prints its arguments."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *precision*) echo broken >&2; exit 3;; esac\n')
    python.chmod(0o755)

    def run(*parts):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        line = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--size", "demo", *parts]
        return subprocess.run(line, env=environment, capture_output=True, text=True)

    whole, one = run(), run("flux")
    parts = ["tests", "precision", "sdxl", "flux", "overhead-sdxl", "overhead-flux"]
    assert [name[3:] for name in whole.stdout.splitlines() if name.startswith("## ")] == parts
    assert all((ROOT / name).is_file() for name in re.findall(r"\b(?:tests|benchmarks)/\w+\.py", whole.stdout))
    assert "Ended with exit status 3" in whole.stdout and "\nbroken\n" in whole.stdout and whole.returncode == 1
    assert "gpu.py --device cpu --size demo --models flux" in whole.stdout
    assert one.stdout.count("## ") == 1 and "--models flux" in one.stdout and one.returncode == 0
    assert run("nope").returncode == 2


def test_precision_compares_image_by_image():
    """A ratio of geometric means, with the error of a mean of logarithms: ln 2 and ln 0.5 are 1.0 +- ln 2."""
    stock, ours, ratio, error = precision.compared([1.0, 4.0], [2.0, 2.0])
    assert (stock, ours, ratio) == pytest.approx((2.0, 2.0, 1.0))
    assert error == pytest.approx(math.log(2))
