"""Sections Points, Verdicts and Search: how an edited copy is found, what a match is called, and the order."""

import io
import itertools
import json
import os
import random
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw, draw_rich
from evaluate import EDITS, app, collage
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

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
    assert set(first["region"]) == {"corners", "outline", "points", "covers", "inverted", "differing", "differs"}
    assert (first["region"]["differing"], first["region"]["differs"]) == (0, [])
    assert len(others) == 7 and {(match["label"], match["region"]) for match in others} == {("", None)}
    for threshold, found in (("copy", [first]), ("0.9", [first]), ("identical", [])):
        assert matches(run, "--threshold", threshold) == found


def test_the_same_bytes_are_identical(rich, run):
    Path("query.jpg").write_bytes((rich / "3.png").read_bytes())
    assert (matches(run)[0]["label"], matches(run)[0]["identical"]) == ("identical", True)
    assert [match["label"] for match in matches(run, "--threshold", "identical")] == ["identical"]


def test_a_part_of_a_file_is_found_in_another_file_with_the_same_bytes(rich, run):
    (rich / "again.png").write_bytes((rich / "3.png").read_bytes())
    first, *others = matches(run, "--crop", "40,40,200,300", query="bulk_images/3.png")
    assert (first["path"], first["label"]) == ("bulk_images/again.png", "copy") and first["region"]["covers"] < 0.3
    assert "bulk_images/3.png" not in {match["path"] for match in others}


def test_no_copy_is_an_answer(rich, run):
    draw_rich(1000).save("query.jpg")
    assert "no copy found" in run("query.jpg", "--model", "offline").stdout.splitlines()[0]
    assert "no copy found" in Path("results.html").read_text()


def test_a_copy_stands_above_a_look_alike_that_scores_more(rich, run):
    query = draw_rich(1000, (800, 600))
    query.filter(ImageFilter.GaussianBlur(60)).resize((80, 60)).save(rich / "look-alike.png")
    query.paste(draw_rich(3, (240, 180)), (500, 380))
    query.save("query.jpg")
    found = matches(run)
    assert [(match["path"], match["label"]) for match in found[:2]] == [
        ("bulk_images/3.png", "copy"), ("bulk_images/look-alike.png", "")
    ]  # fmt: skip
    assert found[0]["score"] < found[1]["score"]
    for k in range(1, 9):
        assert matches(run, "-k", k) == found[:k]


def test_a_variant_stands_between_copies_and_look_alikes_and_tells_where_it_differs(rich, run):
    altered = draw_rich(3)
    ImageDraw.Draw(altered).rectangle((300, 200, 380, 260), "gold", "black", 6)
    altered.save(rich / "altered.png")
    same, other, *rest = matches(run)
    assert [(it["path"], it["label"]) for it in (same, other)] == [
        ("bulk_images/3.png", "copy"), ("bulk_images/altered.png", "variant")
    ]  # fmt: skip
    assert {it["label"] for it in rest} == {""}
    assert 0.01 < other["region"]["differing"] < 0.08
    left, top, right, bottom = np.array(other["region"]["differs"]).reshape(-1, 4).T
    assert 280 < left.min() < 310 and 180 < top.min() < 210 and 370 < right.max() < 400 and 250 < bottom.max() < 280
    (rich / "3.png").unlink()
    outcome = run("query.jpg", "--model", "offline", "-q", "-k", 1)
    heading, line = outcome.stdout.splitlines()
    assert heading.endswith("no copy found, 1 variant")
    assert re.fullmatch(r"  1  +0\.9\d\d  bulk_images/altered.png  variant, differs \d %, covers 100 %", line)
    for threshold, count in (("variant", 1), ("copy", 0), ("identical", 0)):
        assert len(matches(run, "--threshold", threshold)) == count


@pytest.mark.parametrize("spoil", [
    os.remove,
    lambda path: Path(path).write_bytes(b"gone"),
    pytest.param(lambda path: os.chmod(path, 0), marks=pytest.mark.skipif(os.geteuid() == 0, reason="root reads all")),
], ids=["gone", "changed", "forbidden"])  # fmt: skip
def test_a_candidate_that_cannot_be_read_is_unverified_and_no_error(spoil, rich):
    path, read = str(rich / "3.png"), main.read_shown.__wrapped__  # that remembers nothing
    digest = main.content_hash(io.BytesIO(Path(path).read_bytes()))
    assert read(path, digest).size == draw_rich(3).size
    with pytest.raises(OSError):
        read(path, b"other")
    spoil(path)
    with pytest.raises(OSError):
        read(path, digest)


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


