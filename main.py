# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.7",
#   "torchvision>=0.22",
#   "faiss-gpu>=1.14.3; sys_platform == 'linux' and platform_machine == 'x86_64'",
#   "faiss-cpu>=1.14.3; sys_platform != 'linux' or platform_machine != 'x86_64'",
#   "pillow>=11.3",
#   "numpy>=1.26",
#   "tqdm>=4.66",
# ]
# ///
"""DeepVision: which of my images look like this one?

    python main.py                                    index bulk_images/, search with each image in that_one_image/
    python main.py photo.jpg -k 20                    search with photo.jpg instead
    python main.py --images ~/Pictures --index-dir ~/pictures.index --index-only   an index for another folder

images on disk → pixels → features → index → matches → terminal, JSON, page

Written: results.html, the page to look at, and in image_index/<model>/
    features.bin       what the model made of each image; appended as the work goes on
    catalogue.sqlite   the files, and which features are theirs
    index.faiss        the FAISS index; made from the features whenever they have changed
"""

from __future__ import annotations

import argparse
import base64
import difflib
import errno
import faulthandler
import hashlib
import html
import http.client
import importlib
import io
import itertools
import json
import logging
import math
import operator
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    import faiss
    import filelock
    import numpy as np
    import torch
    import torchvision
    import tqdm
    from PIL import Image, ImageCms, ImageOps

    fastapi: Any
    gradio: Any
    uvicorn: Any
else:

    class Lazy:
        """A module imported when it is first used: torch takes seconds, `--help` and a usage error must not."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            try:
                return getattr(importlib.import_module(self._name), attribute)
            except ModuleNotFoundError as error:
                raise DeepVisionError(f"{error}: run `pip install -r requirements.txt`") from error

    faiss, np, torch, torchvision, tqdm = map(Lazy, ("faiss", "numpy", "torch", "torchvision", "tqdm"))
    Image, ImageCms, ImageOps = map(Lazy, ("PIL.Image", "PIL.ImageCms", "PIL.ImageOps"))
    filelock = Lazy("filelock")  # torch requires it, so it is there
    gradio, fastapi, uvicorn = map(
        Lazy, ("gradio", "fastapi", "uvicorn")
    )  # after `find_gradio`; it requires the others

IMAGES = "bulk_images"
QUERIES = "that_one_image"
INDEX_DIR = "image_index"
REPORT = "results.html"
PORT = 7860  # of --ui
UPLOAD_BYTES = 300_000_000  # of one file given to --ui: a photograph of 100 million pixels, uncompressed
TOP = 10  # matches per query
MODEL = "resnet50"
WEIGHTS = "IMAGENET1K_V1"  # V2 is worse for retrieval: https://github.com/pytorch/vision/issues/8382
SIDE = 224  # pixels, of the square that ResNet50 sees
OFFLINE = "offline"  # the descriptor that needs no weights; its constants were chosen on drawn pictures
OFFLINE_SIDE = 96  # pixels; 128 gains nothing, 64 costs 1 point of recall
EDGE_CELLS, COLOUR_CELLS = 8, 4  # a side; fewer for the edges lose small crops, more lose a turn by 10 degrees
DIRECTIONS = 16  # of an edge, dark-to-light told from light-to-dark
SHARPNESS = 5  # times that the cosine with which a direction answers is squared: as wide as the distance to the next
EDGE_POWER = 0.3  # of the counts: a strong edge says little more than a weak one
ORDERS = (0.5, 1.0, 1.0, 1.3, 1.3, 1.7, 1.7)  # weight of each Fourier order over the directions
BRIGHTNESS_WEIGHT, HUE_WEIGHT, MEAN_WEIGHT = 0.2, 0.3, 0.02  # of the colours, where the edges have 1
FAINT = 100.0  # a part of a lesser norm is noise (a photograph's is 200 and more) and stays small
PARTS = ((0.80, 1), (0.67, 2), (0.52, 3))  # side of a query in the whole it may be a part of, places along each axis
OPPONENT = ((0.299, 0.587, 0.114), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0))  # brightness, red-green, yellow-blue
BATCH_SIZE = {"cuda": 256, "mps": 64}  # images
CPU_BATCH = 4, 32  # images a core, and at most: so few that what a layer makes of them stays in the cache
FAITHFUL = 0.999  # cosine between features of the fast network and of the plain one in fp32, or it stays plain
IN_FLIGHT, PATH_BYTES = 1024, 4096  # files read ahead at most, which are noted meanwhile; of a path
AHEAD_BATCHES = 4  # decoded and waiting for the model: enough to overlap, bounded in memory
SAVE_SECONDS = 10  # work at risk when the process is killed; 30 are promised
CONNECT_SECONDS = 10  # torch.hub sets no timeout of its own and would hang for minutes
RANKS_WAIT = 30  # days that a rank waits for the slowest: the share of one may take long
GAP = 32  # from twice as many pixels for one, squares of them are averaged first: a row of 10^8 would take gigabytes
DRAFT = 3  # a JPEG is decoded at the smallest scale that leaves this many times the model's side; with 2, thin stripes
# come out up to 11 of 255 levels off in the mean, with 3 up to 1.4, and photographs a third as far off
MAX_PIXELS = 100_000_000  # to decode, after JPEG scaling: 0.4 GB as Pillow holds them; phones reach 200 million in JPEG
HEADER_READS = 1_000_000  # of a few bytes each, half a second
LARGE_PIXELS = 24_000_000  # images above it are decoded one at a time, so that memory stays bounded
BAND_PIXELS = 4_000_000  # converted at once, so that a large image is held twice at most
BLOCK = 4096  # records handled at once: 16 MB at 2048 dimensions
DIGEST_BYTES = 16  # of SHA-256
FORMAT = 2  # of the cache; raise it when a reader of the old one would go wrong
PREPROCESSING = 2  # part of the model's identity; raise it when the same file would get other pixels
PLAIN, WRITTEN = 0.97, 0.5  # share of a line that has a bar's colour, plain or under text; with less it is the picture
BAR_TOLERANCE = 20  # of 255, from the bar's colour
BAR_END = 4  # lines within which a bar gives way to the picture; a page's margin or a backdrop fades out
BAR_DEEPEST = 0.3  # share of a side
CHANCE = {"copy": 0.01, "similar": 1.0}  # so many chance matches a search at or above the scores that get this label
VIEWS = ("none", "auto", "all")
LABELS = ("weak", "similar", "copy", "identical")
SAMPLE = 1000  # images that scores are compared with; twice as many take four times as long and say little more
FEWEST = 50  # images; of a smaller collection nothing is said
OWN = 0.1  # share of the sample that is nearer to an image than its own distance: far more than any burst
ROUNDS = 10  # of leaving out related pairs; it settles after three or four
EXACT_BYTES = 1 << 28  # of vectors: beyond, the first answer of a run would take more than half a second
CHECKED_BYTES = 1 << 28  # of features.bin are checked on opening; of a larger one each record when it is used
FEWEST_CODED = 64  # vectors; of fewer the codes cannot be trained
CODED_DIM = 256  # principal components in the codes, 2 bits each
TRAINED_ON, HELD_OUT = 30_000, 500  # vectors; more gain nothing, fewer measure recall to less than 0.001
OUTGROWN = 2  # times the collection that the codes were trained on, they are trained again
SHORTLIST, LONGEST = 384, 32_768  # codes whose exact scores are computed: the fewest, the most
CLOSELY = 20  # times as many codes as matches, at least: the last match is to be found as surely as the first
RECALL = 0.998  # of the true ten that the codes must find; 0.995 is promised
ROUNDING = 1e-5  # by how much two ways to compute the same score may differ
TOGETHER = 16  # queries that are searched with at once
GPU_QUERIES, GPU_MOST = 32, 2048  # views at once that are worth the loading; results at most that FAISS gives there
GPU_RESERVE = 3 << 30  # bytes left to the model and to FAISS's own work
DUPLICATE = 0.95  # cosine; where no `copy` can be told, it is one: pictures saved again score more, look-alikes less
THUMBNAIL, THUMBNAIL_BYTES = 256, 6200  # pixels of the longer side; at most, so that 100 queries × 10 make 10 MB
QUALITIES = (70, 40, 15, 0)  # of WebP: a photograph takes 5 KB with the first, nearly always
PAGE_PICTURES = 5000  # on a page, 40 MB; the rest is left to the other outputs
PAGE_SKIPPED = 100  # reasons listed on a page
COLOURS = {"identical": "32", "copy": "32", "similar": "33", "weak": "2"}  # green, yellow, faint: ANSI, of the labels
NOT_AN_IMAGE = "not an image"
NO_MEMORY = re.compile("alloc|memory|start new thread|map segment")  # in the words of torch, FAISS, Python and ld.so
PASSED_OVER = {b"@eadir", b"thumbs.db", b"desktop.ini", b"$recycle.bin", b"system volume information", b"__macosx"}
NOT_DECODED = {"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "FTEX"}  # EPS starts Ghostscript, the others cannot be read so
COSTLY = {"WEBP", "JPEG2000"}  # hold an image four times over while they decode it

log = logging.getLogger("deepvision")
one_large_image = threading.Lock()

# ---- Types and errors ------------------------------------------------------------------------------------------------


class DeepVisionError(Exception):
    """What went wrong, where, and what to do about it, in one line."""


def counted(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def shown(text: str) -> str:
    """A name that cannot steer the terminal: control and direction characters are written as escapes."""
    steering = ("Cc", "Cf", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in steering else c for c in text)


class File(NamedTuple):
    path: bytes  # relative to the collection
    size: int  # bytes
    mtime: int  # nanoseconds; -1: read it again next time


def as_found(path: bytes, info: os.stat_result) -> File:
    """A time that 64 bits of SQLite cannot hold (the year 2400) is wrapped around: it only has to differ."""
    return File(path, info.st_size, info.st_mtime_ns % 2**63)


class Picture(NamedTuple):
    """A file that was read, for better or worse. It travels whole, so that rows and paths never part."""

    file: File
    digest: bytes | None = None  # of its content; None if it is not a usable image
    pixels: Any = None  # uint8 (3, side, side), until it has features; none if those are known. Of a query: its views
    vector: np.ndarray | None = None  # its features, fp16 (dim,)
    reason: str | None = None  # why it is not usable; None also for what was never meant to be an image
    vanished: bool = False  # or changed while it was read


class View(NamedTuple):
    """A query as it may have been before an edit."""

    name: str  # the edit
    pixels: torch.Tensor  # uint8 (3, side, side); smaller for a part
    top: int = 0  # where the part lies in the whole
    left: int = 0


class Match(NamedTuple):
    rank: int  # from 1
    path: str
    score: float  # cosine similarity, -1 to 1, of the best view of the query
    identical: bool  # the same bytes as the query
    label: str = ""  # identical, copy, similar or weak; empty in a collection too small to tell
    view: str = ""  # how the query was looked at: mirrored, turned 90°, trimmed, part; empty: as it is


class Answer(NamedTuple):
    query: str
    matches: list[Match]
    error: str | None = None


class Group(NamedTuple):
    """The same picture, there more than once."""

    keep: str  # the largest file; of equal ones the first by path
    matches: list[Match]  # the other files, compared with it
    error: None = None  # as of an Answer


@dataclass(frozen=True)
class Model:
    """From pixels, uint8 (B, 3, side, side), to features, float32 (B, dim)."""

    name: str
    identity: str  # name, hash of the weights, preprocessing, dimension: the name of its folder in the cache
    side: int
    dim: int
    device: str
    network: Callable[..., torch.Tensor]
    batch: int = CPU_BATCH[1]  # images at once
    resample: str = "bilinear"
    precision: str = "fp32"


@dataclass(frozen=True)
class Work:
    """How to go about an update."""

    batch_size: int | None = None  # images; None: by model and device
    workers: int | None = None  # threads that read and decode; None: one a core
    rebuild: bool = False  # extract the features of all images again
    prune: bool = False  # forget the files that are gone
    update: bool = True  # look for what is new, changed or gone in the collection
    exact: bool = False  # compare with every vector, however many
    exact_bytes: int = EXACT_BYTES  # of vectors, beyond which compact codes choose what to compare with
    rank: int = 0  # of `ranks` processes that share the work, see torchrun; 0 commits
    ranks: int = 1

    def mine(self, file: File) -> bool:
        return zlib.crc32(file.path) % self.ranks == self.rank  # whatever list each of them made


@dataclass
class Summary:
    """What an update found and did."""

    images: int = 0  # usable ones in the collection
    skipped: int = 0
    gone: int = 0
    forgotten: int = 0  # by --prune
    opened: int = 0  # files, in this run
    new: int = 0  # usable ones among them, new or changed
    recognised: int = 0  # of those, by content: moved, copied, or back again
    reading: float = 0.0  # seconds that the model waited for pixels
    computing: float = 0.0  # seconds in the model
    recall: float | None = None  # of the search by codes; None: it is exact

    def add(self, pictures: Sequence[Picture]) -> None:
        usable = [picture for picture in pictures if picture.digest and not picture.vanished]
        self.opened += len(pictures)
        self.new += len(usable)
        self.recognised += sum(picture.vector is None for picture in usable)

    @property
    def rate(self) -> float:
        return self.opened / (self.reading + self.computing or 1.0)

    @property
    def balance(self) -> str:
        """What the time goes to, and so what to buy or to change."""
        share = self.reading / (self.reading + self.computing or 1.0)
        return f"{share:.0%} waiting for decoding, {1 - share:.0%} for the network"

    def __str__(self) -> str:
        known = f" ({self.recognised:,} recognised by content)" if self.recognised else ""
        pruned = f", {self.forgotten:,} forgotten" if self.forgotten else ""
        spent = f"{self.rate:,.1f} images/s, {self.balance}"
        return (
            f"{self.images + self.skipped:,} found, {self.new:,} new{known}, {self.images - self.new:,} unchanged, "
            f"{self.skipped:,} skipped, {self.gone:,} gone{pruned}; {spent if self.opened else 'no image was opened'}"
        )


# ---- Images ----------------------------------------------------------------------------------------------------------


def list_folder(folder: bytes, relative: bytes, onerror: Callable[[OSError], None]) -> Iterator[File]:
    """What a folder holds; of a sub-folder the path ends with a separator."""
    with os.scandir(folder) as listing:
        for entry in listing:
            name = entry.name
            if name.startswith(b".") or name.lower() in PASSED_OVER:
                continue
            try:
                info = entry.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):  # a link to nowhere, or gone since it was listed
                    onerror(error)
                continue
            if stat.S_ISDIR(info.st_mode):
                name += os.fsencode(os.sep)
            yield as_found(relative + name, info)


def find_images(
    folder: str | Path, onerror: Callable[[OSError], None], without: Sequence[str | Path] = ()
) -> Iterator[File]:
    """Every file below `folder` that may be an image, in the order of their paths, but for the folders `without`.

    Links are followed, each folder once. `onerror` is told of a folder that cannot be listed.
    """
    root, separator = os.fsencode(folder), os.fsencode(os.sep)
    visited = {(info.st_dev, info.st_ino) for info in map(os.stat, without)}
    waiting = [File(b"", 0, 0)]
    while waiting:
        file = waiting.pop()
        if file.path and not file.path.endswith(separator):
            yield file
            continue
        found: list[File] = []
        try:
            here = os.path.join(root, file.path.removesuffix(separator))
            info = os.stat(here)
            if (info.st_dev, info.st_ino) not in visited:
                visited.add((info.st_dev, info.st_ino))
                found += list_folder(here, file.path, onerror)
        except OSError as error:
            onerror(error)
        waiting += sorted(found, reverse=True)


@cache
def image_formats() -> tuple[list[str], set[str], str]:
    """The formats that can be decoded here, the suffixes of their names, and the version of the decoders."""
    Image.init()
    # Pillow refuses a header of more than twice as many; `Image` itself is Lazy and would keep it to itself.
    vars(sys.modules["PIL.Image"])["MAX_IMAGE_PIXELS"] = MAX_PIXELS
    version = Image.__version__
    with suppress(ImportError):
        heif = importlib.import_module("pillow_heif")
        heif.register_heif_opener()
        version += f", pillow_heif {heif.__version__}"
    formats = [name for name in Image.ID if name not in NOT_DECODED]
    return formats, {suffix for suffix, name in Image.registered_extensions().items() if name in formats}, version


class HeaderReader(io.BufferedReader):
    """A file whose header must end: Pillow looks for the next marker of a JPEG byte by byte, for hours if it has to."""

    reads_left: float = HEADER_READS

    def read(self, size: int | None = -1) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ValueError("its header does not end")
        return super().read(size)


def open_image(stream: BinaryIO, path: str) -> Image.Image | None:
    """The image in `stream`, of which only the header is read yet; None for what was never meant to be an image."""
    formats, suffixes, _ = image_formats()
    suffix = os.path.splitext(path)[1].lower()
    try:
        return Image.open(stream, formats=formats)
    except Image.DecompressionBombError:
        raise ValueError(f"too large: over {2 * MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        if suffix in {".heic", ".heif", ".hif"} - suffixes:
            raise ValueError("a HEIF image: run `pip install pillow-heif`") from None
        if suffix in suffixes:
            raise ValueError("not an image, whatever its name" if stream.seek(0, 2) else "an empty file") from None
        return None


def content_hash(stream: BinaryIO) -> bytes:
    """SHA-256 of the whole file, shortened. The position is put back, since Pillow has yet to read on from there."""
    position, sha = stream.tell(), hashlib.sha256()
    stream.seek(0)
    while chunk := stream.read(1 << 20):
        sha.update(chunk)
    stream.seek(position)
    return sha.digest()[:DIGEST_BYTES]


def read_picture(
    file: File, root: bytes, transform: Callable[[Image.Image], Any], known: Callable[[bytes], bool]
) -> Picture:
    """Read, hash and decode one file. Whatever is wrong with it becomes a reason and costs no other file.

    Of a content whose hash is `known` nothing is decoded.
    """
    try:
        # Without O_NONBLOCK, a FIFO in an image's place would hang the run.
        path = os.path.join(root, file.path)
        file_io = io.FileIO(path, opener=lambda p, flags: os.open(p, flags | getattr(os, "O_NONBLOCK", 0)))
        with HeaderReader(file_io) as stream:
            info = os.fstat(stream.fileno())
            file = as_found(file.path, info)
            if not stat.S_ISREG(info.st_mode):
                return Picture(file, reason="not a regular file")
            if (image := open_image(stream, os.fsdecode(path))) is None:
                return Picture(file)
            stream.reads_left = math.inf
            digest = content_hash(stream)
            pixels = None if known(digest) else transform(image)
            return Picture(file, digest, pixels, vanished=file != as_found(file.path, os.fstat(stream.fileno())))
    except sqlite3.Error:
        raise  # of `known`: it says nothing of the file
    except Exception as error:  # decoders raise anything at all on a malformed file
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            file = file._replace(mtime=-1)  # the machine's trouble, perhaps not the file's
        reason = getattr(error, "strerror", None) or first_line(error)
        return Picture(file, reason=reason, vanished=isinstance(error, FileNotFoundError))


def crashing(paths: Sequence[bytes]) -> set[bytes]:
    """Which of these files make the program that decodes them crash, seen by one that does nothing else."""
    code = """import os, sys, main
