"""The store: what a run costs after another one, and what becomes of the answers when things go wrong in between."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import pytest
import torch
import torchvision
from conftest import MAIN, Outcome, draw

import main

IMAGES, INDEX = Path("bulk_images"), Path("image_index")
N = 6  # pictures in the collection to begin with
ASK = ("--model", "offline", "--json", "--views", "none")
SUMMARY = re.compile(
    r"(?P<found>\d+) found, (?P<new>\d+) new( \((?P<recognised>\d+) recognised by content\))?, (?P<unchanged>\d+) "
    r"unchanged, (?P<skipped>\d+) skipped, (?P<gone>\d+) gone(?:, \d+ forgotten)?; (?P<opened>no image was opened)?"
)
Run = Callable[..., Outcome]
Index = Callable[..., dict[str, int]]


def counts(outcome: Outcome) -> dict[str, int]:
    """The figures of the summary that are not 0; `opened` is 1 if any file was opened."""
    found = SUMMARY.search(outcome.stderr)
    assert found, outcome
    figures = {name: int(value or 0) for name, value in found.groupdict().items() if name != "opened"}
    return {name: value for name, value in {**figures, "opened": int(not found["opened"])}.items() if value}


def answers_of(outcome: Outcome) -> list[dict[str, Any]]:
    """What was printed as JSON, with scores that allow for other rounding in another batch."""
    assert outcome.status == 0, outcome
    answers = [json.loads(line) for line in outcome.stdout.splitlines()]
    for match in (match for answer in answers for match in answer["matches"]):
        match["score"] = pytest.approx(match["score"], abs=2e-3)
    return answers


def cache_folder(index_dir: Path = INDEX) -> Path:
    (folder,) = index_dir.iterdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(folder: Path) -> int:
    """How many features are stored."""
    with closing(sqlite3.connect(folder / "index.sqlite")) as db:
        return db.execute("SELECT count(*) FROM features").fetchone()[0]


def edit(database: Path, *statements: str) -> None:
    db = sqlite3.connect(database)
    with db:
        for statement in statements:
            assert db.execute(statement).rowcount, statement
    db.close()


@pytest.fixture
def index(run: Run, collection: Callable[[int], Path]) -> Index:
    """index(*options): bring the index of `bulk_images` up to date; the figures of the summary."""
    collection(N)

    def call(*options: object) -> dict[str, int]:
        outcome = run("--model", "offline", "--index-only", *options)
        assert (outcome.status, outcome.stdout) == (0, ""), outcome
        return counts(outcome)

    return call


@pytest.fixture
def answers(run: Run) -> Callable[..., list[dict[str, Any]]]:
    """answers(*options): to two queries from outside of the collection, one of them 0.png in half the size."""
    draw(0).resize((48, 32)).save("small.png")
    draw(100).save("other.png")
    return lambda *options: answers_of(run(*ASK, "small.png", "other.png", *options))


@pytest.fixture
def fresh(answers: Callable[..., list[dict[str, Any]]]) -> Callable[..., list[dict[str, Any]]]:
    """fresh(*options): the answers of an index that is made from nothing."""
    return lambda *options: answers("--index-dir", tempfile.mkdtemp(), *options)


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """extracted(): of how many images features were extracted since it was last asked."""
    extract, sizes = main.launch, list[int]()
    monkeypatch.setattr(main, "launch", lambda x, *rest: [sizes.append(len(x)), extract(x, *rest)][1])

    def total() -> int:
        count = sum(sizes)
        sizes.clear()
        return count

    return total


# ---- What a run costs after another ----------------------------------------------------------------------------------


def test_a_second_run_opens_no_image(index: Index, extracted: Callable[[], int]) -> None:
    assert (index(), extracted()) == ({"found": N, "new": N, "opened": 1}, N)
    assert (index(), extracted()) == ({"found": N, "unchanged": N}, 0)


def test_a_second_run_would_not_even_see_other_bytes_of_the_same_size_and_time(index: Index, answers: Any) -> None:
    index()
    before = answers()
    for path in IMAGES.iterdir():
        info = path.stat()
        path.write_bytes(bytes(info.st_size))
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert answers() == before
    assert index() == {"found": N, "unchanged": N}


def test_the_same_folder_under_another_name_is_not_doubled(index: Index, extracted: Callable[[], int]) -> None:
    index()
    Path("link").symlink_to(IMAGES)
    for same in (IMAGES.absolute(), "./bulk_images/", "link", "bulk_images/../bulk_images"):
        assert index("--images", same) == {"found": N, "unchanged": N}
    assert extracted() == N


def add() -> None:
    draw(50).save(IMAGES / "added.png")


def change() -> None:
    draw(50).save(IMAGES / "0.png")


def change_back_in_time() -> None:
    change()
    os.utime(IMAGES / "0.png", (1e9, 1e9))


def remove() -> None:
    (IMAGES / "0.png").unlink()


def touch() -> None:
    os.utime(IMAGES / "0.png", (1e9, 1e9))


def rename() -> None:
    (IMAGES / "0.png").rename(IMAGES / "renamed.png")


def swap() -> None:
    for old, new in ("0.png", "swapping"), ("1.png", "0.png"), ("swapping", "1.png"):
        (IMAGES / old).rename(IMAGES / new)


def move() -> None:
    (IMAGES / "deep" / "deeper").mkdir(parents=True)
    for name in ("0.png", "1.png"):
        (IMAGES / name).rename(IMAGES / "deep" / "deeper" / name)


def copy() -> None:
    shutil.copy(IMAGES / "0.png", IMAGES / "copy.png")


def replace_by_a_copy() -> None:
    shutil.copy(IMAGES / "0.png", IMAGES / "1.png")


def ruin() -> None:
    (IMAGES / "0.png").write_bytes(b"no longer an image")


@pytest.mark.parametrize(
    ("alter", "figures", "extractions"),
    [
        (add, {"found": N + 1, "new": 1, "unchanged": N}, 1),
        (change, {"found": N, "new": 1, "unchanged": N - 1}, 1),
        (change_back_in_time, {"found": N, "new": 1, "unchanged": N - 1}, 1),
        (remove, {"found": N - 1, "unchanged": N - 1, "gone": 1}, 0),
        (touch, {"found": N, "new": 1, "recognised": 1, "unchanged": N - 1}, 0),
        (rename, {"found": N, "new": 1, "recognised": 1, "unchanged": N - 1}, 0),
        (swap, {"found": N, "new": 2, "recognised": 2, "unchanged": N - 2}, 0),
        (move, {"found": N, "new": 2, "recognised": 2, "unchanged": N - 2}, 0),
        (copy, {"found": N + 1, "new": 1, "recognised": 1, "unchanged": N}, 0),
        (replace_by_a_copy, {"found": N, "new": 1, "recognised": 1, "unchanged": N - 1}, 0),
        (ruin, {"found": N, "unchanged": N - 1, "skipped": 1}, 0),
    ],
)
def test_only_what_is_new_is_extracted(
    alter: Callable[[], None],
    figures: dict[str, int],
    extractions: int,
    index: Index,
    extracted: Callable[[], int],
    answers: Any,
    fresh: Any,
) -> None:
    index()
    extracted()
    alter()
    after = index()
    after.pop("opened", None)
    assert (after, extracted()) == (figures, extractions)
    assert answers() == fresh()


def test_a_hidden_folder_that_returns_costs_nothing(index: Index, extracted: Callable[[], int], answers: Any) -> None:
    move()
    index()
    before = answers()
    extracted()
    (IMAGES / "deep").rename("hidden")
    assert index() == {"found": N - 2, "unchanged": N - 2, "gone": 2}
    assert {match["path"] for answer in answers() for match in answer["matches"]} == {
        str(IMAGES / f"{seed}.png") for seed in range(2, N)
    }
    Path("hidden").rename(IMAGES / "deep")
    extracted()
    assert (index(), extracted()) == ({"found": N, "unchanged": N}, 0)
    assert answers() == before


def test_a_collection_can_move_together_with_its_cache(index: Index, extracted: Callable[[], int]) -> None:
    move()
    index()
    extracted()
    Path("elsewhere").mkdir()
    IMAGES.rename("elsewhere/pictures")
    INDEX.rename("elsewhere/cache")
    options = ("--images", "elsewhere/pictures", "--index-dir", "elsewhere/cache")
    assert (index(*options), extracted()) == ({"found": N, "unchanged": N}, 0)


# ---- What is forgotten, and what never -------------------------------------------------------------------------------


def test_prune_forgets_what_is_gone(index: Index, extracted: Callable[[], int], answers: Any, fresh: Any) -> None:
    index()
    (IMAGES / "0.png").rename("away.png")
    assert index("--prune") == {"found": N - 1, "unchanged": N - 1}
    assert rows_of(cache_folder()) == N - 1
    assert answers() == fresh()
    Path("away.png").rename(IMAGES / "0.png")
    extracted()
    index()
    assert extracted() == 1


def test_prune_keeps_the_features_of_a_copy_that_is_left(index: Index, extracted: Callable[[], int]) -> None:
    copy()
    index()
    extracted()
    remove()
    assert index("--prune") == {"found": N, "unchanged": N}
    shutil.copy(IMAGES / "copy.png", IMAGES / "0.png")
    assert (index()["found"], extracted()) == (N + 1, 0)


def test_without_prune_the_features_of_a_removed_image_are_kept(index: Index, extracted: Callable[[], int]) -> None:
    index()
    (IMAGES / "0.png").rename("away.png")
    index()
    Path("away.png").rename(IMAGES / "back under another name.png")
    extracted()
    assert (index()["recognised"], extracted()) == (1, 0)


def unplugged() -> None:
    IMAGES.rename("away")


def emptied() -> None:
    IMAGES.rename("away")
    IMAGES.mkdir()


def emptied_but_for_junk() -> None:
    emptied()
    for name in ("Thumbs.db", ".DS_Store", "notes.txt"):
        (IMAGES / name).write_text("junk")


@pytest.mark.parametrize("option", [(), ("--prune",), ("--rebuild",)], ids=["plain", "--prune", "--rebuild"])
@pytest.mark.parametrize("vanish", [unplugged, emptied, emptied_but_for_junk])
def test_an_unplugged_drive_costs_nothing(
    vanish: Callable[[], None], option: tuple[str, ...], index: Index, run: Run, answers: Any
) -> None:
    index()
    before, stored = answers(), rows_of(cache_folder())
    vanish()
    outcome = run("--model", "offline", "--index-only", *option)
    assert (outcome.status, outcome.stdout) == (1, "")
    assert re.search(r"^error: bulk_images/? .*(the index knows 6|nothing was pruned)", outcome.stderr, re.MULTILINE)
    assert rows_of(cache_folder()) == stored
    shutil.rmtree(IMAGES, ignore_errors=True)
    Path("away").rename(IMAGES)
    assert index() == {"found": N, "unchanged": N}
    assert answers() == before


def test_a_folder_that_cannot_be_listed_is_not_pruned(index: Index, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    move()
    index()
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:
        if os.fsdecode(path).endswith("deeper"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        outcome = run("--model", "offline", "--index-only")
        assert outcome.status == 0 and "deeper" in outcome.stderr and "Permission denied" in outcome.stderr
        outcome = run("--model", "offline", "--index-only", "--prune")
        assert outcome.status == 1 and "deeper" in outcome.stderr
    assert index() == {"found": N, "unchanged": N}


# ---- Files that cannot be used ---------------------------------------------------------------------------------------


@pytest.fixture
def bad(index: Index) -> Path:
    """A file of the collection that begins like 5.png and ends early, after a first run."""
    path = IMAGES / "bad.png"
    path.write_bytes((IMAGES / "5.png").read_bytes()[:200])
    assert index() == {"found": N + 1, "new": N, "skipped": 1, "opened": 1}
    return path


def test_a_bad_file_is_remembered_with_its_reason(bad: Path, index: Index, run: Run) -> None:
    assert index() == {"found": N + 1, "unchanged": N, "skipped": 1}
    assert re.search(r"bad\.png: .*truncated", run("--model", "offline", "--index-only", "-v").stderr)


def test_a_bad_file_is_read_again_when_it_has_changed(bad: Path, index: Index) -> None:
    draw(50).save(bad)
    assert index() == {"found": N + 1, "new": 1, "unchanged": N, "opened": 1}


def test_a_bad_file_is_read_again_by_other_decoders(bad: Path, index: Index) -> None:
    edit(cache_folder() / "index.sqlite", "UPDATE meta SET value = 'an older Pillow' WHERE key = 'decoders'")
    assert index() == {"found": N + 1, "unchanged": N, "skipped": 1, "opened": 1}
    assert index() == {"found": N + 1, "unchanged": N, "skipped": 1}


def test_a_file_that_was_never_an_image_is_not_opened_again(index: Index) -> None:
    (IMAGES / "notes.txt").write_text("buy milk")
    assert index() == {"found": N, "new": N, "opened": 1}
    assert index() == {"found": N, "unchanged": N}


@contextmanager
def unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For root nothing is unreadable, so that for root it is simulated."""
    real = os.open

    def refusing(name: Any, *args: Any, **options: Any) -> int:
        if os.fsdecode(name).endswith(path.name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return real(name, *args, **options)

    with monkeypatch.context() as patch:
        path.chmod(0)
        patch.setattr(os, "open", refusing if os.geteuid() == 0 else real)
        yield
    path.chmod(0o644)


def test_an_unreadable_file_is_tried_again(index: Index, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with unreadable(IMAGES / "3.png", monkeypatch):
        assert index() == {"found": N, "new": N - 1, "skipped": 1, "opened": 1}
        assert "3.png: Permission denied" in run("--model", "offline", "--index-only", "-v").stderr
        assert index() == {"found": N, "unchanged": N - 1, "skipped": 1, "opened": 1}
    assert index() == {"found": N, "new": 1, "unchanged": N - 1, "opened": 1}


def at_extraction(number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen just before the features of a batch are extracted."""
    extract, remaining = main.launch, iter(range(number, 0, -1))

    def extract_and_act(*args: Any) -> Any:
        if next(remaining, None) == 1:
            act()
        return extract(*args)

    monkeypatch.setattr(main, "launch", extract_and_act)


def test_a_file_that_vanishes_meanwhile_is_only_missing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    last = IMAGES / "z.png"
    draw(50).save(last)
    at_extraction(1, last.unlink, monkeypatch)
    assert index("--batch-size", 1, "--workers", 1) == {"found": N, "new": N, "opened": 1}
    draw(50).save(last)
    assert index() == {"found": N + 1, "new": 1, "unchanged": N, "opened": 1}


# ---- Models never mix ------------------------------------------------------------------------------------------------

TWINS = {"a": ("shufflenet_v2_x0_5", 1), "b": ("shufflenet_v2_x1_0", 1), "c": ("shufflenet_v2_x0_5", 2)}  # of 1024 each


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """Two models, and one of them with other weights, of equal dimension: their options."""
    folder, options = tmp_path_factory.mktemp("weights"), {}
    for key, (name, seed) in TWINS.items():
        torch.manual_seed(seed)
        torch.save(torchvision.models.get_model(name, weights=None).state_dict(), folder / key)
        options[key] = ("--model", name, "--weights", str(folder / key))
    return options


@pytest.mark.parametrize("other", ["b", "c"], ids=["another model", "other weights"])
def test_models_of_equal_dimension_never_mix(
    other: str, twins: dict[str, tuple[str, ...]], collection: Callable[[int], Path], run: Run
) -> None:
    collection(3)
    draw(100).save("query.png")

    def ask(model: str, *options: object) -> Outcome:
        return run("query.png", "--json", "--views", "none", *twins[model], *options)

    expected = {model: answers_of(ask(model, "--index-dir", f"only {model}")) for model in ("a", other)}
    assert expected["a"][0]["matches"] != expected[other][0]["matches"]
    assert counts(ask("a")) == counts(ask(other)) == {"found": 3, "new": 3, "opened": 1}
    for model in ("a", other):  # switching back is free
        again = ask(model)
        assert (answers_of(again), counts(again)) == (expected[model], {"found": 3, "unchanged": 3})

    one, two = sorted(INDEX.iterdir())
    shutil.rmtree(two)
    shutil.copytree(one, two)
    for model in ("a", other):
        assert answers_of(ask(model)) == expected[model]


# ---- Damage ----------------------------------------------------------------------------------------------------------


class Original(NamedTuple):
    """A cache in good order, and what to damage it with. All of it is copied before use."""

    cache: Path
    older: Path  # a copy from when there were fewer images
    sibling: Path  # a copy that took in other images since then, as many
    other: Path  # of another model of equal dimension
    images: Path
    queries: tuple[Path, Path]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, twins: dict[str, tuple[str, ...]]) -> Original:
    here = tmp_path_factory.mktemp("original")
    names = ("cache", "older", "sibling", "other", "images")
    cache, older, sibling, other, images = (here / name for name in names)
    queries = (here / "small.png", here / "unknown.png")
    draw(0).resize((48, 32)).save(queries[0])
    draw(100).save(queries[1])

    def put(*seeds: int) -> None:
        shutil.rmtree(images, ignore_errors=True)
        images.mkdir()
        for seed in seeds:
            draw(seed).save(images / f"{seed}.png")

    def update(index_dir: Path, *options: str) -> None:
        assert main.main(["-q", "--index-only", "--images", str(images), "--index-dir", str(index_dir), *options]) == 0

    put(0, 1, 2, 3)
    (images / "notes.txt").write_text("not an image")
    (images / "bad.png").write_bytes(b"\x89PNG")
    update(cache, "--model", "offline")
    shutil.copytree(cache, older)
    shutil.copytree(cache, sibling)
    put(*range(20, 28))
    update(sibling, "--model", "offline")
    put(*range(12))
    update(cache, "--model", "offline")
    update(other, *twins["a"])
    return Original(cache, older, sibling, other, images, queries)


FILES = ("index.sqlite", "index.faiss")


def truncate(share: float, path: Path, original: Original) -> None:
    os.truncate(path, int(share * path.stat().st_size) if share < 1 else path.stat().st_size - 1)


def flip(seed: int, path: Path, original: Original) -> None:
    data, place = bytearray(path.read_bytes()), random.Random(f"{path.name} {seed}")
    data[place.randrange(len(data))] ^= 1 << place.randrange(8)
    path.write_bytes(data)


def overwrite(seed: int, path: Path, original: Original) -> None:
    data, place = bytearray(path.read_bytes()), random.Random(f"{path.name} {seed}")
    start = place.randrange(len(data))
    data[start : start + 512] = place.randbytes(len(data[start : start + 512]))
    path.write_bytes(data)


def take_from(source: str, path: Path, original: Original) -> None:
    shutil.copy(cache_folder(getattr(original, source)) / path.name, path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def plant(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


DAMAGE: dict[str, Callable[[Path, Original], None]] = {
    **{f"truncated to {share}": lambda p, o, s=share: truncate(s, p, o) for share in (0, 0.01, 0.5, 0.9, 1)},
    **{f"bit flipped ({seed})": lambda p, o, s=seed: flip(s, p, o) for seed in range(2)},
    **{f"overwritten ({seed})": lambda p, o, s=seed: overwrite(s, p, o) for seed in range(2)},
    "deleted": lambda path, _: path.unlink(),
    "pickled": lambda path, _: plant(path),
    **{f"from {it}": lambda p, o, s=it: take_from(s, p, o) for it in ("older", "sibling", "other")},
}
UNSAID = {  # a missing file is no damage, nor is an older state; a flipped bit may also hit what is never read
    ("index.sqlite", "from older"),
    ("index.sqlite", "from sibling"),
    *((file, "deleted") for file in FILES),
    ("index.sqlite", "truncated to 0"),
    *(("index.sqlite", name) for name in DAMAGE if name.startswith(("bit", "over"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_noticed_and_repaired_and_never_answered_from(
    name: str, damage: str, original: Original, run: Run
) -> None:
    shutil.copytree(original.cache, INDEX)
    shutil.copytree(original.images, IMAGES)
    ask = (*ASK, *original.queries)
    expected = answers_of(run(*ask, "--index-dir", "fresh"))
    DAMAGE[damage](cache_folder() / name, original)

    first = run(*ask, "-q")
    assert answers_of(first) == expected
    draw(20).save(IMAGES / "20.png")  # the sibling has it; and now the index grows
    second = run(*ask, "-q")
    assert answers_of(second) == answers_of(run(*ask, "--index-dir", "fresh"))
    assert "Traceback" not in first.stderr + second.stderr
    assert first.stderr + second.stderr or (name, damage) in UNSAID

    third = counts(run(*ask))
    assert (third["found"], third["unchanged"], "opened" in third) == (13, 13, False)
    assert run(*ask, "-q").stderr == "" and not Path("exploded").exists()


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_changes_an_answer(name: str, original: Original, run: Run) -> None:
    """Nor does it stop a run: wherever it is, but in the bytes that tell the version of the format, or of SQLite's."""
    shutil.copytree(original.cache, INDEX)
    ask = (*ASK, "-q", "--images", original.images, *original.queries)
    expected, places = answers_of(run(*ask)), random.Random(name)
    whole, path = contents(cache_folder()), cache_folder() / name
    used = [
        place
        for place, byte in enumerate(whole[name])
        if byte and place not in {*range(16, 24), *range(44, 48), *range(60, 64)}
    ]
    for place in places.sample(used, 120):
        for other, content in whole.items():
            (path.parent / other).write_bytes(content)
        damaged = bytearray(whole[name])
        damaged[place] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        assert answers_of(run(*ask)) == expected, (place, damaged[place], damaged[max(0, place - 9) : place + 9])


GARBLED = {
    "a statement": (b"CREATE TABLE features", b"CREATE TAB\xccE features"),
    "the name of a table": (b"CREATE TABLE files", b"CREATE TABLE f\xe9les"),
    "the name of a column": (b"size INTEGER", b"\xf3ize INTEGER"),
    "an option": (b"WITHOUT ROWID", b"WITHOUT ROW\xc9D"),
    "a comma": (b"size INTEGER,", b"size INTEGER "),
}


@pytest.mark.parametrize("garbled", GARBLED)
def test_a_garbled_schema_is_made_again(garbled: str, original: Original, run: Run) -> None:
    """Of these Python's sqlite3 raises more kinds of errors than its own."""
    shutil.copytree(original.cache, INDEX)
    path, (old, new) = cache_folder() / "index.sqlite", GARBLED[garbled]
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    ask = (*ASK, "--images", original.images, *original.queries)
    outcome = run(*ask, "-q")
    assert answers_of(outcome) == answers_of(run(*ask, "--index-dir", "fresh"))
    assert "Repaired" in outcome.stderr


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_a_cache_file_is_named_and_left_alone(name: str, original: Original, run: Run) -> None:
    shutil.copytree(original.cache, INDEX)
    path = cache_folder() / name
    path.unlink()
    path.mkdir()
    (path / "mine.txt").write_text("do not delete")
    ask = (*ASK, "-q", "--images", original.images, *original.queries)
    outcome = run(*ask)
    assert outcome.status == 1 and outcome.stdout == "" and outcome.stderr.count("error: ") == 1
    assert str(path.parent) in outcome.stderr and (path / "mine.txt").read_text() == "do not delete"
    shutil.rmtree(path)
    assert answers_of(run(*ask)) == answers_of(run(*ask, "--index-dir", "fresh"))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE meta SET value = 'another model' WHERE key = 'identity'",
        "DELETE FROM meta WHERE key = 'identity'",
        "DELETE FROM meta WHERE key = 'index'",
        "DELETE FROM features WHERE row = 3",
        "UPDATE features SET row = 100 - row",
        "UPDATE features SET row = row + 100 WHERE row = 3",
        "UPDATE features SET digest = zeroblob(16) WHERE row = 3",
        "UPDATE features SET vector = zeroblob(100) WHERE row = 3",
        "UPDATE features SET vector = 'text', checksum = 'text'",
        "UPDATE files SET digest = zeroblob(16) WHERE path = CAST('0.png' AS BLOB)",
        "UPDATE files SET size = 'x'",
        "UPDATE files SET path = CAST(path || 'x' AS BLOB)",
        "DELETE FROM files",
        "DROP TABLE features",
        "DROP INDEX files_by_digest",
        "PRAGMA user_version = 0",
    ],
)
def test_a_store_that_contradicts_itself_is_never_answered_from(statement: str, original: Original, run: Run) -> None:
    shutil.copytree(original.cache, INDEX)
    edit(cache_folder() / "index.sqlite", statement)
    ask = (*ASK, "-q", "--images", original.images, *original.queries)
    assert answers_of(run(*ask)) == answers_of(run(*ask, "--index-dir", "fresh"))


def test_a_cache_that_is_lost_whole_is_made_again(index: Index, answers: Any) -> None:
    index()
    before = answers()
    shutil.rmtree(INDEX)
    assert answers() == before


def test_the_cache_of_a_newer_version_is_refused_and_left_as_it_is(index: Index, run: Run) -> None:
    index()
    edit(cache_folder() / "index.sqlite", "PRAGMA user_version = 99")
    before = contents(INDEX)
    draw(50).save(IMAGES / "added.png")
    for option in ("--index-only", "--rebuild", "--prune"):
        outcome = run("--model", "offline", option)
        assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1)
        assert "newer" in outcome.stderr and "--index-dir" in outcome.stderr
    assert contents(INDEX) == before


