"""What is found: the same as brute force finds, in an order that can be relied on."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw, encoded
from PIL import Image

import main

IMAGES = Path("bulk_images")


@pytest.fixture(scope="module")
def model() -> main.Model:
    return main.load_model("offline")


@pytest.fixture
def find(model: main.Model) -> Callable[..., list[main.Match]]:
    """find(query, **options): the matches of one query in `bulk_images`."""

    def call(query: str | Path, **options: Any) -> list[main.Match]:
        (answer,) = main.search(query, main.initialize_reverse_image_search(model=model), **options)
        assert answer.error is None
        return answer.matches

    return call


def paths_of(matches: list[main.Match]) -> list[str]:
    return [match.path for match in matches]


def unit_vectors(n: int, dim: int, seed: int) -> np.ndarray:
    """Random directions, rounded as the cache rounds them."""
    x = np.random.default_rng(seed).standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def same_pixels(path: Path, image: Image.Image, rest: str) -> None:
    """The same picture in a file of other bytes."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encoded(image) + rest.encode())


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 300, 5000])
def test_the_index_is_exact_whether_made_of_the_whole_or_of_blocks(n, kind):
    xb, xq, k = unit_vectors(n, 24, seed=n), unit_vectors(7, 24, seed=0), min(n, 10)
    scores = xq @ xb.T
    for features in (xb.astype(kind), (block.astype(kind) for block in (xb[:1], xb[1:1], xb[1:70], xb[70:]))):
        index = main.build_index(features)
        D, I = index.search(xq, k)
        assert index.ntotal == n
        np.testing.assert_allclose(D, -np.sort(-scores)[:, :k], atol=1e-5)
        np.testing.assert_allclose(D, np.take_along_axis(scores, I, 1), atol=1e-5)


def test_an_index_of_no_rows_is_empty_and_one_of_nothing_an_error():
    assert main.build_index(np.zeros((0, 24), np.float32)).ntotal == 0
    with pytest.raises(ValueError, match="no features"):
        main.build_index(iter([]))


@pytest.mark.parametrize("n", [1, 2, 5, 30, 100])  # FIRST_LIST lies between the last two
def test_a_search_finds_what_brute_force_finds_by_the_best_cosine_of_a_view(n, collection, find, model):
    collection(n)
    Image.new("RGB", (8, 8)).save(IMAGES / "black.png")
    draw(1000).save("unknown.png")
    shutil.copy(IMAGES / "black.png", "black.png")
    paths = sorted(map(str, IMAGES.iterdir()))
    features = main.extract_features_batch(paths, model).astype(np.float16).astype(np.float32)
    for query in ("unknown.png", "black.png"):
        views = main.extract_features_batch(main.query_views(Image.open(query), model), model)
        scores = dict(zip(paths, (features @ views.T).max(1).tolist()))
        for k in (10, 1000):
            matches = find(query, k=k)
            found = [match.score for match in matches]
            assert [match.rank for match in matches] == list(range(1, min(n + 1, k) + 1))
            assert found == pytest.approx(sorted(scores.values(), reverse=True)[:k], abs=1e-3)
            assert found == pytest.approx([scores[match.path] for match in matches], abs=1e-3)
            assert found == sorted(found, reverse=True) and all(-1 <= score <= 1 for score in found)
            assert [match.path for match in matches if match.identical] == ["bulk_images/black.png"] * (query[0] == "b")


PLACES = [slice(0, 1), slice(10, 11), slice(19, 20), slice(4, 8), slice(0, 19)]


@pytest.mark.parametrize(
    ("place", "workers"), [*((place, 3) for place in PLACES), (slice(4, 8), 1), (slice(4, 8), 20)], ids=str
)
def test_bad_files_anywhere_cost_no_other_file(place, workers, collection, model):
    collection(20)
    shutil.copytree(IMAGES, "copies")
    names = sorted(path.name for path in IMAGES.iterdir())
    for name in names[place]:
        os.truncate(IMAGES / name, 60)
    engine = main.initialize_reverse_image_search(model=model, work=main.Work(batch_size=4, workers=workers))
    good = [name for name in names if name not in names[place]]
    asked = good[-1::-3]
    for name, answer in zip(asked, main.search([f"copies/{name}" for name in asked], engine), strict=True):
        first = answer.matches[0]
        assert (first.path, first.identical, first.score) == (str(IMAGES / name), True, pytest.approx(1, abs=1e-3))
        assert len(answer.matches) == min(10, len(good))


@pytest.mark.parametrize("image", [draw(3), Image.new("RGB", (20, 20), "red")], ids=["a picture", "one colour"])
def test_ties_are_in_the_order_of_their_paths_and_the_top_5_begin_the_top_15(image, collection, find):
    """The same pixels in many files of other bytes, among other pictures."""
    collection(12)
    names = [f"{folder}/{number:02}.png" for folder in ("b", "a", "c") for number in range(12)]
    random.Random(0).shuffle(names)
    for name in names:
        same_pixels(IMAGES / name, image, name)
    image.save("query.png")
    all_of_them = find("query.png", k=48)
    paths = [path.removeprefix("bulk_images/") for path in paths_of(all_of_them)]
    assert [path for path in paths if "/" in path] == sorted(names)
    for k in (1, 2, 5, 12, 24, 35, 36, 37, 47):
        assert find("query.png", k=k) == all_of_them[:k]


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.4, 0.9, 1.0])
def test_a_threshold_leaves_out_what_is_below_it(threshold, collection, find):
    collection(30)
    draw(1000).save("query.png")
    found = find("query.png", k=30)
    assert find("query.png", k=30, threshold=threshold) == [match for match in found if match.score >= threshold]
    assert find("query.png", k=5, threshold=threshold) == [match for match in found[:5] if match.score >= threshold]