VARIANTS = {"meme", "stickers"}  # parts of the picture are painted over
# The colours of these drawings are so strong that much of them is cut off at white, and blur takes their thin lines
EITHER = {"colour", "screen", "blur", "64 px"}


@pytest.mark.parametrize("edit", EDITS)
def test_each_edit_is_found_and_called_what_it_is(edit, engine):
    EDITS[edit](draw_rich(4)).save("query.png")
    (answer,) = main.search("query.png", engine, k=3)
    first, *others = answer.matches
    assert (Path(first.path).name, {match.label for match in others}) == ("4.png", {""})
    assert first.label in (("variant",) if edit in VARIANTS else ("copy", "variant")[: 1 + (edit in EITHER)])
    assert (first.label == "variant") == bool(first.region.differing) == bool(first.region.differs)


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
    assert region.points >= main.TELLING and region.covers == pytest.approx(covers, abs=0.12)
    assert np.abs(np.array(region.outline if edit == "set in" else region.corners) - expected).max() < 3


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


def compared(query: Image.Image, match: Image.Image) -> main.Verdict | None:
    return main.compare(main.Shown.of(query), main.Shown.of(match))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(before_a_backdrop(2, 0.45), before_a_backdrop(3, 0.45), id="two products before one backdrop"),
        pytest.param(app(draw_rich(1)), app(draw_rich(2)), id="two screenshots of one app"),
        pytest.param(draw(1000), draw(4), id="two drawings of a few shapes"),
        pytest.param(before_a_backdrop(9, 0.06, 1), before_a_backdrop(9, 0.06, 2), id="two pictures with one logo"),
    ],
)
def test_a_shared_part_makes_no_copy(one, other):
    assert compared(one, other) is None and compared(other, one) is None


def assert_around(boxes: list[Any], left: int, top: int, right: int, bottom: int) -> None:
    """All boxes lie in this one, and there are some."""
    assert len(boxes)
    for box in boxes:
        assert left <= box[0] < box[2] <= right and top <= box[1] < box[3] <= bottom, box


def test_of_a_burst_it_tells_what_has_moved():
    """What stands in front has moved: the scene agrees, and what differs is where that is, before and after."""
    scene, moved = draw_rich(1), []
    for shift in (0, 6, 20):
        frame = scene.copy()
        frame.paste(draw_rich(500, (150, 180)), (150 + shift, 100))
        moved.append(frame)
    little, more = (compared(frame, moved[0]) for frame in moved[1:])
    assert little is not None and little.label == "variant" and 0.02 < little.differs < 0.4
    left, top, right, bottom = little.boxes[1][0]  # the largest
    assert 130 <= left < right <= 326 and 80 <= top < bottom <= 300
    assert more is None or (more.label == "variant" and more.differs > little.differs)


def test_two_scans_of_one_form_are_variants_that_differ_where_something_was_written():
    for found in (compared(form(1), form(2)), compared(form(2), form(1))):
        assert found is not None and found.label == "variant" and 0.02 < found.differs < 0.2
        assert_around(found.boxes[1], 20, 80, 460, 580)


def shirt_on_a_cloth(shirt: int, spots: int) -> Image.Image:
    chance = np.random.default_rng(0)
    cloth = Image.fromarray(chance.integers(0, 256, (5, 4), np.uint8)).resize((360, 480), Image.Resampling.BICUBIC)
    for x, y, radius in chance.uniform((10, 10, 4), (350, 470, 9), (spots, 3)):
        box = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(cloth).ellipse(box, fill=0 if radius < 6.5 else 255)
    cloth = cloth.convert("RGB")
    cloth.paste(draw_rich(shirt).resize((200, 280)), (80, 100))
    return cloth


@pytest.mark.parametrize("spots", [30, 90])
def test_another_shirt_on_the_same_cloth_is_no_copy(spots):
    found = compared(shirt_on_a_cloth(6, spots), shirt_on_a_cloth(8, spots))
    assert found is None or found.label == "variant"


@pytest.mark.parametrize("edit", ["crop+mirror", "aspect", "inset 60 %", "stickers", "negative"])
def test_a_verdict_is_the_same_in_both_directions(edit):
    edited, original = EDITS[edit](draw_rich(6)), draw_rich(6)
    there, back = compared(edited, original), compared(original, edited)
    assert there is not None and back is not None
    assert (there.label, there.differs, there.details) == (back.label, back.differs, back.details)
    assert there.covers == pytest.approx(back.covers[::-1]) and len(there.boxes[0]) == len(back.boxes[1])


