"""Pictures with their settings inside, written whole or not at all, and the contact sheet."""

import bisect
import functools
import json
import math
import os
import re
import secrets
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat, PngImagePlugin

CHUNK = "k-diffusing"  # no other tool's: ComfyUI takes a chunk `prompt` for its JSON
TITLE_LINES = 6  # of one text above a sheet
SHEET_WIDTH = 1600  # pixels, where the type of a table can be read
FONTS = ("PingFang.ttc", "AppleGothic.ttf", "msyh.ttc", "malgun.ttf", "NotoSansCJK-Regular.ttc", "DejaVuSans.ttf")
Cells = list[tuple[str, str, Path | None]]  # label, note, and the picture's file, or None if it failed
Font = Any  # ImageFont.FreeTypeFont, or ImageFont.ImageFont where Pillow has no FreeType


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary name, unique in the folder, and renames the file: `path` is complete or absent."""
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(image: Image.Image, path: Path, settings: dict[str, str] | None = None, parameters: str = "") -> None:
    """Writes `image` with its `settings` in our own chunk, and `parameters` as other tools read them."""
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_itxt(CHUNK, json.dumps(settings, ensure_ascii=False))
    if parameters:
        info.add_text("parameters", parameters)  # tEXt, or iTXt for what Latin-1 lacks
    write_whole(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def read_settings(path: Path) -> dict[str, str] | None:
    """The settings of a complete picture and its `parameters`; None if there is none. ValueError: too much text.

    PNGs of older versions have a chunk for each setting. JPEG and WebP have EXIF: the web UI's text is a comment there,
    and ComfyUI's graph, "prompt:{...}", any of its first texts.
    """
    try:
        with Image.open(path) as image:
            image.load()
            chunks = dict(getattr(image, "text", {}))
            exif = image.getexif()
            comment = exif.get_ifd(0x8769).get(0x9286)
    except (OSError, SyntaxError, AttributeError):
        return None
    if comment:
        chunks.setdefault("parameters", _comment(comment))
    for name, colon, value in (text.partition(":") for text in exif.values() if isinstance(text, str)):
        if colon and name.lower() in ("prompt", "parameters"):
            chunks.setdefault(name.lower(), value)
    try:
        return chunks | json.loads(chunks.pop(CHUNK, "{}"))
    except (ValueError, TypeError):  # another tool's
        return chunks


def difference(one: Path, other: Path) -> float:
    """The root mean square over pixels and channels of the difference of two pictures, in levels of 255."""
    gap = ImageChops.difference(Image.open(one).convert("RGB"), Image.open(other).convert("RGB"))
    return math.sqrt(sum(band**2 for band in ImageStat.Stat(gap).rms) / 3)


def _comment(comment: bytes | str) -> str:
    """EXIF's UserComment: eight bytes that name its encoding, then the text. The zeros show UTF-16's byte order."""
    if isinstance(comment, str):
        return comment
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        big = text[::2].count(0) >= text[1::2].count(0)
        return text.decode("utf-16-be" if big else "utf-16-le", "replace").strip("\ufeff\0")
    named = code in (b"ASCII\0\0\0", bytes(8), b"JIS\0\0\0\0\0")
    return (text if named else comment).decode("utf-8", "replace").strip("\0")


def contact_sheet(
    title: list[str], entries: Cells, cell: int = 320, top: Sequence[str] = (), left: Sequence[str] = ()
) -> Image.Image:
    """A labelled grid, or with `top` and `left` a table; up to 17 columns are at most 1,600 pixels wide.

    Args:
        title: texts above the grid, the first one larger. A long text ends in an ellipsis.
        entries: row by row. A note is above its picture, in a table below it, or says why the picture failed.
        cell: pixels of a picture's longer side; in a table at most, and at most twice the picture's own.
        top, left: labels of a table's columns and rows.
    """
    font, large = ImageFont.load_default(size=15), ImageFont.load_default(size=19)
    margin, line_height = 14, 19
    columns = len(top) or min(5, len(entries)) or 1
    side = max((math.ceil(large.getlength(label)) + margin for label in left), default=0)
    size = next((Image.open(path).size for *_, path in entries if path), (1, 1))
    if top:
        cell = max(min(cell, 2 * max(size), (SHEET_WIDTH - margin - side) // columns - margin), 64)
    width, height = (max(round(pixels * cell / max(size)), 1) for pixels in size)
    # texts above or below a picture fit into its column, and a line of an error into its row
    texts = [large.getlength(label) for label in [*top, *(label for label, *_ in entries)]]
    texts += [font.getlength(line) for _, note, path in entries if path for line in note.split("\n")]
    column = max(width, min(math.ceil(max(texts)), cell if top else SHEET_WIDTH))
    row = height if all(path for *_, path in entries) else max(height, line_height + 16)
    heads = [wrapped(label, large, column, 3) for label in top]
    notes = [[part for line in note.split("\n") for part in wrapped(line, font, column, 3)] for _, note, _ in entries]
    below = max([6 + line_height * len(note) for note, (*_, path) in zip(notes, entries) if path and top], default=0)
    above = 0 if top else 48
    page_width = max(margin + side + columns * (column + margin), 640)
    lines = []
    for i, text in enumerate(title):
        text, its_font = readable(text, 15 if i else 19)
        lines += [(line, its_font) for line in wrapped(text, its_font, page_width - 2 * margin, TITLE_LINES)]
    start, pitch = margin + 26 * len(lines) + 10 + 25 * max(map(len, heads), default=0), above + row + below + margin
    page = Image.new("RGB", (page_width, start + -(-len(entries) // columns) * pitch), "white")
    draw = ImageDraw.Draw(page)
    for i, (line, its_font) in enumerate(lines):
        draw.text((margin, margin + 26 * i), line, fill="black", font=its_font)
    for i, head in enumerate(heads):
        for j, line in enumerate(reversed(head), 1):
            draw.text((margin + side + i * (column + margin), start - 25 * j), line, fill="black", font=large)
    for i, label in enumerate(left):
        draw.text((margin, start + i * pitch), label, fill="black", font=large)
    for i, ((label, note, path), lines_of_note) in enumerate(zip(entries, notes)):
        x, y = margin + side + i % columns * (column + margin), start + i // columns * pitch
        draw.text((x, y), label, fill="black", font=large)
        if path:
            under = y + (height + 4 if top else 25)
            for j, line in enumerate(lines_of_note):
                draw.text((x, under + line_height * j), line, fill=(90, 90, 90), font=font)
            picture = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        else:
            picture = Image.new("RGB", (column, row), (245, 236, 236))
            text, its_font = readable(note, 15)
            why = wrapped(text, its_font, column - 16, (row - 16) // line_height)
            ImageDraw.Draw(picture).multiline_text((8, 8), "\n".join(why), fill=(160, 0, 0), font=its_font)
        page.paste(picture, (x, y + above))
    return page


def wrapped(text: str, font: Font, width: float, most: int) -> list[str]:
    """At most `most` lines of at most `width` pixels, broken at spaces or within a wider word; else an ellipsis."""
    lines: list[str] = []
    rest = re.sub(r"\s", " ", text[: 400 * most]).strip()  # no line has more letters; measuring takes time
    while rest and len(lines) < most:
        fits = bisect.bisect_right(range(min(len(rest), 400) + 1), width, key=lambda n: font.getlength(rest[:n])) - 1
        space = rest.rfind(" ", 0, fits + 1) if fits < len(rest) else -1
        end = space if space > 0 else max(fits, 1)
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest or len(text) > 400 * most:
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


def readable(text: str, size: int) -> tuple[str, Font]:
    """The text and a font with its letters. Letters that no font here has are escaped: \\u5b87, \\U0001f680."""
    text = text[: 400 * TITLE_LINES + 1]
    best = ImageFont.load_default(size=size)
    missing = {letter for letter in text if not (letter.isspace() or letter.isascii() or _has(best, letter))}
    if not missing:
        return text, best
    often = sorted(missing, key=lambda letter: (-text.count(letter), letter))[:4]
    fitting = (fonts_with(letters) for letters in (frozenset(missing), *map(frozenset, often)))
    for name in (*FONTS, *next(filter(None, fitting), [])):
        try:
            font = ImageFont.truetype(name, size)
        except OSError:  # not on this machine, or of a single size, as for coloured emoji
            continue
        lacking = {letter for letter in {*text} if not (letter.isspace() or _has(font, letter))}
        if len(lacking) < len(missing):
            best, missing = font, lacking
    return "".join(c.encode("ascii", "backslashreplace").decode() if c in missing else c for c in text), best


def _has(font: Font, letter: str) -> bool:
    """Whether the font draws the letter differently from a letter that does not exist."""
    mask, none = font.getmask(letter), font.getmask("\U0010ffff")
    return mask.size != none.size or bytes(mask) != bytes(none)


@functools.lru_cache(maxsize=64)
def fonts_with(letters: frozenset[str]) -> list[str]:
    """The files of fonts with these letters that fontconfig knows; none without fontconfig."""
    charset = " ".join(f"{ord(letter):x}" for letter in sorted(letters)[:200])
    command = ["fc-list", f":charset={charset}", "file"]
    try:
        listed = subprocess.check_output(command, text=True, timeout=10, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted(line.rstrip(": ") for line in listed.splitlines())[:20]
