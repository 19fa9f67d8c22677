"""The installed command serving the demo model, and a real Chromium that looks at it."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, expect, sync_playwright

from tests import paced
from tests.support.services import PATIENCE, Server, serving

expect.set_options(timeout=1000 * PATIENCE)  # machines may be busy; what is there is seen at once

OPTIONS = ("--threads", "1")
"""The browser takes the other core."""

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def server(store: Path) -> Iterator[Server]:
    """Return the demo model, served with room for long answers; slowly while the store holds a file "slow"."""
    options = (*OPTIONS, "--ctx-size", "65536")
    with serving(store, *options, store=store, command=paced.command(store / "slow")) as running:
        yield running


@pytest.fixture
def slow_answers(store: Path) -> Iterator[None]:
    """Let no answer of thousands of tokens end while the test goes on."""
    (store / "slow").touch()
    yield
    (store / "slow").unlink()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return Chromium. It goes with the module: Playwright's event loop would be in the way of other tests."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        reason = "the playground is tested in Chromium, which is not installed (apt-get install chromium)"
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@dataclass
class Playground:
    """The page of a service, with all that it asked for, and its console's errors and warnings and its exceptions."""

    page: Page
    url: str
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    refusals_expected: bool = False
    """Whether a status of 400 or more, which the console counts as an error, is part of the test."""

    @property
    def message(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.locator(".text")

    @property
    def curl(self) -> str:
        return self.page.locator("#curl").text_content() or ""

    def open(self) -> None:
        """Load the page, and wait until it knows its model."""
        self.page.goto(f"{self.url}/ui")
        expect(self.page.locator("#model")).to_have_attribute("data-state", "ready")

    def click(self, button: str) -> None:
        self.page.get_by_role("button", name=button).click()

    def put(self, **values: str) -> None:
        """Set parameters, each in its group."""
        for name, value in values.items():
            control = self.page.locator(f"#parameter-{name}")
            group = self.page.locator("details.group", has=control)
            if group.get_attribute("open") is None:
                group.locator("summary").click()
            if control.evaluate("node => node.tagName") == "SELECT":
                control.select_option(value)
            else:
                control.fill(value)

    def ask(self, text: str, *, ended: str = "done", count: int = 1) -> None:
        """Type a message and send it, and wait until so many exchanges have ended so; "" does not wait."""
        self.message.fill(text)
        self.message.press("Enter")
        if ended:
            self.ended(ended, count)

    def ended(self, status: str = "done", count: int = 1) -> None:
        """Wait until so many exchanges have ended so."""
        expect(self.page.locator(f'.exchange[data-status="{status}"]')).to_have_count(count)

    def chat_bodies(self) -> list[str]:
        """Return the bodies that were sent to /chat, as they were."""
        return [request.post_data or "" for request in self.requests if request.url == f"{self.url}/chat"]


def watched(context: BrowserContext, url: str) -> Iterator[Playground]:
    """Open the playground in a context; at the end hold it to what a page must never do."""
    context.set_default_timeout(1000 * PATIENCE)
    playground = Playground(context.new_page(), url)
    page = playground.page
    context.on("request", lambda request: playground.requests.append(request))  # noqa: PLW0108 - Playwright marks it
    page.on("pageerror", lambda error: playground.complaints.append(str(error)))
    page.on("console", lambda line: playground.complaints.extend([line.text] * (line.type in {"error", "warning"})))
    playground.open()
    yield playground
    refusal = "Failed to load resource: the server responded" if playground.refusals_expected else "\0"
    assert [line for line in playground.complaints if not line.startswith(refusal)] == []
    assert [request.url for request in playground.requests if not request.url.startswith(f"{url}/")] == []


@pytest.fixture
def playground(browser: Browser, server: Server) -> Iterator[Playground]:
    """Return the playground of the demo model to a new visitor with a wide window."""
    with browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light") as context:
        yield from watched(context, server.url)
