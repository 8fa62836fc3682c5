"""The cache under faults: killed, refused, torn, damaged, crowded. Whatever happens, the answers are right or absent.

Each run is main.py in a process of its own. What it answers afterwards is held against an index made in one go.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import draw
from faults import FAIL, FAIL_ON, KILL, TEAR, Call, Disk, calls, read_all, write_all
from zygote import Ended, Zygote

N = 70  # images: enough for labels, and for codes
IMAGES, INDEX = "images", "index"
WHERE = ("--images", IMAGES, "--index-dir", INDEX)
ASK = ("--model", "offline", *WHERE, "--json", "--no-report", "--views", "none", "-k", 2 * N)
OFTEN = {"SAVE_SECONDS": 0}  # each image is saved on its own
CODES = {"EXACT_BYTES": 0}  # as in a large collection
COMMITS_BEFORE = 3  # of a run before it saves the first image: schema, identity, and one to spare
CHATTER = re.compile(r"(?P<new>[\d,]+) new(?: \((?P<recognised>[\d,]+) recognised)?")
SEED = int(os.environ.get("SEED", 20))  # of all that is random here; another one: SEED=7 python -m pytest ...

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")


class Box:
    """A folder with a collection, two queries and a cache."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.zygote = folder, zygote
        self.images, self.index = folder / IMAGES, folder / INDEX
        self.images.mkdir(parents=True, exist_ok=True)
        draw(0).resize((48, 32)).save(folder / "small.png")
        draw(1000).save(folder / "unknown.png")

    def put(self, *seeds: int, prefix: str = "") -> None:
        for seed in seeds:
            picture(seed, self.images / f"{prefix}{seed}.png")

    def start(self, *options: object, **how: Any) -> Any:
        queries = () if "--index-only" in options else ("small.png", "unknown.png")
        return self.zygote.start(*ASK, *options, *queries, cwd=self.folder, **how)

    def run(self, *options: object, **how: Any) -> Ended:
        return self.start(*options, **how).wait()

    def copy(self, folder: Path) -> Box:
        shutil.copytree(self.folder, folder, symlinks=True)
        return Box(folder, self.zygote)

    def fresh(self) -> list[Any]:
        """The answers of an index that is made from nothing."""
        name = f"fresh {time.monotonic_ns()}"
        ended = self.run("--index-dir", name)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return answers(ended)


def picture(seed: int, path: Path) -> None:
    path.write_bytes(encoded(seed))


@cache
def encoded(seed: int) -> bytes:
    draw(seed).save(path := f"{seed}.png")
    try:
        return Path(path).read_bytes()
    finally:
        os.unlink(path)


def answers(ended: Ended, of: int = 2) -> list[Any]:
    """What was printed: for each query the score and label of each path, with room for other rounding."""
    assert ended.status == 0 and "Traceback" not in ended.stderr, ended
    found = [json.loads(line)["matches"] for line in ended.stdout.splitlines()]
    assert len(found) == of and all(found), ended
    return [{m["path"]: (pytest.approx(m["score"], abs=2e-3), m["identical"]) for m in each} for each in found]


REMARKS = ("is made again", "Repaired", "waiting", "extracted again", " found, ", "damaged")


def one_line(ended: Ended) -> bool:
    """It failed, and said so in one line, which may follow on the summary or a word about damage."""
    *said, last = ended.stderr.splitlines() or [""]
    words = all(any(remark in line for remark in REMARKS) for line in said)
    return ended.status == 1 and ended.stdout == "" and last.startswith("error: ") and words


def extracted(ended: Ended) -> int:
    """Of how many images the features were extracted."""
    found = CHATTER.search(ended.stderr)
    assert found, ended
    new, recognised = (int((value or "0").replace(",", "")) for value in found.groups())
    return new - recognised


def left_behind(box: Box) -> list[str]:
    return [name for name in read_all(box.index) if name.endswith((".part", "-journal", "-wal", "-shm", ".tmp"))]


# ---- What is done to a cache -----------------------------------------------------------------------------------------


def add(box: Box) -> None:
    box.put(*range(N - 5, N))
    (box.images / "bad.png").write_bytes(b"\x89PNG")
    (box.images / "notes.txt").write_text("not an image")


