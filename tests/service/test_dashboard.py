"""The live page of a router with scripted workers: its files, its key, what it says when things go wrong."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
import pytest_asyncio

from tests.support.browser import Page, ScriptFailed, open_page
from tests.support.chromium import NoChromium, find_chromium
from tests.support.router import ANSWER, Pool, Router, chat, events, http, model, pool, router, tokenizer

__all__ = ["http", "model", "pool", "router", "tokenizer"]
pytestmark = pytest.mark.service

KEY = "k-for-the-page"
NONE = "\u2013"
REFERENCE = re.compile(r"""(?:href|src)="([^"#]+)"|from "([^"]+)"|import\("([^"]+)"\)|url\(([^)]+)\)""")


@pytest.fixture(scope="module")
def devtools() -> Iterator[str]:
    try:
        chromium = find_chromium()
    except NoChromium as error:
        pytest.skip(str(error))
    with chromium.running() as url:
        yield url


@pytest.fixture
def page(devtools: str) -> Iterator[Page]:
    with open_page(devtools) as page:
        page.size(1440, 900)
        yield page


@pytest.fixture(scope="module")
def bare(devtools: str, router: Router) -> Iterator[Page]:
    """A page that may load the page's modules, and runs none by itself."""
    with open_page(devtools) as page:
        page.goto(f"{router.url}/dashboard/icon.svg")
        yield page


@pytest_asyncio.fixture
async def pair(pool: Pool) -> AsyncIterator[Pool]:
    await pool.pair()
    yield pool


# ---- files -----------------------------------------------------------------------------------------------------------


async def test_every_file_is_served_and_none_is_anothers(http: httpx.AsyncClient) -> None:
    found, left = {}, ["/"]
    while left:
        path = left.pop()
        answer = await http.get(path)
        assert answer.status_code == 200, path
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.]+\.\w+", answer.text), path
        found[path] = answer
        targets = [urljoin(path, next(filter(None, groups))) for groups in REFERENCE.findall(answer.text)]
        left += [target for target in targets if target not in found and target not in left]
    assert len(found) > 20
    assert found["/"].headers["content-type"] == "text/html; charset=utf-8"
    assert found["/dashboard/main.js"].headers["content-type"] == "text/javascript; charset=utf-8"
    assert "style=" not in found["/"].text, "the policy allows no inline style"


