"""Numbers on disk with where they come from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from .machine import machine


def write_json(path: str, result: dict[str, Any], invocation: str) -> None:
    """Write ``result`` with the command, the commit and the machine it was made by."""
    record = {"command": invocation, "commit": _commit(), "machine": machine(), **result}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if changed.stdout.strip() else "")
