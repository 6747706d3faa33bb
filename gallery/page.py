"""A sheet as one HTML file: its pictures in the same place, one after the other, and their settings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from gallery.pictures import Cells, read_settings, write_whole


def write_page(path: Path, title: list[str], cells: Cells, top: Sequence[str], left: Sequence[str]) -> None:
    """Writes the cells that `contact_sheet` draws, with their files inside."""
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
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    page_text = page.substitute(values, left="max-content" if top else "")
    write_whole(path, lambda temporary: temporary.write_text(page_text, encoding="utf-8"))
