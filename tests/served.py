"""What the tests of the UI share: a server in this process, and a tab of the browser."""

import http.client
import re
import shutil
import sys
import threading
import time
import types
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw, draw_rich
from PIL import ImageOps

import main

WAIT = 60  # seconds, on a busy machine


def emulate(browser: Any, width: int, scheme: str) -> None:
    """A screen of this width, by day or by night. With a width of 0 the browser's own again."""
    screen = {"width": width, "height": 900 * bool(width), "deviceScaleFactor": 0, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)


def contrast(browser: Any, selector: str) -> float:
    """Of text and what is behind it, as WCAG 2 has it."""
    script = """let at = document.querySelector(arguments[0]), ink = getComputedStyle(at).color, behind
        do { behind = getComputedStyle(at).backgroundColor; at = at.parentElement } while (behind == 'rgba(0, 0, 0, 0)')
        return [ink, behind]"""
    colours = [re.findall(r"\d+", colour)[:3] for colour in browser.execute_script(script, selector)]
    share = np.array(colours, float) / 255
    linear = np.where(share <= 0.03928, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    dark, light = sorted(linear @ (0.2126, 0.7152, 0.0722) + 0.05)
    return light / dark


class Server:
    """The UI of a folder, in a thread."""

    def __init__(self, folder: Path, top: int = 3) -> None:
        self.folder, self.top = folder, top
        self.images = folder / "bulk_images"
        self.images.mkdir(exist_ok=True)

    def start(self, prepare: Any = None) -> "Server":
        (own := self.folder / f"given {time.monotonic_ns()}").mkdir()
        self.ui = main.UI(prepare or self.prepare, main.Work(), 0, self.top, self.folder / "index", str(own))
        self.ui.start("Reading the pictures", self.ui.index)
        if not prepare:
            self.ui.job.join(WAIT)
            assert self.ui.engine, self.ui.job.error
        threading.Thread(target=self.ui.serve_forever, args=(0.01,), daemon=True).start()
        self.port = self.ui.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/{self.ui.kept.token}/"
        return self

    def prepare(self, work: main.Work) -> main.Engine:
        model = main.load_model("offline")
        return main.initialize_reverse_image_search(self.images, self.folder / "index", model=model, work=work)

    def stop(self) -> None:
        self.ui.shutdown()
        self.ui.server_close()

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> http.client.HTTPResponse:
        """The answer, and its `page`. A path that begins with / is one without the token."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        whole = path if path.startswith("/") else f"/{self.ui.kept.token}/{path}"
        connection.request(method, whole, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        response.page = response.read()
        return response

    def act(self, action: str, **form: Any) -> http.client.HTTPResponse:
        return self.ask(action, "POST", urllib.parse.urlencode(form, doseq=True))

    def give(self, name: str, content: bytes = b"") -> str:
        body = content or (self.folder / "small.png").read_bytes()
        answer = self.ask(f"give?{urllib.parse.urlencode({'name': name})}", "POST", body)
        assert answer.status == 200, answer.page
        return answer.page.decode()

    def key(self, name: str) -> str:
        return self.ui.key(str(self.images / name))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With 8 pictures and one that cannot be used."""
    it = Server(tmp_path_factory.mktemp("ui"))
    for seed in range(8):
        draw(seed, (240, 160)).save(it.images / f"{seed}.png")
    draw_rich(5).save(it.images / "5.png")
    (it.images / "more").mkdir()
    shutil.copy(it.images / "5.png", it.images / "more" / "<b>5 again&.png")
    draw_rich(4).save(it.images / "4.tif")
    (it.images / "broken.png").touch()
    ImageOps.mirror(draw_rich(5)).save(it.folder / "edited.jpg", quality=60)
    altered = draw_rich(4)
    altered.paste("gold", (300, 200, 380, 260))
    altered.save(it.folder / "altered.png")
    draw(2, (120, 80)).resize((30, 20)).save(it.folder / "small.png")
    (it.folder / "no image.png").write_text("hello")
    (it.folder / "notes.txt").write_text("hello")
    (it.folder / "empty.jpg").touch()
    from test_command_line import bomb

    bomb(it.folder / "bomb.png")
    yield it.start()
    it.stop()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, one with the same bytes, a smaller copy, a mirrored one, and another picture, with their index."""
    it = Server(tmp_path_factory.mktemp("prepared"))
    draw_rich(1).save(it.images / "a.png")
    shutil.copy(it.images / "a.png", it.images / "b same.png")
    draw_rich(1).resize((360, 270)).save(it.images / "c small.jpg", quality=80)
    ImageOps.mirror(draw_rich(1)).save(it.images / "d mirrored.jpg", quality=80)
    draw_rich(2).save(it.images / "other.png")
    shutil.copy(it.images / "other.png", it.folder / "small.png")
    compared(it.start())
    it.stop()
    return it.folder


@pytest.fixture
def own(tmp_path: Path, prepared: Path) -> Iterator[Server]:
    """A server of one test, see `prepared`."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    it = Server(tmp_path)
    yield it.start()
    it.stop()


class Tab:
    def __init__(self, browser: Any, server: Server, address: str = "") -> None:
        self.browser, self.folder, self.server, self.url = browser, server.folder, server, server.url
        browser.get(server.url + address)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.all(selector)[0]

    def script(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def names(self, within: str = "main") -> list[str]:
        """The names of the files that are shown."""
        script = "return [...document.querySelectorAll(arguments[0])].map(it => it.textContent.trim())"
        return self.script(script, f"{within} figcaption > .name")

    def title(self) -> str:
        return self.browser.title.removesuffix(" – DeepVision")

    def box(self, selector: str) -> dict[str, float]:
        """Where the element is on the screen, after all transforms."""
        return self.script("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)

    def text(self, selector: str) -> str:
        return " ".join(it.text for it in self.all(selector))

    def give(self, *names: str) -> None:
        self.until(lambda: self.script("return document.readyState") == "complete")
        self.one("#given").send_keys("\n".join(str(self.folder / name) for name in names))

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.browser).send_keys(key).perform()

    def reach(self, selector: str) -> None:
        """Move the focus to this element with Tab alone, which shows it."""
        for _ in range(80):
            self.keys("\ue004")
            if self.script("return document.activeElement.matches(arguments[0])", selector):
                break
        outline = self.script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" and self.script("return document.activeElement.matches(arguments[0])", selector)

    def until(self, there: Callable[[], Any]) -> Any:
        """What `there` gives, once that is something."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.wait import WebDriverWait

        loading = (IndexError, WebDriverException)  # the next page is under way
        return WebDriverWait(self.browser, WAIT, 0.02, loading).until(lambda _: there())

    def fits(self, *texts: str) -> None:
        """Nothing sticks out, and the texts, CSS selectors, can be read."""
        width = self.script("return innerWidth")
        assert self.script("return document.documentElement.scrollWidth") <= width
        for selector in texts:
            assert contrast(self.browser, selector) >= 4.5, selector


@pytest.fixture
def tab(browser: Any, server: Server) -> Iterator[Tab]:
    yield Tab(browser, server)
    emulate(browser, 0, "light")


@pytest.fixture
def found(tab: Tab) -> Tab:
    """After a search with the mirrored copy of a picture."""
    tab.give("edited.jpg")
    tab.until(lambda: tab.text("h1") == "edited.jpg")
    return tab


@pytest.fixture
def trash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the system's trash."""
    (folder := tmp_path / "trash").mkdir()
    module = types.SimpleNamespace(send2trash=lambda path: shutil.move(path, folder))
    monkeypatch.setitem(sys.modules, "send2trash", module)
    return folder


def compared(server: Server) -> list[main.Group]:
    server.ask("?twice=1")
    server.ui.job.join(WAIT)
    assert server.ui.groups is not None, server.ui.job.error
    return server.ui.groups


def group_of(server: Server) -> tuple[str, dict[str, Any]]:
    (group,) = server.ui.groups
    return Path(group.keep).name, {Path(match.path).name: match.lost for match in group.matches}


def drag(tab: Tab, selector: str, pointer: str, start: tuple[float, float], *places: tuple[float, float]) -> None:
    """Drag over the element, from and to shares of its sides."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    box = tab.script("return document.querySelector(arguments[0]).getBoundingClientRect()", selector)
    places = [(int(box["x"] + x * box["width"]), int(box["y"] + y * box["height"])) for x, y in (start, *places)]
    actions = ActionBuilder(tab.browser, mouse=PointerInput(pointer, pointer), duration=50)
    actions.pointer_action.move_to_location(*places[0]).pointer_down()
    for place in places[1:]:
        actions.pointer_action.move_to_location(*place)
    actions.pointer_action.pointer_up()
    actions.perform()


def part_of(tab: Tab) -> list[int]:
    values = [it.get_attribute("value") for it in tab.all("[name=part]")]
    return [int(side) for side in values[0].split(",")] if values and values[0] else []
