"""Who may call: API keys from a file, as a bearer header or as gRPC metadata. Keys are never logged."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from twostroke_chassis.lifecycle import StartError

ANONYMOUS = ""
"""The caller's name where no keys are configured."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ApiKeys:
    """The keys that open the door; without any, the door is open to everyone."""

    def __init__(self, names_by_key: Mapping[str, str]) -> None:
        # Digests have one length, so comparing them tells nothing about a key, its length included.
        self._names = {_digest(key): name for key, name in names_by_key.items()}

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._names)} keys)"

    @classmethod
    def none(cls) -> ApiKeys:
        """No keys: everyone may call."""
        return cls({})

    @classmethod
    def load(cls, path: Path | None, flag: str = "--api-keys-file") -> ApiKeys:
        """Keys from a file; `none()` without one.

        One `key` or `name:key` a line; empty lines and lines that begin with # are left out. The name is the caller's
        tenant; a key without one is its own tenant, named by its line.
        """
        if path is None:
            return cls.none()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"{flag} {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
        names: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, colon, key = text.partition(":")
            name, key = (name.strip(), key.strip()) if colon else (f"key-{number}", text)
            if not _NAME.fullmatch(name) or not key or not key.isascii() or any(map(str.isspace, key)):
                raise StartError(f"{flag} {path}: line {number} is not KEY or NAME:KEY (ASCII, no spaces)")
            if key in names:
                raise StartError(f"{flag} {path}: line {number} repeats an earlier key")
            names[key] = name
        if not names:
            raise StartError(f"{flag} {path}: holds no key")
        return cls(names)

    @property
    def is_required(self) -> bool:
        """Whether callers need a key."""
        return bool(self._names)

    def caller(self, authorization: str | None) -> str | None:
        """Who sent this `authorization` value (`Bearer KEY`); None if it must be refused."""
        if not self._names:
            return ANONYMOUS
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer":
            return None
        given = _digest(key.strip())
        found = None
        # Every key is compared, so the time says nothing about which one matched.
        for digest, name in self._names.items():
            if hmac.compare_digest(digest, given):
                found = name
        return found

    def caller_of_call(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
        """As `caller`, from a gRPC call's metadata."""
        for name, value in metadata or ():
            if name.lower() == "authorization":
                return self.caller(value.decode("latin-1") if isinstance(value, bytes) else value)
        return self.caller(None)


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
