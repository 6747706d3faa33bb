"""What people add to a pipeline, made small and random: IP-adapters, LoRA, textual inversions, other networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

IMAGE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
IMAGE_DIM = 32  # of an image embedding


def image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=IMAGE_DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def feature_extractor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size=32, crop_size=32)


def ip_adapter(network: torch.nn.Module, tokens: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """An IP-adapter's weights for a U-Net or a FLUX transformer, strong enough to be seen."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    flux = hasattr(network.config, "joint_attention_dim")
    width = network.config.joint_attention_dim if flux else network.config.cross_attention_dim
    image_proj = {
        "proj.weight": random(width * tokens, IMAGE_DIM),
        "proj.bias": random(width * tokens),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    layers = {}
    if flux:
        for i in range(len(network.transformer_blocks)):
            for name in ("to_k_ip", "to_v_ip"):
                layers[f"{i}.{name}.weight"] = random(network.inner_dim, width)
                layers[f"{i}.{name}.bias"] = random(network.inner_dim)
    else:
        names = [name for name in network.attn_processors if name.endswith("attn2.processor")]
        for i, name in enumerate(names):
            attention = network.get_submodule(name.removesuffix(".processor"))
            for key in ("to_k_ip", "to_v_ip"):
                layers[f"{2 * i + 1}.{key}.weight"] = random(attention.inner_dim, width)
    return {"image_proj": image_proj, "ip_adapter": layers}


def with_ip_adapter(pipe: Any) -> Any:
    """Loads the adapter as a user does, but for the image encoder, which a state dict can't name."""
    pipe.register_modules(image_encoder=image_encoder(), feature_extractor=feature_extractor())
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    if hasattr(pipe, "transformer"):
        pipe.load_ip_adapter(ip_adapter(network), weight_name="")
    else:
        pipe.load_ip_adapter(ip_adapter(network), subfolder="", weight_name="")
    pipe.set_ip_adapter_scale(1.0)
    return pipe


def lora_file(pipe: Any, folder: Path, rank: int = 2) -> Path:
    """A LoRA of the network and, where transformers takes this peft, of the first text encoder."""
    flux = hasattr(pipe, "transformer")
    layers = {}
    for name in ("transformer" if flux else "unet", "text_encoder"):
        module = getattr(pipe, name)
        targets = ["q_proj", "v_proj"] if name == "text_encoder" else ["to_q", "to_v"]
        torch.manual_seed(2)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
        try:
            module.add_adapter(config)
        except ValueError as error:  # transformers 5.24 asks for a peft that is not released yet
            if "version of PEFT" not in str(error):
                raise
            continue
        weights = get_peft_model_state_dict(module, adapter_name="default")
        module.delete_adapter("default") if hasattr(module, "delete_adapter") else module.unload_lora()
        layers[f"{name}_lora_layers"] = {key: value.contiguous() for key, value in weights.items()}
    type(pipe).save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def textual_inversion_file(pipe: Any, folder: Path) -> Path:
    """An embedding of two vectors for both of SDXL's text encoders, in the layout of kohya's trainer."""
    generator = torch.Generator().manual_seed(3)
    widths = (pipe.text_encoder.config.hidden_size, pipe.text_encoder_2.config.hidden_size)
    path = folder / "style.safetensors"
    save_file(
        {key: torch.randn(2, width, generator=generator) for key, width in zip(("clip_l", "clip_g"), widths)}, path
    )
    return path


# --- the original layouts, in one file -------------------------------------------------------------------------------
# What diffusers' from_single_file undoes, written here from the original repositories' names.


def _unet_name(name: str, layers: int, up_with_attention: set[str]) -> str:
    """The name of a U-Net's weight in the original SDXL checkpoint."""
    part, _, rest = name.partition(".")
    plain = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    module, _, kind = name.rpartition(".")
    if module in plain:
        return f"{plain[module]}.{kind}"
    if part == "mid_block":
        list_name, i, rest = rest.split(".", 2)
        place = f"middle_block.{1 if list_name == 'attentions' else 2 * int(i)}"
    else:
        block, list_name, i, rest = rest.split(".", 3)
        first = 1 if part == "down_blocks" else 0
        place = f"{'input' if part == 'down_blocks' else 'output'}_blocks."
        if list_name == "downsamplers":
            return f"{place}{first + int(block) * (layers + 1) + layers}.0.op.{rest.removeprefix('conv.')}"
        if list_name == "upsamplers":
            slot = 2 if block in up_with_attention else 1
            return f"{place}{int(block) * (layers + 1) + layers}.{slot}.{rest}"
        place += f"{first + int(block) * (layers + 1) + int(i)}.{1 if list_name == 'attentions' else 0}"
    if list_name == "resnets":
        for ours, original in {
            "norm1": "in_layers.0",
            "conv1": "in_layers.2",
            "time_emb_proj": "emb_layers.1",
            "norm2": "out_layers.0",
            "conv2": "out_layers.3",
            "conv_shortcut": "skip_connection",
        }.items():
            rest = rest.replace(ours, original)
    return f"{place}.{rest}"


def _vae_name(name: str, blocks: int) -> str:
    """The name of an autoencoder's weight in the original checkpoints of SDXL and FLUX."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, original in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(ours, original)
    for i in range(blocks):
        name = name.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
        name = name.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
        name = name.replace(f"up_blocks.{i}.upsamplers.0", f"up.{blocks - 1 - i}.upsample")
        name = name.replace(f"up_blocks.{i}.resnets", f"up.{blocks - 1 - i}.block")
    return name


def _open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SDXL's second text encoder under OpenCLIP's names: q, k and v in one matrix, the projection transposed."""
    original = {}
    for name, value in weights.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            original["text_projection"] = value.T
        elif name.startswith("encoder.layers."):
            layer, rest = name.removeprefix("encoder.layers.").split(".", 1)
            place = f"transformer.resblocks.{layer}"
            if rest.startswith("self_attn.q_proj"):
                kind = rest.rpartition(".")[2]
                prefix = name.removesuffix(f"q_proj.{kind}")
                parts = [value, *(weights[f"text_model.{prefix}{k}_proj.{kind}"] for k in "kv")]
                original[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
            elif "self_attn.k_proj" not in rest and "self_attn.v_proj" not in rest:
                rest = rest.replace("self_attn", "attn").replace("layer_norm", "ln_")
                original[f"{place}.{rest.replace('fc1', 'c_fc').replace('fc2', 'c_proj')}"] = value
        else:
            name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
            name = name.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
            original[name] = value
    return original


def single_file(pipe: Any, path: Path) -> Path:
    """An SDXL pipeline in the one-file layout of the original repository."""
    unet, vae = pipe.unet, pipe.vae
    up = {str(i) for i, block in enumerate(unet.up_blocks) if getattr(block, "attentions", None)}
    weights = {
        f"model.diffusion_model.{_unet_name(name, unet.config.layers_per_block, up)}": value
        for name, value in unet.state_dict().items()
    }
    for name, value in vae.state_dict().items():
        value = value[..., None, None] if ".attentions." in name and value.ndim == 2 else value  # a 1x1 convolution
        weights[f"first_stage_model.{_vae_name(name, len(vae.config.block_out_channels))}"] = value
    for name, value in pipe.text_encoder.state_dict().items():
        weights[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    for name, value in _open_clip(pipe.text_encoder_2.state_dict()).items():
        weights[f"conditioner.embedders.1.model.{name}"] = value
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return path


def _flux_name(name: str) -> str:
    """The name of a FLUX transformer's weight in the original checkpoints, but for those that are joined there."""
    for ours, original in {
        "single_transformer_blocks": "single_blocks",
        "transformer_blocks": "double_blocks",
        "norm1_context.linear": "txt_mod.lin",
        "norm1.linear": "img_mod.lin",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "norm.linear": "modulation.lin",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
        "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "time_text_embed.timestep_embedder.linear_": "time_in.",
        "time_text_embed.guidance_embedder.linear_": "guidance_in.",
        "time_text_embed.text_embedder.linear_": "vector_in.",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
    }.items():
        name = name.replace(ours, original)
    name = name.replace("_in.1.", "_in.in_layer.").replace("_in.2.", "_in.out_layer.")
    if name.startswith("single_blocks"):
        return name.replace("img_attn.norm", "norm").replace("proj_out", "linear2")
    return name.replace("proj_out", "final_layer.linear")


def flux_single_file(transformer: torch.nn.Module, path: Path) -> Path:
    """A FLUX transformer in the one-file layout of the original repository."""
    joined = {  # one matrix there for these, in this order
        "attn.to_q": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.add_q_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    places = {"attn.to_q": "img_attn.qkv", "attn.add_q_proj": "txt_attn.qkv"}
    ours, original = transformer.state_dict(), dict[str, torch.Tensor]()
    for name, value in ours.items():
        stem, _, kind = name.rpartition(".")
        block, part = ".".join(stem.split(".")[:2]), ".".join(stem.split(".")[2:])
        if any(part in others[1:] for others in joined.values()) or part == "proj_mlp":
            continue
        if part in joined:
            single = block.startswith("single")
            parts = joined[part] + (("proj_mlp",) if single else ())
            value = torch.cat([ours[f"{block}.{one}.{kind}"] for one in parts])
            name = f"{block}.{'linear1' if single else places[part]}.{kind}"
        elif stem == "norm_out.linear":
            value = torch.cat(value.chunk(2)[::-1])  # shift before scale
        original[_flux_name(name)] = value.contiguous()
    save_file(original, path)
    return path
