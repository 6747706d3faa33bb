"""Trains the two demo models on the drawings of `scenes.py` and writes them to `demo/sdxl` and `demo/flux`.

    python demo/train.py                     all stages, one after the other
    python demo/train.py --stages vae-flux   one stage; two stages can run in parallel in two processes
    python demo/train.py --stages recover    checkpoints from the saved models, for the stages named "more"

The stages are vae-sdxl, vae-flux (the autoencoders), sdxl, flux (the networks with their text encoders), distil (FLUX's
guidance), decoder-sdxl, decoder-flux (sharper decoders for the same latents); then the same with "-more", which
continue with other drawings, larger batches and another optimizer, best on a GPU; and save-sdxl, save-flux. Each stage
writes a checkpoint to `--work` every two minutes, and continues from it when started again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by torch: idle threads sleep, since stages run in parallel

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from scenes import caption, draw
from torch import nn
from training import Plan, Run, drawings, indices, load_average, pick, pixels, scene, tokenizers, write_whole
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

HERE = Path(__file__).resolve().parent
CAPTION_TOKENS = 32  # T5's; no caption is longer
UNSEEN = range(60_000, 60_096)  # scenes that no stage trains on, for the PSNR

PLAN = {
    "vae-sdxl": Plan(steps=3_000, batch=8, lr=1.5e-3),
    "vae-flux": Plan(steps=3_000, batch=8, lr=1.5e-3),
    "sdxl": Plan(steps=2_600, batch=32, lr=1e-3),
    "flux": Plan(steps=8_000, batch=16, lr=1e-3),
    "distil": Plan(steps=200, batch=24, lr=3e-4),
    "decoder-sdxl": Plan(steps=700, batch=8, lr=1e-3),
    "decoder-flux": Plan(steps=700, batch=8, lr=1e-3),
    "vae-sdxl-more": Plan(steps=3_000, batch=32, lr=2e-3),
    "vae-flux-more": Plan(steps=3_000, batch=32, lr=2e-3),
    "sdxl-more": Plan(steps=5_000, batch=64, lr=8e-4),
    "flux-more": Plan(steps=5_000, batch=64, lr=1e-3),
    "distil-more": Plan(steps=800, batch=64, lr=5e-4),
    "decoder-sdxl-more": Plan(steps=8_000, batch=32, lr=2e-3),
    "decoder-flux-more": Plan(steps=8_000, batch=32, lr=2e-3),
}
STAGES = (*PLAN, "save-sdxl", "save-flux", "recover")
# the stage whose checkpoint a stage begins with
NEEDS = {
    "vae-sdxl-more": ["decoder-sdxl"],
    "vae-flux-more": ["decoder-flux"],
    "sdxl-more": ["vae-sdxl-more", "sdxl"],
    "flux-more": ["vae-flux-more", "distil"],
    "distil-more": ["vae-flux-more", "flux-more"],
    "decoder-sdxl-more": ["vae-sdxl-more"],
    "decoder-flux-more": ["vae-flux-more"],
    "sdxl": ["vae-sdxl"],
    "flux": ["vae-flux"],
    "distil": ["vae-flux", "flux"],
    "decoder-sdxl": ["vae-sdxl"],
    "decoder-flux": ["vae-flux"],
    "save-sdxl": ["vae-sdxl", "sdxl", "decoder-sdxl"],
    "save-flux": ["vae-flux", "distil", "decoder-flux"],
}


# --- autoencoders ----------------------------------------------------------------------------------------------------


def make_vae(stage: str, **config: float) -> AutoencoderKL:
    flux = stage.startswith("vae-flux")
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),  # full resolution costs most, so the first level is narrow
        layers_per_block=1,
        latent_channels=16 if flux else 4,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=not flux,
        use_post_quant_conv=not flux,
        force_upcast=False,
        **config,
    )


def train_vae(stage: str, plan: Plan, work: Path, device: torch.device) -> None:
    """Encoder and decoder. In the stages named "more" the latents stay near those that the networks know."""
    pictures = drawings(work, indices(stage))
    vae = make_vae(stage)
    old_vae = None
    if stage.endswith("more"):
        before = stage.replace("vae", "decoder").removesuffix("-more")
        old_vae = load_average(work / f"{before}.pt", {"vae": vae}, device)["vae"]
        vae = copy.deepcopy(old_vae).requires_grad_(True)
    run = Run(stage, work, {"vae": vae}, device, plan)
    latent_channels = vae.config.latent_channels

    def loss_of(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        x = pixels(pictures[sorted(pick(stage, rng, run.batch))], device)
        with run.autocast():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn((run.batch, latent_channels, 16, 16), generator=generator).to(device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        loss = difference(y, x) + 2e-4 * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        if old_vae is not None:
            with torch.no_grad(), run.autocast():
                old = old_vae.encode(x).latent_dist.mean.float()
            loss = loss + 0.03 * (mean - old).pow(2).mean()
        return loss

    run.train(loss_of)
    sharpness(run)


def difference(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the pixels; of the differences of neighbours, for sharp edges; and of 8x8 blocks, for
    their colours. The squared error gives more weight to small missing parts such as eyes and stars."""
    error = y.float() - x
    edges = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
    return error.abs().mean() + edges + nn.functional.avg_pool2d(error, 8).abs().mean() + 2 * error.pow(2).mean()


