"""The command line, run as a user runs it."""

import ast
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from PIL import Image

from asyncdiff_nodes.cli import COMMANDS, main
from asyncdiff_nodes.cli.commands import plans
from asyncdiff_nodes.cli.packages import EXTRAS
from asyncdiff_nodes.cli.subjects import find_subject
from asyncdiff_nodes.cli.suite import suite
from asyncdiff_nodes.cli.zoo import DEMOS, PUBLISHED_SPEEDUPS, find_model
from asyncdiff_nodes.demo import DemoPipeline
from asyncdiff_nodes.engine.planning.run_times import Link

ROOT = Path(__file__).resolve().parents[1]


def run(tmp_path, *argv):
    """Exit status and the JSON that the command wrote."""
    path = tmp_path / "result.json"
    status = main([*argv, "--json", str(path)])
    return status, json.loads(path.read_text()) if path.exists() else None


def test_plan_of_sd15_to_work_ahead(tmp_path):
    _, fresh = run(tmp_path, "plan", "--model", "sd15", "--size", "512")
    _, fast = run(tmp_path, "plan", "--model", "sd15", "--size", "512", "--no-fresh-skips")
    assert fast["max_share"] <= 0.509 * 1.03 < fresh["max_share"] <= 0.60
    assert fresh["mib_per_call"] < 5 < fast["mib_per_call"] < fresh["published"]["mib_per_call"]
    assert sum(s["share"] for s in fresh["segments"]) == pytest.approx(
        sum(s["gmac"] for s in fresh["segments"]) / 803.3, abs=1e-3
    )


def test_plan_of_sd15_is_balanced_and_cheap(tmp_path, capsys):
    status, result = run(tmp_path, "plan", "--model", "sd15", "--size", "512", "--segments", "2", "--forecast", "0")
    assert status == 0
    assert result["max_share"] <= 0.501 * 1.03
    assert result["mib_per_call"] < 5
    assert len(result["segments"]) == 2
    assert sum(s["share"] for s in result["segments"]) == pytest.approx(1)
    assert sum(s["gmac"] for s in result["segments"]) == pytest.approx(803.3, abs=0.1)
    assert sum(s["weight_mib"] for s in result["segments"]) == pytest.approx(1635.5, abs=0.1)  # fp16
    assert sum(s["mib_in"] for s in result["segments"]) == pytest.approx(result["mib_per_call"])
    assert sum(s["mib_out"] for s in result["segments"]) == pytest.approx(result["mib_per_call"])
    assert result["published"]["max_share"] == pytest.approx(0.560, abs=0.001)
    assert {"command", "commit", "machine"} <= set(result)
    assert "published cuts" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("flux",), pytest.param(plans.NAMES, marks=pytest.mark.slow)], ids=["flux", "all"])
def test_plans_of_every_model(tmp_path, monkeypatch, names):
    monkeypatch.setattr(plans, "NAMES", names)
    _, result = run(tmp_path, "plans")
    assert {(row["model"], row["devices"]) for row in result["rows"]} == {(n, d) for n in {*names} - {*DEMOS} for d in (2, 3, 4)}
    for row in result["rows"]:
        assert len(row["shares"]) == row["devices"] and row["balance"] > 0.7
        # without full-size blocks that are computed twice
        assert row["balance"] > 0.9 or row["model"] in ("sd15", "sd21", "svd", "animatediff")
        assert max(row["weights_mib"]) < row["whole_mib"] <= sum(row["weights_mib"]) * 1.0001


def test_plan_of_a_transformer(tmp_path):
    _, plan = run(tmp_path, "plan", "--model", "demo-transformer", "--segments", "4")
    assert plan["cuts"] == [f"transformer_blocks.{i}" for i in (0, 3, 6, 9)]
    assert plan["max_share"] == pytest.approx(0.25, abs=0.003) and plan["wrapped"] is True  # each has the embedding
    assert plan["mib_per_call"] == 3 * 2 * 64 * 128 * 2 / 2**20  # the hidden states of 64 patches, at three cuts, fp16


