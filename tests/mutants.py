"""Image files that are almost right: samples of every format that Pillow reads, and what a fuzzer makes of them.

`fuzz` runs in a process of its own, which may well die of what it reads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from conftest import draw, encoded
from PIL import Image, PngImagePlugin

import main

SIZE = (24, 16)
W, H = SIZE
SECONDS = 10  # of a processor, that one file may take


def saved(kind: str, mode: str = "RGB", frames: int = 1, size: tuple[int, int] = SIZE, **options: Any) -> bytes:
    first, *rest = (draw(seed, size).convert(mode) for seed in range(frames))
    if rest:
        options.update(save_all=True, append_images=rest)
    return encoded(first, kind, **options)


def text_chunks() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "words " * 20)
    info.add_itxt("Title", "more words " * 20, zip=True)
    return info


def exif() -> Image.Exif:
    data = Image.Exif()
    data[0x0112], data[0x010E] = 6, "a description"
    data.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0comment"
    data.get_ifd(0x8825)[1] = "N"
    return data


MODES = {  # of Pillow, and the formats that it writes in them; it cannot read its own TIFF in YCbCr
    "RGB": "BMP DIB GIF ICNS IM JPEG MPO PNG PPM QOI SGI TIFF WEBP AVIF HEIF JPEG2000 DDS PCX TGA ICO",
    "1": "BMP GIF MSP PCX PNG PPM TIFF XBM IM",
    "P": "BMP GIF PCX PNG TGA TIFF IM BLP",
    "RGBA": "DDS ICNS PNG SGI TGA TIFF WEBP",
    "L": "JPEG JPEG2000 PCX SGI TIFF",
    "CMYK": "TIFF JPEG",
    **{"F": "TIFF SPIDER", "I": "TIFF", "I;16": "TIFF", "LAB": "TIFF"},
}
FRAMES = {"PNG": 3, "WEBP": 3, "AVIF": 2, "TIFF": 3, "MPO": 2}
PACKINGS = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma")
WRITTEN: dict[str, Callable[[], bytes]] = {  # one or more of each format that Pillow writes
    **{f"{kind}, {mode}": partial(saved, kind, mode) for mode, kinds in MODES.items() for kind in kinds.split()},
    **{f"{kind}, frames": partial(saved, kind, frames=count) for kind, count in FRAMES.items()},
    **{f"TIFF, {packing}": partial(saved, "TIFF", compression=packing) for packing in PACKINGS},
    "GIF, frames": partial(saved, "GIF", frames=3, duration=10),
    "TIFF, fax": partial(saved, "TIFF", "1", compression="group4"),
    "WEBP, lossless": partial(saved, "WEBP", lossless=True),
    "JPEG, progressive": partial(saved, "JPEG", progressive=True),
    "JPEG, EXIF": lambda: saved("JPEG", exif=exif(), icc_profile=bytes(600)),
    "PNG, EXIF": lambda: saved("PNG", exif=exif(), pnginfo=text_chunks(), icc_profile=bytes(600)),
    "WEBP, EXIF": lambda: saved("WEBP", exif=exif(), icc_profile=bytes(600)),
    "PNG of 16 bits": lambda: saved("PNG", "I;16"),
    "TGA, packed": lambda: saved("TGA", compression="tga_rle"),
    "ICO, BMP": lambda: saved("ICO", bitmap_format="bmp"),
}


GREY = bytes(range(256)) * 2
PIXELS = GREY[: W * H]
BY_HAND: dict[str, Callable[[], bytes]] = {  # the formats that Pillow only reads
    "CUR": lambda: saved("ICO", bitmap_format="bmp").replace(b"\0\0\1\0", b"\0\0\2\0", 1),
    "DCX": lambda: struct.pack("<III", 0x3ADE68B1, 12, 0) + saved("PCX"),
    "GBR": lambda: struct.pack(">5I4sI", 32, 2, W, H, 1, b"GIMP", 10) + b"name" + PIXELS,
    "PIXAR": lambda: (
        b"\200\350\0\0".ljust(416, b"\0") + struct.pack("<HH4xHH", H, W, 14, 2).ljust(608, b"\0") + 3 * PIXELS
    ),
    "PSD": lambda: struct.pack(">4sH6xHIIHHIIIH", b"8BPS", 1, 3, H, W, 8, 3, 0, 0, 0, 0) + 3 * PIXELS,
    "SUN": lambda: struct.pack(">8I", 0x59A66A95, W, H, 8, W * H, 1, 0, 0) + PIXELS,
    "XPM": lambda: (
        b'/* XPM */\nstatic char *x[] = {\n"8 4 2 1",\n"a c #ff0000",\n"b c #00ff00",\n'
        + b'"abababab",\n' * 4
        + b"};\n"
    ),
    "XVTHUMB": lambda: b"P7 332\n#END_OF_COMMENTS\n%d %d 255\n" % SIZE + PIXELS,
}


@cache
def samples() -> dict[str, bytes]:
    """A small file of each format that can be written here, and of those that can only be read."""
    main.image_formats()  # HEIF is among them now
    found = {}
    for name, make in {**WRITTEN, **BY_HAND}.items():
        try:
            found[name] = make()
        except (KeyError, OSError, ValueError):  # this Pillow, or libtiff, does not write it
            pass
    return found


NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0]


def mutate(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Some of its bits, numbers, lengths or parts are others. Headers come off worst."""
    mutant = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 8, 30))):
        reach = len(mutant) if chance.random() < 0.5 else min(len(mutant), 100)
        at, kind = chance.randrange(reach + 1), chance.randrange(9)
        size = chance.choice((1, 2, 4, 4, 8, 64))
        if kind <= 1 and at < len(mutant):
            mutant[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            mutant[at : at + 1] = chance.randbytes(1)
        elif kind <= 4:
            width = chance.choice((1, 2, 4))
            number = chance.choice(NUMBERS) & ((1 << 8 * width) - 1)
            mutant[at : at + width] = number.to_bytes(width, chance.choice(("big", "little")))
        elif kind == 5:
            del mutant[at : at + size]
        elif kind == 6:
            mutant[at:at] = mutant[at : at + size] * chance.choice((1, 2, 50))
        elif kind == 7:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            mutant[at:at] = other[start : start + size]
        elif chance.random() < 0.3:
            del mutant[at:]
    return bytes(mutant)


def mutants(seed: object, begin: int, end: int) -> Iterator[tuple[int, str, bytes]]:
    """Number, name of the sample, content: the same for the same seed, whichever are left out."""
    names, others = list(samples()), list(samples().values())
    for number in range(begin, end):
        chance, name = random.Random(f"{seed} {number}"), names[number % len(names)]
        yield number, name, mutate(samples()[name], others, chance)


def fuzz(read: Callable[[str], Any], seed: object, begin: int, end: int, folder: str) -> None:
    """Read mutants; the one under way is named in `progress`, and what became of them is printed."""
    path = os.path.join(folder, "mutant.jpg")
    tally = {"read": 0, "refused": 0}
    for number, name, content in mutants(seed, begin, end):
        Path(path).write_bytes(content)
        Path(folder, "progress").write_text(str(number))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        picture = read(path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        usable = picture.made is not None and picture.digest and picture.reason in (None, main.TRUNCATED)
        refused = picture.reason and "\n" not in picture.reason and picture.digest is None and picture.made is None
        assert bool(usable) != bool(refused), (number, name, picture)
        tally["read" if usable else "refused"] += 1
    print(json.dumps(tally))
