"""Draw the sample pictures and the example queries; every run draws the same ones.

    python tests/make_samples.py            # into this repository
    python tests/make_samples.py /tmp/demo  # into another folder

SAMPLES  name -> painter, size, quality   written to ROOT/bulk_images/samples/
QUERIES  edited copy -> its sample        written to ROOT/that_one_image/
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageEnhance, ImageFont, ImageOps

SAMPLE_FOLDER = Path("bulk_images", "samples")
QUERY_FOLDER = Path("that_one_image")
SUPERSAMPLE = 2  # pictures are drawn this many times too large and then reduced: smooth edges
SHADES = 1024  # steps of a colour ramp; no band shows once they are rounded to 8 bits
TAU = 2 * np.pi

Colour = str | tuple[int, ...]
Point = tuple[float, float]


# --- canvas ----------------------------------------------------------------------------------------------


def rgb(colour: Colour) -> tuple[int, ...]:
    return ImageColor.getrgb(colour) if isinstance(colour, str) else colour


def mix(a: Colour, b: Colour, t: float) -> tuple[int, ...]:
    return tuple(round(p + (q - p) * t) for p, q in zip(rgb(a), rgb(b), strict=True))


class Canvas:
    """Positions are fractions of width and height; lengths (radii, strokes, letters) of the short side."""

    def __init__(self, size: tuple[int, int], seed: int) -> None:
        self.w, self.h = (side * SUPERSAMPLE for side in size)
        self.unit = min(self.w, self.h)
        self.rng = np.random.default_rng(seed)
        self.image = Image.new("RGB", (self.w, self.h))
        self.pen = ImageDraw.Draw(self.image)
        self.x, self.y = np.meshgrid(np.linspace(0, 1, self.w, dtype="f4"), np.linspace(0, 1, self.h, dtype="f4"))

    def distance(self, x: float, y: float) -> np.ndarray:
        return np.hypot((self.x - x) * self.w, (self.y - y) * self.h) / self.unit

    def angle(self, x: float, y: float) -> np.ndarray:
        return np.arctan2((self.y - y) * self.h, (self.x - x) * self.w)

    def away(self, x: float, y: float, length: float, turn: float) -> Point:
        """The point `length` from (x, y) in the direction `turn` (radians, clockwise from the right)."""
        far = length * self.unit
        return (x + far * np.cos(turn) / self.w, y + far * np.sin(turn) / self.h)

    def noise(self, across: int, down: int, octaves: int = 1) -> np.ndarray:
        """Smooth noise over the whole canvas, 0 to 1, in cells that halve with every octave."""
        total = np.zeros((self.h, self.w), "f4")
        for octave in range(octaves):
            cells = self.rng.random(((down << octave) + 1, (across << octave) + 1)).astype("f4")
            layer = Image.fromarray(cells).resize((self.w, self.h), Image.Resampling.BICUBIC)
            total += np.asarray(layer) / 2**octave
        return (total - total.min()) / (total.max() - total.min())

    def skyline(self, cells: int, octaves: int = 1) -> np.ndarray:
        return self.noise(cells, 1, octaves)[0]  # (w,)

    def wash(self, t: np.ndarray, *colours: Colour, alpha: np.ndarray | float = 1.0) -> None:
        """Colour every pixel by where its `t`, clipped to 0..1, falls on the ramp of `colours`."""
        stops = np.linspace(0, 1, len(colours))
        channels = np.array([rgb(colour) for colour in colours]).T
        ramp = np.stack([np.interp(np.linspace(0, 1, SHADES), stops, each) for each in channels], axis=-1)
        new = ramp.astype("f4")[(np.clip(t, 0, 1) * (SHADES - 1)).astype(int)]
        cover = np.broadcast_to(np.asarray(alpha, "f4"), (self.h, self.w))[..., None]
        pixels = np.asarray(self.image) * (1 - cover) + new * cover
        self.image.paste(Image.fromarray(np.rint(pixels).astype("u1")))

    def land(self, top: np.ndarray, *colours: Colour) -> None:
        """Everything below the line `top` (w,), the colours running down from it."""
        self.wash((self.y - top) / (1.001 - top), *colours, alpha=self.y > top)

    def glow(self, x: float, y: float, r: float, colour: Colour, strength: float = 1.0) -> None:
        self.wash(self.x, colour, colour, alpha=strength * np.exp(-((self.distance(x, y) / r) ** 2)))

    def disc(self, x: float, y: float, r: float, fill: Colour, ry: float | None = None) -> None:
        rx, ry = r * self.unit, (r if ry is None else ry) * self.unit
        self.pen.ellipse((x * self.w - rx, y * self.h - ry, x * self.w + rx, y * self.h + ry), fill)

    def ball(self, x: float, y: float, r: float, dark: Colour, light: Colour, squash: float = 1) -> None:
        """A disc, `squash` times as high as wide, lit from the upper left."""
        ry = r * squash
        for t in np.linspace(0, 1, 40):
            at = (x - 0.35 * r * t * self.unit / self.w, y - 0.4 * ry * t * self.unit / self.h)
            self.disc(*at, r * (1 - 0.95 * t), mix(dark, light, t**0.8), ry * (1 - 0.95 * t))

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float = 0) -> None:
        corners = (x0 * self.w, y0 * self.h, x1 * self.w - 1, y1 * self.h - 1)
        self.pen.rounded_rectangle(corners, radius * self.unit, fill)

    def shape(self, points: Iterable[Point], fill: Colour) -> None:
        self.pen.polygon([(x * self.w, y * self.h) for x, y in points], fill)

    def line(self, points: Iterable[Point], fill: Colour, width: float) -> None:
        corners = [(x * self.w, y * self.h) for x, y in points]
        self.pen.line(corners, fill, max(1, round(width * self.unit)), joint="curve")

    def leaf(self, x: float, y: float, length: float, width: float, turn: float, fill: Colour) -> None:
        """A pointed oval that starts at (x, y)."""
        along = np.linspace(0, 1, 16)
        rim = [(length * t, side * width / 2 * np.sin(np.pi * t)) for side in (1, -1) for t in along[::side]]
        self.shape((self.away(x, y, np.hypot(u, v), turn + np.arctan2(v, u)) for u, v in rim), fill)

    def text(self, x: float, y: float, words: str, size: float, fill: Colour, bold: float = 0) -> None:
        font = ImageFont.load_default(size=size * self.unit)
        stroke = round(bold * size * self.unit)
        self.pen.text((x * self.w, y * self.h), words, fill, font, anchor="mm", align="center", stroke_width=stroke)


def pine(c: Canvas, x: float, base: float, height: float, colour: Colour) -> None:
    for tier in range(6):
        top, half = base - height * (1 - tier * 0.14), height * (0.07 + 0.035 * tier) * c.h / c.w
        c.shape([(x, top), (x + half, top + height * 0.27), (x - half, top + height * 0.27)], colour)


def gull(c: Canvas, x: float, y: float, span: float, colour: Colour) -> None:
    for side in (-1, 1):
        reach = side * span
        c.line([(x, y), (x + reach / 2, y - span / 2), (x + reach, y - span / 5)], colour, 0.006)


def stars(c: Canvas, count: int, lowest: float) -> None:
    for x, y, size in c.rng.random((count, 3)):
        c.disc(x, y * lowest, 0.001 + 0.0025 * size**3, mix("#8890b0", "white", size))


# --- scenes ----------------------------------------------------------------------------------------------


def sunset_sea(c: Canvas) -> None:
    c.wash(c.y / 0.6, "#2b1b5a", "#b53a72", "#ff8a4d", "#ffe29a")
    c.wash(c.y, "#6a2a66", "#ffb070", alpha=0.6 * np.clip(c.noise(2, 14, 4) * 3 - 1.7, 0, 1))
    c.glow(0.62, 0.54, 0.35, "#fff0b0", 0.8)
    c.disc(0.62, 0.53, 0.12, "#fff7d6")
    c.land(np.full(c.w, 0.6), "#f09a6c", "#7a3266", "#1a1440")
    for depth in np.linspace(0.01, 1, 46):
        x, half = 0.62 + c.rng.normal(0, 0.02), (0.02 + 0.13 * depth) * c.rng.uniform(0.4, 1)
        c.line([(x - half, 0.6 + 0.4 * depth), (x + half, 0.6 + 0.4 * depth)], "#ffd28a", 0.006)
    for x, y in ((0.2, 0.25), (0.27, 0.2), (0.33, 0.28)):
        gull(c, x, y, 0.025, "#2b1b3a")


def mountains(c: Canvas) -> None:
    c.wash(c.y / 0.7, "#3f8fd2", "#bfe3f5", "#fdf3e0")
    for summit, top in ((0.08, 0.3), (0.88, 0.26), (0.3, 0.2), (0.6, 0.1)):
        slope = top + 1.15 * abs(c.x[0] - summit) + 0.05 * (c.skyline(12, 4) - 0.5)
        c.land(slope, "#6f7891", "#a4b0c2")
        flank = np.clip((c.x - summit + 0.05 * (c.noise(6, 10, 4) - 0.5)) * 60, 0, 1)
        c.wash(c.x, "#2c3550", "#2c3550", alpha=0.45 * flank * (c.y > slope))
        snow = (c.y > slope) & (c.y < top + 0.1 + 0.14 * c.noise(34, 3, 3))
        c.wash(flank, "#ffffff", "#c3d2ea", alpha=snow)
    for depth, colour in enumerate(("#5d7f86", "#3f6b5c", "#2a5138")):
        c.land(0.6 + 0.12 * depth - 0.12 * c.skyline(4 + depth, 4), colour, mix(colour, "#dbe7c0", 0.35))
    for x in np.sort(c.rng.random(36)):
        pine(c, x, 1.02 + c.rng.uniform(-0.05, 0.05), c.rng.uniform(0.12, 0.22), mix("#12301f", "#24523a", x))


def city_night(c: Canvas) -> None:
    c.wash(c.y, "#050a24", "#1c2a66", "#6d4a8f", "#e58a7a")
    lamps = ("#ffd97a", "#ffb45c", "#9fe0ff")
    stars(c, 120, 0.4)
    c.disc(0.24, 0.15, 0.07, "#f6f0d0")
    c.disc(0.27, 0.14, 0.06, "#0a1234")
    for colour, tallest in (("#2c2f66", 0.5), ("#1b1d49", 0.42), ("#0c0e2a", 0.28)):
        left = -0.02
        while left < 1:
            width, top = c.rng.uniform(0.08, 0.17), 0.74 - tallest * c.rng.uniform(0.45, 1)
            c.box(left, top, left + width, 0.75, colour)
            for x in np.arange(left + 0.014, left + width - 0.014, 0.022):
                for y in np.arange(top + 0.015, 0.73, 0.02):
                    if c.rng.random() < 0.42:
                        c.box(x, y, x + 0.011, y + 0.009, lamps[c.rng.integers(3)])
            left += width + c.rng.uniform(0, 0.03)
    mirrored = ImageOps.flip(c.image.crop((0, c.h // 4, c.w, c.h * 3 // 4))).resize((c.w, c.h // 4))
    c.image.paste(mirrored, (0, c.h * 3 // 4))
    c.wash(c.noise(3, 60), "#0a0f33", "#31407e", alpha=0.65 * (c.y > 0.75))


def forest(c: Canvas) -> None:
    c.wash(c.y, "#f6edbe", "#d3e2b4", "#7fa67c")
    c.glow(0.68, 0.15, 0.3, "#fffdf0")
    for depth in range(5):
        colour = mix("#b4cda6", "#0c2618", depth / 4)
        c.land(0.42 + 0.12 * depth - 0.05 * c.skyline(5), colour, colour)
        for x in (np.arange(9 - depth) + c.rng.uniform(0.2, 0.8, 9 - depth)) / (9 - depth):
            pine(c, x, 0.54 + 0.13 * depth, c.rng.uniform(0.24, 0.4) + 0.09 * depth, colour)


def beach(c: Canvas) -> None:
    shore = c.x * 0.8 + c.y * 0.35 + 0.025 * np.sin(c.y * 14) + 0.05 * c.noise(4, 5, 3)
    c.wash(shore, "#04628c", "#0aa2b8", "#5fd6cf", "#fdfefc", "#d8b787", "#f0d9a8", "#f6e3b8", "#f3dcae")
    c.wash(c.x, "white", "white", alpha=0.5 * (abs(shore - 0.3 - 0.05 * c.noise(7, 9, 2)) < 0.006))
    spots = [(0.66, 0.2, "#e23b4e"), (0.86, 0.3, "#2468b4"), (0.62, 0.62, "#f2a516"), (0.84, 0.78, "#1f9c74")]
    for x, y, colour in spots:
        c.box(x - 0.09, y + 0.06, x - 0.045, y + 0.22, mix(colour, "white", 0.55), 0.01)
        c.disc(x + 0.02, y + 0.03, 0.1, "#c9a873")
        for slice_ in range(12):
            turns = [c.away(x, y, 0.1, TAU * (slice_ + part) / 12) for part in (0, 0.5, 1)]
            c.shape([(x, y), *turns], colour if slice_ % 2 else "#fff8ee")


def lavender_field(c: Canvas) -> None:
    c.wash(c.y / 0.42, "#6fb4e8", "#f7e6c8")
    c.wash(c.x, "white", "white", alpha=np.clip(c.noise(3, 8, 5) * 3 - 1.8, 0, 0.8) * (c.y < 0.4))
    c.land(0.42 - 0.1 * c.skyline(3, 2), "#8fa6b8", "#a9bcae")
    deep = np.maximum(c.y - 0.36, 0.01)
    rows = 0.5 + 0.5 * np.sin((c.x - 0.5) / deep * 9)
    bloom = rows * 0.8 + 0.3 * c.noise(60, 40, 2) - 0.1
    c.wash(bloom, "#6f7d3c", "#5b3c8e", "#8e5fc4", "#c7a2ea", alpha=c.y > 0.42)
    for x in (0.68, 0.74, 0.79):
        c.ball(x, 0.38, 0.06, "#2f5a2c", "#7fae4e", 1.33)
    c.box(0.2, 0.34, 0.32, 0.43, "#efe3cd")
    c.shape([(0.185, 0.345), (0.23, 0.29), (0.29, 0.29), (0.335, 0.345)], "#b4532f")
    for x in (0.22, 0.26, 0.295):
        c.box(x, 0.37, x + 0.014, 0.4, "#5a7f9c")


def cactus(c: Canvas, x: float, base: float, height: float, colour: Colour) -> None:
    thick = height * 0.16
    c.box(x - thick / 2, base - height, x + thick / 2, base, colour, 0.03)
    for side, low, high in ((-1, 0.4, 0.75), (1, 0.55, 0.9)):
        reach = x + side * thick * 1.5
        c.line([(x, base - height * low), (reach, base - height * low)], colour, thick)
        top, foot = base - height * high, base - height * (low - 0.06)
        c.box(reach - thick * 0.4, top, reach + thick * 0.4, foot, colour, 0.03)


def desert(c: Canvas) -> None:
    c.wash(c.y / 0.6, "#f7b267", "#fbd8a0", "#fff0d4")
    c.disc(0.33, 0.28, 0.13, "#fffaf0")
    for depth, colour in enumerate(("#eab077", "#d98948", "#b9602c")):
        crest = 0.52 + 0.13 * depth + 0.07 * np.sin(c.x[0] * (5 + depth) + 2.1 * depth)
        c.land(crest, mix(colour, "white", 0.2), colour)
        slope = crest + 0.04 + 0.16 * abs(np.sin(c.x[0] * (2.5 + depth / 2) + depth * 1.05 + 0.7))
        c.wash(c.y, mix(colour, "#5a2430", 0.45), colour, alpha=0.8 * (c.y > slope))
    cactus(c, 0.74, 0.8, 0.42, "#2f4a35")
    cactus(c, 0.12, 0.68, 0.17, "#6b6b4a")


def lighthouse(c: Canvas) -> None:
    c.wash(c.y, "#123a5a", "#2f7f94", "#f2c9a0", "#f7e3c4")
    for turn in (np.pi * 0.94, np.pi * 0.06):
        beam = np.abs(np.angle(np.exp(1j * (c.angle(0.58, 0.2) - turn)))) < 0.09
        c.wash(c.x, "#fff6c8", "#fff6c8", alpha=beam * 0.6 * np.exp(-c.distance(0.58, 0.2) * 1.8))
    c.land(np.full(c.w, 0.72), "#3f8c98", "#0d3850")
    for x, depth in c.rng.random((90, 2)):
        y, half = 0.73 + 0.27 * depth**1.5, 0.01 + 0.05 * depth
        c.line([(x - half, y), (x, y - 0.004), (x + half, y)], "#a8d6d4", 0.003 + 0.004 * depth)
    rock = 1.01 - 0.335 * np.exp(-(((c.x[0] - 0.66) / 0.3) ** 4)) + 0.05 * c.skyline(14, 3)
    c.land(rock, "#7a6858", "#2a231f")
    half = 0.05 + 0.11 * (c.y - 0.2)
    tower = (abs(c.x - 0.58) < half) & (abs(c.y - 0.49) < 0.23)
    c.wash(np.floor((c.y - 0.26) / 0.077) % 2, "#d2353a", "#f6f1e6", alpha=tower)
    c.wash(c.x, "#0d2030", "#0d2030", alpha=tower * 0.6 * np.clip((c.x - 0.56) / half / 2, 0, 1))
    for y in (0.36, 0.5, 0.63):
        c.box(0.565, y, 0.592, y + 0.03, "#2b3c49", 0.02)
    c.box(0.54, 0.175, 0.62, 0.25, "#fff2a8")
    for x in (0.54, 0.577, 0.614):
        c.box(x, 0.175, x + 0.008, 0.25, "#22303c")
    c.box(0.505, 0.25, 0.655, 0.265, "#22303c")
    c.shape([(0.525, 0.178), (0.58, 0.125), (0.635, 0.178)], "#8f2127")
    c.glow(0.58, 0.212, 0.12, "#fff8d0", 0.85)


def aurora(c: Canvas) -> None:
    c.wash(c.y, "#050b1f", "#0b2038", "#123a4a")
    stars(c, 170, 0.7)
    for colour, base in (("#b45cff", 0.36), ("#35f0a0", 0.52), ("#8dffcf", 0.63)):
        foot = base + 0.22 * (c.skyline(3, 2) - 0.5)
        rays = 0.35 + 0.65 * c.skyline(40, 3)
        reach = np.where(c.y < foot, np.exp(-(foot - c.y) / (0.22 * rays)), np.exp(-(c.y - foot) / 0.02))
        c.wash(c.x, colour, colour, alpha=0.75 * reach * rays)
    c.land(0.84 - 0.1 * c.skyline(3, 3), "#7fb5b8", "#2d5468")
    for x in np.concatenate([c.rng.uniform(0, 0.3, 12), c.rng.uniform(0.75, 1, 10)]):
        pine(c, x, 0.98, c.rng.uniform(0.2, 0.42), "#04101a")


def planet(c: Canvas) -> None:
    c.wash(c.noise(3, 3, 5), "#03030a", "#0c0820", "#2a1140", "#4c1d55")
    stars(c, 260, 1)
    tilt = (c.y - 0.5) + 0.25 * (c.x - 0.5)
    far = np.hypot((c.x - 0.5) - 0.25 * (c.y - 0.5), tilt * 3.6)
    ring, globe = (far > 0.32) & (far < 0.47) & (abs(far - 0.41) > 0.007), c.distance(0.5, 0.5) < 0.25
    light = np.clip(1.25 - c.distance(0.4, 0.38) * 2.6, 0.12, 1)
    bands = 0.5 + 0.5 * np.sin(tilt * 55 + 2.5 * c.noise(3, 8, 3))
    c.wash(np.sin(far * 160) * 0.3 + 0.5, "#7a6a5a", "#e6d3b0", alpha=0.9 * ring)
    c.wash(bands, "#b8743c", "#f0cf96", "#f7e8c8", alpha=globe)
    c.wash(c.x, "#05030c", "#05030c", alpha=globe * (1 - light))
    c.wash(np.sin(far * 160) * 0.3 + 0.5, "#8a7a66", "#f2e2c0", alpha=0.95 * (ring & (tilt > 0)))


def harbour_houses(c: Canvas) -> None:
    c.wash(c.y / 0.6, "#8fc7ee", "#e9f4fb")
    fronts = ("#d8483e", "#f2b632", "#3b7fb0", "#ef8f6b", "#5aa469", "#f4e4c1", "#a65a86")
    for i, front in enumerate(fronts):
        x0, x1, top = i / 7, (i + 1) / 7, c.rng.uniform(0.2, 0.32)
        c.shape([(x0, top), ((x0 + x1) / 2, top - 0.12), (x1, top)], mix(front, "#402018", 0.5))
        c.box(x0, top, x1, 0.68, front)
        for x in (x0 + 0.022, x0 + 0.085):
            for y in np.arange(top + 0.04, 0.58, 0.095):
                c.box(x, y, x + 0.036, y + 0.06, "#fbf7ee")
                c.box(x + 0.005, y + 0.007, x + 0.031, y + 0.053, "#33475a")
        c.box(x0 + 0.055, 0.6, x0 + 0.09, 0.68, mix(front, "black", 0.6))
    c.box(0, 0.68, 1, 0.72, "#8c8378")
    mirrored = ImageOps.flip(c.image.crop((0, round(c.h * 0.44), c.w, round(c.h * 0.72))))
    c.image.paste(mirrored, (0, round(c.h * 0.72)))
    c.wash(c.noise(5, 50), "#123f58", "#7fb6cc", alpha=0.5 * (c.y > 0.72))
    c.shape([(0.3, 0.8), (0.62, 0.8), (0.57, 0.89), (0.34, 0.89)], "#f7f3ea")
    c.shape([(0.3, 0.8), (0.62, 0.8), (0.613, 0.815), (0.307, 0.815)], "#c0342c")
    c.line([(0.46, 0.8), (0.46, 0.5)], "#5a4030", 0.01)


# --- textures --------------------------------------------------------------------------------------------


def wood(c: Canvas) -> None:
    plank = np.minimum((c.y * 4).astype(int), 3)
    rings = c.y * 4 + plank * 1.7 + 0.5 * c.noise(3, 12, 2)
    grain = (rings * (4 + plank)) % 1
    tone = 0.55 * grain + 0.45 * c.noise(5, 160, 2) + 0.08 * (plank % 2)
    c.wash(tone, "#5b3416", "#96602f", "#c58f52", "#dcb077")
    c.wash(c.y, "#2c1708", "#2c1708", alpha=0.8 * (abs(c.y * 4 - np.rint(c.y * 4)) < 0.02))


def marble(c: Canvas) -> None:
    drift = c.x * 3 + c.y * 2 + 3.2 * c.noise(3, 3, 6)
    c.wash(c.noise(4, 4, 5), "#0d2f2a", "#1c5548", "#2f7561")
    c.wash(c.x, "#e9f5ea", "#e9f5ea", alpha=0.9 * (1 - abs(np.sin(drift * 2.6))) ** 7)
    c.wash(c.x, "#d8b25c", "#d8b25c", alpha=0.9 * (1 - abs(np.sin(drift * 1.1 + 2 * c.noise(3, 3, 5)))) ** 24)


def clouds(c: Canvas) -> None:
    c.wash(c.y, "#2a6fc0", "#8cc4f0")
    puff = np.clip(c.noise(3, 4, 7) * 2.6 - 0.95, 0, 1)
    c.wash(puff * 0.7 + 0.3 * c.noise(5, 5, 4), "#b8c6d8", "#f2f6fa", "#ffffff", alpha=puff)


def bricks(c: Canvas) -> None:
    c.wash(c.noise(60, 60), "#b9b2a6", "#d6d0c4")
    for row in range(11):
        for column in range(-1, 6):
            x, y = (column + row % 2 / 2) / 5, row / 11
            colour = mix(mix("#7f2f22", "#b5543a", c.rng.random()), "#3a2a2a", 0.35 * (c.rng.random() < 0.15))
            c.box(x + 0.008, y + 0.008, x + 0.192, y + 0.083, colour, 0.008)
    c.wash(c.noise(90, 60, 2), "#1a0a06", "#ffd9b8", alpha=0.16)


def sand(c: Canvas) -> None:
    ripples = np.sin(c.y * 46 + c.x * 9 + 9 * c.noise(3, 3, 3))
    c.wash(0.5 + 0.32 * ripples + 0.3 * (c.noise(200, 200) - 0.5), "#9a6b3f", "#d3a468", "#efcd94", "#fae6bd")
    for turn in np.linspace(0, TAU, 6)[:5] - np.pi / 2:
        c.leaf(*c.away(0.7, 0.68, -0.03, turn), 0.17, 0.075, turn, "#c1502e")
        c.line([(0.7, 0.68), c.away(0.7, 0.68, 0.1, turn)], "#f0a070", 0.008)


def water(c: Canvas) -> None:
    c.wash(c.noise(3, 3, 3), "#0a7f9c", "#14a9b8", "#3cc8c4")
    for cells, power in ((6, 7), (10, 9)):
        net = 1 - abs(2 * c.noise(cells, cells, 2) - 1)
        c.wash(c.x, "#eafffb", "#eafffb", alpha=0.8 * net**power)


# --- charts ----------------------------------------------------------------------------------------------


def axes(c: Canvas, title: str, labels: Iterable[object], ink: Colour, rule: Colour) -> None:
    c.text(0.5, 0.08, title, 0.065, ink, 0.03)
    for step, label in enumerate(labels):
        c.line([(0.12, 0.86 - 0.17 * step), (0.95, 0.86 - 0.17 * step)], rule, 0.003)
        c.text(0.07, 0.86 - 0.17 * step, str(label), 0.042, ink)


def chart_bar(c: Canvas) -> None:
    c.box(0, 0, 1, 1, "white")
    axes(c, "Visitors by month (thousands)", (0, 20, 40, 60, 80), "#333a45", "#d9dde3")
    months = zip("JFMAMJJASOND", (22, 25, 31, 38, 52, 63, 78, 74, 55, 41, 28, 33), strict=True)
    for i, (month, value) in enumerate(months):
        x = 0.14 + i * 0.068
        c.box(x, 0.86 - 0.17 * value / 20, x + 0.048, 0.86, "#f28c28" if value == 78 else "#3b6fb6")
        c.text(x + 0.024, 0.92, month, 0.045, "#333a45")


def chart_line(c: Canvas) -> None:
    c.box(0, 0, 1, 1, "#14182b")
    axes(c, "Server load, last 24 hours", ("0 %", "25 %", "50 %", "75 %", "100 %"), "#c9d1ee", "#2b3150")
    hours = np.linspace(0, 1, 49)
    for colour, phase, level in (("#38e0c8", 0, 0.3), ("#ff6b9a", 1.4, 0.5), ("#ffd24a", 3, 0.2)):
        load = level + 0.16 * np.sin(hours * TAU + phase) + c.rng.normal(0, 0.025, 49).cumsum() * 0.5
        c.line(zip(0.12 + 0.83 * hours, 0.86 - 0.68 * np.clip(load, 0.02, 0.98), strict=True), colour, 0.011)
    for hour in range(0, 25, 6):
        c.text(0.12 + 0.83 * hour / 24, 0.93, f"{hour:02}:00", 0.042, "#c9d1ee")


def chart_pie(c: Canvas) -> None:
    c.box(0, 0, 1, 1, "#fbf5e9")
    c.text(0.5, 0.08, "Energy mix", 0.08, "#3a3226", 0.03)
    shares = {"Wind": 34, "Solar": 26, "Hydro": 18, "Gas": 14, "Other": 8}
    colours = ("#2a9d8f", "#e9c46a", "#264653", "#e76f51", "#a8a29a")
    start = -90.0
    for row, ((name, share), colour) in enumerate(zip(shares.items(), colours, strict=True)):
        middle = c.away(0.37, 0.56, 0.02, np.radians(start + share * 1.8))
        x, y, r = middle[0] * c.w, middle[1] * c.h, 0.33 * c.unit
        c.pen.pieslice((x - r, y - r, x + r, y + r), start, start + share * 3.6, colour)
        c.box(0.71, 0.36 + row * 0.09, 0.75, 0.41 + row * 0.09, colour)
        c.text(0.86, 0.385 + row * 0.09, f"{name} {share} %", 0.045, "#3a3226")
        start += share * 3.6
    c.disc(0.37, 0.56, 0.14, "#fbf5e9")


def chart_scatter(c: Canvas) -> None:
    c.box(0, 0, 1, 1, "#eef1f4")
    c.box(0.12, 0.15, 0.95, 0.88, "white")
    axes(c, "Petal length and width", (0, 1, 2, 3), "#2f3540", "#e2e6ea")
    for x, y, colour in ((0.25, 0.76, "#7b3fb5"), (0.52, 0.52, "#1f9e5a"), (0.78, 0.32, "#e0512f")):
        for dx, dy in c.rng.normal(0, 1, (55, 2)):
            spot = (max(0.15, x + 0.05 * dx), y - 0.03 * dx + 0.04 * dy)
            c.disc(*spot, 0.015, mix(colour, "black", 0.25))
            c.disc(*spot, 0.012, mix(colour, "white", 0.35))
    for step in range(7):
        c.text(0.12 + 0.83 * step / 6, 0.93, str(step), 0.042, "#2f3540")


# --- posters ---------------------------------------------------------------------------------------------


def poster_concert(c: Canvas) -> None:
    sound = 0.5 + 0.5 * np.sin(c.distance(0.5, 0.42) * 70)
    c.wash(c.distance(0.5, 0.42), "#ff3d81", "#8a1fb0", "#2a0f5e", "#10062e")
    c.wash(c.x, "#ffe45c", "#39e6ff", alpha=(sound > 0.72) * np.clip(0.9 - c.distance(0.5, 0.42), 0, 1))
    c.disc(0.5, 0.42, 0.17, "#10062e")
    c.disc(0.5, 0.42, 0.06, "#ffe45c")
    c.disc(0.5, 0.42, 0.012, "#10062e")
    c.text(0.5, 0.09, "NIGHT WAVES", 0.125, "white", 0.05)
    c.text(0.5, 0.79, "LIVE IN CONCERT", 0.08, "#39e6ff", 0.03)
    c.text(0.5, 0.87, "Friday 21 June   20:30", 0.06, "white")
    c.text(0.5, 0.935, "Harbour Hall   Doors 19:00", 0.05, "#d8b8ff")


def poster_sale(c: Canvas) -> None:
    fan = (np.floor(c.angle(0.5, 0.48) / TAU * 24) % 2).astype("f4")
    c.wash(fan, "#ffd21f", "#ffb400")
    burst = [c.away(0.5, 0.47, 0.4 if i % 2 else 0.33, TAU * i / 40) for i in range(40)]
    c.shape(burst, "#d81e2c")
    c.text(0.5, 0.38, "SALE", 0.21, "white", 0.03)
    c.text(0.5, 0.58, "-50%", 0.19, "#ffe14d", 0.03)
    c.box(0, 0.88, 1, 1, "#1b1b1b")
    c.text(0.5, 0.94, "This weekend only!", 0.07, "white", 0.02)


def poster_film(c: Canvas) -> None:
    c.wash(c.y, "#06141c", "#0d3b46", "#3f8f8a", "#e8dcb0")
    c.ball(0.5, 0.43, 0.33, "#d8cf9f", "#fff9dc")
    for x, y, r in ((0.42, 0.38, 0.05), (0.6, 0.48, 0.07), (0.5, 0.56, 0.035), (0.62, 0.32, 0.03)):
        c.disc(x, y, r, "#e6deb4")
    hill = 0.78 - 0.14 * np.exp(-(((c.x[0] - 0.5) / 0.25) ** 2)) + 0.02 * c.skyline(20, 3)
    c.land(hill, "#04090d", "#04090d")
    c.disc(0.5, 0.545, 0.022, "#04090d")
    c.shape([(0.478, 0.563), (0.522, 0.563), (0.545, 0.66), (0.455, 0.66)], "#04090d")
    c.line([(0.455, 0.66), (0.43, 0.53)], "#04090d", 0.01)
    c.text(0.5, 0.085, "THE LAST TIDE", 0.11, "#f4ecc8", 0.02)
    c.text(0.5, 0.83, "A FILM BY IDA NORDHAUG", 0.05, "#e8dcb0")
    c.text(0.5, 0.9, "Mara Lind   Tomas Beck   Yuki Arai", 0.042, "#8fb8b4")
    c.text(0.5, 0.95, "IN CINEMAS THIS AUTUMN", 0.04, "#d99a4e", 0.03)


def poster_conference(c: Canvas) -> None:
    c.box(0, 0, 1, 1, "#f7f8fb")
    knots = np.column_stack([c.rng.uniform(0.6, 1.02, 34), c.rng.uniform(-0.02, 1.02, 34)])
    for i, a in enumerate(knots):
        for b in knots[:i]:
            if np.hypot(*(a - b)) < 0.2:
                c.line([tuple(a), tuple(b)], "#a9bdf2", 0.004)
    for i, (x, y) in enumerate(knots):
        c.disc(x, y, 0.012 + 0.02 * (i % 3), ("#2d5be3", "#12b5a6", "#ff7a59")[i % 3])
    c.box(0, 0, 0.02, 1, "#2d5be3")
    for y, words, size, ink in (
        (0.2, "VISION\nSUMMIT", 0.15, "#16203a"),
        (0.46, "Open conference on\nimage search", 0.058, "#2d5be3"),
        (0.65, "12 - 14 May\nLisbon", 0.07, "#16203a"),
        (0.85, "talks  workshops  demos", 0.045, "#6a7590"),
    ):
        c.text(0.29, y, words, size, ink, 0.04 if size > 0.06 else 0)


# --- patterns --------------------------------------------------------------------------------------------


def checks(c: Canvas) -> None:
    bulge = 1 + 0.9 * np.exp(-((c.distance(0.55, 0.5) / 0.28) ** 2))
    u, v = (c.x - 0.55) * c.w / c.unit / bulge * 14, (c.y - 0.5) / bulge * 14
    c.wash((np.floor(u) + np.floor(v)) % 2, "#0b0b0d", "#fafafa")


def stripes(c: Canvas) -> None:
    band = ((c.x * c.w + c.y * c.h) / c.unit * 7 % 5).astype(int)
    for i, colour in enumerate(("#f25f5c", "#ffe066", "#247ba0", "#70c1b3", "#fdf6ec")):
        c.wash(c.x, colour, colour, alpha=band == i)


def voronoi(c: Canvas) -> None:
    sites = (np.indices((8, 8)).reshape(2, -1).T + c.rng.uniform(0.02, 0.98, (64, 2))) / 8
    reach = np.stack([c.distance(x, y) for x, y in sites])
    nearest, second = np.partition(reach, 1, axis=0)[:2]
    c.wash(c.rng.random(64)[reach.argmin(0)], "#f9d5e5", "#eeac99", "#e06377", "#c83349", "#5b1f5e")
    c.wash(c.x, "#2b0f2e", "#2b0f2e", alpha=second - nearest < 0.012)


def spirals(c: Canvas) -> None:
    c.wash(c.y, "#fff4dc", "#fff4dc")
    for x, y, r, colour, way in (
        (0.3, 0.28, 0.34, "#0f4c5c", 1),
        (0.74, 0.42, 0.27, "#e36414", -1),
        (0.34, 0.72, 0.3, "#9a031e", -1),
        (0.76, 0.8, 0.22, "#5f7f3a", 1),
    ):
        far = c.distance(x, y)
        coil = (far / r * 6 - way * c.angle(x, y) / TAU) % 1
        c.wash(c.x, "#fff4dc", "#fff4dc", alpha=far < r + 0.015)
        c.wash(far / r, colour, mix(colour, "white", 0.25), alpha=(coil < 0.55) & (far < r))


def tartan(c: Canvas) -> None:
    threads = (("#0f5132", 0, 0.34), ("#14213d", 0.4, 0.2), ("#f4d35e", 0.68, 0.03), ("#f8f4e8", 0.86, 0.02))
    c.wash(c.y, "#a4161a", "#a4161a")
    for along, twill in ((c.x * c.w, 1), (c.y * c.h, -1)):
        sett = along / c.unit * 3 % 1
        weave = 0.55 + 0.3 * np.sign(np.sin((c.x * c.w + twill * c.y * c.h) / c.unit * 260))
        for colour, start, width in threads:
            c.wash(c.x, colour, colour, alpha=((sett >= start) & (sett < start + width)) * weave)


def hexagons(c: Canvas) -> None:
    c.box(0, 0, 1, 1, "#1b2a33")
    side, palette = 0.085, ("#2ec4b6", "#ff6b6b", "#ffe66d", "#f7fff7", "#4f7cac", "#2ec4b6")
    for row in range(10):
        for column in range(12):
            x, y = c.away(0, side * 1.5 * row * c.unit / c.h, side * np.sqrt(3) * (column + row % 2 / 2), 0)
            colour = palette[c.rng.integers(6)]
            for scale, tint in ((0.93, colour), (0.62, mix(colour, "#1b2a33", 0.35)), (0.32, colour)):
                c.shape([c.away(x, y, side * scale, TAU * (k + 0.5) / 6) for k in range(6)], tint)


def mosaic(c: Canvas) -> None:
    c.box(0, 0, 1, 1, "#e8e2d0")
    glaze = ("#e0b13c", "#1d3f72", "#2f7fb5", "#f3efe2", "#b23a2e", "#62a8c8")
    for ring in range(16):
        count, inner = 4 + ring * 6, 0.048 * ring
        for tile in range(count):
            a, b = TAU * (tile + 0.06) / count, TAU * (tile + 0.94) / count
            corners = ((inner + 0.004, a), (inner + 0.045, a), (inner + 0.045, b), (inner + 0.004, b))
            colour = glaze[0 if (tile * 6 // count + ring) % 6 == 0 else ring % 6]
            shade = mix(colour, ("black", "white")[tile % 2], c.rng.uniform(0, 0.2))
            c.shape([c.away(0.5, 0.5, far, turn) for far, turn in corners], shade)


# --- things ----------------------------------------------------------------------------------------------


def teapot(c: Canvas) -> None:
    c.wash((c.x * 16 % 1 > 0.5) * 1.0, "#f3d9c9", "#efcdb8")
    c.land(np.full(c.w, 0.72), "#a5714a", "#6f4527")
    c.disc(0.5, 0.84, 0.36, "#5a371f", 0.05)
    c.line([c.away(0.25, 0.52, 0.15, turn) for turn in np.linspace(0.6, TAU - 0.6, 60)], "#1f4f86", 0.045)
    for t in np.linspace(0, 1, 60):  # the spout
        c.disc(0.66 + 0.2 * t + 0.035 * np.sin(TAU * t), 0.66 - 0.27 * t, 0.065 - 0.038 * t, "#245a97")
    c.ball(0.48, 0.59, 0.3, "#173e70", "#7fb4ea", 0.87)
    c.disc(0.48, 0.35, 0.16, "#173e70", 0.03)
    c.ball(0.48, 0.325, 0.14, "#1f4f86", "#8cbcee", 0.36)
    c.ball(0.48, 0.26, 0.035, "#b98a1e", "#ffe28a")
    for x, y in ((0.38, 0.62), (0.48, 0.66), (0.58, 0.62)):
        for turn in np.linspace(0, TAU, 7)[:6]:
            c.leaf(x, y, 0.045, 0.03, turn, "#f7f7ff")
        c.disc(x, y, 0.012, "#f2c14e")
    for x in (0.83, 0.87):
        c.line([(x + 0.02 * np.sin(30 * t), 0.34 - t) for t in np.linspace(0, 0.24, 30)], "#fdf6f0", 0.01)


def fruit(c: Canvas) -> None:
    c.wash(c.distance(0.35, 0.25), "#6f7b64", "#3f4d42", "#1c241f")
    c.land(np.full(c.w, 0.72), "#8a3b2a", "#4d1c16")
    c.disc(0.52, 0.92, 0.38, "#32100c", 0.04)
    for x, y, r, dark, light in (
        (0.29, 0.5, 0.13, "#c25a00", "#ffb84d"),
        (0.67, 0.5, 0.13, "#7a0f18", "#f0605a"),
        (0.48, 0.46, 0.15, "#4f7a14", "#c7e36a"),
        (0.39, 0.59, 0.12, "#c25a00", "#ffc05e"),
        (0.58, 0.6, 0.13, "#8f1420", "#f8837a"),
    ):
        c.ball(x, y, r, dark, light)
        c.line([(x, y - r * 0.75), (x + 0.012, y - r * 1.1)], "#3a2412", 0.012)
    for i in range(16):
        x, y = 0.77 + 0.035 * (i % 4 - 1.5), 0.54 + 0.04 * (i // 4) + 0.01 * (i % 2)
        c.ball(x, y, 0.036, "#2a1145", "#9a6fd0")
    c.box(0.4, 0.88, 0.6, 0.93, "#8d846f", 0.01)
    bowl = (np.hypot((c.x - 0.5) / 0.41, (c.y - 0.63) / 0.27) < 1) & (c.y > 0.63)
    c.wash((c.x - 0.09) / 0.82, "#e2dac6", "#fffdf5", "#d8cfba", "#857b66", alpha=bowl)
    c.wash(abs(np.sin(c.x * 38)), "#fffdf5", "#2f6db0", alpha=bowl & (abs(c.y - 0.7) < 0.018))


def sailing_boat(c: Canvas) -> None:
    c.wash(c.y / 0.6, "#2f8fe0", "#a8dcf8", "#f2fbff")
    c.wash(c.x, "white", "white", alpha=np.clip(c.noise(3, 6, 5) * 3 - 1.6, 0, 0.9) * (c.y < 0.5))
    c.disc(0.14, 0.16, 0.07, "#fff2a0")
    c.land(0.6 - 0.07 * c.skyline(4, 3) * (c.x[0] > 0.6), "#6f9a78", "#4f7d6a")
    c.land(np.full(c.w, 0.6), "#1f86b8", "#0a4678")
    c.line([(0.452, 0.74), (0.452, 0.1)], "#5a3a22", 0.014)
    c.shape([(0.465, 0.12), (0.465, 0.68), (0.72, 0.68), (0.6, 0.42)], "#fdfaf2")
    for y, leech in ((0.36, 0.568), (0.42, 0.598)):
        c.shape([(0.465, y), (0.465, y + 0.035), (leech + 0.017, y + 0.035), (leech, y)], "#d8322f")
    c.shape([(0.44, 0.16), (0.44, 0.68), (0.24, 0.68)], "#f6dcb4")
    c.shape([(0.22, 0.72), (0.8, 0.7), (0.7, 0.84), (0.3, 0.84)], "#b5261e")
    c.shape([(0.22, 0.72), (0.8, 0.7), (0.79, 0.725), (0.235, 0.745)], "#fff6e6")
    for row in range(4):
        swell = 0.82 + 0.05 * row + 0.012 * np.sin(c.x[0] * (26 - 4 * row) + row * 2)
        c.land(swell, mix("#2f9acb", "#0a4678", row / 4), "#0a3c6a")
    for x, y in ((0.82, 0.25), (0.88, 0.31), (0.76, 0.32)):
        gull(c, x, y, 0.025, "#25415a")


def balloon(c: Canvas, x: float, y: float, r: float, colours: tuple[Colour, Colour]) -> None:
    u, v = (c.x - x) * c.w / c.unit / r, (c.y - y) * c.h / c.unit / r
    half = np.where(v < 0.4, np.sqrt(np.clip(1 - v * v, 0, 1)), 0.9165 - 0.66 * (v - 0.4))
    round_ = np.arcsin(np.clip(u / np.maximum(half, 0.01), -1, 1)) / np.pi + 0.5
    envelope = (abs(u) < half) & (v < 1.45)
    for side in (-1, 1):
        rope = ((1.4, 0.15), (1.8, 0.06))
        c.line([c.away(x, y, r * far, np.pi / 2 + side * turn) for far, turn in rope], "#4a3626", 0.004)
    c.wash(np.floor(round_ * 9) % 2, *colours, alpha=envelope)
    c.wash(c.x, "#301020", "#301020", alpha=envelope * 0.45 * round_**2)
    basket = (*c.away(x, y, r * 1.75, np.pi / 2 + 0.09), *c.away(x, y, r * 2, np.pi / 2 - 0.075))
    c.box(*basket, "#7a4d28", 0.008)


def balloons(c: Canvas) -> None:
    c.wash(c.y, "#7cc6f2", "#d5eefb", "#fde9d9")
    c.land(0.84 - 0.12 * c.skyline(3, 2), "#a7c48a", "#6f9a5a")
    c.land(0.93 - 0.08 * c.skyline(4, 2), "#5f8f4a", "#35602c")
    balloon(c, 0.36, 0.27, 0.24, ("#e6394a", "#ffd34e"))
    balloon(c, 0.77, 0.45, 0.15, ("#2a6fb8", "#f4f4f0"))
    balloon(c, 0.2, 0.66, 0.09, ("#2f9e6a", "#f28f3b"))
    balloon(c, 0.68, 0.14, 0.07, ("#8a4fb5", "#f7b5d0"))


def sunflower(c: Canvas) -> None:
    c.wash(c.noise(4, 4, 2), "#3f6f2e", "#7fa83e", "#b9cf6a")
    c.line([(0.5, 0.5), (0.53, 0.8), (0.5, 1.02)], "#2f5a1e", 0.05)
    for turn in (0.4, 2.6):
        c.leaf(0.52, 0.9, 0.36, 0.16, turn - 0.6, "#38702a")
    for ring, (count, colour) in enumerate(((24, "#c97a08"), (24, "#f2a90f"), (20, "#ffd02e"))):
        for turn in np.arange(count) * TAU / count + ring * 0.12:
            root, lean = c.away(0.5, 0.44, 0.1, turn), turn + c.rng.normal(0, 0.06)
            c.leaf(*root, 0.3 - 0.025 * ring, 0.11, lean, mix(colour, "#8a4a00", c.rng.random() * 0.2))
    c.disc(0.5, 0.44, 0.19, "#2a1608")
    for seed in range(420):
        spot = c.away(0.5, 0.44, 0.0091 * np.sqrt(seed), seed * 2.39996)  # the golden angle, in radians
        c.disc(*spot, 0.0052, mix("#c98a2a", "#4a260c", seed / 420))


def coffee(c: Canvas) -> None:
    c.wash(0.6 * c.noise(90, 2, 2) + 0.4 * c.noise(14, 2), "#2b3440", "#46525f", "#5d6b78")
    c.disc(0.47, 0.56, 0.41, "#1f262e")
    c.ball(0.45, 0.52, 0.4, "#d5d8da", "#ffffff")
    c.disc(0.46, 0.535, 0.27, "#bcc2c7")
    c.line([(0.45, 0.52), (0.71, 0.27)], "#f8f9fa", 0.06)
    c.disc(0.71, 0.27, 0.03, "#f8f9fa")
    c.disc(0.45, 0.52, 0.245, "#f8f9fa")
    inside = c.distance(0.45, 0.52) < 0.215
    c.wash(c.distance(0.43, 0.5) / 0.23, "#b9743a", "#8a4e22", "#5a2d10", alpha=inside)
    t = np.linspace(0, TAU, 80)
    heart = np.stack([16 * np.sin(t) ** 3, 4 - 13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t)])
    for scale, colour in ((1.0, "#f5dfbd"), (0.7, "#a9642f"), (0.42, "#f5dfbd")):
        u, v = heart * scale * 0.0095 * c.unit
        c.shape(zip(0.45 + u / c.w, 0.49 + v / c.h, strict=True), colour)
    for x, y in ((0.86, 0.66), (0.88, 0.85)):
        c.disc(x + 0.01, y + 0.02, 0.1, "#1f262e")
        c.ball(x, y, 0.1, "#a5682e", "#e3b271")
        for chip in range(9):
            c.disc(*c.away(x, y, 0.01 + 0.008 * chip, chip * 2.4), 0.011, "#4a2412")


def clock(c: Canvas) -> None:
    c.box(0, 0, 1, 1, "#0f766e")
    for row in range(9):
        for column in range(9):
            c.disc((column + row % 2 / 2) / 8, row / 8, 0.02, "#128a80")
    for r, colour in ((0.42, "#0a4f4a"), (0.41, "#d9a441"), (0.37, "#fffaf0")):
        c.disc(0.5, 0.5, r, colour)
    for minute in range(60):
        inner, width = (0.335, 0.004) if minute % 5 else (0.32, 0.012)
        c.line([c.away(0.5, 0.5, r, TAU * minute / 60) for r in (0.35, inner)], "#333333", width)
    for hour in range(1, 13):
        c.text(*c.away(0.5, 0.5, 0.265, TAU * (hour - 3) / 12), str(hour), 0.07, "#1f2937", 0.02)
    for turn, length, width in ((TAU * (10.15 - 3) / 12, 0.17, 0.022), (TAU * (9 - 15) / 60, 0.27, 0.014)):
        c.line([c.away(0.5, 0.5, -0.03, turn), c.away(0.5, 0.5, length, turn)], "#1f2937", width)
    c.line([c.away(0.5, 0.5, -0.06, 1.9), c.away(0.5, 0.5, 0.3, 1.9)], "#dc2626", 0.006)
    c.disc(0.5, 0.5, 0.02, "#dc2626")


# --- files -----------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    paint: Callable[[Canvas], None]
    size: tuple[int, int]
    quality: int  # of JPEG and WebP; for PNG the number of colours in its palette


SAMPLES = {
    "aurora.webp": Sample(aurora, (600, 400), 72),
    "balloons.jpg": Sample(balloons, (420, 560), 80),
    "beach.webp": Sample(beach, (600, 400), 70),
    "bricks.jpg": Sample(bricks, (440, 440), 60),
    "chart-bar.png": Sample(chart_bar, (560, 380), 32),
    "chart-line.png": Sample(chart_line, (600, 380), 48),
    "chart-pie.png": Sample(chart_pie, (480, 400), 48),
    "chart-scatter.png": Sample(chart_scatter, (520, 420), 48),
    "checks.png": Sample(checks, (500, 400), 16),
    "city-night.jpg": Sample(city_night, (420, 600), 68),
    "clock.png": Sample(clock, (400, 400), 48),
    "clouds.jpg": Sample(clouds, (600, 380), 75),
    "coffee.jpg": Sample(coffee, (520, 420), 75),
    "desert.jpg": Sample(desert, (640, 400), 78),
    "forest.jpg": Sample(forest, (400, 560), 70),
    "fruit.jpg": Sample(fruit, (460, 460), 80),
    "harbour-houses.webp": Sample(harbour_houses, (600, 440), 70),
    "hexagons.png": Sample(hexagons, (480, 360), 96),
    "lavender-field.jpg": Sample(lavender_field, (640, 400), 60),
    "lighthouse.jpg": Sample(lighthouse, (400, 580), 78),
    "marble.jpg": Sample(marble, (420, 420), 68),
    "mosaic.webp": Sample(mosaic, (440, 440), 60),
    "mountains.jpg": Sample(mountains, (640, 420), 68),
    "planet.webp": Sample(planet, (480, 480), 72),
    "poster-concert.jpg": Sample(poster_concert, (400, 560), 75),
    "poster-conference.png": Sample(poster_conference, (560, 400), 64),
    "poster-film.jpg": Sample(poster_film, (400, 600), 78),
    "poster-sale.png": Sample(poster_sale, (420, 420), 32),
    "sailing-boat.jpg": Sample(sailing_boat, (560, 440), 78),
    "sand.webp": Sample(sand, (440, 440), 50),
    "spirals.png": Sample(spirals, (400, 480), 48),
    "stripes.png": Sample(stripes, (360, 480), 32),
    "sunflower.webp": Sample(sunflower, (420, 520), 72),
    "sunset-sea.jpg": Sample(sunset_sea, (640, 400), 78),
    "tartan.webp": Sample(tartan, (400, 400), 50),
    "teapot.jpg": Sample(teapot, (520, 440), 80),
    "voronoi.png": Sample(voronoi, (480, 480), 96),
    "water.jpg": Sample(water, (480, 400), 68),
    "wood.jpg": Sample(wood, (480, 380), 62),
}


def draw(name: str) -> Image.Image:
    sample = SAMPLES[name]
    canvas = Canvas(sample.size, seed=zlib.crc32(name.encode()))  # hash() differs from run to run
    sample.paint(canvas)
    return canvas.image.resize(sample.size, Image.Resampling.LANCZOS)


def save(image: Image.Image, path: Path, quality: int) -> None:
    if path.suffix == ".png":
        image.quantize(quality, dither=Image.Dither.NONE).save(path, optimize=True)
    else:
        image.save(path, quality=quality, method=6)  # method: WebP's most thorough search


# --- queries ---------------------------------------------------------------------------------------------


def cropped(image: Image.Image) -> Image.Image:
    """About 65 % of the area (0.81² of the sides), off centre."""
    w, h = image.size
    return image.crop((round(w * 0.12), round(h * 0.05), round(w * 0.93), round(h * 0.86)))


def mirrored(image: Image.Image) -> Image.Image:
    """Left and right swapped, warmer, brighter and stronger in colour."""
    warm = Image.blend(ImageOps.mirror(image), Image.new("RGB", image.size, "#ff9a3c"), 0.16)
    return ImageEnhance.Color(ImageEnhance.Brightness(warm).enhance(1.1)).enhance(1.3)


def captioned(image: Image.Image) -> Image.Image:
    """In a white frame, with a caption on a dark bar across the foot."""
    w, h = image.size
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, round(h * 0.84), w, h), "#101418")
    pen.text((w / 2, h * 0.92), "Time for tea?", "white", ImageFont.load_default(size=h * 0.09), anchor="mm")
    return ImageOps.expand(image, border=round(w * 0.05), fill="white")


QUERIES = {"cropped.jpg": "lighthouse.jpg", "mirrored.jpg": "sailing-boat.jpg", "captioned.jpg": "teapot.jpg"}
EDITS = {  # the function, and the JPEG quality: 35 is visibly damaged
    "cropped.jpg": (cropped, 35),
    "mirrored.jpg": (mirrored, 80),
    "captioned.jpg": (captioned, 80),
}


def make_samples(root: Path) -> list[Path]:
    samples, queries = root / SAMPLE_FOLDER, root / QUERY_FOLDER
    for folder in (samples, queries):
        folder.mkdir(parents=True, exist_ok=True)
    for name, sample in SAMPLES.items():
        save(draw(name), samples / name, sample.quality)
    for name, (edit, quality) in EDITS.items():
        with Image.open(samples / QUERIES[name]) as source:
            save(edit(source.convert("RGB")), queries / name, quality)
    return [samples / name for name in SAMPLES] + [queries / name for name in QUERIES]


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the sample pictures and the example queries.")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    paths = make_samples(parser.parse_args().root)
    print(f"{len(paths)} pictures, {sum(path.stat().st_size for path in paths) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
