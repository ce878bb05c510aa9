"""Worker groups that several tests share, since a group takes seconds to start; ``begin`` makes each run a fresh one."""

import functools
import tempfile

import pytest
import torch

import golden
import toys
from asyncdiff_nodes.cli.zoo import find_model
from asyncdiff_nodes.engine import BlockGraph, Plan, WorkerGroup, find_family, trace
from order import together
from reuse import released, started


@pytest.fixture(scope="session")
def true_graph():
    """Model name -> block graph at its true size, batch 2, fp16."""

    @functools.cache
    def get(name: str) -> BlockGraph:
        unet = find_model(name).skeleton(torch.float16)
        family = find_family(unet)
        return trace(unet, family, *family.example_inputs(unet, None, 2))

    return get


MOST_RANKS = 12  # of shared groups at a time: each holds some 200 MB


def pytest_collection_modifyitems(items):
    """Run the tests of one shared group one after the other, so that it is started once and few live at a time."""

    def shared(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "golden_group" in item.fixturenames and "name" in params:
            return golden.RUNS[params["name"]]["layout"], golden.plan_of(params["name"])
        if "toy_group" in item.fixturenames:  # those that name their plans themselves: mostly of the last two
            return "toy", params.get("plan", toys.PLAIN)
        if "start" in item.fixturenames and "plan" in params:
            return item.module, params["plan"]
        return item.nodeid

    together(items, shared)


@pytest.fixture(scope="session")
def start():
    """(model, plan, module) -> a shared group, one thread per rank; those not used for the longest time make room."""
    running: dict[tuple[str, Plan], WorkerGroup] = {}

    def get(model: str, plan: Plan, module: torch.nn.Module, **options) -> WorkerGroup:
        group = running.pop((model, plan), None)
        while running and plan.world_size + sum(p.world_size for _, p in running) > MOST_RANKS:
            released(running.pop(next(iter(running))))
        if group is None:
            group = started(module, plan, **options)
        running[model, plan] = group
        return group

    yield get
    for group in running.values():
        group.close()


@pytest.fixture(scope="session")
def golden_group(start):
    """(layout, plan) -> a group of the golden UNet."""
    return lambda layout, plan: start(layout, plan, golden.unet(layout))


@pytest.fixture(scope="session")
def toy_group(start):
    """plan -> a group of the random network whose seed is the plan's place in ``toys.PLANS``, and that network."""

    def get(plan: Plan) -> tuple[WorkerGroup, toys.ToyNet]:
        net = toys.random_net(toys.PLANS.index(plan))
        return start("toy", plan, net, family=toys.TOY), net

    return get


@pytest.fixture
def group_of(start):
    """plan -> a group of one random network for any plan, and that network."""
    net = toys.random_net(3)
    return lambda plan: (start("random", plan, net, family=toys.TOY), net)


@pytest.fixture
def own_tmp(tmp_path, monkeypatch):
    """The folder for temporary files that this test's process makes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def folder(own_tmp):
    """The same; there must be none at its end."""
    yield own_tmp
    assert list(own_tmp.iterdir()) == []
