"""An engine over a `ScriptedRunner`, with a clock that tests move, and everything it ever reported."""

from __future__ import annotations

from dataclasses import dataclass, field

from twostroke_engine.config import EngineConfig
from twostroke_engine.engine import Engine
from twostroke_engine.kv.spec import KVSpec, LayerGroup
from twostroke_engine.messages import RequestEnd
from twostroke_engine.request import FinishReason, Request, SamplingParams

from tests.support.scripted_runner import EOS, ScriptedRunner


@dataclass
class Heard:
    """What was reported of one request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, FinishReason] = field(default_factory=dict)
    end: RequestEnd | None = None

    def result(self) -> list[tuple[list[int], FinishReason]]:
        return [(self.tokens[choice], self.finishes[choice]) for choice in sorted(self.tokens)]


class EngineBench:
    """Runs an engine step by step and checks on the way what must always hold."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 16,
        max_step_tokens: int = 64,
        max_running: int = 8,
        max_model_len: int | None = None,
        overlaps: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        self.now_s = 100.0
        self.runner = ScriptedRunner(num_blocks, block_size, max_step_tokens, overlaps, batch_invariant)
        config = EngineConfig(
            model_dir="",
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_model_len=max_model_len,
            batch_invariant=batch_invariant,
        )
        group = LayerGroup(num_layers=1, num_kv_heads=1, head_dim=1)
        spec = KVSpec(block_size=block_size, dtype="float32", groups=(group,))
        self.engine = Engine(config, spec, num_blocks, self.runner, (EOS,), lambda: self.now_s)
        self.heard: dict[str, Heard] = {}
        self.first_offset = 0

    def step(self) -> bool:
        """One step and one second; True if something was computed."""
        stepped = self.engine.step()
        self.engine.pool.check()
        self.now_s += 1
        self.listen()
        return stepped

    def run(self, max_steps: int = 2000) -> None:
        """Steps until nothing is left to do."""
        for _ in range(max_steps):
            if not self.step() and not self.engine.has_work:
                return
        raise AssertionError(f"not done after {max_steps} steps: {self.engine.load()}")

    def listen(self) -> None:
        """Takes in what the engine reports; streams have no gaps and say nothing after an end."""
        for update in self.engine.take_updates():
            heard = self.heard.setdefault(update.request_id, Heard())
            assert heard.end is None, "news after the end"
            for delta in update.deltas:
                tokens = heard.tokens.setdefault(delta.choice, [])
                assert delta.choice not in heard.finishes, "tokens after a choice's finish"
                assert delta.offset == len(tokens) + self.first_offset, "a gap in a stream"
                tokens.extend(token.id for token in delta.tokens)
                if delta.finish is not None:
                    heard.finishes[delta.choice] = delta.finish
            heard.end = update.end

    def assert_idle(self) -> None:
        """Nothing is held any more."""
        self.engine.pool.check()
        assert self.engine.pool.num_referenced == 0
        assert self.engine.pool.num_promised == 0
        assert not self.engine.has_work


def make_request(
    request_id: str, tokens: int | tuple[int, ...], n: int = 1, priority: int = 0, **sampling: object
) -> Request:
    """A request; a number of tokens stands for a prompt that no other id has."""
    if isinstance(tokens, int):
        seed = sum(request_id.encode())
        tokens = tuple(2 + (seed * 7 + position * position) % 36 for position in range(tokens))
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return Request(id=request_id, token_ids=tokens, sampling=params, n=n, priority=priority)
