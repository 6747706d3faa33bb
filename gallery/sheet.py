"""The results of a grid: a table of numbers, and for each prompt and seed a sheet, as a PNG and as a page."""

import base64
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from gallery.models import reason
from gallery.parameters import write_parameters
from gallery.pictures import Cells, contact_sheet, difference, read_settings, write_png, write_whole


@dataclass(frozen=True)
class Picture:
    """One picture to draw. The pictures of a `place` are one sheet: the same prompt from the same noise."""

    place: str
    prompt: str
    seed: int
    row: str
    column: str  # empty where the sheet has only one
    path: Path

    @property
    def name(self) -> str:
        return f"{self.row}, {self.column}" if self.column else self.row


@dataclass
class Drawn:
    """The result of one picture: its file, or why there is none."""

    picture: Picture
    path: Path | None
    seconds: float = 0.0
    evaluations: int = 0
    note: str = ""
    error: str = ""


def outcome(one: Drawn) -> str:
    return f"FAILED: {one.error}" if one.error else one.note or _cost(one)


def _cost(one: Drawn) -> str:
    return f"{one.evaluations} evaluations, {one.seconds:.1f} s"


def finish(
    drawn: list[Drawn], model: str, settings: dict[str, str], title_of: Callable, options: Namespace, distances: bool
) -> int:
    """Writes a sheet for each prompt and seed, and prints a table. Returns the exit status: 1 if anything failed."""
    places: dict[str, list[Drawn]] = {}
    for one in drawn:
        places.setdefault(one.picture.place, []).append(one)
    sheets, lost = [], []
    for place, its_pictures in places.items():
        path = options.output / f"{place}-{options.axis + '-' if options.axis else ''}grid.png"
        first = its_pictures[0].picture
        its_settings = {**settings, "prompt": first.prompt, "seed": str(first.seed)}
        try:
            write_sheet(path, title_of(place, its_settings), its_settings, its_pictures, distances, options.html)
            sheets.append(path)
        except OSError as error:
            lost.append(f"FAILED: {path}: {reason(error)}")
    failed = [one for one in drawn if one.error]
    summary = f"{len(drawn) - len(failed)} of {len(drawn)} drawn with {model}"
    wide = max([20, *(len(one.picture.name) + 2 for one in drawn)])
    if len(places) == 1:
        print(f"\n{'':{wide}}{'evaluations':>12}{'seconds':>10}  picture")
        for one in drawn:
            note, result = f" ({one.note})" if one.note else "", one.path or "FAILED: " + one.error
            print(f"{one.picture.name:{wide}}{one.evaluations:12}{one.seconds:10.1f}  {result}{note}")
        summary += "".join(f", side by side in {path}" for path in sheets)
    else:
        print(f"\n{'':{wide}}{'pictures':>10}{'kept':>6}{'evaluations':>12}{'seconds':>10}")
        for name in dict.fromkeys(one.picture.name for one in drawn):
            done = [one for one in drawn if one.picture.name == name and one.path]
            kept, evaluations = sum(bool(one.note) for one in done), sum(one.evaluations for one in done)
            print(f"{name:{wide}}{len(done):10}{kept:6}{evaluations:12}{sum(one.seconds for one in done):10.1f}")
        lost = [*(f"FAILED: {one.picture.path}: {one.error}" for one in failed), *lost]
        summary += f", {len(sheets)} sheets" + "".join(f" like {path}" for path in sheets[:1])
    print(*lost, summary, sep="\n")
    return int(bool(failed or lost))


def write_sheet(
    path: Path, title: list[str], settings: dict[str, str], drawn: list[Drawn], distances: bool, html: bool
) -> None:
    """Writes the pictures of one prompt and seed as a sheet, and with `html` as a page. The longer side goes down.

    `distances`: under each picture stands its distance from the last picture of its sampler.
    """
    at = {(one.picture.row, one.picture.column): one for one in drawn}
    rows, columns = ([*dict.fromkeys(names)] for names in zip(*at))

    def cell(one: Drawn) -> tuple[str, str, Path | None]:
        note, last = one.error or _cost(one), at[one.picture.row, columns[-1]].path
        if distances and one.path and last:
            note += f"\ndifference {difference(one.path, last):.1f}"
        return "" if one.picture.column else one.picture.row, note, one.path

    turned = len(columns) > len(rows)
    top, left = (rows, columns) if turned else (columns, rows)
    cells = [cell(at[(across, down) if turned else (down, across)]) for down in left for across in top]
    if len(columns) == 1:
        top, left = [], []
    parameters = "" if top else write_parameters(settings)
    write_png(contact_sheet(title, cells, top=top, left=left), path, settings, parameters)
    if html:
        write_page(path.with_suffix(".html"), title, cells, top, left)


def write_page(path: Path, title: list[str], cells: Cells, top: Sequence[str], left: Sequence[str]) -> None:
    """Writes the cells of a sheet as one HTML file: pictures in the same place, one after the other, and settings."""
    columns = len(top) or min(5, len(cells))
    parts = ["<b class=corner></b>"] * bool(top) + [f"<b>{escape(label)}</b>" for label in top]
    for i, (label, note, file) in enumerate(cells):
        if left and i % columns == 0:
            parts.append(f"<b class=left>{escape(left[i // columns])}</b>")
        name = escape(label or f"{left[i // columns]}, {top[i % columns]}")
        found = (read_settings(file) or {}) if file else {"FAILED": note}
        settings = "\n".join(f"{key}: {value}" for key, value in found.items() if key != "parameters")
        data = base64.b64encode(file.read_bytes()).decode() if file else ""
        picture = f'<img src="data:image/png;base64,{data}" alt="{name}">' * bool(file)
        inside = f"<b>{escape(label)}</b>{picture}<span class={'note' if file else 'failed'}>{escape(note)}</span>"
        parts.append(f'<button class=cell title="{name}" data-settings="{escape(settings)}">{inside}</button>')
    about = "".join(f"<p>{escape(line)}</p>" for line in title[1:])
    values = {"title": escape(title[0]), "about": about, "columns": columns, "cells": "\n".join(parts)}
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page_text = page.substitute(values, left="max-content" if top else "")
    write_whole(path, lambda temporary: temporary.write_text(page_text, encoding="utf-8"))
