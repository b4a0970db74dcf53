"""Every worker as this router knows it: who is there (etcd), how busy (streams), what each holds (Redis)."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from twostroke_chassis.membership import Joined, Left, Membership, WorkerRecord
from twostroke_chassis.prefix_index import PrefixMirror
from twostroke_chassis.telemetry import WorkerCollector
from twostroke_engine.kv.hashing import BlockHash, block_hashes
from twostroke_engine.request import Request

from twostroke_router.link import LinkEvents, WorkerLink
from twostroke_router.placement import Candidate, View

_log = logging.getLogger(__name__)


class PromptHashes:
    """The block hashes of one prompt, made once per block size."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._by_block_size: dict[int, list[BlockHash]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._request.num_prompt_tokens

    def of(self, block_size: int) -> list[BlockHash]:
        """Hashes for workers of a block size."""
        if block_size not in self._by_block_size:
            request = self._request
            self._by_block_size[block_size] = block_hashes(
                request.token_ids, block_size, request.cache_salt, request.adapter
            )
        return self._by_block_size[block_size]


class Directory:
    """Mirrors the membership and owns one link per worker."""

    def __init__(
        self, membership: Membership, prefixes: PrefixMirror, metrics: WorkerCollector, model_name: str, router_id: str
    ) -> None:
        self._membership = membership
        self._prefixes = prefixes
        self._metrics = metrics
        self._model_name = model_name
        self._router_id = router_id
        self._links: dict[str, WorkerLink] = {}
        self._turn = 0
        self.max_model_len: int | None = None
        """Most tokens that a request may have on the decode workers known now. While there is none it stays what it
        was last, so that what is asked for meanwhile fits those that come back."""
        self._changed = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Follows the membership for ever."""
        async for change in self._membership.watch():
            match change:
                case Joined(record=record):
                    self._joined(record)
                case Left(record=record):
                    self._left(record)

    async def close(self) -> None:
        """Ends every stream."""
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close("the router is stopping") for link in links.values()), *self._closing)

    # ---- what others ask ---------------------------------------------------------------------------------------------

    def link(self, worker_id: str) -> WorkerLink | None:
        """The link to a worker, if it is known."""
        return self._links.get(worker_id)

    @property
    def links(self) -> list[WorkerLink]:
        """Every link, by worker id."""
        return [self._links[worker_id] for worker_id in sorted(self._links)]

    @property
    def is_ready(self) -> bool:
        """Whether a decode worker is connected and takes work: what any request needs."""
        return any(link.state == "ready" for link in self._links.values() if link.record.role == "decode")

    def view(self, prompt: PromptHashes) -> View:
        """The workers that take new work now, for one request. An immutable snapshot."""
        ready = [link for link in self._links.values() if link.state == "ready"]
        return View(tuple(self._candidate(link, prompt) for link in ready), self._turn)

    def placed(self) -> None:
        """A placement was made from the last view: the next one breaks ties differently."""
        self._turn += 1

    async def wait_change(self, seconds: float) -> None:
        """Returns when a view may have changed, or raises TimeoutError."""
        async with asyncio.timeout(seconds):
            await self._changed.wait()

    def _candidate(self, link: WorkerLink, prompt: PromptHashes) -> Candidate:
        record, load, own = link.record, link.load, link.own_load()
        hit_blocks = self._prefixes.longest_match(record.worker_id, prompt.of(record.block_size))
        return Candidate(
            worker_id=record.worker_id,
            role=record.role,
            model_fingerprint=record.model_fingerprint,
            kv_fingerprint=record.kv_fingerprint,
            tokenizer_hash=record.tokenizer_hash,
            block_size=record.block_size,
            max_model_len=record.max_model_len,
            channels=record.channels,
            waiting=load.waiting,
            running=load.running,
            queued_tokens=load.queued_tokens,
            blocks_available=load.blocks_free + load.blocks_cached - load.blocks_promised,
            own_requests=own.requests,
            own_tokens=own.tokens,
            own_blocks=own.blocks,
            hit_tokens=min(hit_blocks * record.block_size, prompt.num_tokens - 1),
        )

    # ---- changes -----------------------------------------------------------------------------------------------------

    def _joined(self, record: WorkerRecord) -> None:
        if record.model_name != self._model_name:
            _log.warning(
                "worker %s serves model %s, not %s: not used", record.worker_id, record.model_name, self._model_name
            )
            return
        known = self._links.get(record.worker_id)
        if known is not None and known.record == record:
            known.is_listed = True
            return
        if known is not None:
            self._drop(known, f"worker {record.worker_id} was restarted")
        changed = partial(self._on_change, record.worker_id)
        loaded = partial(self._metrics.report, record.worker_id, record.role)
        link = self._links[record.worker_id] = WorkerLink(record, self._router_id, LinkEvents(changed, loaded))
        link.start()
        self._notify()

    def _left(self, record: WorkerRecord) -> None:
        link = self._links.get(record.worker_id)
        if link is None or link.record.epoch != record.epoch:
            return
        link.is_listed = False
        if not link.is_connected:
            self._drop(link, f"worker {record.worker_id} is gone")

    def _on_change(self, worker_id: str) -> None:
        link = self._links.get(worker_id)
        if link is not None and not link.is_connected and not link.is_listed:
            # Unlisted and disconnected: nothing says any more that it lives.
            self._drop(link, f"worker {worker_id} is gone")
        self._notify()

    def _drop(self, link: WorkerLink, reason: str) -> None:
        self._links.pop(link.worker_id, None)
        self._metrics.forget(link.worker_id)
        self._prefixes.forget(link.worker_id)
        link.fail_all(reason)
        closing = asyncio.create_task(link.close(reason), name=f"link-close-{link.worker_id}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        self._notify()

    def _notify(self) -> None:
        limits = [link.record.max_model_len for link in self._links.values() if link.record.role == "decode"]
        self.max_model_len = max(limits, default=self.max_model_len)
        self._changed.set()
        self._changed = asyncio.Event()
