"""Sections Query views, Verification and Search: how an edited copy is found, what a match is called, and the order."""

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw, draw_rich
from evaluate import EDITS, app, collage
from PIL import Image, ImageDraw, ImageFont, ImageOps

import main

IMAGES = Path("bulk_images")
SIZE = (240, 180)


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """Eight pictures with structure; query.jpg is one of them, 3.png, made smaller."""
    (tmp_path / IMAGES).mkdir()
    for seed in range(8):
        draw_rich(seed).save(tmp_path / IMAGES / f"{seed}.png")
    draw_rich(3).resize((360, 270)).save("query.jpg", quality=70)
    return IMAGES


def matches(run, *args: object, query: str = "query.jpg") -> list[dict[str, Any]]:
    outcome = run(query, "--model", "offline", "--json", "-q", "--no-report", *args)
    assert outcome.status == 0, outcome.stderr
    return json.loads(outcome.stdout)["matches"]


def test_a_copy_is_called_one_and_nothing_else_is(rich, run):
    first, *others = matches(run)
    assert (first["path"], first["label"], first["identical"]) == ("bulk_images/3.png", "copy", False)
    assert set(first["region"]) == {"corners", "outline", "points", "covers", "inverted"}
    assert len(others) == 7 and {(match["label"], match["region"]) for match in others} == {("", None)}
    for threshold, found in (("copy", [first]), ("0.9", [first]), ("identical", [])):
        assert matches(run, "--threshold", threshold) == found


def test_the_same_bytes_are_identical(rich, run):
    Path("query.jpg").write_bytes((rich / "3.png").read_bytes())
    assert (matches(run)[0]["label"], matches(run)[0]["identical"]) == ("identical", True)
    assert [match["label"] for match in matches(run, "--threshold", "identical")] == ["identical"]


def test_no_copy_is_an_answer(rich, run):
    draw_rich(1000).save("query.jpg")
    assert "no copy found" in run("query.jpg", "--model", "offline").stdout.splitlines()[0]
    assert "no copy found" in Path("results.html").read_text()


def test_a_copy_stands_above_a_look_alike_that_scores_more(rich, run, monkeypatch):
    paths = [match["path"] for match in matches(run)]
    region = main.Region([(0, 0)] * 4, [(0, 0)] * 4, 20, 1.0)
    last = main.read_local(paths[-1], main.content_hash(io.BytesIO(Path(paths[-1]).read_bytes())))
    monkeypatch.setattr(main, "align", lambda query, match: region if match is last else None)
    found = matches(run)
    assert found[0]["path"] == paths[-1] and found[0]["label"] == "copy" and found[0]["score"] < found[1]["score"]
    assert [match["path"] for match in found[1:]] == paths[:-1]
    for k in range(1, 8):
        assert matches(run, "-k", k) == found[:k]


@pytest.mark.parametrize("spoil", [
    os.remove,
    lambda path: Path(path).write_bytes(b"gone"),
    pytest.param(lambda path: os.chmod(path, 0), marks=pytest.mark.skipif(os.geteuid() == 0, reason="root reads all")),
], ids=["gone", "changed", "forbidden"])  # fmt: skip
def test_a_candidate_that_cannot_be_read_is_unverified_and_no_error(spoil, rich):
    path, read = str(rich / "3.png"), main.read_local.__wrapped__  # that remembers nothing
    digest = main.content_hash(io.BytesIO(Path(path).read_bytes()))
    assert read(path, digest) is not None and read(path, b"other") is None
    spoil(path)
    assert read(path, digest) is None


def test_pictures_without_structure_are_copies_by_their_bytes_alone(tmp_path, run):
    (tmp_path / IMAGES).mkdir()
    gradient = Image.linear_gradient("L").resize((300, 200))
    for number, image in enumerate((gradient, gradient.rotate(90), Image.new("RGB", (300, 200), "teal"))):
        image.save(tmp_path / IMAGES / f"{number}.png")
    gradient.resize((150, 100)).save("query.jpg")
    assert {match["label"] for match in matches(run)} == {""}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> main.Engine:
    """Over ten pictures with structure."""
    (root := tmp_path_factory.mktemp("edits") / "images").mkdir()
    for seed in range(10):
        draw_rich(seed).save(root / f"{seed}.png")
    return main.initialize_reverse_image_search(root, root.parent / "index", model=main.load_model("offline"))


