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

images on disk → pixels → features and points → store → indexes → candidates → verdicts → terminal, JSON, page

Written: results.html, the page to look at, and in image_index/<model>/
    index.sqlite    the store: the files of the collection, their features and points, and verdicts on pairs of them
    index.faiss     the FAISS index over the features: it finds look-alikes
    copies.faiss    the FAISS index over the points: it finds copies. Both are made again from the store
    lock, crash     held by the one run that writes; there only while files are read, or after a crash
and in image_index/, by --ui alone: ui.sqlite, with small pictures and groups that were dismissed
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
import importlib.metadata
import io
import itertools
import json
import logging
import math
import operator
import os
import re
import secrets
import select
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
import webbrowser
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple

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
LABELS = ("variant", "copy", "identical")  # of matches, the weakest first; for --threshold and --duplicates

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


NO_MEMORY = re.compile(  # as torch, FAISS, Python and ld.so say it; other words on memory are of other errors
    "out of memory|not enough memory|[Cc]an(no|')t allocate memory|bad_alloc|start new thread|failed to map segment"
)


def lacks_memory(error: BaseException) -> bool:
    """Whether the machine had too little memory, by the error's type or its words. Words of an OSError are about a
    file, which may claim an absurd size.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


def reason_of(error: BaseException) -> str:
    """Why a file or a query cannot be used, in one line."""
    if lacks_memory(error):
        return "too little memory: try --workers 1"
    return escape_controls(getattr(error, "strerror", None) or first_line(error))


def escape_controls(text: str) -> str:
    """The text with control and direction characters as escapes, so that no file name can steer a terminal."""
    unsafe = ("Cc", "Cf", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in unsafe else c for c in text)


class File(NamedTuple):  # of the collection, as a scan finds it
    path: bytes  # relative to the collection
    size: int  # bytes
    mtime: int  # nanoseconds; -1: read the file again at the next update

    @staticmethod
    def of(path: bytes, info: os.stat_result) -> File:
        """The file as `os.stat` describes it. A time after the year 2262 does not fit SQLite's 64 bits: it wraps."""
        return File(path, info.st_size, info.st_mtime_ns % 2**63)


class Picture(NamedTuple):  # a file that was read, and its results: together, so that none is taken for another file's
    file: File
    digest: bytes | None = None  # hash of the content; None: not a usable image
    made: Any = None  # what `transform` returned: Made, Seen, Shown or a thumbnail; None: not computed
    vector: np.ndarray | None = None  # features, fp16 (dim,)
    points: bytes | None = None  # as `pack_points` gives them
    reason: str | None = None  # why it cannot be used, or TRUNCATED; None also for what was never meant as an image
    vanished: bool = False  # the file went away or changed while it was read


class Region(NamedTuple):  # where query and match show the same; corners start at a picture's top left, clockwise
    corners: list[tuple[float, float]]  # of the query, or the file to keep, in pixels of the upright match
    outline: list[tuple[float, float]]  # the corners of the match, in pixels of the upright query
    points: int  # details that agree: windows of both pictures
    covers: float  # share of the match's area that is seen in the query, 0 to 1
    inverted: bool = False  # one picture is a negative of the other
    differing: float = 0.0  # share of what both show in which they differ; 0 for a copy
    differs: Sequence[Sequence[float]] = ()  # boxes around that: left, top, right, bottom in pixels of the match


class Match(NamedTuple):
    rank: int  # from 1
    path: str
    score: float  # cosine similarity, -1 to 1, of the best view of the query
    identical: bool  # the same bytes as the query
    label: str = ""  # one of LABELS, or empty
    view: str = ""  # the edit between query and match, see `edit_words`; of --duplicates, from the file to keep
    region: Region | None = None  # of a copy or a variant
    lost: str | None = None  # of --duplicates: what would be lost with this file; None: nothing
    truncated: bool = False  # the file is damaged, and was decoded as far as it goes


class Answer(NamedTuple):  # what was found for a query
    query: str  # as it was given
    matches: list[Match]
    error: str | None = None
    file: str = ""  # path of the query's picture; empty: the path is `query`


class Group(NamedTuple):  # files that hold the same picture
    keep: str  # the file that lets most others go, see `keeping_order`
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
class Work:  # the options of an update and of a search
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
class Summary:  # what an update found and did
    images: int = 0  # usable ones in the collection
    skipped: int = 0
    truncated: int = 0  # of the usable ones
    gone: int = 0
    forgotten: int = 0  # by --prune
    opened: int = 0  # files, in this run
    new: int = 0  # usable ones among them, new or changed
    recognised: int = 0  # of the new ones: known by content, because the file was moved, copied or brought back
    seconds: float = 0.0  # that reading and the model took; 0: not measured, several ranks of torchrun did it

    def add(self, pictures: Sequence[Picture]) -> None:  # that this run has read
        usable = [picture for picture in pictures if picture.digest and not picture.vanished]
        self.opened += len(pictures)
        self.new += len(usable)
        self.recognised += sum(picture.vector is None for picture in usable)

    def __str__(self) -> str:
        known = f" ({self.recognised:,} recognised by content)" if self.recognised else ""
        damaged = f", {self.truncated:,} truncated" if self.truncated else ""
        pruned = f", {self.forgotten:,} forgotten" if self.forgotten else ""
        rate = f"{self.opened / self.seconds:,.1f} images/s" if self.seconds else "read by all ranks"
        there = f"{self.images + self.skipped:,} found, {self.new:,} new{known}, {self.images - self.new:,} unchanged"
        lacking = f"{self.skipped:,} skipped{damaged}, {self.gone:,} gone{pruned}"
        return f"{there}, {lacking}; {rate if self.opened else 'no image was opened'}"


# ---- Images ----------------------------------------------------------------------------------------------------------

NOT_AN_IMAGE = "not an image"  # the reason given for a query that was never meant as one
TRUNCATED = "truncated"  # the reason noted for a damaged image that is used all the same, as far as it can be decoded
MAX_PIXELS = 100_000_000  # pixels to decode, after JPEG scaling: 0.4 GB in memory; phones reach 200 million in JPEG
COSTLY_FORMATS = {"WEBP", "JPEG2000"}  # decoding takes the memory of four images: the limit is half of MAX_PIXELS
LARGE_PIXELS = 24_000_000  # pixels; larger images are decoded one at a time, which bounds memory
MAX_PADDED = 1 << 25  # bytes of a damaged HEIF, AVIF or WebP image that are looked at, and of zeros put after them
FRAMES, SHOWS = 10, 16  # frames of an animation in which a picture is looked for: one whose levels differ by 16 of 255
DRAFT_SCALE = 3  # a JPEG is decoded at no less than 3 times the model's side; with 2, thin stripes change
DIGEST_BYTES = 16  # bytes of the SHA-256 that identifies a content
PREPROCESSING = 2  # version, part of a model's identity; raise it when the same file would get other pixels
SYSTEM_NAMES = {b"@eadir", b"thumbs.db", b"desktop.ini", b"$recycle.bin", b"system volume information", b"__macosx"}
NOT_DECODED = {"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "FTEX"}  # EPS starts Ghostscript; Pillow cannot read the others
RAW_SUFFIXES = {".dng", ".nef", ".cr2", ".cr3", ".arw", ".pef", ".srw", ".orf", ".rw2", ".raf"}
# The packages that read further formats, if they are installed
DECODERS = {"pillow-heif": {".heic", ".heif", ".hif"}, "pillow-jxl-plugin": {".jxl"}, "rawpy": RAW_SUFFIXES}
UNREADABLE = "cannot be read here: pip install"  # between a suffix and a package
LEAST_PREVIEW = 1000  # pixels, of the longer side of a RAW file's preview that is taken for the picture
RAW_TAGS = {330, 33422, 50706}  # of TIFF: SubIFDs, CFAPattern and DNGVersion
# What stands in XMP if the file holds more than a picture
XMP_MARKS = {b"MotionPhoto": "a video", b"MicroVideo": "a video", b"GDepth": "depth", b"hdrgm": "a gain map"}
# The Huffman code that most JPEGs have. 32 zero bytes stand for nothing sensible in it, but for white in other codes
STANDARD_CODE, HOLE = bytes.fromhex("100002010303020403050504040000017d"), 32
COLOUR_SIDE = 128  # pixels, of the square in which colours are looked for: a stamp of 1 % of a page's width is seen
TONE, GREY_NOISE, TINT_NOISE = 8, 6, 24  # of 255: brightness that is one tone; differences of channels in grey, a tint

one_large_image = threading.Lock()  # held while an image of more than LARGE_PIXELS is decoded


def relative_pattern(pattern: str, folder: str | Path) -> str:
    """A pattern of paths below `folder`, as a person may mean it: "cache/", "./cache", "/cache" or "FOLDER/cache"."""
    pattern = os.path.normpath(pattern)
    for root in (os.path.abspath(folder), os.path.normpath(folder)):
        pattern = pattern.removeprefix(os.path.join(root, ""))
    return pattern.lstrip(os.sep)


class Tolerance(threading.local):
    """Pillow's LOAD_TRUNCATED_IMAGES, one for each thread: true while a thread decodes a damaged image."""

    is_on = False

    def __bool__(self) -> bool:
        return self.is_on


tolerance = Tolerance()


def find_images(
    folder: str | Path, onerror: Callable[..., None], without: Sequence[str | Path] = (), exclude: Sequence[str] = ()
) -> Iterator[File]:
    """Every file below `folder` that may be an image, in the order of paths. Links are followed, no folder is listed
    twice. onerror is called with the OSError of what cannot be listed. Left out are the folders `without`, and relative
    paths that fit one of the shell patterns `exclude`; a pattern that nothing fits is said."""
    root, separator = os.fsencode(folder), os.fsencode(os.sep)
    visited = {os.stat(path)[1:3] for path in without}  # inode and device
    patterns, used = {pattern: relative_pattern(pattern, folder) for pattern in exclude}, set[str]()
    waiting = [File(b"", 0, 0)]  # a stack of files and folders; a folder's path is empty or ends with a separator
    while waiting:
        if (file := waiting.pop()).path[-1:] not in (b"", separator):
            yield file
            continue
        found, here = list[File](), os.path.join(root, file.path.removesuffix(separator))
        try:
            identity = os.stat(here)[1:3]
            entries = () if identity in visited else list(os.scandir(here))
        except OSError as error:
            onerror(error)
            continue
        visited.add(identity)
        for entry in entries:
            path, name = file.path + entry.name, entry.name.lower()
            fitting = {it for it, pattern in patterns.items() if fnmatch.fnmatch(os.fsdecode(path), pattern)}
            used |= fitting
            if name.startswith(b".") or name in SYSTEM_NAMES or fitting:
                continue
            try:
                found.append(File.of(path + separator if entry.is_dir() else path, entry.stat()))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):  # a broken link, or a file that is gone by now
                    onerror(error)
        waiting += sorted(found, reverse=True)
    for pattern in patterns.keys() - used:
        log.warning("--exclude %s leaves out nothing in %s", pattern, os.fsdecode(folder))


