"""Sections Page and UI: what a page shows, that it does no harm and is whole or absent; and what the UI refuses."""

import base64
import http.client
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HOSTILE_NAMES, MAIN, draw, draw_rich, one_line, requests
from PIL import Image, ImageOps
from test_command_line import bomb

import main

IMAGES, PAGE = Path("bulk_images"), Path("results.html")
WAIT = 60  # seconds, for the UI on a busy machine


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.text = list[tuple[str, dict[str, Any]]](), ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self) -> list[Image.Image]:
        sources = [image["src"].removeprefix("data:image/webp;base64,") for image in self.all("img")]
        return [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]

    def links(self) -> list[bytes]:
        return [urllib.parse.unquote_to_bytes(link["href"].removeprefix("file://")) for link in self.all("a")]


@pytest.fixture
def page(run, collection: Callable[[int], Path]) -> Callable[..., Page]:
    """page(*args): of a search with the offline descriptor, among 6 pictures, by default with query.png, like 3.png."""
    collection(6)
    draw(3).resize((48, 32)).save("query.png")

    def search(*args: object) -> Page:
        outcome = run("--model", "offline", *(args or ["query.png"]))
        assert outcome.status == 0, outcome
        return Page(PAGE.read_text())

    return search


def test_a_query_and_its_matches(page):
    shutil.copy("query.png", IMAGES / "same.png")
    it = page("query.png", "-k", 3)
    assert len(it.pictures()) == 4
    for words in ("query.png", "same.png", "1.000", "identical", "48 × 32 px", "96 × 64 px", "offline on cpu",
                  "7 images in bulk_images"):  # fmt: skip
        assert words in it.text, words
    assert [image["alt"] for image in it.all("img")][:3] == ["query.png", "bulk_images/same.png", "bulk_images/3.png"]
    assert it.links()[:2] == [os.fsencode(Path(name).absolute()) for name in ("query.png", IMAGES / "same.png")]
    outline = [name for name, _ in it.tags if name in ("header", "h1", "main", "h2", "ol")]
    assert outline == ["header", "h1", "main", "h2", "ol", "ol"]


def test_copies_stand_apart_with_their_outline(page):
    draw_rich(20).save(IMAGES / "rich.png")
    draw_rich(20).crop((40, 30, 440, 330)).save("cropped.jpg")
    draw(1000).save("stranger.png")
    it = page("cropped.jpg", "stranger.png", "-k", 3)
    assert "2 queries, 1 found" in it.text and it.text.count("✓ found") == 1 and "✗ no copy found" in it.text
    assert [row["class"] for row in it.all("ol")] == ["large", "small"] * 2
    assert [item["class"] for item in it.all("li")] == ["query", "copy", "", "", "query", "", "", ""]
    outlines = [it["points"].replace(",", " ").split() for it in it.all("polygon")]
    query, copy = (np.array(outline, float) for outline in outlines if outline)
    assert np.abs(copy - [40, 30, 440, 30, 440, 330, 40, 330]).max() < 6  # in pixels of the whole picture
    assert np.abs(query - [0, 0, 400, 0, 400, 300, 0, 300]).max() < 6  # no outline leaves its picture
    assert [attributes["viewbox"] for attributes in it.all("svg")][:2] == ["0 0 400 300", "0 0 480 360"]


def test_of_a_variant_what_differs_is_outlined(page):
    image = draw_rich(20)
    image.save(IMAGES / "rich.png")
    image.paste("gold", (300, 200, 380, 260))
    image.save("altered.png")
    it = page("altered.png", "-k", 1)
    assert "✗ no copy found, 1 variant" in it.text and "variant, differs" in it.text
    assert [item["class"] for item in it.all("li")] == ["query", "variant"]
    boxes = [outline for outline in it.all("polygon") if outline.get("class") == "differs"]
    corners = np.array([outline["points"].replace(",", " ").split() for outline in boxes], float)
    assert corners.shape[1:] == (8,) and np.abs(corners[:, ::2].max() - 380) < 15  # in pixels of the whole picture
    assert np.abs([corners[:, ::2].min() - 300, corners[:, 1::2].min() - 200, corners[:, 1::2].max() - 260]).max() < 15


