"""What the benchmarks build and how they count; the timings themselves are no test's matter."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import models  # noqa: E402
import overhead  # noqa: E402
import precision  # noqa: E402

TINY = {
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": (32, 32, 64),
        "transformer_layers_per_block": 1,
        "attention_head_dim": (2, 2, 4),
        "cross_attention_dim": 16,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
        "norm_num_groups": 8,
    },
    "flux": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
}


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
    bench = models.full(name, "cpu", TINY[name], size=64)
    assert bench.network.dtype == {"sdxl": torch.float16, "flux": torch.bfloat16}[name]
    assert all(parameter.isfinite().all() for parameter in bench.network.parameters())
    rows = overhead.measured(bench, ["euler", "heun"], 2, 1, "cpu")
    assert [row["times"]["ours"][0][2] for row in rows] == [2, 3]
    assert set(rows[0]["runs"]) == {"ours", "stock", "k-diffusion", "scheduler", "bare"}
    assert all(0 < outside < whole for row in rows for whole, outside, _ in row["times"]["ours"])
    ours, stock = bench.call(bench.ours, 2), bench.stock_with("euler")(2)
    assert ours.isfinite().all() and (ours - stock).norm() < 0.05 * stock.norm()


demo = functools.cache(models.demo)


@functools.cache
def stocks_peak(name):
    return overhead.peak_on_cpu(lambda: demo(name).stock_with("euler")(3))


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("name, sampler", [(name, one) for name in ("sdxl", "flux") for one in models.sampler_names()])
def test_memory_is_the_stock_loops_and_the_samplers_history(name, sampler):
    """Peak of tensors beside the weights, over the stock pipeline's with Euler, in latents of the float32 state.

    A sampler of k-diffusion keeps up to nine at a time (heun: x, d, x_2, denoised twice, d_2, the sums of an update),
    dpm_adaptive two solutions more, and a Brownian path the 22 normals of a level and a few sums. Conditioning that is
    kept twice would be 12 (SDXL) or 16 (FLUX) more.
    """
    bench = demo(name)
    latent = {"sdxl": 4 * 16 * 16, "flux": 64 * 64}[name] * 4 / 2**20
    few = {"rtol": 1.0, "atol": 1.0} if sampler == "dpm_adaptive" else {}
    ours = overhead.peak_on_cpu(lambda: bench.call(bench.ours, 3, sampler=sampler, sampler_kwargs=few))
    history = 12 if sampler == "dpm_adaptive" else 9 + 26 * sampler.endswith("_sde")
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


def test_peak_counts_what_lives_together():
    """64 KiB that stays, then two of 16 KiB one after the other; nothing of what was there before."""
    before = [torch.zeros(2**16)]

    def run():
        before.append(torch.zeros(2**14))
        for _ in range(2):
            torch.zeros(2**12)
        del before[1:]

    assert overhead.peak_on_cpu(run) == pytest.approx((64 + 16) / 1024)


@pytest.mark.filterwarnings("ignore")  # diffusers' own, of NumPy 2 and of its old algorithm
def test_every_counterpart_runs():
    """All of them draw, with finite latents."""
    bench = models.full("sdxl", "cpu", TINY["sdxl"], size=64)
    bench.network.float()
    bench.arguments = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in bench.arguments.items()}
    for sampler in models.SDXL_SCHEDULERS:
        assert models.find_sampler(sampler) and bench.stock_with(sampler)(3).isfinite().all(), sampler
    assert bench.stock_with("dpm_adaptive") is None


def row(sampler, outside, wholes=None, rounds=3, **more):
    """A row of `overhead.measured`: a second of network and these seconds outside, for each of two evaluations."""
    wholes = wholes or {name: 1 + seconds for name, seconds in outside.items()}
    times = {name: [(2 * wholes[name], 2 * outside[name], 2)] * rounds for name in outside}
    return {"sampler": sampler, "times": times, "peak": dict.fromkeys(times, 2.0), "waits": {}, **more}


def test_ratios_of_what_is_outside_and_goals_missed(capsys):
    met = {"ours": 0.044, "stock": 0.04, "k-diffusion": 0.04, "scheduler": 0.046, "bare": 0.0}
    rows = [row("euler", met), row("heun", {**met, "ours": 0.08})]
    ratios = overhead.ratios(rows[1])
    assert ratios["k-diffusion"] == pytest.approx((2.0, 0)) and ratios["scheduler"] == pytest.approx((0.575, 0))
    assert ratios["stock"] == pytest.approx((1.08 / 1.04, 0))
    missed = overhead.table("sdxl, demo", rows)
    assert missed == [
        "sdxl, demo, heun: ours / k-diffusion is 2.000, the goal 1.10",
        "sdxl, demo, heun: ours / stock is 1.038, the goal 1.01",
    ]
    assert (
        "| euler | 2 | 1044.00 (0.00) | 1040.00 (0.00) | 1040.00 (0.00) | 1046.00 (0.00) | 1000.00 (0.00)"
        " | 44.00, 40.00, 40.00, 46.00 | 1.100 (0.000) | 1.004 (0.000) | 1.045 (0.000) | 2.00, 2.00, 2.00, 2.00, 2.00 |"
    ) in capsys.readouterr().out


def test_a_goal_is_missed_by_more_than_the_spread():
    """Ratios 1, 1.2 and 1.4 outside: half the quartiles' distance is 0.1, and 1.2 less that is 1.1."""
    scattered = row("euler", {"ours": 0.1, "stock": 0.1, "k-diffusion": 0.1, "bare": 0.0})
    scattered["times"]["ours"] = [(2.2, 2 * seconds, 2) for seconds in (0.1, 0.12, 0.14)]
    assert overhead.ratios(scattered)["k-diffusion"] == pytest.approx((1.2, 0.1))
    assert not [line for line in overhead.table("flux, demo", [scattered]) if "ours / k-diffusion" in line]
    scattered["times"]["ours"] = [(2.2, 2 * seconds, 2) for seconds in (0.1, 0.121, 0.14)]
    assert [line for line in overhead.table("flux, demo", [scattered]) if "ours / k-diffusion" in line]


