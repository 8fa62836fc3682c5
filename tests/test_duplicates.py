"""--duplicates: the same picture, kept more than once."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cache_folder, draw_rich
from conftest import edit as edit_database
from PIL import Image, ImageOps

import main

IMAGES = Path("bulk_images")


def printed(run, *args: object) -> list[dict[str, Any]]:
    outcome = run("--model", "offline", "-q", "--no-report", "--json", "--duplicates", *args)
    assert outcome.status == 0, outcome
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def groups(run, *args: object) -> list[tuple[str, list[str]]]:
    """Keeper and copies, by name, of each group."""
    found = printed(run, *args)
    return [(Path(group["keep"]).name, [Path(match["path"]).name for match in group["matches"]]) for group in found]


@pytest.fixture
def pictures(collection: Callable[[int], Path]) -> Path:
    """12 pictures; 3.png there twice, and one, 5, also smaller, in JPEG and in PNG."""
    root = collection(12)
    shutil.copy(root / "3.png", root / "3 again.png")
    (root / "5.png").unlink()
    draw_rich(5).save(root / "5 large.png")
    draw_rich(5).resize((400, 300)).save(root / "5.png")
    draw_rich(5).resize((320, 240)).save(root / "5 small.jpg", quality=60)
    return root


def test_identical_files_and_copies_are_found_the_largest_is_kept_and_no_file_is_touched(pictures, run):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in pictures.iterdir()}
    assert groups(run) == [("5 large.png", ["5.png", "5 small.jpg"]), ("3 again.png", ["3.png"])]
    assert groups(run, "identical") == [("3 again.png", ["3.png"])]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in pictures.iterdir()} == before


def test_a_collection_without_any(collection, run):
    collection(5)
    outcome = run("--model", "offline", "--duplicates")
    assert (outcome.status, outcome.stdout) == (0, "") and "No picture is there twice" in outcome.stderr
    assert "No picture is there twice" in Path("results.html").read_text()


def test_a_link_is_no_copy_of_its_target(pictures, run):
    """Whoever deletes the target because of it has lost the picture."""
    (pictures / "0 link.png").symlink_to("3.png")
    os.link(pictures / "7.png", pictures / "7 hard.png")
    (pictures / "folder").symlink_to(".")
    assert groups(run, "identical") == [("3 again.png", ["3.png"])]


def test_files_that_are_gone_are_no_copies_even_if_they_go_meanwhile(pictures, run):
    groups(run)
    (pictures / "3.png").unlink()
    engine = main.initialize_reverse_image_search(IMAGES, model=main.load_model("offline"))
    (pictures / "5 large.png").unlink()
    assert [(Path(group.keep).name, len(group.matches)) for group in main.find_duplicates(engine)] == [("5.png", 1)]


def test_it_does_not_depend_on_the_order_in_which_files_came(pictures, run, tmp_path):
    expected = groups(run, 0.5)
    (later := tmp_path / "later").mkdir()
    for path in sorted(pictures.iterdir())[::2]:
        path.rename(later / path.name)
    groups(run, "--index-dir", "other")
    for path in later.iterdir():
        path.rename(pictures / path.name)
    assert groups(run, 0.5, "--index-dir", "other") == expected


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "same picture": lambda image: image.resize((300, 225)).convert("L"),
    "mirrored": ImageOps.mirror,
    "inverted": ImageOps.invert,
    "turned 90°": lambda image: image.transpose(Image.Transpose.ROTATE_270),  # clockwise
    "crop, 60 %": lambda image: image.crop((60, 40, 60 + 372, 40 + 279)),
    "within a larger picture, 64 % of it": lambda image: ImageOps.expand(image, (60, 45), "white"),
}


def test_each_file_is_told_what_it_is_to_the_one_to_keep(collection, run):
    root = collection(5)
    for seed, (name, edit) in enumerate(EDITS.items(), 100):
        draw_rich(seed).save(root / f"{name}.png")
        edit(draw_rich(seed)).resize((240, 180) if "turned" not in name else (180, 240)).save(root / f"{name}.jpg")
    found = {Path(group["keep"]).name: group["matches"] for group in printed(run)}
    assert set(found) == {f"{name}.png" for name in EDITS}
    for name in EDITS:
        (match,) = found[f"{name}.png"]
        assert (Path(match["path"]).name, match["label"]) == (f"{name}.jpg", "copy")
        assert re.fullmatch(re.sub(r"\d0 %|64 %", r"(5|6)\\d %", name), match["view"]), match
        region = match["region"]  # of the one to keep, as if it were the query
        assert region["covers"] == pytest.approx(0.64 if "within" in name else 1, abs=0.05)
        (left, top), (right, bottom) = np.min(region["corners"], 0), np.max(region["corners"], 0)
        if name in ("mirrored", "inverted", "same picture"):
            assert np.abs(np.array([left, top, right, bottom]) - (0, 0, 240, 180)).max() < 3


def test_many_identical_files_hide_no_copy(collection, run):
    root = collection(3)
    draw_rich(5).save(root / "best.png")
    for number in range(15):
        shutil.copy(root / "best.png", root / f"same {number}.png")
    draw_rich(5).resize((320, 240)).save(root / "small.jpg")
    ((keep, others),) = groups(run)
    assert keep == "best.png" and len(others) == 16 and others[-1] == "small.jpg"


def test_a_larger_file_of_fewer_pixels_is_not_the_one_to_keep(collection, run):
    root = collection(2)
    draw_rich(7).save(root / "large.jpg", quality=30)
    draw_rich(7).resize((400, 300)).save(root / "small.bmp")
    assert (root / "small.bmp").stat().st_size > (root / "large.jpg").stat().st_size
    assert groups(run) == [("large.jpg", ["small.bmp"])]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_pairs_by_score_are_those_of_brute_force(threshold, collection):
    collection(30)
    engine = main.initialize_reverse_image_search(IMAGES, model=main.load_model("offline"))
    xb = np.concatenate([x for _, x in engine.store.blocks()]).astype(np.float32)
    expected = {(i, j) for i, j in zip(*np.nonzero(xb @ xb.T >= threshold - 0.0005)) if i != j}
    rows = {digest: row for row, digest in engine.store.db.execute("SELECT row - 1, digest FROM features")}
    found = {(rows[a], rows[b]): match.score for a, b, match in main.pairs_by_score(engine, threshold)}
    assert set(found) == expected
    assert all(score == pytest.approx(float(xb[i] @ xb[j]), abs=1e-4) for (i, j), score in found.items())


def test_look_alikes_do_not_chain(collection):
    """Each is like the next, as frames of a film are; the first and the last are not alike."""
    collection(7)
    engine = main.initialize_reverse_image_search(IMAGES, model=main.load_model("offline"))
    digests = [digest for (digest,) in engine.store.db.execute("SELECT digest FROM files ORDER BY path")]
    pairs: dict[bytes, dict[bytes, main.Match]] = {}
    for one, other in itertools.pairwise(digests):
        pairs.setdefault(one, {})[other] = main.Match(0, "", 0.97, False)
        pairs.setdefault(other, {})[one] = main.Match(0, "", 0.97, False)
    groups = list(main.grouped(engine, pairs))
    assert sum(1 + len(group.matches) for group in groups) <= 7 and all(len(group.matches) <= 2 for group in groups)


def test_damage_is_one_line_and_is_repaired_by_the_next_run(pictures, run):
    expected = groups(run)
    engine = main.initialize_reverse_image_search(IMAGES, model=main.load_model("offline"))
    with engine.store.db:
        engine.store.db.execute("UPDATE features SET checksum = checksum + 1 WHERE row = 3")
    with pytest.raises(main.DeepVisionError, match=r"do not match their checksums.*repair"):
        list(main.find_duplicates(engine, 0.9))
    assert groups(run) == expected


def test_as_text_and_as_a_page(pictures, run):
    outcome = run("--model", "offline", "--duplicates")
    first, *_, fourth, fifth = lines = outcome.stdout.splitlines()
    assert len(lines) == 5 and first == "bulk_images/5 large.png  (keep: the best of 3)"
    assert fourth == "bulk_images/3 again.png  (keep: the best of 2)"
    assert fifth == "  1   1.000  bulk_images/3.png  identical"
    assert "2 groups\nresults.html\n" in outcome.stderr
    page = Path("results.html").read_text()
    assert page.count('<section class="group') == 2
    assert re.findall(r'<li class="(\w*)"', page) == ["keep", "copy", "copy", "keep", "identical"]
    assert page.count("keep: the best of") == 2 and "480 × 360 px" in page


def test_as_json(pictures, run):
    match = {"rank": 1, "path": "bulk_images/3.png", "score": 1, "identical": True, "label": "identical", "view": ""}
    match |= {"region": None, "lost": None, "truncated": False}
    assert printed(run, "identical") == [{"keep": "bulk_images/3 again.png", "model": "offline", "matches": [match]}]


def test_as_paths_the_files_to_keep_are_not_among_them(pictures, run):
    outcome = run("--model", "offline", "-q", "-0", "--duplicates")
    assert outcome.stdout.split("\0") == ["bulk_images/5.png", "bulk_images/5 small.jpg", "bulk_images/3.png", ""]


def test_paths_to_delete_are_those_with_which_nothing_is_lost(pictures, run):
    """A crop that was enlarged, a caption, and a look-alike by score are shown, with what would be lost, and stay."""
    draw_rich(5).crop((0, 0, 300, 225)).resize((800, 600)).save(pictures / "5 crop.png")
    altered = draw_rich(5)
    altered.paste("gold", (300, 200, 380, 260))
    altered.save(pictures / "5 altered.png")
    gone = run("--model", "offline", "-q", "-0", "--duplicates", "variant").stdout
    assert gone.split("\0") == ["bulk_images/5.png", "bulk_images/5 small.jpg", "bulk_images/3.png", ""]
    groups = printed(run, "variant")
    (of_five,) = (group["matches"] for group in groups if Path(group["keep"]).name == "5 large.png")
    lost = {Path(match["path"]).name: (match["label"], match["lost"]) for match in of_five}
    assert lost["5.png"] == lost["5 small.jpg"] == ("copy", None)
    assert lost["5 crop.png"] == ("copy", "resolution")
    label, words = lost["5 altered.png"]
    assert label == "variant" and "what differs" in words
    text = run("--model", "offline", "-q", "--no-report", "--duplicates", "variant").stdout
    assert "lost with it: resolution" in text and "lost with it: what differs" in text
    assert run("--model", "offline", "-q", "-0", "--duplicates", 0.9).stdout.split("\0") == ["bulk_images/3.png", ""]


def test_a_region_leads_from_the_file_to_keep_to_the_other(collection, run):
    """So `corners` and `differs` are in pixels of the match, as those of a search are."""
    root = collection(2)
    draw_rich(7).save(root / "whole.png")
    draw_rich(7).crop((60, 40, 60 + 372, 40 + 279)).save(root / "part.png")
    (group,) = printed(run)
    region, name = group["matches"][0]["region"], Path(group["keep"]).name
    assert (name, region["covers"]) == ("whole.png", pytest.approx(1, abs=0.02))
    assert region["corners"][0] == pytest.approx((-60, -40), abs=2)
    assert region["outline"][0] == pytest.approx((60, 40), abs=2)


# ---- What is stored of pairs -----------------------------------------------------------------------------------------


@pytest.fixture
def three_sizes(collection: Callable[[int], Path]) -> Path:
    """One picture in three sizes, among five others."""
    root = collection(5)
    draw_rich(7).save(root / "a.png")
    for name, size in (("b.png", (400, 300)), ("c.jpg", (320, 240))):
        draw_rich(7).resize(size).save(root / name)
    return root


def test_two_copies_of_a_file_that_has_gone_are_found(three_sizes, run):
    assert groups(run) == [("a.png", ["b.png", "c.jpg"])]
    (three_sizes / "a.png").unlink()
    assert groups(run) == [("b.png", ["c.jpg"])]


def test_pictures_that_were_left_out_or_gone_meanwhile_are_paired_when_they_are_back(three_sizes, run):
    run("--model", "offline", "--index-only")
    assert groups(run, "--exclude", "b.png", "--exclude", "c.jpg") == []
    assert groups(run) == [("a.png", ["b.png", "c.jpg"])]


def test_what_could_not_be_looked_up_is_looked_up_later(three_sizes, run, monkeypatch):
    monkeypatch.setattr(main, "LATER", 2)
    run("--model", "offline", "--index-only")
    (copies,) = Path("image_index").glob("*/copies.faiss")
    copies.unlink()
    assert groups(run, "--no-update") == []  # there is no index of points to look them up in
    assert groups(run) == [("a.png", ["b.png", "c.jpg"])]


def test_a_stop_loses_no_comparison_and_no_look_up(three_sizes, run, monkeypatch):
    real, compared = main.examined, list[Any]()

    def stopped(*args: Any) -> Any:
        compared.append(args)
        if len(compared) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(main, "usable_cores", lambda: 1)
    monkeypatch.setattr(main, "examined", stopped)
    assert run("--model", "offline", "--duplicates").status == 130
    monkeypatch.setattr(main, "votes", None)  # nothing is looked up again
    assert groups(run) == [("a.png", ["b.png", "c.jpg"])]
    assert len({frozenset(args[:2]) for args in compared}) + 1 == len(compared)  # the interrupted one comes again


@pytest.mark.parametrize(
    "change", ["UPDATE verdicts SET verdict = 'null'", "UPDATE meta SET value = 0 WHERE key = 'judgement'"]
)
def test_verdicts_that_are_damaged_or_of_another_version_are_found_anew(three_sizes, run, change):
    assert groups(run) == [("a.png", ["b.png", "c.jpg"])]
    edit_database(cache_folder() / "index.sqlite", change)
    assert groups(run) == [("a.png", ["b.png", "c.jpg"])]
    assert groups(run, "--no-update") == [("a.png", ["b.png", "c.jpg"])]


def test_a_file_that_could_not_be_read_for_a_moment_is_compared_when_it_can(three_sizes, run):
    engine = main.initialize_reverse_image_search(model=main.load_model("offline"))
    content = (three_sizes / "b.png").read_bytes()
    info = os.stat(three_sizes / "b.png")
    (three_sizes / "b.png").write_bytes(bytes(len(content)))
    os.utime(three_sizes / "b.png", ns=(info.st_atime_ns, info.st_mtime_ns))
    assert [len(group.matches) for group in main.find_duplicates(engine)] == [1]
    (three_sizes / "b.png").write_bytes(content)
    os.utime(three_sizes / "b.png", ns=(info.st_atime_ns, info.st_mtime_ns))
    assert [len(group.matches) for group in main.find_duplicates(engine)] == [2]
