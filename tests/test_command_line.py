"""The command line: every option, every stream, every way to go wrong."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MAIN, Outcome, counts, draw, one_line
from PIL import Image
from zygote import Zygote

import main

IMAGES, QUERIES, INDEX = Path("bulk_images"), Path("that_one_image"), Path("image_index")


@pytest.fixture
def search(run, collection: Callable[[int], Path]) -> Callable[..., Outcome]:
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


def test_help_needs_no_package_and_names_the_defaults():
    outcome = bare("--help")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    for default in ("bulk_images/", "that_one_image/", "image_index/", "10", "resnet50"):
        assert default in outcome.stdout


CROPS = ["1,2,3", "1,2,3,many", "0,5,9,5", "0,0,nan,1", "0,0,1,inf", "0,0,inf,1", "-1,0,5,5"]
USAGE_ERRORS = {  # by what is complained of
    "unrecognized": ["--unknown", "--ima x", "--views all"],
    "expected one argument": ["--images", "--exclude"],
    "above 0": ["--top 0", "--batch-size -1", "--workers 0"],
    "from 0 to 65535": ["--port 65536", "--port -1"],
    "invalid int value": ["-k 2.5", "--top many", "--port many --ui"],
    "invalid choice": ["--device tpu"],
    "variant, copy, identical": ["--threshold 1.5", "--threshold nan", "--threshold similar", "--duplicates weak"],
    "LEFT,TOP,RIGHT,BOTTOM": [f"--crop={part}" for part in CROPS],
    "not allowed with": ["--duplicates --index-only", "--ui --duplicates", "--json -0", "-q -v"],
    "with a QUERY": ["photo.jpg --duplicates", "photo.jpg --ui", "photo.jpg --index-only"],
    "with --crop": [f"{it} --crop 0,0,1,1" for it in ("--duplicates", "--ui", "--index-only", "--export there")],
    "with --threshold": ["--duplicates --threshold 0.9"],
    "with --top": ["--duplicates 0.9 -k 3"],
    "with --json": ["--ui --json"],
    "with --exclude": ["--no-update --exclude x"],
}


@pytest.mark.parametrize(("complaint", "line"), [(it, line) for it, lines in USAGE_ERRORS.items() for line in lines])
def test_a_usage_error_needs_no_package(complaint, line):
    outcome, (option, value) = bare(*line.split()), re.search(r"(-[\w-]+)[ =]?(\S*)", line).groups()
    assert (outcome.returncode, outcome.stdout) == (2, "")
    usage, error = outcome.stderr.split("\nmain.py: error: ")
    refused = [value] if "invalid" in complaint or "," in complaint else []
    assert usage.startswith("usage: main.py") and all(word in error for word in [option, complaint, *refused]), error


def test_a_missing_package_is_one_line_that_tells_what_to_do():
    IMAGES.mkdir()
    outcome = bare("--model", "offline")
    assert (outcome.returncode, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1)
    assert "No module named" in outcome.stderr and "pip install -r requirements.txt" in outcome.stderr


def test_the_text_form(search):
    shutil.copy(QUERIES / "query.png", IMAGES / "copy.png")
    heading, *lines = search().stdout.splitlines()
    assert re.match(r"that_one_image/query\.png  \(offline, 13 images\)", heading)
    assert len(lines) == 10
    for rank, line in enumerate(lines, start=1):
        assert re.fullmatch(rf"  {rank:2}  [ -]\d\.\d{{3}}  bulk_images/\w+\.png(  [a-z]+(, covers 100 %)?)?", line)
    assert lines[0] == "   1   1.000  bulk_images/copy.png  identical"
    assert "bulk_images/3.png" in lines[1] and not any("identical" in line for line in lines[1:])
    matches = objects(search("--json"))[0]["matches"]
    assert [line.split()[:3] for line in lines] == [[str(m["rank"]), f"{m['score']:.3f}", m["path"]] for m in matches]
    (heading,) = search("--threshold", 1, IMAGES / "1.png").stdout.splitlines()
    assert re.fullmatch(r"bulk_images/1\.png  \(offline, 13 images\).*no match", heading)


def test_json_has_no_negative_zero():
    region = main.Region([(-0.0, 1.5)], [(0.0, -0.0)], 5, 1.0)
    engine: Any = SimpleNamespace(model=SimpleNamespace(name="m"))
    found = main.Answer("a", [main.Match(1, "-0.0, b", -0.0, False, "copy", region=region)])
    (match,) = json.loads(line := main.as_json(found, engine))["matches"]
    assert line.count("-0.0") == 1 and match["path"] == "-0.0, b" and match["region"]["corners"] == [[0.0, 1.5]]


def test_the_json_form(search):
    shutil.copy(QUERIES / "query.png", IMAGES / "copy.png")
    Path("broken.png").touch()
    outcome = search("--json", "-k", 2, QUERIES, "broken.png")
    answer, error = objects(outcome)
    assert answer.keys() == {"query", "model", "matches"}
    assert (answer["query"], answer["model"]) == ("that_one_image/query.png", "offline")
    first, second = answer["matches"]
    assert first.keys() == second.keys() == set(main.Match._fields)
    assert (first["lost"], first["truncated"]) == (None, False)
    assert (first["rank"], first["path"], first["identical"]) == (1, "bulk_images/copy.png", True)
    assert (second["rank"], second["path"], second["identical"]) == (2, "bulk_images/3.png", False)
    assert first["score"] == pytest.approx(1, abs=1e-3)
    assert error == {"query": "broken.png", "error": "an empty file"} and outcome.status == 1


def test_names_come_out_byte_for_byte_and_with_null_each_has_a_nul_at_its_end(search, zygote):
    names = [b"caf\xe9.png", b"a\nb.png", "写真.png".encode()]
    for number, name in enumerate(names):
        (IMAGES / f"{number}.png").rename(IMAGES / os.fsdecode(name))
    Path("broken.png").touch()
    queries = [IMAGES / os.fsdecode(name) for name in names]
    assert os.fsdecode(b"  bulk_images/caf\xe9.png") in zygote("--model", "offline", "-k", 11, queries[1]).stdout
    ended = zygote("--model", "offline", "-0", "-k", 11, *queries, "broken.png")
    assert ended.status == 1 and "broken.png: an empty file" in ended.stderr
    *paths, end = os.fsencode(ended.stdout).split(b"\0")
    assert (len(paths), end) == (3 * 11, b"")
    every = {b"bulk_images/" + os.fsencode(name) for name in os.listdir(IMAGES)}
    for number, name in enumerate(names):
        assert set(paths[11 * number :][:11]) == every - {b"bulk_images/" + name}
    assert search("--null").stdout.split("\0")[0] == "bulk_images/3.png"
    assert search("-0", "--threshold", 1).stdout == ""


def test_results_alone_go_to_stdout_and_how_much_is_said_depends_on_q_and_v(search):
    (IMAGES / "bad.png").touch()
    said = {option: search("missing.png", QUERIES, *option.split()) for option in ("", "-q", "-v", "--verbose")}
    skipped, missing = "bulk_images/bad.png: an empty file", "missing.png: No such file or directory\n"
    for option, outcome in said.items():
        assert outcome.status == 1 and outcome.stdout.count("\n") == 11 and "missing" not in outcome.stdout
        assert missing in outcome.stderr and ("13 found" in outcome.stderr) == (option != "-q")
        assert (skipped in outcome.stderr) == (option in ("-v", "--verbose"))
    assert said["-q"].stderr == missing and search("-q").stderr == ""


def test_the_summary(search):
    for opened in (r"12 new, 0 unchanged, 0 skipped, 0 gone; [\d.,]+ images/s",
                   "0 new, 12 unchanged, 0 skipped, 0 gone; no image was opened"):  # fmt: skip
        (summary,) = search("--device", "cpu", "--no-report").stderr.splitlines()
        assert re.fullmatch(rf"bulk_images: 12 found, {opened} \(offline on cpu, fp32\)", summary)


def shown(terminal: int, look: Callable[[bytes], Any] = lambda seen: None) -> bytes:
    """All that a terminal shows until its other end is closed."""
    seen = b""
    with suppress(OSError):  # it was closed
        while chunk := os.read(terminal, 4096):
            seen += chunk
            look(seen)
    os.close(terminal)
    return seen


def on_terminal(zygote: Zygote, **environment: str) -> str:
    """What main.py prints on a terminal."""
    terminal, its_end = os.openpty()
    environment = {"TERM": "xterm", "NO_COLOR": "", **environment}
    ask = ("--model", "offline", "-q", "--no-report")
    assert zygote(*ask, terminal=os.ttyname(its_end), env=environment).status == 0
    os.close(its_end)
    return shown(terminal).decode().replace("\r\n", "\n")


def test_colour_on_a_terminal_alone_and_not_if_it_is_not_wanted(search, zygote):
    shutil.copy(QUERIES / "query.png", IMAGES / "same.png")
    coloured, piped = on_terminal(zygote), search().stdout
    assert coloured.startswith("\x1b[1mthat_one_image/query.png\x1b[0m") and "\x1b[32midentical" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == piped and "\x1b" not in piped
    assert on_terminal(zygote, NO_COLOR="1") == on_terminal(zygote, TERM="dumb") == piped


@pytest.mark.parametrize("lines", [0, 1])
def test_a_reader_that_has_seen_enough_ends_the_run_quietly(lines, search, program):
    """As `| head` does."""
    for number in range(100):
        shutil.copy(IMAGES / "0.png", IMAGES / f"{number:0240}.png")
    process = program("--model", "offline", "-q", "-k", 100, *["bulk_images/0.png"] * 3)  # more than a pipe holds
    for _ in range(lines):
        assert process.stdout.readline() == "bulk_images/0.png  (offline, 112 images)\n"
    process.stdout.close()
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode in (0, 141)  # 141: as the shell reports a death by SIGPIPE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("form", [(), ("--json",), ("-0",), ("--duplicates",)], ids=" ".join)
def test_results_that_cannot_be_written_are_one_line(form, search, zygote):
    shutil.copy(IMAGES / "0.png", IMAGES / "copy.png")
    ended = zygote("--model", "offline", "-q", *form, terminal="/dev/full")
    assert ended.status == 1 and re.fullmatch("error: the results cannot be written.*\n", ended.stderr), ended


def test_without_a_stdout_the_results_cannot_be_written(search, program):
    process = program("--model", "offline", "-q", preexec_fn=lambda: os.close(1))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and re.fullmatch("error: the results cannot be written.*\n", error), error


def test_two_dashes_end_the_options(search):
    for name in ("-rf.jpg", "--top", "--"):
        draw(3).resize((48, 32)).save(name, "PNG")
    outcome = search("--json", "-k", 1, "--", "-rf.jpg", "--top", "--")
    assert [it["query"] for it in objects(outcome)] == ["-rf.jpg", "--top", "--"]
    assert [it["matches"][0]["path"] for it in objects(outcome)] == ["bulk_images/3.png"] * 3
    assert search("--index-only", "--", "photo.jpg").status == 2


def test_top_and_threshold(search):
    every = objects(search("--json", "-k", 999))[0]["matches"]
    assert len(every) == 12 and objects(search("--json", "--top", 3))[0]["matches"] == every[:3]
    for least in (0.9, 0, -0.5, -1):
        found = objects(search("--json", "-k", 12, "--threshold", least))[0]["matches"]
        assert found == [match for match in every if match["score"] >= least]


def test_images_and_index_dir(search, collection):
    collection(4, "others")
    where = ("--json", "--index-dir", "deep/in/another", "--images")
    paths = [match["path"] for match in objects(search(*where, "others"))[0]["matches"]]
    assert paths[0] == "others/3.png" and len(paths) == 4
    absolute = objects(search(*where, Path("others").absolute()))[0]["matches"]
    assert [match["path"] for match in absolute] == [str(Path(path).absolute()) for path in paths]
    assert not INDEX.exists() and list(Path("deep/in/another").rglob("index.sqlite"))


def test_queries_are_files_and_folders_on_both_sides_of_an_option(search):
    (QUERIES / "deep").mkdir()
    draw(5).save(QUERIES / "deep" / "b.jpg")
    draw(6).save("alone.webp")
    by_default, named = search("--json"), search("alone.webp", "--json", "-k", 1, "that_one_image/deep")
    assert [it["query"] for it in objects(by_default)] == ["that_one_image/deep/b.jpg", "that_one_image/query.png"]
    assert [it["query"] for it in objects(named)] == ["alone.webp", "that_one_image/deep/b.jpg"]


def test_a_folder_of_queries_may_hold_other_files(search):
    (QUERIES / "notes.txt").write_text("not meant to be an image")
    (QUERIES / ".hidden.png").touch()
    assert len(objects(search("--json"))) == 1
    (QUERIES / "broken.png").touch()
    error, _ = objects(search("--json"))
    assert error == {"query": "that_one_image/broken.png", "error": "an empty file"}


def test_device(search):
    devices = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for device, there in devices.items():
        outcome = search("--device", device)
        assert there == (outcome.status == 0) and ("offline on cpu" if there else device) in outcome.stderr


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (100, 100)], ids=str)
def test_batch_size_and_workers_change_no_answer(sizes, search):
    expected = search("--index-dir", "default").stdout
    outcome = search("--index-only", "--batch-size", sizes[0], "--workers", sizes[1])
    assert (outcome.status, outcome.stdout) == (0, "")
    again = search()
    assert again.stdout == expected and "no image was opened" in again.stderr


@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_no_collection(there, search):
    shutil.rmtree(IMAGES)
    if there:
        IMAGES.mkdir()
    one_line(search("-q", "--index-only"), "bulk_images", "put images", "--images")


@pytest.mark.parametrize("named", [(), ("albums",)], ids=["by default", "named"])
@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_no_query(there, named, search):
    shutil.rmtree(QUERIES)
    if there:
        (QUERIES if not named else Path(*named)).mkdir()
    outcome = search(*named, "-q")
    assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1)
    if there or not named:
        one_line(outcome, *named or ["that_one_image"], "put one there, or name it: main.py photo.jpg")
    assert "no image was opened" in search("--index-only").stderr


def cut_short(path: Path) -> None:
    draw(1, (300, 200)).save(path)
    os.truncate(path, 20)


def bomb(path: Path) -> None:
    """A header that promises 60,000 × 60,000 pixels."""
    Image.new("1", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing.png": (lambda path: None, "No such file or directory"),
    "notes.txt": (lambda path: path.write_text("hello"), "not an image"),
    "truncated.png": (cut_short, "Truncated"),
    "zero bytes.png": (Path.touch, "an empty file"),
    "mislabelled.jpg": (lambda path: path.write_text("hello"), "no image at all"),
    "bomb.png": (bomb, "too large: over 200,000,000 pixels"),
    "fifo.png": (os.mkfifo, "not a regular file"),
    "socket.png": (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), ""),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_line_of_error_as_a_query_and_skipped_in_the_collection(name, search):
    make, reason = BAD_FILES[name]
    make(Path(name))
    outcome = search("-q", "--json", IMAGES / "1.png", name, QUERIES)
    first, error, last = objects(outcome)
    assert outcome.status == 1 and re.fullmatch(rf"{name}: .*{reason}.*\n", outcome.stderr)
    assert error["query"] == name and reason in error["error"] and first["matches"] and last["matches"]
    if name not in ("missing.png", "notes.txt"):
        make(IMAGES / name)
        outcome = search("-v", "--index-only")
        assert outcome.status == 0 and "13 found, 0 new, 12 unchanged, 1 skipped" in outcome.stderr
        assert re.search(rf"bulk_images/{name}: .*{reason}", outcome.stderr)


def test_a_collection_of_bad_files_alone_is_one_line_with_a_reason(search):
    shutil.rmtree(IMAGES)
    IMAGES.mkdir()
    (IMAGES / "empty.png").touch()
    bomb(IMAGES / "bomb.png")
    one_line(search("-q"), "bulk_images", "skipped", "too large: over 200,000,000 pixels")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "resnet5"], ["resnet5", "resnet50"]),
        (["--model", "ofline"], ["ofline", "offline"]),
        (["--model", "qwertz"], ["qwertz", "no such model"]),
        (["--model", "ResNet50_Weights"], ["ResNet50_Weights"]),
        (["--model", "fcn_resnet50"], ["fcn_resnet50", "no such model"]),  # for segments
        (["--model", "timm:no_such_model"], ["timm:no_such_model"]),
        (["--model", "timm:"], ["timm:"]),
        (["--model", "timm:timm/resnet18"], ["timm:timm/resnet18"]),  # a name on the Hub
        (["--model", "timm:test_vit", "--weights", "missing.pt"], ["missing.pt"]),
        (["--weights", "missing.pt"], ["missing.pt", "no such file", "IMAGENET1K_V1"]),
        (["--weights", "."], ["--weights"]),
        (["--model", "resnet18", "--weights", "IMAGENET1K_V2"], ["IMAGENET1K_V2", "IMAGENET1K_V1"]),
        (["--model", "offline", "--weights", "missing.pt"], ["missing.pt", "takes no weights"]),
    ],
    ids=" ".join,
)
def test_a_model_that_cannot_be_had_is_one_line(options, words, search, run):
    one_line(run(*options), *words)
    assert not INDEX.exists()


@pytest.mark.parametrize("moment", ["load_model", "launch", "build_index", "search"])
def test_an_interruption_is_one_line_and_status_130(moment, search, monkeypatch):
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(main, moment, interrupt)
        outcome = search("-q")
    assert (outcome.status, outcome.stdout, outcome.stderr.count("\n")) == (130, "", 1)
    assert "interrupted" in outcome.stderr and search().status == 0


OUT_OF_MEMORY = [  # as it is said by
    "CUDA out of memory. Tried to allocate 20.00 MiB",
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
    "std::bad_alloc",
    "can't start new thread",
    "libtorch_cpu.so: failed to map segment from shared object",
    "libgomp.so.1: cannot allocate memory in static TLS block",
]
OTHER_ERRORS = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: misaligned address. Device-side allocations may be wrong",
    "could not create a memory object",
]


@pytest.mark.parametrize("words", [*OUT_OF_MEMORY, *OTHER_ERRORS], ids=lambda words: words[:20])
def test_a_lack_of_memory_is_one_line_and_no_other_error_is_taken_for_it(words, search, monkeypatch):
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(main, "launch", fail)
    if words in OUT_OF_MEMORY:
        one_line(search("-q"), f"out of memory ({words}", "--workers 1")
    else:
        with pytest.raises(RuntimeError, match=words[:10]):
            search("-q")


SAMPLES = {"captioned.jpg": "teapot.jpg", "cropped.jpg": "lighthouse.jpg", "mirrored.jpg": "sailing-boat.jpg"}


@pytest.fixture
def samples() -> None:
    """The folders as they come with the program, without what a user has put there."""
    if not all((MAIN.parent / IMAGES / "samples" / name).exists() for name in SAMPLES.values()):
        pytest.skip("the samples have been deleted, as README says they may be")
    shutil.copytree(MAIN.parent / IMAGES / "samples", IMAGES / "samples")
    QUERIES.mkdir()
    for name in SAMPLES:
        shutil.copy(MAIN.parent / QUERIES / name, QUERIES)


def finished(process: subprocess.Popen[str]) -> Outcome:
    stdout, stderr = process.communicate(timeout=120)
    return Outcome(process.returncode, stdout, stderr)


def test_the_main_job_finds_the_sample_that_each_query_was_made_from(samples, program):
    """With no options, and no weights to be had."""
    first, second = (finished(program(*queries)) for queries in ((), ("that_one_image/captioned.jpg",)))
    assert first.status == second.status == 0
    assert re.findall(r"^(\S+).*\n +1 +\S+ +(\S+)", first.stdout, re.MULTILINE) == [
        (f"that_one_image/{query}", f"bulk_images/samples/{sample}") for query, sample in SAMPLES.items()
    ]
    assert "offline descriptor" in first.stderr and "Traceback" not in first.stderr
    assert second.stdout and first.stdout.startswith(second.stdout)
    assert "0 new" in second.stderr and "no image was opened" in second.stderr


def test_the_functions_work_from_python_as_readme_shows(samples):
    shown = re.search(r"```python\n(.*?)```", (MAIN.parent / "README.md").read_text(), re.DOTALL)[1]
    script = f"{shown}\n(same,) = search('that_one_image/cropped.jpg')\nprint(same.query, same.error, same.matches[0])"
    command, path = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(MAIN.parent)}
    process = subprocess.run(command, env=path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    *matches, same = process.stdout.splitlines()
    assert len(matches) == 3 and re.match(r"0\.\d+ bulk_images/samples/lighthouse\.jpg copy", matches[0])
    assert same.startswith("that_one_image/cropped.jpg None Match(rank=1, path='bulk_images/samples/lighthouse.jpg', ")


def test_progress_is_seen_on_a_terminal_and_a_polite_stop_saves_the_work(program, collection, run):
    collection(50)
    index = ("--model", "offline", "--index-only", "--batch-size", 1, "--workers", 1)
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = program(*index, stderr=its_end)
    os.close(its_end)
    sent = list[None]()

    def stop(seen: bytes) -> None:
        if re.search(rb" \d\d+/50 ", seen) and not sent:
            sent.append(process.send_signal(signal.SIGINT))

    seen = shown(terminal, stop)
    assert (process.wait(60), process.stdout.read()) == (130, "")
    assert seen.count(b"interrupted") == 1 and b"Traceback" not in seen
    figures = counts(run(*index))
    assert figures["new"] > 0 and figures["unchanged"] >= 10
    draw(0, (50, 50)).save("query.png")
    ask = ("--model", "offline", "-k", 50, "query.png")
    assert run(*ask).stdout == run(*ask, "--index-dir", "undisturbed").stdout != ""