def change(box: Box) -> None:
    for seed in range(5):
        picture(100 + seed, box.images / f"{seed}.png")
    for seed in range(5, 20):
        (box.images / f"{seed}.png").rename(box.images / f"renamed {seed}.png")
    (box.images / "20.png").unlink()
    (box.images / "21.png").write_bytes(b"\x89PNG")


def remove(box: Box) -> None:
    for seed in range(1, 25):
        (box.images / f"{seed}.png").unlink()


def lose_index(box: Box) -> None:
    next(box.index.glob("*/index.faiss")).unlink()


def damage(box: Box) -> None:
    with closing(sqlite3.connect(next(box.index.glob("*/index.sqlite")))) as db, db:
        db.execute(f"UPDATE features SET checksum = checksum + 1 WHERE row = {N // 2}")


class Case(NamedTuple):
    images: int  # indexed before
    prepare: Callable[[Box], None]
    options: tuple[str, ...] = ()
    constants: dict[str, float] | None = None
    again: bool = False  # features that are there are extracted again, by design
    mended: bool = True  # a kill may leave something to repair: a new generation of features, or a damage before it


CASES = {
    "first": Case(0, lambda box: box.put(*range(N)), ("--batch-size", "1"), OFTEN),
    "first, saved once": Case(0, lambda box: box.put(*range(N))),
    "add": Case(N - 5, add, ("--batch-size", "1"), OFTEN, mended=False),
    "change": Case(N, change, ("--batch-size", "1"), OFTEN, mended=False),
    "prune": Case(N, remove, ("--prune",)),
    "rebuild": Case(N, lambda box: None, ("--rebuild",), again=True),
    "index": Case(N, lose_index),
    "repair": Case(N, damage),
    "codes": Case(N, lose_index, constants=CODES),
    "codes, added to": Case(N - 5, add, ("--batch-size", "1"), {**OFTEN, **CODES}, mended=False),
}


class Scene:
    """A case, ready to be run in as many copies as one likes, and how it ends undisturbed."""

    def __init__(self, name: str, folder: Path, zygote: Zygote) -> None:
        self.case, self.number = CASES[name], itertools.count()
        constants = self.case.constants or {}
        self.how = {key: value for key, value in constants.items() if key not in OFTEN}  # of the runs that follow
        self.box = Box(folder / name, zygote)
        self.box.put(*range(self.case.images))
        if self.case.images:
            assert self.box.run("--index-only", constants=self.how).status == 0
        self.case.prepare(self.box)
        self.expected = self.box.fresh()
        self.calls, self.work = self.traced(folder / f"{name}.trace")

    def traced(self, trace: Path) -> tuple[list[Call], int]:
        """What an undisturbed run does to the cache, with the paths of the scene's own; how many images it extracts."""
        box = self.copy()
        ended = self.run(box, 0, 0, trace=trace)
        assert answers(ended) == self.expected
        root, here = (os.path.realpath(folder) for folder in (box.index, self.box.index))
        found = [c._replace(path=c.path.replace(root, here), to=c.to.replace(root, here)) for c in calls(trace)]
        assert len({call.kind for call in found} & set("owsr")) == 4, "the layer of faults sees nothing"
        shutil.rmtree(box.folder)
        return found, extracted(ended)

    def copy(self) -> Box:
        return self.box.copy(self.box.folder.with_name(f"{self.box.folder.name} {next(self.number)}"))

    def run(self, box: Box, number: int, action: int, error: int = 0, **how: Any) -> Ended:
        """With a fault at the `number`-th call."""
        faults = (box.index, number, action, error)
        return box.run(*self.case.options, constants=self.case.constants, faults=faults, **how)

    def saved_before(self, number: int) -> int:
        """Images whose features are surely kept by what was done before this call."""
        done = [(call.kind, os.path.basename(call.path)) for call in self.calls[: number - 1]]
        commits = done.count(("u", "index.sqlite-journal"))  # SQLite commits by deleting its journal
        return max(0, commits - COMMITS_BEFORE - 1)

    def comes_to_the_same_end(self, box: Box, done: int = 0, why: object = "", killed: bool = False) -> None:
        """The next run answers rightly and does little work again; the one after it only what is new by then."""
        ended = box.run(*self.case.options, constants=self.how)
        assert answers(ended) == self.expected, why
        if not self.case.again:
            assert extracted(ended) <= self.work - done, (why, ended.stderr)
        assert self.case.mended or not killed or "Repaired" not in ended.stderr, (why, ended.stderr)
        box.put(999)  # what SQLite or a stopped --prune has left goes with the next write
        assert extracted(box.run("--index-only", constants=self.how)) == 1 and not left_behind(box), why
        shutil.rmtree(box.folder)


