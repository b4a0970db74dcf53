"""`twostroke explain`: where the time of one request went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from twostroke_cli.client import RouterClient
from twostroke_cli.status import in_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

BAR_WIDTH = 40
TITLES = {"ttft": "to the first token", "second_token": "from the first token to the second"}


async def print_explanation(http: str, request_id: str, as_json: bool) -> None:
    """Prints both waterfalls of a request that has ended, or its explanation as it is."""
    explanation = await RouterClient(http).get(f"/requests/{quote(request_id, safe='')}")
    if as_json:
        print(json.dumps(explanation, indent=1))
        return
    from rich.console import Console

    Console().print(rendered(explanation))


def rendered(explanation: Mapping[str, Any]) -> RenderableType:
    """The explanation for a terminal of 80 columns or more."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [facts_table(explanation)]
    for name, title in TITLES.items():
        waterfall = explanation["waterfalls"][name]
        total = explanation["ttft_s" if name == "ttft" else "second_token_s"]
        parts.append(Text(f"\n{title}: {_ms(total)}", style="bold"))
        parts.append(Text("  not measured") if waterfall is None else waterfall_table(waterfall))
    return Group(*parts)


def facts_table(explanation: Mapping[str, Any]) -> Table:
    """What is known of the request beside its waterfalls."""
    from rich.table import Table

    usage, transfer = explanation["usage"], explanation["transfer"]
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("request", explanation["request_id"]),
        ("trace", explanation["trace_id"]),
        ("outcome", f"{explanation['outcome']} after {_ms(explanation['e2e_s'])}, {explanation['endpoint']}"),
        ("tried again", f"{explanation['retries']} times" if explanation["retries"] else ""),
        ("placement", explanation["placement"]["reason"] or "none was made"),
        ("tokens", f"{usage['prompt_tokens']} in ({usage['cached_tokens']} cached), {usage['completion_tokens']} out"),
        ("KV moved", _moved(transfer)),
        ("preempted", f"{explanation['preemptions']} times" if explanation["preemptions"] else ""),
        ("ITL", _ms(explanation["itl_s"])),
    ):
        if value:
            table.add_row(name, str(value))
    return table


def waterfall_table(waterfall: Mapping[str, Any]) -> Table:
    """One row for each stage; its bar begins where the one before it ends."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    before_s = 0.0
    for stage in waterfall["stages"]:
        style = "yellow" if stage["stage"] == "unattributed" else "cyan"
        bar = bar_of(before_s, stage["seconds"], waterfall["total_s"])
        table.add_row(f"  {stage['stage']}", _ms(stage["seconds"]), f"[{style}]{bar}[/{style}]")
        before_s += stage["seconds"]
    return table


def bar_of(before_s: float, seconds: float, total_s: float) -> str:
    """A stage on a scale of `BAR_WIDTH`; what lasted at all is seen."""
    if not total_s or not seconds:
        return ""
    start = min(BAR_WIDTH - 1, int(BAR_WIDTH * before_s / total_s))
    width = min(BAR_WIDTH - start, max(1, round(BAR_WIDTH * seconds / total_s)))
    return " " * start + "█" * width


def _moved(transfer: Mapping[str, Any]) -> str:
    if not transfer["kv_segments"] and not transfer["skipped_tokens"]:
        return ""
    again = f", {transfer['kv_resends']} sent again" if transfer["kv_resends"] else ""
    held = f"; decode had {transfer['skipped_tokens']} tokens already" if transfer["skipped_tokens"] else ""
    return f"{in_bytes(transfer['kv_bytes'])} in {transfer['kv_segments']} segments{again}{held}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f} ms"