@torch.no_grad()
def sharpness(run: Run) -> None:
    """Prints the PSNR of `UNSEEN` drawings after encoder and decoder."""
    vae = make_vae(run.name.replace("decoder", "vae"))
    nn.ModuleDict({"vae": vae}).load_state_dict(run.average)
    vae.to(run.device).eval()
    x = pixels(np.stack([np.asarray(draw(scene(i))) for i in UNSEEN]), run.device)
    y = torch.cat([vae.decode(z).sample for z in vae.encode(x).latent_dist.mean.split(16)]).clamp(-1, 1)
    psnr = -10 * ((y - x) / 2).pow(2).flatten(1).mean(1).log10()
    print(f"{run.name}: PSNR {psnr.mean():.2f} dB", flush=True)


def train_decoder(stage: str, plan: Plan, work: Path, device: torch.device) -> None:
    """More steps for the decoder alone, at half the cost. The latents that the networks know do not change."""
    vae_stage = stage.replace("decoder", "vae")
    mean, std = latents(vae_stage, work, device)
    pictures = drawings(work, indices(stage))
    vae = load_average(work / f"{vae_stage}.pt", {"vae": make_vae(vae_stage)}, device)["vae"]
    vae.decoder.requires_grad_(True)
    run = Run(stage, work, {"vae": vae}, device, plan)

    def loss_of(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        picked = sorted(pick(stage, rng, run.batch))
        noise = torch.randn((run.batch, *mean.shape[1:]), generator=generator)
        z = (mean[picked] + std[picked] * noise).to(device)
        with run.autocast():
            y = vae.decode(z).sample
        return difference(y, pixels(pictures[picked], device))

    run.train(loss_of)
    sharpness(run)


@torch.no_grad()
def latents(stage: str, work: Path, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior of a stage's pictures, of its autoencoder, float16."""
    path = work / f"{stage}-latents.pt"
    if not path.exists():
        pictures = drawings(work, indices(stage))
        vae = load_average(work / f"{stage}.pt", {"vae": make_vae(stage)}, device)["vae"]
        means, stds = [], []
        for i in range(0, len(pictures), 100):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                posterior = vae.encode(pixels(pictures[i : i + 100], device)).latent_dist
            means.append(posterior.mean.half().cpu())
            stds.append(posterior.std.half().cpu())
        write_whole(path, lambda temporary: torch.save((torch.cat(means), torch.cat(stds)), temporary))
    return torch.load(path, weights_only=True)


def latent_factors(stage: str, work: Path, device: torch.device) -> dict[str, float]:
    """The factors that give the VAE's latents unit variance, for its config."""
    path = work / f"{stage}-factors.json"
    if not path.exists():
        mean, std = latents(stage, work, device)
        total = mean.float() + std.float() * torch.randn(std.shape, generator=torch.Generator().manual_seed(0))
        shift = total.mean().item() if stage == "vae-flux" else 0.0
        factors = {"scaling_factor": round(1 / (total - shift).std().item(), 5)}
        if stage == "vae-flux":
            factors["shift_factor"] = round(shift, 5)
        path.write_text(json.dumps(factors))
    return json.loads(path.read_text())


# --- text encoders ---------------------------------------------------------------------------------------------------


def clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def ids(
    tokenizer: CLIPTokenizer | T5TokenizerFast, texts: list[str], length: int, device: torch.device
) -> torch.Tensor:
    encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids.to(device)


# --- SDXL ------------------------------------------------------------------------------------------------------------


def sdxl_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def make_sdxl(work: Path) -> dict[str, nn.Module]:
    clip, clip_2, _ = tokenizers(work)
    return {
        "text_encoder": CLIPTextModel(clip_config(clip, 64)),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(clip_2, 96)),
        "unet": UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 96, 96),
            layers_per_block=1,
            transformer_layers_per_block=(1, 1, 1),
            attention_head_dim=(2, 3, 3),
            cross_attention_dim=64 + 96,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96 + 6 * 32,
            use_linear_projection=True,
            norm_num_groups=16,
        ),
    }


