"""Hostile input: images that lie, names that would do harm, caches and weights from a stranger. A line of reason is all
that any of them gets, within ten seconds and a gigabyte or so; and no other file, nor the run, pays for it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import signal
import socket
import sqlite3
import struct
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import mutants
import numpy as np
import pytest
import torch
from conftest import HOSTILE_NAMES, cache_folder, counts, draw, encoded, one_line
from faults import DEADLY, contents
from PIL import Image
from zygote import Outcome, Zygote

SEED = int(os.environ.get("SEED", 20))
GIGABYTE = 1 << 30
HERE = Path(__file__).parent
OFFLINE = ("--model", "offline", "--no-report")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux"),
    pytest.mark.filterwarnings("ignore::Warning:PIL"),
]


def seldom(cases: Iterable[str], *often: str) -> list[Any]:
    """All but those that are tried `often` are for the slow suite."""
    return [case if case in often else pytest.param(case, marks=pytest.mark.slow) for case in cases]


FUZZ = """
import sys, warnings
sys.path.insert(0, {here!r})
import mutants
warnings.simplefilter("ignore")
read = lambda path: read_picture(File(os.fsencode(path), 0, 0), b"", lambda digest: get_transform(96))
mutants.fuzz(read, {seed!r}, {begin}, {end}, ".")
"""


@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_fuzzed_images_are_read_or_refused(count, zygote):
    """A process that dies of a mutant is a failure that names it."""
    total, step = Counter[str](), 500
    print(f"SEED={SEED}, {len(mutants.samples())} samples")
    for begin in range(0, count, step):
        code = FUZZ.format(here=str(HERE), seed=SEED, begin=begin, end=min(count, begin + step))
        ended = zygote(code=code, room=GIGABYTE, timeout=600)
        assert ended.status == 0, f"mutant {Path('progress').read_text()} of seed {SEED}: {ended}"
        total.update(json.loads(ended.stdout.splitlines()[-1]))
    assert total.total() == count and min(total["read"], total["refused"]) > count // 10


# ---- Images that are larger than they look, and others that are none -------------------------------------------------


def png(width: int, height: int, *more: tuple[bytes, bytes], depth: int = 8, colour: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pack = zlib.compressobj(9)
    row = bytes(1 + width * depth // 8 * {0: 1, 2: 3, 6: 4}[colour])
    data = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *(chunk(*it) for it in more), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def squeezed_text(name: bytes, megabytes: int) -> tuple[bytes, bytes]:
    return b"zTXt", name + b"\0\0" + zlib.compress(bytes(megabytes << 20), 9)


def ifd_chain(links: int, loop: bool) -> bytes:
    """A TIFF whose directories each point to the next one, the last to the first."""
    picture = encoded(Image.new("L", (8, 8)), "TIFF")
    (first,) = struct.unpack_from("<I", picture, 4)
    (count,) = struct.unpack_from("<H", picture, first)
    directory, chain = picture[first : first + 2 + 12 * count], bytearray(picture)
    for link in range(links):
        here = len(chain)
        chain[-4:] = struct.pack("<I", here) if link == 0 else chain[-4:]
        following = 8 if loop and link == links - 1 else here + len(directory) + 4
        chain += directory + struct.pack("<I", following)
    return bytes(chain)


def exif_spiral(depth: int) -> bytes:
    """A JPEG whose EXIF directories contain one another, and at last themselves."""
    tiff = bytearray(b"II*\0" + struct.pack("<I", 8))
    for level in range(depth):
        here = len(tiff)
        tiff += struct.pack("<HHHIII", 1, 0x8769, 4, 1, here + 18 if level < depth - 1 else 8, 0)
    body = b"Exif\0\0" + bytes(tiff)[:65000]
    plain = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]


def many_segments(count: int) -> bytes:
    plain = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return plain[:2] + (b"\xff\xe2\xff\xff" + b"ICC_PROFILE\0\1\1".ljust(65533, b"x")) * count + plain[2:]


def mpo_of(frames: int) -> bytes:
    """At most 800: what tells of them is one segment, and Pillow cannot write more."""
    first = Image.new("RGB", (8, 8))
    return encoded(first, "MPO", save_all=True, append_images=[first] * frames)


def gif_of(frames: int) -> bytes:
    plain = encoded(Image.new("P", (8, 8)), "GIF")
    start = plain.index(b",\0\0\0\0")
    return plain[:start] + plain[start:-1] * frames + b";"


def ico_of(content: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(content), 22) + content


def webp_header(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + canvas + b"VP8L" + struct.pack("<I", 8) + b"/" * 8
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_of(width: int, height: int) -> bytes:
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 64)]
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


W, H = 10_000, 9_990  # just within the limit
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr", "I", "I;16", "F")
LARGEST: dict[str, Callable[[], bytes]] = {  # all are read
    **{
        f"TIFF, {mode}": lambda mode=mode: encoded(Image.new(mode, (W, H)), "TIFF", compression="tiff_adobe_deflate")
        for mode in MODES
    },
    **{f"PNG, {mode}": lambda mode=mode: encoded(Image.new(mode, (W, H))) for mode in ("L", "P", "RGBA", "I;16")},
    "PNG, one transparent colour": lambda: encoded(Image.new("P", (W, H)), "PNG", transparency=3),
    "GIF": lambda: encoded(Image.new("P", (W, H)), "GIF"),
    "BMP": lambda: encoded(Image.new("RGB", (W, H)), "BMP"),
    "WebP": lambda: encoded(Image.new("RGBA", (7_070, 7_070)), "WEBP"),
    "JPEG2000": lambda: encoded(Image.new("RGB", (7_000, 7_000)), "JPEG2000"),
    "AVIF": lambda: encoded(Image.new("RGB", (W, H)), "AVIF", speed=10),
    "JPEG": lambda: encoded(Image.new("CMYK", (W, H)), "JPEG"),
    "JPEG, 200 megapixels": lambda: encoded(Image.new("L", (16_320, 12_240), 99), "JPEG"),  # decoded at an eighth
    "ICO": lambda: ico_of(encoded(Image.new("RGBA", (W, H)))),
}
BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG, one row of 100 million": lambda: encoded(Image.new("L", (99_999_999, 1))),
    "PNG, too large by one column": lambda: png(10_001, 10_000),
    "PNG in an ICO": lambda: ico_of(png(16_000, 16_000)),
    "GIF of 100,000 frames": lambda: gif_of(100_000),
    "GIF of 65,535 × 65,535": lambda: b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";",
    "TIFF of 4 gigapixels": lambda: tiff_of(65_535, 65_535),
    "TIFF of a strip that is not there": lambda: tiff_of(W, H),
    "TIFF, packed": lambda: encoded(Image.new("1", (W, H)), "TIFF", compression="group4"),
    "TIFF, a chain of 20,000 directories": lambda: ifd_chain(20_000, loop=False),
    "TIFF, a chain that bites its tail": lambda: ifd_chain(5, loop=True),
    "WebP of 9,000 × 9,000": lambda: encoded(Image.new("RGB", (9_000, 9_000)), "WEBP"),
    "WebP of 16,384 × 16,384": lambda: webp_header(16_384, 16_384),
    "WebP of 2^24 × 2^24": lambda: webp_header(1 << 24, 1 << 24),
    "PPM of 10^18 pixels": lambda: b"P6 1000000000 1000000000 255\n",
    "PNG, a text of 100 megabytes": lambda: png(8, 8, squeezed_text(b"a", 100)),
    "PNG, 200 texts of a megabyte": lambda: png(8, 8, *[squeezed_text(b"%d" % i, 1) for i in range(200)]),
    "PNG, 20 megabytes of plain text": lambda: png(8, 8, (b"tEXt", b"a\0" + b"x" * 20_000_000)),
    "PNG, a colour profile of a gigabyte": lambda: png(8, 8, (b"iCCP", squeezed_text(b"icc", 1000)[1])),
    "PNG, 100,000 chunks": lambda: png(8, 8, *[(b"tEXt", b"a\0b")] * 100_000),
    "JPEG, EXIF directories in one another": lambda: exif_spiral(3_000),
    "JPEG, 30 megabytes of profile": lambda: many_segments(500),
    "MPO of 800 frames": lambda: mpo_of(800),
}
HEAVY = ("PNG, a colour profile of a gigabyte", "PNG in an ICO", "WebP of 9,000 × 9,000", "TIFF, packed")  # to make
LIGHT = [name for name in BOMBS if name not in HEAVY]
OTHERS = {
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "SVG with entities": b"<!DOCTYPE svg [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;&a;'>]><svg>&b;</svg>",
    "PDF": b"%PDF-1.7\n1 0 obj<</OpenAction<</S/Launch/F(sh)>>>>endobj\n",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(exploded) (w) file closefile\n",
    "EPS in DOS": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 60) + bytes(20) + b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "shell script": b"#!/bin/sh\ntouch exploded\n",
    "pickle": pickle.dumps(print),
    "HTML": b"<html><script>alert(1)</script></html>",
}
READ_ONE = """
import time, warnings
warnings.simplefilter("ignore")
start = time.process_time()
picture = read_picture(File(b"bomb.jpg", 0, 0), b"", lambda digest: get_transform(96))
print(picture.made is not None, round(time.process_time() - start, 2), picture.reason or "")
"""


def look_at(zygote: Zygote, room: int = GIGABYTE) -> str:
    """Why bomb.jpg cannot be used, in `room` bytes of memory and ten seconds of a processor; "" if it can."""
    ended = zygote(code=READ_ONE, room=room, timeout=60)
    assert ended.status == 0 and ended.stdout.count("\n") == 1, ended
    read, seconds, reason = ended.stdout.rstrip("\n").split(" ", 2)
    assert float(seconds) < 10, ended
    assert (read == "True") == (reason == ""), ended
    return reason


@pytest.mark.parametrize("bomb", seldom(BOMBS, *LIGHT))
def test_a_bomb_is_read_or_refused_in_ten_seconds_and_a_gigabyte(bomb, zygote):
    Path("bomb.jpg").write_bytes(BOMBS[bomb]())
    print(look_at(zygote))


@pytest.mark.parametrize("kind", seldom(LARGEST, "PNG, RGBA", "JPEG, 200 megapixels"))
def test_the_largest_pictures_take_one_and_a_half_gigabytes(kind, zygote):
    Path("bomb.jpg").write_bytes(LARGEST[kind]())
    assert look_at(zygote, 3 * GIGABYTE // 2) == ""


def fifo_with_a_writer(path: str) -> None:
    os.mkfifo(path)
    os.write(os.open(path, os.O_RDWR), b"\xff\xd8\xff\xe0")


DEVICES = "/dev/zero", "/dev/full", "/dev/random", "/proc/self/mem", "/dev/stdin"
NOT_REGULAR: dict[str, Callable[[str], Any]] = {
    "FIFO": os.mkfifo,
    "FIFO with a writer": fifo_with_a_writer,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(path),
    "folder": os.mkdir,
    **{device: partial(os.symlink, device) for device in DEVICES},
}


@pytest.mark.parametrize("make", NOT_REGULAR.values(), ids=NOT_REGULAR)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(make, zygote):
    make("bomb.jpg")
    assert look_at(zygote)


@pytest.mark.parametrize("names", [("1deadly.png", "25deadly.png"), ("deadly.png",)], ids=["two", "the last file"])
def test_a_decoder_that_crashes_costs_one_file(names, with_faults, collection):
    """The run that it ends, too, but not the next one; and it is remembered."""
    images, ask = collection(30), (*OFFLINE, "--index-only", "-v", "--batch-size", 4, "--workers", 3 - len(names))
    for name in names:
        (images / name).write_bytes(DEADLY)
    runs = [with_faults(*ask) for _ in range(len(names) + 1)]
    assert runs[0].status == -signal.SIGSEGV and runs[-1].status == 0, runs
    assert runs[-1].stderr.count("deadly.png: its decoder crashes") == len(names)
    assert counts(with_faults(*ask)) == {"found": 30 + len(names), "unchanged": 30, "skipped": len(names)}
    draw(50).save(images / "new.png")
    later = with_faults(*ask)
    assert "the last run crashed" in runs[-1].stderr and "the last run crashed" not in later.stderr, later
    assert sorted(contents(cache_folder())) == ["copies.faiss", "index.faiss", "index.sqlite", "lock"]


def test_a_collection_of_bombs_costs_no_picture(zygote, collection):
    images = collection(5)
    for number, name in enumerate(LIGHT[::2]):
        (images / f"bomb {number}.jpg").write_bytes(BOMBS[name]())
    for name, content in OTHERS.items():
        (images / f"{name}.jpg").write_bytes(content)
    os.symlink("/dev/zero", images / "zero.jpg")
    os.mkfifo(images / "fifo.jpg")
    os.symlink(".", images / "loop")
    first, second = (zygote(*OFFLINE, "--index-only", "-v", room=2 * GIGABYTE) for _ in range(2))
    for ended in (first, second):
        assert ended.status == 0 and "Traceback" not in ended.stderr, ended
        assert all(f"{name}.jpg: " in ended.stderr for name in OTHERS)
        assert not any(f"/{seed}.png" in ended.stderr for seed in range(5))
    assert "no image was opened" in second.stderr
    assert not Path("exploded").exists()


# ---- Hostile names ---------------------------------------------------------------------------------------------------


@pytest.fixture
def named(collection: Callable[[int], Path]) -> list[bytes]:
    """A collection, and queries, of all these names at once, each with a picture of its own."""
    images, names = os.fsencode(collection(3)), [*HOSTILE_NAMES.values(), b"deep.png"]
    os.mkdir("queries")
    for seed, name in enumerate(names, 100):
        for root, size in ((images, (96, 64)), (b"queries", (48, 32))):
            with open(os.path.join(root, name), "wb") as stream:
                draw(seed).resize(size).save(stream, "PNG")
    return names


def make_deep(root: Path, length: int) -> None:
    """far.png, by a path of `length` bytes: relative, as an absolute one would be too long for one call."""
    here, rest = os.open(root, os.O_RDONLY), length - len("far.png")
    while rest:
        side = min(200, rest - 1 if rest != 202 else 100)
        os.mkdir("d" * side, dir_fd=here)
        here, rest = os.open("d" * side, os.O_RDONLY, dir_fd=here), rest - side - 1
    file = os.open("far.png", os.O_WRONLY | os.O_CREAT, dir_fd=here)
    os.write(file, encoded(draw(7)))
    os.close(file)


def test_every_name_is_answered_with_in_json(named, zygote):
    make_deep(Path("bulk_images"), 4000)
    ended = zygote(*OFFLINE, "--json", "queries", "-k", 1)
    assert ended.status == 0 and ended.stdout.isascii() and "Traceback" not in ended.stderr, ended
    objects = [json.loads(line) for line in ended.stdout.splitlines()]
    pairs = {(os.fsencode(it["query"]), os.fsencode(it["matches"][0]["path"])) for it in objects}
    assert pairs == {(b"queries/" + name, b"bulk_images/" + name) for name in named}
    assert f"{len(named) + 4} found" in ended.stderr
    assert not Path("exploded").exists()


def test_every_name_is_a_line_of_text_that_steers_nothing(named, zygote):
    ended = zygote(*OFFLINE, "-v", "queries", "-k", 1)
    assert ended.status == 0 and ended.stdout.count("\n") == 2 * len(named)
    harmful = {c for c in ended.stdout + ended.stderr if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - {"\n"}
    assert not harmful
    for name in named:
        if name.isascii() and b"\\" not in name and all(32 <= byte < 127 for byte in name):
            assert f"bulk_images/{os.fsdecode(name)}" in ended.stdout


@pytest.mark.parametrize("length", [3900, 4083, 4084, 4094])
def test_a_path_of_four_thousand_bytes(length, zygote, collection):
    """Beyond 4,095 bytes the system itself names no file: it is said, and costs no other."""
    make_deep(collection(2), length)
    first, second = (zygote(*OFFLINE, "--json", "bulk_images/0.png") for _ in range(2))
    assert first.status == second.status == 0 and first.stdout == second.stdout, first
    assert "Traceback" not in first.stderr
    paths = [match["path"] for match in json.loads(first.stdout)["matches"]]
    reached = length + len("bulk_images/") < 4096
    assert ([path for path in paths if path.endswith("far.png")] != []) == reached, first
    assert reached or "far.png" in first.stderr or "listed" in first.stderr or "skipped" in first.stderr


@pytest.mark.parametrize("name", seldom(HOSTILE_NAMES, "newline", "not UTF-8", "a pattern", "255 bytes, not UTF-8"))
def test_folders_may_have_such_names_too(name, zygote):
    """The collection, the cache and the folder of queries."""
    folders = [prefix + os.fsdecode(HOSTILE_NAMES[name])[-200:] for prefix in ("i", "c", "q")]
    for folder in folders[::2]:
        os.mkdir(folder)
        draw(3).save(os.path.join(folder, "3.png"))
    images, index, queries = (f"./{folder}" for folder in folders)
    ended = zygote(*OFFLINE, "--json", "--images", images, "--index-dir", index, queries)
    assert ended.status == 0 and len(json.loads(ended.stdout)["matches"]) == 1, ended
    assert os.path.isdir(folders[1]) and not Path("exploded").exists()


# ---- A stranger's cache and weights ----------------------------------------------------------------------------------


class Bomb:
    """A pickle that leaves a trace when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.path.abspath("exploded"),)


