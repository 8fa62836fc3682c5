"""Images: what is found, what is read, how its pixels come out, and what is refused with a reason."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import random
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mutants
import numpy as np
import pytest
from conftest import draw, encoded
from PIL import EpsImagePlugin, Image, ImageCms

import main

SIDE = 32  # pixels, of the squares compared here
UNDO = {  # from the upright picture to the pixels that a camera stores with this orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
COMMON = {"JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "AVIF", "HEIF", "JPEG2000"}
posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX file system")

Image.init()
if importlib.util.find_spec("pillow_heif"):
    importlib.import_module("pillow_heif").register_heif_opener()
NO_PICTURES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5"}  # a program for Ghostscript; the others Pillow can only name
WRITABLE = sorted(({"MPO"} | Image.OPEN.keys()) & Image.SAVE.keys() - NO_PICTURES)  # JPEG's reader reads MPO, too
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")


def listed(folder: str | Path) -> list[bytes]:
    errors: list[OSError] = []
    paths = [file.path for file in main.find_images(folder, errors.append)]
    assert not errors
    return paths


def read(path: str | Path) -> main.Picture:
    return main.read_picture(main.File(os.fsencode(path), 0, 0), b"", lambda _: main.get_transform(SIDE))


def pixels(path: str | Path) -> np.ndarray:
    """What the model would see of a file, (SIDE, SIDE, 3)."""
    picture = read(path)
    assert picture.reason is None and picture.digest and picture.made is not None
    return picture.made.permute(1, 2, 0).numpy().astype(int)


def squeezed(image: Image.Image) -> np.ndarray:
    """What the model should see of an RGB picture, by Pillow alone."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(int)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Of 255, in the mean; unrelated pictures have some 80."""
    return float(np.abs(a - b).mean())


def touch(path: str | bytes | Path, content: bytes = b"") -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(content)


# ---- Found -----------------------------------------------------------------------------------------------------------


def test_order_depends_on_names_alone(tmp_path):
    names = [f"{folder}{name}" for folder in ("", "b/", "a/", "a/c/") for name in ("z.png", "10.jpg", "9.jpg", "É.gif")]
    for seed, root in enumerate(("one", "two")):
        random.Random(seed).shuffle(names)
        for name in names:
            touch(tmp_path / root / name)
    assert listed("one") == listed("two")
    assert sorted(listed("one")) == sorted(map(os.fsencode, names))
    for folder in (b"", b"a", b"b", b"a/c"):
        inside = [path for path in listed("one") if os.path.dirname(path) == folder]
        assert inside == sorted(inside) and len(inside) == 4


@pytest.mark.parametrize(
    "name",
    [
        ".hidden.jpg", ".thumbnails/a.jpg", "._x.jpg", "@eaDir/a.jpg", "sub/@eaDir/a.jpg", "Thumbs.db", "thumbs.db",
        "desktop.ini", "System Volume Information/a.jpg", "$RECYCLE.BIN/a.jpg", "__MACOSX/a.jpg",
    ],
)  # fmt: skip
def test_passes_over(name):
    touch(f"images/{name}")
    touch("images/kept.jpg")
    assert listed("images") == [b"kept.jpg"]


@posix
@pytest.mark.parametrize(
    ("links", "found"),
    [
        pytest.param({"link.png": "real/a.png"}, ["link.png", "real/a.png"], id="to a file"),
        pytest.param({"link": "../outside"}, ["link/b.png", "real/a.png"], id="to a folder"),
        pytest.param({"1": "../outside", "2": "../outside"}, ["1/b.png", "real/a.png"], id="twice to a folder"),
        pytest.param({"z": "real"}, ["real/a.png"], id="to a folder that is here itself"),
        pytest.param({f"real/{i}": ".." for i in range(20)}, ["real/a.png"], id="to the folder above"),
        pytest.param({"real/here": "."}, ["real/a.png"], id="to its own folder"),
        pytest.param({"x": "y", "y": "x"}, ["real/a.png"], id="to each other"),
        pytest.param({"self.png": "self.png"}, ["real/a.png"], id="to itself"),
        pytest.param({"gone.png": "nowhere.png"}, ["real/a.png"], id="to nowhere"),
    ],
)
def test_links_are_followed_and_each_folder_is_visited_once(links, found):
    touch("images/real/a.png")
    touch("outside/b.png")
    for link, target in links.items():
        os.symlink(target, f"images/{link}")
    assert sorted(map(os.fsdecode, listed("images"))) == found