async def test_a_browser_that_has_a_file_is_told_so(http: httpx.AsyncClient) -> None:
    first = await http.get("/dashboard/main.js")
    again = await http.get("/dashboard/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/dashboard/", "/dashboard/none.js", "/dashboard/__init__.py", "/dashboard/..%2fmain.js"]
)
async def test_there_is_nothing_else(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"


# ---- a stream tells where it runs ------------------------------------------------------------------------------------


async def test_the_first_event_names_the_workers(pair: Pool, http: httpx.AsyncClient) -> None:
    headers = {"X-Twostroke-Explain": "1"}
    async with http.stream("POST", "/v1/chat/completions", json=chat(stream=True), headers=headers) as response:
        first = json.loads((await events(response))[0])
    assert (first["twostroke"]["prefill_worker"], first["twostroke"]["decode_worker"]) == ("p0", "d0")


# ---- in the browser --------------------------------------------------------------------------------------------------


def ready(page: Page, url: str) -> None:
    page.goto(url)
    page.wait("document.querySelectorAll('.card[data-state=ready]').length === 2")


def ask(page: Page, question: str = "What is it?") -> None:
    page.evaluate("document.getElementById('chat-text').focus()")
    page.type(question)
    page.press("Enter")


def legend(page: Page) -> str:
    """Whose the tokens of the last answer are."""
    text: str = page.evaluate("document.querySelector('.answer:last-child .legend').textContent")
    return text


async def in_browser(steps: Callable[..., Any], *arguments: Any) -> Any:
    """Runs steps in a thread: the scripted workers need this one."""
    return await asyncio.to_thread(steps, *arguments)


async def test_a_request_on_decode_alone_and_one_on_prefill_alone(pool: Pool, router: Router, page: Page) -> None:
    await pool.add("decode", "d0")
    await pool.settle()

    def colocated() -> None:
        page.goto(router.url)
        page.wait("document.querySelectorAll('.card[data-state=ready]').length === 1")
        assert "No prefill worker" in page.text("#prefill-workers")
        ask(page, "<b>What</b> is it?")
        page.wait("document.querySelector('.answer .timing')")
        assert page.evaluate("document.querySelector('.question b')") is None, "what is said is text, never markup"
        assert legend(page).endswith(" tokens from d0")
        assert page.evaluate("[...document.querySelectorAll('.answer .hue-decode-0')].length") == 3

    def one_token() -> None:
        page.evaluate("document.getElementById('chat-tokens').value = 1")
        ask(page)
        page.wait("document.querySelectorAll('.answer .timing').length === 2")
        assert legend(page) == "1 token from p0"
        assert page.text(".answer:last-child figure:nth-of-type(2) .absent") == "There was no second token."

    await in_browser(colocated)
    await pool.add("prefill", "p0")
    await pool.settle()
    await in_browser(one_token)


async def test_a_lost_worker_is_shown_and_the_cluster_is_degraded(pair: Pool, router: Router, page: Page) -> None:
    await in_browser(ready, page, router.url)
    await in_browser(page.wait, "document.getElementById('state').dataset.state === 'idle'")
    await pair.workers.pop().leave()

    def degraded() -> None:
        page.wait("document.getElementById('state').dataset.state === 'degraded'")
        page.wait("document.querySelector('[data-worker=d0]').dataset.state === 'lost'")
        assert page.text("#state-why") == "no decode worker is ready, so nothing can be served; lost d0"
        ask(page)
        page.wait("document.getElementById('chat-problem').textContent")
        assert "Try again in 1 s." in page.text("#chat-problem")
        assert page.evaluate("document.getElementById('chat-text').value") == "What is it?"
        assert page.evaluate("document.querySelectorAll('.turn').length") == 0

    await in_browser(degraded)


async def test_a_key_is_kept_in_the_tab_and_a_router_that_went_is_missed(
    pair: Pool, router: Router, page: Page, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"somebody:{KEY}\n")
    other = Router(tmp_path / "other", router.etcd, router.redis, router.model, "--api-keys-file", str(keys))

    def give_key() -> None:
        page.goto(other.url)
        page.wait("document.getElementById('key-dialog').open")
        assert page.evaluate("document.activeElement.id") == "key-input"
        page.type("wrong")
        page.press("Enter")
        page.wait("document.getElementById('key-problem').textContent.includes('does not know')")
        page.type(KEY)
        page.press("Enter")
        page.wait("!document.getElementById('key-dialog').open")
        page.wait("document.querySelectorAll('.card[data-state=ready]').length === 2")
        ask(page)
        page.wait("document.querySelector('.answer .timing')")
        assert page.text(".answer .text") == ANSWER
        assert page.evaluate("sessionStorage.getItem('twostroke-api-key')") == KEY
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        page.wait("document.querySelectorAll('#requests tbody tr').length === 1")

    def miss_router() -> None:
        page.wait("document.getElementById('state').dataset.state === 'unreachable'")
        assert page.evaluate("document.querySelectorAll('.card').length") == 2, "the last that was said"

    await in_browser(give_key)
    assert await in_browser(other.stop) == 0
    assert KEY not in other.log()
    await in_browser(miss_router)


# ---- its own logic ---------------------------------------------------------------------------------------------------


def module(name: str, expression: str) -> str:
    return f"import('/dashboard/{name}.js').then(m => {expression})"


@pytest.mark.parametrize(
    ("name", "expression", "expected"),
    [
        (
            "format",
            "[0, 0.0000031, 0.00042, 0.0123, 0.9996, 4.5, 130].map(m.duration)",
            ["0 ms", "3.10 µs", "0.42 ms", "12.3 ms", "1.00 s", "4.50 s", "2 min"],
        ),
        (
            "format",
            "[0, 0.0004, 0.02, 0.1, 2.5, 10].map(m.mark)",
            ["0 ms", "0.4 ms", "20 ms", "100 ms", "2.5 s", "10 s"],
        ),
        ("format", "[0, 99999, 150000, 2500000, null].map(m.count)", ["0", "99999", "150 k", "2.5 M", NONE]),
        ("format", "[0, 0.004, 0.5, 1, null].map(m.percent)", ["0 %", "0.4 %", "50 %", "100 %", NONE]),
        ("format", "[0, 1023, 1536, 5 * 2 ** 30].map(m.bytes)", ["0 B", "1023 B", "1.50 KiB", "5.00 GiB"]),
        ("format", "[m.median([]), m.median([3, null, 1]), m.median([5, 1, 3])]", [None, 2, 3]),
        ("waterfall", "m.marks(8)", [0, 2, 4, 6, 8]),
        ("waterfall", "[m.marks(0), m.marks(7).length]", [[0], 4]),
        (
            "waterfall",
            "m.layout({total_s: 4, stages: [{stage: 'a', seconds: 1}, {stage: 'b', seconds: 3}]})"
            ".map(bar => [bar.begin, bar.share])",
            [[0, 0.25], [0.25, 0.75]],
        ),
        ("waterfall", "m.layout({total_s: 0, stages: [{stage: 'a', seconds: 0}]}).map(bar => bar.share)", [0]),
        ("answer", "m.splitFirst(' Paris is', [' Paris', ' is'])", [" Paris", " is"]),
        ("answer", "m.splitFirst('\\u{1F600}', ['\\uFFFD', '\\uFFFD'])", ["\U0001f600", ""]),
        ("answer", "m.splitFirst('word', ['word'])", ["word", ""]),
        ("health", "m.clusterState({snapshot: null, lost: [], dependencies: {}, isReached: true}).name", "loading"),
        (
            "health",
            "m.clusterState({snapshot: {workers: [{id: 'd', role: 'decode', state: 'ready'}], routers: [{live: 2}]},"
            " lost: [], dependencies: {etcd: true, redis: true}, isReached: true})",
            {"name": "serving", "why": "2 requests"},
        ),
        (
            "health",
            "m.clusterState({snapshot: {workers: [{id: 'd', role: 'decode', state: 'ready'}], routers: []}, lost: [],"
            " dependencies: {etcd: true, redis: false}, isReached: true}).why",
            "Redis does not answer: cached prefixes are not found",
        ),
    ],
)
def test_modules(bare: Page, name: str, expression: str, expected: Any) -> None:
    assert bare.evaluate(module(name, expression)) == expected


def test_a_worker_is_remembered_for_a_while(bare: Page) -> None:
    script = """(async () => {
      const { Roster, LOST_MS } = await import('/dashboard/roster.js');
      const roster = new Roster();
      const of = (id, role, running, tokens) => ({ id, role, load: { running }, prompt_tokens: tokens });
      const lost = () => roster.lost.map((worker) => worker.id).join();
      roster.update([of('p', 'prefill', 0, 100), of('d', 'decode', 2, 0)], 1000);
      roster.update([of('p', 'prefill', 0, 150), of('d', 'decode', 3, 0)], 1500);
      const samples = ['prefill', 'decode'].map((role) => [...roster.pool(role)[0].samples]);
      const seen = [lost()];
      for (const ms of [2000, 2000 + LOST_MS]) {
        roster.update([of('p', 'prefill', 0, 0)], ms);
        seen.push(lost());
      }
      roster.update([of('p', 'prefill', 0, 0)], 2001 + LOST_MS);
      seen.push(lost(), roster.pool('decode').length);
      roster.update([of('d', 'decode', 1, 0)], 3000 + LOST_MS);
      seen.push(lost(), roster.hue('d', 'decode'), roster.hue('d2', 'decode'));
      roster.update([{ ...of('d', 'decode', 1, 0), state: 'draining' }], 4000 + LOST_MS);
      roster.update([], 5000 + LOST_MS);
      seen.push(lost());
      return [samples, seen];
    })()"""
    samples, seen = bare.evaluate(script)
    assert samples == [[0, 100], [2, 3]], "prompt tokens a second on prefill, running sequences on decode"
    assert seen == ["", "d", "d", "", 0, "p", "hue-decode-0", "hue-decode-1", "p"], "who drained is not lost"


def test_events_are_read_however_they_are_cut(bare: Page) -> None:
    stream = 'data: {"a": 1}\n\n: a comment\n\ndata: {"b": "ü"}\n\ndata: [DONE]\n\ndata: {"c": 3}\n\n'
    script = """(async () => {
      const { serverEvents } = await import('/dashboard/api.js');
      const bytes = new TextEncoder().encode(%s), found = [];
      for (const size of [1, 3, 1000]) {
        const body = new ReadableStream({ start(out) {
          for (let at = 0; at < bytes.length; at += size) out.enqueue(bytes.slice(at, at + size));
          out.close();
        } });
        const events = [];
        for await (const event of serverEvents(body)) events.push(event);
        found.push(events);
      }
      return found;
    })()"""
    assert bare.evaluate(script % json.dumps(stream)) == [[{"a": 1}, {"b": "ü"}]] * 3
    with pytest.raises(ScriptFailed, match="broke off"):
        bare.evaluate(script % json.dumps('data: {"a": 1}\n\n'))


def test_without_the_page(router: Router, tmp_path: Path) -> None:
    other = Router(tmp_path / "other", router.etcd, router.redis, router.model, "--no-dashboard")
    answer = httpx.get(other.url, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert httpx.get(f"{other.url}/dashboard/main.js", trust_env=False).status_code == 404
    assert other.stop() == 0
