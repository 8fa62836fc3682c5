"""How well does a model find edited copies, on your own photographs?

    python tests/evaluate.py ~/Pictures
    python tests/evaluate.py ~/Pictures --model offline --model resnet50 --weights resnet50-0676ba61.pth
    python tests/evaluate.py ~/Pictures --distractors 50000 --from ~/Downloads --cache /tmp/kept --strangers 2000
    python tests/evaluate.py --kinds ~/sets --names
    SEED=8 python tests/evaluate.py ~/Pictures      another draw of the photographs to edit

A number of the photographs are edited in many ways. Each edited copy is then searched for among all of them, by the
program itself. Printed is how often the original comes first (@1), among the first ten (@10), first with a label (copy
or variant), and first as a copy. Where the folder has one sub-folder a class, also how many of a photograph's nearest
neighbours are of its own class (precision@1 and @10), and mAP.

    --others       also the edits that other programs make, and chains of three of them
    --strangers    how many queries without a source get a label all the same, screenshots of one app among them
    --duplicates   how many of the pairs that `--duplicates` finds are wrong, and how many of the edited files it finds
    --times        seconds of one query, alone and among a hundred, and of the points of one picture
    --distractors  so many further pictures are in the collection: crops of photographs that nothing else is done with
    --kinds        the folder holds sets (sub-folders) of distinct pictures. For each set: how many `copy` labels are
                   wrong, what `--duplicates -0` lists, and how often the source of an edit is found and labelled
"""

import argparse
import io
import os
import random
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_million import seconds
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import main

COPY = ("identical", "copy")  # labels that say: the same picture
SEED = int(os.environ.get("SEED", 7))  # of the shuffle that chooses the photographs to edit

QUERIES = 150  # photographs to edit; so many are kept for it, even if fewer are asked about

Edit = Callable[[Image.Image], Image.Image]

BACKDROPS: list[Image.Image] = []  # other photographs, into which a picture is set


def number_of(image: Image.Image) -> int:
    """What is chosen for a picture is drawn from its own bytes: each run makes the same edits."""
    return zlib.crc32(image.tobytes())


def backdrop(image: Image.Image) -> Image.Image:
    others = BACKDROPS or [Image.effect_mandelbrot((500, 400), (-2, -1, 1, 1), 80).convert("RGB")]
    return others[number_of(image) % len(others)]


def resaved(image: Image.Image, quality: int) -> Image.Image:
    image.save(stream := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def crop(image: Image.Image, area: float) -> Image.Image:
    """Keep `area` of the picture, both sides cut alike, at a place that is drawn."""
    place = random.Random(number_of(image))
    width, height = round(image.width * area**0.5), round(image.height * area**0.5)
    left, top = place.randint(0, image.width - width), place.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def colour(image: Image.Image) -> Image.Image:
    """Saturation × 1.5, brightness × 1.25, hue turned by 25°."""
    image = ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(1.5)).enhance(1.25)
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point([(h + 18) % 256 for h in range(256)]), saturation, value)).convert("RGB")


def caption(image: Image.Image) -> Image.Image:
    """White text on a black bar that hides the lowest 16 % of the picture."""
    image, top = image.copy(), round(image.height * 0.84)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, top, image.width, image.height), fill="black")
    font = ImageFont.load_default(size=image.height * 0.07)
    draw.text((image.width / 2, (top + image.height) / 2), "when you see it", "white", font, anchor="mm")
    return image


def polaroid(image: Image.Image) -> Image.Image:
    """An off-white frame that is deepest below, with a line of handwriting."""
    edge = round(0.08 * min(image.size))
    framed = ImageOps.expand(image, (edge, edge, edge, 4 * edge), (247, 245, 238))
    place, font = (framed.width / 2, framed.height - 2 * edge), ImageFont.load_default(size=1.4 * edge)
    ImageDraw.Draw(framed).text(place, "summer, at last", (60, 60, 80), font, anchor="mm")
    return framed


