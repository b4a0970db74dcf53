"""Servers for the service tests."""

from tests.support.servers import etcd, redis

__all__ = ["etcd", "redis"]
