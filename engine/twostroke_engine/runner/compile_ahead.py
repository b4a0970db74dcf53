"""Kernels are compiled by several processes before a model is loaded: one after the other they take most of a minute.

Each child computes steps of a model of one layer, of the real one's shapes (`runner.compile_share`), and what Triton
compiles for them stays in its cache, where the engine finds it. A child that fails costs time at start and nothing
else. Threads would not do: most of a compilation holds the interpreter's lock.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twostroke_engine.config import EngineConfig

MAX_CHILDREN = 8
TIMEOUT_S = 180.0

log = logging.getLogger(__name__)


def compile_ahead(config: EngineConfig, num_children: int | None = None) -> None:
    """Fills Triton's cache with what an engine of this configuration needs, unless this was done before.

    Args:
        config: of the engine that is about to be built, on a device that runs Triton.
        num_children: None: one a core that this process may use, but no more than `MAX_CHILDREN`.
    """
    # Only here: there need not be a Triton where this module is merely imported.
    from twostroke_kernels.compiled import cache_folder, sources_name

    if num_children is None:
        num_children = min(MAX_CHILDREN, len(os.sched_getaffinity(0)))
    cache = cache_folder()
    done = cache / f"twostroke-{_name(config, sources_name())}"
    if num_children < 2 or done.exists():
        return
    commands = [
        [sys.executable, "-m", "twostroke_engine.runner.compile_share", str(share), str(num_children)]
        for share in range(num_children)
    ]
    payload = msgspec.msgpack.encode(config)
    with ThreadPoolExecutor(num_children) as pool:
        went_well = list(pool.map(lambda command: _run(command, payload), commands))
    if all(went_well):
        cache.mkdir(parents=True, exist_ok=True)
        done.touch()


def _run(command: Sequence[str], payload: bytes) -> bool:
    try:
        ended = subprocess.run(command, input=payload, timeout=TIMEOUT_S, capture_output=True)
    except subprocess.TimeoutExpired:
        log.warning("compiling ahead took longer than %.0f s; the engine compiles what is missing", TIMEOUT_S)
        return False
    if ended.returncode:
        last = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        log.warning("compiling ahead failed (%s); the engine compiles what is missing", last)
    return ended.returncode == 0


def _name(config: EngineConfig, sources: str) -> str:
    """Of all that kernels depend on: a model's shapes, how it is run, the card, and what they are compiled from."""
    shapes = (Path(config.model_dir) / "config.json").read_bytes()
    limits = (config.block_size, config.max_step_tokens, config.max_running, config.max_model_len)
    run = (config.dtype, *limits, config.batch_invariant)
    card = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else config.device
    return blake2b(repr((shapes, run, card, sources, torch.__version__)).encode(), digest_size=8).hexdigest()
