"""Section UI: what the server answers, what it refuses, and what it does with files."""

import base64
import contextlib
import http.client
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MAIN, draw_rich, encoded, one_line
from PIL import Image
from served import WAIT, Server, compared, group_of

import main


def test_a_score_never_hides_a_copy_below_a_look_alike(server):
    key = server.give("part.png", encoded(draw_rich(5).crop((40, 40, 200, 300))))
    (answer,) = server.ui.answers([key], {}, types.SimpleNamespace(has_gone=bool), 3, "0.9")
    assert answer.matches and all(match.label and match.score < 0.9 for match in answer.matches)


@pytest.mark.parametrize(("query", "words"), [
    ("q={key}&k=abc", "How many: abc is not a whole number from 1 to 5,000"),
    ("q={key}&k=0", "How many: 0 is not a whole number"), ("q={key}&k=9999999999999999999999", "How many"),
    ("q={key}&least=nan", "The score: nan is not a number from -1 to 1, and not one of variant, copy, identical"),
    ("group=-3", "The group: -3 is not a whole number from 1 to"), ("group=99", "The group: 99"),
    ("q={key}!1,2", "The part: 1,2 is not left, top, right, bottom"),
    ("q={key}!0,0,500,9", "does not lie within the picture of 240 × 160 pixels"),
    ("page=x", "The page: x is not a whole number"), ("q=nothing", "this picture is not known any more: give it again"),
])  # fmt: skip
def test_a_wrong_field_is_told_in_plain_words(query, words, server):
    answer = server.ask("?" + query.replace("{key}", server.key("2.png")))
    assert (
        answer.status == 200
        and words in answer.page.decode()
        and b"--" not in answer.page.split(b"</style>")[1].split(b"<script>")[0]
    )


def test_whole_pictures_are_sent_as_they_are_or_as_a_browser_shows_them(server):
    answer = server.ask(f"picture/{server.key('5.png')}")
    assert answer.headers["Content-Type"] == "image/png" and answer.page == (server.images / "5.png").read_bytes()
    answer = server.ask(f"picture/{server.key('4.tif')}")
    picture = Image.open(io.BytesIO(answer.page))
    assert (answer.headers["Content-Type"], picture.format, picture.size) == ("image/webp", "WEBP", (480, 360))
    assert (
        server.ask(f"picture/{server.give('x.jpg', (server.folder / 'edited.jpg').read_bytes())}").page[:2]
        == b"\xff\xd8"
    )


def test_what_is_moved_is_looked_at_again(own, trash):
    compared(own)
    (own.images / "b same.png").write_bytes((own.images / "other.png").read_bytes())
    info = os.stat(own.images / "c small.jpg")
    (own.images / "c small.jpg").write_bytes(b"\xff" * info.st_size)
    os.utime(own.images / "c small.jpg", ns=(info.st_atime_ns, info.st_mtime_ns))  # its size and time tell nothing
    (own.images / "d mirrored.jpg").unlink()
    names = ["b same.png", "c small.jpg", "d mirrored.jpg", "a.png"]
    own.act("trash", file=[own.key(name) for name in names])
    page = own.ask("?twice=1").page.decode()
    assert "0 files moved to the trash" in page and not list(trash.iterdir())
    for name, why in zip(
        names, ("it has changed since it was compared",) * 2 + ("it is not there any more", "it is the file to keep")
    ):
        assert f"{name} stays: {why}" in page, name


def test_without_the_file_to_keep_nothing_is_moved(own, trash):
    compared(own)
    draw_rich(9).save(own.images / "a.png")
    own.act("trash", file=own.key("b same.png"))
    page = own.ask("?twice=1").page.decode()
    assert "b same.png stays: of a.png, the file to keep, it has changed" in page and not list(trash.iterdir())


@pytest.mark.parametrize("name", ["other.png", "../small.png", "given"])
def test_only_files_of_the_groups_are_moved(name, own, trash):
    compared(own)
    key = own.give("x.png") if name == "given" else own.key(name)
    own.act("trash", file=[key])
    page = own.ask("?twice=1").page.decode()
    assert ("is in none of the groups" in page or "is not known" in page) and not list(trash.iterdir())


