"""Trains the two demo models on the drawings of `scenes.py` and writes them to `demo/sdxl` and `demo/flux`.

    python demo/train.py                     all of it, one stage after the other
    python demo/train.py --stages vae-flux   one stage; two of them can run side by side in two processes

The stages are vae-sdxl, vae-flux (the autoencoders), sdxl, flux (the networks with their text encoders), distil (FLUX's
guidance), decoder-sdxl, decoder-flux (sharper decoders for the same latents) and save. Each writes a checkpoint to
`--work` every two minutes, and goes on from there when it is started again.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

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
from scenes import Scene, caption, draw, random_scene
from tokenizers import Tokenizer, models, trainers
from torch import nn
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
PICTURES = 16_000
CAPTION_TOKENS = 32  # T5's; no caption is longer

# steps, batch, highest learning rate
PLAN = {
    "vae-sdxl": (3_000, 8, 1.5e-3),
    "vae-flux": (3_000, 8, 1.5e-3),
    "sdxl": (2_600, 32, 1e-3),
    "flux": (8_000, 16, 1e-3),
    "distil": (200, 24, 3e-4),
    "decoder-sdxl": (700, 8, 1e-3),
    "decoder-flux": (700, 8, 1e-3),
}
STAGES = (*PLAN, "save")
# whose checkpoints a stage begins with
NEEDS = {
    "sdxl": ["vae-sdxl"],
    "flux": ["vae-flux"],
    "distil": ["vae-flux", "flux"],
    "decoder-sdxl": ["vae-sdxl"],
    "decoder-flux": ["vae-flux"],
    "save": ["vae-sdxl", "vae-flux", "sdxl", "distil", "decoder-sdxl", "decoder-flux"],
}


# --- data ------------------------------------------------------------------------------------------------------------


def scene(index: int) -> Scene:
    return random_scene(random.Random(index))


def drawings(work: Path) -> np.ndarray:
    """All training pictures, uint8, (PICTURES, 128, 128, 3), drawn once and memory-mapped."""
    path = work / "drawings.npy"
    if not path.exists():
        pictures = np.empty((PICTURES, 128, 128, 3), dtype=np.uint8)
        start = time.time()
        for i in range(PICTURES):
            pictures[i] = np.asarray(draw(scene(i)))
            if i % 2000 == 0:
                print(f"drawing {i}/{PICTURES} {time.time() - start:.0f} s", flush=True)
        write_whole(path, lambda temporary: np.save(temporary.open("wb"), pictures))
    return np.load(path, mmap_mode="r")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary name and renames the result, so that `path` is complete or absent."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    temporary.replace(path)


def pixels(pictures: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (b, h, w, 3) to float (b, 3, h, w) in -1..1."""
    return torch.tensor(pictures, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenizers(work: Path) -> tuple[CLIPTokenizer, CLIPTokenizer, T5TokenizerFast]:
    """CLIP's two (they differ in the padding token) and T5's, with the vocabulary of the captions.

    Every printable ASCII character is in both vocabularies, so any English text can be written in them.
    """
    folder = work / "tokenizers"
    if not folder.exists():
        texts = [caption(scene(i % PICTURES), random.Random(-i)) for i in range(20_000)]
        temporary = work / f"tokenizers.{os.getpid()}.tmp"
        ascii_characters = [chr(c) for c in range(33, 127)]

        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.normalizer = CLIPTokenizer().backend_tokenizer.normalizer
        bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
        bpe.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=ascii_characters, end_of_word_suffix="</w>")
        )
        bpe.model.save(str(work), "bpe")
        merges = [tuple(line.split()) for line in (work / "bpe-merges.txt").read_text().splitlines() if line[0] != "#"]
        # "!" comes first: SDXL's second tokenizer pads with it, id 0
        letters = ["!", *(c for c in ascii_characters if c != "!")]
        words = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges)]
        vocab = {word: i for i, word in enumerate([*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"])}
        for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
            clip = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=padding, model_max_length=77)
            clip.save_pretrained(temporary / name)
            clip.backend_tokenizer.model.save(str(temporary / name))  # vocab.json, merges.txt

        # a piece for every word as it is written, scored by its frequency as a unigram model is, and the characters
        counts = Counter(piece for text in texts for piece in re.findall(r"\w+|[^\w\s]", text))
        total = sum(counts.values())
        pieces = [(f"▁{word}", math.log(count / total)) for word, count in counts.most_common()]
        pieces += [(c, -15.0) for c in ["▁", *ascii_characters]]
        scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *pieces]
        T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=512).save_pretrained(temporary / "t5")
        temporary.rename(folder)
    clip, clip_2 = (CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
    return clip, clip_2, T5TokenizerFast.from_pretrained(folder / "t5")


# --- training loop ---------------------------------------------------------------------------------------------------


class Run:
    """Modules in training: AdamW, cosine learning rate, a moving average of the weights, checkpoints."""

    def __init__(self, name: str, work: Path, modules: dict[str, nn.Module], device: torch.device):
        self.name, self.path, self.device = name, work / f"{name}.pt", device
        self.steps, self.batch, self.lr = PLAN[name]
        self.modules = nn.ModuleDict(modules).to(device).train()
        self.average = {key: value.detach().clone() for key, value in self.modules.state_dict().items()}
        self.step = 0
        parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.average, self.step = state["average"], state["step"]
            self.optimizer.load_state_dict(state["optimizer"])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def train(self, loss_of: Callable[[int, random.Random, torch.Generator], torch.Tensor]) -> None:
        """Calls `loss_of(step, rng, generator)` for every step left; both generators depend on the step alone."""
        try:
            self._loop(loss_of)
        except KeyboardInterrupt:
            self.save()
            sys.exit(f"{self.name}: stopped at step {self.step} of {self.steps}; the same command goes on from here")

    def _loop(self, loss_of: Callable[[int, random.Random, torch.Generator], torch.Tensor]) -> None:
        start, first, saved, recent = time.time(), self.step, time.time(), []
        while self.step < self.steps:
            generator = torch.Generator().manual_seed(self.step * 7919 + 17)
            warm = min(1.0, (self.step + 1) / min(150, self.steps / 10))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))
            loss = loss_of(self.step, random.Random(self.step), generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(0.998, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for key, value in self.modules.state_dict().items():
                    if value.is_floating_point():
                        self.average[key].lerp_(value, 1 - decay)
            recent.append(loss.item())
            if self.step % 50 == 0 or self.step == self.steps:
                pace = (time.time() - start) / (self.step - first)
                left = (self.steps - self.step) * pace / 60
                mean = sum(recent) / len(recent)
                print(
                    f"{self.name} {self.step}/{self.steps} loss {mean:.4f} {pace:.2f} s/step, {left:.0f} min left",
                    flush=True,
                )
                recent.clear()
            if time.time() - saved > 120 or self.step == self.steps:
                self.save()
                saved = time.time()

    def save(self) -> None:
        state = {
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        write_whole(self.path, lambda temporary: torch.save(state, temporary))


def load_average(path: Path, modules: dict[str, nn.Module], device: torch.device) -> dict[str, nn.Module]:
    """`modules` with the averaged weights of a finished stage, ready for use."""
    if not path.exists():
        sys.exit(f"{path} is missing: run the stage {path.stem} first")
    holder = nn.ModuleDict(modules)
    holder.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])
    holder.to(device).eval().requires_grad_(False)
    return modules


# --- autoencoders ----------------------------------------------------------------------------------------------------


def make_vae(stage: str, **config: float) -> AutoencoderKL:
    flux = stage == "vae-flux"
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),  # the cost sits at full resolution: a narrow first level
        layers_per_block=1,
        latent_channels=16 if flux else 4,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=not flux,
        use_post_quant_conv=not flux,
        force_upcast=False,
        **config,
    )


