"""Every page in a browser: nothing loaded, nothing run, legible in light and dark, usable with the keyboard."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reports.test_reports import HOSTILE, pages

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, sync_playwright

KINDS = ("predictions", "evaluation", "parity", "divergence", "benchmark", "profile")
# The contrast of WCAG 2.2 of each visible text with the background behind it, the least of a page.
CONTRAST = """() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = text => {
    const [r, g, b] = text.match(/[0-9.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  let least = 99;
  for (const element of document.querySelectorAll('body, body *')) {
    const text = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!text || element.matches('title')) continue;
    const style = getComputedStyle(element);
    const pair = [light(element instanceof SVGElement ? style.fill : style.color), light(behind(element))];
    least = Math.min(least, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05));
  }
  return least;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=found, args=arguments) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("pages")
    for name, html in pages(target / "images").items():
        (target / f"{name}.html").write_text(html, encoding="utf-8")
    return target


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_page(viewport={"width": 1000, "height": 800}) as opened:
        opened.set_default_timeout(10_000)
        yield opened


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_browser(kind: str, folder: Path, page: Page) -> None:
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    address = (folder / f"{kind}.html").as_uri()
    page.goto(address)

    assert HOSTILE in page.inner_text("body") + "".join(page.locator("svg text").all_text_contents())
    assert page.locator("script").count() == 0
    for details in page.locator("details").all():
        details.locator("summary").press("Enter")
        assert details.get_attribute("open") is not None

    backgrounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate(CONTRAST) >= 4.5, scheme
    assert len(set(backgrounds)) == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 1000

    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [address]


def test_the_keyboard_reaches_the_content_first(folder: Path, page: Page) -> None:
    page.goto((folder / "evaluation.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: url.endswith("#content"))


def test_dark_screens_print_dark_on_white(folder: Path, page: Page) -> None:
    page.goto((folder / "evaluation.html").as_uri())
    page.emulate_media(color_scheme="dark", media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRAST) >= 4.5
