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
    python main.py --images ~/Pictures --index-only   bring the index of another folder up to date

images on disk → pixels → features → index → matches → terminal, JSON

Written, in image_index/<model>/ alone:
    features.bin       what the model made of each image; appended as the work goes on
    catalogue.sqlite   the files, and which features are theirs
    index.faiss        the FAISS index; made from the features whenever they have changed
"""

from __future__ import annotations

import argparse
import difflib
import errno
import faulthandler
import hashlib
import http.client
import importlib
import io
import itertools
import json
import logging
import math
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
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

IMAGES = "bulk_images"
QUERIES = "that_one_image"
INDEX_DIR = "image_index"
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
BATCH_SIZE = {"cpu": 32, "cuda": 256, "mps": 64}  # images
IN_FLIGHT, PATH_BYTES = 1024, 4096  # files that are noted while they are read, more than are ever ahead; of a path
AHEAD_BATCHES = 2  # decoded and waiting for the model: enough to overlap, bounded in memory
SAVE_SECONDS = 10  # work at risk when the process is killed; 30 are promised
CONNECT_SECONDS = 10  # torch.hub sets no timeout of its own and would hang for minutes
DRAFT = 2  # a JPEG is decoded at the smallest scale that leaves this many times the model's side
MAX_PIXELS = 100_000_000  # to decode, after JPEG scaling: 0.4 GB as Pillow holds them; phones reach 200 million in JPEG
HEADER_READS = 1_000_000  # of a few bytes each, half a second
LARGE_PIXELS = 24_000_000  # images above it are decoded one at a time, so that memory stays bounded
BAND_PIXELS = 4_000_000  # converted at once, so that a large image is held twice at most
BLOCK = 4096  # records handled at once: 16 MB at 2048 dimensions
DIGEST_BYTES = 16  # of SHA-256
FORMAT = 1  # of the cache; raise it when a reader of the old one would go wrong
PREPROCESSING = 1  # part of the model's identity; raise it when the same file would get other pixels
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


@dataclass(frozen=True)
class Model:
    """From pixels, uint8 (B, 3, side, side), to features, float32 (B, dim)."""

    name: str
    identity: str  # name, hash of the weights, preprocessing, dimension: the name of its folder in the cache
    side: int
    dim: int
    device: str
    network: Callable[..., torch.Tensor]
    resample: str = "bilinear"


@dataclass(frozen=True)
class Work:
    """How to go about an update."""

    batch_size: int | None = None  # images; None: by device
    workers: int | None = None  # threads that read and decode; None: one a core
    rebuild: bool = False  # extract the features of all images again
    prune: bool = False  # forget the files that are gone


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

    def __str__(self) -> str:
        known = f" ({self.recognised:,} recognised by content)" if self.recognised else ""
        pruned = f", {self.forgotten:,} forgotten" if self.forgotten else ""
        spent = f"{self.reading:.1f} s reading, {self.computing:.1f} s in the model"
        return (
            f"{self.images + self.skipped:,} found, {self.new:,} new{known}, {self.images - self.new:,} unchanged, "
            f"{self.skipped:,} skipped, {self.gone:,} gone{pruned}; {spent if self.opened else 'no image was opened'}"
        )


# ---- Images ----------------------------------------------------------------------------------------------------------


def find_images(
    folder: str | Path, onerror: Callable[[OSError], None], without: Sequence[str | Path] = ()
) -> Iterator[File]:
    """Every file below `folder` that may be an image, in a fixed order, but for the folders `without`.

    Links are followed, each folder once. `onerror` is told of a folder that cannot be listed.
    """
    visited = {(info.st_dev, info.st_ino) for info in map(os.stat, without)}
    waiting = [b""]
    while waiting:
        relative = waiting.pop()
        here = os.path.join(os.fsencode(folder), relative)
        try:
            info = os.stat(here)
            if (info.st_dev, info.st_ino) in visited:
                continue
            visited.add((info.st_dev, info.st_ino))
            with os.scandir(here) as listing:
                kept = (e for e in listing if not e.name.startswith(b".") and e.name.lower() not in PASSED_OVER)
                entries = sorted(kept, key=lambda entry: entry.name)
        except OSError as error:
            onerror(error)
            continue
        folders = []
        for entry in entries:
            path = os.path.join(relative, entry.name)
            try:
                info = entry.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):  # a link to nowhere, or gone since it was listed
                    onerror(error)
                continue
            if stat.S_ISDIR(info.st_mode):
                folders.append(path)
            else:
                yield as_found(path, info)
        waiting += reversed(folders)


@cache
def image_formats() -> tuple[list[str], set[str], str]:
    """The formats that can be decoded here, the suffixes of their names, and the version of the decoders."""
    Image.init()
    # Pillow refuses a header of more than twice as many; `Image` itself is Lazy and would keep it to itself.
    vars(sys.modules["PIL.Image"])["MAX_IMAGE_PIXELS"] = MAX_PIXELS
    version = Image.__version__
    try:
        heif = importlib.import_module("pillow_heif")
        heif.register_heif_opener()
        version += f", pillow_heif {heif.__version__}"
    except ImportError:
        pass
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
        return np.nan_to_num(np.array(image.crop(box), np.float32), copy=False, posinf=0, neginf=0)

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
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:  # malformed EXIF raises anything, and says nothing of the orientation
            pass
        if image.mode[0] in "IF":
            image = to_8_bits(image)
        if image.mode == "RGB" and not image.has_transparency_data:
            return image
        whole = Image.new("RGB", image.size)
        for box in bands(image):
            whole.paste(flattened(image.crop(box)), box)
        return whole


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


def assemble_model(
    name: str, network: torch.nn.Module, device: str, side: int, mean: Sequence[float], std: Sequence[float],
    resample: str,
) -> Model:  # fmt: skip
    sha = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        sha.update(key.encode() + value.numpy().tobytes())
    network = network.eval().to(device)
    centre, spread = (torch.tensor(list(values), device=device).view(3, 1, 1) for values in (mean, std))

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.float16, enabled=device == "cuda"):
            return network((pixels.float() / 255 - centre) / spread).float().flatten(1)

    with torch.inference_mode():
        dim = forward(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)).shape[1]
    identity = re.sub(r"[^\w.-]", "-", f"{name}-{sha.hexdigest()[:8]}-p{PREPROCESSING}-{dim}")
    return Model(name, identity, side, dim, device, forward, resample)


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
    entry = listed.get(str(weights or WEIGHTS), listed["DEFAULT"])
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


def load_model(name: str | None = None, weights: str | Path | None = None, device: str = "auto") -> Model:
    """The network that turns pixels into features, its classifier removed.

    name     resnet50, any classification model of torchvision, timm:NAME, or offline. By default resnet50, and where
             its weights cannot be had, offline, with a warning
    weights  the name of torchvision weights (IMAGENET1K_V1), hash-checked when downloaded, or a local file of tensors
    device   auto, cpu, cuda or mps

    Raises DeepVisionError for an unknown name or device, and for weights that are missing, corrupt or do not fit.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(kind for kind in there if there[kind])
    elif not there.get(device):
        raise DeepVisionError(f"--device {device}: torch {torch.__version__} finds none on this machine")
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
    resized = image.resize((width, height), Image.Resampling[resample.upper()])
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def get_transform(side: int = SIDE, resample: str = "bilinear") -> Callable[[Image.Image], torch.Tensor]:
    """From a Pillow image of any kind to the pixels that a model takes, uint8 (3, side, side).

    side, resample  as the model has them: `get_transform(model.side, model.resample)`; by default those of ResNet50

    The whole picture is squeezed into a square: a crop of its centre would lose what stands at the edges.
    """
    return lambda image: squeeze(to_rgb(image, side), side, side, resample)


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
        raise ValueError(
            f"pixels are {tuple(images.shape[1:])}, but {model.name} takes (3, {model.side}, {model.side})"
        )
    with torch.inference_mode():
        return torch.nn.functional.normalize(model.network(images.to(model.device))).cpu().numpy()


