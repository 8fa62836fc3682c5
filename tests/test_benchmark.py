"""tests/benchmark.py runs, in all its sections, and what it draws costs what photographs do."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import bench_million
import numpy as np
import pytest
from benchmark import SECTIONS, Options, collection, drawn, process
from conftest import draw
from PIL import Image

import main

BENCHMARK = Path(__file__).with_name("benchmark.py")
TINY = ("--share", 0.0002, "--repeat", 1, "--network", "resnet18")


def benchmark(*args: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, BENCHMARK, *map(str, args)], capture_output=True, text=True, check=False)


def test_sections_print_a_table_and_keep_their_figures(tmp_path):
    chosen = ["few", "ceilings", "memory", "duplicates"]
    outcome = benchmark(*chosen, *TINY, "--json", tmp_path / "kept.json")
    assert outcome.returncode == 0, outcome.stderr
    heading, _, *lines = outcome.stdout.splitlines()
    assert heading == "| what | figure | baseline | ratio | promised |"
    rows = json.loads((tmp_path / "kept.json").read_text())["rows"]
    assert len(rows) == len(lines) and list(dict.fromkeys(row["section"] for row in rows)) == chosen
    for row, line in zip(rows, lines):
        assert re.match(rf"\| {re.escape(row['what'])} \| [\d.,]+ {row['unit']} \|", line) and (
            row["value"] > 0 or "beyond start-up" in row["what"]
        )
        ratio = row["baseline"] and f"{row['value'] / row['baseline']:.2f} ×"
        assert f"| {ratio or ''} |" in line


@pytest.mark.slow
def test_start_up_and_the_offline_descriptor_are_measured():
    outcome = benchmark("offline", "rerun", *TINY)
    assert outcome.returncode == 0 and outcome.stdout.count("offline") >= 1, outcome.stderr
    assert outcome.stdout.count("\n") >= 6


def test_the_search_is_measured_in_all_its_steps(tmp_path, monkeypatch):
    """In this process, for fourteen more take a minute to start; but for one, as all of them are begun otherwise."""
    monkeypatch.setattr(main, "load_model", main.load_model)  # that at the terminal is another
    begin, began = bench_million.in_a_process, []

    def here(step, cold, *args):
        began.append(step)
        return begin(step, cold, *args) if step == "build" else bench_million.STEPS[step](*args)

    monkeypatch.setattr(bench_million, "in_a_process", here)
    rows = list(SECTIONS["search"](Options(0.003, 1, None, "resnet18", tmp_path, tmp_path)))
    assert set(began) == {*bench_million.STEPS} - {"alternative"}
    assert all(row.value >= 0 and row.what.startswith("300 vectors, ") for row in rows) and len(rows) > 15


def test_it_takes_the_photographs_of_a_folder_and_makes_them_as_many_as_it_needs(tmp_path):
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        draw(seed).save(tmp_path / "photos" / f"{seed}.JPG", "JPEG")
    options = Options(1, 1, tmp_path / "photos", "resnet18", tmp_path, tmp_path)
    made = list(collection(options, 7, 500, 375).iterdir())
    assert len({path.read_bytes() for path in made}) == 7
    assert len({Image.open(path).tobytes() for path in made}) == 3


def test_an_unknown_section_is_refused_with_those_there_are():
    outcome = benchmark("fast")
    assert outcome.returncode == 2 and all(name in outcome.stderr for name in SECTIONS)


def test_the_memory_of_a_process_is_its_own():
    """Not that of the one that started it, if this has more."""
    mine = bytearray(300_000_000)
    mine[::4096] = b"x" * len(mine[::4096])
    few = process([sys.executable, "-c", "pass"], {}).megabytes
    many = process([sys.executable, "-c", "b'x' * 100_000_000"], {}).megabytes
    assert 2 < few < 50 and 90 < many - few < 110, (few, many, len(mine))


def test_drawn_images_are_like_photographs():
    """The amplitude at half the frequency is about twice as high, and a 500-pixel JPEG has some 100 KB."""
    image = drawn(1, 500, 375)
    light = np.asarray(image, float).mean(2)
    spectrum = np.abs(np.fft.fft2(light - light.mean()))[0, :64]
    assert 1.5 < np.median(spectrum[4:16]) / np.median(spectrum[16:64]) / 2 < 4
    image.save(stream := io.BytesIO(), "JPEG", quality=92)
    assert 50_000 < len(stream.getvalue()) < 200_000
