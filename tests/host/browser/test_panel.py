"""The panel, the line on the node, and the toasts, while the demo model is really sampled on two CPU ranks."""

import itertools
import re

import pytest
from playwright.sync_api import expect

from asyncdiff_nodes.cli.comfyui import PACK
from helpers.serving import SEEDS, node, options, sampler

WORKFLOW = PACK / "workflows" / "asyncdiff_demo.json"
TOGGLE = "Workspace.ToggleBottomPanelTab.asyncdiff"
# per column of the timeline's pixels: is lane 0 computing, is lane 1, and is it in colours of the warm-up
PIXELS = """() => {
  const canvas = document.querySelector(".asyncdiff-timeline");
  const context = canvas.getContext("2d"), ratio = window.devicePixelRatio;
  const colours = { synchronous: [217, 144, 47], asynchronous: [31, 158, 143] };
  const kind = (x, lane) => {
    const pixel = context.getImageData(x, (lane * 44 + 9) * ratio, 1, 1).data;
    for (const [name, colour] of Object.entries(colours))
      if (pixel[3] === 255 && colour.every((part, i) => Math.abs(part - pixel[i]) < 12)) return name;
    return null;
  };
  return Array.from({ length: canvas.width }, (_, x) => [kind(x, 0), kind(x, 1)]);
}"""
CONTRAST = """selector => {
  const parse = (colour) => {
    const c = document.createElement("canvas").getContext("2d"); c.fillStyle = colour; c.fillRect(0, 0, 1, 1);
    return [...c.getImageData(0, 0, 1, 1).data]; };
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll(selector)].filter((e) => e.textContent.trim() && !e.disabled).map((e) => {
    let back = e; while (back && parse(getComputedStyle(back).backgroundColor)[3] < 255) back = back.parentElement;
    const behind = parse(back ? getComputedStyle(back).backgroundColor : "#fff");
    const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(behind)];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.className || e.textContent];
  });
}"""


def demo(frontend, steps=20, **options):
    """The demo workflow with ``steps``, another seed than before, and other options."""
    frontend.load(WORKFLOW)
    frontend.page.evaluate(
        """([steps, options]) => {
          const find = (type) => window.app.graph.nodes.find((node) => node.type === type);
          const set = (node, name, value) => { node.widgets.find((widget) => widget.name === name).value = value; };
          const sampler = find("AsyncDiffKSampler");
          set(sampler, "steps", steps);
          set(sampler, "seed", Math.floor(Math.random() * 1e9));
          for (const [name, value] of Object.entries(options)) set(find("AsyncDiffOptions"), name, value);
        }""",
        [steps, options],
    )


def recorded(run, width):
    """What each of two ranks did at the middle of each of ``width`` columns, from the records of ``run``."""
    rows = [[*row[:5], list(zip(row[5][::2], row[5][1::2], strict=True))] for row in run["records"]]
    begin, end = min(row[3] for row in rows), max(row[4] for row in rows)

    def kind(rank, when):
        for of, _, synchronous, start, stop, waits in rows:
            if of == rank and start <= when < stop and not any(a <= when < b for a, b in waits):
                return "synchronous" if synchronous else "asynchronous"

    return [[kind(rank, begin + (x + 0.5) / width * (end - begin)) for rank in (0, 1)] for x in range(width)]


def turns(run):
    """Per synchronous call, the shares of it during which both ranks computed, only rank 0, and only rank 1."""
    calls = {}
    for row in run["records"]:
        if row[2]:
            calls.setdefault(row[1], []).append(row)
    columns = [[tuple(kind is not None for kind in x) for x in recorded({"records": rows}, 1000)] for rows in calls.values()]
    return [[x.count(who) / len(x) for who in ((True, True), (True, False), (False, True))] for x in columns]


def overlaps_in_the_warm_up(run):
    """Whether the halves of a batch followed each other through the segments, and rank 0 began asynchronous calls meanwhile."""
    columns = recorded(run, 4000)
    return ["synchronous", "synchronous"] in columns and ["asynchronous", "synchronous"] in columns


def side_by_side(run):
    """The share of the asynchronous calls of rank 0 during which rank 1 computed, too."""
    columns = recorded(run, 4000)
    begin, end = min(row[3] for row in run["records"]), max(row[4] for row in run["records"])
    calls = [row for row in run["records"] if row[0] == 0 and not row[2]]
    column = [[int((row[i] - begin) / (end - begin) * 4000) for i in (3, 4)] for row in calls]
    return sum(any(None not in x for x in columns[first:last]) for first, last in column) / len(calls)


