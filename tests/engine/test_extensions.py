"""What others give the engine: families of models, and devices that it knows nothing of."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import toys
from asyncdiff_nodes import extensions
from asyncdiff_nodes.engine import Plan, UnsupportedModelError, WorkerGroup, find_family
from asyncdiff_nodes.engine.devices import on_cluster, resolve_devices
from asyncdiff_nodes.engine.parent.local_ranks import LocalRanks
from reuse import IDLE, released

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def registered(monkeypatch):
    """Forget afterwards what a test registers."""
    monkeypatch.setattr(extensions, "_tables", list(extensions._tables))
    monkeypatch.setattr(extensions, "_clusters", dict(extensions._clusters))


class Here:
    """A cluster that is this machine."""

    started = ()

    def resolve(self, names):
        return tuple(f"{name}/{rank}" for rank, name in enumerate(names * 2))

    def start(self, devices, poll):
        self.started = devices
        return LocalRanks(["cpu"] * len(devices), poll, IDLE)


def test_a_program_s_own_table_is_looked_into(registered):
    net = toys.random_net(0)
    with pytest.raises(UnsupportedModelError, match=r"no block list for a toys\.ToyNet; listed: .*comfy\.UNetModel"):
        find_family(net)
    extensions.register_families(lambda: {"toys.ToyNet": toys.TOY})
    assert find_family(net) is toys.TOY


def test_a_program_s_own_cluster_runs_ranks(registered):
    net, here = toys.random_net(3), Here()
    assert not on_cluster("here:all")
    extensions.register_cluster("here:", lambda: here)
    assert on_cluster("here:all") and on_cluster("ray:auto") and not on_cluster("cpu")
    assert resolve_devices(["here:all"]) == ("here:all/0", "here:all/1")
    group, (sample, kwargs) = WorkerGroup(net, Plan(), ["here:all"], family=toys.TOY), toys.inputs(0)
    assert here.started == group.devices == ("here:all/0", "here:all/1")
    with torch.no_grad():
        assert torch.equal(group(sample, 10, **kwargs), net(sample, 10, **kwargs))
    released(group)


def test_the_package_alone_imports_nothing_of_others():
    """A rank's process imports it before PyTorch, and is to be watched before that."""
    program = "import sys; before = set(sys.modules); import asyncdiff_nodes; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    new = {name for name in out.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert new == {"asyncdiff_nodes", "asyncdiff_nodes.extensions"}