LARGE = ["svd", "sd35-large", "flux", "qwen-image", "wan-14b", "hunyuan-video", "ltx-video"]


@pytest.mark.parametrize("model", [m if m == "flux" else pytest.param(m, marks=pytest.mark.slow) for m in LARGE])
def test_the_largest_models_divide_evenly(tmp_path, model):
    """At their true sizes, without a weight."""
    status, result = run(tmp_path, "plan", "--model", model, "--segments", "4", "--no-fresh-skips")
    assert status == 0 and result["max_share"] < 0.27


def test_plan_with_branches(tmp_path):
    _, halves = run(tmp_path, "plan", "--model", "sd15", "--segments", "1", "--branches", "2")
    assert (halves["devices"], halves["mib_per_call"], halves["predicted_speedup"]) == (2, 0, 2)
    assert halves["gmac"] == pytest.approx(803.3, abs=0.1), "of both"
    _, four = run(tmp_path, "plan", "--model", "sd15", "--branches", "2", "--no-fresh-skips")
    _, two = run(tmp_path, "plan", "--model", "sd15", "--no-fresh-skips")
    assert four["devices"] == 4 and four["mib_per_call"] == two["mib_per_call"] and four["cuts"] == two["cuts"]
    assert four["predicted_speedup"] == pytest.approx(2 * two["predicted_speedup"], rel=1e-3)


