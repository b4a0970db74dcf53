"""`Sequence`: one choice of a request while an engine works on it. Torch-free.

    WAITING -- start --> RUNNING -- retire --> ENDED
       ^                    |
       '----- preempt ------+---- hand_over --> HANDED_OVER -- retire --> ENDED

A waiting sequence may hold blocks already (its KV came from another worker); it then needs a place in the batch and
next to no memory. A handed-over sequence computes nothing any more, but its blocks are still read by a transfer.

There is no phase: a sequence has tokens, `num_computed` of them have their KV in its blocks, and the scheduler makes
the two meet. Chunked prefill, prefix hits, preemption and resumption are subtraction.

Both numbers count what was launched, not what has ended: on a GPU the next step is planned while a token is still being
chosen. That token is awaited: it has a place in the sequence, and no id yet.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from enum import Enum

from twostroke_engine.kv.hashing import BlockHash, chain, root_hash
from twostroke_engine.request import Request


class SequenceState(Enum):
    """Where a sequence stands; moved only by `Sequence`'s methods."""

    WAITING = "waiting"
    RUNNING = "running"
    HANDED_OVER = "handed_over"
    ENDED = "ended"


class HashChain:
    """Hashes of a growing sequence's full blocks, each computed once."""

    def __init__(self, parent: BlockHash, block_size: int, known: Tokens[BlockHash] = ()) -> None:
        self._root = parent
        self._block_size = block_size
        self._hashes = list(known)

    def upto(self, num_blocks: int, token_ids: Tokens[int]) -> Tokens[BlockHash]:
        """Hashes of the first `num_blocks` blocks of `token_ids`, which must only ever have grown."""
        if missing := token_ids[len(self._hashes) * self._block_size : num_blocks * self._block_size]:
            parent = self._hashes[-1] if self._hashes else self._root
            self._hashes.extend(chain(parent, missing, self._block_size))
        return self._hashes[:num_blocks]

    def at(self, block: int, token_ids: Tokens[int]) -> BlockHash:
        """Hash of one block; cheap if asked in order."""
        if block >= len(self._hashes):
            self.upto(block + 1, token_ids)
        return self._hashes[block]

    def fork(self) -> HashChain:
        """The same chain so far, to be continued by other tokens."""
        return HashChain(self._root, self._block_size, self._hashes)


