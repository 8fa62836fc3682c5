"""For programs that build on it: threads, processes, pictures that are no files, and locks that hold."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MAIN, answers_of, cache_folder, draw, encoded
from PIL import Image

import main

IMAGES = Path("bulk_images")
OFFLINE = ("--model", "offline", "--no-report")


@pytest.fixture
def engine(collection: Callable[[int], Path]) -> main.Engine:
    """Of 0.png to 11.png, by the offline descriptor."""
    collection(12)
    return main.initialize_reverse_image_search(model=main.load_model("offline"))


def found(query: Any, engine: main.Engine) -> tuple[str, list[tuple[str, float]], str | None]:
    (answer,) = main.search(query, engine)
    return answer.query, [(match.path, round(match.score, 4)) for match in answer.matches], answer.error


# ---- Threads and processes -------------------------------------------------------------------------------------------


def test_threads_share_an_engine(engine, monkeypatch):
    for function in (main.find_points, main.compare):
        monkeypatch.setattr(main, function.__name__, function.__wrapped__)  # that remembers nothing
    paths = [f"bulk_images/{number % 12}.png" for number in range(8)]
    expected = [found(path, engine) for path in paths]
    with ThreadPoolExecutor(8) as threads:
        assert [*threads.map(lambda path: found(path, engine), paths)] == expected

    async def ask() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(found, path, engine) for path in paths))

    assert asyncio.run(ask()) == expected


FORK = """
import multiprocessing, sys
sys.path.insert(0, {folder!r})
import main
engine = main.initialize_reverse_image_search(model=main.load_model("offline"))
(answer,) = main.search("bulk_images/0.png", engine)
def child():
    for call in {calls}:
        try:
            call()
            print("done")
        except main.DeepVisionError as error:
            print("refused:", error)
process = multiprocessing.get_context({method!r}).Process(target=child)
process.start()
process.join(60)
print(process.exitcode)
process.kill()
"""
CALLS = """[
    lambda: list(main.search("bulk_images/0.png", engine)),
    lambda: main.initialize_reverse_image_search(index_dir="other", model=engine.model),
    lambda: main.extract_features_batch(["bulk_images/0.png"], engine.model),
]"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_process_forked_after_a_search_is_refused_at_once(engine):
    """Where torch has started threads, they are missing in the child, which would wait for them forever."""
    script = FORK.format(folder=str(MAIN.parent), calls=CALLS, method="fork")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90)
    *said, status = ended.stdout.splitlines()
    assert status == "0" and len(said) == 3, ended
    assert all(line.startswith("refused: ") and "get_context('spawn')" in line for line in said), ended


def test_a_process_forked_before_the_first_search_works(collection):
    collection(3)
    script = FORK.format(folder=str(MAIN.parent), calls="[search]", method="fork")
    script = script.replace("engine = ", "def search():\n  engine = ", 1).replace("(answer,) =", "  (answer,) =", 1)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90)
    assert ended.stdout.splitlines() == ["done", "0"], ended


