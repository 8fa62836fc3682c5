"""The store: what a run costs after another one, and what becomes of the answers when things go wrong in between."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import filelock
import pytest
import torch
import torchvision
from conftest import (
    Outcome,
    answers_of,
    break_a_checksum,
    cache_folder,
    counts,
    draw,
    draw_rich,
    edit,
    encoded,
    one_line,
    ruin_page,
)
from faults import contents
from PIL import Image

import main

IMAGES, INDEX = Path("bulk_images"), Path("image_index")
N = 6  # pictures in the collection to begin with
OFFLINE = ("--model", "offline")
ASK = (*OFFLINE, "--json")
Answers = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def index(run: Callable[..., Outcome], collection: Callable[[int], Path]) -> Callable[..., dict[str, int]]:
    """index(*options): bring the index of `bulk_images` up to date; the figures of the summary."""
    collection(N)

    def call(*options: object) -> dict[str, int]:
        outcome = run(*OFFLINE, "--index-only", *options)
        assert (outcome.status, outcome.stdout) == (0, ""), outcome
        return counts(outcome)

    return call


@pytest.fixture
def answers(run: Callable[..., Outcome]) -> Answers:
    """answers(*options): to two queries from outside of the collection, one of them 0.png in half the size."""
    draw(0).resize((48, 32)).save("small.png")
    draw(100).save("other.png")
    return lambda *options: answers_of(run(*ASK, "small.png", "other.png", *options))


@pytest.fixture
def fresh(answers: Answers) -> Answers:
    """fresh(*options): the answers of an index that is made from nothing."""
    return lambda *options: answers("--index-dir", tempfile.mkdtemp(), *options)


# ---- What a run costs after another ----------------------------------------------------------------------------------


def test_a_second_run_opens_no_image(index, answers):
    """It would not even see other bytes of the same size and time."""
    assert index() == {"found": N, "new": N, "opened": 1}
    before = answers()
    for path in IMAGES.iterdir():
        info = path.stat()
        path.write_bytes(bytes(info.st_size))
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert answers() == before
    assert index() == {"found": N, "unchanged": N}


def rename(*names: tuple[str, str]) -> None:
    """Files of the collection get other names, one after the other."""
    for old, new in names:
        (IMAGES / new).parent.mkdir(parents=True, exist_ok=True)
        (IMAGES / old).rename(IMAGES / new)


def draw_as(name: str, seconds: float = 0) -> None:
    """Another picture, saved now or at that time."""
    draw(50).save(IMAGES / name, "PNG")
    if seconds:
        os.utime(IMAGES / name, (seconds, seconds))


def move() -> None:
    rename(("0.png", "deep/deeper/0.png"), ("1.png", "deep/deeper/1.png"))


ALTERED: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {  # what is done, and what the summary says of it
    "added": (lambda: draw_as("added.png"), {"new": 1}),
    "changed": (lambda: draw_as("0.png"), {"new": 1}),
    "changed back in time": (lambda: draw_as("0.png", 1e9), {"new": 1}),
    "changed before 1970": (lambda: draw_as("0.png", -2_177_452_800), {"new": 1}),
    "changed in the year 2400": (lambda: draw_as("0.png", 13_569_465_600), {"new": 1}),  # beyond 64 bits
    "removed": ((IMAGES / "0.png").unlink, {"gone": 1}),
    "touched": (lambda: os.utime(IMAGES / "0.png", (1e9, 1e9)), {"new": 1, "recognised": 1}),
    "renamed": (lambda: rename(("0.png", "x.png")), {"new": 1, "recognised": 1}),
    "swapped": (lambda: rename(("0.png", "x"), ("1.png", "0.png"), ("x", "1.png")), {"new": 2, "recognised": 2}),
    "moved": (move, {"new": 2, "recognised": 2}),
    "copied": (lambda: shutil.copy(IMAGES / "0.png", IMAGES / "copy.png"), {"new": 1, "recognised": 1}),
    "replaced by a copy": (lambda: shutil.copy(IMAGES / "0.png", IMAGES / "1.png"), {"new": 1, "recognised": 1}),
    "ruined": (lambda: (IMAGES / "0.png").write_bytes(b"no longer an image"), {"skipped": 1}),
}


@pytest.mark.parametrize("what", ALTERED)
def test_only_what_is_new_is_extracted(what, index, answers, fresh, monkeypatch):
    act, figures = ALTERED[what]
    index()
    act()
    extract, sizes = main.launch, list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(main, "launch", lambda pixels, *rest: [sizes.append(len(pixels)), extract(pixels, *rest)][1])
        found, after = len(list(IMAGES.rglob("*.png"))), index()
    after.pop("opened", None)
    unchanged = found - figures.get("new", 0) - figures.get("skipped", 0)
    assert after == {"found": found, "unchanged": unchanged, **figures}
    assert sum(sizes) == figures.get("new", 0) - figures.get("recognised", 0)
    assert answers() == fresh()


def test_a_hidden_folder_that_returns_costs_nothing(index, answers):
    move()
    index()
    before = answers()
    (IMAGES / "deep").rename("hidden")
    assert index() == {"found": N - 2, "unchanged": N - 2, "gone": 2}
    there = {str(IMAGES / f"{seed}.png") for seed in range(2, N)}
    assert {match["path"] for answer in answers() for match in answer["matches"]} == there
    Path("hidden").rename(IMAGES / "deep")
    assert index() == {"found": N, "unchanged": N}
    assert answers() == before


def test_the_same_collection_under_another_name_or_moved_together_with_its_cache_is_not_read_again(index):
    move()
    index()
    Path("link").symlink_to(IMAGES)
    for same in (IMAGES.absolute(), "./bulk_images/", "link", "bulk_images/../bulk_images"):
        assert index("--images", same) == {"found": N, "unchanged": N}
    Path("elsewhere").mkdir()
    IMAGES.rename("elsewhere/pictures")
    INDEX.rename("elsewhere/cache")
    assert index("--images", "elsewhere/pictures", "--index-dir", "elsewhere/cache") == {"found": N, "unchanged": N}


# ---- What is forgotten, and what never -------------------------------------------------------------------------------


def rows() -> set[int]:
    """Of the store: their numbers."""
    with closing(sqlite3.connect(cache_folder() / "index.sqlite")) as db:
        return {row for (row,) in db.execute("SELECT row FROM features")}


def test_prune_forgets_what_is_gone_and_says_how_many(index, run, answers, fresh):
    index()
    (IMAGES / "0.png").rename("away.png")
    assert index()["gone"] == 1
    assert "0 gone, 1 forgotten;" in run(*OFFLINE, "--index-only", "--prune").stderr
    assert index() == {"found": N - 1, "unchanged": N - 1} and len(rows()) == N - 1
    assert answers() == fresh()
    Path("away.png").rename(IMAGES / "0.png")
    assert index() == {"found": N, "new": 1, "unchanged": N - 1, "opened": 1}


def test_features_are_kept_without_prune_and_those_of_a_copy_that_is_left_with_it(index):
    index()
    (IMAGES / "0.png").rename("away.png")
    index()
    Path("away.png").rename(IMAGES / "back under another name.png")
    assert index() == {"found": N, "new": 1, "recognised": 1, "unchanged": N - 1, "opened": 1}
    shutil.copy(IMAGES / "1.png", IMAGES / "copy.png")
    index()
    (IMAGES / "1.png").unlink()
    assert index("--prune") == {"found": N, "unchanged": N}
    shutil.copy(IMAGES / "copy.png", IMAGES / "1.png")
    assert index() == {"found": N + 1, "new": 1, "recognised": 1, "unchanged": N, "opened": 1}


@pytest.mark.parametrize("option", ["--index-only", "--prune", "--rebuild"])
@pytest.mark.parametrize(
    "left", [None, (), ("Thumbs.db", ".DS_Store", "notes.txt")], ids=["no folder", "empty", "junk"]
)
def test_an_unplugged_drive_costs_nothing(left, option, index, run, answers):
    index()
    before, stored = answers(), rows()
    IMAGES.rename("away")
    if left is not None:
        IMAGES.mkdir()
    for name in left or ():
        (IMAGES / name).write_text("junk")
    outcome = run(*OFFLINE, "-q", option)
    assert (outcome.status, outcome.stdout) == (1, "")
    assert re.search("^error: bulk_images (is missing|.*(index knows 6|nothing was pruned))", outcome.stderr, re.M)
    assert rows() == stored
    shutil.rmtree(IMAGES, ignore_errors=True)
    Path("away").rename(IMAGES)
    assert index() == {"found": N, "unchanged": N}
    assert answers() == before


def test_another_collection_is_said_once_and_never_pruned(index, run):
    """One cache holds one collection: by a slip of --images, --prune would forget all of it."""
    index()
    (other := Path("other")).mkdir()
    draw(99).save(other / "another.png")
    to_other = (*OFFLINE, "--index-only", "--images", "other")
    outcome = run(*to_other, "--prune")
    assert outcome.status == 1 and "nothing was pruned" in outcome.stderr
    shutil.rmtree(INDEX)
    index()
    assert "an --index-dir of its own" in run(*to_other).stderr
    for arguments in (to_other, to_other[:-2]):
        outcome = run(*arguments)
        assert "no image was opened" in outcome.stderr and "--index-dir" not in outcome.stderr


def no_access(real: Callable[..., Any], ending: str) -> Callable[..., Any]:
    """`os.scandir` or `open` for whom paths that end like this are forbidden."""

    def refusing(path: Any, *args: Any, **options: Any) -> Any:
        if isinstance(path, (str, bytes)) and os.fsdecode(path).endswith(ending):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *args, **options)

    return refusing


def test_a_folder_that_cannot_be_listed_is_not_pruned(index, run, monkeypatch):
    move()
    index()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", no_access(os.scandir, "deeper"))
        for options, status in (((), 0), (("--prune",), 1)):
            outcome = run(*OFFLINE, "--index-only", *options)
            assert outcome.status == status and re.search(r"deeper.*Permission denied", outcome.stderr)
    assert index() == {"found": N, "unchanged": N}


def test_a_scan_goes_through_folders_in_blocks_of_paths(index, monkeypatch):
    """Whatever folders the files of a block lie in, none is taken for new or gone."""
    for number, folder in enumerate(["a", "a-", "a/b", "a.b", "b/a", "b"] * 2):
        (IMAGES / folder).mkdir(parents=True, exist_ok=True)
        draw(100 + number).save(IMAGES / folder / f"{number}.png")
    monkeypatch.setattr(main, "BLOCK", 4)
    assert index() == {"found": N + 12, "new": N + 12, "opened": 1}
    assert index() == {"found": N + 12, "unchanged": N + 12}


# ---- Files that cannot be used ---------------------------------------------------------------------------------------


def test_a_bad_file_is_remembered_until_it_or_the_decoders_change(index, run):
    bad = IMAGES / "bad.png"
    bad.write_bytes((IMAGES / "5.png").read_bytes()[:20])
    (IMAGES / "notes.txt").write_text("buy milk")
    assert index() == {"found": N + 1, "new": N, "skipped": 1, "opened": 1}
    assert index() == {"found": N + 1, "unchanged": N, "skipped": 1}
    assert re.search(r"bad\.png: Truncated", run(*OFFLINE, "--index-only", "-v").stderr)
    edit(cache_folder() / "index.sqlite", "UPDATE meta SET value = 'an older Pillow' WHERE key = 'decoders'")
    assert index() == {"found": N + 1, "unchanged": N, "skipped": 1, "opened": 1}
    assert index() == {"found": N + 1, "unchanged": N, "skipped": 1}
    draw(50).save(bad)
    assert index() == {"found": N + 1, "new": 1, "unchanged": N, "opened": 1}


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "truncated"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried to allocate 8 bytes")])
def test_a_file_that_memory_was_too_small_for_is_no_bad_file_and_is_read_again(error, is_cut, index, run, monkeypatch):
    index()
    content = encoded(draw(50))
    (IMAGES / "new.png").write_bytes(content[: len(content) - 300 * is_cut])
    with monkeypatch.context() as patch:
        patch.setattr(main, "find_points", Mock(side_effect=[error, main.find_points(draw(50))]))
        assert "new.png: too little memory: try --workers 1" in run(*OFFLINE, "--index-only", "-v").stderr
    assert index() == {"found": N + 1, "new": 1, "unchanged": N, "opened": 1}


def test_words_on_memory_in_the_error_of_a_decoder_are_about_the_file():
    """As Pillow says it of a malformed file that claims an absurd size."""
    assert not main.lacks_memory(OSError("out of memory when reading image file"))
    assert not main.lacks_memory(FileNotFoundError(2, "No such file or directory", "/not enough memory/a.png"))
    assert main.lacks_memory(OSError(12, "Cannot allocate memory")) and main.lacks_memory(MemoryError())


def test_a_truncated_file_is_used_counted_and_named_until_it_changes(index, run, answers):
    """Also after it was moved: its content is known, but not as a sound one."""
    whole = (IMAGES / "5.png").read_bytes()
    (IMAGES / "cut.png").write_bytes(whole[:-300])
    for old, new in (("cut.png", "cut.png"), ("cut.png", "moved.png")):
        (IMAGES / old).rename(IMAGES / new)
        outcome = run(*OFFLINE, "--index-only", "-v")
        assert f"{N + 1} found" in outcome.stderr and "0 skipped, 1 truncated" in outcome.stderr
        assert re.search(rf"{new}: truncated", outcome.stderr)
        assert index() == {"found": N + 1, "unchanged": N + 1}
    (IMAGES / "moved.png").write_bytes(whole)
    assert "truncated" not in run(*OFFLINE, "--index-only", "-v").stderr


def test_an_unreadable_file_is_tried_again(index, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", no_access(open, "3.png"))
        assert index() == {"found": N, "new": N - 1, "skipped": 1, "opened": 1}
        assert "3.png: Permission denied" in run(*OFFLINE, "--index-only", "-v").stderr
        assert index() == {"found": N, "unchanged": N - 1, "skipped": 1, "opened": 1}
    assert index() == {"found": N, "new": 1, "unchanged": N - 1, "opened": 1}


def test_a_search_for_a_crashing_file_that_was_killed_blames_no_file_and_is_not_made_again(index, monkeypatch):
    index()
    (cache_folder() / "crash").write_bytes(b"Fatal Python error: Aborted")
    draw_as("new.png")
    killed = Mock(return_value=Mock(stdout=b".", stderr=b"", returncode=-9))
    monkeypatch.setattr("subprocess.run", killed)
    assert index() == {"found": N + 1, "new": 1, "unchanged": N, "opened": 1}
    draw_as("newer.png")
    assert index()["new"] == killed.call_count == 1


@pytest.mark.parametrize("left", [True, False], ids=["empty", "missing"])
def test_a_collection_that_goes_away_while_it_is_read_is_one_line_and_costs_nothing(left, index, run, monkeypatch):
    """As when a drive is unplugged, which may leave the empty folder that it was mounted on."""
    index()
    for seed in range(50, 55):
        draw(seed).save(IMAGES / f"{seed}.png")

    def unplug() -> None:
        IMAGES.rename("away")
        if left:
            IMAGES.mkdir()

    with monkeypatch.context() as patch:
        at_extraction(2, unplug, patch)
        one_line(run(*OFFLINE, *ONE_BY_ONE, "--index-only"), "bulk_images went away", "run it again")
    shutil.rmtree(IMAGES, ignore_errors=True)
    Path("away").rename(IMAGES)
    after = index()
    assert after["found"] == N + 5 and after["unchanged"] >= N + 1 and "gone" not in after


def test_features_that_are_no_numbers_are_refused_with_the_name_of_the_file(collection, caplog):
    """A network whose weights overflow gives them."""

    def network(pixels: torch.Tensor) -> torch.Tensor:
        features = pixels.float().flatten(1)[:, ::7]
        return torch.where(features.mean(1, keepdim=True) > 254, torch.nan, features)

    images = collection(3)
    Image.new("RGB", (8, 8), "white").save(images / "white.png")
    model = main.Model("m", "m-1", 8, 28, "cpu", network)
    for new in (3, 0):
        engine = main.initialize_reverse_image_search(images, model=model)
        assert (engine.summary.new, engine.summary.images, engine.summary.skipped) == (new, 3, 1)
    assert engine.store.skipped() == [(b"white.png", main.NOT_FINITE)]
    white, other = main.search([images / "white.png", images / "0.png"], engine)
    assert white.error == main.NOT_FINITE and len(other.matches) == 2


def at_extraction(number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen just before features are extracted for the `number`-th time."""
    extract, remaining = main.launch, iter(range(number, 0, -1))

    def extract_and_act(*args: Any) -> Any:
        if next(remaining, None) == 1:
            act()
        return extract(*args)

    monkeypatch.setattr(main, "launch", extract_and_act)


