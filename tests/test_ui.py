"""Section UI: in a real browser, and what it refuses."""

import http.client
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MAIN, draw, draw_rich, requests
from PIL import ImageOps
from test_command_line import bomb
from test_page import check_layout, emulate

import main

WAIT = 60  # seconds, on a busy machine


def started(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """`main.py --ui` and its address."""
    command = [sys.executable, MAIN, "--model", "offline", "--ui", "--port", "0", *options]
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    return process, next(line.strip() for line in iter(process.stderr.readline, "") if line.startswith("http"))


class Server:
    """`main.py --ui`, with a collection of 8 pictures and one that cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bulk_images").mkdir()
        for seed in range(8):
            draw(seed, (240, 160)).save(folder / "bulk_images" / f"{seed}.png")
        draw_rich(5).save(folder / "bulk_images" / "5.png")
        shutil.copy(folder / "bulk_images" / "5.png", folder / "bulk_images" / "<b>5 again&.png")
        (folder / "bulk_images" / "broken.png").touch()
        ImageOps.mirror(draw_rich(5)).save(folder / "edited.jpg", quality=60)
        draw(2, (120, 80)).resize((30, 20)).save(folder / "small.png")
        (folder / "no image.png").write_text("hello")
        (folder / "notes.txt").write_text("hello")
        (folder / "empty.jpg").touch()
        bomb(folder / "bomb.png")
        self.process, self.url = started(folder, "-k", "3")
        threading.Thread(target=deque, args=(self.process.stderr, 0), daemon=True).start()  # a full pipe would stop it

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> http.client.HTTPResponse:
        """The answer, and its `page`."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=WAIT)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        response.page = response.read()
        return response

    def give(self, name: str) -> http.client.HTTPResponse:
        return self.ask(f"/?name={name}", "POST", (self.folder / "small.png").read_bytes())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("ui"))
    yield server
    server.process.kill()
    server.process.communicate()


