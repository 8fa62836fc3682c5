"""Hundreds of tests index, and ask about, the same few pictures. What depends on pixels alone is computed once.

`remember` lets main.py look up points and verdicts that any process of these tests has computed. They are kept in a
folder of their own, which goes with the run of the tests.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = "DEEPVISION_TESTS_KNOW"  # the environment variable that names it


def remembered(function: Callable[..., Any], key: Callable[..., str], plain: Any, whole: Any) -> Callable[..., Any]:
    """`function`, called once for each `key` of its arguments; its __wrapped__ remembers nothing.

    `plain` makes a result one that holds no class of main.py, `whole` makes that a result again.
    """
    known = dict[str, Any]()

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        name = hashlib.sha256(key(*args, **named).encode()).hexdigest()
        path, result = Path(os.environ[FOLDER], name), known.get(name, known)
        if result is known:
            with suppress(OSError):
                result = whole(pickle.loads(path.read_bytes()))
        if result is known:
            result = function(*args, **named)
            with suppress(OSError):
                part = path.with_suffix(f".{os.getpid()}.{id(args)}")  # so that a reader sees all of a file or none
                part.write_bytes(pickle.dumps(plain(result)))
                part.replace(path)
        if len(known) > 5000:  # some hundred megabytes
            known.clear()
        known[name] = result
        return result

    return call


def pixels_of(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} {image.getpalette()}".encode() + image.tobytes()).hexdigest()


def constants_of(main: Any) -> list[Any]:
    """All that a test may have changed: what is computed with other constants is another result."""
    return [it for it in vars(main).items() if it[0].isupper() and isinstance(it[1], (int, float, tuple))]


def remember(main: Any) -> None:
    """Let the module `main` look up points and verdicts."""

    def of_points(image: Image.Image, *how: Any, **named: Any) -> str:
        return f"points {constants_of(main)} {pixels_of(image)} {how} {named}"

    def of_pair(a: Any, b: Any, hints: Sequence[Any] = ()) -> str:
        known = [(it.points, it.H.tobytes(), it.inverted) for it in hints]
        return f"pair {constants_of(main)} {a.size} {pixels_of(a.image)} {b.size} {pixels_of(b.image)} {known}"

    def plain(verdict: Any) -> Any:
        return verdict and tuple(verdict._replace(hint=tuple(verdict.hint)))

    def whole(plain: Any) -> Any:
        return plain and main.Verdict(*plain)._replace(hint=main.Hint(*plain[1]))

    main.find_points = remembered(main.find_points, of_points, tuple, lambda plain: main.Points(*plain))
    main.compare = remembered(main.compare, of_pair, plain, whole)