FEW = ("first, saved once", "prune", "rebuild", "codes, added to")  # of the cases, for the ordinary tests


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Callable[[str], Scene]:
    """scene(name): one of CASES; made once."""
    if "LD_PRELOAD" not in zygote.environment:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("scenes")
    return cache(lambda name: Scene(name, folder, zygote))


def seeded(*of: object) -> random.Random:
    """A seed of its own for each test; pytest shows what was printed when it fails."""
    print(f"SEED={SEED}", *of)
    return random.Random(f"{SEED} {of}")


# ---- Killed at any moment --------------------------------------------------------------------------------------------


def kill_at(scene: Scene, number: int, how: int) -> None:
    box, call = scene.copy(), scene.calls[number - 1]
    ended = scene.run(box, number, how)
    assert ended.status == -signal.SIGKILL, (number, call[:5], ended)
    scene.comes_to_the_same_end(box, scene.saved_before(number), why=(number, how, call[:5]), killed=True)


def kill_often(scene: Scene, name: str, times: int) -> None:
    chance = seeded(name)
    for number in sorted(chance.sample(range(1, len(scene.calls) + 1), min(times, len(scene.calls)))):
        kill_at(scene, number, chance.choice((KILL, TEAR)))


@pytest.mark.parametrize("name", FEW)
def test_killed_between_two_writes(name: str, scene: Callable[[str], Scene]) -> None:
    kill_often(scene(name), name, times=3)


@pytest.mark.parametrize(
    ("kind", "name"), [("w", "index.sqlite"), ("u", "index.sqlite-journal"), ("r", "index.faiss.part")]
)
def test_killed_around_a_commit(kind: str, name: str, scene: Callable[[str], Scene]) -> None:
    """Files and features are one transaction, and the index file comes before its note: nothing is to be repaired."""
    case = scene("codes, added to")
    there = [i for i, c in enumerate(case.calls, 1) if (c.kind, os.path.basename(c.path)) == (kind, name)]
    for number in (there[0], there[-1]):
        kill_at(case, number, KILL)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_between_two_writes_wherever_that_is(name: str, scene: Callable[[str], Scene]) -> None:
    kill_often(scene(name), f"{name} slow", times=25)


# ---- The power is cut ------------------------------------------------------------------------------------------------


def cut_power(scene: Scene, name: str, times: int) -> None:
    """Of what was not synced, nothing, anything or all is on disk, in sectors."""
    chance = seeded(name)
    places = sorted(chance.choices(range(len(scene.calls) + 1), k=times))
    disk, done = Disk(scene.box.index), 0
    for place in places:
        for call in scene.calls[done:place]:
            disk.do(call)
        done, kept, box = place, chance.choice((0, 0, 0.5, 0.9)), scene.copy()
        write_all(box.index, disk.after_power_cut(chance, kept))
        saved = scene.saved_before(place + 1) - 1  # SQLite's last commit may be lost with its folder's entry
        scene.comes_to_the_same_end(box, saved, why=(place, kept, scene.calls[place - 1][:5]), killed=True)


