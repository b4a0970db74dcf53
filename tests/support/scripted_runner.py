"""A model without arithmetic, for the engine core: its tokens and its KV are hashes of the whole context before them.

`ScriptedRunner` keeps a shadow of the KV pool. Each slot holds the digest of the prefix that ends there, so whatever a
sequence reads (another one's block, a block given away too early, a copy not made) differs from what it must read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

from twostroke_engine.request import FinishReason, Request, TokenOut
from twostroke_engine.schedule.plan import NewSequence, Sampled, Scheduled, StepOutput, StepPlan
from twostroke_engine.transfer.end import KVSink

VOCAB_SIZE = 40
EOS = 1
NAN_TOKEN = 39
"""A prompt with this token makes the logits non-finite."""


def extend(digest: bytes, token: int) -> bytes:
    """The KV of a token: what depends on everything up to it."""
    return blake2b(digest + token.to_bytes(4, "little"), digest_size=8).digest()


def kv_of(tokens: Sequence[int]) -> list[bytes]:
    """The KV of each token of a context."""
    digests, digest = [], b""
    for token in tokens:
        digest = extend(digest, token)
        digests.append(digest)
    return digests


def next_token(digest: bytes, seed: int, choice: int) -> int:
    """The one token that follows a context, never `NAN_TOKEN`."""
    key = digest + seed.to_bytes(8, "little") + choice.to_bytes(4, "little")
    return int.from_bytes(blake2b(key, digest_size=4).digest(), "little") % (VOCAB_SIZE - 1)


def expected(request: Request, max_model_len: int) -> list[tuple[list[int], FinishReason]]:
    """What each choice of a request must generate, by no engine at all."""
    return [_expected_choice(request, choice, max_model_len) for choice in range(request.n)]


def _expected_choice(request: Request, choice: int, max_model_len: int) -> tuple[list[int], FinishReason]:
    sampling = request.sampling
    digest = kv_of(request.token_ids)[-1]
    generated: list[int] = []
    while True:
        token = next_token(digest, sampling.seed, choice)
        generated.append(token)
        digest = extend(digest, token)
        is_end = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
        if is_end and len(generated) > sampling.min_tokens:
            return generated, FinishReason.STOP
        if len(generated) == sampling.max_tokens or len(request.token_ids) + len(generated) == max_model_len:
            return generated, FinishReason.LENGTH


class _Known:
    def __init__(self, new: NewSequence) -> None:
        self.tokens = list(new.token_ids)
        self.blocks = list(new.block_ids)
        self.num_prompt_tokens = new.num_prompt_tokens
        self.choice = new.choice
        self.seed = new.sampling.seed


class ScriptedRunner:
    """Executes plans as a real runner does, and asserts on the way that every read finds what was written for it.

    With `overlaps` it does what a GPU's does: everything is done at launch, and the host hears of it when it lands.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_step_tokens: int,
        overlaps: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        self.overlaps = overlaps
        self.num_aloft = 0
        self.most_aloft = 0
        self._batch_invariant = batch_invariant
        self._is_generated = [[False] * block_size for _ in range(num_blocks)]
        self.block_size = block_size
        self.kv: list[list[bytes | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.tokens_computed = 0
        self.plans: list[StepPlan] = []
        self._max_step_tokens = max_step_tokens
        self._known: dict[int, _Known] = {}

    def launch(self, plan: StepPlan, sink: KVSink) -> Callable[[], StepOutput]:
        assert 0 < plan.num_tokens <= self._max_step_tokens, "the budget of a step"
        self.plans.append(plan)
        self.tokens_computed += plan.num_tokens
        for sequence_id in plan.finished:
            del self._known[sequence_id]
        self._copy(plan)
        for new in plan.new:
            assert new.sequence_id not in self._known, "a known sequence is announced again"
            self._known[new.sequence_id] = _Known(new)
        assert len({entry.sequence_id for entry in plan.scheduled}) == len(plan.scheduled), "scheduled twice"
        for entry in plan.scheduled:
            self._write(entry)
        sink.layer_written(0)
        for entry in plan.scheduled:
            self._read(entry)
        sampled = tuple(self._sample(entry) for entry in plan.scheduled if entry.choices)
        self.num_aloft += 1
        self.most_aloft = max(self.most_aloft, self.num_aloft)
        return lambda: self._land(StepOutput(step=plan.step, sampled=sampled))

    def _land(self, output: StepOutput) -> StepOutput:
        self.num_aloft -= 1
        return output

    def _copy(self, plan: StepPlan) -> None:
        targets = [copy.target for copy in plan.copies]
        assert len(set(targets)) == len(targets), "two copies into one block"
        assert not {copy.source for copy in plan.copies} & set(targets), "the order of copies matters"
        for copy in plan.copies:
            self.kv[copy.target] = list(self.kv[copy.source])
            self._is_generated[copy.target] = list(self._is_generated[copy.source])

    def _write(self, entry: Scheduled) -> None:
        known = self._known[entry.sequence_id]
        known.blocks.extend(entry.new_block_ids)
        end = entry.start + entry.count
        assert entry.count > 0, "nothing is scheduled"
        assert end <= len(known.tokens), "tokens are computed that do not exist"
        assert bool(entry.choices) == (end == len(known.tokens)), "sampled too early or not at all"
        digests = kv_of(known.tokens[:end])
        for position in range(entry.start, end):
            block, offset = divmod(position, self.block_size)
            self.kv[known.blocks[block]][offset] = digests[position]
            self._is_generated[known.blocks[block]][offset] = entry.start >= known.num_prompt_tokens
        if self._batch_invariant:
            is_prompt = end <= known.num_prompt_tokens
            assert is_prompt or entry.count == 1, "generated tokens are computed in a chunk"

    def _read(self, entry: Scheduled) -> None:
        known = self._known[entry.sequence_id]
        end = entry.start + entry.count
        assert self.read(known.blocks, end) == kv_of(known.tokens[:end]), f"{entry} reads another sequence's KV"
        if self._batch_invariant:
            slots = (divmod(position, self.block_size) for position in range(end))
            generated = [self._is_generated[known.blocks[block]][offset] for block, offset in slots]
            expected = [position >= known.num_prompt_tokens for position in range(end)]
            assert generated == expected, "KV from another kind of step"

    def read(self, blocks: Sequence[int], num_tokens: int) -> list[bytes | None]:
        """The KV in a block table's first `num_tokens` slots."""
        slots = (divmod(position, self.block_size) for position in range(num_tokens))
        return [self.kv[blocks[block]][offset] for block, offset in slots]

    def _sample(self, entry: Scheduled) -> Sampled:
        known = self._known[entry.sequence_id]
        digest = kv_of(known.tokens)[-1]
        tokens = tuple(TokenOut(next_token(digest, known.seed, choice)) for choice in entry.choices)
        finite = NAN_TOKEN not in known.tokens
        if finite or self.overlaps:  # a device goes on with whatever token it has chosen
            known.tokens.append(tokens[entry.choices.index(known.choice)].id)
        return Sampled(sequence_id=entry.sequence_id, tokens=tokens, finite=finite)
