"""The commands that exchange KSampler and KSampler (AsyncDiff), in the page."""

import json
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[2] / "js" / "fixtures"  # their contents are said in replace.test.mjs
REPLACE, RESTORE = "AsyncDiff.ReplaceKSamplers", "AsyncDiff.RestoreKSamplers"
VUE = "Comfy.VueNodes.Enabled"


def read(name):
    return json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))


def settled(frontend):
    """The workflow as the page saves it, when it changes no more: sizes are measured after a while."""
    before, after = None, frontend.serialize()
    while after != before:
        frontend.page.wait_for_timeout(200)
        before, after = after, frontend.serialize()
    return after


def show(frontend, name):
    """Load a workflow; returns it as the page saves it, and as the server runs it."""
    frontend.load(read(name))
    return settled(frontend), frontend.prompt()


def execute(frontend, command):
    frontend.execute(command)
    return settled(frontend)


def nodes(workflow):
    inner = workflow.get("definitions", {}).get("subgraphs", [])
    return {node["id"]: node for graph in (workflow, *inner) for node in graph["nodes"]}


def types(workflow):
    return sorted(node["type"] for node in nodes(workflow).values() if "KSampler" in node["type"])


def stock(prompt):
    """A prompt with stock samplers, and without titles: those that the user did not change follow the type."""
    return {
        name: {"class_type": node["class_type"].replace("AsyncDiffKSampler", "KSampler"), "inputs": node["inputs"]}
        for name, node in prompt.items()
    }


@pytest.mark.slow
def test_the_self_test_shows_its_result(frontend):
    """It takes more than a minute on CPUs."""
    frontend.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    frontend.execute("AsyncDiff.SelfTest")
    dialog = frontend.page.get_by_role("dialog").and_(frontend.page.locator(".asyncdiff-selftest"))
    dialog.wait_for(timeout=300_000)
    text = dialog.get_by_role("textbox").input_value()
    assert text.startswith("Self-test on cpu, cpu") and "| exact | FLUX-like, bfloat16 | bit for bit | good |" in text
    dialog.get_by_role("button", name="Copy").click()
    dialog.get_by_role("button", name="Copied").wait_for()
    assert frontend.page.evaluate("() => navigator.clipboard.readText()") == text
    dialog.get_by_role("button", name="Close").click()
    assert dialog.count() == 0


def press(frontend, keys, expected):
    """Press keys, and wait until there are such samplers."""
    assert types(frontend.serialize()) != expected
    frontend.page.mouse.click(700, 880)  # on nothing: the page looks whether the graph has changed, and it has not
    frontend.page.keyboard.press(keys)
    for _ in range(600):  # a busy machine takes its time to load the graph anew
        if types(frontend.serialize()) == expected:
            return settled(frontend)
        frontend.page.wait_for_timeout(50)
    pytest.fail(f"{keys} does not lead to {expected}")


def toasts(frontend):
    """The texts of all toasts, which go away."""
    shown = frontend.page.locator(".p-toast-message:not([class*=leave]) .p-toast-detail")
    shown.first.wait_for()
    texts = shown.all_text_contents()
    frontend.page.evaluate("() => window.app.extensionManager.toast.removeAll()")
    return texts


@pytest.fixture(autouse=True)
def warnings(frontend):
    """The page warns of what it will drop."""
    heard = []
    listen = lambda message: heard.append(message.text)  # noqa: E731
    frontend.page.on("console", listen)
    yield
    frontend.page.remove_listener("console", listen)
    assert not [text for text in heard if "deprecat" in text.lower()]


@pytest.fixture(params=["canvas", "nodes 2.0"])
def renderer(request, choose):
    """Both ways in which the page draws nodes."""
    choose(VUE, request.param == "nodes 2.0")


def test_there_and_back(frontend, renderer):
    before, prompt = show(frontend, "nodes-1.27.10")
    stocks, ours = types(before), ["AsyncDiffKSampler", "AsyncDiffKSampler", "AsyncDiffKSamplerAdvanced"]
    after = execute(frontend, REPLACE)
    assert types(after) == ours
    assert toasts(frontend) == ["3 samplers replaced. Press Ctrl+Z to undo."]

    replaced = frontend.prompt()
    assert sorted(node["class_type"] for node in replaced.values() if "KSampler" in node["class_type"]) == ours[1:]
    assert stock(replaced) == stock(prompt)
    for name, node in nodes(before).items():
        new = nodes(after)[name]
        for key in {*node, *new} - {"type", "inputs", "size"}:
            assert new.get(key) == node.get(key), (name, key)
        assert [slot for slot in new["inputs"] if slot["name"] != "options"] == node["inputs"]
    for key in ("groups", "extra", "last_node_id", "last_link_id"):
        assert after[key] == before[key]

    assert press(frontend, "Control+z", stocks) == before
    assert press(frontend, "Control+y", ours) == after
    assert execute(frontend, RESTORE) == before
    assert toasts(frontend) == ["3 samplers replaced. Press Ctrl+Z to undo."]