ONE_BY_ONE = ("--batch-size", 1, "--workers", 1)


def test_a_file_that_vanishes_meanwhile_is_only_missing(index, monkeypatch):
    last = IMAGES / "z.png"
    draw(50).save(last)
    at_extraction(1, last.unlink, monkeypatch)
    assert index(*ONE_BY_ONE) == {"found": N, "new": N, "opened": 1}
    draw(50).save(last)
    assert index() == {"found": N + 1, "new": 1, "unchanged": N, "opened": 1}


def test_models_of_equal_dimension_never_mix(collection, run):
    """Not even where the folder of one is a copy of the other's."""
    collection(3)
    draw(100).save("query.png")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        torch.save(torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(), name)

    def ask(model: str, *more: object) -> Outcome:
        return run("query.png", "--json", "--model", "shufflenet_v2_x0_5", "--weights", model, *more)

    expected = {model: answers_of(ask(model, "--index-dir", f"only {model}")) for model in "ab"}
    assert expected["a"][0]["matches"] != expected["b"][0]["matches"]
    assert counts(ask("a")) == counts(ask("b")) == {"found": 3, "new": 3, "opened": 1}
    for model in "ab":  # switching back is free
        again = ask(model)
        assert (answers_of(again), counts(again)) == (expected[model], {"found": 3, "unchanged": 3})
    one, two = sorted(INDEX.iterdir())
    shutil.rmtree(two)
    shutil.copytree(one, two)
    assert [answers_of(ask(model)) for model in "ab"] == [*expected.values()]


