"""What README, requirements and samples promise is what the program does."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_samples import QUERIES, QUERY_FOLDER, SAMPLE_FOLDER, make_samples
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def test_readme_lists_every_option_and_no_other():
    listing = README[README.index("## Options") : README.index("## Which model")]
    usage = subprocess.run([sys.executable, ROOT / "main.py", "--help"], capture_output=True, text=True, check=True)
    assert options_in(listing) == options_in(usage.stdout) >= {"-k", "--top", "--json", "--prune"}


def test_the_test_command_of_readme_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^    (pip install .*?) && (python .*?)(?:  +#.*)?$", README, re.MULTILINE)
    assert len(commands) == 2
    for install, run in commands:
        assert install.replace("pip install", "pip install -q") in ci
        assert f"\n{run}\n" in ci


def test_script_metadata_and_requirements_agree():
    script = (ROOT / "main.py").read_text()
    block = re.search(r"^# /// script\n(.*?)^# ///$", script, re.MULTILINE | re.DOTALL)
    assert block
    inline = re.findall(r'^#   "(.*)",$', block[1], re.MULTILINE)
    assert inline == (ROOT / "requirements.txt").read_text().splitlines()
    assert len(inline) == 7


def test_readme_shows_the_files_that_a_run_writes(run, collection):
    collection(2)
    run("--model", "offline", "--index-only")
    written = {path.name for path in Path("image_index").glob("*/*")}
    assert written == {"index.sqlite", "index.faiss", "lock"}
    for name in written - {"lock"}:
        assert f"| `{name}` |" in README


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    make_samples(folder)
    return folder


@pytest.mark.parametrize("folder", [SAMPLE_FOLDER, QUERY_FOLDER])
def test_samples_are_what_our_own_program_draws(drawn, folder):
    """Codecs differ a little from one Pillow to the next: at most by 1.1 of 255 on average from 10.1 to 13.0."""
    if not (ROOT / folder).exists() or not any(path.name[0] != "." for path in (ROOT / folder).iterdir()):
        pytest.skip("the samples have been deleted, as README says they may be")
    names = {path.name for path in (drawn / folder).iterdir()}
    for name in names & {path.name for path in (ROOT / folder).iterdir()}:
        ours, theirs = (np.asarray(Image.open(top / folder / name).convert("RGB"), float) for top in (drawn, ROOT))
        assert np.abs(ours - theirs).mean() < 3, name


def test_samples_are_small_and_varied(drawn):
    samples = list((drawn / SAMPLE_FOLDER).iterdir())
    assert 35 <= len(samples) <= 45
    assert {path.suffix for path in samples} >= {".jpg", ".png", ".webp"}
    assert sum(path.stat().st_size for path in drawn.rglob("*.*")) < 1_000_000
    assert len(QUERIES) == 3
