"""--duplicates: the same picture, kept more than once."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome, draw

import main

Run = Callable[..., Outcome]
IMAGES = Path("bulk_images")


def groups(run: Run, *args: object) -> list[tuple[str, list[str]]]:
    """Keeper and copies, by name, of each group."""
    outcome = run("--model", "offline", "-q", "--no-report", "--json", "--duplicates", *args)
    assert outcome.status == 0, outcome
    found = [json.loads(line) for line in outcome.stdout.splitlines()]
    return [(Path(group["keep"]).name, [Path(match["path"]).name for match in group["matches"]]) for group in found]


@pytest.fixture
def pictures(collection: Callable[[int], Path]) -> Path:
    """12 pictures; 3.png there twice, 5.png also smaller, in JPEG and in PNG."""
    root = collection(12)
    shutil.copy(root / "3.png", root / "3 again.png")
    draw(5, (960, 640)).save(root / "5 large.png")
    draw(5, (960, 640)).resize((480, 320)).save(root / "5.png")
    draw(5, (960, 640)).resize((240, 160)).save(root / "5 small.jpg", quality=50)
    return root


# ---- Which files -----------------------------------------------------------------------------------------------------


def test_identical_files_and_copies_are_found_and_the_largest_is_kept(pictures: Path, run: Run) -> None:
    assert groups(run) == [("5 large.png", ["5.png", "5 small.jpg"]), ("3 again.png", ["3.png"])]
    assert groups(run, "identical") == [("3 again.png", ["3.png"])]


def test_no_file_is_touched(pictures: Path, run: Run) -> None:
    state = lambda: {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in pictures.iterdir()}  # noqa: E731
    before = state()
    groups(run, 0.5)
    assert state() == before


def test_a_collection_without_any(collection: Callable[[int], Path], run: Run) -> None:
    collection(5)
    outcome = run("--model", "offline", "--duplicates")
    assert (outcome.status, outcome.stdout) == (0, "") and "0 groups" in outcome.stderr
    assert "No picture is there twice" in Path("results.html").read_text()


def test_a_link_is_no_copy_of_its_target(pictures: Path, run: Run) -> None:
    """Whoever deletes the target because of it has lost the picture."""
    (pictures / "0 link.png").symlink_to("3.png")
    os.link(pictures / "7.png", pictures / "7 hard.png")
    (pictures / "folder").symlink_to(".")
    assert groups(run, "identical") == [("3 again.png", ["3.png"])]


def test_files_that_are_gone_are_no_copies(pictures: Path, run: Run) -> None:
    groups(run)
    (pictures / "3.png").unlink(), (pictures / "5 large.png").unlink()
    assert groups(run) == [("5.png", ["5 small.jpg"])]


def test_it_does_not_depend_on_the_order_in_which_files_came(pictures: Path, run: Run, tmp_path: Path) -> None:
    expected = groups(run, 0.5)
    (later := tmp_path / "later").mkdir()
    for path in sorted(pictures.iterdir())[::2]:
        path.rename(later / path.name)
    groups(run, "--index-dir", "other")
    for path in later.iterdir():
        path.rename(pictures / path.name)
    assert groups(run, 0.5, "--index-dir", "other") == expected


def test_in_a_large_collection_a_copy_is_what_the_label_says(collection: Callable[[int], Path], run: Run) -> None:
    root = collection(60)
    draw(7).resize((48, 32)).save(root / "seven.png")
    ((keep, copies),) = groups(run)
    assert {keep, *copies} == {"7.png", "seven.png"}
    for threshold, expected in (("copy", {"copy"}), ("-1", {"weak"})):
        outcome = run("--model", "offline", "-q", "--json", "--duplicates", threshold)
        labels = {m["label"] for line in outcome.stdout.splitlines() for m in json.loads(line)["matches"]}
        assert expected <= labels <= expected | {"similar"}


def test_too_few_to_tell_what_is_similar(pictures: Path, run: Run) -> None:
    outcome = run("--model", "offline", "-q", "--duplicates", "similar")
    assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1)
    assert "fewer than 50 images" in outcome.stderr


# ---- Exactly which pairs ---------------------------------------------------------------------------------------------


def catalogue_of(folder: Path, xb: np.ndarray) -> main.Catalogue:
    """A cache that holds just these features."""
    catalogue = main.Catalogue(folder, "none", xb.shape[1])
    catalogue.mend()
    files = [main.File(b"%d" % i, 1, 1) for i in range(len(xb))]
    catalogue.scan(files, False)
    catalogue.save([main.Picture(file, os.urandom(16), None, x) for file, x in zip(files, xb)])
    return catalogue


def greedy(xb: np.ndarray, order: np.ndarray, least: np.ndarray) -> list[int]:
    """Place of the first that each is a copy of, one by one."""
    first = list(range(len(order)))
    x = xb[order].astype(np.float64)
    for i in range(len(order)):
        for j in range(i):
            if first[j] == j and first[i] == i and x[i] @ x[j] >= max(least[i], least[j]):
                first[i] = j
    return first


@pytest.mark.parametrize("seed", range(30))
def test_groups_are_those_of_one_by_one(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    n = random.integers(1, 60)
    xb = random.standard_normal((4, 16))[random.integers(0, 4, n)] + 0.5 * random.standard_normal((n, 16))
    xb = (xb / np.linalg.norm(xb, axis=1, keepdims=True)).astype(np.float16)
    order, least = random.permutation(n), random.uniform(0.6, 0.9, n).astype(np.float32)
    monkeypatch.setattr(main, "BLOCK", int(random.integers(1, 9)))
    first, scores = main.first_alike(catalogue_of(tmp_path, xb), "cpu", np.argsort(order), least)
    assert first.tolist() == greedy(xb, order, least)
    x = xb[order].astype(np.float32)
    copies = first != np.arange(n)
    assert scores[copies] == pytest.approx((x * x[first]).sum(1)[copies], abs=1e-5)


def test_look_alikes_do_not_chain(tmp_path: Path) -> None:
    """Each is like the next by 0.97, as frames of a film are; the first and the last are not alike."""
    angle = np.arccos(0.97) * np.arange(20)
    xb = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float16)
    first, scores = main.first_alike(catalogue_of(tmp_path, xb), "cpu", np.arange(20), np.full(20, 0.95, np.float32))
    assert first.tolist() == [2 * (i // 2) for i in range(20)]
    assert (scores >= 0.95).all()


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def test_damage_is_one_line_and_is_repaired_by_the_next_run(pictures: Path, run: Run) -> None:
    expected = groups(run)
    engine = main.initialize_reverse_image_search(IMAGES, model=main.load_model("offline"))
    with open(engine.catalogue.features, "r+b") as stream:
        stream.seek(1000)
        stream.write(b"\xff" * 50)
    with pytest.raises(main.DeepVisionError, match=r"do not match their checksum.*repaired"):
        list(main.find_duplicates(engine))
    assert groups(run) == expected


def test_another_run_that_prunes_meanwhile_is_said(pictures: Path, run: Run) -> None:
    groups(run)
    engine = main.initialize_reverse_image_search(IMAGES, model=main.load_model("offline"))
    (IMAGES / "5 large.png").unlink()
    run("--model", "offline", "-q", "--index-only", "--prune")
    with pytest.raises(main.DeepVisionError, match="changed by another run"):
        list(main.find_duplicates(engine))


# ---- In which form ---------------------------------------------------------------------------------------------------


def test_as_text(pictures: Path, run: Run) -> None:
    outcome = run("--model", "offline", "--duplicates")
    first, *_, fourth, fifth = lines = outcome.stdout.splitlines()
    assert len(lines) == 5 and first == "bulk_images/5 large.png  (keep: the largest of 3)"
    assert fourth == "bulk_images/3 again.png  (keep: the largest of 2)"
    assert fifth == "  1   1.000  bulk_images/3.png  identical"
    assert "2 groups, 3 files beside those to keep\nresults.html\n" in outcome.stderr


def test_as_json(pictures: Path, run: Run) -> None:
    outcome = run("--model", "offline", "-q", "--json", "--duplicates", "identical")
    match = {"rank": 1, "path": "bulk_images/3.png", "score": 1, "identical": True, "label": "identical", "view": ""}
    assert json.loads(outcome.stdout) == {"keep": "bulk_images/3 again.png", "model": "offline", "matches": [match]}


def test_as_paths_the_files_to_keep_are_not_among_them(pictures: Path, run: Run) -> None:
    outcome = run("--model", "offline", "-q", "-0", "--duplicates")
    assert outcome.stdout.split("\0") == ["bulk_images/5.png", "bulk_images/5 small.jpg", "bulk_images/3.png", ""]


def test_as_a_page(pictures: Path, run: Run) -> None:
    run("--model", "offline", "--duplicates")
    page = Path("results.html").read_text()
    assert page.count("<section>") == 2 and page.count("<img ") == 5
    assert re.findall(r'<span class="tag (\w+)">\1</span>', page) == ["keep", "keep", "identical"]
    assert "960 × 640 px" in page
