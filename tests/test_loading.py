"""Loading and saving: every loader of diffusers that reads the parent's files reads and writes them here too."""

from __future__ import annotations

import json
import shutil

import addons
import pytest
import torch
from conftest import CHILDREN, FAMILIES, PARENTS, ROOT, draw, load, network, parent_of, relative, seeded
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLImg2ImgPipeline,
)
from safetensors.torch import save_file

from flux_comfy_pipeline import FluxComfyPipeline
from sdxl_comfy_pipeline import StableDiffusionXLComfyPipeline

CLOSE = 1e-5  # float32 rounding; see test_side_by_side.py
NOISE = {"sdxl": (1, 4, 8, 8), "flux": (1, 16, 64)}


# --- folders ---------------------------------------------------------------------------------------------------------


@FAMILIES
def test_saved_folder_is_read_by_every_loader(name, tmp_path):
    """By this class, by the parent's, by diffusers' loaders that look the class up, and with `custom_pipeline`."""
    pipe = load(CHILDREN[name], name)
    expected = draw(pipe, name)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == PARENTS[name].__name__
    file = {"custom_pipeline": str(ROOT / f"{name}_comfy_pipeline.py"), "trust_remote_code": True}
    loaders = {
        CHILDREN[name]: CHILDREN[name].from_pretrained(tmp_path),
        PARENTS[name]: PARENTS[name].from_pretrained(tmp_path),
        DiffusionPipeline: DiffusionPipeline.from_pretrained(tmp_path),
        AutoPipelineForText2Image: AutoPipelineForText2Image.from_pretrained(tmp_path),
        "custom_pipeline": DiffusionPipeline.from_pretrained(tmp_path, **file),
    }
    for loader, loaded in loaders.items():
        child = loader in (CHILDREN[name], "custom_pipeline")
        assert type(loaded).__name__ == (CHILDREN if child else PARENTS)[name].__name__
        drawn = draw(loaded, name)
        assert drawn.equal(expected) if child else relative(drawn, expected) < CLOSE


@FAMILIES
def test_variant_and_dtype(name, tmp_path):
    """A half precision variant is written under its name and read in the dtype that is asked for."""
    pipe = load(CHILDREN[name], name, torch.bfloat16)
    noise = {"latents": torch.randn(NOISE[name], generator=seeded())}  # older torch draws other noise in bfloat16
    expected = draw(pipe, name, **noise)
    pipe.save_pretrained(tmp_path, variant="bf16")
    assert list(tmp_path.rglob("*.bf16.safetensors")) and not list(tmp_path.rglob("model.safetensors"))
    for argument in ("dtype", "torch_dtype"):
        half = CHILDREN[name].from_pretrained(tmp_path, variant="bf16", **{argument: torch.bfloat16})
        assert half.dtype == torch.bfloat16 and draw(half, name, **noise).equal(expected)
    full = CHILDREN[name].from_pretrained(tmp_path, variant="bf16", dtype=torch.float32)
    assert full.dtype == torch.float32
    assert relative(draw(full, name, **noise), expected) < 0.1  # the weights are bfloat16's, the arithmetic is not


@FAMILIES
def test_from_pipe_both_ways_shares_the_weights(name):
    child = load(CHILDREN[name], name)
    parent = PARENTS[name].from_pipe(child)
    again = CHILDREN[name].from_pipe(parent, dtype=parent.dtype)
    for component in child.components:
        if isinstance(getattr(child, component), torch.nn.Module):
            assert getattr(again, component) is getattr(parent, component) is getattr(child, component)
    expected = draw(child, name)
    assert draw(again, name).equal(expected) and relative(draw(parent, name), expected) < CLOSE


def test_from_pipe_to_image_to_image(sdxl):
    assert StableDiffusionXLImg2ImgPipeline.from_pipe(sdxl).unet is sdxl.unet


# --- one file --------------------------------------------------------------------------------------------------------


