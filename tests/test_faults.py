"""The cache under faults: killed, refused, torn, damaged, crowded. Whatever happens, the answers are right or absent.

Each run is main.py in a process of its own. What it answers afterwards is held against an index made in one go. Most
tests are there twice: a few faults for the ordinary suite, many for `-m slow`.
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
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import break_a_checksum, cache_folder, counts, draw, encoded
from faults import FAIL, FAIL_ON, KILL, TEAR, Call, Disk, calls, contents, write_all
from PIL import ImageFilter
from zygote import Outcome, Zygote

N = 40  # images: enough for codes, which are trained on half of them, at least 16
IMAGES, INDEX = "images", "index"
WHERE = ("--images", IMAGES, "--index-dir", INDEX)
ASK = ("--model", "offline", *WHERE, "--json", "--no-report", "-k", 2 * N)
OFTEN = {"SAVE_SECONDS": 0}  # each image is saved on its own
CODES = {"exact_bytes": 0}  # as in a large collection
OTHER = {"PREPROCESSING": 4, "EDGE_POWER": 0.6}  # another model, of the same dimension
COMMITS_BEFORE = 3  # of a run before it saves the first image: schema, identity, and one to spare
SEED = int(os.environ.get("SEED", 20))  # of all that is random here; another one: SEED=7 python -m pytest ...
JOURNAL = ("u", "index.sqlite-journal")  # SQLite commits by deleting its journal
REMARKS = ("is made again", "Repaired", "waiting", "extracted again", " found, ", "damaged")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")


class Box:
    """A folder with a collection, two queries and a cache."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.zygote = folder, zygote
        self.images, self.index = folder / IMAGES, folder / INDEX
        self.images.mkdir(parents=True, exist_ok=True)
        draw(0).resize((48, 32)).save(folder / "small.png")
        blurred = draw(1000, details=0).filter(ImageFilter.GaussianBlur(12))  # nothing in it has to be compared
        blurred.save(folder / "unknown.png")

    def put(self, *seeds: int) -> None:
        for seed in seeds:
            (self.images / f"{seed}.png").write_bytes(drawn(seed))

    def start(self, *options: object, **how: Any) -> Any:
        queries = () if "--index-only" in options else ("small.png", "unknown.png")
        return self.zygote.start(*ASK, *options, *queries, cwd=self.folder, **how)

    def run(self, *options: object, **how: Any) -> Outcome:
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


@cache
def drawn(seed: int) -> bytes:
    return encoded(draw(seed))


def answers(ended: Outcome, of: int = 2) -> list[Any]:
    """What was printed: for each query the score and label of each path, with room for other rounding."""
    assert ended.status == 0 and "Traceback" not in ended.stderr, ended
    found = [json.loads(line)["matches"] for line in ended.stdout.splitlines()]
    assert len(found) == of and all(found), ended
    return [{m["path"]: (pytest.approx(m["score"], abs=2e-3), m["identical"]) for m in each} for each in found]


def one_line(ended: Outcome) -> bool:
    """It failed, and said so in one line, which may follow on the summary or a word about damage."""
    *said, last = ended.stderr.splitlines() or [""]
    words = all(any(remark in line for remark in REMARKS) for line in said)
    return ended.status == 1 and ended.stdout == "" and last.startswith("error: ") and words


def extracted(ended: Outcome) -> int:
    """Of how many images the features were extracted."""
    figures = counts(ended)
    return figures.get("new", 0) - figures.get("recognised", 0)


# ---- What is done to a cache -----------------------------------------------------------------------------------------


def add(box: Box) -> None:
    box.put(*range(N - 5, N))
    (box.images / "bad.png").write_bytes(b"\x89PNG")
    (box.images / "notes.txt").write_text("not an image")


def change(box: Box) -> None:
    for seed in range(5):
        (box.images / f"{seed}.png").write_bytes(drawn(100 + seed))
    for seed in range(5, 20):
        (box.images / f"{seed}.png").rename(box.images / f"renamed {seed}.png")
    (box.images / "20.png").unlink()
    (box.images / "21.png").write_bytes(b"\x89PNG")