def test_a_gpus_rows_tell_memory_and_waits(capsys):
    nothing = dict.fromkeys(("ours", "stock", "bare"), math.nan)
    found = row("heun", nothing, {"ours": 1.0, "stock": 1.25, "bare": 1.0}, waits={"ours": 0.5, "stock": 1.0})
    assert overhead.ratios(found) == {"stock": (pytest.approx(0.8), pytest.approx(0))}
    found["waits"]["bare"] = 0.0
    assert overhead.table("flux, full", [found]) == []
    assert capsys.readouterr().out.endswith("| 0.800 (0.000) | 0.5, 1.0, none, none | 2.00, 2.00, none, none, 2.00 |\n")


def test_what_a_gpu_runs_runs_on_a_cpu(monkeypatch, capsys):
    """On the demo model, in both dtypes and in the offload modes that a CPU has; a picture that differs is told."""
    monkeypatch.setattr(gpu, "sampler_names", lambda: ["euler", "dpmpp_2m_sde"])
    arguments = ["--device", "cpu", "--size", "demo", "--models", "flux", "--steps", "1"]
    assert gpu.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| dpmpp_2m_sde | 1, " in printed and "\n| group | 0.0e+00 | none |" in printed
    draw = gpu.drawn
    monkeypatch.setattr(gpu, "drawn", lambda bench, sampler, steps: draw(bench, sampler, steps) * math.nan)
    assert gpu.main(arguments) == 1
    assert "| a picture | not finite | not finite |" in capsys.readouterr().out


def test_gpu_sh_runs_each_part_and_goes_on_after_one_that_fails(tmp_path):
    """With another python: one that prints its arguments."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *precision*) echo broken >&2; exit 3;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--size", "demo"]
    whole = subprocess.run(line, env=environment, capture_output=True, text=True)
    parts = ["tests", "precision", "sdxl", "flux", "noise", "overhead-sdxl", "overhead-flux"]
    assert [name[3:] for name in whole.stdout.splitlines() if name.startswith("## ")] == parts
    assert "Ended with exit status 3" in whole.stdout and "\nbroken\n" in whole.stdout and whole.returncode == 1
    assert "gpu.py --device cpu --size demo --models flux" in whole.stdout
    one = subprocess.run([*line, "noise"], env=environment, capture_output=True, text=True)
    assert one.stdout.count("## ") == 1 and "--only noise" in one.stdout and one.returncode == 0
    assert subprocess.run([*line, "nope"], capture_output=True).returncode == 2


@pytest.mark.parametrize("arguments", [["--samplers", "nope"], ["--rounds", "0"], ["--steps", "0"]])
def test_bad_options_are_told_in_one_line(capsys, arguments):
    with pytest.raises(SystemExit):
        overhead.main(arguments)
    assert f"argument {arguments[0]}: " in capsys.readouterr().err.splitlines()[-1]


def test_no_cuda_is_said_in_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        overhead.main(["--size", "full"])
    assert "there is no CUDA device here" in capsys.readouterr().err


def test_step_noise_has_the_same_numbers_in_every_dtype():
    draw = precision.float32_noise(3), precision.float32_noise(3)
    single, half = draw[0]((4, 4), dtype=torch.float64), draw[1]((4, 4), dtype=torch.float16)
    torch.testing.assert_close(half.double(), single, rtol=2**-10, atol=1e-4)


def test_precision_compares_image_by_image():
    """A ratio of geometric means, with the error of a mean of logarithms: ln 2 and ln 0.5 are 1.0 +- ln 2."""
    stock, ours, ratio, error = precision.compared([1.0, 4.0], [2.0, 2.0])
    assert (stock, ours, ratio) == pytest.approx((2.0, 2.0, 1.0))
    assert error == pytest.approx(math.log(2))