# ---- Other models, and damage (more of it in test_faults.py) ---------------------------------------------------------


GARBLED = {
    b"CREATE TABLE features": b"CREATE TAB\xccE features",
    b"CREATE TABLE files": b"CREATE TABLE f\xe9les",
    b"WITHOUT ROWID": b"WITHOUT ROW\xc9D",
    b"size INTEGER,": b"size INTEGER ",
}


@pytest.mark.parametrize(("old", "new"), GARBLED.items())
def test_a_garbled_schema_is_made_again(old, new, index, run, answers):
    """Python's sqlite3 raises more kinds of errors of it than its own."""
    index()
    path, before = cache_folder() / "index.sqlite", answers()
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    assert "Repaired" in run(*OFFLINE, "--index-only").stderr
    assert answers() == before


EXPECTED = dict[bool, list[dict[str, Any]]]()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE meta SET value = 'another model' WHERE key = 'identity'",
        "DELETE FROM meta WHERE key = 'identity'",
        "DELETE FROM meta WHERE key = 'index'",
        *(
            f"UPDATE meta SET value = {value} WHERE key = 'index'"
            for value in ("'[1, 2'", "5", "'{}'", "x'ff'", "'[]'")
        ),
        "UPDATE meta SET value = replace(value, ', 6, ', ', 9, ') WHERE key = 'index'",  # the last row in the index
        "DELETE FROM features WHERE row = 3",
        "UPDATE features SET row = 100 - row",
        "UPDATE features SET row = row + 100 WHERE row = 3",
        "UPDATE features SET digest = zeroblob(16) WHERE row = 3",
        "UPDATE features SET vector = zeroblob(100) WHERE row = 3",
        "UPDATE features SET vector = 'text', checksum = 'text'",
        "UPDATE files SET digest = zeroblob(16) WHERE path = CAST('0.png' AS BLOB)",
        "UPDATE files SET size = 'x'",
        "UPDATE files SET path = CAST(path AS TEXT)",
        "UPDATE files SET path = CAST(path || 'x' AS BLOB)",
        "DELETE FROM meta WHERE key = 'copies'",
        *(f"UPDATE meta SET value = {value} WHERE key = 'copies'" for value in ("'[1, 2'", "5", "'{}'", "x'ff'")),
        "UPDATE meta SET value = replace(value, ', 6, ', ', 9, ') WHERE key = 'copies'",
        "DELETE FROM points WHERE row = 3",
        "UPDATE points SET row = 100 - row",
        "UPDATE points SET digest = zeroblob(16) WHERE row = 3",
        "UPDATE points SET points = 'text', checksum = 'text'",
        "DELETE FROM files",
        "DROP TABLE features",
        "DROP TABLE points",
        "DROP TABLE verdicts",
        "DROP INDEX files_by_digest",
        "PRAGMA user_version = 0",
    ],
)
def test_a_store_that_contradicts_itself_is_never_answered_from(statement, index, answers, fresh):
    """EXPECTED has the answers without and with one more picture: they are the same whatever the statement."""
    (IMAGES / "notes.txt").write_text("not an image")
    (IMAGES / "bad.png").write_bytes(b"\x89PNG")
    index()
    for added in (False, True):
        if added:
            draw_as("new.png")
        else:
            edit(cache_folder() / "index.sqlite", statement)
        if added not in EXPECTED:
            EXPECTED[added] = fresh()
        assert answers() == EXPECTED[added]