def test_the_folder_and_what_is_gone_since_its_parent_was_listed_are_reported(tmp_path):
    for name in "abc":
        touch(tmp_path / name / "1.png")
    errors: list[OSError] = []
    files = main.find_images(tmp_path, errors.append)
    assert next(files).path == os.path.join(b"a", b"1.png")
    shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "c")
    assert list(files) == list(main.find_images("nowhere", errors.append)) == []
    assert [os.path.normpath(os.fsdecode(error.filename)) for error in errors] == [
        str(tmp_path / "b"),
        str(tmp_path / "c"),
        "nowhere",
    ]


# ---- Read, whatever the format, the name and the orientation ---------------------------------------------------------


SHOWN = [(kind, mode) for mode in ("RGB", "RGBA", "P", "L", "1", "CMYK", "F") for kind in mutants.MODES[mode].split()]


@pytest.mark.parametrize(("kind", "mode"), SHOWN)
def test_every_format_shows_the_picture_by_any_name(kind, mode):
    try:
        touch("picture.xyz", mutants.saved(kind, mode, size=(128, 128)))
    except (KeyError, OSError):
        pytest.skip("this Pillow does not write it")
    shown = draw(0, (128, 128)).convert("L" if mode == "F" else mode).convert("RGB")
    assert difference(pixels("picture.xyz"), squeezed(shown)) < 3


def test_every_format_that_can_be_written_is_among_them():
    assert set(WRITABLE) <= {kind for kind, _ in SHOWN}


def test_a_name_says_nothing_of_the_pixels_and_the_same_bytes_have_the_same_digest(picture):
    touch("copy.jpg", encoded(picture(1), "JPEG"))
    first = read("copy.jpg")
    for name in ("a.JPG", "a.jpeg", "a.jfif", "a.png", "a.txt", "a.pdf", "a", "a."):
        shutil.copy("copy.jpg", name)
        assert read(name).digest == first.digest and (pixels(name) == pixels("copy.jpg")).all()
    touch("other.jpg", encoded(picture(2), "JPEG"))
    assert read("other.jpg").digest != first.digest
    again = main.read_picture(main.File(b"copy.jpg", 0, 0), b"", lambda _: None)
    assert again.digest == first.digest and again.made is None and again.reason is None  # known, so not decoded


ROTATED = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "MPO": {"quality": 95, "subsampling": 0},
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95},
    "HEIF": {"quality": 95},
}


def exif(orientation: int, kind: int = 3, count: int = 1) -> bytes:
    """EXIF data with this orientation; by its standard it is a 16-bit number, kind 3."""
    return b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHIII", 0x0112, kind, count, orientation, 0)


