"""Draws the screenshots of the live page: `python -m tests.support.page_shots [DIR]` (docs/images by default).

A real cluster on the demo model, two workers a pool, seen idle, loaded, and with a decode worker killed; each at two
widths, light and dark. It takes about two minutes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from twostroke_cli.models import resolve_model

from tests.support.browser import Page, browsing
from tests.support.chromium import NoChromium, fetched_chromium
from tests.support.cluster import Cluster, running_cluster

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
FLAGS = ("--prefill", "2", "--decode", "2", "--no-restart", "--kv-cache-bytes", str(64 << 20))
SIZES = {"wide": (1440, 1080), "narrow": (390, 844)}
THEMES = ("light", "dark")
CLIENTS = 5
BUSY_S = 62
"""For how long the cluster is busy before it is drawn: the trends show a minute."""
TOPICS = ("the sea", "a lighthouse", "bread", "the moon", "a river", "trains", "bees", "winter", "glass", "a market")
SETTING = "You write short, plain texts for people who learn a language. Use common words and short sentences. "


def shoot(page: Page, folder: Path, scene: str) -> None:
    """Draws one scene at every size and in every theme."""
    for size, (width, height) in SIZES.items():
        page.size(width, height)
        page.evaluate("scrollTo(0, 0)")
        for theme in THEMES:
            page.prefers(color_scheme=theme, reduced_motion="reduce")
            time.sleep(0.3)
            page.screenshot(folder / f"live-page-{scene}-{size}-{theme}.png", whole=size == "narrow")
    page.size(*SIZES["wide"])


@contextmanager
def traffic(cluster: Cluster) -> Iterator[None]:
    """Clients that ask one thing after another."""
    stop = threading.Event()
    topics, numbers = itertools.cycle(TOPICS), itertools.count(1)

    def ask(number: int) -> None:
        with httpx.Client(base_url=cluster.url, timeout=120, trust_env=False) as http:
            while not stop.is_set():
                # Odd clients share a beginning, which is cached; even ones ask something new each time.
                begin = "" if number % 2 else f"Text number {next(numbers)}. "
                text = begin + SETTING * (2 + 3 * number) + f"Write about {next(topics)}."
                body = {"messages": [{"role": "user", "content": text}], "max_tokens": 40 + 30 * number, "seed": number}
                answer = http.post("/v1/chat/completions", json=body)
                time.sleep(0.2 if answer.is_success else 1)

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop.set()
        for client in clients:
            client.join()


def chat(page: Page, question: str, max_tokens: int) -> None:
    """Asks in the playground and waits for the waterfalls."""
    page.evaluate("document.getElementById('chat-temperature').value = 0")
    page.evaluate(f"document.getElementById('chat-tokens').value = {max_tokens}")
    page.evaluate("document.getElementById('chat-text').focus()")
    page.type(question)
    page.press("Enter")
    page.wait("document.querySelector('.answer:last-child .timing')", 120)


def draw(page: Page, cluster: Cluster, folder: Path) -> None:
    """All scenes, one after another."""
    page.size(*SIZES["wide"])
    page.goto(cluster.url)
    page.wait("document.querySelectorAll('.card[data-state=ready]').length === 4")
    page.wait("document.querySelector('#requests-body pre')")
    time.sleep(3)
    shoot(page, folder, "idle")
    with traffic(cluster):
        time.sleep(BUSY_S)
        chat(page, "What is the capital of France?", 40)
        page.evaluate("document.querySelector('#requests .opener').click()")
        shoot(page, folder, "loaded")
        page.evaluate("document.querySelector('#requests .opener[aria-expanded=true]').click()")
        [killed] = [process for process in cluster.processes("decode") if process["id"] == "decode-1"]
        os.kill(killed["pid"], signal.SIGKILL)
        page.wait("document.querySelector('[data-worker=decode-1]').dataset.state === 'lost'", 60)
        time.sleep(8)
        shoot(page, folder, "degraded")
    assert page.complaints == [], page.complaints


def main() -> int:
    """Draws; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs" / "images")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        chromium = fetched_chromium()
    except NoChromium as error:
        print(error, file=sys.stderr)
        return 1
    with (
        tempfile.TemporaryDirectory() as run_dir,
        running_cluster(Path(run_dir), Path(resolve_model(MODEL)), *FLAGS, workers=4) as cluster,
        browsing(chromium) as page,
    ):
        draw(page, cluster, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