def app(image: Image.Image) -> Image.Image:
    """A phone's screen: status bar, header, the picture across the whole width, buttons, text and a tab bar."""
    width, height = 720, 1440
    canvas = Image.new("RGB", (width, height), "white")
    draw, pale, ink = ImageDraw.Draw(canvas), (225, 227, 232), (30, 32, 38)
    small, large = ImageFont.load_default(size=26), ImageFont.load_default(size=34)
    draw.text((30, 16), "9:41", ink, small)
    draw.rounded_rectangle((630, 20, 690, 46), 8, outline=ink, width=3)
    draw.ellipse((30, 90, 110, 170), fill=(120, 150, 210))
    draw.text((130, 98), "lena.photos", ink, large)
    draw.text((130, 138), "Lisbon, Portugal", (120, 120, 130), small)
    picture = image.resize((width, round(width * image.height / image.width)), Image.Resampling.BICUBIC)
    picture = picture.crop((0, 0, width, min(picture.height, 900)))
    canvas.paste(picture, (0, 200 + (900 - picture.height) // 2))
    for i in range(3):
        draw.ellipse((30 + 90 * i, 1120, 80 + 90 * i, 1170), outline=ink, width=5)
    draw.text((30, 1190), "1,204 likes", ink, small)
    for i, length in enumerate((640, 560, 300)):
        draw.rounded_rectangle((30, 1240 + 34 * i, 30 + length, 1258 + 34 * i), 8, fill=pale)
    draw.line((0, 1360, width, 1360), pale, 3)
    for i in range(5):
        draw.rounded_rectangle((48 + 144 * i, 1380, 96 + 144 * i, 1426), 10, outline=ink, width=4)
    return canvas


def screen(image: Image.Image) -> Image.Image:
    """A photograph of a screen: from the side, with a dark frame, stripes and noise."""
    w, h = size = round(1.16 * image.width), round(1.16 * image.height)
    frame = Image.new("RGB", size, (24, 24, 26))
    frame.paste(image, (round(0.08 * image.width), round(0.08 * image.height)))
    corners = (-0.03 * w, -0.05 * h, 0.02 * w, 1.06 * h, 1.05 * w, 1.01 * h, 1.02 * w, 0.02 * h)  # of the source
    seen = frame.transform(size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)
    stripes = 10 * np.sin(np.arange(h) * 1.9)[:, None, None] + 6 * np.sin(np.arange(w) * 0.7)[None, :, None]
    return noisy(of_light(np.asarray(seen, np.float32) * 0.9 + stripes + 12), 6)


def of_light(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def noisy(image: Image.Image, spread: float) -> Image.Image:
    return of_light(image + np.random.default_rng(number_of(image)).normal(0, spread, (*image.size[::-1], 3)))


def inset(image: Image.Image, share: float, opacity: float = 1.0) -> Image.Image:
    """Set into another photograph, at `share` of its width."""
    canvas, place = backdrop(image).resize((600, 450), Image.Resampling.BICUBIC), random.Random(number_of(image))
    scale = min(share * canvas.width / image.width, 0.96 * canvas.height / image.height)
    small = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)
    left, top = (place.randint(0, a - b) for a, b in zip(canvas.size, small.size))
    canvas.paste(small, (left, top), Image.new("L", small.size, round(255 * opacity)))
    return canvas


def collage(image: Image.Image) -> Image.Image:
    """Beside another photograph, both equally high."""
    other = backdrop(image)
    other = other.resize((round(other.width * image.height / other.height), image.height), Image.Resampling.BICUBIC)
    both = ImageOps.expand(image, (0, 0, other.width, 0))
    both.paste(other, (image.width, 0))
    return both


def meme(image: Image.Image) -> Image.Image:
    image = image.copy()
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=0.11 * min(image.size))
    stroke = max(1, round(0.008 * min(image.size)))
    for place, text in ((0.1, "ONE DOES NOT SIMPLY"), (0.9, "SEARCH BY IMAGE")):
        centre = (image.width / 2, image.height * place)
        draw.text(centre, text, "white", font, anchor="mm", stroke_width=stroke, stroke_fill="black")
    return image


def stickers(image: Image.Image) -> Image.Image:
    place, image = random.Random(number_of(image)), image.copy()
    draw, radius = ImageDraw.Draw(image), 0.11 * min(image.size)
    for colour_of in ("gold", "deepskyblue", "hotpink"):
        x, y = place.uniform(radius, image.width - radius), place.uniform(radius, image.height - radius)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour_of, outline="white", width=3)
        draw.arc((x - radius / 2, y - radius / 2, x + radius / 2, y + radius / 2), 20, 160, "black", 4)
    return image


def vintage(image: Image.Image) -> Image.Image:
    """A warm filter with faded shadows and dark corners."""
    pixels = 0.12 + 0.85 * (np.asarray(image, np.float32) / 255) ** np.array([0.8, 1.0, 1.3])
    y, x = (np.linspace(-1, 1, side) for side in image.size[::-1])
    return of_light(255 * (pixels * (1 - 0.35 * (x[None, :] ** 2 + y[:, None] ** 2) / 2)[..., None]))


