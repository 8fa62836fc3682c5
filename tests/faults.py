"""What faults.c puts down of a run, and what a disk may hold of it after the power was cut."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KILL, TEAR, FAIL, FAIL_ON = 1, 2, 3, 4  # as in faults.c
DEADLY = b"\x89PNG\r\n\x1a\n deadly".ljust(99)  # faults.c lets whoever reads such a file crash
SECTOR = 512  # bytes that a disk writes whole or not at all


class Call(NamedTuple):
    """A call that changes what is on disk, or may."""

    kind: str  # open to create, write, truncate, sync, rename, unlink, mkdir: its first letter
    path: str
    to: str
    offset: int
    length: int  # of `open`, whether it truncates
    data: bytes


def build(folder: Path) -> Path | None:
    """The library; None where there is no compiler, or LD_PRELOAD means nothing."""
    library, source = folder / "faults.so", Path(__file__).with_name("faults.c")
    if not os.path.exists("/proc/self/fd") or not (compiler := shutil.which("cc") or shutil.which("gcc")):
        return None
    done = subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source], capture_output=True)
    return library if done.returncode == 0 else None


def calls(trace: Path, root: Path) -> Iterator[Call]:
    """With paths relative to this folder."""
    data, place = memoryview(trace.read_bytes()), 0
    while place < len(data):
        kind, long, longer, offset, length = struct.unpack_from("5q", data, place)
        ends = [place + 40, place + 40 + long, place + 40 + long + longer]
        path, to = (os.fsdecode(bytes(data[a:b])) for a, b in itertools.pairwise(ends))
        path, to = (os.path.relpath(it, os.path.realpath(root)) if it else "" for it in (path, to))
        place = ends[-1] + (length if chr(kind) == "w" else 0)
        yield Call(chr(kind), path, to, offset, length, bytes(data[ends[-1] : place]))


class Node:
    """A file: what of it is surely on disk, and what was done to it since."""

    def __init__(self, content: bytes = b"") -> None:
        self.durable, self.pending = bytearray(content), list[Call]()

    def sync(self) -> None:
        for call in self.pending:
            apply(self.durable, call)
        self.pending = []

    def after_power_cut(self, chance: random.Random, kept: float) -> bytes:
        """Of what was not synced, each sector is there with the probability `kept`."""
        content = bytearray(self.durable)
        for call in self.pending:
            for start in range(0, max(1, len(call.data)), SECTOR):
                if chance.random() < kept:
                    data = call.data[start : start + SECTOR]
                    apply(content, call._replace(offset=call.offset + start, data=data))
        return bytes(content)


def apply(content: bytearray, call: Call) -> None:
    end = call.offset + len(call.data) if call.kind == "w" else call.length
    content.extend(bytes(max(0, end - len(content))))
    if call.kind == "w":
        content[call.offset : end] = call.data
    else:
        del content[end:]


class Disk:
    """The files below one folder as POSIX promises them: a name is durable once its folder was synced, content once
    its file was; until then any part of it may be there after a power cut."""

    def __init__(self, folder: Path) -> None:
        self.names = {path: Node(content) for path, content in contents(folder).items()}
        self.durable, self.pending = dict(self.names), list[tuple[str, Node | None]]()

    def name(self, path: str, node: Node | None) -> None:
        self.pending.append((path, node))
        put(self.names, path, node)

    def do(self, call: Call) -> None:
        node = self.names.get(call.path)
        if call.kind == "o":
            if node is None:
                self.name(call.path, Node())
            elif call.length:
                node.pending.append(call._replace(kind="t", length=0))
        elif call.kind in "wt" and node:
            node.pending.append(call)
        elif call.kind == "s" and node:
            node.sync()
        elif call.kind == "s":  # of a folder
            here = [(path, node) for path, node in self.pending if (os.path.dirname(path) or ".") == call.path]
            for path, entry in here:
                put(self.durable, path, entry)
            self.pending = [change for change in self.pending if change not in here]
        elif call.kind == "r" and node:
            self.name(call.to, node)
            self.name(call.path, None)
        elif call.kind == "u":
            self.name(call.path, None)

    def after_power_cut(self, chance: random.Random, kept: float) -> dict[str, bytes]:
        """What may be there: path, relative to the folder, and content."""
        names = dict(self.durable)
        for path, node in self.pending[: sum(chance.random() < kept for _ in self.pending)]:
            put(names, path, node)
        return {path: node.after_power_cut(chance, kept) for path, node in names.items()}


def put(names: dict[str, Node], path: str, node: Node | None) -> None:
    if node is None:
        names.pop(path, None)
    else:
        names[path] = node


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    """In place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