class Sequence:
    """Token ids, how many of them are computed, and the blocks that hold their KV. Owned by the engine's thread."""

    def __init__(
        self, sequence_id: int, request: Request, block_size: int, choice: int = 0, max_model_len: int | None = None
    ) -> None:
        self.sequence_id = sequence_id
        self.request = request
        self.choice = choice
        self.block_size = block_size
        self.sink_id = 0
        self.arrival = 0
        self.state = SequenceState.WAITING
        self.token_ids = list(request.token_ids)
        self._num_prompt_tokens = len(request.token_ids)
        self.most_tokens = request.num_prompt_tokens + request.sampling.max_tokens
        """With so many tokens it ends."""
        if max_model_len is not None:
            self.most_tokens = min(self.most_tokens, max_model_len)
        self.num_awaited = 0
        """Tokens at the end that steps choose which were launched and have not landed."""
        self.num_computed = 0
        self.block_ids: list[int] = []
        self.hashes = HashChain(root_hash(request.cache_salt, request.adapter), block_size)
        self.num_published = 0
        """Leading blocks that were hits or have been published."""
        self.num_hit_tokens = 0
        """Tokens that the latest start found in the cache."""
        self.cached_tokens = 0
        """Prompt tokens that the first start found in the cache."""
        self.copy_source: int | None = None
        """A block to be copied into the last one before anything is computed; referenced until then."""
        self.preemptions = 0
        self.arrived_s = 0.0
        self.started_s: float | None = None
        """When it was first scheduled; kept through preemptions."""

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, an awaited one among them."""
        return len(self.token_ids) + self.num_awaited

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the request came with."""
        return self._num_prompt_tokens

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far, whose ids are known."""
        return len(self.token_ids) - self._num_prompt_tokens

    @property
    def num_known_computed(self) -> int:
        """Leading tokens that are computed and whose ids are known."""
        return min(self.num_computed, len(self.token_ids))

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is to be computed before the next one can be sampled."""
        return len(self.token_ids) + self.num_awaited - self.num_computed

    @property
    def choices(self) -> tuple[int, ...]:
        """Choices to sample once the last token is computed: all of the request's at the end of the prompt."""
        return (self.choice,) if self.num_generated + self.num_awaited else tuple(range(self.request.n))

    @property
    def holds_for_token(self) -> bool:
        """Whether nothing more can be computed before an awaited token has landed.

        It is the last by length, or it is handed over, or other choices begin from it.
        """
        if not self.num_awaited:
            return False
        is_last = self.num_tokens >= self.most_tokens
        return is_last or self.sink_id > 0 or (self.request.n > 1 and not self.num_generated)

    @property
    def is_interrupted(self) -> bool:
        """Has begun, but lost its blocks (or, as a fork, never got any): must be recomputed."""
        return not self.block_ids and (self.preemptions > 0 or self.num_generated > 0)

    @property
    def is_waiting(self) -> bool:
        """Has not got a place in the batch."""
        return self.state is SequenceState.WAITING

    @property
    def is_running(self) -> bool:
        """Has a place in the batch."""
        return self.state is SequenceState.RUNNING

    @property
    def is_ended(self) -> bool:
        """Holds nothing any more."""
        return self.state is SequenceState.ENDED

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold its first `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def start(self, now_s: float) -> None:
        """WAITING -> RUNNING: gets a place in the batch."""
        self._move(SequenceState.WAITING, SequenceState.RUNNING)
        if self.started_s is None:
            self.started_s = now_s

    def take_hits(self, block_ids: Tokens[int]) -> None:
        """Begins with blocks whose KV is there already."""
        assert not self.block_ids, "a sequence that holds blocks looks for hits"
        self.block_ids = list(block_ids)
        self.num_published = len(block_ids)
        self.num_computed = self.num_hit_tokens = len(block_ids) * self.block_size
        if self.started_s is None:
            self.cached_tokens = self.num_hit_tokens
        assert self.num_computed < self.num_tokens, "at least one token is computed"

    def take_prompt(self, block_ids: Tokens[int]) -> None:
        """Begins with blocks that hold the KV of the whole prompt."""
        assert not self.block_ids, "a sequence that holds blocks is given a prompt"
        self.block_ids = list(block_ids)
        self.num_computed = self.request.num_prompt_tokens

    def share_prompt(self, parent: Sequence, own_block: Tokens[int]) -> None:
        """Begins with the parent's full blocks, and with an own copy of its last, partial one if there is one."""
        full = parent.num_computed // self.block_size
        self.take_prompt([*parent.block_ids[:full], *own_block])
        self.num_published = min(parent.num_published, full)
        self.copy_source = parent.block_ids[full] if own_block else None

    def launch(self, count: int, samples: bool) -> None:
        """A step is under way that computes `count` more tokens and, if it `samples`, chooses the next one."""
        self.num_computed += count
        assert self.num_computed <= self.num_tokens, "more is computed than there is"
        self.num_awaited += samples

    def append(self, token_id: int) -> None:
        """The id of the next token: the first of those awaited, if there are any."""
        self.num_awaited = max(0, self.num_awaited - 1)
        self.token_ids.append(token_id)

    def preempt(self) -> None:
        """RUNNING or WAITING -> WAITING: the blocks are gone, everything is to be computed again."""
        assert not self.sink_id, "a hand-off is never preempted"
        assert self.state in (SequenceState.RUNNING, SequenceState.WAITING), f"preempted while {self.state}"
        self.state = SequenceState.WAITING
        self.preemptions += 1
        self._forget_blocks()

    def hand_over(self) -> None:
        """WAITING or RUNNING -> HANDED_OVER: computes nothing any more, keeps its blocks for the transfer."""
        assert self.sink_id, "only a hand-off can be handed over"
        assert not self.is_ended, "handed over after its end"
        self.state = SequenceState.HANDED_OVER

    def retire(self) -> None:
        """Any state -> ENDED: the blocks were released."""
        assert not self.is_ended, "ended twice"
        self.state = SequenceState.ENDED
        self._forget_blocks()

    def _forget_blocks(self) -> None:
        self.num_computed = self.num_published = self.num_hit_tokens = 0
        self.block_ids = []
        self.copy_source = None

    def _move(self, old: SequenceState, new: SequenceState) -> None:
        assert self.state is old, f"{new} from {self.state}"
        self.state = new