@pytest.mark.parametrize("name", [*FILES, "lock", "index.sqlite.part", "index.faiss.part", "index.sqlite-journal"])
def test_a_planted_pickle_never_runs(name: str, index: Index, answers: Any) -> None:
    index()
    before = answers()
    plant(cache_folder() / name)
    assert answers() == before
    assert index() == {"found": N, "unchanged": N}
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["index.sqlite.part", "index.faiss.part", "lock", "rank-1.sqlite"])
def test_what_a_stopped_run_leaves_behind_is_harmless(name: str, index: Index, answers: Any, fresh: Any) -> None:
    index()
    before = answers()
    (cache_folder() / name).write_bytes(b"4194304" if name == "lock" else b"")
    assert answers() == before
    add()
    assert index() == {"found": N + 1, "new": 1, "unchanged": N, "opened": 1}
    assert answers() == fresh()


def test_an_ended_run_leaves_three_files(index: Index, run: Run) -> None:
    for option in ("--index-only", "--prune", "--rebuild"):
        add()
        index(option)
        assert sorted(contents(cache_folder())) == ["index.faiss", "index.sqlite", "lock"]


def test_an_index_of_an_older_format_is_made_anew_and_its_files_go(index: Index, run: Run, answers: Any) -> None:
    index()
    before = answers()
    for path in cache_folder().iterdir():
        path.unlink()
    for name in main.OLD_FILES:
        (cache_folder() / name).write_bytes(b"of an older format")
    outcome = run("--model", "offline", "--index-only")
    assert outcome.stderr.count("older format") == 1 and f"{N} new" in outcome.stderr
    assert sorted(contents(cache_folder())) == ["index.faiss", "index.sqlite", "lock"]
    assert answers() == before


