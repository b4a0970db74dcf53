"""Free ports on loopback, and addresses that must be free."""

from __future__ import annotations

import errno
import socket

from twostroke_cli.errors import CommandError

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A port of loopback that nobody listens on now; it stays reserved for nobody."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def split_address(address: str, flag: str) -> tuple[str, int]:
    """HOST:PORT in two, or `CommandError` naming the flag."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise CommandError(f"{flag} {address}: expected HOST:PORT, such as 127.0.0.1:8000")
    return host, int(port)


def claim(address: str, flag: str) -> str:
    """The address with its port chosen if it was 0; `CommandError` if it cannot be listened on now."""
    host, port = split_address(address, flag)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise CommandError(
                    f"{flag} {address}: the port is in use by another process; choose another with {flag} HOST:PORT"
                ) from None
            raise CommandError(f"{flag} {address}: cannot listen there: {error.strerror or error}") from None
        chosen = probe.getsockname()[1]
    return f"[{host}]:{chosen}" if ":" in host else f"{host}:{chosen}"


def claim_or_any(address: str, flag: str) -> str:
    """The address if it is free, otherwise a free port of the same host."""
    host, _ = split_address(address, flag)
    try:
        return claim(address, flag)
    except CommandError:
        return claim(f"[{host}]:0" if ":" in host else f"{host}:0", flag)
