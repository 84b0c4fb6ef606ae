"""A tiny model, and a server of its demo."""

import shutil

import pytest
from demo_client import served
from PIL import Image
from tiny import tiny_pipeline

from pipeline.config import Config, DataConfig
from pipeline.serving.model_store import ModelStore

COLOURS = {"red heart": "red", "green heart": "green", "blue circle": "blue"}
CARD = "---\nlicense: other\n---\n# Tiny\n<script>1</script> ![x](y.png) card text"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A tiny model with its card and its training settings, on three plain squares."""
    folder = tmp_path_factory.mktemp("demo")
    images = folder / "squares" / "train"
    images.mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(images / f"{name}.png")
    tiny_pipeline(caption_length=8, caption_dropout=0.1, w=1.0).save_pretrained(folder / "tiny")
    source = str(folder / "squares")
    data = DataConfig(source=source, held_out=None, resolution=8, cache=str(folder / "cache"))
    (folder / "tiny" / "config.yaml").write_text(Config(name="tiny", data=data).to_yaml())
    (folder / "tiny" / "README.md").write_text(CARD)
    return ModelStore(folder / "tiny")


@pytest.fixture(scope="module")
def server(store):
    """(address, Gradio's app, the folder of its files) of that model's demo."""
    with served(store) as running:
        yield running


@pytest.fixture(scope="module")
def url(server):
    return server[0]


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    flags = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
    flags += ["disable-background-networking", "disable-component-update"]
    with sync_playwright() as tools:
        args = [f"--{flag}" for flag in flags]
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The demo in a desktop browser."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.goto(url)
    page.locator("#prompt textarea").wait_for()
    yield page
    page.close()