def remove(box: Box) -> None:
    for seed in range(1, 25):
        (box.images / f"{seed}.png").unlink()


def lose_index(box: Box) -> None:
    (cache_folder(box.index) / "index.faiss").unlink()


class Case(NamedTuple):
    images: int  # indexed before
    prepare: Callable[[Box], None]
    options: tuple[str, ...] = ()
    constants: dict[str, float] | None = None
    again: bool = False  # features that are there are extracted again, by design
    mended: bool = True  # a kill may leave something to repair: a database half made, or a damage before it


ONE_BY_ONE = ("--batch-size", "1")
CASES = {
    "first": Case(0, lambda box: box.put(*range(N)), ONE_BY_ONE, OFTEN),
    "first, saved once": Case(0, lambda box: box.put(*range(N))),
    "add": Case(N - 5, add, ONE_BY_ONE, OFTEN, mended=False),
    "change": Case(N, change, ONE_BY_ONE, OFTEN, mended=False),
    "prune": Case(N, remove, ("--prune",)),
    "rebuild": Case(N, lambda box: None, ("--rebuild",), again=True),
    "index": Case(N, lose_index),
    "repair": Case(N, lambda box: break_a_checksum(cache_folder(box.index) / "index.sqlite", N // 2)),
    "codes": Case(N, lose_index, constants=CODES),
    "codes, added to": Case(N - 5, add, ONE_BY_ONE, {**OFTEN, **CODES}, mended=False),
}
FEW = ("first, saved once", "prune", "codes, added to")  # of the cases, for the ordinary tests


def each_case(few: int, many: int, cases: tuple[str, ...] = FEW) -> pytest.MarkDecorator:
    """`name` and `times`: some cases a few times for the ordinary tests, all of them often for the slow ones."""
    ordinary = [pytest.param(name, few, id=name) for name in cases]
    slow = [pytest.param(name, many, id=f"{name}, often", marks=pytest.mark.slow) for name in CASES]
    return pytest.mark.parametrize(("name", "times"), ordinary + slow)


class Scene:
    """A case, ready to be run in as many copies as one likes, and how it ends undisturbed."""

    def __init__(self, name: str, folder: Path, zygote: Zygote) -> None:
        self.case, self.number = CASES[name], itertools.count()
        constants = self.case.constants or {}
        self.how = {key: value for key, value in constants.items() if key not in OFTEN}  # of later runs
        self.box = Box(folder / name, zygote)
        self.box.put(*range(self.case.images))
        if self.case.images:
            assert self.box.run("--index-only", constants=self.how).status == 0
        self.case.prepare(self.box)
        self.expected = self.box.fresh()
        self.calls, self.work = self.traced(folder / f"{name}.trace")

    def traced(self, trace: Path) -> tuple[list[Call], int]:
        """What an undisturbed run does to the cache, and how many images it extracts."""
        box = self.copy()
        ended = self.run(box, 0, 0, trace=trace)
        assert answers(ended) == self.expected
        found = list(calls(trace, box.index))
        assert len({call.kind for call in found} & set("owsr")) == 4, "the layer of faults sees nothing"
        shutil.rmtree(box.folder)
        return found, extracted(ended)

    def copy(self) -> Box:
        return self.box.copy(self.box.folder.with_name(f"{self.box.folder.name} {next(self.number)}"))

    def run(self, box: Box, number: int, action: int, error: int = 0, **how: Any) -> Outcome:
        """With a fault at the `number`-th call."""
        faults = (box.index, number, action, error)
        return box.run(*self.case.options, constants=self.case.constants, faults=faults, **how)

    def places(self, kind: str, name: str) -> list[int]:
        """The numbers of the calls of this kind, on this file."""
        return [i for i, c in enumerate(self.calls, 1) if (c.kind, os.path.basename(c.path)) == (kind, name)]

    def saved_before(self, number: int) -> int:
        """Images whose features are surely kept by what was done before this call."""
        return max(0, sum(place < number for place in self.places(*JOURNAL)) - COMMITS_BEFORE - 1)

    def comes_to_the_same_end(self, box: Box, done: int = 0, why: object = "", killed: bool = False) -> Outcome:
        """The next run answers rightly and does little work again; the one after it only what is new by then."""
        ended = box.run(*self.case.options, constants=self.how)
        assert answers(ended) == self.expected, why
        if not self.case.again:
            assert extracted(ended) <= max(0, self.work - done), (why, ended.stderr)
        assert self.case.mended or not killed or not re.search("Repaired|missing", ended.stderr), (why, ended.stderr)
        box.put(999)  # what SQLite or a stopped --prune has left goes with the next write
        assert extracted(box.run("--index-only", constants=self.how)) == 1, why
        assert sorted(contents(cache_folder(box.index))) == ["copies.faiss", "index.faiss", "index.sqlite", "lock"], why
        shutil.rmtree(box.folder)
        return ended


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, with_faults: Zygote) -> Callable[[str], Scene]:
    """scene(name): one of CASES; made once."""
    folder = tmp_path_factory.mktemp("scenes")
    return cache(lambda name: Scene(name, folder, with_faults))


def seeded(*of: object) -> random.Random:
    """A seed of its own for each test; pytest shows what was printed when it fails."""
    print(f"SEED={SEED}", *of)
    return random.Random(f"{SEED} {of}")


# ---- Killed, stopped, cut off, refused -------------------------------------------------------------------------------


def kill_at(scene: Scene, number: int, how: int) -> Outcome:
    box, call = scene.copy(), scene.calls[number - 1]
    ended = scene.run(box, number, how)
    assert ended.status == -signal.SIGKILL, (number, call[:5], ended)
    return scene.comes_to_the_same_end(box, scene.saved_before(number), why=(number, how, call[:5]), killed=True)


@each_case(2, 25, cases=(*FEW, "rebuild"))
def test_killed_between_two_writes(name, times, scene):
    chance, case = seeded(name, times), scene(name)
    for number in sorted(chance.sample(range(1, len(case.calls) + 1), min(times, len(case.calls)))):
        kill_at(case, number, chance.choice((KILL, TEAR)))


@pytest.mark.parametrize(("kind", "name"), [("w", "index.sqlite"), JOURNAL, ("r", "index.faiss.part")])
def test_killed_around_a_commit(kind, name, scene):
    """Files and features are one transaction, and the index file comes before its note: nothing is to be repaired."""
    case = scene("codes, added to")
    there = case.places(kind, name)
    for number in {there[0], *(place + 1 for place in there[4:5]), there[-1]}:
        ended = kill_at(case, number, KILL)
        assert kind != "r" or "is made again" not in ended.stderr, ended


@each_case(2, 30)
def test_power_cut(name, times, scene):
    """Of what was not synced, nothing, anything or all is on disk, in sectors."""
    chance, case = seeded(name, times), scene(name)
    disk, done = Disk(case.box.index), 0
    for place in sorted(chance.choices(range(len(case.calls) + 1), k=times)):
        for call in case.calls[done:place]:
            disk.do(call)
        done, kept, box = place, chance.choice((0, 0, 0.5, 0.9)), case.copy()
        write_all(box.index, disk.after_power_cut(chance, kept))
        saved = case.saved_before(place + 1) - 1  # SQLite's last commit may be lost with its folder's entry
        case.comes_to_the_same_end(box, saved, why=(place, kept, case.calls[place - 1][:5]), killed=True)


EVERY = {"first, saved once", "prune", "codes"}  # each of their calls fails; of the others a share, for they repeat


@each_case(2, 40)
def test_a_failing_write(name, times, scene):
    """As where the disk is full: a line that names the cache, and nothing is lost that was there."""
    chance, case, noticed = seeded(name, times), scene(name), 0
    places = range(1, len(case.calls) + 1)
    chosen = sorted(chance.sample(places, len(places) if times > 2 and name in EVERY else min(times, len(places))))
    for number, error in zip(chosen, itertools.cycle((errno.ENOSPC, errno.EIO, errno.EACCES))):
        how = chance.choice((FAIL, FAIL, FAIL_ON))
        box, why = case.copy(), (number, how, errno.errorcode[error], case.calls[number - 1][:5])
        ended = case.run(box, number, how, error)
        noticed += one_line(ended)
        assert (one_line(ended) and f"{INDEX}/" in ended.stderr) or answers(ended) == case.expected, (why, ended)
        case.comes_to_the_same_end(box, why=why)
    assert noticed >= len(chosen) // 2 or len(chosen) < 10


def begun(box: Box, wait: float) -> None:
    """Wait until a run has taken the lock of the cache, or would have, and so many seconds more."""
    deadline = time.monotonic() + 60
    while not any(box.index.rglob("lock")) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(wait)


@each_case(3, 5, cases=("first", "prune"))
def test_killed_again_and_again(name, times, scene):
    """Each time on what the last one has left."""
    chance, case = seeded(name, times), scene(name)
    for _ in range(1 if times == 3 else 2):
        box = case.copy()
        for _ in range(times):
            run = box.start(*case.case.options, constants=case.case.constants)
            begun(box, chance.uniform(0, 0.3))
            run.send(signal.SIGKILL)
            assert run.wait().status in (-signal.SIGKILL, 0)
        case.comes_to_the_same_end(box)


STOPS = [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT,) * 2, (signal.SIGTERM,) * 2]
SLOW_STOPS = [pytest.param(name, 5, marks=pytest.mark.slow) for name in ("first", "rebuild", "prune")]