def test_a_collage_has_an_outline_for_each_picture_in_it(page):
    collage = Image.new("RGB", (960, 360))
    for seed, left in ((20, 0), (21, 480)):
        draw_rich(seed).save(IMAGES / f"rich {seed}.png")
        collage.paste(draw_rich(seed), (left, 0))
    collage.save("collage.png")
    outlines = [np.array(it["points"].replace(",", " ").split(), float) for it in page("collage.png").all("polygon")]
    lefts = sorted(outline[::2].min() for outline in outlines[:2])
    assert np.abs(np.array(lefts) - [0, 480]).max() < 6 and sum(map(len, outlines)) == 4 * 8


def test_every_query_has_its_section(page, run):
    assert len(page("query.png", IMAGES / "1.png", IMAGES / "2.png").all("h2")) == 3
    assert run("--model", "offline", "-q", "query.png", "missing.png").status == 1
    it = Page(PAGE.read_text())
    assert len(it.all("h2")) == 2 and "missing.png" in it.text and "No such file" in it.text
    run("--model", "offline", "-q", "--threshold", 1, "query.png")
    assert "no match" in PAGE.read_text()


def test_it_is_one_file_that_needs_nothing_else(page):
    it = page()
    assert {name for name, _ in it.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base"})
    policy = next(meta["content"] for meta in it.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert all(image["src"].startswith("data:image/webp") for image in it.all("img"))
    assert all(image["loading"] == "lazy" for image in it.all("img"))
    assert not re.search(r"https?:|url\(|@import", PAGE.read_text())


def test_pictures_are_upright_and_tell_nothing_about_who_took_them_and_where(page):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "at home"  # to be turned by 90°
    turned = draw(7, (120, 60)).rotate(90, expand=True)
    turned.save("turned.jpg", exif=exif, xmp=b"<x:xmpmeta/>", quality=95)
    it = page("turned.jpg", "-k", 1)
    picture = it.pictures()[0]
    assert not picture.getexif() and "xmp" not in picture.info
    assert picture.size == (120, 60) and "120 × 60 px" in it.text
    assert np.abs(np.asarray(picture.convert("RGB"), float) - np.asarray(draw(7, (120, 60)), float)).mean() < 8


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2000, 1500)], ids=str)
def test_pictures_are_small(size, page):
    draw(1, size).save("query.png")
    it = page("query.png", "-k", 6)
    assert max(max(picture.size) for picture in it.pictures()) == max(96, min(256, max(size)))
    assert f"{size[0]:,} × {size[1]:,} px" in it.text


def test_a_hundred_queries_with_ten_matches_make_ten_megabytes(page):
    noise = np.random.default_rng(0).normal(0, 8, (375, 500, 3))
    Image.fromarray((np.asarray(draw(1, (500, 375))) + noise).clip(0, 255).astype(np.uint8)).save(IMAGES / "6.png")
    page(IMAGES / "6.png", "-k", 1)
    one = len(re.findall(r"<figure>.*?</figure>", PAGE.read_text(), re.DOTALL)[0])
    assert 1100 * one < 10_000_000


def test_more_than_has_room_is_left_out_and_said(page, monkeypatch):
    monkeypatch.setattr(main, "PAGE_PICTURES", 5)
    it = page("-k", 3, *[IMAGES / f"{n}.png" for n in range(4)])
    assert len(it.pictures()) == 5 and "11 more pictures" in it.text
    assert "more pictures" not in page("-k", 3, "query.png").text


def test_a_file_that_has_gone_leaves_its_place(page, monkeypatch):
    write = main.write_page
    monkeypatch.setattr(main, "write_page", lambda *args: [os.unlink(IMAGES / "3.png"), write(*args)])
    it = page("query.png", "-k", 2)
    assert len(it.pictures()) == 2 and "No such file" in it.text


