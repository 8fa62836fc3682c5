"""Section Page: what a page shows, and that it does no harm and is whole or absent."""

import base64
import io
import os
import re
import resource
import shutil
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HOSTILE_NAMES, draw, draw_rich, requests
from PIL import Image
from served import contrast, emulate

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
        """Those of the cards: what a comparison or the header repeats has no text."""
        sources = [it["src"].removeprefix("data:image/webp;base64,") for it in self.all("img") if it["alt"]]
        return [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]

    def links(self) -> list[bytes]:
        return [
            urllib.parse.unquote_to_bytes(link["href"].removeprefix("file://"))
            for link in self.all("a")
            if "draggable" in link
        ]


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
    names = [image["alt"] for image in it.all("img") if image["alt"]]
    assert names[:3] == ["query.png", "bulk_images/same.png", "bulk_images/3.png"]
    assert it.links()[:2] == [os.fsencode(Path(name).absolute()) for name in ("query.png", IMAGES / "same.png")]
    outline = [name for name, _ in it.tags if name in ("header", "h1", "main", "h2", "h3", "ol")]
    assert outline == ["header", "h1", "main", "ol", "h3", "ol", "h3", "ol", "h3", "ol"]
    assert all(words in it.text for words in ("1 identical file", "1 copy", "1 look-alike"))


def test_copies_stand_apart_with_their_outline(page):
    draw_rich(20).save(IMAGES / "rich.png")
    draw_rich(20).crop((40, 30, 440, 330)).save("cropped.jpg")
    draw(1000).save("stranger.png")
    it = page("cropped.jpg", "stranger.png", "-k", 3)
    assert "2 queries, 1 found" in it.text
    headings = " ".join(it.text.split())
    assert headings.count("✓ found cropped.jpg") == 1 and "✗ no copy found stranger.png" in headings
    large, small, query = "cards large", "cards small", "cards large one"
    assert [row["class"] for row in it.all("ol")] == [query, large, small, query, small]
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
    boxes = boxes[: len(boxes) // 2]  # the others are of the comparison
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


def test_a_fetched_query_has_the_name_that_it_was_given_by(page, run, monkeypatch):
    page()
    monkeypatch.setattr(main, "fetch", lambda name, path: shutil.copy("query.png", path) and None)
    address = "http://127.0.0.1/some/cat.png"
    assert run("--model", "offline", "-q", address).status == 0
    it = Page(PAGE.read_text())
    assert "cat.png – DeepVision" in it.text and it.all("h1")[0]["title"] == address
    assert next(link["href"] for link in it.all("a") if "draggable" in link) == address


def test_every_query_has_its_section(page, run):
    assert len(page("query.png", IMAGES / "1.png", IMAGES / "2.png").all("h2")) == 3
    assert page("query.png").all("h1")[0]["title"] == "query.png" and "query.png – DeepVision" in PAGE.read_text()
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
    assert all(image["loading"] == "lazy" for image in it.all("img") if image.get("class") != "icon")
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
    assert np.abs(np.asarray(picture.convert("RGB"), float) - np.asarray(draw(7, (120, 60)), float)).mean() < 16


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
    assert "left out" not in page("-k", 2, "query.png").text  # a copy counts as three: its comparison has two


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
    assert not hostile.all("script") and len(hostile.pictures()) == len(HOSTILE)
    assert set(hostile.links()) == {os.path.join(os.fsencode(IMAGES.absolute()), name) for name in HOSTILE}
    allowed = {"src", "alt", "loading", "href", "class", "draggable", "style", "title"}
    assert all(set(attributes) <= allowed for name, attributes in hostile.tags if name in ("img", "a", "ol", "span"))
    for words in ("<script>alert(1)<!-- &amp;", "a\\nb.png", "caf\ufffd.png", "\\u202egnp", "写真 – фото.png"):
        assert words in hostile.text


def test_a_hostile_name_runs_no_script_and_asks_for_nothing(hostile, browser):
    requests(browser), browser.get_log("browser")
    browser.get(PAGE.absolute().as_uri())
    assert browser.title.endswith("DeepVision")
    assert [url for url in requests(browser) if not url.startswith("data:")] == [PAGE.absolute().as_uri()]
    assert browser.get_log("browser") == []  # nor was anything refused by the policy
    cards = "return [...document.images].filter(i => i.alt)"
    loaded = f"{cards}.map(i => {{ i.loading = 'eager'; return i.decode().then(() => 1, () => 0) }})"
    assert browser.execute_script(f"return Promise.all((() => {{ {loaded} }})())") == [1] * len(HOSTILE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_a_phone_and_a_desk_by_day_and_by_night(hostile, browser, width, scheme):
    emulate(browser, width, scheme)
    browser.get(PAGE.absolute().as_uri())
    check_layout(browser, width, "h1", "h3", "header", "figcaption b", "small", ".verdict")


def check_layout(browser: Any, width: int, *texts: str) -> None:
    """Nothing sticks out, copies are larger than look-alikes, and the texts, CSS selectors, can be read."""
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    widths = [browser.find_element("css selector", f".{row} figure").rect["width"] for row in ("large", "small")]
    assert widths[0] > 1.3 * widths[1]
    for selector in texts:
        assert contrast(browser, selector) >= 4.5, selector
    emulate(browser, 0, "light")
