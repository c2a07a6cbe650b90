"""The page as people use it, in the system's Chromium without a screen. What it shows is read from its own pixels."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright
from serve_fixture import GENEROUS, OTHER, PATIENCE, PROMPT, Served, process, running, tool

from cfrt.picture import png
from training.reader import read
from training.worlds import FACTORS

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::cfrt.text.PromptWarning")]

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

READ = """i => { const c = document.querySelectorAll('canvas.picture')[i];
               return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data] }"""

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = tool("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, served: Served) -> Iterator[Open]:
    """Opens the page. Afterwards: nothing went wrong in it, and it asked no other place for anything."""
    faults: list[str] = []
    with ExitStack() as stack:

        def opened(url: str = served.url, *, script: str = "", tolerate: str = "$^", **options: Any) -> Page:
            context = browser.new_context(**options)
            stack.callback(context.close)
            context.add_init_script(script)
            page = context.new_page()
            page.set_default_timeout(1000 * PATIENCE)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on(
                "console",
                lambda said: said.type == "error" and not re.search(tolerate, said.text) and faults.append(said.text),
            )
            page.on(
                "request",
                lambda asked: asked.url.startswith((url.split("#")[0], "blob:", "data:")) or faults.append(asked.url),
            )
            page.goto(url)
            page.wait_for_selector("canvas.picture[data-unit]")
            return page

        yield opened
    assert not faults


def picture(page: Page, screen: int = 0) -> np.ndarray:
    width, height, *values = page.evaluate(READ, screen)
    return np.array(values, dtype=np.uint8).reshape(height, width, 4)[..., :3]


def colour(page: Page, screen: int = 0) -> str:
    values = picture(page, screen).astype(int)
    lead = [(values[..., i] - np.delete(values, i, axis=-1).max(-1)).max() for i in range(3)]
    return ("red", "green", "blue")[int(np.argmax(lead))]


def scene(page: Page) -> str:
    """Size, colour, shape and background of what is on show, read from a third of a second of the page's pixels."""
    pictures = []
    for _ in range(6):
        pictures.append(picture(page))
        page.wait_for_timeout(60)
    film = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)[None] / 255
    factors = dict(zip(FACTORS.items(), read(film).factors[0].tolist(), strict=True))
    return " ".join(values[at] for (name, values), at in factors.items() if name not in ("direction", "speed"))


def unit(page: Page) -> int:
    return int(page.get_attribute("canvas.picture", "data-unit") or -1)


