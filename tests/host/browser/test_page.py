"""The pack in the page."""


def test_smoke(frontend):
    assert frontend.page.evaluate("() => LiteGraph.registered_node_types['AsyncDiffKSampler'] !== undefined")