@pytest.mark.parametrize(
    ("damage", "said", "most"),
    [(break_a_checksum, "points of 1 file are damaged", 1), (ruin_page, "Repaired: ", 40)],
)
def test_damage_costs_only_what_it_hit(damage, said, most, index, run, collection):
    collection(90)
    index()
    damage(cache_folder() / "index.sqlite", 45)
    outcome = run(*OFFLINE, "--index-only")
    assert said in outcome.stderr and 1 <= counts(outcome)["new"] <= most, outcome
    assert index() == {"found": 90, "unchanged": 90}


@pytest.mark.parametrize("error", [sqlite3.ProgrammingError, sqlite3.IntegrityError])
def test_a_mistake_of_the_program_is_no_damage(error, index):
    index()
    (store,) = (main.Store(cache_folder(), cache_folder().name, main.offline_model().dim) for _ in range(1))
    with pytest.raises(error), store.errors():
        raise error("a mistake")
    store.check(whole=True)
    with pytest.raises(main.DamageError), store.errors():
        raise sqlite3.DatabaseError("database disk image is malformed")
    assert store.value("PRAGMA user_version") == 0


def test_a_commit_survives_a_power_cut_on_macos_too(index):
    """There, a sync without this does not reach the disk."""
    index()
    assert main.Store(cache_folder(), cache_folder().name, main.offline_model().dim).value("PRAGMA fullfsync") == 1


