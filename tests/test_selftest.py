"""The self-test on CPU ranks: what it says of a machine that works, and of one that does not."""

import dataclasses
import json

import pytest
import torch

from asyncdiff_nodes.cli import main
from asyncdiff_nodes.engine import RankOptions
from asyncdiff_nodes.selftest import checks, comparison
from asyncdiff_nodes.selftest.checks import Checks
from asyncdiff_nodes.selftest.comparison import Comparison
from asyncdiff_nodes.selftest.networks import SUBJECTS

SMALL = 1 / 8


def test_a_machine_that_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checks, "_CPU_SCALE", SMALL)
    monkeypatch.setattr(checks, "SUBJECTS", SUBJECTS[::2])
    monkeypatch.setattr(checks, "_DTYPES", (torch.bfloat16,))  # float16 takes CPUs ten times as long
    file = tmp_path / "found.json"
    assert main(["selftest", "--devices", "cpu,cpu", "--json", str(file)]) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    rows = [(row["check"], row["subject"]) for row in found["findings"]]
    titles = [f"{subject.name}, {dtype}" for subject in SUBJECTS[::2] for dtype in ("bfloat16",)]
    expected = [("link", "cpu and cpu"), *((check, title) for title in titles for check in ("exact", "asynchronous", "speed"))]
    assert rows[: len(expected)] == expected
    assert [check for check, _ in rows[len(expected) :]] == ["start", "cancel", "exact", "death", "restart"]
    assert {row["verdict"] for row in found["findings"]} <= {"good", "slow"}
    assert all(row["verdict"] == "good" for row in found["findings"] if row["check"] in ("exact", "asynchronous"))
    assert printed.count("\n| ") == len(rows) + 1 and "issues/new?template=selftest.yml" in printed


@pytest.fixture
def compared():
    """A network of FLUX's kind on two ranks."""
    made = Comparison(SUBJECTS[2], torch.float32, SMALL, ["cpu", "cpu"], RankOptions(threads_per_rank=1))
    with made.group() as group:
        yield made, group


def test_ranks_that_compute_something_else_are_wrong(compared):
    made, group = compared
    assert (made.exactness(group).verdict, made.asynchrony(group).verdict) == ("good", "good")
    group.load_weights([("layers.3.narrow.weight", made._network.layers[3].narrow.weight * 1.01)])
    found = made.exactness(group), made.asynchrony(group)
    assert [each.verdict for each in found] == ["wrong", "wrong"] and "please send it" in found[0].cure


def test_nan_is_wrong_wherever_it_is(compared):
    made, group = compared
    expected = made.denoise(group)
    spoilt = [*expected[:-1], expected[-1] * float("nan")]
    made.denoise = lambda model: spoilt if model is group else expected
    assert (made.exactness(group).verdict, made.asynchrony(group).verdict) == ("wrong", "wrong")


def test_a_gain_that_is_not_worth_it_is_slow(compared, monkeypatch):
    made, group = compared
    monkeypatch.setattr(comparison, "_SLOW", 1e9)
    found = made.speed(group)
    assert found.verdict == "slow" and "look at the links" in found.cure and set(found.numbers) == {"one", "together", "best"}


def test_a_check_that_fails_is_a_finding_and_the_next_one_follows(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such kernel\nand much more")

    broken = dataclasses.replace(SUBJECTS[0], name="broken", build=fails)
    monkeypatch.setattr(checks, "SUBJECTS", [broken])
    found = list(Checks(["cpu"], scale=SMALL).run())
    assert [(each.check, each.verdict) for each in found] == [("link", "good"), *[("failed", "wrong")] * 4]
    assert found[1].value == "no such kernel"
