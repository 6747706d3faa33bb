"""The page of `compare.py --against exact`: one HTML file, to be looked at without a server or a network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

import torch

from parity.exact import KNOWN
from parity.judge import Answer
from parity.report import html_page

COLOURS = ("own", "euler", "heun", "dpmpp_2m")
MORE = """
:root { --own: #0b62c4; --euler: #8a5a00; --heun: #0f7b3e; --dpmpp_2m: #9b2fae; }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark; --ink: #e8eaed; --soft: #a2a8b0; --line: #3a3f46;
  --paper: #16181b; --mark: #33261a; --good: #14301f; --own: #6cb0ff; --euler: #d8a03c; --heun: #5cc98a;
  --dpmpp_2m: #d78ae6; --denoised: #5cc98a; --bad: #ff8a7a; --latents: #6cb0ff; } }
svg .line.own { stroke-width: 3; } svg text { stroke: none; } svg .line { fill: none; }
""" + "".join(
    f"svg .line.{name}, svg .dot.{name} {{ stroke: var(--{name}); }} svg .dot.{name}, svg text.{name} "
    f"{{ fill: var(--{name}); }}\n"
    for name in COLOURS
)


def page(answer: Answer) -> str:
    """The whole page."""
    about = (
        f"{answer.family.upper()}: a mixture of eight Gaussians in 16 dimensions, with its exact denoiser as network"
    )
    parts = list[str]()
    if answer.rows:
        with_eta = ", with eta=0" if answer.stochastic else ""
        parts.append(f"<h2>Error over evaluations{with_eta}</h2>{_both(_work_precision, answer)}")
        heads = [key for key in answer.rows[0] if key != "steps" or "rtol" not in answer.rows[0]]
        parts.append(_table(heads, ([_number(row[key]) for key in heads] for row in answer.rows)))
    if answer.samples is not None:
        parts.append("<h2>True and drawn samples, in the plane of the first two principal axes</h2>")
        parts.append(_both(_scatter, answer))
    for name, draws in answer.draws.items():
        parts.append(f"<h2>4,000 samples: {escape(name)}</h2>")
        parts.append(_table(list(draws[0]), ([_number(value) for value in row.values()] for row in draws)))
    marks = {True: "kept", False: "broken", None: "not judged"}
    rules = ([marks[rule.kept], escape(rule.name), escape(rule.words)] for rule in answer.rules)
    parts.append(f"<h2>Rules</h2>{_table(['', 'rule', 'found'], rules, 'words')}")
    return html_page(answer.name, about, answer.verdict, answer.right, parts, MORE)


def _number(value: float) -> str:
    return "" if math.isnan(value) else str(value) if isinstance(value, int) else f"{value:.3g}"


def _table(heads: list[str], rows: Iterable[list[str]], kind: str = "") -> str:
    lines = "".join(
        f"<tr{' class=first' if cells[0] == 'broken' else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for cells in rows
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{lines}</table></div>'


def _both(draw, answer: Answer) -> str:
    """For a wide and a narrow window, at whose size the labels are of the text's size."""
    return draw(answer, 760, "wide") + draw(answer, 360, "narrow")


def _work_precision(answer: Answer, width: int, kind: str) -> str:
    """Error over evaluations, both in log10; the sampler's own line is thick."""
    height, left, right, top, bottom = 320, 48, 84, 12, 34
    lines = {"own": [(row["evaluations"], row["error"]) for row in answer.rows]}
    lines |= {name: [(row["evaluations"], row[name]) for row in answer.rows] for name in COLOURS[1:]}
    points = [(math.log10(n), math.log10(error)) for line in lines.values() for n, error in line if error > 0]
    (x0, x1), (y0, y1) = ((min(side), max(side)) for side in zip(*points))
    y0, y1 = math.floor(y0), math.ceil(y1)

    def place(n: float, error: float) -> tuple[float, float]:
        across = (math.log10(n) - x0) / max(x1 - x0, 1e-9)
        down = (y1 - math.log10(max(error, 1e-300))) / max(y1 - y0, 1e-9)
        return left + across * (width - left - right), top + min(max(down, 0), 1) * (height - top - bottom)

    label = "Error over evaluations of the network"
    parts = [f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    for power in range(y0, y1 + 1):
        y = place(10**x0, 10.0**power)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
    for n, _ in lines["own"]:
        at = place(n, 1)[0]
        parts.append(f'<text class="tick" x="{at:.1f}" y="{height - 12}" text-anchor="middle">{n}</text>')
    taken = list[float]()
    for name, line in reversed(lines.items()):
        placed = [place(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line {name}" points="{path}"/>')
        parts += [f'<circle class="dot {name}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed]
    for name, line in sorted(lines.items(), key=lambda one: place(*one[1][-1])[1]):
        at = max([place(*line[-1])[1], *(y + 15 for y in taken[-1:])])
        taken.append(at)
        words = "this one" if name == "own" else name
        parts.append(f'<text class="{name}" x="{width - right + 8}" y="{at + 4:.1f}">{words}</text>')
    return "".join(parts) + "</svg>"


def _scatter(answer: Answer, width: int, kind: str) -> str:
    """1,000 true and 1,000 drawn samples."""
    assert answer.samples is not None  # as its caller knows
    side = min(width, 520)
    true = KNOWN.sample(1000, torch.Generator().manual_seed(1))
    axes = torch.linalg.eigh(KNOWN.covariance).eigenvectors[:, -2:]
    sets = {"euler": (true - KNOWN.mean) @ axes, "own": (answer.samples[:1000] - KNOWN.mean) @ axes}
    reach = 1.1 * max(points.abs().quantile(0.999).item() for points in sets.values())
    parts = [f'<svg class="{kind}" viewBox="0 0 {width} {side + 24}" role="img" aria-label="True and drawn samples">']
    for i, (name, points) in enumerate(sets.items()):
        for x, y in ((points / reach + 1) * side / 2).clamp(0, side).tolist():
            parts.append(
                f'<circle class="dot {name}" cx="{x:.0f}" cy="{y:.0f}" r="1.3" fill-opacity=".5" stroke="none"/>'
            )
        words = "drawn by it" if name == "own" else "true"
        parts.append(f'<text class="{name}" x="{8 + 70 * i}" y="{side + 16}">{words}</text>')
    return "".join(parts) + "</svg>"
