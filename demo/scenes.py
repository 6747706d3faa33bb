"""The pictures and captions that the demo models are trained on: a subject in a place, in cold, warm or neutral
colours.

Everything is drawn here with Pillow, so no data set and no licence is involved. `python demo/scenes.py sheet.png` draws
one picture of every subject in every place.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
OVERSAMPLING = 3

Colour = tuple[int, int, int]
Point = tuple[float, float]

INK: Colour = (34, 32, 46)

SUBJECTS = {
    "astronaut": ("astronaut", "astronaut", "cosmonaut", "spaceman"),
    "robot": ("robot", "robot", "android"),
    "house": ("house", "house", "cottage"),
    "rocket": ("rocket", "rocket", "spaceship"),
    "cat": ("cat", "cat", "kitten"),
    "car": ("car", "car", "automobile"),
    "sailboat": ("sailboat", "boat", "sailing boat"),
    "balloon": ("hot-air balloon", "balloon", "hot air balloon"),
}
PLACES = {
    "jungle": ("in a jungle", "in the jungle", "in a rainforest", "among jungle trees", "deep in the jungle"),
    "desert": ("in a desert", "in the desert", "among sand dunes", "between dunes and cactuses"),
    "sea": ("at sea", "on the sea", "in the ocean", "on the waves of the sea"),
    "space": ("in space", "in outer space", "among the stars", "in deep space"),
    "snow": ("in snow", "in the snow", "in a snowy landscape", "in a winter landscape"),
    "city": ("in a city", "in the city", "among skyscrapers", "on a city street"),
}
PALETTES = {
    "cold": ("cold color palette", "cold colors", "cold colours", "cool tones", "cold palette"),
    "warm": ("warm color palette", "warm colors", "warm colours", "warm tones", "warm palette"),
    "neutral": ("neutral color palette", "neutral colors", "natural colours", "neutral tones"),
}
TONES = {
    "muted": ("muted colors", "muted colours", "pale colors", "faded colors"),
    "vivid": ("vivid colors", "bright colours", "saturated colors", "vibrant colors"),
    "plain": (),
}
STYLES = ("detailed", "8k", "illustration", "high quality", "sharp focus", "digital art", "clean lines", "flat design")


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `seed` decides everything else: positions, sizes, variants."""

    subject: str
    place: str
    palette: str = "neutral"
    tone: str = "plain"
    seed: int = 0


def random_scene(rng: random.Random) -> Scene:
    """A scene with every part drawn independently."""
    return Scene(
        subject=rng.choice(list(SUBJECTS)),
        place=rng.choice(list(PLACES)),
        palette=rng.choice(list(PALETTES)),
        tone=rng.choices(list(TONES), weights=(3, 2, 3))[0],
        seed=rng.randrange(2**31),
    )


def caption(scene: Scene, rng: random.Random, partial: float = 0.12) -> str:
    """A caption of `scene`, worded at random.

    With probability `partial` it names only some of the parts, as negative prompts do. A full caption omits only the
    neutral palette and the plain tone, so that an omitted word has a meaning.
    """
    subject = rng.choice(SUBJECTS[scene.subject])
    place = rng.choice(PLACES[scene.place])
    palette = rng.choice(PALETTES[scene.palette])
    tone = rng.choice(TONES[scene.tone]) if TONES[scene.tone] else ""
    subject = rng.choice((f"a {subject}", f"a {subject}", f"the {subject}", subject, f"one {subject}"))
    if subject.startswith("a a"):
        subject = "an" + subject[1:]
    if rng.random() < partial:
        kept = [part for part in (subject, place, palette, tone) if part and rng.random() < 0.4]
        return ", ".join(kept or [subject])
    text = rng.choice(
        (
            f"{subject} {place}",
            f"{subject} {place}",
            f"{subject}, {place}",
            f"a picture of {subject} {place}",
            f"a drawing of {subject} {place}",
            f"{place}, {subject}",
        )
    )
    extras = [tone] if tone else []
    if scene.palette != "neutral" or rng.random() < 0.5:
        extras.append(palette)
    rng.shuffle(extras)
    extras += rng.sample(STYLES, rng.choices((0, 1, 2, 3), weights=(4, 3, 3, 1))[0])
    if extras and extras[0] in (palette, tone) and rng.random() < 0.3:
        text = f"{text} in {extras.pop(0)}"
    text = ", ".join([text, *extras])
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    return text + rng.choice(("", "", "", "."))