def test_plan_takes_cuts_stride_and_speeds(tmp_path):
    _, named = run(tmp_path, "plan", "--model", "demo", "--cuts", "conv_in,mid_block")
    assert named["cuts"] == ["conv_in", "mid_block.resnets.0"]
    assert not named["wrapped"]
    _, strided = run(tmp_path, "plan", "--model", "demo", "--segments", "3", "--stride", "2")
    assert strided["devices"] == 4
    assert strided["segments"][-1]["ranks"] == [2, 3]
    _, uneven = run(tmp_path, "plan", "--model", "demo", "--speeds", "1,0.5", "--forecast", "0")
    assert uneven["segments"][0]["share"] == pytest.approx(2 / 3, abs=0.05)
    assert uneven["predicted_speedup"] == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--model", "nope"], "nope"),
        (["plan", "--size", "100"], "multiple of 64"),
        (["plan", "--cuts", "conv_in,elsewhere"], "elsewhere"),
        (["plan", "--segments", "1"], "segments=1"),
        (["plan", "--speeds", "1,fast"], "1,fast"),
        (["bench", "--plans", "2,1"], "2,1"),
        (["bench", "--plans", ";"], "--plans"),
        (["bench", "--devices", "cuda:99,cpu"], "cuda:99"),
        (["bench", "--plans", "2,1,13"], "plan 2,1,13"),
        (["bench", "--size", "100"], "multiple of 64"),
        (["demo", "--devices", "cuda:99,cpu"], "cuda:99"),
        (["demo", "--scheduler", "magic"], "magic"),
        (["compare", "--plans", "5,1,1"], "no cuts for 5 segments"),
        (["compare", "--runs", "ddim:20,ddim:0"], "ddim:0"),
        (["compare", "--runs", "ddim"], "such as ddim:50"),
        (["compare", "--device", "cuda:99"], "cuda:99"),
        (["compare", "--runs", "ddim:4", "--plans", "2,1,3,1"], "no asynchronous step"),
        (["compare", "--runs", "magic:4"], "magic"),
        (["similarity", "--device", "cuda:99"], "cuda:99"),
        (["similarity", "--cfg", "1"], "--cfg 1"),
        (["similarity", "--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_values_are_named_without_a_traceback(argv, message, capsys, tmp_path):
    if argv[0] == "demo":
        argv = [*argv, "--steps", "1", "--out", str(tmp_path)]
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_doctor_finds_this_machine(tmp_path, capsys):
    status, result = run(tmp_path, "doctor")
    assert status == 0
    assert result["found"]["loopback"] is True
    assert result["found"]["packages"]["diffusers"]
    assert not any(problem["fatal"] for problem in result["problems"])
    assert "Will be used" in capsys.readouterr().out


def bare(folder, *argv, packages=()):
    """What ``asyncdiff`` comes to, run with the standard library and ``packages`` with what these need, and nothing else."""
    site, todo = folder / "site", list(packages)
    if not site.exists():
        site.mkdir()
        (site / "asyncdiff_nodes").symlink_to(ROOT / "asyncdiff_nodes")
    while todo:
        try:
            found = importlib.metadata.distribution(todo.pop())
        except importlib.metadata.PackageNotFoundError:
            continue  # for other systems
        parts = {file.parts[0] for file in found.files} - {"..", "__pycache__"}
        for part in (part for part in parts if not (site / part).exists()):
            (site / part).symlink_to(found.locate_file(part))
            todo += [re.match(r"[\w.-]+", needed)[0] for needed in found.requires or () if "extra ==" not in needed]
    command, environment = [sys.executable, "-S", "-m", "asyncdiff_nodes", *argv], os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def test_doctor_needs_pytorch_only_and_names_what_is_missing(tmp_path):
    found = bare(tmp_path, "doctor", "--json", "found.json", packages=["torch"])
    assert found.returncode == 0, found.stderr
    result = json.loads((tmp_path / "found.json").read_text())
    assert not any(problem["fatal"] for problem in result["problems"])
    missing = {name for name, version in result["found"]["packages"].items() if version is None}
    assert {"rich", "diffusers", "matplotlib", "scikit-image", "psutil", "ray", "pytest"} <= missing
    for extra, packages in EXTRAS.items():
        assert f'Packages of [{extra}]: pip install "{ROOT}[{extra}]"' in found.stdout
        for name in missing & {*packages}:
            assert re.search(rf"^  {name} +missing +{re.escape(packages[name])}$", found.stdout, re.MULTILINE)
    (note,) = (problem for problem in result["problems"] if "rich" in problem["what"])
    assert missing & {*EXTRAS["cli"]} == set(note["what"].removeprefix("other commands lack ").split(", "))


@pytest.mark.parametrize(("name", "lacks"), [("plan", "rich"), ("demo", "numpy"), ("bench", "rich"), ("compare", "numpy")])
def test_a_command_names_the_package_that_it_lacks(tmp_path, name, lacks):
    found = bare(tmp_path, name, "--help", packages=["torch"])
    assert (found.returncode, found.stdout) == (2, "")
    assert "Traceback" not in found.stderr  # PyTorch warns of a lack of NumPy
    assert found.stderr.splitlines()[-1] == f'asyncdiff {name} needs {lacks}: pip install "{ROOT}[cli]"'


def test_what_drives_comfyui_needs_no_package_of_its_own(tmp_path):
    assert bare(tmp_path, "demo-comfy", "--help", packages=["torch"]).returncode == 0


def test_all_commands_are_listed_without_any_package(tmp_path):
    found = bare(tmp_path, "--help")
    assert found.returncode == 0 and all(name in found.stdout for name in COMMANDS), found.stderr
    found = bare(tmp_path, "doctor")
    assert (found.returncode, found.stderr[:33]) == (2, "asyncdiff doctor needs torch: ins"), found.stderr


def test_every_package_of_the_extras_is_known():
    written = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra: {re.match(r"[\w-]+", needed)[0] for needed in packages} for extra, packages in written.items()}
    assert set().union(*named.values()) == {name for packages in EXTRAS.values() for name in packages}
    assert all({*packages} <= named[extra] for extra, packages in EXTRAS.items())


def test_no_command_imports_another():
    """What several share lies beside them."""
    for path in (ROOT / "asyncdiff_nodes" / "cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level or path.parent.name == "cli", path
                assert "commands" not in (node.module or "").split("."), path


def test_compare_puts_the_published_method_and_fewer_steps_beside_ours(tmp_path):
    page = tmp_path / "page.html"
    arguments = ("--plans", "2,1,1,1", "--runs", "ddim:8:2", "--compression", "half", "int8", "--html", str(page))
    status, result = run(tmp_path, "compare", *arguments)
    assert status == 0
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 1 + 7 and "asyncdiff compare --plans 2,1,1,1 --runs ddim:8:2" in text
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["sequential", "published", "ours", "ours-fast", "ours-half", "ours-int8", "fewer-steps"]
    assert (rows["sequential"]["psnr"], rows["sequential"]["ssim"]) == (100, 1)
    for row in list(rows.values())[1:]:
        assert (row["plan"], row["sampler"], row["steps"], row["pairs"]) == ("2,1,1", "ddim", 8, 2)
        assert row["psnr_ci"][0] < row["psnr"] < row["psnr_ci"][1]
        assert 5 < row["psnr"] < 60 and 0 < row["ssim"] < 1 and row["kernel_distance"] != rows["sequential"]["kernel_distance"]
    for method, most in (("ours-half", 0.51), ("ours-int8", 0.26)):
        assert abs(rows[method]["psnr"] - rows["ours"]["psnr"]) < 0.2 and rows[method]["psnr"] != rows["ours"]["psnr"]
        assert rows[method]["mib_per_call"] < most * rows["ours"]["mib_per_call"]
    _, planned = run(tmp_path, "plan", "--model", "demo")
    # the leap is the last call but one; on top comes what the first segment works ahead
    assert (rows["ours"]["cooldown"], rows["published"]["cooldown"]) == (2, 0)
    assert 0 < rows["ours"]["cost"] - (1 + 5 * planned["max_share"] + 2) < 0.3
    assert rows["published"]["cost"] == pytest.approx(1 + 7 * planned["published"]["max_share"])
    assert rows["fewer-steps"]["cost"] == math.ceil(rows["ours"]["cost"])
    assert rows["ours-fast"]["cost"] < rows["ours"]["cost"]
    assert rows["ours"]["mib_per_call"] < rows["ours-fast"]["mib_per_call"] < rows["published"]["mib_per_call"]


def test_similarity_of_every_block_and_step(tmp_path):
    """Against the outputs themselves, of two steps."""
    pipeline = DemoPipeline.load()
    seen = {"conv_in": [], "mid_block.attentions.0": []}
    for name, outputs in seen.items():
        pipeline.denoiser.get_submodule(name).register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out))
    results = []
    pipeline.denoiser.register_forward_hook(lambda _, __, out: results.append(out[0]))
    pipeline.sample(find_subject("demo").prompts(8), steps=3, cfg=4.0, seed=4)
    seen["result after CFG"] = [4 * prompted - 3 * without for without, prompted in (out.chunk(2) for out in results)]
    picture = tmp_path / "map.png"
    status, result = run(tmp_path, "similarity", "--steps", "3", "--seed", "4", "--cfg", "4", "--picture", str(picture))
    assert status == 0 and Image.open(picture).width > 1000
    rows = {row["block"]: row for row in result["rows"]}
    assert len(rows) == 47 + 4 and rows["conv_in"]["readers"] == ["down_blocks.0.resnets.0", "up_blocks.3.resnets.2"]
    for name, outputs in seen.items():
        first, second, third = ((out if isinstance(out, torch.Tensor) else out[0]).flatten(1) for out in outputs)
        for index, (a, b) in enumerate([(first, second), (second, third)]):
            cosine = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean().item()
            change = ((b - a).norm(dim=1) / a.norm(dim=1)).mean().item()
            assert rows[name]["cosine"][index] == pytest.approx(cosine, abs=1e-4)
            assert rows[name]["change"][index] == pytest.approx(change, rel=1e-3)


