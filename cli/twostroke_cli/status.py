"""`twostroke status`: who is there and how busy."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twostroke_cli.client import RouterClient

if TYPE_CHECKING:
    from rich.table import Table

WATCH_EVERY_S = 1.0


async def print_status(http: str, as_json: bool) -> None:
    """Prints the workers once."""
    cluster = await RouterClient(http).cluster()
    if as_json:
        print(json.dumps({"model": cluster.get("model"), "workers": cluster["workers"]}, indent=1))
        return
    from rich.console import Console

    Console().print(worker_table(cluster))


async def watch_status(http: str) -> None:
    """Shows the workers until the user has seen enough."""
    from rich.live import Live

    client = RouterClient(http)
    with Live(worker_table(await client.cluster()), auto_refresh=False) as live:
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            live.update(worker_table(await client.cluster()), refresh=True)


def worker_table(cluster: Mapping[str, Any]) -> Table:
    """One row for each worker."""
    from rich import box
    from rich.table import Table

    # Ten columns fit into a terminal of 80 with nothing cut.
    table = Table(
        title=f"model {cluster.get('model')}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("worker", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("run", "wait", "step", "KV used", "cached", "hit", "moved", "preempt"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in cluster["workers"]:
        table.add_row(*worker_row(worker))
    return table


def worker_row(worker: Mapping[str, Any]) -> list[str]:
    """The cells of one worker."""
    load, blocks, hit_rate = worker["load"], worker["blocks"], worker.get("hit_rate")
    return [
        f"{worker['id']}",
        f"{worker['state']}",
        f"{load.get('running', 0)}",
        f"{load.get('waiting', 0)}",
        f"{1000 * load.get('step_s', 0.0):.0f} ms",
        in_percent(blocks.get("leased", 0), blocks.get("total", 0)),
        in_percent(blocks.get("cached", 0), blocks.get("total", 0)),
        "-" if hit_rate is None else in_percent(hit_rate, 1),
        in_bytes(worker.get("kv_bytes", 0)),
        f"{worker.get('preemptions', 0)}",
    ]


def in_percent(part: float, whole: float) -> str:
    """A share for people; rounded up, so that little is not nothing."""
    return f"{math.ceil(100 * part / whole) if whole else 0} %"


def in_bytes(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
