"""What docs/security.md promises of the code itself: what it never does, wherever it is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = [ROOT / "__init__.py", *sorted((ROOT / "asyncdiff_nodes").rglob("*.py"))]
# where bytes may become objects: from pipes that our own processes inherited, in both directions
UNPICKLES = {"engine/wire.py", "engine/rank/message_loop.py"}
# where objects become bytes only: a model's skeleton, and what is handed to Ray, which unpickles on its own channels
PICKLES = {"engine/parent/pickled.py", "cluster/parcel.py"}
# the command line starts ComfyUI, asks its Python for its version, and asks git for the commit; the page's self-test is a command
STARTS = {"cli/comfyui.py", "cli/report.py", "host/page/selftest.py"}


def name_of(path):
    return path.relative_to(ROOT).as_posix().removeprefix("asyncdiff_nodes/")


def dotted(node):
    """``a.b.c`` of an expression that is such a name, else an empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}" if dotted(node.value) else ""
    return node.id if isinstance(node, ast.Name) else ""


def calls(path):
    return [dotted(node.func) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_is_executed_downloaded_or_unpickled(path):
    """Neither text nor bytes from anywhere become code; the registry forbids eval, exec and pip besides."""
    found, modules = set(calls(path)), imports(path)
    assert not found & {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    assert not {call for call in found if re.search(r"(^|\.)(torch\.load|pickle\.Unpickler|marshal\.loads?)$", call)}
    assert not modules & {"marshal", "shelve", "dill", "cloudpickle", "joblib", "requests", "httpx", "huggingface_hub", "pip"}
    if name_of(path) not in UNPICKLES:
        assert "pickle" not in modules or (name_of(path) in PICKLES and "pickle.loads" not in found)
    if name_of(path) not in STARTS:
        assert "subprocess" not in modules and not any("create_subprocess" in call for call in found)
    if name_of(path) != "cli/comfyui.py":  # which asks the ComfyUI that it has started itself, on loopback
        assert not modules & {"urllib.request", "http.client", "ftplib", "socketserver", "http.server"}


def test_the_two_places_that_unpickle_read_their_own_pipes():
    """A skeleton is part of the first message of such a pipe."""
    found = {name_of(path): calls(path).count("pickle.loads") for path in SHIPPED if "pickle.loads" in calls(path)}
    assert found == {"engine/wire.py": 1, "engine/rank/message_loop.py": 1}
    names = "engine/wire.py", "engine/rank/message_loop.py"
    wire, loop = ((ROOT / "asyncdiff_nodes" / name).read_text(encoding="utf-8") for name in names)
    assert "pickle.loads((yield from _header(conn, wait)))" in wire
    assert set(re.findall(r"pickle\.loads\((.*?)\)", loop)) == {"boot.skeleton"}


def test_ray_is_imported_where_a_cluster_is_asked_for_and_nowhere_else():
    """Its channels are Ray's to guard: nobody who has not named a device of a cluster has them."""
    found = {name_of(path) for path in SHIPPED if any(re.match(r"ray(\.|$)", module) for module in imports(path))}
    assert found and all(name.startswith("cluster/") for name in found)
    by_name = [path for path in SHIPPED if re.search(r"^(from|import) .*\bcluster\b", path.read_text(encoding="utf-8"), re.M)]
    assert not [path for path in by_name if not name_of(path).startswith("cluster/")], "imported with the pack"


def test_routes_open_no_file():
    """What a request says is never a path."""
    path = ROOT / "asyncdiff_nodes" / "host" / "page" / "routes.py"
    text = path.read_text(encoding="utf-8")
    assert not [
        call for call in calls(path) if call.rpartition(".")[2] in ("open", "Path", "read_text", "read_bytes", "FileResponse")
    ]
    ours = [("get", "/asyncdiff/state"), ("post", "/asyncdiff/stop"), ("post", "/asyncdiff/selftest")]
    assert re.findall(r"routes\.(\w+)\(\"([^\"]*)\"", text) == ours


@pytest.mark.parametrize("path", sorted((ROOT / "js").glob("*.js")), ids=lambda path: path.name)
def test_the_page_makes_no_markup_and_no_code_of_text(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://(?!www\.w3\.org)", text
    )


def test_every_dependency_has_a_floor():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert required and all(re.fullmatch(r"[\w-]+>=[\d.]+", line) for line in required)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.search(r"\[project\.optional-dependencies\](.*?)\n\[", project, re.DOTALL)[1]
    assert all(re.match(r"[\w-]+>=[\d.]+", name) for name in re.findall(r'"([^"]+)"', extras))


def test_workflows_hold_data_only():
    """No link, no path, nothing that a node of ours would fetch or run."""
    for path in (ROOT / "workflows").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\.\./|[A-Za-z]:\\\\|/home/|/root/|<script", text), path.name
