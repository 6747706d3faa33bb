"""What people add to a pipeline, made small and random: IP-adapters and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

IMAGE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
IMAGE_DIM = 32  # of an image embedding


def image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**size, image_size=32, patch_size=8, projection_dim=IMAGE_DIM)
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
    image_proj = {"proj.weight": random(width * tokens, IMAGE_DIM), "proj.bias": random(width * tokens)}
    image_proj |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    if flux:
        widths = {i: network.inner_dim for i in range(len(network.transformer_blocks))}
    else:
        names = [name.removesuffix(".processor") for name in network.attn_processors if "attn2" in name]
        widths = {2 * i + 1: network.get_submodule(name).inner_dim for i, name in enumerate(names)}
    layers = {}
    for i, inner in widths.items():
        for name in ("to_k_ip", "to_v_ip"):
            layers[f"{i}.{name}.weight"] = random(inner, width)
            if flux:
                layers[f"{i}.{name}.bias"] = random(inner)
    return {"image_proj": image_proj, "ip_adapter": layers}


def with_ip_adapter(pipe: Any) -> Any:
    """Loads the adapter as a user does, but for the image encoder, which a state dict can't name."""
    pipe.register_modules(image_encoder=image_encoder(), feature_extractor=feature_extractor())
    flux = hasattr(pipe, "transformer")
    options = {} if flux else {"subfolder": ""}
    pipe.load_ip_adapter(ip_adapter(pipe.transformer if flux else pipe.unet), weight_name="", **options)
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
