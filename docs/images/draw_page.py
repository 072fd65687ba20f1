"""Draws README.md's picture of the page: a shipped example is asked about in a real browser, and a chunk is sought.

python docs/images/draw_page.py docs/images/page.png

Needs the extra `page`, playwright, and Chromium at /usr/bin/chromium (or `--chromium PATH`).
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

EXAMPLE, SOUGHT = "shapes and sounds 2", 2
WIDTH, HEIGHT = 1000, 1050  # pixels


@contextmanager
def serve() -> Iterator[str]:
    """The address of a server of `tiny` that another process runs."""
    command = [sys.executable, "-m", "mirasol.cli", "serve", "tiny", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            told = (re.search(r"page at (http://\S+)", line) for line in process.stderr)
            yield next(found[1] for found in told if found)
        finally:
            process.terminate()


def main() -> None:
    """Reads the arguments and draws."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--chromium", type=Path, default=Path("/usr/bin/chromium"))
    options = parser.parse_args()
    with serve() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(options.chromium), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.get_by_label("Shipped example").click()
        page.get_by_role("option", name=EXAMPLE).click()
        page.locator("#player video").wait_for()
        page.get_by_role("button", name="Ask", exact=True).click()
        cell = page.locator("#timeline .cell").nth(SOUGHT)
        cell.click()
        page.locator(".playhead").wait_for()
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(1000)
        page.screenshot(path=options.picture, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
