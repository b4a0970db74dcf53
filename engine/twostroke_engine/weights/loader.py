"""Loading is a pull: each parameter asks for its sources by name and reads only its own slice of them."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from twostroke_engine.model.config import ModelError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from torch import Tensor

    from twostroke_engine.weights.checkpoint import Checkpoint

MAX_NAMES_IN_ERROR = 5


@dataclass(frozen=True, slots=True)
class Source:
    """A slice of a stored tensor, and where it goes."""

    name: str
    shape: tuple[int, ...]
    """Of the whole stored tensor."""
    read: tuple[slice, ...]
    write: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Pull:
    """One parameter and the sources that fill it, whole."""

    target: Tensor
    sources: tuple[Source, ...]


class WeightSource(Protocol):
    """Where parameters get their values from."""

    def fill(self, pulls: Sequence[Pull], unneeded: Collection[str]) -> None:
        """Fills every parameter.

        Args:
            pulls: all parameters of the model.
            unneeded: patterns (`*` matches anything) of names that the source may hold and the model has no use for.

        Raises:
            ModelError: the source does not fit the model.
        """
        ...

    @property
    def kind(self) -> str:
        """Begins the model's fingerprint; empty for weights that someone trained."""
        ...

    def digest(self) -> bytes:
        """Equal if and only if two sources of a kind give the same values."""
        ...


def load(checkpoint: Checkpoint, pulls: Sequence[Pull], unneeded: Collection[str]) -> None:
    """Fills every parameter.

    Args:
        checkpoint: where to read.
        pulls: all parameters of the model.
        unneeded: patterns (`*` matches anything) of names that checkpoints may hold and the model has no use for.

    Raises:
        ModelError: a name is missing, was not used, or has another shape; it is named.
    """
    wanted = {source.name for pull in pulls for source in pull.sources}
    _refuse("lacks", wanted - checkpoint.names)
    unused = checkpoint.names - wanted
    _refuse(
        "holds what the model does not use:",
        (name for name in unused if not any(fnmatchcase(name, pattern) for pattern in unneeded)),
    )
    for pull in pulls:
        for source in pull.sources:
            _copy(checkpoint, source, pull.target)


def _copy(checkpoint: Checkpoint, source: Source, target: Tensor) -> None:
    stored = checkpoint[source.name]
    if stored.shape != source.shape:
        raise ModelError(
            f"{stored.file}: {source.name} has shape {list(stored.shape)}, but config.json implies {list(source.shape)}"
        )
    part = stored.read(source.read)
    if part.is_floating_point() != target.is_floating_point():
        raise ModelError(f"{stored.file}: {source.name} has dtype {part.dtype}, not {target.dtype} or a like one")
    target[source.write].copy_(part)


def _refuse(complaint: str, names: Iterable[str]) -> None:
    found = sorted(names)
    if not found:
        return
    more = f" and {len(found) - MAX_NAMES_IN_ERROR} more" if len(found) > MAX_NAMES_IN_ERROR else ""
    raise ModelError(f"the checkpoint {complaint} {', '.join(found[:MAX_NAMES_IN_ERROR])}{more}")
