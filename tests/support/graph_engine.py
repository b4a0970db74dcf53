"""An engine over a given runner, run until every request has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from twostroke_engine.engine import Engine

if TYPE_CHECKING:
    from twostroke_engine.config import EngineConfig
    from twostroke_engine.request import Request
    from twostroke_engine.runner.model_runner import LoadedModel, ModelRunner

Tokens = dict[tuple[str, int], list[int]]


def run_requests(
    config: EngineConfig, model: LoadedModel, runner: ModelRunner, requests: Sequence[Request]
) -> tuple[Tokens, int]:
    """Tokens by request and choice, and how often a sequence was preempted."""
    engine = Engine(config, model.spec, model.num_blocks, runner, model.eos_token_ids, time.monotonic)
    for request in requests:
        engine.submit(request)
    tokens: Tokens = {}
    while engine.has_work:
        assert engine.step()
        for update in engine.take_updates():
            assert update.end is None or update.end.error is None, update.end
            for delta in update.deltas:
                tokens.setdefault((update.request_id, delta.choice), []).extend(token.id for token in delta.tokens)
    engine.pool.check()
    assert engine.pool.num_referenced == 0
    return tokens, engine.load().preemptions