def test_its_path_is_the_last_line_on_stderr(page, run):
    search = ("--model", "offline", "query.png")
    for name in ("results.html", "with a blank.html"):
        outcome = run(*search, "--report", name)
        assert outcome.stderr.splitlines()[-1] == name and Path(name).is_file()
    PAGE.unlink()
    assert "html" not in run(*search, "--no-report").stderr and not PAGE.exists()
    assert run(*search, "-q").stderr == "" and PAGE.is_file()
    PAGE.unlink()
    run(*search, "--index-only"), run("--model", "offline", "--index-only")
    assert not PAGE.exists()


@pytest.mark.parametrize("place", ["a folder", "no folder/results.html", "/dev/null", "n" * 250])
def test_a_page_that_cannot_be_written_is_one_line_and_costs_no_result(place, page, run):
    Path("a folder").mkdir()
    outcome = run("--model", "offline", "-q", "query.png", "--report", place)
    assert outcome.status == 1 and outcome.stdout.count("\n") == 7
    assert re.fullmatch(rf"error: the page {place} cannot be written \(.+\): .*--report FILE.*\n", outcome.stderr)
    assert list(Path("a folder").iterdir()) == [] and not Path("/dev/null").is_file()


def test_with_no_room_the_old_page_stays(page, program):
    page()
    before, names = PAGE.read_bytes(), set(os.listdir())
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (5000, 5000))
    process = program("--model", "offline", "-q", "query.png", preexec_fn=full)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stdout.count("\n") == 7
    assert re.fullmatch(r"error: the page results.html cannot be written \(.+\): .*\n", stderr)
    assert PAGE.read_bytes() == before and set(os.listdir()) == names


def test_through_a_link_its_target_is_written(page, run):
    PAGE.symlink_to("elsewhere.html")
    page()
    assert PAGE.is_symlink() and Path("elsewhere.html").is_file()


HOSTILE = [
    *HOSTILE_NAMES.values(),
    b'a" onerror="document.title=\'hacked\'" x=".png',
    b"' onmouseover='document.title=1' x='.png",
    b"100%25 #1 ?x=y;&lt;.png",
]


@pytest.fixture
def hostile(run) -> Page:
    IMAGES.mkdir()
    for number, name in enumerate(HOSTILE):
        draw(number).save(IMAGES / os.fsdecode(name), "PNG")
    assert run("--model", "offline", os.fsdecode(b"bulk_images/" + HOSTILE[-1]), "-k", 99).status == 0
    return Page(PAGE.read_text())


def test_a_hostile_name_is_text_and_its_link_is_right(hostile):
    assert not hostile.all("script") and len(hostile.all("img")) == len(HOSTILE)
    assert set(hostile.links()) == {os.path.join(os.fsencode(IMAGES.absolute()), name) for name in HOSTILE}
    allowed = {"src", "alt", "loading", "href", "class", "draggable"}
    assert all(set(attributes) <= allowed for name, attributes in hostile.tags if name in ("img", "a", "ol", "span"))
    for words in ("<script>alert(1)<!-- &amp;", "a\\nb.png", "caf\ufffd.png", "\\u202egnp", "写真 – фото.png"):
        assert words in hostile.text


