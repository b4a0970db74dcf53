"""The live page in a real browser, on a real cluster: someone asks, looks where the time went, goes by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.support.axe import NoAxe, axe_script, violations
from tests.support.browser import Page, browsing
from tests.support.chromium import NoChromium, find_chromium
from tests.support.cluster import Cluster

pytestmark = pytest.mark.e2e

TTFT_STAGES = ["admission", "placement", "reserve", "prefill_queue", "prefill_compute", "return", "unattributed"]
SECOND_STAGES = ["transfer", "decode_admission", "first_step", "unattributed"]
FOCUS = "document.activeElement"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    try:
        chromium = find_chromium()
    except NoChromium as error:
        pytest.skip(str(error))
    with browsing(chromium) as page:
        page.size(1440, 900)
        page.prefers(color_scheme="light", reduced_motion="reduce")
        yield page


@pytest.fixture
def page(browser: Page, cluster: Cluster) -> Iterator[Page]:
    """The live page, freshly loaded; whatever a test does there, nothing is complained about or asked of others."""
    browser.goto(cluster.url)
    browser.evaluate("localStorage.clear(), sessionStorage.clear(), delete document.documentElement.dataset.theme")
    browser.wait("document.querySelectorAll('.card[data-state=ready]').length >= 2")
    yield browser
    browser.size(1440, 900)
    assert browser.complaints == []
    assert {urlsplit(url).netloc for url in browser.requests} == {cluster.http}


def ask(page: Page, question: str, max_tokens: int = 24) -> None:
    """Asks in the playground, by keyboard, and waits for the answer's waterfalls."""
    answers = page.evaluate("document.querySelectorAll('.answer').length")
    page.evaluate(f"document.getElementById('chat-tokens').value = {max_tokens}")
    page.evaluate("document.getElementById('chat-temperature').value = 0")
    page.evaluate("document.getElementById('chat-text').focus()")
    page.type(question)
    page.press("Enter")
    page.wait(f"document.querySelectorAll('.answer .timing').length > {answers}", 60)


def stages(page: Page, figure: str) -> list[str]:
    found: list[str] = page.evaluate(f"[...document.querySelectorAll('{figure} li')].map(li => li.dataset.stage)")
    return found


def background(page: Page) -> str:
    colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return colour


def tab_to(page: Page, selector: str, most: int = 40) -> None:
    """Presses Tab until something has the focus; fails if it is never reached or nothing shows where the focus is."""
    for _ in range(most):
        page.press("Tab")
        if page.evaluate(f"{FOCUS} === document.body"):
            continue  # past the last element the browser itself has the focus, then it begins again
        assert page.evaluate(f"getComputedStyle({FOCUS}).outlineStyle") != "none", page.evaluate(f"{FOCUS}.outerHTML")
        if page.evaluate(f"{FOCUS}.matches('{selector}')"):
            return
    raise AssertionError(f"{selector} is not reached by {most} tabs")


def test_an_answer_shows_its_workers_and_its_waterfalls(page: Page) -> None:
    ask(page, "What is the capital of France?")
    assert "Paris" in page.text(".answer .text")
    first, rest = page.evaluate("[...document.querySelectorAll('.answer .piece')].map(piece => piece.className)")
    assert "hue-prefill-0" in first
    assert "hue-decode-0" in rest
    legend = page.evaluate("document.querySelector('.answer .legend').textContent")
    assert legend.startswith("1 token from prefill-")
    assert "tokens from decode-" in legend
    assert stages(page, ".answer figure:nth-of-type(1)") == TTFT_STAGES
    assert stages(page, ".answer figure:nth-of-type(2)") == SECOND_STAGES
    assert page.text(".answer .reason")
    assert page.evaluate("document.querySelector('.answer').getAttribute('aria-busy')") == "false"


