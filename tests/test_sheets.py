"""The PNG files of the grids and their contact sheets."""

from __future__ import annotations

import itertools
import json

import pytest
from conftest import ROOT
from PIL import Image, ImageChops, ImageStat
from PIL.PngImagePlugin import PngInfo

from gallery import pictures, sheet
from gallery.grid import title_of
from gallery.pictures import contact_sheet, read_settings, write_png
from gallery.sheet import Drawn, Picture, write_sheet
from sdxl_comfy_pipeline import sampler_names


def test_png_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "picture.png"
    write_png(Image.new("RGB", (8, 8)), path, {"prompt": "Grüße, 宇航员", "sampler": "euler"})
    assert read_settings(path) == {"prompt": "Grüße, 宇航员", "sampler": "euler"}

    class Broken(Image.Image):
        def save(self, target, **options):
            target.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_png(Broken(), path)
    assert read_settings(path)["sampler"] == "euler"
    assert list(tmp_path.iterdir()) == [path]


LONG = "one of several words that say what failed " * 40


def ink(entries, changed, labels=None, changed_labels=None):
    """The box around one text: where the sheet differs with `changed` in place of `entries`."""
    labels = labels or {}
    one = contact_sheet(["title"], entries, **labels)
    return ImageChops.difference(one, contact_sheet(["title"], changed, **changed_labels or labels)).getbbox()


@pytest.mark.parametrize("columns", [0, 2, 17])  # of a table; 0: a grid
@pytest.mark.parametrize("label", ["lms", "dpmpp_2s_ancestral"])
@pytest.mark.parametrize("size", [(16, 64), (64, 64), (64, 6)])
def test_labels_of_a_sheet_do_not_overlap(tmp_path, size, label, columns):
    """Names and notes side by side, however narrow the pictures, each within its own column."""
    path = tmp_path / "a.png"
    write_png(Image.new("RGB", size, "red"), path)
    if columns:
        entries = [("", "17 evaluations, 1234.5 s\ndifference 12.3", path)] * 2 * columns
        labels = {"top": [label] * columns, "left": ["linear_quadratic"] * 2}
        others = [{**labels, "top": [*labels["top"][:i], "", *labels["top"][i + 1 :]]} for i in range(columns)]
        heads = [ink(entries, entries, labels, other) for other in others]
        assert contact_sheet(["title"], entries, **labels).width <= 1600
    else:
        entries, labels, heads = [(label, "17 evaluations, 1234.5 s", path)] * 4, {}, []
    # in a grid the fourth keeps the columns as they are
    notes = [ink(entries, [*entries[:i], ("", "", path), *entries[i + 1 :]], labels) for i in range(columns or 3)]
    assert all(a[2] < b[0] for boxes in (heads, notes) for a, b in zip(boxes, boxes[1:]))
    assert all(head[3] <= note[1] for head, note in zip(heads, notes))


@pytest.mark.parametrize("size", [(64, 64), (64, 6), (320, 10)])
def test_why_a_sampler_failed_stays_in_its_row(tmp_path, size):
    write_png(Image.new("RGB", size, "red"), tmp_path / "a.png")
    entries = [("a", "1 evaluation", tmp_path / "a.png"), ("b", LONG, None)] + [("c", "", tmp_path / "a.png")] * 5
    why = ink(entries, [entries[0], ("b", "", None), *entries[2:]])
    below = ink(entries, [*entries[:6], ("", "", entries[6][2])])  # the label in the next row
    beside = ink(entries, [*entries[:2], ("", "", entries[2][2]), *entries[3:]])
    assert why[3] < below[1] and why[2] < beside[0] and why[3] - why[1] > 10
    sheet, left = contact_sheet(["title"], entries), why[0] - 4
    box = [y for y in range(sheet.height) if sheet.getpixel((left, y)) == (245, 236, 236)]
    assert box[0] < why[1] and why[3] < box[-1] - 4  # whole lines, with room below


@pytest.mark.parametrize("word", ["WWWW ", "iiii ", "W", "a/long-path/with_no_space"])
def test_text_is_wrapped_by_its_width(word):
    """No line reaches into the margin, and no line is broken long before it."""
    sheet = contact_sheet([word * 60, word * 60], [("a", "failed", None)])
    right = ImageChops.invert(sheet).getbbox()[2]
    assert 0.85 * (sheet.width - 14) < right <= sheet.width - 14


def test_title_names_what_the_pictures_have_in_common():
    settings = {"steps": "4", "schedule": "beta", "guidance": "3.5", "seed": "7", "prompt": "a cat", "comfy": "False"}
    settings |= {"negative_prompt": "", "true_cfg": "1.0"}
    plain = "flux-demo: 2 samplers of k-diffusion, 4 steps, beta noise levels, guidance 3.5, seed 7"
    assert title_of(2, None, "flux-demo", settings) == [plain, "a cat"]
    settings |= {"negative_prompt": "snow", "true_cfg": "2.0", "comfy": "True"}
    assert title_of(2, None, "flux-demo", settings) == [
        plain.replace("k-diffusion", "k-diffusion as in ComfyUI").replace("3.5", "3.5, true CFG 2.0"),
        "a cat   (not: snow)",
    ]


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_the_committed_sheets_keep_their_layout(tmp_path, family):
    """The committed pictures make the committed sheet, apart from the letters of different Pillow versions."""
    sheet = ROOT / "output" / f"{family}-demo-grid.png"
    drawn = []
    for sampler in sampler_names():
        path = ROOT / "output" / f"{family}-demo-sample_{sampler}.png"
        found = read_settings(path)
        picture = Picture(f"{family}-demo", found["prompt"], int(found["seed"]), sampler, "", path)
        drawn.append(Drawn(picture, path, float(found["seconds"]), int(found["evaluations"])))
    settings = {"comfy": "False", **read_settings(sheet)}
    title = title_of(len(drawn), None, f"{family}-demo", settings)
    write_sheet(tmp_path / "sheet.png", title, settings, drawn, distances=False, html=False)
    again, there = Image.open(tmp_path / "sheet.png"), Image.open(sheet)
    assert again.size == there.size
    assert max(ImageStat.Stat(ImageChops.difference(again, there)).mean) < 0.5


