"""One page of a real ComfyUI in Chromium, driven by Playwright: what a user does, in a few verbs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserType, ConsoleMessage

from asyncdiff_nodes.cli.comfyui import PACK, Server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# no GPU, no network but loopback, nothing in the background
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
PACK_FOLDER = "ComfyUI-AsyncDiff"


def launch(kind: BrowserType) -> Browser:
    """The browser that this machine has."""
    return kind.launch(executable_path=CHROMIUM, args=FLAGS)


class Frontend:
    """A page that shows ComfyUI.

    Attributes:
        page: Playwright's.
        troubles: errors of the page and on its console, and warnings, that have to do with this pack.
    """

    def __init__(self, server: Server, browser: Browser, width: int = 1440, height: int = 900, **settings: Any) -> None:
        """Open the page with ``settings`` (of the host, by id with ``_`` for ``.``) in place of what it has stored."""
        self.server = server
        chosen = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Workflow.WarnBeforeReload": False}
        server.post("/settings", chosen | {name.replace("_", "."): value for name, value in settings.items()})
        self.page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        self.page.set_default_timeout(30_000)
        self.troubles: list[str] = []
        self.page.on("pageerror", lambda error: self._blame(f"page error: {error.stack}"))
        self.page.on("console", self._listen)
        self.open()

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._blame(f"{message.type}: {message.text} at {message.location.get('url', '')}")

    def _blame(self, trouble: str) -> None:
        if "asyncdiff" in trouble.lower():
            self.troubles.append(trouble)

    def open(self) -> None:
        """Load the page, for the first time or again, until the graph can be used."""
        self.page.goto(f"{self.server.url}/")
        self.page.wait_for_function("window.app?.graph && window.app.extensionManager?.workflow?.activeWorkflow", timeout=60_000)

    @property
    def version(self) -> tuple[int, ...]:
        """Of the page."""
        return tuple(map(int, self.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__").split(".")))

    def needs(self, *version: int) -> None:
        """Skip the test where the page is older than this."""
        if self.version < version:
            pytest.skip(f"the page of this ComfyUI, {self.version}, is too old for it")

    def load(self, workflow: Path | dict[str, Any]) -> None:
        """Show a workflow in UI form."""
        content = workflow if isinstance(workflow, dict) else json.loads(workflow.read_text(encoding="utf-8"))
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", content)

    def prompt(self) -> dict[str, Any]:
        """The graph in the form that the server runs, converted by the page."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def serialize(self) -> dict[str, Any]:
        """The graph in the form that the page saves."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(window.app.graph.serialize()))")

    def queue(self) -> str:
        """Queue the graph as the Run button does; returns the id of the prompt."""
        with self.page.expect_response(
            lambda answer: answer.url.endswith("/prompt") and answer.request.method == "POST"
        ) as found:
            self.page.evaluate("() => { window.app.queuePrompt(0, 1) }")
        answer = found.value.json()
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def run(self, seconds: float = 120.0) -> dict[str, Any]:
        """Queue the graph and wait; returns its history."""
        prompt, wait = self.queue(), 0.0
        while not (history := self.server.get(f"/history/{prompt}")):
            self.page.wait_for_timeout(100)  # Playwright's events are handled meanwhile
            assert (wait := wait + 0.1) < seconds, f"the prompt did not end; the log ends with:\n{self.server.log[-3000:]}"
        return history[prompt]

    def setting(self, name: str) -> Any:
        """The value of one of the page's settings, by its id."""
        return self.page.evaluate("name => window.app.extensionManager.setting.get(name)", name)

    def choose(self, name: str, value: Any) -> None:
        """Change one of the page's settings, as its dialog does."""
        change = "async ([name, value]) => { await window.app.extensionManager.setting.set(name, value) }"
        self.page.evaluate(change, [name, value])

    def execute(self, command: str) -> None:
        """Run a command as from the menu or the keyboard."""
        self.page.evaluate("async id => { await window.app.extensionManager.command.execute(id) }", command)

    def close(self) -> None:
        """Close the page; anything that our files complained about is an error."""
        self.page.context.close()
        assert not self.troubles, self.troubles


def serve(comfyui: Path, python: str, base: Path, packs: dict[str, Path] | None = None) -> Server:
    """A server with this pack under the name that users see, or with ``packs``, for pages; it has no GPU."""
    flags = ["--cpu", "--preview-method", "latent2rgb", "--use-pytorch-cross-attention"]
    return Server(comfyui, python, base, {PACK_FOLDER: PACK} if packs is None else packs, flags)
