"""ComfyUI's own functions behind the pipelines, all 44 names on both models, against what they computed in ComfyUI.

Needs ComfyUI's folder, with its requirements installed, and is skipped without:

    COMFYUI=/path/to/ComfyUI uv run pytest -s tests/test_comfyui.py
"""

from __future__ import annotations

import os
import sys
import warnings

import pytest
from comfy_references import LATENTS, SIZE, draw, pipelines, references, settings
from conftest import relative

from comfy_ksampler import FLUX_APART, OWN, SAMPLERS, comfy_sampler, ksampler

FOLDER = os.environ.get("COMFYUI")
pytestmark = pytest.mark.skipif(not FOLDER, reason="COMFYUI does not name ComfyUI's folder")


@pytest.fixture(scope="module")
def pipes():
    sys.path.append(FOLDER)
    pipes = pipelines()
    ksampler(pipes["sdxl"], **settings("sdxl/uni_pc/simple/4/0"))  # imports ComfyUI
    yield pipes
    sys.path.remove(FOLDER)


@pytest.fixture(scope="module")
def table():
    """{(model, "ksampler" or "ComfyUI's", name): distance}, printed at the end."""
    rows: dict[tuple[str, str, str], float] = {}
    yield rows
    columns = [(model, whose) for model in ("sdxl", "flux") for whose in ("ksampler", "ComfyUI's")]
    print(
        "\n\n| sampler |",
        " | ".join(f"{model.upper()}, {whose}" for model, whose in columns),
        "|\n|---|---|---|---|---|",
    )
    for name in SAMPLERS:
        found = [rows.get((*column, name)) for column in columns]
        print(f"| `{name}` |", " | ".join("" if d is None else f"{d:.0e}" if d else "0" for d in found), "|")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_comfyuis_own_function(pipes, table, model, name):
    """To the bit on FLUX; to float32 on SDXL, and with guidance: the pipelines order the sums otherwise."""
    pipe = pipes[model]
    for whose in ("ksampler", "ComfyUI's"):
        for key in references(model, name):
            call = ksampler(pipe, **settings(key))
            if whose == "ComfyUI's":
                function = sys.modules["comfy.samplers"].sampler_object(name).sampler_function
                call |= {"sampler": comfy_sampler(function, pipe, **SIZE, seed=0), "sampler_kwargs": {}}
                call |= {"parameterization": "flow"} if model == "flux" else {}
            elif name in OWN or (model == "flux" and name in FLUX_APART):
                continue  # `ksampler` has taken ComfyUI's
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # ComfyUI's, of torchsde's times beyond its ends
                apart = relative(draw(pipe, **call), LATENTS.get_tensor(key))
            table[model, whose, name] = max(apart, table.get((model, whose, name), 0.0))
            assert apart <= (0.0 if model == "flux" and "cfg_pp" not in name else 1e-6), key
