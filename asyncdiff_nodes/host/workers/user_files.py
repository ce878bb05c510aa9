"""What this pack keeps in the user's folder of ComfyUI: small JSON files, which may be lost without harm."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import folder_paths

log = logging.getLogger(__name__)


def load(name: str) -> dict[str, Any]:
    """The entries of the file ``name``; none where there is no such file, or one that cannot be read."""
    path = path_of(name)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("AsyncDiff: could not read %s, so what is in it is found out again: %s", path, error)
        return {}
    return entries if isinstance(entries, dict) else {}


def save(name: str, entries: dict[str, Any], most: int) -> None:
    """Write the latest entries, at most so many. Never raises.

    The file is written at once or not at all: a host that is killed meanwhile leaves the old one.
    """
    try:
        _write(path_of(name), dict(list(entries.items())[-most:]))
    except OSError as error:
        log.warning("AsyncDiff: could not save %s: %s", name, error)


def path_of(name: str) -> Path:
    """The file ``name``."""
    return Path(folder_paths.get_user_directory(), "__asyncdiff", f"{name}.json")  # "__": never served to pages


def _write(path: Path, entries: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(entries, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
