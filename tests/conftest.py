"""The demo models, loaded once, in the dtypes that the tests need."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import sys
from pathlib import Path

# before torch is imported: more threads than cores wait for one another, by default without sleeping
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from flux_comfy_pipeline import FluxComfyPipeline  # noqa: E402
from sdxl_comfy_pipeline import StableDiffusionXLComfyPipeline  # noqa: E402

PROMPT = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"
CHILDREN = {"sdxl": StableDiffusionXLComfyPipeline, "flux": FluxComfyPipeline}
PARENTS = {"sdxl": StableDiffusionXLPipeline, "flux": FluxPipeline}
FAMILIES = pytest.mark.parametrize("name", ["sdxl", "flux"])


def load(pipeline: type, folder: str, dtype: torch.dtype = torch.float32):
    pipe = pipeline.from_pretrained(ROOT / "demo" / folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def sdxl():
    return load(StableDiffusionXLComfyPipeline, "sdxl")


@pytest.fixture(scope="session")
def flux():
    return load(FluxComfyPipeline, "flux")


@pytest.fixture
def comfyui(monkeypatch):
    """The stand-in of tests/comfyui on the path, in ComfyUI's place."""
    monkeypatch.delitem(sys.modules, "comfy", raising=False)
    monkeypatch.syspath_prepend(ROOT / "tests" / "comfyui")
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("comfy", "custom_nodes", "server")]:
        del sys.modules[name]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def family64(name: str):
    """The child and, on the same weights, the parent, in float64."""
    child = load(CHILDREN[name], name, torch.float64)
    parent = PARENTS[name](**child.components)
    parent.set_progress_bar_config(disable=True)
    return child, parent


@pytest.fixture(params=["sdxl", "flux"])
def family(request, sdxl, flux):
    """Each test with both: the name, and the pipeline."""
    return request.param, {"sdxl": sdxl, "flux": flux}[request.param]


@pytest.fixture(scope="session")
def sdxl64():
    return family64("sdxl")


@pytest.fixture(scope="session")
def flux64():
    return family64("flux")


def fail(*args, **kwargs):
    raise ZeroDivisionError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def stock_of(pipe, kind: type):
    """A stock pipeline on the same networks, with a scheduler of its own, since the stock loop changes it."""
    stock = kind(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    stock.set_progress_bar_config(disable=True)
    return stock


def with_scheduler(pipe, kind: str, **options):
    """The pipeline with diffusers' scheduler of this kind and the same networks."""
    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(pipe.scheduler.config, **options)
    changed = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    changed.set_progress_bar_config(disable=True)
    return changed


def parent_of(pipe, name: str):
    """The parent on the same networks, so in the same mode."""
    return stock_of(pipe, PARENTS[name])


SMALL = {"prompt": PROMPT, "height": 64, "width": 64, "output_type": "latent", "num_inference_steps": 2}
CALLS = {"sdxl": SMALL, "flux": {**SMALL, "max_sequence_length": 64}}


def draw(pipe, name: str, **call):
    """Small latents of two steps from seed 0, if the call says nothing else."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(**{"generator": seeded(), **CALLS[name], **call}).images


def network(pipe) -> torch.nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, which logs what it asks the network for."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in [*flags.split(), "disable-sync", "window-size=1100,1900"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as opened:
        yield opened


def pytest_terminal_summary(terminalreporter):
    """Prints the distances that tests have recorded, `record_property("distance", ...)`."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    found = [text for report in reports for name, text in report.user_properties if name == "distance"]
    if found:
        terminalreporter.section("distances")
        terminalreporter.write_line("\n".join(found))
