"""The pictures of the shared workflows in ComfyUI's template browser: graph and title, and for the demo what it draws."""

import base64
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from frontend import Frontend
from playwright.sync_api import Browser

from asyncdiff_nodes.cli.comfyui import Server

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "host"))

from helpers import checkpoints  # noqa: E402

SIZE = 512  # of the square that a card of the template browser is
MARGIN = 20
QUIET = {"Comfy_Graph_CanvasInfo": False, "Comfy_Graph_CanvasMenu": False}
# corner of the graph to the corner of the page; answers where it lies there
PLACE = """([x, y]) => {
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [-x, -y];
  app.canvas.setDirty(true, true);
  return app.canvasPosToClientPos([x, y]);
}"""
# the title is below, since the template browser lays a badge over the upper left corner
CARD = """<style>
  body { margin: 0; height: 100vh; box-sizing: border-box; padding: 14px 10px; background: #18181b; color: #fff;
    display: flex; flex-direction: column; justify-content: space-evenly; align-items: center; font: 600 36px Inter, sans-serif; }
  .graph { width: 100%%; min-height: 0; object-fit: contain; }
  .drawn img { width: 114px; margin: 0 3px; border-radius: 6px; }
</style><img class="graph" src="%s"><div class="drawn">%s</div><div>%s</div>"""


def take(server: Server, browser: Browser) -> None:
    """Write ``workflows/NAME.jpg`` for each workflow."""
    checkpoints.place_empty(server.base / "models")
    shutil.copy(Path(os.environ["ASYNCDIFF_HOST_UNDER_TEST"]) / "input" / "example.png", server.base / "input")
    frontend = Frontend(server, browser, 2700, 1800, **QUIET)
    frontend.execute("Workspace.ToggleFocusMode")
    card = browser.new_page(viewport={"width": SIZE, "height": SIZE})
    for path in sorted(checkpoints.WORKFLOWS.glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
        workflow["nodes"].remove(note)
        frontend.load(workflow)
        graph = _graph(frontend, workflow["groups"])
        drawn = _drawn(server, frontend.run()) if path.stem == "asyncdiff_demo" else []
        title = note["widgets_values"][0].splitlines()[0].lstrip("# ")
        card.set_content(CARD % (graph, "".join(f'<img src="{picture}">' for picture in drawn), title))
        card.screenshot(path=path.with_suffix(".jpg"), type="jpeg", quality=88)
    card.close()
    frontend.close()


def _graph(frontend: Frontend, groups: list[dict[str, Any]]) -> str:
    """Everything that lies in groups."""
    boxes = [group["bounding"] for group in groups]
    left, top = (min(box[axis] for box in boxes) - MARGIN for axis in (0, 1))
    right, bottom = (max(box[axis] + box[axis + 2] for box in boxes) + MARGIN for axis in (0, 1))
    x, y = frontend.page.evaluate(PLACE, [left, top])
    frontend.page.wait_for_timeout(1000)  # pictures in nodes are loaded
    return _url(frontend.page.screenshot(clip={"x": x, "y": y, "width": right - left, "height": bottom - top}))


def _drawn(server: Server, history: dict[str, Any]) -> list[str]:
    """The pictures that a run has saved."""
    images = [image for output in history["outputs"].values() for image in output.get("images", [])]
    return [_url((server.base / "output" / image["filename"]).read_bytes()) for image in images if image["type"] == "output"]


def _url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
