"""Section Output, the page: what it shows, that it does no harm, and that it is whole or absent."""

import base64
import io
import os
import re
import resource
import shutil
import urllib.parse
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HOSTILE_NAMES, draw, draw_rich, requests
from PIL import Image

import main

IMAGES, PAGE = Path("bulk_images"), Path("results.html")


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
    it = page("cropped.jpg", "query.png", "-k", 3)
    assert "2 queries, 1 found" in it.text and it.text.count("✓ found") == 1 and "✗ no copy found" in it.text
    assert [row["class"] for row in it.all("ol")] == ["large", "small"] * 2
    assert [item["class"] for item in it.all("li")] == ["query", "copy", "", "", "query", "", "", ""]
    outlines = [it["points"].replace(",", " ").split() for it in it.all("polygon")]
    query, copy = (np.array(outline, float) for outline in outlines if outline)
    assert np.abs(copy - [40, 30, 440, 30, 440, 330, 40, 330]).max() < 6  # in pixels of the whole picture
    assert np.abs(query - [-40, -30, 440, -30, 440, 330, -40, 330]).max() < 6
    assert [attributes["viewbox"] for attributes in it.all("svg")][:2] == ["0 0 400 300", "0 0 480 360"]


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
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # noqa: E731
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
        with open(os.path.join(os.fsencode(IMAGES), name), "wb") as stream:
            draw(number).save(stream, "PNG")
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
    check_layout(browser, width, "h1", "h2", "header", "figcaption b", "small", ".bad")


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
    light = []
    for colour in colours:
        part = np.array(colour, float) / 255
        linear = np.where(part <= 0.03928, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ (0.2126, 0.7152, 0.0722)) + 0.05)
    return max(light) / min(light)