def with_features(
    files: Iterable[File], root: str | Path, model: Model, work: Work, known: Callable[[bytes], bool], summary: Summary
) -> Iterator[list[Picture]]:
    """Read `files` and extract features, a batch at a time and in order. `summary` takes the time."""
    size, workers = work.batch_size or BATCH_SIZE[model.device], work.workers or os.cpu_count() or 1
    transform = get_transform(model.side, model.resample)
    read = partial(read_picture, root=os.fsencode(root), transform=transform, known=known)
    pictures = read_ahead(read, files, workers, AHEAD_BATCHES * size + workers)
    start = time.perf_counter()
    while batch := list(itertools.islice(pictures, size)):
        summary.reading += (middle := time.perf_counter()) - start
        pixels = [picture.pixels for picture in batch if picture.pixels is not None]
        vectors = iter(extract_features_batch(torch.stack(pixels), model).astype(np.float16) if pixels else ())
        batch = [p if p.pixels is None else p._replace(pixels=None, vector=next(vectors)) for p in batch]
        summary.computing += (spent := time.perf_counter() - middle)
        size = max(1, size // 2) if spent > SAVE_SECONDS else size  # what is under way is not saved yet
        yield batch
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
    turns = range(1, 4 if views == "all" or model.name == OFFLINE else 1)
    found += [
        View(f"{view.name}, turned {90 * quarters}°".lstrip(", "), view.pixels.rot90(quarters, (1, 2)))
        for quarters in turns
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
    with torch.inference_mode():
        features = [model.network(torch.stack(whole).to(model.device))]
        for view in views[len(whole) :]:
            features.append(model.network(view.pixels[None].to(model.device), view.top, view.left))
        return torch.nn.functional.normalize(torch.cat(features)).cpu().numpy().astype(np.float16)


# ---- Catalogue -------------------------------------------------------------------------------------------------------


SCHEMA = [
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    # Every file that was ever read; without digest and reason: not an image.
    "CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, digest BLOB, reason TEXT, decoders TEXT)"
    " WITHOUT ROWID",
    "CREATE INDEX files_by_digest ON files (digest)",
    "CREATE TABLE features (digest BLOB PRIMARY KEY, row INTEGER NOT NULL UNIQUE) WITHOUT ROWID",
]
DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)  # the latter of a message that quotes a damaged schema
SEEN = """DROP TABLE IF EXISTS temp.seen; DROP TABLE IF EXISTS temp.unread;
    CREATE TEMP TABLE seen (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER) WITHOUT ROWID"""
UNREAD = """CREATE TEMP TABLE unread AS SELECT * FROM seen WHERE ? OR NOT EXISTS (
    SELECT 1 FROM files WHERE files.path = seen.path AND files.size = seen.size AND files.mtime = seen.mtime
    AND CASE WHEN digest IS NULL THEN decoders = ? ELSE digest IN (SELECT digest FROM features) END) ORDER BY path"""
USABLE = "seen JOIN files USING (path) WHERE digest IS NOT NULL"  # the usable images of the collection
SKIPPED = "seen JOIN files USING (path) WHERE reason IS NOT NULL"
GONE = f"""files WHERE digest IS NOT NULL AND path NOT IN (SELECT path FROM seen)
    AND digest NOT IN (SELECT digest FROM {USABLE})"""  # a file that was only moved is not gone


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place only when it is whole and on disk."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # the new name is durable when the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


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
    two still fit each other, and each is mended from what holds of the other.
    """

    HEADER = 16  # bytes

    def __init__(self, folder: Path, identity: str, dim: int) -> None:
        self.folder, self.identity = folder, identity
        self.features, self.index = folder / "features.bin", folder / "index.faiss"
        self.record = np.dtype([("digest", f"V{DIGEST_BYTES}"), ("vector", "<f2", dim), ("checksum", "<u4")])
        self.trusted_from = 0  # features of earlier rows are extracted again: --rebuild
        folder.mkdir(parents=True, exist_ok=True)
        self.lock, self.one_lookup = filelock.FileLock(folder / "lock"), threading.Lock()
        self.connect()

    def connect(self) -> None:
        path = self.folder / "catalogue.sqlite"
        if not path.exists():
            path.touch()
        self.inode = path.stat().st_ino
        self.db, self.lookup = (sqlite3.connect(path, timeout=60, check_same_thread=False) for _ in range(2))
        self.db.text_factory = partial(str, encoding="utf-8", errors="replace")

    def close(self) -> None:
        self.db.close()
        self.lookup.close()

    def get(self, key: str) -> Any:
        return next(iter(self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone() or [None]))

    def put(self, **values: Any) -> None:
        self.db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())

    def count(self, table: str) -> int:
        return self.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """As the only run that may write; True if another one had to be waited for."""
        waited = False
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            log.warning("another run is writing %s: waiting for it", self.folder)
            waited = bool(self.lock.acquire())
        try:
            yield waited
        finally:
            self.lock.release()

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """As `locked`, and sure that no other run has made the catalogue anew since it was opened here."""
        with self.locked() as waited:
            if (self.folder / "catalogue.sqlite").stat().st_ino != self.inode:
                raise sqlite3.DatabaseError("another run has made the catalogue anew")
            yield waited

    def check(self) -> None:
        """Raise DatabaseError if this is not whole; which of the features are broken is for `compact` to find."""
        version = self.db.execute("PRAGMA user_version").fetchone()[0]
        if version > FORMAT:
            raise DeepVisionError(
                f"{self.folder} was written by a newer DeepVision (format {version}, this one knows {FORMAT}): update "
                "DeepVision, or choose another --index-dir"
            )
        schema = self.db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid").fetchall()
        if version < FORMAT or schema != [(sql,) for sql in SCHEMA]:
            raise sqlite3.DatabaseError("there is no catalogue of this format")
        if (verdict := self.db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(f"the catalogue is corrupt: {first_line(ValueError(verdict))}")
        with self.db:
            self.db.execute("BEGIN")  # both of one moment, whatever another run adds meanwhile
            meta = dict(self.db.execute("SELECT key, value FROM meta").fetchall())
            count, end = self.db.execute("SELECT count(*), ifnull(max(row) + 1, 0) FROM features").fetchone()
        if meta.get("identity") != self.identity:
            raise sqlite3.DatabaseError("the catalogue is another model's")
        counts = [meta.get("rows"), meta.get("superseded")]
        if counts != [end, end - count] or end > self.stored() or meta.get("generation") != self.generation():
            raise sqlite3.DatabaseError("the features are not those that the catalogue speaks of")
        if meta.get("checksum") != file_checksum(self.features, self.HEADER + end * self.record.itemsize):
            raise sqlite3.DatabaseError("the features do not match their checksum")

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
                had, why = self.stored(), error
                new = not self.features.exists() and not (self.folder / "catalogue.sqlite").stat().st_size
            self.remake()
            if not new:
                log.warning("%s: %s. Repaired: %d of %d features hold", self.folder, why, self.get("rows"), had)

    def remake(self) -> None:
        columns, files = "path, size, mtime, digest, reason, decoders", []
        try:
            if self.get("identity") == self.identity:
                files = self.db.execute(f"SELECT {columns} FROM files").fetchall()
        except DAMAGE:
            pass
        self.close()
        for name in ("catalogue.sqlite-journal", "catalogue.sqlite"):
            (self.folder / name).unlink(missing_ok=True)
        self.connect()
        self.db.executescript(f"BEGIN; {';'.join(SCHEMA)}; PRAGMA user_version = {FORMAT}; COMMIT")
        with self.db:
            self.put(identity=self.identity)
            self.db.executemany("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?)", files)
        self.compact()

    def compact(self, kept: Callable[[bytes], bool] = lambda digest: True) -> None:
        """Begin a new generation, with the newest intact record of each content that is `kept`."""
        newest = {}
        for row, records in self.records():
            for i in np.flatnonzero(self.checksums(records) == records["checksum"]).tolist():
                newest[records["digest"][i].tobytes()] = row + i
        rows = np.array(sorted(row for digest, row in newest.items() if kept(digest)), np.int64)
        generation, digests = os.urandom(self.HEADER), list[bytes]()
        with whole_file(self.features) as stream:
            stream.write(generation)
            for row, records in self.records():
                chosen = records[rows[(row <= rows) & (rows < row + len(records))] - row]
                stream.write(chosen.tobytes())
                digests += [digest.tobytes() for digest in chosen["digest"]]
        with self.db:
            self.db.execute("DELETE FROM features")
            self.db.executemany("INSERT INTO features VALUES (?, ?)", zip(digests, itertools.count()))
            checksum = file_checksum(self.features)
            self.put(generation=generation, rows=len(digests), superseded=0, checksum=checksum, index=None)

    def generation(self) -> bytes | None:
        try:
            with open(self.features, "rb") as stream:
                return stream.read(self.HEADER)
        except OSError:
            return None

    def stored(self) -> int:
        """Whole records in features.bin; those after the first `rows` are not the catalogue's, or not yet."""
        size = self.features.stat().st_size if self.features.is_file() else 0
        return max(0, size - self.HEADER) // self.record.itemsize

    def records(self) -> Iterator[tuple[int, np.ndarray]]:
        """The row of the first, and the records, of each block."""
        stored, size = self.stored(), self.record.itemsize
        for row in range(0, stored, BLOCK):
            count, offset = min(BLOCK, stored - row), self.HEADER + row * size
            yield row, np.fromfile(self.features, self.record, count, offset=offset)

    def checksums(self, records: np.ndarray) -> np.ndarray:
        """Of identity, hash and vector in one: no vector holds beside another's hash, or in another model's cache."""
        seed, end = zlib.crc32(self.identity.encode()), self.record.itemsize - 4
        return np.array([zlib.crc32(record.tobytes()[:end], seed) for record in records], np.uint32)

    def vectors(self) -> Iterator[np.ndarray]:
        """All features in blocks, fp16 (n, dim). Raises DatabaseError if one does not match its checksum."""
        for row, records in self.records():
            records = records[: max(0, self.get("rows") - row)]
            query = "SELECT row, digest FROM features WHERE row BETWEEN ? AND ?"
            listed = dict(self.db.execute(query, (row, row + len(records) - 1)).fetchall())
            broken = self.checksums(records) != records["checksum"]
            broken |= [listed.get(row + i, d.tobytes()) != d.tobytes() for i, d in enumerate(records["digest"])]
            if broken.any():
                with self.db:
                    self.put(generation=None)  # `check` refuses it from now on
                raise sqlite3.DatabaseError(f"{broken.sum()} features do not match their checksum or the catalogue")
            yield records["vector"]

    def is_known(self, digest: bytes) -> bool:
        with self.one_lookup:  # asked by the threads that read, who must not share a connection unguarded
            found = self.lookup.execute("SELECT row FROM features WHERE digest = ?", (digest,)).fetchall()
        return any(row >= self.trusted_from for (row,) in found)

    def save(self, pictures: Sequence[Picture]) -> None:
        """Make pictures and their features durable: first the features, then, at once, the files they belong to."""
        extracted = {p.digest: p.vector for p in pictures if p.digest and p.vector is not None and not p.vanished}
        fresh = {digest: vector for digest, vector in extracted.items() if not self.is_known(digest)}
        records, rows = np.array([(*record, 0) for record in fresh.items()], self.record), self.get("rows")
        records["checksum"] = self.checksums(records)
        with open(self.features, "r+b") as stream:
            stream.seek(self.HEADER + rows * self.record.itemsize)
            stream.write(records.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        there = [(*p.file, p.digest, p.reason, image_formats()[2]) for p in pictures if not p.vanished]
        with self.db:
            self.db.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", zip(fresh, itertools.count(rows)))
            self.db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", there)
            self.db.executemany("DELETE FROM seen WHERE path = ?", [(p.file.path,) for p in pictures if p.vanished])
            end, checksum = rows + len(fresh), zlib.crc32(records.tobytes(), self.get("checksum"))
            self.put(rows=end, superseded=end - self.count("features"), checksum=checksum)

    def scan(self, files: Iterable[File], everything: bool) -> int:
        """Take down what lies in the collection now, and choose what to read of it: what is new or changed, what
        other decoders could not use, and what has lost its features. How many files that is."""
        with self.db:
            self.db.executescript(SEEN)
            self.db.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", files)
            self.db.execute(UNREAD, (everything, image_formats()[2]))
        return self.count("unread")

    def unread(self) -> Iterator[File]:
        return map(File._make, self.db.execute("SELECT * FROM unread"))

    def prune(self) -> None:
        """Forget the files that are gone, and the features that no file is left of."""
        with self.db:
            self.db.execute("DELETE FROM files WHERE path NOT IN (SELECT path FROM seen)")
        self.compact(lambda d: self.db.execute("SELECT 1 FROM files WHERE digest = ?", (d,)).fetchone() is not None)

    def live_rows(self, order: str = "row", limit: int = -1) -> np.ndarray:
        """The rows that belong to a file of the collection; the other files are gone.

        Ordered by digest, the first ones are a sample that does not depend on the order in which files were added.
        """
        query = f"SELECT row FROM features WHERE digest IN (SELECT digest FROM {USABLE}) ORDER BY {order} LIMIT {limit}"
        return np.fromiter((row for (row,) in self.db.execute(query)), np.int64)

    def files_of(self, row: int, limit: int) -> list[tuple[bytes, bytes]]:
        """Path and content hash of the files of the collection with these features."""
        query = """SELECT path, digest FROM features JOIN files USING (digest) JOIN seen USING (path)
            WHERE row = ? ORDER BY path LIMIT ?"""
        return self.db.execute(query, (row, limit)).fetchall()

    def read_index(self) -> faiss.Index | None:
        """The stored index, mapped into memory, if it is whole and of just these features."""
        try:
            if self.get("index") == f"{self.get('rows')} {file_checksum(self.index)}":
                return faiss.read_index(str(self.index), faiss.IO_FLAG_MMAP_IFC if os.name == "posix" else 0)
        except (FileNotFoundError, IsADirectoryError):
            pass
        return None

    def write_index(self, index: faiss.Index) -> None:
        with whole_file(self.index) as stream:
            faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
        with self.db:
            self.put(index=f"{index.ntotal} {file_checksum(self.index)}")


# ---- Index and search ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """What a search needs; `initialize_reverse_image_search` makes it."""

    images: Path
    model: Model
    catalogue: Catalogue
    generation: bytes | None  # of the catalogue: another one has other rows
    index: faiss.Index
    live: np.ndarray  # int64, the rows of the index that belong to a file of the collection
    selector: faiss.IDSelector | None  # of these rows; None if they are all there are
    sample: np.ndarray  # features of some of them, float32 (m, dim)
    limits: dict[str, float]  # of the labels, see `chance_limits`
    summary: Summary


def build_index(features: np.ndarray | Iterable[np.ndarray]) -> faiss.Index:
    """A FAISS index of `features`: (n, dim), of any float type, each of length 1; or an iterator of such blocks.

    It is exact: a search compares with every vector, by inner product. They are stored as fp16, as the cache has them.
    Raises ValueError if there are none, not even of no rows.
    """
    index = None
    for block in [features] if isinstance(features, np.ndarray) else features:
        dim = block.shape[1]
        index = index or faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        for i0 in range(0, len(block), BLOCK):
            index.add(np.ascontiguousarray(block[i0 : i0 + BLOCK], np.float32))
    if index is None:
        raise ValueError("build_index was given no features")
    return index


def open_index(catalogue: Catalogue) -> faiss.Index:
    """The index of the stored features, made first if they have changed."""
    if (index := catalogue.read_index()) is None:
        with catalogue.writing():
            if (index := catalogue.read_index()) is None:  # no other run has made it meanwhile
                if str(catalogue.get("index")).startswith(f"{catalogue.get('rows')} "):
                    log.warning("%s is damaged or missing: it is made again from the features", catalogue.index)
                catalogue.write_index(build_index(catalogue.vectors()))
                index = catalogue.read_index()
    return index


def nearest(engine: Engine, xq: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores D and rows I, (nq, >= k), of the live rows nearest to each of xq, (nq, dim).

    All rows that tie with the k-th are among them: their order is then the caller's, and top k a prefix of top k+n.
    """
    n, params = len(engine.live), None
    if engine.selector is not None:
        params = faiss.SearchParameters(sel=engine.selector)
    fetch = k
    while True:
        fetch = min(2 * fetch, n)
        D, I = engine.index.search(xq, fetch, params=params)
        if fetch == n or (D[:, k - 1] > D[:, -1]).all():
            return D, I


def location(path: str) -> str:
    """Where a file lies, not where it points: a link to an image of the collection is a query like any other."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def own_distance(scores: np.ndarray) -> np.ndarray:
    """From an image's scores with the sample, (..., m), to how far a near but unrelated image is, (...)."""
    rank = int(scores.shape[-1] * (1 - OWN))
    return np.maximum(1 - np.partition(scores, rank, axis=-1)[..., rank], 1e-6)


def find_matches(engine: Engine, query: Picture, k: int, threshold: float | str) -> list[Match]:
    """The best view counts, and the first of equal ones, which is the query as it is."""
    least, label = (-1.0, threshold) if isinstance(threshold, str) else (threshold, LABELS[0])
    best: dict[int, tuple[float, str]] = {}
    xq = features_of_views(query.pixels, engine.model).astype(np.float32)
    for view, scores, rows in zip(query.pixels, *nearest(engine, xq, k + 1)):  # one more, for the query's own file
        for score, row in zip(scores.clip(-1, 1).tolist(), rows.tolist()):
            if round(score, 3) >= least and score > best.get(row, (-2.0, ""))[0]:
                best[row] = score, view.name
    own, reach = location(os.fsdecode(query.file.path)), own_distance((xq @ engine.sample.T).max(0))
    found: list[tuple[float, str, str, str]] = []
    for row in sorted(best, key=lambda row: -best[row][0]):
        score, edit = best[row]
        if len(found) > k and -score > found[k][0]:
            break
        word = "weak" if engine.limits else ""
        word = next((name for name, limit in engine.limits.items() if 1 - score <= limit * reach), word)
        for name, digest in engine.catalogue.files_of(row, k + 1):
            path = os.path.join(engine.images, os.fsdecode(name))
            if digest != query.digest or location(path) != own:
                found.append((-score, path, "identical" if digest == query.digest else word, edit))
    kept = [item for item in sorted(found) if label == LABELS[0] or item[2] in LABELS[LABELS.index(label) :]]
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

    Exact, best first, equal scores by path; the query's own file is left out. A file that cannot be used gets an Answer
    with an `error`. Raises DeepVisionError if another run has pruned or rebuilt the index since it was opened.
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
    for picture in read_ahead(read, files, workers=2, ahead=4):  # a query has some twenty views
        if engine.catalogue.generation() != engine.generation:
            raise DeepVisionError(f"{engine.catalogue.folder} was changed by another run: search once more")
        name = os.fsdecode(picture.file.path)
        if picture.pixels is None:
            yield Answer(name, [], picture.reason or NOT_AN_IMAGE)
        else:
            yield Answer(name, find_matches(engine, picture, k, threshold))


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


# ---- Assembly --------------------------------------------------------------------------------------------------------


def unlisted(error: OSError, prune: bool = False) -> None:
    """A folder that cannot be listed is passed over, but must not make `--prune` forget what lies in it."""
    what = f"{shown(os.fsdecode(error.filename))} cannot be listed ({error.strerror})"
    if prune:
        raise DeepVisionError(f"{what}: nothing was pruned")
    log.warning("%s", what)


def sifted(files: Iterable[File], catalogue: Catalogue, images: Path) -> Iterator[File]:
    """The files, but for those whose decoder crashes: that ends the run, but it leaves a note of the files that were
    being read and its last words, and the next run looks into it."""
    note, root = catalogue.folder / "reading", os.fsencode(images)
    told = note.read_bytes() if note.is_file() else b""
    crashed = b"Fatal Python error" in told
    bad = crashing([os.path.join(root, path) for path in told.split(b"\0") if path]) if crashed else ()
    try:
        note.unlink(missing_ok=True)
        stream = io.FileIO(note, "x")
    except OSError:  # it can be done without
        stream = io.FileIO(os.devnull, "w")
    with stream:
        faulthandler.enable(stream)
        try:
            for i, file in enumerate(files):
                if os.path.join(root, file.path) in bad:
                    catalogue.save([Picture(file, reason="its decoder crashes")])
                    continue
                with suppress(OSError):
                    stream.seek(i % IN_FLIGHT * PATH_BYTES)
                    stream.write(file.path.ljust(PATH_BYTES, b"\0"))
                    stream.seek(IN_FLIGHT * PATH_BYTES)  # where the last words belong
                yield file
        finally:
            faulthandler.disable()
            with suppress(OSError):
                note.unlink(missing_ok=True)


def read_new(catalogue: Catalogue, images: Path, model: Model, work: Work, summary: Summary) -> None:
    """The features of the files chosen, into the cache: every few seconds, and whatever ends the run."""
    unsaved: list[Picture] = []
    saved, label = time.monotonic(), f"{model.name} on {model.device}"
    quiet = None if log.isEnabledFor(logging.INFO) else True  # None: on a terminal alone
    with tqdm.tqdm(total=catalogue.count("unread"), desc=label, unit="img", disable=quiet) as bar:
        try:
            files = sifted(catalogue.unread(), catalogue, images)
            for pictures in with_features(files, images, model, work, catalogue.is_known, summary):
                unsaved += pictures
                usable = [picture for picture in pictures if picture.digest and not picture.vanished]
                summary.opened += len(pictures)
                summary.new += len(usable)
                summary.recognised += sum(picture.vector is None for picture in usable)
                bar.update(len(pictures))
                if time.monotonic() - saved > SAVE_SECONDS:
                    catalogue.save(unsaved)
                    unsaved, saved = [], time.monotonic()
        finally:
            catalogue.save(unsaved)


def update(catalogue: Catalogue, images: Path, model: Model, work: Work) -> Summary:
    """Bring the cache up to date with the folder `images`: read what is new or changed, see what is gone.

    Raises DeepVisionError if no usable image is there; what is known is kept for the day the drive is back.
    """
    summary = Summary()
    there = "has no usable image" if images.is_dir() else "is not a folder" if images.exists() else "is missing"
    scan: Callable[[], Iterable[File]] = tuple
    if images.is_dir():
        scan = partial(find_images, images, partial(unlisted, prune=work.prune), [catalogue.folder.parent])
    if catalogue.scan(scan(), work.rebuild) or work.prune:
        with catalogue.writing() as waited:
            if waited:
                catalogue.scan(scan(), work.rebuild)
            before = catalogue.get("rows")
            catalogue.trusted_from = before if work.rebuild else 0
            read_new(catalogue, images, model, work, summary)
            if catalogue.count(USABLE):
                if work.prune:
                    summary.forgotten = catalogue.count(GONE)
                    earlier = f"digest IN (SELECT digest FROM features WHERE row < {before})"
                    if summary.forgotten and not catalogue.count(f"{USABLE} AND {earlier}"):
                        raise DeepVisionError(f"nothing in {images} is known to its index: nothing was pruned")
                    catalogue.prune()
                elif work.rebuild:
                    catalogue.compact()
    summary.images, summary.skipped, summary.gone = map(catalogue.count, (USABLE, SKIPPED, GONE))
    if summary.images:
        return summary
    if summary.gone:
        raise DeepVisionError(
            f"{images} {there}, but the index knows {summary.gone:,}: is a drive not connected, or is --images "
            f"another folder? Nothing was changed; to start afresh, delete {catalogue.folder}"
        )
    if summary.skipped:
        query = f"SELECT count(*), reason FROM {SKIPPED} GROUP BY reason ORDER BY 1 DESC, 2 LIMIT 3"
        reasons = "; ".join(f"{n:,} × {reason}" for n, reason in catalogue.db.execute(query))
        raise DeepVisionError(f"{images} {there}, all {summary.skipped:,} were skipped: {reasons}")
    raise DeepVisionError(f"{images} {there}: put images to search in there, or name another folder with --images")


def ready(catalogue: Catalogue, images: Path, model: Model, work: Work) -> Engine:
    catalogue.check()
    summary = update(catalogue, images, model, work)
    generation, live, sampled = catalogue.generation(), catalogue.live_rows(), catalogue.live_rows("digest", SAMPLE)
    index = open_index(catalogue)
    if catalogue.generation() != generation:  # the rows are not those of the index
        raise DeepVisionError(f"{catalogue.folder} was changed by another run: start again")
    sample = index.reconstruct_batch(sampled)
    limits = chance_limits(sample, len(live))
    selector = None
    if len(live) < index.ntotal:
        selector = faiss.IDSelectorBitmap(np.packbits(np.isin(np.arange(index.ntotal), live), bitorder="little"))
    return Engine(images, model, catalogue, generation, index, live, selector, sample, limits, summary)


def initialize_reverse_image_search(
    images: str | Path = IMAGES, index_dir: str | Path = INDEX_DIR, *, model: Model | None = None, work: Work = Work()
) -> Engine:
    """Bring the index of the folder `images` up to date, and make it ready for `search`.

    images     the collection, a folder; files in it are searched for at any depth
    index_dir  the cache of this collection; it has a sub-folder for each model
    model      by default `load_model()`
    work       batch size, threads, and whether to rebuild or prune

    Raises DeepVisionError if there is no usable image, or the cache cannot be written or is a newer version's.
    """
    if os.path.realpath(images) == os.path.realpath(index_dir):
        raise DeepVisionError(f"--index-dir {index_dir} is the collection itself: choose another folder for the cache")
    model, images = model or load_model(), Path(images)
    folder = Path(index_dir, model.identity)
    if model.name == MODEL and not folder.exists() and any(Path(index_dir).glob(f"{OFFLINE}-*")):
        log.warning("the weights of %s are here now: all images are indexed with it; the offline index is kept", MODEL)
    try:
        catalogue = Catalogue(folder, model.identity, model.dim)
        try:
            return ready(catalogue, images, model, work)
        except sqlite3.OperationalError:
            raise  # no room, no right: nothing is wrong with what is there
        except DAMAGE:  # or it is new
            catalogue.mend()
            return ready(catalogue, images, model, work)
    except (OSError, sqlite3.Error, NotImplementedError) as error:  # the last of a file system without locks
        raise DeepVisionError(
            f"the cache {folder} cannot be used: {first_line(error)}. What was there is untouched; make room or mend "
            "its permissions, or choose another place with --index-dir"
        ) from error


# ---- Output ----------------------------------------------------------------------------------------------------------


def as_text(answer: Answer, engine: Engine) -> str:
    """A heading line, then `rank  score  path  label, view` for each match."""
    heading = f"{shown(answer.query)}  ({engine.model.name}, {engine.summary.images:,} images)"
    if not answer.matches:
        heading += ": no match"
    elif answer.matches[0].label in ("weak", "similar"):
        heading += ": no confident match"
    lines, width = [heading], len(str(len(answer.matches)))
    for rank, path, score, _, label, view in answer.matches:
        remark = ", ".join(filter(None, (label, view)))
        lines.append(f"  {rank:>{width}}  {score:6.3f}  {shown(path)}  {remark}".rstrip())
    return "\n".join(lines)


def as_json(answer: Answer, engine: Engine) -> str:
    """One object on one line, in ASCII, so that any file name makes valid JSON."""
    if answer.error:
        return json.dumps({"query": answer.query, "error": answer.error})
    matches = [match._replace(score=round(match.score, 6))._asdict() for match in answer.matches]
    return json.dumps({"query": answer.query, "model": engine.model.name, "matches": matches})


# ---- Command line ----------------------------------------------------------------------------------------------------


def score_or_label(text: str) -> float | str:
    if text in LABELS:
        return text
    try:
        if -1 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is neither a cosine similarity, -1 to 1, nor {', '.join(LABELS)}")


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
    add("--index-only", action="store_true", help="update the index, search nothing")
    add("--rebuild", action="store_true", help="start again from the images")
    add("--prune", action="store_true", help="forget files that are gone, and their features")
    add("--json", action="store_true", help="one JSON object per query, a line each")
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", action="store_true", help="warnings and errors alone")
    volume.add_argument("-v", "--verbose", action="store_true", help="name the files that were skipped")
    options = parser.parse_args(argv)
    if not (options.images and options.index_dir):
        parser.error("--images and --index-dir take a folder")
    for option in ("top", "batch_size", "workers"):
        if (value := getattr(options, option)) is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} takes a whole number from 1 on, not {value}")
    return options


def find_queries(names: Iterable[str], onerror: Callable[[OSError], None]) -> Iterator[str]:
    """The files named, and those in the folders named."""
    for name in names:
        if os.path.isdir(name):
            for file in find_images(name, onerror):
                yield os.path.join(name, os.fsdecode(file.path))
        else:
            yield name


def run(options: argparse.Namespace) -> int:
    """The main job; its exit status."""
    model = load_model(options.model, options.weights, options.device)
    work = Work(options.batch_size, options.workers, options.rebuild, options.prune)
    engine = initialize_reverse_image_search(options.images, options.index_dir, model=model, work=work)
    log.info("%s: %s (%s on %s)", options.images, engine.summary, model.name, model.device)
    for path, reason in engine.catalogue.db.execute(f"SELECT path, reason FROM {SKIPPED} ORDER BY path"):
        log.debug("skipped %s: %s", shown(os.path.join(options.images, os.fsdecode(path))), reason)
    if options.index_only:
        return 0
    answered = failed = 0
    locked: list[OSError] = []
    queries = find_queries(options.queries or filter(os.path.isdir, [QUERIES]), locked.append)
    for answer in search(queries, engine, k=options.top, threshold=options.threshold, views=options.views):
        if answer.error == NOT_AN_IMAGE and answer.query not in options.queries:
            continue  # some other file in a folder of queries
        answered += 1
        if answer.error:
            failed += 1
            log.error("%s: %s", shown(answer.query), answer.error)
        if options.json or not answer.error:
            print((as_json if options.json else as_text)(answer, engine), flush=True)
    for error in locked:
        log.error("%s cannot be listed (%s)", shown(os.fsdecode(error.filename)), error.strerror)
    if not answered and not locked:
        where = ", ".join(options.queries) or f"{QUERIES}/"
        raise DeepVisionError(f"no image to search with in {where}: put one there, or name it: main.py photo.jpg")
    return 1 if failed or locked else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 all queries answered, 1 something failed, 2 usage, 130 interrupted."""
    options = parse_arguments(argv)
    log.handlers = [logging.StreamHandler()]
    log.setLevel(logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO)
    warnings.filterwarnings("ignore", message="tqdm:")  # has no memory for a thread of its own, and needs none
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow doubts is either read or skipped with a reason
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name that is not UTF-8 comes out byte for byte; what an older code page lacks, as an escape.
            utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
            sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
        return run(options)
    except DeepVisionError as error:
        log.error("error: %s", error)
        return 1
    except (MemoryError, RuntimeError, ImportError) as error:
        if not (isinstance(error, MemoryError) or NO_MEMORY.search(str(error))):
            raise
        log.error(
            "error: out of memory (%s): free some, or try --workers 1 and a small --batch-size", first_line(error)
        )
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
