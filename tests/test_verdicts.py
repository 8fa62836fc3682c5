"""Section Verdicts: copy, variant or neither, on what people have beside photographs, drawn by drawings.py."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from drawings import (
    NAMES,
    WORDS,
    bar_code,
    bricks,
    card,
    chart,
    chat,
    comic_page,
    comic_strip,
    drawing,
    flag,
    font,
    form,
    meme,
    panel,
    photo,
    qr_code,
    table,
    text_page,
    two_frames,
    watermarked,
)
from PIL import Image, ImageColor, ImageDraw, ImageOps

import main

IMAGES = Path("bulk_images")
ONE, OTHER = ("WHEN THE TESTS", "ARE GREEN"), ("NOBODY AT ALL", "MY CODE AT NIGHT")
NATION = ("red", "white", "blue", "green")


def verdict(one: Image.Image, other: Image.Image) -> main.Verdict | None:
    """The verdict on two pictures, which is the same in both directions."""
    a, b = main.Shown.of(one), main.Shown.of(other)
    found, back = main.compare(a, b), main.compare(b, a)
    assert (found is None) == (back is None)
    if found and back:
        assert (found.label, found.covers, found.differs) == (back.label, back.covers[::-1], back.differs)
        assert found.boxes == back.boxes[::-1]
    return found


def dark(seed: int, most: int = 110) -> Image.Image:
    return watermarked(photo(seed, most=most))


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2))


def stripes(*colours: str) -> Image.Image:
    """A flag of stripes, one above the other, and nothing else."""
    image = Image.new("RGB", (1, len(colours)))
    for y, colour in enumerate(colours):
        image.putpixel((0, y), ImageColor.getrgb(colour))
    return image.resize((1063, 709), Image.Resampling.NEAREST)


VARIANTS: dict[str, Callable[[], tuple[Image.Image, Image.Image]]] = {
    "one form, two persons": lambda: (form(1), form(2)),
    "eight and nine": lambda: (card(8, "spade"), card(9, "spade")),
    "seven and eight": lambda: (card(7, "heart"), card(8, "heart")),
    "two black suits": lambda: (card(8, "spade"), card(8, "club")),
    "two red suits": lambda: (card(8, "heart"), card(8, "diamond")),
    "one stripe of a flag": lambda: (flag(NATION), flag(("red", "white", "red", "green"))),
    "two memes": lambda: (meme(1, *ONE), meme(1, *OTHER)),
    "memes with the same line below": lambda: (meme(1, *ONE), meme(1, OTHER[0], ONE[1])),
}
DIFFERENT: dict[str, Callable[[], tuple[Image.Image, Image.Image]]] = {  # variants, or none: both are right
    "tables": lambda: (table(1), table(2)),
    "tables, one of half size": lambda: (table(1), half(table(2))),
    "charts": lambda: (chart(1), chart(2)),
    "charts, one of half size": lambda: (chart(1), half(chart(2))),
    "a red and a black suit": lambda: (card(8, "heart"), card(8, "spade")),
    "flags": lambda: (flag(NATION), flag(("black", "yellow", "red", "purple"))),
    "flags of the same colours": lambda: (flag(NATION), flag(("blue", "white", "red", "green"))),
    "flags that share the edge between two stripes": lambda: (
        stripes("blue", "black", "white"), stripes("white", "darkblue", "red")
    ),
    "bar codes": lambda: (bar_code(1), bar_code(2)),
    "codes": lambda: (qr_code(1), qr_code(2)),
    "bricks in negative colours": lambda: (
        bricks(wall="black", joint="white"), bricks(wall="white", joint="black", row=24)
    ),
    "bricks of other rows": lambda: (bricks(), bricks(row=24)),
    "bricks of other shades": lambda: (bricks(shades=1), bricks(shades=2)),
    "dark photographs under one watermark": lambda: (dark(1), dark(2)),
    "faces": lambda: (drawing(1), drawing(1, smile=False)),
    "chats": lambda: (chat(1), chat(2)),
    "text": lambda: (text_page(1), text_page(2)),
}  # fmt: skip


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_differs_in_a_part_is_a_variant(kind):
    found = verdict(*VARIANTS[kind]())
    assert found and found.label == "variant" and found.differs > 0.01 and found.boxes[1]


def lines_at_the_edges(seed: int) -> Image.Image:
    """A photograph with lines of large letters along its upper and its lower edge, from side to side."""
    random, image = np.random.default_rng(seed), photo(3, (400, 500))
    canvas = ImageDraw.Draw(image)
    for top in (0, 448):
        for x in range(4, 390, 28):
            for _ in range(7):
                (x0, x1), (y0, y1) = random.integers(x, x + 26, 2), random.integers(top, top + 52, 2)
                canvas.line((x0, y0, x1, y1), fill="black", width=13)
                canvas.line((x0, y0, x1, y1), fill="white", width=7)
    return image


def test_lines_of_text_along_an_edge_are_a_difference_and_no_bar(monkeypatch):
    pair = lines_at_the_edges(1), lines_at_the_edges(2)
    found = verdict(*pair)
    assert found is None or found.label == "variant"
    monkeypatch.setattr(main, "DRAWN", 1.1)
    found = main.compare(*map(main.Shown.of, pair))
    assert found and found.label == "copy" and found.covers[0] < 0.9


def test_lines_of_text_are_no_bar_either_where_one_picture_was_moved_a_little():
    one, other = lines_at_the_edges(1), lines_at_the_edges(2)
    x, y = (round(0.02 * side) for side in one.size)
    found = verdict(one.crop((x, y, *one.size)), other)
    assert found is None or found.label == "variant"
    assert verdict(one.crop((x, y, *one.size)), one).label == "copy"


def small_form(seed: int) -> Image.Image:
    """A form in small print; what is written in it depends on the seed."""
    image, random = Image.new("RGB", (850, 1200), "white"), Random(seed)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((60, 60, 790, 130), outline="black", fill=(225, 232, 245))
    for number, word in enumerate(WORDS[:12]):
        y = 180 + 50 * number
        canvas.rectangle((60, y, 320, y + 50), outline="black", fill=(242, 242, 242))
        canvas.rectangle((320, y, 790, y + 50), outline="black")
        canvas.text((70, y + 15), f"{number + 1}. {word}", "black", font(15))
        canvas.text((335, y + 14), f"{random.choice(NAMES)} {random.randint(100, 99999)}", "navy", font(17))
    for number in range(5):
        canvas.text((90, 820 + 38 * number), f"{number}. {' '.join(WORDS[number : number + 8])}", "black", font(14))
    return image


@pytest.mark.parametrize("seeds", [(1, 2), (3, 4), (5, 6)])
def test_what_is_written_small_in_a_part_of_a_form_is_a_difference(seeds):
    """Along 384 pixels of the side each entry is a line of three windows."""
    one, other = map(small_form, seeds)
    found = verdict(one.crop((30, 120, 688, 1050)), other)
    assert found is None or found.label == "variant"
    assert verdict(one.crop((30, 120, 688, 1050)), one).label == "copy"


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_only_has_the_same_layout_is_no_copy(kind):
    found = verdict(*DIFFERENT[kind]())
    assert found is None or found.label == "variant"


def test_two_things_on_one_floor_are_not_the_same_picture():
    floor = photo(21, (600, 800))
    one, other = floor.copy(), floor.crop((0, 0, 360, 400))
    one.paste(photo(22, (300, 500)), (200, 250))
    other.paste(photo(23, (150, 400)), (210, 0))
    assert verdict(one, other) is None
    assert verdict(floor, floor.crop((0, 0, 360, 400))).label == "copy"


def test_a_cell_of_a_collage_cut_to_a_square_is_a_copy():
    pictures = [photo(seed, (600, 400)) for seed in range(31, 35)]
    collage = Image.new("RGB", (600, 600))
    for number, picture in enumerate(pictures):
        square = picture.crop((100, 0, 500, 400)).resize((300, 300))
        collage.paste(square, (number % 2 * 300, number // 2 * 300))
    found = verdict(collage, pictures[2])
    assert found.label == "copy" and sum(found.covers) < 1


@pytest.mark.parametrize("seed", [(1, 2), (5, 6)])
def test_photographs_that_have_nothing_in_common_have_no_verdict(seed):
    assert verdict(*map(photo, seed)) is None


def resaved(image: Image.Image) -> Image.Image:
    image.save(stream := io.BytesIO(), "JPEG", quality=40)
    return Image.open(stream)


def cropped(image: Image.Image) -> Image.Image:
    """Without its margins: 60 % of it are left."""
    (width, height), share = image.size, 0.6**0.5
    left, top = int(width * (1 - share) * 0.5), int(height * (1 - share) * 0.4)
    return image.crop((left, top, left + int(width * share), top + int(height * share)))


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resaved": resaved,
    "half": half,
    "mirrored": ImageOps.mirror,
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_270),
    "grey": lambda image: image.convert("L"),
    "crop": cropped,
}
KINDS: dict[str, Callable[[], Image.Image]] = {
    "form": lambda: form(1),
    "table": lambda: table(1),
    "card": lambda: card(9, "spade"),
    "flag": lambda: flag(NATION),
    "bar code": lambda: bar_code(1),
    "code": lambda: qr_code(1),
    "chart": lambda: chart(1),
    "text": lambda: text_page(1),
    "meme": lambda: meme(1, *ONE),
    "dark": lambda: dark(1),
    "chat": lambda: chat(1),
    "photograph": lambda: photo(1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_the_whole_makes_a_copy(kind):
    picture = KINDS[kind]()
    shown = main.Shown.of(picture)
    for name, edit in EDITS.items():
        if (kind, name) == ("bar code", "crop"):  # it repeats itself: its parts lie in several places
            continue
        edited = main.Shown.of(edit(picture))
        found = main.compare(edited, shown)
        assert found and found.label == "copy" and found.differs == 0 and not found.hint.inverted, name
        assert found.covers == pytest.approx((1, 0.6 if name == "crop" else 1), abs=0.03), name
        words = {"mirrored": ["mirrored"], "turned": ["turned 90°"]}.get(name, [])
        assert main.edit_words(found.hint.H, edited.size, False) == words


def test_a_negative_is_a_copy_as_a_whole_alone():
    picture = photo(2)
    found = verdict(picture, ImageOps.invert(picture))
    assert found and found.label == "copy" and found.hint.inverted
    part = picture.copy()
    part.paste(ImageOps.invert(picture.crop((120, 80, 320, 230))), (120, 80))
    found = verdict(picture, part)
    assert found and found.label == "variant"


def test_two_frames_of_a_film_are_copies_in_a_search():
    found = verdict(*two_frames(3))
    assert found and found.label == "copy"


def captioned(image: Image.Image) -> Image.Image:
    """A bar with text over the bottom, which an app may put there."""
    image = image.copy()
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 300, image.width, image.height), fill="black")
    for x in range(10, image.width, 60):
        canvas.text((x, 318), "HAHA", "white")
    return image


def test_a_bar_along_an_edge_is_not_shown_rather_than_different():
    found = verdict(photo(2), captioned(photo(2)))
    assert found and found.label == "copy"
    assert found.covers == pytest.approx((300 / 360, 300 / 360), abs=0.05)


STICKER = (200, 150, 270, 210)


def with_sticker(image: Image.Image, box: tuple[int, int, int, int] = STICKER) -> Image.Image:
    image = image.copy()
    canvas = ImageDraw.Draw(image)
    canvas.rectangle(box, fill="yellow")
    canvas.ellipse(box, fill="red", outline="black", width=4)
    return image


def test_a_sticker_makes_a_variant_with_a_box_around_it():
    found = verdict(photo(2), with_sticker(photo(2)))
    assert found and found.label == "variant" and found.covers == pytest.approx((1, 1), abs=0.03)
    for boxes in found.boxes:
        assert boxes[0] == pytest.approx(STICKER, abs=16)  # the largest one; a window and a half
    assert found.differs == pytest.approx(70 * 60 / (480 * 360), abs=0.02)


def answer(run, *args: object) -> dict[str, Any]:
    outcome = run(*args, "--model", "offline", "-q", "--no-report", "--json")
    assert outcome.status == 0, outcome
    return json.loads(outcome.stdout)


def labelled(run, *args: object) -> list[tuple[str, str]]:
    return [(Path(match["path"]).name, match["label"]) for match in answer(run, *args)["matches"]]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A form filled in by three persons, one of them twice, and other things."""
    (tmp_path / IMAGES).mkdir()
    for seed in range(1, 4):
        form(seed).save(tmp_path / IMAGES / f"form {seed}.png")
    resaved(form(1)).save(tmp_path / IMAGES / "form 1 again.jpg", quality=40)
    for name, image in (("text", text_page(1)), ("photo", photo(1)), ("card", card(8, "heart"))):
        image.save(tmp_path / IMAGES / f"{name}.png")
    return tmp_path / IMAGES


