"""Large collections, in small: compact codes, what is added to them, a look without an update, export, GPUs.

`Work(exact_bytes=0)` has collections of any size searched by codes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import sqlite3
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import bench_million
import faiss
import filelock
import numpy as np
import pytest
import torch
from conftest import MAIN, Outcome, break_a_checksum, cache_folder, counts, draw, edit, one_line, ruin_page
from PIL import Image

import main

CODED = main.Work(exact_bytes=0)
SIDE, DIM = 8, 32
OFFLINE = ("--model", "offline")
Opened = Callable[..., main.Engine]


@pytest.fixture(scope="module")
def tiny() -> main.Model:
    """A fixed random projection of 8 × 8 pixels: features of noise are vectors in all directions."""
    weights = torch.from_numpy(np.random.default_rng(0).standard_normal((3 * SIDE * SIDE, DIM)).astype(np.float32))
    return main.Model("tiny", "tiny-32", SIDE, DIM, "cpu", lambda pixels: (pixels.float().flatten(1) - 127.5) @ weights)


@pytest.fixture(autouse=True)
def no_points_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise has as many points as a photograph. Here only its features count."""
    find, none = main.find_points, main.find_points(Image.new("RGB", (SIDE, SIDE)))
    monkeypatch.setattr(
        main, "find_points", lambda it, *how, **named: find(it, *how, **named) if it.size != (SIDE, SIDE) else none
    )


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def put(*seeds: int, folder: str = "images") -> list[Path]:
    Path(folder).mkdir(exist_ok=True)
    paths = [Path(folder, f"{seed}.bmp") for seed in seeds]
    for seed, path in zip(seeds, paths):
        Image.fromarray(noise(seed)).save(path)
    return paths


def features_of(seeds: list[int], model: main.Model) -> np.ndarray:
    pixels = torch.from_numpy(np.stack([noise(seed) for seed in seeds])).permute(0, 3, 1, 2)
    return main.extract_features_batch(pixels, model).astype(np.float16).astype(np.float32)


def scores_of(asked: list[int], xb: np.ndarray, model: main.Model) -> np.ndarray:
    """What each of the queries, or its mirror image, scores with the vectors, (queries, vectors)."""
    pixels = torch.from_numpy(np.stack([noise(seed) for seed in asked])).permute(0, 3, 1, 2)
    views = [
        main.extract_features_batch(it, model).astype(np.float16).astype(np.float32) for it in (pixels, pixels.flip(3))
    ]
    return np.maximum(*(view @ xb.T for view in views))


def brute_force(seeds: list[int], model: main.Model, k: int = 10) -> list[Any]:
    """What `ask` should find among these."""
    (scores,) = scores_of([10_000], features_of(seeds, model), model)
    ranked = sorted(zip(scores.tolist(), (f"images/{seed}.bmp" for seed in seeds)), key=lambda it: (-it[0], it[1]))
    return [(path, pytest.approx(score, abs=1e-4)) for score, path in ranked[:k]]


def found(engine: main.Engine, queries: list[Path], k: int) -> list[list[tuple[str, float]]]:
    """Path and score of the matches of each query."""
    answers = main.search(queries, engine, k=k)
    return [[(match.path, match.score) for match in answer.matches] for answer in answers]


def paths_in(lists: list[list[tuple[str, float]]]) -> list[list[str]]:
    return [[path for path, _ in matches] for matches in lists]


def queries(n: int, first: int = 20_000) -> list[Path]:
    """Files that are not in the collection."""
    return put(*range(first, first + n), folder="queries")


def ask(engine: main.Engine, k: int = 10) -> list[tuple[str, float]]:
    """Path and score of the matches of the query that `brute_force` takes."""
    return found(engine, queries(1, 10_000), k)[0]


@pytest.fixture
def opened(tiny: main.Model) -> Opened:
    """opened(**work): the engine of `images`, brought up to date, searched by codes."""
    return lambda **work: main.initialize_reverse_image_search(
        "images", "index", model=tiny, work=main.Work(**{"exact_bytes": 0, **work})
    )


@pytest.fixture
def many(tiny: main.Model, opened: Opened) -> Opened:
    """many(n): the engine of n random vectors, each of an empty file, searched by codes."""

    def make(n: int) -> main.Engine:
        x = np.random.default_rng(1).standard_normal((n, DIM)).astype(np.float32)
        Path("images").mkdir()
        for i in range(n):
            Path("images", f"{i:05}.bmp").touch()
        store = main.Store(Path("index", tiny.identity), tiny.identity, DIM)
        bench_million.fill(store, Path("images"), [x / np.linalg.norm(x, axis=1, keepdims=True)])
        main.open_index(store, main.Work(exact_bytes=0))
        return opened(update=False)

    return make