@pytest.fixture
def panel(frontend):
    """The panel, open; closed afterwards."""
    found = frontend.page.locator(".asyncdiff-panel")
    if not found.count():
        frontend.execute(TOGGLE)
    expect(found).to_be_visible()
    yield found
    if found.count():
        frontend.execute(TOGGLE)


@pytest.fixture
def sampled(frontend):
    """The last run of the server is the demo, in two segments. A panel that is opened after it shows that run and its report."""
    demo(frontend, 4)
    frontend.run()
    run = frontend.server.get("/asyncdiff/state")["run"]
    assert "plan" in run, run["notes"]


@pytest.fixture
def resize(frontend):
    """Give the window another size, for one test."""
    before = frontend.page.viewport_size
    yield frontend.page.set_viewport_size
    frontend.page.set_viewport_size(before)


def status(panel):
    return panel.locator(".asyncdiff-status")


def wait_until_done(frontend, prompt):
    while not frontend.server.get(f"/history/{prompt}"):
        frontend.page.wait_for_timeout(100)


def test_before_the_first_run_it_says_what_to_do(frontend, panel):
    frontend.server.post("/asyncdiff/stop", {})
    frontend.open()
    frontend.execute(TOGGLE)
    expect(panel.locator(".asyncdiff-workers")).to_contain_text("No workers running. ComfyUI sees no GPU that workers can use")
    expect(panel.get_by_role("button", name="Stop workers")).to_be_disabled()


@pytest.mark.timing
@pytest.mark.parametrize("ahead", [pytest.param(False, marks=pytest.mark.slow), True], ids=["reuse", "ahead"])
def test_ranks_take_turns_in_the_warm_up_and_compute_side_by_side_afterwards(frontend, panel, ahead):
    def load():
        demo(frontend, 30, forecast=ahead, cuts="input_blocks.3.0, output_blocks.9.1")  # chosen ones do not move in mid-run

    def another():
        load()
        frontend.run()
        return frontend.server.get("/asyncdiff/state")["run"]

    load()
    prompt = frontend.queue()
    expect(status(panel)).to_contain_text(re.compile(r"Sampling · step \d+ of 30 · asynchronous"), timeout=90_000)
    assert panel.locator(".asyncdiff-lane").count() == 2
    expect(panel.locator(".asyncdiff-lane").first).to_contain_text(
        re.compile(r"Rank 0 · CPU.*segment 1 · step \d+ of 30", re.DOTALL)
    )
    wait_until_done(frontend, prompt)
    expect(status(panel)).to_have_text("Last run · step 30 of 30")
    expect(panel.locator(".asyncdiff-plan")).to_contain_text(
        re.compile(r"2 x CPU: segment 1 computes \S+ to \S+ \(\d+% of the work\), segment 2 computes")
    )
    expect(panel.locator(".asyncdiff-numbers")).to_contain_text(
        re.compile(r"\d s.*sequential .*\d s.*\d\.\d\dx.*whole run \d\.\d\dx.*MiB", re.DOTALL)
    )
    columns = frontend.page.evaluate(PIXELS)
    both = [i for i, x in enumerate(columns) if x == ["asynchronous", "asynchronous"]]
    warm = [x for x in columns[: both[0]] if "synchronous" in x]
    after = columns[both[0] : both[-1] + 1]
    assert len(warm) > 20 and len(after) > len(warm)
    if not ahead:
        assert ["asynchronous", "synchronous"] not in warm, "rank 0 gets ahead at the end of the warm-up"
    assert not any("synchronous" in x for x in after) and any("synchronous" in x for x in columns[both[-1] :]), "no cool-down"
    run = frontend.server.get("/asyncdiff/state")["run"]
    assert side_by_side(run) > 0.9
    if not ahead:  # while a busy machine holds up a rank it seems to compute: not in every call
        assert any(both < 0.1 < min(alone) for both, *alone in turns(run)), "the ranks do not take turns in the warm-up"
    truth = recorded(run, len(columns))
    near = [truth[max(0, x - 2) : x + 3] for x in range(len(columns))]  # edges and short waits are drawn to a pixel or two
    wrong = sum(x[rank] not in [y[rank] for y in around] for x, around in zip(columns, near, strict=True) for rank in (0, 1))
    assert wrong < 0.05 * 2 * len(columns), "the panel does not show what the ranks did"
    if ahead:  # in one of three runs, since a busy machine may hold up either rank just then
        runs = itertools.chain([run], (another() for _ in range(2)))
        assert any(overlaps_in_the_warm_up(run) for run in runs), "the ranks do not overlap in the warm-up"


