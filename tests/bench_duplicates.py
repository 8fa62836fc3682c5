"""How long --duplicates takes: `python tests/bench_duplicates.py [--pictures 100000]`. Made-up features, no image."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import main

DIM, SIZE, NEAR = 2048, 50, 0.02  # features; pictures in a cluster, one of them a copy; how far it is from its original


def made_up(files: list[main.File]) -> Iterator[main.Picture]:
    """Clustered non-negative features, as those of ResNet50; the last of each cluster is a copy of the one before."""
    random, vector = np.random.default_rng(0), np.zeros(DIM)
    for i, file in enumerate(files):
        if i % SIZE == 0:
            centre = np.abs(random.standard_normal(DIM, np.float32))
        if i % SIZE == SIZE - 1:
            vector = vector + NEAR * random.standard_normal(DIM, np.float32)
        else:
            vector = np.abs(centre + 1.5 * random.standard_normal(DIM, np.float32))
        yield main.Picture(file, random.bytes(16), None, (vector / np.linalg.norm(vector)).astype(np.float16))


def fill(catalogue: main.Catalogue, n: int) -> None:
    files = [main.File(b"%07d.jpg" % i, 1000 + i * 7919 % 100_003, 1) for i in range(n)]
    catalogue.mend()
    catalogue.scan(files, False)
    unsaved: list[main.Picture] = []
    for picture in made_up(files):
        unsaved.append(picture)
        if len(unsaved) == 2000:
            catalogue.save(unsaved)
            unsaved = []
    catalogue.save(unsaved)


def duplicates(n: int = 100_000, folder: str | None = None) -> dict[str, float]:
    """Seconds and MB that finding the copies among `n` pictures takes, all of which must be found."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        catalogue = main.Catalogue(Path(cache), "made up", DIM)
        fill(catalogue, n)
        place = np.full(n, -1)
        place[catalogue.largest_first()[:, 0]] = np.arange(n)
        main.torch.zeros(1)  # is imported now
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        first, _ = main.first_alike(catalogue, "cpu", place, np.full(n, 0.995, np.float32))
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        catalogue.close()
    copies = int((first != np.arange(n)).sum())
    assert copies == n // SIZE, f"{copies} copies found of {n // SIZE}"
    return {"pictures": n, "copies": copies, "seconds": seconds, "MB": (peak - before) / 1024}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=100_000, metavar="N")
    parser.add_argument(
        "--folder", metavar="DIR", help="where 4 KB a picture have room (default: that of temporary files)"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    print(
        "{pictures:,} pictures, {copies:,} copies: {seconds:.1f} s, {MB:,.0f} MB".format(
            **duplicates(options.pictures, options.folder)
        )
    )
