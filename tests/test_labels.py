"""Section Search, labels: what a match is called, and in which order matches stand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, draw_rich
from PIL import Image

import main

Run = Callable[..., Outcome]
IMAGES = Path("bulk_images")


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """Eight pictures with structure; query.jpg is one of them, 3.png, made smaller."""
    (tmp_path / IMAGES).mkdir()
    for seed in range(8):
        draw_rich(seed).save(tmp_path / IMAGES / f"{seed}.png")
    draw_rich(3).resize((360, 270)).save("query.jpg", quality=70)
    return IMAGES


def matches(run: Run, *args: object) -> list[dict[str, Any]]:
    outcome = run("query.jpg", "--model", "offline", "--json", "-q", "--no-report", *args)
    assert outcome.status == 0, outcome.stderr
    return json.loads(outcome.stdout)["matches"]


def test_a_copy_is_called_one_and_nothing_else_is(rich: Path, run: Run) -> None:
    first, *others = matches(run)
    assert (first["path"], first["label"], first["identical"]) == ("bulk_images/3.png", "copy", False)
    assert {match["label"] for match in others} == {""} and {
        match["region"] for match in others if not match["label"]
    } == {None}


def test_a_copy_says_where(rich: Path, run: Run) -> None:
    draw_rich(3).crop((48, 36, 48 + 336, 36 + 252)).save("query.jpg")
    region = matches(run)[0]["region"]
    assert set(region) == {"corners", "points", "covers"} and region["points"] >= main.AGREEING
    for (x, y), expected in zip(region["corners"], [(48, 36), (384, 36), (384, 288), (48, 288)]):
        assert (x, y) == (pytest.approx(expected[0], abs=4), pytest.approx(expected[1], abs=4))
    assert region["covers"] == pytest.approx(0.49, abs=0.12)


def test_the_same_bytes_are_identical(rich: Path, run: Run) -> None:
    Path("query.jpg").write_bytes((rich / "3.png").read_bytes())
    assert (matches(run)[0]["label"], matches(run)[0]["identical"]) == ("identical", True)
    assert [match["label"] for match in matches(run, "--threshold", "identical")] == ["identical"]


@pytest.mark.parametrize("value", ["copy", "identical", "0.9"])
def test_the_threshold_takes_a_label_or_a_score(value: str, rich: Path, run: Run) -> None:
    assert len(matches(run, "--threshold", value)) == (value != "identical")


@pytest.mark.parametrize("word", ["similar", "weak", "copies"])
def test_other_words_are_refused_with_the_names_of_the_two(word: str, run: Run) -> None:
    outcome = run("--threshold", word)
    assert outcome.status == 2 and "copy, identical" in outcome.stderr


def test_no_copy_is_an_answer(rich: Path, run: Run) -> None:
    draw_rich(1000).save("query.jpg")
    assert "no copy found" in run("query.jpg", "--model", "offline").stdout.splitlines()[0]
    assert "no copy found" in Path("results.html").read_text()
    assert "no match" in run("query.jpg", "--model", "offline", "--threshold", "copy").stdout


def test_a_copy_stands_above_a_look_alike_that_scores_more(rich: Path, run: Run, monkeypatch: Any) -> None:
    paths = [match["path"] for match in matches(run)]
    region = main.Region([(0, 0)] * 4, [(0, 0)] * 4, 20, 1.0)
    digest = main.content_hash(open(paths[-1], "rb"))  # noqa: SIM115
    last = main.read_local(paths[-1], digest)
    monkeypatch.setattr(main, "align", lambda query, match: region if match is last else None)
    found = matches(run)
    assert found[0]["path"] == paths[-1] and found[0]["label"] == "copy" and found[0]["score"] < found[1]["score"]
    assert [match["path"] for match in found[1:]] == paths[:-1]
    for k in range(1, 8):
        assert matches(run, "-k", k) == found[:k]


@pytest.mark.parametrize(
    "spoil", [os.remove, lambda path: Path(path).write_bytes(b"gone"), lambda path: os.chmod(path, 0)]
)
def test_a_candidate_that_cannot_be_read_is_unverified_and_no_error(spoil: Callable[[str], Any], rich: Path) -> None:
    path = str(rich / "3.png")
    (digest,) = (main.content_hash(open(path, "rb")),)  # noqa: SIM115
    assert main.read_local.__wrapped__(path, digest) is not None
    assert main.read_local.__wrapped__(path, b"other") is None
    spoil(path)
    if os.path.exists(path) and os.access(path, os.R_OK) and Path(path).stat().st_size > 10:
        pytest.skip("root reads everything")
    assert main.read_local.__wrapped__(path, digest) is None


def test_pictures_without_structure_are_copies_by_their_bytes_alone(tmp_path: Path, run: Run) -> None:
    (tmp_path / IMAGES).mkdir()
    gradient = Image.linear_gradient("L").resize((300, 200))
    for number, image in enumerate((gradient, gradient.rotate(90), Image.new("RGB", (300, 200), "teal"))):
        image.save(tmp_path / IMAGES / f"{number}.png")
    gradient.resize((150, 100)).save("query.jpg")
    assert {match["label"] for match in matches(run)} == {""}
    gradient.save("query.png")
    assert main.local_features(Image.new("L", (1, 1))).places.shape == (0,)
    assert main.local_features(Image.new("L", (1, 20000))).places.shape == (0,)
