"""What a release consists of: one version in every place, what is installed, what the registry's archive holds."""

import ast
import re
import subprocess
from pathlib import Path

import asyncdiff_nodes

ROOT = Path(__file__).resolve().parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def git(*arguments):
    found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return set(found.stdout.split("\n")) - {""}


def test_one_version():
    # as publish.yml finds it
    assert re.findall(r'^version = "([^"]*)"', read("pyproject.toml"), re.MULTILINE) == [asyncdiff_nodes.__version__]
    assert re.search(r"^## \[([\d.]+)\]", read("CHANGELOG.md"), re.MULTILINE)[1] == asyncdiff_nodes.__version__


def test_torch_is_never_installed():
    required = re.findall(r"^[\w-]+", read("requirements.txt"), re.MULTILINE)
    assert "diffusers" in required
    assert not [name for name in required if name.startswith(("torch", "xformers", "nvidia"))]


def test_nothing_needs_what_only_some_systems_have():
    """Windows and macOS: their modules, and calls of ``os`` and ``signal``, but where both ways are there and tested."""
    modules = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "msvcrt", "winreg", "_winapi"}
    calls = {
        "fork",
        "forkpty",
        "getuid",
        "geteuid",
        "killpg",
        "setsid",
        "mkfifo",
        "readv",
        "writev",
        "uname",
        "sched_getaffinity",
    }
    calls |= {"SIGKILL", "SIGSTOP", "SIGCONT", "SIGHUP", "SIGALRM", "SIGUSR1", "pthread_kill"}
    found, started = set(), set()
    for path in (ROOT / "asyncdiff_nodes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                found |= {(path.name, name) for name in names if name in modules}
            elif isinstance(node, ast.Attribute) and node.attr in calls:
                found.add((path.name, node.attr))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get_context":
                started.add(ast.literal_eval(node.args[0]))
    assert found == {("wire.py", "readv"), ("wire.py", "writev")}  # tests/engine/test_wire.py
    assert started == {"spawn"}


def test_the_archive_holds_what_runs():
    files = git("ls-files", "--cached", "--others", "--exclude-standard")
    ignored = git("ls-files", "--cached", "--others", "--ignored", "--exclude-from=.comfyignore") & files
    packed = {path: (ROOT / path).stat().st_size for path in files - ignored if (ROOT / path).exists()}
    folders = {path.split("/")[0] for path in packed if "/" in path}
    assert folders == {"asyncdiff_nodes", "docs", "js", "locales", "workflows"}
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md"} <= set(packed)
    unused = {path for path in ignored if path.startswith(("asyncdiff_nodes/", "js/", "locales/", "workflows/"))}
    assert unused == {path for path in files if path.startswith("asyncdiff_nodes/demo/weights/transformer/")}
    assert sum(packed.values()) < 15 * 2**20  # most of it is the demo model