# --- drawing ---------------------------------------------------------------------------------------------------------


class Pen:
    """Pillow's draw calls in units of a 128-pixel picture, with an affine map in front (centre, scale, mirror)."""

    def __init__(self, draw: ImageDraw.ImageDraw, x: float = 0, y: float = 0, scale: float = 1, mirror: bool = False):
        self.draw, self.x, self.y, self.scale, self.mirror = draw, x, y, scale, -1 if mirror else 1

    def _map(self, x: float, y: float) -> Point:
        return (
            (self.x + self.mirror * self.scale * x) * OVERSAMPLING,
            (self.y + self.scale * y) * OVERSAMPLING,
        )

    def _width(self, width: float) -> int:
        return max(1, round(width * self.scale * OVERSAMPLING))

    def polygon(self, points: list[Point], fill: Colour, ink: Colour | None = INK, width: float = 1.6) -> None:
        mapped = [self._map(*point) for point in points]
        self.draw.polygon(mapped, fill=fill)
        if ink is not None:
            self.draw.line([*mapped, mapped[0], mapped[1]], fill=ink, width=self._width(width), joint="curve")

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, ink: Colour | None = INK) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, ink)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour, ink: Colour | None = INK, width: float = 1.6
    ) -> None:
        (x0, y0), (x1, y1) = self._map(x - self.mirror * rx, y - ry), self._map(x + self.mirror * rx, y + ry)
        self.draw.ellipse((x0, y0, x1, y1), fill=fill, outline=ink, width=self._width(width) if ink else 0)

    def line(self, points: list[Point], fill: Colour, width: float) -> None:
        mapped = [self._map(*point) for point in points]
        self.draw.line(mapped, fill=fill, width=self._width(width), joint="curve")
        radius = self._width(width) / 2
        for x, y in (mapped[0], mapped[-1]):
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def limb(self, points: list[Point], fill: Colour, width: float) -> None:
        self.line(points, INK, width + 3.2)
        self.line(points, fill, width)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`share` of `b` in `a`."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b))  # type: ignore[return-value]


def gradient(image: Image.Image, top: Colour, bottom: Colour, until: float = SIZE) -> None:
    column = Image.new("RGB", (1, 64))
    column.putdata([mix(top, bottom, i / 63) for i in range(64)])
    height = round(until * OVERSAMPLING)
    image.paste(column.resize((image.width, height), Image.Resampling.BILINEAR), (0, 0))


def leaf(pen: Pen, x: float, y: float, angle: float, length: float, width: float, fill: Colour) -> None:
    ux, uy = math.cos(angle), math.sin(angle)
    outline = []
    for i in range(13):
        s = i / 12
        side = math.sin(math.pi * s) * width
        outline.append((x + ux * length * s - uy * side, y + uy * length * s + ux * side))
    for i in range(12, -1, -1):
        s = i / 12
        side = -math.sin(math.pi * s) * width
        outline.append((x + ux * length * s - uy * side, y + uy * length * s + ux * side))
    pen.polygon(outline, fill, ink=mix(fill, INK, 0.55), width=0.9)


def fan(pen: Pen, rng: random.Random, x: float, y: float, angle: float, length: float, fill: Colour) -> None:
    for i in range(5):
        leaf(
            pen,
            x,
            y,
            angle + (i - 2) * 0.5,
            length * rng.uniform(0.85, 1.1),
            length * 0.13,
            mix(fill, INK, 0.08 * (i % 2)),
        )


