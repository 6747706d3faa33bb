"""The page of `compare.py --against exact`: one HTML file, to be looked at without a server or a network."""

from __future__ import annotations

import math
from html import escape

import torch

from parity.exact import KNOWN
from parity.judge import DETERMINISTIC, Answer, Row, number
from parity.report import WIDTHS, curves, html_page, html_table, svg_text


def page(answer: Answer) -> str:
    """The whole page."""
    mixture = "a mixture of eight Gaussians in 16 dimensions, with its exact denoiser as network"
    parts = list[str]()
    if answer.rows:
        keys = {"sampler": "error", **{name: name for name in DETERMINISTIC}}
        points = {name: [(row["evaluations"], row[key]) for row in answer.rows] for name, key in keys.items()}
        ticks = [row["evaluations"] for row in answer.rows]
        parts.append(f"<h2>Error over evaluations{', with eta=0' if answer.stochastic else ''}</h2>")
        parts.append(curves("Error over evaluations of the network", points, ticks, math.log10))
        parts.append(_table(answer.rows))
    if len(answer.samples):
        parts.append("<h2>True and drawn samples, in the plane of the first two principal axes</h2>")
        parts += [_scatter(answer.samples, kind, width) for kind, width in WIDTHS.items()]
    for name, draws in answer.draws.items():
        parts.append(f"<h2>4,000 samples: {escape(name)}</h2>{_table(draws)}")
    marks = {True: "kept", False: "broken", None: "not judged"}
    rules = [
        ("class=first" if rule.kept is False else "", [marks[rule.kept], escape(rule.name), escape(rule.words)])
        for rule in answer.rules
    ]
    parts.append(f"<h2>Rules</h2>{html_table(['', 'rule', 'found'], rules, 'words')}")
    return html_page(answer.name, f"{answer.family.upper()}: {mixture}", answer.verdict, answer.right, parts)


def _table(rows: list[Row]) -> str:
    return html_table(rows[0], [("", [number(value) for value in row.values()]) for row in rows])


def _scatter(samples: torch.Tensor, kind: str, width: int) -> str:
    """1,000 true and 1,000 drawn samples."""
    side, true = min(width, 520), KNOWN.sample(1000, torch.Generator().manual_seed(1))
    axes = torch.linalg.eigh(KNOWN.covariance).eigenvectors[:, -2:]
    sets = {"euler": (true - KNOWN.mean) @ axes, "sampler": (samples[:1000] - KNOWN.mean) @ axes}
    reach = 1.1 * max(points.abs().quantile(0.999).item() for points in sets.values())
    parts = [f'<svg class="{kind}" viewBox="0 0 {width} {side + 24}" role="img" aria-label="True and drawn samples">']
    for name, points in sets.items():
        places = ((points / reach + 1) * side / 2).clamp(0, side).tolist()
        parts += [f'<circle class="{name}" cx="{x:.0f}" cy="{y:.0f}" r="1.3" fill-opacity=".5"/>' for x, y in places]
    parts += [svg_text("euler", 8, side + 16, "true"), svg_text("sampler", 78, side + 16, "drawn by the sampler")]
    return "".join(parts) + "</svg>"