def train_sdxl(stage: str, plan: Plan, work: Path, device: torch.device) -> None:
    mean, std = latents(stage.replace("sdxl", "vae-sdxl"), work, device)
    factors = latent_factors("vae-sdxl", work, device)
    clip, clip_2, _ = tokenizers(work)
    modules = make_sdxl(work)
    if stage == "sdxl-more":
        modules = load_average(work / "sdxl.pt", modules, device, trained=True)
    run = Run(stage, work, modules, device, plan)
    text_encoder, text_encoder_2, unet = (run.modules[name] for name in ("text_encoder", "text_encoder_2", "unet"))
    alphas_cumprod = sdxl_scheduler().alphas_cumprod

    def loss_of(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        picked = pick(stage, rng, run.batch)
        noise = torch.randn((3, run.batch, 4, 16, 16), generator=generator)
        x0 = (mean[picked] + std[picked] * noise[0]) * factors["scaling_factor"]
        t = torch.randint(0, 1000, (run.batch,), generator=generator)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        noised = a.sqrt() * x0 + (1 - a).sqrt() * noise[1]
        texts = [caption(scene(indices(stage)[i]), rng) for i in picked]
        # dropped prompts, in both forms that pipelines use: the empty text, and zeros as its embedding
        texts = ["" if rng.random() < 0.05 else text for text in texts]
        kept = torch.tensor([float(rng.random() >= 0.07) for _ in texts], device=device)
        # the micro-conditioning is usually the real one, else random, so that the network has seen all values
        size = [(128, 128, 0, 0, 128, 128)] * run.batch
        size = [s if rng.random() < 0.8 else tuple(rng.choice((0, 64, 128, 256, 512, 1024)) for _ in s) for s in size]
        with run.autocast():
            hidden = text_encoder(ids(clip, texts, 77, device), output_hidden_states=True).hidden_states[-2]
            encoded = text_encoder_2(ids(clip_2, texts, 77, device), output_hidden_states=True)
            embeds = torch.cat([hidden, encoded.hidden_states[-2]], dim=-1) * kept.view(-1, 1, 1)
            conditions = {
                "text_embeds": encoded.text_embeds * kept.view(-1, 1),
                "time_ids": torch.tensor(size, dtype=torch.float32, device=device),
            }
            epsilon = unet(noised.to(device), t.to(device), embeds, added_cond_kwargs=conditions).sample
        snr = a / (1 - a)
        weight = (snr.clamp(max=5) / snr).view(-1).to(device)  # min-SNR-5, Hang et al. 2023, eq. 8
        error = (epsilon.float() - noise[1].to(device)).pow(2).flatten(1).mean(1)
        return (weight * error).mean()

    run.train(loss_of)


# --- FLUX ------------------------------------------------------------------------------------------------------------


def make_flux(work: Path) -> dict[str, nn.Module]:
    clip, _, t5 = tokenizers(work)
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=t5.pad_token_id,
        eos_token_id=t5.eos_token_id,
    )
    return {
        "text_encoder": CLIPTextModel(clip_config(clip, 64)),
        "text_encoder_2": T5EncoderModel(t5_config),
        "transformer": FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=128,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    }


def image_ids(device: torch.device) -> torch.Tensor:
    return FluxPipeline._prepare_latent_image_ids(1, 8, 8, device, torch.float32)