def test_an_unusable_query_is_an_answer_with_an_error(collection, model):
    collection(3)
    Path("broken.png").write_bytes(b"\x89PNG")
    engine = main.initialize_reverse_image_search(model=model)
    broken, fine, missing = main.search(["broken.png", IMAGES / "1.png", "missing.png"], engine)
    assert (broken.matches, missing.matches, fine.error) == ([], [], None)
    assert broken.error and missing.error == "No such file or directory" and len(fine.matches) == 2


OWN = {
    "as it is": lambda own: own,
    "absolute": lambda own: own.absolute(),
    "with ..": lambda own: IMAGES / ".." / own,
    "through a linked folder": lambda own: Path("link", own.name),
}


@pytest.mark.parametrize("name", OWN)
def test_the_own_file_of_a_query_is_left_out_and_its_copies_are_identical(name, collection, find):
    own = collection(5).relative_to(Path.cwd()) / "2.png"
    Path("link").symlink_to(IMAGES)
    shutil.copy(own, IMAGES / "copy.png")
    same_pixels(IMAGES / "same pixels.png", draw(2), "other bytes")
    matches = find(OWN[name](own))
    assert str(own) not in paths_of(matches) and len(matches) == 6
    assert [(match.path, match.identical) for match in matches[:2]] == [
        (str(IMAGES / "copy.png"), True),
        (str(IMAGES / "same pixels.png"), False),
    ]


@pytest.mark.parametrize("link", [os.symlink, os.link, shutil.copy])
def test_a_link_elsewhere_is_a_query_like_any_other(link, collection, find):
    own = collection(5) / "2.png"
    link(own, "query.png")
    first = find("query.png")[0]
    assert (first.path, first.identical) == (str(IMAGES / "2.png"), True)


@pytest.mark.parametrize("kind", ["network", "offline"])
def test_a_network_computes_with_all_threads_and_readers_with_one(kind, collection, model, monkeypatch):
    """Two readers with two threads each wait for each other; a network on the CPU needs all of them."""
    seen: dict[str, set[int]] = {"network": set(), "points": set()}
    network, points = model.network, main.find_points
    known = torch.get_num_threads()

    def noted(where: str, function: Any) -> Any:
        return lambda *args: (seen[where].add(torch.get_num_threads()), function(*args))[1]

    main.torch_threads.cache_clear()
    torch.set_num_threads(3)
    try:
        if kind == "network":
            model = replace(model, name="other", network=noted("network", network))
        else:
            monkeypatch.setattr(main, "describe_squares", noted("network", main.describe_squares))
        monkeypatch.setattr(main, "find_points", noted("points", points))
        main.initialize_reverse_image_search(collection(4), "index", model=model)
        assert seen == {"network": {3 if kind == "network" else 1}, "points": {1}}
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as made_later:
            assert made_later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(known)
        main.torch_threads.cache_clear()


def test_of_many_copies_each_is_a_match(collection, find):
    collection(5)
    for number in range(20):
        shutil.copy(IMAGES / "0.png", IMAGES / f"copy {number:02}.png")
    matches = find(IMAGES / "copy 03.png", k=22)
    copies = ["0.png", *(f"copy {number:02}.png" for number in range(20) if number != 3)]
    assert paths_of(matches[:20]) == [str(IMAGES / name) for name in copies]
    assert [match.identical for match in matches] == [True] * 20 + [False] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_cpu_and_gpu_agree_to_three_decimals(run, collection, weights):
    collection(12)
    draw(3).resize((48, 32)).save("query.png")
    for chosen in (["--model", "offline"], ["--model", "resnet18", "--weights", weights("resnet18", 0)]):
        answers = []
        for device in ("cpu", "cuda"):
            outcome = run("query.png", *chosen, "--device", device, "--index-dir", device, "--json", "-q")
            assert outcome.status == 0, outcome.stderr
            answers.append({match["path"]: match["score"] for match in json.loads(outcome.stdout)["matches"]})
        assert answers[1] == pytest.approx(answers[0], abs=1e-3)


def test_rows_replaced_and_deleted_since_the_index_was_made_hide_no_match(collection, model, monkeypatch):
    """The new ones are not in the index, and are compared one by one."""
    monkeypatch.setattr(main, "FIRST_LIST", 8)
    images = collection(60)
    engine = main.initialize_reverse_image_search(images, model=model)
    columns = "digest, vector, checksum"
    with engine.store.db as db:
        db.execute(f"INSERT OR REPLACE INTO features ({columns}) SELECT {columns} FROM features WHERE row % 3 = 1")
        db.execute("DELETE FROM features WHERE row % 3 = 2 AND row <= 60")
    left = engine.store.count("features")
    (answer,) = main.search(images / "0.png", engine, k=100)
    assert len(answer.matches) == left - 1  # all but the query itself


def test_a_rebuild_meanwhile_hides_no_match(collection, model, monkeypatch):
    """What a search reads comes from one state of the store: another run waits with its commit."""
    images = collection(6)
    engine = main.initialize_reverse_image_search(images, model=model)
    choose, tried = main.candidate_rows, []

    def then_replaced(*args):
        rows = choose(*args)  # what is read first decides on the state
        tried.append(rows)
        busy = pytest.raises(sqlite3.OperationalError, match="locked")
        with closing(sqlite3.connect(engine.store.path, timeout=0)) as other, busy:
            other.execute("DELETE FROM features")
            other.commit()
        return rows

    monkeypatch.setattr(main, "candidate_rows", then_replaced)
    (answer,) = main.search([images / "3.png"], engine)
    assert tried and len(answer.matches) == 5
