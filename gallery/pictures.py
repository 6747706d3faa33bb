"""PNG files with their settings inside, written whole or not at all, and the contact sheet."""

from __future__ import annotations

import glob
import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin


def write_png(image: Image.Image, path: Path, settings: dict[str, str] | None = None) -> None:
    """Writes `image` with `settings` as text chunks. The file appears under its name when it is complete."""
    info = PngImagePlugin.PngInfo()
    for name, value in (settings or {}).items():
        info.add_text(name, value)  # tEXt, or iTXt for what Latin-1 lacks
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a process that was killed here
            left.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


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
        title: lines above the grid.
        entries: label, second line, and the picture's file, or None for one that failed (the second line says why).
        cell: pixels of a picture's longer side.
    """
    font, bold = ImageFont.load_default(size=15), ImageFont.load_default(size=19)
    margin, text_height = 14, 48
    columns = min(columns, len(entries)) or 1
    pictures = [Image.open(path).convert("RGB") if path else None for _, _, path in entries]
    size = next((picture.size for picture in pictures if picture), (1, 1))
    scale = cell / max(size)
    width, height = round(size[0] * scale), round(size[1] * scale)
    rows = -(-len(entries) // columns)
    page_width = max(margin + columns * (width + margin), 640)
    lines = [line for text in title for line in textwrap.wrap(text, (page_width - 2 * margin) // 9)]
    top = margin + 26 * len(lines) + 10
    page = Image.new("RGB", (page_width, top + rows * (height + text_height + margin)), "white")
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        draw.text((margin, margin + 26 * i), line, fill="black", font=bold if i == 0 else font)
    for i, ((label, note, _), picture) in enumerate(zip(entries, pictures)):
        x, y = margin + i % columns * (width + margin), top + i // columns * (height + text_height + margin)
        draw.text((x, y), label, fill="black", font=bold)
        if picture is not None:
            draw.text((x, y + 25), note, fill=(90, 90, 90), font=font)
            page.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, y + text_height))
        else:
            draw.rectangle((x, y + text_height, x + width - 1, y + text_height + height - 1), fill=(245, 236, 236))
            draw.multiline_text(
                (x + 8, y + text_height + 8), textwrap.fill(note, width // 9), fill=(160, 0, 0), font=font
            )
    return page
