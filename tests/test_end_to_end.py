"""The program itself, in processes of its own, as a person runs it: on the samples, from Python, and stopped."""

import fcntl
import os
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
from conftest import MAIN, Outcome, counts, draw

Program = Callable[..., "subprocess.Popen[str]"]
SAMPLES, ASKED = Path("bulk_images", "samples"), Path("that_one_image")
QUERIES = {"captioned.jpg": "teapot.jpg", "cropped.jpg": "lighthouse.jpg", "mirrored.jpg": "sailing-boat.jpg"}


def finish(process: subprocess.Popen[str]) -> Outcome:
    stdout, stderr = process.communicate(timeout=120)
    return Outcome(process.returncode, stdout, stderr)


@pytest.fixture
def samples() -> None:
    """The folders as they come with the program, without what a user has put there."""
    if not all((MAIN.parent / SAMPLES / name).exists() for name in QUERIES.values()):
        pytest.skip("the samples have been deleted, as README says they may be")
    shutil.copytree(MAIN.parent / SAMPLES, SAMPLES)
    ASKED.mkdir()
    for name in QUERIES:
        shutil.copy(MAIN.parent / ASKED / name, ASKED)


def test_the_main_job_finds_the_sample_that_each_query_was_made_from(samples, program):
    """With no options, and no weights to be had."""
    first = finish(program())
    assert first.status == 0
    assert re.findall(r"^(\S+).*\n +1 +\S+ +(\S+)", first.stdout, re.MULTILINE) == [
        (f"that_one_image/{query}", f"bulk_images/samples/{sample}") for query, sample in QUERIES.items()
    ]
    assert "offline descriptor" in first.stderr and "Traceback" not in first.stderr
    second = finish(program())
    assert second.stdout == first.stdout
    assert "0 new" in second.stderr and "no image was opened" in second.stderr


def test_the_functions_work_from_python(samples):
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
    command, path = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(MAIN.parent)}
    process = subprocess.run(command, env=path, capture_output=True, text=True, timeout=120)
    lines = process.stdout.splitlines()
    assert lines[0] == "that_one_image/cropped.jpg None", process.stderr
    assert re.fullmatch(r"1 bulk_images/samples/lighthouse\.jpg 0\.\d+ False", lines[1])
    assert [line[:2] for line in lines[1:4]] == ["1 ", "2 ", "3 "]
    assert lines[4:] == ["bulk_images/samples/lighthouse.jpg"]


def test_progress_is_seen_on_a_terminal_and_a_polite_stop_saves_the_work(program, collection, run):
    collection(200)
    index = ("--model", "offline", "--index-only", "--batch-size", 1, "--workers", 1)
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = program(*index, stderr=its_end)
    os.close(its_end)
    seen, sent = b"", False
    try:
        while chunk := os.read(terminal, 4096):
            if re.search(rb" \d\d+/200 ", chunk) and not sent:
                process.send_signal(signal.SIGINT)
                sent = True
            seen += chunk
    except OSError:
        pass  # the other end was closed
    os.close(terminal)
    assert (process.wait(60), process.stdout.read()) == (130, "")
    assert seen.count(b"interrupted") == 1 and b"Traceback" not in seen
    figures = counts(run(*index))
    assert figures["new"] > 0 and figures["unchanged"] >= 10
    draw(0, (50, 50)).save("query.png")
    ask = ("--model", "offline", "-k", 200, "query.png")
    assert run(*ask).stdout == run(*ask, "--index-dir", "undisturbed").stdout != ""
