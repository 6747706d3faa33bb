"""Loading and saving: every loader of diffusers that reads the parent's files reads and writes them here too."""

from __future__ import annotations

import json

import addons
import torch
from conftest import CHILDREN, FAMILIES, PARENTS, ROOT, draw, load, network, parent_of, relative, seeded
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from safetensors.torch import save_file

CLOSE = 1e-5  # float32 rounding; see test_side_by_side.py
NOISE = {"sdxl": (1, 4, 8, 8), "flux": (1, 16, 64)}


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


@FAMILIES
def test_from_single_file(name, sdxl, flux, tmp_path):
    """The network in one file, the rest from elsewhere, as fine-tunes come. `config` names a folder for the sizes.

    The original repositories' names of weights, and how they are joined, are diffusers' converters' matter.
    """
    pipe = {"sdxl": sdxl, "flux": flux}[name]
    file, part = tmp_path / "network.safetensors", "unet" if name == "sdxl" else "transformer"
    save_file(network(pipe).state_dict(), file)
    rest = {key: one for key, one in pipe.components.items() if isinstance(one, torch.nn.Module) and key != part}
    loaded = CHILDREN[name].from_single_file(file, config=str(ROOT / "demo" / name), **rest)
    assert type(loaded) is CHILDREN[name] and network(loaded) is not network(pipe)
    assert draw(loaded, name, output_type="pt").equal(draw(pipe, name, output_type="pt"))
    half = CHILDREN[name].from_single_file(file, config=str(ROOT / "demo" / name), torch_dtype=torch.bfloat16, **rest)
    assert network(half).dtype == torch.bfloat16


@FAMILIES
def test_lora(name, tmp_path):
    """Of the network and the first text encoder: load, scale, weigh, disable, fuse and unload, as in the parent."""
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


@FAMILIES
def test_textual_inversion(name):
    """A token of two vectors, loaded, used in a prompt, unloaded. FLUX's loader knows CLIP alone."""
    child = load(CHILDREN[name], name)
    plain, without = draw(child, name), draw(child, name, prompt="a cat in")
    encoders: list[dict] = [{}]
    if name == "sdxl":
        encoders = [{part: getattr(child, part + n) for part in ("text_encoder", "tokenizer")} for n in ("", "_2")]
    for places in encoders:
        width = places.get("text_encoder", child.text_encoder).config.hidden_size
        vectors = torch.randn(2, width, generator=seeded(3))
        child.load_textual_inversion(vectors, token="<style>", **places)
    styled = draw(child, name, prompt="a cat in <style>")
    assert relative(styled, without) > 100 * CLOSE
    assert relative(styled, draw(parent_of(child, name), name, prompt="a cat in <style>")) < CLOSE
    for places in encoders:
        child.unload_textual_inversion("<style>", **places)
    assert draw(child, name).equal(plain)