@pytest.mark.slow
def test_bench_measures_and_projects(tmp_path):
    more = (psutil.cpu_count(logical=False) or psutil.cpu_count()) + 1  # segments than there are cores
    plans = f"2,1,1;{more},1,1"
    status, result = run(tmp_path, "bench", "--model", "demo", "--size", "32", "--plans", plans, "--steps", "7")
    assert status == 0
    measured, projected = result["rows"]
    assert (measured["plan"], measured["projected"], measured["what"]) == ("2,1,1", False, "step")
    assert (projected["plan"], projected["projected"], projected["what"]) == (f"{more},1,1", True, "step")
    for row in result["rows"]:
        assert row["speedup"] == pytest.approx(row["unrouted_s"] / row["step_s"])
        assert row["share_of_ideal"] == pytest.approx(row["speedup"] / row["ideal"])
        assert (row["model"], row["size"], row["published"]) == ("demo", 32, None)
        assert len(row["weights_mib"]) == row["devices"]
    assert 0 <= measured["wait_share"] < 1
    assert measured["ideal"] == pytest.approx(measured["scaling"] / 2 / measured["max_share"])
    assert measured["projected_speedup"] == pytest.approx(measured["speedup"], rel=0.5), "nothing is quiet here"
    (profile,) = result["profiles"]
    assert projected["step_s"] > projected["max_share"] * sum(profile["block_s"])
    assert projected["unrouted_s"] == pytest.approx(max(profile["unrouted_s"], sum(profile["block_s"])))
    assert 0 < result["link"]["latency"] < 0.1 < 1e6 < result["link"]["bandwidth"] and 0 < result["round_trip_s"] < 0.5