class Tab:
    def __init__(self, browser: Any, server: Server) -> None:
        self.browser, self.folder, self.url = browser, server.folder, server.url
        browser.get(server.url)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def headings(self) -> list[str]:
        return [heading.text for heading in self.all("h1, h2")]

    def captions(self, row: str = "") -> list[str]:
        return [caption.text.replace("\n", " · ") for caption in self.all(f"{row} figcaption")]

    def names(self, row: str = "") -> list[str]:
        """The names of the files that are shown."""
        return [caption.split(" · ")[-2] for caption in self.captions(row)]

    def give(self, *names: str) -> None:
        self.until(lambda: self.browser.execute_script("return document.readyState") == "complete")
        self.all("#given")[0].send_keys("\n".join(str(self.folder / name) for name in names))

    def until(self, there: Callable[[], Any]) -> Any:
        """What `there` gives, once that is something."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.wait import WebDriverWait

        loading = (IndexError, WebDriverException)  # the next page is under way
        return WebDriverWait(self.browser, WAIT, 0.05, loading).until(lambda _: there())


@pytest.fixture
def tab(browser: Any, server: Server) -> Tab:
    requests(browser)
    return Tab(browser, server)


FOUND = ["1 query, 1 found", "✓ found edited.jpg"]


@pytest.fixture
def found(tab: Tab) -> Tab:
    """After a search with the mirrored copy of a picture."""
    tab.give("edited.jpg")
    tab.until(lambda: tab.headings() == FOUND)
    return tab


def test_an_edited_copy_is_found_and_a_click_searches_from_it(found):
    assert found.names(".large") == ["edited.jpg", *sorted(["5.png", "<b>5 again&.png"])]
    assert all("copy" in caption and "mirrored" in caption for caption in found.captions(".copy"))
    assert len(found.all(".large svg")) == 3 and len(found.names(".small")) == 1
    next(it for it in found.all(".large li") if "again&" in it.text).find_element("tag name", "a").click()
    found.until(lambda: found.headings()[1:] == ["✓ found <b>5 again&.png"])
    assert found.captions(".identical")[0].startswith("1 · 1.000 identical · 5.png")
    assert found.names().count("<b>5 again&.png") == 1  # the query itself
    loaded = "return [...document.images].every(i => i.complete && i.naturalWidth > 100)"
    found.until(lambda: found.browser.execute_script(loaded))
    assert all(url.startswith((found.url, "data:")) for url in requests(found.browser))
    assert [entry for entry in found.browser.get_log("browser") if "favicon" not in entry["message"]] == []


def test_several_are_searched_and_a_bad_one_is_named(tab):
    tab.give("small.png", "no image.png", "notes.txt", "edited.jpg", "empty.jpg", "bomb.png")
    tab.until(lambda: len(tab.headings()) == 7)
    assert tab.headings() == [
        "6 queries, 1 found", "✗ no copy found small.png", "✗ broken, or no image at all no image.png",
        "✗ not an image notes.txt", "✓ found edited.jpg", "✗ an empty file empty.jpg",
        "✗ too large: over 200,000,000 pixels bomb.png",
    ]  # fmt: skip
    assert tab.names(".large")[0] == "small.png" and tab.names(".small")[0] == "2.png"
    tab.give("edited.jpg")
    tab.until(lambda: tab.headings() == FOUND)


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(way, tab):
    """As from any other program: the event that the browser makes of it."""
    script = """const [way, bytes] = arguments, data = new DataTransfer()
        data.items.add(new File([Uint8Array.from(bytes)], "given.png"))
        const event = way == "paste" ? new ClipboardEvent(way, {clipboardData: data, bubbles: true})
            : new DragEvent(way, {dataTransfer: data, bubbles: true, cancelable: true})
        document.body.dispatchEvent(event)"""
    tab.browser.execute_script(script, way, [*(tab.folder / "small.png").read_bytes()])
    tab.until(lambda: tab.names()[:2] == ["given.png", "2.png"])


def test_how_many_and_from_which_score(tab):
    tab.give("small.png")
    tab.until(lambda: len(tab.names(".small")) == 3)
    for name, value, found in (("k", "5", 5), ("least", "0.9", 1), ("least", "1", 0)):
        field = tab.until(lambda name=name: tab.all(f"[name={name}]")[0])
        field.send_keys("\ue009a\ue000", value, "\ue007")  # all of it, and then Enter
        tab.until(lambda found=found: len(tab.names(".small")) == found)
    assert tab.headings()[1:] == ["✗ no match small.png"]
    assert "k=5&least=1" in tab.all("figure a")[0].get_attribute("href")  # the next search keeps them


def test_it_opens_on_the_collection_and_back_works(tab):
    assert tab.headings() == ["Pictures that stand for the collection"]
    assert "9 images in bulk_images · offline on cpu" in tab.all("header")[0].text
    sizes = [int(link.text.removeprefix("group of ")) for link in tab.all("figcaption a")]
    assert sum(sizes) == 9 and sizes == sorted(sizes, reverse=True) and sizes[0] > 1  # two files are identical
    tab.all("figcaption a")[0].click()
    tab.until(lambda: tab.headings() == [f"{sizes[0]} pictures that look alike"])
    group = tab.names()
    assert len(group) == sizes[0]
    tab.all("figure > a")[1].click()
    tab.until(lambda: tab.names()[:1] == group[1:2] and "1 query" in tab.headings()[0])
    for step, heading in ((tab.browser.back, "alike"), (tab.browser.back, "stand for"), (tab.browser.forward, "alike")):
        step()
        tab.until(lambda heading=heading: heading in tab.headings()[0])
    tab.browser.refresh()
    tab.until(lambda: tab.names() == group)


@pytest.mark.parametrize("pointer", ["mouse", "touch"])
def test_a_rectangle_on_the_query_is_searched_for(pointer, found):
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    picture = found.all(".large img")[0].rect  # its width stands for 480 pixels
    x, y, side = (int(picture[key]) for key in ("x", "y", "width"))
    actions = ActionBuilder(found.browser, mouse=PointerInput(pointer, pointer))
    actions.pointer_action.move_to_location(x + side // 4, y + side // 4).pointer_down()
    for share in (2, 3):
        actions.pointer_action.move_to_location(x + share * side // 4, y + share * side // 4)
    actions.pointer_action.pointer_up()
    actions.perform()
    part = found.until(lambda: found.all("[name=part]")[0].get_attribute("value"))
    assert all(abs(int(side) - expected) < 4 for side, expected in zip(part.split(","), (120, 60, 360, 300)))
    assert set(found.names(".copy")) == {"5.png", "<b>5 again&.png"} and "covers 3" in found.captions(".copy")[0]
    found.browser.back()
    found.until(lambda: found.headings() == FOUND and not found.all("[name=part]")[0].get_attribute("value"))


def test_by_keyboard_alone(tab):
    """Through all that can be reached: a group, a search, and a part of its query."""
    press(tab, "figcaption a", "\ue007")
    tab.until(lambda: "alike" in tab.headings()[0])
    press(tab, "figure > a", "\ue007")
    tab.until(lambda: "✓" in tab.headings()[1])
    press(tab, "[name=part]", "40,40,200,400\ue007")
    tab.until(lambda: "does not lie within" in tab.headings()[1])
    press(tab, "[name=part]", "40,40,200,300\ue007")
    tab.until(lambda: "✓" in tab.headings()[1] and "covers 2" in tab.captions(".copy")[0])


def press(tab: Tab, selector: str, keys: str) -> None:
    """Move the focus to this element with Tab alone, which shows it, and press the keys."""
    from selenium.webdriver.common.action_chains import ActionChains

    for _ in range(60):
        ActionChains(tab.browser).send_keys("\ue004").perform()
        if tab.browser.execute_script(f"return document.activeElement.matches('{selector}')"):
            break
    outline = tab.browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", selector
    ActionChains(tab.browser).send_keys(keys).perform()


def test_the_same_picture_twice(tab):
    next(it for it in tab.all("nav a") if "twice" in it.text).click()
    tab.until(lambda: tab.headings() == ["1 group", "✓ keep: the best of 2 5.png"])
    assert tab.captions()[0].startswith("keep") and "1 · 1.000 · identical" in tab.captions()[1].replace("0 i", "0 · i")
    tab.all("figure > a")[1].click()
    tab.until(lambda: tab.headings()[1:] == ["✓ found <b>5 again&.png"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_a_phone_and_a_desk_by_day_and_by_night(found, width, scheme):
    emulate(found.browser, width, scheme)
    check_layout(found.browser, width, "h1", "h2", "nav a", "label", "figcaption b", "small", "b.good", "span.good")


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


@pytest.mark.parametrize("path", ["/etc/passwd", "bulk_images/1.png", "main.py", "image_index", "../ui/small.png", "."])
def test_no_file_is_served(path, server):
    for name in (path, str(server.folder / path), "/../" + path):
        assert server.ask(f"/{name}").status == 404
        for asked in (f"q={name}", f"q={name}&part=0,0,9,9", f"group={name}", f"twice={name}"):
            answer = server.ask(f"/?{asked}")
            rest = answer.page.replace(os.fsencode(name), b"")
            assert answer.status == 200 and os.fsencode(server.folder) not in rest
            assert b"cannot be done" in answer.page or asked.startswith("twice")


@pytest.mark.parametrize("name", ["../../evil.png", "/tmp/evil.png", "..", "a/", "%00.png", "n" * 300, "?a#b"])
def test_an_upload_is_written_to_its_folder_alone(name, server):
    before = sorted(server.folder.rglob("*"))
    with suppress(http.client.RemoteDisconnected):  # it is no name of a file
        answer = server.give(name)
        assert answer.status == 200 and b"2.png" in server.ask(f"/?q={answer.page.decode()}").page
    assert not Path("/tmp/evil.png").exists() and sorted(server.folder.rglob("*")) == before


@pytest.mark.parametrize("field", ["q", "k", "least", "part", "group", "twice"])
def test_what_is_asked_is_text_on_the_page(field, server):
    key = server.give("small.png").page.decode()
    assert server.ask(f"/?q={key}&{field}=%22%3E%3Cscript%3Ealert(1)%3C/script%3E").page.count(b"<script>") == 1


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/?twice=1"), ("POST", "/?name=a.png")])
def test_another_site_is_refused(headers, method, path, server):
    assert server.ask(path, method, **headers).status == 403


def test_its_page_asks_no_other_site_and_is_shown_in_none(server):
    answer = server.ask("/")
    policy = answer.page.decode().split('Content-Security-Policy" content="')[1].split('"')[0].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; img-src data:; ") and "http" not in policy
    assert answer.headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize("length", ["300000001", "-1", "many", None])
def test_an_oversized_upload_is_refused(length, server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=WAIT)
    connection.putrequest("POST", "/?name=a.png")
    if length:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    with suppress(http.client.RemoteDisconnected):  # it is no number
        assert connection.getresponse().status == 413


def test_it_listens_on_this_machine_alone(server):
    listening = Path("/proc/net/tcp")
    if not listening.exists():
        pytest.skip("no /proc/net/tcp")
    port = f"{int(server.url.rsplit(':')[-1]):04X}"
    local = [line.split()[1] for line in listening.read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert [address for address in local if address.endswith(f":{port}")] == [f"0100007F:{port}"]


def test_a_port_that_is_taken_is_one_line(server, run, collection):
    collection(1)
    outcome = run("--model", "offline", "-q", "--ui", "--port", server.url.rsplit(":")[-1])
    assert (outcome.status, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith("error: port ") and "--port" in outcome.stderr and outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("at_work", [False, True])
def test_an_interruption_ends_it(at_work, tmp_path, collection):
    collection(60)
    process, url = started(tmp_path)
    if at_work:
        assert "Comparing" in urllib.request.urlopen(f"{url}/?twice=1").read().decode()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WAIT)
    assert (process.returncode, stderr) == (0, "")