@pytest.mark.parametrize("name", FEW)
def test_power_cut(name: str, scene: Callable[[str], Scene]) -> None:
    cut_power(scene(name), name, times=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_power_cut_wherever_that_is(name: str, scene: Callable[[str], Scene]) -> None:
    cut_power(scene(name), f"{name} slow", times=30)


# ---- Writes that fail ------------------------------------------------------------------------------------------------


def fail_at(scene: Scene, number: int, how: int, error: int) -> bool:
    """Whether the run noticed: what fails may also be of no consequence."""
    box, why = scene.copy(), (number, how, errno.errorcode[error], scene.calls[number - 1][:5])
    ended = scene.run(box, number, how, error)
    refused = one_line(ended)
    assert refused or answers(ended) == scene.expected, (why, ended)
    scene.comes_to_the_same_end(box, why=why)
    return refused


def fail_often(scene: Scene, name: str, times: int) -> None:
    chance, noticed = seeded(name), 0
    places = range(1, len(scene.calls) + 1)
    errors = itertools.cycle((errno.ENOSPC, errno.EIO, errno.EACCES))
    chosen = sorted(chance.sample(places, min(times, len(places))))
    for number, error in zip(chosen, errors):
        noticed += fail_at(scene, number, chance.choice((FAIL, FAIL, FAIL_ON)), error)
    assert noticed >= len(chosen) // 2 or len(chosen) < 10


@pytest.mark.parametrize("name", FEW)
def test_a_failing_write(name: str, scene: Callable[[str], Scene]) -> None:
    fail_often(scene(name), name, times=2)


EVERY = {"first, saved once": 999, "prune": 999, "codes": 999}  # of the others a share, since they repeat themselves


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_failing_writes_one_after_the_other(name: str, scene: Callable[[str], Scene]) -> None:
    fail_often(scene(name), f"{name} slow", times=EVERY.get(name, 40))


# ---- Killed and stopped at any time ----------------------------------------------------------------------------------


def begun(box: Box, run: Any, wait: float) -> None:
    """Wait until the run has begun, and so many seconds more."""
    deadline = time.monotonic() + 60
    while not box.index.exists() and run.alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(wait)


def kill_again_and_again(scene: Scene, name: str, times: int) -> None:
    """Each time on what the last one has left."""
    chance, box = seeded(name), scene.copy()
    for _ in range(times):
        run = box.start(*scene.case.options, constants=scene.case.constants)
        begun(box, run, chance.uniform(0, 0.3))
        run.send(signal.SIGKILL)
        assert run.wait().status in (-signal.SIGKILL, 0)
    scene.comes_to_the_same_end(box)


@pytest.mark.parametrize("name", ["first", "prune"])
def test_killed_again_and_again(name: str, scene: Callable[[str], Scene]) -> None:
    kill_again_and_again(scene(name), name, times=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_again_and_again_and_again(name: str, scene: Callable[[str], Scene]) -> None:
    for round in range(2):
        kill_again_and_again(scene(name), f"{name} {round}", times=5)


def stop_politely(scene: Scene, name: str, stops: tuple[signal.Signals, ...], times: int) -> None:
    chance, stopped, latest = seeded(name, stops), 0, 0.2
    for _ in range(4 * times):
        box = scene.copy()
        run = box.start(*scene.case.options, "-q", constants=scene.case.constants)
        begun(box, run, chance.uniform(0.03, latest))
        for number in stops:
            run.send(number)
            time.sleep(chance.choice((0, 0.001, 0.01, 0.03)))
        ended = run.wait()
        if ended.status:
            stopped += 1
            assert ended.status == 130 and ended.stderr.count("\n") <= 1, ended
            assert ended.stderr.startswith("interrupted: ") or (len(stops) > 1 and not ended.stderr), ended
        else:  # it was done before
            latest = max(0.05, 0.8 * latest)
        scene.comes_to_the_same_end(box)
        if stopped == times:
            break
    assert stopped, "each was done before it was stopped"


STOPS = [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT,) * 2, (signal.SIGTERM,) * 2]


@pytest.mark.parametrize("stops", STOPS, ids=lambda stops: " ".join(number.name for number in stops))
def test_stopped_politely(stops: tuple[signal.Signals, ...], scene: Callable[[str], Scene]) -> None:
    stop_politely(scene("first"), "first", stops, times=1)


@pytest.mark.slow
@pytest.mark.parametrize("stops", STOPS, ids=lambda stops: " ".join(number.name for number in stops))
@pytest.mark.parametrize("name", ["first", "rebuild", "prune"])
def test_stopped_politely_often(name: str, stops: tuple[signal.Signals, ...], scene: Callable[[str], Scene]) -> None:
    stop_politely(scene(name), f"{name} slow", stops, times=5)


# ---- A damaged cache -------------------------------------------------------------------------------------------------

OTHER = {"PREPROCESSING": 3, "EDGE_POWER": 0.6}  # another model, of the same dimension


class Caches:
    """One collection, and caches of it: a good one, and what to damage it with; the files of each, by name."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.box = box = Box(folder / "damage", zygote)
        box.put(*range(200, 220), *range(40))
        assert box.run("--index-only").status == 0
        self.older = self.files()
        for seed in range(200, 220):
            (box.images / f"{seed}.png").unlink()
        box.put(*range(40, N))
        (box.images / "bad.png").write_bytes(b"\x89PNG")
        self.expected = box.fresh()
        answers(box.run())
        self.good = self.files()
        assert answers(box.run("--index-dir", "other", constants=OTHER)) != self.expected
        self.other = self.files(box.folder / "other")

    def files(self, index: Path | None = None) -> dict[str, bytes]:
        (folder,) = (index or self.box.index).iterdir()
        return read_all(folder)

    @property
    def cache(self) -> Path:
        (folder,) = self.box.index.iterdir()
        return folder

    def answers_with(self, files: dict[str, bytes], why: object, spoil: Callable[[], None] = lambda: None) -> str:
        """Right, or refused in one line, and the same once more; what was said."""
        write_all(self.cache, files)
        spoil()
        first, second = self.box.run("-q"), self.box.run()
        if one_line(first):
            assert one_line(second), (why, first, second)
        else:
            assert answers(first) == answers(second) == self.expected, (why, first, second)
            assert extracted(second) == 0, (why, first, second)
            assert not first.stderr or any(word in first.stderr for word in REMARKS), (why, first)
        return first.stderr


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Caches:
    return Caches(tmp_path_factory.mktemp("caches"), zygote)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.choice((0, 1, 16, 4096, len(content) - 1, chance.randrange(len(content) + 1)))]


def flipped(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        if damaged:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def overwritten(content: bytes, chance: random.Random) -> bytes:
    """A sector: with zeros, with noise, or with another of the file."""
    start, source = (chance.randrange(len(content) // 512 + 1) * 512 for _ in range(2))
    length = len(content[start : start + 512])
    data = chance.choice((bytes(length), chance.randbytes(length), content[source : source + length]))
    return content[:start] + data + content[start + len(data) :]


def longer(content: bytes, chance: random.Random) -> bytes:
    return content + chance.choice((b"\0", bytes(5000), content, chance.randbytes(999)))


DAMAGE = {f.__name__: f for f in (cut, flipped, overwritten, longer)}


def damage_often(caches: Caches, kind: str, times: int) -> None:
    chance, said = seeded(kind, times), 0
    for number in range(times):
        name = chance.choice(sorted(caches.good))
        files = {**caches.good, name: DAMAGE[kind](caches.good[name], chance)}
        said += bool(caches.answers_with(files, (number, kind, name)))
    assert said > times // 8 or times < 10 or kind == "longer", "what was damaged is hardly ever noticed"


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(kind: str, caches: Caches) -> None:
    damage_often(caches, kind, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "times"), [("cut", 80), ("flipped", 500), ("overwritten", 80), ("longer", 20)])
def test_damage_often(kind: str, times: int, caches: Caches) -> None:
    damage_often(caches, kind, times)


def mixtures(caches: Caches) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Each file from another moment, another model, or nowhere."""
    for name in sorted(caches.good):
        rest = {key: content for key, content in caches.good.items() if key != name}
        yield f"no {name}", rest
        for source in ("older", "other"):
            if name in (files := getattr(caches, source)):
                yield f"{source} {name}", {**rest, name: files[name]}
                yield f"{source}, but for {name}", {**files, name: caches.good[name]}
    yield "older", caches.older
    yield "other", caches.other
    yield "nothing", {}


def test_files_that_do_not_belong_together(caches: Caches) -> None:
    for why, files in seeded("mixtures").sample([*mixtures(caches)], 6):
        caches.answers_with(files, why)


@pytest.mark.slow
def test_any_files_that_do_not_belong_together(caches: Caches) -> None:
    every = [*mixtures(caches)]
    assert len(every) >= 15
    for why, files in every:
        caches.answers_with(files, why)


@pytest.mark.parametrize("what", [os.mkdir, partial(os.symlink, "nowhere")], ids=["folder", "link to nowhere"])
def test_something_else_in_the_place_of_a_file(what: Callable[[Path], None], caches: Caches) -> None:
    for name in caches.good:
        rest = {key: content for key, content in caches.good.items() if key != name}
        path = caches.cache / name
        caches.answers_with(rest, name, spoil=partial(what, path))
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


# ---- Many at once ----------------------------------------------------------------------------------------------------


def right_or_overtaken(ended: Ended, expected: list[Any]) -> bool:
    """A run that another one has overtaken says so instead of guessing; what it said before is right."""
    said = ("Start again",)
    if overtaken := any(words in ended.stderr for words in said):
        assert ended.status == 1 and "Traceback" not in ended.stderr and ended.stderr.count("error: ") == 1, ended
        ended = ended._replace(status=0)
    found = answers(ended, of=ended.stdout.count("\n") if overtaken else 2)
    assert found == expected[: len(found)], ended
    return not overtaken


def at_once(scene: Scene, options: list[tuple[str, ...]]) -> list[Ended]:
    box = scene.copy()
    runs = [box.start(*these) for these in options]
    ended = [run.wait() for run in runs]
    right = [right_or_overtaken(each, scene.expected) for each in ended]
    assert all(right) or any(options), ended  # none is overtaken where none begins anew
    scene.comes_to_the_same_end(box)
    return ended


@pytest.mark.parametrize("name", ["first", "repair"])
def test_twenty_at_once(name: str, scene: Callable[[str], Scene]) -> None:
    ended = at_once(scene(name), [()] * 20)
    assert sum(extracted(each) for each in ended) <= scene(name).work + 1  # damage is repaired once


@pytest.mark.slow
@pytest.mark.parametrize("round", range(8))
def test_twenty_of_all_kinds_at_once(round: int, scene: Callable[[str], Scene]) -> None:
    chance = seeded("kinds", round)
    name = chance.choice(("first", "add", "change", "repair", "index"))
    at_once(scene(name), chance.choices([(), (), ("--rebuild",), ("--prune",)], k=20))


def test_one_that_waits_goes_on_when_the_writer_is_killed(scene: Callable[[str], Scene]) -> None:
    case, box = scene("first"), scene("first").copy()
    writer = box.start(*case.case.options, constants=case.case.constants)
    begun(box, writer, 0.1)
    waiting = box.start()
    time.sleep(0.1)
    writer.send(signal.SIGKILL)
    writer.wait()
    assert answers(waiting.wait(60)) == case.expected
    case.comes_to_the_same_end(box)


def test_the_lock_of_a_dead_process_is_no_lock(scene: Callable[[str], Scene]) -> None:
    case = scene("add")
    box = case.copy()
    (lock,) = box.index.glob("*/lock")
    lock.write_text("4194304\n")
    os.utime(lock, (0, 0))
    case.comes_to_the_same_end(box)


YEARS = {"1901": -2_177_452_800, "1960": -315_619_200, "1970": 0, "2099": 4_070_908_800, "2400": 13_569_465_600}


@pytest.mark.parametrize("year", YEARS)
def test_a_clock_that_is_wrong(year: str, scene: Callable[[str], Scene]) -> None:
    """What was changed carries a time before, or long after, the one that is known; the cache, too."""
    case = scene("change")
    box, then = case.copy(), YEARS[year]
    for path in (*box.images.iterdir(), *box.index.rglob("*")):
        os.utime(path, (then, then))
    case.work, work = N, case.work
    case.comes_to_the_same_end(box)
    case.work = work


def disturb(box: Box, chance: random.Random, until: threading.Event) -> None:
    """Add, change, rename and remove images, as fast as can be, all but one: a collection without any is refused."""
    while not until.is_set():
        others = [path for path in sorted(box.images.iterdir()) if path.name != "0.png"]
        path = chance.choice(others or [box.images / "1.png"])
        act = chance.randrange(4)
        if act == 0 and path.exists():
            path.rename(box.images / f"moved {chance.randrange(99)}.png")
        elif act == 1:
            path.write_bytes(encoded(chance.randrange(N)))
        elif act == 2:
            path.unlink(missing_ok=True)
        else:
            (box.images / f"new {chance.randrange(99)}.png").write_bytes(encoded(chance.randrange(300, 330)))
        time.sleep(0.001)


def change_while_it_is_scanned(scene: Scene, name: str, times: int) -> None:
    box, until = scene.copy(), threading.Event()
    disturber = threading.Thread(target=disturb, args=(box, seeded(name), until))
    disturber.start()
    try:
        for _ in range(times):
            ended = box.run()
            assert ended.status == 0 and "Traceback" not in ended.stderr, ended
    finally:
        until.set()
        disturber.join()
    assert answers(box.run()) == box.fresh()


def test_the_collection_changes_while_it_is_scanned(scene: Callable[[str], Scene]) -> None:
    change_while_it_is_scanned(scene("first"), "changes", times=3)


@pytest.mark.slow
def test_the_collection_changes_all_the_time(scene: Callable[[str], Scene]) -> None:
    change_while_it_is_scanned(scene("first"), "changes slow", times=30)
