"""Pictures of what people have beside photographs, drawn from a seed: forms, cards, charts, codes, memes, films."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

WORDS = (  # noqa: SIM905
    "amber basket candle dragon eleven fountain garden harbour island jacket kettle ladder meadow needle "
    "orange pepper quarry ribbon saddle timber under valley window yellow zipper anchor bridge copper "
    "desert engine forest glacier hammer iron jungle kitchen lantern mirror nickel oyster pocket "
).split()
NAMES = (  # noqa: SIM905
    "Abel Bruno Carla Dora Edgar Frida Gustav Hanna Igor Jutta Karim Lydia Moritz Nadia Oskar Paula Quirin "
).split()


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def photo(seed: int, size: tuple[int, int] = (480, 360), least: int = 0, most: int = 255) -> Image.Image:
    """Noise as in a photograph, coarse to fine, each octave fainter than the one before, and a few things with edges.

    Its brightness lies between `least` and `most`.
    """
    random, (width, height) = np.random.default_rng(seed), size
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 8):
        cells = 2**octave
        noise = random.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        noise = 0.7 * noise.mean(2, keepdims=True) + 0.3 * noise
        planes = [Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC) for plane in noise.transpose(2, 0, 1)]
        total += np.stack([np.asarray(plane) for plane in planes], 2) * 0.62**octave
    low, high = np.percentile(total, (1, 99))
    image = Image.fromarray(((total - low) / (high - low) * 255).clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for _ in range(14):
        x, y, r = random.uniform(0, width), random.uniform(0, height), random.uniform(0.02, 0.1) * min(size)
        shape = canvas.ellipse if random.random() < 0.5 else canvas.rectangle
        shape((x - r, y - r, x + r, y + 1.5 * r), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image.point([least + value * (most - least) // 255 for value in range(256)] * 3)


def sentence(random: Random, words: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(words))


def text_page(seed: int, size: tuple[int, int] = (600, 800)) -> Image.Image:
    random, image = Random(seed), Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((50, 40), sentence(random, 3).title(), "black", font(26))
    for y in range(95, size[1] - 50, 22):
        if random.random() > 0.12:
            canvas.text((50, y), sentence(random, 9)[:66], "black", font(15))
    return image


def form(seed: int) -> Image.Image:
    """One form; what is written in it depends on the seed."""
    image, random = Image.new("RGB", (600, 760), "white"), Random(seed)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((30, 24, 570, 70), outline="black", width=2)
    canvas.text((44, 34), "Application for a parking permit", "black", font(24))
    labels = ("Surname", "First name", "Date of birth", "Street and number", "City", "Telephone", "Number plate")
    for i, label in enumerate(labels):
        y = 95 + 76 * i
        canvas.text((30, y), label + " (please in block letters)", "black", font(13))
        canvas.rectangle((30, y + 18, 570, y + 50), outline="black")
        written = f"{random.choice(NAMES)} {random.choice(WORDS)} {random.randint(10, 99999)}"
        canvas.text((42, y + 21), written.title(), "navy", font(21))
    for i, line in enumerate(("I have read the terms overleaf and agree to them.", "Do not fold. Keep a copy.")):
        canvas.text((30, 650 + 24 * i), line, "black", font(15))
    return image


def table(seed: int) -> Image.Image:
    """One table; its numbers depend on the seed."""
    image, random = Image.new("RGB", (560, 420), "white"), Random(seed)
    canvas = ImageDraw.Draw(image)
    for column, head in enumerate(("Branch", "First", "Second", "Third", "Total")):
        canvas.text((20 + 106 * column, 18), head, "black", font(18))
    for row in range(11):
        canvas.line((14, 46 + 32 * row, 546, 46 + 32 * row), "black", 1)
        if row < 10:
            canvas.text((20, 52 + 32 * row), NAMES[row], "black", font(17))
            for column in range(1, 5):
                canvas.text((20 + 106 * column, 52 + 32 * row), f"{random.uniform(10, 9999):,.1f}", "black", font(17))
    for column in range(6):
        x = 14 + 106 * column + (2 if column == 5 else 0)
        canvas.line((x, 12, x, 366), "black", 1)
    return image


PIPS = {8: [(0, 0), (2, 0), (0, 2), (2, 2), (0, 4), (2, 4), (1, 1), (1, 3)]}
PIPS[9] = [(0, 0), (2, 0), (0, 1.33), (2, 1.33), (0, 2.67), (2, 2.67), (0, 4), (2, 4), (1, 2)]
PIPS[10] = [*PIPS[9][:-1], (1, 0.67), (1, 3.33)]
PIPS[7] = PIPS[8][:-1]


def pip(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, suit: str, down: bool) -> None:
    colour, s = ("#c01020" if suit in ("heart", "diamond") else "#101010"), -1 if down else 1
    if suit == "diamond":
        canvas.polygon([(x, y - 1.3 * r), (x + r, y), (x, y + 1.3 * r), (x - r, y)], fill=colour)
        return
    if suit == "heart":
        lobes, tip = [(-0.5, -0.4), (0.5, -0.4)], (0, 1.3)
    else:
        lobes, tip = [(-0.5, 0.4), (0.5, 0.4)], (0, -1.3)
        canvas.polygon([(x, y), (x - 0.45 * r, y + s * 1.3 * r), (x + 0.45 * r, y + s * 1.3 * r)], fill=colour)
    if suit == "club":
        lobes.append((0, -0.6))
    for dx, dy in lobes:
        canvas.ellipse((x + dx * r - 0.6 * r, y + s * dy * r - 0.6 * r, x + dx * r + 0.6 * r, y + s * dy * r + 0.6 * r),
                       fill=colour)  # fmt: skip
    if suit != "club":
        wide = -0.6 if suit == "heart" else 0.6
        canvas.polygon([(x - 1.05 * r, y + s * wide * 0.6 * r), (x + 1.05 * r, y + s * wide * 0.6 * r),
                        (x, y + s * tip[1] * r)], fill=colour)  # fmt: skip


def card(rank: int, suit: str) -> Image.Image:
    image = Image.new("RGB", (360, 504), "#206040")
    canvas = ImageDraw.Draw(image)
    canvas.rounded_rectangle((6, 6, 353, 497), 22, fill="white", outline="black", width=2)
    colour = "#c01020" if suit in ("heart", "diamond") else "#101010"
    for turn in range(2):
        canvas.text((22, 16), str(rank), colour, font(40))
        pip(canvas, 38, 82, 14, suit, False)
        if not turn:
            image.paste(image.rotate(180))
            canvas = ImageDraw.Draw(image)
    for column, row in PIPS[rank]:
        pip(canvas, 108 + 72 * column, 82 + 85 * row, 27, suit, row > 2)
    return image


def flag(colours: Sequence[str], emblem: str = "gold") -> Image.Image:
    """Three stripes, a canton with a sun, and stars: one layout in any colours."""
    image = Image.new("RGB", (480, 320), colours[0])
    canvas = ImageDraw.Draw(image)
    for i, colour in enumerate(colours[:3]):
        canvas.rectangle((0, 107 * i, 480, 107 * i + 106), fill=colour)
    canvas.polygon([(0, 0), (190, 160), (0, 320)], fill=colours[3])
    for x, y, r in ((62, 160, 44), (250, 52, 24), (330, 160, 30), (420, 265, 26), (410, 50, 20)):
        star = [(x + (r if i % 2 else 0.4 * r) * math.sin(i * math.pi / 5 + x),
                 y + (r if i % 2 else 0.4 * r) * math.cos(i * math.pi / 5 + x)) for i in range(10)]  # fmt: skip
        canvas.polygon(star, fill=emblem)
    return image


def bar_code(seed: int) -> Image.Image:
    """Digits and bars, as of Code 128: the same start and stop, other bars between."""
    random, image = Random(seed), Image.new("RGB", (520, 240), "white")
    canvas, x, module = ImageDraw.Draw(image), 30, 3
    for symbol in range(13):
        chance = Random(-1 - symbol) if symbol in (0, 1, 2, 12) else random
        widths = [1] * 6
        for _ in range(5):
            widths[chance.randrange(6)] += 1
        for i, width in enumerate(widths):
            if i % 2 == 0:
                canvas.rectangle((x, 20, x + module * width - 1, 180), fill="black")
            x += module * width
    canvas.text((120, 190), f"4 00{random.randint(10**8, 10**9 - 1)}", "black", font(28))
    return image


def qr_code(seed: int, other: float = 0.1, side: int = 29, module: int = 12) -> Image.Image:
    """Modules with three finders. Of two seeds, the share `other` of the modules is drawn anew: the rest is padding."""
    chance = np.random.default_rng(0)
    dots = chance.random((side, side)) < 0.5
    anew = chance.random((side, side)) < 2 * other
    dots[anew] = (np.random.default_rng(seed).random((side, side)) < 0.5)[anew]
    finder = np.zeros((8, 8), bool)
    finder[:7, :7] = True
    finder[1:6, 1:6] = False
    finder[2:5, 2:5] = True
    dots[:8, :8], dots[:8, -8:], dots[-8:, :8] = finder, finder[:, ::-1], finder[::-1]
    code = Image.fromarray(np.where(dots, 0, 255).astype(np.uint8)).convert("RGB")
    code = code.resize((side * module, side * module), Image.Resampling.NEAREST)
    page = Image.new("RGB", (code.width + 8 * module, code.height + 8 * module), "white")
    page.paste(code, (4 * module, 4 * module))
    return page


def chart(seed: int) -> Image.Image:
    """Bars in one style; their heights and the title depend on the seed."""
    random, image = Random(seed), Image.new("RGB", (560, 400), "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((150, 12), "Turnover of " + random.choice(WORDS), "black", font(22))
    for i in range(6):
        canvas.line((60, 340 - 56 * i, 540, 340 - 56 * i), "#cccccc")
        canvas.text((16, 331 - 56 * i), f"{200 * i}", "black", font(14))
    for i in range(8):
        height = random.randint(30, 280)
        canvas.rectangle((74 + 58 * i, 340 - height, 110 + 58 * i, 340), fill="#3070b0", outline="black")
        canvas.text((80 + 58 * i, 348), ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug")[i], "black", font(14))
    canvas.line((60, 60, 60, 340, 540, 340), "black", 2)
    return image


def meme(template: int, above: str, below: str) -> Image.Image:
    image = photo(template, (480, 400))
    canvas = ImageDraw.Draw(image)
    for y, text in ((14, above), (346, below)):
        width = canvas.textlength(text, font(36))
        canvas.text(((480 - width) / 2, y), text, "white", font(36), stroke_width=3, stroke_fill="black")
    return image


def bricks(size: tuple[int, int] = (480, 360), wall: str = "#a04030", joint: str = "#e0d8c8", row: int = 30,
           offset: float = 0.5, shades: int | None = None) -> Image.Image:  # fmt: skip
    """A wall of bricks; with a seed `shades`, each brick has its own shade."""
    random, base = Random(shades), ImageColor.getrgb(wall)
    image = Image.new("RGB", size, wall)
    canvas = ImageDraw.Draw(image)
    places = [
        (x, y)
        for n, y in enumerate(range(0, size[1], row))
        for x in range(int(n % 2 * offset * 2 * row) - 2 * row, size[0], 2 * row)
    ]
    for x, y in places if shades is not None else []:
        change = random.randint(-12, 12)
        canvas.rectangle((x, y, x + 2 * row, y + row), tuple(value + change for value in base))
    for x, y in places:
        canvas.line((x, y + row, x, y, x + 2 * row, y), joint, 4)
    return image


def two_frames(seed: int, shift: int = 2, size: tuple[int, int] = (1200, 800)) -> tuple[Image.Image, Image.Image]:
    """Two frames of a film: three things have moved by `shift` pixels, the rest stood still."""
    scene, frames = photo(seed, size), []
    things = [photo(seed + 1 + n, (90, 120)) for n in range(3)]
    for moved in (0, shift):
        frame = scene.copy()
        for thing, (x, y) in zip(things, ((200, 150), (620, 420), (900, 210))):
            frame.paste(thing, (x + moved, y + moved // 2))
        frames.append(frame)
    return frames[0], frames[1]


def watermarked(image: Image.Image, strength: int = 150) -> Image.Image:
    mark = Image.new("L", image.size)
    canvas = ImageDraw.Draw(mark)
    for y in range(10, image.height, 80):
        for x in range(-40 + y % 160, image.width, 200):
            canvas.text((x, y), "SAMPLE ©", strength, font(34))
    marked = image.copy()
    marked.paste("white", mask=mark)
    return marked


def panel(seed: int, size: tuple[int, int] = (330, 240)) -> Image.Image:
    """A drawing in black lines and flat colours, with a bubble."""
    random, image = Random(seed), Image.new("RGB", size, Random(seed).choice(("#d8e8f8", "#f8e8c0", "#d8f0d0")))
    canvas, (width, height) = ImageDraw.Draw(image), size
    for _ in range(22):
        x, y, r = random.uniform(0, width), random.uniform(0.3 * height, height), random.uniform(8, 34)
        shape, colour = random.choice((canvas.ellipse, canvas.rectangle)), f"#{random.randrange(1 << 24):06x}"
        shape((x - r, y - r, x + r, y + 1.4 * r), fill=colour, outline="black", width=3)
        canvas.line((x, y, x + random.uniform(-50, 50), y + random.uniform(-50, 50)), "black", 3)
    canvas.ellipse((20, 8, width - 20, 64), fill="white", outline="black", width=3)
    canvas.text((48, 24), sentence(random, 3), "black", font(18))
    canvas.rectangle((0, 0, width - 1, height - 1), outline="black", width=4)
    return image


def comic_page(seed: int) -> Image.Image:
    """2 × 4 panels of which the first is panel(10 seed), and so on."""
    page = Image.new("RGB", (720, 1050), "white")
    for n in range(8):
        page.paste(panel(10 * seed + n), (20 + 350 * (n % 2), 20 + 256 * (n // 2)))
    return page


def comic_strip(seed: int, ratio: int = 15) -> Image.Image:
    """Panels below one another, `ratio` times as high as wide."""
    strip = Image.new("RGB", (360, 360 * ratio), "white")
    for n in range(360 * ratio // 258):
        strip.paste(panel(100 * seed + n), (15, 10 + 258 * n))
    return strip


def drawing(seed: int, smile: bool = True) -> Image.Image:
    """A face in lines."""
    image, random = Image.new("RGB", (400, 400), "white"), Random(seed)
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((60, 50, 340, 360), outline="black", width=7)
    for x in (145, 255):
        canvas.ellipse((x - 26, 150, x + 26, 186), outline="black", width=6)
        canvas.ellipse((x - 8, 160, x + 8, 176), fill="black")
    canvas.line((200, 180, 184, 240, 212, 244), "black", 6)
    canvas.arc((140, 235, 260, 315) if smile else (140, 285, 260, 345), 20 if smile else 200, 160 if smile else 340,
               "black", 7)  # fmt: skip
    for _ in range(9 if smile else 0):
        x = random.randint(100, 300)
        canvas.line((x, 70, x + random.randint(-40, 40), 15), "black", 6)
    return image


def chat(seed: int) -> Image.Image:
    image, random = Image.new("RGB", (400, 720), "#e8e0d8"), Random(seed)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, 400, 60), fill="#206060")
    canvas.text((70, 18), "Family", "white", font(22))
    for n in range(8):
        right, y = random.random() < 0.5, 80 + 78 * n
        canvas.rounded_rectangle((90 if right else 12, y, 388 if right else 310, y + 64), 12,
                                 fill="#d0f0c0" if right else "white")  # fmt: skip
        for line in range(2):
            canvas.text((102 if right else 24, y + 8 + 24 * line), sentence(random, 4)[:30], "black", font(16))
    return image
