"""The demo models draw what they are told: subject and place, judged by a classifier that has seen only drawings."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import seeded
from PIL import Image, ImageFilter
from scenes import PLACES, SUBJECTS, Scene, caption, draw, random_scene
from torch import nn

KNOWN = {"subject": list(SUBJECTS), "place": list(PLACES)}


def pixels(image: Image.Image) -> torch.Tensor:
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(small).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="module")
def classifier():
    """A small network that names subject and place of a drawing; blurred ones too, so that sharpness is no cue."""
    torch.manual_seed(0)
    rng = random.Random(10**6)  # the models' own drawings have seeds below 16,000
    scenes = [random_scene(rng) for _ in range(3300)]
    blur = [ImageFilter.GaussianBlur(rng.choice((0, 0, 0.7, 1.5))) for _ in scenes]
    x = torch.stack([pixels(draw(scene).filter(b)) for scene, b in zip(scenes, blur)])
    y = torch.tensor([[KNOWN["subject"].index(s.subject), KNOWN["place"].index(s.place)] for s in scenes])

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    outputs = len(SUBJECTS) + len(PLACES)
    model = nn.Sequential(
        *block(3, 16), *block(16, 32), *block(32, 64), *block(64, 64), nn.Flatten(), nn.Linear(1024, outputs)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    steps, n = 400, 3000
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        picked = torch.randint(n, (64,))
        logits = model(x[picked] + 0.05 * torch.randn(64, 3, 64, 64)).split([len(SUBJECTS), len(PLACES)], dim=1)
        loss = sum(nn.functional.cross_entropy(part, y[picked, i]) for i, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()

    @torch.no_grad()
    def names(batch: torch.Tensor) -> torch.Tensor:
        subject, place = model(batch).split([len(SUBJECTS), len(PLACES)], dim=1)
        return torch.stack([subject.argmax(1), place.argmax(1)], dim=1)

    right = (names(x[n:]) == y[n:]).float().mean(0)
    assert right.min() > 0.98, f"the classifier itself is too weak: {right.tolist()}"
    return names


def prompts(count: int) -> tuple[list[str], torch.Tensor]:
    """Prompts in the vocabulary, every subject and place in turn, with what they ask for."""
    rng = random.Random(7)
    texts, asked = [], []
    for i in range(count):
        subject, place = KNOWN["subject"][i % len(SUBJECTS)], rng.choice(KNOWN["place"])
        scene = Scene(subject, place, rng.choice(("cold", "warm", "neutral")), rng.choice(("muted", "plain")))
        texts.append(caption(scene, rng, partial=0))
        asked.append([KNOWN["subject"].index(subject), KNOWN["place"].index(place)])
    return texts, torch.tensor(asked)


CALLS = {"sdxl": {"schedule": "karras"}, "flux": {"max_sequence_length": 64}}


def pictures(pipe, family: str, texts: list[str], **call) -> list[Image.Image]:
    drawn = []
    for i in range(0, len(texts), 10):
        batch = texts[i : i + 10]
        generators = [seeded(100 + i + j) for j in range(len(batch))]
        call = {"sampler": "dpmpp_2m", "num_inference_steps": 16, **CALLS[family], **call}
        drawn += pipe(batch, generator=generators, **call).images
    return drawn


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_fifty_pictures_show_what_was_asked(family, request, classifier):
    texts, asked = prompts(50)
    drawn = pictures(request.getfixturevalue(family), family, texts)
    right = (classifier(torch.stack([pixels(image) for image in drawn])) == asked).float().mean(0)
    assert right.min() >= 0.9, dict(zip(("subject", "place"), right.tolist()))


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_palette(family, request):
    """Cold prompts give bluer pictures than warm ones, by the mean of blue over red."""
    pipe = request.getfixturevalue(family)
    ratio = {}
    for palette in ("cold", "warm"):
        texts = [
            f"an {s} in a {p}, {palette} color palette" for s in ("astronaut",) for p in ("jungle", "desert", "city")
        ]
        means = np.mean([np.asarray(image).mean((0, 1)) for image in pictures(pipe, family, texts)], axis=0)
        ratio[palette] = means[2] / means[0]
    assert ratio["cold"] > 1.1 > 0.9 > ratio["warm"]


@pytest.mark.parametrize("family, scale", [("sdxl", {"guidance_scale": 5.0}), ("flux", {"true_cfg_scale": 2.0})])
def test_negative_prompt_steers_away(family, scale, request):
    """A prompt that leaves the palette open is warmer where cold colours are the negative prompt, and the reverse."""
    pipe = request.getfixturevalue(family)
    ratio = {}
    for palette in ("cold", "warm"):
        drawn = pictures(pipe, family, ["a robot"] * 6, negative_prompt=[f"{palette} color palette"] * 6, **scale)
        means = np.mean([np.asarray(image).mean((0, 1)) for image in drawn], axis=0)
        ratio[palette] = means[2] / means[0]
    assert ratio["warm"] > 1.15 * ratio["cold"]