def test_no_row_is_used_twice(index: Index) -> None:
    """A stale FAISS index, of another process say, can miss a file then, but never name a wrong one."""
    index()
    query, number = "SELECT max(row) FROM features", N
    for act in (remove, lambda: index("--prune"), lambda: draw(50).save(IMAGES / "0.png"), lambda: index("--rebuild")):
        act()
        index()
    with closing(sqlite3.connect(cache_folder() / "index.sqlite")) as db:
        assert db.execute(query).fetchone()[0] > number + N
        db.execute("DELETE FROM features WHERE row = (SELECT max(row) FROM features)")
        last = db.execute("SELECT seq FROM sqlite_sequence").fetchone()[0]
        db.execute("INSERT INTO features (digest) VALUES (x'00')")
        assert db.execute(query).fetchone()[0] == last + 1


def test_a_malformed_page_costs_only_what_it_held(tmp_path: Path) -> None:
    store = main.Store(tmp_path / "cache", "a-model", 512)
    store.repair()
    digests = [number.to_bytes(main.DIGEST_BYTES, "big") for number in range(1000)]
    pictures = [
        main.Picture(main.File(b"%d" % i, 1, 1), d, vector=np.ones(512, np.float16)) for i, d in enumerate(digests)
    ]
    store.save(pictures)
    store.close()
    content = bytearray(store.path.read_bytes())
    page = content.find(digests[500] + bytes(np.ones(512, np.float16))) // main.PAGE_BYTES
    content[page * main.PAGE_BYTES :][:64] = os.urandom(64)
    content[page * main.PAGE_BYTES : page * main.PAGE_BYTES + 64] = b"\xff" * 64
    store.path.write_bytes(content)
    store = main.Store(tmp_path / "cache", "a-model", 512)
    store.repair()
    assert 940 < store.count("features") < 1000 and store.count("files") == 1000
    lost = store.count("files WHERE mtime = -1")
    assert lost == 1000 - store.count("features")