def test_a_failure_of_the_trash_is_told_and_the_rest_is_moved(own, trash, monkeypatch):
    compared(own)

    def send(path: str) -> None:
        if "same" in path:
            raise PermissionError(13, "no trash on this drive")
        shutil.move(path, trash)

    monkeypatch.setattr(sys.modules["send2trash"], "send2trash", send)
    own.act("trash", file=[own.key("b same.png"), own.key("d mirrored.jpg")])
    page = own.ask("?twice=1").page.decode()
    assert "1 file moved to the trash" in page and "b same.png stays: [Errno 13] no trash on this drive" in page


def test_without_the_package_it_is_named(own, monkeypatch):
    compared(own)
    monkeypatch.setitem(sys.modules, "send2trash", None)
    own.act("trash", file=own.key("b same.png"))
    assert b"pip install send2trash" in own.ask("?twice=1").page and (own.images / "b same.png").exists()


def test_another_file_is_kept(own):
    compared(own)
    own.act("keep", keep=own.key("d mirrored.jpg"))
    keep, lost = group_of(own)
    assert keep == "d mirrored.jpg" and lost.keys() == {"a.png", "b same.png", "c small.jpg"}
    assert "mirrored" in lost["a.png"] and own.ui.groups[0].matches[0].region
    own.act("keep", keep=own.key("a.png"))
    assert group_of(own)[0] == "a.png" and group_of(own)[1]["b same.png"] is None


def test_a_dismissed_group_stays_away_until_it_changes(own):
    compared(own)
    own.act("dismiss", dismiss=own.key("a.png"))
    page = own.ask("?twice=1").page
    assert b"No picture is there twice" in page and b"1 group dismissed" in page
    own.stop()
    own.start()
    compared(own)
    assert b"No picture is there twice" in own.ask("?twice=1").page  # also after a restart
    own.act("restore")
    assert b"keep: the best of 4" in own.ask("?twice=1").page
    own.act("dismiss", dismiss=own.key("a.png"))
    draw_rich(1).save(own.images / "e.png", compress_level=1)
    own.act("changes")
    own.ui.job.join(WAIT)
    compared(own)
    assert b"keep: the best of 5" in own.ask("?twice=1").page


def test_the_first_index_can_be_stopped(tmp_path):
    it = Server(tmp_path)
    draw_rich(1).save(it.images / "a.png")
    it.prepare(main.Work())
    reading = threading.Event()

    def prepare(work: main.Work) -> main.Engine:
        if work.update:
            for _ in main.progress_bar(range(10**6), mininterval=0):
                reading.set()
                time.sleep(0.001)
        return it.prepare(work)

    it.start(prepare)
    reading.wait(WAIT)
    assert it.act("stop").status == 303 and it.ui.engine.summary.images == 1
    assert b"Stopped. What was done is kept" in it.ask("").page
    it.stop()


def test_small_pictures_are_files_of_their_own_and_kept(own, monkeypatch):
    page = own.ask("").page.decode()
    assert "data:image" not in page.split("</style>")[1] and len(page) < 60_000
    (address,) = re.findall(
        rf'src="(small/{own.key("a.png")}[^"]*)"', own.ask(f"?q={own.key('a.png')}&k=1").page.decode()
    )[:1]
    answer = own.ask(address)
    assert answer.headers["Cache-Control"] == "private, max-age=31536000, immutable"
    assert max(Image.open(io.BytesIO(answer.page)).size) == 480 and len(answer.page) < 60_000
    own.stop()
    own.start()
    monkeypatch.setattr(main, "read_path", lambda *_, **__: main.Picture(main.File(b"", 0, 0)))  # nothing is opened
    assert own.ask(address).page == answer.page
    mode = (own.folder / "index" / "ui.sqlite").stat().st_mode
    assert mode & 0o77 == 0  # of no other account