def say(page: Page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.press("#prompt", "Escape")


def eventually(page: Page, true: Callable[[], Any], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        page.wait_for_timeout(50)  # and not sleep: the page's events are handled meanwhile


def settled(page: Page) -> int:
    """The unit on show once that has stopped changing."""
    while True:
        before = picture(page)
        page.wait_for_timeout(350)
        if np.array_equal(before, picture(page)):
            return unit(page)


def test_a_prompt_changes_the_picture_by_webrtc(open_page: Open) -> None:
    page = open_page()
    say(page, PROMPT)
    eventually(page, lambda: colour(page) == "red")
    page.wait_for_selector("#link:has-text('WebRTC')")
    say(page, OTHER)
    eventually(page, lambda: colour(page) == "blue")
    eventually(page, lambda: re.fullmatch(r"[\d.]+ms", page.inner_text("#t-change")))
    assert re.fullmatch(r"[\d.]+ms", page.inner_text("#t-first"))
    assert page.inner_text("#marks div:last-child") == OTHER
    assert page.inner_text("#recent li:first-child") == OTHER


def test_without_webrtc_the_websocket_carries_the_frames(open_page: Open) -> None:
    page = open_page(script="delete window.RTCPeerConnection")
    say(page, PROMPT)
    eventually(page, lambda: colour(page) == "red")
    assert page.inner_text("#link") == "WebSocket"
    say(page, OTHER)
    eventually(page, lambda: colour(page) == "blue")


@pytest.mark.parametrize("way", ["WebRTC", "WebSocket"])
def test_what_the_page_shows_is_what_was_said(open_page: Open, way: str) -> None:
    page = open_page(script="" if way == "WebRTC" else "delete window.RTCPeerConnection")
    page.wait_for_selector(f"#link:has-text('{way}')")
    for prompt, expected in (
        ("a large red circle moving left at night", "large red circle night"),
        ("a small blue square moving up over a meadow", "small blue square meadow"),
        ("a large yellow cross moving right over the ocean", "large yellow cross ocean"),
    ):
        say(page, prompt)
        eventually(page, lambda expected=expected: scene(page) == expected)
    assert page.inner_text("#link") == way


def test_words_that_it_does_not_know_are_said(open_page: Open) -> None:
    page = open_page()
    say(page, "a red sqare moving up")
    eventually(page, lambda: "did you mean 'square'?" in page.inner_text("#notes"))
    say(page, "xyzzy")
    eventually(page, lambda: "knows no word" in page.inner_text("#toast"))


def test_the_keyboard_does_it_all(open_page: Open) -> None:
    page = open_page()
    page.press("body", "1")
    page.press("body", "/")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.press("#prompt", "Escape")
    eventually(page, lambda: unit(page) >= 6)
    page.press("body", "Space")
    eventually(page, lambda: page.get_attribute("#pause", "aria-pressed") == "true")
    settled(page)
    page.press("body", ".")  # to the end of the unit on show
    paused = settled(page)
    page.press("body", ".")
    eventually(page, lambda: unit(page) == paused + 1)
    stepped = settled(page)
    assert stepped == paused + 1
    page.press("body", "ArrowLeft")
    eventually(page, lambda: unit(page) < paused)
    page.press("body", "Space")
    eventually(page, lambda: unit(page) > stepped)
    page.press("body", "b")
    page.wait_for_selector(".screen:nth-child(2) canvas[data-unit]")
    page.press("body", "?")
    page.wait_for_selector("dialog[open]")
    page.press("dialog", "Escape")
    page.press("body", "s")
    assert page.get_attribute("#smooth", "aria-checked") == "true"
    page.press("body", "f")
    full = ":fullscreen canvas.picture"
    page.wait_for_selector(full)
    assert page.eval_on_selector(full, "e => getComputedStyle(e).objectFit") == "contain", "it keeps its shape"


@pytest.mark.slow
def test_the_slider_shows_and_rewinds(open_page: Open) -> None:
    page = open_page()
    say(page, PROMPT)
    eventually(page, lambda: unit(page) >= 12)
    box = page.locator("#rewind").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * (1 - 6 / 240), box["y"] + 20)
    assert "−0:01" in page.inner_text("#bubble")
    before = unit(page)
    page.mouse.up()
    eventually(page, lambda: unit(page) < before)


def test_a_recording_is_downloaded(open_page: Open) -> None:
    page = open_page()
    page.click("#record")
    eventually(page, lambda: page.get_attribute("#record", "aria-pressed") == "true")
    page.wait_for_timeout(600)
    with page.expect_download() as download:
        page.click("#record")
    with av.open(BytesIO(Path(download.value.path()).read_bytes())) as film:
        assert len(list(film.decode(video=0))) >= 4


def test_a_reload_and_another_tab_go_on_with_the_same_stream(open_page: Open, served: Served) -> None:
    page = open_page()
    say(page, OTHER)
    eventually(page, lambda: unit(page) >= 4)
    address, before = page.url, unit(page)
    page.reload()
    page.wait_for_selector("canvas.picture[data-unit]")
    assert page.url == address
    assert unit(page) >= before
    assert page.input_value("#prompt") == OTHER
    other = open_page(address)
    say(other, PROMPT)
    eventually(page, lambda: colour(page) == "red")
    assert page.input_value("#prompt") == PROMPT
    assert served.state(address.split("s=")[1])["viewers"] >= 2


@pytest.mark.slow
def test_a_branch_goes_its_own_way_beside_the_first(open_page: Open) -> None:
    page = open_page()
    say(page, PROMPT)
    eventually(page, lambda: colour(page) == "red")
    page.click("#branch")
    page.wait_for_selector(".screen:nth-child(2) canvas[data-unit]")
    say(page, OTHER)
    eventually(page, lambda: colour(page, 1) == "blue")
    assert colour(page, 0) == "red"
    page.click(".screen:nth-child(2) .close")
    assert page.locator(".screen").count() == 1


def test_a_picture_starts_a_stream(open_page: Open) -> None:
    page = open_page()
    green = np.zeros((40, 90, 3), dtype=np.uint8)
    green[..., 1] = 190
    page.click("#pause")
    eventually(page, lambda: page.get_attribute("#pause", "aria-pressed") == "true")
    page.set_input_files("#file", {"name": "green.png", "mimeType": "image/png", "buffer": png(green)})
    eventually(page, lambda: colour(page) == "green")


def test_on_a_phone(open_page: Open) -> None:
    page = open_page(**PHONE, color_scheme="dark", reduced_motion="reduce")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for name in ("pause", "step", "restart", "branch", "record", "dice"):
        box = page.locator(f"#{name}").bounding_box()
        assert box
        assert box["height"] >= 40, name
    page.tap("#presets li:nth-child(2) button")
    eventually(page, lambda: page.inner_text("figcaption .words") == page.inner_text("#presets li:nth-child(2)"))
    assert not page.locator(".glow").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 14, 16)"


