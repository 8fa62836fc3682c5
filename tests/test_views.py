"""Section Features, queries: a copy is found through its edit, which is named."""

import json

import numpy as np
import pytest
from conftest import draw
from PIL import Image, ImageDraw

import main

SIZE = (240, 180)


def framed(image: Image.Image, colour: str = "white", edge: int = 24) -> Image.Image:
    canvas = Image.new("RGB", (image.width + 2 * edge, image.height + 2 * edge), colour)
    canvas.paste(image, (edge, edge))
    return canvas


def captioned(image: Image.Image) -> Image.Image:
    """A black bar hides the lowest sixth; there is text on it."""
    image = image.copy()
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, image.height * 5 // 6, image.width, image.height), fill="black")
    canvas.text((image.width / 2, image.height * 11 / 12), "a caption", "white", anchor="mm")
    return image


def letterboxed(image: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (image.width, image.height + 60), "black")
    canvas.paste(image, (0, 30))
    return canvas


EDITS = {
    "": lambda image: image,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned 90°": lambda image: image.transpose(Image.Transpose.ROTATE_270),  # clockwise
    "turned 180°": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "turned 270°": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "mirrored, turned 180°": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "part": lambda image: image.crop((30, 20, 30 + 160, 20 + 120)),
    "trimmed": framed,
    "trimmed, mirrored": lambda image: framed(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


@pytest.fixture
def twelve(tmp_path) -> None:
    (tmp_path / "bulk_images").mkdir()
    for seed in range(12):
        draw(seed, SIZE).save(tmp_path / "bulk_images" / f"{seed}.png")


def matches(run, *args: object) -> list[dict]:
    outcome = run(*args, "--model", "offline", "--json", "-q")
    assert outcome.status == 0, outcome.stderr
    return json.loads(outcome.stdout)["matches"]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit or "none")
def test_an_edited_copy_is_found_and_its_edit_named(run, twelve, edit):
    for seed in (3, 7):
        EDITS[edit](draw(seed, SIZE)).save("query.png")
        best, second, *_ = matches(run, "query.png")
        assert (best["path"], best["view"]) == (f"bulk_images/{seed}.png", edit)
        assert best["score"] > (0.5 if edit == "part" else 0.9) and best["score"] > second["score"]


@pytest.mark.parametrize("edit", [captioned, letterboxed, lambda image: framed(image, "black", 12)])
def test_bars_and_frames_are_seen_through(run, twelve, edit):
    edit(draw(5, SIZE)).save("query.png")
    best, *_ = matches(run, "query.png")
    assert best["path"] == "bulk_images/5.png" and best["view"] == "trimmed" and best["score"] > 0.8


def test_a_query_without_any_edit_keeps_the_score_it_had(run, twelve):
    draw(4, SIZE).save("query.png")
    with_views, without = (matches(run, "query.png", "--views", views)[0] for views in ("all", "none"))
    assert with_views == without and without["view"] == ""


def test_views_none_looks_at_the_query_as_it_is(run, twelve):
    draw(4, SIZE).transpose(Image.Transpose.ROTATE_90).save("query.png")
    assert {match["view"] for match in matches(run, "query.png", "--views", "none")} == {""}
    assert matches(run, "query.png", "--views", "none")[0]["score"] < 0.5


@pytest.mark.parametrize(("views", "count"), [("none", 1), ("auto", 2)], ids=["none", "auto: mirrored"])
def test_a_network_looks_at_fewer_views_of_its_own_accord(views, count):
    network = main.Model("resnet18", "resnet18", 32, 4, "cpu", lambda pixels: pixels.float().mean((2, 3)))
    assert len(main.query_views(draw(1, SIZE), network, views)) == count
    assert len(main.query_views(framed(draw(1, SIZE)), network, views)) == (1 if views == "none" else 2 * count)


@pytest.mark.parametrize("seed", range(6))
def test_a_picture_without_bars_is_not_trimmed(seed):
    assert main.content_box(draw(seed, SIZE)) is None


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(Image.new("RGB", SIZE, "white"), id="blank"),
        pytest.param(Image.new("RGB", (1, 1), "red"), id="one pixel"),
        pytest.param(Image.new("RGB", (1, 2000), "red"), id="a line"),
    ],
)
def test_what_has_no_picture_behind_a_bar_is_not_trimmed(image):
    assert main.content_box(image) is None


def test_the_frame_is_cut_to_the_pixel():
    assert main.content_box(framed(draw(2, SIZE))) == (24, 24, 24 + SIZE[0], 24 + SIZE[1])


def test_top_k_is_a_prefix_of_top_more_in_all_views(run, twelve):
    draw(9, SIZE).transpose(Image.Transpose.ROTATE_90).save("query.png")
    ten, three = matches(run, "query.png", "-k", 10), matches(run, "query.png", "-k", 3)
    assert ten[:3] == three
    assert np.all(np.diff([match["score"] for match in ten]) <= 0)
