"""Where compiled kernels are kept, and a name for all that they are compiled from. Only where Triton is installed."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from pathlib import Path

import triton


def cache_folder() -> Path:
    """Triton's own."""
    return Path(triton.knobs.cache.dir)


@cache
def sources_name() -> str:
    """A digest of Triton's version and of this package's sources."""
    digest = blake2b(triton.__version__.encode(), digest_size=16)
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
