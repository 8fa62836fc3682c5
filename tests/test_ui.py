"""Section UI in Chromium: what a person does, with mouse, finger and keyboard, on a phone and a desk."""

import base64
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_rich, requests
from PIL import Image, ImageOps
from served import WAIT, Server, Tab, compared, drag, emulate, group_of, part_of

import main

CLIPBOARD = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
ENTER, TAB, ESCAPE, SPACE, LEFT, RIGHT = "\ue007", "\ue004", "\ue00c", " ", "\ue012", "\ue014"


TWO_SCREENS = pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")], ids=str)
SCREENS = pytest.mark.parametrize(
    ("width", "scheme"), [(390, "light"), (390, "dark"), (1400, "light"), (1400, "dark")], ids=str
)

# ---- Search ----


def test_an_edited_copy_is_found_and_searched_from(found):
    requests(found.browser)  # those of other tests
    assert found.browser.title == "edited.jpg – DeepVision" and found.text("header .verdict") == "✓ found"
    assert found.one("header .icon").rect["width"] > 20
    assert found.text("h3") == "2 copies 1 look-alike"
    assert sorted(found.names(".copy")) == ["5.png", "<b>5 again&.png"]
    assert all("copy" in it.text and "mirrored" in it.text for it in found.all(".copy"))
    assert "mirrored" not in found.text(".small li")  # no edit is told of a look-alike
    next(it for it in found.all(".copy") if "again&" in it.text).find_element("link text", "search").click()
    found.until(lambda: found.title() == "more/<b>5 again&.png")
    assert found.text(".identical figcaption").startswith("1 · 1.000 identical")
    loaded = (
        "return [...document.querySelectorAll('.icon, .picture img')].every(i => i.complete && i.naturalWidth > 20)"
    )
    found.until(lambda: found.script(loaded))
    assert all(url.startswith((found.url, "data:")) for url in requests(found.browser) if "127.0.0.1" in url)
    assert [entry for entry in found.browser.get_log("browser") if "Content Security" in entry["message"]] == []


def test_several_are_searched_and_a_bad_one_is_named(tab):
    tab.give("small.png", "no image.png", "notes.txt", "edited.jpg", "empty.jpg", "bomb.png")
    tab.until(lambda: len(tab.all("h2")) == 6)
    assert tab.text("h1") == "6 queries, 2 found"
    assert [it.text.replace("\n", "").replace(" ", "") for it in tab.all("h2")] == [
        words.replace(" ", "") for words in (
            "✓ found small.png", "✗ broken, or no image at all no image.png", "✗ not an image notes.txt",
            "✓ found edited.jpg", "✗ an empty file empty.jpg", "✗ too large: over 200,000,000 pixels bomb.png",
        )
    ]  # fmt: skip


def test_how_many_and_which(tab):
    tab.give("small.png")
    tab.until(lambda: len(tab.names(".found")) == 3)
    tab.one(".settings summary").click()
    tab.one("[name=k]").send_keys("\ue009a\ue000", "5", ENTER)
    tab.until(lambda: len(tab.names(".found")) == 5)
    for value, shown in (("0.9", 1), ("copy", 1), ("identical", 0)):
        tab.one(".settings summary").click()
        tab.one(f"[name=least] option[value='{value}']").click()
        tab.one(".settings form:last-child button").click()
        tab.until(lambda shown=shown: len(tab.names(".found")) == shown)
    assert tab.text("header .verdict") == "✗ no match"
    assert "k=5&least=identical" in tab.one("nav a").get_attribute("href")  # the next search keeps them


def test_it_opens_on_the_collection_and_back_works(tab):
    assert tab.text("h1") == "Pictures that stand for the collection"
    assert "10 images in" in tab.text(".about") and "offline on cpu" in tab.text(".about")
    assert tab.one(".drop").rect["width"] > 0.9 * tab.script("return document.body.clientWidth")
    sizes = [int(link.text.removeprefix("group of ")) for link in tab.all("figcaption > a")]
    assert sum(sizes) == 10 and sizes == sorted(sizes, reverse=True) and sizes[0] > 1  # two files are identical
    tab.one("figcaption > a").click()
    tab.until(lambda: tab.text("h1") == f"{sizes[0]} pictures that look alike")
    group = tab.names()
    tab.one(".acts a").click()
    tab.until(lambda: tab.text(".query .name").replace("\n", "") == group[0])
    for step, heading in ((tab.browser.back, "alike"), (tab.browser.back, "stand for"), (tab.browser.forward, "alike")):
        step()
        tab.until(lambda heading=heading: heading in tab.text("h1"))


