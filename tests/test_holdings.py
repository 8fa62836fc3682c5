"""What a file holds beside its first frame, and what is lost if only another file with the same picture stays."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import draw, encoded
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, TiffImagePlugin

import main


def held(content: bytes, name: str = "held") -> main.Holdings:
    with open(name, "wb") as stream:
        stream.write(content)
    found = main.holdings(name)
    assert found
    return found


def lost(file: bytes, keep: bytes, name: str = "file", keep_name: str = "keep") -> list[str]:
    return main.lost_beside(held(file, name), held(keep, keep_name))


PLAIN = draw(1, (120, 80))
KEEP = encoded(PLAIN, "JPEG", quality=90)


def exif(*tags: tuple[int, Any], gps: Any = None) -> Image.Exif:
    made = Image.Exif()
    for tag, value in tags:
        made[tag] = value
    if gps:
        made.get_ifd(0x8825).update(gps)
    return made


def taken(date: str) -> Image.Exif:
    made = Image.Exif()
    made.get_ifd(0x8769)[36867] = date
    return made


def deep(channels: int = 0) -> np.ndarray:
    values = np.asarray(PLAIN if channels else PLAIN.convert("L")).astype(np.uint16)
    return values * 256 + 9


def deep_png() -> bytes:
    """16 bits a channel in RGB, which Pillow reads, but does not write."""
    made = io.BytesIO(b"")
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep(3).reshape(80, -1))
    made.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(made, b"IHDR", struct.pack(">IIBBBBB", 120, 80, 16, 2, 0, 0, 0))
    PngImagePlugin.putchunk(made, b"IDAT", main.zlib.compress(rows))
    PngImagePlugin.putchunk(made, b"IEND", b"")
    return made.getvalue()


def with_alpha(least: int, mode: str = "RGBA") -> Image.Image:
    image = PLAIN.convert(mode)
    image.putalpha(Image.new("L", image.size, 255))
    image.putpixel((3, 3), (*image.getpixel((3, 3))[:-1], least))
    return image


def several(kind: str, **options: Any) -> bytes:
    return encoded(PLAIN, kind, save_all=True, append_images=[draw(2, PLAIN.size), draw(3, PLAIN.size)], **options)


def raw_tiff(*tags: tuple[int, Any]) -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags:
        info[tag] = value
        info.tagtype[tag] = 4 if tag == 330 else 1
    return encoded(PLAIN, "TIFF", tiffinfo=info)


def dng() -> bytes:
    """A thumbnail with a SubIFD that names a picture of 3000 × 2000."""
    content = raw_tiff((330, 0), (50706, b"\1\4\0\0"))
    at = content.index(struct.pack("<HHII", 330, 4, 1, 0)) + 8
    entries = (254, 4, 1, 0), (256, 4, 1, 3000), (257, 4, 1, 2000), (258, 3, 1, 16), (262, 3, 1, 32803)
    directory = struct.pack("<H", 5) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    padded = content + bytes(len(content) % 2)
    return padded[:at] + struct.pack("<I", len(padded)) + padded[at + 4 :] + directory


def stamped(page: Image.Image) -> Image.Image:
    page = page.convert("RGB").resize((600, 800))
    ImageDraw.Draw(page).ellipse((500, 700, 507, 707), fill=(200, 40, 40))
    return page


def tinted(image: Image.Image) -> Image.Image:
    return ImageOps.colorize(image.convert("L"), "#301808", "#ffe8c0")


MORE: dict[str, tuple[Callable[[], bytes], list[str]]] = {  # each beside KEEP
    "nothing": (lambda: encoded(PLAIN, "PNG"), []),
    "pages": (lambda: several("TIFF"), ["3 pages"]),
    "GIF": (lambda: several("GIF"), ["3 frames"]),
    "WebP": (lambda: several("WEBP"), ["3 frames"]),
    "APNG": (lambda: several("PNG"), ["3 frames"]),
    "MPO": (lambda: several("MPO"), ["3 frames"]),
    "16 bits of grey": (lambda: encoded(Image.fromarray(deep()), "PNG"), ["16 bits"]),
    "16 bits of grey, TIFF": (lambda: encoded(Image.fromarray(deep()), "TIFF"), ["16 bits"]),
    "16 bits of colour": (deep_png, ["16 bits"]),
    "16 bits, PPM": (lambda: b"P6 120 80 65535\n" + deep(3).astype(">u2").tobytes(), ["16 bits"]),
    "floating point": (lambda: encoded(PLAIN.convert("F"), "TIFF"), ["32 bits"]),
    "transparency": (lambda: encoded(with_alpha(128), "PNG"), ["transparency"]),
    "transparent WebP": (lambda: encoded(with_alpha(0), "WEBP", lossless=True), ["transparency"]),
    "a transparent colour": (lambda: encoded(PLAIN.quantize(4), "GIF", transparency=0), ["transparency"]),
    "an alpha channel without use": (lambda: encoded(with_alpha(255), "PNG"), []),
    "a camera": (lambda: encoded(PLAIN, "JPEG", exif=exif((271, "Maker"))), ["camera metadata"]),
    "the time it was taken": (lambda: encoded(PLAIN, "JPEG", exif=taken("2020:01:01 10:00:00")), ["camera metadata"]),
    "an orientation alone": (lambda: encoded(PLAIN, "JPEG", exif=exif((274, 1))), []),
    "a place": (lambda: encoded(PLAIN, "JPEG", exif=exif(gps={1: "N", 2: (48.0, 1.0, 0.0)})), ["a place"]),
    "a video": (lambda: encoded(PLAIN, "JPEG", xmp=b'<x GCamera:MotionPhoto="1"/>') + b"ftypmp42", ["a video"]),
    "RAW": (lambda: raw_tiff((50706, b"\1\4\0\0")), ["RAW data"]),
    "CFA": (lambda: raw_tiff((33422, b"\0\1\1\2")), ["RAW data"]),
}


@pytest.mark.parametrize("name", MORE)
def test_what_a_file_holds_beside_another_is_lost_with_it_and_not_the_other_way_round(name):
    make, words = MORE[name]
    assert lost(make(), KEEP) == words
    other_way = {"RAW data": ["the developed picture"], "16 bits": ["colour"], "32 bits": ["colour"]}
    expected = other_way.get(words[0], []) if words else []
    assert lost(KEEP, make()) == (expected if name not in ("16 bits of colour", "16 bits, PPM") else [])


def test_pages_are_lost_behind_as_many_others():
    report = encoded(PLAIN, "TIFF", save_all=True, append_images=[draw(4, PLAIN.size), draw(5, PLAIN.size)])
    assert lost(several("TIFF"), report) == ["3 pages"] == lost(report, several("TIFF"))


@pytest.mark.parametrize("suffix", [".dng", ".nef", ".cr2", ".arw", ".pef", ".srw", ".NEF"])
def test_a_raw_file_is_told_by_its_suffix_too_and_neither_goes_for_the_other(suffix):
    content = encoded(PLAIN, "TIFF")
    assert lost(content, KEEP, "a" + suffix) == ["RAW data"]
    assert lost(KEEP, content, keep_name="b" + suffix) == ["the developed picture"]
    assert lost(content, content + b"\0", "a" + suffix, "b" + suffix) == ["RAW data"]


def test_a_raw_file_has_the_size_of_its_raw_data():
    assert held(dng()).size == (3000, 2000)


@pytest.mark.parametrize(("orientation", "size"), [(1, (120, 80)), (3, (120, 80)), (6, (80, 120)), (8, (80, 120))])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_size_is_that_of_the_upright_picture(kind, orientation, size):
    assert held(encoded(PLAIN, kind, exif=exif((274, orientation)))).size == size
    large = draw(1, (2400, 1600))  # of a large JPEG, a smaller scale is decoded
    assert held(encoded(large, kind, exif=exif((274, orientation)))).size == tuple(20 * side for side in size)


@pytest.mark.parametrize(("quality", "kind"), [(40, "JPEG"), (90, "JPEG"), (40, "WEBP"), (0, "PNG")])
def test_grey_is_told_from_one_tint_and_from_colours_after_compression(quality, kind):
    grey, options = PLAIN.convert("L").resize((240, 160)), {"quality": quality} if quality else {}
    noisy = np.asarray(grey.convert("RGB")) + np.random.default_rng(0).integers(-2, 3, (160, 240, 3))
    pictures = {
        "grey": (grey.convert("RGB"), 0),
        "grey with noise": (Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), 0),
        "sepia": (tinted(grey), 1),
        "colours": (PLAIN.resize((240, 160)), 2),
        "a stamp on a grey page": (stamped(grey), 2),
        "a stamp on a sepia print": (stamped(tinted(grey)), 2),
    }
    colours = {name: held(encoded(image, kind, **options)).colours for name, (image, _) in pictures.items()}
    assert colours == {name: right for name, (_, right) in pictures.items()}


def test_colour_is_lost_behind_grey_and_colours_behind_one_tint():
    grey, sepia, colours = (encoded(image, "PNG") for image in (PLAIN.convert("L"), tinted(PLAIN), PLAIN))
    assert lost(colours, sepia) == lost(colours, grey) == lost(sepia, grey) == ["colour"]
    assert lost(grey, sepia) == lost(grey, colours) == lost(sepia, colours) == []


def test_black_and_white_is_less_than_grey():
    page = PLAIN.convert("L")
    assert lost(encoded(page, "PNG"), encoded(page.convert("1"), "PNG")) == ["8 bits"]
    assert lost(encoded(page.convert("1"), "PNG"), encoded(page, "PNG")) == []


@pytest.mark.skipif(not main.importlib.util.find_spec("pillow_heif"), reason="pillow-heif is not installed")
def test_heif_of_ten_bits_and_with_a_gain_map():
    import pillow_heif

    main.image_formats()
    file = pillow_heif.from_bytes("RGB;16", PLAIN.size, deep(3).tobytes())
    file.save(made := io.BytesIO(), quality=-1)
    assert lost(made.getvalue(), KEEP, "a.heic") in (["10 bits"], ["12 bits"])
    image = main.open_image(io.BytesIO(encoded(PLAIN, "HEIF")), "a.heic")
    image.info.update(depth_images=[object()], aux={"urn:com:apple:photo:2020:aux:hdrgainmap": [1]})
    assert main.holdings_of(image).more == {"depth", "a gain map"}


def with_hole(content: bytes, length: int = 60) -> bytes:
    """The middle of a JPEG's pixels overwritten with zeros."""
    at = (content.index(b"\xff\xda") + len(content)) // 2
    return content[:at] + bytes(length) + content[at + length :]


WHITE = encoded(Image.new("RGB", (600, 600), "white"), "JPEG", optimize=True)  # its pixels are zeros, and no hole
CUT = {  # what is left of a file
    "two bytes": lambda: KEEP[:-2],
    "21 bytes": lambda: KEEP[:-21],
    "half of it": lambda: encoded(PLAIN, "PNG")[:-400],
    "a hole": lambda: with_hole(KEEP),
    "a hole, MPO": lambda: with_hole(encoded(PLAIN, "MPO", quality=90)),
}


@pytest.mark.parametrize("damage", CUT)
def test_a_damaged_file_does_not_stand_for_a_whole_one(damage):
    damaged = CUT[damage]()
    assert held(damaged).truncated and not held(KEEP).truncated and not held(WHITE).truncated
    assert lost(KEEP, damaged) == ["what is damaged there"]
    assert lost(damaged, KEEP) == lost(damaged, damaged) == []


def test_what_cannot_be_read_holds_nothing():
    with open("broken.png", "wb") as stream:
        stream.write(encoded(PLAIN)[:20])
    assert main.holdings("broken.png") is main.holdings("missing.png") is None