def test_a_hostile_name_runs_no_script_and_asks_for_nothing(hostile, browser):
    requests(browser), browser.get_log("browser")
    browser.get(PAGE.absolute().as_uri())
    assert browser.title.endswith("DeepVision")
    assert [url for url in requests(browser) if not url.startswith("data:")] == [PAGE.absolute().as_uri()]
    assert browser.get_log("browser") == []  # nor was anything refused by the policy
    loaded = "return [...document.images].map(i => { i.loading = 'eager'; return i.decode().then(() => 1, () => 0) })"
    assert browser.execute_script(f"return Promise.all((() => {{ {loaded} }})())") == [1] * len(HOSTILE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_a_phone_and_a_desk_by_day_and_by_night(hostile, browser, width, scheme):
    emulate(browser, width, scheme)
    browser.get(PAGE.absolute().as_uri())
    check_layout(browser, width, "h1", "h2", "header", "figcaption b", "small", "h2 b")


def emulate(browser: Any, width: int, scheme: str) -> None:
    """A screen of this width, by day or by night. With a width of 0 the browser's own again."""
    screen = {"width": width, "height": 900 * bool(width), "deviceScaleFactor": 0, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)


def check_layout(browser: Any, width: int, *texts: str) -> None:
    """Nothing sticks out, copies are larger than look-alikes, and the texts, CSS selectors, can be read."""
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    widths = [browser.find_element("css selector", f".{row} figure").rect["width"] for row in ("large", "small")]
    assert widths[0] > 1.3 * widths[1]
    for selector in texts:
        assert contrast(browser, selector) >= 4.5, selector
    emulate(browser, 0, "light")


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


# ---- UI --------------------------------------------------------------------------------------------------------------


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
        (folder / "bulk_images" / "more").mkdir()
        shutil.copy(folder / "bulk_images" / "5.png", folder / "bulk_images" / "more" / "<b>5 again&.png")
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
    assert found.names(".large") == ["edited.jpg", *sorted(["5.png", "more/<b>5 again&.png"])]
    assert all("copy" in caption and "mirrored" in caption for caption in found.captions(".copy"))
    assert len(found.all(".large svg")) == 3 and len(found.names(".small")) == 1
    next(it for it in found.all(".large li") if "again&" in it.text).find_element("tag name", "a").click()
    found.until(lambda: found.headings()[1:] == ["✓ found more/<b>5 again&.png"])
    assert found.captions(".identical")[0].startswith("1 · 1.000 identical · 5.png")
    assert found.names().count("more/<b>5 again&.png") == 1  # the query itself
    loaded = "return [...document.images].every(i => i.complete && i.naturalWidth > 100)"
    found.until(lambda: found.browser.execute_script(loaded))
    assert all(url.startswith((found.url, "data:")) for url in requests(found.browser))
    assert [entry for entry in found.browser.get_log("browser") if "favicon" not in entry["message"]] == []


def test_several_are_searched_and_a_bad_one_is_named(tab):
    tab.give("small.png", "no image.png", "notes.txt", "edited.jpg", "empty.jpg", "bomb.png")
    tab.until(lambda: len(tab.headings()) == 7)
    assert tab.headings() == [
        "6 queries, 2 found", "✓ found small.png", "✗ broken, or no image at all no image.png",
        "✗ not an image notes.txt", "✓ found edited.jpg", "✗ an empty file empty.jpg",
        "✗ too large: over 200,000,000 pixels bomb.png",
    ]  # fmt: skip
    assert tab.names(".large")[:2] == ["small.png", "2.png"]
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
    tab.until(lambda: len(tab.names("li:not(.query)")) == 3)
    for name, value, found in (("k", "5", 5), ("least", "0.9", 1), ("least", "1", 0)):
        field = tab.until(lambda name=name: tab.all(f"[name={name}]")[0])
        field.send_keys("\ue009a\ue000", value, "\ue007")  # all of it, and then Enter
        tab.until(lambda found=found: len(tab.names("li:not(.query)")) == found)
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
    assert set(found.names(".copy")) == {"5.png", "more/<b>5 again&.png"} and "covers 3" in found.captions(".copy")[0]
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
    tab.until(lambda: tab.headings()[1:] == ["✓ found more/<b>5 again&.png"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_ui_fits_a_phone_and_a_desk_by_day_and_by_night(found, width, scheme):
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
    one_line(outcome, "error: port ", "--port")


@pytest.mark.parametrize("at_work", [False, True])
def test_an_interruption_ends_it(at_work, tmp_path, collection):
    collection(60)
    process, url = started(tmp_path)
    if at_work:
        assert "Comparing" in urllib.request.urlopen(f"{url}/?twice=1").read().decode()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WAIT)
    assert (process.returncode, stderr) == (0, "")
