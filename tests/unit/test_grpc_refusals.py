"""A call that the client took away is ended quietly, whatever was being sent to it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc.aio
import pytest
from twostroke_router.errors import RequestError, invalid
from twostroke_router.grpc_api import refusing


class GoneCall:
    """A call whose client has gone: gRPC raises at whatever is sent to it."""

    async def abort(self, *status: Any) -> None:
        raise grpc.aio.InternalError("the call is over")


@pytest.mark.parametrize(
    "error", [invalid("prompt", "is too long"), grpc.aio.UsageError("RPC already finished"), ValueError("a defect")]
)
async def test_a_call_that_is_gone_is_cancelled(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(asyncio.CancelledError):
        async with refusing(GoneCall()):  # type: ignore[arg-type]
            raise error
    assert bool(caplog.records) is isinstance(error, ValueError), "only a defect is an error"


async def test_a_refusal_is_the_status_of_a_call_that_waits() -> None:
    heard: list[Any] = []

    class Waiting:
        async def abort(self, *status: Any) -> None:
            heard.extend(status)
            raise grpc.aio.AbortError

    refusal: RequestError = invalid("prompt", "is too long")
    with pytest.raises(grpc.aio.AbortError):
        async with refusing(Waiting()):  # type: ignore[arg-type]
            raise refusal
    assert heard[:2] == [grpc.StatusCode.INVALID_ARGUMENT, refusal.message]
