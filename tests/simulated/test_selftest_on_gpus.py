"""The self-test on simulated GPUs, with direct links that work, and with such that do not."""

import functools

import direct_links
import pytest
import sim

from asyncdiff_nodes.engine import WorkerError
from asyncdiff_nodes.engine.rank.transport import Transport
from asyncdiff_nodes.selftest import checks
from asyncdiff_nodes.selftest.checks import Checks
from asyncdiff_nodes.selftest.link_trial import try_link


@pytest.fixture
def small(monkeypatch):
    """One network in one dtype."""
    monkeypatch.setattr(checks, "SUBJECTS", checks.SUBJECTS[:1])
    monkeypatch.setattr(checks, "_DTYPES", checks._DTYPES[:1])
    monkeypatch.setattr(direct_links.accelerator, "links_directly", lambda kind: kind == sim.KIND)


def test_gpus_that_work(small):
    found = list(Checks(["sim:0", "sim:1", "sim:2"], prepare=direct_links.prepare, scale=1 / 8).run())
    assert not [each for each in found if each.verdict == "wrong"]
    links = [each for each in found if each.check == "link"]
    assert [each.subject for each in links] == ["sim:0 and sim:1", "sim:0 and sim:2", "sim:1 and sim:2"]
    assert all(each.value.startswith("direct, ") and each.verdict == "good" for each in links)
    memory = [each for each in found if each.check == "memory"]
    assert [each.subject[-5:] for each in memory] == ["sim:0", "sim:1", "sim:2"]
    for each in memory:
        assert each.numbers["planned"] == each.numbers["held"] <= each.numbers["taken"]
    assert [each.value for each in found if each.check == "exact"] == ["bit for bit"] * 3


def lose_voice_if_first(path):
    """Of two ranks, the one that comes to this first dies when it is to send something."""
    direct_links.prepare()
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return
    Transport.send = None


@pytest.mark.timeout(60)
def test_a_link_whose_one_end_dies_is_not_waited_for(tmp_path):
    """The other one waits on its device for ever."""
    with pytest.raises(WorkerError, match="the link between sim:0 and sim:1 could not be measured"):
        try_link(("sim:0", "sim:1"), functools.partial(lose_voice_if_first, tmp_path / "first"))


@pytest.mark.slow
def test_links_that_hang_are_slow_and_there_is_a_cure(small, monkeypatch):
    monkeypatch.setattr(Checks, "_lives", lambda _: iter(()))
    prepare = functools.partial(direct_links.prepare, "hangs", trial_seconds=1)
    found = list(Checks(["sim:0", "sim:1"], prepare=prepare, scale=1 / 8).run())
    assert found[0].verdict == "slow" and "nothing arrived within 1 s" in found[0].value
    assert found[0].value.startswith("through host memory") and "docs/reliability.md" in found[0].cure
    assert all(each.verdict != "wrong" for each in found)