for path in sys.stdin.buffer.read().split(b"\\0"):
    os.write(1, b".")
    main.read_picture(main.File(path, 0, 0), b"", lambda image: main.to_rgb(image, main.SIDE), lambda digest: False)"""
    found, rest, here = set[bytes](), list(paths), {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    while rest:
        done = subprocess.run([sys.executable, "-c", code], input=b"\0".join(rest), capture_output=True, env=here)
        if not done.stdout or done.returncode in (0, 1):
            break
        found.add(rest[len(done.stdout) - 1])
        rest = rest[len(done.stdout) :]
    return found


def bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes one below the other, of which no conversion takes much memory."""
    height = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, height):
        yield 0, top, image.width, min(top + height, image.height)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits (I;16, I) or of floating point (F) in 8 bits: Pillow's own conversion would clip it."""

    def numbers(box: tuple[int, int, int, int]) -> np.ndarray:
        values = np.asarray(image.crop(box), np.float32)
        return np.where(np.isfinite(values), values, 0)

    if image.mode in ("I", "I;16"):
        extremes: Any = image.getextrema()
    else:  # of floating point it is not to be trusted, since some are no numbers; of I;16B there is none
        extremes = [float(extreme(numbers(box))) for box in bands(image) for extreme in (np.min, np.max)]
    low, high = min(0.0, *extremes), max(extremes)
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    top = next((scale for scale in scales if high <= scale), high)
    whole = Image.new("L", image.size)
    for box in bands(image):
        values = numbers(box)
        grey = ((values - low) * (255 / (top - low)) + 0.5).astype(np.uint8)
        grey[values == image.info.get("transparency")] = 255
        whole.paste(Image.fromarray(grey), box)
    return whole


def flattened(image: Image.Image) -> Image.Image:
    """8-bit RGB, transparency over white."""
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_rgb(image: Image.Image, side: int) -> Image.Image:
    """The first frame, upright, in 8-bit RGB, transparency over white. Not scaled, but a JPEG towards `side`."""
    image.draft(None, (DRAFT * side, DRAFT * side))
    limit = MAX_PIXELS // 2 if image.format in COSTLY else MAX_PIXELS
    if (count := image.width * image.height) > limit:
        raise ValueError(f"too large: {count:,} pixels, over {limit:,}")
    with one_large_image if count > LARGE_PIXELS else nullcontext():
        image.load()
        with suppress(Exception):  # malformed EXIF raises anything, and says nothing of the orientation
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            image = to_8_bits(image)
        if image.mode == "RGB" and not image.has_transparency_data:
            return image
        whole = Image.new("RGB", image.size)
        for box in bands(image):
            whole.paste(flattened(image.crop(box)), box)
        return whole


def usable_cores() -> int:
    """The cores that this process may use, shared with the other ranks of torchrun on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def read_ahead(read: Callable[[File], Picture], files: Iterable[File], workers: int, ahead: int) -> Iterator[Picture]:
    """`read` of each file, by `workers` threads, in order, with at most `ahead` results waiting."""
    threads, pending = ThreadPoolExecutor(workers), deque[Future[Picture]]()
    try:
        for file in files:
            pending.append(threads.submit(read, file))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


# ---- Features --------------------------------------------------------------------------------------------------------


def windows(cells: int, n: int, start: int) -> torch.Tensor:
    """Gaussian weights, (cells, n), that pixels start to start + n of the side have in each cell; 1 over all pixels."""
    distance = (torch.arange(OFFLINE_SIDE) + 0.5) * cells / OFFLINE_SIDE - (torch.arange(cells)[:, None] + 0.5)
    weights = torch.exp(-2 * distance**2)  # half a cell is sigma
    return (weights / weights.sum(1, keepdim=True))[:, start : start + n]


def pool(planes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(..., n, n) to the mean in each cell, (..., cells, cells), over what is known of it."""
    return rows @ planes @ columns.T / (rows.sum(1)[:, None] * columns.sum(1) + 1e-9)


