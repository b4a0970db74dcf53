"""A service's settings: command line flags over TWOSTROKE_* environment variables over defaults."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")

ENV_PREFIX = "TWOSTROKE_"


def split_host_port(address: str) -> tuple[str, int]:
    """Splits HOST:PORT, or [IPV6]:PORT; ValueError says what is wrong."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"an IPv6 address needs brackets, as in [::1]:{port}")
    if not colon or not _HOST.fullmatch(host):
        raise ValueError(f"expected HOST:PORT, got {address!r}")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"expected a port from 0 to 65535, got {port!r}")
    return host, int(port)


def join_host_port(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_host_port(value: str) -> str:
    split_host_port(value)
    return value


def _check_url(value: str, schemes: tuple[str, ...]) -> str:
    expected = " or ".join(f"{scheme}://HOST:PORT" for scheme in schemes)
    parts = urlsplit(value)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in schemes or not parts.hostname or port is None:
        raise ValueError(f"expected {expected}, got {_without_password(value)!r}")
    return value


def _without_password(url: str) -> str:
    """A URL as it may be shown."""
    return re.sub(r"//[^/@]*@", "//***@", url)


def _check_etcd_url(value: str) -> str:
    _check_url(value, ("http",))
    parts = urlsplit(value)
    if parts.username or parts.path.strip("/") or parts.query:
        raise ValueError(f"expected http://HOST:PORT and nothing more, got {_without_password(value)!r}")
    return value


def _check_redis_url(value: str) -> str:
    return _check_url(value, ("redis", "rediss"))


def _check_otlp_url(value: str) -> str:
    parts = urlsplit(value)
    if value and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError(f"expected http://HOST:PORT or https://HOST:PORT, got {_without_password(value)!r}")
    return value


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"expected letters, digits, '.', '_' and '-' (at most 128), got {value!r}")
    return value


HostPort = Annotated[str, AfterValidator(_check_host_port)]
"""HOST:PORT or [IPV6]:PORT."""
EtcdUrl = Annotated[str, AfterValidator(_check_etcd_url)]
"""http://HOST:PORT."""
RedisUrl = Annotated[str, AfterValidator(_check_redis_url)]
"""redis://[USER:PASSWORD@]HOST:PORT[/DB], or rediss:// for TLS."""
OtlpUrl = Annotated[str, AfterValidator(_check_otlp_url)]
"""http://HOST:PORT or https://HOST:PORT of an OTLP receiver; empty for none."""
Name = Annotated[str, AfterValidator(_check_name)]
"""A name that may be part of an etcd key, a Redis key and a file name."""
LogLevel = Literal["debug", "info", "warning", "error"]


class ServiceSettings(BaseSettings):
    """What every service can be told; a service's own settings derive from it."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        frozen=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        use_attribute_docstrings=True,
    )

    role: ClassVar[str] = "service"
    """Set by each service: router, prefill, decode."""

    id: Name = Field(
        "",
        validate_default=True,
        description="name of this process in the cluster, stable over restarts (default: role and a random suffix)",
    )
    cluster: Name = Field("default", description="name of the cluster; clusters share an etcd or Redis by name")
    etcd: EtcdUrl = Field("http://127.0.0.1:2379", description="etcd's client URL")
    redis: RedisUrl = Field("redis://127.0.0.1:6379", description="Redis URL")
    wait: float = Field(
        60, ge=0, allow_inf_nan=False, description="seconds to wait for etcd and others at the start, then give up"
    )
    ready_file: Path | None = Field(None, description="file to write (JSON) when the service is up")
    log_level: LogLevel = Field("info", description="least severe log lines to write")
    log_format: Literal["text", "json"] = Field(
        "text", description="json: one object a line, with trace and request ids"
    )
    otlp_endpoint: OtlpUrl = Field(
        "", description="URL of an OTLP receiver for spans and metrics; the OTEL_* variables work too (default: none)"
    )
    otlp_protocol: Literal["grpc", "http/protobuf"] | None = Field(
        None, description="what the receiver speaks (default: OTEL_EXPORTER_OTLP_PROTOCOL, else grpc)"
    )
    trace_sample: float = Field(
        1.0, ge=0, le=1, description="share of traces begun here that are sent; a caller's own decision is kept"
    )
    vllm_metrics: bool = Field(True, description="show metrics under vLLM's names too")

    @field_validator("id", mode="before")
    @classmethod
    def _draw_id(cls, value: Any) -> Any:
        return value or f"{cls.role}-{secrets.token_hex(4)}"

    @classmethod
    def load(cls, argv: Sequence[str], prog: str) -> Self:
        """Settings from flags, environment and defaults.

        A bad value ends the process with one line naming the flag and status 1; wrong usage (an unknown flag, a
        missing one) with status 2.
        """
        try:
            return cls(_cli_parse_args=list(argv), _cli_prog_name=prog, _cli_exit_on_error=False)  # type: ignore[call-arg]
        except SettingsError as error:
            _exit(prog, f"{_usage_error(str(error))} (see {prog} --help)", 2)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = str(first["loc"][0]) if first["loc"] else ""
            source = _source(field, argv)
            if first["type"] == "missing":
                _exit(prog, f"{source} is required (see {prog} --help)", 2)
            _exit(prog, f"{source}: {first['msg'].removeprefix('Value error, ')}", 1)


def flag_of(field: str) -> str:
    """The command line flag of a settings field."""
    return "--" + field.replace("_", "-")


def _source(field: str, argv: Sequence[str]) -> str:
    """Where a field's value came from: its flag, unless it was given by the environment alone."""
    flag = flag_of(field)
    variable = ENV_PREFIX + field.upper()
    is_flag_given = any(word == flag or word.startswith(flag + "=") for word in argv)
    return variable if not is_flag_given and os.environ.get(variable) else flag


def _usage_error(message: str) -> str:
    return " ".join(message.removeprefix("error parsing CLI: ").split())


def _exit(prog: str, message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{prog}: {message}\n")
    sys.exit(status)
