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
import http.client
import http.server
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
import socketserver
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import unicodedata
import urllib.parse
import urllib.request
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
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
    from PIL import Image, ImageDraw, ImageOps
else:

    class Lazy:
        """A module that is imported when it is first used: torch takes seconds, `--help` and usage errors must not."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            try:
                module = importlib.import_module(self._name)
            except ModuleNotFoundError as error:
                raise DeepVisionError(f"{error}: to install it, run `pip install -r requirements.txt`") from error
            # From now on the name stands for the module itself: this detour would cost each use 5 µs.
            globals().update({name: module for name, value in globals().items() if value is self})
            return getattr(module, attribute)

    faiss, np, torch, torchvision, tqdm = map(Lazy, ("faiss", "numpy", "torch", "torchvision", "tqdm"))
    Image, ImageDraw, ImageOps = map(Lazy, ("PIL.Image", "PIL.ImageDraw", "PIL.ImageOps"))
    filelock, jinja2 = map(Lazy, ("filelock", "jinja2"))  # torch requires them, so they are there

# What the options take, and their defaults
IMAGES = "bulk_images"  # --images
QUERIES = "that_one_image"  # QUERY
INDEX_DIR = "image_index"  # --index-dir
REPORT = "results.html"  # --report
PORT = 7860  # --port, of --ui
TOP = 10  # --top; matches a query
MODEL = "resnet50"  # --model
WEIGHTS = "IMAGENET1K_V1"  # --weights; V2 is worse for retrieval: https://github.com/pytorch/vision/issues/8382
OFFLINE = "offline"  # --model offline: the built-in descriptor, which needs no weights
VIEWS = ("none", "auto", "all")  # --views; what each of them means: see `query_views`
COPIES = "copies"  # a further kind of views, for --duplicates
LABELS = ("copy", "identical")  # of matches, the weaker one first; for --threshold and --duplicates

log = logging.getLogger("deepvision")


# ---- Types and errors ------------------------------------------------------------------------------------------------


class DeepVisionError(Exception):
    """What went wrong, where, and what to do about it, in one line."""


class DamageError(DeepVisionError):  # `initialize_reverse_image_search` repairs the store and tries again
    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}). Run the command again to repair it")


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
    """A file that was read, and its results: in one object, so that no result is taken for another file's."""

    file: File
    digest: bytes | None = None  # hash of the content; None: not a usable image
    made: Any = None  # what `transform` returned: pixels, Seen, LocalFeatures or a thumbnail; None: not computed
    vector: np.ndarray | None = None  # features, fp16 (dim,)
    reason: str | None = None  # why the image cannot be used; None also for a file that was never meant as an image
    vanished: bool = False  # the file went away or changed while it was read


class View(NamedTuple):
    """The query as it may have looked before an edit, placed in the model's square at each pair of a top and a left."""

    name: str  # the edit that is undone; empty: the query as it is
    pixels: torch.Tensor  # uint8 (3, h, w); of the model's side if all tops and lefts are 0
    # Where the pixels start in the model's square. Above 0, they fill a part of it; below 0, it shows a part of them
    tops: Sequence[int] = (0,)  # a tuple, so that `cell_grid` can be cached
    lefts: Sequence[int] = (0,)


class Region(NamedTuple):
    """Where query and match show the same. The four corners of a picture start at its top left, clockwise."""

    corners: list[tuple[float, float]]  # of the query, in pixels of the upright match
    outline: list[tuple[float, float]]  # the corners of the match, in pixels of the upright query
    points: int  # local features that agree
    covers: float  # share of the match's area that is seen in the query, 0 to 1
    inverted: bool = False  # one picture is a negative of the other


class Match(NamedTuple):
    rank: int  # from 1
    path: str
    score: float  # cosine similarity, -1 to 1, of the best view of the query
    identical: bool  # the same bytes as the query
    label: str = ""  # identical, copy or empty
    view: str = ""  # name of the query's best view; of --duplicates: the `relation` of this file to the one to keep
    region: Region | None = None  # of a copy


class Answer(NamedTuple):
    """What was found for a query."""

    query: str  # as it was given
    matches: list[Match]
    error: str | None = None
    file: str = ""  # path of the query's picture; empty: the path is `query`


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
    exact_bytes: int = 1 << 28  # of all vectors; with more, comparing all takes over 0.5 s, and a `coded_index` is used
    exclude: tuple[str, ...] = ()  # patterns of paths, relative to the collection, that are passed over
    rank: int = 0  # of this process, among `ranks` that torchrun started; rank 0 commits
    ranks: int = 1


@dataclass
class Summary:
    """What an update found and did."""

    images: int = 0  # usable ones in the collection
    skipped: int = 0
    gone: int = 0
    forgotten: int = 0  # by --prune
    opened: int = 0  # files, in this run
    new: int = 0  # usable ones among them, new or changed
    recognised: int = 0  # of the new ones: known by content, because the file was moved, copied or brought back
    seconds: float = 0.0  # that reading and the model took; 0: not measured, several ranks of torchrun did it

    def add(self, pictures: Sequence[Picture]) -> None:
        """Count pictures that this run has read."""
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
COSTLY_FORMATS = {"WEBP", "JPEG2000"}  # decoding takes the memory of four images: the limit is half of MAX_PIXELS
LARGE_PIXELS = 24_000_000  # pixels; larger images are decoded one at a time, which bounds memory
DRAFT_SCALE = 3  # a JPEG is decoded at no less than 3 times the model's side; with 2, thin stripes change
DIGEST_BYTES = 16  # bytes of the SHA-256 that identifies a content
PREPROCESSING = 2  # version, part of a model's identity; raise it when the same file would get other pixels
SYSTEM_NAMES = {b"@eadir", b"thumbs.db", b"desktop.ini", b"$recycle.bin", b"system volume information", b"__macosx"}
NOT_DECODED = {"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "FTEX"}  # EPS starts Ghostscript; Pillow cannot read the others

one_large_image = threading.Lock()  # held while an image of more than LARGE_PIXELS is decoded


def find_images(
    folder: str | Path, onerror: Callable[..., None], without: Sequence[str | Path] = (), exclude: Sequence[str] = ()
) -> Iterator[File]:
    """Every file below `folder` that may be an image, in the order of paths. No folder is listed twice.

    onerror is called with the OSError of what cannot be listed. Folders in `without`, and relative paths that fit one
    of the shell patterns in `exclude`, are left out. Links are followed.
    """
    root, separator = os.fsencode(folder), os.fsencode(os.sep)
    visited = {os.stat(path)[1:3] for path in without}  # inode and device
    waiting = [File(separator, 0, 0)]  # a stack of files and folders; a folder's path ends with a separator
    while waiting:
        file = waiting.pop()
        if not file.path.endswith(separator):
            yield file
            continue
        found, above = list[File](), file.path.removeprefix(separator)
        try:
            here = os.path.join(root, above.removesuffix(separator))
            identity = os.stat(here)[1:3]
            entries = () if identity in visited else list(os.scandir(here))
        except OSError as error:
            onerror(error)
            continue
        visited.add(identity)
        for entry in entries:
            path, name = above + entry.name, entry.name.lower()
            excluded = exclude and any(fnmatch.fnmatch(os.fsdecode(path), pattern) for pattern in exclude)
            if name.startswith(b".") or name in SYSTEM_NAMES or excluded:
                continue
            try:
                found.append(File.of(path + separator if entry.is_dir() else path, entry.stat()))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):  # a broken link, or a file that is gone by now
                    onerror(error)
        waiting += sorted(found, reverse=True)


@cache
def image_formats() -> tuple[list[str], set[str], str]:
    """The formats that can be decoded here, the suffixes of their file names, and the version of the decoders."""
    Image.init()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow refuses headers of more than twice this
    version = Image.__version__
    with suppress(ImportError):
        heif = importlib.import_module("pillow_heif")
        heif.register_heif_opener()
        version += f", pillow_heif {heif.__version__}"
    formats = [name for name in Image.ID if name not in NOT_DECODED]
    return formats, {suffix for suffix, name in Image.registered_extensions().items() if name in formats}, version


def open_image(stream: BinaryIO, path: str) -> Image.Image | None:
    """The image in `stream`, only its header read. None: no image, nor named like one. ValueError: a broken one."""
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


def read_picture(file: File, root: bytes, transform: Callable[..., Any], known: Any = lambda _: False) -> Picture:
    """Read a file of the folder `root`: a Picture with its hash and, unless known(hash), with transform(image).

    The Picture of a file that cannot be used has a reason instead. No error in a file reaches the caller.
    """
    path = os.path.join(root, file.path)
    try:
        file = File.of(file.path, os.stat(path))
        if not os.path.isfile(path):  # opening a FIFO would wait for a writer forever
            return Picture(file, reason="not a regular file", vanished=not os.path.exists(path))
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


def read_path(path: str | bytes | Path, transform: Callable[[Image.Image], Any]) -> Picture:
    """Read a file by its whole path, as `read_picture` does."""
    return read_picture(File(os.fsencode(path), 0, 0), b"", transform)


def to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits (I;16, I) or floating point (F) in 8 bits. Pillow itself would clip the values."""
    values = torch.from_numpy(np.array(image, np.float32)).nan_to_num_(0, 0, 0)
    is_clear = values == image.info.get("transparency", math.nan)  # white in the end, as in `to_rgb`
    low, high = min(0.0, float(values.min())), float(values.max())
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)  # the usual values of white
    white = next((scale for scale in scales if high <= scale), high)  # the least of them that no value exceeds
    levels = values.sub_(low).mul_(255 / (white - low)).add_(0.5).byte()  # in place: 0.4 GB for 100 million pixels
    return Image.fromarray(levels.masked_fill_(is_clear, 255).numpy())


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
        if image.has_transparency_data:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")


def usable_cores() -> int:
    """The number of cores for this process. torchrun's processes on one machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def read_ahead(read: Callable[[Any], Any], files: Iterable[Any], workers: int, ahead: int) -> Iterator[Any]:
    """`read(file)` for each file, in order, computed by `workers` threads. At most `ahead` results wait."""
    threads = ThreadPoolExecutor(workers)
    results = (threads.submit(read, file) for file in files)
    try:
        pending = deque(itertools.islice(results, ahead))
        while pending:
            yield pending.popleft().result()
            pending.extend(itertools.islice(results, 1))
    finally:
        threads.shutdown(cancel_futures=True)


# ---- Descriptor ------------------------------------------------------------------------------------------------------

OFFLINE_SIDE = 96  # pixels; 128 gains nothing, 64 costs 1 point of recall
OFFLINE_BATCH = 16  # images at once: 0.3 ms each, against 0.8 ms alone; more do not fit into the cache
EDGE_CELLS, COLOUR_CELLS = 8, 4  # cells along a side; fewer EDGE_CELLS lose small crops, more lose turns by 10°
DIRECTIONS = 16  # in which edges are counted; dark to light is another direction than light to dark
SHARPNESS = 5  # times that the cosine between edge and direction is squared: only the nearest one or two count
EDGE_POWER = 0.3  # to which the counts of the edges are raised: a strong edge says little more than a weak one
ORDERS = (0.5, 1.0, 1.0, 1.3, 1.3, 1.7, 1.7)  # weight of each order of the Fourier transform over the directions
BRIGHTNESS_WEIGHT, HUE_WEIGHT, MEAN_WEIGHT = 0.2, 0.3, 0.02  # of these parts of a vector; the edges have 1
LEAST_COSINE = 0.25  # a smaller cosine counts as this: its power would be a denormal number, which is slow
TINY = 1e-12  # a smaller weight counts as 0, for the same reason
FAINT = 100.0  # a part of a vector is divided by its norm, but at least by this: less is noise; photographs have 200 up
OPPONENT = ((0.299, 0.587, 0.114), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0))  # RGB to brightness, red-green, yellow-blue


@lru_cache(maxsize=64)
def cell_grid(cells: int, tops: Sequence[int], lefts: Sequence[int], height: int, width: int) -> list[torch.Tensor]:
    """How much each row and column of pixels (height, width) counts in each cell, if they start at each top and left.

    Returns the weights of the rows, (tops * cells, height), those of the columns, (width, lefts * cells), and the share
    of each cell that the pixels cover, (tops * lefts, 1, cells, cells).
    """
    distance = (torch.arange(OFFLINE_SIDE) + 0.5) * cells / OFFLINE_SIDE - (torch.arange(cells)[:, None] + 0.5)
    weights = torch.exp(-2 * distance**2)  # of a pixel by its distance, in cells, from the cell's centre; sigma: 0.5
    weights = torch.where(weights > TINY, weights / weights.sum(1, keepdim=True), 0)
    rows, columns = (  # negative padding cuts off what lies outside
        torch.cat([torch.nn.functional.pad(weights, (-start, start + length - OFFLINE_SIDE)) for start in starts])
        for starts, length in ((tops, height), (lefts, width))
    )
    inside = torch.einsum("ti,lj->tlij", *(side.sum(1).view(-1, cells) for side in (rows, columns)))
    return [rows, columns.T.contiguous(), inside.reshape(-1, 1, cells, cells)]


@cache
def fourier() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosine and sine of each direction, (DIRECTIONS, 1, 1), and a Fourier matrix, (DIRECTIONS, 2 * len(ORDERS) - 1).

    The matrix turns one value for each direction into coefficients, weighted by ORDERS.
    """
    phase = 2 * math.pi / DIRECTIONS * torch.arange(DIRECTIONS)[:, None] * torch.arange(len(ORDERS))
    cosine, sine = phase.cos(), phase.sin()
    even, odd = torch.tensor(ORDERS) * cosine, torch.tensor(ORDERS) * sine
    matrix = torch.cat([even[:, :1] / math.sqrt(2), even[:, 1:], odd[:, 1:]], 1)
    return cosine[:, 1, None, None], sine[:, 1, None, None], matrix


@cache
def cosine_transform(cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cosine transform and the weights of its coefficients, both (cells, cells): a low frequency weighs least."""
    k = torch.arange(cells, dtype=torch.float32)
    cosines = torch.cos(math.pi / cells * k[:, None] * (k + 0.5))
    cosines[0] /= math.sqrt(2)
    return cosines, 1 + torch.hypot(k[:, None], k)