def table(folder, rows, columns, failed=(), **options):
    """A sheet of plain pictures, all of the same size, each of another colour; the names of its rows and columns."""
    drawn = []
    for i, (row, column) in enumerate(itertools.product(rows, columns)):
        path = None if (row, column) in failed else folder / f"{row}-{column}.png"
        if path:
            write_png(Image.new("RGB", (64, 48), (20 * i, 0, 0)), path, {"sampler": row, "prompt": "<b>$cat"})
        picture = Picture("place", "a cat", 2, row, column, path)
        drawn.append(Drawn(picture, path, 1.0, 4, error="" if path else "out of memory <b>"))
    settings = {"schedule": "karras", "prompt": "a cat", "seed": "2"}
    write_sheet(
        folder / "sheet.png", ["title", "a cat"], settings, drawn, **{"distances": True, "html": True, **options}
    )
    return Image.open(folder / "sheet.png")


@pytest.mark.parametrize("rows, columns, down", [(2, 2, "rows"), (3, 2, "rows"), (2, 3, "columns"), (1, 4, "columns")])
def test_the_longer_side_of_a_table_goes_down(tmp_path, monkeypatch, rows, columns, down):
    """The distances are from the last picture of a sampler, in either orientation of the table."""
    seen = {}

    def record(title, cells, **labels):
        seen.update(cells=cells, **labels)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(sheet, "contact_sheet", record)
    names = {"rows": ["euler", "heun", "lms"][:rows], "columns": [f"steps {i}" for i in range(columns)]}
    table(tmp_path, **names)
    across = "rows" if down == "columns" else "columns"
    assert (seen["left"], seen["top"]) == (names[down], names[across])
    for (label, note, path), (left, top) in zip(
        seen["cells"], itertools.product(seen["left"], seen["top"]), strict=True
    ):
        row, column = (top, left) if down == "columns" else (left, top)
        assert label == "" and path.name == f"{row}-{column}.png"
        apart = 20 * (columns - 1 - names["columns"].index(column)) / 3**0.5  # one of three channels differs
        assert note == f"4 evaluations, 1.0 s\ndifference {apart:.1f}"


def test_no_chunk_of_a_picture_is_another_tools(tmp_path):
    """ComfyUI takes `prompt` and `workflow` for its JSON, and only without them reads `parameters`."""
    settings = {"prompt": "Grüße, 宇航员", "sampler": "euler", "workflow": "none"}
    write_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings, "Grüße\nSteps: 2")
    with Image.open(tmp_path / "a.png") as image:
        assert dict(image.text).keys() == {"k-diffusing", "parameters"}
        assert json.loads(image.text["k-diffusing"]) == settings and image.text["parameters"] == "Grüße\nSteps: 2"
    assert read_settings(tmp_path / "a.png") == {**settings, "parameters": "Grüße\nSteps: 2"}


@pytest.mark.parametrize("chunk", ["", "{", "[]", "1"])
def test_a_chunk_of_another_tool_is_no_settings(tmp_path, chunk):
    info = PngInfo()
    info.add_itxt("k-diffusing", chunk)
    info.add_text("parameters", "a cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert read_settings(tmp_path / "a.png") == {"parameters": "a cat"}


@pytest.mark.parametrize("word", ["word ", "x", "宇航员"])
def test_a_long_prompt_is_cut_with_an_ellipsis(word):
    """A sheet with 60,000 letters is as high as with 6,000."""
    entries = [("a", word * 20_000, None)]
    sheets = [contact_sheet(["title", word * count], entries) for count in (20_000, 2_000)]
    assert sheets[0].height == sheets[1].height
    lines = pictures.wrapped(word * 20_000, pictures.ImageFont.load_default(size=15), 600, 6)
    assert len(lines) == 6 and lines[-1].endswith("…") and not any(line.endswith("…") for line in lines[:5])


def test_letters_that_no_font_has_are_escaped(monkeypatch):
    monkeypatch.setattr(pictures, "FONTS", ())
    monkeypatch.setattr(pictures, "fonts_with", lambda letters: [])
    assert pictures.readable("cat, 宇航员 🚀", 15)[0] == "cat, \\u5b87\\u822a\\u5458 \\U0001f680"


def test_a_font_that_has_the_letters_is_used(monkeypatch):
    """Cyrillic, which Pillow's font lacks, from a font of this machine, if there is one."""
    fonts = pictures.fonts_with(frozenset("Пёс"))
    if not fonts:
        pytest.skip("no font here has Cyrillic letters")
    monkeypatch.setattr(pictures, "FONTS", ())
    text, font = pictures.readable("Пёс 🚀", 15)
    assert text == "Пёс \\U0001f680" and font.path in fonts