def open_files(name: str) -> int:
    """How many times this process has such a file open."""
    links = (Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
    return sum(str(link.readlink()).endswith(name) for link in links if link.is_symlink())


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_an_engine_closes_with_its_block_by_hand_and_when_it_is_dropped(engine):
    before = open_files("index.sqlite"), len(main.open_databases)
    again = lambda: main.initialize_reverse_image_search(model=engine.model)  # noqa: E731
    gc.disable()  # nothing waits for the collector
    try:
        for _ in range(10):
            dropped = again()
            assert found("bulk_images/1.png", dropped)[1]
        del dropped
        assert (open_files("index.sqlite"), len(main.open_databases)) == before
        with again() as entered:
            assert found("bulk_images/1.png", entered)[1] and open_files("index.sqlite") == before[0] + 1
        (closed := again()).close()
        closed.close()  # does nothing
        assert (open_files("index.sqlite"), len(main.open_databases)) == before
    finally:
        gc.enable()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        found("bulk_images/1.png", closed)


# ---- Queries that are no paths ---------------------------------------------------------------------------------------


class Named(io.BytesIO):
    name = "3.png"


PICTURE = draw(3).resize((48, 32))
QUERIES: dict[str, tuple[Callable[[], Any], str]] = {  # how it is made, and what it is called
    "a Pillow image": (lambda: PICTURE, "Image"),
    "a Pillow image of a file": (lambda: Image.open("small.png"), "small.png"),
    "a stream": (lambda: io.BytesIO(encoded(PICTURE)), "BytesIO"),
    "a stream with a name": (lambda: Named(encoded(PICTURE)), "3.png"),
    "an open file": (lambda: open("small.png", "rb"), "small.png"),  # noqa: SIM115
    "an array": (lambda: np.array(PICTURE), "ndarray"),
    "a path": (lambda: Path("small.png"), "small.png"),
}


@pytest.mark.parametrize("kind", QUERIES)
def test_a_query_may_be_a_picture_a_stream_or_an_array_alone_and_among_others(kind, engine):
    make, name = QUERIES[kind]
    PICTURE.save("small.png")
    expected = found("small.png", engine)[1]
    assert expected[0][0] == "bulk_images/3.png"
    query = make()
    assert found(query, engine) == (name, expected, None)
    assert query is not PICTURE or query.size == (48, 32)
    answers = [*main.search(["bulk_images/1.png", make(), "small.png"], engine)]
    assert [[match.path for match in it.matches] for it in answers[1:]] == [[path for path, _ in expected]] * 2


def test_the_bytes_of_a_file_make_a_stream_identical_to_it(engine):
    (answer,) = main.search(io.BytesIO((IMAGES / "5.png").read_bytes()), engine)
    assert (answer.matches[0].path, answer.matches[0].label) == ("bulk_images/5.png", "identical")


UNUSABLE: dict[str, tuple[Any, str]] = {
    "bytes": (encoded(PICTURE), "io.BytesIO"),
    "a stream of text": (io.BytesIO(b"hello"), "not an image"),
    "a broken stream": (io.BytesIO(encoded(PICTURE)[:60]), ""),
    "a file of text": (io.StringIO("hello"), ""),
    "a grey array": (np.zeros((8, 8), np.uint8), "not uint8 (8, 8)"),
    "an array of floats": (np.zeros((8, 8, 3)), "not float64 (8, 8, 3)"),
    "a number": ([7], "not a query"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_query_is_an_error_that_says_so_and_echoes_no_content(kind, engine):
    query, words = UNUSABLE[kind]
    (answer,) = main.search(query, engine)
    assert answer.error and words in answer.error and answer.matches == [] and len(answer.query) < 10, answer


# ---- Locks -----------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_the_cache_may_be_searched_with(engine, run):
    draw(3).resize((48, 32)).save("query.png")
    draw(4).save("image_index/no query.png")
    answers = answers_of(run(*OFFLINE, "--json", "."))
    assert [it["query"] for it in answers] == [*sorted(f"./bulk_images/{n}.png" for n in range(12)), "./query.png"]


def test_no_open_database_is_read_as_an_image(engine):
    """On POSIX, closing it would drop the locks that SQLite holds on it."""
    (link := Path("link.png")).symlink_to(engine.store.path)
    other = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
    with engine.store.db.transaction():
        for query in (link, engine.store.path):
            assert main.read_path(query, main.get_transform()) == main.Picture(main.File.of(bytes(query), query.stat()))
        ended = subprocess.run([sys.executable, "-c", other, engine.store.path], capture_output=True, text=True)
    assert "database is locked" in ended.stderr


@pytest.mark.parametrize("search", [True, False], ids=["a search", "a writer"])
def test_a_run_that_waits_for_a_locked_database_says_so_and_can_be_stopped(search, engine, zygote):
    draw(50).save(IMAGES / "new.png")
    with closing(sqlite3.connect(engine.store.path)) as db:
        db.execute("BEGIN EXCLUSIVE" if search else "BEGIN")
        db.execute("SELECT count(*) FROM files").fetchone()
        waiting = zygote.start(*OFFLINE, *(["--no-update", "bulk_images/0.png"] if search else ["--index-only"]))
        end, said = time.monotonic() + 60, waiting.folder / "2"
        while not re.search("another run .* waiting for it", said.read_text() if said.exists() else ""):
            assert time.monotonic() < end
            time.sleep(0.05)
        stopped = time.monotonic()
        waiting.send(signal.SIGINT)
        ended = waiting.wait(60)
        assert ended.status == 130 and time.monotonic() - stopped < 5 and "interrupted" in ended.stderr, ended


def test_a_run_goes_on_when_the_database_is_free_again(engine, zygote):
    draw(50).save(IMAGES / "new.png")
    with closing(sqlite3.connect(cache_folder() / "index.sqlite")) as db:
        db.execute("BEGIN")
        db.execute("SELECT count(*) FROM files").fetchone()
        waiting = zygote.start(*OFFLINE, "--index-only")
        time.sleep(3)
    ended = waiting.wait(60)
    assert ended.status == 0 and "13 found, 1 new" in ended.stderr, ended
