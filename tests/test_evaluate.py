"""tests/evaluate.py runs on any folder, and tells a good model from a poor one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_rich
from evaluate import COPIES, EDITS, by_class

EVALUATE = Path(__file__).with_name("evaluate.py")


def evaluate(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EVALUATE, *map(str, args)], capture_output=True, text=True, check=False)


def test_it_prints_a_row_for_each_edit_and_all_other_measures(tmp_path):
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        for seed in range(4):
            draw_rich(seed + 100 * ord(kind), (180, 135)).save(tmp_path / kind / f"{seed}.png")
    outcome = evaluate(tmp_path, "--queries", 1, "--strangers", "--duplicates", 2, "--times")
    assert outcome.returncode == 0, outcome.stderr
    rows = {line[:11].strip(): line[11:].split() for line in outcome.stdout.splitlines() if line}
    assert set(EDITS) | set(COPIES) <= set(rows)
    assert [float(value) for value in rows["mirror"]] == [1, 1, 1]
    assert "of 24 queries with no source in the collection, 0 get a `copy`" in outcome.stdout
    assert "duplicates: 16 pairs, 0 of them wrong" in outcome.stdout and "one query alone" in outcome.stdout


@pytest.mark.parametrize("folder", ["nowhere", "."], ids=["missing", "empty"])
def test_a_folder_without_photographs_is_one_line(folder):
    outcome = evaluate(folder)
    assert outcome.returncode == 1 and outcome.stderr.count("\n") == 1 and "no photographs" in outcome.stderr


def test_by_class_leaves_a_photograph_itself_out():
    features = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], float)
    assert by_class(features, np.array([0, 0, 1, 1])) == (1.0, 1.0)
    assert by_class(features, np.array([0, 1, 0, 1]))[0] == 0.0