def written(save: Callable[[io.BytesIO], Any]) -> bytes:
    save(stream := io.BytesIO())
    return stream.getvalue()


PICKLES: dict[str, Callable[[], bytes]] = {
    **{f"protocol {protocol}": lambda protocol=protocol: pickle.dumps(Bomb(), protocol) for protocol in (0, 2, 5)},
    "numpy": lambda: written(lambda to: np.save(to, np.array([Bomb()], dtype=object))),
    "torch": lambda: written(lambda to: torch.save(Bomb(), to)),
    "torch, old": lambda: written(lambda to: torch.save(Bomb(), to, _use_new_zipfile_serialization=False)),
}


@pytest.mark.parametrize("kind", seldom(PICKLES, "protocol 2", "torch"))
def test_a_pickle_never_runs_wherever_it_is_planted(kind, zygote, collection):
    images, content = collection(4), PICKLES[kind]()
    ask = (*OFFLINE, "--json", "bulk_images/0.png", "bulk_images/bomb.png", "--images")
    before = zygote(*ask, images)
    parts = ("index.sqlite.part", "index.faiss.part", "index.sqlite-journal", "rank-1.sqlite")
    (images / "bomb.png").write_bytes(content)
    for name in (*contents(cache_folder()), *parts):
        (cache_folder() / name).write_bytes(content)
        ended = zygote(*ask, images)
        assert "Traceback" not in ended.stderr and ended.stdout.splitlines()[0] == before.stdout.splitlines()[0], ended
    Path("weights.pth").write_bytes(content)
    for model in ("resnet50", "squeezenet1_1", "timm:resnet18"):
        ended = zygote("--model", model, "--weights", "weights.pth", "--index-only")
        assert ended.status == 1 and ended.stderr.splitlines()[-1].startswith("error: "), ended
        assert "Traceback" not in ended.stderr
    assert not Path("exploded").exists()


