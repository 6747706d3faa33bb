"""What `--model` may be, the messages for anything else, and where a model is kept."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import CHILDREN, ROOT, load
from safetensors.torch import save_file
from scripts import run_here

import sdxl_comfy_pipeline
from gallery import models
from gallery.models import needed_memory, reason
from gallery.options import FLUX, SDXL, parse


@pytest.fixture
def refusal(tmp_path, capsys):
    """Runs a script with a model that is refused, and returns the one line of the message."""

    def run(family, model) -> str:
        assert run_here(family, "--model", model, "--output", tmp_path / "output") == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    "family, kind, message",
    [
        (SDXL, "FluxPipeline", "is a model of FLUX: test_flux.py draws it"),
        (FLUX, "StableDiffusionXLPipeline", "is a model of SDXL: test.py draws it"),
        (FLUX, "StableDiffusion3Pipeline", "is a model of StableDiffusion3Pipeline, not of FluxPipeline"),
        (SDXL, "StableDiffusionXLImg2ImgPipeline", "no file named config.json"),  # the same models, so it goes on
    ],
)
def test_a_model_of_another_kind_is_refused_by_its_index(tmp_path, refusal, family, kind, message):
    """Before anything of it is loaded: there is nothing but the index here."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "vae": ["diffusers", "AutoencoderKL"]}))
    assert message in refusal(family, tmp_path)


def test_a_model_of_another_kind_is_refused_by_the_hubs_index(tmp_path, monkeypatch, refusal):
    """As it stands in the cache, which a download fills."""
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "models--somebody--something" / "refs").mkdir()
    (tmp_path / "models--somebody--something" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "somebody/something is a model of FLUX: test_flux.py draws it" in refusal(SDXL, "somebody/something")


@pytest.fixture(scope="module")
def both_variants(tmp_path_factory):
    """A hub's cache with a model in float32 and in float16, of other weights, and one in float32 alone."""
    cache = tmp_path_factory.mktemp("hub")
    for name in ("both", "single"):
        snapshot, refs = (cache / f"models--somebody--{name}" / part for part in ("snapshots/abc", "refs"))
        refs.mkdir(parents=True)
        (refs / "main").write_text("abc")
        pipe = load(CHILDREN["sdxl"], "sdxl")
        pipe.save_pretrained(snapshot)
        if name == "both":
            pipe.unet.conv_out.bias.data.fill_(0.5)
            pipe.to(torch.float16).save_pretrained(snapshot, variant="fp16")
    return cache


@pytest.mark.parametrize(
    "name, dtype, half",
    [
        ("both", "float16", True),
        ("both", "float32", False),
        ("single", "float16", False),
        ("folder", "float16", False),  # which is not fetched
    ],
)
def test_float16_takes_the_hubs_float16_files(both_variants, monkeypatch, caplog, name, dtype, half):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(both_variants))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = both_variants / "models--somebody--both" / "snapshots" / "abc"
    model = str(folder) if name == "folder" else f"somebody/{name}"
    pipe = models.load(SDXL, sdxl_comfy_pipeline, model, "cpu", parse(SDXL, ["--dtype", dtype]))
    assert pipe.unet.dtype == pipe.vae.dtype == getattr(torch, dtype)
    assert bool((pipe.unet.conv_out.bias == 0.5).all()) == half
    assert "variant" not in caplog.text


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "--offload model"),
        (OSError("You are trying to access a gated repo."), "accept its licence"),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
def test_reasons(error, message):
    assert message in reason(error, "some/model") and "\n" not in reason(error)


# --- files and folders that are no model ---

SDXL_KEY = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
REFINER_KEY = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
FLUX_KEY = "double_blocks.0.img_attn.norm.key_norm.scale"


