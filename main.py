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

images on disk → pixels → features → store → index → matches → terminal, JSON, page

Written: results.html, the page to look at, and in image_index/<model>/
    index.sqlite    the store: the files of the collection and their features, one SQLite database
    index.faiss     the FAISS index over the features; made again from the store whenever it does not fit
    lock            held by the one run that writes
"""

from __future__ import annotations

import argparse
import base64
import difflib
import errno
import faulthandler
import fnmatch
import hashlib
import html
import http.client
import importlib.util
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
import urllib.request
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    import faiss
    import filelock
    import jinja2
    import numpy as np
    import torch
    import torchvision
    import tqdm
    from PIL import Image, ImageCms, ImageDraw, ImageOps

    fastapi: Any
    gradio: Any
    uvicorn: Any
else:

    class Lazy:
        """A module that is imported when it is first used: torch takes seconds, `--help` and usage errors must not."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            try:
                value = getattr(importlib.import_module(self._name), attribute)
                setattr(self, attribute, value)
                return value
            except ModuleNotFoundError as error:
                raise DeepVisionError(f"{error}: to install it, run `pip install -r requirements.txt`") from error

    faiss, np, torch, torchvision, tqdm = map(Lazy, ("faiss", "numpy", "torch", "torchvision", "tqdm"))
    Image, ImageCms = map(Lazy, ("PIL.Image", "PIL.ImageCms"))
    ImageDraw, ImageOps = map(Lazy, ("PIL.ImageDraw", "PIL.ImageOps"))
    filelock, jinja2 = map(Lazy, ("filelock", "jinja2"))  # torch requires them, so they are there
    gradio, fastapi, uvicorn = map(Lazy, ("gradio", "fastapi", "uvicorn"))  # only after `import_gradio`

# The defaults that an option changes
IMAGES = "bulk_images"  # --images
QUERIES = "that_one_image"  # QUERY
INDEX_DIR = "image_index"  # --index-dir
REPORT = "results.html"  # --report
PORT = 7860  # --port, of --ui
TOP = 10  # --top; matches a query
MODEL = "resnet50"  # --model
WEIGHTS = "IMAGENET1K_V1"  # --weights; V2 is worse for retrieval: https://github.com/pytorch/vision/issues/8382
OFFLINE = "offline"  # --model offline: the built-in descriptor, which needs no weights
VIEWS = ("none", "auto", "all")  # --views
COPIES = "copies"  # the views that --duplicates looks for copies with
LABELS = ("copy", "identical")  # --threshold and --duplicates

log = logging.getLogger("deepvision")


# ---- Types and errors ------------------------------------------------------------------------------------------------


class DeepVisionError(Exception):
    """What went wrong, where, and what to do about it, in one line."""


class DamageError(Exception):
    """The store does not hold what was written to it. It is repaired, and the work starts again."""


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 file", "2,000 files"."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def escape_controls(text: str) -> str:
    """The text with control and direction characters as escapes, so that no file name can steer a terminal."""
    unsafe = ("Cc", "Cf", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in unsafe else c for c in text)


class File(NamedTuple):
    """A file of the collection, as a scan finds it."""

    path: bytes  # relative to the collection
    size: int  # bytes
    mtime: int  # nanoseconds; -1: read the file again at the next update

    @staticmethod
    def of(path: bytes, info: os.stat_result) -> File:
        """The file as `os.stat` describes it. A time after the year 2262 does not fit SQLite's 64 bits: it wraps."""
        return File(path, info.st_size, info.st_mtime_ns % 2**63)


class Picture(NamedTuple):
    """A file that was read, with all that came of it. It travels whole, so that rows and paths never part."""

    file: File
    digest: bytes | None = None  # hash of the content; None: not a usable image
    pixels: Any = None  # what the transform made of the image; None: its features are known already
    vector: np.ndarray | None = None  # features, fp16 (dim,)
    reason: str | None = None  # why the image cannot be used; None also for a file that was never meant as an image
    vanished: bool = False  # the file went away or changed while it was read


class View(NamedTuple):
    """A query as it may have looked before an edit."""

    name: str  # the edit that is undone; empty: the query as it is
    pixels: torch.Tensor  # uint8 (3, side, side); smaller for a part of a larger picture
    top: int = 0  # where that part lies in the larger picture, in pixels of the model's side
    left: int = 0


class Region(NamedTuple):
    """Where a copy was found."""

    corners: list[tuple[float, float]]  # the query's, from the top left clockwise, in pixels of the upright match
    outline: list[tuple[float, float]]  # the match's, in the same order, in pixels of the upright query
    points: int  # local features that agree
    covers: float  # share of the match's area that is seen in the query, 0 to 1


class Match(NamedTuple):
    rank: int  # from 1
    path: str
    score: float  # cosine similarity, -1 to 1, of the best view of the query
    identical: bool  # the same bytes as the query
    label: str = ""  # identical, copy or empty
    view: str = ""  # the best view of the query; of --duplicates: what the file is to the one to keep
    region: Region | None = None  # of a copy


class Answer(NamedTuple):
    """What was found for a query."""

    query: str  # as it was given
    matches: list[Match]
    error: str | None = None
    file: str = ""  # where its picture lies; empty: `query` is a path


class Group(NamedTuple):
    """Files that hold the same picture."""

    keep: str  # the file with most pixels, then most bytes
    matches: list[Match]  # the other files, compared with that one
    error: None = None  # so that a Group can be printed as an Answer is


@dataclass(frozen=True)
class Model:
    """A network that turns pixels, uint8 (B, 3, side, side), into features, float32 (B, dim)."""

    name: str
    identity: str  # name, hash of the weights, preprocessing, dimension: the name of its folder in the index
    side: int  # pixels
    dim: int
    device: str
    network: Callable[..., torch.Tensor]
    batch: int = 32  # images at once
    resample: str = "bilinear"
    precision: str = "fp32"


@dataclass(frozen=True)
class Work:
    """The options of an update and of a search."""

    batch_size: int | None = None  # images; None: by model and device
    workers: int | None = None  # threads that read and decode; None: one a core
    rebuild: bool = False  # extract the features of all images again
    prune: bool = False  # forget the files that are gone
    update: bool = True  # look for what is new, changed or gone in the collection
    exact: bool = False  # compare with every vector, however many there are
    exact_bytes: int = 1 << 28  # of vectors; more are searched by compact codes, or the first answer takes over 0.5 s
    exclude: tuple[str, ...] = ()  # patterns of paths, relative to the collection, that are passed over
    rank: int = 0  # of this process, among `ranks` that torchrun started; rank 0 commits
    ranks: int = 1

    def is_mine(self, file: File) -> bool:
        """Whether this rank reads the file. The answer depends on the path alone."""
        return zlib.crc32(file.path) % self.ranks == self.rank


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
    seconds: float = 0.0  # of reading and of the model; 0: the ranks of torchrun have read
    recall: float | None = None  # share of the true nearest that the compact codes find; None: the search is exact

    def add(self, pictures: Sequence[Picture]) -> None:
        usable = [picture for picture in pictures if picture.digest and not picture.vanished]
        self.opened += len(pictures)
        self.new += len(usable)
        self.recognised += sum(picture.vector is None for picture in usable)

    def __str__(self) -> str:
        known = f" ({self.recognised:,} recognised by content)" if self.recognised else ""
        pruned = f", {self.forgotten:,} forgotten" if self.forgotten else ""
        rate = f"{self.opened / self.seconds:,.1f} images/s" if self.seconds else "read by all ranks"
        return (
            f"{self.images + self.skipped:,} found, {self.new:,} new{known}, {self.images - self.new:,} unchanged, "
            f"{self.skipped:,} skipped, {self.gone:,} gone{pruned}; {rate if self.opened else 'no image was opened'}"
        )


# ---- Images ----------------------------------------------------------------------------------------------------------

NOT_AN_IMAGE = "not an image"  # the reason given for a query that was never meant as one
MAX_PIXELS = 100_000_000  # pixels to decode, after JPEG scaling: 0.4 GB in memory; phones reach 200 million in JPEG
COSTLY_FORMATS = {"WEBP", "JPEG2000"}  # their decoders hold an image four times: half of MAX_PIXELS is their limit
LARGE_PIXELS = 24_000_000  # pixels; larger images are decoded one at a time, which bounds memory
DRAFT_SCALE = 3  # times the model's side: a JPEG is decoded no smaller; with 2, thin stripes come out differently
DIGEST_BYTES = 16  # bytes of the SHA-256 that identifies a content
PREPROCESSING = 2  # version, part of a model's identity; raise it when the same file would get other pixels
PASSED_OVER = {b"@eadir", b"thumbs.db", b"desktop.ini", b"$recycle.bin", b"system volume information", b"__macosx"}
NOT_DECODED = {"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "FTEX"}  # EPS starts Ghostscript; Pillow cannot read the others

OnError = Callable[[OSError], None]
one_large_image = threading.Lock()


def find_images(
    folder: str | Path, onerror: OnError, without: Sequence[str | Path] = (), exclude: Sequence[str] = ()
) -> Iterator[File]:
    """Every file below `folder` that may be an image, folder by folder, by name. No folder is listed twice.

    onerror is called for what cannot be listed. Folders in `without`, and relative paths that fit one of the shell
    patterns in `exclude`, are left out. Links are followed.
    """
    root, separator = os.fsencode(folder), os.fsencode(os.sep)
    visited = {os.stat(path)[1:3] for path in without}  # inode and device
    folders = [b""]  # relative to the root; the list grows while the loop goes through it
    for above in folders:
        try:
            here = os.path.join(root, above)
            if (identity := os.stat(here)[1:3]) in visited:
                continue
            visited.add(identity)
            entries = sorted(os.scandir(here), key=operator.attrgetter("name"))
        except OSError as error:
            onerror(error)
            continue
        for entry in entries:
            path, name = above + entry.name, entry.name.lower()
            is_excluded = any(fnmatch.fnmatch(os.fsdecode(path), pattern) for pattern in exclude)
            if is_excluded or name.startswith(b".") or name in PASSED_OVER:
                continue
            try:
                if entry.is_dir():
                    folders.append(path + separator)
                else:
                    yield File.of(path, entry.stat())
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):  # a broken link, or a file that is gone by now
                    onerror(error)


@cache
def image_formats() -> tuple[list[str], set[str], str]:
    """The formats that can be decoded here, the suffixes of their file names, and the version of the decoders."""
    Image.init()
    # Pillow refuses headers of more than twice this. Setting it on `Image`, a Lazy, would not reach Pillow's module.
    vars(sys.modules["PIL.Image"])["MAX_IMAGE_PIXELS"] = MAX_PIXELS
    version = Image.__version__
    with suppress(ImportError):
        heif = importlib.import_module("pillow_heif")
        heif.register_heif_opener()
        version += f", pillow_heif {heif.__version__}"
    formats = [name for name in Image.ID if name not in NOT_DECODED]
    return formats, {suffix for suffix, name in Image.registered_extensions().items() if name in formats}, version


def open_image(stream: BinaryIO, path: str) -> Image.Image | None:
    """The image in `stream`, with only its header read. None for a file that was never meant to be an image."""
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
            raise ValueError("broken, or no image at all" if stream.seek(0, 2) else "an empty file") from None
        return None


def content_hash(stream: BinaryIO) -> bytes:
    """The first bytes of the SHA-256 of the whole file. The position is kept: Pillow reads on from there."""
    position, sha = stream.tell(), hashlib.sha256()
    stream.seek(0)
    while chunk := stream.read(1 << 20):
        sha.update(chunk)
    stream.seek(position)
    return sha.digest()[:DIGEST_BYTES]


def read_picture(
    file: File, root: bytes, transform: Callable[[Image.Image], Any], known: Callable[[bytes], bool] = lambda _: False
) -> Picture:
    """The file's hash, and what `transform` makes of its image if the hash is not `known`; or why it is not usable."""
    path = os.path.join(root, file.path)
    try:
        info = os.stat(path)
        file = File.of(file.path, info)
        if not stat.S_ISREG(info.st_mode):
            return Picture(file, reason="not a regular file")  # opening a FIFO would wait for a writer forever
        with open(path, "rb") as stream:
            if (image := open_image(stream, os.fsdecode(path))) is None:
                return Picture(file)
            digest = content_hash(stream)
            pixels = None if known(digest) else transform(image)
        return Picture(file, digest, pixels, vanished=file != File.of(file.path, os.stat(path)))
    except sqlite3.Error:
        raise  # from `known`: the database failed, not the file
    except Exception as error:  # decoders raise anything at all on a malformed file
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            file = file._replace(mtime=-1)  # perhaps the machine failed and not the file: try again next time
        reason = escape_controls(getattr(error, "strerror", None) or first_line(error))
        return Picture(file, reason=reason, vanished=isinstance(error, FileNotFoundError))


def to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits (I;16, I) or floating point (F) in 8 bits. Pillow itself would clip the values."""
    values = np.array(image, np.float32)
    values[~np.isfinite(values)] = 0
    is_clear = values == image.info.get("transparency", math.nan)
    low, high = min(0.0, float(values.min())), float(values.max())
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)  # the usual values of white
    white = next((scale for scale in scales if high <= scale), high)
    values -= low
    values *= 255 / (white - low)
    values += 0.5
    levels = values.astype(np.uint8)
    levels[is_clear] = 255
    return Image.fromarray(levels)


def to_rgb(image: Image.Image, side: int) -> Image.Image:
    """The first frame, upright, in 8-bit RGB, transparency over white. A JPEG may come smaller, but never smaller than
    a model of this `side` needs."""
    image.draft(None, (DRAFT_SCALE * side, DRAFT_SCALE * side))
    limit = MAX_PIXELS // 2 if image.format in COSTLY_FORMATS else MAX_PIXELS
    if (count := image.width * image.height) > limit:
        raise ValueError(f"too large: {count:,} pixels, over {limit:,}")
    with one_large_image if count > LARGE_PIXELS else nullcontext():
        image.load()
        with suppress(Exception):  # malformed EXIF raises anything at all; the image then stays as it is
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            image = to_8_bits(image)
        if image.mode == "LAB":
            lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
        elif image.has_transparency_data:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")


def usable_cores() -> int:
    """The number of cores for this process. torchrun's processes on one machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def read_ahead(read: Callable[[Any], Any], files: Iterable[Any], workers: int, ahead: int) -> Iterator[Any]:
    """`read(file)` for each file, in order, computed by `workers` threads. At most `ahead` results wait."""
    threads, pending = ThreadPoolExecutor(workers), deque[Future[Any]]()
    try:
        for file in files:
            pending.append(threads.submit(read, file))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


# ---- Descriptor ------------------------------------------------------------------------------------------------------

OFFLINE_SIDE = 96  # pixels; 128 gains nothing, 64 costs 1 point of recall
EDGE_CELLS, COLOUR_CELLS = 8, 4  # a side; fewer for the edges lose small crops, more lose a turn by 10 degrees
DIRECTIONS = 16  # of an edge, dark-to-light told from light-to-dark
SHARPNESS = 5  # how often the cosine is squared; a direction then responds to edges up to the next direction
EDGE_POWER = 0.3  # of the counts: a strong edge says little more than a weak one
ORDERS = (0.5, 1.0, 1.0, 1.3, 1.3, 1.7, 1.7)  # weight of each Fourier order over the directions
BRIGHTNESS_WEIGHT, HUE_WEIGHT, MEAN_WEIGHT = 0.2, 0.3, 0.02  # of the colours, where the edges have 1
LEAST_COSINE, TINY = 0.25, 1e-12  # less counts as this, and a weight as 0: denormal numbers took half of the time
FAINT = 100.0  # a part of a lesser norm is noise (a photograph's is 200 and more) and stays small
OPPONENT = ((0.299, 0.587, 0.114), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0))  # brightness, red-green, yellow-blue