def test_on_a_phone_held_sideways(open_page: Open) -> None:
    """The video and the prompt are both there without scrolling, and stay there."""
    page = open_page(**PHONE | {"viewport": {"width": 844, "height": 390}})
    assert page.evaluate("document.documentElement.scrollWidth") == 844
    for place in ("canvas.picture", "#prompt", "#composer .primary", "#seed", "#presets li:first-child"):
        box = page.locator(place).bounding_box()
        assert box
        assert box["y"] >= 0, place
        assert box["y"] + box["height"] <= 390, place
    page.evaluate("scrollTo(0, 1e6)")
    box = page.locator("canvas.picture").bounding_box()
    assert box
    assert 0 <= box["y"] <= 390 - box["height"], "the video scrolls away"


def test_everything_has_a_name_for_those_who_do_not_see_it(open_page: Open) -> None:
    page = open_page()
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input:not([hidden]), textarea, select, a, canvas[role]')]
           .filter(e => !(e.getAttribute('aria-label') || e.innerText?.trim() || e.labels?.length))
           .map(e => e.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.slow
def test_the_apis_own_page(open_page: Open, served: Served, browser: Browser) -> None:
    page = open_page()
    page.goto(f"{served.url}/docs")
    page.wait_for_selector("summary")
    assert "/streams/{id}/frames" in page.inner_text("#docs")


@pytest.mark.slow
def test_a_server_that_was_killed_is_found_again(open_page: Open) -> None:
    with process() as (url, server):
        page = open_page(url, tolerate="WebSocket connection|Failed to load resource")
        say(page, OTHER)
        eventually(page, lambda: colour(page) == "blue")
        address = page.url
        server.kill()
        page.wait_for_selector("#link[data-state=lost]")
    with process("--forget", port=int(url.rstrip("/").rsplit(":", 1)[1])):
        eventually(page, lambda: page.url != address)
        page.wait_for_selector("canvas.picture[data-unit]")
        assert "no longer has this stream" in page.inner_text("#toast")
        assert page.input_value("#prompt") == OTHER
        eventually(page, lambda: colour(page) == "blue")
        page.close()


@pytest.mark.slow
def test_a_server_that_keeps_its_streams_goes_on_with_them_after_a_kill(open_page: Open, tmp_path: Path) -> None:
    with process("--state", str(tmp_path)) as (url, server):
        page = open_page(url, tolerate="WebSocket connection|Failed to load resource")
        say(page, OTHER)
        eventually(page, lambda: colour(page) == "blue")
        eventually(page, lambda: unit(page) >= 24)
        page.wait_for_timeout(2500)
        address, before = page.url, unit(page)
        server.kill()
        page.wait_for_selector("#link[data-state=lost]")
    with process("--state", str(tmp_path), port=int(url.rstrip("/").rsplit(":", 1)[1])):
        page.wait_for_selector("#link[data-state=live]")
        assert before - 12 <= unit(page)
        assert page.url == address
        assert page.input_value("#prompt") == OTHER
        eventually(page, lambda: unit(page) > before + 4)
        assert colour(page) == "blue"
        page.close()


@pytest.mark.slow
def test_a_token_comes_in_by_the_address_and_leaves_it(open_page: Open) -> None:
    with running(token="a secret", limits=GENEROUS) as guarded:
        page = open_page(f"{guarded.url}/#token=a+secret")
        assert "secret" not in page.url
        eventually(page, lambda: unit(page) >= 1)
        page.reload()
        page.wait_for_selector("canvas.picture[data-unit]")
        page.close()