def jungle(image: Image.Image, pen: Pen, rng: random.Random) -> None:
    gradient(image, (168, 206, 132), (70, 128, 72))
    for i in range(5):
        x = 4 + i * 30 + rng.uniform(-7, 7)
        pen.rect(x - 3, -2, x + 3, 110, (92, 96, 62), ink=(66, 72, 48))
    pen.polygon([(-2, 104), (30, 98), (70, 102), (130, 97), (130, 130), (-2, 130)], (54, 96, 46), ink=None)
    for side in (0, 1):
        x = 128 * side
        inward = math.pi * side
        for y, length in ((14, 36), (48, 30), (84, 30)):
            fan(pen, rng, x - 4 + 8 * side, y + rng.uniform(-5, 5), inward, length, (44, 128, 58))
    for x in (30, 64, 98):
        fan(pen, rng, x + rng.uniform(-6, 6), -4, math.pi / 2, 27, (38, 108, 50))
    for x in (10, 40, 88, 118):
        fan(pen, rng, x + rng.uniform(-5, 5), 128, -math.pi / 2, 24, (74, 156, 62))


def desert(image: Image.Image, pen: Pen, rng: random.Random) -> None:
    gradient(image, (120, 184, 226), (246, 226, 178), 90)
    sun = rng.choice((20, 108)) + rng.uniform(-5, 5)
    pen.ellipse(sun, 22, 10, 10, (255, 226, 104), ink=None)
    for base, height, fill in ((74, 9, (234, 192, 118)), (88, 7, (222, 172, 96)), (106, 6, (208, 152, 78))):
        phase = rng.uniform(0, 6.28)
        crest = [(x, base + height * math.sin(x / 22 + phase)) for x in range(-4, 136, 4)]
        pen.polygon([*crest, (134, 134), (-4, 134)], fill, ink=mix(fill, (120, 70, 30), 0.5), width=1)
    for x in (rng.uniform(8, 18), rng.uniform(110, 120)):
        y = rng.uniform(92, 106)
        green = (72, 138, 74)
        pen.limb([(x, y), (x, y - 32)], green, 5)
        pen.limb([(x - 8, y - 24), (x - 8, y - 15), (x, y - 13)], green, 3.4)
        pen.limb([(x + 8, y - 27), (x + 8, y - 18), (x, y - 16)], green, 3.4)


def sea(image: Image.Image, pen: Pen, rng: random.Random) -> None:
    gradient(image, (112, 186, 238), (222, 240, 250), 76)
    for x in (26, 100):
        x, y = x + rng.uniform(-12, 12), rng.uniform(14, 30)
        for dx, r in ((-9, 6), (0, 9), (9, 6)):
            pen.ellipse(x + dx, y, r + 2, r, (255, 255, 255), ink=None)
    waves(pen, rng, ((72, (62, 140, 202)), (86, (46, 118, 186)), (99, (34, 98, 168))))


def waves(pen: Pen, rng: random.Random, bands: tuple[tuple[float, Colour], ...]) -> None:
    for base, fill in bands:
        phase = rng.uniform(0, 6.28)
        crest = [(x, base + 2.6 * math.sin(x / 5.5 + phase)) for x in range(-4, 134, 2)]
        pen.polygon([*crest, (134, 134), (-4, 134)], fill, ink=None)
        pen.line(crest, mix(fill, (255, 255, 255), 0.6), 1.5)


def space(image: Image.Image, pen: Pen, rng: random.Random) -> None:
    gradient(image, (16, 14, 44), (44, 26, 84))
    for _ in range(34):
        x, y, r = rng.uniform(0, 128), rng.uniform(0, 128), rng.choice((0.8, 0.8, 1.3))
        pen.ellipse(x, y, r, r, (255, 255, 236), ink=None)
    left = rng.random() < 0.5
    x, y, r = (22 if left else 106) + rng.uniform(-4, 4), 26 + rng.uniform(-4, 4), rng.uniform(13, 17)
    body = rng.choice(((222, 142, 92), (108, 176, 196), (196, 122, 176)))
    pen.ellipse(x, y, r, r, body, ink=None)
    pen.ellipse(x - r * 0.3, y - r * 0.3, r * 0.5, r * 0.5, mix(body, (255, 255, 255), 0.35), ink=None)
    pen.line([(x - r * 1.6, y + r * 0.5), (x + r * 1.6, y - r * 0.5)], (240, 220, 170), 2.4)
    x, y = (106 if left else 22) + rng.uniform(-4, 4), 102 + rng.uniform(-6, 6)
    pen.ellipse(x, y, 9, 9, (192, 192, 200), ink=None)
    pen.ellipse(x - 3, y - 2, 2.4, 2.4, (150, 150, 162), ink=None)
    pen.ellipse(x + 3, y + 3, 1.8, 1.8, (150, 150, 162), ink=None)


