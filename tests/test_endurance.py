"""Whatever was done to a collection and its cache, in whatever order: the answers are those of a fresh index."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from faults import KILL, contents, write_all
from test_faults import OFTEN, OTHER, Box, N, answers, drawn, extracted, flipped, one_line, seeded
from zygote import Zygote

START = 12  # images
NO_PICTURES = (b"", b"\x89PNG", b"text")


class World(Box):
    """A collection and its cache, and what may happen to them. Each act takes one number that decides on the rest."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        super().__init__(folder, zygote)
        self.hidden, self.constants, self.older = folder / "hidden", dict[str, float](), dict[str, bytes]()
        self.hidden.mkdir()
        self.put(*range(START))

    def run(self, *options: object, **how: Any) -> Outcome:
        return super().run(*options, **{"constants": self.constants, **how})

    def some(self, number: int) -> list[Path]:
        """A few of the images, never all of them."""
        found = sorted(path for path in self.images.rglob("*") if path.is_file() and path.name != "0.png")
        return random.Random(number).sample(found, min(number % 4 + 1, len(found)))

    def elsewhere(self, number: int, path: Path) -> Path:
        """Another name for it: a new one, or that of another image."""
        others = [other for other in self.some(number + 1) if other != path]
        return others[0] if number % 2 and others else path.with_name(f"{number} {path.name}"[-100:])

    def add(self, number: int) -> None:
        folder = self.images / ("", "sub", "sub/sub")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (self.images / f"bad {number}.png").write_bytes(NO_PICTURES[number % 3])
        for seed in range(number, number + number % 5):
            (folder / f"{seed}.png").write_bytes(drawn(2000 + seed % 30))  # some come again under other names

    def change(self, number: int) -> None:
        for seed, path in enumerate(self.some(number), number):
            path.write_bytes(NO_PICTURES[number % 3] if number % 2 else drawn(2000 + seed % 30))

    def copy_some(self, number: int) -> None:
        for path in self.some(number):
            shutil.copy(path, self.elsewhere(number, path))

    def rename(self, number: int) -> None:
        for path in self.some(number):
            path.rename(self.elsewhere(number, path))

    def swap(self, number: int) -> None:
        for one, two in zip(self.some(number), self.some(number + 1)):
            content = one.read_bytes()
            one.write_bytes(two.read_bytes())
            two.write_bytes(content)

    def remove(self, number: int) -> None:
        for path in self.some(number):
            path.unlink() if number % 2 else path.rename(self.hidden / f"{number} {path.name}"[-100:])

    def restore(self, number: int) -> None:
        for path in self.hidden.iterdir():
            path.rename(self.images / path.name)

    def work(self, number: int) -> None:
        assert self.run("--index-only", ("--prune", "--rebuild")[number % 2]).status == 0

    def switch_model(self, number: int) -> None:
        self.constants = {} if self.constants else OTHER

    def kill(self, number: int) -> None:
        """At some call that changes the cache; it may be over before it comes to it."""
        options = (("--index-only",), ("--prune",), ("--rebuild",), ())[number % 4]
        faults = (self.index, 1 + number % 400, KILL, 0)
        assert self.run(*options, constants={**self.constants, **OFTEN}, faults=faults).status in (0, -9)

    def back_up(self, number: int) -> None:
        self.older = contents(self.index)

    def go_back(self, number: int) -> None:
        """The cache is replaced by its own backup."""
        if self.older:
            write_all(self.index, self.older)

    def damage(self, number: int) -> None:
        """A file of the cache, if there is one, is lost or altered."""
        paths = sorted(path for path in self.index.rglob("*") if path.is_file())
        for path in random.Random(number).sample(paths, min(1, len(paths))):
            path.write_bytes(flipped(path.read_bytes(), random.Random(number))) if number % 2 else path.unlink()

    def check(self) -> None:
        """Twice: the second run has nothing to do."""
        before = self.run()
        if one_line(before) and "newer" in before.stderr:  # damage hit the number of the format: refused, by design
            shutil.rmtree(self.index)
            before = self.run()
        after = self.run()
        assert answers(before) == answers(after) == self.fresh(), before
        assert extracted(after) == 0


FILES = (World.add, World.change, World.rename, World.swap, World.remove, World.restore)
CACHE = (World.work, World.switch_model, World.kill, World.back_up, World.go_back, World.damage)
WALKS = [("a short one", 6), *(pytest.param(walk, 80, marks=pytest.mark.slow) for walk in range(4))]


@pytest.mark.parametrize(("walk", "steps"), WALKS)
def test_any_sequence_of_acts_leaves_the_answers_of_a_fresh_index(walk, steps, with_faults, tmp_path):
    chance, world = seeded(walk), World(tmp_path / "world", with_faults)
    for _ in range(steps):
        act, number = chance.choice((*FILES, World.copy_some, *CACHE)), chance.randrange(1000)
        print(act.__name__, number)
        act(world, number)
        world.check()


@pytest.mark.parametrize("times", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_the_collection_changes_while_it_is_scanned(times, zygote, tmp_path):
    chance, world, until = seeded("changes", times), World(tmp_path / "world", zygote), threading.Event()
    world.put(*range(N))

    def disturb() -> None:
        while not until.is_set():
            chance.choice(FILES)(world, chance.randrange(1000))

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        for _ in range(times):
            ended = world.run()
            assert ended.status == 0 and "Traceback" not in ended.stderr, ended
    finally:
        until.set()
        disturber.join()
    world.check()