def encode_flux(
    modules: dict[str, nn.Module], work_tokenizers: tuple, texts: list[str], length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    clip, _, t5 = work_tokenizers
    pooled = modules["text_encoder"](ids(clip, texts, 77, device)).pooler_output
    return modules["text_encoder_2"](ids(t5, texts, length, device))[0], pooled


def velocity(
    transformer: nn.Module,
    x: torch.Tensor,
    t: torch.Tensor,
    guidance: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    return transformer(
        hidden_states=x,
        timestep=t,
        guidance=guidance,
        encoder_hidden_states=text[0],
        pooled_projections=text[1],
        txt_ids=torch.zeros(text[0].shape[1], 3, device=x.device),
        img_ids=image_ids(x.device),
    ).sample


def flux_batch(
    run: Run,
    step: int,
    rng: random.Random,
    generator: torch.Generator,
    mean: torch.Tensor,
    std: torch.Tensor,
    factors: dict,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str], int]:
    """Packed noised latents, their noise - x0, t, captions and the number of T5 tokens."""
    # pipelines pad prompts to 512 tokens or a given number; batches like these cost more, so they are smaller
    length, batch = {15: (512, run.batch // 8), 7: (64, run.batch * 3 // 4)}.get(step % 16, (CAPTION_TOKENS, run.batch))
    picked = pick(run.name, rng, batch)
    noise = torch.randn((2, batch, 16, 16, 16), generator=generator)
    x0 = (mean[picked] + std[picked] * noise[0] - factors["shift_factor"]) * factors["scaling_factor"]
    x0, noise = (FluxPipeline._pack_latents(z, batch, 16, 16, 16).to(run.device) for z in (x0, noise[1]))
    t = torch.sigmoid(torch.randn(batch, generator=generator) + 0.2).to(run.device)
    noised = (1 - t.view(-1, 1, 1)) * x0 + t.view(-1, 1, 1) * noise
    texts = ["" if rng.random() < 0.1 else caption(scene(indices(run.name)[i]), rng) for i in picked]
    return noised, noise - x0, t, texts, length


def train_flux(stage: str, plan: Plan, work: Path, device: torch.device) -> None:
    """Flow matching with logit-normal times (Esser et al. 2024).

    In the first stage the guidance input has no meaning yet. The second stage continues with a distilled network, for
    which a guidance of 1 means none, and passes 1.
    """
    mean, std = latents(stage.replace("flux", "vae-flux"), work, device)
    factors = latent_factors("vae-flux", work, device)
    work_tokenizers = tokenizers(work)
    modules = make_flux(work)
    if stage == "flux-more":
        modules = load_average(work / "distil.pt", modules, device, trained=True)
    run = Run(stage, work, modules, device, plan)

    def loss_of(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        x, target, t, texts, length = flux_batch(run, step, rng, generator, mean, std, factors)
        with run.autocast():
            text = encode_flux(run.modules, work_tokenizers, texts, length, device)
            guidance = torch.ones_like(t) if stage == "flux-more" else random_guidance(rng, t)
            v = velocity(run.modules["transformer"], x, t, guidance, text)
        return (v.float() - target).pow(2).mean()

    run.train(loss_of)


def random_guidance(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    return torch.tensor([rng.uniform(1.0, 5.0) for _ in t], device=t.device)


def distil_flux(stage: str, plan: Plan, work: Path, device: torch.device) -> None:
    """Guidance distillation (Meng et al. 2023, section 3.1): one evaluation learns the teacher's guided velocity."""
    mean, std = latents(stage.replace("distil", "vae-flux"), work, device)
    factors = latent_factors("vae-flux", work, device)
    work_tokenizers = tokenizers(work)
    path = work / stage.replace("distil", "flux")
    teacher = load_average(path.with_suffix(".pt"), make_flux(work), device)
    student = load_average(path.with_suffix(".pt"), make_flux(work), device)
    student["transformer"].requires_grad_(True)  # the text encoders stay the teacher's
    run = Run(stage, work, student, device, plan)

    def loss_of(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        x, _, t, texts, length = flux_batch(run, step, rng, generator, mean, std, factors)
        guidance = random_guidance(rng, t)
        with run.autocast():
            with torch.no_grad():
                text = encode_flux(teacher, work_tokenizers, texts, length, device)
                empty = encode_flux(teacher, work_tokenizers, [""] * len(texts), length, device)
                one = torch.ones_like(t)
                guided = velocity(teacher["transformer"], x, t, one, text).float()
                unguided = velocity(teacher["transformer"], x, t, one, empty).float()
                target = unguided + guidance.view(-1, 1, 1) * (guided - unguided)
            v = velocity(run.modules["transformer"], x, t, guidance, text)
        return (v.float() - target).pow(2).mean()

    run.train(loss_of)


# --- saving ----------------------------------------------------------------------------------------------------------


def latest(work: Path, stage: str) -> Path:
    """The checkpoint of a stage, or of the stage that continued it."""
    more = work / f"{stage}-more.pt"
    return more if more.exists() else work / f"{stage}.pt"


def save(family: str, work: Path, out: Path) -> None:
    """Saves the pipeline in diffusers' layout, in float16, and replaces its folder as a whole."""
    clip, clip_2, t5 = tokenizers(work)
    cpu = torch.device("cpu")
    vae = make_vae(f"vae-{family}", **latent_factors(f"vae-{family}", work, cpu))
    load_average(latest(work, f"decoder-{family}"), {"vae": vae}, cpu)
    if family == "sdxl":
        pipe = StableDiffusionXLPipeline(
            vae=vae,
            tokenizer=clip,
            tokenizer_2=clip_2,
            scheduler=sdxl_scheduler(),
            **load_average(latest(work, "sdxl"), make_sdxl(work), cpu),
            add_watermarker=False,
        )
    else:
        pipe = FluxPipeline(
            vae=vae,
            tokenizer=clip,
            tokenizer_2=t5,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            **load_average(latest(work, "distil"), make_flux(work), cpu),
        )
    temporary = work / f"{family}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.to(dtype=torch.float16)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.float()  # transformers loads the saved dtype, diffusers float32: the dtypes have to agree
    pipe.save_pretrained(temporary, safe_serialization=True)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        for file in ("vocab.json", "merges.txt"):  # CLIP's, for transformers before version 5
            if not (family == "flux" and tokenizer == "tokenizer_2"):
                shutil.copy(work / "tokenizers" / tokenizer / file, temporary / tokenizer / file)
    shutil.rmtree(out / family, ignore_errors=True)
    shutil.move(temporary, out / family)
    size = sum(path.stat().st_size for path in (out / family).rglob("*") if path.is_file())
    print(f"{out / family}: {size / 1e6:.1f} MB")


def recover(work: Path, out: Path) -> None:
    """Writes checkpoints, tokenizers and factors from the saved pipelines. The stages named "more" continue from them.

    Both stages of an autoencoder get the same weights, since both stages have the same encoder.
    """
    sdxl = StableDiffusionXLPipeline.from_pretrained(out / "sdxl")
    flux = FluxPipeline.from_pretrained(out / "flux")
    for name, pipe, tokenizer_2 in (("sdxl", sdxl, "tokenizer_2"), ("flux", flux, "t5")):
        shutil.copytree(out / name / "tokenizer", work / "tokenizers" / "tokenizer", dirs_exist_ok=True)
        shutil.copytree(out / name / "tokenizer_2", work / "tokenizers" / tokenizer_2, dirs_exist_ok=True)
        config = pipe.vae.config
        keys = ("scaling_factor", "shift_factor") if name == "flux" else ("scaling_factor",)
        (work / f"vae-{name}-factors.json").write_text(json.dumps({key: config[key] for key in keys}))
        network = {"sdxl": "unet", "flux": "transformer"}[name]
        stages = {f"vae-{name}": ["vae"], f"decoder-{name}": ["vae"]}
        stages |= {{"sdxl": "sdxl", "flux": "distil"}[name]: ["text_encoder", "text_encoder_2", network]}
        for stage, parts in stages.items():
            average = nn.ModuleDict({part: getattr(pipe, part).float() for part in parts}).state_dict()
            torch.save({"average": average}, work / f"{stage}.pt")


TRAIN = {
    "vae": train_vae,
    "decoder": train_decoder,
    "sdxl": train_sdxl,
    "flux": train_flux,
    "distil": distil_flux,
}


def check_stages(stages: Sequence[str], work: Path) -> None:
    """Exits with a message if a stage lacks the result of another one, before hours are spent on earlier stages."""
    for i, stage in enumerate(stages):
        for needed in NEEDS.get(stage, []):
            if needed not in stages[:i] and not (work / f"{needed}.pt").exists():
                sys.exit(f"{work / needed}.pt is missing: run the stage {needed} before {stage}")


def usable_device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES[:-1], metavar="STAGE")
    parser.add_argument(
        "--work", type=Path, default=HERE / ".training", help="drawings, checkpoints (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where sdxl/ and flux/ go (default: %(default)s)")
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="of each stage, in place of its number of steps")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    check_stages(options.stages, options.work)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    options.work.mkdir(parents=True, exist_ok=True)
    device = options.device
    for stage in options.stages:
        if stage in PLAN:
            plan = PLAN[stage]._replace(minutes=options.minutes)
            TRAIN[stage.split("-")[0]](stage, plan, options.work, device)
        elif stage == "recover":
            recover(options.work, options.out)
        else:
            save(stage.removeprefix("save-"), options.work, options.out)


if __name__ == "__main__":
    main()