def cell_means(planes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The mean of planes (B, c, h, w) in each cell, (B * tops * lefts, c, cells, cells), where there are pixels.

    rows, columns and inside are what `cell_grid` returns. With several tops or lefts, B must be 1.
    """
    cells = inside.shape[3]
    sums = (rows @ planes @ columns).unflatten(3, (-1, cells)).unflatten(2, (-1, cells))
    return sums.permute(0, 2, 4, 1, 3, 5).flatten(0, 2) / (inside + 1e-9)


def edge_strengths(light: torch.Tensor) -> torch.Tensor:
    """The strength of the edge at each pixel in each direction, (B, DIRECTIONS, h, w), of brightness (B, 1, h, w)."""
    framed = torch.nn.functional.pad(light, (1, 1, 1, 1), mode="replicate")
    dx, dy = framed[..., 1:-1, 2:] - framed[..., 1:-1, :-2], framed[..., 2:, 1:-1] - framed[..., :-2, 1:-1]
    slope = torch.hypot(dx, dy) + 1e-3  # of 255: no division by 0 where it is flat
    root = slope  # its root is taken, because the loop below squares it: the strength is slope * cosine ** 32
    for _ in range(SHARPNESS):
        root = root.sqrt()
    cosine, sine, _ = fourier()
    strength = (dx * root / slope * cosine).addcmul_(dy * root / slope, sine).clamp_(min=LEAST_COSINE)
    for _ in range(SHARPNESS):
        strength.square_()  # a power would take twice as long
    return strength


def whiten(maps: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Weighted cosine coefficients, (B, c, cells² - 1), of maps (B, c, cells, cells) less their mean over `inside`."""
    maps = (maps - (maps * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True)) * inside
    cosines, weight = cosine_transform(inside.shape[3])
    return (cosines @ (maps @ cosines.T) * weight).flatten(2)[:, :, 1:]


def describe_squares(pixels: torch.Tensor, tops: Sequence[int] = (0,), lefts: Sequence[int] = (0,)) -> torch.Tensor:
    """A vector that needs no weights and no training, from uint8 (B, 3, side, side) to float32 (B, dim).

    Directions of brightness edges, counted in soft cells as in HOG (Dalal & Triggs, CVPR 2005) and compressed by a
    power, and a layout of the colours. Both are whitened by a fixed rule, so that unrelated pictures score near 0: the
    mean is removed, cells and directions are transformed, and what is strong in every picture gets a low weight.

    With tops and lefts, the pixels are (1, 3, h, w). Each pair of a top and a left gives the vector of the square in
    which the pixels start there, see `View`. What of the square lies outside the pixels does not count.
    """
    planes = torch.einsum("oc,bcyx->boyx", torch.tensor(OPPONENT), pixels.float())
    edge_grid, colour_grid = (cell_grid(cells, tops, lefts, *pixels.shape[2:]) for cells in (EDGE_CELLS, COLOUR_CELLS))
    counts = cell_means(edge_strengths(planes[:, :1]), *edge_grid)
    edges = whiten(torch.einsum("bdyx,do->boyx", counts**EDGE_POWER, fourier()[2]), edge_grid[2])
    colours = whiten(cell_means(planes, *colour_grid), colour_grid[2])
    mean = planes.mean((2, 3)).expand(len(edges), 3) / 255  # of all pixels; all that a blank picture has
    weighted = (1.0, edges), (BRIGHTNESS_WEIGHT, colours[:, :1]), (HUE_WEIGHT, colours[:, 1:])
    parts = [weight * torch.nn.functional.normalize(part.flatten(1), eps=FAINT) for weight, part in weighted]
    return torch.cat([*parts, MEAN_WEIGHT * mean, torch.full_like(mean[:, :1], MEAN_WEIGHT)], 1)


def describe(pixels: torch.Tensor) -> torch.Tensor:
    """`describe_squares` for OFFLINE_BATCH images at once: else the last bit of a vector depends on the batch size."""
    filled = torch.nn.functional.pad(pixels, (0, 0, 0, 0, 0, 0, 0, -len(pixels) % OFFLINE_BATCH))
    return torch.cat([describe_squares(part) for part in filled.split(OFFLINE_BATCH)])[: len(pixels)]


def offline_model() -> Model:
    """The built-in descriptor, a model like any other. It runs on the CPU, with one thread."""
    dim = (2 * len(ORDERS) - 1) * (EDGE_CELLS**2 - 1) + 3 * (COLOUR_CELLS**2 - 1) + 4
    return Model(OFFLINE, f"{OFFLINE}-v1-p{PREPROCESSING}-{dim}", OFFLINE_SIDE, dim, "cpu", describe, OFFLINE_BATCH)


# ---- Model -----------------------------------------------------------------------------------------------------------

# The file of MODEL's WEIGHTS. torchvision knows its address, but takes 1.2 s to import, in vain without a network
WEIGHTS_URL = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
CONNECT_SECONDS = 10  # timeout of a connection; without one, torch.hub hangs for minutes if the network drops packets
SIDE = 224  # pixels; the side of ResNet50's input
REDUCING_GAP = 32.0  # Image.resize(reducing_gap=): huge images are box-averaged first, which bounds memory
GPU_BATCH = {"cuda": 256, "mps": 64}  # images at once
CPU_BATCH_PER_CORE, CPU_BATCH_MOST = 4, 32  # images at once; with 4 for each core, a layer's output stays in its cache
MIN_COSINE = 0.999  # least similarity of a fast form's features to those of plain fp32; below it, another form is used
AHEAD_BATCHES, AHEAD_MOST = 4, 1024  # how far decoding runs ahead of the model: 4 batches, but at most 1024 files
Recipe = tuple[int, Sequence[float], Sequence[float], str]  # side, mean and deviation of each channel, resampling

torch_threads = cache(lambda: torch.get_num_threads())  # torch's own number: `one_torch_thread` asks, then changes it


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Have torch compute small operations with one thread: more take up to five times as long on a busy machine."""
    threads = torch_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_weights(network: torch.nn.Module, path: str | Path, *heads: str) -> None:
    """Load the tensors of the file `path` into a network without its classifier, the layers `heads`.

    The tensors may be wrapped as `state_dict`, or have the prefix `module.` of multi-GPU training. None may be missing.
    If no name fits, as in files of other libraries, but the kind, shape and order of all tensors do, the order counts.
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
        own = network.state_dict()
        fits = [[(k.rpartition(".")[2], getattr(v, "shape", 0)) for k, v in it.items()] for it in (own, state)]
        fits[1][len(own) : len(own) + 2] = []  # the weight and bias of a classifier by another name
        if not own.keys() & state.keys() and fits[0] == fits[1]:
            log.info("%s: no name of a tensor fits, but all shapes do: the tensors are taken in their order", path)
            state = dict(zip(own, state.values()))
        network.load_state_dict(state, assign=True)
    except Exception as error:  # a file that holds something else raises anything at all
        reason = " ".join(str(error).split()).partition(". ")[0]  # torch goes on with advice to load the file unsafely
        advice = "if it was downloaded, delete it and try again"
        raise DeepVisionError(f"{path} does not hold the weights of this model: {reason[:500]}; {advice}") from error
    network.float()


def one_kernel(layer: Any, then: str = "none", *limits: float) -> Callable[..., torch.Tensor]:
    """A function that convolves like `layer`, adds its second argument, if any, and applies `then`, within `limits`."""
    geometry, kernels = (layer.padding, layer.stride, layer.dilation, layer.groups), torch.ops.mkldnn
    # The weights in the order in which the kernel reads them, by the shape of its input
    weight = cache(lambda *shape: kernels._reorder_convolution_weight(layer.weight, *geometry, shape))

    def compute(x: torch.Tensor, *other: torch.Tensor) -> torch.Tensor:
        args = (*other, weight(1, *x.shape[1:]), layer.bias, *geometry)
        if other:
            return kernels._convolution_pointwise.binary(x, *args, "add", 1.0, then, [], None)
        return kernels._convolution_pointwise.default(x, *args, then, limits, "")

    return compute


def layers_of_torch(network: torch.nn.Module) -> torch.nn.Module:
    """A copy with layers of torch in place of timm's, which cannot be traced or folded. The padding is that of inputs
    whose side is a multiple of the stride; where one is not, `fastest_form` sees other features and refuses."""
    network = deepcopy(network)
    for name, layer in list(network.named_modules()):
        if type(layer).__name__ == "Conv2dSame":
            spare = layer.kernel_size[0] - layer.stride[0]
            pad, layer.__class__ = torch.nn.ZeroPad2d((spare // 2, spare - spare // 2) * 2), torch.nn.Conv2d
            network.set_submodule(name, torch.nn.Sequential(pad, layer))
        elif type(layer).__name__ == "BatchNormAct2d":
            layer.__class__ = torch.nn.BatchNorm2d
            network.set_submodule(name, torch.nn.Sequential(layer, layer.act))
    return network


def fuse_convolutions(network: torch.fx.GraphModule) -> None:
    """Compute each convolution, the sum after it and the activation after that by one kernel, whatever the batch size.

    torch.compile does the same. It is 5 % faster still, but takes 17 s to start.
    """
    graph, add, nn = network.graph, (operator.add, operator.iadd, torch.add), torch.nn
    known: dict[Any, Any] = dict.fromkeys((nn.ReLU, nn.functional.relu, torch.relu), ("relu",))
    known |= {nn.ReLU6: ("hardtanh", 0.0, 6.0), nn.SiLU: ("swish",), nn.Hardswish: ("hardswish",)}
    layers = {node: network.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    convolutions = [node for node, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    for last in list(reversed(graph.nodes)):
        convolution, addends = last, list[Any]()  # `last`: a convolution, its activation, or its sum's ReLU
        if then := known.get(type(layers[last]) if last in layers else last.target, ()):
            convolution = last.args[0]
            if then == ("relu",) and convolution.target in add and len(convolution.users) == 1:
                *addends, convolution = sorted(convolution.args, key=convolutions.__contains__)
        if convolution in convolutions and (convolution is last or len(convolution.users) == 1):
            with graph.inserting_before(last):
                kernel = one_kernel(layers[convolution], *then)
                last.replace_all_uses_with(graph.call_function(kernel, (*convolution.args, *addends)))
            graph.erase_node(last)
    graph.eliminate_dead_code()
    network.recompile()


def forward(pixels: torch.Tensor, network: Any, dtype: torch.dtype, mean: Any, std: Any) -> torch.Tensor:
    """Features, float32 (B, dim), of pixels, uint8 (B, 3, side, side), in precision `dtype`. mean, std: (3, 1, 1)."""
    scaled = (pixels.contiguous(memory_format=torch.channels_last).float() / 255 - mean) / std
    return network(scaled.to(dtype)).float().flatten(1)


def fused(plain: partial[torch.Tensor], dtype: torch.dtype, kernels: bool) -> partial[torch.Tensor]:
    """A copy of `plain`, a partial of `forward`, in precision `dtype`. kernels: see `fuse_convolutions`."""
    fold = importlib.import_module("torch.fx.experimental.optimization").fuse
    with one_torch_thread():
        network = fold(layers_of_torch(plain.keywords["network"]), True).to(dtype, memory_format=torch.channels_last)
    if kernels:
        fuse_convolutions(network)
    return partial(plain, network=network, dtype=dtype)


def seconds_of(network: Callable[..., torch.Tensor], sample: torch.Tensor) -> float:
    """The least time of three passes."""
    return min(timeit.repeat(lambda: network(sample), number=1, repeat=3))


def fastest_form(plain: partial[torch.Tensor], sample: torch.Tensor, note: Path) -> tuple[partial[torch.Tensor], int]:
    """The fastest form of `plain` that gives nearly the same features of `sample`, and the dimension of the features.

    On a GPU that is fp16. On a CPU all forms are timed, for 2 seconds with ResNet50: bf16 with our kernels takes half
    the time of fp32 without on an AMD Zen 5, and three times as long on an Intel Xeon. The file `note` remembers it.
    """
    device, dtypes = sample.device.type, {"fp16": torch.float16, "fp32": torch.float32}
    if device == "cpu":  # emulated bf16 takes four times as long as fp32
        native = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtypes = {**({"bf16": torch.bfloat16} if native else {}), "fp32": torch.float32}
    processor = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    machine = [torch.__version__, device, processor, *dtypes]
    with suppress(Exception):  # there is no note, or a damaged one
        *tried_on, name, kernels, dim = json.loads(note.read_text())
        if tried_on == machine:
            return fused(plain, dtypes[name], kernels), dim
    expected, found = plain(sample), list[tuple[float, str, bool, partial[torch.Tensor]]]()
    with_kernels = (True, False) if device == "cpu" and torch.backends.mkldnn.is_available() else (False,)
    for name, kernels in itertools.product(dtypes, with_kernels):
        with suppress(Exception):  # a network that looks at its pixels cannot be fused, and raises anything at all
            fast = fused(plain, dtypes[name], kernels)
            if torch.cosine_similarity(fast(sample), expected).min() >= MIN_COSINE:
                found.append((seconds_of(fast, sample) if device == "cpu" else len(found), name, kernels, fast))
    if not found:
        return plain, expected.shape[1]
    _, name, kernels, fast = min(found, key=operator.itemgetter(0))
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps([*machine, name, kernels, expected.shape[1]]))
    return fast, expected.shape[1]


def assemble_model(name: str, network: torch.nn.Module, recipe: Recipe, device: str) -> Model:
    """A Model around the network. It computes in the fastest form that gives the features of the network in fp32."""
    side, mean, std, resample = recipe
    sha = hashlib.sha256(repr((side, *mean, *std, resample)).encode())
    for key, value in sorted(network.state_dict().items()):
        sha.update(key.encode() + value.numpy().tobytes())
    identity = re.sub(r"[^\w.-]", "-", f"{name}-{sha.hexdigest()[:8]}-p{PREPROCESSING}")
    network = network.eval().to(device).to(memory_format=torch.channels_last)
    centre, spread = (torch.tensor(list(values), device=device).view(3, 1, 1) for values in (mean, std))
    noise = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255  # enlarged: two blurred pictures
    sample = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 255).byte().to(device)
    with torch.inference_mode():
        plain = partial(forward, network=network, dtype=torch.float32, mean=centre, std=spread)
        fast, dim = fastest_form(plain, sample, Path(torch.hub.get_dir(), f"{identity}.json"))
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(fast.keywords["dtype"], "fp32")
    batch = GPU_BATCH.get(device) or min(CPU_BATCH_PER_CORE * usable_cores(), CPU_BATCH_MOST)
    return Model(name, f"{identity}-{dim}", side, dim, device, fast, batch, resample, precision)


def timm_model(name: str, weights: str | Path | None, device: str) -> Model:
    """A model of the timm library. `weights`: a file; None: those of timm, which are kept in the Hugging Face cache."""
    try:
        timm = importlib.import_module("timm")
        network = timm.create_model(name.removeprefix("timm:"), pretrained=weights is None, num_classes=0)
    except ImportError as error:
        raise DeepVisionError(f"--model {name} needs timm: run `pip install timm`") from error
    except (OSError, RuntimeError, ValueError) as error:  # no such model, or its weights cannot be had
        raise DeepVisionError(f"--model {name}: {first_line(error)}") from error
    if weights is not None:
        heads = network.pretrained_cfg.get("classifier") or []  # a model may have none, or several
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
            log.warning("there is a GPU, but torch %s cannot use it (%s): the CPU is used", torch.__version__, reason)
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
    """An RGB image, resized to uint8 (3, height, width), whatever its proportions. resample: a method of Pillow."""
    resized = image.resize((width, height), Image.Resampling[resample.upper()], reducing_gap=REDUCING_GAP)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def get_transform(side: int = SIDE, resample: str = "bilinear") -> Callable[[Image.Image], torch.Tensor]:
    """A function that turns any Pillow image into uint8 (3, side, side). Give it a model's `side` and `resample`.

    The whole picture is squeezed into a square: a crop of its centre would lose what stands at the edges.
    """
    return lambda image: squeeze(to_rgb(image, side), side, side, resample)


def launch(pixels: torch.Tensor, model: Model, size: int) -> tuple[torch.Tensor, int]:
    """Features (B, dim), each of length 1, and the batch size: `size`, or less if the memory of the GPU is too small.

    The GPU may still be computing when this returns.
    """
    pixels = pixels.pin_memory() if model.device == "cuda" else pixels
    while True:
        try:
            with torch.inference_mode(), one_torch_thread() if model.network is describe else nullcontext():
                parts = (part.to(model.device, non_blocking=True) for part in pixels.split(size))
                found = [torch.nn.functional.normalize(model.network(part)) for part in parts]
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
        formats, transform = image_formats()[0], get_transform(model.side, model.resample)  # HEIC too, but not EPS
        opened = (it.copy() if isinstance(it, Image.Image) else Image.open(it, formats=formats) for it in images)
        images = torch.stack([transform(image) for image in opened])
    if images.shape[1:] != (3, model.side, model.side):
        raise ValueError(f"pixels are {tuple(images.shape[1:])}, {model.name} takes (3, {model.side}, {model.side})")
    return launch(images, model, model.batch)[0].cpu().numpy()


def to_float32(block: np.ndarray) -> np.ndarray:
    """The block as contiguous float32. torch converts fp16 several times as fast as NumPy does."""
    return torch.from_numpy(np.ascontiguousarray(block)).float().numpy()


def with_features(pictures: Iterator[Picture], model: Model, size: int) -> Iterator[list[Picture]]:
    """The pictures in order, in lists of `size`; those with pixels in `made` have features in place of the pixels.

    A GPU gets the next batch before the results of the last one are fetched.
    """
    under_way: deque[tuple[list[Picture], torch.Tensor]] = deque()
    while (batch := list(itertools.islice(pictures, size))) or under_way:
        if batch:
            pixels = [picture.made for picture in batch if picture.made is not None]
            found, size = launch(torch.stack(pixels), model, size) if pixels else (torch.empty(0), size)
            under_way.append((batch, found))
        if not batch or len(under_way) > (model.device != "cpu"):
            done, found = under_way.popleft()
            vectors = iter(found.cpu().numpy().astype(np.float16))
            yield [p if p.made is None else p._replace(made=None, vector=next(vectors)) for p in done]


# ---- Query views -----------------------------------------------------------------------------------------------------

# Parts of a query that may be pictures of their own: width by height, and size as a share of the largest that fits
SHAPES, SIZES = (0.75, 1.33, 1.78), (1.0, 0.8, 0.63, 0.5)  # without 0.8, a fifth of the bordered products are missed
SMALLEST_PART = 0.08  # least share of the query's area in a part; a long query has too many smaller ones
# Steps in which a part moves by its own width (or height). 3 steps miss a quarter of the pictures that fill 40 % of
# the query, 5 miss a tenth. A network takes fewer steps, because it computes each part by itself
PLACES, NETWORK_PLACES = 5, 3
LARGER = ((0.80, 2), (0.67, 3), (0.52, 5))  # share of the larger picture's side that the query has; places per axis
TURNS = (-30, -20, -10, 10, 20, 30)  # degrees
SMALLEST = 128  # pixels; a query with a shorter side than this is not searched by its parts
VIEW_SIDE = 3  # parts and turns are computed from a picture whose shorter side is at most 3 times the model's


def crop_box(text: str) -> tuple[float, ...]:
    """The value of --crop: left, top, right, bottom."""
    with suppress(ValueError):
        sides = tuple(map(float, text.split(",")))
        if len(sides) == 4 and 0 <= sides[0] < sides[2] < math.inf and 0 <= sides[1] < sides[3] < math.inf:
            return sides
    raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM, in pixels or as shares of the picture")


def cut_out(image: Image.Image, part: Sequence[float]) -> tuple[Image.Image, int, int]:
    """A part of the upright picture, and its left and top there. Raises ValueError if it does not lie in the picture.

    part  left, top, right, bottom in pixels, or as shares of the picture's sides if none is over 1
    """
    picture = to_rgb(image, max(image.size))
    scale = (*picture.size, *picture.size) if max(part) <= 1 else (1, 1, 1, 1)
    left, top, right, bottom = box = [round(value * full) for value, full in zip(part, scale)]
    if not (0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height):
        raise ValueError(f"--crop {box} does not lie within the picture of {picture.width} × {picture.height} pixels")
    return picture.crop((left, top, right, bottom)), left, top


def parts_of(picture: Image.Image, model: Model, sizes: Sequence[float]) -> Iterator[View]:
    """Views of parts of the query, one View for each of SHAPES and `sizes`: for each, the query is resized once."""
    side, (width, height) = model.side, picture.size
    places = PLACES if model.name == OFFLINE else NETWORK_PLACES
    for shape, size in itertools.product(SHAPES, sizes):
        across, down = size * min(1.0, shape * height / width), size * min(1.0, width / shape / height)  # shares
        if across * down >= SMALLEST_PART:
            whole = squeeze(picture, round(side / across), round(side / down), model.resample)
            tops, lefts = (
                tuple(np.linspace(0, -room, 1 + math.ceil(places * room / side)).round().astype(int).tolist())
                for room in (whole.shape[1] - side, whole.shape[2] - side)
            )
            yield View("part of the query", whole, tops, lefts)


def query_views(image: Image.Image, model: Model, views: str) -> list[View]:
    """The views of a query: as it is, and as it would be before an edit. `views` is one of these kinds:

    none    the query as it is
    all     also mirrored, turned, as a negative, its parts; with the offline descriptor also as a part of a larger one
    auto    all with the offline descriptor; with a network, 9 to 25 views: mirrored and its largest parts
    copies  for --duplicates: auto without parts and small turns
    """
    offline, whole, side = model.name == OFFLINE, to_rgb(image, model.side), model.side
    found = [View("", squeeze(whole, side, side, model.resample))]
    if views == "none":
        return found
    everything = views == "all" or (offline and views == "auto")
    picture, scale = whole.copy(), min(1.0, VIEW_SIDE * side / min(whole.size))
    picture.thumbnail((math.ceil(scale * whole.width), math.ceil(scale * whole.height)), reducing_gap=2.0)
    found.append(View("mirrored", found[0].pixels.flip(2)))
    if everything or offline:
        for quarters, view in itertools.product((1, 2, 3), found[:2]):
            name = f"{view.name}, turned {90 * quarters}°".lstrip(", ")
            found.append(View(name, view.pixels.rot90(quarters, (1, 2))))
        found.append(View("inverted", 255 - found[0].pixels))
    if everything:
        for angle in TURNS:
            turned = picture.rotate(angle, Image.Resampling.BILINEAR)
            found.append(View(f"turned {angle % 360}°", squeeze(turned, side, side, model.resample)))
    if views != COPIES and min(whole.size) >= SMALLEST:
        found += parts_of(picture, model, SIZES if everything else SIZES[:1])
    for share, places in LARGER if offline else ():  # the query may have been cut out of a larger picture
        small = round(share * side)
        starts = tuple(round((2 * i + 1) / (2 * places) * (side - small)) for i in range(places))
        found.append(View("part", squeeze(picture, small, small, model.resample), starts, starts))
    return found


def features_of_views(views: Sequence[View], model: Model) -> tuple[list[str], np.ndarray]:
    """Names and features of a query's views, float32 (views, dim), rounded to fp16 as they are in the store."""
    squares = [(view, top, left) for view in views for top, left in itertools.product(view.tops, view.lefts)]
    if model.network is describe:
        with torch.inference_mode(), one_torch_thread():
            found = torch.cat([describe_squares(view.pixels[None], view.tops, view.lefts) for view in views])
            found = torch.nn.functional.normalize(found)
    else:
        parts = [view.pixels[:, -top : model.side - top, -left : model.side - left] for view, top, left in squares]
        found, _ = launch(torch.stack(parts), model, model.batch)
    return [view.name for view, *_ in squares], to_float32(found.cpu().numpy().astype(np.float16))


# ---- Verification ----------------------------------------------------------------------------------------------------

AREA, POINTS = 90_000, 300  # pixels to which a picture is reduced for its local features; how many it gets at most
QUERY_AREA, QUERY_POINTS = 250_000, 700  # the same for a query, of which a small part may be the match
LEVELS = 8  # sizes in which points are looked for; each is smaller than the one before by the square root of 2
CONTRAST = 1.5  # least difference, of 255, of a blob from its surroundings: fainter ones are noise
SPREAD = 4  # points are taken from 4 × 4 cells of the picture in turn, so that a caption does not have them all
WINDOW, SAMPLES = 8, 12  # a descriptor sees 8 pixels on each side of its point, in 12 × 12 samples
RATIO = 0.75  # a match counts if its squared distance is less than this share of its best rival's
NEAR = 8.0  # pixels within which two points are the same spot, and no rivals
TOLERANCE, DRIFT = 5.0, 0.04  # pixels that an agreeing point may be off; more for each pixel from the proposing point
SCALES = (0.15, 6.0)  # least and most that the query is enlarged to fit the match; beyond, all points fall on one spot
PROPOSALS = 5  # of the proposed transforms, so many are fitted: those that most points agree on
CELL = 4.0  # pixels: points that are nearer to each other count as one
FEWEST, AGREEING = 6, 14  # least points for a fit; least points for a copy (unrelated photographs reach 3, drawings 10)
GRID, GRID_CELL = 48, 4  # the match is compared in 48 × 48 samples; a cell, 4 × 4 of them, agrees or does not
TEXTURE, CORRELATION = 2.5, 0.8  # least deviation, of 255, of a cell that counts; least correlation of one that agrees
# Least share of the common cells that agree in a copy; where MANY points agree, the second one. Large letters on a
# product, stickers or a curved screen leave 0.6 to 0.7, with 35 points and more. T-shirts on one cloth reach 0.65, with
# at most 28 points. Two products before one backdrop reach 0.57, two screenshots of one app 0.3
AGREEMENT, MANY = (0.7, 0.6), 32


class LocalFeatures(NamedTuple):
    """Distinctive points of a picture, and what it looks like around them. A place is a complex number."""

    size: tuple[int, int]  # width and height of the upright picture, pixels
    grey: torch.Tensor  # the picture made smaller; uint8 (h, w)
    places: np.ndarray  # of the points, x + iy in pixels of `grey`; complex64 (n,)
    frames: np.ndarray  # size × e^(i angle) of each point; complex64 (n,)
    descriptors: np.ndarray  # float32 (n, 128), each of length 1


def smooth(light: torch.Tensor, step: int = 1) -> torch.Tensor:
    """16 times the average of light (h, w) with weights 1, 2, 1 along both axes, over pixels `step` apart.

    The result is smaller than light by `step` on each side. Repeated, it is nearly a Gaussian blur.
    """
    rows = (light[: -2 * step] + light[2 * step :]).add_(light[step:-step], alpha=2)
    return (rows[:, : -2 * step] + rows[:, 2 * step :]).add_(rows[:, step:-step], alpha=2)


def blobs_in(light: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A difference of Gaussians of light (h, w), and where it has a strong extreme: both flat, (h * w,)."""
    fine = smooth(smooth(smooth(light)))  # 16³ times as bright, and smaller by 3 on each side
    D = smooth(fine, 2).sub_(fine[2:-2, 2:-2], alpha=16)
    D = torch.nn.functional.pad(D, (5, 5, 5, 5))
    strength = D.abs()[WINDOW - 1 : 1 - WINDOW, WINDOW - 1 : 1 - WINDOW]
    rows = torch.maximum(torch.maximum(strength[:-2], strength[1:-1]), strength[2:])  # max_pool2d takes 5 times as long
    around = torch.maximum(torch.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
    is_extreme = (strength[1:-1, 1:-1] == around) & (around > CONTRAST * 16**4)
    return D.flatten(), torch.nn.functional.pad(is_extreme, (WINDOW,) * 4).flatten()


def shapes_and_starts(levels: Sequence[torch.Tensor], level: torch.Tensor) -> torch.Tensor:
    """Height, width and start, int64 (3, n), of each point's level, if all levels lie flat one after the other."""
    shapes = torch.tensor([light.shape for light in levels])
    areas = shapes.prod(1)
    return torch.cat([shapes, (areas.cumsum(0) - areas)[:, None]], 1)[level].T


def place_in_group(group: torch.Tensor) -> torch.Tensor:
    """For each element of group, int64 (n,): how many equal ones stand before it."""
    order = group.argsort(stable=True)
    place = torch.arange(len(group)) - torch.searchsorted(group[order], group[order])
    return torch.empty_like(group).scatter_(0, order, place)


def blob_points(levels: Sequence[torch.Tensor], counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blobs of `levels`, each (h, w): the number of the level, int64 (n,), and x and y there, int64 (n, 2).

    A blob is an extreme of a difference of Gaussians, but not on an edge, where it would slide (Lowe, IJCV 2004). Each
    level has at most as many as `counts` says: the strongest one in each cell, then the second ones, and so on.

    All levels share each call of torch. With many small calls, two threads would be no faster than one.
    """
    D, is_extreme = map(torch.cat, zip(*map(blobs_in, levels)))
    place = is_extreme.nonzero()[:, 0]
    place = place[D[place].abs().argsort(descending=True, stable=True)]
    ends = torch.tensor([light.numel() for light in levels]).cumsum(0)
    level = torch.searchsorted(ends, place, right=True)
    h, w, start = shapes_and_starts(levels, level)
    xx = D[place + 1] + D[place - 1] - 2 * D[place]
    yy = D[place + w] + D[place - w] - 2 * D[place]
    xy = (D[place + w + 1] + D[place - w - 1] - D[place - w + 1] - D[place + w - 1]) / 4
    is_blob = (xx + yy) ** 2 * 10 < 11**2 * (xx * yy - xy**2)  # one curvature is at most 10 times the other
    x, y = (place - start) % w, (place - start) // w
    cell = level * SPREAD**2 + (SPREAD * y // h) * SPREAD + SPREAD * x // w
    blobs = torch.stack([level, x, y, cell])[:, is_blob]
    blobs = blobs[:, (blobs[0] * blobs.shape[1] + place_in_group(blobs[3])).argsort(stable=True)]  # level by level
    level, x, y, _ = blobs[:, place_in_group(blobs[0]) < counts[blobs[0]]]
    return level, torch.stack([x, y], 1)


def describe_points(
    levels: Sequence[torch.Tensor], level: torch.Tensor, xy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions, e^(i angle) (n,), and descriptors (n, 128) of the points xy (n, 2). level (n,): which of `levels`.

    As in SIFT: gradients in 4 × 4 cells and 8 directions, relative to the direction of the mean gradient. Of these sums
    the square root is taken (Arandjelović & Zisserman, CVPR 2012).
    """
    normalize = torch.nn.functional.normalize
    steps = (torch.arange(SAMPLES) + 0.5) * (2 * WINDOW / SAMPLES) - WINDOW
    window = torch.complex(*torch.meshgrid(steps, steps, indexing="xy")).flatten()
    weight = torch.exp(-(window.abs() ** 2) / (2 * WINDOW**2))
    gradient = torch.cat([torch.complex(dx, dy).flatten() for dy, dx in map(torch.gradient, levels)])
    h, w, start = shapes_and_starts(levels, level)[..., None]

    def gradients(offsets: torch.Tensor) -> torch.Tensor:  # (n, samples), weighted, at these offsets from each point
        x, y = (xy[:, :1] + offsets.real).round().long(), (xy[:, 1:] + offsets.imag).round().long()
        return gradient[start + w * torch.minimum(y.clamp(0), h - 1) + torch.minimum(x.clamp(0), w - 1)] * weight

    mean = gradients(window[None]).sum(1, keepdim=True)
    direction = torch.polar(torch.ones_like(mean.real), mean.angle())
    turned = gradients(window * direction)[..., None] * direction.conj()[..., None]
    rise = (turned * torch.polar(torch.ones(8), torch.arange(8) * (-math.pi / 4))).real.clamp(min=0)  # (n, samples, 8)
    rise = rise**3 / (turned.abs() ** 2 + 1e-6)  # the cosine cubed: mostly the two nearest directions
    share = (1 - (steps[:, None] - torch.tensor([-6.0, -2.0, 2.0, 6.0])).abs() / 4).clamp(min=0)  # (samples, cells)
    cells = torch.einsum("nvuk,vi,uj->nijk", rise.view(-1, SAMPLES, SAMPLES, 8), share, share).flatten(1)
    return direction[:, 0], normalize(normalize(cells, p=1).sqrt())


def local_features(image: Image.Image, area: int = AREA, count: int = POINTS, side: int = 0) -> LocalFeatures:
    """At most `count` local features, from `area` pixels. It is decoded large enough for a model of this `side`."""
    short, long = sorted(image.size)
    scale = min(1.0, (area / (short * long)) ** 0.5)
    picture = to_rgb(image, max(side, math.ceil(scale * long / DRAFT_SCALE)))
    size = (long, short) if picture.width > picture.height else (short, long)  # EXIF may have turned it
    width, height = (max(1, round(scale * length)) for length in size)
    grey = picture.convert("L").resize((width, height), Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
    light = torch.from_numpy(np.array(grey))
    factors = [2 ** (-level / 2) for level in range(LEVELS)]
    sizes = [(round(height * factor), round(width * factor)) for factor in factors]
    sizes = [it for it in sizes if min(it) > 2 * WINDOW + 1]  # smaller ones have no room for a point
    if not sizes:
        nothing = np.zeros(0, np.complex64)
        return LocalFeatures(size, light, nothing, nothing, np.zeros((0, 128), np.float32))
    resized = partial(torch.nn.functional.interpolate, light[None, None].float(), mode="bilinear", antialias=True)
    levels = [resized(it)[0, 0] for it in sizes]
    level, xy = blob_points(levels, torch.tensor([round(count * factor / sum(factors)) for factor in factors]))
    directions, descriptors = describe_points(levels, level, xy)
    places = (xy + 0.5) * torch.tensor([(width / w, height / h) for h, w in sizes])[level]
    frames = directions / torch.tensor(factors)[level]
    return LocalFeatures(size, light, torch.view_as_complex(places).numpy(), frames.numpy(), descriptors.numpy())


def seen_through(query: LocalFeatures, mirrored: bool, negative: bool) -> LocalFeatures:
    """The local features of the mirrored query, of its negative, or of both. They are derived, not computed again."""
    size, grey, places, frames, descriptors = query
    cells = descriptors.reshape(-1, 4, 4, 8)
    if mirrored:  # x changes its sign: of each place, of each direction, and of each point's own window
        grey, places, frames = grey.flip(1), grey.shape[1] - places.conj(), -frames.conj()
        cells = cells[:, ::-1][..., [0, 7, 6, 5, 4, 3, 2, 1]]
    if negative:  # dark and light change places: each direction, and its window, turns by 180°
        frames, cells = -frames, cells[:, ::-1, ::-1]
    return LocalFeatures(size, grey, places, frames, cells.reshape(-1, 128))


def fitted(q: np.ndarray, m: np.ndarray, agrees: np.ndarray) -> tuple[int, np.ndarray]:
    """How many of the pairs of places q and m, complex (n,), agree on an affine transform; and the transform, (3, 3).

    It is fitted to the pairs in `agrees`, then to all that agree. 0: too few agree, or the picture is distorted.
    """
    H = np.eye(3)
    Q, M = (np.stack([z.real, z.imag, np.ones(len(z))]) for z in (q, m))
    for _ in range(3):
        if agrees.sum() < FEWEST:
            return 0, H
        H = np.linalg.lstsq(Q[:, agrees].T, M[:, agrees].T, rcond=None)[0].T
        longer, shorter = np.linalg.svd(H[:2, :2])[1]  # by how much it stretches along its axes
        if not (SCALES[0] < shorter and longer < min(SCALES[1], 2 * shorter)):
            return 0, H
        agrees = np.hypot(*(H @ Q - M)[:2]) < TOLERANCE * max(1.0, (longer * shorter) ** 0.5)
    # Points in one cell count once, in either picture: else many points on one spot would agree.
    points = min(len(np.unique(z[agrees].real // CELL + 4096 * (z[agrees].imag // CELL))) for z in (q, m))
    return points if points >= AGREEING else 0, H


def best_transform(query: LocalFeatures, match: LocalFeatures) -> tuple[int, np.ndarray]:
    """How many points agree on the best transform from query to match, and that transform: see `fitted`.

    A point is matched to the one it resembles most, if it resembles no other place nearly as much. Each matched pair
    proposes a move, turn and scale by its places, sizes and angles. All of them are tried: nothing is random.
    """
    S = torch.from_numpy(query.descriptors) @ torch.from_numpy(match.descriptors).T
    scores, best = (found.numpy() for found in S.max(1))
    is_near = torch.from_numpy(np.abs(match.places[:, None] - match.places) <= NEAR)
    rivals = S.masked_fill(is_near[best], -1).amax(1).numpy()
    good = 1 - scores < RATIO * (1 - rivals)
    q, m = query.places[good], match.places[best[good]]
    ratio = match.frames[best[good]] / query.frames[good]
    moved, scale = ratio[:, None] * (q - q[:, None]), np.abs(ratio)  # (proposals, matches)
    agree = np.abs(m[:, None] + moved - m) < TOLERANCE + DRIFT * np.abs(moved)
    agree &= np.abs(np.log2(scale / scale[:, None])) < 1
    agree[(scale < SCALES[0]) | (scale > SCALES[1])] = False
    likely = np.argsort(-agree.sum(1), kind="stable")[:PROPOSALS]
    return max((fitted(q, m, agree[one]) for one in likely), key=lambda fit: fit[0], default=(0, np.eye(3)))


def common_share(query: LocalFeatures, match: LocalFeatures, H: np.ndarray) -> tuple[float, float]:
    """The share of the common cells that agree; and the share of the match's area that lies in the query and agrees.

    The query is warped by H to the match. The two are compared cell by cell; featureless cells do not count.
    """
    F = torch.nn.functional
    to_q, to_m = (np.array([[w, 0, w], [0, h, h], [0, 0, 2]]) / 2 for h, w in (query.grey.shape, match.grey.shape))
    theta = torch.from_numpy(np.linalg.inv(H @ to_q) @ to_m)[None, :2].float()  # match to query, sides at -1 and 1
    grid = F.affine_grid(theta, [1, 1, 4 * GRID, 4 * GRID], align_corners=False)
    inside = (grid.abs().amax(3) <= 1).float()[None]
    warped = F.grid_sample(query.grey[None, None].float(), grid, padding_mode="border", align_corners=False)
    seen = F.avg_pool2d(torch.cat([warped, inside], 1), 4)  # of four samples a side: no aliasing, less noise
    shown = F.adaptive_avg_pool2d(match.grey[None, None].float(), GRID)
    a, known, b = F.unfold(torch.cat([seen, shown], 1)[0, :, None], GRID_CELL, stride=GRID_CELL)  # (samples, cells)
    a, b = a - a.mean(0), b - b.mean(0)
    spread = torch.stack([a, b]).std(1, correction=0)
    tells = (known.amin(0) > 0.8) & (spread.amax(0) > TEXTURE)
    agrees = (a * b).mean(0).abs() > CORRELATION * (spread.prod(0) + 1e-6)
    agreement = float(agrees[tells].float().mean()) if tells.any() else 0.0
    return agreement, agreement * float(known.mean())


def corners_in(one: LocalFeatures, other: LocalFeatures, H: np.ndarray) -> list[tuple[float, float]]:
    """The corners of `one` in pixels of `other`. H: the transform from the grey picture of `one` to that of `other`."""
    height, width = one.grey.shape
    there = H @ [(0, width, width, 0), (0, 0, height, height), (1, 1, 1, 1)]
    return [(x, y) for x, y in (there[:2].T * other.size / other.grey.shape[::-1]).round(1).tolist()]


def align(query: LocalFeatures, match: LocalFeatures) -> Region | None:
    """Where the query, as it is, mirrored or as a negative, lies in the match; None if it is not the same picture."""
    if not (len(query.places) and len(match.places)):
        return None
    seen = {way: seen_through(query, *way) for way in itertools.product((False, True), repeat=2)}
    fits = {way: best_transform(seen[way], match) for way in seen}
    way = mirrored, inverted = max(fits, key=lambda way: fits[way][0])
    points, H = fits[way]
    agreement, covers = common_share(seen[way], match, H) if points else (0.0, 0.0)
    if agreement < AGREEMENT[points >= MANY]:
        return None
    if mirrored:  # H starts from the mirrored query
        H = H @ [(-1, 0, query.grey.shape[1]), (0, 1, 0), (0, 0, 1)]
    corners, outline = corners_in(query, match, H), corners_in(match, query, np.linalg.inv(H))
    return Region(corners, outline, points, round(covers, 3), inverted)


# ---- Store -----------------------------------------------------------------------------------------------------------

FORMAT = 3  # of the database; a DeepVision of an older format refuses it
PAGE_BYTES = 32_768  # 7 vectors of 2048 × fp16 a page: 4.7 KB an image in all, against 5.5 with pages of 16 KB
CACHE_KB = 16_384  # memory for pages of the database: the inner pages of ten million rows fit
BLOCK = 4096  # rows handled at once: 16 MB at 2048 dimensions
CHECKED_BYTES = 1 << 27  # a database up to this size is checked whole on opening, in 0.3 s
WAIT_SECONDS = 600  # seconds that SQLite waits: for a commit of another run, or for its exact search of ten million
OLD_FILES = ("features.bin", "catalogue.sqlite", "catalogue.crc")  # of formats 1 and 2
SCHEMA = [
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    # AUTOINCREMENT: no row number is used twice, so that a stale FAISS index can miss a row but never mistake one.
    "CREATE TABLE features (row INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB UNIQUE, vector BLOB, checksum INTEGER)",
    # All files ever read. there: 0 if gone. A skipped file has a reason, no digest; a file that is no image, neither.
    "CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, digest BLOB, reason TEXT, there INTEGER)"
    " WITHOUT ROWID",
    "CREATE INDEX files_by_digest ON files (digest, there, reason)",  # enough to count a million files in 50 ms
]
FEATURE_COLUMNS, FILE_COLUMNS = "row, digest, vector, checksum", "path, size, mtime, digest, reason, there"
USABLE = "files WHERE there AND digest IS NOT NULL"  # this and the next four: what follows FROM, see `count`
SKIPPED = "files WHERE there AND reason IS NOT NULL"
GONE = """files AS old WHERE NOT there AND digest IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM files WHERE digest = old.digest AND there)"""  # a renamed file is not gone
DAMAGED = "features WHERE checksum IS NOT crc(digest, vector)"
ORPHANED = """files WHERE digest IS NOT NULL AND mtime != -1
    AND NOT EXISTS (SELECT 1 FROM features WHERE features.digest = files.digest)"""  # images without features
CRASHES = "its decoder crashes"  # reason of a file that crashed the whole process; --rebuild does not try it again
ROWS_AND_PATHS = "SELECT row, path FROM files JOIN features USING (digest) WHERE there"
LAST_PATH = b"\xff" * 5000  # sorts after every path

Blocks = Iterator[tuple["np.ndarray", "np.ndarray"]]  # rows, int64 (n,), and features, fp16 or float32 (n, dim)


@contextmanager
def whole_file(path: Path, mark: object = "") -> Iterator[BinaryIO]:
    """A stream to a new file, which replaces the file `path` once it is whole and on disk.

    `mark` is part of the new file's name. Processes that may write the same `path` at once give different marks.
    """
    part = path.with_name(f"{path.name}{mark}.part")
    try:
        part.unlink(missing_ok=True)  # a stopped run may have left it; "x" writes through no link
        with open(part, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # the new name is durable only once its folder is synced
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


class Changes(NamedTuple):
    """How a collection differs from the store."""

    unread: list[File]  # new and changed files
    gone: list[bytes]  # paths
    back: list[bytes]  # paths of files that were gone and are unchanged


class Store:
    """The files of a collection and their features, by one model: an SQLite database.

    A file and its features are stored in one transaction. A vector is used only after its checksum was seen to hold.
    `folder` is created. Each rank of torchrun has a database by its own `name`.
    """

    def __init__(self, folder: Path, identity: str, dim: int, name: str = "index.sqlite") -> None:
        self.folder, self.identity, self.dim = folder, identity, dim
        self.path, self.index = folder / name, folder / "index.faiss"
        self.salt = zlib.crc32(identity.encode())  # so that checksums of another model's vectors never match
        self.lock_file, self.db_lock = filelock.FileLock(folder / "lock"), threading.Lock()
        self.last_words = b""  # faulthandler's report of a crash, from the lock file: taking the lock empties that file
        with self.errors():
            folder.mkdir(parents=True, exist_ok=True)
            self.connect()

    def connect(self) -> None:
        """Open the database. A new one is an empty file: `check` refuses it, and `repair` fills it."""
        if not self.path.exists():
            self.path.touch()
        self.inode = self.path.stat().st_ino  # another one: another run has replaced the database, see `locked`
        self.db = sqlite3.connect(self.path, timeout=WAIT_SECONDS, check_same_thread=False)
        self.db.text_factory = partial(str, encoding="utf-8", errors="replace")
        self.db.create_function("crc", 2, self.crc)
        self.scanned = 0  # `version` at the last scan

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of disk and SQLite into a DeepVisionError. Damage sets the format to 0, which `check` refuses."""
        try:
            yield
        except (OSError, NotImplementedError, sqlite3.OperationalError) as error:  # NotImplementedError: no file locks
            if "user-defined function" in str(error):
                raise KeyboardInterrupt from error  # a signal came while SQLite called `crc`
            hint = "Check the free space and the permissions, or choose another folder with --index-dir"
            raise DeepVisionError(f"the index in {self.folder} cannot be used: {first_line(error)}. {hint}") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # UnicodeDecodeError: from a damaged schema
            with suppress(sqlite3.Error):
                self.db.rollback()
                self.db.execute("PRAGMA user_version = 0")
            raise DamageError(self.path, first_line(error)) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the one run that writes. Before: read a crash report. Then: reopen a replaced database."""
        with suppress(OSError):  # there is none yet
            self.last_words = Path(self.lock_file.lock_file).read_bytes() or self.last_words
        try:
            held = self.lock_file.acquire(timeout=0)
        except filelock.Timeout:
            log.warning("another run is writing %s: waiting for it", self.folder)
            held = self.lock_file.acquire()
        with held:
            if not self.path.exists() or self.path.stat().st_ino != self.inode:  # another run has repaired it
                self.db.close()
                self.connect()
            yield

    def value(self, query: str, *arguments: Any) -> Any:
        """The first value that the query gives, or None."""
        return (self.db.execute(query, arguments).fetchone() or [None])[0]

    def version(self) -> int:
        """A number that changes whenever another run has written."""
        return self.value("PRAGMA data_version")

    def count(self, source: str) -> int:
        return self.value(f"SELECT count(*) FROM {source}")

    def get_meta(self, key: str) -> Any:
        return self.value("SELECT value FROM meta WHERE key = ?", key)

    def last_row(self) -> int:
        """The highest row number in use; 0: there are no features."""
        return self.value("SELECT max(row) FROM features") or 0

    def crc(self, digest: Any, vector: Any) -> int:
        """CRC-32 of model identity, digest and vector; -1 if damage has changed a type or a length."""
        if not (isinstance(digest, bytes) and isinstance(vector, bytes) and len(vector) == 2 * self.dim):
            return -1
        return zlib.crc32(vector, zlib.crc32(digest, self.salt))

    def features(self, condition: str, *arguments: Any) -> tuple[np.ndarray, list[bytes], np.ndarray]:
        """Rows, int64 (n,), content hashes, and features, fp16 (n, dim), for which the SQL condition holds.

        Raises DamageError if one of them is not what was written. The next update then reads its files again.
        """
        found = self.db.execute(f"SELECT {FEATURE_COLUMNS} FROM features WHERE {condition}", arguments).fetchall()
        if not all(self.crc(digest, vector) == checksum for _, digest, vector, checksum in found):
            self.discard_damaged()
            raise DamageError(self.path, "features do not match their checksums")
        vectors = np.frombuffer(bytearray().join(row[2] for row in found), np.float16).reshape(-1, self.dim)
        return np.array([row[0] for row in found], np.int64), [row[1] for row in found], vectors

    def features_of(self, rows: Iterable[int]) -> tuple[np.ndarray, list[bytes], np.ndarray]:
        """Those of `rows` that are still there, by row, as `features` gives them."""
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

    def is_known(self, digest: bytes) -> bool:
        """Whether there are features of this content. Reading threads call it."""
        with self.db_lock:  # Python 3.13 fails now and then where threads share a connection
            return bool(self.value("SELECT 1 FROM features WHERE digest = ?", digest))

    def save(self, pictures: Sequence[Picture]) -> None:
        """Store files and features in one transaction, in place of what is stored. Mark vanished files as gone."""
        kept = [picture for picture in pictures if not picture.vanished]
        features = {picture.digest: picture.vector.tobytes() for picture in kept if picture.vector is not None}
        files = ((*picture.file, picture.digest, picture.reason) for picture in kept)
        vanished = ((picture.file.path,) for picture in pictures if picture.vanished)
        with self.db_lock, self.db:
            self.db.executemany("INSERT OR REPLACE INTO features VALUES (NULL, ?1, ?2, crc(?1, ?2))", features.items())
            self.db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, 1)", files)
            self.db.executemany("UPDATE files SET there = 0 WHERE path = ?", vanished)
            self.db.execute("DELETE FROM meta WHERE key = 'images'")

    def scan(self, images: Path, work: Work) -> Changes:
        """How the folder `images` differs from the store.

        New and changed files are unread. If the decoders have changed, unusable files are unread as well. With
        `work.rebuild`, all files are, except those that crash a decoder.
        """

        def unlisted(error: OSError) -> None:
            what = f"{os.fsdecode(error.filename)} cannot be listed ({error.strerror})"
            if work.prune:  # what lies in it would be forgotten
                raise DeepVisionError(f"{what}: nothing was pruned")
            log.warning("%s", what)

        self.scanned = self.version()
        changes = Changes([], [], [])
        start: bytes | str = ""  # SQLite sorts it before every path, also before one that damage has made a text
        files = find_images(images, unlisted, [self.folder.parent], work.exclude)  # in the order of their paths
        other_decoders = self.get_meta("decoders") != image_formats()[2]
        while start != LAST_PATH:
            found = {file.path: file for file in itertools.islice(files, BLOCK)}
            end = max(found, default=LAST_PATH)
            query = f"SELECT {FILE_COLUMNS} FROM files WHERE path > ? AND path <= ?"
            for path, size, mtime, digest, reason, there in self.db.execute(query, (start, end)).fetchall():
                file, again = found.pop(path, None), other_decoders and digest is None
                if file is None:
                    if there:
                        changes.gone.append(path)
                elif file != (path, size, mtime) or again or (work.rebuild and reason != CRASHES):
                    changes.unread.append(file)
                elif not there:
                    changes.back.append(path)
            changes.unread.extend(found.values())
            start = end
        return changes

    def mark_presence(self, changes: Changes) -> bool:
        """Mark files as gone or back; note the decoders and the number of usable images. If none would remain, change
        nothing: False."""
        with self.db:
            self.db.executemany("UPDATE files SET there = 0 WHERE path = ?", ((path,) for path in changes.gone))
            self.db.executemany("UPDATE files SET there = 1 WHERE path = ?", ((path,) for path in changes.back))
            remain = self.count(USABLE)
            notes = ("decoders", image_formats()[2]), ("images", remain)
            self.db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", notes)
            if not remain:
                self.db.rollback()
        return remain > 0

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

    def check(self, whole: bool) -> None:
        """Raise DamageError unless the database is sound, of this format and model. `whole`: read all if small."""
        if (version := self.value("PRAGMA user_version")) > FORMAT:
            newer = f"was written by a newer DeepVision (format {version}, this one knows {FORMAT})"
            raise DeepVisionError(f"{self.folder} {newer}: update DeepVision, or choose another --index-dir")
        ours = "sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
        schema = [sql for (sql,) in self.db.execute(f"SELECT sql FROM {ours}")]  # a foreign trigger would show here
        if version < FORMAT or schema != SCHEMA or self.get_meta("identity") != self.identity:
            raise DamageError(self.path, "it is not a database of this format, or of another model")
        self.db.execute(f"PRAGMA cache_size = -{CACHE_KB}")
        if whole and self.path.stat().st_size <= CHECKED_BYTES:
            if (verdict := self.value("PRAGMA integrity_check(1)")) != "ok":  # quick_check does not compare indexes
                raise DamageError(self.path, str(verdict).splitlines()[0])
            self.discard_damaged()

    def discard_damaged(self) -> None:
        """Delete damaged features. The next update reads the files again that have none."""
        if self.count(DAMAGED) or self.count(ORPHANED):
            with self.db:
                self.db.execute(f"DELETE FROM {DAMAGED}")
                marked = self.db.execute(f"UPDATE files SET mtime = -1 WHERE path IN (SELECT path FROM {ORPHANED})")
            files = counted(marked.rowcount, "file")
            log.warning("%s: the features of %s are damaged or missing, and are extracted again", self.folder, files)

    def readable(self, columns: str, table: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a damaged table, from its beginning and from its end, each up to the damage."""
        for order in ("ASC", "DESC"):
            with suppress(sqlite3.Error, UnicodeDecodeError):
                yield from self.db.execute(f"SELECT {columns} FROM {table} ORDER BY 1 {order}")
                return  # all rows were read, no damage

    def repair(self) -> None:
        """Replace a damaged or empty database by a sound one with all readable rows. The caller holds the lock."""
        try:
            with self.errors():
                return self.check(whole=True)  # no damage: another run has repaired it meanwhile
        except DamageError:
            is_new = not self.path.stat().st_size  # `connect` has only touched it
        Path(f"{self.path}.part-journal").unlink(missing_ok=True)
        with whole_file(self.path) as stream:
            new = Store(self.folder, self.identity, self.dim, os.path.basename(stream.name))
            schema = [f"PRAGMA page_size = {PAGE_BYTES}", "BEGIN", *SCHEMA, f"PRAGMA user_version = {FORMAT}", "COMMIT"]
            new.db.executescript(";".join(schema))
            with new.db:
                meta = ("identity", self.identity), ("decoders", image_formats()[2])
                new.db.executemany("INSERT INTO meta VALUES (?, ?)", meta)
                features, files = self.readable(FEATURE_COLUMNS, "features"), self.readable(FILE_COLUMNS, "files")
                new.db.executemany("INSERT OR IGNORE INTO features VALUES (?, ?, ?, ?)", features)
                new.db.executemany("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?)", files)
            new.discard_damaged()
            new.db.close()
            self.db.close()
            Path(f"{self.path}-journal").unlink(missing_ok=True)  # SQLite would replay it
        self.connect()
        if not is_new:
            log.warning("%s was damaged. Repaired: %d features are kept", self.path, self.count("features"))


# ---- Index -----------------------------------------------------------------------------------------------------------

CODED_DIM = 256  # principal components that a code keeps, each in 2 bits
TRAINED_ON, HELD_OUT = 30_000, 500  # vectors; more improve nothing; with fewer held out, recall is off by over 0.001
OUTGROWN = 2  # an index is made anew once it holds twice the vectors that it was made of, or that are stored now
SHORTLIST, LONGEST_SHORTLIST = 160, 32_768  # codes whose exact scores are computed: at first, at most
RECALL = 0.998  # share of the true ten nearest that the shortlist must hold
GPU_RESERVE = 3 << 30  # bytes left to the model and to FAISS's own work


class Index(NamedTuple):
    """A FAISS index over features of the store."""

    faiss: faiss.Index  # its ids are rows of the store
    last: int  # the last row in it; later ones are compared one by one
    shortlist: int = 0  # how many rows the codes choose for a search; 0: no codes, the index holds the features
    recall: float | None = None  # share of the true ten nearest in the shortlist, measured
    made_of: int = 0  # vectors in the store when it was made
    file: Any = None  # the index file in memory, which `faiss` looks into


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


def nearest(xq: np.ndarray, k: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows, (nq, k), best first, of the rows in `blocks` nearest to xq, float32 (nq, dim). Row -1: none."""
    heap = faiss.ResultHeap(len(xq), k, keep_max=True)
    for rows, xb in blocks:
        S = torch.from_numpy(xq) @ torch.from_numpy(to_float32(xb)).T  # several times as fast as FAISS multiplies
        D, I = S.topk(min(k, len(xb)))
        heap.add_result(D.numpy(), rows[I.numpy()])
    heap.finalize()
    return heap.D, heap.I


def rotated_components(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix A, (width, dim), and b, (width,): A @ v + b are a vector's first principal components over x (n, dim),
    rotated so that their variances are alike. `faiss.PCAMatrix` takes 14 s for 30,000 × 2048 values, this 1.5 s."""
    mean = x.mean(0)
    x = x - mean
    _, axes = torch.linalg.eigh(x.T @ x)  # columns, the last ones with most variance
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
    A = rotation @ axes[:, -width:].T
    return A, -A @ mean


def coded_index(store: Store, last: int) -> Index:
    """An index of the features up to row `last` as compact codes, 64 bytes a vector, with its measured recall.

    The principal components are coded by product quantization in 4 bits (André, Kermarrec & Le Scouarnec, VLDB 2015). A
    search scans all codes and computes exact scores only for the best rows: the shortlist. It is made long enough to
    hold nearly all true ten nearest of held-out vectors.
    """
    # A digest is a hash: the first ones are a random sample.
    own, _, sample = store.features("row <= ? ORDER BY digest LIMIT ?", last, TRAINED_ON + HELD_OUT)
    held = min(HELD_OUT, len(own) // 2)
    xq, xt = to_float32(sample[:held]), to_float32(sample[held:])
    width = min(CODED_DIM, store.dim, len(xt)) // 2 * 2
    A, b = rotated_components(torch.from_numpy(xt), width)
    transform = faiss.LinearTransform(store.dim, width, True)
    faiss.copy_array_to_vector(A.numpy().ravel(), transform.A)
    faiss.copy_array_to_vector(b.numpy(), transform.b)
    transform.is_trained = True
    codes = faiss.IndexPQFastScan(width, width // 2, 4)
    codes.pq.cp.min_points_per_centroid = 1  # no warning about a small collection
    codes.train((torch.from_numpy(xt) @ A.T + b).numpy())
    by_row = faiss.IndexIDMap(codes)

    def added() -> Blocks:
        """All blocks; each is added to the codes on its way to `nearest`, so that the store is read once."""
        for rows, xb in progress_bar(store.blocks(last=last), desc="compact codes", unit="block"):
            block = torch.from_numpy(xb).float()
            build_index([(rows, (block @ A.T + b).numpy())], by_row)  # FAISS multiplies at a fifth of torch's speed
            yield rows, block.numpy()

    _, I = nearest(xq, min(TOP + 1, len(own)), added())
    index = faiss.IndexPreTransform(transform, by_row)  # only now: it copies the number of vectors
    true = [set(row) - {this} for row, this in zip(I.tolist(), own.tolist())]
    shortlist = SHORTLIST
    while True:
        found = index.search(xq, min(shortlist, index.ntotal))[1].tolist()
        recall = sum(len(t & set(f)) for t, f in zip(true, found)) / sum(map(len, true))
        if recall >= RECALL or shortlist >= index.ntotal or 2 * shortlist > LONGEST_SHORTLIST:
            return Index(index, last, shortlist, round(recall, 4), index.ntotal)
        shortlist *= 2


def read_index(store: Store) -> Index | None:
    """The stored index; None if there is none, or if it does not match the checksum that the store noted."""
    size, checksum, *notes = json.loads(store.get_meta("index") or "[0, 0]")
    if not (notes and store.index.is_file()):
        return None
    data: Any = np.memmap(store.index, np.uint8, "r") if store.index.stat().st_size == size else b""
    if zlib.crc32(data) != checksum:
        log.warning("%s is damaged or out of date: it is made again", store.index)
        return None
    return Index(faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(data), size)), *notes)._replace(file=data)


def open_index(store: Store, work: Work = Work()) -> Index:
    """The FAISS index of the store, added to or made anew if need be. Without `work.update` a stored one is kept."""
    last, index = store.last_row(), read_index(store)
    if not last:
        raise DeepVisionError(f"{store.folder} holds no features yet: run without --no-update")
    if index and not work.update:
        return index
    coded = store.count("features") * store.dim * 2 > work.exact_bytes
    if index and bool(index.shortlist) != coded:  # there are too many vectors for that kind, or too few
        index = None
    if index and index.last == last:
        return index
    with store.locked():
        rows, last = store.count("features"), store.last_row()  # another run may have replaced all meanwhile
        new = store.count(f"features WHERE row > {index.last}") if index else 0
        if index and index.faiss.ntotal + new < OUTGROWN * min(rows, index.made_of):
            copy = faiss.deserialize_index(index.file)  # vectors cannot be added to an index that looks into a file
            index = index._replace(faiss=build_index(store.blocks(index.last + 1, last), copy), last=last, file=None)
        elif coded:
            index = coded_index(store, last)
        else:
            blocks = progress_bar(store.blocks(last=last), desc="index", unit="block")
            index = Index(build_index(blocks), last, made_of=rows)
        data = faiss.serialize_index(index.faiss)
        with whole_file(store.index) as stream:
            stream.write(data)
        notes = json.dumps([len(data), zlib.crc32(data), *index[1:-1]])
        with store.db:
            store.db.execute("INSERT OR REPLACE INTO meta VALUES ('index', ?)", (notes,))
    return index


def index_on_gpus(store: Store, last: int) -> faiss.Index | None:
    """The features up to row `last` as fp16, spread over the GPUs; None if there is no GPU, or not enough memory."""
    if not (count := faiss.get_num_gpus()) or not torch.cuda.is_available():
        return None
    share = -(-last // count)
    if any(torch.cuda.mem_get_info(gpu)[0] < 2 * share * store.dim + GPU_RESERVE for gpu in range(count)):
        log.warning("the features do not fit into the memory of the GPU: the search runs on the CPU")
        return None
    index = faiss.IndexShards(store.dim, True, False)  # in threads; the ids are rows already
    for gpu in range(count):
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = gpu, True
        flat = faiss.IndexIDMap(faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), store.dim, config))
        index.add_shard(build_index(store.blocks(gpu * share + 1, min(last, (gpu + 1) * share)), flat))
    return index


# ---- Search ----------------------------------------------------------------------------------------------------------

GPU_QUERIES = 32  # views; for fewer, copying all features to a GPU takes longer than it saves
GPU_RESULTS = 2048  # most results that FAISS gives on a GPU
QUERY_THREADS = 2  # threads that read queries; few, since each query has many views
TOGETHER = 16  # queries in a batch; each takes a third of the time that it takes alone
SCAN_VIEWS = 20  # with this many views, `nearest` is quicker than a search in the exact index
FIRST_LIST = 64  # rows that an exact search scores first; `ranked` asks for more
CLOSELY = 10  # codes rank inexactly: of the rows that they choose, only the best tenth is trusted to be complete
ROUNDING = 1e-5  # by how much two ways to compute the same score may differ
CANDIDATES = 10  # contents that are aligned with a query, whatever k is
SAMPLED = 8000  # images that `representatives` looks at: 0.7 s with 2048 dimensions, and sizes within 10 %
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

    def path_of(self, path: bytes) -> str:
        """The path of a file of the collection, from its path below `images`."""
        return os.path.join(self.images, os.fsdecode(path))

    @cached_property
    def on_gpus(self) -> faiss.Index | None:
        return index_on_gpus(self.store, self.index.last)

    @property
    def first_list(self) -> int:
        """How many rows a search scores first; `ranked` asks for more."""
        return FIRST_LIST if self.exact else self.index.shortlist or FIRST_LIST


class Seen(NamedTuple):
    """What is computed from the pixels of a query."""

    views: list[str]  # their names
    features: np.ndarray  # of the views, float32 (views, dim)
    local: LocalFeatures
    corner: Sequence[int] = (0, 0)  # left and top of the part that was searched with, in pixels of the whole query


class Found(NamedTuple):
    """A content of the store, compared with a query."""

    score: float
    digest: bytes
    view: int  # number of the query's view that scores best
    path: str = ""  # of a file with this content
    region: Region | None = None  # of a copy


def candidate_rows(engine: Engine, queries: Sequence[np.ndarray], count: int) -> list[list[int]]:
    """Rows for each of the queries, (views, dim): its `count` nearest ones by the index, without duplicates.

    Rows that are not in the index yet are scanned and give up to `count` more. If the search is exact or has many
    views, all rows are scanned instead.
    """
    index, last, found = engine.index, engine.store.last_row(), []
    xq = np.concatenate(queries)
    scans = engine.exact or (not index.shortlist and len(xq) >= SCAN_VIEWS)
    if not scans:
        is_large = index.shortlist and len(xq) >= GPU_QUERIES and count <= GPU_RESULTS
        on_gpus = engine.on_gpus if is_large else None
        D, I = (on_gpus or index.faiss).search(xq, min(count, index.faiss.ntotal))
        found.append((-D if index.shortlist and not on_gpus else D, I))  # codes give distances
    if scans or last > index.last:
        blocks = engine.store.blocks(0 if scans else index.last + 1, last)
        found.append(nearest(xq, min(count, last), blocks))
    ends = np.cumsum([len(views) for views in queries])[:-1]
    lists = [list[int]() for _ in queries]
    for D, I in found:
        for rows, scores, of_views in zip(lists, np.split(D, ends), np.split(I, ends)):
            best = of_views.ravel()[np.argsort(-scores, axis=None, kind="stable")].tolist()
            rows += list(dict.fromkeys(row for row in best if row >= 0))[:count]
    return lists


def exact_scores(store: Store, xq: np.ndarray, rows: Iterable[int]) -> list[Found]:
    """The contents of these rows, compared with a query's views, (views, dim), best first."""
    _, digests, vectors = store.features_of(rows)
    xb = to_float32(vectors)
    S = xb @ xq.T  # (rows, views)
    views = (S.max(1, keepdims=True) - ROUNDING <= S).argmax(1)  # of equal views the first: the query as it is
    D = np.einsum("nd,nd->n", xb, xq[views]).clip(-1, 1)  # computed row by row, so that it is the same in any company
    return sorted(map(Found, D.tolist(), digests, views.tolist()), key=lambda it: (-it.score, it.digest))


def ranked(engine: Engine, xq: np.ndarray, rows: Sequence[int]) -> Iterator[Found]:
    """All contents of the store, compared with a query's views, xq (views, dim), best first. `rows`: for round one.

    `count` rows are scored, then four times as many, and so on. Each round yields the scores above `bound` and up to
    `end`. Up to `bound`, more rows may still be missing. `end` is the bound of the round before: what lies above it was
    yielded then. A row above it that is found only now comes too late and is left out.
    """
    count, end = engine.first_list, math.inf
    while True:
        scored = exact_scores(engine.store, xq, rows)
        if count >= max(engine.index.faiss.ntotal, engine.store.last_row()):  # these are all rows
            yield from (it for it in scored if it.score <= end)
            return
        missing = len(rows) - len(scored)  # rows that a rebuild has replaced meanwhile
        trusted = count // CLOSELY if engine.index.shortlist and not engine.exact else count - 1 - missing
        bound = min(end, scored[min(trusted, len(scored) - 1)].score + ROUNDING) if scored and trusted >= 0 else end
        yield from (it for it in scored if bound < it.score <= end)
        count, end = 4 * count, bound
        engine = replace(engine, exact=True) if count > LONGEST_SHORTLIST else engine  # a copy has no `on_gpus` yet
        (rows,) = candidate_rows(engine, [xq], count)


def location(path: str) -> str:
    """The path with the links among its folders resolved. A file that is a link itself is another file."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def nearest_files(engine: Engine, query: Picture, rows: Sequence[int], k: int) -> list[Found]:
    """The files nearest to the query, sorted by score and path: at least k files of at least CANDIDATES contents.

    The query's own file and files that have changed since they were indexed are left out.
    """
    found, contents, own = list[Found](), set[bytes](), location(os.fsdecode(query.file.path))
    for it in ranked(engine, query.made.features, rows):
        if len(found) >= k and len(contents) >= CANDIDATES and it.score < found[-1].score:
            break
        for file in engine.store.files_with(it.digest):
            path = engine.path_of(file.path)
            with suppress(OSError):  # it is gone
                if File.of(file.path, os.stat(path)) == file and (it.digest != query.digest or location(path) != own):
                    found.append(it._replace(path=path))
                    contents |= {it.digest} - {query.digest}
    return sorted(found, key=lambda it: (-it.score, it.path))


@lru_cache(maxsize=1024)  # 200 MB; many queries share candidates
def read_local(path: str, digest: bytes) -> LocalFeatures | None:
    """Local features of a file; None if it cannot be read, or if its content has another hash than `digest`."""
    read = read_path(path, local_features)
    return read.made if read.digest == digest and not read.vanished else None


def verified(query: Picture, found: Sequence[Found]) -> list[Found]:
    """`found`, with the region of each copy of the query. Only the best CANDIDATES contents are aligned with it."""
    paths = {it.digest: it.path for it in reversed(found)}
    best = [digest for digest in dict.fromkeys(it.digest for it in found) if digest != query.digest][:CANDIDATES]

    def aligned(digest: bytes) -> Region | None:
        candidate = read_local(paths[digest], digest)
        return align(query.made.local, candidate) if candidate else None

    with ThreadPoolExecutor(usable_cores(), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        regions = dict(zip(best, threads.map(aligned, best)))
    return [it._replace(region=regions.get(it.digest)) for it in found]


def compared(
    queries: Iterable[str | Path], engine: Engine, k: int, views: str, crop: Sequence[float] | None = None
) -> Iterator[tuple[Picture, list[Found]]]:
    """Each query with what `nearest_files` and `verified` give for it. `views`, `crop`: see `search`."""

    def look_at(image: Image.Image) -> Seen:
        image, *corner = cut_out(image, crop) if crop else (image, 0, 0)
        with one_torch_thread():
            local = local_features(image, QUERY_AREA, QUERY_POINTS, engine.model.side)
            seen = query_views(image, engine.model, views)
        return Seen(*features_of_views(seen, engine.model), local, corner)

    pictures = read_ahead(partial(read_path, transform=look_at), queries, QUERY_THREADS, TOGETHER)
    while group := list(itertools.islice(pictures, TOGETHER)):
        usable = [query for query in group if query.made]
        with engine.store.db:  # all that is read comes from one state: --rebuild, say, replaces rows meanwhile
            engine.store.db.execute("BEGIN")
            features = [query.made.features for query in usable]
            lists = candidate_rows(engine, features, engine.first_list) if usable else []
            found = iter([nearest_files(engine, query, rows, k) for query, rows in zip(usable, lists)])
        for query in group:
            query = query._replace(digest=None) if crop else query  # a part is not identical to the file
            yield query, verified(query, next(found)) if query.made else []


def is_mirrored(corners: Sequence[tuple[float, float]]) -> bool:
    """Whether a picture is mirrored in another one, by its corners there, given from its top left clockwise."""
    return bool(np.linalg.det(np.array(corners)[[1, 3]] - corners[0]) < 0)


def as_match(query: Picture, found: Found) -> Match:
    """The Match, still without a rank, that a Found of the query is shown as."""
    view, region = query.made.views[found.view], found.region
    label = "identical" if found.digest == query.digest else "copy" if region else ""
    if region:  # the alignment knows whether the copy is mirrored or a negative; the view only scored best
        words = ["mirrored"] * is_mirrored(region.corners) + ["inverted"] * region.inverted
        view = ", ".join(words + [word for word in view.split(", ") if word not in ("", "mirrored", "inverted")])
        left, top = query.made.corner
        region = region._replace(outline=[(x + left, y + top) for x, y in region.outline])
    return Match(0, found.path, found.score, label == "identical", label, view, region)


def search(
    queries: str | Path | Iterable[str | Path], engine: Engine | None = None, *, k: int = TOP,
    threshold: float | str = -1.0, views: str = "auto", crop: Sequence[float] | None = None,
) -> Iterator[Answer]:  # fmt: skip
    """What looks like each of the image files `queries`: an Answer for each, in their order.

    k          matches at most; a picture that is there under several names gives several
    threshold  cosine similarity, -1 to 1, that a match has at least, or label: copy, identical
    views      none, auto or all: the edits that a query is searched with, see `query_views`
    crop       the part of each query to search with: left, top, right, bottom, see `cut_out`

    Identical files and copies come first, then the others by score, equal scores by path. The query's own file and
    files that have changed are left out. Scores are exact; in a large collection a match may be missed, see
    `coded_index`. A query that cannot be used gets an `error`. Raises DeepVisionError if features are damaged.
    """
    if k < 1 or views not in VIEWS or (isinstance(threshold, str) and threshold not in LABELS):
        raise ValueError(f"k={k}, threshold={threshold!r}, views={views!r}: see the documentation of search")
    engine = engine or initialize_reverse_image_search()
    names = [queries] if isinstance(queries, (str, os.PathLike)) else queries
    labels = LABELS[LABELS.index(threshold) :] if isinstance(threshold, str) else ("", *LABELS)
    least = -1.0 if isinstance(threshold, str) else threshold
    with engine.store.errors():
        for query, found in compared(names, engine, k, views, crop):
            matches = [as_match(query, it) for it in found]
            matches.sort(key=lambda match: (("identical", "copy", "").index(match.label), -match.score, match.path))
            kept = [match for match in matches if match.label in labels and round(match.score, 3) >= least][:k]
            kept = [match._replace(rank=rank) for rank, match in enumerate(kept, start=1)]
            yield Answer(os.fsdecode(query.file.path), kept, None if query.made else query.reason or NOT_AN_IMAGE)


def representatives(engine: Engine, count: int) -> list[tuple[int, list[Match]]]:
    """At most `count` groups of images that look alike, by k-means over a sample, the largest group first.

    Each has its size, an estimate if the collection is larger than the sample, and the images nearest to its centre.
    """
    with engine.store.errors(), engine.store.db:
        engine.store.db.execute("BEGIN")  # rows and features come from one state
        # A digest is a hash: the first ones are a random sample.
        sample = engine.store.db.execute(f"{ROWS_AND_PATHS} ORDER BY digest, path LIMIT {SAMPLED}").fetchall()
        if not sample:
            return []
        rows, paths = zip(*sample)
        known, _, vectors = engine.store.features_of(set(rows))
    xb = to_float32(vectors[np.searchsorted(known, rows)])
    groups = list[tuple[int, list[Match]]]()
    kmeans = faiss.Kmeans(xb.shape[1], min(count, len(xb)), niter=10, spherical=True, min_points_per_centroid=1)
    kmeans.train(xb)
    D, I = kmeans.assign(xb)
    for centre in set(I.tolist()):
        members = sorted(np.flatnonzero(centre == I).tolist(), key=lambda i: -D[i])
        names = [engine.path_of(paths[i]) for i in members[:MEMBERS]]
        images = [Match(n, name, float(D[i]), False) for n, (i, name) in enumerate(zip(members, names), start=1)]
        groups.append((round(len(members) / len(xb) * engine.summary.images), images))
    return sorted(groups, key=lambda group: (-group[0], group[1][0].path))


# ---- Duplicates ------------------------------------------------------------------------------------------------------

NEIGHBOURS = 100  # contents that `pairs_by_score` compares with each content, at most
WHOLE = 0.95  # share of a picture's area from which on it counts as all of it

Pairs = Iterator[tuple[bytes, bytes, Match]]  # keep, other, and the Match of the other, still without a path


def different_files(engine: Engine, digest: bytes) -> list[str]:
    """The paths of the files with this content, by path. A link to one of them is no other file."""
    root, found = os.path.realpath(engine.images), dict[tuple[int, ...], str]()
    names = [os.fsdecode(file.path) for file in engine.store.files_with(digest)]
    # Files that are reached without a link come first, so that they stay and not the links.
    for name in sorted(names, key=lambda name: os.path.realpath(os.path.join(root, name)) != os.path.join(root, name)):
        path = os.path.join(engine.images, name)
        with suppress(OSError):  # gone meanwhile
            found.setdefault(os.stat(path)[1:3], path)  # inode and device
    return sorted(found.values())


def pairs_by_score(engine: Engine, threshold: float) -> Pairs:
    """Each two contents whose score, rounded to 3 decimals as printed, is at least `threshold`, in either order."""
    digests = dict(engine.store.db.execute("SELECT row, digest FROM features"))
    for rows, xb in progress_bar(engine.store.blocks(), desc="comparing", unit="block"):
        D, I = nearest(to_float32(xb), min(NEIGHBOURS + 1, len(digests)), engine.store.blocks())
        for place in zip(*np.nonzero(threshold - 0.0005 <= D)):
            keep, other = digests.get(rows[place[0]]), digests.get(I[place])
            if keep and other and keep != other:
                yield keep, other, Match(0, "", min(1.0, float(D[place])), False)


def relation(corners: Sequence[tuple[float, float]], shown: float, inside: float, inverted: bool) -> str:
    """What a picture is to the one to keep: "same picture", "mirrored", "crop, 60 %"...

    corners   its own corners in pixels of the picture to keep
    shown     share of the picture to keep that this picture shows
    inside    share of this picture that lies in the picture to keep
    inverted  whether it is a negative of the picture to keep
    """
    (x0, y0), (x1, y1), *_ = corners
    mirrored = is_mirrored(corners)
    angle = round(-math.degrees(math.atan2(y1 - y0, x1 - x0)) + 180 * mirrored) % 360  # clockwise
    words = ["mirrored"] * mirrored + ["inverted"] * inverted
    if min(angle, 360 - angle) >= 3:
        words.append(f"turned {angle}°")
    if shown < WHOLE:
        words.append(f"crop, {100 * shown:.0f} %")
    elif inside < WHOLE:
        words.append(f"within a larger picture, {100 * inside:.0f} % of it")
    return ", ".join(words) or "same picture"


def pairs_by_alignment(engine: Engine) -> Pairs:
    """Each two contents of the collection that are copies, twice: either one may be the one to keep."""
    first = engine.store.db.execute(f"SELECT min(path) FROM {USABLE} GROUP BY digest ORDER BY 1").fetchall()
    queries = [engine.path_of(path) for (path,) in first]
    results = compared(queries, engine, 1, COPIES)
    for query, found in progress_bar(results, total=len(queries), desc="comparing", unit="img"):
        for copy in {it.digest: it for it in found if it.region}.values():
            mask = Image.new("1", (100, 100))
            part = 100 * np.array(copy.region.outline) / query.made.local.size  # the query measures 100 × 100
            ImageDraw.Draw(mask).polygon(part.ravel().tolist(), fill=1)
            common = float(np.asarray(mask).mean())  # share of the query that the match covers
            inside = common * 100**2 / abs(np.linalg.det(part[[1, 3]] - part[0]))  # share of the match in it
            (corners, outline, *_), inverted = copy.region, copy.region.inverted
            match = Match(0, "", copy.score, False, "copy", relation(outline, common, inside, inverted))
            yield query.digest, copy.digest, match
            yield copy.digest, query.digest, match._replace(view=relation(corners, inside, common, inverted))


def largest_first(path: str) -> tuple[int, int, str]:
    """A key that sorts image files by their pixels, as the header tells, then by their bytes, then by path."""
    with suppress(Exception), Image.open(path, formats=image_formats()[0]) as image:  # it may be gone meanwhile
        return -image.width * image.height, -os.path.getsize(path), path
    return 0, 0, path


def grouped(engine: Engine, pairs: dict[bytes, dict[bytes, Match]]) -> Iterator[Group]:
    """Groups of files that hold the same picture, the largest keeper first. `pairs`: by keeper, then by other.

    Every file of a group was compared with the one to keep: a copy of a copy need not be a copy of that one.
    """
    repeated = engine.store.db.execute(f"SELECT digest FROM {USABLE} GROUP BY digest HAVING count(*) > 1")
    contents = {*pairs, *(digest for (digest,) in repeated)}
    left = {digest: files for digest in contents if (files := different_files(engine, digest))}
    for _, keep in sorted((largest_first(files[0]), digest) for digest, files in left.items()):
        if keep not in left:
            continue
        first, *same = left.pop(keep)
        found = [Match(0, path, 1.0, True, "identical") for path in same]
        others = [(match, other) for other, match in pairs.get(keep, {}).items() if other in left]
        for match, other in sorted(others, key=lambda pair: (-pair[0].score, left[pair[1]])):
            found += [match._replace(path=path) for path in left.pop(other)]
        if found:
            yield Group(first, [match._replace(rank=rank) for rank, match in enumerate(found, start=1)])


def find_duplicates(engine: Engine, threshold: float | str = "copy") -> Iterator[Group]:
    """Groups of files in the collection that hold the same picture. No file is touched.

    threshold  copy: pictures that align, also mirrored, turned or cropped; identical: the same bytes; or a cosine
               similarity, -1 to 1, that two pictures have at least, whether they align or not

    Raises DeepVisionError if features turn out to be damaged.
    """
    pairs: dict[bytes, dict[bytes, Match]] = {}
    with engine.store.errors():
        if threshold != "identical":
            found = pairs_by_alignment(engine) if threshold == "copy" else pairs_by_score(engine, float(threshold))
            for keep, other, match in sorted(found, key=lambda pair: pair[2].score):  # the best one of two stays
                pairs.setdefault(keep, {})[other] = match
        yield from grouped(engine, pairs)


# ---- Assembly --------------------------------------------------------------------------------------------------------

SAVE_SECONDS = 10  # seconds between saves; a killed process loses at most that much work
RANKS_WAIT = 30  # days that a rank of torchrun waits for the slowest one
CRASH = b"Fatal Python error"  # how faulthandler's report begins when a decoder crashes the process
# A program that reads files one by one and writes a dot before each: the last dot is for the file that crashed it
READ_EACH = """import os, sys, main
for path in sys.stdin.buffer.read().split(b"\\0"):
    os.write(1, b".")
    main.read_path(path, lambda image: main.to_rgb(image, 224))"""


def skip_crashing_file(store: Store, unread: list[File], images: Path, work: Work) -> None:
    """If a decoder crashed the last run, find the file in another process, note it, and remove it from `unread`."""
    if CRASH not in store.last_words:
        return
    at_risk = unread[: None if work.rebuild else 2 * BLOCK * work.ranks]  # a run saves before it has read so many
    paths = b"\0".join(os.path.join(os.path.abspath(os.fsencode(images)), file.path) for file in at_risk)
    here = os.path.dirname(os.path.abspath(__file__))  # `main` is imported from there
    done = subprocess.run([sys.executable, "-c", READ_EACH], cwd=here, input=paths, capture_output=True)
    if done.stdout and done.returncode not in (0, 1):
        store.save([Picture(unread.pop(len(done.stdout) - 1), reason=CRASHES)])


def read_new(store: Store, unread: Sequence[File], images: Path, model: Model, work: Work) -> Summary:
    """A Summary of the files that were read and saved: in `store`, or a rank's share of them in a store of its own.

    Saves come every few seconds, and also when an error or an interrupt ends the run. If a decoder crashes the process,
    faulthandler writes that into the lock file, for `skip_crashing_file`.
    """
    transform = get_transform(model.side, model.resample)
    known = (lambda _: False) if work.rebuild else store.is_known
    read = partial(read_picture, root=os.fsencode(images), transform=transform, known=known)
    size, workers = work.batch_size or model.batch, work.workers or usable_cores()
    files = [file for file in unread if zlib.crc32(file.path) % work.ranks == work.rank]
    ahead = min(AHEAD_BATCHES * size + workers, AHEAD_MOST)
    batches = with_features(read_ahead(read, files, workers, ahead), model, size)
    summary, into, unsaved = Summary(), store, list[Picture]()
    if work.ranks > 1:
        into = Store(store.folder, store.identity, store.dim, f"rank-{work.rank}.sqlite")
        into.repair()  # it is new
    start = saved = time.perf_counter()
    bar = progress_bar(total=len(files), desc=f"{model.name} on {model.device}, {model.precision}", unit="img")
    with open(store.lock_file.lock_file, "ab") as last_words, bar:
        faulthandler.enable(last_words)
        try:
            for batch in batches:
                unsaved += batch
                summary.add(batch)
                bar.update(len(batch))
                if time.perf_counter() - saved > SAVE_SECONDS or len(unsaved) > BLOCK:
                    whole, unsaved = unsaved, []  # if saving fails, it is not tried again below
                    into.save(whole)
                    saved = time.perf_counter()
        finally:
            faulthandler.disable()
            if unsaved:
                into.save(unsaved)
    if into is not store:
        into.db.close()
    return replace(summary, seconds=time.perf_counter() - start)


def merge_ranks(store: Store) -> Summary:
    """A Summary of what the ranks of torchrun, also stopped ones, have read. It is stored; their files are deleted."""
    summary = Summary()
    for path in sorted(store.folder.glob("rank-*.sqlite")):
        share = Store(store.folder, store.identity, store.dim, path.name)
        with suppress(DamageError), share.errors():  # what is damaged is read again
            share.check(whole=False)
            store.db.execute("ATTACH ? AS share", (os.fsencode(path),))
            with store.db:
                new = "SELECT NULL, digest, vector, checksum FROM share.features ORDER BY row"  # NULL: the next row
                store.db.execute(f"INSERT OR REPLACE INTO main.features {new}")
                store.db.execute("INSERT OR REPLACE INTO main.files SELECT * FROM share.files")
                store.db.execute("DELETE FROM main.meta WHERE key = 'images'")
            summary.opened += share.count("files")
            summary.new += share.count(USABLE)
            summary.recognised += share.count(ORPHANED)  # without features there: `store` has them already
        share.db.close()
        with suppress(sqlite3.OperationalError):  # it was not attached
            store.db.execute("DETACH share")
    for left in (*store.folder.glob("rank-*"), *store.folder.glob("*.part*")):  # the latter: of a stopped run
        left.unlink(missing_ok=True)
    return summary


def wait_for_ranks(work: Work) -> None:
    """Wait until all ranks of torchrun have come here."""
    if work.ranks == 1:
        return
    # Nothing is unsaved here. Python would handle a signal only after the wait, and torchrun kills after 30 s.
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=RANKS_WAIT))
        torch.distributed.barrier()
    except RuntimeError as error:
        raise DeepVisionError("another rank of torchrun has stopped: run it again, what was done is saved") from error
    finally:
        signal.signal(signal.SIGTERM, handler)


def read_share(images: Path, folder: Path, model: Model, work: Work) -> None:
    """As a rank of torchrun other than the first: read a share of the new files, for the first rank to take in."""
    wait_for_ranks(work)  # for the first rank, which makes the store sound, and holds the lock for all
    store = Store(folder, model.identity, model.dim)
    with store.errors():
        read_new(store, store.scan(images, work).unread, images, model, work)
    wait_for_ranks(work)


def store_changes(store: Store, changes: Changes, images: Path, model: Model, work: Work) -> Summary:
    """A Summary of what was read and noted as gone. If no usable image remains, nothing is noted: `images` is 0."""
    with store.locked():
        if merge_ranks(store).opened or store.scanned != store.version():  # a stopped or another run has added files
            changes = store.scan(images, work)
        skip_crashing_file(store, changes.unread, images, work)
        wait_for_ranks(work)  # from here on, they read
        summary = read_new(store, changes.unread, images, model, work)
        wait_for_ranks(work)
        if work.ranks > 1:
            summary = merge_ranks(store)
        if not store.mark_presence(changes):
            return summary
        summary.images, summary.gone = store.count(USABLE), store.count(GONE)
        if summary.gone and summary.new - summary.recognised == summary.images and not work.rebuild:
            strange = f"of the images that {store.folder} knows, none is in {images}"
            if work.prune:
                raise DeepVisionError(f"{strange}: nothing was pruned")
            log.warning("%s. If that is another collection, give it an --index-dir of its own", strange)
        if work.prune:
            store.prune()
            summary.forgotten, summary.gone = summary.gone, 0
        summary.skipped = store.count(SKIPPED)
    return summary


def update(store: Store, images: Path, model: Model, work: Work) -> Summary:
    """Bring the store up to date with the folder `images`. Returns a Summary of what was found and done.

    Raises DeepVisionError if no usable image is there. The store keeps what it has: the drive may only be unplugged.
    """
    changes = store.scan(images, work)
    if any(changes) or work.prune or work.ranks > 1:
        summary = store_changes(store, changes, images, model, work)
    else:
        summary = Summary(store.count(USABLE), store.count(SKIPPED), store.count(GONE))
    if summary.images:
        return summary
    advice = ": put images to search in there, or name another folder with --images"
    if known := store.count("files WHERE digest IS NOT NULL"):
        advice = f", but the index knows {known:,}: is a drive missing, or is it another folder? Nothing was changed"
    elif skipped := store.skipped(1):
        advice = f": all were skipped, for example {os.fsdecode(skipped[0][0])}: {skipped[0][1]}"
    raise DeepVisionError(f"{images} has no usable image{advice}")


def prepare(store: Store, images: Path, model: Model, work: Work) -> Engine:
    """Update the store and open its index: the engine of a search."""
    with store.errors():
        store.check(whole=work.update)
        if work.update:
            summary = update(store, images, model, work)
        else:  # counted if there is no note: a million take 0.4 s on a cold disk
            summary = Summary(store.get_meta("images") or store.count(USABLE))
        return Engine(images, model, store, open_index(store, work), work.exact, summary)


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
    images = Path(images)
    if os.path.realpath(images) == os.path.realpath(index_dir):
        raise DeepVisionError(f"--index-dir {index_dir} is the collection itself: choose another folder for the cache")
    if work.update and not os.path.isdir(images):
        there = "is not a folder" if os.path.exists(images) else "is missing"
        raise DeepVisionError(f"{images} {there}: put images to search in there, or name another folder with --images")
    model = model or load_model()
    folder = Path(index_dir, model.identity)
    if not (work.update or Path(folder, "index.sqlite").exists()):
        raise DeepVisionError(f"there is no index of {images} by {model.name} in {index_dir}: run without --no-update")
    if model.name == MODEL and not folder.exists() and any(Path(index_dir).glob(f"{OFFLINE}-*")):
        log.warning("the weights of %s are here now: all images are indexed with it; the offline index is kept", MODEL)
    if old := [path for path in map(folder.joinpath, OLD_FILES) if os.path.exists(path)]:
        log.warning("%s holds an index of an older format: all images are indexed anew", folder)
    store = Store(folder, model.identity, model.dim)
    try:
        engine = prepare(store, images, model, work)
    except DamageError:  # or the store is new
        with store.errors(), store.locked():
            store.repair()
        engine = prepare(store, images, model, work)
    for path in old:
        path.unlink(missing_ok=True)
    return engine


# ---- Output ----------------------------------------------------------------------------------------------------------


def verdict(found: Answer | Group) -> str:
    """What a heading says of the matches. It is empty if the query was found: if its first match has a label."""
    if isinstance(found, Group):
        return f"keep: the best of {len(found.matches) + 1}"
    if not found.matches:
        return "no match"
    return "" if found.matches[0].label else "no copy found"


def remark_on(match: Match) -> str:
    """What is said of a match: its label, how much of it the query shows, and the edit that was undone."""
    covers = f"covers {100 * match.region.covers:.0f} %" if match.region else ""
    return ", ".join(filter(None, (match.label, covers, match.view)))


def as_text(found: Answer | Group, engine: Engine, colour: bool) -> str:
    """A heading line, then `rank  score  path  label, view` for each match."""
    bold, green, plain = ("\x1b[1m", "\x1b[32m", "\x1b[0m") if colour else ("", "", "")
    searched = f"({engine.model.name}, {engine.summary.images:,} images): {verdict(found)}".removesuffix(": ")
    about = f"({verdict(found)})" if isinstance(found, Group) else searched
    lines = [f"{bold}{escape_controls(found[0])}{plain}  {about}"]
    for match in found.matches:
        remark = f"{green}{remark_on(match)}{plain}" if match.label else remark_on(match)
        rank = str(match.rank).rjust(len(str(len(found.matches))))
        lines.append(f"  {rank}  {match.score:6.3f}  {escape_controls(match.path)}  {remark}".rstrip())
    return "\n".join(lines)


def as_json(found: Answer | Group, engine: Engine) -> str:
    """One object on one line, in ASCII, so that any file name makes valid JSON."""
    subject = {found._fields[0]: found[0]}  # an Answer's query, or a Group's keep
    if found.error:
        return json.dumps({**subject, "error": found.error})
    matches = [match._replace(score=round(match.score, 6))._asdict() for match in found.matches]
    for match in matches:
        match["region"] = match["region"] and match["region"]._asdict()
    return json.dumps({**subject, "model": engine.model.name, "matches": matches})


def print_found(found: Answer | Group, engine: Engine, form: str) -> None:
    """Print on stdout, at once. `form`: text, json, or null: the paths byte for byte, each with a NUL at its end."""
    if form == "json":
        print(as_json(found, engine), flush=True)
    elif form == "null":
        sys.stdout.buffer.write(b"".join(os.fsencode(match.path) + b"\0" for match in found.matches))
        sys.stdout.buffer.flush()
    elif not found.error:
        terminal = sys.stdout.isatty() and os.name == "posix" and os.environ.get("TERM") != "dumb"
        print(as_text(found, engine, colour=terminal and not os.environ.get("NO_COLOR")), flush=True)


# ---- Page ------------------------------------------------------------------------------------------------------------

THUMBNAIL, QUALITY = 256, 60  # pixels of the longer side, and of WebP: 5 KB a photograph
ADDRESS = re.compile("https?://", re.IGNORECASE)  # the only queries, and redirects, that are fetched
PAGE_PICTURES = 5000  # on a page, 34 MB; the rest is left to the other outputs
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # Content-Security-Policy: nothing is loaded
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
{% if is_waiting %}<meta http-equiv="refresh" content="2">{% endif %}<title>{{ title }} – DeepVision</title><style>
:root{color-scheme:light dark;--soft:light-dark(#565662,#a9a9b6);--card:light-dark(#f3f3f6,#1e1e23);
--good:light-dark(#0f6a2b,#7fdc98);--bad:light-dark(#8a4b00,#f2bd70)}
body{margin:auto;max-width:90rem;padding:1rem;font:1rem/1.45 system-ui,sans-serif;overflow-wrap:anywhere;
background:light-dark(#fff,#121215);color:light-dark(#1a1a1f,#e8e8ee)}a{color:inherit}
h1{font-size:1.4rem;margin:0}h2{font-size:1.1rem;margin:0 0 .7rem}
h2 b{padding:.1em .6em;border:2px solid;border-radius:1em}.good{color:var(--good)}.bad{color:var(--bad)}
section{margin-top:1rem;padding-top:1rem;border-top:1px solid var(--soft)}
ol{display:grid;gap:.9rem;list-style:none;margin:0 0 .9rem;padding:0}
.large{grid-template-columns:repeat(auto-fill,minmax(min(15rem,46%),1fr))}
.small{grid-template-columns:repeat(auto-fill,minmax(min(8rem,29%),1fr));font-size:.85em}
figure{margin:0;height:100%;border-radius:.5rem;background:var(--card)}figcaption{padding:.5rem .6rem;font-size:.9em}
.identical figure,.copy figure{outline:3px solid var(--good)}small{display:block;color:var(--soft)}
figure>a{display:block;position:relative;aspect-ratio:1}img,svg{position:absolute;width:100%;height:100%}
img{object-fit:contain}polygon{fill:none;stroke:#19b35a;stroke-width:3;vector-effect:non-scaling-stroke}
nav,form{display:flex;flex-wrap:wrap;gap:.5rem 1.5rem;margin-top:1rem}input[type=number]{width:5rem}
.query a{touch-action:none;cursor:crosshair}
</style></head><body><header><h1>{{ title }}</h1>
{{ "{:,}".format(engine.summary.images) }} images in {{ engine.images|text }} ·
{{ engine.model.name }} on {{ engine.model.device }} · {{ about }}
{% if script %}<nav><a href="?{{ kept }}">The collection</a><a href="?twice=1&{{ kept }}">The same picture twice</a>
<label>Drop, paste or choose pictures <input type="file" id="given" multiple></label></nav>{% endif %}
{% if queries %}<form>{% for key in queries %}<input type="hidden" name="q" value="{{ key }}">{% endfor %}
<label>How many <input type="number" name="k" min="1" value="{{ k }}"></label>
<label>From which score <input type="number" name="least" min="-1" max="1" step="any" value="{{ least }}"></label>
<label>Part of the query <input name="part" placeholder="left, top, right, bottom" value="{{ part }}"></label>
<button>Search</button></form>{% endif %}
</header><main>{% for item, matches in shown %}<section>{% if item[0] or item.error %}
{% set bad = item.error or (item.query and verdict(item)) %}
<h2><b class="{{ "bad" if bad else "good" }}">{{ "✗" if bad else "✓" }} {{ (bad or verdict(item) or "found")|text }}</b>
{{ item[0]|name }}</h2>{% endif %}
{% for kind in ("large", "small") %}<ol class="{{ kind }}">
{% for match in matches if (kind == "large") == (match.label != "" or match.rank == 0) %}
{% set path, picture = match.path if match.rank else item[0], pictures[match.path] %}
<li class="{{ match.label if match.rank or item.keep else "query" }}"><figure>
<a href="{{ path|link }}" draggable="false">{% if picture.made %}
<img src="data:image/webp;base64,{{ picture.made[0] }}" alt="{{ path|name }}" loading="lazy">
{% set width, height = picture.made[1:] %}<svg viewBox="0 0 {{ width }} {{ height }}">
{% for corners in ([(match.region or {}).corners or []] if match.rank else
item.matches|selectattr("region")|map(attribute="region.outline")|list or [[]]) %}<polygon points="
{%- for x, y in corners %}{{ [0, [x, width]|min]|max }},{{ [0, [y, height]|min]|max }} {% endfor %}"/>{% endfor %}</svg>
{% else %}{{ (picture.reason or "not there any more")|text }}{% endif %}</a>
<figcaption>{% if not match.rank %}<b>{{ "query" if item.query else "keep" }}</b>
{% elif match.view and item.keep == "" %}<a href="?group={{ match.rank }}&{{ kept }}">{{ match.view }}</a>
{% else %}{{ match.rank }} · <b>{{ "%.3f" % match.score }}</b>
<span class="{{ "good" if match.label }}">{{ remark_on(match) }}</span>{% endif %}<br>{{ path|name }}
{% if picture.made %}<small>{{ "{:,} × {:,} px".format(*picture.made[1:]) }},
{{ "{:,.0f} KB".format(picture.file.size / 1000) }}</small>{% endif %}</figcaption></figure></li>
{% endfor %}</ol>{% endfor %}</section>{% endfor %}</main>
{% if left_out %}<footer>{{ "{:,}".format(left_out) }} more pictures are left out: --json lists all</footer>{% endif %}
{% if script %}<script>{{ script|safe }}</script>{% endif %}</body></html>
"""


def thumbnail(image: Image.Image) -> tuple[str, int, int]:
    """A small upright picture, WebP in base64, and the width and height of the whole picture."""
    width, height = image.size
    picture = to_rgb(image, THUMBNAIL)
    if (picture.width - picture.height) * (width - height) < 0:  # turned by EXIF
        width, height = height, width
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(stream := io.BytesIO(), "WEBP", quality=QUALITY, xmp=b"")
    return base64.b64encode(stream.getvalue()).decode(), width, height


def decode_path(path: str | Path) -> str:
    """A path as text, whatever it holds."""
    return escape_controls(os.fsencode(path).decode("utf-8", "replace"))


def link_to(path: str) -> str:
    """The address of a file; an address stays as it is; empty for stdin."""
    return path if ADDRESS.match(path) else "" if path == "-" else Path(path).absolute().as_uri()


def title_of(found: Sequence[Answer | Group]) -> str:
    """The title of a page: the number of groups, or of queries and of those that were found."""
    if not found:
        return "No picture is there twice"
    if isinstance(found[0], Group):
        return counted(len(found), "group")
    return f"{counted(len(found), 'query', 'queries')}, {sum(not verdict(item) for item in found):,} found"


def with_query(item: Answer | Group) -> list[Match]:
    """The matches, and before them, with rank 0, the query or the file to keep."""
    if item.error or not item[0]:
        return item.matches
    return [Match(0, getattr(item, "file", "") or item[0], 1.0, False), *item.matches]


def render(
    found: Sequence[Answer | Group], engine: Engine, name: Any = decode_path, link: Any = link_to, **values: Any
) -> str:
    """The page, HTML. `name` gives the text for a path, `link` its address; `values`: other variables of PAGE."""
    shown, room = list[tuple[Answer | Group, list[Match]]](), PAGE_PICTURES
    for item in found:
        matches = with_query(item)
        shown.append((item, matches[: max(0, room)]))
        room -= len(matches)
    paths = list(dict.fromkeys(match.path for _, matches in shown for match in matches))
    read = partial(read_path, transform=thumbnail)
    pictures = dict(zip(paths, read_ahead(read, paths, usable_cores(), 4 * usable_cores())))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters.update(text=decode_path, name=name, link=link)
    values = {"title": title_of(found), "policy": POLICY, "verdict": verdict, "remark_on": remark_on, **values}
    values |= {"shown": shown, "pictures": pictures, "left_out": max(0, -room), "engine": engine}
    return environment.from_string(PAGE).render(values)


def write_page(path: str | Path, found: Sequence[Answer | Group], engine: Engine, seconds: float) -> None:
    """Write the page, one file without script or network. Raises DeepVisionError if it cannot; an older page stays."""
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            raise FileExistsError(errno.EEXIST, "it exists and is not a regular file")
        with whole_file(target, f".{os.getpid()}") as stream:
            stream.write(render(found, engine, about=f"{time.strftime('%Y-%m-%d %H:%M')}, {seconds:.1f} s").encode())
    except OSError as error:
        why = error.strerror or first_line(error)
        raise DeepVisionError(f"the page {path} cannot be written ({why}): choose another --report FILE") from error


# ---- UI --------------------------------------------------------------------------------------------------------------

QUERY_BYTES = 300_000_000  # of a query given to --ui, on stdin or by an address: 100 million pixels, uncompressed
TILES = 24  # pictures that stand for the collection
COMPARING = "Comparing all pictures: each takes a fraction of a second"  # a page with this title reloads itself
SCRIPT = """// Pictures that a person gives are sent one by one. The answers are keys, which the next page asks for.
const given = document.querySelector("#given")
const send = async files => {
    const asked = new URLSearchParams(location.search)
    for (const name of ["q", "part", "group", "twice"]) asked.delete(name)
    for (const file of files) {
        const request = fetch("/?" + new URLSearchParams({name: file.name}), {method: "POST", body: file})
        const answer = await request.catch(error => ({statusText: error.message}))
        if (answer.ok) asked.append("q", await answer.text())
        else alert(`${file.name} is not taken: ${answer.statusText}`)
    }
    if (asked.has("q")) location.search = asked
}
given.onclick = () => { given.value = "" }
given.onchange = () => send(given.files)
document.onpaste = event => send(event.clipboardData.files)
ondragover = event => event.preventDefault()
ondrop = event => { event.preventDefault(); send(event.dataTransfer.files) }

// A rectangle that a person draws on a query starts a search with that part of it.
let svg, from, part
const place = event => {
    const {x, y} = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse())
    const {width, height} = svg.viewBox.baseVal
    return [Math.min(Math.max(x, 0), width), Math.min(Math.max(y, 0), height)].map(Math.round)
}
onpointerdown = event => {
    part = null
    svg = event.target.closest(".query a")?.querySelector("svg")
    if (svg) from = place(event)
}
onpointermove = event => {
    if (!svg || !event.buttons) return
    const [x, y, X, Y] = [...from, ...place(event)]
    svg.firstElementChild.setAttribute("points", [x, y, X, y, X, Y, x, Y])
    part = [Math.min(x, X), Math.min(y, Y), Math.max(x, X), Math.max(y, Y)]
}
onpointerup = () => {
    if (part && part[2] - part[0] > 8 && part[3] - part[1] > 8) location = svg.closest("a").href + "&part=" + part
}
onclick = event => { if (part) event.preventDefault() }
"""


class Request(http.server.BaseHTTPRequestHandler):
    """A request to the UI. Requests of other sites are refused. No path that a browser sends is opened."""

    server: UI
    timeout = 60  # seconds without a byte

    def parse_request(self) -> bool:
        """Read the header. False, and an error is sent, unless the UI's own page or a typed address asks for it."""
        if not super().parse_request():
            return False
        host, port = self.headers["Host"], self.server.server_address[1]
        is_own = host in [f"{it}:{port}".removesuffix(":80") for it in ("127.0.0.1", "localhost")]  # not another site's
        is_own &= self.headers.get("Origin", f"http://{host}") == f"http://{host}"
        is_own &= self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        if not is_own:
            self.send_error(403, "not from here")
        return is_own

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path != "/":
            return self.send_error(404)
        self.reply(self.server.page(query))

    def do_POST(self) -> None:
        """Save the picture that is sent, and answer with its key. Its name is in the address."""
        size = int(self.headers.get("Content-Length", -1))
        if not 0 <= size <= QUERY_BYTES:
            return self.send_error(413, f"more than {QUERY_BYTES:,} bytes")
        name = urllib.parse.parse_qs(self.path.partition("?")[2]).get("name", ["picture"])[0]
        path = os.path.join(tempfile.mkdtemp(dir=self.server.folder), os.path.basename(name))
        Path(path).write_bytes(self.rfile.read(size))
        self.reply(self.server.key(path))

    def reply(self, body: str) -> None:
        with suppress(ConnectionError):  # the browser has gone
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("X-Frame-Options", "DENY")  # the page's policy cannot say this
            self.end_headers()
            self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


class UI(socketserver.ThreadingTCPServer):
    """The server of the UI. It gives a browser small copies of pictures, and keys in place of paths."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # on Windows two programs would share the port

    def __init__(self, engine: Engine, port: int, top: int, folder: str) -> None:
        super().__init__(("127.0.0.1", port), Request)
        self.engine, self.top, self.folder = engine, top, folder  # the folder is for the pictures that are given
        self.searching = threading.Lock()  # the store is for one thread at a time
        self.comparing = threading.Thread(target=self.compare, daemon=True)
        self.duplicates: list[Group] | None = None  # None: not known yet, or the comparison has failed
        self.groups = representatives(engine, TILES)
        self.paths = dict[str, str]()  # by key

    def compare(self) -> None:
        """Find the duplicates. It runs in its own thread, with its own connection to the store: searches go on."""
        store = Store(self.engine.store.folder, self.engine.store.identity, self.engine.store.dim)
        self.duplicates = list(find_duplicates(replace(self.engine, store=store)))

    def key(self, path: str) -> str:
        """The key that stands for a path."""
        key = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        self.paths[key] = path
        return key

    def name_of(self, path: str) -> str:
        """What is shown of a path: its part below the collection; of a picture that was given, the file's name."""
        images = os.path.join(self.engine.images, "")
        return decode_path(path.removeprefix(images) if path.startswith(images) else os.path.basename(path))

    def page(self, query: str) -> str:
        """The page that the query of an address asks for."""
        asked = urllib.parse.parse_qs(query)
        usual = {"k": str(self.top), "least": "0", "part": ""}
        choices = {name: asked.get(name, [value])[0] for name, value in usual.items()}
        try:
            title, found = self.find(asked, **choices)
        except (DeepVisionError, ValueError, IndexError, argparse.ArgumentTypeError) as error:
            title, found = "This cannot be done", [Answer("", [], str(error))]
        kept = urllib.parse.urlencode({name: choices[name] for name in ("k", "least")})  # in all links
        script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        return render(
            found, self.engine, title=title, is_waiting=title == COMPARING,
            about="click a picture to search from it, or draw on a query to search with a part of it",
            policy=f"{POLICY}; connect-src 'self'; script-src 'sha256-{script}'", script=SCRIPT,
            name=self.name_of, link=lambda path: f"?q={self.key(path)}&{kept}",
            queries=asked.get("q", []), kept=kept, **choices,
        )  # fmt: skip

    def find(self, asked: dict[str, list[str]], k: str, least: str, part: str) -> tuple[str, list[Any]]:
        """The title and the content of a page: duplicates (`twice`), a search (`q`), a `group`, or the collection."""
        if "twice" in asked:
            with suppress(RuntimeError):  # it was started before
                self.comparing.start()
            self.comparing.join(1)  # second; a small collection is compared by then
            if self.comparing.is_alive():
                return COMPARING, []
            if self.duplicates is None:
                raise DeepVisionError("the comparison has failed: the terminal says why")
            return title_of(self.duplicates), self.duplicates
        with self.searching:
            if "q" in asked:
                paths = [self.paths[key] for key in asked["q"] if key in self.paths]
                if len(paths) < len(asked["q"]):
                    raise DeepVisionError("this picture is not known any more: give it again")
                crop = crop_box(part) if part else None
                found = list(search(paths, self.engine, k=int(k), threshold=float(least), crop=crop))
                return title_of(found), found
            if "group" in asked:
                size, images = self.groups[int(asked["group"][0]) - 1]
                return f"{counted(size, 'picture')} that look alike", [Group("", images)]
            ranked_groups = enumerate(self.groups, start=1)
            tiles = [images[0]._replace(rank=n, view=f"group of {size:,}") for n, (size, images) in ranked_groups]
            return "Pictures that stand for the collection", [Group("", tiles)]


def serve(engine: Engine, port: int, top: int) -> None:
    """Serve the UI to this machine alone. Never returns: an interrupt ends the process."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            server = UI(engine, port, top, folder)
        except OSError as error:
            raise DeepVisionError(f"port {port}: {error.strerror}. Choose another with --port") from error
        with server, suppress(KeyboardInterrupt):
            log.info("http://127.0.0.1:%d", server.server_address[1])
            server.serve_forever()
    os._exit(0)  # torch aborts a process that ends while a thread is at work


# ---- Command line ----------------------------------------------------------------------------------------------------

FETCH_SECONDS = 600  # for one address: QUERY_BYTES at 0.5 MB/s
NO_MEMORY = re.compile("alloc|memory|start new thread|map segment")  # as torch, FAISS, Python or ld.so say it
EXCLUDED = {  # by option: those that cannot be combined with it
    "no_update": ("index_only", "rebuild", "prune", "exclude"),
    "index_only": ("queries", "crop"),
    "export": ("queries", "crop"),
    "ui": ("queries", "crop", "threshold", "views", "form"),
    "duplicates": ("queries", "crop", "threshold", "views", "top"),
}


def score_or_label(text: str) -> float | str:
    """The value of --threshold and --duplicates: a cosine similarity, or one of LABELS."""
    if text in LABELS:
        return text
    with suppress(ValueError):
        if -1 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from -1 to 1, and not one of: {', '.join(LABELS)}")


def check_options(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End the program with a usage error if an option is out of range, or two options do not go together."""
    if any(number is not None and number < 1 for number in (options.top, options.batch_size, options.workers)):
        parser.error("--top, --batch-size and --workers must be above 0")
    if not 0 <= options.port < 1 << 16:
        parser.error(f"--port must be from 0 to {(1 << 16) - 1}")
    given = {name for name, value in vars(options).items() if value not in (parser.get_default(name), [])}
    for option, other in ((option, other) for option, others in EXCLUDED.items() for other in others):
        if {option, other} <= given:
            names = {"queries": "a QUERY", "form": "--json or --null"}
            first, second = (names.get(name, f"--{name.replace('_', '-')}") for name in (option, other))
            parser.error(f"{first} cannot be combined with {second}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("queries", nargs="*", metavar="QUERY", help=f"images, folders, addresses, - for stdin (default: {QUERIES}/)")
    add("--images", default=IMAGES, metavar="DIR", help="the collection (default: %(default)s/)")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="leave out paths that match; may be repeated")
    add("--index-dir", default=INDEX_DIR, metavar="DIR", help="the cache (default: %(default)s/)")
    add("-k", "--top", type=int, default=TOP, metavar="N", help="matches per query (default: %(default)s)")
    add("--threshold", type=score_or_label, default=-1.0, metavar="S", help="least cosine, or label: copy, identical")
    add("--views", choices=VIEWS, default="auto", help="edits of the query to undo (default: auto, the useful ones)")
    add("--crop", type=crop_box, metavar="L,T,R,B", help="a part of the query: its sides, in pixels or as shares")
    add("--model", metavar="NAME", help=f"{MODEL} (default), any torchvision classification model, timm:NAME, offline")
    add("--weights", metavar="NAME|FILE", help=f"torchvision weights (default: {WEIGHTS}) or a local file")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: %(default)s")
    add("--batch-size", type=int, metavar="N", help="images that the model takes at once (default: by device)")
    add("--workers", type=int, metavar="N", help="threads that read and decode (default: one a core)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--index-only", action="store_true", help="update the index, search nothing")
    alike = "groups of the same picture; S: copy (default), identical, or the least cosine"
    mode.add_argument("--duplicates", type=score_or_label, nargs="?", const="copy", metavar="S", help=alike)
    mode.add_argument("--ui", action="store_true", help="search in the browser")
    mode.add_argument("--export", metavar="DIR", help="features.npy and paths.txt, for any other vector database")
    add("--port", type=int, default=PORT, metavar="N", help="of --ui (default: %(default)s; 0: any that is free)")
    add("--no-update", action="store_true", help="search the index as it is, without a look at the collection")
    add("--exact", action="store_true", help="compare with every image, however many there are")
    add("--rebuild", action="store_true", help="start again from the images")
    add("--prune", action="store_true", help="forget files that are gone, and their features")
    add_form = partial(parser.add_mutually_exclusive_group().add_argument, dest="form", action="store_const")
    add_form("--json", const="json", default="text", help="one JSON object per query, a line each")
    add_form("--null", const="null", help="or -0: the paths found alone, each with a NUL at its end")
    add("--report", default=REPORT, metavar="FILE", help="the page to look at (default: %(default)s)")
    add("--no-report", dest="report", action="store_const", const=None, help="write no page")
    add_level = partial(parser.add_mutually_exclusive_group().add_argument, dest="level", action="store_const")
    add_level("-q", "--quiet", const=logging.WARNING, default=logging.INFO, help="warnings and errors alone")
    add_level("-v", "--verbose", const=logging.DEBUG, help="name the files that were skipped")
    # -0 is replaced here: if argparse knew it as an option, it would take the -0.5 of `--threshold -0.5` for one too.
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_intermixed_args(["--null" if arg == "-0" else arg for arg in given])
    check_options(options, parser)
    return options


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https alone. urllib itself also follows those to ftp."""

    def redirect_request(self, request: Any, body: Any, code: int, reason: str, headers: Any, address: str) -> Any:
        body.close()  # else urllib reads it into memory, however long it is
        if not ADDRESS.match(address):
            raise OSError(f"a redirect to {address} is refused")
        return super().redirect_request(request, body, code, reason, headers, address)


def save_query(name: str, path: str) -> str | None:
    """Save the query `name`, an address or - for stdin, as the file `path`. Returns None, or why that failed."""
    end = time.monotonic() + FETCH_SECONDS
    try:
        stdin = getattr(sys.stdin, "buffer", io.BytesIO())  # Python has none if it was closed
        opener = urllib.request.build_opener(Redirects)
        source: Any = nullcontext(stdin) if name == "-" else opener.open(name, timeout=CONNECT_SECONDS)
        with source as stream, open(path, "wb") as target:
            # `read` would wait until it has all bytes that it is asked for, however slowly a server sends them.
            while data := stream.read1(1 << 16):
                target.write(data)
                if target.tell() > QUERY_BYTES:
                    return f"more than {QUERY_BYTES:,} bytes"
                if name != "-" and time.monotonic() > end:
                    return f"not there after {FETCH_SECONDS} seconds"
            return None if target.tell() else "it is empty"
    except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
        words = first_line(error).removeprefix("<urlopen error ").removesuffix(">")
        return escape_controls(words) or type(error).__name__  # they may be a server's


def find_queries(names: Iterable[str], folder: str) -> Iterator[Answer]:
    """An Answer without matches for each query, file of a folder, and unlisted folder. Fetched ones go to `folder`."""
    unlisted = list[OSError]()
    for number, name in enumerate(names):
        if name == "-" or ADDRESS.match(name):
            path = os.path.join(folder, str(number))
            yield Answer(name, [], save_query(name, path), path)
        elif os.path.isdir(name):
            paths = (os.path.join(name, os.fsdecode(file.path)) for file in find_images(name, unlisted.append))
            yield from (Answer(path, [], file=path) for path in paths)
        else:
            yield Answer(name, [], file=name)
    for failure in unlisted:
        name = os.fsdecode(failure.filename)
        yield Answer(name, [], f"cannot be listed ({failure.strerror})", name)


def answers(options: argparse.Namespace, engine: Engine, folder: str) -> Iterator[Answer]:
    """An Answer for each query, and for each folder that cannot be listed. Files that are no images are passed over."""
    names = options.queries or filter(os.path.isdir, [QUERIES])
    queries, again = itertools.tee(find_queries(names, folder))
    choices = {"k": options.top, "threshold": options.threshold, "views": options.views, "crop": options.crop}
    for query, answer in zip(again, search((query.file for query in queries), engine, **choices)):
        error = query.error or answer.error
        if error != NOT_AN_IMAGE or query.query in options.queries:
            yield query._replace(matches=[] if error else answer.matches, error=error)


def write_export(engine: Engine, folder: Path) -> None:
    """Write paths.txt, a line for each image, then features.npy, float16 (n, dim). If it is there, both are whole."""
    store = engine.store
    try:
        with store.locked():  # nobody else changes the store meanwhile
            files = store.db.execute(f"{ROWS_AND_PATHS} ORDER BY row, path").fetchall()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "features.npy").unlink(missing_ok=True)
            with whole_file(folder / "features.npy") as features, whole_file(folder / "paths.txt") as paths:
                header = {"descr": "<f2", "fortran_order": False, "shape": (len(files), store.dim)}
                np.lib.format.write_array_header_1_0(features, header)
                for start in range(0, len(files), BLOCK):
                    wanted, names = zip(*files[start : start + BLOCK])
                    rows, _, vectors = store.features_of(set(wanted))
                    features.write(vectors[np.searchsorted(rows, wanted)].tobytes())
                    for name in names:
                        paths.write(name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r") + b"\n")
    except (OSError, sqlite3.Error, DamageError) as error:
        raise DeepVisionError(f"--export {folder}: {first_line(error)}; run it again, or elsewhere") from error
    log.info("%s: %d × %d features and their paths", folder, len(files), store.dim)


def report_update(engine: Engine, options: argparse.Namespace) -> None:
    """Say on stderr what the update found and did."""
    model = engine.model
    unchecked = f"{engine.summary.images:,} images, not checked for changes (--no-update)"
    done = unchecked if options.no_update else engine.summary
    log.info("%s: %s (%s on %s, %s)", engine.images, done, model.name, model.device, model.precision)
    if engine.index.recall and not engine.exact:
        recall = f"recall@{TOP} is {engine.index.recall:.3f}"
        log.info("the search is approximate (%s); --exact compares with every image", recall)
    if options.no_update:
        first = engine.store.db.execute(f"SELECT path FROM {USABLE} LIMIT 1000")
        if not any(os.path.exists(engine.path_of(path)) for (path,) in first):
            log.warning("none of the first images in the index is in %s: is --images the right folder?", engine.images)
    if log.isEnabledFor(logging.DEBUG):
        for path, reason in engine.store.skipped():
            log.debug("skipped %s: %s", engine.path_of(path), reason)


def print_answers(options: argparse.Namespace, engine: Engine) -> int:
    """Print the answers to the queries, or the duplicates, write the page, and return the exit status."""
    start = time.perf_counter()
    found = list[Answer | Group]()
    is_search = options.duplicates is None
    is_fetched = any(name == "-" or ADDRESS.match(name) for name in options.queries)
    with tempfile.TemporaryDirectory() if is_fetched else nullcontext("") as folder:
        for item in answers(options, engine, folder) if is_search else find_duplicates(engine, options.duplicates):
            found.append(item)
            print_found(item, engine, options.form)
            if item.error:
                log.error("%s: %s", item[0], item.error)
        if is_search and not found:
            where = ", ".join(options.queries) or f"{QUERIES}/"
            raise DeepVisionError(f"no image to search with in {where}: put one there, or name it: main.py photo.jpg")
        if not is_search:
            log.info("%s", title_of(found))
        if options.report:
            write_page(options.report, found, engine, time.perf_counter() - start)
            log.info("%s", options.report)
    return 1 if any(item.error for item in found) else 0


class OneLine(logging.Formatter):
    """Writes a message in one line that cannot steer a terminal, whatever names it holds."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


def run(options: argparse.Namespace) -> int:
    """Do what the options ask for, and return the exit status."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # the processes that torchrun started; this is number `rank`
    rank = int(os.environ.get("RANK", 0)) % ranks  # 0 without torchrun, whatever RANK is
    if rank:  # only rank 0 reports progress
        log.handlers[0].setFormatter(OneLine(f"rank {rank}: %(message)s"))
        log.setLevel(logging.WARNING)
    model = load_model(options.model, options.weights, options.device)
    work = Work(
        options.batch_size, options.workers, options.rebuild, options.prune, not options.no_update, options.exact,
        exclude=tuple(options.exclude), rank=rank, ranks=ranks,
    )  # fmt: skip
    if rank:
        if work.update:
            read_share(Path(options.images), Path(options.index_dir, model.identity), model, work)
        return 0
    engine = initialize_reverse_image_search(options.images, options.index_dir, model=model, work=work)
    report_update(engine, options)
    if options.export:
        write_export(engine, Path(options.export))
    elif options.ui:
        serve(engine, options.port, options.top)
    elif not options.index_only:
        return print_answers(options, engine)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 all answered, 1 something failed, 2 usage, 130 interrupted."""
    options = parse_arguments(argv)
    log.handlers = [logging.StreamHandler()]
    log.handlers[0].setFormatter(OneLine())
    log.setLevel(options.level)
    warnings.filterwarnings("ignore", message="tqdm:")  # its monitor thread failed; not needed
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow doubts is either read or skipped with a reason
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that is not UTF-8 comes out byte for byte; what an older code page lacks, as an escape.
        utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    try:
        return run(options)
    except (DeepVisionError, sqlite3.Error) as error:
        log.error("error: %s", error)
        return 1
    except (MemoryError, RuntimeError, ImportError) as error:
        if not (isinstance(error, MemoryError) or NO_MEMORY.search(str(error))):
            raise
        log.error("error: out of memory (%s): try --workers 1 and a small --batch-size", first_line(error))
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
