"""The command line, queries: from stdin, from an address, a part of a picture; and paths that are passed over."""

import gzip
import io
import json
import os
import shutil
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Outcome, counts, draw, draw_rich, encoded, one_line
from PIL import Image
from test_page import Page

import main

Reply = bytes | Callable[[socket.socket], Any]  # to a request: what is sent, or what sends it
IMAGES = Path("bulk_images")


PICTURE = encoded(draw(3).resize((48, 32)))


@pytest.fixture
def ask(run, collection: Callable[[int], Path]) -> Callable[..., Outcome]:
    """ask(*args): quietly, as JSON, with the offline descriptor, among 6 pictures; query.png is 3.png, smaller."""
    collection(6)
    Path("query.png").write_bytes(PICTURE)
    return lambda *args: run("--model", "offline", "-q", "--json", "--no-report", *args)


def told(outcome: Outcome) -> dict[str, str]:
    """For each query, by its name: the path of the first match, or the error."""
    answers = [json.loads(line) for line in outcome.stdout.splitlines()]
    return {it["query"]: it.get("error") or Path(it["matches"][0]["path"]).name for it in answers}


@pytest.fixture
def collage() -> Path:
    """Pictures of the collection in a wide one of something else: 2.png at (200, 100), 4.png at (0, 256)."""
    image = draw(77, (960, 320))
    for number, corner in {2: (200, 100), 4: (0, 256)}.items():
        image.paste(draw(number), corner)
    image.save("collage.png")
    return Path("collage.png")


@pytest.mark.parametrize("part", ["200,100,296,164", "0.2083,0.3125,0.3083,0.5125", " 2e2, 100.3, 295.8, 164"])
def test_a_part_finds_what_the_whole_does_not_and_is_not_identical_to_its_file(part, ask, collage):
    shutil.copy(collage, IMAGES / "same.png")
    found = [json.loads(ask(collage, "-k", 7, *crop).stdout)["matches"] for crop in ([], ["--crop", part])]
    whole, cut = ({Path(match["path"]).name: match["score"] for match in matches} for matches in found)
    assert whole["2.png"] < 0.7 and cut["2.png"] > 0.999
    assert next(iter(cut)) == "2.png" and all(score < 0.9 for score in list(cut.values())[1:])
    assert [match["identical"] for match in found[1]] == 7 * [False]


def test_a_part_lies_in_the_upright_picture(ask, collage):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    Image.open(collage).rotate(90, expand=True).save("turned.png", exif=exif)
    assert told(ask("turned.png", "--crop", "200,100,296,164")) == {"turned.png": "2.png"}


@pytest.mark.parametrize("part", ["0,0,1,200", "0.1,0,300,300", "0,0,0.5,200", "0,0,300,1"])
def test_pixels_and_shares_are_not_mixed(part, ask, collage):
    outcome = ask(collage, "--crop", part)
    assert (
        outcome.status == 1
        and outcome.stderr == f"collage.png: --crop {part} mixes pixels and shares, which are at most 1\n"
    )


@pytest.mark.parametrize("part", ["0,0,961,320", "0,0,960,321", "0,500,600,600", "0,0,0.0005,1"])
def test_a_rectangle_outside_of_the_picture_is_one_line_for_that_query(part, ask, collage):
    draw(2, (1600, 800)).save("large.png")
    outcome = ask(collage, "large.png", "--crop", part)
    answers = told(outcome)
    assert outcome.status == 1 and answers["collage.png"].startswith("--crop [")
    assert answers["collage.png"].endswith("does not lie within the picture of 960 × 320 pixels")
    assert "collage.png: --crop" in outcome.stderr.splitlines()[0] and ".png" in answers["large.png"]
    assert outcome.stderr.count("\n") == 1


def test_a_copy_of_a_part_is_outlined_where_it_lies_in_the_whole_query(ask):
    draw_rich(20).save(IMAGES / "rich.png")
    image = draw(30, (960, 360))
    image.paste(draw_rich(20), (480, 0))
    image.save("two.png")
    (match,) = json.loads(ask("two.png", "--crop", "470,0,960,360", "-k", 1).stdout)["matches"]
    assert np.abs(np.array(match["region"]["outline"]) - [(480, 0), (960, 0), (960, 360), (480, 360)]).max() < 6


STDIN = {  # what is in it, None if it was closed; and the first match, or the error
    "an image": (PICTURE, "3.png"),
    "empty": (b"", "it is empty"),
    "closed": (None, "it is empty"),
    "text": (b"hello", "not an image"),
    "too large": (b"x" * 50_001, "more than 50,000 bytes"),
}


