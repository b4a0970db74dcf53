"""What every service process is made of: settings, life cycle, membership, prefix index, RPC, security, telemetry."""

from __future__ import annotations

import os

# gRPC's C core writes to stderr by itself, where a service promises one line; its errors reach us as exceptions.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
