"""`python -m twostroke_cli.fetch`: one revision of a model on the hub into a folder, whole or not at all.

For init containers: it needs huggingface_hub alone, which the router's image has. Those of several pods may fetch into
one shared volume at once: one works, the others wait for it. A fetch that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from twostroke_cli.errors import CommandError
from twostroke_cli.models import HUB_PATTERNS, check_folder, one_line
from twostroke_cli.pull import locked

PROG = "twostroke-fetch"
WEIGHTS = "*.safetensors"


def fetch(repository: str, revision: str, folder: Path, *, needs_weights: bool = True) -> bool:
    """Brings a snapshot into `folder`; False if it was there already.

    A folder that exists is whole: it is renamed into place as the last step. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
    mean what they mean to huggingface_hub.

    Raises:
        CommandError: there is no such revision, the hub cannot be reached, or the folder cannot be written.
    """
    model = f"{repository}@{revision}"
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_name(f".{folder.name}.lock")):
                if not folder.is_dir():
                    _download(repository, revision, folder, needs_weights)
                    return True
    except OSError as error:
        raise CommandError(f"model {model}: {error.strerror or error}: {error.filename or folder}") from None
    check_folder(folder, model, needs_weights)
    return False


def _download(repository: str, revision: str, folder: Path, needs_weights: bool) -> None:
    """Fetches into a folder beside, which stays if this is cut off, and renames it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    model = f"{repository}@{revision}"
    part = folder.with_name(f".{folder.name}.part")
    if part.is_symlink():  # on a shared volume: not into what someone else points at
        raise CommandError(f"model {model}: {part} is a link")
    patterns = [pattern for pattern in HUB_PATTERNS if needs_weights or pattern != WEIGHTS]
    try:
        snapshot_download(repository, revision=revision, local_dir=part, allow_patterns=patterns)
    except LocalEntryNotFoundError as error:
        raise CommandError(
            f"model {model}: not in {folder}, and the hub cannot be reached: {one_line(error)}"
        ) from None
    except (HfHubHTTPError, HFValidationError, ValueError) as error:
        raise CommandError(f"model {model}: {one_line(error)}") from None
    check_folder(part, model, needs_weights)
    shutil.rmtree(part / ".cache", ignore_errors=True)
    os.rename(part, folder)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(PROG, description="Fetches one revision of a model into a folder, once.")
    parser.add_argument("--repository", required=True, help="ORG/NAME on the hub")
    parser.add_argument("--revision", required=True, help="commit, tag or branch; only a commit never moves")
    parser.add_argument("--dir", required=True, type=Path, help="where the model shall be; its parent is made")
    parser.add_argument("--without-weights", action="store_true", help="configuration and tokenizer alone")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches; returns the exit status."""
    asked = _parse(sys.argv[1:] if argv is None else argv)
    try:
        is_new = fetch(asked.repository, asked.revision, asked.dir, needs_weights=not asked.without_weights)
    except CommandError as error:
        sys.stderr.write(f"{PROG}: {error}\n")
        return 1
    print(f"{asked.repository}@{asked.revision} {'is now' if is_new else 'was already'} in {asked.dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