PLANE = np.random.default_rng(0).uniform(0, 300, (1, 40, 2)) @ [1, 1j]
EVERY = np.ones((1, 40), bool)


@pytest.mark.parametrize(
    "there",
    [
        pytest.param(0 * PLANE + 5, id="all on one spot"),
        pytest.param(PLANE.real + 0j, id="all on one line"),
        pytest.param(0.05 * PLANE, id="too small"),
        pytest.param(12 * PLANE, id="too large"),
        pytest.param(PLANE.real + 0.3j * PLANE.imag, id="stretched too much"),
        pytest.param(np.repeat(PLANE[:, :8], 5, 1), id="few places, many points"),
    ],
)
def test_a_degenerate_transform_has_no_points(there):
    for q, m in ((PLANE, there), (there, PLANE)):
        assert main.fit(q, m, EVERY)[0] == 0


def test_groups_of_matched_pairs_have_the_same_transforms_alone_and_together():
    random = np.random.default_rng(0)
    sizes = np.array([*random.integers(1, 60, 300), 400, 700])
    turns = np.exp(random.normal(0, 0.3, len(sizes)) + 1j * random.uniform(-3, 3, len(sizes))).repeat(sizes)
    q, m, ratio = random.normal(0, 100, (3, sizes.sum(), 2)) @ (1, 1j)
    ratio = np.where(inlier := random.random(len(q)) < 0.5, turns, ratio / 100)
    m = np.where(inlier, q * turns, m) + random.normal(0, 0.5, (len(q), 2)) @ (1, 1j)
    together, alone = list(main.fits((q, m, ratio), sizes, 2)), []
    for number, start in enumerate(np.cumsum(sizes) - sizes):
        of_one = slice(start, start + sizes[number])
        found = main.fits((q[of_one], m[of_one], ratio[of_one]), sizes[number : number + 1], 2)
        alone += [(number, points, H) for _, points, H in found]
    together.sort(key=lambda it: it[0])
    assert len(alone) > 300 and [it[:2] for it in together] == [it[:2] for it in alone]
    assert np.allclose([it[2] for it in together], [it[2] for it in alone], atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, main.FEWEST - 1])
def test_a_picture_with_few_points_is_no_copy_by_them(count, engine):
    """The recipe of counting inliers alone says yes to many pairs of which one has all its points on one spot."""
    points = main.find_points(draw_rich(1))
    few = main.Points(*(values[:count] for values in points))
    spot = points._replace(places=np.full_like(points.places, 100 + 100j), frames=points.frames * 0.01)
    ids = main.nearest_points(engine.copies, [points, few, spot], main.NEIGHBOURS)
    assert [it and it[0].points > 50 for it in main.votes([points, few, spot], ids)] == [True, [], []]


def test_in_an_index_of_one_picture_all_points_vote_for_it_and_memory_is_bounded():
    random = np.random.default_rng(0)
    q, m, ratio = (random.normal(0, 100, (3, 5000, 2)) @ (1, 1j)) * [[1], [1], [0.01]]
    m[::10], ratio[::10] = q[::10] * 2j + 5, 2j  # a tenth agrees
    tracemalloc.start()
    (_, count, H), *_ = main.fits((q, m, ratio), np.array([5000]), main.PROPOSALS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 100 and np.allclose(H, [(0, -2, 5), (2, 0, 0), (0, 0, 1)], atol=0.5)
    assert peak < 300_000_000  # 5,000 × 5,000 complex numbers are 400 million bytes


def test_a_query_that_is_in_the_collection_is_no_plain_vote_for_itself(engine, monkeypatch):
    """Else what shows a part of it would not be looked for in all sizes."""
    asked, nearest = [], main.nearest_points
    monkeypatch.setattr(main, "nearest_points", lambda index, points, k: asked.append(k) or nearest(index, points, k))
    known, *_ = engine.store.files_with(engine.store.value("SELECT digest FROM points WHERE row = 1"))
    list(main.search(engine.path_of(known.path), engine))
    assert len(asked) >= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (17, 17)])
def test_a_picture_without_points_is_no_copy(size):
    plain, rich = Image.new("RGB", size, "teal"), draw_rich(1)
    points = main.find_points(plain)
    assert len(points.places) == len(points.descriptors) == 0 and main.pack_points(points) == b""
    assert compared(plain, plain) is compared(plain, rich) is compared(rich, plain) is None


