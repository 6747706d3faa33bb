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
    """A LoRA of the network and of the first text encoder, in the layout of diffusers' training scripts."""
    flux = hasattr(pipe, "transformer")
    layers = {}
    for name in ("transformer" if flux else "unet", "text_encoder"):
        module = getattr(pipe, name)
        targets = ["q_proj", "v_proj"] if name == "text_encoder" else ["to_q", "to_v"]
        torch.manual_seed(2)
        module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
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
