"""Each pipeline file works alone, and what the files say of each other is true."""

from __future__ import annotations

import importlib.util
import inspect
import re
import runpy
import shutil
import subprocess
import sys

import blocks
import pytest
from conftest import CHILDREN, FAMILIES, PARENTS, PROMPT, ROOT, seeded

FILES = {"sdxl": "sdxl_comfy_pipeline.py", "flux": "flux_comfy_pipeline.py"}
CLASSES = {"sdxl": "StableDiffusionXLComfyPipeline", "flux": "FluxComfyPipeline"}


@FAMILIES
def test_the_parents_arguments_keep_their_defaults(name):
    own, stock = (inspect.signature(kind.__call__).parameters for kind in (CHILDREN[name], PARENTS[name]))
    assert [p for p in stock if p not in own] == ["kwargs"] * (name == "sdxl")  # the deprecated ones
    assert not [p for p in stock if p in own and own[p].default != stock[p].default]


@pytest.mark.parametrize("name", blocks.OTHERS)
def test_shared_block_is_the_same(name):
    """`python tests/blocks.py` copies it."""
    assert blocks.parts(name)[1] == blocks.expected(name)


ALONE = f"""
import sys
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
before = set(sys.modules)
import sdxl_comfy_pipeline, flux_comfy_pipeline
print(*{{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names))
print(*{{"wandb", "clip", "kornia", "matplotlib", "skimage", "cleanfid"}} & set(sys.modules))
for family, name in {CLASSES}.items():
    pipe = getattr(sys.modules[family + "_comfy_pipeline"], name).from_pretrained("{ROOT}/demo/" + family)
    pipe("{PROMPT}", sampler="dpmpp_2m", num_inference_steps=4).images[0].save(family + ".png")
"""


def test_the_files_alone_draw_pictures_and_import_nothing_heavy(tmp_path):
    """Copied into an empty folder and run from there, with nothing else of this project on the path.

    After diffusers' pipelines, what they import is k-diffusion's sampling and the two solvers it names: nothing for
    plots, trackers or training, and nothing of k-diffusion's own name stays in `sys.modules`.
    """
    for name in FILES.values():
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "draw.py").write_text(ALONE)
    run = subprocess.run([sys.executable, "draw.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    new, heavy = run.stdout.splitlines()
    solvers = {"torchsde", "torchdiffeq", "trampoline"}
    assert set(new.split()) <= {"sdxl_comfy_pipeline", "flux_comfy_pipeline", "k_diffusion_alone", *solvers}
    assert not heavy
    assert all((tmp_path / f"{family}.png").stat().st_size > 5000 for family in FILES)


def test_missing_k_diffusion_says_how_to_install_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: find(name) if name != "k_diffusion" else None)
    with pytest.raises(ImportError, match="k-diffusion is not installed: pip install --no-deps k-diffusion=="):
        runpy.run_path(str(ROOT / FILES["sdxl"]))


def test_requirements_are_the_project_dependencies():
    """requirements.txt is pyproject's list for pip, without k-diffusion, which pip installs with --no-deps."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL).group(1)
    names = set(re.findall(r'"([^"]+)"', listed))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line for line in lines if line and not line.startswith("#")}
    assert {name for name in names if name.startswith("k-diffusion")} == {"k-diffusion==0.1.1.post1"}
    assert required == names - {"k-diffusion==0.1.1.post1"}


def test_demo_models_are_small():
    size = sum(
        path.stat().st_size for family in FILES for path in (ROOT / "demo" / family).rglob("*") if path.is_file()
    )
    assert size <= 25e6


def test_two_versions_of_a_file_in_one_process(flux, tmp_path):
    """Another version, with another Brownian path, also called inside a callback, changes nothing of this one."""
    text, constant = (ROOT / FILES["flux"]).read_text(), "0x9E3779B97F4A7C15"
    assert text.count(constant) == 1
    (tmp_path / "other_version.py").write_text(text.replace(constant, "0xBF58476D1CE4E5B9"))
    call = {"sampler": "dpmpp_sde", "num_inference_steps": 3, "output_type": "latent"}
    ours = flux(PROMPT, generator=seeded(), **call).images
    spec = importlib.util.spec_from_file_location("other_version", tmp_path / "other_version.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    other = module.FluxComfyPipeline(**flux.components)
    other.set_progress_bar_config(disable=True)
    theirs = [other(PROMPT, generator=seeded(), **call).images]

    def nested(pipe, i, timestep, tensors):
        theirs.append(other(PROMPT, generator=seeded(), **call).images)
        return {}

    assert flux(PROMPT, generator=seeded(), callback_on_step_end=nested, **call).images.equal(ours)
    assert len(theirs) == 4 and all(one.equal(theirs[0]) for one in theirs)
    assert not theirs[0].allclose(ours, rtol=0, atol=0.1)
