"""An installed ComfyUI as a child process: find it, start it on a free loopback port, give it work, end it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

PACK = Path(__file__).resolve().parents[2]
_ANSWER = 30.0  # seconds for one HTTP answer


def find_comfyui() -> Path | None:
    """An installed ComfyUI: ``$COMFYUI_PATH``, the parent of ``custom_nodes``, or comfy-cli's default place."""
    places = [os.environ.get("COMFYUI_PATH"), PACK.parents[1] if PACK.parent.name == "custom_nodes" else None]
    for place in [*filter(None, places), Path.home() / "comfy" / "ComfyUI"]:
        if (Path(place) / "comfy" / "model_patcher.py").is_file():
            return Path(place)
    return None


def find_python(comfyui: Path) -> str | None:
    """Its Python: ``$COMFYUI_PYTHON``, or that of the virtual environment inside."""
    inside = [comfyui / venv / name for venv in ("venv", ".venv") for name in ("bin/python", "Scripts/python.exe")]
    return os.environ.get("COMFYUI_PYTHON") or next((str(path) for path in inside if path.exists()), None)


class Server:
    """A running ComfyUI with this pack (and no other) installed, in folders of its own.

    Args:
        comfyui, python: as found above.
        base: folder for ``custom_nodes``, ``models``, ``input``, ``output`` and ``user``; made where missing.
        packs: name in ``custom_nodes`` -> folder to link there; this pack if None.
        flags: further command-line flags of the host.
        log: where its output goes.

    Raises:
        FileNotFoundError: there is no ComfyUI or no Python for it.
        RuntimeError: it ended, or did not answer in time.
    """

    def __init__(
        self,
        comfyui: Path | None,
        python: str | None,
        base: Path,
        packs: dict[str, Path] | None = None,
        flags: Sequence[str] = (),
        log: Path | None = None,
    ) -> None:
        if comfyui is None:
            raise FileNotFoundError("no ComfyUI was found: set COMFYUI_PATH to its folder, or install it in ~/comfy/ComfyUI")
        if python is None:
            raise FileNotFoundError(f"no Python was found in {comfyui}: set COMFYUI_PYTHON to the one that runs it")
        for name in ("custom_nodes", "models", "input", "output", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in ({"ComfyUI-AsyncDiff": PACK} if packs is None else packs).items():
            link = base / "custom_nodes" / name
            if not link.exists():
                link.symlink_to(folder, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.base = base
        command = [python, "main.py", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base), *flags]
        command += ["--disable-api-nodes", "--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
        self._log: TextIO = (log or base / "comfyui.log").open("w", encoding="utf-8")
        self.process = subprocess.Popen(command, cwd=comfyui, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_up(deadline=time.monotonic() + 180)
        except BaseException:
            self.close()
            raise

    @property
    def log(self) -> str:
        """What it printed so far."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """JSON of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=_ANSWER) as answer:
            return json.load(answer)

    def post(self, path: str, data: Any) -> Any:
        """JSON of a POST request, None where the answer is empty.

        Raises:
            ValueError: the server refused; with its reason.
        """
        body = json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise ValueError(f"ComfyUI refused {path}: {error.read().decode(errors='replace')}") from error
        return json.loads(text) if text.strip() else None

    def queue(self, prompt: dict[str, Any], client_id: str = "asyncdiff") -> str:
        """Queue a prompt in API form; returns its id."""
        return self.post("/prompt", {"prompt": prompt, "client_id": client_id})["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 300.0) -> dict[str, Any]:
        """The history entry of a prompt that has ended, in whatever way.

        Raises:
            RuntimeError: the server ended, or the prompt did not in time.
        """
        deadline = time.monotonic() + seconds
        while not (history := self.get(f"/history/{prompt_id}")):
            self._check(deadline, f"prompt {prompt_id}")
            time.sleep(0.05)
        return history[prompt_id]

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_up(self, deadline: float) -> None:
        while True:
            try:
                self.get("/system_stats")
                return
            except OSError:
                self._check(deadline, "ComfyUI to start")
                time.sleep(0.2)

    def _check(self, deadline: float, what: str) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with code {self.process.returncode}; its last words:\n{self.log[-3000:]}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited too long for {what}; the log of ComfyUI ends with:\n{self.log[-3000:]}")


def has_gpu(python: str) -> bool:
    """Whether the host's torch sees a GPU; without one it needs ``--cpu``."""
    code = "import torch; print(torch.accelerator.is_available())"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() == "True"


def to_prompt(workflow: dict[str, Any], nodes: dict[str, Any]) -> dict[str, Any]:
    """A workflow as the page saves it, in the form that the server runs.

    For plain graphs, such as those of this pack: no subgraphs, no muted or bypassed nodes, no converted widgets.

    Args:
        nodes: answer of ``/object_info``.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in nodes:
            continue  # notes and other things of the page only
        kinds = nodes[node["type"]]["input"]
        specs = {**kinds.get("required", {}), **kinds.get("optional", {})}
        inputs = {slot["name"]: sources[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}
        values = iter(node.get("widgets_values", []))
        for name, (kind, *details) in specs.items():
            if not (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")):
                continue
            inputs.setdefault(name, next(values))
            if details and details[0].get("control_after_generate"):
                next(values)  # "randomize" and the like: for the page
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def failure(history: dict[str, Any], nodes: dict[str, Any]) -> str | None:
    """Why a prompt has failed: its node's name and message, without that node's inputs; None if it has not.

    Args:
        nodes: answer of ``/object_info``.
    """
    if history["status"]["status_str"] == "success":
        return None
    kind, found = history["status"]["messages"][-1]
    if kind != "execution_error":
        return kind  # such as execution_interrupted
    name = nodes[found["node_type"]]["display_name"]
    return f"{name} (node {found['node_id']}): {found['exception_message'].strip() or found['exception_type']}"


def copy_pictures(history: dict[str, Any], base: Path, folder: Path) -> list[Path]:
    """Copy the saved pictures of a finished prompt into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [image for output in history["outputs"].values() for image in output.get("images", [])]
    saved = [base / "output" / image["subfolder"] / image["filename"] for image in images if image["type"] == "output"]
    return [Path(shutil.copy(path, folder)) for path in saved]
