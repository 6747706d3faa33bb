"""The report of a comparison: one HTML file with its pictures inside, to be looked at without a server or a network."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image, ImageChops

from parity.follow import Session
from parity.result import Result, Row, Trajectory

WIDTHS, HEIGHT = {"wide": 760, "narrow": 360}, 280  # of a diagram: at its size its labels are of the text's size
LEFT, RIGHT, TOP, BOTTOM = 46, 76, 18, 34  # its margins


def report(session: Session, result: Result, ours: Trajectory, theirs: Trajectory) -> str:
    """The whole page."""
    final = [session.picture(side.final) for side in (ours, theirs)]
    difference = ImageChops.difference(*(image.convert("RGB") for image in final))
    gain = 255 / max(int(np.asarray(difference).max()), 1)  # so bright that its largest value is white
    brighter = difference.point(lambda value: min(255, round(value * gain)))
    pictures = zip((*final, brighter), (result.ours, result.theirs, f"difference, {gain:.3g} times"))
    figures = "".join(_figure(f'src="{_uri(image, 512, 92)}" alt="final picture"', text) for image, text in pictures)
    options, network = session.options, str(session.network.dtype)[6:]
    about = f"{session.family.name.upper()}, model {options.model}, {result.steps} steps"
    about += f", guidance {session.guidance:g}, seed {options.seed}, {network}: {options.prompt}"
    parts = [f'<h2>The pictures</h2>\n<div class="pictures">{figures}</div>']
    if result.rows:
        parts.append(_steps(session, result, ours, theirs))
    if result.switches:
        rows = list[tuple[str, list[str]]]()
        for switch in result.switches:
            outcome = "removes the difference" if switch.removes else f"diverge at step {switch.parts}"
            cells = [escape(switch.name), switch.side, f"{switch.difference:.1e}", outcome]
            rows.append(("class=removes" * switch.removes, cells))
        heads = ["switch", "side", "largest difference", ""]
        parts.append(f"<h2>Switches tried</h2>{html_table(heads, rows, 'words')}")
    if result.notes:
        parts.append(f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in result.notes)}</ul>")
    return html_page(f"{result.ours} and {result.theirs}", about, result.verdict, result.cause is None, parts)


def html_page(title: str, about: str, verdict: str, good: bool, parts: list[str]) -> str:
    """A whole page with this title, verdict and these parts, which are HTML already."""
    title, about, verdict = map(escape, (title, about, verdict[0].upper() + verdict[1:]))
    state = "same" if good else "parts"
    return _PAGE.format(title=title, style=_STYLE, about=about, state=state, verdict=verdict, parts="\n".join(parts))


def html_table(heads: Iterable[str], rows: Iterable[tuple[str, list[str]]], kind: str = "") -> str:
    """A table. Each row is its attributes and its cells, which are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = "".join(f"<tr {kept}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for kept, cells in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{lines}</table></div>'


def curves(
    label: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    ticks: list[int],
    scale: Callable[[float], float] = float,
    more: Callable[[Callable, Callable, int], str] = lambda x, y, width: "",
    least: float = 0.0,
) -> str:
    """Lines of (x, y) as SVG for a wide and for a narrow window, y in log10.

    Args:
        lines: by class, which is also the label.
        ticks: of x, the first and the last of which are the ends of its axis.
        scale: of the x axis.
        more: what else to draw, by functions of x and y that give the place, and the width.
        least: no lower y is of interest.
    """
    values = [max(y, least) for line in lines.values() for _, y in line if 0 < y < math.inf] or [1.0]
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 2)
    first, span = scale(ticks[0]), (scale(ticks[-1]) - scale(ticks[0])) or 1.0

    def y(value: float) -> float:
        log = math.log10(value) if value > 0 else high if math.isnan(value) else low
        return TOP + (high - min(max(log, low), high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def drawn(kind: str, width: int) -> str:
        def x(value: float) -> float:
            return LEFT + (scale(value) - first) / span * (width - LEFT - RIGHT)

        parts = [f'<svg class="{kind}" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}">']
        for power in range(low, high + 1, max(1, (high - low) // 6)):
            parts.append(svg_line("grid", (LEFT, width - RIGHT), (y(10.0**power),) * 2))
            parts.append(svg_text("tick", LEFT - 8, y(10.0**power) + 4, f"1e{power}", "end"))
        parts += [svg_text("tick", x(tick), HEIGHT - 14, f"{tick}", "middle") for tick in ticks]
        parts.append(more(x, y, width))
        for name, line in reversed([*lines.items()]):
            placed = [(x(at), y(value)) for at, value in line]
            path = " ".join(f"{across:.1f},{down:.1f}" for across, down in placed)
            parts.append(f'<polyline class="{name}" points="{path}"/>')
            parts += [f'<circle class="{name}" cx="{across:.1f}" cy="{down:.1f}" r="2.5"/>' for across, down in placed]
        at = math.inf
        for end, name in sorted(((y(line[-1][1]), name) for name, line in lines.items()), reverse=True):
            at = min(end, at - 15)
            parts.append(svg_text(name, width - RIGHT + 8, at + 4, name))
        return "".join(parts) + "</svg>"

    return "".join(drawn(kind, width) for kind, width in WIDTHS.items())


def svg_line(name: str, x: tuple[float, float], y: tuple[float, float]) -> str:
    """A line from one point to another."""
    return f'<line class="{name}" x1="{x[0]:.1f}" x2="{x[1]:.1f}" y1="{y[0]:.1f}" y2="{y[1]:.1f}"/>'


def svg_text(name: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    """Words that begin, end or have their middle at a point."""
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _figure(image: str, text: str) -> str:
    return f"<figure><img {image}><figcaption>{escape(text)}</figcaption></figure>"


def _uri(image: Image.Image, longest: int, quality: int) -> str:
    """A JPEG as a data URI, its longer side no longer than `longest`."""
    image = image.convert("RGB")
    image.thumbnail((longest, longest))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _steps(session: Session, result: Result, ours: Trajectory, theirs: Trajectory) -> str:
    """What there is to show of each step: the predictions, the differences as curves, and the table."""
    steps, count, name = [], len(result.rows), session.level_name
    for i, row in enumerate(result.rows):
        previews = [_uri(session.picture(side.step_evaluations(i)[0].denoised), 320, 80) for side in (ours, theirs)]
        label = f"Step {row.step} of {result.steps}, {name} {row.level:.5g}"
        text = f"latents differ by {row.latents:.1e}, predictions by {row.denoised:.1e}"
        steps.append({"previews": previews, "label": label, "text": text})

    def marks(x: Callable, y: Callable, width: int) -> str:
        """The tolerance, the step at which the sides diverge, and the chosen step."""
        at, ends = y(result.tolerance), (TOP, HEIGHT - BOTTOM)
        parts = [svg_line("tolerance", (LEFT, width - RIGHT), (at, at))]
        parts.append(svg_text("tick", width - RIGHT + 8, at + 4, "tolerance"))
        if result.cause is not None:
            at = x(max(result.cause.step, 1))
            anchor, shift = ("end", -6) if at > width / 2 else ("start", 6)
            parts.append(svg_line("parting", (at, at), ends))
            parts.append(svg_text("mark", at + shift, TOP - 5, f"diverges here: {result.cause.kind}", anchor))
        return "".join([*parts, svg_line("cursor", (x(1),) * 2, ends)])

    lines = {kind: [(row.step, getattr(row, kind)) for row in result.rows] for kind in ("latents", "denoised")}
    ticks = [1, *(step for step in range(5, count - 1, 5)), count]
    curve = curves("Relative difference over the steps", lines, ticks, more=marks, least=result.tolerance / 1e3)
    marked = {max(cause.step, 1) for cause in [result.cause, *result.others] if cause is not None}

    def cells(row: Row) -> list[str]:
        step, level, one, other, *differences = row.cells()
        past = [not value <= result.tolerance for value in (row.latents, row.denoised)]
        differences = [
            f"<span class=past>{cell}</span>" if is_past else cell for cell, is_past in zip(differences, past)
        ]
        return [step, level, *differences, one, other]

    rows = [(f'data-step="{row.step}"' + " class=first" * (row.step in marked), cells(row)) for row in result.rows]
    heads = ["step", name, "latents", "denoised", "timestep, ours", "timestep, theirs"]
    first = max(result.cause.step, 1) if result.cause else result.steps
    sides = (("ours", result.ours), ("theirs", result.theirs))
    return _STEPS.format(
        last=count,
        first=first,
        pair="".join(_figure(f'id="{side}" alt="what {side} predicts"', text) for side, text in sides),
        curve=curve,
        table=html_table(heads, rows),
        data=json.dumps({"steps": steps}).replace("</", "<\\/"),
        script=_SCRIPT,
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9dde3; --paper: #fff; --mark: #fff4e5;
  --good: #ecf7f0; --bad: #b42318; --blue: #0b62c4; --green: #0f7b3e; --brown: #8a5a00; --violet: #9b2fae; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a2a8b0; --line: #3a3f46; --paper: #16181b;
  --mark: #33261a; --good: #14301f; --bad: #ff8a7a; --blue: #6cb0ff; --green: #5cc98a; --brown: #d8a03c;
  --violet: #d78ae6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 32px 0 10px; }
.about { color: var(--soft); margin: 0 0 16px; }
.verdict { border-left: 4px solid var(--bad); background: var(--mark); padding: 10px 14px; margin: 0; }
.verdict.same { border-color: var(--green); background: var(--good); }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 320px)); gap: 16px; }
figure { margin: 0; } img { width: 100%; display: block; border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; margin-top: 4px; }
input[type=range] { width: 100%; max-width: 656px; display: block; margin: 6px 0 10px; accent-color: var(--blue); }
output { display: block; } output b { margin-right: 10px; }
svg { width: 100%; max-width: 820px; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg line { stroke: var(--line); } svg .tick { fill: var(--soft); } svg .mark { fill: var(--bad); font-weight: 600; }
svg .tolerance { stroke: var(--soft); stroke-dasharray: 5 4; } svg .parting { stroke: var(--bad); stroke-width: 1.5; }
svg .cursor { stroke: var(--ink); stroke-opacity: .25; stroke-width: 7; }
svg polyline { fill: none; stroke: currentColor; stroke-width: 1.8; } svg circle, svg text { fill: currentColor; }
svg .latents, svg .sampler { color: var(--blue); } svg .denoised, svg .heun { color: var(--green); }
svg .euler { color: var(--brown); } svg .dpmpp_2m { color: var(--violet); } svg polyline.sampler { stroke-width: 3; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: right; color: var(--soft); font-weight: 500; } th, td { padding: 3px 14px 3px 0; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
.words th, .words td { text-align: left; white-space: normal; } .past { color: var(--bad); }
tr.first td { background: var(--mark); } tr.removes td { background: var(--good); }
tr.now td:first-child { font-weight: 700; } tr[data-step] { cursor: pointer; }
svg.narrow { display: none; max-width: 480px; }
@media (max-width: 640px) { body { padding: 14px; } .pictures, .pair { gap: 8px; }
  svg.wide { display: none; } svg.narrow { display: block; } th, td { padding-right: 10px; } }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("step"), label = document.getElementById("label");
const previews = [document.getElementById("ours"), document.getElementById("theirs")];
const rows = document.querySelectorAll("tr[data-step]");
const curves = document.querySelectorAll("svg");
function show(step) {
  const now = data.steps[step - 1];
  if (!now) return;
  now.previews.forEach((uri, side) => { previews[side].src = uri; });
  label.replaceChildren(Object.assign(document.createElement("b"), { textContent: now.label }), now.text);
  slider.setAttribute("aria-valuetext", now.label + ", " + now.text);
  for (const curve of curves) {
    const at = curve.querySelectorAll("circle.latents")[step - 1].getAttribute("cx");
    for (const end of ["x1", "x2"]) curve.querySelector(".cursor").setAttribute(end, at);
  }
  rows.forEach(row => row.classList.toggle("now", Number(row.dataset.step) === step));
}
slider.addEventListener("input", () => show(Number(slider.value)));
rows.forEach(row => row.addEventListener("click", () => {
  slider.value = row.dataset.step;
  show(Number(slider.value));
}));
show(Number(slider.value));
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="about">{about}</p>
<p class="verdict {state}">{verdict}</p>
{parts}
</body>
</html>
"""

_STEPS = """<h2><label for="step">What each step predicts</label></h2>
<input id="step" type="range" min="1" max="{last}" value="{first}" autofocus>
<output id="label" for="step"></output>
<div class="pair">{pair}</div>
<h2>Relative difference over the steps</h2>
{curve}
<h2>Step by step</h2>
{table}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
"""
