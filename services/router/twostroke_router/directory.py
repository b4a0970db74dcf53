"""Every worker as this router knows it: who is there (etcd), how busy (streams), what each holds (Redis)."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from twostroke_chassis.membership import Joined, Left, Membership, WorkerRecord
from twostroke_chassis.prefix_index import PrefixMirror
from twostroke_chassis.prefix_table import Keys, keys_of
from twostroke_chassis.telemetry import WorkerCollector
from twostroke_engine.kv.hashing import block_hashes
from twostroke_engine.request import Request

from twostroke_router.fleet import Fleet, Numbers, Profile
from twostroke_router.link import LinkEvents, WorkerLink
from twostroke_router.pools import View

_log = logging.getLogger(__name__)


class PromptHashes:
    """The blocks of one prompt, hashed once per block size."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._by_block_size: dict[int, Keys] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._request.num_prompt_tokens

    def of(self, block_size: int) -> Keys:
        """Keys in the prefix table, for workers of a block size."""
        if block_size not in self._by_block_size:
            request = self._request
            hashes = block_hashes(request.token_ids, block_size, request.cache_salt, request.adapter)
            self._by_block_size[block_size] = keys_of(hashes)
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
        self._fleet = Fleet(prefixes.table)
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
        """The workers that take new work now, for one request; good until this router hears from one of them."""
        return self._fleet.view(prompt.of, prompt.num_tokens)

    def placed(self) -> None:
        """A placement was made from the last view: the next one breaks ties differently."""
        self._fleet.placed()

    async def wait_change(self, seconds: float) -> None:
        """Returns when a view may have changed, or raises TimeoutError."""
        async with asyncio.timeout(seconds):
            await self._changed.wait()

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
        events = LinkEvents(
            changed=partial(self._on_change, record.worker_id),
            busier=partial(self._show, record.worker_id),
            loaded=partial(self._metrics.report, record.worker_id, record.role),
        )
        link = self._links[record.worker_id] = WorkerLink(record, self._router_id, events)
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
        elif link is not None and link.state == "ready":
            self._fleet.join(profile_of(link.record), self._prefixes.slot(worker_id))
            self._show(worker_id)
        else:
            self._fleet.leave(worker_id)
        self._notify()

    def _show(self, worker_id: str) -> None:
        """Its load has changed, or what this router has placed there."""
        link = self._links.get(worker_id)
        if link is not None:
            self._fleet.update(worker_id, _numbers(link))

    def _drop(self, link: WorkerLink, reason: str) -> None:
        self._links.pop(link.worker_id, None)
        self._fleet.leave(link.worker_id)
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


def profile_of(record: WorkerRecord) -> Profile:
    """A worker as placement sees it."""
    return Profile(
        worker_id=record.worker_id,
        role=record.role,
        block_size=record.block_size,
        max_model_len=record.max_model_len,
        likeness=(record.model_fingerprint, record.kv_fingerprint, record.tokenizer_hash),
        channels=record.channels,
    )


def _numbers(link: WorkerLink) -> Numbers:
    load, own = link.load, link.own_load()
    free_blocks = load.blocks_free + load.blocks_cached - load.blocks_promised - own.blocks
    return Numbers(
        queued_tokens=load.queued_tokens + own.tokens,
        sequences=load.running + load.waiting + own.requests,
        free_tokens=max(0, free_blocks) * link.record.block_size,
    )