@pytest.mark.parametrize("edit", EDITS)
def test_each_edit_is_found_and_called_a_copy(edit, engine):
    EDITS[edit](draw_rich(4)).save("query.png")
    (answer,) = main.search("query.png", engine, k=3)
    first, *others = answer.matches
    assert (Path(first.path).name, first.label, {match.label for match in others}) == ("4.png", "copy", {""})


def set_in(image: Image.Image) -> Image.Image:
    canvas = draw_rich(1000, (800, 600))
    canvas.paste(image.resize((400, 300)), (250, 150))
    return canvas


REGIONS = {  # where the corners of a copy lie in the match, and how much of the match it covers
    "mirrored": (ImageOps.mirror, [(480, 0), (0, 0), (0, 360), (480, 360)], 1),
    "turned": (EDITS["rotate 90°"], [(480, 0), (480, 360), (0, 360), (0, 0)], 1),
    "both": (lambda it: it.transpose(Image.Transpose.TRANSVERSE), [(480, 360), (480, 0), (0, 0), (0, 360)], 1),
    "cut out": (lambda it: it.crop((48, 36, 384, 288)), [(48, 36), (384, 36), (384, 288), (48, 288)], 0.49),
    "set in": (set_in, [(250, 150), (650, 150), (650, 450), (250, 450)], 1),  # of the match in the query
}


@pytest.mark.parametrize("edit", REGIONS)
def test_a_copy_tells_where_the_corners_of_each_lie_in_the_other(edit, engine):
    """In the order of the query."""
    make, expected, covers = REGIONS[edit]
    make(draw_rich(4)).save("query.png")
    (answer,) = main.search("query.png", engine, k=1)
    region = answer.matches[0].region
    assert region.points >= main.AGREEING and region.covers == pytest.approx(covers, abs=0.12)
    assert np.abs(np.array(region.outline if edit == "set in" else region.corners) - expected).max() < 5


def before_a_backdrop(item: int, share: float, backdrop: int = 1) -> Image.Image:
    image = draw_rich(backdrop)
    width, height = round(share**0.5 * image.width), round(share**0.5 * image.height)
    image.paste(draw_rich(item, (width, height)), ((image.width - width) // 2, (image.height - height) // 2))
    return image


def form(seed: int) -> Image.Image:
    image, chance = Image.new("RGB", (480, 640), "white"), random.Random(seed)
    canvas, small, large = ImageDraw.Draw(image), ImageFont.load_default(size=13), ImageFont.load_default(size=22)
    for i, label in enumerate(("Surname", "First name", "Date of birth", "Street", "City", "Country", "Signature")):
        canvas.text((30, 70 + 75 * i), label, "black", small)
        canvas.rectangle((30, 88 + 75 * i, 450, 116 + 75 * i), outline="black")
        written = "".join(chance.choice("abcdefghiklmnoprstuvwz ") for _ in range(chance.randint(8, 30)))
        canvas.text((40, 90 + 75 * i), written, "navy", large)
    return image


def aligned(query: Image.Image, match: Image.Image) -> main.Region | None:
    return main.align(main.local_features(query, main.QUERY_AREA, main.QUERY_POINTS), main.local_features(match))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(before_a_backdrop(2, 0.45), before_a_backdrop(3, 0.45), id="two products before one backdrop"),
        pytest.param(app(draw_rich(1)), app(draw_rich(2)), id="two screenshots of one app"),
        pytest.param(form(1), form(2), id="two scans of one form"),
        pytest.param(before_a_backdrop(9, 0.06, 1), before_a_backdrop(9, 0.06, 2), id="two pictures with one logo"),
    ],
)
def test_a_shared_part_makes_no_copy(one, other):
    assert aligned(one, other) is None and aligned(other, one) is None