HOSTILE_INDEXES: dict[str, Callable[[bytes], bytes]] = {  # what crashes or starves FAISS, or would, had it been read
    "claims 2^60 vectors": lambda good: good[:8] + struct.pack("<q", 1 << 60) + good[16:],
    "of another dimension": lambda good: good[:4] + struct.pack("<i", 1 << 30) + good[8:],
    "another kind": lambda good: b"IwFl" + good[4:],
    "noise": lambda good: good[:40] + random.Random(SEED).randbytes(len(good) - 40),
}


@pytest.mark.parametrize("kind", HOSTILE_INDEXES)
def test_an_index_is_read_only_when_its_checksum_holds(kind, zygote, collection):
    collection(8)
    ask = (*OFFLINE, "--json", "bulk_images/0.png")
    before, index = zygote(*ask), cache_folder() / "index.faiss"
    index.write_bytes(HOSTILE_INDEXES[kind](index.read_bytes()))
    ended = zygote(*ask, room=GIGABYTE)
    assert (ended.status, ended.stdout) == (0, before.stdout) and "made again" in ended.stderr, ended


@pytest.mark.parametrize("suffix", ["", ".part"])
def test_a_link_in_the_cache_harms_no_file_elsewhere(suffix, zygote, collection):
    images, mine = collection(4), Path("mine.txt")
    mine.write_text("do not touch")
    ask = (*OFFLINE, "--json", "bulk_images/0.png")
    assert zygote(*ask).status == 0
    cache = cache_folder()
    for number, name in enumerate([*sorted(contents(cache)), "index.sqlite-journal"]):
        (cache / f"{name}{suffix}").unlink(missing_ok=True)
        (cache / f"{name}{suffix}").symlink_to(mine.absolute())
        draw(50 + number).save(images / f"{name}.png")
        ended = zygote(*ask, "--rebuild" if number % 2 else "--prune")
        assert "Traceback" not in ended.stderr and ended.status in (0, 1), (name, ended)
        assert mine.read_text() == "do not touch", (name, ended)
        (cache / f"{name}{suffix}").unlink(missing_ok=True)


