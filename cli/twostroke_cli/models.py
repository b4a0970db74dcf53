"""From what `--model` says to a HuggingFace folder on this disk."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twostroke_cli.errors import CommandError

HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.tiktoken"]
"""Weights, configuration, tokenizer and chat template: nothing that could run code."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelFolder:
    """A model as the services are told of it."""

    dir: Path
    name: str
    """What a request's `model` says."""

    def __fspath__(self) -> str:
        return str(self.dir)


def home() -> Path:
    """Where models are kept: `TWOSTROKE_HOME`, else the user's cache folder."""
    chosen = os.environ.get("TWOSTROKE_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or f"{cache}/twostroke").expanduser()


def resolve_model(model: str, say: Say = print, needs_weights: bool = True) -> ModelFolder:
    """Finds a folder, fetches a known model once, or takes a snapshot of ORG/NAME[@REVISION] from the hub.

    A folder on this disk may lack weights if they are to be drawn at random.
    """
    from twostroke_cli.pull import KNOWN_MODELS, pull

    if model in KNOWN_MODELS and not Path(model).is_dir():
        return ModelFolder(pull(model, say), model)
    is_path = model.startswith((".", "/", "~")) or Path(model).exists()
    if not is_path and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model):
        return _from_hub(model, say)
    folder = Path(model).expanduser().resolve()
    if not folder.is_dir():
        known = ", ".join(sorted(KNOWN_MODELS))
        raise CommandError(
            f"--model {model}: no such folder; known names are: {known}; ORG/NAME is fetched from the hub"
        )
    check_folder(folder, model, needs_weights)
    return ModelFolder(folder, folder.name)


def check_folder(folder: Path, model: str, needs_weights: bool = True) -> None:
    """`CommandError` unless the folder looks like a HuggingFace checkpoint with safetensors."""
    config = folder / "config.json"
    try:
        json.loads(config.read_text())
    except OSError as error:
        raise CommandError(f"--model {model}: cannot read {config}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"--model {model}: {config} is not JSON: {error}") from None
    if needs_weights and not any(folder.glob("*.safetensors")):
        raise CommandError(f"--model {model}: {folder} holds no *.safetensors")


def _from_hub(model: str, say: Say) -> ModelFolder:
    """A snapshot from the HuggingFace hub; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    say(f"model {model}: looking at the hub")
    try:
        path = snapshot_download(repository, revision=revision or None, allow_patterns=HUB_PATTERNS)
    except LocalEntryNotFoundError as error:
        raise CommandError(
            f"--model {model}: not in the local cache, and the hub cannot be reached: {one_line(error)}"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CommandError(f"--model {model}: {one_line(error)}") from None
    folder = Path(path)
    check_folder(folder, model)
    say(
        f"model {repository} at revision {folder.name}"
        + ("" if revision else f"; pin it with {repository}@{folder.name}")
    )
    return ModelFolder(folder, repository)


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
