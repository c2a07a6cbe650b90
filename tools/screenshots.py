"""Take the pictures of docs/serve.md anew, in the system's Chromium: `python tools/screenshots.py`. Needs `cfrt[test]`.

Look at them before they are committed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from benchmarks.bench_serve import FLAGS, chromium, served  # noqa: E402  (the checkout's, wherever this is run)

DESK = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"device_scale_factor": 2, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}
STORY = (
    "a large red circle moving left over the ocean",
    "a small yellow cross moving up at night",
    "a big blue square drifting right over a meadow",
    "a huge pink ball rising slowly in space",
    "a large red circle moving left over the ocean",
)


@contextmanager
def opened(browser: Browser, url: str, **options: object) -> Iterator[Page]:
    context = browser.new_context(**options)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("canvas.picture[data-unit]")
    yield page
    context.close()


def tell(page: Page, *prompts: str) -> None:
    """One prompt after the other, some seconds each."""
    for prompt in prompts:
        page.fill("#prompt", prompt)
        page.press("#prompt", "Enter")
        page.press("#prompt", "Escape")
        page.wait_for_timeout(6000)


def keep(page: Page, name: str) -> None:
    page.screenshot(path=ROOT / "docs" / f"serve-{name}.png")


def look_back(page: Page, seconds: float) -> None:
    """Holds the handle of the slider there, not to let go of it."""
    box = page.locator("#rewind").bounding_box()
    assert box
    right, middle = box["x"] + box["width"], box["y"] + box["height"] / 2
    page.mouse.move(right - 3, middle)
    page.mouse.down()
    page.mouse.move(right - box["width"] * seconds / 60, middle)


def main() -> None:
    with served() as (client, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        with opened(browser, client.url, **DESK, color_scheme="light") as page:
            tell(page, *STORY)
            keep(page, "light")
        with opened(browser, client.url, **DESK, color_scheme="dark") as page:
            tell(page, *STORY)
            look_back(page, 11)
            keep(page, "dark")
            look_back(page, 0)
            page.mouse.up()
            page.click("#branch")
            page.wait_for_selector(".screen:nth-child(2) canvas[data-unit]")
            tell(page, "a large green triangle moving right at dusk")
            page.click("#record")
            page.wait_for_selector("#record[aria-pressed=true]")
            keep(page, "branch")
        for name, width, height in (("phone", 390, 844), ("sideways", 844, 390)):
            with opened(browser, client.url, **PHONE, viewport={"width": width, "height": height}) as page:
                tell(page, STORY[3])
                keep(page, name)
        browser.close()


if __name__ == "__main__":
    main()
