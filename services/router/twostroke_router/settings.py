"""What the router can be told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from twostroke_chassis.settings import HostPort, ServiceSettings


class RouterSettings(ServiceSettings):
    """Flags of `python -m twostroke_router`."""

    role: ClassVar[str] = "router"

    model_dir: Path = Field(description="HuggingFace folder with tokenizer.json and config.json")
    model_name: str = Field("", description="the model's name in requests (default: the folder's name)")
    http: HostPort = Field("127.0.0.1:8000", description="where to serve the OpenAI API")
    grpc: HostPort = Field("127.0.0.1:8001", description="where to serve the gRPC API")
    api_keys_file: Path | None = Field(None, description="file of API keys, KEY or NAME:KEY a line; none: open to all")
    max_body_bytes: int = Field(8 << 20, ge=1024, description="longest request body")
    max_live: int = Field(1024, ge=1, description="most requests at a time; more are refused with 429")
    placement_wait: float = Field(
        10, ge=0, allow_inf_nan=False, description="seconds a request waits for a worker that can take it"
    )
    request_timeout: float = Field(3600, gt=0, allow_inf_nan=False, description="seconds a request may take in all")
    reservation: float = Field(
        60, gt=0, le=86400, allow_inf_nan=False, description="seconds a decode worker keeps room for prefill to begin"
    )
    max_connection_age: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="seconds after which a gRPC client is told to connect again, so that clients spread over routers "
        "behind one address; its running calls may end first; 0: never",
    )
    max_retries: int = Field(3, ge=0, le=100, description="tries on other workers while nothing was answered yet")
    placement: Literal[
        "cost", "conditional", "least-loaded", "power-of-two", "prefix-only", "round-robin", "session"
    ] = Field("cost", description="placement policy")
    dashboard: bool = Field(True, description="serve the live page at /")
    grace: float = Field(30, ge=0, allow_inf_nan=False, description="seconds that running requests get at a drain")

    @property
    def served_name(self) -> str:
        """What requests call the model."""
        return self.model_name or self.model_dir.resolve().name
