"""Run the fast tests with other versions of Python, PyTorch and ComfyUI, and write FILE.

python tools/measure/compatibility.py [--comfyui FOLDER ...] [--collect] [FILE]

The engine's tests by nox (``noxfile.py``), with each Python that is installed; the host's in each FOLDER, by its own Python or
that in ``$COMFYUI_PYTHON``. Each run leaves a report in out/compatibility; with ``--collect`` nothing else is run. What FILE has
of versions without a report stays. Needs ``pip install nox``. Then python tools/measure/tables.py for the page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from asyncdiff_nodes.cli.comfyui import find_python
from asyncdiff_nodes.cli.report import write_json

ROOT = Path(__file__).resolve().parents[2]
VERSIONED = ("comfyui", "python", "torch")
REPORTS = ROOT / "out" / "compatibility"
VERSIONS = (
    "import comfyui_version, platform, torch; print(comfyui_version.__version__, platform.python_version(), torch.__version__)"
)


def run(hosts: Sequence[Path]) -> None:
    """All of them, one after the other; the versions are in the reports' names."""
    subprocess.run([sys.executable, "-m", "nox", "--reuse-existing-virtualenvs"], cwd=ROOT, check=False)
    for comfyui in hosts:
        ask = [find_python(comfyui), "-c", VERSIONS]
        told = subprocess.run(ask, cwd=comfyui, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        report = REPORTS / f"{'-'.join(['comfyui', *told])}.xml"
        command = [sys.executable, "tests/host/run.py", "-m", "not slow", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(comfyui)}, check=False)


def row_of(report: Path) -> dict[str, Any]:
    """What the tests of one run came to, by pytest's own report."""
    what, *versions = report.stem.split("-")
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    count = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "comfyui": versions.pop(0) if what == "comfyui" else "",
        "python": versions[0],
        "torch": versions[1],
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "seconds": round(float(suite.get("time"))),
    }


def age(row: dict[str, Any]) -> list[list[int]]:
    """To sort by."""
    return [[int(part) for part in row[what].split(".") if part] for what in ("comfyui", "python")]


def main() -> None:
    """Run them, unless they have been run, and collect."""
    parser = argparse.ArgumentParser(description="Run the tests with other versions.")
    parser.add_argument("--comfyui", nargs="*", default=[], type=Path)
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("file", nargs="?", default=str(ROOT / "docs" / "data" / "compatibility.json"))
    given = parser.parse_args()
    if not given.collect:
        run(given.comfyui)
    file = Path(given.file)
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    latest = {tuple(row[what] for what in VERSIONED): row for row in [*before, *map(row_of, REPORTS.glob("*.xml"))]}
    write_json(
        given.file, {"rows": sorted(latest.values(), key=age)}, "python tools/measure/compatibility.py --comfyui FOLDER ..."
    )


if __name__ == "__main__":
    main()
