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
from conftest import PROMPT, ROOT, seeded
from diffusers import DiffusionPipeline

FILES = {"sdxl": "sdxl_comfy_pipeline.py", "flux": "flux_comfy_pipeline.py"}
CLASSES = {"sdxl": "StableDiffusionXLComfyPipeline", "flux": "FluxComfyPipeline"}


@pytest.mark.parametrize("name", blocks.OTHERS)
def test_shared_block_is_the_same(name):
    """`python tests/blocks.py` copies it."""
    assert blocks.parts(name)[1] == blocks.expected(name)


def test_files_import_nothing_of_this_project():
    modules = {path.stem for path in ROOT.glob("*.py")} | {"gallery", "demo"}
    for name in FILES.values():
        imported = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / name).read_text(), re.MULTILINE))
        assert not imported & modules, name


@pytest.mark.parametrize("family", FILES)
def test_file_alone_draws_a_picture(family, tmp_path):
    """Copied into an empty folder and run from there, with nothing else of this project on the path."""
    shutil.copy(ROOT / FILES[family], tmp_path)
    (tmp_path / "draw.py").write_text(
        f"from {FILES[family][:-3]} import {CLASSES[family]} as Pipeline\n"
        f"pipe = Pipeline.from_pretrained({str(ROOT / 'demo' / family)!r})\n"
        f"pipe({PROMPT!r}, sampler='dpmpp_2m', num_inference_steps=4).images[0].save('picture.png')\n"
    )
    run = subprocess.run([sys.executable, "draw.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "picture.png").stat().st_size > 5000


@pytest.mark.parametrize("family", FILES)
def test_custom_pipeline(family, sdxl, flux):
    """diffusers' own way to use a pipeline from a file gives the same picture."""
    pipe = DiffusionPipeline.from_pretrained(
        ROOT / "demo" / family, custom_pipeline=str(ROOT / FILES[family]), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == CLASSES[family]
    call = {"sampler": "heun", "num_inference_steps": 3, "output_type": "latent"}
    expected = {"sdxl": sdxl, "flux": flux}[family](PROMPT, generator=seeded(), **call).images
    assert pipe(PROMPT, generator=seeded(), **call).images.equal(expected)


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
