"""The demo models draw the subject and place of the prompt, judged by a network that has seen only drawings."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import vocabulary
from conftest import FAMILIES, seeded
from judge import PARTS, labels, train_judge
from PIL import Image
from scenes import PALETTES, PLACES, SUBJECTS, TONES, Scene, caption


@pytest.fixture(scope="module")
def judge():
    judge, right = train_judge(1000, 80)  # enough for subject and place; the tone takes more
    assert right[:2].min() > 0.98, f"the judge itself is too weak: {dict(zip(PARTS, right.tolist()))}"
    return judge


def prompts(count: int) -> tuple[list[str], torch.Tensor]:
    """Prompts in the vocabulary, every subject in turn in random places, with their labels."""
    rng = random.Random(7)
    texts, expected = [], []
    for i in range(count):
        subject, place = list(SUBJECTS)[i % len(SUBJECTS)], rng.choice(list(PLACES))
        scene = Scene(subject, place, rng.choice(("cold", "warm", "neutral")), rng.choice(("muted", "plain")))
        texts.append(caption(scene, rng, partial=0))
        expected.append(labels(scene))
    return texts, torch.tensor(expected)


CALLS = {"sdxl": {"schedule": "karras"}, "flux": {"max_sequence_length": 64}}


def pictures(pipe, family: str, texts: list[str], **call) -> list[Image.Image]:
    drawn = []
    for i in range(0, len(texts), 10):
        batch = texts[i : i + 10]
        generators = [seeded(100 + i + j) for j in range(len(batch))]
        call = {"sampler": "dpmpp_2m", "num_inference_steps": 12, **CALLS[family], **call}
        drawn += pipe(batch, generator=generators, **call).images
    return drawn


@FAMILIES
def test_thirty_pictures_show_their_prompts(name, request, judge):
    texts, expected = prompts(30)
    drawn = pictures(request.getfixturevalue(name), name, texts)
    right = dict(zip(PARTS, (judge(drawn) == expected).float().mean(0).tolist()))
    assert min(right["subject"], right["place"]) >= 0.9, right


def blueness(pipe, family: str, texts: list[str], **call) -> float:
    """The mean of blue over red."""
    means = np.mean([np.asarray(image).mean((0, 1)) for image in pictures(pipe, family, texts, **call)], axis=0)
    return means[2] / means[0]


@pytest.mark.parametrize("family, scale", [("sdxl", {"guidance_scale": 5.0}), ("flux", {"true_cfg_scale": 2.0})])
def test_palette(family, scale, request):
    """Cold prompts give bluer pictures than warm ones. As negative prompts of a prompt
    without a palette, they steer away from their palette."""
    pipe, places = request.getfixturevalue(family), ("jungle", "desert", "city")
    blue, without = {}, {}
    for palette in ("cold", "warm"):
        text = f"{palette} color palette"
        blue[palette] = blueness(pipe, family, [f"an astronaut in a {place}, {text}" for place in places])
        without[palette] = blueness(pipe, family, ["a robot"] * 4, negative_prompt=[text] * 4, **scale)
    assert blue["cold"] > 1.1 > 0.9 > blue["warm"] and without["warm"] > 1.15 * without["cold"]


def test_a_round_has_the_whole_vocabulary():
    """Each subject in each place once a round, and each pair of palette and tone; another order in another round."""
    rounds = [vocabulary.scenes_of_round(number) for number in range(3)]
    for scenes in rounds:
        assert {(s.subject, s.place) for s in scenes} == {(a, b) for a in SUBJECTS for b in PLACES}
        assert {(s.palette, s.tone) for s in scenes} == {(a, b) for a in PALETTES for b in TONES}
    assert rounds[0] != rounds[1] != rounds[2]


def test_the_table_counts_what_is_right():
    """One picture of 96 has the wrong place and tone."""
    scenes = vocabulary.scenes_of_round(0)
    rows = [(sampler, s, [True] * 4) for s in scenes for sampler in vocabulary.SAMPLERS]
    wrong = next(i for i, (_, s, _) in enumerate(rows) if s.tone == "muted" and s.place == "sea")
    rows[wrong] = (*rows[wrong][:2], [True, False, True, False])
    lines = [[cell.strip() for cell in row.split("|")[1:-1]] for row in vocabulary.table(rows).splitlines()[2:]]
    numbers = {name: [float(cell) for cell in cells] for name, *cells in lines}
    toned, share = sum(s.tone != "plain" for s in scenes), 100 * 95 / 96
    expected = [96, share, 100, share, 100, 100 * (1 - 1 / (2 * toned))]
    assert numbers["all"] == pytest.approx(expected, abs=0.05)
    assert numbers["sea"][:3] == [16, 93.8, 100]
    assert numbers["`euler_ancestral`"][1:] == [100] * 5 and numbers["`dpmpp_2m`"][1] < 100
