"""The search at scale, on vectors that are made up: no image is needed.

    python tests/bench_million.py                       100,000 vectors of 2,048 dimensions: 2 minutes, 3 GB of disk
    python tests/bench_million.py --vectors 1000000     a million: 20 minutes, 14 GB

A process of its own for each measurement; what it takes beyond start-up (imports), and its memory beyond that. Cold:
the files of the cache were dropped from the page cache before. The peers' ways are FAISS flat, fp32, loaded whole, and
a NumPy scan of blobs from SQLite. The collection is of empty files, one a vector.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import main

LATENT = 256  # directions in which the vectors vary, each less than the one before, as in pooled features
CLUSTER = 50  # vectors around a centre
BLOCK = 20_000
TRAINED_ON = 160_000  # vectors for the alternatives: 4,096 lists want as many
SCAN_QUERIES = 10  # for the peers that take seconds a query


def made_up(n: int, dim: int, seed: int, of: int) -> Iterator[np.ndarray]:
    """Clustered, non-negative, long-tailed, float32 of length 1, in blocks; of any seed around the same centres, as
    many as a collection `of` so many has."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    weights = (
        common.standard_normal((LATENT, dim), np.float32)
        * (np.arange(1, LATENT + 1, dtype=np.float32) ** -0.4)[:, None]
    )
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
        import torch

        return torch.from_numpy(queries[[int(p.sum()) % len(queries) for p in pixels]])

    return main.Model("made-up", f"made-up-{dim}", 8, dim, "cpu", network)


def make_files(root: Path, n: int) -> None:
    for start in range(0, n, 1000):
        folder = root / f"folder-{start // 1000:05}"
        folder.mkdir(parents=True)
        for i in range(start, min(start + 1000, n)):
            os.close(os.open(folder / f"IMG_{i:08}_a_name_of_usual_length.jpg", os.O_CREAT))


def fill(catalogue: main.Catalogue, root: Path, n: int, dim: int) -> None:
    """The catalogue of these files, each with a vector."""
    catalogue.mend()
    catalogue.scan(main.find_images(root, print), everything=False)
    files = catalogue.unread()
    with catalogue.writing():
        for block in made_up(n, dim, seed=1, of=n):
            pictures = (
                main.Picture(file, os.urandom(main.DIGEST_BYTES), vector=vector)
                for vector, file in zip(block.astype(np.float16), files)
            )
            catalogue.save(list(pictures))
        catalogue.settle()
        catalogue.totals(store=True)
        main.label_limits(catalogue, store=True)


