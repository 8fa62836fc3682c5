"""The search at scale, on vectors that are made up, and on points mixed from those of your photographs.

    python tests/bench_million.py                       100,000 vectors of 2,048 dimensions: 2 minutes, 3 GB of disk
    python tests/bench_million.py --vectors 1000000     a million: 20 minutes, 14 GB
    python tests/bench_million.py --points FOLDER       the points of 100,000 pictures: 5 minutes, 1 GB

A process of its own for each measurement; what it takes beyond start-up (imports), and its memory beyond that. Cold:
the files of the cache were dropped from the page cache before. The peer's way is FAISS flat, fp32, loaded whole.
The collection is of empty files, one a vector.
"""

import argparse
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import main

LATENT = 256  # directions in which the vectors vary, each less than the one before, as in pooled features
CLUSTER = 50  # vectors around a centre
BLOCK = 20_000
SCAN_QUERIES = 10  # for the peers that take seconds a query


def made_up(n: int, dim: int, seed: int, of: int) -> Iterator[np.ndarray]:
    """Clustered, non-negative, long-tailed, float32 of length 1, in blocks; of any seed around the same centres, as
    many as a collection `of` so many has."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    weights = common.standard_normal((LATENT, dim), np.float32)
    weights *= (np.arange(1, LATENT + 1, dtype=np.float32) ** -0.4)[:, None]
    centres = common.standard_normal((max(1, min(of // CLUSTER, 20_000)), LATENT), np.float32)
    for start in range(0, n, BLOCK):
        count = min(BLOCK, n - start)
        latent = centres[own.integers(0, len(centres), count)] + own.standard_normal((count, LATENT), np.float32)
        x = np.maximum(latent @ weights, 0)
        x *= np.sqrt(x)
        x += 0.2 * own.random((count, dim), np.float32)
        yield x / np.linalg.norm(x, axis=1, keepdims=True)


def queries_for(dim: int, n: int) -> np.ndarray:
    (xq,) = made_up(1000, dim, seed=2, of=n)
    return xq


def model_of(dim: int, n: int) -> main.Model:
    """A query's pixels hold the number of its vector."""
    queries = queries_for(dim, n)

    def network(pixels: Any) -> Any:
        return main.torch.from_numpy(queries[[int(p.sum()) % len(queries) for p in pixels]])

    return main.Model("made-up", f"made-up-{dim}", 8, dim, "cpu", network)


def make_files(root: Path, n: int) -> None:
    for start in range(0, n, 1000):
        folder = root / f"folder-{start // 1000:05}"
        folder.mkdir(parents=True)
        for i in range(start, min(start + 1000, n)):
            os.close(os.open(folder / f"IMG_{i:08}_a_name_of_usual_length.jpg", os.O_CREAT))


def store_of(cache: Path, dim: int) -> main.Store:
    return main.Store(cache / f"made-up-{dim}", f"made-up-{dim}", dim)


def fill(store: main.Store, root: Path, blocks: Iterable[np.ndarray]) -> None:
    """Store the files below `root`, each with a vector of the blocks."""
    files = main.find_images(root, print)
    with store.locked():
        store.repair()
        for block in blocks:
            pairs = zip(block.astype(np.float16), files)
            digests = iter(lambda: os.urandom(main.DIGEST_BYTES), None)
            store.save([main.Picture(file, next(digests), vector=vector, points=b"") for vector, file in pairs])