def test_subgraphs_and_options(frontend):
    before, prompt = show(frontend, "subgraph-1.49.6")
    assert types(execute(frontend, REPLACE)) == ["AsyncDiffKSampler", "AsyncDiffKSampler", "AsyncDiffKSamplerAdvanced"]
    assert stock(frontend.prompt()) == stock(prompt)
    assert execute(frontend, RESTORE) == before

    # the same with options for two of the three, in the fixture
    linked, with_options = show(frontend, "options-1.49.6")
    assert sum("options" in node["inputs"] for node in with_options.values()) == 2
    execute(frontend, RESTORE)
    without = frontend.prompt()
    assert {name: node for name, node in stock(without).items() if node["class_type"] != "AsyncDiffOptions"} == stock(prompt)
    assert len(without) == len(prompt) + 1, "the Options node is gone"
    assert press(frontend, "Control+z", types(linked)) == linked
    toasts(frontend)


def test_selection_in_an_open_subgraph(frontend):
    page = frontend.page
    show(frontend, "subgraph-1.49.6")
    page.evaluate("""() => {
      const { app } = window;
      const node = app.graph.nodes.find((node) => node.isSubgraphNode?.());
      app.canvas.openSubgraph(node.subgraph, node);
    }""")
    page.wait_for_timeout(600)  # it is fitted into the view
    view = """() => {
      const { canvas } = window.app;
      const names = [...canvas.selectedItems].map((node) => node.type);
      return [canvas.subgraph?.id, canvas.ds.scale, ...canvas.ds.offset, names];
    }"""
    page.evaluate("""() => {
      const { canvas } = window.app;
      [canvas.ds.scale, canvas.ds.offset] = [0.9, [-200, 50]];
      canvas.selectItems([canvas.graph.nodes.find((node) => node.type === "KSamplerAdvanced")]);
    }""")
    before, seen = settled(frontend), page.evaluate(view)
    after = execute(frontend, REPLACE)
    assert types(after) == ["AsyncDiffKSamplerAdvanced", "KSampler", "KSampler"]
    assert page.evaluate(view) == [*seen[:-1], ["AsyncDiffKSamplerAdvanced"]]
    assert toasts(frontend) == ["1 sampler replaced. Press Ctrl+Z to undo."]

    # the selected one is replaced already, and the others were not asked for
    assert execute(frontend, REPLACE) == after
    [text] = toasts(frontend)
    assert text.startswith("There is no KSampler or KSampler (Advanced) in the selection. Select other nodes, or clear ")
    assert press(frontend, "Control+z", types(before)) == before
    assert page.evaluate(view)[:-1] == seen[:-1]
    # what was undone before another change cannot be done again
    execute(frontend, REPLACE)
    assert page.evaluate("() => window.app.extensionManager.workflow.activeWorkflow.changeTracker.redoQueue.length") == 0
    toasts(frontend)


def test_menus(frontend, renderer):
    frontend.needs(1, 28)  # before, it asks no pack for entries
    page = frontend.page
    show(frontend, "nodes-1.27.10")
    frontend.execute("Comfy.Canvas.FitView")
    page.wait_for_timeout(300)
    title = page.evaluate("""() => {
      const { canvas, graph } = window.app;
      const [x, y] = graph.nodes.find((node) => node.type === "KSampler").pos;
      const area = canvas.canvas.getBoundingClientRect();
      return canvas.ds.convertOffsetToCanvas([x + 80, y - 12]).map((part, i) => part + (i ? area.y : area.x));
    }""")
    page.mouse.click(*title, button="right")
    page.get_by_text("Replace KSampler by AsyncDiff").and_(page.locator(":not(.p-tooltip-text)")).click()
    toasts(frontend)
    assert types(frontend.serialize()) == ["AsyncDiffKSampler", "KSampler", "KSamplerAdvanced"]
    # it is selected still, and its toolbox has the way back
    page.locator(".selection-toolbox .pi-arrow-right-arrow-left").click()
    toasts(frontend)
    assert types(frontend.serialize()) == ["KSampler", "KSampler", "KSamplerAdvanced"]


def test_nothing_to_replace(frontend):
    before, _ = show(frontend, "options-1.49.6")
    assert execute(frontend, REPLACE) == before
    [text] = toasts(frontend)
    assert text.startswith("There is no KSampler or KSampler (Advanced) in this workflow. For other samplers, put AsyncDiff ")
