"""The panel in mid-run, in the dark and the light theme, and after a run: docs/images/panel*.png."""

import re
from pathlib import Path

from frontend import Frontend, Server
from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
# a batch whose steps are long beside what the page itself costs two cores; the sampler and the pictures are above the panel
PREPARE = """() => {
  const { graph, canvas } = window.app;
  const set = (type, name, value) => {
    graph.nodes.find((node) => node.type === type).widgets.find((widget) => widget.name === name).value = value;
  };
  set("EmptyChromaRadianceLatentImage", "batch_size", 16);
  set("AsyncDiffKSampler", "steps", 30);
  canvas.ds.scale = 0.72;
  const [x, y] = graph.nodes.find((node) => node.type === "AsyncDiffOptions").pos;
  canvas.ds.offset = [150 - x, 110 - y];
  canvas.setDirty(true, true);
}"""


def take(server: Server, browser: Browser) -> None:
    """Run the demo workflow with warm workers."""
    for theme in ("dark", "light"):
        frontend = Frontend(server, browser, height=1020, Comfy_ColorPalette=theme)
        frontend.load(ROOT / "workflows" / "asyncdiff_demo.json")
        frontend.page.evaluate(PREPARE)
        frontend.execute("Workspace.ToggleBottomPanelTab.asyncdiff")
        if theme == "dark":
            frontend.run()
        frontend.queue()
        frontend.page.get_by_text(re.compile("step 1[0-4] of 30 · asynchronous")).wait_for()
        frontend.page.screenshot(path=IMAGES / f"panel-{theme}.png")
        frontend.page.get_by_text("Last run").wait_for()
        if theme == "dark":
            frontend.page.wait_for_timeout(500)
            frontend.page.locator(".asyncdiff-panel").screenshot(path=IMAGES / "panel-done.png")
        frontend.close()