def peak(reset: bool = False) -> float:
    """MB that this process has had in memory at most, from now on if `reset`."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


def start_up() -> None:
    """What any run of the program takes."""
    import faiss  # noqa: F401
    import filelock  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    import tqdm  # noqa: F401

    main.image_formats()
    torch.zeros(2, 2) @ torch.zeros(2, 2)


def drop_cached(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- Measurements, each in a process of its own ----------------------------------------------------------------------


def build(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    catalogue = main.Catalogue(cache / f"made-up-{dim}", f"made-up-{dim}", dim)
    base, start = peak(reset=True), time.perf_counter()
    _, notes = main.open_index(catalogue)
    return {
        "build s": time.perf_counter() - start,
        "build MB": peak() - base,
        **{name: notes[name] for name in ("recall", "shortlist") if name in notes},
    }


def first_answer(images: Path, cache: Path, dim: int, n: int, exact: bool = False) -> dict[str, float]:
    model = model_of(dim, n)
    Image.new("L", (8, 8), 3).save(image := str(cache / "query.png"))
    base, start = peak(reset=True), time.perf_counter()
    engine = main.initialize_reverse_image_search(images, cache, model=model, work=main.Work(update=False, exact=exact))
    answer = next(main.search(image, engine))
    spent, memory = time.perf_counter() - start, peak() - base
    assert len(answer.matches) == main.TOP, answer
    times = []
    for _ in range(20):
        start = time.perf_counter()
        next(main.search(image, engine))
        times.append(time.perf_counter() - start)
    return {"first s": spent, "first MB": memory, "again ms": 1e3 * statistics.median(times)}


def at_a_terminal(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    """`python main.py query.png`, whole, but for the model: until the answer stands there, and until all is done."""
    model, (terminal, its_end), printed = model_of(dim, n), os.openpty(), list[float]()
    Image.new("L", (8, 8), 3).save(query := str(cache / "query.png"))
    main.load_model = lambda *args: model

    def watch() -> None:
        seen = b""
        with suppress(OSError):  # the other end was closed
            while chunk := os.read(terminal, 4096):
                seen += chunk
                if not printed and b"\n  10  " in seen:
                    printed.append(time.perf_counter())

    (watcher := threading.Thread(target=watch)).start()
    with open(its_end, "w") as stdout, redirect_stdout(stdout):
        start = time.perf_counter()
        status = main.main([query, "--images", str(images), "--index-dir", str(cache), "--no-report", "-q"])
        done = time.perf_counter()
    watcher.join()
    assert status == 0
    return {"first s": printed[0] - start, "all s": done - start}


def batch(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    engine = main.initialize_reverse_image_search(images, cache, model=model_of(dim, n), work=main.Work(update=False))
    xq = queries_for(dim, n)
    list(main.nearest(engine, xq[:16], main.TOP))
    start = time.perf_counter()
    found = [
        I
        for i0 in range(0, len(xq), main.TOGETHER)
        for _, I, _ in main.nearest(engine, xq[i0 : i0 + main.TOGETHER], main.TOP)
    ]
    spent = time.perf_counter() - start
    true = main.candidates(replace(engine, exact=True), xq[:200], main.TOP + int(engine.dead.sum()), True)
    true = [[row for row in rows if not engine.dead[row]][: main.TOP] for rows in true]
    recall = np.mean([len(set(t) & set(f[: main.TOP])) / main.TOP for t, f in zip(true, found)])
    return {"batch ms": 1e3 * spent / len(xq), "recall": float(recall)}


def add(images: Path, cache: Path, dim: int, n: int, count: int = 100) -> dict[str, float]:
    model, folder, noise = model_of(dim, n), images / f"added-{time.time_ns()}", np.random.default_rng()
    folder.mkdir()
    for i in range(count):
        Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    start = time.perf_counter()
    engine = main.initialize_reverse_image_search(images, cache, model=model)
    assert (engine.summary.opened, engine.summary.recognised) == (count, 0)
    return {"add s": time.perf_counter() - start}


def rerun(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    model = model_of(dim, n)
    base, start = peak(reset=True), time.perf_counter()
    engine = main.initialize_reverse_image_search(images, cache, model=model)
    assert engine.summary.opened == 0
    return {"rerun s": time.perf_counter() - start, "rerun MB": peak() - base}


def peer_flat(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    """What the usual script does: the index in fp32, read whole, one query."""
    import faiss

    xq, path = queries_for(dim, n), cache / "peer.faiss"
    base, start = peak(reset=True), time.perf_counter()
    index = faiss.read_index(str(path))
    index.search(xq[:1], main.TOP)
    spent, memory = time.perf_counter() - start, peak() - base
    start = time.perf_counter()
    index.search(xq[:SCAN_QUERIES], main.TOP)
    return {"first s": spent, "first MB": memory, "again ms": 1e3 * (time.perf_counter() - start) / SCAN_QUERIES}


def peer_sqlite(images: Path, cache: Path, dim: int, n: int) -> dict[str, float]:
    """Vectors as blobs in a table, fetched and compared in NumPy."""
    xq = queries_for(dim, n)
    base, start = peak(reset=True), time.perf_counter()
    rows = sqlite3.connect(cache / "peer.sqlite").execute("SELECT path, vector FROM images").fetchall()
    xb = np.stack([np.frombuffer(vector, np.float32) for _, vector in rows])
    np.argsort(xb @ xq[0])[: -main.TOP : -1]
    return {"first s": time.perf_counter() - start, "first MB": peak() - base}


def alternative(images: Path, cache: Path, dim: int, n: int, factory: str, *settings: str) -> dict[str, float]:
    """Another index in the place of the codes, and how many of the true ten are among those that it chooses."""
    import faiss

    catalogue = main.Catalogue(cache / f"made-up-{dim}", f"made-up-{dim}", dim)
    rows, xq = catalogue.get("rows"), queries_for(dim, n)[:200]
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[:TRAINED_ON])
    sample = np.concatenate([catalogue.records_of(part)["vector"] for part in np.array_split(chosen, 40)])
    nearest, index = main.Nearest(xq, main.TOP), faiss.index_factory(dim, factory)
    deque(nearest.among(catalogue.vectors()), 0)
    start = time.perf_counter()
    index.train(main.single(sample))
    for block in catalogue.vectors():
        index.add(main.single(block))
    figures = {"build s": time.perf_counter() - start, "MB": len(faiss.serialize_index(index)) / 1e6}
    for setting in settings or ("",):
        faiss.ParameterSpace().set_index_parameters(index, setting)
        start = time.perf_counter()
        found = index.search(xq, main.SHORTLIST)[1]
        figures[f"{setting} batch ms"] = 1e3 * (time.perf_counter() - start) / len(xq)
        start = time.perf_counter()
        for q in xq[:50]:
            index.search(q[None], main.SHORTLIST)
        figures[f"{setting} one ms"] = 1e3 * (time.perf_counter() - start) / 50
        for count in (main.SHORTLIST, 100):
            true = zip(nearest.heap.I, found[:, :count])
            recall = np.mean([len(np.intersect1d(*pair)) / main.TOP for pair in true])
            figures[f"{setting} recall of {count}"] = float(recall)
    return figures


ALTERNATIVES = (
    ("PCAR256,PQ128x4fs",),  # ours
    ("PCAR256,SQ8",),
    ("PCAR256,IVF4096,SQ8", "nprobe=128", "nprobe=1024"),
    ("PCAR256,IVF4096,PQ128x4fs", "nprobe=128", "nprobe=1024"),
    ("PCAR256,HNSW32_SQ8", "efSearch=384", "efSearch=2048"),
)
STEPS: dict[str, Callable[..., dict[str, float]]] = {
    step.__name__: step
    for step in (build, first_answer, at_a_terminal, batch, add, rerun, alternative, peer_flat, peer_sqlite)
}


def in_a_process(step: str, cold: bool, *args: Any) -> dict[str, float]:
    if cold:
        drop_cached(args[1])
    command = [sys.executable, __file__, "--step", step, *map(str, args)]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])


def measure(
    n: int, dim: int, folder: Path, peers: bool, alternatives: bool = False
) -> Iterator[tuple[str, dict[str, float]]]:
    images, cache = folder / "images", folder / "cache"
    catalogue = main.Catalogue(cache / f"made-up-{dim}", f"made-up-{dim}", dim)
    if not images.exists():
        make_files(images, n)
        fill(catalogue, images, n, dim)
    args = images, cache, dim, n
    yield "index made from stored features", in_a_process("build", True, *args)
    size = sum(path.stat().st_size for path in (cache / f"made-up-{dim}").iterdir())
    yield "disk", {"KB an image": size / n / 1e3}
    for kind in ("cold", "warm"):
        yield f"first answer, {kind}", in_a_process("first_answer", kind == "cold", *args)
    yield "at a terminal, cold, and the folder then", in_a_process("at_a_terminal", True, *args)
    for kind in ("cold", "warm"):
        yield f"1,000 queries, {kind}", in_a_process("batch", kind == "cold", *args)
    yield "nothing changed", in_a_process("rerun", False, *args)
    yield "100 added, scan and all", in_a_process("add", False, *args)
    for others in ALTERNATIVES if alternatives else ():
        yield others[0], in_a_process("alternative", False, *args, *others)
    if peers:
        import faiss

        index = faiss.IndexFlatIP(dim)
        for block in catalogue.vectors():
            index.add(block.astype(np.float32))
        faiss.write_index(index, str(cache / "peer.faiss"))
        del index
        for kind in ("cold", "warm"):
            yield f"peers: FAISS flat, {kind}", in_a_process("peer_flat", kind == "cold", *args)
        (cache / "peer.faiss").unlink()
        db = sqlite3.connect(cache / "peer.sqlite")
        db.execute("CREATE TABLE images (path TEXT, vector BLOB)")
        for block in catalogue.vectors():
            db.executemany(
                "INSERT INTO images VALUES ('image.jpg', ?)", [(v.tobytes(),) for v in block.astype(np.float32)]
            )
        db.commit()
        db.close()
        yield "peers: SQLite blobs and NumPy, warm", in_a_process("peer_sqlite", False, *args)
        (cache / "peer.sqlite").unlink()


def run() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="keep what is made here, and use it again")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--alternatives", action="store_true", help="to the codes: 8 bits, IVF, HNSW")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, images, cache, dim, n, *others = options.step
        start_up()
        print(json.dumps(STEPS[step](Path(images), Path(cache), int(dim), int(n), *others)))
        return
    folder = options.folder or Path(tempfile.mkdtemp())
    try:
        for what, figures in measure(options.vectors, options.dim, folder, not options.no_peers, options.alternatives):
            print(f"{what:46}", *(f"{name} {value:.4g}  " for name, value in figures.items()), flush=True)
    finally:
        if not options.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    run()
