"""Make the pictures of the documentation again, from a real ComfyUI in Chromium.

``make screenshots`` makes all; ``make screenshots ONLY="thumbnails"`` those of one module beside this file. Each module has
``take(server, browser)``, which writes its pictures where the documents expect them.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "host" / "browser"), str(ROOT)]

from frontend import launch, serve  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402


def main() -> None:
    """Run the modules that are named on the command line, or all."""
    names = sys.argv[1:] or sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    host = Path(os.environ["ASYNCDIFF_HOST_UNDER_TEST"])
    with (
        tempfile.TemporaryDirectory() as base,
        serve(host, sys.executable, Path(base)) as server,
        sync_playwright() as playwright,
    ):
        browser = launch(playwright.chromium)
        for name in names:
            print(f"pictures of {name}")
            importlib.import_module(name).take(server, browser)
        browser.close()


if __name__ == "__main__":
    main()