def test_identical_files_come_first_then_copies_variants_and_the_rest(mixed, run):
    Path("query.png").write_bytes((mixed / "form 1.png").read_bytes())
    found = labelled(run, "query.png")
    assert found[:2] == [("form 1.png", "identical"), ("form 1 again.jpg", "copy")]
    assert {*found[2:4]} == {("form 2.png", "variant"), ("form 3.png", "variant")}
    assert [label for _, label in found[4:]] == [""] * 3
    for threshold, count in (("identical", 1), ("copy", 2), ("variant", 4)):
        assert labelled(run, "query.png", "--threshold", threshold) == found[:count]
    for k in (1, 3):
        assert labelled(run, "query.png", "-k", k) == found[:k]


def test_the_heading_counts_variants_and_a_variant_tells_how_much_and_where_it_differs(mixed, run):
    form(9).save("query.png")
    outcome = run("query.png", "--model", "offline", "--no-report")
    heading, first, *_ = outcome.stdout.splitlines()
    assert heading == "query.png  (offline, 7 images): no copy found, 4 variants"
    assert re.search(r"\.(png|jpg)  variant, differs [1-9] %, covers (98|99|100) %$", first)
    match = answer(run, "query.png", "--threshold", "variant", "-k", 1)["matches"][0]
    region = match["region"]
    assert 0 < region["differing"] < 0.2 and len(region["differs"]) >= 3
    for left, top, right, bottom in region["differs"]:
        assert 0 <= left < right <= 600 and 0 <= top < bottom <= 760


