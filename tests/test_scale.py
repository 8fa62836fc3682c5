"""Large collections, in small: compact codes, what is added to them, a look without an update, export.

`Work(exact_bytes=0)` has collections of any size searched by codes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome, draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import main

CODED = main.Work(exact_bytes=0)
SIDE, DIM = 8, 32


@pytest.fixture(scope="module")
def tiny() -> main.Model:
    """A fixed random projection of 8 × 8 pixels: features of noise are vectors in all directions."""
    weights = torch.from_numpy(np.random.default_rng(0).standard_normal((3 * SIDE * SIDE, DIM)).astype(np.float32))
    return main.Model("tiny", "tiny-32", SIDE, DIM, "cpu", lambda pixels: (pixels.float().flatten(1) - 127.5) @ weights)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def put(seed: int, folder: Path = Path("images")) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{seed}.bmp"
    Image.fromarray(noise(seed)).save(path)
    return path


def scores_of(query: int, seeds: list[int], model: main.Model) -> dict[str, float]:
    """By brute force: path to score."""
    pixels = torch.from_numpy(np.stack([noise(seed) for seed in [query, *seeds]])).permute(0, 3, 1, 2)
    q, *xb = main.extract_features_batch(pixels, model).astype(np.float16).astype(np.float32)
    return {f"images/{seed}.bmp": float(x @ q) for seed, x in zip(seeds, xb)}


@pytest.fixture
def ask(tiny: main.Model) -> Callable[..., list[tuple[str, float]]]:
    """ask(engine, k=10): path and score of the matches of a query that is not in the collection."""
    query = put(10_000, Path("queries"))

    def call(engine: main.Engine, k: int = 10, path: Path = query) -> list[tuple[str, float]]:
        (answer,) = main.search(path, engine, k=k, views="none")
        return [(match.path, match.score) for match in answer.matches]

    return call


def ranking(scores: dict[str, float], k: int = 10) -> list[Any]:
    ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]
    return [(path, pytest.approx(score, abs=1e-4)) for path, score in ranked]


def directions(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def results(engine: main.Engine, xq: np.ndarray, k: int) -> list[list[main.Scored]]:
    """The k best of each of xq."""
    lists = main.candidate_rows(engine, xq, [1] * len(xq), main.first_list(engine))
    ranked = (main.ranked(engine, x[None], rows) for x, rows in zip(xq, lists))
    return [list(itertools.islice(scored, k)) for scored in ranked]


def rows_of(scored: list[main.Scored]) -> list[int]:
    return [int.from_bytes(it.digest, "big") for it in scored]


def all_vectors(engine: main.Engine) -> np.ndarray:
    return np.concatenate([xb for _, xb in engine.store.blocks()]).astype(np.float32)


# ---- The codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "sizes"), [(CODED, range(1, 301)), (main.Work(), range(1, 301, 23))], ids=["codes", "exact"]
)
def test_a_collection_that_grows_one_by_one_is_searched_like_brute_force_does(
    work: main.Work, sizes: range, tiny: main.Model, ask: Any
) -> None:
    """Every size from 0 to 300, over the first that the codes are trained on and several times of outgrowing it."""
    with pytest.raises(main.DeepVisionError):
        main.initialize_reverse_image_search("images", "index", model=tiny, work=work)
    scores = scores_of(10_000, list(range(300)), tiny)
    for n in sizes:
        for seed in range(max(0, n - sizes.step), n):
            put(seed)
        engine = main.initialize_reverse_image_search("images", "index", model=tiny, work=work)
        assert bool(engine.index.shortlist) == (work is CODED and n >= main.FEWEST_CODED)
        assert ask(engine) == ranking(dict(list(scores.items())[:n]))


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 150)), max_size=60), min_size=2, max_size=5))
def test_adding_and_removing_in_any_order_is_as_good_as_a_fresh_build(steps: list[Any], tiny: main.Model) -> None:
    shutil.rmtree("images", ignore_errors=True)
    shutil.rmtree("index", ignore_errors=True)
    query, there = put(10_000, Path("queries")), set(range(70))
    for changes in ([(True, seed) for seed in there], *steps):
        for add, seed in changes:
            (there.add if add else there.discard)(seed)
            put(seed) if add else Path(f"images/{seed}.bmp").unlink(missing_ok=True)
        there.add(0)
        put(0)
        (answer,) = main.search(query, main.initialize_reverse_image_search("images", "index", model=tiny, work=CODED))
        fresh = main.initialize_reverse_image_search("images", f"fresh {random.random()}", model=tiny)
        assert answer == next(main.search(query, fresh))


@pytest.fixture
def many(tiny: main.Model) -> Callable[..., main.Engine]:
    """many(n): the engine of a catalogue with n random vectors and a file for each, searched by codes."""

    def make(n: int) -> main.Engine:
        store = main.Store(Path("index", tiny.identity), tiny.identity, DIM)
        store.repair()
        x = directions(n, seed=1).astype(np.float16)
        Path("images").mkdir()
        pictures = []
        for i in range(n):
            path = Path("images", f"{i}.bmp")
            path.touch()
            file = main.File(os.fsencode(path.name), 0, path.stat().st_mtime_ns)
            pictures.append(main.Picture(file, i.to_bytes(main.DIGEST_BYTES, "big"), vector=x[i]))
        store.save(pictures)
        return main.initialize_reverse_image_search("images", "index", model=tiny, work=replace(CODED, update=False))

    return make


def test_the_codes_find_nearly_all_and_say_how_many(many: Any) -> None:
    engine, xq = many(6000), directions(100, seed=2)
    assert engine.index.trained == 6000 and main.RECALL <= engine.index.recall <= 1
    assert engine.summary.recall == engine.index.recall
    found = [set(rows_of(it)) for it in results(engine, xq, 10)]
    true = [set(rows_of(it)) for it in results(replace(engine, exact=True), xq, 10)]
    xb = all_vectors(engine)
    assert true == [set(np.argsort(-(xb @ q))[:10].tolist()) for q in xq]
    assert np.mean([len(f & t) / 10 for f, t in zip(found, true)]) >= 0.995


def test_the_shortlist_grows_until_the_recall_holds(many: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "SHORTLIST", 4)
    engine = many(3000)
    assert engine.index.shortlist > 16 and engine.index.recall >= main.RECALL
    monkeypatch.setattr(main, "LONGEST_SHORTLIST", 10)
    index = main.coded_index(engine.store)
    assert (index.faiss.ntotal, index.shortlist) == (3000, 8) and index.recall < main.RECALL


def test_scores_are_those_of_the_features_and_never_of_the_codes(many: Any) -> None:
    engine = many(2000)
    xb, xq = all_vectors(engine), directions(40, seed=2)
    for q, scored in zip(xq, results(engine, xq, 10)):
        np.testing.assert_allclose([it.score for it in scored], xb[rows_of(scored)] @ q, atol=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_top_k_begins_top_k_plus_n(exact: bool, many: Any, ask: Any) -> None:
    engine = replace(many(1500), exact=exact)
    longest = ask(engine, 600)  # more than the codes are asked for
    assert len(longest) == 600
    for k in (1, 2, 3, 10, 11, 12, 13, 30, 100, 400, 500):
        assert ask(engine, k) == longest[:k]


@pytest.mark.parametrize("work", [main.Work(), CODED], ids=["exact", "codes"])
def test_top_k_begins_top_k_plus_n_among_copies_that_all_score_1(
    work: main.Work, tiny: main.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 makes a vector as long as 1.0001: of products beyond 1 the larger one is no better."""
    monkeypatch.setattr(main, "SHORTLIST", 16)
    monkeypatch.setattr(main, "RECALL", 0.0)
    path, original = put(0), noise(0)
    for i in range(200):
        pixels = original.copy() if i < 120 else noise(i)
        pixels[i % 8, i // 8 % 8, i // 64 % 3] ^= 1
        Image.fromarray(pixels).save(path.with_name(f"copy {i}.bmp"))
    engine = main.initialize_reverse_image_search("images", "index", model=tiny, work=work)
    longest = next(main.search(path, engine, k=150, views="none")).matches
    assert sum(match.score >= 1 for match in longest) > 5
    for k in (*range(1, 40), 60, 100, 120):
        assert next(main.search(path, engine, k=k, views="none")).matches == longest[:k]


def test_a_short_list_that_missed_a_match_still_begins_every_longer_one(
    many: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes are looked at in steps; a later one finds what an earlier one has missed, and that comes too late."""
    monkeypatch.setattr(main, "CLOSELY", 2)
    engine = many(3000)
    engine = replace(engine, index=engine.index._replace(shortlist=12))
    xq = directions(30, seed=5)
    longest = [rows_of(it) for it in results(engine, xq, 1000)]
    exact = [rows_of(it) for it in results(replace(engine, exact=True), xq, 5)]
    assert [row[:5] for row in longest] != exact
    assert all(len(row) == len(set(row)) >= 500 for row in longest)
    for k in (1, 2, 5, 12, 40, 100, 300):
        assert [rows_of(it) for it in results(engine, xq, k)] == [row[:k] for row in longest]


def test_a_query_is_answered_alike_alone_and_among_others(many: Any) -> None:
    engine = many(1500)
    queries = [put(20_000 + i, Path("queries")) for i in range(40)]
    together = list(main.search(queries, engine))
    assert [next(main.search(query, engine)) for query in queries] == together


def test_what_is_gone_leaves_room_for_what_is_there(
    tiny: main.Model, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all that the codes hold nearest is gone."""
    monkeypatch.setattr(main, "CLOSELY", 2)
    scores = scores_of(10_000, list(range(200)), tiny)
    for seed in range(200):
        put(seed)
    engine = main.initialize_reverse_image_search("images", "index", model=tiny, work=CODED)
    ranked = [path for path, _ in ranking(scores, 200)]
    for path in ranked[:120]:
        Path(path).rename(Path(path).with_suffix(".away"))
        scores.pop(path)
    os.makedirs("away")
    for path in Path("images").glob("*.away"):
        path.rename(Path("away", path.name))
    engine = main.initialize_reverse_image_search("images", "index", model=tiny, work=CODED)
    assert ask(replace(engine, index=engine.index._replace(shortlist=20)), 2) == ranking(scores, 2)
    assert ask(engine) == ranking(scores)


def test_codes_are_appended_and_only_trained_again_when_outgrown(tiny: main.Model) -> None:
    trained = []
    for n in (80, 100, 160, 161, 200):
        for seed in range(n):
            path = Path(f"images/{seed}.bmp")
            path.exists() or put(seed)
        index = main.initialize_reverse_image_search("images", "index", model=tiny, work=CODED).index
        assert index.last == index.faiss.ntotal == n
        trained.append(index.trained)
    assert trained == [80, 80, 80, 161, 161]


def test_adding_reads_no_feature_that_was_there(tiny: main.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(100):
        put(seed)
    main.initialize_reverse_image_search("images", "index", model=tiny, work=CODED)
    blocks, starts = main.Store.blocks, list[int]()
    monkeypatch.setattr(main.Store, "blocks", lambda self, *rows: [starts.append(rows[0]), blocks(self, *rows)][1])
    put(100)
    main.initialize_reverse_image_search("images", "index", model=tiny, work=CODED)
    assert starts == [101]


def test_the_kind_of_index_follows_the_size(tiny: main.Model, ask: Any) -> None:
    for seed in range(100):
        put(seed)
    expected = ranking(scores_of(10_000, list(range(100)), tiny))
    for work in (main.Work(), CODED, main.Work(exact_bytes=99 * DIM * 2), main.Work(exact_bytes=100 * DIM * 2), CODED):
        engine = main.initialize_reverse_image_search("images", "index", model=tiny, work=work)
        assert bool(engine.index.shortlist) == (work.exact_bytes < 100 * DIM * 2)
        assert ask(engine) == expected


def test_exact_compares_with_all_whatever_the_codes_say(many: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "CLOSELY", 2)
    engine = many(3000)
    by_codes = replace(engine, index=engine.index._replace(shortlist=12))
    xq = directions(30, seed=5)
    one, other = ([rows_of(it) for it in results(e, xq, 1)] for e in (by_codes, replace(by_codes, exact=True)))
    assert other == [[int((all_vectors(engine) @ q).argmax())] for q in xq] != one


@pytest.fixture
def coded(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """coded(*args): the command line, with every collection searched by codes."""
    monkeypatch.setattr(main, "Work", partial(main.Work, exact_bytes=0))
    return lambda *args: run("--model", "offline", "--json", *args)


def test_the_summary_tells_how_the_index_was_searched(coded: Any, collection: Any) -> None:
    collection(80)
    draw(3).resize((48, 32)).save("query.png")
    by_codes, exact = coded("query.png"), coded("query.png", "--exact")
    assert by_codes.stdout == exact.stdout != ""
    assert re.search(r"compact codes .* recall@10 1\.000; --exact", by_codes.stderr)
    assert "compact codes" not in exact.stderr


# ---- Damage that is found when a feature is used ---------------------------------------------------------------------


def test_a_broken_feature_is_never_answered_from_and_alone_extracted_again(
    tiny: main.Model, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a collection too large to check all on opening."""
    monkeypatch.setattr(main, "CHECKED_BYTES", 0)
    for seed in range(100):
        put(seed)
    expected = ranking(scores_of(10_000, list(range(100)), tiny))
    engine = main.initialize_reverse_image_search("images", "index", model=tiny, work=CODED)
    with engine.store.db:
        engine.store.db.execute("UPDATE features SET checksum = checksum + 1 WHERE row = 40")
    with pytest.raises(main.DeepVisionError, match=r"1 feature did not match the checksum.*Start again"):
        ask(engine, 100)
    engine = main.initialize_reverse_image_search("images", "index", model=tiny, work=CODED)
    assert (engine.summary.opened, engine.store.count("features")) == (1, 100)
    assert ask(engine) == expected


# ---- Without an update -----------------------------------------------------------------------------------------------

ASK = ("--model", "offline", "--no-update", "--json", "--views", "none")


def paths(outcome: Outcome) -> list[str]:
    assert outcome.status == 0, outcome.stderr
    return [match["path"] for line in outcome.stdout.splitlines() for match in json.loads(line)["matches"]]


def test_without_an_update_what_is_new_is_not_seen_and_what_is_gone_or_changed_is_left_out(
    run: Callable[..., Outcome], collection: Any
) -> None:
    images = collection(6)
    draw(0).resize((48, 32)).save("query.png")
    run("--model", "offline", "--index-only")
    before = paths(run("query.png", *ASK))
    assert sorted(before) == [f"bulk_images/{i}.png" for i in range(6)]
    shutil.copy("query.png", images / "new.png")
    (images / "2.png").unlink()
    draw(77).save(images / "3.png")
    outcome = run("query.png", *ASK)
    assert paths(outcome) == [path for path in before if path[-5] not in "23"]
    assert "6 images" in outcome.stderr and "without a look at" in outcome.stderr
    assert paths(run("query.png", "--model", "offline", "--json"))[0] == "bulk_images/new.png"


def test_without_an_update_there_must_be_an_index(run: Callable[..., Outcome], collection: Any) -> None:
    collection(2)
    outcome = run("query.png", *ASK)
    assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1)
    assert "run without --no-update" in outcome.stderr and not Path("image_index").exists()


def test_no_update_in_another_folder_than_the_indexed_one_is_said(
    run: Callable[..., Outcome], collection: Callable[[int], Path]
) -> None:
    images = collection(4)
    run("--model", "offline", "--index-only")
    (other := Path("other")).mkdir()
    said = "has none of the first images that its index knows"
    assert said in run(*ASK, images / "1.png", "--images", other).stderr
    assert said not in run(*ASK, images / "1.png").stderr


@pytest.mark.parametrize("option", ["--index-only", "--rebuild", "--prune"])
def test_no_update_contradicts_what_updates(option: str, run: Callable[..., Outcome]) -> None:
    outcome = run("--no-update", option)
    assert outcome.status == 2 and "--no-update goes without" in outcome.stderr


def test_without_an_update_nobody_is_waited_for(
    run: Callable[..., Outcome], collection: Any, program: Callable[..., subprocess.Popen[str]]
) -> None:
    """Even while another run adds features that the index does not have yet."""
    images = collection(4)
    run("--model", "offline", "--index-only")
    draw(50).save(images / "new.png")
    model = main.load_model("offline")
    (folder,) = Path("image_index").iterdir()
    store = main.Store(folder, model.identity, model.dim)
    store.scan(main.find_images(images, print), everything=False)
    (file,) = store.unread()
    with store.locked():
        store.save([main.Picture(file, bytes(16), vector=np.ones(model.dim, np.float16))])
        outcome = run("bulk_images/0.png", *ASK)
    assert {f"bulk_images/{i}.png" for i in (1, 2, 3)} <= set(paths(outcome)) and "waiting" not in outcome.stderr


# ---- Export ----------------------------------------------------------------------------------------------------------


def exported(folder: str = "out") -> tuple[np.ndarray, list[bytes]]:
    lines = Path(folder, "paths.txt").read_bytes().split(b"\n")
    assert lines.pop() == b""
    return np.load(Path(folder, "features.npy")), lines


def unescaped(line: bytes) -> bytes:
    return re.sub(rb"\\(.)", lambda m: {b"n": b"\n", b"r": b"\r"}.get(m[1], m[1]), line)


def test_export_writes_a_vector_and_a_path_for_every_image(run: Callable[..., Outcome], collection: Any) -> None:
    images = collection(20)
    shutil.copy(images / "3.png", images / "copy.png")
    for name in (b"new\nline.png", b"back\\slash.png", b"caf\xe9.png", b"return\r.png"):
        draw(40).save(os.path.join(os.fsencode(images), name), "PNG")
    run("--model", "offline", "--index-only")
    (images / "5.png").unlink()
    outcome = run("--model", "offline", "--export", "out")
    assert (outcome.status, outcome.stdout) == (0, "") and "24 × 868" in outcome.stderr
    features, lines = exported()
    assert features.dtype == np.float16 and features.shape == (24, 868)
    names = sorted(os.listdir(os.fsencode(images)))
    assert sorted(map(unescaped, lines)) == names
    files = [os.path.join(os.fsencode(images), unescaped(line)) for line in lines]
    again = main.extract_features_batch([os.fsdecode(file) for file in files], main.load_model("offline"))
    np.testing.assert_allclose(features, again, atol=1e-3)


def test_an_export_that_fails_leaves_no_features_beside_other_paths(
    run: Callable[..., Outcome], collection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection(3)
    assert run("--model", "offline", "--export", "out").status == 0

    def full(*_: Any) -> Iterator[np.ndarray]:
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(main.Store, "blocks", full)
    outcome = run("--model", "offline", "--export", "out")
    assert outcome.status == 1 and "No space left" in outcome.stderr and "Traceback" not in outcome.stderr
    assert os.listdir("out") == ["paths.txt"]  # of the export before


def test_an_export_loads_into_a_vector_database(run: Callable[..., Outcome], collection: Any) -> None:
    lancedb = pytest.importorskip("lancedb", reason="pip install lancedb")
    collection(30)
    run("--model", "offline", "--export", "out")
    features, lines = exported()
    rows = [{"vector": v.astype(np.float32), "path": os.fsdecode(line)} for v, line in zip(features, lines)]
    table = lancedb.connect("database").create_table("images", rows)
    for row in (0, 7, 29):
        found = table.search(features[row].astype(np.float32)).distance_type("cosine").limit(3).to_list()
        (answer,) = main.search(f"bulk_images/{rows[row]['path']}", k=2, views="none")
        assert [f"bulk_images/{match['path']}" for match in found[1:]] == [match.path for match in answer.matches]


# ---- GPUs, with what stands for them ---------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two GPUs as far as the choice goes: their indexes are in memory, and have no selection and few results."""
    import faiss

    state: dict[str, Any] = {"free": 10 << 30, "sizes": []}

    class OnGpu(faiss.IndexFlatIP):
        def search(self, xq: Any, k: int, **options: Any) -> Any:
            assert k <= 2048 and not options
            return super().search(xq, k)

    def make(resources: Any, dim: int, config: Any) -> Any:
        assert config.useFloat16 and config.device in (0, 1)
        state["sizes"].append(config.device)
        return OnGpu(dim)

    for name, value in {
        "get_num_gpus": lambda: 2,
        "StandardGpuResources": lambda: None,
        "GpuIndexFlatConfig": types.SimpleNamespace,
        "GpuIndexFlatIP": make,
    }.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (state["free"], 80 << 30))
    return state


def test_on_gpus_the_answers_are_the_same(many: Any, gpus: dict[str, Any]) -> None:
    engine, xq = many(3000), directions(main.GPU_QUERIES, seed=5)
    on_gpus = results(engine, xq, 10)
    assert gpus["sizes"] == [0, 1] and engine.on_gpus.ntotal == 3000
    assert on_gpus == results(replace(engine, exact=True), xq, 10)


def test_few_queries_are_not_worth_the_loading(many: Any, gpus: dict[str, Any]) -> None:
    results(many(200), directions(main.GPU_QUERIES - 1, seed=5), 10)
    assert gpus["sizes"] == []


def test_what_does_not_fit_on_the_gpus_is_searched_by_the_processor_and_said_once(
    many: Any, gpus: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    gpus["free"], engine = 1 << 30, many(200)
    for _ in range(2):
        results(engine, directions(main.GPU_QUERIES, seed=5), 10)
    assert gpus["sizes"] == [] and caplog.text.count("do not fit on the GPU") == 1


# ---- While another run is at work ------------------------------------------------------------------------------------


def opened(tiny: main.Model, **work: Any) -> main.Engine:
    return main.initialize_reverse_image_search("images", "index", model=tiny, work=main.Work(exact_bytes=0, **work))


@pytest.mark.parametrize("n", [10, 80], ids=["exact", "codes"])
def test_an_open_engine_answers_rightly_whatever_other_runs_do(n: int, tiny: main.Model, ask: Any) -> None:
    """Rows that its index lacks are compared one by one; rows that are gone name no file."""
    for seed in range(n):
        put(seed)
    engine, there, seeds = opened(tiny), set(range(n)), itertools.count(500)
    for act in ("add", "prune", "rebuild", "add"):
        if act == "add":
            for seed in itertools.islice(seeds, 2):
                put(seed)
                there.add(seed)
        gone = min(there)
        there.remove(gone)
        Path(f"images/{gone}.bmp").unlink()
        opened(tiny, prune=act == "prune", rebuild=act == "rebuild")
        assert ask(engine) == ranking(scores_of(10_000, sorted(there), tiny))


def test_rebuild_and_prune_go_together(tiny: main.Model) -> None:
    for seed in range(5):
        put(seed)
    opened(tiny)
    Path("images/0.bmp").unlink()
    assert opened(tiny, rebuild=True, prune=True).summary.forgotten == 1


def test_others_may_save_during_a_scan(tiny: main.Model) -> None:
    for seed in range(5):
        put(seed)
    opened(tiny)
    scanning, saving = (main.Store(Path("index", tiny.identity), tiny.identity, DIM) for _ in range(2))
    saving.db.execute("PRAGMA busy_timeout = 100")

    def files() -> Iterator[main.File]:
        for file in main.find_images("images", print):
            yield file
            with saving.locked():
                saving.save([main.Picture(main.File(b"another", 1, 1))])

    assert scanning.scan(files(), everything=False) == 1  # it is not in the folder


def test_without_an_update_an_index_of_nothing_is_one_line(tiny: main.Model) -> None:
    store = main.Store(Path("index", tiny.identity), tiny.identity, DIM)
    store.repair()
    store.close()
    with pytest.raises(main.DeepVisionError, match="no features yet: run without --no-update"):
        opened(tiny, update=False)


def test_an_export_of_damaged_features_is_one_line(
    run: Callable[..., Outcome], collection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "CHECKED_BYTES", 0)
    collection(60)
    run("--model", "offline", "--index-only")
    with sqlite3.connect(next(Path("image_index").glob("*/index.sqlite"))) as db:
        db.execute("UPDATE features SET checksum = checksum + 1 WHERE row = 7")
    outcome = run("--model", "offline", "--export", "out")
    assert outcome.status == 1 and "Traceback" not in outcome.stderr, outcome
    assert outcome.stderr.splitlines()[-1].startswith("error: --export out: 1 feature")
