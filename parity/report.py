"""The report of a comparison: one HTML file with its pictures inside, to be looked at without a server or a network."""

from __future__ import annotations

import base64
import io
import json
import math
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from parity.follow import Session
from parity.result import Result, Trajectory

WIDE, NARROW, HEIGHT = 760, 360, 260  # of the curve: at its size its labels are of the text's size
LEFT, RIGHT, TOP, BOTTOM = 44, 70, 18, 34  # its margins


def report(session: Session, result: Result, ours: Trajectory, theirs: Trajectory) -> str:
    """The whole page."""
    final = [session.picture(side.final) for side in (ours, theirs)]
    difference, gain = _difference(*final)
    steps = []
    for i, row in enumerate(result.rows):
        previews = [_uri(session.picture(side.step_evaluations(i)[0].denoised), 320, 80) for side in (ours, theirs)]
        name = session.level_name
        label = f"Step {row.step} of {result.steps}, {name} {row.level:.5g}"
        text = f"latents differ by {row.latents:.1e}, predictions by {row.denoised:.1e}"
        steps.append({"previews": previews, "label": label, "text": text})
    first = max(result.cause.step, 1) if result.cause else result.steps
    data = json.dumps({"steps": steps, "first": first}).replace("</", "<\\/")
    pictures = [
        (result.ours, _uri(final[0], 512, 92), "our picture"),
        (result.theirs, _uri(final[1], 512, 92), "their picture"),
        (f"difference, {gain:.3g} times", _uri(difference, 512, 92), "difference of the two pictures"),
    ]
    figures = "".join(
        f'<figure><img src="{uri}" alt="{alt}"><figcaption>{escape(text)}</figcaption></figure>'
        for text, uri, alt in pictures
    )
    title = f"{result.ours} and {result.theirs}"
    options = session.options
    about = (
        f"{session.family.name.upper()}, model {options.model}, {result.steps} steps, guidance {session.guidance:g},"
        f" seed {options.seed}, {str(session.network.dtype)[6:]}: {options.prompt}"
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    parts = [f'<h2>The pictures</h2>\n<div class="pictures">{figures}</div>']
    if result.rows:
        parts.append(
            _STEPS.format(
                last=len(result.rows),
                first=first,
                ours=escape(result.ours),
                theirs=escape(result.theirs),
                curve=_curve(result, WIDE, "wide") + _curve(result, NARROW, "narrow"),
                rows=_rows(result),
                level=session.level_name,
                data=data,
                script=_SCRIPT,
            )
        )
    parts += [_switches(result), f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""]
    return html_page(title, about, result.verdict, result.cause is None, parts)


def html_page(title: str, about: str, verdict: str, good: bool, parts: list[str], style: str = "") -> str:
    """A whole page with this title, verdict and these parts, which are HTML already."""
    return _PAGE.format(
        title=escape(title),
        style=STYLE + style,
        about=escape(about),
        state="same" if good else "parts",
        verdict=escape(verdict[0].upper() + verdict[1:]),
        parts="\n".join(parts),
    )


def _uri(image: Image.Image, longest: int, quality: int) -> str:
    """A JPEG as a data URI, its longer side no longer than `longest`."""
    image = image.convert("RGB")
    image.thumbnail((longest, longest))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _difference(one: Image.Image, other: Image.Image) -> tuple[Image.Image, float]:
    """|one - other|, made so bright that its largest value is white, and by how much it was."""
    difference = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    largest = int(np.asarray(difference).max())
    gain = 255 / largest if largest else 1.0
    return difference.point(lambda value: min(255, round(value * gain))), gain


def _curve(result: Result, width: int, name: str) -> str:
    """The differences over the steps as SVG of this class, in log10, with the tolerance and the first parting."""
    values = [value for row in result.rows for value in (row.latents, row.denoised) if 0 < value < math.inf]
    low = math.floor(math.log10(max(min([*values, result.tolerance]), result.tolerance / 1e3)))
    high = max(math.ceil(math.log10(max([*values, result.tolerance]))), low + 2)
    count = len(result.rows)

    def x(step: int) -> float:
        return LEFT + (step - 1) / max(count - 1, 1) * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        log = math.log10(value) if value > 0 else high if math.isnan(value) else low
        log = min(max(log, low), high)
        return TOP + (high - log) / (high - low) * (HEIGHT - TOP - BOTTOM)

    label = "Relative difference over the steps"
    parts = [f'<svg class="{name}" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}">']
    for power in range(low, high + 1, max(1, (high - low) // 6)):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    for step in sorted({1, count, *range(5, count, 5)}):
        if step in (1, count) or count - step > 1:
            parts.append(f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{step}</text>')
    at = y(result.tolerance)
    parts.append(f'<line class="tolerance" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    parts.append(f'<text class="tick" x="{width - RIGHT + 8}" y="{at + 4:.1f}">tolerance</text>')
    if result.cause is not None:
        at = x(max(result.cause.step, 1))
        anchor, shift = ("end", -6) if at > width / 2 else ("start", 6)
        parts.append(f'<line class="parting" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        words = f"parts here: {escape(result.cause.kind)}"
        parts.append(f'<text class="mark" x="{at + shift:.1f}" y="{TOP - 5}" text-anchor="{anchor}">{words}</text>')
    parts.append(f'<line class="cursor" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    last = list[float]()
    for kind in ("latents", "denoised"):
        points = [(x(row.step), y(getattr(row, kind))) for row in result.rows]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        parts += [f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="2.5"/>' for px, py in points]
        at = points[-1][1]
        if last and abs(at - last[0]) < 14:
            at = last[0] + (14 if at >= last[0] else -14)
        last.append(at)
        parts.append(f'<text class="{kind}" x="{width - RIGHT + 8}" y="{at + 4:.1f}">{kind}</text>')
    return "".join(parts) + "</svg>"


def _rows(result: Result) -> str:
    lines = []
    marked = {max(cause.step, 1) for cause in [result.cause, *result.others] if cause is not None}
    for row in result.rows:
        timesteps = ["/".join(f"{t:.3f}".rstrip("0").rstrip(".") for t in side) for side in row.timesteps]
        cells = [row.step, f"{row.level:.5g}", f"{row.latents:.1e}", f"{row.denoised:.1e}", *timesteps]
        over = [not value <= result.tolerance for value in (row.latents, row.denoised)]
        past = [False, False, *over, False, False]
        tds = "".join(f"<td{' class=past' if one else ''}>{value}</td>" for value, one in zip(cells, past))
        lines.append(f'<tr data-step="{row.step}"{" class=first" if row.step in marked else ""}>{tds}</tr>')
    return "".join(lines)


def _switches(result: Result) -> str:
    if not result.switches:
        return ""

    def outcome(switch: Any) -> str:
        return "removes the difference" if switch.removes else f"part at step {switch.parts}"

    lines = "".join(
        f"<tr{' class=removes' if switch.removes else ''}><td>{escape(switch.name)}</td><td>{switch.side}</td>"
        f"<td>{switch.difference:.1e}</td><td>{outcome(switch)}</td></tr>"
        for switch in result.switches
    )
    head = "<tr><th>switch</th><th>side</th><th>largest difference</th><th></th></tr>"
    return f"<h2>Switches tried</h2><div class=scroll><table class=words>{head}{lines}</table></div>"


STYLE = """
:root { color-scheme: light; --ink: #1c2024; --soft: #60646c; --line: #d9dde3; --latents: #0b62c4; --denoised: #0f7b3e;
  --bad: #b42318; --paper: #fff; --mark: #fff4e5; --good: #ecf7f0; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 32px 0 10px; }
.about { color: var(--soft); margin: 0 0 16px; }
.verdict { border-left: 4px solid var(--bad); background: var(--mark); padding: 10px 14px; margin: 0; }
.verdict.same { border-color: var(--denoised); background: var(--good); }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 320px)); gap: 16px; }
figure { margin: 0; } img { width: 100%; display: block; border: 1px solid var(--line); image-rendering: auto; }
figcaption { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; margin-top: 4px; }
input[type=range] { width: 100%; max-width: 656px; display: block; margin: 6px 0 10px; accent-color: var(--latents); }
output { display: block; } output b { margin-right: 10px; }
svg { width: 100%; max-width: 820px; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .tick { fill: var(--soft); } svg .mark { fill: var(--bad); font-weight: 600; }
svg .tolerance { stroke: var(--soft); stroke-dasharray: 5 4; } svg .parting { stroke: var(--bad); stroke-width: 1.5; }
svg polyline { fill: none; stroke-width: 1.8; } svg polyline.latents { stroke: var(--latents); }
svg polyline.denoised { stroke: var(--denoised); } svg circle.latents, svg text.latents { fill: var(--latents); }
svg circle.denoised, svg text.denoised { fill: var(--denoised); } svg .cursor { stroke: var(--ink); stroke-opacity: .25;
  stroke-width: 7; }
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

# what there is to say of each step, where both sides take the same number of them
_STEPS = """<h2><label for="step">What each step predicts</label></h2>
<input id="step" type="range" min="1" max="{last}" value="{first}" autofocus>
<output id="label" for="step"></output>
<div class="pair">
<figure><img id="ours" alt="what ours predicts"><figcaption>{ours}</figcaption></figure>
<figure><img id="theirs" alt="what theirs predicts"><figcaption>{theirs}</figcaption></figure>
</div>
<h2>Relative difference over the steps</h2>
{curve}
<h2>Step by step</h2>
<div class="scroll"><table>
<thead><tr><th>step</th><th>{level}</th><th>latents</th><th>denoised</th>
<th>timestep, ours</th><th>timestep, theirs</th></tr></thead>
<tbody>{rows}</tbody>
</table></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
"""