@pytest.mark.parametrize("kind", STDIN)
def test_stdin(kind, ask, monkeypatch):
    content, answer = STDIN[kind]
    monkeypatch.setattr(main, "QUERY_BYTES", 50_000)
    monkeypatch.setattr(sys, "stdin", content if content is None else io.TextIOWrapper(io.BytesIO(content)))
    outcome = ask("-", IMAGES / "1.png")
    assert told(outcome)["-"] == answer and told(outcome).keys() == {"-", "bulk_images/1.png"}
    assert outcome.stderr == ("" if kind == "an image" else f"-: {answer}\n")
    assert outcome.status == (kind != "an image")


def test_stdin_of_a_process_is_read_once(ask, program):
    with open("query.png", "rb") as stdin:
        process = program("--model", "offline", "-q", "--json", "--no-report", "-", "-", stdin=stdin)
        first, second = map(json.loads, process.communicate(timeout=60)[0].splitlines())
    assert first["matches"][0]["path"] == "bulk_images/3.png" and second["query"] == "-" and second["error"]
    assert process.returncode == 1


def servers() -> Iterator[Callable[..., str]]:
    """site(reply, asked=[]): the address of a server on this machine that gives this reply to each request."""
    with ExitStack() as servers:

        def start(reply: Reply, asked: list[bytes] | None = None) -> str:
            requests = [] if asked is None else asked

            class Handler(socketserver.BaseRequestHandler):
                def handle(self) -> None:
                    with suppress(OSError):  # the other side has heard enough
                        requests.append(self.request.recv(65536))
                        self.request.sendall(reply) if isinstance(reply, bytes) else reply(self.request)

            server = servers.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            servers.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}/picture"

        yield start


site = pytest.fixture(servers)


