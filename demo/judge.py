"""Classifies a picture's subject, place, palette and tone: a small network that is trained only on drawings."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from scenes import PALETTES, PLACES, SUBJECTS, TONES, Scene, draw, random_scene
from torch import nn

PARTS = {"subject": list(SUBJECTS), "place": list(PLACES), "palette": list(PALETTES), "tone": list(TONES)}
Judge = Callable[[Sequence[Image.Image]], torch.Tensor]


def labels(scene: Scene) -> list[int]:
    """The positions of a scene's parts in `PARTS`."""
    return [names.index(getattr(scene, part)) for part, names in PARTS.items()]


def _pixels(image: Image.Image) -> torch.Tensor:
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(small).permute(2, 0, 1) / 127.5 - 1


def train_judge(count: int = 5000, steps: int = 700) -> tuple[Judge, torch.Tensor]:
    """The judge, and for each part how often it is right for 500 unseen drawings.

    Half of its training drawings are blurred, so that sharpness is no cue. The judge maps pictures to positions in
    `PARTS`, shape (pictures, 4).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _train(count, steps)


def _train(count: int, steps: int) -> tuple[Judge, torch.Tensor]:
    rng = random.Random(10**6)  # the seeds of the models' own drawings are below 10**5
    scenes = [random_scene(rng) for _ in range(count + 500)]
    blur = [ImageFilter.GaussianBlur(rng.choice((0, 0, 0.7, 1.5))) for _ in scenes]
    x = torch.stack([_pixels(draw(scene).filter(b)) for scene, b in zip(scenes, blur)])
    y = torch.tensor([labels(scene) for scene in scenes])
    sizes = [len(names) for names in PARTS.values()]

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    model = nn.Sequential(
        *block(3, 16), *block(16, 32), *block(32, 64), *block(64, 64), nn.Flatten(), nn.Linear(1024, sum(sizes))
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        picked = torch.randint(count, (64,))
        logits = model(x[picked] + 0.05 * torch.randn(64, 3, 64, 64)).split(sizes, dim=1)
        loss = sum(nn.functional.cross_entropy(part, y[picked, i]) for i, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()

    @torch.no_grad()
    def classify(batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.argmax(1) for part in model(batch).split(sizes, dim=1)], dim=1)

    accuracy = (classify(x[count:]) == y[count:]).float().mean(0)
    return lambda images: classify(torch.stack([_pixels(image) for image in images])), accuracy
