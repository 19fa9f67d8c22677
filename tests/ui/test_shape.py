"""The playground on phones and in the dark, by keyboard, with keys, and before the model is there."""

import re
import threading
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, ViewportSize, expect

from edge_phi3.api.service import LoadCancelledError, Say
from edge_phi3.pipeline import TextGenerationPipeline
from tests.api.conftest import ready
from tests.support.services import PATIENCE, Server, serving
from tests.ui.conftest import OPTIONS, Playground, watched

KEY = "correct-horse"


def overflow(playground: Playground, element: str = ":root") -> int:
    """Return by how many pixels an element, by default the page, is wider than what is seen of it."""
    return playground.page.locator(element).evaluate("node => node.scrollWidth - node.clientWidth")


def lightness(playground: Playground) -> float:
    """Return how light the page's background is, from 0 to 255."""
    colour = playground.page.locator("body").evaluate("node => getComputedStyle(node).backgroundColor")
    red, green, blue = map(float, re.findall(r"[\d.]+", colour)[:3])
    return (red + green + blue) / 3


def test_a_phone_has_one_column_that_never_scrolls_sideways(browser: Browser, server: Server) -> None:
    size: ViewportSize = {"width": 360, "height": 640}
    with browser.new_context(viewport=size, has_touch=True, is_mobile=True) as context:
        for phone in watched(context, server.url):
            assert overflow(phone) == 0
            panel = phone.page.locator("#panel")
            expect(panel).to_be_hidden()
            phone.ask("A_word_that_is_far_too_long_for_a_phone_" * 6)
            assert overflow(phone) == 0
            phone.click("Settings")
            expect(panel).to_be_visible()
            expect(phone.page.locator("#chat")).to_have_js_property("inert", True)
            phone.page.evaluate("document.querySelectorAll('details').forEach((group) => { group.open = true; })")
            expect(panel.locator("#parameter-sequence_bias")).to_be_visible()
            assert overflow(phone) == overflow(phone, "#panel") == 0
            phone.put(temperature="0.5")
            panel.get_by_role("tab", name="Request").click()
            expect(panel.locator("#curl")).to_contain_text('"temperature": 0.5')
            assert overflow(phone) == 0
            phone.click("Close")
            expect(panel).to_be_hidden()
            expect(phone.message).to_be_visible()
            phone.click("Settings")
            phone.page.keyboard.press("Escape")
            expect(panel).to_be_hidden()
            expect(phone.page.locator("#chat")).to_have_js_property("inert", False)
            expect(phone.page.get_by_role("button", name="Settings")).to_be_focused()


def test_no_width_scrolls_sideways_and_every_control_has_a_name(playground: Playground) -> None:
    for width in (320, 700, 992, 1600):
        playground.page.set_viewport_size({"width": width, "height": 700})
        assert overflow(playground) == 0, width
    unnamed = playground.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")].filter(
            (node) => !node.labels?.length && !node.ariaLabel && !node.textContent.trim()
        ).map((node) => node.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_system_s_scheme_is_followed_until_another_is_chosen(
    browser: Browser, server: Server, scheme: Literal["light", "dark"]
) -> None:
    is_dark = scheme == "dark"
    with browser.new_context(color_scheme=scheme) as context:
        for playground in watched(context, server.url):
            assert (lightness(playground) < 60) is is_dark
            playground.click("Light or dark")
            assert (lightness(playground) < 60) is not is_dark
            playground.open()
            assert (lightness(playground) < 60) is not is_dark
            playground.click("Light or dark")
            assert (lightness(playground) < 60) is is_dark


def test_the_keyboard_alone_is_enough(playground: Playground) -> None:
    page = playground.page
    expect(playground.message).to_be_focused()
    page.keyboard.type("What does")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("len do?")
    expect(playground.message).to_have_value("What does\nlen do?")
    expect(page.locator(".exchange")).to_have_count(0)
    page.keyboard.press("Enter")
    playground.ended()
    expect(page.locator(".question")).to_have_text("What does\nlen do?")
    page.locator("#tab-settings").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-request")).to_be_focused()
    expect(page.locator("#request")).to_be_visible()
    expect(page.locator("#settings")).to_be_hidden()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_label("System prompt")).to_be_focused()
    outline = page.get_by_label("System prompt").evaluate("node => getComputedStyle(node).outlineStyle")
    assert outline == "solid"


def test_a_service_with_keys_is_given_one_that_no_store_keeps(browser: Browser, tmp_path: Path, store: Path) -> None:
    with serving(tmp_path, *OPTIONS, "--api-key", KEY, store=store) as server, browser.new_context() as context:
        for playground in watched(context, server.url):
            playground.refusals_expected = True
            playground.ask("What does len do?", ended="failed")
            expect(playground.page.get_by_role("alert")).to_contain_text("needs an API key")
            field = playground.page.get_by_label("API key")
            expect(field).to_be_focused()
            field.fill(KEY)
            playground.click("Try again")
            playground.ended()
            assert KEY not in playground.curl
            assert '"Authorization: Bearer $EDGE_PHI3_KEY"' in playground.curl
            playground.open()
            expect(field).to_have_value(KEY)
            kept = playground.page.evaluate("JSON.stringify({...localStorage})")
            assert "What does len do?" in kept
            assert KEY not in kept


def test_how_far_the_loading_is_can_be_seen(browser: Browser) -> None:
    go = threading.Event()

    def load(say: Say) -> TextGenerationPipeline:
        say("Downloading the model: 34 %.")
        go.wait(PATIENCE)
        raise LoadCancelledError("over")

    with ready(load, wait=False) as api, browser.new_context() as context:
        context.set_default_timeout(1000 * PATIENCE)
        url = f"http://127.0.0.1:{api.port}"
        page = context.new_page()
        page.goto(url)
        assert page.url == f"{url}/ui"
        expect(page.locator("#model")).to_have_text("Downloading the model: 34 %.")
        expect(page.locator("#parameter-temperature")).to_be_visible()
        page.get_by_label("Message", exact=True).fill("Is anyone there?")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("Downloading the model: 34 %.")
        go.set()