@cache
def image_formats() -> tuple[list[str], set[str], str]:
    """The formats that can be decoded here, the suffixes of their file names, and the version of the decoders."""
    Image.init()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow refuses headers of more than twice this
    importlib.import_module("PIL.ImageFile").LOAD_TRUNCATED_IMAGES = tolerance  # type: ignore[attr-defined]
    suffixes, version = set[str](), f"Pillow {Image.__version__}"
    for package, read in DECODERS.items():
        with suppress(ImportError):
            module = importlib.import_module(package.removesuffix("-plugin").replace("-", "_"))
            getattr(module, "register_heif_opener", str)()  # the one of JPEG XL registers itself
            suffixes |= read
            version += f", {package} {importlib.metadata.version(package)}"
    formats = [name for name in Image.ID if name not in NOT_DECODED]
    suffixes |= {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return formats, suffixes, version


def developed(stream: BinaryIO) -> Any:
    """The picture of a RAW file: the preview in it if that is large, else developed at half size; see info["raw"]."""
    rawpy, image = importlib.import_module("rawpy"), None  # type: Any, Any
    stream.seek(0)
    with rawpy.imread(stream) as raw:
        size, flip = (raw.sizes.width, raw.sizes.height), raw.sizes.flip
        if math.prod(size) > 2 * MAX_PIXELS:
            raise ValueError(f"too large: over {2 * MAX_PIXELS:,} pixels")
        with suppress(Exception):  # there is no preview, or it is broken
            image = Image.open(io.BytesIO(raw.extract_thumb().data), formats=["JPEG"])
            image.getexif()[274] = {3: 3, 5: 8, 6: 6}.get(flip, 1)  # LibRaw's turn as an EXIF orientation
        if image is None or max(image.size) < LEAST_PREVIEW:
            image = Image.fromarray(raw.postprocess(half_size=True, use_camera_wb=True))  # upright
    image.info["raw"] = size[:: -1 if flip > 4 else 1]  # the true size
    return image


def open_image(stream: BinaryIO, path: str) -> Image.Image | None:
    """The image in `stream`, only its header read. None: no image, nor named like one. ValueError: a broken one."""
    formats, suffixes, _ = image_formats()
    suffix = os.path.splitext(path)[1].lower()
    if suffix in RAW_SUFFIXES & suffixes:
        try:
            return developed(stream)
        except ValueError:  # it is too large
            raise
        except Exception:  # perhaps Pillow reads it
            stream.seek(0)
    try:
        image = Image.open(stream, formats=formats)
        image.info |= {"raw": image.size} if suffix in RAW_SUFFIXES else {}
        return image
    except Image.DecompressionBombError:
        raise ValueError(f"too large: over {2 * MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        if package := next((name for name, known in DECODERS.items() if suffix in known - suffixes), ""):
            raise ValueError(f"{suffix} {UNREADABLE} {package}") from None
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


def decode_damaged(stream: BinaryIO, path: str, transform: Callable[..., Any]) -> Any:
    """transform(image) of a damaged image, decoded as far as it goes. None: nothing of it is seen."""
    stream.seek(0)
    head = stream.read(12)
    if head[8:] == b"WEBP" or head[4:8] == b"ftyp":  # WebP, HEIF and AVIF are only decoded at their full length
        stream = io.BytesIO(head + stream.read(MAX_PADDED) + bytes(MAX_PADDED))
    stream.seek(0)
    tolerance.is_on = True
    try:
        image: Any = open_image(stream, path)  # what is no image, None, fails in the next line
        image.info[TRUNCATED] = True
        made, top = transform(image), min(16, image.height - 1)  # rows that may be one broken block of a JPEG
        extremes = np.array(image.crop((0, top, *image.size)).getextrema())
        return made if (extremes[..., 0] < extremes[..., 1]).any() else None
    except Exception as error:
        if lacks_memory(error):
            raise
        return None
    finally:
        tolerance.is_on = False


def read_picture(file: File, root: bytes, wanted: Callable[[bytes], Callable[..., Any] | None]) -> Picture:
    """Read a file of the folder `root`: a Picture with its hash and with what the function wanted(hash) makes of it.
    The Picture of a file that cannot be used has a reason instead. No error in a file reaches the caller."""
    path = os.path.join(root, file.path)
    try:
        file = File.of(file.path, os.stat(path))
        if not os.path.isfile(path):  # opening a FIFO would wait for a writer forever
            return Picture(file, reason="not a regular file", vanished=not os.path.exists(path))
        if os.stat(path)[1:3] in open_databases:  # closing it would drop SQLite's locks, as POSIX has it
            return Picture(file)
        with open(path, "rb") as stream:
            try:
                if (image := open_image(stream, os.fsdecode(path))) is None:
                    return Picture(file)
                digest, reason = content_hash(stream), None
                made = transform(image) if (transform := wanted(digest)) else None
            except Exception as error:
                if isinstance(error, sqlite3.Error) or lacks_memory(error) or getattr(error, "errno", None):
                    raise
                digest, reason = content_hash(stream), TRUNCATED
                transform = wanted(digest)
                if not transform or (made := decode_damaged(stream, os.fsdecode(path), transform)) is None:
                    raise
        return Picture(file, digest, made, reason=reason, vanished=file != File.of(file.path, os.stat(path)))
    except sqlite3.Error:
        raise  # from `wanted`: the database failed, not the file
    except Exception as error:  # decoders raise anything at all on a malformed file
        if lacks_memory(error) or getattr(error, "errno", None):
            file = file._replace(mtime=-1)  # perhaps the machine failed and not the file: try again next time
        return Picture(file, reason=reason_of(error), vanished=isinstance(error, FileNotFoundError))


def read_path(path: str | bytes | Path, transform: Callable[[Image.Image], Any]) -> Picture:
    """Read a file by its whole path, as `read_picture` does."""
    return read_picture(File(os.fsencode(path), 0, 0), b"", lambda _: transform)


def read_query(query: Any, transform: Callable[[Image.Image], Any]) -> Picture:
    """Read a query as `read_picture` does: a path, a Pillow image, a file-like object, or an array, uint8 (h, w, 3)."""
    if isinstance(query, (str, os.PathLike)):
        return read_path(os.fspath(query), transform)
    name = str(getattr(query, "filename", "") or getattr(query, "name", "") or type(query).__name__)
    file, digest, image = File(os.fsencode(name), 0, 0), None, query
    try:
        if isinstance(query, np.ndarray):
            if query.dtype != np.uint8 or query.ndim != 3 or query.shape[2] != 3:
                raise ValueError(f"an array must be uint8 (height, width, 3), not {query.dtype} {query.shape}")
            image = Image.fromarray(query)
        elif hasattr(query, "read"):
            image, digest = open_image(stream := io.BytesIO(query.read()), name), content_hash(stream)
        elif isinstance(query, Image.Image):
            image = query.copy()  # the transform may turn it
        else:
            raise ValueError("not a query: give a path as str, or the bytes of an image as io.BytesIO(...)")
        return Picture(file, digest, transform(image)) if image else Picture(file)
    except Exception as error:  # see `read_picture`
        return Picture(file, reason=reason_of(error))


def to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits (I;16, I) or floating point (F) in 8 bits. Pillow itself would clip the values."""
    values = torch.from_numpy(np.array(image, np.float32)).nan_to_num_(0, 0, 0)
    is_clear = values == image.info.get("transparency", math.nan)  # white in the end, as in `to_rgb`
    low, high = min(0.0, float(values.min())), float(values.max())
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)  # the usual values of white
    white = next((scale for scale in scales if high <= scale), high)  # the least of them that no value exceeds
    levels = values.sub_(low).mul_(255 / (white - low)).add_(0.5).byte()  # in place: 0.4 GB for 100 million pixels
    return Image.fromarray(levels.masked_fill_(is_clear, 255).numpy())


def skip_blank_frames(image: Image.Image) -> None:
    """Go to the first of FRAMES frames that shows something, if there is one: an animation may fade in."""
    size = image.size
    if not getattr(image, "is_animated", False) or size[0] * size[1] > LARGE_PIXELS:
        return
    with suppress(Exception):  # it has no more frames, or one of them is damaged
        for frame in range(image.tell(), FRAMES):
            image.seek(frame)
            seen = Image.alpha_composite(Image.new("RGBA", size, "white"), image.convert("RGBA"))
            if np.ptp(seen.getextrema(), axis=1).max() >= SHOWS:
                return
    with suppress(Exception):
        image.seek(0)


def to_rgb(image: Image.Image, side: int) -> Image.Image:
    """The first frame that shows something, upright, in 8-bit RGB, transparency over white. A JPEG may come smaller,
    but never smaller than a model of this `side` needs."""
    skip_blank_frames(image)
    image.draft(None, (DRAFT_SCALE * side, DRAFT_SCALE * side))
    limit = MAX_PIXELS // 2 if image.format in COSTLY_FORMATS else MAX_PIXELS
    if (count := image.width * image.height) > limit:
        raise ValueError(f"too large: {count:,} pixels, over {limit:,}")
    with one_large_image if count > LARGE_PIXELS else nullcontext():
        try:
            image.load()
        except Exception:
            if not tolerance:
                raise
            image.tile = []  # type: ignore[attr-defined]  # what was decoded before the damage is there
        with suppress(Exception):  # malformed EXIF raises anything at all; the image then stays as it is
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            image = to_8_bits(image)
        if image.has_transparency_data:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")


class Holdings(NamedTuple):  # what a file holds beside the pixels of its first frame
    size: tuple[int, int]  # width and height of the upright picture; of a RAW file, of its RAW data
    frames: str  # "3 pages", "5 frames", "2 layers"; empty if there is one
    bits: int  # of a channel in the file
    colours: int  # 0: grey, 1: one tint, as of a sepia print, 2: colours
    raw: bool
    truncated: bool  # or seen to be damaged
    more: frozenset[str]  # words for the rest: transparency, camera metadata, a place, depth, a gain map, a video


def colours_of(picture: Image.Image) -> int:
    """0 for a grey picture, 1 for one in a single tint, 2 for one in colours, and be it a stamp on a grey page."""
    small = picture.resize([max(1, min(COLOUR_SIDE, side // 2)) for side in picture.size], Image.Resampling.BOX)
    rgb = np.asarray(small).reshape(-1, 3).astype(np.float32)
    chroma, tone = rgb[:, ::2] - rgb[:, 1:2], rgb.mean(1).astype(int) // TONE
    tint = [(np.bincount(tone, plane) / np.bincount(tone).clip(1))[tone] for plane in chroma.T]  # mean of a tone
    return int(np.abs(chroma).max() > GREY_NOISE) + int(np.abs(chroma - np.stack(tint, 1)).max() > TINT_NOISE)


def has_hole(image: Any) -> bool:
    """Whether zeros stand in the pixels of a JPEG, as after a disk error. Pillow shows garbage and says nothing."""
    start, _ = image.fp.tell(), image.fp.seek(0)
    header, data = image.fp.read(start), image.fp.read().partition(b"\xff\xd9")[0]
    return STANDARD_CODE in header and bytes(HOLE) in data


def holdings_of(image: Any) -> Holdings:
    """The Holdings of an image as `open_image` returns it."""
    tags, size, count, turn, more = getattr(image, "tag_v2", {}), image.size, 1, 1, set[str]()
    damaged = TRUNCATED in image.info or (image.format in ("JPEG", "MPO") and has_hole(image))
    deep = 16 if re.search(r";16|65535", f"{image.mode} {getattr(image, 'tile', '')}") else 8  # as the decoder unpacks
    bits = max({"1": 1, "I": 32, "F": 32}.get(image.mode, deep), image.info.get("bit_depth", 0), *tags.get(258, ()))
    with suppress(Exception):  # malformed metadata raises anything at all; so each part of it is read on its own
        count = getattr(image, "n_frames", 1)
    with suppress(Exception):
        more |= {"camera metadata"} if {271, 272} & {*image.getexif()} else set()
        turn = -1 if image.getexif().get(274, 1) > 4 else 1  # by 90°
        size = image.size[:: 1 if tags else turn]  # Pillow itself turns that of a TIFF
    with suppress(Exception):
        more |= {"camera metadata"} if 36867 in image.getexif().get_ifd(0x8769) else set()
    with suppress(Exception):
        more |= {"a place"} if 2 in image.getexif().get_ifd(0x8825) else set()  # GPS latitude
    with suppress(Exception):
        for offset in tags.get(330, ()):  # SubIFDs: the first picture of a RAW file is a thumbnail
            image.fp.seek(offset)
            (below := type(image.tag_v2)(image.tag_v2.prefix + b"*\0\0\0\0\0")).load(image.fp)
            size = max(size, (below[256], below[257])[::turn], key=math.prod)
    xmp = image.info.get("xmp", b"")
    more |= {word for mark, word in XMP_MARKS.items() if mark in (xmp if isinstance(xmp, bytes) else str(xmp).encode())}
    more |= {word for key, word in (("depth_images", "depth"), ("aux", "a gain map")) if image.info.get(key)}  # of HEIF
    colours = colours_of(to_rgb(image, COLOUR_SIDE))
    if image.has_transparency_data and (image.mode[0] == "I" or image.convert("RGBA").getextrema()[3][0] < 255):
        more.add("transparency")
    frames = counted(count, {"TIFF": "page", "PSD": "layer"}.get(image.format or "", "frame")) if count > 1 else ""
    raw, size = bool("raw" in image.info or RAW_TAGS & {*tags}), max(size, image.info.get("raw", size), key=math.prod)
    return Holdings(size, frames, bits, colours, raw, damaged, frozenset(more))


def holdings(path: str | bytes | Path) -> Holdings | None:
    """What a file holds beside its first frame. None: it cannot be read now."""
    return read_path(path, holdings_of).made


def lost_beside(file: Holdings, keep: Holdings) -> list[str]:
    """Words for what is lost if `file` goes and only `keep` stays, which shows the same, but has other bytes."""
    lost = {
        file.frames: bool(file.frames),  # also if `keep` has as many: only the first frames were compared
        "RAW data": file.raw,
        "the developed picture": keep.raw > file.raw,
        f"{file.bits} bits": file.bits > keep.bits,
        "colour": file.colours > keep.colours,
        "what is damaged there": keep.truncated > file.truncated,
        "transparency": "transparency" in file.more,  # also if `keep` has some: pictures are compared over white
    }
    return [word for word, is_lost in lost.items() if is_lost] + sorted(file.more - keep.more - {*lost})


def usable_cores() -> int:
    """The number of cores for this process. torchrun's processes on one machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def read_ahead(read: Callable[[Any], Any], files: Iterable[Any], workers: int, ahead: int) -> Iterator[Any]:
    """`read(file)` for each file, in order, by `workers` threads, in each of which torch computes with one. At most
    `ahead` results wait."""
    own = torch_threads()
    threads = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    results = (threads.submit(read, file) for file in files)
    try:
        pending = deque(itertools.islice(results, ahead))
        while pending:
            yield pending.popleft().result()
            pending.extend(itertools.islice(results, 1))
    finally:
        threads.shutdown(cancel_futures=True)
        torch.set_num_threads(own)  # threads that are made later take over what was set last, in any thread


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


def cell_means(planes: torch.Tensor, cells: int) -> torch.Tensor:
    """The mean of planes (B, c, side, side) in each soft cell, (B, c, cells, cells)."""
    distance = (torch.arange(OFFLINE_SIDE) + 0.5) * cells / OFFLINE_SIDE - (torch.arange(cells)[:, None] + 0.5)
    weights = torch.exp(-2 * distance**2)  # of a pixel by its distance, in cells, from the cell's centre; sigma: 0.5
    weights = torch.where(weights > TINY, weights / weights.sum(1, keepdim=True), 0)
    return weights @ planes @ weights.T


def edge_strengths(light: torch.Tensor) -> torch.Tensor:
    """The strength of the edge at each pixel in each direction, (B, DIRECTIONS, h, w), of brightness (B, 1, h, w)."""
    framed = torch.nn.functional.pad(light, (1, 1, 1, 1), mode="replicate")
    dx, dy = framed[..., 1:-1, 2:] - framed[..., 1:-1, :-2], framed[..., 2:, 1:-1] - framed[..., :-2, 1:-1]
    slope = torch.hypot(dx, dy) + 1e-3  # of 255: no division by 0 where it is flat
    root = slope  # its root is taken, because the loop below squares it: the strength is slope * cosine ** 32
    for _ in range(SHARPNESS):
        root = root.sqrt()
    angles = 2 * math.pi / DIRECTIONS * torch.arange(DIRECTIONS)[:, None, None]
    strength = (dx * root / slope * angles.cos()).addcmul_(dy * root / slope, angles.sin()).clamp_(min=LEAST_COSINE)
    for _ in range(SHARPNESS):
        strength.square_()  # a power would take twice as long
    return strength


def over_directions(counts: torch.Tensor) -> torch.Tensor:
    """Fourier coefficients, weighted by ORDERS, (B, 2 * len(ORDERS) - 1, h, w), of counts (B, DIRECTIONS, h, w)."""
    phase = 2 * math.pi / DIRECTIONS * torch.arange(DIRECTIONS)[:, None] * torch.arange(len(ORDERS))
    even, odd = torch.tensor(ORDERS) * phase.cos(), torch.tensor(ORDERS) * phase.sin()
    return torch.einsum("bdyx,do->boyx", counts, torch.cat([even[:, :1] / math.sqrt(2), even[:, 1:], odd[:, 1:]], 1))


def whiten(maps: torch.Tensor) -> torch.Tensor:
    """Cosine coefficients, a low frequency weighs least, (B, c, cells² - 1), of maps (B, c, cells, cells)."""
    k = torch.arange(maps.shape[3], dtype=torch.float32)
    cosines = torch.cos(math.pi / len(k) * k[:, None] * (k + 0.5))
    cosines[0] /= math.sqrt(2)
    maps = maps - maps.mean((2, 3), keepdim=True)
    return (cosines @ (maps @ cosines.T) * (1 + torch.hypot(k[:, None], k))).flatten(2)[:, :, 1:]


def describe_squares(pixels: torch.Tensor) -> torch.Tensor:
    """A vector that needs no weights and no training, from uint8 (B, 3, side, side) to float32 (B, dim).
    Directions of edges, counted in soft cells as in HOG (Dalal & Triggs, CVPR 2005), and a layout of the colours. Both
    are whitened by a fixed rule: what is strong in every picture weighs little, so unrelated pictures score near 0."""
    planes = torch.einsum("oc,bcyx->boyx", torch.tensor(OPPONENT), pixels.float())
    counts = cell_means(edge_strengths(planes[:, :1]), EDGE_CELLS)
    edges = whiten(over_directions(counts**EDGE_POWER))
    colours = whiten(cell_means(planes, COLOUR_CELLS))
    mean = planes.mean((2, 3)) / 255  # all that a blank picture has
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
NOT_FINITE = "the model gives no finite features for it"  # reason of such a file
MIN_COSINE = 0.999  # least similarity of a fast form's features to those of plain fp32; below it, another form is used
AHEAD_BATCHES, AHEAD_MOST = 4, 1024  # how far decoding runs ahead of the model: 4 batches, but at most 1024 files
Recipe = tuple[int, Sequence[float], Sequence[float], str]  # side, mean and deviation of each channel, resampling

torch_threads = cache(lambda: torch.get_num_threads())  # torch's own number, asked before it is changed
first_process = cache(os.getpid)  # the process that computed first, or its parent did before the fork


def refuse_fork() -> None:
    """Raise DeepVisionError in a process that was forked from one that has computed: torch would hang there."""
    if first_process() != os.getpid():
        advice = "start it with multiprocessing.get_context('spawn'), or before the first search"
        raise DeepVisionError(f"this process was forked after a search, where torch and SQLite fail: {advice}")


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Have torch compute with so many threads, in this thread of ours. Small operations want one: more take up to five
    times as long on a busy machine."""
    torch_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_weights(network: torch.nn.Module, path: str | Path, *heads: str) -> None:
    """Load the tensors of the file `path` into a network without its classifier, the layers `heads`.
    The tensors may be wrapped as `state_dict`, or have the prefix `module.` of multi-GPU training. None may be missing.
    If no name fits, as in files of other libraries, but kind, shape and order of all tensors do, the order counts."""
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


def replace_timm_layers(network: torch.nn.Module) -> None:
    """Put layers of torch in place of timm's, which cannot be traced or folded. The padding is that of inputs whose
    side is a multiple of the stride; where one is not, `fastest_form` sees other features and refuses."""
    for name, layer in list(network.named_modules()):
        if type(layer).__name__ == "Conv2dSame":
            spare = layer.kernel_size[0] - layer.stride[0]
            pad, layer.__class__ = torch.nn.ZeroPad2d((spare // 2, spare - spare // 2) * 2), torch.nn.Conv2d
            network.set_submodule(name, torch.nn.Sequential(pad, layer))
        elif type(layer).__name__ == "BatchNormAct2d":
            layer.__class__ = torch.nn.BatchNorm2d
            network.set_submodule(name, torch.nn.Sequential(layer, layer.act))


def fuse_convolutions(network: torch.fx.GraphModule) -> None:
    """Compute each convolution, the sum after it and the activation after that by one kernel, whatever the batch size.
    torch.compile does the same. It is 5 % faster still, but takes 17 s to start."""
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
    """`plain`, a partial of `forward`, in precision `dtype`. Its network is used up. kernels: `fuse_convolutions`."""
    fold, network = importlib.import_module("torch.fx.experimental.optimization").fuse, plain.keywords["network"]
    with computing_with(1):
        replace_timm_layers(network)
        network = fold(network, True).to(dtype, memory_format=torch.channels_last)
    if kernels:
        fuse_convolutions(network)
    return partial(plain, network=network, dtype=dtype)


def possible_forms(device: str) -> list[tuple[torch.dtype, bool]]:
    """What `fused` may take here: each precision, with and without kernels. What is private to torch is tried first."""
    if device != "cpu":
        return [(torch.float16, False), (torch.float32, False)]
    if torch.backends.mkldnn.is_available():
        try:
            layer, x = torch.nn.Conv2d(8, 8, 1), torch.zeros(1, 8, 4, 4)
            one_kernel(layer, "relu")(x, one_kernel(layer)(x))
            importlib.import_module("torch.fx.experimental.optimization").fuse  # noqa: B018
            native = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            dtypes = [torch.bfloat16, torch.float32] if native else [torch.float32]  # emulated bf16: four times as long
            return list(itertools.product(dtypes, (True, False)))
        except Exception as error:  # it is gone, or takes other arguments
            log.warning("torch %s changed (%s): networks run in a slower form", torch.__version__, first_line(error))
    return [(torch.float32, False)]


def fastest_form(plain: partial[torch.Tensor], sample: torch.Tensor, note: Path) -> tuple[partial[torch.Tensor], int]:
    """The fastest form of `plain` that gives nearly the same features of `sample`, and the dimension of the features.
    On a GPU that is fp16. On a CPU all forms are timed, for 2 seconds with ResNet50: bf16 with our kernels takes half
    the time of fp32 without on an AMD Zen 5, and three times as long on an Intel Xeon. The file `note` remembers it."""
    device, forms = sample.device.type, possible_forms(sample.device.type)
    processor = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    machine = f"{torch.__version__}, {device}, {processor}, {forms}"
    form, dim = None, 0
    with suppress(Exception):  # there is no note, a damaged one, or one of another machine
        best, dim = json.loads(note.read_text())[machine]
        form = forms[best]
    if form:
        try:
            return fused(plain, *form), dim
        except Exception as error:  # the network is used up, so no other form can be tried
            if lacks_memory(error):
                raise
            note.unlink(missing_ok=True)
            what = f"{note} names a form in which the model cannot run here ({first_line(error)})"
            raise DeepVisionError(f"{what}: it was deleted, run the command again") from error
    plain.keywords["network"].to(memory_format=torch.channels_last)
    expected, found = plain(sample), list[tuple[float, int, partial[torch.Tensor]]]()
    for number, form in enumerate(forms):
        with suppress(Exception):  # a network that looks at its pixels cannot be fused, and raises anything at all
            fast = fused(deepcopy(plain), *form)
            if torch.cosine_similarity(fast(sample), expected).min() >= MIN_COSINE:
                times = timeit.repeat(partial(fast, sample), number=1, repeat=3) if device == "cpu" else [number]
                found.append((min(times), number, fast))
    dim = expected.shape[1]
    if not found:
        return plain, dim
    _, best, fast = min(found)  # numbers differ, so forms are never compared
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({machine: [best, dim]}))
    return fast, dim


def assemble_model(name: str, network: torch.nn.Module, recipe: Recipe, device: str) -> Model:
    """A Model around the network, which may be used up: it becomes the fastest form that gives the same features."""
    refuse_fork()
    side, mean, std, resample = recipe
    sha = hashlib.sha256(repr((side, *mean, *std, resample)).encode())
    for key, value in sorted(network.state_dict().items()):
        sha.update(key.encode())
        sha.update(value.ravel().numpy())
    identity = re.sub(r"[^\w.-]", "-", f"{name}-{sha.hexdigest()[:8]}-p{PREPROCESSING}")
    network = network.eval().to(device)
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
    timeout, expected = socket.getdefaulttimeout(), re.search(r"-([0-9a-f]+)\.", path.name)
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
    # The options that torchvision itself sets for models with weights
    options = {"image_size": entry.meta["min_size"][0]} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"transform_input": True, "init_weights": False, "aux_logits": False}
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
    if name == OFFLINE:
        if device not in ("auto", "cpu"):  # for auto, a look for a GPU would take 0.4 GB of its memory
            choose_device(device)
        if weights:
            raise DeepVisionError(f"--weights {weights}: --model offline takes no weights, leave one out")
        return offline_model()
    device = choose_device(device)
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
    The GPU may still be computing when this returns."""
    refuse_fork()
    pixels = pixels.pin_memory() if model.device == "cuda" else pixels
    while True:
        try:
            with torch.inference_mode(), computing_with(1 if model.network is describe else torch_threads()):
                parts = (part.to(model.device, non_blocking=True) for part in pixels.split(size))
                return torch.cat([torch.nn.functional.normalize(model.network(part)) for part in parts]), size
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


def to_float32(block: np.ndarray) -> np.ndarray:  # torch converts fp16 several times as fast as NumPy does
    return torch.from_numpy(np.ascontiguousarray(block)).float().numpy()


class Made(NamedTuple):  # what is computed from the pixels of a new picture
    pixels: torch.Tensor | None  # as the model takes them; None: its features are known
    points: bytes | None  # as they are stored; None: they are known


def completed(picture: Picture, vector: np.ndarray | None) -> Picture:
    """The picture with its features and points; one that cannot be used, if the features are no numbers."""
    if vector is not None and not np.isfinite(vector).all():  # they would rank anywhere
        return Picture(picture.file, reason=NOT_FINITE, vanished=picture.vanished)
    return picture._replace(made=None, vector=vector, points=picture.made.points) if picture.made else picture


def with_features(pictures: Iterator[Picture], model: Model, size: int) -> Iterator[list[Picture]]:
    """The pictures in order, in lists of `size`; those with pixels in `made` have features in place of the pixels.
    A GPU gets the next batch before the results of the last one are fetched."""
    under_way: deque[tuple[list[Picture], torch.Tensor]] = deque()
    while (batch := list(itertools.islice(pictures, size))) or under_way:
        if batch:
            pixels = [it.made.pixels for it in batch if it.made and it.made.pixels is not None]
            found, size = launch(torch.stack(pixels), model, size) if pixels else (torch.empty(0), size)
            under_way.append((batch, found))
        if not batch or len(under_way) > (model.device != "cpu"):
            done, found = under_way.popleft()
            vectors = iter(found.cpu().numpy().astype(np.float16))
            yield [completed(it, next(vectors) if it.made and it.made.pixels is not None else None) for it in done]


# ---- Query views -----------------------------------------------------------------------------------------------------


def crop_box(text: str) -> tuple[float, ...]:
    """The value of --crop: left, top, right, bottom."""
    with suppress(ValueError):
        left, top, right, bottom = map(float, text.split(","))
        if 0 <= left < right < math.inf and 0 <= top < bottom < math.inf:
            return left, top, right, bottom
    raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM, in pixels or as shares of the picture")


def cut_out(image: Image.Image, part: Sequence[float]) -> tuple[Image.Image, int, int]:
    """A part of the upright picture, and its left and top there. Raises ValueError if it does not lie in the picture.
    part: left, top, right, bottom in pixels, or as shares of the picture's sides if none is over 1."""
    if max(part) > 1 and (min(part[2:]) <= 1 or any(0 < side < 1 for side in part)):
        raise ValueError(f"--crop {','.join(map('{:g}'.format, part))} mixes pixels and shares, which are at most 1")
    picture = to_rgb(image, max(image.size))
    scale = (*picture.size, *picture.size) if max(part) <= 1 else (1, 1, 1, 1)
    left, top, right, bottom = box = [round(value * full) for value, full in zip(part, scale)]
    if not (0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height):
        raise ValueError(f"--crop {box} does not lie within the picture of {picture.width} × {picture.height} pixels")
    return picture.crop((left, top, right, bottom)), left, top


def query_views(picture: Image.Image, model: Model) -> torch.Tensor:
    """The query as the model takes it, uint8 (views, 3, side, side): as it is, mirrored, and, for the offline
    descriptor, which is no network, turned by quarters and as a negative."""
    whole = squeeze(picture, model.side, model.side, model.resample)
    views = [whole, whole.flip(2)]
    if model.name == OFFLINE:
        views += [view.rot90(quarters, (1, 2)) for quarters in (1, 2, 3) for view in views[:2]]
        views.append(255 - whole)
    return torch.stack(views)


# ---- Points ----------------------------------------------------------------------------------------------------------

AREA = 90_000  # pixels to which each picture is scaled for its points: copies of any resolution then get the same ones
POINTS = 150  # of a square picture, at most: more make the index larger, fewer lose small parts
FINER = 4  # levels by which a query, and a picture to compare, is described finer if it has the pixels
FINER_POINTS = 700  # points of a square one of these, at most
PIXELS_A_POINT = 20  # below 14,000 pixels, such a picture has fewer: one for so many pixels, but at least POINTS
LEVELS = 8  # sizes in which points are looked for; each is smaller than the one before by the square root of 2
SHORT_SIDE = 150  # pixels of a long picture's short side, at least: a strip of comics has panels to be found
MOST_LONGER = 12  # a long picture has at most 12 times the area and the points
CONTRAST = 1.5  # least difference, of 255, of a blob from its surroundings: fainter ones are noise
SPREAD = 4  # points are taken from 4 × 4 cells of a square picture in turn, so that a caption does not have them all
WINDOW, SAMPLES = 8, 12  # a descriptor sees 8 pixels on each side of its point, in 12 × 12 samples
POINT_DIM = 64  # values of a descriptor
CODE_STEP = 0.98  # of the deviation: limit between the two levels of a sign, best for a normal distribution (Max, 1960)
CODE_VALUES = (-1.51, -0.453, 0.453, 1.51)  # what the four levels stand for
ANGLES = 128  # steps in which the direction of a stored point is kept
PLACE_BITS, LEVEL_BITS, ANGLE_BITS = 12, 4, 7  # of a stored place along each axis, of its level, of its direction
WHERE_BITS = 2 * PLACE_BITS + LEVEL_BITS + ANGLE_BITS + 1  # the last one tells whether it is dark
WHERE_BYTES, CODE_BYTES = 5, POINT_DIM // 4

# Orders of the cosine transform down and across, and of the Fourier transform over the directions, of each value
ORDERS_OF_CELLS = [
    order for order in itertools.product(range(4), range(4), range(5)) if sum(order[:2]) <= 4 and order != (0, 0, 0)
]


class Points(NamedTuple):
    """Distinctive points of a picture, and what it looks like around them. A place is a complex number."""

    places: np.ndarray  # x + iy in pixels of the picture scaled by `point_scale`; complex64 (n,)
    frames: np.ndarray  # size × e^(i angle) of each point; complex64 (n,)
    dark: np.ndarray  # whether it is darker than its surroundings; bool (n,). A negative swaps dark and light
    descriptors: np.ndarray  # float32 (n, POINT_DIM), each of length 1; the same in a picture and in its negative

    def mirrored(self) -> Points:
        """The points of the picture mirrored at its left side."""
        signs = np.array([(-1.0) ** (down + (wave in (2, 4))) for down, _, wave in ORDERS_OF_CELLS], np.float32)
        return Points(-self.places.conj(), -self.frames.conj(), self.dark, self.descriptors * signs)


def smooth(light: torch.Tensor, step: int = 1) -> torch.Tensor:
    """16 times the average of light (h, w) with weights 1, 2, 1 along both axes, over pixels `step` apart.

    The result is smaller than light by `step` on each side. Repeated, it is nearly a Gaussian blur.
    """
    rows = (light[: -2 * step] + light[2 * step :]).add_(light[step:-step], alpha=2)
    return (rows[:, : -2 * step] + rows[:, 2 * step :]).add_(rows[:, step:-step], alpha=2)


def pyramid(grey: Image.Image, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One canvas, float32 (H, W), with the picture in all its sizes, and where each is on it, float32 (levels, 6).

    That is left, top, width and height of each level, and how many pixels of `grey` one of its own is along both axes.
    On one canvas, each step of the search for points is one call for all levels.
    """
    width, height = grey.size
    second = grey.resize([max(1, round(side / 2**0.5)) for side in grey.size], Image.Resampling.BOX)
    pictures = [torch.from_numpy(np.array(it, np.float32)) for it in (grey, second)]
    while len(pictures) < levels and min(pictures[-2].shape) > 4 * WINDOW + 3:  # smaller ones have no room for points
        pictures.append(torch.nn.functional.avg_pool2d(pictures[-2][None], 2)[0])
    canvas, boxes = torch.zeros(height + height // 2 + 2, width + second.width + 2), []
    left = top = 0
    for level, picture in enumerate(pictures):
        if level == 2:  # the first two lie side by side, the others below them
            left, top = 0, height
        h, w = picture.shape
        canvas[top : top + h, left : left + w] = picture
        (base_h, base_w), factor = pictures[level % 2].shape, 2 ** (level // 2)
        boxes.append((left, top, w, h, factor * width / base_w, factor * height / base_h))
        left += w
    return canvas, torch.tensor(boxes)


def place_in_group(group: torch.Tensor) -> torch.Tensor:
    """For each element of group, int64 (n,): how many equal ones stand before it."""
    order = group.argsort(stable=True)
    place = torch.arange(len(group)) - torch.searchsorted(group[order], group[order])
    return torch.empty_like(group).scatter_(0, order, place)


def find_blobs(canvas: torch.Tensor, boxes: torch.Tensor, counts: torch.Tensor, cells: Sequence[int]) -> torch.Tensor:
    """Blobs of all levels, int64 (4, n): the level, x and y on the canvas, and 1 for a dark one, else 0.

    A blob is an extreme of a difference of Gaussians, but not on an edge, where it would slide (Lowe, IJCV 2004). Each
    level has at most as many as `counts` says: the strongest one in each cell, then the second ones, and so on.
    `cells` says how many cells there are across and down.
    """
    fine = smooth(smooth(smooth(canvas)))  # 16³ times as bright, and smaller by 3 on each side
    D = torch.nn.functional.pad(smooth(fine, 2).sub_(fine[2:-2, 2:-2], alpha=16), (5, 5, 5, 5))
    strength = D.abs()
    rows = torch.maximum(strength[:-2], strength[1:-1])  # max_pool2d takes 5 times as long
    torch.maximum(rows, strength[2:], out=rows)
    around = torch.maximum(rows[:, :-2], rows[:, 1:-1])
    torch.maximum(around, rows[:, 2:], out=around)
    y, x = ((strength[1:-1, 1:-1] == around) & (around > CONTRAST * 16**4)).nonzero().T + 1
    levels = torch.zeros(canvas.shape, dtype=torch.uint8)  # the number of the level + 1 where a window fits, else 0
    for number, (left, top, w, h, *_) in enumerate(boxes.long().tolist(), start=1):
        levels[top + WINDOW : max(0, top + h - WINDOW), left + WINDOW : max(0, left + w - WINDOW)] = number
    width = canvas.shape[1]
    place = y * width + x
    place = place[levels.take(place) > 0]
    steps = torch.tensor([[down * width + across for across in (-1, 0, 1)] for down in (-1, 0, 1)])
    (a, up, b), (left, mid, right), (c, low, d) = D.take(place + steps[..., None])
    xx, yy, xy = left + right - 2 * mid, up + low - 2 * mid, (a + d - b - c) / 4
    kept = ((xx + yy) ** 2 * 10 < 11**2 * (xx * yy - xy**2)).nonzero()[:, 0]  # one curvature is at most 10 × the other
    place = place.take(kept).take(mid.take(kept).abs().argsort(descending=True, stable=True))
    y, x, level = place // width, place % width, levels.take(place).long() - 1
    left, top, w, h = boxes[:, :4].long().T[:, level]
    across, down = cells
    cell = (level * down + down * (y - top) // h) * across + across * (x - left) // w
    order = (level * len(level) + place_in_group(cell)).argsort(stable=True)
    order = order[place_in_group(level[order]) < counts[level[order]]]
    return torch.stack([level, x, y, (D.take(place) > 0).long()])[:, order]


@cache
def descriptor_basis() -> torch.Tensor:
    """A matrix (128, POINT_DIM) from 4 × 4 cells × 8 directions to their lowest frequencies, without the mean.

    A cosine transform over the cells and a Fourier transform over the directions. These 64 of 128 values hold 96 % of
    the variance, and a mirrored picture changes nothing but signs.
    """
    k, phase = torch.arange(4.0), math.pi / 4 * torch.arange(8.0)
    cosines = torch.cos(math.pi / 4 * k[:, None] * (k + 0.5)) * 0.5**0.5
    cosines[0] /= 2**0.5
    waves = torch.stack([torch.ones(8) / 2**0.5, phase.cos(), phase.sin(), (2 * phase).cos(), (2 * phase).sin()]) / 2
    full = torch.einsum("iv,ju,kd->ijkvud", cosines, cosines, waves).flatten(3)
    return torch.stack([full[order] for order in ORDERS_OF_CELLS], 1)


def describe_points(
    canvas: torch.Tensor, boxes: torch.Tensor, blobs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions, e^(i angle) (n,), and descriptors (n, POINT_DIM) of the `blobs` (4, n) in `boxes`, see `pyramid`.

    As in SIFT: gradients in 4 × 4 cells and 8 directions, relative to the direction of the mean gradient. Of these sums
    the square root is taken (Arandjelović & Zisserman, CVPR 2012). A dark point is described as in the negative.
    """
    level, x, y, dark = blobs[..., None]
    steps = (torch.arange(SAMPLES) + 0.5) * (2 * WINDOW / SAMPLES) - WINDOW
    window = torch.complex(*torch.meshgrid(steps, steps, indexing="xy")).flatten()
    weight = torch.exp(-(window.abs() ** 2) / (2 * WINDOW**2)) * (1 - 2 * dark)
    left, top, w, h, *_ = boxes.long()[level[:, 0]].T[..., None]

    def gradients(offsets: torch.Tensor) -> torch.Tensor:  # (n, samples), weighted, at these offsets from each point
        # Not the outermost pixels of a level: their gradient would see the next level
        column = torch.minimum(torch.maximum((x + offsets.real).round().long(), left + 1), left + w - 2)
        row = torch.minimum(torch.maximum((y + offsets.imag).round().long(), top + 1), top + h - 2)
        at, below = row * canvas.shape[1] + column, canvas.shape[1]
        dx, dy = (canvas.take(at + step) - canvas.take(at - step) for step in (1, below))
        return torch.complex(dx, dy) / 2 * weight

    mean = gradients(window[None]).sum(1, keepdim=True)
    direction = torch.polar(torch.ones_like(mean.real), mean.angle())
    turned = gradients(window * direction) * direction.conj()
    # Its length to the power 1/3: cubed below, that is the length times the cubed cosine of each of 8 directions
    root = torch.view_as_real(turned * (turned.abs() + 1e-6) ** (-2 / 3))
    angles = torch.arange(8) * (math.pi / 4)
    rise = (root @ torch.stack([angles.cos(), angles.sin()])).clamp_(min=0)  # (n, samples, 8)
    share = (1 - (steps - torch.tensor([-6.0, -2.0, 2.0, 6.0])[:, None]).abs() / 4).clamp(min=0)  # (cells, samples)
    cells = (torch.kron(share, share) @ (rise * rise * rise)).flatten(1)
    normalize = torch.nn.functional.normalize
    return direction[:, 0], normalize(normalize(cells, p=1).sqrt() @ descriptor_basis())


def point_scale(size: Sequence[float]) -> float:
    """By how much a picture of this width and height is scaled for its points."""
    short, long = sorted(size)
    scale = (AREA / (short * long)) ** 0.5
    return max(scale, min(SHORT_SIDE / short, scale * MOST_LONGER**0.5))


def find_points(image: Image.Image, finer: int = 0, between: bool = False) -> Points:
    """The points of an upright picture. finer: more points, and up to so many further levels if it has the pixels.

    between: in sizes halfway between the usual ones. Small print is found again only in nearly the same size.
    """
    scale, points = point_scale(image.size), POINTS
    if finer:
        points = max(POINTS, min(FINER_POINTS, image.width * image.height // PIXELS_A_POINT))
    finer = max(0, min(finer, math.floor(0.1 - 2 * math.log2(scale))))
    zoom = 2 ** (finer / 2 - between / 4)
    size = [max(2, round(scale * zoom * side)) for side in image.size]
    if min(size) <= 2 * WINDOW:  # no window fits, and a line of 100 million pixels would take gigabytes
        size = [2 * WINDOW, 2 * WINDOW]
    grey = image.convert("L").resize(size, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
    canvas, boxes = pyramid(grey, LEVELS + finer)
    longer = scale**2 * image.width * image.height / AREA
    share = 2 ** (-torch.arange(len(boxes)) / 2)
    counts = (longer * points * share / share.sum()).round().long()
    long = SPREAD * max(1, round(max(size) / min(size) / 2))
    blobs = find_blobs(canvas, boxes, counts, (long, SPREAD) if size[0] > size[1] else (SPREAD, long))
    direction, descriptors = describe_points(canvas, boxes, blobs)
    level, x, y, dark = blobs
    left, top, _, _, across, down = boxes[level].T
    places = torch.complex((x - left + 0.5) * across, (y - top + 0.5) * down) / zoom
    frames = direction * 2 ** (level / 2) / zoom
    return Points(places.numpy(), frames.numpy(), dark.bool().numpy(), descriptors.numpy())


@cache
def code_rotation() -> torch.Tensor:
    """A Hadamard matrix of length 1, (POINT_DIM, POINT_DIM): it spreads a descriptor evenly over all values."""
    matrix = torch.ones(1, 1)
    while len(matrix) < POINT_DIM:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) / 2**0.5
    return matrix


def turned_for_code(descriptors: np.ndarray) -> np.ndarray:
    """The descriptors (n, POINT_DIM) times `code_rotation`, which is its own inverse. NumPy's own product has a thread
    for each core in each thread of ours: with two that read pictures, it halved their speed."""
    return (torch.from_numpy(descriptors) @ code_rotation()).numpy()


def pack_points(points: Points) -> bytes:
    """The points as they are stored: for each its place, level and direction in 5 bytes, and its descriptor in 16.

    Each value of the turned descriptor has one of four levels, by the descriptor's own deviation. That needs no
    training, so that all ranks and machines agree.
    """
    place = points.places.astype(np.complex128)
    x, y = (axis.astype(np.int64).clip(0, (1 << PLACE_BITS) - 1) for axis in (place.real, place.imag))
    level = (2 * np.log2(np.abs(points.frames))).round().astype(np.int64).clip(0, (1 << LEVEL_BITS) - 1)
    angle = (np.angle(points.frames) * (ANGLES / (2 * math.pi))).round().astype(np.int64) % ANGLES
    where = (((x << PLACE_BITS | y) << LEVEL_BITS | level) << ANGLE_BITS | angle) << 1 | points.dark
    turned = turned_for_code(points.descriptors)
    turned /= turned.std(1, keepdims=True) * CODE_STEP
    values = (np.floor(turned) + 2).clip(0, 3).astype(np.uint8).reshape(len(place), CODE_BYTES, 4)
    codes = (values << np.array([0, 2, 4, 6], np.uint8)).sum(2, dtype=np.uint8)
    return np.hstack([where.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :WHERE_BYTES], codes]).tobytes()


def unpack_codes(stored: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where the stored points are, int64 (n,), see `unpack_where`, and their descriptors, float32 (n, POINT_DIM)."""
    rows = np.frombuffer(stored, np.uint8).reshape(-1, WHERE_BYTES + CODE_BYTES)
    where = np.zeros((len(rows), 8), np.uint8)
    where[:, :WHERE_BYTES] = rows[:, :WHERE_BYTES]
    of_byte = np.array(CODE_VALUES, np.float32)[np.arange(256)[:, None] >> (0, 2, 4, 6) & 3]  # (256, 4)
    xb = turned_for_code(of_byte.take(rows[:, WHERE_BYTES:], 0).reshape(-1, POINT_DIM))
    return where.view("<i8")[:, 0].astype(np.int64), xb / np.linalg.norm(xb, axis=1, keepdims=True)


def unpack_where(where: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, frames and whether they are dark, as in `Points`, from the lowest WHERE_BITS of `where`, int64 (n,)."""
    dark, angle = where & 1, where >> 1 & (1 << ANGLE_BITS) - 1
    level = where >> 1 + ANGLE_BITS & (1 << LEVEL_BITS) - 1
    y = where >> 1 + ANGLE_BITS + LEVEL_BITS & (1 << PLACE_BITS) - 1
    x = where >> 1 + ANGLE_BITS + LEVEL_BITS + PLACE_BITS & (1 << PLACE_BITS) - 1
    frames = 2 ** (level / 2) * np.exp(2j * math.pi / ANGLES * angle)
    return (x + 0.5) + 1j * (y + 0.5), frames, dark.astype(bool)


def unpack_points(stored: bytes) -> Points:
    """What `pack_points` has packed, nearly: places, directions and descriptors lose some digits."""
    where, xb = unpack_codes(stored)
    places, frames, dark = unpack_where(where)
    return Points(places.astype(np.complex64), frames.astype(np.complex64), dark, xb)


# ---- Verdicts --------------------------------------------------------------------------------------------------------
#
# query ─ points ─ index of points ─ votes ─ hints (which picture, by which transform)          section "Search"
#   └ pixels ─ hints, the whole on the whole, matched points ─ transforms ─ the best by pixels, fitted to the pixel
#       └ laid over one another ─ windows that agree, that differ ─ bands along an edge cut off ─ copy, variant or none

KEPT_SIDE = 1536  # pixels of the longer side of a picture that is kept to be compared, at most
RATIO = 0.8  # a match counts if its distance is less than this share of its best rival's
NEAR = 8.0  # pixels within which two points are the same spot, and no rivals
TOLERANCE, DRIFT = 5.0, 0.06  # pixels that an agreeing point may be off; more for each pixel from the proposing point
SCALES = (0.1, 10.0)  # least and most that a picture is enlarged to fit the other; beyond, all points fall on one spot
STRETCHED = 3.0  # most that a picture is stretched along one axis against the other
PROPOSALS = 5  # of the proposed transforms, so many are fitted: those that most points agree on
MOST_PROPOSING = 500  # matched pairs of points that propose one
SPOT = 6.0  # pixels: points that are nearer to each other count as one
PLAIN = 20  # points that agree in a picture that is surely the one; 10 may in another page of the same layout
FEWEST = 5  # points that agree, at least, in a transform (of unrelated photographs, 2 to 3 of 4 neighbours do)
OCTAVES = 0.9  # by which the scales of two agreeing pairs may differ; points come in steps of half an octave
TOGETHER_AT_MOST = 1 << 18  # proposals × pairs at once; under 2 × MOST_PROPOSING²: only groups alone are thinned
TRIED = 2  # transforms of one source, see `compare`, that are compared closely: the right one is mostly the first
THUMB, ROUGH, CLOSE = 32, 96, 384  # pixels of the longer side: to compare roughly, less roughly, and closely
ALIKE_THUMBS = 0.6  # least correlation of two whole pictures for a transform of the whole
ALIKE_ROUGHLY, ALIKE_FITTED = 0.35, 0.55  # least `roughly_alike` to fit a transform, then to go on: edits have 0.65 up
FINE = 1.2  # times CLOSE: pictures with more pixels along the longer side have details that are looked at in a copy
WORSE = 0.15  # a transform whose correlation is less than the best one's by more is not the right one
WINDOW_SIDE = 10  # pixels of a window; from one to the next it is half of them
FLAT = 6.0  # of 255: windows with a smaller deviation show nothing that could be compared
ALIKE, FAINTER = 0.5, 0.25  # least correlation of windows that agree; least share of contrast of the fainter one
LIGHT_OFF, COLOUR_OFF = 60.0, 36.0  # of 255: most that brightness and colour of a window may be off
UNLIKE = 2.5, 0.4  # a typical window of little contrast is off at most by so much of 255, or of their own spread
TINT, TINT_INVERTED = 40.0, 12.0  # of 255: most that all colours may have moved in one direction; of a negative
LARGEST = 7  # windows in one connected block that may differ in a copy: compression and fits that are a pixel off
SPECK = 2  # windows in a block that is too small to count, or to be shown
MOST_SCATTERED = 25  # windows in all blocks that count, at most, in a copy
DRAWN = 0.55  # share of the windows of a band that show something in both pictures, from which on it is a difference
ONE_LINE = 1.0  # windows: beside a band that is cut off, more must be seen than the edge between two stripes of a flag
BESIDE_SIDE = 0.07  # share of a side from its end, in which a band lies at the end of a picture
TRACE = 3  # pixels along the edge of what both show that are not looked at
TELLING = 20  # windows that agree, at least; more if what both show is a part of either picture
CERTAIN = 0.85  # share of windows that agree from which on no further transforms are tried
LEAST_SHOWN = 0.5  # of one of the pictures: two that show less of each other may have no more than a floor in common
LEAST_OF_VARIANT = 0.75, 1.0  # of one of the pictures, or of both, added, if they differ: floors are larger then
SHARED, SHARED_UNPROVEN = 0.5, 0.8  # least share of windows that agree; the second if fewer points do than PROVEN
SAME_ROUGHLY, SAME_FITTED = 0.01, 0.005  # of the longer side: corners nearer than this are moved to the same place
PROVEN = 12  # points: in pictures of different things in one place, 5 to 10 may agree, and 0.62 of the windows


class Hint(NamedTuple):
    """A transform by which one picture may lie in another."""

    points: int  # that agree on it
    H: np.ndarray  # (3, 3), from pixels of the first upright picture to pixels of the second
    inverted: bool = False  # one is a negative of the other


class Verdict(NamedTuple):
    """What the comparison of two pictures has found."""

    label: str  # copy or variant
    hint: Hint  # exact to a pixel
    covers: tuple[float, float]  # share of the area of the first, and of the second picture, that both show
    differs: float  # share of what both show in which they differ
    details: int  # windows that agree
    good: int  # at CLOSE, for `compare`: these, less those of the largest block that differs; the best one has most
    share: float  # likewise: of the windows that tell something, those that agree
    boxes: tuple[list[Any], list[Any]]  # around these parts: left, top, right, bottom in pixels of each of the two

    def reversed(self) -> Verdict:
        """The same, with the pictures in the other order."""
        hint = self.hint._replace(H=np.linalg.inv(self.hint.H))
        return self._replace(hint=hint, covers=self.covers[::-1], boxes=self.boxes[::-1])


@dataclass(frozen=True)
class Shown:
    """An upright picture to be compared."""

    size: tuple[int, int]  # width and height of the whole picture
    image: Image.Image  # RGB, perhaps smaller

    @staticmethod
    def of(image: Image.Image, side: int = 0, most: int = KEPT_SIDE) -> Shown:
        """A picture just opened, decoded large enough for a model of this `side`, but at most `most` pixels long."""
        short, long = sorted(image.size)
        rgb = to_rgb(image, max(side, min(most, long) // DRAFT_SCALE))
        size = (long, short) if rgb.width > rgb.height else (short, long)  # EXIF may have turned it
        if long > most:
            rgb = rgb.copy()
            rgb.thumbnail((most, most), reducing_gap=2.0)
        return Shown(size, rgb)

    @cached_property
    def points(self) -> Points:
        return find_points(self.image, FINER)

    @cached_property
    def points_between(self) -> Points:
        return find_points(self.image, FINER, between=True)

    @cached_property
    def thumb(self) -> np.ndarray:
        """Brightness squeezed into (THUMB, THUMB), less its mean, of length 1."""
        small = np.asarray(self.image.convert("L").resize((THUMB, THUMB), Image.Resampling.BOX), np.float32)
        return (small - small.mean()) / max(1.0, float(np.linalg.norm(small - small.mean())))


def moved(H: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The places, (n, 2), moved by the transform H."""
    found = places @ H[:, :2].T + H[:, 2]
    return found[:, :2] / found[:, 2:]


def corners_of(size: Sequence[float]) -> np.ndarray:
    """The corners of a picture, (4, 2), from its top left clockwise."""
    return np.array([(0, 0), (size[0], 0), size, (0, size[1])], float)


def fit(q: np.ndarray, m: np.ndarray, agrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each group of pairs of places q and m, complex (groups, n): how many spots agree on a transform, int
    (groups,), and the transforms, (groups, 3, 3).

    Each is fitted to the pairs in `agrees`, then to all that agree: a similarity to few, an affine transform to many.
    The number is 0 if too few agree, or if the picture would be distorted.
    """
    q, m = np.complex128(q), np.complex128(m)
    usable = np.ones(len(q), bool)
    for _ in range(3):
        count = agrees.sum(1)
        q0, m0 = (np.where(agrees, z, 0).sum(1) / np.maximum(1, count) for z in (q, m))
        x, y = (np.where(agrees, z - z0[:, None], 0) for z, z0 in ((q, q0), (m, m0)))
        # Least squares for y = u x + v conj(x), by sums of |x|², x², conj(x) y and x y: of a similarity v is 0
        n, s, c, d = (np.abs(x) ** 2).sum(1), (x * x).sum(1), (x.conj() * y).sum(1), (x * y).sum(1)
        area, many = n * n - np.abs(s) ** 2, count >= 2 * FEWEST
        usable &= (count >= FEWEST) & np.where(many, area > 1e-9 * n * n, n > 0)  # not all on one line or spot
        area, n = np.where(usable & many, area, 1), np.where(usable, n, 1)
        u = np.where(many, (n * c - s.conj() * d) / area, c / n)
        v = np.where(many, (n * d - s * c) / area, 0)
        longer, shorter = np.abs(u) + np.abs(v), np.abs(np.abs(u) - np.abs(v))  # by how much it stretches its axes
        usable &= (shorter > SCALES[0]) & (longer < np.minimum(SCALES[1], STRETCHED * shorter))
        shift, room = m0 - u * q0 - v * q0.conj(), TOLERANCE * np.maximum(1, (longer * shorter) ** 0.5)
        agrees = np.abs(u[:, None] * q + v[:, None] * q.conj() + shift[:, None] - m) < room[:, None]
    H = np.zeros((len(q), 3, 3))
    H[:, :2] = np.stack([u + v, 1j * (u - v), shift], 1).view(float).reshape(-1, 3, 2).swapaxes(1, 2)
    H[:, 2, 2] = 1
    # Points on one spot count once, in either picture; inf, which stands for those that do not agree, is no spot
    spots = (np.sort(np.where(agrees, z.real // SPOT + 4096 * (z.imag // SPOT), np.inf), 1) for z in (q, m))
    found = [1 + (it[:, 1:] != it[:, :-1]).sum(1) - (~agrees).any(1) for it in spots]
    return np.where(usable, np.minimum(*found), 0), H


def proposals_agree(proposing: Sequence[np.ndarray], pairs: Sequence[np.ndarray]) -> np.ndarray:
    """Whether `pairs` of matched points lie where the `proposing` ones would have them, and have about their scale.

    Both are (places q, places m, ratios of the frames), complex, of shapes that broadcast. A pair proposes to move q to
    m, and by the ratio a turn and a scale. What is nan agrees with nothing.
    """
    (q, m, ratio), (q2, m2, ratio2) = proposing, pairs
    shift, scale = ratio * (q2 - q), np.abs(ratio)
    agree = np.abs(m + shift - m2) < TOLERANCE + DRIFT * np.abs(shift)
    agree &= np.abs(np.log2(np.abs(ratio2)) - np.log2(scale)) < OCTAVES
    return agree & (scale >= SCALES[0]) & (scale <= SCALES[1])


def fits(pairs: Sequence[np.ndarray], sizes: np.ndarray, count: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """The best `count` transforms of each group of matched pairs: yields (group, spots that agree, transform), see
    `fit`; small groups come first, and of a group the proposal that most agree with.

    pairs are (places q, places m, ratios of the frames), complex (n,), one group after the other; `sizes` has how many
    pairs each group has, at least 1. Each pair proposes a transform, see `proposals_agree`; of many, as in an index of
    one picture, some do. Groups of much the same size are looked at together. Nothing is random.
    """
    starts, order = np.cumsum(sizes) - sizes, np.argsort(sizes, kind="stable")
    while len(order):
        most = int(1.5 * sizes[order[0]])
        together = min(int(np.searchsorted(sizes[order], most, "right")), TOGETHER_AT_MOST // most**2)
        these, order = np.split(order, [max(1, together)])
        column = np.arange(sizes[these[-1]])  # of the largest group; smaller ones end with nan, which never agrees
        there = starts[these, None] + np.minimum(column, sizes[these, None] - 1)
        q, m, ratio = (np.where(column < sizes[these, None], it[there], np.nan) for it in pairs)  # (groups, pairs)
        some, quick = slice(None, None, 1 + len(column) // MOST_PROPOSING), [np.complex64(it) for it in (q, m, ratio)]
        agree = proposals_agree([it[:, some, None] for it in quick], [it[:, None] for it in quick])
        agreeing = agree.sum(2)  # (groups, proposals)
        likely = np.argsort(-agreeing, 1, kind="stable")[:, :count]
        group, rank = np.nonzero(np.take_along_axis(agreeing, likely, 1) >= FEWEST)
        points, H = fit(q[group], m[group], agree[group, likely[group, rank]])
        for one in np.flatnonzero(points >= FEWEST):
            yield int(these[group[one]]), int(points[one]), H[one]


def to_pixels(H: np.ndarray, a: Sequence[int], b: Sequence[int], mirrored: bool) -> np.ndarray:
    """The transform between two upright pictures of sizes a and b, from H between the places of their points.

    mirrored: H starts from `Points.mirrored`.
    """
    k, scale = point_scale(a), point_scale(b)
    return np.diag([1, 1, scale]) @ H @ np.diag([-k if mirrored else k, k, 1]) / scale


def hints_by_points(points: Points, a: Shown, b: Shown) -> Iterator[Hint]:
    """Transforms from a to b on which `points` of a and the points of b agree.

    A point is matched to the one it resembles most, if it resembles no other place nearly as much.
    """
    other = b.points
    if min(len(points.places), len(other.places)) < FEWEST:
        return
    near = torch.from_numpy(np.abs(other.places[:, None] - other.places) <= NEAR)
    for mirrored, inverted in itertools.product((False, True), repeat=2):
        seen = points.mirrored() if mirrored else points
        S = torch.from_numpy(seen.descriptors) @ torch.from_numpy(other.descriptors).T
        S.masked_fill_(torch.from_numpy((seen.dark[:, None] != other.dark) != inverted), -1)
        scores, best = S.max(1)
        rivals = S.masked_fill(near[best], -1).amax(1)
        good = (1 - scores < RATIO * (1 - rivals)).numpy()
        if good.sum() >= FEWEST:
            match = best.numpy()[good]
            q, m, ratio = seen.places[good], other.places[match], other.frames[match] / seen.frames[good]
            for _, count, H in fits((q, m, ratio), np.array([len(q)]), PROPOSALS):
                yield Hint(count, to_pixels(H, a.size, b.size, mirrored), inverted)


def hints_by_thumbs(a: Shown, b: Shown) -> Iterator[Hint]:
    """Transforms from the whole of a to the whole of b: as it is, mirrored, turned by quarters, or as a negative."""
    unit = np.eye(3)
    for flips, quarters in itertools.product(range(2), range(4)):
        alike = float((np.rot90(a.thumb[:, ::-1] if flips else a.thumb, -quarters) * b.thumb).sum())
        if abs(alike) > ALIKE_THUMBS:
            H = np.diag([-1.0, 1, 1]) if flips else unit
            H = np.linalg.matrix_power(np.array([(0, -1, 0), (1, 0, 0), (0, 0, 1)]), quarters) @ H  # clockwise
            H = np.array([(b.size[0], 0, b.size[0]), (0, b.size[1], b.size[1]), (0, 0, 2)]) / 2 @ H
            yield Hint(0, H @ [(2 / a.size[0], 0, -1), (0, 2 / a.size[1], -1), (0, 0, 1)], alike < 0)


@dataclass(frozen=True)
class Overlay:
    """What two pictures both show, laid over one another on a frame of (h, w) pixels."""

    a: torch.Tensor  # RGB of the first, moved, float32 (3, h, w); its negative if the pictures are inverted
    b: torch.Tensor  # RGB of the second
    places: torch.Tensor  # where each pixel of the frame is in the first picture, as shares of its sides (2, h, w)
    to_b: np.ndarray  # from pixels of the frame to those of the second picture

    def trimmed(self) -> Overlay:
        """Without the outermost pixels: they hold a trace of what lies beside one of the pictures."""
        m = slice(TRACE, -TRACE)
        to_b = self.to_b @ [(1, 0, TRACE), (0, 1, TRACE), (0, 0, 1)]
        return Overlay(self.a[:, m, m], self.b[:, m, m], self.places[:, m, m], to_b)

    @property
    def is_shared(self) -> torch.Tensor:
        return ((self.places >= 0) & (self.places <= 1)).all(0)

    @cached_property
    def light(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Brightness of both, (h, w), slightly blurred."""
        both = [sum(weight * plane for weight, plane in zip(OPPONENT[0], it)) for it in (self.a, self.b)]
        grey = torch.nn.functional.pad(torch.stack(both)[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        rows = grey[:, :-2] + grey[:, 1:-1] + grey[:, 2:]
        first, second = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]).div_(9)
        return first, second


def shared_part(H: np.ndarray, a: Sequence[int], b: Sequence[int]) -> np.ndarray:
    """The corners, (n, 2), of the part of picture b, of size b, that lies in picture a; n is 0 if there is none."""
    if ((corners_of(a) @ H[2, :2] + H[2, 2]) <= 1e-9).any():
        return np.zeros((0, 2))
    part = moved(H, corners_of(a)).tolist()
    for axis, side, limit in ((0, 1, 0), (0, -1, b[0]), (1, 1, 0), (1, -1, b[1])):  # Sutherland & Hodgman, CACM 1974
        corners, part = part, []
        for one, other in zip(corners, corners[1:] + corners[:1]):
            at, to = side * (one[axis] - limit), side * (other[axis] - limit)
            part += [one] if at >= 0 else []
            if at * to < 0:
                part.append([p + at / (at - to) * (q - p) for p, q in zip(one, other)])
    return np.array(part).reshape(-1, 2)


def area_of(corners: np.ndarray) -> float:
    x, y = corners.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def resized(shown: Shown, box: np.ndarray, size: Sequence[int], smoothly: bool) -> torch.Tensor:
    """The part `box` of a picture, left, top, right, bottom in its pixels, resized to `size`: float32 (3, h, w)."""
    scale = np.array(shown.image.size) / shown.size
    box = np.clip((box.reshape(2, 2) * scale).ravel(), 0, [*shown.image.size] * 2)
    method = Image.Resampling.BICUBIC if smoothly or size[0] > box[2] - box[0] else Image.Resampling.BOX
    picture = shown.image.resize((size[0], size[1]), method, box=tuple(box))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def overlay(hint: Hint, a: Shown, b: Shown, side: int, smoothly: bool = False) -> Overlay | None:
    """Both pictures on a frame of at most `side` pixels around what they share, at the lower resolution of the two.
    smoothly: made smaller as most programs do it, not by means of boxes of pixels, which is the quickest."""
    H, part = hint.H, shared_part(hint.H, a.size, b.size)
    if len(part) < 3 or (np.ptp(part, 0) < 2).any() or abs(np.linalg.det(H)) < 1e-12:
        return None
    low, high = part.min(0), part.max(0)
    back, (x, y) = np.linalg.inv(H), part.mean(0)
    near = moved(back, np.array([(x, y), (x + 1, y), (x, y + 1)]))
    zoom = abs(np.linalg.det(near[1:] - near[0])) ** 0.5  # pixels of a for one of b
    detail = min(zoom * a.image.width / a.size[0], b.image.width / b.size[0])  # pixels that are there for one of b
    scale = min(side / max(high - low), max(detail, min(2 * detail, CLOSE / max(high - low))))
    w, h = (max(WINDOW_SIDE + 2, round(length * scale)) for length in high - low)
    to_b = np.array([((high[0] - low[0]) / w, 0, low[0]), (0, (high[1] - low[1]) / h, low[1]), (0, 0, 1)])
    to_a = back @ to_b
    if ((corners_of((w, h)) @ to_a[2, :2] + to_a[2, 2]) * to_a[2, 2] <= 0).any():
        return None
    there = moved(to_a, corners_of((w, h)))
    start, end = np.clip(np.floor(there.min(0)) - 2, 0, a.size), np.clip(np.ceil(there.max(0)) + 2, 0, a.size)
    if (end - start < 2).any():
        return None
    most = a.image.width / a.size[0]
    size = [max(4, round(length * min(most, scale / zoom))) for length in end - start]
    source = resized(a, np.concatenate([start, end]), size, smoothly)
    xs, ys = torch.arange(w) + 0.5, (torch.arange(h) + 0.5)[:, None]
    across, down, one = (float(of_x) * xs + (float(of_y) * ys + float(rest)) for of_x, of_y, rest in to_a)
    place = torch.stack([across, down]).div_(one)
    first, length = (torch.from_numpy(it).float()[:, None, None] for it in (start, end - start))
    grid = ((place - first) * (2 / length) - 1).permute(1, 2, 0)
    warped = torch.nn.functional.grid_sample(source[None], grid[None], padding_mode="border", align_corners=False)[0]
    shares = place / torch.tensor(a.size)[:, None, None]
    box = np.concatenate([low, high])
    return Overlay(255 - warped if hint.inverted else warped, resized(b, box, (w, h), smoothly), shares, to_b)


def window_means(planes: torch.Tensor, window: int = WINDOW_SIDE) -> torch.Tensor:
    """The means of planes (n, h, w) in each window: of four quarters, which are means of pixels."""
    quarters = torch.nn.functional.avg_pool2d(planes[:, None], window // 2)[:, 0]
    halves = quarters[:, 1:] + quarters[:, :-1]
    return (halves[:, :, 1:] + halves[:, :, :-1]) / 4


def correlations(
    over: Overlay, reach: int, window: int = WINDOW_SIDE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlation of each window of b with that of a moved by up to `reach` pixels, (2 reach + 1, 2 reach + 1, h, w).

    Also the deviations of both windows: that of a, moved likewise, (shifts, h, w), and that of b, (h, w).
    """
    a, b = over.light
    (h, w), n = b.shape, 2 * reach + 1
    framed = torch.nn.functional.pad(a[None, None], (reach,) * 4, mode="replicate")[0, 0]
    moved_a = framed.unfold(0, h, 1).unfold(1, w, 1)  # (n, n, h, w), not copied
    at_once = n if h * w < CLOSE**2 else 1  # of large pictures, all at once would take gigabytes
    some = [it for row in moved_a for it in row.split(at_once)]
    found = [window_means(torch.cat([it, it * it, it * b]), window).unflatten(0, (3, -1)) for it in some]
    means, squares, products = torch.cat(found, 1)
    b_mean, b_square = window_means(torch.stack([b, b * b]), window)
    of_a, of_b = (squares - means * means).clamp(min=0).sqrt(), (b_square - b_mean * b_mean).clamp(min=0).sqrt()
    rho = (products - means * b_mean) / (of_a * of_b).clamp(min=1)
    return rho.unflatten(0, (n, n)), of_a, of_b


def seen_windows(over: Overlay, window: int = WINDOW_SIDE) -> torch.Tensor:
    """Which windows, bool (h, w), lie in both pictures."""
    return window_means(over.is_shared[None].float(), window)[0] > 0.99


def roughly_alike(hint: Hint, a: Shown, b: Shown) -> float:
    """The mean correlation of the windows that both pictures show; more points count a little."""
    over = overlay(hint, a, b, ROUGH)
    if over is None:
        return -1.0
    rho, of_a, of_b = correlations(over, 1, 8)
    tells = seen_windows(over, 8) & (torch.maximum(of_a[4], of_b) > FLAT)
    alike = rho.flatten(0, 1).amax(0)[tells].clamp(min=0)
    return float(alike.mean()) + 0.002 * min(hint.points, 50) if len(alike) >= 4 else -1.0


def offsets(rho: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How far to move each window for its best correlation: that one (n,), the move (n, 2), and its weight (n, 2, 2).

    rho is (side, side, n). Around the best place a parabola is laid. Its curvature is the weight: along a straight edge
    a move changes nothing, and counts nothing.
    """
    side = len(rho)
    best, at = rho.flatten(0, 1).max(0)
    y, x = (at // side).clamp(1, side - 2), (at % side).clamp(1, side - 2)
    window = torch.arange(rho.shape[2])
    (p, q, r), (s, t, u), (v, w, z) = ([rho[y + dy, x + dx, window] for dx in (-1, 0, 1)] for dy in (-1, 0, 1))
    xx, yy = (2 * t - s - u).clamp(min=1e-3), (2 * t - q - w).clamp(min=1e-3)
    xy = (p + z - r - v) / -4
    xy = xy.sign() * torch.minimum(xy.abs(), 0.95 * (xx * yy).sqrt())
    weight = torch.stack([torch.stack([xx, xy], 1), torch.stack([xy, yy], 1)], 1).double()
    slope = torch.stack([u - s, w - q], 1).double() / 2
    step = torch.linalg.solve(weight, slope).clamp(-1, 1)
    return best, torch.stack([x, y], 1) - (side // 2) + step, weight


def refined(hint: Hint, a: Shown, b: Shown, side: int, reach: int, window: int, rounds: int) -> Hint:
    """The hint, its transform fitted by moving windows of `window` pixels by up to `reach` pixels to where they agree.

    The fit is a homography, by least squares that leave out windows which move otherwise: parts may differ.
    """
    for _ in range(rounds):
        over = overlay(hint, a, b, side)
        if over is None or min(over.b.shape[1:]) < window + 2:
            return hint
        rho, of_a, of_b = correlations(over, reach, window)
        best, move, weight = offsets(rho.flatten(2))
        rich = torch.minimum(of_a[len(of_a) // 2], of_b) > FLAT / 2
        good = (seen_windows(over, window) & rich).flatten() & (best > 0.6)
        if good.sum() < 6:
            return hint
        move, weight = move[good], weight[good]
        h, w = over.b.shape[1:]
        rows, columns = rho.shape[2:]
        ys, xs = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        v, u = ((it.flatten()[good].double() * (window // 2) + window / 2) / n * 2 - 1 for it, n in ((ys, h), (xs, w)))
        one, none = torch.ones_like(u), torch.zeros_like(u)
        # The move of a place (u, v) by a small affine change (six columns) and a small change of perspective (two)
        A = torch.stack([one, u, v, none, none, none, u * u, u * v, none, none, none, one, u, v, u * v, v * v], 1)
        A = A.view(-1, 2, 8)[..., : 8 if len(A) >= 60 else 6]
        root = torch.linalg.cholesky(weight).mT  # so that least squares weigh each window as they should
        A, move = (root @ A).flatten(0, 1), (root @ move[..., None]).flatten()
        total, keep = weight.diagonal(dim1=1, dim2=2).sum(1), torch.ones(len(weight), dtype=torch.float64)
        for _ in range(5):
            weighted = A * keep.repeat_interleave(2)[:, None]
            normal = A.T @ weighted
            normal += 1e-3 * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64)
            change = torch.linalg.solve(normal, weighted.T @ move)
            error = (move - A @ change).square().view(-1, 2).sum(1) / total
            keep = (1 + error / error.median().clamp(min=0.1)) ** -2
        place = corners_of((w, h))
        (u, v), p = (place / (w, h) * 2 - 1).T, np.append(change.numpy(), (0, 0))[:8]
        bent = p[6] * u + p[7] * v
        shift = np.stack([p[0] + p[1] * u + p[2] * v + bent * u, p[3] + p[4] * u + p[5] * v + bent * v], 1)
        H = over.to_b @ homography(place + shift, place) @ np.linalg.inv(over.to_b) @ hint.H
        if not np.isfinite(H).all():
            return hint
        hint = hint._replace(H=H / H[2, 2])
        if np.abs(shift).max() < 0.2:
            break
        reach = min(reach, 1 + round(np.abs(shift).max()))
    return hint


def homography(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The transform (3, 3) that moves four places to four others, (4, 2) each; not finite if there is none."""
    rows = [row for (x, y), (X, Y) in zip(source, target)
            for row in ((x, y, 1, 0, 0, 0, -X * x, -X * y), (0, 0, 0, x, y, 1, -Y * x, -Y * y))]  # fmt: skip
    with suppress(np.linalg.LinAlgError):
        return np.append(np.linalg.solve(np.array(rows), target.ravel()), 1).reshape(3, 3)
    return np.full((3, 3), np.nan)


def one_change(
    x: torch.Tensor, y: torch.Tensor, noise: float, most: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One change for all: y ≈ gain x + shift, of x and y (c, n). Returns by how much y is off then (n,), gain, shift.

    The gain is not negative, and the shift at most `most`. What is off by much more than `noise` has no say in them.
    """
    keep = torch.ones(x.shape[1])
    for _ in range(5):
        mean_x, mean_y = ((keep * it).sum(1, keepdim=True) / keep.sum() for it in (x, y))
        gain = (keep * (x - mean_x) * (y - mean_y)).sum() / (keep * (x - mean_x) ** 2).sum().clamp(min=len(keep))
        gain = gain.clamp(0, 4)
        shift = mean_y - gain * mean_x
        shift = shift * (most / shift.norm().clamp(min=most))
        off = (y - gain * x - shift).square().sum(0).sqrt()
        keep = (1 + (off / noise) ** 2).reciprocal()
    return off, gain, shift


def likelier_change(x: torch.Tensor, y: torch.Tensor, noise: float, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`one_change` from x to y, or back: either picture may be the one that was made flatter, or grey. Returns by how
    much all are off, and what they are off from."""
    both = ((one_change(*pair, noise, most)[0], pair[1]) for pair in ((x, y), (y, x)))
    return min(both, key=lambda it: float(it[0].median()))


def paint_differs(over: Overlay, seen: torch.Tensor, tells: torch.Tensor, tint: float) -> torch.Tensor:
    """Which of the windows `seen`, bool (h, w), differ in brightness or colour, but for one change of the whole.

    `tells`, bool (h, w): those whose contrast is compared. The others, as the bricks between their joints, must also
    have about the brightness that one change of theirs gives. Else the darker and lighter ones of them differ: half.
    """
    a, b = (window_means(picture)[:, seen] for picture in (over.a, over.b))
    light, chroma = torch.tensor(OPPONENT[:1]), torch.tensor([(0.701, -0.587, -0.114), (-0.299, -0.587, 0.886)])
    differs, wrong = torch.zeros_like(seen), torch.zeros(a.shape[1], dtype=torch.bool)
    of_light, of_colour = (12.0, 255.0), (8.0, tint)  # `noise` and `most` of `one_change`
    for axes, change, limit in ((light, of_light, LIGHT_OFF), (chroma, of_colour, COLOUR_OFF)):
        wrong |= likelier_change(axes @ a, axes @ b, *change)[0] > limit
    plain = ~tells[seen]
    if plain.sum() > 1:
        off, target = likelier_change(light @ a[:, plain], light @ b[:, plain], *of_light)
        if (typical := float(off.median())) > max(UNLIKE[0], UNLIKE[1] * float(target.std())):
            wrong[plain] |= off > typical
    differs[seen] = wrong
    return differs


def next_to_sides(shares: torch.Tensor) -> torch.Tensor:
    """Which windows, bool (h, w), are the outermost of a picture, or nearly; `shares` (2, h, w): where they are, of its
    sides."""
    steps = [max(2 * float(torch.hypot(*torch.gradient(it)).median()), BESIDE_SIDE) for it in shares]
    return torch.stack([(it < step) | (it > 1 - step) for it, step in zip(shares, steps)]).any(0)


def without_bands(
    over: Overlay, seen: torch.Tensor, differs: torch.Tensor, drawn: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """The windows `seen`, bool (h, w), without the bands along an edge of either picture in which all differs.

    That is a neighbour in a collage, a frame, or what an app has put over the edge: it is not shown, rather than
    different. A band is cut off window by window, from the edge on, while each quarter of its length differs. It is
    none if both pictures end there (windows `ends`) and both show something (windows `drawn`): two memes on one
    picture have lines of text there.
    """
    seen = seen.clone()
    rows, columns = seen.shape
    ys, xs = torch.meshgrid(torch.arange(rows).float(), torch.arange(columns).float(), indexing="ij")
    across, down = window_means(over.places)
    if min(rows, columns) < 3:
        return seen
    # Places in either picture, in steps of a window
    steps = [it / torch.hypot(*torch.gradient(it)).median().clamp(min=1e-9) for it in (across, down)]
    for (band, along), sign in itertools.product(((xs, ys), (ys, xs), steps, steps[::-1]), (1, -1)):
        before, first = seen, None
        while seen.any():
            strip = seen & (sign * band < (sign * band)[seen].min() + 1)
            length = along[strip]
            quarter = ((length - length.min()) / (length.max() - length.min() + 1e-3) * 4).long()
            shares = [float(differs[strip][quarter == it].float().mean()) for it in quarter.unique()]
            if len(shares) < 4 or min(shares) < 0.25 or np.mean(shares) < 0.6:
                if first is not None:
                    seen = seen & ~strip  # windows that lie half on the band
                break
            first, seen = strip if first is None else first, seen & ~strip
        cut = before & ~seen
        if first is not None and float(ends[first].float().mean()) > 0.5 and float(drawn[cut].float().mean()) > DRAWN:
            seen = before
    return seen


def blocks_of(windows: torch.Tensor) -> list[np.ndarray]:
    """The connected blocks of windows, bool (h, w): rows and columns, (n, 2), of each, the largest block first."""
    left, blocks = set(map(tuple, windows.nonzero().tolist())), []
    while left:
        block = [left.pop()]
        for y, x in block:
            near = left & {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)}
            left -= near
            block += near
        blocks.append(np.array(block))
    return sorted(blocks, key=len, reverse=True)


def thickness(windows: torch.Tensor) -> float:
    """The standard deviation, in windows, of where the windows, bool (h, w), are, across the line that fits them."""
    return float(torch.linalg.eigvalsh(torch.cov(windows.nonzero().double().T))[0].clamp(min=0).sqrt())


def judged(hint: Hint, a: Shown, b: Shown, side: int = CLOSE, largest: int = LARGEST) -> Verdict | None:
    """The verdict on two pictures by an exact transform; None: by this one they do not show the same."""
    over = overlay(hint, a, b, side)
    over = over and over.trimmed()
    if over is None or min(over.b.shape[1:]) < WINDOW_SIDE + 2 or not (seen := seen_windows(over)).any():
        return None
    rho, of_a, of_b = correlations(over, 1)
    telling, drawn = torch.maximum(of_a[4], of_b) > FLAT, torch.minimum(of_a[4], of_b) > FLAT
    of_a, of_b = of_a / (of_a[4][seen].mean() + 1e-3), of_b / (of_b[seen].mean() + 1e-3)  # against the picture's own
    strong, weak = torch.maximum(of_a, of_b), torch.minimum(of_a, of_b)
    tells = seen & (strong[4] > 1) & telling
    faint = ((weak < FAINTER * strong) & (strong > 1)).all(0)  # also if a is moved: else an edge may lie just outside
    differs = tells & ((rho.flatten(0, 1).amax(0) < ALIKE) | faint) | paint_differs(
        over, seen, tells, TINT_INVERTED if hint.inverted else TINT
    )
    centres = np.stack(np.meshgrid(*(np.arange(n) * WINDOW_SIDE / 2 + WINDOW_SIDE / 2 for n in seen.shape[::-1])), 2)
    in_b = torch.from_numpy(moved(over.to_b, centres.reshape(-1, 2)) / b.size).T.view(2, *seen.shape)
    ends = next_to_sides(window_means(over.places)) & next_to_sides(in_b) if min(seen.shape) > 1 else ~seen
    kept = without_bands(over, seen, differs, drawn, ends)
    differs &= kept
    agreeing = tells & kept & ~differs
    agree = int(agreeing.sum())
    share = agree / max(1, int((tells & kept).sum()))
    if agree < TELLING or share < (SHARED if hint.points >= PROVEN else SHARED_UNPROVEN):
        return None
    if bool((kept != seen).any()) and thickness(agreeing) < ONE_LINE:
        return None
    blocks = blocks_of(differs)
    worst = len(blocks[0]) if blocks else 0
    scattered = sum(len(block) for block in blocks if len(block) > SPECK)  # as the entries of a form in small print
    differ = worst > largest or scattered > MOST_SCATTERED
    shown = float(kept.sum() / seen.sum()) * area_of(part := shared_part(hint.H, a.size, b.size))
    back = np.linalg.inv(hint.H)
    covers = shown / area_of(part) * area_of(moved(back, part)) / math.prod(a.size), shown / math.prod(b.size)
    too_little = differ and max(covers) < LEAST_OF_VARIANT[0] and sum(covers) < LEAST_OF_VARIANT[1]
    if too_little or max(covers) < LEAST_SHOWN or agree * max(covers) < TELLING:  # parts that fit by chance, or a floor
        return None
    step, boxes = WINDOW_SIDE // 2, (list[Any](), list[Any]())
    for block in blocks if differ else []:
        if len(block) <= SPECK:
            break  # the blocks that follow are smaller
        low, high = block.min(0)[::-1] * step, block.max(0)[::-1] * step + WINDOW_SIDE
        corners = moved(over.to_b, np.array([low, (high[0], low[1]), high, (low[0], high[1])], float))
        for found, places in zip(boxes, (moved(back, corners), corners)):
            found.append([round(float(it), 1) for it in (*places.min(0), *places.max(0))])
    label = "variant" if differ else "copy"
    off = float(differs.sum() / kept.sum()) if differ else 0.0
    covers = min(1.0, covers[0]), min(1.0, covers[1])
    return Verdict(label, hint, covers, off, agree, agree - worst, share, boxes)


def is_among(hint: Hint, tried: Sequence[Hint], near: float, a: Shown, b: Shown) -> bool:
    """Whether a transform was tried that moves the corners of a to the same places, but for `near` of b's longer side.
    A proven hint, on which enough points agree, counts as tried only if a proven one was."""
    corners, proven = corners_of(a.size), hint.points >= PROVEN
    places = [moved(it.H, corners) for it in tried if it.points >= PROVEN or not proven]
    return any(np.abs(place - moved(hint.H, corners)).max() < near * max(b.size) for place in places)


def seen_finer(verdict: Verdict, a: Shown, b: Shown) -> Verdict:
    """The verdict `copy`, or that of twice the pixels along each side: small print is nothing but a line in fewer."""
    finer = judged(verdict.hint, a, b, 2 * CLOSE)
    if not finer or finer.label != "copy":
        fitted = judged(refined(verdict.hint, a, b, 2 * CLOSE, 2, 2 * WINDOW_SIDE, 2), a, b, 2 * CLOSE)
        finer = fitted if fitted and (fitted.label == "copy" or not finer) else finer
    return finer._replace(good=verdict.good, share=verdict.share) if finer else verdict


def compare(a: Shown, b: Shown, hints: Iterable[Hint] = ()) -> Verdict | None:
    """Whether two pictures show the same, and where: None if they do not. It is the same in both directions.

    Transforms come from the hints and the whole pictures, then from matched points, then from points in further sizes.
    All of one source are compared roughly; the best TRIED are fitted roughly, compared again, fitted to the pixel, and
    compared closely, unless the same was before. The first copy counts, else the best variant; a very good one at once.
    """
    areas = math.prod(a.size), math.prod(b.size)
    if areas[0] < areas[1] or (areas[0] == areas[1] and a.image.tobytes() < b.image.tobytes()):
        hints = [hint._replace(H=np.linalg.inv(hint.H)) for hint in hints]
        found = compare(b, a, hints)
        return found and found.reversed()
    found, most_alike = None, 0.0
    rough, fitted = list[Hint](), list[Hint]()  # transforms that were compared roughly, and those that were fitted

    def sources() -> Iterator[Iterator[Hint]]:
        yield itertools.chain(hints, hints_by_thumbs(a, b))
        yield hints_by_points(a.points, a, b)
        if rough:  # something agreed, if not well: unrelated pictures end here
            yield hints_by_points(a.points_between, a, b)

    def to_judge(hint: Hint, alike: float, is_best: bool) -> Iterator[Hint]:
        """The hint, exact to a pixel of the frame on which pictures are compared, if it may be the right one."""
        close = refined(hint, a, b, CLOSE // 3, 3, 16, 3)
        if not is_among(close, fitted, SAME_FITTED, a, b) and roughly_alike(close, a, b) > ALIKE_FITTED:
            fitted.append(refined(close, a, b, CLOSE, 1, WINDOW_SIDE, 2))
            yield fitted[-1]
        # Where edges run in few directions, a fit may slide along them: the best one, if the pictures are alike by it,
        # is also judged as it was
        if is_best and alike > ALIKE_FITTED:
            yield hint

    for source in sources():
        rated = list[tuple[float, Hint]]()
        for hint in source:
            if not is_among(hint, rough, SAME_ROUGHLY, a, b):
                rough.append(hint)
                rated.append((roughly_alike(hint, a, b), hint))
        for number, (alike, hint) in enumerate(sorted(rated, key=lambda it: -it[0])[:TRIED]):
            if alike < max(ALIKE_ROUGHLY, most_alike - WORSE):
                break
            most_alike = max(alike, most_alike)
            for closely in to_judge(hint, alike, not number):
                verdict = judged(closely, a, b)
                if verdict and verdict.label == "copy" and min(max(a.image.size), max(b.image.size)) > FINE * CLOSE:
                    verdict = seen_finer(verdict, a, b)
                if verdict and verdict.label == "copy":
                    return verdict
                if verdict and (not found or verdict.good > found.good):
                    found = verdict
            if found and found.share > CERTAIN:
                return found
    return found


# ---- Store -----------------------------------------------------------------------------------------------------------

# A row of `files`, by what the last update found (there, digest, reason):
#
#   not known ── read ──> usable (1, digest, –) <── back, unchanged ── gone (0, as before) ── --prune ──> not known
#       └─── cannot be used ──> skipped (1, –, why) ── file or decoders changed ──> read again
#            mtime -1: its features or points are missing or damaged, or the machine failed ──> read again
#
# Of a damaged database, or one of the format before, `repair` copies what can be read into a sound one. The format of a
# damaged one is noted as 0. A database of a newer format is refused and left as it is.

FORMAT = 4  # PRAGMA user_version of the database. 3 had neither points nor verdicts
PAGE_BYTES = 32_768  # 7 vectors of 2048 × fp16 a page: 4.7 KB an image in all, against 5.5 with pages of 16 KB
CACHE_KB = 16_384  # memory for pages of the database: the inner pages of ten million rows fit
BLOCK = 4096  # rows handled at once: 16 MB at 2048 dimensions
CHECKED_BYTES = 1 << 27  # a database up to this size is checked whole on opening, in 0.3 s
WAIT_STEP, WAIT_STEPS = 1, 600  # seconds; steps: a commit waits for another run's exact search of ten million
OLD_FILES = ("features.bin", "catalogue.sqlite", "catalogue.crc")  # of formats 1 and 2
SCHEMA = [
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    # AUTOINCREMENT: no row number is used twice, so that a stale FAISS index can miss a row but never mistake one.
    "CREATE TABLE features (row INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB UNIQUE, vector BLOB, checksum INTEGER)",
    # All files ever read. there: 0 if gone. A skipped file has a reason, no digest; a truncated one that is used, both;
    # a file that is no image, neither.
    "CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, digest BLOB, reason TEXT, there INTEGER)"
    " WITHOUT ROWID",
    "CREATE INDEX files_by_digest ON files (digest, there, reason)",  # enough to count a million files in 50 ms
    # Points do not depend on the model. A picture without any has an empty row
    "CREATE TABLE points (row INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB UNIQUE, points BLOB, checksum INTEGER)",
    "CREATE TABLE verdicts (one BLOB, other BLOB, verdict TEXT, checksum INTEGER, PRIMARY KEY (one, other))"
    " WITHOUT ROWID",
]
COLUMNS = {  # of the tables that a repair copies
    "features": "row, digest, vector, checksum",
    "points": "row, digest, points, checksum",
    "files": "path, size, mtime, digest, reason, there",
}
USABLE = "files WHERE there AND digest IS NOT NULL"  # this and the next five: what follows FROM, see `count`
SKIPPED = "files WHERE there AND digest IS NULL AND reason IS NOT NULL"
DAMAGED_FILES = "files WHERE there AND digest IS NOT NULL AND reason IS NOT NULL"  # used as far as they are decoded
GONE = """files AS old WHERE NOT there AND digest IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM files WHERE digest = old.digest AND there)"""  # a renamed file is not gone
DAMAGED = (
    "features WHERE checksum IS NOT crc_features(digest, vector)",
    "points WHERE checksum IS NOT crc_points(digest, points)",
    "verdicts WHERE checksum IS NOT crc_verdicts(one, other, verdict)",
)
INCOMPLETE = """files WHERE digest IS NOT NULL AND mtime != -1
    AND (digest NOT IN (SELECT digest FROM features) OR digest NOT IN (SELECT digest FROM points))"""
CRASHES = "its decoder crashes"  # reason of a file that crashed the whole process; --rebuild does not try it again
ROWS_AND_PATHS = "SELECT row, path FROM files JOIN features USING (digest) WHERE there"
LAST_PATH = b"\xff" * 5000  # sorts after every path

open_databases = list[tuple[int, ...]]()  # `Database.identity` of each; `read_picture` must not open these files
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


def checksum(salt: int, digest: Any, content: Any) -> int:
    """CRC-32 of `salt` (of the model's identity; 0 for what no model made), digest and content. -1: one is no bytes."""
    sound = isinstance(digest, bytes) and isinstance(content, bytes)
    return zlib.crc32(content, zlib.crc32(digest, salt)) if sound else -1


def verdict_checksum(one: Any, other: Any, verdict: Any) -> int:
    return checksum(0, one, other) ^ checksum(0, other, str(verdict).encode())


class Database(sqlite3.Connection):
    """A connection that threads may share: a transaction belongs to one thread, and the others wait for its end."""

    identity: tuple[int, ...] = ()  # inode and device of the file; empty if it is closed

    def __init__(self, path: Path, functions: dict[str, Callable[..., int]]) -> None:
        if not path.exists():
            path.touch()
        self.path, self.turn, self.identity = path, threading.RLock(), os.stat(path)[1:3]
        self.scanned = 0  # PRAGMA data_version at the last scan: it changes whenever another run has written
        open_databases.append(self.identity)
        super().__init__(path, timeout=WAIT_STEP, check_same_thread=False)
        self.execute("PRAGMA fullfsync = ON")  # macOS: else a commit may be lost with the power
        self.text_factory = partial(str, encoding="utf-8", errors="replace")
        for name, function in functions.items():
            self.create_function(name, -1, function)

    def close(self) -> None:
        if self.identity:
            open_databases.remove(self.identity)
            self.identity = ()
            super().close()

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        """As in SQLite, but it waits for other runs in short steps: SQLite would not say so, nor hear Ctrl-C."""
        for step in itertools.count():
            try:
                with self.turn:
                    return super().execute(*arguments)
            except sqlite3.OperationalError as error:
                if str(error) != "database is locked" or step == WAIT_STEPS:
                    raise
            if step == 1:
                log.warning("another run reads or writes %s: waiting for it", self.path)
        raise AssertionError

    @contextmanager
    def transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        """IMMEDIATE: a transaction that writes. DEFERRED: one that reads, and sees one state of the database."""
        with self.turn:
            self.execute(f"BEGIN {kind}")
            try:
                yield
                if self.in_transaction:
                    self.execute("COMMIT")
            finally:
                self.rollback()  # does nothing after a commit


class Changes(NamedTuple):
    """How a collection differs from the store."""

    unread: list[File]  # new and changed files
    gone: list[bytes]  # paths
    back: list[bytes]  # paths of files that were gone and are unchanged


class Store:
    """The files of a collection, their features by one model, their points, and verdicts on pairs: an SQLite database.

    A file and its features are stored in one transaction. A vector is used only after its checksum was seen to hold.
    `folder` is created. Each rank of torchrun has a database by its own `name`.
    """

    def __init__(self, folder: Path, identity: str, dim: int, name: str = "index.sqlite") -> None:
        self.folder, self.identity, self.dim = folder, identity, dim
        self.path, self.report = folder / name, folder / "crash"
        salt = zlib.crc32(identity.encode())  # checksums of another model's vectors never match
        # No methods of the store: SQLite would keep it alive
        self.crc: dict[str, Callable[..., int]] = {"crc_verdicts": verdict_checksum}
        self.crc |= {"crc_features": partial(checksum, salt), "crc_points": partial(checksum, 0)}
        self.lock_file = filelock.FileLock(folder / "lock")
        with self.errors():
            folder.mkdir(parents=True, exist_ok=True)
            self.db = Database(self.path, self.crc)

    def __del__(self) -> None:  # a connection and its cache of statements refer to each other: it would stay open
        with suppress(AttributeError):  # it could not be opened
            self.db.close()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of disk and SQLite into a DeepVisionError."""
        refuse_fork()
        try:
            yield
        except (OSError, NotImplementedError, sqlite3.OperationalError) as error:  # NotImplementedError: no file locks
            if "user-defined function" in str(error):
                raise KeyboardInterrupt from error  # a signal came while SQLite called `checksum`
            hint = "Check the free space and the permissions, or choose another folder with --index-dir"
            raise DeepVisionError(f"the index in {self.folder} cannot be used: {first_line(error)}. {hint}") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # UnicodeDecodeError: from a damaged schema
            if type(error) not in (sqlite3.DatabaseError, UnicodeDecodeError):
                raise  # a subclass: a mistake of the program. What SQLite calls corrupt or no database has none
            with suppress(sqlite3.Error), self.db.turn:
                self.db.rollback()
                self.db.execute("PRAGMA user_version = 0")
            raise DamageError(self.path, first_line(error)) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the one run that writes."""
        try:
            held = self.lock_file.acquire(timeout=0)
        except filelock.Timeout:
            log.warning("another run is writing %s: waiting for it", self.folder)
            held = self.lock_file.acquire()
        with held:
            if not self.path.exists() or os.stat(self.path)[1:3] != self.db.identity:  # another run has repaired it
                self.db.close()
                self.db = Database(self.path, self.crc)
            yield

    @contextmanager
    def attached(self, path: Path) -> Iterator[None]:
        """A transaction in which the database `path` is attached as `other`."""
        self.db.execute("ATTACH ? AS other", (os.fsencode(path),))
        try:
            with self.db.transaction():
                yield
        finally:
            self.db.execute("DETACH other")

    def value(self, query: str, *arguments: Any) -> Any:
        """The first value that the query gives, or None."""
        with self.db.turn:  # Python 3.13 fails now and then where threads share a connection
            return (self.db.execute(query, arguments).fetchone() or [None])[0]

    def count(self, source: str) -> int:
        return self.value(f"SELECT count(*) FROM {source}")

    def get_meta(self, key: str) -> Any:
        return self.value("SELECT value FROM meta WHERE key = ?", key)

    def set_meta(self, **values: Any) -> None:
        self.db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())

    def last_row(self, table: str = "features") -> int:
        """The highest row number in use; 0: the table is empty."""
        return self.value(f"SELECT max(row) FROM {table}") or 0

    def rows(self, table: str, condition: str, *arguments: Any) -> list[tuple[int, bytes, bytes, int]]:
        """Row, content hash, content and checksum of the features, or points, for which the SQL condition holds.

        Raises DamageError if one of them is not what was written. The next update then reads its files again.
        """
        with self.db.turn:
            found = self.db.execute(f"SELECT * FROM {table} WHERE {condition}", arguments).fetchall()
        if not all(self.crc[f"crc_{table}"](digest, content) == checksum for _, digest, content, checksum in found):
            self.db.rollback()  # the reading transaction of a search
            self.discard_damaged()
            raise DamageError(self.path, f"{table} do not match their checksums")
        return found

    def features(self, condition: str, *arguments: Any) -> tuple[np.ndarray, list[bytes], np.ndarray]:
        """Rows, int64 (n,), content hashes, and features, fp16 (n, dim), for which the SQL condition holds."""
        found = self.rows("features", condition, *arguments)
        vectors = np.frombuffer(bytearray().join(row[2] for row in found), np.float16).reshape(-1, self.dim)
        return np.array([row[0] for row in found], np.int64), [row[1] for row in found], vectors

    def rows_of(self, digests: Iterable[bytes]) -> list[int]:
        """The rows of the features of those contents that have any."""
        return [row for it in digests if (row := self.value("SELECT row FROM features WHERE digest = ?", it))]

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

    def points_after(self, row: int, count: int) -> list[tuple[int, bytes]]:
        """At most `count` rows of points after `row`, in their order, with the points as they are stored."""
        found = self.rows("points", "row > ? ORDER BY row LIMIT ?", row, count)
        return [(row, points) for row, _, points, _ in found]

    def is_known(self, digest: bytes) -> tuple[bool, bool]:
        """Whether there are features and points of this content. A damaged file counts as unknown: it is read again."""
        if self.value("SELECT 1 FROM files WHERE digest = ? AND reason IS NOT NULL", digest):
            return False, False
        has_features = self.value("SELECT 1 FROM features WHERE digest = ?", digest)
        return bool(has_features), bool(self.value("SELECT 1 FROM points WHERE digest = ?", digest))

    def save(self, pictures: Sequence[Picture]) -> None:
        """Store files, features and points in one transaction, in place of old ones. Mark vanished files as gone."""
        kept = [it for it in pictures if not it.vanished]
        features = {it.digest: it.vector.tobytes() for it in kept if it.vector is not None}
        points = {it.digest: it.points for it in kept if it.points is not None}
        files = ((*it.file, it.digest, it.reason) for it in kept)
        vanished = ((it.file.path,) for it in pictures if it.vanished)
        into = "INSERT OR REPLACE INTO"
        with self.db.transaction():
            self.db.executemany(f"{into} features VALUES (NULL, ?1, ?2, crc_features(?1, ?2))", features.items())
            self.db.executemany(f"{into} points VALUES (NULL, ?1, ?2, crc_points(?1, ?2))", points.items())
            self.db.executemany(f"{into} files VALUES (?, ?, ?, ?, ?, 1)", files)
            self.db.executemany("UPDATE files SET there = 0 WHERE path = ?", vanished)
            self.db.execute("DELETE FROM meta WHERE key = 'images'")

    def adopt_points(self) -> None:
        """Take over points from the indexes of other models, so that no picture is described twice."""
        new = "digest NOT IN (SELECT digest FROM main.points) AND checksum IS crc_points(digest, points)"
        select = f"SELECT NULL, digest, points, checksum FROM other.points WHERE {new} ORDER BY row"
        for path in self.folder.parent.glob("*/index.sqlite"):
            if path != self.path:
                with suppress(sqlite3.DatabaseError), self.attached(path):  # damaged, older, or in use for long
                    self.db.execute(f"INSERT INTO main.points {select}")

    def verdicts(self, judgement: int) -> dict[tuple[bytes, bytes], Any]:
        """What is stored of each two contents that were compared. Verdicts of another `judgement` are forgotten."""
        rows = self.db.execute("SELECT * FROM verdicts").fetchall()
        if self.get_meta("judgement") != judgement or any(verdict_checksum(*row[:3]) != row[3] for row in rows):
            with self.db.transaction():
                self.db.execute("DELETE FROM verdicts")
                self.set_meta(judgement=judgement, paired=0)
            rows = []
        return {row[:2]: json.loads(row[2]) for row in rows}

    def save_verdicts(self, verdicts: Iterable[tuple[bytes, bytes, Any]], last: int | None = None) -> None:
        """Store what was found of each two contents, anything that JSON holds.

        last: the last row of points, if all contents up to it were looked up.
        """
        rows = ((one, other, json.dumps(found)) for one, other, found in verdicts)
        with self.db.transaction():
            into = "INSERT OR REPLACE INTO verdicts VALUES (?1, ?2, ?3, crc_verdicts(?1, ?2, ?3))"
            self.db.executemany(into, rows)
            if last is not None:
                self.set_meta(paired=last)

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

        self.db.scanned = self.value("PRAGMA data_version")
        changes = Changes([], [], [])
        start: bytes | str = ""  # SQLite sorts it before every path, also before one that damage has made a text
        files = find_images(images, unlisted, [self.folder.parent], work.exclude)  # in the order of their paths
        other_decoders = self.get_meta("decoders") != image_formats()[2]
        while start != LAST_PATH:
            found = {file.path: file for file in itertools.islice(files, BLOCK)}
            end = max(found, default=LAST_PATH)
            known = self.db.execute("SELECT * FROM files WHERE path > ? AND path <= ?", (start, end)).fetchall()
            for path, size, mtime, digest, reason, there in known:
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
        with self.db.transaction():
            for there, paths in enumerate(changes[1:]):
                self.db.executemany("UPDATE files SET there = ? WHERE path = ?", ((there, path) for path in paths))
            remain = self.count(USABLE)
            self.set_meta(decoders=image_formats()[2], images=remain)
            if not remain:
                self.db.rollback()
        return remain > 0

    def prune(self) -> None:
        """Forget the files that are gone, and what belongs to no file."""
        lost = f"NOT IN (SELECT digest FROM {USABLE})"
        unused = (f"features WHERE digest {lost}", f"points WHERE digest {lost}")
        with self.db.transaction():
            for rows in ("files WHERE NOT there", *unused, f"verdicts WHERE one {lost} OR other {lost}"):
                self.db.execute(f"DELETE FROM {rows}")
        if 10 * self.value("PRAGMA freelist_count") > self.value("PRAGMA page_count"):
            self.db.execute("VACUUM")  # or the file never gets smaller

    def files_with(self, digest: bytes) -> list[File]:
        """The files of the collection with this content, by path."""
        query = "SELECT path, size, mtime FROM files WHERE there AND digest = ? ORDER BY path"
        with self.db.turn:
            return [File(*found) for found in self.db.execute(query, (digest,))]

    def damaged_contents(self, digests: Iterable[bytes]) -> set[bytes]:
        """Those of the contents that are truncated or damaged."""
        return {it for it in set(digests) if self.value(f"SELECT 1 FROM {DAMAGED_FILES} AND digest = ?", it)}

    def skipped(self, limit: int = -1, files: str = SKIPPED) -> list[tuple[bytes, str]]:
        """The path of each skipped file, or of each of other `files`, with its reason."""
        return self.db.execute(f"SELECT path, reason FROM {files} ORDER BY path LIMIT ?", (limit,)).fetchall()

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
        """Delete what is damaged. The next update reads the files again that miss features or points."""
        if any(map(self.count, (*DAMAGED, INCOMPLETE))):
            with self.db.transaction():
                for damaged in DAMAGED:
                    if self.db.execute(f"DELETE FROM {damaged}").rowcount and damaged.startswith("verdicts"):
                        self.set_meta(paired=0)  # which pairs they were of is not known
                marked = self.db.execute(f"UPDATE files SET mtime = -1 WHERE path IN (SELECT path FROM {INCOMPLETE})")
            of_files = f"features or points of {counted(marked.rowcount, 'file')}"
            log.warning("%s: %s are damaged or missing, and are extracted again", self.folder, of_files)

    def readable(self, table: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a damaged table, from its beginning and from its end, each up to the damage."""
        for order in ("ASC", "DESC"):
            with suppress(sqlite3.Error, UnicodeDecodeError):
                yield from self.db.execute(f"SELECT {COLUMNS[table]} FROM {table} ORDER BY 1 {order}")
                return  # all rows were read, no damage

    def repair(self) -> None:
        """Replace a database that does not pass `check` by a sound one with all readable rows.

        The caller holds the lock. An empty database becomes one without rows.
        """
        with suppress(DamageError), self.errors():
            return self.check(whole=True)  # another run has repaired it meanwhile
        is_new, was = not self.path.stat().st_size, "damaged"
        with suppress(sqlite3.Error):
            was = "of an older format" if self.value("PRAGMA user_version") == FORMAT - 1 else was
        Path(f"{self.path}.part-journal").unlink(missing_ok=True)
        with whole_file(self.path) as stream:
            new = Store(self.folder, self.identity, self.dim, os.path.basename(stream.name))
            schema = [f"PRAGMA page_size = {PAGE_BYTES}", "BEGIN", *SCHEMA, f"PRAGMA user_version = {FORMAT}", "COMMIT"]
            new.db.executescript(";".join(schema))
            with new.db.transaction():
                new.set_meta(identity=self.identity, decoders=image_formats()[2])
                for table, columns in COLUMNS.items():
                    marks = ", ".join("?" for _ in columns.split(","))
                    new.db.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", self.readable(table))
            new.discard_damaged()
            new.db.close()
            self.db.close()
            Path(f"{self.path}-journal").unlink(missing_ok=True)  # SQLite would replay it
        self.db = Database(self.path, self.crc)
        if not is_new:
            log.warning("%s was %s. Repaired: %d features are kept", self.path, was, self.count("features"))


# ---- Index -----------------------------------------------------------------------------------------------------------

CODED_DIM = 256  # principal components that a code keeps, each in 2 bits
TRAINED_ON, HELD_OUT = 30_000, 500  # vectors; more improve nothing; with fewer held out, recall is off by over 0.001
OUTGROWN = 2  # an index is made anew once it holds twice the vectors that it was made of, or that are stored now
SHORTLIST, LONGEST_SHORTLIST = 160, 32_768  # codes whose exact scores are computed: at first, at most
RECALL = 0.998  # share of the true ten nearest that the shortlist must hold
POINT_BLOCK = 512  # pictures whose points are added to their index at once
FEW_POINTS = 20_000  # fewer points than this are all compared
LIST_POINTS, TRAINING = 1200, 40  # points in a list of the index; points for each list that it is trained on
ONE_THREAD = 200_000  # fewer points than this are trained on by one thread
LISTS = 4  # lists of the index that are looked at for each point of a query
MANY_LISTS, CELL_LISTS = 2048, 32  # from so many lists on, they lie in cells; lists in a cell, on average
CELLS = 8  # cells that are looked at for each point
NEIGHBOURS, MORE_NEIGHBOURS = 4, 16  # points of the index that vote for each; if they do not tell, or for many pictures
LATER = 128  # pictures that are not in the file yet, at most: they are compared one by one
POINT_BYTES = WHERE_BYTES + CODE_BYTES  # of a stored point
GPU_RESERVE = 3 << 30  # bytes left to the model and to FAISS's own work


class Index(NamedTuple):
    """A FAISS index over the features of the store, or over its points."""

    faiss: faiss.Index  # its ids are rows of the store; of points, they also hold where the point is
    last: int  # the last row in it; later ones of the features are compared one by one
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


watched = threading.local()  # `job`: the Job that a thread of the UI works for


def progress_bar(steps: Iterable[Any] | None = None, **options: Any) -> tqdm.tqdm:
    """A bar that shows on a terminal only, and not with -q; or, in a thread that works for the UI, on its page."""
    if job := getattr(watched, "job", None):
        return job.bar(steps, **options)
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


def vectors_of(index: faiss.Index) -> Blocks:
    """Ids, int64 (n,), and features, fp16 (n, dim), of an index as `build_index` makes it, in blocks, not copied."""
    flat, n = faiss.downcast_index(index.index), index.ntotal
    if not n:
        return
    rows = faiss.rev_swig_ptr(index.id_map.data(), n)
    vectors = faiss.rev_swig_ptr(flat.codes.data(), n * flat.code_size).view(np.float16).reshape(n, -1)
    for i0 in range(0, n, BLOCK):
        yield rows[i0 : i0 + BLOCK], vectors[i0 : i0 + BLOCK]


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


def point_blocks(store: Store, first: int) -> Blocks:
    """Ids, int64 (n,), and descriptors, float32 (n, POINT_DIM), of the points from row `first` on, in blocks."""
    while found := store.points_after(first - 1, POINT_BLOCK):
        where, xb = unpack_codes(b"".join(points for _, points in found))
        counts = [len(points) // POINT_BYTES for _, points in found]
        yield np.repeat(np.array([row for row, _ in found], np.int64), counts) << WHERE_BITS | where, xb
        first = found[-1][0] + 1


def cluster_centres(xt: np.ndarray, count: int) -> np.ndarray:
    """Centres of `count` clusters of the vectors, float32 (n, dim), by k-means: float32 (count, dim)."""
    means = faiss.Kmeans(xt.shape[1], count, niter=8, min_points_per_centroid=1)  # 1: no warning about few
    means.train(xt)
    return means.centroids


def list_centres(xt: np.ndarray, lists: int) -> faiss.Index:
    """An index of the centres of so many lists, made from the vectors xt, float32 (n, dim): it tells a vector's list.

    Many centres lie in cells, and those in the cells nearest to a vector are looked at, as in a tree of k-means (Nistér
    & Stewénius, CVPR 2006). To compare all with all would take ten times as long to fill the index.
    """
    flat = faiss.IndexFlatL2(xt.shape[1])
    if lists < MANY_LISTS:
        flat.add(cluster_centres(xt, lists))
        return flat
    flat.add(cluster_centres(xt, lists // CELL_LISTS))
    cell = flat.assign(xt, 1)[:, 0]
    ends = np.bincount(cell, minlength=flat.ntotal).cumsum()
    shares = np.diff((ends * (lists / len(xt))).round().astype(int), prepend=0)  # as many lists as fit a cell's vectors
    parts = np.split(xt[np.argsort(cell, kind="stable")], ends[:-1])
    some = [it for it in zip(parts, shares) if it[1]]
    index = faiss.IndexIVFFlat(flat, xt.shape[1], flat.ntotal)
    index.nprobe = CELLS
    with ThreadPoolExecutor(usable_cores(), initializer=faiss.omp_set_num_threads, initargs=(1,)) as threads:
        index.add(np.concatenate(list(threads.map(cluster_centres, *zip(*some)))))
    index.make_direct_map()  # a point is coded by what it differs from its centre, which FAISS asks for by number
    return index


def empty_copy_index(store: Store, points: int) -> faiss.Index:
    """An index for about as many points: of few all are compared, of many those in some of its lists."""
    if points < FEW_POINTS:
        return faiss.index_factory(POINT_DIM, "IDMap,Flat")
    lists = 1 << max(4, min(16, round(math.log2(points / LIST_POINTS))))
    pictures = math.ceil(TRAINING * lists * store.count("points") / points)
    # A digest is a hash: the first ones are a random sample.
    sample = store.rows("points", "length(points) ORDER BY digest LIMIT ?", pictures)
    xt = unpack_codes(b"".join(points for _, _, points, _ in sample))[1]
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if len(xt) < ONE_THREAD else threads)  # its many small steps wait for busy cores
    try:
        index = faiss.IndexIVFPQ(list_centres(xt, lists), POINT_DIM, lists, POINT_DIM // 8, 8)
        index.pq.cp.min_points_per_centroid = 1  # no warning
        index.nprobe, index.use_precomputed_table = LISTS, -1  # -1: no table, see `read_index`
        index.train(xt)
    finally:
        faiss.omp_set_num_threads(threads)
    return index


class Source(NamedTuple):
    """A table of the store of which an index is made."""

    table: str
    name: str  # of the index file, and of the store's note on it
    vectors: str  # SQL: how many vectors rows of the table have
    blocks: Callable[[Store, int], Blocks]  # the vectors from a row on
    empty: Callable[[Store, int], faiss.Index | None]  # an index for as many vectors; None: the one of `build_index`
    checked: int | None = None  # bytes of the file that its checksum covers; None: all


FEATURES = Source("features", "index", "count(*)", lambda store, first: store.blocks(first), lambda *_: None)
# `copies.faiss` may have gigabytes, of which a search reads little. A wrong byte there costs a vote, never an answer.
LOCAL = Source(
    "points", "copies", f"sum(length(points)) / {POINT_BYTES}", point_blocks, empty_copy_index, CHECKED_BYTES
)


def read_index(store: Store, source: Source) -> Index | None:
    """The stored index; None if there is none, or if it does not match what the store noted of it."""
    path = store.folder / f"{source.name}.faiss"
    try:
        size, checksum, *notes = json.loads(store.get_meta(source.name))
        data: Any = np.memmap(path, np.uint8, "r") if path.stat().st_size == size else b""
    except (TypeError, ValueError, OSError):  # there is no file, or no note, or damage has made it something else
        return None
    if zlib.crc32(json.dumps(notes).encode(), zlib.crc32(data[: source.checked])) != checksum:
        log.warning("%s is damaged or out of date: it is made again by an update", path)
        return None
    reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(data), size)
    index = faiss.read_index(reader, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)  # of up to 512 MiB, and no look-up is faster
    return Index(index, *notes)._replace(file=data)


def renewed_index(store: Store, source: Source, index: Index | None, coded: bool = False) -> Index:
    """An index of all rows, saved: `index` with later rows added or, if that is outgrown or None, a new one."""
    with store.locked():
        last = store.last_row(source.table)  # another run may have replaced all meanwhile
        stored = store.value(f"SELECT {source.vectors} FROM {source.table}") or 0
        new = store.value(f"SELECT {source.vectors} FROM {source.table} WHERE row > ?", index.last) if index else 0
        if index and index.faiss.ntotal + (new or 0) < OUTGROWN * min(stored, index.made_of):
            # Vectors cannot be added to an index that looks into a file
            copy = faiss.deserialize_index(index.file, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
            index = index._replace(faiss=build_index(source.blocks(store, index.last + 1), copy), last=last, file=None)
        elif coded:
            index = coded_index(store, last)
        else:
            blocks = progress_bar(source.blocks(store, 0), desc=f"index of {source.table}", unit="block")
            index = Index(build_index(blocks, source.empty(store, stored)), last, made_of=stored)
        data, notes = faiss.serialize_index(index.faiss), index[1:-1]
        with whole_file(store.folder / f"{source.name}.faiss") as stream:
            stream.write(data)
        checksum = zlib.crc32(json.dumps(notes).encode(), zlib.crc32(data[: source.checked]))
        with store.db.transaction():
            store.set_meta(**{source.name: json.dumps([len(data), checksum, *notes])})
    return index


def open_index(store: Store, work: Work = Work()) -> Index:
    """The FAISS index of the features, added to or made anew if need be. Without `work.update`, it is the stored one,
    or an empty one if there is none: nobody is waited for."""
    last, index = store.last_row(), read_index(store, FEATURES)
    if not last:
        raise DeepVisionError(f"{store.folder} holds no features yet: run without --no-update")
    if not work.update:
        return index or Index(build_index(np.zeros((0, store.dim), np.float32)), 0)
    coded = store.count("features") * store.dim * 2 > work.exact_bytes
    if index and bool(index.shortlist) != coded:  # there are too many vectors for that kind, or too few
        index = None
    return index if index and index.last == last else renewed_index(store, FEATURES, index, coded)


def open_copy_index(store: Store, work: Work = Work()) -> Index:
    """The FAISS index of the points, added to or made anew if need be. The last few pictures are not in its file."""
    index, last = read_index(store, LOCAL), store.last_row("points")
    if work.update and not (index and last - index.last <= LATER):
        renewed_index(store, LOCAL, index)
        index = read_index(store, LOCAL)  # what was added or made is not kept in memory
    index = index or Index(faiss.index_factory(POINT_DIM, "IDMap,Flat"), 0)
    # Without a file, a few pictures are compared one by one; of more, the nearest ones alone are candidates
    if index.last < last and (index.last or last <= LATER):
        both = faiss.IndexShards(POINT_DIM, False, False)  # one after the other; the ids are rows and places already
        both.add_shard(index.faiss)
        both.add_shard(build_index(point_blocks(store, index.last + 1), faiss.index_factory(POINT_DIM, "IDMap,Flat")))
        index = index._replace(faiss=both, last=last)
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
QUERY_THREADS = 2  # threads that read queries
TOGETHER = 16  # queries in a batch; each takes a third of the time that it takes alone
SCAN_VIEWS = 4  # with so many views, `nearest` is quicker than the exact index's own search: 9 views take a third
FIRST_LIST = 64  # rows that an exact search scores first; `ranked` asks for more
CLOSELY = 10  # codes rank inexactly: of the rows that they choose, only the best tenth is trusted to be complete
ROUNDING = 1e-5  # by how much two ways to compute the same score may differ
CANDIDATES = 10  # contents that are compared with a query at once: while one of the last ten shows the same, ten more
LOOK_ALIKES, FEW_DETAILS = 2, 80  # nearest contents that are candidates, too; points below which CANDIDATES are
NEAREST_SCORE = 0.2  # least score of such a candidate
SAMPLED = 8000  # images that `representatives` looks at: 0.7 s with 2048 dimensions, and sizes within 10 %
MEMBERS = 100  # images of a group, at most


@dataclass(frozen=True)
class Engine(AbstractContextManager["Engine"]):
    """What a search needs; `initialize_reverse_image_search` makes it. `with engine:` closes it at the end."""

    images: Path
    model: Model
    store: Store
    index: Index
    copies: Index
    exact: bool  # compare with every vector, whatever the index is
    summary: Summary

    def close(self, *_: Any) -> None:
        """Close the database. That is also done when the engine is dropped."""
        self.store.db.close()

    __exit__ = close

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

    features: np.ndarray  # of the query's views, float32 (views, dim)
    shown: Shown
    corner: Sequence[int] = (0, 0)  # left and top of the part that was searched with, in pixels of the whole query


class Found(NamedTuple):
    """A content of the store, compared with a query."""

    score: float
    digest: bytes
    path: str = ""  # of a file with this content
    size: tuple[int, int] = (0, 0)  # width and height of the upright picture, if it was compared
    verdict: Verdict | None = None  # from the query to it


def candidate_rows(engine: Engine, queries: Sequence[np.ndarray], count: int) -> list[list[int]]:
    """Rows for each of the queries, (views, dim): its `count` nearest ones by the index, without duplicates.

    Rows that are not in the index yet are scanned and give up to `count` more. If the search is exact, all rows are
    scanned instead.
    """
    index, last, found = engine.index, engine.store.last_row(), []
    xq = np.concatenate(queries)
    if not engine.exact and not index.shortlist and len(xq) >= SCAN_VIEWS:
        found.append(nearest(xq, count, vectors_of(index.faiss)))
    elif not engine.exact:
        is_large = index.shortlist and len(xq) >= GPU_QUERIES and count <= GPU_RESULTS
        on_gpus = engine.on_gpus if is_large else None
        D, I = (on_gpus or index.faiss).search(xq, min(count, index.faiss.ntotal))
        found.append((-D if index.shortlist and not on_gpus else D, I))  # codes give distances
    if engine.exact or last > index.last:
        blocks = engine.store.blocks(0 if engine.exact else index.last + 1, last)
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
    found, left = list[Found](), iter(rows)
    while block := list(itertools.islice(left, BLOCK)):  # all rows of a million at once would take 16 GB
        _, digests, vectors = store.features_of(block)
        xb = to_float32(vectors)
        S = (torch.from_numpy(xb) @ torch.from_numpy(xq).T).numpy()  # (rows, views)
        views = (S.max(1, keepdims=True) - ROUNDING <= S).argmax(1)  # of equal views the first: the query as it is
        D = np.einsum("nd,nd->n", xb, xq[views]).clip(-1, 1)  # computed row by row: the same in any company
        found += map(Found, D.tolist(), digests)
    return sorted(found, key=lambda it: (-it.score, it.digest))


def ranked(engine: Engine, xq: np.ndarray, rows: Sequence[int]) -> Iterator[Found]:
    """All contents of the store, compared with a query's views, xq (views, dim), best first. `rows`: for round one.

    The index gives a list of the `count` rows that seem best, then of four times as many, and so on. Each list is
    complete down to a score, its `floor`, and yields what scores between that and the floor of the list before. A row
    above that one, found only now, comes too late and is left out.
    """
    count, last_floor = engine.first_list, math.inf
    while True:
        scored = exact_scores(engine.store, xq, rows)
        if count >= max(engine.index.faiss.ntotal, engine.store.last_row()):  # these are all rows
            yield from (it for it in scored if it.score <= last_floor)
            return
        missing = len(rows) - len(scored)  # rows that a rebuild has replaced meanwhile
        trusted = count // CLOSELY if engine.index.shortlist and not engine.exact else count - 1 - missing
        floor = scored[min(trusted, len(scored) - 1)].score + ROUNDING if scored and trusted >= 0 else math.inf
        floor = min(floor, last_floor)
        yield from (it for it in scored if floor < it.score <= last_floor)
        count, last_floor = 4 * count, floor
        engine = replace(engine, exact=True) if count > LONGEST_SHORTLIST else engine  # a copy has no `on_gpus` yet
        (rows,) = candidate_rows(engine, [xq], count)


def location(path: str) -> str:
    """The path with the links among its folders resolved. A file that is a link itself is another file."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def files_of(engine: Engine, query: Picture, digest: bytes) -> Iterator[str]:
    """The paths of the files with this content, without those that have changed, and without the query's own file."""
    own = location(os.fsdecode(query.file.path))
    for file in engine.store.files_with(digest):
        path = engine.path_of(file.path)
        with suppress(OSError):  # it is gone
            now = File.of(file.path, os.stat(path))
            is_same = now == file or (now.size, -1) == file[1:]  # -1: only its points are missing yet
            is_other = query.digest is not None and digest != query.digest
            if is_same and (is_other or location(path) != own):
                yield path


def nearest_files(engine: Engine, query: Picture, rows: Sequence[int], k: int) -> list[Found]:
    """The files nearest to the query, sorted by score and path: at least k files of at least CANDIDATES contents."""
    found, contents = list[Found](), set[bytes]()
    for it in ranked(engine, query.made.features, rows):
        if len(found) >= k and len(contents) >= CANDIDATES and it.score < found[-1].score:
            break
        found += (files := [it._replace(path=path) for path in files_of(engine, query, it.digest)])
        contents |= {it.digest} if files and it.digest != query.digest else set()
    return sorted(found, key=lambda it: (-it.score, it.path))


class Vote(NamedTuple):
    """A picture of the collection in which points of another picture were found again."""

    row: int  # of its points in the store
    points: int  # that agree
    H: np.ndarray  # (3, 3), from the places of the other picture's points to those of this one's
    mirrored: bool
    inverted: bool


def hints_by_vote(vote: Vote | None, a: Shown, b: Shown) -> list[Hint]:
    """The transform from a to b of a vote for b, if there is one."""
    return [Hint(vote.points, to_pixels(vote.H, a.size, b.size, vote.mirrored), vote.inverted)] if vote else []


def nearest_points(index: Index, pictures: Sequence[Points], k: int) -> np.ndarray:
    """Ids of the k points of the index nearest to each of the n points of the pictures, and then of these pictures
    mirrored, int64 (2, n, k), see `Index`; -1: none. Of many pictures at once, each takes half the time."""
    mirrored = (it.mirrored() for it in pictures)
    xq = np.concatenate([it.descriptors for it in (*pictures, *mirrored)])
    if not (len(xq) and index.faiss.ntotal):
        return np.full((2, len(xq) // 2, k), -1)
    return index.faiss.search(xq, k)[1].reshape(2, -1, k)


def votes(pictures: Sequence[Points], ids: np.ndarray) -> list[list[Vote]]:
    """For each of the pictures, those on which FEWEST points or more agree, with most points first.

    Each point, and each point of the mirrored picture, votes for the pictures that its neighbours lie in: `ids`, from
    `nearest_points`, say which ones, and where. The votes for a picture count if one transform explains them.
    """
    found = [dict[int, Vote]() for _ in pictures]
    numbers = np.repeat(np.arange(len(pictures)), [len(it.places) for it in pictures])
    for mirrored, near in zip((False, True), ids):
        seen = Points(*map(np.concatenate, zip(*(it.mirrored() if mirrored else it for it in pictures))))
        voter, id_ = np.nonzero(near >= 0)[0], near[near >= 0]
        # One group for each of the pictures, each picture in which a point was found, and whether that is a negative
        key = ((id_ >> WHERE_BITS) * len(pictures) + numbers[voter]) * 2 + (seen.dark[voter] != (id_ & 1))
        _, group, sizes = np.unique(key, return_inverse=True, return_counts=True)
        order = np.argsort(group, kind="stable")
        order = order[sizes[group[order]] >= FEWEST]
        voter, id_, sizes = voter[order], id_[order], sizes[sizes >= FEWEST]
        m, frames, dark = unpack_where(id_)
        q, ratio, ends = seen.places[voter], frames / seen.frames[voter], np.cumsum(sizes)
        for number, points, H in fits((q, m, ratio), sizes, 2):
            one = ends[number] - 1  # any of the group: all have the same picture, row and inversion
            best, row = found[numbers[voter[one]]], int(id_[one] >> WHERE_BITS)
            vote = Vote(row, points, H, mirrored, bool(seen.dark[voter[one]] != dark[one]))
            if row not in best or (points, not vote.inverted) > (best[row].points, not best[row].inverted):
                best[row] = vote
    return [sorted(it.values(), key=lambda vote: (-vote.points, vote.row)) for it in found]


@lru_cache(maxsize=64)  # many queries share candidates
def read_shown(path: str, digest: bytes) -> Shown:
    """A file, to be compared. OSError: it cannot be read, or its content has another hash than `digest`."""
    read = read_path(path, Shown.of)
    if not read.made or read.digest != digest or read.vanished:
        raise OSError(NOT_COMPARED)
    return read.made


def voted(engine: Engine, query: Picture) -> dict[bytes, Vote]:
    """The contents in which points of the query were found again, those with most points first.

    The query is looked up in the sizes of the index, then in sizes between them; each time, NEIGHBOURS of each point
    vote, then more. This ends with the first vote that is plain.
    """
    own, found = engine.store.value("SELECT row FROM points WHERE digest = ?", query.digest), list[Vote]()

    def looked_up(points: Points) -> list[Vote]:
        near, k = nearest_points(engine.copies, [points], MORE_NEIGHBOURS), MORE_NEIGHBOURS
        few = [vote for vote in votes([points], near[..., :NEIGHBOURS])[0] if vote.row != own]
        if few and few[0].points >= PLAIN and len(few) <= 2 * NEIGHBOURS:
            return few
        while len(more := [vote for vote in votes([points], near)[0] if vote.row != own]) > 2 * k:
            k *= 4  # many pictures may crowd out others
            near = nearest_points(engine.copies, [points], k)
        return more

    for sizes in ("points", "points_between"):
        found = sorted([*found, *looked_up(getattr(query.made.shown, sizes))], key=lambda vote: -vote.points)
        if found and found[0].points >= PLAIN:
            break
    rows = json.dumps([vote.row for vote in found])
    known = dict(engine.store.db.execute(
        "SELECT row, digest FROM points WHERE row IN (SELECT value FROM json_each(?))", (rows,)
    ).fetchall())  # fmt: skip
    best = dict[bytes, Vote]()
    for vote in found:
        if vote.row in known:
            best.setdefault(known[vote.row], vote)
    return best


def verified(engine: Engine, query: Picture, near: list[Found], by_vote: dict[bytes, Vote]) -> list[Found]:
    """`near`, and the files of further contents that show the same as the query, each with its verdict.

    Candidates are the contents that got votes and, where no vote is plain, the nearest ones. They come in tens: while
    one of the last ten shows the same, the next ten are compared.
    """
    shown = query.made.shown
    look_alikes = dict.fromkeys(it.digest for it in near if it.digest != query.digest and it.score >= NEAREST_SCORE)
    count = CANDIDATES if len(shown.points.places) < FEW_DETAILS else LOOK_ALIKES
    if any(vote.points >= PLAIN for vote in by_vote.values()):
        count = 0  # its points are good enough to find what shows the same
    candidates = list(dict.fromkeys([*by_vote, *list(look_alikes)[:count]]))
    paths = {it.digest: it.path for it in reversed(near)}
    verdicts = dict[bytes, tuple[Shown, Verdict]]()

    def look(digest: bytes) -> None:
        if path := paths.get(digest) or next(files_of(engine, query, digest), ""):
            with suppress(OSError):  # it cannot be read
                other = read_shown(path, digest)
                if verdict := compare(shown, other, hints_by_vote(by_vote.get(digest), shown, other)):
                    verdicts[digest] = other, verdict

    for start in range(0, len(candidates), CANDIDATES):
        ten = candidates[start : start + CANDIDATES]
        list(read_ahead(look, ten, usable_cores(), CANDIDATES))
        if not verdicts.keys() & set(ten):
            break
    rows = engine.store.rows_of(digest for digest in verdicts if digest not in paths)
    further = [
        it._replace(path=path)
        for it in exact_scores(engine.store, query.made.features, rows)
        for path in files_of(engine, query, it.digest)
    ]
    return [
        it._replace(size=verdicts[it.digest][0].size, verdict=verdicts[it.digest][1]) if it.digest in verdicts else it
        for it in [*near, *further]
    ]


def compared(
    queries: Iterable[Any], engine: Engine, k: int, crop: Sequence[float] | None = None
) -> Iterator[tuple[Picture, list[Found]]]:
    """Each query with what `nearest_files` and `verified` give for it. `crop`: see `search`."""

    def look_at(image: Image.Image) -> Seen:
        image, *corner = cut_out(image, crop) if crop else (image, 0, 0)
        shown = Shown.of(image, engine.model.side)
        views = query_views(shown.image, engine.model)
        _ = shown.points  # computed here, in a thread that reads
        features = to_float32(launch(views, engine.model, engine.model.batch)[0].cpu().numpy().astype(np.float16))
        if not np.isfinite(features).all():
            raise ValueError(NOT_FINITE)
        return Seen(features, shown, corner)

    pictures = read_ahead(partial(read_query, transform=look_at), queries, QUERY_THREADS, TOGETHER)
    while group := list(itertools.islice(pictures, TOGETHER)):
        usable = [query for query in group if query.made]
        with engine.store.db.transaction("DEFERRED"):  # one state: --rebuild, say, replaces rows meanwhile
            features = [query.made.features for query in usable]
            lists = candidate_rows(engine, features, engine.first_list) if usable else []
            near = [nearest_files(engine, query, rows, k) for query, rows in zip(usable, lists)]
            if crop:  # a part is not identical to the file
                group = [query._replace(digest=None) for query in group]
            found = iter([(it, voted(engine, query)) for it, query in zip(near, (it for it in group if it.made))])
        for query in group:
            yield query, verified(engine, query, *next(found)) if query.made else []


def is_mirrored(corners: Sequence[tuple[float, float]]) -> bool:
    """Whether a picture is mirrored in another one, by its corners there, given from its top left clockwise."""
    return bool(np.linalg.det(np.array(corners)[[1, 3]] - corners[0]) < 0)


def edit_words(H: np.ndarray, size: Sequence[float], inverted: bool) -> list[str]:
    """Words for how a picture of this size differs from the one that H moves it to: mirrored, inverted, turned 12°."""
    (x0, y0), (x1, y1), *_ = corners = moved(H, corners_of(size))
    mirrored = is_mirrored(corners.tolist())
    angle = round(-math.degrees(math.atan2(y1 - y0, x1 - x0)) + 180 * mirrored) % 360  # clockwise
    turned = [f"turned {angle}°"] if min(angle, 360 - angle) >= 3 else []
    return ["mirrored"] * mirrored + ["inverted"] * inverted + turned


def region_of(verdict: Verdict, a: Sequence[int], b: Sequence[int]) -> Region:
    """The Region of a verdict on two upright pictures of these sizes, a query and a match."""
    H = verdict.hint.H
    corners, outline = (
        [(round(x, 1), round(y, 1)) for x, y in moved(it, corners_of(size)).tolist()]
        for it, size in ((H, a), (np.linalg.inv(H), b))
    )
    covers = round(verdict.covers[1], 3)
    return Region(
        corners, outline, verdict.details, covers, verdict.hint.inverted, round(verdict.differs, 3), verdict.boxes[1]
    )


def as_match(query: Picture, found: Found, damaged: bool) -> Match:
    """The Match, still without a rank, that a Found of the query is shown as."""
    is_same, verdict, shown = found.digest == query.digest, found.verdict, query.made.shown
    if is_same or not verdict:
        label = LABELS[-1] if is_same else ""
        return Match(0, found.path, found.score, is_same, label, truncated=damaged)
    words = edit_words(verdict.hint.H, shown.size, verdict.hint.inverted)
    words += ["part of the query"] if verdict.covers[0] < WHOLE else []
    region, (left, top) = region_of(verdict, shown.size, found.size), query.made.corner
    region = region._replace(outline=[(x + left, y + top) for x, y in region.outline])
    return Match(0, found.path, found.score, False, verdict.label, ", ".join(words), region, truncated=damaged)


def sorting_key(match: Match) -> tuple[Any, ...]:
    differing = match.region.differing if match.region else 0.0
    return -("", *LABELS).index(match.label), differing, -match.score, match.path


def search(
    queries: Any, engine: Engine | None = None, *, k: int = TOP,
    threshold: float | str = -1.0, crop: Sequence[float] | None = None,
) -> Iterator[Answer]:  # fmt: skip
    """What looks like each of the queries: an Answer for each, in their order.

    queries    paths, Pillow images, file-like objects, arrays uint8 (height, width, 3); one, or an iterable of them
    k          matches at most; a picture that is there under several names gives several
    threshold  cosine similarity, -1 to 1, that a match has at least, or label: variant, copy, identical
    crop       the part of each query to search with: left, top, right, bottom, see `cut_out`

    Identical files come first, then copies, then variants, those that differ least before others, then look-alikes;
    all else being equal by score, then by path. The query's own file and files that have changed are left out. Scores
    are exact; in a large collection a look-alike may be missed, see `coded_index`. A query that cannot be used gets an
    `error`. Raises DeepVisionError if features are damaged.
    """
    if k < 1 or (isinstance(threshold, str) and threshold not in LABELS):
        raise ValueError(f"k={k}, threshold={threshold!r}: see the documentation of search")
    engine = engine or initialize_reverse_image_search()
    is_one = isinstance(queries, (str, bytes, os.PathLike, Image.Image)) or hasattr(queries, "read")
    names = [queries] if is_one or getattr(queries, "ndim", 4) < 4 else queries
    labels = LABELS[LABELS.index(threshold) :] if isinstance(threshold, str) else ("", *LABELS)
    least = -1.0 if isinstance(threshold, str) else threshold
    with engine.store.errors():
        for query, found in compared(names, engine, k, crop):
            damaged = engine.store.damaged_contents(it.digest for it in found)
            matches = [as_match(query, it, it.digest in damaged) for it in found]
            matches.sort(key=sorting_key)
            kept = [match for match in matches if match.label in labels and round(match.score, 3) >= least][:k]
            kept = [match._replace(rank=rank) for rank, match in enumerate(kept, start=1)]
            yield Answer(os.fsdecode(query.file.path), kept, None if query.made else query.reason or NOT_AN_IMAGE)


def representatives(engine: Engine, count: int) -> list[tuple[int, list[Match]]]:
    """At most `count` groups of images that look alike, by k-means over a sample, the largest group first.

    Each has its size, an estimate if the collection is larger than the sample, and the images nearest to its centre.
    """
    with engine.store.errors(), engine.store.db.transaction("DEFERRED"):  # rows and features come from one state
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

PAIRED = 100  # contents that `pairs_by_score` compares with each content, at most
WHOLE = 0.95  # share of a picture's area from which on it counts as all of it
ALL_SHOWN, AS_LARGE = 0.98, 0.95  # least share that the file to keep shows, and of its resolution, if nothing is lost
LOOKED_UP = 64  # pictures whose points are looked up at once
NOT_COMPARED = "it cannot be read now, or has changed meanwhile"
LARGEST_LOST, FULL_SIDE = 2, 6000  # as LARGEST and CLOSE, where a file may be deleted
BESIDE, EDGE = 6, 8  # pixels between lines along a part's side; levels of 255 by which an edge exceeds the usual
DETAIL = 6  # pixels of a window in which details of two copies are compared, likewise
OFF, OFF_SHARE = 6.0, 0.15  # of 255, and of the contrast around it: a window that is off by more differs,
OFF_USUAL = 2.0  # if it is off by so many times what busy windows are: compression and scaling do that to them
FEW_OFF = 2  # windows that may differ
SHARP = 0.7  # least share of the sharpness of a file that the one to keep has, likewise
MOST_COMMON = 0.995  # least share of what both pictures show that is no band along an edge which differs, likewise
JUDGEMENT = 5  # version of the verdicts that are stored; raise it when `compare` or `examined` find something else

WAITS = "waits"  # stored in place of a Pair: two contents that could not be compared, or need not be yet

Key = tuple[bytes, bytes]  # two contents, the smaller hash first
Pairs = Iterator[tuple[bytes, bytes, Match]]  # keep, other, and the Match of the other, still without a path
Tell = Callable[[str, str, str], None]  # see `find_duplicates`


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
        D, I = nearest(to_float32(xb), min(PAIRED + 1, len(digests)), engine.store.blocks())
        for place in zip(*np.nonzero(threshold - 0.0005 <= D)):
            keep, other = digests.get(rows[place[0]]), digests.get(I[place])
            if keep and other and keep != other:
                yield keep, other, Match(0, "", min(1.0, float(D[place])), False, lost="not compared")


def relation(verdict: Verdict, size: Sequence[int]) -> str:
    """What a picture of this size is to the one to keep, to which the verdict leads: "same picture", "mirrored"..."""
    words = edit_words(verdict.hint.H, size, verdict.hint.inverted)
    if verdict.covers[1] < WHOLE:
        words.append(f"crop, {100 * verdict.covers[1]:.0f} %")
    elif verdict.covers[0] < WHOLE:
        words.append(f"within a larger picture, {100 * verdict.covers[0]:.0f} % of it")
    return ", ".join(words) or ("same picture" if verdict.label == "copy" else "same layout")


def is_set_in(H: np.ndarray, a: Shown, b: Shown) -> bool:
    """Whether the first picture ends at an edge within the second: beside a caption, in a frame, on a screen. Around a
    crop, the picture goes on: beyond its sides it changes no more than before them.
    """
    scale = b.image.width / b.size[0]
    corners, share = moved(H, corners_of(a.size)) * scale, np.linspace(0.05, 0.95, 200)[:, None]
    pixels = np.asarray(b.image, np.float32)
    for one, other in zip(corners, np.roll(corners, -1, 0)):
        outward = np.array([other[1] - one[1], one[0] - other[0]]) / np.linalg.norm(other - one)
        outward *= np.sign((one - corners.mean(0)) @ outward)
        lines = [one + (other - one) * share + outward * steps * BESIDE for steps in (-1.5, -0.5, 0.5)]
        seen = ((lines[2] >= 0) & (lines[2] < b.image.size)).all(1)
        if seen.mean() < 0.5:  # here the second one ends, too
            continue
        places = [np.clip(line[seen], 0, np.array(b.image.size) - 1).astype(int) for line in lines]
        inner, last, beyond = (pixels[place[:, 1], place[:, 0]] for place in places)
        if np.abs(beyond - last).mean() > 2 * np.abs(last - inner).mean() + EDGE:
            return True
    return False


def lost_with(verdict: Verdict, a: Shown, b: Shown) -> list[str]:
    """Words for what the first picture shows and the second does not; empty if nothing would be lost with it."""
    H, lost = verdict.hint.H, edit_words(verdict.hint.H, a.size, verdict.hint.inverted)
    if verdict.label != "copy":
        lost.append(f"what differs ({100 * verdict.differs:.0f} %)")
    if verdict.covers[0] < ALL_SHOWN:
        lost.append(f"all but a crop of {100 * verdict.covers[0]:.0f} %")
    if verdict.covers[1] < ALL_SHOWN and is_set_in(H, a, b):
        lost.append("the picture without what is around it")
    sides = np.linalg.norm(np.diff(moved(H, corners_of(a.size))[:3], axis=0), axis=1) / a.size
    if sides.min() < AS_LARGE:
        lost.append("resolution")
    return lost


def differ_in_detail(over: Overlay) -> bool:
    """Whether two copies, laid over one another, differ by more than compression and scaling make them differ: in a
    digit, a faint line, a watermark, a face that was softened."""
    a, b = over.light
    seen, (h, w) = seen_windows(over, DETAIL), b.shape
    x, y = (window_means(it[None], DETAIL)[:, seen] for it in (a, b))
    _, gain, shift = one_change(x, y, noise=4.0, most=255.0)
    a = gain * a + shift
    framed = torch.nn.functional.pad(a[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    moved_a = (framed[down : down + h, right : right + w] for down, right in itertools.product(range(3), repeat=2))
    off = window_means((next(moved_a) - b).abs_()[None], DETAIL)
    for it in moved_a:
        torch.minimum(off, window_means((it - b).abs_()[None], DETAIL), out=off)
    means, squares = (window_means(torch.stack(it), DETAIL) for it in ((a, b), (a * a, b * b)))
    contrast = torch.nn.functional.max_pool2d((squares - means**2).clamp_(min=0).sqrt_(), 5, 1, 2).amax(0)
    share = off[0] / (contrast + 8)
    busy = share[seen & (contrast > 10)]
    usual = float(busy[:: 1 + len(busy) // 100_000].quantile(0.9)) if len(busy) else 0.0
    return int((seen & (off[0] > OFF) & (share > max(OFF_SHARE, OFF_USUAL * usual))).sum()) > FEW_OFF


def differ_in_full(verdict: Verdict, a: Shown, b: Shown) -> bool:
    """Whether small parts of two copies differ at the full resolution of the smaller one, as in frames of a film."""
    hint = verdict.hint
    smaller, larger, hint = (a, b, hint) if math.prod(a.size) < math.prod(b.size) else (b, a, verdict.reversed().hint)
    side = min(max(smaller.size), FULL_SIDE)
    if side > CLOSE:
        reach = 1 if side < 2 * CLOSE else 2  # it is exact to a pixel at CLOSE
        hint = refined(hint, smaller, larger, side, reach, 2 * WINDOW_SIDE, 2)
    found = judged(hint, smaller, larger, side, LARGEST_LOST)
    if not found or found.label != "copy":
        return True
    common = area_of(shared_part(found.hint.H, smaller.size, larger.size))
    if found.covers[1] * math.prod(larger.size) < MOST_COMMON * common:  # a line of text along an edge, say
        return True
    over = overlay(found.hint, smaller, larger, side, smoothly=True)
    return not over or differ_in_detail(over.trimmed())


def sharpness(a: Shown, b: Shown) -> list[float]:
    """How much detail each of two pictures shows at the smaller size of both: little if it was enlarged, or blurred."""
    (w, h), found = map(min, a.image.size, b.image.size), list[float]()
    for it in (a, b):
        light = torch.from_numpy(np.array(it.image.convert("L").resize((w, h), Image.Resampling.LANCZOS), np.float32))
        found.append(float((light[1:-1, 1:-1] - smooth(light) / 16).abs().mean()))
    return found


class Pair(NamedTuple):
    """Two contents that show the same, as the store keeps it."""

    label: str
    relations: list[str]  # what the first is to the second, and the second to the first
    regions: list[Any]  # of the first in the second, and the second in the first
    lost: list[list[str]]  # what is lost with the first if the second stays, and with the second


def examined(one: str, other: str, digests: Sequence[bytes], vote: Vote | None) -> Pair | None:
    """The comparison of two files; None: they do not show the same. OSError: one cannot be read, or has changed."""
    a, b = read_shown(one, digests[0]), read_shown(other, digests[1])
    if (verdict := compare(a, b, hints_by_vote(vote, a, b))) is None:
        return None
    back = verdict.reversed()
    lost = [lost_with(verdict, a, b), lost_with(back, b, a)]
    if not all(lost):  # one of the files may be deleted: look closely
        files = list(zip((one, other), digests))
        # Read apart, because to find out what a file holds a JPEG is decoded at a smaller size
        held = [read_path(path, holdings_of) for path, _ in files]
        whole = [read_path(path, partial(Shown.of, most=FULL_SIDE)) for path, _ in files]
        if any(not it.made or it.vanished or it.digest != digest for it, (_, digest) in zip(held + whole, files * 2)):
            raise OSError(NOT_COMPARED)
        (of_a, of_b), (full_a, full_b) = ([it.made for it in read] for read in (held, whole))
        differ = ["small parts that differ"] if differ_in_full(verdict, full_a, full_b) else []
        larger = [["resolution"] * (math.prod(x.size) * AS_LARGE > math.prod(y.size) * 1.1 and (x.raw or y.raw))
                  for x, y in ((of_a, of_b), (of_b, of_a))]  # fmt: skip
        sharp = sharpness(full_a, full_b)
        blurred = [["sharpness"] * (keep < SHARP * gone) for gone, keep in (sharp, sharp[::-1])]
        lost = [
            lost[0] + differ + larger[0] + blurred[0] + lost_beside(of_a, of_b),
            lost[1] + differ + larger[1] + blurred[1] + lost_beside(of_b, of_a),
        ]
    regions = [region_of(verdict, a.size, b.size), region_of(back, b.size, a.size)]
    return Pair(verdict.label, [relation(verdict, a.size), relation(back, b.size)], regions, lost)


def candidate_pairs(engine: Engine, first: int) -> Iterator[tuple[bytes, bytes, Vote | None]]:
    """Each two contents that may show the same: of one with points after row `first`, points were found in the other.

    Where a picture has few points, its nearest ones by features are candidates as well.
    """
    store, few = engine.store, list[bytes]()
    # Of files that are gone as well: when they are back, their pairs are known
    digests = dict(store.db.execute("SELECT row, digest FROM points WHERE digest IN (SELECT digest FROM files)"))

    def blocks() -> Iterator[list[tuple[int, bytes]]]:  # runs in the thread of the caller, who may ask the database
        last = first
        while found := store.points_after(last, LOOKED_UP):
            last = found[-1][0]
            yield [(row, stored) for row, stored in found if row in digests]

    def look_up(block: list[tuple[int, bytes]]) -> list[tuple[int, int, list[Vote]]]:  # row, number of points, votes
        faiss.omp_set_num_threads(1)  # of this thread
        unpacked = [unpack_points(stored) for _, stored in block]
        found = votes(unpacked, nearest_points(engine.copies, unpacked, NEIGHBOURS)) if block else []
        return [(row, len(it.places), of_row) for (row, _), it, of_row in zip(block, unpacked, found)]

    with progress_bar(total=sum(row > first for row in digests), desc="looking up", unit="img") as bar:
        for block in read_ahead(look_up, blocks(), usable_cores(), usable_cores()):
            for row, points, found in block:
                if points < FEW_DETAILS:
                    few.append(digests[row])
                for vote in found:
                    if vote.row in digests and vote.row != row:
                        yield digests[row], digests[vote.row], vote
            bar.update(len(block))
    if few:
        _, names, vectors = store.features_of(store.rows_of(few))
        D, I = nearest(to_float32(vectors), CANDIDATES, store.blocks())
        by_row = dict(store.db.execute("SELECT row, digest FROM features"))
        for name, scores, near in zip(names, D.tolist(), I.tolist()):
            for score, row in zip(scores, near):
                if score >= NEAREST_SCORE and by_row.get(row, name) != name:
                    yield name, by_row[row], None


def in_both_directions(key: Key, pair: Pair) -> Pairs:
    """A pair of contents, with the second as the one to keep, then with the first."""
    for n, (keep, gone) in enumerate((key[::-1], key)):
        region = Region(*pair.regions[1 - n])  # it leads from the file to keep to the other
        words = ", ".join(pair.lost[n]) or None
        yield keep, gone, Match(0, "", 0.0, False, pair.label, pair.relations[n], region, words)


def known_and_found(engine: Engine) -> tuple[dict[Key, Any], dict[Key, tuple[bytes, bytes, Vote | None]]]:
    """Each two contents that were compared, with what is stored of them; and each two that are to be compared."""
    store = engine.store
    known, last = store.verdicts(JUDGEMENT), min(engine.copies.last, store.last_row("points"))
    found: dict[Key, tuple[bytes, bytes, Vote | None]] = {
        key: (*key, None) for key, pair in known.items() if pair == WAITS
    }
    known = {key: pair for key, pair in known.items() if pair != WAITS}
    for one, other, vote in candidate_pairs(engine, int(store.get_meta("paired") or 0)):
        key = min(one, other), max(one, other)
        if key not in known and (key not in found or (vote and vote.points > getattr(found[key][2], "points", 0))):
            found[key] = one, other, vote
    # Noted at once: if comparing is stopped, nothing is looked up again
    store.save_verdicts(((*key, WAITS) for key in found), last)
    return known, found


def pairs_by_comparison(engine: Engine, labels: Sequence[str], tell: Tell | None = None) -> Pairs:
    """Each two contents of the collection with one of these labels, twice: either one may be the one to keep.

    What was found of two contents is stored, so that a second run compares only what is new, and what still waits.
    """
    store, (known, found) = engine.store, known_and_found(engine)
    contents = {it for key in (*found, *(key for key, pair in known.items() if pair)) for it in key}
    files = {digest: paths[0] for digest in contents if (paths := different_files(engine, digest))}
    size = {digest: (-os.path.getsize(path), path) for digest, path in files.items() if os.path.exists(path)}
    # Which contents can go if another one stays. Two that can go with the same one need not be compared
    goes_with: dict[bytes, set[bytes]] = {digest: set() for digest in contents}

    def look(key: Key) -> tuple[Key, Pair | str | None]:
        one, other, vote = found[key]
        try:
            pair = examined(files[one], files[other], (one, other), vote)
        except OSError:
            return key, WAITS
        if pair and key != (one, other):
            pair = Pair(pair.label, pair.relations[::-1], pair.regions[::-1], pair.lost[::-1])
        return key, pair

    def note(key: Key, pair: Any) -> None:
        known[key] = pair
        for gone, keep, lost in zip(key, key[::-1], pair[3] if pair else ()):
            if not lost and keep in size:
                goes_with[gone].add(keep)

    for key, pair in list(known.items()):
        if pair:
            note(key, pair)
    waiting = [key for key in found if all(digest in size for digest in key)]
    waiting.sort(key=lambda key: sorted(size[digest] for digest in key))  # the largest files first
    needed = (key for key in waiting if not goes_with[key[0]] & goes_with[key[1]])
    results, unsaved, saved = read_ahead(look, needed, usable_cores(), usable_cores()), list[Any](), time.perf_counter()
    try:
        for key, found_pair in progress_bar(results, total=len(waiting), desc="comparing", unit="pair"):
            if found_pair == WAITS:
                continue
            note(key, found_pair and list(found_pair))
            if found_pair and tell and found_pair.label in labels:
                tell(files[key[0]], files[key[1]], found_pair.label)
            unsaved.append((*key, known[key]))
            if time.perf_counter() - saved > SAVE_SECONDS:
                whole, unsaved = unsaved, []  # if saving fails, it is not tried again below
                store.save_verdicts(whole)
                saved = time.perf_counter()
    finally:  # also if a person has stopped it
        store.save_verdicts(unsaved)
    for key, stored in known.items():
        if stored and stored[0] in labels and all(digest in size for digest in key):
            yield from in_both_directions(key, Pair(*stored))


def keeping_order(path: str, lets_go: int) -> tuple[Any, ...]:
    """A key that sorts contents: first what is best to keep. lets_go: how many files may go if it stays."""
    with suppress(OSError):  # it is gone
        if held := holdings(path):
            info, camera = os.stat(path), "camera metadata" in held.more
            return held.truncated, -lets_go, not camera, -math.prod(held.size), -info.st_size, info.st_mtime_ns, path
    return True, -lets_go, False, 0, 0, 0, path


def scored(engine: Engine, keep: bytes, others: Iterable[bytes]) -> dict[bytes, float]:
    """The cosine similarity of the features of a content to those of others."""
    _, digests, vectors = engine.store.features_of(engine.store.rows_of((keep, *others)))
    xb = to_float32(vectors)
    return dict(zip(digests, (xb @ xb[digests.index(keep)]).clip(-1, 1).tolist())) if keep in digests else {}


def grouped(engine: Engine, pairs: dict[bytes, dict[bytes, Match]]) -> Iterator[Group]:
    """Groups of files that hold the same picture. `pairs`: by keeper, then by other.

    The file to keep is the one that lets most others go. Every file of a group was compared with it: a copy of a copy
    need not be a copy of that one.
    """
    query = f"SELECT digest FROM {USABLE} GROUP BY digest HAVING count(*) > 1"
    listed = {digest for (digest,) in engine.store.db.execute(query)}  # contents of which a file may be deleted
    for keep, others_of in pairs.items():
        listed |= {it for other, match in others_of.items() if match.lost is None for it in (keep, other)}
    left = dict[bytes, list[str]]()
    for it in {*pairs, *listed}:
        # Hashed again: a file may have changed and kept its size and time
        paths = different_files(engine, it)
        paths = [path for path in paths if it not in listed or read_path(path, lambda _: True).digest == it]
        left |= {it: paths} if paths else {}
    order = dict[bytes, tuple[Any, ...]]()
    for digest, files in left.items():
        lets_go = sum(match.lost is None and other in left for other, match in pairs.get(digest, {}).items())
        order[digest] = keeping_order(files[0], lets_go)
    damaged = engine.store.damaged_contents(left)
    for keep in sorted(left, key=order.__getitem__):
        if keep not in left:
            continue
        others = [other for other in pairs.get(keep, {}) if other in left]
        if not others and len(left[keep]) < 2:
            continue
        first, *same = left.pop(keep)
        scores = scored(engine, keep, others)
        found = [Match(0, path, 1.0, True, "identical", truncated=keep in damaged) for path in same]
        matches = [(pairs[keep][other], other) for other in others]
        for match, other in sorted(
            matches, key=lambda it: (-LABELS.index(it[0].label or "copy"), -scores.get(it[1], 0), left[it[1]])
        ):
            score = match.score if not match.label else scores.get(other, 0.0)
            found += [match._replace(path=path, score=score, truncated=other in damaged) for path in left.pop(other)]
        if found:
            yield Group(first, [match._replace(rank=rank) for rank, match in enumerate(found, start=1)])


def find_duplicates(engine: Engine, threshold: float | str = "copy", found: Tell | None = None) -> Iterator[Group]:
    """Groups of files in the collection that hold the same picture. No file is touched.

    threshold  copy: pictures of which no part differs, also mirrored, turned or cropped; variant: also those of which
               parts differ; identical: the same bytes; or a cosine similarity, -1 to 1, whatever they show
    found      is told at once of two files that were found to show the same, and of their label

    Raises DeepVisionError if features turn out to be damaged.
    """
    pairs: dict[bytes, dict[bytes, Match]] = {}
    with engine.store.errors():
        if threshold != "identical":
            is_label = isinstance(threshold, str)
            labels = LABELS[LABELS.index(threshold) :] if is_label else ()
            by_label = pairs_by_comparison(engine, labels, found)
            ordered = by_label if is_label else pairs_by_score(engine, float(threshold))
            # Where a pair comes twice, its higher score stays
            for keep, other, match in sorted(ordered, key=lambda pair: pair[2].score):
                pairs.setdefault(keep, {})[other] = match
        yield from grouped(engine, pairs)


# ---- Assembly --------------------------------------------------------------------------------------------------------

POINT_SIDE = 128  # a JPEG is decoded at no less than 3 times this side for its points
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
    if not store.report.exists() or CRASH not in store.report.read_bytes():
        return
    log.warning("the last run crashed: looking for the file that did it, which takes as long as to read them all")
    at_risk = unread[: None if work.rebuild else 2 * BLOCK * work.ranks]  # a run saves before it has read so many
    paths = b"\0".join(os.path.join(os.path.abspath(os.fsencode(images)), file.path) for file in at_risk)
    here = os.path.dirname(os.path.abspath(__file__))  # `main` is imported from there
    command = [sys.executable, "-X", "faulthandler", "-c", READ_EACH]
    done = subprocess.run(command, cwd=here, input=paths, capture_output=True)
    if done.stdout and CRASH in done.stderr:  # it was not killed, or out of memory
        store.save([Picture(unread.pop(len(done.stdout) - 1), reason=CRASHES)])
    store.report.unlink(missing_ok=True)


def look_at_new(image: Image.Image, model: Model, known: tuple[bool, bool]) -> Made:
    """What is computed from the pixels of a new picture. known: whether there are its features, and its points."""
    picture = to_rgb(image, max(model.side, POINT_SIDE))
    pixels = None if known[0] else squeeze(picture, model.side, model.side, model.resample)
    return Made(pixels, None if known[1] else pack_points(find_points(picture)))


def read_new(store: Store, unread: Sequence[File], images: Path, model: Model, work: Work) -> Summary:
    """A Summary of the files that were read and saved: in `store`, or a rank's share of them in a store of its own.

    Saves come every few seconds, and also when an error or an interrupt ends the run. If a decoder crashes the process,
    faulthandler writes that into `store.report`, for `skip_crashing_file`.
    """

    def wanted(digest: bytes) -> Callable[[Image.Image], Made] | None:
        known = (False, False) if work.rebuild else store.is_known(digest)
        return None if all(known) else partial(look_at_new, model=model, known=known)

    read = partial(read_picture, root=os.fsencode(images), wanted=wanted)
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
    with open(store.report, "ab") as report, bar:  # all ranks write to its end
        faulthandler.enable(report)
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
    return replace(summary, seconds=time.perf_counter() - start)


def merge_ranks(store: Store) -> Summary:
    """A Summary of what the ranks of torchrun, also stopped ones, have read. It is stored; their files are deleted."""
    summary = Summary()
    for path in sorted(store.folder.glob("rank-*.sqlite")):
        share = Store(store.folder, store.identity, store.dim, path.name)
        with suppress(DamageError), share.errors():  # what is damaged is read again
            share.check(whole=False)
            with store.attached(path):
                for table in ("features", "points"):
                    columns = COLUMNS[table].removeprefix("row, ")  # the rows get new numbers
                    new = f"SELECT {columns} FROM other.{table} ORDER BY row"
                    store.db.execute(f"INSERT OR REPLACE INTO main.{table} ({columns}) {new}")
                store.db.execute("INSERT OR REPLACE INTO main.files SELECT * FROM other.files")
                store.db.execute("DELETE FROM main.meta WHERE key = 'images'")
            summary.opened += share.count("files")
            summary.new += share.count(USABLE)
            summary.recognised += share.count(f"{USABLE} AND digest NOT IN (SELECT digest FROM features)")
        share.db.close()
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
        merged, version = merge_ranks(store), store.value("PRAGMA data_version")
        if merged.opened or store.db.scanned != version:  # a stopped or another run has added files
            changes = store.scan(images, work)
        skip_crashing_file(store, changes.unread, images, work)
        if changes.unread and not work.rebuild:
            store.adopt_points()
        wait_for_ranks(work)  # from here on, they read
        summary = read_new(store, changes.unread, images, model, work)
        wait_for_ranks(work)
        store.report.unlink(missing_ok=True)
        if work.ranks > 1:
            summary = merge_ranks(store)
        if summary.opened and not any(find_images(images, lambda _: None, [store.folder.parent], work.exclude)):
            raise DeepVisionError(f"{images} went away while it was read: what was read is saved, run it again")
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
        summary.skipped, summary.truncated = store.count(SKIPPED), store.count(DAMAGED_FILES)
    return summary


def update(store: Store, images: Path, model: Model, work: Work) -> Summary:
    """Bring the store up to date with the folder `images`. Returns a Summary of what was found and done.

    Raises DeepVisionError if no usable image is there. The store keeps what it has: the drive may only be unplugged.
    """
    changes = store.scan(images, work)
    if any(changes) or work.prune or work.ranks > 1:
        summary = store_changes(store, changes, images, model, work)
    else:
        summary = Summary(*map(store.count, (USABLE, SKIPPED, DAMAGED_FILES, GONE)))
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
        index = open_index(store, work)
        copies = open_copy_index(store, work)
        return Engine(images, model, store, index, copies, work.exact or not index.faiss.ntotal, summary)


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
    if found.matches[0].label in LABELS[1:]:
        return ""
    variants = sum(match.label == LABELS[0] for match in found.matches)
    return "no copy found" + (f", {counted(variants, 'variant')}" if variants else "")


def remark_on(match: Match) -> str:
    """What is said of a match: its label, how much of it the query shows, and the edit that was undone."""
    covers = f"covers {100 * match.region.covers:.0f} %" if match.region else ""
    is_variant = match.region and match.label == LABELS[0]
    differs = f"differs {max(1, round(100 * match.region.differing))} %" if match.region and is_variant else ""
    lost = f"lost with it: {match.lost}" if match.lost else ""
    damaged = "truncated" if match.truncated else ""
    return ", ".join(filter(None, (match.label, differs, covers, match.view, damaged, lost)))


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
    line = json.dumps({**subject, "model": engine.model.name, "matches": matches})
    return json.dumps(json.loads(line, parse_float=lambda number: float(number) + 0.0))  # -0.0 becomes 0.0


def print_found(found: Answer | Group, engine: Engine, form: str) -> None:
    """Print on stdout, at once. `form`: text, json, or null: the paths byte for byte, each with a NUL at its end."""
    try:
        if form == "json":
            print(as_json(found, engine), flush=True)
        elif form == "null":
            listed = [match for match in found.matches if not match.lost]  # of duplicates: nothing is lost with them
            sys.stdout.buffer.write(b"".join(os.fsencode(match.path) + b"\0" for match in listed))
            sys.stdout.buffer.flush()
        elif not found.error:
            terminal = sys.stdout.isatty() and os.name == "posix" and os.environ.get("TERM") != "dumb"
            print(as_text(found, engine, colour=terminal and not os.environ.get("NO_COLOR")), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries again at its end, and would fail
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            raise
        raise DeepVisionError(f"the results cannot be written to stdout: {error.strerror}") from error


# ---- Page ------------------------------------------------------------------------------------------------------------

THUMBNAIL, QUALITY = 256, 60  # pixels of the longer side, and of WebP: 5 KB a photograph
ADDRESS = re.compile("https?://", re.IGNORECASE)  # the only queries, and redirects, that are fetched
PAGE_PICTURES = 5000  # on a page, 34 MB; the rest is left to the other outputs
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # Content-Security-Policy: nothing is loaded
TAIL = 10  # characters at the end of a name that always show
UNIT = 1000  # length of a picture's longer side where two are laid over one another
STOPS = 11  # places of the slider where there is no script
KINDS = {  # a heading for the matches of each label
    "identical": ("identical file", ""), "copy": ("copy", "copies"), "variant": ("variant", ""), "": ("look-alike", ""),
}  # fmt: skip
STYLE = """
:root {
  color-scheme: light dark;
  --ink: light-dark(#1a1a1f, #e8e8ee);
  --soft: light-dark(#565662, #a9a9b6);
  --line: light-dark(#d9d9e0, #34343c);
  --back: light-dark(#fff, #121215);
  --card: light-dark(#f5f5f8, #1d1d22);
  --well: light-dark(#e9e9ef, #26262d);
  --good: light-dark(#0f6a2b, #7fdc98);
  --bad: light-dark(#8a4b00, #f2bd70);
  --accent: light-dark(#1d4fbf, #9dbcff);
  --gone: light-dark(#a8201a, #ff9d94);
  accent-color: var(--accent);
  --side: 12rem;
  --least: 46%;
  scroll-padding: 7rem 0 8rem;
}
:root:has(#larger:checked) { --side: 22rem; --least: 100% }
* { box-sizing: border-box }
body {
  margin: 0; font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
  background: var(--back); color: var(--ink);
}
a { color: var(--accent) }
h1, h2, h3, p, figure, ol { margin: 0; padding: 0 }
h1 { font-size: 1.15rem; min-width: 0 }
h2 { font-size: 1.1rem; display: flex; flex-wrap: wrap; gap: .3rem .7rem; align-items: center; min-width: 0 }
h3 { font-size: 1rem; font-weight: 600; color: var(--soft) }
small { font-size: .85em; color: var(--soft) }
ol { list-style: none }
button, input, select, .button {
  font: inherit; color: var(--ink); background: var(--back); border: 1px solid var(--soft); border-radius: .45rem;
  padding: .25rem .7rem; max-width: 100%;
}
button, .button, summary { cursor: pointer }
.button { text-decoration: none }
button:hover, .button:hover { border-color: var(--accent); color: var(--accent) }
.main, .main:hover { background: var(--accent); border-color: var(--accent); color: var(--back) }
[formaction=trash], [formaction=trash]:hover { background: var(--gone); border-color: var(--gone); color: var(--back) }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
.good { color: var(--good) }
.bad { color: var(--bad) }
.verdict { padding: .05em .6em; border: 2px solid; border-radius: 1em; font-size: .95rem; white-space: nowrap }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
.skip { position: absolute; left: -99rem }
.skip:focus { left: 1rem; top: .5rem; z-index: 30; background: var(--back); padding: .3rem .6rem }

/* The header stays. */
header {
  position: sticky; top: 0; z-index: 5; display: flex; flex-wrap: wrap; gap: .3rem .9rem; align-items: center;
  padding: .5rem 1rem; background: var(--back); border-bottom: 1px solid var(--line);
}
header .icon { width: 2.6rem; height: 2.6rem; object-fit: cover; border-radius: .4rem; flex: none }
header h1 { flex: 0 1 auto; max-width: 100% }
nav { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center }
header nav { margin-left: auto }
nav a:not(.button) { padding: .25rem .6rem; border-radius: .45rem; text-decoration: none }
nav a:hover { background: var(--card) }
nav a[aria-current] { background: var(--well); color: var(--ink) }
.settings summary { width: max-content; color: var(--soft) }
.settings[open] { flex-basis: 100% }
.settings[open]::details-content { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: center }
header > :not(nav) + .settings { margin-left: auto }
.settings form { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; padding: .5rem 0 }
input[type=number] { width: 6rem }
main { padding: 1rem; min-height: 60vh }
.about { color: var(--soft); font-size: .9em; margin-bottom: .8rem }
#said:not(:empty), .news {
  margin: 0 0 1rem; padding: .6rem .9rem; border-left: 4px solid var(--bad); background: var(--card);
  white-space: pre-line;
}

/* Where a picture is dropped. */
.drop {
  display: grid; grid-template-columns: minmax(0, 1fr); place-items: center; gap: .6rem; text-align: center;
  position: relative; padding: 1.8rem 1rem; margin-bottom: 1.2rem;
  border: 2px dashed var(--soft); border-radius: 1rem; background: var(--card); cursor: pointer;
}
.drop b { font-size: 1.35rem }
.drop:hover, .drop:focus-within { border-color: var(--accent) }
.button:focus-within, .drop:focus-within .button { outline: 3px solid var(--accent); outline-offset: 2px }
body.dragging::after {
  content: "Drop it: which pictures look like this?"; position: fixed; inset: .6rem; z-index: 40; display: grid;
  place-items: center; font-size: 1.6rem; border: 4px dashed var(--accent); border-radius: 1rem;
  background: color-mix(in srgb, var(--back) 85%, var(--accent)); color: var(--ink); pointer-events: none;
}

/* A query stands beside its matches, a file to keep beside the others. */
section { padding: 1rem 0; border-top: 1px solid var(--line); display: grid; gap: .8rem; break-inside: avoid-page }
section:first-of-type:not(.group) { border-top: 0; padding-top: 0 }
.answer, .group { break-inside: auto }
.both { display: grid; gap: 1.2rem }
.found { display: grid; gap: .7rem; align-content: start; min-width: 0 }
@media (min-width: 52rem) {
  .both { grid-template-columns: minmax(15rem, 24rem) minmax(0, 1fr); align-items: start }
  .both > .large { position: sticky; top: 5rem }
}
.groups { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)) }
.group { border: 1px solid var(--line); border-radius: .8rem; padding: .8rem !important; align-content: start }
.group .cards { --side: 9.5rem; --fill: auto-fit }
.group.wide { grid-column: 1 / -1 }
.group.wide .cards { --side: 12rem; --fill: auto-fill }
:root:has(#larger:checked) .groups { grid-template-columns: 1fr }
.group h2 { font-size: 1rem }
.group h2 .name { flex: 1 1 8rem }
.group h2 button { font-size: .9rem; font-weight: 400; margin-left: auto }
.cards {
  display: grid; gap: .8rem;
  grid-template-columns: repeat(var(--fill, auto-fill), minmax(min(var(--side), var(--least)), 1fr));
}
.large { --side: 15rem }
:root:has(#larger:checked) .large { --side: 30rem }
.large.one { grid-template-columns: 1fr }
.cards li { break-inside: avoid; min-width: 0 }
figure {
  position: relative; height: 100%; display: flex; flex-direction: column; border-radius: .6rem; overflow: hidden;
  background: var(--card); border: 1px solid var(--line);
}
.identical figure, .copy figure { border: 2px solid var(--good) }
.variant figure { border: 2px solid var(--bad) }
.group figure { border: 1px solid var(--line) }
.keep figure, .query figure { border: 2px solid var(--accent) }
figure:has([name=file]:checked) { border: 2px solid var(--gone) }
figure:has([name=file]:checked) .picture img { opacity: .5 }
.picture { display: block; position: relative; aspect-ratio: 1; background: var(--well); color: var(--ink) }
.picture img, .picture svg { position: absolute; width: 100%; height: 100% }
.picture img { object-fit: contain }
.picture span { position: absolute; inset: 0; display: grid; place-items: center; padding: .5rem; text-align: center }
polygon { fill: none; stroke: #19b35a; stroke-width: 2; vector-effect: non-scaling-stroke }
polygon.differs { stroke: #f0531c; stroke-width: 3 }
polygon.part { stroke: #2f6bff; stroke-dasharray: 6 4 }
.query .picture { touch-action: pan-y; cursor: crosshair }
figcaption { padding: .5rem .6rem .6rem; font-size: .9em; display: flex; flex-direction: column; gap: .15rem; flex: 1 }
.name { display: flex; min-width: 0; white-space: pre; font-weight: 500 }
.name span:first-child { overflow: hidden; text-overflow: ellipsis }
.name span:last-child { flex: none }
h1.name, h2 .name { font-weight: 600; max-width: min(100%, 36rem) }
.folder { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; display: block }
.acts { display: flex; flex-wrap: wrap; gap: .3rem .7rem; align-items: center; margin-top: auto; padding-top: .3rem }
.acts button { padding: 0 .5rem }
.acts small { flex-basis: 100% }
.acts [name=part] { flex: 1; min-width: 0 }
.acts a, .acts summary { color: var(--accent); list-style: none; text-decoration: none }
.acts :is(a, summary):hover { text-decoration: underline }
.acts > label:has([name=file]) {
  position: absolute; top: .4rem; left: .4rem; padding: .1rem .5rem; border-radius: .4rem; background: var(--back);
}

/* Two pictures over one another. Without script: radio buttons are the slider, a check box blinks. */
body:has(.compare[open], dialog[open]) { overflow: hidden }
.compare[open] > summary, #close {
  position: fixed; z-index: 21; top: .6rem; right: .8rem; padding: .25rem .7rem; border-radius: .45rem;
  background: var(--card); border: 1px solid var(--soft); color: var(--ink); font-size: 0;
}
.compare[open] > summary::before, #close::before { content: "✕ close"; font-size: 1rem }
.stage {
  position: fixed; inset: 0; z-index: 20; padding: .6rem .8rem; overflow: hidden; font-size: 1rem;
  background: var(--back);
  --top: 5.5rem;
  --fit: min(tan(atan2(96vw, var(--w) * 1px)), tan(atan2(100vh - 1.2rem - var(--top), var(--h) * 1px)));
}
.slide {
  display: grid; gap: .2rem 1rem; grid-template-columns: minmax(0, 1fr) minmax(12rem, 36rem) minmax(0, 1fr);
  min-height: var(--top); padding: 0 7rem; align-content: start; justify-items: center;
}
.slide p { max-width: 100%; text-align: center }
.slide > label { grid-column: 1 / -1 }
.track { display: flex; width: 100%; gap: .2rem }
.track input { flex: 1; height: 1.3rem; margin: 0; padding: 0 }
.frame {
  position: relative; overflow: hidden; width: calc(var(--w) * 1px); height: calc(var(--h) * 1px);
  transform-origin: 0 0; transform: scale(var(--fit)); left: max(0px, 48vw - var(--w) * .5px * var(--fit)); margin: 0;
  background: var(--well);
}
.stage:has([type=range]) .frame { cursor: ew-resize; touch-action: none; user-select: none }
.frame * { pointer-events: none }
.frame > img, .frame svg, .cut { position: absolute; inset: 0; width: 100%; height: 100% }
.cut { clip-path: inset(0 0 0 var(--cut, 50%)); overflow: hidden }
.cut img { position: absolute; left: 0; top: 0; transform-origin: 0 0; max-width: none }
.cut img.inverted { filter: invert(1) }
.edge { position: absolute; inset: 0 auto 0 var(--cut, 50%); border-left: calc(2px / var(--fit)) solid #2f6bff }
.stage:has([type=range]) .edge::after {
  content: "⇔"; position: absolute; top: 50%; left: calc(-1px / var(--fit)); width: 2.2rem; border-radius: 50%;
  background: #2f6bff; color: #fff; font-size: 1.3rem; line-height: 2.2rem; text-align: center;
  transform: translate(-50%, -50%) scale(calc(1 / var(--fit)));
}
.stage:has(.track :nth-child(1):checked) { --cut: 0% } .stage:has(.track :nth-child(2):checked) { --cut: 10% }
.stage:has(.track :nth-child(3):checked) { --cut: 20% } .stage:has(.track :nth-child(4):checked) { --cut: 30% }
.stage:has(.track :nth-child(5):checked) { --cut: 40% } .stage:has(.track :nth-child(6):checked) { --cut: 50% }
.stage:has(.track :nth-child(7):checked) { --cut: 60% } .stage:has(.track :nth-child(8):checked) { --cut: 70% }
.stage:has(.track :nth-child(9):checked) { --cut: 80% } .stage:has(.track :nth-child(10):checked) { --cut: 90% }
.stage:has(.track :nth-child(11):checked) { --cut: 100% }
.stage:has(.blink:checked) .cut { clip-path: none }
.stage:has(.blink:checked) .edge { display: none }
dialog {
  width: 100vw; height: 100vh; height: 100dvh; max-width: none; max-height: none; border: 0; padding: .6rem .8rem;
  background: var(--back); color: var(--ink);
}
dialog[open] { display: grid; grid-template-rows: minmax(0, 1fr) auto; gap: .5rem }
dialog img { width: 100%; height: 100%; object-fit: contain; min-height: 0 }
dialog nav { justify-content: center; gap: .4rem .6rem }
dialog :is(p, small) { flex-basis: 100%; text-align: center }
dialog p { font-family: ui-monospace, monospace; font-size: .9em; user-select: all }
[data-step] { position: fixed; left: .8rem; top: calc(50% - 4rem); font-size: 0 }
[data-step]::before { content: "‹"; font-size: 2rem; line-height: 1.5 }
[data-step="1"] { left: auto; right: .8rem }
[data-step="1"]::before { content: "›" }

/* What is done with the chosen files, and how far the work is. */
.chosen, #job {
  position: sticky; bottom: 0; z-index: 4; display: flex; flex-wrap: wrap; gap: .4rem .9rem; align-items: center;
  margin: 1rem -1rem 0; padding: .6rem 1rem; background: var(--card); border-top: 1px solid var(--line);
}
[formaction=trash] { margin-left: auto }
#job { position: static; margin: 0 0 1rem; border-radius: .6rem }
progress { flex: 1 1 10rem; max-width: 30rem }
.pages { justify-content: center; padding: 1rem }
@media (max-width: 40rem) {
  header { gap: .3rem .6rem; padding: .4rem .8rem }
  header h1 { flex: 1 1 0; font-size: 1rem }
  header nav, .settings, header .verdict { font-size: .85rem }
  header nav { order: 1; flex-basis: 100%; margin: 0 -.5rem }
  header label { margin-left: auto }
  header label span, .settings summary span, .slide small span, .about span { display: none }
  .settings summary { list-style: none }
  .settings summary::before { content: "⚙"; font-size: 1.3rem }
  .stage { --top: 8.5rem }
  .slide { grid-template-columns: 1fr 1fr; padding: 0 }
  .slide > label { order: -1; justify-self: start; padding: .2rem 6rem .4rem 0 }
  .track { order: 1; grid-column: 1 / -1 }
  .chosen b { flex-basis: 100% }
  .chosen { font-size: .9rem; gap: .3rem .4rem }
}
@media print { header, .chosen, .drop { position: static } .acts, .drop, .chosen, nav { display: none } }
"""
PAGE = """<!doctype html>
{% macro named(path) %}
{% set last = (path|name).rpartition("/")[2] -%}
<span class="name" title="{{ path|whole }}"><span>{{ last[:-tail] }}</span><span>{{ last[-tail:] }}</span></span>
{%- endmacro %}
{% macro polygon(corners, kind="") %}
<polygon{% if kind %} class="{{ kind }}"{% endif %} points="
{%- for x, y in corners %}{{ x }},{{ y }} {% endfor %}"/>
{%- endmacro %}
{% macro compare(item, match) %}
{% set one, other = pictures[item|of], pictures[match.path] %}
{% set over = overlaid(match, one, other) %}{% if over %}
<details class="compare"><summary>compare</summary>
<div class="stage" style="--w:{{ over.width }};--h:{{ over.height }}"><div class="slide">
<p>{{ named(item[0]) }}<small>left of the line</small></p>
<div class="track">{% if ui %}
<input type="range" min="0" max="100" value="50" aria-label="where the line is">
{% else %}{% for n in range(stops) %}<input type="radio" name="{{ item[0]|text }} {{ match.path|text }}"
aria-label="line at {{ n * 10 }} %"{% if n == 5 %} checked{% endif %}>{% endfor %}{% endif %}</div>
<p>{{ named(match.path) }}<small>right of the line<span>, laid over the other</span></small></p>
<label><input type="checkbox" class="blink"> the right one alone{% if ui %} <small><span>(space bar)</span></small>
{% endif %}</label></div>
<div class="frame"><img src="{{ one|full(item|of) }}" alt="" loading="lazy"><div class="cut">
<img{% if match.region.inverted %} class="inverted"{% endif %} style="{{ over.style }}"
src="{{ other|full(match.path) }}" alt="" loading="lazy"></div>
<div class="edge"></div><svg viewBox="0 0 {{ over.width }} {{ over.height }}">
{% for box in over.boxes %}{{ polygon(box, "differs") }}{% endfor %}</svg></div></div></details>
{% endif %}{% endmacro %}
{% macro card(item, match) %}
{% set path, picture = match.path if match.rank else item[0], pictures[match.path] %}
{% set role = ("query" if item.query else "keep") if not match.rank else match.label %}
<li class="{{ role }}"><figure{% if ui %} data-key="{{ path|key }}" data-path="{{ path|whole }}"{% endif %}>
<a class="picture" href="{{ path|link }}" draggable="false">{% if picture.made %}
<img src="{{ picture|source(path) }}" alt="{{ path|name }}" loading="lazy">
{% set _, width, height = picture.made %}<svg viewBox="0 0 {{ width }} {{ height }}">
{% for corners in outlines(item, match, width, height) %}{{ polygon(corners) }}{% endfor %}
{% if match.region and match.rank %}{% for l, t, r, b in match.region.differs -%}
{{ polygon([(l, t), (r, t), (r, b), (l, b)], "differs") }}{% endfor %}{% endif %}
{% if not match.rank and parts[path] %}{% set l, t, r, b = parts[path] %}
{% set w, h = (width, height) if parts[path]|max <= 1 else (1, 1) -%}
{{ polygon([(l * w, t * h), (r * w, t * h), (r * w, b * h), (l * w, b * h)], "part") }}{% endif %}</svg>
{% else %}<span>{{ (picture.reason or "not there any more")|text }}</span>{% endif %}</a>
<figcaption>{% if not match.rank %}<b>{{ role }}</b>
{% elif match.view and item.keep == "" %}<a href="?group={{ match.rank }}&{{ kept }}">{{ match.view }}</a>
{% elif item.keep != "" %}{% set said, comma, more = remark_on(match).replace(" %", "\u00a0%").partition(",") %}
<span><small>{{ match.rank }} · {{ "%.3f" % match.score }}</small>
<span class="{{ "bad" if match.label == "variant" or match.lost else
"good" if match.label }}"><b>{{ said }}</b>{{ comma ~ more }}</span></span>{% endif %}
{{ named(path) }}{% set folder = (path|name).rpartition("/")[0] %}
{% if folder %}<small class="folder" title="{{ path|whole }}">{{ folder }}/</small>{% endif %}
{% if picture.made %}
<small>{{ "{:,} × {:,} px".format(*picture.made[1:]) }}, {{ picture.file.size|bytes }}</small>{% endif %}
<div class="acts">{% if ui %}{% if match.rank and item.keep and not live %}
<label><input type="checkbox" name="file" value="{{ path|key }}" data-size="{{ picture.file.size }}"
{%- if match.lost is none and not match.truncated %} checked{% endif %}> choose</label>
<button name="keep" value="{{ path|key }}" formaction="keep" title="keep this one instead">keep</button>{% endif %}
{% if match.rank or item.keep %}<a href="?q={{ path|key }}&{{ kept }}">search</a>{% endif %}{% endif %}
{% if match.rank and item[0] %}{{ compare(item, match) }}{% endif %}</div>
{% if ui and not match.rank and item.query %}
<form class="acts"><input type="hidden" name="of" value="{{ path|key }}">
{% for value in queries %}<input type="hidden" name="q" value="{{ value }}">{% endfor %}
<input type="hidden" name="k" value="{{ k }}"><input type="hidden" name="least" value="{{ least }}">
<small>Draw on the picture to search with a part, or type it:</small>
<input name="part" size="16" aria-label="A part" placeholder="left, top, right, bottom" value="
{{- "%g,%g,%g,%g"|format(*parts[path]) if parts[path] }}"><button>Search</button>
{% if parts[path] %}<button name="whole" value="1">whole picture</button>{% endif %}</form>{% endif %}
</figcaption></figure></li>
{% endmacro %}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">{% if ui %}<link rel="icon" href="data:,">{% endif %}
<title>{{ title }} – DeepVision</title><style>{{ style|safe }}</style></head>
<body{% if live %} data-live="1"{% endif %}><a class="skip" href="#main">Skip to the pictures</a>
<header>{% set one = found|length == 1 and found[0].query is defined and not found[0].error and found[0] %}
{% if one and pictures[one|of].made %}<img class="icon" src="{{ pictures[one|of]|source(one|of) }}" alt="">{% endif %}
<h1{% if one %} class="name" title="{{ one[0]|whole }}"{% endif %}>
{%- if one %}<span>{{ title[:-tail] }}</span><span>{{ title[-tail:] }}</span>{% else %}{{ title }}{% endif %}</h1>
{% if one %}<b class="verdict {{ "bad" if verdict(one) else "good" }}">
{{- "✗" if verdict(one) else "✓" }} {{ verdict(one) or "found" }}</b>{% endif %}
{% if ui %}{% set home, here = found and found[0].keep == "", ' aria-current="page"'|safe -%}
<nav><a href="?{{ kept }}"{{ here if home }}>Collection</a>
<a href="?twice=1&{{ kept }}"{{ here if groups }}>The same picture twice</a>
{% if not home %}<label class="button main">Search<span> with a picture</span>
<input type="file" class="sr" id="given" multiple></label>{% endif %}</nav>{% endif %}
<details class="settings"><summary><span>Settings</span></summary>
{% if ui %}<form method="post" action="changes"><button>Look for changes</button>
<small>new, changed and missing files of the collection</small></form>{% endif %}
<label><input type="checkbox" id="larger"> larger pictures</label>{% if queries %}<form>
{% for value in queries %}<input type="hidden" name="q" value="{{ value }}">{% endfor %}
<label>How many <input type="number" name="k" min="1" max="{{ most }}" value="{{ k }}"></label>
<label>Show <select name="least">{% for value, words in scores.items() %}
<option value="{{ value }}"{% if value == least %} selected{% endif %}>{{ words }}</option>{% endfor %}</select></label>
<button>Search</button></form>{% endif %}</details></header>
<main id="main" tabindex="-1">
{% if engine %}<p class="about">{{ "{:,}".format(engine.summary.images) }} images in {{ engine.images|text }} ·
{{ engine.model.name }} on {{ engine.model.device }}
{%- if not ui %} · {{ about }}{% elif not groups %}<span> · {{ about }}</span>{% endif %}</p>{% endif %}
{% if ui %}<p id="said" role="alert"></p>
{% for line in news %}<p class="news" role="status">{{ line }}</p>{% endfor %}
{% if job %}<form id="job" role="status" method="post" action="stop"><b>{{ job.title }}</b>
<progress max="100" value="{{ job.share }}"></progress><span>{{ job.said }}</span>
<button>Stop</button></form>{% endif %}
{% if halted %}<form method="post" action="compare"><button>Go on comparing</button></form>{% endif %}
{% if hidden %}<form method="post" action="restore" class="about">{{ counted(hidden, "group") }} dismissed
<button>show again</button></form>{% endif %}
{% if home %}<label class="drop"><b>Which of my pictures look like this one?</b>
<span>Drop a picture here, paste it, or choose it</span><span class="button main">Choose pictures</span>
<input type="file" class="sr" id="given" multiple></label>{% endif %}{% endif %}
{% if groups %}<form method="post" id="files"><button disabled hidden></button>
<input type="hidden" name="page" value="{{ page }}">{% endif %}
<div{% if groups %} class="groups"{% endif %}>
{% for item, matches in shown %}
<section class="{{ "answer" if item.query else "group" if item[0] else "tiles" }}
{{- " wide" if matches|length > 3 }}">
{% if item.error or (item[0] and not one) %}{% set bad = item.error or (item.query and verdict(item)) %}
<h2><b class="verdict {{ "bad" if bad else "good" }}">{{ "✗" if bad else "✓" }}
{{ (bad or verdict(item) or "found")|text }}</b> {{ named(item[0]) if item[0] }}
{% if groups and not live %}<button name="dismiss" value="{{ item.keep|key }}" formaction="dismiss">dismiss</button>
{% endif %}</h2>{% endif %}
{% if item.query %}<div class="both">{% if matches and not matches[0].rank %}
<ol class="cards large one">{{ card(item, matches[0]) }}</ol>{% endif %}
<div class="found">{% for label, words in kinds.items() %}
{% set some = matches|selectattr("rank")|selectattr("label", "equalto", label)|list %}
{% if some %}<h3>{{ counted(some|length, *words) }}</h3>
<ol class="cards {{ "large" if label else "small" }}">{% for match in some %}{{ card(item, match) }}{% endfor %}</ol>
{% endif %}{% endfor %}{% if not (item.matches or item.error) %}<p>Nothing to show.
{% if ui %}In the settings you can show more, or look for files that have changed.{% endif %}</p>{% endif %}</div></div>
{% elif matches %}<ol class="cards {{ "large" if item[0] else "small" }}">
{% for match in matches %}{{ card(item, match) }}{% endfor %}</ol>{% endif %}
</section>{% endfor %}</div>
{% if groups %}{% if not live %}<div class="chosen"><b id="sum"></b>
<button type="button" id="copy">copy paths</button><button formaction="list">save list</button>
<button formaction="trash">move to trash</button></div>{% endif %}</form>{% endif %}
{% if left_out %}<footer>{{ counted(left_out, "more picture") }} left out: --json lists all</footer>{% endif %}
{% if pages > 1 %}<nav class="pages" aria-label="pages">
{% if page > 1 %}<a rel="prev" href="{{ turn(page - 1) }}">previous</a>{% endif %}
<span>page {{ page }} of {{ pages }}</span>
{% if page < pages %}<a rel="next" href="{{ turn(page + 1) }}">next</a>{% endif %}</nav>{% endif %}</main>
{% if ui %}<dialog aria-label="the picture, large"><img alt=""><nav><p></p><small></small>
<button data-step="-1">previous</button><button data-step="1">next</button>
<button id="path">copy path</button><button id="folder">show in folder</button>
<a class="button" id="alone" target="_blank">open alone</a><a class="button" id="from">search</a>
<button id="close">close</button></nav></dialog><script>{{ script|safe }}</script>{% endif %}</body></html>
"""


class Small(NamedTuple):
    """A small copy of a picture."""

    webp: bytes
    width: int  # of the whole picture, upright
    height: int


class Overlaid(NamedTuple):
    """How a match is laid over its query. The longer side of each picture is UNIT long."""

    width: float  # of the query
    height: float
    style: str  # CSS that moves the match to its place
    boxes: list[Any]  # corners of what differs, in the query


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> Small:
    """A small upright picture, at most `side` pixels long."""
    width, height = image.size
    picture = to_rgb(image, side)
    if (picture.width - picture.height) * (width - height) < 0:  # turned by EXIF
        width, height = height, width
    picture.thumbnail((side, side))
    picture.save(stream := io.BytesIO(), "WEBP", quality=QUALITY, xmp=b"")
    return Small(stream.getvalue(), width, height)


def decode_path(path: str | Path) -> str:
    """A path as text, whatever it holds."""
    return escape_controls(os.fsencode(path).decode("utf-8", "replace"))


def link_to(path: str) -> str:
    """The address of a file; an address stays as it is; empty for stdin."""
    return path if ADDRESS.match(path) else "" if path == "-" else Path(path).absolute().as_uri()


def data_of(picture: Picture, _: str) -> str:
    """A small picture as a part of the page."""
    return f"data:image/webp;base64,{base64.b64encode(picture.made.webp).decode()}"


def title_of(found: Sequence[Answer | Group]) -> str:
    """The title of a page: the name of the query, or the number of groups, or of queries and of those found."""
    if not found:
        return "No picture is there twice"
    if isinstance(found[0], Group):
        return counted(len(found), "group")
    if len(found) == 1 and not found[0].error:
        return os.path.basename(decode_path(found[0][0]))
    return f"{counted(len(found), 'query', 'queries')}, {sum(not verdict(item) for item in found):,} found"


def file_of(item: Answer | Group) -> str:
    """The path of the query's picture, or of the file to keep."""
    return getattr(item, "file", "") or item[0]


def with_query(item: Answer | Group) -> list[Match]:
    """The matches, and before them, with rank 0, the query or the file to keep."""
    return item.matches if item.error or not item[0] else [Match(0, file_of(item), 1.0, False), *item.matches]


def outlines(item: Answer | Group, match: Match, width: int, height: int) -> list[list[tuple[float, float]]]:
    """What query and match share, drawn on a picture of this size: on the query there is an outline for each match."""
    regions = [it.region for it in (item.matches if match.rank == 0 else [match]) if it.region]
    corners = [region.corners if match.rank else region.outline for region in regions] or [[]]
    return [[(min(max(x, 0), width), min(max(y, 0), height)) for x, y in places] for places in corners]


def overlaid(match: Match, one: Picture, other: Picture) -> Overlaid | None:
    """How the match, a picture, is laid over the query, another one. None: it is not known how."""
    if not (one.made and other.made and (match.region or match.identical)):
        return None
    sizes = [np.array(it.made[1:], float) for it in (one, other)]
    scales = [UNIT / size.max() for size in sizes]
    corners = corners_of(sizes[1].tolist())
    H = homography(corners * scales[1], (np.array(match.region.outline) if match.region else corners) * scales[0])
    if not np.isfinite(H).all():
        return None
    boxes = [(moved(H, np.array([(l, t), (r, t), (r, b), (l, b)]) * scales[1])).round(1).tolist()
             for l, t, r, b in (match.region.differs if match.region else ())]  # fmt: skip
    columns = np.insert(np.insert(H, 2, 0, axis=0), 2, 0, axis=1)  # as CSS has it, with a third dimension
    columns[2, 2] = 1
    matrix = ",".join(f"{value:.6g}" for value in columns.T.ravel())
    (width, height), (w, h) = ((size * scale).round(1).tolist() for size, scale in zip(sizes, scales))
    style = f"width:{w}px;height:{h}px;transform:matrix3d({matrix})"
    return Overlaid(width, height, style, boxes)


def in_bytes(size: int) -> str:
    """The size of a file, for people."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} KB"


def limited(found: Sequence[Answer | Group], room: int) -> tuple[list[tuple[Answer | Group, list[Match]]], int]:
    """What a page with room for so many pictures shows, and how many are left out. A comparison has two pictures."""
    shown = list[tuple[Answer | Group, list[Match]]]()
    left_out = 0
    for item in found:
        kept = list[Match]()
        for match in with_query(item):
            room -= 1 + 2 * bool(match.label)
            kept += [match] if room >= 0 else []
            left_out += room < 0
        shown.append((item, kept))
    return shown, left_out


@cache
def page_template() -> jinja2.Template:
    """PAGE, compiled, which takes 0.1 s. Its filters below are functions that `render` passes as variables."""

    def given(name: str) -> Any:
        return jinja2.pass_context(lambda context, *values: context[name](*values))

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(text=decode_path, of=file_of, bytes=in_bytes)
    environment.filters.update({name: given(name) for name in ("name", "whole", "link", "source", "full", "key")})
    return environment.from_string(PAGE)


def render(
    found: Sequence[Answer | Group], engine: Engine | None, look: Any = None, *,
    shown: Any = None, name: Any = decode_path, whole: Any = decode_path, link: Any = link_to, source: Any = data_of,
    full: Any = data_of, key: Any = None, **values: Any,
) -> str:  # fmt: skip
    """The page, HTML.

    look    gives a Picture with its Small for a path
    shown   what this page shows of `found`: each item with some of its matches
    name    the text for a path; `whole` that for all of it, `link` the address of the file, `key` its key
    source  the address of a Small; `full` that of the picture as it is compared. `values`: other variables of PAGE
    """
    left_out = 0
    if shown is None:
        shown, left_out = limited(found, PAGE_PICTURES)
    paths = dict.fromkeys(file_of(item) for item, matches in shown if item[0] and matches)
    paths |= dict.fromkeys(match.path for _, matches in shown for match in matches)
    look = look or partial(read_path, transform=thumbnail)
    pictures = dict(zip(paths, read_ahead(look, paths, usable_cores(), 4 * usable_cores())))
    helpers = {"verdict": verdict, "remark_on": remark_on, "outlines": outlines, "overlaid": overlaid}
    given = {"name": name, "whole": whole, "link": link, "source": source, "full": full, "key": key}
    usual = {"policy": POLICY, "style": STYLE, "tail": TAIL, "kinds": KINDS, "stops": STOPS, "counted": counted}
    first = {"title": title_of(found), "parts": {}, "pages": 1, "page": 1, "left_out": left_out}
    values = {**usual, **helpers, **given, **first, **values, "found": found, "shown": shown, "pictures": pictures}
    return page_template().render(values, engine=engine)


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
PER_PAGE = 100  # groups or pictures
UI_SIDE = 480  # pixels of a small picture: 12 KB a photograph, which are sent as files of their own
FULL_PICTURE = 4096  # pixels of a picture in a format that browsers do not show: it is sent as WebP
SHOWN_AS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "GIF": "gif", "WEBP": "webp"}  # sent as they are
OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")  # the port may be that of a tunnel
FOREVER = "private, max-age=31536000, immutable"  # of a small picture: its address has the hash of its content
UNKNOWN = "this picture is not known any more: give it again"
FORM_BYTES = 10_000_000  # of what a form sends: the keys of some 50,000 files
SCORES = {
    "": "everything", "variant": "variants and copies", "copy": "copies alone", "identical": "identical files alone",
    "0.3": "copies, and look-alikes from 0.3", "0.6": "copies, and look-alikes from 0.6",
    "0.9": "copies, and look-alikes from 0.9",
}  # fmt: skip
ABOUT = "click a picture to see it large, draw on a query to search with a part of it"
COMPARING = "Comparing all pictures"
JOB_BAR = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left|{percentage:.0f}"  # the share comes last
STOP_SECONDS = 10  # that a job gets to save what it has done
UI_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'sha256-{}'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'"
)
KEPT = """
    CREATE TABLE IF NOT EXISTS small (digest BLOB PRIMARY KEY, webp BLOB, width INTEGER, height INTEGER);
    CREATE TABLE IF NOT EXISTS dismissed (contents BLOB PRIMARY KEY);
    CREATE TABLE IF NOT EXISTS token (token TEXT);
"""
SCRIPT = """
const one = (selector, within = document) => within.querySelector(selector)
const all = selector => [...document.querySelectorAll(selector)]
const say = text => { one("#said").textContent = text; if (text) one("#said").scrollIntoView({block: "center"}) }
const gone = "The server is gone. Start it again: python main.py --ui"
const ask = (address, options) => fetch(address, options).catch(() => ({gone, text: () => gone}))

// Pictures that a person gives are sent one by one. The answers are keys, which the next page asks for.
const send = async files => {
    const asked = new URLSearchParams(location.search), failed = []
    for (const name of ["q", "of", "part", "group", "twice", "page"]) asked.delete(name)
    for (const file of files) {
        const address = "give?" + new URLSearchParams({name: file.name})
        const answer = await ask(address, {method: "POST", body: file})
        if (answer.ok) asked.append("q", await answer.text())
        else failed.push(answer.gone || `${file.name} is not taken: ${await answer.text()}`)
        if (answer.gone) break
    }
    say(failed.join("\\n"))
    if (asked.has("q")) location.search = asked
}
const given = one("#given")
given.onclick = () => { given.value = "" }
given.onchange = () => send(given.files)

// A folder that is dropped gives the files in it, at any depth.
const filesIn = entry => new Promise(done => {
    if (entry.isFile) return entry.file(file => done([file]), () => done([]))
    const reader = entry.createReader(), found = []
    const more = () => reader.readEntries(async entries => {
        for (const it of entries) found.push(...await filesIn(it))
        entries.length ? more() : done(found)
    }, () => done(found))
    more()
})
const take = async data => {
    const entries = [...data.items].map(item => item.webkitGetAsEntry?.()).filter(Boolean)
    const text = data.getData("text/uri-list") || data.getData("text/plain")
    let files = [...data.files]
    if (entries.some(entry => entry.isDirectory)) {
        files = (await Promise.all(entries.map(filesIn))).flat().filter(file => file.type.startsWith("image/"))
        if (!files.length) return say("There is no picture in this folder.")
    }
    if (files.length) return send(files)
    if (text) say(`Only files are taken here. For an address, run: python main.py '${text.trim().split("\\n")[0]}'`)
}
const dragging = on => document.body.classList.toggle("dragging", on)
ondragover = event => { event.preventDefault(); dragging(true) }
ondragleave = event => { if (!event.relatedTarget) dragging(false) }
ondrop = event => { event.preventDefault(); dragging(false); take(event.dataTransfer) }
document.onpaste = event => { if (!event.target.closest("input:not([type=file])")) take(event.clipboardData) }

// A rectangle that a person draws on a query starts a search with that part of it.
let svg, from, part, before
const place = event => {
    const {x, y} = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse())
    const {width, height} = svg.viewBox.baseVal
    return [Math.min(Math.max(x, 0), width), Math.min(Math.max(y, 0), height)].map(Math.round)
}
const rectangle = () => svg.querySelector(".part")
    || svg.appendChild(Object.assign(document.createElementNS(svg.namespaceURI, "polygon"), {classList: "part"}))
const slide = event => {  // where two are compared, the line follows the pointer
    const frame = event.buttons && event.target.closest(".frame"), line = frame && one("[type=range]", frame.parentNode)
    if (!line) return
    const {left, width} = frame.getBoundingClientRect()
    line.value = 100 * (event.clientX - left) / width
    line.dispatchEvent(new Event("input", {bubbles: true}))
}
onpointerdown = event => {
    slide(event)
    part = null
    svg = event.isPrimary && event.button == 0 && event.target.closest(".query .picture")?.querySelector("svg")
    if (svg) from = [event.clientX, event.clientY, ...place(event)]
}
onpointermove = event => {
    slide(event)
    if (!svg || !event.buttons) return
    if (!part && Math.hypot(event.clientX - from[0], event.clientY - from[1]) < 8) return
    if (!part) before = rectangle().getAttribute("points") || ""
    const [x, y, X, Y] = [...from.slice(2), ...place(event)]
    rectangle().setAttribute("points", [x, y, X, y, X, Y, x, Y])
    part = [Math.min(x, X), Math.min(y, Y), Math.max(x, X), Math.max(y, Y)]
}
onpointercancel = () => {  // the touch scrolls
    if (part) rectangle().setAttribute("points", before)
    svg = part = null
}
onpointerup = () => {
    if (part && part[0] < part[2] && part[1] < part[3]) {
        const asked = new URLSearchParams(location.search), key = svg.closest("figure").dataset.key
        const others = asked.getAll("q").map(value => value.split("!")[0] == key ? `${key}!${part}` : value)
        asked.delete("q"), asked.delete("page")
        others.forEach(value => asked.append("q", value))
        location.search = asked
    }
    svg = null
}

// The large view: Esc closes it, the arrow keys step.
const view = one("dialog")
let at = 0
const show = index => {
    const links = all(".picture"), link = links[at = (index + links.length) % links.length]
    const {key, path} = link.closest("figure").dataset
    Object.assign(one("img", view), {src: link.href, alt: one("img", link)?.alt || ""})
    one("p", view).textContent = path
    const words = link.closest("figure").querySelectorAll("figcaption > :not(.name, .folder, .acts, form)")
    one("small", view).textContent = [...words].map(it => it.innerText).join(" · ")
    one("#alone").href = link.href
    one("#from").href = one("a[href^='?q=']", link.closest("figure"))?.getAttribute("href") || "?q=" + key
    if (!view.open) view.showModal()
}
const copy = text => navigator.clipboard.writeText(text).then(() => true, () => false)
onclick = async event => {
    const {target} = event, link = target.closest(".picture")
    if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
        event.preventDefault()
        if (!part) show(all(".picture").indexOf(link))
        part = null
    }
    if (target.dataset.step) show(at + Number(target.dataset.step))
    if (target.id == "close") view.close()
    if (target.id == "path") target.textContent = await copy(one("p", view).textContent) ? "copied" : "select it above"
    if (target.id == "folder") {
        const {key} = all(".picture")[at].closest("figure").dataset
        const answer = await ask("show", {method: "POST", body: new URLSearchParams({file: key})})
        if (!answer.ok) { view.close(); say(await answer.text()) }
    }
    if (target.id == "copy") {
        const paths = chosen().map(box => box.closest("figure").dataset.path)
        target.textContent = await copy(paths.join("\\n")) ? `${paths.length} paths copied` : "copying is not allowed"
    }
}
view.onclose = () => { one("#path").textContent = "copy path"; all(".picture")[at]?.focus() }
onkeydown = event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], open = one(".compare[open]")
    if (view.open && step) show(at + step)
    if (!open) return
    if (event.key == "Escape") { open.open = false; one("summary", open).focus() }
    if (event.key == " " && !event.target.matches("summary, .blink")) {
        event.preventDefault()
        one(".blink", open).click()
    }
}
oninput = event => {
    const {type, value} = event.target
    if (type == "range") event.target.closest(".stage").style.setProperty("--cut", value + "%")
}
document.addEventListener("toggle", event => {
    if (event.target.open) one("[type=range]", event.target)?.focus()
}, true)

// The files that are chosen, and the size of the cards.
const chosen = () => all("[name=file]:checked")
const sum = () => {
    const bytes = chosen().reduce((total, box) => total + Number(box.dataset.size), 0)
    const size = bytes < 1e6 ? (bytes / 1e3).toFixed() + " KB" : (bytes / 1e6).toFixed(1) + " MB"
    one("#sum").textContent = `${chosen().length} of ${all("[name=file]").length} files chosen, ${size}`
}
one("#larger").checked = localStorage.larger == 1
onchange = event => {
    if (event.target.name == "file") sum()
    if (event.target.id == "larger") localStorage.larger = Number(event.target.checked)
}
onsubmit = event => {
    const action = event.submitter?.getAttribute("formaction")
    if (action == "trash" && !confirm(`Move to the trash: ${one("#sum").textContent}?`)) event.preventDefault()
}
if (one("#sum")) sum()

// How far the work is. Groups are shown as they are found.
const watch = async () => {
    const answer = await ask("job"), job = one("#job")
    if (answer.gone) return say(gone)
    const {title, said, share} = await answer.json()
    if (!title) return one("[name=file]") ? job.remove() : location.reload()
    one("b", job).textContent = title
    one("span", job).textContent = said
    one("progress", job).value = share
    if (document.body.dataset.live) {
        const page = new DOMParser().parseFromString(await (await ask(location)).text(), "text/html")
        const fresh = one("main > div", page)
        if (fresh) one("main > div, #files > div").replaceWith(fresh)
    }
    setTimeout(watch, 1000)
}
if (one("#job")) watch()
"""


class Stopped(Exception):
    """A person has stopped a job."""


class Job(threading.Thread):
    """Long work that a page shows. It is the file that progress bars of its thread are written to: see `watched`."""

    def __init__(self, title: str, act: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.title, self.act = title, act
        self.said, self.share, self.is_stopped = "", "0", False
        self.error: Exception | None = None

    def run(self) -> None:
        watched.job = self
        try:
            self.act()
        except (Stopped, DeepVisionError, sqlite3.Error, OSError, MemoryError) as error:
            self.error = error
        except BaseException:
            self.error = DeepVisionError("This has failed: the terminal says why")
            raise

    def stop(self) -> None:
        """Stop it at its next step."""
        self.is_stopped = True
        with suppress(RuntimeError):  # it was not started
            self.join(STOP_SECONDS)

    def bar(self, steps: Iterable[Any] | None, **options: Any) -> tqdm.tqdm:
        """A progress bar that this job shows. Raises Stopped at the next step once the job is stopped."""

        def check() -> None:  # not while the bar is written: tqdm then holds a lock
            if self.is_stopped:
                raise Stopped("Stopped. What was done is kept, and the next time goes on from there")

        class Bar(tqdm.tqdm):
            def update(self, n: float | None = 1) -> bool | None:
                done = super().update(n)
                check()
                return done

            def __iter__(self) -> Iterator[Any]:
                for step in super().__iter__():
                    check()
                    yield step

        return Bar(steps, file=self, bar_format=JOB_BAR, **options)

    def write(self, text: str) -> None:
        """Take a line of a progress bar."""
        if "|" in text:
            self.said, self.share = text.strip().split("|")

    def flush(self) -> None:
        """A file has this."""


class Kept:
    """What the UI keeps beside the indexes, for all models: small pictures by content, dismissed groups, its token."""

    def __init__(self, folder: Path, spare: str) -> None:
        """`spare`: a folder for it if it cannot be in `folder`."""
        for place in (folder, folder, Path(spare)):
            try:
                place.mkdir(parents=True, exist_ok=True)
                path = place / "ui.sqlite"
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # of no other account
                self.db = Database(path, {})
                self.db.executescript(KEPT)
                with self.db.transaction():
                    stored = self.db.execute("SELECT token FROM token").fetchone()
                    self.token = str(stored[0]) if stored else secrets.token_urlsafe(16)
                    if not stored:  # kept, so that addresses hold after a restart
                        self.db.execute("INSERT INTO token VALUES (?)", (self.token,))
                return
            except sqlite3.OperationalError:
                continue  # it cannot be written
            except sqlite3.DatabaseError:
                self.db.close()
                path.unlink()  # it is damaged; all but the dismissals is made again
            except OSError:
                continue

    def small(self, digest: bytes) -> Small | None:
        with suppress(sqlite3.Error), self.db.turn:
            found = self.db.execute("SELECT webp, width, height FROM small WHERE digest = ?", (digest,)).fetchone()
            return Small(*found) if found else None
        return None

    def keep_small(self, digest: bytes, small: Small) -> None:
        with suppress(sqlite3.Error), self.db.transaction():  # without room it is made each time
            self.db.execute("INSERT OR REPLACE INTO small VALUES (?, ?, ?, ?)", (digest, *small))

    def dismissed(self) -> set[bytes]:
        with suppress(sqlite3.Error), self.db.turn:
            return {contents for (contents,) in self.db.execute("SELECT contents FROM dismissed").fetchall()}
        return set()

    def dismiss(self, contents: bytes) -> None:
        with self.db.transaction():
            self.db.execute("INSERT OR REPLACE INTO dismissed VALUES (?)", (contents,))

    def restore(self) -> None:
        with self.db.transaction():
            self.db.execute("DELETE FROM dismissed")


def has_screen() -> bool:
    """Whether a window can be opened on this machine."""
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def show_in_folder(path: str) -> None:
    """Let the system's file manager show the file. Raises DeepVisionError where there is none."""
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise DeepVisionError(f"{decode_path(path)} is not there any more")
    manager = "org.freedesktop.FileManager1"
    by_bus = ["dbus-send", "--session", "--print-reply", f"--dest={manager}", "/org/freedesktop/FileManager1",
              f"{manager}.ShowItems", f"array:string:{Path(path).as_uri()}", "string:"]  # fmt: skip
    commands = {"darwin": [["open", "-R", path]], "win32": [["explorer", f"/select,{path}"]]}
    for command in commands.get(sys.platform, [by_bus, ["xdg-open", os.path.dirname(path)]]) if has_screen() else ():
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, timeout=10)
            if done.returncode == 0 or command[0] == "explorer":  # explorer always gives 1
                return
    raise DeepVisionError(f"There is no file manager on the machine where this runs. The file is {decode_path(path)}")


def whole_number(text: str, what: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text[:20]) <= most):
        raise DeepVisionError(f"{what}: {text} is not a whole number from {least} to {most:,}")
    return int(text)


def decimal(text: str, what: str) -> float:
    with suppress(ValueError):
        if -1 <= float(text) <= 1:
            return float(text)
    raise DeepVisionError(f"{what}: {text} is not a number from -1 to 1, and not one of {', '.join(LABELS)}")


def paged(found: list[Any], number: int) -> tuple[int, int, list[tuple[Any, list[Match]]]]:
    """A page of PER_PAGE groups or pictures: its number, how many there are, and what it shows of each item."""
    is_whole = bool(found) and isinstance(found[0], Group) and bool(found[0].keep)  # a group is not divided
    units = list[tuple[Any, Match | None]]()
    for item in found:
        matches: list[Any] = [] if is_whole else with_query(item)
        units += [(item, match) for match in matches or [None]]
    pages = max(1, -(-len(units) // PER_PAGE))
    number = min(number, pages)
    shown = list[tuple[Any, list[Match]]]()
    for item, match in units[(number - 1) * PER_PAGE : number * PER_PAGE]:
        if not shown or shown[-1][0] is not item:
            shown.append((item, []))
        shown[-1][1].extend([match] if match else with_query(item))
    return number, pages, shown


def kept_instead(engine: Engine, group: Group, path: str, digests: dict[str, bytes]) -> Group:
    """The group with another file to keep: the others are compared with that one."""

    def look(other: str) -> Match:
        if digests[other] == digests[path]:
            return Match(0, other, 1.0, True, LABELS[-1])
        score = scores.get(digests[other], 0.0)
        if pair := examined(path, other, (digests[path], digests[other]), None):
            lost = ", ".join(pair.lost[1]) or None
            return Match(0, other, score, False, pair.label, pair.relations[1], pair.regions[0], lost)
        return Match(0, other, score, False, lost="all: it does not show the same as the file to keep")

    others = [other for other in (group.keep, *(match.path for match in group.matches)) if other != path]
    scores = scored(engine, digests[path], {digests[other] for other in others})
    matches = [look(other) for other in others]
    return Group(path, [match._replace(rank=rank) for rank, match in enumerate(matches, start=1)])


class Request(http.server.BaseHTTPRequestHandler):
    """A request to the UI. Those of other sites, and those without the token, are refused. No path is opened that a
    browser sends."""

    server: UI
    timeout = 60  # seconds without a byte

    def parse_request(self) -> bool:
        """Read the header. False, and an error is sent, unless the UI's own page or a typed address asks for it."""
        if not super().parse_request():
            return False
        host, port = self.headers.get("Host", ""), self.server.server_address[1]
        is_own = self.headers.get("Origin", f"http://{host}") == f"http://{host}"
        is_own &= self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        token, _, rest = self.path[1:].partition("/")
        self.route, _, self.query = rest.partition("?")
        if not OWN_HOST.fullmatch(host):
            tunnel = f"ssh -L {port}:127.0.0.1:{port} THIS-MACHINE"
            words = f"run `{tunnel}` there, and open the address that the terminal shows here"
            self.send_error(403, f"This answers to 127.0.0.1 and localhost alone. From another machine, {words}")
        elif not is_own:
            self.send_error(403, "Not from another site's page")
        elif self.path == f"/{self.server.ticket}":
            self.server.ticket = secrets.token_urlsafe()  # it was in the list of processes, so it counts once
            self.go_to(f"/{self.server.kept.token}/")
        elif not secrets.compare_digest(token.encode(), self.server.kept.token.encode()):
            self.send_error(403, "Open the address that the terminal shows: it ends in a token")
        else:
            return True
        return False

    def do_GET(self) -> None:
        asked = urllib.parse.parse_qs(self.query)
        kind, _, key = self.route.partition("/")
        if "of" in asked:  # a part of one of the queries is chosen: it becomes part of that query's key
            part = "" if "whole" in asked else asked.get("part", [""])[0].replace(" ", "")
            of = asked.pop("of")[0]
            asked["q"] = [f"{of}!{part}".rstrip("!") if it.split("!")[0] == of else it for it in asked.get("q", [])]
            kept = {name: value for name, value in asked.items() if name not in ("part", "whole")}
            self.go_to(f"./?{urllib.parse.urlencode(kept, doseq=True)}")
        elif not self.route:
            self.reply(self.server.page(asked, self))
        elif self.route == "job":
            job = self.server.running()
            self.reply(json.dumps({"title": job and job.title, "said": job and job.said, "share": job and job.share}))
        elif kind in ("small", "picture"):
            self.send_picture(kind, key)
        else:
            self.send_error(404, "There is no such page")

    def do_POST(self) -> None:
        """Take a picture, or do what a form or the script asks for."""
        length = self.headers.get("Content-Length", "")
        most = QUERY_BYTES if self.route == "give" else FORM_BYTES
        if not (length.isascii() and length.isdigit()):
            return self.send_error(411, "The length of what is sent must be given")
        if int(length) > most:
            return self.send_error(413, f"It has more than {most:,} bytes")
        with tempfile.SpooledTemporaryFile(FORM_BYTES, dir=self.server.own) as body:
            while (left := int(length) - body.tell()) and (data := self.rfile.read(min(left, 1 << 20))):
                body.write(data)
            if left:
                return self.send_error(400, "The request has broken off")
            body.seek(0)
            self.act(body)

    def act(self, body: IO[bytes]) -> None:
        """Answer a POST with this body."""
        try:
            if self.route == "give":
                name = urllib.parse.parse_qs(self.query).get("name", ["picture"])[0]
                return self.reply(self.server.give(body, name), kind="text/plain")
            if self.route not in UI.ACTIONS:
                return self.send_error(404, "There is no such action")
            form = urllib.parse.parse_qs(body.read().decode("utf-8", "replace"))
            done = self.server.act(self.route, form)
        except (DeepVisionError, sqlite3.Error, OSError) as error:
            if self.route in ("give", "show"):  # the script says it
                return self.send_error(501, first_line(error))
            self.server.news.append(first_line(error))
            return self.go_to("./?twice=1")
        if self.route == "list":
            attached = {"Content-Disposition": "attachment; filename=paths.txt"}
            self.reply(done, kind="text/plain", headers=attached)
        else:
            self.go_to(str(done)) if done else self.reply("")

    def send_picture(self, kind: str, key: str) -> None:
        """Send a picture, small or whole, of the collection or given."""
        try:
            path = self.server.path(key)
        except DeepVisionError as error:
            return self.send_error(404, str(error))
        if kind == "small":
            picture = self.server.look(path)
            data = picture.made and picture.made.webp
            image_type = "webp"
        else:
            picture = read_path(path, lambda image: SHOWN_AS.get(image.format or ""))
            image_type = picture.made
            if picture.digest and not image_type:
                picture = read_path(path, partial(thumbnail, side=FULL_PICTURE))
                image_type, data = "webp", picture.made and picture.made.webp
            elif picture.digest:
                data = Path(path).read_bytes()
        if not picture.digest:
            return self.send_error(404, picture.reason or "this is not a picture")
        cached = FOREVER if kind == "small" and self.query else "private, no-cache"
        self.reply(data, kind=f"image/{image_type}", headers={"Cache-Control": cached})

    def go_to(self, place: str) -> None:
        self.reply("", 303, headers={"Location": place})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with a sentence."""
        self.reply(escape_controls(message or explain or "This request is not understood"), code, "text/plain")

    def reply(
        self, body: str | bytes, code: int = 200, kind: str = "text/html", headers: dict[str, str] | None = None
    ) -> None:
        data = body.encode() if isinstance(body, str) else body
        usual = {
            "Content-Type": kind + "; charset=utf-8" * kind.startswith("text/"),
            "Content-Length": str(len(data)),
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "same-origin",  # with none, forms would have no origin
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
        }
        if kind != "text/html":  # whatever a picture holds, it is no page
            usual["Content-Security-Policy"] = "default-src 'none'; sandbox"
        with suppress(ConnectionError, TimeoutError):  # the browser has gone
            self.send_response(code)
            for name, value in {**usual, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    def has_gone(self) -> bool:
        """Whether the browser has closed the connection."""
        with suppress(OSError):
            ready, _, _ = select.select([self.connection], [], [], 0)
            return bool(ready) and not self.connection.recv(1, socket.MSG_PEEK)
        return True

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


class UI(socketserver.ThreadingTCPServer):
    """The server of the UI. It gives a browser pictures of the collection, and those given to it, by their keys."""

    ACTIONS = ("changes", "compare", "stop", "keep", "dismiss", "restore", "list", "trash", "show")
    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # on Windows two programs would share the port
    engine: Engine | None = None  # there is none before the first index is made

    def __init__(
        self, prepare: Callable[[Work], Engine], work: Work, port: int, top: int, cache: Path, own: str
    ) -> None:
        """`prepare` makes an engine, `cache` has the indexes, `own` is a folder for the pictures that are given."""
        super().__init__(("127.0.0.1", port), Request)
        self.prepare, self.work, self.top, self.own = prepare, work, top, own
        self.kept, self.ticket = Kept(cache, own), secrets.token_urlsafe()
        self.given = dict[str, tuple[str, str]]()  # by key: path and name
        self.looked = dict[str, Picture]()  # by path: the small pictures of those
        self.tiles = list[tuple[int, list[Match]]]()  # groups that stand for the collection
        self.groups: list[Group] | None = None  # None: not known yet
        self.noted = dict[str, tuple[File, bytes]]()  # files of the groups as they were compared, with their content
        self.paired = dict[str, dict[str, str]]()  # while all are compared: pictures found together, with the label
        self.news = list[str]()  # what the next page says
        self.answered: tuple[Any, list[Answer]] | None = None  # the last search: its pages are turned
        self.turn = threading.Lock()  # of actions
        self.job = Job("", bool)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):  # the browser has gone
            super().handle_error(request, client_address)

    def service_actions(self) -> None:
        """End if the first index cannot be made. `serve_forever` calls this every half second."""
        if self.engine is None and self.job.error and not isinstance(self.job.error, Stopped):
            raise self.job.error

    # Jobs

    def running(self) -> Job | None:
        return self.job if self.job.is_alive() else None

    def start(self, title: str, act: Callable[[], Any]) -> None:
        """Start a job, unless one runs."""
        with self.turn:
            if not self.running():
                (job := Job(title, act)).start()
                self.job = job

    def index(self) -> None:
        """Bring the index up to date, and show what it has. If that is stopped, show what was read by then."""
        is_first = self.engine is None
        try:
            engine = self.prepare(self.work)
        except Stopped as stop:
            try:
                engine = self.prepare(replace(self.work, update=False))
            except DeepVisionError:
                raise stop from None
            self.news.append(str(stop))
        self.work = replace(self.work, rebuild=False, update=True)  # of the next time
        self.tiles = representatives(engine, TILES)
        self.engine, self.answered = engine, None
        if not is_first:
            self.groups = None
            self.news.append(str(engine.summary))

    def compare(self) -> None:
        """Find the duplicates, with a connection to the store of its own."""
        assert self.engine
        known = self.engine.store
        engine = replace(self.engine, store=Store(known.folder, known.identity, known.dim))
        self.paired, groups = {}, list[Group]()
        for group in find_duplicates(engine, found=self.pair):
            for path in (group.keep, *(match.path for match in group.matches)):
                size, mtime, digest = self.file(self.inner(path)) or (0, -1, b"")
                self.noted[path] = File(b"", size, mtime), digest
                self.look(path)  # its small picture is there when the page asks for it
            groups.append(group)
        self.groups = groups

    def pair(self, one: str, other: str, label: str) -> None:
        """Note two pictures that were found to be the same. The page shows them before the groups are known."""
        self.paired.setdefault(one, {})[other] = label

    # Pictures

    def inner(self, path: str) -> bytes:
        """The path below the collection."""
        assert self.engine
        return os.fsencode(path)[len(os.fsencode(os.path.join(self.engine.images, ""))) :]

    def key(self, path: str) -> str:
        """The key that stands for a path."""
        if os.path.dirname(path) == self.own:
            return os.path.basename(path)
        return base64.urlsafe_b64encode(self.inner(path)).decode().rstrip("=")

    def path(self, key: str) -> str:
        """The path of a picture that was given, or of a file of the collection that is in its index."""
        if key in self.given:
            return self.given[key][0]
        with suppress(ValueError):  # it is not base64
            path = base64.urlsafe_b64decode(key + "=" * (-len(key) % 4))
            if self.engine and self.file(path):
                return self.engine.path_of(path)
        raise DeepVisionError(UNKNOWN)

    def file(self, path: bytes) -> Any:
        """Size, mtime and content of a picture of the collection, as the index knows it; None: it is none."""
        assert self.engine
        with self.engine.store.db.turn:
            query = "SELECT size, mtime, digest FROM files WHERE path = ? AND digest IS NOT NULL"
            return self.engine.store.db.execute(query, (path,)).fetchone()

    def look(self, path: str) -> Picture:
        """A Picture with its Small."""
        read = partial(read_path, path, transform=partial(thumbnail, side=UI_SIDE))
        if os.path.dirname(path) == self.own:
            if path not in self.looked:
                self.looked[path] = read()
            return self.looked[path]
        try:
            now, known = File.of(os.fsencode(path), os.stat(path)), self.file(self.inner(path))
        except OSError as error:
            return Picture(File(os.fsencode(path), 0, 0), reason=f"it is not there any more ({error.strerror})")
        if known and tuple(now[1:]) == known[:2] and (small := self.kept.small(known[2])):
            return Picture(now, known[2], small)
        picture = read()
        if picture.made and picture.digest:
            self.kept.keep_small(picture.digest, picture.made)
        return picture

    def give(self, body: IO[bytes], name: str) -> str:
        """Save a picture that is sent. Returns its key. Its name is for people alone."""
        suffix = os.path.splitext(name)[1].lower()  # RAW formats are known by it
        key = f"~{secrets.token_hex(6)}{suffix if re.fullmatch('[.][a-z0-9]{1,5}', suffix) else ''}"
        path = os.path.join(self.own, key)
        with open(path, "xb") as file:
            shutil.copyfileobj(body, file)
        self.given[key] = path, name.replace("\\", "/").rpartition("/")[2] or "picture"
        return key

    def is_given(self, path: str) -> bool:
        return os.path.dirname(path) == self.own

    def name_of(self, path: str) -> str:
        """What is shown of a path: its part below the collection; of a picture that was given, the file's name."""
        if self.is_given(path):
            return escape_controls(self.given[os.path.basename(path)][1])
        return decode_path(os.fsdecode(self.inner(path)))

    def whole(self, path: str) -> str:
        return self.name_of(path) if self.is_given(path) else decode_path(os.path.abspath(path))

    def link(self, path: str) -> str:
        return f"picture/{self.key(path)}"

    def source(self, picture: Picture, path: str) -> str:
        """The address of a small picture. It has the hash of the content, so that a browser may keep it."""
        return f"small/{self.key(path)}?{(picture.digest or b'').hex()}"

    # Pages

    def page(self, asked: dict[str, list[str]], request: Request) -> str:
        """The page that an address asks for."""
        choices = {name: asked.get(name, [value])[0] for name, value in {"k": str(self.top), "least": ""}.items()}
        parts, number, live = dict[str, tuple[float, ...]](), 1, False
        try:
            number = whole_number(asked.get("page", ["1"])[0], "The page", 1, 1_000_000)
            title, found, live = self.find(asked, parts, request, **choices)
        except (DeepVisionError, argparse.ArgumentTypeError) as error:
            title, found = "This cannot be done", [Answer("", [], str(error))]
        groups = "twice" in asked and bool(found) and isinstance(found[0], Group)
        number, pages, shown = paged(found, number)
        news, self.news = self.news, []
        script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        scores = {choices["least"]: f"copies, and look-alikes from {choices['least']}", **SCORES}
        return render(
            found, self.engine, self.look, shown=shown, name=self.name_of, whole=self.whole, link=self.link,
            source=self.source, full=lambda _, path: self.link(path), key=self.key,
            title=title, policy=UI_POLICY.format(script), script=SCRIPT, ui=True, live=live, job=self.running(),
            about=ABOUT, news=news, queries=asked.get("q", []), parts=parts, most=PAGE_PICTURES, scores=scores,
            kept=urllib.parse.urlencode(choices), page=number, pages=pages, groups=groups,
            turn=lambda page: "?" + urllib.parse.urlencode({**asked, "page": page}, doseq=True),
            hidden=len(self.kept.dismissed()) if "twice" in asked and not live else 0,
            halted="twice" in asked and self.job.error and not self.running(), **choices,
        )  # fmt: skip

    def find(
        self, asked: dict[str, list[str]], parts: dict[str, tuple[float, ...]], request: Request, k: str, least: str
    ) -> tuple[str, list[Any], bool]:
        """Title and content of a page, and whether it grows: duplicates (`twice`), a search (`q`), a `group`, or the
        collection. The parts that are searched with go to `parts`."""
        if self.engine is None:
            if self.running():
                return "Reading the pictures", [], True
            raise DeepVisionError(str(self.job.error))
        if "twice" in asked:
            return self.duplicates()
        if "q" in asked:
            found = self.answers(asked["q"], parts, request, whole_number(k, "How many", 1, PAGE_PICTURES), least)
            return self.name_of(file_of(found[0])) if len(found) == 1 else title_of(found), found, False
        if "group" in asked:
            number = whole_number(asked["group"][0], "The group", 1, len(self.tiles))
            size, images = self.tiles[number - 1]
            return f"{counted(size, 'picture')} that look alike", [Group("", images)], False
        ranked_groups = enumerate(self.tiles, start=1)
        tiles = [images[0]._replace(rank=n, view=f"group of {size:,}") for n, (size, images) in ranked_groups]
        return "Pictures that stand for the collection", [Group("", tiles)], False

    def duplicates(self) -> tuple[str, list[Any], bool]:
        """Title and content of the groups, and whether more are being found. They are looked for if none are known."""
        if self.groups is None and not self.running() and not self.job.error:
            self.start(COMPARING, self.compare)
        self.job.join(1)  # second; a small collection is compared by then
        if self.groups is None:  # pictures that were found together so far
            found = list[Group]()
            for one, others in list(self.paired.items()):
                matches = [Match(0, other, 0.0, False, label) for other, label in list(others.items())]
                found.append(Group(one, [it._replace(rank=rank) for rank, it in enumerate(matches, start=1)]))
            title = COMPARING if self.running() else str(self.job.error or COMPARING)
            return title, found, bool(self.running())
        hidden = self.kept.dismissed()
        groups = [group for group in self.groups if self.contents(group) not in hidden]
        won = f", {in_bytes(sum(map(self.winnable, groups)))} can be won" if groups else ""
        return title_of(groups) + won, groups, False

    def answers(
        self, queries: list[str], parts: dict[str, tuple[float, ...]], request: Request, k: int, least: str
    ) -> list[Answer]:
        """What is found for queries: keys, perhaps with a part, as `KEY!left,top,right,bottom`."""
        for value in queries:
            key, _, part = value.partition("!")
            try:
                parts[self.path(key)] = crop_box(part) if part else ()
            except argparse.ArgumentTypeError:
                raise DeepVisionError(
                    f"The part: {part} is not left, top, right, bottom, in pixels or shares"
                ) from None
        score = -1.0 if least in LABELS else decimal(least or "-1", "The score")
        wanted, answered = (list(parts.items()), k, least), self.answered
        if answered and answered[0] == wanted:
            return answered[1]
        found = list[Answer]()
        threshold = least if least in LABELS else -1.0
        for crop, paths in itertools.groupby(parts, key=parts.__getitem__):
            for answer in search(list(paths), self.engine, k=k, threshold=threshold, crop=crop or None):
                # A copy is never hidden by a score: an edit lowers it below that of look-alikes
                matches = [it for it in answer.matches if it.label or it.score >= score]
                error = answer.error and answer.error.replace("--crop", "the part")
                found.append(answer._replace(matches=matches, error=error, file=answer.query))
                if request.has_gone():
                    raise ConnectionAbortedError
        self.answered = wanted, found
        return found

    # What is done with duplicates

    def contents(self, group: Group) -> bytes:
        """A hash that stands for a group: another file in it makes it another group."""
        digests = sorted(self.noted[path][1] for path in (group.keep, *(match.path for match in group.matches)))
        return hashlib.sha256(b"".join(digests)).digest()

    def winnable(self, group: Group) -> int:
        """Bytes of the files with which nothing is lost."""
        return sum(self.noted[it.path][0].size for it in group.matches if it.lost is None and it.path in self.noted)

    def group_of(self, path: str) -> Group:
        for group in self.groups or ():
            if path == group.keep or any(path == match.path for match in group.matches):
                return group
        raise DeepVisionError(f"{self.name_of(path)} is in none of the groups")

    def changed(self, path: str) -> str:
        """Why a file is not the one that was compared; empty if it is."""
        (_, *known), digest = self.noted[path]
        now = read_path(path, lambda _: True)
        if now.digest == digest and list(now.file[1:]) == known and not now.vanished:
            return ""
        return "it has changed since it was compared" if os.path.exists(path) else "it is not there any more"

    def trash(self, paths: Iterable[str]) -> list[str]:
        """Move files of the groups to the system's trash. Returns what there is to say."""
        try:
            send = importlib.import_module("send2trash").send2trash
        except ModuleNotFoundError as error:
            words = "Nothing was moved. To move files to the trash, stop this, and run: pip install send2trash"
            raise DeepVisionError(words) from error
        moved, failed = list[int](), list[str]()
        for path in paths:
            group = self.group_of(path)
            why = "it is the file to keep" if path == group.keep else self.changed(path)
            if not why and (of_keep := self.changed(group.keep)):
                why = f"of {self.name_of(group.keep)}, the file to keep, {of_keep}"
            try:
                if not why:
                    send(os.path.abspath(path))
            except Exception as error:  # it has errors of its own for each system
                why = first_line(error)
            if why:
                failed.append(f"{self.name_of(path)} stays: {why}")
                continue
            moved.append(self.noted[path][0].size)
            group.matches[:] = [match for match in group.matches if match.path != path]
        if self.groups is not None:  # None: the index was brought up to date meanwhile
            self.groups = [group for group in self.groups if group.matches]
        return [f"{counted(len(moved), 'file')} moved to the trash, {in_bytes(sum(moved))}", *failed]

    def keep(self, path: str) -> None:
        """Make this the file to keep of its group."""
        groups, group = self.groups, self.group_of(path)
        assert self.engine and groups
        if path != group.keep:
            digests = {it: self.noted[it][1] for it in (group.keep, *(match.path for match in group.matches))}
            groups[groups.index(group)] = kept_instead(self.engine, group, path, digests)

    def act(self, action: str, form: dict[str, list[str]]) -> str | bytes:
        """Do what is asked for. Returns the address of the page that follows; of `list` its text; of `show` nothing."""
        if action in ("changes", "compare"):
            self.start(*{"changes": ("Looking for changes", self.index), "compare": (COMPARING, self.compare)}[action])
            return "./" if action == "changes" else "./?twice=1"
        if action == "stop":
            self.job.stop()
            return "./" if self.job.act == self.index else "./?twice=1"
        paths = [self.path(key) for key in form.get("file", []) + form.get(action, [])]
        if action == "list":
            return b"".join(os.fsencode(os.path.abspath(path)) + b"\n" for path in paths)
        if action == "show":
            show_in_folder(*paths[:1]) if paths and not self.is_given(paths[0]) else self.path("")
            return ""
        if action in ("keep", "dismiss") and not paths:
            raise DeepVisionError(UNKNOWN)
        with self.turn:
            if action == "trash":
                self.news += self.trash(paths)
            elif action == "restore":
                self.kept.restore()
            elif action == "keep":
                self.keep(paths[-1])
            else:
                self.kept.dismiss(self.contents(self.group_of(paths[-1])))
        return "./?twice=1&page=" + urllib.parse.quote(form.get("page", ["1"])[0])


def serve(prepare: Callable[[Work], Engine], work: Work, port: int, top: int, cache: Path, is_opened: bool) -> None:
    """Serve the UI to this machine alone; see `UI`. Never returns: an interrupt ends the process.

    Raises DeepVisionError if the port is taken, or the first index cannot be made.
    """
    with tempfile.TemporaryDirectory() as own:
        try:
            server = UI(prepare, work, port, top, cache, own)
        except OSError as error:
            raise DeepVisionError(f"port {port}: {error.strerror}. Choose another with --port") from error
        server.start("Reading the pictures", server.index)
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        log.info("%s%s/", address, server.kept.token)
        if is_opened and has_screen():  # else a browser of the terminal would take it over
            threading.Thread(target=webbrowser.open, args=(address + server.ticket,), daemon=True).start()
        with server, suppress(KeyboardInterrupt):
            server.serve_forever()
        server.job.stop()
    os._exit(0)  # torch aborts a process that ends while a thread is at work


# ---- Command line ----------------------------------------------------------------------------------------------------

FETCH_STEP, FETCH_LEAST = 60, 60_000  # an address is given up if in so many seconds fewer bytes come
FETCH_STEPS = 10  # for one address, at most: QUERY_BYTES at 0.5 MB/s
EXCLUDED = {  # by option: those that cannot be combined with it
    "no_update": ("index_only", "rebuild", "prune", "exclude"),
    "index_only": ("queries", "crop"),
    "export": ("queries", "crop"),
    "ui": ("queries", "crop", "threshold", "form"),
    "duplicates": ("queries", "crop", "threshold", "top"),
}


def score_or_label(text: str) -> float | str:
    """The value of --threshold and --duplicates: a cosine similarity, or one of LABELS."""
    if text in LABELS:
        return text
    with suppress(ValueError):
        if -1 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from -1 to 1, and not one of: {', '.join(LABELS)}")


def local_path(query: str) -> str:
    """The path that a file:// address stands for; any other query as it is."""
    path = urllib.parse.unquote(query[7:], errors="surrogateescape").removeprefix("localhost")
    path = path.lstrip("/") if os.name == "nt" else path
    return path if query.lower().startswith("file://") else query


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
    least = "least cosine, or label: variant, copy, identical"
    add("--threshold", type=score_or_label, default=-1.0, metavar="S", help=least)
    add("--crop", type=crop_box, metavar="L,T,R,B", help="a part of the query: its sides, in pixels or as shares")
    add("--model", metavar="NAME", help=f"{MODEL} (default), any torchvision classification model, timm:NAME, offline")
    add("--weights", metavar="NAME|FILE", help=f"torchvision weights (default: {WEIGHTS}) or a local file")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: %(default)s")
    add("--batch-size", type=int, metavar="N", help="images that the model takes at once (default: by device)")
    add("--workers", type=int, metavar="N", help="threads that read and decode (default: one a core)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--index-only", action="store_true", help="update the index, search nothing")
    alike = "groups of the same picture; S: copy (default), identical, variant, or the least cosine"
    mode.add_argument("--duplicates", type=score_or_label, nargs="?", const="copy", metavar="S", help=alike)
    mode.add_argument("--ui", action="store_true", help="search in the browser")
    mode.add_argument("--export", metavar="DIR", help="features.npy and paths.txt, for any other vector database")
    add("--port", type=int, default=PORT, metavar="N", help="of --ui (default: %(default)s; 0: any that is free)")
    add("--no-browser", action="store_true", help="of --ui: only print the address, open no browser")
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
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)  # behind it, `parse_intermixed_args` still sees options
    options = parser.parse_intermixed_args(["--null" if arg == "-0" else arg for arg in given[:end]])
    options.queries = [local_path(query) for query in (*options.queries, *given[end + 1 :])]
    check_options(options, parser)
    return options


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https alone. urllib itself also follows those to ftp."""

    def redirect_request(self, request: Any, body: Any, code: int, reason: str, headers: Any, address: str) -> Any:
        body.close()  # else urllib reads it into memory, however long it is
        if not ADDRESS.match(address):
            raise OSError(f"a redirect to {address} is refused")
        return super().redirect_request(request, body, code, reason, headers, address)


def http_address(address: str) -> str:
    """An address as HTTP takes it, of one as a browser shows it: with blanks, and letters of any script."""
    parts = urllib.parse.urlsplit(address)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return urllib.parse.quote(parts._replace(netloc=host).geturl(), safe="!#$%&'()*+,/:;=?@[]~")


def fetch(name: str, path: str) -> str | None:
    """Save what is on stdin, -, or at an address as the file `path`. Returns None, or why that failed."""
    try:
        opener = urllib.request.build_opener(Redirects)
        opener.addheaders = [("User-Agent", "DeepVision")]  # some servers refuse Python
        stdin = getattr(sys.stdin, "buffer", io.BytesIO())  # Python has none if it was closed
        source: Any = nullcontext(stdin) if name == "-" else opener.open(http_address(name), timeout=CONNECT_SECONDS)
        with source as stream, open(path, "wb") as target:
            is_packed = name != "-" and stream.headers["Content-Encoding"] == "gzip"
            unpack = zlib.decompressobj(31).decompress if is_packed else bytes  # 31: the format of gzip
            # `read` would wait until it has all bytes that it is asked for, however slowly a server sends them.
            while data := stream.read1(1 << 16):
                target.write(unpack(data))
                if target.tell() > QUERY_BYTES:
                    return f"more than {QUERY_BYTES:,} bytes"
            if getattr(stream, "length", 0):  # bytes that the server promised and did not send
                return "the answer is truncated"
            return None if target.tell() else "it is empty"
    except (OSError, ValueError, OverflowError, http.client.HTTPException, zlib.error) as error:
        words = first_line(error).removeprefix("<urlopen error ").removesuffix(">")
        return escape_controls(words) or type(error).__name__  # they may be a server's


def save_query(name: str, path: str) -> str | None:
    """Save the query `name`, an address or - for stdin, as the file `path`. Returns None, or why that failed.

    An address is given up if few bytes of it come, in its header or later.
    """
    if name == "-":
        return fetch(name, path)
    size, said = 0, list[str | None]()
    Path(path).touch()
    fetching = threading.Thread(target=lambda: said.append(fetch(name, path)), daemon=True)
    fetching.start()
    for _ in range(FETCH_STEPS):
        fetching.join(FETCH_STEP)
        if said:
            return said[0]
        before, size = size, os.path.getsize(path)
        if size - before < FETCH_LEAST:
            return f"only {size - before:,} bytes came in {FETCH_STEP} seconds"
    return f"not there after {FETCH_STEPS * FETCH_STEP} seconds"


def find_queries(names: Iterable[str], folder: str, index_dir: str) -> Iterator[Answer]:
    """An Answer without matches for each query, file of a folder, and unlisted folder. Fetched ones go to `folder`."""
    unlisted = list[OSError]()
    for number, name in enumerate(names):
        if name == "-" or ADDRESS.match(name):
            path = os.path.join(folder, str(number))
            yield Answer(name, [], save_query(name, path), path)
        elif os.path.isdir(name):
            for file in find_images(name, unlisted.append, [index_dir]):
                path = os.path.join(name, os.fsdecode(file.path))
                yield Answer(path, [], file=path)
        else:
            yield Answer(name, [], file=name)
    for failure in unlisted:
        name = os.fsdecode(failure.filename)
        yield Answer(name, [], f"cannot be listed ({failure.strerror})", name)


def answers(options: argparse.Namespace, engine: Engine, folder: str) -> Iterator[Answer]:
    """An Answer for each query, and for each folder that cannot be listed. Files that are no images are passed over."""
    names = options.queries or filter(os.path.isdir, [QUERIES])
    queries, again = itertools.tee(find_queries(names, folder, options.index_dir))
    choices = {"k": options.top, "threshold": options.threshold, "crop": options.crop}
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
    where = f"{SKIPPED} AND reason LIKE '.% {UNREADABLE} %' GROUP BY reason ORDER BY reason"
    if found := engine.store.db.execute(f"SELECT count(*), reason FROM {where}").fetchall():
        words = [(f"{reason.split()[0]} {number}", reason.split()[-1]) for number, reason in found]
        suffixes, packages = ", ".join(suffix for suffix, _ in words), " ".join(sorted({name for _, name in words}))
        files = counted(sum(number for number, _ in found), "file")
        log.info("%s in formats that cannot be read here (%s): pip install %s", files, suffixes, packages)
    if log.isEnabledFor(logging.DEBUG):
        for path, reason in engine.store.skipped():
            log.debug("skipped %s: %s", engine.path_of(path), reason)
        for path, reason in engine.store.skipped(files=DAMAGED_FILES):
            log.debug("%s: %s, decoded as far as it goes", engine.path_of(path), reason)


def print_answers(options: argparse.Namespace, engine: Engine) -> int:
    """Print the answers to the queries, or the duplicates, write the page, and return the exit status."""
    if sys.stdout is None:
        raise DeepVisionError("the results cannot be written: stdout is closed")
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

    def prepare(work: Work) -> Engine:
        engine = initialize_reverse_image_search(options.images, options.index_dir, model=model, work=work)
        report_update(engine, argparse.Namespace(**{**vars(options), "no_update": not work.update}))
        return engine

    if options.ui:
        serve(prepare, work, options.port, options.top, Path(options.index_dir), not options.no_browser)
    engine = prepare(work)
    if options.export:
        write_export(engine, Path(options.export))
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
        if not lacks_memory(error):
            raise
        log.error("error: out of memory (%s): try --workers 1 and a small --batch-size", first_line(error))
        return 1
    except KeyboardInterrupt:
        log.error("interrupted: what was done is saved, the next run goes on from there")
        return 130
    except BrokenPipeError:  # see `print_found`
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
