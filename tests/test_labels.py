"""Section Index and search, labels: how surprising a score is in this collection."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import draw

import main

DIM, N = 24, 600


def vectors(n: int, seed: int = 0) -> np.ndarray:
    """Unrelated images, with a direction in common, so that their cosines are above 0 as those of features are."""
    xb = np.random.default_rng(seed).standard_normal((n, DIM)) + 0.5
    return (xb / np.linalg.norm(xb, axis=1, keepdims=True)).astype(np.float32)


def near(xb: np.ndarray, cosine: float, seed: int = 1) -> np.ndarray:
    """A vector of about that cosine with each of xb."""
    noise = np.random.default_rng(seed).standard_normal(xb.shape)
    noise -= (noise * xb).sum(1, keepdims=True) * xb
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return (cosine * xb + np.sqrt(1 - cosine**2) * noise).astype(np.float32)


def called(queries: np.ndarray, xb: np.ndarray) -> list[str]:
    """The label of the best match of each query."""
    limits, scores = main.chance_limits(xb, len(xb)), queries @ xb.T
    ratios = (1 - scores.max(1)) / main.own_distance(scores)
    return [next((word for word, limit in limits.items() if ratio <= limit), "weak") for ratio in ratios]


def test_copies_are_called_copies_and_strangers_are_not():
    xb = vectors(N)
    assert called(near(xb[:200], 0.98), xb).count("copy") >= 198
    assert called(vectors(500, seed=2), xb).count("copy") <= 10  # 2 %


def bursts(share: float, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Look-alikes planted: a share of the collection is `size` shots each of the same thing."""

    def plant(xb: np.ndarray) -> np.ndarray:
        xb = xb.copy()
        for first in range(0, int(share * len(xb)) - size + 1, size):
            xb[first : first + size] = near(np.repeat(xb[first : first + 1], size, 0), 0.97, seed=first)
        return xb

    return plant


@pytest.mark.parametrize(
    "plant", [bursts(0.05, 10), bursts(0.08, 48), bursts(0.2, 2)], ids=["bursts of 10", "one of 48", "20 % twice"]
)
def test_true_look_alikes_do_not_spoil_the_statistics(plant):
    clean = main.chance_limits(vectors(N), N)
    xb = plant(vectors(N))
    planted = main.chance_limits(xb, N)
    assert planted["copy"] == pytest.approx(clean["copy"], abs=0.05)
    assert called(near(xb[-200:], 0.98), xb).count("copy") >= 198
    assert called(vectors(500, seed=2), xb).count("copy") <= 10


def test_a_larger_collection_asks_for_more():
    sample = vectors(N)
    small, large = main.chance_limits(sample, N), main.chance_limits(sample, 1000 * N)
    assert large["copy"] < small["copy"] < small["similar"] and large["similar"] < small["similar"]


def test_limits_do_not_depend_on_the_order_of_the_sample():
    xb = vectors(N)
    assert main.chance_limits(xb[::-1].copy(), N) == pytest.approx(main.chance_limits(xb, N), abs=1e-5)


@pytest.mark.parametrize("n", [0, 1, 2, 49])
def test_nothing_is_said_of_a_tiny_collection(n):
    assert main.chance_limits(vectors(n), n) == {}


@pytest.mark.parametrize("n", [50, 51, 60])
@pytest.mark.parametrize("same", [0, 1, 25, 50], ids=lambda same: f"{same} alike")
def test_limits_are_numbers_whatever_is_in_the_collection(n, same):
    xb = vectors(n)
    xb[:same] = xb[:1]
    limits = main.chance_limits(xb, n)
    assert 0 <= limits["copy"] <= limits["similar"] < np.inf


@pytest.fixture
def sixty(tmp_path) -> None:
    (tmp_path / "bulk_images").mkdir()
    for seed in range(60):
        draw(seed).save(tmp_path / "bulk_images" / f"{seed:02}.png")


def labels(run, *args: object) -> list[str | None]:
    outcome = run("query.png", "--model", "offline", "--json", "-q", *args)
    assert outcome.status == 0, outcome.stderr
    return [match["label"] for match in json.loads(outcome.stdout)["matches"]]


def test_matches_carry_their_label(run, sixty):
    draw(7).resize((48, 32)).save("query.png")
    first, *others = labels(run)
    assert first == "copy" and "copy" not in others
    draw(7).save("query.png")
    assert labels(run)[0] == "identical"


def test_labels_do_not_depend_on_k(run, sixty):
    draw(7).resize((48, 32)).save("query.png")
    assert labels(run, "-k", 20)[:3] == labels(run, "-k", 3)


def test_labels_do_not_depend_on_the_order_in_which_files_came(run, sixty, tmp_path):
    draw(7).resize((48, 32)).save("query.png")
    at_once = run("query.png", "--model", "offline", "--json", "--index-dir", "one").stdout
    (later := tmp_path / "later").mkdir()
    for image in sorted((tmp_path / "bulk_images").iterdir())[:30]:
        image.rename(later / image.name)
    run("--model", "offline", "--index-only", "--index-dir", "two")
    for image in later.iterdir():
        image.rename(tmp_path / "bulk_images" / image.name)
    assert run("query.png", "--model", "offline", "--json", "--index-dir", "two").stdout == at_once


def test_no_confident_match_is_an_answer(run, sixty):
    draw(1000).save("query.png")
    assert "no confident match" in run("query.png", "--model", "offline").stdout.splitlines()[0]
    assert "no confident match" in Path("results.html").read_text()
    draw(7).resize((48, 32)).save("query.png")
    assert "no confident match" not in run("query.png", "--model", "offline").stdout


def test_a_tiny_collection_gets_no_label_but_identical(run, collection):
    collection(10)
    draw(3).resize((48, 32)).save("query.png")
    assert set(labels(run)) == {""}
    assert "no confident match" not in run("query.png", "--model", "offline").stdout
    draw(3).save("query.png")
    assert labels(run, "--threshold", "identical") == ["identical"]
    outcome = run("query.png", "--model", "offline", "--threshold", "copy")
    assert outcome.status == 1 and outcome.stdout == ""
    assert "fewer than 50 images" in outcome.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("word", "kept"), [("weak", 10), ("copy", 1), ("identical", 0)], ids=["weak: all", "copy: one", "identical: none"]
)
def test_threshold_takes_a_label(run, sixty, word, kept):
    draw(7).resize((48, 32)).save("query.png")
    assert len(labels(run, "--threshold", word)) == kept
