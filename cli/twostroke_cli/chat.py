"""`twostroke chat` and `twostroke ask`: talk to a running cluster."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twostroke_cli.client import Answer, Message, RouterClient
from twostroke_cli.errors import CommandError
from twostroke_cli.status import in_bytes

if TYPE_CHECKING:
    from rich.table import Table

HELP = "/quit ends, /reset forgets the conversation, /stats shows where the last answer ran; Ctrl-C stops an answer"


def write(text: str) -> None:
    """Shows a piece of an answer as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Conversation:
    """Turns so far, and the settings that every turn is asked with."""

    def __init__(self, client: RouterClient, model: str, system: str, params: Mapping[str, Any]) -> None:
        self._client = client
        self._model = model
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._params = params
        self._turns: list[Message] = []
        self.last: Answer | None = None

    def reset(self) -> None:
        """Forgets every turn."""
        self._turns = []

    async def say(self, text: str) -> None:
        """Asks one turn and shows the answer; a turn that fails or is stopped leaves no trace."""
        turns = [*self._turns, {"role": "user", "content": text}]
        messages = [*self._system, *turns]
        self.last = await self._client.stream_chat(messages, write, model=self._model, **self._params)
        self._turns = [*turns, {"role": "assistant", "content": self.last.text}]


def chat(http: str, model: str, system: str, params: Mapping[str, Any]) -> None:
    """Reads turns from the terminal until the user leaves."""
    client = RouterClient(http)
    model = model or asyncio.run(client.model())
    conversation = Conversation(client, model, system, params)
    if sys.stdin.isatty():
        import readline  # noqa: F401 - input() then has history and editing

        print(f"{model} at {client.address}. {HELP}")
    while (text := _read_turn()) is not None:
        if text.startswith("/"):
            if not _obey(text, conversation):
                return
        elif text:
            _answer(conversation, text)


def _read_turn() -> str | None:
    """The next line; None when there is none."""
    try:
        return input("\n> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _obey(command: str, conversation: Conversation) -> bool:
    """Carries out a command; False ends the chat."""
    if command in ("/quit", "/exit", "/q"):
        return False
    if command == "/reset":
        conversation.reset()
        print("forgotten")
    elif command == "/stats" and conversation.last is not None:
        print_explanation(conversation.last)
    else:
        print(HELP)
    return True


def _answer(conversation: Conversation, text: str) -> None:
    try:
        asyncio.run(conversation.say(text))
        print()
    except KeyboardInterrupt:
        print("\n(stopped)")
    except CommandError as error:
        print(f"\n({error})")


async def ask(http: str, question: str, params: Mapping[str, Any]) -> Answer:
    """Asks one question; the answer is shown as it comes, and returned."""
    client = RouterClient(http)
    model = await client.model()
    answer = await client.stream_chat([{"role": "user", "content": question}], write, model=model, **params)
    print()
    return answer


def print_explanation(answer: Answer) -> None:
    """Shows where each part of an answer ran."""
    from rich.console import Console

    Console().print(explanation_table(answer))


def explanation_table(answer: Answer) -> Table:
    """One row for each fact of the `twostroke` object."""
    from rich.table import Table

    facts, usage = answer.explain, answer.usage
    table = Table(show_header=False, title="where it ran", title_justify="left")
    table.add_row("prefill worker", str(facts.get("prefill_worker") or "none: the decode worker did it"))
    table.add_row("decode worker", str(facts.get("decode_worker") or "none: it ended with its first token"))
    table.add_row("KV moved", f"{in_bytes(facts.get('kv_bytes') or 0)} in {facts.get('kv_segments') or 0} segments")
    table.add_row("TTFT", _ms(facts.get("ttft_s")))
    table.add_row("ITL", _ms(facts.get("itl_s")))
    cached = facts.get("cached_tokens") or 0
    table.add_row("tokens", f"{usage.get('prompt_tokens')} in ({cached} cached), {usage.get('completion_tokens')} out")
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"