def test_the_cache_of_a_newer_version_is_refused_and_left_as_it_is(index, run):
    index()
    edit(cache_folder() / "index.sqlite", "PRAGMA user_version = 99")
    before = contents(INDEX)
    draw_as("added.png")
    for option in ("--index-only", "--rebuild", "--prune"):
        one_line(run(*OFFLINE, option), "newer", "--index-dir")
    assert contents(INDEX) == before


@pytest.mark.parametrize(
    "name", ["index.sqlite.part", "index.faiss.part", "copies.faiss.part", "lock", "rank-1.sqlite"]
)
def test_what_a_stopped_run_leaves_behind_is_harmless_and_goes_with_the_next_write(name, index, answers, fresh):
    index()
    before = answers()
    for option in ("--index-only", "--prune", "--rebuild"):
        (cache_folder() / name).write_bytes(b"4194304" if name == "lock" else b"")
        assert answers() == before
        draw(50).save(IMAGES / f"added by {option}.png")
        assert index(option)["found"] == len(list(IMAGES.iterdir()))
        assert sorted(contents(cache_folder())) == ["copies.faiss", "index.faiss", "index.sqlite", "lock"]
        before = answers()
    assert before == fresh()


def test_an_index_of_an_older_format_is_made_anew_and_its_files_go(index, run, answers):
    index()
    before = answers()
    for path in cache_folder().iterdir():
        path.unlink()
    for name in ("features.bin", "catalogue.sqlite", "catalogue.crc"):
        (cache_folder() / name).write_bytes(b"of an older format")
    outcome = run(*OFFLINE, "--index-only")
    assert outcome.stderr.count("older format") == 1 and counts(outcome)["new"] == N
    assert sorted(contents(cache_folder())) == ["copies.faiss", "index.faiss", "index.sqlite", "lock"]
    assert answers() == before


