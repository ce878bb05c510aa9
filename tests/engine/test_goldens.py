"""The published implementation's numbers, call by call, from the simulator and from real processes."""

import pytest

import golden
from asyncdiff_nodes.engine import Simulator

# by default, the others only through the simulator, with which groups agree (test_async.py)
QUICK = {"sd15_N2_S1_W3_shift_T12"}


def assert_same_as_published(name, eps, latents):
    published = golden.outputs(golden.RUNS[name]["layout"])
    assert (eps - published[f"{name}.eps"]).abs().max() <= 1e-4
    assert (latents - published[f"{name}.latents"]).abs().max() <= 3e-4


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_unrouted_model_matches_the_sequential_run(layout):
    name = f"{layout}_seq_T12"
    assert golden.scheduler(12).timesteps.tolist() == golden.RUNS[name]["timesteps"]
    assert_same_as_published(name, *golden.sample(golden.unet(layout), layout, 12))


@pytest.mark.parametrize("name", golden.ASYNC_RUNS)
def test_simulator(name):
    run = golden.RUNS[name]
    with Simulator(golden.unet(run["layout"]), golden.plan_of(name)) as simulator:
        simulator.begin(run["timesteps"])
        assert_same_as_published(name, *golden.sample(simulator, run["layout"], run["T"]))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in golden.ASYNC_RUNS])
def test_worker_group(name, golden_group):
    run = golden.RUNS[name]
    group = golden_group(run["layout"], golden.plan_of(name))
    group.begin(run["timesteps"])
    assert_same_as_published(name, *golden.sample(group, run["layout"], run["T"]))


def test_goldens_would_notice_a_wrong_warmup_or_shift():
    """The tolerance is far below what the smallest mistake costs."""
    name, other = "sd15_N2_S1_W1_noshift_T12", "sd15_N2_S1_W3_shift_T12"
    published = golden.outputs("sd15")
    assert (published[f"{name}.latents"] - published[f"{other}.latents"]).abs().max() > 0.08