# ---- Runs that end early ---------------------------------------------------------------------------------------------

KILLED = """
import collections, json, os, pathlib, random, shutil, sys
root, start, out, trials, *argv = sys.argv[1:]
sys.path.insert(0, root)
import faiss, filelock, numpy, torch, torchvision, tqdm, PIL.Image, PIL.ImageOps, PIL.ImageCms
import main
main.SAVE_SECONDS = 0


def run(index_dir, at_line):
    times = collections.Counter()

    def trace(frame, event, argument):
        if frame.f_code.co_filename == main.__file__:
            if event == "line":
                times[frame.f_lineno] += 1
                at_line((frame.f_lineno, times[frame.f_lineno]))
            return trace

    shutil.copytree(start, index_dir)
    if (child := os.fork()) == 0:  # it leaves as if it were killed: nothing is flushed, no `finally` is run
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.settrace(trace)
        main.main([*argv, "--index-dir", str(index_dir)])
        sys.settrace(None)
        at_line("end")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def find_writes(line):
    state = {str(path): path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    if state != seen[-1]:
        seen.append(state)
        places.append(line)
    if line == "end":
        pathlib.Path(out, "places.json").write_text(json.dumps(places))


undisturbed, seen, places = pathlib.Path(out, "undisturbed"), [None], []
assert run(undisturbed, find_writes) == 0
places = [tuple(place) for place in json.loads(pathlib.Path(out, "places.json").read_text()) if place != "end"]
places = random.Random(0).sample(places, min(int(trials), len(places)))
for place in places:
    status = run(pathlib.Path(out, "-".join(map(str, place))), lambda line: line == place and os._exit(9))
    assert status == 9, (place, status)
"""


