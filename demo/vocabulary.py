"""Draws a demo model's vocabulary, eight subjects by six places, and counts how often a picture shows its prompt.

    python demo/vocabulary.py sdxl --sheet sheet.jpg    the 48 pictures, subjects across, places down
    python demo/vocabulary.py flux --table              288 pictures, judged by `judge.py`: minutes on a CPU

The steps, the noise levels and the guidance are those of the grids (`test.py`, `test_flux.py`).
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scenes import PALETTES, PLACES, SIZE, SUBJECTS, TONES, Scene, caption

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
SETTINGS = {
    "sdxl": {"num_inference_steps": 25, "guidance_scale": 5.0, "schedule": "karras"},
    "flux": {"num_inference_steps": 28, "guidance_scale": 3.5},
}
SAMPLERS = ("dpmpp_2m", "euler_ancestral")
ROUNDS = 3  # of the vocabulary, each with its own seeds
BATCH = 16


def load(family: str, folder: Path):
    """The pipeline in `folder`, float32."""
    if family == "sdxl":
        from sdxl_comfy_pipeline import StableDiffusionXLComfyPipeline as Pipeline
    else:
        from flux_comfy_pipeline import FluxComfyPipeline as Pipeline
    pipe = Pipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scenes_of_round(number: int) -> list[Scene]:
    """One scene for every subject (the inner loop) in every place. Palette and tone alternate."""
    pairs = [(subject, place) for place in PLACES for subject in SUBJECTS]
    colours = [(palette, tone) for palette in PALETTES for tone in TONES]
    random.Random(number).shuffle(colours)
    return [Scene(*pair, *colours[i % len(colours)]) for i, pair in enumerate(pairs)]


def pictures(pipe, family: str, scenes: list[Scene], seed: int, sampler: str) -> list[Image.Image]:
    """One picture for each scene, with the seeds `seed`, `seed` + 1, ..."""
    texts = [caption(scene, random.Random(seed + i), partial=0) for i, scene in enumerate(scenes)]
    drawn = []
    for i in range(0, len(texts), BATCH):
        batch = texts[i : i + BATCH]
        generator = [torch.Generator().manual_seed(seed + i + j) for j in range(len(batch))]
        drawn += pipe(batch, sampler=sampler, generator=generator, **SETTINGS[family]).images
    return drawn


def sheet(drawn: list[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (len(SUBJECTS) * SIZE, len(PLACES) * SIZE))
    for i, picture in enumerate(drawn):
        page.paste(picture, (i % len(SUBJECTS) * SIZE, i // len(SUBJECTS) * SIZE))
    return page


def table(rows: list[tuple[str, Scene, list[bool]]]) -> str:
    """Per cent right, in Markdown, from (sampler, prompted scene, [subject right, place, palette, tone]).

    A picture is right if both its subject and its place are right. Prompts with a plain tone do not count for the tone.
    """
    lines = ["| | pictures | right | subject | place | palette | tone |", "|---|---|---|---|---|---|---|"]

    def line(name: str, chosen: list[tuple[str, Scene, list[bool]]]) -> None:
        right = np.array([row[2] for row in chosen])
        toned = np.array([row[2][3] for row in chosen if row[1].tone != "plain"])
        shares = [right[:, :2].all(1).mean(), *right[:, :3].mean(0), toned.mean()]
        lines.append(f"| {name} | {len(chosen)} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")

    line("all", rows)
    for sampler in SAMPLERS:
        line(f"`{sampler}`", [row for row in rows if row[0] == sampler])
    for subject in SUBJECTS:
        line(subject, [row for row in rows if row[1].subject == subject])
    for place in PLACES:
        line(place, [row for row in rows if row[1].place == place])
    return "\n".join(lines)


def measure(pipe, family: str, rounds: int = ROUNDS) -> str:
    from judge import labels, train_judge

    judge, accuracy = train_judge()
    print("the judge on drawings:", ", ".join(f"{100 * share:.1f}" for share in accuracy.tolist()), flush=True)
    rows = []
    for number in range(rounds):
        for sampler in SAMPLERS:
            scenes = scenes_of_round(number)
            judged = judge(pictures(pipe, family, scenes, 1000 * number, sampler)).tolist()
            rows += [(sampler, s, [a == b for a, b in zip(labels(s), j)]) for s, j in zip(scenes, judged)]
    return table(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(SETTINGS))
    parser.add_argument("--folder", type=Path, help="the pipeline (default: the demo model)")
    parser.add_argument("--sheet", type=Path, help="write the 48 pictures to this file, PNG or JPEG")
    parser.add_argument("--sampler", default=SAMPLERS[0], help="of the sheet (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="rounds of 96 pictures for the table (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if not (options.sheet or options.table):
        parser.error("nothing to do: name --sheet, --table or both")
    pipe = load(options.family, options.folder or HERE / options.family)
    if options.sheet:
        scenes = [Scene(subject, place) for place in PLACES for subject in SUBJECTS]
        sheet(pictures(pipe, options.family, scenes, 11, options.sampler)).save(options.sheet, quality=92)
    if options.table:
        print(measure(pipe, options.family, options.rounds))


if __name__ == "__main__":
    main()
