"""Modes that save memory or time: each draws what the pipeline draws without it, or what the parent draws with it."""

from __future__ import annotations

import copy
import functools
import os

import conftest
import pytest
import torch
from conftest import CHILDREN, FAMILIES, PROMPT, fail, load, network, parent_of, relative
from diffusers import FluxPipeline
from diffusers.hooks import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.utils import torch_utils
from pretend_mps import PretendMps, placed

from flux_comfy_pipeline import FluxComfyPipeline, sampler_names

CLOSE = 1e-5  # float32 rounding; see test_side_by_side.py
draw = functools.partial(conftest.draw, output_type="pt")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


LEAVES = {"offload_type": "leaf_level"}
BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
OFFLOAD = {
    "model": lambda pipe, device, folder: pipe.enable_model_cpu_offload(device=device),
    "group of leaves": lambda pipe, device, folder: pipe.enable_group_offload(device, **LEAVES),
    "group of blocks": lambda pipe, device, folder: pipe.enable_group_offload(device, **BLOCKS),
    # one network: diffusers gives the files of two components the same names
    "group, to the disk": lambda pipe, device, folder: network(pipe.to(device)).enable_group_offload(
        device, **LEAVES, offload_to_disk_path=str(folder)
    ),
    "sequential": lambda pipe, device, folder: pipe.enable_sequential_cpu_offload(device=device),
}
PLACES = [("cpu", mode) for mode in OFFLOAD if mode != "sequential"]
PLACES += [pytest.param("cuda", mode, marks=NEEDS_CUDA) for mode in ("model", "sequential", "group of leaves")]


@FAMILIES
@pytest.mark.parametrize("device, mode", PLACES)
def test_offload(name, device, mode, tmp_path):
    """With the hooks in place, twice, and again after an exception in the middle of a run."""
    pipe = load(CHILDREN[name], name)
    expected, close = draw(pipe, name), CLOSE if device == "cpu" else 1e-3
    if device == "cuda":
        expected = draw(copy.deepcopy(pipe).to(device), name).cpu()
    OFFLOAD[mode](pipe, torch.device(device), tmp_path)
    assert relative(draw(pipe, name).cpu(), expected) < close
    with pytest.raises(ZeroDivisionError):
        draw(pipe, name, callback_on_step_end=fail)
    assert relative(draw(pipe, name).cpu(), expected) < close
    assert mode == "sequential" or network(pipe).device.type == "cpu"  # it went back


@FAMILIES
@pytest.mark.skipif(not hasattr(torch_utils, "get_module_execution_device"), reason="diffusers before 0.42")
def test_vae_on_another_device(name, request):
    """Placed there by hand. The meta device is another one that every machine has."""
    pipe = request.getfixturevalue(name)
    pipe = type(pipe)(**{**pipe.components, "vae": copy.deepcopy(pipe.vae).to("meta")})
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "output_type": "pt", "height": 64, "width": 64}
    assert pipe(PROMPT, **call).images.device.type == "meta"
    assert parent_of(pipe, name)(PROMPT, **call).images.device.type == "meta"


@FAMILIES
def test_vae_slicing_and_tiling(name):
    pipe = load(CHILDREN[name], name)
    batch = {"num_images_per_prompt": 2, "num_inference_steps": 1}
    expected = draw(pipe, name, **batch)
    pipe.vae.enable_slicing()
    assert relative(draw(pipe, name, **batch), expected) < CLOSE
    pipe.vae.disable_slicing()
    pipe.vae.enable_tiling()
    large = {"height": 192, "width": 256, "num_inference_steps": 1}  # more than a tile, 128x128
    tiled = draw(pipe, name, **large)
    assert relative(tiled, draw(parent_of(pipe, name), name, **large)) < CLOSE
    pipe.vae.disable_tiling()
    assert relative(draw(pipe, name, **large), tiled) > CLOSE


NETWORK_MODES = {
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(),
    "fused projections": lambda pipe: network(pipe).fuse_qkv_projections(),
    "native attention": lambda pipe: network(pipe).set_attention_backend("native"),
    "channels last": lambda pipe: network(pipe).to(memory_format=torch.channels_last),
    # the network's dtype is the one that it computes in
    "layerwise casting": lambda pipe: network(pipe).enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2),  # Si et al. 2023
    "a VAE's mean": lambda pipe: pipe.vae.register_to_config(latents_mean=[0.5, 0, -0.5, 0], latents_std=[0.9] * 4),
}
CHANGING, ON_BOTH = ("layerwise casting", "FreeU", "a VAE's mean"), [*NETWORK_MODES][:-2]