def test_of_a_burst_covers_tells_how_much_is_the_same():
    """The nearer half of the scene has moved: by a little it is nearly the same picture, by more it is less of it."""
    scene, moved = draw_rich(1), []
    for shift in (0, 6, 20):
        frame = scene.copy()
        frame.paste(draw_rich(500, (200, 240)), (120 + shift, 100))
        moved.append(frame)
    little, more = (aligned(frame, moved[0]) for frame in moved[1:])
    assert little is not None and little.covers > 0.85
    assert more is None or more.covers < 0.75


def shirt_on_a_cloth(shirt: int, spots: int) -> Image.Image:
    chance = np.random.default_rng(0)
    cloth = Image.fromarray(chance.integers(0, 256, (5, 4), np.uint8)).resize((360, 480), Image.Resampling.BICUBIC)
    for x, y, radius in chance.uniform((10, 10, 4), (350, 470, 9), (spots, 3)):
        box = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(cloth).ellipse(box, fill=0 if radius < 6.5 else 255)
    cloth = cloth.convert("RGB")
    cloth.paste(draw_rich(shirt).resize((200, 280)), (80, 100))
    return cloth


@pytest.mark.parametrize(("spots", "is_copy"), [(30, False), (90, True)])
def test_where_much_differs_many_points_must_agree(spots, is_copy):
    """About 0.65 of the cells agree, those of the cloth."""
    assert (aligned(shirt_on_a_cloth(6, spots), shirt_on_a_cloth(8, spots)) is not None) == is_copy


PLANE = np.random.default_rng(0).uniform(0, 300, (40, 2)) @ [1, 1j]
EVERY = np.ones(40, bool)


@pytest.mark.parametrize(
    "there",
    [
        pytest.param(0 * PLANE + 5, id="all on one spot"),
        pytest.param(PLANE.real + 0j, id="all on one line"),
        pytest.param(0.1 * PLANE, id="too small"),
        pytest.param(8 * PLANE, id="too large"),
        pytest.param(PLANE.real + 0.3j * PLANE.imag, id="far from a similarity"),
        pytest.param(np.repeat(PLANE[:8], 5), id="few places, many points"),
    ],
)
def test_a_degenerate_transform_has_no_points(there):
    assert main.fitted(PLANE, there, EVERY)[0] == 0 and main.fitted(there, PLANE, EVERY)[0] == 0


@pytest.mark.parametrize("kind", ["one point", "two points", "all points on one spot"])
def test_points_at_too_few_places_make_no_copy(kind):
    """The recipe of counting inliers alone says yes to many pairs of which one has all its points on one spot."""
    rich = main.local_features(draw_rich(1))
    count = {"one point": 1, "two points": 2}.get(kind)
    few = rich._replace(**{name: getattr(rich, name)[:count] for name in ("places", "frames", "descriptors")})
    if count is None:
        few = rich._replace(places=np.full_like(rich.places, 100 + 100j), frames=rich.frames * 0.01)
    assert main.align(few, rich) is main.align(rich, few) is main.align(few, few) is None


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (17, 17)])
def test_a_picture_without_points_costs_nothing_and_is_no_copy(size):
    plain, rich = main.local_features(Image.new("RGB", size, "teal")), main.local_features(draw_rich(1))
    assert len(plain.places) == 0 and plain.size == size
    assert main.align(plain, plain) is main.align(plain, rich) is main.align(rich, plain) is None


def test_local_features_are_those_of_the_upright_picture():
    upright, exif = draw_rich(1), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save("turned.jpg", exif=exif, quality=95)
    found = main.local_features(Image.open("turned.jpg"))
    assert found.size == upright.size and found.grey.shape == main.local_features(upright).grey.shape