def test_sdxl_from_single_file(sdxl, tmp_path):
    """The demo model under the original repository's names. `config` names the folder that describes its size."""
    file = addons.single_file(sdxl, tmp_path / "demo.safetensors")
    loaded = StableDiffusionXLComfyPipeline.from_single_file(file, config=str(ROOT / "demo/sdxl"))
    assert type(loaded) is StableDiffusionXLComfyPipeline
    assert draw(loaded, "sdxl", output_type="pt").equal(draw(sdxl, "sdxl", output_type="pt"))
    half = StableDiffusionXLComfyPipeline.from_single_file(
        file, config=str(ROOT / "demo/sdxl"), torch_dtype=torch.bfloat16
    )
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder_2.dtype} == {torch.bfloat16}


def test_flux_from_single_file(flux, tmp_path):
    """The transformer in one file, the rest from elsewhere, as fine-tunes come. The file has diffusers' names."""
    file = tmp_path / "transformer.safetensors"
    save_file(flux.transformer.state_dict(), file)
    rest = {name: getattr(flux, name) for name in ("vae", "text_encoder", "text_encoder_2")}
    loaded = FluxComfyPipeline.from_single_file(file, config=str(ROOT / "demo/flux"), **rest)
    assert type(loaded) is FluxComfyPipeline and loaded.transformer is not flux.transformer
    assert draw(loaded, "flux", output_type="pt").equal(draw(flux, "flux", output_type="pt"))