@pytest.mark.parametrize("damage", [b"no database at all" * 99, b""])
def test_what_is_kept_beside_the_index_is_made_again(damage, own):
    own.stop()
    (own.folder / "index" / "ui.sqlite").write_bytes(damage)
    own.start()
    assert own.ask("").status == 200 and own.ask(f"small/{own.key('a.png')}").status == 200


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    kept = main.Kept(tmp_path / "file", str(tmp_path))
    assert len(kept.token) > 16 and (tmp_path / "ui.sqlite").exists()


def test_a_thousand_groups_open_in_a_second(own):
    compared(own)
    own.ui.groups = own.ui.groups * 2500
    own.ask("?twice=1")
    start = time.perf_counter()
    page = own.ask("?twice=1&page=7").page
    assert time.perf_counter() - start < 3 and page.count(b"<figure") == 400 and b"page 7 of 25" in page


def test_the_same_picture_is_searched_once(server, monkeypatch):
    searched, search = [], main.search
    monkeypatch.setattr(
        main, "search", lambda paths, *rest, **more: [searched.extend(paths), *search(paths, *rest, **more)][1:]
    )
    key = server.key("3.png")
    page = server.ask("?" + "&".join([f"q={key}"] * 500)).page
    assert len(searched) == 1 and page.count(b'class="query"') == 1


def test_a_client_that_has_gone_is_not_searched_for(server, monkeypatch):
    answered, gone = [], threading.Event()

    def search(paths: Any, *_: Any, **__: Any) -> Iterator[main.Answer]:
        for path in paths:
            answered.append(path)
            gone.wait(WAIT)
            yield main.Answer(path, [])

    monkeypatch.setattr(main, "search", search)
    keys = [server.key(f"{n}.png") for n in range(8)]
    client = socket.create_connection(("127.0.0.1", server.port))
    path = f"/{server.ui.kept.token}/?" + "&".join(f"q={key}" for key in keys)
    client.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    while not answered:
        time.sleep(0.01)
    client.close()
    assert server.ask("").status == 200  # nobody waits for it
    gone.set()
    assert server.ask("").status == 200 and len(answered) < 8


def test_addresses_hold_after_a_restart(own):
    kept, given = f"?q={own.key('a.png')}", f"?q={own.give('x.png')}"
    url = own.url.split("/", 3)[3]
    own.stop()
    own.start()
    assert own.url.split("/", 3)[3] == url  # the token, too
    assert b"found</b>" in own.ask(kept).page and b"not known any more: give it again" in own.ask(given).page


def test_only_an_address_with_the_token_is_answered(server):
    for path in ("/", "/?twice=1", "/wrong/", f"/{server.ui.kept.token[:-1]}/", f"/{server.ui.kept.token}x/?twice=1",
                 f"/small/{server.key('5.png')}", "/favicon.ico", "//"):  # fmt: skip
        for method in ("GET", "POST"):
            answer = server.ask(path, method, b"" if method == "POST" else None)
            assert answer.status == 403 and b"the address that the terminal shows" in answer.page, path
    assert len(server.ui.kept.token) > 20 and server.ask("").status == 200


def test_the_address_for_the_browser_counts_once(server):
    """The list of processes shows it to other accounts."""
    ticket = f"/{server.ui.ticket}"
    answer = server.ask(ticket)
    assert (answer.status, answer.headers["Location"]) == (303, f"/{server.ui.kept.token}/")
    assert server.ask(ticket).status == 403 and server.ui.kept.token not in ticket


@pytest.mark.parametrize("host", ["localhost:9999", "127.0.0.1:80", "localhost", "[::1]:7860"])
def test_a_tunnel_may_have_another_port(host, server):
    assert server.ask("", Host=host, Origin=f"http://{host}").status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "192.168.0.2:7860", "localhost.evil.example", "", "localhost:7860@evil"]
)
def test_a_wrong_host_is_told_what_to_do(host, server):
    answer = server.ask("", Host=host)
    assert answer.status == 403 and b"ssh -L" in answer.page and server.ui.kept.token.encode() not in answer.page


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://localhost:1"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("path", ["", "?twice=1", "give?name=a.png", "trash", "dismiss", "changes", "stop", "show"])
def test_another_site_is_refused(headers, path, server):
    for method in ("GET", "POST"):
        assert server.ask(path, method, b"" if method == "POST" else None, **headers).status == 403


