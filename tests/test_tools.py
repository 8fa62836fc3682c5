"""The measuring tools run, in all their sections, and tell a good model from a poor one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import bench_million
import numpy as np
import pytest
from benchmark import SECTIONS, Options, collection
from conftest import draw, draw_rich
from evaluate import COPIES, EDITS, by_class
from PIL import Image

HERE = ("duplicates", "search")


def tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, Path(__file__).with_name(name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("section", HERE)
def test_a_section_is_measured_in_all_its_steps(section, tmp_path, monkeypatch):
    """In this process, for fourteen more take a minute to start."""
    monkeypatch.setattr(bench_million, "in_a_process", lambda step, cold, *args: bench_million.STEPS[step](*args))
    rows = list(SECTIONS[section](Options(0.003, 1, None, "resnet18", tmp_path, tmp_path)))
    assert all(row.value >= 0 for row in rows) and len(rows) >= {"search": 15, "duplicates": 2}[section]
    assert section != "duplicates" or rows[0].what == "3 groups of copies among 300"


@pytest.mark.slow
def test_the_benchmark_prints_a_table_and_keeps_its_figures(tmp_path):
    chosen = [section for section in SECTIONS if section not in (*HERE, "million")]
    options = ["--share", 0.0002, "--repeat", 1, "--network", "resnet18", "--json", tmp_path / "kept.json"]
    outcome = tool("benchmark.py", *chosen, *options)
    assert outcome.returncode == 0, outcome.stderr
    heading, _, *lines = outcome.stdout.splitlines()
    assert heading == "| what | figure | baseline | ratio | promised |"
    rows = json.loads((tmp_path / "kept.json").read_text())["rows"]
    assert len(rows) == len(lines) and list(dict.fromkeys(row["section"] for row in rows)) == chosen
    for row, line in zip(rows, lines):
        assert re.match(rf"\| {re.escape(row['what'])} \| -?[\d.,]+ {row['unit']} \|", line)
        ratio = row["baseline"] and f"{row['value'] / row['baseline']:.2f} ×"
        assert f"| {ratio or ''} |" in line


def test_the_benchmark_takes_the_photographs_of_a_folder_and_makes_them_as_many_as_it_needs(tmp_path):
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        draw(seed).save(tmp_path / "photos" / f"{seed}.JPG", "JPEG")
    options = Options(1, 1, tmp_path / "photos", "resnet18", tmp_path, tmp_path)
    made = list(collection(options, 7, 500, 375).iterdir())
    assert len({path.read_bytes() for path in made}) == 7
    assert len({Image.open(path).tobytes() for path in made}) == 3


def test_the_evaluation_prints_a_row_for_each_edit_and_all_other_measures(tmp_path):
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        for seed in range(3):
            draw_rich(seed + 100 * ord(kind), (180, 135)).save(tmp_path / kind / f"{seed}.png")
    outcome = tool("evaluate.py", tmp_path, "--queries", 1, "--strangers", "--duplicates", 2, "--times")
    assert outcome.returncode == 0, outcome.stderr
    rows = {line[:11].strip(): line[11:].split() for line in outcome.stdout.splitlines() if line}
    assert set(EDITS) | set(COPIES) <= set(rows)
    assert [float(value) for value in rows["mirror"]] == [1, 1, 1]
    assert "of 18 queries with no source in the collection, 0 get a `copy`" in outcome.stdout
    assert "duplicates: 16 pairs, 0 of them wrong" in outcome.stdout and "one query alone" in outcome.stdout


@pytest.mark.parametrize("folder", ["nowhere", "."], ids=["missing", "empty"])
def test_an_evaluation_without_photographs_is_one_line(folder):
    outcome = tool("evaluate.py", folder)
    assert outcome.returncode == 1 and outcome.stderr.count("\n") == 1 and "no photographs" in outcome.stderr


def test_by_class_leaves_a_photograph_itself_out():
    features = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], float)
    assert by_class(features, np.array([0, 0, 1, 1])) == (1.0, 1.0)
    assert by_class(features, np.array([0, 1, 0, 1]))[0] == 0.0