def watermark(image: Image.Image, colour: str, strength: float) -> Image.Image:
    """Lines of text that rise over the whole picture, so strong: 0 to 1."""
    side, size = 2 * max(image.size), 0.07 * min(image.size)
    draw, font = ImageDraw.Draw(mask := Image.new("L", (side, side))), ImageFont.load_default(size=size)
    for row in range(round(side / (3 * size))):
        draw.text((-row * size, 3 * row * size), "SAMPLE  -  do not copy  -  " * 9, round(255 * strength), font)
    mask = ImageOps.fit(mask.rotate(30).crop((side // 4, side // 4, 3 * side // 4, 3 * side // 4)), image.size)
    return Image.composite(Image.new("RGB", image.size, colour), image, mask)


def moved(image: Image.Image, share: float) -> Image.Image:
    """To the right and down, by this share of each side, over white."""
    to = (1, 0, -round(share * image.width), 0, 1, -round(share * image.height))
    return image.transform(image.size, Image.Transform.AFFINE, to, fillcolor="white")


def recoloured(image: Image.Image) -> Image.Image:
    """The hue turned by 25°, then white made cream and black dark blue."""
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.merge("HSV", (hue.point([(h + 18) % 256 for h in range(256)]), saturation, value)).convert("RGB")
    return of_light(np.asarray(turned, np.float32) * (0.92, 0.84, 0.6) + (18, 24, 48))


def tiny(image: Image.Image) -> Image.Image:
    """64 pixels wide or high, enlarged again."""
    small = image.copy()
    small.thumbnail((64, 64))
    return small.resize(image.size, Image.Resampling.BICUBIC)


def stretched(image: Image.Image, ratio: float) -> Image.Image:
    """As many pixels, with this ratio of width to height."""
    height = (image.width * image.height / ratio) ** 0.5
    return image.resize((round(ratio * height), round(height)), Image.Resampling.BICUBIC)


def perspective(image: Image.Image, share: float) -> Image.Image:
    """Each corner is moved by this share of both sides, inwards or outwards as it is drawn, over black."""
    place, (w, h) = random.Random(number_of(image)), image.size
    equations, source = [], []
    for x, y in ((0, 0), (w, 0), (w, h), (0, h)):
        u, v = x + place.choice((-share, share)) * w, y + place.choice((-share, share)) * h
        equations += [(u, v, 1, 0, 0, 0, -u * x, -v * x), (0, 0, 0, u, v, 1, -u * y, -v * y)]
        source += [x, y]
    to = np.linalg.solve(np.array(equations), source).tolist()
    return image.transform(image.size, Image.Transform.PERSPECTIVE, to, Image.Resampling.BICUBIC)


def web_page(image: Image.Image) -> Image.Image:
    """A screenshot of a page of news, the picture at 30 % of its width among text."""
    canvas = Image.new("RGB", (1280, 800), "white")
    draw, pale, width = ImageDraw.Draw(canvas), (215, 218, 224), 384
    draw.rectangle((0, 0, 1280, 54), (32, 48, 84))
    draw.text((40, 14), "THE DAILY     World   Business   Sport   Travel", "white", ImageFont.load_default(size=22))
    draw.text((40, 84), "What nobody had expected of this picture", "black", ImageFont.load_default(size=38))
    for row in range(24):
        draw.rectangle((450, 160 + 26 * row, 860 - 67 * (row % 5 == 4), 170 + 26 * row), pale)
    for row in range(4):
        draw.rectangle((920, 160 + 160 * row, 1240, 290 + 160 * row), [(90, 160, 150), (230, 180, 80)][row % 2])
    picture = image.resize((width, max(1, round(width * image.height / image.width))), Image.Resampling.BICUBIC)
    canvas.paste(picture.crop((0, 0, width, min(picture.height, 600))), (40, 160))
    return canvas


def stripes(image: Image.Image) -> Image.Image:
    """Slanting white stripes hide 30 % of the picture."""
    y, x = np.ogrid[: image.height, : image.width]
    hidden = (x + 2 * y) / max(image.size) % 0.2 < 0.06
    return of_light(np.where(hidden[..., None], 255, np.asarray(image)))


def emoji(image: Image.Image) -> Image.Image:
    """A large smiling face, at a place that is drawn."""
    place, image = random.Random(number_of(image)), image.copy()
    r = 0.2 * min(image.size)
    x, y, draw = place.uniform(r, image.width - r), place.uniform(r, image.height - r), ImageDraw.Draw(image)
    draw.ellipse((x - r, y - r, x + r, y + r), "gold", "darkorange", max(1, round(r / 12)))
    for eye in (x - 0.4 * r, x + 0.4 * r):
        draw.ellipse((eye - 0.12 * r, y - 0.45 * r, eye + 0.12 * r, y - 0.1 * r), "black")
    draw.arc((x - 0.6 * r, y - 0.5 * r, x + 0.6 * r, y + 0.65 * r), 20, 160, "black", max(1, round(r / 10)))
    return image


def text_over(image: Image.Image) -> Image.Image:
    """Three lines of large red text, from a place that is drawn."""
    place, image = random.Random(number_of(image)), image.copy()
    at = place.uniform(0, 0.4) * image.width, place.uniform(0, 0.6) * image.height
    text, font = "Good morning!\nHave a lovely day\n@mia 2019", ImageFont.load_default(size=0.09 * min(image.size))
    ImageDraw.Draw(image).text(at, text, (220, 20, 40), font)
    return image


def covered(image: Image.Image) -> Image.Image:
    """Another photograph hides a corner: half of the width, half of the height."""
    image, size = image.copy(), ((image.width + 1) // 2, (image.height + 1) // 2)
    image.paste(ImageOps.fit(backdrop(image), size), (image.width // 2, image.height // 2))
    return image


def bar_above(image: Image.Image) -> Image.Image:
    """A white bar with a line of text, joined to the picture's top."""
    bar = max(8, round(0.2 * image.height))
    image = ImageOps.expand(image, (0, bar, 0, 0), "white")
    font = ImageFont.load_default(size=0.4 * bar)
    ImageDraw.Draw(image).text((image.width / 2, bar / 2), "me on a monday", "black", font, anchor="mm")
    return image


def turned(image: Image.Image, angle: float) -> Image.Image:
    """Turned, and cut so that no corner is empty."""
    whole, (w, h) = image.rotate(angle, Image.Resampling.BICUBIC, expand=True), image.size
    a, b = abs(np.cos(np.radians(angle))), abs(np.sin(np.radians(angle)))
    share = min(w / (w * a + h * b), h / (w * b + h * a))
    left, top = (whole.width - share * w) / 2, (whole.height - share * h) / 2
    return whole.crop((round(left), round(top), round(left + share * w), round(top + share * h)))


def shuffled(image: Image.Image, share: float) -> Image.Image:
    """This share of the pixels change places among one another."""
    pixels, own = np.array(image).reshape(-1, 3), np.random.default_rng(number_of(image))
    places = own.choice(len(pixels), round(share * len(pixels)), replace=False)
    pixels[places] = pixels[own.permutation(places)]
    return Image.fromarray(pixels.reshape(image.height, image.width, 3))


def pixelated(image: Image.Image, share: float) -> Image.Image:
    small = image.resize([max(1, round(share * side)) for side in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def chain(image: Image.Image, number: int) -> Image.Image:
    """Three of OTHERS in a row, as they are drawn."""
    for name in random.Random(number_of(image) + number).sample(list(OTHERS), 3):
        image = OTHERS[name](image)
    return image


EDITS: dict[str, Edit] = {
    "half size": lambda image: image.reduce(2),
    "jpeg 30": partial(resaved, quality=30),
    "crop 81 %": partial(crop, area=0.81),
    "crop 50 %": partial(crop, area=0.50),
    "crop 25 %": partial(crop, area=0.25),
    "mirror": ImageOps.mirror,
    "rotate 10°": lambda image: image.rotate(10, Image.Resampling.BICUBIC),  # same size, black corners
    "rotate 90°": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "colour": colour,
    "grey": lambda image: image.convert("L").convert("RGB"),
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(0.008 * max(image.size))),  # 4 pixels at 500
    "caption": caption,
    "border": lambda image: ImageOps.expand(image, round(0.12 * max(image.size)), "white"),
    "aspect": lambda image: image.resize((round(image.width * 1.4), image.height), Image.Resampling.BICUBIC),
    "jpeg 8": partial(resaved, quality=8),
    "rotate 30°": lambda image: image.rotate(30, Image.Resampling.BICUBIC),
    "letterbox": lambda image: ImageOps.expand(image, (0, round(image.height * 0.35 / 0.3))),  # bars of 35 % each
    "polaroid": polaroid,
    "screenshot": app,
    "screen": screen,
    "inset 60 %": partial(inset, share=0.6),
    "inset 40 %": partial(inset, share=0.4),
    "collage": collage,
    "meme": meme,
    "stickers": stickers,
    "vintage": vintage,
    "negative": ImageOps.invert,
    "noise": lambda image: noisy(image, 25),
    "64 px": tiny,
    "crop+mirror": lambda image: resaved(ImageOps.mirror(crop(image, 0.7)), 30),
    "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.4),
}

# What other programs and libraries of edits do
OTHERS: dict[str, Edit] = {
    "stretched": partial(stretched, ratio=2.2),
    "perspective": partial(perspective, share=0.1),
    "web page": web_page,
    "background": partial(inset, share=0.5, opacity=0.7),
    "blended": lambda image: Image.blend(image, ImageOps.fit(backdrop(image), image.size), 0.35),
    "stripes": stripes,
    "watermark": partial(watermark, colour="white", strength=0.5),
    "emoji": emoji,
    "text": text_over,
    "covered": covered,
    "bar above": bar_above,
    "faded": lambda image: Image.blend(image, Image.new("RGB", image.size, "white"), 0.5),
    "pixelated": partial(pixelated, share=0.3),
    "shuffled": partial(shuffled, share=0.1),
    "noise": partial(noisy, spread=25),
    "sharpened": lambda image: ImageEnhance.Sharpness(image).enhance(8),
    "saturated": lambda image: ImageEnhance.Color(image).enhance(3),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(2),
    "bright": lambda image: ImageEnhance.Brightness(image).enhance(1.7),
    "blur 2 px": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "square": lambda image: ImageOps.pad(image, (max(image.size), max(image.size))),
    "turned 15°": partial(turned, angle=15),
    "upside down": ImageOps.flip,
    "sheared": lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0.25, 0, 0, 1, 0)),
    "quarter": lambda image: image.reduce(4),
}
CHAINS: dict[str, Edit] = {f"chain {number}": partial(chain, number=number) for number in range(1, 6)}

# What is found as a duplicate, whatever the collection
COPIES: dict[str, Edit] = {
    "resaved": partial(resaved, quality=85),
    "half": EDITS["half size"],
    "grey": EDITS["grey"],
    "caption": caption,
    "meme": meme,
    "crop 90 %": partial(crop, area=0.9),
    "crop 60 %": partial(crop, area=0.6),
    "mirrored": ImageOps.mirror,
}

# What is done to pages, charts, codes and drawings: the pictures of `--kinds`
OF_KINDS: dict[str, Edit] = {
    "resaved": partial(resaved, quality=40),
    "half": EDITS["half size"],
    "crop 60 %": partial(crop, area=0.6),
    "screenshot": app,
    "moved 2 %": partial(moved, share=0.02),
    "watermark": partial(watermark, colour="grey", strength=0.3),
    "mirrored": ImageOps.mirror,
    "recoloured": recoloured,
}
# What is asked about photographs that are not in the collection
STRANGERS: dict[str, Edit] = {
    "as it is": lambda image: image,
    "screenshot": app,
    "crop 50 %": EDITS["crop 50 %"],
    "crop+mirror": EDITS["crop+mirror"],
}
LEAST_WIDTH = 128  # pixels of the pictures of `--kinds` that are edited


def by_class(features: np.ndarray, classes: np.ndarray) -> tuple[float, float, float]:
    """Precision@1 and @10, and mean average precision, each photograph among all the others."""
    scores = features @ features.T
    np.fill_diagonal(scores, -np.inf)
    hits = classes[np.argsort(-scores, axis=1, kind="stable")[:, :-1]] == classes[:, None]
    precision = hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)
    average = (precision * hits).sum(1) / np.maximum(hits.sum(1), 1)
    return float(hits[:, 0].mean()), float(hits[:, :10].mean()), float(average.mean())


def images_in(folder: Path) -> list[Path]:
    paths = [folder / os.fsdecode(file.path) for file in main.find_images(folder, lambda error: None)]
    return [path for path in paths if path.suffix.lower() in main.image_formats()[1]]


def read(folder: Path) -> tuple[list[Path], np.ndarray]:
    """The photographs, shuffled, and the class of each, by its folder."""
    paths = images_in(folder)
    random.Random(SEED).shuffle(paths)
    names = sorted({path.parent for path in paths})
    return paths, np.array([names.index(path.parent) for path in paths])


def opened(path: Path) -> Image.Image:
    return main.to_rgb(Image.open(path), 10**6)


def saved(images: Iterable[Image.Image], folder: str | Path, prefix: str = "") -> list[str]:
    """The images as files, and their paths."""
    paths = []
    for number, image in enumerate(images):
        image.save(path := f"{folder}/{prefix}{number:05}.png", compress_level=1)
        paths.append(path)
    return paths


class Plan(NamedTuple):
    """What each photograph is for. No photograph is for two of these."""

    sources: list[Path]  # in the collection; edits of them are searched for
    others: list[Path]  # with distractors, these are crops of them
    strangers: list[Path]  # searched for, and not in the collection
    backdrops: list[Path]


def planned(paths: list[Path], options: argparse.Namespace) -> Plan:
    """The same photographs for the same purpose, however many queries are asked, so that a cache can be used again."""
    spare = min(10, len(paths) // 5)
    count = min(max(options.queries, QUERIES), len(paths) - len(paths) // 5)
    others = [path.resolve() for path in paths[count : len(paths) - spare]]
    strangers = []
    if options.distractors:
        used = {path.resolve() for path in paths}
        more = [path.resolve() for folder in options.more for path in images_in(folder)]
        others = [*others, *sorted(set(more) - used)]
        random.Random(SEED).shuffle(others)
        strangers, others = others[: len(others) // 2], others[len(others) // 2 :]
    return Plan(paths[:count], others, strangers, paths[len(paths) - spare :])


def make_distractors(others: list[Path], folder: Path, count: int) -> None:
    """So many crops of the photographs, half of them mirrored, those that are there left as they are."""
    folder.mkdir(exist_ok=True)
    for first, path in enumerate(tqdm(others, desc="distractors", disable=None)):
        files = {number: folder / f"{number:06}.jpg" for number in range(first, count, len(others))}
        missing = [number for number, file in files.items() if not file.exists()]
        whole = opened(path) if missing else None
        for number in missing if whole else ():
            place = random.Random(f"{SEED} {number}")
            w, h = (max(1, round(place.uniform(0.4, 0.8) * side)) for side in whole.size)
            left, top = place.randint(0, whole.width - w), place.randint(0, whole.height - h)
            image = whole.crop((left, top, left + w, top + h))
            image = ImageOps.mirror(image) if place.random() < 0.5 else image
            image.thumbnail((300, 300))
            image.save(part := folder / "part", "JPEG", quality=85)
            part.replace(files[number])


def make_collection(plan: Plan, known: list[Path], folder: Path, distractors: int) -> tuple[Path, list[Path]]:
    """A folder with the photographs as links, and with distractors; and the links of the sources.

    The folder's name tells what is in it, so that another run finds it again.
    """
    content = repr((SEED, distractors, [str(path.resolve()) for path in (*known, *plan.others)]))
    (root := folder / f"{zlib.crc32(content.encode()):08x}").mkdir(parents=True, exist_ok=True)
    links = [root / f"{number:05}{path.suffix}" for number, path in enumerate(known)]
    for link, path in zip(links, known):
        if not link.is_symlink():
            link.symlink_to(path.resolve())
    if distractors:
        if not plan.others:
            raise SystemExit("error: there are no other photographs to make distractors of: name some with --from")
        make_distractors(plan.others, root / "distractors", distractors)
    return root, links[: len(plan.sources)]


def by_edit(photos: list[Image.Image], paths: list[Path], engine: main.Engine, edits: Mapping[str, Edit]) -> float:
    """Print how often the original comes first, among the first ten, first and labelled, first and as a copy.

    Returns the mean of the first column, recall@1.
    """
    print("\n" + " " * 13 + "".join(f"{what:>20}" for what in ("@1", "@10", "first and labelled", "first and copy")))
    rows = []
    for name, edit in edits.items():
        with tempfile.TemporaryDirectory() as folder:
            queries, hits = saved(map(edit, photos), folder), []
            for answer, path in zip(main.search(queries, engine, k=10), map(str, paths)):
                found = [match.path for match in answer.matches]
                label = answer.matches[0].label if found[:1] == [path] else None
                hits.append((label is not None, path in found, bool(label), label in COPY))
        rows.append(np.mean(hits, 0))
        print(f"{name:13}" + "".join(f"{value:20.3f}" for value in rows[-1]), flush=True)
    mean = np.mean(rows, 0)
    print(f"{'mean':13}" + "".join(f"{value:20.3f}" for value in mean), flush=True)
    return float(mean[0])


def ask_strangers(
    strangers: list[Path], engine: main.Engine, name_of: Callable[[str], object] = os.path.realpath
) -> Counter[str]:
    """How many queries of photographs that are not in the collection get which label. Those that get one are printed.

    name_of  gives the name to print for the path of a match
    """
    labels = Counter[str]()
    for i0 in tqdm(range(0, len(strangers), 16), desc="without a source", disable=None):
        asked = [(path, edit) for path in strangers[i0 : i0 + 16] for edit in STRANGERS]
        with tempfile.TemporaryDirectory() as folder:
            queries = saved((STRANGERS[edit](opened(path)) for path, edit in asked), folder)
            for (path, edit), answer in zip(asked, main.search(queries, engine, k=1)):
                for match in answer.matches:
                    labels[match.label] += 1
                    if match.label:
                        print(f"  {path}, {edit}: {match.label} of {name_of(match.path)}, {match.region}")
    return labels


def among_one_another(paths: list[Path], model: main.Model, limit: int) -> Counter[str]:
    """The labels that queries without a source get: at most `limit` queries.

    One half of the photographs is the collection, every second one in the frame of the same app. The other half asks.
    Then the halves change places.
    """
    labels, half = Counter[str](), len(paths) // 2
    for known, strangers in ((paths[:half], paths[half:]), (paths[half:], paths[:half])):
        with tempfile.TemporaryDirectory() as name:
            (here := Path(name, "collection")).mkdir()
            saved((app(opened(path)) if i % 2 else opened(path) for i, path in enumerate(known)), here)
            engine = main.initialize_reverse_image_search(here, Path(name, "index"), model=model)
            asked = strangers[: -(-limit // (2 * len(STRANGERS)))]
            labels += ask_strangers(asked, engine, lambda path, known=known: known[int(Path(path).stem)])
    return labels


def print_labels(labels: Counter[str]) -> None:
    asked = labels.total()
    print(f"\nof {asked:,} queries with no source in the collection, ", end="")
    print(", ".join(f"{labels[label]} get a `{label}`" for label in ("copy", "variant")), end="")
    print(f": {(labels['copy'] + labels['variant']) / max(asked, 1):.2%}")


def of_kind(folder: Path, options: argparse.Namespace, model: main.Model) -> tuple[list[int], np.ndarray]:
    """Print the line of one set. Returns its counts, and for each edit how many are labelled, `copy`, and edited."""
    paths, edited, wrong, wrong_edits = images_in(folder), Counter[str](), Counter[str](), Counter[str]()
    labelled, copies = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        engine = main.initialize_reverse_image_search(folder, Path(name, "index"), model=model)
        asked: dict[str, tuple[str, str]] = {str(path): (str(path), "") for path in paths}  # source and edit
        wide = [path for path in paths if opened(path).width >= LEAST_WIDTH][: options.queries]
        for edit in OF_KINDS:
            queries = saved((OF_KINDS[edit](opened(path)) for path in wide), name, f"{list(OF_KINDS).index(edit)}-")
            asked |= {query: (str(path), edit) for query, path in zip(queries, wide)}
            edited[edit] = len(wide)
        answers = main.search(list(asked), engine, k=len(paths))
        for answer in tqdm(answers, total=len(asked), desc=folder.name, leave=False, disable=None):
            source, edit = asked[answer.query]
            first = answer.matches[0] if answer.matches and answer.matches[0].path == source else None
            labelled[edit] += bool(first and first.label)
            copies[edit] += bool(first and first.label in COPY)
            others = [match.path for match in answer.matches if match.label == "copy" and match.path != source]
            (wrong_edits if edit else wrong)[source] += len(others)
            for other in others if options.names else ():
                print(f"  wrong: {source}{edit and f', {edit},'} is called a copy of {other}")
        matches = (match for group in main.find_duplicates(engine) for match in group.matches)
        listed = [match.path for match in matches if getattr(match, "lost", None) is None]
    for path in listed if options.names else ():
        print(f"  listed: {path}")
    counts = [len(paths), wrong.total(), sum(map(bool, wrong.values())), wrong_edits.total(), len(listed)]
    return counts, np.array([[labelled[edit], copies[edit], edited[edit]] for edit in OF_KINDS])


def by_kind(options: argparse.Namespace, model: main.Model) -> None:
    """Print a line for each set of distinct pictures, each a sub-folder."""
    print(
        f"{options.folder}: sets of distinct pictures; {model.name}. `copy` for another picture: in how many searches"
    )
    print(
        "for the pictures as they are, and for edits of them; files that `--duplicates -0` lists; and for each edit how"
    )
    print("often the source is first and labelled, and first and `copy`.\n")
    heading = f"{'set':13}{'pictures':>8}{'wrong':>8}{'in':>4}{'edits':>6}{'listed':>7}"
    print(heading + "".join(f"{edit:>11}" for edit in OF_KINDS))
    lines = {}
    for folder in sorted(path for path in options.folder.iterdir() if path.is_dir()):
        lines[folder.name] = of_kind(folder, options, model)
        print_kind(folder.name, *lines[folder.name])
    if not lines:
        raise SystemExit(f"error: there are no sets of pictures in {options.folder}")
    print_kind("all", *(sum(column) for column in zip(*((np.array(counts), hits) for counts, hits in lines.values()))))


def print_kind(name: str, counts: Iterable[int], hits: np.ndarray) -> None:
    pictures, wrong, searches, wrong_edits, listed = counts
    shares = [f"{a / max(n, 1):6.2f} {b / max(n, 1):.2f}" if n else f"{'-':>11}" for a, b, n in hits.tolist()]
    print(f"{name:13}{pictures:8}{wrong:8}{searches:4}{wrong_edits:6}{listed:7}" + "".join(shares), flush=True)


def duplicates(paths: list[Path], model: main.Model, count: int) -> None:
    """Print how many pairs are found and wrong, and how many of each edit of `count` photographs are found."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "collection")
        for i, path in enumerate(paths[: 2 * count]):  # the second half has no copies
            (root / str(i)).mkdir(parents=True)
            for kind, edit in {"original": lambda image: image, **(COPIES if i < count else {})}.items():
                edit(opened(path)).save(root / str(i) / f"{kind}.png", compress_level=1)
        engine = main.initialize_reverse_image_search(root, Path(name, "index"), model=model)
        pairs = [(Path(g.keep), Path(match.path)) for g in main.find_duplicates(engine) for match in g.matches]
    wrong = [(keep, other) for keep, other in pairs if keep.parent != other.parent]
    groups = {keep: {keep.stem} for keep, _ in pairs}  # a picture may have two: not all copies show the same part
    for keep, other in set(pairs) - set(wrong):
        groups[keep].add(other.stem)
    for keep, other in wrong:
        print(f"  wrong: {paths[int(keep.parent.name)]} and {paths[int(other.parent.name)]}, {other.stem}")
    print(f"\nduplicates: {len(pairs)} pairs, {len(wrong)} of them wrong; found:")
    for kind in COPIES:
        found = sum({"original", kind} <= kinds for kinds in groups.values())
        print(f"{kind:11}{found / count:18.3f}")


def times(paths: list[Path], engine: main.Engine) -> None:
    """Print seconds of a query, verified, and of points. No picture is a query twice: candidates are kept."""
    with tempfile.TemporaryDirectory() as folder:
        first, *queries = saved((resaved(opened(path), 30) for path in paths[:111]), folder)
        list(main.search(first, engine))
        start = time.process_time()
        alone, many = queries[:10], queries[10:] or queries
        spent = [seconds(lambda query=query: list(main.search(query, engine))) for query in alone]
        of_cpu = (time.process_time() - start) / len(alone)
        each = seconds(lambda: list(main.search(many, engine))) / len(many)
    local = []
    with main.computing_with(1):
        for path in paths[:50]:
            (image := Image.open(path)).load()
            local.append(seconds(lambda image=image: main.find_points(image)))
    print(
        f"\none query alone {np.median(spent):.3f} s ({of_cpu:.3f} CPU s), each of {len(many)} {each:.3f} s, ", end=""
    )
    print(f"among {engine.summary.images:,} images")
    print(f"points of one picture {1000 * np.median(local):.0f} ms on one thread")


def evaluate(options: argparse.Namespace, model: main.Model) -> None:
    paths, classes = read(options.folder)
    if len(paths) < 2:
        raise SystemExit(f"error: there are no photographs in {options.folder}")
    plan = planned(paths, options)
    count = min(options.queries, len(plan.sources))
    BACKDROPS[:] = map(opened, plan.backdrops)  # not in the collection, or they would be found, and rightly so
    here = {path.resolve() for path in paths}
    known = [*plan.sources, *(path for path in plan.others if path in here)]
    print(
        f"{options.folder}: {len(known):,} photographs and {options.distractors:,} crops of others are searched, ",
        end="",
    )
    print(f"{count} of them edited; {model.name}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        place = options.cache or Path(name)
        root, links = make_collection(plan, known, place, options.distractors)
        engine = main.initialize_reverse_image_search(root, place / f"index of {root.name}", model=model)
        photos = [opened(path) for path in plan.sources[:count]]
        for edits in (EDITS, OTHERS, CHAINS) if options.others else (EDITS,):
            if count:
                by_edit(photos, links, engine, edits)
        if options.times:
            times(plan.sources, engine)
        if options.strangers and options.distractors:
            asked = -(-options.strangers // len(STRANGERS))
            print_labels(ask_strangers(plan.strangers[:asked], engine))
    if len(set(classes.tolist())) > 1:
        blocks = (paths[i : i + 64] for i in range(0, len(paths), 64))
        features = np.concatenate([main.extract_features_batch(block, model) for block in blocks])
        first, ten, average = by_class(features, classes)
        print(f"\nby class: precision@1 {first:.3f}, precision@10 {ten:.3f}, mAP {average:.3f}")
    if options.strangers and not options.distractors:
        print_labels(among_one_another(paths, model, options.strangers))
    if options.duplicates:
        duplicates(paths, model, min(options.duplicates, len(paths) // 2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", action="append", metavar="NAME", help="may be given again (default: offline)")
    parser.add_argument("--weights", metavar="FILE", help="for all but offline")
    parser.add_argument("--queries", type=int, default=QUERIES, metavar="N", help="to edit (default: %(default)s)")
    parser.add_argument("--others", action="store_true", help="also edits of other programs, and chains of three")
    parser.add_argument("--strangers", type=int, nargs="?", const=10**9, default=0, metavar="N",
                        help="also search for pictures without a source, with at most N queries")  # fmt: skip
    parser.add_argument("--distractors", type=int, default=0, metavar="N", help="so many crops are in the collection")
    parser.add_argument("--from", type=Path, action="append", dest="more", default=[], metavar="FOLDER",
                        help="further photographs to crop; may be given again")  # fmt: skip
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep collection and index there, for another run")
    parser.add_argument("--duplicates", type=int, default=0, metavar="N", help="also find the edits of N photographs")
    parser.add_argument("--kinds", action="store_true", help="FOLDER has sets of distinct pictures: see above")
    parser.add_argument("--names", action="store_true", help="with --kinds: print the wrong pairs and files")
    parser.add_argument("--times", action="store_true", help="also measure a query and points")
    options = parser.parse_args()
    try:
        for name in options.model or [main.OFFLINE]:
            measure = by_kind if options.kinds else evaluate
            measure(options, main.load_model(name, None if name == main.OFFLINE else options.weights))
    except main.DeepVisionError as error:
        raise SystemExit(f"error: {error}") from error
