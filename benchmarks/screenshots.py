"""`python benchmarks/screenshots.py`: the screenshots of the demo in docs/figures."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))
import app
from benchmarks.bench import ROOT
from pipeline.serving.model_store import ModelStore
from pipeline.serving.server import serve
from pipeline.serving.temp_files import temporary_cache

FIGURES = ROOT / "docs" / "figures"
WIDTH = 1180
TIMEOUT = 180_000  # milliseconds


def create(page: Page) -> None:
    """Generate four blue dogs."""
    page.locator("#prompt textarea").fill("blue dog")
    page.get_by_label("number input for Images").first.fill("4")
    page.locator("#generate").click()
    page.locator("#status", has_text="seed").wait_for(timeout=TIMEOUT)
    page.locator("#generate").wait_for(timeout=TIMEOUT)
    page.locator("#gallery img").nth(3).wait_for()


def walk(page: Page) -> None:
    """Walk a red heart forwards and backwards."""
    page.get_by_role("tab", name="Walk the equations").click()
    page.locator("#noise").click()
    page.locator("#forward-gallery img").nth(4).wait_for(timeout=TIMEOUT)
    page.locator("#walk").click()
    page.get_by_text("t = 0", exact=True).nth(1).wait_for(timeout=TIMEOUT)


def main() -> None:
    """Serve pretrained/emoji and save each screenshot."""
    with temporary_cache(), sync_playwright() as playwright:
        demo = app.build_demo(ModelStore(ROOT / "pretrained" / "emoji"))
        _app, address, _share = serve(demo, prevent_thread_lock=True, quiet=True)
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, show, full_page in (("page-create", create, False), ("page-walk", walk, True)):
            page = browser.new_page(viewport={"width": WIDTH, "height": 860}, color_scheme="light")
            page.goto(address)
            show(page)
            page.wait_for_timeout(2_000)  # images fade in
            page.screenshot(path=FIGURES / f"{name}.png", full_page=full_page)
            page.close()
        browser.close()
        demo.close()


if __name__ == "__main__":
    main()
