"""Pages of ``scripts.explore`` in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
]

# voxels of NiiVue's texture of overlays that are not transparent
OVERLAID = """({ gl, overlayTexture, back }) => {
  const [, width, height, depth] = back.dims, colours = new Uint8Array(4 * width * height);
  const buffer = gl.createFramebuffer();
  let count = 0;
  gl.bindFramebuffer(gl.FRAMEBUFFER, buffer);
  for (let slice = 0; slice < depth; slice++) {
    gl.framebufferTextureLayer(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, overlayTexture, 0, slice);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, colours);
    for (let place = 3; place < colours.length; place += 4) count += colours[place] > 0;
  }
  gl.bindFramebuffer(gl.FRAMEBUFFER, null);
  gl.deleteFramebuffer(buffer);
  return count;
}"""


class Window:
    """A page, with what went wrong on it.

    Attributes:
        page: Playwright's.
        failures: errors of its scripts.
        elsewhere: addresses that it asked for and that are not the server's.
    """

    def __init__(self, browser: Any, address: str) -> None:
        self.page = browser.new_context(viewport={"width": 1280, "height": 560}).new_page()
        self.page.set_default_timeout(60_000)
        self.failures: list[str] = []
        self.elsewhere: list[str] = []
        own = (address.partition("?")[0], "blob:", "data:")
        self.page.on("pageerror", lambda error: self.failures.append(str(error)))
        self.page.on("request", lambda r: None if r.url.startswith(own) else self.elsewhere.append(r.url))
        self.page.goto(address)

    def until(self, true: Callable[[], bool], what: str = "") -> None:
        """Wait until something is true that the page draws or computes."""
        for _ in range(900):
            if true():
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(what or true)

    def holds(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        self.until(lambda: self.page.evaluate(expression), expression)

    def drawn(self, view: str, times: int = 1, place: int = 0) -> None:
        """Wait until a viewer of a view has drawn so many times."""
        viewers = f"document.querySelectorAll('{view} .viewer')"
        self.holds(f"Number({viewers}[{place}].dataset.drawn ?? 0) >= {times}")

    def times(self, view: str) -> int:
        """How many times the first viewer of a view has drawn."""
        return int(self.page.get_attribute(f"{view} .viewer", "data-drawn") or 0)

    def volume(self, view: str, number: int = 0) -> np.ndarray:
        """The voxels of the image (0) or the overlay (1) that the first viewer of a view shows, ``[8, 8, 8]``."""
        values = self.page.evaluate(f"Array.from({viewer(view)}.volumes[{number}].img)")
        return np.array(values).reshape((8, 8, 8), order="F")

    def overlaid(self, view: str) -> int:
        """How many voxels the first viewer of a view draws the overlay on, as the graphics card has it."""
        return self.page.evaluate(f"({OVERLAID})({viewer(view)})")


def viewer(view: str) -> str:
    """The NiiVue of the first viewer of a view, in JavaScript."""
    return f"document.querySelector('{view} .viewer').viewer.nv"


@contextmanager
def pages(browser: Any) -> Iterator[None]:
    """Pages of a browser, which are closed at the end."""
    try:
        yield
    finally:
        for context in browser.contexts:
            context.close()


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="Python's playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
