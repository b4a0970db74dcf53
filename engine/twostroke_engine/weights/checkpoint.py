"""`Checkpoint`: the safetensors files of a model folder, mapped into memory and read slice by slice."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
from safetensors import SafetensorError, safe_open

from twostroke_engine.model.config import ModelError
from twostroke_engine.weights.loader import Pull, load

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""What the format itself allows."""
SAMPLE_BYTES = 64


class _Index(msgspec.Struct):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk; only what is asked for is read."""

    name: str
    shape: tuple[int, ...]
    file: Path
    _slice: Any  # safetensors' own type, which has no public name

    def read(self, where: Sequence[slice]) -> Tensor:
        """The part of the tensor at `where`, one slice an axis."""
        part: Tensor = self._slice[tuple(where)]
        return part


class Checkpoint:
    """All tensors of a folder, by name: the `WeightSource` of trained models."""

    kind = ""

    def __init__(self, files: Sequence[Path], tensors: dict[str, StoredTensor]) -> None:
        self.files = tuple(files)
        self._tensors = tensors

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Maps the files that the index names, or every *.safetensors file where there is no index.

        Raises:
            ModelError: no weights, a file that the index names is missing, or a file is not valid.
        """
        files = _files(folder)
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            for tensor in _open_file(file):
                if tensor.name in tensors:
                    raise ModelError(f"{tensor.name} is in both {tensors[tensor.name].file.name} and {file.name}")
                tensors[tensor.name] = tensor
        return cls(files, tensors)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def fill(self, pulls: Sequence[Pull], unneeded: Collection[str]) -> None:
        """See `WeightSource.fill`."""
        load(self, pulls, unneeded)

    def digest(self) -> bytes:
        """Names, sizes and headers of the files, and a few bytes of every tensor: cheap, and fine-tunes differ."""
        digest = blake2b(digest_size=16)
        for file in self.files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            for part in _samples(file):
                digest.update(part)
        return digest.digest()


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no *.safetensors file")
        return files
    try:
        names = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except msgspec.DecodeError as error:
        raise ModelError(f"{index}: {error}") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(f"{index} names {', '.join(missing)}, which {folder} does not hold")
    return sorted(folder / name for name in names)


def _open_file(file: Path) -> Iterator[StoredTensor]:
    try:
        # The handle lives as long as one of its slices; they read from its mapping.
        handle = safe_open(file, framework="pt", device="cpu")
        for name in handle.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118 (not a dict)
            part = handle.get_slice(name)  # type: ignore[no-untyped-call]
            yield StoredTensor(name, tuple(part.get_shape()), file, part)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error


def _samples(file: Path) -> Iterator[bytes]:
    """The header, then the first bytes and the middle ones of every tensor."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ModelError(f"cannot read {file}: its header claims {size} bytes")
        header = stream.read(size)
        yield header
        entries: dict[str, dict[str, Any]] = msgspec.json.decode(header)
        for name, entry in sorted(entries.items()):
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            for offset in (begin, (begin + end) // 2):
                stream.seek(8 + size + offset)
                yield stream.read(min(SAMPLE_BYTES, end - offset))
