"""From installing the pack to removing it, on a fresh ComfyUI with no other pack: what a new user does, in that order."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from frontend import PACK_FOLDER, Frontend, serve
from PIL import Image, ImageChops
from playwright.sync_api import expect
from safetensors.torch import save_file

from asyncdiff_nodes.cli.comfyui import PACK
from asyncdiff_nodes.host.demo import load_demo
from helpers import small
from helpers.serving import Page, alive, seconds_until_gone

HOST = Path(os.environ["ASYNCDIFF_HOST_UNDER_TEST"])
# a LoRA between the model and the sampler
ADD_LORA = """() => {
  const graph = window.app.graph, find = (type) => graph.nodes.find((node) => node.type === type);
  const lora = LiteGraph.createNode("LoraLoaderModelOnly");
  graph.add(lora);
  lora.widgets.find((widget) => widget.name === "lora_name").value = "demo.safetensors";
  find("AsyncDiffDemoLoader").connect(0, lora, 0);
  lora.connect(0, find("AsyncDiffKSampler"), 0);
}"""
SET = """([type, name, value]) => {
  const node = window.app.graph.nodes.find((node) => node.type === type);
  node.widgets.find((widget) => widget.name === name).value = value;
}"""


def install(folder):
    """What the registry's archive holds."""

    def git(*arguments):
        found = subprocess.run(["git", "-C", str(PACK), "ls-files", *arguments], capture_output=True, text=True, check=True)
        return set(found.stdout.splitlines())

    for name in git() - git("--cached", "--ignored", "--exclude-from=.comfyignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACK / name, folder / name)


def start(base):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        return serve(HOST, sys.executable, base, packs={})


def picture(server):
    """The latest picture of the demo."""
    return Image.open(max((server.base / "output").glob("asyncdiff_demo*.png"), key=lambda path: path.stat().st_mtime))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_from_installing_to_removing(tmp_path, chromium):
    pack = tmp_path / "custom_nodes" / PACK_FOLDER
    install(pack)
    (tmp_path / "models" / "loras").mkdir(parents=True)
    save_file(small.lora(load_demo()[0]), tmp_path / "models" / "loras" / "demo.safetensors")

    with start(tmp_path) as server:
        frontend, watcher = Frontend(server, chromium), Page(server)
        page = frontend.page

        def run():
            page.get_by_test_id("queue-button").click()
            expect(status).to_contain_text(re.compile("Starting|Sampling"))
            expect(status).to_contain_text("Last run · step", timeout=90_000)
            while server.get("/queue")["queue_running"]:
                page.wait_for_timeout(50)

        frontend.execute("Comfy.BrowseTemplates")
        page.get_by_text(PACK_FOLDER, exact=True).click()
        page.get_by_test_id("template-workflow-asyncdiff_demo").click()
        page.wait_for_function("() => window.app.graph.nodes.some((node) => node.type === 'AsyncDiffKSampler')")
        frontend.execute("Workspace.ToggleBottomPanelTab.asyncdiff")
        status = page.locator(".asyncdiff-status")
        expect(status).to_have_text("Nothing has run yet. Run a workflow that has an AsyncDiff sampler.")
        run()
        first = picture(server)
        assert first.width == 256 and len(first.getcolors(1 << 20)) > 100

        page.evaluate(SET, ["AsyncDiffKSampler", "steps", 300])
        page.get_by_test_id("queue-button").click()
        expect(status).to_contain_text(re.compile(r"step \d+ of 300"), timeout=60_000)
        ranks = watcher.ranks()
        frontend.execute("Comfy.Interrupt")
        expect(status).to_contain_text("Last run, cancelled", timeout=10_000)

        page.evaluate(SET, ["AsyncDiffKSampler", "steps", 12])
        run()
        page.evaluate(ADD_LORA)
        pictures = [picture(server)]
        for strength in (0.4, 0.8):
            page.evaluate(SET, ["LoraLoaderModelOnly", "strength_model", strength])
            run()
            pictures.append(picture(server))
            assert ImageChops.difference(*pictures[-2:]).getbbox() is not None
        assert sorted(alive(watcher.ranks())) == sorted(ranks), "the workers were started again"

        server.post("/free", {"unload_models": True, "free_memory": True})
        seconds_until_gone(ranks, limit=10.0)
        expect(page.locator(".asyncdiff-workers")).to_contain_text("No workers running", timeout=15_000)
        saved = frontend.serialize()
        assert "Traceback" not in server.log.split("To see the GUI")[1]
        frontend.close()

    shutil.rmtree(pack)
    with start(tmp_path) as server:
        frontend = Frontend(server, chromium)
        assert "AsyncDiffKSampler" not in server.get("/object_info")
        frontend.load(saved)  # the page names the missing nodes, as for any pack
        assert len(frontend.serialize()["nodes"]) == len(saved["nodes"])
        assert "AsyncDiff" not in server.log
        frontend.close()
