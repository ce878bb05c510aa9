"""Run the fast tests with other versions of Python, PyTorch and ComfyUI, and write FILE.

python tools/compatibility.py [--comfyui FOLDER ...] [FILE]

The engine's tests by nox (``noxfile.py``), with each Python that is installed; the host's in each FOLDER, by its own Python or
that in ``$COMFYUI_PYTHON``. Needs ``pip install nox``. Then python tools/tables.py for the page.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from asyncdiff_nodes.cli.comfyui import find_python
from asyncdiff_nodes.cli.report import write_json

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "out" / "compatibility"
VERSIONS = (
    "import comfyui_version, platform, torch; print(comfyui_version.__version__, platform.python_version(), torch.__version__)"
)


def row(comfyui: str, python: str, torch: str, report: Path) -> dict[str, Any]:
    """What the tests with these versions came to, by pytest's own report."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    count = {what: int(suite.get(what)) for what in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    seconds = round(float(suite.get("time")))
    return {
        "comfyui": comfyui,
        "python": python,
        "torch": torch,
        "passed": passed,
        "failed": failed,
        "skipped": count["skipped"],
        "seconds": seconds,
    }


def main() -> None:
    """Run them all, one after the other."""
    parser = argparse.ArgumentParser(description="Run the tests with other versions.")
    parser.add_argument("--comfyui", nargs="*", default=[], type=Path)
    parser.add_argument("file", nargs="?", default=str(ROOT / "docs" / "data" / "compatibility.json"))
    given = parser.parse_args()
    shutil.rmtree(REPORTS, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "nox", "--reuse-existing-virtualenvs"], cwd=ROOT, check=False)
    rows = [row("", *report.stem.split("-")[1:], report) for report in REPORTS.glob("engine-*.xml")]
    for comfyui in given.comfyui:
        told = subprocess.run(
            [find_python(comfyui), "-c", VERSIONS], cwd=comfyui, capture_output=True, text=True, check=True, timeout=60
        )
        report = REPORTS / f"{comfyui.name}.xml"
        command = [sys.executable, "tests/host/run.py", "-m", "not slow", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(comfyui)}, check=False)
        rows.append(row(*told.stdout.split(), report))
    rows.sort(
        key=lambda row: [[int(part) for part in row[it].partition("+")[0].split(".") if part] for it in ("comfyui", "python")]
    )
    write_json(given.file, {"rows": rows}, "python tools/compatibility.py --comfyui FOLDER ...")


if __name__ == "__main__":
    main()
