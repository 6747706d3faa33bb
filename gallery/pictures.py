"""PNG files with their settings inside, written whole or not at all, and the contact sheet."""

from __future__ import annotations

import bisect
import glob
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with another name in the same folder and renames the file, so that `path` is complete or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a process that was killed here
            left.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(image: Image.Image, path: Path, settings: dict[str, str] | None = None) -> None:
    """Writes `image` with `settings` as text chunks. The file appears under its name when it is complete."""
    info = PngImagePlugin.PngInfo()
    for name, value in (settings or {}).items():
        info.add_text(name, value)  # tEXt, or iTXt for what Latin-1 lacks
    write_whole(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def read_settings(path: Path) -> dict[str, str] | None:
    """The text chunks of a complete PNG; None if there is none at `path`."""
    try:
        with Image.open(path) as image:
            image.load()
            return dict(image.text)  # type: ignore[attr-defined]
    except (OSError, SyntaxError, AttributeError):
        return None


def contact_sheet(
    title: list[str], entries: list[tuple[str, str, Path | None]], columns: int = 5, cell: int = 320
) -> Image.Image:
    """A labelled grid.

    Args:
        title: texts above the grid, the first of them larger.
        entries: label, second line, and the picture's file, or None for one that failed (the second line says why).
        cell: pixels of a picture's longer side.
    """
    font, large = ImageFont.load_default(size=15), ImageFont.load_default(size=19)
    margin, text_height, line_height = 14, 48, 19
    columns = min(columns, len(entries)) or 1
    pictures = [Image.open(path).convert("RGB") if path else None for _, _, path in entries]
    size = next((picture.size for picture in pictures if picture), (1, 1))
    scale = cell / max(size)
    width, height = max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
    # what is written above a picture fits into its column, a line of what failed into its row
    labels = [large.getlength(label) for label, _, _ in entries]
    notes = [font.getlength(note) for _, note, path in entries if path]
    column = max([width, *map(math.ceil, labels + notes)])
    row = height if all(pictures) else max(height, line_height + 16)
    page_width = max(margin + columns * (column + margin), 640)
    lines = [
        (line, font if i else large)
        for i, text in enumerate(title)
        for line in _wrapped(text, font if i else large, page_width - 2 * margin)
    ]
    top = margin + 26 * len(lines) + 10
    page = Image.new("RGB", (page_width, top + -(-len(entries) // columns) * (row + text_height + margin)), "white")
    draw = ImageDraw.Draw(page)
    for i, (line, its_font) in enumerate(lines):
        draw.text((margin, margin + 26 * i), line, fill="black", font=its_font)
    for i, ((label, note, _), picture) in enumerate(zip(entries, pictures)):
        x, y = margin + i % columns * (column + margin), top + i // columns * (row + text_height + margin)
        draw.text((x, y), label, fill="black", font=large)
        if picture is not None:
            draw.text((x, y + 25), note, fill=(90, 90, 90), font=font)
            page.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, y + text_height))
        else:
            box = Image.new("RGB", (column, row), (245, 236, 236))
            why, room = _wrapped(note, font, column - 16), (row - 16) // line_height
            if len(why) > room:
                why = [*why[: room - 1], why[room - 1][:-2] + "…"]
            ImageDraw.Draw(box).multiline_text((8, 8), "\n".join(why), fill=(160, 0, 0), font=font)
            page.paste(box, (x, y + text_height))
    return page


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """The text in lines of at most `width` pixels, broken at spaces, and within a word that is wider."""
    lines, rest = [], re.sub(r"\s", " ", text).strip()
    while rest:
        fits = bisect.bisect_right(range(len(rest) + 1), width, key=lambda n: font.getlength(rest[:n])) - 1
        space = rest.rfind(" ", 0, fits + 1) if fits < len(rest) else -1
        end = space if space > 0 else max(fits, 1)
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines
