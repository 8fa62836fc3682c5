"""tests/benchmark.py runs, in all its sections."""

import json
import re
import subprocess
import sys
from pathlib import Path

import bench_million
import pytest
from benchmark import SECTIONS, Options, collection
from conftest import draw
from PIL import Image

import main

HERE = ("duplicates", "search")


@pytest.mark.parametrize("section", HERE)
def test_a_section_is_measured_in_all_its_steps(section, tmp_path, monkeypatch):
    """In this process, for fourteen more take a minute to start."""
    monkeypatch.setattr(main, "load_model", main.load_model)  # that at the terminal is another
    monkeypatch.setattr(bench_million, "in_a_process", lambda step, cold, *args: bench_million.STEPS[step](*args))
    rows = list(SECTIONS[section](Options(0.003, 1, None, "resnet18", tmp_path, tmp_path)))
    assert all(row.value >= 0 for row in rows) and len(rows) >= {"search": 15, "duplicates": 2}[section]
    assert section != "duplicates" or rows[0].what == "3 groups of copies among 300"


@pytest.mark.slow
def test_the_program_prints_a_table_and_keeps_its_figures(tmp_path):
    chosen = [section for section in SECTIONS if section not in (*HERE, "million")]
    options = ["--share", "0.0002", "--repeat", "1", "--network", "resnet18", "--json", tmp_path / "kept.json"]
    command = [sys.executable, Path(__file__).with_name("benchmark.py"), *chosen, *options]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    heading, _, *lines = outcome.stdout.splitlines()
    assert heading == "| what | figure | baseline | ratio | promised |"
    rows = json.loads((tmp_path / "kept.json").read_text())["rows"]
    assert len(rows) == len(lines) and list(dict.fromkeys(row["section"] for row in rows)) == chosen
    for row, line in zip(rows, lines):
        assert re.match(rf"\| {re.escape(row['what'])} \| -?[\d.,]+ {row['unit']} \|", line)
        ratio = row["baseline"] and f"{row['value'] / row['baseline']:.2f} ×"
        assert f"| {ratio or ''} |" in line


def test_it_takes_the_photographs_of_a_folder_and_makes_them_as_many_as_it_needs(tmp_path):
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        draw(seed).save(tmp_path / "photos" / f"{seed}.JPG", "JPEG")
    options = Options(1, 1, tmp_path / "photos", "resnet18", tmp_path, tmp_path)
    made = list(collection(options, 7, 500, 375).iterdir())
    assert len({path.read_bytes() for path in made}) == 7
    assert len({Image.open(path).tobytes() for path in made}) == 3