# ---- The codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "sizes"), [(CODED, [40, 61, 79, 80, *range(90, 181, 30)]), (main.Work(), [1, 24, 180])]
)
def test_a_collection_that_grows_is_searched_like_brute_force_does(work, sizes, tiny):
    """Over several times of outgrowing the size that the codes were trained on."""
    with pytest.raises(main.DeepVisionError):
        main.initialize_reverse_image_search("images", "index", model=tiny, work=work)
    for before, n in itertools.pairwise([0, *sizes]):
        put(*range(before, n))
        engine = main.initialize_reverse_image_search("images", "index", model=tiny, work=work)
        assert bool(engine.index.shortlist) == (work is CODED)
        assert ask(engine) == brute_force(list(range(n)), tiny)


def test_the_codes_find_nearly_all_and_say_how_many_and_scores_are_exact(many, tiny):
    engine, asked = many(5000), queries(100)
    assert engine.index.made_of == 5000 and main.RECALL <= engine.index.recall <= 1
    by_codes, exact = found(engine, asked, 10), found(replace(engine, exact=True), asked, 10)
    xb = np.concatenate([xb for _, xb in engine.store.blocks()]).astype(np.float32)
    S = scores_of(list(range(20_000, 20_100)), xb, tiny)
    best = np.argsort(-S, axis=1)[:, :10]
    assert [[int(path[7:12]) for path in row] for row in paths_in(exact)] == best.tolist()
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(paths_in(by_codes), paths_in(exact))]
    assert np.mean(shared) >= 0.995
    for scores, matches in zip(S, by_codes):
        expected = [scores[int(path[7:12])] for path, _ in matches]
        assert [score for _, score in matches] == pytest.approx(expected, abs=1e-5)


def test_the_shortlist_grows_until_the_recall_holds(many, opened, monkeypatch):
    monkeypatch.setattr(main, "SHORTLIST", 4)
    engine = many(3000)
    assert engine.index.shortlist > 16 and engine.index.recall >= main.RECALL
    monkeypatch.setattr(main, "LONGEST_SHORTLIST", 10)
    (engine.store.folder / "index.faiss").unlink()
    index = main.open_index(engine.store, main.Work(exact_bytes=0))
    assert (index.faiss.ntotal, index.shortlist) == (3000, 8) and index.recall < main.RECALL


