"""Settings read from pictures: graphs in the shapes of public workflows of ComfyUI, and the web UI's text."""

from __future__ import annotations

import json
import random
import re

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gallery.parameters import listed
from gallery.workflow import Settings, import_settings


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def node_name(value):
    """For the names of tests."""
    return value.get("class_type", "") if isinstance(value, dict) else ""


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


LINKS = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
CUSTOM = {"noise": ["20", 0], "guider": ["21", 0], "sampler": ["22", 0], "sigmas": ["23", 0], "latent_image": ["5", 0]}


def plain_graph(**sampler) -> dict:
    """ComfyUI's first workflow."""
    fields = {"seed": 42, "steps": 20, "cfg": 8.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
    return {
        "3": node("KSampler", **{**fields, **LINKS, **sampler}),
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


def test_nodes_in_any_order_and_with_any_ids(read):
    items = list(plain_graph().items())
    for seed in range(5):
        assert read(dict(items)) == Settings(PLAIN, "sdxl", [], comfy=True)
        random.Random(seed).shuffle(items)
        renamed = re.sub(r'\["(\w+)", ', r'["n\1", ', json.dumps({f"n{name}": node for name, node in items}))
        assert read(json.loads(renamed)) == Settings(PLAIN, "sdxl", [], comfy=True)


def flux_graph() -> dict:
    """FLUX.1-dev's example: the parts of the sampler are separate nodes."""
    return {
        "5": node("EmptySD3LatentImage", width=["30", 0], height=768, batch_size=1),
        "6": node("CLIPTextEncode", text=["31", 0], clip=["11", 0]),
        "8": node("VAEDecode", samples=["13", 0], vae=["10", 0]),
        "9": node("SaveImage", filename_prefix="flux", images=["8", 0]),
        "10": node("VAELoader", vae_name="ae.safetensors"),
        "11": node("DualCLIPLoader", clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors", type="flux"),
        "12": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "13": node("SamplerCustomAdvanced", **CUSTOM),
        "20": node("RandomNoise", noise_seed="219670278747233"),
        "21": node("BasicGuider", model=["32", 0], conditioning=["26", 0]),
        "22": node("KSamplerSelect", sampler_name="euler"),
        "23": node("BasicScheduler", scheduler="simple", steps=28, denoise=1.0, model=["32", 0]),
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
    graph["21"] = node("CFGGuider", model=["12", 0], positive=["26", 0], negative=["40", 0], cfg="2.5")
    graph["40"] = node("CLIPTextEncodeFlux", clip_l="blur", t5xxl="blurry, dull", guidance=1.0, clip=["11", 0])
    found = read(graph)
    assert (found.values["cfg"], found.values["guidance"]) == (2.5, 3.5)
    assert found.values["negative_prompt"] == "blurry, dull" and found.unused == ["CLIPTextEncodeFlux's other text"]


def test_the_other_forms_of_prompts(read):
    graph = plain_graph()
    graph["6"] = node("CLIPTextEncodeSDXL", text_g="a bottle", text_l="a bottle", width=1024, clip=["4", 1])
    graph["7"] = node("ConditioningZeroOut", conditioning=["6", 0])
    assert read(graph).values == {**PLAIN, "negative_prompt": ""}
    graph["6"]["inputs"]["text_g"] = ""
    assert read(graph).values["prompt"] == "a bottle"


def test_ksampler_advanced(read):
    """SDXL's example: the base model passes its leftover noise to the refiner."""
    graph = plain_graph()
    fields = {"steps": 25, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal"}
    base = {**fields, **LINKS, "noise_seed": 7, "add_noise": "enable", "start_at_step": 0, "end_at_step": 20}
    graph["3"] = node("KSamplerAdvanced", **base | {"end_at_step": ["11", 0]}, return_with_leftover_noise="enable")
    graph["11"] = node("PrimitiveInt", value=20)
    assert read(graph).unused == ["steps 0 to 20 alone"]
    assert read(graph).values["seed"] == 7 and read(graph).values["steps"] == 25
    refiner = {**base, "noise_seed": 0, "add_noise": "disable", "start_at_step": 20, "end_at_step": 10000}
    graph["10"] = node("KSamplerAdvanced", **refiner | {"latent_image": ["3", 0]})
    graph["8"]["inputs"]["samples"] = ["10", 0]
    found = read(graph)
    assert found.values["seed"] == 7 and found.unused == ["a later KSamplerAdvanced", "steps 0 to 20 alone"]


def test_what_is_not_used_is_reported(read):
    """LoRA, ControlNet, an initial picture, upscaling, a second pass, unknown nodes."""
    graph = plain_graph(latent_image=["12", 0], model=["10", 0], positive=["11", 0], denoise=0.6)
    graph["10"] = node("LoraLoader", lora_name="detail.safetensors", model=["4", 0], clip=["4", 1])
    graph["11"] = node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], control_net=["13", 0])
    graph["12"] = node("VAEEncode", pixels=["14", 0], vae=["4", 2])
    graph["13"] = node("ControlNetLoader", control_net_name="canny.safetensors")
    graph["14"] = node("LoadImage", image="in.png")
    graph["15"] = node("LatentUpscaleBy", samples=["3", 0], upscale_method="nearest", scale_by=1.5)
    graph["16"] = plain_graph(latent_image=["15", 0], seed=1, denoise=0.5)["3"]
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
    graph = plain_graph()
    graph["5"]["inputs"]["batch_size"] = 4  # the picture may be any of the four
    assert read(graph).unused == ["batch_size 4"]


def text_node(kind: str, **inputs) -> dict:
    """A graph whose prompt comes from this node, and two more texts."""
    graph = plain_graph()
    graph["6"]["inputs"]["text"] = ["20", 0]
    fox, snow = node("String Literal", string="a fox"), node("CR Prompt Text", prompt="in snow")
    return graph | {"20": node(kind, **inputs), "21": fox, "22": snow}


FOX, SNOW = ["21", 0], ["22", 0]
JOINED = [  # nodes that join texts, and the prompt; None where it can't be known
    (node("JoinStringMulti", inputcount=2, string_1=FOX, string_2=SNOW, string_3="x", delimiter=""), "a foxin snow"),
    (node("JoinStrings", string1=FOX, string2="", delimiter="-"), None),  # other such nodes leave empty texts out
    (node("StringConcatenate", string_b=SNOW, string_a="none", delimiter=""), "nonein snow"),
    (node("Text Concatenate", delimiter="\\n", clean_whitespace="true", text_a=" x ", text_c=FOX), "x\na fox"),
    (node("CR Text Concatenate", separator=" / ", text1=FOX, text2=SNOW), "a fox / in snow"),
    (node("StringFunction|pysssss", action="append", tidy_tags="yes", text_a=FOX, text_b="", text_c=SNOW), None),
    (node("ImpactWildcardProcessor", wildcard_text="{fox|cat}", populated_text="cat", mode="populate"), "cat"),
    (node("ShowText|pysssss", text=FOX, text_0="of an earlier run"), "a fox"),
    (node("PreviewAny", source=SNOW, preview_text="old"), "in snow"),
    (node("Text String", text=FOX, text_b="", text_c=""), "a fox"),
    (node("Any Switch", only=SNOW), "in snow"),
    (node("Text Style", text=FOX, style="none"), "a fox"),
    (node("Text Style", text=FOX, style="anime"), None),
    (node("Concat Text", text1=FOX, text2="", separator=", "), None),
    (node("JoinStringMulti", inputcount=2, string_1=FOX, string_2=["23", 0], delimiter=" "), None),
    (node("JoinStrings", string1=FOX, string2=["20", 0], delimiter=" "), None),
    (node("Text Concatenate", text_a=FOX, text_b=SNOW, mode="reverse", delimiter=" "), None),
    (node("StringFunction|pysssss", action="replace", tidy_tags="yes", text_a=FOX, text_b="fox", text_c="cat"), None),
    (node("StringReplace", string=FOX, find="fox", replace="cat"), None),
    (node("CaseConverter", string=FOX, mode="UPPERCASE"), None),
    (node("Load Prompt", file_path="prompts.txt"), None),
    (node("TextBox2", text1=FOX, text2=SNOW), None),
]


@pytest.mark.parametrize("joins, prompt", JOINED, ids=node_name)
def test_linked_texts_are_joined_or_the_node_is_named(read, joins, prompt):
    found = read(text_node(joins["class_type"], **joins["inputs"]))
    assert found.values.get("prompt") == prompt
    assert {**found.values, "prompt": 0} == {**PLAIN, "prompt": 0}  # and the rest is read
    assert ("prompt" in found.unread) == (prompt is None)
    if prompt is not None:
        assert not found.unused
    elif "23" not in str(joins):
        assert found.unread["prompt"] == joins["class_type"] and "prompt" in "".join(found.unused)


NUMBERS = [  # nodes that lead to a number, and the number
    (node("Seed (rgthree)", seed=7), 7),
    (node("Seed Generator", seed=7, control_after_generate="fixed"), 7),
    (node("INTConstant", value=7), 7),
    (node("FloatToInt", float=7.0), 7),
    (node("PrimitiveFloat", value=7.5), 7.5),
    (node("SimpleParameters", seed=3, steps=7, cfg=7.0, denoise=7), None),  # the order of its outputs is unknown
    (node("MathExpression|pysssss", expression="a * 2", a=7), None),
    (node("ComfyMathExpression", **{"expression": "a + 1", "values.a": 7}), None),
    (node("SimpleMath+", value="a-b", a=9, b=2), None),
    (node("easy mathInt", a=7, b=1, operation="add"), None),
    (node("RandomInt", seed=7, min=0, max=9), None),
    (node("StringLength", string="a fox"), None),
    (node("GetImageSize", image=["5", 0]), None),
]


@pytest.mark.parametrize("setting", ["steps", "cfg", "seed", "denoise", "width", "guidance"])
@pytest.mark.parametrize("leads, number", NUMBERS, ids=node_name)
def test_linked_numbers_are_read_or_the_node_is_named(read, leads, number, setting):
    graph = flux_graph() if setting == "guidance" else plain_graph()
    graph[{"width": "5", "guidance": "26"}.get(setting, "3")]["inputs"][setting] = ["90", 0]
    found = read(graph | {"90": leads})
    if 7.5 in leads["inputs"].values():
        number = 7.5 if setting in ("cfg", "denoise", "guidance") else None
    assert found.values.get(setting) == number
    assert found.unread.get(setting) == (None if number else leads["class_type"])
    assert found.unused == ([] if number else [f"the {setting} could not be read ({leads['class_type']})"])


SAMPLER = {"seed": 1, "steps": 9, "cfg": 3.0, "sampler_name": "euler", "scheduler": "beta", "denoise": 1.0}
EVEN = {"23": node("BasicScheduler", scheduler="beta", steps=9, denoise=1.0)}
PARTS = {"20": node("RandomNoise", noise_seed=1), "22": node("KSamplerSelect", sampler_name="euler")}
PARTS |= {"21": node("CFGGuider", model=["4", 0], positive=["6", 0], negative=["7", 0], cfg=3.0)}
EXPONENTIAL = "10, 3.1623, 1, 0.31623, 0.1, 0"  # even in the logarithm, like "exponential"
SAMPLER_NODES = [  # sampler nodes and their inputs, and how their settings differ from `SAMPLER`
    (node("KSampler (Efficient)", **SAMPLER, **LINKS, preview_method="auto", vae_decode="true"), {}, {}),
    (node("KSampler //Inspire", **SAMPLER, **LINKS, noise_mode="CPU"), {}, {}),
    (node("ClownsharKSampler_Beta", **SAMPLER | {"sampler_name": "exponential/res_2s", "scheduler": "bong_tangent"},
          **LINKS, eta=0.5, steps_to_run=-1, sampler_mode="standard", bongmath=True), {},
     {"sampler_name": "res_2s", "scheduler": "bong_tangent"}),
    (node("Tiled KSampler", **SAMPLER | {"sampler_name": "euler_ancestral_beta", "scheduler": None}, **LINKS), {},
     {"sampler_name": "euler_ancestral"}),
    (node("KSampler", **SAMPLER | {"sampler_name": "res_multistep_sgm_uniform", "scheduler": None}, **LINKS), {},
     {"sampler_name": "res_multistep", "scheduler": "sgm_uniform"}),
    (node("SamplerCustomAdvanced", **CUSTOM), PARTS | EVEN, {}),
    (node("SamplerCustom", **LINKS, noise_seed=1, cfg=3, add_noise=True, sampler=["22", 0], sigmas=["23", 0]),
     PARTS | EVEN, {}),
    (node("SamplerCustomAdvanced", **CUSTOM),
     PARTS | {"23": node("ExponentialScheduler", steps=5, sigma_max=10.0, sigma_min=0.1)},
     {"steps": 5, "scheduler": EXPONENTIAL}),
    (node("SamplerCustomAdvanced", **CUSTOM), PARTS | {"23": node("ManualSigmas", sigmas="14.6, 3,.5, 0")},
     {"steps": 3, "scheduler": "14.6, 3, 0.5, 0"}),
    (node("SamplerCustomAdvanced", **CUSTOM), PARTS | {"23": node("AlignYourStepsScheduler", steps=9)},
     {"scheduler": None, "steps": 9}),
    (node("SamplerCustomAdvanced", **CUSTOM), PARTS | EVEN | {"22": node("SamplerDPMPP_2M_SDE", eta=0.5)},
     {"sampler_name": None}),
]  # fmt: skip


@pytest.mark.parametrize("sampler, others, differs", SAMPLER_NODES, ids=node_name)
def test_samplers_are_found_by_their_inputs(read, sampler, others, differs):
    graph = plain_graph() | {"3": sampler, **others}
    graph["10"] = node("KSampler", **SAMPLER | {"seed": 5}, **LINKS)  # whose result is not saved
    graph["11"] = node("PreviewImage", images=["12", 0])
    graph["12"] = node("VAEDecode", samples=["10", 0], vae=["4", 2])
    found = read(graph)
    values = {key: value for key, value in found.values.items() if key != "denoise"}
    expected = {**PLAIN, **SAMPLER, **differs}
    if levels := listed(values.get("scheduler")):
        values["scheduler"] = ", ".join(f"{level:.5g}" for level in levels)
    assert values == {key: value for key, value in expected.items() if key != "denoise" and value is not None}
    assert {key for key, value in expected.items() if value is None} == set(found.unread)
    if "ClownsharK" in sampler["class_type"]:  # which draws differently from KSampler
        assert "ClownsharKSampler_Beta's eta 0.5" in found.unused
    if "KSampler (Efficient)" in sampler["class_type"]:
        assert found.unused == ["another KSampler"]
    graph["3"]["class_type"] = graph["3"]["inputs"]["sampler_name"] = "Unheard"
    del graph["3"], graph["10"]
    with pytest.raises(ValueError, match="has no settings of a sampler; its nodes are .*SaveImage"):
        read(graph)


def test_broken_graphs(read):
    """Cycles and links to nowhere leave a setting out, with a report. Entries that are no nodes are ignored."""
    links = {"positive": ["20", 0], "negative": ["99", 0], "seed": ["nowhere", 0], "latent_image": ["3", 0]}
    graph = plain_graph(**links, cfg=[1, 2, 3])
    graph |= {"20": node("Reroute", x=["21", 0]), "21": node("Reroute", x=["20", 0])}
    graph |= {"30": "text", "31": {"class_type": "KSampler"}, "32": {"inputs": []}, "33": None}
    found = read(graph)
    assert set(found.values) == {"steps", "sampler_name", "scheduler", "denoise", "model"}
    assert {"no prompt was found", "no seed was found", "no width was found"} <= set(found.unused)
    for bad in (True, "NaN", float("nan"), float("inf"), "many", {}, [], "9" * 10_000):
        assert "steps" not in read(plain_graph(steps=bad)).values


def test_a_graph_of_megabytes(read):
    """Settings are found along 10,000 nodes that pass a thing on, beside as many that save nothing."""
    graph = plain_graph(positive=["r0", 0], latent_image=["l0", 0])
    count = 10_000
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
    graph["4"]["inputs"]["ckpt_name"] = "dreamshaper.safetensors"  # of an unknown family
    assert read(graph, "flux").family is None


def test_pictures_without_settings(tmp_path):
    for texts in ({}, {"prompt": "a fox"}, {"prompt": "{}"}, {"prompt": "[1]"}, {"parameters": "a fox"}):
        with pytest.raises(ValueError, match="^[^\n]*picture.png: has no settings[^\n]*$"):
            import_settings(picture(tmp_path / "picture.png", **texts))
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "text.png", tmp_path / "nothing.png"):
        with pytest.raises(ValueError, match="can't be read"):
            import_settings(path)


WEB = "a fox\nNegative prompt: ice\nSteps: 30, Sampler: {}CFG scale: 5, Seed: 4, Size: 64x96"
TEXTS = [  # the sampler's entry, the entries at the end, and what differs from euler over normal levels
    ("DPM++ 2M SDE Heun, ", "", {"sampler_name": "dpmpp_2m_sde_heun"}),
    ("DPM++ 2M SDE Heun Karras, ", "", {"sampler_name": "dpmpp_2m_sde_heun", "scheduler": "karras"}),
    ("DPM2 a Karras, ", "", {"sampler_name": "dpm_2_ancestral", "scheduler": "karras", "discard": True}),
    ("Euler, ", ", Discard penultimate sigma: True", {"discard": True}),
    ("euler_ancestral_beta, ", ", Version: ComfyUI", {"sampler_name": "euler_ancestral", "scheduler": "beta"}),
    ("dpmpp_2m_karras, ", ", Version: ComfyUI", {"sampler_name": "dpmpp_2m", "scheduler": "karras"}),
    ("dpm_2, Scheduler: simple, ", ", Version: ComfyUi", {"sampler_name": "dpm_2", "scheduler": "simple"}),
    ("DPM++ 2M, ", ", App: SD.Next, Sampler sigma: karras", {"sampler_name": "dpmpp_2m", "scheduler": "karras"}),
    ("DPM2, ", ", App: SD.Next, Scheduler: KDPM2DiscreteScheduler", {"sampler_name": "dpm_2"}),
    ("Euler, ", "\nTemplate: a {fox|cat}, Steps, CFG\nNegative Template: __ice__", {}),
    ("Euler, Schedule type: SGM Uniform, ", ", Denoising strength: 0.5, Hires steps: 2", {"scheduler": "sgm_uniform"}),
    ("Euler, Schedule type: Simple, ", ", Distilled CFG Scale: 3.5", {"scheduler": "simple", "guidance": 3.5}),
    ("Euler, Schedule type: Simple, ", ", Denoising strength: 0.5", {"scheduler": "simple", "denoise": 0.5}),
    ("Euler, ", ", Model: \"Anna's", {"model": "\"Anna's"}),
    (
        "DPM++ 2M SDE, Schedule type: Karras, ",  # the denoise below belongs to the second pass
        ', Model hash: 31e35c80fc, Model: "sdxl, a: b", Denoising strength: 0.4, Hires upscale: 2, Version: v1.10.1',
        {"sampler_name": "dpmpp_2m_sde", "scheduler": "karras", "model": "sdxl, a: b"},
    ),
]


@pytest.mark.parametrize("sampler, end, differs", TEXTS, ids=lambda value: str(value)[:40])
def test_texts_of_web_uis(tmp_path, sampler, end, differs):
    text = WEB.format(sampler).replace("a fox", "a fox <lora:fur:0.8> in snow,\n(sharp:1.2)") + end
    plain = {"prompt": "a fox in snow,\n(sharp:1.2)", "negative_prompt": "ice", "sampler_name": "euler"}
    plain |= {"scheduler": "normal", "steps": 30, "seed": 4, "cfg": 5.0, "width": 64, "height": 96}
    found = import_settings(picture(tmp_path / "a.png", parameters=text))
    assert found.values == plain | differs
    assert found.comfy == ("Version: Comfy" in end) and (found.family == "flux") == ("guidance" in differs)
    assert ("sdxl" in end) == (found.family == "sdxl") and found.unused[0] == "<lora:fur:0.8>"
    assert all(name in end for name in found.unused[1:]) and ("Hires" in end) == ("Hires" in str(found.unused))


def test_a_text_beside_a_graph_that_cannot_be_read(tmp_path):
    """The text is read where the graph has no known sampler or unread settings. A complete graph takes precedence."""
    other, unknown, text = plain_graph(), text_node("LLM", prompt="write!", seed=1), WEB.format("Euler, ")
    other["3"] = node("Draw", **LINKS)
    for graph, prompt in ((other, "a fox"), (unknown, "a fox"), (plain_graph(), "a bottle")):
        found = import_settings(picture(tmp_path / "a.png", prompt=graph, parameters=text))
        assert (found.values["prompt"], found.comfy, found.unread) == (prompt, True, {})


@pytest.mark.parametrize(
    "suffix, code", [(".jpg", "utf-16-be"), (".webp", "utf-16-le"), (".jpg", "ascii"), (".webp", "none")]
)
def test_exif(tmp_path, suffix, code):
    """UserComment, in JPEG and WebP, in either byte order."""
    text = WEB.format("Euler, ").replace("fox", "fox" if code in ("ascii", "none") else "狐")
    exif = Image.Exif()
    named = {"ascii": b"ASCII\0\0\0", "none": b""}.get(code, b"UNICODE\0")
    exif[0x8769] = {0x9286: named + text.encode("utf-8" if code == "none" else code)}
    Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}", exif=exif)
    assert import_settings(tmp_path / f"a{suffix}").values["prompt"] == text.partition("\n")[0]
    graph = Image.Exif()
    graph[0x010F] = "Prompt:" + json.dumps(plain_graph())  # as ComfyUI's nodes for WebP write it
    Image.new("RGB", (8, 8)).save(tmp_path / f"b{suffix}", exif=graph)
    assert import_settings(tmp_path / f"b{suffix}").values == PLAIN