def test_the_candidates_are_the_same_contents_whatever_k_is(rich, run, monkeypatch):
    """The best content is there in many files; others are aligned with the query all the same."""
    monkeypatch.setattr(main, "CANDIDATES", 3)
    best = matches(run)[0]["path"]
    for number in range(5):
        (rich / f"again {number}.png").write_bytes(Path(best).read_bytes())
    asked: list[set[tuple[int, int]]] = []
    align = main.align
    monkeypatch.setattr(main, "align", lambda query, match: asked[-1].add(id(match)) or align(query, match))
    for k in (1, 2, 9, 30):
        asked.append(set())
        matches(run, "-k", k)
    assert len(asked[0]) == 3 and asked[0] == asked[1] == asked[2] == asked[3]


def test_a_copy_is_called_mirrored_only_if_it_is(run, tmp_path):
    """A mirrored view of a part may score most by chance; the alignment tells."""
    (tmp_path / "bulk_images").mkdir()
    picture = draw_rich(5)
    even = Image.blend(picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 0.45)
    even.save("bulk_images/even.png")
    for name, query in (("as it is", even), ("mirrored", even.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
        query.crop((0, 0, 260, 360)).save("part.png")
        (line,) = run("--model", "offline", "--json", "-q", "--no-report", "part.png").stdout.splitlines()
        (match,) = json.loads(line)["matches"]
        assert match["label"] == "copy" and ("mirrored" in match["view"]) == (name == "mirrored")


UNDONE = {
    "": lambda image: image,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned 90°": lambda image: image.transpose(Image.Transpose.ROTATE_270),  # clockwise
    "turned 180°": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "turned 270°": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "mirrored, turned 180°": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "part": lambda image: image.crop((30, 20, 30 + 160, 20 + 120)),
    "inverted": lambda image: image.point([255 - value for value in range(256)] * 3),
    "turned 20°": lambda image: image.rotate(-20, Image.Resampling.BICUBIC),
    "part of the query": collage,
}
LEAST = {"part": 0.5, "turned 20°": 0.6, "part of the query": 0.6}  # scores


@pytest.fixture
def twelve(tmp_path) -> None:
    (tmp_path / IMAGES).mkdir()
    for seed in range(12):
        draw(seed, SIZE).save(tmp_path / IMAGES / f"{seed}.png")


@pytest.mark.parametrize("edit", UNDONE, ids=lambda edit: edit or "none")
def test_an_edited_copy_is_found_and_its_edit_named(run, twelve, edit):
    for seed in (3, 7):
        UNDONE[edit](draw(seed, SIZE)).save("query.png")
        best, second, *_ = matches(run, query="query.png")
        assert (best["path"], best["view"]) == (f"bulk_images/{seed}.png", edit)
        assert best["score"] > LEAST.get(edit, 0.9) and best["score"] > second["score"]


def test_a_query_without_any_edit_keeps_the_score_it_had(run, twelve):
    draw(4, SIZE).save("query.png")
    with_views, without = (matches(run, "--views", views, query="query.png")[0] for views in ("all", "none"))
    assert with_views == without and without["view"] == ""


def test_an_edit_is_not_undone_without_views(run, twelve):
    draw(4, SIZE).transpose(Image.Transpose.ROTATE_90).save("query.png")
    (best, *others), auto, every = (matches(run, "--views", views, query="query.png") for views in main.VIEWS)
    assert best["score"] < 0.5 and {match["view"] for match in (best, *others)} == {""}
    for found in (auto[0], every[0]):
        assert found["score"] > 0.9 and (found["path"], found["view"]) == ("bulk_images/4.png", "turned 270°")


def test_a_network_looks_at_few_views_of_its_own_accord():
    model = main.Model("resnet18", "resnet18", 64, 4, "cpu", lambda pixels: pixels.float().mean((2, 3)))

    def names(size, views):
        return main.features_of_views(main.query_views(draw(1, size), model, views), model)[0]

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
    least = 0.4 if place == (120, 90) else 0.8  # the middle lies between two parts
    query = draw(1000, (480, 360))
    query.paste(draw(3, SIZE), place)
    query.save("query.png")
    best = matches(run, query="query.png")[0]
    assert (best["path"], best["view"]) == ("bulk_images/3.png", "part of the query") and best["score"] > least