# ---- Points, which no model makes ------------------------------------------------------------------------------------


def table(name: str, value: str, index_dir: str = "image_index", key: str = "digest") -> dict[Any, Any]:
    """A column of a table of the store, by another one."""
    with closing(sqlite3.connect(cache_folder(index_dir) / "index.sqlite")) as db:
        return dict(db.execute(f"SELECT {key}, {value} FROM {name}").fetchall())


def forget_points() -> None:
    """The store is one of format 3, which had none."""
    edit(cache_folder() / "index.sqlite", "DROP TABLE points", "DROP TABLE verdicts", "PRAGMA user_version = 3")
    edit(cache_folder() / "index.sqlite", "DELETE FROM meta WHERE key = 'copies'")
    (cache_folder() / "copies.faiss").unlink()


def tiny(name: str, side: int) -> main.Model:
    """A model of 27 dimensions."""
    return main.Model(name, f"{name}-27", side, 27, "cpu", lambda it: it[..., :3, :3].float().flatten(1) + 1)


def test_a_store_of_the_format_before_gets_points_and_keeps_its_features(index, run, answers, monkeypatch):
    index()
    before, features, points = answers(), table("features", "vector", key="row"), table("points", "points")
    assert len(points) == N and all(points.values())
    forget_points()
    with monkeypatch.context() as patch:
        patch.setattr(main, "launch", Mock(side_effect=AssertionError("features are extracted")))
        outcome = run(*OFFLINE, "--index-only")
    assert outcome.stderr.count("was of an older format") == 1 and f"{N} features are kept" in outcome.stderr
    assert counts(outcome) == {"found": N, "new": N, "recognised": N, "opened": 1}
    assert (table("features", "vector", key="row"), table("points", "points")) == (features, points)
    assert index() == {"found": N, "unchanged": N}
    assert answers() == before


@pytest.mark.parametrize("options", [("--no-update",), ()], ids=["no update", "stopped"])
def test_until_it_has_points_a_store_of_the_format_before_answers_by_features(
    options, index, run, answers, monkeypatch
):
    index()
    before, features = answers(), table("features", "vector", key="row")
    forget_points()
    with monkeypatch.context() as patch:
        patch.setattr(main, "read_new", Mock(side_effect=KeyboardInterrupt))
        assert run(*OFFLINE, "small.png", "-q", *options).status == (0 if options else 130)
    by_features, expected = (
        [{match["path"]: match["score"] for match in answer["matches"]} for answer in found]
        for found in (answers("--no-update"), before)
    )
    assert by_features == expected
    assert answers() == before and table("features", "vector", key="row") == features