def test_what_is_compared_is_the_upright_picture():
    upright, exif = draw_rich(1), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save("turned.jpg", exif=exif, quality=95)
    found = main.Shown.of(Image.open("turned.jpg"))
    assert found.size == found.image.size == upright.size
    assert np.abs(np.asarray(found.image, float) - np.asarray(upright, float)).mean() < 15


def test_the_candidates_are_the_same_contents_whatever_k_is(rich, run, monkeypatch):
    """The best content is there in many files; others are compared with the query all the same."""
    best = matches(run)[0]["path"]
    for number in range(5):
        (rich / f"again {number}.png").write_bytes(Path(best).read_bytes())
    asked: list[set[bytes]] = []
    compare = main.compare.__wrapped__  # that remembers nothing
    monkeypatch.setattr(
        main,
        "compare",
        lambda query, match, hints=(): asked[-1].add(match.image.tobytes()) or compare(query, match, hints),
    )
    for k in (1, 2, 9, 30):
        asked.append(set())
        matches(run, "-k", k)
    assert len(asked[0]) >= main.LOOK_ALIKES and asked[0] == asked[1] == asked[2] == asked[3]


def test_there_is_no_fixed_number_of_copies(rich, run):
    for number in range(13):  # more than are compared at once
        draw_rich(3).resize((300 + 8 * number, 225 + 6 * number)).save(rich / f"copy {number}.jpg")
    labels = [match["label"] for match in matches(run, "-k", 21)]
    assert labels == ["copy"] * 14 + [""] * 7


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


EDITED: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {  # what is said of it, and the edit
    "none": ("", lambda image: image),
    "mirrored": ("mirrored", ImageOps.mirror),
    "90°": ("turned 90°", lambda image: image.transpose(Image.Transpose.ROTATE_270)),  # clockwise
    "180°": ("turned 180°", lambda image: image.transpose(Image.Transpose.ROTATE_180)),
    "270°": ("turned 270°", lambda image: image.transpose(Image.Transpose.ROTATE_90)),
    "upside down": ("mirrored, turned 180°", ImageOps.flip),
    "part": ("", lambda image: image.crop((30, 20, 30 + 160, 20 + 120))),
    "negative": ("inverted", ImageOps.invert),
    "20°": ("turned 20°, part of the query", lambda image: image.rotate(-20, Image.Resampling.BICUBIC)),
    "collage": ("part of the query", collage),
}


@pytest.fixture
def twelve(tmp_path) -> None:
    (tmp_path / IMAGES).mkdir()
    for seed in range(12):
        draw(seed, SIZE).save(tmp_path / IMAGES / f"{seed}.png")


@pytest.mark.parametrize("edit", EDITED)
def test_an_edited_copy_is_found_and_its_edit_named(run, twelve, edit):
    view, make = EDITED[edit]
    for seed in (3, 7):
        make(draw(seed, SIZE)).save("query.png")
        best, *others = matches(run, query="query.png")
        assert (best["path"], best["view"]) == (f"bulk_images/{seed}.png", view)
        assert best["label"] == ("identical" if edit == "none" else "copy")
        assert {(match["label"], match["view"]) for match in others} == {("", "")}


def test_a_query_is_searched_as_it_is_and_as_before_simple_edits():
    image, offline = draw(1, SIZE), main.load_model("offline", device="cpu")
    networks = replace(offline, name="resnet18")
    as_it_is, mirrored = main.query_views(image, networks)
    assert (mirrored == as_it_is.flip(2)).all()
    views = main.query_views(image, offline)
    assert len(views) == len({view.numpy().tobytes() for view in views}) == 9
    for _, make in itertools.islice(EDITED.values(), 6):
        alone = main.query_views(make(image), networks)[:1].float()
        assert (views.float() - alone).abs().mean((1, 2, 3)).min() < 2  # of 255


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (127, 127), (200, 4000)])
def test_a_tiny_or_a_thin_query_is_searched_too(size, engine):
    Image.new("RGB", size, "teal").save("query.png")
    (answer,) = main.search("query.png", engine)
    assert answer.error is None and len(answer.matches) == 10
    assert all(np.isfinite(match.score) and not match.label for match in answer.matches)


@pytest.mark.parametrize("place", [(0, 0), (240, 0), (0, 180), (240, 180), (120, 90)], ids=str)
def test_a_picture_in_a_larger_one_is_found_wherever_it_lies(run, twelve, place):
    query = draw(1000, (480, 360))
    query.paste(draw(3, SIZE), place)
    query.save("query.png")
    best = matches(run, query="query.png")[0]
    assert (best["path"], best["label"], best["view"]) == ("bulk_images/3.png", "copy", "part of the query")
