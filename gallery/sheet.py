"""What became of a grid: the table, and a contact sheet for each prompt and seed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from gallery.models import reason
from gallery.parameters import write_parameters
from gallery.pictures import contact_sheet, write_png


@dataclass(frozen=True)
class Picture:
    """One picture to draw. All those of one `place` show one prompt and begin with one noise."""

    place: str
    prompt: str
    seed: int
    sampler: str
    path: Path


@dataclass
class Drawn:
    """What became of one picture: its file, or why there is none."""

    picture: Picture
    path: Path | None
    seconds: float = 0.0
    evaluations: int = 0
    note: str = ""
    error: str = ""


def said(one: Drawn) -> str:
    """What became of a picture, in a few words."""
    return one.error and f"FAILED: {one.error}" or one.note or f"{one.evaluations} evaluations, {one.seconds:.1f} s"


def finish(name: str, model: str, settings: dict[str, str], drawn: list[Drawn], options: argparse.Namespace) -> int:
    """A contact sheet for each prompt and seed, and the table. The exit status: 1 if anything failed."""
    places: dict[str, list[Drawn]] = {}
    for one in drawn:
        places.setdefault(one.picture.place, []).append(one)
    sheets, lost = [], []
    for place, those in places.items():
        path = options.output / f"{place}-grid.png"
        try:
            write_sheet(path, place, settings, those)
            sheets.append(path)
        except OSError as error:
            lost.append(f"FAILED: {path}: {reason(error)}")
    failed = sum(bool(one.error) for one in drawn)
    summary = f"{len(drawn) - failed} of {len(drawn)} drawn with {model}"
    if len(places) == 1:
        print(f"\n{'sampler':20}{'evaluations':>12}{'seconds':>10}  picture")
        for one in drawn:
            note, result = f" ({one.note})" if one.note else "", one.path or "FAILED: " + one.error
            print(f"{one.picture.sampler:20}{one.evaluations:12}{one.seconds:10.1f}  {result}{note}")
        summary += "".join(f", side by side in {path}" for path in sheets)
    else:
        print(f"\n{'sampler':20}{'pictures':>10}{'kept':>6}{'evaluations':>12}{'seconds':>10}")
        for sampler in dict.fromkeys(one.picture.sampler for one in drawn):
            those = [one for one in drawn if one.picture.sampler == sampler and one.path]
            kept, evaluations = sum(bool(one.note) for one in those), sum(one.evaluations for one in those)
            print(f"{sampler:20}{len(those):10}{kept:6}{evaluations:12}{sum(one.seconds for one in those):10.1f}")
        for one in drawn:
            if one.error:
                print(f"FAILED: {one.picture.path}: {one.error}")
        summary += f", {len(sheets)} sheets" + "".join(f" like {path}" for path in sheets[:1])
    print(*lost, summary, sep="\n")
    return int(bool(failed or lost))


def write_sheet(path: Path, place: str, settings: dict[str, str], drawn: list[Drawn]) -> None:
    """All samplers of one prompt and seed side by side, in a file."""
    first = drawn[0].picture
    settings = {**settings, "prompt": first.prompt, "seed": str(first.seed)}
    entries = [
        (one.picture.sampler, one.error or f"{one.evaluations} evaluations, {one.seconds:.1f} s", one.path)
        for one in drawn
    ]
    sheet = contact_sheet(title_of(place, len(drawn), settings), entries)
    write_png(sheet, path, settings, write_parameters(settings))


def title_of(place: str, count: int, settings: dict[str, str]) -> list[str]:
    """What all pictures of a sheet have in common."""
    negative, comfy = settings["negative_prompt"], settings["comfy"] != "False"
    true_cfg = f", true CFG {settings['true_cfg']}" if negative and "true_cfg" in settings else ""
    return [
        f"{place}: {count} samplers of k-diffusion{' as in ComfyUI' * comfy}, {settings['steps']} steps,"
        f" {settings['schedule']} noise levels, guidance {settings['guidance']}{true_cfg}, seed {settings['seed']}",
        settings["prompt"] + (f"   (not: {negative})" if negative else ""),
    ]