def snow(image: Image.Image, pen: Pen, rng: random.Random) -> None:
    gradient(image, (150, 178, 208), (226, 236, 246), 90)
    peak = rng.uniform(30, 98)
    pen.polygon([(peak - 52, 84), (peak, 26), (peak + 52, 84)], (146, 160, 184), ink=None)
    pen.polygon(
        [(peak - 18, 46), (peak, 26), (peak + 18, 46), (peak + 6, 43), (peak, 50), (peak - 7, 43)],
        (250, 252, 255),
        None,
    )
    phase = rng.uniform(0, 6.28)
    crest = [(x, 82 + 4 * math.sin(x / 24 + phase)) for x in range(-4, 136, 4)]
    pen.polygon([*crest, (134, 134), (-4, 134)], (244, 248, 254), ink=(196, 208, 226), width=1)
    for x in (8, 24, 104, 121):
        x, y = x + rng.uniform(-4, 4), rng.uniform(88, 98)
        pen.rect(x - 1.5, y - 2, x + 1.5, y + 5, (104, 76, 56), ink=None)
        for i, w in enumerate((11, 9, 6.5)):
            top = y - 12 - 10 * i
            pen.polygon([(x - w, top + 12), (x, top - 3), (x + w, top + 12)], (58, 112, 92), ink=None)
            pen.polygon([(x - w * 0.45, top + 4), (x, top - 3), (x + w * 0.45, top + 4)], (250, 252, 255), ink=None)
    for _ in range(26):
        pen.ellipse(rng.uniform(0, 128), rng.uniform(0, 128), 1.3, 1.3, (255, 255, 255), ink=None)


def city(image: Image.Image, pen: Pen, rng: random.Random) -> None:
    gradient(image, (240, 178, 132), (250, 222, 178), 104)
    for shade, low, high in (((168, 142, 152), 14, 44), ((98, 92, 118), 30, 62)):
        x = -6 + rng.uniform(-6, 0)
        while x < 128:
            w, top = rng.uniform(16, 24), rng.uniform(low, high)
            pen.rect(x, top, x + w, 108, shade, ink=mix(shade, INK, 0.5))
            if shade[0] < 120:
                for wx in range(3):
                    for wy in range(int((100 - top) / 9)):
                        if rng.random() < 0.75:
                            px, py = x + 3 + wx * (w - 4) / 3, top + 5 + wy * 9
                            pen.rect(px, py, px + 3, py + 4, (252, 226, 128), ink=None)
            x += w
    pen.rect(-2, 102, 130, 130, (92, 92, 100), ink=(60, 60, 70))
    for x in range(4, 128, 26):
        pen.rect(x, 118, x + 13, 121, (236, 232, 214), ink=None)


def astronaut(pen: Pen, rng: random.Random) -> None:
    suit, shade = (246, 246, 250), (206, 210, 222)
    stripe = rng.choice(((222, 74, 60), (236, 146, 40), (46, 110, 200)))
    pen.rect(-17, -8, 17, 18, shade)
    pen.limb([(-8, 20), (-10, 36)], suit, 10)
    pen.limb([(8, 20), (10, 36)], suit, 10)
    pen.rect(-17, 35, -4, 41, stripe)
    pen.rect(4, 35, 17, 41, stripe)
    raised = rng.random() < 0.6
    pen.limb([(-13, -4), (-23, 6), (-22, 16)], suit, 8)
    pen.limb([(13, -4), (24, -10), (26, -22)] if raised else [(13, -4), (23, 6), (22, 16)], suit, 8)
    pen.polygon([(-14, -10), (14, -10), (15, 22), (-15, 22)], suit)
    pen.rect(-8, 2, 8, 11, shade)
    pen.rect(-6, 4, -1, 9, stripe, ink=None)
    pen.rect(2, 4, 6, 9, (70, 150, 220), ink=None)
    pen.ellipse(0, -23, 18, 17, suit)
    pen.ellipse(1, -22, 12.5, 10.5, (38, 62, 116))
    pen.ellipse(-3, -26, 4.4, 3, (150, 196, 240), ink=None)


