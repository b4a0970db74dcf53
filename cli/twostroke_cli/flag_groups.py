"""Flags of a command as one dataclass: each field is an option."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import typer


def option(text: str, panel: str, name: str = "", metavar: str | None = None, **more: Any) -> Any:
    """An option of a group of the help text."""
    return typer.Option(*((name,) if name else ()), help=text, rich_help_panel=panel, metavar=metavar, **more)


def takes_flags(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command each field of a dataclass as an option of its own; it gets them as one argument, `flags`."""
    hints, keyword = get_type_hints(kind, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    ours = [
        inspect.Parameter(each.name, keyword, default=each.default, annotation=hints[each.name])
        for each in fields(kind)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "flags"]

        def called(**values: Any) -> None:
            mine = {each.name: values.pop(each.name) for each in own}
            command(**mine, flags=kind(**values))

        called.__name__, called.__doc__ = command.__name__, command.__doc__
        parameters = [*(each.replace(kind=keyword) for each in own), *ours]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate
