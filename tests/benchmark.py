"""How fast is it here, against the usual script and against what the machine allows?

    python tests/benchmark.py                                  every section: an hour and 16 GB of disk
    python tests/benchmark.py few large --repeat 1             two of them, once
    python tests/benchmark.py few --images ~/Pictures --json figures.json

Ours and the usual script run in turn, each as a process of its own, over the same images. `whole` is the time of the
process, with imports, weights and all warm-up; `beyond start-up` is without the time that the same program takes for
one image. Medians of the repetitions. Without --weights the network is untrained: it takes as long.
"""

import argparse
import fcntl
import io
import itertools
import json
import os
import pty
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
OURS = (sys.executable, str(ROOT / "main.py"))
IMPORTS = (sys.executable, "-c", "import torch, faiss")
sys.path.insert(0, str(ROOT))

import bench_million  # noqa: E402
from bench_million import seconds  # noqa: E402

import main  # noqa: E402

DISTINCT = 50  # images drawn of each kind; more of them are copies with other bytes at the end, as costly to read
GFLOP = 8.2  # of ResNet50, an image
LAUNCH = """
import os, sys
_, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), 0)
print("", usage.ru_maxrss)
sys.exit(status != 0)
"""
NO_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
NETWORK = """
import sys
from pathlib import Path
import numpy as np, torch, torchvision
from PIL import Image

where, name, weights, *index = sys.argv[1:]
network = torchvision.models.get_model(name, weights=None)
network.load_state_dict(torch.load(weights, weights_only=True))
network.fc = torch.nn.Identity()
network.eval()
mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

def load(path):
    image = Image.open(path).convert("RGB").resize((224, 224))
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
"""
USUAL_SCRIPT = f"""{NETWORK}
paths, features = sorted(Path(where).iterdir()), []
with torch.no_grad():
    for i in range(0, len(paths), 32):
        features.append(network(torch.stack([load(path) for path in paths[i : i + 32]])).numpy())
np.save(Path(where).parent / "usual.npy", np.concatenate(features))
"""
PLAIN_SEARCH = f"""{NETWORK}
import faiss

with torch.no_grad():
    features = network(load(where)[None]).numpy()
faiss.normalize_L2(features)
print(faiss.read_index(*index).search(features, 10))
"""


class Options(NamedTuple):
    share: float  # of the images that a section takes
    repeat: int
    images: Path | None
    network: str
    weights: Path
    folder: Path  # for what is written


class Row(NamedTuple):
    what: str
    value: float
    unit: str
    baseline: float | None = None
    promised: str = ""

    def __str__(self) -> str:
        ratio = f"{self.value / self.baseline:.2f} ×" if self.baseline else ""
        baseline = "" if self.baseline is None else f"{self.baseline:,.2f}"
        return f"| {self.what} | {self.value:,.2f} {self.unit} | {baseline} | {ratio} | {self.promised} |"


class Spent(NamedTuple):
    seconds: float
    megabytes: float  # of memory, at the peak


def drawn(seed: int, width: int, height: int) -> Image.Image:
    """Noise with the statistics of photographs: amplitude falls as 1 / frequency, alike in all colours, but for a
    grain; soft at the scale of its pixels if it is large. 12 megapixels have 4 MB, as from a phone."""
    random, (w, h) = np.random.default_rng(seed), (min(width, 1000), min(height, 750))
    frequency = np.hypot(np.fft.fftfreq(h)[:, None] * h, np.fft.rfftfreq(w)[None] * w)
    planes = []
    for _ in range(2):
        spectrum = np.fft.rfft2(random.standard_normal((h, w))) / np.maximum(frequency, 1)
        plane = np.fft.irfft2(spectrum, (h, w))
        planes.append(plane / plane.std())
    light, hue = planes
    pixels = 127 + 50 * np.stack([light + 0.3 * hue, light, light - 0.3 * hue], 2)
    soft = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.tile(random.normal(0, 3, (h, w, 1)), (-(-height // h), -(-width // w), 1))[:height, :width]
    return Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8))


def collection(options: Options, count: int, width: int, height: int, distinct: int = DISTINCT) -> Path:
    """A folder with so many JPEGs, of different contents, of the user's or of our own."""
    folder = options.folder / f"{count} of {width} × {height}, {distinct} kinds"
    if folder.exists():
        return folder
    folder.mkdir()
    contents: list[bytes] = []
    if options.images:
        found = (os.path.join(options.images, os.fsdecode(f.path)) for f in main.find_images(options.images, print))
        named = [path for path in found if path.lower().endswith((".jpg", ".jpeg"))][: min(count, 10 * distinct)]
        contents = [Path(path).read_bytes() for path in named]
    for seed in range(0 if contents else min(count, distinct)):
        drawn(seed, width, height).save(stream := io.BytesIO(), "JPEG", quality=92)
        contents.append(stream.getvalue())
    for i in range(count):
        (folder / f"{i:06}.jpg").write_bytes(contents[i % len(contents)] + i.to_bytes(4, "big"))
    return folder


def process(command: Sequence[str], environment: Mapping[str, str] = {}) -> Spent:
    """Started by a small process: to Linux, the peak of a process is at least that of the one that started it."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCH, *command], env={**os.environ, **environment},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"error: {command} failed: {done.stdout.decode(errors='replace')}")
    return Spent(seconds, int(done.stdout.split()[-1]) / (1 << 20 if sys.platform == "darwin" else 1 << 10))


def ours(folder: Path, options: Options, environment: Mapping[str, str]) -> Spent:
    return indexed(folder, options, options.network, "--weights", str(options.weights), environment=environment)


def indexed(
    folder: Path, options: Options, *model: str, environment: Mapping[str, str] = {}, python: Sequence[str] = OURS
) -> Spent:
    with tempfile.TemporaryDirectory(dir=options.folder) as index_dir:
        where = ["--images", str(folder), "--index-dir", index_dir, "--index-only"]
        return process([*python, *where, "--model", *model], environment)


def usual(folder: Path, options: Options, environment: Mapping[str, str]) -> Spent:
    command = [sys.executable, "-c", USUAL_SCRIPT, str(folder), options.network, str(options.weights)]
    return process(command, environment)


def extraction(
    options: Options, count: int, width: int, height: int, promised: str, environment: Mapping[str, str] = {}
) -> Iterator[Row]:
    """The rate from files to features in the cache, against the usual script."""
    n = max(2, round(count * options.share))
    many, one = collection(options, n, width, height), collection(options, 1, width, height)
    rates: dict[Any, list[tuple[float, float]]] = {usual: [], ours: []}
    for _, program in itertools.product(range(options.repeat), rates):
        start_up, spent = (program(folder, options, environment).seconds for folder in (one, many))
        rates[program].append((n / spent, (n - 1) / max(spent - start_up, 1e-3)))
    what = f"{n:,} JPEGs of {width} × {height}" if not options.images else f"{n:,} of your JPEGs"
    what += ", no bf16" if environment else ""
    medians_of = (map(statistics.median, zip(*rates[program])) for program in (ours, usual))
    for name, mine, theirs in zip(("whole", "beyond start-up"), *medians_of):
        yield Row(f"{what}: {name}", mine, "images/s", theirs, promised)


def rate(work: Callable[[], Any], items: float, repeat: int) -> float:
    """Items a second, warm."""
    work()
    return items / statistics.median(seconds(work) for _ in range(repeat + 2))


def features(options: Options) -> Iterator[Row]:
    """How near the indexed features are to those of the usual script, which decodes in full and computes in fp32."""
    n = max(2, round(1000 * options.share))
    folder = collection(options, n, 500, 375, distinct=n)
    usual(folder, options, {})
    expected = np.load(options.folder / "usual.npy")
    model = main.load_model(options.network, options.weights)
    store = main.initialize_reverse_image_search(folder, options.folder / "features", model=model).store
    rows = [row for row, _ in store.db.execute(f"{main.ROWS_AND_PATHS} ORDER BY path")]
    known, _, vectors = store.features_of(rows)
    xb = vectors[np.searchsorted(known, rows)].astype(np.float32)
    cosines = np.einsum("nd,nd->n", xb, expected) / np.linalg.norm(expected, axis=1)
    least = 1000 * (1 - float(cosines.min()))
    yield Row(f"least cosine of {n:,} features to fp32, full decoding: below 1 by", least, "‰", promised="≤ 1.00 ‰")


def usage(options: Options) -> Iterator[Row]:
    spent = medians(options.repeat, {"help": lambda: process([*OURS, "--help"]).seconds})
    yield Row("--help", spent["help"], "s", promised="≤ 0.30 s")


def ceilings(options: Options) -> Iterator[Row]:
    """What the machine allows: decoding alone, the network alone, and the matrix product it could come near to."""
    torch = main.torch
    model = main.load_model(options.network, options.weights)
    transform = main.get_transform(model.side, model.resample)
    for width, height in ((500, 375), (4000, 3000)):
        paths = list(collection(options, max(2, round(40 * options.share)), width, height, 8).iterdir())
        decoded = rate(lambda paths=paths: [transform(Image.open(path)) for path in paths], len(paths), options.repeat)
        yield Row(f"decoding {width} × {height}, one thread", decoded, "images/s")
    size = max(2, round(model.batch * min(1.0, options.share)))
    batch = torch.randint(0, 256, (size, 3, model.side, model.side), dtype=torch.uint8)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(model.precision, torch.float32)
    matrix, n = torch.randn(2048, 2048, device=model.device).to(kind), 2048
    synchronise = torch.cuda.synchronize if model.device == "cuda" else lambda: None
    timed = {
        "product": lambda: rate(lambda: (matrix @ matrix, synchronise()), 2 * n**3 / 1e9, 3),
        "network": lambda: rate(lambda: main.extract_features_batch(batch, model), size, 1),
    }
    found = medians(options.repeat, timed)
    yield Row(f"matrix product, {model.precision}", found["product"], "GFLOP/s")
    if options.network == "resnet50":
        what = f"network alone, {model.precision}, {size} at once, against {GFLOP} GFLOP an image"
        yield Row(what, found["network"], "images/s", found["product"] / GFLOP, "≥ 0.93 ×")


def memory(options: Options) -> Iterator[Row]:
    """The peak while a collection ten times as large is indexed, with the offline descriptor."""
    sizes = [max(2, round(n * options.share)) for n in (5000, 50000)]
    few, many = (indexed(collection(options, n, 64, 48), options, "offline").megabytes for n in sizes)
    yield Row(f"peak memory at {sizes[1]:,} images, against {sizes[0]:,}", many, "MB", few, "≤ 1.20 ×")


FLOORS = {  # what is promised of the search at 100,000 and at 1,000,000 vectors, by the end of a row's name
    100_000: {"added, scan and all: add": "≤ 1.5 s", "nothing changed: rerun": "≤ 1 s"},
    1_000_000: {
        "stored features: build": "≤ 60 s", "disk: KB an image": "≤ 5", "first answer, cold: first": "≤ 0.5 s, 500 MB",
        "queries, warm: batch": "≤ 4 ms", "queries, warm: recall": "≥ 0.998", "nothing changed: rerun": "≤ 7 s, flat",
    },
}  # fmt: skip


def as_rows(of: str, steps: Iterator[tuple[str, dict[str, float]]], promised: Mapping[str, str]) -> Iterator[Row]:
    for what, figures in steps:
        for figure, value in figures.items():
            name, unit = figure.rsplit(" ", 1) if figure.endswith((" s", " ms", " MB")) else (figure, "")
            row = f"{of}, {what}: {name}"
            floors = (floor for end, floor in promised.items() if row.endswith(end))
            yield Row(row, value, unit, promised=next(floors, ""))


def search(options: Options, vectors: int) -> Iterator[Row]:
    """The index of so many made-up vectors and the answers from it, then the peers' ways: see bench_million.py."""
    n = max(300, round(vectors * options.share))
    steps = bench_million.measure(n, 2048, options.folder / f"search {n}", peers=True)
    yield from as_rows(f"{n:,} vectors", steps, FLOORS[vectors])


def points(options: Options, pictures: int) -> Iterator[Row]:
    """The index of the points of so many pictures, and how long it takes to look a picture up: see bench_million.py."""
    n = max(20, round(pictures * options.share))
    photos = collection(options, min(n, 1000), 500, 375, distinct=1000)
    steps = bench_million.measure_points(n, photos, options.folder)
    yield from as_rows(f"points of {n:,}", steps, {})


def duplicates(options: Options) -> Iterator[Row]:
    """The copies, by their score, among made-up vectors, of which a hundredth are copies."""
    n, dim, folder = max(300, round(100_000 * options.share)), 2048, options.folder / "duplicates"
    images, cache = folder / "images", folder / "cache"
    bench_million.make_files(images, n)
    blocks = bench_million.made_up(n, dim, seed=1, of=n)
    with_copies = (np.where(np.arange(len(block))[:, None] % 100 == 1, np.roll(block, 1, 0), block) for block in blocks)
    bench_million.fill(bench_million.store_of(cache, dim), images, with_copies)
    found = bench_million.in_a_process("duplicates", False, images, cache, dim, n)
    what = f"{found['groups']} groups of copies among {n:,}"
    yield Row(what, found["duplicates s"], "s", promised="≤ 600 s at 100,000")
    yield Row(f"copies among {n:,}, memory beyond start-up", found["duplicates MB"], "MB")


def medians(repeat: int, programs: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """What each program gives, in the median of as many rounds, in which they take turns."""
    rounds = [{name: program() for name, program in programs.items()} for _ in range(repeat)]
    return {name: statistics.median(figures[name] for figures in rounds) for name in programs}


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """Meanwhile, so many other processes compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def offline(options: Options) -> Iterator[Row]:
    """Extraction by the offline descriptor, with points: idle, on a busy machine, and on one core against two."""
    n = max(2, round(1000 * options.share))
    many, one = collection(options, n, 500, 375), collection(options, 1, 500, 375)

    def rate_of(*taskset: str) -> float:
        spent = [indexed(folder, options, "offline", python=(*taskset, *OURS)).seconds for folder in (many, one)]
        return (n - 1) / max(spent[0] - spent[1], 1e-3)

    idle = medians(options.repeat, {"now": rate_of})["now"]
    yield Row(f"offline with points, {n:,} images: beyond start-up", idle, "images/s", promised="≥ 200")
    with busy(main.usable_cores()):
        found = medians(options.repeat, {"now": rate_of})
    yield Row("the same, all cores busy elsewhere, against idle ones", found["now"], "images/s", idle)
    taskset, cores = shutil.which("taskset"), sorted(os.sched_getaffinity(0))[:2]
    if taskset and len(cores) == 2:
        on = {str(n): (taskset, "-c", ",".join(map(str, cores[:n]))) for n in (1, 2)}
        found = medians(options.repeat, {n: lambda n=n: rate_of(*on[n]) for n in on})
        yield Row("the same, two cores against one", found["2"], "images/s", found["1"], "≥ 1.90 ×")


def kilobytes(folder: Path, images: int) -> float:
    """On disk, an image."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / images / 1e3


def rerun(options: Options) -> Iterator[Row]:
    """One query when nothing has changed: against a plain script that reads its index, and against imports alone."""
    n = max(2, round(1000 * options.share))
    folder = collection(options, n, 500, 375, distinct=1000)
    query, home = str(next(folder.iterdir())), {"TORCH_HOME": str(options.folder / "no weights")}
    index_dir = options.folder / "rerun"
    search = [*OURS, query, "--images", str(folder), "--index-dir", str(index_dir), "--no-report"]
    network = [*search, "--model", options.network, "--weights", str(options.weights)]
    process(network)
    yield Row(f"disk, {options.network}: an image of {n:,}", kilobytes(index_dir, n), "KB", promised="≤ 14")
    (index,) = index_dir.glob("*/index.faiss")
    plain = [sys.executable, "-c", PLAIN_SEARCH, query, options.network, str(options.weights), str(index)]
    process(search, home)
    commands = {"ours": (network,), "plain": (plain,), "offline": (search, home), "imports": (IMPORTS,)}
    timed = {name: lambda command=command: process(*command).seconds for name, command in commands.items()}
    found = medians(options.repeat + 2, timed)
    yield Row(f"rerun, {options.network}, one query", found["ours"], "s", found["plain"], "≤ 1.00 ×")
    what = "rerun without weights, one query, beyond the imports of torch and faiss"
    yield Row(what, found["offline"] - found["imports"], "s", promised="≤ 0.60 s")


def first_progress(options: Options) -> Iterator[Row]:
    """How soon the bar of a first run has counted an image, after the imports: in a collection of 100,000 new files."""
    folder = collection(options, max(2, round(100_000 * options.share)), 64, 48)

    def seconds_until_counted() -> float:
        terminal, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # no bar on a terminal without columns
        with tempfile.TemporaryDirectory(dir=options.folder) as index_dir:
            where = ["--images", str(folder), "--index-dir", index_dir, "--index-only", "--model", "offline"]
            start, seen = time.perf_counter(), b""
            run = subprocess.Popen([*OURS, *where], stderr=end, stdin=end)
            while not re.search(rb" [1-9]\d*/", seen):
                seen += os.read(terminal, 1 << 16)
            spent = time.perf_counter() - start
            run.kill()
            run.wait()
        os.close(terminal)
        os.close(end)
        return spent

    found = medians(options.repeat, {"first": seconds_until_counted, "imports": lambda: process(IMPORTS).seconds})
    what = f"{len(os.listdir(folder)):,} new images, first progress beyond the imports of torch and faiss"
    yield Row(what, found["first"] - found["imports"], "s", promised="≤ 1.00 s")


def resaved(paths: Iterable[Path], folder: Path) -> list[str]:
    """The images as JPEGs of low quality, and their paths."""
    folder.mkdir(exist_ok=True)
    names = []
    for path in paths:
        Image.open(path).save(name := str(folder / path.name), "JPEG", quality=40)
        names.append(name)
    return names


def one_query(options: Options) -> Iterator[Row]:
    """A query whose source is among 1,000 images, verified: alone, and each of 100."""
    folder = collection(options, max(100, round(1000 * options.share)), 500, 375, distinct=1000)
    few = collection(options, 20, 500, 375)
    model = main.load_model("offline")
    engine = main.initialize_reverse_image_search(folder, options.folder / "one query", model=model)
    names = resaved(sorted(folder.iterdir()), options.folder / "queries")

    def each(engine: main.Engine, queries: list[str]) -> float:
        return seconds(lambda: deque(main.search(queries, engine), 0)) / len(queries)

    each(engine, names[:1])
    # No picture is a query twice: the local features of candidates are remembered.
    turn = itertools.count(1)
    found = medians(5 * options.repeat, {"alone": lambda: each(engine, [names[next(turn)]])})
    yield Row("a query, verified, alone", found["alone"], "s", promised="≤ 0.15 s")
    yield Row("each of 100 queries at once", each(engine, names[-100:]), "s", promised="≤ 0.15 s")
    model = main.load_model(options.network, options.weights, "cpu")
    engine = main.initialize_reverse_image_search(few, options.folder / "one query", model=model)
    rounds = medians(2 * options.repeat, {"network": lambda: each(engine, [names[next(turn)]])})
    yield Row(f"a query by {options.network}, verified, alone", rounds["network"], "s", promised="≤ 1.00 s")


def copies(options: Options) -> Iterator[Row]:
    """`--duplicates` beyond extraction, of images of which each tenth has a copy, and again with nothing new."""
    n = max(10, round(1000 * options.share))
    folder = options.folder / "with copies"
    shutil.copytree(collection(options, n, 500, 375, distinct=1000), folder)
    resaved(sorted(folder.iterdir())[::10], folder / "resaved")
    n += -(-n // 10)
    arguments = ["--images", str(folder), "--model", "offline", "--no-report", "--index-dir"]
    index_dir = options.folder / "copies"
    process([*OURS, "--index-only", *arguments, str(index_dir)])
    yield Row(f"disk, offline: an image of {n:,}", kilobytes(index_dir, n), "KB", promised="≤ 10")
    rounds = []
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            shutil.copytree(index_dir, name, dirs_exist_ok=True)
            kinds = ("--index-only", "--duplicates", "--duplicates")
            rounds.append([process([*OURS, kind, *arguments, name]).seconds for kind in kinds])
    start_up, first, again = map(statistics.median, zip(*rounds))
    each = 1000 * (first - start_up) / n
    yield Row(f"--duplicates, each of {n:,}, beyond extraction", each, "ms", promised="≤ 10 ms")
    yield Row("the same again, nothing new, in all", again - start_up, "s", promised="≤ 15 s at 50,000")


SECTIONS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "many": partial(extraction, count=2000, width=500, height=375, promised="≥ 3.00 ×"),
    "few": partial(extraction, count=200, width=500, height=375, promised="≥ 3.00 ×"),
    "no-bf16": partial(extraction, count=500, width=500, height=375, promised="≥ 2.10 ×", environment=NO_BF16),
    "large": partial(extraction, count=200, width=4000, height=3000, promised="≥ 4.80 ×"),
    "offline": offline,
    "rerun": rerun,
    "first-progress": first_progress,
    "one-query": one_query,
    "features": features,
    "usage": usage,
    "ceilings": ceilings,
    "memory": memory,
    "search": partial(search, vectors=100_000),
    "million": partial(search, vectors=1_000_000),
    "points": partial(points, pictures=100_000),
    "duplicates": duplicates,
    "copies": copies,
}


def benchmark(sections: list[str], options: Options, kept: Path | None) -> None:
    print("| what | figure | baseline | ratio | promised |\n|---|---|---|---|---|")
    rows = []
    for name in sections:
        for row in SECTIONS[name](options):
            print(row, flush=True)
            rows.append({"section": name, **row._asdict()})
            if kept:
                kept.write_text(json.dumps({"cores": main.usable_cores(), "rows": rows}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the images (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--images", type=Path, metavar="DIR", help="take the JPEGs in it instead of drawing some")
    parser.add_argument("--network", default="resnet50", help="a ResNet of torchvision (default: %(default)s)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="default: untrained")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory() as temporary:
        if not given.weights:
            given.weights = Path(temporary, "weights.pth")
            main.torch.manual_seed(0)
            main.torch.save(main.torchvision.models.get_model(given.network, weights=None).state_dict(), given.weights)
        weights = given.weights.resolve()
        settings = Options(given.share, given.repeat, given.images, given.network, weights, Path(temporary))
        benchmark(given.sections or list(SECTIONS), settings, given.json)
