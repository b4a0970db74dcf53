"""Whole engines over channels other than the best one: what decode streams is what one engine streams alone."""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from twostroke_engine.request import Request, SamplingParams
from twostroke_engine.transfer import schemes
from twostroke_engine.transfer.channel import ChannelError
from twostroke_engine.transfer.cuda_ipc import CudaIpcScheme

from tests.support.block_ends import OneProcessDriver
from tests.support.channel_schemes import join, make_scheme, needs_nixl
from tests.support.split_engines import SplitEngines
from tests.support.tiny_model import make_tiny_llama

MAX_TOKENS = 8


def make_request(number: int, suffix: str = "") -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    return Request(
        id=f"r{number}{suffix}",
        token_ids=tuple((number * 7 + at) % 200 + 3 for at in range(5 + number * 19)),
        sampling=sampling,
    )


@pytest.mark.parametrize("channel", ["collective", "tcp", pytest.param("nixl", marks=needs_nixl)])
def test_split_streams_are_colocated_streams(tmp_path: Path, channel: str) -> None:
    check_streams(SplitEngines(make_tiny_llama(tmp_path / "model"), channels=(channel,)))


@pytest.mark.parametrize("block_sizes", [(16, 64), (64, 16)], ids=str)
def test_split_streams_are_colocated_streams_if_prefill_writes_to_decodes_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, block_sizes: tuple[int, int]
) -> None:
    """A GPU's channel on a host: both engines are in this process, and so is the memory."""
    driver = OneProcessDriver()
    monkeypatch.setitem(schemes._ORDER, "cpu", ("cuda_ipc", "tcp"))
    monkeypatch.setattr(schemes, "cuda_ipc_scheme", lambda pool, timeout_s: CudaIpcScheme(pool, driver, timeout_s))
    caplog.set_level(logging.INFO)
    check_streams(SplitEngines(make_tiny_llama(tmp_path / "model"), block_sizes=block_sizes))
    assert "KV comes over cuda_ipc" in caplog.text


def check_streams(engines: SplitEngines) -> None:
    try:
        split = engines.run([make_request(number) for number in range(8)])
        whole = engines.run_on("alone", [make_request(number, "c") for number in range(8)])
    finally:
        engines.stop()
    assert len(split) == 8
    for (request_id, choice), tokens in split.items():
        assert sorted(tokens) == list(range(MAX_TOKENS))
        assert tokens == whole[f"{request_id}c", choice]


@pytest.mark.parametrize("num_bytes", [99, 4096])
def test_a_gloo_message_of_another_size_than_announced_breaks_the_pair_and_not_the_process(num_bytes: int) -> None:
    """Gloo alone would fill a part, or end the process."""
    scheme = make_scheme("collective", 5.0)
    listener = scheme.listen()
    sender, receiver = join(scheme, listener, "pair")
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.send, torch.zeros(num_bytes, dtype=torch.uint8))
        with pytest.raises(ChannelError, match="100 bytes were announced"):
            receiver.receive(torch.empty(100, dtype=torch.uint8))
        sender.close()
        with contextlib.suppress(ChannelError):
            sent.result()
    with pytest.raises(ChannelError, match="the pair is closed"):
        receiver.receive(torch.empty(100, dtype=torch.uint8))
    listener.close()
