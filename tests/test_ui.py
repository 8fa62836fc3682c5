"""Section UI: in a real browser, and what it refuses."""

from __future__ import annotations

import base64
import http.client
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MAIN, Outcome, draw, draw_rich, requests
from PIL import ImageOps
from test_page import check_layout, emulate

import main

Run = Callable[..., Outcome]
WAIT = 60  # seconds, on a busy machine


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
        size = struct.pack(">II", 30_000, 30_000) + b"\x08\x02\0\0\0"
        header = b"\0\0\0\rIHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size))
        (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
        command = [sys.executable, MAIN, "--model", "offline", "--ui", "--port", "0", "-k", "3"]
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        lines = iter(self.process.stderr.readline, "")
        self.url = next(line.strip() for line in lines if line.startswith("http://127.0.0.1:"))
        threading.Thread(target=deque, args=(lines, 0), daemon=True).start()  # a full pipe would stop it

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=WAIT)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="Gradio is not installed")
    server = Server(tmp_path_factory.mktemp("ui"))
    yield server
    server.process.kill()
    server.process.communicate()


class Tab:
    def __init__(self, browser: Any, server: Server) -> None:
        self.browser, self.folder, self.url = browser, server.folder, server.url
        browser.get(server.url)
        self.until(lambda: self.all("#given input[type=file]") and self.all("#found [data-group]"))

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def headings(self) -> list[str]:
        return [heading.text for heading in self.all("#found h2")]

    def captions(self, row: str = "") -> list[str]:
        return [caption.text.replace("\n", " · ") for caption in self.all(f"#found {row} figcaption")]

    def names(self, row: str = "") -> list[str]:
        """The names of the files that are shown."""
        return [caption.split(" · ")[-2] for caption in self.captions(row)]

    def give(self, *names: str) -> None:
        field = self.all("#given input[type=file]")[0]
        self.browser.execute_script("arguments[0].value = ''", field)  # or what it was given before comes along
        field.send_keys("\n".join(str(self.folder / name) for name in names))

    def until(self, there: Callable[[], Any]) -> Any:
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            try:
                if it := there():
                    return it
            except Exception as error:
                if type(error).__name__ not in ("StaleElementReferenceException", "IndexError"):  # drawn anew meanwhile
                    raise
            time.sleep(0.05)
        raise AssertionError(f"it shows {self.headings()}, {self.captions()}, {self.all('body')[0].text}")


@pytest.fixture
def tab(browser: Any, server: Server) -> Tab:
    requests(browser)
    return Tab(browser, server)


# ---- Searching -------------------------------------------------------------------------------------------------------


def test_an_edited_copy_is_found_and_a_click_searches_from_it(tab: Tab) -> None:
    tab.give("edited.jpg")
    tab.until(lambda: tab.headings() == ["✓ found edited.jpg"])
    assert tab.names(".large") == ["edited.jpg", *sorted(["5.png", "<b>5 again&.png"])]
    assert all("copy" in caption and "mirrored" in caption for caption in tab.captions(".copy"))
    assert len(tab.all("#found .large svg")) == 3 and len(tab.names(".small")) == 1
    next(it for it in tab.all("#found .large li") if "again&" in it.text).find_element("tag name", "button").click()
    tab.until(lambda: tab.headings() == ["✓ found <b>5 again&.png"])
    assert tab.captions(".identical")[0].startswith("1 · 1.000 identical · 5.png")
    assert tab.names().count("<b>5 again&.png") == 1  # the query itself
    loaded = "return [...document.querySelectorAll('#found img')].every(i => i.complete && i.naturalWidth > 100)"
    tab.until(lambda: tab.browser.execute_script(loaded))
    asked = requests(tab.browser)
    assert len(asked) > 20 and all(url.startswith((tab.url, "data:", "blob:")) for url in asked)


def test_several_are_searched_and_a_bad_one_is_named(tab: Tab) -> None:
    tab.give("small.png", "no image.png", "notes.txt", "edited.jpg", "empty.jpg", "bomb.png")
    tab.until(lambda: len(tab.headings()) == 6)
    assert tab.headings() == [
        "✗ no copy found small.png", "✗ broken, or no image at all no image.png", "✗ not an image notes.txt",
        "✓ found edited.jpg", "✗ an empty file empty.jpg", "✗ too large: over 200,000,000 pixels bomb.png",
    ]  # fmt: skip
    assert tab.names(".large")[0] == "small.png" and tab.names(".small")[0] == "2.png"
    tab.give("edited.jpg")
    tab.until(lambda: tab.headings() == ["✓ found edited.jpg"])