@pytest.mark.parametrize("action", main.UI.ACTIONS)
def test_what_changes_something_is_no_address(action, server):
    assert server.ask(f"{action}?file={server.key('5.png')}").status == 404


@pytest.mark.parametrize(("length", "status"), [
    (None, 411), ("many", 411), ("-1", 411), ("", 411), ("1_0", 411), ("٣", 411), ("300000001", 413), ("9" * 99, 413),
])  # fmt: skip
@pytest.mark.parametrize("path", ["give?name=a.png", "trash"])
def test_an_odd_length_is_answered(length, status, path, server, capfd):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    connection.putrequest("POST", f"/{server.ui.kept.token}/{path}")
    if length is not None:
        connection.putheader("Content-Length", length.encode())
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == status and answer.headers["X-Content-Type-Options"] == "nosniff"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("sent", [
    b"POST /{}/give?name=a.png HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nonly this", b"GET", b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00", b"GET /{}/ HTTP/9.9\r\n\r\n", b"NONE /{}/ HTTP/1.0\r\nHost: localhost\r\n\r\n",
    b"GET /{}/?" + b"x" * 70_000 + b" HTTP/1.0\r\n\r\n", b"GET /{}/ HTTP/1.0\r\n" + b"A: b\r\n" * 200 + b"\r\n",
])  # fmt: skip
@pytest.mark.parametrize("is_reset", [False, True])
def test_a_request_that_breaks_off_leaves_no_traceback(sent, is_reset, server, capfd):
    client = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)
    client.sendall(sent.replace(b"{}", server.ui.kept.token.encode()))
    if is_reset:  # the connection ends with an error
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    else:
        client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
            assert not answer.startswith(b"HTTP") or answer.split()[1][:1] in b"45"
            assert b"has broken off" in answer or b"only this" not in sent
    client.close()
    assert server.ask("").status == 200 and not list(Path(server.ui.own).glob("tmp*"))
    assert capfd.readouterr().err == ""


def test_no_answer_is_taken_for_something_else(server):
    for path in (
        "",
        "?twice=1",
        "job",
        f"small/{server.key('5.png')}",
        f"picture/{server.key('5.png')}",
        "nothing",
        "/",
    ):
        headers = server.ask(path).headers
        assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")
        assert headers["Referrer-Policy"] == "same-origin" and "Server" in headers
    policy = server.ask("").page.decode().split('Content-Security-Policy" content="')[1].split('"')[0]
    assert policy.startswith("default-src &#39;none&#39;; img-src &#39;self&#39; data:; ") and "http" not in policy


def test_a_picture_that_is_also_a_page_is_only_a_picture(own):
    (own.images / "page.png").write_bytes((own.images / "a.png").read_bytes() + b"<script>alert(1)</script>")
    (own.images / "page.html").write_text("<script>alert(1)</script>")
    own.act("changes")
    own.ui.job.join(WAIT)
    answer = own.ask(f"picture/{own.key('page.png')}")
    assert answer.headers["Content-Type"] == "image/png" and "sandbox" in answer.headers["Content-Security-Policy"]
    assert own.ask(f"picture/{own.key('page.html')}").status == 404


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "bulk_images/1.png", "main.py", "index", "../small.png", ".", "broken.png"]
)
def test_no_file_is_served_but_pictures_of_the_collection(path, server):
    encoded_path = base64.urlsafe_b64encode(path.encode()).decode().rstrip("=")
    for name in (path, encoded_path, "../" + path, "%2e%2e/" + path, "~" + encoded_path):
        for route in ("small/", "picture/", ""):
            answer = server.ask(f"/{server.ui.kept.token}/{route}{name}")
            assert answer.status == 404 and b"hello" not in answer.page, (route, name)
        for asked in (f"q={name}", f"q={name}!0,0,9,9", f"group={name}"):
            answer = server.ask(f"?{asked}")
            assert answer.status == 200 and b"cannot be done" in answer.page
        assert server.act("list", file=name).status == 303 and server.act("show", file=name).status == 501


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/tmp/evil.png", "..", "a/", "\0.png", "n" * 300, "?a#b", "a\nb: c", "~1"]
)
def test_the_name_of_a_given_file_never_becomes_a_path(name, server):
    before = sorted(server.folder.rglob("*"))
    key = server.give(name)
    assert b"2.png" in server.ask(f"?q={key}").page
    (new,) = set(server.folder.rglob("*")) - set(before)
    assert new.name == key and re.fullmatch("~[0-9a-f]{12}([.]png)?", key) and not Path("/tmp/evil.png").exists()