def test_flux_from_single_file_of_the_original_repository(flux, tmp_path):
    """The same under the original names. diffusers reads them at FLUX's own width, 3072, only.

    So the transformer is one of that width, with a block of each kind and random weights, 0.5 B.
    """
    folder = tmp_path / "demo"
    shutil.copytree(ROOT / "demo/flux", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "transformer/config.json").read_text())
    config |= {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": [16, 56, 56]}
    config |= {"num_layers": 1, "num_single_layers": 1}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        wide = FluxTransformer2DModel.from_config(config)
    wide = wide.to(torch.bfloat16).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in wide.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    expected = draw(FluxComfyPipeline(**{**flux.components, "transformer": wide}), "flux")
    file = addons.flux_single_file(wide, tmp_path / "flux.safetensors")
    rest = {name: getattr(flux, name) for name in ("vae", "text_encoder", "text_encoder_2")}
    loaded = FluxComfyPipeline.from_single_file(file, config=str(folder), torch_dtype=torch.bfloat16, **rest)
    assert loaded.transformer is not wide and draw(loaded, "flux").equal(expected)


# --- adapters --------------------------------------------------------------------------------------------------------


@FAMILIES
def test_lora(name, tmp_path):
    """Load, scale in the call, weigh, fuse, unfuse and unload: each as in the parent, and at the end all is as before.

    The LoRA is one of the network and the first text encoder.
    """
    child = load(CHILDREN[name], name)
    file = addons.lora_file(child, tmp_path)
    scaled = {"cross_attention_kwargs" if name == "sdxl" else "joint_attention_kwargs": {"scale": 0.4}}
    plain = draw(child, name)
    parent = parent_of(child, name)

    child.load_lora_weights(file, adapter_name="small")
    full = draw(child, name)
    assert relative(full, plain) > 100 * CLOSE
    assert relative(full, draw(parent, name)) < CLOSE
    less = draw(child, name, **scaled)
    assert relative(less, full) > 100 * CLOSE
    assert relative(less, draw(parent, name, **scaled)) < CLOSE
    child.set_adapters(["small"], [0.4])
    assert relative(draw(child, name), less) < 10 * CLOSE  # the same, multiplied elsewhere
    child.set_adapters(["small"], [1.0])
    child.disable_lora()
    assert draw(child, name).equal(plain)
    child.enable_lora()
    parts = ["unet" if name == "sdxl" else "transformer", "text_encoder"]
    child.fuse_lora(components=parts)
    child.unload_lora_weights()
    assert relative(draw(child, name), full) < 10 * CLOSE

    fresh = load(CHILDREN[name], name)
    fresh.load_lora_weights(file)
    assert relative(draw(fresh, name), full) < CLOSE
    fresh.fuse_lora(components=parts)
    fresh.unfuse_lora(components=parts)
    assert relative(draw(fresh, name), full) < 10 * CLOSE
    fresh.unload_lora_weights()
    assert relative(draw(fresh, name), plain) < 10 * CLOSE


def test_sdxl_textual_inversion(tmp_path):
    """A token of two vectors in both text encoders, loaded, used in a prompt, unloaded."""
    from safetensors.torch import load_file

    child = load(StableDiffusionXLComfyPipeline, "sdxl")
    plain = draw(child, "sdxl")
    vectors = load_file(addons.textual_inversion_file(child, tmp_path))
    encoders = {"clip_l": (child.text_encoder, child.tokenizer), "clip_g": (child.text_encoder_2, child.tokenizer_2)}
    for key, (encoder, tokenizer) in encoders.items():
        child.load_textual_inversion(vectors[key], token="<style>", text_encoder=encoder, tokenizer=tokenizer)
    styled = draw(child, "sdxl", prompt="a cat in <style>")
    assert relative(styled, draw(child, "sdxl", prompt="a cat in")) > 100 * CLOSE
    assert relative(styled, draw(parent_of(child, "sdxl"), "sdxl", prompt="a cat in <style>")) < CLOSE
    for encoder, tokenizer in encoders.values():
        child.unload_textual_inversion("<style>", text_encoder=encoder, tokenizer=tokenizer)
    assert draw(child, "sdxl").equal(plain)


def test_flux_textual_inversion(tmp_path):
    """FLUX's loader knows CLIP alone."""
    child = load(FluxComfyPipeline, "flux")
    plain = draw(child, "flux")
    vector = torch.randn(2, child.text_encoder.config.hidden_size, generator=seeded(3))
    child.load_textual_inversion(vector, token="<style>")
    styled = draw(child, "flux", prompt="a cat in <style>")
    assert relative(styled, draw(parent_of(child, "flux"), "flux", prompt="a cat in <style>")) < CLOSE
    child.unload_textual_inversion("<style>")
    assert draw(child, "flux").equal(plain)


@FAMILIES
def test_ip_adapter_load_and_unload(name, tmp_path):
    """From files, as a user loads it, image encoder and all. Pictures with it stand in test_side_by_side.py."""
    child = load(CHILDREN[name], name)
    plain = draw(child, name)
    weights = addons.ip_adapter(network(child))
    flat = {f"{part}.{key}": value for part, values in weights.items() for key, value in values.items()}
    save_file(flat, tmp_path / "adapter.safetensors")
    addons.image_encoder().save_pretrained(tmp_path / "image_encoder")
    if name == "sdxl":
        child.load_ip_adapter(str(tmp_path), subfolder="", weight_name="adapter.safetensors")
    else:
        child.load_ip_adapter(
            str(tmp_path),
            weight_name="adapter.safetensors",
            image_encoder_pretrained_model_name_or_path=str(tmp_path / "image_encoder"),
            image_encoder_dtype=torch.float32,
        )
    seen = draw(child, name, ip_adapter_image=addons.IMAGE)
    child.set_ip_adapter_scale(0.0)
    assert relative(seen, draw(child, name, ip_adapter_image=addons.IMAGE)) > 100 * CLOSE
    child.unload_ip_adapter()
    assert child.image_encoder is None
    assert draw(child, name).equal(plain)


# --- quantised components --------------------------------------------------------------------------------------------


@FAMILIES
def test_torchao_network(name):
    """Weights of 8 bits: the picture is the parent's with the same network, and near the one of 32 bits."""
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    plain = load(CHILDREN[name], name)
    part = "unet" if name == "sdxl" else "transformer"
    quantised = type(network(plain)).from_pretrained(
        ROOT / "demo" / name,
        subfolder=part,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        torch_dtype=torch.float32,  # of what is not quantised; diffusers' own choice is bfloat16
    )
    child = CHILDREN[name](**{**plain.components, part: quantised})
    drawn = draw(child, name)
    assert 0 < relative(drawn, draw(plain, name)) < 0.1
    assert relative(drawn, draw(parent_of(child, name), name)) < CLOSE
