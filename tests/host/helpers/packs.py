"""Node packs of others, as the host loads them: from ``$ASYNCDIFF_PACKS``, its ``custom_nodes``, or ``packs`` beside it."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nodes
import pytest

_HOST = Path(nodes.__file__).resolve().parent
_FOLDERS = [*map(Path, filter(None, [os.environ.get("ASYNCDIFF_PACKS")])), _HOST / "custom_nodes", _HOST.parent / "packs"]


def place_of(name):
    """Where the pack ``name`` lies; None if it does not."""
    return next((folder / name for folder in _FOLDERS if (folder / name).is_dir()), None)


def needs(name):
    """The mark of tests that are skipped without the pack ``name``."""
    return pytest.mark.skipif(place_of(name) is None, reason=f"no {name}: set ASYNCDIFF_PACKS to the folder that it lies in")


def loaded(folder):
    """All nodes, among them those of the pack in ``folder``."""
    with ThreadPoolExecutor(1) as thread:  # this one may have a browser's loop
        assert thread.submit(asyncio.run, nodes.load_custom_node(str(folder))).result()
    return nodes.NODE_CLASS_MAPPINGS
