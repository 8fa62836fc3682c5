"""Section Query views: a copy is found through its edit, which is named."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import draw, draw_rich
from PIL import Image

import main

SIZE = (240, 180)


def beside(one: Image.Image, other: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (one.width + other.width, one.height))
    canvas.paste(one, (0, 0))
    canvas.paste(other, (one.width, 0))
    return canvas


EDITS = {
    "": lambda image: image,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned 90°": lambda image: image.transpose(Image.Transpose.ROTATE_270),  # clockwise
    "turned 180°": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "turned 270°": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "mirrored, turned 180°": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "part": lambda image: image.crop((30, 20, 30 + 160, 20 + 120)),
    "inverted": lambda image: image.point([255 - value for value in range(256)] * 3),
    "turned 20°": lambda image: image.rotate(-20, Image.Resampling.BICUBIC),
    "part of the query": lambda image: beside(image, draw(1000, SIZE)),
}
LEAST = {"part": 0.5, "turned 20°": 0.6, "part of the query": 0.6}  # scores


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
        assert best["score"] > LEAST.get(edit, 0.9) and best["score"] > second["score"]


def test_a_query_without_any_edit_keeps_the_score_it_had(run, twelve):
    draw(4, SIZE).save("query.png")
    with_views, without = (matches(run, "query.png", "--views", views)[0] for views in ("all", "none"))
    assert with_views == without and without["view"] == ""


def test_an_edit_is_not_undone_without_views(run, twelve):
    draw(4, SIZE).transpose(Image.Transpose.ROTATE_90).save("query.png")
    (best, *others), auto, every = (matches(run, "query.png", "--views", views) for views in main.VIEWS)
    assert best["score"] < 0.5 and {match["view"] for match in (best, *others)} == {""}
    for found in (auto[0], every[0]):
        assert found["score"] > 0.9 and (found["path"], found["view"]) == ("bulk_images/4.png", "turned 270°")


NETWORK = main.Model("resnet18", "resnet18", 64, 4, "cpu", lambda pixels: pixels.float().mean((2, 3)))


def test_a_network_looks_at_few_views_of_its_own_accord():
    def names(size, views):
        return main.features_of_views(main.query_views(draw(1, size), NETWORK, views), NETWORK)[0]

    assert names(SIZE, "none") == [""] and names(SIZE, "copies") == ["", "mirrored"]
    for size in (SIZE, (180, 240), (180, 400), (400, 180)):
        assert names(size, "auto")[:2] == ["", "mirrored"] and len(names(size, "auto")) <= 25
    assert len(names(SIZE, "all")) > 100


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (127, 127), (200, 4000)])
@pytest.mark.parametrize("views", main.VIEWS)
def test_a_tiny_or_a_thin_query_is_not_searched_by_its_parts(size, views):
    image, model = Image.new("RGB", size, "teal"), main.load_model("offline", device="cpu")
    names, features = main.features_of_views(main.query_views(image, model, views), model)
    assert "part of the query" not in names and len(names) == len(features) <= 60 and np.isfinite(features).all()


@pytest.mark.parametrize("place", [(0, 0), (240, 0), (0, 180), (240, 180), (120, 90)], ids=str)
def test_a_picture_in_a_larger_one_is_found_wherever_it_lies(run, twelve, place):
    query = draw(1000, (480, 360))
    query.paste(draw(3, SIZE), place)
    query.save("query.png")
    best = matches(run, "query.png")[0]
    assert (best["path"], best["view"]) == ("bulk_images/3.png", "part of the query")


def test_the_features_of_parts_are_those_of_pictures_cut_out():
    """The offline descriptor computes the edges of a query once for all parts of a size."""
    model = main.load_model("offline", device="cpu")
    image, side = draw_rich(1), model.side
    views = list(main.parts_of(image, model, main.SIZES))
    names, together = main.features_of_views(views, model)
    cut = [
        view.pixels[:, -top : side - top, -left : side - left]
        for view in views
        for top, left in itertools.product(view.tops, view.lefts)
    ]
    alone = main.extract_features_batch(torch.stack(cut), model)
    assert len(names) == len(cut) > 200 and (together * alone).sum(1).min() > 0.97