def robot(pen: Pen, rng: random.Random) -> None:
    body = rng.choice(((136, 152, 172), (86, 158, 164), (222, 138, 62)))
    dark, light = mix(body, INK, 0.4), mix(body, (255, 255, 255), 0.45)
    pen.limb([(-8, 20), (-8, 36)], dark, 6)
    pen.limb([(8, 20), (8, 36)], dark, 6)
    pen.rect(-17, 35, -3, 41, body)
    pen.rect(3, 35, 17, 41, body)
    up = rng.random() < 0.5
    pen.limb([(-17, -2), (-26, 8), (-26, 14)], dark, 5)
    pen.limb([(17, -2), (26, -8), (26, -16)] if up else [(17, -2), (26, 8), (26, 14)], dark, 5)
    pen.ellipse(-26, 17, 4.5, 4.5, (236, 190, 70))
    pen.ellipse(26, -19 if up else 17, 4.5, 4.5, (236, 190, 70))
    pen.rect(-18, -8, 18, 22, body)
    pen.rect(-11, -1, 11, 14, light)
    for x, fill in ((-6, (226, 72, 62)), (0, (244, 200, 64)), (6, (84, 188, 96))):
        pen.ellipse(x, 6, 2.6, 2.6, fill, ink=None)
    pen.line([(0, -34), (0, -42)], INK, 2)
    pen.ellipse(0, -43, 3.4, 3.4, (226, 72, 62))
    pen.rect(-16, -34, 16, -11, body)
    for x in (-7, 7):
        pen.ellipse(x, -25, 5, 5, (252, 232, 96))
        pen.ellipse(x, -25, 1.9, 1.9, INK, ink=None)
    pen.rect(-8, -17, 8, -14, INK, ink=None)


def house(pen: Pen, rng: random.Random) -> None:
    wall = rng.choice(((244, 226, 190), (236, 236, 232), (226, 190, 150)))
    roof = rng.choice(((192, 66, 54), (150, 78, 52), (72, 92, 146)))
    pen.rect(13, -34, 22, -14, (150, 96, 80))
    pen.rect(-30, -8, 30, 40, wall)
    pen.polygon([(-37, -6), (0, -40), (37, -6)], roof)
    pen.rect(-7, 14, 7, 40, (122, 78, 48))
    pen.ellipse(4, 28, 1.4, 1.4, (244, 210, 90), ink=None)
    for x in (-19, 19):
        pen.rect(x - 7, 4, x + 7, 18, (150, 208, 236))
        pen.line([(x, 4), (x, 18)], INK, 1.4)
        pen.line([(x - 7, 11), (x + 7, 11)], INK, 1.4)
    pen.ellipse(0, -18, 5, 5, (150, 208, 236))


def rocket(pen: Pen, rng: random.Random) -> None:
    hull = rng.choice(((242, 242, 246), (226, 228, 236)))
    trim = rng.choice(((220, 60, 54), (44, 104, 196), (240, 150, 40)))
    pen.polygon([(-9, 24), (-5, 36), (0, 46), (5, 36), (9, 24)], (250, 158, 46), ink=None)
    pen.polygon([(-4, 24), (0, 38), (4, 24)], (255, 236, 130), ink=None)
    for side in (-1, 1):
        pen.polygon([(side * 10, 2), (side * 25, 18), (side * 25, 32), (side * 10, 24)], trim)
    body = [(0, -44), (7, -34), (12, -20), (14, -4), (13, 12), (9, 26)]
    pen.polygon([*body, *[(-x, y) for x, y in reversed(body)]], hull)
    nose = [(0, -44), (7, -34), (11, -23)]
    pen.polygon([*nose, *[(-x, y) for x, y in reversed(nose)]], trim)
    pen.ellipse(0, -10, 7.5, 7.5, trim)
    pen.ellipse(0, -10, 4.8, 4.8, (140, 206, 240))
    pen.rect(-11, 16, 11, 20, trim)


