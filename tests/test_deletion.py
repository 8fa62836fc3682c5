"""--duplicates: what may be deleted, and what is kept. Without any one of the rules, a test here lists a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import encoded
from drawings import photo, two_frames
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps, TiffImagePlugin

IMAGES = Path("bulk_images")
PICTURE = photo(2, (400, 300))


@pytest.fixture(autouse=True)
def images(alone: None) -> None:
    IMAGES.mkdir()


def put(name: str, content: bytes, age: float = 0) -> Path:
    (path := IMAGES / name).write_bytes(content)
    os.utime(path, (1.7e9 - age, 1.7e9 - age))
    return path


def duplicates(run, *args: object) -> Any:
    outcome = run("--duplicates", *args, "--model", "offline", "-q", "--no-report")
    assert outcome.status == 0, outcome
    return outcome.stdout


def listed(run, *args: object) -> list[str]:
    return [Path(path).name for path in duplicates(run, *args, "-0").split("\0")[:-1]]


def group(run) -> tuple[str, dict[str, str | None]]:
    """The file to keep, and what is lost with each other one."""
    (found,) = map(json.loads, duplicates(run, "--json").splitlines())
    return Path(found["keep"]).name, {Path(match["path"]).name: match["lost"] for match in found["matches"]}


def camera(place: bool = False) -> Image.Exif:
    exif = Image.Exif()
    exif[271] = "Maker"
    if place:
        exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 1.0, 0.0)})
    return exif


def place() -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 1.0, 0.0)})
    return exif


def raw() -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[50706], info.tagtype[50706] = b"\1\4\0\0", 1  # DNGVersion
    return encoded(PICTURE, "TIFF", tiffinfo=info)


def several(kind: str, **options: Any) -> bytes:
    others = [photo(seed, PICTURE.size) for seed in (5, 6)]
    return encoded(PICTURE, kind, save_all=True, append_images=others, **options)


def with_alpha() -> Image.Image:
    image = PICTURE.convert("RGBA")
    image.putalpha(Image.fromarray(np.indices((300, 400)).sum(0).clip(200, 255).astype(np.uint8)))
    return image


def frame(n: int) -> Image.Image:
    return two_frames(3)[n]


KEPT_FOR_ITS_CAMERA: dict[str, tuple[Callable[[], bytes], Callable[[], Image.Image], str]] = {
    # the file, the picture that is kept beside it, and what is lost with the file
    "a crop": (lambda: encoded(PICTURE), lambda: PICTURE.crop((45, 35, 355, 267)), "all but a crop of 60 %"),
    "a smaller one": (lambda: encoded(PICTURE), lambda: PICTURE.resize((360, 270)), "resolution"),
    "mirrored": (lambda: encoded(PICTURE), lambda: ImageOps.mirror(PICTURE), "mirrored"),
    "turned": (lambda: encoded(PICTURE), lambda: PICTURE.transpose(Image.Transpose.ROTATE_180), "turned 180°"),
    "a negative": (lambda: encoded(PICTURE), lambda: ImageOps.invert(PICTURE), "inverted"),
    "grey": (lambda: encoded(PICTURE), lambda: PICTURE.convert("L"), "colour"),
    "the next frame": (lambda: encoded(frame(0)), lambda: frame(1), "small parts that differ"),
    "pages": (lambda: several("TIFF"), lambda: PICTURE, "3 pages"),
    "frames": (lambda: several("PNG"), lambda: PICTURE, "3 frames"),
    "RAW": (raw, lambda: PICTURE, "RAW data"),
    "16 bits": (
        lambda: encoded(Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)),
        lambda: PICTURE.convert("L"),
        "16 bits",
    ),
    "transparency": (lambda: encoded(with_alpha()), lambda: PICTURE, "transparency"),
    "a place": (lambda: encoded(PICTURE, "JPEG", quality=90, exif=place()), lambda: PICTURE, "a place"),
}


@pytest.mark.parametrize("rule", KEPT_FOR_ITS_CAMERA)
def test_a_file_is_not_listed_if_something_is_lost_with_it(rule, run):
    """The other file is kept: it alone has camera metadata."""
    make, picture, words = KEPT_FOR_ITS_CAMERA[rule]
    put("file.tif", make())
    put("kept.jpg", encoded(picture(), "JPEG", quality=95, exif=camera()))
    kept, others = group(run)
    assert kept == "kept.jpg" and words in others["file.tif"].split(", ")
    assert listed(run) == []
    assert words in duplicates(run).partition("lost with it: ")[2]


def page(digit: str = "3", note: int = 255, struck: bool = False, ticked: bool = False) -> Image.Image:
    """A page of small figures, with one digit of choice, and what a pen leaves on it."""
    random, image = np.random.default_rng(7), Image.new("RGB", (560, 760), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for number, y in enumerate(range(20, 680, 22)):
        words = [f"{value:.2f}" for value in random.uniform(1000, 9999, 8)]
        canvas.text((12, y), "  ".join(words), "black", font)
        if number == 9:
            canvas.text((500, y + 11), f"1{digit}5", "black", font)
    canvas.text((200, 710), "approved, J. Miller 12 May", (note,) * 3, font)
    canvas.rectangle((20, 710, 34, 724), outline="black")
    if struck:
        canvas.line((12, 118, 300, 118), "black")
    if ticked:
        canvas.line((22, 712, 32, 722), "black")
    return image


def stamped(text: str, alpha: int) -> Image.Image:
    layer = Image.new("RGBA", PICTURE.size)
    ImageDraw.Draw(layer).text((40, 120), text, (255, 255, 255, alpha), ImageFont.load_default(48))
    return Image.alpha_composite(PICTURE.convert("RGBA"), layer).convert("RGB")


def softened() -> Image.Image:
    mask = Image.new("L", PICTURE.size)
    ImageDraw.Draw(mask).ellipse((120, 80, 220, 180), fill=255)
    return Image.composite(PICTURE.filter(ImageFilter.GaussianBlur(3)), PICTURE, mask)


DETAILS: dict[str, tuple[Callable[[], Image.Image], Callable[[], Image.Image]]] = {
    "a digit": (page, lambda: page("8")),
    "a faint note": (page, lambda: page(note=190)),
    "a line that strikes out": (page, lambda: page(struck=True)),
    "a tick": (page, lambda: page(ticked=True)),
    "a watermark": (lambda: PICTURE, lambda: stamped("SAMPLE", 60)),
    "a softened face": (lambda: PICTURE, softened),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("detail", DETAILS)
def test_a_file_stays_for_one_detail(detail, kind, run):
    """No digit, note or watermark is so small or so faint that the other file is listed. Either may be the one to keep:
    it has more bytes, or camera metadata."""
    one, other = (make() for make in DETAILS[detail])
    put("one.png", encoded(one))
    put("other", encoded(other, kind, **({"quality": 90} if kind == "JPEG" else {}), exif=camera()))
    assert listed(run) == []
    put("one.png", encoded(one, exif=camera()))
    put("other", encoded(other, kind, **({"quality": 90} if kind == "JPEG" else {})))
    assert listed(run) == []


@pytest.mark.parametrize("blurred", ["enlarged from a thumbnail", "blurred"])
def test_the_sharp_file_stays_however_many_pixels_the_blurred_one_has(blurred, run):
    small = PICTURE.resize((160, 120)).resize((480, 360), Image.Resampling.BICUBIC)
    put("sharp.jpg", encoded(PICTURE, "JPEG", quality=80))
    content = small if blurred != "blurred" else PICTURE.filter(ImageFilter.GaussianBlur(2))
    put("more bytes.png", encoded(content, exif=camera()))
    assert "sharp.jpg" not in listed(run)


def test_a_transparent_picture_stays_behind_another_transparent_one(run):
    """They are compared over white: a white word on nothing is not seen there."""
    for name, word in (("one.png", "ACME"), ("other.png", "GLOBEX")):
        image = PICTURE.convert("RGBA").crop((0, 0, 400, 200))
        wide = Image.new("RGBA", (400, 300), (255, 255, 255, 0))
        wide.paste(image)
        ImageDraw.Draw(wide).text((100, 230), word, "white", ImageFont.load_default(40))
        put(name, encoded(wide))
    assert listed(run) == []


def test_nothing_is_lost_with_what_was_resaved_made_smaller_cut_or_made_grey(run):
    put("file.png", encoded(PICTURE))
    others = {
        "resaved.jpg": encoded(PICTURE, "JPEG", quality=40),
        "half.jpg": encoded(PICTURE.resize((200, 150)), "JPEG", quality=80),
        "crop.png": encoded(PICTURE.crop((45, 35, 355, 267))),
        "grey.png": encoded(PICTURE.convert("L")),
        "a little smaller.png": encoded(PICTURE.resize((388, 291), Image.Resampling.BICUBIC)),
    }
    for name, content in others.items():
        put(name, content)
    assert group(run) == ("file.png", dict.fromkeys(others))
    assert sorted(listed(run)) == sorted(others)


def with_bars(colour: str, top: int, bottom: int) -> Image.Image:
    image = Image.new("RGB", (400, 300 + top + bottom), colour)
    image.paste(PICTURE, (0, top))
    ImageDraw.Draw(image).text((20, 300 + top + 10), "a few words on what this shows", fill="red")
    return image


def on_a_screen() -> Image.Image:
    screen = Image.new("RGB", (480, 800), "white")
    canvas = ImageDraw.Draw(screen)
    canvas.rectangle((0, 0, 480, 60), fill=(30, 60, 120))
    for y in range(500, 780, 40):
        canvas.text((30, y), f"a line of the page, number {y}", fill="black")
    screen.paste(PICTURE, (40, 120))
    return screen


def beside_another() -> Image.Image:
    both = Image.new("RGB", (800, 300))
    both.paste(PICTURE, (0, 0))
    both.paste(photo(9, PICTURE.size), (400, 0))
    return both


SET_IN = {
    "black bars": lambda: with_bars("black", 60, 60),
    "a white bar": lambda: with_bars("white", 0, 70),
    "a screen": on_a_screen,
    "a collage": beside_another,
}


@pytest.mark.parametrize("what", SET_IN)
@pytest.mark.parametrize("quality", [None, 90])
def test_an_original_is_not_listed_behind_a_picture_that_it_was_set_in(what, quality, run):
    put("original.jpg", encoded(PICTURE, "JPEG", quality=90))
    put(
        "larger.png",
        encoded(SET_IN[what](), *(("JPEG",) if quality else ()), **({"quality": quality} if quality else {})),
    )
    assert listed(run) == []
    keep, lost = group(run)
    words = "the picture without what is around it" if keep == "larger.png" else "all but a crop"
    assert all(words in str(it) for it in lost.values())


def test_a_raw_file_and_its_picture_are_never_listed_for_one_another(run):
    put("file.jpg", encoded(PICTURE, "JPEG", quality=90))
    put("file.dng", raw(), age=100)
    assert listed(run) == []
    keep, lost = group(run)
    assert list(lost.values()) == [{"file.dng": "the developed picture", "file.jpg": "RAW data"}[keep]]


def test_a_raw_file_is_told_by_its_suffix_too(run):
    put("file.nef", encoded(PICTURE, "TIFF"))
    put("kept.jpg", encoded(PICTURE, "JPEG", quality=95, exif=camera()))
    assert group(run) == ("kept.jpg", {"file.nef": "RAW data"}) and listed(run) == []


def test_the_file_that_lets_most_others_go_is_kept_and_camera_metadata_are_not_lost(run):
    """The one with metadata is smaller: it would let none of the others go."""
    put("camera.jpg", encoded(PICTURE.resize((200, 150)), "JPEG", quality=90, exif=camera()))
    put("large.png", encoded(PICTURE))
    put("resaved.jpg", encoded(PICTURE, "JPEG", quality=60))
    assert group(run) == ("large.png", {"camera.jpg": "camera metadata", "resaved.jpg": None})
    assert listed(run) == ["resaved.jpg"]


@pytest.mark.parametrize("exif", [Image.Exif(), camera()], ids=["plain", "camera"])
def test_a_damaged_file_is_never_kept_before_a_whole_one(exif, run):
    content = encoded(PICTURE.resize((800, 600)), "JPEG", quality=95, exif=exif)
    put("damaged.jpg", content[:-20], age=100)
    put("whole.jpg", encoded(PICTURE, "JPEG", quality=60))
    keep, lost = group(run)
    assert keep == "whole.jpg" and "whole.jpg" not in listed(run) and list(lost) == ["damaged.jpg"]


def test_a_file_that_has_changed_under_its_old_size_and_time_is_not_listed_as_identical(run):
    first, second = (put(name, encoded(PICTURE, "BMP")) for name in ("1.bmp", "2.bmp"))
    assert listed(run, "identical") == ["2.bmp"]
    for path in (second, first):  # the one that would go, and the one that stays
        before = os.stat(path)
        path.write_bytes(encoded(photo(9, PICTURE.size), "BMP"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.stat(path).st_size == before.st_size
        assert listed(run, "identical") == []
        path.write_bytes(encoded(PICTURE, "BMP"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def dotted(n: int) -> Image.Image:
    """A picture that differs in one pixel, so that files have other bytes, but the same size."""
    image = PICTURE.copy()
    image.putpixel((n, 0), (0, 0, 0))
    return image


TIES: dict[str, tuple[tuple[bytes, float], tuple[bytes, float]]] = {  # file a, not kept, and b, kept; with their ages
    "camera metadata": (
        (encoded(PICTURE.resize((404, 303)), "PNG"), 100),
        (encoded(PICTURE, "JPEG", quality=50, exif=camera()), 0),
    ),
    "most pixels": ((encoded(PICTURE, "PNG"), 100), (encoded(PICTURE.resize((408, 306)), "JPEG", quality=60), 0)),
    "most bytes": ((encoded(PICTURE, "JPEG", quality=60), 100), (encoded(PICTURE, "PNG"), 0)),
    "oldest": ((encoded(dotted(1), "BMP"), 0), (encoded(dotted(2), "BMP"), 100)),
}


@pytest.mark.parametrize("order", TIES)
def test_of_files_that_may_go_for_one_another_the_best_is_kept(order, run):
    for name, (content, age) in zip("ab", TIES[order]):
        put(name, content, age)
    assert group(run) == ("b", {"a": None}) and listed(run) == ["a"]


def test_of_files_alike_in_all_the_first_by_path_is_kept(run):
    for n, name in enumerate("cab"):
        put(name, encoded(dotted(n), "BMP"))
    assert sorted(listed(run)) == ["b", "c"] and group(run)[0] == "a"


def test_the_words_of_what_is_lost_are_null_in_json_where_nothing_is(run):
    put("1.png", encoded(PICTURE))
    put("2.jpg", encoded(PICTURE, "JPEG", quality=50))
    (found,) = map(json.loads, duplicates(run, "--json").splitlines())
    (match,) = found["matches"]
    assert "lost" in match and match["lost"] is None and match["label"] == "copy"


def large(n: int) -> Image.Image:
    """A frame of a film of 1600 × 1200 pixels; in the second one a small thing has moved by some pixels."""
    image = photo(4, (1600, 1200))
    thing = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 6, 3), np.uint8)).resize((24, 24), 0)
    image.paste(thing, (800 + 24 * n, 600))
    return image


def test_large_jpegs_are_compared_at_their_full_resolution(run):
    put("frame.jpg", encoded(large(0), "JPEG", quality=90), age=5)
    put("next.jpg", encoded(large(1), "JPEG", quality=90))
    put("again.png", encoded(large(0)))
    keep, lost = group(run)
    assert keep == "again.png" and lost.pop("frame.jpg") is None
    assert "next.jpg" not in listed(run) and all(words == "small parts that differ" for words in lost.values())


def test_two_that_go_with_a_third_are_compared_once_it_is_gone(run):
    kept = put("kept.png", encoded(PICTURE))
    for quality in (70, 80):
        put(f"{quality}.jpg", encoded(PICTURE, "JPEG", quality=quality))
    assert group(run) == ("kept.png", {"80.jpg": None, "70.jpg": None})
    kept.unlink()
    assert group(run) == ("80.jpg", {"70.jpg": None})


def test_a_truncated_file_is_said_to_be_one(run):
    whole = encoded(PICTURE, "JPEG", quality=90)
    put("whole.jpg", whole)
    put("cut.jpg", whole[: len(whole) * 3 // 4])
    (found,) = map(json.loads, duplicates(run, "variant", "--json").splitlines())
    (match,) = found["matches"]
    assert Path(found["keep"]).name == "whole.jpg" and match["truncated"]
