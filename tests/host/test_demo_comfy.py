"""``asyncdiff demo-comfy``, with this ComfyUI."""

import json
import os
import sys

import pytest
from PIL import Image

from asyncdiff_nodes.cli import main
from asyncdiff_nodes.cli.commands import demo_comfy


@pytest.fixture(autouse=True)
def this_comfyui(monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", os.environ["ASYNCDIFF_HOST_UNDER_TEST"])
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.slow
def test_it_draws_and_prints_the_report(tmp_path, capsys):
    assert main(["demo-comfy", "--out", str(tmp_path), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "Plan: 2 segments" in printed and "Rank 1 on cpu" in printed
    pictures = [line.removeprefix("Picture: ") for line in printed.splitlines() if line.startswith("Picture: ")]
    assert [Image.open(picture).size for picture in pictures] == [(256, 256)] * 4


@pytest.mark.slow  # what it prints is shown of another server in page/test_server.py
def test_a_node_that_fails_is_named_without_its_inputs(tmp_path, monkeypatch, capsys):
    """Of a sampler these are pages of tensors."""
    workflow = json.loads(demo_comfy.WORKFLOW.read_text())
    (options,) = (node for node in workflow["nodes"] if node["type"] == "AsyncDiffOptions")
    (sampler,) = (node for node in workflow["nodes"] if node["type"] == "AsyncDiffKSampler")
    assert options["widgets_values"][7] == ""
    options["widgets_values"][7] = "nowhere, output_blocks.3"
    monkeypatch.setattr(demo_comfy, "WORKFLOW", tmp_path / "workflow.json")
    demo_comfy.WORKFLOW.write_text(json.dumps(workflow))
    assert main(["demo-comfy", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    begin = f"asyncdiff demo-comfy: the demo workflow failed: KSampler (AsyncDiff) (node {sampler['id']}): "
    assert error.startswith(begin) and "nowhere" in error and len(error) < 1000, error
