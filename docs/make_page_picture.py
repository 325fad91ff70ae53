#!/usr/bin/env python3
"""Take the pictures of the chat page: docs/page.png, or any other with --output. Needs Chromium and a running server.

python partinfer.py --function serve --port 8080 &
python docs/make_page_picture.py --url http://127.0.0.1:8080
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZES = {"desktop": (1360, 860), "phone": (390, 800)}


def chromium() -> str | None:
    """Where a Chromium is installed; None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def ask(page: Page, text: str, *, compare: bool = False) -> None:
    """Ask something, and wait for the whole answer."""
    page.locator("#send:not(.stop)").wait_for()
    if compare != page.locator("#compare").is_checked():
        page.locator("#compare").click()
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    page.locator("#send.stop").wait_for()
    page.locator("#send:not(.stop)").wait_for(timeout=180_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--output", default=str(Path(__file__).with_name("page.png")))
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--size", choices=SIZES, default="desktop")
    parser.add_argument("--panel", action="store_true", help="open the panel, where it is closed at first")
    parser.add_argument("--prompt", action="append", help="what is asked, in turn; the last one is compared")
    parser.add_argument("--tokens", default="96", help="length of an answer at most (96)")
    given = parser.parse_args()
    prompts = given.prompt if given.prompt is not None else ["Write a haiku about rain.", "Why is the sky blue?"]
    width, height = SIZES[given.size]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=given.theme, device_scale_factor=1.5
        )
        page.goto(given.url)
        page.locator("#max_tokens").evaluate("(field, value) => { field.value = value }", given.tokens)
        for number, prompt in enumerate(prompts):
            if prompt:
                ask(page, prompt, compare=number == len(prompts) - 1)
        if given.panel:
            page.locator("#panel-button").click()
            page.wait_for_timeout(400)
        page.screenshot(path=given.output)
        browser.close()


if __name__ == "__main__":
    main()