@pytest.mark.parametrize("orientation", UNDO)
@pytest.mark.parametrize(
    ("kind", "size"),  # of the large JPEG, a smaller scale is decoded
    [*((kind, (96, 64)) for kind in ROTATED if kind in WRITABLE), ("JPEG", (1600, 1000))],
)
def test_exif_orientation_is_applied_once(picture, kind, size, orientation):
    image, undo = picture(5, size, details=0), UNDO[orientation]
    stored = image if undo is None else image.transpose(undo)
    touch("stored", encoded(stored, kind, exif=exif(orientation), **ROTATED[kind]))
    assert difference(pixels("stored"), squeezed(image)) < 3


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"Exif\0\0garbage", id="garbage"),
        pytest.param(b"Exif\0\0", id="empty"),
        pytest.param(b"Exif\0\0II*\0\xff\xff\xff\x7f", id="directory beyond the end"),
        pytest.param(b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0", id="directory cut short"),
        pytest.param(exif(9), id="9"),
        pytest.param(exif(0), id="0"),
        pytest.param(exif(int.from_bytes(b"six\0", "little"), kind=2, count=4), id="text"),
        pytest.param(exif(6, count=0), id="no value"),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_malformed_exif_is_ignored(picture, kind, data):
    image = picture(5)
    touch("bad exif", encoded(image, kind, exif=data))
    touch("no exif", encoded(image, kind))
    assert (pixels("bad exif") == pixels("no exif")).all()


# ---- Colours and frames ----------------------------------------------------------------------------------------------

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    image = Image.new(mode, (64, 64), right)
    image.paste(left, (0, 0, 32, 64))
    return image


def deep_halves(left: int, right: int) -> Image.Image:
    """In 16 bits, where `paste` would fill each byte with the value."""
    return Image.fromarray(np.repeat(np.array([[left, right]], np.uint16), 32, 1).repeat(64, 0))


def with_palette(mode: str, left: Any, right: Any) -> Image.Image:
    image = halves(mode, left, right)
    image.putpalette([*RED, *BLUE])
    return image


@pytest.mark.parametrize(
    ("image", "kind", "options", "right"),
    [
        pytest.param(halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), "PNG", {}, BLUE, id="RGBA"),
        pytest.param(halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), "WEBP", {"lossless": True}, BLUE, id="WebP"),
        pytest.param(halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), "TIFF", {}, BLUE, id="TIFF"),
        pytest.param(halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), "ICO", {}, BLUE, id="ICO"),
        pytest.param(halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), "GIF", {}, BLUE, id="GIF"),
        pytest.param(halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 128)), "PNG", {}, (127, 127, 255), id="half of it"),
        pytest.param(halves("LA", (0, 0), (80, 255)), "PNG", {}, (80, 80, 80), id="LA"),
        pytest.param(with_palette("P", 0, 1), "PNG", {"transparency": 0}, BLUE, id="P and an index"),
        pytest.param(with_palette("P", 0, 1), "PNG", {"transparency": b"\0\x80"}, (127, 127, 255), id="P and a table"),
        pytest.param(with_palette("PA", (0, 0), (1, 255)), "TIFF", {}, BLUE, id="PA"),
        pytest.param(halves("RGB", RED, BLUE), "PNG", {"transparency": RED}, BLUE, id="RGB and a colour"),
        pytest.param(halves("L", 0, 80), "PNG", {"transparency": 0}, (80, 80, 80), id="L and a grey"),
        pytest.param(halves("1", 0, 1), "PNG", {"transparency": 0}, WHITE, id="1 bit and black"),
        pytest.param(deep_halves(9, 80 * 257), "PNG", {"transparency": 9}, (80, 80, 80), id="16 bits and a grey"),
    ],
)
def test_transparency_is_laid_over_white(image, kind, options, right):
    touch("transparent", encoded(image, kind, **options))
    shown = pixels("transparent")
    assert difference(shown[:, : SIDE // 2 - 2], np.array(WHITE)) <= 1
    assert difference(shown[:, SIDE // 2 + 2 :], np.array(right)) <= 1


def grey_as(kind: str, scale: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: Image.fromarray((np.asarray(image.convert("L"), float) * scale).astype(kind))


def with_holes(image: Image.Image) -> Image.Image:
    """Floating point, as scientific instruments save it: what was not measured is not a number, or infinite."""
    values = np.asarray(image.convert("L")).astype(np.float32) / 255
    values[:2], values[2:3], values[3:4] = np.nan, np.inf, -np.inf
    return Image.fromarray(values)


def to_lab(image: Image.Image) -> Image.Image:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")


@pytest.mark.parametrize(
    ("convert", "kind", "colour"),
    [
        pytest.param(to_lab, "TIFF", True, id="LAB TIFF"),
        pytest.param(grey_as("<u2", 257), "PNG", False, id="I;16 PNG"),
        pytest.param(grey_as("<u2", 257), "TIFF", False, id="I;16 TIFF"),
        pytest.param(grey_as(">u2", 257), "TIFF", False, id="I;16B TIFF"),
        pytest.param(grey_as("<i4", 257), "TIFF", False, id="I of 16 bits"),
        pytest.param(grey_as("<i4", 1 << 22), "TIFF", False, id="I of 31 bits"),
        pytest.param(grey_as("<f4", 1), "TIFF", False, id="F to 255"),
        pytest.param(grey_as("<f4", 1 / 255), "TIFF", False, id="F to 1"),
        pytest.param(grey_as("<f4", 1000), "TIFF", False, id="F beyond"),
        pytest.param(with_holes, "TIFF", False, id="F with NaN"),
    ],
)
def test_rarer_modes_show_the_picture(picture, convert, kind, colour):
    image = picture(9, (128, 128))
    image.paste("white", (0, 112, 16, 128))  # the ends of the scale
    image.paste("black", (112, 112, 128, 128))
    touch("picture", encoded(convert(image), kind))
    expected = squeezed(image if colour else image.convert("L").convert("RGB"))
    assert difference(pixels("picture")[4:], expected[4:]) < 6


@pytest.mark.parametrize("values", [np.nan, np.inf, -np.inf, 0.0, -5.0, 1e30], ids=str)
def test_floating_point_picture_of_one_value_is_plain(values):
    Image.fromarray(np.full((8, 8), values, np.float32)).save("plain.tif")
    assert np.ptp(pixels("plain.tif")) == 0


@pytest.mark.parametrize("kind", [kind for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO") if kind in WRITABLE])
def test_first_frame_counts(kind):
    first, second = (Image.new("RGB", (64, 64), colour) for colour in (RED, BLUE))
    touch("frames", encoded(first, kind, save_all=True, append_images=[second]))
    assert Image.open("frames").n_frames == 2
    assert difference(pixels("frames"), np.array(RED)) < 5


@pytest.mark.parametrize("blank", ["white", "black", "#1230"], ids=["white", "black", "transparent"])
@pytest.mark.parametrize("kind", [kind for kind in ("GIF", "PNG", "WEBP", "AVIF") if kind in WRITABLE])
def test_an_animation_that_fades_in_is_its_first_frame_that_shows_something(kind, blank, picture):
    if (kind, blank) == ("GIF", "#1230"):
        pytest.skip("a pixel of a GIF is transparent or not")
    shown, start = picture(3).convert("RGBA"), Image.new("RGBA", (96, 64), blank)
    others = [start.copy(), Image.blend(start, shown, 0.4), shown]
    touch("fading", encoded(start, kind, save_all=True, append_images=others, disposal=2 if kind == "GIF" else 1))
    assert Image.open("fading").n_frames > 1
    first = encoded(Image.alpha_composite(Image.new("RGBA", (96, 64), "white"), others[1]).convert("RGB"))
    touch("expected", first)
    assert difference(pixels("fading"), pixels("expected")) < 8
    with Image.open("fading") as image:
        assert main.to_rgb(image, 96).tobytes() == main.to_rgb(image, 96).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (2, 3), (1, 2), (5_000, 7)], ids=str)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_odd_sizes(size, kind):
    touch("odd", encoded(Image.new("RGB", size, (250, 120, 10)), kind))
    assert difference(pixels("odd"), np.array((250, 120, 10))) < 4


# ---- Damaged, and shown as far as they go ----------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["a tenth", 21, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in sorted(COMMON & set(WRITABLE) - {"AVIF", "JPEG2000"})),
        pytest.param("JPEG", {"progressive": True}, id="progressive"),
    ],
)
def test_truncated_file_is_decoded_as_far_as_it_goes(picture, kind, options, missing):
    content = encoded(picture(1, (400, 300)), kind, **options)
    touch("whole", content)
    touch("cut", content[: int(len(content) * 0.9) if missing == "a tenth" else -missing])
    cut, whole = read("cut"), read("whole")
    assert whole.reason is None and cut.digest and cut.digest != whole.digest
    right = np.abs(cut.made.numpy().astype(int) - whole.made.numpy()).mean((0, 2)) < 10  # of its rows
    assert right.mean() > (0.6 if missing == "a tenth" else 0.9)
    assert cut.reason == main.TRUNCATED or (missing != "a tenth" and right.all())  # what is missing is no pixel


@pytest.mark.parametrize("strips", [1, 8])
def test_compressed_tiff_shows_the_strips_before_the_damage(picture, strips):
    content = bytearray(encoded(picture(1, (400, 304)), "TIFF", compression="tiff_lzw", tiffinfo={278: 304 // strips}))
    with Image.open(io.BytesIO(content)) as image:
        last = image.tag_v2[273][-1]
    content[last : last + 40] = b"\xff" * 40
    touch("damaged.tif", bytes(content))
    if strips == 1:
        refused("damaged.tif")
    else:
        assert read("damaged.tif").reason == main.TRUNCATED


SHOWS_NOTHING = {"JPEG": 10, "PNG": 60, "GIF": 10, "WEBP": 15, "BMP": 40, "HEIF": 100}  # bytes that are left


@pytest.mark.parametrize("kind", sorted(SHOWS_NOTHING.keys() & set(WRITABLE)))
def test_a_start_that_shows_nothing_is_refused(picture, kind):
    touch("cut.jpg", encoded(picture(1, (400, 300)), kind)[: SHOWS_NOTHING[kind]])
    refused("cut.jpg")


def test_jpeg_of_which_no_pixel_is_left_is_refused(picture):
    content = encoded(picture(1, (400, 300)), "JPEG")
    touch("cut.jpg", content[: content.index(b"\xff\xda") + 14])
    refused("cut.jpg")


def test_a_thread_that_reads_a_damaged_file_does_not_make_others_tolerant(picture):
    content = encoded(picture(1, (400, 300)), "JPEG")
    touch("cut.jpg", content[:-300])
    with ThreadPoolExecutor(8) as threads:
        assert {found.reason for found in threads.map(read, ["cut.jpg"] * 200)} == {main.TRUNCATED}
    with pytest.raises(OSError, match="truncated"):
        Image.open("cut.jpg").load()


# ---- Refused, with a reason ------------------------------------------------------------------------------------------


def refused(path: str | Path) -> str:
    """The reason, a line, why a file that claims to be an image is not usable."""
    picture = read(path)
    assert picture.digest is None and picture.made is None and not picture.vanished
    assert picture.reason and "\n" not in picture.reason
    return picture.reason


NO_IMAGES = {
    "zero bytes": b"",
    "one byte": b"\xff",
    "text": b"Just a text.\n",
    "zeros": b"\0" * 5000,
    "web page": b"<html><body>404 Not Found</body></html>",
    "signature alone": b"\x89PNG\r\n\x1a\n",
    "noise": random.Random(1).randbytes(5000),
    "PDF": b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "MP4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    "ZIP": b"PK\x03\x04",
}
BROKEN = {**NO_IMAGES, "start of a JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF\0"}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["a.jpg", "a.PNG", "a.webp", "a.heic"])
def test_named_like_an_image_but_none(name, content):
    touch(name, content)
    refused(name)
    info = os.stat(name)  # so that it is not tried again until it changes
    assert read(name).file == (os.fsencode(name), len(content), info.st_mtime_ns)


@pytest.mark.parametrize("content", NO_IMAGES.values(), ids=NO_IMAGES)
@pytest.mark.parametrize("name", ["a.txt", "README", "a.pdf", "a.svg", "a.mp4", "a.zip", "a.py"])
def test_never_meant_to_be_an_image(name, content):
    touch(name, content)
    assert read(name) == main.Picture(main.File.of(os.fsencode(name), os.stat(name)))  # without a reason, quietly


@posix
@pytest.mark.parametrize("name", ["a.eps", "a.jpg"])
def test_eps_never_starts_ghostscript(tmp_path, picture, monkeypatch, name):
    touch("bin/gs", b"#!/bin/sh\necho >> '%b/started'\n" % os.fsencode(tmp_path))
    os.chmod("bin/gs", 0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow remembers where it found one
    touch(name, encoded(picture(1), "EPS"))
    assert read(name).made is None
    assert not os.path.exists("started")


CHANGES: dict[str, Callable[[], Any]] = {
    "overwritten": lambda: touch("a.png", b"something else"),
    "truncated": lambda: os.truncate("a.png", 9),
    "touched": lambda: os.utime("a.png", ns=(1, 1)),
    "removed": lambda: os.unlink("a.png"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_file_that_changes_while_it_is_read_or_is_gone_before_is_left_out_this_time(picture, change):
    touch("a.png", encoded(picture(1), "PNG"))
    transform = main.get_transform(SIDE)
    changing = lambda image: [transform(image), change()][0]  # noqa: E731
    assert main.read_picture(main.File(b"a.png", 0, 0), b"", lambda _: changing).vanished
    assert read("gone.png").vanished


@pytest.mark.parametrize("workers", [1, 8])
def test_reads_ahead_no_further_than_told(workers):
    tasks = iter(range(1000))
    results = main.read_ahead(abs, tasks, workers, 5)
    used = list(itertools.islice(results, 20))
    assert used == list(range(20)) and len(list(tasks)) >= 1000 - 20 - 5
    assert list(main.read_ahead(abs, [], workers, 4)) == []


# ---- Formats that need a package -------------------------------------------------------------------------------------


def drawn_dng(orientation: int) -> bytes:
    """A RAW file of 1200 × 800 without a preview: a mosaic of grey squares, and the least tags that LibRaw asks for."""
    width, height = 1200, 800
    squares = np.random.default_rng(0).integers(0, 65535, (height // 50, width // 50))
    data, text = squares.repeat(50, 0).repeat(50, 1).astype("<u2").tobytes(), (2, 4, b"Abc\0")
    tags: dict[int, tuple[int, int, Any]] = {254: (4, 1, 0), 256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 16)}
    tags |= {259: (3, 1, 1), 262: (3, 1, 32803), 271: text, 272: text, 273: (4, 1, None), 274: (3, 1, orientation)}
    tags |= {277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, len(data)), 33421: (3, 2, struct.pack("<HH", 2, 2))}
    tags |= {33422: (1, 4, b"\0\1\1\2"), 50706: (1, 4, b"\1\4\0\0"), 50708: text}
    start, made = 14 + 12 * len(tags), b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, (kind, count, value) in tags.items():
        value = start if value is None else value
        made += struct.pack("<HHI", tag, kind, count) + (struct.pack("<I", value) if isinstance(value, int) else value)
    return made + bytes(4) + data


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (6, True), (8, True)])
def test_raw_file_is_developed_and_has_its_true_size(orientation, turned):
    pytest.importorskip("rawpy")
    touch("a.dng", drawn_dng(orientation))
    assert pixels("a.dng").std() > 30
    held = main.holdings("a.dng")
    assert held and held.raw and held.size == ((800, 1200) if turned else (1200, 800))


def test_jpeg_xl_is_read(picture):
    pytest.importorskip("pillow_jxl")
    touch("a.jxl", encoded(picture(1), "JXL"))
    assert difference(pixels("a.jxl"), squeezed(picture(1))) < 5


def test_files_in_formats_that_cannot_be_read_are_counted_by_suffix(collection, run, monkeypatch):
    formats, suffixes, version = main.image_formats()
    without = suffixes - {".jxl"} - main.RAW_SUFFIXES
    monkeypatch.setattr(main, "image_formats", lambda: (formats, without, version))
    folder = collection(2)
    for name in ("1.cr3", "2.CR3", "3.orf", "4.jxl"):
        touch(folder / name, random.Random(name).randbytes(500))
    touch(folder / "notes.txt", b"buy milk")
    words = "4 files in formats that cannot be read here (.cr3 2, .jxl 1, .orf 1): pip install pillow-jxl-plugin rawpy"
    for _ in range(2):
        assert words in run("--model", "offline", "--index-only").stderr
    assert "4 skipped" in run("--model", "offline", "--index-only").stderr
    outcome = run("--model", "offline", "-q", folder / "1.cr3")
    assert outcome.status == 1 and "pip install rawpy" in outcome.stderr
