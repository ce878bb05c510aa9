"""The help of a node, opened as a user does: select the node, press the button with the i."""

# where the title of the only node is on the canvas
ADD = """name => {
  const { graph, canvas } = window.app;
  graph.clear();
  const node = LiteGraph.createNode(name);
  graph.add(node);
  canvas.ds.scale = 1;
  canvas.ds.offset = [400, 300];
  canvas.draw(true, true); // only what was drawn can be clicked
  return { x: 400 + node.pos[0] + 60, y: 300 + node.pos[1] - 15 };
}"""


def open_help(frontend, name):
    """The help of a node that was put on the canvas, once its picture is there."""
    title = frontend.page.evaluate(ADD, name)
    frontend.page.locator("#graph-canvas").click(position=title)  # waits until nothing covers it
    frontend.page.get_by_test_id("info-button").click()
    content = frontend.page.locator(".node-help-content")
    picture = content.locator("img")  # by role it could be the sign that help is being loaded
    picture.wait_for()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    return content


def test_english(frontend):
    content = open_help(frontend, "AsyncDiffKSampler")
    assert content.get_by_role("heading", name="KSampler (AsyncDiff)").is_visible()
    assert content.get_by_role("cell", name="sampler_name").is_visible()
    # en.md is asked for first; the help in English is that of every language without a file
    (missing,) = frontend.troubles
    assert "404" in missing and missing.endswith("/docs/AsyncDiffKSampler/en.md")
    frontend.troubles.clear()


def test_chinese(chinese):
    content = open_help(chinese, "AsyncDiffOptions")
    assert content.get_by_role("heading", name="AsyncDiff 选项").is_visible()
    labels = chinese.page.evaluate("() => window.app.graph.nodes[0].widgets.map(widget => widget.label)")
    assert labels == [
        "预设",
        "设备",
        "分段数",
        "步幅",
        "预热",
        "时间偏移",
        "预测",
        "切分点",
        "收尾",
        "加速目标",
        "分支数",
        "ControlNet",
        "失败时",
        "压缩",
        "核对",
        "带数",
    ]