@pytest.mark.slow
def test_bench_runs_its_suite(tmp_path, monkeypatch, capsys):
    """With the demo model in place of the others, and fewer steps."""
    monkeypatch.setattr("asyncdiff_nodes.cli.commands.bench.try_link", lambda devices: SimpleNamespace(link=Link(1e-3, 1e9)))
    monkeypatch.setattr("asyncdiff_nodes.cli.commands.bench.measure_round_trip", lambda devices: 5e-3)
    subjects = [replace(s, model="demo", size=32, steps=min(s.steps, 7)) for s in suite()]
    monkeypatch.setattr(
        "asyncdiff_nodes.cli.commands.bench.suite", lambda: (subjects[2], replace(subjects[4], plans=subjects[4].plans[-1:]))
    )
    status, result = run(tmp_path, "bench", "--suite")
    assert status == 0
    whole, projected = result["rows"]
    assert (whole["what"], whole["steps"], whole["warmup"], whole["projected"]) == ("run", 7, 2, False)
    assert whole["speedup"] == pytest.approx(7 * whole["unrouted_s"] / sorted(whole["run_s_all"])[1])
    together = 2 / whole["scaling"]
    assert 7 / whole["ideal"] >= 2 + 5 * whole["max_share"] * together * 0.999
    found = tuple(projected[name] for name in ("plan", "branches", "projected", "devices"))
    assert found == ("2,1,1", 2, True, 4) and projected["ideal"] == pytest.approx(2 / projected["max_share"])
    assert [profile["branches"] for profile in result["profiles"]] == [1, 1, 2]
    assert "measured run" in capsys.readouterr().out


def test_the_suite_has_the_plans_of_the_paper_at_the_models_own_sizes():
    own = {s.model: s for s in suite() if s.size == 8 * find_model(s.model).config["sample_size"]}
    assert {model: subject.size for model, subject in own.items()} == {"sd15": 512, "sd21": 768, "sdxl": 1024}
    for model, subject in own.items():
        segments = {(plan.segments, plan.stride) for plan in subject.plans if plan.branches == 1}
        assert segments == set(PUBLISHED_SPEEDUPS[model])
        assert {plan.segments for plan in subject.plans if plan.branches == 2} == {1, 2}


def test_demo_draws_both_pictures_and_their_difference(tmp_path):
    status, result = run(tmp_path, "demo", "red heart", "--steps", "10", "--warmup", "3", "--out", str(tmp_path / "out"))
    assert status == 0
    rows = {row["method"]: row for row in result["rows"]}
    assert set(rows) == {"sequential", "AsyncDiff", "plain reuse", "fewer steps"}
    assert rows["AsyncDiff"]["psnr"] > rows["plain reuse"]["psnr"]
    assert rows["fewer steps"]["steps"] < 10
    with Image.open(tmp_path / "out" / "demo.png") as sheet:
        assert sheet.width > 128
        assert sheet.height > 3 * 128
