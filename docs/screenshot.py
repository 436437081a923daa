"""Takes docs/serve.png from a running server.

    pdrop serve --schedule own dense tokens-48 tokens-24 --slots 1 --images 1 --max-prompt-tokens 208 &
    python docs/screenshot.py http://127.0.0.1:8000 docs/serve.png

Needs the package playwright, and Debian's ``chromium``.
"""

import io
import shutil
import sys

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

MOST = 300_000  # milliseconds that anything may take: at first the server compiles


def take(page: Page, path: str) -> None:
    """Asks about the sample picture and saves the page, once the schedule and the one beside it have answered."""
    page.get_by_role("button", name="Use the sample picture").click()
    page.get_by_role("button", name="Ask", exact=True).click()
    answers = page.locator("#pair .text")
    for side in range(2):
        expect(answers.nth(side)).not_to_be_empty()
        expect(page.locator("#pair dl").nth(side)).not_to_contain_text("–")  # noqa: RUF001  as long as there is no figure
    page.mouse.move(0, 0)
    taken = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    taken.convert("RGB").quantize(256).save(path, optimize=True)  # a third of the bytes


def main(url: str, path: str) -> None:
    expect.set_options(timeout=MOST)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="dark", reduced_motion="reduce")
        page.goto(url)
        expect(page.locator("#model")).not_to_be_empty()
        take(page, path)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