def peak(reset: bool = False) -> float:
    """MB that this process has had in memory at most, from now on if `reset`."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def measured(name: str) -> Iterator[dict[str, float]]:
    """The seconds of what is done meanwhile, and the memory that it takes, are put into the figures."""
    figures, base, start = dict[str, float](), peak(reset=True), time.perf_counter()
    yield figures
    figures |= {f"{name} s": time.perf_counter() - start, f"{name} MB": peak() - base}


def start_up() -> None:
    """What any run of the program takes."""
    for name in ("faiss", "filelock", "torch", "torchvision", "tqdm"):
        importlib.import_module(name)
    main.image_formats()
    main.torch.zeros(2, 2) @ main.torch.zeros(2, 2)


def drop_cached(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def build(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    store = store_of(cache, dim)
    with measured("build") as figures:
        index = main.open_index(store)
    return figures | ({"recall": index.recall or 1.0, "shortlist": index.shortlist} if index.shortlist else {})


def first_answer(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    model = model_of(dim, n)
    Image.new("L", (8, 8), 3).save(image := str(cache / "query.png"))
    with measured("first") as figures:
        engine = main.initialize_reverse_image_search(images, cache, model=model, work=main.Work(update=False))
        answer = next(main.search(image, engine))
    assert len(answer.matches) == main.TOP, answer
    again = [seconds(lambda: next(main.search(image, engine))) for _ in range(20)]
    return figures | {"again ms": 1e3 * statistics.median(again)}


def batch(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    engine = main.initialize_reverse_image_search(images, cache, model=model_of(dim, n), work=main.Work(update=False))
    xq = queries_for(dim, n)

    def found_by(engine: main.Engine, xq: np.ndarray) -> list[set[bytes]]:
        lists = main.candidate_rows(engine, xq[:, None], engine.first_list)
        ranked = (main.ranked(engine, x[None], rows) for x, rows in zip(xq, lists))
        return [{it.digest for it in itertools.islice(scored, main.TOP)} for scored in ranked]

    found_by(engine, xq[: main.TOGETHER])
    start = time.perf_counter()
    blocks = (xq[i0 : i0 + main.TOGETHER] for i0 in range(0, len(xq), main.TOGETHER))
    found = [digests for block in blocks for digests in found_by(engine, block)]
    spent = time.perf_counter() - start
    true = found_by(replace(engine, exact=True), xq[:200])
    recall = np.mean([len(t & f) / main.TOP for t, f in zip(true, found)])
    return {"batch ms": 1e3 * spent / len(xq), "recall": float(recall)}


def add(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    model, folder, noise = model_of(dim, n), images / f"added-{time.time_ns()}", np.random.default_rng()
    folder.mkdir()
    for i in range(100):
        Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    start = time.perf_counter()
    engine = main.initialize_reverse_image_search(images, cache, model=model)
    spent = time.perf_counter() - start
    assert (engine.summary.opened, engine.summary.recognised) == (100, 0)
    return {"add s": spent}


def rerun(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    model = model_of(dim, n)
    with measured("rerun") as figures:
        engine = main.initialize_reverse_image_search(images, cache, model=model)
    assert engine.summary.opened == 0
    return figures


def duplicates(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    engine = main.initialize_reverse_image_search(images, cache, model=model_of(dim, n), work=main.Work(update=False))
    with measured("duplicates") as figures:
        groups = sum(1 for _ in main.find_duplicates(engine, 0.999))
    return figures | {"groups": groups}


def peer_flat(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    """What the usual script does: the index in fp32, read whole, one query."""
    xq, path = queries_for(dim, n), cache / "peer.faiss"
    with measured("first") as figures:
        index = main.faiss.read_index(str(path))
        index.search(xq[:1], main.TOP)
    again = seconds(lambda: index.search(xq[:SCAN_QUERIES], main.TOP)) / SCAN_QUERIES
    return figures | {"again ms": 1e3 * again}


def mixed(pool: np.ndarray, n: int) -> Iterator[list[bytes]]:
    """The stored points of n pictures, a thousand at a time. Each point has the place and most of the code of one in
    the pool, and the rest of another one, so that no two are equal."""
    random = np.random.default_rng(3)
    for start in range(0, n, 1000):
        one, other = random.integers(0, len(pool), (2, min(1000, n - start), main.POINTS))
        points, second = pool[one], pool[other]
        foreign = random.random(points.shape) < 0.3
        foreign[..., : main.WHERE_BYTES] = False
        points[foreign] = second[foreign]
        yield [it.tobytes() for it in points]


def photographs(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    assert found, f"there are no photographs in {folder}"
    return found[:1000]


def fill_points(photos: Path, store: main.Store, n: int) -> None:
    """Store the points of n pictures: those of the photographs of the folder, then mixed ones."""

    def points(path: Path) -> bytes:
        return main.pack_points(main.find_points(Image.open(path).convert("RGB")))

    own = list(main.read_ahead(points, photographs(photos)[:n], main.usable_cores(), 8))
    pool = np.frombuffer(b"".join(own), np.uint8).reshape(-1, main.POINT_BYTES)
    with store.locked():
        store.repair()
        for number, block in enumerate(itertools.chain([own], mixed(pool, n - len(own)))):
            files = (main.File(b"%d/%d.jpg" % (number, i), 0, 0) for i in range(len(block)))
            store.save([main.Picture(file, os.urandom(main.DIGEST_BYTES), points=it) for file, it in zip(files, block)])


def index_points(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    store = store_of(cache, dim)
    with measured("build") as figures:
        main.renewed_index(store, main.LOCAL, None)
    return figures


def look_up(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    """Photographs at half their size are looked up, once their points are found: how often has the right one most
    votes?"""
    halves = [Image.open(path).convert("RGB").reduce(2) for path in photographs(images)[:n:20]]
    pictures = [main.find_points(half, main.FINER) for half in halves]
    with measured("first") as figures:
        index = main.read_index(store_of(cache, dim), main.LOCAL)
        assert index
        first = main.votes(pictures[:1], main.nearest_points(index, pictures[:1], main.MORE_NEIGHBOURS))
    times, found = [], first
    for picture in pictures[1:]:
        start = time.perf_counter()
        found += main.votes([picture], main.nearest_points(index, [picture], main.MORE_NEIGHBOURS))
        times.append(time.perf_counter() - start)
    right = [bool(votes) and votes[0].row == 1 + 20 * number for number, votes in enumerate(found)]
    return figures | {"again ms": 1e3 * statistics.median(times), "recall": float(np.mean(right))}


STEPS: dict[str, Callable[..., dict[str, float]]] = {
    step.__name__: step
    for step in (build, first_answer, batch, add, rerun, duplicates, peer_flat, index_points, look_up)
}


def in_a_process(step: str, cold: bool, *args: Any) -> dict[str, float]:
    if cold:
        drop_cached(args[1])
    command = [sys.executable, __file__, "--step", step, *map(str, args)]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])


def measure(n: int, dim: int, folder: Path, peers: bool) -> Iterator[tuple[str, dict[str, float]]]:
    images, cache = folder / "images", folder / "cache"
    store = store_of(cache, dim)
    if not images.exists():
        make_files(images, n)
        fill(store, images, made_up(n, dim, seed=1, of=n))
    args = images, cache, dim, n
    yield "index made from stored features", in_a_process("build", True, *args)
    size = sum(path.stat().st_size for path in store.folder.iterdir())
    yield "disk", {"KB an image": size / n / 1e3}
    for kind in ("cold", "warm"):
        yield f"first answer, {kind}", in_a_process("first_answer", kind == "cold", *args)
    for kind in ("cold", "warm"):
        yield f"1,000 queries, {kind}", in_a_process("batch", kind == "cold", *args)
    yield "100 added, scan and all", in_a_process("add", False, *args)
    yield "nothing changed", in_a_process("rerun", False, *args)
    if peers:
        index = main.faiss.IndexFlatIP(dim)
        for _, block in store.blocks():
            index.add(block.astype(np.float32))
        main.faiss.write_index(index, str(cache / "peer.faiss"))
        del index
        for kind in ("cold", "warm"):
            yield f"peers: FAISS flat, {kind}", in_a_process("peer_flat", kind == "cold", *args)
        (cache / "peer.faiss").unlink()


def measure_points(n: int, photos: Path, folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    cache, part = folder / f"points {n}", folder / f"points {n}.part"
    args = photos, cache, 1, n  # there are no vectors: their dimension means nothing
    if not cache.exists():
        shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
        fill_points(photos, store := store_of(part, 1), n)
        store.db.close()
        part.rename(cache)
    yield "copies.faiss made from stored points", in_a_process("index_points", True, *args)
    yield "disk", {"KB an image": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / n / 1e3}
    for kind in ("cold", "warm"):
        yield f"points of a picture looked up, {kind}", in_a_process("look_up", kind == "cold", *args)


def run() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="keep what is made here, and use it again")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--points",
        type=Path,
        metavar="FOLDER",
        help="measure points of as many pictures, mixed from photographs there",
    )
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, images, cache, dim, n = options.step
        start_up()
        print(json.dumps(STEPS[step](Path(images), Path(cache), int(dim), int(n))))
        return
    folder = options.folder or Path(tempfile.mkdtemp())
    try:
        of_features = partial(measure, options.vectors, options.dim, folder, not options.no_peers)
        rows = measure_points(options.vectors, options.points, folder) if options.points else of_features()
        for what, figures in rows:
            print(f"{what:46}", *(f"{name} {value:.4g}  " for name, value in figures.items()), flush=True)
    finally:
        if not options.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    run()
