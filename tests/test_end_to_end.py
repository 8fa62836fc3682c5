"""The program itself, in processes of its own, as a person runs it and as the world stops it."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MAIN, Outcome, draw
from make_samples import QUERIES, SAMPLES

Program = Callable[..., "subprocess.Popen[str]"]
IMAGES, INDEX = Path("bulk_images"), Path("image_index")


def finish(process: subprocess.Popen[str]) -> Outcome:
    stdout, stderr = process.communicate(timeout=120)
    return Outcome(process.returncode, stdout, stderr)


@pytest.fixture
def samples() -> None:
    """The folders as they come with the program."""
    for folder, names in (("bulk_images/samples", SAMPLES), ("that_one_image", QUERIES)):
        Path(folder).mkdir(parents=True)
        for name in names:  # and not what a user has put there
            if not (MAIN.parent / folder / name).exists():
                pytest.skip("the samples have been deleted, as README says they may be")
            shutil.copy(MAIN.parent / folder / name, folder)


def test_the_main_job_finds_the_sample_that_each_query_was_made_from(samples: None, program: Program) -> None:
    """With no options, and no weights to be had."""
    first = finish(program())
    assert first.status == 0
    assert re.findall(r"^(\S+).*\n +1 +\S+ +(\S+)", first.stdout, re.MULTILINE) == [
        (f"that_one_image/{query}", f"bulk_images/samples/{sample}") for query, sample in sorted(QUERIES.items())
    ]
    assert "offline descriptor" in first.stderr and "Traceback" not in first.stderr

    second = finish(program())
    assert second.stdout == first.stdout
    assert "0 new" in second.stderr and "no image was opened" in second.stderr


def test_the_functions_work_from_python(samples: None) -> None:
    """As README.md shows it."""
    script = """
from main import initialize_reverse_image_search, search

engine = initialize_reverse_image_search("bulk_images")
for answer in search(["that_one_image/cropped.jpg"], engine, k=3):
    print(answer.query, answer.error)
    for match in answer.matches:
        print(match.rank, match.path, round(match.score, 3), match.identical)
(same,) = search("that_one_image/cropped.jpg")
print(same.matches[0].path)
"""
    environment = {**os.environ, "PYTHONPATH": str(MAIN.parent)}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    lines = process.stdout.splitlines()
    assert lines[0] == "that_one_image/cropped.jpg None", process.stderr
    assert re.fullmatch(r"1 bulk_images/samples/lighthouse\.jpg 0\.\d+ False", lines[1])
    assert [line[:2] for line in lines[1:4]] == ["1 ", "2 ", "3 "]
    assert lines[4:] == ["bulk_images/samples/lighthouse.jpg"]


# ---- Stopped at any time ---------------------------------------------------------------------------------------------

MANY = 240  # images: seconds of work, one by one
ONE_BY_ONE = ("--model", "offline", "--index-only", "--batch-size", 1, "--workers", 1)


@pytest.fixture
def same_as_undisturbed(collection: Callable[[int], Path], run: Callable[..., Outcome]) -> Callable[[], Outcome]:
    """same_as_undisturbed(): one more run, and check that its answers are those of an index made in one go."""
    collection(MANY)
    draw(0, (50, 50)).save("query.png")

    def check() -> Outcome:
        ask = ("--model", "offline", "--json", "-k", MANY, "query.png")
        outcome, undisturbed = run(*ask), run(*ask, "--index-dir", "undisturbed")
        ours, theirs = (json.loads(it.stdout)["matches"] for it in (outcome, undisturbed))
        assert outcome.status == 0 and len(ours) == MANY
        scores = {match["path"]: match["score"] for match in theirs}
        assert {match["path"]: match["score"] for match in ours} == pytest.approx(scores, abs=1e-3)
        assert ours[0]["path"] == "bulk_images/0.png"
        return outcome

    return check


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_saves_the_work(
    stop: signal.Signals, program: Program, same_as_undisturbed: Callable[[], Outcome]
) -> None:
    terminal, its_end = os.openpty()  # on a terminal the progress is seen, and so, when to stop
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = program(*ONE_BY_ONE, stderr=its_end)
    os.close(its_end)
    seen, sent = b"", False
    try:
        while chunk := os.read(terminal, 4096):
            if re.search(rb" \d\d+/240 ", chunk) and not sent:
                process.send_signal(stop)
                sent = True
            seen += chunk
    except OSError:
        pass  # the other end was closed
    os.close(terminal)
    assert (process.wait(60), process.stdout.read()) == (130, "")
    assert seen.count(b"interrupted") == 1 and b"Traceback" not in seen

    summary = re.search(r"240 found, (\d+) new, (\d+) unchanged", same_as_undisturbed().stderr)
    assert summary and int(summary[1]) > 0 and int(summary[2]) >= 10


SAVING_ALL_THE_TIME = "import sys, main; main.SAVE_SECONDS = 0; raise SystemExit(main.main(sys.argv[1:]))"


def test_a_run_that_is_killed_again_and_again_comes_to_the_same_end(
    same_as_undisturbed: Callable[[], Outcome], run: Callable[..., Outcome]
) -> None:
    run("--model", "offline", "--index-only", "--index-dir", "undisturbed")
    total = size_of_features(Path("undisturbed"))
    environment = {**os.environ, "PYTHONPATH": str(MAIN.parent)}
    command = [sys.executable, "-c", SAVING_ALL_THE_TIME, *map(str, ONE_BY_ONE)]
    size = 0
    for share in random.Random(0).choices(range(1, 140), k=6):  # thousandths of the work, to be done before the end
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and size_of_features(INDEX) < size + total * share // 1000:
            pass
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
        size = size_of_features(INDEX)

    summary = re.search(r"240 found, (\d+) new, (\d+) unchanged", same_as_undisturbed().stderr)
    assert summary and int(summary[1]) > 0 and int(summary[2]) > 20


def size_of_features(index_dir: Path) -> int:
    return sum(path.stat().st_size for path in index_dir.glob("*/index.sqlite"))
