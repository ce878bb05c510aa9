"""Each node of the pack alone, as its page of help shows it."""

from pathlib import Path

from frontend import PACK_FOLDER, Frontend, Server
from playwright.sync_api import Browser

IMAGES = Path(__file__).resolve().parents[2] / "js" / "docs" / "images"
OURS = "pack => Object.values(LiteGraph.registered_node_types).filter(t => t.nodeData?.python_module === pack).map(t => t.type)"
# alone in the middle, and not selected; returns where it is on the page
PLACE = """async name => {
  const { graph, canvas } = window.app;
  graph.clear();
  const node = LiteGraph.createNode(name);
  graph.add(node);
  node.setSize([310, node.computeSize()[1]]);
  node.badges = [];
  canvas.deselectAll();
  canvas.ds.scale = 1;
  canvas.ds.offset = [500, 250];
  canvas.setDirty(true, true);
  await new Promise(done => setTimeout(done, 300));
  const area = canvas.canvas.getBoundingClientRect();
  const [x, y, width, height] = node.boundingRect;
  return { x: area.x + 500 + x, y: area.y + 250 + y, width, height };
}"""
MARGIN = 6


def take(server: Server, browser: Browser) -> None:
    """Write ``js/docs/images/<node id>.png``."""
    frontend = Frontend(server, browser)
    for name in frontend.page.evaluate(OURS, f"custom_nodes.{PACK_FOLDER}"):
        box = frontend.page.evaluate(PLACE, name)
        clip = {key: box[key] + (-MARGIN if key in "xy" else 2 * MARGIN) for key in box}
        frontend.page.screenshot(path=IMAGES / f"{name}.png", clip=clip)
    frontend.close()