@pytest.mark.parametrize("field", ["q", "k", "least", "group", "twice", "page", "of", "part"])
def test_what_is_asked_is_text_on_the_page(field, server):
    key = server.give('"><script>alert(1)</script>.png')
    answer = server.ask(f"?q={key}&{field}=%22%3E%3Cscript%3Ealert(1)%3C/script%3E")
    assert answer.page.count(b"<script>") == (answer.status == 200)


def test_other_pages_answer_while_one_is_slow(server, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(main, "search", lambda *_, **__: go.wait(WAIT) and iter(()))
    asking = threading.Thread(target=server.ask, args=(f"?q={server.key('1.png')}&k=7",))
    asking.start()
    assert server.ask("").status == 200 and asking.is_alive()
    go.set()
    asking.join(WAIT)


def started(folder: Path, *options: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """`main.py --ui` and its address."""
    command = [sys.executable, MAIN, "--model", "offline", "--ui", "--port", "0", *options]
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )
    return process, next(line.strip() for line in iter(process.stderr.readline, "") if line.startswith("http"))


def test_the_program_opens_the_browser_and_an_interruption_ends_it(tmp_path, collection):
    collection(3)
    (tmp_path / "browse").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/opened\n')
    (tmp_path / "browse").chmod(0o755)
    process, url = started(tmp_path, BROWSER=f"{tmp_path}/browse %s", DISPLAY=":0")
    port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{20,})/", url).groups()
    listening = Path("/proc/net/tcp")
    if listening.exists():  # on this machine alone
        local = [line.split()[1] for line in listening.read_text().splitlines()[1:] if line.split()[3] == "0A"]
        assert [it for it in local if it.endswith(f":{int(port):04X}")] == [f"0100007F:{int(port):04X}"]
    deadline = time.monotonic() + WAIT
    while not (tmp_path / "opened").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    opened = (tmp_path / "opened").read_text().strip()
    assert opened.startswith(f"http://127.0.0.1:{port}/") and token not in opened
    page = urllib.request.urlopen(opened)
    assert page.url == url
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WAIT)
    assert process.returncode == 0 and "Traceback" not in stderr


def test_a_port_that_is_taken_and_no_pictures_are_one_line(server, run, tmp_path):
    options = ("--model", "offline", "-q", "--no-browser", "--ui", "--port")
    one_line(run(*options, server.port), "error: port ", "--port")
    one_line(run(*options, 0), "bulk_images is missing")


def test_groups_stand_for_the_collection(collection):
    """Of three kinds of vectors, in files of three folders, among them a file that is gone."""
    collection(1)
    engine = main.initialize_reverse_image_search(model=main.load_model("offline"))
    random, dim, sizes = np.random.default_rng(0), engine.model.dim, [50, 20, 10]
    pictures = [main.Picture(main.File(b"0.png", 1, 1), vanished=True)]
    for kind, size in enumerate(sizes):
        vectors = random.normal(size=dim) + 0.1 * random.normal(size=(size, dim))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        files = (main.File(b"%d/%d" % (kind, number), 1, 1) for number in range(size))
        pictures += [main.Picture(file, random.bytes(16), None, vector) for file, vector in zip(files, vectors)]
    engine.store.save(pictures)
    engine.summary.images = 80
    groups = main.representatives(engine, 3)
    assert [size for size, _ in groups] == [len(images) for _, images in groups] == sizes
    for kind, (_, images) in enumerate(groups):
        assert {Path(match.path).parent.name for match in images} == {str(kind)}
        assert images == sorted(images, key=lambda match: -match.score)
    assert len(main.representatives(engine, 100)) > 24
