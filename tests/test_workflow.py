"""Settings read from pictures: graphs in the shapes of public workflows of ComfyUI, and the web UI's text."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gallery.parameters import write_parameters
from gallery.workflow import Settings, import_settings


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def picture(path, **texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text if isinstance(text, str) else json.dumps(text))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.fixture
def read(tmp_path):
    """The settings of a graph, in a picture."""
    return lambda graph, family=None: import_settings(picture(tmp_path / "picture.png", prompt=graph), family)


def plain_graph(**sampler) -> dict:
    """ComfyUI's first workflow."""
    fields = {"seed": 42, "steps": 20, "cfg": 8.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": node("KSampler", **{**fields, **links, **sampler}),
        "4": node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors"),
        "5": node("EmptyLatentImage", width=832, height=1216, batch_size=1),
        "6": node("CLIPTextEncode", text="a bottle", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="watermark", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }


PLAIN = {
    **{"prompt": "a bottle", "negative_prompt": "watermark", "seed": 42, "steps": 20, "cfg": 8.0, "denoise": 1.0},
    **{"sampler_name": "dpmpp_2m", "scheduler": "karras", "width": 832, "height": 1216},
    "model": "sd_xl_base_1.0.safetensors",
}


def test_plain(read):
    assert read(plain_graph()) == Settings(PLAIN, "sdxl", [], comfy=True)


def test_nodes_in_any_order_and_with_any_ids(read):
    items = list(plain_graph().items())
    for seed in range(5):
        random.Random(seed).shuffle(items)
        renamed = {f"n{name}": text for name, text in items}
        text = json.dumps(renamed)
        for name, _ in items:
            text = text.replace(f'["{name}", ', f'["n{name}", ')
        assert read(json.loads(text)) == Settings(PLAIN, "sdxl", [], comfy=True)


def flux_graph() -> dict:
    """FLUX.1-dev's example: the parts of the sampler are nodes of their own."""
    return {
        "5": node("EmptySD3LatentImage", width=["30", 0], height=768, batch_size=1),
        "6": node("CLIPTextEncode", text=["31", 0], clip=["11", 0]),
        "8": node("VAEDecode", samples=["13", 0], vae=["10", 0]),
        "9": node("SaveImage", filename_prefix="flux", images=["8", 0]),
        "10": node("VAELoader", vae_name="ae.safetensors"),
        "11": node("DualCLIPLoader", clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors", type="flux"),
        "12": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "13": node(
            "SamplerCustomAdvanced",
            noise=["25", 0],
            guider=["22", 0],
            sampler=["16", 0],
            sigmas=["17", 0],
            latent_image=["5", 0],
        ),
        "16": node("KSamplerSelect", sampler_name="euler"),
        "17": node("BasicScheduler", scheduler="simple", steps=28, denoise=1.0, model=["32", 0]),
        "22": node("BasicGuider", model=["32", 0], conditioning=["26", 0]),
        "25": node("RandomNoise", noise_seed="219670278747233"),
        "26": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
        "30": node("PrimitiveInt", value=1344),
        "31": node("Reroute", **{"": ["33", 0]}),
        "32": node("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=1344, height=768, model=["12", 0]),
        "33": node("PrimitiveStringMultiline", value="a fox\nin snow"),
    }


def test_flux_in_parts(read):
    assert read(flux_graph(), "flux") == Settings(
        {
            **{"prompt": "a fox\nin snow", "seed": 219670278747233, "steps": 28, "cfg": 1.0, "denoise": 1.0},
            **{"sampler_name": "euler", "scheduler": "simple", "width": 1344, "height": 768, "guidance": 3.5},
            "model": "flux1-dev.safetensors",
        },
        "flux",
        [],
        comfy=True,
    )


def test_flux_with_true_cfg(read):
    graph = flux_graph()
    graph["22"] = node("CFGGuider", model=["12", 0], positive=["26", 0], negative=["40", 0], cfg="2.5")
    graph["40"] = node("CLIPTextEncodeFlux", clip_l="blur", t5xxl="blurry, dull", guidance=1.0, clip=["11", 0])
    found = read(graph)
    assert (found.values["cfg"], found.values["guidance"]) == (2.5, 3.5)
    assert found.values["negative_prompt"] == "blurry, dull" and found.unused == ["CLIPTextEncodeFlux's other text"]


def test_the_other_forms_of_prompts(read):
    graph = plain_graph()
    graph["6"] = node(
        "CLIPTextEncodeSDXL", text_g="a bottle", text_l="a bottle", width=1024, height=1024, clip=["4", 1]
    )
    graph["7"] = node("ConditioningZeroOut", conditioning=["6", 0])
    assert read(graph).values == {**PLAIN, "negative_prompt": ""}
    graph["6"]["inputs"]["text_g"] = ""
    assert read(graph).values["prompt"] == "a bottle"


def test_ksampler_advanced(read):
    """SDXL's example: a base model hands its leftover noise to the refiner."""
    graph = plain_graph()
    links = {key: graph["3"]["inputs"][key] for key in ("model", "positive", "negative", "latent_image")}
    fields = {"steps": 25, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal"}
    base = {**fields, **links, "noise_seed": 7, "add_noise": "enable", "start_at_step": 0, "end_at_step": 20}
    graph["3"] = node("KSamplerAdvanced", **base, return_with_leftover_noise="enable")
    assert read(graph).unused == ["steps 0 to 20 alone"]
    assert read(graph).values["seed"] == 7 and read(graph).values["steps"] == 25
    refiner = {**base, "noise_seed": 0, "add_noise": "disable", "start_at_step": 20, "end_at_step": 10000}
    graph["10"] = node("KSamplerAdvanced", **refiner | {"latent_image": ["3", 0]})
    graph["8"]["inputs"]["samples"] = ["10", 0]
    found = read(graph)
    assert found.values["seed"] == 7 and found.unused == ["a later KSamplerAdvanced", "steps 0 to 20 alone"]


def test_sampler_custom(read):
    graph = plain_graph()
    links = {key: graph["3"]["inputs"][key] for key in ("model", "positive", "negative", "latent_image")}
    fields = {"noise_seed": 3, "cfg": 6, "add_noise": True, "sampler": ["20", 0], "sigmas": ["21", 0]}
    graph["3"] = node("SamplerCustom", **links, **fields)
    graph["20"] = node("KSamplerSelect", sampler_name="dpmpp_2m_sde")
    graph["21"] = node("BasicScheduler", model=["4", 0], scheduler="beta", steps=12, denoise=0.5)
    changed = {"seed": 3, "cfg": 6.0, "sampler_name": "dpmpp_2m_sde", "scheduler": "beta", "steps": 12, "denoise": 0.5}
    assert read(graph) == Settings({**PLAIN, **changed}, "sdxl", [], comfy=True)


def test_what_is_not_used_is_told(read):
    """LoRA, ControlNet, a picture to begin with, upscaling, a second pass, nodes that nobody knows."""
    graph = plain_graph(latent_image=["12", 0], model=["10", 0], positive=["11", 0], denoise=0.6)
    graph["10"] = node("LoraLoader", lora_name="detail.safetensors", model=["4", 0], clip=["4", 1])
    graph["11"] = node(
        "ControlNetApplyAdvanced", strength=1.0, positive=["6", 0], negative=["7", 0], control_net=["13", 0]
    )
    graph["12"] = node("VAEEncode", pixels=["14", 0], vae=["4", 2])
    graph["13"] = node("ControlNetLoader", control_net_name="canny.safetensors")
    graph["14"] = node("LoadImage", image="in.png")
    graph["15"] = node("LatentUpscaleBy", samples=["3", 0], upscale_method="nearest", scale_by=1.5)
    graph["16"] = node(
        "KSampler", **plain_graph()["3"]["inputs"] | {"latent_image": ["15", 0], "seed": 1, "denoise": 0.5}
    )
    graph["8"]["inputs"]["samples"] = ["16", 0]
    graph["17"] = node("ImageSharpen", image=["8", 0])
    graph["9"]["inputs"]["images"] = ["17", 0]
    graph["18"] = node("Unconnected", value=1)
    found = read(graph)
    sizeless = {key: value for key, value in PLAIN.items() if key not in ("width", "height")}
    assert found.values == {**sizeless, "denoise": 0.6}
    assert set(found.unused) == {
        *("LoraLoader (detail.safetensors)", "ControlNetApplyAdvanced", "ControlNetLoader (canny.safetensors)"),
        *("VAEEncode", "LoadImage", "LatentUpscaleBy", "a later KSampler", "ImageSharpen", "no width was found"),
    }


def test_values_through_unknown_nodes(read):
    """A seed, a text and a latent from nodes of packages that pass on what they get."""
    graph = plain_graph(seed=["20", 0], steps="25", cfg=["21", 0])
    graph["20"] = node("Seed (rgthree)", seed=77)
    graph["21"] = node("Any Switch", only=["22", 0])
    graph["22"] = node("PrimitiveFloat", value=4.5)
    graph["6"]["inputs"]["text"] = ["23", 0]
    graph["23"] = node("Text Style", text=["24", 0], style="none")
    graph["24"] = node("ShowText", anything=["25", 0])
    graph["25"] = node("String", value="a fox")
    found = read(graph)
    assert found.values == {**PLAIN, "seed": 77, "steps": 25, "cfg": 4.5, "prompt": "a fox"}
    assert not found.unused


def test_broken_graphs(read):
    """Cycles and links to nowhere leave a setting out, and say so; what is no node is passed by."""
    graph = plain_graph(
        positive=["20", 0], negative=["99", 0], seed=["nowhere", 0], latent_image=["3", 0], cfg=[1, 2, 3]
    )
    graph |= {"20": node("Reroute", x=["21", 0]), "21": node("Reroute", x=["20", 0])}
    graph |= {"30": "text", "31": {"class_type": "KSampler"}, "32": {"inputs": []}, "33": None}
    found = read(graph)
    assert set(found.values) == {"steps", "sampler_name", "scheduler", "denoise", "model"}
    assert {"no prompt was found", "no seed was found", "no width was found"} <= set(found.unused)
    for bad in (True, "NaN", float("nan"), float("inf"), "many", {}, [], "9" * 10_000):
        assert "steps" not in read(plain_graph(steps=bad)).values


def test_megabytes(read):
    """Found by the same way, however long: 30,000 nodes that pass one thing on, and as many that save nothing."""
    graph = plain_graph(positive=["r0", 0], latent_image=["l0", 0])
    count = 30_000
    for i in range(count):
        graph[f"r{i}"] = node("Reroute", value=[f"r{i + 1}" if i < count - 1 else "6", 0])
        graph[f"l{i}"] = node("LatentPass", samples=[f"l{i + 1}" if i < count - 1 else "5", 0])
        graph[f"s{i}"] = node("PreviewImage", images=[f"r{i}", 0])
    found = read(graph)
    assert found.values == PLAIN and found.unused == ["LatentPass"]
    deep = "[" * 1_000_000
    with pytest.raises(ValueError, match="has no settings"):
        read(deep)


def test_other_families_are_refused(read):
    with pytest.raises(ValueError, match="picture.png: was drawn with FLUX, which this script does not draw"):
        read(flux_graph(), "sdxl")
    with pytest.raises(ValueError, match="was drawn with SDXL"):
        read(plain_graph(), "flux")
    graph = plain_graph()
    graph["4"]["inputs"]["ckpt_name"] = "dreamshaper.safetensors"  # which may be any family
    assert read(graph, "flux").family is None


@pytest.mark.parametrize(
    "texts", [{}, {"prompt": "a fox"}, {"prompt": "{}"}, {"prompt": "[1]"}, {"parameters": "a fox"}]
)
def test_pictures_without_settings(tmp_path, texts):
    with pytest.raises(ValueError, match="picture.png: has no settings") as told:
        import_settings(picture(tmp_path / "picture.png", **texts))
    assert "\n" not in str(told.value)


def test_what_is_no_picture(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "text.png", tmp_path / "nothing.png"):
        with pytest.raises(ValueError, match="can't be read"):
            import_settings(path)


def test_the_web_uis_text(tmp_path):
    text = (
        "a fox <lora:fur:0.8> in snow,\n(sharp:1.2)\nNegative prompt: blurry\n"
        "Steps: 30, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 6.5, Seed: 4, Size: 832x1216,"
        " Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Denoising strength: 0.4, Hires upscale: 2, Version: v1.10.1"
    )
    assert import_settings(picture(tmp_path / "picture.png", parameters=text)) == Settings(
        {
            **{"prompt": "a fox in snow,\n(sharp:1.2)", "negative_prompt": "blurry", "model": "sd_xl_base_1.0"},
            **{"sampler_name": "dpmpp_2m_sde", "scheduler": "karras", "seed": 4, "steps": 30, "cfg": 6.5},
            **{"width": 832, "height": 1216},  # and no denoise, which is the second pass's
        },
        "sdxl",
        ["<lora:fur:0.8>", "Hires upscale"],
    )


def test_the_web_uis_old_names_and_flux(tmp_path):
    old = "a fox\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x512"
    values = import_settings(picture(tmp_path / "old.png", parameters=old)).values
    assert (values["sampler_name"], values["scheduler"]) == ("dpmpp_2m", "karras")
    flux = "a fox\nSteps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 1"
    found = import_settings(picture(tmp_path / "flux.png", parameters=flux))
    assert (found.family, found.values["cfg"], found.values["guidance"]) == ("flux", 1.0, 3.5)


def test_the_text_that_is_written_here(tmp_path):
    """By `write_parameters`."""
    settings = {"prompt": "a fox, in snow", "negative_prompt": "", "sampler": "dpmpp_sde_gpu", "schedule": "beta"}
    settings |= {"steps": "9", "guidance": "5.0", "seed": "3", "size": "64x96", "model": "demo"}
    for comfy in ("True", "False"):
        own = picture(tmp_path / "own.png", parameters=write_parameters(settings | {"comfy": comfy}))
        assert import_settings(own).comfy == (comfy == "True")
    values = import_settings(own).values
    assert (values["sampler_name"], values["scheduler"], values["steps"]) == ("dpmpp_sde_gpu", "beta", 9)
    assert (values["prompt"], values["width"], values["height"]) == ("a fox, in snow", 64, 96)
