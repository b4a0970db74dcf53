"""What a command tells its user when it cannot do what was asked."""

from __future__ import annotations


class CommandError(Exception):
    """Ends a command with status 1; its message is the one line its user sees."""