def test_a_database_with_triggers_and_views_is_made_again_without_them(zygote, collection):
    images, query = collection(4), "SELECT sql FROM sqlite_master ORDER BY sql"
    ask = (*OFFLINE, "--json", "bulk_images/0.png")
    assert len(json.loads(zygote(*ask).stdout)["matches"]) == 3
    with closing(sqlite3.connect(cache_folder() / "index.sqlite")) as db:
        schema = db.execute(query).fetchall()
        db.execute("CREATE TRIGGER evil AFTER INSERT ON files BEGIN DELETE FROM features; END")
        db.execute("CREATE VIEW evil_too AS SELECT 1")
    draw(10).save(images / "10.png")
    ended = zygote(*ask)
    assert ended.status == 0 and len(json.loads(ended.stdout)["matches"]) == 4, ended
    with closing(sqlite3.connect(cache_folder() / "index.sqlite")) as db:
        assert db.execute(query).fetchall() == schema


@pytest.mark.parametrize("megabytes", seldom(map(str, (0, 2, 5, 10, 20, 30, 50, 80, 150)), "2", "20", "80"))
def test_little_memory_is_one_line(megabytes, zygote, collection):
    """Of error, that is: the summary may have come before."""
    collection(10)
    ask = (*OFFLINE, "--json", "bulk_images/0.png")
    for workers in (1, 4):
        ended = zygote(*ask, "--workers", workers, room=int(megabytes) << 20)
        *said, last = ended.stderr.splitlines()
        assert all(" found, " in line for line in said) and len(said) <= 1, ended
        failed = last.startswith(("error: ", "bulk_images/0.png: too little memory"))
        assert ended.status == failed and (failed or " found, " in last), ended
    assert zygote(*ask).status == 0


@pytest.mark.parametrize("kilobytes", [400_000, 1_500_000])
def test_too_little_memory_to_start_is_one_line(kilobytes, program, collection):
    collection(3)
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (kilobytes << 10,) * 2)  # noqa: E731
    stdout, stderr = (process := program(*OFFLINE, preexec_fn=limit)).communicate(timeout=60)
    one_line(Outcome(process.returncode, stdout, stderr))


def test_few_open_files_suffice(zygote, collection):
    images = collection(10)
    for seed in range(35):
        (folder := images / "deep" / "/".join("abcdefgh"[: seed % 8]) / str(seed)).mkdir(parents=True)
        draw(seed).save(folder / "x.png")
    queries = [f"bulk_images/{number}.png" for number in range(4)]
    ended = zygote(*OFFLINE, "--json", *queries, "-k", 3, "--workers", 8, limits={"RLIMIT_NOFILE": 40})
    assert ended.status == 0 and "45 new" in ended.stderr and ended.stdout.count("\n") == 4, ended