@pytest.mark.parametrize("name, mode", [("sdxl", m) for m in NETWORK_MODES] + [("flux", m) for m in ON_BOTH])
def test_modes_of_the_network(name, mode):
    """What the parent draws with the same network; three modes change the picture."""
    pipe = load(CHILDREN[name], name)
    plain = draw(pipe, name)
    NETWORK_MODES[mode](pipe)
    drawn = draw(pipe, name)
    assert relative(drawn, draw(parent_of(pipe, name), name)) < CLOSE
    assert (relative(drawn, plain) < CLOSE) == (mode not in CHANGING)


SKIPPED = {"spatial_attention_block_skip_range": 2}
CACHES = {
    "block": lambda pipe: FirstBlockCacheConfig(threshold=0.5),
    "broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        **SKIPPED,
        spatial_attention_timestep_skip_range=(100, 990),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: FasterCacheConfig(
        **SKIPPED,
        spatial_attention_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}


@pytest.mark.parametrize("config", CACHES.values(), ids=CACHES)
def test_caching(config):
    """Hooks that skip blocks: those that a step skips are those that it skips in the parent, in true CFG too.

    They keep state from step to step, which is gone after a run, and after one that failed.
    """
    call = {"num_inference_steps": 6, "negative_prompt": "snow", "true_cfg_scale": 2.0}
    pipe, parent = load(FluxComfyPipeline, "flux"), load(FluxPipeline, "flux")
    plain = draw(load(FluxComfyPipeline, "flux"), "flux", **call)
    for one in (pipe, parent):  # before their first call: diffusers 0.40 knows no other order
        one.transformer.enable_cache(config(one))
    cached = draw(pipe, "flux", **call)
    assert relative(cached, plain) > 10 * CLOSE  # it did skip
    assert relative(cached, draw(parent, "flux", **call)) < CLOSE
    with pytest.raises(ZeroDivisionError):
        draw(pipe, "flux", callback_on_step_end=fail, **call)
    assert draw(pipe, "flux", **call).equal(cached)
    pipe.transformer.disable_cache()
    assert draw(pipe, "flux", **call).equal(plain)


def draw_compiled(pipe, name, **how):
    """With `fullgraph`, and no recompilation from step to step, from sampler to sampler, or from call to call."""
    samplers = ["euler", "heun", "dpmpp_2m_sde"]
    expected = {sampler: draw(pipe, name, sampler=sampler) for sampler in samplers}
    torch._dynamo.reset()
    network(pipe).compile(fullgraph=True, **how)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sampler in samplers:
            call = {"sampler": sampler, "callback_on_step_end": lambda *_: {}}
            assert relative(draw(pipe, name, **call), expected[sampler]) < CLOSE
    torch._dynamo.reset()


@FAMILIES
def test_compiled_network_is_compiled_once(name):
    """The backend keeps the graph as it is: what is compiled is decided before it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    draw_compiled(load(CHILDREN[name], name), name, backend=backend)
    assert len(graphs) == 1


@pytest.mark.skipif("SLOW_TESTS" not in os.environ, reason="compiles for minutes: set SLOW_TESTS=1")
@FAMILIES
def test_inductor(name):
    """torch.compile as people call it, with code for this machine."""
    draw_compiled(load(CHILDREN[name], name), name)


@FAMILIES
def test_no_float64_on_the_device(name, monkeypatch):
    """Every sampler on a stand-in for Apple's GPU, which has none: the CPU's latents.

    After the first sampler a line takes the network's place, since what a network does there is not the pipelines'.
    """
    pipe = load(CHILDREN[name], name)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    names = names if name == "sdxl" else names[::2]
    embeds = dict(zip(names, pipe.encode_prompt(PROMPT)))
    with PretendMps():
        there = type(pipe)(**{key: placed(copy.deepcopy(one)) for key, one in pipe.components.items()})
        for sampler in sampler_names():
            call = {"sampler": sampler, "output_type": "latent", "prompt": None}
            expected = conftest.draw(pipe, name, **call, **embeds)
            found = conftest.draw(there, name, **call, **{key: placed(one.detach()) for key, one in embeds.items()})
            assert found.device.type == "mps" and relative(found.cpu(), expected) < CLOSE, sampler
            for one in (pipe, there):
                half = lambda *args, hidden_states=None, **_: ((args[0] if args else hidden_states) * 0.5,)  # noqa: E731
                monkeypatch.setattr(network(one), "forward", half)
