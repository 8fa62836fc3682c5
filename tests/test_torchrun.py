"""Several processes share the work: `torchrun --nproc-per-node 2 main.py --index-only`."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MAIN, Outcome, cache_folder, counts, draw
from faults import DEADLY, contents

pytest.importorskip("torch").distributed.is_available() or pytest.skip("torch without it", allow_module_level=True)

Run = Callable[..., Outcome]
OFFLINE = ("--model", "offline")
SLOWLY = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import main

signal.signal(signal.SIGTERM, signal.default_int_handler)
open(f"pid-{{os.environ['RANK']}}", "w").write(str(os.getpid()))
read = main.read_picture
main.read_picture = lambda *args, **named: [time.sleep(0.05), read(*args, **named)][1]
main.SAVE_SECONDS = 0
raise SystemExit(main.main(sys.argv[1:]))
"""


@pytest.fixture
def torchrun(program: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.Popen[str]]:
    """torchrun(*args, script=MAIN): two ranks."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    return lambda *args, script=MAIN: program(*args, python=[*launch, script])


def features_in(path: Path) -> int:
    """How many features a database holds that another process is writing."""
    try:
        with closing(sqlite3.connect(path, timeout=60)) as db:
            return db.execute("SELECT count(*) FROM features").fetchone()[0]
    except sqlite3.OperationalError:  # it is being created
        return 0


def points_in(path: Path) -> dict[bytes, bytes]:
    """The points in a database, by the content of their picture."""
    with closing(sqlite3.connect(path)) as db:
        return dict(db.execute("SELECT digest, points FROM points").fetchall())


def finish(process: subprocess.Popen[str]) -> Outcome:
    stdout, stderr = process.communicate(timeout=180)
    return Outcome(process.returncode, stdout, stderr)


@pytest.fixture
def ask(run: Run) -> Callable[[str], str]:
    """ask(index_dir): what a search prints, every byte of it."""
    draw(3, (90, 70)).save("query.png")
    return lambda index_dir: run("query.png", *OFFLINE, "--json", "-k", 100, "--index-dir", index_dir).stdout


def test_two_ranks_make_the_index_that_one_process_makes(collection, torchrun, run, ask):
    root = collection(60)
    (root / "bad.png").touch()
    (root / "again.png").write_bytes((root / "7.png").read_bytes())
    ranks = finish(torchrun("query.png", *OFFLINE, "--json", "-k", 100, "--index-dir", "two"))
    assert (ranks.status, ranks.stdout) == (0, ask("one"))
    assert ranks.stderr.count("bulk_images: 62 found, 61 new") == 1
    assert ranks.stderr.count(" found,") == 1 and "Traceback" not in ranks.stderr
    assert not list(Path("two").glob("*/rank-*"))
    assert "0 new" in run(*OFFLINE, "--index-only", "--index-dir", "two").stderr
    assert ask("two") == ask("one") != ""
    two, one = (points_in(cache_folder(name) / "index.sqlite") for name in ("two", "one"))
    assert two == one and len(two) == 60 and all(two.values())


@pytest.mark.slow
def test_two_ranks_add_to_an_index(collection, torchrun, run, ask):
    root = collection(60)
    run(*OFFLINE, "--index-only", "--index-dir", "two")
    draw(100).save(root / "later.png")
    added = finish(torchrun(*OFFLINE, "--index-only", "--index-dir", "two"))
    assert (added.status, added.stdout) == (0, "") and "61 found, 1 new" in added.stderr
    assert ask("two") == ask("one") != ""


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_killed_costs_only_what_it_had_not_saved(rank, collection, torchrun, run, ask, tmp_path):
    collection(80)
    (tmp_path / "slowly.py").write_text(SLOWLY.format(folder=str(MAIN.parent)))
    settings = ("--index-only", "--batch-size", 1, "--workers", 1, "--index-dir", "two")
    process = torchrun(*OFFLINE, *settings, script=tmp_path / "slowly.py")
    while sum(map(features_in, Path("two").glob("*/rank-1.sqlite"))) <= 10:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(int(Path(f"pid-{rank}").read_text()), signal.SIGKILL)
    stopped = finish(process)
    assert stopped.status != 0 and " found," not in stopped.stderr

    records = sum(map(features_in, Path("two").glob("*/*.sqlite")))
    assert 10 < records < 80
    new = counts(run(*OFFLINE, "--index-only", "--index-dir", "two"))["new"]
    assert 0 < new <= 80 - records + 2  # of each rank, what it was just writing
    assert not list(Path("two").glob("*/rank-*"))
    assert ask("two") == ask("one") != ""


def test_a_decoder_that_crashes_another_rank_costs_one_file(collection, torchrun, with_faults, run, monkeypatch):
    """The run that it ends, too, but not those that follow."""
    root = collection(10)
    name = next(f"{i}deadly.png" for i in range(99) if zlib.crc32(b"%ddeadly.png" % i) % 2 == 1)  # the second reads it
    (root / name).write_bytes(DEADLY)
    monkeypatch.setenv("LD_PRELOAD", with_faults.environment["LD_PRELOAD"])
    first, second = finish(torchrun(*OFFLINE, "--index-only", "-v")), run(*OFFLINE, "--index-only", "-v")
    assert first.status != 0 and " found," not in first.stderr
    assert second.status == 0 and "11 found" in second.stderr, second.stderr
    assert f"{name}: its decoder crashes" in second.stderr
    assert sorted(contents(cache_folder())) == ["copies.faiss", "index.faiss", "index.sqlite", "lock"]


def test_what_the_first_rank_cannot_do_stops_them_all(torchrun):
    outcome = finish(torchrun(*OFFLINE, "--index-only"))
    assert outcome.status != 0 and outcome.stderr.count("bulk_images is missing") == 1
