"""`python benchmarks/screenshots.py`: the page with pretrained/emoji as the README shows it, by a headless Chromium."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))
import app
from benchmarks.bench import ROOT
from pipeline.serving.model_store import ModelStore

FIGURES, WIDTH, MINUTE = ROOT / "docs" / "figures", 1180, 60_000


def create(page) -> None:
    """Four blue dogs."""
    page.locator("#prompt textarea").fill("blue dog")
    page.get_by_label("number input for Pictures").first.fill("4")
    page.locator("#generate").click()
    page.locator("#status", has_text="seed").wait_for(timeout=3 * MINUTE)
    page.locator("#generate").wait_for(timeout=3 * MINUTE)
    page.locator("#gallery img").nth(3).wait_for()


def walk(page) -> None:
    """A red heart forwards and backwards."""
    page.get_by_role("tab", name="Walk the equations").click()
    page.locator("#noise").click()
    page.locator("#forward-gallery img").nth(4).wait_for(timeout=3 * MINUTE)
    page.get_by_role("button", name="Walk back").click()
    page.get_by_text("t = 0", exact=True).nth(1).wait_for(timeout=3 * MINUTE)


def main() -> None:
    """Serve the model, and take each picture from a page of its own."""
    with app.own_files(), sync_playwright() as playwright:
        demo = app.build_demo(ModelStore(ROOT / "pretrained" / "emoji"))
        _app, address, _share = app.serve(demo, prevent_thread_lock=True, quiet=True)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, show, whole in (("page-create", create, False), ("page-walk", walk, True)):
            page = browser.new_page(viewport={"width": WIDTH, "height": 860}, color_scheme="light")
            page.goto(address)
            show(page)
            page.wait_for_timeout(2_000)  # pictures fade in
            page.screenshot(path=FIGURES / f"{name}.png", full_page=whole)
            page.close()
        browser.close()
        demo.close()


if __name__ == "__main__":
    main()
