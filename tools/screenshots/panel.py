"""The panel in mid-run, in dark and light themes, and after the run: docs/images/panel*.png."""

import re
import time
from pathlib import Path

from frontend import Frontend

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "asyncdiff_demo.json"


def take(server, browser) -> None:
    """Run the demo workflow with more steps, so that there is time to look."""
    for theme in ("dark", "light"):
        frontend = Frontend(server, browser, Comfy_ColorPalette=theme)
        frontend.load(WORKFLOW)
        steps = "app.graph.nodes.find(n => n.type === 'AsyncDiffKSampler').widgets.find(w => w.name === 'steps').value = 60"
        frontend.page.evaluate(steps)
        frontend.execute("Workspace.ToggleBottomPanelTab.asyncdiff")
        frontend.execute("Comfy.Canvas.FitView")
        if theme == "dark":
            frontend.run()  # so that the workers are warm
        prompt = frontend.queue()
        frontend.page.get_by_text(re.compile("step 1[0-4] of 60")).first.wait_for()
        frontend.page.screenshot(path=IMAGES / f"panel-{theme}.png")
        while not server.get(f"/history/{prompt}"):
            time.sleep(0.2)
        if theme == "dark":
            frontend.page.get_by_text("Last run").wait_for()
            frontend.page.wait_for_timeout(500)
            frontend.page.locator(".asyncdiff-panel").screenshot(path=IMAGES / "panel-done.png")
        print(frontend.troubles)
        frontend.close()