def train_vae(stage: str, work: Path, device: torch.device) -> None:
    pictures = drawings(work)
    vae = make_vae(stage)
    run = Run(stage, work, {"vae": vae}, device)
    latent_channels = vae.config.latent_channels

    def loss_of(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        x = pixels(pictures[sorted(rng.sample(range(PICTURES), run.batch))], device)
        with run.autocast():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn((run.batch, latent_channels, 16, 16), generator=generator).to(device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return difference(y, x) + 2e-4 * kl

    run.train(loss_of)


def difference(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the pixels, and of the differences of neighbours: edges, which it alone leaves soft."""
    error = y.float() - x
    return error.abs().mean() + (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2


def train_decoder(stage: str, work: Path, device: torch.device) -> None:
    """More steps for the decoder alone, at half the cost. The latents that the networks know stay what they are."""
    vae_stage = stage.replace("decoder", "vae")
    mean, std, _ = latents(vae_stage, work, device)
    pictures = drawings(work)
    vae = load_average(work / f"{vae_stage}.pt", {"vae": make_vae(vae_stage)}, device)["vae"]
    vae.decoder.requires_grad_(True)
    run = Run(stage, work, {"vae": vae}, device)

    def loss_of(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        picked = sorted(rng.sample(range(PICTURES), run.batch))
        noise = torch.randn((run.batch, *mean.shape[1:]), generator=generator)
        z = (mean[picked] + std[picked] * noise).to(device)
        with run.autocast():
            y = vae.decode(z).sample
        return difference(y, pixels(pictures[picked], device))

    run.train(loss_of)


@torch.no_grad()
def latents(stage: str, work: Path, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Mean and standard deviation of every picture's posterior, and the factors that make them unit variance."""
    path = work / f"{stage}-latents.pt"
    if not path.exists():
        pictures = drawings(work)
        vae = load_average(work / f"{stage}.pt", {"vae": make_vae(stage)}, device)["vae"]
        means, stds = [], []
        for i in range(0, PICTURES, 100):
            posterior = vae.encode(pixels(pictures[i : i + 100], device)).latent_dist
            means.append(posterior.mean.half().cpu())
            stds.append(posterior.std.half().cpu())
        write_whole(path, lambda temporary: torch.save((torch.cat(means), torch.cat(stds)), temporary))
    mean, std = torch.load(path, weights_only=True)
    total = mean.float() + std.float() * torch.randn(std.shape, generator=torch.Generator().manual_seed(0))
    shift = total.mean().item() if stage == "vae-flux" else 0.0
    factors = {"scaling_factor": round(1 / (total - shift).std().item(), 5)}
    if stage == "vae-flux":
        factors["shift_factor"] = round(shift, 5)
    return mean, std, factors


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


def train_sdxl(work: Path, device: torch.device) -> None:
    mean, std, factors = latents("vae-sdxl", work, device)
    clip, clip_2, _ = tokenizers(work)
    run = Run("sdxl", work, make_sdxl(work), device)
    text_encoder, text_encoder_2, unet = (run.modules[name] for name in ("text_encoder", "text_encoder_2", "unet"))
    alphas_cumprod = sdxl_scheduler().alphas_cumprod

    def loss_of(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        picked = rng.sample(range(PICTURES), run.batch)
        noise = torch.randn((3, run.batch, 4, 16, 16), generator=generator)
        x0 = (mean[picked] + std[picked] * noise[0]) * factors["scaling_factor"]
        t = torch.randint(0, 1000, (run.batch,), generator=generator)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        noised = a.sqrt() * x0 + (1 - a).sqrt() * noise[1]
        texts = [caption(scene(i), rng) for i in picked]
        # dropped prompts, both ways that a pipeline spells them: the empty text, and zeros in place of its embedding
        texts = ["" if rng.random() < 0.05 else text for text in texts]
        kept = torch.tensor([float(rng.random() >= 0.07) for _ in texts], device=device)
        # the micro-conditioning is the real one in most cases, anything in the others, so that no value surprises
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
    # the pipeline pads to 512 tokens, or what its caller says: some batches learn that, smaller, since they cost more
    length, batch = {15: (512, run.batch // 8), 7: (64, run.batch * 3 // 4)}.get(step % 16, (CAPTION_TOKENS, run.batch))
    picked = rng.sample(range(PICTURES), batch)
    noise = torch.randn((2, batch, 16, 16, 16), generator=generator)
    x0 = (mean[picked] + std[picked] * noise[0] - factors["shift_factor"]) * factors["scaling_factor"]
    x0, noise = (FluxPipeline._pack_latents(z, batch, 16, 16, 16).to(run.device) for z in (x0, noise[1]))
    t = torch.sigmoid(torch.randn(batch, generator=generator) + 0.2).to(run.device)
    noised = (1 - t.view(-1, 1, 1)) * x0 + t.view(-1, 1, 1) * noise
    texts = ["" if rng.random() < 0.1 else caption(scene(i), rng) for i in picked]
    return noised, noise - x0, t, texts, length


def train_flux(work: Path, device: torch.device) -> None:
    """Flow matching with logit-normal times (Esser et al. 2024). The guidance it is told means nothing yet."""
    mean, std, factors = latents("vae-flux", work, device)
    work_tokenizers = tokenizers(work)
    run = Run("flux", work, make_flux(work), device)

    def loss_of(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        x, target, t, texts, length = flux_batch(run, step, rng, generator, mean, std, factors)
        with run.autocast():
            text = encode_flux(run.modules, work_tokenizers, texts, length, device)
            v = velocity(run.modules["transformer"], x, t, random_guidance(rng, t), text)
        return (v.float() - target).pow(2).mean()

    run.train(loss_of)


def random_guidance(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    return torch.tensor([rng.uniform(1.0, 5.0) for _ in t], device=t.device)


def distil_flux(work: Path, device: torch.device) -> None:
    """Guidance distillation (Meng et al. 2023, section 3.1): one evaluation learns the teacher's guided velocity."""
    mean, std, factors = latents("vae-flux", work, device)
    work_tokenizers = tokenizers(work)
    teacher = load_average(work / "flux.pt", make_flux(work), device)
    student = load_average(work / "flux.pt", make_flux(work), device)
    student["transformer"].requires_grad_(True)  # the text encoders stay the teacher's
    run = Run("distil", work, student, device)

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


def save(work: Path, out: Path) -> None:
    """Both pipelines in diffusers' layout, float16, each folder replaced as a whole."""
    clip, clip_2, t5 = tokenizers(work)
    cpu = torch.device("cpu")
    vaes = {}
    for stage in ("vae-sdxl", "vae-flux"):
        vae = make_vae(stage, **latents(stage, work, cpu)[2])
        vaes[stage] = load_average(work / f"{stage.replace('vae', 'decoder')}.pt", {"vae": vae}, cpu)["vae"]
    sdxl = StableDiffusionXLPipeline(
        vae=vaes["vae-sdxl"],
        tokenizer=clip,
        tokenizer_2=clip_2,
        scheduler=sdxl_scheduler(),
        **load_average(work / "sdxl.pt", make_sdxl(work), cpu),
        add_watermarker=False,
    )
    flux = FluxPipeline(
        vae=vaes["vae-flux"],
        tokenizer=clip,
        tokenizer_2=t5,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        **load_average(work / "distil.pt", make_flux(work), cpu),
    )
    for name, pipe in (("sdxl", sdxl), ("flux", flux)):
        temporary = work / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        pipe.to(dtype=torch.float16)
        for encoder in (pipe.text_encoder, pipe.text_encoder_2):
            encoder.float()  # transformers loads what it finds, diffusers float32: they have to fit together
        pipe.save_pretrained(temporary, safe_serialization=True)
        for tokenizer in ("tokenizer", "tokenizer_2"):
            for file in ("vocab.json", "merges.txt"):  # CLIP's, for transformers before version 5
                source = work / "tokenizers" / tokenizer / file
                if not (name == "flux" and tokenizer == "tokenizer_2"):
                    shutil.copy(source, temporary / tokenizer / file)
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.move(temporary, out / name)
        size = sum(path.stat().st_size for path in (out / name).rglob("*") if path.is_file())
        print(f"{out / name}: {size / 1e6:.1f} MB")


def check_stages(stages: Sequence[str], work: Path) -> None:
    """Exits with a line if a stage lacks what another one makes, before hours of work are spent on those before it."""
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
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE")
    parser.add_argument(
        "--work", type=Path, default=HERE / ".training", help="drawings, checkpoints (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where sdxl/ and flux/ go (default: %(default)s)")
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    check_stages(options.stages, options.work)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.work.mkdir(parents=True, exist_ok=True)
    device = options.device
    for stage in options.stages:
        if stage.startswith("vae"):
            train_vae(stage, options.work, device)
        elif stage.startswith("decoder"):
            train_decoder(stage, options.work, device)
        elif stage == "sdxl":
            train_sdxl(options.work, device)
        elif stage == "flux":
            train_flux(options.work, device)
        elif stage == "distil":
            distil_flux(options.work, device)
        else:
            save(options.work, options.out)


if __name__ == "__main__":
    main()
