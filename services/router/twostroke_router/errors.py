"""The one exception that a client sees, and what it is called over HTTP and over gRPC."""

from __future__ import annotations

from enum import Enum

import grpc


class Fault(Enum):
    """What went wrong: (HTTP status, OpenAI error type, OpenAI error code, gRPC status)."""

    INVALID = (400, "invalid_request_error", None, grpc.StatusCode.INVALID_ARGUMENT)
    CONTEXT = (400, "invalid_request_error", "context_length_exceeded", grpc.StatusCode.INVALID_ARGUMENT)
    UNAUTHENTICATED = (401, "invalid_request_error", "invalid_api_key", grpc.StatusCode.UNAUTHENTICATED)
    NO_MODEL = (404, "invalid_request_error", "model_not_found", grpc.StatusCode.NOT_FOUND)
    NO_ROUTE = (404, "invalid_request_error", "unknown_url", grpc.StatusCode.UNIMPLEMENTED)
    NO_REQUEST = (404, "invalid_request_error", "request_not_found", grpc.StatusCode.NOT_FOUND)
    METHOD = (405, "invalid_request_error", "method_not_allowed", grpc.StatusCode.UNIMPLEMENTED)
    TOO_LARGE = (413, "invalid_request_error", "request_too_large", grpc.StatusCode.RESOURCE_EXHAUSTED)
    OVERLOADED = (429, "rate_limit_error", "overloaded", grpc.StatusCode.RESOURCE_EXHAUSTED)
    CANCELLED = (499, "cancelled", "cancelled", grpc.StatusCode.CANCELLED)
    INTERNAL = (500, "server_error", "internal_error", grpc.StatusCode.INTERNAL)
    UNAVAILABLE = (503, "server_error", "unavailable", grpc.StatusCode.UNAVAILABLE)
    DEADLINE = (504, "server_error", "deadline_exceeded", grpc.StatusCode.DEADLINE_EXCEEDED)

    @property
    def http_status(self) -> int:
        """Status code of the HTTP answer."""
        return int(self.value[0])

    @property
    def openai_type(self) -> str:
        """`error.type` of the HTTP answer."""
        return str(self.value[1])

    @property
    def openai_code(self) -> str | None:
        """`error.code` of the HTTP answer."""
        code: str | None = self.value[2]
        return code

    @property
    def grpc_status(self) -> grpc.StatusCode:
        """Status of the gRPC call."""
        return self.value[3]


RETRY_FAULTS = frozenset({Fault.OVERLOADED, Fault.UNAVAILABLE})
RETRY_AFTER_S = 1


class RequestError(Exception):
    """A request that is refused or failed, in words that a client may see."""

    def __init__(self, fault: Fault, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.param = param

    @property
    def retry_after_s(self) -> int | None:
        """When to try again, where that may help."""
        return RETRY_AFTER_S if self.fault in RETRY_FAULTS else None


def invalid(param: str, message: str) -> RequestError:
    """A field that cannot be accepted; the message begins with its name."""
    return RequestError(Fault.INVALID, f"{param}: {message}", param)


def internal_error() -> RequestError:
    """A defect: the log says more, the client is not told."""
    return RequestError(Fault.INTERNAL, "internal error; the router's log says more")
