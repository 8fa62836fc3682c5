"""The measuring tools run, in all their sections, and tell a good model from a poor one."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import bench_million
import numpy as np
import pytest
from benchmark import SECTIONS, Options, collection
from conftest import draw, draw_rich
from evaluate import CHAINS, COPIES, EDITS, OTHERS, by_class, planned
from PIL import Image

HERE = {"duplicates": 2, "points": 11, "search": 15}  # rows, at least


def tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, Path(__file__).with_name(name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("section", HERE)
def test_a_section_is_measured_in_all_its_steps(section, tmp_path, monkeypatch):
    """In this process, for fourteen more take a minute to start."""
    monkeypatch.setattr(bench_million, "in_a_process", lambda step, cold, *args: bench_million.STEPS[step](*args))
    rows = list(SECTIONS[section](Options(0.0015, 1, None, "resnet18", tmp_path, tmp_path)))
    assert all(row.value >= 0 for row in rows) and len(rows) >= HERE[section]
    if section == "points":
        assert [row.value for row in rows if row.what.endswith("recall")] == [1, 1]
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


def rows_of(outcome: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """The figures of each line of the evaluation's tables, by its name."""
    assert outcome.returncode == 0, outcome.stderr
    return {line[:13].strip(): line[13:].split() for line in outcome.stdout.splitlines() if line}


def photographs(folder: Path, seeds: Iterable[int]) -> Path:
    folder.mkdir(parents=True)
    for seed in seeds:
        draw_rich(seed, (180, 135)).save(folder / f"{seed}.png")
    return folder


def test_the_evaluation_prints_a_row_for_each_copy_and_all_other_measures(tmp_path):
    for kind in (0, 100):
        photographs(tmp_path / str(kind), range(kind, kind + 3))
    outcome = tool("evaluate.py", tmp_path, "--queries", 0, "--strangers", 8, "--duplicates", 1, "--times")
    rows = rows_of(outcome)
    assert set(COPIES) <= set(rows)
    assert "of 8 queries with no source in the collection, 0 get a `copy`, 0 get a `variant`" in outcome.stdout
    assert "duplicates: 7 pairs, 0 of them wrong" in outcome.stdout and "one query alone" in outcome.stdout
    assert "precision@10" in outcome.stdout


@pytest.mark.parametrize("others", [(), pytest.param(("--others",), marks=pytest.mark.slow)], ids=str)
def test_distractors_are_crops_of_no_source_and_no_stranger_and_are_made_once(others, tmp_path):
    photos, more = photographs(tmp_path / "photos", range(5)), photographs(tmp_path / "more", range(10, 16))
    options = ["--distractors", 12, "--from", more, "--cache", tmp_path / "kept", "--strangers", 5, "--queries"]
    outcome = tool("evaluate.py", photos, *options, 1, *others)
    rows, edits = rows_of(outcome), {*EDITS, *OTHERS, *CHAINS} if others else {*EDITS}
    assert edits <= set(rows)
    assert [float(value) for value in rows["mirror"]] == [1, 1, 1, 1]
    assert "4 photographs and 12 crops of others" in outcome.stdout and "of 8 queries with no source" in outcome.stdout
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("kept/*/distractors/*.jpg")}
    assert len(made) == 12
    again = tool("evaluate.py", photos, *options, 0).stdout
    assert again.splitlines()[-1] == outcome.stdout.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("kept/*/distractors/*")} == made


def test_no_photograph_is_both_asked_about_and_cropped(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(400)]
    photographs(tmp_path / "more", range(6))
    options = argparse.Namespace(queries=5, distractors=10, more=[tmp_path / "more"])
    plan = planned(paths, options)
    assert plan == planned(paths, argparse.Namespace(**{**vars(options), "queries": 9}))
    assert [len(part) for part in plan] == [150, 123, 123, 10]
    assert len(set().union(*plan)) == 406


def test_sets_of_distinct_pictures_are_printed_with_what_is_wrong_in_them(tmp_path):
    """A picture that was saved again does not belong into a set of distinct ones: a copy that is wrong, and listed."""
    photographs(tmp_path / "sets" / "apart", range(2))
    photographs(tmp_path / "sets" / "resaved", range(1))
    draw_rich(0, (180, 135)).save(tmp_path / "sets" / "resaved" / "0.jpg")
    photographs(tmp_path / "sets" / "small", range(2))
    for path in (tmp_path / "sets" / "small").iterdir():
        Image.open(path).resize((90, 68)).save(path)
    outcome = tool("evaluate.py", "--kinds", tmp_path / "sets", "--names", "--queries", 1)
    rows = rows_of(outcome)
    assert rows["apart"][:-1] == ["2", "0", "0", "0", "0"] + ["1.00"] * 15  # one recoloured may be a variant
    assert rows["resaved"][:3] == ["2", "2", "2"] and rows["resaved"][4] == "1" and rows["small"][5:] == ["-"] * 8
    assert rows["all"][:3] == ["6", "2", "2"]
    wrong = f"wrong: {tmp_path}/sets/resaved/0.jpg is called a copy of {tmp_path}/sets/resaved/0.png"
    assert wrong in outcome.stdout and f"listed: {tmp_path}/sets/resaved/0." in outcome.stdout


@pytest.mark.parametrize("folder", ["nowhere", "."], ids=["missing", "empty"])
def test_an_evaluation_without_photographs_is_one_line(folder):
    outcome = tool("evaluate.py", folder)
    assert outcome.returncode == 1 and outcome.stderr.count("\n") == 1 and "no photographs" in outcome.stderr


def test_by_class_leaves_a_photograph_itself_out():
    features = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], float)
    assert by_class(features, np.array([0, 0, 1, 1])) == (1.0, 1 / 3, 1.0)
    assert by_class(features, np.array([0, 1, 0, 1]))[0] == 0.0
