"""Count the branches on kinds of devices that the tests on simulated GPUs execute, and write docs/data/accelerator.json.

python tools/measure/accelerator.py [FILE]

It installs coverage.py into out/coverage. Looked at are tests of the engine and of ComfyUI on simulated GPUs, and some on a CPU,
since a branch has two ways.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out" / "coverage"
TESTS = (
    ("-m", "pytest", "-q", "-m", "not slow", "tests/simulated"),
    ("tests/host/run.py", "-q", "-m", "not slow", "tests/simulated/host"),
    ("-m", "pytest", "-q", "-m", "not slow and not timing", "tests/engine/test_exact.py", "tests/engine/rank"),
)
# all branches of these, and of the others those whose line names what depends on the device
ROOMS = ("engine/accelerator.py", "engine/rank/links.py", "engine/rank/staging.py", "host/workers/links.py")
BESIDE = (
    "engine/devices.py",
    "engine/inputs.py",
    "engine/telemetry.py",
    "engine/rank/call_log.py",
    "engine/rank/message_loop.py",
    "engine/rank/transport.py",
    "host/workers/memory.py",
    "host/workers/pool.py",
)
ON_DEVICES = re.compile(r"device|accelerator|\bdirect\b|\.kind\b")
SETTINGS = f"""[run]
branch = true
parallel = true
source = {ROOT / "asyncdiff_nodes"}
data_file = {OUT / "data"}
patch = _exit
concurrency =
    thread
    multiprocessing
sigterm = true
"""


def main() -> None:
    """Run the tests, and count."""
    from asyncdiff_nodes.cli.report import write_json

    file = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "docs" / "data" / "accelerator.json")
    environment = watched()
    for test in TESTS:
        subprocess.run([sys.executable, *test], cwd=ROOT, env=environment, check=True)
    files = counted(environment)
    rows = [row(name, files.get(f"asyncdiff_nodes/{name}")) for name in (*ROOMS, *BESIDE)]
    total = {key: sum(each[key] for each in rows) for key in ("branches", "branches_executed")}
    write_json(file, {**total, "rows": rows}, "python tools/measure/accelerator.py")
    for each in rows:
        print(f"{each['branches_executed']:4} of {each['branches']:4}  {each['file']}", *each["missing"], sep="\n      ")


def watched() -> dict[str, str]:
    """Return an environment in which every Python process says which branches it took."""
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "begin").mkdir(parents=True)
    (OUT / "begin" / "sitecustomize.py").write_text("import coverage\ncoverage.process_startup()\n", encoding="utf-8")
    (OUT / "settings").write_text(SETTINGS, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(OUT / "lib"), "coverage>=7.10"], check=True)
    path = [str(OUT / "begin"), str(OUT / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "COVERAGE_PROCESS_START": str(OUT / "settings")}


def counted(environment: dict[str, str]) -> dict[str, Any]:
    """Return what coverage.py says of each file."""
    environment = {name: value for name, value in environment.items() if name != "COVERAGE_PROCESS_START"}
    for words in (["combine", "--quiet"], ["json", "--quiet", "-o", str(OUT / "found.json")]):
        command = [sys.executable, "-m", "coverage", *words, "--rcfile", str(OUT / "settings")]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return json.loads((OUT / "found.json").read_text(encoding="utf-8"))["files"]


def on_devices(line: str) -> bool:
    """Whether a branch depends on the device that there is, not on whether it is another machine's."""
    return ON_DEVICES.search(line) is not None and "on_cluster" not in line


def row(name: str, found: dict[str, Any] | None) -> dict[str, Any]:
    """Count the branches of one file; ``missing`` are the lines that they begin in."""
    lines = (ROOT / "asyncdiff_nodes" / name).read_text(encoding="utf-8").splitlines()
    taken, missing = (
        [first for first, _ in (found or {}).get(kind, ()) if name in ROOMS or on_devices(lines[first - 1])]
        for kind in ("executed_branches", "missing_branches")
    )
    return {
        "file": name,
        "branches": len(taken) + len(missing),
        "branches_executed": len(taken),
        "missing": [f"{number}: {lines[number - 1].strip()}" for number in sorted(missing)],
    }


if __name__ == "__main__":
    main()
