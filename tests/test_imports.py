"""Who imports whom: one way only. Imports inside functions count, those for type checkers alone do not."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "asyncdiff_nodes"
FILES = sorted(PACKAGE.rglob("*.py"))
# the rooms of the engine: each imports those before it, and its own files
WINGS = ("shared", "planning", "rank", "parent", "above")
ABOVE = {"engine/__init__.py", "engine/simulator.py", "engine/simulated_blocks.py"}


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def room_of(name):
    """The folder or the file of the package that a file is in."""
    return name.partition("/")[0].removesuffix(".py")


def wing_of(name):
    """The room of the engine that a file of it is in."""
    parts = name.split("/")
    return "above" if name in ABOVE else parts[1] if len(parts) > 2 else "shared"


def for_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(tree):
    """All import statements that run at some time."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif for_checkers(node):
            for other in node.orelse:
                yield from statements(other)
        else:
            yield from statements(node)


def modules(path):
    """Dotted names that a file imports; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.name,)
        else:
            base = list(path.relative_to(ROOT).parent.parts)[: -node.level + 1 or None] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield base, f"{base}.{alias.name}"


def file_of(module):
    """The file of this package that has this dotted name; None if there is none."""
    path = ROOT.joinpath(*module.split("."))
    return next((name_of(each) for each in (path.with_suffix(".py"), path / "__init__.py") if each in FILES), None)


@functools.cache
def imported(path):
    """Files of the package that a file imports by name: of ``from a import b`` the file ``a.b`` if there is one, else ``a``."""
    found = (next(filter(None, map(file_of, reversed(names))), None) for names in modules(path))
    return frozenset(filter(None, found)) - {name_of(path)}


ARROWS = {name_of(path): imported(path) for path in FILES}


def circles(arrows):
    """The largest sets of files each of which leads to every other."""

    def reached(name):
        seen, ahead = set(), [name]
        while ahead:
            for other in arrows.get(ahead.pop(), ()):
                if other in arrows and other not in seen:
                    seen.add(other)
                    ahead.append(other)
        return seen

    leads_to = {name: reached(name) for name in arrows}
    found = {
        frozenset(other for other in ends if name in leads_to[other]) for name, ends in leads_to.items() if name in leads_to[name]
    }
    return sorted(map(sorted, found))


def arrows_from(rooms, to):
    return [
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        if room_of(name) in rooms
        for other in sorted(others)
        if room_of(other) in to
    ]


def test_what_the_walk_sees():
    assert ARROWS["spawned.py"] == {"engine/rank/message_loop.py"}, "inside a function"
    assert ARROWS["extensions.py"] == set(), "for type checkers only"
    assert {"models/__init__.py", "cluster/__init__.py", "extensions.py"} == ARROWS["__init__.py"]
    assert "engine/tensors.py" in ARROWS["engine/wire.py"] and "engine/errors.py" in ARROWS["engine/devices.py"], "relative"
    assert "engine/wire.py" in ARROWS["engine/rank/message_loop.py"], "a module from its package"
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": {"a"}}) == [["b", "c"], ["d"]]


def test_no_file_imports_in_a_circle():
    assert not circles(ARROWS)


def test_the_engine_imports_no_other_room():
    """But for two files at the root: where it is told of models and clusters, and where a rank begins."""
    rooms = {room_of(name) for name in ARROWS} - {"engine"}
    assert not arrows_from({"engine"}, rooms - {"extensions", "spawned"})
    assert not arrows_from({"extensions"}, rooms | {"engine"})
    assert not arrows_from({"spawned"}, rooms)


def test_the_engine_s_own_rooms_import_one_way():
    order = WINGS.index
    assert {wing_of(name) for name in ARROWS if room_of(name) == "engine"} == set(WINGS)
    assert not [
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        if room_of(name) == "engine"
        for other in sorted(others)
        if room_of(other) == "engine" and order(wing_of(other)) > order(wing_of(name))
    ]


def test_what_stands_on_the_engine_imports_nobody_above_it():
    assert not arrows_from({"models", "cluster"}, {"host", "cli", "nodes", "diffusers", "demo"})
    assert not arrows_from({"host"}, {"nodes", "cli", "diffusers"})
    assert not arrows_from({"nodes"}, {"cli", "diffusers"})


def test_only_the_host_s_side_imports_comfyui():
    found = {name_of(path) for path in FILES for names in modules(path) if is_comfyui(names[0].partition(".")[0])}
    assert {room_of(name) for name in found} == {"host", "nodes"}


def is_comfyui(module):
    others = {"execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "server"}
    return module.startswith("comfy") or module in others


def test_what_depends_on_the_kind_of_device_is_in_one_room():
    asking = re.compile(r"torch\.(cuda|xpu|npu|mps)\b|get_device_module")
    asked = [path.relative_to(PACKAGE).as_posix() for path in FILES if asking.search(path.read_text(encoding="utf-8"))]
    assert asked == ["engine/accelerator.py"]