def reply(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def moved(address: object) -> bytes:
    return reply(status="302 Found", Location=str(address))


def test_an_address_is_searched_with_and_named_as_it_was_given_also_after_redirects(ask, run, site):
    address = site(moved(site(moved(site(reply(PICTURE)))))) + "?size=large#top"
    outcome = ask(address, IMAGES / "1.png")
    assert (outcome.status, outcome.stderr, told(outcome)[address]) == (0, "", "3.png")
    assert run("--model", "offline", "--no-report", address).stdout.startswith(f"{address}  (offline, 6 images)")
    assert told(ask(address, "--crop", "0,0,48,32")) == {address: "3.png"}


def test_the_page_shows_the_picture_at_an_address(ask, run, site):
    address = site(reply(PICTURE))
    assert run("--model", "offline", address, "-k", 2).status == 0
    page = Page(Path("results.html").read_text())
    names = [image["alt"] for image in page.all("img") if image["alt"]]
    assert address in names[0] and "3.png" in names[1]
    assert page.pictures()[0].size == (48, 32) and address in {link["href"] for link in page.all("a")}


FAILURES: dict[str, tuple[Reply, str]] = {
    "HTML": (reply(b"<!doctype html><title>", **{"Content-Type": "image/png"}), "not an image"),
    "nothing": (reply(), "it is empty"),
    "not there": (reply(PICTURE, "404 Not Found"), "404"),
    "an error": (reply(PICTURE, "500 Oh"), "500"),
    "a password is wanted": (reply(PICTURE, "401 Who", **{"WWW-Authenticate": "Basic realm=x"}), "401"),
    "cut short": (reply(PICTURE)[:-200], "truncated"),
    "too large": (reply(b"x" * 50_001), "more than 50,000 bytes"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
    "no answer": (b"", "closed"),
    "silence": (lambda connection: connection.recv(1), "timed out"),
    "half an answer": (lambda it: (it.sendall(reply(PICTURE)[:-200]), it.recv(1)), "timed out"),
    "to a file": (moved(Path(__file__).as_uri()), "file:"),
    "to ftp": (moved("ftp://127.0.0.1/picture"), "ftp"),
    "to data": (moved("data:image/gif;base64,R0lGODdhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="), "data:"),
    "in a circle": (moved("/picture"), "loop"),
    "to nowhere": (moved("http://127.0.0.1:9/"), "refused"),
    "colours": (reply(status="404 \x1b[31mred\x9b31m\x07\x1b]0;title\x07"), "404"),
    "colours without HTTP": (b"\x1b[31mred\r\n\r\n", "red"),
    "colours in a redirect": (moved("file:///\x1b[31mred"), "red"),
    "a blank line": (b"\r\n\r\n", "BadStatusLine"),
    "a port beyond all bounds": (moved(f"http://127.0.0.1:{10**30}/"), "too large"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_each_failure_is_one_line_and_the_other_queries_are_answered(kind, ask, site, monkeypatch):
    reply, words = FAILURES[kind]
    monkeypatch.setattr(main, "QUERY_BYTES", 50_000)
    monkeypatch.setattr(main, "CONNECT_SECONDS", 0.3)
    outcome = ask("query.png", address := site(reply), IMAGES / "1.png")
    answers = told(outcome)
    assert outcome.status == 1 and list(answers) == ["query.png", address, "bulk_images/1.png"]
    assert answers["query.png"] == "3.png" and words in answers[address]
    assert outcome.stderr == f"{address}: {main.escape_controls(answers[address])}\n"


@pytest.mark.parametrize("host", ["", "localhost"])
def test_the_address_of_a_file_is_its_path(host, ask):
    name = os.fsdecode("\u00e9 %20#?".encode() + b"\xe9.png")
    shutil.copy("query.png", name)
    address = Path(name).absolute().as_uri().replace("file://", f"File://{host}")
    assert told(ask(address)) == {str(Path(name).absolute()): "3.png"}
    assert ask(Path("nowhere").absolute().as_uri()).status == 1


@pytest.mark.parametrize("scheme", ["ftp", "data", "gopher", "httpx"])
def test_other_schemes_are_names_of_files(scheme, ask):
    name = Path("query.png").absolute().as_uri().replace("file:", f"{scheme}:")
    assert told(ask(name)) == {name: "No such file or directory"}


@pytest.mark.parametrize("name", ["http://", "http:///x.png", "http://[::1", "https://127.0.0.1/a b", "http://a..b/"])
def test_an_address_that_is_none_is_one_line(name, ask):
    outcome = ask(name)
    assert (outcome.status, outcome.stderr.count("\n")) == (1, 1) and outcome.stderr.startswith(f"{name}: ")


def test_a_redirect_to_ftp_asks_not_even_its_proxy(ask, site, monkeypatch):
    asked = list[socket.socket]()
    other = site(lambda connection: (asked.append(connection), connection.sendall(reply(PICTURE))))
    monkeypatch.setenv("ftp_proxy", other)  # urllib would turn the scheme into http
    assert ask(site(moved("ftp://example.invalid/picture"))).status == 1 and not asked


ENDLESS = {
    "a picture": b"HTTP/1.1 200 OK\r\n\r\n",
    "an error": b"HTTP/1.1 404 Not Found\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\n\r\n",
    "a chunk of -1 bytes": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_no_more_is_read_than_the_limit(kind, ask, site, monkeypatch):
    sent = list[int]()

    def go_on(connection: socket.socket) -> None:
        """For as long as somebody listens, up to 64 MB."""
        connection.sendall(ENDLESS[kind])
        for number in range(64):
            connection.sendall(bytes(1 << 20))
            sent.append(number)

    monkeypatch.setattr(main, "QUERY_BYTES", 1 << 20)
    assert ask(site(go_on)).status == 1
    assert len(sent) < 16  # most of it in the buffers of the two sockets


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 "], ids=["its picture", "its header"])
def test_a_server_that_goes_on_byte_by_byte_is_given_up(start, ask, site, monkeypatch):
    def trickle(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(80):
            connection.sendall(b"H")
            time.sleep(0.05)

    monkeypatch.setattr(main, "FETCH_STEP", 0.5)
    begun = time.perf_counter()
    outcome = ask(address := site(trickle), "query.png")
    assert time.perf_counter() - begun < 3 and outcome.status == 1
    answers = told(outcome)
    assert answers[address].endswith("bytes came in 0.5 seconds") and answers["query.png"] == "3.png"


def test_a_picture_that_comes_steadily_is_waited_for(ask, site, monkeypatch):
    def steadily(connection: socket.socket) -> None:
        connection.sendall(reply(PICTURE)[:-50])
        time.sleep(0.8)
        connection.sendall(PICTURE[-50:])

    monkeypatch.setattr(main, "FETCH_STEP", 0.5)
    monkeypatch.setattr(main, "FETCH_LEAST", 0)
    assert told(ask(address := site(steadily))) == {address: "3.png"}
    monkeypatch.setattr(main, "FETCH_STEPS", 1)
    assert told(ask(address)) == {address: "not there after 0.5 seconds"}


def test_an_address_is_taken_as_it_is_pasted_and_the_program_says_its_name(ask, site):
    asked = list[bytes]()

    address = site(reply(PICTURE), asked) + "/a b/\u00e9t\u00e9 (1).png?x=\u00e4&y=1%20"
    assert told(ask(address)) == {address: "3.png"}
    line, *headers = asked[0].split(b"\r\n")
    assert line == b"GET /picture/a%20b/%C3%A9t%C3%A9%20(1).png?x=%C3%A4&y=1%20 HTTP/1.1"
    assert b"User-Agent: DeepVision" in headers
    assert main.http_address("https://b\u00fccher.example/\u00fc") == "https://xn--bcher-kva.example/%C3%BC"


@pytest.mark.parametrize("content", [PICTURE, bytes(60_000)], ids=["a picture", "a bomb"])
def test_a_picture_that_was_packed_on_the_way_is_unpacked(content, ask, site, monkeypatch):
    monkeypatch.setattr(main, "QUERY_BYTES", 50_000)
    address = site(reply(gzip.compress(content), **{"Content-Encoding": "gzip"}))
    assert told(ask(address)) == {address: "3.png" if content is PICTURE else "more than 50,000 bytes"}
    broken = site(reply(b"no gzip at all", **{"Content-Encoding": "gzip"}))
    assert "decompress" in told(ask(broken))[broken]


@pytest.fixture
def index(run, collection: Callable[..., Path]) -> Callable[..., Outcome]:
    """index(*args): with the offline descriptor, of 0.png to 4.png, and cache/0.png and cache/deep/1.png."""
    collection(5)
    for number, name in enumerate(("cache/0.png", "cache/deep/1.png")):
        (IMAGES / name).parent.mkdir(exist_ok=True)
        draw(50 + number).save(IMAGES / name)
    return lambda *args: run("--model", "offline", "--index-only", *args)


EXCLUDED = {
    "cache": 2, "cache/*": 2, "cache/deep": 1, "[0-2].png": 3, "0.PNG": 0, "deep": 0,
    "*/1.png": 1,  # a star stands for a / as well
    "cache/": 2, "./0.png": 1, "./cache/*": 2, "/cache/": 2, "cache//deep/": 1, "x/../cache": 2,
    "bulk_images/cache/": 2, "./bulk_images/cache/*": 2, "images/*": 0,
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "fewer"), EXCLUDED.items(), ids=EXCLUDED)
def test_exclude(pattern, fewer, index):
    outcome = index("--exclude", pattern)
    assert counts(outcome) == {"found": 7 - fewer, "new": 7 - fewer, "opened": 1}
    unused = f"--exclude {pattern} leaves out nothing in bulk_images\n"
    assert (unused in outcome.stderr) == (fewer == 0) and outcome.stderr.count("--exclude") == (fewer == 0)


def test_exclude_by_an_absolute_pattern(index):
    assert counts(index("--exclude", (IMAGES / "cache").absolute())) == {"found": 5, "new": 5, "opened": 1}


def test_all_excluded_is_one_line(index):
    one_line(index("--exclude", "*.png"), "no usable image")


def test_what_is_excluded_is_gone_and_comes_back_without_being_read(index, run):
    def found(*args: object) -> set[str]:
        outcome = run("--model", "offline", "--json", "-q", "--no-report", IMAGES / "cache/0.png", *args)
        return {match["path"].removeprefix("bulk_images/") for match in json.loads(outcome.stdout)["matches"]}

    index()
    twice = ["--exclude", "cache", "--exclude", "[0-1].png"]
    assert found(*twice) == {"2.png", "3.png", "4.png"}  # a query may be excluded
    assert counts(index(*twice)) == {"found": 3, "unchanged": 3, "gone": 4}
    assert counts(index("--exclude", "cache/deep")) == {"found": 6, "unchanged": 6, "gone": 1}
    assert found() == {"0.png", "1.png", "2.png", "3.png", "4.png", "cache/deep/1.png"}
    assert counts(index()) == {"found": 7, "unchanged": 7}


def test_prune_forgets_what_is_excluded_and_deletes_no_file(index):
    index()
    outcome = index("--exclude", "cache/*", "--prune")
    assert "2 forgotten" in outcome.stderr and (IMAGES / "cache/0.png").exists()
    assert counts(index()) == {"found": 7, "new": 2, "unchanged": 5, "opened": 1}  # read again