def test_a_picture_is_pasted(tab: Tab, server: Server) -> None:
    """Copied as from any other program, and pasted by the keys that everybody uses."""
    origin = {"origin": server.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    tab.browser.execute_cdp_cmd("Browser.grantPermissions", origin)
    picture = base64.b64encode((server.folder / "small.png").read_bytes()).decode()
    copy = """const [data, done] = arguments
        fetch("data:image/png;base64," + data).then(found => found.blob())
            .then(blob => navigator.clipboard.write([new ClipboardItem({"image/png": blob})])).then(done, done)"""
    assert tab.browser.execute_async_script(copy, picture) is None
    for _ in range(2):
        tab.all("body")[0].send_keys("\ue009v")
        tab.until(lambda: tab.names(".small")[:1] == ["2.png"])
        tab.all("#found .small button")[1].click()
        tab.until(lambda: tab.names()[:1] != ["image.png"])


def test_how_many_and_from_which_score(tab: Tab) -> None:
    tab.give("small.png")
    tab.until(lambda: len(tab.names(".small")) == 3)
    set_to(tab, "#top", "5")
    tab.until(lambda: len(tab.names(".small")) == 5)
    set_to(tab, "#least", "0.9")
    tab.until(lambda: tab.names(".small") == ["2.png"])
    set_to(tab, "#least", "1")
    tab.until(lambda: tab.headings() == ["✗ no match small.png"])


def set_to(tab: Tab, slider: str, value: str) -> None:
    field = tab.all(f"{slider} input[type=number]")[0]
    field.send_keys("\ue009a\ue000", value, "\ue007", "\ue004")  # all of it, and then Enter and Tab


def test_it_opens_on_the_collection_and_back_works(tab: Tab) -> None:
    assert tab.headings()[0].startswith("9 images in bulk_images, 1 skipped; offline on cpu")
    sizes = [int(button.text.removeprefix("group of ")) for button in tab.all("#found [data-group]")]
    assert sum(sizes) == 9 and sizes == sorted(sizes, reverse=True) and sizes[0] > 1  # two files are identical
    tab.all("#found [data-group]")[0].click()
    tab.until(lambda: tab.headings() == [f"{sizes[0]} pictures that look alike"])
    group = tab.names()
    assert len(group) == sizes[0]
    tab.all("#found figure > button")[1].click()
    tab.until(lambda: tab.names()[:1] == group[1:2] and "look" not in tab.headings()[0])
    for step, heading in ((tab.browser.back, "alike"), (tab.browser.back, "9 images"), (tab.browser.forward, "alike")):
        step()
        tab.until(lambda heading=heading: heading in tab.headings()[0])
    tab.all("#start")[0].click()
    tab.until(lambda: "9 images" in tab.headings()[0])
    tab.browser.back()
    tab.until(lambda: tab.names() == group)
    tab.browser.refresh()
    tab.until(lambda: "9 images" in tab.headings()[0])


@pytest.mark.parametrize("pointer", ["mouse", "touch"])
def test_a_rectangle_on_the_query_is_searched_for(pointer: str, tab: Tab) -> None:
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    tab.give("edited.jpg")
    picture = tab.until(lambda: tab.headings() == ["✓ found edited.jpg"] and tab.all("#found .large img")[0])
    x, y, side = (int(picture.rect[key]) for key in ("x", "y", "width"))  # the side stands for 480 pixels
    actions = ActionBuilder(tab.browser, mouse=PointerInput(pointer, pointer))
    actions.pointer_action.move_to_location(x + side // 4, y + side // 4).pointer_down()
    for share in (2, 3):
        actions.pointer_action.move_to_location(x + share * side // 4, y + share * side // 4)
    actions.pointer_action.pointer_up()
    actions.perform()
    tab.until(lambda: tab.headings() == ["✓ found part of a picture.png"])
    width, height = map(int, tab.captions()[0].split(" · ")[-1].split(" px")[0].split(" × "))
    assert abs(width - 240) < 4 and abs(height - 240) < 4
    assert set(tab.names(".copy")) == {"5.png", "<b>5 again&.png"} and "covers 3" in tab.captions(".copy")[0]
    tab.browser.back()
    tab.until(lambda: tab.headings() == ["✓ found edited.jpg"])


def test_by_keyboard_alone(tab: Tab) -> None:
    """Through all that can be reached: a group, a search, and a part of its query."""
    press(tab, "[data-group]", "\ue007")
    tab.until(lambda: "alike" in tab.headings()[0])
    press(tab, "#found figure > button", " ")
    tab.until(lambda: "✓" in tab.headings()[0])
    press(tab, "#found input", "40,40,200,400\ue007")
    tab.until(lambda: "part of a picture.png" in tab.headings()[0] and " 160 × " in tab.captions()[0])
    for words in (
        "500,0,600,90",
        "1,2,3",
        "a,b,c,d",
        "nan,nan,nan,nan",
        "inf,0,9,9",
        "0,0,0,9",
        "../../small.png",
        "<b>",
    ):
        press(tab, "#found input", f"{words}\ue007")
        message = f"'{words}' is no part of the picture"
        tab.until(lambda message=message: message in tab.all(".toast-wrap")[0].get_property("textContent"))
    tab.browser.back()
    tab.until(lambda: "part" not in tab.headings()[0])


def press(tab: Tab, selector: str, keys: str) -> None:
    """Move the focus to this element with Tab alone, which shows it, and press the keys."""
    from selenium.webdriver.common.action_chains import ActionChains

    for _ in range(60):
        ActionChains(tab.browser).send_keys("\ue004").perform()
        if tab.browser.execute_script(f"return document.activeElement.matches('{selector}')"):
            break
    assert tab.browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid", (
        selector
    )
    ActionChains(tab.browser).send_keys(keys).perform()


def test_the_same_picture_twice(tab: Tab) -> None:
    next(it for it in tab.all("button[role=tab]") if "twice" in it.text).click()
    tab.until(lambda: tab.all("#look")[0].is_displayed())
    tab.all("#look")[0].click()
    headings = tab.until(lambda: [it.text for it in tab.all("#twice h2")])
    assert headings == ["1 group. Nothing is deleted", "keep: the best of 2 5.png"]
    assert "1 · 1.000 identical" in tab.all("#twice figcaption")[1].text
    tab.all("#twice figure > button")[1].click()
    tab.until(lambda: tab.headings() == ["✓ found <b>5 again&.png"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_a_phone_and_a_desk_by_day_and_by_night(tab: Tab, server: Server, width: int, scheme: str) -> None:
    emulate(tab.browser, width, scheme)
    tab = Tab(tab.browser, server)
    tab.give("edited.jpg")
    tab.until(lambda: tab.headings() == ["✓ found edited.jpg"])
    check_layout(tab.browser, width, *(f"#found {it}" for it in ("h2", "figcaption b", "small", "b.good", "span.good")))


def test_groups_stand_for_the_collection(collection: Callable[[int], Path]) -> None:
    """Of three kinds of vectors, in files of three folders, among them a file that is gone."""
    collection(1)
    engine = main.initialize_reverse_image_search(model=main.offline_model())
    random, dim, sizes = np.random.default_rng(0), engine.model.dim, [50, 20, 10]
    centres, files = random.normal(size=(3, dim)), []
    for kind, number in ((kind, number) for kind, size in enumerate(sizes) for number in range(size)):
        vector = centres[kind] + 0.1 * random.normal(size=dim)
        file, vector = main.File(b"%d/%d" % (kind, number), 1, 1), vector / np.linalg.norm(vector)
        files.append(main.Picture(file, random.bytes(16), None, vector.astype(np.float16)))
    engine.store.save([*files, main.Picture(main.File(b"0.png", 1, 1), vanished=True)])
    engine.summary.images = 80
    groups = main.representatives(engine, 3)
    assert [size for size, _ in groups] == [len(images) for _, images in groups] == sizes
    for kind, (_, images) in enumerate(groups):
        assert {Path(match.path).parent.name for match in images} == {str(kind)}
        assert images == sorted(images, key=lambda match: -match.score)
    assert len(main.representatives(engine, 100)) > 24


def test_the_index_is_updated_on_demand(tab: Tab) -> None:
    draw(100, (240, 160)).save(tab.folder / "bulk_images" / "new.png")
    draw(100, (120, 80)).save(tab.folder / "of new.png")
    tab.all("#update")[0].click()
    tab.until(lambda: tab.headings()[0].startswith("10 images"))
    tab.give("of new.png")
    tab.until(lambda: tab.names()[:2] == ["of new.png", "new.png"])


def test_two_tabs_keep_their_own_queries(tab: Tab, server: Server) -> None:
    browser = tab.browser
    tab.give("small.png")
    tab.until(lambda: tab.names()[:2] == ["small.png", "2.png"])
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    other = Tab(browser, server)
    other.give("edited.jpg")
    other.until(lambda: other.headings() == ["✓ found edited.jpg"])
    browser.close()
    browser.switch_to.window(first)
    assert tab.names()[:2] == ["small.png", "2.png"]
    tab.all("#found button")[1].click()
    tab.until(lambda: tab.names()[:1] == ["2.png"])


# ---- What it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "bulk_images/1.png", "main.py", "image_index", "../ui/small.png", "http://127.0.0.1:9/x"]
)
def test_no_file_is_served(path: str, server: Server) -> None:
    for name in (path, str(server.folder / path), "/../" + path):
        for route in ("file=", "file/"):
            assert server.ask(f"/gradio_api/{route}{name}")[0] >= 400


def called(server: Server, path: str, session: str, event: dict[str, Any]) -> bytes:
    """What comes of a call of each function of the page, as if it had uploaded `path`."""
    image, answers = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}, b""
    calls = json.loads(server.ask("/config")[1])["dependencies"]
    for call in (call for call in calls if call["backend_fn"] and call["inputs"]):
        given = ([[image], [[path]], 3, 0, 0] if len(call["inputs"]) == 5 else [[[path]], 3, 0, 0])[
            : len(call["inputs"])
        ]
        data = {"data": given, "fn_index": call["id"], "session_hash": session, "event_data": event}
        answers += server.ask("/gradio_api/run/predict", "POST", json.dumps(data), Content_Type="application/json")[1]
    return answers


@pytest.mark.parametrize("forged", ["small.png", "image_index", "http"])
def test_a_query_cannot_be_another_path_or_address(forged: str, server: Server) -> None:
    """As a forged call would give it, where the page gives what it has uploaded."""
    picture = (server.folder / "small.png").read_bytes()
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="small.png"\r\n\r\n%b\r\n--x--\r\n' % picture
    _, uploaded = server.ask("/gradio_api/upload", "POST", form, Content_Type="multipart/form-data; boundary=x")
    event = {"item": 0, "rank": 0}
    assert b"small.png</h2>" in called(server, json.loads(uploaded)[0], "honest", event)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"http://127.0.0.1:{other.getsockname()[1]}/small.png"
        path = address if forged == "http" else str(server.folder / forged)
        events = [
            event,
            {**event, "part": "0,0,50,50"},
            {**event, "group": 1},
            {"item": path, "rank": path, "part": path},
        ]
        for number, event in enumerate(events):
            answers = called(server, path, f"{forged} {number}", {**event, "path": path, "query": path})
            assert b"small.png</h2>" not in answers and b"part of a picture" not in answers
            assert os.fsencode(server.folder) not in answers.replace(os.fsencode(path), b"")
        assert select.select([other], [], [], 0.5)[0] == []  # nobody has asked


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/upload")])
def test_another_site_is_refused(headers: dict[str, str], method: str, path: str, server: Server) -> None:
    assert server.ask(path, method, **headers)[0] == 403


def test_an_oversized_upload_is_refused(server: Server) -> None:
    def parts() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(310):
            yield bytes(1_000_000)
        yield b"\r\n--x--\r\n"

    try:
        status, _ = server.ask("/gradio_api/upload", "POST", parts(), Content_Type="multipart/form-data; boundary=x")
        assert status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # it had seen enough
    assert server.ask("/")[0] == 200


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    listening = Path("/proc/net/tcp")
    if not listening.exists():
        pytest.skip("no /proc/net/tcp")
    port = f"{int(server.url.rsplit(':')[-1]):04X}"
    local = [line.split()[1] for line in listening.read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert [address for address in local if address.endswith(f":{port}")] == [f"0100007F:{port}"]


def test_a_port_that_is_taken_is_one_line(server: Server, run: Run, collection: Callable[[int], Path]) -> None:
    collection(1)
    outcome = run("--model", "offline", "-q", "--ui", "--port", server.url.rsplit(":")[-1])
    assert (outcome.status, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith("error: port ") and "--port" in outcome.stderr and outcome.stderr.count("\n") == 1


def test_without_gradio_it_is_one_line_at_once() -> None:
    outcome = subprocess.run([sys.executable, "-S", "-E", MAIN, "--ui"], capture_output=True, text=True, timeout=60)
    assert (outcome.returncode, outcome.stdout, outcome.stderr.count("\n")) == (1, "", 1)
    assert "pip install gradio" in outcome.stderr


def test_an_interruption_ends_it(tmp_path: Path, collection: Callable[[int], Path]) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed")
    command = [sys.executable, MAIN, "--model", "offline", "--ui", "--port", "0"]
    collection(1)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    next(line for line in iter(process.stderr.readline, "") if line.startswith("http"))
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WAIT)
    assert (process.returncode, stderr) == (0, "")
