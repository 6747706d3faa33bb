"""The pages of `compare.py`, each one HTML file with its pictures inside, without a server or a network."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image, ImageChops

from parity.exact import KNOWN
from parity.follow import Session
from parity.judge import DETERMINISTIC, Answer
from parity.result import Result, Trajectory

WIDTH, HEIGHT = 600, 280  # of a diagram
LEFT, RIGHT, TOP, BOTTOM = 60, 100, 26, 34  # its margins


def report(session: Session, result: Result, ours: Trajectory, theirs: Trajectory) -> str:
    """The page of two sides."""
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
        outcomes = ["removes the difference" if s.removes else f"diverge at step {s.parts}" for s in result.switches]
        rows = [
            ("class=removes" * switch.removes, [escape(switch.name), switch.side, f"{switch.difference:.1e}", outcome])
            for switch, outcome in zip(result.switches, outcomes)
        ]
        parts.append(f"<h2>Switches tried</h2>{_table(['switch', 'side', 'largest difference', ''], rows, 'words')}")
    return _page(f"{result.ours} and {result.theirs}", about, result.verdict, result.cause is None, parts)


def answer_page(answer: Answer) -> str:
    """The page of `--against exact`."""
    parts = list[str]()
    if answer.rows:
        keys = {"sampler": "error", **{name: name for name in DETERMINISTIC}}
        points = {name: [(row["evaluations"], row[key]) for row in answer.rows] for name, key in keys.items()}
        ticks = [row["evaluations"] for row in answer.rows]
        parts.append(f"<h2>Error over evaluations{', with eta=0' if answer.stochastic else ''}</h2>")
        parts += [_curves("Error over evaluations of the network", points, ticks, math.log10), _numbers(answer.rows)]
    if len(answer.samples):
        parts.append("<h2>True and drawn samples, in the plane of the first two principal axes</h2>")
        parts.append(_scatter(answer.samples))
    for name, draws in answer.draws.items():
        parts.append(f"<h2>4,000 samples: {escape(name)}</h2>{_numbers(draws)}")
    marks = {True: "kept", False: "broken", None: "not judged"}
    rules = [
        ("class=first" if rule.kept is False else "", [marks[rule.kept], escape(rule.name), escape(rule.words)])
        for rule in answer.rules
    ]
    parts.append(f"<h2>Rules</h2>{_table(['', 'rule', 'found'], rules, 'words')}")
    about = (
        f"{answer.family.upper()}: a mixture of eight Gaussians in 16 dimensions, with its exact denoiser as network"
    )
    return _page(answer.name, about, answer.verdict, not answer.wrong, parts)


def _page(title: str, about: str, verdict: str, good: bool, parts: list[str]) -> str:
    texts = {"title": title, "about": about, "verdict": verdict[0].upper() + verdict[1:]}
    escaped = {name: escape(text) for name, text in texts.items()}
    return _filled("page", **escaped, state="same" if good else "parts", parts="\n".join(parts))


def _filled(name: str, **values: str) -> str:
    """The template of this name."""
    return Template(Path(__file__).with_name(f"{name}.html").read_text(encoding="utf-8")).substitute(values)


def _table(heads: Iterable[str], rows: Iterable[tuple[str, list[str]]], kind: str = "") -> str:
    """Each row is its attributes and its cells, which are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = "".join(f"<tr {kept}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for kept, cells in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{lines}</table></div>'


def _numbers(rows: Sequence[Mapping[str, float]]) -> str:
    return _table(rows[0], [("", [f"{value:.4g}".replace("nan", "") for value in row.values()]) for row in rows])


def _curves(
    label: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    ticks: list[int],
    scale: Callable[[float], float] = float,
    more: Callable[[Callable, Callable], list[str]] = lambda x, y: [],
    least: float = 0.0,
) -> str:
    """Lines of (x, y), y in log10.

    Args:
        lines: by class, which is also the label.
        ticks: of x, the first and the last of which are the ends of its axis.
        scale: of the x axis.
        more: what else to draw, by functions of x and y that give the place.
        least: no lower y is of interest.
    """
    values = [max(y, least) for line in lines.values() for _, y in line if 0 < y < math.inf] or [1.0]
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 2)
    first, span = scale(ticks[0]), (scale(ticks[-1]) - scale(ticks[0])) or 1.0

    def x(value: float) -> float:
        return LEFT + (scale(value) - first) / span * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        log = math.log10(value) if value > 0 else high if math.isnan(value) else low
        return TOP + (high - min(max(log, low), high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = list[str]()
    for power in range(low, high + 1, max(1, (high - low) // 6)):
        parts.append(_line("grid", (LEFT, WIDTH - RIGHT), (y(10.0**power),) * 2))
        parts.append(_text("tick", LEFT - 8, y(10.0**power) + 4, f"1e{power}", "end"))
    parts += [_text("tick", x(tick), HEIGHT - 12, f"{tick}", "middle") for tick in ticks]
    parts += more(x, y)
    for name, line in reversed([*lines.items()]):
        placed = [(x(at), y(value)) for at, value in line]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in placed)
        parts.append(f'<polyline class="{name}" points="{path}"/>')
        parts += [f'<circle class="{name}" cx="{across:.1f}" cy="{down:.1f}" r="2.5"/>' for across, down in placed]
    at = math.inf
    for end, name in sorted(((y(line[-1][1]), name) for name, line in lines.items()), reverse=True):
        at = min(end, at - 18)
        parts.append(_text(name, WIDTH - RIGHT + 8, at + 4, name))
    return _svg(label, WIDTH, HEIGHT, parts)


def _scatter(samples: torch.Tensor) -> str:
    """1,000 true and 1,000 drawn samples."""
    side, true = 520, KNOWN.sample(1000, torch.Generator().manual_seed(1))
    axes = torch.linalg.eigh(KNOWN.covariance).eigenvectors[:, -2:]
    sets = {"euler": (true - KNOWN.mean) @ axes, "sampler": (samples[:1000] - KNOWN.mean) @ axes}
    reach = 1.1 * max(points.abs().quantile(0.999).item() for points in sets.values())
    parts = list[str]()
    for name, points in sets.items():
        places = ((points / reach + 1) * side / 2).clamp(0, side).tolist()
        parts += [f'<circle class="{name}" cx="{x:.0f}" cy="{y:.0f}" r="1.3" fill-opacity=".5"/>' for x, y in places]
    parts += [_text("euler", 8, side + 16, "true"), _text("sampler", 78, side + 16, "drawn by the sampler")]
    return _svg("True and drawn samples", side, side + 24, parts)


def _svg(label: str, width: int, height: int, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _line(name: str, x: tuple[float, float], y: tuple[float, float]) -> str:
    return f'<line class="{name}" x1="{x[0]:.1f}" x2="{x[1]:.1f}" y1="{y[0]:.1f}" y2="{y[1]:.1f}"/>'


def _text(name: str, x: float, y: float, words: str, anchor: str = "start") -> str:
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
    count = len(result.rows)
    previews = [
        [_uri(session.picture(side.step_evaluations(i)[0].denoised), 320, 80) for side in (ours, theirs)]
        for i in range(count)
    ]

    def marks(x: Callable, y: Callable) -> list[str]:
        """The tolerance, the step at which the sides diverge, and the chosen step."""
        at, ends = y(result.tolerance), (TOP, HEIGHT - BOTTOM)
        parts = [_line("tolerance", (LEFT, WIDTH - RIGHT), (at, at))]
        parts.append(_text("tick", WIDTH - RIGHT + 8, at + 4, "tolerance"))
        if result.cause is not None:
            at = x(max(result.cause.step, 1))
            anchor, shift = ("end", -6) if at > WIDTH / 2 else ("start", 6)
            parts.append(_line("parting", (at, at), ends))
            parts.append(_text("mark", at + shift, TOP - 8, f"diverges here: {result.cause.kind}", anchor))
        return [*parts, _line("cursor", (x(1),) * 2, ends)]

    lines = {kind: [(row.step, getattr(row, kind)) for row in result.rows] for kind in ("latents", "denoised")}
    ticks = [1, *(step for step in range(5, count - 1, 5)), count]
    marked = {max(cause.step, 1) for cause in [result.cause, *result.others] if cause is not None}

    rows = list[tuple[str, list[str]]]()
    for row in result.rows:
        step, level, one, other, *differences = row.cells()  # on a narrow screen the differences come first
        attributes = f'data-step="{row.step}"' + " class=first" * (row.step in marked)
        rows.append((attributes, [step, level, *differences, one, other]))
    sides = (("ours", result.ours), ("theirs", result.theirs))
    return _filled(
        "steps",
        last=f"{count}",
        first=f"{max(result.cause.step, 1) if result.cause else count}",
        level=session.level_name,
        pair="".join(_figure(f'id="{side}" alt="what {side} predicts"', text) for side, text in sides),
        curve=_curves("Relative difference", lines, ticks, more=marks, least=result.tolerance / 1e3),
        table=_table(["step", session.level_name, "latents", "denoised", "timestep, ours", "timestep, theirs"], rows),
        previews=json.dumps(previews),
    )
