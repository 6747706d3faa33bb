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
def refusal(tmp_path, capsys, monkeypatch):
    """Runs a script, offline, with a model that is refused, and returns the one line of the message."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(family, model) -> str:
        assert run_here(family, "--model", model, "--output", tmp_path / "output") == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize("on_the_hub", [False, True])
@pytest.mark.parametrize(
    "family, kind, message",
    [
        (SDXL, "FluxPipeline", "is a model of FLUX: test_flux.py draws it"),
        (FLUX, "StableDiffusionXLPipeline", "is a model of SDXL: test.py draws it"),
        (FLUX, "StableDiffusion3Pipeline", "is a model of StableDiffusion3Pipeline, not of FluxPipeline"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_its_index(tmp_path, refusal, family, kind, message, on_the_hub):
    """Before anything of it is loaded: there is nothing but the index, here or in the cache, which a download fills."""
    model = "somebody/something" if on_the_hub else tmp_path / "model"
    folder = snapshot(tmp_path / "hub", "something") if on_the_hub else tmp_path / "model"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    assert f"{model} {message}" in refusal(family, model)


def test_another_pipeline_of_the_same_networks_is_loaded(tmp_path, refusal):
    index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "no file named config.json" in refusal(SDXL, tmp_path)  # as far as it goes here


def snapshot(cache, name):
    """Where the hub's cache has the files of somebody's model."""
    refs = cache / f"models--somebody--{name}" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc")
    return refs.parent / "snapshots" / "abc"


@pytest.fixture(scope="module")
def both_variants(tmp_path_factory):
    """A hub's cache with a model in float32 and in float16, of other weights, and one in float32 alone."""
    cache = tmp_path_factory.mktemp("hub")
    for name in ("both", "single"):
        pipe, folder = load(CHILDREN["sdxl"], "sdxl"), snapshot(cache, name)
        pipe.save_pretrained(folder)
        if name == "both":
            pipe.unet.conv_out.bias.data.fill_(0.5)
            pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
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


SDXL_KEY = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
REFINER_KEY = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
SD1_KEY = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
FLUX_KEY = "double_blocks.0.img_attn.norm.key_norm.scale"


@pytest.mark.parametrize(
    "family, names, message",
    [
        (SDXL, ["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "is a LoRA, which is loaded on top of a model"),
        (FLUX, ["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"], "is a LoRA"),
        (FLUX, [UNET_KEY, SDXL_KEY], "is a checkpoint of SDXL, not of FLUX; test.py draws it"),
        (SDXL, [FLUX_KEY], "is a checkpoint of FLUX, not of SDXL; test_flux.py draws it"),
        (SDXL, [UNET_KEY, REFINER_KEY], "is a checkpoint of another architecture, xl_refiner, not of SDXL"),
        (SDXL, [UNET_KEY, SD1_KEY], "is a checkpoint of another architecture, Stable Diffusion 1,"),
        (SDXL, [UNET_KEY, "model.diffusion_model.label_emb.0.0.weight"], "has the UNet of an SDXL model alone"),
        (SDXL, ["h.0.attn.bias", "wte.weight"], "is no checkpoint of SDXL; its tensors are h.0.attn.bias, wte.weight"),
        (SDXL, [UNET_KEY, SDXL_KEY], "is read with the configuration of stabilityai/stable-diffusion-xl-base-1.0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_is_recognized_by_its_tensors(tmp_path, refusal, family, names, message):
    """The last one passes for SDXL's, so that loading begins, which needs the hub."""
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1, 4, 1, 1) for name in names}, file)
    assert f"--model: {file} {message}" in refusal(family, file)


@pytest.mark.parametrize(
    "name, message",
    [
        ("cut.safetensors", "is no .safetensors file, or is cut off"),
        ("text.safetensors", "is no .safetensors file"),
        ("list.safetensors", "is no .safetensors file"),
        ("missing.safetensors", "there is no file"),
        ("nothing", "neither a folder here nor a model on the hub"),
        ("notes.txt", "is a file, but neither a .safetensors nor a .ckpt"),
        ("text.ckpt", "is no .ckpt of tensors, or cut off"),
        ("lora.ckpt", "is a LoRA"),
        ("empty", "has no model_index.json"),
    ],
)
def test_a_path_that_is_no_model(tmp_path, refusal, name, message):
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}}, tmp_path / "lora.ckpt")
    save_file({UNET_KEY: torch.zeros(2, 3), SDXL_KEY: torch.zeros(3)}, whole := tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1])
    (tmp_path / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    for file in ("notes.txt", "text.ckpt", "text.safetensors"):
        (tmp_path / file).write_text("text of any kind")
    assert f"{tmp_path / name}" in (line := refusal(SDXL, tmp_path / name)) and message in line


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