def rises(light: torch.Tensor) -> Iterator[torch.Tensor]:
    """How steeply, (B, n, n), brightness (B, n, n) rises at each pixel in each of the directions."""
    framed = torch.nn.functional.pad(light[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    dx, dy = framed[:, 1:-1, 2:] - framed[:, 1:-1, :-2], framed[:, 2:, 1:-1] - framed[:, :-2, 1:-1]
    slope = torch.hypot(dx, dy) + 1e-3  # of 255: no division by 0 where it is flat
    for k in range(DIRECTIONS):
        angle = 2 * math.pi * k / DIRECTIONS
        share = ((dx * math.cos(angle) + dy * math.sin(angle)) / slope).clamp_(min=0)
        for _ in range(SHARPNESS):
            share.square_()  # twice as fast as a power
        yield share.mul_(slope)


def whiten(maps: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Maps (B, c, cells, cells) to (B, c, cells² - 1): without their mean, cosine transform, weight 1 + frequency."""
    known = rows.sum(1)[:, None] * columns.sum(1)
    maps = (maps - (maps * known).sum((2, 3), keepdim=True) / known.sum()) * known
    k = torch.arange(len(known), dtype=torch.float32)
    cosines = torch.cos(math.pi / len(k) * k[:, None] * (k + 0.5))
    cosines[0] /= math.sqrt(2)
    return (cosines @ maps @ cosines.T * (1 + torch.hypot(k[:, None], k))).flatten(2)[:, :, 1:]


def fourier() -> torch.Tensor:
    """Real Fourier transform over the directions, (DIRECTIONS, 2 * len(ORDERS) - 1), each order weighted."""
    phase = 2 * math.pi / DIRECTIONS * torch.arange(DIRECTIONS)[:, None] * torch.arange(len(ORDERS))
    even, odd = torch.tensor(ORDERS) * torch.stack([phase.cos(), phase.sin()])
    return torch.cat([even[:, :1] / math.sqrt(2), even[:, 1:], odd[:, 1:]], 1)


def describe(pixels: torch.Tensor, top: int = 0, left: int = 0) -> torch.Tensor:
    """A vector that needs no weights and no training, from uint8 (B, 3, side, side) to float32 (B, dim).

    Directions of brightness edges, counted in soft cells as in HOG (Dalal & Triggs, CVPR 2005) and compressed by a
    power, and a layout of the colours. Whitened by a fixed rule: cosine transform over the cells, Fourier transform
    over the directions, what is strong in any picture weighted down, means removed: unrelated pictures score near 0.

    A smaller rectangle stands for the part at (top, left) of a picture whose rest is unknown.
    """
    normalize, (height, width) = torch.nn.functional.normalize, pixels.shape[-2:]
    with pixels.device:
        planes = torch.einsum("oc,bcyx->boyx", torch.tensor(OPPONENT), pixels.float())
        cells = EDGE_CELLS, COLOUR_CELLS
        edge_grid, colour_grid = ((windows(c, height, top), windows(c, width, left)) for c in cells)
        counts = torch.stack([pool(rise, *edge_grid) for rise in rises(planes[:, 0])], 1)
        edges = whiten(torch.einsum("bdyx,do->boyx", counts**EDGE_POWER, fourier()), *edge_grid)
        colours = whiten(pool(planes, *colour_grid), *colour_grid)
        mean = planes.mean((2, 3)) / 255  # nearly nothing, but all that a blank picture has
        weighted = (1.0, edges), (BRIGHTNESS_WEIGHT, colours[:, :1]), (HUE_WEIGHT, colours[:, 1:])
        parts = [weight * normalize(part.flatten(1), eps=FAINT) for weight, part in weighted]
        return torch.cat([*parts, MEAN_WEIGHT * mean, torch.full_like(mean[:, :1], MEAN_WEIGHT)], 1)


def offline_model(device: str) -> Model:
    """The built-in descriptor, a model like any other."""
    dim = (2 * len(ORDERS) - 1) * (EDGE_CELLS**2 - 1) + 3 * (COLOUR_CELLS**2 - 1) + 4
    return Model(OFFLINE, f"{OFFLINE}-v1-p{PREPROCESSING}-{dim}", OFFLINE_SIDE, dim, device, describe)


def load_weights(network: torch.nn.Module, path: Path, *heads: str) -> None:
    """Weights from a file of tensors: plain, wrapped as `state_dict`, or saved as `module.`, with or without the
    classifier, `heads`. All else must be there, in its shape: no part of a network is ever left untrained."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        for key in list(state):  # in place: its `_metadata` tells old layouts from new ones
            value, name = state.pop(key), key.removeprefix("module.")
            name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name)
            if not name.startswith((*(f"{head}." for head in heads), "aux1.", "aux2.", "AuxLogits.")):
                state[name] = value
    except Exception as error:  # a corrupt file raises anything
        advice = "expected are tensors as torch.save writes them; if it was downloaded, delete it and try again"
        reason = first_line(error).partition(". ")[0]  # what follows is advice to load it unsafely
        raise DeepVisionError(f"{path} cannot be read as weights: {advice} ({reason})") from error
    try:
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        want, have = (
            {key: tuple(getattr(value, "shape", ())) for key, value in d.items()} for d in (network.state_dict(), state)
        )
        wrong = [key for key in {**want, **have} if want.get(key) != have.get(key)] or ["?"]
        first = f"{wrong[0]} should be {want.get(wrong[0], 'absent')} and is {have.get(wrong[0], 'missing')}"
        raise DeepVisionError(f"{path} does not fit the model: {len(wrong)} tensors differ; {first}") from error


def native_bf16() -> bool:
    """Whether this processor multiplies bf16 itself: emulated, it takes four times as long as fp32."""
    return torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fuse(network: torch.nn.Module, dtype: torch.dtype, sample: torch.Tensor) -> torch.nn.Module:
    """Batch norms folded into their convolutions; on a CPU, sums and ReLUs done by the same kernels, with weights in
    the order in which these read them. It is what a compiler does, but at once, and for any number of images bit by
    bit alike: `torch.compile` takes 17 s, gains another 5 %, and rounds in another way. Raises if it cannot."""
    fused = importlib.import_module("torch.fx.experimental.optimization").fuse(network)
    fused, nn = fused.to(dtype).to(memory_format=torch.channels_last), torch.nn
    if sample.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return fused
    importlib.import_module("torch.fx.passes.shape_prop").ShapeProp(fused).propagate(sample.to(dtype))
    layers, graph = dict(fused.named_modules()), fused.graph

    def is_a(kind: type, node: Any, *functions: Any) -> bool:
        if not isinstance(node, torch.fx.Node) or node.op != "call_module":
            return getattr(node, "target", None) in functions
        return type(layers[node.target]) is kind

    def by_one_kernel(node: Any, convolution: Any, *after: Any, other: Sequence[Any] = ()) -> None:
        layer, (before,) = layers[convolution.target], convolution.args
        how = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups
        shape, name = list(before.meta["tensor_meta"].shape), f"weight_of_{convolution.name}"
        fused.register_buffer(name, torch.ops.mkldnn._reorder_convolution_weight(layer.weight.data, *how, shape))
        kernels = torch.ops.mkldnn._convolution_pointwise
        kernel = kernels.binary if other else kernels.default
        with graph.inserting_before(node):
            bias = None if layer.bias is None else graph.get_attr(f"{convolution.target}.bias")
            swift = graph.call_function(kernel, (before, *other, graph.get_attr(name), bias, *how, *after))
        swift.meta = node.meta
        node.replace_all_uses_with(swift)
        graph.erase_node(node)

    for relu in [node for node in graph.nodes if is_a(nn.ReLU, node, nn.functional.relu, torch.relu)]:
        last, other, after = relu.args[0], [], tuple[Any, ...](("relu", [], ""))
        if is_a(type(None), last, operator.add, operator.iadd, torch.add) and len(last.users) == 1:
            *other, last = sorted(last.args, key=partial(is_a, nn.Conv2d))
            after = "add", 1.0, "relu", [], None
        if is_a(nn.Conv2d, last) and len(last.users) == 1:
            by_one_kernel(relu, last, *after, other=other)
    graph.eliminate_dead_code()
    for convolution in [node for node in graph.nodes if is_a(nn.Conv2d, node)]:
        by_one_kernel(convolution, convolution, "none", [], "")
    fused.recompile()
    return fused


def assemble_model(
    name: str, network: torch.nn.Module, device: str, side: int, mean: Sequence[float], std: Sequence[float],
    resample: str,
) -> Model:  # fmt: skip
    """The network in the fastest form, fused and in low precision, that gives the features of the plain one."""
    sha = hashlib.sha256(repr((side, *mean, *std, resample)).encode())
    for key, value in sorted(network.state_dict().items()):
        sha.update(key.encode() + value.numpy().tobytes())
    network = network.eval().to(device).to(memory_format=torch.channels_last)
    centre, spread = (torch.tensor(list(values), device=device).view(3, 1, 1) for values in (mean, std))

    def forward(pixels: torch.Tensor, network: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        scaled = (pixels.contiguous(memory_format=torch.channels_last).float() / 255 - centre) / spread
        return network(scaled.to(dtype)).float().flatten(1)

    half = [torch.bfloat16] if device == "cpu" and native_bf16() else [torch.float16] if device != "cpu" else []
    noise = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    sample = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 255).byte().to(device)
    swift, precision = partial(forward, network=network, dtype=torch.float32), torch.float32
    with torch.inference_mode():
        expected = swift(sample)
        for precision in (*half, torch.float32):
            with suppress(Exception):  # tracing and fusing raise anything at all
                fused = fuse(network, precision, sample)
                trial = partial(forward, network=fused, dtype=precision)
                if torch.cosine_similarity(trial(sample), expected).min() >= FAITHFUL:
                    swift = trial
                    break
    dim, word = expected.shape[1], {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(precision, "fp32")
    identity = re.sub(r"[^\w.-]", "-", f"{name}-{sha.hexdigest()[:8]}-p{PREPROCESSING}-{dim}")
    batch = BATCH_SIZE.get(device) or min(CPU_BATCH[0] * usable_cores(), CPU_BATCH[1])
    return Model(name, identity, side, dim, device, swift, batch, resample, word)


def timm_model(name: str, weights: str | Path | None, device: str) -> Model:
    """A model of the timm library, which keeps its weights in the Hugging Face cache."""
    try:
        timm = importlib.import_module("timm")
        network = timm.create_model(name.removeprefix("timm:"), pretrained=weights is None, num_classes=0)
    except ImportError as error:
        raise DeepVisionError(f"--model {name} needs timm: run `pip install timm`") from error
    except (OSError, RuntimeError, ValueError) as error:  # no such model, or no weights of it
        raise DeepVisionError(f"--model {name}: {first_line(error)}") from error
    if weights is not None:
        heads = network.pretrained_cfg["classifier"]
        load_weights(network, Path(weights), *([heads] if isinstance(heads, str) else heads))
    recipe = timm.data.resolve_model_data_config(network)
    side, resample = recipe["input_size"][1], recipe["interpolation"]
    return assemble_model(name, network, device, side, recipe["mean"], recipe["std"], resample)


def downloaded(url: str, name: str) -> Path:
    """The file of `url` in torch's own cache, downloaded and hash-checked if it is not there yet."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if path.exists():
        return path
    timeout, expected = socket.getdefaulttimeout(), torch.hub.HASH_REGEX.search(path.name)
    try:
        socket.setdefaulttimeout(CONNECT_SECONDS)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), expected and expected[1], log.isEnabledFor(logging.INFO))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ConnectionError(f"the weights of {name} cannot be had from {url} ({first_line(error)})") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def torchvision_model(name: str, weights: str | Path | None, device: str) -> Model:
    models = torchvision.models
    names = models.list_models(module=models)
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, [*names, OFFLINE], n=4, cutoff=0.5))
        raise DeepVisionError(f"--model {name}: no such model{near and f'; did you mean {near}?'}")
    listed = models.get_model_weights(name).__members__
    by_file = {Path(entry.url).name: entry for entry in listed.values()}  # so that a copy gets the same pixels
    entry = {**by_file, **listed}.get(Path(weights or WEIGHTS).name, listed["DEFAULT"])
    if weights is None or str(weights) in listed:
        path = downloaded(entry.url, name)
    elif not (path := Path(weights)).is_file():
        raise DeepVisionError(f"--weights {weights}: no such file, nor weights of {name} ({', '.join(listed)})")
    given: dict[str, Any] = {}  # what torchvision itself gives to models that come with weights
    if name in ("googlenet", "inception_v3"):
        given = {"transform_input": True, "init_weights": False, "aux_logits": False}
    elif name.startswith("vit_"):
        given = {"image_size": entry.meta["min_size"][0]}
    network = models.get_model(name, weights=None, **given)
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    *_, head = (name for name, layer in network.named_modules() if isinstance(layer, layers))  # gives the classes
    network.set_submodule(head, torch.nn.Identity())
    load_weights(network, path, head)
    recipe = entry.transforms()
    side, resample = recipe.crop_size[0], recipe.interpolation.value
    return assemble_model(name, network, device, side, recipe.mean, recipe.std, resample)


def gpu_trouble() -> str:
    """Why CUDA cannot be used; empty if it can. A driver or a GPU that torch is too new or too old for shows in use."""
    try:
        torch.ones(1, device="cuda").sum().item()
        return ""
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        return first_line(error).partition(". ")[0]


def load_model(name: str | None = None, weights: str | Path | None = None, device: str = "auto") -> Model:
    """The network that turns pixels into features, its classifier removed.

    name     resnet50, any classification model of torchvision, timm:NAME, or offline. By default resnet50, and where
             its weights cannot be had, offline, with a warning
    weights  the name of torchvision weights (IMAGENET1K_V1), hash-checked when downloaded, or a local file of tensors
    device   auto, cpu, cuda or mps

    Raises DeepVisionError for an unknown name or device, and for weights that are missing, corrupt or do not fit.
    """
    reason = "" if device in ("cpu", "mps") else gpu_trouble()
    there = {"cuda": not reason, "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(kind for kind in there if there[kind])
        if device == "cpu" and (shutil.which("nvidia-smi") or os.path.exists("/dev/nvidia0")):
            log.warning("there is a GPU, but torch %s cannot use it: %s", torch.__version__, reason)
    elif not there.get(device):
        why = f": {reason}" if device == "cuda" else ""
        raise DeepVisionError(f"--device {device}: torch {torch.__version__} finds none on this machine{why}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.set_float32_matmul_precision("high")  # TF32, for what is not done in fp16
    if name == OFFLINE and weights:
        raise DeepVisionError(f"--weights {weights}: the offline descriptor takes none")
    if name == OFFLINE:
        return offline_model(device)
    try:
        if name and name.startswith("timm:"):
            return timm_model(name, weights, device)
        return torchvision_model(name or MODEL, weights, device)
    except ConnectionError as error:
        if name or weights:
            raise DeepVisionError(f"{error}; connect once, or give --weights FILE") from error
        what = "it finds copies and edits of the same picture and likeness of layout and colour, not subjects"
        ways = f"For {MODEL} connect once or give --weights FILE; with --model offline this warning goes"
        log.warning("%s. The built-in offline descriptor is used instead: %s. %s", error, what, ways)
        return offline_model(device)


def squeeze(image: Image.Image, width: int, height: int, resample: str) -> torch.Tensor:
    """An RGB image as uint8 (3, height, width)."""
    resized = image.resize((width, height), Image.Resampling[resample.upper()], reducing_gap=GAP)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def get_transform(side: int = SIDE, resample: str = "bilinear") -> Callable[[Image.Image], torch.Tensor]:
    """From a Pillow image of any kind to the pixels that a model takes, uint8 (3, side, side).

    side, resample  as the model has them: `get_transform(model.side, model.resample)`; by default those of ResNet50

    The whole picture is squeezed into a square: a crop of its centre would lose what stands at the edges.
    """
    return lambda image: squeeze(to_rgb(image, side), side, side, resample)


def launch(pixels: torch.Tensor, model: Model, size: int, *where: int) -> tuple[torch.Tensor, int]:
    """Features (B, dim), of length 1, still on the device and, on a GPU, still being computed there; `size` images at
    a time, or fewer if its memory is short, and how many that was. Of parts, where they lie: see `describe`."""
    pixels, before = pixels.pin_memory() if model.device == "cuda" else pixels, size
    while True:
        try:
            with torch.inference_mode():
                parts = (part.to(model.device, non_blocking=True) for part in pixels.split(size))
                found = torch.cat([torch.nn.functional.normalize(model.network(part, *where)) for part in parts])
            if size < before:
                log.warning("the memory of the GPU is short: it takes %d images at once from now on", size)
            return found, size
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise DeepVisionError(f"the memory of the GPU is too short for {model.name}: --device cpu") from error
            size = (size + 1) // 2


def extract_features_batch(images: torch.Tensor | Sequence[Any], model: Model | None = None) -> np.ndarray:
    """Features of a batch, float32 (B, dim), each of length 1, so that their inner product is the cosine similarity.

    images  uint8 (B, 3, side, side) as stacked from `get_transform`, or Pillow images, or paths of image files
    model   by default `load_model()`

    Raises OSError for a path that is no image, ValueError for pixels of another side than the model's.
    """
    model = model or load_model()
    if len(images) == 0:
        return np.zeros((0, model.dim), np.float32)
    if not isinstance(images, torch.Tensor):
        image_formats()  # HEIC is among them now
        opened = (image if isinstance(image, Image.Image) else Image.open(image) for image in images)
        images = torch.stack([get_transform(model.side, model.resample)(image) for image in opened])
    if images.shape[1:] != (3, model.side, model.side):
        raise ValueError(f"pixels are {tuple(images.shape[1:])}, {model.name} takes (3, {model.side}, {model.side})")
    return launch(images, model, model.batch)[0].cpu().numpy()


def with_features(
    files: Iterable[File], root: str | Path, model: Model, work: Work, known: Callable[[bytes], bool], summary: Summary
) -> Iterator[list[Picture]]:
    """Read `files` and extract features, a batch at a time and in order. `summary` takes the time.

    A GPU has its next batch before the features of the last one are asked for.
    """
    size, workers = work.batch_size or model.batch, work.workers or usable_cores()
    transform = get_transform(model.side, model.resample)
    read = partial(read_picture, root=os.fsencode(root), transform=transform, known=known)
    pictures = read_ahead(read, files, workers, min(AHEAD_BATCHES * size + workers, IN_FLIGHT))
    under_way: deque[tuple[list[Picture], torch.Tensor]] = deque()
    start = time.perf_counter()
    while (batch := list(itertools.islice(pictures, size))) or under_way:
        summary.reading += (middle := time.perf_counter()) - start
        if batch:
            pixels, features = [picture.pixels for picture in batch if picture.pixels is not None], torch.empty(0)
            if pixels:
                features, fits = launch(torch.stack(pixels), model, size)
                size = min(size, fits)
            under_way.append((batch, features))
        done: list[Picture] = []
        if not batch or len(under_way) > (model.device != "cpu"):
            done, features = under_way.popleft()
            vectors = iter(features.cpu().numpy().astype(np.float16))
            done = [p if p.pixels is None else p._replace(pixels=None, vector=next(vectors)) for p in done]
        summary.computing += (spent := time.perf_counter() - middle)
        size = max(1, size // 2) if spent > SAVE_SECONDS else size  # what is under way is not saved yet
        yield done
        start = time.perf_counter()


def bar_depth(lines: np.ndarray) -> int:
    """How many of the first lines, (n, length, 3), are a bar of one colour, with or without text on it: it begins and
    ends plain, and the picture begins at once behind it."""
    lines = lines[: int(len(lines) * BAR_DEEPEST)]
    if not len(lines):
        return 0
    share = (np.abs(lines - np.median(lines[0], axis=0)) <= BAR_TOLERANCE).all(-1).mean(1)
    end = int((share < WRITTEN).argmax())  # 0: there is no picture behind it
    return end if share[0] >= PLAIN and (share[max(0, end - BAR_END) : end] >= PLAIN).any() else 0


def content_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of the picture within plain borders and caption bars; None if there are none."""
    pixels, whole = np.asarray(image, np.int16), (0, 0, image.width, image.height)
    box = whole
    for _ in range(2):  # a border may lie around a bar
        left, top, right, bottom = box
        rows = pixels[top:bottom, left:right]
        columns = rows.transpose(1, 0, 2)
        right, bottom = right - bar_depth(columns[::-1]), bottom - bar_depth(rows[::-1])
        box = left + bar_depth(columns), top + bar_depth(rows), right, bottom
    return None if box == whole else box


def query_views(image: Image.Image, model: Model, views: str) -> list[View]:
    """A query as it is, and as it would be before an edit: mirrored, turned, without a border or a caption bar, or as
    a part of a larger picture. `views`: none, all, or auto: those that help most for their cost."""
    picture, side, resample = to_rgb(image, model.side), model.side, model.resample
    found = [View("", squeeze(picture, side, side, resample))]
    if views == "none":
        return found
    if box := content_box(picture):
        found.append(View("trimmed", squeeze(picture.crop(box), side, side, resample)))
    found += [View(f"{view.name}, mirrored".lstrip(", "), view.pixels.flip(2)) for view in found]
    if views == "all" or model.name == OFFLINE:
        found += [
            View(f"{view.name}, turned {90 * quarters}°".lstrip(", "), view.pixels.rot90(quarters, (1, 2)))
            for quarters in (1, 2, 3)
            for view in found
        ]
    if model.name == OFFLINE and box:  # a bar may hide a part instead of standing beside the whole
        left, top, right, bottom = (round(x * side / full) for x, full in zip(box, 2 * picture.size))
        found.append(View("trimmed", squeeze(picture.crop(box), right - left, bottom - top, resample), top, left))
    elif model.name == OFFLINE:
        for share, places in PARTS:
            small = round(share * side)
            part = squeeze(picture, small, small, resample)
            starts = [round((2 * i + 1) / (2 * places) * (side - small)) for i in range(places)]
            found += [View("part", part, top, left) for top in starts for left in starts]
    return found


def features_of_views(views: Sequence[View], model: Model) -> np.ndarray:
    """Features of a query in its views, fp16 as in the cache, (views, dim)."""
    whole = [view.pixels for view in views if view.pixels.shape[1:] == (model.side, model.side)]  # the first ones
    features = [launch(torch.stack(whole), model, len(whole))[0]]
    features += [launch(view.pixels[None], model, 1, view.top, view.left)[0] for view in views[len(whole) :]]
    return torch.cat(features).cpu().numpy().astype(np.float16)


# ---- Catalogue -------------------------------------------------------------------------------------------------------


SCHEMA = [
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    # Every file that was ever read; without digest and reason: not an image. Whether it is there: since the last scan.
    "CREATE TABLE files (path BLOB PRIMARY KEY CHECK (typeof(path) = 'blob'), size INTEGER, mtime INTEGER, digest BLOB,"
    " reason TEXT, decoders TEXT, there INTEGER CHECK (there IN (0, 1))) WITHOUT ROWID",
    "CREATE INDEX files_by_digest ON files (digest)",
    "CREATE INDEX files_gone ON files (digest) WHERE NOT there",
    # Every record of features.bin; without digest: superseded. `files` counts those that are there with this content.
    "CREATE TABLE features (row INTEGER PRIMARY KEY, digest BLOB UNIQUE, files INTEGER NOT NULL)",
    "CREATE INDEX features_of_no_file ON features (row) WHERE files = 0",
    "CREATE TRIGGER file_added AFTER INSERT ON files WHEN new.there BEGIN"
    " UPDATE features SET files = files + 1 WHERE digest = new.digest; END",
    "CREATE TRIGGER file_removed AFTER DELETE ON files WHEN old.there BEGIN"
    " UPDATE features SET files = files - 1 WHERE digest = old.digest; END",
    "CREATE TRIGGER file_changed AFTER UPDATE OF digest, there ON files BEGIN"
    " UPDATE features SET files = files - old.there WHERE digest = old.digest;"
    " UPDATE features SET files = files + new.there WHERE digest = new.digest; END",
]
# UnicodeDecodeError: of a message that quotes a damaged schema.
DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError, json.JSONDecodeError)
# What a scan found: to be read (there is NULL), gone (0) or back again unchanged (1).
CHANGES = """DROP TABLE IF EXISTS temp.changes;
    CREATE TEMP TABLE changes (path BLOB, size INTEGER, mtime INTEGER, there INTEGER)"""
UNREAD = "changes WHERE there IS NULL"
USABLE = "files WHERE there AND digest IS NOT NULL"  # the usable images of the collection
FEATURED = "features JOIN files USING (digest) WHERE there"  # the same, each with its row
SKIPPED = "files WHERE there AND reason IS NOT NULL"
GONE = """files WHERE NOT there AND digest IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM features WHERE features.digest = files.digest AND features.files > 0)"""  # nor moved


def sync_folder(folder: Path) -> None:
    """A new name, or one less, is durable when its folder is."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, mark: object = "") -> Iterator[BinaryIO]:
    """A file that takes its place only when it is whole and on disk. `mark` tells apart who may write it at once."""
    part = path.with_name(f"{path.name}{mark}.part")
    try:
        part.unlink(missing_ok=True)  # or a link in its place would be written through
        with open(part, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def file_checksum(path: Path, size: float = math.inf) -> int:
    """CRC-32 of the first `size` bytes."""
    checksum = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(int(min(size, 1 << 22))):
            checksum, size = zlib.crc32(chunk, checksum), size - len(chunk)
    return checksum


class Catalogue:
    """The cache of one model: which files there are, and the features of their contents.

    features.bin starts with a random number, its generation; then comes one record a content: its hash, its vector,
    and a checksum of both and of the model's identity. It only grows, or is replaced whole by a new generation, and
    a record is on disk before the catalogue speaks of it. So, whatever was stopped or damaged, it shows whether the
    two still fit each other, and each is mended from what holds of the other. No vector is used before its checksum
    has been seen to hold. The checksum of catalogue.sqlite lies beside it but while a run is writing.
    """

    HEADER = 16  # bytes

    def __init__(self, folder: Path, identity: str, dim: int) -> None:
        self.folder, self.identity, self.dim = folder, identity, dim
        self.path, self.seal = folder / "catalogue.sqlite", folder / "catalogue.crc"
        self.features, self.index = folder / "features.bin", folder / "index.faiss"
        record = [("digest", f"V{DIGEST_BYTES}"), ("vector", "<f2", (dim,)), ("checksum", "<u8")]
        self.record = np.dtype(record, align=True)
        # Odd, so that no flipped bit is lost; of the identity, so that no record holds in another model's cache.
        factors = hashlib.shake_256(identity.encode()).digest(self.record.itemsize)
        self.factors = np.frombuffer(factors, np.uint64) | np.uint64(1)
        self.trusted_from = 0  # features of earlier rows are extracted again: --rebuild
        folder.mkdir(parents=True, exist_ok=True)
        self.lock, self.one_lookup = filelock.FileLock(folder / "lock"), threading.Lock()
        self.connect()

    def connect(self) -> None:
        if not self.path.exists():
            self.path.touch()
        self.inode = self.path.stat().st_ino
        connect = partial(sqlite3.connect, self.path, check_same_thread=False)
        self.db = connect(timeout=60)
        self.db.text_factory = partial(str, encoding="utf-8", errors="replace")
        self.lookup = connect(timeout=20)  # for threads, which a failed commit of this process must not hold up long

    def close(self) -> None:
        self.db.close()
        self.lookup.close()

    def value(self, query: str, *arguments: Any) -> Any:
        """The first value that the query gives, or None."""
        return (self.db.execute(query, arguments).fetchone() or [None])[0]

    def get(self, key: str) -> Any:
        return self.value("SELECT value FROM meta WHERE key = ?", key)

    def put(self, **values: Any) -> None:
        self.db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())

    def any(self, table: str) -> bool:
        return bool(self.value(f"SELECT EXISTS (SELECT 1 FROM {table})"))

    def count(self, table: str) -> int:
        return self.value(f"SELECT count(*) FROM {table}")

    def rows(self, condition: str) -> np.ndarray:
        return np.fromiter((row for (row,) in self.db.execute(f"SELECT row FROM features {condition}")), np.int64)

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """As the only run that may write; True if another one had to be waited for."""
        try:
            held, waited = self.lock.acquire(timeout=0), False
        except filelock.Timeout:
            log.warning("another run is writing %s: waiting for it", self.folder)
            held, waited = self.lock.acquire(), True
        with held:
            yield waited

    @contextmanager
    def unsealed(self) -> Iterator[None]:
        """For a change of the catalogue. Should the run be stopped meanwhile, the next one misses the seal and looks
        closer."""
        self.seal.unlink(missing_ok=True)
        sync_folder(self.folder)
        try:
            yield
        finally:
            with suppress(OSError), whole_file(self.seal) as stream:
                stream.write(b"%08x" % file_checksum(self.path))

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """As `locked`, and sure that no other run has made the catalogue anew since it was opened here."""
        with self.locked() as waited:
            if self.path.stat().st_ino != self.inode:
                raise sqlite3.DatabaseError("another run has made the catalogue anew")
            with self.unsealed():
                yield waited

    def generation(self) -> bytes | None:
        with suppress(OSError), open(self.features, "rb") as stream:
            return stream.read(self.HEADER)
        return None

    def stored(self) -> int:
        """Whole records in features.bin; those after the first `rows` are not the catalogue's, or not yet."""
        size = self.features.stat().st_size if self.features.is_file() else 0
        return max(0, size - self.HEADER) // self.record.itemsize

    def records(self, start: int = 0, end: float = math.inf) -> Iterator[tuple[int, np.ndarray]]:
        """The row of the first, and the records, of each block."""
        end, size = int(min(end, self.stored())), self.record.itemsize
        for row in range(start, end, BLOCK):
            count, offset = min(BLOCK, end - row), self.HEADER + row * size
            yield row, np.fromfile(self.features, self.record, count, offset=offset)

    def checksums(self, records: np.ndarray) -> np.ndarray:
        """Of identity, hash and vector in one: no vector holds beside another's hash, or in another model's cache."""
        words = np.ascontiguousarray(records).view(np.uint64).reshape(-1, len(self.factors))[:, :-1]
        return np.einsum("nw,w->n", words, self.factors[:-1]) + self.factors[-1]  # 5 GB/s; a matrix product half of it

    def holding(self, records: np.ndarray) -> np.ndarray:
        """Which of the records match their checksum."""
        return self.checksums(records) == records["checksum"]

    def prove(self, rows: np.ndarray, records: np.ndarray, superseded: Any = False, other: Any = False) -> None:
        """Raise DatabaseError if one of the records is broken; the files it belongs to are read again next time."""
        broken = rows[(~self.holding(records) | other) & ~np.asarray(superseded)]
        if len(broken):
            one = [(row,) for row in broken.tolist()]
            with self.writing(), self.db:
                of_row = "(SELECT digest FROM features WHERE row = ?)"
                self.db.executemany(f"UPDATE files SET mtime = -1 WHERE digest = {of_row}", one)
                self.db.executemany("UPDATE features SET digest = NULL, files = 0 WHERE row = ?", one)
            log.warning("%s: %d features are damaged, and are extracted again", self.features, len(broken))
            raise sqlite3.DatabaseError(f"{len(broken)} features do not match their checksum or the catalogue")

    def vectors(self, start: int = 0, end: float = math.inf) -> Iterator[np.ndarray]:
        """All features from row `start` on, in blocks, fp16 (n, dim); superseded ones are 0.

        Raises DatabaseError if one is not what was written.
        """
        generation = self.get("generation")
        for row, records in self.records(start, min(end, self.get("rows"))):
            query = "SELECT digest FROM features WHERE row BETWEEN ? AND ? ORDER BY row"
            digests = [digest for (digest,) in self.db.execute(query, (row, row + len(records) - 1))]
            if self.generation() != generation:
                raise sqlite3.DatabaseError("another run has changed the features")
            other = np.array([d is not None and d != r.tobytes() for d, r in zip(digests, records["digest"])])
            superseded = np.array([digest is None for digest in digests])
            self.prove(np.arange(row, row + len(records)), records, superseded, other)
            records["vector"][superseded] = 0
            yield records["vector"]

    def records_of(self, rows: np.ndarray) -> np.ndarray:
        """Some records. Raises DatabaseError if one is not what was written."""
        records, size, waiting = np.empty(len(rows), self.record), self.record.itemsize, []
        buffer, at_once = records.view(np.uint8).data, getattr(os, "RWF_NOWAIT", None)
        with open(self.features, "rb", buffering=0) as stream:
            # No map: the faults of its pages take twice as long.
            for i, place in enumerate((self.HEADER + rows * size).tolist()):
                part = buffer[i * size : (i + 1) * size]
                try:
                    if at_once and os.preadv(stream.fileno(), [part], place, at_once) == size:
                        continue
                except OSError:  # it is not in memory, or the file system cannot tell
                    pass
                waiting.append((place, part))
            for place, _ in waiting if hasattr(os, "posix_fadvise") else ():
                # All at once: one after the other, a thousand reads of an SSD take 0.1 s.
                os.posix_fadvise(stream.fileno(), place, size, os.POSIX_FADV_WILLNEED)
            for place, part in waiting:
                stream.seek(place)
                if stream.readinto(part) != size:
                    raise sqlite3.DatabaseError(f"{self.features} has ended before its time")
        self.prove(rows, records)
        return records

    def sealed(self) -> bool:
        """Whether the catalogue matches its checksum; False also if another run is writing or was stopped."""
        with suppress(FileNotFoundError):
            seal = self.seal.read_bytes()
            if seal == b"%08x" % file_checksum(self.path):
                return True
            if seal == self.seal.read_bytes():
                raise sqlite3.DatabaseError("the catalogue does not match its checksum")
        return False

    def check(self, thorough: bool = True) -> None:
        """Raise DatabaseError if this is not whole; which of the features are broken is for `compact` to find.

        Not `thorough`: by nothing that takes longer the larger the collection is.
        """
        version = self.value("PRAGMA user_version")
        if version > FORMAT:
            raise DeepVisionError(
                f"{self.folder} was written by a newer DeepVision (format {version}, this one knows {FORMAT}): update "
                "DeepVision, or choose another --index-dir"
            )
        schema = self.db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid").fetchall()
        if version < FORMAT or schema != [(sql,) for sql in SCHEMA]:
            raise sqlite3.DatabaseError("there is no catalogue of this format")
        if thorough and not self.sealed() and (verdict := self.value("PRAGMA integrity_check(1)")) != "ok":
            raise sqlite3.DatabaseError(f"the catalogue is corrupt: {verdict.splitlines()[0]}")
        with self.db:
            self.db.execute("BEGIN")  # both of one moment, whatever another run adds meanwhile
            meta = dict(self.db.execute("SELECT key, value FROM meta").fetchall())
            end = self.value("SELECT ifnull(max(row) + 1, 0) FROM features")
        if meta.get("identity") != self.identity:
            raise sqlite3.DatabaseError("the catalogue is another model's")
        if meta.get("rows") != end or end > self.stored() or meta.get("generation") != self.generation():
            raise sqlite3.DatabaseError("the features are not those that the catalogue speaks of")
        size = self.HEADER + end * self.record.itemsize
        if thorough and size <= CHECKED_BYTES and meta.get("checksum") != file_checksum(self.features, size):
            raise sqlite3.DatabaseError("the features do not match their checksum")

    def compact(self, chosen: np.ndarray) -> None:
        """Begin a new generation, of the records in these rows as far as they hold."""
        generation, digests = os.urandom(self.HEADER), list[bytes]()
        with whole_file(self.features) as stream:
            stream.write(generation)
            for row, records in self.records():
                first, last = np.searchsorted(chosen, [row, row + len(records)])
                records = records[chosen[first:last] - row]
                records = records[self.holding(records)]
                stream.write(records.tobytes())
                digests += [digest.tobytes() for digest in records["digest"]]
        with self.db:
            self.db.execute("DELETE FROM features")
            self.db.executemany("INSERT INTO features VALUES (?, ?, 0)", enumerate(digests))
            self.db.execute(
                "UPDATE features SET files = (SELECT count(*) FROM files WHERE digest = features.digest AND there)"
            )
            self.db.execute("UPDATE files SET mtime = -1 WHERE digest NOT IN (SELECT digest FROM features)")
            self.put(totals=None, generation=generation, rows=len(digests), checksum=file_checksum(self.features))

    def remake(self) -> None:
        columns, files = "path, size, mtime, digest, reason, decoders, there", []
        with suppress(*DAMAGE):
            if self.get("identity") == self.identity:
                files = self.db.execute(f"SELECT {columns} FROM files").fetchall()
        self.close()
        for name in ("catalogue.sqlite-journal", "catalogue.sqlite"):
            (self.folder / name).unlink(missing_ok=True)
        self.connect()
        self.db.executescript(f"BEGIN; {';'.join(SCHEMA)}; PRAGMA user_version = {FORMAT}; COMMIT")
        with self.db:
            self.put(identity=self.identity)
            self.db.executemany("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", files)
        newest = {}
        for row, records in self.records():
            for i in np.flatnonzero(self.holding(records)).tolist():
                newest[records["digest"][i].tobytes()] = row + i
        self.compact(np.array(sorted(newest.values()), np.int64))

    def mend(self) -> None:
        """Make the catalogue again from every file and feature in it that holds; a new one begins like this, too."""
        with self.locked():
            self.close()
            self.connect()
            try:
                return self.check()  # another run has mended it meanwhile, or was in the midst of a change
            except sqlite3.OperationalError:
                raise
            except DAMAGE as error:
                had, new = self.stored(), not self.features.exists() and not self.path.stat().st_size
                with self.unsealed():
                    self.remake()
                if not new:
                    log.warning("%s: %s. Repaired: %d of %d features hold", self.folder, error, self.get("rows"), had)

    def is_known(self, digest: bytes) -> bool:
        with self.one_lookup:  # asked by the threads that read, who must not share a connection unguarded
            query = "SELECT 1 FROM features WHERE digest = ? AND row >= ?"
            return self.lookup.execute(query, (digest, self.trusted_from)).fetchone() is not None

    def save(self, pictures: Sequence[Picture]) -> None:
        """Make pictures and their features durable: first the features, then, at once, the files they belong to."""
        extracted = {p.digest: p.vector for p in pictures if p.digest and p.vector is not None and not p.vanished}
        fresh = {digest: vector for digest, vector in extracted.items() if not self.is_known(digest)}
        records, rows = np.zeros(len(fresh), self.record), self.get("rows")
        for i, (digest, vector) in enumerate(fresh.items()):
            records["digest"][i], records["vector"][i] = digest, vector
        records["checksum"] = self.checksums(records)
        with open(self.features, "r+b") as stream:
            stream.seek(self.HEADER + rows * self.record.itemsize)
            stream.write(records.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        there = [(*p.file, p.digest, p.reason, image_formats()[2]) for p in pictures if not p.vanished]
        with self.db:
            self.db.executemany("UPDATE features SET digest = NULL, files = 0 WHERE digest = ?", zip(fresh))
            of_digest = "(SELECT count(*) FROM files WHERE digest = ?2 AND there)"
            self.db.executemany(f"INSERT INTO features VALUES (?1, ?2, {of_digest})", enumerate(fresh, rows))
            self.db.executemany(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, 1) ON CONFLICT (path) DO UPDATE SET size = excluded.size,"
                " mtime = excluded.mtime, digest = excluded.digest, reason = excluded.reason,"
                " decoders = excluded.decoders, there = 1",
                there,
            )
            self.db.executemany(
                "UPDATE files SET there = 0 WHERE path = ?", [(p.file.path,) for p in pictures if p.vanished]
            )
            self.put(totals=None, rows=rows + len(fresh), checksum=zlib.crc32(records.tobytes(), self.get("checksum")))

    def known_files(self) -> Iterator[tuple[Any, ...]]:
        """Path, size, time, whether it is there, and whether to try it again, by path. No lock is held in between: a
        scan may take minutes, and another run may want to save."""
        query = """SELECT path, size, mtime, there, digest IS NULL AND decoders <> ? FROM files WHERE path > ?
            ORDER BY path LIMIT ?"""
        block = [(b"",)]
        while block := self.lookup.execute(query, (image_formats()[2], block[-1][0], BLOCK)).fetchall():
            yield from block

    def differences(self, files: Iterable[File], everything: bool) -> Iterator[tuple[bytes, int, int, int | None]]:
        """What a scan found that is not as the catalogue has it. Both are in the order of their paths."""
        stored, end = self.known_files(), (b"", 0, 0, 0, 0)
        known = next(stored, end)
        for file in files:
            while known is not end and known[0] < file.path:
                if known[3]:
                    yield *known[:3], 0
                known = next(stored, end)
            same = known[:3] == file
            if not same or everything or known[4]:
                yield *file, None
            elif not known[3]:
                yield *file, 1
            if known[0] == file.path:
                known = next(stored, end)
        for left in itertools.chain([known], stored):
            if left[3]:
                yield *left[:3], 0

    def scan(self, files: Iterable[File], everything: bool) -> int:
        """Compare with what lies in the collection now, and choose what to read of it: what is new or changed, what
        other decoders could not use, and what has lost its features. How many differences there are."""
        self.db.executescript(CHANGES)
        with self.db:
            self.db.executemany("INSERT INTO changes VALUES (?, ?, ?, ?)", self.differences(files, everything))
        return self.count("changes")

    def unread(self) -> Iterator[File]:
        return map(File._make, self.db.execute(f"SELECT path, size, mtime FROM {UNREAD}"))

    def settle(self) -> bool:
        """Take down what is gone and what is back, unless no usable image would be left; whether one is."""
        with self.db:
            changed = "SELECT there, path FROM changes WHERE there IS NOT NULL"
            self.db.executemany("UPDATE files SET there = ? WHERE path = ?", self.db.execute(changed).fetchall())
            self.put(totals=None)
            left = self.any(USABLE)
            if not left:
                self.db.rollback()
        return left

    def totals(self, store: bool = False) -> list[int]:
        """How many files are usable, skipped and gone: stored, since to count a million takes a second."""
        totals = json.loads(self.get("totals") or "[]") or [self.count(kind) for kind in (USABLE, SKIPPED, GONE)]
        if store:
            with self.db:
                self.put(totals=json.dumps(totals))
        return totals

    def prune(self) -> None:
        """Forget the files that are gone, and the features that no file is left of."""
        with self.db:
            self.db.execute("DELETE FROM files WHERE NOT there")
        if len(live := self.rows("WHERE files > 0 ORDER BY row")) < self.get("rows"):
            self.compact(live)

    def largest_first(self) -> np.ndarray:
        """Row, bytes of a file, and number of files, int64 (n, 3), of each picture of the collection."""
        query = f"SELECT row, size, count(*) FROM {FEATURED} GROUP BY row ORDER BY size DESC, min(path)"
        return np.fromiter(self.db.execute(query), np.dtype((np.int64, 3)))

    def files_with(self, digest: bytes, limit: int) -> list[File]:
        """The files of the collection with this content: another run may give its features another row meanwhile."""
        query = "SELECT path, size, mtime FROM files WHERE digest = ? AND there ORDER BY path LIMIT ?"
        return [File(*found) for found in self.db.execute(query, (digest, limit))]

    def wants_codes(self, work: Work) -> bool:
        rows = self.get("rows")
        return rows >= FEWEST_CODED and rows * self.dim * 2 > work.exact_bytes

    def read_index(self, mapped: bool = True) -> tuple[faiss.Index, dict[str, Any]] | None:
        """The stored index and what `write_index` noted of it, if it is whole and of this generation."""
        with suppress(FileNotFoundError, IsADirectoryError), open(self.index, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - 8))
            length, checksum = (int.from_bytes(stream.read(4), "little") for _ in range(2))
            if size < 8 or file_checksum(self.index, size - 4) != checksum:
                log.warning("%s is damaged: it is made again from the features", self.index)
                return None
            stream.seek(size - 8 - length)
            notes = json.loads(stream.read(length))
            if bytes.fromhex(notes["generation"]) == self.generation():
                mapped = mapped and os.name == "posix" and "trained" not in notes  # codes would be mapped and copied
                path = f"/dev/fd/{stream.fileno()}" if os.name == "posix" else str(self.index)  # FAISS wants UTF-8
                return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC if mapped else 0), notes
        return None

    def write_index(self, index: faiss.Index, notes: dict[str, Any]) -> None:
        """The index; behind it the notes as JSON, the length of these, and the CRC-32 of all before: 4 bytes each."""
        text = json.dumps({**notes, "generation": self.get("generation").hex()}).encode()
        with whole_file(self.index) as stream:
            faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
            stream.write(text + len(text).to_bytes(4, "little"))
            stream.flush()
            stream.write(file_checksum(Path(stream.name)).to_bytes(4, "little"))

    def export(self, folder: Path) -> int:
        """features.npy, float16 (n, dim), and paths.txt, a line each; how many. The first is there only if both are."""
        n, dim = self.count(FEATURED), self.dim
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "features.npy").unlink(missing_ok=True)
        with whole_file(folder / "features.npy") as features, whole_file(folder / "paths.txt") as paths:
            np.lib.format.write_array_header_1_0(features, {"descr": "<f2", "fortran_order": False, "shape": (n, dim)})
            row = 0
            for block in self.vectors():
                query = f"SELECT row - ?, path FROM {FEATURED} AND row >= ? AND row < ? ORDER BY row, path"
                for i, path in self.db.execute(query, (row, row, row + len(block))):
                    features.write(block[i].tobytes())
                    paths.write(path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r") + b"\n")
                row += len(block)
        return n


# ---- Index and search ------------------------------------------------------------------------------------------------


def single(block: np.ndarray) -> np.ndarray:
    """As float32, in order; torch is several times as fast at it as NumPy."""
    return torch.from_numpy(np.ascontiguousarray(block)).float().numpy()


def build_index(features: np.ndarray | Iterable[np.ndarray], index: faiss.Index | None = None) -> faiss.Index:
    """A FAISS index of `features`: (n, dim), of any float type, each of length 1; or an iterator of such blocks.

    It is exact: a search compares with every vector, by inner product. They are stored as fp16, as the cache has them.
    Where an `index` is given they are added to that. Raises ValueError if there are none, not even of no rows.
    """
    for block in [features] if isinstance(features, np.ndarray) else features:
        dim = block.shape[1]
        index = index or faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        for i0 in range(0, len(block), BLOCK):
            index.add(single(block[i0 : i0 + BLOCK]))
    if index is None:
        raise ValueError("build_index was given no features")
    return index


def progress_bar(steps: Iterable[Any] | None = None, **options: Any) -> tqdm.tqdm:
    """On a terminal alone, and not with -q."""
    return tqdm.tqdm(steps, disable=None if log.isEnabledFor(logging.INFO) else True, **options)


def with_progress(blocks: Iterable[np.ndarray], rows: int, what: str) -> Iterator[np.ndarray]:
    with progress_bar(total=rows, desc=what, unit="img") as bar:
        for block in blocks:
            yield block
            bar.update(len(block))


class Nearest:
    """The k rows nearest to each of `xq`, float32 (nq, dim), of all the blocks that are passed through."""

    def __init__(self, xq: np.ndarray, k: int) -> None:
        self.xq, self.k, self.heap = xq, k, faiss.ResultHeap(len(xq), k, keep_max=True)

    def among(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        row = 0
        for block in blocks:
            D, I = faiss.knn(self.xq, single(block), min(self.k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            self.heap.add_result(D, I + row)
            row += len(block)
            yield block
        self.heap.finalize()


def coded_index(catalogue: Catalogue, rows: int) -> tuple[faiss.Index, dict[str, Any]]:
    """An index of compact codes, 64 bytes a vector, and what is to be known of it.

    Principal components, turned at random so that they weigh alike, then product quantization in 4 bits, scanned whole
    (André, Kermarrec & Le Scouarnec, VLDB 2015). By L2 distance, which ranks vectors of length 1 as a product does.
    The codes only choose whose exact scores to compute: as many as it takes to find nearly all of the true nearest of
    some vectors on which it was not trained.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[: TRAINED_ON + HELD_OUT])
    sample = np.concatenate([catalogue.records_of(part)["vector"] for part in np.array_split(chosen, 16)])
    held = np.arange(len(chosen)) % (len(chosen) // min(HELD_OUT, len(chosen) // 2)) == 0
    width = min(CODED_DIM, sample.shape[1], int(sum(~held))) // 2 * 2
    index = faiss.index_factory(sample.shape[1], f"PCAR{width},PQ{width // 2}x4fs")
    faiss.downcast_index(index.index).pq.cp.min_points_per_centroid = 1  # it would warn of a small collection
    index.train(single(sample[~held]))
    nearest = Nearest(single(sample[held]), min(TOP + 1, rows))
    build_index(nearest.among(with_progress(catalogue.vectors(), rows, "compact codes")), index)
    true, shortlist = [set(I) - {own} for I, own in zip(nearest.heap.I.tolist(), chosen[held].tolist())], SHORTLIST
    while True:
        found = index.search(nearest.xq, min(shortlist, rows))[1].tolist()
        recall = sum(len(t & set(f)) for t, f in zip(true, found)) / sum(map(len, true))
        if recall >= RECALL or shortlist >= rows or 2 * shortlist > LONGEST:
            return index, {"trained": rows, "shortlist": shortlist, "recall": round(recall, 4)}
        shortlist *= 2


def is_current(catalogue: Catalogue, work: Work, notes: dict[str, Any]) -> bool:
    """Whether an index of which this was noted will do."""
    rows = catalogue.get("rows")
    if not work.update:  # the newest features may be missing, but then they must be no older ones' successors
        return notes["rows"] == rows or not catalogue.count("features WHERE files = 0 AND digest IS NULL")
    return notes["rows"] == rows and ("trained" in notes) == catalogue.wants_codes(work)


def open_index(catalogue: Catalogue, work: Work = Work()) -> tuple[faiss.Index, dict[str, Any]]:
    """The index of the stored features, and what was noted of it. It is brought up to date, or, where `work` says so,
    may lack what another run is adding."""
    if (stored := catalogue.read_index()) and is_current(catalogue, work, stored[1]):
        return stored
    with catalogue.writing():
        if not (rows := catalogue.get("rows")):
            raise DeepVisionError(f"{catalogue.folder} holds no features yet: run without --no-update")
        stored, coded = catalogue.read_index(mapped=False), catalogue.wants_codes(work)
        if not (stored and is_current(catalogue, work, stored[1])):  # no other run has made it meanwhile
            notes: dict[str, Any] = stored[1] if stored else {}
            if stored and ("trained" in notes) == coded and rows <= OUTGROWN * notes.get("trained", rows):
                fresh = with_progress(catalogue.vectors(notes["rows"]), rows - notes["rows"], "index")
                index = build_index(fresh, stored[0])
            elif coded:
                index, notes = coded_index(catalogue, rows)
            else:
                index, notes = build_index(with_progress(catalogue.vectors(), rows, "index")), {}
            catalogue.write_index(index, {**notes, "rows": rows})
    return open_index(catalogue, work)


def index_on_gpus(catalogue: Catalogue, rows: int) -> faiss.Index | None:
    """The features of the first `rows` as fp16, spread over the GPUs; None if there is no GPU, or not the room."""
    count = faiss.get_num_gpus()
    if not count or not torch.cuda.is_available():
        return None
    share, dim = -(-rows // count), catalogue.dim
    if any(torch.cuda.mem_get_info(gpu)[0] < 2 * share * dim + GPU_RESERVE for gpu in range(count)):
        log.warning("the %d features do not fit on the GPU: the processor searches", rows)
        return None
    index = faiss.IndexShards(dim, True, True)  # in threads, the rows of one after those of the other
    for gpu in range(count):
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = gpu, True
        shard = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), dim, config)
        index.add_shard(build_index(catalogue.vectors(gpu * share, min(rows, (gpu + 1) * share)), shard))
    return index


@dataclass(frozen=True)
class Engine:
    """What a search needs; `initialize_reverse_image_search` makes it."""

    images: Path
    model: Model
    catalogue: Catalogue
    generation: bytes | None  # of the catalogue: another one has other rows
    index: faiss.Index
    shortlist: int  # codes to look at closely; 0: the index is exact
    exact: bool  # search exactly, whatever the index is
    dead: np.ndarray  # bool (rows,), the rows that belong to no file of the collection
    sample: np.ndarray  # features of some images of the collection, float32 (m, dim)
    limits: dict[str, float]  # of the labels, see `chance_limits`
    summary: Summary

    def is_valid(self) -> bool:
        return self.catalogue.generation() == self.generation

    def is_of_folder(self) -> bool:
        """Whether the folder has any of the first images that are known."""
        first = self.catalogue.db.execute(f"SELECT path FROM {USABLE} LIMIT {BLOCK}").fetchall()  # not open: a lock
        return any(os.path.exists(self.images / os.fsdecode(path)) for (path,) in first)

    @cached_property
    def on_gpus(self) -> faiss.Index | None:
        return index_on_gpus(self.catalogue, self.index.ntotal)


def candidates(engine: Engine, xq: np.ndarray, count: int, exact: bool, together: int = 0) -> np.ndarray:
    """Rows, int64 (nq, count), among which the nearest to each of xq, some of those asked `together`, are; -1 where
    there are fewer."""
    count = min(count, engine.index.ntotal)
    if engine.shortlist and count <= GPU_MOST and together >= GPU_QUERIES and engine.on_gpus:
        return engine.on_gpus.search(xq, count)[1]
    if engine.shortlist and exact:
        nearest = Nearest(xq, count)
        rows = engine.index.ntotal  # another run may have added more
        deque(nearest.among(with_progress(engine.catalogue.vectors(0, rows), rows, "exact search")), 0)
        return nearest.heap.I
    return engine.index.search(xq, count)[1]


def exact_scores(catalogue: Catalogue, xq: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores D, rows I and content hashes, best first, of these rows for one query, (1, dim), from their features."""
    records = catalogue.records_of(np.sort(rows))
    if not len(rows):
        return np.empty(0, np.float32), rows, records["digest"]
    index = build_index(records["vector"][:0])
    index.add_sa_codes(np.ascontiguousarray(records["vector"]).view(np.uint8))
    D, I = index.search(xq, len(rows))
    return D[0].clip(-1, 1), np.sort(rows)[I[0]], records["digest"][I[0]]  # fp16 makes lengths up to 1.0001


def nearest(engine: Engine, xq: np.ndarray, k: int) -> Iterator[tuple[np.ndarray, ...]]:
    """For each of xq, (nq, dim): D, I and content hashes of the k nearest live rows or more; ties in no certain order.

    By codes they are found in steps, each of four times as many and the same whatever k is. What a step finds above the
    end of the one before comes too late and is left out: so top k is a prefix of top k+n.
    """
    none: tuple[np.ndarray, ...] = exact_scores(engine.catalogue, xq, np.empty(0, np.int64))
    found, lacking, exact = [none] * len(xq), np.arange(len(xq)), engine.exact or not engine.shortlist
    count = 2 * k if exact else engine.shortlist
    while len(lacking):
        whole = count >= engine.index.ntotal
        for i, rows in zip(lacking, candidates(engine, xq[lacking], count, exact, len(xq))):
            live = rows[rows >= 0]
            step = D, *_ = exact_scores(engine.catalogue, xq[i : i + 1], live[~engine.dead[live]])
            sure = D.min(initial=np.inf) + ROUNDING < D  # equal scores may go on beyond the list
            if not exact:
                near = np.count_nonzero(~engine.dead[rows[: count // CLOSELY]])
                sure &= D[near - 1] <= D if near else False
            taken = (sure | whole) & (found[i][0].min(initial=np.inf) > D)
            found[i] = tuple(np.concatenate([old, new[taken]]) for old, new in zip(found[i], step))
        lacking = np.array([i for i in lacking if len(found[i][0]) < k and not whole], np.int64)
        count *= 4
        if count > LONGEST and not exact:
            count, exact = 2 * k, True
    yield from found


def location(path: str) -> str:
    """Where a file lies, not where it points: a link to an image of the collection is a query like any other."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def is_as_read(path: str, file: File) -> bool:
    """Whether the file is there as it was when its features were extracted."""
    with suppress(OSError):
        return as_found(file.path, os.stat(path)) == file
    return False


def own_distance(scores: np.ndarray) -> np.ndarray:
    """From an image's scores with the sample, (..., m), to how far a near but unrelated image is, (...)."""
    rank = int(scores.shape[-1] * (1 - OWN))
    return np.maximum(1 - np.partition(scores, rank, axis=-1)[..., rank], 1e-6)


def label_of(distance: float, limits: dict[str, float]) -> str:
    """Of a match that is so near, as a share of the query's own distance; none in a collection too small to tell."""
    return next((label for label, limit in limits.items() if distance <= limit), "weak" if limits else "")


def find_matches(
    engine: Engine, query: Picture, xq: np.ndarray, found: Iterable[Any], k: int, threshold: float | str
) -> list[Match]:
    """The matches among the rows `found` near each view, xq (views, dim), of a query.

    The best view counts, and the first of equal ones, which is the query as it is.
    """
    least, label = (-1.0, threshold) if isinstance(threshold, str) else (threshold, LABELS[0])
    best: dict[int, tuple[float, str, bytes]] = {}
    for view, (scores, rows, digests) in zip(query.pixels, found):
        for score, row, digest in zip(scores.tolist(), rows.tolist(), digests):
            if round(score, 3) >= least and score > best.get(row, (-2.0,))[0]:
                best[row] = score, view.name, digest.tobytes()
    own, reach = location(os.fsdecode(query.file.path)), float(own_distance((xq @ engine.sample.T).max(0)))
    matches: list[tuple[float, str, str, str]] = []
    for row in sorted(best, key=lambda row: -best[row][0]):
        score, edit, digest = best[row]
        if len(matches) > k and -score > matches[k][0]:
            break
        word = label_of((1 - score) / reach, engine.limits)
        for file in engine.catalogue.files_with(digest, k + 1):
            path = os.path.join(engine.images, os.fsdecode(file.path))
            if is_as_read(path, file) and (digest != query.digest or location(path) != own):
                matches.append((-score, path, "identical" if digest == query.digest else word, edit))
    kept = [match for match in sorted(matches) if label == LABELS[0] or match[2] in LABELS[LABELS.index(label) :]]
    ranked = enumerate(kept[:k], start=1)
    return [Match(rank, path, -minus, word == "identical", word, edit) for rank, (minus, path, word, edit) in ranked]


def search(
    queries: str | Path | Iterable[str | Path], engine: Engine | None = None, *,
    k: int = TOP, threshold: float | str = -1.0, views: str = "auto",
) -> Iterator[Answer]:  # fmt: skip
    """What looks like each of the image files `queries`: an Answer for each, in their order.

    engine     by default `initialize_reverse_image_search()`
    k          matches at most; a picture that is there under several names gives several
    threshold  cosine similarity, -1 to 1, that a match has at least, or label: similar, copy, identical
    views      none, all or auto: the edits that a query is searched with, see `query_views`

    Best first, equal scores by path; the query's own file is left out, and so is a file that is no longer what was
    indexed. Scores are exact; in a large collection a match may be missed, see `coded_index`. A file that cannot be
    used gets an Answer with an `error`. Raises DeepVisionError if another run has pruned or rebuilt the index since it
    was opened, or features turn out to be damaged.
    """
    if k < 1 or views not in VIEWS or (isinstance(threshold, str) and threshold not in LABELS):
        raise ValueError(f"k={k}, threshold={threshold!r}, views={views!r}: see the documentation of search")
    engine = engine or initialize_reverse_image_search()
    if threshold in ("similar", "copy") and not engine.limits:
        raise DeepVisionError(f"{threshold!r} cannot be told among fewer than {FEWEST} images: give a number instead")
    names = [queries] if isinstance(queries, (str, os.PathLike)) else queries
    files = (File(os.fsencode(name), 0, 0) for name in names)
    look = partial(query_views, model=engine.model, views=views)
    read = partial(read_picture, root=b"", transform=look, known=lambda digest: False)
    pictures = read_ahead(read, files, workers=2, ahead=TOGETHER)  # a query has some twenty views
    try:
        while group := list(itertools.islice(pictures, TOGETHER)):
            yield from answer_together(group, engine, k, threshold)
    except sqlite3.DatabaseError as error:
        why = f": {error}. The next run mends it" if engine.is_valid() else " was changed by another run"
        raise DeepVisionError(f"{engine.catalogue.folder}{why}: search once more") from error


def answer_together(group: Sequence[Picture], engine: Engine, k: int, threshold: float | str) -> Iterator[Answer]:
    """Some queries at once: of 16 each costs a third of what it does alone."""
    features = {i: single(features_of_views(p.pixels, engine.model)) for i, p in enumerate(group) if p.pixels}
    if features:
        found = nearest(engine, np.concatenate(list(features.values())), k + 1)  # one more, for the query's own file
    for i, picture in enumerate(group):
        name = os.fsdecode(picture.file.path)
        answer = Answer(name, [], picture.reason or NOT_AN_IMAGE)
        if i in features:
            views = itertools.islice(found, len(features[i]))
            answer = Answer(name, find_matches(engine, picture, features[i], views, k, threshold))
        if not engine.is_valid():  # rows that are gone by now are no answer
            raise DeepVisionError(f"{engine.catalogue.folder} was changed by another run: search once more")
        yield answer


def chance_limits(sample: np.ndarray, n: int) -> dict[str, float]:
    """How near, as a share of a query's own distance, a match among n images must be to get a label of CHANCE.

    The distances d = 1 - score of unrelated images have a lower end, 0, towards which their number falls as a power of
    d: a generalised Pareto tail with a known end point (Pickands, Annals of Statistics 1975). The power is estimated
    from the nearest pairs, as by Hill (Annals of Statistics 1975), but with a median, which a burst of true look-alikes
    does not move; and pairs nearer than chance would have them are left out, until that changes nothing. `sample`,
    float32 (m, dim), is of the collection itself. Empty if it is too small to tell.
    """
    m = len(sample)
    if m < FEWEST:
        return {}
    scores = (sample @ sample.T)[~np.eye(m, dtype=bool)].reshape(m, m - 1)
    ranked = np.sort(np.maximum((1 - scores) / own_distance(scores)[:, None], 1e-6), axis=None)
    first, tail, limits = 0, len(ranked) // 20, dict.fromkeys(CHANCE, 0.0)
    for _ in range(ROUNDS):
        reach, share = ranked[first + tail], tail / (len(ranked) - first)
        power = np.median(np.log(reach / ranked[first : first + tail])) / np.log(2)
        power *= 1 + m**-0.5  # a standard error, to be on the safe side: an image is worth one independent distance
        limits = {label: float(reach * (chance / n / share) ** power) for label, chance in CHANCE.items()}
        first = int(np.searchsorted(ranked, limits["copy"]))
        tail = min(2 * m, len(ranked) - first - 1)
    return limits


def chosen_vectors(catalogue: Catalogue, place: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Places and features, fp16 (m, dim), of those rows whose place in `place`, (rows,), is `chosen`, bool (n,)."""
    row = 0
    for block in catalogue.vectors():
        places = place[row : row + len(block)]
        row += len(block)
        kept = np.flatnonzero((places >= 0) & chosen[places])
        yield places[kept], block[kept]


def claim_in_order(heads: np.ndarray, D: torch.Tensor, alike: torch.Tensor, first: np.ndarray, scores: Any) -> None:
    """Each of `heads` that no earlier one has claimed claims all later ones that are `alike`, bool (heads, heads)."""
    alike = alike.triu(1)
    for i in alike.any(1).nonzero()[:, 0].tolist():
        if first[heads[i]] == heads[i]:
            claimed = alike[i].nonzero()[:, 0].cpu().numpy()
            claimed = claimed[first[heads[claimed]] == heads[claimed]]
            first[heads[claimed]], scores[heads[claimed]] = heads[i], D[i].cpu().numpy()[claimed]


def first_alike(catalogue: Catalogue, device: str, place: np.ndarray, least: np.ndarray) -> tuple[Any, np.ndarray]:
    """For each picture, by its place, the place of the first one that it is a copy of, or its own; and their score.

    place  of each row, -1 for none
    least  score that a pair has with both, float32 (n,)

    A copy has no copies: nothing chains. 8,192 pictures at a time are compared with all later ones.
    """
    own, needed = np.arange(n := len(least)), torch.from_numpy(least).to(device)
    first, scores = own.copy(), np.ones(n, np.float32)
    for i0 in progress_bar(range(0, n, 2 * BLOCK), desc="comparing", unit="block"):
        ours = (first == own) & (own >= i0) & (own < i0 + 2 * BLOCK)
        if not ours.any():
            continue
        heads, features = map(np.concatenate, zip(*chosen_vectors(catalogue, place, ours)))
        xh, heads = torch.from_numpy(features[np.argsort(heads)]).to(device).float(), np.sort(heads)
        D = xh @ xh.T
        claim_in_order(heads, D, (needed[heads][:, None] <= D) & (needed[heads] <= D), first, scores)
        del D  # 0.3 GB
        free = first[heads] == heads
        heads, xh = heads[free], xh[torch.from_numpy(free)]
        for places, block in chosen_vectors(catalogue, place, (first == own) & (own >= i0 + 2 * BLOCK)):
            D = xh @ torch.from_numpy(block).to(device).float().T  # (heads, places)
            alike = (needed[heads][:, None] <= D) & (needed[places] <= D)
            found = alike.any(0).nonzero()[:, 0].cpu().numpy()
            by = alike[:, found].cpu().numpy().argmax(0)  # the first
            first[places[found]], scores[places[found]] = heads[by], D[by, found].cpu().numpy()
    return first, scores


def different_files(engine: Engine, row: int) -> list[str]:
    """The files with these features. What links make of one of them is no other file."""
    root, found = os.path.realpath(engine.images), dict[tuple[int, int], str]()
    query = f"SELECT path FROM {FEATURED} AND row = ? ORDER BY path"
    names = [os.fsdecode(path) for (path,) in engine.catalogue.db.execute(query, (row,))]
    for name in sorted(names, key=lambda name: os.path.realpath(os.path.join(root, name)) != os.path.join(root, name)):
        path = os.path.join(engine.images, name)
        with suppress(OSError):  # gone meanwhile
            info = os.stat(path)
            found.setdefault((info.st_dev, info.st_ino), path)
    return sorted(found.values())


def least_scores(engine: Engine, place: np.ndarray, own: np.ndarray, threshold: float | str) -> np.ndarray:
    """From which score on each picture, by its place, has a copy, float32 (n,); its own distance is put into `own`."""
    if engine.limits:
        for places, block in chosen_vectors(engine.catalogue, place, own > 0):
            own[places] = own_distance(block.astype(np.float32) @ engine.sample.T)
    if not isinstance(threshold, str):
        return np.full_like(own, threshold - 0.0005)  # as it is printed
    return 1 - engine.limits[threshold] * own if engine.limits else np.full_like(own, DUPLICATE)


def find_duplicates(engine: Engine, threshold: float | str = "copy") -> Iterator[Group]:
    """Groups of the same picture in the collection, that of the largest file first. No file is touched.

    threshold  cosine similarity, -1 to 1, or label: identical, copy, similar. A pair has it whichever of the two is
               searched with. In a collection too small for labels, `copy` is DUPLICATE

    In a group are one file to keep, the largest; those of the same bytes; and those that are copies of just that one.
    Raises DeepVisionError if another run has changed the index since it was opened, or it turns out to be damaged.
    """
    catalogue, limits = engine.catalogue, engine.limits
    if threshold == "similar" and not limits:
        raise DeepVisionError(f"'similar' cannot be told among fewer than {FEWEST} images: give a number instead")
    rows, _, files = catalogue.largest_first().T
    everyone = first = np.arange(len(rows))
    own = scores = np.ones(len(rows), np.float32)
    place = np.full(rows.max() + 1, -1)
    place[rows] = everyone
    if threshold != "identical":
        try:
            least = least_scores(engine, place, own, threshold)
            first, scores = first_alike(catalogue, engine.model.device, place, least)
        except sqlite3.DatabaseError as error:
            raise DeepVisionError(f"{catalogue.folder}: {error}. Start again, and it is repaired") from error
    if not engine.is_valid():
        raise DeepVisionError(f"{catalogue.folder} was changed by another run: start again")
    copies: dict[int, list[int]] = {head: [] for head in everyone[(files > 1) & (first == everyone)].tolist()}
    for copy in everyone[first != everyone].tolist():
        copies.setdefault(int(first[copy]), []).append(copy)
    for head, others in sorted(copies.items()):
        keep, *same = different_files(engine, int(rows[head])) or [""]
        found = [(1.0, path, "identical") for path in same]
        for i in others:
            word = label_of((1 - scores[i]) / min(own[head], own[i]), limits)
            found += [(min(1.0, float(scores[i])), path, word) for path in different_files(engine, int(rows[i]))]
        ranked = enumerate(sorted(found, key=lambda it: (it[2] != "identical", -it[0], it[1])), start=1)
        if keep and found:
            yield Group(keep, [Match(n, path, score, word == "identical", word) for n, (score, path, word) in ranked])


# ---- Assembly --------------------------------------------------------------------------------------------------------


def unlisted(error: OSError, prune: bool = False) -> None:
    """A folder that cannot be listed is passed over, but must not make `--prune` forget what lies in it."""
    what = f"{shown(os.fsdecode(error.filename))} cannot be listed ({error.strerror})"
    if prune:
        raise DeepVisionError(f"{what}: nothing was pruned")
    log.warning("%s", what)


@contextmanager
def crashes_noted(catalogue: Catalogue, images: Path, note: Path) -> Iterator[Callable[[File], bool]]:
    """While files are read; each is asked for before whether to read it. A decoder that crashes ends the run, but it
    leaves a note of the files that were being read and its last words, and the next run passes over that file."""
    root, told = os.fsencode(images), note.read_bytes() if note.is_file() else b""
    crashed = b"Fatal Python error" in told
    bad = crashing([os.path.join(root, path) for path in told.split(b"\0") if path]) if crashed else ()
    try:
        note.unlink(missing_ok=True)
        stream = io.FileIO(note, "x")
        stream.truncate(IN_FLIGHT * PATH_BYTES)
        words = io.FileIO(note, "a")  # behind that, whatever the other threads are writing meanwhile
    except OSError:  # it can be done without
        stream, words = io.FileIO(os.devnull, "w"), io.FileIO(os.devnull, "w")
    places = itertools.cycle(range(0, IN_FLIGHT * PATH_BYTES, PATH_BYTES))

    def is_safe(file: File) -> bool:
        if os.path.join(root, file.path) in bad:
            catalogue.save([Picture(file, reason="its decoder crashes")])
            return False
        with suppress(OSError):
            stream.seek(next(places))
            stream.write(file.path.ljust(PATH_BYTES, b"\0"))
        return True

    with stream, words:
        faulthandler.enable(words)
        try:
            yield is_safe
        finally:
            faulthandler.disable()
            with suppress(OSError):
                note.unlink(missing_ok=True)


def read_new(
    catalogue: Catalogue, images: Path, model: Model, work: Work, summary: Summary, into: Catalogue | None = None
) -> None:
    """The features of the files chosen, into the cache: every few seconds, and whatever ends the run."""
    catalogue.trusted_from = catalogue.get("rows") if work.rebuild else 0
    unsaved: list[Picture] = []
    into, saved, label = into or catalogue, time.monotonic(), f"{model.name} on {model.device}, {model.precision}"
    note = catalogue.folder / f"reading{work.rank or ''}"  # not in the cache of a rank, which is soon taken in
    total = catalogue.count(UNREAD) // work.ranks
    with crashes_noted(into, images, note) as is_safe, progress_bar(total=total, desc=label, unit="img") as bar:
        files = filter(is_safe, filter(work.mine, catalogue.unread()))
        try:
            for pictures in with_features(files, images, model, work, catalogue.is_known, summary):
                unsaved += pictures
                summary.add(pictures)
                bar.set_postfix_str(summary.balance, refresh=False)
                bar.update(len(pictures))
                if time.monotonic() - saved > SAVE_SECONDS or len(unsaved) > BLOCK:
                    batch, unsaved = unsaved, []  # not tried again, should it fail: that would wait for itself
                    into.save(batch)
                    saved = time.monotonic()
        finally:
            if unsaved:
                into.save(unsaved)


def meet(work: Work) -> None:
    """Wait here until all ranks of torchrun have come, if there are several."""
    try:
        if work.ranks > 1:
            torch.distributed.barrier()
    except RuntimeError as error:
        raise DeepVisionError("another rank has stopped: run it again, what was done is saved") from error


def pictures_in(share: Catalogue) -> Iterator[list[Picture]]:
    """All that a rank has read: first what came without features, since it is not usable or was known before."""
    listing = "SELECT path, size, mtime, digest, reason, row FROM files LEFT JOIN features USING (digest) WHERE row"
    yield [Picture(File(*f[:3]), f[3], reason=f[4]) for f in share.db.execute(f"{listing} IS NULL")]
    start = 0
    for block in share.vectors():
        rows = share.db.execute(f"{listing} BETWEEN ? AND ?", (start, start + len(block) - 1))
        yield [Picture(File(*f[:3]), f[3], vector=block[f[5] - start]) for f in rows]
        start += len(block)


def take_in(catalogue: Catalogue, summary: Summary) -> bool:
    """Save what the other ranks have read, also those that were stopped, and remove their caches; True if any."""
    folders = sorted(catalogue.folder.glob("rank-*"))
    for folder in folders:
        share = Catalogue(folder, catalogue.identity, catalogue.dim)
        share.mend()
        with share.locked():
            for pictures in pictures_in(share):
                catalogue.save(pictures)
                summary.add(pictures)
        share.close()
        shutil.rmtree(folder)
    return bool(folders)


def scan(catalogue: Catalogue, images: Path, work: Work) -> int:
    """See what has changed in the folder `images`, which may be missing; how many differences there are."""
    files = find_images(images, partial(unlisted, prune=work.prune), [catalogue.folder.parent])
    return catalogue.scan(files if images.is_dir() else (), work.rebuild)


def label_limits(catalogue: Catalogue, store: bool = False) -> tuple[np.ndarray, dict[str, float]]:
    """A sample of the collection's features, float32 (m, dim), and the `chance_limits` that follow, perhaps from store.

    The least content hashes: a sample that does not depend on the order in which files were added.
    """
    rows = catalogue.rows(f"WHERE files > 0 AND digest IS NOT NULL ORDER BY digest LIMIT {SAMPLE}")
    n, records = catalogue.get("rows") - len(catalogue.rows("WHERE files = 0")), catalogue.records_of(rows)
    sample, key = single(records["vector"]), hashlib.sha256(b"%d " % n + records["digest"].tobytes()).hexdigest()
    stored, limits = json.loads(catalogue.get("limits") or "[0, 0]")
    if stored != key:
        limits = chance_limits(sample, n)
    if store:
        with catalogue.db:
            catalogue.put(limits=json.dumps([key, limits]))
    return sample, limits


def why_none(catalogue: Catalogue, images: Path, skipped: int) -> str:
    """Why there is no usable image, and what to do about it."""
    there = "has no usable image" if images.is_dir() else "is not a folder" if images.exists() else "is missing"
    if known := catalogue.count("files WHERE digest IS NOT NULL"):
        return (
            f"{images} {there}, but the index knows {known:,}: is a drive not connected, or is --images "
            f"another folder? Nothing was changed; to start afresh, delete {catalogue.folder}"
        )
    if skipped:
        query = f"SELECT count(*), reason FROM {SKIPPED} GROUP BY reason ORDER BY 1 DESC, 2 LIMIT 3"
        reasons = "; ".join(f"{n:,} × {reason}" for n, reason in catalogue.db.execute(query))
        return f"{images} {there}, all {skipped:,} were skipped: {reasons}"
    return f"{images} {there}: put images to search in there, or name another folder with --images"


def update(catalogue: Catalogue, images: Path, model: Model, work: Work) -> Summary:
    """Bring the cache up to date with the folder `images`: read what is new or changed, see what is gone.

    Raises DeepVisionError if no usable image is there; what is known is kept for the day the drive is back.
    """
    summary, left = Summary(), True
    if scan(catalogue, images, work) or work.prune or work.ranks > 1 or not catalogue.get("totals"):
        with catalogue.writing() as waited:
            if take_in(catalogue, Summary()) or waited:
                scan(catalogue, images, work)
            meet(work)
            before = catalogue.get("rows")
            read_new(catalogue, images, model, work, summary)
            meet(work)
            take_in(catalogue, summary)
            if left := catalogue.settle():
                known = catalogue.any(f"features WHERE files > 0 AND row < {before}")
                if not (work.rebuild or known) and catalogue.any(GONE):
                    strange = f"of the images that {catalogue.folder} knows, none is in {images}"
                    if work.prune:
                        raise DeepVisionError(f"{strange}: nothing was pruned")
                    log.warning("%s. If that is another collection, give it an --index-dir of its own", strange)
                if work.prune:
                    summary.forgotten = catalogue.count(GONE)
                    catalogue.prune()
                elif work.rebuild:
                    catalogue.compact(catalogue.rows("WHERE digest IS NOT NULL ORDER BY row"))
                label_limits(catalogue, store=True)
                catalogue.totals(store=True)
    summary.images, summary.skipped, summary.gone = catalogue.totals()
    if not (left and summary.images):
        raise DeepVisionError(why_none(catalogue, images, summary.skipped))
    return summary


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error, NotImplementedError) as error:  # the last of a file system without locks
        raise DeepVisionError(
            f"the cache {folder} cannot be used: {first_line(error)}. What was there is untouched; make room or mend "
            "its permissions, or choose another place with --index-dir"
        ) from error


def ready(catalogue: Catalogue, images: Path, model: Model, work: Work) -> Engine:
    catalogue.check(thorough=work.update)
    summary = update(catalogue, images, model, work) if work.update else Summary(*catalogue.totals())
    generation, gone = catalogue.generation(), catalogue.rows("WHERE files = 0")
    sample, limits = label_limits(catalogue)
    index, notes = open_index(catalogue, work)
    dead = np.zeros(index.ntotal, bool)
    dead[gone[gone < len(dead)]] = True
    summary.recall = notes.get("recall") if not work.exact else None
    shortlist = notes.get("shortlist", 0)
    engine = Engine(images, model, catalogue, generation, index, shortlist, work.exact, dead, sample, limits, summary)
    if not engine.is_valid():  # the rows are not those of the index
        raise DeepVisionError(f"{catalogue.folder} was changed by another run: start again")
    return engine


def initialize_reverse_image_search(
    images: str | Path = IMAGES, index_dir: str | Path = INDEX_DIR, *, model: Model | None = None, work: Work = Work()
) -> Engine:
    """Bring the index of the folder `images` up to date, and make it ready for `search`.

    images     the collection, a folder; files in it are searched for at any depth
    index_dir  the cache of this collection; it has a sub-folder for each model
    model      by default `load_model()`
    work       batch size, threads, whether to rebuild, prune, or not to look for changes at all

    Raises DeepVisionError if there is no usable image, or the cache cannot be written or is a newer version's.
    """
    if os.path.realpath(images) == os.path.realpath(index_dir):
        raise DeepVisionError(f"--index-dir {index_dir} is the collection itself: choose another folder for the cache")
    model, images = model or load_model(), Path(images)
    folder = Path(index_dir, model.identity)
    if not (work.update or Path(folder, "catalogue.sqlite").exists()):
        raise DeepVisionError(f"there is no index of {images} by {model.name} in {index_dir}: run without --no-update")
    if model.name == MODEL and not folder.exists() and any(Path(index_dir).glob(f"{OFFLINE}-*")):
        log.warning("the weights of %s are here now: all images are indexed with it; the offline index is kept", MODEL)
    with cache_errors(folder):
        catalogue = Catalogue(folder, model.identity, model.dim)
        try:
            return ready(catalogue, images, model, work)
        except sqlite3.OperationalError:
            raise  # no room, no right: nothing is wrong with what is there
        except DAMAGE:  # or it is new
            catalogue.mend()
            return ready(catalogue, images, model, work)


def read_share(images: str | Path, index_dir: str | Path, model: Model, work: Work) -> None:
    """As a rank that does not commit: read a share into a cache of its own, which the one that commits takes in."""
    images, folder = Path(images), Path(index_dir, model.identity)
    meet(work)  # the catalogue is whole, and what an earlier run left has been taken in
    with cache_errors(folder):
        catalogue = Catalogue(folder, model.identity, model.dim)
        share = Catalogue(folder / f"rank-{work.rank}", model.identity, model.dim)
        share.mend()
        with share.writing():
            scan(catalogue, images, work)
            read_new(catalogue, images, model, work, Summary(), share)
        share.close()
        catalogue.close()
    meet(work)


# ---- Output ----------------------------------------------------------------------------------------------------------


def cells(text: str) -> int:
    """Columns that a text takes on a terminal: two for a wide character, none for one that is drawn over another."""
    over = ("Mn", "Me")
    return sum((unicodedata.east_asian_width(c) in "WF") + 1 for c in text if unicodedata.category(c) not in over)


def shortened(text: str, room: int) -> str:
    """A path with … in its middle instead of what does not fit into `room` columns: its end tells most."""
    if cells(text) <= room:
        return text
    head = "".join(c for c, end in zip(text, itertools.accumulate(map(cells, text))) if end <= room // 3)
    left = room - 1 - cells(head)
    tail = "".join(c for c, end in zip(text[::-1], itertools.accumulate(map(cells, text[::-1]))) if end <= left)
    return f"{head}…{tail[::-1]}"


def verdict(found: Answer | Group) -> str:
    """What is to be said of it in a word, so that nobody takes the best of many for a match."""
    if isinstance(found, Group):
        return f"keep: the largest of {len(found.matches) + 1}"
    if not found.matches:
        return "no match"
    return "no confident match" if found.matches[0].label in ("weak", "similar") else ""


def as_text(found: Answer | Group, engine: Engine, columns: int = 0, colour: bool = False) -> str:
    """A heading line, then `rank  score  path  label, view` for each match.

    columns  of the terminal: remarks are aligned, and long paths shortened, to fit; 0: it is none
    """
    name, matches, *_ = found
    end = f"  ({verdict(found)})"
    if isinstance(found, Answer):
        end = f"  ({engine.model.name}, {engine.summary.images:,} images): {verdict(found)}".rstrip(": ")
    remarks = [", ".join(filter(None, (match.label, match.view))) for match in matches]
    name, paths, rank_width = shown(name), [shown(match.path) for match in matches], len(str(len(matches)))
    if columns:
        name = shortened(name, max(20, columns - cells(end)))
        room = columns - rank_width - 14 - max(map(cells, remarks), default=0)  # of score and blanks
        paths = [shortened(path, max(20, room)) for path in paths]
        width = max(map(cells, paths), default=0)
        paths = [path + " " * (width - cells(path)) for path in paths]
    lines = [f"\x1b[1m{name}\x1b[0m{end}" if colour else name + end]
    for (rank, _, score, _, label, _), path, remark in zip(matches, paths, remarks):
        remark = f"\x1b[{COLOURS[label]}m{remark}\x1b[0m" if colour and label else remark
        lines.append(f"  {rank:>{rank_width}}  {score:6.3f}  {path}  {remark}".rstrip())
    return "\n".join(lines)


def as_json(found: Answer | Group, engine: Engine) -> str:
    """One object on one line, in ASCII, so that any file name makes valid JSON."""
    if found.error:
        return json.dumps({found._fields[0]: found[0], "error": found.error})
    matches = [match._replace(score=round(match.score, 6))._asdict() for match in found.matches]
    return json.dumps({found._fields[0]: found[0], "model": engine.model.name, "matches": matches})


def print_found(found: Answer | Group, engine: Engine, form: str) -> None:
    """On stdout, at once. `form`: text, json, or null: paths alone, byte for byte, each with a NUL at its end."""
    if form == "json":
        print(as_json(found, engine), flush=True)
    elif found.error:
        return
    elif form == "null":
        sys.stdout.buffer.write(b"".join(os.fsencode(match.path) + b"\0" for match in found.matches))
        sys.stdout.buffer.flush()
    else:
        terminal = sys.stdout.isatty()
        colour = terminal and os.name == "posix" and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        print(as_text(found, engine, shutil.get_terminal_size().columns if terminal else 0, colour), flush=True)


STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f3f3f6;--ink:#1a1a1f;--soft:#565662;--line:#d5d5de;--link:#0b57d0;
--good:#0f6a2b;--fair:#8a4b00}
@media(prefers-color-scheme:dark){:root{--page:#121215;--card:#1e1e23;--ink:#e8e8ee;--soft:#a9a9b6;--line:#3b3b45;
--link:#a8c7fa;--good:#7fdc98;--fair:#f2bd70}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:90rem;padding:1.5rem clamp(.8rem,3vw,2.5rem);background:var(--page);color:var(--ink);
font:1rem/1.45 system-ui,sans-serif}
h1{margin:0;font-size:1.5rem}h2{margin:0;font-size:1.05rem;overflow-wrap:anywhere}p{margin:.2rem 0}
header{margin-bottom:1.5rem}header p,footer,small,.of{color:var(--soft)}
section{padding:1.2rem 0;border-top:1px solid var(--line);content-visibility:auto;contain-intrinsic-size:auto 40rem}
.found{display:grid;gap:1.2rem;grid-template-columns:minmax(0,15rem) minmax(0,1fr);margin-top:.8rem}
ol{display:grid;gap:.9rem;grid-template-columns:repeat(auto-fill,minmax(min(10.5rem,46%),1fr));margin:0;padding:0;
list-style:none;align-content:start}
figure{margin:0;overflow:hidden;border-radius:.6rem;background:var(--card);height:100%}
.asked figure{border:2px solid var(--link);height:auto}
a{color:var(--link)}figure a{display:block;aspect-ratio:1;outline-offset:-3px}
a:focus-visible,summary:focus-visible{outline:3px solid var(--link)}
img,.none{display:flex;align-items:center;justify-content:center;width:100%;height:100%;object-fit:contain}
.none{min-height:8rem;padding:1rem;color:var(--soft);text-align:center;overflow-wrap:anywhere}
figcaption{padding:.5rem .7rem .7rem;font-size:.875rem;overflow-wrap:anywhere}
figcaption b{font-variant-numeric:tabular-nums}small{display:block}
.bar{display:block;height:.3rem;margin:.3rem 0;border-radius:1rem;background:var(--line)}
.bar i{display:block;height:100%;border-radius:1rem;background:var(--link)}
.tag{padding:0 .45em;border:1px solid;border-radius:1rem;color:var(--soft)}
.identical,.copy,.keep{color:var(--good)}.similar{color:var(--fair)}.error{color:var(--fair)}
@media(max-width:40rem){.found{grid-template-columns:1fr}.asked{max-width:15rem}}
@media print{section{break-inside:avoid-page;content-visibility:visible}}
"""


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> tuple[bytes, int, int]:
    """A small picture, WebP, and the width and height of the whole: upright, in the colours of its profile."""
    width, height = image.size
    picture = to_rgb(image, side)
    if (picture.width - picture.height) * (width - height) < 0:  # turned by EXIF
        width, height = height, width
    if profile := image.info.get("icc_profile"):
        with suppress(Exception):  # a malformed profile, or one of another kind of pixels: without it, then
            source = ImageOps.exif_transpose(image) if image.mode == "CMYK" else picture
            source.thumbnail((side, side))
            srgb = ImageCms.createProfile("sRGB")
            picture = ImageCms.profileToProfile(source, io.BytesIO(profile), srgb, outputMode="RGB") or picture
    picture.thumbnail((side, side))
    picture = Image.fromarray(np.asarray(picture))  # without what the file says of itself
    for quality in QUALITIES:
        picture.save(stream := io.BytesIO(), "WEBP", quality=quality)
        if stream.tell() <= THUMBNAIL_BYTES * (side / THUMBNAIL) ** 2:
            break
    return stream.getvalue(), width, height


def thumbnails(paths: Iterable[str], side: int = THUMBNAIL) -> Iterator[Picture]:
    """Each file in turn, with `thumbnail` as its pixels, or a reason why it has none."""
    read = partial(read_picture, root=b"", transform=partial(thumbnail, side=side), known=lambda digest: False)
    workers = usable_cores()
    return read_ahead(read, (File(os.fsencode(path), 0, 0) for path in paths), workers, 4 * workers)


def plain(path: str) -> str:
    """A path as text, whatever it holds."""
    return shown(os.fsencode(path).decode("utf-8", "replace"))


def visible(path: str) -> str:
    """A path as HTML."""
    return html.escape(plain(path))


def as_figure(path: str, picture: Picture, caption: str) -> str:
    """A picture with what is to be said of it, and a link to its file."""
    name, size = visible(path), ""
    inside = f'<span class="none">{visible(picture.reason or "not there any more")}</span>'
    if picture.pixels:
        data, width, height = picture.pixels
        source = base64.b64encode(data).decode()
        inside = f'<img src="data:image/webp;base64,{source}" alt="{name}" loading="lazy" decoding="async">'
        size = f"{width:,} × {height:,} px, {picture.file.size / 1000:,.0f} KB"
    folder, file = os.path.split(path)
    return (
        f'<figure><a href="{html.escape(Path(path).absolute().as_uri())}" title="{name}">{inside}</a>'
        f"<figcaption>{caption}{visible(file)}<small>{visible(folder)}</small><small>{size}</small></figcaption></figure>"
    )


def as_caption(match: Match) -> str:
    tag = f' <span class="tag {match.label}">{match.label}</span>' if match.label else ""
    view = f"<small>{html.escape(match.view)}</small>" if match.view else ""
    bar = f'<span class="bar"><i style="width:{max(0.0, match.score):.1%}"></i></span>'
    return f'<span class="of">{match.rank}</span> <b>{match.score:.3f}</b>{tag}{bar}{view}'


def as_section(found: Answer | Group, pictures: Iterator[Picture]) -> str:
    """A query and its matches, or a file to keep and its copies. `pictures`: those of all of them, in order."""
    name, matches, *_ = found
    heading, tag = f"<section><h2>{visible(name)}</h2>", "keep" if isinstance(found, Group) else "query"
    if found.error:
        return f'{heading}<p class="error">{visible(found.error)}</p></section>'
    heading += f'<p class="of">{verdict(found)}</p>'
    asked = as_figure(name, next(pictures), f'<span class="tag {tag}">{tag}</span> ')
    items = "".join(f"<li>{as_figure(match.path, next(pictures), as_caption(match))}</li>" for match in matches)
    return f'{heading}<div class="found"><div class="asked">{asked}</div><ol role="list">{items}</ol></div></section>'


def page_head(found: Sequence[Answer | Group], engine: Engine, seconds: float) -> str:
    summary, model = engine.summary, engine.model
    kind = ("group",) if found and isinstance(found[0], Group) else ("query", "queries")
    title = counted(len(found), *kind) if found else "No picture is there twice"
    query = f"SELECT path, reason FROM {SKIPPED} ORDER BY path LIMIT {PAGE_SKIPPED}"
    skipped = [f"{visible(os.fsdecode(path))}: {visible(why)}" for path, why in engine.catalogue.db.execute(query)]
    if summary.skipped > PAGE_SKIPPED:
        skipped.append(f"and {summary.skipped - PAGE_SKIPPED:,} more, which -v lists")
    items = "".join(f"<li>{line}</li>" for line in skipped)
    details = f"<details><summary>{summary.skipped:,} skipped</summary><ul>{items}</ul></details>" if skipped else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer"><title>{title} – DeepVision</title><style>{STYLE}</style></head><body>
<header><h1>{title}</h1>
<p>{summary.images:,} images in {visible(str(engine.images))} · {visible(model.name)} on {model.device} ·
{time.strftime("%Y-%m-%d %H:%M")}, {seconds:.1f} s</p>{details}</header><main>
"""


def write_page(path: str | Path, found: Sequence[Answer | Group], engine: Engine, seconds: float) -> None:
    """All that was found, to look at: one file that needs no other, no script and no network.

    Raises DeepVisionError if it cannot be written; what was there is untouched then.
    """
    room, kept = PAGE_PICTURES, list[Answer | Group]()
    for item in found:
        if room > 0:
            kept.append(item._replace(matches=item.matches[: room - 1]))
        room -= 1 + len(item.matches)
    pictured = (item for item in kept if not item.error)
    pictures = thumbnails(path for item in pictured for path in (item[0], *(match.path for match in item.matches)))
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            raise FileExistsError(errno.EEXIST, "something else has that name")
        with whole_file(target, f".{os.getpid()}") as stream:
            stream.write(page_head(found, engine, seconds).encode())
            for item in kept:
                stream.write(as_section(item, pictures).encode() + b"\n")
            footer = f"<footer>{-room:,} more pictures have no room here: see --json</footer>" if room < 0 else ""
            stream.write(f"</main>{footer}</body></html>\n".encode())
    except OSError as error:
        why = error.strerror or first_line(error)
        advice = "choose another place with --report FILE, or --no-report"
        raise DeepVisionError(f"the page {shown(str(path))} cannot be written ({why}): {advice}") from error


# ---- UI --------------------------------------------------------------------------------------------------------------


def find_gradio() -> None:
    """Import Gradio, and have it tell nobody that it is used."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    try:
        importlib.import_module("gradio")
    except ImportError as error:
        raise DeepVisionError(f"--ui needs Gradio ({error}): run `pip install gradio`") from error


UI_STYLE = """
#found .grid-wrap{height:auto;max-height:none;overflow:visible}#given .grid-wrap{padding-top:2.2rem}
#given .grid-container{grid-template-columns:repeat(3,minmax(0,1fr))}
#found .grid-container{grid-template-columns:repeat(auto-fill,minmax(min(11rem,45%),1fr))}
#found .caption-label{left:0;right:0;bottom:0;max-width:none;white-space:normal;overflow-wrap:anywhere;opacity:.93}
#found .selected,#found .thumbnail-item:focus:not(:focus-visible){border-color:inherit;box-shadow:none}
#found .thumbnail-item img{padding-bottom:2rem}
#title h2{margin:0;overflow-wrap:anywhere}footer{display:none!important}
"""


PASTE = """() => document.addEventListener("paste", event => {
    const input = document.querySelector("#given input[type=file]")
    if (input && event.clipboardData.files.length) {
        input.files = event.clipboardData.files
        input.dispatchEvent(new Event("change", {bubbles: true}))
    }
})"""


class Desk:
    """What the tabs of the UI share: the engine, and a lock, since its catalogue is for one thread at a time."""

    def __init__(self, engine: Engine, work: Work) -> None:
        self.engine, self.work, self.lock = engine, work, threading.Lock()

    def state(self) -> str:
        summary, model = self.engine.summary, self.engine.model
        where = f"{summary.images:,} images in {plain(str(self.engine.images))}, {summary.skipped:,} skipped"
        return f"{where}; {model.name} on {model.device}"

    def update(self) -> str:
        """Bring the index up to date, while the one there is goes on answering."""
        old = self.engine
        try:
            folder = old.catalogue.folder.parent
            new = initialize_reverse_image_search(old.images, folder, model=old.model, work=self.work)
        except DeepVisionError as error:
            raise gradio.Error(visible(str(error))) from error
        with self.lock:
            self.engine = new
            old.catalogue.close()
        return self.state()

    def search(self, path: str, k: int, least: float) -> Sequence[Any]:
        """The query's picture, a title, the pictures of its matches with captions, their paths, and the query; without
        a query all stays as it is."""
        if not path:
            return [gradio.skip()] * 5
        try:
            with self.lock:
                (answer,) = search(path, self.engine, k=int(k), threshold=least)
        except DeepVisionError as error:
            raise gradio.Error(visible(str(error))) from error
        if answer.error:
            raise gradio.Error(f"{visible(os.path.basename(path))}: {visible(answer.error)}")
        paths, gone = [match.path for match in answer.matches], Image.new("L", (1, 1), 128)
        asked, *pictures = (
            Image.open(io.BytesIO(it.pixels[0])) if it.pixels else gone
            for it in thumbnails([path, *paths], 2 * THUMBNAIL)
        )
        words = [" · ".join(filter(None, (f"{it.score:.3f}", it.label, it.view))) for it in answer.matches]
        captions = [f"{word} · {plain(os.path.basename(path))}" for word, path in zip(words, paths)]
        title = f"<h2>{len(paths)} like {visible(os.path.basename(path))}</h2>Click one to search from it"
        found = gradio.Gallery(list(zip(pictures, captions)), selected_index=None)
        return asked, title if paths else "<h2>No match</h2>Ask for a lower score", found, paths, path


def user_interface(desk: Desk, top: int) -> Any:
    """The page in the browser, as Gradio Blocks. Paths of the collection stay on this side: a click sends a number."""
    with gradio.Blocks(title="DeepVision", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        paths, query, seen = gradio.State([]), gradio.State(""), gradio.State(0)
        progress = gradio.Progress(track_tqdm=True)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                given = gradio.Gallery(
                    label="Drop, paste or choose", sources=["upload"], file_types=["image"], height=230,
                    interactive=True, allow_preview=False, object_fit="cover", elem_id="given",
                )  # fmt: skip
                asked = gradio.Image(label="Searched for", interactive=False, buttons=[], height=230, elem_id="asked")
                k = gradio.Slider(1, 100, min(top, 100), step=1, label="How many", elem_id="top")
                least = gradio.Slider(0, 1, 0, step=0.01, label="From which score", elem_id="least")
                state = gradio.Textbox(label="Collection", interactive=False, elem_id="state")
                renew = gradio.Button("Update the index", elem_id="update")
            with gradio.Column(scale=3):
                welcome = "<h2>What are you looking for?</h2>Give a picture, and see what looks like it"
                title = gradio.HTML(welcome, elem_id="title")
                found = gradio.Gallery(
                    label="Matches", show_label=False, height="auto", object_fit="contain", columns=4,
                    interactive=False, allow_preview=False, buttons=[], elem_id="found",
                )  # fmt: skip

        def newest(given: list[tuple[str, str]] | None, seen: int) -> Any:
            """How many pictures are given now, and, as the query, the first that was not there before."""
            given = given or []
            return len(given), given[seen][0] if len(given) > seen else gradio.skip()

        def from_given(given: list[tuple[str, str]], k: int, least: float, event: gradio.SelectData) -> Any:
            return desk.search(given[event.index][0], k, least)

        def from_found(paths: list[str], k: int, least: float, event: gradio.SelectData) -> Any:
            return desk.search(paths[event.index], k, least)

        def update(progress: Any = progress) -> str:
            return desk.update()

        shown, private = [asked, title, found, paths, query], {"api_visibility": "private"}
        added = given.change(newest, [given, seen], [seen, query], **private)
        added.then(desk.search, [query, k, least], shown, **private)
        given.select(from_given, [given, k, least], shown, **private)
        found.select(from_found, [paths, k, least], shown, **private)
        gradio.on([k.release, least.release], desk.search, [query, k, least], shown, **private)
        renew.click(update, None, state, **private)
        page.load(desk.state, None, state, js=PASTE, **private)
    return page


def guarded(app: Any, port: int) -> Any:
    """An ASGI application for this machine's own browser: no other site may ask it, and its page asks no other site."""
    hosts = {f"{name}:{port}".encode() for name in ("127.0.0.1", "localhost")}
    policy = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", policy)]
            await send(message)

        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin", b"http://" + headers.get(b"host", b"")).removeprefix(b"http://")
        if scope["type"] == "lifespan" or {headers.get(b"host"), origin} <= hosts:
            return await app(scope, receive, send_with_policy)
        await fastapi.Response("not from here", 403)(scope, receive, send)

    return guard


def serve(engine: Engine, work: Work, port: int, top: int) -> None:
    """The UI, on this machine alone, until it is interrupted."""
    desk, listening = Desk(engine, replace(work, update=True, rebuild=False, prune=False)), socket.socket()

    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name == "posix"))
        listening.bind(("127.0.0.1", port))
        listening.listen()  # who calls before it is ready, waits
    except OSError as error:
        raise DeepVisionError(f"port {port} cannot be had ({error.strerror}): choose another with --port") from error
    port = listening.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:  # of what is uploaded and shown
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = user_interface(desk, top)
        app = gradio.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None), page, "/", "127.0.0.1", port, footer_links=[], run_history=False,
            max_file_size=UPLOAD_BYTES, ssr_mode=False, enable_monitoring=False, show_error=True, css=UI_STYLE,
        )  # fmt: skip
        page.has_launched = True  # or Gradio would take any path on this machine for an uploaded one
        log.info("http://127.0.0.1:%d", port)
        config = uvicorn.Config(guarded(app, port), log_level="error", timeout_graceful_shutdown=1)
        with suppress(KeyboardInterrupt):  # the way to end it
            uvicorn.Server(config).run([listening])


# ---- Command line ----------------------------------------------------------------------------------------------------


def score_or_label(text: str) -> float | str:
    if text in LABELS:
        return text
    with suppress(ValueError):
        if -1 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a cosine similarity, -1 to 1, nor {', '.join(LABELS)}")


def check_combination(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    chosen = {"--duplicates": options.duplicates is not None, "--ui": options.ui, "--export": options.export}
    mode = next((option for option, given in chosen.items() if given), "--index-only" if options.index_only else None)
    if options.no_update and (options.index_only or options.rebuild or options.prune):
        parser.error("--no-update goes without --index-only, --rebuild and --prune")
    if options.queries and mode:
        parser.error(f"{mode} takes no QUERY: {options.queries[0]}")
    if options.ui and options.form != "text":
        parser.error("--ui prints nothing: leave out --json and --null")
    if options.port is not None and not options.ui:
        parser.error("--port is for --ui")
    if options.duplicates is not None and (options.threshold, options.top, options.views) != (-1.0, TOP, "auto"):
        parser.error("--duplicates goes without --threshold, --top and --views; a score is --duplicates S")
    if options.duplicates == "weak":
        parser.error("--duplicates weak: any two images are")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("queries", nargs="*", metavar="QUERY", help=f"image files or folders to search with (default: {QUERIES}/)")
    add("--images", default=IMAGES, metavar="DIR", help="the collection (default: %(default)s/)")
    add("--index-dir", default=INDEX_DIR, metavar="DIR", help="the cache (default: %(default)s/)")
    add("-k", "--top", type=int, default=TOP, metavar="N", help="matches per query (default: %(default)s)")
    below = "leave out matches below S: a cosine, -1 to 1, or similar, copy, identical"
    add("--threshold", type=score_or_label, default=-1.0, metavar="S", help=below)
    add("--views", choices=VIEWS, default="auto", help="edits of the query to see through (default: those that pay)")
    add("--model", metavar="NAME", help=f"{MODEL} (default), any torchvision classification model, timm:NAME, offline")
    add("--weights", metavar="NAME|FILE", help=f"torchvision weights (default: {WEIGHTS}) or a local file")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: %(default)s")
    add("--batch-size", type=int, metavar="N", help="images that the model takes at once (default: by device)")
    add("--workers", type=int, metavar="N", help="threads that read and decode (default: one a core)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--index-only", action="store_true", help="update the index, search nothing")
    alike = "groups of the same picture in the collection: a copy, by default, or of this cosine or label"
    mode.add_argument("--duplicates", type=score_or_label, nargs="?", const="copy", metavar="S", help=alike)
    mode.add_argument("--ui", action="store_true", help="search in the browser; needs Gradio")
    mode.add_argument("--export", metavar="DIR", help="features.npy and paths.txt, for any other vector database")
    add("--port", type=int, metavar="N", help=f"of --ui, on this machine alone (default: {PORT}; 0: any)")
    add("--no-update", action="store_true", help="search the index as it is, without a look at the collection")
    add("--exact", action="store_true", help="compare with every image, however many there are")
    add("--rebuild", action="store_true", help="start again from the images")
    add("--prune", action="store_true", help="forget files that are gone, and their features")
    form = parser.add_mutually_exclusive_group()
    add_form = partial(form.add_argument, dest="form", default="text", action="store_const")
    add_form("--json", const="json", help="one JSON object per query, a line each")
    add_form("--null", const="null", help="or -0: the paths found alone, each with a NUL at its end")
    page = parser.add_mutually_exclusive_group()
    page.add_argument("--report", default=REPORT, metavar="FILE", help="the page to look at (default: %(default)s)")
    page.add_argument("--no-report", dest="report", action="store_const", const=None, help="write no page")
    volume = parser.add_mutually_exclusive_group()
    add_level = partial(volume.add_argument, dest="level", default=logging.INFO, action="store_const")
    add_level("-q", "--quiet", const=logging.WARNING, help="warnings and errors alone")
    add_level("-v", "--verbose", const=logging.DEBUG, help="name the files that were skipped")
    # Were -0 an option to argparse, so would be the -0.5 of `--threshold -0.5`.
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_intermixed_args(["--null" if arg == "-0" else arg for arg in given])
    if options.port is not None and not 0 <= options.port < 65536:
        parser.error(f"--port takes a number from 0 to 65535, not {options.port}")
    if not (options.images and options.index_dir) or options.report == "":
        parser.error("--images and --index-dir take a folder, and --report a file")
    for option in ("top", "batch_size", "workers"):
        if (value := getattr(options, option)) is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} takes a whole number from 1 on, not {value}")
    check_combination(options, parser)
    return options


def find_queries(names: Iterable[str], onerror: Callable[[OSError], None]) -> Iterator[str]:
    """The files named, and those in the folders named."""
    for name in names:
        if os.path.isdir(name):
            for file in find_images(name, onerror):
                yield os.path.join(name, os.fsdecode(file.path))
        else:
            yield name


def rank_of_ranks() -> tuple[int, int]:
    """The number of this process among those that torchrun started, and how many they are."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ.get("RANK", 0)) % ranks, ranks


def answers(options: argparse.Namespace, engine: Engine, locked: list[OSError]) -> Iterator[Answer]:
    """An Answer for each query. `locked` gets the folders of queries that cannot be listed."""
    answered = False
    queries = find_queries(options.queries or filter(os.path.isdir, [QUERIES]), locked.append)
    for answer in search(queries, engine, k=options.top, threshold=options.threshold, views=options.views):
        if answer.error == NOT_AN_IMAGE and answer.query not in options.queries:
            continue  # some other file in a folder of queries
        answered = True
        if answer.error:
            log.error("%s: %s", shown(answer.query), answer.error)
        yield answer
    if not answered and not locked:
        where = ", ".join(options.queries) or f"{QUERIES}/"
        raise DeepVisionError(f"no image to search with in {where}: put one there, or name it: main.py photo.jpg")


def answer_at_once(options: argparse.Namespace, model: Model, work: Work) -> dict[str, list[Match]]:
    """On a terminal, what a large collection's index says as it is, printed before the files are looked through, which
    takes seconds: the matches of the first queries."""
    told = dict[str, list[Match]]()
    searching = not (options.index_only or options.export or options.ui or options.duplicates is not None)
    as_usual = work.update and not (work.rebuild or work.prune or work.exact or work.ranks > 1)
    features = Path(options.index_dir, model.identity, "features.bin")
    large = os.path.isfile(features) and os.path.getsize(features) > work.exact_bytes
    made = os.path.isfile(features.with_name("index.faiss"))
    if not (searching and as_usual and large and made and options.form == "text" and sys.stdout.isatty()):
        return told
    with suppress(DeepVisionError):  # what is wrong is said when all has been looked at
        given = options.images, options.index_dir
        engine = initialize_reverse_image_search(*given, model=model, work=replace(work, update=False))
        queries = find_queries(options.queries or filter(os.path.isdir, [QUERIES]), lambda error: None)
        asked = partial(search, engine=engine, k=options.top, threshold=options.threshold, views=options.views)
        for answer in itertools.chain.from_iterable(map(asked, itertools.islice(queries, TOGETHER))):
            if answer.matches:
                print_found(answer, engine, options.form)
                told[answer.query] = answer.matches
        engine.catalogue.close()
    if told:
        log.info("%s is looked through now; what that changes is printed again", shown(options.images))
    return told


def groups(options: argparse.Namespace, engine: Engine) -> Iterator[Group]:
    """The groups of --duplicates, and at their end a word of how many there are."""
    count = copies = 0
    for group in find_duplicates(engine, options.duplicates):
        count, copies = count + 1, copies + len(group.matches)
        yield group
    log.info("%s, %s beside those to keep", counted(count, "group"), counted(copies, "file"))


def write_export(engine: Engine, folder: str) -> None:
    try:
        with engine.catalogue.writing():  # nobody else, meanwhile
            count = engine.catalogue.export(Path(folder))
    except (OSError, sqlite3.Error) as error:
        raise DeepVisionError(f"--export {folder}: {first_line(error)}") from error
    log.info("%s: %d × %d features and their paths", shown(folder), count, engine.model.dim)


def run(options: argparse.Namespace) -> int:
    """The main job; its exit status."""
    if options.ui:
        find_gradio()  # or it would be missed when all is done
    model = load_model(options.model, options.weights, options.device)
    rank, ranks = rank_of_ranks()
    work = Work(
        options.batch_size, options.workers, options.rebuild, options.prune, not options.no_update, options.exact,
        rank=rank, ranks=ranks,
    )  # fmt: skip
    if ranks > 1:  # of torchrun
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=RANKS_WAIT))
    if rank:
        if work.update:
            read_share(options.images, options.index_dir, model, work)
        return 0
    told = answer_at_once(options, model, work)
    engine = initialize_reverse_image_search(options.images, options.index_dir, model=model, work=work)
    if not (work.update or engine.is_of_folder()):
        log.warning("%s has none of the first images that its index knows: is it the right folder?", options.images)
    done = f"{engine.summary.images:,} images, searched without a look at what has changed"
    done = str(engine.summary) if work.update else done
    log.info("%s: %s (%s on %s, %s)", options.images, done, model.name, model.device, model.precision)
    if engine.summary.recall is not None:
        how = "compact codes choose what is compared, recall@%d %.3f; --exact compares all"
        log.info(how, TOP, engine.summary.recall)
    listing = f"SELECT path, reason FROM {SKIPPED} ORDER BY path"
    for path, reason in engine.catalogue.db.execute(listing) if log.isEnabledFor(logging.DEBUG) else ():
        log.debug("skipped %s: %s", shown(os.path.join(options.images, os.fsdecode(path))), reason)
    if options.export:
        write_export(engine, options.export)
    if options.ui:
        serve(engine, work, PORT if options.port is None else options.port, options.top)
    if options.index_only or options.export or options.ui:
        return 0
    found, start = list[Answer | Group](), time.perf_counter()
    locked: list[OSError] = []
    for item in groups(options, engine) if options.duplicates is not None else answers(options, engine, locked):
        found.append(item)
        if told.get(item[0]) != item.matches:
            print_found(item, engine, options.form)
    for error in locked:
        log.error("%s cannot be listed (%s)", shown(os.fsdecode(error.filename)), error.strerror)
    if options.report:
        write_page(options.report, found, engine, time.perf_counter() - start)
        log.info("%s", shown(options.report))
    return 1 if locked or any(item.error for item in found) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 all queries answered, 1 something failed, 2 usage, 130 interrupted."""
    options = parse_arguments(argv)
    log.handlers = [logging.StreamHandler()]
    log.setLevel(options.level)
    if rank := rank_of_ranks()[0]:  # the first speaks for all
        log.handlers[0].setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
        log.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="tqdm:")  # has no memory for a thread of its own, and needs none
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow doubts is either read or skipped with a reason
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name that is not UTF-8 comes out byte for byte; what an older code page lacks, as an escape.
            utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
            sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
        return run(options)
    except (DeepVisionError, sqlite3.Error) as error:
        log.error("error: %s", error)
        return 1
    except (MemoryError, RuntimeError, ImportError) as error:
        if not (isinstance(error, MemoryError) or NO_MEMORY.search(str(error))):
            raise
        advice = "free some, or try --workers 1 and a small --batch-size"
        log.error("error: out of memory (%s): %s", first_line(error), advice)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted: what was done is saved, the next run goes on from there")
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def interrupt(*_: Any) -> None:
    """Work is saved. Who cannot wait for that, and sends another signal, has the process gone at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(130))
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    raise SystemExit(main())