def cat(pen: Pen, rng: random.Random) -> None:
    fur = rng.choice(((240, 160, 74), (150, 150, 160), (92, 84, 88)))
    light = mix(fur, (255, 255, 255), 0.55)
    pen.limb([(14, 34), (29, 32), (32, 16), (27, 6)], fur, 6)
    pen.ellipse(0, 20, 20, 21, fur)
    pen.ellipse(0, 24, 10, 14, light, ink=None)
    for x in (-9, 9):
        pen.ellipse(x, 38, 7.5, 4.6, fur)
    for side in (-1, 1):
        pen.polygon([(side * 5, -29), (side * 18, -42), (side * 20, -18)], fur)
        pen.polygon([(side * 9, -29), (side * 16, -36), (side * 17, -22)], (240, 168, 164), ink=None)
    pen.ellipse(0, -15, 22, 18, fur)
    for x in (-8, 8):
        pen.ellipse(x, -18, 4.8, 5.2, (226, 240, 130))
        pen.ellipse(x, -18, 1.7, 4, INK, ink=None)
    pen.ellipse(0, -7, 8, 5.4, light, ink=None)
    pen.polygon([(-3, -11), (3, -11), (0, -7)], (226, 112, 112), ink=None)
    for side in (-1, 1):
        pen.line([(side * 8, -8), (side * 26, -11)], INK, 0.9)
        pen.line([(side * 8, -5), (side * 26, -3)], INK, 0.9)


def car(pen: Pen, rng: random.Random) -> None:
    paint = rng.choice(((214, 54, 50), (244, 196, 48), (52, 112, 204)))
    pen.polygon([(-25, 8), (-15, -13), (13, -13), (26, 8)], paint)
    pen.polygon([(-19, 7), (-12, -9), (-2, -9), (-2, 7)], (170, 216, 238))
    pen.polygon([(2, 7), (2, -9), (11, -9), (20, 7)], (170, 216, 238))
    pen.polygon([(-40, 10), (-28, 7), (34, 7), (42, 12), (42, 28), (-40, 28)], paint)
    pen.rect(-42, 23, 44, 28, mix(paint, INK, 0.45))
    pen.ellipse(39, 15, 3, 3, (255, 240, 170))
    pen.rect(-41, 13, -37, 18, (180, 40, 40), ink=None)
    for x in (-23, 24):
        pen.ellipse(x, 29, 10.5, 10.5, (44, 44, 52))
        pen.ellipse(x, 29, 4.6, 4.6, (206, 208, 214), ink=None)


def sailboat(pen: Pen, rng: random.Random) -> None:
    sail = rng.choice(((250, 250, 246), (250, 232, 190), (226, 76, 64)))
    hull = rng.choice(((150, 84, 50), (190, 56, 50), (44, 76, 130)))
    pen.line([(0, 20), (0, -44)], (96, 66, 46), 3)
    pen.polygon([(3, -42), (33, 13), (3, 13)], sail)
    pen.polygon([(-3, -34), (-25, 13), (-3, 13)], mix(sail, (150, 160, 180), 0.25))
    pen.polygon([(0, -44), (0, -37), (-11, -41)], (226, 66, 56), ink=None)
    pen.polygon([(-39, 18), (41, 18), (30, 38), (-28, 38)], hull)
    pen.line([(-35, 25), (37, 25)], mix(hull, (255, 255, 255), 0.7), 2.2)


def balloon(pen: Pen, rng: random.Random) -> None:
    a, b = rng.choice(
        (((222, 66, 58), (250, 220, 110)), ((52, 118, 204), (250, 250, 246)), ((236, 140, 44), (112, 70, 150)))
    )
    pen.line([(-14, 8), (-6, 29)], INK, 1.4)
    pen.line([(14, 8), (6, 29)], INK, 1.4)
    pen.polygon([(-24, -4), (24, -4), (9, 18), (-9, 18)], a)
    pen.ellipse(0, -15, 29, 28, a)
    pen.ellipse(0, -15, 17, 28, b)
    pen.ellipse(0, -15, 6, 28, a)
    pen.polygon([(-15.5, -1), (15.5, -1), (6, 16), (-6, 16)], b, ink=None)
    pen.polygon([(-5, -1), (5, -1), (2.5, 16), (-2.5, 16)], a, ink=None)
    pen.line([(-9, 18), (9, 18)], INK, 1.8)
    pen.rect(-8, 29, 8, 41, (160, 108, 62))
    pen.line([(-8, 34), (8, 34)], (112, 72, 40), 1.4)


