"""ComfyUI with ranks on two machines, here two nodes of this one."""

from pathlib import Path

import pytest
import torch

import ray_cluster
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.pool import POOL
from helpers.sampling import ksampler

pytestmark = ray_cluster.needs_linux


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_cluster.two_nodes(Path(__file__).resolve().parents[3]):
        yield
        POOL.release()


def test_a_picture_is_exact_and_then_asynchronous(sd15, prompts):
    POOL.release()  # of tests before

    def sample(model):
        return ksampler(model, prompts, steps=6)

    expected = sample(sd15)
    assert torch.equal(sample(attach(sd15, Options("Exact", "ray:auto/cpu"))), expected)
    assert not last_run().notes
    assert [rank.device for rank in last_run().stats.ranks] == [f"{host} cpu" for host in ray_cluster.HOSTS]
    assert POOL.summary()[-1]["devices"] == ray_cluster.BOTH and POOL.summary()[-1]["weights"] > 0
    custom = Options("Custom", "ray:auto/cpu ray:auto/cpu", warmup=2, segments=2)
    found = sample(attach(sd15, custom))
    assert any(not record.synchronous for record in last_run().stats.records)
    assert 0 < (found - expected).norm() < 0.5 * expected.norm()
    assert POOL.release_idle() == 2


def test_a_cluster_without_gpus_is_said(sd15):
    with pytest.raises(ValueError, match="this cluster has 0 GPUs, and 6 CPU cores on 2 machines"):
        attach(sd15, Options(devices="ray:auto"))