def test_a_request_opens_its_waterfalls(page: Page) -> None:
    ask(page, "What is the capital of Italy?", 8)
    page.wait("document.querySelector('#requests tbody tr')")
    request_id = page.evaluate("document.querySelector('#requests tbody tr').dataset.request")
    tab_to(page, "#requests .opener")
    page.press("Enter")
    assert page.evaluate(f"{FOCUS}.getAttribute('aria-expanded')") == "true"
    assert stages(page, ".opened figure:nth-of-type(1)") == TTFT_STAGES
    assert stages(page, ".opened figure:nth-of-type(2)") == SECOND_STAGES
    assert request_id in page.text(".opened")
    assert "prefill-0" in page.text(".opened .reason")
    page.press("Escape")
    assert page.evaluate("document.querySelector('.opened')") is None
    assert page.evaluate(f"{FOCUS}.matches('.opener[aria-expanded=false]')")


def test_themes(page: Page) -> None:
    light = background(page)
    page.prefers(color_scheme="dark")
    dark = background(page)
    assert dark != light
    button = "document.getElementById('theme-button')"
    page.evaluate(f"{button}.focus()")
    for key, name, colour in ((" ", "light", light), ("Enter", "dark", dark)):
        page.press(key)
        assert page.evaluate(f"{button}.textContent") == f"Theme: {name}"
        assert background(page) == colour
    page.prefers(color_scheme="light", reduced_motion="reduce")
    page.goto(page.evaluate("location.href"))
    assert background(page) == dark, "the choice is kept"
    page.evaluate(f"{button}.click()")
    assert background(page) == light, "as the system says"


def test_by_keyboard_alone(page: Page) -> None:
    page.press("Tab")
    assert page.evaluate(f"{FOCUS}.textContent") == "Skip to the cluster"
    tab_to(page, "#chat-log")
    tab_to(page, "#chat-settings > summary")
    page.press("Enter")
    tab_to(page, "#chat-temperature")
    page.evaluate(f"{FOCUS}.select()")
    page.type("3")
    tab_to(page, "#chat-text")
    page.type("Tell me a long story")
    page.press("Enter", shift=True)
    page.type("about a dog.")
    assert page.evaluate(f"{FOCUS}.value.split('\\n').length") == 2
    page.press("Enter")
    assert page.text("#chat-problem") == "temperature: a number from 0 to 2"
    assert page.evaluate(f"{FOCUS}.id") == "chat-temperature"
    page.evaluate(f"{FOCUS}.value = '0'")
    page.press("Escape")
    assert not page.evaluate("document.getElementById('chat-settings').open")
    page.evaluate("document.getElementById('chat-tokens').value = 400")
    tab_to(page, "#chat-text")
    page.press("Enter")
    page.wait("document.querySelector('.answer .text').textContent.length > 20")
    assert page.text("#chat-send") == "Stop"
    page.press("Escape")
    page.wait("document.getElementById('chat-send').textContent === 'Send'")
    page.wait("document.querySelector('.answer .timing')")
    assert page.text("#chat-status").startswith("stopped, ")
    page.wait("document.querySelector('#requests .badge').textContent === 'cancelled'")


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_runs_out_of_the_window_or_jumps(page: Page, width: int) -> None:
    page.size(width, 844)
    page.goto(page.evaluate("location.href"))
    shifts = "new Promise(done => { let sum = 0; new PerformanceObserver(list => { for (const e of list.getEntries())"
    shifts += " sum += e.value }).observe({type: 'layout-shift', buffered: true}); setTimeout(() => done(sum), 500) })"
    page.wait("document.querySelectorAll('.card[data-state=ready]').length >= 2")
    page.wait("document.querySelector('#requests-body table, #requests-body pre')")
    assert page.evaluate(shifts) < 0.1
    ask(page, "Say something about the sea.", 12)
    page.evaluate("document.querySelector('#requests .opener')?.click()")
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_accessible_in_both_themes(page: Page) -> None:
    try:
        script = axe_script()
    except NoAxe as error:
        pytest.skip(str(error))
    ask(page, "What is the capital of Spain?", 8)
    page.wait("document.querySelector('#requests .opener')")
    page.evaluate("document.querySelector('#requests .opener').click()")
    for width, scheme in ((1440, "light"), (390, "dark")):
        page.size(width, 900)
        page.prefers(color_scheme=scheme, reduced_motion="reduce")
        assert violations(page, script) == [], (width, scheme)
    page.prefers(color_scheme="light", reduced_motion="reduce")