def test_points_are_the_same_whatever_the_model_and_the_threads_and_are_extracted_once(collection, monkeypatch):
    images = collection(N)
    draw(50, (640, 480)).save(images / "photo.jpg")
    finder = Mock(wraps=main.find_points.__wrapped__)  # that remembers nothing
    monkeypatch.setattr(main, "find_points", finder)
    for number, (side, workers) in enumerate([(3, 1), (224, 4)]):
        work = main.Work(workers=workers)
        main.initialize_reverse_image_search(images, str(number), model=tiny("one", side), work=work).close()
    assert table("points", "points", "0") == table("points", "points", "1") and finder.call_count == 2 * (N + 1)
    draw(51).save(images / "new.png")
    engine = main.initialize_reverse_image_search(images, "0", model=tiny("two", 96))
    assert (engine.summary.new, engine.summary.recognised) == (N + 2, 0) and finder.call_count == 2 * (N + 1) + 1
    others = dict(engine.store.db.execute("SELECT digest, points FROM points").fetchall())
    assert len(others) == N + 2 and others.items() > table("points", "points", "1").items()


DAMAGED_COPIES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda content: content[:999] + bytes([content[999] ^ 1]) + content[1000:],
    "truncated": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGED_COPIES.values(), ids=DAMAGED_COPIES)
def test_a_damaged_index_of_points_is_said_and_made_again(damage, index, run, answers):
    index()
    path, before = cache_folder() / "copies.faiss", answers()
    path.write_bytes(damage(content := path.read_bytes()))
    outcome = run(*OFFLINE, "--index-only")
    assert outcome.status == 0 and "copies.faiss is damaged or out of date" in outcome.stderr
    assert path.read_bytes() == content and answers() == before


def test_a_missing_index_of_points_is_made_again_but_without_an_update_few_pictures_are_compared(index, answers):
    index()
    path, before = cache_folder() / "copies.faiss", answers()
    content = path.read_bytes()
    path.unlink()
    assert answers("--no-update") == before and not path.exists()
    assert answers() == before and path.read_bytes() == content


@pytest.mark.parametrize("checked", [1 << 27, 0], ids=["on opening", "when it is met"])
def test_damaged_points_are_found_and_read_again_without_their_features(checked, index, run, answers, monkeypatch):
    index()
    before, features, points = answers(), table("features", "vector", key="row"), table("points", "points")
    edit(cache_folder() / "index.sqlite", "UPDATE points SET points = zeroblob(length(points)) WHERE row = 3")
    (cache_folder() / "copies.faiss").unlink()  # or nobody would read them
    monkeypatch.setattr(main, "CHECKED_BYTES", checked)
    with monkeypatch.context() as patch:
        patch.setattr(main, "launch", Mock(side_effect=AssertionError("features are extracted")))
        outcome = run(*OFFLINE, "--index-only")
    assert "1 file are damaged or missing" in outcome.stderr
    assert counts(outcome) == {"found": N, "new": 1, "recognised": 1, "unchanged": N - 1, "opened": 1}
    assert (table("features", "vector", key="row"), table("points", "points")) == (features, points)
    assert answers() == before


def test_prune_forgets_points_and_verdicts_of_what_is_gone(index, run):
    for seed in (60, 61):
        draw_rich(seed).save(IMAGES / f"{seed}.png")
        draw_rich(seed).save(IMAGES / f"{seed}.jpg", quality=90)
    assert len(answers_of(run(*OFFLINE, "--duplicates", "--json"))) == 2
    (IMAGES / "bad.png").write_bytes(b"\x89PNG")  # it has no content
    both = table("verdicts", "verdict", key="hex(one) || hex(other)")
    assert len(both) >= 2 and len(table("points", "points")) == N + 4
    (IMAGES / "60.jpg").unlink()
    index()
    assert (
        table("verdicts", "verdict", key="hex(one) || hex(other)") == both and len(table("points", "points")) == N + 4
    )
    index("--prune")
    left = set(table("files", "path")) - {None}
    assert set(table("points", "points")) == left and len(left) == N + 3
    kept = table("verdicts", "verdict", key="hex(one) || hex(other)")
    assert 0 < len(kept) < len(both) and all({bytes.fromhex(key[:32]), bytes.fromhex(key[32:])} <= left for key in kept)


def test_rebuilt_points_have_new_rows_and_are_the_same(index, answers):
    index()
    before, points, used = answers(), table("points", "points"), set(table("points", "points", key="row"))
    for _ in range(3):  # rows that are gone fill the index of points until it is made anew
        assert index("--rebuild")["new"] == N
        again = set(table("points", "points", key="row"))
        assert min(again) > max(used) and table("points", "points") == points
        used |= again
        assert answers() == before