@pytest.mark.parametrize("width", [390, 1400])
def test_a_picture_is_opened_large(width, found):
    emulate(found.browser, width, "light")
    found.all(".picture")[1].click()
    found.until(lambda: found.script("return document.querySelector('dialog img').naturalWidth") == 480)
    assert found.one("dialog").rect["width"] == width and found.one("dialog img").rect["width"] > 0.5 * width
    first = found.text("dialog p")
    assert first == str(found.folder / "bulk_images" / "5.png") or first.endswith("again&.png")
    found.keys(RIGHT, RIGHT)
    found.until(lambda: found.text("dialog p") not in ("", first))
    found.keys(LEFT, LEFT)
    found.until(lambda: found.text("dialog p") == first)
    found.keys(ESCAPE)
    found.until(lambda: not found.one("dialog").is_displayed())
    assert found.script("return document.activeElement == document.querySelectorAll('.picture')[1]")
    assert found.text("h1") == "edited.jpg"  # nothing was searched


def test_a_path_is_copied_and_shown_in_its_folder(tab, tmp_path, monkeypatch):
    tab.browser.execute_cdp_cmd("Browser.grantPermissions", CLIPBOARD)
    tab.one(".picture").click()
    tab.one("#path").click()
    tab.until(lambda: tab.text("#path") == "copied")
    assert tab.script("return navigator.clipboard.readText()") == tab.text("dialog p")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    tab.one("#folder").click()
    tab.until(lambda: "There is no file manager on the machine where this runs. The file is /" in tab.text("#said"))
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, status in (("dbus-send", 1), ("xdg-open", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $@" >> {tmp_path}/said\nexit {status}\n')
        (tmp_path / name).chmod(0o755)
    assert tab.server.act("show", file=tab.server.key("more/<b>5 again&.png")).status == 200
    by_bus, opened = (tmp_path / "said").read_text().splitlines()
    assert "ShowItems" in by_bus and by_bus.split()[-1].endswith("%3Cb%3E5%20again%26.png") is False
    assert "/more/%3Cb%3E5%20again%26.png" in by_bus and opened == f"xdg-open {tab.server.images / 'more'}"
    assert tab.server.act("show", file=tab.server.give("a.png")).status == 501  # it lies in no folder of the person


def test_a_match_that_is_pressed_and_dragged_is_only_a_match(found):
    drag(found, ".copy .picture", "mouse", (0.2, 0.2), (0.7, 0.7))
    assert found.text("h1") == "edited.jpg" and not found.all(".part")


def pixels(tab: Tab, selector: str) -> np.ndarray:
    """The inner part of what is seen of the element, in grey."""
    box = {key: tab.box(selector)[key] for key in ("x", "y", "width", "height")}
    shot = tab.browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": {**box, "scale": 1}})
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("L"), float)[6:-6, 6:-6]


@TWO_SCREENS
def test_query_and_match_are_laid_over_one_another(width, scheme, found):
    emulate(found.browser, width, scheme)
    found.one(".copy .compare summary").click()
    loaded = "return [...document.querySelectorAll('.compare[open] img')].every(i => i.complete && i.naturalWidth)"
    found.until(lambda: found.script(loaded))
    frame = found.box(".compare[open] .frame")
    assert frame["x"] >= 0 and frame["right"] <= width and frame["bottom"] <= 900 and frame["width"] > 0.45 * width
    found.keys("\ue011")  # Home: the match covers all
    match = pixels(found, ".compare[open] .frame")
    found.keys("\ue010")  # End: only the query
    assert found.one("[type=range]").get_attribute("value") == "100"
    query = pixels(found, ".compare[open] .frame")
    assert np.abs(match - query).mean() < 12 < np.abs(match[:, ::-1] - query).mean()  # it is mirrored
    clip = "return getComputedStyle(document.querySelector('.compare[open] .cut')).clipPath"
    assert found.script(clip) == "inset(0px 0px 0px 100%)"
    found.keys(SPACE)  # blink: the match again
    assert found.script(clip) == "none" and np.abs(pixels(found, ".compare[open] .frame") - match).mean() < 6
    found.keys(SPACE)
    assert found.script(clip) == "inset(0px 0px 0px 100%)"
    found.fits(".stage p", ".stage label")
    found.keys(ESCAPE)
    found.until(lambda: not found.all(".compare[open]"))


@pytest.mark.parametrize("pointer", ["mouse", "touch"])
def test_the_line_between_two_pictures_follows_the_pointer(pointer, found):
    found.one(".copy .compare summary").click()
    drag(found, ".compare[open] .frame", pointer, (0.2, 0.5), (0.5, 0.4), (0.75, 0.5))
    frame, line = found.box(".compare[open] .frame"), found.box(".compare[open] .edge")
    assert line["x"] == pytest.approx(frame["x"] + 0.75 * frame["width"], abs=3)
    assert float(found.one(".compare[open] [type=range]").get_attribute("value")) == pytest.approx(75, abs=1)
    drag(found, ".compare[open] .frame", pointer, (0.1, 0.5))  # a press alone moves it, too
    assert found.box(".compare[open] .edge")["x"] == pytest.approx(frame["x"] + 0.1 * frame["width"], abs=3)
    assert found.text("h1") == "edited.jpg" and not part_of(found)


def test_of_a_variant_what_differs_is_outlined_where_they_are_compared(tab):
    tab.give("altered.png")
    tab.until(lambda: "no copy found, 1 variant" in tab.text("header"))
    tab.one(".variant .compare summary").click()
    frame, box = tab.box(".frame"), tab.box(".frame polygon.differs")
    scale = frame["width"] / 480
    places = [(box["x"] - frame["x"]) / scale, (box["y"] - frame["y"]) / scale]
    places += [places[0] + box["width"] / scale, places[1] + box["height"] / scale]
    assert np.abs(np.array(places) - [300, 200, 380, 260]).max() < 16


def test_the_page_of_a_search_compares_without_script(browser, run, tmp_path):
    (tmp_path / "bulk_images").mkdir()
    draw_rich(5).save("bulk_images/5.png")
    draw_rich(6).save("bulk_images/6.png")
    ImageOps.mirror(draw_rich(5)).save("query.png")
    assert run("--model", "offline", "-q", "query.png").status == 0
    browser.get(Path("results.html").absolute().as_uri())
    find = browser.find_element
    find("css selector", ".compare summary").click()
    assert find("css selector", ".frame").rect["height"] > 300
    clip = "return getComputedStyle(document.querySelector('.cut')).clipPath"
    assert browser.execute_script(clip) == "inset(0px 0px 0px 50%)"
    find("css selector", ".track input:checked").send_keys(RIGHT)
    assert browser.execute_script(clip) == "inset(0px 0px 0px 60%)"
    find("css selector", ".blink").send_keys(SPACE)
    assert browser.execute_script(clip) == "none"
    find("css selector", ".compare summary").click()
    assert not find("css selector", ".frame").is_displayed()


@TWO_SCREENS
def test_files_that_lose_nothing_are_chosen_and_moved_to_the_trash(width, scheme, own, browser, trash):
    compared(own)
    tab = Tab(browser, own, "?twice=1")
    emulate(browser, width, scheme)
    keep, lost = group_of(own)
    assert lost.keys() == {"b same.png", "c small.jpg", "d mirrored.jpg"} and keep == "a.png"
    chosen = {name for name, words in lost.items() if words is None}
    boxes = {it.get_attribute("value"): it.is_selected() for it in tab.all("[name=file]")}
    assert boxes == {own.key(name): name in chosen for name in lost} and "b same.png" in chosen
    won = sum((own.images / name).stat().st_size for name in chosen)
    assert tab.text("h1") == f"1 group, {won / 1000:,.0f} KB can be won"
    assert "lost with it: mirrored" in tab.text(".group") and tab.all(".group polygon")
    assert tab.text("#sum").startswith(f"{len(chosen)} of 3 files chosen, ")
    tab.fits("h2 .verdict", ".bad", "small", "#sum", ".acts a", "nav a")
    box = next(it for it in tab.all("[name=file]") if it.get_attribute("value") == own.key("d mirrored.jpg"))
    tab.script("arguments[0].scrollIntoView({block: 'center'})", box)
    box.click()
    tab.until(lambda: tab.text("#sum").startswith(f"{len(chosen) + 1} of 3"))
    tab.one("[formaction=trash]").click()
    browser.switch_to.alert.accept()
    tab.until(lambda: f"{len(chosen) + 1} files moved to the trash" in tab.text(".news"))
    assert {path.name for path in trash.iterdir()} == {*chosen, "d mirrored.jpg"}
    assert (own.images / "a.png").exists() and "d mirrored.jpg" not in tab.names()
    emulate(browser, 0, "light")


def test_chosen_paths_are_saved_and_copied(own, browser):
    compared(own)
    answer = own.act("list", file=[own.key("b same.png"), own.key("d mirrored.jpg")])
    assert answer.page.decode().splitlines() == [str(own.images / name) for name in ("b same.png", "d mirrored.jpg")]
    assert answer.headers["Content-Disposition"] == "attachment; filename=paths.txt"
    tab = Tab(browser, own, "?twice=1")
    browser.execute_cdp_cmd("Browser.grantPermissions", CLIPBOARD)
    tab.one("#copy").click()
    tab.until(lambda: "copied" in tab.text("#copy"))
    assert str(own.images / "b same.png") in tab.script("return navigator.clipboard.readText()")


def test_the_first_index_is_watched(tmp_path, browser):
    it, go = Server(tmp_path), threading.Event()
    draw_rich(1).save(it.images / "a.png")

    def prepare(work: main.Work) -> main.Engine:
        with main.progress_bar(total=40, desc="reading", unit="img", mininterval=0) as bar:
            for _ in range(10):
                bar.update()
            go.wait(WAIT)
        return it.prepare(work)

    tab = Tab(browser, it.start(prepare))
    tab.until(
        lambda: "reading: 10 of 40" in tab.text("#job") and "img/s" in tab.text("#job") and "left" in tab.text("#job")
    )
    assert tab.one("progress").get_attribute("value") == "25" and tab.text("h1") == "Reading the pictures"
    go.set()
    tab.until(lambda: "stand for" in tab.text("h1") and not tab.all("#job"))
    it.stop()


def test_a_job_is_stopped_and_goes_on(own, browser, monkeypatch):
    find, go = main.find_duplicates, threading.Event()

    def slow(engine: main.Engine, found: Any) -> Iterator[main.Group]:
        found(str(own.images / "a.png"), str(own.images / "b same.png"), "copy")
        for _ in main.progress_bar(range(10**6), desc="comparing", unit="pair", mininterval=0):
            if go.wait(0.01):
                break
        yield from find(engine)

    monkeypatch.setattr(main, "find_duplicates", slow)
    tab = Tab(browser, own, "?twice=1")
    tab.until(lambda: "comparing: " in tab.text("#job") and tab.names() == ["a.png", "b same.png"])  # as it is found
    assert not tab.all("[name=file]")  # nothing is chosen before it is known which to keep
    tab.one("#job button").click()
    tab.until(lambda: "Stopped. What was done is kept" in tab.text("h1"))
    go.set()
    next(it for it in tab.all("button") if it.text == "Go on comparing").click()
    tab.until(lambda: tab.all("[name=file]"))


def test_pages_are_turned(server, browser, monkeypatch):
    monkeypatch.setattr(main, "PER_PAGE", 4)
    tab = Tab(browser, server, f"?q={server.key('2.png')}&k=9")
    seen = tab.names()
    assert len(seen) == 4 and "page 1 of 3" in tab.text(".pages") and not tab.all("[rel=prev]")
    for number in (2, 3):
        tab.one("[rel=next]").click()
        tab.until(lambda number=number: f"page {number} of 3" in tab.text(".pages"))
        seen += tab.names()
    assert len(seen) == 10 and len(set(seen)) == 10 and not tab.all("[rel=next]")


def test_changes_are_looked_for_and_a_file_that_is_gone_says_so(own, browser):
    (own.images / "other.png").unlink()
    draw_rich(7).save(own.images / "new.png")
    assert "it is not there any more" in own.ask("").page.decode()
    tab = Tab(browser, own)
    tab.one(".settings summary").click()
    next(it for it in tab.all("button") if it.text == "Look for changes").click()
    tab.until(lambda: "1 new" in tab.text(".news") and "1 gone" in tab.text(".news"))
    assert {"new.png"} <= set(tab.names()) and "other.png" not in tab.names()


@pytest.mark.parametrize("pointer", ["mouse", "touch"])
def test_a_rectangle_on_the_query_is_searched_for(pointer, found):
    drag(found, ".query .picture", pointer, (0.25, 0.3), (0.5, 0.32), (0.75, 0.7))
    part = found.until(lambda: part_of(found))
    assert np.abs(np.array(part) - [120, 84, 360, 276]).max() < 8  # in pixels of the whole picture
    points = found.one(".query .part").get_attribute("points").replace(",", " ").split()
    assert [float(points[n]) for n in (0, 1, 4, 5)] == part  # it is drawn
    found.until(lambda: len(found.names(".copy")) == 2)
    next(it for it in found.all("button") if it.text == "whole picture").click()
    found.until(lambda: not part_of(found) and not found.all(".part") and len(found.names(".copy")) == 2)


def test_less_than_eight_pixels_are_a_click(found):
    side = found.one(".query .picture").rect["width"]
    drag(found, ".query .picture", "mouse", (0.5, 0.5), (0.5 + 5 / side, 0.5 + 3 / side))
    assert found.one("dialog").is_displayed() and not found.all(".part")


def test_a_touch_that_scrolls_is_no_rectangle(found):
    emulate(found.browser, 390, "light")
    where = found.one(".query .picture").rect
    x, y = where["x"] + 100, where["y"] + 250
    steps = [("touchStart", y), *(("touchMove", y - step) for step in range(10, 210, 20))]
    for kind, at in steps:
        touch = {"type": kind, "touchPoints": [{"x": x, "y": at}]}
        found.browser.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
    found.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    found.until(lambda: found.script("return scrollY") > 50)
    assert found.text("h1") == "edited.jpg" and not part_of(found)
    assert not [it for it in found.all(".part") if it.get_attribute("points")]


def test_of_several_queries_only_one_changes(tab):
    tab.give("edited.jpg", "altered.png")
    tab.until(lambda: len(tab.all(".query")) == 2)
    drag(tab, ".query .picture", "mouse", (0.25, 0.3), (0.75, 0.7))
    tab.until(lambda: part_of(tab))
    assert [bool(it.get_attribute("value")) for it in tab.all("[name=part]")] == [True, False]
    assert tab.text("h1") == "2 queries, 1 found"


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(way, tab):
    """As from any other program: the event that the browser makes of it."""
    script = """const [way, bytes] = arguments, data = new DataTransfer()
        data.items.add(new File([Uint8Array.from(bytes)], "given.png"))
        const event = way == "paste" ? new ClipboardEvent(way, {clipboardData: data, bubbles: true})
            : new DragEvent(way, {dataTransfer: data, bubbles: true, cancelable: true})
        document.body.dispatchEvent(event)"""
    tab.script(script, way, [*(tab.folder / "small.png").read_bytes()])
    tab.until(lambda: tab.names()[:2] == ["given.png", "2.png"])


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_an_address_is_refused_with_what_to_do(way, tab):
    script = """const data = new DataTransfer()
        data.setData("text/uri-list", "https://example.org/cat.jpg")
        document.body.dispatchEvent(arguments[0] == "paste"
            ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
            : new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}))"""
    tab.script(script, way)
    assert (
        tab.text("#said")
        == "Only files are taken here. For an address, run: python main.py 'https://example.org/cat.jpg'"
    )


def test_a_folder_is_taken_and_the_page_lights_up(tab):
    (tab.folder / "dropped" / "deep").mkdir(parents=True, exist_ok=True)
    shutil.copy(tab.folder / "small.png", tab.folder / "dropped" / "deep" / "one.png")
    shutil.copy(tab.folder / "edited.jpg", tab.folder / "dropped" / "two.jpg")
    (tab.folder / "dropped" / "notes.txt").write_text("hello")
    data = {"items": [], "files": [str(tab.folder / "dropped")], "dragOperationsMask": 1}
    for step in ("dragEnter", "dragOver", "drop"):
        event = {"type": step, "x": 300, "y": 300, "data": data}
        tab.browser.execute_cdp_cmd("Input.dispatchDragEvent", event)
        if step == "dragOver":
            tab.until(lambda: "Drop it" in tab.script("return getComputedStyle(document.body, '::after').content"))
    tab.until(lambda: sorted(tab.script(
        "return [...document.querySelectorAll('.query .name')].map(it => it.textContent.trim())"
    )) == ["one.png", "two.jpg"])  # fmt: skip


def test_a_server_that_is_gone_is_told(own, browser):
    tab = Tab(browser, own)
    own.stop()
    tab.one("#given").send_keys(str(own.folder / "small.png"))
    tab.until(lambda: "The server is gone. Start it again: python main.py --ui" in tab.text("#said"))


@SCREENS
def test_every_page_fits_and_can_be_read(width, scheme, found):
    emulate(found.browser, width, scheme)
    found.fits(
        "h1", "h3", "nav a", ".button", ".verdict", "figcaption b", "small", ".good", ".about", ".settings summary"
    )
    query, small = (found.one(f"{it} figure").rect["width"] for it in (".query", ".small"))
    assert (
        query > 1.2 * small
        and found.script("return getComputedStyle(document.querySelector('header')).position") == "sticky"
    )
    found.browser.get(found.url)
    found.fits(".drop b", ".drop span", "figcaption a", ".name")
    heights = [it.rect["height"] for it in found.all(".tiles figure")[:2]]
    assert heights[0] == heights[1]


def test_two_sizes_and_long_names(browser, tmp_path):
    it = Server(tmp_path)
    name = "holiday " * 20 + "the end.png"
    for n in range(3):
        draw_rich(n).save(it.images / (name if n == 0 else f"{n}.png"))
    tab = Tab(browser, it.start())
    shown = next(element for element in tab.all(".name") if "holiday" in element.text)
    assert shown.rect["height"] < 40 and shown.get_attribute("title") == str(it.images / name)
    assert shown.text.replace("\n", "").replace(" ", "") == name.replace(" ", "")  # all of it for screen readers
    head, tail = shown.find_elements("css selector", "span")
    assert head.rect["x"] + head.rect["width"] <= tail.rect["x"] + 1 and "end.png" in tail.text
    before = tab.one("figure").rect["width"]
    tab.one(".settings summary").click()
    tab.one("#larger").click()
    assert tab.one("figure").rect["width"] > 1.3 * before
    browser.refresh()
    assert tab.one("figure").rect["width"] > 1.3 * before  # it is remembered
    tab.script("localStorage.clear()")
    it.stop()


def test_cards_are_not_cut_between_printed_pages(found):
    found.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    inside = found.script("return [...document.querySelectorAll('li')].map(it => getComputedStyle(it).breakInside)")
    assert set(inside) == {"avoid"}
    found.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_by_keyboard_alone(tab):
    """Through all that can be reached: the skip link, a group, a large view, a search, a part of it, a comparison."""
    tab.keys(TAB, ENTER)
    assert tab.script("return document.activeElement.id") == "main"
    tab.reach("figcaption > a")
    tab.keys(ENTER)
    tab.until(lambda: "alike" in tab.text("h1"))
    tab.reach(".picture")
    tab.keys(ENTER)
    tab.until(lambda: tab.one("dialog").is_displayed())
    tab.reach("#from")
    tab.keys(ENTER)
    tab.until(lambda: tab.text("header .verdict") == "✓ found")
    tab.reach("[name=part]")
    tab.keys("40,40,200,300", ENTER)
    tab.until(lambda: "covers 2" in tab.text(".copy"))
    tab.reach(".compare summary")
    tab.keys(ENTER)
    tab.until(lambda: tab.all(".compare[open]"))
    tab.until(lambda: tab.script("return document.activeElement.type") == "range")
    tab.keys(RIGHT)
    assert tab.one("[type=range]").get_attribute("value") == "51"
    tab.keys(ESCAPE)
    tab.until(lambda: not tab.all(".compare[open]"))