@pytest.mark.parametrize(
    "family, names, message",
    [
        (SDXL, ["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "is a LoRA, which goes on top of a model"),
        (FLUX, ["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"], "is a LoRA"),
        (FLUX, [UNET_KEY, SDXL_KEY], "is a checkpoint of SDXL, not of FLUX; test.py draws it"),
        (SDXL, [FLUX_KEY], "is a checkpoint of FLUX, not of SDXL; test_flux.py draws it"),
        (SDXL, [UNET_KEY, REFINER_KEY], "is a checkpoint of another architecture, xl_refiner, not of SDXL"),
        (
            SDXL,
            [UNET_KEY, "cond_stage_model.transformer.text_model.final_layer_norm.bias"],
            "is a checkpoint of another architecture, Stable Diffusion 1,",
        ),
        (SDXL, [UNET_KEY, "model.diffusion_model.label_emb.0.0.weight"], "has the UNet of an SDXL model alone"),
        (SDXL, ["h.0.attn.bias", "wte.weight"], "is no checkpoint of SDXL; its tensors are h.0.attn.bias, wte.weight"),
        (SDXL, [UNET_KEY, SDXL_KEY], "is read with the configuration of stabilityai/stable-diffusion-xl-base-1.0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_is_recognized_by_its_tensors(tmp_path, monkeypatch, refusal, family, names, message):
    """The last one passes for SDXL's, so that loading begins, which needs the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1, 4, 1, 1) for name in names}, file)
    assert f"--model: {file} {message}" in refusal(family, file)


def whole_file(file):
    save_file({UNET_KEY: torch.zeros(2, 3), SDXL_KEY: torch.zeros(3)}, file)
    return file.read_bytes()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:-1], "is no .safetensors file, or is cut off"),
        (lambda data: data[:4], "is no .safetensors file"),
        (lambda data: b"garbage of any kind" * 9, "is no .safetensors file"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "is no .safetensors file"),
        (lambda data: (8).to_bytes(8, "little") + b'{"a": 1}', "is no .safetensors file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, refusal, damage, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(whole_file(file)))
    assert f"--model: {file} {message}" in refusal(SDXL, file)


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.safetensors", "there is no file"),
        ("nothing", "neither a folder here nor a model on the hub"),
        ("notes.txt", "is a file, but neither a .safetensors nor a .ckpt"),
        ("garbage.ckpt", "is no .ckpt of tensors, or cut off"),
        ("lora.ckpt", "is a LoRA"),
        ("empty", "has no model_index.json"),
    ],
)
def test_a_path_that_is_no_model(tmp_path, monkeypatch, refusal, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}}, tmp_path / "lora.ckpt")
    for file in ("notes.txt", "garbage.ckpt"):
        (tmp_path / file).write_text("garbage")
    line = refusal(SDXL, tmp_path / name)
    assert message in line and str(tmp_path / name) in line


@pytest.mark.parametrize(
    "part, text, message",
    [
        ("model_index.json", "{", "is no JSON, or cut off"),
        ("model_index.json", "[]", "has a JSON list"),
        ("model_index.json", "{}", "names no _class_name"),
        ("unet/config.json", "[1]", "has a JSON list"),
        ("vae/diffusion_pytorch_model.safetensors", None, "is no .safetensors file, or is cut off"),
        ("text_encoder/model.safetensors", "garbage", "is no .safetensors file"),
    ],
)
def test_the_broken_part_of_a_folder_is_named(tmp_path, refusal, part, text, message):
    folder = shutil.copytree(ROOT / "demo" / "sdxl", tmp_path / "model")
    file = folder / part
    file.write_bytes(file.read_bytes()[:-10] if text is None else text.encode())
    assert f"--model: {file} {message}" in refusal(SDXL, folder)


# --- where it is kept ---


@pytest.mark.parametrize("name, family", [("sdxl", SDXL), ("flux", FLUX)])
def test_offload_auto_goes_by_the_free_memory(request, monkeypatch, capsys, name, family):
    """With as much as is needed nothing is offloaded, with less the model is, in a line that says so."""
    pipe, options = request.getfixturevalue(name), parse(family, [])
    needed = needed_memory(family, pipe, options)
    calls, there = [], {}
    monkeypatch.setattr(models, "free_memory", lambda device: calls.append(device) or there["free"])
    for there["free"], expected in ((needed, "none"), (needed - 1, "model"), (None, "none")):
        assert models.offload_of(family, pipe, "cuda:1", options) == expected
        assert ("--offload model" in capsys.readouterr().err) == (expected == "model")
    for named in ("none", "model", "sequential"):
        assert models.offload_of(family, pipe, "cuda:1", parse(family, ["--offload", named])) == named
    assert calls == ["cuda:1"] * 3


def test_what_is_needed_grows_with_the_picture(sdxl):
    """The weights, and beside them the decoder's: four maps of 32 channels in float32 for each pixel."""
    weights = sum(
        p.numel()
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
        for p in getattr(sdxl, part).parameters()
    )
    channels = sdxl.vae.config.block_out_channels[1]
    for arguments, pixels in (([], 128 * 128), (["--width", "512", "--batch", "3"], 3 * 512 * 128)):
        assert needed_memory(SDXL, sdxl, parse(SDXL, arguments)) == 4 * weights + 4 * pixels * channels * 4