@pytest.mark.parametrize("work", [main.Work(), CODED], ids=["exact", "codes"])
def test_top_k_begins_top_k_plus_n_among_copies_that_all_score_1(work, tiny, monkeypatch):
    """fp16 makes a vector as long as 1.0001: of products beyond 1 the larger one is no better."""
    monkeypatch.setattr(main, "SHORTLIST", 16)
    monkeypatch.setattr(main, "RECALL", 0.0)
    (path,), original = put(0), noise(0)
    for i in range(200):
        pixels = original.copy() if i < 120 else noise(i)
        pixels[i % 8, i // 8 % 8, i // 64 % 3] ^= 1
        Image.fromarray(pixels).save(path.with_name(f"copy {i}.bmp"))
    engine = main.initialize_reverse_image_search("images", "index", model=tiny, work=work)
    (longest,) = found(engine, [path], 150)
    assert sum(score >= 1 for _, score in longest) > 5
    for k in (*range(1, 40, 4), 60, 100, 120):
        assert found(engine, [path], k) == [longest[:k]]


def test_a_short_list_that_missed_a_match_still_begins_every_longer_one(many, monkeypatch):
    """Codes are looked at in steps; a later one finds what an earlier one has missed, and that comes too late. An exact
    search misses none."""
    monkeypatch.setattr(main, "CLOSELY", 2)
    engine, asked = many(3000), queries(30)
    engine = replace(engine, index=engine.index._replace(shortlist=12))
    longest, exact = paths_in(found(engine, asked, 1000)), paths_in(found(replace(engine, exact=True), asked, 5))
    assert [row[:5] for row in longest] != exact
    assert all(len(row) == len(set(row)) >= 500 for row in longest)
    for k in (1, 5, 12, 40, 300):
        assert paths_in(found(engine, asked, k)) == [row[:k] for row in longest]


@pytest.mark.parametrize("exact", [True, False])
def test_queries_are_answered_in_their_order_each_as_if_it_was_alone(exact, many):
    engine, asked = replace(many(1500), exact=exact), queries(40)
    together = list(main.search(asked, engine))
    assert [answer.query for answer in together] == list(map(str, asked))
    assert [next(main.search(query, engine)) for query in asked] == together


def test_what_is_gone_leaves_room_for_what_is_there(tiny, opened, monkeypatch):
    """Also where all that the codes hold nearest is gone."""
    monkeypatch.setattr(main, "CLOSELY", 2)
    put(*range(200))
    nearest = [path for path, _ in ask(opened(), 120)]
    for path in nearest:
        Path(path).unlink()
    left = [seed for seed in range(200) if f"images/{seed}.bmp" not in nearest]
    engine = opened()
    assert ask(replace(engine, index=engine.index._replace(shortlist=20)), 2) == brute_force(left, tiny, 2)
    assert ask(engine) == brute_force(left, tiny)


def test_codes_are_appended_and_only_trained_again_when_outgrown(opened, monkeypatch):
    """What was there is not read again for what is added."""
    made_of, starts, blocks = [], list[int](), main.Store.blocks
    for before, n in itertools.pairwise([0, 80, 100, 159, 160, 200]):
        put(*range(before, n))
        index = opened().index
        assert index.last == index.faiss.ntotal == n
        made_of.append(index.made_of)
    assert made_of == [80, 80, 80, 160, 160]
    monkeypatch.setattr(main.Store, "blocks", lambda self, *rows: [starts.extend(rows[:1]), blocks(self, *rows)][1])
    put(200)
    opened()
    assert starts == [201]


def test_the_kind_of_index_follows_the_size(tiny, opened):
    put(*range(100))
    for size in (1 << 28, 0, 99 * DIM * 2, 100 * DIM * 2, 0):
        engine = opened(exact_bytes=size)
        assert bool(engine.index.shortlist) == (size < 100 * DIM * 2)
        assert ask(engine) == brute_force(list(range(100)), tiny)


def test_the_summary_tells_how_the_index_was_searched(run, collection, monkeypatch):
    monkeypatch.setattr(main, "Work", partial(main.Work, exact_bytes=0))
    collection(80)
    draw(3).resize((48, 32)).save("query.png")
    by_codes, exact = (run(*OFFLINE, "--json", "query.png", *options) for options in ((), ("--exact",)))
    assert by_codes.stdout == exact.stdout != ""
    assert re.search(r"approximate \(recall@10 is 1\.000\); --exact", by_codes.stderr)
    assert "approximate" not in exact.stderr


# ---- While another run is at work ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 << 28, 0], ids=["exact", "codes"])
def test_an_open_engine_answers_rightly_whatever_other_runs_do(size, tiny, opened):
    """Rows that its index lacks are compared one by one; rows that are gone name no file."""
    opened = partial(opened, exact_bytes=size)
    put(*range(80))
    engine, there, seeds = opened(), set(range(80)), itertools.count(500)
    for act in ("add", "prune", "rebuild", "both", "add"):
        if act == "add":
            new = list(itertools.islice(seeds, 2))
            put(*new)
            there.update(new)
        gone = min(there)
        there.remove(gone)
        Path(f"images/{gone}.bmp").unlink()
        other = opened(prune=act in ("prune", "both"), rebuild=act in ("rebuild", "both"))
        assert other.summary.forgotten == {"prune": 2, "both": 2}.get(act, 0)
        assert ask(engine) == brute_force(sorted(there), tiny)


def test_others_may_save_during_a_scan(opened, monkeypatch):
    put(*range(50))
    opened()
    find = main.find_images

    def files(*args: Any) -> Iterator[main.File]:
        for file in find(*args):
            yield file
            with sqlite3.connect(cache_folder("index") / "index.sqlite", timeout=0.1) as other:
                other.execute("INSERT OR REPLACE INTO files (path, size, mtime, there) VALUES (x'FF', 1, 1, 1)")

    monkeypatch.setattr(main, "find_images", files)
    assert opened().summary.images == 50


@pytest.mark.parametrize(
    ("damage", "said", "lost"),
    [(break_a_checksum, "do not match their checksums", range(1, 2)), (ruin_page, "malformed", range(1, 300))],
)
def test_damage_in_a_large_collection_is_never_answered_from_and_costs_only_what_it_hit(
    damage, said, lost, tiny, opened, monkeypatch
):
    """It is not checked on opening: the run that meets the damage marks it, and the next one repairs it."""
    monkeypatch.setattr(main, "PAGE_BYTES", 512)
    monkeypatch.setattr(main, "CHECKED_BYTES", 0)
    put(*range(300))
    opened(exact=True)
    damage(cache_folder("index") / "index.sqlite", 150)
    with pytest.raises(main.DeepVisionError, match=rf"damaged .*{said}.*Run the command again"):
        ask(opened(update=False, exact=True))
    engine = opened()
    assert engine.summary.new in lost and engine.store.count("features") == 300
    assert ask(engine) == brute_force(list(range(300)), tiny)


# ---- The index of points ---------------------------------------------------------------------------------------------


def votes(index: main.Index, picture: Image.Image) -> list[main.Vote]:
    points = [main.find_points(picture)]
    return main.votes(points, main.nearest_points(index, points, main.NEIGHBOURS))[0]


def voted(engine: main.Engine, seed: int) -> bytes:
    """The content for which a mirrored picture gets most votes."""
    best = votes(engine.copies, draw(seed).transpose(Image.Transpose.FLIP_LEFT_RIGHT))[0]
    return engine.store.value("SELECT digest FROM points WHERE row = ?", best.row)


def digest_of(seed: int) -> bytes:
    return hashlib.sha256(Path("images", f"{seed}.png").read_bytes()).digest()[: main.DIGEST_BYTES]


def test_points_that_are_added_are_found_at_once_and_come_into_the_file_in_lots(opened, monkeypatch):
    """Up to LATER pictures are searched beside the file, which is not written again for them."""
    Path("images").mkdir()
    monkeypatch.setattr(main, "LATER", 10)
    file, added = Path("index/tiny-32/copies.faiss"), iter(range(1000))

    def add(count: int) -> tuple[main.Engine, int]:
        for seed in itertools.islice(added, count):
            draw(seed).save(f"images/{seed}.png")
        return opened(exact_bytes=1 << 28), next(added)

    engine, last = add(5)
    assert engine.copies.last == 5
    written = file.read_bytes()
    draw(last).save(f"images/{last}.png")
    engine, _ = add(main.LATER - 1)
    assert main.read_index(engine.store, main.LOCAL).last == 5 and file.read_bytes() == written
    assert engine.copies.last == 5 + main.LATER and engine.copies.faiss.ntotal > 10 * main.LATER
    assert (voted(engine, last), voted(engine, 3)) == (digest_of(last), digest_of(3))
    in_one_go = main.build_index(main.point_blocks(engine.store, 0), faiss.index_factory(main.POINT_DIM, "IDMap,Flat"))
    beside, whole = ([vote[:2] for vote in votes(it, draw(last))] for it in (engine.copies, main.Index(in_one_go, 0)))
    assert beside == whole
    again = opened(exact_bytes=1 << 28, update=False)
    assert voted(again, last) == digest_of(last)
    engine, last = add(2)
    assert engine.copies.last == engine.store.count("points") == 5 + main.LATER + 2
    assert file.read_bytes() != written and (voted(engine, 10), voted(engine, 3)) == (digest_of(10), digest_of(3))


@pytest.mark.parametrize("lists", ["IndexFlatL2", "IndexIVFFlat"])
def test_points_of_many_pictures_are_in_lists_and_what_is_added_is_found(lists, opened, monkeypatch):
    """Many lists lie in cells, few do not."""
    monkeypatch.setattr(main, "FEW_POINTS", 500)
    if lists == "IndexIVFFlat":
        monkeypatch.setattr(main, "MANY_LISTS", 16)
        monkeypatch.setattr(main, "CELL_LISTS", 4)
        monkeypatch.setattr(main, "CELLS", 2)
    monkeypatch.setattr(main, "LATER", 3)
    Path("images").mkdir()
    for before, n in ((0, 20), (20, 26), (26, 28)):
        for seed in range(before, n):
            draw(seed).save(f"images/{seed}.png")
        engine = opened(exact_bytes=1 << 28)
        in_file = main.read_index(engine.store, main.LOCAL).faiss
        assert in_file.nlist == in_file.quantizer.ntotal >= 16
        assert type(faiss.downcast_index(in_file.quantizer)).__name__ == lists
        assert [voted(engine, seed) for seed in (0, 9, n - 1)] == [digest_of(seed) for seed in (0, 9, n - 1)]
        assert main.read_index(engine.store, main.LOCAL).last == min(n, 26) and engine.copies.last == n
        assert engine.copies.made_of <= engine.copies.faiss.ntotal


# ---- Without an update -----------------------------------------------------------------------------------------------

ASK = (*OFFLINE, "--no-update", "--json")


def paths(outcome: Outcome) -> list[str]:
    assert outcome.status == 0, outcome.stderr
    return [match["path"] for line in outcome.stdout.splitlines() for match in json.loads(line)["matches"]]


def test_without_an_update_what_is_new_is_not_seen_and_what_is_gone_or_changed_is_left_out(run, collection):
    images = collection(6)
    draw(0).resize((48, 32)).save("query.png")
    run(*OFFLINE, "--index-only")
    before = paths(run("query.png", *ASK))
    assert sorted(before) == [f"bulk_images/{i}.png" for i in range(6)]
    shutil.copy("query.png", images / "new.png")
    (images / "2.png").unlink()
    draw(77).save(images / "3.png")
    outcome = run("query.png", *ASK)
    assert paths(outcome) == [path for path in before if path[-5] not in "23"]
    assert "6 images" in outcome.stderr and "not checked for changes" in outcome.stderr
    assert paths(run("query.png", *OFFLINE, "--json"))[0] == "bulk_images/new.png"


def test_without_an_update_there_must_be_an_index_of_something(run, collection):
    collection(2)
    one_line(run("query.png", *ASK), "run without --no-update")
    assert not Path("image_index").exists()
    run(*OFFLINE, "--index-only")
    edit(cache_folder() / "index.sqlite", "DELETE FROM features")
    one_line(run("query.png", *ASK), "no features yet: run without --no-update")


def test_without_an_update_nobody_is_waited_for(run, collection, monkeypatch):
    """Even while another run adds features that the index does not have yet."""
    images = collection(4)
    run(*OFFLINE, "--index-only")
    draw(50).save(images / "new.png")
    with monkeypatch.context() as patch:
        patch.setattr(main, "open_index", Mock(side_effect=KeyboardInterrupt))  # it gets no further
        assert run(*OFFLINE, "--index-only").status == 130
    with filelock.FileLock(cache_folder() / "lock"):
        outcome = run("bulk_images/0.png", *ASK)
    assert set(paths(outcome)) == {f"bulk_images/{name}.png" for name in (1, 2, 3, "new")}
    assert "waiting" not in outcome.stderr


def test_without_an_update_and_an_index_file_the_store_is_scanned_and_nobody_waited_for(run, collection):
    """As during a first build, which holds the lock."""
    collection(4)
    run(*OFFLINE, "--index-only")
    expected = paths(run("bulk_images/0.png", *ASK))
    (cache_folder() / "index.faiss").unlink()
    with filelock.FileLock(cache_folder() / "lock"):
        outcome = run("bulk_images/0.png", *ASK)
    assert paths(outcome) == expected and "waiting" not in outcome.stderr
    assert not (cache_folder() / "index.faiss").exists()


def test_with_all_files_gone_a_search_reads_the_features_block_by_block(run, collection, monkeypatch):
    images, sizes, real = collection(40), list[int](), main.Store.features_of
    run(*OFFLINE, "--index-only")
    draw(0).save("query.png")
    shutil.rmtree(images)

    def features_of(store: main.Store, rows: Any) -> Any:
        sizes.append(len(rows := list(rows)))
        return real(store, rows)

    monkeypatch.setattr(main, "BLOCK", 8)
    monkeypatch.setattr(main.Store, "features_of", features_of)
    assert paths(run("query.png", *ASK)) == [] and sum(sizes) >= 40 and max(sizes) == 8


def test_without_an_update_the_images_are_counted_also_those_of_a_stopped_run(run, collection, monkeypatch):
    images = collection(4)
    run(*OFFLINE, "--index-only")
    assert "4 images, not checked" in run("bulk_images/0.png", *ASK).stderr
    draw(50).save(images / "new.png")
    with monkeypatch.context() as patch:
        patch.setattr(main.Store, "mark_presence", Mock(side_effect=KeyboardInterrupt))
        assert run(*OFFLINE, "--index-only").status == 130
    assert "5 images, not checked" in run("bulk_images/0.png", *ASK).stderr


# ---- Export ----------------------------------------------------------------------------------------------------------


def unescaped(line: bytes) -> bytes:
    return re.sub(rb"\\(.)", lambda m: {b"n": b"\n", b"r": b"\r"}.get(m[1], m[1]), line)


def test_export_writes_a_vector_and_a_path_for_every_image(run, collection):
    images = collection(20)
    shutil.copy(images / "3.png", images / "copy.png")
    for name in (b"new\nline.png", b"back\\slash.png", b"caf\xe9.png", b"return\r.png"):
        draw(40).save(os.path.join(os.fsencode(images), name), "PNG")
    run(*OFFLINE, "--index-only")
    (images / "5.png").unlink()
    outcome = run(*OFFLINE, "--export", "out")
    assert (outcome.status, outcome.stdout) == (0, "") and "24 × 868" in outcome.stderr
    features, (*lines, end) = np.load("out/features.npy"), Path("out/paths.txt").read_bytes().split(b"\n")
    assert end == b"" and features.dtype == np.float16 and features.shape == (24, 868)
    assert sorted(map(unescaped, lines)) == sorted(os.listdir(os.fsencode(images)))
    files = [os.fsdecode(os.path.join(os.fsencode(images), unescaped(line))) for line in lines]
    again = main.extract_features_batch(files, main.load_model("offline"))
    np.testing.assert_allclose(features, again, atol=1e-3)


def test_the_lines_of_readme_load_an_export_into_a_database_that_finds_the_same(run, collection):
    """Qdrant within this process; to a cluster, the same lines talk over the network."""
    pytest.importorskip("qdrant_client")
    images = collection(200)
    draw(2000).save("photo.jpg")
    readme = (MAIN.parent / "README.md").read_text()
    (command,) = re.findall("`python main.py (.*--export .*?)`", readme)
    assert run(*command.split()).status == 0
    (lines,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "qdrant" in block)
    exec(lines, known := dict[str, Any]())
    model = main.load_model("offline")
    engine = main.initialize_reverse_image_search(images, model=model)
    names = dict(engine.store.db.execute(main.ROWS_AND_PATHS).fetchall())
    queries = main.extract_features_batch([draw(seed, (120, 90)) for seed in range(180, 230)], model)
    for xq, D, I in zip(queries, *engine.index.faiss.search(queries, 10)):
        points = known["client"].query_points("images", xq, limit=10).points
        assert [known["paths"][point.id] for point in points] == [names[row] for row in I]
        assert [point.score for point in points] == pytest.approx(D, abs=1e-3)
    assert len(known["paths"]) == 201  # the last line has an end


def test_an_export_that_fails_is_one_line_and_leaves_no_features_beside_other_paths(run, collection, monkeypatch):
    collection(3)
    assert run(*OFFLINE, "--export", "out").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(main.Store, "features_of", lambda *_: os.open("no room on this device", os.O_RDONLY))
        outcome = run(*OFFLINE, "--export", "out")
    assert outcome.status == 1 and "no room on this device" in outcome.stderr and "Traceback" not in outcome.stderr
    assert os.listdir("out") == ["paths.txt"]  # of the export before
    monkeypatch.setattr(main, "CHECKED_BYTES", 0)
    break_a_checksum(cache_folder() / "index.sqlite", 2)
    outcome = run(*OFFLINE, "--export", "out")
    assert outcome.status == 1 and outcome.stderr.splitlines()[-1].startswith("error: --export out: image_index")
    assert counts(run(*OFFLINE, "--index-only"))["new"] == 1


def test_many_queries_are_searched_on_the_gpus_and_by_the_processor_where_these_are_full(many, monkeypatch, caplog):
    """Two GPUs as far as the choice goes: their indexes are in memory, and have no selection and few results."""
    free, used = [1 << 30], list[int]()

    class OnGpu(faiss.IndexFlatIP):
        def search(self, xq: Any, k: int, **options: Any) -> Any:
            assert k <= 2048 and not options
            return super().search(xq, k)

    def make(resources: None, dim: int, config: Any) -> Any:
        assert config.useFloat16
        used.append(config.device)
        return OnGpu(dim)

    there = {"StandardGpuResources": lambda: None, "GpuIndexFlatConfig": types.SimpleNamespace, "GpuIndexFlatIP": make}
    for name, value in {"get_num_gpus": lambda: 2, **there}.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[0], 80 << 30))

    engine, asked = many(3000), queries(32)
    exact = found(replace(engine, exact=True), asked, 10)
    full = replace(engine)
    assert found(full, asked, 10) == found(full, asked, 10) and used == []
    assert caplog.text.count("do not fit into the memory of the GPU") == 1
    free[0] = 10 << 30
    assert found(engine, asked[:1], 10) == exact[:1] and used == []  # not worth the loading
    assert found(engine, asked, 10) == exact and used == [0, 1]