@pytest.mark.parametrize("options", [(), ("--prune",), ("--rebuild",)], ids=["a first run", "--prune", "--rebuild"])
def test_a_run_killed_between_two_writes_is_made_good_by_the_next(
    options: tuple[str, ...], index: Index, run: Run, answers: Any, fresh: Any
) -> None:
    """Killed at the line that follows on a write to the cache, wherever one is."""
    start, out = Path("start"), Path("killed")
    start.mkdir(), out.mkdir()
    if options:
        index("--index-dir", start)
    add(), ruin(), swap(), copy()
    argv = ["--model", "offline", "--index-only", "-q", "--batch-size", "2", *options]
    subprocess.run([sys.executable, "-c", KILLED, MAIN.parent, start, out, "12", *argv], check=True, timeout=120)
    expected, caches = fresh(), [path for path in out.iterdir() if path.is_dir()]
    assert len(caches) > 8
    for cache in caches:
        assert answers("--index-dir", cache, *options) == expected, cache
        assert "opened" not in index("--index-dir", cache), cache


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("options", [(), ("--prune",)], ids=["plain", "--prune"])
def test_an_interrupted_run_keeps_what_it_has_done(
    options: tuple[str, ...], index: Index, run: Run, answers: Any, fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_extraction(4, interrupt, monkeypatch)
    outcome = run("--model", "offline", "--index-only", "--batch-size", 1, *options)
    assert (outcome.status, outcome.stdout) == (130, "") and outcome.stderr.count("\n") == 1
    assert index() == {"found": N, "new": N - 3, "unchanged": 3, "opened": 1}
    assert answers() == fresh()


def test_an_interrupted_rebuild_keeps_the_features_that_were_there(
    index: Index, run: Run, answers: Any, extracted: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    index()
    before = answers()
    with monkeypatch.context() as patch:
        at_extraction(4, interrupt, patch)
        assert run("--model", "offline", "--index-only", "--batch-size", 1, "--rebuild").status == 130
    assert index() == {"found": N, "unchanged": N}
    assert answers() == before
    extracted()
    assert (index("--rebuild"), extracted()) == ({"found": N, "new": N, "opened": 1}, N)
    assert answers() == before


@contextmanager
def files_no_larger_than(share: float) -> Iterator[None]:
    """As full as when no file can grow beyond this share of what the store takes now."""
    size = int(share * (cache_folder() / "index.sqlite").stat().st_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def disk_full_at_sync(number: int) -> Iterator[None]:
    sync, remaining = os.fsync, iter(range(number, 0, -1))

    def full(descriptor: int) -> None:
        if next(remaining, 1) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@pytest.mark.parametrize("option", ["--index-only", "--prune", "--rebuild"])
@pytest.mark.parametrize(
    "disk_full",
    [partial(disk_full_at_sync, n) for n in (1, 2)] + [partial(files_no_larger_than, n) for n in (0.5, 1.0, 1.2)],
    ids=["1st sync", "2nd sync", "less room", "no more room", "little room"],
)
def test_a_full_disk_is_one_line_and_costs_nothing_that_was_there(
    disk_full: Callable[[], Any], option: str, index: Index, run: Run, answers: Any, fresh: Any
) -> None:
    index()
    added = [IMAGES / f"added {seed}.png" for seed in range(50, 90)]
    for seed, path in enumerate(added, 50):
        draw(seed).save(path)
    with disk_full():
        outcome = run("--model", "offline", "--index-only", "-q", option)
    assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1)
    assert str(cache_folder()) in outcome.stderr
    assert answers() == fresh()
    for path in added:
        path.unlink()
    assert index() == {"found": N, "unchanged": N, "gone": 40}


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everywhere: be somebody else for a while."""
    root = os.geteuid() == 0
    if root:
        os.setegid(65534), os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0), os.setegid(0)


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder that everybody may read and nobody may write."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.chdir(name)
        IMAGES.mkdir()
        for seed in range(N):
            draw(seed).save(IMAGES / f"{seed}.png")
        yield
        for folder, _, _ in os.walk(name):
            os.chmod(folder, 0o755)


def lock_away() -> None:
    for folder, _, files in os.walk("."):
        for path in files:
            os.chmod(os.path.join(folder, path), 0o444)
        os.chmod(folder, 0o555)


def test_a_cache_that_may_only_be_read_still_answers(readable: None, run: Run) -> None:
    ask = ("--model", "offline", "--json", "--no-report", IMAGES / "0.png")
    before = run(*ask)
    lock_away()
    with as_nobody():
        assert run(*ask, "-q") == (0, before.stdout, "")


@pytest.mark.parametrize("made_before", [False, True], ids=["no cache", "a cache"])
def test_a_cache_that_cannot_be_written_is_one_line(made_before: bool, readable: None, run: Run) -> None:
    if made_before:
        run("--model", "offline", "--index-only")
        add()
    lock_away()
    with as_nobody():
        outcome = run("--model", "offline", "-q", IMAGES / "0.png")
    assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1)
    assert "image_index" in outcome.stderr and "--index-dir" in outcome.stderr


@pytest.mark.parametrize("place", ["/dev/null/cache", "a file", "/proc/cache"])
def test_a_place_where_no_cache_can_be_is_one_line(place: str, index: Index, run: Run) -> None:
    Path("a file").write_text("mine")
    outcome = run("--model", "offline", "-q", "--index-only", "--index-dir", place)
    assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1)
    assert place in outcome.stderr and Path("a file").read_text() == "mine"


# ---- Runs at the same time -------------------------------------------------------------------------------------------


def test_a_second_writer_waits_and_says_so(index: Index, program: Callable[..., subprocess.Popen[str]]) -> None:
    index()
    add()
    with filelock.FileLock(cache_folder() / "lock"):
        waiting = program("--model", "offline", "--index-only")
        watchdog = threading.Timer(60, waiting.kill)
        watchdog.start()
        assert "waiting" in waiting.stderr.readline()
    stderr = waiting.communicate(timeout=60)[1]
    watchdog.cancel()
    assert waiting.returncode == 0 and f"{N + 1} found, 1 new" in stderr


def test_a_reader_is_never_blocked(index: Index, answers: Any) -> None:
    index()
    before = answers()
    with filelock.FileLock(cache_folder() / "lock"):
        assert answers() == before


def test_two_runs_at_once_are_as_good_as_one(
    collection: Callable[[int], Path], program: Callable[..., subprocess.Popen[str]], answers: Any, fresh: Any
) -> None:
    collection(120)
    ask = (*ASK, "small.png", "other.png")
    both = [program(*ask) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    expected = fresh()
    for stdout, stderr in outputs:
        assert answers_of(Outcome(0, stdout, stderr)) == expected
    assert answers("--index-dir", "undisturbed") == answers() == expected
    assert rows_of(cache_folder()) == 120  # no image is there twice


def test_an_engine_goes_on_answering_while_another_run_prunes_and_rebuilds(index: Index) -> None:
    """No row is used twice: what an open index says of rows that are gone names no file."""
    index()
    engine = main.initialize_reverse_image_search(model=main.load_model("offline"))
    for option, left in (("--prune", N - 2), ("--rebuild", N - 2)):
        (IMAGES / "0.png").unlink(missing_ok=True)
        index(option)
        (answer,) = main.search(IMAGES / "1.png", engine)
        assert sorted(match.path for match in answer.matches) == [str(IMAGES / f"{i}.png") for i in range(2, N)]
        assert len(answer.matches) == left


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def picture_of(number: int) -> main.Picture:
    digest = number.to_bytes(main.DIGEST_BYTES, "big")
    return main.Picture(main.File(digest, 1, 1), digest, vector=np.ones(4, np.float16))


def test_threads_may_ask_what_is_known_while_the_store_is_written(tmp_path, hasty_threads):
    """On Python 3.13, a connection that threads share unguarded fails now and then: "other API misuse"."""
    store = main.Store(tmp_path / "cache", "a-model", 4)
    store.repair()
    pictures = [picture_of(number) for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(lambda: [store.is_known(it.digest) for it in pictures]) for _ in range(200)]
        for number, picture in enumerate(pictures, 1):
            store.save([picture])
            assert store.count("features") == number
        assert {type(known) for future in asked for known in future.result()} == {bool}
    assert all(store.is_known(it.digest) for it in pictures)


def test_prune_with_another_collection_forgets_nothing(run, collection):
    """One cache holds one collection: by a slip of --images, --prune would forget all of it."""
    collection(6)
    run("--model", "offline", "--index-only")
    (other := Path("other")).mkdir()
    draw(99).save(other / "another.png")
    outcome = run("--model", "offline", "--index-only", "--images", "other", "--prune")
    assert outcome.status == 1 and "nothing was pruned" in outcome.stderr
    assert "no image was opened" in run("--model", "offline", "--index-only").stderr


def test_another_collection_is_said_once_and_costs_nothing(run, collection):
    """What is there now is searched; what was there before is kept for the day it is back."""
    collection(6)
    run("--model", "offline", "--index-only")
    (other := Path("other")).mkdir()
    draw(99).save(other / "another.png")
    to_other = ("--model", "offline", "--index-only", "--images", "other")
    assert "an --index-dir of its own" in run(*to_other).stderr
    for arguments in (to_other, to_other[:-2]):
        outcome = run(*arguments)
        assert "no image was opened" in outcome.stderr and "--index-dir" not in outcome.stderr


def test_prune_says_how_many_it_forgot(run, collection):
    images = collection(6)
    run("--model", "offline", "--index-only")
    (images / "2.png").unlink()
    assert "0 gone, 1 forgotten" in run("--model", "offline", "--index-only", "--prune").stderr
    assert "0 gone;" in run("--model", "offline", "--index-only").stderr


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_feature_alone_is_extracted_again(seed, run, collection):
    collection(6)
    run("--model", "offline", "--index-only")
    (path,) = Path("image_index").glob("*/index.sqlite")
    edit(path, f"UPDATE features SET checksum = checksum + 1 WHERE row = {2 * seed + 1}")
    outcome = run("--model", "offline", "--index-only")
    assert outcome.status == 0 and "1 feature is damaged" in outcome.stderr and "1 new" in outcome.stderr


def test_the_collection_cannot_be_the_cache(run, collection):
    outcome = run("--images", collection(2), "--index-dir", "bulk_images", "--model", "offline")
    assert outcome.status == 1 and "choose another folder for the cache" in outcome.stderr


def test_a_reader_never_takes_a_growing_store_for_a_damaged_one(tmp_path, hasty_threads):
    """Else it would wait for the writer, for hours perhaps, to repair what is whole."""
    writer = main.Store(tmp_path / "cache", "a-model", 4)
    writer.repair()
    reader = main.Store(tmp_path / "cache", "a-model", 4)
    with ThreadPoolExecutor(1) as pool:

        def grow() -> None:
            for number in range(150):
                with writer.locked():
                    writer.save([picture_of(number)])

        growing = pool.submit(grow)
        while not growing.done():
            reader.check(whole=True)
        growing.result()
    reader.check(whole=True)
    assert reader.count("features") == 150
