"""What a trained network does here: its forms, its features, the square that it sees, and its compact codes.

    python tests/bench_network.py ~/Pictures --model timm:tf_efficientnet_lite0 --weights FILE --crops 15000

Printed are images a second of each form of the network, the least cosine of the indexed features to those of the plain
network, precision by class (a sub-folder each) of three ways to make a square of a picture, and the recall of the
compact codes over crops of the pictures.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_million import fill, make_files
from evaluate import opened, read
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))

import main

Square = Callable[[Image.Image], Image.Image]
SQUARES: dict[str, Square] = {  # the model then squeezes it into its own square
    "squeezed": lambda image: image,
    "centre crop": lambda image: ImageOps.fit(image, (round(0.875 * min(image.size)),) * 2, bleed=0.0625),
    "padded": lambda image: ImageOps.pad(image, (max(image.size),) * 2, color=(128, 128, 128)),
}


def extracted(images: Iterable[Image.Image], model: main.Model) -> np.ndarray:
    """Features, as they are stored."""
    batches, blocks = iter(images), []
    while batch := list(itertools.islice(batches, 64)):
        blocks.append(main.extract_features_batch(batch, model).astype(np.float16))
    return np.concatenate(blocks)


def forms(plain: Any, side: int) -> None:
    """Print images a second of each form, the best of five passes of each in turn."""
    tried = {"plain": plain}
    tried |= {
        f"folded{', our kernels' * own}": main.fused(deepcopy(plain), torch.float32, own) for own in (False, True)
    }
    for threads, batch in itertools.product((1, main.usable_cores()), (1, 8)):
        torch.set_num_threads(threads)
        pixels, best = torch.randint(0, 256, (batch, 3, side, side)).byte(), dict.fromkeys(tried, 0.0)
        for name in [*tried] * 5:
            start = time.perf_counter()
            with torch.inference_mode():
                tried[name](pixels)
            best[name] = max(best[name], batch / (time.perf_counter() - start))
        print(f"threads {threads}, batch {batch:2}: ", *(f"{name} {value:.0f}/s;" for name, value in best.items()))


def crops(paths: list[Path], count: int) -> Iterator[Image.Image]:
    """Parts with 12 to 90 % of a picture, of all pictures in turn."""
    place = random.Random(7)
    for path in itertools.islice(itertools.cycle(paths), count):
        image = opened(path)
        width, height = (round(side * place.uniform(0.35, 0.95)) for side in image.size)
        left, top = place.randint(0, image.width - width), place.randint(0, image.height - height)
        yield image.crop((left, top, left + width, top + height))


def codes(paths: list[Path], count: int, model: main.Model) -> None:
    """Print the recall that the compact codes measure on held-out features of `count` crops."""
    features = extracted(crops(paths, count), model)
    with tempfile.TemporaryDirectory() as folder:
        make_files(root := Path(folder, "collection"), count)
        store = main.Store(Path(folder, "index"), model.identity, model.dim)
        fill(store, root, (features[i : i + 1000] for i in range(0, count, 1000)))
        index = main.coded_index(store, store.last_row())
    print(f"compact codes of {count:,} crops: recall@10 {index.recall:.4f} with {index.shortlist} looked at")


def measure(options: argparse.Namespace) -> None:
    plain, fastest_form = [], main.fastest_form
    main.fastest_form = lambda it, *args: (plain.append(deepcopy(it)), fastest_form(it, *args))[1]  # type: ignore
    model = main.load_model(options.model, options.weights, "cpu")
    plain[0].keywords["network"].to(memory_format=torch.channels_last)  # as in `fastest_form`
    threads = torch.get_num_threads()
    forms(plain[0], model.side)
    torch.set_num_threads(threads)
    paths, classes = read(options.folder[0])
    for name, square in SQUARES.items():
        features = extracted((square(opened(path)) for path in paths), model).astype(np.float32)
        scores = features @ features.T
        np.fill_diagonal(scores, -1)
        hits = classes[np.argsort(-scores, 1)[:, :10]] == classes[:, None]
        print(f"{name:12} precision@1 {hits[:, 0].mean():.3f}, @10 {hits.mean():.3f}", flush=True)
        if name == "squeezed":
            slow = main.replace(model, network=plain[0])
            expected = main.extract_features_batch([opened(path) for path in paths[:1000]], slow)
            print(f"least cosine to the plain network: {(features[:1000] * expected).sum(1).min():.5f}")
    if options.crops:
        codes([path for folder in options.folder for path in read(folder)[0]], options.crops, model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="+", help="the first one has a sub-folder a class")
    parser.add_argument("--model", required=True, metavar="NAME")
    parser.add_argument("--weights", metavar="FILE")
    parser.add_argument("--crops", type=int, default=0, metavar="N", help="for the codes (default: none)")
    measure(parser.parse_args())
