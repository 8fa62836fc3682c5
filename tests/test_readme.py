"""What README, requirements and samples promise is what the program does."""

import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_pre_commit_runs_what_ci_checks_before_the_tests():
    ci = (ROOT / ".ci" / "run").read_text()
    checks = ci[ci.index("pip install -q -r tests/") : ci.index("python -m pytest")].splitlines()[1:]
    assert re.findall(r"entry: (.*?), language", (ROOT / ".pre-commit-config.yaml").read_text()) == checks


def test_contributing_names_what_is_there():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    code = (ROOT / "main.py").read_text() + "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    names = set(re.findall(r"`([A-Za-z_]{6,})`", text)) - {"FOLDER"}
    assert names and not [name for name in names if not re.search(rf"\b{name}\b", code)]
    tests = {path.name for path in (ROOT / "tests").glob("test_*.py")} - {"test_tools.py"}
    assert tests == set(re.findall(r"test_\w+\.py", text))


def test_script_metadata_and_requirements_agree():
    script = (ROOT / "main.py").read_text()
    block = re.search(r"^# /// script\n(.*?)^# ///$", script, re.MULTILINE | re.DOTALL)
    assert block
    inline = re.findall(r'^#   "(.*)",$', block[1], re.MULTILINE)
    assert inline == (ROOT / "requirements.txt").read_text().splitlines() and len(inline) >= 7


def test_readme_and_main_name_the_files_that_a_run_writes():
    """That it writes these, and nothing else, is seen in test_store.py."""
    for name in ("index.sqlite", "index.faiss", "copies.faiss", "lock", "crash"):
        assert f"| `{name}` |" in README and name in (ROOT / "main.py").read_text()


def test_the_weights_of_the_package_are_where_readme_says(trained):
    (expression,) = re.findall(r"--weights (\$\(python -c .*)", README)
    bin_first = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    found = subprocess.run(["sh", "-c", f"ls {expression}"], env=bin_first, capture_output=True, text=True, check=True)
    assert f"--model {trained[0]} " in README and found.stdout == f"{trained[1]}\n"