DRAW_PLACE: dict[str, Callable[[Image.Image, Pen, random.Random], None]] = {
    "jungle": jungle,
    "desert": desert,
    "sea": sea,
    "space": space,
    "snow": snow,
    "city": city,
}
DRAW_SUBJECT: dict[str, Callable[[Pen, random.Random], None]] = {
    "astronaut": astronaut,
    "robot": robot,
    "house": house,
    "rocket": rocket,
    "cat": cat,
    "car": car,
    "sailboat": sailboat,
    "balloon": balloon,
}


def grade(pixels: np.ndarray, palette: str, tone: str) -> np.ndarray:
    """Colour grading of float RGB in 0..1, shape (h, w, 3): a tint for the palette, a saturation for the tone."""
    tint = {"cold": (0.72, 0.93, 1.16), "warm": (1.16, 0.92, 0.66), "neutral": (1.0, 1.0, 1.0)}[palette]
    wash = {"cold": (0.16, 0.36, 0.60), "warm": (0.74, 0.40, 0.14), "neutral": (0.5, 0.5, 0.5)}[palette]
    saturation = {"muted": 0.55, "vivid": 1.35, "plain": 1.0}[tone]
    grey = pixels @ np.array((0.3, 0.59, 0.11), dtype=np.float32)
    pixels = grey[..., None] + saturation * (pixels - grey[..., None])
    pixels = pixels * np.array(tint, dtype=np.float32)
    if palette != "neutral":
        pixels = 0.78 * pixels + 0.22 * np.array(wash, dtype=np.float32) * (0.4 + grey[..., None] * 1.2)
    if tone == "muted":
        pixels = 0.86 * pixels + 0.07
    return pixels.clip(0, 1)


def draw(scene: Scene) -> Image.Image:
    """The picture of `scene`: RGB, 128x128. The same scene always gives the same picture."""
    rng = random.Random(scene.seed)
    canvas = Image.new("RGB", (SIZE * OVERSAMPLING, SIZE * OVERSAMPLING))
    brush = ImageDraw.Draw(canvas)
    mirror = rng.random() < 0.5
    x, y, scale = 64 + rng.uniform(-7, 7), 70 + rng.uniform(-3, 4), rng.uniform(0.98, 1.14)
    details = random.Random(rng.randrange(2**31))
    DRAW_PLACE[scene.place](canvas, Pen(brush), rng)
    DRAW_SUBJECT[scene.subject](Pen(brush, x, y, scale, mirror), details)
    if scene.place == "sea":
        waves(Pen(brush), rng, ((y + 36 * scale, (30, 90, 158)),))
    if scene.place == "snow":
        pen = Pen(brush)
        for _ in range(10):
            pen.ellipse(rng.uniform(0, 128), rng.uniform(0, 128), 1.3, 1.3, (255, 255, 255), ink=None)
    small = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = grade(np.asarray(small, dtype=np.float32) / 255, scene.palette, scene.tone)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def sheet(seed: int = 0) -> Image.Image:
    """Every subject (across) in every place (down), in changing palettes."""
    rng = random.Random(seed)
    page = Image.new("RGB", (len(SUBJECTS) * SIZE, len(PLACES) * SIZE))
    for row, place in enumerate(PLACES):
        for column, subject in enumerate(SUBJECTS):
            scene = replace(random_scene(rng), subject=subject, place=place)
            page.paste(draw(scene), (column * SIZE, row * SIZE))
    return page


if __name__ == "__main__":
    sheet().save(sys.argv[1] if len(sys.argv) > 1 else "scenes.png")