@pytest.mark.slow
def test_branches_compute_side_by_side_from_the_first_step_on(frontend, panel):
    demo(frontend, 12, preset="Balanced")
    frontend.run()
    expect(panel.locator(".asyncdiff-plan")).to_contain_text("2 x CPU: 2 branches that share the batch, segment 1 computes")
    expect(panel.locator(".asyncdiff-lane").last).to_contain_text("branch 2 · segment 1 · step 12 of 12")
    columns = frontend.page.evaluate(PIXELS)
    assert sum(None not in x for x in columns) > 0.5 * len(columns)
    expect(frontend.page.get_by_text("AsyncDiff: 2 branches of 1 segment on cpu, cpu").first).to_be_visible()


@pytest.mark.slow
def test_it_comes_back_after_a_reload_in_mid_run(frontend, panel):
    demo(frontend, 120)  # longer than a page takes to load
    prompt = frontend.queue()
    expect(status(panel)).to_contain_text(re.compile(r"step \d+ of 120"), timeout=60_000)
    frontend.open()
    frontend.execute(TOGGLE)
    expect(status(panel)).to_contain_text(re.compile(r"Sampling · step \d+ of 120"))
    wait_until_done(frontend, prompt)
    expect(status(panel)).to_have_text("Last run · step 120 of 120")
    kinds = {kind for column in frontend.page.evaluate(PIXELS) for kind in column}
    assert kinds == {None, "synchronous", "asynchronous"}, "the beginning of the run is missing"


@pytest.mark.slow
def test_it_goes_on_after_the_connection_was_lost(frontend, panel):
    demo(frontend, 40)
    prompt = frontend.queue()
    expect(status(panel)).to_contain_text(re.compile(r"step \d+ of 40"), timeout=60_000)
    frontend.page.evaluate("() => window.app.api.socket.close()")
    wait_until_done(frontend, prompt)
    expect(status(panel)).to_have_text("Last run · step 40 of 40", timeout=15_000)


def test_closed_it_asks_for_nothing(frontend, panel):
    asked = []
    frontend.page.on("request", lambda request: asked.append(request.url) if "/asyncdiff/" in request.url else None)
    frontend.execute(TOGGLE)
    frontend.page.wait_for_timeout(5500)  # open, it asks every five seconds
    assert [url.endswith("interval=0") for url in asked] == [True], asked


def test_the_report_is_copied(frontend, sampled, panel):
    frontend.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel.get_by_role("button", name="Copy report").click()
    expect(panel.locator(".asyncdiff-answer")).to_have_text("Report copied")
    assert "Plan: 2 segments" in frontend.page.evaluate("() => navigator.clipboard.readText()")
    # over plain http from another machine, browsers have no clipboard
    frontend.page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")
    panel.get_by_role("button", name="Copy report").click()
    expect(panel.locator("textarea")).to_have_value(re.compile("Plan: 2 segments"))
    frontend.page.evaluate("() => { delete navigator.clipboard }")


def test_it_fits_a_small_window(frontend, sampled, panel, resize):
    wide = panel.locator(".asyncdiff-timeline").bounding_box()["width"]
    resize({"width": 760, "height": 700})
    frontend.page.wait_for_timeout(300)
    assert panel.locator(".asyncdiff-timeline").bounding_box()["width"] < wide
    assert panel.evaluate("element => element.scrollWidth <= element.clientWidth")
    assert frontend.page.evaluate(PIXELS), "the timeline is drawn again"


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_it_is_legible_in_every_theme(frontend, sampled, panel, choose, theme):
    choose("Comfy.ColorPalette", theme)
    frontend.page.wait_for_timeout(500)
    found = frontend.page.evaluate(CONTRAST, ".asyncdiff-panel :is(p, dt, dd, span, strong, button)")
    assert len(found) > 20, "the last run is not shown"
    for ratio, what in found:
        assert ratio >= 4.5, f"{what}: contrast {ratio:.1f}"


