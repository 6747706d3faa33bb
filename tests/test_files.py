"""Each pipeline file works alone, and what the files say of each other is true."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys

import blocks
import pytest
from conftest import CHILDREN, PROMPT, ROOT
from test_layout import COPIED

FILES = {name: f"{name}_comfy_pipeline.py" for name in CHILDREN}
CLASSES = {name: kind.__name__ for name, kind in CHILDREN.items()}


@pytest.mark.parametrize("name", blocks.OTHERS)
def test_shared_block_is_the_same(name):
    """`python tests/blocks.py` copies it."""
    assert blocks.parts(name)[1] == blocks.expected(name)


ALONE = f"""
import sys
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
before = set(sys.modules)
import sdxl_comfy_pipeline, flux_comfy_pipeline, scheduling_k_diffusion, comfy_ksampler
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
    for name in COPIED:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "draw.py").write_text(ALONE)
    run = subprocess.run([sys.executable, "draw.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    new, heavy = run.stdout.splitlines()
    solvers = {"torchsde", "torchdiffeq", "trampoline"}
    assert set(new.split()) <= {*COPIED, "k_diffusion_alone", *solvers, "greenlet", "scipy"}
    assert not heavy
    assert all((tmp_path / f"{family}.png").stat().st_size > 5000 for family in FILES)


def test_missing_k_diffusion_says_how_to_install_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: find(name) if name != "k_diffusion" else None)
    with pytest.raises(ImportError, match="k-diffusion is not installed: pip install --no-deps k-diffusion=="):
        runpy.run_path(str(ROOT / FILES["sdxl"]))


def test_requirements_are_the_project_dependencies():
    """requirements.txt is pyproject's list for pip, without k-diffusion, which pip installs with --no-deps."""
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line for line in lines if line and not line.startswith("#")}
    assert required | {"k-diffusion==0.1.1.post1"} == set(re.findall(r'"([^"]+)"', listed.group(1)))


def test_demo_models_are_small():
    files = [path for family in FILES for path in (ROOT / "demo" / family).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
