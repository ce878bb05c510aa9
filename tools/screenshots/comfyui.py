"""The demo workflow after a run, with nothing else open: docs/images/comfyui.png."""

from pathlib import Path

from frontend import Frontend, Server
from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]


def take(server: Server, browser: Browser) -> None:
    """The second run, whose workers are warm."""
    frontend = Frontend(server, browser, width=1680, height=940)
    frontend.load(ROOT / "workflows" / "asyncdiff_demo.json")
    frontend.run()
    frontend.run()
    frontend.execute("Comfy.Canvas.FitView")
    frontend.page.wait_for_timeout(1500)
    frontend.page.screenshot(path=ROOT / "docs" / "images" / "comfyui.png")
    frontend.close()
