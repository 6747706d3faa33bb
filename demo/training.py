"""What every stage of `train.py` needs: the drawings and their captions, the tokenizers, and the training loop."""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scenes import Scene, caption, draw, random_scene
from tokenizers import Tokenizer, models, trainers
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast

PICTURES = 16_000
MORE_PICTURES = 32_000  # other pictures, for the stages named "more"
# the parts that were drawn worst before the stages named "more": how much more often these stages use them
WEIGHTS = {"robot": 2.0, "cat": 2.0, "rocket": 1.5, "sailboat": 1.3, "space": 1.3, "snow": 1.3, "city": 1.3}


def scene(index: int) -> Scene:
    return random_scene(random.Random(index))


def indices(stage: str) -> range:
    """The scenes of a stage. The stages named "more" have other scenes."""
    return range(PICTURES, PICTURES + MORE_PICTURES) if stage.endswith("more") else range(PICTURES)


@functools.cache
def cumulative_weights(indices: range) -> list[float]:
    scenes = map(scene, indices)
    return list(itertools.accumulate(WEIGHTS.get(s.subject, 1.0) * WEIGHTS.get(s.place, 1.0) for s in scenes))


def pick(stage: str, rng: random.Random, count: int) -> list[int]:
    """Positions of scenes in `indices(stage)`, for a batch."""
    chosen = range(len(indices(stage)))
    if stage.endswith("more"):
        return rng.choices(chosen, cum_weights=cumulative_weights(indices(stage)), k=count)
    return rng.sample(chosen, count)


def drawing(index: int) -> np.ndarray:
    return np.asarray(draw(scene(index)))


def drawings(work: Path, indices: range) -> np.ndarray:
    """The pictures of these scenes, uint8, (len(indices), 128, 128, 3), drawn once and memory-mapped."""
    path = work / f"drawings-{indices.start}.npy"
    if not path.exists():
        pictures = np.empty((len(indices), 128, 128, 3), dtype=np.uint8)
        with multiprocessing.Pool() as pool:
            for i, picture in enumerate(pool.imap(drawing, indices, chunksize=100)):
                pictures[i] = picture
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


class Plan(NamedTuple):
    """How long a stage trains, in `steps` or, where they are given, in `minutes`, and its highest learning rate."""

    steps: int
    batch: int
    lr: float
    minutes: float | None = None


class Run:
    """Modules in training: the optimizers, their learning rate, a moving average of the weights, checkpoints.

    AdamW; in the stages named "more" Muon (Jordan et al. 2024) for the matrices and the convolutions inside the blocks.
    """

    def __init__(
        self,
        name: str,
        work: Path,
        modules: dict[str, nn.Module],
        device: torch.device,
        plan: Plan,
    ):
        self.name, self.path, self.device = name, work / f"{name}.pt", device
        self.steps, self.batch, self.lr, self.minutes = plan
        self.modules = nn.ModuleDict(modules).to(device).train()
        self.average = {key: value.detach().clone() for key, value in self.modules.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self.more = name.endswith("more")
        trained = [(key, p) for key, p in self.modules.named_parameters() if p.requires_grad]
        blocks = re.compile(r"(transformer|down|mid|up)_block") if self.more else re.compile("$^")
        self.matrices = [p for key, p in trained if p.ndim > 1 and blocks.search(key)]
        others = [p for key, p in trained if not (p.ndim > 1 and blocks.search(key))]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        ]
        self.views = [p.detach().flatten(1) for p in self.matrices]  # Muon takes two dimensions; the memory is the same
        if self.matrices:
            muon = torch.optim.Muon(self.views, lr=self.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def train(self, loss_of: Callable[[int, random.Random, torch.Generator], torch.Tensor]) -> None:
        """Calls `loss_of(step, rng, generator)` for every step left; both generators depend on the step alone."""
        try:
            self._loop(loss_of)
        except KeyboardInterrupt:
            self.save()
            sys.exit(f"{self.name}: stopped at step {self.step} of {self.steps}; the same command continues from here")

    def _loop(self, loss_of: Callable[[int, random.Random, torch.Generator], torch.Tensor]) -> None:
        start, first, before, saved, recent = time.time(), self.step, self.seconds, time.time(), []
        while self.progress() < 1:
            generator = torch.Generator().manual_seed(self.step * 7919 + 17)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate()
            loss = loss_of(self.step, random.Random(self.step), generator)
            self.modules.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            for p, view in zip(self.matrices, self.views):
                view.grad = p.grad.flatten(1)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            decay = min(0.999 if self.more else 0.998, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for key, value in self.modules.state_dict().items():
                    if value.is_floating_point():
                        self.average[key].lerp_(value, 1 - decay)
            recent.append(loss.detach())
            self.seconds = before + time.time() - start
            if self.step % 50 == 0 or self.progress() >= 1:
                pace = (time.time() - start) / (self.step - first)
                mean = torch.stack(recent).mean()
                print(f"{self.name} {self.step}/{self.steps} loss {mean:.4f} {pace:.3f} s/step", flush=True)
                recent.clear()
            if time.time() - saved > 120:
                self.save()
                saved = time.time()
        self.save()

    def progress(self) -> float:
        """The completed share of the stage, 0..1."""
        return self.seconds / 60 / self.minutes if self.minutes else self.step / self.steps

    def rate(self) -> float:
        """The learning rate: a short rise, then a cosine. In the stages named "more": constant, then linear to zero, so
        that the number of steps can be chosen during training."""
        warm = min(1.0, (self.step + 1) / min(150, self.steps / 10))
        if self.more:
            return self.lr * warm * min(1.0, (1 - self.progress()) / 0.3)
        return self.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress())))

    def save(self) -> None:
        state = {
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        write_whole(self.path, lambda temporary: torch.save(state, temporary))


def load_average(
    path: Path, modules: dict[str, nn.Module], device: torch.device, trained: bool = False
) -> dict[str, nn.Module]:
    """`modules` with the averaged weights of a finished stage, ready for use, or to be `trained` further."""
    if not path.exists():
        sys.exit(f"{path} is missing: run the stage {path.stem} first")
    holder = nn.ModuleDict(modules)
    holder.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])
    holder.to(device).eval().requires_grad_(trained)
    return modules