def test_no_row_is_used_twice(index):
    """A stale FAISS index, of another process say, can miss a file then, but never name a wrong one."""
    index()
    used = before = rows()
    for act in (
        (IMAGES / "5.png").unlink,
        lambda: index("--prune"),
        partial(draw_as, "0.png"),
        lambda: index("--rebuild"),
    ):
        act()
        index()
        assert all(row > max(used) for row in rows() - before)
        before = rows()
        used |= before
    edit(cache_folder() / "index.sqlite", "DELETE FROM features", "INSERT INTO features (digest) VALUES (x'00')")
    assert min(rows()) > max(used)


# ---- Runs that end early, and at the same time (more of them in test_faults.py) --------------------------------------


@pytest.mark.parametrize(("option", "saved"), [("--index-only", 3), ("--prune", 3), ("--rebuild", 0)])
def test_an_interrupted_run_keeps_what_it_has_done_and_what_was_there(
    option, saved, index, run, answers, fresh, monkeypatch
):
    index()
    for seed in range(50, 50 + N):
        draw(seed).save(IMAGES / f"new {seed}.png")
    with monkeypatch.context() as patch:
        at_extraction(4, Mock(side_effect=KeyboardInterrupt), patch)
        outcome = run(*OFFLINE, *ONE_BY_ONE, option)
    assert (outcome.status, outcome.stdout) == (130, "") and outcome.stderr.count("\n") == 1
    assert index() == {"found": 2 * N, "new": N - saved, "unchanged": N + saved, "opened": 1}
    assert answers() == fresh()
    assert index("--rebuild") == {"found": 2 * N, "new": 2 * N, "opened": 1}


@contextmanager
def as_nobody() -> Iterator[Path]:
    """An empty folder, and no right to read or write what the permissions forbid, not even as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    root = Path(tempfile.mkdtemp())  # pytest's own are root's alone
    try:
        yield root
    finally:
        os.seteuid(user)
        for path in (root, *root.rglob("*")):
            path.chmod(0o700)
        shutil.rmtree(root)


@pytest.mark.parametrize("made_before", [False, True], ids=["no cache", "a cache"])
def test_a_cache_that_may_only_be_read_still_answers_and_what_is_new_is_one_line(made_before, run):
    with as_nobody() as root:
        where = ("--images", root / "i", "--index-dir", root / "c", root / "0.png")
        ask = (*OFFLINE, "--json", "--no-report", "-q", *where)
        (root / "i").mkdir()
        for seed in range(N):
            draw(seed).save(root / "i" / f"{seed}.png")
        shutil.copy(root / "i" / "0.png", root)
        before = run(*ask) if made_before else None
        for folder in (root, *root.rglob("*")):
            folder.chmod(0o555)
        if before:
            assert run(*ask) == (0, before.stdout, "")
            (root / "i").chmod(0o755)
            draw(50).save(root / "i" / "new.png")
        outcome = run(*ask)
    one_line(outcome, str(root / "c"), "--index-dir")


@pytest.mark.parametrize(
    "place", ["/dev/null/cache", "a file", "/proc/cache", "x" * 300, "bulk_images"], ids=lambda place: place[:9]
)
def test_a_place_where_no_cache_can_be_is_one_line(place, index, run):
    Path("a file").write_text("mine")
    one_line(run(*OFFLINE, "-q", "--index-only", "--index-dir", place), place, "--index-dir")
    assert Path("a file").read_text() == "mine"


def test_a_second_writer_waits_and_says_so_but_no_reader(index, answers, program):
    index()
    before = answers()
    with filelock.FileLock(cache_folder() / "lock"):
        assert answers() == before
        draw_as("added.png")
        waiting = program(*OFFLINE, "--index-only")
        watchdog = threading.Timer(60, waiting.kill)
        watchdog.start()
        assert "waiting" in waiting.stderr.readline()
    stderr = waiting.communicate(timeout=60)[1]
    watchdog.cancel()
    assert waiting.returncode == 0 and f"{N + 1} found, 1 new" in stderr


def test_threads_ask_what_is_known_while_the_store_is_written(index, collection, monkeypatch):
    """On Python 3.13, a connection that threads share unguarded fails now and then: "other API misuse"."""
    monkeypatch.setattr(main, "SAVE_SECONDS", 0)
    collection(100)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        assert index("--batch-size", 1, "--workers", 8) == {"found": 100, "new": 100, "opened": 1}
    finally:
        sys.setswitchinterval(interval)