@cache
def cell_grid(cells: int, top: int, left: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    """Gaussian weights of the rows, (cells, height), and columns, (width, cells), of a rectangle in each cell; and how
    much of each cell lies inside the rectangle, (cells, cells)."""
    distance = (torch.arange(OFFLINE_SIDE) + 0.5) * cells / OFFLINE_SIDE - (torch.arange(cells)[:, None] + 0.5)
    weights = torch.exp(-2 * distance**2)  # sigma is half a cell
    weights = torch.where(weights > TINY, weights / weights.sum(1, keepdim=True), 0)
    rows, columns = weights[:, top : top + height], weights[:, left : left + width]
    return rows.contiguous(), columns.T.contiguous(), rows.sum(1)[:, None] * columns.sum(1)


@cache
def fourier() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosine and sine of each direction, (DIRECTIONS, 1, 1), and a matrix that turns values by direction into weighted
    Fourier coefficients, (DIRECTIONS, 2 * len(ORDERS) - 1)."""
    phase = 2 * math.pi / DIRECTIONS * torch.arange(DIRECTIONS)[:, None] * torch.arange(len(ORDERS))
    cosine, sine = phase.cos(), phase.sin()
    even, odd = torch.tensor(ORDERS) * cosine, torch.tensor(ORDERS) * sine
    matrix = torch.cat([even[:, :1] / math.sqrt(2), even[:, 1:], odd[:, 1:]], 1)
    return cosine[:, 1, None, None], sine[:, 1, None, None], matrix


@cache
def cosine_transform(cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix of a cosine transform, and a weight of each coefficient: most of a picture is in low frequencies."""
    k = torch.arange(cells, dtype=torch.float32)
    cosines = torch.cos(math.pi / cells * k[:, None] * (k + 0.5))
    cosines[0] /= math.sqrt(2)
    return cosines, 1 + torch.hypot(k[:, None], k)


def cell_means(planes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The mean of the planes (..., h, w) in each cell, (..., cells, cells), of its part inside the pixels."""
    return rows @ planes @ columns / (inside + 1e-9)


def edge_strengths(light: torch.Tensor) -> torch.Tensor:
    """The strength of the edge at each pixel in each direction, (B, DIRECTIONS, h, w), of brightness (B, 1, h, w)."""
    framed = torch.nn.functional.pad(light, (1, 1, 1, 1), mode="replicate")
    dx, dy = framed[..., 1:-1, 2:] - framed[..., 1:-1, :-2], framed[..., 2:, 1:-1] - framed[..., :-2, 1:-1]
    slope = torch.hypot(dx, dy) + 1e-3  # of 255: no division by 0 where it is flat
    root = slope
    for _ in range(SHARPNESS):
        root = root.sqrt()
    cosine, sine, _ = fourier()
    strength = (dx * root / slope * cosine).addcmul_(dy * root / slope, sine).clamp_(min=LEAST_COSINE)
    for _ in range(SHARPNESS):
        strength.square_()  # a power would take twice as long
    return strength


def whiten(maps: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Maps (B, c, cells, cells) less their mean as weighted cosine coefficients, (B, c, cells² - 1)."""
    maps = (maps - (maps * inside).sum((2, 3), keepdim=True) / inside.sum()) * inside
    cosines, weight = cosine_transform(len(inside))
    return (cosines @ (maps @ cosines.T) * weight).flatten(2)[:, :, 1:]


def describe(pixels: torch.Tensor, top: int = 0, left: int = 0) -> torch.Tensor:
    """A vector that needs no weights and no training, from uint8 (B, 3, side, side) to float32 (B, dim).

    Directions of brightness edges, counted in soft cells as in HOG (Dalal & Triggs, CVPR 2005) and compressed by a
    power, and a layout of the colours. Both are whitened by a fixed rule, so that unrelated pictures score near 0: the
    mean is removed, cells and directions are transformed, and what is strong in every picture gets a low weight.

    A smaller rectangle stands for the part at (top, left) of a picture whose rest is unknown.
    """
    normalize = torch.nn.functional.normalize
    planes = torch.einsum("oc,bcyx->boyx", torch.tensor(OPPONENT), pixels.float())
    edge_grid, colour_grid = (cell_grid(cells, top, left, *pixels.shape[2:]) for cells in (EDGE_CELLS, COLOUR_CELLS))
    counts = cell_means(edge_strengths(planes[:, :1]), *edge_grid)
    edges = whiten(torch.einsum("bdyx,do->boyx", counts**EDGE_POWER, fourier()[2]), edge_grid[2])
    colours = whiten(cell_means(planes, *colour_grid), colour_grid[2])
    mean = planes.mean((2, 3)) / 255  # nearly nothing, but all that a blank picture has
    weighted = (1.0, edges), (BRIGHTNESS_WEIGHT, colours[:, :1]), (HUE_WEIGHT, colours[:, 1:])
    parts = [weight * normalize(part.flatten(1), eps=FAINT) for weight, part in weighted]
    return torch.cat([*parts, MEAN_WEIGHT * mean, torch.full_like(mean[:, :1], MEAN_WEIGHT)], 1)


def offline_model() -> Model:
    """The built-in descriptor, a model like any other. It runs on the CPU, where the threads that read compute it."""
    dim = (2 * len(ORDERS) - 1) * (EDGE_CELLS**2 - 1) + 3 * (COLOUR_CELLS**2 - 1) + 4
    return Model(OFFLINE, f"{OFFLINE}-v1-p{PREPROCESSING}-{dim}", OFFLINE_SIDE, dim, "cpu", describe, batch=4)


# ---- Model -----------------------------------------------------------------------------------------------------------

# The file of MODEL's WEIGHTS, so that torchvision is only imported (1.2 s) once this file is there
WEIGHTS_URL = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
CONNECT_SECONDS = 10  # seconds; torch.hub has no timeout, and would hang for minutes if the network drops packets
SIDE = 224  # pixels; the side of ResNet50's input
REDUCING_GAP = 32.0  # Image.resize(reducing_gap=): huge images are box-averaged first, which bounds memory
GPU_BATCH = {"cuda": 256, "mps": 64}  # images at once
CPU_BATCH_PER_CORE, CPU_BATCH_MOST = 4, 32  # images at once; with 4 for each core, a layer's output stays in its cache
MIN_COSINE = 0.999  # of a fast network's features with those of the plain one in fp32; if less, the plain one stays
AHEAD_BATCHES, AHEAD_MOST = 4, 1024  # batches that are decoded ahead of the model, and how many files that is at most
Recipe = tuple[int, Sequence[float], Sequence[float], str]  # side, mean and deviation of each channel, resampling


def load_weights(network: torch.nn.Module, path: str | Path, *heads: str) -> None:
    """Load a file's tensors into a network whose classifier, `heads`, was removed. Nothing is left untrained.

    The tensors are plain, wrapped as `state_dict`, or saved as `module.` by several GPUs.
    """
    unused = (*(f"{head}." for head in heads), "aux1.", "aux2.", "AuxLogits.")  # aux: classifiers for training alone
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        for key in list(state):  # changed in place: its attribute `_metadata` tells old layouts from new ones
            value, name = state.pop(key), key.removeprefix("module.")
            name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name)  # DenseNet's old names
            if not name.startswith(unused):
                state[name] = value
        network.load_state_dict(state, assign=True)
    except Exception as error:  # a file that holds something else raises anything at all
        reason = " ".join(str(error).split()).partition(". ")[0]  # torch goes on with advice to load the file unsafely
        advice = "if it was downloaded, delete it and try again"
        raise DeepVisionError(f"{path} does not hold the weights of this model: {reason[:500]}; {advice}") from error
    network.float()


def one_kernel(layer: Any, then: str) -> Callable[..., torch.Tensor]:
    """A function that computes a convolution, the sum with a second tensor if one is given, and "relu" or "none"."""
    geometry, kernels = (layer.padding, layer.stride, layer.dilation, layer.groups), torch.ops.mkldnn

    @cache
    def weight(*shape: int) -> torch.Tensor:
        """The weights in the order in which the kernel reads them."""
        return kernels._reorder_convolution_weight(layer.weight, *geometry, shape)

    def compute(x: torch.Tensor, *other: torch.Tensor) -> torch.Tensor:
        args = (*other, weight(1, *x.shape[1:]), layer.bias, *geometry)
        if other:
            return kernels._convolution_pointwise.binary(x, *args, "add", 1.0, then, [], None)
        return kernels._convolution_pointwise.default(x, *args, then, [], "")

    return compute


def fuse_convolutions(network: torch.fx.GraphModule) -> None:
    """Compute each convolution, the sum after it and the ReLU after that by one kernel, whatever the batch size.

    torch.compile does the same. It is 5 % faster still, but takes 17 s to start.
    """
    graph, relu, add = network.graph, (torch.nn.functional.relu, torch.relu), (operator.add, operator.iadd, torch.add)
    layers = {node: network.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    convolutions = [node for node, layer in layers.items() if isinstance(layer, torch.nn.Conv2d)]
    for last in list(reversed(graph.nodes)):
        convolution, addends, then = last, list[Any](), "none"
        if isinstance(layers.get(last), torch.nn.ReLU) or last.target in relu:
            convolution, then = last.args[0], "relu"
            if convolution.target in add and len(convolution.users) == 1:
                *addends, convolution = sorted(convolution.args, key=convolutions.__contains__)
        if convolution in convolutions and (convolution is last or len(convolution.users) == 1):
            with graph.inserting_before(last):
                kernel = one_kernel(layers[convolution], then)
                last.replace_all_uses_with(graph.call_function(kernel, (*convolution.args, *addends)))
            graph.erase_node(last)
    graph.eliminate_dead_code()
    network.recompile()


def forward(
    pixels: torch.Tensor, network: Callable[..., Any], dtype: torch.dtype, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Features, float32 (B, dim), that the network, in this precision, makes of pixels, uint8 (B, 3, side, side)."""
    scaled = (pixels.contiguous(memory_format=torch.channels_last).float() / 255 - mean) / std
    return network(scaled.to(dtype)).float().flatten(1)


def fused(plain: partial[torch.Tensor], dtype: torch.dtype, device: str) -> partial[torch.Tensor]:
    """`plain`, which is `forward`, in this precision and with layers fused."""
    fold_batch_norms = importlib.import_module("torch.fx.experimental.optimization").fuse
    with one_torch_thread():
        network = fold_batch_norms(plain.keywords["network"]).to(dtype).to(memory_format=torch.channels_last)
    if device == "cpu" and torch.backends.mkldnn.is_available():
        fuse_convolutions(network)
    return partial(plain, network=network, dtype=dtype)


def fastest_form(plain: partial[torch.Tensor], sample: torch.Tensor, note: Path) -> tuple[partial[torch.Tensor], int]:
    """The fastest form of `plain`, which is `forward` in fp32, that keeps the features of `sample`; their dimension.

    It is found by trying, which takes half a second for ResNet50. The file `note` remembers it for this machine.
    """
    device, dtypes = sample.device.type, {"fp16": torch.float16, "fp32": torch.float32}
    if device == "cpu":  # emulated bf16 takes four times as long as fp32
        native = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtypes = {**({"bf16": torch.bfloat16} if native else {}), "fp32": torch.float32}
    machine = [torch.__version__, device, torch.backends.cpu.get_cpu_capability(), *dtypes]
    with suppress(Exception):  # there is no note, or a damaged one
        *tried_on, form, dim = json.loads(note.read_text())
        if tried_on == machine:
            return fused(plain, dtypes[form], device), dim
    expected = plain(sample)
    for form, dtype in dtypes.items():
        with suppress(Exception):  # a network that looks at its pixels cannot be fused, and raises anything at all
            fast = fused(plain, dtype, device)
            if torch.cosine_similarity(fast(sample), expected).min() >= MIN_COSINE:
                with suppress(OSError):
                    note.parent.mkdir(parents=True, exist_ok=True)
                    note.write_text(json.dumps([*machine, form, expected.shape[1]]))
                return fast, expected.shape[1]
    return plain, expected.shape[1]


def assemble_model(name: str, network: torch.nn.Module, recipe: Recipe, device: str) -> Model:
    """A Model around the network. It computes in the fastest form that gives the features of the network in fp32."""
    side, mean, std, resample = recipe
    sha = hashlib.sha256(repr((side, *mean, *std, resample)).encode())
    for key, value in sorted(network.state_dict().items()):
        sha.update(key.encode() + value.numpy().tobytes())
    identity = re.sub(r"[^\w.-]", "-", f"{name}-{sha.hexdigest()[:8]}-p{PREPROCESSING}")
    network = network.eval().to(device).to(memory_format=torch.channels_last)
    centre, spread = (torch.tensor(list(values), device=device).view(3, 1, 1) for values in (mean, std))
    noise = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    sample = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 255).byte().to(device)
    with torch.inference_mode():
        plain = partial(forward, network=network, dtype=torch.float32, mean=centre, std=spread)
        fast, dim = fastest_form(plain, sample, Path(torch.hub.get_dir(), f"{identity}.json"))
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(fast.keywords["dtype"], "fp32")
    batch = GPU_BATCH.get(device) or min(CPU_BATCH_PER_CORE * usable_cores(), CPU_BATCH_MOST)
    return Model(name, f"{identity}-{dim}", side, dim, device, fast, batch, resample, precision)


def timm_model(name: str, weights: str | Path | None, device: str) -> Model:
    """A model of the timm library, which keeps its weights in the Hugging Face cache."""
    try:
        timm = importlib.import_module("timm")
        network = timm.create_model(name.removeprefix("timm:"), pretrained=weights is None, num_classes=0)
    except ImportError as error:
        raise DeepVisionError(f"--model {name} needs timm: run `pip install timm`") from error
    except (OSError, RuntimeError, ValueError) as error:  # no such model, or its weights cannot be had
        raise DeepVisionError(f"--model {name}: {first_line(error)}") from error
    if weights is not None:
        heads = network.pretrained_cfg["classifier"]
        load_weights(network, weights, *([heads] if isinstance(heads, str) else heads))
    config = timm.data.resolve_model_data_config(network)
    recipe = config["input_size"][1], config["mean"], config["std"], config["interpolation"]
    return assemble_model(name, network, recipe, device)


def downloaded(url: str, name: str) -> Path:
    """The file of `url` in torch's own cache, downloaded and hash-checked if need be; or a ConnectionError."""
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
    """A classification model of torchvision without its classifier. `weights`: a file, or a name of torchvision's."""
    models = torchvision.models
    names = models.list_models(module=models)
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, [*names, OFFLINE], n=4, cutoff=0.5))
        raise DeepVisionError(f"--model {name}: no such model{near and f'; did you mean {near}?'}")
    listed = models.get_model_weights(name).__members__
    by_file = {Path(entry.url).name: entry for entry in listed.values()}  # a copy of such a file gets the same pixels
    entry = {**by_file, **listed}.get(Path(weights or WEIGHTS).name, listed["DEFAULT"])
    if weights is None or str(weights) in listed:
        weights = downloaded(entry.url, name)
    elif not Path(weights).is_file():
        raise DeepVisionError(f"--weights {weights}: no such file, nor weights of {name} ({', '.join(listed)})")
    options: dict[str, Any] = {}  # those that torchvision itself sets for models with weights
    if name in ("googlenet", "inception_v3"):
        options = {"transform_input": True, "init_weights": False, "aux_logits": False}
    elif name.startswith("vit_"):
        options = {"image_size": entry.meta["min_size"][0]}
    # Drawing weights at random would take 0.2 s for ResNet50. RegNet computes its widths with tensors.
    with nullcontext() if name.startswith("regnet") else torch.device("meta"):
        network = models.get_model(name, weights=None, **options)
    layers = torch.nn.Linear, torch.nn.Conv2d
    *_, head = (name for name, layer in network.named_modules() if isinstance(layer, layers))  # gives the classes
    network.set_submodule(head, torch.nn.Identity())
    load_weights(network, weights, head)
    preset = entry.transforms()
    recipe = preset.crop_size[0], preset.mean, preset.std, preset.interpolation.value
    return assemble_model(name, network, recipe, device)


def choose_device(device: str) -> str:
    """cpu, cuda or mps; for `auto` the GPU if there is one. Raises DeepVisionError for a device that is not there."""
    reason = ""
    if device in ("auto", "cuda"):
        try:  # only use shows a driver that does not fit torch
            torch.ones(1, device="cuda").sum().item()
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
            reason = first_line(error).partition(". ")[0]
    there = {"cuda": not reason, "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(kind for kind in there if there[kind])
        if device == "cpu" and (shutil.which("nvidia-smi") or os.path.exists("/dev/nvidia0")):
            log.warning("there is a GPU, but torch %s cannot use it: %s", torch.__version__, reason)
    elif not there[device]:
        raise DeepVisionError(f"--device {device}: torch finds none here, try --device auto{reason and f' ({reason})'}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.set_float32_matmul_precision("high")  # TF32 where fp16 is not used
    return device


def load_model(name: str | None = None, weights: str | Path | None = None, device: str = "auto") -> Model:
    """The network that turns pixels into features, its classifier removed.

    name     resnet50, any classification model of torchvision, timm:NAME, or offline. By default resnet50, and where
             its weights cannot be had, offline, with a warning
    weights  the name of torchvision weights (IMAGENET1K_V1), hash-checked when downloaded, or a local file of tensors
    device   auto, cpu, cuda or mps; offline runs on the CPU

    Raises DeepVisionError for an unknown name or device, and for weights that are missing, corrupt or do not fit.
    """
    torch_threads()
    device = choose_device(device)
    if name == OFFLINE and weights:
        raise DeepVisionError(f"--weights {weights}: --model offline takes no weights, leave one out")
    if name == OFFLINE:
        return offline_model()
    try:
        if name and name.startswith("timm:"):
            return timm_model(name, weights, device)
        if name or weights:
            return torchvision_model(name or MODEL, weights, device)
        return torchvision_model(MODEL, downloaded(WEIGHTS_URL, MODEL), device)
    except ConnectionError as error:
        if name or weights:
            raise DeepVisionError(f"{error}; connect to the internet once, or give --weights FILE") from error
        what = "it finds copies, edits, and similar layouts and colours, but does not recognise what a picture shows"
        ways = f"To use {MODEL}, go online once or give --weights FILE. To hide this, give --model offline"
        log.warning("%s. The built-in offline descriptor is used instead: %s. %s", error, what, ways)
        return offline_model()


def squeeze(image: Image.Image, width: int, height: int, resample: str) -> torch.Tensor:
    """An RGB image as uint8 (3, height, width)."""
    resized = image.resize((width, height), Image.Resampling[resample.upper()], reducing_gap=REDUCING_GAP)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def get_transform(side: int = SIDE, resample: str = "bilinear") -> Callable[[Image.Image], torch.Tensor]:
    """A function from any Pillow image to the pixels of `model.side` and `model.resample`, uint8 (3, side, side).

    The whole picture is squeezed into a square: a crop of its centre would lose what stands at the edges.
    """
    return lambda image: squeeze(to_rgb(image, side), side, side, resample)


@cache
def torch_threads() -> int:
    """The number of threads that torch computes with, before anything changes it: `load_model` asks first."""
    return torch.get_num_threads()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Have torch compute small operations with one thread: more take up to five times as long on a busy machine."""
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads())


def launch(pixels: torch.Tensor, model: Model, size: int, *where: int) -> tuple[torch.Tensor, int]:
    """Run the model on `size` images at once, or less if the GPU's memory is short: the features (B, dim), each of
    length 1, and the size that fitted. A GPU may still be computing. `where`: top and left of `describe`."""
    pixels = pixels.pin_memory() if model.device == "cuda" else pixels
    while True:
        try:
            with torch.inference_mode(), one_torch_thread() if model.network is describe else nullcontext():
                parts = (part.to(model.device, non_blocking=True) for part in pixels.split(size))
                found = [torch.nn.functional.normalize(model.network(part, *where)) for part in parts]
                return torch.cat(found), size
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise DeepVisionError(f"the GPU has too little memory for {model.name}: try --device cpu") from error
        size = (size + 1) // 2
        log.warning("the GPU has too little memory: the batch size is reduced to %d images", size)


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
        image_formats()  # from here on, Pillow opens HEIC as well
        opened = (image if isinstance(image, Image.Image) else Image.open(image) for image in images)
        images = torch.stack([get_transform(model.side, model.resample)(image) for image in opened])
    if images.shape[1:] != (3, model.side, model.side):
        raise ValueError(f"pixels are {tuple(images.shape[1:])}, {model.name} takes (3, {model.side}, {model.side})")
    return launch(images, model, model.batch)[0].cpu().numpy()


def with_features(pictures: Iterator[Picture], model: Model, size: int) -> Iterator[list[Picture]]:
    """The pictures with their features, `size` at a time and in order.

    A GPU is given the next batch before the features of the last one are awaited.
    """
    under_way: deque[tuple[list[Picture], torch.Tensor]] = deque()
    while (batch := list(itertools.islice(pictures, size))) or under_way:
        if batch:
            pixels = [picture.pixels for picture in batch if picture.pixels is not None]
            found, size = launch(torch.stack(pixels), model, size) if pixels else (torch.empty(0), size)
            under_way.append((batch, found))
        if not batch or len(under_way) > (model.device != "cpu"):
            done, found = under_way.popleft()
            vectors = iter(found.cpu().numpy().astype(np.float16))
            yield [p if p.pixels is None else p._replace(pixels=None, vector=next(vectors)) for p in done]


# ---- Query views -----------------------------------------------------------------------------------------------------

# The parts of a query that are searched for: their shape, width by height, and their size, 1 being the largest that
# fits. Pictures in a screenshot, a collage or a page have these shapes
SHAPES, SIZES = (0.75, 1.33, 1.78), (1.0, 0.7, 0.5)
SMALLEST_PART = 0.08  # of the query's area; there are too many smaller ones in a long query
PLACES = 3  # steps of a part within its own width or height; with 2 a fifth of the small pictures are missed
LARGER = ((0.80, 2), (0.67, 3), (0.52, 5))  # side of a query that is a part of a larger picture, places along an axis
TURNS = (-30, -20, -10, 10, 20, 30)  # degrees
SMALLEST = 128  # pixels of the shorter side of a query that is searched by its parts
VIEW_SIDE = 3  # times the model's side: the shorter side of the picture that views are cut from


def cut_out(image: Image.Image, part: Sequence[float]) -> tuple[Image.Image, int, int]:
    """A part of the upright picture, and its left and top there, in pixels.

    part  left, top, right, bottom in pixels, or as shares of its sides if none is over 1

    Raises ValueError if the part is empty or does not lie within the picture.
    """
    picture = to_rgb(image, max(image.size))
    scale = (*picture.size, *picture.size) if max(part) <= 1 else (1, 1, 1, 1)
    left, top, right, bottom = box = [round(value * full) for value, full in zip(part, scale)]
    if not (0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height):
        raise ValueError(f"--crop {box} does not lie within the picture of {picture.width} × {picture.height} pixels")
    return picture.crop((left, top, right, bottom)), left, top


def parts_of(picture: Image.Image, model: Model, sizes: Sequence[float]) -> list[torch.Tensor]:
    """Parts of the query that may be a picture of their own, each squeezed to the pixels of the model.

    For each shape and size, the query is resized once, and the parts are cut out of it at regular steps.
    """
    found, side, (width, height) = list[torch.Tensor](), model.side, picture.size
    for shape, size in itertools.product(SHAPES, sizes):
        across, down = size * min(1.0, shape * height / width), size * min(1.0, width / shape / height)  # of the query
        if across * down < SMALLEST_PART:
            continue
        whole = squeeze(picture, round(side / across), round(side / down), model.resample)
        lefts, tops = (
            np.linspace(0, room, 1 + math.ceil(PLACES * room / side)).round().astype(int)
            for room in (whole.shape[2] - side, whole.shape[1] - side)
        )
        found += [whole[:, top : top + side, left : left + side] for top in tops for left in lefts]
    return found


def larger_views(picture: Image.Image, model: Model) -> Iterator[View]:
    """Views that suppose that the query was cut out of a larger picture: each at one size and place in it."""
    for share, places in LARGER:
        small = round(share * model.side)
        pixels = squeeze(picture, small, small, model.resample)
        starts = [round((2 * i + 1) / (2 * places) * (model.side - small)) for i in range(places)]
        yield from (View("part", pixels, top, left) for top in starts for left in starts)


def query_views(image: Image.Image, model: Model, views: str) -> list[View]:
    """A query as it is, and as it would be before an edit.

    views  none: as it is
           all: also mirrored, turned, as a negative, its parts, and with the offline descriptor as a part of a larger
           picture
           auto: all with the offline descriptor; with a network, 9 to 25 views: mirrored and its largest parts
           copies: those that --duplicates looks for copies with
    """
    offline, whole = model.name == OFFLINE, to_rgb(image, model.side)
    everything = views == "all" or (offline and views == "auto")
    found = [View("", squeeze(whole, model.side, model.side, model.resample))]
    if views == "none":
        return found
    picture, scale = whole.copy(), min(1.0, VIEW_SIDE * model.side / min(whole.size))
    picture.thumbnail((math.ceil(scale * whole.width), math.ceil(scale * whole.height)), reducing_gap=2.0)
    found.append(View("mirrored", found[0].pixels.flip(2)))
    if everything or offline:
        for quarters, view in itertools.product((1, 2, 3), found[:2]):
            name = f"{view.name}, turned {90 * quarters}°".lstrip(", ")
            found.append(View(name, view.pixels.rot90(quarters, (1, 2))))
    if everything:
        found.append(View("inverted", 255 - found[0].pixels))
        for angle in TURNS:
            turned = picture.rotate(angle, Image.Resampling.BILINEAR)
            found.append(View(f"turned {angle % 360}°", squeeze(turned, model.side, model.side, model.resample)))
    if views != COPIES and min(whole.size) >= SMALLEST:
        sizes = SIZES if everything else SIZES[:1]
        found += [View("part of the query", pixels) for pixels in parts_of(picture, model, sizes)]
    return found + (list(larger_views(picture, model)) if offline else [])


def features_of_views(views: Sequence[View], model: Model) -> np.ndarray:
    """Features of a query in its views, float32 (views, dim), rounded to fp16 as they are in the store."""
    whole = [view.pixels for view in views if view.pixels.shape[1:] == (model.side, model.side)]  # the first ones
    features = [launch(torch.stack(whole), model, model.batch)[0]]
    features += [launch(view.pixels[None], model, 1, view.top, view.left)[0] for view in views[len(whole) :]]
    return to_float32(torch.cat(features).cpu().numpy().astype(np.float16))


# ---- Verification ----------------------------------------------------------------------------------------------------

AREA, POINTS = 90_000, 300  # pixels of a picture on which local features are computed; how many it gets
QUERY_AREA, QUERY_POINTS = 250_000, 700  # of a query: the picture looked for may be a small part of it
LEVELS = 8  # of the pyramid; each is smaller than the last by the square root of 2
CONTRAST = 1.5  # of 255, of a blob against its surroundings: fainter ones are noise
SPREAD = 4  # cells a side among which the points are spread, so that a caption does not take them all
WINDOW, SAMPLES = 8, 12  # pixels of its level on each side of a point that its descriptor sees; samples along a side
RATIO = 0.75  # of squared distances, of the best match of a point to its best rival
RIVALS, NEAR = 4, 8.0  # best matches of a point that are looked at; pixels within which two are the same spot
TOLERANCE, DRIFT = 5.0, 0.04  # a point agrees within so many pixels, and so much of its distance from the match voting
SCALES = (0.15, 6.0)  # of the query in the match; outside of it, everything falls on one spot
PROPOSALS = 5  # transforms that are fitted, of those that most points agree on
CELL = 4.0  # pixels: points that are nearer to each other count as one
FEWEST = 6  # points that a transform is fitted to at first
AGREEING = 14  # points of a copy that agree on a transform; unrelated pairs have 3, drawn ones up to 10
GRID, GRID_CELL = 48, 4  # samples along each side of the match, and of a cell in which the two pictures are correlated
TEXTURE, CORRELATION = 4.0, 0.8  # of 255, standard deviation of a cell that shows anything; of a cell that agrees
# Share of the common cells that agree in a copy. A caption, stickers or a curved screen leave 0.65. Two products before
# one backdrop reach 0.58, two screenshots of one app 0.3
AGREEMENT = 0.62


class LocalFeatures(NamedTuple):
    """Distinctive points of a picture, and what it looks like around them. Complex numbers stand for the plane."""

    size: tuple[int, int]  # pixels of the upright picture
    grey: Image.Image  # the picture made smaller
    places: np.ndarray  # of the points, x + iy in pixels of `grey`; complex64 (n,)
    frames: np.ndarray  # size × e^(i angle) of each point; complex64 (n,)
    descriptors: np.ndarray  # float32 (n, 128), each of length 1


def smooth(light: torch.Tensor, step: int = 1) -> torch.Tensor:
    """The picture, (h, w), averaged with weights 1, 2, 1 along both axes, over pixels `step` apart."""
    framed = torch.nn.functional.pad(light[None, None], (step,) * 4, mode="replicate")[0, 0]
    rows = framed[: -2 * step] + 2 * framed[step:-step] + framed[2 * step :]
    return (rows[:, : -2 * step] + 2 * rows[:, step:-step] + rows[:, 2 * step :]) / 16


def blob_points(light: torch.Tensor, count: int) -> torch.Tensor:
    """x and y, int64 (n, 2), of the `count` strongest blobs of a level, light (h, w), taken from all its parts in turn.

    A blob is an extreme of a difference of Gaussians, but not on an edge, where it would slide (Lowe, IJCV 2004).
    """
    fine = smooth(smooth(smooth(light)))
    D = smooth(fine, 2) - fine
    strength = D.abs()[WINDOW - 1 : 1 - WINDOW, WINDOW - 1 : 1 - WINDOW]
    rows = torch.maximum(torch.maximum(strength[:-2], strength[1:-1]), strength[2:])  # max_pool2d takes 5 times as long
    around = torch.maximum(torch.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
    y, x = ((strength[1:-1, 1:-1] == around) & (around > CONTRAST)).nonzero().T + WINDOW
    xx = D[y, x + 1] + D[y, x - 1] - 2 * D[y, x]
    yy = D[y + 1, x] + D[y - 1, x] - 2 * D[y, x]
    xy = (D[y + 1, x + 1] + D[y - 1, x - 1] - D[y + 1, x - 1] - D[y - 1, x + 1]) / 4
    is_blob = (xx + yy) ** 2 * 10 < 11**2 * (xx * yy - xy**2)  # one curvature is at most 10 times the other
    x, y = x[is_blob], y[is_blob]
    rank, cell = -D[y, x].abs().numpy(), (SPREAD * y // len(light) * SPREAD + SPREAD * x // light.shape[1]).numpy()
    order = np.lexsort((rank, cell))
    turn = np.arange(len(order)) - np.searchsorted(cell[order], cell[order])  # place of each blob in its cell
    return torch.stack([x, y], 1)[order[np.lexsort((rank[order], turn))[:count]]]


def describe_points(light: torch.Tensor, xy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles (n,) and descriptors (n, 128) of points, xy (n, 2), on a level, light (h, w).

    The angle is that of the mean gradient around the point. The descriptor counts gradients in 4 × 4 cells and 8
    directions, turned by the angle, as SIFT does, under a square root (Arandjelović & Zisserman, CVPR 2012).
    """
    dy, dx = (d.reshape(-1) for d in torch.gradient(light))
    steps = (torch.arange(SAMPLES) + 0.5) * (2 * WINDOW / SAMPLES) - WINDOW
    v, u = (grid.reshape(-1) for grid in torch.meshgrid(steps, steps, indexing="ij"))
    weight = torch.exp(-(u**2 + v**2) / (2 * WINDOW**2))

    def gradients(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (xy[:, :1] + u).round().long(), (xy[:, 1:] + v).round().long()
        place = y.clamp(0, light.shape[0] - 1) * light.shape[1] + x.clamp(0, light.shape[1] - 1)
        return dx[place] * weight, dy[place] * weight

    gx, gy = gradients(u, v)
    angle = torch.atan2(gy.sum(1), gx.sum(1))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    gx, gy = gradients(cos * u - sin * v, sin * u + cos * v)
    along, across = cos * gx + sin * gy, cos * gy - sin * gx
    k = torch.arange(8) * (math.pi / 4)
    rise = (along[..., None] * k.cos() + across[..., None] * k.sin()).clamp_(min=0)  # (n, samples, 8)
    rise = rise**3 / (along**2 + across**2 + 1e-6)[..., None]  # the cosine cubed: mostly the two nearest directions
    share = (1 - (steps[:, None] - torch.tensor([-6.0, -2.0, 2.0, 6.0])).abs() / 4).clamp(min=0)  # (samples, cells)
    cells = torch.einsum("nvuk,vi,uj->nijk", rise.view(-1, SAMPLES, SAMPLES, 8), share, share).flatten(1)
    return angle, torch.nn.functional.normalize(torch.nn.functional.normalize(cells, p=1).sqrt())


def local_features(image: Image.Image, area: int = AREA, count: int = POINTS, side: int = 0) -> LocalFeatures:
    """At most `count` local features of a picture, computed on `area` pixels. A plain picture may have none."""
    width, height = image.size
    scale = min(1.0, (area / (width * height)) ** 0.5)
    picture = to_rgb(image, max(side, math.ceil(scale * max(width, height) / DRAFT_SCALE)))
    if (picture.width - picture.height) * (width - height) < 0:  # EXIF has turned it
        width, height = height, width
    small = max(1, round(scale * width)), max(1, round(scale * height))
    grey = picture.convert("L").resize(small, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
    light = torch.from_numpy(np.array(grey)).float()
    places, frames, descriptors = [torch.zeros(0, 2)], [torch.zeros(0, dtype=torch.complex64)], [torch.zeros(0, 128)]
    factors = [2 ** (-level / 2) for level in range(LEVELS)]
    for factor in factors:
        shape = [round(side * factor) for side in light.shape]
        if min(shape) <= 2 * WINDOW + 1:
            break
        level = torch.nn.functional.interpolate(light[None, None], shape, mode="bilinear", antialias=True)[0, 0]
        xy = blob_points(level, round(count * factor / sum(factors)))
        angle, description = describe_points(level, xy)
        places.append((xy + 0.5) * torch.tensor([small[0] / shape[1], small[1] / shape[0]]))
        frames.append(torch.polar(torch.full_like(angle, 1 / factor), angle))
        descriptors.append(description)
    every = torch.view_as_complex(torch.cat(places)), torch.cat(frames), torch.cat(descriptors)
    return LocalFeatures((width, height), grey, *(part.numpy() for part in every))


def seen_through(query: LocalFeatures, mirrored: bool, negative: bool) -> LocalFeatures:
    """The local features of the mirrored query, of its negative, or of both. They are derived, not computed again."""
    size, grey, places, frames, descriptors = query
    cells = descriptors.reshape(-1, 4, 4, 8)
    if mirrored:  # the window of a point is mirrored along with the picture
        grey, places, frames = ImageOps.mirror(grey), grey.width - places.conj(), -frames.conj()
        cells = cells[:, ::-1][..., [0, 7, 6, 5, 4, 3, 2, 1]]
    if negative:  # dark and light change places: each direction, and its window, turns by 180°
        frames, cells = -frames, cells[:, ::-1, ::-1]
    return LocalFeatures(size, grey, places, frames, cells.reshape(-1, 128))


def homogeneous(places: np.ndarray) -> np.ndarray:
    """Places as rows x, y and 1, (3, n): a matrix (3, 3) times these transforms them."""
    return np.stack([places.real, places.imag, np.ones(len(places))])


def fitted(q: np.ndarray, m: np.ndarray, agrees: np.ndarray) -> tuple[int, np.ndarray]:
    """How many points agree on an affine transform from the places q to m, and that transform, (3, 3).

    `agrees` marks the points to start with. Points in one cell count once. The number is 0 if fewer than AGREEING
    agree, or if the transform distorts the picture too much.
    """
    Q, M, H = homogeneous(q), homogeneous(m), np.eye(3)
    for _ in range(3):
        if agrees.sum() < FEWEST:
            return 0, H
        H = np.linalg.lstsq(Q[:, agrees].T, M[:, agrees].T, rcond=None)[0].T
        longer, shorter = np.linalg.svd(H[:2, :2])[1]  # by how much it stretches along its axes
        if not (SCALES[0] < shorter and longer < min(SCALES[1], 2 * shorter)):
            return 0, H
        agrees = np.hypot(*(H @ Q - M)[:2]) < TOLERANCE * max(1.0, (longer * shorter) ** 0.5)
    points = min(len(np.unique(z[agrees].real // CELL + 4096 * (z[agrees].imag // CELL))) for z in (q, m))
    return points if points >= AGREEING else 0, H


def best_transform(query: LocalFeatures, match: LocalFeatures) -> tuple[int, np.ndarray]:
    """The transform, (3, 3), from query to match on which most points agree, after the number of these points.

    A point is matched to the one it resembles most, if it resembles no other place nearly as much. Each matched pair
    proposes a similarity by its places, sizes and angles. All proposals are tried, none is drawn at random.
    """
    S = torch.from_numpy(query.descriptors) @ torch.from_numpy(match.descriptors).T
    scores, best = (found.numpy() for found in S.topk(min(RIVALS, S.shape[1])))
    is_rival = np.abs(match.places[best] - match.places[best[:, :1]]) > NEAR
    good = 1 - scores[:, 0] < RATIO * (1 - np.where(is_rival, scores, -1).max(1))
    q, m = query.places[good], match.places[best[good, 0]]
    ratio = match.frames[best[good, 0]] / query.frames[good]
    moved, scale = ratio[:, None] * (q - q[:, None]), np.abs(ratio)  # (proposals, matches)
    agree = np.abs(m[:, None] + moved - m) < TOLERANCE + DRIFT * np.abs(moved)
    agree &= np.abs(np.log2(scale / scale[:, None])) < 1
    agree[(scale < SCALES[0]) | (scale > SCALES[1])] = False
    likely = np.argsort(-agree.sum(1), kind="stable")[:PROPOSALS]
    return max((fitted(q, m, agree[one]) for one in likely), key=lambda fit: fit[0], default=(0, np.eye(3)))


def common_share(query: LocalFeatures, match: LocalFeatures, H: np.ndarray) -> tuple[float, float]:
    """The share of the cells visible in both pictures that agree, and the share of the match's area that agrees.

    The query is warped onto the match by H. The two are then correlated cell by cell.
    """
    fine, cells = 4 * GRID, GRID // GRID_CELL  # four samples a side are averaged to one: no aliasing, less noise
    data = np.linalg.inv(H) @ np.diag([match.grey.width / fine, match.grey.height / fine, 1])
    seen, inside = (
        image.transform((fine, fine), Image.Transform.AFFINE, data[:2].ravel().tolist(), Image.Resampling.BILINEAR)
        for image in (query.grey, Image.new("L", query.grey.size, 255))
    )
    a, b, known = (
        np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), np.float32)
        .reshape(cells, GRID_CELL, cells, GRID_CELL).swapaxes(1, 2).reshape(cells**2, -1)
        for image in (seen, match.grey, inside)
    )  # fmt: skip
    a, b, common = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True), known.min(1) > 200
    tells = common & (np.maximum(a.std(1), b.std(1)) > TEXTURE)
    agrees = np.abs((a * b).mean(1)) > CORRELATION * (a.std(1) * b.std(1) + 1e-6)
    agreement = float(agrees[tells].mean()) if tells.any() else 0.0
    return agreement, agreement * float(known.mean()) / 255


def corners_in(one: LocalFeatures, other: LocalFeatures, H: np.ndarray) -> list[tuple[float, float]]:
    """The corners of one picture in pixels of the other. H: the transform between their small versions."""
    width, height = one.grey.size
    there = H @ [(0, width, width, 0), (0, 0, height, height), (1, 1, 1, 1)]
    return [(x, y) for x, y in (there[:2].T * other.size / other.grey.size).round(1).tolist()]


def align(query: LocalFeatures, match: LocalFeatures) -> Region | None:
    """Where the query lies in the match; None if the two are not the same picture.

    The query is also tried mirrored and as a negative; the way on which most points agree counts.
    """
    points, H, best, flipped = 0, np.eye(3), query, False
    ways = itertools.product((False, True), repeat=2) if len(query.places) and len(match.places) else ()
    for mirrored, negative in ways:
        seen = seen_through(query, mirrored, negative)
        found = best_transform(seen, match)
        if found[0] > points:
            (points, H), best, flipped = found, seen, mirrored
    agreement, covers = common_share(best, match, H) if points else (0.0, 0.0)
    if agreement < AGREEMENT:
        return None
    if flipped:  # from the query as it is
        H = H @ [(-1, 0, query.grey.width), (0, 1, 0), (0, 0, 1)]
    return Region(corners_in(query, match, H), corners_in(match, query, np.linalg.inv(H)), points, round(covers, 3))


# ---- Store -----------------------------------------------------------------------------------------------------------

FORMAT = 3  # of the database; a DeepVision of an older format refuses it
PAGE_BYTES = 32_768  # 7 vectors of 2048 × fp16 a page: 4.7 KB an image in all, against 5.5 with pages of 16 KB
CACHE_KB = 16_384  # of pages in memory: the inner pages of ten million rows fit
BLOCK = 4096  # rows handled at once: 16 MB at 2048 dimensions
CHECKED_BYTES = 1 << 27  # a database up to this size is checked whole on opening, in 0.3 s
WAIT_SECONDS = 60  # for a commit of another run
OLD_FILES = ("features.bin", "catalogue.sqlite", "catalogue.crc")  # of formats 1 and 2
SCHEMA = [
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    # AUTOINCREMENT: no row number is used twice, so that a stale FAISS index can miss a row but never mistake one.
    "CREATE TABLE features (row INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB UNIQUE, vector BLOB, checksum INTEGER)",
    # Every file that was ever read. Without digest: not usable, for this reason; without either: not an image.
    "CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, digest BLOB, reason TEXT, there INTEGER)"
    " WITHOUT ROWID",
    "CREATE INDEX files_by_digest ON files (digest, there, reason)",  # all that is counted: a million in 50 ms
]
USABLE = "files WHERE there AND digest IS NOT NULL"
SKIPPED = "files WHERE there AND reason IS NOT NULL"
GONE = """files AS old WHERE NOT there AND digest IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM files WHERE digest = old.digest AND there)"""  # a renamed file is not gone
ORPHANED = """files WHERE digest IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM features WHERE features.digest = files.digest)"""
FOUND = """DROP TABLE IF EXISTS temp.changes; DROP TABLE IF EXISTS temp.found;
    CREATE TEMP TABLE found (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER) WITHOUT ROWID"""
CRASHES = "its decoder crashes"  # the reason given for such a file; --rebuild does not try it again
# How what a scan found differs from what is stored: files to read (`there` is NULL), gone (0), and back unchanged (1).
CHANGES = f"""CREATE TEMP TABLE changes AS SELECT path, size, mtime, back AS there FROM (
        SELECT path, found.size, found.mtime, files.there AS known,
            CASE WHEN files.size = found.size AND files.mtime = found.mtime AND NOT (:retry AND files.digest IS NULL)
                AND (NOT :everything OR files.reason = '{CRASHES}') THEN 1 END AS back
        FROM found LEFT JOIN files USING (path)) WHERE back IS NULL OR NOT known
    UNION ALL SELECT path, size, mtime, 0 FROM files
    WHERE files.there AND NOT EXISTS (SELECT 1 FROM found WHERE found.path = files.path)"""
UNREAD = "changes WHERE there IS NULL"


@contextmanager
def damage_noticed() -> Iterator[None]:
    """Turn SQLite's errors about damage into a DamageError. Those about a full disk or permissions pass through."""
    try:
        yield
    except sqlite3.OperationalError:
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter quotes a damaged schema
        raise DamageError(first_line(error)) from error


def sync_folder(folder: Path) -> None:
    """Make the names of the files in the folder durable. POSIX keeps a new name only after that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, mark: object = "") -> Iterator[BinaryIO]:
    """A file to write, which takes its place only when it is whole and on disk.

    Two processes that may write the same file at once give a different `mark`.
    """
    part = path.with_name(f"{path.name}{mark}.part")
    try:
        part.unlink(missing_ok=True)  # a link in its place would be written through
        with open(part, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


Blocks = Iterator[tuple["np.ndarray", "np.ndarray"]]  # rows, int64 (n,), and features (n, dim)


class Store:
    """The files of a collection and their features, by one model: an SQLite database.

    A file and its features are stored in one transaction. A vector is used only after its checksum was seen to hold.
    `folder` is created. `identity` and `dim` are those of the model. Each rank of torchrun has a database by its own
    `name`.
    """

    def __init__(self, folder: Path, identity: str, dim: int, name: str = "index.sqlite") -> None:
        self.folder, self.identity, self.dim = folder, identity, dim
        self.path, self.index = folder / name, folder / "index.faiss"
        self.salt = zlib.crc32(identity.encode())  # no vector holds in the store of another model
        folder.mkdir(parents=True, exist_ok=True)
        self.lock_file, self.one_lookup = filelock.FileLock(folder / "lock"), threading.Lock()
        self.last_words = b""  # the crash report that faulthandler left in the lock file; taking the lock empties it
        self.scanned = (0, 0)  # the version that the last scan was compared with
        self.connect()

    def connect(self) -> None:
        if not self.path.exists():
            self.path.touch()
        self.inode = self.path.stat().st_ino
        connect = partial(sqlite3.connect, self.path, timeout=WAIT_SECONDS, check_same_thread=False)
        self.db, self.lookup = connect(), connect()
        self.db.text_factory = partial(str, encoding="utf-8", errors="replace")
        with suppress(DamageError), damage_noticed():  # `check` says what is wrong
            self.db.execute(f"PRAGMA cache_size = -{CACHE_KB}")

    def close(self) -> None:
        self.db.close()
        self.lookup.close()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the one run that writes."""
        with suppress(OSError):  # there is none yet
            self.last_words = Path(self.lock_file.lock_file).read_bytes()
        try:
            held = self.lock_file.acquire(timeout=0)
        except filelock.Timeout:
            log.warning("another run is writing %s: waiting for it", self.folder)
            held = self.lock_file.acquire()
        with held:
            if not self.path.exists() or self.path.stat().st_ino != self.inode:  # another run has repaired it
                self.close()
                self.connect()
            yield

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Have all that is read in this context come from one state, whatever other runs save meanwhile.

        Rows that --rebuild replaces would be missed otherwise. Other runs wait with their commits.
        """
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.rollback()

    def version(self) -> tuple[int, int]:
        """A value that is another one whenever another run has written."""
        return self.inode, self.value("PRAGMA data_version")

    # Values

    def value(self, query: str, *arguments: Any) -> Any:
        """The first value that the query gives, or None."""
        return (self.db.execute(query, arguments).fetchone() or [None])[0]

    def get_meta(self, key: str) -> Any:
        return self.value("SELECT value FROM meta WHERE key = ?", key)

    def put_meta(self, key: str, value: Any) -> None:
        with self.db:
            self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def count(self, table: str) -> int:
        return self.value(f"SELECT count(*) FROM {table}")

    def any(self, table: str) -> bool:
        return bool(self.value(f"SELECT EXISTS (SELECT 1 FROM {table})"))

    def last_row(self) -> int:
        """The highest row number in use; 0: there are no features."""
        return self.value("SELECT max(row) FROM features") or 0

    # Features

    def checksum(self, digest: bytes, vector: bytes) -> int:
        """CRC-32 of model identity, digest and vector."""
        return zlib.crc32(vector, zlib.crc32(digest, self.salt))

    def is_intact(self, row: Sequence[Any]) -> bool:
        """Whether (row, digest, vector, checksum), as it was read, is what was written."""
        _, digest, vector, checksum = row
        is_whole = isinstance(digest, bytes) and isinstance(vector, bytes) and len(vector) == 2 * self.dim
        return is_whole and self.checksum(digest, vector) == checksum

    def features(self, condition: str, *arguments: Any) -> tuple[np.ndarray, list[bytes], np.ndarray]:
        """Rows, int64 (n,), content hashes, and features, fp16 (n, dim), for which the SQL condition holds, by row.

        Raises DamageError if one of them is not what was written. It is deleted then: the next update reads its files.
        """
        query = f"SELECT row, digest, vector, checksum FROM features WHERE {condition}"
        found = self.db.execute(query, arguments).fetchall()
        if broken := [(row[0],) for row in found if not self.is_intact(row)]:
            with self.db:
                which = "digest = (SELECT digest FROM features WHERE row = ?)"
                self.db.executemany(f"UPDATE files SET mtime = -1 WHERE {which}", broken)
                self.db.executemany("DELETE FROM features WHERE row = ?", broken)
            damaged = counted(len(broken), "feature is", "features are")
            log.warning("%s: %s damaged, to be extracted again", self.path, damaged)
            raise DamageError(f"{counted(len(broken), 'feature')} did not match the checksum")
        vectors = np.frombuffer(bytearray().join(row[2] for row in found), np.float16).reshape(-1, self.dim)
        return np.array([row[0] for row in found], np.int64), [row[1] for row in found], vectors

    def features_of(self, rows: Iterable[int]) -> tuple[np.ndarray, list[bytes], np.ndarray]:
        """Those of `rows` that are still there, as `features` gives them."""
        among = json.dumps(sorted(map(int, rows)))
        return self.features("row IN (SELECT value FROM json_each(?)) ORDER BY row", among)

    def blocks(self, first: int = 0, last: int | None = None) -> Blocks:
        """Rows, int64 (n,), and features, fp16 (n, dim), with first ≤ row ≤ last, in blocks. Raises DamageError."""
        last = self.last_row() if last is None else last
        while first <= last:  # no cursor stays open between blocks
            rows, _, vectors = self.features("row BETWEEN ? AND ? ORDER BY row LIMIT ?", first, last, BLOCK)
            if not len(rows):
                return
            yield rows, vectors
            first = int(rows[-1]) + 1

    def is_known(self, digest: bytes, after: int = 0) -> bool:
        """Whether a row above `after` holds features of this content. Reading threads call it.

        With --rebuild, `after` is the last row of before, so that only new features count.
        """
        with self.one_lookup:  # Python 3.13 fails now and then where threads share a connection
            query = "SELECT 1 FROM features WHERE digest = ? AND row > ?"
            return self.lookup.execute(query, (digest, after)).fetchone() is not None

    def save(self, pictures: Sequence[Picture], replace: bool = False) -> None:
        """Store files and their features in one transaction. `replace`: new features take the place of stored ones."""
        verb, kept = "REPLACE" if replace else "IGNORE", [picture for picture in pictures if not picture.vanished]
        features = {p.digest: p.vector.tobytes() for p in kept if p.digest and p.vector is not None}
        with self.db:
            self.db.executemany(
                f"INSERT OR {verb} INTO features (digest, vector, checksum) VALUES (?, ?, ?)",
                ((digest, vector, self.checksum(digest, vector)) for digest, vector in features.items()),
            )
            self.db.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, 1)", ((*p.file, p.digest, p.reason) for p in kept)
            )
            vanished = [(picture.file.path,) for picture in pictures if picture.vanished]
            self.db.executemany("UPDATE files SET there = 0 WHERE path = ?", vanished)

    def merge_rank(self, share: Path) -> None:
        """Add the files and features of a rank's database. They take the place of stored ones."""
        self.db.execute("ATTACH ? AS share", (os.fsencode(share),))
        try:
            with self.db:
                columns = "digest, vector, checksum"
                new = f"SELECT {columns} FROM share.features ORDER BY row"
                self.db.execute(f"INSERT OR REPLACE INTO main.features ({columns}) {new}")
                self.db.execute("INSERT OR REPLACE INTO main.files SELECT * FROM share.files")
        finally:
            self.db.execute("DETACH share")

    # Files

    def scan(self, files: Iterable[File], everything: bool) -> int:
        """Compare `files`, in the order of their paths, with the store, and fill the table `changes`; how many differ.

        New and changed files are to be read. So are unusable files if the decoders have changed, files without features
        if the database is small, and with `everything` all files.
        """
        self.scanned = self.version()
        if self.is_small() and self.any(ORPHANED):  # their digest is damaged
            with self.db:
                self.db.execute(f"UPDATE files SET mtime = -1 WHERE path IN (SELECT path FROM {ORPHANED})")
        retry = self.get_meta("decoders") not in (None, image_formats()[2])  # None: no update has come to its end yet
        self.db.executescript(FOUND)
        with self.db:
            self.db.executemany("INSERT INTO found VALUES (?, ?, ?)", files)
            self.db.execute(CHANGES, {"everything": everything, "retry": retry})
            self.db.execute("DROP TABLE found")
        return self.count("changes")

    def unread(self) -> list[File]:
        return [File(*found) for found in self.db.execute(f"SELECT path, size, mtime FROM {UNREAD}")]

    def mark_presence(self) -> bool:
        """Mark files as gone or back, as the scan found them. Returns False, and changes nothing, if no usable image
        would remain."""
        with self.db:
            changed = "SELECT there, path FROM changes WHERE there IS NOT NULL"
            self.db.executemany("UPDATE files SET there = ? WHERE path = ?", self.db.execute(changed).fetchall())
            if remains := self.any(USABLE):
                self.db.execute("INSERT OR REPLACE INTO meta VALUES ('decoders', ?)", (image_formats()[2],))
            else:
                self.db.rollback()
        return remains

    def prune(self) -> None:
        """Forget the files that are gone, and the features that belong to no file."""
        with self.db:
            self.db.execute("DELETE FROM files WHERE NOT there")
            unused = "NOT EXISTS (SELECT 1 FROM files WHERE files.digest = features.digest AND there)"
            self.db.execute(f"DELETE FROM features WHERE {unused}")
        if 10 * self.value("PRAGMA freelist_count") > self.value("PRAGMA page_count"):
            self.db.execute("VACUUM")  # or the file never gets smaller

    def files_with(self, digest: bytes) -> list[File]:
        """The files of the collection with this content, by path."""
        query = "SELECT path, size, mtime FROM files WHERE there AND digest = ? ORDER BY path"
        return [File(*found) for found in self.db.execute(query, (digest,))]

    def skipped(self, limit: int = -1) -> list[tuple[bytes, str]]:
        """The path of each skipped file, with its reason."""
        return self.db.execute(f"SELECT path, reason FROM {SKIPPED} ORDER BY path LIMIT ?", (limit,)).fetchall()

    # Damage

    def is_small(self) -> bool:
        return self.path.stat().st_size <= CHECKED_BYTES

    @damage_noticed()
    def check(self, whole: bool) -> None:
        """Raise DamageError if this is not a sound database of this format. Damaged rows alone are discarded.

        A large database, or one that is not to be checked `whole`, is looked at where it is used.
        """
        version = self.value("PRAGMA user_version")
        if version > FORMAT:
            raise DeepVisionError(
                f"{self.folder} was written by a newer DeepVision (format {version}, this one knows {FORMAT}): update "
                "DeepVision, or choose another --index-dir"
            )
        tables = "sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
        schema = [sql for (sql,) in self.db.execute(f"SELECT sql FROM {tables}").fetchall()]
        if version < FORMAT or schema != SCHEMA:
            raise DamageError("it is not a database of this format")
        if self.get_meta("identity") != self.identity:
            raise DamageError("it belongs to another model")
        if whole and self.is_small():
            if (verdict := self.value("PRAGMA integrity_check(1)")) != "ok":  # quick_check does not compare indexes
                raise DamageError(str(verdict).splitlines()[0])
            is_checked = False
            while not is_checked:
                with suppress(DamageError):  # the damaged features of one block, which are deleted now
                    deque(self.blocks(), 0)
                    is_checked = True

    def salvage(self) -> None:
        """Copy the intact rows of a damaged database into a new one, which replaces it. Call it with the lock held."""

        def readable(columns: str, table: str, key: str) -> Iterator[tuple[Any, ...]]:
            for order in ("ASC", "DESC"):  # from its beginning and from its end, each up to the damage
                try:
                    with damage_noticed():
                        yield from self.db.execute(f"SELECT {columns} FROM {table} ORDER BY {key} {order}")
                    return
                except (DamageError, sqlite3.OperationalError) as error:
                    if isinstance(error, sqlite3.OperationalError) and "no such" not in str(error):
                        raise

        part = self.path.with_name(f"{self.path.name}.part")
        for left in (part, part.with_name(f"{part.name}-journal")):
            left.unlink(missing_ok=True)
        new = Store(self.folder, self.identity, self.dim, part.name)
        new.db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        new.db.executescript(f"BEGIN; {';'.join(SCHEMA)}; PRAGMA user_version = {FORMAT}; COMMIT")
        new.put_meta("identity", self.identity)
        with new.db:
            rows = (row for row in readable("row, digest, vector, checksum", "features", "row") if self.is_intact(row))
            new.db.executemany("INSERT OR IGNORE INTO features VALUES (?, ?, ?, ?)", rows)
            files = readable("path, size, mtime, digest, reason, there", "files", "path")
            new.db.executemany("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?)", files)
            new.db.execute(f"UPDATE files SET mtime = -1 WHERE path IN (SELECT path FROM {ORPHANED})")
        new.close()
        self.close()
        self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)  # SQLite would replay it
        os.replace(part, self.path)
        sync_folder(self.folder)
        self.connect()

    def make_sound(self) -> None:
        """Check the database, and repair it, or create it if it is new. Call it with the lock held."""
        try:
            self.check(whole=True)
        except DamageError as error:
            is_new = not self.path.stat().st_size
            self.salvage()
            if not is_new:
                rows = counted(self.count("features"), "feature holds", "features hold")
                log.warning("%s: %s. Repaired: %s", self.path, error, rows)

    def repair(self) -> None:
        with self.locked():  # another run may repair it meanwhile
            self.make_sound()


# ---- Index -----------------------------------------------------------------------------------------------------------

FEWEST_CODED = 64  # vectors; fewer do not train the codes
CODED_DIM = 256  # principal components in the codes, of 2 bits each
TRAINED_ON, HELD_OUT = 30_000, 500  # vectors; more gain nothing, fewer measure recall less exactly than to 0.001
OUTGROWN = 2  # the codes are trained again once the collection has grown this many times
SHORTLIST, LONGEST_SHORTLIST = 384, 32_768  # codes whose exact scores are computed: at first, at most
RECALL = 0.998  # share of the true ten nearest that the shortlist must hold
GPU_RESERVE = 3 << 30  # bytes left to the model and to FAISS's own work


class Index(NamedTuple):
    """A FAISS index over features of the store."""

    faiss: faiss.Index  # its ids are rows of the store
    last: int  # the last row in it; later ones are compared one by one
    shortlist: int = 0  # codes whose exact scores are computed; 0: the index holds the features themselves
    recall: float | None = None  # share of the true ten nearest in the shortlist, measured
    trained: int = 0  # vectors in the collection when the codes were trained
    file: Any = None  # the index file in memory, which `faiss` looks into


def to_float32(block: np.ndarray) -> np.ndarray:
    """The block as contiguous float32. torch converts fp16 several times as fast as NumPy does."""
    return torch.from_numpy(np.ascontiguousarray(block)).float().numpy()


def build_index(features: np.ndarray | Iterable[Any], index: faiss.Index | None = None) -> faiss.Index:
    """A FAISS index of `features`, of any float type, each of length 1, that is searched by inner product.

    features  (n, dim), with ids from 0 on; or an iterable of blocks, each (n, dim), or a pair of ids (n,) and (n, dim)
    index     the index to add them to; by default a new one, exact, that holds them as fp16

    Raises ValueError if there is not even an empty block.
    """
    for block in [features] if isinstance(features, np.ndarray) else features:
        rows, xb = block if isinstance(block, tuple) else (None, block)
        if index is None:
            kind = faiss.ScalarQuantizer.QT_fp16
            index = faiss.IndexIDMap(faiss.IndexScalarQuantizer(xb.shape[1], kind, faiss.METRIC_INNER_PRODUCT))
        if rows is None:
            rows = np.arange(index.ntotal, index.ntotal + len(xb))
        for i0 in range(0, len(xb), BLOCK):
            index.add_with_ids(to_float32(xb[i0 : i0 + BLOCK]), rows[i0 : i0 + BLOCK])
    if index is None:
        raise ValueError("build_index was given no features")
    return index


def progress_bar(steps: Iterable[Any] | None = None, **options: Any) -> tqdm.tqdm:
    """A bar that shows on a terminal only, and not with -q."""
    return tqdm.tqdm(steps, disable=None if log.isEnabledFor(logging.INFO) else True, **options)


class Nearest:
    """The k rows nearest to each of `xq`, float32 (nq, dim), among all blocks that pass through `watch`."""

    def __init__(self, xq: np.ndarray, k: int) -> None:
        self.xq, self.k, self.heap = xq, k, faiss.ResultHeap(len(xq), k, keep_max=True)

    def watch(self, blocks: Blocks) -> Blocks:
        """Yield the blocks unchanged, and remember the nearest rows that passed."""
        for rows, xb in blocks:
            D, I = faiss.knn(self.xq, to_float32(xb), min(self.k, len(xb)), metric=faiss.METRIC_INNER_PRODUCT)
            self.heap.add_result(D, rows[I])
            yield rows, xb
        self.heap.finalize()

    def among(self, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
        """D and I, (nq, k), best first; I is -1 where there are fewer."""
        deque(self.watch(blocks), 0)
        return self.heap.D, self.heap.I


def coded_index(store: Store) -> Index:
    """An index of compact codes, 64 bytes a vector, with its measured recall.

    Vectors are projected on their principal components, rotated at random so that all weigh alike, and coded by product
    quantization in 4 bits. A search scans all codes (André, Kermarrec & Le Scouarnec, VLDB 2015). It compares by L2
    distance, which ranks vectors of length 1 as the inner product does. The codes only choose the rows whose exact
    scores are computed. The shortlist grows until it holds nearly all of the true ten nearest of held-out vectors.
    """
    every = np.fromiter((row for (row,) in store.db.execute("SELECT row FROM features ORDER BY row")), np.int64)
    chosen = np.sort(np.random.default_rng(0).permutation(every)[: TRAINED_ON + HELD_OUT])
    sample = np.concatenate([store.features_of(part)[2] for part in np.array_split(chosen, 16)])
    held = np.arange(len(chosen)) % (len(chosen) // min(HELD_OUT, len(chosen) // 2)) == 0
    width = min(CODED_DIM, store.dim, int(sum(~held))) // 2 * 2
    codes = faiss.index_factory(store.dim, f"PCAR{width},PQ{width // 2}x4fs")
    faiss.downcast_index(codes.index).pq.cp.min_points_per_centroid = 1  # no warning about a small collection
    codes.train(to_float32(sample[~held]))
    nearest, index = Nearest(to_float32(sample[held]), min(TOP + 1, len(every))), faiss.IndexIDMap(codes)
    blocks = store.blocks(last=int(every[-1]))  # SQLite would store and compare a NumPy integer as a BLOB
    build_index(nearest.watch(progress_bar(blocks, desc="compact codes", unit="block")), index)
    true, shortlist = [set(I) - {own} for I, own in zip(nearest.heap.I.tolist(), chosen[held].tolist())], SHORTLIST
    while True:
        found = index.search(nearest.xq, min(shortlist, index.ntotal))[1].tolist()
        recall = sum(len(t & set(f)) for t, f in zip(true, found)) / sum(map(len, true))
        if recall >= RECALL or shortlist >= index.ntotal or 2 * shortlist > LONGEST_SHORTLIST:
            return Index(index, int(every[-1]), shortlist, round(recall, 4), len(every))
        shortlist *= 2


def read_index(store: Store, to_add: bool = False) -> Index | None:
    """The stored index; None if there is none, or if it does not match the checksum that the store noted.

    `to_add`: vectors can be added to it, at the price of a copy in memory.
    """
    size, checksum, *notes = json.loads(store.get_meta("index") or "[0, 0]")
    if not (notes and store.index.is_file()):
        return None
    data: Any = np.memmap(store.index, np.uint8, "r") if store.index.stat().st_size == size else b""
    if zlib.crc32(data) != checksum:
        log.warning("%s is damaged or out of date: it is made again", store.index)
        return None
    if to_add:
        return Index(faiss.read_index(faiss.PyCallbackIOReader(io.BytesIO(data).read)), *notes)
    return Index(faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(data), size)), *notes)._replace(file=data)


def write_index(store: Store, index: Index) -> None:
    """Write the index file, then note its size, checksum and contents in the store."""
    data = faiss.serialize_index(index.faiss)
    with whole_file(store.index) as stream:
        stream.write(data)
    store.put_meta("index", json.dumps([len(data), zlib.crc32(data), *index[1:-1]]))


def updated_index(store: Store, index: Index | None, coded: bool) -> Index:
    """The index with all rows of the store in it: added to, or made anew where that serves better."""
    rows, last = store.count("features"), store.last_row()
    if index and bool(index.shortlist) == coded and rows <= OUTGROWN * (index.trained or rows):
        build_index(store.blocks(index.last + 1, last), index.faiss)
        if index.faiss.ntotal <= 2 * rows:  # else most of it belongs to rows that are gone
            return index._replace(last=last)
    if coded:
        return coded_index(store)
    return Index(build_index(progress_bar(store.blocks(last=last), desc="index", unit="block")), last)


def open_index(store: Store, work: Work = Work()) -> Index:
    """The FAISS index of the store, brought up to date. Without `work.update` a stored one is taken as it is."""
    rows, last = store.count("features"), store.last_row()
    if not last:
        raise DeepVisionError(f"{store.folder} holds no features yet: run without --no-update")
    coded = rows >= FEWEST_CODED and rows * store.dim * 2 > work.exact_bytes
    index = read_index(store)
    if index and (not work.update or (index.last == last and bool(index.shortlist) == coded)):
        return index
    with store.locked():
        index = updated_index(store, read_index(store, to_add=True), coded)
        write_index(store, index)
    return index


def index_on_gpus(store: Store, last: int) -> faiss.Index | None:
    """The features up to row `last` as fp16, spread over the GPUs; None if there is no GPU, or not enough memory."""
    count, rows = faiss.get_num_gpus(), store.count("features")
    if not count or not torch.cuda.is_available():
        return None
    share = -(-last // count)
    if any(torch.cuda.mem_get_info(gpu)[0] < 2 * share * store.dim + GPU_RESERVE for gpu in range(count)):
        log.warning("the %d features do not fit into the memory of the GPU: the search runs on the CPU", rows)
        return None
    index = faiss.IndexShards(store.dim, True, False)  # in threads; the ids are rows already
    for gpu in range(count):
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = gpu, True
        flat = faiss.IndexIDMap(faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), store.dim, config))
        index.add_shard(build_index(store.blocks(gpu * share + 1, min(last, (gpu + 1) * share)), flat))
    return index


# ---- Search ----------------------------------------------------------------------------------------------------------

GPU_QUERIES, GPU_RESULTS = 32, 2048  # views from which on loading pays; results that FAISS gives there at most
QUERY_THREADS = 2  # that read queries; few, since each query has many views
TOGETHER = 16  # queries compared at once: each costs a third of what it costs alone
SCAN_VIEWS = 20  # from so many views on, FAISS compares blocks by multiplying matrices: quicker than the exact index
FIRST_LIST = 64  # rows of the first list of an exact search
CLOSELY = 20  # codes rank inexactly: of the rows that they choose for a list, only the best 1 in 20 are yielded
ROUNDING = 1e-5  # by how much two ways to compute the same score may differ
CANDIDATES = 10  # contents that are aligned with a query, whatever k is
SAMPLED = 8000  # images that `representatives` looks at: 0.7 s with 2048 dimensions, and sizes within 10 %
KMEANS_ROUNDS = 10  # more move no centre by much
MEMBERS = 100  # images of a group, at most


@dataclass(frozen=True)
class Engine:
    """What a search needs; `initialize_reverse_image_search` makes it."""

    images: Path
    model: Model
    store: Store
    index: Index
    exact: bool  # compare with every vector, whatever the index is
    summary: Summary

    @cached_property
    def on_gpus(self) -> faiss.Index | None:
        return index_on_gpus(self.store, self.index.last)


class Seen(NamedTuple):
    """What is computed from the pixels of a query."""

    views: list[str]  # their names
    features: np.ndarray  # of the views, float32 (views, dim)
    local: LocalFeatures
    corner: Sequence[int] = (0, 0)  # left and top of the part that was searched with, in pixels of the whole query


class Scored(NamedTuple):
    """A content of the store, compared with a query."""

    score: float
    digest: bytes
    view: int  # number of the query's view that scores best


class Found(NamedTuple):
    """A file of the collection, compared with a query."""

    score: float
    digest: bytes
    path: str
    view: str


def best_rows(D: np.ndarray, I: np.ndarray, count: int) -> np.ndarray:
    """The `count` rows with the highest scores in any view, from scores D and rows I, (views, n)."""
    rows = dict.fromkeys(I.ravel()[np.argsort(-D, axis=None, kind="stable")].tolist())
    return np.array([row for row in rows if row >= 0][:count], np.int64)


def candidate_rows(engine: Engine, xq: np.ndarray, splits: Sequence[int], count: int) -> list[np.ndarray]:
    """For each query, rows that include its `count` nearest ones.

    xq holds the views of all queries, (views, dim), and `splits` the number of views of each query. Rows that are not
    in the index yet are compared one by one. So are all rows if the search is exact or has many views.
    """
    index, last = engine.index, engine.store.last_row()
    scans = engine.exact or (not index.shortlist and len(xq) >= SCAN_VIEWS)
    found = []
    if not scans:
        on_gpus = index.shortlist and len(xq) >= GPU_QUERIES and count <= GPU_RESULTS and engine.on_gpus
        D, I = (on_gpus or index.faiss).search(xq, min(count, index.faiss.ntotal))
        found.append((-D if index.shortlist and not on_gpus else D, I))  # codes give distances
    if scans or last > index.last:
        first = 0 if scans else index.last + 1
        found.append(Nearest(xq, min(count, last)).among(engine.store.blocks(first, last)))
    ends = np.cumsum(splits)[:-1]
    parts = [[best_rows(*pair, count) for pair in zip(np.split(D, ends), np.split(I, ends))] for D, I in found]
    return [np.unique(np.concatenate(rows)) for rows in zip(*parts)]


def exact_scores(store: Store, xq: np.ndarray, rows: np.ndarray) -> list[Scored]:
    """The contents of these rows, compared with a query's views, (views, dim), best first."""
    _, digests, vectors = store.features_of(rows)
    if not digests:
        return []
    xb = to_float32(vectors)
    S = xb @ xq.T  # (rows, views)
    views = (S.max(1, keepdims=True) - ROUNDING <= S).argmax(1)  # of equal views the first: the query as it is
    D = np.einsum("nd,nd->n", xb, xq[views]).clip(-1, 1)  # computed row by row, so that it is the same in any company
    return sorted(map(Scored, D.tolist(), digests, views.tolist()), key=lambda it: (-it.score, it.digest))


def first_list(engine: Engine) -> int:
    """Rows of the first list of every search."""
    return engine.index.shortlist if engine.index.shortlist and not engine.exact else FIRST_LIST


def ranked(engine: Engine, xq: np.ndarray, rows: np.ndarray) -> Iterator[Scored]:
    """All contents of the store, compared with a query's views, xq (views, dim), best first. `rows`: its first list.

    Rows are looked up in lists, each four times as long as the last. A list yields only its scores above `bound`: below
    it, a longer list may find rows that this one lacks. `end` is the bound of the lists before. A row that a longer
    list finds above `end` comes too late and is left out, so that the order never depends on how many are asked for.
    """
    by_codes, count, end = bool(engine.index.shortlist) and not engine.exact, first_list(engine), math.inf
    while True:
        is_last = count >= engine.index.faiss.ntotal and count >= engine.store.last_row()
        scored = exact_scores(engine.store, xq, rows)
        trusted = count // CLOSELY if by_codes else count - 1
        bound = -math.inf if is_last or not scored else scored[min(trusted, len(scored) - 1)].score + ROUNDING
        yield from (it for it in scored if it.score > bound and it.score <= end)
        if is_last:
            return
        count, end = 4 * count, min(end, bound) if scored else end
        if by_codes and count > LONGEST_SHORTLIST:
            by_codes, engine = False, replace(engine, exact=True)
        (rows,) = candidate_rows(engine, xq, [len(xq)], count)


def location(path: str) -> str:
    """Where a file lies, not where it points: a link to an image of the collection is a query like any other."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def nearest_files(engine: Engine, query: Picture, scored: Iterable[Scored], k: int) -> list[Found]:
    """The files nearest to the query, by score, then by path.

    It goes on until there are k files and CANDIDATES contents, and then to the end of equal scores. The query's own
    file and files that have changed since they were indexed are left out.
    """
    found, contents, own = list[Found](), 0, location(os.fsdecode(query.file.path))
    for score, digest, view in scored:
        if len(found) >= k and contents >= CANDIDATES and score < found[-1].score:
            break
        paths = list[str]()
        for file in engine.store.files_with(digest):
            path = os.path.join(engine.images, os.fsdecode(file.path))
            with suppress(OSError):  # it is gone
                if File.of(file.path, os.stat(path)) == file and (digest != query.digest or location(path) != own):
                    paths.append(path)
            if len(paths) == k:
                break
        found += [Found(score, digest, path, query.pixels.views[view]) for path in paths]
        contents += bool(paths) and digest != query.digest
    return sorted(found, key=lambda it: (-it.score, it.path))


@lru_cache(maxsize=1024)  # 200 MB; many queries share candidates
def read_local(path: str, digest: bytes) -> LocalFeatures | None:
    """Local features of a file; None if it cannot be read, or if its content has another hash than `digest`."""
    read = read_picture(File(os.fsencode(path), 0, 0), b"", local_features)
    return read.pixels if read.digest == digest and not read.vanished else None


def copies_among(query: Picture, found: Sequence[Found]) -> dict[bytes, Region]:
    """Where the first CANDIDATES contents are copies of the query, by content."""
    paths = {it.digest: it.path for it in reversed(found)}
    best = [digest for digest in dict.fromkeys(it.digest for it in found) if digest != query.digest][:CANDIDATES]

    def aligned(digest: bytes) -> Region | None:
        candidate = read_local(paths[digest], digest)
        region, (left, top) = align(query.pixels.local, candidate) if candidate else None, query.pixels.corner
        return region and region._replace(outline=[(x + left, y + top) for x, y in region.outline])

    with ThreadPoolExecutor(usable_cores(), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        return {digest: region for digest, region in zip(best, threads.map(aligned, best)) if region}


def compared(
    queries: Iterable[str | Path], engine: Engine, k: int, views: str, crop: Sequence[float] | None = None
) -> Iterator[tuple[Picture, list[Found], dict[bytes, Region]]]:
    """For each query: the picture, at least k nearest files by score, and the Region of each copy by its hash."""
    model, one_query = engine.model, threading.Lock()

    def look_at(image: Image.Image) -> Seen:
        image, *corner = cut_out(image, crop) if crop else (image, 0, 0)
        with one_torch_thread():
            # A JPEG is decoded once: large enough for both, or the views would differ from what was indexed.
            local = local_features(image, QUERY_AREA, QUERY_POINTS, model.side)
            seen = query_views(image, model, views)
        with nullcontext() if model.network is describe else one_query:  # a network uses all cores, or the GPU
            return Seen([view.name for view in seen], features_of_views(seen, model), local, corner)

    read = partial(read_picture, root=b"", transform=look_at)
    files = (File(os.fsencode(name), 0, 0) for name in queries)
    pictures = read_ahead(read, files, QUERY_THREADS, TOGETHER)
    while group := list(itertools.islice(pictures, TOGETHER)):
        features = [picture.pixels.features for picture in group if picture.pixels]
        splits = [len(part) for part in features]
        lists: dict[int, list[Found]] = {}
        with engine.store.snapshot():
            rows = candidate_rows(engine, np.concatenate(features), splits, first_list(engine)) if features else []
            of_rows = iter(rows)
            for i, query in enumerate(group):
                if query.pixels:
                    scored = ranked(engine, query.pixels.features, next(of_rows))
                    lists[i] = nearest_files(engine, query, scored, k)
        for i, query in enumerate(group):
            query = query._replace(digest=None) if crop else query  # a part is not identical to the file
            yield query, lists.get(i, []), copies_among(query, lists.get(i, []))


def is_mirrored(corners: Sequence[tuple[float, float]]) -> bool:
    """Whether these corners, of a picture from its top left clockwise, run the other way round in another picture."""
    (x0, y0), (x1, y1), _, (x3, y3) = corners
    return (x1 - x0) * (y3 - y0) < (y1 - y0) * (x3 - x0)


def ranked_matches(
    query: Picture, found: Sequence[Found], copies: dict[bytes, Region], threshold: float | str
) -> list[Match]:
    """The matches of a query: identical files first, then copies, then the rest, each by score.

    copies     where the contents that are copies show the query
    threshold  score, or label, that a match has at least
    """
    kept = []
    for score, digest, path, view in found:
        label = "identical" if digest == query.digest else "copy" if digest in copies else ""
        if label in LABELS[LABELS.index(threshold) :] if isinstance(threshold, str) else round(score, 3) >= threshold:
            region = copies.get(digest)
            if region:  # the alignment knows whether the copy is mirrored; the view only scored best
                words = [word for word in view.split(", ") if word not in ("", "mirrored")]
                view = ", ".join(["mirrored"] * is_mirrored(region.corners) + words)
            kept.append(Match(0, path, score, label == "identical", label, view, region))
    kept.sort(key=lambda match: (("identical", "copy", "").index(match.label), -match.score, match.path))
    return [match._replace(rank=rank) for rank, match in enumerate(kept, start=1)]


@contextmanager
def damage_reported(store: Store) -> Iterator[None]:
    """Turn damage of the store into a DeepVisionError that says what to do."""
    try:
        with damage_noticed():
            yield
    except DamageError as error:
        raise DeepVisionError(f"{store.path} is damaged ({error}). Run the command again to repair it") from error


def search(
    queries: str | Path | Iterable[str | Path], engine: Engine | None = None, *,
    k: int = TOP, threshold: float | str = -1.0, views: str = "auto",
    crop: Sequence[float] | None = None,
) -> Iterator[Answer]:  # fmt: skip
    """What looks like each of the image files `queries`: an Answer for each, in their order.

    engine     by default `initialize_reverse_image_search()`
    k          matches at most; a picture that is there under several names gives several
    threshold  cosine similarity, -1 to 1, that a match has at least, or label: copy, identical
    views      none, auto or all: the edits that a query is searched with, see `query_views`
    crop       the part of each query to search with: left, top, right, bottom, see `cut_out`

    Identical files and verified copies come first, then the others by score, equal scores by path. The query's own file
    is left out, and so is a file that is no longer what was indexed. Scores are exact; in a large collection a match
    may be missed, see `coded_index`. A file that cannot be used gets an Answer with an `error`. Raises DeepVisionError
    if features turn out to be damaged.
    """
    if k < 1 or views not in VIEWS or (isinstance(threshold, str) and threshold not in LABELS):
        raise ValueError(f"k={k}, threshold={threshold!r}, views={views!r}: see the documentation of search")
    engine = engine or initialize_reverse_image_search()
    names = [queries] if isinstance(queries, (str, os.PathLike)) else queries
    with damage_reported(engine.store):
        for query, found, copies in compared(names, engine, k, views, crop):
            matches = ranked_matches(query, found, copies, threshold)[:k]
            error = None if query.pixels else query.reason or NOT_AN_IMAGE
            yield Answer(os.fsdecode(query.file.path), matches, error)


def representatives(engine: Engine, count: int) -> list[tuple[int, list[Match]]]:
    """At most `count` groups of images that look alike, the largest first: each with its size and some of its images.

    k-means over a sample of the stored features. The images of a group stand in the order of their distance from its
    centre. A size is exact if the sample holds the whole collection, else an estimate.
    """
    # A digest is a hash: the first ones are a random sample.
    sample = f"SELECT row, path FROM {USABLE.replace('WHERE', 'JOIN features USING (digest) WHERE')}"
    with damage_reported(engine.store):
        files = engine.store.db.execute(f"{sample} ORDER BY digest, path LIMIT {SAMPLED}").fetchall()
        rows, _, vectors = engine.store.features_of({row for row, _ in files})
    xb = to_float32(vectors[np.searchsorted(rows, [row for row, _ in files])])
    options: dict[str, Any] = {"niter": KMEANS_ROUNDS, "spherical": True, "min_points_per_centroid": 1}
    kmeans, groups = faiss.Kmeans(engine.store.dim, min(count, len(xb)), **options), list[tuple[int, list[Match]]]()
    kmeans.train(xb)
    D, I = kmeans.index.search(xb, 1)
    for centre in set(I[:, 0].tolist()):
        members = np.flatnonzero(I[:, 0] == centre)
        nearest = members[np.argsort(-D[members, 0], kind="stable")][:MEMBERS].tolist()
        paths = [os.path.join(engine.images, os.fsdecode(files[i][1])) for i in nearest]
        images = [Match(n, path, float(D[i, 0]), False) for n, (i, path) in enumerate(zip(nearest, paths), start=1)]
        groups.append((round(len(members) / len(xb) * engine.summary.images), images))
    return sorted(groups, key=lambda group: (-group[0], group[1][0].path))


# ---- Duplicates ------------------------------------------------------------------------------------------------------

NEIGHBOURS = 100  # files of a group that is found by score, at most
WHOLE = 0.95  # share of a picture's area from which on it counts as all of it


class Pair(NamedTuple):
    """Two contents of the collection that belong together."""

    keep: bytes
    other: bytes
    score: float
    relation: str = ""  # what the other one is to the one to keep: "same picture", "mirrored", "crop, 60 %"


def different_files(engine: Engine, digest: bytes) -> list[str]:
    """The paths of the files with this content, by path. A link to one of them is no other file."""
    root, found = os.path.realpath(engine.images), dict[tuple[int, int], str]()
    names = [os.fsdecode(file.path) for file in engine.store.files_with(digest)]
    for name in sorted(names, key=lambda name: os.path.realpath(os.path.join(root, name)) != os.path.join(root, name)):
        path = os.path.join(engine.images, name)
        with suppress(OSError):  # gone meanwhile
            info = os.stat(path)
            found.setdefault((info.st_dev, info.st_ino), path)
    return sorted(found.values())


def pairs_by_score(engine: Engine, threshold: float) -> Iterator[Pair]:
    """The contents of the collection that score `threshold` or more with each other."""
    store, least = engine.store, threshold - 0.0005  # as it is printed
    for rows, xb in progress_bar(store.blocks(), desc="comparing", unit="block"):
        D, I = Nearest(to_float32(xb), min(NEIGHBOURS + 1, store.count("features"))).among(store.blocks())
        one, place = np.nonzero((least <= D) & (rows[:, None] != I) & (I >= 0))
        others = I[one, place]
        known, digests, _ = store.features_of({*rows.tolist(), *others.tolist()})
        digest_of = dict(zip(known.tolist(), digests))
        for row, other, score in zip(rows[one].tolist(), others.tolist(), D[one, place].tolist()):
            if row in digest_of and other in digest_of:
                yield Pair(digest_of[row], digest_of[other], min(1.0, score))


def relation(corners: Sequence[tuple[float, float]], shown: float, inside: float) -> str:
    """What a picture is to the one to keep: "same picture", "mirrored", "crop, 60 %", ...

    corners  its own corners in pixels of the picture to keep
    shown    share of the picture to keep that is visible in this picture
    inside   share of this picture that is visible in the picture to keep
    """
    (x0, y0), (x1, y1), *_ = corners
    mirrored = is_mirrored(corners)
    angle = round(-math.degrees(math.atan2(y1 - y0, x1 - x0)) + 180 * mirrored) % 360  # clockwise
    words = ["mirrored"] if mirrored else []
    if min(angle, 360 - angle) >= 3:
        words.append(f"turned {angle}°")
    if shown < WHOLE:
        words.append(f"crop, {shown:.0%}".replace("%", " %"))
    elif inside < WHOLE:
        words.append(f"within a larger picture, {inside:.0%} of it".replace("%", " %"))
    return ", ".join(words) or "same picture"


def pairs_by_alignment(engine: Engine) -> Iterator[Pair]:
    """Each two contents of the collection that are copies, as two Pairs: either one may be the one to keep."""
    first = engine.store.db.execute(f"SELECT min(path) FROM {USABLE} GROUP BY digest ORDER BY 1").fetchall()
    queries = [os.path.join(engine.images, os.fsdecode(path)) for (path,) in first]
    answers = compared(queries, engine, 1, COPIES)
    for query, found, copies in progress_bar(answers, total=len(queries), desc="comparing", unit="img"):
        score = {it.digest: it.score for it in found}
        for digest, region in copies.items():
            size, mask = query.pixels.local.size, Image.new("1", (100, 100))
            outline = 100 * np.array(region.outline) / size  # of the match, where the query measures 100 × 100
            ImageDraw.Draw(mask).polygon([(x, y) for x, y in outline.tolist()], fill=1)
            common = float(np.asarray(mask).mean())
            share = common * 100**2 / abs(np.linalg.det(outline[[1, 3]] - outline[0]))  # of the match
            yield Pair(digest, query.digest, score[digest], relation(region.corners, share, common))
            yield Pair(query.digest, digest, score[digest], relation(region.outline, common, share))


def picture_size(path: str) -> int:
    """Width × height of an image file, by its header; 0 if it cannot be read."""
    try:
        with open(path, "rb") as stream, Image.open(stream) as image:
            return image.width * image.height
    except Exception:  # Pillow raises anything at all on a malformed header
        return 0


def grouped(engine: Engine, pairs: dict[bytes, dict[bytes, Pair]], label: str) -> Iterator[Group]:
    """Groups of files that hold the same picture, those with the largest keeper first.

    pairs  those that belong together: by the content to keep, then by the other one
    label  of the files beside the one to keep, unless they are identical to it

    Every file of a group was compared with the one to keep. A copy of a copy does not join the group by that alone.
    """
    repeated = engine.store.db.execute(f"SELECT digest FROM {USABLE} GROUP BY digest HAVING count(*) > 1").fetchall()
    files = {digest: different_files(engine, digest) for digest in {*pairs, *(digest for (digest,) in repeated)}}
    paths = {digest: found[0] for digest, found in files.items() if found}
    order = dict[bytes, tuple[int, int, str]]()
    for digest, path in paths.items():
        with suppress(OSError):  # it is gone meanwhile
            order[digest] = -picture_size(path), -os.path.getsize(path), path
    done = set[bytes]()
    for keep in sorted(order, key=lambda digest: order[digest]):
        if keep in done:
            continue
        done.add(keep)
        found = [Match(0, path, 1.0, True, "identical") for path in files[keep][1:]]
        others = [pair for other, pair in pairs.get(keep, {}).items() if other in order and other not in done]
        for pair in sorted(others, key=lambda pair: (-pair.score, paths[pair.other])):
            done.add(pair.other)
            found += [Match(0, path, pair.score, False, label, pair.relation) for path in files[pair.other]]
        if found:
            yield Group(paths[keep], [match._replace(rank=rank) for rank, match in enumerate(found, start=1)])


def find_duplicates(engine: Engine, threshold: float | str = "copy") -> Iterator[Group]:
    """Groups of files in the collection that hold the same picture. No file is touched.

    threshold  copy: pictures that align, also mirrored, turned or cropped; identical: the same bytes; or a cosine
               similarity, -1 to 1, that two pictures have at least, whether they align or not

    Raises DeepVisionError if features turn out to be damaged.
    """
    pairs: dict[bytes, dict[bytes, Pair]] = {}
    with damage_reported(engine.store):
        if threshold != "identical":
            for pair in pairs_by_alignment(engine) if threshold == "copy" else pairs_by_score(engine, float(threshold)):
                others = pairs.setdefault(pair.keep, {})
                others[pair.other] = max(pair, others.get(pair.other, pair), key=lambda pair: pair.score)
        yield from grouped(engine, pairs, "copy" if threshold == "copy" else "")


# ---- Assembly --------------------------------------------------------------------------------------------------------

SAVE_SECONDS = 10  # work at risk when the process is killed; 30 are promised
RANKS_WAIT = 30  # days that a rank of torchrun waits for the slowest one
CRASH = b"Fatal Python error"  # faulthandler begins with this what it writes when a decoder crashes the process
# The process that tries the files: it writes a dot before each one. The last dot stands for the one that crashed
READ_EACH = """import os, sys, main
for path in sys.stdin.buffer.read().split(b"\\0"):
    os.write(1, b".")
    main.read_picture(main.File(path, 0, 0), b"", lambda image: main.to_rgb(image, 224))"""


def skip_crashing_file(store: Store, images: Path, work: Work) -> None:
    """If a decoder has crashed the run before, find the file in a process of its own and note it as skipped."""
    if CRASH not in store.last_words:
        return
    files = {os.path.join(os.fsencode(images), it.path): it for it in store.unread()}
    at_risk = list(
        itertools.islice(files, None if work.rebuild else 2 * BLOCK * work.ranks)
    )  # no run reads more than this before it saves
    path = filter(None, [os.path.dirname(os.path.abspath(__file__)), os.environ.get("PYTHONPATH")])
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", READ_EACH]
    done = subprocess.run(command, input=b"\0".join(at_risk), capture_output=True, env=here)
    if done.stdout and done.returncode not in (0, 1):
        bad = files[at_risk[len(done.stdout) - 1]]
        store.save([Picture(bad, reason=CRASHES)])
        with store.db:
            store.db.execute("DELETE FROM changes WHERE path = ?", (bad.path,))


def read_new(store: Store, into: Store, images: Path, model: Model, work: Work) -> Summary:
    """Read the files that the last scan of `store` chose, and save their features in the store `into`.

    It saves every few seconds, and also when an error or an interrupt ends the run. If a decoder crashes the process,
    faulthandler writes that into the lock file, for `skip_crashing_file`.
    """
    known = partial(store.is_known, after=store.last_row() if work.rebuild else 0)
    to_pixels = get_transform(model.side, model.resample)
    read = partial(read_picture, root=os.fsencode(images), transform=to_pixels, known=known)
    size, workers = work.batch_size or model.batch, work.workers or usable_cores()
    files, summary = filter(work.is_mine, store.unread()), Summary()
    if model.network is describe:  # small operations gain nothing from cores: each thread describes what it reads
        groups = iter(lambda: list(itertools.islice(files, size)), [])
        batches = read_ahead(
            lambda group: next(with_features(map(read, group), model, size)), groups, workers, AHEAD_MOST // size
        )
    else:
        pictures = read_ahead(read, files, workers, min(AHEAD_BATCHES * size + workers, AHEAD_MOST))
        batches = with_features(pictures, model, size)
    unsaved, start = list[Picture](), time.perf_counter()
    saved = start
    label = f"{model.name} on {model.device}, {model.precision}"
    bar = progress_bar(total=store.count(UNREAD) // work.ranks, desc=label, unit="img")
    with open(store.lock_file.lock_file, "ab") as last_words, bar:
        faulthandler.enable(last_words)
        try:
            for batch in batches:
                unsaved += batch
                summary.add(batch)
                bar.update(len(batch))
                if time.perf_counter() - saved > SAVE_SECONDS or len(unsaved) > BLOCK:
                    whole, unsaved = unsaved, []  # if saving fails, it is not tried again below
                    into.save(whole, work.rebuild)
                    saved = time.perf_counter()
        finally:
            faulthandler.disable()
            if unsaved:
                into.save(unsaved, work.rebuild)
    return replace(summary, seconds=time.perf_counter() - start)


def scan(store: Store, images: Path, work: Work) -> int:
    """Compare the folder `images`, which may be missing, with the store; how many files differ."""

    def unlisted(error: OSError) -> None:
        what = f"{escape_controls(os.fsdecode(error.filename))} cannot be listed ({error.strerror})"
        if work.prune:  # what lies in it would be forgotten
            raise DeepVisionError(f"{what}: nothing was pruned")
        log.warning("%s", what)

    files = find_images(images, unlisted, [store.folder.parent], work.exclude) if images.is_dir() else ()
    return store.scan(files, work.rebuild)


def merge_ranks(store: Store) -> Summary:
    """Store what the ranks of torchrun have read, also those that were stopped, and delete their databases."""
    summary = Summary()
    for path in sorted(store.folder.glob("rank-*.sqlite")):
        share = Store(store.folder, store.identity, store.dim, path.name)
        share.make_sound()  # its rank may have been stopped
        summary.opened += share.count("files")
        summary.new += share.count(USABLE)
        share.close()
        store.merge_rank(path)
        for done in store.folder.glob(f"{path.name}*"):  # a rank that was killed may have left its journal, too
            done.unlink()
    return summary


def store_changes(store: Store, images: Path, model: Model, work: Work) -> Summary | None:
    """Read what is new, and note what is gone. If no usable image would remain, note nothing and return None."""
    with store.locked():
        shares = merge_ranks(store)
        if shares.opened or store.scanned != store.version():
            scan(store, images, work)
        skip_crashing_file(store, images, work)
        before = store.last_row()
        summary = read_new(store, store, images, model, work)
        if work.ranks > 1:  # else they are what a stopped run has left
            summary.opened, summary.new = summary.opened + shares.opened, summary.new + shares.new
        if not store.mark_presence():
            return None
        known = f"features JOIN files USING (digest) WHERE there AND row <= {before}"
        if not work.rebuild and store.any(GONE) and not store.any(known):
            strange = f"of the images that {store.folder} knows, none is in {images}"
            if work.prune:
                raise DeepVisionError(f"{strange}: nothing was pruned")
            log.warning("%s. If that is another collection, give it an --index-dir of its own", strange)
        if work.prune:
            summary.forgotten = store.count(GONE)
            store.prune()
    return summary


def update(store: Store, images: Path, model: Model, work: Work) -> Summary:
    """Bring the store up to date with the folder `images`; what was found and done.

    Raises DeepVisionError if no usable image is there. The store keeps what it has: the drive may only be unplugged.
    """
    summary: Summary | None = Summary()
    if scan(store, images, work) or work.prune or work.ranks > 1 or store.get_meta("decoders") is None:
        summary = store_changes(store, images, model, work)
    skipped = store.count(SKIPPED)
    if summary and store.any(USABLE):
        return replace(summary, images=store.count(USABLE), skipped=skipped, gone=store.count(GONE))
    there = "has no usable image" if images.is_dir() else "is not a folder" if images.exists() else "is missing"
    advice = "put images to search in there, or name another folder with --images"
    if known := store.count("files WHERE digest IS NOT NULL"):
        there += f", but the index knows {known:,}"
        advice = "is a drive not connected, or is --images another folder? Nothing was changed; to start afresh, "
        advice += f"delete {store.folder}"
    elif skipped:
        query = f"SELECT count(*), reason FROM {SKIPPED} GROUP BY reason ORDER BY 1 DESC, 2 LIMIT 3"
        there += f", all {skipped:,} were skipped"
        advice = "; ".join(f"{n:,} × {reason}" for n, reason in store.db.execute(query))
    raise DeepVisionError(f"{images} {there}: {advice}")


@contextmanager
def store_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the disk or the database into a DeepVisionError."""
    try:
        yield
    except (OSError, sqlite3.Error, DamageError, NotImplementedError) as error:  # the last: a disk without locks
        raise DeepVisionError(
            f"the index in {folder} cannot be used: {first_line(error)}. Check the free space and the permissions, "
            "or choose another folder with --index-dir"
        ) from error


def open_store(folder: Path, model: Model, whole: bool) -> Store:
    """The store in the folder, made or repaired if need be. `whole`: it is checked whole, unless it is large."""
    if any((folder / name).exists() for name in OLD_FILES):
        log.warning("%s holds an index of an older format: all images are indexed anew", folder)
    store = Store(folder, model.identity, model.dim)
    try:
        store.check(whole)
    except DamageError:  # or it is new
        store.repair()
    return store


def prepare(store: Store, images: Path, model: Model, work: Work) -> Engine:
    """Update the store, open its index: the engine of a search."""
    with damage_noticed():
        known = Summary(store.count(USABLE), store.count(SKIPPED))
        summary = update(store, images, model, work) if work.update else known
        index = open_index(store, work)
    return Engine(
        images, model, store, index, work.exact, replace(summary, recall=None if work.exact else index.recall)
    )


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
    if not (work.update or Path(folder, "index.sqlite").exists()):
        raise DeepVisionError(f"there is no index of {images} by {model.name} in {index_dir}: run without --no-update")
    if model.name == MODEL and not folder.exists() and any(Path(index_dir).glob(f"{OFFLINE}-*")):
        log.warning("the weights of %s are here now: all images are indexed with it; the offline index is kept", MODEL)
    with store_errors(folder):
        store = open_store(folder, model, whole=work.update)
        try:
            engine = prepare(store, images, model, work)
        except DamageError:
            store.repair()
            engine = prepare(store, images, model, work)
        for name in OLD_FILES:
            (folder / name).unlink(missing_ok=True)
    return engine


def wait_for_ranks() -> None:
    """Wait until all ranks of torchrun have come here."""
    try:
        torch.distributed.barrier()
    except RuntimeError as error:
        raise DeepVisionError("another rank of torchrun has stopped: run it again, what was done is saved") from error


def read_share(images: Path, folder: Path, model: Model, work: Work) -> None:
    """As a rank of torchrun: read a share of the new files into a database that the next update takes in.

    All ranks meet twice: once rank 0 has made the store sound and holds its lock, and when all have read.
    """
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=RANKS_WAIT))
    with store_errors(folder):
        if work.rank:
            wait_for_ranks()  # for rank 0, which makes the store sound, and holds the lock for all ranks
        store = open_store(folder, model, whole=not work.rank)
        with nullcontext() if work.rank else store.locked():
            if not work.rank:
                merge_ranks(store)
                scan(store, images, work)
                skip_crashing_file(store, images, work)
                wait_for_ranks()
            share = Store(folder, model.identity, model.dim, f"rank-{work.rank}.sqlite")
            share.make_sound()  # it is new
            scan(store, images, work)
            read_new(store, share, images, model, work)
            share.close()
            wait_for_ranks()
        store.close()


# ---- Output ----------------------------------------------------------------------------------------------------------


def verdict(found: Answer | Group) -> str:
    """What the matches amount to; empty if there is a copy. Else the best of many would pass for the picture."""
    if isinstance(found, Group):
        return f"keep: the best of {len(found.matches) + 1}"
    return ("" if found.matches[0].label else "no copy found") if found.matches else "no match"


def remark_on(match: Match) -> str:
    """What is said of a match: its label, how much of it the query shows, and the edit that was undone."""
    covers = f"covers {match.region.covers:.0%}".replace("%", " %") if match.region else ""
    return ", ".join(filter(None, (match.label, covers, match.view)))


def as_text(found: Answer | Group, engine: Engine, colour: bool = False) -> str:
    """A heading line, then `rank  score  path  label, view` for each match."""
    bold, green, plain = ("\x1b[1m", "\x1b[32m", "\x1b[0m") if colour else ("", "", "")
    about = [f"({engine.model.name}, {engine.summary.images:,} images)", verdict(found)]
    if isinstance(found, Group):
        about = [f"({verdict(found)})"]
    lines = [f"{bold}{escape_controls(found[0])}{plain}  {': '.join(filter(None, about))}"]
    for match in found.matches:
        remark = f"{green}{remark_on(match)}{plain}" if match.label else remark_on(match)
        rank = str(match.rank).rjust(len(str(len(found.matches))))
        lines.append(f"  {rank}  {match.score:6.3f}  {escape_controls(match.path)}  {remark}".rstrip())
    return "\n".join(lines)


def as_json(found: Answer | Group, engine: Engine) -> str:
    """One object on one line, in ASCII, so that any file name makes valid JSON."""
    if found.error:
        return json.dumps({found._fields[0]: found[0], "error": found.error})
    matches = []
    for match in found.matches:
        region = match.region and {key: value for key, value in match.region._asdict().items() if key != "outline"}
        matches.append({**match._asdict(), "score": round(match.score, 6), "region": region})
    return json.dumps({found._fields[0]: found[0], "model": engine.model.name, "matches": matches})


def print_found(found: Answer | Group, engine: Engine, form: str) -> None:
    """Print on stdout, at once. `form`: text, json, or null: the paths byte for byte, each with a NUL at its end."""
    if form == "json":
        print(as_json(found, engine), flush=True)
    elif form == "null" and not found.error:
        sys.stdout.buffer.write(b"".join(os.fsencode(match.path) + b"\0" for match in found.matches))
        sys.stdout.buffer.flush()
    elif not found.error:
        terminal = sys.stdout.isatty() and os.name == "posix" and os.environ.get("TERM") != "dumb"
        print(as_text(found, engine, colour=terminal and not os.environ.get("NO_COLOR")), flush=True)


# ---- Page ------------------------------------------------------------------------------------------------------------

THUMBNAIL, THUMBNAIL_BYTES = 256, 6200  # pixels of the longer side; at most, so that 100 queries × 10 make 10 MB
QUALITIES = (70, 40, 15, 0)  # of WebP: a photograph takes 5 KB with the first, nearly always
PROFILE_BYTES = 1000  # the largest colour profile kept: Display P3 and Adobe RGB take 560, the usual sRGB 3144
PAGE_PICTURES = 5000  # on a page, 40 MB; the rest is left to the other outputs
PAGE_SKIPPED = 100  # reasons listed on a page
STYLE = """
*{box-sizing:border-box;--soft:light-dark(#565662,#a9a9b6);--good:light-dark(#0f6a2b,#7fdc98);
--bad:light-dark(#8a4b00,#f2bd70);--card:light-dark(#f3f3f6,#1e1e23)}
h1,h2{font-size:1.4rem;margin:0;font-weight:600}h2{font-size:1.1rem;margin-bottom:.7rem}
section{margin-top:1rem;padding-top:1rem;border-top:1px solid var(--soft);overflow-wrap:anywhere}
b.good,b.bad{padding:.1em .6em;border:2px solid;border-radius:1em}.good{color:var(--good)}.bad{color:var(--bad)}
ol{display:grid;gap:.9rem;list-style:none;margin:0;padding:0}
ol.large{grid-template-columns:repeat(auto-fill,minmax(min(15rem,46%),1fr))}
ol.small{margin-top:.9rem;grid-template-columns:repeat(auto-fill,minmax(min(8rem,29%),1fr));font-size:.85em}
figure{margin:0;height:100%;border-radius:.5rem;overflow:hidden;background:var(--card)}
.identical figure,.copy figure{outline:3px solid var(--good)}figcaption{padding:.5rem .6rem;font-size:.9em}
figure>:first-child{display:block;position:relative;width:100%;aspect-ratio:1}
:focus-visible{outline:3px solid var(--bad);outline-offset:-3px}small{display:block;color:var(--soft)}
figure img,svg,.none{position:absolute;inset:0;width:100%;height:100%;object-fit:contain}.none{padding:1rem}
polygon{fill:none;stroke:#19b35a;stroke-width:3;vector-effect:non-scaling-stroke}
"""
SECTIONS = """
{% if heading %}<h2>{{ heading|text }}</h2>{% endif %}
{% for number, item, rows in found %}<section>{% if item[0] or item.error %}<h2>
{% if item.error %}<b class="bad">✗ {{ item.error|text }}</b>{% elif item.keep %}{{ verdict(item) }}
{% elif verdict(item) %}<b class="bad">✗ {{ verdict(item) }}</b>
{% else %}<b class="good">✓ found</b>{% endif %} {{ item[0]|name }}</h2>{% endif %}
{% for kind, row in rows.items() if row %}<ol class="{{ kind }}" role="list">
{% for match, corners, picture in row %}<li class="{{ match.label }}"><figure>{% if in_ui %}
<button data-item="{{ number }}" data-rank="{{ match.rank }}">{% else %}
<a href="{{ match.path|address }}" title="{{ match.path|name }}">{% endif %}{% if picture.pixels %}
<img src="data:image/webp;base64,{{ picture.pixels[0]|base64 }}" alt="{{ match.path|name }}" loading="lazy"
 {{ "draggable=false" if in_ui }}>{% if corners or in_ui %}
<svg viewBox="0 0 {{ picture.pixels[1] }} {{ picture.pixels[2] }}" aria-hidden="true"><polygon points="
{%- for x, y in corners %}{{ x }},{{ y }} {% endfor %}"/></svg>{% endif %}{% else %}
<span class="none">{{ (picture.reason or "not there any more")|text }}</span>{% endif %}
</{{ "button" if in_ui else "a" }}><figcaption>
{% if match.rank and match.view and item.keep == "" %}
<button data-item="0" data-rank="{{ match.rank }}" data-group="1">{{ match.view }}</button>
{% elif match.rank %}{{ match.rank }} · <b>{{ "%.3f" % match.score }}</b> <span class="{{ 'good' if match.label }}">
{{ remark_on(match) }}</span>{% else %}<b>{{ "keep" if item.keep else "query" }}</b>{% endif %}
{% if in_ui and not match.rank and not item.keep %}
<input data-item="{{ number }}" data-rank="0" placeholder="part: left, top, right, bottom"
 aria-label="Search with a part of it: left, top, right, bottom, in pixels">{% endif %}
<br>{{ match.path|name }}{% if picture.pixels %}<small>
{{ "{1:,} × {2:,} px, {0:,.0f} KB".format(picture.file.size / 1000, *picture.pixels[1:]) }}</small>{% endif %}
</figcaption></figure></li>{% endfor %}</ol>{% endfor %}</section>
{% endfor %}"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }} – DeepVision</title><style>
:root{color-scheme:light dark;background:light-dark(#fff,#121215);color:light-dark(#1a1a1f,#e8e8ee)}
body{margin:auto;max-width:90rem;padding:1rem;font:1rem/1.45 system-ui,sans-serif}{{ style|safe }}
</style></head><body><header><h1>{{ title }}</h1>
{{ "{:,}".format(engine.summary.images) }} images in {{ engine.images|text }} ·
{{ engine.model.name }} on {{ engine.model.device }} · {{ about }}
{% if skipped %}<details><summary>{{ "{:,}".format(engine.summary.skipped) }} skipped</summary><ul>
{% for path, reason in skipped %}<li>{{ path|text }}: {{ reason|text }}</li>{% endfor %}
{% if engine.summary.skipped > skipped|length %}<li>and more, which -v lists</li>{% endif %}</ul></details>{% endif %}
</header><main>{% include "sections" %}</main>
{% if left_out %}<footer>{{ "{:,}".format(left_out) }} more pictures are left out: --json lists all</footer>{% endif %}
</body></html>
"""


def thumbnail(image: Image.Image) -> tuple[bytes, int, int]:
    """A small upright picture, WebP, and the width and height of the whole picture."""
    width, height = image.size
    profile = (image.mode == "RGB" and image.info.get("icc_profile")) or b""
    picture = to_rgb(image, THUMBNAIL)
    if (picture.width - picture.height) * (width - height) < 0:  # turned by EXIF
        width, height = height, width
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    for quality in QUALITIES:
        kept = profile if len(profile) <= PROFILE_BYTES else b""
        picture.save(stream := io.BytesIO(), "WEBP", quality=quality, icc_profile=kept, exif=b"", xmp=b"")
        if stream.tell() <= THUMBNAIL_BYTES:
            break
    return stream.getvalue(), width, height


def with_thumbnails(found: Sequence[Answer | Group]) -> Iterator[tuple[int, Answer | Group, dict[str, list[Any]]]]:
    """Each item with its number and its rows of pictures: "large", the query and its copies, and "small", the rest.

    A picture is a tuple: a Match (of rank 0 for the query), the corners of the outline to draw, and the Picture read,
    whose `pixels` are the thumbnail.
    """
    read, workers = partial(read_picture, root=b"", transform=thumbnail), usable_cores()
    good = [item for item in found if not item.error]
    shown = ([getattr(item, "file", "") or item[0], *(match.path for match in item.matches)] for item in good)
    paths = filter(None, itertools.chain.from_iterable(shown))
    pictures = read_ahead(read, (File(os.fsencode(path), 0, 0) for path in paths), workers, 4 * workers)
    for number, item in enumerate(found):
        regions, rows = [match.region for match in item.matches], {"large": list[Any](), "small": list[Any]()}
        corners = [next((it.outline for it in regions if it), []), *(it.corners if it else [] for it in regions)]
        query = [Match(0, item[0], 1.0, False)] if item[0] else []
        for match in [] if item.error else query + item.matches:
            is_large = match.label or not match.rank
            rows["large" if is_large else "small"].append((match, corners[match.rank], next(pictures)))
        yield number, item, rows


def decode_path(path: str | Path | bytes) -> str:
    """A path as text, whatever it holds."""
    return escape_controls(os.fsencode(path).decode("utf-8", "replace"))


def address(path: str) -> str:
    """Where a link to a path, or to a query that came from an address or from stdin, leads."""
    return path if ADDRESS.match(path) else "" if path == "-" else Path(path).absolute().as_uri()


def template(name: str, path_name: Callable[[str], str] = decode_path) -> jinja2.Template:
    """The template `page` or `sections`. `path_name`: how a path is shown."""
    loader = jinja2.DictLoader({"page": PAGE, "sections": SECTIONS})
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters.update(text=decode_path, name=path_name, address=address)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(name, globals={"verdict": verdict, "remark_on": remark_on, "style": STYLE})


def fitting(found: Sequence[Answer | Group], room: int) -> tuple[list[Answer | Group], int]:
    """The first items with at most `room` pictures, and how many pictures are left out."""
    kept = list[Answer | Group]()
    for item in found:
        if room > 0:
            kept.append(item._replace(matches=item.matches[: room - 1]))
        room -= 1 + len(item.matches)
    return kept, max(0, -room)


def write_page(path: str | Path, found: Sequence[Answer | Group], engine: Engine, seconds: float) -> None:
    """Write all that was found, to look at: one file that needs no other, no script and no network.

    Pictures are read while it is written: memory holds those of one item. Raises DeepVisionError if it cannot be
    written; what was there is untouched then.
    """
    target, (kept, left_out) = Path(os.path.realpath(path)), fitting(found, PAGE_PICTURES)
    title = f"{counted(len(found), 'query', 'queries')}, {sum(not verdict(item) for item in found):,} found"
    if not found or isinstance(found[0], Group):
        title = counted(len(found), "group") if found else "No picture is there twice"
    try:
        if target.exists() and not target.is_file():
            raise FileExistsError(errno.EEXIST, "it exists and is not a regular file")
        with whole_file(target, f".{os.getpid()}") as stream:
            template("page").stream(
                found=with_thumbnails(kept), left_out=left_out, title=title, engine=engine,
                about=f"{time.strftime('%Y-%m-%d %H:%M')}, {seconds:.1f} s", skipped=engine.store.skipped(PAGE_SKIPPED),
            ).dump(stream, "utf-8")  # fmt: skip
    except OSError as error:
        why = error.strerror or first_line(error)
        advice = "choose another place with --report FILE, or --no-report"
        raise DeepVisionError(f"the page {escape_controls(str(path))} cannot be written ({why}): {advice}") from error


# ---- UI --------------------------------------------------------------------------------------------------------------

UPLOAD_BYTES = 300_000_000  # of one file given to --ui: a photograph of 100 million pixels, uncompressed
UI_PICTURES = 500  # of --duplicates that the UI shows, 4 MB
TILES = 24  # pictures that stand for the collection
FULL_SIDE = 1 << 20  # pixels, for `to_rgb`: no JPEG is made smaller
UI_STYLE = """.dark{color-scheme:dark}footer{display:none!important}
.large [data-rank="0"]{touch-action:none;cursor:crosshair}[data-group]{text-decoration:underline}
input[data-item]{width:100%;background:none;border:1px solid;border-radius:.3rem;padding:.1rem .4rem}"""
# A pasted picture is given like a chosen file. The browser's history keeps the number of each view: its Back works.
PAGE_SCRIPT = """() => {
    history.replaceState({view: 0}, "")
    addEventListener("popstate", () => document.querySelector("#back").click())
    document.addEventListener("paste", event => {
        const input = document.querySelector("#given input[type=file]")
        if (!event.clipboardData.files.length) return
        input.files = event.clipboardData.files
        input.dispatchEvent(new Event("change", {bubbles: true}))
    })
}"""
NEW_VIEW = '(here) => history.pushState({view: here}, "")'
OLD_VIEW = "(views, k, least, here) => [views, k, least, history.state?.view || 0]"
# A click sends the number of the picture, so that the browser needs no path. A rectangle that is drawn on a query, or
# written into the field below it, is sent in pixels of that picture. A drag by touch ends without a click.
CLICK_SCRIPT = """let svg, from, part
const place = event => {
    const {x, y} = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse())
    return [x, y]
}
element.addEventListener("pointerdown", event => {
    part = null
    svg = event.target.closest(".large [data-rank='0']")?.querySelector("svg")
    if (!svg) return
    from = place(event)
    event.target.setPointerCapture(event.pointerId)
})
element.addEventListener("pointermove", event => {
    if (!svg || !event.buttons) return
    const [x, y, X, Y] = [...from, ...place(event)]
    svg.firstElementChild.setAttribute("points", [x, y, X, y, X, Y, x, Y])
    part = Math.min(Math.abs(X - x), Math.abs(Y - y)) > 8 ? [x, y, X, Y].join() : null
})
element.addEventListener("pointerup", event => {
    if (part) trigger("click", {...svg.closest("button").dataset, part})
})
element.addEventListener("click", event => {
    const button = event.target.closest("button")
    if (button && !part) trigger("click", {...button.dataset})
    part = null
})
element.addEventListener("change", event => {
    if (event.target.value) trigger("click", {...event.target.dataset, part: event.target.value})
    event.target.value = ""
})"""


def import_gradio() -> None:
    """Raise DeepVisionError if Gradio is not installed; else have it tell nobody that it is used."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    if not importlib.util.find_spec("gradio"):
        raise DeepVisionError("--ui needs Gradio: run `pip install gradio`")


class Desk:
    """What all tabs of the UI share: the engine, and a lock, since its store is for one thread at a time."""

    def __init__(self, engine: Engine, work: Work) -> None:
        self.engine, self.lock = engine, threading.Lock()
        self.groups = list[tuple[int, list[Match]]]()  # of the collection, once it was shown
        self.work = replace(work, update=True, rebuild=False, prune=False, rank=0, ranks=1)

    def update(self) -> None:
        """Bring the index up to date, while the old one goes on answering."""
        old, folder = self.engine, self.engine.store.folder.parent
        torch.set_num_threads(torch_threads())  # a new thread begins with the number that was set last, perhaps 1
        try:
            new = initialize_reverse_image_search(old.images, folder, model=old.model, work=self.work)
        except DeepVisionError as error:
            raise gradio.Error(html.escape(str(error)), print_exception=False) from error
        with self.lock:
            self.engine, self.groups = new, []
            old.store.close()

    def view(self, shown: list[str] | int, k: int, least: float) -> tuple[str, list[Any]]:
        """HTML, and what it shows: the Answers to queries, the group of this number, or with 0 the whole collection."""
        heading, found = "", list[Any]()
        try:
            with self.lock:
                if isinstance(shown, list):
                    found = list(search(shown, self.engine, k=int(k), threshold=float(least)))
                else:
                    self.groups = self.groups or representatives(self.engine, TILES)
                    heading, images = self.collection()
                    if shown:
                        size, images = self.groups[shown - 1]
                        heading = f"{counted(size, 'picture')} that look alike"
                    found = [Group("", images)]
        except DeepVisionError as error:
            found = [Answer("", [], str(error))]
        return as_html(found, heading), found

    def collection(self) -> tuple[str, list[Match]]:
        """A heading, and one image of each group, with the size of the group as its view."""
        summary, model = self.engine.summary, self.engine.model
        where = f"{counted(summary.images, 'image')} in {self.engine.images}, {summary.skipped:,} skipped"
        heading = f"{where}; {model.name} on {model.device}. Click one to search from it, or its group to see that"
        firsts = [images[0]._replace(view=f"group of {size:,}") for size, images in self.groups]
        return heading, [match._replace(rank=rank) for rank, match in enumerate(firsts, start=1)]

    def duplicates(self) -> tuple[str, list[Any]]:
        """HTML, and the groups of files that hold the same picture."""
        old = self.engine.store
        store = Store(old.folder, old.identity, old.dim)  # a connection of its own, so that searches go on meanwhile
        try:
            kept, left_out = fitting(list(find_duplicates(replace(self.engine, store=store))), UI_PICTURES)
        except DeepVisionError as error:
            return as_html([Answer("", [], str(error))]), []
        finally:
            store.close()
        more = f"; {left_out:,} more pictures have no room here: see --duplicates" if left_out else ""
        return as_html(kept, f"{counted(len(kept), 'group')}. Nothing is deleted{more}"), kept

    def cut(self, path: str, part: str) -> str:
        """A file with a part of a picture: left, top, right, bottom, in pixels."""
        file = File(os.fsencode(path), 0, 0)
        read = read_picture(file, b"", lambda image: to_rgb(image, FULL_SIDE))
        try:
            x, y, X, Y = (int(float(number)) for number in part.split(","))
            width, height = read.pixels.size
            box = max(0, min(x, X)), max(0, min(y, Y)), min(width, max(x, X)), min(height, max(y, Y))
            if box[0] >= box[2] or box[1] >= box[3]:
                raise ValueError("it is empty")
        except (ValueError, OverflowError, AttributeError) as error:  # the last: the file cannot be read
            words = f"{part!r} is no part of the picture; expected are its pixels: left, top, right, bottom"
            raise gradio.Error(html.escape(read.reason or words), print_exception=False) from error
        target = os.path.join(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]), "part of a picture.png")
        read.pixels.crop(box).save(target)
        return target

    # What the events of the page call. `views` are those of one browser tab, `here` is the number of the one it shows.

    def visit(self, view: list[str] | int, views: list[Any], k: int, least: float, here: int) -> Any:
        """Show a new view, which takes the place of those after `here`."""
        views = [*views[: int(here) + 1], view]
        return views, len(views) - 1, *self.view(view, k, least), gradio.Tabs(selected="search")

    def again(self, views: list[Any], k: int, least: float, here: int) -> Any:
        """Show the view `here`."""
        here = min(int(here), len(views) - 1)
        return here, *self.view(views[here], k, least)

    def from_given(self, given: list[str], *rest: Any) -> Any:
        """Search with the files that were given, and empty their field. `rest`: what `visit` takes after the view."""
        return None, *self.visit([*given], *rest)

    def from_found(self, event: gradio.EventData, found: list[Any], *rest: Any) -> Any:
        """Search from a picture that was clicked, or from a part of it, or show its group."""
        item, rank, part = found[int(event.item)], int(event.rank), getattr(event, "part", None)
        if getattr(event, "group", None):
            return self.visit(rank, *rest)
        path = item.matches[rank - 1].path if rank else item[0]
        return self.visit([self.cut(path, part) if part else path], *rest)


def as_html(found: Sequence[Answer | Group], heading: str = "") -> str:
    """The sections of the page for the browser: with names instead of paths, and buttons instead of links."""
    sections = template("sections", lambda path: decode_path(os.path.basename(path)))
    return sections.render(found=with_thumbnails(found), heading=heading, in_ui=True)


def user_interface(desk: Desk, top: int) -> Any:
    """The page in the browser, as Gradio Blocks."""
    sections = partial(gradio.HTML, css_template=STYLE, js_on_load=CLICK_SCRIPT, apply_default_css=False)
    with gradio.Blocks(title="DeepVision", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        views, found, groups = gradio.State([0]), gradio.State([]), gradio.State([])  # they stay on this side
        progress = gradio.Progress(track_tqdm=True)
        here, back = gradio.Number(0, visible=False), gradio.Button(visible="hidden", elem_id="back")
        with gradio.Tabs() as tabs:
            with gradio.Tab("Search", id="search"), gradio.Row():
                with gradio.Column(scale=1, min_width=260):
                    label = "Drop, paste or choose pictures"
                    given = gradio.File(label=label, file_count="multiple", height=170, elem_id="given")
                    k = gradio.Slider(1, 100, min(top, 100), step=1, label="How many", elem_id="top")
                    least = gradio.Slider(0, 1, 0, step=0.01, label="From which score", elem_id="least")
                    start = gradio.Button("Show the collection", elem_id="start")
                    renew = gradio.Button("Update the index", elem_id="update")
                with gradio.Column(scale=3):
                    shown = sections(elem_id="found")
            with gradio.Tab("The same picture twice", id="twice"):
                look, twice = gradio.Button("Look for them", elem_id="look"), sections(elem_id="twice")

        def update(progress: Any = progress) -> None:
            desk.update()

        def duplicates(progress: Any = progress) -> Any:
            return desk.duplicates()

        private = {"api_visibility": "private"}
        rest, then = [views, k, least, here], [views, here, shown, found, tabs]
        visits = [
            given.upload(desk.from_given, [given, *rest], [given, *then], **private),
            shown.click(desk.from_found, [found, *rest], then, **private),
            twice.click(desk.from_found, [groups, *rest], then, **private),
            start.click(partial(desk.visit, 0), rest, then, **private),
            renew.click(update, **private).success(partial(desk.visit, 0), rest, then, **private),
        ]
        for visited in visits:
            visited.success(None, here, js=NEW_VIEW, **private)
        gradio.on([k.release, least.release], desk.again, rest, [here, shown, found], **private)
        gradio.on([page.load, back.click], desk.again, rest, [here, shown, found], js=OLD_VIEW, **private)
        look.click(duplicates, None, [twice, groups], **private)
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
    """Serve the UI, to this machine alone, until it is interrupted."""
    with socket.socket() as listening, tempfile.TemporaryDirectory() as folder:  # of what is uploaded
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name == "posix"))
            listening.bind(("127.0.0.1", port))
            listening.listen()  # a browser that connects too early waits
        except OSError as error:
            raise DeepVisionError(f"port {port} is not free ({error.strerror}): choose another with --port") from error
        port, os.environ["GRADIO_TEMP_DIR"] = listening.getsockname()[1], folder
        page = user_interface(Desk(engine, work), top)
        app = gradio.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None), page, "/", "127.0.0.1", port, footer_links=[], run_history=False,
            max_file_size=UPLOAD_BYTES, ssr_mode=False, enable_monitoring=False, show_error=True, css=UI_STYLE,
            js=PAGE_SCRIPT,
        )  # fmt: skip
        page.has_launched = True  # or Gradio would take any path on this machine for an uploaded one
        log.info("http://127.0.0.1:%d", port)
        config = uvicorn.Config(guarded(app, port), log_level="error", timeout_graceful_shutdown=1)
        with suppress(KeyboardInterrupt):  # the way to end it
            uvicorn.Server(config).run([listening])


# ---- Command line ----------------------------------------------------------------------------------------------------

ADDRESS = re.compile("https?://", re.IGNORECASE)  # nothing else is fetched, after a redirect neither
FETCHED_BYTES = 300_000_000  # of one query that comes from an address or from stdin
FETCH_SECONDS = 600  # for one address: FETCHED_BYTES at 0.5 MB/s. A server that sends byte by byte knows no other end
NO_MEMORY = re.compile("alloc|memory|start new thread|map segment")  # in the words of torch, FAISS, Python and ld.so


def score_or_label(text: str) -> float | str:
    if text in LABELS:
        return text
    with suppress(ValueError):
        if -1 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from -1 to 1, and not one of: {', '.join(LABELS)}")


def crop_box(text: str) -> tuple[float, ...]:
    with suppress(ValueError):
        sides = tuple(map(float, text.split(",")))
        if len(sides) == 4 and 0 <= sides[0] < sides[2] < math.inf and 0 <= sides[1] < sides[3] < math.inf:
            return sides
    raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM, in pixels or as shares of the picture")


def check_combination(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    chosen = {"--duplicates": options.duplicates is not None, "--ui": options.ui, "--export": options.export}
    mode = next((option for option, given in chosen.items() if given), "--index-only" if options.index_only else None)
    if options.no_update and (options.index_only or options.rebuild or options.prune or options.exclude):
        parser.error("--no-update cannot be combined with --index-only, --rebuild, --prune or --exclude")
    if options.queries and mode:
        parser.error(f"{mode} takes no QUERY: {options.queries[0]}")
    if options.ui and (options.threshold, options.views) != (-1.0, "auto"):
        parser.error("--ui does not take --threshold or --views")
    if options.ui and options.form != "text":
        parser.error("--ui prints nothing: leave out --json and --null")
    if options.port is not None and not options.ui:
        parser.error("--port works only with --ui")
    if options.duplicates is not None and (options.threshold, options.top, options.views) != (-1.0, TOP, "auto"):
        parser.error("--duplicates does not take --threshold, --top or --views; for a score: --duplicates 0.9")
    if options.crop and mode:
        parser.error(f"--crop applies to a QUERY, and {mode} takes no QUERY")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "queries",
        nargs="*",
        metavar="QUERY",
        help=f"image files, folders, addresses, or - for stdin (default: {QUERIES}/)",
    )
    add("--images", default=IMAGES, metavar="DIR", help="the collection (default: %(default)s/)")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="leave out paths that match; may be repeated")
    add("--index-dir", default=INDEX_DIR, metavar="DIR", help="the cache (default: %(default)s/)")
    add("-k", "--top", type=int, default=TOP, metavar="N", help="matches per query (default: %(default)s)")
    below = "leave out matches below S: a cosine, -1 to 1, or copy, identical"
    add("--threshold", type=score_or_label, default=-1.0, metavar="S", help=below)
    add("--views", choices=VIEWS, default="auto", help="edits of the query to undo (default: auto, the useful ones)")
    part = "search with a part of the query: LEFT,TOP,RIGHT,BOTTOM, in pixels, or as shares of the picture up to 1"
    add("--crop", type=crop_box, metavar="L,T,R,B", help=part)
    add("--model", metavar="NAME", help=f"{MODEL} (default), any torchvision classification model, timm:NAME, offline")
    add("--weights", metavar="NAME|FILE", help=f"torchvision weights (default: {WEIGHTS}) or a local file")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: %(default)s")
    add("--batch-size", type=int, metavar="N", help="images that the model takes at once (default: by device)")
    add("--workers", type=int, metavar="N", help="threads that read and decode (default: one a core)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--index-only", action="store_true", help="update the index, search nothing")
    alike = "list groups of the same picture in the collection; S: copy (default), identical, or the least score"
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
    # -0 is replaced here: if argparse knew it as an option, it would take the -0.5 of `--threshold -0.5` for one too.
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_intermixed_args(["--null" if arg == "-0" else arg for arg in given])
    if options.port is not None and not 0 <= options.port < 65536:
        parser.error(f"--port takes a number from 0 to 65535, not {options.port}")
    if not (options.images and options.index_dir) or options.report == "":
        parser.error("--images and --index-dir take a folder, and --report a file")
    for option in ("top", "batch_size", "workers"):
        if (value := getattr(options, option)) is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} must be 1 or more, not {value}")
    check_combination(options, parser)
    return options


def find_queries(names: Iterable[str], onerror: OnError) -> Iterator[str]:
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


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to addresses alone. urllib itself also follows ftp: where there is a proxy for it."""

    def redirect_request(self, request: Any, body: Any, code: int, reason: str, headers: Any, address: str) -> Any:
        body.close()  # else urllib reads it into memory, however long it is
        if not ADDRESS.match(address):
            raise OSError(f"a redirect to {address} is refused")
        return super().redirect_request(request, body, code, reason, headers, address)


def save_query(name: str, path: str) -> str | None:
    """Write the query `name`, an address or - for stdin, to the file `path`; why that cannot be done, or None."""
    opener, buffer = urllib.request.OpenerDirector(), memoryview(bytearray(1 << 20))
    for handler in ("Proxy", "HTTP", "HTTPS", "HTTPDefaultError", "Unknown"):
        opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    opener.add_handler(Redirects())
    try:
        stdin = getattr(sys.stdin, "buffer", io.BytesIO())  # Python has none if it was closed
        source: Any = nullcontext(stdin) if name == "-" else opener.open(name, timeout=CONNECT_SECONDS)
        with source as stream, open(path, "wb") as target:
            # Not `read`: http.client takes a chunk of -1 bytes for all that comes, and reads it into memory.
            while (count := stream.readinto(buffer)) and target.tell() <= FETCHED_BYTES:
                target.write(buffer[:count])
            size = target.tell()
    except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
        return escape_controls(first_line(error)) or type(error).__name__  # a server's words
    return "it is empty" if not size else f"more than {FETCHED_BYTES:,} bytes" if size > FETCHED_BYTES else None


def fetch(name: str, path: str) -> str | None:
    """As `save_query`, for an address, in at most FETCH_SECONDS."""
    outcome: list[str | None] = [f"not there after {FETCH_SECONDS} seconds"]
    thread = threading.Thread(target=lambda: outcome.append(save_query(name, path)), daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    return outcome[-1]


def answers(options: argparse.Namespace, engine: Engine, folder: str) -> Iterator[Answer | Group]:
    """An Answer for each query, or the groups of --duplicates. Queries that are not on disk are put into `folder`.

    Raises DeepVisionError if there was no query.
    """
    if options.duplicates is not None:
        count = copies = 0
        for group in find_duplicates(engine, options.duplicates):
            count, copies = count + 1, copies + len(group.matches)
            yield group
        return log.info("%s, %s beside those to keep", counted(count, "group"), counted(copies, "file"))
    fetched, unlisted, answered = dict[str, tuple[str, str | None]](), list[OSError](), False

    def on_disk(name: str) -> str:
        if name != "-" and not ADDRESS.match(name):
            return name
        path = os.path.join(folder, str(len(fetched)))
        fetched[path] = name, (save_query if name == "-" else fetch)(name, path)
        if fetched[path][1]:
            with suppress(OSError):  # no such file, or it is still being written
                os.unlink(path)
        return path

    names = find_queries(options.queries or filter(os.path.isdir, [QUERIES]), unlisted.append)
    choices = {"k": options.top, "threshold": options.threshold, "views": options.views, "crop": options.crop}
    for answer in search(map(on_disk, names), engine, **choices):
        if answer.error == NOT_AN_IMAGE and answer.query not in (*options.queries, *fetched):
            continue  # some other file in a folder of queries
        name, error = fetched.get(answer.query, (answer.query, None))
        answered, answer = True, answer._replace(query=name, error=error or answer.error, file=answer.query)
        if answer.error:
            log.error("%s: %s", escape_controls(name), answer.error)
        yield answer
    for failure in unlisted:
        name, error = os.fsdecode(failure.filename), f"cannot be listed ({failure.strerror})"
        log.error("%s %s", escape_controls(name), error)
        yield Answer(name, [], error)
    if not answered and not unlisted:
        where = ", ".join(options.queries) or f"{QUERIES}/"
        raise DeepVisionError(f"no image to search with in {where}: put one there, or name it: main.py photo.jpg")


def write_export(engine: Engine, folder: Path) -> None:
    """Write features.npy, float16 (n, dim), and paths.txt, a line for each row. The first is there only if both are."""
    store = engine.store
    try:
        with store.locked():  # nobody else changes the store meanwhile
            n = store.count("files JOIN features USING (digest) WHERE there")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "features.npy").unlink(missing_ok=True)
            with whole_file(folder / "features.npy") as features, whole_file(folder / "paths.txt") as paths:
                header = {"descr": "<f2", "fortran_order": False, "shape": (n, store.dim)}
                np.lib.format.write_array_header_1_0(features, header)
                for rows, _ in store.blocks():
                    for digest, vector in zip(*store.features_of(rows)[1:]):
                        for file in store.files_with(digest):
                            features.write(vector.tobytes())
                            name = file.path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
                            paths.write(name + b"\n")
    except (OSError, sqlite3.Error, DamageError) as error:
        raise DeepVisionError(f"--export {folder}: {first_line(error)}") from error
    log.info("%s: %d × %d features and their paths", escape_controls(str(folder)), n, store.dim)


def report_update(engine: Engine, options: argparse.Namespace) -> None:
    """Say on stderr what the update found and did."""
    summary, model, images = engine.summary, engine.model, options.images
    done = f"{summary.images:,} images, not checked for changes (--no-update)" if options.no_update else summary
    log.info("%s: %s (%s on %s, %s)", images, done, model.name, model.device, model.precision)
    if summary.recall is not None:
        how = "the search is approximate (recall@%d is %.3f); --exact compares with every image"
        log.info(how, TOP, summary.recall)
    first = engine.store.db.execute(f"SELECT path FROM {USABLE} LIMIT {BLOCK}").fetchall() if options.no_update else ()
    if first and not any(os.path.exists(os.path.join(images, os.fsdecode(path))) for (path,) in first):
        log.warning("none of the first images in the index is in %s any more: is --images the right folder?", images)
    for path, reason in engine.store.skipped() if log.isEnabledFor(logging.DEBUG) else ():
        log.debug("skipped %s: %s", escape_controls(os.path.join(images, os.fsdecode(path))), reason)


def run(options: argparse.Namespace) -> int:
    """Do what the options ask for, and return the exit status."""
    if options.ui:
        import_gradio()  # or it would be missed when all is done
    model, (rank, ranks) = load_model(options.model, options.weights, options.device), rank_of_ranks()
    of_update = options.batch_size, options.workers, options.rebuild, options.prune, not options.no_update
    work = Work(*of_update, options.exact, exclude=tuple(options.exclude), rank=rank, ranks=ranks)
    if ranks > 1 and work.update:  # torchrun
        read_share(Path(options.images), Path(options.index_dir, model.identity), model, work)
        work = replace(work, rebuild=False)
    if rank:
        return 0
    engine = initialize_reverse_image_search(options.images, options.index_dir, model=model, work=work)
    report_update(engine, options)
    if options.export:
        write_export(engine, Path(options.export))
    if options.ui:
        serve(engine, work, PORT if options.port is None else options.port, options.top)
    if options.index_only or options.export or options.ui:
        return 0
    found, start = list[Answer | Group](), time.perf_counter()
    is_fetched = any(name == "-" or ADDRESS.match(name) for name in options.queries)
    with tempfile.TemporaryDirectory() if is_fetched else nullcontext("") as folder:
        for item in answers(options, engine, folder):
            found.append(item)
            print_found(item, engine, options.form)
        if options.report:
            write_page(options.report, found, engine, time.perf_counter() - start)
            log.info("%s", escape_controls(options.report))
    return 1 if any(item.error for item in found) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 all queries answered, 1 something failed, 2 usage, 130 interrupted."""
    options = parse_arguments(argv)
    log.handlers = [logging.StreamHandler()]
    log.setLevel(options.level)
    if rank := rank_of_ranks()[0]:  # the first speaks for all
        log.handlers[0].setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
        log.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="tqdm:")  # its monitor thread failed; not needed
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow doubts is either read or skipped with a reason
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name that is not UTF-8 comes out byte for byte; what an older code page lacks, as an escape.
            utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
            sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
        return run(options)
    except (DeepVisionError, sqlite3.Error) as error:
        log.error("error: %s", escape_controls(str(error)))
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
    """At the first signal, stop and save the work. At a second signal, end at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(130))
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    raise SystemExit(main())
