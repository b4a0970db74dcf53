"""A worker's `/metrics` over HTTP, beside its gRPC server: prometheus_client's own server, in a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from twostroke_chassis.lifecycle import cannot_listen
from twostroke_chassis.settings import join_host_port, split_host_port


@contextmanager
def serving_metrics(address: str | None, registry: CollectorRegistry) -> Iterator[Mapping[str, str]]:
    """Serves a registry while the block runs; yields the endpoint by the name `metrics`, or nothing without an address.

    Raises:
        StartError: the address cannot be bound.
    """
    if address is None:
        yield {}
        return
    host, port = split_host_port(address)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise cannot_listen(address, "--metrics", error) from None
    try:
        yield {"metrics": join_host_port(host, server.server_port)}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