@pytest.mark.parametrize("stops", STOPS, ids=lambda stops: " ".join(number.name for number in stops))
@pytest.mark.parametrize(("name", "times"), [("first", 1), *SLOW_STOPS])
def test_stopped_politely(name, times, stops, scene):
    chance, case, stopped, latest = seeded(name, stops, times), scene(name), 0, 0.2
    for _ in range(4 * times):
        box = case.copy()
        for lock in box.index.rglob("lock"):
            lock.unlink()  # so that `begun` sees when the run takes it: before, Python may still be importing
        run = box.start(*case.case.options, "-q", constants=case.case.constants)
        begun(box, chance.uniform(0, latest))
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
        case.comes_to_the_same_end(box)
        if stopped == times:
            break
    assert stopped, "each was done before it was stopped"


# ---- A damaged cache -------------------------------------------------------------------------------------------------


class Caches:
    """One collection, and caches of it: a good one, and what to damage it with; the files of each, by name."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.box = box = Box(folder / "damage", zygote)
        box.put(*range(200, 220), *range(40))
        assert box.run("--index-only").status == 0
        self.cache = cache_folder(box.index)
        self.older = contents(self.cache)
        for seed in range(200, 220):
            (box.images / f"{seed}.png").unlink()
        box.put(*range(40, N))
        (box.images / "bad.png").write_bytes(b"\x89PNG")
        self.expected = box.fresh()
        answers(box.run())
        self.good = contents(self.cache)
        assert answers(box.run("--index-dir", "other", constants=OTHER)) != self.expected
        self.other = contents(cache_folder(box.folder / "other"))

    def answers_with(self, files: dict[str, bytes], why: object, spoil: Callable[[], Any] = lambda: None) -> str:
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
    for _ in range(chance.choice((1, 1, 1, 2, 5)) if damaged else 0):
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


KINDS = {cut: 80, flipped: 500, overwritten: 80, longer: 20}  # times, of the slow suite
FEW_KINDS = {cut: 4, flipped: 10, overwritten: 4, longer: 1}
SLOW_DAMAGE = [pytest.param(kind, times, marks=pytest.mark.slow) for kind, times in KINDS.items()]


@pytest.mark.parametrize(("kind", "times"), [*FEW_KINDS.items(), *SLOW_DAMAGE])
def test_damage(kind, times, caches):
    chance, said = seeded(kind.__name__, times), 0
    for number in range(times):
        name = chance.choice(sorted(caches.good))
        files = {**caches.good, name: kind(caches.good[name], chance)}
        said += bool(caches.answers_with(files, (number, kind, name)))
    assert said > times // 8 or times < 10 or kind is longer, "what was damaged is hardly ever noticed"


def mixtures(caches: Caches) -> Iterator[tuple[Any, dict[str, bytes]]]:
    """Each file from now, another moment, another model, or nowhere."""
    sources = {"good": caches.good, "older": caches.older, "other": caches.other, "nowhere": {}}
    for chosen in itertools.product(sources, repeat=len(caches.good)):
        pairs = [(name, sources[source]) for name, source in zip(sorted(caches.good), chosen)]
        yield chosen, {name: files[name] for name, files in pairs if name in files}


@pytest.mark.parametrize("number", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_files_that_do_not_belong_together(number, caches):
    for why, files in seeded("mixtures").sample([*mixtures(caches)], number):
        caches.answers_with(files, why)


def folder_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("do not delete")


@pytest.mark.parametrize(
    "make", [folder_with_a_file, partial(os.symlink, "nowhere")], ids=["folder", "link to nowhere"]
)
def test_something_else_in_the_place_of_a_file(make, caches):
    for name in caches.good:
        path = caches.cache / name
        rest = {key: content for key, content in caches.good.items() if key != name}
        caches.answers_with(rest, name, partial(make, path))
        assert make is not folder_with_a_file or (path / "mine.txt").exists()
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# ---- Many at once ----------------------------------------------------------------------------------------------------


def right_or_overtaken(ended: Outcome, expected: list[Any]) -> bool:
    """A run that another one has overtaken says so instead of guessing; what it said before is right."""
    if overtaken := "Run the command again" in ended.stderr:
        assert ended.status == 1 and "Traceback" not in ended.stderr and ended.stderr.count("error: ") == 1, ended
        ended = ended._replace(status=0)
    found = answers(ended, of=ended.stdout.count("\n") if overtaken else 2)
    assert found == expected[: len(found)], ended
    return not overtaken


def at_once(scene: Scene, options: list[tuple[str, ...]]) -> list[Outcome]:
    box = scene.copy()
    runs = [box.start(*these, constants=OFTEN) for these in options]
    ended = [run.wait() for run in runs]
    right = [right_or_overtaken(each, scene.expected) for each in ended]
    assert all(right) or any(options), ended  # none is overtaken where none begins anew
    scene.comes_to_the_same_end(box)
    return ended


SLOW_CROWDS = [pytest.param(name, 20, marks=pytest.mark.slow) for name in ("first", "repair")]


@pytest.mark.parametrize(("name", "many"), [("first", 6), ("repair", 4), *SLOW_CROWDS])
def test_many_at_once(name, many, scene):
    """None takes a growing database for a damaged one, and a damage is repaired once."""
    ended = at_once(scene(name), [()] * many)
    assert sum(extracted(each) for each in ended) <= scene(name).work + 1
    assert not any("Repaired" in each.stderr for each in ended)


@pytest.mark.slow
@pytest.mark.parametrize("round", range(8))
def test_twenty_of_all_kinds_at_once(round, scene):
    chance = seeded("kinds", round)
    name = chance.choice(("first", "add", "change", "repair", "index"))
    at_once(scene(name), chance.choices([(), (), ("--rebuild",), ("--prune",)], k=20))


def test_one_that_waits_goes_on_when_the_writer_is_killed(scene):
    case, box = scene("first"), scene("first").copy()
    writer = box.start(*case.case.options, constants=case.case.constants)
    begun(box, 0.1)
    waiting = box.start()
    time.sleep(0.1)
    writer.send(signal.SIGKILL)
    writer.wait()
    assert answers(waiting.wait(60)) == case.expected
    case.comes_to_the_same_end(box)