@pytest.mark.parametrize("nodes2", [False, True], ids=["classic canvas", "Nodes 2.0"])
def test_the_sampler_shows_previews_and_a_line_of_its_own(frontend, choose, nodes2):
    if nodes2:
        frontend.needs(1, 28)  # before, Nodes 2.0 show no lines
    choose("Comfy.VueNodes.Enabled", nodes2)
    demo(frontend, 8)
    frontend.page.evaluate("""() => {
      window.previews = 0;
      window.app.api.addEventListener("b_preview", (window.count ??= () => { window.previews += 1; }));
    }""")
    frontend.run()
    frontend.page.wait_for_function("() => window.previews === 8")  # the last one may come after the end of the prompt
    expect(frontend.page.get_by_text(re.compile(r"AsyncDiff: 2 segments on cpu, cpu · \d\.\d\dx")).first).to_be_visible()


def test_an_error_is_a_toast_that_names_the_cure(frontend):
    demo(frontend, 4, devices="cpu, cuda:9")
    frontend.run()
    toast = frontend.page.locator(".p-toast-message", has_text="AsyncDiff").first
    expect(toast).to_contain_text("cuda:9")
    frontend.page.evaluate("() => window.app.extensionManager.toast.removeAll()")


def test_the_settings_are_there(frontend):
    expected = {"Preset": "Balanced", "Devices": "auto", "Unlisted": "blocks found automatically", "Verify": "auto"}
    expected |= {"KeepMinutes": 0, "Links": "auto", "Refresh": 0.25}
    assert {name: frontend.setting(f"AsyncDiff.{name}") for name in expected} == expected


def test_a_choice_in_the_dialog_counts_from_the_next_picture_on(frontend, choose):
    page, dialog = frontend.page, frontend.page.get_by_role("dialog")
    choose("AsyncDiff.Unlisted", "blocks found automatically")  # as it is; and so it will be again, should the test fail
    given = {"positive": ["source", 1], "negative": ["source", 1], "latent_image": ["source", 2], "options": ["options", 0]}
    for value, line in (
        ("ComfyUI samples", "ComfyUI sampled as usual: .*no block list for its QwenImage.*Settings, AsyncDiff, Unlisted"),
        ("blocks found automatically", "2 segments on cpu, cpu"),
    ):
        frontend.execute("Comfy.ShowSettingsDialog")
        dialog.get_by_text("AsyncDiff", exact=True).click()
        page.get_by_role("combobox", name="Unlisted networks").click()
        with page.expect_response(lambda answer: answer.url.endswith("/settings/AsyncDiff.Unlisted")):
            page.get_by_role("option", name=value).click()
        dialog.get_by_label("Close").click()
        graph = {
            "source": node("AsyncDiffTestDenoiser", name="qwen_image"),
            "options": options(),
            "routed": sampler("AsyncDiffKSampler", next(SEEDS), scheduler="simple", **given),
            "save": node("AsyncDiffTestSave", latent=["routed", 0], name="routed"),
        }
        page.evaluate("async graph => { await app.loadApiJson(graph, 'a network whose blocks are found') }", graph)
        assert frontend.run()["status"]["completed"]
        expect(page.get_by_text(re.compile(f"AsyncDiff: {line}", re.DOTALL)).last).to_be_visible()


def test_it_speaks_chinese(chinese):
    chinese.execute(TOGGLE)
    expect(chinese.page.get_by_role("button", name="停止工作进程")).to_be_visible()
    chinese.execute(TOGGLE)


def test_its_buttons_can_be_reached_and_pressed_by_keyboard(frontend, panel):
    stop, copy = panel.get_by_role("button", name="Stop workers"), panel.get_by_role("button", name="Copy report")
    demo(frontend, 4)
    frontend.run()
    expect(stop).to_be_enabled()
    stop.focus()
    frontend.page.keyboard.press("Tab")
    expect(copy).to_be_focused()
    frontend.page.keyboard.press("Shift+Tab")
    frontend.page.keyboard.press("Enter")
    expect(panel.locator(".asyncdiff-answer")).to_have_text("Workers stopped")
    expect(panel.locator(".asyncdiff-workers")).to_contain_text("No workers running")
    assert frontend.server.get("/asyncdiff/state")["workers"] == []
