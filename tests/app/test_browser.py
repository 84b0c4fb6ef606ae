"""The demo in a real browser."""

import time

import pytest
from demo_client import create, web
from serving_data import png_with

from pipeline.serving.requests import Request

TABS = ("Create", "What w does", "Walk the equations", "About")


@pytest.fixture
def slow_network(store):
    """A network whose calls take 20 ms, so that a click comes before the last step."""
    network = store.session().pipe.unet
    hook = network.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    yield
    hook.remove()


def number(page, label):
    """Return the number field of a slider."""
    return page.get_by_label(f"number input for {label}", exact=True).first


def test_enter_generates_an_image(page):
    page.keyboard.type("red heart")  # the prompt has the focus
    page.keyboard.press("Enter")
    page.locator("#gallery img").first.wait_for()
    page.locator("#status", has_text="network calls").wait_for()
    page.locator("#generate").wait_for(state="visible")
    assert "2 of 6 tokens" in page.locator("#tokens").inner_text()


def test_keyboard_alone_operates_the_demo(page):
    """Tab reaches every field, arrows move sliders, Space presses buttons, Enter opens tabs."""

    def tab_to(selector, key="Tab"):
        for _ in range(60):
            page.keyboard.press(key)
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        pytest.fail(f"{key} does not reach {selector}")

    page.keyboard.type("red heart")
    tab_to("#generate")
    tab_to("input[type=range]")
    before = page.evaluate("document.activeElement.value")
    page.keyboard.press("ArrowRight")
    assert float(page.evaluate("document.activeElement.value")) == float(before) + 0.25
    tab_to("#generate", "Shift+Tab")
    page.keyboard.press("Space")
    page.locator("#gallery img").first.wait_for()
    page.locator("#generate").wait_for(state="visible")
    page.locator("#prompt textarea").focus()
    tab_to("[role=tab]", "Shift+Tab")
    while "What w does" not in page.evaluate("document.activeElement.innerText"):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.locator("#sweep").wait_for()


def test_stop_ends_a_request_and_the_next_one_works(page, slow_network):
    page.locator("#prompt textarea").fill("red heart")
    number(page, "Steps").fill("250")
    number(page, "Images").fill("4")
    page.locator("#generate").click()
    page.locator("#stop-generate").click()
    page.locator("#generate").wait_for(state="visible")
    number(page, "Steps").fill("2")
    page.locator("#generate").click()
    # The final status has no "step 1 of 2".
    page.wait_for_function("/^\\d+\\.\\d s/.test(document.querySelector('#status').innerText)")


def test_search_shows_its_curve_and_can_be_stopped(page, slow_network):
    page.locator("#prompt textarea").fill("red heart")
    assert not page.locator("#discarded").is_visible()

    def generate(budget, steps):
        number(page, "Search budget").fill(budget)
        number(page, "Steps").fill(steps)
        number(page, "Steps").press("Tab")
        page.locator("#generate").click()

    generate("16", "64")
    page.locator("#stop-generate").click()
    page.locator("#generate").wait_for(state="visible")
    generate("6", "20")
    page.locator("#status", has_text="best of 4").wait_for()
    page.locator("#curve img").wait_for()
    page.locator("#discarded img").nth(2).wait_for()


def test_restore_settings_fills_the_form(page, url, tmp_path):
    settings = {"prompt": "green heart", "seed": 123, "steps": 9, "w": 3.5, "eta": 0.5}
    settings |= {"low": 0.2, "high": 0.8, "denoiser": "exact"}
    _, _, (gallery, *_) = create(url, **settings)
    path = tmp_path / "image.png"
    path.write_bytes(web.get(gallery[0]["image"]["url"]).content)
    page.get_by_text("More").click()
    page.locator("#restore input[type=file]").set_input_files(path)
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'green heart'")
    assert page.locator("#seed input").input_value() == "123"
    fields = {"Steps": "9", "Guidance (w)": "3.5", "η": "0.5"}
    fields |= {"Guidance from noise level": "0.2", "Guidance to noise level": "0.8"}
    for label, value in fields.items():
        assert number(page, label).input_value() == value, label
    assert page.get_by_role("radio", name="exact").first.is_checked()
    page.locator("#generate").click()
    page.locator("#status", has_text="seed 123").wait_for()


def test_restore_settings_names_another_model_as_text(page, tmp_path):
    path = tmp_path / "theirs.png"
    parameters = vars(Request("blue circle")) | {"denoiser": "network", "model": "![<b>](x)"}
    path.write_bytes(png_with(parameters))
    page.get_by_text("More").click()
    page.locator("#restore input[type=file]").set_input_files(path)
    page.locator("#status", has_text="![‹b›](x)").wait_for()
    page.locator("#status", has_text="tiny (").wait_for()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'blue circle'")


def test_sweep_shows_six_images(page):
    page.get_by_role("tab", name="What w does").click()
    page.locator("#sweep").click()
    page.locator("#sweep-gallery img").nth(5).wait_for()
    grid = "#sweep-gallery .grid-container img, #sweep-gallery .thumbnail-item img"
    assert page.locator(grid).count() >= 6


def test_walk_shows_its_panels_and_strips(page):
    page.get_by_role("tab", name="Walk the equations").click()
    page.locator("#noise").click()
    page.locator("#forward-gallery img").nth(4).wait_for()
    page.locator("#walk").click()
    page.locator("#strip img").nth(7).wait_for()


def test_schedule_plot_follows_the_arrow_keys(page):
    page.get_by_role("tab", name="Walk the equations").click()
    before = page.locator("#schedule img").get_attribute("src")
    page.get_by_label("range slider for t", exact=True).focus()
    page.keyboard.press("ArrowRight")
    changed = "before => document.querySelector('#schedule img').src != before"
    page.wait_for_function(changed, arg=before)


def test_gallery_images_have_an_alternative_text(page):
    page.locator("#prompt textarea").fill("<i>red</i>")
    page.get_by_label("Randomise").uncheck()
    page.locator("#generate").click()
    page.locator("#gallery img[alt='<i>red</i>, seed 0']").first.wait_for()
    assert not page.locator("#gallery i").count()


def test_markup_in_a_prompt_stays_text(page):
    page.get_by_text("More").click()
    # The exact denoiser quotes prompts that it does not know.
    page.get_by_role("radio", name="exact").first.check()
    page.locator("#prompt textarea").fill('<img src=x onerror="document.title=1">')
    page.locator("#prompt textarea").press("Enter")
    page.get_by_text("‹img src=x").first.wait_for()
    page.wait_for_timeout(500)
    assert page.title().startswith("Direct Jump")
    assert not page.locator("img[src='x']").count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_layout_needs_no_sideways_scrolling(browser, url, scheme):
    phone = {"viewport": {"width": 375, "height": 800}, "has_touch": True}
    page = browser.new_page(color_scheme=scheme, **phone)
    page.goto(url)
    page.locator("#prompt textarea").wait_for()
    for tab in TABS:
        button = page.get_by_role("tab", name=tab)
        if not button.is_visible():
            page.locator(".overflow-menu button").first.click()
            button = page.get_by_role("button", name=tab)
        button.click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, tab
    page.close()