def test_of_variants_the_one_that_differs_least_comes_first(mixed, run):
    for seed in (2, 3):
        with_sticker(form(seed)).save("query.png")
        first, *others = labelled(run, "query.png", "--threshold", "variant")
        assert first == (f"form {seed}.png", "variant") and {label for _, label in others} == {"variant"}


def test_a_small_part_of_one_of_many_tables_finds_its_own(tmp_path, run):
    (tmp_path / IMAGES).mkdir()
    for seed in range(6):
        small = table(seed)
        small.resize((500, round(500 * small.height / small.width)), Image.Resampling.BOX).save(
            tmp_path / IMAGES / f"{seed}.png"
        )
    with Image.open(tmp_path / IMAGES / "4.png") as image:
        image.crop((57, 45, 57 + 387, 45 + image.height * 77 // 100)).save("query.png")
    assert labelled(run, "query.png")[0] == ("4.png", "copy")


def test_a_sticker_is_outlined_in_pixels_of_the_match(tmp_path, run):
    (tmp_path / IMAGES).mkdir()
    photo(2).resize((960, 720), Image.Resampling.BICUBIC).save(tmp_path / IMAGES / "large.png")
    with_sticker(photo(2)).save("query.png")
    (match,) = answer(run, "query.png", "-k", 1)["matches"]
    box, *_ = match["region"]["differs"]  # the largest one comes first
    assert match["label"] == "variant" and box == pytest.approx([2 * side for side in STICKER], abs=30)


@pytest.mark.parametrize("make", [comic_page, comic_strip], ids=["page", "strip"])
def test_a_panel_is_found_in_its_page_and_in_a_strip_15_times_as_high_as_wide(make, tmp_path, run):
    (tmp_path / IMAGES).mkdir()
    for seed in range(1, 4):
        make(seed).save(tmp_path / IMAGES / f"{seed}.png")
    panel(25 if make is comic_page else 205).save("query.png")
    found = answer(run, "query.png")["matches"]
    first, *others = found  # figures recur in the panels of other pages
    assert Path(first["path"]).name == "2.png" and first["label"] == "copy"
    assert all(match["label"] != "copy" for match in others)
    page = make(2).size
    assert found[0]["region"]["covers"] == pytest.approx(330 * 240 / (page[0] * page[1]), rel=0.15)


def reencoded(count: int) -> None:
    """`count` files of one picture, in three formats and sizes, in the collection."""
    IMAGES.mkdir()
    picture = photo(7, (160, 120))
    for n in range(count):
        kind, size = (("JPEG", (160, 120)), ("WEBP", (160, 120)), ("JPEG", (120, 90)))[n % 3]
        picture.resize(size).save(IMAGES / f"{n}.{kind.lower()}", kind, quality=90 - 5 * (n // 3))


def test_there_is_no_limit_to_the_copies_that_are_found(run):
    reencoded(22)  # more than are compared at twice
    photo(7, (160, 120)).save("query.png")
    found = labelled(run, "query.png", "-k", 50, "--threshold", "copy")
    assert len(found) == 22 and {label for _, label in found} == {"copy"}


def test_more_copies_than_are_compared_at_once_are_one_group(run):
    reencoded(11)
    outcome = run("--duplicates", "--model", "offline", "-q", "--no-report", "--json")
    (group,) = map(json.loads, outcome.stdout.splitlines())
    assert Path(group["keep"]).name == "0.jpeg" and len(group["matches"]) == 10


def test_of_distinct_pictures_none_is_listed_for_deletion(tmp_path, run):
    """Pairs with one layout are variants: groups only if asked for, with what would be lost."""
    (tmp_path / IMAGES).mkdir()
    for name in ("one form, two persons", "eight and nine", "two memes"):
        for n, image in enumerate(VARIANTS[name]()):
            image.save(tmp_path / IMAGES / f"{name} {n}.png")
    args = ("--model", "offline", "-q", "--no-report")
    assert run("--duplicates", *args).stdout == ""
    assert run("--duplicates", "variant", "-0", *args).stdout == ""
    groups = [json.loads(line) for line in run("--duplicates", "variant", "--json", *args).stdout.splitlines()]
    assert len(groups) == 3
    for match in (match for group in groups for match in group["matches"]):
        assert match["label"] == "variant" and "what differs" in match["lost"]
