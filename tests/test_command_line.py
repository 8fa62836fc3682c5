"""The command line: every option, every stream, every way to go wrong."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import termios
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HOSTILE_NAMES, MAIN, Outcome, draw
from PIL import Image, ImageOps

import main

IMAGES, QUERIES, INDEX = Path("bulk_images"), Path("that_one_image"), Path("image_index")
Run = Callable[..., Outcome]


@pytest.fixture
def search(run: Run, collection: Callable[[int], Path]) -> Run:
    """search(*args): with the offline descriptor, among 12 pictures, by default with 3.png in half the size."""
    collection(12)
    QUERIES.mkdir()
    draw(3).resize((48, 32)).save(QUERIES / "query.png")
    return lambda *args: run("--model", "offline", *args)


def bare(*args: str) -> subprocess.CompletedProcess[str]:
    """main.py where no package is installed but Python itself."""
    return subprocess.run([sys.executable, "-S", "-E", MAIN, *args], capture_output=True, text=True, timeout=60)


def objects(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def one_line(outcome: Outcome, *words: str) -> None:
    """The run failed, and said so in one line that has all these words in it."""
    assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1), outcome
    assert outcome.stderr.startswith("error: ")
    for word in words:
        assert word in outcome.stderr


# ---- Usage -----------------------------------------------------------------------------------------------------------

OPTIONS = """--images --index-dir -k --top --threshold --views --model --weights --device --batch-size --workers
    --index-only --duplicates --ui --port --rebuild --prune --json -0 --null --report --no-report -q --quiet -v
    --verbose"""


def test_help_needs_no_package_and_names_every_option() -> None:
    outcome = bare("--help")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    for option in OPTIONS.split():
        assert re.search(rf"^  .*{option}\b", outcome.stdout, re.MULTILINE), option
    for default in ("bulk_images/", "that_one_image/", "image_index/", "10", "resnet50"):
        assert default in outcome.stdout


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--unknown", "--unknown"),
        ("--ima x", "--ima"),
        ("-k 0", "--top.* 0"),
        ("--top 2.5", "--top.*2.5"),
        ("--top many", "--top.*many"),
        ("--threshold 1.5", "--threshold.*1.5"),
        ("--threshold nan", "--threshold.*nan"),
        ("--views some", "--views.*some"),
        ("--device tpu", "--device.*tpu"),
        ("--batch-size -1", "--batch-size.*-1"),
        ("--workers 0", "--workers.* 0"),
        ("--images", "--images"),
        ("-q -v", "not allowed with"),
        ("--json -0", "not allowed with"),
        ("--report page.html --no-report", "not allowed with"),
        ("--duplicates --index-only", "not allowed with"),
        ("--ui --duplicates", "not allowed with"),
        ("--duplicates many", "--duplicates.*many"),
        ("--duplicates --threshold 0.9", "--duplicates.*--threshold"),
        ("--duplicates 0.9 -k 3", "--duplicates.*--top"),
        ("--duplicates weak", "--duplicates.*copy, identical"),
        ("photo.jpg --duplicates", "--duplicates.*QUERY.*photo.jpg"),
        ("photo.jpg --ui", "--ui.*QUERY.*photo.jpg"),
        ("photo.jpg --index-only", "--index-only.*QUERY.*photo.jpg"),
        ("--ui --json", "--ui.*--json"),
        ("--port 1", "--port.*--ui"),
        ("--ui --port 65536", "--port.*65536"),
    ],
)
def test_a_usage_error_needs_no_package(line: str, complaint: str) -> None:
    outcome = bare(*line.split())
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert re.search(rf"usage: main.py(.|\n)*\nmain.py: error: .*{complaint}", outcome.stderr)


def test_a_missing_package_is_one_line_that_tells_what_to_do() -> None:
    outcome = bare("--model", "offline")
    assert (outcome.returncode, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1)
    assert "No module named" in outcome.stderr and "pip install -r requirements.txt" in outcome.stderr


# ---- Output ----------------------------------------------------------------------------------------------------------


def test_the_text_form(search: Run) -> None:
    shutil.copy(QUERIES / "query.png", IMAGES / "copy.png")
    heading, *lines = search("--views", "none").stdout.splitlines()
    assert re.match(r"that_one_image/query\.png  \(offline, 13 images\)", heading)
    assert len(lines) == 10
    for rank, line in enumerate(lines, start=1):
        assert re.fullmatch(rf"  {rank:2}  [ -]\d\.\d{{3}}  bulk_images/\w+\.png(  [a-z]+)?", line)
    assert lines[0] == "   1   1.000  bulk_images/copy.png  identical"
    assert "bulk_images/3.png" in lines[1] and not any("identical" in line for line in lines[1:])


def test_the_text_form_of_no_match(search: Run) -> None:
    (heading,) = search("--threshold", 1).stdout.splitlines()
    assert re.fullmatch(r"that_one_image/query\.png  \(offline, 12 images\).*no.* match", heading)


def test_the_json_form(search: Run) -> None:
    shutil.copy(QUERIES / "query.png", IMAGES / "copy.png")
    Path("broken.png").touch()
    outcome = search("--json", "-k", 2, QUERIES, "broken.png")
    answer, error = objects(outcome)
    assert set(answer) == {"query", "model", "matches"}
    assert (answer["query"], answer["model"]) == ("that_one_image/query.png", "offline")
    for rank, match in enumerate(answer["matches"], start=1):
        assert set(match) == {"rank", "path", "score", "identical", "label", "view", "region"} and match["rank"] == rank
    assert [(match["path"], match["identical"]) for match in answer["matches"]] == [
        ("bulk_images/copy.png", True),
        ("bulk_images/3.png", False),
    ]
    assert answer["matches"][0]["score"] == pytest.approx(1, abs=1e-3)
    assert error == {"query": "broken.png", "error": "an empty file"}
    assert outcome.status == 1


def test_json_and_text_tell_the_same(search: Run) -> None:
    matches = objects(search("--json"))[0]["matches"]
    lines = search().stdout.splitlines()[1:]
    assert [line.split()[:3] for line in lines] == [[str(m["rank"]), f"{m['score']:.3f}", m["path"]] for m in matches]


VIEWS = ("none", "auto", "all")


@pytest.fixture
def hostile(search: Run, request: pytest.FixtureRequest) -> bytes:
    """A name both of the only image in the collection and of the query."""
    name: bytes = HOSTILE_NAMES[request.param]
    shutil.rmtree(IMAGES), shutil.rmtree(QUERIES)
    for folder, size in ((IMAGES, (96, 64)), (QUERIES, (48, 32))):
        folder.mkdir()
        with open(os.path.join(os.fsencode(folder), name), "wb") as stream:
            draw(3).resize(size).save(stream, "PNG")
    return name


@pytest.mark.parametrize("hostile", HOSTILE_NAMES, indirect=True)
def test_a_hostile_name_makes_valid_json(hostile: bytes, search: Run) -> None:
    outcome = search("--json")
    (answer,) = objects(outcome)
    assert outcome.stdout.isascii() and outcome.stdout.count("\n") == 1
    assert os.fsencode(answer["query"]) == b"that_one_image/" + hostile
    assert os.fsencode(answer["matches"][0]["path"]) == b"bulk_images/" + hostile


@pytest.mark.parametrize("hostile", HOSTILE_NAMES, indirect=True)
def test_a_hostile_name_cannot_steer_a_terminal(hostile: bytes, search: Run) -> None:
    for folder in (IMAGES, QUERIES):
        (folder / os.fsdecode(b"bad " + hostile[-250:])).write_bytes(b"\x89PNG")
    outcome = search("-v")
    assert outcome.status == 1 and outcome.stdout.count("\n") == 2
    for text in (outcome.stdout, outcome.stderr):
        assert not re.search(r"[\0-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", text)
    assert outcome.stderr.count("bad ") == 2


def test_a_name_that_is_not_utf8_comes_out_byte_for_byte(search: Run, program: Callable[..., Any]) -> None:
    (IMAGES / "3.png").rename(IMAGES / os.fsdecode(b"caf\xe9.png"))
    stdout, stderr = program("--model", "offline", encoding=None, errors=None).communicate(timeout=60)
    assert b"bulk_images/caf\xe9.png\n" in stdout, stderr


def test_paths_alone_each_with_a_nul_at_its_end(search: Run, program: Callable[..., Any]) -> None:
    names = [b"caf\xe9.png", b"a\nb.png", "写真.png".encode()]
    for number, name in enumerate(names):
        (IMAGES / f"{number}.png").rename(IMAGES / os.fsdecode(name))
    Path("broken.png").touch()
    queries = [IMAGES / os.fsdecode(name) for name in names]
    process = program("--model", "offline", "-0", "-k", 11, *queries, "broken.png", encoding=None, errors=None)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and b"broken.png: an empty file" in stderr
    *paths, end = stdout.split(b"\0")
    assert (len(paths), end) == (3 * 11, b"")
    for number, name in enumerate(names):
        assert set(names) - set(paths[11 * number :][:11]) != set() and b"bulk_images/" + name in paths
    assert search("--null").stdout.split("\0")[0] == "bulk_images/3.png"
    assert search("-0", "--threshold", 1).stdout == ""


def test_results_alone_go_to_stdout(search: Run) -> None:
    (IMAGES / "bad.png").touch()
    outcome = search("-v", "missing.png", QUERIES)
    assert outcome.stdout.count("\n") == 11
    for words in ("12 found|13 found", "bad.png: an empty file", "missing.png: No such file"):
        assert re.search(words, outcome.stderr) and not re.search(words, outcome.stdout)


def test_the_summary_names_model_and_device(search: Run) -> None:
    (summary,) = search("--device", "cpu", "--no-report").stderr.splitlines()
    assert re.fullmatch(
        r"bulk_images: 12 found, 12 new, 0 unchanged, 0 skipped, 0 gone; [\d.,]+ images/s, "
        r"\d+% waiting for decoding, \d+% for the network \(offline on cpu, fp32\)",
        summary,
    )
    (summary,) = search("--device", "cpu", "--no-report").stderr.splitlines()
    assert summary == (
        "bulk_images: 12 found, 0 new, 12 unchanged, 0 skipped, 0 gone; no image was opened (offline on cpu, fp32)"
    )


def test_quiet_silences_all_but_warnings_and_errors(search: Run) -> None:
    (IMAGES / "bad.png").touch()
    assert search("-q").stderr == ""
    assert search("-q", "missing.png").stderr == "missing.png: No such file or directory\n"


def test_verbose_names_what_was_skipped(search: Run) -> None:
    (IMAGES / "bad.png").touch()
    assert "bulk_images/bad.png: an empty file" not in search().stderr
    assert "bulk_images/bad.png: an empty file" in search("-v").stderr
    assert "bulk_images/bad.png: an empty file" in search("--verbose").stderr


# ---- On a terminal ---------------------------------------------------------------------------------------------------


def on_terminal(columns: int, *args: object, **environment: str) -> str:
    """What main.py prints on a terminal so many columns wide."""
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    environment = {**kept, "TERM": "xterm", **environment}
    command = [sys.executable, MAIN, "--model", "offline", "-q", "--no-report", *map(str, args)]
    process = subprocess.Popen(command, stdout=its_end, env=environment)
    os.close(its_end)
    seen = b""
    try:
        while chunk := os.read(terminal, 4096):
            seen += chunk
    except OSError:
        pass  # the other end was closed
    os.close(terminal)
    assert process.wait(60) == 0
    return seen.decode().replace("\r\n", "\n")


COLOUR = re.compile(r"\x1b\[[\d;]*m")


def test_colour_on_a_terminal_alone_and_not_if_it_is_not_wanted(search: Run) -> None:
    shutil.copy(QUERIES / "query.png", IMAGES / "same.png")
    coloured = on_terminal(100)
    assert coloured.startswith("\x1b[1mthat_one_image/query.png\x1b[0m") and "\x1b[32midentical" in coloured
    plain = on_terminal(100, NO_COLOR="1")
    assert plain == on_terminal(100, TERM="dumb") == COLOUR.sub("", coloured) and "\x1b" not in plain
    assert [line.split() for line in plain.splitlines()] == [line.split() for line in search().stdout.splitlines()]


# ---- Options ---------------------------------------------------------------------------------------------------------


def test_queries_may_stand_on_both_sides_of_an_option(search: Run) -> None:
    first, second = IMAGES / "1.png", IMAGES / "2.png"
    found = objects(search(first, "--json", "-k", 1, second))
    assert [answer["query"] for answer in found] == [str(first), str(second)]


@pytest.mark.parametrize("option", ["-k", "--top"])
def test_top(option: str, search: Run) -> None:
    assert len(search().stdout.splitlines()) == 1 + 10
    assert len(search(option, 3).stdout.splitlines()) == 1 + 3
    assert len(search(option, 999).stdout.splitlines()) == 1 + 12


def test_threshold(search: Run) -> None:
    scores = [match["score"] for match in objects(search("--json", "-k", 12))[0]["matches"]]
    found = objects(search("--json", "-k", 12, "--threshold", 0.9))[0]["matches"]
    assert 0 < len(found) < 12 and [match["score"] for match in found] == [score for score in scores if score >= 0.9]


def test_a_threshold_may_be_negative(search: Run) -> None:
    assert search("--threshold", "-0.5").status == 0 and len(search("--threshold", "-1").stdout.splitlines()) == 11


def test_views(search: Run) -> None:
    ImageOps.mirror(draw(5)).save("mirrored.png")
    best = {views: objects(search("--json", "mirrored.png", "--views", views))[0]["matches"][0] for views in VIEWS}
    assert (best["auto"]["path"], best["auto"]["view"]) == ("bulk_images/5.png", "mirrored")
    assert best["auto"]["score"] > 0.9 > best["none"]["score"]
    assert (best["none"]["view"], best["all"]["view"]) == ("", "mirrored")


def test_images(search: Run, collection: Callable[..., Path]) -> None:
    collection(4, "others")
    paths = [match["path"] for match in objects(search("--json", "--images", "others"))[0]["matches"]]
    assert paths[0] == "others/3.png" and len(paths) == 4
    absolute = objects(search("--json", "--images", Path("others").absolute()))[0]["matches"]
    assert [match["path"] for match in absolute] == [str(Path(path).absolute()) for path in paths]


def test_index_dir(search: Run) -> None:
    search("--index-dir", "deep/in/another")
    assert not INDEX.exists() and list(Path("deep/in/another").rglob("index.sqlite"))


def test_queries_are_files_and_folders(search: Run) -> None:
    (QUERIES / "deep").mkdir()
    draw(5).save(QUERIES / "deep" / "b.jpg")
    draw(6).save("alone.webp")
    assert [answer["query"] for answer in objects(search("--json"))] == [
        "that_one_image/deep/b.jpg",
        "that_one_image/query.png",
    ]
    assert [answer["query"] for answer in objects(search("--json", "alone.webp", "that_one_image/deep"))] == [
        "alone.webp",
        "that_one_image/deep/b.jpg",
    ]


def test_a_folder_of_queries_may_hold_other_files(search: Run) -> None:
    (QUERIES / "notes.txt").write_text("not meant to be an image")
    (QUERIES / ".hidden.png").touch()
    outcome = search("--json")
    assert (outcome.status, len(objects(outcome))) == (0, 1)
    (QUERIES / "broken.png").touch()
    outcome = search("--json")
    assert outcome.status == 1
    assert objects(outcome)[0] == {"query": "that_one_image/broken.png", "error": "an empty file"}


def test_model(search: Run, run: Run) -> None:
    assert "(offline, 12 images)" in search().stdout
    assert "resnet50" in run("--model", "resnet50").stderr  # its weights cannot be had here


def test_weights(search: Run, run: Run) -> None:
    network = main.torchvision.models.shufflenet_v2_x0_5(weights=None)
    torch.save(network.state_dict(), "weights.pt")
    outcome = run("--model", "shufflenet_v2_x0_5", "--weights", "weights.pt", "-k", 1)
    assert outcome.stdout.startswith("that_one_image/query.png  (shufflenet_v2_x0_5, 12 images)")


def test_device(search: Run, run: Run) -> None:
    assert "(offline on cpu, fp32)" in search("--device", "cpu").stderr
    for device, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        outcome = search("--device", device)
        if there:
            assert f"offline on {device}" in outcome.stderr
        else:
            one_line(outcome, f"--device {device}")


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (100, 100)], ids=str)
def test_batch_size_and_workers_change_no_answer(sizes: tuple[int, int], search: Run) -> None:
    expected = search("--index-dir", "default").stdout
    search("--index-only", "--batch-size", sizes[0], "--workers", sizes[1])
    assert search().stdout == expected


def test_index_only(search: Run) -> None:
    outcome = search("--index-only")
    assert (outcome.status, outcome.stdout) == (0, "") and "12 new" in outcome.stderr
    assert "no image was opened" in search().stderr


def test_rebuild(search: Run) -> None:
    before = search().stdout
    outcome = search("--rebuild")
    assert outcome.stdout == before and "12 new, 0 unchanged" in outcome.stderr


def test_prune(search: Run) -> None:
    search("--index-only")
    (IMAGES / "7.png").unlink()
    assert "1 gone" in search("--index-only").stderr
    assert "0 gone" in search("--index-only", "--prune").stderr
    assert "0 gone" in search("--index-only").stderr


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_no_collection(there: bool, search: Run) -> None:
    shutil.rmtree(IMAGES)
    if there:
        IMAGES.mkdir()
    outcome = search("-q") if there else search("-q", "--index-only")
    assert (outcome.status, outcome.stdout) == (1, "")
    assert re.search(r"error: bulk_images (has no usable image|is missing): put images .* --images\n$", outcome.stderr)


@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_no_query(there: bool, search: Run) -> None:
    shutil.rmtree(QUERIES)
    if there:
        QUERIES.mkdir()
    outcome = search()
    assert (outcome.status, outcome.stdout) == (1, "") and "12 new" in outcome.stderr
    assert re.search(r"error: .*that_one_image.*put one there, or name it: .*main.py photo.jpg\n$", outcome.stderr)
    assert "no image was opened" in search("--index-only").stderr


def test_no_query_in_a_folder_that_was_named(search: Run) -> None:
    Path("albums").mkdir()
    outcome = search("albums", "-q")
    one_line(outcome, "no image to search with in albums")


def cut_short(path: Path) -> None:
    draw(1, (300, 200)).save(path)
    os.truncate(path, path.stat().st_size // 2)


BAD_FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("bad.png", lambda path: None, "No such file or directory"),
    "text": ("bad.txt", lambda path: path.write_text("hello"), "not an image"),
    "truncated PNG": ("bad.png", cut_short, "truncated"),
    "truncated JPEG": ("bad.jpg", cut_short, "truncated"),
    "zero bytes": ("bad.png", lambda path: path.touch(), "an empty file"),
    "mislabelled": ("bad.jpg", lambda path: path.write_text("hello"), "not an image"),
    "bomb": ("bad.png", lambda path: bomb(path), "pixels"),
    "FIFO": ("bad.png", os.mkfifo, "not a regular file"),
    "socket": ("bad.png", lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), ""),
}


def bomb(path: Path) -> None:
    """A header that promises 60,000 × 60,000 pixels."""
    Image.new("1", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_query_is_a_line_of_error_and_the_others_are_answered(kind: str, search: Run) -> None:
    name, make, reason = BAD_FILES[kind]
    make(Path(name))
    outcome = search("-q", IMAGES / "1.png", name, QUERIES)
    assert outcome.status == 1
    assert re.findall(r"^\S.*(?=  \()", outcome.stdout, re.MULTILINE) == [
        "bulk_images/1.png",
        "that_one_image/query.png",
    ]
    assert re.fullmatch(rf"{name}: .*{reason}.*\n", outcome.stderr)
    answers = objects(search("-q", "--json", IMAGES / "1.png", name, QUERIES))
    assert [answer.get("error") is None for answer in answers] == [True, False, True]
    assert answers[1]["query"] == name and reason in answers[1]["error"]


@pytest.mark.parametrize("kind", [kind for kind in BAD_FILES if kind not in ("missing", "text")])
def test_a_bad_file_in_the_collection_is_skipped_with_its_reason(kind: str, search: Run) -> None:
    name, make, reason = BAD_FILES[kind]
    make(IMAGES / name)
    outcome = search("-v", "--index-only")
    assert outcome.status == 0 and "13 found, 12 new, 0 unchanged, 1 skipped" in outcome.stderr
    assert re.search(rf"bulk_images/{name}: .*{reason}", outcome.stderr)


def test_a_collection_of_bad_files_alone_is_an_error_with_the_commonest_reasons(search: Run) -> None:
    shutil.rmtree(IMAGES)
    IMAGES.mkdir()
    for number in range(5):
        (IMAGES / f"empty {number}.png").touch()
    for number in range(3):
        (IMAGES / f"text {number}.png").write_text("hello")
    for number in range(2):
        os.mkfifo(IMAGES / f"fifo {number}.png")
    bomb(IMAGES / "bomb.png")
    one_line(
        search("-q"), "bulk_images", "11", "5 × an empty file; 3 × not an image, whatever its name; 2 × not a regular"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "resnet5"], ["resnet5", "resnet50"]),
        (["--model", "ofline"], ["ofline", "offline"]),
        (["--model", "qwertz"], ["qwertz"]),
        (["--model", "timm:no_such_model"], ["timm:no_such_model"]),
        (["--model", "resnet18", "--weights", "missing.pt"], ["missing.pt", "IMAGENET1K_V1"]),
        (["--model", "shufflenet_v2_x0_5", "--weights", "corrupt.pt"], ["corrupt.pt", "weights"]),
        (["--model", "shufflenet_v2_x1_0", "--weights", "other.pt"], ["other.pt", "should be"]),
        (["--model", "resnet18"], ["resnet18", "--weights FILE"]),
    ],
    ids=" ".join,
)
def test_a_model_that_cannot_be_had_is_one_line(options: list[str], words: list[str], search: Run, run: Run) -> None:
    Path("corrupt.pt").write_bytes(b"PK\3\4 no weights")
    torch.save(main.torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(), "other.pt")
    one_line(run(*options), *words)
    assert not INDEX.exists()


def test_without_weights_the_offline_descriptor_answers_and_says_so(search: Run, run: Run) -> None:
    outcome = run("-q")
    assert outcome.status == 0 and "(offline, 12 images)" in outcome.stdout
    for words in ("resnet50", "offline", "copies", "--weights FILE", "connect once", "--model"):
        assert words in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_a_cache_that_cannot_be_written_is_one_line(search: Run) -> None:
    Path("a file").touch()
    one_line(search("-q", "--index-dir", "a file"), "a file", "--index-dir")
    one_line(search("-q", "--index-dir", "x" * 300), "name too long", "--index-dir")


# ---- Interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["load_model", "launch", "build_index", "search"])
def test_an_interruption_is_one_line_and_status_130(moment: str, search: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(main, moment, interrupt)
        outcome = search("-q")
    assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (130, "", 1)
    assert "interrupted" in outcome.stderr and search().status == 0


def test_a_closed_pipe_is_quiet(search: Run, program: Callable[..., subprocess.Popen[str]]) -> None:
    read, write = os.pipe()
    os.close(read)  # as `| head` does when it has seen enough
    process = program("--model", "offline", "-q", "bulk_images", stdout=write)
    os.close(write)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode in (0, 141)  # 141: as the shell reports a death by SIGPIPE


def test_head_gets_its_lines(search: Run, program: Callable[..., subprocess.Popen[str]]) -> None:
    for number in range(100):
        shutil.copy(IMAGES / "0.png", IMAGES / f"{number:0100}.png")
    process = program("--model", "offline", "-q", "-k", 100, *["bulk_images/0.png"] * 20)  # more than a pipe holds
    assert process.stdout.readline() == "bulk_images/0.png  (offline, 112 images)\n"
    process.stdout.close()
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode in (0, 141)
